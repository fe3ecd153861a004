//! What a request allocates, which no busy machine changes.
//!
//! Checked: the engine's part, that it does not grow unnoticed. Not checked: rings and guests' memory; times, see benches/speed.

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
use halfsilver::store::{DurableTable, PAYLOAD_BYTES, Table};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: all of it is the system's allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: MemoryLayout) {
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
