//! What is changed through the API of things that are there: settings, snapshots of one cut, what is not served; and lists
//! in pages.

use serde_json::{Value, json};

use crate::client::{Client, tags};
use crate::harness::{Daemon, wait_until};

const SIZE: u64 = 1 << 20;

#[track_caller]
fn set(daemon: &Daemon, disk: &str, body: &Value) -> Value {
    daemon.send("PATCH", &format!("/v1/disks/{disk}"), &body.to_string()).ok().json()
}

fn detail(answer: &crate::harness::Answer) -> String {
    answer.json()["detail"].as_str().unwrap().to_owned()
}

#[test]
fn settings_count_for_what_comes_next_and_are_remembered() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let too_many = || Client::connect(&daemon.socket("vm0"), 3, false);
    assert!(too_many().is_err());
    let mut guest = daemon.client("vm0");
    guest.write(0..8, 1);
    let events = daemon.events();
    let body = json!({ "queues": 3, "durability": "power", "background_bytes": 0, "serial": "ANOTHER" });
    let disk = set(&daemon, "vm0", &body);
    body.as_object().unwrap().iter().for_each(|(key, value)| assert_eq!(disk[key], *value));
    events.wait_for("DISK_CHANGED", "vm0");
    // The guest that is connected notices nothing, and the next one has what was set.
    guest.write(8..16, 2);
    drop(guest);
    daemon.client_with_queues("vm0", 3).write(16..24, 3);
    assert_eq!(daemon.snap("a")["durability"], "power");

    // Nothing is said of them at the next start; after a kill as well.
    daemon.restart();
    assert_eq!(daemon.show_disk("vm0"), {
        let mut disk = disk.clone();
        (disk["snapshots"], disk["epoch"]) = (json!(1), daemon.show_disk("vm0")["epoch"].clone());
        (disk["connected"], disk["frontends"], disk["frontend_pids"]) = (json!(false), json!(0), json!([]));
        disk["allocated_bytes"] = daemon.show_disk("vm0")["allocated_bytes"].clone();
        disk
    });
    set(&daemon, "vm0", &json!({ "queues": 2 }));
    daemon.kill();
    daemon.start();
    let disk = daemon.show_disk("vm0");
    assert_eq!((&disk["queues"], &disk["serial"]), (&json!(2), &json!("ANOTHER")));
    // The same configuration again is no change, and what it says beats what was set.
    let path = disk["path"].as_str().unwrap().to_owned();
    assert_eq!(daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": path }).to_string()).status, 200);
    let other = json!({ "path": path, "queues": 1 }).to_string();
    assert_eq!(daemon.send("PUT", "/v1/disks/vm0", &other).refused(), "disk-exists");
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk("vm0", "queues=1");
    daemon.start();
    let disk = daemon.show_disk("vm0");
    assert_eq!(
        (&disk["queues"], &disk["serial"], &disk["durability"]),
        (&json!(1), &json!("ANOTHER"), &json!("power"))
    );
    // What was beaten is not set any more.
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk("vm0", "");
    daemon.start();
    assert_eq!(daemon.show_disk("vm0")["queues"], 1);
    assert_eq!(tags(&daemon.content("vm0"))[..24], [[1; 8], [2; 8], [3; 8]].concat());
}

#[test]
fn a_disk_becomes_read_only_for_the_next_guest() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut guest = daemon.client("vm0");
    guest.write(0..8, 1);
    assert_eq!(set(&daemon, "vm0", &json!({ "readonly": true }))["readonly"], true);
    guest.write(0..8, 2);
    drop(guest);
    assert!(Client::connect(&daemon.socket("vm0"), 1, false).is_err(), "a guest may write");
    assert_eq!(daemon.reader("vm0").tag(7), 2);
    // Its image is still open to be written.
    set(&daemon, "vm0", &json!({ "readonly": false }));
    daemon.client("vm0").write(0..8, 3);
    set(&daemon, "vm0", &json!({ "readonly": true }));
    daemon.restart();
    let refused = daemon.send("PATCH", "/v1/disks/vm0", r#"{"readonly":false}"#);
    assert_eq!(refused.refused(), "unsupported");
    assert!(refused.json()["action"].as_str().unwrap().contains("readonly=off"));
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk("vm0", "readonly=off");
    daemon.start();
    daemon.client("vm0").write(8..16, 4);

    // What still has to be written to its image is in the way.
    daemon
        .send("POST", "/v1/snapshots", r#"{"name":"log","disks":["vm0"],"strategy":"write-logging","wait":true}"#)
        .ok();
    let refused = daemon.send("PATCH", "/v1/disks/vm0", r#"{"readonly":true}"#);
    assert_eq!(refused.refused(), "disk-busy");
    assert!(detail(&refused).contains("in a log"));
    daemon.delete("vm0@log");
    set(&daemon, "vm0", &json!({ "readonly": true }));
}

#[test]
fn a_volume_is_set_as_a_disk_is() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0"}"#).ok();
    let volume = daemon.send("PATCH", "/v1/volumes/clone", r#"{"queues":2}"#).ok().json();
    assert_eq!(volume["queues"], 2);
    daemon.client_with_queues("clone", 2).write(0..8, 1);
    assert_eq!(daemon.send("PATCH", "/v1/volumes/clone", r#"{"readonly":true}"#).refused(), "unsupported");
    assert_eq!(daemon.send("PATCH", "/v1/disks/clone", r#"{"queues":1}"#).refused(), "disk-not-found");
    daemon.restart();
    assert_eq!(daemon.get("/v1/volumes/clone").json()["queues"], 2);
    daemon.client_with_queues("clone", 2).write(8..16, 2);
}

#[test]
fn the_snapshots_of_a_cut_go_together_or_not_at_all() {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    let group = daemon.snapshot("daily", &["vm0", "vm1"])[0]["group"].as_str().unwrap().to_owned();
    let target = format!("/v1/snapshots?group={group}");
    daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm1@daily"}"#).ok();
    let reader = daemon.reader("vm0@daily");
    let refused = daemon.send("DELETE", &target, "");
    assert_eq!(refused.refused(), "snapshot-busy");
    let why = detail(&refused);
    assert!(why.contains("vm0@daily is being read") && why.contains("vm1@daily is needed by volume clone"), "{why}");
    assert_eq!(daemon.snapshots().len(), 2);
    // With one of them out of the way it is still none.
    drop(reader);
    wait_until("the reader has left", || detail(&daemon.send("DELETE", &target, "")).matches("vm0@daily").count() == 0);
    assert_eq!(daemon.snapshots().len(), 2);
    daemon.send("DELETE", "/v1/volumes/clone", "").ok();
    let gone = daemon.send("DELETE", &target, "");
    let each = |name: &str| json!({ "snapshot": name, "state": "deleted", "problem": null });
    assert_eq!((gone.status, gone.json()), (200, json!([each("vm0@daily"), each("vm1@daily")])), "{gone:?}");
    assert_eq!(daemon.send("DELETE", &target, "").refused(), "snapshot-not-found");
    daemon.assert_only_disks_left();
}

#[test]
fn lists_come_in_pages() {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    ["c", "a", "b"].iter().for_each(|name| drop(daemon.snapshot(name, &["vm1", "vm0"])));
    let names = |text: &[u8]| -> Vec<String> {
        let list: Vec<Value> = serde_json::from_slice(text).unwrap();
        list.iter().map(|s| format!("{}@{}", s["disk"].as_str().unwrap(), s["name"].as_str().unwrap())).collect()
    };
    let mut all = Vec::new();
    loop {
        let after = all.last().map_or(String::new(), |last| format!("--after={last}"));
        let more = ["snapshot", "list", "--json", "--limit", "2", &after];
        let page = names(&daemon.cli(&more[..if after.is_empty() { 5 } else { 6 }]).stdout);
        if page.is_empty() {
            break;
        }
        assert!(page.len() == 2, "{page:?}");
        all.extend(page);
    }
    assert_eq!(all, ["vm0@a", "vm0@b", "vm0@c", "vm1@a", "vm1@b", "vm1@c"]);
    let filtered = daemon.cli(&["snapshot", "list", "--json", "--disk", "vm1", "--name", "[ab]"]);
    assert_eq!(filtered.status.code(), Some(2));
    let filtered = daemon.cli(&["snapshot", "list", "--json", "--disk", "*1", "--state", "quiesced", "--name", "?"]);
    assert_eq!(names(&filtered.stdout), ["vm1@c", "vm1@a", "vm1@b"]);
    assert_eq!(daemon.get("/v1/disks?name=vm0").json()[0]["name"], "vm0");
}

#[test]
fn a_disk_whose_image_is_gone_is_listed_until_it_is_back_or_forgotten() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let image = daemon.make_image("vm1", SIZE);
    let config = json!({ "path": image, "queues": 2 }).to_string();
    assert_eq!(daemon.send("PUT", "/v1/disks/vm1", &config).status, 201);
    let id = daemon.show_disk("vm1")["id"].clone();
    daemon.client("vm1").write(0..8, 1);
    daemon.snapshot("a", &["vm1"]);
    daemon.client("vm1").write(0..8, 2);
    daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm1@a"}"#).ok();
    assert_eq!(daemon.send("POST", "/v1/disks/vm1/forget", "").refused(), "disk-busy");
    daemon.stop();
    let aside = daemon.path("aside.raw");
    std::fs::rename(&image, &aside).unwrap();
    daemon.start();
    let disk = daemon.show_disk("vm1");
    assert_eq!((&disk["state"], &disk["id"], &disk["queues"]), (&json!("unserved"), &id, &json!(2)));
    assert_eq!((&disk["size_bytes"], &disk["snapshots"]), (&json!(0), &json!(1)));
    assert!(disk["reason"].as_str().unwrap().contains("vm1.raw"), "{disk}");
    assert_eq!(daemon.get("/v1/disks?state=unserved").json(), json!([disk]));
    let unserved = daemon.get("/v1/status").json()["unserved"].clone();
    let names: Vec<_> = unserved.as_array().unwrap().iter().map(|u| u["name"].clone()).collect();
    assert_eq!(names, ["clone", "vm1"], "also what stands on it");
    assert_eq!(daemon.send("PATCH", "/v1/disks/vm1", r#"{"queues":1}"#).refused(), "disk-failed");
    let refused = daemon.send("POST", "/v1/snapshots", r#"{"name":"b","disks":["vm1"]}"#);
    assert_eq!(refused.refused(), "disk-failed");
    assert!(detail(&refused).contains("disk vm1 is not served"), "{refused:?}");
    // What stands on its snapshot keeps it.
    for (method, target) in [("POST", "/v1/disks/vm1/forget"), ("DELETE", "/v1/disks/vm1?force=true")] {
        let refused = daemon.send(method, target, "");
        assert_eq!(refused.refused(), "disk-busy");
        assert!(detail(&refused).contains("volume clone"), "{refused:?}");
    }
    // It is served again when its image is back, with all that it had.
    daemon.stop();
    std::fs::rename(&aside, &image).unwrap();
    daemon.start();
    assert_eq!(daemon.show_disk("vm1")["state"], "serving");
    assert_eq!(tags(&daemon.content("vm1@a"))[..8], [1; 8]);

    daemon.stop();
    std::fs::rename(&image, &aside).unwrap();
    daemon.start();
    daemon.send("DELETE", "/v1/volumes/clone", "").ok();
    assert_eq!(daemon.send("DELETE", "/v1/disks/vm1", "").refused(), "disk-busy");
    assert_eq!(daemon.send("POST", "/v1/disks/vm1/forget", "").status, 204);
    assert_eq!(daemon.get("/v1/disks/vm1").refused(), "disk-not-found");
    daemon.assert_only_disks_left();
    daemon.restart();
    daemon.assert_only_disks_left();
    assert!(aside.exists());
}
