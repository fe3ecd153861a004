//! Packed layers from outside: said, shown, remembered and refused; what they take; and all that is done with snapshots.
//!
//! Random runs over them are those of the other files (`strategies`, `oracle`, `kills`), as one more shape.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, allocated, can_mount};
use crate::independent::{begin, post, wait_independent};
use crate::restore;
use crate::strategies::{ALL, End, SIZE, end_and_start, shows};

const STRATEGIES: [&str; 2] = ["copy-on-write", "write-logging"];

fn take(daemon: &Daemon, name: &str, options: &Value) -> Value {
    let answer = daemon.api().create(name, &["vm0"], options);
    answer.ok();
    answer.json()[0].clone()
}

fn image(snapshot: &Value) -> PathBuf {
    snapshot["image"].as_str().unwrap().into()
}

fn is_pack(snapshot: &Value) -> bool {
    std::fs::read(image(snapshot)).unwrap().starts_with(b"HSPACK01")
}

#[test]
fn what_is_said_of_a_layout_is_shown_and_remembered() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    assert_eq!(daemon.show_disk("vm0")["layout"], "auto");
    for strategy in STRATEGIES {
        // What is said of the snapshot, and of the disk, and what comes of it.
        for (of_snapshot, of_disk, expected) in [
            (None, "packed", "packed"),
            (Some("sparse"), "packed", "sparse"),
            (Some("packed"), "sparse", "packed"),
            (None, "auto", "sparse"),
            (Some("auto"), "packed", "sparse"),
        ] {
            let set = daemon.send("PATCH", "/v1/disks/vm0", &json!({ "layout": of_disk }).to_string());
            assert_eq!(set.ok().json()["layout"], of_disk);
            let mut options = json!({ "strategy": strategy, "wait": true });
            if let Some(layout) = of_snapshot {
                options["layout"] = json!(layout);
            }
            let snapshot = take(&daemon, "a", &options);
            assert_eq!(snapshot["layout"], expected, "{strategy}, {of_snapshot:?} of {of_disk}");
            assert_eq!(is_pack(&snapshot), expected == "packed", "{snapshot}");
            daemon.restart();
            assert_eq!(daemon.show_disk("vm0")["layout"], of_disk, "after a restart");
            assert_eq!(daemon.show("vm0@a")["layout"], expected, "after a restart");
            daemon.delete("vm0@a");
            assert!(!image(&snapshot).exists());
        }
    }
    let shown = daemon.cli(&["disk", "set", "vm0", "--layout", "packed"]);
    assert!(shown.status.success(), "{shown:?}");
    let taken = daemon.cli(&["snapshot", "create", "b", "--disk", "vm0", "--wait", "--layout", "sparse"]);
    assert!(taken.status.success(), "{taken:?}");
    let page = |args: &[&str]| String::from_utf8(daemon.cli(args).stdout).unwrap();
    let says = |page: &str, layout: &str| page.lines().any(|line| line.contains("layout") && line.ends_with(layout));
    assert!(says(&page(&["disk", "show", "vm0"]), "packed"));
    assert!(says(&page(&["snapshot", "show", "vm0@b"]), "sparse"));
}

#[test]
fn where_no_layer_can_be_packed_that_is_said() {
    let daemon = Daemon::with_disks(&[SIZE], "layout=packed");
    daemon.snap("a");
    daemon.send("POST", "/v1/volumes", &json!({ "name": "clone", "from": "vm0@a" }).to_string()).ok();
    let of_volume = [
        daemon.send("PATCH", "/v1/volumes/clone", &json!({ "layout": "packed" }).to_string()),
        daemon.api().create("x", &["clone"], &json!({ "layout": "packed" })),
        daemon.api().create("x", &["vm0", "clone"], &json!({ "layout": "packed" })),
    ];
    for answer in of_volume {
        assert_eq!(answer.refused(), "unsupported");
        assert!(answer.body.contains("clone") && answer.body.contains("halfsilver volume promote"), "{}", answer.body);
    }
    // Nothing of the disk's is left to a volume.
    daemon.api().create("y", &["clone"], &json!({ "wait": true })).ok();
    assert_eq!(daemon.show("clone@y")["layout"], "sparse");
    assert_eq!(daemon.snapshots().len(), 2, "what was refused for one disk was not begun for the other");
    daemon.delete("clone@y");
    // A disk can have what a volume cannot.
    begin(&daemon, "clone", "");
    wait_independent(&daemon, "clone");
    post(&daemon, "clone/promote").ok();
    daemon.send("PATCH", "/v1/disks/clone", &json!({ "layout": "packed" }).to_string()).ok();
    daemon.api().create("z", &["clone"], &json!({ "wait": true })).ok();
    assert_eq!(daemon.show("clone@z")["layout"], "packed");
}

#[test]
fn a_full_image_is_not_packed() {
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    let leg = daemon.path("leg.raw");
    daemon.arg_disk("vm0", &format!("layout=packed,mirror={}", leg.display()));
    daemon.start();
    crate::harness::wait_until("the leg to be in sync", || daemon.show_disk("vm0")["legs"][1]["state"] == "in-sync");
    let split = |options: &Value| daemon.api().create("a", &["vm0"], options);
    let refused = split(&json!({ "strategy": "write-mirroring", "layout": "packed" }));
    assert_eq!(refused.refused(), "invalid-request");
    split(&json!({ "strategy": "write-mirroring", "wait": true })).ok();
    assert_eq!(daemon.show("vm0@a")["layout"], "sparse");
}

/// A guest that overwrites what it has written, everything that users do with snapshots, and ends of the daemon.
#[test]
fn all_that_is_done_with_snapshots_is_done_with_packed_ones() {
    if !can_mount("packed layers through power cuts") {
        return;
    }
    for durability in ["process", "power"] {
        let mut daemon = Daemon::with_disks(&[SIZE], &format!("layout=packed,durability={durability}"));
        let mut live = vec![0; ALL.end];
        let mut frozen: Vec<(String, Vec<u64>)> = Vec::new();
        let write = |daemon: &Daemon, live: &mut Vec<u64>, from: u64| {
            let mut client = daemon.client("vm0");
            for (tag, first) in (from..).zip((0..ALL.end - 64).step_by(150)) {
                client.write(first..first + 50, tag);
                live[first..first + 50].fill(tag);
            }
            client.zero(512..520, true);
            live[512..520].fill(0);
            client.flush();
        };
        for (round, strategy) in (1..).zip(["copy-on-write", "copy-on-write", "write-logging", "write-logging"]) {
            write(&daemon, &mut live, 1000 * round);
            let snapshot = take(&daemon, &format!("s{round}"), &json!({ "strategy": strategy, "wait": true }));
            assert_eq!(snapshot["layout"], "packed");
            frozen.push((format!("vm0@s{round}"), live.clone()));
            write(&daemon, &mut live, 1000 * round + 500);
        }
        let whole = |daemon: &Daemon, live: &[u64], frozen: &[(String, Vec<u64>)], what: &str| {
            assert_eq!(shows(daemon, "vm0"), live, "{what}");
            for (reference, content) in frozen {
                assert_eq!(shows(daemon, reference), *content, "{reference} {what}");
            }
        };
        for how in [End::Kill, End::Stop, End::Kill] {
            whole(&daemon, &live, &frozen, "before an end");
            // What is amid is taken up as well.
            write(&daemon, &mut live, 9000);
            end_and_start(&mut daemon, how);
            whole(&daemon, &live, &frozen, &format!("after {how:?}"));
        }
        if durability == "power" {
            end_and_start(&mut daemon, End::PowerCut);
            whole(&daemon, &live, &frozen, "after a power cut");
        }
        daemon.stop();
        let checked = daemon.check(&[]);
        assert!(checked.status.success(), "{checked:?}");
        daemon.start();
        // In the middle, the fold, the oldest.
        for at in [1, 1, 0] {
            let (gone, _) = frozen.remove(at);
            daemon.delete(&gone);
            whole(&daemon, &live, &frozen, &format!("when {gone} is gone"));
        }
        let reference = frozen[0].0.clone();
        restore::begin(&daemon, &reference, 0);
        restore::finish(&daemon);
        let back = frozen[0].1.clone();
        whole(&daemon, &back, &frozen, "when it is restored");
        daemon.delete(&reference);
        assert_eq!(tags(&std::fs::read(daemon.image("vm0")).unwrap()), back, "one raw image is left");
        daemon.assert_only_disks_left();
    }
}

/// Figures 16 and 23: what nobody reads any more takes no room.
#[test]
fn a_pack_shrinks_when_its_blocks_go() {
    const LARGE: u64 = 64 << 20;
    let sectors = (LARGE / 512) as usize;
    let daemon = Daemon::with_disks(&[LARGE], "layout=packed");
    let mut client = daemon.client("vm0");
    let everything = |client: &mut crate::client::Client, tag| {
        (0..sectors).step_by(256).for_each(|first| client.write(first..first + 256, tag));
    };
    everything(&mut client, 1);
    let log = image(&take(&daemon, "a", &json!({ "strategy": "write-logging", "wait": true })));
    everything(&mut client, 2);
    client.flush();
    let full = allocated(&log);
    assert!(full >= LARGE, "{full} bytes");
    client.zero(0..sectors, true);
    // Each flush gives some of it back.
    for _ in 0..100 {
        client.flush();
    }
    let left = allocated(&log);
    assert!(left < full / 2, "{left} of {full} bytes are left");
    drop(client);
    let everything_is = |what: &str, tag| assert!(shows(&daemon, what).iter().all(|t| *t == tag), "{what}");
    everything_is("vm0", 0);
    everything_is("vm0@a", 1);
}

#[test]
fn a_pack_that_is_not_whole_is_not_believed_and_check_says_so() {
    for strategy in STRATEGIES {
        let mut daemon = Daemon::with_disks(&[SIZE], "layout=packed");
        let pack = image(&take(&daemon, "a", &json!({ "strategy": strategy, "wait": true })));
        daemon.client("vm0").write(0..64, 5);
        daemon.kill();
        let mut bytes = std::fs::read(&pack).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&pack, &bytes).unwrap();
        let said = daemon.check(&[]);
        let says = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(!said.status.success() && says.contains("does not match its checksum"), "{says}");
        daemon.start();
        if strategy == "copy-on-write" {
            daemon.assert_broken("vm0@a", "does not match its checksum");
            assert_eq!(shows(&daemon, "vm0")[..64], [5; 64], "the disk does not need it");
            continue;
        }
        // The newest content is in the log.
        let disk = daemon.show_disk("vm0");
        assert_eq!(disk["state"], "unserved");
        assert!(disk["reason"].as_str().unwrap().contains("does not match its checksum"), "{disk}");
        bytes[20] ^= 1;
        std::fs::write(&pack, &bytes).unwrap();
        crate::harness::wait_until("the disk to be served again", || daemon.show_disk("vm0")["state"] == "serving");
        assert_eq!(shows(&daemon, "vm0")[..64], [5; 64]);
        assert_eq!(shows(&daemon, "vm0@a")[..64], [0; 64]);
    }
}

#[test]
fn a_write_that_had_not_arrived_is_told_of_by_check() {
    let mut daemon = Daemon::with_disks(&[SIZE], "layout=packed");
    let pack = image(&take(&daemon, "a", &json!({ "strategy": "write-logging", "wait": true })));
    daemon.client("vm0").write(0..64, 5);
    daemon.kill();
    // Nothing says that the first header had arrived. Its blocks are behind it.
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[3 * 4096] ^= 1;
    std::fs::write(&pack, &bytes).unwrap();
    let said = daemon.check(&[]);
    let says = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.status.success() && says.contains("a write to it had not arrived as a whole"), "{says}");
    daemon.start();
    assert_eq!(shows(&daemon, "vm0")[..64], [0; 64], "all of a write is there, or nothing");
}
