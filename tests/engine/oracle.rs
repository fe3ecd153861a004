//! Random runs against one array a version: many seeds, on two threads, and what they must have reached together.

use halfsilver::engine::Writers;

use crate::run::{Run, Shape};
use crate::sim::Rng;
use crate::world::Counts;

/// Requests of guests in the usual run.
const OPERATIONS_MIN: u64 = 1_000_000;
const SEEDS: u64 = 5000;
const STEPS: usize = 300;
/// Every so many seeds there is also a run with two disks.
const GROUP_EVERY: u64 = 3;
const THREADS: u64 = 2;

/// One run from a seed.
pub fn run(seed: u64, steps: usize) -> Result<Counts, String> {
    Run::new(seed, Shape::of(seed)).run(steps)
}

/// One run with two disks of one daemon, which are frozen together now and then.
fn run_group(seed: u64, steps: usize) -> Result<Counts, String> {
    let one = Run::new(seed, Shape::of(seed));
    let other = Run::beside(!seed, Shape::of(seed / 7), one.clock.clone(), one.editor.clone());
    let mut rng = Rng::new(seed ^ 0x5555);
    let mut disks = [one, other];
    for _ in 0..steps {
        if rng.chance(5) && disks.iter().all(Run::has_room) {
            disks.iter_mut().for_each(Run::make_room_in_the_clock);
            let prepared = disks.iter_mut().map(Run::prepare_cut).collect();
            let writers = if rng.chance(35) { Writers::Connection } else { Writers::Request };
            let cut = disks[0].editor.clone().cut(prepared, writers).unwrap();
            for (disk, version) in disks.iter_mut().zip(cut.frozen) {
                disk.note_cut(cut.ended, version);
            }
        }
        disks[rng.below(2)].step()?;
    }
    // A deletion on one disk waits for requests on the other, so the two come to rest together.
    let [one, other] = &mut disks;
    one.rest();
    other.rest();
    while one.scheduler.step(&mut one.rng) | other.scheduler.step(&mut other.rng) {}
    disks.iter_mut().try_for_each(Run::settle)?;
    let mut total = Counts::default();
    for disk in disks {
        total.add(&disk.finish()?);
    }
    Ok(total)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|s| s.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

/// Everything that belongs to one seed.
fn try_seed(seed: u64) -> Counts {
    let again = |e| panic!("seed {seed} (ORACLE_FIRST={seed} ORACLE_SEEDS=1 repeats it): {e}");
    let mut counts = run(seed, STEPS).unwrap_or_else(again);
    if seed.is_multiple_of(GROUP_EVERY) {
        let again = |e: String| again(format!("two disks: {e}"));
        counts.add(&run_group(seed, 2 * STEPS).unwrap_or_else(again));
    }
    counts
}

#[test]
fn random_runs_match_one_array_a_version() {
    let _undisturbed = crate::undisturbed();
    let first = number("ORACLE_FIRST").unwrap_or(0);
    let seeds = number("ORACLE_SEEDS").unwrap_or(SEEDS);
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            std::thread::spawn(move || {
                let mut counts = Counts::default();
                (first + thread..first + seeds)
                    .step_by(usize::try_from(THREADS).unwrap())
                    .for_each(|seed| counts.add(&try_seed(seed)));
                counts
            })
        })
        .collect();
    let mut total = Counts::default();
    for thread in threads {
        total.add(&thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
    }
    println!("{seeds} seeds, {} operations: {total:?}", total.operations);
    assert!(seeds < SEEDS || total.operations >= OPERATIONS_MIN, "{} operations are too few", total.operations);
    for (what, count) in [
        ("cuts", total.cuts),
        ("deletes", total.deletes),
        ("deletes in the middle", total.deletes_in_the_middle),
        ("changes that began in an epoch that had ended", total.draining_changes),
        ("broken versions", total.broken),
        ("reads that a broken version refused", total.refused_reads),
        ("discards put off", total.deferred),
        ("reads of frozen versions", total.frozen_reads),
        ("blocks saved", total.preserved_blocks),
        ("holes kept as holes", total.holes_kept),
        ("logs", total.logs),
        ("layers in packs", total.packs),
        ("frozen versions that outlive a power cut", total.saved_durably),
        ("splits", total.splits),
        ("splits of legs that were kept equal", total.splits_of_pairs),
        ("folds", total.folds),
        ("requests that came long after their epoch had ended", total.held),
        ("moments that were compared", total.comparisons),
        ("marks that were compared", total.comparisons_of_marks),
        ("moments that were compared by their owners", total.comparisons_by_owners),
        ("moments of which it was unknown what had changed", total.unknown_changes),
        ("marks that were forgotten", total.marks_forgotten),
        ("cuts by connection", total.by_connection),
        ("connections cut over", total.moved),
        ("growths", total.growths),
        ("growths under snapshots", total.growths_under_snapshots),
        ("reads behind the end of a version", total.reads_behind_the_end),
        ("moments of different sizes that were compared", total.comparisons_across_sizes),
    ] {
        assert!(count > 0 || seeds < 100, "no run reached: {what}");
    }
}
