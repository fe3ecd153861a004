//! Commands that wait, and those that change what is there, through the binary: they end when it can be used, or with the
//! reason why it cannot, or when they have waited long enough.

use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use halfsilver::control::Service;
use halfsilver::control::api::{JobState, LegState, SnapshotState};
use serde_json::{Value, json};

use crate::cli::one_line;
use crate::fake::name;
use crate::rig::{PATIENCE, Rig};

fn begin(rig: &Rig, line: &str) -> Child {
    rig.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn until(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < PATIENCE, "it does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a command says that must end with 1 by itself.
#[track_caller]
fn ends(mut child: Child) -> String {
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it waits for ever");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    one_line(&child.wait_with_output().unwrap())
}

fn object(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn who_has_waited_long_enough_says_how_far_it_is() {
    let rig = Rig::with_snapshot("write-logging");
    rig.fake.add_job(3);
    let output = rig.run("job wait 3 --wait-timeout 1 --json");
    assert_eq!(object(&output)["state"], "running");
    let said = one_line(&output);
    assert!(said.contains("job 3: not done within 1 s: job 3 is at 8% of 12.3 MiB, 1 min 30 s left; "), "{said}");
    assert!(said.ends_with("halfsilver job wait 3\n"), "{said}");

    let output = rig.run("snapshot create weekly --disk vm1 --disk vm2 --wait --wait-timeout 0 --json");
    assert_eq!((&object(&output)[1]["disk"], &object(&output)[1]["state"]), (&json!("vm2"), &json!("draining")));
    let said = one_line(&output);
    assert!(
        said.contains("not done within 0 s: vm1@weekly is draining, requests of before the cut still run; "),
        "{said}"
    );
    assert!(said.contains("halfsilver snapshot list --state draining"), "{said}");
    let said = rig.fails("snapshot cutover vm1@weekly --wait --wait-timeout 0s");
    assert!(said.contains("not done within 0 s: vm1@weekly is draining"), "{said}");

    rig.fake.quiesce("vm1@daily");
    let said = rig.fails("snapshot delete vm1@daily --wait --wait-timeout 1");
    assert!(said.contains("deletion of vm1@daily: not done within 1 s: job 3 is at 8%"), "{said}");
    let said = rig.fails("disk mirror vm2 b.raw --wait --wait-timeout 1");
    assert!(said.contains("mirroring vm2: not done within 1 s: job 9 is at 8%"), "{said}");
    let said = rig.fails("disk restore vm1 --from vm1@daily --wait --wait-timeout 1");
    assert!(said.contains("not done within 1 s: job 10 is at 8%"), "{said}");
    rig.done("volume create clone --from vm2");
    assert!(rig.fails("volume complete clone --wait --wait-timeout 1").contains("job 11 is at 8%"));
    assert!(rig.fails("volume update clone --wait --wait-timeout 1").contains("job 12 is at 8%"));
    for line in [
        "job wait 3 --wait-timeout soon",
        "job wait 3 --wait-timeout 5x",
        "job wait 3 --wait-timeout -1",
        "snapshot delete vm1@daily --wait-timeout 1",
        "disk mirror vm1 c.raw --wait-timeout 1m",
    ] {
        assert_eq!(rig.run(line).status.code(), Some(2), "{line}");
    }
}

#[test]
fn a_daemon_that_does_not_answer_is_not_waited_for_longer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let rig = Rig::new();
    let begun = Instant::now();
    let said =
        rig.fails(&format!("snapshot create daily --disk vm1 --wait --wait-timeout 1 --control {}", path.display()));
    assert!(said.contains("did not answer within"), "{said}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    drop(listener);
}

#[test]
fn a_snapshot_that_nobody_can_read_is_not_done() {
    let rig = Rig::with_disks();
    let child = begin(&rig, "snapshot create daily --disk vm1 --wait --json");
    until(|| rig.fake.has("vm1@daily"));
    rig.fake.quiesce_without_socket("vm1@daily");
    let said = ends(child);
    assert!(said.contains("snapshot vm1@daily is whole, and has no socket: its socket is\\nin use; "), "{said}");

    let child = begin(&rig, "snapshot create weekly --disk vm1 --wait");
    until(|| rig.fake.has("vm1@weekly"));
    rig.fake.forget("vm1@weekly");
    assert!(ends(child).contains("snapshot vm1@weekly was deleted meanwhile"));
}

#[test]
fn a_mirror_whose_job_has_failed_is_not_waited_for() {
    let rig = Rig::with_disks();
    let child = begin(&rig, "disk mirror vm1 b.raw --wait");
    until(|| rig.fake.get_job(9).is_ok());
    rig.fake.set_job(9, JobState::Failed, Some("I/O error"));
    let said = ends(child);
    assert!(said.contains("job 9 failed: I/O error; mend that and go on with it: halfsilver job resume 9"), "{said}");
    // The leg has not changed, and asking again starts nothing: at once the same.
    assert!(ends(begin(&rig, "disk mirror vm1 b.raw --wait")).contains("job 9 failed: I/O error"));

    rig.fake.unmirror_disk(&name("vm1"), None).unwrap();
    let child = begin(&rig, "disk mirror vm1 b.raw --wait");
    until(|| rig.fake.get_disk(&name("vm1")).unwrap().legs.len() == 2);
    rig.fake.unmirror_disk(&name("vm1"), None).unwrap();
    assert!(ends(child).contains("b.raw of disk vm1 was let go meanwhile; add it again"));

    // No job, and no end in sight.
    rig.done("disk mirror vm2 b.raw");
    rig.fake.set_job(9, JobState::Done, None);
    rig.fake.set_second_leg("vm2", LegState::Resynchronising);
    assert!(ends(begin(&rig, "disk mirror vm2 b.raw --wait")).contains("no job synchronises it; add it again"));
}

#[test]
fn a_deletion_whose_job_has_failed_is_not_waited_for() {
    let rig = Rig::with_snapshot("write-logging");
    rig.fake.quiesce("vm1@daily");
    rig.fake.add_job(3);
    let child = begin(&rig, "snapshot delete vm1@daily --wait");
    let daily = "vm1@daily".parse().unwrap();
    until(|| rig.fake.get_snapshot(&daily).unwrap().state == SnapshotState::Folding);
    rig.fake.set_job(3, JobState::Failed, Some("no space"));
    assert!(ends(child).contains("job 3 failed: no space; "));
}

#[test]
fn a_cut_is_deleted_as_a_whole() {
    let rig = Rig::with_disks();
    let made = rig.json("snapshot create log --disk vm1 --disk vm2 --strategy write-logging --json");
    let group = made[0]["group"].as_str().unwrap();
    let refused = rig.fails(&format!("snapshot delete --group {group}"));
    assert!(refused.contains("none is deleted: snapshot vm1@log is draining"), "{refused}");
    ["vm1@log", "vm2@log"].iter().for_each(|snapshot| rig.fake.settle(snapshot));
    let list = rig.done(&format!("snapshot list --group {group}"));
    assert_eq!(list.lines().count(), 3, "{list}");

    let child = begin(&rig, &format!("snapshot delete --group {group} --wait --json"));
    until(|| rig.fake.get_snapshot(&"vm2@log".parse().unwrap()).unwrap().state == SnapshotState::Folding);
    ["vm1@log", "vm2@log"].iter().for_each(|snapshot| rig.fake.forget(snapshot));
    let output = child.wait_with_output().unwrap();
    let each = |name: &str| json!({ "snapshot": name, "state": "deleted", "problem": null });
    assert_eq!((output.status.code(), object(&output)), (Some(0), json!([each("vm1@log"), each("vm2@log")])));
    for line in ["snapshot delete", "snapshot delete --group x", &format!("snapshot delete vm1@a --group {group}")] {
        assert_eq!(rig.run(line).status.code(), Some(2), "{line}");
    }
}

#[test]
fn settings_are_set() {
    let rig = Rig::with_disks();
    let set = rig.json("disk set vm1 --queues 4 --durability power --background off --readonly on --serial S --json");
    assert_eq!((&set["queues"], &set["durability"], &set["background_bytes"]), (&json!(4), &json!("power"), &json!(0)));
    assert_eq!((&set["readonly"], &set["serial"]), (&json!(true), &json!("S")));
    assert_eq!(rig.json("disk set vm1 --readonly off --background 256K --json")["background_bytes"], 256 << 10);
    rig.done("volume create clone --from vm1");
    assert_eq!(rig.json("volume set clone --queues 2 --json")["queues"], 2);
    assert!(rig.fails("disk set vm9 --queues 2").contains("there is no disk vm9; "));
    for line in [
        "disk set vm1",
        "disk set vm1 --queues 17",
        "disk set vm1 --readonly maybe",
        "disk set vm1 --readonly",
        "disk set vm1 --background 5000",
        "disk set vm1 --serial 123456789012345678901",
        "disk set vm1 --durability for-ever",
        "volume set clone",
        "volume set clone --readonly on",
    ] {
        assert_eq!(rig.run(line).status.code(), Some(2), "{line}");
    }
}

#[test]
fn disks_and_volumes_are_renamed() {
    let rig = Rig::with_disks();
    assert_eq!(rig.json("disk rename vm1 web --json")["name"], "web");
    rig.done("volume create clone --from vm2");
    assert_eq!(rig.json("volume rename clone seat --force --json")["name"], "seat");
    assert!(rig.fails("disk rename vm1 x").contains("there is no disk vm1; "));
    for line in ["disk rename vm2", "disk rename vm2 X", "volume rename seat ../x"] {
        assert_eq!(rig.run(line).status.code(), Some(2), "{line}");
    }
}

#[test]
fn what_is_not_served_is_shown_and_forgotten() {
    let rig = Rig::with_disks();
    assert!(rig.fails("disk forget vm1").contains("disk vm1 is served; "));
    rig.fake.lose("vm1", "cannot open\n/images/vm1.raw");
    rig.fake.claim("snapshot create", "vm2", Some("its log"));
    let status = rig.done("status");
    assert!(status.contains("NOT SERVED  REASON\nvm1         cannot open\\n/images/vm1.raw\n"), "{status}");
    assert!(status.contains("UNDER WAY        ON   ") && status.contains("snapshot create  vm2  "), "{status}");
    assert!(rig.done("disk show vm1").contains("state       unserved\n"));
    assert_eq!(rig.json("disk list --state unserved --json")[0]["name"], "vm1");
    assert_eq!(rig.json("disk forget vm1 --json"), json!({ "name": "vm1", "state": "forgotten" }));
    assert!(rig.fails("disk show vm1").contains("there is no disk vm1; "));
}

#[test]
fn lists_say_that_they_go_on() {
    let rig = Rig::with_disks();
    let page = rig.done("disk list --limit 1");
    assert!(page.starts_with("DISK ") && page.ends_with("\nthere are more: --after vm1\n"), "{page}");
    assert_eq!(rig.json("disk list --limit 1 --after vm1 --json")[0]["name"], "vm2");
    assert!(!rig.done("disk list --after vm1").contains("there are more"));
    assert_eq!(rig.json("disk list --name v?2 --json").as_array().unwrap().len(), 1);
    rig.done("snapshot create daily --disk vm1 --disk vm2");
    assert_eq!(rig.json("snapshot list --disk vm2 --state draining --json")[0]["disk"], "vm2");
    assert_eq!(rig.json("snapshot list --after vm1@daily --json")[0]["disk"], "vm2");
    rig.fake.add_job(3);
    assert_eq!(rig.json("job list --kind merge --json"), json!([]));
    assert_eq!(rig.json("job list --kind fold --after 2 --limit 5 --json")[0]["id"], 3);
    assert_eq!(rig.json("volume list --state serving --json"), json!([]));
    assert_eq!(rig.json("bookmark list --disk vm* --json"), json!([]));
    for line in ["disk list --limit 0", "disk list --name VM", "job list --after x", "snapshot list --state asleep"] {
        assert_eq!(rig.run(line).status.code(), Some(2), "{line}");
    }
}
