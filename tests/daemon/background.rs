//! Backups and jobs beside a guest that never pauses: they end, and are whole.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use serde_json::json;

use crate::client::tags;
use crate::harness::{Daemon, Rng, seeds, wait_until};
use crate::load::keep_busy;
use crate::watch::metric;

const SIZE: u64 = 4 << 20;

/// What there is of a disk's backups and jobs, each to its end.
fn backups_and_jobs(daemon: &Daemon, expected: &[u64]) {
    let mut reader = daemon.reader("vm0@a");
    let queue = &mut reader.queues[0];
    let sectors_of_slot = 256;
    for slot in 0..16 {
        queue.submit_read(slot, slot * sectors_of_slot..(slot + 1) * sectors_of_slot);
    }
    while queue.in_flight() > 0 {
        for (slot, ret) in queue.answers(*crate::harness::PATIENCE) {
            assert_eq!(ret, 0);
            let from = slot * sectors_of_slot;
            assert_eq!(tags(queue.bytes(slot, sectors_of_slot * 512)), expected[from..from + sectors_of_slot]);
        }
    }
    drop(reader);
    let volume = json!({ "name": "copy", "from": "vm0@a" }).to_string();
    daemon.send("POST", "/v1/volumes", &volume).ok();
    crate::independent::begin(daemon, "copy", "");
    crate::independent::wait_independent(daemon, "copy");
    assert_eq!(tags(&daemon.content("copy")), expected);
    crate::volumes::delete(daemon, "copy");
    daemon.delete("vm0@a");
}

#[test]
fn backups_and_jobs_end_beside_a_guest_that_never_pauses() {
    for strategy in ["copy-on-write", "write-logging"] {
        let daemon = Daemon::with_disks(&[SIZE], "queues=2,background=4K");
        assert_eq!(daemon.show_disk("vm0")["background_bytes"], 4096);
        let waited = || metric(&daemon, "halfsilver_background_wait_seconds_total{disk=\"vm0\"}");
        let mut client = daemon.client_with_queues("vm0", 2);
        let sectors = client.sectors();
        client.write(0..sectors, 1);
        daemon.api().create("a", &["vm0"], &json!({ "strategy": strategy, "wait": true })).ok();
        assert!(waited() < f64::EPSILON);
        let stop = AtomicBool::new(false);
        let busy = &mut client.queues[0];
        std::thread::scope(|scope| {
            scope.spawn(|| keep_busy(busy, 0, sectors, &stop, Rng::new(seeds("background", 1)[0])));
            let requests = || metric(&daemon, "halfsilver_requests_total{disk=\"vm0\",direction=\"write\"}");
            let body = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let before = requests();
                wait_until("the guest to be at work", || requests() > before + 100.0);
                backups_and_jobs(&daemon, &vec![1; sectors]);
            }));
            stop.store(true, SeqCst);
            body.unwrap_or_else(|e| std::panic::resume_unwind(e));
        });
        assert!(waited() > 0.0, "{strategy}: nothing has waited");
        drop(client);
        daemon.assert_only_disks_left();
    }
}

/// A volume has the window of what it stands on, and a daemon that starts again that of before.
#[test]
fn the_window_is_what_the_disk_was_told_for_good() {
    let mut daemon = Daemon::with_disks(&[SIZE], "background=off");
    assert_eq!(daemon.show_disk("vm0")["background_bytes"], 0);
    daemon.restart();
    assert_eq!(daemon.show_disk("vm0")["background_bytes"], 0);
    let client = daemon.client("vm0");
    drop(client);
    let refused = json!({ "path": daemon.image("vm0"), "background_bytes": 1000 }).to_string();
    assert_eq!(daemon.send("PUT", "/v1/disks/other", &refused).refused(), "invalid-request");
}
