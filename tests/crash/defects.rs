//! Do the crash states show when a sync, an order or a recheck is left out? Each is left out in turn.
//!
//! Defects are in the commands, the engine, the jobs, the tables and the taking up, and are compiled in with the feature
//! `planted`.

#![cfg(feature = "planted")]

use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use halfsilver::planted::Defect;

use crate::states::{THREADS, try_seed};
use crate::world::Shape;

/// Seeds to try before one counts as unnoticed.
const SEEDS: u64 = 1000;

/// The first failure of some seeds from `first` on, on as many threads as the other tests have.
fn noticed(first: u64, shape: impl Fn(u64) -> Shape + Sync) -> Option<(u64, String)> {
    let (next, found) = (AtomicU64::new(first), AtomicBool::new(false));
    let failure_of = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while !found.load(Ordering::SeqCst) {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + SEEDS {
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
    const DEFECTS: [Defect; 43] = [
        Defect::IndependentBeforeStored,
        Defect::KeptBeforeBytes,
        Defect::SettledBeforeSync,
        Defect::SettledNotStored,
        Defect::NoPendingRecord,
        Defect::ImageNotStored,
        Defect::PackNotNamed,
        Defect::LayoutNotNoted,
        Defect::SavedNotCommitted,
        Defect::TableNotNamed,
        Defect::LegNotNamed,
        Defect::QuiescedNotStored,
        Defect::DrainedNotStored,
        Defect::NextBeforeRecord,
        Defect::NextWhenRefused,
        Defect::RemovedBeforeRecord,
        Defect::BitsBeforeBytes,
        Defect::ImagesByTheNearest,
        Defect::LogsInWrongOrder,
        Defect::FlushWithoutCommit,
        Defect::ReclaimBeforeStored,
        Defect::ReclaimFreedAgain,
        Defect::FreedAtOnce,
        Defect::DurableWriteCached,
        Defect::DurableZerosCached,
        Defect::DurableWithoutEntry,
        Defect::EntryBeforeBytes,
        Defect::FoldDropsFirst,
        Defect::HandOverBitFirst,
        Defect::GoneBeforeCommit,
        Defect::IntentNotStored,
        Defect::CommitWithoutSync,
        Defect::CommitOfLaterBits,
        Defect::CommitSharesRunning,
        Defect::LeftUnsynced,
        Defect::ResumedBlindly,
        Defect::UnfinishedKept,
        Defect::PendingKept,
        Defect::FoldBeforeSaved,
        Defect::HandOverNotStored,
        Defect::ShownNotStored,
        Defect::TakenUpForEmpty,
        Defect::WriteNotNoted,
    ];
    let wanted = std::env::var("CRASH_DEFECTS").ok();
    let is_wanted = |defect: &Defect| wanted.as_ref().is_none_or(|names| names.contains(&format!("{defect:?}")));
    let found: Vec<_> = DEFECTS
        .into_iter()
        .filter(is_wanted)
        .map(|defect| {
            // The rare ones are looked for where they are likely.
            let shape: fn(u64) -> Shape = match defect {
                Defect::ReclaimFreedAgain | Defect::NextBeforeRecord => Shape::of_logs,
                Defect::SettledBeforeSync | Defect::SettledNotStored | Defect::PendingKept => Shape::of_restores,
                Defect::IndependentBeforeStored | Defect::KeptBeforeBytes => Shape::of_volumes,
                Defect::TakenUpForEmpty => Shape::of_saved,
                Defect::IntentNotStored => Shape::of_legs,
                _ => Shape::of,
            };
            let began = std::time::Instant::now();
            // A seed that fails without the defect, too, says nothing of it.
            let mut first = 0;
            let mut found;
            loop {
                found = crate::alone::with_planted(defect, || noticed(first, shape))
                    .unwrap_or_else(|_| Some((0, "panic".to_owned())));
                match &found {
                    Some((seed, _)) if try_seed(*seed, shape(*seed)).is_err() => first = seed + 1,
                    _ => break,
                }
            }
            if let Some((seed, how)) = &found {
                println!("{defect:?}: seed {seed}, {:?}: {how}", began.elapsed());
            }
            (format!("{defect:?}"), found)
        })
        .collect();
    score(&found);
}
