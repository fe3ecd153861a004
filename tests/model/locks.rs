//! The block locks: nobody is let in beside an exclusive holder, and nobody waits for ever.

use std::sync::Arc;

use halfsilver::engine::{BlockLocks, Mode};
use halfsilver::store::{BlockIndex, BlockRange};
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use shuttle::{future::block_on, thread};

use crate::{alone, explore};

const BLOCKS: usize = 3;
const EXCLUSIVE: usize = 1 << 16;

fn one_order() {
    let locks = Arc::new(BlockLocks::new());
    let holders: Arc<[AtomicUsize; BLOCKS]> = Arc::new(std::array::from_fn(|_| AtomicUsize::new(0)));
    let wanted = [
        (0, 2, Mode::Exclusive),
        (1, 3, Mode::Shared),
        (0, 3, Mode::Exclusive),
        (0, 1, Mode::Shared),
        (2, 3, Mode::Exclusive),
    ];
    let threads: Vec<_> = wanted
        .into_iter()
        .map(|(start, end, mode)| {
            let (locks, holders) = (locks.clone(), holders.clone());
            thread::spawn(move || {
                let range = BlockRange { start: BlockIndex(start), end: BlockIndex(end) };
                for _ in 0..2 {
                    let guard = block_on(locks.acquire(range, mode));
                    hold(&holders, range, mode);
                    drop(guard);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Everybody says what they hold, and sees that nobody holds it who must not.
fn hold(holders: &[AtomicUsize; BLOCKS], range: BlockRange, mode: Mode) {
    let mine = if mode == Mode::Exclusive { EXCLUSIVE } else { 1 };
    for block in range.iter() {
        let holder = &holders[usize::try_from(block.0).unwrap()];
        let before = holder.fetch_add(mine, Ordering::SeqCst);
        let alone = if mode == Mode::Exclusive { before == 0 } else { before < EXCLUSIVE };
        assert!(alone, "block {} was held by {before:#x} when taken {mode:?}", block.0);
    }
    thread::yield_now();
    for block in range.iter() {
        holders[usize::try_from(block.0).unwrap()].fetch_sub(mine, Ordering::SeqCst);
    }
}

/// Two jobs that take the same run if they can, or else each of its blocks, beside guests.
fn jobs_and_guests() {
    let locks = Arc::new(BlockLocks::new());
    let holders: Arc<[AtomicUsize; BLOCKS]> = Arc::new(std::array::from_fn(|_| AtomicUsize::new(0)));
    let run = |start, end| BlockRange { start: BlockIndex(start), end: BlockIndex(end) };
    let threads: Vec<_> = [None, None, Some((run(1, 2), Mode::Shared)), Some((run(0, 2), Mode::Exclusive))]
        .into_iter()
        .map(|guest| {
            let (locks, holders) = (locks.clone(), holders.clone());
            thread::spawn(move || match guest {
                Some((range, mode)) => {
                    let guard = block_on(locks.acquire(range, mode));
                    hold(&holders, range, mode);
                    drop(guard);
                }
                None => match locks.try_exclusive(run(0, 3)) {
                    Some(guard) => {
                        hold(&holders, run(0, 3), Mode::Exclusive);
                        drop(guard);
                    }
                    None => run(0, 3).iter().map(BlockRange::one).for_each(|one| {
                        let guard = block_on(locks.acquire(one, Mode::Exclusive));
                        hold(&holders, one, Mode::Exclusive);
                        drop(guard);
                    }),
                },
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn runs_are_taken_whole_or_block_by_block_and_nobody_waits_for_ever() {
    let _alone = alone();
    explore(3000, jobs_and_guests);
}

#[test]
fn block_locks_exclude_and_let_everybody_through() {
    let _alone = alone();
    explore(3000, one_order);
}
