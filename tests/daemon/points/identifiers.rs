//! Names and identifiers, in the place of handles and of the numbers of disks and partitions.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Rig;
use crate::harness::wait_until;
use crate::strategies::{End, SIZE};

/// Asking leaves nothing open.
pub(super) fn close_handle(rig: &Rig) {
    let open = || std::fs::read_dir(format!("/proc/{}/fd", rig.daemon.borrow().pid())).unwrap().count();
    rig.clone();
    let before = open();
    let id = rig.clone()["id"].as_str().unwrap().to_owned();
    (0..200).for_each(|_| drop(rig.get(&format!("/v1/volumes/{id}"))));
    wait_until("as many descriptors as before", || open() <= before);
}

/// The name and the id stand for the same thing, and no id is given twice.
pub(super) fn create_handle(rig: &Rig) {
    let volume = rig.clone();
    let by_id = format!("/v1/volumes/{}", volume["id"].as_str().unwrap());
    for how in [None, Some(End::Stop), Some(End::Kill)] {
        how.into_iter().for_each(|how| rig.end(how));
        assert_eq!(rig.get(&by_id), volume, "{how:?}");
        assert_eq!(rig.get("/v1/volumes"), json!([volume]), "{how:?}");
    }
    assert_eq!(rig.send("DELETE", "/v1/volumes/clone", "").status, 204);
    rig.done("POST", "/v1/volumes", &json!({ "name": "clone", "from": "vm0@daily" }));
    assert_ne!(rig.clone()["id"], volume["id"]);
    assert_eq!(rig.send("GET", &by_id, "").refused(), "volume-not-found", "another of the same name is another");
}

fn is_uuid(id: &Value) -> bool {
    id.as_str().is_some_and(|id| uuid::Uuid::parse_str(id).is_ok_and(|uuid| uuid.to_string() == id))
}

/// One of each kind: its kind, its name, its id.
fn one_of_each(rig: &Rig) -> Vec<(&'static str, String, String)> {
    rig.done("POST", "/v1/snapshots", &json!({ "name": "old", "disks": ["vm0"], "wait": true }));
    let marked = rig.get("/v1/snapshots/vm0@old")["id"].clone();
    let answer = rig.send("DELETE", "/v1/snapshots/vm0@old?keep-bookmark=true", "");
    assert!([202, 204].contains(&answer.status), "{}", answer.body);
    rig.daemon.borrow().api().wait_gone("vm0@old");
    assert_eq!(rig.get("/v1/bookmarks/vm0@old")["id"], marked, "a bookmark keeps the snapshot's");
    ["disks/vm0", "snapshots/vm0@daily", "volumes/clone", "bookmarks/vm0@old"]
        .map(|path| {
            let (kind, name) = path.split_once('/').unwrap();
            let id = rig.get(&format!("/v1/{path}"))["id"].clone();
            assert!(is_uuid(&id), "{id}");
            (kind, name.to_owned(), id.as_str().unwrap().to_owned())
        })
        .to_vec()
}

pub(super) fn identifiers_are_made(rig: &Rig) {
    let image = rig.daemon.borrow().make_image("vm1", SIZE);
    let body = json!({ "path": image });
    let disk = rig.done("PUT", "/v1/disks/vm1", &body);
    assert_eq!(rig.done("PUT", "/v1/disks/vm1", &body)["id"], disk["id"], "once, however often it is asked for");
    let group = rig.done("POST", "/v1/snapshots", &json!({ "name": "both", "disks": ["vm0", "vm1"], "wait": true }));
    let volume = rig.done("POST", "/v1/volumes", &json!({ "name": "other", "from": "vm1@both" }));
    let ids = [&disk["id"], &group[0]["id"], &group[1]["id"], &group[0]["group"], &volume["id"]];
    assert!(ids.iter().all(|id| is_uuid(id)), "{ids:?}");
    let different: BTreeSet<_> = ids.iter().map(|id| id.as_str().unwrap()).collect();
    assert_eq!(different.len(), ids.len(), "{ids:?}");
    assert_eq!(volume["from_id"], group[1]["id"]);
}

pub(super) fn identifier_of_a_disk(rig: &Rig) {
    let disk = rig.get("/v1/disks/vm0");
    assert!(is_uuid(&disk["id"]));
    assert_eq!(disk["path"], json!(rig.daemon.borrow().image("vm0")));
    for how in [End::Stop, End::Kill] {
        rig.end(how);
        assert_eq!(rig.get("/v1/disks/vm0")["id"], disk["id"], "{how:?}");
    }
}

pub(super) fn identifiers_are_listed(rig: &Rig) {
    let all = one_of_each(rig);
    for how in [None, Some(End::Stop), Some(End::Kill)] {
        how.into_iter().for_each(|how| rig.end(how));
        for (kind, name, id) in &all {
            let listed = rig.get(&format!("/v1/{kind}"));
            assert_eq!(listed.as_array().unwrap().len(), 1, "{how:?}: {listed}");
            assert_eq!(listed[0]["id"], *id, "{how:?}: {listed}");
            assert_eq!(listed[0]["name"], name.rsplit('@').next().unwrap(), "{how:?}: {listed}");
        }
    }
}

pub(super) fn identifiers_are_looked_up(rig: &Rig) {
    let all = one_of_each(rig);
    for how in [None, Some(End::Stop), Some(End::Kill)] {
        how.into_iter().for_each(|how| rig.end(how));
        for (kind, name, id) in &all {
            assert_eq!(rig.get(&format!("/v1/{kind}/{id}")), rig.get(&format!("/v1/{kind}/{name}")), "{how:?}");
            let parts: &[&str] = if *kind == "volumes" { &["status", "map", "diff"] } else { &[] };
            for part in parts {
                let by_id = rig.get(&format!("/v1/{kind}/{id}/{part}"));
                assert_eq!(by_id, rig.get(&format!("/v1/{kind}/{name}/{part}")), "{how:?}");
            }
            // It is that of one thing of one kind.
            for (other, _, of_other) in all.iter().filter(|(other, ..)| other != kind) {
                let answer = rig.send("GET", &format!("/v1/{kind}/{of_other}"), "");
                assert_eq!(answer.status, 404, "{other} among {kind}: {}", answer.body);
            }
        }
    }
    let unknown = uuid::Uuid::new_v4();
    for (kind, ..) in all {
        let answer = rig.send("GET", &format!("/v1/{kind}/{unknown}"), "");
        assert_eq!(answer.refused(), format!("{}-not-found", kind.trim_end_matches('s')));
        assert!(answer.body.contains(&unknown.to_string()), "{}", answer.body);
    }
}
