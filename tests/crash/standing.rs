//! A volume on a snapshot of a disk with `durability=power`, while guests write to both, and the volume is perhaps made
//! independent: at each step all of it ends, by a kill or a power cut. The snapshot then shows exactly what it did; of the
//! disk and of the volume what was flushed is there, after a kill all that was acknowledged.
//!
//! The snapshot is quiesced before. Under copy-on-write what is overwritten is saved for it first, which the volume reads;
//! under write logging the disk goes on in a log.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::{
    Backing, ChainEditor, Disk, DiskOptions, Epoch, EpochClock, Layer, Link, Saved, Version, VersionId, View,
};
use halfsilver::image::IoQueue;

use crate::independent::{
    BLOCK, FoundLog, LogMedia, Oracle, Record, SECTORS, completion, guest, source_bytes, table, tags,
};
use crate::media::{self, Medium, Scheduler, set_aside};
use crate::schedule::Rng;

const SEEDS: u64 = 1000;
const FROZEN: VersionId = VersionId::from_u128(1);
const LIVE: VersionId = VersionId::from_u128(2);

struct World {
    rng: Rng,
    /// Under write logging the disk has a log, under copy-on-write the snapshot has a layer.
    is_logging: bool,
    source: Vec<u64>,
    full: Medium,
    beside: LogMedia,
    log: LogMedia,
    record: Rc<RefCell<Record>>,
    of_disk: Rc<RefCell<Oracle>>,
    of_volume: Rc<RefCell<Oracle>>,
    scheduler: Scheduler,
    counts: Counts,
}

#[derive(Default, Debug)]
struct Counts {
    kills: u64,
    cuts: u64,
    /// Power cuts after which the snapshot, or the log of the disk, had something of its own.
    beside: u64,
    /// And of the volume, while it stood on the snapshot.
    standing: u64,
    independent: u64,
}

/// What is found of a log or a layer above or beside the full image.
fn over(found: &FoundLog, below: &[u64]) -> Vec<u64> {
    let at = |sector| if found.owns(sector) { found.content[sector] } else { below[sector] };
    (0..SECTORS).map(at).collect()
}

/// What is saved for the snapshot goes to the same media that a log would have.
fn saved_of(media: &LogMedia, rng: &mut Rng) -> Layer {
    let saved = Saved { table: media.durable_table(rng), revoke: Box::new(|| Ok(())) };
    Layer::saved(Backing::One(Arc::new(media.image.clone())), Arc::new(saved))
}

impl World {
    fn new(seed: u64) -> World {
        let (mut rng, queue) = (Rng::new(seed), IoQueue::simulated());
        let bytes = source_bytes(&mut rng);
        let (source, is_logging) = (tags(&bytes), rng.chance(35));
        let clock = EpochClock::new(Epoch(10));
        let editor = Arc::new(ChainEditor::new(clock.clone()));
        let full = Medium::with("full", bytes);
        let ((beside, logged), (log, layer)) = (LogMedia::new(&mut rng), LogMedia::new(&mut rng));
        let image = Backing::One(Arc::new(full.clone()));
        let link = |id, began, layer| Link { version: Version::new(id, Epoch(began)), layer, splits: false };
        let links = match is_logging {
            true => vec![link(FROZEN, 0, Layer::full(image.clone())), link(LIVE, 5, logged)],
            false => {
                let saved = saved_of(&beside, &mut rng);
                vec![link(FROZEN, 0, saved), link(LIVE, 5, Layer::full(image.clone()))]
            }
        };
        links[0].version.set_quiesced();
        let options = |image| DiskOptions { image, block_bytes: BLOCK, read_only: false, discards: Arc::new(table()) };
        let disk = Disk::with_chain(clock.clone(), options(image), links);
        let view = Backing::View(View::of(disk.clone(), FROZEN, "vm@frozen"));
        let [origin, live] = [3, 4].map(VersionId::from_u128);
        let volume = Disk::volume(clock, options(view), origin, (live, layer));
        let of_disk = Rc::new(RefCell::new(Oracle::of(&source)));
        let of_volume = Rc::new(RefCell::new(Oracle::of(&source)));
        let (record, mut scheduler) = (Rc::<RefCell<Record>>::default(), Scheduler::default());
        scheduler.spawn(guest(seed, queue.clone(), disk, of_disk.clone(), None));
        scheduler.spawn(guest(seed ^ 0xabc, queue.clone(), volume.clone(), of_volume.clone(), None));
        if rng.chance(50) {
            scheduler.spawn(completion(queue, editor, volume, record.clone()));
        }
        let counts = Counts::default();
        World { rng, is_logging, source, full, beside, log, record, of_disk, of_volume, scheduler, counts }
    }

    /// The disk, its snapshot and the volume, as they are found.
    fn found(&self, full: &[u64], beside: &FoundLog, log: &FoundLog) -> [Vec<u64>; 3] {
        let (disk, frozen) = match self.is_logging {
            true => (over(beside, full), full.to_vec()),
            false => (full.to_vec(), over(beside, full)),
        };
        let volume = if self.record.borrow().independent { log.content.clone() } else { over(log, &frozen) };
        [disk, frozen, volume]
    }

    fn end_by_a_kill(&mut self) {
        let full = tags(&self.full.after_kill(&mut self.rng).bytes());
        let (beside, log) = (self.beside.after_kill(&mut self.rng), self.log.after_kill(&mut self.rng));
        let [disk, frozen, volume] = self.found(&full, &beside, &log);
        assert_eq!(frozen, self.source, "after a kill: the snapshot");
        self.of_disk.borrow().require_after_kill(&disk, "the disk");
        self.of_volume.borrow().require_after_kill(&volume, "the volume");
        self.counts.kills += 1;
    }

    fn end_by_a_power_cut(&mut self) {
        let full = tags(&self.full.after_power_cut(&mut self.rng).bytes());
        let (beside, log) = (self.beside.after_power_cut(&mut self.rng), self.log.after_power_cut(&mut self.rng));
        let [disk, frozen, volume] = self.found(&full, &beside, &log);
        assert_eq!(frozen, self.source, "after a power cut: the snapshot");
        self.of_disk.borrow().require_after_power_cut(&disk, "the disk");
        self.of_volume.borrow().require_after_power_cut(&volume, "the volume");
        let (counts, independent) = (&mut self.counts, self.record.borrow().independent);
        counts.cuts += 1;
        counts.beside += u64::from(beside.entries.count() > 0);
        counts.standing += u64::from(!independent && log.entries.count() > 0);
        counts.independent += u64::from(independent);
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
        self.end_by_a_power_cut();
        self.end_by_a_kill();
        self.counts
    }
}

fn all(first: u64, seeds: u64) -> Result<Counts, u64> {
    let mut total = Counts::default();
    for seed in first..first + seeds {
        let Ok(counts) = std::panic::catch_unwind(|| World::new(seed).run()) else {
            drop(set_aside());
            return Err(seed);
        };
        total.kills += counts.kills;
        total.cuts += counts.cuts;
        total.beside += counts.beside;
        total.standing += counts.standing;
        total.independent += counts.independent;
    }
    Ok(total)
}

#[test]
fn a_volume_its_snapshot_and_its_disk_outlive_every_end() {
    let _undisturbed = crate::alone::undisturbed();
    let number = |variable| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    let (first, seeds) = (number("CRASH_FIRST").unwrap_or(0), number("CRASH_SEEDS").unwrap_or(SEEDS));
    let counts = all(first, seeds).unwrap_or_else(|seed| panic!("CRASH_FIRST={seed} CRASH_SEEDS=1 repeats it"));
    println!("volumes on snapshots: seeds {first} to {}: {counts:?}", first + seeds - 1);
    let Counts { kills, cuts, beside, standing, independent } = counts;
    assert!(seeds < SEEDS || kills.min(cuts).min(beside).min(standing).min(independent) > 1000, "{counts:?}");
}

/// The test above can fail.
#[cfg(feature = "planted")]
#[test]
fn defects_below_a_volume_are_noticed() {
    use halfsilver::planted::Defect;
    for defect in [Defect::OverwriteBeforeSaved, Defect::SavedWithoutBytes, Defect::BitAfterOverwrite] {
        let noticed = crate::alone::with_planted(defect, || all(0, 300)).unwrap().expect_err("it is noticed");
        println!("planted: {defect:?}: noticed by tests/crash/standing.rs: seed {noticed}");
    }
}
