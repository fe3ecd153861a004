//! Many random runs, on two threads, and what they must have reached together.

use std::cell::RefCell;
use std::rc::Rc;

use crate::run::{Counts, Machine, STATES, Shape};

const SEEDS: u64 = 900;
const STATES_MIN: u64 = 200_000;
pub const THREADS: u64 = 2;
const ACTIONS: usize = 60;

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
    // To repeat what `defects.rs` has found.
    #[cfg(feature = "planted")]
    halfsilver::mirror::planted::plant_from_environment();
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
    assert!(seeds < SEEDS || total.of(STATES) >= STATES_MIN, "{} crash states are too few", total.of(STATES));
}
