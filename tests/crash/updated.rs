//! A volume that is put on a newer snapshot of its source, on media that forget what was not synced: at each step it ends,
//! by a kill or a power cut, and must be what its record says: the old content, with its table; the new one, with the table
//! of what was kept; or all of its image.
//!
//! The source and both snapshots are stored. The volume is written and completed in part before, and both to the end after.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::{
    Backing, ChainEditor, Changed, Disk, DiskOptions, Epoch, EpochClock, Layer, Log, NewLayer, PreparedSnapshot,
    Request, VersionId, View, Writers,
};
use halfsilver::image::{ByteOffset, IoQueue};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::store::{BlockIndex, DurableTable, PAYLOAD_BYTES, Table};

use crate::independent::{BLOCK, Oracle, PER_BLOCK, SECTORS, filled, request, source_bytes, table, tags};
use crate::media::{self, Medium, SECTOR, Scheduler, run, set_aside};
use crate::schedule::Rng;

const SEEDS: u64 = 400;

/// What the record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Old,
    Updated,
    Independent,
}

#[derive(Default, Debug)]
struct Counts {
    kills: u64,
    cuts: [u64; 3],
    kept_found: u64,
}

/// A log's table and its durable copy.
#[derive(Clone)]
struct Entries {
    run: Arc<Table>,
    durable: Medium,
}

impl Entries {
    fn new() -> Entries {
        let run = Arc::new(table());
        let size = usize::try_from(DurableTable::image_bytes(run.blocks())).unwrap();
        Entries { run, durable: Medium::new("durable", size) }
    }

    async fn create(&self, queue: &IoQueue) -> DurableTable {
        let (image, id) = (Arc::new(self.durable.clone()), VersionId::nil());
        DurableTable::create(image, id, self.run.clone(), [0; PAYLOAD_BYTES], queue).await.unwrap()
    }
}

struct World {
    rng: Rng,
    /// What the two snapshots show.
    shown: [Vec<u64>; 2],
    log: Medium,
    entries: [Entries; 2],
    record: Rc<RefCell<Stage>>,
    oracle: Rc<RefCell<Oracle>>,
    scheduler: Scheduler,
    counts: Counts,
}

impl World {
    fn new(seed: u64) -> World {
        let (mut rng, queue) = (Rng::new(seed), IoQueue::simulated());
        let bytes = source_bytes(&mut rng);
        let old = tags(&bytes);
        let clock = EpochClock::new(Epoch(1));
        let editor = Arc::new(ChainEditor::new(clock.clone()));
        let options = |image| DiskOptions { image, block_bytes: BLOCK, read_only: false, discards: Arc::new(table()) };
        let disk = Disk::new(clock.clone(), options(Backing::One(Arc::new(Medium::with("source", bytes)))));
        let cut = || {
            let layer = Layer::of(Backing::One(Arc::new(Medium::new("above", SECTORS * SECTOR))), Arc::new(table()));
            let (layer, new_live) = (NewLayer::Live { layer }, VersionId::new_v4());
            let changed = Some(Arc::new(table()));
            let cut =
                editor.cut(vec![PreparedSnapshot { disk: disk.clone(), layer, new_live, changed }], Writers::Request);
            let version = cut.unwrap().frozen[0].clone();
            version.set_quiesced();
            version.id
        };
        let first = cut();
        let mut new = old.clone();
        for tag in 2..4 {
            let from = rng.below(SECTORS - 4);
            new[from..from + 4].fill(tag);
            let (of, io, at) = (disk.clone(), queue.clone(), ByteOffset((from * SECTOR) as u64));
            run(&mut rng, async move {
                let write = Request::Write { at, from: filled(4, tag), durable: false };
                of.attach_live().execute(&io, &of.clock().lane().enter(), write).await.unwrap();
            });
        }
        let second = cut();
        let (log, entries) = (Medium::new("log", SECTORS * SECTOR), [Entries::new(), Entries::new()]);
        let (of, io) = (entries[0].clone(), queue.clone());
        let made = run(&mut rng, async move { of.create(&io).await });
        let layer = Layer::logged(Backing::One(Arc::new(log.clone())), Arc::new(Log { table: made, freed: table() }));
        let origin = VersionId::new_v4();
        let volume = Disk::noting_volume(
            clock,
            options(Backing::View(View::of(disk.clone(), first, "vm@old"))),
            origin,
            (VersionId::new_v4(), layer),
            Some(Arc::new(table())),
        );
        let (oracle, record) = (Rc::new(RefCell::new(Oracle::of(&old))), Rc::new(RefCell::new(Stage::Old)));
        let story = Story {
            rng: Rng::new(seed ^ 0x5eed),
            queue,
            editor,
            source: disk,
            moments: (first, second),
            new: new.clone(),
            volume,
            origin,
            log: log.clone(),
            entries: entries[1].clone(),
            record: record.clone(),
            oracle: oracle.clone(),
        };
        let mut scheduler = Scheduler::default();
        scheduler.spawn(story.run());
        World { rng, shown: [old, new], log, entries, record, oracle, scheduler, counts: Counts::default() }
    }

    fn found(&self, log: &Medium, entries: &Table) -> Vec<u64> {
        let (log, stage) = (tags(&log.bytes()), *self.record.borrow());
        let below = &self.shown[usize::from(stage != Stage::Old)];
        let owns = |sector: usize| stage == Stage::Independent || entries.get(BlockIndex((sector / PER_BLOCK) as u64));
        (0..SECTORS).map(|sector| if owns(sector) { log[sector] } else { below[sector] }).collect()
    }

    fn entries_now(&self) -> &Entries {
        &self.entries[usize::from(*self.record.borrow() != Stage::Old)]
    }

    fn end_by_a_kill(&mut self) {
        let log = self.log.after_kill(&mut self.rng);
        let found = self.found(&log, &self.entries_now().run);
        self.oracle.borrow().require_after_kill(&found, &format!("{:?}", self.record.borrow()));
        self.counts.kills += 1;
    }

    fn end_by_a_power_cut(&mut self) {
        let medium = self.entries_now().durable.clone();
        let (log, durable) = (self.log.after_power_cut(&mut self.rng), medium.after_power_cut(&mut self.rng));
        let (into, aside) = (Arc::new(table()), set_aside());
        let entries = run(&mut self.rng, async move {
            let queue = IoQueue::simulated();
            let (table, report) = DurableTable::load(Arc::new(durable), VersionId::nil(), into, &queue).await.unwrap();
            assert!(report.damaged.is_empty());
            table.table().clone()
        });
        drop(aside);
        let stage = *self.record.borrow();
        self.oracle.borrow().require_after_power_cut(&self.found(&log, &entries), &format!("{stage:?}"));
        self.counts.cuts[stage as usize] += 1;
        self.counts.kept_found += u64::from(stage == Stage::Updated && entries.count() > 0);
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
        assert_eq!(*self.record.borrow(), Stage::Independent);
        self.end_by_a_power_cut();
        self.end_by_a_kill();
        self.counts
    }
}

/// As Manager::update in src/ops/update_volume.rs, with a guest before and after.
struct Story {
    rng: Rng,
    queue: IoQueue,
    editor: Arc<ChainEditor>,
    source: Arc<Disk>,
    moments: (VersionId, VersionId),
    new: Vec<u64>,
    volume: Arc<Disk>,
    origin: VersionId,
    log: Medium,
    entries: Entries,
    record: Rc<RefCell<Stage>>,
    oracle: Rc<RefCell<Oracle>>,
}

impl Story {
    async fn run(mut self) {
        self.use_it(10).await;
        let kept = self.volume.blocks_to_keep(self.origin, &self.source, self.moments).unwrap();
        let table_of_log = self.entries.create(&self.queue).await;
        table_of_log.take_in(&kept).unwrap();
        let image = Backing::One(Arc::new(self.log.clone()));
        job::store_kept(&self.queue, &table_of_log, &image).await.unwrap();
        *self.record.borrow_mut() = Stage::Updated;
        *self.oracle.borrow_mut() = Oracle::of(&self.new);
        media::count_change();
        let layer = Layer::logged(image, Arc::new(Log { table: table_of_log, freed: table() }));
        let (view, changed) =
            (View::of(self.source.clone(), self.moments.1, "vm@new"), Changed::Noted(Arc::new(table())));
        self.editor.move_base(&self.volume, view, (VersionId::new_v4(), VersionId::new_v4()), layer, changed);
        self.use_it(20).await;
        let done = job::update(self.queue.clone(), self.volume.clone(), Arc::new(Pace::default())).await.unwrap();
        assert_eq!(done, Outcome::Done);
        *self.record.borrow_mut() = Stage::Independent;
        media::count_change();
        assert!(self.editor.make_independent(&self.volume));
    }

    /// Some writes, and some blocks that are completed, in turn.
    async fn use_it(&mut self, first_tag: u64) {
        let (attachment, lane) = (self.volume.attach_live(), self.volume.clock().lane());
        let mut at = BlockIndex(0);
        for tag in first_tag..first_tag + 5 {
            if self.rng.chance(60) {
                request(&mut self.rng, tag, &self.queue, &attachment, &lane, &self.oracle).await;
            } else if let Some(filled) = self.volume.fill_some(&self.queue, &lane.enter(), at, 2).await.unwrap() {
                at = filled.next;
            }
        }
    }
}

fn all(first: u64, seeds: u64) -> Result<Counts, u64> {
    let mut total = Counts::default();
    for seed in first..first + seeds {
        let run = std::panic::catch_unwind(|| World::new(seed).run());
        let Ok(counts) = run else {
            drop(set_aside());
            return Err(seed);
        };
        total.kills += counts.kills;
        total.kept_found += counts.kept_found;
        total.cuts.iter_mut().zip(counts.cuts).for_each(|(all, more)| *all += more);
    }
    Ok(total)
}

#[test]
fn an_update_that_is_cut_off_leaves_the_old_content_or_the_new_one() {
    let _undisturbed = crate::alone::undisturbed();
    let number = |variable| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    let (first, seeds) = (number("CRASH_FIRST").unwrap_or(0), number("CRASH_SEEDS").unwrap_or(SEEDS));
    let counts = all(first, seeds).unwrap_or_else(|seed| panic!("CRASH_FIRST={seed} CRASH_SEEDS=1 repeats it"));
    println!("updates: seeds {first} to {}: {counts:?}", first + seeds - 1);
    let least = counts.cuts.into_iter().chain([counts.kills, counts.kept_found]).min();
    assert!(seeds < SEEDS || least > Some(0), "{counts:?}");
}

#[cfg(feature = "planted")]
#[test]
fn defects_of_an_update_are_noticed() {
    use halfsilver::planted::Defect;
    for defect in [Defect::KeptBeforeBytes, Defect::WrittenBlockKept] {
        let noticed = crate::alone::with_planted(defect, || all(0, 500)).unwrap().expect_err("it is noticed");
        println!("planted: {defect:?}: noticed by tests/crash/updated.rs: seed {noticed}");
    }
}
