//! Another image under a known name: it is neither read for the disk's nor written, whatever its size and however the daemon
//! ended; what is only a copy is accepted when its user says so.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::asking::cli_within;
use crate::client::tags;
use crate::harness::{Daemon, PATIENCE, can_mount, wait_until};
use crate::strategies::{ALL, SIZE, shows};

/// vm0, with a snapshot if that is wanted, and changed since; not running any more.
fn left(with_snapshot: bool, is_killed: bool) -> Daemon {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    if with_snapshot {
        daemon.snap("a");
    }
    daemon.client("vm0").write(0..100, 2);
    if is_killed {
        daemon.kill()
    } else {
        daemon.stop()
    }
    daemon
}

/// Puts another image of this size, full of fives, in the place of one. Returns where that is now.
fn replace(daemon: &Daemon, image: &Path, size: u64) -> std::path::PathBuf {
    let elsewhere = daemon.path("elsewhere.raw");
    std::fs::rename(image, &elsewhere).unwrap();
    std::fs::write(image, vec![5; usize::try_from(size).unwrap()]).unwrap();
    elsewhere
}

fn checked(daemon: &Daemon) -> Value {
    serde_json::from_slice(&daemon.check(&["--json"]).stdout).unwrap()
}

#[track_caller]
fn assert_is_stranger(daemon: &Daemon, disk: &str) {
    let shown = daemon.show_disk(disk);
    assert_eq!(shown["state"], "unserved", "{shown}");
    let reason = shown["reason"].as_str().unwrap();
    for word in ["is another one than it was", "disk accept", "disk forget"] {
        assert!(reason.contains(word), "{reason}");
    }
    assert!(!daemon.socket(disk).exists());
}

#[track_caller]
fn assert_whole(daemon: &Daemon, with_snapshot: bool) {
    assert_eq!(shows(daemon, "vm0"), [vec![2; 100], vec![1; ALL.end - 100]].concat());
    if with_snapshot {
        assert_eq!(shows(daemon, "vm0@a"), vec![1; ALL.end]);
    }
}

#[test]
fn another_image_under_a_known_name_is_not_served_and_not_written() {
    for (with_snapshot, is_killed) in [(true, false), (true, true), (false, false), (false, true)] {
        for size in [SIZE, 2 * SIZE] {
            let what = format!("with a snapshot: {with_snapshot}, killed: {is_killed}, of {size} bytes");
            println!("{what}");
            let mut daemon = left(with_snapshot, is_killed);
            let elsewhere = replace(&daemon, &daemon.image("vm0"), size);
            let found = checked(&daemon)["disks"][0].clone();
            assert_eq!(found["verdict"], "not-served", "{what}: {found}");
            daemon.start();
            assert_is_stranger(&daemon, "vm0");
            let added = daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": daemon.image("vm0") }).to_string());
            assert_eq!(added.refused(), "disk-failed", "{}", added.body);
            assert!(std::fs::read(daemon.image("vm0")).unwrap().iter().all(|byte| *byte == 5), "{what}");
            daemon.restart();
            assert_is_stranger(&daemon, "vm0");
            std::fs::rename(&elsewhere, daemon.image("vm0")).unwrap();
            wait_until("the right one to be served", || daemon.show_disk("vm0")["state"] == "serving");
            assert_whole(&daemon, with_snapshot);
        }
    }
}

/// A copy that kept its times is the disk; one that did not is when its user says so.
#[test]
fn a_copy_is_the_disk_when_that_can_be_seen_or_is_said() {
    for keeps_times in [true, false] {
        let mut daemon = left(true, false);
        let copy = daemon.path("copy.raw");
        let mut cp = Command::new("cp");
        assert!(cp.args(keeps_times.then_some("-p")).arg(daemon.image("vm0")).arg(&copy).status().unwrap().success());
        std::fs::rename(&copy, daemon.image("vm0")).unwrap();
        daemon.start();
        if !keeps_times {
            assert_is_stranger(&daemon, "vm0");
            let told = cli_within(&daemon, &["disk", "accept", "vm0"], *PATIENCE).unwrap();
            assert_eq!(told.status.code(), Some(0), "{told:?}");
        }
        assert_whole(&daemon, true);
        let refused = daemon.send("POST", "/v1/disks/vm0/accept", "");
        assert_eq!(refused.refused(), "disk-busy", "{}", refused.body);
        daemon.restart();
        assert_whole(&daemon, true);
    }
}

/// What is not there is not accepted, nor is what cannot be the disk.
#[test]
fn accepting_is_for_strangers_that_may_be_the_disk() {
    let mut daemon = left(true, false);
    let elsewhere = replace(&daemon, &daemon.image("vm0"), SIZE / 2);
    daemon.start();
    let refused = daemon.send("POST", "/v1/disks/vm0/accept", "");
    assert_eq!(refused.refused(), "disk-failed", "{}", refused.body);
    std::fs::remove_file(daemon.image("vm0")).unwrap();
    let refused = daemon.send("POST", "/v1/disks/vm0/accept", "");
    assert_eq!(refused.refused(), "conflict", "{}", refused.body);
    std::fs::rename(&elsewhere, daemon.image("vm0")).unwrap();
    wait_until("the right one to be served", || daemon.show_disk("vm0")["state"] == "serving");
    assert_whole(&daemon, true);
    assert_eq!(daemon.send("POST", "/v1/disks/vm9/accept", "").refused(), "disk-not-found");
}

/// Whoever wants the new image has it: as a new disk, when the old one is forgotten.
#[test]
fn a_stranger_is_served_as_a_new_disk_when_the_old_one_is_forgotten() {
    let mut daemon = left(true, false);
    replace(&daemon, &daemon.image("vm0"), SIZE);
    daemon.start();
    assert_is_stranger(&daemon, "vm0");
    daemon.send("POST", "/v1/disks/vm0/forget", "").ok();
    daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": daemon.image("vm0") }).to_string()).ok();
    assert!(daemon.content("vm0").iter().all(|byte| *byte == 5));
    daemon.restart();
    assert!(daemon.content("vm0").iter().all(|byte| *byte == 5));
    assert_eq!(daemon.snapshots(), Vec::<Value>::new());
}

/// Two of our own images that have changed places are noticed after a kill, when no time of theirs is known.
#[test]
fn images_of_two_snapshots_that_changed_places_are_noticed() {
    let mut daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    for disk in ["vm0", "vm1"] {
        daemon.client(disk).write(ALL, 1);
        daemon.snapshot("a", &[disk]);
        daemon.client(disk).write(0..100, 2);
    }
    daemon.kill();
    let [one, other] = ["vm0@a", "vm1@a"].map(|snapshot| daemon.snapshot_image(snapshot));
    let beside = daemon.path("beside");
    for (from, to) in [(&one, &beside), (&other, &one), (&beside, &other)] {
        std::fs::rename(from, to).unwrap();
    }
    daemon.start();
    for snapshot in ["vm0@a", "vm1@a"] {
        daemon.assert_broken(snapshot, "another one than it was");
    }
    for disk in ["vm0", "vm1"] {
        assert_eq!(shows(&daemon, disk), [vec![2; 100], vec![1; ALL.end - 100]].concat());
    }
}

/// A loop device that shows another file after a stop.
#[test]
fn a_device_that_is_another_one_is_not_served() {
    if !can_mount("a_device_that_is_another_one_is_not_served") {
        return;
    }
    let run = |args: &[&str]| Command::new("losetup").args(args).output().unwrap();
    for with_snapshot in [true, false] {
        let mut daemon = Daemon::place();
        let [one, other] = ["one", "other"].map(|name| daemon.make_image(name, SIZE));
        let made = run(&["--find", "--show", one.to_str().unwrap()]);
        if !made.status.success() {
            println!("skipped: there is no loop device: {}", String::from_utf8_lossy(&made.stderr));
            return;
        }
        let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        let attach = |file: &Path| assert!(run(&[&device, file.to_str().unwrap()]).status.success());
        let detach = || wait_until("the device to be free", || run(&["--detach", &device]).status.success());
        daemon.arg_disk_at("vm0", Path::new(&device), "");
        daemon.start();
        daemon.client("vm0").write(ALL, 1);
        if with_snapshot {
            daemon.snap("a");
        }
        daemon.client("vm0").write(0..100, 2);
        daemon.stop();
        detach();
        attach(&other);
        daemon.start();
        assert_is_stranger(&daemon, "vm0");
        detach();
        attach(&one);
        wait_until("the right one to be served", || daemon.show_disk("vm0")["state"] == "serving");
        assert_whole(&daemon, with_snapshot);
        daemon.stop();
        detach();
        assert!(tags(&std::fs::read(&other).unwrap()).iter().all(|tag| *tag == 0));
    }
}
