//! Does the oracle notice when a rule is left out? Each defect is switched on in turn and must be noticed.

use halfsilver::planted::Defect;

use crate::oracle;

/// Seeds to try before a defect counts as unnoticed.
const SEEDS: u64 = 3000;

/// Those that a schedule on one thread can show; the others are about the orders of atomic operations and
/// are noticed by the model tests.
const ON_ONE_THREAD: [Defect; 28] = [
    Defect::EpochPerPart,
    Defect::LeaveEarly,
    Defect::NoBlockLock,
    Defect::AckFirst,
    Defect::NoReadRecheck,
    Defect::NoPlanRecheck,
    Defect::BitAfterOverwrite,
    Defect::DrainNotMirrored,
    Defect::DiscardAtOnce,
    Defect::DeleteWithoutHandover,
    Defect::FoldWithoutPreserve,
    Defect::FoldWithoutGrace,
    Defect::NoFill,
    Defect::SupersededEntryKept,
    Defect::SplitNotMirrored,
    Defect::SupersedesFromOutside,
    Defect::DiscardNotForgotten,
    Defect::PlaceNotEmptied,
    Defect::ZerosNotCopied,
    Defect::ReclaimBlindly,
    Defect::NoRetireRecheck,
    Defect::NoPivotRecheck,
    Defect::LetGoOfOverwritten,
    Defect::DiscardNotRechecked,
    Defect::RetiresSideBySide,
    Defect::DiscardNotNoted,
    Defect::ChangesNotMerged,
    Defect::UnknownTakenAsUnchanged,
];

#[test]
fn every_rule_left_out_is_noticed() {
    let mut unnoticed = Vec::new();
    for defect in ON_ONE_THREAD {
        // The rare one is looked for where it is.
        let first = if defect == Defect::NoRetireRecheck { 260 } else { 0 };
        let noticed =
            (first..first + SEEDS).find_map(|seed| match crate::with_planted(defect, || oracle::run(seed, 250)) {
                Ok(Ok(_)) => None,
                Ok(Err(e)) => Some((seed, e)),
                Err(_) => Some((seed, "panic".to_owned())),
            });
        match noticed {
            Some((seed, how)) => {
                println!("planted: {defect:?}: noticed by tests/engine/defects.rs: seed {seed}: {how}");
            }
            None => unnoticed.push(defect),
        }
    }
    assert!(unnoticed.is_empty(), "unnoticed after {SEEDS} seeds each: {unnoticed:?}");
}

/// Those of volumes are looked for in random trees of them.
#[test]
fn rules_of_completion_left_out_are_noticed() {
    let defects =
        [Defect::FilledBitFirst, Defect::FilledWithoutLock, Defect::WrittenBlockKept, Defect::UnknownSourceKept];
    for defect in defects {
        let is_noticed = |&seed: &u64| crate::with_planted(defect, || crate::volumes::run(seed)).is_err();
        let noticed = (0..SEEDS).find(is_noticed).unwrap_or_else(|| panic!("{defect:?} is not noticed"));
        println!("planted: {defect:?}: noticed by tests/engine/defects.rs: trees of volumes, seed {noticed}");
    }
}

#[test]
fn every_rule_of_a_restore_left_out_is_noticed() {
    let defects = [
        Defect::PendingNotFilled,
        Defect::SettledBeforeBytes,
        Defect::OldPlansNotAwaited,
        Defect::GateIgnored,
        Defect::BroughtBackUnsaved,
        Defect::RestoreNotNoted,
    ];
    let noticed = |defect| (0..SEEDS).find(|&seed| crate::with_planted(defect, || crate::restore::run(seed)).is_err());
    let found = defects.map(|defect| (defect, noticed(defect)));
    for (defect, seed) in found.iter().filter_map(|(defect, seed)| Some((defect, (*seed)?))) {
        println!("planted: {defect:?}: noticed by tests/engine/defects.rs: seed {seed} of restores");
    }
    let unnoticed: Vec<_> = found.iter().filter(|(_, seed)| seed.is_none()).collect();
    assert!(unnoticed.is_empty(), "unnoticed after {SEEDS} seeds each: {unnoticed:?}");
}

/// The random runs come to this one seldom.
#[test]
fn an_entry_that_was_made_anew_is_noticed_at_once() {
    let shown = crate::with_planted(Defect::NoReadGeneration, crate::figures::entry_deleted_and_made_anew);
    assert_eq!(shown.unwrap(), [0; 8], "the place of the old entry, which was given back");
    println!("planted: NoReadGeneration: noticed by tests/engine/defects.rs: a place that was given back is shown");
}
