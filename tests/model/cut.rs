//! A guest writes a chain that hops between two disks and two queues, each link only after the one before was
//! acknowledged, while both disks are frozen at one cut. What is frozen must be a beginning of the chain, and must hold
//! all that was acknowledged before the cut.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use halfsilver::engine::{
    Backing, ChainEditor, Disk, DiskOptions, EPOCHS_DRAINING_MAX, Epoch, EpochClock, Layer, NewLayer, PreparedSnapshot,
    Request, Writers,
};
use halfsilver::image::{AlignedBuf, Alignment, ByteOffset, GuestBuf, Image, IoQueue, OpKind, OpTicket};
use halfsilver::planted::{Defect, plant};
use halfsilver::vhost_user::{AvailSource, intake};
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::{future::block_on, thread};

use crate::{alone, explore, is_noticed};

pub(crate) const SECTOR: usize = 512;
pub(crate) const DISK_BYTES: usize = 4096;
/// Links of the chain: link i goes to disk and queue i % 2, sector i / 2.
const LINKS: usize = 4;
const ORDERS: usize = 1500;
pub(crate) const FOREVER: Duration = Duration::from_secs(3600);

/// An image whose operations take no time but may be delayed before they happen.
pub(crate) struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// Looking at it is a point at which the scheduler may switch, without giving up the turn.
    point: AtomicUsize,
}

impl Image for Memory {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES as u64
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: 512, memory_bytes: 1 }
    }
    fn start(&self, _queue: &IoQueue, ticket: OpTicket) {
        self.point.load(Ordering::SeqCst);
        let at = usize::try_from(ticket.at().0).unwrap();
        let len = ticket.len();
        match ticket.kind() {
            OpKind::Read => {
                let bytes = self.bytes.lock().unwrap()[at..at + len].to_vec();
                ticket.copy_in(&bytes);
            }
            OpKind::Write { .. } => {
                let bytes = ticket.copy_out();
                self.bytes.lock().unwrap()[at..at + len].copy_from_slice(&bytes);
            }
            _ => {}
        }
        ticket.finish(Ok(len));
    }
    fn path(&self) -> &Path {
        Path::new("memory")
    }
    fn is_poisoned(&self) -> bool {
        false
    }
    fn poison(&self) {}
}

pub(crate) fn memory() -> Arc<Memory> {
    Arc::new(Memory { bytes: Mutex::new(vec![0; DISK_BYTES]), point: AtomicUsize::new(0) })
}

/// The guest: how many links it has announced on each ring, and how many were acknowledged.
struct Guest {
    rings: Mutex<[usize; 2]>,
    kick: Condvar,
    acknowledged: AtomicUsize,
}

/// A worker's side of a ring.
struct Ring<'a> {
    guest: &'a Guest,
    index: usize,
    loaded: usize,
    next: usize,
}

impl AvailSource for Ring<'_> {
    type Item = usize;
    fn load_avail(&mut self) -> bool {
        self.loaded = self.guest.rings.lock().unwrap()[self.index];
        self.loaded > self.next
    }
    fn pop(&mut self) -> Option<usize> {
        (self.next < self.loaded).then(|| {
            self.next += 1;
            self.next - 1
        })
    }
}

impl Ring<'_> {
    /// Sleeps until something new is announced.
    fn wait(&self) {
        let mut rings = self.guest.rings.lock().unwrap();
        while rings[self.index] == self.next {
            rings = self.guest.kick.wait(rings).unwrap();
        }
    }
}

/// One queue's worker: takes links off its ring and writes them.
fn work(queue_index: usize, disk: &Arc<Disk>, guest: &Guest) {
    let (attachment, queue) = (disk.attach_live(), IoQueue::simulated());
    let lane = attachment.lane();
    let mut ring = Ring { guest, index: queue_index, loaded: 0, next: 0 };
    let links = (LINKS + 1 - queue_index) / 2;
    while ring.next < links {
        let mut batch = Vec::new();
        if intake(&lane, &mut ring, |_, item, ticket| batch.push((item, ticket))) == 0 {
            ring.wait();
            continue;
        }
        for (item, ticket) in batch {
            let link = item * 2 + queue_index;
            let mut data = AlignedBuf::zeroed(SECTOR);
            data.fill(u8::try_from(link + 1).unwrap());
            let from = GuestBuf::from_owned(data).0;
            let request = Request::Write { at: ByteOffset((item * SECTOR) as u64), from, durable: false };
            block_on(attachment.execute(&queue, &ticket, request)).unwrap();
            drop(ticket);
            // The guest sees the acknowledgement and only now submits the next link.
            guest.acknowledged.store(link + 1, Ordering::SeqCst);
            if link + 1 < LINKS {
                guest.rings.lock().unwrap()[(link + 1) % 2] += 1;
                guest.kick.notify_all();
            }
        }
    }
}

fn one_order() {
    let clock = EpochClock::new(Epoch(1));
    let editor = ChainEditor::new(clock.clone());
    let disks: Vec<Arc<Disk>> = (0..2)
        .map(|_| {
            let discards = std::sync::Arc::new(Disk::table_in_memory(DISK_BYTES as u64, 4096).unwrap());
            let options = DiskOptions { image: Backing::One(memory()), block_bytes: 4096, read_only: false, discards };
            Disk::new(clock.clone(), options)
        })
        .collect();
    let guest = Arc::new(Guest { rings: Mutex::new([1, 0]), kick: Condvar::new(), acknowledged: AtomicUsize::new(0) });
    let workers: Vec<_> = (0..2)
        .map(|i| {
            let (disk, guest) = (disks[i].clone(), guest.clone());
            thread::spawn(move || work(i, &disk, &guest))
        })
        .collect();

    let acknowledged = guest.acknowledged.load(Ordering::SeqCst);
    let group = disks.iter().map(|disk| PreparedSnapshot {
        disk: disk.clone(),
        layer: NewLayer::Frozen {
            layer: Layer::of(Backing::One(memory()), Arc::new(Disk::table_in_memory(DISK_BYTES as u64, 4096).unwrap())),
        },
        new_live: uuid::Uuid::new_v4(),
        changed: None,
    });
    let cut = editor.cut(group.collect(), Writers::Request).unwrap();
    // Each by itself: nobody who is at the other one matters.
    assert!(disks.iter().all(|disk| disk.clock().wait_quiet(cut.ended, FOREVER)));
    cut.frozen.iter().for_each(|version| version.set_quiesced());

    let queue = IoQueue::simulated();
    let look = || {
        let lane = clock.lane();
        let mut links = [false; LINKS];
        for (i, (disk, version)) in disks.iter().zip(&cut.frozen).enumerate() {
            let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(DISK_BYTES));
            let read = Request::Read { at: ByteOffset(0), into };
            let ticket = lane.enter();
            block_on(disk.attach_frozen(version.id).execute(&queue, &ticket, read)).unwrap();
            let bytes = memory.to_vec();
            for link in (i..LINKS).step_by(2) {
                links[link] = bytes[link / 2 * SECTOR] == u8::try_from(link + 1).unwrap();
            }
        }
        links
    };
    let frozen = look();
    let length = frozen.iter().take_while(|&&there| there).count();
    assert!(frozen[length..].iter().all(|&there| !there), "not a beginning of the chain: {frozen:?}");
    assert!(length >= acknowledged, "{acknowledged} links were acknowledged before the cut, {length} are frozen");
    for worker in workers {
        worker.join().unwrap();
    }
    assert_eq!(look(), frozen, "a frozen version changed after it was quiesced");
}

#[test]
fn a_cut_freezes_a_beginning_of_the_chain() {
    let _alone = alone();
    explore(ORDERS, one_order);
}

#[test]
fn planted_rules_1_to_3_left_out_are_noticed() {
    let _alone = alone();
    let rules = [Defect::EpochBeforeAvail, Defect::NoEpochRecheck, Defect::CutPerDisk];
    let unnoticed = rules.into_iter().filter(|&defect| {
        plant(Some(defect));
        let noticed = is_noticed(10 * ORDERS, one_order);
        plant(None);
        crate::report(defect, noticed, "cut.rs");
        !noticed
    });
    let unnoticed: Vec<_> = unnoticed.collect();
    assert!(unnoticed.is_empty(), "no order showed {unnoticed:?}");
}

/// Somebody waits for an epoch whose slot is the next one's, which comes while he looks; whoever enters that one and leaves
/// it wakes nobody.
#[test]
fn who_waits_for_an_epoch_is_not_misled_by_the_one_that_has_its_slot() {
    let _alone = alone();
    explore(ORDERS, || {
        let clock = EpochClock::new(Epoch(1));
        for _ in 0..EPOCHS_DRAINING_MAX {
            clock.advance(clock.room().unwrap());
        }
        let waiter = clock.clone();
        let waits = thread::spawn(move || waiter.wait_drained(Epoch(1), FOREVER));
        clock.advance(clock.room().unwrap());
        let lane = clock.lane();
        drop(lane.enter());
        assert!(waits.join().unwrap());
    });
}
