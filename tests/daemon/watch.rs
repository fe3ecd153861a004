//! Metrics and events of the real daemon, against what the client did.

use std::time::Duration;

use serde_json::Value;

use crate::client::SECTOR;
use crate::harness::{Daemon, wait_until};

const SIZE: u64 = 1 << 20;

/// The value of one series.
#[track_caller]
pub(crate) fn metric(daemon: &Daemon, series: &str) -> f64 {
    let answer = daemon.get("/metrics");
    let line = answer.body.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in {}", answer.body)).parse().unwrap()
}

#[test]
fn metrics_count_what_the_guest_did() {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "queues=2");
    let mut client = daemon.client_with_queues("vm0", 2);
    let of = |name: &str, direction: &str| {
        metric(&daemon, &format!("halfsilver_{name}{{disk=\"vm0\",direction=\"{direction}\"}}"))
    };
    for i in 0..10 {
        client.queues[i % 2].write(i * 8..i * 8 + 8, 1);
    }
    for _ in 0..3 {
        client.read(0..16);
    }
    client.flush();
    client.zero(0..8, false);
    client.discard(8..16);
    let bytes = |sectors: usize| (sectors * SECTOR) as f64;
    for (direction, requests, moved) in [
        ("write", 10.0, bytes(80)),
        ("read", 3.0, bytes(48)),
        ("flush", 1.0, 0.0),
        ("discard", 1.0, bytes(8)),
        ("write_zeroes", 1.0, bytes(8)),
    ] {
        assert_eq!(of("requests_total", direction), requests, "{direction}");
        assert_eq!(of("request_bytes_total", direction), moved, "{direction}");
        assert_eq!(of("request_errors_total", direction), 0.0, "{direction}");
        assert_eq!(of("request_duration_seconds_count", direction), requests, "{direction}");
        assert!(of("request_duration_seconds_sum", direction) > 0.0, "{direction}");
        let last = metric(
            &daemon,
            &format!(
                "halfsilver_request_duration_seconds_bucket{{le=\"+Inf\",disk=\"vm0\",direction=\"{direction}\"}}"
            ),
        );
        assert_eq!(last, requests, "{direction}");
    }
    assert_eq!(metric(&daemon, "halfsilver_requests_total{disk=\"vm1\",direction=\"read\"}"), 0.0);
    assert_eq!(metric(&daemon, "halfsilver_frontends_connected{disk=\"vm0\"}"), 1.0);
    assert_eq!(metric(&daemon, "halfsilver_frontends_connected{disk=\"vm1\"}"), 0.0);
}

#[test]
fn preserved_blocks_and_drain_times_are_counted() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..160, 1);
    daemon.snap("a");
    let of = |name: &str| metric(&daemon, &format!("halfsilver_{name}{{disk=\"vm0\",snapshot=\"a\"}}"));
    assert_eq!(of("preserved_blocks_total"), 0.0);
    let drain = of("drain_seconds");
    assert!((0.0..60.0).contains(&drain), "{drain}");
    // Ten blocks of data, one block of it twice, two that were never written.
    client.write(0..80, 2);
    client.write(3..5, 3);
    client.write(800..816, 4);
    assert_eq!(of("preserved_blocks_total"), 12.0);
    assert_eq!(of("preserved_bytes_total"), 10.0 * 4096.0);
    assert_eq!(daemon.show("vm0@a")["owned_bytes"], 12 * 4096);
    // A read of the snapshot is not the disk's.
    daemon.content("vm0@a");
    assert_eq!(metric(&daemon, "halfsilver_requests_total{disk=\"vm0\",direction=\"read\"}"), 0.0);
    daemon.delete("vm0@a");
    assert!(!daemon.get("/metrics").body.contains("snapshot=\"a\""));
}

#[test]
fn events_tell_a_snapshots_life_in_order() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let events = daemon.events();
    let client = daemon.client("vm0");
    events.wait_for("FRONTEND_CONNECTED", "vm0");
    assert_eq!(daemon.show_disk("vm0")["connected"], true);
    daemon.snap("a");
    events.wait_for("SNAPSHOT_QUIESCED", "vm0@a");
    drop(daemon.reader("vm0@a"));
    events.wait_for("FRONTEND_CONNECTED", "vm0@a");
    events.wait_for("FRONTEND_DISCONNECTED", "vm0@a");
    daemon.delete("vm0@a");
    events.wait_for("SNAPSHOT_DELETED", "vm0@a");
    drop(client);
    events.wait_for("FRONTEND_DISCONNECTED", "vm0");
    wait_until("the frontend to be forgotten", || daemon.show_disk("vm0")["frontends"] == 0);
    let image = daemon.make_image("vm1", SIZE);
    let config = serde_json::json!({ "path": image }).to_string();
    daemon.send("PUT", "/v1/disks/vm1", &config).ok();
    daemon.send("DELETE", "/v1/disks/vm1", "").ok();
    events.wait_for("DISK_ADDED", "vm1");
    events.wait_for("DISK_REMOVED", "vm1");
    // The end of a job is told after the end of its snapshot.
    wait_until("the job's end", || events.seen().iter().any(|e| e["event"] == "JOB_DONE"));
    let seen = events.seen();
    let position = |kind: &str| seen.iter().position(|e| e["event"] == kind).unwrap();
    let order =
        ["FRONTEND_CONNECTED", "SNAPSHOT_CREATED", "SNAPSHOT_QUIESCED", "JOB_STARTED", "SNAPSHOT_DELETED", "JOB_DONE"];
    assert!(order.windows(2).all(|w| position(w[0]) < position(w[1])), "{seen:?}");
    let numbers: Vec<u64> = seen.iter().map(|e| e["seq"].as_u64().unwrap()).collect();
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "{numbers:?}");
}

#[test]
fn errors_are_counted_and_the_guest_goes_on() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.queues[0].submit_read(0, 2047..2050);
    let (_, ret) = client.queues[0].wait_one();
    assert_ne!(ret, 0, "a read beyond the end");
    client.queues[0].submit_write(0, 2048..2049, 1, false);
    assert_ne!(client.queues[0].wait_one().1, 0, "a write beyond the end");
    client.write(2047..2048, 1);
    assert_eq!(metric(&daemon, "halfsilver_request_errors_total{disk=\"vm0\",direction=\"read\"}"), 1.0);
    assert_eq!(metric(&daemon, "halfsilver_request_errors_total{disk=\"vm0\",direction=\"write\"}"), 1.0);
    assert_eq!(metric(&daemon, "halfsilver_request_bytes_total{disk=\"vm0\",direction=\"write\"}"), 512.0);
    assert_eq!(daemon.show_disk("vm0")["reason"], Value::Null);
    assert!(client.queues[0].answers(Duration::ZERO).is_empty());
}
