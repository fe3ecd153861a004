//! What an image notes of its writes and syncs: a flush that leaves it out has nothing to make durable.

use std::sync::Arc;

use halfsilver::image::Unsynced;
use halfsilver::planted::{Defect, plant};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::thread;

use crate::{alone, explore, is_noticed, report};

const WORKERS: usize = 3;

/// An image: how much each worker has written, and how much of that is on stable storage.
#[derive(Default)]
struct Medium {
    unsynced: Unsynced,
    written: [AtomicU64; WORKERS],
    stored: [AtomicU64; WORKERS],
}

impl Medium {
    /// As `transfer.rs` does it: the write ends, and then it is noted.
    fn write(&self, worker: usize) {
        self.written[worker].fetch_add(1, Ordering::SeqCst);
        self.unsynced.note_write();
    }

    /// A flush: what the worker was told of is on stable storage afterwards.
    fn flush(&self, worker: usize) {
        let told = self.written[worker].load(Ordering::SeqCst);
        if self.unsynced.is_dirty() {
            let number = self.unsynced.begin_sync();
            let covered = self.written.each_ref().map(|written| written.load(Ordering::SeqCst));
            thread::yield_now();
            for (stored, covered) in self.stored.iter().zip(covered) {
                stored.fetch_max(covered, Ordering::SeqCst);
            }
            self.unsynced.end_sync(number);
        }
        assert!(self.stored[worker].load(Ordering::SeqCst) >= told, "a flush left out what was written");
    }
}

fn one_order() {
    let medium = Arc::new(Medium::default());
    let threads: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let medium = medium.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    medium.write(worker);
                    medium.flush(worker);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(!medium.unsynced.is_dirty(), "the next flush costs nothing");
}

#[test]
fn a_flush_leaves_out_only_what_is_stored() {
    let _alone = alone();
    explore(3000, one_order);
}

#[test]
fn planted_a_sync_that_covers_too_much_is_noticed() {
    let _alone = alone();
    plant(Some(Defect::SyncNumberedLate));
    let noticed = is_noticed(500, one_order);
    plant(None);
    report(Defect::SyncNumberedLate, noticed, "unsynced.rs");
    assert!(noticed);
}
