"""Every relative link of every Markdown file leads to a file, and a #part of it to a heading. Looks at no network."""

import pathlib
import re
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


def prose(text):
    """The text without code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(path):
    """The names that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+\s+(.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def complaints(page):
    for link in LINK.findall(prose(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, part = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists():
            yield f"{page.relative_to(REPO)}: {link}: no such file"
        elif part and path.suffix == ".md" and part not in anchors(path):
            yield f"{page.relative_to(REPO)}: {link}: no such heading"


pages = subprocess.run(["git", "-c", f"safe.directory={REPO}", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
                       cwd=REPO, check=True, capture_output=True, text=True).stdout.split()
found = [line for page in pages if (REPO / page).exists() for line in complaints(REPO / page)]
print(*found, sep="\n", end="\n" if found else "")
print(f"{len(pages)} pages looked at")
sys.exit(bool(found))
