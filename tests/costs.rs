//! What a request and the taking up of a pack allocate, which no busy machine changes.
//!
//! Checked: the engine's part, that it does not grow unnoticed; that memory goes by what a pack has, as it is documented. Not
//! checked: rings and guests' memory; times, see benches/speed.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

use std::alloc::{GlobalAlloc, Layout as MemoryLayout, System};
use std::cell::Cell;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use halfsilver::engine::{
    Attachment, Backing, ChainEditor, Disk, DiskOptions, Epoch, EpochClock, EpochLane, Layer, Log, NewLayer,
    PreparedSnapshot, Request, VersionId, Writers,
};
use halfsilver::image::{
    AlignedBuf, Alignment, ByteOffset, GuestBuf, Image, IoQueue, OpKind, OpTicket, SharedImage, Unsynced,
};
use halfsilver::store::{Believed, DurableTable, PAYLOAD_BYTES, Pack, Table};
use uuid::Uuid;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    /// Bytes that are allocated, less those from before, and the most there were.
    static HELD: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: all of it is the system's allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        HELD.set(HELD.get() + layout.size());
        PEAK.set(PEAK.get().max(HELD.get()));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: MemoryLayout) {
        HELD.set(HELD.get().saturating_sub(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An image that does at once what it is asked, keeps nothing of it, and allocates nothing for it.
struct AtOnce {
    size_bytes: u64,
    unsynced: Unsynced,
}

impl AtOnce {
    fn backing(bytes: u64) -> SharedImage {
        Arc::new(AtOnce { size_bytes: bytes, unsynced: Unsynced::default() })
    }
}

impl Image for AtOnce {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: 512, memory_bytes: 1 }
    }
    fn start(&self, _queue: &IoQueue, ticket: OpTicket) {
        let done = ticket.len();
        if ticket.kind() == OpKind::Read {
            ticket.copy_in(&SEVENS[..done]);
        }
        ticket.finish(Ok(done));
    }
    fn path(&self) -> &Path {
        Path::new("at once")
    }
    fn is_poisoned(&self) -> bool {
        false
    }
    fn poison(&self) {}
    fn unsynced(&self) -> Option<&Unsynced> {
        Some(&self.unsynced)
    }
}

const BLOCK: u32 = 4096;
const SIZE: usize = 64 << 20;
/// Larger buffers are not kept to be used again.
const KEPT: usize = 512 << 10;

static SEVENS: [u8; 1 << 20] = [7; 1 << 20];

struct World {
    editor: Arc<ChainEditor>,
    disk: Arc<Disk>,
    queue: IoQueue,
    lane: EpochLane,
    attachment: Attachment,
}

fn table() -> Table {
    Disk::table_in_memory(SIZE as u64, BLOCK).unwrap()
}

fn image() -> Backing {
    Backing::One(AtOnce::backing(SIZE as u64))
}

impl World {
    fn new() -> World {
        let clock = EpochClock::new(Epoch(1));
        let options = DiskOptions { image: image(), block_bytes: BLOCK, read_only: false, discards: Arc::new(table()) };
        let disk = Disk::new(clock.clone(), options);
        let attachment = disk.attach_live();
        let lane = attachment.lane();
        let editor = Arc::new(ChainEditor::new(clock));
        World { editor, disk, queue: IoQueue::simulated(), lane, attachment }
    }

    fn cut(&self, layer: NewLayer) -> VersionId {
        let prepared =
            PreparedSnapshot { disk: self.disk.clone(), layer, new_live: VersionId::new_v4(), changed: None };
        let cut = self.editor.cut(vec![prepared], Writers::Request).unwrap();
        cut.frozen[0].set_quiesced();
        cut.frozen[0].id
    }

    fn cut_copy_on_write(&self) -> VersionId {
        self.cut(NewLayer::Frozen { layer: Layer::of(image(), Arc::new(table())) })
    }

    fn cut_to_log(&self) {
        let entries = Arc::new(table());
        let durable = AtOnce::backing(DurableTable::image_bytes(entries.blocks()));
        let made = DurableTable::create(durable, VersionId::nil(), entries, [0; PAYLOAD_BYTES], &self.queue);
        let log = Arc::new(Log { table: run(made).unwrap(), freed: table() });
        self.cut(NewLayer::Live { layer: Layer::logged(image(), log) });
    }

    /// How many allocations a request makes.
    fn on(&self, attachment: &Attachment, request: Request) -> usize {
        let ticket = self.lane.enter();
        let before = ALLOCATIONS.get();
        run(attachment.execute(&self.queue, &ticket, request)).unwrap();
        ALLOCATIONS.get() - before
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => answer,
        Poll::Pending => panic!("it waits"),
    }
}

fn buffer(bytes: usize) -> GuestBuf {
    GuestBuf::from_owned(AlignedBuf::zeroed(bytes)).0
}

fn write(at: u64, bytes: usize) -> Request {
    Request::Write { at: ByteOffset(at), from: buffer(bytes), durable: false }
}

fn read(at: u64, bytes: usize) -> Request {
    Request::Read { at: ByteOffset(at), into: buffer(bytes) }
}

/// The allocations of a request, when others of its kind have been before it.
fn cost_of(world: &World, attachment: &Attachment, request: impl Fn(u64, usize) -> Request, bytes: usize) -> usize {
    world.on(attachment, request(0, bytes));
    world.on(attachment, request(bytes as u64, bytes))
}

#[test]
fn requests_allocate_the_same_whatever_their_length() {
    for bytes in [4 << 10, 64 << 10, 1 << 20] {
        let plain = World::new();
        let live = &plain.attachment;
        let costs = [cost_of(&plain, live, write, bytes), cost_of(&plain, live, read, bytes)];
        assert_eq!(costs, [0, 0], "a write and a read of {bytes} bytes without a snapshot");

        let saving = World::new();
        let frozen = saving.disk.attach_frozen(saving.cut_copy_on_write());
        let costs = [&saving.attachment, &saving.attachment].map(|live| cost_of(&saving, live, write, bytes));
        // What was saved, unless the thread still has memory for it, its count, and the write by a plan.
        assert_eq!(
            costs,
            [if bytes > KEPT { 3 } else { 2 }, 1],
            "a first and a second write of {bytes} bytes under a snapshot"
        );
        assert_eq!(cost_of(&saving, &frozen, read, bytes), 1, "a read of {bytes} bytes of a snapshot");

        let logging = World::new();
        (0..100).for_each(|_| logging.cut_to_log());
        let live = &logging.attachment;
        let costs = [cost_of(&logging, live, write, bytes), cost_of(&logging, live, write, bytes)];
        assert_eq!(costs, [1, 1], "a first and a second write of {bytes} bytes to a log");
        assert_eq!(cost_of(&logging, live, read, bytes), 1, "a read of {bytes} bytes of a log");
    }
}

/// A pack in which each block was written by itself, one after the other and all synced: made up where it is read.
struct OneByOne {
    blocks: u32,
    size_bytes: u64,
}

impl OneByOne {
    const ID: Uuid = Uuid::from_u128(7);

    fn new(blocks: u32) -> OneByOne {
        OneByOne { blocks, size_bytes: Pack::image_bytes(OneByOne::shape(blocks).0, BLOCK).unwrap() }
    }

    fn shape(blocks: u32) -> (u64, u32) {
        (u64::from(blocks) * u64::from(BLOCK), BLOCK)
    }

    /// Fills a unit of zeros, as docs/on-disk-format.md has it.
    fn fill(&self, unit: u32, out: &mut [u8]) {
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        if unit == 0 {
            put(0, b"HSPACK01");
            put(8, &1u32.to_le_bytes());
            put(12, &4096u32.to_le_bytes());
            put(16, &OneByOne::shape(self.blocks).0.to_le_bytes());
            put(24, OneByOne::ID.as_bytes());
            put(56, &BLOCK.to_le_bytes());
            let crc = crc32fast::hash(&out[..64]);
            out[64..68].copy_from_slice(&crc.to_le_bytes());
        } else if !unit.is_multiple_of(2) && unit / 2 < self.blocks {
            let block = u64::from(unit / 2);
            put(0, b"HSPACKHD");
            put(24, &unit.to_le_bytes());
            put(28, &2u32.to_le_bytes());
            put(32, &(block + 1).to_le_bytes());
            put(40, &block.to_le_bytes());
            put(48, &block.to_le_bytes());
            put(56, &1u32.to_le_bytes());
            put(64, &block.to_le_bytes());
            put(72, &(unit + 1).to_le_bytes());
            put(76, &crc32fast::hash(&[0; BLOCK as usize]).to_le_bytes());
            let mut crc = crc32fast::Hasher::new();
            crc.update(&out[..60]);
            crc.update(&out[64..]);
            out[60..64].copy_from_slice(&crc.finalize().to_le_bytes());
        }
    }
}

impl Image for OneByOne {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: BLOCK, memory_bytes: 1 }
    }
    fn start(&self, _queue: &IoQueue, ticket: OpTicket) {
        let done = ticket.len();
        if ticket.kind() == OpKind::Read {
            let first = u32::try_from(ticket.at().0 / u64::from(BLOCK)).unwrap();
            let mut bytes = vec![0; done];
            (first..).zip(bytes.chunks_mut(BLOCK as usize)).for_each(|(unit, out)| self.fill(unit, out));
            ticket.copy_in(&bytes);
        }
        ticket.finish(Ok(done));
    }
    fn path(&self) -> &Path {
        Path::new("one by one")
    }
    fn next_data(&self, from: ByteOffset) -> Option<ByteOffset> {
        let end = (1 + 2 * u64::from(self.blocks)) * u64::from(BLOCK);
        Some(if from.0 < end { from } else { ByteOffset(self.size_bytes) })
    }
    fn is_poisoned(&self) -> bool {
        false
    }
    fn poison(&self) {}
}

#[test]
fn taking_up_a_pack_takes_the_memory_that_is_counted_for_it() {
    const BLOCKS: u32 = 1_000_000;
    // What is documented for a header and a block, and windows that are read at once.
    let counted = BLOCKS as usize * (96 + 48);
    let open = |memory_bytes_max: usize| {
        let (image, queue) = (Arc::new(OneByOne::new(BLOCKS)), IoQueue::simulated());
        let opened = run(Pack::open(
            image,
            OneByOne::ID,
            OneByOne::shape(BLOCKS),
            Believed::Synced,
            memory_bytes_max as u64,
            &queue,
        ));
        opened.map(drop).map_err(|e| e.to_string())
    };
    let before = HELD.get();
    PEAK.set(before);
    open(counted).unwrap();
    let peak = PEAK.get() - before;
    println!("{} KiB for {BLOCKS} blocks, {} bytes for each", peak >> 10, peak / BLOCKS as usize);
    assert!(peak <= counted + (8 << 20), "{peak} bytes");
    PEAK.set(HELD.get());
    let before = HELD.get();
    let refused = open(counted - 1).unwrap_err();
    assert!(refused.contains("memory"), "{refused}");
    assert!(PEAK.get() - before <= BLOCKS as usize * 48 + (8 << 20), "it is counted before it is taken");
}
