//! Lists: filters, and pages that neither repeat nor leave out.

use serde_json::{Value, json};

use crate::exchange::Answer;
use crate::rig::Rig;

fn names(answer: &Answer) -> Vec<String> {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json().as_array().unwrap().iter().map(name_of).collect()
}

fn name_of(item: &Value) -> String {
    match (item["disk"].as_str(), item["name"].as_str()) {
        (Some(disk), Some(name)) => format!("{disk}@{name}"),
        (_, Some(name)) => name.to_owned(),
        _ => item["id"].to_string(),
    }
}

/// The target of the next page.
fn next(answer: &Answer) -> Option<String> {
    let link = answer.header("link")?;
    let (target, rest) = link.strip_prefix('<').unwrap().split_once('>').unwrap();
    assert_eq!(rest, "; rel=\"next\"");
    Some(target.to_owned())
}

/// Everything that the pages from this one on have.
fn all_pages(rig: &Rig, target: &str) -> Vec<String> {
    let (mut target, mut all) = (Some(target.to_owned()), Vec::new());
    while let Some(page) = target {
        let answer = rig.get(&page);
        all.extend(names(&answer));
        target = next(&answer);
    }
    all
}

/// Disks vm1 to vm3 and db, two snapshots of each, taken in an order that no name has; a volume, a bookmark and two jobs.
fn rig() -> Rig {
    let rig = Rig::new();
    for disk in ["vm3", "db", "vm1", "vm2"] {
        assert_eq!(rig.send("PUT", &format!("/v1/disks/{disk}"), &format!(r#"{{"path":"/{disk}"}}"#)).status, 201);
    }
    for name in ["weekly", "daily"] {
        let body = json!({ "name": name, "disks": ["vm3", "db", "vm1", "vm2"] });
        assert_eq!(rig.post("/v1/snapshots", &body.to_string()).status, 201);
    }
    rig.fake.settle("vm1@daily");
    assert_eq!(rig.post("/v1/volumes", r#"{"name":"clone","from":"vm1@daily"}"#).status, 201);
    rig.fake.settle("vm2@weekly");
    assert_eq!(rig.send("DELETE", "/v1/snapshots/vm2@weekly?keep-bookmark=true", "").status, 204);
    rig.fake.add_job(1);
    rig.fake.add_job(7);
    rig.fake.set_job(7, halfsilver::control::api::JobState::Stopped, None);
    rig
}

#[test]
fn what_is_asked_for_is_listed() {
    let rig = rig();
    rig.fake.lose("db", "its image is gone");
    for (target, expected) in [
        ("/v1/disks?name=vm*", &["vm3", "vm1", "vm2"][..]),
        ("/v1/disks?name=vm1", &["vm1"]),
        ("/v1/disks?state=unserved", &["db"]),
        ("/v1/disks?state=serving&name=db", &[]),
        ("/v1/snapshots?disk=vm1", &["vm1@weekly", "vm1@daily"]),
        ("/v1/snapshots?disk=vm1&name=d*", &["vm1@daily"]),
        ("/v1/snapshots?state=quiesced", &["vm1@daily"]),
        ("/v1/snapshots?strategy=write-logging", &[]),
        ("/v1/volumes?from=vm1@*", &["clone"]),
        ("/v1/volumes?from=vm2@*", &[]),
        ("/v1/volumes?state=serving", &["clone"]),
        ("/v1/volumes?state=broken", &[]),
        ("/v1/bookmarks?disk=vm2", &["vm2@weekly"]),
        ("/v1/bookmarks?state=lost", &[]),
        ("/v1/jobs?state=stopped", &["7"]),
        ("/v1/jobs?kind=fold&disk=vm1", &["1", "7"]),
        ("/v1/jobs?kind=mirror", &[]),
    ] {
        assert_eq!(names(&rig.get(target)), expected, "{target}");
    }
    let group = rig.get("/v1/snapshots/vm3@daily").json()["group"].as_str().unwrap().to_owned();
    assert_eq!(
        names(&rig.get(&format!("/v1/snapshots?group={group}"))),
        ["vm3@daily", "db@daily", "vm1@daily", "vm2@daily"]
    );
}

#[test]
fn pages_have_everything_once() {
    let rig = rig();
    for (list, all) in [
        ("/v1/disks", &["db", "vm1", "vm2", "vm3"][..]),
        (
            "/v1/snapshots",
            &["db@daily", "db@weekly", "vm1@daily", "vm1@weekly", "vm2@daily", "vm3@daily", "vm3@weekly"],
        ),
        ("/v1/volumes", &["clone"]),
        ("/v1/bookmarks", &["vm2@weekly"]),
        ("/v1/jobs", &["1", "7"]),
    ] {
        for limit in 1..=all.len() + 1 {
            assert_eq!(all_pages(&rig, &format!("{list}?limit={limit}")), all, "{list} {limit}");
        }
    }
    // Filters go with it, and what comes last need not be there.
    let page = rig.get("/v1/snapshots?limit=1&name=daily&after=db@x");
    assert_eq!(names(&page), ["vm1@daily"]);
    assert_eq!(next(&page).unwrap(), "/v1/snapshots?limit=1&name=daily&after=vm1@daily");
    rig.fake.forget("vm1@daily");
    assert_eq!(all_pages(&rig, &next(&page).unwrap()), ["vm2@daily", "vm3@daily"]);
    // A list that is asked for as a whole keeps its order, and has no next page.
    let whole = rig.get("/v1/snapshots?name=weekly");
    assert_eq!(
        (names(&whole), next(&whole)),
        (vec!["vm3@weekly".into(), "db@weekly".into(), "vm1@weekly".into()], None)
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let rig = rig();
    for (target, code) in [
        ("/v1/disks?limit=0", "invalid-request"),
        ("/v1/disks?limit=-1", "invalid-request"),
        ("/v1/disks?state=asleep", "invalid-request"),
        ("/v1/disks?name=VM*", "invalid-request"),
        ("/v1/disks?nmae=vm1", "invalid-request"),
        ("/v1/snapshots?after=vm1", "invalid-name"),
        ("/v1/snapshots?group=1", "invalid-request"),
        ("/v1/volumes?after=clone&limit=x", "invalid-request"),
        ("/v1/bookmarks?after=x", "invalid-name"),
        ("/v1/jobs?after=first", "invalid-request"),
        ("/v1/jobs?kind=cook", "invalid-request"),
    ] {
        assert_eq!(rig.refused("GET", target, "")["code"], code, "{target}");
    }
}
