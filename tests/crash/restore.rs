//! Power cuts at every step of a restore in place, while guests write and flush: what is found is what the disk was before,
//! or what it is restored to and everything that was flushed since.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::{
    Backing, ChainEditor, Disk, DiskOptions, Epoch, EpochClock, Layer, Link, Log, Request, RestoreSource, Restoring,
    Saved, Version, VersionId,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, IoQueue};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::store::{BlockIndex, BlockRange, DurableTable, PAYLOAD_BYTES, Table};

use crate::media::{Medium, SECTOR, Scheduler, run};
use crate::schedule::Rng;

const BLOCK: u32 = 4096;
const BLOCK_SECTORS: usize = 8;
/// The last block is short.
const SECTORS: usize = 5 * BLOCK_SECTORS + 3;
/// Each writer has its own sectors, so that their order is known. The borders are inside blocks.
const WRITERS: [Range<usize>; 3] = [0..13, 13..29, 29..SECTORS];
const FROZEN: VersionId = VersionId::from_u128(1);
const LIVE: VersionId = VersionId::from_u128(2);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    CopyOnWrite,
    WriteLogging,
}

/// What is on the host.
#[derive(Clone)]
struct Host {
    /// The full image, and the layer of the version that has not got it.
    full: Medium,
    layer: Medium,
    /// The durable table of the layer, and of pending blocks.
    table: Medium,
    pending: Medium,
    /// What the records say: that the snapshot outlives a power cut, and that the restore is active.
    is_saved: bool,
    is_active: bool,
}

/// For each sector what it may show after a power cut: what is durable, and what was written since, in order.
#[derive(Clone)]
struct Oracle {
    may: Vec<Vec<u64>>,
    /// The last write that was answered.
    answered: Vec<u64>,
}

impl Oracle {
    fn write(&mut self, sectors: Range<usize>, tag: u64) {
        self.may[sectors].iter_mut().for_each(|may| may.push(tag));
    }

    fn answer(&mut self, sectors: Range<usize>, tag: u64, durable: bool) {
        for sector in sectors {
            if self.may[sector].contains(&tag) {
                self.answered[sector] = tag;
                if durable {
                    self.store(sector, tag);
                }
            }
        }
    }

    fn store(&mut self, sector: usize, tag: u64) {
        let may = &mut self.may[sector];
        if let Some(at) = may.iter().position(|t| *t == tag) {
            may.drain(..at);
        }
    }

    /// What was answered is undone; what is on its way may come before or after.
    fn restore(&mut self, to: &[u64]) {
        for (sector, tag) in to.iter().enumerate() {
            let answered = self.answered[sector];
            let after = self.may[sector].iter().position(|t| *t == answered).map_or(0, |at| at + 1);
            self.may[sector].drain(..after);
            self.may[sector].insert(0, *tag);
            self.answered[sector] = *tag;
        }
    }
}

struct Machine {
    kind: Kind,
    host: Rc<RefCell<Host>>,
    clock: EpochClock,
    editor: Arc<ChainEditor>,
    disk: Arc<Disk>,
    oracle: Rc<RefCell<Oracle>>,
    /// What the snapshot shows.
    frozen: Rc<Vec<u64>>,
}

fn new_table() -> Table {
    Disk::table_in_memory((SECTORS * SECTOR) as u64, BLOCK).unwrap()
}

fn durable_medium(name: &str) -> Medium {
    Medium::new(name, usize::try_from(DurableTable::image_bytes(new_table().blocks())).unwrap())
}

fn medium_of(name: &str, tags: &[u64]) -> Medium {
    let bytes = tags.iter().flat_map(|tag| tag.to_le_bytes().repeat(SECTOR / 8)).collect();
    Medium::with(name, bytes)
}

fn filled(sectors: usize, tag: u64) -> GuestBuf {
    let mut data = AlignedBuf::zeroed(sectors * SECTOR);
    data.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&tag.to_le_bytes()));
    GuestBuf::from_owned(data).0
}

fn tags(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(SECTOR).map(|sector| u64::from_le_bytes(sector[..8].try_into().unwrap())).collect()
}

fn blocks_of(sectors: &[usize]) -> Table {
    let table = new_table();
    for &block in sectors {
        let one = BlockRange::one(BlockIndex(block as u64));
        table.prepare(one).unwrap();
        table.set(one);
    }
    table
}

fn one(medium: &Medium) -> Backing {
    Backing::One(Arc::new(medium.clone()))
}

async fn create(medium: &Medium, id: u128, table: Arc<Table>, queue: &IoQueue) -> DurableTable {
    let (image, id) = (Arc::new(medium.clone()), VersionId::from_u128(id));
    DurableTable::create(image, id, table, [0; PAYLOAD_BYTES], queue).await.unwrap()
}

async fn load(medium: &Medium, id: u128, queue: &IoQueue) -> DurableTable {
    let (image, id) = (Arc::new(medium.clone()), VersionId::from_u128(id));
    let (table, report) = DurableTable::load(image, id, Arc::new(new_table()), queue).await.unwrap();
    assert!(report.damaged.is_empty(), "{:?}", report.damaged);
    table
}

fn saved(table: DurableTable) -> Arc<Saved> {
    Arc::new(Saved { table, revoke: Box::new(|| Ok(())) })
}

impl Host {
    fn after_power_cut(&self, rng: &mut Rng) -> Host {
        let mut cut = |medium: &Medium| medium.after_power_cut(rng);
        let (full, layer) = (cut(&self.full), cut(&self.layer));
        Host { full, layer, table: cut(&self.table), pending: cut(&self.pending), ..self.clone() }
    }
}

impl Machine {
    /// A disk that has changed since its snapshot.
    fn new(kind: Kind, rng: &mut Rng) -> Machine {
        let old: Vec<u64> = (0..SECTORS as u64).map(|sector| 1000 + sector).collect();
        let changed: Vec<usize> = (0..SECTORS.div_ceil(BLOCK_SECTORS)).filter(|_| rng.chance(50)).collect();
        let mut live = old.clone();
        for (sector, tag) in live.iter_mut().enumerate() {
            if changed.contains(&(sector / BLOCK_SECTORS)) {
                *tag += 1000;
            }
        }
        let (full, other) = match kind {
            Kind::CopyOnWrite => (&live, &old),
            Kind::WriteLogging => (&old, &live),
        };
        let host = Host {
            full: medium_of("full", full),
            layer: medium_of("layer", other),
            table: durable_medium("table"),
            pending: durable_medium("pending"),
            is_saved: kind == Kind::WriteLogging,
            is_active: false,
        };
        let table = Arc::new(blocks_of(&changed));
        let layer = match kind {
            // By default what is saved need not outlive a power cut.
            Kind::CopyOnWrite => Layer::of(one(&host.layer), table),
            Kind::WriteLogging => {
                let medium = host.table.clone();
                let table = run(rng, async move { create(&medium, 1, table, &IoQueue::simulated()).await });
                Layer::logged(one(&host.layer), Arc::new(Log { table, freed: new_table() }))
            }
        };
        let oracle = Oracle { may: live.iter().map(|tag| vec![*tag]).collect(), answered: live };
        Machine::with(kind, host, Some(layer), Rc::new(RefCell::new(oracle)), Rc::new(old))
    }

    fn with(
        kind: Kind,
        host: Host,
        layer: Option<Layer>,
        oracle: Rc<RefCell<Oracle>>,
        frozen: Rc<Vec<u64>>,
    ) -> Machine {
        let clock = EpochClock::new(Epoch(10));
        let full = Layer::full(one(&host.full));
        let link = |id, began, layer| Link { version: Version::new(id, Epoch(began)), layer, splits: false };
        let links = match (kind, layer) {
            (_, None) => vec![link(LIVE, 5, full)],
            (Kind::CopyOnWrite, Some(layer)) => vec![link(FROZEN, 0, layer), link(LIVE, 5, full)],
            (Kind::WriteLogging, Some(layer)) => vec![link(FROZEN, 0, full), link(LIVE, 5, layer)],
        };
        links[..links.len() - 1].iter().for_each(|link| link.version.set_quiesced());
        let options = DiskOptions {
            image: one(&host.full),
            block_bytes: BLOCK,
            read_only: false,
            discards: Arc::new(new_table()),
        };
        let disk = Disk::with_chain(clock.clone(), options, links);
        let editor = Arc::new(ChainEditor::new(clock.clone()));
        Machine { kind, host: Rc::new(RefCell::new(host)), clock, editor, disk, oracle, frozen }
    }

    /// What a start finds after a power cut.
    fn found(&self, host: Host, rng: &mut Rng) -> Machine {
        let of = host.clone();
        let (table, pending) = run(rng, async move {
            let queue = IoQueue::simulated();
            let table = match of.is_saved {
                true => Some(load(&of.table, 1, &queue).await),
                false => None,
            };
            let pending = match of.is_active {
                true => Some(load(&of.pending, 2, &queue).await),
                false => None,
            };
            (table, pending)
        });
        let layer = table.map(|table| match self.kind {
            Kind::CopyOnWrite => Layer::saved(one(&host.layer), saved(table)),
            Kind::WriteLogging => Layer::logged(one(&host.layer), Arc::new(Log { table, freed: new_table() })),
        });
        let oracle = Rc::new(RefCell::new(self.oracle.borrow().clone()));
        let found = Machine::with(self.kind, host, layer, oracle, self.frozen.clone());
        if let Some(pending) = pending {
            found.editor.resume_restore(&found.disk, Restoring::new(pending, RestoreSource::Own(FROZEN)));
        }
        found
    }

    /// `life` makes the tags of a machine different from those that an earlier one has left.
    fn start_writers(&self, scheduler: &mut Scheduler, rng: &mut Rng, life: u64) {
        for (writer, own) in WRITERS.into_iter().enumerate() {
            let (clock, oracle, mut rng) = (self.clock.clone(), self.oracle.clone(), Rng::new(rng.next()));
            let attachment = self.disk.attach_live();
            scheduler.spawn(async move {
                let (queue, lane) = (IoQueue::simulated(), clock.lane());
                for turn in 0..10 {
                    let from = own.start + rng.below(own.len());
                    let sectors = from..from + 1 + rng.below(own.end - from);
                    let tag = 10_000 * life + 1000 * writer as u64 + turn;
                    let durable = rng.chance(15);
                    oracle.borrow_mut().write(sectors.clone(), tag);
                    let at = ByteOffset((sectors.start * SECTOR) as u64);
                    let from = filled(sectors.len(), tag);
                    attachment.execute(&queue, &lane.enter(), Request::Write { at, from, durable }).await.unwrap();
                    oracle.borrow_mut().answer(sectors, tag, durable);
                    if rng.chance(35) {
                        let answered = oracle.borrow().answered.clone();
                        attachment.execute(&queue, &lane.enter(), Request::Flush).await.unwrap();
                        let mut oracle = oracle.borrow_mut();
                        (0..SECTORS).for_each(|sector| oracle.store(sector, answered[sector]));
                    }
                }
            });
        }
    }

    /// In the order of the daemon.
    fn start_restore(&self, scheduler: &mut Scheduler, begun: &Rc<Cell<bool>>) {
        let (editor, disk, oracle) = (self.editor.clone(), self.disk.clone(), self.oracle.clone());
        let (host, frozen, begun, kind) = (self.host.clone(), self.frozen.clone(), begun.clone(), self.kind);
        scheduler.spawn(async move {
            let queue = IoQueue::simulated();
            let of = host.borrow().clone();
            let attachment = disk.attach_live();
            attachment.execute(&queue, &disk.clock().lane().enter(), Request::Flush).await.unwrap();
            if kind == Kind::CopyOnWrite {
                let chain = disk.chain();
                let Some(table) = chain.layer(0).table() else { unreachable!() };
                let table = create(&of.table, 1, table.clone(), &queue).await;
                editor.save_durably(&disk, FROZEN, Some(saved(table)));
                disk.changes_passed().await;
            }
            disk.make_durable(&queue, FROZEN).await.unwrap();
            host.borrow_mut().is_saved = true;
            let pending = create(&of.pending, 2, Arc::new(new_table()), &queue).await;
            let closed = editor.close(&disk, false);
            disk.changes_passed().await;
            disk.store_brought_back(&queue).await.unwrap();
            let source = RestoreSource::Own(FROZEN);
            disk.find_differences(&source, pending.table()).unwrap();
            pending.commit(&queue).await.unwrap();
            host.borrow_mut().is_active = true;
            oracle.borrow_mut().restore(&frozen);
            closed.begin(Restoring::new(pending, source));
            begun.set(true);
            let done = job::restore(queue, disk.clone(), Arc::new(Pace::default())).await.unwrap();
            assert_eq!(done, Outcome::Done);
            host.borrow_mut().is_active = false;
            assert!(editor.end_restore(&disk));
        });
    }

    fn shown(&self, rng: &mut Rng, frozen: bool) -> Vec<u64> {
        let attachment = if frozen { self.disk.attach_frozen(FROZEN) } else { self.disk.attach_live() };
        let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(SECTORS * SECTOR));
        let ticket = self.clock.lane().enter();
        run(rng, async move {
            let read = Request::Read { at: ByteOffset(0), into };
            attachment.execute(&IoQueue::simulated(), &ticket, read).await.unwrap();
        });
        tags(&memory.to_vec())
    }

    /// What is found is allowed, and stays when the restore goes on to its end.
    fn judge(&self, rng: &mut Rng, what: &str) {
        let shown = self.shown(rng, false);
        for (sector, tag) in shown.iter().enumerate() {
            let may = &self.oracle.borrow().may[sector];
            assert!(may.contains(tag), "{what}: sector {sector} shows {tag}, allowed {may:?}");
        }
        let is_restored = self.disk.chain().restoring().is_some();
        if is_restored {
            let disk = self.disk.clone();
            let done =
                run(rng, async move { job::restore(IoQueue::simulated(), disk, Arc::new(Pace::default())).await });
            assert_eq!(done.unwrap(), Outcome::Done, "{what}");
            assert!(self.editor.end_restore(&self.disk));
            assert_eq!(self.shown(rng, false), shown, "{what}: it changed when the restore went on");
        }
        if self.host.borrow().is_saved {
            assert_eq!(self.shown(rng, true), *self.frozen, "{what}: the snapshot");
        }
    }
}

#[derive(Default, Debug)]
struct Seen {
    cuts: usize,
    before: usize,
    amid: usize,
    after: usize,
    again: usize,
}

/// False when all was over before the cut.
fn run_until(kind: Kind, seed: u64, cut: usize, seen: &mut Seen) -> bool {
    let mut rng = Rng::new(seed);
    let machine = Machine::new(kind, &mut rng);
    let (begun, mut scheduler) = (Rc::new(Cell::new(false)), Scheduler::default());
    machine.start_writers(&mut scheduler, &mut rng, 1);
    machine.start_restore(&mut scheduler, &begun);
    let went_on = (0..cut).all(|_| scheduler.step(&mut rng));
    let left = machine.host.borrow().after_power_cut(&mut rng);
    drop(scheduler);
    seen.cuts += 1;
    match (left.is_active, begun.get()) {
        (true, _) => seen.amid += 1,
        (false, false) => seen.before += 1,
        (false, true) => seen.after += 1,
    }
    let what = format!("{kind:?}, seed {seed}, cut at step {cut}");
    let found = machine.found(left, &mut rng);
    if found.host.borrow().is_active && rng.chance(50) {
        // Cut again, while it goes on and guests write.
        seen.again += 1;
        let shown = found.shown(&mut rng, false);
        // What was found is what the guests go on with; it need not be durable.
        for (sector, tag) in shown.iter().enumerate() {
            let mut oracle = found.oracle.borrow_mut();
            oracle.may[sector] = vec![*tag];
            oracle.answered[sector] = *tag;
        }
        let mut scheduler = Scheduler::default();
        found.start_writers(&mut scheduler, &mut rng, 2);
        let disk = found.disk.clone();
        scheduler.spawn(async move {
            job::restore(IoQueue::simulated(), disk, Arc::new(Pace::default())).await.unwrap();
        });
        let steps = rng.below(200);
        let _all = (0..steps).all(|_| scheduler.step(&mut rng));
        let left = found.host.borrow().after_power_cut(&mut rng);
        drop(scheduler);
        found.found(left, &mut rng).judge(&mut rng, &format!("{what}, and {steps} steps later"));
    } else {
        found.judge(&mut rng, &what);
    }
    went_on
}

fn cut_everywhere(kind: Kind, seeds: Range<u64>, stride: usize, seen: &mut Seen) {
    for seed in seeds {
        let mut cut = usize::try_from(seed).unwrap() % stride;
        while run_until(kind, seed, cut, seen) {
            cut += stride;
        }
    }
}

#[test]
fn after_every_power_cut_the_disk_is_as_before_or_restored() {
    let _undisturbed = crate::alone::undisturbed();
    for kind in [Kind::CopyOnWrite, Kind::WriteLogging] {
        let mut seen = Seen::default();
        cut_everywhere(kind, 1..4, 1, &mut seen);
        cut_everywhere(kind, 4..60, 17, &mut seen);
        println!("{kind:?}: {seen:?}");
        let Seen { before, amid, after, again, .. } = seen;
        assert!(before > 50 && amid > 50 && after > 10 && again > 20, "{kind:?}: {seen:?}");
    }
}
