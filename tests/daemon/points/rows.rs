//! What is done with a volume and its source: disabled, enabled, completed, restored from; asked for settings, maps, state.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{BLOCK, BLOCKS, Changes, HOURS, IN_CLONE, IN_SOURCE, Rig, bits, blocks_of, content, differing};
use crate::client::tags;
use crate::harness::wait_until;
use crate::strategies::{End, SIZE};

pub(super) fn disable(rig: &Rig) {
    let socket = rig.daemon.borrow().socket("clone");
    assert!(socket.exists());
    assert_eq!(rig.post("/v1/volumes/clone/disable")["state"], "disabled");
    for how in [None, Some(End::Stop), Some(End::Kill)] {
        how.into_iter().for_each(|how| rig.end(how));
        assert_eq!(rig.clone()["state"], "disabled", "{how:?}");
        assert!(!socket.exists(), "nobody can connect: {how:?}");
    }
    // What is written to the source meanwhile is still saved for it.
    rig.write("vm0", &[(0..16, 9)]);
    rig.post("/v1/volumes/clone/enable");
    assert_eq!(rig.shows("clone"), content(IN_CLONE));
}

pub(super) fn enable(rig: &Rig) {
    let before = rig.get("/v1/volumes/clone/map");
    rig.post("/v1/volumes/clone/disable");
    assert_eq!(rig.post("/v1/volumes/clone/enable")["state"], "serving");
    assert_eq!(rig.get("/v1/volumes/clone/map"), before, "with its maps");
    assert_eq!(rig.shows("clone"), content(IN_CLONE));
}

pub(super) fn enable_fresh(rig: &Rig) {
    let id = rig.clone()["id"].clone();
    rig.post("/v1/volumes/clone/disable");
    assert_eq!(rig.post("/v1/volumes/clone/enable?fresh=true")["state"], "serving");
    assert_eq!(bits(&rig.get("/v1/volumes/clone/map")["owned"]), BTreeSet::new(), "without its maps");
    assert_eq!(rig.shows("clone"), content(&[]), "as its snapshot is, not as its source");
    assert_eq!(rig.clone()["id"], id);
    rig.write("clone", &[(40..48, 8)]);
    assert_eq!(rig.shows("clone"), content(&[(40..48, 8)]));
}

pub(super) fn create(rig: &Rig) {
    let made = rig.done("POST", "/v1/volumes", &json!({ "name": "now", "from": "vm0" }));
    assert_eq!((&made["state"], &made["from"]), (&json!("serving"), &json!("vm0@now")));
    rig.write("vm0", &[(0..2048, 9)]);
    assert_eq!(rig.shows("now"), content(IN_SOURCE), "its source as it was then");
    rig.write("now", &[(0..8, 7)]);
    assert_eq!(rig.shows("vm0"), content(&[(0..2048, 9)]));
    rig.post("/v1/volumes/now/disable");
    rig.post("/v1/volumes/now/enable");
    assert_eq!(rig.shows("now")[..9], [7, 7, 7, 7, 7, 7, 7, 7, 1]);
}

/// Asks for everything that can be asked for, and finds it in the answer.
fn configured(rig: &Rig) -> Value {
    let (socket, image) = (rig.daemon.borrow().path("own.sock"), rig.daemon.borrow().path("own.img"));
    let asked = json!({ "name": "own", "from": "vm0@daily", "socket": socket, "image": image, "block_size": 65536 });
    rig.done("POST", "/v1/volumes", &asked);
    let shown = rig.get("/v1/volumes/own");
    for (key, value) in asked.as_object().unwrap() {
        assert_eq!(&shown[key], value, "{key}");
    }
    let from = rig.get("/v1/snapshots/vm0@daily");
    assert_eq!((&shown["from_id"], &shown["size_bytes"]), (&from["id"], &json!(SIZE)));
    shown
}

pub(super) fn active_configuration(rig: &Rig) {
    let shown = configured(rig);
    assert_eq!((&shown["state"], &shown["frontends"]), (&json!("serving"), &json!(0)));
    let socket = std::path::PathBuf::from(shown["socket"].as_str().unwrap());
    let mut guest = crate::client::Client::connect(&socket, 1, false).unwrap();
    assert_eq!(guest.size(), SIZE);
    guest.write(0..8, 7);
    assert_eq!(tags(&guest.read_all()), content(&[(0..8, 7)]));
    let now = rig.get("/v1/volumes/own");
    assert_eq!((&now["connected"], &now["frontends"]), (&json!(true), &json!(1)));
    assert_eq!(now["owned_bytes"], 65536, "one block of the size that was asked for");
}

pub(super) fn configuration(rig: &Rig) {
    let shown = configured(rig);
    rig.post("/v1/volumes/own/disable");
    for how in [None, Some(End::Stop), Some(End::Kill)] {
        how.into_iter().for_each(|how| rig.end(how));
        let mut now = rig.get("/v1/volumes/own");
        assert_eq!(now["state"].take(), "disabled");
        now["state"] = shown["state"].clone();
        assert_eq!(now, shown, "{how:?}");
    }
}

pub(super) fn status(rig: &Rig) {
    let status = rig.get("/v1/volumes/clone/status");
    let expected = [
        ("blocks", BLOCKS),
        ("owned_blocks", blocks_of(IN_CLONE).len()),
        ("changed_blocks", blocks_of(IN_CLONE).len()),
        ("source_changed_blocks", blocks_of(IN_SOURCE).len()),
        ("differing_blocks", differing()),
    ];
    for (key, value) in expected {
        assert_eq!(status[key], value, "{key}: {status}");
    }
    for (key, part) in [("percent_differing", differing()), ("percent_complete", blocks_of(IN_CLONE).len())] {
        let percent = part as f64 * 100.0 / BLOCKS as f64;
        assert!((status[key].as_f64().unwrap() - percent).abs() < 0.01, "{key}: {status}");
    }
    assert_eq!((&status["source"], &status["from"]), (&json!("vm0"), &json!("vm0@daily")));
    rig.post("/v1/volumes/clone/complete");
    rig.wait_done();
    assert_eq!(rig.get("/v1/volumes/clone/status")["percent_complete"], 100.0);
}

pub(super) fn maps(rig: &Rig) {
    let map = rig.get("/v1/volumes/clone/map");
    assert_eq!((&map["block_size"], &map["blocks"]), (&json!(BLOCK), &json!(BLOCKS)));
    assert_eq!(bits(&map["owned"]), blocks_of(IN_CLONE), "{map}");
    assert_eq!(bits(&map["changed"]), blocks_of(IN_CLONE), "{map}");
    rig.write("clone", &[(800..817, 5)]);
    let mut written = blocks_of(IN_CLONE);
    written.extend([100, 101, 102]);
    assert_eq!(bits(&rig.get("/v1/volumes/clone/map")["owned"]), written);
    // Completed, it owns everything, and still knows what was written.
    rig.post("/v1/volumes/clone/complete");
    rig.wait_done();
    let map = rig.get("/v1/volumes/clone/map");
    assert_eq!((bits(&map["owned"]), bits(&map["changed"])), ((0..BLOCKS).collect(), written), "{map}");
}

pub(super) fn complete(rig: &Rig) {
    let job = rig.post("/v1/volumes/clone/complete");
    assert_eq!((&job["kind"], &job["disk"]), (&json!("migrate"), &json!("clone")));
    rig.wait_done();
    let volume = rig.clone();
    assert_eq!(volume["independent"], true);
    // Without anything below it, and without us.
    rig.daemon.borrow().delete("vm0@daily");
    assert_eq!(rig.send("DELETE", "/v1/disks/vm0", "").status, 204);
    std::fs::remove_file(rig.daemon.borrow().image("vm0")).unwrap();
    assert_eq!(rig.shows("clone"), content(IN_CLONE));
    assert_eq!(tags(&std::fs::read(volume["image"].as_str().unwrap()).unwrap()), content(IN_CLONE));
}

pub(super) fn restore(rig: &Rig) {
    rig.begin_restore(HOURS);
    assert_eq!(rig.shows("vm0"), content(IN_CLONE), "at once");
    rig.pace(0);
    rig.wait_done();
    assert_eq!(rig.pending(), Value::Null);
    assert_eq!(rig.shows("vm0"), content(IN_CLONE));
    assert_eq!(rig.shows("clone"), content(IN_CLONE));
    assert_eq!(rig.shows("vm0@daily"), content(&[]));
}

/// Blocks that a completion has copied.
fn copied(rig: &Rig) -> usize {
    bits(&rig.get("/v1/volumes/clone/map")["owned"]).len() - blocks_of(IN_CLONE).len()
}

/// Blocks that a restore has brought back.
fn brought_back(rig: &Rig) -> usize {
    let pending = rig.pending().as_u64().map_or(0, |bytes| usize::try_from(bytes).unwrap());
    differing() - pending / BLOCK
}

/// With a pause of hours one block is done and no more, which is kept over a kill; a short one comes after each block.
#[track_caller]
fn is_delayed(rig: &Rig, done: fn(&Rig) -> usize, blocks: usize, short_ms: u32) {
    wait_until("the first block", || done(rig) == 1);
    assert_eq!(rig.job()["delay_ms"], HOURS);
    rig.end(End::Kill);
    wait_until("one more", || done(rig) == 2);
    let job = rig.job();
    assert_eq!((&job["state"], &job["delay_ms"]), (&json!("running"), &json!(HOURS)), "{job}");
    let began = Instant::now();
    assert_eq!(rig.pace(short_ms)["delay_ms"], short_ms);
    rig.wait_done();
    let least = Duration::from_millis(u64::from(short_ms)) * u32::try_from(blocks - 3).unwrap();
    assert!(began.elapsed() >= least, "{:?} for {blocks} blocks, {short_ms} ms after each", began.elapsed());
    assert_eq!(done(rig), blocks);
}

pub(super) fn delay_complete(rig: &Rig) {
    assert_eq!(rig.post(&format!("/v1/volumes/clone/complete?delay_ms={HOURS}"))["delay_ms"], HOURS);
    is_delayed(rig, copied, BLOCKS - blocks_of(IN_CLONE).len(), 4);
    assert_eq!(rig.shows("clone"), content(IN_CLONE));
}

pub(super) fn delay_restore(rig: &Rig) {
    assert_eq!(rig.begin_restore(HOURS)["delay_ms"], HOURS);
    is_delayed(rig, brought_back, differing(), 100);
    assert_eq!(rig.shows("vm0"), content(IN_CLONE));
}

/// It does nothing more, also after a restart, until it is resumed.
#[track_caller]
fn stays_stopped(rig: &Rig, done: fn(&Rig) -> usize, (shown, wanted): (&str, &Changes)) {
    wait_until("the first block", || done(rig) == 1);
    let stopped = rig.done("DELETE", &format!("/v1/jobs/{}", rig.job()["id"]), &Value::Null);
    assert_eq!(stopped["state"], "stopped");
    rig.pace(0);
    for how in [None, Some(End::Stop), Some(End::Kill)] {
        how.into_iter().for_each(|how| rig.end(how));
        assert_eq!(rig.job()["state"], "stopped", "{how:?}");
        assert_eq!(done(rig), 1, "what was done stays done, and nothing more is: {how:?}");
        assert_eq!(rig.shows(shown), content(wanted), "{how:?}");
    }
    assert_eq!(rig.post(&format!("/v1/jobs/{}/resume", rig.job()["id"]))["state"], "running");
    rig.wait_done();
    assert_eq!(rig.shows(shown), content(wanted));
}

pub(super) fn stop_complete(rig: &Rig) {
    rig.post(&format!("/v1/volumes/clone/complete?delay_ms={HOURS}"));
    stays_stopped(rig, copied, ("clone", IN_CLONE));
    assert_eq!(rig.clone()["independent"], true);
}

pub(super) fn stop_restore(rig: &Rig) {
    rig.begin_restore(HOURS);
    stays_stopped(rig, brought_back, ("vm0", IN_CLONE));
    assert_eq!(rig.pending(), Value::Null);
}

/// The volume has everything, and is brought to the present of its source, which it shows at once.
fn begin_update(rig: &Rig, query: &str) -> Value {
    rig.post("/v1/volumes/clone/complete");
    rig.wait_done();
    rig.done("DELETE", &format!("/v1/jobs/{}", rig.job()["id"]), &Value::Null);
    let job = rig.post(&format!("/v1/volumes/clone/update{query}"));
    assert_eq!((&job["kind"], &job["disk"]), (&json!("update"), &json!("clone")));
    assert_eq!(rig.shows("clone"), content(IN_SOURCE));
    job
}

/// Blocks that an update has copied.
fn updated(rig: &Rig) -> usize {
    let owned = rig.get("/v1/volumes/clone/status")["owned_blocks"].as_u64().unwrap();
    usize::try_from(owned).unwrap() + differing() - BLOCKS
}

pub(super) fn update(rig: &Rig) {
    begin_update(rig, "");
    rig.wait_done();
    assert_eq!(rig.job()["total_bytes"], differing() * BLOCK, "only what either has changed is copied");
    assert_eq!(rig.clone()["independent"], true);
    assert_eq!(rig.shows("clone"), content(IN_SOURCE));
    assert_eq!(rig.shows("vm0"), content(IN_SOURCE));
}

pub(super) fn delay_update(rig: &Rig) {
    assert_eq!(begin_update(rig, &format!("?delay_ms={HOURS}"))["delay_ms"], HOURS);
    is_delayed(rig, updated, differing(), 100);
    assert_eq!(rig.shows("clone"), content(IN_SOURCE));
}

pub(super) fn stop_update(rig: &Rig) {
    begin_update(rig, &format!("?delay_ms={HOURS}"));
    stays_stopped(rig, updated, ("clone", IN_SOURCE));
    assert_eq!(rig.clone()["independent"], true);
}
