//! A pair on simulated media, its guests, and what each sector may hold.
//!
//! The oracle: writes to a sector are ordered by its block's lock. After a power cut a sector holds the last write that
//! was complete before an acknowledged flush began, or a later one.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use halfsilver::engine::{
    Backing, Disk, DiskOptions, Epoch, EpochClock, LegImage, LegState, Mode, Pair, PairError, PairObserver,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, ImageError, IoBuf, IoQueue, SharedImage};
use halfsilver::job::{Outcome, Pace, resync};
use halfsilver::store::BlockRange;
use uuid::Uuid;

use crate::media::{Medium, SECTOR, run};
use crate::schedule::Rng;

pub const BLOCK: u32 = 64 << 10;
pub const REGION: usize = 1 << 20;
/// A region and a short one.
pub const SIZE: usize = REGION + 3 * (32 << 10);
const BITMAP: Uuid = Uuid::from_u128(77);

pub fn leg_id(place: usize) -> Uuid {
    Uuid::from_u128(1 + place as u128)
}

#[derive(Default)]
pub struct Observer(Mutex<Vec<(Uuid, String)>>);

impl PairObserver for Observer {
    fn leg_dropped(&self, leg: Uuid, _path: &Path, reason: &str) {
        self.0.lock().unwrap().push((leg, reason.to_owned()));
    }
}

impl Observer {
    pub fn dropped(&self) -> Vec<Uuid> {
        self.0.lock().unwrap().iter().map(|(leg, _)| *leg).collect()
    }
}

/// The media of a pair.
#[derive(Clone)]
pub struct World {
    pub legs: [Medium; 2],
    pub bitmap: Medium,
}

impl World {
    pub fn new() -> World {
        let bitmap_bytes = usize::try_from(Pair::bitmap_bytes(SIZE as u64, BLOCK)).unwrap();
        let mut first = vec![0; SIZE];
        for block in (0..SIZE).step_by(8 * BLOCK as usize) {
            first[block + SECTOR..block + 4 * SECTOR].fill(0xee);
        }
        World {
            legs: [Medium::with("leg-0", first), Medium::new("leg-1", SIZE)],
            bitmap: Medium::new("bitmap", bitmap_bytes),
        }
    }

    pub fn leg(&self, place: usize) -> LegImage {
        LegImage { id: leg_id(place), image: Arc::new(self.legs[place].clone()) }
    }

    fn bitmap(&self) -> SharedImage {
        Arc::new(self.bitmap.clone())
    }

    /// A new pair whose second leg is to be copied in full.
    pub fn create(&self, rng: &mut Rng) -> Mirror {
        let (first, second, bitmap, queue) = (self.leg(0), self.leg(1), self.bitmap(), IoQueue::simulated());
        let io = queue.clone();
        let pair = run(rng, async move {
            let pair = Pair::create(first, bitmap, BITMAP, BLOCK, &io).await.unwrap();
            pair.attach(&io, second, true).await.unwrap();
            pair
        });
        Mirror::new(pair, queue)
    }

    /// A pair whose legs are equal and whose bitmap is clean.
    pub fn equal(&self, rng: &mut Rng) -> Mirror {
        let mirror = self.create(rng);
        assert_eq!(mirror.resync(rng).unwrap(), Outcome::Done);
        assert_eq!(mirror.pair.marked_bytes(), 0);
        assert_eq!(mirror.states(), [LegState::InSync, LegState::InSync]);
        mirror
    }

    /// The pair as it is found by the next start, with these of its legs.
    pub fn open(&self, rng: &mut Rng, places: &[usize]) -> Result<Mirror, PairError> {
        let images: Vec<LegImage> = places.iter().map(|&place| self.leg(place)).collect();
        let (bitmap, queue) = (self.bitmap(), IoQueue::simulated());
        let io = queue.clone();
        let pair = run(rng, async move { Pair::open(&images, bitmap, BITMAP, BLOCK, &io).await })?;
        Ok(Mirror::new(pair, queue))
    }

    pub fn after_power_cut(&self, rng: &mut Rng) -> World {
        let [first, second] = &self.legs;
        World {
            legs: [first.after_power_cut(rng), second.after_power_cut(rng)],
            bitmap: self.bitmap.after_power_cut(rng),
        }
    }
}

/// A pair with what is needed to use it.
#[derive(Clone)]
pub struct Mirror {
    pub pair: Arc<Pair>,
    pub disk: Arc<Disk>,
    pub queue: IoQueue,
    pub observer: Arc<Observer>,
    pub oracle: Rc<RefCell<Oracle>>,
}

impl Mirror {
    pub fn new(pair: Arc<Pair>, queue: IoQueue) -> Mirror {
        let observer = Arc::new(Observer::default());
        pair.observe(observer.clone());
        let discards = Disk::table_in_memory(SIZE as u64, BLOCK).unwrap();
        let image = Backing::Pair(pair.clone());
        let options = DiskOptions { image, block_bytes: BLOCK, read_only: false, discards: Arc::new(discards) };
        let disk = Disk::new(EpochClock::new(Epoch(1)), options);
        Mirror { pair, disk, queue, observer, oracle: Rc::default() }
    }

    /// The same disk with another view of its legs.
    pub fn with_pair(&self, pair: Arc<Pair>) -> Mirror {
        Mirror { pair, ..self.clone() }
    }

    pub fn states(&self) -> Vec<LegState> {
        self.pair.status().into_iter().map(|leg| leg.state).collect()
    }

    pub fn resync(&self, rng: &mut Rng) -> Result<Outcome, PairError> {
        let pace = Arc::new(Pace::default());
        run(rng, resync(self.queue.clone(), self.disk.clone(), self.pair.clone(), pace))
    }

    pub fn clean(&self, rng: &mut Rng) -> u64 {
        let this = self.clone();
        run(rng, async move { this.pair.clean(&this.queue, this.disk.block_locks()).await.unwrap() })
    }

    /// A guest's write of `len` bytes that all say `id`; with `id` 0 a write of zeros.
    pub async fn write(&self, at: usize, len: usize, id: u8, how: How) -> Result<(), ImageError> {
        if how != How::Durable {
            self.pair.announce(&self.queue, ByteOffset(at as u64), len as u64).await?;
        }
        let blocks = BlockRange::covering(ByteOffset(at as u64), len as u64, BLOCK);
        let _guard = self.disk.block_locks().acquire(blocks, Mode::Exclusive).await;
        let sectors = at / SECTOR..(at + len) / SECTOR;
        let (at, len_u64) = (ByteOffset(at as u64), len as u64);
        self.oracle.borrow_mut().begin(sectors.clone(), id);
        let result = match how {
            How::Zero => self.pair.zero(&self.queue, at, len_u64, true).await,
            How::Release => self.pair.release(&self.queue, at, len_u64).await,
            How::Write | How::Durable => {
                let mut bytes = AlignedBuf::zeroed(len);
                bytes.fill(id);
                self.pair.write(&self.queue, at, IoBuf::Owned(bytes), how == How::Durable).await
            }
        };
        if result.is_ok() {
            self.oracle.borrow_mut().done(sectors, how == How::Durable);
        }
        result
    }

    pub async fn flush(&self) -> Result<(), ImageError> {
        let complete = self.oracle.borrow().complete();
        self.pair.sync(&self.queue).await?;
        self.oracle.borrow_mut().flushed(complete);
        Ok(())
    }

    pub async fn read(&self, at: usize, len: usize) -> Result<Vec<u8>, ImageError> {
        let into = IoBuf::Owned(AlignedBuf::zeroed(len));
        match self.pair.read(&self.queue, ByteOffset(at as u64), into).await? {
            IoBuf::Owned(bytes) => Ok(bytes.to_vec()),
            _ => unreachable!(),
        }
    }

    /// The same, into a guest's memory.
    pub async fn read_to_guest(&self, at: usize, len: usize) -> Result<Vec<u8>, ImageError> {
        let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(len));
        self.pair.read(&self.queue, ByteOffset(at as u64), IoBuf::Guest(into)).await?;
        Ok(memory.to_vec())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    Write,
    Durable,
    Zero,
    Release,
}

/// What was written to each sector, in order, and how much of it must be there.
#[derive(Default, Clone)]
pub struct Oracle {
    sectors: HashMap<usize, Versions>,
}

#[derive(Default, Clone)]
struct Versions {
    ids: Vec<u8>,
    /// How many of them are complete, and how many are flushed.
    complete: usize,
    flushed: usize,
}

impl Oracle {
    fn begin(&mut self, sectors: std::ops::Range<usize>, id: u8) {
        for sector in sectors {
            self.sectors.entry(sector).or_default().ids.push(id);
        }
    }

    fn done(&mut self, sectors: std::ops::Range<usize>, durable: bool) {
        for sector in sectors {
            let versions = self.sectors.get_mut(&sector).unwrap();
            versions.complete = versions.ids.len();
            if durable {
                versions.flushed = versions.complete;
            }
        }
    }

    fn complete(&self) -> HashMap<usize, usize> {
        self.sectors.iter().map(|(sector, v)| (*sector, v.complete)).collect()
    }

    fn flushed(&mut self, complete: HashMap<usize, usize>) {
        for (sector, complete) in complete {
            let versions = self.sectors.get_mut(&sector).unwrap();
            versions.flushed = versions.flushed.max(complete);
        }
    }

    /// Whether `bytes` are allowed after a power cut. `before` is what the image held before the first write.
    pub fn check(&self, before: &[u8], bytes: &[u8]) -> Result<(), String> {
        for (sector, found) in bytes.chunks_exact(SECTOR).enumerate() {
            let old = &before[sector * SECTOR..][..SECTOR];
            let allowed = match self.sectors.get(&sector) {
                None => found == old,
                Some(v) => {
                    let from = v.flushed.saturating_sub(1);
                    (v.flushed == 0 && found == old) || v.ids[from..].iter().any(|&id| found == [id; SECTOR])
                }
            };
            if !allowed {
                let versions = self.sectors.get(&sector).map(|v| (&v.ids, v.flushed));
                return Err(format!("sector {sector} holds {}.., of {versions:?}", found[0]));
            }
        }
        Ok(())
    }

    /// What the image holds when everything is complete.
    pub fn apply(&self, before: &[u8]) -> Vec<u8> {
        let mut bytes = before.to_vec();
        for (sector, v) in self.sectors.iter().filter(|(_, v)| v.complete > 0) {
            bytes[sector * SECTOR..][..SECTOR].fill(v.ids[v.complete - 1]);
        }
        bytes
    }
}

/// A place to write at: often the same few, often across the border of two regions.
pub fn some_place(rng: &mut Rng) -> (usize, usize) {
    let len = (1 + rng.below(12)) * SECTOR;
    let base = match rng.below(4) {
        0 => REGION - 6 * SECTOR,
        1 => SIZE - 20 * SECTOR,
        _ => rng.below(SIZE / SECTOR) * SECTOR,
    };
    ((base + rng.below(8) * SECTOR).min(SIZE - len), len)
}
