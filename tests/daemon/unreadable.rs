//! A record that cannot be read: a newer program wrote it, or the medium has lost some of it. The store itself is whole.

use std::path::Path;

use redb::ReadableDatabase;
use serde_json::json;

use crate::check::{examine, populated, records, show_all, table, verdict};
use crate::client::tags;

/// It stops no other disk, and nothing of what it may name is touched.
#[test]
fn a_record_that_cannot_be_read_stops_no_other_disk() {
    let mut daemon = populated();
    let content = show_all(&daemon);
    daemon.stop();
    daemon.forget_args();
    let files = || {
        let tables = std::fs::read_dir(daemon.state_dir().join("tables")).unwrap();
        let images = std::fs::read_dir(daemon.state_dir().join("images")).unwrap();
        let paths = tables.chain(images).map(|entry| entry.unwrap().path());
        paths.map(|path| (std::fs::read(&path).unwrap(), path)).collect::<Vec<_>>()
    };
    let (vm1, before) = (crate::check::record(&daemon, "vm1"), files());
    let of_vm1 = vm1.names();
    // One that no record names, with nothing in it, is an orphan when all records can be read.
    let orphan = table(&daemon, uuid::Uuid::new_v4(), "log");
    let record = value_of(&records(&daemon), "vm0");
    for (how, said) in [("newer", "a newer program wrote it"), ("damaged", "does not match its checksum")] {
        put(&records(&daemon), "vm0", &record);
        spoil(&records(&daemon), "vm0", how);
        std::fs::write(&orphan, "").unwrap();
        let (report, status) = examine(&daemon);
        let verdicts = ["vm0", "vm1"].map(|disk| verdict(&report, disk));
        assert_eq!((status, verdicts), (1, ["not-served", "served"].map(str::to_owned)), "{report}");
        assert!(report.to_string().contains(said), "{report}");
        // A repair does not know what it names either.
        daemon.check(&["--repair"]);
        daemon.start();
        assert!(daemon.log_text().contains(said), "{}", daemon.log_text());
        assert!(tags(&daemon.content("vm1")) == content[1] && tags(&daemon.content("vm1@m")) == content[4], "{how}");
        assert!(orphan.exists(), "{how}");
        // Nobody gets its name meanwhile.
        let config = json!({ "path": daemon.image("vm0") }).to_string();
        assert_eq!(daemon.send("PUT", "/v1/disks/vm0", &config).status, 500, "{how}");
        daemon.stop();
        for (bytes, path) in &before {
            let is_of_vm1 = of_vm1.contains(path.file_stem().unwrap().to_str().unwrap());
            let is_there = std::fs::read(path).is_ok_and(|is| is == *bytes || is_of_vm1);
            assert!(is_there, "{how}: {}", path.display());
        }
    }
    // With its record everything is there again, and the orphan goes.
    put(&records(&daemon), "vm0", &record);
    daemon.start();
    assert!(show_all(&daemon) == content);
    assert!(!orphan.exists());
    daemon.stop();
}

const DISKS: redb::TableDefinition<&str, &[u8]> = redb::TableDefinition::new("disks");

fn value_of(path: &Path, name: &str) -> Vec<u8> {
    let database = redb::Database::create(path).unwrap();
    let disks = database.begin_read().unwrap().open_table(DISKS).unwrap();
    disks.get(name).unwrap().unwrap().value().to_vec()
}

fn put(path: &Path, name: &str, value: &[u8]) {
    let database = redb::Database::create(path).unwrap();
    let mut change = database.begin_write().unwrap();
    change.set_two_phase_commit(true);
    change.open_table(DISKS).unwrap().insert(name, value).unwrap();
    change.commit().unwrap();
}

/// Makes a record one that cannot be read.
fn spoil(path: &Path, name: &str, how: &str) {
    let mut value = value_of(path, name);
    if how == "newer" {
        let rest = [b"9 ", &value[11..]].concat();
        let crc = crc32fast::hash(&[name.as_bytes(), &[0], &rest].concat());
        value = [format!("{crc:08x} ").as_bytes(), &rest].concat();
    } else {
        value[100] ^= 1;
    }
    put(path, name, &value);
}
