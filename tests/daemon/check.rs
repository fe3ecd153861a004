//! `halfsilver check`: it finds and names every damage, changes nothing unless it is told to, and what it says that a
//! start would do is what a start then does.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use halfsilver::image::{Direct, FileImage, ImageOptions};
use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, can_mount, names_in, run};

const SIZE: u64 = 1 << 20;
const SECTORS: usize = 2048;

/// Everything below a directory: bytes, modes, times and owners.
type Tree = BTreeMap<PathBuf, (u32, i64, i64, u64, Vec<u8>)>;

fn tree(dir: &Path) -> Tree {
    let mut all = Tree::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let bytes = if meta.is_file() { std::fs::read(&path).unwrap() } else { Vec::new() };
        if meta.is_dir() {
            left.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        all.insert(path, (meta.mode(), meta.mtime(), meta.mtime_nsec(), u64::from(meta.uid()), bytes));
    }
    all
}

/// What the examination says, and its exit status. Nothing is changed by it.
#[track_caller]
pub(crate) fn examine(daemon: &Daemon) -> (Value, i32) {
    let before = tree(daemon.dir.path());
    let people = daemon.check(&[]);
    let machine = daemon.check(&["--json"]);
    let after = tree(daemon.dir.path());
    for (path, was) in &before {
        assert!(after.get(path) == Some(was), "{} was changed by an examination", path.display());
    }
    assert_eq!(before.len(), after.len(), "something was made by an examination");
    assert_eq!(people.status, machine.status);
    let errors = String::from_utf8(people.stderr).unwrap();
    let status = people.status.code().unwrap();
    assert_eq!(errors.lines().count(), usize::from(status != 0), "{errors}");
    let report: Value = serde_json::from_slice(&machine.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&machine.stderr)));
    assert_eq!(report["ok"], status == 0, "{report}");
    let shown = String::from_utf8(people.stdout).unwrap();
    for finding in report["findings"].as_array().unwrap() {
        assert!(shown.contains(finding["what"].as_str().unwrap()), "{finding} is not in {shown}");
        assert!(!finding["action"].as_str().unwrap().is_empty());
    }
    (report, status)
}

#[track_caller]
fn repair(daemon: &Daemon) -> (Vec<String>, Value) {
    let output = daemon.check(&["--json", "--repair"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let done = report["repaired"].as_array().unwrap().iter().map(|r| r.as_str().unwrap().to_owned()).collect();
    (done, report)
}

fn snapshots_of(report: &Value) -> Vec<Value> {
    let disks = report["disks"].as_array().unwrap();
    disks.iter().flat_map(|d| d["snapshots"].as_array().unwrap().clone()).collect()
}

#[track_caller]
pub(crate) fn verdict(report: &Value, what: &str) -> String {
    let found = match what.contains('@') {
        true => snapshots_of(report).into_iter().find(|s| s["snapshot"] == what),
        false => report["disks"].as_array().unwrap().iter().find(|d| d["name"] == what).cloned(),
    };
    found.unwrap_or_else(|| panic!("no {what} in {report}"))["verdict"].as_str().unwrap().to_owned()
}

/// Starts the daemon, and all is as the report said that it would be.
#[track_caller]
fn start_agrees(daemon: &mut Daemon, report: &Value, kind: &str) {
    daemon.forget_args();
    if report.to_string().contains("a start would refuse") || report.to_string().contains("no daemon starts like this")
    {
        daemon.refused_start();
        return;
    }
    daemon.start();
    let disks = daemon.get("/v1/disks").json();
    let served = disks.as_array().unwrap().iter().filter(|d| d["state"] != "unserved");
    let served: Vec<&str> = served.map(|d| d["name"].as_str().unwrap()).collect();
    for disk in report["disks"].as_array().unwrap() {
        let expected = disk["verdict"] != "not-served";
        assert_eq!(served.contains(&disk["name"].as_str().unwrap()), expected, "{kind}: {disk}");
        for snapshot in disk["snapshots"].as_array().unwrap().iter().filter(|_| expected) {
            let is = daemon.show(snapshot["snapshot"].as_str().unwrap());
            let expected = match snapshot["verdict"].as_str().unwrap() {
                "kept" => "quiesced",
                "broken" => "broken",
                other => panic!("{kind}: {other}"),
            };
            assert_eq!(is["state"], expected, "{kind}: {snapshot} and {is}");
            if expected == "broken" {
                let (said, is) = (snapshot["reason"].as_str().unwrap(), is["reason"].as_str().unwrap());
                assert!(is.starts_with(said) || said.starts_with(is), "{kind}: said {said:?}, is {is:?}");
            }
        }
    }
    daemon.kill();
}

/// vm0: `a` is copy-on-write, `b` below a log. vm1: a mirror with the copy-on-write snapshot `m`, and put-off discards.
pub(crate) fn populated() -> Daemon {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.snap("a");
    client.write(0..600, 2);
    let log = json!({ "strategy": "write-logging", "wait": true });
    daemon.api().create("b", &["vm0"], &log).ok();
    client.write(300..900, 3);
    client.flush();
    let leg = daemon.path("leg.raw");
    daemon.send("POST", "/v1/disks/vm1/mirror", &json!({ "path": leg }).to_string()).ok();
    crate::harness::wait_until("the leg", || {
        daemon.show_disk("vm1")["legs"].as_array().unwrap().iter().all(|l| l["state"] == "in-sync")
    });
    let mut other = daemon.client("vm1");
    other.write(0..SECTORS, 4);
    daemon.snapshot("m", &["vm1"]);
    other.write(0..100, 5);
    other.discard(1024..1040);
    other.flush();
    daemon
}

pub(crate) fn show_all(daemon: &Daemon) -> Vec<Vec<u64>> {
    ["vm0", "vm1", "vm0@a", "vm0@b", "vm1@m"].iter().map(|what| tags(&daemon.content(what))).collect()
}

#[test]
fn a_clean_state_is_clean() {
    let mut daemon = populated();
    let content = show_all(&daemon);
    let running = daemon.check(&[]);
    assert_eq!(running.status.code(), Some(1));
    let said = String::from_utf8(running.stderr).unwrap();
    assert!(said.contains(&format!("process {}", daemon.pid())) && said.lines().count() == 1, "{said}");
    daemon.stop();
    let (report, status) = examine(&daemon);
    assert_eq!((status, &report["findings"]), (0, &json!([])), "{report}");
    for (what, expected) in
        [("vm0", "served"), ("vm1", "served"), ("vm0@a", "kept"), ("vm0@b", "kept"), ("vm1@m", "kept")]
    {
        assert_eq!(verdict(&report, what), expected, "{report}");
    }
    let before = tree(&daemon.state_dir());
    assert_eq!(repair(&daemon).0, Vec::<String>::new());
    let changed: Vec<_> = tree(&daemon.state_dir()).into_iter().filter(|(p, t)| before.get(p) != Some(t)).collect();
    assert!(changed.iter().all(|(path, _)| path.ends_with("lock")), "{changed:?}");
    daemon.forget_args();
    daemon.start();
    assert!(show_all(&daemon) == content);
    daemon.stop();
    let nowhere = daemon.beside("nowhere").check(&[]);
    let said = String::from_utf8(nowhere.stderr).unwrap();
    assert_eq!((nowhere.status.code(), said.lines().count()), (Some(1), 1), "{said}");
}

#[test]
fn after_a_kill_all_is_safe_and_a_repair_puts_the_records_in_order() {
    let mut daemon = populated();
    let content = show_all(&daemon);
    daemon.kill();
    let (report, status) = examine(&daemon);
    assert_eq!(status, 0, "{report}");
    assert!(report.to_string().contains("last writer was killed"), "{report}");
    for (what, expected) in
        [("vm0", "served"), ("vm1", "served"), ("vm0@a", "kept"), ("vm0@b", "kept"), ("vm1@m", "kept")]
    {
        assert_eq!(verdict(&report, what), expected, "{report}");
    }
    let (done, report) = repair(&daemon);
    assert!(done.len() == 1 && done[0].contains("put in order"), "{done:?}");
    assert!(!report.to_string().contains("last writer was killed"), "{report}");
    assert_eq!(repair(&daemon).0, Vec::<String>::new());
    start_agrees(&mut daemon, &report, "a kill");
    daemon.start();
    assert!(show_all(&daemon) == content);
    daemon.stop();
}

#[test]
fn after_a_power_cut_it_says_what_is_lost_and_a_repair_marks_it() {
    if !can_mount("after_a_power_cut_it_says_what_is_lost_and_a_repair_marks_it") {
        return;
    }
    let mut daemon = populated();
    daemon.kill();
    daemon.boot_again();
    daemon.lose_run_tables();
    let (report, status) = examine(&daemon);
    assert_eq!(status, 1, "{report}");
    let expected = [
        ("vm0", "served-as-flushed"),
        ("vm1", "served-as-flushed"),
        ("vm0@a", "broken"),
        ("vm0@b", "kept"),
        ("vm1@m", "broken"),
    ];
    for (what, expected) in expected {
        assert_eq!(verdict(&report, what), expected, "{what}: {report}");
    }
    let (done, after) = repair(&daemon);
    let marked = done.iter().filter(|d| d.contains("marked as broken")).count();
    assert_eq!(marked, 2, "{done:?}");
    assert_eq!(repair(&daemon).0, Vec::<String>::new());
    assert_eq!(verdict(&after, "vm0@a"), "broken");
    start_agrees(&mut daemon, &after, "a power cut");
    daemon.start();
    daemon.assert_broken("vm0@a", "went down");
    assert_eq!(tags(&daemon.content("vm0@b"))[..900], [vec![2; 600], vec![1; 300]].concat());
    daemon.stop();
}

struct State {
    daemon: Daemon,
    kept: PathBuf,
}

impl State {
    fn keep(daemon: Daemon) -> State {
        let kept = daemon.dir.path().with_extension("kept");
        run("cp", &["-a", daemon.dir.path().to_str().unwrap(), kept.to_str().unwrap()]);
        State { daemon, kept }
    }

    /// Everything as it was.
    fn put_back(&self) {
        let place = self.daemon.dir.path();
        for name in names_in(place) {
            run("rm", &["-rf", place.join(name).to_str().unwrap()]);
        }
        run("cp", &["-a", &format!("{}/.", self.kept.display()), place.to_str().unwrap()]);
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.kept) {
            println!("{}: {e}", self.kept.display());
        }
    }
}

/// One kind of damage: what is done, and a word of what must be found.
struct Damage {
    kind: &'static str,
    found: &'static str,
    repairable: bool,
    make: fn(&Daemon) -> Option<FileImage>,
}

fn repairable(kind: &'static str, found: &'static str, make: fn(&Daemon) -> Option<FileImage>) -> Damage {
    Damage { repairable: true, ..damage(kind, found, make) }
}

fn damage(kind: &'static str, found: &'static str, make: fn(&Daemon) -> Option<FileImage>) -> Damage {
    Damage { kind, found, repairable: false, make }
}

/// Flips a bit and leaves the time of the last change as it was.
pub(crate) fn flip(path: &Path, byte: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    let mut one = [0];
    file.read_exact_at(&mut one, byte).unwrap();
    file.write_all_at(&[one[0] ^ 4], byte).unwrap();
    file.set_modified(time).unwrap();
}

fn touch(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_modified(file.metadata().unwrap().modified().unwrap() + Duration::from_secs(1)).unwrap();
}

fn truncate(path: &Path, len: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

fn remove(path: &Path) -> Option<FileImage> {
    std::fs::remove_file(path).unwrap();
    None
}

pub(crate) fn records(daemon: &Daemon) -> PathBuf {
    daemon.state_dir().join("records.redb")
}

/// The records, read by the library itself.
pub(crate) fn record(daemon: &Daemon, disk: &str) -> halfsilver::store::DiskRecord {
    let examined = halfsilver::store::Records::examine(&records(daemon)).unwrap().unwrap();
    examined.remembered.disks.into_iter().find(|d| d.name == disk).unwrap()
}

fn log(daemon: &Daemon) -> PathBuf {
    record(daemon, "vm0").live_log.unwrap()
}

pub(crate) fn table(daemon: &Daemon, id: uuid::Uuid, extension: &str) -> PathBuf {
    daemon.state_dir().join("tables").join(format!("{id}.{extension}"))
}

pub(crate) fn run_table(daemon: &Daemon, id: uuid::Uuid) -> PathBuf {
    daemon.run_dir().join("tables").join(format!("{id}.bits"))
}

fn id_of(daemon: &Daemon, disk: &str, name: &str) -> uuid::Uuid {
    record(daemon, disk).snapshots.into_iter().find(|s| s.name == name).unwrap().id
}

fn hold(path: &Path) -> Option<FileImage> {
    let options = ImageOptions { direct: Direct::Off, read_only: false, lock_wait: Duration::ZERO };
    Some(FileImage::open(path, options).unwrap())
}

fn mode(path: &Path, mode: u32) -> Option<FileImage> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    None
}

/// Damage of everything that both ends leave.
fn damage_of_both() -> Vec<Damage> {
    vec![
        repairable("records: a flipped bit", "is damaged", |d| {
            let bytes = std::fs::read(records(d)).unwrap();
            let at = bytes.windows(10).rposition(|w| w == b"\"former_le").unwrap();
            // Of all copies of it one is in use.
            for (i, _) in bytes.windows(10).enumerate().filter(|(_, w)| *w == b"\"former_le") {
                flip(&records(d), i as u64);
            }
            assert!(at > 0);
            None
        }),
        repairable("records: cut short", "damaged", |d| {
            truncate(&records(d), 10_000);
            None
        }),
        repairable("records: something else", "damaged", |d| {
            std::fs::write(records(d), "this is not a store").unwrap();
            None
        }),
        repairable("records: empty", "is empty", |d| {
            truncate(&records(d), 0);
            None
        }),
        repairable("records: missing", "is missing", |d| remove(&records(d))),
        damage("image: missing", "No such file", |d| remove(&d.image("vm0"))),
        damage("image: no multiple of a sector", "multiple", |d| {
            truncate(&d.image("vm0"), SIZE - 1);
            None
        }),
        damage("image: in use", "in use", |d| hold(&d.image("vm0"))),
        damage("log: missing", "missing", |d| remove(&log(d))),
        damage("log: cut short", ".log ", |d| {
            let time = std::fs::metadata(log(d)).unwrap().modified().unwrap();
            truncate(&log(d), SIZE / 2);
            OpenOptions::new().write(true).open(log(d)).unwrap().set_modified(time).unwrap();
            None
        }),
        damage("log's durable table: missing", "No such file", |d| remove(&table(d, record(d, "vm0").live, "log"))),
        damage("log's durable table: header", "header does not match", |d| {
            flip(&table(d, record(d, "vm0").live, "log"), 20);
            None
        }),
        damage("log's durable table: another size", "size of such a table", |d| {
            truncate(&table(d, record(d, "vm0").live, "log"), 2048);
            None
        }),
        damage("log's durable table: a sector", "is damaged", |d| {
            flip(&table(d, record(d, "vm0").live, "log"), 520);
            None
        }),
        damage("snapshot's image: missing", "missing or is not a file", |d| remove(&d.snapshot_image("vm0@a"))),
        damage("snapshot's image: a link", "missing or is not a file", |d| {
            let path = d.snapshot_image("vm0@a");
            std::fs::rename(&path, d.path("elsewhere")).unwrap();
            std::os::unix::fs::symlink(d.path("elsewhere"), &path).unwrap();
            None
        }),
        damage("leg: missing", "is not used", |d| remove(&d.path("leg.raw"))),
        damage("bitmap: missing", "No such file", |d| {
            remove(&table(d, record(d, "vm1").mirror.unwrap().bitmap, "log"))
        }),
        damage("bitmap: header", "header does not match", |d| {
            flip(&table(d, record(d, "vm1").mirror.unwrap().bitmap, "log"), 70);
            None
        }),
        damage("bitmap: a sector", "damaged", |d| {
            flip(&table(d, record(d, "vm1").mirror.unwrap().bitmap, "log"), 512);
            None
        }),
        damage("a log that no record names", "no record names it", |d| {
            let path = d.state_dir().join("images").join(format!("{}.log", uuid::Uuid::new_v4()));
            std::fs::write(&path, vec![7; 4096]).unwrap();
            mode(&path, 0o600)
        }),
        Damage {
            repairable: true,
            ..damage("a directory that others may write", "may write to it", |d| {
                mode(&d.state_dir().join("images"), 0o777)
            })
        },
        Damage {
            repairable: true,
            ..damage("a file that others may read", "may read or write", |d| mode(&records(d), 0o644))
        },
        damage("a file in the place of a directory", "not a directory", |d| {
            let images = d.state_dir().join("images");
            std::fs::rename(&images, d.path("moved")).unwrap();
            std::fs::write(&images, "").unwrap();
            None
        }),
    ]
}

fn damage_of_a_clean_stop() -> Vec<Damage> {
    vec![
        damage("image: changed", "changed", |d| {
            touch(&d.image("vm0"));
            None
        }),
        damage("log's saved table: a page", "does not match its checksum", |d| {
            flip(&table(d, record(d, "vm0").live, "table"), 100);
            None
        }),
        damage("snapshot's image: changed", "was changed", |d| {
            touch(&d.snapshot_image("vm0@a"));
            None
        }),
        damage("snapshot's saved table: header", "header does not match", |d| {
            flip(&table(d, id_of(d, "vm0", "a"), "table"), 9);
            None
        }),
        damage("snapshot's saved table: seal of another", "not the copy", |d| {
            let path = table(d, id_of(d, "vm0", "a"), "table");
            let other = halfsilver::store::Table::in_memory(SIZE / 4096).unwrap();
            other.save(&path).unwrap();
            None
        }),
        damage("snapshot's saved table: missing", "No such file", |d| remove(&table(d, id_of(d, "vm0", "a"), "table"))),
        damage("put-off discards: a bit", "forgotten", |d| {
            flip(&table(d, record(d, "vm1").id, "table"), 30);
            None
        }),
        damage("leg: changed", "changed while", |d| {
            touch(&d.path("leg.raw"));
            None
        }),
    ]
}

fn damage_of_a_kill() -> Vec<Damage> {
    vec![
        damage("snapshot's run table: missing", "No such file", |d| remove(&run_table(d, id_of(d, "vm0", "a")))),
        damage("snapshot's run table: header", "checksum", |d| {
            flip(&run_table(d, id_of(d, "vm0", "a")), 25);
            None
        }),
        damage("snapshot's run table: says that it is broken", "broke just before", |d| {
            let path = run_table(d, id_of(d, "vm0", "a"));
            OpenOptions::new().write(true).open(path).unwrap().write_all_at(&[1], 64).unwrap();
            None
        }),
        damage("snapshot's run table: bits behind the end", "does not have", |d| {
            flip(&run_table(d, id_of(d, "vm0", "a")), 4096 + 40);
            None
        }),
        damage("log's run table: missing", "--take-flushed", |d| remove(&run_table(d, record(d, "vm0").live))),
    ]
}

fn every_damage_is_found(daemon: Daemon, kinds: Vec<Damage>) {
    let mut state = State::keep(daemon);

    for Damage { kind, found, repairable, make } in kinds {
        let held = make(&state.daemon);
        let (report, status) = examine(&state.daemon);
        assert_eq!(status, 1, "{kind}: {report}");
        assert!(report.to_string().contains(found), "{kind}: no {found:?} in {report}");
        let (before, (done, after)) = (tree(state.daemon.dir.path()), repair(&state.daemon));
        if repairable {
            assert!(!done.is_empty() && after["ok"] == true, "{kind}: {after}");
        }
        // Whatever it repairs, nothing of the guests' or of what tells where that is.
        let now = tree(state.daemon.dir.path());
        for (path, (.., bytes)) in &before {
            let is_records = ["records.redb", "records.copy", "lock"].iter().any(|name| path.ends_with(name));
            let same = now.get(path).is_some_and(|(.., is)| is == bytes);
            assert!(is_records || same, "{kind}: {} was changed by a repair", path.display());
        }
        assert_eq!(repair(&state.daemon).0, Vec::<String>::new(), "{kind}: a second repair");
        drop(held);
        if kind != "image: in use" {
            let report = examine(&state.daemon).0;
            start_agrees(&mut state.daemon, &report, kind);
        }
        state.put_back();
    }
    // And undamaged it is whole again.
    state.daemon.start();
    let all = show_all(&state.daemon);
    assert_eq!((all[0][0], all[0][899], all[1][0], all[2][0], all[3][0], all[4][0]), (2, 3, 5, 1, 2, 4));
    state.daemon.stop();
}

#[test]
fn every_damage_of_a_clean_state_is_found_and_named() {
    let mut daemon = populated();
    daemon.stop();
    let kinds = damage_of_both().into_iter().chain(damage_of_a_clean_stop()).collect();
    every_damage_is_found(daemon, kinds);
}

#[test]
fn every_damage_of_what_a_kill_leaves_is_found_and_named() {
    let mut daemon = populated();
    daemon.kill();
    let kinds = damage_of_both().into_iter().filter(|d| d.kind != "log's durable table: a sector");
    every_damage_is_found(daemon, kinds.chain(damage_of_a_kill()).collect());
}

/// Without its records the daemon must not begin anew: it would serve the raw image alone, and remove the log.
#[test]
fn a_start_without_records_refuses_while_there_is_something_to_lose() {
    let mut daemon = populated();
    daemon.stop();
    let state = State::keep(daemon);
    let mut daemon = state.daemon.beside("d");
    for lose in [|path: &Path| std::fs::remove_file(path).unwrap(), |path: &Path| truncate(path, 0)] {
        lose(&records(&daemon));
        std::fs::remove_file(records(&daemon).with_extension("copy")).unwrap();
        let before = tree(&daemon.state_dir());
        let said = daemon.refused_start();
        assert!(said.contains("records.redb") && said.contains("halfsilver check"), "{said}");
        let after = tree(&daemon.state_dir());
        for (path, (.., bytes)) in before.iter().filter(|(path, _)| !path.ends_with("lock")) {
            assert!(after.get(path).is_some_and(|(.., is)| is == bytes), "{} was changed", path.display());
        }
        state.put_back();
    }
    // Records that name no disk are no better.
    for lost in [records(&daemon), records(&daemon).with_extension("copy")] {
        std::fs::remove_file(lost).unwrap();
    }
    drop(halfsilver::store::Records::open(&records(&daemon)).unwrap());
    assert!(daemon.refused_start().contains("names no disk"));
    assert!(names_in(&daemon.state_dir().join("images")).len() >= 3);
    state.put_back();
    daemon.start();
    assert_eq!(tags(&daemon.content("vm0"))[899], 3);
    daemon.stop();
}

/// Records from before the log was made: the log has what the guest wrote since, and stays.
#[test]
fn a_log_that_older_records_do_not_name_is_kept() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..100, 1);
    daemon.stop();
    let older = std::fs::read(records(&daemon)).unwrap();
    daemon.start();
    let log = json!({ "strategy": "write-logging", "wait": true });
    daemon.api().create("b", &["vm0"], &log).ok();
    let mut client = daemon.client("vm0");
    client.write(0..100, 2);
    client.flush();
    drop(client);
    daemon.stop();
    let path = self::log(&daemon);
    let (log, newer) = (std::fs::read(&path).unwrap(), std::fs::read(records(&daemon)).unwrap());
    std::fs::write(records(&daemon), older).unwrap();
    let (report, status) = examine(&daemon);
    assert_eq!(status, 1);
    assert!(report.to_string().contains("no record names it"), "{report}");
    repair(&daemon);
    daemon.start();
    assert!(daemon.log_text().contains("may be the only copy"), "{}", daemon.log_text());
    daemon.stop();
    assert!(std::fs::read(&path).unwrap() == log, "the log is as it was");
    // With the right records everything is there again, but the raw image looks different now.
    std::fs::write(records(&daemon), newer).unwrap();
    daemon.start();
    assert_eq!(tags(&daemon.content("vm0"))[..101], [vec![2; 100], vec![0]].concat());
    daemon.delete("vm0@b");
    daemon.assert_only_disks_left();
    daemon.stop();
}

/// A run directory may be another daemon's.
#[test]
fn a_repair_leaves_the_run_directory_of_a_running_daemon_alone() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.snap("a");
    let other = daemon.beside_in_run_dir("other");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(other.state_dir()).unwrap();
    let tables = names_in(&daemon.run_dir().join("tables"));
    let refused = other.check(&["--repair"]);
    assert_eq!(names_in(&daemon.run_dir().join("tables")), tables, "{refused:?}");
    let errors = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && errors.contains("is in use by another halfsilver"), "{errors}");
}

/// What says that a version broke is known to an examination, of whatever layer it is.
#[test]
fn the_marks_of_broken_versions_are_looked_at() {
    for (durability, strategy) in
        [("process", "write-logging"), ("process", "copy-on-write"), ("power", "copy-on-write")]
    {
        for is_power_cut in [false, true] {
            let mut daemon = Daemon::with_disks(&[SIZE], &format!("durability={durability}"));
            daemon.client("vm0").write(0..SECTORS, 1);
            daemon.api().create("a", &["vm0"], &json!({ "strategy": strategy, "wait": true })).ok();
            let id = daemon.show("vm0@a")["id"].as_str().unwrap().to_owned();
            daemon.kill();
            if is_power_cut && (durability, strategy) == ("process", "copy-on-write") {
                continue; // Broken anyhow.
            }
            if is_power_cut {
                daemon.boot_again();
            }
            let mark = daemon.run_dir().join("tables").join(format!("{id}.broken"));
            std::fs::write(mark, "a write did not arrive").unwrap();
            std::fs::set_permissions(
                daemon.run_dir().join("tables").join(format!("{id}.broken")),
                std::fs::Permissions::from_mode(0o600),
            )
            .unwrap();
            let (report, _) = examine(&daemon);
            assert_eq!(verdict(&report, "vm0@a"), "broken", "{durability} {strategy} {is_power_cut}");
            assert!(snapshots_of(&report)[0]["reason"] == "a write did not arrive", "{report}");
            start_agrees(&mut daemon, &report, &format!("{durability} {strategy} {is_power_cut}"));
        }
    }
}
