//! Many random runs, on two threads, and what they must have reached together.

use std::cell::RefCell;
use std::rc::Rc;

use crate::run::{COMPARED, Counts, Machine, STATES, Shape};

/// 600 have more than 200000 states; the rest is for the rare ones.
const SEEDS: u64 = 800;
const STATES_MIN: u64 = 200_000;
pub const THREADS: u64 = 2;
const ACTIONS: usize = 60;

/// What the runs must have come to, each at least once.
const REACHED: [&str; 43] = [
    "kills",
    "power cuts",
    "depth 1",
    "depth 2",
    "several logs",
    "a mirror that was split",
    "a frozen full image",
    "tables kept, images lost",
    "images kept, tables lost",
    "entries of a log found after a power cut",
    "snapshots that outlived a kill",
    "changes that outlived a kill",
    "changes told by owners",
    "snapshots that outlived a power cut",
    "snapshots that stayed the same under writes after an end",
    "snapshots that were said to be kept",
    "snapshots that were said to be deleted",
    "snapshots that were said to be gone",
    "snapshots that were said to be broken",
    "amid a guest's change",
    "amid a change of an old epoch",
    "amid a flush",
    "amid the creation of a snapshot",
    "amid a pending record",
    "amid a put of the records",
    "amid a split",
    "amid a snapshot's becoming quiesced",
    "amid a fold",
    "amid a merge",
    "amid a hand-over to a newer log",
    "amid a hand-over of a full image",
    "amid the end of a leg's snapshot",
    "amid the end of a deletion",
    "amid a leg's coming back",
    "amid a new leg",
    "amid a resync",
    "amid a cleaning of the bitmap",
    "amid discards that were put off",
    "amid a start",
    "at depth 2 amid a start",
    "at depth 2 amid a fold",
    "at depth 2 amid a resync",
    "at depth 2 amid a hand-over to a newer log",
];

/// Everything that belongs to one seed.
pub fn try_seed(seed: u64, shape: Shape) -> Result<Counts, String> {
    let counts = Rc::new(RefCell::new(Counts::default()));
    Machine::new(seed, shape, counts.clone()).run(ACTIONS)?;
    Ok(counts.take())
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|s| s.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

#[test]
fn whatever_a_crash_leaves_is_right() {
    let _undisturbed = crate::alone::undisturbed();
    let first = number("CRASH_FIRST").unwrap_or(0);
    let seeds = number("CRASH_SEEDS").unwrap_or(SEEDS);
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            std::thread::spawn(move || {
                let mut counts = Counts::default();
                for seed in (first + thread..first + seeds).step_by(usize::try_from(THREADS).unwrap()) {
                    let again = |e| panic!("seed {seed} (CRASH_FIRST={seed} CRASH_SEEDS=1 repeats it): {e}");
                    counts.join(&try_seed(seed, Shape::of(seed)).unwrap_or_else(again));
                }
                counts
            })
        })
        .collect();
    let mut total = Counts::default();
    for thread in threads {
        total.join(&thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
    }
    println!("{seeds} seeds, {} crash states", total.of(STATES));
    for (what, times) in &total.0 {
        println!("{times:>9} {what}");
    }
    let missing: Vec<_> = REACHED.iter().filter(|what| total.of(what) == 0).collect();
    assert!(seeds < 100 || missing.is_empty(), "no run reached: {missing:?}");
    assert_eq!(total.of(STATES), total.of(COMPARED), "each state is compared");
    assert!(seeds < SEEDS || total.of(STATES) >= STATES_MIN, "{} crash states are too few", total.of(STATES));
}
