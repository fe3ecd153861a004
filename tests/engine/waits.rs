//! Whatever reads or copies in the background makes a guest's write wait for no more than one copy of its own block, alone or
//! with its neighbours: while the I/O of some blocks is held, writes of all other blocks end, and a write of one of those
//! waits for just that copy.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use halfsilver::engine::{
    Backing, ChainEditor, Disk, DiskOptions, Epoch, EpochClock, Layer, NewLayer, PreparedSnapshot, Request,
    RestoreSource, Restoring, Ticket, Version, VersionId, Writers,
};
use halfsilver::image::{AlignedBuf, Alignment, ByteOffset, GuestBuf, Image, IoQueue, OpTicket};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::store::{DurableTable, PAYLOAD_BYTES};

use crate::bench::{BLOCK, Bench, block};
use crate::sim::{self, Rng, Scheduler};

/// A job that copies runs does so many blocks side by side.
const SIDE_BY_SIDE: usize = 32;
/// A run that is given back in one step has so many blocks.
const NEIGHBOURS: usize = 16;
/// Some more than a job does side by side.
const BLOCKS: usize = SIDE_BY_SIDE + 5;

/// Something in the background, and how many blocks it has done.
struct Background {
    bench: Bench,
    job: Scheduler,
    done_blocks: Box<dyn Fn() -> u64>,
    /// Requests of the guest go by this one.
    guest: Ticket,
    /// How many times in a row each block's I/O goes out: a read, then writes.
    steps: usize,
    /// How many blocks it does side by side.
    at_once: usize,
}

fn bench() -> Bench {
    let bench = Bench::with_blocks(u32::try_from(BLOCK).unwrap(), BLOCKS);
    write_all(&bench, &bench.ticket(), 1);
    bench
}

fn write_all(bench: &Bench, ticket: &Ticket, fill: u8) {
    bench.write(ticket, 0..bench.sectors(), fill);
}

impl Background {
    fn retires(bench: Bench, version: &Arc<Version>, steps: usize) -> Background {
        let (job, pace) = bench.start_retiring(version);
        let done_blocks = Box::new(move || pace.done_bytes.load(std::sync::atomic::Ordering::Relaxed) / BLOCK as u64);
        Background { guest: bench.ticket(), bench, job, done_blocks, steps, at_once: SIDE_BY_SIDE }
    }

    /// Lets it begin its next I/O, and keeps that from moving.
    fn begin_step(&mut self) -> usize {
        assert!(!self.job.poll(), "it has ended already");
        sim::hold_all_in_flight(true)
    }

    fn end_step(&self) {
        sim::hold_all_in_flight(false);
        sim::finish_io();
    }

    fn write(&self, at: usize, fill: u8) -> Scheduler {
        self.bench.start_write(&self.guest, block(at), fill)
    }

    /// While the job is at each step of the first blocks, writes of all other blocks end.
    fn lets_writes_of_other_blocks_through(mut self) {
        for step in 0..self.steps {
            assert!(self.begin_step() > 0, "step {step} has I/O");
            assert_eq!((self.done_blocks)(), 0);
            for at in self.at_once..BLOCKS {
                let fill = u8::try_from(40 * step + at).unwrap();
                let whole = self.write(at, fill);
                assert!(ends(whole), "step {step}: a write of block {at} waits");
                // A part of a block, and a part that reaches into the next one.
                let end = (8 * at + 11).min(self.bench.sectors());
                let part = self.bench.start_write(&self.guest, 8 * at + 5..end, fill);
                assert!(ends(part), "step {step}: a part of block {at} waits");
            }
            self.end_step();
        }
        assert!(self.job.settle(&mut Rng::new(2)));
    }

    /// A write of block 0 waits for the steps of its copy, and is done while the job stands still at the next blocks.
    fn holds_up_a_write_for_one_block(mut self) {
        assert!(self.begin_step() > 0);
        let mut write = self.write(0, 7);
        for step in 1..self.steps {
            assert!(!write.settle(&mut Rng::new(4)), "it is alone on its block");
            self.end_step();
            assert!(self.begin_step() > 0, "step {step} has I/O");
            assert_eq!((self.done_blocks)(), 0, "step {step} is about the same blocks");
        }
        assert!(!write.settle(&mut Rng::new(4)));
        self.end_step();
        assert!(self.begin_step() > 0, "the next blocks");
        assert_eq!((self.done_blocks)(), self.at_once as u64);
        assert!(ends(write), "it waits for a second copy");
        assert_eq!(self.bench.read(&self.guest, block(0)), [7; 8]);
        self.end_step();
        assert!(self.job.settle(&mut Rng::new(6)));
        assert_eq!(self.bench.read(&self.guest, block(0)), [7; 8]);
    }
}

fn ends(mut scheduler: Scheduler) -> bool {
    scheduler.settle(&mut Rng::new(8))
}

fn check(make: impl Fn() -> Background) {
    make().lets_writes_of_other_blocks_through();
    make().holds_up_a_write_for_one_block();
}

/// Below the pivot: what the version that goes had saved, the next older one reads through it.
#[test]
fn handing_over_to_an_older_version_holds_up_one_run() {
    check(|| {
        let bench = bench();
        bench.cut();
        let (cut, _) = bench.cut();
        write_all(&bench, &bench.ticket(), 2);
        Background::retires(bench, &cut.frozen[0], 2)
    });
}

/// Above the pivot: what a log has, the next log reads through it.
#[test]
fn handing_over_to_a_newer_version_holds_up_one_run() {
    check(|| {
        let bench = bench();
        bench.cut_to_log();
        write_all(&bench, &bench.ticket(), 2);
        let (cut, _) = bench.cut_to_log();
        Background::retires(bench, &cut.frozen[0], 2)
    });
}

/// A read of the log, a write to the base, and giving back the entry's place.
#[test]
fn folding_a_log_holds_up_one_run() {
    check(|| {
        let bench = bench();
        let (cut, _) = bench.cut_to_log();
        write_all(&bench, &bench.ticket(), 2);
        Background::retires(bench, &cut.frozen[0], 3)
    });
}

/// As before, after the base's old bytes were read and saved for an older version.
#[test]
fn folding_a_log_over_a_saved_version_holds_up_one_run() {
    check(|| {
        let bench = bench();
        let (older, _) = bench.cut();
        let (cut, _) = bench.cut_to_log();
        write_all(&bench, &bench.ticket(), 2);
        assert_eq!(bench.frozen(&older.frozen[0]).unwrap(), vec![1; bench.sectors()]);
        Background::retires(bench, &cut.frozen[0], 5)
    });
}

/// Many blocks are copied side by side, each run under its own locks.
#[test]
fn completing_a_volume_holds_up_each_run_by_itself() {
    let many = 80;
    let bench = Bench::with_blocks(u32::try_from(BLOCK).unwrap(), many);
    write_all(&bench, &bench.ticket(), 1);
    let (cut, _) = bench.cut_to_log();
    cut.frozen[0].set_quiesced();
    let (volume, _) = crate::volumes::volume_of(&bench, &bench.disk, &cut.frozen[0]);
    let start = |at: usize, fill: u8| {
        let (mut write, queue, ticket) = (Scheduler::default(), bench.queue.clone(), bench.ticket());
        let (attachment, request) = (volume.attach_live(), crate::bench::write_of(block(at), fill));
        write.spawn(async move { attachment.execute(&queue, &ticket, request).await.unwrap() });
        write
    };
    let (mut job, pace) = (Scheduler::default(), Arc::new(Pace::default()));
    let complete = job::complete(bench.queue.clone(), volume.clone(), pace.clone());
    job.spawn(async move { assert_eq!(complete.await, Ok(Outcome::Done)) });
    assert!(!job.poll());
    let reads = sim::hold_all_in_flight(true);
    let a_run = usize::try_from(volume.geometry().blocks_per_run()).unwrap();
    assert_eq!(reads, SIDE_BY_SIDE.div_ceil(a_run));
    for at in SIDE_BY_SIDE..SIDE_BY_SIDE + 8 {
        assert!(ends(start(at, 2)), "a write of block {at} waits");
    }
    let mut write = start(0, 7);
    assert!(!write.settle(&mut Rng::new(4)), "it is alone on its blocks");
    for _ in 0..2 {
        sim::hold_all_in_flight(false);
        sim::finish_io();
        assert!(!job.poll());
        sim::hold_all_in_flight(true);
    }
    assert!(ends(write), "it waits for more than one read and write");
    assert!(volume.blocks_to_fill().unwrap() > 0, "some are left");
    sim::hold_all_in_flight(false);
    assert!(job.settle(&mut Rng::new(6)));
    assert!(bench.editor.make_independent(&volume));
    let shown = crate::volumes::read_all(&bench, &volume).unwrap();
    assert_eq!((shown[0], shown[8], shown[8 * SIDE_BY_SIDE]), (7, 1, 2));
}

#[test]
fn carrying_out_discards_holds_up_one_run() {
    check(|| {
        let bench = bench();
        let (cut, _) = bench.cut();
        let len = bench.disk.geometry().size_bytes;
        let discard = halfsilver::engine::Request::Discard { at: halfsilver::image::ByteOffset(0), len };
        bench.request(&bench.ticket(), discard).unwrap();
        bench.retire(&cut.frozen[0]);
        let put_off = bench.disk.discards().count();
        assert_eq!(put_off, BLOCKS as u64);
        let mut job = Scheduler::default();
        let carry_out = job::carry_out_discards(bench.queue.clone(), bench.disk.clone(), Arc::new(Pace::default()));
        job.spawn(async move { assert!(matches!(carry_out.await, Ok(Outcome::Done))) });
        let disk = bench.disk.clone();
        let done_blocks = Box::new(move || put_off - disk.discards().count());
        let at_once = NEIGHBOURS.min(usize::try_from(bench.disk.geometry().blocks_per_run()).unwrap());
        Background { guest: bench.ticket(), bench, job, done_blocks, steps: 1, at_once }
    });
}

/// A backup that reads VLUN A makes no write wait, not even of the block that it reads; and it shows the old bytes.
#[test]
fn a_reader_of_vlun_a_holds_up_nobody() {
    for to_log in [false, true] {
        let bench = bench();
        let (cut, _) = if to_log { bench.cut_to_log() } else { bench.cut() };
        let frozen = bench.disk.attach_frozen(cut.frozen[0].id);
        let guest = bench.ticket();
        let (mut backup, shown) = bench.start_read(frozen, &guest, 0..bench.sectors());
        for fill in 2..9 {
            // It never gets to look at its table, or to read again, without a write coming first.
            assert!(!backup.poll());
            assert!(sim::hold_all_in_flight(true) > 0);
            for at in 0..BLOCKS {
                assert!(ends(bench.start_write(&guest, block(at), fill)), "a write of block {at} waits for the backup");
            }
            sim::hold_all_in_flight(false);
            sim::finish_io();
            if backup.poll() {
                break;
            }
        }
        assert!(backup.settle(&mut Rng::new(3)));
        assert_eq!(shown(), vec![1; bench.sectors()]);
    }
}

/// An image of any size that holds nothing, and answers at once.
struct Nothing(u64);

impl Image for Nothing {
    fn size_bytes(&self) -> u64 {
        self.0
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: 512, memory_bytes: 1 }
    }
    fn start(&self, _queue: &IoQueue, ticket: OpTicket) {
        let len = ticket.len();
        ticket.finish(Ok(len));
    }
    fn path(&self) -> &Path {
        Path::new("nothing")
    }
    fn is_poisoned(&self) -> bool {
        false
    }
    fn poison(&self) {}
}

/// A guest's write waits at the gate while a restore begins: as long as what differs takes, and not as long as the disk is.
#[test]
fn a_restore_of_a_huge_disk_begins_at_once() {
    const SIZE: u64 = 2 << 40;
    let _undisturbed = crate::undisturbed();
    let (clock, queue) = (EpochClock::new(Epoch(1)), IoQueue::simulated());
    let editor = Arc::new(ChainEditor::new(clock.clone()));
    let one = || Backing::One(Arc::new(Nothing(SIZE)));
    let table = || Disk::table_in_memory(SIZE, 4096).unwrap();
    let options = DiskOptions { image: one(), block_bytes: 4096, read_only: false, discards: Arc::new(table()) };
    let disk = Disk::new(clock.clone(), options);
    let layer = NewLayer::Frozen { layer: Layer::of(one(), Arc::new(table())) };
    let prepared = PreparedSnapshot { disk: disk.clone(), layer, new_live: VersionId::new_v4(), changed: None };
    let frozen = editor.cut(vec![prepared], Writers::Request).unwrap().frozen.remove(0);
    frozen.set_quiesced();
    let mut scheduler = Scheduler::default();
    scheduler.spawn(async move {
        let attachment = disk.attach_live();
        for at in [ByteOffset(0), ByteOffset(1 << 40), ByteOffset(SIZE - 4096)] {
            let (from, _) = GuestBuf::from_owned(AlignedBuf::zeroed(4096));
            let request = Request::Write { at, from, durable: false };
            attachment.execute(&queue, &clock.lane().enter(), request).await.unwrap();
        }
        let pending = Arc::new(table());
        let image = Arc::new(Nothing(DurableTable::image_bytes(pending.blocks())));
        let pending = DurableTable::create(image, VersionId::nil(), pending, [0; PAYLOAD_BYTES], &queue).await.unwrap();
        let began = Instant::now();
        let closed = editor.close(&disk, false);
        disk.changes_passed().await;
        disk.store_brought_back(&queue).await.unwrap();
        let source = RestoreSource::Own(frozen.id);
        disk.find_differences(&source, pending.table()).unwrap();
        pending.commit(&queue).await.unwrap();
        closed.begin(Restoring::new(pending, source));
        let held_up = began.elapsed();
        assert_eq!(disk.blocks_to_bring_back(), 3);
        assert!(held_up < Duration::from_millis(500), "a write would have waited for {held_up:?}");
    });
    assert!(scheduler.settle(&mut Rng::new(1)));
}
