//! Block locks, in memory, outside all images (sources 002 [0053], [0054], [0104]; figures 20 and 27).
//!
//! Ordinary writes of a block share its lock. Whatever copies, fills, hands over or writes to more than one
//! place excludes. Waiting suspends the request's future, never the thread, and is served in order of arrival.
//!
//! What always holds:
//! - A request takes all its slots in ascending order before it does anything, and takes no more: no deadlock.
//! - Blocks that lie `SLOTS` apart share a slot. That can make a request wait needlessly, never wrongly go ahead.
//! - Slots of neighbours lie in one word, and are taken in one step if all of them are free, else one after the other.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::ops::Range;
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

// A slot is eight bits: one holds it alone, somebody waits for it, or how many share it. Who would be one too many waits.
const EXCLUSIVE: u64 = 1 << 7;
const QUEUED: u64 = 1 << 6;
const SHARERS: u64 = QUEUED - 1;

/// Slots of a word.
const SLOTS_PER_WORD: usize = 8;

/// Slots of a table; a power of two, several times the blocks that can be in flight at once.
const SLOTS: usize = 1 << 14;
const SHARDS: usize = 16;

/// The most blocks that one guard may hold. Longer requests go in parts.
pub const BLOCKS_PER_GUARD_MAX: u64 = SLOTS as u64;

struct Waiter {
    mode: Mode,
    state: Mutex<WaiterState>,
}

enum WaiterState {
    Waiting(Option<Waker>),
    Granted,
    GaveUp,
}

/// Neighbouring slots of one word.
#[derive(Clone, Copy)]
struct Slots {
    first: usize,
    count: usize,
}

/// The locks of one disk's blocks.
pub struct BlockLocks {
    // `SLOTS_PER_WORD` slots in each.
    words: Box<[AtomicU64]>,
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
            words: (0..SLOTS / SLOTS_PER_WORD).map(|_| AtomicU64::new(0)).collect(),
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
        for slots in words_of(range) {
            if self.try_acquire(slots, mode) {
                guard.held += slots.count;
                continue;
            }
            for slot in slots.each() {
                if !self.try_acquire(Slots::one(slot), mode) {
                    self.wait(slot, mode).await;
                }
                guard.held += 1;
            }
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
        for slots in words_of(range) {
            if !self.try_acquire(slots, Mode::Exclusive) {
                return None; // What is held already is given back.
            }
            guard.held += slots.count;
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

    /// Takes all of the slots, or none.
    fn try_acquire(&self, slots: Slots, mode: Mode) -> bool {
        let word = self.word_of(slots.first);
        let mut state = word.load(Ordering::Relaxed);
        loop {
            let Some(next) = acquired(state, slots, mode, QUEUED) else { return false };
            match word.compare_exchange_weak(state, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }

    fn word_of(&self, slot: usize) -> &AtomicU64 {
        &self.words[slot / SLOTS_PER_WORD]
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
        let (word, one) = (self.word_of(slot), Slots::one(slot));
        let mut state = word.load(Ordering::SeqCst);
        loop {
            // With nobody queued the QUEUED bit is ours to set; with somebody queued we go behind them.
            let next = if queue.is_empty() { acquired(state, one, mode, 0) } else { None };
            let wanted = next.unwrap_or(state | one.all(QUEUED));
            match word.compare_exchange(state, wanted, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) if next.is_some() => {
                    shard.remove(&slot); // Nobody is queued.
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

    fn release(&self, slots: Slots, mode: Mode) {
        let word = self.word_of(slots.first);
        let before = match mode {
            Mode::Shared => word.fetch_sub(slots.all(1), Ordering::SeqCst),
            Mode::Exclusive => word.fetch_and(!slots.all(EXCLUSIVE), Ordering::SeqCst),
        };
        if before & slots.all(QUEUED) != 0 {
            slots.each().filter(|&slot| before & Slots::one(slot).all(QUEUED) != 0).for_each(|slot| self.grant(slot));
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
                self.word_of(slot).fetch_and(!Slots::one(slot).all(QUEUED), Ordering::SeqCst);
            }
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    fn take_for_waiter(&self, slot: usize, mode: Mode) -> bool {
        let word = self.word_of(slot);
        let mut state = word.load(Ordering::SeqCst);
        loop {
            let Some(next) = acquired(state, Slots::one(slot), mode, 0) else { return false };
            match word.compare_exchange(state, next, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }
}

impl Slots {
    fn one(slot: usize) -> Slots {
        Slots { first: slot, count: 1 }
    }

    fn each(self) -> Range<usize> {
        self.first..self.first + self.count
    }

    /// The bits of a slot for each of these in their word.
    fn all(self, bits: u64) -> u64 {
        const ONES: u64 = u64::MAX / 0xff;
        (bits * (ONES >> (8 * (SLOTS_PER_WORD - self.count)))) << (8 * (self.first % SLOTS_PER_WORD))
    }
}

/// The state of a word after taking some of its slots, or None if one cannot be taken. `barred_by` are bits that bar newcomers.
fn acquired(state: u64, slots: Slots, mode: Mode, barred_by: u64) -> Option<u64> {
    if state & slots.all(EXCLUSIVE | barred_by) != 0 {
        return None;
    }
    let sharers = state & slots.all(SHARERS);
    match mode {
        // A count that is full would grow into the bit above it.
        Mode::Shared => ((sharers + slots.all(1)) & slots.all(QUEUED) == 0).then_some(state + slots.all(1)),
        Mode::Exclusive => (sharers == 0).then_some(state | slots.all(EXCLUSIVE)),
    }
}

/// The slots of a run of blocks, each once, in ascending order.
fn slots_of(range: BlockRange) -> impl Iterator<Item = usize> {
    words_of(range).flat_map(Slots::each)
}

/// The same, those of a word together.
fn words_of(range: BlockRange) -> impl Iterator<Item = Slots> {
    let slot = |b: BlockIndex| usize::try_from(b.0 % SLOTS as u64).expect("less than SLOTS");
    let count = usize::try_from(range.count()).expect("bounded").min(SLOTS);
    let first = slot(range.start);
    let wrapped = (first + count).saturating_sub(SLOTS);
    let words = |slots: Range<usize>| {
        let mut first = slots.start;
        std::iter::from_fn(move || {
            let count = (SLOTS_PER_WORD - first % SLOTS_PER_WORD).min(slots.end - first);
            let found = (count > 0).then_some(Slots { first, count });
            first += count;
            found
        })
    };
    words(0..wrapped).chain(words(first..(first + count).min(SLOTS)))
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
            self.locks.release(Slots::one(self.slot), self.waiter.mode);
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
        let mut left = self.held;
        for slots in words_of(self.range) {
            if left == 0 {
                return;
            }
            let held = Slots { count: slots.count.min(left), ..slots };
            self.locks.release(held, self.mode);
            left -= held.count;
        }
    }
}
