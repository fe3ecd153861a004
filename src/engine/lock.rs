//! Block locks, in memory, outside all images (sources 002 [0053], [0054], [0104]; figures 20 and 27).
//!
//! Ordinary writes of a block share its lock. Whatever copies, fills, hands over or writes to more than one
//! place excludes. Waiting suspends the request's future, never the thread, and is served in order of arrival.
//!
//! What always holds:
//! - A request takes all its slots in ascending order before it does anything, and takes no more: no deadlock.
//! - Blocks that lie `SLOTS` apart share a slot. That can make a request wait needlessly, never wrongly go ahead.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::store::{BlockIndex, BlockRange};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// How a lock is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// With others that share.
    Shared,
    /// Alone.
    Exclusive,
}

const EXCLUSIVE: u64 = 1 << 63;
const QUEUED: u64 = 1 << 62;
const SHARERS: u64 = QUEUED - 1;

/// Slots of a table; a power of two, several times the blocks that can be in flight at once.
const SLOTS: usize = 1 << 14;
const SHARDS: usize = 16;

/// The most blocks that one guard may hold. Longer requests go in parts.
pub const BLOCKS_PER_GUARD_MAX: u64 = 1024;

const _: () = assert!(BLOCKS_PER_GUARD_MAX <= SLOTS as u64);

struct Waiter {
    mode: Mode,
    state: Mutex<WaiterState>,
}

enum WaiterState {
    Waiting(Option<Waker>),
    Granted,
    GaveUp,
}

/// The locks of one disk's blocks.
pub struct BlockLocks {
    slots: Box<[AtomicU64]>,
    // How often an entry of some block of the slot was deleted.
    generations: Box<[AtomicU64]>,
    waiting: [Mutex<HashMap<usize, VecDeque<Arc<Waiter>>>>; SHARDS],
}

/// Held locks of a run of blocks; dropping releases them.
#[must_use = "the locks are released when the guard is dropped"]
pub struct BlockGuard<'a> {
    locks: &'a BlockLocks,
    range: BlockRange,
    held: usize,
    mode: Mode,
}

impl Default for BlockLocks {
    fn default() -> BlockLocks {
        BlockLocks::new()
    }
}

impl BlockLocks {
    /// Locks of which none is held.
    #[must_use]
    pub fn new() -> BlockLocks {
        BlockLocks {
            slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            generations: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            waiting: std::array::from_fn(|_| Mutex::new(HashMap::new())),
        }
    }

    /// Takes the locks of `range`.
    ///
    /// # Panics
    /// When the range has more than [`BLOCKS_PER_GUARD_MAX`] blocks.
    pub async fn acquire(&self, range: BlockRange, mode: Mode) -> BlockGuard<'_> {
        assert!(range.count() <= BLOCKS_PER_GUARD_MAX, "{} blocks in one guard", range.count());
        let mut guard = BlockGuard { locks: self, range, held: 0, mode };
        for slot in slots_of(range) {
            if !self.try_acquire(slot, mode) {
                self.wait(slot, mode).await;
            }
            guard.held += 1;
        }
        guard
    }

    /// Locks the blocks of `range` for one holder alone, if nobody holds or wants any of them.
    ///
    /// # Panics
    /// As [`BlockLocks::acquire`].
    #[must_use]
    pub fn try_exclusive(&self, range: BlockRange) -> Option<BlockGuard<'_>> {
        assert!(range.count() <= BLOCKS_PER_GUARD_MAX, "{} blocks in one guard", range.count());
        let mut guard = BlockGuard { locks: self, range, held: 0, mode: Mode::Exclusive };
        for slot in slots_of(range) {
            if !self.try_acquire(slot, Mode::Exclusive) {
                return None; // What is held already is given back.
            }
            guard.held += 1;
        }
        Some(guard)
    }

    /// Changes whenever an entry of some block of the range was deleted: a reader that finds the same owner twice has
    /// read the owner's bytes only if nothing was deleted in between, for a new entry may have followed.
    #[must_use]
    pub fn generation(&self, range: BlockRange) -> u64 {
        // Each only grows, so the sum stays the same only if all do.
        slots_of(range).map(|slot| self.generations[slot].load(Ordering::SeqCst)).fold(0, u64::wrapping_add)
    }

    /// Announces that entries of these blocks were deleted. Comes before their places are given back.
    pub fn advance_generation(&self, range: BlockRange) {
        for slot in slots_of(range) {
            self.generations[slot].fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits until everybody who holds a lock of a disk of so many blocks now has let it go. Holds each for no time.
    pub(super) async fn passed(&self, blocks: u64) {
        for slot in 0..blocks.min(SLOTS as u64) {
            drop(self.acquire(BlockRange::one(BlockIndex(slot)), Mode::Exclusive).await);
        }
    }

    fn try_acquire(&self, slot: usize, mode: Mode) -> bool {
        let mut state = self.slots[slot].load(Ordering::Relaxed);
        loop {
            let Some(next) = acquired(state, mode, QUEUED) else { return false };
            match self.slots[slot].compare_exchange_weak(state, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }

    async fn wait(&self, slot: usize, mode: Mode) {
        let Some(waiter) = self.enqueue(slot, mode) else { return };
        let mut cleanup = GiveUp { locks: self, slot, waiter: &waiter, armed: true };
        poll_fn(|cx| poll_waiter(&waiter, cx)).await;
        cleanup.armed = false;
    }

    /// Queues up for the slot, or takes it after all.
    fn enqueue(&self, slot: usize, mode: Mode) -> Option<Arc<Waiter>> {
        let mut shard = lock(&self.waiting[slot % SHARDS]);
        let queue = shard.entry(slot).or_default();
        let mut state = self.slots[slot].load(Ordering::SeqCst);
        loop {
            // With nobody queued the QUEUED bit is ours to set; with somebody queued we go behind them.
            let next = if queue.is_empty() { acquired(state, mode, 0) } else { None };
            let wanted = next.unwrap_or(state | QUEUED);
            match self.slots[slot].compare_exchange(state, wanted, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) if next.is_some() => {
                    if queue.is_empty() {
                        shard.remove(&slot);
                    }
                    return None;
                }
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        let waiter = Arc::new(Waiter { mode, state: Mutex::new(WaiterState::Waiting(None)) });
        queue.push_back(waiter.clone());
        Some(waiter)
    }

    fn release(&self, slot: usize, mode: Mode) {
        let before = match mode {
            Mode::Shared => self.slots[slot].fetch_sub(1, Ordering::SeqCst),
            Mode::Exclusive => self.slots[slot].fetch_and(!EXCLUSIVE, Ordering::SeqCst),
        };
        if before & QUEUED != 0 {
            self.grant(slot);
        }
    }

    /// Hands the slot to those at the head of its queue, as far as they go together.
    fn grant(&self, slot: usize) {
        let mut wakers = Vec::new();
        {
            let mut shard = lock(&self.waiting[slot % SHARDS]);
            let Some(queue) = shard.get_mut(&slot) else { return };
            while let Some(first) = queue.front() {
                let mut waiter = lock(&first.state);
                if !matches!(*waiter, WaiterState::GaveUp) {
                    if !self.take_for_waiter(slot, first.mode) {
                        break;
                    }
                    if let WaiterState::Waiting(Some(waker)) = std::mem::replace(&mut *waiter, WaiterState::Granted) {
                        wakers.push(waker);
                    }
                }
                drop(waiter);
                queue.pop_front();
            }
            if queue.is_empty() {
                shard.remove(&slot);
                self.slots[slot].fetch_and(!QUEUED, Ordering::SeqCst);
            }
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    fn take_for_waiter(&self, slot: usize, mode: Mode) -> bool {
        let mut state = self.slots[slot].load(Ordering::SeqCst);
        loop {
            let Some(next) = acquired(state, mode, 0) else { return false };
            match self.slots[slot].compare_exchange(state, next, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }
}

/// The state after taking the lock, or None if it cannot be taken. `barred_by` are bits that bar newcomers.
fn acquired(state: u64, mode: Mode, barred_by: u64) -> Option<u64> {
    if state & (EXCLUSIVE | barred_by) != 0 {
        return None;
    }
    match mode {
        Mode::Shared => Some(state + 1),
        Mode::Exclusive => (state & SHARERS == 0).then_some(state | EXCLUSIVE),
    }
}

/// The slots of a run of blocks, each once, in ascending order.
fn slots_of(range: BlockRange) -> impl Iterator<Item = usize> {
    let slot = |b: BlockIndex| usize::try_from(b.0 % SLOTS as u64).expect("less than SLOTS");
    let count = usize::try_from(range.count()).expect("bounded").min(SLOTS);
    let first = slot(range.start);
    let wrapped = (first + count).saturating_sub(SLOTS);
    (0..wrapped).chain(first..(first + count).min(SLOTS))
}

fn poll_waiter(waiter: &Waiter, cx: &mut Context<'_>) -> Poll<()> {
    let mut state = lock(&waiter.state);
    match &mut *state {
        WaiterState::Granted => Poll::Ready(()),
        WaiterState::Waiting(waker) => {
            *waker = Some(cx.waker().clone());
            Poll::Pending
        }
        WaiterState::GaveUp => unreachable!("only its own drop gives up"),
    }
}

/// Takes a waiter out of play when its future is dropped while it waits.
struct GiveUp<'a> {
    locks: &'a BlockLocks,
    slot: usize,
    waiter: &'a Arc<Waiter>,
    armed: bool,
}

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let before = std::mem::replace(&mut *lock(&self.waiter.state), WaiterState::GaveUp);
        if matches!(before, WaiterState::Granted) {
            self.locks.release(self.slot, self.waiter.mode);
        } else {
            // Others may now be at the head.
            self.locks.grant(self.slot);
        }
    }
}

impl BlockGuard<'_> {
    /// How the locks are held.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }
}

impl Drop for BlockGuard<'_> {
    fn drop(&mut self) {
        for slot in slots_of(self.range).take(self.held) {
            self.locks.release(slot, self.mode);
        }
    }
}
