//! What is remembered and cannot be served: it is listed and says why, it ends no start, nothing of it is lost or taken for
//! something else; when what it lacks is back it is served again, and whoever does not want it any more can have it
//! forgotten.

use std::cell::Cell;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use redb::{Database, ReadableTable, TableDefinition};
use serde_json::{Value, json};

use crate::asking::{cli_within, follow_advice, start_if_it_can};
use crate::client::tags;
use crate::harness::{Answer, Daemon, PATIENCE, can_mount, names_in, wait_until};
use crate::independent::{image_of, post, wait_independent};
use crate::strategies::{ALL, SIZE, shows};
use crate::volumes::{expect, made, show};

/// How the store of records names its table of disks.
const DISKS: TableDefinition<&str, &[u8]> = TableDefinition::new("disks");

/// Two disks with a snapshot each, changed since; only remembered, and stopped.
fn two_remembered() -> Daemon {
    let mut daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    for disk in ["vm0", "vm1"] {
        daemon.client(disk).write(ALL, 1);
        daemon.snapshot("a", &[disk]);
        daemon.client(disk).write(0..100, 2);
    }
    daemon.stop();
    daemon.forget_args();
    daemon
}

#[track_caller]
fn assert_whole(daemon: &Daemon, disk: &str) {
    assert_eq!(shows(daemon, disk), [vec![2; 100], vec![1; ALL.end - 100]].concat(), "{disk}");
    assert_eq!(daemon.state(&format!("{disk}@a")), "quiesced");
    assert_eq!(shows(daemon, &format!("{disk}@a")), vec![1; ALL.end], "{disk}@a");
}

/// It is listed and shown wherever disks are, is not served, and says why with this word.
#[track_caller]
fn assert_unserved(daemon: &Daemon, disk: &str, why: &str) {
    let shown = daemon.get(&format!("/v1/disks/{disk}"));
    assert_eq!(shown.status, 200, "{}", shown.body);
    let in_list = |list: Value| list.as_array().unwrap().iter().find(|d| d["name"] == disk).cloned();
    let listed = in_list(daemon.get("/v1/disks").json());
    let at_a_glance = in_list(daemon.get("/v1/status").json()["disks"].clone());
    for found in [Some(shown.json()), listed, at_a_glance] {
        let found = found.unwrap_or_else(|| panic!("{disk} is not listed"));
        assert_eq!(found["state"], "unserved", "{found}");
        assert!(found["reason"].as_str().unwrap().contains(why), "{why:?} is not said: {found}");
    }
    assert!(!daemon.socket(disk).exists());
    let told = cli_within(daemon, &["disk", "show", disk], *PATIENCE).unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("unserved") && told.contains(why), "{told}");
    let list = cli_within(daemon, &["disk", "list"], *PATIENCE).unwrap();
    assert!(String::from_utf8(list.stdout).unwrap().contains(disk));
}

fn hide(daemon: &Daemon, disk: &str) -> PathBuf {
    let elsewhere = daemon.path("elsewhere.raw");
    std::fs::rename(daemon.image(disk), &elsewhere).unwrap();
    elsewhere
}

/// A disk whose image is gone waits for it: by itself or when it is asked for it is served again, with its snapshots.
#[test]
fn a_disk_whose_image_is_gone_waits_for_it() {
    for asked in [false, true] {
        let mut daemon = two_remembered();
        let elsewhere = hide(&daemon, "vm0");
        daemon.start();
        assert_unserved(&daemon, "vm0", "vm0.raw");
        assert_whole(&daemon, "vm1");
        daemon.kill();
        daemon.start();
        assert_unserved(&daemon, "vm0", "vm0.raw");
        std::fs::rename(&elsewhere, daemon.image("vm0")).unwrap();
        if asked {
            let config = json!({ "path": daemon.image("vm0") }).to_string();
            let answer = daemon.send("PUT", "/v1/disks/vm0", &config);
            assert!([200, 201].contains(&answer.status), "{} {}", answer.status, answer.body);
        }
        wait_until("the disk to be served again", || daemon.show_disk("vm0")["state"] == "serving");
        assert_whole(&daemon, "vm0");
        assert_whole(&daemon, "vm1");
        daemon.delete("vm0@a");
        daemon.delete("vm1@a");
        daemon.assert_only_disks_left();
    }
}

/// Whoever does not want it back has it removed or forgotten: everything that was made for it goes, its image stays.
#[test]
fn a_disk_whose_image_is_gone_can_be_forgotten() {
    for how in ["forget", "remove by force", "remove, and what that advises"] {
        let mut daemon = two_remembered();
        let elsewhere = hide(&daemon, "vm0");
        daemon.start();
        match how {
            "forget" => drop(daemon.send("POST", "/v1/disks/vm0/forget", "").ok()),
            "remove by force" => drop(daemon.send("DELETE", "/v1/disks/vm0?force=true", "").ok()),
            _ => {
                let is_asked = Cell::new(false);
                let remove = || match daemon.send("DELETE", "/v1/disks/vm0", "") {
                    // What is advised may be the removal itself.
                    gone if gone.status == 404 && is_asked.get() => Answer { status: 204, ..gone },
                    answer => {
                        is_asked.set(true);
                        answer
                    }
                };
                println!("{:?}", follow_advice(&daemon, &remove));
            }
        }
        for _ in 0..2 {
            assert_eq!(daemon.get("/v1/disks/vm0").status, 404, "{how}");
            assert_eq!(daemon.get("/v1/snapshots/vm0@a").status, 404, "{how}");
            assert_eq!(names_in(&daemon.state_dir().join("images")), ["vm1@a.img"], "{how}");
            assert_eq!(tags(&std::fs::read(&elsewhere).unwrap())[..101], [vec![2; 100], vec![1]].concat(), "{how}");
            assert_whole(&daemon, "vm1");
            daemon.restart();
        }
        // The name is free.
        daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": elsewhere }).to_string()).ok();
        daemon.snapshot("a", &["vm0"]);
        daemon.delete("vm0@a");
        daemon.delete("vm1@a");
        daemon.assert_only_disks_left();
    }
}

/// `disk forget` is for what is not served.
#[test]
fn a_disk_that_is_served_is_not_forgotten() {
    let mut daemon = two_remembered();
    daemon.start();
    let refused = daemon.send("POST", "/v1/disks/vm0/forget", "");
    assert_eq!(refused.refused(), "disk-busy", "{}", refused.body);
    assert_whole(&daemon, "vm0");
    let told = cli_within(&daemon, &["disk", "forget", "vm0"], *PATIENCE).unwrap();
    assert_eq!(told.status.code(), Some(1));
}

/// A start that is to serve all or nothing is asked for.
#[test]
fn a_strict_start_serves_all_or_nothing() {
    let mut daemon = two_remembered();
    daemon.arg_disk("vm0", "");
    daemon.arg_disk("vm1", "");
    daemon.arg("--strict");
    daemon.start();
    assert_whole(&daemon, "vm0");
    daemon.stop();
    let elsewhere = hide(&daemon, "vm0");
    let said = daemon.refused_start();
    assert!(said.contains("vm0.raw"), "{said}");
    std::fs::rename(elsewhere, daemon.image("vm0")).unwrap();
    daemon.start();
    assert_whole(&daemon, "vm0");
    assert_whole(&daemon, "vm1");
}

/// One disk of the configuration that cannot be opened does not take the others' guests away.
#[test]
fn a_configured_disk_that_cannot_be_opened_ends_no_start() {
    for (what, why) in
        [("missing", "vm0.raw"), ("empty", "vm0.raw"), ("a directory", "vm0.raw"), ("socket", "vm0.sock")]
    {
        let mut daemon = two_remembered();
        daemon.arg_disk("vm0", "");
        daemon.arg_disk("vm1", "");
        let elsewhere = match what {
            "socket" => daemon.path("none"),
            _ => hide(&daemon, "vm0"),
        };
        match what {
            "empty" => std::fs::write(daemon.image("vm0"), "").unwrap(),
            "a directory" => std::fs::create_dir(daemon.image("vm0")).unwrap(),
            "socket" => std::fs::write(daemon.socket("vm0"), "somebody else's").unwrap(),
            _ => {}
        }
        assert!(start_if_it_can(&mut daemon), "{what} ends the start: {}", daemon.log_text());
        let shown = daemon.get("/v1/disks/vm0").json();
        assert_eq!(shown["state"], "unserved", "{what}: {shown}");
        assert!(shown["reason"].as_str().unwrap().contains(why), "{what}: {shown}");
        assert_whole(&daemon, "vm1");
        match what {
            "empty" => std::fs::remove_file(daemon.image("vm0")).unwrap(),
            "a directory" => std::fs::remove_dir(daemon.image("vm0")).unwrap(),
            "socket" => std::fs::remove_file(daemon.socket("vm0")).unwrap(),
            _ => {}
        }
        if elsewhere.exists() {
            std::fs::rename(&elsewhere, daemon.image("vm0")).unwrap();
        }
        wait_until("the disk to be served", || daemon.show_disk("vm0")["state"] == "serving");
        assert_whole(&daemon, "vm0");
    }
}

/// A disk that failed at the start is in the lists from the first answer on, and whoever listens then is not told of it as
/// if it had just happened before anybody could.
#[test]
fn what_failed_at_the_start_is_seen_by_who_comes_later() {
    let mut daemon = two_remembered();
    hide(&daemon, "vm0");
    daemon.start();
    let status = daemon.get("/v1/status").json();
    let found = status["disks"].as_array().unwrap().iter().find(|d| d["name"] == "vm0");
    let found = found.unwrap_or_else(|| panic!("a disk that failed at the start is not in {}", status["disks"]));
    assert!(found["reason"].as_str().is_some_and(|why| why.contains("vm0.raw")), "{found}");
    let events = daemon.events();
    daemon.snapshot("b", &["vm1"]);
    events.wait_for("SNAPSHOT_QUIESCED", "vm1@b");
    for event in events.seen().iter().filter(|e| e["event"] == "DISK_FAILED") {
        assert_eq!((&event["disk"], event["reason"].is_string()), (&json!("vm0"), true), "{event}");
    }
}

/// Changes one byte in the middle of a record, in a commit that is as whole as any other.
fn damage(daemon: &Daemon, disk: &str) {
    let database = Database::open(daemon.state_dir().join("records.redb")).unwrap();
    let mut change = database.begin_write().unwrap();
    change.set_two_phase_commit(true);
    {
        let mut disks = change.open_table(DISKS).unwrap();
        let mut value = disks.get(disk).unwrap().expect("the disk has a record").value().to_vec();
        let middle = value.len() / 2;
        value[middle] ^= 0x20;
        disks.insert(disk, value.as_slice()).unwrap();
    }
    change.commit().unwrap();
}

/// One record that cannot be read: the disk is not served, also not as a new one of that name; all others are, and nothing
/// that it may speak of is removed.
#[test]
fn one_unreadable_record_stops_no_other() {
    for configured in [false, true] {
        let mut daemon = two_remembered();
        damage(&daemon, "vm0");
        let of_vm0 = daemon.snapshot_image("vm0@a");
        if configured {
            daemon.arg_disk("vm0", "");
        }
        for _ in 0..2 {
            assert!(start_if_it_can(&mut daemon), "configured: {configured}: {}", daemon.log_text());
            assert_unserved(&daemon, "vm0", "record");
            assert_whole(&daemon, "vm1");
            let refused = daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": daemon.image("vm0") }).to_string());
            assert!(refused.status >= 400, "it is served as a new disk: {}", refused.body);
            let other = daemon.send("PUT", "/v1/disks/other", &json!({ "path": of_vm0 }).to_string());
            assert!(other.status >= 400, "its snapshot's image is served as a disk: {}", other.body);
            assert!(of_vm0.exists(), "what its record may speak of is removed");
            // A volume may be among what cannot be read, and stand on any snapshot.
            let needed = daemon.send("DELETE", "/v1/snapshots/vm1@a", "");
            let says = needed.refused() == "snapshot-busy" && needed.body.contains("halfsilver disk forget vm0");
            assert!(says, "{}", needed.body);
            assert_whole(&daemon, "vm1");
            daemon.stop();
        }
        daemon.forget_args();
        daemon.start();
        daemon.send("POST", "/v1/disks/vm0/forget", "").ok();
        assert_eq!(daemon.get("/v1/disks/vm0").status, 404);
        daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": daemon.image("vm0") }).to_string()).ok();
        assert_eq!(daemon.client("vm0").tag(0), 2);
        daemon.restart();
        assert_eq!(daemon.client("vm0").tag(0), 2);
        assert_whole(&daemon, "vm1");
    }
}

/// A start that fails for a leg that cannot be one changes nothing: after a clean stop before it, a boot of the machine
/// costs no snapshot.
#[test]
fn a_start_with_a_leg_that_cannot_be_costs_no_snapshot() {
    if !can_mount("a_start_with_a_leg_that_cannot_be_costs_no_snapshot") {
        return;
    }
    let mut wrong = Vec::new();
    for what in ["too small", "nowhere", "a directory"] {
        let mut daemon = two_remembered();
        let leg = match what {
            "too small" => daemon.make_image("leg", SIZE / 2),
            "nowhere" => daemon.path("none/leg.raw"),
            _ => daemon.dir.path().to_owned(),
        };
        daemon.arg_disk("vm0", &format!("mirror={}", leg.display()));
        if start_if_it_can(&mut daemon) {
            daemon.stop();
        }
        daemon.boot_again();
        daemon.forget_args();
        daemon.arg_disk("vm0", "");
        daemon.start();
        let snapshot = daemon.show("vm0@a");
        if snapshot["state"] != "quiesced" {
            wrong.push(format!("{what}: {snapshot}"));
        } else {
            assert_whole(&daemon, "vm0");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// An independent volume with a content of its own, whose socket's place was taken while the daemon was not running. What
/// took it, and the volume's image.
fn lost_volume() -> (Daemon, PathBuf, PathBuf) {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    daemon.snap("daily");
    made(&daemon, "v", "vm0@daily");
    post(&daemon, "v/complete").ok();
    let volume = wait_independent(&daemon, "v");
    let mut client = daemon.client("v");
    client.write(0..8, 4);
    client.flush();
    drop(client);
    daemon.stop();
    let taken = daemon.socket("v");
    std::fs::write(&taken, "somebody else's").unwrap();
    daemon.start();
    let shown = show(&daemon, "v");
    assert_ne!(shown["state"], "serving", "{shown}");
    assert!(shown["reason"].as_str().unwrap().contains("v.sock"), "{shown}");
    (daemon, taken, image_of(&volume))
}

/// A volume is either served or lost: one that was lost and is served again is not deleted under its guest.
#[test]
fn a_lost_volume_is_never_served_and_lost_at_once() {
    let (mut daemon, taken, image) = lost_volume();
    std::fs::remove_file(taken).unwrap();
    daemon.send("PUT", "/v1/disks/v", &json!({ "path": image }).to_string());
    wait_until("the volume to be served again", || daemon.socket("v").exists());
    let mut guest = daemon.client("v");
    assert_eq!(guest.tag(0), 4);
    wait_until("the guest to be seen", || {
        let refused = daemon.send("DELETE", "/v1/volumes/v", "");
        assert!(image.exists(), "its image is deleted under its guest: {} {}", refused.status, refused.body);
        assert_eq!(refused.refused(), "volume-busy", "{}", refused.body);
        refused.body.contains("frontend")
    });
    let named = |list: &str| {
        let all = daemon.get(list).json();
        all.as_array().unwrap().iter().filter(|entity| entity["name"] == "v").count()
    };
    assert_eq!(named("/v1/volumes") + named("/v1/disks"), 1, "it is one thing");
    assert_eq!(show(&daemon, "v")["state"], "serving");
    guest.write(8..16, 5);
    guest.flush();
    drop(guest);
    daemon.restart();
    assert_eq!(shows(&daemon, "v"), expect(&[(0..8, 4), (8..16, 5)]));
}

/// What is forgotten takes no image along that another disk serves by now, whatever it was called when that was added.
#[test]
fn what_is_forgotten_takes_no_image_along_that_is_served() {
    let (daemon, _taken, image) = lost_volume();
    let aside = daemon.path("aside.raw");
    std::fs::rename(&image, &aside).unwrap();
    daemon.send("PUT", "/v1/disks/n", &json!({ "path": aside }).to_string()).ok();
    std::fs::rename(&aside, &image).unwrap();
    let refused = daemon.send("POST", "/v1/disks/v/forget", "");
    assert_eq!(refused.refused(), "conflict", "{}", refused.body);
    assert!(image.exists());
    assert_eq!(daemon.client("n").tag(0), 4);
    daemon.send("DELETE", "/v1/disks/n?force=true", "").ok();
    daemon.send("POST", "/v1/disks/v/forget", "").ok();
    assert!(!image.exists());
}

/// Nor one that another disk waits for, although nobody holds that.
#[test]
fn what_is_forgotten_takes_no_image_along_that_is_waited_for() {
    let (mut daemon, taken, image) = lost_volume();
    let aside = daemon.path("aside.raw");
    std::fs::rename(&image, &aside).unwrap();
    daemon.send("PUT", "/v1/disks/n", &json!({ "path": aside }).to_string()).ok();
    daemon.stop();
    std::fs::rename(&aside, &image).unwrap();
    std::os::unix::fs::symlink(&image, &aside).unwrap();
    std::fs::write(&taken, "somebody else's").unwrap();
    std::fs::write(daemon.socket("n"), "somebody else's").unwrap();
    daemon.start();
    assert_ne!(daemon.show_disk("n")["state"], "serving");
    let refused = daemon.send("POST", "/v1/disks/v/forget", "");
    assert_eq!(refused.refused(), "conflict", "{}", refused.body);
    assert!(refused.body.contains("disk n") && image.exists(), "{}", refused.body);
    daemon.send("POST", "/v1/disks/n/forget", "").ok();
    assert!(image.exists());
    daemon.send("POST", "/v1/disks/v/forget", "").ok();
    assert!(!image.exists());
}

/// Nor one that has the name which a full image of a volume would have.
#[test]
fn what_is_forgotten_takes_no_disk_along_that_has_its_name() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    daemon.snap("daily");
    let volume = made(&daemon, "v", "vm0@daily");
    daemon.stop();
    std::fs::write(daemon.socket("v"), "somebody else's").unwrap();
    daemon.start();
    let image = daemon.state_dir().join("images").join(format!("{}.raw", volume["id"].as_str().unwrap()));
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    daemon.send("PUT", "/v1/disks/n", &json!({ "path": image }).to_string()).ok();
    let refused = daemon.send("POST", "/v1/disks/v/forget", "");
    assert_eq!(refused.refused(), "conflict", "{}", refused.body);
    assert!(image.exists());
}

/// An image that is only half there is waited for, and what is known of it stays known.
#[test]
fn an_image_that_comes_back_in_pieces_is_served_when_all_of_it_is_there() {
    let mut daemon = two_remembered();
    let image = daemon.image("vm0");
    let looked = std::fs::metadata(&image).unwrap().modified().unwrap();
    let whole = std::fs::read(&image).unwrap();
    std::fs::write(&image, &whole[..whole.len() / 2]).unwrap();
    daemon.start();
    let shown = daemon.get("/v1/disks/vm0").json();
    assert_ne!(shown["state"], "serving", "{shown}");
    assert!(shown["reason"].as_str().unwrap().contains("bytes, and the disk has"), "{shown}");
    std::fs::write(&image, &whole).unwrap();
    std::fs::File::options().write(true).open(&image).unwrap().set_modified(looked).unwrap();
    wait_until("it to be served", || daemon.get("/v1/disks/vm0").json()["state"] == "serving");
    assert_whole(&daemon, "vm0");
}

/// What is not served is remembered all the same: its image is no disk, no leg and no other thing's image.
#[test]
fn the_image_of_what_is_lost_is_nothing_else() {
    let (daemon, taken, image) = lost_volume();
    for (method, path, body) in [
        ("PUT", "/v1/disks/other", json!({ "path": image })),
        ("PUT", "/v1/disks/other", json!({ "path": daemon.path("more.raw"), "mirror": image })),
        ("POST", "/v1/disks/vm0/mirror", json!({ "path": image })),
    ] {
        std::fs::File::create(daemon.path("more.raw")).unwrap().set_len(SIZE).unwrap();
        let refused = daemon.send(method, path, &body.to_string());
        assert!(refused.status >= 400, "{method} {path}: the image of a volume is taken: {}", refused.body);
    }
    std::fs::remove_file(taken).unwrap();
    wait_until("the volume to be served again", || show(&daemon, "v")["state"] == "serving");
    assert_eq!(shows(&daemon, "v"), expect(&[(0..8, 4)]));
}

/// The same of a disk that waits: an image of its snapshot and its own image under another name.
#[test]
fn the_images_of_a_disk_that_waits_are_nothing_else() {
    let mut daemon = two_remembered();
    std::fs::write(daemon.socket("vm0"), "somebody else's").unwrap();
    daemon.start();
    let (inode, bytes) = (of(&daemon.image("vm0")).ino(), of(&daemon.image("vm0")).len());
    for (method, path, body) in [
        ("PUT", "/v1/disks/other", json!({ "path": daemon.snapshot_image("vm0@a") })),
        ("POST", "/v1/disks/vm1/mirror", json!({ "path": daemon.image("vm0") })),
        ("POST", "/v1/disks/vm1/mirror", json!({ "path": daemon.snapshot_image("vm0@a") })),
        ("POST", "/v1/snapshots", json!({ "name": "b", "disks": ["vm1"], "image": daemon.snapshot_image("vm0@a") })),
    ] {
        let refused = daemon.send(method, path, &body.to_string());
        assert!(refused.status >= 400, "{method} {path} {body}: {}", refused.body);
    }
    assert_eq!((of(&daemon.image("vm0")).ino(), of(&daemon.image("vm0")).len()), (inode, bytes));
    std::fs::remove_file(daemon.socket("vm0")).unwrap();
    wait_until("the disk to be served again", || daemon.show_disk("vm0")["state"] == "serving");
    assert_whole(&daemon, "vm0");
}

fn of(path: &Path) -> std::fs::Metadata {
    std::fs::metadata(path).unwrap()
}

/// A volume whose source is gone says so, and is whole again when the source is, without a restart.
#[test]
fn a_volume_waits_for_what_it_stands_on() {
    let mut daemon = two_remembered();
    daemon.start();
    made(&daemon, "clone", "vm0@a");
    daemon.client("clone").write(0..8, 9);
    daemon.client("clone").flush();
    daemon.stop();
    let elsewhere = hide(&daemon, "vm0");
    daemon.start();
    assert_unserved(&daemon, "vm0", "vm0.raw");
    let shown = show(&daemon, "clone");
    assert_ne!(shown["state"], "serving", "{shown}");
    assert!(shown["reason"].as_str().unwrap().contains("vm0"), "{shown}");
    let refused = daemon.send("POST", "/v1/disks/vm0/forget", "");
    assert_eq!(refused.refused(), "disk-busy", "the volume stands on it: {}", refused.body);
    assert!(refused.body.contains("clone"), "{}", refused.body);
    std::fs::rename(elsewhere, daemon.image("vm0")).unwrap();
    wait_until("the volume to be served again", || show(&daemon, "clone")["state"] == "serving");
    assert_eq!(shows(&daemon, "clone"), expect(&[(0..8, 9)]));
    assert_whole(&daemon, "vm0");
}
