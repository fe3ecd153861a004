//! Mirrored disks from outside: legs that are kept equal, split, joined again, lost and replaced.

use std::ops::Range;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, Rng, seeds, wait_until};
use crate::trouble::Mount;

const SIZE: u64 = 8 << 20;
const ALL: Range<usize> = 0..16384;

pub(crate) fn mirrored() -> (Daemon, PathBuf) {
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    let leg = daemon.path("leg.raw");
    daemon.arg_disk("vm0", &format!("mirror={}", leg.display()));
    daemon.start();
    in_sync(&daemon);
    (daemon, leg)
}

pub(crate) fn legs(daemon: &Daemon) -> Vec<(String, String)> {
    let disk = daemon.show_disk("vm0");
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    disk["legs"].as_array().unwrap().iter().map(|l| (text(&l["path"]), text(&l["state"]))).collect()
}

#[track_caller]
pub(crate) fn in_sync(daemon: &Daemon) {
    wait_until("both legs to be in sync", || {
        let legs = legs(daemon);
        legs.len() == 2 && legs.iter().all(|(_, state)| state == "in-sync")
    });
}

pub(crate) fn raw(path: &std::path::Path) -> Vec<u64> {
    tags(&std::fs::read(path).unwrap())
}

fn shows(daemon: &Daemon, what: &str) -> Vec<u64> {
    tags(&daemon.content(what))
}

fn split(daemon: &Daemon, name: &str) -> Value {
    let answer = daemon.api().create(name, &["vm0"], &json!({ "strategy": "write-mirroring", "wait": true }));
    answer.ok();
    answer.json()[0].clone()
}

#[test]
fn writes_go_to_both_legs() {
    let (mut daemon, leg) = mirrored();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    client.write(10..20, 2);
    client.zero(100..200, true);
    client.discard(300..400);
    client.flush();
    drop(client);
    let live = shows(&daemon, "vm0");
    assert_eq!(raw(&leg), live);
    assert_eq!(raw(&daemon.image("vm0")), live);
    daemon.restart();
    in_sync(&daemon);
    assert!(daemon.get("/v1/jobs").json().as_array().unwrap().is_empty(), "nothing was to be copied");
    assert_eq!(shows(&daemon, "vm0"), live);
    // A start that says nothing of the leg means what is there.
    assert_eq!(daemon.send("PUT", "/v1/disks/vm0", &json!({"path": daemon.image("vm0")}).to_string()).status, 200);
}

#[test]
fn without_a_second_leg_a_split_says_what_to_do() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let refused = daemon.api().create("a", &["vm0"], &json!({ "strategy": "write-mirroring" }));
    assert_eq!(refused.refused(), "no-second-leg");
    assert!(refused.body.contains("halfsilver disk mirror vm0 PATH"), "{}", refused.body);
    assert_eq!(daemon.snapshots(), Vec::<Value>::new());
}

#[test]
fn a_split_leg_is_vlun_a_and_comes_back_with_what_changed() {
    let (mut daemon, leg) = mirrored();
    daemon.client("vm0").write(ALL, 1);
    daemon.restart(); // So that nothing is marked as written lately.
    let mut client = daemon.client("vm0");
    let elsewhere = json!({ "strategy": "write-mirroring", "image": daemon.path("elsewhere.img") });
    assert_eq!(daemon.api().create("a", &["vm0"], &elsewhere).refused(), "invalid-request");
    let snapshot = split(&daemon, "a");
    assert_eq!(
        (&snapshot["strategy"], snapshot["image"].as_str()),
        (&json!("write-mirroring"), leg.to_str()),
        "{snapshot}"
    );
    client.write(0..100, 2);
    assert_eq!(raw(&leg), vec![1; ALL.end], "VLUN B's writes do not reach VLUN A");
    assert_eq!(legs(&daemon)[1].1, "split");
    assert_eq!(daemon.api().create("b", &["vm0"], &json!({ "strategy": "write-mirroring" })).status, 409);
    // Both other strategies go on beside it.
    daemon.snap("cow");
    client.write(50..60, 3);
    drop(client);
    for how in ["stop", "kill"] {
        match how {
            "stop" => daemon.stop(),
            _ => daemon.kill(),
        }
        daemon.start();
        assert_eq!(shows(&daemon, "vm0@a"), vec![1; ALL.end], "{how}");
        assert_eq!(shows(&daemon, "vm0@cow")[..101], [vec![2; 100], vec![1]].concat(), "{how}");
        assert_eq!(shows(&daemon, "vm0")[49..61], [vec![2], vec![3; 10], vec![2]].concat(), "{how}");
    }
    daemon.delete("vm0@a");
    in_sync(&daemon);
    let jobs = daemon.get("/v1/jobs").json();
    let job = jobs.as_array().unwrap().iter().find(|j| j["kind"] == "mirror").unwrap().clone();
    assert!(job["total_bytes"].as_u64().unwrap() <= 2 << 20, "only what changed is copied: {job}");
    daemon.delete("vm0@cow");
    daemon.client("vm0").flush();
    assert_eq!(raw(&leg), raw(&daemon.image("vm0")));
    split(&daemon, "again");
    daemon.delete("vm0@again");
}

#[test]
fn a_kept_image_becomes_an_independent_disk() {
    let (daemon, leg) = mirrored();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    split(&daemon, "a");
    client.write(0..100, 2);
    let done = daemon.cli(&["snapshot", "delete", "vm0@a", "--keep-image"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(legs(&daemon).len(), 1);
    assert_eq!(raw(&leg), vec![1; ALL.end]);
    daemon.send("PUT", "/v1/disks/copy", &json!({ "path": leg }).to_string()).ok();
    assert_eq!(shows(&daemon, "copy"), vec![1; ALL.end]);
    assert_eq!(
        daemon.api().create("b", &["vm0"], &json!({ "strategy": "write-mirroring" })).refused(),
        "no-second-leg"
    );
}

#[test]
fn after_a_kill_only_what_may_differ_is_copied() {
    for seed in seeds("mirror kills", 3) {
        let mut rng = Rng::new(seed);
        let (mut daemon, leg) = mirrored();
        let mut client = daemon.client("vm0");
        client.write(ALL, 1);
        let mut live = vec![1; ALL.end];
        for _ in 0..3 {
            for _ in 0..rng.below(40) {
                let first = rng.below(ALL.end - 64);
                let range = first..first + 1 + rng.below(64);
                let tag = rng.next();
                client.write(range.clone(), tag);
                live[range].fill(tag);
            }
            drop(client);
            daemon.kill();
            daemon.start();
            in_sync(&daemon);
            assert_eq!(shows(&daemon, "vm0"), live, "seed {seed}");
            client = daemon.client("vm0");
        }
        client.flush();
        assert_eq!(raw(&leg), live, "seed {seed}");
        assert_eq!(raw(&daemon.image("vm0")), live, "seed {seed}");
    }
}

/// A leg without room for all of the disk is dropped; the guest notices nothing, and a new leg takes its place.
#[test]
fn a_leg_that_fails_is_dropped_and_replaced() {
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    let mount = daemon.path("small");
    let _small = Mount::tmpfs(&mount, "1m");
    let leg = mount.join("leg.raw");
    daemon.arg_disk("vm0", &format!("direct=off,mirror={}", leg.display()));
    daemon.start();
    in_sync(&daemon);
    let events = daemon.events();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    client.flush();
    assert_eq!(events.wait_for("LEG_FAILED", "vm0")["leg"].as_str(), leg.to_str());
    assert_eq!(legs(&daemon)[1].1, "failed");
    client.write(0..10, 2);
    drop(client);
    daemon.kill();
    daemon.start();
    assert_eq!(legs(&daemon)[1].1, "failed");
    assert_eq!(shows(&daemon, "vm0")[..11], [vec![2; 10], vec![1]].concat());
    let other = daemon.path("other.raw");
    let done = daemon.cli(&["disk", "mirror", "vm0", other.to_str().unwrap(), "--wait"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    in_sync(&daemon);
    daemon.client("vm0").flush();
    assert_eq!(raw(&other), raw(&daemon.image("vm0")));
}

#[test]
fn legs_are_added_and_let_go_while_the_disk_runs() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    let (first, second) = (daemon.image("vm0"), daemon.path("second.raw"));
    let add = daemon.cli(&["disk", "mirror", "vm0", second.to_str().unwrap(), "--wait"]);
    assert!(add.status.success(), "{}", String::from_utf8_lossy(&add.stderr));
    client.write(5..6, 2);
    let gone = daemon.cli(&["disk", "unmirror", "vm0", "--leg", first.to_str().unwrap()]);
    assert!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
    client.write(6..7, 3);
    client.flush();
    assert_eq!((raw(&first)[5..7].to_vec(), raw(&second)[5..7].to_vec()), (vec![2, 1], vec![2, 3]));
    assert_eq!(daemon.show_disk("vm0")["path"].as_str(), second.to_str());
    drop(client);
    daemon.stop();
    // The old image is not the disk any more, and is not taken for it.
    let said = daemon.refused_start();
    assert!(said.contains("was a leg") && said.contains(second.to_str().unwrap()), "{said}");
}

/// Writes `tag` into a sector of an image behind the daemon's back.
fn scribble(path: &std::path::Path, sector: u64, tag: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(&tag.to_le_bytes().repeat(64), sector * 512).unwrap();
}

/// What was prepared for a snapshot that is refused is undone; the leg that an older one has is none of it.
#[test]
fn a_refused_snapshot_leaves_a_split_leg_alone() {
    let (daemon, leg) = mirrored();
    let other = daemon.make_image("vm1", SIZE);
    daemon.send("PUT", "/v1/disks/vm1", &json!({ "path": other }).to_string()).ok();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    split(&daemon, "a");
    client.write(0..100, 2);
    std::fs::write(daemon.snapshot_image("vm1@b"), "in the way").unwrap();
    assert_eq!(daemon.api().create("b", &["vm0", "vm1"], &json!({})).status, 409);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(legs(&daemon)[1].1, "split");
    assert_eq!(raw(&leg), vec![1; ALL.end]);
    assert_eq!(shows(&daemon, "vm0@a"), vec![1; ALL.end]);
    daemon.delete("vm0@a");
    in_sync(&daemon);
    assert_eq!(raw(&leg), raw(&daemon.image("vm0")));
}

/// A leg that somebody wrote differs in more than what was written to the disk since it was split.
#[test]
fn a_split_leg_that_was_changed_does_not_come_back_by_itself() {
    let (mut daemon, leg) = mirrored();
    daemon.client("vm0").write(ALL, 1);
    daemon.restart();
    split(&daemon, "a");
    daemon.client("vm0").write(0..100, 2);
    daemon.stop();
    scribble(&leg, 9000, 77);
    daemon.start();
    daemon.assert_broken("vm0@a", "changed");
    daemon.delete("vm0@a");
    assert_eq!(legs(&daemon).len(), 1, "{:?}", legs(&daemon));
    for how in ["stop", "kill"] {
        match how {
            "stop" => daemon.stop(),
            _ => daemon.kill(),
        }
        daemon.forget_args();
        daemon.start();
        assert_eq!(legs(&daemon).len(), 1, "{how}");
        assert_eq!(raw(&leg)[9000], 77, "{how}: it is left as it is");
    }
    let done = daemon.cli(&["disk", "mirror", "vm0", leg.to_str().unwrap(), "--wait"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    in_sync(&daemon);
    assert_eq!(raw(&leg), raw(&daemon.image("vm0")));
}

/// When it goes, an older snapshot that reads through it gets its image: then that is not its content any more.
#[test]
fn an_image_is_not_kept_while_an_older_snapshot_needs_it() {
    let (daemon, leg) = mirrored();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.snap("old");
    client.write(0..100, 2);
    split(&daemon, "a");
    client.write(0..50, 3);
    let refused = daemon.send("DELETE", "/v1/snapshots/vm0@a?keep-image=true", "");
    assert_eq!((refused.status, refused.body.contains("vm0@old")), (409, true), "{}", refused.body);
    let a = [vec![2; 100], vec![1; ALL.end - 100]].concat();
    assert_eq!((shows(&daemon, "vm0@a"), shows(&daemon, "vm0@old")), (a.clone(), vec![1; ALL.end]));
    daemon.delete("vm0@old");
    daemon.send("DELETE", "/v1/snapshots/vm0@a?keep-image=true", "").ok();
    assert_eq!(raw(&leg), a);
}

/// The full image of a logged snapshot is the mirror itself, not a leg that was split.
#[test]
fn a_log_on_a_mirror_leaves_both_legs_in_use() {
    let (mut daemon, leg) = mirrored();
    daemon.client("vm0").write(ALL, 1);
    daemon.api().create("a", &["vm0"], &json!({ "strategy": "write-logging", "wait": true })).ok();
    daemon.client("vm0").write(0..100, 2);
    let live = shows(&daemon, "vm0");
    for how in ["stop", "kill"] {
        match how {
            "stop" => daemon.stop(),
            _ => daemon.kill(),
        }
        daemon.start();
        in_sync(&daemon);
        assert_eq!((shows(&daemon, "vm0"), shows(&daemon, "vm0@a")), (live.clone(), vec![1; ALL.end]), "{how}");
    }
    daemon.delete("vm0@a");
    assert_eq!((raw(&leg), raw(&daemon.image("vm0"))), (live.clone(), live));
}

/// The version that began with the split is lost: the next one begins with it.
#[test]
fn a_power_cut_leaves_what_was_split_before() {
    let (mut daemon, leg) = mirrored();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    split(&daemon, "a");
    client.write(0..100, 2);
    daemon.snap("cow");
    client.write(0..50, 3);
    client.flush();
    let live = tags(&client.read_all());
    drop(client);
    daemon.kill();
    daemon.lose_run_tables();
    for _ in 0..2 {
        daemon.start();
        daemon.assert_broken("vm0@cow", "");
        assert_eq!((shows(&daemon, "vm0"), shows(&daemon, "vm0@a")), (live.clone(), vec![1; ALL.end]));
        daemon.kill();
    }
    daemon.start();
    daemon.delete("vm0@cow");
    daemon.restart();
    assert_eq!((shows(&daemon, "vm0"), shows(&daemon, "vm0@a")), (live.clone(), vec![1; ALL.end]));
    daemon.delete("vm0@a");
    in_sync(&daemon);
    assert_eq!(raw(&leg), live);
}

/// The disk goes by the leg that is left, also at the next start.
#[test]
fn a_first_leg_that_fails_is_replaced() {
    let mut daemon = Daemon::place();
    let mount = daemon.path("small");
    let _small = Mount::tmpfs(&mount, "1m");
    let first = mount.join("first.raw");
    std::fs::File::create(&first).unwrap().set_len(SIZE).unwrap();
    let (second, third) = (daemon.path("second.raw"), daemon.path("third.raw"));
    daemon.arg_disk_at("vm0", &first, &format!("direct=off,mirror={}", second.display()));
    daemon.start();
    in_sync(&daemon);
    daemon.client("vm0").write(ALL, 1);
    wait_until("the first leg to fail", || legs(&daemon)[0].1 == "failed");
    daemon.kill();
    daemon.start();
    assert_eq!(shows(&daemon, "vm0"), vec![1; ALL.end]);
    let done = daemon.cli(&["disk", "mirror", "vm0", third.to_str().unwrap(), "--wait"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(daemon.show_disk("vm0")["path"].as_str(), second.to_str());
    daemon.stop();
    let said = daemon.refused_start();
    assert!(said.contains("was a leg") && said.contains(second.to_str().unwrap()), "{said}");
    daemon.forget_args();
    daemon.start();
    in_sync(&daemon);
    assert_eq!(shows(&daemon, "vm0"), vec![1; ALL.end]);
}

/// A deletion with --keep-image that was not over when the daemon stopped, and the image is in use elsewhere since.
#[test]
fn a_kept_image_is_never_removed() {
    let (mut daemon, leg) = mirrored();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    split(&daemon, "a");
    daemon.api().create("log", &["vm0"], &json!({ "strategy": "write-logging", "wait": true })).ok();
    client.write(ALL, 2);
    drop(client);
    let api = daemon.api();
    let folding = std::thread::spawn(move || api.send("DELETE", "/v1/snapshots/vm0@log", ""));
    let mut job = Value::Null;
    wait_until("the fold to begin", || {
        let jobs = daemon.get("/v1/jobs").json();
        job = jobs.as_array().unwrap().iter().find(|j| j["kind"] == "fold").cloned().unwrap_or_default();
        !job.is_null()
    });
    let path = format!("/v1/jobs/{}", job["id"]);
    daemon.send("PATCH", &path, r#"{"delay_ms":3600000}"#).ok();
    daemon.send("DELETE", &path, "").ok();
    folding.join().unwrap();
    daemon.send("DELETE", "/v1/snapshots/vm0@a?keep-image=true", "");
    assert_eq!(daemon.state("vm0@a"), "deleting");
    daemon.stop();
    scribble(&leg, 7, 77);
    daemon.start();
    let mut kept = vec![1; ALL.end];
    kept[7] = 77;
    assert!(leg.exists(), "the kept image is removed");
    assert_eq!(raw(&leg), kept);
    assert_eq!(shows(&daemon, "vm0"), vec![2; ALL.end]);
    daemon.restart();
    assert_eq!((legs(&daemon).len(), raw(&leg)), (1, kept));
}

/// A group of which one disk cannot be split leaves the others' mirrors as they were.
#[test]
fn a_split_that_is_refused_for_another_disk_leaves_the_mirror() {
    let (mut daemon, leg) = mirrored();
    daemon.make_image("vm1", SIZE);
    daemon.send("PUT", "/v1/disks/vm1", &json!({ "path": daemon.image("vm1") }).to_string()).ok();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    let refused = daemon.api().create("a", &["vm0", "vm1"], &json!({ "strategy": "write-mirroring" }));
    assert_eq!(refused.refused(), "no-second-leg");
    in_sync(&daemon);
    client.write(0..10, 2);
    client.flush();
    assert_eq!(raw(&leg)[..11], [vec![2; 10], vec![1]].concat());
    drop(client);
    daemon.kill();
    daemon.start();
    in_sync(&daemon);
    assert_eq!(shows(&daemon, "vm0")[..11], [vec![2; 10], vec![1]].concat());
    split(&daemon, "b");
    daemon.delete("vm0@b");
}

/// Of a mirror that has one leg left that one can be made the disk's image again.
#[test]
fn a_mirror_of_one_leg_is_none_after_it_was_let_go() {
    let (mut daemon, leg) = mirrored();
    daemon.client("vm0").write(ALL, 1);
    split(&daemon, "a");
    daemon.send("DELETE", "/v1/snapshots/vm0@a?keep-image=true", "").ok();
    assert_eq!(legs(&daemon).len(), 1);
    let refused = daemon.cli(&["disk", "unmirror", "vm0", "--leg", leg.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("has no leg"), "it is none any more");
    let mut client = daemon.client("vm0");
    daemon.send("DELETE", "/v1/disks/vm0/mirror", "").ok();
    assert_eq!(legs(&daemon), []);
    client.write(0..10, 2);
    client.flush();
    drop(client);
    daemon.forget_args();
    daemon.arg_disk("vm0", "");
    daemon.restart();
    assert_eq!((legs(&daemon), daemon.client("vm0").tag(9)), (Vec::new(), 2));
    assert_eq!(raw(&leg)[9], 1);
}
