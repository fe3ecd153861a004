//! A volume that becomes independent on media that forget what was not synced: at each step it ends, by a kill or a power
//! cut, and must be what its record says: it stands on its snapshot, with a log and the log's table, or its log is all of
//! it. What was flushed is there, after a kill all that was acknowledged.
//!
//! In the middle of it a snapshot of the volume is taken: from then on guests write to a second log, flushes store both, and
//! the snapshot shows the same after any end.
//!
//! The source is frozen and stored. One guest writes and flushes; its requests follow one another.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::{
    Attachment, Backing, ChainEditor, Disk, DiskOptions, Epoch, EpochClock, EpochLane, Layer, Log, NewLayer,
    PreparedSnapshot, Request, VersionId, View, Writers,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, IoQueue};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::store::{BlockIndex, DurableTable, PAYLOAD_BYTES, Table};

use crate::media::{self, Medium, SECTOR, Scheduler, run, set_aside};
use crate::schedule::Rng;

pub(crate) const BLOCK: u32 = 4096;
pub(crate) const PER_BLOCK: usize = 8;
/// The last block is short.
pub(crate) const SECTORS: usize = 7 * PER_BLOCK + 3;
const SEEDS: u64 = 400;
const WRITES: usize = 10;

/// What may be found.
#[derive(Default)]
pub(crate) struct Oracle {
    /// What each sector was when the last flush that has ended began.
    pub(crate) stored: Vec<u64>,
    /// All that was written since, or is being written.
    pub(crate) since: Vec<Vec<u64>>,
    /// What was acknowledged, and what is in flight.
    pub(crate) acknowledged: Vec<u64>,
    pub(crate) in_flight: Option<(std::ops::Range<usize>, u64)>,
}

impl Oracle {
    pub(crate) fn of(content: &[u64]) -> Oracle {
        let since = vec![Vec::new(); content.len()];
        Oracle { stored: content.to_vec(), since, acknowledged: content.to_vec(), in_flight: None }
    }

    pub(crate) fn require_after_kill(&self, found: &[u64], what: &str) {
        for (sector, got) in found.iter().enumerate() {
            let now = self.in_flight.as_ref().filter(|(sectors, _)| sectors.contains(&sector)).map(|(_, tag)| tag);
            let is_right = *got == self.acknowledged[sector] || Some(got) == now;
            assert!(is_right, "after a kill, {what}: sector {sector} shows {got}");
        }
    }

    pub(crate) fn require_after_power_cut(&self, found: &[u64], what: &str) {
        for (sector, got) in found.iter().enumerate() {
            let is_right = *got == self.stored[sector] || self.since[sector].contains(got);
            assert!(is_right, "after a power cut, {what}: sector {sector} shows {got}");
        }
    }
}

#[derive(Default, Debug)]
struct Counts {
    cuts: u64,
    kills: u64,
    standing: u64,
    independent: u64,
    entries_found: u64,
    /// Ends after a snapshot, when the volume stood on its source and when it did not.
    frozen_standing: u64,
    frozen_independent: u64,
    newer_entries_found: u64,
}

/// What the records say.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) independent: bool,
    /// A cut is about to be, or was.
    has_newer_log: bool,
    /// What the snapshot shows, when it is quiesced.
    frozen: Option<Vec<u64>>,
}

/// A log of the volume: its image, its table, and that one's mapping.
pub(crate) struct LogMedia {
    pub(crate) image: Medium,
    pub(crate) durable: Medium,
    pub(crate) run_table: Arc<Table>,
}

impl LogMedia {
    pub(crate) fn new(rng: &mut Rng) -> (LogMedia, Layer) {
        let (image, run_table) = (Medium::new("log", SECTORS * SECTOR), Arc::new(table()));
        let size = usize::try_from(DurableTable::image_bytes(run_table.blocks())).unwrap();
        let media = LogMedia { image, durable: Medium::new("durable", size), run_table };
        let made = media.durable_table(rng);
        let log = Arc::new(Log { table: made, freed: table() });
        let layer = Layer::logged(Backing::One(Arc::new(media.image.clone())), log);
        (media, layer)
    }

    /// An empty one on its medium.
    pub(crate) fn durable_table(&self, rng: &mut Rng) -> DurableTable {
        let (stored, of) = (Arc::new(self.durable.clone()), self.run_table.clone());
        run(rng, async move {
            let queue = IoQueue::simulated();
            DurableTable::create(stored, VersionId::nil(), of, [0; PAYLOAD_BYTES], &queue).await.unwrap()
        })
    }

    /// Its content and its entries after a kill.
    pub(crate) fn after_kill(&self, rng: &mut Rng) -> FoundLog {
        FoundLog { content: tags(&self.image.after_kill(rng).bytes()), entries: self.run_table.clone() }
    }

    pub(crate) fn after_power_cut(&self, rng: &mut Rng) -> FoundLog {
        let (image, durable) = (self.image.after_power_cut(rng), self.durable.after_power_cut(rng));
        let (into, aside) = (Arc::new(table()), set_aside());
        let entries = run(rng, async move {
            let queue = IoQueue::simulated();
            let (table, report) = DurableTable::load(Arc::new(durable), VersionId::nil(), into, &queue).await.unwrap();
            assert!(report.damaged.is_empty());
            table.table().clone()
        });
        drop(aside);
        FoundLog { content: tags(&image.bytes()), entries }
    }
}

pub(crate) struct FoundLog {
    pub(crate) content: Vec<u64>,
    pub(crate) entries: Arc<Table>,
}

impl FoundLog {
    pub(crate) fn owns(&self, sector: usize) -> bool {
        self.entries.get(BlockIndex((sector / PER_BLOCK) as u64))
    }
}

pub(crate) fn table() -> Table {
    Disk::table_in_memory((SECTORS * SECTOR) as u64, BLOCK).unwrap()
}

pub(crate) fn filled(sectors: usize, tag: u64) -> GuestBuf {
    let mut data = AlignedBuf::zeroed(sectors * SECTOR);
    data.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&tag.to_le_bytes()));
    GuestBuf::from_owned(data).0
}

pub(crate) fn tags(bytes: &[u8]) -> Vec<u64> {
    let tag = |sector: &[u8]| u64::from_le_bytes(sector[..8].try_into().unwrap());
    bytes.chunks_exact(SECTOR).map(tag).collect()
}

/// The source's bytes: some blocks are zeros.
pub(crate) fn source_bytes(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0; SECTORS * SECTOR];
    for block in bytes.chunks_mut(BLOCK as usize) {
        if rng.chance(70) {
            block.chunks_mut(8).for_each(|word| word.copy_from_slice(&1_u64.to_le_bytes()));
        }
    }
    bytes
}

struct World {
    rng: Rng,
    source: Vec<u64>,
    /// The oldest one first.
    logs: [LogMedia; 2],
    record: Rc<RefCell<Record>>,
    oracle: Rc<RefCell<Oracle>>,
    scheduler: Scheduler,
    counts: Counts,
}

impl World {
    fn new(seed: u64) -> World {
        let (mut rng, queue) = (Rng::new(seed), IoQueue::simulated());
        let bytes = source_bytes(&mut rng);
        let source = tags(&bytes);
        let clock = EpochClock::new(Epoch(1));
        let editor = Arc::new(ChainEditor::new(clock.clone()));
        let options = |image| DiskOptions { image, block_bytes: BLOCK, read_only: false, discards: Arc::new(table()) };
        let disk = Disk::new(clock.clone(), options(Backing::One(Arc::new(Medium::with("source", bytes)))));
        let above = Layer::of(Backing::One(Arc::new(Medium::new("above", SECTORS * SECTOR))), Arc::new(table()));
        let layer = NewLayer::Live { layer: above };
        let prepared = PreparedSnapshot { disk: disk.clone(), layer, new_live: VersionId::new_v4(), changed: None };
        let cut = editor.cut(vec![prepared], Writers::Request).unwrap();
        cut.frozen[0].set_quiesced();
        let ((oldest, layer), (newer, newer_layer)) = (LogMedia::new(&mut rng), LogMedia::new(&mut rng));
        let view = View::of(disk, cut.frozen[0].id, "vm@frozen");
        let volume = Disk::volume(
            clock.clone(),
            options(Backing::View(view)),
            VersionId::new_v4(),
            (VersionId::new_v4(), layer),
        );
        let oracle = Oracle::of(&source);
        let (oracle, record) = (Rc::new(RefCell::new(oracle)), Rc::<RefCell<Record>>::default());
        let mut scheduler = Scheduler::default();
        let snapshot = Some(Snapshot { editor: editor.clone(), layer: newer_layer, record: record.clone() });
        scheduler.spawn(guest(seed, queue.clone(), volume.clone(), oracle.clone(), snapshot));
        scheduler.spawn(completion(queue, editor, volume, record.clone()));
        World { rng, source, logs: [oldest, newer], record, oracle, scheduler, counts: Counts::default() }
    }

    /// What is found of the volume, and of its snapshot when that is quiesced, which shows what it must.
    fn found(&self, logs: &[FoundLog; 2], what: &str) -> Vec<u64> {
        let [oldest, newer] = logs;
        let record = self.record.borrow();
        let owns = |sector: usize| record.independent || oldest.owns(sector);
        let below = |sector: usize| if owns(sector) { oldest.content[sector] } else { self.source[sector] };
        if let Some(frozen) = &record.frozen {
            let shows: Vec<u64> = (0..SECTORS).map(below).collect();
            assert_eq!(&shows, frozen, "{what}, independent: {}: the snapshot", record.independent);
        }
        let is_newer = |sector: usize| record.has_newer_log && newer.owns(sector);
        (0..SECTORS).map(|sector| if is_newer(sector) { newer.content[sector] } else { below(sector) }).collect()
    }

    fn end_by_a_kill(&mut self) {
        let logs = [0, 1].map(|log| self.logs[log].after_kill(&mut self.rng));
        let found = self.found(&logs, "after a kill");
        let what = format!("independent: {}", self.record.borrow().independent);
        self.oracle.borrow().require_after_kill(&found, &what);
        self.counts.kills += 1;
    }

    fn end_by_a_power_cut(&mut self) {
        let logs = [0, 1].map(|log| self.logs[log].after_power_cut(&mut self.rng));
        let found = self.found(&logs, "after a power cut");
        let record = self.record.borrow();
        let what = format!("independent: {}", record.independent);
        self.oracle.borrow().require_after_power_cut(&found, &what);
        let counts = &mut self.counts;
        counts.cuts += 1;
        counts.entries_found += u64::from(!record.independent && logs[0].entries.count() > 0);
        counts.newer_entries_found += u64::from(record.has_newer_log && logs[1].entries.count() > 0);
        let (one, frozen) = match record.independent {
            true => (&mut counts.independent, &mut counts.frozen_independent),
            false => (&mut counts.standing, &mut counts.frozen_standing),
        };
        *one += 1;
        *frozen += u64::from(record.frozen.is_some());
    }

    fn run(mut self) -> Counts {
        let mut seen = media::changes();
        while self.scheduler.step(&mut self.rng) {
            if seen == media::changes() {
                continue;
            }
            seen = media::changes();
            if self.rng.chance(30) {
                self.end_by_a_power_cut();
            }
            if self.rng.chance(10) {
                self.end_by_a_kill();
            }
        }
        assert_eq!(self.scheduler.tasks(), 0, "something hangs");
        assert!(self.record.borrow().independent);
        self.end_by_a_power_cut();
        self.end_by_a_kill();
        self.counts
    }
}

/// What a snapshot of the volume takes.
pub(crate) struct Snapshot {
    editor: Arc<ChainEditor>,
    layer: Layer,
    record: Rc<RefCell<Record>>,
}

impl Snapshot {
    /// As Manager::create_now and Manager::quiesced in src/ops/create_snapshot.rs: the record, the cut, what it shows is
    /// stored, and the record of that.
    async fn take(self, queue: &IoQueue, volume: &Arc<Disk>, shows: Vec<u64>) {
        self.record.borrow_mut().has_newer_log = true;
        media::count_change();
        let layer = NewLayer::Live { layer: self.layer };
        let of = PreparedSnapshot { disk: volume.clone(), layer, new_live: VersionId::new_v4(), changed: None };
        let cut = self.editor.cut(vec![of], Writers::Request).unwrap();
        // The guest waits meanwhile, so nothing drains.
        volume.make_durable(queue, cut.frozen[0].id).await.unwrap();
        cut.frozen[0].set_quiesced();
        self.record.borrow_mut().frozen = Some(shows);
        media::count_change();
    }
}

/// One request after the other: writes of any length, and flushes; and a snapshot between two of them, most times.
pub(crate) async fn guest(
    seed: u64,
    queue: IoQueue,
    volume: Arc<Disk>,
    oracle: Rc<RefCell<Oracle>>,
    mut snapshot: Option<Snapshot>,
) {
    let (mut rng, lane) = (Rng::new(seed ^ 0x5eed), volume.clock().lane());
    let attachment = volume.attach_live();
    for tag in 10..10 + WRITES as u64 {
        if rng.chance(20)
            && let Some(snapshot) = snapshot.take()
        {
            let shows = oracle.borrow().acknowledged.clone();
            snapshot.take(&queue, &volume, shows).await;
        }
        request(&mut rng, tag, &queue, &attachment, &lane, &oracle).await;
    }
}

/// A write, and perhaps a flush.
pub(crate) async fn request(
    rng: &mut Rng,
    tag: u64,
    queue: &IoQueue,
    attachment: &Attachment,
    lane: &EpochLane,
    oracle: &RefCell<Oracle>,
) {
    let from = rng.below(SECTORS);
    let sectors = from..from + 1 + rng.below((SECTORS - from).min(12));
    let durable = rng.chance(15);
    {
        let mut oracle = oracle.borrow_mut();
        sectors.clone().for_each(|sector| oracle.since[sector].push(tag));
        oracle.in_flight = Some((sectors.clone(), tag));
    }
    let at = ByteOffset((sectors.start * SECTOR) as u64);
    let write = Request::Write { at, from: filled(sectors.len(), tag), durable };
    attachment.execute(queue, &lane.enter(), write).await.unwrap();
    {
        let mut oracle = oracle.borrow_mut();
        oracle.in_flight = None;
        oracle.acknowledged[sectors.clone()].fill(tag);
        if durable {
            oracle.stored[sectors.clone()].fill(tag);
            sectors.for_each(|sector| oracle.since[sector].clear());
        }
    }
    if rng.chance(40) {
        attachment.execute(queue, &lane.enter(), Request::Flush).await.unwrap();
        let mut oracle = oracle.borrow_mut();
        oracle.stored = oracle.acknowledged.clone();
        oracle.since.iter_mut().for_each(Vec::clear);
    }
}

/// As Manager::complete and make_independent in src/ops/complete_volume.rs: the copies, the record, the chain.
pub(crate) async fn completion(
    queue: IoQueue,
    editor: Arc<ChainEditor>,
    volume: Arc<Disk>,
    record: Rc<RefCell<Record>>,
) {
    let done = job::complete(queue, volume.clone(), Arc::new(Pace::default())).await.unwrap();
    assert_eq!(done, Outcome::Done);
    record.borrow_mut().independent = true;
    media::count_change();
    assert!(editor.make_independent(&volume));
}

fn all(first: u64, seeds: u64) -> Result<Counts, u64> {
    let mut total = Counts::default();
    for seed in first..first + seeds {
        let run = std::panic::catch_unwind(|| World::new(seed).run());
        let Ok(counts) = run else {
            drop(set_aside());
            return Err(seed);
        };
        total.cuts += counts.cuts;
        total.kills += counts.kills;
        total.standing += counts.standing;
        total.independent += counts.independent;
        total.entries_found += counts.entries_found;
        total.frozen_standing += counts.frozen_standing;
        total.frozen_independent += counts.frozen_independent;
        total.newer_entries_found += counts.newer_entries_found;
    }
    Ok(total)
}

#[test]
fn a_completion_that_is_cut_off_leaves_one_or_the_other() {
    let _undisturbed = crate::alone::undisturbed();
    let number = |variable| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    let (first, seeds) = (number("CRASH_FIRST").unwrap_or(0), number("CRASH_SEEDS").unwrap_or(SEEDS));
    let counts = all(first, seeds).unwrap_or_else(|seed| panic!("CRASH_FIRST={seed} CRASH_SEEDS=1 repeats it"));
    println!("completions: seeds {first} to {}: {counts:?}", first + seeds - 1);
    let Counts { kills, standing, independent, entries_found, .. } = counts;
    let Counts { frozen_standing, frozen_independent, newer_entries_found, .. } = counts;
    let rare = [kills, standing, independent, entries_found, frozen_standing, frozen_independent, newer_entries_found];
    assert!(seeds < SEEDS || rare.iter().all(|count| *count > 20), "{counts:?}");
}

#[cfg(feature = "planted")]
#[test]
fn defects_of_a_completion_are_noticed() {
    use halfsilver::planted::Defect;
    for defect in [Defect::FilledBitFirst, Defect::FilledWithoutLock, Defect::IndependentBeforeStored] {
        let noticed = crate::alone::with_planted(defect, || all(0, 500)).unwrap().expect_err("it is noticed");
        println!("planted: {defect:?}: noticed by tests/crash/independent.rs: seed {noticed}");
    }
}
