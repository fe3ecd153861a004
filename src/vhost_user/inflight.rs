//! Which requests are in flight, in memory that outlives the daemon (vhost-user specification, "Inflight I/O tracking").
//!
//! What always holds:
//! - A head is marked before its request is started and unmarked after its used entry is visible, so that whoever takes
//!   the region up after a crash finds every request that was started and not answered.
//! - Nothing in the region is trusted: it comes back through the frontend. A wrong region can make a request of that
//!   guest run twice, or not at all, and nothing worse.
//!
//! The region is ours to lay out; this is the specification's layout for split rings, so that others can read it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::features::RING_ENTRIES_MAX;
use super::limits::Limits;
use super::mapping::Mapping;

// Of a queue's part: features u64, version u16, entries u16, last_batch_head u16, used_idx u16; then one state a head:
// inflight u8, five unused bytes, next u16, counter u64.
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;
const STATES_AT: usize = 16;
const STATE_BYTES: usize = 16;
/// In an unused byte of the first head of the first queue: what the guest said of its cache. No frontend says it again.
const WRITETHROUGH_AT: usize = STATES_AT + 1;
const NEXT_IN_STATE: usize = 6;
const COUNTER_IN_STATE: usize = 8;
const VERSION: u16 = 1;
/// Queues' parts begin on cache lines of their own.
const PART_ALIGN: usize = 64;

/// The region of one connection.
#[derive(Debug)]
pub(super) struct InflightRegion {
    mapping: Mapping,
    queues: u16,
    entries: u16,
}

/// One queue's part.
#[derive(Clone, Debug)]
pub(super) struct InflightQueue {
    region: Arc<InflightRegion>,
    part: usize,
    counter: u64,
}

fn part_bytes(entries: u16) -> usize {
    (STATES_AT + STATE_BYTES * usize::from(entries)).next_multiple_of(PART_ALIGN)
}

fn refused(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.into())
}

impl InflightRegion {
    /// A new region and its size in bytes, for the frontend to keep.
    ///
    /// # Errors
    /// When the numbers make no sense, or memory cannot be had.
    pub(super) fn create(queues: u16, entries: u16, queues_max: usize) -> io::Result<(File, u64)> {
        check(queues, entries, queues_max)?;
        let bytes = part_bytes(entries) as u64 * u64::from(queues);
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("halfsilver-inflight", flags)?);
        file.set_len(bytes)?;
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW)?;
        Ok((file, bytes))
    }

    /// Takes a region up that the frontend kept.
    ///
    /// # Errors
    /// When it is not one of ours, too small, or cannot be mapped.
    pub(super) fn open(
        file: &File,
        offset: u64,
        bytes: u64,
        queues: u16,
        entries: u16,
        queues_max: usize,
        limits: &Arc<Limits>,
    ) -> io::Result<Arc<InflightRegion>> {
        check(queues, entries, queues_max)?;
        let need = part_bytes(entries) * usize::from(queues);
        let end = offset.checked_add(bytes);
        if bytes < need as u64 || end.is_none_or(|end| file.metadata().is_ok_and(|m| m.len() < end)) {
            return Err(refused(format!("an inflight region of {bytes} bytes at {offset} where {need} are needed")));
        }
        let mapping = Mapping::new(file, offset, need as u64, limits)
            .map_err(|e| refused(format!("the inflight region cannot be mapped: {e}")))?;
        let region = Arc::new(InflightRegion { mapping, queues, entries });
        for queue in 0..queues {
            let part = region.clone().queue(queue).expect("the queue is in the region");
            match (part.load16(VERSION_AT), part.load16(ENTRIES_AT)) {
                (0, 0) => {
                    part.store16(ENTRIES_AT, entries);
                    part.store16(VERSION_AT, VERSION);
                }
                (VERSION, n) if n == entries => {}
                (version, n) => {
                    return Err(refused(format!("an inflight region of version {version} with {n} entries")));
                }
            }
        }
        if region.is_poisoned() {
            return Err(refused("the inflight region's memory is not there"));
        }
        Ok(region)
    }

    /// Whether its memory was found missing (see [`super::sigbus`]).
    pub(super) fn is_poisoned(&self) -> bool {
        self.mapping.is_poisoned()
    }

    /// Whether the guest had switched to writethrough.
    pub(super) fn is_writethrough(self: &Arc<Self>) -> bool {
        self.clone().queue(0).is_some_and(|part| part.byte(WRITETHROUGH_AT).load(Ordering::Acquire) == 1)
    }

    /// Remembers whether the guest has switched to writethrough, for the next daemon.
    pub(super) fn note_writethrough(self: &Arc<Self>, writethrough: bool) {
        if let Some(part) = self.clone().queue(0) {
            part.byte(WRITETHROUGH_AT).store(u8::from(writethrough), Ordering::Release);
        }
    }

    /// One queue's part, if the region has it.
    pub(super) fn queue(self: Arc<Self>, index: u16) -> Option<InflightQueue> {
        let part = part_bytes(self.entries) * usize::from(index);
        (index < self.queues).then_some(InflightQueue { region: self, part, counter: 0 })
    }
}

fn check(queues: u16, entries: u16, queues_max: usize) -> io::Result<()> {
    let fits = queues > 0 && usize::from(queues) <= queues_max && entries > 0 && entries <= RING_ENTRIES_MAX;
    if fits { Ok(()) } else { Err(refused(format!("inflight tracking of {queues} queues with {entries} entries"))) }
}

impl InflightQueue {
    /// Whether the region's memory was found missing.
    pub(super) fn is_poisoned(&self) -> bool {
        self.region.is_poisoned()
    }

    /// How many heads it has room for.
    pub(super) fn entries(&self) -> u16 {
        self.region.entries
    }

    /// What was started and not answered, in the order in which it was started. `used_idx` is the used ring's own index:
    /// if a batch became visible and was not unmarked any more, that is done now.
    pub(super) fn recover(&mut self, used_idx: u16, ring_entries: u16) -> Vec<u16> {
        let missed = used_idx.wrapping_sub(self.load16(USED_IDX_AT));
        let mut head = self.load16(LAST_BATCH_HEAD_AT);
        for _ in 0..missed.min(ring_entries) {
            if head >= ring_entries {
                break;
            }
            self.mark(head, false);
            head = self.load16(state(head) + NEXT_IN_STATE);
        }
        self.store16(USED_IDX_AT, used_idx);
        let mut found: Vec<(u64, u16)> = (0..ring_entries)
            .filter(|&head| self.byte(state(head)).load(Ordering::Acquire) != 0)
            .map(|head| (self.counter_of(head).load(Ordering::Relaxed), head))
            .collect();
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(counter, _)| *counter);
        found.into_iter().map(|(_, head)| head).collect()
    }

    /// A request is about to be started.
    pub(super) fn begin(&mut self, head: u16) {
        self.counter = self.counter.wrapping_add(1);
        self.counter_of(head).store(self.counter, Ordering::Relaxed);
        self.mark(head, true);
    }

    /// Its used entry is written but not visible yet: it joins the batch.
    pub(super) fn join_batch(&self, head: u16) {
        self.store16(state(head) + NEXT_IN_STATE, self.load16(LAST_BATCH_HEAD_AT));
        self.store16(LAST_BATCH_HEAD_AT, head);
    }

    /// The batch is visible.
    pub(super) fn end_batch(&self, heads: &[u16], used_idx: u16) {
        heads.iter().for_each(|&head| self.mark(head, false));
        self.store16(USED_IDX_AT, used_idx);
    }

    fn mark(&self, head: u16, in_flight: bool) {
        self.byte(state(head)).store(u8::from(in_flight), Ordering::Release);
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as in byte(); states are 16-aligned, so their counters are 8-aligned.
        unsafe { AtomicU64::from_ptr(self.place(state(head) + COUNTER_IN_STATE, 8).cast()) }
    }

    fn load16(&self, at: usize) -> u16 {
        self.word(at).load(Ordering::Acquire)
    }

    fn store16(&self, at: usize, value: u16) {
        self.word(at).store(value, Ordering::Release);
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as in byte(); all words are 2-aligned by the layout.
        unsafe { AtomicU16::from_ptr(self.place(at, 2).cast()) }
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        // SAFETY: inside the mapping that `region` keeps. The frontend may write it too; atomics are the closest that there
        // is in this program's memory model, and every value is checked before it is used.
        unsafe { AtomicU8::from_ptr(self.place(at, 1)) }
    }

    /// The address of `len` bytes of this queue's part.
    fn place(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at + len <= part_bytes(self.region.entries), "outside the queue's part of the inflight region");
        self.region.mapping.as_ptr().wrapping_add(self.part + at)
    }
}

/// Where a head's state is in its queue's part.
fn state(head: u16) -> usize {
    STATES_AT + STATE_BYTES * usize::from(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(file: &File, bytes: u64) -> InflightQueue {
        let region = InflightRegion::open(file, 0, bytes, 2, 8, 4, &Limits::new()).unwrap();
        region.queue(1).unwrap()
    }

    #[test]
    fn what_was_not_answered_comes_back_in_order() {
        let (file, bytes) = InflightRegion::create(2, 8, 4).unwrap();
        let mut first = queue(&file, bytes);
        assert_eq!(first.recover(0, 8), [0u16; 0]);
        [5, 2, 7, 0].into_iter().for_each(|head| first.begin(head));
        first.join_batch(2);
        first.end_batch(&[2], 1);
        assert_eq!(queue(&file, bytes).recover(1, 8), [5, 7, 0]);
    }

    #[test]
    fn a_batch_that_became_visible_just_before_the_end_is_not_run_again() {
        let (file, bytes) = InflightRegion::create(2, 8, 4).unwrap();
        let mut first = queue(&file, bytes);
        first.recover(0, 8);
        [1, 2, 3].into_iter().for_each(|head| first.begin(head));
        first.join_batch(3);
        first.join_batch(1);
        // The used index has moved to 2, and the daemon dies here.
        assert_eq!(queue(&file, bytes).recover(2, 8), [2]);
        assert_eq!(queue(&file, bytes).recover(2, 8), [2], "and recovery can be repeated");
    }

    #[test]
    fn nonsense_in_the_region_is_refused_or_harmless() {
        let (file, bytes) = InflightRegion::create(2, 8, 4).unwrap();
        for (at, len, queues, entries) in [(0, bytes - 1, 2, 8), (64, bytes, 2, 8), (0, bytes, 5, 8), (0, bytes, 2, 0)]
        {
            let limits = Limits::new();
            assert!(InflightRegion::open(&file, at, len, queues, entries, 4, &limits).is_err());
        }
        drop(queue(&file, bytes));
        assert!(InflightRegion::open(&file, 0, bytes, 2, 4, 4, &Limits::new()).is_err(), "another size");
        use std::os::unix::fs::FileExt;
        file.write_all_at(&vec![0xff; usize::try_from(bytes).unwrap() - part_bytes(8) - 16], 16 + part_bytes(8) as u64)
            .unwrap();
        let mut wild = queue(&file, bytes);
        assert!(wild.recover(9, 8).len() <= 8);
    }
}
