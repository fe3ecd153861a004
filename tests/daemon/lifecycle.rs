//! Disks and snapshots come and go: names, places, holders, and what is refused.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{Client, tags};
use crate::harness::{Daemon, names_in, run, wait_until};

const SIZE: u64 = 1 << 20;

#[test]
fn a_second_daemon_is_told_who_has_the_state_directory() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..10, 1);
    let refusal = daemon.refused_start();
    assert!(refusal.contains("is in use by another halfsilver"), "{refusal}");
    assert!(refusal.contains(&format!("process {}", daemon.pid())), "{refusal}");
    assert!(refusal.contains("--state-dir"), "{refusal}");
    // The first one did not notice.
    assert_eq!(daemon.client("vm0").tag(9), 1);
    daemon.snap("a");
    daemon.kill();
    daemon.start();
    daemon.stop();
}

#[test]
fn a_second_daemon_is_told_who_has_the_run_directory() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..2048, 1);
    daemon.snap("a");
    client.write(100..200, 2);
    drop(client);
    let mut other = daemon.beside_in_run_dir("other");
    other.make_image("vm1", SIZE);
    other.arg_disk("vm1", "");
    let refusal = other.refused_start();
    let run_dir = daemon.run_dir().display().to_string();
    assert!(refusal.contains(&format!("{run_dir} is in use by another halfsilver")), "{refusal}");
    assert!(refusal.contains(&format!("process {}", daemon.pid())), "{refusal}");
    assert!(refusal.contains("--run-dir"), "{refusal}");
    // What the first one has there is not taken for what somebody left.
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.state("vm0@a"), "quiesced", "{}", daemon.show("vm0@a"));
    assert_eq!(tags(&daemon.content("vm0@a")), vec![1; 2048]);
    assert_eq!(tags(&daemon.content("vm0"))[99..201], [vec![1], vec![2; 100], vec![1]].concat());
    // One that is left by a stop may be had.
    daemon.stop();
    other.start();
    other.stop();
}

#[test]
fn two_snapshots_of_one_name() {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    let a = daemon.snap("a");
    assert_eq!(daemon.api().create("a", &["vm0"], &json!({})).refused(), "snapshot-exists");
    // A group is taken whole or not at all.
    let images = names_in(&daemon.state_dir().join("images"));
    assert_eq!(daemon.api().create("a", &["vm1", "vm0"], &json!({})).refused(), "snapshot-exists");
    assert_eq!(daemon.snapshots().len(), 1);
    assert_eq!(names_in(&daemon.state_dir().join("images")), images);
    assert_eq!(daemon.show("vm0@a")["id"], a["id"]);
    // The same name on another disk is another snapshot.
    daemon.snapshot("a", &["vm1"]);
    for reference in ["vm0@a", "vm1@a"] {
        daemon.delete(reference);
    }
    daemon.assert_only_disks_left();
}

#[test]
fn a_group_that_cannot_be_taken_leaves_nothing() {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    std::fs::write(daemon.snapshot_image("vm1@a"), "in the way").unwrap();
    let refused = daemon.api().create("a", &["vm0", "vm1"], &json!({}));
    assert_eq!(refused.refused(), "conflict");
    assert!(refused.body.contains("vm1@a"), "{}", refused.body);
    assert_eq!(daemon.snapshots(), Vec::<Value>::new());
    assert_eq!(std::fs::read(daemon.snapshot_image("vm1@a")).unwrap(), b"in the way");
    std::fs::remove_file(daemon.snapshot_image("vm1@a")).unwrap();
    // A dangling link is in the way too, and is not followed.
    std::os::unix::fs::symlink("elsewhere", daemon.snapshot_image("vm1@a")).unwrap();
    assert_eq!(daemon.api().create("a", &["vm0", "vm1"], &json!({})).refused(), "conflict");
    std::fs::remove_file(daemon.snapshot_image("vm1@a")).unwrap();
    daemon.assert_only_disks_left();
    daemon.snapshot("a", &["vm0", "vm1"]);
}

#[test]
fn a_snapshot_that_is_read_goes_only_by_force() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..100, 1);
    daemon.snap("a");
    let mut reader = daemon.reader("vm0@a");
    assert_eq!(reader.tag(5), 1);
    let events = daemon.events();
    assert_eq!(daemon.send("DELETE", "/v1/snapshots/vm0@a", "").refused(), "snapshot-busy");
    assert_eq!(reader.tag(99), 1);
    let output = daemon.cli(&["snapshot", "delete", "vm0@a"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(daemon.cli(&["snapshot", "delete", "vm0@a", "--force"]).status.success());
    events.wait_for("SNAPSHOT_DELETED", "vm0@a");
    // Nobody answers any more, and certainly not with other bytes.
    reader.queues[0].submit_read(0, 0..8);
    assert!(reader.queues[0].answers(Duration::from_millis(300)).iter().all(|(_, ret)| *ret != 0));
    drop(reader);
    client.write(0..100, 2);
    daemon.assert_only_disks_left();
}

#[test]
fn force_deletes_under_the_hands_of_busy_readers() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..2048, 1);
    for round in 0..10 {
        daemon.snap("a");
        daemon.snap("b");
        client.write(0..1000, 1);
        let mut reader = daemon.reader("vm0@a");
        for slot in 0..16 {
            reader.queues[0].submit_read(slot, slot * 64..slot * 64 + 400);
        }
        let gone = daemon.send("DELETE", "/v1/snapshots/vm0@a?force=true", "");
        gone.ok();
        for (slot, ret) in reader.queues[0].answers(Duration::ZERO) {
            let is_right = |bytes: &[u8]| tags(bytes) == vec![1; 400];
            assert!(ret != 0 || is_right(reader.queues[0].bytes(slot, 400 * 512)), "round {round}");
        }
        drop(reader);
        assert_eq!(tags(&daemon.content("vm0@b")), vec![1; 2048]);
        daemon.delete("vm0@b");
    }
    daemon.assert_only_disks_left();
}

#[test]
fn a_snapshot_cannot_be_opened_for_writing() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.snap("a");
    let refused = Client::connect(&daemon.socket("vm0@a"), 1, false).err().unwrap();
    assert!(refused.contains("read-only"), "{refused}");
    assert_eq!(tags(&daemon.content("vm0@a")), vec![0; 2048]);
}

#[test]
fn disks_come_and_go_while_the_daemon_runs() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let image = daemon.make_image("vm1", SIZE);
    let config = json!({ "path": image }).to_string();
    daemon.send("PUT", "/v1/disks/vm1", &config).ok();
    assert_eq!(daemon.send("PUT", "/v1/disks/vm1", &config).status, 200);
    let other = json!({ "path": image, "queues": 2 }).to_string();
    assert_eq!(daemon.send("PUT", "/v1/disks/vm1", &other).refused(), "disk-exists");
    let mut client = daemon.client("vm1");
    client.write(0..10, 7);
    assert_eq!(daemon.send("DELETE", "/v1/disks/vm1", "").refused(), "disk-busy");
    daemon.snapshot("a", &["vm1"]);
    drop(client);
    wait_until("it to be free", || daemon.show_disk("vm1")["frontends"] == 0);
    assert_eq!(daemon.send("DELETE", "/v1/disks/vm1", "").refused(), "disk-busy");
    daemon.send("DELETE", "/v1/disks/vm1?force=true", "").ok();
    daemon.assert_only_disks_left();
    // Its image stays, unlocked and with what was written.
    assert_eq!(tags(&std::fs::read(&image).unwrap())[..11], [[7; 10].as_slice(), &[0]].concat());
    run("qemu-io", &["-f", "raw", "-c", "write -P 3 0 4096", image.to_str().unwrap()]);
    daemon.send("PUT", "/v1/disks/vm1", &other).ok();
    assert_eq!(daemon.client("vm1").tag(0), 0x0303_0303_0303_0303);
}

#[test]
fn a_disk_that_goes_while_its_snapshot_drains_does_not_come_back() {
    let mut daemon = Daemon::with_disks(&[SIZE], "shared=on");
    let image = daemon.make_image("vm1", SIZE);
    daemon.send("PUT", "/v1/disks/vm1", &json!({ "path": image, "shared": true }).to_string()).ok();
    let old = daemon.client("vm1");
    daemon.api().create("a", &["vm1"], &json!({ "writers": "connection" })).ok();
    assert_eq!(daemon.state("vm1@a"), "draining");
    daemon.send("DELETE", "/v1/disks/vm1?force=true", "").ok();
    drop(old);
    // Whoever waited for the snapshot has found it gone when all threads have ended.
    daemon.restart();
    assert_eq!(daemon.send("GET", "/v1/disks/vm1", "").status, 404);
    daemon.assert_only_disks_left();
}

#[test]
fn what_is_in_a_sockets_place_is_left_alone() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let path = daemon.path("in-the-way");
    std::fs::write(&path, "mine").unwrap();
    let create = |daemon: &Daemon| daemon.api().create("a", &["vm0"], &json!({ "socket": path }));
    assert_eq!(create(&daemon).refused(), "conflict");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    std::fs::remove_file(&path).unwrap();
    create(&daemon).ok();
    wait_until("the snapshot", || daemon.state("vm0@a") == "quiesced");
    // A snapshot is whole without its socket, and says what is in the way.
    daemon.stop();
    std::fs::write(&path, "mine").unwrap();
    daemon.start();
    assert_eq!(daemon.state("vm0@a"), "quiesced");
    let shown = daemon.show("vm0@a");
    assert!(shown["reason"].as_str().unwrap().contains("not a socket"), "{shown}");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    // After it was moved away, a restart opens it.
    std::fs::remove_file(&path).unwrap();
    daemon.restart();
    assert_eq!(daemon.show("vm0@a")["reason"], Value::Null);
    drop(Client::connect(&path, 1, true).unwrap());
    // So for a disk: nothing is started over it.
    daemon.stop();
    std::fs::write(daemon.socket("vm0"), "mine").unwrap();
    let refusal = daemon.refused_start();
    assert!(refusal.contains("not a socket"), "{refusal}");
    assert_eq!(std::fs::read(daemon.socket("vm0")).unwrap(), b"mine");
    std::fs::remove_file(daemon.socket("vm0")).unwrap();
    // The start that was refused has not cost the snapshot.
    daemon.start();
    assert_eq!(daemon.state("vm0@a"), "quiesced");
}

#[test]
fn what_it_makes_belongs_to_its_user_alone() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.snap("a");
    let mode = |path: &std::path::Path| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    for dir in [daemon.state_dir(), daemon.run_dir(), daemon.state_dir().join("images")] {
        assert_eq!(mode(&dir), 0o700, "{}", dir.display());
    }
    for file in [daemon.socket("vm0"), daemon.socket("vm0@a"), daemon.socket("control"), daemon.snapshot_image("vm0@a")]
    {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
}

#[test]
fn a_start_that_fails_halfway_costs_no_snapshot() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..10, 1);
    daemon.snap("a");
    daemon.client("vm0").write(0..10, 2);
    daemon.stop();
    let mut other = daemon.beside("d");
    other.arg_disk("vm0", "");
    other.arg_disk_at("vm1", &daemon.path("missing.raw"), "");
    let refusal = other.refused_start();
    assert!(refusal.contains("missing.raw"), "{refusal}");
    daemon.start();
    assert_eq!(daemon.state("vm0@a"), "quiesced");
    assert_eq!(daemon.reader("vm0@a").tag(9), 1);
}

#[test]
fn the_service_manager_is_told_when_it_serves_and_when_it_stops() {
    let dir = tempfile::tempdir().unwrap();
    let manager = std::os::unix::net::UnixDatagram::bind(dir.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    let told = || {
        let mut message = [0; 256];
        let len = manager.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..len]).trim().to_owned()
    };
    let mut daemon = crate::harness::command(env!("CARGO_BIN_EXE_halfsilver"))
        .arg("serve")
        .args(["--state-dir", "state", "--run-dir", "run", "--control", "control"])
        .current_dir(dir.path())
        .env("NOTIFY_SOCKET", dir.path().join("notify"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(told(), "READY=1");
    // Told means served: the control socket answers already.
    std::os::unix::net::UnixStream::connect(dir.path().join("control")).unwrap();
    // SAFETY: kill touches no memory; the child is ours and has not been waited for.
    assert_eq!(unsafe { libc::kill(daemon.id() as i32, libc::SIGTERM) }, 0);
    assert_eq!(told(), "STOPPING=1");
    assert!(daemon.wait().unwrap().success());
}
