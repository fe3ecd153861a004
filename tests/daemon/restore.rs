//! Restores in place from outside: shown at once, ended in the middle by stops, kills and power cuts, from volumes, refused.

use std::ops::Range;
use std::os::unix::process::ExitStatusExt;

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Answer, Daemon, can_mount, wait_until};
use crate::strategies::{ALL, End, SIZE, end_and_start, shows};

/// Longer than any test: the job does one block and waits.
pub(crate) const HOURS: u32 = 3_600_000;
const STRATEGIES: [&str; 2] = ["copy-on-write", "write-logging"];

/// A disk full of 1 with a snapshot `daily`, and changes everywhere since.
pub(crate) fn changed_disk(strategy: &str) -> Daemon {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.api().create("daily", &["vm0"], &json!({ "strategy": strategy, "wait": true })).ok();
    client.write(1024..2048, 2);
    client.write(3..5, 3);
    client.flush();
    drop(client);
    wait_until("the frontend to be gone", || daemon.show_disk("vm0")["frontends"] == 0);
    daemon
}

fn ask(daemon: &Daemon, from: &str, force: bool, delay_ms: u32) -> Answer {
    let body = json!({ "from": from, "force": force, "delay_ms": delay_ms });
    daemon.send("POST", "/v1/disks/vm0/restore", &body.to_string())
}

#[track_caller]
pub(crate) fn begin(daemon: &Daemon, from: &str, delay_ms: u32) -> Value {
    wait_until("the last frontend to be forgotten", || daemon.show_disk("vm0")["frontends"] == 0);
    let answer = ask(daemon, from, false, delay_ms);
    assert_eq!(answer.status, 202, "{}", answer.body);
    answer.json()
}

pub(crate) fn the_job(daemon: &Daemon) -> Value {
    let jobs = daemon.get("/v1/jobs").json();
    jobs.as_array().unwrap().iter().rfind(|j| j["kind"] == "restore").unwrap().clone()
}

/// Has the job go on as fast as it can, and waits for its end.
#[track_caller]
pub(crate) fn finish(daemon: &Daemon) {
    let path = format!("/v1/jobs/{}", the_job(daemon)["id"]);
    daemon.send("PATCH", &path, r#"{"delay_ms":0}"#).ok();
    wait_until("a restore to end", || {
        let job = daemon.get(&path).json();
        assert!(["running", "done"].contains(&job["state"].as_str().unwrap()), "{job}");
        job["state"] == "done"
    });
    assert_eq!(daemon.show_disk("vm0")["restoring"], Value::Null);
}

pub(crate) fn ones(changes: &[(Range<usize>, u64)]) -> Vec<u64> {
    let mut all = vec![1; ALL.end];
    changes.iter().for_each(|(at, tag)| all[at.clone()].fill(*tag));
    all
}

/// Parts of blocks, whole blocks and zeros, in places that differ from the snapshot and in places that do not.
fn write_on(daemon: &Daemon) -> Vec<u64> {
    let mut client = daemon.client("vm0");
    client.write(1030..1031, 7);
    client.write(1200..1232, 8);
    client.zero(1500..1510, false);
    client.write(100..101, 9);
    client.flush();
    ones(&[(1030..1031, 7), (1200..1232, 8), (1500..1510, 0), (100..101, 9)])
}

#[test]
fn a_restore_shows_at_once_and_is_copied_behind() {
    for strategy in STRATEGIES {
        let daemon = changed_disk(strategy);
        let events = daemon.events();
        let before = shows(&daemon, "vm0");
        daemon.api().create("later", &["vm0"], &json!({ "strategy": strategy, "wait": true })).ok();
        let job = begin(&daemon, "vm0@daily", HOURS);
        assert_eq!((&job["kind"], &job["state"]), (&json!("restore"), &json!("running")));
        events.wait_for("JOB_STARTED", "vm0");
        assert_eq!(shows(&daemon, "vm0"), ones(&[]), "{strategy}");
        let now = write_on(&daemon);
        assert_eq!(shows(&daemon, "vm0"), now, "{strategy}");
        let disk = daemon.show_disk("vm0");
        assert_eq!(disk["restoring"]["from"], "vm0@daily");
        let left = disk["restoring"]["remaining_bytes"].as_u64().unwrap();
        assert!(0 < left && left < SIZE * 6 / 10, "only what differs: {left}");
        finish(&daemon);
        assert_eq!(shows(&daemon, "vm0"), now, "{strategy}");
        assert_eq!(shows(&daemon, "vm0@daily"), ones(&[]), "{strategy}");
        assert_eq!(shows(&daemon, "vm0@later"), before, "{strategy}");
        daemon.delete("vm0@daily");
        daemon.delete("vm0@later");
        assert_eq!(shows(&daemon, "vm0"), now, "{strategy}");
        assert_eq!(tags(&std::fs::read(daemon.image("vm0")).unwrap()), now, "one raw image is left");
        daemon.assert_only_disks_left();
    }
}

#[test]
fn a_restore_outlives_stops_kills_and_power_cuts() {
    if !can_mount("a restore that outlives a power cut") {
        return;
    }
    for strategy in STRATEGIES {
        for how in [End::Stop, End::Kill, End::PowerCut] {
            let mut daemon = changed_disk(strategy);
            begin(&daemon, "vm0@daily", HOURS);
            end_and_start(&mut daemon, how);
            daemon.send("DELETE", &format!("/v1/jobs/{}", the_job(&daemon)["id"]), "");
            assert_eq!(shows(&daemon, "vm0"), ones(&[]), "{strategy} after {how:?}");
            let now = if daemon.show_disk("vm0")["restoring"].is_null() {
                ones(&[]) // The job was quicker than we were.
            } else {
                write_on(&daemon)
            };
            end_and_start(&mut daemon, how);
            assert_eq!(shows(&daemon, "vm0"), now, "{strategy} after {how:?}");
            assert_eq!(shows(&daemon, "vm0@daily"), ones(&[]), "{strategy} after {how:?}");
            if !daemon.show_disk("vm0")["restoring"].is_null() {
                assert_eq!(the_job(&daemon)["state"], "stopped", "it stays stopped");
                daemon.send("POST", &format!("/v1/jobs/{}/resume", the_job(&daemon)["id"]), "").ok();
                finish(&daemon);
            }
            assert_eq!(shows(&daemon, "vm0"), now, "{strategy} after {how:?}");
            daemon.delete("vm0@daily");
            assert_eq!(shows(&daemon, "vm0"), now, "{strategy} after {how:?}");
            daemon.assert_only_disks_left();
        }
    }
}

/// What the guest wrote and flushed while blocks are pending is not undone, whatever comes.
#[test]
fn what_is_written_in_the_middle_of_a_restore_outlives_any_end() {
    if !can_mount("writes that outlive a power cut") {
        return;
    }
    for strategy in STRATEGIES {
        for how in [End::Stop, End::Kill, End::PowerCut] {
            let mut daemon = changed_disk(strategy);
            let job = begin(&daemon, "vm0@daily", HOURS);
            let now = write_on(&daemon);
            daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "").ok();
            assert_eq!(shows(&daemon, "vm0"), now);
            end_and_start(&mut daemon, how);
            assert!(!daemon.show_disk("vm0")["restoring"].is_null(), "{strategy} after {how:?}");
            assert_eq!(shows(&daemon, "vm0"), now, "{strategy} after {how:?}");
            daemon.send("POST", &format!("/v1/jobs/{}/resume", the_job(&daemon)["id"]), "").ok();
            finish(&daemon);
            assert_eq!(shows(&daemon, "vm0"), now, "{strategy} after {how:?}");
            daemon.delete("vm0@daily");
            daemon.assert_only_disks_left();
        }
    }
}

#[test]
fn a_disk_is_restored_from_a_volume() {
    let power = can_mount("a restore from a volume that outlives a power cut");
    for strategy in STRATEGIES {
        for how in [End::Stop, End::Kill, End::PowerCut] {
            if matches!(how, End::PowerCut) && !power {
                continue;
            }
            let mut daemon = changed_disk(strategy);
            let made = daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@daily"}"#);
            assert_eq!(made.status, 201, "{}", made.body);
            let mut client = daemon.client("clone");
            client.write(0..8, 4);
            client.write(1100..1101, 5);
            client.flush();
            let wanted = [(0..8, 4), (1100..1101, 5)];
            let job = begin(&daemon, "clone", HOURS);
            client.write(0..16, 6);
            client.flush();
            drop(client);
            assert_eq!(shows(&daemon, "vm0"), ones(&wanted), "{strategy}");
            let left = daemon.show_disk("vm0")["restoring"]["remaining_bytes"].as_u64().unwrap();
            assert!(left < SIZE * 6 / 10, "only what differs: {left}");
            daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "").ok();
            daemon.client("vm0").write(1101..1102, 7);
            daemon.client("vm0").flush();
            let now = ones(&[(0..8, 4), (1100..1101, 5), (1101..1102, 7)]);
            // The volume that it stands on stays, and its snapshot.
            let refused = daemon.send("DELETE", "/v1/volumes/clone?force=true", "");
            assert_eq!(refused.refused(), "volume-busy", "{}", refused.body);
            let from = daemon.show_disk("vm0")["restoring"]["from"].as_str().unwrap().to_owned();
            let refused = daemon.send("DELETE", &format!("/v1/snapshots/{from}?force=true"), "");
            assert_eq!(refused.refused(), "snapshot-busy", "{}", refused.body);

            end_and_start(&mut daemon, how);
            assert_eq!(shows(&daemon, "vm0"), now, "{strategy} after {how:?}");
            assert_eq!(the_job(&daemon)["state"], "stopped");
            daemon.send("POST", &format!("/v1/jobs/{}/resume", the_job(&daemon)["id"]), "").ok();
            finish(&daemon);
            assert_eq!(shows(&daemon, "vm0"), now, "{strategy} after {how:?}");
            daemon.api().wait_gone(&from);
            assert_eq!(shows(&daemon, "clone")[..16], [6; 16], "the volume keeps its content");
            wait_until("a volume to be let go", || daemon.send("DELETE", "/v1/volumes/clone", "").status == 204);
            daemon.delete("vm0@daily");
            assert_eq!(shows(&daemon, "vm0"), now, "{strategy} after {how:?}");
            daemon.assert_only_disks_left();
        }
    }
}

/// It shares nothing with the disk any more. What both have written since they were one is copied, if that is known.
#[test]
fn a_disk_is_restored_from_an_independent_volume() {
    for strategy in STRATEGIES {
        for (snapshot, most) in [("stays", SIZE * 6 / 10), ("bookmark", SIZE * 6 / 10), ("goes", SIZE)] {
            let mut daemon = changed_disk(strategy);
            daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@daily"}"#).json();
            let job = daemon.send("POST", "/v1/volumes/clone/complete", "").json();
            wait_until("a volume to be independent", || {
                daemon.get(&format!("/v1/jobs/{}", job["id"])).json()["state"] == "done"
            });
            if snapshot != "stays" {
                let keep = snapshot == "bookmark";
                daemon.send("DELETE", &format!("/v1/snapshots/vm0@daily?keep-bookmark={keep}"), "");
                daemon.api().wait_gone("vm0@daily");
            }
            let mut client = daemon.client("clone");
            client.write(0..8, 4);
            client.flush();
            drop(client);
            begin(&daemon, "clone", HOURS);
            let wanted = ones(&[(0..8, 4)]);
            assert_eq!(shows(&daemon, "vm0"), wanted, "{strategy}, its snapshot {snapshot}");
            let left = daemon.show_disk("vm0")["restoring"]["remaining_bytes"].as_u64().unwrap();
            assert!(left <= most, "only what differs: {left} of {SIZE}, its snapshot {snapshot}");
            end_and_start(&mut daemon, End::Kill);
            finish(&daemon);
            assert_eq!(shows(&daemon, "vm0"), wanted, "{strategy}, its snapshot {snapshot}");
            assert_eq!(shows(&daemon, "clone"), wanted, "{strategy}, its snapshot {snapshot}");
        }
    }
}

/// What both have changed is counted from the update then, and not from when the volume was made.
#[test]
fn a_disk_is_restored_from_a_volume_that_was_updated() {
    for strategy in STRATEGIES {
        let daemon = changed_disk(strategy);
        daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@daily"}"#).json();
        let idle = |what: &str| {
            wait_until("no job to run", || {
                daemon.get("/v1/jobs").json().as_array().unwrap().iter().all(|job| job["state"] != "running")
            });
            wait_until("a frontend to be gone", || daemon.get(what).json()["frontends"] == 0);
        };
        let write = |name: &str, at: Range<usize>, tag: u64| {
            let mut client = daemon.client(name);
            client.write(at, tag);
            client.flush();
        };
        write("clone", 16..24, 4);
        idle("/v1/volumes/clone");
        daemon.send("POST", "/v1/volumes/clone/complete", "").ok();
        idle("/v1/volumes/clone");
        write("vm0", 40..50, 5);
        let wanted = shows(&daemon, "vm0");
        daemon.send("POST", "/v1/volumes/clone/update", "").ok();
        idle("/v1/volumes/clone");
        assert_eq!(shows(&daemon, "clone"), wanted, "{strategy}, updated");
        write("clone", 80..81, 6);
        write("vm0", 120..700, 7);
        idle("/v1/disks/vm0");
        let mut wanted = wanted;
        wanted[80] = 6;
        begin(&daemon, "clone", 0);
        assert_eq!(shows(&daemon, "vm0"), wanted, "{strategy}");
        finish(&daemon);
        assert_eq!(shows(&daemon, "vm0"), wanted, "{strategy}");
        assert_eq!(shows(&daemon, "clone"), wanted, "{strategy}");
    }
}

/// A guest that stays connected reads the restored content from the answer on.
#[test]
fn a_connected_guest_is_restored_only_by_force() {
    let daemon = changed_disk("copy-on-write");
    let mut client = daemon.client("vm0");
    let refused = ask(&daemon, "vm0@daily", false, 0);
    assert_eq!((refused.status, refused.refused()), (409, "disk-busy".to_owned()));
    assert!(refused.body.contains("--force"), "{}", refused.body);
    for slot in 0..4 {
        client.queues[0].submit_write(slot, 1024 + slot * 64..1024 + slot * 64 + 64, 5, false);
    }
    ask(&daemon, "vm0@daily", true, 0).ok();
    while client.queues[0].in_flight() > 0 {
        for (_, ret) in client.queues[0].answers(std::time::Duration::from_secs(60)) {
            assert_eq!(ret, 0);
        }
    }
    let shown = tags(&client.read_all());
    for (slot, written) in shown[1024..1024 + 256].chunks(64).enumerate() {
        assert!(written == [1; 64] || written == [5; 64], "write {slot} is there in part: {written:?}");
    }
    assert_eq!((&shown[..1024], &shown[1280..]), (&ones(&[])[..1024], &ones(&[])[1280..]));
    client.write(1024..1280, 6);
    finish(&daemon);
    assert_eq!(tags(&client.read_all()), ones(&[(1024..1280, 6)]));
}

#[test]
fn what_does_not_go_with_a_restore_is_refused() {
    let daemon = changed_disk("copy-on-write");
    for (from, code) in [
        ("vm0@none", "snapshot-not-found"),
        ("none@daily", "snapshot-not-found"),
        ("none", "volume-not-found"),
        ("vm0@", "invalid-name"),
    ] {
        assert_eq!(ask(&daemon, from, false, 0).refused(), code, "{from}");
    }
    let unknown = daemon.send("POST", "/v1/disks/none/restore", r#"{"from":"vm0@daily"}"#);
    assert_eq!(unknown.refused(), "disk-not-found");
    daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@daily"}"#).ok();
    let volume = daemon.send("POST", "/v1/disks/clone/restore", r#"{"from":"vm0@daily"}"#);
    assert_eq!(volume.refused(), "unsupported");

    let job = begin(&daemon, "vm0@daily", HOURS);
    let named = |answer: &Answer| {
        let job = format!("job {}", job["id"]);
        assert!(answer.body.contains("being restored") && answer.body.contains(&job), "{}", answer.body);
    };
    for (method, path, body, code) in [
        ("POST", "/v1/disks/vm0/restore", r#"{"from":"vm0@daily"}"#, "disk-busy"),
        ("POST", "/v1/snapshots", r#"{"name":"next","disks":["vm0"]}"#, "disk-busy"),
        ("DELETE", "/v1/snapshots/vm0@daily?force=true", "", "snapshot-busy"),
        ("POST", "/v1/disks/vm0/mirror", r#"{"path":"/tmp/halfsilver-leg.raw"}"#, "disk-busy"),
    ] {
        let answer = daemon.send(method, path, body);
        assert_eq!(answer.refused(), code, "{method} {path}: {}", answer.body);
        named(&answer);
    }
    // What it has not it cannot lose, restored or not.
    assert_eq!(daemon.send("DELETE", "/v1/disks/vm0/mirror", "").refused(), "no-second-leg");
    wait_until("the volume to go", || daemon.send("DELETE", "/v1/volumes/clone", "").status == 204);
    let removed = daemon.send("DELETE", "/v1/disks/vm0?force=true", "");
    assert_eq!(removed.refused(), "disk-busy");
    named(&removed);
    // A job that has stopped still stands in the way, and can go on.
    daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "").ok();
    let removed = daemon.send("DELETE", "/v1/disks/vm0?force=true", "");
    assert!(removed.body.contains("job resume"), "{}", removed.body);
    assert_eq!(daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "").status, 409, "it is not forgotten");
    let resumed = daemon.cli(&["job", "resume", &job["id"].to_string()]);
    assert!(resumed.status.success());
    finish(&daemon);
    assert_eq!(shows(&daemon, "vm0"), ones(&[]));
}

#[test]
fn a_read_only_disk_and_one_of_another_family_are_refused() {
    let mut daemon = changed_disk("copy-on-write");
    daemon.make_image("vm1", SIZE);
    daemon.arg_disk("vm1", "");
    daemon.restart();
    daemon.api().create("other", &["vm1"], &json!({ "wait": true })).ok();
    daemon.make_image("vm2", SIZE);
    let fixed = format!(r#"{{"path":"{}","readonly":true}}"#, daemon.image("vm2").display());
    daemon.send("PUT", "/v1/disks/vm2", &fixed).ok();
    daemon.api().create("own", &["vm2"], &json!({ "wait": true })).ok();
    let read_only = daemon.send("POST", "/v1/disks/vm2/restore", r#"{"from":"vm2@own"}"#);
    assert_eq!(read_only.refused(), "invalid-config");
    assert!(read_only.body.contains("read-only"), "{}", read_only.body);
    let refused = ask(&daemon, "vm1@other", false, 0);
    assert_eq!(refused.refused(), "invalid-request");
    assert!(refused.body.contains("does not stand on disk vm0"), "{}", refused.body);
}

/// Without what pending blocks show the disk is not served as if it were whole.
#[test]
fn a_disk_whose_source_is_lost_is_not_served() {
    let mut daemon = changed_disk("copy-on-write");
    let job = begin(&daemon, "vm0@daily", HOURS);
    daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "").ok();
    daemon.stop();
    let (image, aside) = (daemon.snapshot_image("vm0@daily"), daemon.path("aside"));
    std::fs::rename(&image, &aside).unwrap();
    let check = |daemon: &Daemon| -> Value {
        serde_json::from_slice::<Value>(&daemon.check(&["--json"]).stdout).unwrap()["disks"][0].clone()
    };
    let checked = check(&daemon);
    assert_eq!(checked["verdict"], "not-served", "{checked}");
    assert!(checked["reason"].as_str().unwrap().contains("being restored from vm0@daily"), "{checked}");
    let told = daemon.refused_start();
    assert!(told.contains("being restored from vm0@daily") && told.contains("put back"), "{told}");
    std::fs::rename(&aside, &image).unwrap();
    let checked = check(&daemon);
    let job = json!([{ "kind": "restore", "snapshot": null, "stopped": true }]);
    assert_eq!((&checked["verdict"], &checked["jobs"]), (&json!("served"), &job), "{checked}");
    daemon.start();
    assert_eq!(shows(&daemon, "vm0"), ones(&[]));
    daemon.send("POST", &format!("/v1/jobs/{}/resume", the_job(&daemon)["id"]), "").ok();
    finish(&daemon);
    assert_eq!(shows(&daemon, "vm0"), ones(&[]));
}

/// A disk whose volume is lost has failed, and what it has is there when the volume is.
#[test]
fn a_disk_whose_volume_is_lost_answers_with_errors() {
    let mut daemon = changed_disk("copy-on-write");
    daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@daily"}"#).ok();
    daemon.client("clone").write(0..8, 4);
    let job = begin(&daemon, "clone", HOURS);
    let now = write_on(&daemon);
    daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "").ok();
    let image = std::path::PathBuf::from(daemon.get("/v1/volumes/clone").json()["image"].as_str().unwrap());
    daemon.stop();
    let aside = daemon.path("aside");
    std::fs::rename(&image, &aside).unwrap();
    let report = crate::check::examine(&daemon).0;
    assert_eq!(crate::check::verdict(&report, "vm0"), "not-served", "{report}");
    assert_eq!(crate::check::verdict(&report, "clone"), "not-served", "{report}");
    daemon.start();
    let disk = daemon.show_disk("vm0");
    assert_eq!(disk["state"], "failed", "{disk}");
    assert!(disk["reason"].as_str().unwrap().contains("clone@restore-"), "{disk}");
    let mut client = daemon.client("vm0");
    for sectors in [0..8, 1100..1101] {
        client.queues[0].submit_read(0, sectors.clone());
        assert_ne!(client.queues[0].wait_one().1, 0);
        client.queues[0].submit_write(0, sectors, 9, false);
        assert_ne!(client.queues[0].wait_one().1, 0);
    }
    drop(client);
    for path in ["/v1/volumes/clone", "/v1/disks/vm0"] {
        let refused = daemon.send("DELETE", path, "");
        assert_eq!(refused.status, 409, "{}", refused.body);
    }
    // It goes on as soon as the volume is back, without a start.
    std::fs::rename(&aside, &image).unwrap();
    wait_until("what it waits for to be back", || daemon.show_disk("vm0")["state"] == "serving");
    let mut expected = now;
    expected[0..8].fill(4);
    assert_eq!(shows(&daemon, "vm0"), expected);
    end_and_start(&mut daemon, End::Stop);
    assert_eq!(shows(&daemon, "vm0"), expected);
    daemon.send("POST", &format!("/v1/jobs/{}/resume", the_job(&daemon)["id"]), "").ok();
    finish(&daemon);
    assert_eq!(shows(&daemon, "vm0"), expected);

    // Without the volume it can be given up.
    let job = begin(&daemon, "clone", HOURS);
    daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "").ok();
    let image = std::path::PathBuf::from(daemon.get("/v1/volumes/clone").json()["image"].as_str().unwrap());
    daemon.stop();
    std::fs::rename(&image, &aside).unwrap();
    daemon.start();
    let refused = daemon.send("DELETE", "/v1/volumes/clone", "");
    assert!(refused.refused() == "volume-busy" && refused.body.contains("disk vm0"), "{refused:?}");
    for path in ["/v1/volumes/clone?force=true", "/v1/disks/vm0?force=true"] {
        wait_until("it to be given up", || daemon.send("DELETE", path, "").status == 204);
    }
    daemon.assert_only_disks_left();
}

#[test]
fn a_restore_is_killed_at_any_point() {
    const POINTS: [&str; 8] = [
        "after an image was made",
        "before records are committed",
        "after records were committed",
        "before a restore is recorded",
        "after a restore was recorded",
        "after a restore was begun",
        "after the last block of a restore",
        "after a restore was forgotten",
    ];
    for strategy in STRATEGIES {
        for point in POINTS {
            for count in 1..12 {
                let mut daemon = changed_disk(strategy);
                let before = shows(&daemon, "vm0");
                daemon.crash_at = Some(format!("{count}:{point}"));
                daemon.stop();
                daemon.spawn();
                let mut died = false;
                while !died && !daemon.is_up() {
                    died = daemon.has_died_by(libc::SIGKILL);
                }
                let (mut answered, mut ended) = (false, false);
                if !died {
                    answered = ask(&daemon, "vm0@daily", false, 0).status == 202;
                    while answered && !ended && !died {
                        died = daemon.has_died_by(libc::SIGKILL);
                        let answer = daemon.get("/v1/jobs/1");
                        ended = answer.status == 200 && answer.json()["state"] == "done";
                    }
                }
                let what = format!("{strategy}, {count}:{point}");
                daemon.crash_at = None;
                if !died {
                    if ended {
                        daemon.terminate();
                    }
                    let status = daemon.wait_exit();
                    // It may also meet the point when it goes down.
                    ended &= status.success();
                    assert!(ended || status.signal() == Some(libc::SIGKILL), "{what}: {status}");
                }
                daemon.start();
                let shown = shows(&daemon, "vm0");
                assert!(shown == ones(&[]) || !answered && shown == before, "{what}");
                if !daemon.show_disk("vm0")["restoring"].is_null() {
                    finish(&daemon);
                }
                assert_eq!(shows(&daemon, "vm0"), shown, "{what}");
                assert_eq!(shows(&daemon, "vm0@daily"), ones(&[]), "{what}");
                daemon.delete("vm0@daily");
                assert_eq!(shows(&daemon, "vm0"), shown, "{what}");
                daemon.restart();
                daemon.assert_only_disks_left();
                if ended {
                    break;
                }
            }
        }
    }
}

/// After a split nothing is shared: all is copied, and the legs become one mirror again.
#[test]
fn a_mirrored_disk_is_restored_from_the_leg_that_was_split_off() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let leg = daemon.path("leg.raw");
    daemon.client("vm0").write(ALL, 1);
    let mirrored = daemon.cli(&["disk", "mirror", "vm0", leg.to_str().unwrap(), "--wait"]);
    assert!(mirrored.status.success());
    daemon.api().create("daily", &["vm0"], &json!({ "strategy": "write-mirroring", "wait": true })).ok();
    daemon.client("vm0").write(8..2000, 2);
    let job = begin(&daemon, "vm0@daily", HOURS);
    let now = write_on(&daemon);
    assert_eq!(shows(&daemon, "vm0"), now);
    daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "").ok();
    end_and_start(&mut daemon, End::Kill);
    assert_eq!(shows(&daemon, "vm0"), now);
    daemon.send("POST", &format!("/v1/jobs/{}/resume", the_job(&daemon)["id"]), "").ok();
    finish(&daemon);
    assert_eq!(shows(&daemon, "vm0@daily"), ones(&[]));
    daemon.delete("vm0@daily");
    wait_until("both legs to be in sync", || {
        let disk = daemon.show_disk("vm0");
        let legs = disk["legs"].as_array().unwrap();
        legs.len() == 2 && legs.iter().all(|leg| leg["state"] == "in-sync")
    });
    assert_eq!(shows(&daemon, "vm0"), now);
    daemon.stop();
    for image in [daemon.image("vm0"), leg] {
        assert_eq!(tags(&std::fs::read(&image).unwrap()), now, "{}", image.display());
    }
}

#[test]
fn the_command_line_restores_and_waits() {
    let daemon = changed_disk("copy-on-write");
    let done = daemon.cli(&["disk", "restore", "vm0", "--from", "vm0@daily", "--wait"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stdout).contains("restore"));
    assert_eq!(shows(&daemon, "vm0"), ones(&[]));
    assert_eq!(daemon.show_disk("vm0")["restoring"], Value::Null);
}
