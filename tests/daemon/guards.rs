//! What anything needs does not go: what a restore, a volume or a job stands on, whatever name it has by then and whatever
//! is forced; nor does a restore that is under way, whatever becomes of its disk's configuration.
//!
//! What else may not be done to a disk while it is restored is in `restore.rs`, what is refused at all in `refused.rs`.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use serde_json::{Value, json};

use crate::asking::{cli_within, follow_advice, jobs, lift_paces, start_if_it_can};
use crate::client::{Client, tags};
use crate::harness::{Daemon, PATIENCE, can_mount, wait_until};
use crate::hung::has_hanging_thread;
use crate::independent::{post, wait_independent};
use crate::restore::{self, HOURS, changed_disk, ones};
use crate::strategies::{End, SIZE, end_and_start, shows};
use crate::trouble::{Mount, Standstill};
use crate::volumes::made;

/// What the volume `v` has otherwise than the snapshot that it was made off.
const WRITTEN: [(Range<usize>, u64); 2] = [(0..8, 4), (1100..1101, 5)];

/// A changed disk with the independent volume `v`, which has a content of its own. Also that content.
fn with_independent_volume() -> (Daemon, Vec<u64>) {
    let daemon = changed_disk("copy-on-write");
    made(&daemon, "v", "vm0@daily");
    post(&daemon, "v/complete").ok();
    wait_independent(&daemon, "v");
    let mut client = daemon.client("v");
    WRITTEN.into_iter().for_each(|(at, tag)| client.write(at, tag));
    client.flush();
    drop(client);
    wait_until("the frontend to be gone", || daemon.get("/v1/volumes/v").json()["frontends"] == 0);
    (daemon, ones(&WRITTEN))
}

/// The same, and the disk is being restored from the volume, with hours between two steps.
fn restored_from_volume() -> (Daemon, Vec<u64>) {
    let (daemon, wanted) = with_independent_volume();
    restore::begin(&daemon, "v", HOURS);
    assert_eq!(shows(&daemon, "vm0"), wanted);
    (daemon, wanted)
}

/// The snapshot that the disk is being restored from.
fn source(daemon: &Daemon) -> String {
    daemon.show_disk("vm0")["restoring"]["from"].as_str().unwrap().to_owned()
}

/// One command that must be refused with this code, and must name what needs the thing.
type Needed<'a> = (&'a str, &'a str, &'a str, &'a str, &'a str);

/// Each is refused, says who needs it, and takes nothing of the disk. All that is wrong is told at once.
#[track_caller]
fn assert_needed(daemon: &Daemon, rows: &[Needed], wanted: &[u64]) {
    let mut wrong = Vec::new();
    for &(method, path, body, code, needs) in rows {
        let answer = daemon.send(method, path, body);
        let is_told = answer.status >= 400 && answer.refused() == code && answer.body.contains(needs);
        if !is_told {
            wrong.push(format!("{method} {path}: {} {}", answer.status, answer.body));
        }
        if shows(daemon, "vm0") != wanted {
            wrong.push(format!("{method} {path}: the disk shows something else"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A volume that became a disk is still what another disk is restored from: it is not removed, the refusal names the
/// restore and its job, and with the pace lifted the advice leads to its removal.
#[test]
fn a_disk_that_another_one_is_restored_from_is_not_removed() {
    let (mut daemon, wanted) = restored_from_volume();
    let job = restore::the_job(&daemon)["id"].clone();
    post(&daemon, "v/promote").ok();
    let refused = daemon.send("DELETE", "/v1/disks/v?force=true", "");
    assert_eq!(refused.refused(), "disk-busy", "{}", refused.body);
    let told = refused.json();
    assert!(told["detail"].as_str().unwrap().contains("vm0"), "{told}");
    assert!(refused.body.contains(&format!("job {job}")), "{told}");
    daemon.kill();
    daemon.start();
    assert_eq!(shows(&daemon, "vm0"), wanted);
    lift_paces(&daemon);
    let done = follow_advice(&daemon, &|| daemon.send("DELETE", "/v1/disks/v?force=true", ""));
    println!("removed after {done:?}");
    assert_eq!(daemon.show_disk("vm0")["restoring"], Value::Null);
    assert_eq!(shows(&daemon, "vm0"), wanted);
    daemon.kill();
    daemon.start();
    assert_eq!(shows(&daemon, "vm0"), wanted);
}

/// A removal that is asked for while a restore's job is stopped is refused as well; the advice resumes the job first.
#[test]
fn the_advice_goes_on_with_a_stopped_restore() {
    let (daemon, wanted) = restored_from_volume();
    let job = restore::the_job(&daemon)["id"].clone();
    post(&daemon, "v/promote").ok();
    daemon.send("DELETE", &format!("/v1/jobs/{job}"), "").ok();
    lift_paces(&daemon);
    let done = follow_advice(&daemon, &|| daemon.send("DELETE", "/v1/disks/v?force=true", ""));
    assert!(done.contains(&format!("job resume {job}")), "{done:?}");
    assert_eq!(daemon.show_disk("vm0")["restoring"], Value::Null);
    assert_eq!(shows(&daemon, "vm0"), wanted);
}

/// RestoredFrom: nothing that is done to the source takes away what is not copied yet, by force or not, also after a kill.
#[test]
fn what_a_disk_is_restored_from_never_goes() {
    let (mut daemon, wanted) = restored_from_volume();
    let from = source(&daemon);
    let snapshot = format!("/v1/snapshots/{from}?force=true");
    let rows: &[Needed] = &[
        ("DELETE", &snapshot, "", "snapshot-busy", "vm0"),
        ("DELETE", "/v1/volumes/v?force=true", "", "volume-busy", "vm0"),
        ("POST", "/v1/volumes/v/update?force=true", "", "volume-busy", "v"),
        ("DELETE", "/v1/disks/vm0?force=true", "", "disk-busy", "restored"),
    ];
    assert_needed(&daemon, rows, &wanted);
    // It may have no socket meanwhile, and is needed all the same.
    post(&daemon, "v/disable?force=true").ok();
    let fresh = post(&daemon, "v/enable?fresh=true");
    assert!(fresh.status >= 400, "{}", fresh.body);
    assert_needed(&daemon, rows, &wanted);
    daemon.kill();
    daemon.start();
    assert_needed(&daemon, rows, &wanted);
    post(&daemon, "v/enable").ok();
    post(&daemon, "v/promote").ok();
    assert_needed(
        &daemon,
        &[
            ("DELETE", &snapshot, "", "snapshot-busy", "vm0"),
            ("DELETE", "/v1/disks/v?force=true", "", "disk-busy", "vm0"),
        ],
        &wanted,
    );
    daemon.kill();
    daemon.start();
    restore::finish(&daemon);
    assert_eq!(shows(&daemon, "vm0"), wanted);
}

/// A name is a name: what is needed under one is needed under the next, and a restore goes on whatever its disk is called.
#[test]
fn what_is_needed_is_needed_by_any_name() {
    let (mut daemon, wanted) = restored_from_volume();
    post(&daemon, "v/promote").ok();
    let rename = |from: &str, to: &str| {
        let output = cli_within(&daemon, &["disk", "rename", from, to], *PATIENCE).expect("it ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(daemon.get(&format!("/v1/disks/{from}")).status, 404);
    };
    rename("v", "w");
    assert_needed(&daemon, &[("DELETE", "/v1/disks/w?force=true", "", "disk-busy", "vm0")], &wanted);
    rename("vm0", "main");
    // Another one of the old name is another one.
    daemon.make_image("v", SIZE);
    daemon.send("PUT", "/v1/disks/v", &json!({ "path": daemon.image("v") }).to_string()).ok();
    daemon.send("DELETE", "/v1/disks/v", "").ok();
    daemon.forget_args();
    daemon.kill();
    daemon.start();
    let disk = daemon.show_disk("main");
    assert!(disk["restoring"]["from"].as_str().is_some_and(|from| from.starts_with("w@")), "{disk}");
    let content = || {
        let socket = daemon.show_disk("main")["socket"].as_str().unwrap().to_owned();
        let mut client = Client::connect(socket.as_ref(), 1, true).unwrap();
        tags(&client.read_all())
    };
    assert_eq!(content(), wanted);
    let refused = daemon.send("DELETE", "/v1/disks/w?force=true", "");
    assert_eq!(refused.refused(), "disk-busy", "{}", refused.body);
    assert!(refused.body.contains("main"), "{}", refused.body);
    lift_paces(&daemon);
    wait_until("the restore to be over", || daemon.show_disk("main")["restoring"].is_null());
    assert_eq!(content(), wanted);
    // The snapshot that was taken for it goes a moment later, and holds the volume until then.
    wait_until("the snapshot of the restore to be gone", || daemon.snapshots().iter().all(|s| s["disk"] != "w"));
    daemon.send("DELETE", "/v1/disks/w?force=true", "").ok();
}

/// RestoredThrough: newer snapshots of the source, through which the restored one reads, stay until all is copied; so do
/// those that are below the volume.
#[test]
fn what_a_restore_reads_through_never_goes() {
    let power = can_mount("a restore that outlives a power cut");
    let (mut daemon, wanted) = with_independent_volume();
    daemon.snapshot("s1", &["v"]);
    daemon.client("v").write(200..210, 6);
    daemon.snapshot("s2", &["v"]);
    daemon.client("v").write(200..210, 7);
    restore::begin(&daemon, "v@s1", HOURS);
    assert_eq!(shows(&daemon, "vm0"), wanted);
    let rows: &[Needed] = &[
        ("DELETE", "/v1/snapshots/v@s1?force=true", "", "snapshot-busy", "vm0"),
        ("DELETE", "/v1/snapshots/v@s2?force=true", "", "snapshot-busy", "vm0"),
        ("DELETE", "/v1/volumes/v?force=true", "", "volume-busy", "v"),
    ];
    assert_needed(&daemon, rows, &wanted);
    end_and_start(&mut daemon, if power { End::PowerCut } else { End::Kill });
    assert_needed(&daemon, rows, &wanted);
    post(&daemon, "v/promote").ok();
    assert_needed(&daemon, &[("DELETE", "/v1/disks/v?force=true", "", "disk-busy", "vm0")], &wanted);
    restore::finish(&daemon);
    assert_eq!(shows(&daemon, "vm0"), wanted);
    daemon.delete("v@s1");
    daemon.delete("v@s2");
}

/// RestoredThrough, further down: the volume that is restored from stands on a snapshot of another one, which became a
/// disk meanwhile.
#[test]
fn what_is_below_the_volume_of_a_restore_never_goes() {
    let (mut daemon, _) = with_independent_volume();
    daemon.snapshot("s", &["v"]);
    made(&daemon, "top", "v@s");
    daemon.client("top").write(400..408, 9);
    wait_until("the frontend to be gone", || daemon.get("/v1/volumes/top").json()["frontends"] == 0);
    restore::begin(&daemon, "top", HOURS);
    let wanted = ones(&[&WRITTEN[..], &[(400..408, 9)]].concat());
    post(&daemon, "v/promote").ok();
    let from = format!("/v1/snapshots/{}?force=true", source(&daemon));
    let rows: &[Needed] = &[
        ("DELETE", "/v1/snapshots/v@s?force=true", "", "snapshot-busy", "top"),
        ("DELETE", "/v1/disks/v?force=true", "", "disk-busy", "top"),
        ("DELETE", "/v1/volumes/top?force=true", "", "volume-busy", "vm0"),
        ("DELETE", &from, "", "snapshot-busy", "vm0"),
        ("POST", "/v1/volumes/top/update?force=true", "", "volume-busy", "top"),
    ];
    assert_needed(&daemon, rows, &wanted);
    daemon.kill();
    daemon.start();
    assert_needed(&daemon, rows, &wanted);
    // When it needs them no more, its own content is still what the disk is restored from.
    post(&daemon, "top/complete").ok();
    wait_until("the volume to need nobody", || daemon.get("/v1/volumes/top").json()["independent"] == true);
    daemon.delete("v@s");
    daemon.send("DELETE", "/v1/disks/v?force=true", "").ok();
    post(&daemon, "top/promote").ok();
    assert_needed(&daemon, &[("DELETE", "/v1/disks/top?force=true", "", "disk-busy", "vm0")], &wanted);
    daemon.kill();
    daemon.start();
    restore::finish(&daemon);
    assert_eq!(shows(&daemon, "vm0"), wanted);
}

/// StandsOn and TakenFor: what a volume stands on stays through its update, and what was taken for that goes by itself.
#[test]
fn what_a_volume_stands_on_never_goes() {
    let mut daemon = changed_disk("copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    let live = shows(&daemon, "vm0");
    wait_until("the frontend to be gone", || daemon.get("/v1/volumes/clone").json()["frontends"] == 0);
    post(&daemon, "clone/update").ok();
    let below = daemon.get("/v1/volumes/clone").json()["from"].as_str().unwrap().to_owned();
    let snapshot = format!("/v1/snapshots/{below}?force=true");
    let bookmark = format!("/v1/bookmarks/{below}");
    let rows: &[Needed] = &[
        ("DELETE", &snapshot, "", "snapshot-busy", "clone"),
        ("DELETE", &bookmark, "", "bookmark-not-found", &below),
        ("DELETE", "/v1/disks/vm0?force=true", "", "disk-busy", "clone"),
        ("POST", "/v1/volumes/clone/promote", "", "volume-busy", "clone"),
    ];
    assert_needed(&daemon, rows, &live);
    post(&daemon, "clone/disable").ok();
    assert_needed(&daemon, rows, &live);
    daemon.kill();
    daemon.start();
    assert_needed(&daemon, rows, &live);
    post(&daemon, "clone/enable").ok();
    daemon.client("vm0").write(0..100, 8);
    assert_eq!(shows(&daemon, "clone"), live, "the volume is all there");
}

/// A job that copies with hours between two steps, and what it needs: the update of a volume that was independent counts
/// from a bookmark, and stands on the snapshot that was taken for it.
#[test]
fn what_the_job_of_an_update_needs_never_goes() {
    let (mut daemon, _) = with_independent_volume();
    let live = shows(&daemon, "vm0");
    wait_until("the frontend to be gone", || daemon.get("/v1/volumes/v").json()["frontends"] == 0);
    let id = post(&daemon, "v/update?delay_ms=3600000").json()["id"].clone();
    let below = daemon.get("/v1/volumes/v").json()["from"].as_str().unwrap().to_owned();
    let snapshot = format!("/v1/snapshots/{below}?force=true");
    let rows: &[Needed] = &[
        ("DELETE", &snapshot, "", "snapshot-busy", "v"),
        ("DELETE", "/v1/disks/vm0?force=true", "", "disk-busy", "v"),
        ("POST", "/v1/volumes/v/promote", "", "volume-busy", "v"),
    ];
    assert_needed(&daemon, rows, &live);
    // What it counts from may go or not; the volume is right either way.
    daemon.send("DELETE", "/v1/bookmarks/vm0@daily", "");
    daemon.send("DELETE", &format!("/v1/jobs/{id}"), "").ok();
    assert_needed(&daemon, rows, &live);
    daemon.kill();
    daemon.start();
    assert_eq!(shows(&daemon, "v"), live);
    lift_paces(&daemon);
    for job in jobs(&daemon).iter().filter(|job| job["state"] == "stopped") {
        daemon.send("POST", &format!("/v1/jobs/{}/resume", job["id"]), "").ok();
    }
    wait_independent(&daemon, "v");
    assert_eq!(shows(&daemon, "v"), live);
}

/// LegOf: an image that is a leg is no disk, no other disk's leg and no snapshot's image, also while a snapshot has it.
#[test]
fn a_leg_is_nothing_else() {
    let (daemon, leg) = crate::mirror::mirrored();
    daemon.make_image("vm1", 8 << 20);
    daemon.send("PUT", "/v1/disks/vm1", &json!({ "path": daemon.image("vm1") }).to_string()).ok();
    for state in ["in sync", "split"] {
        if state == "split" {
            daemon.api().create("a", &["vm0"], &json!({ "strategy": "write-mirroring", "wait": true })).ok();
        }
        for (method, path, body) in [
            ("PUT", "/v1/disks/other", json!({ "path": leg })),
            ("POST", "/v1/disks/vm1/mirror", json!({ "path": leg })),
            ("POST", "/v1/snapshots", json!({ "name": "b", "disks": ["vm1"], "image": leg })),
            ("POST", "/v1/volumes", json!({ "name": "new", "from": "vm1", "image": leg })),
        ] {
            let refused = daemon.send(method, path, &body.to_string());
            assert_eq!(refused.refused(), "conflict", "{state}: {method} {path}: {}", refused.body);
        }
    }
    let unmirrored = daemon.send("DELETE", "/v1/disks/vm0/mirror", "");
    assert_eq!(unmirrored.refused(), "disk-busy", "{}", unmirrored.body);
    assert!(unmirrored.body.contains("vm0@a"), "the refusal names what has the leg: {}", unmirrored.body);
    assert_eq!(daemon.state("vm0@a"), "quiesced");
}

/// What the disk is when it comes back with another configuration. Ok if it goes on, or is not served and says why.
fn survives(daemon: &Daemon, wanted: &[u64]) -> Result<(), String> {
    let disk = daemon.get("/v1/disks/vm0");
    if disk.status != 200 {
        return Err(format!("it is not listed: {}", disk.body));
    }
    let disk = disk.json();
    if disk["restoring"].is_null() {
        return Err(format!("the restore is dropped: {disk}"));
    }
    match disk["state"].as_str().unwrap() {
        "unserved" if disk["reason"].as_str().is_some_and(|why| why.contains("restor")) => Ok(()),
        "serving" if shows(daemon, "vm0") == wanted => Ok(()),
        "serving" => Err("it shows something else".to_owned()),
        _ => Err(disk.to_string()),
    }
}

/// A restore outlives a disk that comes back with something else in its configuration: it goes on, or the disk is not
/// served and says why; and as it was configured before, it goes on.
#[test]
fn a_restore_outlives_another_configuration() {
    let mut wrong = Vec::new();
    for (what, change) in [
        ("block size", "block-size=8192"),
        ("queues", "queues=3"),
        ("cache", "direct=off"),
        ("read-only", "readonly=on"),
        ("mirror", "mirror=$DIR/leg.raw"),
        ("name of its image", "$OTHER"),
        ("another image", "$NEW"),
    ] {
        let (mut daemon, wanted) = with_independent_volume();
        daemon.delete("vm0@daily"); // Nothing of its own is remembered of the disk but the restore.
        restore::begin(&daemon, "v", HOURS);
        daemon.send("DELETE", &format!("/v1/jobs/{}", restore::the_job(&daemon)["id"]), "").ok();
        let removed = daemon.send("DELETE", "/v1/disks/vm0?force=true", "");
        assert_eq!(removed.refused(), "disk-busy", "{}", removed.body);
        daemon.stop();
        daemon.forget_args();
        match change {
            "$OTHER" => {
                std::fs::hard_link(daemon.image("vm0"), daemon.image("same")).unwrap();
                daemon.arg_disk_at("vm0", &daemon.image("same"), "");
            }
            "$NEW" => {
                daemon.make_image("new", SIZE);
                daemon.arg_disk_at("vm0", &daemon.image("new"), "");
            }
            options => daemon.arg_disk("vm0", &options.replace("$DIR", daemon.dir.path().to_str().unwrap())),
        }
        let found = match start_if_it_can(&mut daemon) {
            true => survives(&daemon, &wanted),
            false => Err(format!("the start ended: {}", daemon.log_text().lines().last().unwrap_or_default())),
        };
        if daemon.is_running() {
            daemon.stop();
        }
        daemon.forget_args();
        daemon.arg_disk("vm0", "");
        daemon.start();
        let back = survives(&daemon, &wanted);
        wrong.extend(found.err().map(|why| format!("another {what}: {why}")));
        wrong.extend(back.err().map(|why| format!("after another {what}, as before: {why}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A restore without force, while the state directory stands still: whether or not a guest gets in meanwhile, none has
/// its disk changed under it.
#[test]
fn no_guest_that_comes_during_a_restore_has_its_disk_changed() {
    if !can_mount("no_guest_that_comes_during_a_restore_has_its_disk_changed") {
        return;
    }
    let mut daemon = Daemon::place();
    let _state = Mount::ext4(&daemon.state_dir(), 64 << 20);
    std::fs::set_permissions(daemon.state_dir(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "");
    daemon.start();
    daemon.client("vm0").write(1024..2048, 1);
    daemon.snap("daily");
    daemon.client("vm0").write(1024..2048, 2);
    wait_until("the frontend to be gone", || daemon.show_disk("vm0")["frontends"] == 0);
    let standstill = Standstill::begin(&daemon.state_dir());
    let api = daemon.api();
    let body = json!({ "from": "vm0@daily" }).to_string();
    let asked = std::thread::spawn(move || api.send("POST", "/v1/disks/vm0/restore", &body));
    wait_until("the restore to stand still", || asked.is_finished() || has_hanging_thread(daemon.pid()));
    let (socket, (tell, told), over) = (daemon.socket("vm0"), channel(), Arc::new(AtomicBool::new(false)));
    let is_over = over.clone();
    let guest = std::thread::spawn(move || {
        let mut client = loop {
            match Client::connect(&socket, 1, false) {
                Ok(client) => break client,
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let first = client.tag(1500);
        tell.send(first).ok();
        while !is_over.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        (first, client.tag(1500))
    });
    // A daemon that lets no guest in before the restore has begun is right too.
    let got_in = told.recv_timeout(Duration::from_secs(3)).is_ok();
    drop(standstill);
    let answer = asked.join().unwrap();
    over.store(true, Ordering::SeqCst);
    let (before, after) = guest.join().unwrap();
    println!("a guest got in: {got_in}; the restore: {}; it read {before}, then {after}", answer.status);
    assert_eq!(before, after, "the disk was changed under a guest: {} {}", answer.status, answer.body);
    assert_eq!(after, if answer.status == 202 { 1 } else { 2 }, "{} {}", answer.status, answer.body);
}

/// The same with a guest that comes and goes all the time, and writes what the restore takes back.
#[test]
fn a_guest_that_connects_again_and_again_never_sees_a_restore_happen() {
    let daemon = changed_disk("copy-on-write");
    let (socket, over) = (daemon.socket("vm0"), Arc::new(AtomicBool::new(false)));
    let is_over = over.clone();
    let guest = std::thread::spawn(move || {
        let (mut stays, mut changed) = (0, 0);
        while !is_over.load(Ordering::SeqCst) {
            let Ok(mut client) = Client::connect(&socket, 1, false) else { continue };
            stays += 1;
            client.write(1024..2048, 2);
            for _ in 0..10 {
                std::thread::sleep(Duration::from_millis(2));
                changed += usize::from(client.tag(1500) != 2);
            }
            drop(client);
            std::thread::sleep(Duration::from_millis(15));
        }
        (stays, changed)
    });
    for _ in 0..20 {
        wait_until("a moment without a guest", || {
            let answer = daemon.send("POST", "/v1/disks/vm0/restore", r#"{"from":"vm0@daily"}"#);
            let is_begun = answer.status == 202;
            assert!(is_begun || answer.refused() == "disk-busy", "{}", answer.body);
            is_begun
        });
        wait_until("the restore to be over", || daemon.show_disk("vm0")["restoring"].is_null());
    }
    over.store(true, Ordering::SeqCst);
    let (stays, changed) = guest.join().unwrap();
    println!("20 restores, {stays} stays of a guest");
    assert_eq!(changed, 0, "the disk was changed under a guest");
}
