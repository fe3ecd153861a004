//! Do the crash states show when a sync, an order or a recheck is left out? Each is left out in turn.
//!
//! Slips are steps of the daemon's order, as `daemon.rs` here has it. Defects are in the engine, the jobs, the tables and
//! the taking up, and are compiled in with the feature `planted`.

use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::run::{Shape, Slip};
use crate::states::{THREADS, try_seed};

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
fn every_slip_in_the_order_of_steps_is_noticed() {
    let _undisturbed = crate::alone::undisturbed();
    let found = Slip::ALL.map(|slip| {
        let shape: fn(u64) -> Shape = match slip {
            Slip::NoPendingRecord | Slip::NextBeforeRecord => Shape::of_logs,
            Slip::SavedNotCommitted => Shape::of_saved,
            Slip::TableInUseRemoved => |seed| Shape { strategies: [50, 50, 0], ..Shape::of_logs(seed) },
            _ => Shape::of,
        };
        let first = match slip {
            Slip::LegBackBeforeRecord => 520,
            _ => 0,
        };
        (format!("{slip:?}"), noticed(first, |seed| Shape { slip: Some(slip), ..shape(seed) }))
    });
    score(&found);
}

#[cfg(feature = "planted")]
#[test]
fn every_defect_is_noticed() {
    use halfsilver::planted::Defect;

    const DEFECTS: [Defect; 37] = [
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
        Defect::GivenUnstored,
        Defect::OneLegSynced,
        Defect::IntentNotStored,
        Defect::CleansRecent,
        Defect::CleansUnderWriters,
        Defect::CleansUnstored,
        Defect::CleansSideBySide,
        Defect::CleansWhileSplit,
        Defect::LegBeforeBits,
        Defect::LegsTakenForEqual,
        Defect::SplitNotStored,
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
    let found = DEFECTS.map(|defect| {
        // The rare ones are looked for where they are likely.
        let (first, shape): (u64, fn(u64) -> Shape) = match defect {
            Defect::ReclaimFreedAgain => (280, Shape::of_logs),
            Defect::ImagesByTheNearest => (80, Shape::of),
            Defect::GivenUnstored => (760, Shape::of),
            Defect::CleansUnstored => (210, Shape::of),
            Defect::CleansSideBySide => (1070, Shape::of_equal_legs),
            Defect::SplitNotStored => (680, Shape::of),
            Defect::LegBeforeBits => (450, Shape::of_new_leg),
            _ => (0, Shape::of),
        };
        let found = crate::alone::with_planted(defect, || noticed(first, shape));
        (format!("{defect:?}"), found.unwrap_or_else(|_| Some((0, "panic".to_owned()))))
    });
    score(&found);
}
