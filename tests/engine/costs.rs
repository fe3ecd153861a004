//! What requests and jobs cost, in counts that no busy machine changes: operations on images.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use halfsilver::engine::{BlockLocks, Mode, Request, RestoreSource};
use halfsilver::image::{ByteOffset, OpKind};
use halfsilver::job;
use halfsilver::store::{BlockIndex, BlockRange};

use crate::bench::{BLOCK, Bench, block, write_of};

const BLOCKS: usize = 32;

fn bench() -> Bench {
    Bench::with_blocks(u32::try_from(BLOCK).unwrap(), BLOCKS)
}

fn discard_all(bench: &Bench) {
    let len = bench.disk.geometry().size_bytes;
    bench.request(&bench.ticket(), Request::Discard { at: ByteOffset(0), len }).unwrap();
}

#[test]
fn a_discard_of_what_takes_no_room_asks_for_nothing() {
    let bench = bench();
    discard_all(&bench);
    assert_eq!(bench.live.zeroes(), 0);
    bench.write(&bench.ticket(), block(BLOCKS - 2), 1);
    discard_all(&bench);
    assert_eq!((bench.live.zeroes(), bench.live.sectors_in_use()), (1, 0));
    let (cut, _) = bench.cut();
    discard_all(&bench);
    assert_eq!(bench.disk.discards().count(), 0, "there is nothing to remember either");
    bench.write(&bench.ticket(), block(1), 1);
    assert!(bench.frozen(&cut.frozen[0]).unwrap().iter().all(|&b| b == 0));
}

#[test]
fn discards_that_were_put_off_go_with_their_neighbours() {
    let bench = bench();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, _) = bench.cut();
    discard_all(&bench);
    assert_eq!(bench.disk.discards().count(), BLOCKS as u64);
    bench.write(&bench.ticket(), block(9), 2);
    bench.retire(&cut.frozen[0]);
    let (queue, disk) = (bench.queue.clone(), bench.disk.clone());
    bench.run(async move { job::carry_out_discards(queue, disk, std::sync::Arc::default()).await.unwrap() });
    assert_eq!((bench.disk.discards().count(), bench.live.sectors_in_use()), (0, BLOCK / 512));
    assert!(bench.live.zeroes() <= BLOCKS / 2, "{} times for {BLOCKS} blocks", bench.live.zeroes());
    assert_eq!(bench.read(&bench.ticket(), block(9)), [2; 8]);
}

#[test]
fn places_of_a_log_are_given_back_with_their_neighbours() {
    let bench = bench();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    bench.cut_to_durable_log();
    let old = bench.ticket();
    let (_, log, _) = bench.cut_to_log_with_table();
    bench.write(&bench.ticket(), 0..bench.sectors(), 2);
    bench.write(&old, 0..bench.sectors(), 3);
    bench.write(&bench.ticket(), block(9), 4);
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    assert_eq!(log.sectors_in_use(), BLOCK / 512);
    assert!(log.zeroes() <= BLOCKS / 2, "{} times for {BLOCKS} blocks", log.zeroes());
    assert_eq!(bench.read(&bench.ticket(), block(9)), [4; 8]);
}

#[test]
fn a_durable_write_to_a_log_is_stored_once() {
    let bench = bench();
    let (_, log, durable) = bench.cut_to_log_with_table();
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    let costs = [block(1), block(1)].map(|sectors| {
        let before = [log.syncs(), durable.syncs()];
        let mut write = write_of(sectors, 2);
        if let Request::Write { durable, .. } = &mut write {
            *durable = true;
        }
        log.hold(Some(OpKind::Write { durable: true }));
        bench.request(&bench.ticket(), write).unwrap();
        [log.syncs() - before[0], durable.syncs() - before[1]]
    });
    assert_eq!(
        costs,
        [[1, 1], [1, 0]],
        "syncs of the log and of its table: for a block that it gets, and for one that it has"
    );
    assert_eq!(bench.entries_of(&durable), [1]);
}

#[test]
fn what_a_restore_found_before_costs_nothing_at_the_gate() {
    let bench = bench();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, _) = bench.cut();
    cut.frozen[0].set_quiesced();
    bench.write(&bench.ticket(), block(3), 2);
    let (pending, stored) = bench.durable_table();
    let source = RestoreSource::Own(cut.frozen[0].id);
    let find = || bench.disk.find_differences(&source, pending.table()).unwrap();
    find();
    assert!(pending.needs_commit());
    let pending = std::rc::Rc::new(pending);
    let commit = || {
        let (pending, queue) = (pending.clone(), bench.queue.clone());
        bench.run(async move { pending.commit(&queue).await.unwrap() });
    };
    commit();
    let writes = stored.transfers().1;
    bench.disk.find_differences(&source, pending.table()).unwrap();
    commit();
    assert_eq!(stored.transfers().1, writes, "nothing is new");
    bench.write(&bench.ticket(), block(4), 2);
    bench.disk.find_differences(&source, pending.table()).unwrap();
    commit();
    assert_eq!((stored.transfers().1, bench.entries_of(&stored)), (writes + 1, vec![3, 4]));
}

fn at_once<T>(future: impl Future<Output = T>) -> T {
    match poll(pin!(future)) {
        Poll::Ready(answer) => answer,
        Poll::Pending => panic!("it waits"),
    }
}

fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Neighbours share a word of locks: a count that is full makes one wait, and does not reach the next block's.
#[test]
fn more_sharers_than_a_lock_counts_wait_and_their_neighbours_do_not() {
    let locks = BlockLocks::new();
    let run = |start, end| BlockRange { start: BlockIndex(start), end: BlockIndex(end) };
    let mut held: Vec<_> = (0..63).map(|_| at_once(locks.acquire(run(6, 9), Mode::Shared))).collect();
    let mut next = pin!(locks.acquire(run(7, 8), Mode::Shared));
    assert!(poll(next.as_mut()).is_pending());
    for beside in [run(4, 6), run(9, 11)] {
        drop(at_once(locks.acquire(beside, Mode::Exclusive)));
        drop(at_once(locks.acquire(beside, Mode::Shared)));
    }
    assert!([6, 7, 8].iter().all(|&at| locks.try_exclusive(run(at, at + 1)).is_none()));
    held.pop();
    let Poll::Ready(last) = poll(next.as_mut()) else { panic!("it still waits") };
    held.clear();
    assert!(locks.try_exclusive(run(7, 8)).is_none() && locks.try_exclusive(run(6, 7)).is_some());
    drop(last);
    assert!(locks.try_exclusive(run(5, 8)).is_some());
}
