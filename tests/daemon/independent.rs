//! Volumes that become independent and disks, under load, through stops, kills and power cuts.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Answer, Daemon, Rng, can_mount, names_in, wait_until};
use crate::strategies::{ALL, End, SIZE, end_and_start, shows};
use crate::volumes::{create, daemon_with_snapshot, delete, expect, made, show};

pub(crate) fn post(daemon: &Daemon, path: &str) -> Answer {
    daemon.send("POST", &format!("/v1/volumes/{path}"), "")
}

/// Begins to complete a volume; the answer is the job.
#[track_caller]
pub(crate) fn begin(daemon: &Daemon, name: &str, query: &str) -> Value {
    let answer = post(daemon, &format!("{name}/complete?{query}"));
    assert_eq!(answer.status, 202, "{}", answer.body);
    answer.json()
}

pub(crate) fn job(daemon: &Daemon, id: u64) -> Value {
    daemon.get(&format!("/v1/jobs/{id}")).json()
}

/// The one job that there is.
pub(crate) fn only_job(daemon: &Daemon) -> Value {
    let jobs = daemon.get("/v1/jobs").json();
    assert_eq!(jobs.as_array().unwrap().len(), 1, "{jobs}");
    jobs[0].clone()
}

pub(crate) fn wait_independent(daemon: &Daemon, name: &str) -> Value {
    wait_until("a volume to be independent", || {
        let failed = daemon.get("/v1/jobs").json().as_array().unwrap().iter().find(|j| j["state"] == "failed").cloned();
        assert_eq!(failed, None);
        show(daemon, name)["independent"] == true
    });
    // Its job ends a moment later.
    wait_until("its job to be done", || {
        daemon.get("/v1/jobs").json().as_array().unwrap().iter().all(|j| j["state"] != "running")
    });
    show(daemon, name)
}

pub(crate) fn image_of(volume: &Value) -> PathBuf {
    PathBuf::from(volume["image"].as_str().unwrap())
}

#[track_caller]
pub(crate) fn assert_raw(path: &Path, expected: &[u64], what: &str) {
    assert_eq!(tags(&std::fs::read(path).unwrap()), expected, "{what}: the image alone");
}

/// Nothing is left of what the volume stood on.
pub(crate) fn remove_source(daemon: &Daemon) {
    daemon.delete("vm0@daily");
    assert_eq!(daemon.send("DELETE", "/v1/disks/vm0", "").status, 204);
    std::fs::remove_file(daemon.image("vm0")).unwrap();
}

#[test]
fn a_volume_becomes_independent_under_load() {
    for strategy in ["copy-on-write", "write-logging"] {
        let daemon = daemon_with_snapshot("", strategy);
        let events = daemon.events();
        let before = made(&daemon, "clone", "vm0@daily");
        assert_eq!(before["independent"], false);
        let mut expected = expect(&[]);
        let (mut guest, mut rng) = (daemon.client("clone"), Rng::new(17));
        // About two seconds for the megabyte.
        let id = begin(&daemon, "clone", "bytes_per_second=600000")["id"].as_u64().unwrap();
        let mut writes = 0;
        while show(&daemon, "clone")["independent"] == false {
            let from = rng.below(2000);
            let sectors = from..from + 1 + rng.below(40);
            writes += 1;
            guest.write(sectors.clone(), 100 + writes);
            expected[sectors].fill(100 + writes);
            daemon.client("vm0").write(from..from + 8, 9);
            if writes % 16 == 0 {
                assert_eq!(tags(&guest.read_all()), expected, "{strategy}: amid it");
                let now = job(&daemon, id);
                assert!(now["percent"].as_u64().unwrap() <= 100 && now["total_bytes"] == SIZE, "{now}");
            }
        }
        println!("{strategy}: {writes} writes meanwhile");
        assert!(writes > 10);
        events.wait_for("VOLUME_INDEPENDENT", "clone");
        let volume = wait_independent(&daemon, "clone");
        assert_eq!(
            (&volume["state"], &volume["from"], &volume["id"]),
            (&json!("serving"), &json!("vm0@daily"), &before["id"])
        );
        assert_eq!(volume["from_id"], before["from_id"], "it is remembered where it came from");
        assert_eq!(
            (job(&daemon, id)["state"].clone(), job(&daemon, id)["percent"].clone()),
            (json!("done"), json!(100))
        );
        guest.write(7..9, 3);
        expected[7..9].fill(3);
        guest.flush();
        assert_eq!(tags(&guest.read_all()), expected);
        assert_raw(&image_of(&volume), &expected, strategy);
        remove_source(&daemon);
        assert_eq!(tags(&guest.read_all()), expected, "{strategy}: nobody is needed");
        drop(guest);
        delete(&daemon, "clone");
        assert!(!image_of(&volume).exists(), "what was written to it goes with it");
        assert_eq!(names_in(&daemon.state_dir().join("images")), [""; 0]);
        assert_eq!(names_in(&daemon.state_dir().join("tables")), [""; 0]);
    }
}

/// Whatever ends the daemon, the job goes on by itself, as fast as it was told; and an independent volume stays one.
#[test]
fn a_completion_goes_on_after_any_end() {
    for how in [End::Stop, End::Kill, End::PowerCut] {
        let mut daemon = daemon_with_snapshot("", "write-logging");
        made(&daemon, "clone", "vm0@daily");
        let mut guest = daemon.client("clone");
        guest.write(0..100, 3);
        let mut expected = expect(&[(0..100, 3)]);
        begin(&daemon, "clone", "delay_ms=40&bytes_per_second=900000");
        for round in 0..3 {
            let done = only_job(&daemon)["done_bytes"].as_u64().unwrap();
            wait_until("some blocks", || only_job(&daemon)["done_bytes"].as_u64().unwrap() > done + 40_000);
            let from = 300 * (round + 1);
            guest.write(from..from + 50, 50 + round as u64);
            expected[from..from + 50].fill(50 + round as u64);
            guest.flush();
            drop(guest);
            let told = end_and_start(&mut daemon, how);
            assert_eq!(told["ok"], true, "{how:?}: {told}");
            let now = only_job(&daemon);
            assert_eq!((&now["kind"], &now["state"]), (&json!("migrate"), &json!("running")), "{how:?}");
            assert_eq!((&now["delay_ms"], &now["bytes_per_second"]), (&json!(40), &json!(900_000)), "{how:?}");
            assert_eq!(shows(&daemon, "clone"), expected, "{how:?} {round}");
            guest = daemon.client("clone");
        }
        drop(guest);
        // Stopped by the user, it stays so, and what it has done stays done.
        let id = only_job(&daemon)["id"].as_u64().unwrap();
        assert_eq!(daemon.send("DELETE", &format!("/v1/jobs/{id}"), "").json()["state"], "stopped");
        let path = format!("/v1/jobs/{id}");
        assert_eq!(daemon.send("PATCH", &path, r#"{"bytes_per_second":0}"#).json()["bytes_per_second"], 0);
        assert_eq!(daemon.send("PATCH", &path, r#"{"delay_ms":1}"#).json()["delay_ms"], 1);
        end_and_start(&mut daemon, how);
        let now = only_job(&daemon);
        assert_eq!(
            (&now["state"], &now["delay_ms"], &now["bytes_per_second"]),
            (&json!("stopped"), &json!(1), &json!(0))
        );
        assert_eq!(show(&daemon, "clone")["independent"], false);
        assert_eq!(daemon.send("DELETE", "/v1/snapshots/vm0@daily?force=true", "").refused(), "snapshot-busy");
        daemon.send("POST", &format!("/v1/jobs/{}/resume", now["id"]), "").ok();
        let volume = wait_independent(&daemon, "clone");
        let mut guest = daemon.client("clone");
        guest.write(2000..2010, 60);
        expected[2000..2010].fill(60);
        guest.flush();
        drop(guest);
        remove_source(&daemon);
        daemon.forget_args();
        for _ in 0..2 {
            let told = end_and_start(&mut daemon, how);
            assert_eq!(told["ok"], true, "{how:?}: {told}");
            assert_eq!(show(&daemon, "clone")["independent"], true);
            assert_eq!(shows(&daemon, "clone"), expected, "{how:?}");
            assert_raw(&image_of(&volume), &expected, "after an end");
            assert_eq!(names_in(&daemon.state_dir().join("images")).len(), 1, "{how:?}");
        }
    }
}

/// Snapshots of the volume are taken while it is filled; what is frozen stays so.
#[test]
fn a_volume_with_snapshots_becomes_independent() {
    for how in [End::Stop, End::Kill, End::PowerCut] {
        let mut daemon = daemon_with_snapshot("", "write-logging");
        made(&daemon, "clone", "vm0@daily");
        daemon.client("clone").write(0..100, 3);
        let id = begin(&daemon, "clone", "bytes_per_second=400000")["id"].as_u64().unwrap();
        daemon.api().create("first", &["clone"], &json!({ "wait": true })).ok();
        daemon.client("clone").write(50..150, 4);
        daemon.api().create("second", &["clone"], &json!({ "wait": true })).ok();
        let mut guest = daemon.client("clone");
        guest.write(90..200, 5);
        guest.flush();
        drop(guest);
        let refused = daemon.send("DELETE", "/v1/snapshots/clone@first", "");
        assert_eq!(refused.refused(), "snapshot-busy", "{}", refused.body);
        assert!(refused.body.contains(&format!("job stop {id}")), "{}", refused.body);
        assert_eq!(daemon.send("DELETE", "/v1/volumes/clone?force=true", "").refused(), "volume-busy");
        daemon.send("PATCH", &format!("/v1/jobs/{id}"), r#"{"bytes_per_second":0}"#).ok();
        wait_independent(&daemon, "clone");
        remove_source(&daemon);
        daemon.forget_args();
        let versions = [
            ("clone@first", expect(&[(0..100, 3)])),
            ("clone@second", expect(&[(0..100, 3), (50..150, 4)])),
            ("clone", expect(&[(0..100, 3), (50..150, 4), (90..200, 5)])),
        ];
        for round in 0..2 {
            for (what, bytes) in &versions {
                assert_eq!(&shows(&daemon, what), bytes, "{how:?} {round}: {what}");
            }
            end_and_start(&mut daemon, how);
        }
        // What the volume was when it became independent is folded, as of any disk.
        daemon.delete("clone@first");
        daemon.delete("clone@second");
        let volume = show(&daemon, "clone");
        assert_eq!(shows(&daemon, "clone"), versions[2].1);
        daemon.stop();
        assert_raw(&image_of(&volume), &versions[2].1, "folded");
        daemon.start();
        // A snapshot of it now is one of any strategy.
        daemon.api().create("third", &["clone"], &json!({ "strategy": "copy-on-write", "wait": true })).ok();
        assert_eq!(daemon.show("clone@third")["strategy"], "copy-on-write");
        daemon.client("clone").write(ALL, 6);
        assert_eq!(shows(&daemon, "clone@third"), versions[2].1);
        daemon.delete("clone@third");
        end_and_start(&mut daemon, how);
        assert_eq!(shows(&daemon, "clone"), vec![6; ALL.end], "{how:?}: a start removes no image");
        delete(&daemon, "clone");
        assert_eq!(names_in(&daemon.state_dir().join("images")), [""; 0]);
    }
}

#[test]
fn an_independent_volume_becomes_a_disk() {
    let mut daemon = daemon_with_snapshot("", "copy-on-write");
    let made = made(&daemon, "clone", "vm0@daily");
    let refused = post(&daemon, "clone/promote");
    assert_eq!(refused.refused(), "volume-busy");
    assert!(refused.body.contains("halfsilver volume complete clone"), "{}", refused.body);
    let mut guest = daemon.client("clone");
    guest.write(5..8, 3);
    begin(&daemon, "clone", "");
    let image = image_of(&wait_independent(&daemon, "clone"));
    let events = daemon.events();
    let disk = post(&daemon, "clone/promote");
    assert_eq!(disk.status, 200, "{}", disk.body);
    let disk = disk.json();
    events.wait_for("VOLUME_PROMOTED", "clone");
    assert_eq!((&disk["id"], &disk["socket"], &disk["path"]), (&made["id"], &made["socket"], &json!(image)));
    assert_eq!(disk["connected"], true);
    guest.write(8..10, 4);
    let mut expected = expect(&[(5..8, 3), (8..10, 4)]);
    assert_eq!(tags(&guest.read_all()), expected, "its guest stays connected");
    drop(guest);
    assert_eq!(daemon.get("/v1/volumes").json(), json!([]));
    assert_eq!(daemon.get("/v1/volumes/clone").refused(), "volume-not-found");
    assert_eq!(post(&daemon, "clone/promote").refused(), "volume-not-found");
    assert_eq!(daemon.get("/v1/disks").json().as_array().unwrap().len(), 2);
    remove_source(&daemon);
    daemon.forget_args();
    for (how, strategy) in
        [(End::Stop, "copy-on-write"), (End::Kill, "write-logging"), (End::PowerCut, "write-logging")]
    {
        daemon.api().create("s", &["clone"], &json!({ "strategy": strategy, "wait": true })).ok();
        let frozen = expected.clone();
        let mut guest = daemon.client("clone");
        guest.write(100..110, 40);
        guest.flush();
        drop(guest);
        expected[100..110].fill(40);
        end_and_start(&mut daemon, how);
        assert_eq!(daemon.show_disk("clone")["id"], made["id"]);
        assert_eq!(shows(&daemon, "clone"), expected, "{how:?}");
        assert_eq!(shows(&daemon, "clone@s"), frozen, "{how:?}");
        daemon.delete("clone@s");
    }
    // It can have all that disks have.
    let leg = daemon.make_image("leg", SIZE);
    daemon.send("POST", "/v1/disks/clone/mirror", &json!({ "path": leg }).to_string()).ok();
    wait_until("the leg to be in sync", || daemon.show_disk("clone")["legs"][1]["state"] == "in-sync");
    daemon.send("DELETE", "/v1/disks/clone/mirror", "").ok();
    assert_raw(&leg, &expected, "its leg");
    // A disk's image stays when the disk goes, also at the next start.
    assert_eq!(daemon.send("DELETE", "/v1/disks/clone", "").status, 204);
    daemon.restart();
    assert_eq!(daemon.get("/v1/disks").json(), json!([]));
    assert_raw(&image, &expected, "after it was removed");
    daemon.send("PUT", "/v1/disks/again", &json!({ "path": image }).to_string()).ok();
    assert_eq!(shows(&daemon, "again"), expected);
}

#[test]
fn what_cannot_be_completed_is_refused() {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    for (path, status, code) in [
        ("none/complete", 404, "volume-not-found"),
        ("vm0/complete", 404, "volume-not-found"),
        ("vm0/promote", 404, "volume-not-found"),
        ("vm0/disable", 404, "volume-not-found"),
        ("none/enable", 404, "volume-not-found"),
        ("A/complete", 400, "invalid-name"),
        ("clone/complete?delay_ms=3600001", 400, "invalid-request"),
        ("clone/complete?bytes_per_second=-1", 400, "invalid-request"),
        ("clone/complete?pace=1", 400, "invalid-request"),
        ("clone/enable?fresh=true", 409, "volume-busy"),
        ("clone/enable?fresh=maybe", 400, "invalid-request"),
    ] {
        let refused = post(&daemon, path);
        assert_eq!((refused.status, refused.refused()), (status, code.to_owned()), "{path}");
    }
    for (block_size, why) in [(512, "4K"), (6000, "4K"), (2 << 20, "4K")] {
        let body = json!({ "name": "new", "from": "vm0@daily", "block_size": block_size }).to_string();
        let refused = daemon.send("POST", "/v1/volumes", &body);
        assert_eq!(refused.refused(), "invalid-request", "{block_size}");
        assert!(refused.body.contains("block_size") && refused.body.contains(why), "{}", refused.body);
    }
    assert_eq!(create(&daemon, "clone", "vm0@daily").refused(), "volume-exists");
    begin(&daemon, "clone", "");
    wait_independent(&daemon, "clone");
    let refused = post(&daemon, "clone/complete");
    assert_eq!(refused.refused(), "conflict", "{}", refused.body);
    post(&daemon, "clone/disable").ok();
    assert_eq!(post(&daemon, "clone/enable?fresh=true").refused(), "unsupported");
    assert_eq!(post(&daemon, "clone/promote").refused(), "volume-busy");
    post(&daemon, "clone/enable").ok();
    assert_eq!(shows(&daemon, "clone"), expect(&[]));
}

/// Blocks of another size than the source's, and an image where the user wants it.
#[test]
fn a_volume_has_blocks_of_its_own_size() {
    for block_size in [4096, 65536, 1 << 20] {
        let mut daemon = daemon_with_snapshot("block-size=16K", "write-logging");
        let image = daemon.path("mine.raw");
        let body =
            json!({ "name": "clone", "from": "vm0@daily", "block_size": block_size, "image": image }).to_string();
        let volume = daemon.send("POST", "/v1/volumes", &body);
        assert_eq!((volume.status, &volume.json()["block_size"]), (201, &json!(block_size)), "{}", volume.body);
        let mut guest = daemon.client("clone");
        guest.write(3..5, 7);
        drop(guest);
        assert_eq!(show(&daemon, "clone")["owned_bytes"], block_size);
        begin(&daemon, "clone", "");
        assert_eq!(image_of(&wait_independent(&daemon, "clone")), image);
        remove_source(&daemon);
        daemon.forget_args();
        daemon.restart();
        assert_eq!(show(&daemon, "clone")["block_size"], block_size);
        assert_eq!(shows(&daemon, "clone"), expect(&[(3..5, 7)]));
        assert_raw(&image, &expect(&[(3..5, 7)]), "its image");
    }
}

#[test]
fn the_command_line_completes_and_promotes() {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    let run = |args: &[&str]| {
        let output = daemon.cli(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["volume", "create", "clone", "--from", "vm0@daily", "--block-size", "64K"]);
    assert!(run(&["volume", "show", "clone"]).contains("independent  no\n"));
    assert!(run(&["volume", "disable", "clone"]).contains("state        disabled\n"));
    assert!(run(&["volume", "list"]).contains("clone   disabled  vm0@daily"));
    assert!(run(&["volume", "enable", "clone", "--fresh"]).contains("state        serving\n"));
    let begun: Value =
        serde_json::from_str(&run(&["volume", "complete", "clone", "--limit", "64K", "--json"])).unwrap();
    assert_eq!(begun["bytes_per_second"], 64 << 10);
    let id = begun["id"].to_string();
    assert!(run(&["job", "set", &id, "--limit", "0"]).contains("limit      -\n"));
    run(&["job", "wait", &id]);
    assert!(run(&["volume", "show", "clone"]).contains("independent  yes\n"));
    assert!(run(&["volume", "promote", "clone"]).contains("clone"));
    assert!(run(&["disk", "list"]).contains("clone"));
    run(&["volume", "create", "other", "--from", "vm0@daily"]);
    assert!(run(&["volume", "complete", "other", "--wait"]).contains("state      done\n"));
    for args in
        [&["job", "set", &id][..], &["job", "set", &id, "--limit", "12Q"], &["volume", "complete", "a", "--limit", "x"]]
    {
        assert_eq!(daemon.cli(args).status.code(), Some(2), "{args:?}");
    }
    assert_eq!(daemon.cli(&["volume", "complete", "none"]).status.code(), Some(1));
}

/// A daemon that dies at any step leaves a volume that stands on its snapshot, or an independent one, of the same content.
#[cfg(feature = "planted")]
#[test]
fn planted_death_while_a_volume_becomes_independent() {
    const POINTS: [&str; 7] = [
        "between two steps of a completion",
        "before records are committed",
        "after records were committed",
        "before a volume is recorded as independent",
        "after a volume was recorded as independent",
        "before a file is removed",
        "before a volume is begun anew",
    ];
    let (mut before, mut after) = (0, 0);
    for point in POINTS {
        for count in (1..20).chain([60]) {
            let what = format!("{count}:{point}");
            let mut daemon = daemon_with_snapshot("", "write-logging");
            made(&daemon, "clone", "vm0@daily");
            let mut guest = daemon.client("clone");
            guest.write(3..50, 7);
            guest.flush();
            drop(guest);
            daemon.crash_at = Some(what.clone());
            daemon.stop();
            daemon.spawn();
            let mut died = false;
            while !died && !daemon.is_up() {
                died = daemon.has_died_by(libc::SIGKILL);
            }
            let mut is_done = false;
            if !died {
                post(&daemon, "clone/complete");
                wait_until("its end", || {
                    let pid = daemon.pid();
                    let is_dead =
                        std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |s| s.contains(") Z"));
                    let now = daemon.get("/v1/volumes/clone");
                    is_done = !is_dead && now.status == 200 && now.json()["independent"] == true;
                    is_dead || is_done
                });
            }
            if is_done {
                daemon.kill();
            } else if !died {
                assert_eq!(std::os::unix::process::ExitStatusExt::signal(&daemon.wait_exit()), Some(libc::SIGKILL));
            }
            daemon.crash_at = None;
            daemon.start();
            if show(&daemon, "clone")["independent"] == true {
                after += 1
            } else {
                before += 1
            }
            assert_eq!(shows(&daemon, "clone"), expect(&[(3..50, 7)]), "{what}");
            if show(&daemon, "clone")["independent"] == false {
                // Refused if what the start goes on with by itself ends just now.
                post(&daemon, "clone/complete");
            }
            let volume = wait_independent(&daemon, "clone");
            assert_raw(&image_of(&volume), &expect(&[(3..50, 7)]), &what);
            assert_eq!(
                names_in(&daemon.state_dir().join("images")).len(),
                2,
                "{what}: the volume's, and the disk's log"
            );
            if is_done {
                break;
            }
        }
    }
    println!("{before} deaths left a volume on its snapshot, {after} an independent one");
    assert!(before > 5 && after > 2);
}

/// Each command's answer is durable: the power goes right after it.
#[test]
fn what_was_answered_outlives_a_power_cut() {
    if !can_mount("answers that outlive a power cut") {
        return;
    }
    let mut daemon = daemon_with_snapshot("", "write-logging");
    made(&daemon, "clone", "vm0@daily");
    let changes = [(0..8, 4), (100..101, 5)];
    let write = |daemon: &Daemon| {
        let mut guest = daemon.client("clone");
        changes.iter().for_each(|(at, tag)| guest.write(at.clone(), *tag));
        guest.flush();
        drop(guest);
        wait_until("the frontend to be gone", || show(daemon, "clone")["frontends"] == 0);
    };
    write(&daemon);
    post(&daemon, "clone/disable").ok();
    end_and_start(&mut daemon, End::PowerCut);
    assert_eq!(show(&daemon, "clone")["state"], "disabled");
    post(&daemon, "clone/enable").ok();
    end_and_start(&mut daemon, End::PowerCut);
    assert_eq!(show(&daemon, "clone")["state"], "serving");
    assert_eq!(shows(&daemon, "clone"), expect(&changes));
    wait_until("the frontend to be gone", || show(&daemon, "clone")["frontends"] == 0);
    post(&daemon, "clone/disable").ok();
    post(&daemon, "clone/enable?fresh=true").ok();
    end_and_start(&mut daemon, End::PowerCut);
    assert_eq!(shows(&daemon, "clone"), expect(&[]), "begun anew");
    write(&daemon);
    begin(&daemon, "clone", "");
    wait_independent(&daemon, "clone");
    end_and_start(&mut daemon, End::PowerCut);
    assert_eq!(show(&daemon, "clone")["independent"], true);
    assert_eq!(shows(&daemon, "clone"), expect(&changes));
    post(&daemon, "clone/promote").ok();
    end_and_start(&mut daemon, End::PowerCut);
    assert_eq!(daemon.show_disk("clone")["state"], "serving");
    assert_eq!(daemon.send("GET", "/v1/volumes/clone", "").refused(), "volume-not-found");
    assert_eq!(shows(&daemon, "clone"), expect(&changes));
}
