//! Random requests through real sockets against one array of tags a version.
//!
//! The array holds for each sector the tags that it may show. There is more than one where the guest left the order
//! open (overlapping requests in flight, a cut while they ran) or gave the bytes away (discards). A frozen version
//! never changes: what it has shown once, it must show for ever.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{Client, SECTOR, SLOT, SLOTS, tag_of};
use crate::harness::{Api, Daemon, PATIENCE, Rng, from_env, seeds, wait_until};

pub(crate) const DISKS: [&str; 2] = ["vm0", "vm1"];
const QUEUES: [usize; 2] = [3, 2];
const SNAPSHOTS_MAX: usize = 5;
/// Requests at once on one queue.
const DEPTH: usize = 6;

type Tags = Vec<u64>;

fn insert(tags: &mut Tags, tag: u64) {
    if !tags.contains(&tag) {
        tags.push(tag);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Live,
    /// The cut was asked for and not yet answered: changes may or may not belong to it.
    Cutting,
    /// Whoever was connected at the cut writes it together with the live version.
    Pinned,
    Frozen,
}

/// What one version may show.
pub(crate) struct Array {
    pub(crate) name: String,
    pub(crate) disk: usize,
    pub(crate) phase: Phase,
    pub(crate) sectors: Vec<Tags>,
}

/// A change in flight.
struct Change {
    id: u64,
    disk: usize,
    sectors: Range<usize>,
    tag: u64,
    is_discard: bool,
    /// Sectors on which another change was in flight at some time during this one.
    contested: BTreeSet<usize>,
    /// The arrays that it changes surely.
    sure: Vec<String>,
}

/// A read in flight, and what each of its sectors may have shown so far.
struct Watch {
    id: u64,
    name: String,
    first: usize,
    allowed: Vec<Tags>,
}

#[derive(Default)]
pub(crate) struct World {
    pub(crate) arrays: Vec<Array>,
    changes: Vec<Change>,
    watches: Vec<Watch>,
    pub(crate) next: u64,
}

impl World {
    pub(crate) fn array(&mut self, name: &str) -> &mut Array {
        self.arrays.iter_mut().find(|a| a.name == name).unwrap()
    }

    pub(crate) fn begin_change(
        &mut self,
        disk: usize,
        sectors: Range<usize>,
        tag: Option<u64>,
        is_discard: bool,
    ) -> (u64, u64) {
        self.next += 1;
        let (id, tag) = (self.next, tag.unwrap_or(self.next));
        let mut contested = BTreeSet::new();
        for other in self.changes.iter_mut().filter(|c| c.disk == disk) {
            for s in other.sectors.clone().filter(|s| sectors.contains(s)) {
                other.contested.insert(s);
                contested.insert(s);
            }
        }
        for array in self.arrays.iter_mut().filter(|a| a.disk == disk && a.phase != Phase::Frozen) {
            array.sectors[sectors.clone()].iter_mut().for_each(|tags| insert(tags, tag));
            for watch in self.watches.iter_mut().filter(|w| w.name == array.name) {
                for s in sectors.clone() {
                    if let Some(tags) = s.checked_sub(watch.first).and_then(|i| watch.allowed.get_mut(i)) {
                        insert(tags, tag);
                    }
                }
            }
        }
        let is_sure = |a: &&Array| a.disk == disk && matches!(a.phase, Phase::Live | Phase::Pinned);
        let sure = self.arrays.iter().filter(is_sure).map(|a| a.name.clone()).collect();
        self.changes.push(Change { id, disk, sectors, tag, is_discard, contested, sure });
        (id, tag)
    }

    pub(crate) fn end_change(&mut self, id: u64) {
        let i = self.changes.iter().position(|c| c.id == id).unwrap();
        let change = self.changes.swap_remove(i);
        if change.is_discard {
            return;
        }
        // One that was let go of meanwhile may have been so before the change was carried out.
        let is_still = |a: &Array| matches!(a.phase, Phase::Live | Phase::Pinned);
        let changed = |a: &&mut Array| is_still(a) && change.sure.contains(&a.name);
        for array in self.arrays.iter_mut().filter(changed) {
            for s in change.sectors.clone().filter(|s| !change.contested.contains(s)) {
                array.sectors[s] = vec![change.tag];
            }
        }
    }

    pub(crate) fn begin_read(&mut self, name: &str, sectors: Range<usize>) -> u64 {
        self.next += 1;
        let allowed = self.array(name).sectors[sectors.clone()].to_vec();
        self.watches.push(Watch { id: self.next, name: name.to_owned(), first: sectors.start, allowed });
        self.next
    }

    pub(crate) fn end_read(&mut self, id: u64, got: &[u8]) {
        let i = self.watches.iter().position(|w| w.id == id).unwrap();
        let Watch { name, first, allowed, .. } = self.watches.swap_remove(i);
        let array = self.array(&name);
        for (i, (sector, allowed)) in got.chunks(SECTOR).zip(&allowed).enumerate() {
            let tag = tag_of(sector).unwrap_or_else(|| panic!("{name}: sector {} is torn", first + i));
            assert!(allowed.contains(&tag), "{name}: sector {} shows {tag}, allowed are {allowed:?}", first + i);
            if array.phase == Phase::Frozen {
                array.sectors[first + i] = vec![tag];
            }
        }
    }

    pub(crate) fn check_all(&mut self, name: &str, content: &[u8]) {
        let id = self.begin_read(name, 0..content.len() / SECTOR);
        self.end_read(id, content);
    }

    /// Nothing changes these any more.
    pub(crate) fn freeze(&mut self, is_one: impl Fn(&Array) -> bool) {
        self.arrays.iter_mut().filter(|a| a.phase != Phase::Live && is_one(a)).for_each(|a| a.phase = Phase::Frozen);
    }

    /// From here on, changes may or may not belong to this snapshot.
    pub(crate) fn begin_cut(&mut self, disk: usize, name: String) {
        let sectors = self.array(DISKS[disk]).sectors.clone();
        self.arrays.push(Array { name, disk, phase: Phase::Cutting, sectors });
    }
}

enum Order {
    Create { name: String, disks: Vec<usize> },
    Delete { reference: String },
}

enum News {
    Cut { references: Vec<String> },
    Quiesced { references: Vec<String> },
    Deleted { reference: String },
}

/// Takes and deletes snapshots while the driver goes on.
fn control(api: &Api, orders: &Receiver<Order>, news: &Sender<News>) {
    for order in orders {
        match order {
            Order::Create { name, disks } => {
                let disks: Vec<_> = disks.iter().map(|&d| DISKS[d]).collect();
                let references: Vec<_> = disks.iter().map(|d| format!("{d}@{name}")).collect();
                api.create(&name, &disks, &json!({})).ok();
                news.send(News::Cut { references: references.clone() }).unwrap();
                for reference in &references {
                    let state = || api.send("GET", &format!("/v1/snapshots/{reference}"), "").json()["state"].clone();
                    wait_until("a snapshot to be quiesced", || state() == "quiesced");
                }
                news.send(News::Quiesced { references }).unwrap();
            }
            Order::Delete { reference } => {
                api.delete(&reference);
                news.send(News::Deleted { reference }).unwrap();
            }
        }
    }
}

enum Running {
    Change(u64),
    Read(u64, usize),
    Flush,
}

/// A connection to a disk or snapshot and the requests on it.
struct Port {
    name: String,
    client: Client,
    running: Vec<Vec<Option<Running>>>,
    /// No more requests: it is about to be deleted.
    closing: bool,
}

impl Port {
    fn new(name: &str, client: Client) -> Port {
        let running = client.queues.iter().map(|_| (0..SLOTS).map(|_| None).collect()).collect();
        Port { name: name.to_owned(), client, running, closing: false }
    }

    fn is_idle(&self) -> bool {
        self.client.queues.iter().all(|q| q.in_flight() == 0)
    }

    /// Takes in what has been answered.
    fn poll(&mut self, world: &mut World) -> usize {
        let mut count = 0;
        for (queue, running) in self.client.queues.iter_mut().zip(&mut self.running) {
            for (slot, ret) in queue.answers(Duration::ZERO) {
                count += 1;
                assert_eq!(ret, 0, "{}: a request failed", self.name);
                match running[slot].take().unwrap() {
                    Running::Change(id) => world.end_change(id),
                    Running::Read(id, len) => world.end_read(id, queue.bytes(slot, len)),
                    Running::Flush => {}
                }
            }
        }
        count
    }
}

/// What a run got to do: the rare states are counted, so that a test can insist on them.
#[derive(Default, Debug)]
pub(crate) struct Counts {
    requests: usize,
    contested: usize,
    cuts: usize,
    groups: usize,
    changes_in_a_cut: usize,
    frozen_reads: usize,
    deletes: usize,
    deletes_in_the_middle: usize,
    unmaps: usize,
    discards: usize,
}

struct Run {
    daemon: Daemon,
    rng: Rng,
    world: World,
    ports: Vec<Port>,
    orders: Sender<Order>,
    news: Receiver<News>,
    /// Something is being taken or deleted.
    is_busy: bool,
    names: u64,
    counts: Counts,
}

impl Run {
    fn new(seed: u64) -> Run {
        let mut rng = Rng::new(seed);
        // One size is not a multiple of the block size.
        let sizes = [(1 << 20) + SECTOR as u64, (512 << 10) + 4096 * rng.below(9) as u64];
        let block = ["block-size=4K", "block-size=4K", "block-size=16K"][rng.below(3)];
        let layout = ["sparse", "packed"][rng.below(2)];
        let daemon = Daemon::with_disks(&sizes, &format!("queues=3,{block},layout={layout}"));
        let (orders, inbox) = channel();
        let (outbox, news) = channel();
        let api = daemon.api();
        std::thread::spawn(move || control(&api, &inbox, &outbox));
        let mut world = World::default();
        let mut ports = Vec::new();
        for (disk, &name) in DISKS.iter().enumerate() {
            let client = daemon.client_with_queues(name, QUEUES[disk]);
            let sectors = vec![vec![0]; client.sectors()];
            world.arrays.push(Array { name: name.to_owned(), disk, phase: Phase::Live, sectors });
            ports.push(Port::new(name, client));
        }
        // Tags are numbers of changes; zero is what was never written.
        world.next = 1;
        Run { daemon, rng, world, ports, orders, news, is_busy: false, names: 0, counts: Counts::default() }
    }

    fn range(&mut self, sectors: usize) -> Range<usize> {
        // Half of the disk is busier than the rest.
        let first = if self.rng.chance(60) { self.rng.below(sectors / 4) } else { self.rng.below(sectors) };
        let longest = match self.rng.below(10) {
            0..7 => 12,
            7..9 => 64,
            _ => SLOT / SECTOR,
        };
        let mut range = first..first + 1 + self.rng.below(longest.min(sectors - first));
        if self.rng.chance(40) {
            range.start = range.start / 8 * 8;
            range.end = range.end.next_multiple_of(8).min(sectors);
        }
        range.end = range.end.min(range.start + SLOT / SECTOR);
        range
    }

    fn submit(&mut self) {
        let at = if self.rng.chance(70) { self.rng.below(DISKS.len()) } else { self.rng.below(self.ports.len()) };
        let queue = self.rng.below(self.ports[at].client.queues.len());
        if self.ports[at].closing || self.ports[at].client.queues[queue].in_flight() >= DEPTH {
            return;
        }
        let range = self.range(self.ports[at].client.sectors());
        let (port, world, kind) = (&mut self.ports[at], &mut self.world, self.rng.below(100));
        let slot = port.running[queue].iter().position(Option::is_none).unwrap();
        let target = &mut port.client.queues[queue];
        self.counts.requests += 1;
        let is_cut = world.arrays.iter().any(|a| a.phase == Phase::Cutting && a.disk == at);
        let running = if at >= DISKS.len() || kind < 25 {
            self.counts.frozen_reads += usize::from(at >= DISKS.len());
            let id = world.begin_read(&port.name, range.clone());
            target.submit_read(slot, range.clone());
            Running::Read(id, range.len() * SECTOR)
        } else if kind < 96 {
            let (tag, is_discard) = match kind {
                25..80 => (None, false),
                80..88 => (Some(0), false),
                _ => (Some(0), true),
            };
            let (id, tag) = world.begin_change(at, range.clone(), tag, is_discard);
            self.counts.contested += usize::from(!world.changes.last().unwrap().contested.is_empty());
            self.counts.changes_in_a_cut += usize::from(is_cut);
            match kind {
                25..80 => target.submit_write(slot, range, tag, self.rng.chance(10)),
                80..88 => {
                    let unmap = self.rng.chance(60);
                    self.counts.unmaps += usize::from(unmap);
                    target.submit_zeroes(slot, range, unmap);
                }
                _ => {
                    self.counts.discards += 1;
                    target.submit_discard(slot, range);
                }
            }
            Running::Change(id)
        } else {
            target.submit_flush(slot);
            Running::Flush
        };
        port.running[queue][slot] = Some(running);
    }

    /// Asks for a snapshot or a deletion.
    fn order(&mut self) {
        let count = self.ports.len() - DISKS.len();
        if count < SNAPSHOTS_MAX && self.rng.chance(60) {
            self.names += 1;
            let name = format!("s{}", self.names);
            let disks = match self.rng.below(3) {
                0 => vec![0, 1],
                one => vec![one - 1],
            };
            self.counts.cuts += 1;
            self.counts.groups += usize::from(disks.len() == 2);
            for &disk in &disks {
                self.world.begin_cut(disk, format!("{}@{name}", DISKS[disk]));
            }
            self.orders.send(Order::Create { name, disks }).unwrap();
            self.is_busy = true;
        } else if count > 0 {
            let victim = DISKS.len() + self.rng.below(count);
            self.ports[victim].closing = true;
            self.is_busy = true;
        }
    }

    fn hear(&mut self) {
        while let Ok(news) = self.news.try_recv() {
            match news {
                News::Cut { references } => {
                    references.iter().for_each(|r| self.world.array(r).phase = Phase::Frozen);
                }
                News::Quiesced { references } => {
                    for reference in references {
                        let client = self.daemon.reader(&reference);
                        self.ports.push(Port::new(&reference, client));
                    }
                    self.is_busy = false;
                }
                News::Deleted { reference } => {
                    self.world.arrays.retain(|a| a.name != reference);
                    self.is_busy = false;
                }
            }
        }
        // What is to be deleted must have no reader any more.
        if let Some(at) = self.ports.iter().position(|p| p.closing && p.is_idle()) {
            let port = self.ports.remove(at);
            let disk = port.name.split('@').next().unwrap();
            let is_sibling = |p: &Port| p.name.starts_with(&format!("{disk}@"));
            let (older, newer) = (self.ports[..at].iter().any(is_sibling), self.ports[at..].iter().any(is_sibling));
            self.counts.deletes += 1;
            self.counts.deletes_in_the_middle += usize::from(older && newer);
            let reference = port.name.clone();
            drop(port);
            self.orders.send(Order::Delete { reference }).unwrap();
        }
    }

    fn steps(&mut self, steps: usize) {
        while self.counts.requests < steps {
            let before = self.counts.requests;
            for _ in 0..4 {
                self.submit();
            }
            let answered: usize = self.ports.iter_mut().map(|p| p.poll(&mut self.world)).sum();
            self.hear();
            if !self.is_busy && self.rng.chance(4) {
                self.order();
            }
            if answered == 0 && self.counts.requests == before {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        let deadline = Instant::now() + *PATIENCE;
        while self.is_busy || !self.ports.iter().all(Port::is_idle) {
            for port in &mut self.ports {
                port.poll(&mut self.world);
            }
            self.hear();
            assert!(Instant::now() < deadline, "requests or snapshots do not end");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Every snapshot whole, all deleted in any order, the disk against its file, and nothing else left.
    fn end(mut self) -> Counts {
        loop {
            for port in &mut self.ports {
                let content = port.client.read_all();
                self.world.check_all(&port.name, &content);
            }
            let count = self.ports.len() - DISKS.len();
            if count == 0 {
                break;
            }
            let victim = self.ports.remove(DISKS.len() + self.rng.below(count));
            let reference = victim.name.clone();
            drop(victim);
            self.daemon.delete(&reference);
            self.world.arrays.retain(|a| a.name != reference);
        }
        self.daemon.assert_only_disks_left();
        self.ports.clear();
        for disk in DISKS {
            let content = self.daemon.content(disk);
            assert!(std::fs::read(self.daemon.image(disk)).unwrap() == content, "{disk}: the image is not the disk");
            self.world.check_all(disk, &content);
        }
        self.daemon.stop();
        for disk in DISKS {
            let content = std::fs::read(self.daemon.image(disk)).unwrap();
            self.world.check_all(disk, &content);
            assert!(!self.daemon.socket(disk).exists());
        }
        self.counts
    }
}

#[test]
fn random_requests_and_snapshots_against_an_array_a_version() {
    let steps = from_env("HALFSILVER_STEPS", 6000) as usize;
    let mut rare = [0; 8];
    let seeds = seeds("oracle", 3);
    // What a few seeds do not come to, some more do.
    let more = seeds.last().map_or(0, |last| last + 1);
    for seed in seeds.iter().copied().chain(more..more + 4 * seeds.len() as u64) {
        if seed >= more && rare.iter().all(|&n| n > 0) {
            break;
        }
        let c = one_run(seed, steps);
        println!("seed {seed}: {c:?}");
        let now = [
            c.contested,
            c.groups,
            c.changes_in_a_cut,
            c.frozen_reads,
            c.deletes,
            c.deletes_in_the_middle,
            c.unmaps,
            c.discards,
        ];
        rare.iter_mut().zip(now).for_each(|(sum, n)| *sum += n);
    }
    assert!(rare.iter().all(|&n| n > 0), "some state was never reached: {rare:?}");
}

/// One random run; panics when something is wrong.
pub(crate) fn one_run(seed: u64, steps: usize) -> Counts {
    let mut run = Run::new(seed);
    run.steps(steps);
    run.end()
}
