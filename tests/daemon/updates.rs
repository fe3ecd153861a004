//! Volumes that are brought to their source's present: under load, through stops, kills and power cuts, and after they broke.

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, names_in, wait_until};
use crate::independent::{assert_raw, begin, image_of, job, post, remove_source, wait_independent};
use crate::strategies::{ALL, End, SIZE, end_and_start, shows};
use crate::volumes::{create, daemon_with_snapshot, delete, expect, made, show};

const BLOCK: u64 = 4096;

/// Begins to update a volume; the answer is the job.
#[track_caller]
fn update(daemon: &Daemon, name: &str, query: &str) -> Value {
    let answer = post(daemon, &format!("{name}/update?{query}"));
    assert_eq!(answer.status, 202, "{}", answer.body);
    assert_eq!(answer.json()["kind"], "update");
    answer.json()
}

fn names(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

/// What was taken for updates and is not needed goes by itself.
fn wait_moments(daemon: &Daemon, snapshots: &[&str], bookmarks: &[&str]) {
    let now = || (names(&daemon.get("/v1/snapshots").json()), names(&daemon.get("/v1/bookmarks").json()));
    let wanted = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    wait_until("what was taken for updates", || now() == (wanted(snapshots), wanted(bookmarks)));
}

/// An independent volume of `daily`, which is full of 1.
fn completed(options: &str, strategy: &str) -> Daemon {
    let daemon = daemon_with_snapshot(options, strategy);
    made(&daemon, "clone", "vm0@daily");
    begin(&daemon, "clone", "");
    wait_independent(&daemon, "clone");
    daemon
}

fn write(daemon: &Daemon, what: &str, sectors: std::ops::Range<usize>, tag: u64) {
    let mut guest = daemon.client(what);
    guest.write(sectors, tag);
    guest.flush();
}

#[test]
fn a_volume_is_updated_by_what_differs() {
    for strategy in ["copy-on-write", "write-logging"] {
        let daemon = completed("", strategy);
        let events = daemon.events();
        let before = show(&daemon, "clone");
        // 7 blocks here, 2 there, and 128 since the snapshot.
        write(&daemon, "clone", 3..50, 7);
        write(&daemon, "vm0", 100..108, 9);
        let expected = shows(&daemon, "vm0");
        wait_until("the guests to leave", || show(&daemon, "clone")["connected"] == false);
        let begun = update(&daemon, "clone", "bytes_per_second=200000");
        events.wait_for("VOLUME_UPDATED", "clone");
        assert_eq!(begun["total_bytes"], (7 + 2 + 128) * BLOCK, "{begun}");
        assert_eq!(shows(&daemon, "clone"), expected, "{strategy}: at once");
        let now = show(&daemon, "clone");
        assert_eq!((&now["independent"], &now["from"]), (&json!(false), &json!("vm0@clone-update-1")));
        assert_eq!((&now["id"], &now["image"], &now["socket"]), (&before["id"], &before["image"], &before["socket"]));
        assert!(now["owned_bytes"].as_u64().unwrap() >= SIZE - (7 + 2 + 128) * BLOCK, "{now}");
        // Both are written on.
        write(&daemon, "vm0", 0..200, 10);
        write(&daemon, "clone", 1020..1030, 11);
        let mut expected = expected;
        expected[1020..1030].fill(11);
        let id = begun["id"].as_u64().unwrap();
        daemon.send("PATCH", &format!("/v1/jobs/{id}"), r#"{"bytes_per_second":0}"#).ok();
        let volume = wait_independent(&daemon, "clone");
        let done = job(&daemon, id);
        assert_eq!(done["done_bytes"], (7 + 2 + 128) * BLOCK, "{strategy}: {done}");
        assert_raw(&image_of(&volume), &expected, strategy);
        wait_moments(&daemon, &["daily"], &["clone-update-1"]);
        // From there the next one counts: 2 blocks here, 25 there.
        wait_until("the guests to leave", || show(&daemon, "clone")["connected"] == false);
        let begun = update(&daemon, "clone", "");
        let expected = shows(&daemon, "vm0");
        let volume = wait_independent(&daemon, "clone");
        let done = job(&daemon, begun["id"].as_u64().unwrap());
        assert_eq!(done["done_bytes"], (2 + 25) * BLOCK, "{strategy}: {done}");
        assert_eq!(shows(&daemon, "clone"), expected);
        assert_raw(&image_of(&volume), &expected, strategy);
        wait_moments(&daemon, &["daily"], &["clone-update-2"]);
        assert_eq!(names_in(&daemon.state_dir().join("images")).len(), 2, "the volume's, and the disk's");
        delete(&daemon, "clone");
        wait_moments(&daemon, &["daily"], &[]);
        daemon.delete("vm0@daily");
        daemon.assert_only_disks_left();
    }
}

/// Whatever ends the daemon, the volume shows the point in time that it was brought to, and gets it whole.
#[test]
fn an_update_goes_on_after_any_end() {
    for how in [End::Stop, End::Kill, End::PowerCut] {
        let mut daemon = completed("", "write-logging");
        write(&daemon, "clone", 0..64, 3);
        let mut expected = shows(&daemon, "vm0");
        wait_until("the guests to leave", || show(&daemon, "clone")["connected"] == false);
        update(&daemon, "clone", "bytes_per_second=100000&delay_ms=20");
        write(&daemon, "vm0", ALL, 5);
        let of_update = |daemon: &Daemon| {
            let jobs = daemon.get("/v1/jobs").json();
            jobs.as_array().unwrap().iter().rfind(|job| job["kind"] == "update").cloned().unwrap()
        };
        for round in 0..2 {
            wait_until("some blocks", || of_update(&daemon)["done_bytes"].as_u64().unwrap() > 20_000);
            let from = 1100 + 100 * round;
            write(&daemon, "clone", from..from + 10, 60);
            expected[from..from + 10].fill(60);
            let told = end_and_start(&mut daemon, how);
            assert_eq!(told["ok"], true, "{how:?}: {told}");
            let now = of_update(&daemon);
            assert_eq!((&now["state"], &now["delay_ms"]), (&json!("running"), &json!(20)), "{how:?}");
            assert_eq!(shows(&daemon, "clone"), expected, "{how:?} {round}");
            assert_eq!(show(&daemon, "clone")["independent"], false);
        }
        // Stopped half way it is a volume like any other; and it is updated again.
        let id = of_update(&daemon)["id"].as_u64().unwrap();
        assert_eq!(daemon.send("DELETE", &format!("/v1/jobs/{id}"), "").json()["state"], "stopped");
        assert_eq!(shows(&daemon, "clone"), expected);
        wait_until("the guests to leave", || show(&daemon, "clone")["connected"] == false);
        update(&daemon, "clone", "delay_ms=0&bytes_per_second=0");
        let volume = wait_independent(&daemon, "clone");
        assert_eq!(shows(&daemon, "clone"), vec![5; ALL.end], "{how:?}");
        assert_raw(&image_of(&volume), &vec![5; ALL.end], "updated twice");
        wait_moments(&daemon, &["daily"], &["clone-update-2"]);
        for _ in 0..2 {
            end_and_start(&mut daemon, how);
            assert_eq!(shows(&daemon, "clone"), vec![5; ALL.end], "{how:?}");
        }
        wait_until("the guests to leave", || show(&daemon, "clone")["connected"] == false);
        // What changed is not known after a power cut: then all is copied.
        write(&daemon, "vm0", 8..16, 6);
        let begun = update(&daemon, "clone", "");
        wait_independent(&daemon, "clone");
        let done = job(&daemon, begun["id"].as_u64().unwrap())["done_bytes"].as_u64().unwrap();
        assert_eq!(done, if how == End::PowerCut { SIZE } else { BLOCK }, "{how:?}");
        let mut expected = vec![5; ALL.end];
        expected[8..16].fill(6);
        assert_raw(&image_of(&show(&daemon, "clone")), &expected, "the third time");
    }
}

/// What a volume stands on is lost by a power cut; nothing of it is needed to begin anew.
#[test]
fn a_broken_volume_is_updated() {
    for is_written in [false, true] {
        let mut daemon = daemon_with_snapshot("", "copy-on-write");
        made(&daemon, "clone", "vm0@daily");
        if is_written {
            write(&daemon, "clone", 0..ALL.end / 2, 7);
        }
        end_and_start(&mut daemon, End::PowerCut);
        assert_eq!(show(&daemon, "clone")["state"], "broken");
        assert_eq!(post(&daemon, "clone/complete").refused(), "disk-failed");
        let events = daemon.events();
        let job = update(&daemon, "clone", "");
        assert_eq!(job["state"], "done", "it was never complete: {job}");
        let told = events.wait_for("VOLUME_UPDATED", "clone");
        assert!(told["reason"].as_str().unwrap().contains("broken"), "{told}");
        let expected = shows(&daemon, "vm0");
        let now = show(&daemon, "clone");
        assert_eq!((&now["state"], &now["owned_bytes"]), (&json!("serving"), &json!(0)), "{now}");
        assert_eq!(shows(&daemon, "clone"), expected);
        // The old bytes in its image do not come back, whatever is written around them.
        write(&daemon, "clone", 3..4, 8);
        let mut expected = expected;
        expected[3] = 8;
        daemon.delete("vm0@daily");
        for how in [End::Kill, End::Stop] {
            end_and_start(&mut daemon, how);
            assert_eq!(shows(&daemon, "clone"), expected, "{how:?}");
        }
        begin(&daemon, "clone", "");
        assert_raw(&image_of(&wait_independent(&daemon, "clone")), &expected, "completed");
    }
}

#[test]
fn what_cannot_be_updated_is_refused() {
    let daemon = completed("", "copy-on-write");
    for (path, status, code) in [
        ("none/update", 404, "volume-not-found"),
        ("vm0/update", 404, "volume-not-found"),
        ("clone/update?delay_ms=3600001", 400, "invalid-request"),
        ("clone/update?fresh=true", 400, "invalid-request"),
    ] {
        let refused = post(&daemon, path);
        assert_eq!((refused.status, refused.refused()), (status, code.to_owned()), "{path}");
    }
    let refused = |what: &str| {
        let answer = post(&daemon, "clone/update");
        assert_eq!(answer.refused(), "volume-busy", "{}", answer.body);
        assert!(answer.body.contains(what), "{}", answer.body);
    };
    let mut guest = daemon.client("clone");
    guest.write(0..8, 3);
    refused("frontend");
    drop(guest);
    wait_until("the guest to leave", || show(&daemon, "clone")["connected"] == false);
    daemon.api().create("own", &["clone"], &json!({ "wait": true })).ok();
    refused("snapshot");
    assert_eq!(daemon.send("DELETE", "/v1/snapshots/clone@own?keep-bookmark=true", "").status, 204);
    refused("bookmark");
    // They would tell of content that is dropped here, too.
    made(&daemon, "other", "vm0@daily");
    daemon.api().create("own", &["other"], &json!({ "wait": true })).ok();
    assert_eq!(daemon.send("DELETE", "/v1/snapshots/other@own?keep-bookmark=true", "").status, 204);
    post(&daemon, "other/disable").ok();
    assert!(post(&daemon, "other/enable?fresh=true").body.contains("bookmark"));
    assert_eq!(daemon.send("DELETE", "/v1/volumes/other?force=true", "").status, 204);
    assert_eq!(daemon.send("DELETE", "/v1/bookmarks/clone@own", "").status, 204);
    // With force the guest finds the new content when it connects again.
    let guest = daemon.client("clone");
    let begun = update(&daemon, "clone", "force=true&bytes_per_second=40000");
    assert_eq!(shows(&daemon, "clone"), shows(&daemon, "vm0"));
    drop(guest);
    wait_until("the guest to leave", || show(&daemon, "clone")["connected"] == false);
    refused("copies what it does not own");
    daemon.send("PATCH", &format!("/v1/jobs/{}", begun["id"]), r#"{"bytes_per_second":0}"#).ok();
    wait_independent(&daemon, "clone");
    wait_moments(&daemon, &["daily"], &["clone-update-1"]);
    // The bookmark that is nobody's does not keep the disk.
    remove_source(&daemon);
    let answer = post(&daemon, "clone/update");
    assert_eq!(answer.refused(), "disk-not-found", "{}", answer.body);
    let image = daemon.make_image("vm0", SIZE);
    daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": image }).to_string()).ok();
    let answer = post(&daemon, "clone/update");
    assert_eq!(answer.refused(), "conflict", "another disk of that name: {}", answer.body);
    assert_eq!(shows(&daemon, "clone")[0], 1);
}

/// One that was never complete keeps what it may, and is over at once; a disabled one stays so; one off a volume is brought to
/// that one's present.
#[test]
fn volumes_of_volumes_and_disabled_ones_are_updated() {
    let mut daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "one", "vm0@daily");
    write(&daemon, "one", 0..8, 3);
    assert_eq!(create(&daemon, "two", "one").status, 201);
    write(&daemon, "two", 0..100, 4);
    write(&daemon, "one", 40..48, 5);
    wait_until("the guests to leave", || show(&daemon, "two")["connected"] == false);
    post(&daemon, "two/disable").ok();
    let begun = update(&daemon, "two", "");
    assert_eq!((&begun["state"], &begun["total_bytes"]), (&json!("done"), &json!(0)));
    assert_eq!(show(&daemon, "two")["state"], "disabled");
    for how in [End::Stop, End::Kill] {
        end_and_start(&mut daemon, how);
        assert_eq!(show(&daemon, "two")["state"], "disabled", "{how:?}");
    }
    post(&daemon, "two/enable").ok();
    assert_eq!(shows(&daemon, "two"), expect(&[(0..8, 3), (40..48, 5)]));
    assert_eq!(show(&daemon, "two")["from"], "one@two-update-1");
    // It is updated again: its own snapshot makes way for the next one, and the one of its making is the user's.
    write(&daemon, "one", 80..88, 6);
    wait_until("the guests to leave", || show(&daemon, "two")["connected"] == false);
    let output = daemon.cli(&["volume", "update", "two", "--wait"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().contains("state      done\n"));
    assert_eq!(shows(&daemon, "two"), expect(&[(0..8, 3), (40..48, 5), (80..88, 6)]));
    wait_moments(&daemon, &["two", "two-update-2", "daily"], &[]);
    assert_eq!(post(&daemon, "one/update").refused(), "volume-busy", "another one stands on it");
    wait_until("the guests to leave", || show(&daemon, "two")["connected"] == false);
    delete(&daemon, "two");
    wait_moments(&daemon, &["two", "daily"], &[]);
    assert_eq!(tags(&daemon.client("one").read_all()), expect(&[(0..8, 3), (40..48, 5), (80..88, 6)]));
}

/// A daemon that dies at any step leaves the old volume or the new one, whole, and nothing that was taken for nothing.
#[cfg(feature = "planted")]
#[test]
fn planted_death_while_a_volume_is_updated() {
    const POINTS: [&str; 8] = [
        "before records are committed",
        "after records were committed",
        "before a table's file has its header",
        "after a durable table was synced",
        "before a volume is recorded as updated",
        "after a volume was recorded as updated",
        "before a file is removed",
        "after a volume was updated",
    ];
    let (mut before, mut after) = (0, 0);
    for is_complete in [true, false] {
        for point in POINTS {
            for count in 1..12 {
                let what = format!("{count}:{point}, complete: {is_complete}");
                let mut daemon = daemon_with_snapshot("", "write-logging");
                made(&daemon, "clone", "vm0@daily");
                if is_complete {
                    begin(&daemon, "clone", "");
                    wait_independent(&daemon, "clone");
                }
                write(&daemon, "clone", 3..50, 7);
                let source = shows(&daemon, "vm0");
                daemon.crash_at = Some(format!("{count}:{point}"));
                daemon.stop();
                daemon.spawn();
                let mut died = false;
                while !died && !daemon.is_up() {
                    died = daemon.has_died_by(libc::SIGKILL);
                }
                let mut is_over = false;
                if !died {
                    is_over = post(&daemon, "clone/update").status == 202;
                    if is_over && is_complete {
                        wait_until("its end", || {
                            let now = daemon.get("/v1/volumes/clone");
                            now.status != 200 || now.json()["independent"] == true
                        });
                    }
                    daemon.kill();
                }
                daemon.crash_at = None;
                daemon.start();
                let shown = shows(&daemon, "clone");
                let is_new = shown == source;
                assert!(is_new || shown == expect(&[(3..50, 7)]), "{what}");
                if is_new {
                    after += 1
                } else {
                    before += 1
                }
                if is_complete && is_new {
                    assert_raw(&image_of(&wait_independent(&daemon, "clone")), &source, &what);
                }
                wait_until("what was taken for nothing to go", || {
                    let from = show(&daemon, "clone")["from"].as_str().unwrap().to_owned();
                    let taken = names(&daemon.get("/v1/snapshots").json());
                    taken.iter().all(|name| name == "daily" || from == format!("vm0@{name}"))
                });
                wait_until("the guests to leave", || show(&daemon, "clone")["connected"] == false);
                // What has gone from the lists may not have ended yet.
                wait_until("jobs to end", || {
                    let jobs = daemon.get("/v1/jobs").json();
                    jobs.as_array().unwrap().iter().all(|job| job["state"] != "running")
                });
                update(&daemon, "clone", "");
                assert_eq!(shows(&daemon, "clone"), source, "{what}: again");
                if is_over {
                    break;
                }
            }
        }
    }
    println!("{before} deaths left the old volume, {after} the new one");
    assert!(before > 5 && after > 5);
}
