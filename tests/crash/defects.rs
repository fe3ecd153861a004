//! Do the crash states show when a sync, an order or a recheck is left out? Each is left out in turn.
//!
//! Defects are in the commands, the engine, the jobs, the tables and the taking up, and are compiled in with the feature
//! `planted`.

#![cfg(feature = "planted")]

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use halfsilver::planted::Defect;

use crate::states::{THREADS, try_seed};
use crate::world::Shape;

/// Seeds to try before one counts as unnoticed.
const SEEDS: u64 = 1000;

/// What a seed's run is made of.
type ShapeOf = fn(u64) -> Shape;

/// The first failure of some seeds, on as many threads as the other tests have.
fn noticed(seeds: Range<u64>, shape: ShapeOf) -> Option<(u64, String)> {
    let (next, found) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let failure_of = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while !found.load(Ordering::SeqCst) {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= seeds.end {
                        return;
                    }
                    let failure = match std::panic::catch_unwind(AssertUnwindSafe(|| try_seed(seed, shape(seed)))) {
                        Ok(Ok(_)) => continue,
                        Ok(Err(e)) => e,
                        Err(_) => "panic".to_owned(),
                    };
                    found.store(true, Ordering::SeqCst);
                    failure_of.lock().unwrap().get_or_insert((seed, failure));
                }
            });
        }
    });
    failure_of.into_inner().unwrap()
}

/// Prints the list.
fn score(found: &[(String, Option<(u64, String)>)]) {
    for (name, found) in found {
        match found {
            Some((seed, how)) => {
                let how = how.lines().last().unwrap_or_default().trim();
                println!("planted: {name}: noticed by tests/crash/defects.rs: seed {seed}: {how}");
            }
            None => println!("planted: {name}: NOT NOTICED by tests/crash/defects.rs in {SEEDS} seeds"),
        }
    }
    let unnoticed: Vec<_> = found.iter().filter(|(_, found)| found.is_none()).map(|(name, _)| name).collect();
    assert!(unnoticed.is_empty(), "unnoticed after {SEEDS} seeds each: {unnoticed:?}");
}

#[test]
fn every_defect_is_noticed() {
    /// Each with where it is looked for: the rare ones where they are likely, and first at the seed that noticed it when
    /// this was last looked up. Whatever changes what a seed does makes that a seed like any other.
    const DEFECTS: [(Defect, ShapeOf, u64); 43] = [
        (Defect::IndependentBeforeStored, Shape::of_volumes, 16),
        (Defect::KeptBeforeBytes, Shape::of_volumes, 344),
        (Defect::SettledBeforeSync, Shape::of_restores, 3),
        (Defect::SettledNotStored, Shape::of_restores, 0),
        (Defect::NoPendingRecord, Shape::of, 2),
        (Defect::ImageNotStored, Shape::of, 0),
        (Defect::PackNotNamed, Shape::of, 1),
        (Defect::LayoutNotNoted, Shape::of, 1),
        (Defect::SavedNotCommitted, Shape::of, 1),
        (Defect::TableNotNamed, Shape::of, 0),
        (Defect::LegNotNamed, Shape::of, 4),
        (Defect::QuiescedNotStored, Shape::of, 0),
        (Defect::DrainedNotStored, Shape::of, 0),
        (Defect::NextBeforeRecord, Shape::of_logs, 0),
        (Defect::NextWhenRefused, Shape::of, 90),
        (Defect::RemovedBeforeRecord, Shape::of, 0),
        (Defect::BitsBeforeBytes, Shape::of, 2),
        (Defect::ImagesByTheNearest, Shape::of, 86),
        (Defect::LogsInWrongOrder, Shape::of, 4),
        (Defect::FlushWithoutCommit, Shape::of, 0),
        (Defect::ReclaimBeforeStored, Shape::of, 24),
        (Defect::ReclaimFreedAgain, Shape::of_logs, 31),
        (Defect::FreedAtOnce, Shape::of, 0),
        (Defect::DurableWriteCached, Shape::of, 1),
        (Defect::DurableZerosCached, Shape::of, 0),
        (Defect::DurableWithoutEntry, Shape::of, 0),
        (Defect::EntryBeforeBytes, Shape::of, 0),
        (Defect::FoldDropsFirst, Shape::of, 0),
        (Defect::HandOverBitFirst, Shape::of, 2),
        (Defect::GoneBeforeCommit, Shape::of, 0),
        (Defect::IntentNotStored, Shape::of_legs, 1),
        (Defect::CommitWithoutSync, Shape::of, 0),
        (Defect::CommitOfLaterBits, Shape::of, 4),
        (Defect::CommitSharesRunning, Shape::of, 0),
        (Defect::LeftUnsynced, Shape::of, 17),
        (Defect::ResumedBlindly, Shape::of, 2),
        (Defect::UnfinishedKept, Shape::of, 0),
        (Defect::PendingKept, Shape::of_restores, 0),
        (Defect::FoldBeforeSaved, Shape::of, 5),
        (Defect::HandOverNotStored, Shape::of, 67),
        (Defect::ShownNotStored, Shape::of, 0),
        (Defect::TakenUpForEmpty, Shape::of_saved, 101),
        (Defect::WriteNotNoted, Shape::of, 0),
    ];
    let wanted = std::env::var("CRASH_DEFECTS").ok();
    let is_wanted = |defect: Defect| wanted.as_ref().is_none_or(|names| names.contains(&format!("{defect:?}")));
    let found: Vec<_> = DEFECTS
        .into_iter()
        .filter(|(defect, ..)| is_wanted(*defect))
        .map(|(defect, shape, likely)| {
            let began = std::time::Instant::now();
            let mut seeds = [likely..likely + 1, 0..SEEDS].into_iter();
            let mut tried = seeds.next();
            let mut found = None;
            while let Some(some) = tried {
                found = crate::alone::with_planted(defect, || noticed(some.clone(), shape))
                    .unwrap_or_else(|_| Some((0, "panic".to_owned())));
                tried = match &found {
                    // A seed that fails without the defect, too, says nothing of it.
                    Some((seed, _)) if try_seed(*seed, shape(*seed)).is_err() => Some(seed + 1..some.end),
                    Some(_) => None,
                    None => seeds.next(),
                };
            }
            if let Some((seed, how)) = &found {
                println!("{defect:?}: seed {seed}, {:?}: {how}", began.elapsed());
            }
            (format!("{defect:?}"), found)
        })
        .collect();
    score(&found);
}
