//! What is changed of things that are there: settings, groups of snapshots, what is remembered and not served; and waiting,
//! with a bound.

use std::time::{Duration, Instant};

use halfsilver::control::EventKind;
use halfsilver::control::api::SnapshotState;
use serde_json::{Value, json};

use crate::exchange::{listen, read_until};
use crate::rig::Rig;

#[test]
fn settings_are_changed_one_by_one() {
    let rig = Rig::with_disks();
    let before = rig.get("/v1/disks/vm1").json();
    let mut stream = listen(&rig.path);
    let set = rig.send("PATCH", "/v1/disks/vm1", r#"{"queues":4,"durability":"power"}"#);
    assert_eq!(set.status, 200);
    assert_eq!(read_until(&mut stream, "event:"), "event: DISK_CHANGED");
    let mut expected = before.clone();
    (expected["queues"], expected["durability"]) = (json!(4), json!("power"));
    assert_eq!(set.json(), expected);
    let body = r#"{"background_bytes":0,"readonly":true,"serial":"S"}"#;
    let set = rig.send("PATCH", "/v1/disks/vm1", body).json();
    assert_eq!((&set["background_bytes"], &set["readonly"], &set["serial"]), (&json!(0), &json!(true), &json!("S")));
    assert_eq!((&set["queues"], &set["durability"]), (&json!(4), &json!("power")));
    assert_eq!(rig.get("/v1/disks/vm1").json(), set);

    for body in [
        "{}",
        r#"{"queues":0}"#,
        r#"{"queues":17}"#,
        r#"{"background_bytes":1}"#,
        r#"{"serial":""}"#,
        r#"{"durability":"for-ever"}"#,
        r#"{"path":"/other"}"#,
        r#"{"block_size":65536}"#,
    ] {
        assert_eq!(rig.refused("PATCH", "/v1/disks/vm1", body)["code"], "invalid-request", "{body}");
        assert_eq!(rig.refused("PATCH", "/v1/volumes/clone", body)["code"], "invalid-request", "{body}");
    }
    assert_eq!(rig.refused("PATCH", "/v1/disks/vm9", r#"{"queues":1}"#)["code"], "disk-not-found");
    assert_eq!(rig.refused("PATCH", "/v1/volumes/vm9", r#"{"queues":1}"#)["code"], "volume-not-found");
    assert_eq!(rig.post("/v1/volumes", r#"{"name":"clone","from":"vm1"}"#).status, 201);
    assert_eq!(rig.send("PATCH", "/v1/volumes/clone", r#"{"queues":3}"#).json()["queues"], 3);
    assert_eq!(rig.refused("PATCH", "/v1/volumes/clone", r#"{"readonly":true}"#)["code"], "unsupported");
}

#[test]
fn a_disk_grows() {
    let rig = Rig::with_snapshot("copy-on-write");
    let size = rig.get("/v1/disks/vm1").json()["size_bytes"].as_u64().unwrap();
    let mut stream = listen(&rig.path);
    let body = |bytes: u64| json!({ "size_bytes": bytes }).to_string();
    let grown = rig.send("PUT", "/v1/disks/vm1/size", &body(size + 512));
    assert_eq!((grown.status, &grown.json()["size_bytes"]), (200, &json!(size + 512)));
    assert_eq!(read_until(&mut stream, "event:"), "event: DISK_RESIZED");
    for (bytes, what) in [(0, "sector"), (size + 513, "multiple of 512"), (size, "shrink")] {
        let refused = rig.refused("PUT", "/v1/disks/vm1/size", &body(bytes));
        assert_eq!(refused["code"], "invalid-request");
        assert!(refused["detail"].as_str().unwrap().contains(what), "{refused}");
    }
    assert_eq!(rig.refused("PUT", "/v1/disks/vm1/size", "{}")["code"], "invalid-request");
    assert_eq!(rig.refused("PUT", "/v1/disks/web/size", &body(size))["code"], "disk-not-found");
}

#[test]
fn a_disk_gets_another_name() {
    let rig = Rig::with_snapshot("copy-on-write");
    let id = rig.get("/v1/disks/vm1").json()["id"].clone();
    let mut stream = listen(&rig.path);
    let renamed = rig.post("/v1/disks/vm1/rename", r#"{"name":"web"}"#);
    assert_eq!((renamed.status, &renamed.json()["name"], &renamed.json()["id"]), (200, &json!("web"), &id));
    assert_eq!(read_until(&mut stream, "event:"), "event: DISK_RENAMED");
    assert_eq!(rig.get("/v1/snapshots/web@daily").json()["disk"], "web");
    assert_eq!(rig.refused("GET", "/v1/disks/vm1", "")["code"], "disk-not-found");
    assert_eq!(rig.refused("POST", "/v1/disks/web/rename", r#"{"name":"vm2"}"#)["code"], "disk-exists");
    assert_eq!(rig.refused("POST", "/v1/disks/web/rename", r#"{"name":"../x"}"#)["code"], "invalid-name");
    assert_eq!(rig.refused("POST", "/v1/disks/web/rename", "{}")["code"], "invalid-request");
    assert_eq!(rig.refused("POST", "/v1/volumes/web/rename", r#"{"name":"x"}"#)["code"], "volume-not-found");
}

#[test]
fn what_is_not_served_is_listed_and_can_be_forgotten() {
    let rig = Rig::with_disks();
    assert_eq!(rig.refused("POST", "/v1/disks/vm1/forget", "")["code"], "disk-busy");
    rig.fake.lose("vm1", "cannot open /images/vm1.raw");
    let disk = rig.get("/v1/disks/vm1").json();
    assert_eq!((&disk["state"], &disk["reason"]), (&json!("unserved"), &json!("cannot open /images/vm1.raw")));
    assert_eq!((&disk["size_bytes"], &disk["path"]), (&json!(0), &json!("/images/vm1.raw")));
    let status = rig.get("/v1/status").json();
    assert_eq!(status["disks"][0], disk);
    let unserved = json!([{ "name": "vm1", "id": disk["id"], "reason": "cannot open /images/vm1.raw" }]);
    assert_eq!(status["unserved"], unserved);
    let gone = rig.post("/v1/disks/vm1/forget", "");
    assert_eq!((gone.status, gone.body.as_str()), (204, ""));
    assert_eq!(rig.refused("POST", "/v1/disks/vm1/forget", "")["code"], "disk-not-found");
    assert_eq!(rig.get("/v1/status").json()["unserved"], json!([]));
}

#[test]
fn what_is_under_way_is_said() {
    let rig = Rig::with_disks();
    assert_eq!(rig.get("/v1/status").json()["claims"], json!([]));
    rig.fake.claim("disk remove", "vm1", Some("the requests in flight"));
    let claims = rig.get("/v1/status").json()["claims"].clone();
    assert_eq!((&claims[0]["operation"], &claims[0]["entities"]), (&json!("disk remove"), &json!(["vm1"])));
    assert_eq!(claims[0]["waits_for"], "the requests in flight");
    assert!(claims[0]["since"].is_string() && claims[1] == Value::Null);
}

#[test]
fn all_snapshots_of_a_cut_go_or_none() {
    let rig = Rig::with_disks();
    let body = r#"{"name":"daily","disks":["vm1","vm2"]}"#;
    let group = rig.post("/v1/snapshots", body).json()[0]["group"].as_str().unwrap().to_owned();
    rig.fake.settle("vm1@daily");
    let target = format!("/v1/snapshots?group={group}");
    let problem = rig.refused("DELETE", &target, "");
    assert_eq!(problem["code"], "snapshot-busy");
    assert!(problem["detail"].as_str().unwrap().contains("vm2@daily"), "{problem}");
    assert!(rig.fake.has("vm1@daily") && rig.fake.has("vm2@daily"));

    rig.fake.settle("vm2@daily");
    let gone = rig.send("DELETE", &format!("{target}&keep-bookmark=true"), "");
    let each = |name: &str| json!({ "snapshot": name, "state": "deleted", "problem": null });
    assert_eq!((gone.status, gone.json()), (200, json!([each("vm1@daily"), each("vm2@daily")])));
    assert_eq!(rig.get("/v1/bookmarks").json().as_array().unwrap().len(), 2);
    assert_eq!(rig.refused("DELETE", &target, "")["code"], "snapshot-not-found");
    for query in ["", "?group=x", "?force=true", &format!("?group={group}&keep-image=true")] {
        assert_eq!(rig.refused("DELETE", &format!("/v1/snapshots{query}"), "")["code"], "invalid-request", "{query}");
    }

    let body = r#"{"name":"log","disks":["vm1","vm2"],"strategy":"write-logging"}"#;
    let group = rig.post("/v1/snapshots", body).json()[0]["group"].as_str().unwrap().to_owned();
    let begun = rig.send("DELETE", &format!("/v1/snapshots?group={group}&force=true"), "");
    assert_eq!((begun.status, &begun.json()[1]["state"]), (202, &json!("folding")));
}

#[test]
fn the_daemon_waits_no_longer_than_it_is_told() {
    let rig = Rig::with_disks();
    let asked = Instant::now();
    let body = r#"{"name":"daily","disks":["vm1"],"wait":true,"wait_timeout_ms":100}"#;
    let created = rig.post("/v1/snapshots", body);
    assert_eq!((created.status, &created.json()[0]["state"]), (201, &json!("draining")));
    let cut = rig.post("/v1/snapshots/vm1@daily/cutover?wait=true&wait_timeout_ms=100", "");
    assert_eq!((cut.status, &cut.json()["state"]), (200, &json!("draining")));
    assert!(asked.elapsed() >= Duration::from_millis(200));

    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| rig.post("/v1/snapshots/vm1@daily/cutover?wait=true&wait_timeout_ms=20000", ""));
        rig.fake.move_to("vm1@daily", SnapshotState::Quiesced, EventKind::SnapshotQuiesced);
        assert_eq!(waiting.join().unwrap().json()["state"], "quiesced");
    });
    for body in [
        r#"{"name":"x","disks":["vm1"],"wait_timeout_ms":1}"#,
        r#"{"name":"x","disks":["vm1"],"wait":true,"wait_timeout_ms":-1}"#,
    ] {
        assert_eq!(rig.refused("POST", "/v1/snapshots", body)["code"], "invalid-request");
    }
    let target = "/v1/snapshots/vm1@daily/cutover?wait_timeout_ms=5";
    assert_eq!(rig.refused("POST", target, "")["code"], "invalid-request");
}
