//! Synchronisation of legs when it does not go well: it fails and is begun anew, is stopped and stays so, is not wanted
//! any more. A leg and its job come and go together.

use std::fs::OpenOptions;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::asking::{cli_within, jobs, slowed};
use crate::harness::{Answer, Daemon, PATIENCE, can_mount, run, wait_until};
use crate::mirror::{in_sync, legs, raw};
use crate::trouble::Mount;

const SIZE: u64 = 64 << 20;

/// A disk full of data without a mirror, and where its second leg is to be.
fn full_disk() -> (Daemon, PathBuf) {
    let mut daemon = Daemon::place();
    std::fs::write(daemon.image("vm0"), 7_u64.to_le_bytes().repeat(SIZE as usize / 8)).unwrap();
    daemon.arg_disk("vm0", "");
    daemon.start();
    let leg = daemon.path("leg.raw");
    (daemon, leg)
}

fn mirror(daemon: &Daemon, leg: &std::path::Path) -> Answer {
    daemon.send("POST", "/v1/disks/vm0/mirror", &json!({ "path": leg }).to_string())
}

fn of_mirror(daemon: &Daemon) -> Vec<Value> {
    jobs(daemon).into_iter().filter(|job| job["kind"] == "mirror").collect()
}

/// Takes every job off the list that is on it; each must be one that can be taken off.
#[track_caller]
fn assert_no_job_stays(daemon: &Daemon) {
    wait_until("no job to run", || of_mirror(daemon).iter().all(|job| job["state"] != "running"));
    for job in of_mirror(daemon) {
        let removed = daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "");
        assert!([204, 404].contains(&removed.status), "{job} cannot be taken off the list: {}", removed.body);
    }
}

fn set_len(daemon: &Daemon, len: u64) {
    OpenOptions::new().write(true).open(daemon.image("vm0")).unwrap().set_len(len).unwrap();
}

/// A synchronisation that cannot read the disk's first image to its end. The job has failed.
fn failed_synchronisation() -> (Daemon, PathBuf) {
    let (daemon, leg) = full_disk();
    set_len(&daemon, SIZE / 2);
    mirror(&daemon, &leg).ok();
    wait_until("the job to fail", || of_mirror(&daemon).iter().any(|job| job["state"] == "failed"));
    set_len(&daemon, SIZE);
    (daemon, leg)
}

/// Who waits for a leg is told that it will not come, and why.
#[test]
fn waiting_for_a_synchronisation_that_fails_ends_with_its_reason() {
    let (daemon, leg) = full_disk();
    set_len(&daemon, SIZE / 2);
    let output = cli_within(&daemon, &["disk", "mirror", "vm0", leg.to_str().unwrap(), "--wait"], *PATIENCE);
    let output = output.expect("the command ends when the job has failed");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
    let job = of_mirror(&daemon).pop();
    let reason = job.and_then(|job| job["reason"].as_str().map(str::to_owned)).unwrap_or("vm0.raw".to_owned());
    assert!(told.contains(&reason), "{told:?} does not say {reason:?}");
}

/// Asking again after a failure is asking anew: a job runs, and the leg gets in sync.
#[test]
fn a_failed_synchronisation_is_begun_anew_when_it_is_asked_for() {
    let (daemon, leg) = failed_synchronisation();
    let before = of_mirror(&daemon);
    mirror(&daemon, &leg).ok();
    wait_until("a job to be begun anew", || {
        let now = of_mirror(&daemon);
        let in_sync = legs(&daemon).iter().all(|(_, state)| state == "in-sync");
        in_sync || now.iter().any(|job| job["state"] == "running" || before.iter().all(|old| old["id"] != job["id"]))
    });
    in_sync(&daemon);
    daemon.client("vm0").flush();
    assert_eq!(raw(&leg), raw(&daemon.image("vm0")));
    assert_no_job_stays(&daemon);
}

/// Or another leg takes its place.
#[test]
fn another_leg_takes_the_place_of_one_whose_synchronisation_failed() {
    let (daemon, _) = failed_synchronisation();
    let other = daemon.path("other.raw");
    let answer = mirror(&daemon, &other);
    if answer.status >= 400 {
        daemon.send("DELETE", "/v1/disks/vm0/mirror", "").ok();
        mirror(&daemon, &other).ok();
    }
    in_sync(&daemon);
    daemon.client("vm0").flush();
    assert_eq!(raw(&other), raw(&daemon.image("vm0")));
    assert_no_job_stays(&daemon);
}

/// Or it is let go, and its job is not left behind.
#[test]
fn a_leg_whose_synchronisation_failed_is_let_go() {
    for how in ["at once", "after a kill"] {
        let (mut daemon, leg) = failed_synchronisation();
        if how == "after a kill" {
            daemon.kill();
            daemon.start();
        }
        daemon.send("DELETE", "/v1/disks/vm0/mirror", "").ok();
        assert_eq!(legs(&daemon), [], "{how}");
        assert_no_job_stays(&daemon);
        daemon.restart();
        assert_eq!((legs(&daemon).len(), of_mirror(&daemon).len()), (0, 0), "{how}");
        mirror(&daemon, &leg).ok();
        in_sync(&daemon);
    }
}

/// No room on the leg's side: it is failed and says why, and when there is room it is asked for again.
#[test]
fn a_leg_that_found_no_room_is_asked_for_again() {
    if !can_mount("a_leg_that_found_no_room_is_asked_for_again") {
        return;
    }
    let (mut daemon, _) = full_disk();
    daemon.forget_args();
    daemon.arg_disk("vm0", "direct=off");
    daemon.restart();
    let small = daemon.path("small");
    let _mount = Mount::tmpfs(&small, "1m");
    let leg = small.join("leg.raw");
    let output = cli_within(&daemon, &["disk", "mirror", "vm0", leg.to_str().unwrap(), "--wait"], *PATIENCE);
    let output = output.expect("the command ends when the leg has failed");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("No space"), "{told}");
    run("mount", &["-o", "remount,size=100m", small.to_str().unwrap()]);
    mirror(&daemon, &leg).ok();
    in_sync(&daemon);
    daemon.client("vm0").flush();
    assert_eq!(raw(&leg), raw(&daemon.image("vm0")));
    assert_no_job_stays(&daemon);
}

/// A synchronisation that the user stopped stays stopped, whatever ends the daemon, until it is resumed.
#[test]
fn a_stopped_synchronisation_stays_stopped() {
    let (mut daemon, leg) = full_disk();
    let body = json!({ "path": leg }).to_string();
    slowed(&daemon, "mirror", ("POST", "/v1/disks/vm0/mirror", &body), true);
    for how in ["stop", "kill"] {
        match how {
            "stop" => daemon.stop(),
            _ => daemon.kill(),
        }
        daemon.start();
        let found = of_mirror(&daemon);
        let states: Vec<_> = found.iter().map(|job| job["state"].as_str().unwrap()).collect();
        assert_eq!(states, ["stopped"], "after a {how}: {found:?}");
        assert_eq!(legs(&daemon)[1].1, "resynchronising", "after a {how}");
    }
    let id = of_mirror(&daemon)[0]["id"].clone();
    daemon.send("PATCH", &format!("/v1/jobs/{id}"), r#"{"delay_ms":0}"#).ok();
    daemon.send("POST", &format!("/v1/jobs/{id}/resume"), "").ok();
    in_sync(&daemon);
    daemon.client("vm0").flush();
    assert_eq!(raw(&leg), raw(&daemon.image("vm0")));
}

/// Asking for a leg whose synchronisation is stopped goes on with it.
#[test]
fn a_stopped_synchronisation_goes_on_when_its_leg_is_asked_for() {
    let (daemon, leg) = full_disk();
    let body = json!({ "path": leg }).to_string();
    let id = slowed(&daemon, "mirror", ("POST", "/v1/disks/vm0/mirror", &body), true);
    daemon.send("PATCH", &format!("/v1/jobs/{id}"), r#"{"delay_ms":0}"#).ok();
    mirror(&daemon, &leg).ok();
    in_sync(&daemon);
    assert_no_job_stays(&daemon);
}

/// A leg is let go in the middle of its synchronisation: of the job nothing is left that could only stay.
#[test]
fn a_leg_that_is_let_go_takes_its_job_with_it() {
    for stop in [false, true] {
        let (mut daemon, leg) = full_disk();
        let body = json!({ "path": leg }).to_string();
        slowed(&daemon, "mirror", ("POST", "/v1/disks/vm0/mirror", &body), stop);
        daemon.send("DELETE", "/v1/disks/vm0/mirror", "").ok();
        assert_eq!(legs(&daemon), [], "stopped before: {stop}");
        for job in of_mirror(&daemon) {
            let resumed = daemon.send("POST", &format!("/v1/jobs/{}/resume", job["id"]), "");
            assert!(resumed.status >= 400, "stopped before: {stop}: {}", resumed.body);
        }
        assert_no_job_stays(&daemon);
        daemon.kill();
        daemon.start();
        assert_eq!((legs(&daemon).len(), of_mirror(&daemon).len()), (0, 0), "stopped before: {stop}");
        assert_eq!(daemon.client("vm0").tag(SIZE as usize / 512 - 1), 7);
    }
}
