//! Legs: two images of everything, kept equal as RAID-1 does (source 002 [0062]-[0072]; figures 9 to 13).
//!
//! What always holds:
//! - Before the legs can differ, the bits of the regions where they may are durable. After a crash only those are copied.
//! - A write is acknowledged when every leg that counts has it, and a leg counts until it is durably said that it does
//!   not: no start reads a leg that missed an acknowledged write.
//! - A leg that is still being synchronised is never read and never takes over.
//!
//! What the caller guarantees: whatever changes bytes holds the locks of its blocks exclusively until it is done, so
//! that two writes to a block cannot land in different order on the legs (figure 13).

mod change;
mod examine;
mod intent;
mod state;

pub use change::CopyCursor;
pub use examine::PairFacts;
pub use state::{LegImage, LegState, LegStatus};

use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use uuid::Uuid;

use self::intent::Intent;
use self::state::{Shape, State};

use crate::image::{
    AlignedBuf, Alignment, ByteOffset, ImageError, IoBuf, IoQueue, SharedImage, join_all, read_by_copy, read_exact_at,
    release_range, sync, try_release_range, write_all_at, zero_range,
};
use crate::store::{BlockRange, TableError};
use crate::sync::{AtomicU64, Mutex, lock};

/// The least bytes that one bit of the write-intent bitmap stands for.
pub const REGION_BYTES_MIN: u32 = 1 << 20;

/// A pair could not be made, opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// An image refused.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The write-intent bitmap refused, or is damaged. The second leg can then be added anew, as a full copy.
    #[error("write-intent bitmap: {0}; if it cannot be repaired, make it anew with one leg and add the other in full")]
    Bitmap(#[from] TableError),
    /// It does not fit.
    #[error("mirror: {0}")]
    Refused(String),
}

/// Who is told what happens to legs. Called on data-path threads: be quick.
pub trait PairObserver: Send + Sync {
    /// A leg was dropped, where its image is, and why. It gets no more writes. If it was split, what was frozen on it is broken.
    fn leg_dropped(&self, leg: Uuid, path: &Path, reason: &str);
}

/// What several views of the same legs share.
struct Core {
    shape: Shape,
    block_bytes: u32,
    alignment: Alignment,
    path: PathBuf,
    intent: Intent,
    state: ArcSwap<State>,
    changing: Mutex<()>,
    /// The version of the state that is durable.
    settled: AtomicU64,
    observer: OnceLock<Arc<dyn PairObserver>>,
}

/// One or two images that hold the same bytes.
pub struct Pair {
    core: Arc<Core>,
    /// How many splits there had been: writes of this view still go to a leg that is split later.
    splits: u64,
}

/// What one operation does to a leg.
enum Change {
    Write { bytes: Arc<AlignedBuf>, range: std::ops::Range<usize>, durable: bool },
    Zero { len: u64, unmap: bool },
    Sync,
}

impl Pair {
    /// The size of the legs in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.core.shape.size_bytes
    }

    /// What transfers must be aligned to, for all legs.
    #[must_use]
    pub fn alignment(&self) -> Alignment {
        self.core.alignment
    }

    /// Where the first leg was when the pair was opened, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.core.path
    }

    /// Whether a sync has failed on every leg that is in sync.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        let state = self.core.state.load();
        state.in_sync().all(|place| image_of(&state, place).is_poisoned())
    }

    /// Bytes of storage in use on the leg that is read, if its container can tell.
    #[must_use]
    pub fn allocated_bytes(&self) -> Option<u64> {
        let state = self.core.state.load();
        let place = state.in_sync().next()?;
        image_of(&state, place).allocated_bytes()
    }

    /// The image of a leg, whatever its state, if it is there.
    #[must_use]
    pub fn image_of(&self, leg: Uuid) -> Option<SharedImage> {
        self.core.state.load().legs.iter().flatten().find(|l| l.id == leg).and_then(|l| l.image.clone())
    }

    /// How many bytes one bit of the bitmap stands for.
    #[must_use]
    pub fn region_bytes(&self) -> u32 {
        self.core.shape.region_bytes
    }

    /// Names who is told about dropped legs. The first call counts.
    pub fn observe(&self, observer: Arc<dyn PairObserver>) {
        if self.core.observer.set(observer).is_err() {
            log::debug!("a pair's observer is named once");
        }
    }

    /// Fills `buf` from the first leg that is in sync; if it fails, from the other one, and the first is dropped.
    ///
    /// # Errors
    /// When no leg that is in sync can be read.
    pub async fn read(&self, queue: &IoQueue, at: ByteOffset, buf: IoBuf) -> Result<IoBuf, ImageError> {
        let state = self.core.state.load_full();
        let mut places = state.in_sync();
        let first = places.next().expect("a leg is in sync");
        let Some(other) = places.next() else {
            return read_exact_at(image_of(&state, first), queue, at, buf).await;
        };
        let guest = match &buf {
            IoBuf::Guest(guest) => Some(guest.clone()),
            _ => None,
        };
        let len = buf.len();
        let mut error = match read_exact_at(image_of(&state, first), queue, at, buf).await {
            Ok(buf) => return Ok(buf),
            Err(error) => error,
        };
        if let Some(guest) = guest.as_ref().filter(|_| error.may_be_of_memory()) {
            // It may be the guest's memory that failed, for a moment only: a leg is judged by what memory of our own gets.
            match read_by_copy(image_of(&state, first), queue, at, guest).await {
                Ok(()) => return Ok(IoBuf::Guest(guest.clone())),
                Err(again) => error = again,
            }
        }
        let from_other = match guest {
            Some(guest) => read_by_copy(image_of(&state, other), queue, at, &guest).await.map(|()| IoBuf::Guest(guest)),
            None => read_exact_at(image_of(&state, other), queue, at, IoBuf::Owned(AlignedBuf::zeroed(len))).await,
        };
        // If both refuse nobody is dropped.
        let Ok(buf) = from_other else { return Err(error) };
        let version = self.drop_failed(&state, &[first, other], &[(first, error)]).0;
        self.core.settle(queue, version).await?;
        Ok(buf)
    }

    /// Stores all of `buf` on every leg that counts; with `durable`, on stable storage. The caller holds the blocks'
    /// locks exclusively.
    ///
    /// # Errors
    /// When no leg that is in sync took it, or the bitmap cannot be stored.
    pub async fn write(&self, queue: &IoQueue, at: ByteOffset, buf: IoBuf, durable: bool) -> Result<(), ImageError> {
        let state = self.begin(queue, at, buf.len() as u64).await?;
        let places: Vec<usize> = state.written(self.splits).collect();
        if let [only] = places[..] {
            write_all_at(image_of(&state, only), queue, at, buf, durable).await?;
            return self.core.settle(queue, state.version).await;
        }
        // Copied once: a guest that changes its buffer meanwhile cannot make the legs differ.
        let (bytes, range) = match buf {
            IoBuf::Guest(guest) => (Arc::new(guest.copy_out()), 0..guest.len()),
            IoBuf::Owned(bytes) => {
                let range = 0..bytes.len();
                (Arc::new(bytes), range)
            }
            IoBuf::Shared(bytes, range) => (bytes, range),
            IoBuf::None => return Ok(()),
        };
        self.change(queue, &state, &places, at, &Change::Write { bytes, range, durable }).await
    }

    /// Makes a range zero on every leg that counts; `unmap` gives the storage back where that can be done. The caller
    /// holds the blocks' locks exclusively.
    ///
    /// # Errors
    /// As for writing.
    pub async fn zero(&self, queue: &IoQueue, at: ByteOffset, len: u64, unmap: bool) -> Result<(), ImageError> {
        let state = self.begin(queue, at, len).await?;
        let places: Vec<usize> = state.written(self.splits).collect();
        self.change(queue, &state, &places, at, &Change::Zero { len, unmap }).await
    }

    /// Gives a range's storage back if any leg can do that: then it reads as zeros on all, otherwise nothing happens.
    /// The caller holds the blocks' locks exclusively.
    ///
    /// # Errors
    /// As for writing.
    pub async fn release(&self, queue: &IoQueue, at: ByteOffset, len: u64) -> Result<(), ImageError> {
        let state = self.begin(queue, at, len).await?;
        let places: Vec<usize> = state.written(self.splits).collect();
        if let [only] = places[..] {
            release_range(image_of(&state, only), queue, at, len).await?;
            return self.core.settle(queue, state.version).await;
        }
        let asked = places.iter().map(|&place| try_release_range(image_of(&state, place), queue, at, len));
        let answers = join_all(asked).await;
        if answers.iter().all(|answer| matches!(answer, Ok(true))) || answers.iter().all(|a| matches!(a, Ok(false))) {
            return self.core.settle(queue, state.version).await;
        }
        // They differ now.
        self.change(queue, &state, &places, at, &Change::Zero { len, unmap: true }).await
    }

    /// Makes everything that completed before durable on every leg that counts.
    ///
    /// # Errors
    /// When no leg that is in sync could be synced.
    pub async fn sync(&self, queue: &IoQueue) -> Result<(), ImageError> {
        let state = self.core.state.load_full();
        let places: Vec<usize> = state.written(self.splits).collect();
        self.change(queue, &state, &places, ByteOffset(0), &Change::Sync).await
    }

    /// Stores the bits that a write of this range will need, if they are not yet. Not needed for what is right: called
    /// before the blocks' locks are taken, it keeps others from waiting behind them for the bitmap's sync.
    ///
    /// # Errors
    /// When the bitmap cannot be stored; the write itself will say so too.
    pub async fn announce(&self, queue: &IoQueue, at: ByteOffset, len: u64) -> Result<(), ImageError> {
        self.begin(queue, at, len).await.map(drop)
    }

    /// The legs to write to, after the bits of what is written are durable if there is more than one.
    async fn begin(&self, queue: &IoQueue, at: ByteOffset, len: u64) -> Result<Arc<State>, ImageError> {
        loop {
            let before = self.core.state.load_full();
            if before.marks() && len > 0 {
                let regions = BlockRange::covering(at, len, self.core.shape.region_bytes);
                self.core.intent.mark(queue, regions).await?;
            }
            // A leg that is added copies all regions whose bits it sees: it sees ours, or we see it.
            fence(Ordering::SeqCst);
            let now = self.core.state.load_full();
            if !now.marks() {
                // A leg that is out counts for a start until that is durable, and there is no bit for what it misses.
                self.core.settle(queue, now.version).await?;
            }
            if before.marks() || !now.marks() {
                return Ok(now);
            }
        }
    }

    async fn change(
        &self,
        queue: &IoQueue,
        state: &State,
        places: &[usize],
        at: ByteOffset,
        what: &Change,
    ) -> Result<(), ImageError> {
        let all = places.iter().map(|&place| async move { (place, carry_out(state, place, queue, at, what).await) });
        let failed: Vec<(usize, ImageError)> =
            join_all(all).await.into_iter().filter_map(|(place, result)| Some((place, result.err()?))).collect();
        if failed.is_empty() {
            return self.core.settle(queue, state.version).await;
        }
        let error = failed[0].1.clone();
        let len = match what {
            Change::Write { range, .. } => range.len() as u64,
            Change::Zero { len, .. } => *len,
            Change::Sync => 0,
        };
        if len > 0 && state.resynchronising().is_some() {
            // Perhaps only the leg that is being synchronised has it, which is not to keep what the other lacks.
            let regions = BlockRange::covering(at, len, self.core.shape.region_bytes);
            self.core.intent.ask_for_copy(regions).map_err(|e| self.core.full(&e))?;
        }
        let (version, carried) = self.drop_failed(state, places, &failed);
        // Before anything is acknowledged that the dropped leg does not have.
        self.core.settle(queue, version).await?;
        if carried { Ok(()) } else { Err(error) }
    }

    /// Drops legs of `went_to` on which an operation failed that went to all of `written`, unless none would be left. Returns the
    /// version of the state that must be durable before the operation is acknowledged, and whether it succeeded.
    fn drop_failed(&self, went_to: &State, written: &[usize], failed: &[(usize, ImageError)]) -> (u64, bool) {
        // By their names: another leg may be in that place by now.
        let id = |place: usize| went_to.leg(place).expect("a leg that is used").id;
        let written: Vec<Uuid> = written.iter().map(|&place| id(place)).collect();
        let failed: Vec<(Uuid, String)> = failed.iter().map(|(place, e)| (id(*place), e.to_string())).collect();
        let ((dropped, carried), version) = self.core.alter(|state| state.drop_failed(&written, &failed));
        for (leg, reason) in dropped {
            log::error!("a leg of the mirror is dropped: {reason}");
            if let Some(observer) = self.core.observer.get() {
                let path = went_to.legs.iter().flatten().find(|l| l.id == leg).and_then(|l| l.image.as_ref());
                observer.leg_dropped(leg, path.map_or(Path::new(""), |image| image.path()), &reason);
            }
        }
        (version, carried)
    }
}

impl Core {
    /// Changes the state, in memory; [`Core::settle`] makes it durable. Returns its version too.
    fn alter<R>(&self, change: impl FnOnce(&mut State) -> R) -> (R, u64) {
        let _changing = lock(&self.changing);
        let mut state = State::clone(&self.state.load());
        let answer = change(&mut state);
        state.version += 1;
        let version = state.version;
        self.intent.durable.set_payload(state.payload(self.shape));
        self.state.store(Arc::new(state));
        (answer, version)
    }

    /// Waits until this version of the state, or a later one, is durable.
    async fn settle(&self, queue: &IoQueue, version: u64) -> Result<(), ImageError> {
        if self.settled.load(Ordering::SeqCst) < version {
            self.intent.durable.commit(queue).await?;
            self.settled.fetch_max(version, Ordering::SeqCst);
        }
        Ok(())
    }

    fn full(&self, e: &std::io::Error) -> ImageError {
        ImageError::from_io(crate::image::ImageOp::Write, self.intent.durable.image().path(), None, e)
    }
}

fn image_of(state: &State, place: usize) -> &dyn crate::image::Image {
    &**shared_image_of(state, place)
}

fn shared_image_of(state: &State, place: usize) -> &SharedImage {
    state.leg(place).and_then(|leg| leg.image.as_ref()).expect("a leg that is used has an image")
}

async fn carry_out(
    state: &State,
    place: usize,
    queue: &IoQueue,
    at: ByteOffset,
    what: &Change,
) -> Result<(), ImageError> {
    let image = image_of(state, place);
    match what {
        Change::Write { bytes, range, durable } => {
            write_all_at(image, queue, at, IoBuf::Shared(bytes.clone(), range.clone()), *durable).await
        }
        Change::Zero { len, unmap } => zero_range(image, queue, at, *len, *unmap).await,
        Change::Sync => sync(image, queue).await,
    }
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pair({:?})", self.status())
    }
}
