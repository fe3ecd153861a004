//! Power cuts at every point, of both legs and the bitmap at once.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::LegState;
use halfsilver::job::{Outcome, Pace, resync};

use crate::media::{Op, Scheduler, run};
use crate::schedule::Rng;
use crate::world::{How, Mirror, World, some_place};

/// What happens beside the guest's writes.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Beside {
    Nothing,
    Resync,
    SplitPrepared,
    /// A second cleaning of the bitmap, side by side with the first.
    Cleaning,
    /// One of the legs begins to fail.
    Failure(Op),
}

/// What the runs have seen, so that a test that never reaches the rare states fails.
#[derive(Default, Debug)]
struct Seen {
    cuts: usize,
    resynchronised: usize,
    nothing_to_copy: usize,
    leg_1_ahead: usize,
    cleaned: u64,
    split: usize,
    dropped: [usize; 2],
}

fn load(scheduler: &mut Scheduler, mirror: &Mirror, rng: &mut Rng, cleaned: &Rc<Cell<u64>>) {
    for writer in 0..3u8 {
        let (mirror, mut rng) = (mirror.clone(), Rng::new(rng.next()));
        scheduler.spawn(async move {
            for i in 0..6 {
                let (at, len) = some_place(&mut rng);
                let how = [How::Write, How::Write, How::Write, How::Durable, How::Zero][rng.below(5)];
                let id = if how == How::Zero { 0 } else { 10 + writer * 10 + i };
                mirror.write(at, len, id, how).await.unwrap();
                if rng.chance(40) {
                    mirror.flush().await.unwrap();
                }
            }
        });
    }
    let (mirror, cleaned) = (mirror.clone(), cleaned.clone());
    scheduler.spawn(async move {
        for _ in 0..8 {
            let some = mirror.pair.clean(&mirror.queue, mirror.disk.block_locks()).await.unwrap();
            cleaned.set(cleaned.get() + some);
        }
    });
}

/// Runs a load and cuts the power at step `cut`. False when the load was over before.
fn run_until(seed: u64, beside: Beside, cut: usize, seen: &mut Seen) -> bool {
    let mut rng = Rng::new(seed);
    let world = World::new();
    let mirror = if beside == Beside::Resync { world.create(&mut rng) } else { world.equal(&mut rng) };
    let before = world.legs[0].bytes();
    let cleaned = Rc::new(Cell::new(0));
    let mut scheduler = Scheduler::default();
    load(&mut scheduler, &mirror, &mut rng, &cleaned);
    let this = mirror.clone();
    match beside {
        Beside::Nothing => {}
        Beside::Failure(op) => world.legs[rng.below(2)].fail(op, rng.below(4), libc::EIO),
        Beside::Resync => scheduler.spawn(async move {
            let pace = Arc::new(Pace::default());
            resync(this.queue.clone(), this.disk.clone(), this.pair.clone(), pace).await.unwrap();
        }),
        Beside::Cleaning => scheduler.spawn(async move {
            for _ in 0..8 {
                this.pair.clean(&this.queue, this.disk.block_locks()).await.unwrap();
            }
        }),
        Beside::SplitPrepared => scheduler.spawn(async move {
            this.pair.prepare_split(&this.queue).await.unwrap();
        }),
    }
    let mut went_on = true;
    for _ in 0..cut {
        went_on = scheduler.step(&mut rng);
        if !went_on {
            break;
        }
    }
    seen.cleaned += cleaned.get();
    let oracle = mirror.oracle.borrow().clone();
    let left = world.after_power_cut(&mut rng);
    drop(scheduler);
    seen.cuts += 1;

    let what = format!("seed {seed}, {beside:?}, cut at step {cut}");
    let back = left.open(&mut rng, &[0, 1]).unwrap();
    let states = back.states();
    let read = states.iter().position(|state| *state == LegState::InSync).unwrap();
    oracle.check(&before, &left.legs[read].bytes()).unwrap_or_else(|e| panic!("{what}: leg {read}: {e}"));
    let attach = |rng: &mut Rng, place: usize, full: bool| {
        let (pair, queue, leg) = (back.pair.clone(), back.queue.clone(), left.leg(place));
        run(rng, async move { pair.attach(&queue, leg, full).await.unwrap() });
    };
    match &states[1 - read] {
        LegState::InSync => {
            seen.nothing_to_copy += 1;
            assert!(left.legs[0].bytes() == left.legs[1].bytes(), "{what}: the legs differ and nobody knows");
        }
        LegState::Resynchronising => {
            seen.resynchronised += 1;
            seen.leg_1_ahead += usize::from(left.legs[0].bytes() != left.legs[1].bytes());
        }
        LegState::Split => {
            seen.split += 1;
            attach(&mut rng, 1, false);
        }
        LegState::Failed(reason) => {
            assert!(matches!(beside, Beside::Failure(_)), "{what}: {reason}");
            seen.dropped[1 - read] += 1;
            attach(&mut rng, 1 - read, true);
        }
    }
    if states[1 - read] != LegState::InSync {
        assert_eq!(back.resync(&mut rng).unwrap(), Outcome::Done, "{what}");
    }
    assert!(left.legs[0].bytes() == left.legs[1].bytes(), "{what}: the legs differ");
    oracle.check(&before, &left.legs[0].bytes()).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(back.pair.marked_bytes(), 0, "{what}");
    went_on
}

fn cut_everywhere(beside: Beside, seeds: std::ops::Range<u64>, stride: usize) -> Seen {
    let mut seen = Seen::default();
    for seed in seeds {
        println!("seed {seed}");
        let mut cut = usize::try_from(seed).unwrap() % stride;
        while run_until(seed, beside, cut, &mut seen) {
            cut += stride;
        }
    }
    println!("{seen:?}");
    seen
}

#[test]
fn after_every_power_cut_the_legs_become_equal_and_what_was_flushed_is_there() {
    let mut seen = cut_everywhere(Beside::Nothing, 1..3, 1);
    let more = cut_everywhere(Beside::Nothing, 3..40, 23);
    seen.cuts += more.cuts;
    seen.leg_1_ahead += more.leg_1_ahead;
    seen.cleaned += more.cleaned;
    assert!(seen.cuts > 500 && seen.leg_1_ahead > 100 && seen.nothing_to_copy > 10 && seen.cleaned > 10, "{seen:?}");
}

#[test]
fn the_same_while_the_second_leg_is_being_copied() {
    let seen = cut_everywhere(Beside::Resync, 100..130, 29);
    assert!(seen.cuts > 200 && seen.resynchronised > 100, "{seen:?}");
}

#[test]
fn the_same_with_two_cleanings_side_by_side() {
    let seen = cut_everywhere(Beside::Cleaning, 0..60, 23);
    assert!(seen.cleaned > 0 && seen.nothing_to_copy > 0, "{seen:?}");
}

#[test]
fn the_same_around_the_preparation_of_a_split() {
    let seen = cut_everywhere(Beside::SplitPrepared, 200..230, 23);
    assert!(seen.split > 100, "{seen:?}");
}

#[test]
fn the_same_while_a_leg_fails() {
    let mut dropped = [0; 2];
    for (op, seeds) in [(Op::Write, 300..330), (Op::Zero, 400..430), (Op::Sync, 500..530)] {
        let seen = cut_everywhere(Beside::Failure(op), seeds, 23);
        dropped = [dropped[0] + seen.dropped[0], dropped[1] + seen.dropped[1]];
    }
    assert!(dropped.iter().all(|&times| times > 50), "{dropped:?}");
}

#[test]
fn a_leg_that_was_being_added_is_copied_in_full() {
    let mut added = 0;
    for (seed, cut) in (600..640).flat_map(|seed| (0..30).map(move |cut| (seed, cut))) {
        let mut rng = Rng::new(seed);
        let world = World::new();
        let mirror = world.equal(&mut rng);
        world.legs[1].fail(Op::Sync, 0, libc::EIO);
        let this = mirror.clone();
        run(&mut rng, async move { this.flush().await.unwrap() });
        let other = crate::media::Medium::new("leg-1", crate::world::SIZE);
        let world = World { legs: [world.legs[0].clone(), other], ..world };
        let (this, leg) = (mirror.clone(), world.leg(1));
        let mut scheduler = Scheduler::default();
        scheduler.spawn(async move { this.pair.attach(&this.queue, leg, true).await.unwrap() });
        for _ in 0..cut {
            scheduler.step(&mut rng);
        }
        let left = world.after_power_cut(&mut rng);
        drop(scheduler);
        let back = left.open(&mut rng, &[0, 1]).unwrap();
        if back.states()[1] == LegState::Resynchronising {
            added += 1;
            assert_eq!(back.resync(&mut rng).unwrap(), Outcome::Done);
            assert!(left.legs[0].bytes() == left.legs[1].bytes(), "seed {seed}, cut at step {cut}");
        }
    }
    assert!(added > 50, "{added}");
}
