//! Every route, and every way to be refused.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use halfsilver::control::api::{DiskConfig, JobState, LegState, SnapshotState, Strategy};
use halfsilver::control::{EventKind, Service};
use serde_json::{Value, json};

use crate::exchange::{listen, read_until};
use crate::fake::name;
use crate::rig::Rig;

const VM1: &str = r#"{"path":"/images/vm1.raw"}"#;

#[test]
fn version_and_status() {
    let rig = Rig::with_snapshot("copy-on-write");
    let version = rig.get("/v1/version");
    assert_eq!((version.status, version.header("content-type")), (200, Some("application/json")));
    assert_eq!(version.json()["strategies"], json!(["copy-on-write", "write-logging", "write-mirroring"]));
    let status = rig.get("/v1/status").json();
    assert_eq!((&status["state"], &status["version"]), (&json!("serving"), &version.json()));
    assert_eq!(status["disks"], rig.get("/v1/disks").json());
    assert_eq!(status["snapshots"], rig.get("/v1/snapshots").json());
    assert_eq!(status["jobs"], json!([]));
}

#[test]
fn a_disk_comes_and_goes() {
    let rig = Rig::new();
    assert_eq!(rig.get("/v1/disks").body, "[]");
    let created = rig.send("PUT", "/v1/disks/vm1", VM1);
    assert_eq!(created.status, 201);
    let disk = created.json();
    for key in "id name path socket size_bytes block_size queues direct readonly serial state reason connected \
        frontends epoch snapshots allocated_bytes shared durability background_bytes legs"
        .split_whitespace()
    {
        assert!(disk.get(key).is_some(), "{key} in {disk}");
    }
    let again = rig.send("PUT", "/v1/disks/vm1", VM1);
    assert_eq!((again.status, again.json()), (200, disk.clone()));
    assert_eq!(rig.refused("PUT", "/v1/disks/vm1", r#"{"path":"/other.raw"}"#)["code"], "disk-exists");
    assert_eq!(rig.get("/v1/disks/vm1").json(), disk);
    assert_eq!(rig.get("/v1/disks").json(), json!([disk]));

    let gone = rig.send("DELETE", "/v1/disks/vm1", "");
    assert_eq!((gone.status, gone.body.as_str()), (204, ""));
    assert_eq!(rig.refused("GET", "/v1/disks/vm1", "")["code"], "disk-not-found");
    assert_eq!(rig.refused("DELETE", "/v1/disks/vm1", "")["code"], "disk-not-found");
}

#[test]
fn a_disk_with_snapshots_needs_force() {
    let rig = Rig::with_snapshot("copy-on-write");
    assert_eq!(rig.refused("DELETE", "/v1/disks/vm1", "")["code"], "disk-busy");
    assert_eq!(rig.refused("DELETE", "/v1/disks/vm1?force=maybe", "")["code"], "invalid-request");
    assert_eq!(rig.refused("DELETE", "/v1/disks/vm1?froce=true", "")["code"], "invalid-request");
    assert_eq!(rig.send("DELETE", "/v1/disks/vm1?force=true", "").status, 204);
}

#[test]
fn a_snapshot_comes_and_goes() {
    let rig = Rig::with_disks();
    let body = r#"{"name":"daily","disks":["vm2","vm1"],"strategy":"copy-on-write","writers":"request"}"#;
    let created = rig.post("/v1/snapshots", body);
    assert_eq!(created.status, 201);
    let snapshots = created.json();
    assert_eq!((&snapshots[0]["disk"], &snapshots[1]["disk"]), (&json!("vm2"), &json!("vm1")));
    assert_eq!(snapshots[0]["group"], snapshots[1]["group"]);
    for key in "id disk name strategy writers state reason epoch socket image block_size owned_bytes size_bytes \
        created_at quiesced_at group old_frontends durability"
        .split_whitespace()
    {
        assert!(snapshots[0].get(key).is_some(), "{key} in {snapshots}");
    }
    assert_eq!(snapshots[0]["state"], "draining");
    assert_eq!(rig.refused("POST", "/v1/snapshots", body)["code"], "snapshot-exists");
    assert_eq!(rig.get("/v1/snapshots").json(), snapshots);
    assert_eq!(rig.get("/v1/snapshots/vm1@daily").json(), snapshots[1]);
    assert_eq!(rig.get("/v1/snapshots/vm1%40daily").json(), snapshots[1]);

    assert_eq!(rig.refused("DELETE", "/v1/snapshots/vm1@daily", "")["code"], "snapshot-busy");
    assert_eq!(rig.send("DELETE", "/v1/snapshots/vm1@daily?force=true", "").status, 204);
    assert_eq!(rig.refused("GET", "/v1/snapshots/vm1@daily", "")["code"], "snapshot-not-found");
    assert_eq!(rig.refused("DELETE", "/v1/snapshots/vm1@daily", "")["code"], "snapshot-not-found");
}

#[test]
fn a_log_is_folded_after_the_answer() {
    let rig = Rig::with_snapshot("write-logging");
    rig.fake.quiesce("vm1@daily");
    let answer = rig.send("DELETE", "/v1/snapshots/vm1@daily", "");
    assert_eq!((answer.status, &answer.json()["state"]), (202, &json!("folding")));
}

#[test]
fn a_second_leg_comes_and_goes() {
    let rig = Rig::with_disks();
    let (mirror, leg) = ("/v1/disks/vm1/mirror", r#"{"path":"/images/b.raw"}"#);
    assert_eq!(rig.get("/v1/disks/vm1").json()["legs"], json!([]));
    assert_eq!(rig.refused("DELETE", mirror, "")["code"], "no-second-leg");

    let begun = rig.post(mirror, leg);
    assert_eq!(begun.status, 202);
    let legs = json!([
        { "path": "/images/vm1.raw", "state": "in-sync", "reason": null, "remaining_bytes": 0 },
        { "path": "/images/b.raw", "state": "resynchronising", "reason": null, "remaining_bytes": 1 << 30 },
    ]);
    assert_eq!(begun.json()["legs"], legs);
    let jobs = rig.get("/v1/jobs").json();
    assert_eq!((&jobs[0]["kind"], &jobs[0]["snapshot"], &jobs[1]), (&json!("mirror"), &Value::Null, &Value::Null));
    assert_eq!(rig.post(mirror, leg).status, 202);
    assert_eq!(rig.refused("POST", mirror, r#"{"path":"/images/c.raw"}"#)["code"], "conflict");
    let snapshot = r#"{"name":"daily","disks":["vm1"],"strategy":"write-mirroring"}"#;
    assert_eq!(rig.refused("POST", "/v1/snapshots", snapshot)["code"], "mirror-not-in-sync");
    assert_eq!(rig.refused("DELETE", &format!("{mirror}?leg=/images/vm1.raw"), "")["code"], "mirror-not-in-sync");

    let mut stream = listen(&rig.path);
    rig.fake.set_second_leg("vm1", LegState::Failed);
    let event: Value = serde_json::from_str(read_until(&mut stream, "data:").strip_prefix("data:").unwrap()).unwrap();
    assert_eq!((&event["event"], &event["leg"]), (&json!("LEG_FAILED"), &json!("/images/b.raw")));
    assert_eq!(rig.post(mirror, r#"{"path":"/images/c.raw"}"#).json()["legs"][1]["path"], "/images/c.raw");
    rig.fake.set_second_leg("vm1", LegState::InSync);
    assert_eq!(read_until(&mut stream, "event: LEG"), "event: LEG_IN_SYNC");
    assert_eq!(rig.post(mirror, r#"{"path":"/images/c.raw"}"#).status, 200);
    assert_eq!(rig.post("/v1/snapshots", snapshot).status, 201);

    assert_eq!(rig.refused("DELETE", &format!("{mirror}?leg=/images/b.raw"), "")["code"], "invalid-request");
    let single = rig.send("DELETE", &format!("{mirror}?leg=%2Fimages%2Fvm1.raw"), "");
    assert_eq!((single.status, &single.json()["legs"]), (200, &json!([])));
    assert_eq!(single.json()["path"], "/images/c.raw");
}

#[test]
fn wrong_legs_are_refused() {
    let rig = Rig::with_disks();
    for body in ["", "{}", r#"{"path":"b.raw"}"#, r#"{"path":"/b.raw","leg":1}"#, r#"{"path":"/b\u0000"}"#] {
        assert_eq!(rig.refused("POST", "/v1/disks/vm1/mirror", body)["code"], "invalid-request", "{body}");
    }
    for query in ["leg=b.raw", "leg=", "path=/b.raw"] {
        let problem = rig.refused("DELETE", &format!("/v1/disks/vm1/mirror?{query}"), "");
        assert_eq!(problem["code"], "invalid-request", "{query}");
    }
    assert_eq!(rig.refused("POST", "/v1/disks/vm9/mirror", r#"{"path":"/b"}"#)["code"], "disk-not-found");
    assert_eq!(rig.refused("DELETE", "/v1/disks/vm9/mirror", "")["code"], "disk-not-found");

    for (body, detail) in [
        (r#"{"path":"/p","mirror":"q"}"#, "mirror: \"q\" is not an absolute path"),
        (r#"{"path":"/p/q","mirror":"/p/./q"}"#, "mirror: /p/./q is the disk's path already"),
        (r#"{"path":"/p","mirror":"/q","readonly":true}"#, "mirror: a disk with readonly=on cannot have one"),
    ] {
        assert_eq!(rig.refused("PUT", "/v1/disks/vm3", body)["detail"], detail);
    }
    let mirrored = rig.send("PUT", "/v1/disks/vm3", r#"{"path":"/p","mirror":"/q","shared":true}"#).json();
    assert_eq!((&mirrored["shared"], &mirrored["legs"][1]["path"]), (&json!(true), &json!("/q")));
    assert_eq!(mirrored["legs"][1]["state"], "in-sync");
}

#[test]
fn old_frontends_are_cut_over() {
    let rig = Rig::with_disks();
    let cutover = "/v1/snapshots/vm1@daily/cutover";
    assert_eq!(rig.refused("POST", cutover, "")["code"], "snapshot-not-found");
    let created = rig.post("/v1/snapshots", r#"{"name":"daily","disks":["vm1"],"writers":"connection"}"#);
    assert_eq!(created.json()[0]["old_frontends"], 2);
    assert_eq!(rig.refused("POST", &format!("{cutover}?wait=x"), "")["code"], "invalid-request");
    assert_eq!(rig.refused("POST", "/v1/snapshots/vm1/cutover", "")["code"], "invalid-name");

    let mut stream = listen(&rig.path);
    let moved = rig.post(cutover, "");
    assert_eq!((moved.status, &moved.json()["old_frontends"]), (200, &json!(0)));
    assert_eq!(moved.json()["state"], "draining");
    assert_eq!(read_until(&mut stream, "event:"), "event: SNAPSHOT_CUTOVER");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| rig.post(&format!("{cutover}?wait=true"), ""));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        rig.fake.quiesce("vm1@daily");
        assert_eq!(waiting.join().unwrap().json()["state"], "quiesced");
    });
    assert_eq!(rig.post(cutover, "").status, 200);
    rig.fake.move_to("vm1@daily", SnapshotState::Broken, EventKind::SnapshotBroken);
    assert_eq!(rig.refused("POST", cutover, "")["code"], "snapshot-broken");
}

#[test]
fn the_image_of_a_split_leg_goes_back_or_is_kept() {
    for keep in [false, true] {
        let rig = Rig::with_disks();
        assert_eq!(rig.post("/v1/disks/vm1/mirror", r#"{"path":"/images/b.raw"}"#).status, 202);
        rig.fake.set_second_leg("vm1", LegState::InSync);
        let body = r#"{"name":"daily","disks":["vm1"],"strategy":"write-mirroring"}"#;
        assert_eq!(rig.post("/v1/snapshots", body).status, 201);
        rig.fake.quiesce("vm1@daily");
        assert_eq!(rig.send("DELETE", &format!("/v1/snapshots/vm1@daily?keep-image={keep}"), "").status, 204);
        assert_eq!(rig.get("/v1/jobs/8").status, if keep { 404 } else { 200 });
    }
    for strategy in ["copy-on-write", "write-logging"] {
        let rig = Rig::with_snapshot(strategy);
        let problem = rig.refused("DELETE", "/v1/snapshots/vm1@daily?keep-image=true&force=true", "");
        assert_eq!(problem["code"], "invalid-request");
        assert!(problem["detail"].as_str().unwrap().starts_with("keep-image: snapshot vm1@daily is "), "{problem}");
        assert_eq!(rig.refused("DELETE", "/v1/snapshots/vm1@daily?keep_image=true", "")["code"], "invalid-request");
    }
    // It means nothing for a disk.
    assert_eq!(Rig::with_disks().refused("DELETE", "/v1/disks/vm1?keep-image=true", "")["code"], "invalid-request");
}

#[test]
fn jobs_are_paced_stopped_and_resumed() {
    let rig = Rig::new();
    assert_eq!(rig.get("/v1/jobs").body, "[]");
    rig.fake.add_job(3);
    assert_eq!(rig.get("/v1/jobs").json()[0]["id"], 3);
    assert_eq!(rig.get("/v1/jobs/3").json()["delay_ms"], 5);
    let patched = rig.send("PATCH", "/v1/jobs/3", r#"{"delay_ms":20}"#);
    assert_eq!((patched.status, &patched.json()["delay_ms"]), (200, &json!(20)));
    let patched = rig.send("PATCH", "/v1/jobs/3", r#"{"bytes_per_second":4096}"#).json();
    assert_eq!((&patched["delay_ms"], &patched["bytes_per_second"]), (&json!(20), &json!(4096)), "the rest stays");
    assert_eq!(patched["percent"], 8);
    for body in [
        r#"{"delay_ms":-1}"#,
        r#"{"bytes_per_second":-1}"#,
        r#"{"delay_ms":3600001}"#,
        r#"{"delay":1}"#,
        "{}",
        "[]",
        "",
    ] {
        assert_eq!(rig.refused("PATCH", "/v1/jobs/3", body)["code"], "invalid-request", "{body}");
    }
    let stopped = rig.send("DELETE", "/v1/jobs/3", "");
    assert_eq!((stopped.status, &stopped.json()["state"]), (200, &json!("stopped")));
    assert_eq!(rig.get("/v1/jobs/3").json(), stopped.json());
    let unfinished = rig.refused("DELETE", "/v1/jobs/3", "");
    assert_eq!(
        (&unfinished["code"], &unfinished["action"]),
        (&json!("conflict"), &json!("resume it: halfsilver job resume 3"))
    );
    for _ in 0..2 {
        let resumed = rig.post("/v1/jobs/3/resume", "");
        assert_eq!((resumed.status, &resumed.json()["state"]), (200, &json!("running")));
        assert_eq!(resumed.json()["estimated_seconds"], 90);
    }
    rig.fake.set_job(3, JobState::Done, None);
    assert_eq!(rig.refused("POST", "/v1/jobs/3/resume", "")["code"], "conflict");
    assert_eq!(rig.send("DELETE", "/v1/jobs/3", "").status, 204);
    assert_eq!(rig.refused("POST", "/v1/jobs/3/resume", "")["code"], "job-not-found");
    for (method, body) in [("GET", ""), ("DELETE", ""), ("PATCH", r#"{"delay_ms":1}"#)] {
        for id in ["3", "x", "-1", "99999999999999999999999"] {
            assert_eq!(rig.refused(method, &format!("/v1/jobs/{id}"), body)["code"], "job-not-found");
        }
    }
}

#[test]
fn bad_names_are_refused_everywhere() {
    let rig = Rig::with_disks();
    let too_long = "x".repeat(65);
    for bad in ["..", ".", "VM1", "%2e%2e", "a%2Fb", "a%00", "vm_1", "%C3%A9", "%ff", &too_long] {
        for method in ["GET", "DELETE"] {
            assert_eq!(rig.refused(method, &format!("/v1/disks/{bad}"), "")["code"], "invalid-name", "{bad}");
        }
        assert_eq!(rig.refused("PUT", &format!("/v1/disks/{bad}"), VM1)["code"], "invalid-name");
        for snapshot in [format!("vm1@{bad}"), format!("{bad}@daily"), bad.to_owned()] {
            assert_eq!(rig.refused("GET", &format!("/v1/snapshots/{snapshot}"), "")["code"], "invalid-name");
            assert_eq!(rig.refused("DELETE", &format!("/v1/snapshots/{snapshot}"), "")["code"], "invalid-name");
        }
    }
    for bad in ["..", "", "VM1", "a/b", "a\0", "vm1@x", &too_long] {
        for body in [json!({ "name": bad, "disks": ["vm1"] }), json!({ "name": "daily", "disks": [bad] })] {
            assert_eq!(rig.refused("POST", "/v1/snapshots", &body.to_string())["code"], "invalid-name", "{body}");
        }
    }
    assert_eq!(rig.refused("GET", "/v1/disks/", "")["code"], "not-found");
    assert_eq!(rig.send("GET", &format!("/v1/disks/{}", "x".repeat(64)), "").status, 404);
}

#[test]
fn bad_bodies_are_refused_with_a_reason() {
    let rig = Rig::with_disks();
    rig.fake.forbid(Strategy::WriteLogging);
    for (body, code, detail) in [
        ("", "invalid-request", "EOF"),
        ("{", "invalid-request", "EOF"),
        ("[]", "invalid-request", "expected"),
        (r#"{"name":"a"}"#, "invalid-request", "missing field `disks`"),
        (r#"{"name":"a","disks":["vm1"],"stratgy":"x"}"#, "invalid-request", "unknown field `stratgy`"),
        (r#"{"name":"a","disks":["vm1"],"strategy":"cow"}"#, "invalid-request", "unknown variant `cow`"),
        (r#"{"name":"a","name":"b","disks":["vm1"]}"#, "invalid-request", "duplicate field"),
        (r#"{"name":"a","disks":["vm1"]} x"#, "invalid-request", "trailing"),
        (r#"{"name":"a","disks":[]}"#, "invalid-request", "at least one"),
        (r#"{"name":"a","disks":["vm1","vm1"]}"#, "invalid-request", "named twice"),
        (r#"{"name":"a","disks":["vm1","vm2"],"socket":"/s"}"#, "invalid-request", "socket"),
        (r#"{"name":"a","disks":["vm1","vm2"],"image":"/i"}"#, "invalid-request", "image"),
        (r#"{"name":"a","disks":["vm1"],"image":"i"}"#, "invalid-request", "not an absolute path"),
        (r#"{"name":"a","disks":["vm1"],"socket":"../s"}"#, "invalid-request", "not an absolute path"),
        (r#"{"name":"a","disks":["vm9"]}"#, "disk-not-found", "vm9"),
        (r#"{"name":"a","disks":["vm1"],"strategy":"write-logging"}"#, "unsupported", "write-logging"),
        (r#"{"name":"a","disks":["vm1"],"strategy":"write-mirroring"}"#, "no-second-leg", "vm1"),
    ] {
        let problem = rig.refused("POST", "/v1/snapshots", body);
        assert_eq!(problem["code"], code, "{body}: {problem}");
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{body}: {problem}");
    }
    let long_socket = json!({ "path": "/p", "socket": format!("/{}", "s".repeat(107)) }).to_string();
    for body in [
        r#"{"path":"relative.raw"}"#,
        r#"{"path":"/p","queues":0}"#,
        r#"{"path":"/p","queues":17}"#,
        r#"{"path":"/p","block_size":512}"#,
        r#"{"path":"/p","block-size":4096}"#,
        r#"{"path":"/p","serial":"123456789012345678901"}"#,
        r#"{"path":"/p","size":1}"#,
        r#"{"path":"/p\u0000"}"#,
        &long_socket,
    ] {
        assert_eq!(rig.refused("PUT", "/v1/disks/vm3", body)["code"], "invalid-request", "{body}");
    }
    assert!(rig.get("/v1/snapshots").json().as_array().unwrap().is_empty());
}

#[test]
fn oversize_bodies_are_refused() {
    let rig = Rig::with_disks();
    let padded = |len: usize| format!("{}{}", " ".repeat(len - VM1.len()), VM1);
    assert_eq!(rig.send("PUT", "/v1/disks/vm3", &padded(64 * 1024)).status, 201);
    for len in [64 * 1024 + 1, 1 << 20] {
        let problem = rig.refused("PUT", "/v1/disks/vm4", &padded(len));
        assert_eq!((&problem["code"], &problem["status"]), (&json!("body-too-large"), &json!(413)));
    }
}

#[test]
fn what_is_not_there() {
    let rig = Rig::new();
    for target in ["/", "/v1", "/v1/", "/v2/disks", "/v1/disks/vm1/x", "/v1/volumes/", "/metrics/x"] {
        assert_eq!(rig.refused("GET", target, "")["code"], "not-found", "{target}");
    }
    let answer = rig.send("POST", "/v1/disks/vm1", "{}");
    assert_eq!((answer.status, &answer.json()["code"]), (405, &json!("method-not-allowed")));
    let allowed = answer.header("allow").unwrap();
    assert!(["GET", "PUT", "DELETE"].iter().all(|method| allowed.contains(method)), "{allowed}");
}

#[test]
fn what_is_no_http_is_dropped() {
    let rig = Rig::new();
    for garbage in [&b"\x16\x03\x01\x02\x00\x01\x00"[..], b"GET\r\n\r\n", &[b'A'; 1 << 20]] {
        let mut stream = UnixStream::connect(&rig.path).unwrap();
        stream.set_read_timeout(Some(crate::rig::PATIENCE)).unwrap();
        stream.write_all(garbage).ok();
        stream.shutdown(std::net::Shutdown::Write).ok();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{answer:?}");
    }
    assert_eq!(rig.get("/v1/version").status, 200);
}

#[test]
fn events_are_streamed() {
    let rig = Rig::with_snapshot("copy-on-write");
    let mut stream = listen(&rig.path);
    rig.fake.quiesce("vm1@daily");
    let mut event = None;
    for _ in 0..3 {
        let line = read_line(&mut stream);
        match line.split_once(": ") {
            Some(("data", data)) => event = Some(serde_json::from_str::<Value>(data).unwrap()),
            Some(("event", kind)) => assert_eq!(kind, "SNAPSHOT_QUIESCED"),
            Some(("id", id)) => assert!(id.parse::<u64>().unwrap() > 0),
            other => panic!("{other:?}"),
        }
    }
    let event = event.unwrap();
    assert_eq!(event["event"], "SNAPSHOT_QUIESCED");
    assert_eq!((&event["disk"], &event["snapshot"]), (&json!("vm1"), &json!("daily")));

    rig.fake.move_to("vm1@daily", SnapshotState::Broken, EventKind::SnapshotBroken);
    assert_eq!(read_until(&mut stream, "event:"), "event: SNAPSHOT_BROKEN");
}

/// The next line that is not empty and no piece of the chunked encoding.
fn read_line(stream: &mut impl std::io::BufRead) -> String {
    loop {
        let mut line = String::new();
        assert!(stream.read_line(&mut line).unwrap() > 0);
        if line.contains(": ") {
            return line.trim_end().to_owned();
        }
    }
}

#[test]
fn a_slow_listener_is_told_what_it_missed() {
    let rig = Rig::with_snapshot("copy-on-write");
    let mut stream = listen(&rig.path);
    // More than the socket's buffers and the backlog hold together.
    let flood = || (0..20_000).for_each(|_| rig.fake.quiesce("vm1@daily"));
    flood();
    assert_eq!(rig.get("/v1/version").status, 200);
    let lagged = read_until(&mut stream, "event: LAGGED");
    assert_eq!(lagged, "event: LAGGED");
}

#[test]
fn waiting_ends_when_all_are_quiesced() {
    let rig = Rig::with_disks();
    let answer = std::thread::scope(|scope| {
        let body = r#"{"name":"daily","disks":["vm1","vm2"],"wait":true}"#;
        let waiting = scope.spawn(|| rig.post("/v1/snapshots", body));
        while !rig.fake.has("vm2@daily") {
            std::thread::sleep(Duration::from_millis(5));
        }
        rig.fake.quiesce("vm1@daily");
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        rig.fake.move_to("vm2@daily", SnapshotState::Broken, EventKind::SnapshotBroken);
        waiting.join().unwrap()
    });
    assert_eq!(answer.status, 201);
    let states: Vec<_> = answer.json().as_array().unwrap().iter().map(|snapshot| snapshot["state"].clone()).collect();
    assert_eq!(states, ["quiesced", "broken"]);
}

#[test]
fn waiting_ends_when_the_snapshot_or_the_server_goes() {
    let rig = Rig::with_disks();
    let wait = |disk: &str| {
        let body = json!({ "name": "daily", "disks": [disk], "wait": true }).to_string();
        rig.post("/v1/snapshots", &body).json()
    };
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wait("vm1"));
        while !rig.fake.has("vm1@daily") {
            std::thread::sleep(Duration::from_millis(5));
        }
        rig.fake.forget("vm1@daily");
        assert_eq!(waiting.join().unwrap()["code"], "snapshot-not-found");
    });
    let path = rig.path.clone();
    let waiting = std::thread::spawn(move || {
        crate::exchange::exchange(&path, "POST", "/v1/snapshots", br#"{"name":"b","disks":["vm1"],"wait":true}"#).json()
    });
    while !rig.fake.has("vm1@b") {
        std::thread::sleep(Duration::from_millis(5));
    }
    let start = Instant::now();
    rig.server.shutdown();
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(waiting.join().unwrap()["code"], "unavailable");
}

#[test]
fn metrics_are_what_prometheus_reads() {
    let rig = Rig::new();
    [3, 4].into_iter().for_each(|id| rig.fake.add_job(id));
    rig.fake.set_job(4, JobState::Done, None);
    let answer = rig.get("/metrics");
    assert!(answer.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    let mut names = Vec::new();
    for line in answer.body.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let (name, labels) = series.split_once('{').unwrap();
        assert!(labels.ends_with('}') && name.starts_with("halfsilver_"), "{line}");
        names.push(name.to_owned());
    }
    assert!(answer.body.ends_with("# EOF\n"));
    for line in [
        r#"halfsilver_requests_total{disk="vm1",direction="read"} 3"#,
        r#"halfsilver_requests_total{disk="vm1",direction="write_zeroes"} 0"#,
        r#"halfsilver_request_bytes_total{disk="vm1",direction="read"} 12288"#,
        r#"halfsilver_request_errors_total{disk="vm1",direction="read"} 1"#,
        r#"halfsilver_request_duration_seconds_count{disk="vm1",direction="read"} 3"#,
        r#"halfsilver_request_duration_seconds_sum{disk="vm1",direction="read"} 20.000101"#,
        r#"halfsilver_request_duration_seconds_bucket{le="0.000128",disk="vm1",direction="read"} 2"#,
        r#"halfsilver_request_duration_seconds_bucket{le="16.777216",disk="vm1",direction="read"} 2"#,
        r#"halfsilver_request_duration_seconds_bucket{le="+Inf",disk="vm1",direction="read"} 3"#,
        r#"halfsilver_frontends_connected{disk="vm1"} 2"#,
        r#"halfsilver_preserved_blocks_total{disk="vm1",snapshot="daily"} 7"#,
        r#"halfsilver_preserved_bytes_total{disk="vm1",snapshot="daily"} 28672"#,
        r#"halfsilver_drain_seconds{disk="vm1",snapshot="daily"} 0.5"#,
        r#"halfsilver_old_frontends{disk="vm1",snapshot="daily"} 2"#,
        r#"halfsilver_leg_state{disk="vm1",leg="/images/a.raw",state="in-sync"} 1"#,
        r#"halfsilver_leg_state{disk="vm1",leg="/images/a.raw",state="failed"} 0"#,
        r#"halfsilver_leg_state{disk="vm1",leg="/images/\"b\".raw",state="resynchronising"} 1"#,
        r#"halfsilver_leg_remaining_bytes{disk="vm1",leg="/images/\"b\".raw"} 4096"#,
        r#"halfsilver_job_done_bytes{job="3",kind="fold",disk="vm1"} 1048576"#,
        r#"halfsilver_job_total_bytes{job="3",kind="fold",disk="vm1"} 12897485"#,
        concat!(r#"halfsilver_build_info{version=""#, env!("CARGO_PKG_VERSION"), r#""} 1"#),
    ] {
        assert!(answer.body.lines().any(|other| other == line), "{line} in\n{}", answer.body);
    }
    assert!(!answer.body.contains(r#"job="4""#));
    assert!(!answer.body.contains(r#"halfsilver_drain_seconds{disk="vm1",snapshot="new"}"#));
}

#[test]
fn many_clients_at_once() {
    let rig = Rig::with_disks();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let rig = &rig;
            scope.spawn(move || {
                for round in 0..20 {
                    let body = json!({ "name": format!("s-{thread}-{round}"), "disks": ["vm1"] }).to_string();
                    assert_eq!(rig.post("/v1/snapshots", &body).status, 201);
                }
            });
        }
    });
    assert_eq!(rig.get("/v1/snapshots").json().as_array().unwrap().len(), 160);
    assert!(rig.fake.get_disk(&name("vm1")).is_ok());
    assert!(rig.fake.put_disk(&name("vm1"), &DiskConfig::new("/other")).is_err());
}
