//! Many random runs, on two threads, and what they must have reached together.

use std::cell::RefCell;
use std::rc::Rc;

use crate::world::{Counts, Shape, run};

/// These have more than 100000 states.
const SEEDS: u64 = 700;
const STATES_MIN: u64 = 100_000;
pub const THREADS: u64 = 2;
const ACTIONS: usize = 60;

/// What the runs must have come to, each at least once.
const REACHED: [&str; 58] = [
    "kills",
    "power cuts",
    "depth 1",
    "depth 2",
    "amid a start",
    "amid a stop",
    "after a clean stop",
    "amid Create",
    "amid CreateGroup",
    "amid Delete",
    "amid DeleteGroup",
    "amid MakeVolume",
    "amid DeleteVolume",
    "amid Complete",
    "amid Promote",
    "amid Update",
    "amid Restore",
    "amid Disable",
    "amid Enable",
    "amid Mirror",
    "amid Unmirror",
    "amid Rename",
    "amid Set",
    "amid ForgetBookmark",
    "amid a job: fold",
    "amid a job: merge",
    "amid a job: migrate",
    "amid a job: mirror",
    "amid a job: restore",
    "amid a job: update",
    "Create done",
    "CreateGroup done",
    "Delete done",
    "DeleteGroup done",
    "MakeVolume done",
    "DeleteVolume done",
    "Complete done",
    "Promote done",
    "Update done",
    "Restore done",
    "Disable done",
    "Enable done",
    "Mirror done",
    "Unmirror done",
    "Rename done",
    "Set done",
    "ForgetBookmark done",
    "StopJob done",
    "ResumeJob done",
    "refusals of the records",
    "snapshots after a kill",
    "snapshots after a power cut",
    "packed snapshots after a kill",
    "packed snapshots after a power cut",
    "snapshots said to be Kept",
    "snapshots said to be Deleting",
    "snapshots that stayed the same under writes after an end",
    "pairs of legs that were equal after an end",
];

/// Everything that belongs to one seed.
pub fn try_seed(seed: u64, shape: Shape) -> Result<Counts, String> {
    let counts = Rc::new(RefCell::new(Counts::default()));
    run(seed, shape, ACTIONS, &counts)?;
    Ok(counts.take())
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|s| s.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

fn join(total: &mut Counts, more: Counts) {
    more.into_iter().for_each(|(what, times)| *total.entry(what).or_default() += times);
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
                    join(&mut counts, try_seed(seed, Shape::of(seed)).unwrap_or_else(again));
                }
                counts
            })
        })
        .collect();
    let mut total = Counts::default();
    for thread in threads {
        join(&mut total, thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
    }
    let of = |what: &str| total.get(what).copied().unwrap_or(0);
    println!("{seeds} seeds, {} crash states", of("states"));
    for (what, times) in &total {
        println!("{times:>9} {what}");
    }
    let missing: Vec<_> = REACHED.iter().filter(|what| of(what) == 0).collect();
    assert!(seeds < SEEDS || missing.is_empty(), "no run reached: {missing:?}");
    let looked_at = of("states") + of("after a clean stop");
    assert_eq!(looked_at, of("compared with check"), "each state is compared");
    assert!(seeds < SEEDS || of("states") >= STATES_MIN, "{} crash states are too few", of("states"));
}
