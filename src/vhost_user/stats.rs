//! Counters of what guests did, without a lock on the data path.
//!
//! What always holds: counters belong to the server and outlive its connections, so they never go backwards; each
//! queue has counters of its own, which one worker of each frontend writes. A snapshot is not one instant: a request that
//! completes meanwhile may be in one number and not yet in another.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// What a request does, as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Write-zeroes requests.
    WriteZeroes,
}

impl Direction {
    /// All, in the order of [`QueueStats::directions`].
    pub const ALL: [Direction; 5] =
        [Direction::Read, Direction::Write, Direction::Flush, Direction::Discard, Direction::WriteZeroes];

    /// The name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Direction::Read => "read",
            Direction::Write => "write",
            Direction::Flush => "flush",
            Direction::Discard => "discard",
            Direction::WriteZeroes => "write_zeroes",
        }
    }
}

/// Buckets of the latency histogram: bucket `i` counts requests of at most 2^i microseconds (1 us … 16 s), and the
/// last one those that took longer.
pub const LATENCY_BUCKETS: usize = 26;

/// The upper bound of a bucket; none for the last.
#[must_use]
pub fn bucket_bound(bucket: usize) -> Option<Duration> {
    (bucket + 1 < LATENCY_BUCKETS).then(|| Duration::from_micros(1 << bucket))
}

fn bucket_of(latency_us: u64) -> usize {
    let bucket = if latency_us <= 1 { 0 } else { (latency_us - 1).ilog2() as usize + 1 };
    bucket.min(LATENCY_BUCKETS - 1)
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    latency_us_sum: AtomicU64,
    latency_us_max: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS],
}

/// One queue's counters.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct QueueCounters {
    directions: [Counters; Direction::ALL.len()],
}

impl QueueCounters {
    /// Counts one finished request.
    pub(super) fn record(&self, direction: Direction, bytes: u64, ok: bool, latency: Duration) {
        let c = &self.directions[direction as usize];
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        c.requests.fetch_add(1, Ordering::Relaxed);
        if ok {
            c.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            c.errors.fetch_add(1, Ordering::Relaxed);
        }
        c.latency_us_sum.fetch_add(latency_us, Ordering::Relaxed);
        c.latency_us_max.fetch_max(latency_us, Ordering::Relaxed);
        c.latency[bucket_of(latency_us)].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds this queue's numbers to `total`.
    pub(super) fn add_to(&self, total: &mut QueueStats) {
        for (from, to) in self.directions.iter().zip(&mut total.directions) {
            to.requests += from.requests.load(Ordering::Relaxed);
            to.bytes += from.bytes.load(Ordering::Relaxed);
            to.errors += from.errors.load(Ordering::Relaxed);
            to.latency_sum += Duration::from_micros(from.latency_us_sum.load(Ordering::Relaxed));
            to.latency_max = to.latency_max.max(Duration::from_micros(from.latency_us_max.load(Ordering::Relaxed)));
            for (f, t) in from.latency.iter().zip(&mut to.latency) {
                *t += f.load(Ordering::Relaxed);
            }
        }
    }
}

/// The numbers of one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectionStats {
    /// Finished requests, failed ones included.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Failed requests.
    pub errors: u64,
    /// The sum of all latencies, from taking the request off the ring to putting the answer on it.
    pub latency_sum: Duration,
    /// The longest.
    pub latency_max: Duration,
    /// Requests per bucket, not cumulative; bounds by [`bucket_bound`].
    pub latency: [u64; LATENCY_BUCKETS],
}

/// The numbers of a queue, or of several together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// In the order of [`Direction::ALL`].
    pub directions: [DirectionStats; Direction::ALL.len()],
}

impl QueueStats {
    /// One direction's numbers.
    #[must_use]
    pub fn of(&self, direction: Direction) -> &DirectionStats {
        &self.directions[direction as usize]
    }
}

/// What has come of a connection's rings.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) is_kicked: AtomicBool,
    pub(super) is_taken: AtomicBool,
}

impl Traffic {
    /// Whether there were kicks, and nothing was ever announced.
    pub(super) fn is_one_sided(&self) -> bool {
        self.is_kicked.load(Ordering::Acquire) && !self.is_taken.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_microseconds() {
        for (us, bucket) in [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1 << 24, 24), ((1 << 24) + 1, 25)] {
            assert_eq!(bucket_of(us), bucket, "{us} us");
        }
        assert_eq!(bucket_of(u64::MAX), LATENCY_BUCKETS - 1);
        assert_eq!(bucket_bound(24), Some(Duration::from_micros(1 << 24)));
        assert_eq!(bucket_bound(25), None);
    }
}
