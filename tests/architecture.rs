//! Keeps the house in order: the table of rooms in `src/lib.rs` is the specification, and every file is held to it.
//!
//! The checks read text, not syntax trees: comments and literals are blanked first, then words are looked for. The
//! second half of this file plants violations and shows that each is found.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Where `unsafe` may be. Whoever adds a file here says in its header what makes its face safe.
const UNSAFE_FILES: &[&str] = &[
    "src/bin/vhost-user-halfsilver-blk.rs",
    "src/daemon/mod.rs",
    "src/image/bell.rs",
    "src/image/buffer.rs",
    "src/image/file.rs",
    "src/image/lock.rs",
    "src/image/inline.rs",
    "src/image/queue.rs",
    "src/engine/write.rs",
    "src/store/table/pages.rs",
    "src/vhost_user/features.rs",
    "src/vhost_user/inflight.rs",
    "src/vhost_user/mapping.rs",
    "src/vhost_user/memory.rs",
    "src/vhost_user/request.rs",
    "src/vhost_user/ring.rs",
    "src/vhost_user/server.rs",
    "src/vhost_user/sigbus.rs",
];

/// Rooms in which no files use each other in a circle.
const WITHOUT_CIRCLES: &[&str] = &["image", "store", "engine", "job", "door", "vhost_user", "host", "recovery", "ops"];

/// Rooms that touch the world by the host alone, but for the file that makes and locks our directories; and what would go
/// around it.
const ON_A_HOST: &[&str] = &["src/manager", "src/ops", "src/recovery"];
const MAKES_DIRECTORIES: &str = "src/manager/places.rs";
const AROUND_THE_HOST: &[&str] = &["std::fs", "std::thread", "Instant::now", "new_v4", "FileImage", "SystemTime"];

/// Rooms that hold what the engine is made of. All others ask at the door.
const BEHIND_THE_DOOR: &[&str] = &["engine", "job"];
const AT_THE_ENGINE: &[&str] = &["engine", "job", "door", "vhost_user"];
/// What the engine is made of, and never leaves it: nothing that the door shows to all names one.
const HANDLES: &[&str] = &[
    "Background",
    "Backing",
    "BlockLocks",
    "Chain",
    "ChainEditor",
    "Changes",
    "ClosedDisk",
    "Connection",
    "Connections",
    "EpochClock",
    "EpochLane",
    "Layer",
    "Link",
    "Log",
    "Pair",
    "Restoring",
    "RestoreSource",
    "Saved",
    "Ticket",
    "Version",
    "VersionIn",
    "View",
];

/// Lines of a file's header, rows of tables not counted.
const HEADER_LINES_MAX: usize = 12;
/// Lines of a Rust file.
const FILE_LINES_MAX: usize = 700;
/// Promises that nobody keeps. Taken apart, so that this file does not contain them.
const UNFINISHED: [&str; 3] = [concat!("to", "do!"), concat!("unimple", "mented!"), concat!("FIX", "ME")];

/// What each room may use, by the table in `src/lib.rs`.
type Rooms = BTreeMap<String, BTreeSet<String>>;

/// Reads the table: rows of the form ``//! | `room` | one job | what it may use |``.
fn parse_rooms(lib: &str) -> Result<Rooms, String> {
    let rows: Vec<(String, &str)> = lib
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("//! |")?.split('|').map(str::trim);
            let room = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
            Some((room.to_owned(), cells.nth(1)?))
        })
        .collect();
    let names: BTreeSet<String> = rows.iter().map(|(room, _)| room.clone()).collect();
    if names.is_empty() || names.len() != rows.len() {
        return Err("the table of rooms has no rows, or a room twice".to_owned());
    }
    let mut rooms = Rooms::new();
    for (room, cell) in rows {
        // What stands in brackets is said to people.
        let uses = cell.split('(').next().unwrap_or_default().trim();
        let uses: BTreeSet<String> = match uses {
            "–" => BTreeSet::new(),
            "all" => names.clone(),
            list => list.split(',').map(|name| name.trim().to_owned()).collect(),
        };
        if let Some(unknown) = uses.difference(&names).next() {
            return Err(format!("the row of {room} names {unknown:?}, which has no row"));
        }
        rooms.insert(room, uses);
    }
    Ok(rooms)
}

/// The same text with comments and the insides of literals blanked; lines stay where they are.
fn code_of(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let blank = |out: &mut String, part: &str| out.extend(part.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
    while let Some(first) = rest.chars().next() {
        let before_is_word = out.chars().next_back().is_some_and(is_word);
        let len = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment_len(rest)
        } else if first == '"' {
            quoted_len(rest, '"')
        } else if let Some(len) = raw_string_len(rest).filter(|_| !before_is_word) {
            len
        } else if first == '\'' {
            char_len(rest)
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        blank(&mut out, &rest[..len]);
        rest = &rest[len..];
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn block_comment_len(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

fn quoted_len(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn raw_string_len(text: &str) -> Option<usize> {
    let body = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let inside = body[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let prefix = text.len() - inside.len();
    Some(inside.find(&end).map_or(text.len(), |at| prefix + at + end.len()))
}

/// The length of a character literal, or of the quote alone when it begins a lifetime.
fn char_len(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => quoted_len(text, '\''),
        Some(_) => match chars.next() {
            Some((at, '\'')) => at + 1,
            _ => 1,
        },
        None => 1,
    }
}

/// The positions at which `word` stands as a whole word.
fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

fn line_of(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

/// Everything below the crate that the code names, each with its line: `crate::a::b` and `crate::{a, b::c}`.
fn crate_references(code: &str) -> Vec<(usize, String)> {
    let named = paths_from(code, "crate").into_iter().flat_map(|(at, paths)| paths.into_iter().map(move |p| (at, p)));
    let first = |path: Vec<String>| path.into_iter().nth(1).unwrap_or_default();
    let mut found: Vec<_> = named.map(|(at, path)| (line_of(code, at), first(path))).collect();
    found.dedup();
    found
}

/// All paths that begin with `word`, by the position of that: `word::{a, b::c}` is two.
fn paths_from(code: &str, word: &str) -> Vec<(usize, Vec<Vec<String>>)> {
    let path_begins = |at: &usize| !code[..*at].trim_end().ends_with("::");
    let found = words(code, word).filter(path_begins).map(|at| (at, paths_of(&code[at..])));
    found.filter(|(_, paths)| paths.iter().any(|path| path.len() > 1)).collect()
}

/// The paths of a tree as in `use`, which begins with a name.
fn paths_of(tree: &str) -> Vec<Vec<String>> {
    let name: String = tree.chars().take_while(|&c| is_word(c)).collect();
    let Some(rest) = tree[name.len()..].trim_start().strip_prefix("::") else { return vec![vec![name]] };
    let rest = rest.trim_start();
    let below = match rest.strip_prefix('{') {
        Some(group) => items_of_group(group).into_iter().flat_map(paths_of).collect(),
        None => paths_of(rest),
    };
    below.into_iter().map(|path| std::iter::once(name.clone()).chain(path).collect()).collect()
}

/// The items of a `use` group, which begins behind its bracket.
fn items_of_group(group: &str) -> Vec<&str> {
    let (mut items, mut depth, mut start) = (Vec::new(), 0usize, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                items.extend(Some(group[start..at].trim()).filter(|item| !item.is_empty()));
                start = at + 1;
                if c == '}' {
                    return items;
                }
            }
            _ => {}
        }
    }
    items
}

/// Which module of a folder uses which of its neighbours. What it has by the name of the folder's own module, `parent`, it
/// has from where that has it from. Tests at the end of a file do not count. A module's sub-modules are a part of it.
fn neighbours(folder: &str, parent: &str, files: &[(String, String)]) -> Rooms {
    let module_of = |path: &str| {
        let inside = path.strip_prefix(folder)?.strip_prefix('/')?;
        let module = inside.split('/').next()?.trim_end_matches(".rs").to_owned();
        (module != "mod" && !inside.ends_with("_tests.rs")).then_some((module, !inside.contains('/')))
    };
    let modules: BTreeSet<String> = files.iter().filter_map(|(path, _)| Some(module_of(path)?.0)).collect();
    let all_paths = |code: &str, word: &str| paths_from(code, word).into_iter().flat_map(|(_, paths)| paths).collect();
    let parent = code_of(parent);
    let mut from = BTreeMap::new();
    for module in &modules {
        let exported: Vec<Vec<String>> = all_paths(&parent, module);
        from.extend(exported.into_iter().filter_map(|path| Some((path.last()?.clone(), module.clone()))));
        from.insert(module.clone(), module.clone());
    }
    let here: Vec<String> = folder.split('/').skip(1).map(str::to_owned).collect();
    let mut uses = Rooms::new();
    for (path, text) in files {
        let Some((module, is_direct)) = module_of(path) else { continue };
        let code = code_of(text);
        let code = code.split("\n#[cfg(test)]").next().unwrap_or_default();
        let code = code.split("\n#[cfg(all(test").next().unwrap_or_default();
        let by_crate: Vec<Vec<String>> = all_paths(code, "crate");
        let inside = |path: &Vec<String>| Some(path[1..].strip_prefix(&here[..])?.first()?.clone());
        let mut names: Vec<String> = by_crate.iter().filter_map(inside).collect();
        if is_direct || path.ends_with("/mod.rs") {
            let by_super: Vec<Vec<String>> = all_paths(code, "super");
            names.extend(by_super.into_iter().filter_map(|path| path.into_iter().nth(1)));
        }
        let used = names.iter().filter_map(|name| from.get(name)).filter(|&used| *used != module).cloned();
        uses.entry(module.clone()).or_default().extend(used);
    }
    uses
}

/// A circle of modules that use each other, if there is one.
fn circle(uses: &Rooms) -> Option<Vec<String>> {
    // What uses nothing that is left cannot be in one.
    let mut left = uses.clone();
    while let Some(done) =
        left.iter().find(|(_, used)| !used.iter().any(|u| left.contains_key(u))).map(|(m, _)| m.clone())
    {
        left.remove(&done);
    }
    let mut way = vec![left.keys().next()?.clone()];
    loop {
        let next = left[&way[way.len() - 1]].iter().find(|used| left.contains_key(*used))?.clone();
        let again = way.iter().position(|module| *module == next);
        way.push(next);
        if let Some(start) = again {
            return Some(way.split_off(start));
        }
    }
}

/// What is wrong with a room's file by the table.
fn room_complaints(rooms: &Rooms, room: &str, text: &str) -> Vec<String> {
    let Some(uses) = rooms.get(room) else { return vec![format!("{room} is no room of the table in src/lib.rs")] };
    let code = code_of(text);
    let mut wrong: Vec<String> = crate_references(&code)
        .into_iter()
        .filter(|(_, name)| name != room && !uses.contains(name))
        .map(|(line, name)| format!("line {line}: {room} may not use {name}"))
        .collect();
    // A way out of the room past the name of the crate.
    let squeezed: String = code.chars().filter(|c| !c.is_whitespace()).collect();
    if squeezed.contains("super::super") {
        wrong.push("super::super: write crate::… so that the table can be kept".to_owned());
    }
    wrong
}

/// Rooms that may use what only the door may.
fn ways_around_the_door(rooms: &Rooms) -> Vec<String> {
    let others = rooms.iter().filter(|(room, _)| !AT_THE_ENGINE.contains(&room.as_str()));
    let found = others.flat_map(|(room, uses)| {
        BEHIND_THE_DOOR.iter().filter(|held| uses.contains(**held)).map(move |held| (room, held))
    });
    found.map(|(room, held)| format!("{room} may use {held}, and is to ask at the door")).collect()
}

/// Lines of a file of the door that show a handle to all: in what is `pub`, or is taken from the engine to be.
fn handles_shown(text: &str) -> Vec<(usize, &'static str)> {
    let code = code_of(text);
    let code = code.split("#[cfg(test)]").next().unwrap_or_default();
    let mut found = Vec::new();
    for at in words(code, "pub").filter(|at| !code[at + 3..].starts_with('(')) {
        let rest = &code[at..];
        let is = |kind: &str| rest[3..].trim_start().starts_with(kind);
        let len = match () {
            () if is("enum ") => rest.find("\n}"),
            () if is("use ") || is("type ") => rest.find(';'),
            () if is("fn ") || is("async ") || is("trait ") || is("struct ") => rest.find(['{', ';']),
            () => rest.find('\n'), // A field.
        };
        let item = &rest[..len.unwrap_or(rest.len())];
        let named = HANDLES.iter().flat_map(|handle| words(item, handle).map(move |inside| (inside, *handle)));
        // The engine's disk, and no other.
        let disks = item.match_indices("engine::Disk").map(|(inside, _)| (inside, "engine::Disk"));
        // The name of a variant, and a path through one, is no handle.
        let is_type = |inside: usize, handle: &str| {
            let is_name = is("enum ") && item[..inside].trim_end_matches(' ').ends_with('\n');
            let is_path = item[inside + handle.len()..].starts_with("::");
            !(is_name || is_path)
        };
        let handles = named.filter(|(inside, handle)| is_type(*inside, handle)).chain(disks);
        found.extend(handles.map(|(inside, handle)| (line_of(code, at + inside), handle)));
    }
    found
}

/// What is wrong with any file's form.
fn form_complaints(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let header = text.lines().take_while(|line| line.starts_with("//!"));
    match header.filter(|line| !line.starts_with("//! |")).count() {
        0 => wrong.push("it does not open with a //! header".to_owned()),
        n if n > HEADER_LINES_MAX => wrong.push(format!("its header has {n} lines, more than {HEADER_LINES_MAX}")),
        _ => {}
    }
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        wrong.push(format!("it has {lines} lines, more than {FILE_LINES_MAX}"));
    }
    wrong
}

fn unsafe_lines(text: &str) -> Vec<usize> {
    let code = code_of(text);
    words(&code, "unsafe").map(|at| line_of(&code, at)).collect()
}

fn unfinished_words(text: &str) -> Vec<&'static str> {
    UNFINISHED.into_iter().filter(|word| text.contains(word)).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below a folder of the repository, by their paths in it. What git ignores is not there in a clone.
fn files_below(folder: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() && entry.file_name() != "__pycache__" => folders.push(path),
                kind if kind.is_file() => files.push(path.strip_prefix(root()).unwrap().to_owned()),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

fn rust_files(folder: &str) -> Vec<(String, String)> {
    let rust = files_below(folder).into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    rust.map(|path| (path.to_str().unwrap().to_owned(), fs::read_to_string(root().join(path)).unwrap())).collect()
}

/// The room of a file of `src/`. The programs (`main.rs`, `bin/`) and `lib.rs` are in none.
fn room_of(path: &str) -> Option<&str> {
    let inside = path.strip_prefix("src/")?;
    let room = inside.split_once('/').map_or_else(|| inside.trim_end_matches(".rs"), |(folder, _)| folder);
    (!matches!(room, "lib" | "main" | "bin")).then_some(room)
}

fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn rooms_use_only_what_their_row_allows() {
    let rooms = parse_rooms(&fs::read_to_string(root().join("src/lib.rs")).unwrap()).unwrap();
    let files = rust_files("src");
    let seen: BTreeSet<&str> = files.iter().filter_map(|(path, _)| room_of(path)).collect();
    let mut wrong: Vec<String> = files
        .iter()
        .filter_map(|(path, text)| Some((path, room_complaints(&rooms, room_of(path)?, text))))
        .flat_map(|(path, found)| found.into_iter().map(move |what| format!("{path}: {what}")))
        .collect();
    wrong.extend(rooms.keys().filter(|room| !seen.contains(room.as_str())).map(|room| format!("no file is in {room}")));
    assert_none(&wrong);
}

#[test]
fn the_engine_is_asked_at_its_door_by_values() {
    let mut wrong =
        ways_around_the_door(&parse_rooms(&fs::read_to_string(root().join("src/lib.rs")).unwrap()).unwrap());
    let files = rust_files("src/door");
    assert!(!files.is_empty(), "there is no door");
    for (path, text) in files {
        let found = handles_shown(&text).into_iter();
        wrong.extend(found.map(|(line, handle)| format!("{path}: line {line}: {handle} is shown to all")));
    }
    assert_none(&wrong);
}

#[test]
fn files_of_a_room_use_each_other_in_one_direction() {
    let files = rust_files("src");
    let mut wrong = Vec::new();
    for room in WITHOUT_CIRCLES {
        let room = format!("src/{room}");
        let inside = |path: &Path| path.starts_with(&room);
        let folders: BTreeSet<&Path> =
            files.iter().filter_map(|(path, _)| Path::new(path).parent()).filter(|path| inside(path)).collect();
        assert!(!folders.is_empty(), "{room} is no folder");
        for folder in folders {
            let folder = folder.to_str().unwrap();
            let is_parent = |path: &str| path == format!("{folder}.rs") || path == format!("{folder}/mod.rs");
            let parent = files.iter().find(|(path, _)| is_parent(path)).map_or("", |(_, text)| text);
            let circle = circle(&neighbours(folder, parent, &files));
            wrong.extend(circle.map(|way| format!("{folder}: {}", way.join(" uses "))));
        }
    }
    assert_none(&wrong);
}

/// Lines that touch the world around the host.
fn lines_around_the_host(text: &str) -> Vec<(usize, &'static str)> {
    let code = code_of(text);
    let code = code.split("#[cfg(test)]").next().unwrap_or_default();
    let found =
        |word: &&'static str| code.match_indices(*word).map(|(at, _)| (line_of(code, at), *word)).collect::<Vec<_>>();
    AROUND_THE_HOST.iter().flat_map(found).collect()
}

#[test]
fn commands_and_starts_touch_the_world_by_their_host() {
    let files = ON_A_HOST.iter().flat_map(|folder| rust_files(folder));
    let production = files
        .filter(|(path, _)| path != MAKES_DIRECTORIES && !path.ends_with("_tests.rs") && !path.ends_with("fixture.rs"));
    let of_file = |(path, text): (String, String)| {
        let found = lines_around_the_host(&text).into_iter();
        found.map(|(line, what)| format!("{path}: line {line}: {what}")).collect::<Vec<_>>()
    };
    assert_none(&production.flat_map(of_file).collect::<Vec<_>>());
}

#[test]
fn what_goes_around_the_host_is_found() {
    let text = "// std::fs\nfn f() {\n    std::fs::read(x);\n}\n#[cfg(test)]\nmod tests { fn g() { std::thread::sleep(x) } }\n";
    assert_eq!(lines_around_the_host(text), [(3, "std::fs")]);
}

#[test]
fn files_have_headers_and_an_end() {
    let files = ["src", "tests", "benches"].into_iter().flat_map(rust_files);
    let wrong: Vec<String> = files
        .flat_map(|(path, text)| form_complaints(&text).into_iter().map(move |what| format!("{path}: {what}")))
        .collect();
    assert_none(&wrong);
}

#[test]
fn unsafe_is_where_the_list_says() {
    let mut wrong = Vec::new();
    for (path, text) in rust_files("src") {
        match (unsafe_lines(&text).as_slice(), UNSAFE_FILES.contains(&path.as_str())) {
            ([], true) => wrong.push(format!("{path}: has no unsafe code any more; take it off the list")),
            ([line, ..], false) => wrong.push(format!("{path}: line {line}: unsafe, and the file is not on the list")),
            _ => {}
        }
    }
    assert_none(&wrong);
}

#[test]
fn nothing_is_left_for_later() {
    let folders = ["src", "tests", "benches", "docs", "scripts", "qemu"];
    let files = folders.iter().flat_map(|folder| files_below(folder)).chain(["README.md".into(), "Cargo.toml".into()]);
    let wrong: Vec<String> = files
        .filter_map(|path| Some((fs::read_to_string(root().join(&path)).ok()?, path)))
        .flat_map(|(text, path)| {
            unfinished_words(&text).into_iter().map(move |word| format!("{}: {word}", path.display()))
        })
        .collect();
    assert_none(&wrong);
}

// The checks themselves.

fn small_house() -> Rooms {
    let table = "//! | room | one job | may use |\n//! |--|--|--|\n//! | `cellar` | holds | – |\n\
                 //! | `kitchen` | cooks | cellar |\n//! | `hall` | leads on | all |\n\
                 //! | `porch` | greets | hall, cellar (for `wood`) |\n";
    parse_rooms(table).unwrap()
}

#[test]
fn the_table_is_read() {
    let rooms = small_house();
    assert!(rooms["cellar"].is_empty());
    assert_eq!(rooms["hall"].len(), 4);
    assert_eq!(rooms["porch"], BTreeSet::from(["cellar".to_owned(), "hall".to_owned()]));
    assert!(parse_rooms("//! no table").is_err());
    assert!(parse_rooms("//! | `a` | x | b |").is_err(), "an unknown room");
    assert!(parse_rooms("//! | `a` | x | – |\n//! | `a` | x | – |").is_err(), "a room twice");
}

#[test]
fn a_forbidden_use_is_found_however_it_is_written() {
    let rooms = small_house();
    for bad in [
        "use crate::kitchen::Pan;",
        "fn f() { crate :: hall::go() }",
        "use crate::{cellar::Jar, kitchen};",
        "use crate::{cellar::{Jar, Lid}, hall::{self, Door}};",
        "let c = '\"'; use crate::hall; let d = '\"';",
        "fn f<'a>(s: &'a str) -> crate::hall::Door { s }",
        "let r = r#\"a \" b\"#; crate::hall::go();",
        "use super::super::hall;",
        "use crate::attic::Trunk;",
    ] {
        assert_eq!(room_complaints(&rooms, "cellar", bad).len(), 1, "{bad}");
    }
    for good in [
        "use crate::cellar::Jar;",
        "// use crate::kitchen;\n/// [`crate::kitchen::Pan`]\nfn f() {}",
        "/* a /* b */ use crate::hall; */",
        "let s = \"\\\" crate::hall\"; let t = r#\"crate::hall\"#; let u = br\"crate::hall\";",
        "pub(crate) fn f() {} let my_crate::hall = 1;",
    ] {
        assert_eq!(room_complaints(&rooms, "cellar", good), Vec::<String>::new(), "{good}");
    }
    assert_eq!(room_complaints(&rooms, "kitchen", "use crate::cellar;"), Vec::<String>::new());
    assert_eq!(room_complaints(&rooms, "attic", "").len(), 1, "a room without a row");
    assert_eq!(room_complaints(&rooms, "cellar", "\n\ncrate::hall::go()"), ["line 3: cellar may not use hall"]);
}

#[test]
fn what_goes_around_the_door_is_found() {
    let rooms = |uses: &str| {
        let table = "//! | `engine` | x | – |\n//! | `job` | x | engine |\n//! | `door` | x | engine, job |\n";
        parse_rooms(&format!("{table}//! | `manager` | x | {uses} |")).unwrap()
    };
    assert_eq!(ways_around_the_door(&rooms("door")), Vec::<String>::new());
    assert_eq!(ways_around_the_door(&rooms("door, engine")).len(), 1);
    assert_eq!(ways_around_the_door(&rooms("all")).len(), 2);
    for bad in [
        "pub fn chain(&self) -> Arc<Chain> {",
        "pub fn f(\n    &self,\n    of: &engine::Disk,\n) {",
        "pub use crate::engine::{Epoch, Pair};",
        "pub struct S {\n    pub image: Backing,\n}",
        "pub enum E {\n    One(u64),\n    Two(Arc<Version>),\n}",
        "pub type Old = engine::Disk;",
    ] {
        assert_eq!(handles_shown(bad).len(), 1, "{bad}");
    }
    for good in [
        "pub(super) fn chain(&self) -> Arc<Chain> {",
        "/// [`Chain`]\npub fn f(id: VersionId) -> VersionFacts { Chain::new() }",
        "pub struct S {\n    image: Backing,\n}",
        "pub enum E {\n    Log(Bytes, DurableTable),\n    Saved,\n}",
        "pub enum E {\n    One,\n}\nfn f() -> Chain {}",
    ] {
        assert_eq!(handles_shown(good), [], "{good}");
    }
}

#[test]
fn circles_are_found_however_they_are_written() {
    let with = |parent: &str, files: [(&str, &str); 3]| {
        let files = files.map(|(path, text)| (format!("src/cellar/{path}"), text.to_owned()));
        circle(&neighbours("src/cellar", parent, &files)).map(|way| way.join(" "))
    };
    let parent =
        "mod jar;\nmod lid;\nmod shelf;\npub use jar::Jar;\npub use lid::{Lid, Seal as _};\npub use shelf::Shelf;";
    for bad in [
        [("jar.rs", "use super::lid::Lid;"), ("lid.rs", "use super::jar::Jar;"), ("shelf.rs", "")],
        [("jar.rs", "use super::{Lid, Shelf};"), ("lid.rs", "fn f(jar: &super::Jar) {}"), ("shelf.rs", "")],
        [("jar.rs", "use crate::cellar::Lid;"), ("lid.rs", "use crate::cellar::{jar::Jar};"), ("shelf.rs", "")],
        [("jar/mod.rs", ""), ("jar/rim.rs", "use crate::cellar::Lid;"), ("lid.rs", "use super::Jar;")],
    ] {
        assert_eq!(with(parent, bad).as_deref(), Some("jar lid jar"), "{bad:?}");
    }
    let long = [("jar.rs", "use super::Lid;"), ("lid.rs", "use super::shelf;"), ("shelf.rs", "super::jar::f()")];
    assert_eq!(with(parent, long).as_deref(), Some("jar lid shelf jar"));
    for good in [
        [("jar.rs", "use super::{Lid, Shelf};"), ("lid.rs", "use super::Shelf;"), ("shelf.rs", "// use super::Jar;")],
        [("jar.rs", "use super::Lid;"), ("lid.rs", "fn f() {}\n#[cfg(test)]\nuse super::Jar;"), ("shelf.rs", "")],
        [("jar.rs", "use super::Lid;"), ("jar_tests.rs", ""), ("lid_tests.rs", "use super::Jar;")],
        [("jar.rs", "mod rim;"), ("jar/rim.rs", "use super::Lid;"), ("lid.rs", "use crate::attic::Jar;")],
    ] {
        assert_eq!(with(parent, good), None, "{good:?}");
    }
}

#[test]
fn bad_form_is_found() {
    assert_eq!(form_complaints("//! Good.\n"), Vec::<String>::new());
    assert_eq!(form_complaints("use std::fs;\n").len(), 1);
    assert_eq!(form_complaints(&"//! Long.\n".repeat(13)).len(), 1);
    assert_eq!(form_complaints(&format!("//! Table.\n{}", "//! | row |\n".repeat(20))), Vec::<String>::new());
    assert_eq!(form_complaints(&format!("//! Long.\n{}", "\n".repeat(700))).len(), 1);
    assert_eq!(unsafe_lines("// unsafe\nlet s = \"unsafe\";\nunsafe_op();\nunsafe { x() }"), [4]);
    for word in UNFINISHED {
        assert_eq!(unfinished_words(&format!("x {word} y")), [word]);
    }
    assert!(unfinished_words("todo = \"deny\"").is_empty());
}

#[test]
fn files_know_their_room() {
    assert_eq!(room_of("src/image/file.rs"), Some("image"));
    assert_eq!(room_of("src/sync.rs"), Some("sync"));
    for none in ["src/lib.rs", "src/main.rs", "src/bin/program.rs", "tests/engine/sim.rs"] {
        assert_eq!(room_of(none), None, "{none}");
    }
}
