//! One pack through several lives, held against what was written to each block.
//!
//! Checked: what was synced before a power cut is there, what was answered before a kill is there, a block shows one of its
//! writes whole, and reads meanwhile show what was written before them or since. Not checked: threads.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, Image, IoBuf, IoQueue};
use halfsilver::store::{Believed, Pack};
use uuid::Uuid;

use crate::media::{self, Medium, Op, SECTOR, Scheduler};
use crate::schedule::Rng;

const LIVES: usize = 5;
const STEPS: usize = 150;
const SEEDS: u64 = 400;
pub const ID: Uuid = Uuid::from_u128(7);
pub const KEY: Uuid = Uuid::from_u128(99);

/// What was written to a block, in order; 0 is zeros.
#[derive(Clone)]
struct Block {
    tags: Vec<u64>,
    /// The last one that was answered.
    answered: usize,
    /// The last one that is known to be on stable storage.
    stored: usize,
}

#[derive(Default)]
struct Counts {
    writes: u64,
    zeros: u64,
    reads: u64,
    syncs: u64,
    refused: u64,
    kills: u64,
    cuts: u64,
    lost: u64,
}

struct World {
    blocks: Vec<Block>,
    busy: BTreeSet<usize>,
    last_tag: u64,
    counts: Counts,
    failure: Option<String>,
}

struct Life {
    rng: Rng,
    block_bytes: usize,
    size: usize,
    medium: Medium,
    pack: Arc<Pack>,
    queue: IoQueue,
    world: Rc<RefCell<World>>,
}

pub fn filled(len: usize, tags: &[(u64, usize)]) -> AlignedBuf {
    let mut bytes = AlignedBuf::zeroed(len);
    let mut at = 0;
    for &(tag, len) in tags {
        bytes[at..at + len].chunks_mut(8).for_each(|w| w.copy_from_slice(&tag.to_le_bytes()));
        at += len;
    }
    bytes
}

impl Life {
    fn begin(seed: u64) -> Life {
        let mut rng = Rng::new(seed);
        let block_bytes = [4096, 4096, 8192][rng.below(3)];
        let blocks = 2 + rng.below(40);
        let size = blocks * block_bytes - rng.below(block_bytes / SECTOR) * SECTOR;
        let shape = (size as u64, u32::try_from(block_bytes).unwrap());
        let image_bytes = Pack::image_bytes(shape.0, shape.1).unwrap();
        let medium = Medium::new("pack", usize::try_from(image_bytes).unwrap());
        let medium = if rng.chance(20) { medium.without_holes() } else { medium };
        let (image, queue) = (Arc::new(medium.clone()), IoQueue::simulated());
        let used = queue.clone();
        let pack = media::run(&mut rng, async move { Pack::create(image, (ID, KEY), shape, &used).await.unwrap() });
        let blocks = vec![Block { tags: vec![0], answered: 0, stored: 0 }; blocks];
        let world = World { blocks, busy: BTreeSet::new(), last_tag: 0, counts: Counts::default(), failure: None };
        let world = Rc::new(RefCell::new(world));
        Life { rng, block_bytes, size, medium, pack: Arc::new(pack), queue, world }
    }

    fn bytes(&self, first: usize, count: usize) -> (ByteOffset, usize) {
        let at = first * self.block_bytes;
        (ByteOffset(at as u64), ((first + count) * self.block_bytes).min(self.size) - at)
    }

    fn range(&mut self) -> (usize, usize) {
        let blocks = self.world.borrow().blocks.len();
        let first = self.rng.below(blocks);
        let most = if self.rng.chance(70) { 3 } else { blocks };
        (first, 1 + self.rng.below(most.min(blocks - first)))
    }

    fn submit(&mut self, scheduler: &mut Scheduler) {
        match self.rng.below(100) {
            0..60 => self.change(scheduler, false),
            60..72 => self.change(scheduler, true),
            72..92 => self.read(scheduler),
            _ => self.sync(scheduler),
        }
    }

    fn change(&mut self, scheduler: &mut Scheduler, is_zero: bool) {
        let (first, count) = self.range();
        let (at, len) = self.bytes(first, count);
        let mut world = self.world.borrow_mut();
        if (first..first + count).any(|block| world.busy.contains(&block)) {
            return;
        }
        let mut tags = Vec::new();
        for block in first..first + count {
            world.last_tag += 1;
            let tag = if is_zero { 0 } else { world.last_tag };
            world.busy.insert(block);
            world.blocks[block].tags.push(tag);
            tags.push((tag, self.bytes(block, 1).1));
        }
        drop(world);
        let durable = self.rng.chance(5);
        let buf = match self.rng.below(3) {
            0 => IoBuf::Owned(filled(len, &tags)),
            1 => IoBuf::Shared(Arc::new(filled(len, &tags)), 0..len),
            _ => IoBuf::Guest(GuestBuf::from_owned(filled(len, &tags)).0),
        };
        let (pack, queue, world) = (self.pack.clone(), self.queue.clone(), self.world.clone());
        scheduler.spawn(async move {
            let done = match is_zero {
                true => pack.zero(&queue, at, len as u64).await,
                false => pack.write(&queue, at, buf, durable).await,
            };
            let mut world = world.borrow_mut();
            world.counts.writes += u64::from(!is_zero);
            world.counts.zeros += u64::from(is_zero);
            world.counts.refused += u64::from(done.is_err());
            for block in first..first + count {
                world.busy.remove(&block);
                // Until it is written again one that was refused may show either.
                if done.is_ok() {
                    let block = &mut world.blocks[block];
                    block.answered = block.tags.len() - 1;
                    block.stored = if durable && !is_zero { block.answered } else { block.stored };
                }
            }
        });
    }

    fn read(&mut self, scheduler: &mut Scheduler) {
        let (first, count) = self.range();
        let (at, len) = self.bytes(first, count);
        let from: Vec<usize> = self.world.borrow().blocks[first..first + count].iter().map(|b| b.answered).collect();
        let (pack, queue, world, block_bytes) =
            (self.pack.clone(), self.queue.clone(), self.world.clone(), self.block_bytes);
        let is_guest = self.rng.chance(50);
        scheduler.spawn(async move {
            let (guest, memory) = GuestBuf::from_owned(filled(len, &[(u64::MAX, len)]));
            let into = if is_guest { IoBuf::Guest(guest) } else { IoBuf::Owned(filled(len, &[(u64::MAX, len)])) };
            let done = pack.read(&queue, at, into).await;
            let mut world = world.borrow_mut();
            world.counts.reads += 1;
            let bytes = match done {
                Ok(IoBuf::Owned(bytes)) => bytes.to_vec(),
                Ok(_) => memory.to_vec(),
                Err(e) => {
                    world.failure.get_or_insert(format!("a read failed: {e}"));
                    return;
                }
            };
            for (i, bytes) in bytes.chunks(block_bytes).enumerate() {
                let block = &world.blocks[first + i];
                if tag_of(bytes).is_none_or(|tag| !block.tags[from[i]..].contains(&tag)) {
                    let what = format!("block {} shows {:?} of {:?}", first + i, tag_of(bytes), &block.tags[from[i]..]);
                    world.failure.get_or_insert(what);
                }
            }
        });
    }

    fn sync(&mut self, scheduler: &mut Scheduler) {
        let answered: Vec<usize> = self.world.borrow().blocks.iter().map(|b| b.answered).collect();
        let (pack, queue, world) = (self.pack.clone(), self.queue.clone(), self.world.clone());
        scheduler.spawn(async move {
            if pack.sync(&queue).await.is_ok() {
                let mut world = world.borrow_mut();
                world.counts.syncs += 1;
                for (block, answered) in world.blocks.iter_mut().zip(answered) {
                    block.stored = block.stored.max(answered);
                }
            }
        });
    }

    fn live(&mut self, faults: bool) -> Result<(), String> {
        let mut scheduler = Scheduler::default();
        for step in 0..STEPS {
            if faults && step == STEPS / 2 {
                let after = self.rng.below(10);
                self.medium.fail(Op::Write, after, libc::ENOSPC);
            }
            if step == 3 * STEPS / 4 {
                self.medium.heal();
            }
            if self.rng.chance(40) {
                self.submit(&mut scheduler);
            }
            for _ in 0..self.rng.below(6) {
                scheduler.step(&mut self.rng);
            }
        }
        if self.rng.chance(20) && !scheduler.settle(&mut self.rng) {
            return Err("a request is never answered".to_owned());
        }
        self.medium.heal();
        // While what is in flight is there.
        let is_kill = self.rng.chance(50);
        let left =
            if is_kill { self.medium.after_kill(&mut self.rng) } else { self.medium.after_power_cut(&mut self.rng) };
        drop(scheduler);
        if let Some(failure) = self.world.borrow_mut().failure.take() {
            return Err(failure);
        }
        self.take_up(left, is_kill)
    }

    /// The next life begins.
    fn take_up(&mut self, left: Medium, is_kill: bool) -> Result<(), String> {
        let shape = (self.size as u64, u32::try_from(self.block_bytes).unwrap());
        let believed = if is_kill { Believed::Arrived } else { Believed::Synced };
        let (image, queue, size) = (Arc::new(left.clone()), self.queue.clone(), self.size);
        let before = left.bytes();
        let looked = left.clone();
        let (pack, bytes) = media::run(&mut self.rng, async move {
            Pack::examine(image.clone(), ID, shape, believed, u64::MAX, &queue).await.unwrap();
            assert!(looked.bytes() == before, "who only looks changes nothing");
            let pack = Pack::open(image, ID, shape, believed, u64::MAX, &queue).await.unwrap();
            let all = pack.read(&queue, ByteOffset(0), IoBuf::Owned(AlignedBuf::zeroed(size))).await.unwrap();
            let IoBuf::Owned(bytes) = all else { panic!("another buffer") };
            (pack, bytes)
        });
        let mut world = self.world.borrow_mut();
        world.counts.kills += u64::from(is_kill);
        world.counts.cuts += u64::from(!is_kill);
        world.busy.clear();
        let mut lost = 0;
        for (i, (block, bytes)) in world.blocks.iter_mut().zip(bytes.chunks(self.block_bytes)).enumerate() {
            let from = if is_kill { block.answered } else { block.stored };
            let Some(tag) = tag_of(bytes).filter(|tag| block.tags[from..].contains(tag)) else {
                let end = if is_kill { "kill" } else { "power cut" };
                return Err(format!("after a {end} block {i} shows {:?} of {:?}", tag_of(bytes), &block.tags[from..]));
            };
            lost += u64::from(block.tags.last() != Some(&tag));
            // After a kill some of what is there may not be stored.
            let mut tags = if is_kill { block.tags[block.stored..].to_vec() } else { Vec::new() };
            tags.push(tag);
            let answered = tags.len() - 1;
            *block = Block { tags, answered, stored: if is_kill { 0 } else { answered } };
        }
        world.counts.lost += lost;
        drop(world);
        (self.medium, self.pack) = (left, Arc::new(pack));
        Ok(())
    }
}

pub fn tag_of(bytes: &[u8]) -> Option<u64> {
    let mut words = bytes.chunks(8).map(|w| u64::from_le_bytes(w.try_into().unwrap()));
    let first = words.next()?;
    words.all(|w| w == first).then_some(first)
}

fn run(seed: u64) -> Result<Counts, String> {
    let mut life = Life::begin(seed);
    for _ in 0..LIVES {
        life.live(seed.is_multiple_of(3))?;
    }
    Ok(std::mem::take(&mut life.world.borrow_mut().counts))
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|s| s.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

#[test]
fn what_was_written_is_there_through_many_lives() {
    let first = number("PACKS_FIRST").unwrap_or(0);
    let seeds = number("PACKS_SEEDS").unwrap_or(SEEDS);
    let mut all = Counts::default();
    for seed in first..first + seeds {
        let counts = run(seed).unwrap_or_else(|e| panic!("seed {seed} (PACKS_FIRST={seed} PACKS_SEEDS=1): {e}"));
        all.writes += counts.writes;
        all.zeros += counts.zeros;
        all.reads += counts.reads;
        all.syncs += counts.syncs;
        all.refused += counts.refused;
        all.kills += counts.kills;
        all.cuts += counts.cuts;
        all.lost += counts.lost;
    }
    let Counts { writes, zeros, reads, syncs, refused, kills, cuts, lost } = all;
    println!(
        "{writes} writes {zeros} zeros {reads} reads {syncs} syncs {refused} refused {kills} kills {cuts} cuts {lost} lost"
    );
    for count in [writes, zeros, reads, syncs, refused, kills, cuts, lost] {
        assert!(count > 0 || seeds < 100, "a rare state was never reached");
    }
}

#[test]
fn a_pack_is_recognised_and_its_damage_found() {
    let mut rng = Rng::new(1);
    let shape = (64 * 4096, 4096);
    let medium = Medium::new("pack", usize::try_from(Pack::image_bytes(shape.0, shape.1).unwrap()).unwrap());
    let (image, queue): (Arc<dyn Image>, _) = (Arc::new(medium.clone()), IoQueue::simulated());
    media::run(&mut rng, async move {
        drop(Pack::create(image.clone(), (ID, KEY), shape, &queue).await.unwrap());
        let open =
            async |id, shape| Pack::open(image.clone(), id, shape, Believed::Synced, u64::MAX, &queue).await.map(drop);
        open(ID, shape).await.unwrap();
        assert!(open(Uuid::from_u128(8), shape).await.unwrap_err().to_string().contains("something else"));
        assert!(open(ID, (shape.0 - 512, 4096)).await.is_err());
        for at in 0..68 {
            medium.damage(at);
            assert!(open(ID, shape).await.is_err(), "damage at {at} is not found");
            medium.damage(at);
        }
    });
}

#[test]
fn a_sector_that_cannot_be_read_takes_nothing_else_with_it() {
    const BLOCKS: usize = 64;
    let mut rng = Rng::new(1);
    let shape = ((BLOCKS * 4096) as u64, 4096);
    let medium = Medium::new("pack", usize::try_from(Pack::image_bytes(shape.0, shape.1).unwrap()).unwrap());
    let (image, queue): (Arc<dyn Image>, _) = (Arc::new(medium.clone()), IoQueue::simulated());
    media::run(&mut rng, async move {
        let pack = Pack::create(image.clone(), (ID, KEY), shape, &queue).await.unwrap();
        for block in 0..BLOCKS {
            let buf = IoBuf::Owned(filled(4096, &[(block as u64 + 1, 4096)]));
            pack.write(&queue, ByteOffset((block * 4096) as u64), buf, true).await.unwrap();
        }
        drop(pack);
        // The first block lies behind the first header.
        medium.rot(2 * 8 + 3);
        let pack = Pack::open(image.clone(), ID, shape, Believed::Synced, u64::MAX, &queue).await.unwrap();
        for block in 0..BLOCKS {
            let into = IoBuf::Owned(AlignedBuf::zeroed(4096));
            let read = pack.read(&queue, ByteOffset((block * 4096) as u64), into).await;
            match read {
                Ok(IoBuf::Owned(bytes)) => assert_eq!(tag_of(&bytes), Some(block as u64 + 1)),
                other => assert!(block == 0 && other.is_err(), "block {block}"),
            }
        }
        medium.rot(3 * 8);
        let opened = Pack::open(image, ID, shape, Believed::Synced, u64::MAX, &queue).await;
        assert!(opened.is_err(), "where a header can be, nobody knows what it said");
    });
}
