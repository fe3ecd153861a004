//! The load: a closed loop at a given depth on each queue, one thread a queue, and what it measures.
//!
//! Offsets come from a seed: in one round every backend is asked for the same blocks in the same order.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::lane::{Connection, Lane, Op};
use crate::random::Rng;
use crate::{Result, stop};

/// Where requests go.
#[derive(Clone)]
pub(crate) enum Pattern {
    /// Anywhere, uniformly.
    Random,
    /// One after the other; each queue has its own part of the disk.
    Sequential,
    /// Each of these blocks once, in this order, dealt to the queues in turn. The round ends when they are used up.
    Once(Arc<Vec<u64>>),
}

/// One kind of load.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) op: Op,
    pub(crate) bytes: usize,
    /// Requests in flight on each queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    pub(crate) pattern: Pattern,
    /// How long new requests are sent.
    pub(crate) duration: Duration,
    /// Ends it earlier when it becomes true.
    pub(crate) until: Option<Arc<AtomicBool>>,
    /// Whether the moment and latency of every single request is kept.
    pub(crate) trace: bool,
}

impl Load {
    /// A load on one queue that goes anywhere.
    pub(crate) fn random(op: Op, depth: usize, duration: Duration) -> Load {
        let (bytes, queues, pattern) = (4096, 1, Pattern::Random);
        Load { op, bytes, depth, queues, pattern, duration, until: None, trace: false }
    }

    fn is_over(&self, at: Duration) -> bool {
        at > self.duration || self.until.as_ref().is_some_and(|until| until.load(Relaxed)) || stop::asked()
    }
}

/// What a round showed.
pub(crate) struct Measured {
    /// Requests answered before the time was over.
    pub(crate) in_time: u64,
    /// All requests, also those that were still open then.
    pub(crate) answered: u64,
    pub(crate) elapsed: Duration,
    /// Nanoseconds.
    pub(crate) latency: Histogram<u64>,
    /// When each request was answered, counted from the round's start, and how long it took, both in nanoseconds.
    pub(crate) trace: Vec<(u64, u64)>,
    /// When the round began.
    pub(crate) began: Instant,
}

impl Measured {
    pub(crate) fn per_second(&self) -> f64 {
        self.in_time as f64 / self.elapsed.as_secs_f64()
    }
}

fn histogram() -> Histogram<u64> {
    // 100 ns to 60 s with three digits: the bounds are constants that the type accepts.
    Histogram::new_with_bounds(100, 60_000_000_000, 3).unwrap_or_else(|e| panic!("bounds of a histogram: {e}"))
}

/// Runs the load on the first `queues` lanes of a connection.
///
/// # Errors
/// When a request fails or is not answered, or an end was asked for.
pub(crate) fn run(connection: &mut Connection, load: &Load, seed: u64) -> Result<Measured> {
    assert!(load.queues <= connection.lanes.len());
    let blocks = connection.bytes / load.bytes as u64;
    let barrier = Barrier::new(load.queues);
    let lanes = connection.lanes.iter_mut().take(load.queues).enumerate();
    let parts: Vec<Result<Measured>> = std::thread::scope(|scope| {
        let threads: Vec<_> = lanes
            .map(|(i, lane)| {
                let offsets = Offsets::new(load, i, blocks, seed);
                let barrier = &barrier;
                scope.spawn(move || run_lane(lane, load, offsets, barrier))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a load thread panicked".into()))).collect()
    });
    let mut all: Option<Measured> = None;
    for part in parts {
        let part = part?;
        match &mut all {
            None => all = Some(part),
            Some(all) => {
                all.in_time += part.in_time;
                all.answered += part.answered;
                all.elapsed = all.elapsed.max(part.elapsed);
                all.latency.add(&part.latency)?;
                all.trace.extend(part.trace);
                all.began = all.began.min(part.began);
            }
        }
    }
    all.ok_or_else(|| "a load without queues".into())
}

/// The next offset of one queue; None when there are no more.
struct Offsets {
    pattern: Pattern,
    rng: Rng,
    bytes: u64,
    blocks: u64,
    first: u64,
    next: u64,
    queues: u64,
}

impl Offsets {
    fn new(load: &Load, lane: usize, blocks: u64, seed: u64) -> Offsets {
        let (lane, queues) = (lane as u64, load.queues as u64);
        let (first, next) = match load.pattern {
            Pattern::Sequential => (blocks / queues * lane, 0),
            _ => (0, lane),
        };
        let rng = Rng::new(seed.wrapping_mul(31).wrapping_add(lane));
        Offsets { pattern: load.pattern.clone(), rng, bytes: load.bytes as u64, blocks, first, next, queues }
    }

    fn take(&mut self) -> Option<u64> {
        let block = match &self.pattern {
            Pattern::Random => self.rng.below(self.blocks),
            Pattern::Sequential => {
                self.next = (self.next + 1) % (self.blocks / self.queues);
                self.first + self.next
            }
            Pattern::Once(blocks) => {
                let block = *blocks.get(usize::try_from(self.next).ok()?)?;
                self.next += self.queues;
                block
            }
        };
        Some(block * self.bytes)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn run_lane(lane: &mut Lane, load: &Load, mut offsets: Offsets, barrier: &Barrier) -> Result<Measured> {
    let prepared = lane.prepare();
    barrier.wait();
    prepared?;
    let began = Instant::now();
    let (latency, trace) = (histogram(), Vec::new());
    let mut measured = Measured { in_time: 0, answered: 0, elapsed: Duration::ZERO, latency, trace, began };
    let mut sent = vec![began; load.depth];
    let mut done = Vec::with_capacity(load.depth);
    let mut in_flight = 0;
    for (slot, sent) in sent.iter_mut().enumerate() {
        let Some(offset) = offsets.take() else { break };
        *sent = Instant::now();
        lane.submit(load.op, offset, load.bytes, slot)?;
        in_flight += 1;
    }
    let mut open = true;
    while in_flight > 0 {
        lane.wait(load.bytes, &mut done)?;
        let now = Instant::now();
        let at = now - began;
        open = open && !load.is_over(at);
        for &slot in &done {
            let took = nanos(now - sent[slot]);
            measured.answered += 1;
            // What was sent in time counts as a latency also when its answer came late.
            measured.latency.saturating_record(took);
            if load.trace {
                measured.trace.push((nanos(at), took));
            }
            if open {
                measured.in_time += 1;
                measured.elapsed = at;
            }
            in_flight -= 1;
            let Some(offset) = offsets.take().filter(|_| open) else { continue };
            sent[slot] = Instant::now();
            lane.submit(load.op, offset, load.bytes, slot)?;
            in_flight += 1;
        }
    }
    if !open && load.until.is_none() {
        measured.elapsed = load.duration;
    }
    lane.finish();
    stop::check()?;
    Ok(measured)
}
