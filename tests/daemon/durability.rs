//! Disks with durability=power: what copy-on-write saved outlives whatever happens to the host.
//!
//! The page cache is kept here, so what these tests show is what is believed and what is not; the order of writes and
//! syncs is held by the crash states of `tests/crash`.

use std::path::Path;

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, can_mount, names_in};
use crate::strategies::{ALL, End, SIZE, end, shows};
use crate::trouble::{Mount, Standstill};
use crate::volumes::made;

fn power() -> Daemon {
    Daemon::with_disks(&[SIZE], "durability=power")
}

fn durabilities(daemon: &Daemon) -> Vec<Value> {
    daemon.snapshots().iter().map(|s| s["durability"].clone()).collect()
}

/// A volume is lost with what it stands on, and so are its snapshots.
#[test]
fn a_snapshot_of_a_volume_outlives_what_its_base_does() {
    for durability in ["process", "power"] {
        let daemon = Daemon::with_disks(&[SIZE], &format!("durability={durability}"));
        daemon.snap("base");
        made(&daemon, "clone", "vm0@base");
        daemon.snapshot("s", &["clone"]);
        assert_eq!(daemon.show("clone@s")["durability"], durability);
    }
}

#[test]
fn copies_outlive_every_end() {
    for how in [End::Stop, End::Kill, End::Cleared, End::PowerCut] {
        let mut daemon = power();
        assert_eq!(daemon.show_disk("vm0")["durability"], "power");
        let mut expected = Vec::new();
        let mut client = daemon.client("vm0");
        client.write(ALL, 1);
        for round in 0..4 {
            let name = format!("s{round}");
            daemon.snap(&name);
            expected.push((format!("vm0@{name}"), tags(&client.read_all())));
            client.write(100 * round..100 * round + 150, 10 + round as u64);
            client.zero(1000 + 16 * round..1016 + 16 * round, true);
        }
        assert_eq!(durabilities(&daemon), vec![json!("power"); 4]);
        let live = tags(&client.read_all());
        drop(client);
        for round in 0..2 {
            end(&mut daemon, how);
            assert_eq!(shows(&daemon, "vm0"), live, "{how:?}");
            for (reference, content) in &expected {
                assert_eq!(daemon.state(reference), "quiesced", "{how:?}: {}", daemon.show(reference));
                assert_eq!(shows(&daemon, reference), *content, "{how:?} {round}: {reference}");
            }
        }
        let mut client = daemon.client("vm0");
        client.write(ALL, 99);
        drop(client);
        for at in [2, 0, 1, 0] {
            let (gone, content) = expected.remove(at);
            assert_eq!(shows(&daemon, &gone), content, "{how:?}: {gone}");
            daemon.delete(&gone);
            end(&mut daemon, how);
            for (reference, content) in &expected {
                assert_eq!(shows(&daemon, reference), *content, "{how:?}: {reference} without {gone}");
            }
        }
        assert_eq!(shows(&daemon, "vm0"), vec![99; ALL.end]);
        daemon.assert_only_disks_left();
    }
}

#[test]
fn a_switch_counts_for_the_snapshots_that_come() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    daemon.snap("old");
    daemon.client("vm0").write(0..10, 2);
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk("vm0", "durability=power");
    daemon.start();
    let before = shows(&daemon, "vm0");
    daemon.snap("new");
    daemon.client("vm0").write(0..20, 3);
    assert_eq!(durabilities(&daemon), ["process", "power"]);
    assert_eq!((shows(&daemon, "vm0@old"), shows(&daemon, "vm0@new")), (vec![1; ALL.end], before.clone()));
    end(&mut daemon, End::PowerCut);
    daemon.assert_broken("vm0@old", "durability=power");
    assert_eq!(shows(&daemon, "vm0@new"), before);
    assert_eq!(shows(&daemon, "vm0")[..21], [vec![3; 20], vec![1]].concat());
}

/// What reads through a snapshot that a power cut takes does not outlive it either, and does not say so.
#[test]
fn a_switch_back_is_seen_in_what_reads_through_the_new_ones() {
    let mut daemon = power();
    daemon.client("vm0").write(ALL, 1);
    daemon.snap("old");
    daemon.client("vm0").write(0..10, 2);
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk("vm0", "durability=process");
    daemon.start();
    assert_eq!(durabilities(&daemon), ["power"]);
    daemon.snap("new");
    daemon.client("vm0").write(20..30, 3);
    assert_eq!(durabilities(&daemon), ["process", "process"]);
    daemon.delete("vm0@new");
    assert_eq!(durabilities(&daemon), ["power"]);
    end(&mut daemon, End::PowerCut);
    assert_eq!(shows(&daemon, "vm0@old"), vec![1; ALL.end]);
}

/// One that was not quiesced when the power went is not whole, and those that read through it are.
#[test]
fn what_drained_at_a_power_cut_is_broken() {
    let mut daemon = power();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.snap("old");
    client.write(0..100, 2);
    daemon.api().create("drains", &["vm0"], &json!({ "writers": "connection" })).ok();
    client.write(50..150, 3);
    assert_eq!(daemon.state("vm0@drains"), "draining");
    let live = tags(&client.read_all());
    daemon.kill();
    drop(client);
    daemon.boot_again();
    daemon.start();
    daemon.assert_broken("vm0@drains", "the host went down");
    assert_eq!(shows(&daemon, "vm0@old"), vec![1; ALL.end]);
    assert_eq!(shows(&daemon, "vm0"), live);
    daemon.delete("vm0@drains");
    assert_eq!(shows(&daemon, "vm0@old"), vec![1; ALL.end]);
}

/// A snapshot that cannot be kept is given up durably before the guest's write goes on; those that read through it stay.
fn given_up(small: impl FnOnce(&Path) -> Mount, how: End) {
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "durability=power");
    let _small = small(&daemon.path("small"));
    daemon.start();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.snap("old");
    client.write(0..100, 2);
    let image = daemon.path("small/b.img");
    daemon.api().create("b", &["vm0"], &json!({ "image": image, "wait": true })).ok();
    let events = daemon.events();
    for at in (0..2000).step_by(100) {
        client.write(at..at + 100, 3);
    }
    let live = tags(&client.read_all());
    events.wait_for("SNAPSHOT_BROKEN", "vm0@b");
    let tables = names_in(&daemon.state_dir().join("tables"));
    assert!(tables.iter().any(|name| name.ends_with(".lost")), "{tables:?}");
    let id = daemon.show("vm0@b")["id"].as_str().unwrap().to_owned();
    let mark = daemon.run_dir().join("tables").join(format!("{id}.broken"));
    assert!(std::fs::read_to_string(mark).unwrap().contains("No space"));
    assert_eq!(shows(&daemon, "vm0@old"), vec![1; ALL.end]);
    drop(client);
    for _ in 0..2 {
        end(&mut daemon, how);
        assert_eq!(shows(&daemon, "vm0"), live, "{how:?}");
        assert_eq!(daemon.state("vm0@b"), "broken", "{how:?}");
        assert_eq!(shows(&daemon, "vm0@old"), vec![1; ALL.end], "{how:?}");
    }
    daemon.client("vm0").write(ALL, 4);
    daemon.delete("vm0@b");
    end(&mut daemon, how);
    assert_eq!(shows(&daemon, "vm0@old"), vec![1; ALL.end], "{how:?}");
    daemon.delete("vm0@old");
    daemon.assert_only_disks_left();
}

/// A version whose image is a full one has no table that could say that it broke just before a kill.
#[test]
fn the_mark_of_a_broken_version_is_believed_after_a_kill() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    let options = json!({ "strategy": "write-logging", "wait": true });
    daemon.api().create("a", &["vm0"], &options).ok();
    let id = daemon.show("vm0@a")["id"].as_str().unwrap().to_owned();
    daemon.kill();
    std::fs::write(daemon.run_dir().join("tables").join(format!("{id}.broken")), "a write did not arrive").unwrap();
    daemon.start();
    daemon.assert_broken("vm0@a", "a write did not arrive");
    assert_eq!(shows(&daemon, "vm0"), vec![1; ALL.end]);
    daemon.delete("vm0@a");
    daemon.restart();
    daemon.assert_only_disks_left();
}

#[test]
fn a_snapshot_that_cannot_be_kept_is_given_up_and_nothing_else_is() {
    if can_mount("a_snapshot_that_cannot_be_kept_is_given_up_and_nothing_else_is") {
        for how in [End::Stop, End::Kill, End::Cleared, End::PowerCut] {
            given_up(|path| Mount::tmpfs(path, "256k"), how);
        }
    }
}

/// What a deletion handed to a snapshot that broke afterwards is read by older ones for good.
#[test]
fn what_was_handed_to_a_snapshot_that_broke_outlives_a_kill_and_a_power_cut() {
    if !can_mount("what_was_handed_to_a_snapshot_that_broke_outlives_a_kill_and_a_power_cut") {
        return;
    }
    for how in [End::Kill, End::Stop] {
        let mut daemon = Daemon::place();
        daemon.make_image("vm0", SIZE);
        daemon.arg_disk("vm0", "durability=power");
        let _small = Mount::tmpfs(&daemon.path("small"), "256k");
        daemon.start();
        let mut client = daemon.client("vm0");
        client.write(ALL, 1);
        daemon.snap("old");
        let image = daemon.path("small/b.img");
        daemon.api().create("b", &["vm0"], &json!({ "image": image, "wait": true })).ok();
        daemon.snap("goes");
        client.write(0..2000, 2);
        let live = tags(&client.read_all());
        drop(client);
        let events = daemon.events();
        let api = daemon.api();
        let deletion = std::thread::spawn(move || api.send("DELETE", "/v1/snapshots/vm0@goes", "").status);
        events.wait_for("SNAPSHOT_BROKEN", "vm0@b");
        end(&mut daemon, how);
        assert!(matches!(deletion.join(), Ok(..) | Err(..)));
        daemon.api().wait_gone("vm0@goes");
        assert_eq!(shows(&daemon, "vm0@old"), vec![1; ALL.end], "{how:?}");
        end(&mut daemon, End::PowerCut);
        assert_eq!(shows(&daemon, "vm0"), live, "{how:?}");
        assert_eq!(daemon.state("vm0@b"), "broken", "{how:?}");
        assert_eq!(shows(&daemon, "vm0@old"), vec![1; ALL.end], "{how:?}");
    }
}

/// What drains changes the entries of newer ones in memory only.
#[test]
fn what_drained_without_its_run_table_is_broken() {
    let mut daemon = Daemon::with_disks(&[SIZE], "durability=power,shared=on");
    let mut first = daemon.client("vm0");
    first.write(ALL, 1);
    let pinned = json!({ "writers": "connection" });
    daemon.api().create("a", &["vm0"], &pinned).ok();
    let mut second = daemon.client("vm0");
    daemon.api().create("b", &["vm0"], &pinned).ok();
    let mut third = daemon.client("vm0");
    third.write(0..64, 3);
    // Of whole blocks: what is saved for b is not needed any more.
    first.write(0..64, 2);
    assert_eq!(tags(&second.read_all())[0..65], [vec![2; 64], vec![1]].concat());
    assert_eq!([daemon.state("vm0@a"), daemon.state("vm0@b")], ["draining", "draining"]);
    daemon.kill();
    drop((first, second, third));
    daemon.lose_run_tables();
    let told: Value = serde_json::from_slice(&daemon.check(&["--json"]).stdout).unwrap();
    daemon.start();
    for (i, name) in ["a", "b"].into_iter().enumerate() {
        daemon.assert_broken(&format!("vm0@{name}"), "");
        assert_eq!(told["disks"][0]["snapshots"][i]["verdict"], "broken", "{told}");
    }
}

/// The last step of a fold is to forget the log. A snapshot that comes just before leaves the log's tables alone.
#[test]
fn a_snapshot_just_before_a_log_is_forgotten_leaves_its_tables() {
    if !can_mount("a_snapshot_just_before_a_log_is_forgotten_leaves_its_tables") {
        return;
    }
    let mut daemon = Daemon::place();
    for disk in ["vm0", "vm1"] {
        daemon.make_image(disk, SIZE);
        daemon.arg_disk(disk, "durability=power");
    }
    let _slow = Mount::ext4(&daemon.path("slow"), 8 << 20);
    daemon.start();
    daemon.client("vm0").write(ALL, 1);
    daemon.api().create("a", &["vm0"], &json!({ "strategy": "write-logging", "wait": true })).ok();
    daemon.client("vm0").write(0..800, 2);
    let (api, events) = (daemon.api(), daemon.events());
    let deletion = std::thread::spawn(move || api.delete("vm0@a"));
    events.wait_for("JOB_STARTED", "vm0");
    let job = format!("/v1/jobs/{}", daemon.get("/v1/jobs").json()[0]["id"]);
    daemon.send("PATCH", &job, r#"{"delay_ms":3600000}"#).ok();
    // A change of another disk that takes long, then the snapshot, then the end of the fold: one after the other.
    let standstill = Standstill::begin(&daemon.path("slow"));
    let (api, image) = (daemon.api(), daemon.path("slow/other.img"));
    let long = std::thread::spawn(move || api.create("other", &["vm1"], &json!({ "image": image })).status);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let api = daemon.api();
    let between = std::thread::spawn(move || api.create("b", &["vm0"], &json!({ "wait": true })));
    std::thread::sleep(std::time::Duration::from_millis(300));
    daemon.send("PATCH", &job, r#"{"delay_ms":0}"#).ok();
    std::thread::sleep(std::time::Duration::from_millis(500));
    drop(standstill);
    assert_eq!(long.join().unwrap(), 201);
    between.join().unwrap().ok();
    deletion.join().unwrap();
    let mut client = daemon.client("vm0");
    client.write(ALL, 3);
    client.flush();
    drop(client);
    for how in [End::Kill, End::PowerCut] {
        end(&mut daemon, how);
        assert_eq!(shows(&daemon, "vm0"), vec![3; ALL.end]);
        assert_eq!(shows(&daemon, "vm0@b"), [vec![2; 800], vec![1; ALL.end - 800]].concat());
    }
    daemon.delete("vm0@b");
    daemon.delete("vm1@other");
    daemon.restart();
    daemon.assert_only_disks_left();
}
