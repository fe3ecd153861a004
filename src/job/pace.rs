//! How fast a job goes, how far it is, and whether it should stop.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use crate::engine::{Disk, Turn};
use crate::image::IoQueue;

/// A job looks this often whether its pace has changed or it should stop.
const PAUSE_SLICE: Duration = Duration::from_millis(50);

/// A job with a limit does this many steps in a second, if its blocks are small enough.
const STEPS_PER_SECOND: u64 = 20;

/// How fast a job goes, how far it is, and whether it should stop. Shared with whoever watches it.
#[derive(Debug, Default)]
pub struct Pace {
    /// The pause after each block, in milliseconds.
    pub delay_ms: AtomicU32,
    /// The most bytes that it does in a second; 0 for as many as it can.
    pub bytes_per_second: AtomicU64,
    stop: AtomicBool,
    /// The job, while it waits for what may hang.
    waits: Mutex<Option<Waker>>,
    /// Bytes done.
    pub done_bytes: AtomicU64,
    /// Bytes to do in all, as far as known.
    pub total_bytes: AtomicU64,
    /// What was done beyond the limit, and when that was known.
    debt: Mutex<Option<(Instant, u64)>>,
}

impl Pace {
    /// Has it stop before the next block.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner).take();
        waits.into_iter().for_each(Waker::wake);
    }

    /// Lets it go on when it begins anew.
    pub fn go_on(&self) {
        self.stop.store(false, Ordering::SeqCst);
    }

    /// Whether it should stop.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Whether it waits for what may hang.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether it was told to go slowly.
    #[must_use]
    pub fn is_slowed(&self) -> bool {
        self.delay_ms.load(Ordering::Relaxed) > 0 || self.bytes_per_second.load(Ordering::Relaxed) > 0
    }

    /// Counts a step of `bytes`, pauses as long as asked for, and says whether to go on.
    pub(super) async fn step(&self, queue: &IoQueue, bytes: u64) -> bool {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
        let (mut paused, mut more) = (Duration::ZERO, bytes);
        loop {
            if self.is_stopped() {
                return false;
            }
            // Looked at anew in each slice: a pause of an hour can be shortened.
            let delay = Duration::from_millis(u64::from(self.delay_ms.load(Ordering::Relaxed)));
            let left = delay.saturating_sub(paused).max(self.owe(std::mem::take(&mut more)));
            if left.is_zero() {
                return true;
            }
            let slice = left.min(PAUSE_SLICE);
            drop(queue.sleep(slice).await);
            paused += slice;
        }
    }

    /// The answer of a future, or None when it is to stop first: what that waits for may hang.
    pub(super) async fn unless_stopped<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        let waits = || self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = poll_fn(|cx| {
            if let Poll::Ready(answer) = future.as_mut().poll(cx) {
                return Poll::Ready(Some(answer));
            }
            *waits() = Some(cx.waker().clone());
            if self.is_stopped() { Poll::Ready(None) } else { Poll::Pending }
        })
        .await;
        // A waker keeps what it wakes, and a pace is remembered longer than its job.
        *waits() = None;
        answer
    }

    /// Adds what was done to what is beyond the limit, and says how long it takes until nothing is.
    fn owe(&self, bytes: u64) -> Duration {
        let mut debt = self.debt.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = self.bytes_per_second.load(Ordering::Relaxed);
        if limit == 0 {
            *debt = None;
            return Duration::ZERO;
        }
        let now = Instant::now();
        let (since, owed) = debt.unwrap_or((now, 0));
        let paid = now.duration_since(since).as_nanos() * u128::from(limit) / 1_000_000_000;
        let owed = owed.saturating_sub(u64::try_from(paid).unwrap_or(u64::MAX)).saturating_add(bytes);
        *debt = Some((now, owed));
        let nanos = u128::from(owed) * 1_000_000_000 / u128::from(limit);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// How many blocks to do at once, of at most `most`: fewer where the pace is to be even.
    fn side_by_side(&self, block_bytes: u64, most: usize) -> usize {
        if self.delay_ms.load(Ordering::Relaxed) > 0 {
            return 1;
        }
        match self.bytes_per_second.load(Ordering::Relaxed) {
            0 => most,
            limit => usize::try_from(limit / STEPS_PER_SECOND / block_bytes).unwrap_or(most).clamp(1, most),
        }
    }

    /// Waits for a turn for a step of at most `most` blocks, one at least.
    pub(super) async fn turn(&self, disk: &Disk, most: usize) -> Turn {
        let block_bytes = u64::from(disk.geometry().block_bytes);
        let most = self.side_by_side(block_bytes, most) as u64;
        disk.background_turn(most * block_bytes, block_bytes).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_limit_is_waited_for() {
        let pace = Pace::default();
        assert_eq!(pace.owe(1 << 40), Duration::ZERO, "without a limit");
        pace.bytes_per_second.store(1000, Ordering::Relaxed);
        let first = pace.owe(2000);
        assert!(first > Duration::from_millis(1900) && first <= Duration::from_secs(2), "{first:?}");
        assert!(pace.owe(1000) > Duration::from_millis(2900));
        pace.bytes_per_second.store(1_000_000_000, Ordering::Relaxed);
        assert!(pace.owe(0) < Duration::from_millis(1), "a new limit is for what is owed too");
        pace.bytes_per_second.store(0, Ordering::Relaxed);
        assert_eq!(pace.owe(0), Duration::ZERO);
    }

    #[test]
    fn a_pace_decides_how_much_is_done_at_once() {
        let pace = Pace::default();
        assert_eq!(pace.side_by_side(4096, 32), 32);
        pace.bytes_per_second.store(4096 * STEPS_PER_SECOND * 5, Ordering::Relaxed);
        assert_eq!((pace.side_by_side(4096, 32), pace.side_by_side(1 << 20, 32)), (5, 1));
        pace.delay_ms.store(1, Ordering::Relaxed);
        assert_eq!(pace.side_by_side(4096, 32), 1);
    }
}
