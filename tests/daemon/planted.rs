//! Do these tests notice when the daemon is wrong? Each defect is switched on in turn and must be noticed.
//!
//! Defects that one test by itself notices are in `tests/planted.list`; these need many runs, or a death at some point.

use std::panic::catch_unwind;

use crate::harness::{PLANT, from_env, seeds};
use crate::{chain, kills, oracle};

/// What the oracle can be expected to see in a few seconds of real time. Races of single instructions are for the model
/// tests. That a draining write reaches the older version's copy cannot be seen from outside at all: a write that was on
/// its way at the cut may belong to the snapshot or not.
const BY_THE_ORACLE: [&str; 4] = ["NoBlockLock", "BitAfterOverwrite", "DiscardAtOnce", "DeleteWithoutHandover"];

/// What shows when the daemon dies at some point, and under which strategy.
const BY_DEATHS: [(&str, &str, &str); 2] = [
    ("InflightUnmarkedEarly", "copy-on-write", "before answers are visible"),
    ("InflightNotMarked", "copy-on-write", "before answers are visible"),
];

fn noticed(defect: &str, run: impl Fn(u64) + std::panic::RefUnwindSafe) -> bool {
    PLANT.set(Some(defect.to_owned()));
    let first = seeds(defect, 1)[0];
    let tries = from_env("HALFSILVER_TRIES", 12);
    let at = (0..tries).find(|i| catch_unwind(|| run(first + i)).is_err());
    PLANT.set(None);
    match at {
        Some(at) => println!("planted: {defect}: noticed by tests/daemon/planted.rs: seed {}", first + at),
        None => println!("planted: {defect}: NOT NOTICED by tests/daemon/planted.rs in {tries} tries"),
    }
    at.is_some()
}

#[test]
fn planted_defects_of_the_mirror_are_noticed() {
    let unnoticed: Vec<_> = BY_THE_ORACLE
        .into_iter()
        .filter(|defect| {
            !noticed(defect, |seed| {
                oracle::one_run(seed, 10_000);
            })
        })
        .collect();
    assert!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
}

#[test]
fn planted_cut_of_each_disk_by_itself_is_noticed() {
    assert!(noticed("CutPerDisk", |seed| chain::one_run(seed, 60)));
}

/// What is wrong only while frontends stay with a snapshot, or only with what a restart takes up.
#[test]
fn planted_defects_are_noticed_between_kills() {
    for defect in ["DrainNotMirrored", "DeleteWithoutHandover"] {
        assert!(noticed(defect, |seed| kills::one_run(seed, 60)), "{defect} is not noticed");
    }
}

#[test]
fn planted_orders_are_noticed_by_deaths() {
    let deaths = |seed, strategy, point| kills::points::deaths_at(seed, strategy, point, 20);
    // A request that is lost shows by an answer that never comes: they wait side by side.
    let unnoticed: Vec<_> = std::thread::scope(|scope| {
        let look = |(defect, strategy, point)| move || noticed(defect, |seed| deaths(seed, strategy, point));
        let threads: Vec<_> = BY_DEATHS.into_iter().map(|one| (one.0, scope.spawn(look(one)))).collect();
        threads.into_iter().filter_map(|(defect, thread)| (!thread.join().unwrap()).then_some(defect)).collect()
    });
    assert!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
}
