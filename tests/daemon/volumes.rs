//! Volumes from outside: made, written, taken up again after stops and kills, refused, deleted.

use std::path::Path;

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Answer, Daemon, Rng, can_mount, names_in, seeds, wait_until};
use crate::strategies::{ALL, End, SIZE, end_and_start, shows};
use crate::trouble::Mount;

pub(crate) fn create(daemon: &Daemon, name: &str, from: &str) -> Answer {
    daemon.send("POST", "/v1/volumes", &json!({ "name": name, "from": from }).to_string())
}

#[track_caller]
pub(crate) fn made(daemon: &Daemon, name: &str, from: &str) -> Value {
    let answer = create(daemon, name, from);
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.json()
}

#[track_caller]
pub(crate) fn show(daemon: &Daemon, name: &str) -> Value {
    let answer = daemon.get(&format!("/v1/volumes/{name}"));
    answer.ok();
    answer.json()
}

#[track_caller]
pub(crate) fn delete(daemon: &Daemon, name: &str) {
    wait_until("a volume to be let go", || {
        let answer = daemon.send("DELETE", &format!("/v1/volumes/{name}"), "");
        // A frontend that has just left is not forgotten at once.
        let is_gone = answer.status == 204;
        assert!(is_gone || answer.body.contains("frontend connected"), "{} {}", answer.status, answer.body);
        is_gone
    });
}

/// A disk full of 1 with a snapshot `daily`, and 2 in its second half since.
pub(crate) fn daemon_with_snapshot(options: &str, strategy: &str) -> Daemon {
    let daemon = Daemon::with_disks(&[SIZE], options);
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.api().create("daily", &["vm0"], &json!({ "strategy": strategy, "wait": true })).ok();
    client.write(1024..2048, 2);
    client.flush();
    daemon
}

pub(crate) fn expect(changes: &[(std::ops::Range<usize>, u64)]) -> Vec<u64> {
    let mut all = vec![1; ALL.end];
    changes.iter().for_each(|(at, tag)| all[at.clone()].fill(*tag));
    all
}

#[test]
fn a_volume_is_written_and_nothing_else_changes() {
    for strategy in ["copy-on-write", "write-logging"] {
        let daemon = daemon_with_snapshot("", strategy);
        let events = daemon.events();
        let volume = made(&daemon, "clone", "vm0@daily");
        events.wait_for("VOLUME_CREATED", "clone");
        assert_eq!((&volume["state"], &volume["size_bytes"]), (&json!("serving"), &json!(SIZE)));
        assert_eq!(volume["from_id"], daemon.show("vm0@daily")["id"]);
        let live = shows(&daemon, "vm0");
        assert_eq!(shows(&daemon, "clone"), expect(&[]), "{strategy}");
        let mut client = daemon.client("clone");
        client.write(3..5, 7);
        client.write(1000..1040, 8);
        client.zero(100..110, true);
        client.flush();
        let now = expect(&[(3..5, 7), (1000..1040, 8), (100..110, 0)]);
        assert_eq!(tags(&client.read_all()), now);
        assert_eq!(shows(&daemon, "vm0@daily"), expect(&[]), "the snapshot does not change");
        assert_eq!(shows(&daemon, "vm0"), live, "nor does the disk");
        daemon.client("vm0").write(0..64, 9);
        assert_eq!(tags(&client.read_all()), now, "what is written to the disk does not show");
        assert!(show(&daemon, "clone")["owned_bytes"].as_u64().unwrap() < SIZE / 16);
        assert_eq!(daemon.get("/v1/disks").json().as_array().unwrap().len(), 1, "it is not among the disks");
        drop(client);
        delete(&daemon, "clone");
        events.wait_for("VOLUME_DELETED", "clone");
        assert!(!Path::new(volume["image"].as_str().unwrap()).exists());
        daemon.delete("vm0@daily");
        assert_eq!(tags(&std::fs::read(daemon.image("vm0")).unwrap())[..64], [9; 64]);
        daemon.assert_only_disks_left();
    }
}

#[test]
fn a_volume_of_now_and_volumes_of_volumes() {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    let now = shows(&daemon, "vm0");
    let first = made(&daemon, "one", "vm0");
    assert_eq!((&first["from"], daemon.state("vm0@one")), (&json!("vm0@one"), "quiesced".to_owned()));
    daemon.client("one").write(0..8, 3);
    made(&daemon, "two", "one");
    daemon.client("one").write(0..8, 4);
    daemon.client("two").write(8..16, 5);
    daemon.client("vm0").write(0..100, 6);
    let with = |changes: &[(std::ops::Range<usize>, u64)]| {
        let mut all = now.clone();
        changes.iter().for_each(|(at, tag)| all[at.clone()].fill(*tag));
        all
    };
    assert_eq!(shows(&daemon, "one"), with(&[(0..8, 4)]));
    assert_eq!(shows(&daemon, "two"), with(&[(0..8, 3), (8..16, 5)]));
    assert_eq!(shows(&daemon, "one@two"), with(&[(0..8, 3)]));
    let listed = daemon.get("/v1/volumes").json();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one", "two"]);

    // What others stand on stays.
    let refused = daemon.send("DELETE", "/v1/volumes/one?force=true", "");
    assert_eq!((refused.status, refused.refused()), (409, "volume-busy".to_owned()));
    assert!(refused.body.contains("two"), "{}", refused.body);
    delete(&daemon, "two");
    let refused = daemon.send("DELETE", "/v1/volumes/one", "");
    assert_eq!(refused.refused(), "volume-busy", "it has a snapshot");
    daemon.delete("one@two");
    assert_eq!(shows(&daemon, "one"), with(&[(0..8, 4)]));
    delete(&daemon, "one");
    daemon.delete("vm0@one");
    daemon.delete("vm0@daily");
    daemon.assert_only_disks_left();
}

#[test]
fn what_a_volume_stands_on_cannot_be_deleted() {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    for query in ["", "?force=true"] {
        let refused = daemon.send("DELETE", &format!("/v1/snapshots/vm0@daily{query}"), "");
        assert_eq!((refused.status, refused.refused()), (409, "snapshot-busy".to_owned()), "{query}");
        assert!(refused.json()["detail"].as_str().unwrap().contains("clone"), "{}", refused.body);
        let refused = daemon.send("DELETE", &format!("/v1/disks/vm0{query}"), "");
        assert_eq!((refused.status, refused.refused()), (409, "disk-busy".to_owned()), "{query}");
        assert!(refused.json()["detail"].as_str().unwrap().contains("clone"), "{}", refused.body);
    }
    let output = daemon.cli(&["snapshot", "delete", "vm0@daily", "--force"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("halfsilver volume delete clone"), "{text}");
    daemon.client("vm0").write(ALL, 3);
    assert_eq!(shows(&daemon, "clone"), expect(&[]), "it is all there");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    for (name, from, code) in [
        ("clone", "vm0@daily", "volume-exists"),
        ("clone", "vm0", "volume-exists"),
        ("vm0", "vm0@daily", "disk-exists"),
        ("vm0", "vm0", "disk-exists"),
        ("new", "vm0@none", "snapshot-not-found"),
        ("new", "none@daily", "snapshot-not-found"),
        ("new", "none", "disk-not-found"),
        ("new", "new", "disk-not-found"),
        ("new", "new@new", "snapshot-not-found"),
        ("daily", "vm0", "snapshot-exists"),
        ("A", "vm0@daily", "invalid-name"),
        ("new", "vm0@", "invalid-name"),
    ] {
        assert_eq!(create(&daemon, name, from).refused(), code, "{name} from {from}");
    }
    std::fs::write(daemon.path("there"), b"bytes of somebody").unwrap();
    let sockets = [daemon.socket("vm0"), daemon.socket("vm0@daily"), daemon.path("none/x.sock")];
    let there = json!({ "name": "new", "from": "vm0", "image": daemon.path("there") });
    let others = sockets.map(|socket| json!({ "name": "new", "from": "vm0", "socket": socket }));
    for body in others.iter().chain([&there]) {
        let refused = daemon.send("POST", "/v1/volumes", &body.to_string());
        assert!((400..500).contains(&refused.status), "{body}: {}", refused.body);
    }
    assert_eq!(std::fs::read(daemon.path("there")).unwrap(), b"bytes of somebody");
    assert_eq!(daemon.snapshots().len(), 1, "no snapshot is left of what was refused");
    let mirror = json!({ "path": daemon.path("leg.raw") }).to_string();
    assert_eq!(daemon.send("POST", "/v1/disks/clone/mirror", &mirror).refused(), "unsupported");
    assert_eq!(daemon.send("DELETE", "/v1/disks/clone/mirror", "").refused(), "unsupported");
    assert_eq!(daemon.send("DELETE", "/v1/disks/clone?force=true", "").refused(), "disk-not-found");
    assert_eq!(daemon.get("/v1/disks/clone").refused(), "disk-not-found");
    let disk = json!({ "path": daemon.image("vm0") }).to_string();
    assert_eq!(daemon.send("PUT", "/v1/disks/clone", &disk).refused(), "disk-exists");
    assert_eq!(daemon.send("DELETE", "/v1/volumes/vm0", "").refused(), "volume-not-found");
    assert_eq!(daemon.get("/v1/volumes/vm0").refused(), "volume-not-found");
    let guest = daemon.client("clone");
    assert_eq!(daemon.send("DELETE", "/v1/volumes/clone", "").refused(), "volume-busy");
    drop(guest);
    // A configuration that gives its name to a disk ends the start.
    daemon.stop();
    daemon.make_image("clone", SIZE);
    daemon.arg_disk("clone", "");
    assert!(daemon.refused_start().contains("clone is the name of a volume"));
}

#[test]
fn the_command_line_has_volumes() {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    let run = |args: &[&str]| {
        let output = daemon.cli(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let (socket, image) = (daemon.path("c.sock"), daemon.path("c.img"));
    let (at, of) = (socket.to_str().unwrap(), image.to_str().unwrap());
    let page = run(&["volume", "create", "clone", "--from", "vm0@daily", "--socket", at, "--image", of]);
    assert!(page.contains("from         vm0@daily\n"), "{page}");
    assert!(socket.exists() && image.exists());
    assert!(run(&["volume", "list"]).contains("clone   serving  vm0@daily"));
    assert!(run(&["status"]).contains("clone   serving  vm0@daily"));
    let shown: Value = serde_json::from_str(&run(&["volume", "show", "clone", "--json"])).unwrap();
    assert_eq!(shown, show(&daemon, "clone"));
    assert_eq!(run(&["volume", "delete", "clone"]), "clone deleted\n");
    assert!(!socket.exists() && !image.exists());
}

fn verdict<'a>(told: &'a Value, disk: &str) -> &'a str {
    let disks = told["disks"].as_array().unwrap();
    disks.iter().find(|d| d["name"] == disk).unwrap()["verdict"].as_str().unwrap()
}

/// With everything on the way: a volume, its own snapshot, and a volume on that.
#[test]
fn volumes_outlive_stops_kills_and_power_cuts() {
    for (how, strategy, options) in [
        (End::Stop, "copy-on-write", ""),
        (End::Kill, "copy-on-write", ""),
        (End::Kill, "write-logging", ""),
        (End::PowerCut, "write-logging", ""),
        (End::PowerCut, "copy-on-write", "durability=power"),
    ] {
        let mut daemon = daemon_with_snapshot(options, strategy);
        let id = made(&daemon, "one", "vm0@daily")["id"].clone();
        daemon.client("one").write(0..100, 3);
        made(&daemon, "above", "one");
        let (mut one, mut above) = (daemon.client("one"), daemon.client("above"));
        one.write(50..150, 4);
        above.write(60..70, 5);
        one.flush();
        above.flush();
        drop((one, above));
        for round in 0..2 {
            let what = format!("{how:?} {strategy} {round}");
            let told = end_and_start(&mut daemon, how);
            for name in ["one", "above"] {
                assert_eq!(show(&daemon, name)["state"], "serving", "{what}: {}", show(&daemon, name));
                assert!(verdict(&told, name).starts_with("served"), "{what}: {told}");
            }
            assert_eq!(show(&daemon, "one")["id"], id);
            assert_eq!(shows(&daemon, "one"), expect(&[(0..100, 3), (50..150, 4)]), "{what}");
            assert_eq!(shows(&daemon, "above"), expect(&[(0..100, 3), (60..70, 5)]), "{what}");
            assert_eq!(shows(&daemon, "one@above"), expect(&[(0..100, 3)]), "{what}");
            assert_eq!(shows(&daemon, "vm0@daily"), expect(&[]), "{what}");
            let refused = daemon.send("DELETE", "/v1/snapshots/vm0@daily?force=true", "");
            assert_eq!(refused.refused(), "snapshot-busy", "{what}");
        }
        daemon.client("above").write(0..8, 6);
        assert_eq!(shows(&daemon, "above")[..9], [6, 6, 6, 6, 6, 6, 6, 6, 3]);
        delete(&daemon, "above");
        daemon.delete("one@above");
        delete(&daemon, "one");
        daemon.delete("vm0@daily");
        daemon.assert_only_disks_left();
    }
}

/// Guests that were connected go on after a kill; what was acknowledged is there.
#[test]
fn a_volume_is_written_between_kills() {
    for seed in seeds("volumes", 2) {
        let (mut rng, mut daemon) = (Rng::new(seed), daemon_with_snapshot("", "copy-on-write"));
        made(&daemon, "clone", "vm0@daily");
        let mut expected = expect(&[]);
        for _ in 0..6 {
            let mut client = daemon.client("clone");
            for _ in 0..30 {
                let from = rng.below(2000);
                let sectors = from..from + 1 + rng.below(40);
                let tag = 10 + rng.below(1 << 20) as u64;
                client.write(sectors.clone(), tag);
                expected[sectors].fill(tag);
                daemon.client("vm0").write(from..from + 8, tag);
            }
            daemon.kill();
            drop(client);
            daemon.start();
            assert_eq!(shows(&daemon, "clone"), expected, "seed {seed}");
        }
    }
}

/// A volume whose base is not believed is not believed either, says why, and takes nothing.
#[test]
fn a_broken_snapshot_breaks_its_volumes() {
    let mut daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "one", "vm0@daily");
    made(&daemon, "above", "one");
    daemon.client("one").write(0..8, 3);
    let told = end_and_start(&mut daemon, End::PowerCut);
    let said = told["disks"].as_array().unwrap().iter().find(|d| d["name"] == "one").unwrap();
    assert_eq!((&said["from"], &said["path"]), (&json!("vm0@daily"), &Value::Null));
    daemon.assert_broken("vm0@daily", "power");
    for name in ["one", "above"] {
        let volume = show(&daemon, name);
        assert_eq!(volume["state"], "broken", "{volume}");
        assert!(volume["reason"].as_str().unwrap().contains("vm0@daily"), "{volume}");
        assert_eq!(verdict(&told, name), "not-served", "{told}");
        let mut client = daemon.client(name);
        let queue = &mut client.queues[0];
        queue.submit_read(0, 0..8);
        assert!(queue.wait_one().1 < 0, "a read of {name}");
        queue.submit_write(0, 0..8, 9, false);
        assert!(queue.wait_one().1 < 0, "a write to {name}");
    }
    assert_eq!(daemon.state("one@above"), "broken");
    assert!(!daemon.socket("one@above").exists());
    assert_eq!(create(&daemon, "new", "vm0@daily").refused(), "snapshot-broken");
    assert_eq!(create(&daemon, "new", "one@above").refused(), "snapshot-broken");
    assert_eq!(daemon.send("DELETE", "/v1/snapshots/vm0@daily", "").refused(), "snapshot-busy");
    let mut live = expect(&[(1024..2048, 2)]);
    assert_eq!(shows(&daemon, "vm0"), live, "the disk is well");
    daemon.client("vm0").write(0..8, 5);
    live[..8].fill(5);
    daemon.restart();
    assert_eq!(show(&daemon, "above")["state"], "broken", "it does not become whole again");
    delete(&daemon, "above");
    daemon.delete("one@above");
    delete(&daemon, "one");
    daemon.delete("vm0@daily");
    assert_eq!(shows(&daemon, "vm0"), live);
    daemon.assert_only_disks_left();
}

/// The snapshot breaks while guests are at work: the volume is broken at once and says so, and the disk goes on.
#[test]
fn a_snapshot_that_breaks_takes_its_volumes_along() {
    if !can_mount("a_snapshot_that_breaks_takes_its_volumes_along") {
        return;
    }
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    let _small = Mount::tmpfs(&daemon.path("small"), "256k");
    let image = json!({ "image": daemon.path("small/daily.img"), "wait": true });
    daemon.api().create("daily", &["vm0"], &image).ok();
    made(&daemon, "clone", "vm0@daily");
    let (events, mut guest) = (daemon.events(), daemon.client("clone"));
    guest.write(0..8, 3);
    daemon.client("vm0").write(ALL, 2);
    events.wait_for("VOLUME_BROKEN", "clone");
    let volume = show(&daemon, "clone");
    assert!(volume["state"] == "broken" && volume["reason"].as_str().unwrap().contains("daily"), "{volume}");
    // Also what it has itself.
    guest.queues[0].submit_read(0, 0..8);
    assert!(guest.queues[0].wait_one().1 < 0);
    assert_eq!(shows(&daemon, "vm0"), vec![2; ALL.end]);
    drop(guest);
    delete(&daemon, "clone");
    daemon.delete("vm0@daily");
}

/// Somebody wrote the disk while the daemon was stopped: its snapshots are not believed, nor is what stands on them.
#[test]
fn a_volume_of_a_disk_that_was_changed_is_broken() {
    let mut daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    daemon.stop();
    let mut bytes = std::fs::read(daemon.image("vm0")).unwrap();
    bytes[0] ^= 1;
    std::fs::write(daemon.image("vm0"), bytes).unwrap();
    daemon.start();
    let volume = show(&daemon, "clone");
    assert!(volume["state"] == "broken" && volume["reason"].as_str().unwrap().contains("changed"), "{volume}");
}

/// One whose own log is lost is not served, stays in the list, protects what it stands on, and can be deleted.
#[test]
fn a_volume_without_its_log_is_listed_until_it_is_deleted() {
    for how in [End::Stop, End::Kill] {
        let mut daemon = daemon_with_snapshot("", "write-logging");
        let volume = made(&daemon, "clone", "vm0@daily");
        daemon.client("clone").write(0..8, 3);
        let log = volume["image"].as_str().unwrap().to_owned();
        match how {
            End::Stop => daemon.stop(),
            _ => daemon.kill(),
        }
        std::fs::rename(&log, format!("{log}.away")).unwrap();
        daemon.start();
        let shown = show(&daemon, "clone");
        assert!(shown["state"] == "broken" && shown["reason"].as_str().unwrap().contains("missing"), "{shown}");
        assert_eq!(daemon.send("DELETE", "/v1/snapshots/vm0@daily?force=true", "").refused(), "snapshot-busy");
        assert_eq!(create(&daemon, "clone", "vm0@daily").refused(), "volume-exists");
        daemon.stop();
        std::fs::rename(format!("{log}.away"), &log).unwrap();
        daemon.start();
        assert_eq!(show(&daemon, "clone")["state"], "serving");
        assert_eq!(shows(&daemon, "clone"), expect(&[(0..8, 3)]), "{how:?}");
        daemon.stop();
        std::fs::remove_file(&log).unwrap();
        daemon.start();
        delete(&daemon, "clone");
        daemon.delete("vm0@daily");
        daemon.assert_only_disks_left();
    }
}

/// A daemon that dies while a volume is made or deleted leaves it or nothing.
#[cfg(feature = "planted")]
#[test]
fn planted_death_while_a_volume_is_made_or_deleted() {
    const POINTS: [&str; 8] = [
        "after an image was made",
        "before a table's file has its size",
        "before a table's file has its header",
        "before a durable table is written",
        "after a durable table was synced",
        "before records are committed",
        "after records were committed",
        "before a file is removed",
    ];
    let (mut while_made, mut while_deleted) = (0, 0);
    for point in POINTS {
        for count in 1..40 {
            let mut daemon = daemon_with_snapshot("", "copy-on-write");
            daemon.crash_at = Some(format!("{count}:{point}"));
            daemon.stop();
            daemon.spawn();
            let mut died = false;
            while !died && !daemon.is_up() {
                died = daemon.has_died_by(libc::SIGKILL);
            }
            let mut was_deleted = false;
            if !died {
                let answer = create(&daemon, "clone", "vm0@daily");
                if answer.status == 201 {
                    was_deleted = daemon.send("DELETE", "/v1/volumes/clone", "").status == 204;
                    while_deleted += u32::from(!was_deleted);
                } else {
                    while_made += 1;
                }
                if was_deleted {
                    daemon.kill(); // Before it comes to the point.
                } else {
                    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&daemon.wait_exit()), Some(libc::SIGKILL));
                }
            }
            let what = format!("{count}:{point}");
            daemon.crash_at = None;
            daemon.start();
            let volumes = daemon.get("/v1/volumes").json();
            match volumes.as_array().unwrap().len() {
                1 if !was_deleted => {
                    assert_eq!(shows(&daemon, "clone"), expect(&[]), "{what}");
                    delete(&daemon, "clone");
                }
                // One whose deletion was not answered may be gone; one that is not gone is whole.
                n => assert_eq!(n, 0, "{what}"),
            }
            daemon.delete("vm0@daily");
            daemon.assert_only_disks_left();
            if was_deleted {
                break;
            }
        }
    }
    println!("{while_made} deaths while a volume was made, {while_deleted} while one was deleted");
    assert!(while_made > 5 && while_deleted > 2);
}

fn resident_bytes(daemon: &Daemon) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", daemon.pid())).unwrap();
    let line = text.lines().find(|l| l.starts_with("Rss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_volume_of_a_huge_disk_takes_no_memory() {
    // As large as a file may be here.
    let mut daemon = Daemon::place();
    let path = daemon.image("vm0");
    let file = std::fs::File::create(&path).unwrap();
    let sizes = [16_u64 << 40, (16 << 40) - 4096, 8 << 40, 1 << 40];
    let size = sizes.into_iter().find(|size| file.set_len(*size).is_ok()).unwrap();
    daemon.arg_disk("vm0", "");
    daemon.start();
    daemon.snap("daily");
    made(&daemon, "first", "vm0@daily"); // What is made once for all is made.
    let before = resident_bytes(&daemon);
    let began = std::time::Instant::now();
    made(&daemon, "clone", "vm0@daily");
    let took = began.elapsed();
    let grown = resident_bytes(&daemon).saturating_sub(before);
    println!("a volume of {} GiB: {} KiB more, made in {took:.1?}", size >> 30, grown >> 10);
    assert!(grown < 16 << 20, "{grown} bytes");
    let mut client = daemon.client("clone");
    let last = client.sectors();
    client.write(last - 8..last, 3);
    assert_eq!(client.tag(last - 1), 3);
    assert_eq!(client.tag(last / 2), 0);
    drop(client);
    assert_eq!(names_in(&daemon.state_dir().join("images")).len(), 3);
}
