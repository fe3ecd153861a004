//! Restores in place, at random moments, under guests that read and write everywhere: each version is one array of bytes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use halfsilver::engine::{
    Attachment, Backing, ChainEditor, Disk, DiskOptions, Epoch, EpochClock, Layer, Log, NewLayer, PreparedSnapshot,
    Request, RequestError, RestoreSource, Restoring, Version, VersionId, View, Writers,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, IoQueue};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::store::{BlockIndex, DurableTable, PAYLOAD_BYTES, Table};

use crate::bench::{BLOCK, BLOCK_SECTORS, Bench, block, read_of, write_of};
use crate::sim::{self, Rng, SECTOR, Scheduler, SimImage};

/// The last block is short.
const SECTORS: usize = 6 * 8 + 3;
/// A write of so many sectors is carried out in one part.
const WRITE_SECTORS_MAX: usize = 2 * BLOCK_SECTORS;
const SEEDS: u64 = 300;
const STEPS: usize = 40;

type Values = BTreeSet<u64>;

#[derive(Clone)]
struct Frozen {
    version: Arc<Version>,
    bytes: Vec<u64>,
}

struct Volume {
    disk: Arc<Disk>,
    live: Vec<u64>,
    frozen: Vec<Frozen>,
    base: VersionId,
}

#[derive(Default, Debug, Clone, Copy)]
struct Counts {
    requests: u64,
    restores: u64,
    from_volumes: u64,
    across_splits: u64,
    ended: u64,
    stopped: u64,
    in_flight_at_begin: u64,
    writes_before: u64,
    writes_after: u64,
    pending_reads: u64,
    spared: u64,
    retired: u64,
    discards: u64,
}

struct World {
    rng: Rng,
    clock: EpochClock,
    editor: Arc<ChainEditor>,
    queue: IoQueue,
    disk: Arc<Disk>,
    /// More than one value where a discard left it open.
    live: Vec<Values>,
    frozen: Vec<Frozen>,
    volumes: Vec<Volume>,
    tag: u64,
    counts: Counts,
}

struct Read {
    first: usize,
    allowed: Vec<Values>,
    bytes: Box<dyn Fn() -> Vec<u8>>,
    frozen: bool,
}

struct Write {
    sectors: Range<usize>,
    tag: u64,
    /// Whether it came when the restore of this batch had begun.
    is_after: bool,
}

fn image(name: &str) -> SimImage {
    SimImage::new(name, SECTORS * SECTOR, 512)
}

fn table() -> Table {
    Disk::table_in_memory((SECTORS * SECTOR) as u64, u32::try_from(BLOCK).unwrap()).unwrap()
}

fn options(image: Backing) -> DiskOptions {
    DiskOptions { image, block_bytes: u32::try_from(BLOCK).unwrap(), read_only: false, discards: Arc::new(table()) }
}

fn filled(sectors: usize, tag: u64) -> GuestBuf {
    let mut data = AlignedBuf::zeroed(sectors * SECTOR);
    data.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&tag.to_le_bytes()));
    GuestBuf::from_owned(data).0
}

fn tags(bytes: &[u8]) -> Vec<u64> {
    let tag = |sector: &[u8]| {
        let first = u64::from_le_bytes(sector[..8].try_into().unwrap());
        assert!(sector.chunks_exact(8).all(|word| word == first.to_le_bytes()), "a sector is torn");
        first
    };
    bytes.chunks_exact(SECTOR).map(tag).collect()
}

fn at(sector: usize) -> ByteOffset {
    ByteOffset((sector * SECTOR) as u64)
}

/// Empty, with a durable copy that nobody looks at.
async fn durable_table(queue: &IoQueue) -> DurableTable {
    let of = Arc::new(table());
    let bytes = usize::try_from(DurableTable::image_bytes(of.blocks())).unwrap();
    let image = Arc::new(SimImage::new("table", bytes, 512));
    DurableTable::create(image, VersionId::nil(), of, [0; PAYLOAD_BYTES], queue).await.unwrap()
}

/// What the daemon does around it, but for the records.
async fn begin(editor: Arc<ChainEditor>, disk: Arc<Disk>, source: RestoreSource, queue: IoQueue) {
    let pending = durable_table(&queue).await;
    let closed = editor.close(&disk, false);
    disk.changes_passed().await;
    disk.find_differences(&source, pending.table()).unwrap();
    disk.store_brought_back(&queue).await.unwrap();
    pending.commit(&queue).await.unwrap();
    closed.begin(Restoring::new(pending, source));
}

impl World {
    fn new(seed: u64) -> World {
        sim::reset();
        let clock = EpochClock::new(Epoch(1));
        World {
            rng: Rng::new(seed),
            editor: Arc::new(ChainEditor::new(clock.clone())),
            disk: Disk::new(clock.clone(), options(Backing::One(Arc::new(image("disk"))))),
            clock,
            queue: IoQueue::simulated(),
            live: vec![Values::from([0]); SECTORS],
            frozen: Vec::new(),
            volumes: Vec::new(),
            tag: 0,
            counts: Counts::default(),
        }
    }

    fn run<T: 'static>(&mut self, future: impl Future<Output = T> + 'static) -> T {
        crate::schedule::run::<sim::Sim, _>(&mut self.rng, future)
    }

    fn is_restored(&self) -> bool {
        self.disk.chain().restoring().is_some()
    }

    fn start(&mut self, scheduler: &mut Scheduler, attachment: Attachment, request: Request) {
        let (queue, ticket) = (self.queue.clone(), self.clock.lane().enter());
        scheduler.spawn(async move { attachment.execute(&queue, &ticket, request).await.unwrap() });
        self.counts.requests += 1;
    }

    fn range(&mut self, most: usize) -> Range<usize> {
        let from = self.rng.below(SECTORS);
        from..from + 1 + self.rng.below((SECTORS - from).min(most))
    }

    fn shown(&mut self, attachment: Attachment) -> Vec<u64> {
        let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(SECTORS * SECTOR));
        let mut scheduler = Scheduler::default();
        self.start(&mut scheduler, attachment, Request::Read { at: ByteOffset(0), into });
        assert!(scheduler.settle(&mut self.rng), "a read hangs");
        tags(&memory.to_vec())
    }

    fn log_layer(&mut self) -> Layer {
        let image = Backing::One(Arc::new(image("log")));
        if self.rng.chance(50) {
            return Layer::of(image, Arc::new(table()));
        }
        let queue = self.queue.clone();
        let table_of_log = self.run(async move { durable_table(&queue).await });
        Layer::logged(image, Arc::new(Log { table: table_of_log, freed: table() }))
    }

    fn cut(&mut self, disk: &Arc<Disk>) -> Frozen {
        let layer = match self.rng.below(10) {
            0..5 if disk.can_move_pivot() => {
                NewLayer::Frozen { layer: Layer::of(Backing::One(Arc::new(image("frozen"))), Arc::new(table())) }
            }
            5 if disk.can_move_pivot() => {
                // What the disk shows, on two legs.
                let shown = self.shown(disk.attach_live());
                let legs = [image("leg"), image("other leg")];
                for leg in &legs {
                    let (leg, queue, shown) = (leg.clone(), self.queue.clone(), shown.clone());
                    self.run(async move {
                        for (sector, tag) in shown.into_iter().enumerate() {
                            let leg = Backing::One(Arc::new(leg.clone()));
                            let bytes = halfsilver::image::IoBuf::Guest(filled(1, tag));
                            leg.write(&queue, at(sector), bytes, false).await.unwrap();
                        }
                    });
                }
                let [frozen, live] = legs.map(|leg| Backing::One(Arc::new(leg)));
                NewLayer::Split { frozen, live }
            }
            _ => NewLayer::Live { layer: self.log_layer() },
        };
        // Of a split, the bytes that were discarded are settled by the copy.
        let bytes = self.shown(disk.attach_live());
        let changed = Some(Arc::new(table()));
        let prepared = PreparedSnapshot { disk: disk.clone(), layer, new_live: VersionId::new_v4(), changed };
        let cut = self.editor.cut(vec![prepared], Writers::Request).unwrap();
        cut.frozen[0].set_quiesced();
        Frozen { version: cut.frozen[0].clone(), bytes }
    }

    fn snapshot(&mut self) {
        if self.is_restored() || self.frozen.len() > 4 || self.clock.room().is_err() {
            return;
        }
        let frozen = self.cut(&self.disk.clone());
        self.frozen.push(frozen);
    }

    fn retire(&mut self) {
        let stood_on = |f: &Frozen| self.volumes.iter().any(|v| v.base == f.version.id);
        let free: Vec<usize> = (0..self.frozen.len()).filter(|&i| !stood_on(&self.frozen[i])).collect();
        if self.is_restored() || free.is_empty() {
            return;
        }
        let gone = self.frozen.remove(free[self.rng.below(free.len())]);
        let Ok(grace) = self.editor.begin_retire(&self.disk, &gone.version) else { unreachable!("one at a time") };
        let (queue, editor, disk) = (self.queue.clone(), self.editor.clone(), self.disk.clone());
        self.run(async move {
            let pace = Arc::new(Pace::default());
            let done = job::retire(queue.clone(), editor, disk.clone(), gone.version, grace, pace.clone()).await;
            assert_eq!(done, Ok(Outcome::Done));
            job::carry_out_discards(queue, disk, pace).await.unwrap();
        });
        self.counts.retired += 1;
    }

    fn branch(&mut self) {
        if self.frozen.is_empty() || self.volumes.len() > 2 {
            return;
        }
        let from = self.frozen[self.rng.below(self.frozen.len())].clone();
        let view = View::of(self.disk.clone(), from.version.id, "base");
        let layer = self.log_layer();
        let (origin, live) = (VersionId::new_v4(), VersionId::new_v4());
        let disk = Disk::volume(self.clock.clone(), options(Backing::View(view)), origin, (live, layer));
        self.volumes.push(Volume { disk, live: from.bytes, frozen: Vec::new(), base: from.version.id });
    }

    /// Writes to a volume, and freezes it at times.
    fn use_volume(&mut self) {
        if self.volumes.is_empty() {
            return;
        }
        let (which, sectors) = (self.rng.below(self.volumes.len()), self.range(20));
        self.tag += 1;
        let (disk, tag, mut scheduler) = (self.volumes[which].disk.clone(), self.tag, Scheduler::default());
        let write = Request::Write { at: at(sectors.start), from: filled(sectors.len(), tag), durable: false };
        self.start(&mut scheduler, disk.attach_live(), write);
        assert!(scheduler.settle(&mut self.rng));
        self.volumes[which].live[sectors].fill(tag);
        if self.volumes[which].frozen.len() < 3 && self.clock.room().is_ok() && self.rng.chance(50) {
            let frozen = self.cut(&disk);
            self.volumes[which].frozen.push(frozen);
        }
    }

    /// Gives bytes away: they stay, or are zeros, now or later.
    fn discard(&mut self) {
        let sectors = self.range(20);
        let (len, mut scheduler) = ((sectors.len() * SECTOR) as u64, Scheduler::default());
        self.start(&mut scheduler, self.disk.attach_live(), Request::Discard { at: at(sectors.start), len });
        assert!(scheduler.settle(&mut self.rng));
        self.live[sectors].iter_mut().for_each(|values| values.extend([0]));
        self.counts.discards += 1;
    }

    fn source(&mut self) -> Option<(RestoreSource, Vec<u64>)> {
        let of_volumes: Vec<_> =
            self.volumes.iter().flat_map(|v| v.frozen.iter().map(|f| (v.disk.clone(), f.clone()))).collect();
        if !of_volumes.is_empty() && self.rng.chance(40) {
            let (disk, frozen) = of_volumes[self.rng.below(of_volumes.len())].clone();
            self.counts.from_volumes += 1;
            return Some((RestoreSource::View(View::of(disk, frozen.version.id, "volume@restored")), frozen.bytes));
        }
        let own: Vec<_> = self.frozen.clone();
        if own.is_empty() {
            return None;
        }
        let frozen = own[self.rng.below(own.len())].clone();
        let chain = self.disk.chain();
        let index = chain.position(frozen.version.id).unwrap();
        self.counts.across_splits += u64::from(chain.pivot_of(index) != chain.pivot_of(chain.live()));
        Some((RestoreSource::Own(frozen.version.id), frozen.bytes))
    }

    fn job(&self, scheduler: &mut Scheduler) -> Arc<Pace> {
        let (pace, disk, queue, editor) =
            (Arc::new(Pace::default()), self.disk.clone(), self.queue.clone(), self.editor.clone());
        let ours = pace.clone();
        scheduler.spawn(async move {
            if job::restore(queue, disk.clone(), ours).await.unwrap() == Outcome::Done {
                assert!(editor.end_restore(&disk));
            }
        });
        pace
    }

    /// Requests at the same time, among them perhaps a restore that begins, and its job.
    fn batch(&mut self) {
        let old = self.live.clone();
        let mut scheduler = Scheduler::default();
        let (mut reads, mut writes): (Vec<Read>, Vec<Write>) = (Vec::new(), Vec::new());
        let mut taken = BTreeSet::new();
        let (begun, mut restored): (Rc<Cell<bool>>, Option<Vec<u64>>) = (Rc::default(), None);
        let was_restored = self.is_restored();
        let mut pace = None;
        for _ in 0..1 + self.rng.below(10) {
            match self.rng.below(100) {
                0..45 => {
                    let sectors = self.range(WRITE_SECTORS_MAX);
                    if sectors.clone().any(|sector| taken.contains(&sector)) {
                        continue; // The order of two at once would be open.
                    }
                    taken.extend(sectors.clone());
                    self.tag += 1;
                    let zeros = self.rng.chance(15);
                    let (len, durable) = ((sectors.len() * SECTOR) as u64, self.rng.chance(10));
                    let tag = if zeros { 0 } else { self.tag };
                    let request = match zeros {
                        true => {
                            let unmap = self.rng.chance(50);
                            Request::WriteZeroes { at: at(sectors.start), len, unmap, durable }
                        }
                        false => Request::Write { at: at(sectors.start), from: filled(sectors.len(), tag), durable },
                    };
                    self.start(&mut scheduler, self.disk.attach_live(), request);
                    writes.push(Write { sectors, tag, is_after: begun.get() });
                }
                45..75 => {
                    let sectors = self.range(20);
                    let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(sectors.len() * SECTOR));
                    let request = Request::Read { at: at(sectors.start), into };
                    let is_frozen = !self.frozen.is_empty() && self.rng.chance(30);
                    let (attachment, shown): (_, Vec<Values>) = if is_frozen {
                        let frozen = &self.frozen[self.rng.below(self.frozen.len())];
                        let bytes = frozen.bytes.iter().map(|tag| Values::from([*tag])).collect();
                        (self.disk.attach_frozen(frozen.version.id), bytes)
                    } else {
                        let now = restored.as_ref().filter(|_| begun.get());
                        let shown = now.map(|r| r.iter().map(|tag| Values::from([*tag])).collect());
                        (self.disk.attach_live(), shown.unwrap_or_else(|| old.clone()))
                    };
                    self.counts.pending_reads += u64::from(self.is_restored());
                    self.start(&mut scheduler, attachment, request);
                    let allowed = shown[sectors.clone()].to_vec();
                    let bytes = Box::new(move || memory.to_vec());
                    reads.push(Read { first: sectors.start, allowed, bytes, frozen: is_frozen });
                }
                75..85 if !was_restored && restored.is_none() => {
                    let Some((source, bytes)) = self.source() else { continue };
                    let (editor, disk, queue) = (self.editor.clone(), self.disk.clone(), self.queue.clone());
                    let done = begun.clone();
                    self.counts.in_flight_at_begin += u64::from(scheduler.tasks() > 0);
                    scheduler.spawn(async move {
                        begin(editor, disk, source, queue).await;
                        done.set(true);
                    });
                    restored = Some(bytes);
                    self.counts.restores += 1;
                }
                85..92 if self.is_restored() && pace.is_none() => pace = Some(self.job(&mut scheduler)),
                _ => self.start(&mut scheduler, self.disk.attach_live(), Request::Flush),
            }
            for _ in 0..self.rng.below(25) {
                scheduler.step(&mut self.rng);
            }
        }
        if let Some(pace) = &pace
            && self.rng.chance(70)
        {
            pace.stop();
        }
        assert!(scheduler.settle(&mut self.rng), "something hangs");
        if pace.is_some() {
            let has_ended = !self.is_restored();
            self.counts.ended += u64::from(has_ended);
            self.counts.stopped += u64::from(!has_ended);
        }
        if let Some(restored) = &restored {
            self.live = restored.iter().map(|tag| Values::from([*tag])).collect();
            let blocks = SECTORS.div_ceil(BLOCK_SECTORS) as u64;
            self.counts.spared += u64::from(self.disk.blocks_to_bring_back() < blocks);
        }
        let now = self.shown(self.disk.attach_live());
        for write in &writes {
            let got = &now[write.sectors.clone()];
            let is_there = got.iter().all(|tag| *tag == write.tag);
            let may_be_gone = restored.is_some() && !write.is_after;
            let is_gone = got.iter().zip(&self.live[write.sectors.clone()]).all(|(tag, v)| v.contains(tag));
            assert!(is_there || may_be_gone && is_gone, "write {} is there in part: {got:?}", write.tag);
            if is_there {
                self.live[write.sectors.clone()].fill(Values::from([write.tag]));
            }
            self.counts.writes_before += u64::from(may_be_gone && !is_there);
            self.counts.writes_after += u64::from(may_be_gone && is_there);
        }
        for read in reads {
            for (i, got) in tags(&(read.bytes)()).into_iter().enumerate() {
                let sector = read.first + i;
                let may_be_new = !read.frozen
                    && (restored.as_ref().is_some_and(|r| r[sector] == got)
                        || writes.iter().any(|w| w.sectors.contains(&sector) && w.tag == got));
                let is_right = read.allowed[i].contains(&got) || may_be_new;
                assert!(is_right, "sector {sector} shows {got}, frozen: {}", read.frozen);
            }
        }
    }

    fn check(&mut self) {
        self.compare();
        let shown = self.shown(self.disk.attach_live());
        for (sector, (got, values)) in shown.iter().zip(&self.live).enumerate() {
            assert!(values.contains(got), "the live version: sector {sector} shows {got}, allowed {values:?}");
        }
        for frozen in self.frozen.clone() {
            assert_eq!(self.shown(self.disk.attach_frozen(frozen.version.id)), frozen.bytes, "a frozen version");
        }
        for which in 0..self.volumes.len() {
            let (disk, live) = (self.volumes[which].disk.clone(), self.volumes[which].live.clone());
            assert_eq!(self.shown(disk.attach_live()), live, "a volume");
            for frozen in self.volumes[which].frozen.clone() {
                assert_eq!(self.shown(disk.attach_frozen(frozen.version.id)), frozen.bytes, "a volume's version");
            }
        }
    }

    /// What a restore changes is noted like any other change, from the moment on in which it shows.
    fn compare(&self) {
        for frozen in &self.frozen {
            let changes = self.disk.changes(frozen.version.id, None).unwrap();
            for (sector, values) in self.live.iter().enumerate().filter(|(s, v)| !v.contains(&frozen.bytes[*s])) {
                let block = BlockIndex((sector / BLOCK_SECTORS) as u64);
                assert!(changes.contains(block), "sector {sector} is {values:?} now, and not noted as changed");
            }
        }
    }

    fn turns(mut self) -> Counts {
        for _ in 0..STEPS {
            self.batch();
            match self.rng.below(20) {
                0..5 => self.snapshot(),
                5..7 => self.retire(),
                7..9 => self.branch(),
                9..12 => self.use_volume(),
                12..14 => self.discard(),
                14 if !self.is_restored() => drop(self.volumes.pop()),
                _ => {}
            }
            if self.rng.chance(40) {
                self.check();
            }
        }
        self.check();
        self.counts
    }
}

/// One seed, for those who look for defects.
#[cfg(feature = "planted")]
pub fn run(seed: u64) {
    World::new(seed).turns();
}

#[test]
fn random_restores_under_load_match_one_array_a_version() {
    let _undisturbed = crate::undisturbed();
    let number = |variable| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    let first: u64 = number("ORACLE_FIRST").unwrap_or(0);
    let seeds = number("ORACLE_SEEDS").unwrap_or(SEEDS);
    let mut total = Counts::default();
    for seed in first..first + seeds {
        let counts = std::panic::catch_unwind(|| World::new(seed).turns()).unwrap_or_else(|e| {
            println!("restores: seed {seed} (ORACLE_FIRST={seed} ORACLE_SEEDS=1 repeats it)");
            std::panic::resume_unwind(e)
        });
        total.requests += counts.requests;
        total.restores += counts.restores;
        total.from_volumes += counts.from_volumes;
        total.across_splits += counts.across_splits;
        total.ended += counts.ended;
        total.stopped += counts.stopped;
        total.in_flight_at_begin += counts.in_flight_at_begin;
        total.writes_before += counts.writes_before;
        total.writes_after += counts.writes_after;
        total.pending_reads += counts.pending_reads;
        total.spared += counts.spared;
        total.retired += counts.retired;
        total.discards += counts.discards;
    }
    println!("restores: seeds {first} to {}: {total:?}", first + seeds - 1);
    let Counts { restores, from_volumes, across_splits, ended, stopped, in_flight_at_begin, .. } = total;
    for (what, reached) in [
        ("restores", restores > 0),
        ("restores from volumes", from_volumes > 0),
        ("restores across a split", across_splits > 0),
        ("restores that ended", ended > 0),
        ("jobs that were stopped", stopped > 0),
        ("requests in flight when one begins", in_flight_at_begin > 0),
        ("writes that a restore undid", total.writes_before > 0),
        ("writes that waited for a restore", total.writes_after > 0),
        ("reads while blocks are pending", total.pending_reads > 0),
        ("blocks that need not be copied", total.spared > 0),
        ("deletions", total.retired > 0),
    ] {
        assert!(reached || seeds < 100, "no run reached: {what}");
    }
}

pub(crate) fn restore(bench: &Bench, source: RestoreSource) {
    let (editor, disk, queue) = (bench.editor.clone(), bench.disk.clone(), bench.queue.clone());
    bench.run(async move { begin(editor, disk, source, queue).await });
}

fn finish(bench: &Bench) -> u64 {
    let (disk, queue, pace) = (bench.disk.clone(), bench.queue.clone(), Arc::new(Pace::default()));
    let ours = pace.clone();
    let done = bench.run(async move { job::restore(queue, disk, ours).await });
    assert_eq!(done.unwrap(), Outcome::Done);
    assert!(bench.editor.end_restore(&bench.disk));
    pace.done_bytes.load(Ordering::Relaxed)
}

#[test]
fn only_what_differs_is_copied_and_it_shows_at_once() {
    for to_log in [false, true] {
        let bench = Bench::new();
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let (cut, _) = if to_log { bench.cut_to_log() } else { bench.cut() };
        cut.frozen[0].set_quiesced();
        bench.write(&bench.ticket(), 3..4, 2);
        bench.write(&bench.ticket(), block(2), 3);
        restore(&bench, RestoreSource::Own(cut.frozen[0].id));
        assert_eq!(bench.disk.blocks_to_bring_back(), 2);
        assert_eq!(bench.read(&bench.ticket(), 0..bench.sectors()), vec![1; bench.sectors()]);
        // A part of a block brings the rest back.
        bench.write(&bench.ticket(), 5..6, 4);
        assert_eq!(bench.disk.blocks_to_bring_back(), 1);
        let mut expected = vec![1; bench.sectors()];
        expected[5] = 4;
        assert_eq!(bench.read(&bench.ticket(), 0..bench.sectors()), expected);
        assert_eq!(finish(&bench), BLOCK as u64);
        assert_eq!(bench.read(&bench.ticket(), 0..bench.sectors()), expected);
        assert_eq!(bench.frozen(&cut.frozen[0]).unwrap(), vec![1; bench.sectors()]);
    }
}

/// A discard that was put off for the sake of a snapshot is not carried out on what is restored from it.
#[test]
fn what_was_discarded_before_a_restore_is_wanted_after_it() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, _) = bench.cut();
    cut.frozen[0].set_quiesced();
    let len = (bench.sectors() * SECTOR) as u64;
    bench.request(&bench.ticket(), Request::Discard { at: ByteOffset(0), len }).unwrap();
    assert_eq!(bench.disk.discards().count(), 4);
    restore(&bench, RestoreSource::Own(cut.frozen[0].id));
    assert_eq!(finish(&bench), 0, "nothing differs");
    bench.retire(&cut.frozen[0]);
    let (disk, queue) = (bench.disk.clone(), bench.queue.clone());
    bench.run(async move { job::carry_out_discards(queue, disk, Arc::default()).await.unwrap() });
    assert_eq!(bench.read(&bench.ticket(), 0..bench.sectors()), vec![1; bench.sectors()]);
}

/// Which blocks were brought back is stored with a flush and with a durable write, and not before the bytes are.
#[test]
fn a_flush_stores_what_was_brought_back_after_its_bytes() {
    {
        let bench = Bench::new();
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let (cut, _) = bench.cut();
        cut.frozen[0].set_quiesced();
        bench.write(&bench.ticket(), 0..bench.sectors(), 2);
        let (pending, stored) = bench.durable_table();
        let closed = bench.editor.close(&bench.disk, false);
        let source = RestoreSource::Own(cut.frozen[0].id);
        bench.disk.find_differences(&source, pending.table()).unwrap();
        let queue = bench.queue.clone();
        let pending = bench.run(async move {
            pending.commit(&queue).await.unwrap();
            pending
        });
        closed.begin(Restoring::new(pending, source));
        bench.write(&bench.ticket(), 0..1, 3);
        assert_eq!(bench.entries_of(&stored), [0, 1, 2, 3], "nobody has flushed");
        // The image cannot be synced: what is brought back is not stored.
        bench.live.inject(sim::Met::Sync, sim::Fault::Errno(5), 1);
        assert!(bench.request(&bench.ticket(), Request::Flush).is_err());
        assert_eq!(bench.entries_of(&stored), [0, 1, 2, 3], "the bytes are not known to be stored");
    }
    for durable in [false, true] {
        let bench = Bench::new();
        let (cut, _) = bench.cut();
        cut.frozen[0].set_quiesced();
        bench.write(&bench.ticket(), 0..bench.sectors(), 2);
        let (pending, stored) = bench.durable_table();
        let closed = bench.editor.close(&bench.disk, false);
        let source = RestoreSource::Own(cut.frozen[0].id);
        bench.disk.find_differences(&source, pending.table()).unwrap();
        closed.begin(Restoring::new(pending, source));
        let mut write = write_of(0..1, 3);
        if let Request::Write { durable: flag, .. } = &mut write {
            *flag = durable;
        }
        bench.request(&bench.ticket(), write).unwrap();
        if !durable {
            bench.request(&bench.ticket(), Request::Flush).unwrap();
        }
        assert_eq!(bench.entries_of(&stored), [1, 2, 3], "durable: {durable}");
    }
}

/// What cannot be read is an error of the request that needs it, and the job says why and can go on.
#[test]
fn trouble_with_what_is_restored_is_an_error_and_loses_nothing() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, frozen) = bench.cut();
    cut.frozen[0].set_quiesced();
    bench.write(&bench.ticket(), 0..bench.sectors(), 2);
    restore(&bench, RestoreSource::Own(cut.frozen[0].id));
    frozen.inject(sim::Met::Read, sim::Fault::Errno(5), 100);
    let (read, _memory) = read_of(0..1);
    assert!(bench.request(&bench.ticket(), read).is_err());
    assert!(bench.request(&bench.ticket(), write_of(0..1, 3)).is_err(), "the rest of the block cannot be had");
    let (disk, queue) = (bench.disk.clone(), bench.queue.clone());
    let failed = bench.run(async move { job::restore(queue, disk, Arc::new(Pace::default())).await });
    assert!(failed.is_err());
    assert_eq!(bench.disk.blocks_to_bring_back(), 4);
    // A whole block needs nothing of it.
    bench.write(&bench.ticket(), block(1), 4);
    frozen.heal();
    finish(&bench);
    let mut expected = vec![1; bench.sectors()];
    expected[block(1)].fill(4);
    assert_eq!(bench.read(&bench.ticket(), 0..bench.sectors()), expected);
}

/// Changes that wait hold no lock, and go on when nothing comes of the restore.
#[test]
fn a_restore_that_does_not_begin_changes_nothing() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let closed = bench.editor.close(&bench.disk, false);
    let mut write = bench.start_write(&bench.ticket(), 0..8, 2);
    assert!(!write.settle(&mut Rng::new(1)), "it waits");
    let disk = bench.disk.clone();
    bench.run(async move { disk.changes_passed().await });
    assert_eq!(bench.read(&bench.ticket(), 0..8), [1; 8]);
    drop(closed);
    assert!(write.settle(&mut Rng::new(1)));
    assert_eq!(bench.read(&bench.ticket(), 0..8), [2; 8]);
}

#[test]
fn reads_wait_where_what_they_show_is_not_known_yet_and_fail_when_it_is_lost() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let closed = bench.editor.close(&bench.disk, true);
    let (request, _memory) = read_of(0..8);
    let (queue, ticket, attachment) = (bench.queue.clone(), bench.ticket(), bench.disk.attach_live());
    let done: Rc<RefCell<Option<Result<(), RequestError>>>> = Rc::default();
    let (put, mut reader) = (done.clone(), Scheduler::default());
    reader.spawn(async move { *put.borrow_mut() = Some(attachment.execute(&queue, &ticket, request).await) });
    assert!(!reader.settle(&mut Rng::new(1)), "it waits");
    closed.lose("the volume is gone".to_owned());
    assert!(reader.settle(&mut Rng::new(1)));
    assert!(done.take().unwrap().unwrap_err().to_string().contains("the volume is gone"));
    assert!(bench.request(&bench.ticket(), write_of(0..8, 2)).is_err());
    assert!(bench.request(&bench.ticket(), Request::Flush).is_err());
    assert_eq!(bench.disk.chain().restore_lost(), Some("the volume is gone"));
    assert_eq!(bench.live(), vec![1; bench.sectors()]);
}
