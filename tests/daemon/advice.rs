//! Refusals list the commands that clear them: each of those succeeds, in its order, and then what was refused does. What can
//! never be done is said before what only stands in the way.

use serde_json::{Value, json};

use crate::asking::{cli_within, slowed};
use crate::harness::{Answer, Daemon, PATIENCE, wait_until};
use crate::mirror::{in_sync, legs, mirrored};

const SIZE: u64 = 4 << 20;

/// Carries out the commands of a refusal. Returns them.
#[track_caller]
fn cleared(daemon: &Daemon, ask: &dyn Fn() -> Answer) -> Vec<String> {
    let refused = ask();
    assert!(refused.status >= 400, "it is not refused: {}", refused.body);
    let problem = refused.json();
    let commands: Vec<String> = serde_json::from_value(problem["commands"].clone()).unwrap_or_default();
    assert!(!commands.is_empty(), "no command clears it: {problem}");
    for command in &commands {
        assert!(problem["action"].as_str().unwrap().contains(command), "{command} is not in the advice: {problem}");
        let words: Vec<&str> = command.split_whitespace().skip(1).collect();
        let output = cli_within(daemon, &words, *PATIENCE).unwrap_or_else(|| panic!("{command} does not end"));
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}, which {problem} advises, is refused: {told}");
    }
    let again = ask();
    assert!(again.status < 400, "after {commands:?}: {}", again.body);
    commands
}

fn snapshot(daemon: &Daemon, name: &str, strategy: &str) -> Answer {
    daemon.api().create(name, &["vm0"], &json!({ "strategy": strategy }))
}

fn mirror(daemon: &Daemon, name: &str) -> Answer {
    let leg = daemon.path(name);
    if !leg.exists() {
        std::fs::File::create(&leg).unwrap().set_len(8 << 20).unwrap();
    }
    daemon.send("POST", "/v1/disks/vm0/mirror", &json!({ "path": leg }).to_string())
}

fn make_volume(daemon: &Daemon, name: &str, from: &str) -> Answer {
    daemon.send("POST", "/v1/volumes", &json!({ "name": name, "from": from }).to_string())
}

#[test]
fn a_name_that_is_taken_is_cleared_with_all_that_needs_it() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.snap("a");
    make_volume(&daemon, "clone", "vm0@a").ok();
    daemon.api().create("b", &["clone"], &json!({ "wait": true })).ok();
    make_volume(&daemon, "other", "clone@b").ok();
    cleared(&daemon, &|| make_volume(&daemon, "clone", "vm0@a"));
    assert_eq!(daemon.get("/v1/volumes/other").status, 404);
    cleared(&daemon, &|| snapshot(&daemon, "a", "copy-on-write"));
    assert_eq!(daemon.get("/v1/volumes/clone").status, 404);
    // A volume off the present needs a snapshot of its name.
    cleared(&daemon, &|| make_volume(&daemon, "a", "vm0"));
    // What would go with it is not cleared: then only another name helps.
    make_volume(&daemon, "one", "vm0@a").ok();
    daemon.api().create("x", &["one"], &json!({ "wait": true })).ok();
    make_volume(&daemon, "two", "one@x").ok();
    let refused = daemon.send("POST", "/v1/volumes/two/rename", r#"{"name":"one"}"#);
    assert_eq!((refused.refused().as_str(), &refused.json()["commands"]), ("volume-exists", &Value::Null));
    assert_eq!(refused.json()["action"], "use another name");
}

#[test]
fn what_a_mirror_lacks_is_cleared() {
    let (daemon, leg) = mirrored();
    // Two good legs.
    cleared(&daemon, &|| mirror(&daemon, "third.raw"));
    in_sync(&daemon);
    // One that is synchronised for hours.
    daemon.client("vm0").write(0..4096, 1);
    daemon.send("DELETE", "/v1/disks/vm0/mirror", "").ok();
    let body = json!({ "path": leg }).to_string();
    slowed(&daemon, "mirror", ("POST", "/v1/disks/vm0/mirror", &body), false);
    let commands = cleared(&daemon, &|| mirror(&daemon, "fourth.raw"));
    assert!(commands[0].contains("--leg"), "{commands:?}");
    in_sync(&daemon);
    // A leg that a snapshot holds, through which another one reads.
    snapshot(&daemon, "old", "copy-on-write").ok();
    snapshot(&daemon, "split", "write-mirroring").ok();
    wait_until("the split to be quiesced", || daemon.state("vm0@split") == "quiesced");
    cleared(&daemon, &|| mirror(&daemon, "fifth.raw"));
    in_sync(&daemon);
    snapshot(&daemon, "split", "write-mirroring").ok();
    cleared(&daemon, &|| daemon.send("DELETE", "/v1/disks/vm0/mirror", ""));
    assert_eq!(legs(&daemon), []);
}

#[test]
fn a_split_of_a_mirror_that_is_behind_is_cleared() {
    let (daemon, leg) = mirrored();
    daemon.client("vm0").write(0..4096, 1);
    daemon.send("DELETE", "/v1/disks/vm0/mirror", "").ok();
    let body = json!({ "path": leg }).to_string();
    let job = slowed(&daemon, "mirror", ("POST", "/v1/disks/vm0/mirror", &body), true);
    let commands = cleared(&daemon, &|| snapshot(&daemon, "a", "write-mirroring"));
    let wanted = [format!("halfsilver job set {job} "), "halfsilver disk mirror vm0 ".to_owned()];
    assert!(commands.iter().zip(&wanted).all(|(command, wanted)| command.starts_with(wanted)), "{commands:?}");
    wait_until("it to be quiesced", || daemon.state("vm0@a") == "quiesced");
    // The leg that one snapshot has no other one gets.
    cleared(&daemon, &|| snapshot(&daemon, "b", "write-mirroring"));
    let refused = daemon.send("DELETE", "/v1/disks/vm0/mirror?leg=/nowhere", "");
    assert!(refused.json()["action"].as_str().unwrap().contains(leg.to_str().unwrap()), "{}", refused.body);
}

#[test]
fn a_disk_that_is_added_otherwise_says_in_what() {
    let mut daemon = Daemon::place();
    daemon.start();
    daemon.make_image("vm0", SIZE);
    daemon.make_image("vm1", SIZE);
    let add = |disk: &str, more: Value| {
        let mut body = json!({ "path": daemon.image(disk) });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        daemon.send("PUT", "/v1/disks/vm0", &body.to_string())
    };
    add("vm0", json!({})).ok();
    let refused = add("vm0", json!({ "queues": 4, "readonly": true }));
    let detail = refused.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("queues is 1, not 4") && detail.contains("readonly is off, not on"), "{detail}");
    cleared(&daemon, &|| add("vm0", json!({ "queues": 4, "readonly": true })));
    daemon.send("PATCH", "/v1/disks/vm0", r#"{"readonly":false}"#).ok();
    daemon.snap("a");
    make_volume(&daemon, "clone", "vm0@a").ok();
    let refused = add("vm1", json!({}));
    let detail = refused.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("path is") && detail.contains("vm1.raw"), "{detail}");
    cleared(&daemon, &|| add("vm1", json!({})));
    // An image that another disk has is that one's.
    let refused = daemon.send("PUT", "/v1/disks/vm2", &json!({ "path": daemon.image("vm1") }).to_string());
    assert_eq!(refused.refused(), "conflict");
    assert!(refused.body.contains("the image of disk vm0"), "{}", refused.body);
}

#[test]
fn a_job_that_goes_slowly_is_hurried() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.snap("a");
    daemon.client("vm0").write(0..8192, 1);
    let body = json!({ "from": "vm0@a" }).to_string();
    let restore = || daemon.send("POST", "/v1/disks/vm0/restore", &body);
    slowed(&daemon, "restore", ("POST", "/v1/disks/vm0/restore", &body), false);
    let commands = cleared(&daemon, &restore);
    assert!(commands[0].starts_with("halfsilver job set "), "{commands:?}");
}

#[test]
fn what_can_never_be_is_said_first() {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    daemon.api().create("a", &["vm1"], &json!({ "wait": true })).ok();
    let _guest = daemon.client("vm0");
    for from in ["vm1@a", "vm1", "vm0"] {
        let refused = daemon.send("POST", "/v1/disks/vm0/restore", &json!({ "from": from }).to_string());
        assert_eq!(refused.refused(), "invalid-request", "from {from}");
        assert!(!refused.body.contains("disconnect"), "{}", refused.body);
    }
}

#[test]
fn a_disk_is_not_taken_for_a_volume_and_a_socket_has_one_owner() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let asked = [
        ("GET", "/v1/volumes/vm0"),
        ("GET", "/v1/volumes/vm0/map"),
        ("GET", "/v1/volumes/vm0/status"),
        ("DELETE", "/v1/volumes/vm0"),
        ("POST", "/v1/volumes/vm0/promote"),
    ];
    for (method, path) in asked {
        let refused = daemon.send(method, path, "");
        assert_eq!(refused.refused(), "volume-not-found", "{method} {path}");
        assert!(refused.body.contains("vm0 is a disk, not a volume"), "{method} {path}: {}", refused.body);
    }
    daemon.snap("a");
    for socket in [daemon.socket("vm0"), daemon.socket("vm0@a")] {
        let body = json!({ "name": "clone", "from": "vm0@a", "socket": socket }).to_string();
        assert_eq!(daemon.send("POST", "/v1/volumes", &body).refused(), "conflict");
        let answer = daemon.api().create("b", &["vm0"], &json!({ "socket": socket }));
        assert_eq!(answer.refused(), "conflict");
    }
}
