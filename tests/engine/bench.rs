//! A small disk for tests that go step by step: requests run to their end, or stay where a test holds their I/O.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::{
    Attachment, Backing, ChainEditor, Cut, Disk, DiskOptions, Epoch, EpochClock, Layer, LegImage, Log, NewLayer, Pair,
    PreparedSnapshot, Request, RequestError, Ticket, Version, VersionId, Writers,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, Image, IoQueue};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::store::{BlockIndex, DurableTable, PAYLOAD_BYTES, Table};

use crate::sim::{self, Rng, SECTOR, Scheduler, SimImage};

pub const BLOCK: usize = 4096;
pub const BLOCKS: usize = 4;
pub const BLOCK_SECTORS: usize = BLOCK / SECTOR;

/// A disk of four blocks, and whatever its cuts need.
pub struct Bench {
    pub clock: EpochClock,
    pub editor: Arc<ChainEditor>,
    pub disk: Arc<Disk>,
    /// The full image that the disk began with.
    pub live: SimImage,
    pub queue: IoQueue,
    _undisturbed: Option<crate::alone::Others>,
}

impl Bench {
    pub fn new() -> Bench {
        Bench::with_blocks(u32::try_from(BLOCK).unwrap(), BLOCKS)
    }

    pub fn with_blocks(block_bytes: u32, blocks: usize) -> Bench {
        let undisturbed = crate::undisturbed();
        sim::reset();
        let live = SimImage::new("live", blocks * block_bytes as usize, 512);
        let clock = EpochClock::new(Epoch(1));
        let disk = disk_of(Backing::One(Arc::new(live.clone())), block_bytes, &clock);
        let editor = Arc::new(ChainEditor::new(clock.clone()));
        Bench { editor, clock, disk, live, queue: IoQueue::simulated(), _undisturbed: undisturbed }
    }

    /// The same disk on two legs that are still to be made equal; the images are the second leg and the bitmap.
    pub fn mirrored() -> (Bench, Arc<Pair>, SimImage, SimImage) {
        let mut bench = Bench::new();
        let block_bytes = u32::try_from(BLOCK).unwrap();
        let bitmap_bytes = usize::try_from(Pair::bitmap_bytes(bench.live.size_bytes(), block_bytes)).unwrap();
        let (second, bitmap) = (bench.empty_image("second"), SimImage::new("bitmap", bitmap_bytes, 512));
        let leg = |n, image: &SimImage| LegImage { id: VersionId::from_u128(n), image: Arc::new(image.clone()) };
        let (legs, of, queue) = ([leg(1, &bench.live), leg(2, &second)], bitmap.clone(), bench.queue.clone());
        let pair = bench.run(async move {
            let [first, second] = legs;
            let pair = Pair::create(first, Arc::new(of), VersionId::nil(), block_bytes, &queue).await.unwrap();
            pair.attach(&queue, second, true).await.unwrap();
            pair
        });
        bench.disk = disk_of(Backing::Pair(pair.clone()), block_bytes, &bench.clock);
        (bench, pair, second, bitmap)
    }

    /// What a request that comes now is given.
    pub fn ticket(&self) -> Ticket {
        self.clock.lane().enter()
    }

    /// Copy-on-write; the image is the frozen version's.
    pub fn cut(&self) -> (Cut, SimImage) {
        let image = self.empty_image("frozen");
        let layer = Layer::of(Backing::One(Arc::new(image.clone())), self.table());
        (self.cut_with(NewLayer::Frozen { layer }), image)
    }

    /// Write logging; the image is the live version's.
    pub fn cut_to_log(&self) -> (Cut, SimImage) {
        let image = self.empty_image("log");
        let layer = Layer::of(Backing::One(Arc::new(image.clone())), self.table());
        (self.cut_with(NewLayer::Live { layer }), image)
    }

    /// Write logging as the daemon does it; the image is that of the log's durable table.
    pub fn cut_to_durable_log(&self) -> (Cut, SimImage) {
        let (cut, _, durable) = self.cut_to_log_with_table();
        (cut, durable)
    }

    /// The same; the images are the log and that of its durable table.
    pub fn cut_to_log_with_table(&self) -> (Cut, SimImage, SimImage) {
        let (table, durable) = self.durable_table();
        let freed = Disk::table_in_memory(self.disk.geometry().size_bytes, self.disk.geometry().block_bytes).unwrap();
        let (image, log) = (self.empty_image("log"), Arc::new(Log { table, freed }));
        let layer = Layer::logged(Backing::One(Arc::new(image.clone())), log);
        (self.cut_with(NewLayer::Live { layer }), image, durable)
    }

    /// An empty durable table, and its image.
    pub fn durable_table(&self) -> (DurableTable, SimImage) {
        let table = self.table();
        let bytes = usize::try_from(DurableTable::image_bytes(table.blocks())).unwrap();
        let durable = SimImage::new("durable", bytes, 512);
        let (image, queue) = (durable.clone(), self.queue.clone());
        let table = self.run(async move {
            DurableTable::create(Arc::new(image), VersionId::nil(), table, [0; PAYLOAD_BYTES], &queue).await.unwrap()
        });
        (table, durable)
    }

    /// The blocks that a log's durable table has, as a start after a power cut would find them.
    pub fn entries_of(&self, durable: &SimImage) -> Vec<u64> {
        let (image, into, queue) = (durable.clone(), self.table(), self.queue.clone());
        let (found, report) =
            self.run(async move { DurableTable::load(Arc::new(image), VersionId::nil(), into, &queue).await.unwrap() });
        assert!(report.damaged.is_empty());
        (0..found.table().blocks()).filter(|&block| found.table().get(BlockIndex(block))).collect()
    }

    pub fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let answer = Rc::new(RefCell::new(None));
        let put = answer.clone();
        let mut scheduler = Scheduler::default();
        scheduler.spawn(async move {
            let done = future.await;
            *put.borrow_mut() = Some(done);
        });
        assert!(scheduler.settle(&mut Rng::new(7)), "it hangs");
        answer.borrow_mut().take().expect("it has ended")
    }

    /// Write mirroring, when nothing is in flight; the image is the leg that the frozen version takes, equal until now
    /// to `kept`, which the live version keeps.
    pub fn cut_to_split(&self, kept: &SimImage) -> (Cut, SimImage) {
        let leg = kept.copy("leg");
        let [frozen, live] = [&leg, kept].map(|image| Backing::One(Arc::new(image.clone())));
        (self.cut_with(NewLayer::Split { frozen, live }), leg)
    }

    pub fn cut_with(&self, layer: NewLayer) -> Cut {
        let prepared =
            PreparedSnapshot { disk: self.disk.clone(), layer, new_live: VersionId::new_v4(), changed: None };
        self.editor.cut(vec![prepared], Writers::Request).unwrap()
    }

    pub fn empty_image(&self, name: &str) -> SimImage {
        SimImage::new(name, usize::try_from(self.disk.geometry().size_bytes).unwrap(), 512)
    }

    pub fn table(&self) -> Arc<Table> {
        let geometry = self.disk.geometry();
        Arc::new(Disk::table_in_memory(geometry.size_bytes, geometry.block_bytes).unwrap())
    }

    pub fn sectors(&self) -> usize {
        usize::try_from(self.disk.geometry().size_bytes).unwrap() / SECTOR
    }

    pub fn request(&self, ticket: &Ticket, request: Request) -> Result<(), RequestError> {
        self.on(self.disk.attach_live(), ticket, request)
    }

    /// Begins a request, which goes on with the scheduler.
    pub fn start(&self, scheduler: &mut Scheduler, attachment: Attachment, ticket: Ticket, request: Request) {
        let queue = self.queue.clone();
        scheduler.spawn(async move {
            attachment.execute(&queue, &ticket, request).await.unwrap();
        });
    }

    pub fn on(&self, attachment: Attachment, ticket: &Ticket, request: Request) -> Result<(), RequestError> {
        let ticket = ticket.again();
        let answer = Rc::new(RefCell::new(None));
        let (put, queue) = (answer.clone(), self.queue.clone());
        let mut scheduler = Scheduler::default();
        scheduler.spawn(async move {
            let done = attachment.execute(&queue, &ticket, request).await;
            *put.borrow_mut() = Some(done);
        });
        assert!(scheduler.settle(&mut Rng::new(7)), "the request hangs");
        answer.borrow_mut().take().expect("the request has ended")
    }

    pub fn write(&self, ticket: &Ticket, sectors: Range<usize>, fill: u8) {
        self.request(ticket, write_of(sectors, fill)).unwrap();
    }

    /// Begins a write, which goes on with the scheduler that it returns.
    pub fn start_write(&self, ticket: &Ticket, sectors: Range<usize>, fill: u8) -> Scheduler {
        let mut scheduler = Scheduler::default();
        self.start(&mut scheduler, self.disk.attach_live(), ticket.again(), write_of(sectors, fill));
        scheduler.poll();
        scheduler
    }

    /// Begins a read; the second is where its bytes will be.
    pub fn start_read(&self, attachment: Attachment, ticket: &Ticket, sectors: Range<usize>) -> (Scheduler, Memory) {
        let (request, memory) = read_of(sectors);
        let mut scheduler = Scheduler::default();
        self.start(&mut scheduler, attachment, ticket.again(), request);
        scheduler.poll();
        (scheduler, memory)
    }

    /// The first byte of each sector, as a request of the ticket's epoch reads them.
    pub fn read(&self, ticket: &Ticket, sectors: Range<usize>) -> Vec<u8> {
        let (request, memory) = read_of(sectors);
        self.request(ticket, request).unwrap();
        memory()
    }

    /// The first byte of each sector of a frozen version.
    pub fn frozen(&self, version: &Version) -> Result<Vec<u8>, RequestError> {
        let (read, memory) = read_of(0..self.sectors());
        self.on(self.disk.attach_frozen(version.id), &self.ticket(), read)?;
        Ok(memory())
    }

    /// The first byte of each sector of the image that the disk began with.
    pub fn live(&self) -> Vec<u8> {
        first_bytes(&self.live.bytes())
    }

    /// Whether the version's table has an entry for the block.
    pub fn entry(&self, version: usize, block: usize) -> bool {
        self.disk.chain().layer(version).owns(BlockIndex(block as u64))
    }

    /// Begins to let a version go, in the background.
    pub fn start_retiring(&self, version: &Arc<Version>) -> (Scheduler, Arc<Pace>) {
        version.set_quiesced();
        let grace = self.editor.begin_retire(&self.disk, version).unwrap();
        let pace = Arc::new(Pace::default());
        let (queue, editor, disk) = (self.queue.clone(), self.editor.clone(), self.disk.clone());
        let job = job::retire(queue, editor, disk, version.clone(), grace, pace.clone());
        let mut scheduler = Scheduler::default();
        let told = pace.clone();
        scheduler.spawn(async move {
            let ended = job.await.unwrap();
            assert_eq!(ended, if told.is_stopped() { Outcome::Stopped } else { Outcome::Done });
        });
        (scheduler, pace)
    }

    /// Lets a version go.
    pub fn retire(&self, version: &Arc<Version>) {
        assert!(self.start_retiring(version).0.settle(&mut Rng::new(5)), "a version does not go");
    }
}

fn disk_of(image: Backing, block_bytes: u32, clock: &EpochClock) -> Arc<Disk> {
    let discards = Disk::table_in_memory(image.size_bytes(), block_bytes).unwrap();
    Disk::new(clock.clone(), DiskOptions { image, block_bytes, read_only: false, discards: Arc::new(discards) })
}

/// The sectors of a block.
pub fn block(index: usize) -> Range<usize> {
    index * BLOCK_SECTORS..(index + 1) * BLOCK_SECTORS
}

pub fn write_of(sectors: Range<usize>, fill: u8) -> Request {
    let mut data = AlignedBuf::zeroed(sectors.len() * SECTOR);
    data.fill(fill);
    let at = ByteOffset((sectors.start * SECTOR) as u64);
    Request::Write { at, from: GuestBuf::from_owned(data).0, durable: false }
}

/// Looks at the first byte of each sector that was read.
pub type Memory = Box<dyn Fn() -> Vec<u8>>;

pub fn read_of(sectors: Range<usize>) -> (Request, Memory) {
    let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(sectors.len() * SECTOR));
    let at = ByteOffset((sectors.start * SECTOR) as u64);
    (Request::Read { at, into }, Box::new(move || first_bytes(&memory.to_vec())))
}

/// A byte for each sector, which must be full of it.
pub fn first_bytes(bytes: &[u8]) -> Vec<u8> {
    let first = |sector: &[u8]| sector.iter().all(|&b| b == sector[0]).then_some(sector[0]);
    bytes.chunks(SECTOR).map(|sector| first(sector).expect("a sector is torn")).collect()
}
