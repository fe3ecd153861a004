//! The rules of legs one by one: who is written, read, dropped, copied.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use halfsilver::engine::{LegState, Pair, PairError};
use halfsilver::image::IoQueue;
use halfsilver::job::{Outcome, Pace, resync};
use uuid::Uuid;

use crate::media::{Op, SECTOR, Scheduler, run, set_aside};
use crate::schedule::Rng;
use crate::world::{BLOCK, How, Mirror, REGION, SIZE, World, leg_id, some_place};

const HOWS: [How; 4] = [How::Write, How::Durable, How::Zero, How::Release];

/// Guests that write, zero, discard, read back what they wrote, and flush.
fn load(scheduler: &mut Scheduler, mirror: &Mirror, rng: &mut Rng) {
    for writer in 0..4u8 {
        let (mirror, mut rng) = (mirror.clone(), Rng::new(rng.next()));
        scheduler.spawn(async move {
            for i in 0..10 {
                let (at, len) = some_place(&mut rng);
                let how = HOWS[rng.below(4)];
                let id = if how == How::Write || how == How::Durable { 10 + writer * 20 + i } else { 0 };
                mirror.write(at, len, id, how).await.unwrap();
                if rng.chance(20) {
                    mirror.flush().await.unwrap();
                }
            }
        });
    }
}

fn write(mirror: &Mirror, rng: &mut Rng, at: usize, len: usize, id: u8, how: How) -> bool {
    let this = mirror.clone();
    run(rng, async move { this.write(at, len, id, how).await.is_ok() })
}

fn flush(mirror: &Mirror, rng: &mut Rng) -> bool {
    let this = mirror.clone();
    run(rng, async move { this.flush().await.is_ok() })
}

fn read(mirror: &Mirror, rng: &mut Rng, at: usize, len: usize) -> Option<Vec<u8>> {
    let this = mirror.clone();
    run(rng, async move { this.read(at, len).await.ok() })
}

fn attach(mirror: &Mirror, world: &World, rng: &mut Rng, place: usize, full: bool) -> Result<(), PairError> {
    let (this, leg) = (mirror.clone(), world.leg(place));
    run(rng, async move { this.pair.attach(&this.queue, leg, full).await })
}

fn assert_equal(world: &World) {
    assert!(world.legs[0].bytes() == world.legs[1].bytes(), "the legs differ");
}

#[test]
fn both_legs_have_every_write() {
    for seed in 1..=60 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let mut world = World::new();
        if seed % 2 == 0 {
            // What one leg gives back the other one must fill with zeros. Only one direction can be seen here: a pair
            // of which neither can does nothing.
            world.legs[1] = world.legs[1].clone().without_holes();
        }
        let mirror = world.equal(&mut rng);
        let before = world.legs[0].bytes();
        let mut scheduler = Scheduler::default();
        load(&mut scheduler, &mirror, &mut rng);
        assert!(scheduler.settle(&mut rng), "it hangs");
        assert_equal(&world);
        let expected = mirror.oracle.borrow().apply(&before);
        assert!(world.legs[0].bytes() == expected, "not what was written");
        assert!(read(&mirror, &mut rng, 0, SIZE).unwrap() == expected, "not what was written is read");
        assert!(mirror.observer.dropped().is_empty());
        assert!(mirror.pair.marked_bytes() > 0);
        // Once for what is recent, once for what is not.
        mirror.clean(&mut rng);
        mirror.clean(&mut rng);
        assert_eq!(mirror.pair.marked_bytes(), 0);
        let left = world.after_power_cut(&mut rng);
        let states = left.open(&mut rng, &[0, 1]).unwrap().states();
        assert_eq!(states, [LegState::InSync, LegState::InSync], "what is clean needs no copy");
        assert_equal(&left);
    }
}

#[test]
fn neither_leg_giving_back_storage_changes_nothing() {
    let mut rng = Rng::new(5);
    let mut world = World::new();
    world.legs = world.legs.map(|leg| leg.without_holes());
    let mirror = world.equal(&mut rng);
    assert!(write(&mirror, &mut rng, 0, 4096, 9, How::Write));
    let before = world.legs[0].bytes();
    let this = mirror.clone();
    run(&mut rng, async move {
        this.pair.release(&this.queue, halfsilver::image::ByteOffset(0), 4096).await.unwrap();
    });
    assert!(world.legs[0].bytes() == before && world.legs[1].bytes() == before);
}

#[test]
fn a_leg_that_fails_is_dropped_before_the_write_is_acknowledged_and_comes_back_as_a_full_copy() {
    for (seed, place) in (1..=20u64).flat_map(|seed| [(seed, 0), (seed, 1)]) {
        for op in [Op::Write, Op::Zero, Op::Sync, Op::Read] {
            println!("seed {seed}, leg {place}, {op:?}");
            let mut rng = Rng::new(seed);
            let world = World::new();
            let mirror = world.equal(&mut rng);
            let before = world.legs[0].bytes();
            world.legs[place].fail(op, rng.below(3), libc::EIO);
            // Only the leg that is read can fail so.
            let fails = op != Op::Read || place == 0;
            let mut scheduler = Scheduler::default();
            load(&mut scheduler, &mirror, &mut rng);
            let this = mirror.clone();
            scheduler.spawn(async move {
                for _ in 0..4 {
                    this.read(0, 4096).await.unwrap();
                    this.flush().await.unwrap();
                }
            });
            assert!(scheduler.settle(&mut rng), "it hangs");
            let expected = mirror.oracle.borrow().apply(&before);
            assert!(read(&mirror, &mut rng, 0, SIZE).unwrap() == expected, "the guest must not notice");
            assert_eq!(mirror.observer.dropped(), if fails { vec![leg_id(place)] } else { vec![] });
            assert!(flush(&mirror, &mut rng));
            if !fails {
                continue;
            }
            // The other one has everything, and the next start knows that this one has not.
            let left = world.after_power_cut(&mut rng);
            let mut back = left.open(&mut rng, &[0, 1]).unwrap();
            assert!(matches!(back.states()[place], LegState::Failed(_)));
            assert!(read(&back, &mut rng, 0, SIZE).unwrap() == expected);
            assert!(left.open(&mut rng, &[place]).is_err(), "it cannot be taken for the one that has everything");
            assert!(matches!(attach(&back, &left, &mut rng, place, false), Err(PairError::Refused(_))));
            attach(&back, &left, &mut rng, place, true).unwrap();
            assert_eq!(back.resync(&mut rng).unwrap(), Outcome::Done);
            assert_equal(&left);
            assert!(left.legs[0].bytes() == expected);
            assert_eq!(back.states(), [LegState::InSync, LegState::InSync]);
            back = left.after_power_cut(&mut rng).open(&mut rng, &[0, 1]).unwrap();
            assert_eq!(back.states(), [LegState::InSync, LegState::InSync]);
        }
    }
}

#[test]
fn what_was_acknowledged_after_a_leg_failed_is_never_read_from_that_leg() {
    // The power is cut at the very moment of the acknowledgement.
    for seed in 1..=200 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let world = World::new();
        let mirror = world.equal(&mut rng);
        let place = rng.below(2);
        world.legs[place].fail(Op::Write, 0, libc::EIO);
        assert!(write(&mirror, &mut rng, 8 * SECTOR, 4 * SECTOR, 3, How::Durable));
        let left = world.after_power_cut(&mut rng);
        let back = left.open(&mut rng, &[0, 1]).unwrap();
        assert_eq!(read(&back, &mut rng, 8 * SECTOR, SECTOR).unwrap(), [3; SECTOR]);
    }
}

#[test]
fn when_no_leg_takes_it_the_guest_knows_and_one_leg_stays() {
    for (op, how) in [(Op::Write, How::Write), (Op::Zero, How::Zero), (Op::Sync, How::Write)] {
        let mut rng = Rng::new(1);
        let world = World::new();
        let mirror = world.equal(&mut rng);
        world.legs.iter().for_each(|leg| leg.fail(op, 0, libc::EIO));
        let wrote = write(&mirror, &mut rng, 0, 4096, 1, how);
        assert_eq!(wrote, op == Op::Sync);
        assert!(!(wrote && flush(&mirror, &mut rng)));
        let states = mirror.states();
        assert_eq!(states[0], LegState::InSync);
        assert!(matches!(states[1], LegState::Failed(_)));
    }
    // Both refuse to be read: nobody is dropped, it may be the reader's fault.
    let mut rng = Rng::new(1);
    let world = World::new();
    let mirror = world.equal(&mut rng);
    world.legs.iter().for_each(|leg| leg.fail(Op::Read, 0, libc::EFAULT));
    assert!(read(&mirror, &mut rng, 0, 4096).is_none());
    assert!(mirror.observer.dropped().is_empty());
}

/// A frontend can take its memory away for a moment: that is no fault of a leg, whichever is asked next.
#[test]
fn a_read_that_fails_in_the_guests_memory_drops_nobody() {
    let mut rng = Rng::new(1);
    let world = World::new();
    let mirror = world.equal(&mut rng);
    let expected = world.legs[0].bytes()[..4096].to_vec();
    world.legs[0].fail_once(Op::Read, libc::EFAULT);
    let this = mirror.clone();
    let read = run(&mut rng, async move { this.read_to_guest(0, 4096).await });
    assert_eq!(read.unwrap(), expected);
    assert!(mirror.observer.dropped().is_empty());
    assert_eq!(mirror.states(), [LegState::InSync, LegState::InSync]);
}

#[test]
fn a_leg_that_is_being_copied_is_never_read_and_never_takes_over() {
    for op in [Op::Write, Op::Read, Op::Sync] {
        let mut rng = Rng::new(3);
        let world = World::new();
        let mirror = world.create(&mut rng);
        let before = world.legs[1].read();
        assert!(read(&mirror, &mut rng, 0, SIZE).is_some());
        assert_eq!(world.legs[1].read(), before);
        world.legs[0].fail(op, 0, libc::EIO);
        let went_well = match op {
            Op::Read => read(&mirror, &mut rng, 0, 4096).is_some(),
            Op::Sync => flush(&mirror, &mut rng),
            _ => write(&mirror, &mut rng, 0, 4096, 1, How::Write),
        };
        assert!(!went_well, "{op:?}");
        assert_eq!(mirror.states(), [LegState::InSync, LegState::Resynchronising]);
    }
    // And when it fails itself, the guest goes on and the copy ends.
    for op in [Op::Write, Op::Sync] {
        let mut rng = Rng::new(4);
        let world = World::new();
        let mirror = world.create(&mut rng);
        world.legs[1].fail(op, 0, libc::EIO);
        assert!(mirror.resync(&mut rng).is_err());
        assert_eq!(mirror.observer.dropped(), [leg_id(1)]);
        assert!(write(&mirror, &mut rng, 0, 4096, 1, How::Write) && flush(&mirror, &mut rng));
        assert_eq!(mirror.pair.status()[1].left_bytes, SIZE as u64);
    }
}

#[test]
fn a_write_that_only_the_copy_took_is_copied_over() {
    let mut rng = Rng::new(6);
    let world = World::new();
    let mirror = world.create(&mut rng);
    world.legs[0].fail(Op::Write, 0, libc::ENOSPC);
    assert!(!write(&mirror, &mut rng, REGION + 4096, 4096, 7, How::Write));
    assert_eq!(mirror.resync(&mut rng).unwrap(), Outcome::Done);
    assert_equal(&world);
}

#[test]
fn guests_write_while_the_second_leg_is_copied() {
    for seed in 1..=60 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let world = World::new();
        let mirror = world.create(&mut rng);
        let before = world.legs[0].bytes();
        let mut scheduler = Scheduler::default();
        load(&mut scheduler, &mirror, &mut rng);
        let (this, pace) = (mirror.clone(), Arc::new(Pace::default()));
        let watched = pace.clone();
        scheduler.spawn(async move {
            let done = resync(this.queue.clone(), this.disk.clone(), this.pair.clone(), pace).await;
            assert_eq!(done.unwrap(), Outcome::Done);
        });
        assert!(scheduler.settle(&mut rng), "it hangs");
        assert_equal(&world);
        assert!(world.legs[0].bytes() == mirror.oracle.borrow().apply(&before));
        assert_eq!(mirror.states(), [LegState::InSync, LegState::InSync]);
        assert!(watched.done_bytes.load(Ordering::Relaxed) >= SIZE as u64);
    }
}

#[test]
fn a_leg_is_added_while_guests_write() {
    for (seed, full) in (1..=100).flat_map(|seed| [(seed, true), (seed, false)]) {
        println!("seed {seed}, full {full}");
        let mut rng = Rng::new(seed);
        let world = World::new();
        let mut mirror = world.equal(&mut rng);
        let before = world.legs[0].bytes();
        if full {
            world.legs[1].fail(Op::Sync, 0, libc::EIO);
            assert!(flush(&mirror, &mut rng));
        } else {
            let this = mirror.clone();
            run(&mut rng, async move { this.pair.prepare_split(&this.queue).await.unwrap() });
            mirror = mirror.with_pair(mirror.pair.detached().unwrap());
        }
        let world = World { legs: [world.legs[0].clone(), world.legs[1].after_power_cut(&mut rng)], ..world };
        let mut scheduler = Scheduler::default();
        load(&mut scheduler, &mirror, &mut rng);
        let (this, leg) = (mirror.clone(), world.leg(1));
        scheduler.spawn(async move {
            this.pair.attach(&this.queue, leg, full).await.unwrap();
            let pace = Arc::new(Pace::default());
            resync(this.queue.clone(), this.disk.clone(), this.pair.clone(), pace).await.unwrap();
        });
        for _ in 0..rng.below(40) {
            scheduler.step(&mut rng);
        }
        assert!(scheduler.settle(&mut rng), "it hangs");
        assert_equal(&world);
        assert!(world.legs[0].bytes() == mirror.oracle.borrow().apply(&before));
        assert_eq!(mirror.states(), [LegState::InSync, LegState::InSync]);
    }
}

#[test]
fn a_stopped_copy_goes_on_where_it_was_also_after_a_power_cut() {
    let mut rng = Rng::new(8);
    let world = World::new();
    let mirror = world.create(&mut rng);
    let pace = Arc::new(Pace::default());
    let mut scheduler = Scheduler::default();
    let (this, its) = (mirror.clone(), pace.clone());
    scheduler.spawn(async move {
        let done = resync(this.queue.clone(), this.disk.clone(), this.pair.clone(), its).await;
        assert_eq!(done.unwrap(), Outcome::Stopped);
    });
    // It notices after the next few blocks, which end the first region.
    while pace.done_bytes.load(Ordering::Relaxed) < REGION as u64 - 8 * u64::from(BLOCK) {
        assert!(scheduler.step(&mut rng));
    }
    pace.stop();
    assert!(scheduler.settle(&mut rng), "it hangs");
    assert_eq!(mirror.pair.status()[1].left_bytes, REGION as u64, "the region that is short counts as one");
    assert_eq!(mirror.pair.marked_bytes(), REGION as u64, "what was copied is struck off");
    drop(scheduler);
    let left = world.after_power_cut(&mut rng);
    let back = left.open(&mut rng, &[0, 1]).unwrap();
    assert_eq!(back.states()[1], LegState::Resynchronising);
    assert_eq!(back.resync(&mut rng).unwrap(), Outcome::Done);
    assert_equal(&left);
}

#[test]
fn a_split_leg_stays_as_it_was_and_comes_back_for_what_was_written_since() {
    for seed in 1..=40 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let world = World::new();
        let mirror = world.equal(&mut rng);
        assert!(mirror.pair.detached().is_err(), "not prepared");
        let this = mirror.clone();
        run(&mut rng, async move {
            this.pair.prepare_split(&this.queue).await.unwrap();
            this.pair.cancel_split(&this.queue).await.unwrap();
            assert!(this.pair.detached().is_err(), "taken back");
            this.pair.prepare_split(&this.queue).await.unwrap();
        });
        // Until the cut both are written, and after it by those who began before.
        assert!(write(&mirror, &mut rng, 0, 4096, 1, How::Write));
        let live = mirror.with_pair(mirror.pair.detached().unwrap());
        assert!(mirror.pair.detached().is_err(), "only once");
        let writes = (world.legs[0].written(), world.legs[1].written());
        assert!(write(&mirror, &mut rng, 8192, 4096, 2, How::Write));
        assert_eq!((world.legs[0].written(), world.legs[1].written()), (writes.0 + 4096, writes.1 + 4096));
        assert_equal(&world);
        let frozen = world.legs[1].bytes();
        assert_eq!(live.states(), [LegState::InSync, LegState::Split]);
        let at = if seed % 2 == 0 { 4096 } else { REGION + 4096 };
        assert!(write(&live, &mut rng, at, 4096, 3, How::Write) && flush(&live, &mut rng));
        assert_eq!(live.clean(&mut rng), 0, "bits stay while a leg is split");
        assert_eq!(live.clean(&mut rng), 0, "bits stay while a leg is split");
        assert!(world.legs[1].bytes() == frozen);
        assert_eq!(world.legs[1].bytes()[8192], 2);

        // It comes back, to this process or to the next one.
        let (world, live) = if rng.chance(50) {
            assert!(flush(&mirror, &mut rng));
            let left = world.after_power_cut(&mut rng);
            let back = left.open(&mut rng, &[0]).unwrap();
            (left, back)
        } else {
            (world, live)
        };
        let (read, wrote) = (world.legs[0].read(), world.legs[1].written());
        attach(&live, &world, &mut rng, 1, false).unwrap();
        assert_eq!(live.resync(&mut rng).unwrap(), Outcome::Done);
        assert_equal(&world);
        let copied = if seed % 2 == 0 { REGION } else { SIZE };
        assert_eq!(world.legs[0].read() - read, copied, "only regions that were written are copied");
        assert!(world.legs[1].written() - wrote <= copied);
        assert_eq!(live.states(), [LegState::InSync, LegState::InSync]);
        // And can be split again: those who begin now write both until the next cut.
        let this = live.clone();
        run(&mut rng, async move { this.pair.prepare_split(&this.queue).await.unwrap() });
        let next = live.with_pair(live.pair.detached().unwrap());
        assert!(write(&live, &mut rng, 0, 512, 9, How::Write));
        assert_equal(&world);
        assert!(write(&next, &mut rng, 0, 512, 8, How::Write));
        assert_eq!((world.legs[0].bytes()[0], world.legs[1].bytes()[0]), (8, 9));
    }
}

#[test]
fn a_split_leg_that_fails_is_dropped_and_the_guest_goes_on() {
    let mut rng = Rng::new(2);
    let world = World::new();
    let mirror = world.equal(&mut rng);
    let this = mirror.clone();
    run(&mut rng, async move { this.pair.prepare_split(&this.queue).await.unwrap() });
    let live = mirror.with_pair(mirror.pair.detached().unwrap());
    world.legs[1].fail(Op::Write, 0, libc::ENOSPC);
    assert!(write(&mirror, &mut rng, 0, 4096, 1, How::Write));
    assert_eq!(live.observer.dropped(), [leg_id(1)]);
    assert!(matches!(attach(&live, &world, &mut rng, 1, false), Err(PairError::Refused(_))));
    // The first one never hands over to a leg that was split.
    let world = World::new();
    let mirror = world.equal(&mut rng);
    let this = mirror.clone();
    run(&mut rng, async move { this.pair.prepare_split(&this.queue).await.unwrap() });
    let live = mirror.with_pair(mirror.pair.detached().unwrap());
    world.legs[0].fail(Op::Write, 0, libc::EIO);
    assert!(!write(&mirror, &mut rng, 0, 4096, 1, How::Write));
    assert_eq!(live.states(), [LegState::InSync, LegState::Split]);
    // Forgotten, it costs no bits any more.
    let this = live.clone();
    run(&mut rng, async move { this.pair.forget(&this.queue, leg_id(1)).await.unwrap() });
    assert_eq!(live.states(), [LegState::InSync]);
}

#[test]
fn what_does_not_fit_is_refused_and_what_is_damaged_is_copied() {
    let mut rng = Rng::new(9);
    let world = World::new();
    let mirror = world.equal(&mut rng);
    assert!(matches!(attach(&mirror, &world, &mut rng, 1, true), Err(PairError::Refused(_))), "it has two");
    assert!(write(&mirror, &mut rng, 0, 4096, 1, How::Write) && flush(&mirror, &mut rng));
    assert!(world.open(&mut rng, &[]).is_err());
    // The one that is left takes over, and the other one must be copied in full.
    for place in 0..2 {
        let left = world.after_power_cut(&mut rng);
        let back = left.open(&mut rng, &[place]).unwrap();
        assert!(matches!(back.states()[1 - place], LegState::Failed(_)));
        assert!(write(&back, &mut rng, 0, 4096, 5, How::Durable));
        let again = left.after_power_cut(&mut rng).open(&mut rng, &[0, 1]).unwrap();
        assert_eq!(read(&again, &mut rng, 0, 512).unwrap(), [5; 512]);
    }
    let left = world.after_power_cut(&mut rng);
    left.bitmap.damage(512 + 3);
    let back = left.open(&mut rng, &[0, 1]).unwrap();
    assert_eq!(back.pair.marked_bytes(), SIZE as u64, "a damaged sector may have had any bit");
    assert_eq!(back.resync(&mut rng).unwrap(), Outcome::Done);
    left.bitmap.damage(70);
    let error = left.open(&mut rng, &[0, 1]).err().unwrap().to_string();
    assert!(error.contains("add the other in full"), "{error}");
}

#[test]
fn when_the_bitmap_cannot_be_stored_nothing_is_acknowledged_that_needs_it() {
    let mut rng = Rng::new(10);
    let world = World::new();
    let mirror = world.equal(&mut rng);
    assert!(write(&mirror, &mut rng, 0, 4096, 1, How::Write));
    world.bitmap.fail(Op::Write, 0, libc::EIO);
    assert!(!write(&mirror, &mut rng, REGION, 4096, 2, How::Write), "its region's bit is not stored");
    assert!(write(&mirror, &mut rng, 4096, 4096, 3, How::Write), "this region's bit is");
    assert_equal(&world);
    world.legs[1].fail(Op::Write, 0, libc::EIO);
    assert!(!write(&mirror, &mut rng, 4096, 4096, 4, How::Write), "the next start would read the dropped leg");
    assert!(read(&mirror, &mut rng, 0, 512).is_some());
}

/// A moment without room for the bitmap is the end of what is asked for then, and of nothing else.
#[test]
fn a_refusal_of_the_bitmap_costs_one_request() {
    let mut rng = Rng::new(12);
    let world = World::new();
    let mirror = world.equal(&mut rng);
    world.bitmap.fail(Op::Write, 0, libc::ENOSPC);
    assert!(!write(&mirror, &mut rng, REGION, 4096, 2, How::Write), "the bit of its region is not stored");
    let pair = mirror.pair.clone();
    let queue = mirror.queue.clone();
    assert!(run(&mut rng, async move { pair.prepare_split(&queue).await }).is_err());
    world.bitmap.heal();
    assert!(write(&mirror, &mut rng, REGION, 4096, 3, How::Write));
    assert_equal(&world);
    assert!(mirror.pair.detached().is_err(), "the split was not prepared");
    assert_eq!(mirror.states(), [LegState::InSync, LegState::InSync]);
    // The regions that were written are copied, and it is not split.
    let left = world.after_power_cut(&mut rng);
    assert_eq!(left.open(&mut rng, &[0, 1]).unwrap().states(), [LegState::InSync, LegState::Resynchronising]);
}

#[test]
fn a_leg_that_could_not_be_recorded_is_not_there_and_can_be_added_again() {
    let mut rng = Rng::new(13);
    let world = World::new();
    let (first, bitmap, queue) = (world.leg(0), world.bitmap.clone(), IoQueue::simulated());
    let io = queue.clone();
    let pair =
        run(
            &mut rng,
            async move { Pair::create(first, Arc::new(bitmap), Uuid::from_u128(77), BLOCK, &io).await.unwrap() },
        );
    let mirror = Mirror::new(pair, queue);
    // The bits of all regions are one write, the state of the leg is the next.
    for refused in [0, 1] {
        world.bitmap.fail(Op::Write, refused, libc::ENOSPC);
        assert!(attach(&mirror, &world, &mut rng, 1, true).is_err());
        world.bitmap.heal();
        assert_eq!(mirror.states(), [LegState::InSync]);
        assert!(write(&mirror, &mut rng, 0, 4096, 1, How::Write));
    }
    attach(&mirror, &world, &mut rng, 1, true).unwrap();
    assert_eq!(mirror.resync(&mut rng).unwrap(), Outcome::Done);
    assert_equal(&world);
}

/// A job that has made the legs equal says so, whatever comes of the bitmap afterwards; and when that they are could not be
/// stored, the next try ends well.
#[test]
fn a_synchronisation_ends_as_the_legs_are() {
    for refused in 0..12 {
        let mut rng = Rng::new(14);
        let world = World::new();
        let mirror = world.create(&mut rng);
        world.bitmap.fail(Op::Write, refused, libc::ENOSPC);
        let first = mirror.resync(&mut rng);
        let is_in_sync = mirror.states()[1] == LegState::InSync;
        assert!(first.is_err() || is_in_sync, "{refused}: it says that it is done");
        world.bitmap.heal();
        assert_eq!(mirror.resync(&mut rng).unwrap(), Outcome::Done, "{refused}");
        assert_eq!(mirror.states(), [LegState::InSync, LegState::InSync]);
        assert_equal(&world);
        let left = world.after_power_cut(&mut rng);
        assert_eq!(left.open(&mut rng, &[0, 1]).unwrap().states(), [LegState::InSync, LegState::InSync], "{refused}");
    }
}

#[test]
fn bits_are_shared_and_rarely_stored() {
    let mut rng = Rng::new(11);
    let world = World::new();
    let mirror = world.equal(&mut rng);
    let syncs = world.bitmap.syncs();
    for i in 0..50 {
        assert!(write(&mirror, &mut rng, i * 4096, 4096, 1, How::Write));
    }
    assert_eq!(world.bitmap.syncs() - syncs, 1, "fifty writes to one region");
    let this = mirror.clone();
    run(&mut rng, async move {
        this.pair.announce(&this.queue, halfsilver::image::ByteOffset(REGION as u64), 4096).await.unwrap();
    });
    assert_eq!(world.bitmap.syncs() - syncs, 2);
    assert!(write(&mirror, &mut rng, REGION, 4096, 1, How::Write));
    assert_eq!(world.bitmap.syncs() - syncs, 2, "its bit was stored before it came");
}

/// While it is not durable that a leg is out, a start counts on it: whatever it lacks then must be marked, acknowledged or not.
#[test]
fn what_a_leg_that_is_let_go_lacks_is_marked_or_it_is_out_for_who_starts() {
    let mut found = 0;
    for seed in 1..=200 {
        let mut rng = Rng::new(seed);
        let world = World::new();
        let mirror = world.equal(&mut rng);
        mirror.clean(&mut rng);
        mirror.clean(&mut rng);
        let mut scheduler = Scheduler::default();
        let (letting_go, writing) = (mirror.clone(), mirror.clone());
        scheduler.spawn(async move { letting_go.pair.let_go(&letting_go.queue, leg_id(1)).await.unwrap() });
        scheduler.spawn(async move { writing.write(0, 4096, 7, How::Write).await.unwrap() });
        while scheduler.step(&mut rng) {
            let _aside = set_aside();
            let left = world.after_power_cut(&mut rng);
            let pair = left.open(&mut rng, &[0, 1]).unwrap();
            if pair.states() == [LegState::InSync, LegState::InSync] {
                found += 1;
                assert!(left.legs[0].bytes() == left.legs[1].bytes(), "seed {seed}: legs in sync differ");
            }
        }
    }
    assert!(found > 100, "{found}");
}
