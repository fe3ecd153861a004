//! Planted defects are woven into a copy of the crate (`scripts/weave`). Here nothing is built: every overlay must fit the
//! tree as it is, every defect must have a test, and `src/` must know nothing of them.
//!
//! The second half of this file weaves small trees, and shows that each kind of misfit is found.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn weave(tree: &Path, argument: Option<&str>) -> Output {
    let mut command = Command::new("python3");
    command.arg(root().join("scripts/weave")).arg("--root").arg(tree).args(argument);
    command.output().expect("python3 is there")
}

/// What it says when it is content.
fn woven(tree: &Path, argument: Option<&str>) -> String {
    let output = weave(tree, argument);
    assert!(output.status.success(), "\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What it says when something does not fit.
fn misfit(tree: &Path) -> String {
    let output = weave(tree, Some("--check"));
    assert!(!output.status.success(), "everything fits");
    String::from_utf8(output.stderr).unwrap()
}

fn rust_files(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => found.extend(rust_files(&path)),
            _ if path.extension().is_some_and(|e| e == "rs") => {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
            _ => {}
        }
    }
    found
}

/// The words that follow `before` in a text.
fn names_after<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default())
}

#[test]
fn every_overlay_fits() {
    woven(root(), Some("--check"));
}

#[test]
fn every_defect_has_a_test_and_every_test_its_defect() {
    let list = woven(root(), Some("--list"));
    let defects: BTreeSet<&str> = list.lines().collect();
    assert!(defects.len() > 100, "{list}");
    let mut wrong = Vec::new();

    let by_one_test = fs::read_to_string(root().join("tests/planted.list")).unwrap();
    let mut tested = BTreeSet::new();
    for line in by_one_test.lines().filter(|line| !line.starts_with('#')) {
        let [defect, program, test] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("a line that is no defect, program and test: {line}");
        };
        tested.insert(defect);
        let folder = root().join(if program == "lib" { "src".to_owned() } else { format!("tests/{program}") });
        let function = format!("fn {}(", test.rsplit("::").next().unwrap());
        if !rust_files(&folder).iter().any(|(_, text)| text.contains(&function)) {
            wrong.push(format!("{defect}: there is no test {test} in {}", folder.display()));
        }
    }
    let tests = rust_files(&root().join("tests"));
    let tests = tests.iter().filter(|(path, _)| !path.starts_with(root().join("tests/planted")));
    let tests = tests.filter(|(path, _)| *path != root().join(file!()));
    for (_, text) in tests {
        tested.extend(names_after(text, "Defect::"));
        // The daemon is told by name.
        tested.extend(names_after(text, "\"").filter(|name| defects.contains(name)));
    }
    tested.remove("");
    wrong.extend(defects.difference(&tested).map(|defect| format!("{defect}: no test is to notice it")));
    wrong.extend(tested.difference(&defects).map(|defect| format!("{defect}: there is no such defect")));
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn the_crate_itself_knows_no_defect() {
    for (path, text) in rust_files(&root().join("src")) {
        let word = ["planted::", "mod planted", "Defect::", "feature ="].into_iter().find(|word| text.contains(word));
        assert_eq!(word, None, "{}", path.display());
    }
}

// The weaving itself, on small trees.

const SOURCE: &str = "fn go(a: bool) -> u8 {\n    let x = one();\n    // Why.\n    if a && is_two(x) {\n        sync();\n    }\n    x\n}\n";
const SWITCH: &str = "defects! {}\n";

/// A crate of one file, and one overlay.
fn tree(overlay: &str) -> tempfile::TempDir {
    let tree = tempfile::tempdir().unwrap();
    for folder in ["src", "tests/planted"] {
        fs::create_dir_all(tree.path().join(folder)).unwrap();
    }
    fs::write(tree.path().join("Cargo.toml"), "[package]\n").unwrap();
    fs::write(tree.path().join("src/go.rs"), SOURCE).unwrap();
    fs::write(tree.path().join("tests/planted/planted.rs"), SWITCH).unwrap();
    fs::write(tree.path().join("tests/planted/all.overlay"), overlay).unwrap();
    tree
}

/// An overlay of one defect with these blocks of the one file.
fn one(blocks: &[&str]) -> String {
    let blocks: String = blocks.iter().map(|block| format!("-- src/go.rs\n{block}\n")).collect();
    format!("# All.\n\n== Wrong\nWhat is left out.\n{blocks}")
}

/// The one file when these blocks are woven in, and the defect by a shorter name.
fn file_with(blocks: &[&str]) -> String {
    let tree = tree(&one(blocks));
    woven(tree.path(), None);
    let text = fs::read_to_string(tree.path().join("target/woven/src/go.rs")).unwrap();
    text.replace("crate::planted::is(crate::planted::Defect::Wrong)", "WRONG")
}

#[test]
fn marks_are_put_in_whatever_the_white_space_is() {
    let cases: [(&[&str], &str, &str); 6] = [
        (&["if a && is_two(x){+ && !PLANTED+} {"], "is_two(x) {", "is_two(x) && !WRONG {"),
        (&["{+if PLANTED { return 0; }+}\nif a"], "    if a", "    if WRONG { return 0; }\n    if a"),
        (&["let x = one();\n{+two();+}"], "    // Why.", "    two();\n    // Why."),
        (&["{+if !PLANTED {+} sync();{+ }+}"], "        sync();", "        if !WRONG {\n        sync(); }"),
        (&["let x = {-one-}{+if PLANTED { two } else { one }+}();"], "one()", "if WRONG { two } else { one }()"),
        (&["is_two(x){+ && !PLANTED+}", "is_two({+PLANTED || +}x)"], "is_two(x)", "is_two(WRONG || x) && !WRONG"),
    ];
    for (blocks, before, after) in cases {
        let blocks: Vec<String> = blocks.iter().map(|block| block.replace("two();", "if PLANTED { two() }")).collect();
        let blocks: Vec<&str> = blocks.iter().map(String::as_str).collect();
        let expected = SOURCE.replace(before, &after.replace("two();", "if WRONG { two() }"));
        assert_ne!(expected, SOURCE);
        assert_eq!(file_with(&blocks), expected, "{blocks:?}");
    }
}

#[test]
fn defects_of_one_statement_go_together_and_the_list_has_them() {
    let of = |name: &str, mark: &str| format!("== {name}\nWhat {name} is.\n-- src/go.rs\nif a && is_two(x){mark} {{\n");
    let tree = tree(&(of("First", "{+ && !PLANTED+}") + &of("Second", "{+ || PLANTED+}")));
    assert_eq!(woven(tree.path(), Some("--list")), "First\nSecond\n");
    woven(tree.path(), None);
    let read = |file| fs::read_to_string(tree.path().join("target/woven/src").join(file)).unwrap();
    let is = |name| format!("crate::planted::is(crate::planted::Defect::{name})");
    assert!(
        read("go.rs").contains(&format!("is_two(x) && !{} || {} {{", is("First"), is("Second"))),
        "{}",
        read("go.rs")
    );
    assert_eq!(
        read("planted.rs"),
        "defects! {\n    /// What First is.\n    First,\n    /// What Second is.\n    Second,\n}\n"
    );
}

/// Or cargo would build everything at each weaving.
#[test]
fn what_comes_out_the_same_keeps_its_time_and_what_is_gone_goes() {
    let tree = tree(&one(&["is_two(x){+ && !PLANTED+}"]));
    fs::write(tree.path().join("src/other.rs"), "").unwrap();
    woven(tree.path(), None);
    let copy = tree.path().join("target/woven");
    let time = || fs::metadata(copy.join("src/go.rs")).unwrap().modified().unwrap();
    let first = time();
    assert!(copy.join("src/other.rs").exists() && copy.join("tests/planted").exists());
    fs::remove_file(tree.path().join("src/other.rs")).unwrap();
    woven(tree.path(), None);
    assert_eq!(time(), first);
    assert!(!copy.join("src/other.rs").exists());
    fs::write(tree.path().join("src/go.rs"), SOURCE.replace("Why", "Because")).unwrap();
    woven(tree.path(), None);
    assert!(fs::read_to_string(copy.join("src/go.rs")).unwrap().contains("Because"));
}

#[test]
fn every_misfit_is_found() {
    let fits = "is_two(x){+ && !PLANTED+}";
    let cases = [
        (one(&["is_three(x){+ && !PLANTED+}"]), "all.overlay:5: Wrong: src/go.rs has these lines 0 times"),
        (one(&["x{+ + u8::from(PLANTED)+}"]), "src/go.rs has these lines 3 times"),
        (one(&["two(x){+ && !PLANTED+}"]), "src/go.rs has these lines 0 times"),
        (one(&[fits, "is_two(x)"]), "all.overlay:7: Wrong: it changes nothing"),
        (one(&["{+PLANTED;+}"]), "a block without a line of src/go.rs"),
        (one(&["is_two(x){+ && true+}"]), "Wrong: nothing asks for this defect"),
        (
            one(&["if a{+ && !PLANTED+}", "{-a && is_two(x)-}{+PLANTED+}"]),
            "all.overlay:7 and tests/planted/all.overlay:5 change the same text",
        ),
        (one(&[fits]) + &one(&["if a{+ && PLANTED+}"]).replace("# All.", ""), "Wrong: two defects have this name"),
        (one(&[fits]).replace("What is left out.", ""), "Wrong: it does not say what is left out"),
        (one(&[fits]).replace("go.rs", "gone.rs"), "there is no src/gone.rs"),
        (one(&[fits]).replace("Wrong", "wrong"), "'wrong' is no name of a defect"),
        (one(&[fits]).replace("Wrong", "always"), "always: it is no defect"),
        (one(&["is_two(x){+ && planted::is(Defect::Other)+}"]), "Other: there is no such defect"),
        (one(&[fits]).replace("# All.", "All."), "all.overlay:1: a line before the first section"),
    ];
    for (overlay, complaint) in cases {
        let said = misfit(tree(&overlay).path());
        assert!(said.contains(complaint), "{overlay}\n{said}");
    }
    let without_switch = tree(&one(&[fits]));
    fs::write(without_switch.path().join("tests/planted/planted.rs"), "").unwrap();
    assert!(misfit(without_switch.path()).contains("src/planted.rs has no list of defects"));
    let with_stranger = tree(&one(&[fits]));
    fs::write(with_stranger.path().join("src/go.rs"), SOURCE.replace("sync", "planted::is(Defect::Orphan)")).unwrap();
    assert!(misfit(with_stranger.path()).contains("Orphan: there is no such defect"));
}
