//! One random run of a daemon and its guest on a simulated host that may end at any step; what is found after each end;
//! and the next run on what was left, which may end the same way.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::{
    Attachment, Backing, Disk, DiskOptions, Epoch, EpochClock, LegImage, LegState, Pair, Request, Ticket,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, IoQueue};
use halfsilver::job::{Pace, resync};
use halfsilver::store::{BlockIndex, DiskRecord, LegRecord, MirrorRecord};
use uuid::Uuid;

use crate::daemon::{Begun, Daemon, Phases};
use crate::host::{End, Host, Loss};
use crate::judge;
use crate::media::{self, Medium, SECTOR, Scheduler, run, set_aside};
use crate::oracle::{self, Kind, Oracle};
use crate::schedule::Rng;

/// Ends inside what was begun after an end, and so on.
const DEPTH_MAX: usize = 2;
const VERSIONS_MAX: usize = 5;
const HELD_MAX: usize = 2;

/// Which strategy a cut has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strategy {
    CopyOnWrite,
    WriteLogging,
    WriteMirroring,
}

impl Strategy {
    pub fn name(self) -> &'static str {
        match self {
            Strategy::CopyOnWrite => "copy-on-write",
            Strategy::WriteLogging => "write-logging",
            Strategy::WriteMirroring => "write-mirroring",
        }
    }
}

/// A step of the daemon's order that is left out or made in another order, to show that it is noticed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slip {
    NoPendingRecord,
    ImageNotStored,
    /// A start goes by entries that a kill left and that are not durable.
    SavedNotCommitted,
    TableNotNamed,
    LegNotNamed,
    SplitNotPrepared,
    QuiescedNotStored,
    DrainedNotStored,
    DeletionNotRecorded,
    NextBeforeRecord,
    LegBackBeforeRecord,
    RemovedBeforeRecord,
    TableInUseRemoved,
}

impl Slip {
    pub const ALL: [Slip; 13] = [
        Slip::NoPendingRecord,
        Slip::ImageNotStored,
        Slip::SavedNotCommitted,
        Slip::TableNotNamed,
        Slip::LegNotNamed,
        Slip::SplitNotPrepared,
        Slip::QuiescedNotStored,
        Slip::DrainedNotStored,
        Slip::DeletionNotRecorded,
        Slip::NextBeforeRecord,
        Slip::LegBackBeforeRecord,
        Slip::RemovedBeforeRecord,
        Slip::TableInUseRemoved,
    ];
}

/// The legs of a mirror when a run begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Legs {
    Equal,
    /// The second one is still to be copied.
    Behind,
    /// The second one is still to be added.
    One,
}

/// What the disk of a run is made of, and what is done with it.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub block: u32,
    pub sectors: usize,
    pub strategies: [usize; 3],
    /// Which legs there are, if it is mirrored.
    pub legs: Option<Legs>,
    /// Whether copy-on-write snapshots outlive a power cut.
    pub saved_outlive: bool,
    pub slip: Option<Slip>,
}

impl Shape {
    /// Seeds take turns, so that every combination comes up within some dozens of them.
    pub fn of(seed: u64) -> Shape {
        let mut rng = Rng::new(seed ^ 0x7368_6170);
        let block = [4096, 4096, 8192, 4096, 16384][usize::try_from(seed % 5).unwrap()];
        let blocks = if block == 4096 { 3 + rng.below(6) } else { 2 + rng.below(3) };
        let tail = if rng.chance(50) { rng.below(block as usize / SECTOR) } else { 0 };
        let strategies = match seed % 7 {
            0 => [100, 0, 0],
            1 | 2 => [0, 100, 0],
            3 => [20, 20, 60],
            4 => [10, 90, 0],
            _ => [35, 45, 20],
        };
        let legs = (strategies[2] > 0).then(|| match rng.below(100) {
            0..50 => Legs::Equal,
            50..70 => Legs::Behind,
            _ => Legs::One,
        });
        let sectors = blocks * block as usize / SECTOR + tail;
        Shape { block, sectors, strategies, legs, saved_outlive: seed % 3 == 1, slip: None }
    }
}

impl Shape {
    /// Logs on a disk of two blocks: what needs many changes of one block.
    pub fn of_logs(seed: u64) -> Shape {
        Shape { block: 4096, sectors: 16, strategies: [15, 85, 0], legs: None, ..Shape::of(seed) }
    }

    /// Snapshots that outlive power cuts, on a disk of two blocks.
    pub fn of_saved(seed: u64) -> Shape {
        Shape { strategies: [100, 0, 0], saved_outlive: true, ..Shape::of_logs(seed) }
    }

    /// A mirror of two legs that are equal, whose bitmap is cleaned again and again.
    #[cfg(feature = "planted")]
    pub fn of_equal_legs(seed: u64) -> Shape {
        Shape { strategies: [20, 20, 60], legs: Some(Legs::Equal), saved_outlive: false, ..Shape::of(seed) }
    }

    /// A mirror that gets its second leg.
    #[cfg(feature = "planted")]
    pub fn of_new_leg(seed: u64) -> Shape {
        Shape { strategies: [40, 20, 40], legs: Some(Legs::One), ..Shape::of(seed) }
    }
}

/// How often something was seen, by name.
#[derive(Default, Clone)]
pub struct Counts(pub BTreeMap<String, u64>);

impl Counts {
    pub fn add(&mut self, what: impl Into<String>) {
        *self.0.entry(what.into()).or_default() += 1;
    }

    pub fn join(&mut self, other: &Counts) {
        other.0.iter().for_each(|(what, times)| *self.0.entry(what.clone()).or_default() += times);
    }

    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }
}

/// Crash states that were tried.
pub const STATES: &str = "crash states";
/// Those of which the start did what was decided.
pub const COMPARED: &str = "decisions that were carried out as they were made";

/// A host whose disk is served.
pub struct Machine {
    rng: Rng,
    scheduler: Scheduler,
    host: Rc<RefCell<Host>>,
    oracle: Rc<RefCell<Oracle>>,
    daemon: Rc<RefCell<Option<Rc<Daemon>>>>,
    failure: Rc<RefCell<Option<String>>>,
    phases: Rc<Phases>,
    begun: Begun,
    shape: Shape,
    depth: usize,
    counts: Rc<RefCell<Counts>>,
    held: Vec<Ticket>,
    seen: (u64, u64),
    steps: usize,
}

impl Machine {
    pub fn new(seed: u64, shape: Shape, counts: Rc<RefCell<Counts>>) -> Machine {
        let mut rng = Rng::new(seed);
        let host = new_host(shape, &mut rng);
        let live = host.record.as_ref().unwrap().live;
        Machine::on(host, Oracle::new(live, shape.sectors), rng, shape, 0, counts)
    }

    fn on(host: Host, oracle: Oracle, rng: Rng, shape: Shape, depth: usize, counts: Rc<RefCell<Counts>>) -> Machine {
        Machine {
            rng,
            scheduler: Scheduler::default(),
            host: Rc::new(RefCell::new(host)),
            oracle: Rc::new(RefCell::new(oracle)),
            daemon: Rc::default(),
            failure: Rc::default(),
            phases: Rc::default(),
            begun: Begun::default(),
            shape,
            depth,
            counts,
            held: Vec::new(),
            seen: (media::changes(), 0),
            steps: 0,
        }
    }

    /// Serves the disk and ends at many of its steps; then, without an end, everything comes to rest and is looked at.
    pub fn run(mut self, actions: usize) -> Result<(), String> {
        self.start();
        for _ in 0..actions {
            if let Some(daemon) = self.daemon() {
                self.act(&daemon);
            }
            for _ in 0..1 + self.rng.below(8) {
                self.step()?;
            }
        }
        self.held.clear();
        while self.step()? {}
        if self.scheduler.tasks() > 0 {
            return Err(format!("{} tasks hang, amid {:?}", self.scheduler.tasks(), self.phases.now()));
        }
        let daemon = self.daemon().ok_or("it does not start")?;
        judge::at_rest(&daemon, self.shape, &mut self.rng)
    }

    fn daemon(&self) -> Option<Rc<Daemon>> {
        self.daemon.borrow().clone()
    }

    fn start(&mut self) {
        let (host, oracle, shape) = (self.host.clone(), self.oracle.clone(), self.shape);
        let (phases, begun) = (self.phases.clone(), self.begun.clone());
        let (served, failure) = (self.daemon.clone(), self.failure.clone());
        self.scheduler.spawn(async move {
            match Daemon::open(host, oracle, shape, phases, begun).await {
                Ok(daemon) => {
                    daemon.go_on().await;
                    *served.borrow_mut() = Some(daemon);
                }
                Err(e) => *failure.borrow_mut() = Some(format!("it does not start: {e}")),
            }
        });
    }

    /// Moves something, and ends in between. False when nothing can move.
    fn step(&mut self) -> Result<bool, String> {
        self.begun.take().into_iter().for_each(|task| self.scheduler.spawn(task));
        let moved = self.scheduler.step(&mut self.rng);
        self.steps += 1;
        if let Some(failure) = self.failure.borrow_mut().take() {
            return Err(failure);
        }
        if let Some(failure) = self.daemon().and_then(|d| d.failure()) {
            return Err(failure);
        }
        let now = (media::changes(), self.host.borrow().entries());
        if self.seen != now {
            self.end_here(self.seen.0 == now.0)?;
            self.seen = (media::changes(), now.1);
        }
        Ok(moved || !self.begun.borrow().is_empty())
    }

    /// What would be found if it ended now; now and then also what comes of it. If only entries have changed, which no
    /// power cut leaves, it is killed.
    fn end_here(&mut self, only_entries: bool) -> Result<(), String> {
        let (percent, deeper) = [(100, 3), (40, 2), (25, 0)][self.depth];
        if !self.rng.chance(percent) {
            return Ok(());
        }
        let end = if only_entries { End::Kill } else { End::some(&mut self.rng) };
        let mut rng = Rng::new(self.rng.next());
        let goes_on = self.depth < DEPTH_MAX && rng.chance(deeper);
        let what = |e: String| {
            let amid = self.phases.now().join(", ");
            format!("depth {}, step {}, {end:?}, amid [{amid}]: {e}", self.depth, self.steps)
        };
        self.count(end);
        let left = self.host.borrow().after(end, &mut rng);
        let next = goes_on.then(|| left.copy());
        let _aside = set_aside();
        let found = judge::find(left, &self.oracle, end, self.shape, &mut rng, &self.counts).map_err(what)?;
        let Some(host) = next else { return Ok(()) };
        let actions = 6 + rng.below(24);
        crate::trace(|| format!("--- goes on at depth {} after {end:?} at step {}", self.depth + 1, self.steps));
        let then = Machine::on(host, found, rng, self.shape, self.depth + 1, self.counts.clone());
        then.run(actions).map_err(|e| what(format!("\n  then {e}")))
    }

    /// Which rare state this is.
    fn count(&self, end: End) {
        let mut counts = self.counts.borrow_mut();
        counts.add(STATES);
        counts.add(format!("depth {}", self.depth));
        counts.add(match end {
            End::Kill => "kills",
            End::PowerCut(_) => "power cuts",
        });
        for phase in self.phases.now() {
            counts.add(format!("amid {phase}"));
            if self.depth == DEPTH_MAX {
                counts.add(format!("at depth {DEPTH_MAX} amid {phase}"));
            }
        }
        let host = self.host.borrow();
        let torn = |dir: &str| {
            host.files.iter().any(|(path, file)| path.starts_with(dir) && file.medium.unsynced_sectors() > 0)
        };
        if end == End::PowerCut(Loss::OnlyTables) && torn("tables") && torn("images") {
            counts.add("tables kept, images lost");
        }
        if end == End::PowerCut(Loss::OnlyImages) && torn("tables") {
            counts.add("images kept, tables lost");
        }
        if let Some(daemon) = self.daemon() {
            let chain = daemon.disk.chain();
            if chain.links().iter().filter(|link| link.layer.log().is_some()).count() > 1 {
                counts.add("several logs");
            }
            if chain.links().iter().any(|link| link.splits) {
                counts.add("a mirror that was split");
            }
            if chain.links().len() > 2 && chain.links()[..chain.live()].iter().any(|l| l.layer.is_full()) {
                counts.add("a frozen full image");
            }
        }
    }

    fn act(&mut self, daemon: &Rc<Daemon>) {
        if !daemon.clock.can_advance() {
            self.held.clear();
        }
        match self.rng.below(100) {
            0..50 => self.submit(daemon),
            50..58 => self.flush(daemon),
            58..65 if daemon.disk.chain().links().len() < VERSIONS_MAX => {
                let at = self.rng.below(100);
                let [saved, logged, _] = self.shape.strategies;
                let strategy = match at {
                    at if at < saved => Strategy::CopyOnWrite,
                    at if at < saved + logged => Strategy::WriteLogging,
                    _ => Strategy::WriteMirroring,
                };
                let daemon = daemon.clone();
                self.scheduler.spawn(async move { daemon.create(strategy).await });
            }
            65..73 => {
                let entries = daemon.deletable();
                if !entries.is_empty() {
                    let entry = entries[self.rng.below(entries.len())].clone();
                    let daemon = daemon.clone();
                    self.scheduler.spawn(async move { daemon.delete(entry).await });
                }
            }
            73..76 if !self.held.is_empty() => drop(self.held.swap_remove(self.rng.below(self.held.len()))),
            76..80 if self.shape.legs.is_some() => {
                let daemon = daemon.clone();
                self.scheduler.spawn(async move { daemon.clean().await });
            }
            80..83 if self.shape.legs.is_some() => {
                let daemon = daemon.clone();
                self.scheduler.spawn(async move { daemon.add_leg().await });
            }
            _ => {}
        }
    }

    fn range(&mut self) -> Range<usize> {
        let (sectors, block) = (self.shape.sectors, self.shape.block as usize / SECTOR);
        let first = self.rng.below(sectors);
        let longest = if self.rng.chance(75) { block + 2 } else { 3 * block };
        let mut range = first..first + 1 + self.rng.below((sectors - first).min(longest));
        if self.rng.chance(45) {
            range.start = range.start / block * block; // Whole blocks.
            range.end = range.end.next_multiple_of(block).min(sectors);
        }
        range
    }

    fn ticket(&mut self, daemon: &Daemon) -> Ticket {
        if !self.held.is_empty() && self.rng.chance(30) {
            return self.held[self.rng.below(self.held.len())].again();
        }
        let ticket = daemon.clock.lane().enter();
        if self.held.len() < HELD_MAX && self.rng.chance(6) {
            self.held.push(ticket.again());
        }
        ticket
    }

    fn submit(&mut self, daemon: &Rc<Daemon>) {
        let (ticket, mut range) = (self.ticket(daemon), self.range());
        let (kind, durable) = match self.rng.below(100) {
            0..70 => (Kind::Write, self.rng.chance(15)),
            70..85 => (Kind::Zeroes, self.rng.chance(15)),
            _ => (Kind::Discard, false),
        };
        if kind == Kind::Discard {
            let block = self.shape.block as usize / SECTOR;
            range.start = range.start.next_multiple_of(block);
            if range.end != self.shape.sectors {
                range.end = range.end / block * block;
            }
            if range.is_empty() {
                return;
            }
        }
        let epoch = ticket.epoch();
        let number = self.oracle.borrow_mut().begin_change(epoch, range.clone(), kind, durable);
        media::count_change();
        let (at, len) = (ByteOffset((range.start * SECTOR) as u64), (range.len() * SECTOR) as u64);
        let request = match kind {
            Kind::Write => Request::Write { at, from: oracle::filled(range.start, range.len(), number), durable },
            Kind::Zeroes => Request::WriteZeroes { at, len, unmap: self.rng.chance(50), durable },
            Kind::Discard => Request::Discard { at, len },
        };
        let what = if daemon.clock.current() == epoch { "a guest's change" } else { "a change of an old epoch" };
        let (phase, daemon, oracle) = (self.phases.begin(what), daemon.clone(), self.oracle.clone());
        let failure = self.failure.clone();
        self.scheduler.spawn(async move {
            let done = daemon.disk.attach_live().execute(&daemon.queue, &ticket, request).await;
            match done {
                Ok(()) => oracle.borrow_mut().end_change(number),
                Err(e) => *failure.borrow_mut() = Some(format!("a guest's request failed: {e}")),
            }
            media::count_change();
            drop((phase, ticket));
        });
    }

    fn flush(&mut self, daemon: &Rc<Daemon>) {
        let ticket = self.ticket(daemon);
        let (daemon, oracle) = (daemon.clone(), self.oracle.clone());
        let flush = oracle.borrow().begin_flush();
        let (phase, failure) = (self.phases.begin("a flush"), self.failure.clone());
        self.scheduler.spawn(async move {
            let done = daemon.disk.attach_live().execute(&daemon.queue, &ticket, Request::Flush).await;
            match done {
                Ok(()) => oracle.borrow_mut().end_flush(&flush),
                Err(e) => *failure.borrow_mut() = Some(format!("a flush failed: {e}")),
            }
            media::count_change();
            drop((phase, ticket));
        });
    }
}

/// The whole content that a socket shows.
pub async fn read(
    attachment: &Attachment,
    queue: &IoQueue,
    clock: &EpochClock,
    sectors: usize,
) -> Result<Vec<u8>, String> {
    let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(sectors * SECTOR));
    let ticket = clock.lane().enter();
    let done = attachment.execute(queue, &ticket, Request::Read { at: ByteOffset(0), into }).await;
    done.map(|()| memory.to_vec()).map_err(|e| e.to_string())
}

/// A host with a disk, and nothing that is not stored.
fn new_host(shape: Shape, rng: &mut Rng) -> Host {
    let mut host = Host { boot: Uuid::from_u128(1), names: 100, ..Host::default() };
    let bytes = oracle::initial(shape.sectors);
    host.put_file("legs/0".as_ref(), bytes.clone());
    let mirror = shape.legs.map(|legs| {
        let (ids, bitmap) = ([Uuid::from_u128(10), Uuid::from_u128(11)], Uuid::from_u128(12));
        let (first, second) = (Medium::with("first", bytes.clone()), Medium::new("second", bytes.len()));
        let leg = |id: Uuid, medium: &Medium| LegImage { id, image: Arc::new(medium.clone()) };
        let table =
            Medium::new("bitmap", usize::try_from(Pair::bitmap_bytes(bytes.len() as u64, shape.block)).unwrap());
        let (one, other, of) = (leg(ids[0], &first), leg(ids[1], &second), Arc::new(table.clone()));
        run(rng, async move {
            let queue = IoQueue::simulated();
            let pair = Pair::create(one, of, bitmap, shape.block, &queue).await.unwrap();
            if legs != Legs::One {
                pair.attach(&queue, other, true).await.unwrap();
            }
            if legs != Legs::Equal {
                return;
            }
            let discards = Disk::table_in_memory(pair.size_bytes(), shape.block).unwrap();
            let image = Backing::Pair(pair.clone());
            let options = DiskOptions { image, block_bytes: shape.block, read_only: false, discards };
            let disk = Disk::new(EpochClock::new(Epoch(1)), options);
            resync(queue, disk, pair, Arc::new(Pace::default())).await.unwrap();
        });
        if legs != Legs::One {
            host.put_file("legs/1".as_ref(), second.bytes());
        }
        host.put_file(format!("tables/{bitmap}.log").as_ref(), table.bytes());
        let count = if legs == Legs::One { 1 } else { 2 };
        let leg = |(at, id)| LegRecord { id, path: format!("legs/{at}").into(), saved: None };
        let legs = ids.into_iter().enumerate().take(count).map(leg);
        MirrorRecord { bitmap, legs: legs.collect(), stopped: false }
    });
    host.record = Some(DiskRecord {
        id: Uuid::from_u128(2),
        name: "disk".to_owned(),
        config: serde_json::json!({ "path": "legs/0" }),
        live: Uuid::from_u128(3),
        live_began: 0,
        live_log: None,
        live_saved_table: None,
        live_saved: None,
        live_splits: false,
        live_changed: None,
        bookmarks: Vec::new(),
        mirror,
        volume: None,
        stood_on: None,
        disabled: false,
        own_image: false,
        logical_block_bytes: None,
        work: None,
        next_live: None,
        set: serde_json::Value::Null,
        restore: None,
        former_legs: Vec::new(),
        boot: Some(host.boot),
        snapshots: Vec::new(),
        saved: None,
        saved_discards: None,
    });
    host
}

/// Whether the legs that are said to be equal are.
pub fn legs_are_equal(daemon: &Daemon) -> Result<(), String> {
    let in_sync: Vec<_> = daemon.legs().into_iter().filter(|(_, state)| *state == LegState::InSync).collect();
    if let [(first, _), (second, _)] = &in_sync[..] {
        let host = daemon.host.borrow();
        if host.files[first].medium.bytes() != host.files[second].medium.bytes() {
            return Err("both legs are in sync, and they differ".to_owned());
        }
    }
    Ok(())
}

/// How many entries a log has.
pub fn entries_of_logs(daemon: &Daemon) -> usize {
    let chain = daemon.disk.chain();
    let tables = chain.links().iter().filter_map(|link| link.layer.log().map(|log| log.table.table().clone()));
    tables.map(|table| table.next_set(BlockIndex(0)).map_or(0, |_| usize::try_from(table.count()).unwrap())).sum()
}
