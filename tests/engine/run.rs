//! One random run of the engine: requests, snapshots, deletions, cutovers, in an order that a seed decides, each held
//! against the specification.

mod growing;
mod noted;
mod reading;
mod stored;

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use halfsilver::engine::{
    Attachment, Backing, ChainEditor, Disk, DiskOptions, Epoch, EpochClock, EpochLane, Layer, LegImage, LegState,
    NewLayer, Pair, PreparedSnapshot, Request, RetireError, Ticket, Version, Writers,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, Image, IoQueue};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::store::{BlockIndex, Pack, Table};

use crate::sim::{self, Rng, SECTOR, Scheduler, SimImage};
use crate::world::{Array, Counts, Tags, World, filled};

const VERSIONS_MAX: usize = 8;
/// Old requests that stay for long.
const HELD_MAX: usize = 3;
const FRONTENDS_MAX: usize = 4;
const LANES: usize = 2;

/// What the disk of a run is made of.
#[derive(Clone, Copy)]
pub struct Shape {
    block: usize,
    live_alignment: u32,
    /// Of every frozen image; None: each cut gets one of its own choice.
    frozen_alignment: Option<u32>,
    faults: bool,
    strategies: Strategies,
    /// Whether the full image is a pair of legs. Otherwise a second leg is made for each split.
    pair: bool,
    /// Of so many layers in a hundred the blocks lie in packs.
    packed: usize,
}

/// Which strategy the cuts of a run have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strategies {
    CopyOnWrite,
    WriteLogging,
    WriteMirroring,
    Mixed,
}

/// What one cut does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Strategy {
    CopyOnWrite,
    WriteLogging,
    WriteMirroring,
}

impl Shape {
    /// Seeds take turns, so that every combination comes up within a few hundred of them.
    pub fn of(seed: u64) -> Shape {
        let block = [4096, 4096, 8192, 4096, 65536, 4096, 16384][usize::try_from(seed % 7).unwrap()];
        let (live_alignment, frozen_alignment) =
            [(512, Some(512)), (512, None), (512, Some(4096)), (4096, None), (4096, Some(4096))]
                [usize::try_from(seed % 5).unwrap()];
        let strategies = match seed % 8 {
            0 => Strategies::CopyOnWrite,
            1 => Strategies::WriteLogging,
            2 => Strategies::WriteMirroring,
            _ => Strategies::Mixed,
        };
        let faults = seed % 3 == 2;
        // What becomes of legs that fail is for `tests/legs`.
        let pair = !faults && matches!(strategies, Strategies::WriteMirroring | Strategies::Mixed) && seed % 11 < 6;
        // All sparse, all packed, or both in a chain.
        let packed = [0, 50, 0, 100][usize::try_from(seed % 4).unwrap()];
        Shape { block, live_alignment, frozen_alignment, faults, strategies, pair, packed }
    }

    fn table(self, sectors: usize) -> Table {
        Disk::table_in_memory((sectors * SECTOR) as u64, u32::try_from(self.block).unwrap()).unwrap()
    }
}

fn frontend(disk: &Arc<Disk>) -> (Attachment, Vec<EpochLane>) {
    let attachment = disk.attach_live().connect();
    let lanes = (0..LANES).map(|_| attachment.lane()).collect();
    (attachment, lanes)
}

/// Goes on with everything until this is done.
fn wait<T: 'static>(scheduler: &mut Scheduler, rng: &mut Rng, future: impl Future<Output = T> + 'static) -> T {
    let answer = Rc::new(RefCell::new(None));
    let put = answer.clone();
    scheduler.spawn(async move {
        let done = future.await;
        *put.borrow_mut() = Some(done);
    });
    loop {
        if let Some(done) = answer.borrow_mut().take() {
            return done;
        }
        assert!(scheduler.step(rng), "it is never done");
    }
}

async fn new_pair(first: SimImage, shape: Shape, queue: IoQueue) -> Arc<Pair> {
    let (size, block_bytes) = (first.size_bytes(), u32::try_from(shape.block).unwrap());
    let bitmap = SimImage::new("bitmap", usize::try_from(Pair::bitmap_bytes(size, block_bytes)).unwrap(), 512);
    let first = LegImage { id: uuid::Uuid::from_u128(1), image: Arc::new(first) };
    Pair::create(first, Arc::new(bitmap), uuid::Uuid::from_u128(2), block_bytes, &queue).await.unwrap()
}

/// One random run.
pub struct Run {
    pub rng: Rng,
    world: Rc<RefCell<World>>,
    pub scheduler: Scheduler,
    pub queue: IoQueue,
    pub clock: EpochClock,
    pub editor: Arc<ChainEditor>,
    disk: Arc<Disk>,
    /// Frontends, each with its ways into the epochs.
    frontends: Vec<(Attachment, Vec<EpochLane>)>,
    /// What the housekeeping of the daemon enters by.
    lane: EpochLane,
    live_image: SimImage,
    /// The live version's legs, if it has legs. The first one is the live image.
    pair: Option<Arc<Pair>>,
    lacks_leg: bool,
    sectors: usize,
    cuts: Vec<(Epoch, Arc<Version>)>,
    shape: Shape,
    /// Requests may still come that belong to the epochs of these.
    held: Vec<Ticket>,
    noting: noted::Noting,
}

impl Run {
    pub fn new(seed: u64, shape: Shape) -> Run {
        sim::reset();
        let clock = EpochClock::new(Epoch(1));
        let editor = Arc::new(ChainEditor::new(clock.clone()));
        Run::beside(seed, shape, clock, editor)
    }

    /// One more disk of the same daemon.
    pub fn beside(seed: u64, shape: Shape, clock: EpochClock, editor: Arc<ChainEditor>) -> Run {
        let mut rng = Rng::new(seed);
        let blocks = if shape.block > 16384 { 1 + rng.below(3) } else { 3 + rng.below(8) };
        // The last block is short now and then, in whole units of the images (as a file's size has to be).
        let unit = shape.live_alignment.max(shape.frozen_alignment.unwrap_or(512)) as usize / SECTOR;
        let tail = rng.below(shape.block / SECTOR / unit) * unit;
        let sectors = blocks * shape.block / SECTOR + tail;
        let live_image = SimImage::new("live", sectors * SECTOR, shape.live_alignment);
        let (mut scheduler, queue) = (Scheduler::default(), IoQueue::simulated());
        let pair = shape.pair.then(|| {
            let pair = new_pair(live_image.clone(), shape, queue.clone());
            wait(&mut scheduler, &mut rng, pair)
        });
        let one = || Backing::One(Arc::new(live_image.clone()));
        let options = DiskOptions {
            image: pair.clone().map_or_else(one, Backing::Pair),
            block_bytes: u32::try_from(shape.block).unwrap(),
            read_only: false,
            discards: Arc::new(shape.table(sectors)),
        };
        let disk = Disk::new(clock.clone(), options);
        let first = Array { key: 0, ended: None, version: None, sectors: vec![Tags::from([0]); sectors] };
        let world = World { arrays: vec![first], next: 1, ..World::default() };
        let mut run = Run {
            rng,
            world: Rc::new(RefCell::new(world)),
            scheduler,
            queue,
            pair,
            lacks_leg: true,
            frontends: vec![frontend(&disk)],
            lane: clock.lane(),
            editor,
            clock,
            disk,
            live_image,
            sectors,
            cuts: Vec::new(),
            shape,
            held: Vec::new(),
            noting: noted::Noting::of(seed),
        };
        run.add_leg();
        run
    }

    fn range(&mut self) -> Range<usize> {
        let first = self.rng.below(self.sectors);
        let room = self.sectors - first;
        let block = self.shape.block / SECTOR;
        let longest = if self.rng.chance(70) { block + 2 } else { 5 * block };
        let mut range = first..first + 1 + self.rng.below(room.min(longest));
        if self.rng.chance(35) {
            range.start = range.start / block * block; // Whole blocks.
            range.end = range.end.next_multiple_of(block).min(self.sectors);
        }
        range
    }

    fn submit(&mut self) {
        let range = self.range();
        let frontend = self.rng.below(self.frontends.len());
        let old = !self.held.is_empty() && self.rng.chance(30);
        let ticket = match old {
            true => self.held[self.rng.below(self.held.len())].again(),
            false => self.frontends[frontend].1[self.rng.below(LANES)].enter(),
        };
        if !old && self.held.len() < HELD_MAX && self.rng.chance(4) {
            self.held.push(ticket.again());
        }
        let epoch = ticket.epoch();
        self.world.borrow_mut().counts.held += u64::from(old && self.clock.current() != epoch);
        let (world, live, queue) = (self.world.clone(), self.frontends[frontend].0.clone(), self.queue.clone());
        let at = ByteOffset((range.start * SECTOR) as u64);
        let len = (range.len() * SECTOR) as u64;
        world.borrow_mut().counts.operations += 1;
        let kind = self.rng.below(100);
        if kind < 25 {
            let keys = self.shown_to(epoch);
            let id = world.borrow_mut().begin_read(keys, range.clone());
            self.scheduler.spawn(async move {
                let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(usize::try_from(len).unwrap()));
                let done = live.execute(&queue, &ticket, Request::Read { at, into }).await;
                let mut world = world.borrow_mut();
                match done {
                    Ok(()) => world.end_read(id, &memory.to_vec(), "live read"),
                    Err(e) => world.fail(format!("live read failed: {e}")),
                }
                drop(ticket);
            });
            return;
        }
        let (request, tag, discard) = match kind {
            25..80 => {
                let tag = world.borrow().next + 1;
                (Request::Write { at, from: filled(range.len(), tag), durable: self.rng.chance(10) }, tag, false)
            }
            80..88 => {
                let (unmap, durable) = (self.rng.chance(50), self.rng.chance(10));
                (Request::WriteZeroes { at, len, unmap, durable }, 0, false)
            }
            88..96 => (Request::Discard { at, len }, 0, true),
            _ => (Request::Flush, 0, true),
        };
        let is_flush = matches!(request, Request::Flush);
        let id = (!is_flush).then(|| world.borrow_mut().begin_change(epoch, range, tag, discard));
        world.borrow_mut().counts.discards += u64::from(discard && !is_flush);
        let clock = self.clock.clone();
        let disk = self.disk.clone();
        self.scheduler.spawn(async move {
            let draining = clock.current() != epoch;
            let deferred = disk.discards().count();
            let done = live.execute(&queue, &ticket, request).await;
            let mut world = world.borrow_mut();
            world.counts.draining_changes += u64::from(draining);
            world.counts.deferred += disk.discards().count().saturating_sub(deferred);
            if let Err(e) = done {
                world.fail(format!("a guest's request failed: {e}"));
            }
            if let Some(id) = id {
                world.end_change(id);
            }
            drop(ticket);
        });
    }

    /// The versions that a guest's read of `epoch` may show: its own. If that one breaks, the next newer one.
    fn shown_to(&self, epoch: Epoch) -> Vec<u64> {
        let versions = if self.shape.faults { VERSIONS_MAX } else { 1 };
        let world = self.world.borrow();
        world.arrays.iter().filter(|a| a.sees(epoch)).take(versions).map(|a| a.key).collect()
    }

    pub fn has_room(&self) -> bool {
        self.world.borrow().arrays.len() < VERSIONS_MAX
    }

    fn cut(&mut self) {
        self.make_room_in_the_clock();
        if self.has_room() {
            let prepared = self.prepare_cut();
            let writers = if self.rng.chance(35) { Writers::Connection } else { Writers::Request };
            let cut = self.editor.cut(vec![prepared], writers).unwrap();
            self.world.borrow_mut().counts.by_connection += u64::from(writers == Writers::Connection);
            self.note_cut(cut.ended, cut.frozen[0].clone());
        }
    }

    fn strategy(&mut self) -> Strategy {
        let can_split = self.pair.is_none() || self.legs_are_equal();
        match self.shape.strategies {
            // While a log lies above the full image there is nothing else to do.
            _ if !self.disk.can_move_pivot() => Strategy::WriteLogging,
            Strategies::CopyOnWrite => Strategy::CopyOnWrite,
            Strategies::WriteLogging => Strategy::WriteLogging,
            Strategies::WriteMirroring if can_split => Strategy::WriteMirroring,
            Strategies::WriteMirroring => Strategy::CopyOnWrite,
            Strategies::Mixed => match self.rng.below(100) {
                75..100 if can_split => Strategy::WriteMirroring,
                0..40 => Strategy::CopyOnWrite,
                _ => Strategy::WriteLogging,
            },
        }
    }

    pub fn prepare_cut(&mut self) -> PreparedSnapshot {
        let layer = match self.strategy() {
            Strategy::WriteMirroring => self.split(),
            Strategy::CopyOnWrite => {
                let (image, backing) = self.new_backing("frozen");
                if self.shape.faults && self.rng.chance(25) {
                    self.make_faulty(&image);
                }
                let table = Arc::new(self.shape.table(self.sectors));
                let (image, durable) = (backing, self.rng.chance(30));
                let layer = if durable { self.saved(image, table) } else { Layer::of(image, table) };
                NewLayer::Frozen { layer }
            }
            // A log that cannot be written is the guest's trouble, so no faults.
            Strategy::WriteLogging => {
                self.world.borrow_mut().counts.logs += 1;
                let image = self.new_backing("log").1;
                let table = Arc::new(self.shape.table(self.sectors));
                let durable = self.rng.chance(30);
                let layer = if durable { self.durable_log(image, table) } else { Layer::of(image, table) };
                NewLayer::Live { layer }
            }
        };
        let new_live = uuid::Uuid::from_u128(u128::from(self.rng.next()));
        PreparedSnapshot { disk: self.disk.clone(), layer, new_live, changed: self.changed_table() }
    }

    fn new_image(&mut self, name: &str) -> SimImage {
        let size = self.sectors * SECTOR;
        // A file that needs 4 KiB has a size in whole 4 KiB; others are used through the page cache.
        let choice = if size.is_multiple_of(4096) && self.rng.chance(50) { 4096 } else { 512 };
        SimImage::new(name, size, self.shape.frozen_alignment.unwrap_or(choice))
    }

    /// A new image for a layer, sparse or packed.
    fn new_backing(&mut self, name: &str) -> (SimImage, Backing) {
        let (size, block) = ((self.sectors * SECTOR) as u64, u32::try_from(self.shape.block).unwrap());
        if self.shape.packed == 0 || !self.rng.chance(self.shape.packed) {
            let image = self.new_image(name);
            return (image.clone(), Backing::One(Arc::new(image)));
        }
        self.world.borrow_mut().counts.packs += 1;
        let bytes = usize::try_from(Pack::image_bytes(size, block).unwrap()).unwrap();
        let image = SimImage::new(name, bytes, if self.rng.chance(50) { 4096 } else { 512 });
        let (of, queue, name) = (Arc::new(image.clone()), self.queue.clone(), uuid::Uuid::from_u128(1));
        let made = async move { Pack::create(of, (name, name), (size, block), &queue).await.unwrap() };
        (image, Backing::Packed(Arc::new(wait(&mut self.scheduler, &mut self.rng, made))))
    }

    fn make_faulty(&mut self, image: &SimImage) {
        self.world.borrow_mut().any_fault = true;
        let errno = if self.rng.chance(50) { libc::ENOSPC } else { libc::EIO };
        match self.rng.chance(30) {
            true => image.fail_syncs(errno),
            false => image.fail_writes(errno, self.rng.below(6)),
        }
    }

    /// Adds a second leg, which is made equal while the guests go on.
    fn add_leg(&mut self) {
        let Some(pair) = self.pair.clone() else { return };
        self.lacks_leg = false;
        let image = SimImage::new("leg", self.sectors * SECTOR, self.shape.live_alignment);
        let leg = LegImage { id: uuid::Uuid::from_u128(u128::from(self.rng.next())), image: Arc::new(image) };
        let (queue, disk, world) = (self.queue.clone(), self.disk.clone(), self.world.clone());
        self.scheduler.spawn(async move {
            pair.attach(&queue, leg, true).await.unwrap();
            let done = job::resync(queue, disk, pair, Arc::new(Pace::default())).await;
            if !matches!(done, Ok(Outcome::Done)) {
                world.borrow_mut().fail(format!("a leg is not made equal: {done:?}"));
            }
        });
    }

    fn legs_are_equal(&self) -> bool {
        self.pair
            .as_ref()
            .is_some_and(|pair| pair.status().iter().filter(|leg| leg.state == LegState::InSync).count() == 2)
    }

    fn split(&mut self) -> NewLayer {
        self.world.borrow_mut().counts.splits += 1;
        match self.pair.clone() {
            Some(pair) => self.split_pair(pair),
            None => self.split_copy(),
        }
    }

    /// Splits legs that were kept equal, with whatever is in flight.
    fn split_pair(&mut self, pair: Arc<Pair>) -> NewLayer {
        let (queue, prepared) = (self.queue.clone(), pair.clone());
        wait(&mut self.scheduler, &mut self.rng, async move { prepared.prepare_split(&queue).await.unwrap() });
        self.world.borrow_mut().counts.splits_of_pairs += 1;
        let frozen = Backing::One(pair.second().unwrap().image);
        let live = pair.detached().unwrap();
        (self.pair, self.lacks_leg) = (Some(live.clone()), true);
        NewLayer::Split { frozen, live: Backing::Pair(live) }
    }

    /// Makes the second leg at a moment without anything in flight.
    fn split_copy(&mut self) -> NewLayer {
        while self.scheduler.step(&mut self.rng) {}
        let leg = self.live_image.copy("leg");
        let (frozen, live) = match self.rng.chance(50) {
            true => (self.live_image.clone(), leg),
            false => (leg, self.live_image.clone()),
        };
        self.live_image = live.clone();
        if self.shape.faults && self.rng.chance(25) {
            self.make_faulty(&frozen);
        }
        NewLayer::Split { frozen: Backing::One(Arc::new(frozen)), live: Backing::One(Arc::new(live)) }
    }

    /// Each epoch has a slot for those inside; requests that stay for long must let go of theirs some time.
    pub fn make_room_in_the_clock(&mut self) {
        if self.clock.room().is_err() {
            self.held.clear();
        }
    }

    fn cut_over(&mut self) {
        self.make_room_in_the_clock();
        if !self.cuts.is_empty() && self.clock.room().is_ok() {
            let ended = self.cuts[self.rng.below(self.cuts.len())].0;
            let moved = self.editor.cut_over(&[&self.disk], ended).unwrap();
            self.world.borrow_mut().counts.moved += moved as u64;
        }
    }

    fn connect_or_leave(&mut self) {
        if self.frontends.len() < FRONTENDS_MAX && self.rng.chance(60) {
            self.frontends.push(frontend(&self.disk));
        } else if self.frontends.len() > 1 {
            drop(self.frontends.swap_remove(self.rng.below(self.frontends.len())));
        }
    }

    pub fn note_cut(&mut self, ended: Epoch, version: Arc<Version>) {
        let mut world = self.world.borrow_mut();
        world.counts.cuts += 1;
        let in_flight: Vec<u64> = world.changes.iter().map(|change| change.id).collect();
        world.written.iter_mut().filter(|w| in_flight.contains(&w.id)).for_each(|w| w.is_late = true);
        if std::env::var_os("ORACLE_TRACE").is_some() {
            println!("cut ends epoch {ended}, can move {}", self.disk.can_move_pivot());
        }
        world.next += 1;
        let key = world.next;
        let mut live = world.arrays.last().unwrap().clone();
        let frozen = world.arrays.last_mut().unwrap();
        frozen.ended = Some(ended);
        frozen.version = Some(version.clone());
        let old_key = std::mem::replace(&mut live.key, key);
        world.arrays.push(live);
        // A read that runs across the cut shows its own version to the end, unless that may break.
        let running = world.watches.iter_mut().filter(|w| w.keys.contains(&old_key));
        running.filter(|_| self.shape.faults).for_each(|w| w.keys.push(key));
        self.cuts.push((ended, version));
    }

    /// What the daemon does in the background: declares drained versions quiesced.
    fn quiesce(&mut self) {
        let (clock, disk) = (self.clock.clone(), self.disk.clone());
        self.cuts.retain(|(ended, version)| {
            let last = disk.connections().wait_free(*ended, Duration::ZERO);
            let drained = last.is_some_and(|last| clock.is_drained(last));
            if drained {
                version.set_quiesced();
            }
            !drained
        });
        // Not before it has drained: until then old requests write to the leg that was split.
        if self.cuts.is_empty() && self.lacks_leg && self.rng.chance(20) {
            self.add_leg();
        }
    }

    /// Lets a quiesced version go, as the daemon's job does.
    fn delete(&mut self) {
        let candidates: Vec<(usize, Arc<Version>)> = self
            .world
            .borrow()
            .arrays
            .iter()
            .enumerate()
            .filter_map(|(i, a)| Some((i, a.version.clone()?)))
            .filter(|(_, v)| v.is_quiesced() && !v.is_retiring())
            .collect();
        if candidates.is_empty() {
            return;
        }
        let (index, version) = candidates[self.rng.below(candidates.len())].clone();
        self.make_room_in_the_clock();
        if self.clock.room().is_err() {
            return;
        }
        self.leave_mark(&version);
        let ended = match self.editor.begin_retire(&self.disk, &version) {
            Ok(ended) => ended,
            Err(RetireError::Busy) => return,
            Err(e) => panic!("{e}"),
        };
        let chain = self.disk.chain();
        let at = chain.position(version.id).unwrap();
        if std::env::var_os("ORACLE_TRACE").is_some() {
            let began: Vec<_> = chain.links().iter().map(|l| l.version.began.0).collect();
            println!("delete {at} of {began:?}, pivot {}", chain.pivot_of(at));
        }
        self.world.borrow_mut().counts.folds += u64::from(at == chain.pivot_of(at));
        self.world.borrow_mut().counts.deletes_in_the_middle += u64::from(index > 0);
        let (world, queue) = (self.world.clone(), self.queue.clone());
        let (disk, editor) = (self.disk.clone(), self.editor.clone());
        let (lane, block) = (self.clock.lane(), self.shape.block as u64);
        self.scheduler.spawn(async move {
            let pace = Arc::new(Pace::default());
            let done = job::retire(queue.clone(), editor, disk.clone(), version.clone(), ended, pace).await;
            if done != Ok(Outcome::Done) {
                return world.borrow_mut().fail(format!("a deletion ended with {done:?}"));
            }
            {
                let mut world = world.borrow_mut();
                let gone = world.arrays.iter().find(|a| a.version.as_ref().is_some_and(|v| v.id == version.id));
                let gone = gone.map(|a| noted::moment_of(&version, a.ended.unwrap(), a.sectors.clone()));
                world.marks.extend(gone.filter(|_| version.leaves_mark()));
                world.arrays.retain(|a| a.version.as_ref().is_none_or(|v| v.id != version.id));
                world.counts.deletes += 1;
                let p = version.preserved_blocks.load(std::sync::atomic::Ordering::Relaxed);
                let b = version.preserved_bytes.load(std::sync::atomic::Ordering::Relaxed);
                world.counts.preserved_blocks += p;
                world.counts.holes_kept += u64::from(b < p * block);
            }
            let mut at = BlockIndex(0);
            loop {
                let ticket = lane.enter();
                match disk.carry_out_discard(&queue, &ticket, at, 2).await {
                    Ok(Some(next)) => at = next,
                    Ok(None) => break,
                    Err(e) => return world.borrow_mut().fail(format!("carrying out discards: {e}")),
                }
            }
        });
    }

    fn failure(&self) -> Option<String> {
        self.world.borrow().failure.clone()
    }

    fn check_broken_only_where_faulty(&mut self) {
        let world = &mut *self.world.borrow_mut();
        let any_fault = world.any_fault;
        let mut wrong = Vec::new();
        for array in &world.arrays {
            if let Some(reason) = array.version.as_ref().and_then(|v| v.broken()) {
                world.counts.broken += 1;
                if !any_fault {
                    wrong.push(format!("version {} broke without a fault: {reason}", array.key));
                }
            }
        }
        wrong.into_iter().for_each(|w| world.fail(w));
    }

    pub fn step(&mut self) -> Result<(), String> {
        match self.rng.below(100) {
            0..45 => self.submit(),
            45..50 => self.cut(),
            50..60 => self.read_frozen(),
            60..62 => self.delete(),
            62..64 => self.connect_or_leave(),
            64 => self.cut_over(),
            67 => self.grow(),
            65..67 if !self.held.is_empty() => drop(self.held.swap_remove(self.rng.below(self.held.len()))),
            _ => {}
        }
        for _ in 0..self.rng.below(9) {
            self.scheduler.step(&mut self.rng);
        }
        self.quiesce();
        self.forget_mark();
        self.sometimes_compare_moments();
        self.failure().map_or(Ok(()), Err)
    }

    pub fn run(mut self, steps: usize) -> Result<Counts, String> {
        for _ in 0..steps {
            self.step()?;
        }
        self.finish()
    }

    /// No request comes any more that belongs to an old epoch.
    pub fn rest(&mut self) {
        self.held.clear();
        self.frontends.truncate(1);
        if let Some((ended, _)) = self.cuts.last() {
            self.editor.cut_over(&[&self.disk], *ended).unwrap();
        }
    }

    pub fn settle(&mut self) -> Result<(), String> {
        self.rest();
        if !self.scheduler.settle(&mut self.rng) {
            return Err(format!("{} tasks hang", self.scheduler.tasks()));
        }
        self.quiesce();
        self.failure().map_or(Ok(()), Err)
    }

    /// Everything ends; every version is read whole; then all snapshots go, and one raw image is left.
    pub fn finish(mut self) -> Result<Counts, String> {
        self.settle()?;
        if !self.cuts.is_empty() {
            return Err("a version does not drain".to_owned());
        }
        self.check_broken_only_where_faulty();
        let frozen: Vec<(u64, Arc<Version>)> =
            self.world.borrow().arrays.iter().filter_map(|a| Some((a.key, a.version.clone()?))).collect();
        for (key, version) in frozen {
            let sectors = self.world.borrow().size_of(key);
            self.spawn_frozen_read(key, version, 0..sectors);
        }
        self.settle()?;
        // What they have shown is settled now, of discards too.
        self.compare_moments();
        while self.world.borrow().arrays.len() > 1 {
            self.delete();
            self.settle()?;
            self.compare_moments();
        }
        self.forget_marks();
        if self.disk.chain().version(0).changed().is_some() {
            return Err("changes are noted although nobody can ask".to_owned());
        }
        let discards = self.disk.discards().count();
        let mut world = self.world.borrow_mut();
        if discards > 0 {
            return Err(format!("{discards} discards were never carried out"));
        }
        let key = world.arrays[0].key;
        let id = world.begin_read(vec![key], 0..self.sectors);
        world.end_read(id, &self.live_image.bytes(), "the raw image in the end");
        match world.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(world.counts.clone()),
        }
    }
}
