//! Bad input: loops, what others need, names and places in use, images too small, sizes of blocks that do not fit. Each is
//! refused with one clear sentence that says who or what stands in the way, and nothing at all has changed afterwards.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::Client;
use crate::harness::{Daemon, wait_until};
use crate::strategies::{ALL, SIZE};

/// Everything that a refusal could have changed: the lists, and each file with its content.
#[derive(PartialEq)]
struct Everything {
    lists: Vec<(&'static str, Value)>,
    files: BTreeMap<String, Option<Vec<u8>>>,
}

impl Everything {
    fn of(daemon: &Daemon) -> Everything {
        let lists = ["disks", "snapshots", "volumes", "bookmarks", "jobs"]
            .map(|kind| (kind, daemon.get(&format!("/v1/{kind}")).json()))
            .to_vec();
        let mut files = BTreeMap::new();
        add_files(&daemon.path(""), &mut files);
        Everything { lists, files }
    }

    /// The first thing that is not as it was.
    fn difference(&self, now: &Everything) -> Option<String> {
        for ((kind, before), (_, now)) in self.lists.iter().zip(&now.lists) {
            if before != now {
                return Some(format!("{kind}: {before} became {now}"));
            }
        }
        let names = |of: &Everything| of.files.keys().cloned().collect::<Vec<_>>();
        if names(self) != names(now) {
            return Some(format!("{:?} became {:?}", names(self), names(now)));
        }
        let changed = self.files.iter().find(|(name, bytes)| now.files[*name] != **bytes);
        changed.map(|(name, _)| format!("{name} has other bytes"))
    }
}

fn add_files(directory: &Path, files: &mut BTreeMap<String, Option<Vec<u8>>>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            add_files(&path, files);
        }
        // The log tells of it, and pages of the records' file may be written anew with what they had.
        let has_bytes =
            kind.is_file() && !path.to_str().unwrap().ends_with(".log") || path.to_str().unwrap().contains("/images/");
        let is_records = path.file_stem().is_some_and(|stem| stem == "records");
        let bytes = (has_bytes && !is_records).then(|| std::fs::read(&path).unwrap());
        files.insert(path.to_str().unwrap().to_owned(), bytes);
    }
}

/// What the rows are about.
struct Scene {
    daemon: Daemon,
    /// In the places of `$DIR`, `$STOPPED` and so on.
    words: Vec<(&'static str, String)>,
    _seated: Client,
}

impl Scene {
    /// `vm0` has the bookmark `old` and the snapshot `daily`; on that stand `clone`, `seat`, whose guest is there, `slow`,
    /// whose completion is stopped, and on a snapshot of `clone` stands `above`. `copy` is independent. `vm1` is smaller.
    fn new() -> Scene {
        let daemon = Daemon::with_disks(&[SIZE, SIZE / 2], "");
        daemon.client("vm0").write(ALL, 1);
        daemon.snapshot("old", &["vm0"]);
        daemon.send("DELETE", "/v1/snapshots/vm0@old?keep-bookmark=true", "");
        daemon.api().wait_gone("vm0@old");
        daemon.snapshot("daily", &["vm0"]);
        daemon.snapshot("other", &["vm1"]);
        daemon.client("vm0").write(0..100, 2);
        let volume = |name: &str, from: &str| {
            let answer = daemon.send("POST", "/v1/volumes", &json!({ "name": name, "from": from }).to_string());
            answer.ok();
            answer.json()["image"].as_str().unwrap().to_owned()
        };
        let image = volume("clone", "vm0@daily");
        daemon.snapshot("s", &["clone"]);
        volume("above", "clone@s");
        ["seat", "slow", "copy"].into_iter().for_each(|name| drop(volume(name, "vm0@daily")));
        let complete = |query: &str| daemon.send("POST", &format!("/v1/volumes/{query}"), "").json()["id"].to_string();
        let ended = complete("copy/complete");
        wait_until("copy to be independent", || daemon.get(&format!("/v1/jobs/{ended}")).json()["state"] == "done");
        let stopped = complete("slow/complete?delay_ms=3600000");
        daemon.send("DELETE", &format!("/v1/jobs/{stopped}"), "").ok();
        for (name, bytes) in [("there", 10), ("empty.raw", 0), ("odd.raw", 1000)] {
            std::fs::write(daemon.path(name), vec![7; bytes]).unwrap();
        }
        daemon.make_image("small", SIZE / 2);
        daemon.make_image("free", SIZE);
        std::fs::create_dir(daemon.path("folder")).unwrap();
        let seated = daemon.client("seat");
        wait_until("the guest to be seen", || daemon.get("/v1/volumes/seat").json()["frontends"] == 1);
        for disk in ["disks/vm0", "volumes/clone"] {
            wait_until("the others to be gone", || daemon.get(&format!("/v1/{disk}")).json()["frontends"] == 0);
        }
        let shown = |path: &std::path::Path| path.to_str().unwrap().to_owned();
        let words = vec![
            ("$DIR", shown(daemon.dir.path())),
            ("$RUN", shown(&daemon.run_dir())),
            ("$CLONE", image),
            ("$DAILY", daemon.show("vm0@daily")["image"].as_str().unwrap().to_owned()),
            ("$STOPPED", stopped),
            ("$ENDED", ended),
        ];
        Scene { daemon, words, _seated: seated }
    }

    fn fill(&self, text: &str) -> String {
        self.words.iter().fold(text.to_owned(), |text, (word, value)| text.replace(word, value))
    }
}

/// Method, path, body; the code, and what must be said.
type Row = (&'static str, &'static str, &'static str, &'static str, &'static str);

const LOOPS: &[Row] = &[
    ("POST", "/v1/volumes", r#"{"name":"new","from":"new"}"#, "disk-not-found", "new"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"new@new"}"#, "snapshot-not-found", "new@new"),
    ("POST", "/v1/volumes", r#"{"name":"clone","from":"above"}"#, "volume-exists", "clone"),
    ("POST", "/v1/volumes", r#"{"name":"clone","from":"clone@s"}"#, "volume-exists", "clone"),
    ("POST", "/v1/volumes", r#"{"name":"vm0","from":"above"}"#, "disk-exists", "vm0"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0@daily","image":"$CLONE"}"#, "conflict", "$CLONE exists"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0","image":"$DIR/vm0.raw"}"#, "conflict", "vm0.raw exists"),
    ("POST", "/v1/snapshots", r#"{"name":"new","disks":["vm1"],"image":"$DIR/vm0.raw"}"#, "conflict", "vm0.raw"),
    ("POST", "/v1/snapshots", r#"{"name":"new","disks":["vm1","vm1"]}"#, "invalid-request", "vm1"),
    ("PUT", "/v1/disks/new", r#"{"path":"$CLONE"}"#, "conflict", "$CLONE: it is in use"),
    ("PUT", "/v1/disks/new", r#"{"path":"$DAILY"}"#, "conflict", "$DAILY: it is in use"),
    ("PUT", "/v1/disks/new", r#"{"path":"$DIR/vm0.raw"}"#, "conflict", "vm0"),
    ("PUT", "/v1/disks/new", r#"{"path":"$DIR/free.raw","mirror":"$DIR/free.raw"}"#, "invalid-request", "mirror"),
    ("POST", "/v1/disks/vm0/mirror", r#"{"path":"$DIR/vm0.raw"}"#, "conflict", "vm0"),
    ("POST", "/v1/disks/vm0/mirror", r#"{"path":"$CLONE"}"#, "conflict", "$CLONE: it is in use"),
    ("POST", "/v1/disks/vm0/restore", r#"{"from":"vm1@other"}"#, "invalid-request", "does not stand on disk vm0"),
    ("POST", "/v1/disks/vm1/restore", r#"{"from":"above"}"#, "invalid-request", "does not stand on disk vm1"),
    ("POST", "/v1/disks/vm0/restore", r#"{"from":"vm0"}"#, "invalid-request", "from itself"),
    ("POST", "/v1/disks/clone/restore", r#"{"from":"above"}"#, "unsupported", "clone is a volume"),
];

const NEEDED: &[Row] = &[
    ("DELETE", "/v1/snapshots/vm0@daily", "", "snapshot-busy", "volumes clone, seat, slow"),
    ("DELETE", "/v1/snapshots/vm0@daily?force=true", "", "snapshot-busy", "volume delete clone"),
    ("DELETE", "/v1/snapshots/vm0@daily?keep-bookmark=true", "", "snapshot-busy", "clone, seat, slow"),
    ("DELETE", "/v1/snapshots/clone@s", "", "snapshot-busy", "volume above"),
    ("DELETE", "/v1/snapshots/clone@s?force=true", "", "snapshot-busy", "volume delete above"),
    ("DELETE", "/v1/volumes/clone", "", "volume-busy", "above"),
    ("DELETE", "/v1/volumes/clone?force=true", "", "volume-busy", "above"),
    ("DELETE", "/v1/disks/vm0", "", "disk-busy", "clone"),
    ("DELETE", "/v1/disks/vm0?force=true", "", "disk-busy", "clone"),
    ("DELETE", "/v1/disks/vm1", "", "disk-busy", "snapshot"),
    ("DELETE", "/v1/disks/clone?force=true", "", "disk-not-found", "clone is a volume"),
    ("DELETE", "/v1/volumes/vm0?force=true", "", "volume-not-found", "vm0"),
    ("DELETE", "/v1/volumes/seat", "", "volume-busy", "frontend"),
    ("POST", "/v1/volumes/seat/disable", "", "volume-busy", "frontend"),
    ("DELETE", "/v1/jobs/$STOPPED", "", "conflict", "job resume $STOPPED"),
    ("DELETE", "/v1/snapshots/vm0@old", "", "snapshot-not-found", "vm0@old is a bookmark"),
    ("DELETE", "/v1/snapshots/vm1@other?keep-image=true", "", "invalid-request", "keep-image"),
];

const IN_USE: &[Row] = &[
    ("POST", "/v1/volumes", r#"{"name":"vm1","from":"vm0@daily"}"#, "disk-exists", "vm1 is the name of a disk"),
    ("POST", "/v1/volumes", r#"{"name":"seat","from":"vm0"}"#, "volume-exists", "volume delete seat"),
    ("POST", "/v1/volumes", r#"{"name":"daily","from":"vm0"}"#, "snapshot-exists", "vm0 has a snapshot daily"),
    ("POST", "/v1/volumes", r#"{"name":"old","from":"vm0"}"#, "snapshot-exists", "vm0@old"),
    ("PUT", "/v1/disks/clone", r#"{"path":"$DIR/free.raw"}"#, "disk-exists", "clone"),
    ("PUT", "/v1/disks/vm0", r#"{"path":"$DIR/free.raw"}"#, "disk-exists", "vm0"),
    (
        "POST",
        "/v1/snapshots",
        r#"{"name":"daily","disks":["vm1","vm0"]}"#,
        "snapshot-exists",
        "vm0 has a snapshot daily",
    ),
    ("POST", "/v1/snapshots", r#"{"name":"old","disks":["vm1","vm0"]}"#, "snapshot-exists", "vm0@old"),
    ("POST", "/v1/snapshots", r#"{"name":"s","disks":["vm0","clone"]}"#, "snapshot-exists", "clone has a snapshot s"),
    ("POST", "/v1/snapshots", r#"{"name":"new","disks":["vm0","none"]}"#, "disk-not-found", "none"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0","socket":"$RUN/vm1.sock"}"#, "conflict", "disk vm1 has it"),
    (
        "POST",
        "/v1/volumes",
        r#"{"name":"new","from":"vm0","socket":"$RUN/seat.sock"}"#,
        "conflict",
        "volume seat has it",
    ),
    (
        "POST",
        "/v1/volumes",
        r#"{"name":"new","from":"vm0@daily","socket":"$RUN/control.sock"}"#,
        "conflict",
        "control.sock",
    ),
    (
        "POST",
        "/v1/volumes",
        r#"{"name":"new","from":"vm0","socket":"$DIR/there"}"#,
        "conflict",
        "something else is there",
    ),
    (
        "POST",
        "/v1/volumes",
        r#"{"name":"new","from":"vm0","socket":"$DIR/none/x.sock"}"#,
        "invalid-request",
        "$DIR/none",
    ),
    (
        "POST",
        "/v1/volumes",
        r#"{"name":"new","from":"vm0@daily","image":"$DIR/none/x.img"}"#,
        "invalid-config",
        "no directory $DIR/none",
    ),
    (
        "POST",
        "/v1/volumes",
        r#"{"name":"new","from":"vm0","image":"$DIR/none/x.img"}"#,
        "invalid-config",
        "no directory $DIR/none",
    ),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0","image":"x.img"}"#, "invalid-request", "absolute"),
    ("POST", "/v1/volumes", r#"{"name":"New","from":"vm0"}"#, "invalid-name", "New"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0@"}"#, "invalid-name", ""),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0","size":1}"#, "invalid-request", "size"),
    ("POST", "/v1/volumes", r#"{"name":"new"}"#, "invalid-request", "from"),
];

const TOO_SMALL: &[Row] = &[
    ("PUT", "/v1/disks/new", r#"{"path":"$DIR/empty.raw"}"#, "invalid-config", "is empty"),
    ("PUT", "/v1/disks/new", r#"{"path":"$DIR/odd.raw"}"#, "invalid-config", "multiple of 512"),
    (
        "PUT",
        "/v1/disks/new",
        r#"{"path":"$DIR/folder"}"#,
        "invalid-config",
        "neither a regular file nor a block device",
    ),
    ("PUT", "/v1/disks/new", r#"{"path":"$DIR/none.raw"}"#, "invalid-config", "none.raw"),
    ("PUT", "/v1/disks/new", r#"{"path":"$DIR/free.raw","mirror":"$DIR/small.raw"}"#, "invalid-config", "small.raw"),
    ("POST", "/v1/disks/vm0/mirror", r#"{"path":"$DIR/small.raw"}"#, "invalid-config", "small.raw"),
    ("POST", "/v1/disks/vm0/mirror", r#"{"path":"$DIR/folder"}"#, "invalid-config", "folder"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0@daily","block_size":512}"#, "invalid-request", "block_size"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0@daily","block_size":6000}"#, "invalid-request", "block_size"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0","block_size":2097152}"#, "invalid-request", "block_size"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0","block_size":0}"#, "invalid-request", "block_size"),
    ("POST", "/v1/volumes", r#"{"name":"new","from":"vm0","block_size":-1}"#, "invalid-request", "`-1`"),
    ("PUT", "/v1/disks/new", r#"{"path":"$DIR/free.raw","block_size":512}"#, "invalid-request", "block-size"),
    ("PUT", "/v1/disks/new", r#"{"path":"$DIR/free.raw","block_size":2097152}"#, "invalid-request", "block-size"),
];

const OUT_OF_PLACE: &[Row] = &[
    ("POST", "/v1/volumes/clone/promote", "", "volume-busy", "volume complete clone"),
    ("POST", "/v1/volumes/clone/enable?fresh=true", "", "volume-busy", "clone"),
    ("POST", "/v1/volumes/seat/enable?fresh=true", "", "volume-busy", "seat"),
    ("POST", "/v1/volumes/copy/enable?fresh=true", "", "unsupported", "volume enable copy"),
    ("POST", "/v1/volumes/copy/complete", "", "conflict", "independent already"),
    ("POST", "/v1/volumes/clone/complete?delay_ms=3600001", "", "invalid-request", "delay_ms"),
    ("POST", "/v1/volumes/vm0/complete", "", "volume-not-found", "vm0"),
    ("POST", "/v1/disks/vm0/restore", r#"{"from":"vm0@daily","delay_ms":3600001}"#, "invalid-request", "delay_ms"),
    ("POST", "/v1/disks/vm0/restore", r#"{"from":"vm0@old"}"#, "snapshot-not-found", "vm0@old"),
    ("POST", "/v1/jobs/$ENDED/resume", "", "conflict", "nothing to resume"),
    ("PATCH", "/v1/jobs/$STOPPED", r#"{"delay_ms":3600001}"#, "invalid-request", "delay_ms"),
    ("PATCH", "/v1/jobs/$STOPPED", "{}", "invalid-request", "delay_ms"),
    ("PATCH", "/v1/jobs/999", r#"{"delay_ms":1}"#, "job-not-found", "999"),
    ("GET", "/v1/snapshots/vm0@daily/diff?to=vm0@old", "", "invalid-request", "vm0@old"),
    ("GET", "/v1/snapshots/vm0@daily/diff?to=vm1@other", "", "invalid-request", "vm1@other"),
    ("GET", "/v1/volumes/clone/diff?to=vm0@daily", "", "invalid-request", "vm0@daily"),
    ("GET", "/v1/volumes/vm0/map", "", "volume-not-found", "vm0"),
];

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let scene = Scene::new();
    let mut before = Everything::of(&scene.daemon);
    let mut wrong = Vec::new();
    for (method, path, body, code, said) in [LOOPS, NEEDED, IN_USE, TOO_SMALL, OUT_OF_PLACE].concat() {
        let (path, body, said) = (scene.fill(path), scene.fill(body), scene.fill(said));
        let what = format!("{method} {path} {body}");
        let answer = scene.daemon.send(method, &path, &body);
        assert!(answer.status >= 400, "{what} is not refused: {} {}", answer.status, answer.body);
        let told = answer.json();
        let sentence = format!("{}; {}", told["detail"].as_str().unwrap(), told["action"].as_str().unwrap());
        if told["code"] != code || !sentence.contains(&said) || sentence.contains('\n') {
            wrong.push(format!("{what}: {} instead of {code}, {said:?}: {sentence}", told["code"]));
        }
        let now = Everything::of(&scene.daemon);
        wrong.extend(before.difference(&now).map(|difference| format!("{what}: {difference}")));
        before = now;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The command line says the same in one line.
#[test]
fn the_command_line_refuses_in_one_line_and_changes_nothing() {
    let scene = Scene::new();
    let mut before = Everything::of(&scene.daemon);
    let mut wrong = Vec::new();
    for (line, status, said) in [
        ("volume create new --from new", 1, "no disk new"),
        ("volume create clone --from above", 1, "volume clone exists"),
        ("volume create vm0 --from vm0@daily", 1, "vm0 is the name of a disk"),
        ("volume create new --from vm0@daily --image $CLONE", 1, "$CLONE exists"),
        ("volume create new --from vm0 --block-size 512", 2, "4K"),
        ("volume create new --from vm0 --block-size 3M", 2, "4K"),
        ("volume create New --from vm0", 2, "New"),
        ("volume create new", 2, "--from"),
        ("volume delete clone --force", 1, "above"),
        ("volume delete seat", 1, "frontend"),
        ("volume disable seat", 1, "frontend"),
        ("volume enable clone --fresh", 1, "volume disable clone"),
        ("volume promote clone", 1, "volume complete clone"),
        ("volume complete copy", 1, "independent already"),
        ("volume complete clone --delay-ms 3600001", 2, "3600000"),
        ("volume complete clone --limit 5X", 2, "no rate"),
        ("volume diff clone vm0@daily", 1, "vm0@daily"),
        ("snapshot delete vm0@daily --force", 1, "volume delete clone"),
        ("snapshot delete vm0@old", 1, "vm0@old is a bookmark"),
        ("snapshot diff vm0@daily vm0@old", 1, "vm0@old"),
        ("snapshot create daily --disk vm1 --disk vm0", 1, "vm0 has a snapshot daily"),
        ("disk remove vm0 --force", 1, "clone"),
        ("disk restore vm0 --from vm1@other", 1, "does not stand on disk vm0"),
        ("disk restore clone --from above", 1, "clone is a volume"),
        ("disk add new --path $CLONE", 1, "$CLONE: it is in use"),
        ("disk add new --path $DIR/empty.raw", 1, "is empty"),
        ("disk mirror vm0 $DIR/small.raw", 1, "small.raw"),
        ("job stop $STOPPED", 1, "job resume $STOPPED"),
        ("job resume $ENDED", 1, "nothing to resume"),
        ("bookmark delete vm0@daily", 1, "vm0@daily"),
    ] {
        let (line, said) = (scene.fill(line), scene.fill(said));
        let output = scene.daemon.cli(&line.split(' ').collect::<Vec<_>>());
        let told = String::from_utf8(output.stderr).unwrap();
        let is_one_line = status == 2 || told.lines().count() == 1;
        if output.status.code() != Some(status) || !told.contains(&said) || !is_one_line || !output.stdout.is_empty() {
            wrong.push(format!("{line}: {:?} instead of {status}, {said:?}: {told}", output.status.code()));
        }
        let now = Everything::of(&scene.daemon);
        wrong.extend(before.difference(&now).map(|difference| format!("{line}: {difference}")));
        before = now;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
