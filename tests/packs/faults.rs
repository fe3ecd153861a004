//! What a pack makes of a medium that refuses, for a while or for good.

use halfsilver::image::{AlignedBuf, Budget, ByteOffset, GuestBuf, IoBuf};
use halfsilver::store::Believed;

use crate::lives::{filled, tag_of};
use crate::media::{self, Medium, Op, Scheduler};
use crate::one::{BLOCK, One, SECTORS};
use crate::schedule::Rng;

#[test]
fn a_bad_sector_behind_the_newest_header_costs_that_block() {
    for believed in [Believed::Saved, Believed::Arrived, Believed::Synced] {
        let mut one = One::new(16);
        (0..16).for_each(|block| one.write(block, 1, block as u64 + 1).unwrap());
        one.sync().unwrap();
        one.medium.rot((1 + 15 * 2 + 1) * SECTORS);
        one.take_up(one.medium.clone(), believed).unwrap();
        for block in 0..15 {
            assert_eq!(one.tag(block).unwrap(), Some(block as u64 + 1));
        }
        one.tag(15).unwrap_err();
        one.write(15, 1, 77).unwrap();
        assert_eq!(one.tag(15).unwrap(), Some(77));
    }
}

#[test]
fn an_outage_takes_no_room_for_good() {
    // Zeros are writes here: what may have arrived of a header cannot be taken away either.
    let mut one = One::on(16, Medium::without_holes);
    one.write(0, 16, 1).unwrap();
    one.medium.fail(Op::Write, 0, libc::EIO);
    let refused = (0..2000).map(|i| one.write(i % 16, 1, 2).unwrap_err().errno).collect::<Vec<_>>();
    assert!(refused.contains(&Some(libc::EIO)));
    assert!(one.pack.is_in_doubt(), "it must not be saved as it is");
    one.medium.heal();
    for block in 0..16 {
        one.write(block, 1, 3).unwrap();
        assert_eq!(one.tag(block).unwrap(), Some(3));
    }
    one.sync().unwrap();
    assert!(!one.pack.is_in_doubt());
    one.take_up(one.all_that_arrived(), Believed::Saved).unwrap();
    for block in 0..16 {
        assert_eq!(one.tag(block).unwrap(), Some(3));
    }
}

#[test]
fn a_read_that_is_copied_waits_for_no_write_that_waits_for_it() {
    const BLOCKS: usize = 200;
    let mut one = One::new(BLOCKS);
    one.write(0, BLOCKS, 1).unwrap();
    one.opened_directly();
    let budget = Budget::new(64 << 10);
    one.queue.share_copies(budget.clone());
    let (mut scheduler, mut rng) = (Scheduler::default(), Rng::new(1));
    // Writers have all that may be copied at once when a guest reads one sector.
    let share = media::run(&mut rng, async move { budget.take(u64::MAX).await });
    let (owned, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(512));
    // SAFETY: the memory lives as long as the pin, and is only copied from.
    let guest = unsafe { GuestBuf::new(owned.segments(), memory) };
    let (pack, queue) = (one.pack.clone(), one.queue.clone());
    scheduler.spawn(async move {
        let IoBuf::Guest(guest) = pack.read(&queue, ByteOffset(512), IoBuf::Guest(guest)).await.unwrap() else {
            panic!("another buffer")
        };
        assert_eq!(tag_of(&guest.copy_out()), Some(30), "the read came after the writes");
    });
    scheduler.poll();
    let (pack, queue) = (one.pack.clone(), one.queue.clone());
    scheduler.spawn(async move {
        for tag in 2..=30 {
            let buf = IoBuf::Owned(filled(BLOCKS * BLOCK, &[(tag, BLOCKS * BLOCK)]));
            pack.write(&queue, ByteOffset(0), buf, false).await.unwrap();
        }
        drop(share);
    });
    assert!(scheduler.settle(&mut rng), "each waits for the other");
}
