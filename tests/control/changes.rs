//! Differences, maps and bookmarks over HTTP and on the command line.

use std::process::Command;

use serde_json::{Value, json};

use crate::exchange::{read_head, read_until, request};
use crate::rig::Rig;

fn cli(rig: &Rig, args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_halfsilver")).arg("--control").arg(&rig.path).args(args).output();
    let output = output.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The body of an answer whose length was not known before.
fn chunks(body: &str) -> String {
    let (mut rest, mut whole) = (body, String::new());
    loop {
        let (len, more) = rest.split_once("\r\n").unwrap();
        let len = usize::from_str_radix(len, 16).unwrap();
        if len == 0 {
            return whole;
        }
        whole.push_str(&more[..len]);
        rest = more[len..].strip_prefix("\r\n").unwrap();
    }
}

fn list(rig: &Rig, target: &str) -> Value {
    let answer = rig.get(target);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")), "{answer:?}");
    serde_json::from_str(&chunks(&answer.body)).unwrap()
}

#[test]
fn a_difference_is_a_list_of_ranges() {
    let rig = Rig::with_snapshot("copy-on-write");
    let two = json!([{ "offset": 0, "length": 4096 }, { "offset": 8192, "length": 4096 }]);
    assert_eq!(list(&rig, "/v1/snapshots/vm1@daily/diff"), two);
    assert_eq!(rig.get("/v1/snapshots/vm1@daily/diff").header("halfsilver-diff-source"), Some("owned-tables"));
    let id = rig.get("/v1/snapshots/vm1@daily").json()["id"].as_str().unwrap().to_owned();
    assert_eq!(rig.get(&format!("/v1/snapshots/{id}")).json()["name"], "daily", "by its id");
    assert_eq!(list(&rig, &format!("/v1/snapshots/{id}/diff?to={id}")), two);
    assert_eq!(rig.refused("GET", "/v1/snapshots/vm1@none/diff", "")["code"], "snapshot-not-found");
    assert_eq!(rig.refused("GET", "/v1/snapshots/vm1@daily/diff?to=vm1", "")["code"], "invalid-name");
    assert_eq!(rig.refused("GET", "/v1/snapshots/vm1@daily/diff?from=vm1", "")["code"], "invalid-request");
    assert_eq!(rig.post("/v1/volumes", r#"{"name":"clone","from":"vm1@daily"}"#).status, 201);
    assert_eq!(list(&rig, "/v1/volumes/clone/diff"), json!([]));
}

/// The whole answer is far more than is made at once, and a client that stops reading holds nobody up.
#[test]
fn a_huge_difference_is_made_while_it_is_read() {
    let rig = Rig::with_snapshot("copy-on-write");
    let mut slow: Vec<_> =
        (0..70).map(|_| request(&rig.path, "GET", "/v1/snapshots/vm1@daily/diff?to=vm1@huge", b"")).collect();
    for stream in &mut slow {
        assert_eq!(read_head(stream).0, 200);
        read_until(stream, r#"{"offset":0,"#);
    }
    // More clients stand still than there are threads.
    assert_eq!(rig.get("/v1/disks").status, 200);
    assert_eq!(list(&rig, "/v1/snapshots/vm1@daily/diff").as_array().unwrap().len(), 2);
    let (status, page, _) = cli(&rig, &["snapshot", "diff", "vm1@daily", "vm1@huge"]);
    assert_eq!(status, 0);
    assert!(page.ends_with(
        "3000000 ranges, 11.4 GiB that may differ; it is not known what was written, so this is what is stored in \
         different places\n"
    ));
}

#[test]
fn the_command_line_lists_differences() {
    let rig = Rig::with_snapshot("copy-on-write");
    let (status, page, _) = cli(&rig, &["snapshot", "diff", "vm1@daily"]);
    assert_eq!(status, 0);
    assert!(
        page.starts_with("              0         4096\n           8192         4096\n2 ranges, 8.0 KiB"),
        "{page}"
    );
    let (_, text, _) = cli(&rig, &["--json", "snapshot", "diff", "vm1@daily", "vm1@daily"]);
    let shown: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(shown[1], json!({ "offset": 8192, "length": 4096 }));
    let (status, _, error) = cli(&rig, &["snapshot", "diff", "vm1@none"]);
    assert_eq!((status, error.lines().count()), (1, 1), "{error}");
    assert_eq!(cli(&rig, &["snapshot", "diff", "vm1"]).0, 2);
    let id = rig.get("/v1/snapshots/vm1@daily").json()["id"].as_str().unwrap().to_owned();
    assert!(cli(&rig, &["snapshot", "show", &id]).1.contains("daily"));
}

#[test]
fn a_volume_has_a_map_and_a_status() {
    let rig = Rig::with_snapshot("copy-on-write");
    assert_eq!(rig.post("/v1/volumes", r#"{"name":"clone","from":"vm1@daily"}"#).status, 201);
    let map = list(&rig, "/v1/volumes/clone/map");
    assert_eq!(map["owned"], json!([[0, 3000], [5000, 1]]));
    assert_eq!((&map["changed"], &map["blocks"], &map["block_size"]), (&json!([]), &json!(300_000), &json!(4096)));
    let (_, text, _) = cli(&rig, &["volume", "map", "clone"]);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), map);
    let (status, drawn, _) = cli(&rig, &["volume", "map", "clone", "--text"]);
    assert_eq!(status, 0);
    assert!(drawn.starts_with("clone: owned: 3001 of 300000 blocks, 1.00 %\n  ####################-"), "{drawn}");
    assert!(drawn.contains("changed: 0 of 300000 blocks, 0.00 %\n  ...."), "{drawn}");
    let (_, page, _) = cli(&rig, &["volume", "status", "clone"]);
    assert!(page.contains("differs         not known from vm1 as it is now\n"), "{page}");
    assert!(page.contains("complete        1.00 %\n") && page.contains(r"a power\ncut"), "{page}");
    let (_, text, _) = cli(&rig, &["volume", "status", "clone", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), rig.get("/v1/volumes/clone/status").json());
    for what in ["map", "status", "diff"] {
        assert_eq!(rig.refused("GET", &format!("/v1/volumes/none/{what}"), "")["code"], "volume-not-found");
    }
}

#[test]
fn a_bookmark_is_what_a_deletion_leaves() {
    let rig = Rig::with_snapshot("copy-on-write");
    rig.fake.settle("vm1@daily");
    let (status, said, _) = cli(&rig, &["snapshot", "delete", "vm1@daily", "--keep-bookmark"]);
    assert_eq!((status, said.as_str()), (0, "vm1@daily deleted, a bookmark is kept\n"));
    let listed = rig.get("/v1/bookmarks").json();
    assert_eq!((&listed[0]["name"], &listed[0]["state"]), (&json!("daily"), &json!("kept")));
    assert_eq!(rig.get("/v1/bookmarks/vm1@daily").json(), listed[0]);
    assert!(cli(&rig, &["bookmark", "list"]).1.contains("vm1@daily  kept"));
    assert!(cli(&rig, &["bookmark", "show", "vm1@daily"]).1.contains("bookmark    vm1@daily\n"));
    assert_eq!(cli(&rig, &["bookmark", "delete", "vm1@daily"]).1, "vm1@daily deleted\n");
    assert_eq!(rig.refused("DELETE", "/v1/bookmarks/vm1@daily", "")["code"], "bookmark-not-found");
    assert_eq!(cli(&rig, &["--json", "bookmark", "list"]).1, "[]\n");
}
