//! Jobs and what they are of: a job ends with its disk, is never another one's of the same name, and its number is never
//! given again.

use serde_json::{Value, json};

use crate::asking::{jobs, slowed, start_if_it_can};
use crate::client::tags;
use crate::harness::{Daemon, wait_until};
use crate::volumes::made;

const SIZE: u64 = 32 << 20;
const SECTORS: usize = 65536;

/// A disk with two snapshots, of which the newer one has much to hand over when it is deleted.
fn with_two_snapshots() -> Daemon {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.snap("old");
    daemon.snap("b");
    client.write(0..SECTORS, 2);
    drop(client);
    wait_until("the frontend to be gone", || daemon.show_disk("vm0")["frontends"] == 0);
    daemon
}

/// Its deletion, stopped by the user.
fn stopped_deletion(daemon: &Daemon) -> u64 {
    let id = slowed(daemon, "merge", ("DELETE", "/v1/snapshots/vm0@b", ""), true);
    assert_eq!(daemon.get(&format!("/v1/jobs/{id}")).json()["state"], "stopped");
    id
}

fn remembered(daemon: &Daemon, id: u64) -> Option<Value> {
    jobs(daemon).into_iter().find(|job| job["id"] == id)
}

/// The same name again: another disk, with a snapshot of the same name that a volume stands on.
fn another_of_that_name(daemon: &Daemon) {
    let image = daemon.make_image("another", SIZE);
    daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": image }).to_string()).ok();
    daemon.client("vm0").write(0..64, 5);
    daemon.snap("b");
    made(daemon, "clone", "vm0@b");
    daemon.client("vm0").write(0..64, 6);
}

#[track_caller]
fn assert_untouched(daemon: &Daemon) {
    assert_eq!(daemon.state("vm0@b"), "quiesced");
    assert_eq!(tags(&daemon.reader("clone").read(0..65)), [vec![5; 64], vec![0]].concat());
    assert_eq!(tags(&daemon.reader("vm0@b").read(0..65)), [vec![5; 64], vec![0]].concat());
}

/// A deletion that was stopped goes with its disk, and nothing that is asked of its job reaches what has the name now.
#[test]
fn a_stopped_deletion_ends_with_its_disk() {
    let mut daemon = with_two_snapshots();
    let id = stopped_deletion(&daemon);
    daemon.send("DELETE", "/v1/disks/vm0?force=true", "").ok();
    let listed = remembered(&daemon, id);
    another_of_that_name(&daemon);
    let resumed = daemon.send("POST", &format!("/v1/jobs/{id}/resume"), "");
    assert!(resumed.status >= 400, "a job of a disk that is gone is resumed: {}", resumed.body);
    assert_untouched(&daemon);
    assert_eq!(listed, None, "it is listed without its disk");
    daemon.kill();
    daemon.forget_args();
    daemon.start();
    assert_eq!(remembered(&daemon, id), None);
    assert_untouched(&daemon);
}

/// Whoever removes a disk with a stopped deletion and gives its name to another one, as a script does that begins anew.
#[test]
fn resuming_by_an_old_number_never_deletes_a_newer_snapshot() {
    let daemon = with_two_snapshots();
    let id = stopped_deletion(&daemon);
    daemon.send("DELETE", "/v1/disks/vm0?force=true", "").ok();
    another_of_that_name(&daemon);
    for (method, path) in [
        ("DELETE", format!("/v1/jobs/{id}")),
        ("PATCH", format!("/v1/jobs/{id}")),
        ("POST", format!("/v1/jobs/{id}/resume")),
    ] {
        daemon.send(method, &path, r#"{"delay_ms":0}"#);
        wait_until("no job to run", || jobs(&daemon).iter().all(|job| job["state"] != "running"));
        assert_untouched(&daemon);
    }
}

/// Numbers go on where they were, whether the daemon was stopped or killed, and whether or not the jobs are remembered.
#[test]
fn a_jobs_number_is_never_given_twice() {
    let mut daemon = Daemon::with_disks(&[1 << 20], "");
    let mut newest = 0;
    for round in 0..6 {
        daemon.client("vm0").write(0..64, round + 1);
        daemon.snap("a");
        daemon.delete("vm0@a");
        let ids: Vec<u64> = jobs(&daemon).iter().filter_map(|job| job["id"].as_u64()).collect();
        let id = *ids.iter().max().unwrap();
        assert!(id > newest, "round {round}: job {id} after job {newest}");
        newest = id;
        match round % 3 {
            0 => daemon.stop(),
            1 => daemon.kill(),
            _ => {
                // Ended, and taken off the list by the user.
                ids.iter().for_each(|id| drop(daemon.send("DELETE", &format!("/v1/jobs/{id}"), "")));
                daemon.kill();
            }
        }
        assert!(start_if_it_can(&mut daemon), "{}", daemon.log_text());
    }
}

/// What is left of it is said before it is resumed, too.
#[test]
fn a_stopped_job_says_after_a_restart_what_is_left() {
    for kind in ["merge", "fold"] {
        let mut daemon = with_two_snapshots();
        let snapshot = if kind == "merge" { "vm0@b" } else { "vm0@log" };
        if kind == "fold" {
            daemon.api().create("log", &["vm0"], &json!({ "strategy": "write-logging" })).ok();
            wait_until("the snapshot to be quiesced", || daemon.state("vm0@log") == "quiesced");
            daemon.client("vm0").write(0..SECTORS, 3);
            wait_until("the frontend to be gone", || daemon.show_disk("vm0")["frontends"] == 0);
        }
        slowed(&daemon, kind, ("DELETE", &format!("/v1/snapshots/{snapshot}"), ""), true);
        daemon.restart();
        let [job] = &jobs(&daemon)[..] else { panic!("{:?}", jobs(&daemon)) };
        assert_eq!((job["kind"].as_str(), job["state"].as_str()), (Some(kind), Some("stopped")));
        let (done, total) = (job["done_bytes"].as_u64().unwrap(), job["total_bytes"].as_u64().unwrap());
        assert!(done < total && total <= SIZE, "{job}");
    }
}
