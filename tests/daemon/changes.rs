//! Differences from outside: incremental copies that must be the present byte for byte, bookmarks, maps, and what is
//! said of them after which end of the daemon.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges that happen to have one")]

use std::ops::Range;

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, Rng, names_in, seeds};
use crate::strategies::{ALL, End, SIZE, end_and_start, shows};

const SECTOR: u64 = 512;

/// The sectors that may differ.
#[track_caller]
pub(crate) fn diff(daemon: &Daemon, path: &str) -> Vec<Range<usize>> {
    let answer = daemon.get(path);
    answer.ok();
    let sector = |value: &Value| usize::try_from(value.as_u64().unwrap() / SECTOR).unwrap();
    let ranges: Vec<_> = answer.json().as_array().unwrap().clone();
    let ranges: Vec<_> =
        ranges.iter().map(|r| sector(&r["offset"])..sector(&r["offset"]) + sector(&r["length"])).collect();
    assert!(ranges.windows(2).all(|two| two[0].end < two[1].start), "{ranges:?}");
    assert!(ranges.iter().all(|r| !r.is_empty() && r.end <= ALL.end), "{ranges:?}");
    ranges
}

fn since(daemon: &Daemon, from: &str) -> Vec<Range<usize>> {
    diff(daemon, &format!("/v1/snapshots/{from}/diff"))
}

fn between(daemon: &Daemon, from: &str, to: &str) -> Vec<Range<usize>> {
    diff(daemon, &format!("/v1/snapshots/{from}/diff?to={to}"))
}

pub(crate) fn keep_bookmark(daemon: &Daemon, snapshot: &str) {
    let answer = daemon.send("DELETE", &format!("/v1/snapshots/{snapshot}?keep-bookmark=true"), "");
    assert!([202, 204].contains(&answer.status), "{}", answer.body);
    daemon.api().wait_gone(snapshot);
}

#[track_caller]
fn bookmarks(daemon: &Daemon) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let listed = daemon.get("/v1/bookmarks").json();
    listed.as_array().unwrap().iter().map(|b| (text(&b["name"]), text(&b["state"]))).collect()
}

/// A backup as somebody would make it: the first copy is whole, each later one has what differs.
struct Backup {
    copy: Vec<u64>,
    last: String,
    copied: usize,
}

impl Backup {
    fn whole(daemon: &Daemon, snapshot: &str) -> Backup {
        Backup { copy: shows(daemon, snapshot), last: snapshot.to_owned(), copied: 0 }
    }

    fn add(&mut self, daemon: &Daemon, snapshot: &str) {
        let now = shows(daemon, snapshot);
        for range in between(daemon, &self.last, snapshot) {
            self.copied += range.len();
            self.copy[range.clone()].copy_from_slice(&now[range]);
        }
        assert_eq!(self.copy, now, "the copy of {snapshot}");
        self.last = snapshot.to_owned();
    }
}

fn change(daemon: &Daemon, rng: &mut Rng, next: &mut u64) {
    let mut client = daemon.client("vm0");
    for _ in 0..1 + rng.below(12) {
        let start = rng.below(ALL.end);
        let sectors = start..(start + 1 + rng.below(24)).min(ALL.end);
        *next += 1;
        match rng.below(10) {
            0 => client.discard(sectors),
            1 => client.zero(sectors, (*next).is_multiple_of(2)),
            _ => client.write(sectors, *next),
        }
    }
    client.flush();
}

/// Across stops and kills, with every strategy, with and without bookmarks.
#[test]
fn incremental_copies_are_the_present_byte_for_byte() {
    for seed in seeds("incremental copies", 3) {
        let mut rng = Rng::new(seed);
        let mut daemon = Daemon::with_disks(&[SIZE], "");
        let mut next = 1;
        daemon.client("vm0").write(ALL, 1);
        daemon.snapshot("s0", &["vm0"]);
        let mut backup = Backup::whole(&daemon, "vm0@s0");
        for step in 1..10 {
            change(&daemon, &mut rng, &mut next);
            let end = match rng.below(4) {
                0 => Some(End::Stop),
                1 => Some(End::Kill),
                _ => None,
            };
            if let Some(end) = end {
                end_and_start(&mut daemon, end);
                change(&daemon, &mut rng, &mut next);
            }
            let strategy = if rng.below(2) == 0 { "copy-on-write" } else { "write-logging" };
            daemon.api().create(&format!("s{step}"), &["vm0"], &json!({ "strategy": strategy, "wait": true })).ok();
            if rng.below(2) == 0 {
                // Also one in the middle, of which nobody has a copy.
                change(&daemon, &mut rng, &mut next);
                daemon.snapshot(&format!("m{step}"), &["vm0"]);
                change(&daemon, &mut rng, &mut next);
                daemon.delete(&format!("vm0@m{step}"));
            }
            let last = backup.last.clone();
            if rng.below(2) == 0 {
                keep_bookmark(&daemon, &last);
            }
            backup.add(&daemon, &format!("vm0@s{step}"));
            if bookmarks(&daemon).iter().any(|(name, _)| format!("vm0@{name}") == last) {
                daemon.send("DELETE", &format!("/v1/bookmarks/{last}"), "").ok();
            } else {
                daemon.delete(&last);
            }
        }
        assert!(backup.copied < 9 * ALL.end / 2, "{} sectors were copied", backup.copied);
        daemon.delete(&backup.last);
        assert_eq!(bookmarks(&daemon), []);
        daemon.assert_only_disks_left();
    }
}

/// Nothing is said of what changed before a power cut, or while somebody else had the image.
#[test]
fn after_a_power_cut_nothing_is_said_of_what_changed_before() {
    for changed in [false, true] {
        let mut daemon = Daemon::with_disks(&[SIZE], "");
        daemon.client("vm0").write(ALL, 1);
        daemon.snapshot("a", &["vm0"]);
        daemon.client("vm0").write(0..8, 2);
        keep_bookmark(&daemon, "vm0@a");
        assert_eq!(since(&daemon, "vm0@a"), [0..8]);
        if changed {
            daemon.stop();
            let image = daemon.image("vm0");
            let bytes = std::fs::read(&image).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(10));
            std::fs::write(&image, bytes).unwrap();
            daemon.start();
        } else {
            end_and_start(&mut daemon, End::PowerCut);
        }
        for round in 0..3 {
            assert_eq!(bookmarks(&daemon), [("a".to_owned(), "lost".to_owned())], "{round}");
            let refused = daemon.get("/v1/snapshots/vm0@a/diff");
            assert_eq!((refused.status, refused.refused()), (409, "changes-unknown".to_owned()), "{}", refused.body);
            // Nor after any later end.
            end_and_start(&mut daemon, if round == 0 { End::Kill } else { End::Stop });
        }
        // From the next snapshot on it is known again, and the bookmark stays as it is.
        daemon.snapshot("b", &["vm0"]);
        daemon.client("vm0").write(16..24, 3);
        assert_eq!(since(&daemon, "vm0@b"), [16..24]);
        assert_eq!(daemon.get("/v1/snapshots/vm0@a/diff?to=vm0@b").refused(), "changes-unknown");
        daemon.send("DELETE", "/v1/bookmarks/vm0@a", "").ok();
        daemon.delete("vm0@b");
        daemon.assert_only_disks_left();
    }
}

/// What a snapshot owns tells what differs when nothing was noted, and the answer says so.
#[test]
fn a_snapshot_that_is_kept_over_a_power_cut_is_compared_by_what_it_owns() {
    let mut daemon = Daemon::with_disks(&[SIZE], "durability=power");
    daemon.client("vm0").write(ALL, 1);
    daemon.snapshot("a", &["vm0"]);
    let mut client = daemon.client("vm0");
    client.write(40..41, 2);
    client.flush();
    drop(client);
    end_and_start(&mut daemon, End::PowerCut);
    assert_eq!(since(&daemon, "vm0@a"), [40..48]);
    let said = String::from_utf8(daemon.cli(&["snapshot", "diff", "vm0@a"]).stdout).unwrap();
    assert!(
        said.ends_with("it is not known what was written, so this is what is stored in different places\n"),
        "{said}"
    );
}

/// What differs from a moment of the volume's old life is noted by nobody.
#[test]
fn a_volume_with_bookmarks_is_not_begun_anew() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    daemon.snapshot("a", &["vm0"]);
    daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@a"}"#).ok();
    daemon.client("clone").write(0..8, 2);
    daemon.snapshot("s", &["clone"]);
    let then = shows(&daemon, "clone");
    keep_bookmark(&daemon, "clone@s");
    daemon.send("POST", "/v1/volumes/clone/disable?force=true", "").ok();
    let fresh = daemon.send("POST", "/v1/volumes/clone/enable?fresh=true", "");
    if fresh.status == 200 {
        let now = shows(&daemon, "clone");
        let told = since(&daemon, "clone@s");
        let missed = (0..ALL.end).find(|&at| now[at] != then[at] && !told.iter().any(|range| range.contains(&at)));
        assert_eq!(missed, None, "a backup would miss it: {told:?}");
    }
    assert_eq!(fresh.refused(), "volume-busy");
    assert!(fresh.body.contains("bookmark delete"), "{}", fresh.body);
    daemon.send("DELETE", "/v1/bookmarks/clone@s", "").ok();
    daemon.send("POST", "/v1/volumes/clone/enable?fresh=true", "").ok();
    assert_eq!(shows(&daemon, "clone"), vec![1; ALL.end]);
}

/// What a deletion leaves is decided when it begins: whoever asks for a bookmark later is told so.
#[test]
fn a_deletion_that_has_begun_does_not_promise_a_bookmark() {
    let daemon = Daemon::with_disks(&[crate::restart::SLOW_SIZE], "");
    crate::restart::slow_deletion(&daemon);
    let job = format!("/v1/jobs/{}", daemon.get("/v1/jobs").json()[0]["id"]);
    assert_eq!(daemon.send("DELETE", &job, "").json()["state"], "stopped");
    let late = daemon.send("DELETE", "/v1/snapshots/vm0@b?keep-bookmark=true", "");
    if late.status < 300 {
        daemon.api().wait_gone("vm0@b");
        assert_eq!(bookmarks(&daemon), [("b".to_owned(), "kept".to_owned())], "as it was promised");
    }
    assert_eq!(late.refused(), "snapshot-busy", "{}", late.body);
    assert_eq!(bookmarks(&daemon), []);
}

/// A promoted volume has no older moment any more, and notes nothing.
#[test]
fn a_promotion_leaves_no_changed_table() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    daemon.snapshot("a", &["vm0"]);
    daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@a"}"#).ok();
    daemon.send("POST", "/v1/volumes/clone/complete", "").ok();
    crate::harness::wait_until("it to be independent", || {
        daemon.get("/v1/volumes/clone").json()["independent"] == true
    });
    let changed = |daemon: &Daemon| {
        let tables = names_in(&daemon.run_dir().join("tables"));
        tables.into_iter().filter(|name| name.ends_with(".changed")).count()
    };
    assert_eq!(changed(&daemon), 2, "of the disk, and of the volume");
    daemon.send("POST", "/v1/volumes/clone/promote", "").ok();
    assert_eq!(changed(&daemon), 1, "of the disk");
    daemon.stop();
    let report: Value = serde_json::from_slice(&daemon.check(&["--json"]).stdout).unwrap();
    assert_eq!((&report["ok"], &report["findings"]), (&json!(true), &json!([])));
}

#[test]
fn bookmarks_are_kept_until_they_are_deleted() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    daemon.snapshot("a", &["vm0"]);
    let id = daemon.show("vm0@a")["id"].as_str().unwrap().to_owned();
    daemon.client("vm0").write(0..8, 2);
    daemon.snapshot("b", &["vm0"]);
    daemon.client("vm0").write(64..72, 3);
    let events = daemon.events();
    let said = daemon.cli(&["snapshot", "delete", "vm0@a", "--keep-bookmark", "--wait"]);
    assert_eq!(String::from_utf8(said.stdout).unwrap(), "vm0@a deleted, a bookmark is kept\n");
    events.wait_for("BOOKMARK_CREATED", "vm0@a");
    keep_bookmark(&daemon, "vm0@b");
    for end in [None, Some(End::Stop), Some(End::Kill), Some(End::Stop)] {
        if let Some(end) = end {
            end_and_start(&mut daemon, end);
        }
        assert_eq!(bookmarks(&daemon), [("a".to_owned(), "kept".to_owned()), ("b".to_owned(), "kept".to_owned())]);
        assert_eq!(daemon.get(&format!("/v1/bookmarks/{id}")).json()["name"], "a", "by its id");
        assert_eq!(since(&daemon, &id), [0..8, 64..72]);
        assert_eq!(between(&daemon, "vm0@a", "vm0@b"), [0..8]);
    }
    // The name is taken, a bookmark is not a snapshot, and the disk does not go without being told.
    assert_eq!(daemon.api().create("a", &["vm0"], &json!({})).refused(), "snapshot-exists");
    let refused = daemon.send("DELETE", "/v1/snapshots/vm0@a", "");
    assert_eq!(refused.refused(), "snapshot-not-found");
    assert!(refused.body.contains("bookmark delete"), "{}", refused.body);
    assert_eq!(daemon.send("DELETE", "/v1/disks/vm0", "").refused(), "disk-busy");
    assert_eq!(daemon.get("/v1/snapshots/vm0@b/diff?to=vm0@a").refused(), "invalid-request", "in this order");
    assert_eq!(daemon.get("/v1/snapshots/vm0@none/diff").refused(), "snapshot-not-found");
    assert_eq!(daemon.get("/v1/snapshots/vm0@a/diff?to=vm1@a").refused(), "invalid-request");
    daemon.send("DELETE", "/v1/bookmarks/vm0@b", "").ok();
    assert_eq!(daemon.send("DELETE", "/v1/bookmarks/vm0@b", "").refused(), "bookmark-not-found");
    assert_eq!(since(&daemon, "vm0@a"), [0..8, 64..72], "the older one still knows");
    daemon.send("DELETE", "/v1/disks/vm0?force=true", "").ok();
    assert_eq!(names_in(&daemon.run_dir().join("tables")), [] as [&str; 0]);
}

/// A bookmark of a disk that is not served stays: what was changed since it cannot be forgotten in part.
#[test]
fn a_bookmark_of_an_unserved_disk_is_not_deleted() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.snapshot("a", &["vm0"]);
    keep_bookmark(&daemon, "vm0@a");
    daemon.stop();
    let (image, away) = (daemon.image("vm0"), daemon.path("away"));
    std::fs::rename(&image, &away).unwrap();
    daemon.start();
    let refused = daemon.send("DELETE", "/v1/bookmarks/vm0@a", "");
    assert_eq!(refused.refused(), "disk-failed");
    assert!(refused.body.contains("put back what vm0 lacks"), "{}", refused.body);
    std::fs::rename(&away, &image).unwrap();
    daemon.restart();
    assert_eq!(bookmarks(&daemon), [("a".to_owned(), "kept".to_owned())]);
    daemon.send("DELETE", "/v1/bookmarks/vm0@a", "").ok();
}

#[test]
fn volumes_have_differences_maps_and_a_state() {
    for how in [End::Stop, End::Kill, End::PowerCut] {
        let mut daemon = Daemon::with_disks(&[SIZE], "durability=power");
        daemon.client("vm0").write(ALL, 1);
        daemon.snapshot("a", &["vm0"]);
        daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@a"}"#).ok();
        let mut client = daemon.client("clone");
        client.write(0..4, 2);
        client.flush();
        daemon.snapshot("c", &["clone"]);
        client.write(80..96, 3);
        client.flush();
        drop(client);
        daemon.client("vm0").write(8..16, 4);
        daemon.client("vm0").write(0..8, 5);
        daemon.client("vm0").flush();
        for end in [false, true] {
            if end {
                end_and_start(&mut daemon, how);
            }
            let is_known = !(end && how == End::PowerCut);
            assert_eq!(diff(&daemon, "/v1/volumes/clone/diff"), [0..8, 80..96], "{how:?}");
            assert_eq!(diff(&daemon, "/v1/volumes/clone/diff?to=clone@c"), [0..8], "{how:?}");
            assert_eq!(since(&daemon, "clone@c"), [80..96], "{how:?}");
            let map = daemon.get("/v1/volumes/clone/map").json();
            assert_eq!(map["owned"], json!([[0, 1], [10, 2]]), "{how:?}");
            assert_eq!(map["changed"], if is_known { map["owned"].clone() } else { Value::Null }, "{how:?}");
            let status = daemon.get("/v1/volumes/clone/status").json();
            assert_eq!((&status["owned_blocks"], &status["blocks"]), (&json!(3), &json!(256)));
            assert_eq!(status["source_changed_blocks"], json!(2), "{how:?}: {status}");
            let differing = if is_known { json!(4) } else { Value::Null };
            assert_eq!(status["differing_blocks"], differing, "{how:?}: {status}");
            assert_eq!(status["reason"].is_null(), is_known, "{status}");
            let id = status["id"].as_str().unwrap();
            assert_eq!(daemon.get(&format!("/v1/volumes/{id}")).json()["name"], "clone");
            let disk = daemon.get("/v1/disks/vm0").json()["id"].as_str().unwrap().to_owned();
            assert_eq!(daemon.get(&format!("/v1/disks/{disk}")).json()["name"], "vm0");
        }
        let drawn = String::from_utf8(daemon.cli(&["volume", "map", "clone", "--text"]).stdout).unwrap();
        assert!(drawn.starts_with("clone: owned: 3 of 256 blocks, 1.17 %\n  #.........##...."), "{drawn}");
    }
}

/// A write that comes with the full run directory goes on, and everything counts as changed.
#[test]
fn a_changed_table_that_cannot_grow_stops_no_guest() {
    if !crate::harness::can_mount("a_changed_table_that_cannot_grow_stops_no_guest") {
        return;
    }
    let mut daemon = Daemon::place();
    let mount = crate::trouble::Mount::tmpfs(&daemon.run_dir(), "1m");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(daemon.run_dir(), mode).unwrap();
    daemon.make_image("vm0", 256 << 20);
    daemon.arg_disk("vm0", "");
    daemon.start();
    daemon.snapshot("a", &["vm0"]);
    keep_bookmark(&daemon, "vm0@a");
    let filler = daemon.run_dir().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    let mut client = daemon.client("vm0");
    client.write(0..8, 7);
    assert_eq!(tags(&client.read(0..8)), [7; 8]);
    assert_eq!(daemon.get("/v1/snapshots/vm0@a/diff").refused(), "changes-unknown");
    drop(client);
    std::fs::remove_file(&filler).unwrap();
    daemon.client("vm0").write(0..8, 8);
    end_and_start(&mut daemon, End::Kill);
    assert_eq!(daemon.get("/v1/snapshots/vm0@a/diff").refused(), "changes-unknown", "for ever");
    drop(daemon);
    drop(mount);
}
