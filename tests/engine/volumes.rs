//! Volumes: writable branches off frozen versions, branches of branches, against one array of bytes for every version.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use halfsilver::engine::{
    Attachment, Backing, ChainEditor, ChangeSource, Disk, DiskOptions, Epoch, EpochClock, Layer, Log, NewLayer,
    NoChanges, PreparedSnapshot, Request, RequestError, VOLUMES_DEEP_MAX, Version, VersionId, View, Writers,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, Image, IoQueue};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::store::{BlockIndex, DurableTable, PAYLOAD_BYTES, Table};

use crate::bench::{Bench, write_of};
use crate::sim::{self, Rng, SECTOR, Scheduler, SimImage};

mod checks;
mod updates;

const BLOCK: u32 = 4096;
/// The last block is short.
const SECTORS: usize = 6 * 8 + 3;
const SEEDS: u64 = 400;
const STEPS: usize = 60;

/// A frozen version, and what it must show.
struct Frozen {
    version: Arc<Version>,
    bytes: Vec<u64>,
    /// How many volumes stand on it.
    volumes: usize,
}

/// A disk or a volume.
struct Node {
    id: usize,
    disk: Arc<Disk>,
    live: Vec<u64>,
    frozen: Vec<Frozen>,
    /// The node and the version that a volume stands on.
    base: Option<(usize, VersionId)>,
    /// The same, also when it is independent.
    from: Option<(usize, VersionId)>,
    /// A volume's oldest version, and what it showed when it was made.
    origin: Option<(VersionId, Vec<u64>)>,
    /// A job that makes it independent, and whether that is so.
    filling: Option<(Arc<Pace>, Rc<Cell<bool>>)>,
}

impl Node {
    fn is_origin(&self, id: VersionId) -> bool {
        self.origin.as_ref().is_some_and(|(origin, _)| *origin == id)
    }
}

struct Tree {
    rng: Rng,
    clock: EpochClock,
    editor: Arc<ChainEditor>,
    queue: IoQueue,
    nodes: Vec<Node>,
    next: usize,
    tag: u64,
    counts: Counts,
}

#[derive(Default, Debug, Clone, Copy)]
struct Counts {
    requests: u64,
    volumes: u64,
    cascaded: u64,
    deepest: usize,
    cuts: u64,
    in_flight_at_cuts: u64,
    retired: u64,
    dropped: u64,
    discarded: u64,
    compared: u64,
    by_owners: u64,
    completed: u64,
    completed_with_snapshots: u64,
    stopped: u64,
    updated: u64,
    kept_blocks: u64,
    kept_nothing: u64,
}

/// A read in flight: what each of its sectors may show, and where they will be.
struct Read {
    what: String,
    first: usize,
    allowed: Vec<u64>,
    bytes: Box<dyn Fn() -> Vec<u8>>,
    /// Of a frozen version, which may be deleted meanwhile.
    version: Option<Arc<Version>>,
    done: Rc<RefCell<Option<Result<(), RequestError>>>>,
}

fn image(name: &str) -> SimImage {
    SimImage::new(name, SECTORS * SECTOR, 512)
}

fn table() -> Table {
    Disk::table_in_memory((SECTORS * SECTOR) as u64, BLOCK).unwrap()
}

fn options(image: Backing) -> DiskOptions {
    DiskOptions { image, block_bytes: BLOCK, read_only: false, discards: Arc::new(table()) }
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

impl Tree {
    fn new(seed: u64) -> Tree {
        sim::reset();
        let clock = EpochClock::new(Epoch(1));
        let disk = Disk::new(clock.clone(), options(Backing::One(Arc::new(image("disk")))));
        let live = vec![0; SECTORS];
        let root = Node { id: 0, disk, live, frozen: Vec::new(), base: None, from: None, origin: None, filling: None };
        Tree {
            rng: Rng::new(seed),
            editor: Arc::new(ChainEditor::new(clock.clone())),
            clock,
            queue: IoQueue::simulated(),
            nodes: vec![root],
            next: 1,
            tag: 0,
            counts: Counts::default(),
        }
    }

    /// A log, as the daemon makes it or without a durable table.
    fn log_layer(&mut self) -> Layer {
        let image = Backing::One(Arc::new(image("log")));
        if self.rng.chance(50) {
            return Layer::of(image, Arc::new(table()));
        }
        let of = Arc::new(table());
        let durable = SimImage::new("table", usize::try_from(DurableTable::image_bytes(of.blocks())).unwrap(), 512);
        let queue = self.queue.clone();
        let made = async move {
            DurableTable::create(Arc::new(durable), VersionId::nil(), of, [0; PAYLOAD_BYTES], &queue).await.unwrap()
        };
        let table_of_log = crate::schedule::run::<sim::Sim, _>(&mut self.rng, made);
        Layer::logged(image, Arc::new(Log { table: table_of_log, freed: table() }))
    }

    fn start(&self, scheduler: &mut Scheduler, attachment: Attachment, request: Request) {
        let (queue, ticket) = (self.queue.clone(), self.clock.lane().enter());
        scheduler.spawn(async move { attachment.execute(&queue, &ticket, request).await.unwrap() });
    }

    fn range(&mut self) -> Range<usize> {
        let from = self.rng.below(SECTORS);
        from..from + 1 + self.rng.below((SECTORS - from).min(20))
    }

    /// Starts a change of the live version of a node; it also belongs to what is frozen while it is in flight.
    fn change(&mut self, scheduler: &mut Scheduler, at: usize, taken: &mut Vec<(usize, usize)>) {
        let sectors = self.range();
        if sectors.clone().any(|sector| taken.contains(&(at, sector))) {
            return; // The order of two at once would be open.
        }
        taken.extend(sectors.clone().map(|sector| (at, sector)));
        self.tag += 1;
        let (offset, zeros) = (ByteOffset((sectors.start * SECTOR) as u64), self.rng.chance(15));
        let tag = if zeros { 0 } else { self.tag };
        let (len, durable) = ((sectors.len() * SECTOR) as u64, self.rng.chance(10));
        let request = match zeros {
            true => Request::WriteZeroes { at: offset, len, unmap: self.rng.chance(50), durable },
            false => Request::Write { at: offset, from: filled(sectors.len(), tag), durable },
        };
        let attachment = self.nodes[at].disk.attach_live();
        self.start(scheduler, attachment, request);
        self.nodes[at].live[sectors].fill(tag);
        self.counts.requests += 1;
    }

    fn read(&mut self, scheduler: &mut Scheduler, at: usize, before: &[(usize, Vec<u64>)]) -> Read {
        let sectors = self.range();
        let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(sectors.len() * SECTOR));
        let request = Request::Read { at: ByteOffset((sectors.start * SECTOR) as u64), into };
        let node = &self.nodes[at];
        let stable: Vec<&Frozen> = node.frozen.iter().filter(|f| f.version.is_quiesced()).collect();
        let (attachment, shown, version) = match stable.len() {
            n if n > 0 && self.rng.chance(50) => {
                let frozen = stable[self.rng.below(n)];
                (node.disk.attach_frozen(frozen.version.id), frozen.bytes.clone(), Some(frozen.version.clone()))
            }
            // What was there before the batch, or is written in it.
            _ => {
                let (_, old) = before.iter().find(|(id, _)| *id == node.id).unwrap();
                (node.disk.attach_live(), old.clone(), None)
            }
        };
        let what =
            format!("{} of node {}", if version.is_some() { "a frozen version" } else { "the live version" }, node.id);
        let (queue, ticket) = (self.queue.clone(), self.clock.lane().enter());
        let done = Rc::new(RefCell::new(None));
        let put = done.clone();
        scheduler.spawn(async move { *put.borrow_mut() = Some(attachment.execute(&queue, &ticket, request).await) });
        self.counts.requests += 1;
        let (first, allowed) = (sectors.start, shown[sectors].to_vec());
        Read { what, first, allowed, bytes: Box::new(move || memory.to_vec()), version, done }
    }

    fn cut(&mut self, at: usize) {
        if self.clock.room().is_err() || self.nodes[at].frozen.len() > 4 {
            return;
        }
        let disk = self.nodes[at].disk.clone();
        let layer = if disk.can_move_pivot() && self.rng.chance(60) {
            NewLayer::Frozen { layer: Layer::of(Backing::One(Arc::new(image("frozen"))), Arc::new(table())) }
        } else {
            NewLayer::Live { layer: self.log_layer() }
        };
        let prepared =
            PreparedSnapshot { disk, layer, new_live: VersionId::new_v4(), changed: Some(Arc::new(table())) };
        let cut = self.editor.cut(vec![prepared], Writers::Request).unwrap();
        let (version, bytes) = (cut.frozen[0].clone(), self.nodes[at].live.clone());
        self.nodes[at].frozen.push(Frozen { version, bytes, volumes: 0 });
        self.counts.cuts += 1;
    }

    fn branch(&mut self) {
        let at = self.rng.below(self.nodes.len());
        let source = &mut self.nodes[at];
        let usable: Vec<usize> = (0..source.frozen.len()).filter(|&i| source.frozen[i].version.is_quiesced()).collect();
        if usable.is_empty() || self.next > 8 {
            return;
        }
        let frozen = usable[self.rng.below(usable.len())];
        let (base, live) = ((source.id, source.frozen[frozen].version.id), source.frozen[frozen].bytes.clone());
        source.frozen[frozen].volumes += 1;
        let view = View::of(source.disk.clone(), base.1, "base");
        self.counts.cascaded += u64::from(source.base.is_some());
        self.counts.deepest = self.counts.deepest.max(view.depth());
        let layer = self.log_layer();
        let (origin, name) = (VersionId::new_v4(), VersionId::new_v4());
        let changed = self.rng.chance(80).then(|| Arc::new(table()));
        let options = options(Backing::View(view));
        let disk = Disk::noting_volume(self.clock.clone(), options, origin, (name, layer), changed);
        let origin = Some((origin, live.clone()));
        let (frozen, base) = (Vec::new(), Some(base));
        self.nodes.push(Node { id: self.next, disk, live, frozen, base, from: base, origin, filling: None });
        self.next += 1;
        self.counts.volumes += 1;
    }

    /// Begins to delete a frozen version that nobody stands on.
    fn retire(&mut self, scheduler: &mut Scheduler, at: usize) {
        let node = &mut self.nodes[at];
        if node.filling.is_some() {
            return;
        }
        let free = |f: &Frozen| f.volumes == 0 && f.version.is_quiesced();
        let Some(i) = node.frozen.iter().position(free) else { return };
        let version = node.frozen[i].version.clone();
        let Ok(grace) = self.editor.begin_retire(&node.disk, &version) else { return };
        node.frozen.remove(i);
        let (queue, editor, disk) = (self.queue.clone(), self.editor.clone(), node.disk.clone());
        scheduler.spawn(async move {
            job::retire(queue, editor, disk, version, grace, Arc::new(Pace::default())).await.unwrap();
        });
        self.counts.retired += 1;
    }

    /// Drops a volume that nobody stands on.
    fn drop_volume(&mut self) {
        let free = |n: &Node| n.id > 0 && n.frozen.iter().all(|f| f.volumes == 0);
        let Some(i) = self.nodes.iter().rposition(free) else { return };
        if let Some(base) = self.nodes.remove(i).base {
            self.let_go_of(base);
        }
        self.counts.dropped += 1;
    }

    fn let_go_of(&mut self, (source, version): (usize, VersionId)) {
        let source = self.nodes.iter_mut().find(|n| n.id == source).unwrap();
        source.frozen.iter_mut().filter(|f| f.version.id == version).for_each(|f| f.volumes -= 1);
    }

    /// Begins to make a volume independent, or goes on with it, unless one of its versions is on its way out.
    fn complete(&mut self, scheduler: &mut Scheduler, at: usize) {
        let node = &mut self.nodes[at];
        let is_going = |disk: &Disk| disk.chain().links().iter().any(|link| link.version.is_retiring());
        if node.base.is_none() || node.filling.is_some() || is_going(&node.disk) {
            return;
        }
        let (pace, is_done) = (Arc::new(Pace::default()), Rc::new(Cell::new(false)));
        node.filling = Some((pace.clone(), is_done.clone()));
        let (queue, editor, disk) = (self.queue.clone(), self.editor.clone(), node.disk.clone());
        scheduler.spawn(async move {
            match job::complete(queue, disk.clone(), pace).await.unwrap() {
                Outcome::Done => is_done.set(editor.make_independent(&disk)),
                Outcome::Stopped => {}
            }
        });
    }

    /// What became of the jobs that made volumes independent.
    fn settle_completions(&mut self) {
        for at in 0..self.nodes.len() {
            let Some((pace, is_done)) = self.nodes[at].filling.take() else { continue };
            assert!(is_done.get() || pace.is_stopped(), "it has everything and still stands on something");
            if !is_done.get() {
                self.counts.stopped += 1;
                continue;
            }
            assert!(self.nodes[at].disk.base().is_none());
            let base = self.nodes[at].base.take().unwrap();
            self.let_go_of(base);
            self.counts.completed += 1;
            self.counts.completed_with_snapshots += u64::from(!self.nodes[at].frozen.is_empty());
        }
    }

    /// Requests, cuts and deletions at the same time.
    fn batch(&mut self) {
        let before: Vec<_> = self.nodes.iter().map(|n| (n.id, n.live.clone())).collect();
        let (mut scheduler, mut taken, mut reads) = (Scheduler::default(), Vec::new(), Vec::new());
        for _ in 0..1 + self.rng.below(8) {
            let at = self.rng.below(self.nodes.len());
            match self.rng.below(100) {
                0..50 => self.change(&mut scheduler, at, &mut taken),
                50..80 => reads.push((at, self.read(&mut scheduler, at, &before))),
                80..88 => {
                    self.counts.in_flight_at_cuts += u64::from(scheduler.tasks() > 0);
                    self.cut(at);
                }
                88..92 => self.retire(&mut scheduler, at),
                92..96 => self.complete(&mut scheduler, at),
                _ => {
                    let attachment = self.nodes[at].disk.attach_live();
                    self.start(&mut scheduler, attachment, Request::Flush);
                }
            }
            for _ in 0..self.rng.below(12) {
                scheduler.step(&mut self.rng);
            }
            if self.rng.chance(10)
                && let Some((pace, _)) = self.nodes.iter().find_map(|n| n.filling.as_ref())
            {
                pace.stop();
            }
        }
        assert!(scheduler.settle(&mut self.rng), "something hangs");
        self.settle_completions();
        for (at, read) in reads {
            match (read.done.take().unwrap(), &read.version) {
                (Err(RequestError::Broken(_)), Some(version)) if version.is_retiring() => continue,
                (done, _) => done.unwrap_or_else(|e| panic!("{}: {e}", read.what)),
            }
            for (i, got) in tags(&(read.bytes)()).into_iter().enumerate() {
                let sector = read.first + i;
                let may_be_new = read.version.is_none() && taken.contains(&(at, sector));
                let is_right = got == read.allowed[i] || may_be_new && got == self.nodes[at].live[sector];
                assert!(is_right, "{}: sector {sector} shows {got}", read.what);
            }
        }
        for frozen in self.nodes.iter().flat_map(|n| &n.frozen) {
            frozen.version.set_quiesced();
        }
    }

    fn run(mut self) -> Counts {
        for _ in 0..STEPS {
            self.batch();
            match self.rng.below(10) {
                0..3 => self.branch(),
                3 => self.drop_volume(),
                4 => self.discard(),
                5 | 6 => self.update(),
                _ => {}
            }
            self.compare();
            if self.rng.chance(30) {
                self.check();
            }
        }
        self.check();
        self.counts
    }
}

#[test]
fn random_trees_of_volumes_match_one_array_a_version() {
    let _undisturbed = crate::undisturbed();
    let number = |variable| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    let first: u64 = number("ORACLE_FIRST").unwrap_or(0);
    let seeds = number("ORACLE_SEEDS").unwrap_or(SEEDS);
    let mut total = Counts::default();
    for seed in first..first + seeds {
        let run = std::panic::catch_unwind(|| Tree::new(seed).run());
        let counts = run.unwrap_or_else(|e| {
            println!("trees of volumes: seed {seed} (ORACLE_FIRST={seed} ORACLE_SEEDS=1 repeats it)");
            std::panic::resume_unwind(e)
        });
        total.requests += counts.requests;
        total.volumes += counts.volumes;
        total.cascaded += counts.cascaded;
        total.deepest = total.deepest.max(counts.deepest);
        total.cuts += counts.cuts;
        total.in_flight_at_cuts += counts.in_flight_at_cuts;
        total.retired += counts.retired;
        total.dropped += counts.dropped;
        total.discarded += counts.discarded;
        total.compared += counts.compared;
        total.by_owners += counts.by_owners;
        total.completed += counts.completed;
        total.completed_with_snapshots += counts.completed_with_snapshots;
        total.stopped += counts.stopped;
        total.updated += counts.updated;
        total.kept_blocks += counts.kept_blocks;
        total.kept_nothing += counts.kept_nothing;
    }
    println!("trees of volumes: seeds {first} to {}: {total:?}", first + seeds - 1);
    let Counts {
        volumes,
        cascaded,
        deepest,
        cuts,
        in_flight_at_cuts,
        retired,
        dropped,
        discarded,
        compared,
        by_owners,
        ..
    } = total;
    for (what, reached) in [
        ("volumes", volumes > 0),
        ("volumes of volumes", cascaded > 0),
        ("volumes three deep", deepest > 2),
        ("cuts", cuts > 0),
        ("requests in flight at a cut", in_flight_at_cuts > 0),
        ("deletions", retired > 0),
        ("volumes dropped", dropped > 0),
        ("discards that were carried out", discarded > 0),
        ("volumes that were compared with their beginning", compared > 0),
        ("moments that were compared by their owners", by_owners > 0),
        ("volumes that became independent", total.completed > 0),
        ("volumes that became independent with snapshots", total.completed_with_snapshots > 0),
        ("completions that were stopped", total.stopped > 0),
        ("updates that kept blocks", total.kept_blocks > 0),
        ("updates that kept nothing because it was not known", total.kept_nothing > 0),
    ] {
        assert!(reached || seeds < 100, "no run reached: {what}");
    }
}

/// One run, for those that plant defects.
#[cfg(feature = "planted")]
pub fn run(seed: u64) {
    Tree::new(seed).run();
}

pub(crate) fn volume_of(bench: &Bench, source: &Arc<Disk>, version: &Version) -> (Arc<Disk>, SimImage) {
    let image = bench.empty_image("volume");
    let layer = Layer::of(Backing::One(Arc::new(image.clone())), bench.table());
    let view = View::of(source.clone(), version.id, "disk@base");
    let discards = Disk::table_in_memory(image.size_bytes(), BLOCK).unwrap();
    let options =
        DiskOptions { image: Backing::View(view), block_bytes: BLOCK, read_only: false, discards: Arc::new(discards) };
    (Disk::volume(bench.clock.clone(), options, VersionId::new_v4(), (VersionId::new_v4(), layer)), image)
}

pub(crate) fn read_all(bench: &Bench, disk: &Arc<Disk>) -> Result<Vec<u8>, RequestError> {
    let (request, memory) = crate::bench::read_of(0..bench.sectors());
    bench.on(disk.attach_live(), &bench.ticket(), request)?;
    Ok(memory())
}

fn refused(done: Result<impl Sized, RequestError>) -> String {
    match done {
        Err(RequestError::Broken(reason)) => reason,
        Err(e) => panic!("another error: {e}"),
        Ok(_) => panic!("it is believed"),
    }
}

/// Not even a write that needs nothing of the base is taken.
#[test]
fn a_volume_is_as_broken_as_what_it_stands_on() {
    for is_deep in [false, true] {
        let bench = Bench::new();
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let (cut, _) = bench.cut();
        cut.frozen[0].set_quiesced();
        let (volume, _) = volume_of(&bench, &bench.disk, &cut.frozen[0]);
        let top = if is_deep {
            let layer = Layer::of(Backing::One(Arc::new(bench.empty_image("log"))), bench.table());
            let prepared = PreparedSnapshot {
                disk: volume.clone(),
                layer: NewLayer::Live { layer },
                new_live: VersionId::new_v4(),
                changed: None,
            };
            let inner = bench.editor.cut(vec![prepared], Writers::Request).unwrap();
            inner.frozen[0].set_quiesced();
            volume_of(&bench, &volume, &inner.frozen[0]).0
        } else {
            volume
        };
        assert_eq!(read_all(&bench, &top).unwrap(), vec![1; bench.sectors()]);
        assert_eq!(top.base_broken(), None);
        bench.disk.break_version(&cut.frozen[0], "no room");
        assert!(refused(read_all(&bench, &top)).contains("no room"));
        let write = bench.on(top.attach_live(), &bench.ticket(), write_of(0..8, 2));
        assert!(refused(write).contains("no room"));
        assert!(refused(bench.on(top.attach_live(), &bench.ticket(), Request::Flush)).contains("no room"));
        assert!(top.base_broken().unwrap().contains("disk@base"));
        // The disk itself is well.
        bench.write(&bench.ticket(), 0..8, 3);
    }
}

/// Whoever protects the version is not asked here; without protection the volume must not show newer bytes.
#[test]
fn a_volume_whose_base_is_deleted_says_so() {
    for to_log in [false, true] {
        let bench = Bench::new();
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let (cut, _) = if to_log { bench.cut_to_log() } else { bench.cut() };
        cut.frozen[0].set_quiesced();
        let (volume, _) = volume_of(&bench, &bench.disk, &cut.frozen[0]);
        bench.write(&bench.ticket(), 0..bench.sectors(), 2);
        assert_eq!(read_all(&bench, &volume).unwrap(), vec![1; bench.sectors()]);
        let (mut job, _) = bench.start_retiring(&cut.frozen[0]);
        assert!(refused(read_all(&bench, &volume)).contains("is being deleted"));
        assert!(job.settle(&mut Rng::new(3)));
        assert!(refused(read_all(&bench, &volume)).contains("was deleted"));
    }
}

/// A read of a volume that has begun keeps the grace of a deletion from being over.
#[test]
fn a_read_of_a_volume_holds_up_the_deletion_of_its_base() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, _) = bench.cut_to_log();
    cut.frozen[0].set_quiesced();
    let (volume, _) = volume_of(&bench, &bench.disk, &cut.frozen[0]);
    bench.write(&bench.ticket(), 0..bench.sectors(), 2);
    let ticket = bench.ticket();
    let (request, _memory) = crate::bench::read_of(0..bench.sectors());
    let (mut reader, queue) = (Scheduler::default(), bench.queue.clone());
    let done = Rc::new(RefCell::new(None));
    let put = done.clone();
    reader.spawn(async move { *put.borrow_mut() = Some(volume.attach_live().execute(&queue, &ticket, request).await) });
    assert!(!reader.poll() && sim::hold_all_in_flight(true) > 0);
    let (mut job, pace) = bench.start_retiring(&cut.frozen[0]);
    assert!(!job.settle(&mut Rng::new(1)), "it must wait for the read");
    assert_eq!(pace.done_bytes.load(Ordering::Relaxed), 0, "nothing was folded under the reader");
    sim::hold_all_in_flight(false);
    assert!(reader.settle(&mut Rng::new(1)));
    let what = done.take().unwrap().expect_err("what it read is not believed");
    assert!(what.to_string().contains("is being deleted"), "{what}");
    assert!(job.settle(&mut Rng::new(1)));
}

#[test]
fn volumes_of_volumes_are_read_as_deep_as_they_may_be() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, _) = bench.cut();
    cut.frozen[0].set_quiesced();
    let (mut disk, mut version) = (bench.disk.clone(), cut.frozen[0].clone());
    let mut expected = vec![1; bench.sectors()];
    for depth in 1..=VOLUMES_DEEP_MAX {
        disk = volume_of(&bench, &disk, &version).0;
        assert_eq!(disk.base().unwrap().depth(), depth);
        let (at, fill) = (depth % bench.sectors(), u8::try_from(depth + 1).unwrap());
        bench.on(disk.attach_live(), &bench.ticket(), write_of(at..at + 1, fill)).unwrap();
        expected[at] = fill;
        assert_eq!(read_all(&bench, &disk).unwrap(), expected);
        let layer = Layer::of(Backing::One(Arc::new(bench.empty_image("log"))), bench.table());
        let prepared = PreparedSnapshot {
            disk: disk.clone(),
            layer: NewLayer::Live { layer },
            new_live: VersionId::new_v4(),
            changed: None,
        };
        version = bench.editor.cut(vec![prepared], Writers::Request).unwrap().frozen.remove(0);
        version.set_quiesced();
    }
    assert_eq!(bench.frozen(&cut.frozen[0]).unwrap(), vec![1; bench.sectors()]);
}

/// A volume of zeros that were never written takes no room, and what is written takes just that.
#[test]
fn a_volume_takes_room_for_what_is_written_to_it() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, frozen) = bench.cut();
    cut.frozen[0].set_quiesced();
    let (volume, image) = volume_of(&bench, &bench.disk, &cut.frozen[0]);
    assert_eq!(image.sectors_in_use(), 0);
    bench.on(volume.attach_live(), &bench.ticket(), write_of(3..4, 2)).unwrap();
    assert_eq!((image.sectors_in_use(), frozen.sectors_in_use()), (8, 0), "one block, filled from below");
    let mut expected = vec![1; bench.sectors()];
    expected[3] = 2;
    assert_eq!(read_all(&bench, &volume).unwrap(), expected);
    assert_eq!(bench.live(), vec![1; bench.sectors()], "the source does not change");
}

/// Entries that were superseded leave their bytes in the log; what is below may be a hole.
#[test]
fn old_bytes_in_the_place_of_zeros_do_not_come_back() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 16..24, 1);
    let (cut, _) = bench.cut();
    cut.frozen[0].set_quiesced();
    let (volume, image) = volume_of(&bench, &bench.disk, &cut.frozen[0]);
    let (old, queue, at) = (image.clone(), bench.queue.clone(), ByteOffset(0));
    bench.run(async move {
        let bytes = halfsilver::image::IoBuf::Guest(filled(8, 9));
        Backing::One(Arc::new(old)).write(&queue, at, bytes, false).await.unwrap();
    });
    let complete = job::complete(bench.queue.clone(), volume.clone(), Arc::new(Pace::default()));
    assert_eq!(bench.run(complete), Ok(Outcome::Done));
    assert!(bench.editor.make_independent(&volume));
    let mut expected = vec![0; bench.sectors()];
    expected[16..24].fill(1);
    assert_eq!(read_all(&bench, &volume).unwrap(), expected);
    assert_eq!(image.sectors_in_use(), 8, "what is zeros takes no room");
}
