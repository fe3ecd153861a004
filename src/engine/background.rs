//! The guest goes first: what backups and jobs have in flight on a disk is bounded while its guest is at work.
//!
//! What always holds:
//! - While the guest is idle, or there is no limit, a turn is all that is wanted, at once, and is not counted.
//! - While it is active, the turns that are given have at most the window together; or it is one turn alone, so that there
//!   is progress however small the window and however large a block is. Who waits is served in order of arrival.
//! - Who waits, waits for a turn that is held: the drop of each gives all that can be given then. Nobody is left behind.
//! - A holder may hang, with a volume's storage say. After [`STALL`] who waits goes on beside it ([`Background::relieve`]).
//! - No deadlock: a turn is taken before epochs and block locks, but for the ticket of a frozen version's reader, for whose
//!   end no holder of a turn waits. Several are taken from a volume downwards to what it stands on.
//!
//! What is not done here: an even pace over time, which is the limit of a job.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// What background work may have in flight beside an active guest, unless a disk is told otherwise.
pub const WINDOW_BYTES: u64 = 128 << 10;

/// The most bytes of one turn beside an active guest: a longer transfer keeps a guest's small ones waiting behind it.
const PIECE_BYTES_MAX: u64 = 64 << 10;

/// How long a guest without a request in flight still counts as active: one that waits for each `fsync`
/// before it goes on pauses about as long as the disk takes.
const LINGER: Duration = Duration::from_millis(10);

/// Turns that nobody gives back for so long are held by who hangs.
const STALL: Duration = Duration::from_secs(5);

/// One disk's guest, and the turns of those who work in the background.
pub struct Background {
    /// The most bytes in flight beside an active guest; 0 for as many as are wanted.
    window_bytes: AtomicU64,
    /// The guest's queues that have requests in flight.
    ///
    /// This and `left_at_ms` decide how much is asked of the image at once, and nothing about what is read or written: a
    /// look that comes a moment too early or too late gives one turn of the other kind. So each is relaxed, but for one
    /// pair: who sees a queue's end here (acquire) sees when that was (release).
    busy: AtomicU64,
    /// When the last queue ended, in milliseconds since `born`; 0 when that does not matter any more.
    left_at_ms: AtomicU64,
    waited_us: AtomicU64,
    born: Instant,
    turns: Mutex<Turns>,
}

/// The turns that are held and count.
struct InFlight {
    bytes: u64,
    /// When one was last given or given back.
    moved: Instant,
}

struct Turns {
    in_flight: InFlight,
    /// Only while a counted turn is held: looked at and changed under the same lock.
    waiting: VecDeque<Arc<Waiter>>,
}

/// How much is asked for.
#[derive(Clone, Copy)]
struct Wish {
    most: u64,
    least: u64,
}

/// What a turn is given, and how much of it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share {
    bytes: u64,
    counted: u64,
}

struct Waiter {
    wish: Wish,
    state: Mutex<WaiterState>,
}

enum WaiterState {
    Waiting(Option<Waker>),
    Granted(Share),
    GaveUp,
}

/// Leave to have some bytes in flight; dropping it gives them back.
#[must_use = "the bytes are given back when the turn is dropped"]
pub struct Turn {
    bytes: u64,
    /// Only what counts: a disk, or a volume and what it stands on.
    held: Vec<Held>,
}

struct Held {
    background: Arc<Background>,
    counted: u64,
}

/// A queue of the guest. While it is at work its disk's guest is active; it is not when this is dropped.
pub struct GuestQueue {
    background: Arc<Background>,
    at_work: Cell<bool>,
}

impl Default for Background {
    fn default() -> Background {
        Background {
            window_bytes: AtomicU64::new(WINDOW_BYTES),
            busy: AtomicU64::new(0),
            left_at_ms: AtomicU64::new(0),
            waited_us: AtomicU64::new(0),
            born: Instant::now(),
            turns: Mutex::new(Turns {
                in_flight: InFlight { bytes: 0, moved: Instant::now() },
                waiting: VecDeque::new(),
            }),
        }
    }
}

impl Background {
    /// How many bytes may be in flight beside an active guest; 0 for as many as are wanted.
    pub fn set_window(&self, bytes: u64) {
        self.window_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Whether the guest has a request in flight, or had one a moment ago.
    #[must_use]
    pub fn guest_is_active(&self) -> bool {
        if self.busy.load(Ordering::Acquire) > 0 {
            return true;
        }
        let left_at = self.left_at_ms.load(Ordering::Relaxed);
        if left_at == 0 {
            return false;
        }
        if Duration::from_millis(self.ms_of(Instant::now()).saturating_sub(left_at)) < LINGER {
            return true;
        }
        // The next look needs no clock, unless the guest came and left meanwhile.
        self.left_at_ms.compare_exchange(left_at, 0, Ordering::Relaxed, Ordering::Relaxed).ok();
        false
    }

    /// How long background work has waited for the guest, all turns together.
    #[must_use]
    pub fn waited(&self) -> Duration {
        Duration::from_micros(self.waited_us.load(Ordering::Relaxed))
    }

    /// The bytes of the turns that are held and count.
    #[must_use]
    pub fn in_flight_bytes(&self) -> u64 {
        lock(&self.turns).in_flight.bytes
    }

    /// How many wait for a turn.
    #[must_use]
    pub fn waiting(&self) -> usize {
        lock(&self.turns).waiting.len()
    }

    /// A queue of the guest, not yet at work.
    #[must_use]
    pub fn guest_queue(self: &Arc<Self>) -> GuestQueue {
        GuestQueue { background: self.clone(), at_work: Cell::new(false) }
    }

    /// Waits for a turn of up to `most` bytes, and of no less than `least` even if that is more than the window.
    pub async fn turn(self: &Arc<Self>, most: u64, least: u64) -> Turn {
        let mut turn = Turn { bytes: most, held: Vec::new() };
        turn.extend_to(self, least).await;
        turn
    }

    /// The most bytes in flight now, if that is bounded.
    fn window(&self) -> Option<u64> {
        let window = self.window_bytes.load(Ordering::Relaxed);
        (window > 0 && self.guest_is_active()).then_some(window)
    }

    /// Whether there is such a bound.
    pub(super) fn is_bounded(&self) -> bool {
        self.window().is_some()
    }

    async fn share(self: &Arc<Self>, wish: Wish) -> Share {
        let Some(window) = self.window() else { return Share { bytes: wish.most, counted: 0 } };
        let waiter = {
            let mut turns = lock(&self.turns);
            if turns.waiting.is_empty()
                && let Some(share) = turns.in_flight.give(Some(window), wish, Instant::now())
            {
                return share;
            }
            let waiter = Arc::new(Waiter { wish, state: Mutex::new(WaiterState::Waiting(None)) });
            turns.waiting.push_back(waiter.clone());
            waiter
        };
        let since = Instant::now();
        let mut cleanup = GiveUp { background: self, waiter: &waiter, armed: true };
        let share = poll_fn(|cx| poll_waiter(&waiter, cx)).await;
        cleanup.armed = false;
        let waited = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.waited_us.fetch_add(waited, Ordering::Relaxed);
        share
    }

    fn release(&self, counted: u64) {
        let wakers = {
            let mut turns = lock(&self.turns);
            if counted > 0 {
                turns.in_flight = InFlight { bytes: turns.in_flight.bytes - counted, moved: Instant::now() };
            }
            self.grant(&mut turns)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Gives turns to those who wait behind a holder that hangs, or for a guest that has gone. Called now and then.
    pub fn relieve(&self) {
        let wakers = self.grant(&mut lock(&self.turns));
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Gives turns to those at the head of the queue, as far as the window goes.
    fn grant(&self, turns: &mut Turns) -> Vec<Waker> {
        let mut wakers = Vec::new();
        let (window, now) = (self.window(), Instant::now());
        while let Some(first) = turns.waiting.front() {
            let mut waiter = lock(&first.state);
            if !matches!(*waiter, WaiterState::GaveUp) {
                let Some(share) = turns.in_flight.give(window, first.wish, now) else { break };
                if let WaiterState::Waiting(Some(waker)) = std::mem::replace(&mut *waiter, WaiterState::Granted(share))
                {
                    wakers.push(waker);
                }
            }
            drop(waiter);
            turns.waiting.pop_front();
        }
        wakers
    }

    fn ms_of(&self, now: Instant) -> u64 {
        // Never 0, which says that there is none.
        u64::try_from(now.saturating_duration_since(self.born).as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }
}

impl InFlight {
    /// What can be given now; None if one has to wait.
    fn give(&mut self, window: Option<u64>, wish: Wish, now: Instant) -> Option<Share> {
        let share = share_of(window, self.bytes, wish);
        if let Some(Share { counted: counted @ 1.., .. }) = share {
            *self = InFlight { bytes: self.bytes + counted, moved: now };
        }
        let is_stalled = now.saturating_duration_since(self.moved) >= STALL;
        let beside = Share { bytes: wish.most.min(PIECE_BYTES_MAX).max(wish.least), counted: 0 };
        share.or_else(|| is_stalled.then_some(beside))
    }
}

/// What can be given beside so many bytes in flight; None if one has to wait.
fn share_of(window: Option<u64>, in_flight_bytes: u64, wish: Wish) -> Option<Share> {
    let Some(window) = window else { return Some(Share { bytes: wish.most, counted: 0 }) };
    let piece = wish.most.min(PIECE_BYTES_MAX.min(window)).max(wish.least);
    let fits = in_flight_bytes == 0 || in_flight_bytes + piece <= window;
    fits.then_some(Share { bytes: piece, counted: piece })
}

fn poll_waiter(waiter: &Waiter, cx: &mut Context<'_>) -> Poll<Share> {
    let mut state = lock(&waiter.state);
    match &mut *state {
        WaiterState::Granted(share) => Poll::Ready(*share),
        WaiterState::Waiting(waker) => {
            *waker = Some(cx.waker().clone());
            Poll::Pending
        }
        WaiterState::GaveUp => unreachable!("only its own drop gives up"),
    }
}

/// Takes a waiter out of play when its future is dropped while it waits.
struct GiveUp<'a> {
    background: &'a Background,
    waiter: &'a Arc<Waiter>,
    armed: bool,
}

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let before = std::mem::replace(&mut *lock(&self.waiter.state), WaiterState::GaveUp);
        // Others may now be at the head, or fit into what was given.
        self.background.release(match before {
            WaiterState::Granted(share) => share.counted,
            WaiterState::Waiting(_) | WaiterState::GaveUp => 0,
        });
    }
}

impl Turn {
    /// How many bytes may be in flight until it is dropped.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many blocks those are; one at least.
    #[must_use]
    pub fn blocks(&self, block_bytes: u64) -> usize {
        usize::try_from(self.bytes / block_bytes).unwrap_or(usize::MAX).max(1)
    }

    /// Waits for a turn on one more disk, of as many bytes as before or fewer.
    pub(super) async fn extend_to(&mut self, background: &Arc<Background>, least: u64) {
        let share = background.share(Wish { most: self.bytes, least }).await;
        if share.counted > 0 {
            self.held.push(Held { background: background.clone(), counted: share.counted });
        }
        self.bytes = share.bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.background.release(self.counted);
    }
}

impl GuestQueue {
    /// It has a request in flight, and had none.
    pub fn begins(&self) {
        if !self.at_work.replace(true) {
            self.background.busy.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// All its requests are answered, just now.
    pub fn ends(&self, now: Instant) {
        if self.at_work.replace(false) {
            self.background.left_at_ms.store(self.background.ms_of(now), Ordering::Relaxed);
            self.background.busy.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Drop for GuestQueue {
    fn drop(&mut self) {
        self.ends(Instant::now());
    }
}

#[cfg(test)]
#[path = "background_tests.rs"]
mod tests;
