//! Jobs copy neighbouring blocks as one run: with one read and one write, and with all the care that one block is given.

use std::pin::Pin;
use std::sync::Arc;

use halfsilver::engine::{Cut, Disk, EpochClock, RestoreSource, Restoring};
use halfsilver::image::IoQueue;
use halfsilver::job::{self, Pace};
use halfsilver::store::BlockIndex;

use crate::bench::{BLOCK, BLOCK_SECTORS, Bench, block, write_of};
use crate::sim::{self, Rng, Scheduler, SimImage};

/// As many as a job does side by side: two runs of 64 KiB, or more where tests have shorter ones.
const BLOCKS: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// A volume becomes independent.
    Completion,
    /// A disk is taken back to a snapshot.
    Restore,
    /// The snapshot below a log is deleted.
    Fold,
    /// A snapshot below another log is deleted.
    ToNewer,
}

const KINDS: [Kind; 4] = [Kind::Completion, Kind::Restore, Kind::Fold, Kind::ToNewer];

type Done = Pin<Box<dyn Future<Output = Result<(), String>>>>;

/// A job that is about to copy all blocks.
struct Job {
    bench: Bench,
    /// What a guest writes to meanwhile.
    disk: Arc<Disk>,
    from: SimImage,
    to: SimImage,
    start: Box<dyn Fn() -> Done>,
    blocks_left: Box<dyn Fn() -> u64>,
}

/// The first byte of a block of what is copied.
type Pattern = fn(usize) -> u8;

fn write_pattern(bench: &Bench, pattern: Pattern) {
    (0..BLOCKS).for_each(|at| bench.write(&bench.ticket(), block(at), pattern(at)));
}

fn quiesced(cut: Cut) -> Arc<halfsilver::engine::Version> {
    cut.frozen[0].set_quiesced();
    cut.frozen[0].clone()
}

impl Job {
    fn of(kind: Kind, pattern: Pattern) -> Job {
        let bench = Bench::with_blocks(u32::try_from(BLOCK).unwrap(), BLOCKS);
        match kind {
            Kind::Completion => {
                write_pattern(&bench, pattern);
                let version = quiesced(bench.cut_to_log().0);
                let (disk, to) = crate::volumes::volume_of(&bench, &bench.disk, &version);
                let (queue, volume) = (bench.queue.clone(), disk.clone());
                let start = move || -> Done {
                    let job = job::complete(queue.clone(), volume.clone(), Arc::new(Pace::default()));
                    Box::pin(async move { job.await.map(drop) })
                };
                let volume = disk.clone();
                let blocks_left = Box::new(move || volume.blocks_to_fill().unwrap());
                Job { from: bench.live.clone(), to, disk, bench, start: Box::new(start), blocks_left }
            }
            Kind::Restore => {
                write_pattern(&bench, pattern);
                let (cut, from) = bench.cut();
                let version = quiesced(cut);
                bench.write(&bench.ticket(), 0..bench.sectors(), 99);
                let (source, pending) = (RestoreSource::Own(version.id), bench.durable_table().0);
                let closed = bench.editor.close(&bench.disk, false);
                bench.disk.find_differences(&source, pending.table()).unwrap();
                closed.begin(Restoring::new(pending, source));
                let (queue, disk) = (bench.queue.clone(), bench.disk.clone());
                let start = move || -> Done {
                    let job = job::restore(queue.clone(), disk.clone(), Arc::new(Pace::default()));
                    Box::pin(async move { job.await.map(drop).map_err(|e| e.to_string()) })
                };
                let (disk, of) = (bench.disk.clone(), bench.disk.clone());
                let blocks_left = Box::new(move || of.blocks_to_bring_back());
                Job { from, to: bench.live.clone(), disk, bench, start: Box::new(start), blocks_left }
            }
            Kind::Fold | Kind::ToNewer => {
                bench.write(&bench.ticket(), 0..bench.sectors(), 99);
                let (below, from) = bench.cut_to_log();
                let below = quiesced(below);
                write_pattern(&bench, pattern);
                let (version, to) = match kind {
                    Kind::Fold => (below, bench.live.clone()),
                    _ => {
                        let (cut, log) = bench.cut_to_log();
                        (quiesced(cut), log)
                    }
                };
                let grace = bench.editor.begin_retire(&bench.disk, &version).unwrap();
                let (queue, editor, disk) = (bench.queue.clone(), bench.editor.clone(), bench.disk.clone());
                let (of, id) = (disk.clone(), version.id);
                let start = move || -> Done {
                    let pace = Arc::new(Pace::default());
                    let (editor, disk, version) = (editor.clone(), disk.clone(), version.clone());
                    let job = job::retire(queue.clone(), editor, disk, version, grace, pace);
                    Box::pin(async move { job.await.map(drop) })
                };
                let blocks_left = Box::new(move || match kind {
                    Kind::Fold => of.blocks_to_let_go(id),
                    // What was handed over stays an entry here.
                    _ => {
                        let chain = of.chain();
                        (0..BLOCKS as u64).filter(|&at| !chain.layer(chain.live()).owns(BlockIndex(at))).count() as u64
                    }
                });
                Job { from, to, disk: bench.disk.clone(), bench, start: Box::new(start), blocks_left }
            }
        }
    }

    fn begin(&self) -> Scheduler {
        let (mut scheduler, job) = (Scheduler::default(), (self.start)());
        scheduler.spawn(async move { job.await.unwrap() });
        scheduler
    }

    fn blocks_per_run(&self) -> usize {
        usize::try_from(self.disk.geometry().blocks_per_run()).unwrap()
    }

    fn runs(&self) -> usize {
        BLOCKS.div_ceil(self.blocks_per_run())
    }

    /// Begins a write of a block.
    fn write(&self, at: usize, fill: u8) -> Scheduler {
        let (mut write, ticket) = (Scheduler::default(), self.bench.ticket());
        self.bench.start(&mut write, self.disk.attach_live(), ticket, write_of(block(at), fill));
        write.poll();
        write
    }

    /// What the disk shows: the pattern, but for what was written meanwhile.
    fn shows(&self, pattern: Pattern, written: &[(usize, u8)]) {
        let shown = crate::volumes::read_all(&self.bench, &self.disk).unwrap();
        let of = |at| written.iter().find(|(block, _)| *block == at).map_or(pattern(at), |(_, fill)| *fill);
        let expected: Vec<u8> = (0..BLOCKS).flat_map(|at| [of(at); BLOCK_SECTORS]).collect();
        assert_eq!(shown, expected);
    }
}

fn transfers_since(image: &SimImage, before: (usize, usize)) -> (usize, usize) {
    let now = image.transfers();
    (now.0 - before.0, now.1 - before.1)
}

#[test]
fn a_run_is_copied_with_one_read_and_one_write() {
    for kind in KINDS {
        let job = Job::of(kind, |_| 1);
        if cfg!(not(feature = "planted")) {
            assert_eq!(job.blocks_per_run(), 16, "64 KiB");
        }
        let before = (job.from.transfers(), job.to.transfers());
        assert!(job.begin().settle(&mut Rng::new(2)));
        assert_eq!(transfers_since(&job.from, before.0), (job.runs(), 0), "{kind:?}: reads");
        assert_eq!(transfers_since(&job.to, before.1), (0, job.runs()), "{kind:?}: writes");
        job.shows(|_| 1, &[]);
    }
}

/// What goes to an older version, and what is saved for one while a log is folded over it.
#[test]
fn what_older_versions_get_is_copied_in_runs() {
    let bench = Bench::with_blocks(u32::try_from(BLOCK).unwrap(), BLOCKS);
    let runs = BLOCKS.div_ceil(usize::try_from(bench.disk.geometry().blocks_per_run()).unwrap());
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (older, to) = bench.cut();
    let (cut, from) = bench.cut();
    let (older, version) = (quiesced(older), quiesced(cut));
    bench.write(&bench.ticket(), 0..bench.sectors(), 2);
    let before = (from.transfers(), to.transfers());
    bench.retire(&version);
    assert_eq!(transfers_since(&from, before.0), (runs, 0));
    assert_eq!(transfers_since(&to, before.1), (0, runs));
    assert_eq!(bench.frozen(&older).unwrap(), vec![1; bench.sectors()]);

    let (saved, to) = bench.cut();
    let saved = quiesced(saved);
    let (below, log) = bench.cut_to_log();
    let below = quiesced(below);
    bench.write(&bench.ticket(), 0..bench.sectors(), 3);
    let before = (bench.live.transfers(), to.transfers(), log.transfers());
    bench.retire(&below);
    assert_eq!(transfers_since(&bench.live, before.0), (runs, runs), "saved from, and folded into");
    assert_eq!(transfers_since(&to, before.1), (0, runs));
    assert_eq!(transfers_since(&log, before.2), (runs, 0));
    assert_eq!(bench.frozen(&saved).unwrap(), vec![2; bench.sectors()]);
    assert_eq!(bench.live(), vec![3; bench.sectors()]);
}

/// A block that somebody holds is not waited for by its neighbours, nor by whoever writes to one of those.
#[test]
fn around_a_contended_block_each_is_copied_alone() {
    for kind in KINDS {
        let job = Job::of(kind, |_| 1);
        let mut first = job.write(1, 7);
        assert!(sim::hold_all_in_flight(true) > 0, "its write stands still");
        let mut copying = job.begin();
        assert!(!copying.poll());
        assert_eq!(job.from.in_flight(), job.blocks_per_run() - 1 + job.runs() - 1, "{kind:?}: reads");
        let mut second = job.write(2, 8);
        assert!(!second.poll(), "{kind:?}: it is being copied");
        for _ in 0..6 {
            sim::finish_io();
            copying.poll();
        }
        assert!(second.settle(&mut Rng::new(3)), "{kind:?}: it waits for more than the copy of its block");
        assert!(!first.poll() && !copying.poll(), "the block that is held is all that is left");
        sim::hold_all_in_flight(false);
        assert!(first.settle(&mut Rng::new(3)) && copying.settle(&mut Rng::new(4)));
        job.shows(|_| 1, &[(1, 7), (2, 8)]);
    }
}

/// Between finding a run and locking it, a guest writes in its middle.
#[test]
fn what_is_written_before_a_run_is_locked_is_kept() {
    fn write_at_once(disk: &Arc<Disk>, clock: &EpochClock, at: usize) {
        let (queue, ticket, attachment) = (IoQueue::simulated(), clock.lane().enter(), disk.attach_live());
        let mut write = Scheduler::default();
        write.spawn(async move { attachment.execute(&queue, &ticket, write_of(block(at), 7)).await.unwrap() });
        assert!(write.settle(&mut Rng::new(9)));
    }
    for kind in KINDS {
        let job = Job::of(kind, |_| 1);
        let (disk, clock, at) = (job.disk.clone(), job.bench.clock.clone(), job.blocks_per_run() + 1);
        let before = job.from.transfers();
        // The first run is locked by then, and not the second.
        sim::at_next_start(move || write_at_once(&disk, &clock, at));
        assert!(job.begin().settle(&mut Rng::new(2)));
        let transfers = transfers_since(&job.from, before);
        job.shows(|_| 1, &[(at, 7)]);
        assert_eq!(transfers, (job.runs() + 1, 0), "{kind:?}: what is left is in two pieces");
    }
}

#[test]
fn a_run_that_cannot_be_written_is_not_done_and_can_be_tried_again() {
    for (kind, seed) in KINDS.into_iter().flat_map(|kind| (0..4).map(move |seed| (kind, seed))) {
        let job = Job::of(kind, |_| 1);
        job.to.inject(sim::Met::Write, sim::Fault::Errno(libc::EIO), 1);
        let (mut scheduler, running) = (Scheduler::default(), (job.start)());
        scheduler.spawn(async move {
            let reason = running.await.unwrap_err();
            assert!(reason.contains("os error 5"), "{reason}");
        });
        assert!(scheduler.settle(&mut Rng::new(seed)));
        assert_eq!(job.to.heal(), 1);
        let (left, last) = ((job.blocks_left)(), BLOCKS % job.blocks_per_run());
        assert!(left == job.blocks_per_run() as u64 || left == last as u64, "{kind:?}: {left} blocks are left");
        job.shows(|_| 1, &[]);
        assert!(job.begin().settle(&mut Rng::new(seed)), "it goes on");
        job.shows(|_| 1, &[]);
    }
}

/// Holes are made of the zeros among the bytes of a run, as of a block of zeros.
#[test]
fn zeros_in_a_run_take_no_room() {
    let patterns: [Pattern; 3] = [|_| 0, |at| u8::from(at % 2 == 0), |at| u8::from((4..9).contains(&(at % 16)))];
    for (kind, pattern) in KINDS.into_iter().flat_map(|kind| patterns.map(|pattern| (kind, pattern))) {
        let job = Job::of(kind, pattern);
        assert!(job.begin().settle(&mut Rng::new(2)));
        job.shows(pattern, &[]);
        let data = (0..BLOCKS).filter(|&at| pattern(at) != 0).count();
        assert_eq!(job.to.sectors_in_use(), data * BLOCK_SECTORS, "{kind:?}: {data} blocks");
    }
}
