//! Under load: SIGTERM and SIGKILL in the middle of requests, snapshot storms, many snapshots at once.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use serde_json::Value;

use crate::client::{Client, Queue, SECTOR, tags};
use crate::harness::{Daemon, Rng, seeds};

const SIZE: u64 = 1 << 20;

/// What a writer knows of its sectors: the tag that was acknowledged last, and the one that was not.
#[derive(Default)]
struct Ledger {
    acknowledged: BTreeMap<usize, u64>,
    open: Option<(std::ops::Range<usize>, u64)>,
}

/// Writes random ranges of its own sectors until the daemon is gone.
fn write_until_gone(queue: &mut Queue, own: std::ops::Range<usize>, mut rng: Rng, count: &AtomicU64) -> Ledger {
    let mut ledger = Ledger::default();
    for tag in 1.. {
        let first = own.start + rng.below(own.len());
        let range = first..(first + 1 + rng.below(40)).min(own.end);
        ledger.open = Some((range.clone(), tag));
        if !queue.try_write(range.clone(), tag, Duration::from_secs(3)) {
            break;
        }
        ledger.acknowledged.extend(range.map(|s| (s, tag)));
        count.fetch_add(1, SeqCst);
    }
    ledger
}

/// Every acknowledged write is in the file, and nothing that was not asked for.
fn check_ledgers(daemon: &Daemon, ledgers: &[Ledger], parts: usize) {
    let content = tags(&std::fs::read(daemon.image("vm0")).unwrap());
    let part = content.len() / parts;
    for (i, ledger) in ledgers.iter().enumerate() {
        let (open, open_tag) = ledger.open.clone().unwrap();
        for (sector, &is) in content.iter().enumerate().skip(i * part).take(part) {
            let acknowledged = ledger.acknowledged.get(&sector).copied().unwrap_or(0);
            let may = open.contains(&sector) && is == open_tag;
            assert!(is == acknowledged || may, "sector {sector}: {acknowledged} is lost, {is} is there");
        }
    }
}

fn load_and(end: impl FnOnce(&mut Daemon)) -> Daemon {
    let seed = seeds("load", 1)[0];
    let mut daemon = Daemon::with_disks(&[SIZE], "queues=3");
    let mut client = daemon.client_with_queues("vm0", 3);
    let part = client.sectors() / 3;
    let count = AtomicU64::new(0);
    let mut ledgers = Vec::new();
    std::thread::scope(|scope| {
        let writers = client.queues.iter_mut().enumerate().map(|(i, queue)| {
            let (count, rng) = (&count, Rng::new(seed + i as u64));
            scope.spawn(move || write_until_gone(queue, i * part..(i + 1) * part, rng, count))
        });
        let writers: Vec<_> = writers.collect();
        for name in ["a", "b"] {
            daemon.snap(name);
            let now = count.load(SeqCst);
            crate::harness::wait_until("the load", || count.load(SeqCst) > now + 200);
        }
        end(&mut daemon);
        ledgers.extend(writers.into_iter().map(|w| w.join().unwrap()));
    });
    drop(client);
    check_ledgers(&daemon, &ledgers, 3);
    daemon
}

#[test]
fn sigterm_under_load_loses_nothing() {
    let mut frozen = Vec::new();
    let mut daemon = load_and(|daemon| {
        frozen = ["vm0@a", "vm0@b"].map(|s| (s, daemon.content(s))).to_vec();
        daemon.terminate();
        assert!(daemon.wait_exit().success());
    });
    assert!(daemon.log_text().contains("all is saved"));
    daemon.start();
    for (snapshot, content) in frozen {
        assert_eq!(daemon.state(snapshot), "quiesced");
        assert!(daemon.content(snapshot) == content, "{snapshot} changed over the stop");
        daemon.delete(snapshot);
    }
    daemon.assert_only_disks_left();
}

#[test]
fn sigkill_under_load_loses_no_acknowledged_write() {
    let mut frozen = Vec::new();
    let mut daemon = load_and(|daemon| {
        frozen = ["vm0@a", "vm0@b"].map(|s| (s, daemon.content(s))).to_vec();
        daemon.kill();
    });
    daemon.start();
    assert!(daemon.content("vm0") == std::fs::read(daemon.image("vm0")).unwrap());
    for (snapshot, content) in frozen {
        assert_eq!(daemon.state(snapshot), "quiesced");
        assert!(daemon.content(snapshot) == content, "{snapshot} changed over the kill");
        daemon.delete(snapshot);
    }
    daemon.assert_only_disks_left();
}

/// Keeps a queue busy with random writes above `from` until told to stop.
pub(crate) fn keep_busy(queue: &mut Queue, from: usize, to: usize, stop: &AtomicBool, mut rng: Rng) {
    while !stop.load(SeqCst) || queue.in_flight() > 0 {
        if queue.in_flight() == 0 && !stop.load(SeqCst) {
            for slot in 0..8 {
                let first = from + rng.below(to - from - 16);
                queue.submit_write(slot, first..first + 1 + rng.below(16), rng.next(), false);
            }
        }
        assert!(queue.answers(Duration::from_secs(60)).iter().all(|(_, ret)| *ret == 0));
    }
}

/// The first `marks` sectors hold the number of the snapshot that was taken next after they were written.
fn storm(count: u64, options: &str) {
    let seed = seeds("storm", 1)[0];
    let mut daemon = Daemon::with_disks(&[SIZE], options);
    let mut client = daemon.client_with_queues("vm0", 3);
    let sectors = client.sectors();
    let stop = AtomicBool::new(false);
    let mut rng = Rng::new(seed);
    let mark = |i: u64| (i as usize * 5) % 64;
    let mut queues = client.queues.iter_mut();
    let own = queues.next().unwrap();
    std::thread::scope(|scope| {
        for (i, queue) in queues.enumerate() {
            let (stop, rng) = (&stop, Rng::new(seed + 1 + i as u64));
            scope.spawn(move || keep_busy(queue, 64, sectors, stop, rng));
        }
        let body = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut expected: Vec<u64> = vec![0; 64];
            let mut all = Vec::new();
            for i in 1..=count {
                own.write(mark(i)..mark(i) + 1, i);
                expected[mark(i)] = i;
                daemon.api().create(&format!("s{i}"), &["vm0"], &serde_json::json!({})).ok();
                all.push((format!("vm0@s{i}"), expected.clone()));
            }
            let check = |reference: &str, expected: &[u64]| {
                crate::harness::wait_until("it to be quiesced", || daemon.state(reference) == "quiesced");
                assert_eq!(tags(&daemon.reader(reference).read(0..64)), expected, "{reference}");
            };
            all.iter().for_each(|(reference, expected)| check(reference, expected));
            while !all.is_empty() {
                let (reference, _) = all.remove(rng.below(all.len()));
                daemon.delete(&reference);
                if !all.is_empty() {
                    let (reference, expected) = &all[rng.below(all.len())];
                    check(reference, expected);
                }
            }
        }));
        stop.store(true, SeqCst);
        body.unwrap_or_else(|e| std::panic::resume_unwind(e));
    });
    drop(client);
    daemon.assert_only_disks_left();
    assert!(daemon.content("vm0") == std::fs::read(daemon.image("vm0")).unwrap());
    daemon.stop();
}

#[test]
fn a_storm_of_a_hundred_snapshots() {
    storm(100, "queues=3");
}

#[test]
fn thirty_two_snapshots_at_once_are_all_right_to_the_last_byte() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    let mut rng = Rng::new(seeds("thirty-two", 1)[0]);
    let mut expected = Vec::new();
    let mut write = |client: &mut Client, tag: u64| {
        for _ in 0..6 {
            let first = rng.below(client.sectors() - 64);
            client.write(first..first + 1 + rng.below(63), tag);
        }
    };
    for i in 1..=32 {
        write(&mut client, i);
        daemon.snap(&format!("s{i}"));
        expected.push((format!("vm0@s{i}"), client.read_all()));
    }
    write(&mut client, 33);
    let check = |daemon: &Daemon, expected: &[(String, Vec<u8>)]| {
        for (reference, content) in expected {
            assert!(daemon.content(reference) == *content, "{reference}");
        }
    };
    check(&daemon, &expected);
    // They cost what was overwritten, not 32 disks.
    let owned: u64 = daemon.snapshots().iter().map(|s| s["owned_bytes"].as_u64().unwrap()).sum();
    assert!(owned < 32 * 6 * 10 * 4096, "{owned} bytes are owned");
    // Every third goes, and the rest has what those had kept for it.
    let mut at = 0;
    expected.retain(|(reference, _)| {
        at += 1;
        if at % 3 == 0 {
            daemon.delete(reference);
        }
        at % 3 != 0
    });
    write(&mut client, 34);
    check(&daemon, &expected);
    drop(client);
    daemon.restart();
    check(&daemon, &expected);
    expected.iter().for_each(|(reference, _)| daemon.delete(reference));
    daemon.assert_only_disks_left();
}

/// A guest writes and backups read while snapshots are deleted first, middle and last.
#[test]
fn deleting_while_guests_write_and_backups_read() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let daemon = Daemon::with_disks(&[SIZE], "queues=2");
    let mut client = daemon.client_with_queues("vm0", 2);
    let sectors = client.sectors();
    let stop = AtomicBool::new(false);
    let (first, rest) = client.queues.split_at_mut(1);
    let own = &mut first[0];
    std::thread::scope(|scope| {
        let busy = &mut rest[0];
        scope.spawn(|| keep_busy(busy, 0, sectors, &stop, Rng::new(seeds("deleting", 1)[0])));
        let body = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for order in orders {
                let mut snapshots: Vec<Option<(String, Vec<u8>)>> = Vec::new();
                for name in ["a", "b", "c"] {
                    daemon.snap(name);
                    let reference = format!("vm0@{name}");
                    let content = daemon.content(&reference);
                    snapshots.push(Some((reference, content)));
                    own.write(0..100, 1);
                }
                for victim in order {
                    let (reference, _) = snapshots[victim].take().unwrap();
                    std::thread::scope(|scope| {
                        for (other, content) in snapshots.iter().flatten() {
                            let daemon = &daemon;
                            scope.spawn(move || assert!(daemon.content(other) == *content, "{other} changed"));
                        }
                        daemon.delete(&reference);
                    });
                    for (other, content) in snapshots.iter().flatten() {
                        assert!(daemon.content(other) == *content, "{other} changed when {reference} went");
                    }
                }
            }
        }));
        stop.store(true, SeqCst);
        body.unwrap_or_else(|e| std::panic::resume_unwind(e));
    });
    drop(client);
    daemon.assert_only_disks_left();
    assert!(daemon.content("vm0") == std::fs::read(daemon.image("vm0")).unwrap());
}

#[test]
fn a_reader_that_leaves_in_the_middle_of_its_reads_harms_nobody() {
    let daemon = Daemon::with_disks(&[SIZE], "queues=2");
    let mut client = daemon.client("vm0");
    client.write(0..2048, 1);
    daemon.snap("a");
    client.write(500..900, 2);
    for _ in 0..20 {
        let mut reader = daemon.reader("vm0@a");
        for slot in 0..16 {
            reader.queues[0].submit_read(slot, slot * 100..slot * 100 + 500);
        }
        drop(reader);
        client.write(0..10, 3);
    }
    assert_eq!(tags(&daemon.content("vm0@a")), vec![1; 2048]);
    daemon.delete("vm0@a");
    daemon.assert_only_disks_left();
    let live = tags(&client.read_all());
    assert_eq!((live[0], live[499], live[500]), (3, 1, 2));
    assert_eq!(daemon.get("/v1/jobs").json().as_array().unwrap().iter().filter(|j| j["state"] != "done").count(), 0);
    let errors = |v: &Value| v["reason"].clone();
    assert_eq!(errors(&daemon.show_disk("vm0")), Value::Null);
}

const _: () = assert!(SIZE as usize / SECTOR == 2048);
