//! One list of operations, three strategies: no guest can tell which one runs.
//!
//! The same seeded list of writes, cuts and deletions, with writers that still drain, is run under copy-on-write,
//! write-logging and write-mirroring, each in an order of its own of what the list leaves open. Every frozen version
//! and the live one must be the same, byte for byte, under all three, and as one array a version says.

use std::ops::Range;
use std::sync::Arc;

use halfsilver::engine::{Request, Ticket, Version};

use crate::bench::{BLOCK, Bench, write_of};
use crate::sim::{Rng, SECTOR, Scheduler, SimImage};

const SEEDS: u64 = 500;
const OPERATIONS: usize = 60;
const VERSIONS_MAX: usize = 8;
const HELD_MAX: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Strategy {
    CopyOnWrite,
    WriteLogging,
    WriteMirroring,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Fill(u8),
    Zeroes { unmap: bool },
}

/// One write of a batch. `held` is the number of the held ticket that it goes by.
#[derive(Clone, Debug)]
struct Change {
    held: Option<usize>,
    sectors: Range<usize>,
    what: What,
}

/// Numbers are taken modulo what there is when the list is run, which is the same under all strategies.
#[derive(Clone, Debug)]
enum Operation {
    /// Changes of different sectors, side by side.
    Batch(Vec<Change>),
    Flush,
    Cut,
    /// A request that stays: later changes may belong to its epoch.
    Hold,
    LetGo(usize),
    /// All draining requests end, and a version is deleted.
    Delete(usize),
    Look,
}

struct List {
    blocks: usize,
    operations: Vec<Operation>,
}

impl List {
    fn of(seed: u64) -> List {
        let mut rng = Rng::new(seed);
        let blocks = 2 + rng.below(7);
        let operations = (0..OPERATIONS).map(|_| List::operation(&mut rng, blocks * BLOCK / SECTOR)).collect();
        List { blocks, operations }
    }

    fn operation(rng: &mut Rng, sectors: usize) -> Operation {
        match rng.below(100) {
            0..12 => Operation::Cut,
            12..22 => Operation::Hold,
            22..28 => Operation::LetGo(rng.below(HELD_MAX)),
            28..31 => Operation::Delete(rng.below(VERSIONS_MAX)),
            31..35 => Operation::Flush,
            35..38 => Operation::Look,
            _ => Operation::Batch(List::batch(rng, sectors)),
        }
    }

    fn batch(rng: &mut Rng, sectors: usize) -> Vec<Change> {
        let block = BLOCK / SECTOR;
        let mut batch: Vec<Change> = Vec::new();
        for _ in 0..=rng.below(4) {
            let first = rng.below(sectors);
            let mut range = first..(first + 1 + rng.below(2 * block)).min(sectors);
            if rng.chance(40) {
                range = range.start / block * block..range.end.next_multiple_of(block);
            }
            let what = match rng.below(5) {
                0 => What::Zeroes { unmap: rng.chance(50) },
                _ => What::Fill(u8::try_from(1 + rng.below(255)).unwrap()),
            };
            let held = rng.chance(40).then(|| rng.below(HELD_MAX));
            if batch.iter().all(|other| range.end <= other.sectors.start || other.sectors.end <= range.start) {
                batch.push(Change { held, sectors: range, what });
            }
        }
        batch
    }
}

/// A version as the specification has it: one byte stands for all of its sector.
struct Array {
    version: Option<Arc<Version>>,
    ended: Option<halfsilver::engine::Epoch>,
    sectors: Vec<u8>,
}

/// What all versions showed at one moment, oldest first.
type Look = Vec<Vec<u8>>;

struct Run {
    strategy: Strategy,
    bench: Bench,
    rng: Rng,
    /// The image that has everything of the live version.
    full: SimImage,
    held: Vec<Ticket>,
    arrays: Vec<Array>,
    looks: Vec<Look>,
    seed: u64,
    /// Changes that were made by tickets of an epoch that had ended.
    drained: usize,
}

impl Run {
    fn new(strategy: Strategy, blocks: usize, seed: u64) -> Run {
        let bench = Bench::with_blocks(u32::try_from(BLOCK).unwrap(), blocks);
        let arrays = vec![Array { version: None, ended: None, sectors: vec![0; bench.sectors()] }];
        let full = bench.live.clone();
        Run {
            strategy,
            bench,
            rng: Rng::new(seed ^ 0xabcd),
            full,
            held: Vec::new(),
            arrays,
            looks: Vec::new(),
            seed,
            drained: 0,
        }
    }

    fn run(&mut self, operation: &Operation) {
        match operation {
            Operation::Batch(changes) => self.batch(changes),
            Operation::Flush => self.bench.request(&self.bench.ticket(), Request::Flush).unwrap(),
            Operation::Cut if self.arrays.len() < VERSIONS_MAX => self.cut(),
            Operation::Hold if self.held.len() < HELD_MAX => self.held.push(self.bench.ticket()),
            Operation::LetGo(at) if *at < self.held.len() => drop(self.held.remove(*at)),
            Operation::Delete(at) => self.delete(*at),
            Operation::Look => self.look(),
            Operation::Cut | Operation::Hold | Operation::LetGo(_) => {}
        }
    }

    fn batch(&mut self, changes: &[Change]) {
        let mut scheduler = Scheduler::default();
        for change in changes {
            let ticket = match change.held.filter(|_| !self.held.is_empty()) {
                Some(at) => self.held[at % self.held.len()].again(),
                None => self.bench.ticket(),
            };
            self.drained += usize::from(ticket.epoch() != self.bench.clock.current());
            let (request, fill) = match change.what {
                What::Fill(fill) => (write_of(change.sectors.clone(), fill), fill),
                What::Zeroes { unmap } => {
                    let at = halfsilver::image::ByteOffset((change.sectors.start * SECTOR) as u64);
                    let len = (change.sectors.len() * SECTOR) as u64;
                    (Request::WriteZeroes { at, len, unmap, durable: false }, 0)
                }
            };
            for array in &mut self.arrays {
                if array.ended.is_none_or(|ended| ticket.epoch() <= ended) {
                    array.sectors[change.sectors.clone()].fill(fill);
                }
            }
            self.bench.start(&mut scheduler, self.bench.disk.attach_live(), ticket, request);
        }
        assert!(scheduler.settle(&mut self.rng), "a write hangs");
    }

    fn cut(&mut self) {
        let cut = match self.strategy {
            Strategy::CopyOnWrite => self.bench.cut().0,
            Strategy::WriteLogging => self.bench.cut_to_log().0,
            Strategy::WriteMirroring => self.bench.cut_to_split(&self.full).0,
        };
        let live = self.arrays.last_mut().unwrap();
        live.version = Some(cut.frozen[0].clone());
        live.ended = Some(cut.ended);
        let sectors = live.sectors.clone();
        self.arrays.push(Array { version: None, ended: None, sectors });
    }

    fn delete(&mut self, at: usize) {
        self.held.clear();
        if self.arrays.len() > 1 {
            let at = at % (self.arrays.len() - 1);
            self.bench.retire(&self.arrays.remove(at).version.unwrap());
        }
    }

    fn look(&mut self) {
        let ticket = self.bench.ticket();
        let mut look = Vec::new();
        for array in &self.arrays {
            let shown = match &array.version {
                Some(version) => self.bench.frozen(version).unwrap(),
                None => self.bench.read(&ticket, 0..self.bench.sectors()),
            };
            let (seed, strategy) = (self.seed, self.strategy);
            assert_eq!(
                shown, array.sectors,
                "seed {seed}, {strategy:?}: the version that ended with {:?}",
                array.ended
            );
            look.push(shown);
        }
        self.looks.push(look);
    }

    /// Everything drains, all versions are looked at, and then go one by one, until one raw image is left.
    fn end(&mut self) {
        self.held.clear();
        self.look();
        while self.arrays.len() > 1 {
            self.delete(self.arrays.len() / 2);
            self.look();
        }
        let raw: Vec<u8> = crate::bench::first_bytes(&self.full.bytes());
        assert_eq!(raw, self.arrays[0].sectors, "seed {}, {:?}: the raw image in the end", self.seed, self.strategy);
    }
}

#[test]
fn one_list_of_operations_gives_the_same_versions_under_every_strategy() {
    let (mut looks, mut drained, mut versions_max) = (0, 0, 0);
    for seed in 0..SEEDS {
        let list = List::of(seed);
        let strategies = [Strategy::CopyOnWrite, Strategy::WriteLogging, Strategy::WriteMirroring];
        let [first, second, third] = strategies.map(|strategy| {
            let mut run = Run::new(strategy, list.blocks, seed);
            list.operations.iter().for_each(|operation| run.run(operation));
            run.end();
            run
        });
        assert!(first.looks == second.looks && second.looks == third.looks, "seed {seed}");
        looks += first.looks.len();
        drained += first.drained;
        versions_max = versions_max.max(first.looks.iter().map(Vec::len).max().unwrap());
    }
    println!("{SEEDS} lists: {looks} looks, {drained} draining changes, up to {versions_max} versions");
    assert!(drained > 1000 && versions_max == VERSIONS_MAX);
}
