//! A start with a configuration file that is wrong in parts, or with records that cannot be read: what is right is served, and
//! what is wrong is said.

use serde_json::{Value, json};

use crate::harness::{Daemon, wait_until};
use crate::strategies::{ALL, SIZE, shows};

fn table(daemon: &Daemon, disk: &str, rest: &str) -> String {
    format!("[[disk]]\nname = \"{disk}\"\npath = {:?}\n{rest}\n", daemon.image(disk))
}

fn problems(daemon: &Daemon) -> Vec<String> {
    serde_json::from_value(daemon.get("/v1/status").json()["problems"].clone()).unwrap()
}

#[test]
fn a_disk_that_is_described_wrongly_takes_no_other_with_it() {
    let mut daemon = Daemon::place();
    let file = daemon.path("halfsilver.toml");
    let disks = ["vm0", "vm1", "vm2", "vm3"];
    disks.iter().for_each(|disk| drop(daemon.make_image(disk, SIZE)));
    let good: String = disks.iter().map(|disk| table(&daemon, disk, "")).collect();
    std::fs::write(&file, &good).unwrap();
    daemon.arg("--config");
    daemon.arg(file.to_str().unwrap());
    daemon.start();
    daemon.client("vm1").write(ALL, 1);
    daemon.snapshot("a", &["vm1"]);
    daemon.stop();
    let socket = daemon.socket("vm0");
    let wrong = [
        table(&daemon, "vm0", ""),
        table(&daemon, "vm1", "durability = \"sometimes\""),
        table(&daemon, "vm2", &format!("socket = {socket:?}")),
        "[[disk]]\nname = \"vm3\"\n".to_owned(),
        "[[disk]]\nname = \"Not/A/Name\"\npath = \"/p\"\n".to_owned(),
        table(&daemon, "vm0", ""),
    ];
    std::fs::write(&file, wrong.concat()).unwrap();
    assert!(daemon.refused_start().contains("durability"));
    let before = std::fs::read(daemon.image("vm1")).unwrap();
    daemon.start();
    assert_eq!(daemon.show_disk("vm0")["state"], "serving");
    for (disk, why) in [("vm1", "sometimes"), ("vm2", "disk vm0 and disk vm2 share"), ("vm3", "path: is missing")] {
        let shown = daemon.show_disk(disk);
        assert_eq!(shown["state"], "unserved", "{shown}");
        assert!(shown["reason"].as_str().unwrap().contains(why), "{shown}");
    }
    let told = problems(&daemon);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].contains("halfsilver.toml:") && told[0].contains("Not/A/Name"), "{told:?}");
    assert!(told[1].contains("two disks are named vm0"), "{told:?}");
    assert!(String::from_utf8(daemon.cli(&["status"]).stdout).unwrap().contains("two disks are named vm0"));
    assert!(daemon.log_text().contains("two disks are named vm0"));
    assert_eq!(std::fs::read(daemon.image("vm1")).unwrap(), before);
    // Asked for rightly it is served, with what was remembered; so it is by the next start with a better file.
    daemon.send("PUT", "/v1/disks/vm1", &json!({ "path": daemon.image("vm1") }).to_string()).ok();
    assert_eq!(shows(&daemon, "vm1@a"), vec![1; ALL.end]);
    daemon.send("POST", "/v1/disks/vm3/forget", "").ok();
    std::fs::write(&file, &good).unwrap();
    daemon.restart();
    assert_eq!(problems(&daemon), Vec::<String>::new());
    disks.iter().for_each(|disk| assert_eq!(daemon.show_disk(disk)["state"], "serving", "{disk}"));
    assert_eq!(shows(&daemon, "vm1@a"), vec![1; ALL.end]);
    // What is no list of disks at all ends the start.
    daemon.stop();
    std::fs::write(&file, format!("{good}\n[[disk")).unwrap();
    assert!(daemon.refused_start().contains("halfsilver.toml:"));
}

#[test]
fn records_that_cannot_be_read_are_made_anew_from_their_second_copy() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    daemon.snap("a");
    daemon.client("vm0").write(0..100, 2);
    let records = daemon.state_dir().join("records.redb");
    let damages: [&dyn Fn(); 3] = [
        &|| std::fs::write(&records, b"something else").unwrap(),
        &|| std::fs::remove_file(&records).unwrap(),
        &|| {
            let mut bytes = std::fs::read(&records).unwrap();
            // Every page but the header.
            bytes.iter_mut().skip(4096).step_by(512).for_each(|byte| *byte ^= 1);
            std::fs::write(&records, bytes).unwrap();
        },
    ];
    for (round, damage) in damages.into_iter().enumerate() {
        if round % 2 == 0 {
            daemon.kill()
        } else {
            daemon.stop()
        }
        damage();
        let found: Value = serde_json::from_slice(&daemon.check(&["--json"]).stdout).unwrap();
        assert!(found["findings"].to_string().contains("second copy"), "{found}");
        assert_eq!(found["disks"][0]["verdict"], "served", "{found}");
        daemon.start();
        let told = problems(&daemon);
        assert!(told.len() == 1 && told[0].contains("second copy"), "{told:?}");
        wait_until("the snapshot to be open", || daemon.socket("vm0@a").exists());
        assert_eq!(shows(&daemon, "vm0@a"), vec![1; ALL.end]);
        assert_eq!(shows(&daemon, "vm0"), [vec![2; 100], vec![1; ALL.end - 100]].concat());
    }
    daemon.restart();
    assert_eq!(problems(&daemon), Vec::<String>::new());
}
