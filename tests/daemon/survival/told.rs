//! `halfsilver check` of volumes, bookmarks and dirty bitmaps: it says what the start that follows does.

use serde_json::json;

use crate::check::{examine, flip, record, run_table, table, verdict};
use crate::harness::{Daemon, can_mount, wait_until};
use crate::strategies::{End, SIZE, end_and_start};

const SECTORS: usize = (SIZE / 512) as usize;

/// What `check` says of volumes and bookmarks, after each end of the daemon.
#[test]
fn volumes_and_bookmarks_are_told_of() {
    for how in [End::Stop, End::Kill, End::PowerCut] {
        if how == End::PowerCut && !can_mount("what check says of bookmarks after a power cut") {
            continue;
        }
        let mut daemon = Daemon::with_disks(&[SIZE], "durability=power");
        let post = |daemon: &Daemon, path: &str| {
            daemon.send("POST", path, "").ok();
        };
        daemon.client("vm0").write(0..SECTORS, 1);
        daemon.snap("a");
        for name in ["off", "free"] {
            daemon.send("POST", "/v1/volumes", &json!({ "name": name, "from": "vm0@a" }).to_string()).ok();
            daemon.client(name).write(0..9, 2);
        }
        post(&daemon, "/v1/volumes/off/disable?force=true");
        post(&daemon, "/v1/volumes/free/complete");
        wait_until("it to be independent", || daemon.get("/v1/jobs").json()[0]["state"] == "done");
        daemon.snap("b");
        daemon.client("vm0").write(8..16, 3);
        let mut client = daemon.client("vm0");
        client.flush();
        drop(client);
        daemon.send("DELETE", "/v1/snapshots/vm0@b?keep-bookmark=true", "").ok();
        daemon.api().wait_gone("vm0@b");
        let told = end_and_start(&mut daemon, how);
        assert_eq!(told["ok"], true, "{how:?}: {told}");
        let of = |name: &str| told["disks"].as_array().unwrap().iter().find(|d| d["name"] == name).unwrap().clone();
        assert_eq!((&of("off")["disabled"], &of("off")["independent"]), (&json!(true), &json!(false)));
        assert_eq!((&of("free")["disabled"], &of("free")["independent"]), (&json!(false), &json!(true)));
        assert_eq!((&of("free")["from"], of("free")["path"].is_string()), (&json!("vm0@a"), true), "{told}");
        let listed = daemon.get("/v1/bookmarks").json()[0].clone();
        let (bookmark, is_lost) = (of("vm0")["bookmarks"][0].clone(), listed["state"] == "lost");
        assert_eq!((&bookmark["bookmark"], is_lost), (&json!("vm0@b"), how == End::PowerCut), "{listed}");
        assert_eq!(bookmark["lost"].as_str(), listed["reason"].as_str(), "{how:?}: as the start that follows says");
        daemon.kill();
        let page = String::from_utf8(daemon.check(&[]).stdout).unwrap();
        for line in
            ["volume off (of vm0@a): is disabled; when enabled it would", "independent volume free (once of vm0@a)"]
        {
            assert!(page.contains(line), "{page}");
        }
        assert!(page.contains(if is_lost {
            "vm0@b: what changed since is not known"
        } else {
            "bookmark vm0@b: would be kept"
        }));
    }
}

/// A dirty bitmap that is damaged is named, and the bookmark behind it is lost; nothing else is.
#[test]
fn a_damaged_changed_table_is_found() {
    for how in [End::Stop, End::Kill] {
        let mut daemon = Daemon::with_disks(&[SIZE], "");
        daemon.client("vm0").write(0..SECTORS, 1);
        daemon.snap("a");
        daemon.client("vm0").write(0..8, 2);
        daemon.send("DELETE", "/v1/snapshots/vm0@a?keep-bookmark=true", "").ok();
        daemon.api().wait_gone("vm0@a");
        let live = match how {
            End::Stop => {
                daemon.stop();
                table(&daemon, record(&daemon, "vm0").live, "changes")
            }
            _ => {
                daemon.kill();
                run_table(&daemon, record(&daemon, "vm0").live).with_extension("changed")
            }
        };
        flip(&live, 20);
        let (report, _) = examine(&daemon);
        let findings = report["findings"].as_array().unwrap();
        let found = findings.iter().find(|f| f["severity"] == "problem").unwrap();
        assert_eq!(found["path"], live.to_str().unwrap(), "{report}");
        assert_eq!((verdict(&report, "vm0"), &report["ok"]), ("served".to_owned(), &json!(false)));
        let lost = report["disks"][0]["bookmarks"][0]["lost"].as_str().unwrap().to_owned();
        daemon.start();
        let listed = daemon.get("/v1/bookmarks").json()[0].clone();
        assert_eq!((&listed["state"], listed["reason"].as_str()), (&json!("lost"), Some(lost.as_str())));
        assert_eq!(daemon.get("/v1/snapshots/vm0@a/diff").refused(), "changes-unknown");
    }
}
