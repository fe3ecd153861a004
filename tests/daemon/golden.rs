//! Volumes that are disabled, enabled, and begun anew: many of them off one golden snapshot.

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, allocated, names_in, wait_until};
use crate::independent::post;
use crate::strategies::{End, end_and_start, shows};
use crate::volumes::{daemon_with_snapshot, delete, expect, made, show};

fn disable(daemon: &Daemon, name: &str) -> Value {
    wait_until("a volume to be disabled", || {
        let answer = post(daemon, &format!("{name}/disable"));
        // A frontend that has just left is not forgotten at once.
        assert!(answer.status == 200 || answer.body.contains("frontend connected"), "{}", answer.body);
        answer.status == 200
    });
    show(daemon, name)
}

#[track_caller]
fn enable(daemon: &Daemon, name: &str, fresh: bool) {
    let answer = post(daemon, &format!("{name}/enable?fresh={fresh}"));
    assert_eq!((answer.status, &answer.json()["state"]), (200, &json!("serving")), "{}", answer.body);
}

#[test]
fn a_disabled_volume_keeps_its_content() {
    for how in [End::Stop, End::Kill, End::PowerCut] {
        let mut daemon = daemon_with_snapshot("", "write-logging");
        made(&daemon, "clone", "vm0@daily");
        let events = daemon.events();
        let mut guest = daemon.client("clone");
        guest.write(10..20, 3);
        guest.flush();
        assert_eq!(post(&daemon, "clone/disable").refused(), "volume-busy", "a guest is there");
        drop(guest);
        assert_eq!(disable(&daemon, "clone")["state"], "disabled");
        events.wait_for("VOLUME_DISABLED", "clone");
        disable(&daemon, "clone");
        for _ in 0..2 {
            assert!(!daemon.socket("clone").exists(), "{how:?}");
            assert_eq!(show(&daemon, "clone")["state"], "disabled");
            assert_eq!(daemon.send("DELETE", "/v1/snapshots/vm0@daily", "").refused(), "snapshot-busy");
            end_and_start(&mut daemon, how);
        }
        enable(&daemon, "clone", false);
        enable(&daemon, "clone", false);
        assert_eq!(shows(&daemon, "clone"), expect(&[(10..20, 3)]), "{how:?}");
        // By force while a guest is there, which finds its socket again.
        let guest = daemon.client("clone");
        post(&daemon, "clone/disable?force=true").ok();
        assert!(!daemon.socket("clone").exists());
        drop(guest);
        enable(&daemon, "clone", true);
        assert_eq!(shows(&daemon, "clone"), expect(&[]), "{how:?}: it begins anew");
        let mut guest = daemon.client("clone");
        guest.write(12..14, 4);
        guest.flush();
        drop(guest);
        for _ in 0..2 {
            end_and_start(&mut daemon, how);
            assert_eq!(shows(&daemon, "clone"), expect(&[(12..14, 4)]), "{how:?}");
        }
        // What is frozen of it would be lost.
        daemon.api().create("s", &["clone"], &json!({ "wait": true })).ok();
        disable(&daemon, "clone");
        let refused = post(&daemon, "clone/enable?fresh=true");
        assert!(refused.refused() == "volume-busy" && refused.body.contains("1 snapshot"), "{}", refused.body);
        daemon.delete("clone@s");
        enable(&daemon, "clone", true);
        delete(&daemon, "clone");
        daemon.delete("vm0@daily");
        daemon.assert_only_disks_left();
    }
}

/// A disabled volume is completed as any other.
#[test]
fn a_disabled_volume_is_completed_and_deleted() {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    daemon.client("clone").write(10..20, 3);
    disable(&daemon, "clone");
    assert_eq!(post(&daemon, "clone/complete").status, 202);
    wait_until("it to be independent", || show(&daemon, "clone")["independent"] == true);
    assert_eq!(show(&daemon, "clone")["state"], "disabled");
    enable(&daemon, "clone", false);
    assert_eq!(shows(&daemon, "clone"), expect(&[(10..20, 3)]));
    disable(&daemon, "clone");
    delete(&daemon, "clone");
    daemon.delete("vm0@daily");
    daemon.assert_only_disks_left();
}

/// One golden snapshot, twenty volumes: each is used and thrown back, again and again.
#[test]
fn twenty_volumes_off_one_golden_snapshot() {
    let mut daemon = daemon_with_snapshot("", "write-logging");
    let names: Vec<String> = (0..20).map(|n| format!("seat-{n}")).collect();
    names.iter().for_each(|name| drop(made(&daemon, name, "vm0@daily")));
    for round in 0..3_u64 {
        for (n, name) in names.iter().enumerate() {
            let mut guest = daemon.client(name);
            assert_eq!(tags(&guest.read_all()), expect(&[]), "round {round}: {name} is as the golden one");
            guest.write(n * 64..n * 64 + 100, 100 + round);
            guest.flush();
        }
        if round == 1 {
            daemon.kill();
            daemon.start();
        }
        for (n, name) in names.iter().enumerate() {
            let (socket, id) = (show(&daemon, name)["socket"].clone(), show(&daemon, name)["id"].clone());
            assert_eq!(shows(&daemon, name), expect(&[(n * 64..n * 64 + 100, 100 + round)]), "{name}");
            disable(&daemon, name);
            enable(&daemon, name, true);
            let now = show(&daemon, name);
            assert_eq!((&now["socket"], &now["id"], &now["owned_bytes"]), (&socket, &id, &json!(0)));
        }
    }
    let images = daemon.state_dir().join("images");
    assert_eq!(names_in(&images).len(), 21, "a log each, and the disk's");
    let used: u64 = names_in(&images).iter().map(|name| allocated(&images.join(name))).sum();
    assert!(used < 4 << 20, "{used} bytes");
    daemon.restart();
    for name in &names {
        assert_eq!(shows(&daemon, name), expect(&[]));
        delete(&daemon, name);
    }
    daemon.delete("vm0@daily");
    daemon.assert_only_disks_left();
}

/// A kill amid a new beginning leaves the old content or none of it.
#[cfg(feature = "planted")]
#[test]
fn planted_death_while_a_volume_is_begun_anew() {
    for point in ["before a volume is begun anew", "after a volume was begun anew", "before a file is removed"] {
        let mut daemon = daemon_with_snapshot("", "write-logging");
        made(&daemon, "clone", "vm0@daily");
        let mut guest = daemon.client("clone");
        guest.write(10..20, 3);
        guest.flush();
        drop(guest);
        disable(&daemon, "clone");
        daemon.stop();
        daemon.crash_at = Some(format!("1:{point}"));
        daemon.spawn();
        daemon.wait_up();
        assert_eq!(post(&daemon, "clone/enable?fresh=true").refused(), "no-answer", "{point}");
        daemon.wait_exit();
        daemon.crash_at = None;
        daemon.start();
        assert_eq!(show(&daemon, "clone")["state"], "disabled", "{point}");
        enable(&daemon, "clone", false);
        let is_old = point.starts_with("before a volume");
        assert_eq!(shows(&daemon, "clone"), if is_old { expect(&[(10..20, 3)]) } else { expect(&[]) }, "{point}");
        assert_eq!(names_in(&daemon.state_dir().join("images")).len(), 2, "{point}");
    }
}
