//! What is written to a pack at the same time goes there in one transfer, behind one header.
//!
//! What always holds:
//! - The first one to come carries out what has come when its turn is next: all that others were about to write by then,
//!   such as the requests of one pass over a ring. Nobody waits for more to come.
//! - Bytes are copied before their checksum is taken: a guest that changes its memory meanwhile changes nothing.
//! - Who waits is told, whatever becomes of the one that carries it out.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use super::format::{ENTRIES_MAX, Entry, Header, Place, UNIT_BYTES};
use super::free::Units;
use super::places::{Grant, Left, Relief};
use super::{Pack, bytes_of, position};
use crate::crash;
use crate::image::{
    AlignedBuf, ByteOffset, ImageError, ImageErrorKind, ImageOp, IoBuf, IoQueue, join_all, write_all_at, zero_range,
};

/// What goes behind one header at most, if that is more than one block.
const GATHERED_BYTES_MAX: usize = 1 << 20;

/// Whole blocks to be written.
pub(super) enum Bytes {
    /// Memory of our own.
    Of(Arc<AlignedBuf>, Range<usize>),
    Zeros {
        blocks: usize,
    },
}

impl Bytes {
    /// The bytes of a buffer in parts of at most so many blocks, each with how many blocks come before it.
    pub(super) fn split(buf: IoBuf, block_bytes: usize, blocks_max: usize) -> Vec<(u64, Bytes)> {
        let (memory, range) = match buf {
            IoBuf::Shared(memory, range) => (memory, range),
            IoBuf::Owned(memory) => {
                let len = memory.len();
                (Arc::new(memory), 0..len)
            }
            IoBuf::Guest(guest) => (Arc::new(guest.copy_out()), 0..guest.len()),
            IoBuf::None => return Vec::new(),
        };
        let most = blocks_max * block_bytes;
        let starts = range.clone().step_by(most.max(1));
        let part = |start: usize| {
            let skip = ((start - range.start) / block_bytes) as u64;
            (skip, Bytes::Of(memory.clone(), start..(start + most).min(range.end)))
        };
        starts.map(part).collect()
    }

    fn blocks(&self, block_bytes: usize) -> usize {
        match self {
            Bytes::Of(_, range) => range.len().div_ceil(block_bytes),
            Bytes::Zeros { blocks } => *blocks,
        }
    }
}

/// What has come and is not on its way.
pub(super) struct Gathered {
    open: Mutex<Option<Arc<Batch>>>,
    blocks_max: usize,
}

/// What goes behind one header.
struct Batch {
    state: Mutex<BatchState>,
}

#[derive(Default)]
struct BatchState {
    /// By their first blocks.
    items: Vec<(u64, Bytes)>,
    blocks: usize,
    done: Option<Result<(), ImageError>>,
    waiting: Vec<Waker>,
}

impl Gathered {
    pub(super) fn of(block_bytes: u32) -> Gathered {
        let blocks_max = (GATHERED_BYTES_MAX / block_bytes as usize).clamp(1, ENTRIES_MAX);
        Gathered { open: Mutex::default(), blocks_max }
    }

    /// How many blocks one header names at most.
    pub(super) fn blocks_max(&self) -> usize {
        self.blocks_max
    }

    /// Adds blocks to what has come, and says whether that began with them.
    fn join(&self, first: u64, bytes: Bytes, blocks: usize) -> (Arc<Batch>, bool) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(batch) = &*open {
            let mut state = batch.lock();
            if state.blocks + blocks <= self.blocks_max {
                state.blocks += blocks;
                state.items.push((first, bytes));
                drop(state);
                return (batch.clone(), false);
            }
        }
        let state = BatchState { items: vec![(first, bytes)], blocks, ..BatchState::default() };
        let batch = Arc::new(Batch { state: Mutex::new(state) });
        *open = Some(batch.clone());
        (batch, true)
    }

    /// Nothing joins it any more. Returns what it has.
    fn close(&self, batch: &Arc<Batch>) -> Vec<(u64, Bytes)> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().is_some_and(|open| Arc::ptr_eq(open, batch)) {
            *open = None;
        }
        drop(open);
        std::mem::take(&mut batch.lock().items)
    }
}

impl Batch {
    fn lock(&self) -> MutexGuard<'_, BatchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll_done(&self, waker: &Waker) -> Poll<Result<(), ImageError>> {
        let mut state = self.lock();
        if let Some(done) = &state.done {
            return Poll::Ready(done.clone());
        }
        if !state.waiting.iter().any(|w| w.will_wake(waker)) {
            state.waiting.push(waker.clone());
        }
        Poll::Pending
    }
}

impl Pack {
    /// Writes blocks, fewer than one header names, together with those that others write at the same time.
    pub(super) async fn put(&self, queue: &IoQueue, first: u64, bytes: Bytes) -> Result<(), ImageError> {
        let blocks = bytes.blocks(self.identity.block_bytes as usize);
        let (batch, leads) = self.gathered.join(first, bytes, blocks);
        if !leads {
            return poll_fn(|cx| batch.poll_done(cx.waker())).await;
        }
        let mut leader = Leader { pack: self, batch, result: None };
        if blocks < self.gathered.blocks_max {
            others_first().await;
        }
        let items = self.gathered.close(&leader.batch);
        let result = self.write_gathered(queue, items).await;
        leader.result = Some(result.clone());
        drop(leader);
        if result.is_ok() && self.lock().wants_sync() {
            // Otherwise a guest that never flushes would fill the image with what nothing names.
            self.sync(queue).await?;
        }
        result
    }

    async fn write_gathered(&self, queue: &IoQueue, items: Vec<(u64, Bytes)>) -> Result<(), ImageError> {
        let block_bytes = self.identity.block_bytes as usize;
        let bytes_of_item = |(_, bytes): &(u64, Bytes)| match bytes {
            Bytes::Of(..) => bytes.blocks(block_bytes),
            Bytes::Zeros { .. } => 0,
        };
        let blocks: usize = items.iter().map(bytes_of_item).sum();
        let grant = self.grant(queue, u32::try_from(blocks).expect("few")).await?;
        let mut buf = AlignedBuf::scratch(UNIT_BYTES + blocks * block_bytes);
        let entries = self.lay_out(&grant, items, &mut buf);
        let mut granted = Granted { pack: self, grant, entries, is_over: false };
        let (grant, entries) = (&granted.grant, &granted.entries);
        let header = Header {
            sequence: grant.sequence,
            arrived: grant.arrived,
            synced: grant.synced,
            span: grant.span,
            entries: entries.clone(),
        };
        header.encode(self.identity.key, grant.header, &mut buf[..UNIT_BYTES]);
        crash::point("before a pack is written");
        let written = self.write_granted(queue, grant, buf).await;
        crash::point("after a pack was written");
        match written {
            Ok(()) => self.lock().arrive(grant, entries),
            Err(_) => {
                // What may have arrived of the header must not count some day.
                let at = position(grant.header);
                let voided = zero_range(&*self.image, queue, at, UNIT_BYTES as u64, true).await;
                let left = if voided.is_ok() { Left::Nothing } else { Left::Header };
                self.lock().fail(grant, entries, left);
            }
        }
        granted.is_over = true;
        written
    }

    /// Units for so many blocks. If there are none, a sync or the end of what others do may free some.
    async fn grant(&self, queue: &IoQueue, blocks: u32) -> Result<Grant, ImageError> {
        loop {
            let granted = poll_fn(|cx| {
                let mut places = self.lock();
                if let Some(grant) = places.grant(blocks) {
                    return Poll::Ready(Ok(grant));
                }
                match places.relief() {
                    Relief::Wait => {
                        places.wait(cx.waker());
                        Poll::Pending
                    }
                    relief => Poll::Ready(Err(relief)),
                }
            });
            match granted.await {
                Ok(grant) => return Ok(grant),
                Err(Relief::Sync | Relief::Wait) => self.sync(queue).await?,
                Err(Relief::Void) => self.settle_doubts(queue).await?,
                Err(Relief::Never) => {
                    let what = "there is no room in the pack";
                    let mut error = ImageError::new(ImageErrorKind::Io, ImageOp::Write, self.image.path(), what);
                    error.errno = Some(libc::ENOSPC);
                    return Err(error);
                }
            }
        }
    }

    /// Puts the bytes behind the header, in the order of the granted units, and says where each block is.
    fn lay_out(&self, grant: &Grant, items: Vec<(u64, Bytes)>, buf: &mut AlignedBuf) -> Vec<Entry> {
        let (block_bytes, block_units) = (self.identity.block_bytes as usize, self.identity.block_units());
        let starts = |units: &Units| (0..units.count / block_units).map(move |i| i * block_units);
        let mut places = grant.units.iter().flat_map(|units| starts(units).map(|skip| Place(units.start + skip)));
        let (mut entries, mut at) = (Vec::new(), UNIT_BYTES);
        for (first, bytes) in items {
            match bytes {
                Bytes::Zeros { blocks } => {
                    entries.extend((first..).take(blocks).map(|block| Entry { block, bytes: None }));
                }
                Bytes::Of(memory, range) => {
                    for (block, piece) in (first..).zip(memory[range].chunks(block_bytes)) {
                        let out = &mut buf[at..at + block_bytes];
                        out[..piece.len()].copy_from_slice(piece);
                        out[piece.len()..].fill(0);
                        let place = places.next().expect("as many were granted");
                        entries.push(Entry { block, bytes: Some((place, crc32fast::hash(out))) });
                        at += block_bytes;
                    }
                    if let Ok(memory) = Arc::try_unwrap(memory) {
                        memory.recycle();
                    }
                }
            }
        }
        entries
    }

    async fn write_granted(&self, queue: &IoQueue, grant: &Grant, buf: AlignedBuf) -> Result<(), ImageError> {
        let at = position(grant.header);
        let is_one = match grant.units[..] {
            [] => true,
            [units] => units.start == grant.header.0 + 1,
            _ => false,
        };
        if is_one {
            return write_all_at(&*self.image, queue, at, IoBuf::Owned(buf), false).await;
        }
        let buf = Arc::new(buf);
        let write = |at: ByteOffset, range: Range<usize>| {
            write_all_at(&*self.image, queue, at, IoBuf::Shared(buf.clone(), range), false)
        };
        let (mut writes, mut from) = (vec![write(at, 0..UNIT_BYTES)], UNIT_BYTES);
        for units in &grant.units {
            let len = usize::try_from(bytes_of(units.count)).expect("as much as the buffer has");
            writes.push(write(position(Place(units.start)), from..from + len));
            from += len;
        }
        join_all(writes).await.into_iter().collect()
    }
}

/// Lets all others go on once that can.
async fn others_first() {
    let mut was_polled = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut was_polled, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// What is written to units that were granted. If that is abandoned, nobody knows what arrives of it.
struct Granted<'a> {
    pack: &'a Pack,
    grant: Grant,
    entries: Vec<Entry>,
    is_over: bool,
}

impl Drop for Granted<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.pack.lock().fail(&self.grant, &self.entries, Left::Anything);
        }
    }
}

/// The one who carries a batch out. Whatever becomes of it, those who wait go on.
struct Leader<'a> {
    pack: &'a Pack,
    batch: Arc<Batch>,
    /// None when it was dropped on its way: what it began may still arrive.
    result: Option<Result<(), ImageError>>,
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        drop(self.pack.gathered.close(&self.batch));
        let abandoned = || {
            let path = self.pack.image.path();
            Err(ImageError::new(ImageErrorKind::Io, ImageOp::Write, path, "a write to a pack was abandoned"))
        };
        let result = self.result.take().unwrap_or_else(abandoned);
        let mut state = self.batch.lock();
        state.done = Some(result);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}
