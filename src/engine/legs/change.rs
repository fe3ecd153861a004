//! How legs come, go and are made equal again: opening, adding, splitting, copying, cleaning.
//!
//! What always holds: bits are durable before the record of the legs that relies on them; a leg is said to be in sync
//! only after all that was copied to it is on stable storage.
//!
//! What is not done here: to decide when; jobs and the engine call.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use uuid::Uuid;

use super::intent::{Intent, wait_for_holders};
use super::state::{Leg, LegImage, LegState, LegStatus, Shape, State};
use super::{Core, Pair, PairError, REGION_BYTES_MIN, image_of};
use crate::engine::lock::{BlockLocks, Mode};
use crate::image::{
    AlignedBuf, Alignment, ByteOffset, ImageError, IoBuf, IoQueue, PAGE_BYTES, SharedImage, join_all, read_exact_at,
    write_all_at,
};
use crate::store::{BlockIndex, BlockRange, DurableTable, Table};
use crate::sync::{AtomicU64, Mutex};

static ZEROS: [u8; 4096] = [0; 4096];
/// Regions that are cleaned with one sync of the legs.
const CLEANED_MAX: usize = 4096;

/// How far a copy is inside its region.
#[derive(Debug, Default)]
pub struct CopyCursor {
    region: Option<Region>,
    /// From which region on to look for the next one.
    next: u64,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    region: BlockIndex,
    left: BlockRange,
    asked: u64,
}

fn shape_of(size_bytes: u64, block_bytes: u32) -> Shape {
    Shape { size_bytes, region_bytes: block_bytes.max(REGION_BYTES_MIN) }
}

fn regions_of(shape: Shape) -> u64 {
    shape.size_bytes.div_ceil(u64::from(shape.region_bytes))
}

fn refused(what: impl Into<String>) -> PairError {
    PairError::Refused(what.into())
}

impl Pair {
    /// How many bytes the image of a pair's bitmap has.
    #[must_use]
    pub fn bitmap_bytes(size_bytes: u64, block_bytes: u32) -> u64 {
        DurableTable::image_bytes(regions_of(shape_of(size_bytes, block_bytes)))
    }

    /// A pair of which one leg is there; the other one is added with [`Pair::attach`]. `bitmap` is a new image of
    /// [`Pair::bitmap_bytes`] zeros, `id` its name.
    ///
    /// # Errors
    /// When the bitmap cannot be made.
    pub async fn create(
        first: LegImage,
        bitmap: SharedImage,
        id: Uuid,
        block_bytes: u32,
        queue: &IoQueue,
    ) -> Result<Arc<Pair>, PairError> {
        let shape = shape_of(first.image.size_bytes(), block_bytes);
        let first = Leg { id: first.id, image: Some(first.image), state: LegState::InSync, split: 0 };
        let state = State { version: 0, legs: [Some(first), None], splits: 0, splitting: false, keep_bits: false };
        let table = Arc::new(Table::in_memory(regions_of(shape))?);
        let durable = DurableTable::create(bitmap, id, table, state.payload(shape), queue).await?;
        Pair::with(shape, block_bytes, durable, state)
    }

    /// The pair whose bitmap this is, as a stop or a crash left it. `images` are the legs that are there; those that
    /// should be in use and are not have failed. If the legs may differ, the second one is to be resynchronised.
    ///
    /// # Errors
    /// When the bitmap's header is damaged or is another one, an image has another size, or no leg has all the data.
    pub async fn open(
        images: &[LegImage],
        bitmap: SharedImage,
        id: Uuid,
        block_bytes: u32,
        queue: &IoQueue,
    ) -> Result<Arc<Pair>, PairError> {
        let size_bytes = images.first().ok_or_else(|| refused("none of its images is there"))?.image.size_bytes();
        if let Some(other) = images.iter().find(|leg| leg.image.size_bytes() != size_bytes) {
            return Err(refused(format!("{} has another size than the other leg", other.image.path().display())));
        }
        let shape = shape_of(size_bytes, block_bytes);
        let table = Arc::new(Table::in_memory(regions_of(shape))?);
        let (durable, report) = DurableTable::load(bitmap, id, table, queue).await?;
        let mut state = State::from_payload(&report.payload, shape, images)?;
        let memory = |e: std::io::Error| refused(format!("no memory for its bitmap: {e}"));
        for regions in report.damaged {
            log::warn!("{}: regions {regions:?} are taken as changed", durable.image().path().display());
            durable.table().prepare(regions).map_err(memory)?;
            durable.table().set(regions);
        }
        let both = state.in_sync().count() == 2;
        let may_differ = durable.table().count() > 0;
        if let (true, Some(leg)) = (both && may_differ, &mut state.legs[1]) {
            leg.state = LegState::Resynchronising;
        }
        let pair = Pair::with(shape, block_bytes, durable, state)?;
        if pair.core.state.load().resynchronising().is_some() {
            pair.core.intent.ask_for_all_copies().map_err(memory)?;
        }
        let ((), version) = pair.core.alter(|_| ());
        pair.core.settle(queue, version).await?;
        Ok(pair)
    }

    fn with(shape: Shape, block_bytes: u32, durable: DurableTable, state: State) -> Result<Arc<Pair>, PairError> {
        let images: Vec<&SharedImage> = state.legs.iter().flatten().filter_map(|leg| leg.image.as_ref()).collect();
        let alignments = images.iter().map(|image| image.alignment());
        // Any leg that comes later takes a page; whatever is copied for it is copied before the locks are taken.
        let alignment = alignments.fold(Alignment { offset_bytes: 1, memory_bytes: PAGE_BYTES }, |a, b| Alignment {
            offset_bytes: a.offset_bytes.max(b.offset_bytes),
            memory_bytes: a.memory_bytes.max(b.memory_bytes),
        });
        if alignment.offset_bytes > block_bytes {
            return Err(refused(format!("its blocks must have {} bytes or more", alignment.offset_bytes)));
        }
        let path = images.first().map(|image| image.path().to_owned()).unwrap_or_default();
        let core = Core {
            shape,
            block_bytes,
            alignment,
            path,
            intent: Intent::new(durable)?,
            state: ArcSwap::from_pointee(state),
            changing: Mutex::new(()),
            settled: AtomicU64::new(0),
            observer: OnceLock::new(),
        };
        Ok(Arc::new(Pair { core: Arc::new(core), splits: 0 }))
    }

    /// The legs, in the order of their places.
    #[must_use]
    pub fn status(&self) -> Vec<LegStatus> {
        let state = self.core.state.load();
        let (size, region) = (self.core.shape.size_bytes, u64::from(self.core.shape.region_bytes));
        let intent = &self.core.intent;
        let status = |leg: &Leg| LegStatus {
            id: leg.id,
            path: leg.image.as_ref().map(|image| image.path().to_owned()),
            state: leg.state.clone(),
            left_bytes: match leg.state {
                LegState::InSync => 0,
                LegState::Resynchronising => size.min(intent.to_copy.count() * region),
                LegState::Split => size.min(intent.bits().count() * region),
                LegState::Failed(_) => size,
            },
        };
        state.legs.iter().flatten().map(status).collect()
    }

    /// How many bytes lie in regions where the legs may differ after a crash.
    #[must_use]
    pub fn marked_bytes(&self) -> u64 {
        self.core.shape.size_bytes.min(self.core.intent.bits().count() * u64::from(self.core.shape.region_bytes))
    }

    /// Adds a leg where there is none, or in the place of one that failed or was split. It gets all writes from now on
    /// and is to be resynchronised. With `full` every region is copied; without, it is the leg that was split, unchanged
    /// since it was quiesced, and only regions that were written since are copied.
    ///
    /// # Errors
    /// `Refused` when there is no place, or it does not fit, or is not the leg that was split; otherwise when the bitmap
    /// cannot be stored.
    pub async fn attach(&self, queue: &IoQueue, leg: LegImage, full: bool) -> Result<(), PairError> {
        let core = &*self.core;
        if leg.image.size_bytes() != core.shape.size_bytes {
            return Err(refused(format!("{} does not have the size of the disk", leg.image.path().display())));
        }
        if leg.image.alignment().offset_bytes > core.alignment.offset_bytes {
            let what = "takes larger units only than the disk announced; use direct=off, or start with it";
            return Err(refused(format!("{} {what}", leg.image.path().display())));
        }
        // All that could be refused, before anything changes; looked at again below.
        place_for(&core.state.load(), leg.id, full)?;
        if full {
            let all = BlockRange { start: BlockIndex(0), end: BlockIndex(regions_of(core.shape)) };
            core.intent.set(all).map_err(|e| core.full(&e))?;
            core.intent.durable.commit(queue).await?;
        }
        let id = leg.id;
        let (added, _) = core.alter(|state| -> Result<(usize, Option<Leg>), PairError> {
            let place = place_for(state, id, full)?;
            let added = Leg { id, image: Some(leg.image), state: LegState::Resynchronising, split: 0 };
            state.keep_bits = true;
            state.splitting = false;
            Ok((place, state.legs[place].replace(added)))
        });
        let (place, before) = added?;
        let asked = core.intent.ask_for_all_copies();
        let ((), version) = core.alter(|state| {
            state.keep_bits = false;
            if let (Err(e), Some(place)) = (&asked, state.resynchronising())
                && let Some(leg) = &mut state.legs[place]
            {
                leg.state = LegState::Failed(e.to_string());
            }
        });
        if let Err(e) = core.settle(queue, version).await {
            // Nobody is told that it is there, and no start must find it so.
            core.alter(|state| {
                if state.leg(place).is_some_and(|leg| leg.id == id) {
                    state.legs[place] = before;
                }
            });
            return Err(e.into());
        }
        Ok(asked.map_err(|e| core.full(&e))?)
    }

    /// Says durably that the second leg is split, although both are still written: whoever starts after a crash finds
    /// it split. From now on no bit is cleared. Call it before the cut; it may fail, and nothing has changed then.
    ///
    /// # Errors
    /// When not both legs are in sync, or the bitmap cannot be stored.
    pub async fn prepare_split(&self, queue: &IoQueue) -> Result<(), PairError> {
        let (ready, version) = self.core.alter(|state| {
            let both = state.in_sync().count() == 2;
            state.splitting |= both;
            both
        });
        if !ready {
            return Err(refused("it is not possible to split it: not both legs are in sync"));
        }
        let stored = self.core.settle(queue, version).await;
        if stored.is_err() {
            self.core.alter(|state| state.splitting = false);
        }
        Ok(stored?)
    }

    /// Takes [`Pair::prepare_split`] back.
    ///
    /// # Errors
    /// When the bitmap cannot be stored.
    pub async fn cancel_split(&self, queue: &IoQueue) -> Result<(), PairError> {
        let ((), version) = self.core.alter(|state| state.splitting = false);
        Ok(self.core.settle(queue, version).await?)
    }

    /// The cut: gives what the live version goes on with, which writes to the first leg only. Requests that go on by
    /// this pair write to both, so that the leg that was split shows them too (figures 10 and 11). No I/O.
    ///
    /// # Errors
    /// When the split was not prepared, or a leg was dropped since.
    pub fn detached(&self) -> Result<Arc<Pair>, PairError> {
        let (splits, _) = self.core.alter(|state| {
            if !std::mem::take(&mut state.splitting) || state.in_sync().count() != 2 {
                return None;
            }
            state.splits += 1;
            let splits = state.splits;
            let leg = state.legs[1].as_mut()?;
            (leg.state, leg.split) = (LegState::Split, splits);
            Some(splits)
        });
        let splits = splits.ok_or_else(|| refused("the split was not prepared, or a leg was dropped since"))?;
        Ok(Arc::new(Pair { core: self.core.clone(), splits }))
    }

    /// The second leg, whatever its state, if its image is there.
    #[must_use]
    pub fn second(&self) -> Option<LegImage> {
        let state = self.core.state.load();
        let leg = state.leg(1)?;
        Some(LegImage { id: leg.id, image: leg.image.clone()? })
    }

    /// Forgets the leg that was split or failed: it will not come back, and writes need no bits for it any more.
    ///
    /// # Errors
    /// When the bitmap cannot be stored.
    pub async fn forget(&self, queue: &IoQueue, leg: Uuid) -> Result<(), PairError> {
        let ((), version) = self.core.alter(|state| {
            for place in &mut state.legs {
                if place
                    .as_ref()
                    .is_some_and(|l| l.id == leg && matches!(l.state, LegState::Split | LegState::Failed(_)))
                {
                    *place = None;
                }
            }
        });
        Ok(self.core.settle(queue, version).await?)
    }

    /// Lets a leg go: from now on nothing counts on it, and that is durable when this returns. Its bytes stay.
    ///
    /// # Errors
    /// `Refused` when no other leg is in sync; otherwise when the bitmap cannot be stored.
    pub async fn let_go(&self, queue: &IoQueue, leg: Uuid) -> Result<(), PairError> {
        let (gone, version) = self.core.alter(|state| {
            let others = state.legs.iter().flatten().any(|l| l.id != leg && l.state == LegState::InSync);
            if others {
                let goes = state.legs.iter_mut().flatten().filter(|l| l.id == leg && l.state != LegState::Split);
                goes.for_each(|l| l.state = LegState::Failed("it was let go".to_owned()));
            }
            others
        });
        self.core.settle(queue, version).await?;
        if gone { Ok(()) } else { Err(refused("no other leg is in sync")) }
    }

    /// Copies the next blocks, `most` at the most, to the leg that is being synchronised, side by side and each under its
    /// own lock. Returns how many bytes are done with, or None when no region is left.
    ///
    /// # Errors
    /// When the leg was dropped, also by this; or the one to copy from cannot be read.
    pub async fn copy_some(
        &self,
        queue: &IoQueue,
        locks: &BlockLocks,
        cursor: &mut CopyCursor,
        most: usize,
    ) -> Result<Option<u64>, PairError> {
        let Some(mut region) = self.region_to_copy(cursor) else { return Ok(None) };
        let end = region.left.end.0.min(region.left.start.0 + most as u64);
        let now = BlockRange { start: region.left.start, end: BlockIndex(end) };
        let copies = now.iter().map(|block| self.copy_block(queue, locks, block));
        let copied = join_all(copies).await;
        let bytes = copied.into_iter().sum::<Result<u64, PairError>>()?;
        region.left.start = now.end;
        cursor.region = Some(region);
        if region.left.is_empty() {
            self.core.intent.copied(region.region, region.asked);
            *cursor = CopyCursor { region: None, next: region.region.0 + 1 };
        }
        Ok(Some(bytes))
    }

    fn region_to_copy(&self, cursor: &CopyCursor) -> Option<Region> {
        let intent = &self.core.intent;
        if let Some(region) = cursor.region {
            return Some(region);
        }
        let asked = intent.asked();
        let next = intent.to_copy.next_set(BlockIndex(cursor.next));
        let region = next.or_else(|| intent.to_copy.next_set(BlockIndex(0)))?;
        Some(Region { region, left: self.blocks_of(region), asked })
    }

    fn blocks_of(&self, region: BlockIndex) -> BlockRange {
        let (at, len) = BlockRange::one(region).bytes(self.core.shape.region_bytes, self.core.shape.size_bytes);
        BlockRange::covering(at, len, self.core.block_bytes)
    }

    async fn copy_block(&self, queue: &IoQueue, locks: &BlockLocks, block: BlockIndex) -> Result<u64, PairError> {
        let (at, len) = BlockRange::one(block).bytes(self.core.block_bytes, self.core.shape.size_bytes);
        let _guard = locks.acquire(BlockRange::one(block), Mode::Exclusive).await;
        let state = self.core.state.load_full();
        let (Some(from), Some(to)) = (state.in_sync().next(), state.resynchronising()) else {
            return Err(refused("no leg is being resynchronised; it may have been dropped"));
        };
        let bytes = read_owned(&state, from, queue, at, len).await?;
        if let Err(e) = copy_bytes(&state, to, queue, at, bytes).await {
            let (version, _) = self.drop_failed(&state, &[from, to], &[(to, e.clone())]);
            self.core.settle(queue, version).await?;
            return Err(e.into());
        }
        Ok(len)
    }

    /// Ends a resynchronisation if nothing is left to copy: stores what was copied and says durably that the leg is in
    /// sync. False when there is more to copy.
    ///
    /// # Errors
    /// When the leg was dropped, also by this; or something cannot be stored.
    pub async fn finish_copy(&self, queue: &IoQueue) -> Result<bool, PairError> {
        self.sync(queue).await?;
        let intent = &self.core.intent;
        let (done, version) = self.core.alter(|state| {
            let Some(place) = state.resynchronising() else {
                // It is, and that could not be stored the last time.
                return (state.in_sync().count() == 2).then_some(true);
            };
            let done = intent.to_copy.next_set(BlockIndex(0)).is_none() && !state.keep_bits;
            if done && let Some(leg) = &mut state.legs[place] {
                leg.state = LegState::InSync;
            }
            Some(done)
        });
        self.core.settle(queue, version).await?;
        done.ok_or_else(|| refused("the leg that was being resynchronised was dropped"))
    }

    /// Clears the bits of regions that were not written since the last call: after both legs have stored them. Returns
    /// how many. Holds no block's lock for longer than it takes to get it.
    ///
    /// # Errors
    /// When the legs or the bitmap cannot be stored.
    pub async fn clean(&self, queue: &IoQueue, locks: &BlockLocks) -> Result<u64, PairError> {
        let (core, mut from, mut cleaned) = (&*self.core, Some(BlockIndex(0)), 0);
        while let Some(at) = from {
            let state = core.state.load_full();
            if !state.cleans() {
                break;
            }
            let idle = core.intent.idle_regions(at, CLEANED_MAX);
            from = idle.next;
            if idle.regions.is_empty() {
                continue;
            }
            for &region in &idle.regions {
                wait_for_holders(locks, self.blocks_of(region)).await;
            }
            self.sync(queue).await?;
            // Both legs were there all the time, so both have stored what was written before.
            let holds = || core.state.load().version == state.version;
            let clear = |region: &&BlockIndex| core.intent.clear_if_idle(**region, &idle, holds);
            cleaned += idle.regions.iter().filter(clear).count() as u64;
            core.intent.durable.commit(queue).await?;
        }
        Ok(cleaned)
    }
}

/// Where a leg would be added.
fn place_for(state: &State, leg: Uuid, full: bool) -> Result<usize, PairError> {
    let place = state.vacant().ok_or_else(|| refused("it has two legs already"))?;
    if state.legs.iter().enumerate().any(|(at, l)| at != place && l.as_ref().is_some_and(|l| l.id == leg)) {
        return Err(refused("that image is its other leg"));
    }
    let is_split = |l: &Leg| l.id == leg && l.state == LegState::Split;
    if full || state.leg(place).is_some_and(is_split) {
        Ok(place)
    } else {
        Err(refused("that image is not the leg that was split; add it as a full copy"))
    }
}

async fn read_owned(
    state: &State,
    place: usize,
    queue: &IoQueue,
    at: ByteOffset,
    len: u64,
) -> Result<AlignedBuf, ImageError> {
    let len = usize::try_from(len).expect("a block fits in memory");
    let into = IoBuf::Owned(AlignedBuf::zeroed(len));
    match read_exact_at(image_of(state, place), queue, at, into).await? {
        IoBuf::Owned(bytes) => Ok(bytes),
        _ => unreachable!("a transfer gives back the buffer it was given"),
    }
}

/// Writes a block to a leg; zeros only where there is something else, so that a sparse image stays so.
async fn copy_bytes(
    state: &State,
    place: usize,
    queue: &IoQueue,
    at: ByteOffset,
    bytes: AlignedBuf,
) -> Result<(), ImageError> {
    let is_zero = |bytes: &[u8]| bytes.chunks(ZEROS.len()).all(|piece| *piece == ZEROS[..piece.len()]);
    if is_zero(&bytes) && is_zero(&read_owned(state, place, queue, at, bytes.len() as u64).await?) {
        return Ok(());
    }
    write_all_at(image_of(state, place), queue, at, IoBuf::Owned(bytes), false).await
}
