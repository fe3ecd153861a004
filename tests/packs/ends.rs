//! Single ends of a pack's daemon or machine, chosen sector by sector, and what the next start makes of them.

use std::cell::RefCell;
use std::rc::Rc;

use halfsilver::image::{ByteOffset, IoBuf};
use halfsilver::store::{Believed, TableError};

use crate::lives::filled;
use crate::media::{Op, Scheduler};
use crate::one::{BLOCK, One, SECTORS};
use crate::schedule::Rng;

/// The unit of the first header.
const FIRST: usize = 1;

#[test]
fn a_header_that_was_torn_beyond_recognition_is_not_put_together_by_a_second_cut() {
    let mut one = One::new(64);
    // A header of more entries than its first sector has room for, whose place is free again.
    one.write(0, 40, 1).unwrap();
    one.write(0, 40, 2).unwrap();
    one.sync().unwrap();
    // A shorter one comes there. Of it the first sector arrives; behind it the old entries stay.
    one.write(0, 28, 3).unwrap();
    assert!(one.medium.is_unsynced(FIRST * SECTORS));
    let left = one.medium.after_loss(|sector, versions| if sector == FIRST * SECTORS { versions } else { 0 });
    one.take_up(left, Believed::Synced).unwrap();
    // Where it said that blocks are something else is now, and its sequence goes by.
    one.sync().unwrap();
    one.write(50, 1, 4).unwrap();
    let mut zeroed = 0;
    while !one.medium.is_unsynced(FIRST * SECTORS) {
        one.sync().unwrap();
        one.zero(zeroed).unwrap();
        zeroed += 1;
    }
    // Of the next short one in this place all arrives but the first sector.
    let left = one.medium.after_loss(|sector, versions| if sector == FIRST * SECTORS { 0 } else { versions });
    one.take_up(left, Believed::Synced).unwrap();
    assert_eq!(one.tag(50).unwrap(), Some(4));
    for block in 0..40 {
        let expected = if block + 1 < zeroed { 0 } else { 2 };
        let shown = one.tag(block).unwrap();
        assert!(shown == Some(expected) || (shown == Some(0) && block + 1 == zeroed), "block {block} shows {shown:?}");
    }
}

#[test]
fn what_a_failed_sync_took_with_it_is_noticed_after_a_kill() {
    let mut one = One::new(16);
    one.write(0, 8, 1).unwrap();
    one.sync().unwrap();
    one.write(3, 1, 2).unwrap();
    one.write(4, 1, 3).unwrap(); // It says that the one before had arrived.
    one.medium.fail(Op::Sync, 0, libc::EIO);
    one.sync().unwrap_err();
    // The kernel gives up a page that it could not write, and the next reader gets what is on the medium.
    let data = FIRST + 9 + 1;
    assert!(one.medium.is_unsynced(data * SECTORS));
    let lost = data * SECTORS..(data + 1) * SECTORS;
    let left = one.medium.after_loss(|sector, versions| if lost.contains(&sector) { 0 } else { versions });
    let before = left.bytes();
    let refused = one.take_up(left.clone(), Believed::Arrived);
    assert!(matches!(refused, Err(TableError::Damaged { .. })), "{refused:?}");
    assert!(left.bytes() == before, "what is refused is not changed");
    // Nothing is wrong with all the rest.
    one.medium.heal();
    one.take_up(one.all_that_arrived(), Believed::Arrived).unwrap();
    assert_eq!((one.tag(3).unwrap(), one.tag(4).unwrap()), (Some(2), Some(3)));
}

#[test]
fn what_rots_after_a_clean_stop_is_found_and_nothing_is_taken_away() {
    let mut one = One::new(16);
    one.write(0, 8, 1).unwrap();
    one.sync().unwrap();
    one.write(3, 1, 2).unwrap();
    one.sync().unwrap();
    let (header, data) = ((FIRST + 9) * BLOCK, (FIRST + 10) * BLOCK);
    // In the bytes that the newest header names, and in what it says itself.
    for at in [data + 100, header + 70] {
        one.medium.damage(at);
        let before = one.medium.bytes();
        let found = one.examine(&one.medium.clone(), Believed::Saved);
        assert!(matches!(found, Err(TableError::Damaged { .. })), "{found:?}");
        let refused = one.take_up(one.medium.clone(), Believed::Saved);
        assert!(matches!(refused, Err(TableError::Damaged { .. })), "{refused:?}");
        assert!(one.medium.bytes() == before, "what is refused is not changed");
        // After a power cut it may be a write that was torn, and who looks is told how many.
        assert_eq!(one.examine(&one.medium.clone(), Believed::Synced).unwrap().torn, 1);
        one.medium.damage(at);
    }
    assert_eq!(one.examine(&one.medium.clone(), Believed::Saved).unwrap().torn, 0);
    let before = one.medium.bytes();
    one.take_up(one.medium.clone(), Believed::Saved).unwrap();
    assert_eq!((one.tag(2).unwrap(), one.tag(3).unwrap()), (Some(1), Some(2)));
    assert!(one.medium.bytes() == before, "a pack that is as it was saved is not written");
}

#[test]
fn of_two_writes_at_once_the_same_one_is_right_before_and_after_a_kill() {
    let mut overtaken = 0;
    for seed in 0..200 {
        println!("seed {seed}");
        let mut one = One::new(4);
        let (mut rng, ended) = (Rng::new(seed), Rc::new(RefCell::new(Vec::new())));
        let mut scheduler = Scheduler::default();
        for tag in [1, 2] {
            let (pack, queue, ended) = (one.pack.clone(), one.queue.clone(), ended.clone());
            scheduler.spawn(async move {
                let buf = IoBuf::Owned(filled(BLOCK, &[(tag, BLOCK)]));
                pack.write(&queue, ByteOffset(0), buf, false).await.unwrap();
                ended.borrow_mut().push(tag);
            });
            // The first one is on its way: the second one gets a header of its own.
            scheduler.poll();
        }
        assert!(scheduler.settle(&mut rng));
        overtaken += usize::from(*ended.borrow() == [2, 1]);
        let shown = one.tag(0).unwrap();
        one.take_up(one.all_that_arrived(), Believed::Arrived).unwrap();
        assert_eq!(one.tag(0).unwrap(), shown, "a kill has brought another one back");
    }
    assert!(overtaken > 0, "the second one was never done first");
}
