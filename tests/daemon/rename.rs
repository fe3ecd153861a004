//! Another name for disks and volumes: all that belongs to them goes on, under any strategy, with jobs and guests at work,
//! through kills; and the old name is free.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges that happen to have one")]

use serde_json::{Value, json};

use crate::asking::{follow_advice, lift_paces};
use crate::changes::{diff, keep_bookmark};
use crate::client::{Client, tags};
use crate::harness::{Answer, Daemon, names_in, wait_until};
use crate::independent::{begin, job, post, wait_independent};
use crate::restore::{self, HOURS};
use crate::strategies::{ALL, End, SIZE, end_and_start, shows};
use crate::volumes::{delete, expect, made, show};

fn ask(daemon: &Daemon, what: &str, to: &str, force: bool) -> Answer {
    daemon.send("POST", &format!("/v1/{what}/rename"), &json!({ "name": to, "force": force }).to_string())
}

/// Gives a disk another name, as soon as the last frontend is forgotten.
#[track_caller]
fn rename(daemon: &Daemon, from: &str, to: &str) {
    let before = daemon.show_disk(from);
    wait_until("the last frontend to be forgotten", || daemon.show_disk(from)["frontends"] == 0);
    let answer = ask(daemon, &format!("disks/{from}"), to, false);
    assert_eq!(answer.status, 200, "{}", answer.body);
    let after = answer.json();
    assert_eq!((&after["name"], &after["id"]), (&json!(to), &before["id"]));
    assert_eq!(after, daemon.show_disk(to));
    assert_eq!(daemon.get(&format!("/v1/disks/{from}")).status, 404);
}

/// A disk full of 1 with a snapshot `daily`, and 2 in its second half since; its configuration is in the records only.
fn disk(strategy: &str) -> Daemon {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.forget_args();
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.api().create("daily", &["vm0"], &json!({ "strategy": strategy, "wait": true })).ok();
    client.write(1024..2048, 2);
    client.flush();
    drop(client);
    wait_until("the frontend to be gone", || daemon.show_disk("vm0")["frontends"] == 0);
    daemon
}

/// What `check` finds wrong.
#[track_caller]
fn assert_check_is_clean(told: &Value, disks: &[&str]) {
    let names: Vec<_> = told["disks"].as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert_eq!(names, disks, "{told}");
    let snapshots = |disk: &Value| disk["snapshots"].as_array().unwrap().clone();
    for snapshot in told["disks"].as_array().unwrap().iter().flat_map(snapshots) {
        assert_eq!(snapshot["verdict"], "kept", "{told}");
    }
}

/// Snapshots, new and old, the live content and the diffs between them, through every end of the daemon; and nothing is
/// left of either name in the end.
#[test]
fn what_belongs_to_a_disk_goes_by_its_id() {
    for strategy in ["copy-on-write", "write-logging"] {
        for how in [End::Stop, End::Kill] {
            let mut daemon = disk(strategy);
            let events = daemon.events();
            let (live, frozen) = (shows(&daemon, "vm0"), shows(&daemon, "vm0@daily"));
            wait_until("the reader to be gone", || {
                ask(&daemon, "disks/vm0", "vm0", false).status == 200 && daemon.show("vm0@daily")["state"] == "quiesced"
            });
            let id = daemon.show("vm0@daily")["id"].clone();
            wait_until("nobody to be connected", || {
                let answer = ask(&daemon, "disks/vm0", "web", false);
                assert!(answer.status == 200 || answer.refused() == "disk-busy", "{}", answer.body);
                answer.status == 200
            });
            assert_eq!(events.wait_for("DISK_RENAMED", "web")["reason"], "vm0");
            let check = |daemon: &Daemon| {
                assert_eq!(daemon.show("web@daily")["id"], id);
                assert_eq!(daemon.get("/v1/snapshots/vm0@daily").status, 404);
                assert_eq!(shows(daemon, "web@daily"), frozen, "{strategy} {how:?}");
                assert_eq!(shows(daemon, "web"), live, "{strategy} {how:?}");
                assert!(!daemon.socket("vm0").exists() && !daemon.socket("vm0@daily").exists());
                assert_eq!(diff(daemon, "/v1/snapshots/web@daily/diff"), [1024..2048]);
            };
            check(&daemon);
            assert_check_is_clean(&end_and_start(&mut daemon, how), &["web"]);
            check(&daemon);
            daemon.client("web").write(0..8, 3);
            assert_eq!(shows(&daemon, "web@daily"), frozen);
            daemon.snapshot("later", &["web"]);
            daemon.client("web").write(8..16, 4);
            assert_eq!(diff(&daemon, "/v1/snapshots/web@later/diff"), [8..16]);
            daemon.delete("web@daily");
            assert_check_is_clean(&end_and_start(&mut daemon, how), &["web"]);
            daemon.delete("web@later");
            daemon.assert_only_disks_left();
        }
    }
}

/// A disk of the old name is another one, with a snapshot of the same name beside that of the renamed one; each goes
/// without the other.
#[test]
fn the_old_name_is_free() {
    for first in ["vm0", "web"] {
        let mut daemon = disk("copy-on-write");
        rename(&daemon, "vm0", "web");
        assert_eq!(ask(&daemon, "disks/web", "web", false).status, 200, "its own name is no other's");
        daemon.make_image("other", SIZE);
        daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": daemon.image("other") }).to_string()).ok();
        assert_eq!(ask(&daemon, "disks/web", "vm0", false).refused(), "disk-exists");
        let mut client = daemon.client("vm0");
        client.write(ALL, 5);
        daemon.snapshot("daily", &["vm0"]);
        client.write(0..64, 6);
        drop(client);
        let images = names_in(&daemon.state_dir().join("images"));
        assert_eq!(images.len(), 2, "{images:?}");
        let check = |daemon: &Daemon, what: &[&str]| {
            for name in what {
                let wanted = if *name == "web" { 1 } else { 5 };
                assert_eq!(shows(daemon, &format!("{name}@daily")), vec![wanted; ALL.end], "{name}, {first} first");
            }
        };
        check(&daemon, &["vm0", "web"]);
        assert_check_is_clean(&end_and_start(&mut daemon, End::Kill), &["vm0", "web"]);
        check(&daemon, &["vm0", "web"]);
        daemon.delete(&format!("{first}@daily"));
        assert_check_is_clean(&end_and_start(&mut daemon, End::Kill), &["vm0", "web"]);
        let second = if first == "vm0" { "web" } else { "vm0" };
        check(&daemon, &[second]);
        daemon.delete(&format!("{second}@daily"));
        daemon.assert_only_disks_left();
    }
}

/// Guests stay connected where they are, but the rename has to be forced; a socket that the user named stays where it is,
/// and minds nobody.
#[test]
fn sockets_that_are_called_after_a_disk_move_with_its_name() {
    let mut daemon = disk("copy-on-write");
    let mut guest = daemon.client("vm0");
    let mut reader = daemon.reader("vm0@daily");
    for (what, gone) in [("vm0 ", false), ("vm0@daily", true)] {
        let refused = ask(&daemon, "disks/vm0", "web", false);
        assert_eq!(refused.refused(), "disk-busy", "{}", refused.body);
        assert!(
            refused.body.contains(what) && refused.body.contains("disk rename vm0 web --force"),
            "{}",
            refused.body
        );
        if gone {
            break;
        }
        drop(guest);
        wait_until("the guest to be gone", || daemon.show_disk("vm0")["frontends"] == 0);
        guest = daemon.client("vm0");
    }
    let serial = daemon.show_disk("vm0")["serial"].clone();
    ask(&daemon, "disks/vm0", "web", true).ok();
    guest.write(0..8, 7);
    assert_eq!(guest.tag(3), 7, "it is connected all the time");
    assert_eq!(tags(&reader.read_all()), vec![1; ALL.end]);
    assert!(daemon.socket("web").exists() && daemon.socket("web@daily").exists());
    assert!(!daemon.socket("vm0").exists() && !daemon.socket("vm0@daily").exists());
    assert_eq!(daemon.show_disk("web")["frontends"], 1);
    drop((guest, reader));
    let events = daemon.events();
    assert_eq!(shows(&daemon, "web")[3], 7);
    events.wait_for("FRONTEND_CONNECTED", "web");
    assert_eq!(daemon.show_disk("web")["serial"], serial, "guests know it by that");
    daemon.delete("web@daily");

    // Named by the user.
    daemon.stop();
    let (own, of_snapshot) = (daemon.path("own.sock"), daemon.path("snap.sock"));
    daemon.make_image("vm1", SIZE);
    daemon.arg_disk("vm1", &format!("socket={}", own.display()));
    daemon.start();
    daemon.forget_args();
    daemon.api().create("s", &["vm1"], &json!({ "socket": of_snapshot, "wait": true })).ok();
    let mut guest = Client::connect(&own, 1, false).unwrap();
    let mut reader = Client::connect(&of_snapshot, 1, true).unwrap();
    ask(&daemon, "disks/vm1", "db", false).ok();
    guest.write(0..8, 8);
    assert_eq!(reader.tag(0), 0);
    for _ in 0..2 {
        assert_eq!(daemon.show_disk("db")["socket"], json!(own));
        assert_eq!(daemon.show("db@s")["socket"], json!(of_snapshot));
        daemon.restart();
    }
}

/// What something has is nobody else's new name, and where something is no socket goes; nothing has changed then.
#[test]
fn a_name_or_a_place_that_is_taken_is_refused() {
    let daemon = disk("copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    assert_eq!(ask(&daemon, "disks/vm0", "clone", false).refused(), "volume-exists");
    assert_eq!(ask(&daemon, "volumes/clone", "vm0", false).refused(), "disk-exists");
    assert_eq!(ask(&daemon, "disks/clone", "x", false).refused(), "disk-not-found");
    assert_eq!(ask(&daemon, "volumes/vm0", "x", false).refused(), "volume-not-found");
    assert_eq!(ask(&daemon, "disks/none", "x", false).refused(), "disk-not-found");
    for place in ["web", "web@daily"] {
        std::fs::write(daemon.socket(place), "in the way").unwrap();
        let refused = ask(&daemon, "disks/vm0", "web", false);
        assert_eq!(refused.refused(), "conflict", "{}", refused.body);
        assert!(refused.body.contains(&format!("{place}.sock")), "{}", refused.body);
        std::fs::remove_file(daemon.socket(place)).unwrap();
    }
    assert_eq!(shows(&daemon, "vm0@daily"), vec![1; ALL.end]);
    assert_eq!(shows(&daemon, "vm0")[2000], 2);
    wait_until("the readers to be gone", || ask(&daemon, "disks/vm0", "web", false).status == 200);
    assert_eq!(show(&daemon, "clone")["from"], "web@daily");
}

/// A volume stands on the same snapshot whatever its disk is called, and is called something else itself; it is updated to
/// its own source's present, not to that of a disk that has the old name.
#[test]
fn volumes_stand_on_what_they_stood_on() {
    let mut daemon = disk("copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    daemon.client("clone").write(0..8, 7);
    rename(&daemon, "vm0", "web");
    wait_until("the frontend to be gone", || show(&daemon, "clone")["frontends"] == 0);
    let renamed = ask(&daemon, "volumes/clone", "copy", false);
    assert_eq!(renamed.status, 200, "{}", renamed.body);
    daemon.make_image("other", SIZE);
    daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": daemon.image("other") }).to_string()).ok();
    let check = |daemon: &Daemon| {
        let volume = show(daemon, "copy");
        assert_eq!((&volume["from"], &volume["state"]), (&json!("web@daily"), &json!("serving")));
        assert_eq!(daemon.get("/v1/volumes/copy/status").json()["source"], "web");
        assert_eq!(shows(daemon, "copy"), expect(&[(0..8, 7)]));
        let refused = daemon.send("DELETE", "/v1/snapshots/web@daily", "");
        assert!(refused.refused() == "snapshot-busy" && refused.body.contains("copy"), "{}", refused.body);
    };
    check(&daemon);
    assert_check_is_clean(&end_and_start(&mut daemon, End::Kill), &["copy", "vm0", "web"]);
    check(&daemon);
    let live = shows(&daemon, "web");
    wait_until("nobody to be connected", || post(&daemon, "copy/update").status == 202);
    assert_eq!(shows(&daemon, "copy"), live);
    assert!(show(&daemon, "copy")["from"].as_str().unwrap().starts_with("web@"));
    delete(&daemon, "copy");
    daemon.delete("web@daily");
    daemon.send("DELETE", "/v1/disks/vm0", "").ok();
    wait_until("what was taken for the update to go", || daemon.snapshots().is_empty());
    daemon.assert_only_disks_left();
}

/// A job that runs goes on under the new name, with its number, and ends.
#[test]
fn jobs_go_on() {
    let mut daemon = disk("copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    let id = begin(&daemon, "clone", "delay_ms=3600000")["id"].as_u64().unwrap();
    ask(&daemon, "volumes/clone", "copy", false).ok();
    let now = job(&daemon, id);
    assert_eq!((&now["disk"], &now["state"]), (&json!("copy"), &json!("running")));
    rename(&daemon, "vm0", "web");
    daemon.send("DELETE", &format!("/v1/jobs/{id}"), "").ok();
    daemon.send("POST", &format!("/v1/jobs/{id}/resume"), "").ok();
    assert_check_is_clean(&end_and_start(&mut daemon, End::Kill), &["copy", "web"]);
    lift_paces(&daemon);
    let volume = wait_independent(&daemon, "copy");
    assert_eq!(volume["from"], "web@daily");
    assert_eq!(shows(&daemon, "copy"), expect(&[]));
    wait_until("the reader to be gone", || ask(&daemon, "volumes/copy", "own", false).status == 200);
    post(&daemon, "own/promote").ok();
    assert_eq!(shows(&daemon, "own"), expect(&[]));

    // One that deletes a snapshot.
    daemon.client("web").write(0..512, 8);
    daemon.snapshot("old", &["web"]);
    daemon.client("web").write(512..1024, 9);
    let deletion = crate::asking::slowed(&daemon, "merge", ("DELETE", "/v1/snapshots/web@daily", ""), false);
    rename(&daemon, "web", "main");
    let now = job(&daemon, deletion);
    assert_eq!((&now["disk"], &now["snapshot"]), (&json!("main"), &json!("daily")));
    lift_paces(&daemon);
    daemon.api().wait_gone("main@daily");
    daemon.delete("main@old");
    assert_eq!(daemon.send("DELETE", "/v1/disks/own?force=true", "").status, 204);
}

/// A restore goes on, from what it goes back to, whatever either is called.
#[test]
fn restores_go_on() {
    let mut daemon = disk("copy-on-write");
    restore::begin(&daemon, "vm0@daily", HOURS);
    rename(&daemon, "vm0", "web");
    let check = |daemon: &Daemon| {
        assert_eq!(daemon.show_disk("web")["restoring"]["from"], "web@daily");
        assert_eq!(restore::the_job(daemon)["disk"], "web");
        assert_eq!(shows(daemon, "web"), vec![1; ALL.end]);
    };
    check(&daemon);
    assert_check_is_clean(&end_and_start(&mut daemon, End::Kill), &["web"]);
    check(&daemon);
    lift_paces(&daemon);
    wait_until("the restore to be over", || daemon.show_disk("web")["restoring"].is_null());
    assert_eq!(shows(&daemon, "web"), vec![1; ALL.end]);
    follow_advice(&daemon, &|| daemon.send("DELETE", "/v1/snapshots/web@daily", ""));
    daemon.api().wait_gone("web@daily");
    daemon.assert_only_disks_left();
}

/// Bookmarks tell what has changed since, across names.
#[test]
fn bookmarks_tell_what_changed_since() {
    let mut daemon = disk("copy-on-write");
    keep_bookmark(&daemon, "vm0@daily");
    rename(&daemon, "vm0", "web");
    daemon.client("web").write(8..16, 3);
    let wanted = [8..16, 1024..2048];
    assert_eq!(diff(&daemon, "/v1/snapshots/web@daily/diff"), wanted);
    assert_eq!(daemon.get("/v1/bookmarks/vm0@daily").status, 404);
    assert_check_is_clean(&end_and_start(&mut daemon, End::Stop), &["web"]);
    assert_eq!(daemon.get("/v1/bookmarks/web@daily").json()["disk"], "web");
    assert_eq!(diff(&daemon, "/v1/snapshots/web@daily/diff"), wanted);
}

/// The legs of a mirror stay equal, and what is told of them has the new name.
#[test]
fn mirrors_go_on() {
    let (mut daemon, leg) = crate::mirror::mirrored();
    daemon.forget_args();
    rename(&daemon, "vm0", "web");
    let mut client = daemon.client("web");
    client.write(0..64, 4);
    client.flush();
    drop(client);
    assert_check_is_clean(&end_and_start(&mut daemon, End::Kill), &["web"]);
    wait_until("both legs to be in sync", || {
        let disk = daemon.show_disk("web");
        disk["legs"].as_array().unwrap().iter().all(|leg| leg["state"] == "in-sync")
    });
    daemon.api().create("s", &["web"], &json!({ "strategy": "write-mirroring", "wait": true })).ok();
    let events = daemon.events();
    daemon.delete("web@s");
    events.wait_for("LEG_IN_SYNC", "web");
    wait_until("nobody to be connected", || ask(&daemon, "disks/web", "vm0", false).status == 200);
    crate::mirror::in_sync(&daemon);
    daemon.stop();
    assert_eq!(crate::mirror::raw(&daemon.image("vm0")), crate::mirror::raw(&leg));
}

/// A configuration that still has the old name serves no second disk with the same image.
#[test]
fn the_old_name_in_the_configuration_serves_nothing() {
    let mut daemon = disk("copy-on-write");
    rename(&daemon, "vm0", "web");
    daemon.stop();
    daemon.arg_disk("vm0", "");
    daemon.start();
    assert_eq!(daemon.show_disk("web")["state"], "serving");
    let old = daemon.show_disk("vm0");
    assert_eq!(old["state"], "unserved");
    assert!(old["reason"].as_str().unwrap().contains("disk web"), "{old}");
    assert_eq!(shows(&daemon, "web@daily"), vec![1; ALL.end]);
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk_at("web", &daemon.image("vm0"), "");
    daemon.start();
    assert_eq!(daemon.show_disk("web")["serial"], "vm0", "guests know it by that");
    daemon.delete("web@daily");
    daemon.assert_only_disks_left();
}

/// A daemon that dies at any step of a rename comes back with the old name or the new one, and with all under it.
#[cfg(feature = "planted")]
#[test]
fn planted_death_while_a_disk_is_renamed() {
    const POINTS: [&str; 5] = [
        "before the sockets of a disk are moved",
        "after the sockets of a disk were moved",
        "before records are committed",
        "after records were committed",
        "after a disk was renamed",
    ];
    let mut names = std::collections::BTreeSet::new();
    for point in POINTS {
        for count in 1.. {
            let mut daemon = disk("copy-on-write");
            daemon.stop();
            daemon.crash_at = Some(format!("{count}:{point}"));
            daemon.spawn();
            let mut died = false;
            while !died && !daemon.is_up() {
                died = daemon.has_died_by(libc::SIGKILL);
            }
            let is_done = !died && ask(&daemon, "disks/vm0", "web", false).status == 200;
            if is_done {
                daemon.kill();
            } else if !died {
                wait_until("its death", || daemon.has_died_by(libc::SIGKILL));
            }
            daemon.crash_at = None;
            let told: Value = serde_json::from_slice(&daemon.check(&["--json"]).stdout).unwrap();
            daemon.start();
            let name = daemon.get("/v1/disks").json()[0]["name"].as_str().unwrap().to_owned();
            assert_check_is_clean(&told, &[&name]);
            assert_eq!(shows(&daemon, &format!("{name}@daily")), vec![1; ALL.end], "{count}:{point}");
            assert_eq!(shows(&daemon, &name)[2000], 2, "{count}:{point}");
            names.insert((died, name.clone()));
            daemon.delete(&format!("{name}@daily"));
            daemon.assert_only_disks_left();
            if is_done {
                break;
            }
        }
    }
    assert!(names.iter().any(|(_, name)| name == "vm0") && names.iter().any(|(_, name)| name == "web"), "{names:?}");
}
