//! Faults of real files and file systems, in the whole daemon: what the guest sees, and what becomes of snapshots.
//!
//! Each row makes one fault where a real one happens: no space for records, for saved tables and in the run directory, a
//! limit of file sizes, files that are cut short or removed under the daemon. The table is printed. Faults of single
//! operations are in `tests/engine/faults.rs`, no space for snapshots' images in `trouble.rs`.

use std::fs::OpenOptions;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::{Client, tags};
use crate::harness::{Daemon, PATIENCE, can_mount, run, wait_until};
use crate::trouble::Mount;

const SIZE: u64 = 1 << 20;
const SECTORS: usize = 2048;

struct Row {
    kind: &'static str,
    place: &'static str,
    /// What the guest sees, what becomes of the snapshot, and what a later start finds.
    expected: [&'static str; 3],
    make: fn() -> [String; 3],
}

fn answer(done: bool) -> String {
    if done { "done" } else { "error" }.to_owned()
}

fn write(client: &mut Client, sectors: std::ops::Range<usize>, tag: u64) -> bool {
    client.queues[0].try_write(sectors, tag, *PATIENCE)
}

fn try_read(client: &mut Client, sector: usize) -> bool {
    client.queues[0].submit_read(0, sector..sector + 1);
    client.queues[0].wait_one().1 == 0
}

fn log() -> Value {
    json!({ "strategy": "write-logging", "wait": true })
}

/// A daemon whose state or run directory is on a small file system.
pub(crate) fn on_small(which: &str) -> (Daemon, Mount) {
    let mut daemon = Daemon::place();
    let dir = if which == "state" { daemon.state_dir() } else { daemon.run_dir() };
    let mount = Mount::tmpfs(&dir, "8m");
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "direct=off");
    daemon.start();
    daemon.client("vm0").write(0..SECTORS, 1);
    (daemon, mount)
}

/// Takes all room there is; given back when it is removed.
pub(crate) fn fill(dir: &Path) -> std::path::PathBuf {
    use std::io::Write;
    let path = dir.join("filler");
    let mut file = std::fs::File::create(&path).unwrap();
    for len in [1 << 16, 1 << 12] {
        while file.write_all(&vec![1; len]).is_ok() {}
    }
    path
}

fn truncate(path: &Path, len: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

fn limit(daemon: &Daemon, bytes: u64) {
    run("prlimit", &["--pid", &daemon.pid().to_string(), &format!("--fsize={bytes}:")]);
}

/// What a start after a clean stop finds of the snapshot; the disk must be there with this tag in its first sector.
fn after_restart(daemon: &mut Daemon, reference: &str, first: u64) -> String {
    daemon.restart();
    assert_eq!(daemon.client("vm0").tag(0), first);
    daemon.state(reference)
}

#[rustfmt::skip]
const ROWS: &[Row] = &[
    Row { kind: "a limit of file sizes", place: "image, no snapshot", expected: ["error", "-", "all there"], make: size_limit },
    Row { kind: "a limit inside a sector", place: "image, no snapshot", expected: ["error", "-", "all there"], make: size_limit_inside_a_sector },
    Row { kind: "a limit of file sizes", place: "image, copy-on-write", expected: ["error", "broken", "broken"], make: size_limit_of_a_snapshot },
    Row { kind: "cut short", place: "image, copy-on-write", expected: ["error", "unreadable there", "broken"], make: image_cut_short },
    Row { kind: "cut short", place: "snapshot's image", expected: ["done", "unreadable there", "quiesced"], make: snapshot_cut_short },
    Row { kind: "cut short", place: "log", expected: ["error", "quiesced", "not served"], make: log_cut_short },
    Row { kind: "removed", place: "snapshot's image", expected: ["done", "quiesced", "broken"], make: snapshot_removed },
    Row { kind: "removed", place: "records, running", expected: ["done", "quiesced", "refused"], make: records_removed },
    Row { kind: "no space", place: "records, creating", expected: ["done", "refused", "well again"], make: no_space_to_create },
    Row { kind: "no space", place: "records, deleting", expected: ["done", "broken", "well again"], make: no_space_to_delete },
    Row { kind: "no space", place: "saved tables, stopping", expected: ["exit 1", "-", "broken"], make: no_space_to_stop },
    Row { kind: "read-only", place: "state directory, starting", expected: ["refused", "-", "quiesced"], make: read_only_at_the_start },
    Row { kind: "no space", place: "run table, copy-on-write", expected: ["done", "broken", "broken"], make: no_space_for_a_run_table },
    Row { kind: "no space", place: "run table, log", expected: ["error", "quiesced", "well again"], make: no_space_for_a_logs_run_table },
];

fn size_limit() -> [String; 3] {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    limit(&daemon, SIZE / 2);
    let done = write(&mut client, 1500..1510, 2);
    assert!(write(&mut client, 10..20, 3), "below the limit nothing is the matter");
    assert_eq!(client.tag(1500), 1);
    drop(client);
    limit(&daemon, 1 << 40);
    daemon.restart();
    let mut client = daemon.client("vm0");
    assert_eq!((client.tag(10), client.tag(1505)), (3, 1));
    drop(client);
    daemon.stop();
    [answer(done), "-".to_owned(), "all there".to_owned()]
}

fn size_limit_inside_a_sector() -> [String; 3] {
    let mut daemon = Daemon::with_disks(&[SIZE], "direct=off");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    limit(&daemon, 1000 * 512 + 100);
    let done = write(&mut client, 990..1010, 2);
    limit(&daemon, 1 << 40);
    // What was refused may be there in part, and nothing else is touched.
    assert_eq!((client.tag(989), client.tag(1010)), (1, 1));
    assert!(write(&mut client, 990..1010, 3));
    assert_eq!(client.tag(1000), 3);
    drop(client);
    daemon.restart();
    assert_eq!(daemon.client("vm0").tag(1000), 3);
    daemon.stop();
    [answer(done), "-".to_owned(), "all there".to_owned()]
}

fn size_limit_of_a_snapshot() -> [String; 3] {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    let events = daemon.events();
    daemon.snap("a");
    limit(&daemon, SIZE / 2);
    let done = write(&mut client, 1500..1510, 2);
    events.wait_for("SNAPSHOT_BROKEN", "vm0@a");
    let state = daemon.state("vm0@a");
    limit(&daemon, 1 << 40);
    assert_eq!(client.tag(1500), 1);
    drop(client);
    let later = after_restart(&mut daemon, "vm0@a", 1);
    [answer(done), state, later]
}

fn image_cut_short() -> [String; 3] {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.snap("a");
    truncate(&daemon.image("vm0"), SIZE / 2);
    let done = try_read(&mut client, 1500);
    assert!(try_read(&mut client, 10));
    let mut reader = daemon.reader("vm0@a");
    assert!(try_read(&mut reader, 10) && !try_read(&mut reader, 1500));
    // What is to be saved cannot be read; the guest's write goes on.
    assert!(write(&mut client, 1500..1501, 2));
    assert_eq!(client.tag(1500), 2);
    drop((client, reader));
    wait_until("it to be broken", || daemon.state("vm0@a") == "broken");
    truncate(&daemon.image("vm0"), SIZE);
    let later = after_restart(&mut daemon, "vm0@a", 1);
    [answer(done), "unreadable there".to_owned(), later]
}

fn snapshot_cut_short() -> [String; 3] {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.snap("a");
    client.write(0..SECTORS, 2);
    truncate(&daemon.snapshot_image("vm0@a"), SIZE / 2);
    let mut reader = daemon.reader("vm0@a");
    assert!(try_read(&mut reader, 10) && !try_read(&mut reader, 1500), "what is cut off is an error, not zeros");
    let done = write(&mut client, 1500..1510, 3);
    drop((client, reader));
    assert_eq!(daemon.client("vm0").tag(1500), 3);
    let state = daemon.state("vm0@a");
    daemon.kill();
    daemon.start();
    daemon.assert_broken("vm0@a", "not the disk's");
    [answer(done), "unreadable there".to_owned(), state]
}

fn log_cut_short() -> [String; 3] {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    let snapshot = daemon.api().create("a", &["vm0"], &log()).json()[0].clone();
    client.write(0..SECTORS, 2);
    truncate(Path::new(snapshot["image"].as_str().unwrap()), SIZE / 2);
    let done = try_read(&mut client, 1500);
    assert!(try_read(&mut client, 10));
    assert_eq!(tags(&daemon.content("vm0@a")), vec![1; SECTORS], "VLUN A is in the raw image");
    let state = daemon.state("vm0@a");
    drop(client);
    daemon.kill();
    daemon.forget_args();
    daemon.start();
    let later = if daemon.show_disk("vm0")["state"] == "unserved" { "not served" } else { "served" };
    [answer(done), state, later.to_owned()]
}

fn snapshot_removed() -> [String; 3] {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.snap("a");
    std::fs::remove_file(daemon.snapshot_image("vm0@a")).unwrap();
    let done = write(&mut client, 100..200, 2);
    assert_eq!(tags(&daemon.content("vm0@a")), vec![1; SECTORS]);
    let state = daemon.state("vm0@a");
    drop(client);
    let later = after_restart(&mut daemon, "vm0@a", 1);
    [answer(done), state, later]
}

fn records_removed() -> [String; 3] {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.snap("a");
    for file in ["records.redb", "records.copy"] {
        std::fs::remove_file(daemon.state_dir().join(file)).unwrap();
    }
    let done = write(&mut client, 100..200, 2);
    let state = daemon.state("vm0@a");
    drop(client);
    daemon.kill();
    assert!(daemon.refused_start().contains("records.redb is missing"));
    assert!(daemon.snapshot_image("vm0@a").exists());
    [answer(done), state, "refused".to_owned()]
}

fn no_space_to_create() -> [String; 3] {
    let (mut daemon, _mount) = on_small("state");
    let filler = fill(&daemon.state_dir());
    let refused = daemon.api().create("a", &["vm0"], &json!({ "wait": true }));
    let code = refused.refused();
    assert!(code == "no-space" || code == "io-error", "{}", refused.body);
    // The file of the records may have had room for the word that a cut is coming, and not for the one that it was made.
    let was_cut = !daemon.snapshots().is_empty();
    if was_cut {
        assert_eq!(daemon.state("vm0@a"), "deleting", "nobody is to have it");
    }
    let mut client = daemon.client("vm0");
    let done = write(&mut client, 0..10, 2);
    drop(client);
    std::fs::remove_file(filler).unwrap();
    // It goes by itself.
    wait_until("what was refused has gone", || daemon.snapshots().is_empty());
    // Nobody knew whether the record got through, and so its image stays until another one has.
    daemon.snap("b");
    wait_until("its image has gone", || !daemon.snapshot_image("vm0@a").exists());
    daemon.client("vm0").write(0..10, 3);
    assert_eq!(daemon.reader("vm0@b").tag(0), 2);
    assert_eq!(after_restart(&mut daemon, "vm0@b", 3), "quiesced");
    daemon.snap("a");
    daemon.stop();
    [answer(done), "refused".to_owned(), "well again".to_owned()]
}

fn no_space_to_delete() -> [String; 3] {
    let (mut daemon, _mount) = on_small("state");
    daemon.snap("a");
    let filler = fill(&daemon.state_dir());
    let answered = daemon.send("DELETE", "/v1/snapshots/vm0@a", "");
    assert_eq!((answered.refused().as_str(), daemon.state("vm0@a").as_str()), ("no-space", "quiesced"));
    assert_eq!(tags(&daemon.content("vm0@a")), vec![1; SECTORS]);
    // There is no room for what is to be saved either.
    let mut client = daemon.client("vm0");
    let done = write(&mut client, 0..10, 2);
    drop(client);
    let state = daemon.state("vm0@a");
    std::fs::remove_file(filler).unwrap();
    daemon.delete("vm0@a");
    daemon.assert_only_disks_left();
    daemon.restart();
    assert_eq!(daemon.client("vm0").tag(0), 2);
    daemon.stop();
    [answer(done), state, "well again".to_owned()]
}

fn no_space_to_stop() -> [String; 3] {
    let (mut daemon, _mount) = on_small("state");
    daemon.snap("a");
    daemon.client("vm0").write(0..10, 2);
    let filler = fill(&daemon.state_dir());
    daemon.terminate();
    let status = daemon.wait_exit();
    std::fs::remove_file(filler).unwrap();
    daemon.start();
    assert_eq!(daemon.client("vm0").tag(0), 2);
    daemon.assert_broken("vm0@a", "could not be saved");
    let state = daemon.state("vm0@a");
    daemon.stop();
    [format!("exit {}", status.code().unwrap()), "-".to_owned(), state]
}

fn read_only_at_the_start() -> [String; 3] {
    let (mut daemon, _mount) = on_small("state");
    daemon.snap("a");
    daemon.client("vm0").write(0..10, 2);
    daemon.stop();
    let remount = |how: &str| run("mount", &["-o", &format!("remount,{how}"), daemon.state_dir().to_str().unwrap()]);
    remount("ro");
    let said = daemon.refused_start();
    assert!(said.contains("Read-only"), "{said}");
    remount("rw");
    daemon.start();
    assert_eq!((daemon.client("vm0").tag(0), daemon.reader("vm0@a").tag(0)), (2, 1));
    let state = daemon.state("vm0@a");
    daemon.stop();
    ["refused".to_owned(), "-".to_owned(), state]
}

fn no_space_for_a_run_table() -> [String; 3] {
    let (mut daemon, _mount) = on_small("run");
    let events = daemon.events();
    daemon.snap("a");
    let filler = fill(&daemon.run_dir());
    let mut client = daemon.client("vm0");
    let done = write(&mut client, 0..10, 2);
    events.wait_for("SNAPSHOT_BROKEN", "vm0@a");
    let state = daemon.state("vm0@a");
    std::fs::remove_file(filler).unwrap();
    drop(client);
    let later = after_restart(&mut daemon, "vm0@a", 2);
    daemon.stop();
    [answer(done), state, later]
}

fn no_space_for_a_logs_run_table() -> [String; 3] {
    let (mut daemon, _mount) = on_small("run");
    daemon.api().create("a", &["vm0"], &log()).ok();
    let filler = fill(&daemon.run_dir());
    let mut client = daemon.client("vm0");
    let done = write(&mut client, 0..10, 2);
    assert_eq!(client.tag(0), 1);
    let state = daemon.state("vm0@a");
    std::fs::remove_file(filler).unwrap();
    assert!(write(&mut client, 0..10, 3));
    drop(client);
    assert_eq!(after_restart(&mut daemon, "vm0@a", 3), "quiesced");
    assert_eq!(daemon.reader("vm0@a").tag(0), 1);
    daemon.stop();
    [answer(done), state, "well again".to_owned()]
}

#[test]
fn faults_of_real_files_have_the_outcome_of_the_design() {
    if !can_mount("faults_of_real_files_have_the_outcome_of_the_design") {
        return;
    }
    let mut wrong = Vec::new();
    println!("{:24} | {:24} | {:8} | {:16} | {:10} | verdict", "kind", "where", "guest", "snapshot", "later");
    for Row { kind, place, expected, make } in ROWS {
        let seen = std::panic::catch_unwind(make).unwrap_or_else(|_| ["panic", "", ""].map(str::to_owned));
        let verdict = if seen == *expected { "as designed" } else { "WRONG" };
        println!("{kind:24} | {place:24} | {:8} | {:16} | {:10} | {verdict}", seen[0], seen[1], seen[2]);
        if seen != *expected {
            wrong.push(format!("{kind}, {place}: {seen:?} and not {expected:?}"));
        }
    }
    println!("{} kinds", ROWS.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
