//! A full state directory: what needs room there is refused and leaves nothing.

use serde_json::{Value, json};

use crate::faults::{fill, on_small};
use crate::harness::{can_mount, names_in, wait_until};
use crate::volumes::made;

#[test]
fn what_needs_room_is_refused_at_once_and_leaves_nothing() {
    if !can_mount("what_needs_room_is_refused_at_once_and_leaves_nothing") {
        return;
    }
    let (mut daemon, _mount) = on_small("state");
    daemon.snap("old");
    let filler = fill(&daemon.state_dir());
    let before = names_in(&daemon.state_dir().join("images"));
    let leg = daemon.path("leg.raw");
    let from_disk = json!({ "name": "clone", "from": "vm0" }).to_string();
    let from_snapshot = json!({ "name": "clone", "from": "vm0@old" }).to_string();
    let snapshot = json!({ "name": "new", "disks": ["vm0"] }).to_string();
    let second_leg = json!({ "path": leg }).to_string();
    let asked = [
        ("/v1/volumes", &from_disk),
        ("/v1/volumes", &from_snapshot),
        ("/v1/snapshots", &snapshot),
        ("/v1/disks/vm0/mirror", &second_leg),
    ];
    for (path, body) in asked {
        let refused = daemon.send("POST", path, body);
        assert_eq!(refused.refused(), "no-space", "{path} {body}: {}", refused.body);
        assert_eq!(names_in(&daemon.state_dir().join("images")), before, "{path} {body}");
        assert_eq!(daemon.snapshots().len(), 1, "{path} {body}");
        assert_eq!(daemon.get("/v1/volumes").json(), json!([]), "{path} {body}");
    }
    assert!(!leg.exists());
    // With room again all of it can be had.
    std::fs::remove_file(filler).unwrap();
    daemon.delete("vm0@old");
    made(&daemon, "clone", "vm0");
    daemon.send("POST", "/v1/disks/vm0/mirror", &second_leg).ok();
    wait_until("the legs to be in sync", || {
        let legs = daemon.show_disk("vm0")["legs"].as_array().cloned().unwrap_or_default();
        legs.len() == 2 && legs.iter().all(|leg: &Value| leg["state"] == "in-sync")
    });
    daemon.restart();
    assert_eq!(daemon.show_disk("vm0")["state"], "serving");
}
