//! Simulated images, for the scheduler that decides every order from a seed.
//!
//! Checked by it: orders of polls and of I/O completions, transfers that are visible sector by sector before they
//! complete, errors and lack of space on chosen images. Not checked: memory ordering between threads (see the
//! model tests), power cuts.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use halfsilver::image::{Alignment, ByteOffset, Image, IoQueue, OpKind, OpTicket, Unsynced};

pub use crate::schedule::Rng;
use crate::schedule::{self, Device};

pub const SECTOR: usize = 512;

struct Pending {
    image: Arc<State>,
    ticket: OpTicket,
    /// Sectors that have not moved yet.
    left: Vec<usize>,
    data: Vec<u8>,
    len: usize,
    held: bool,
}

thread_local! {
    static PENDING: RefCell<Vec<Pending>> = const { RefCell::new(Vec::new()) };
    static AT_NEXT_START: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

/// Has something happen when the next operation is started, before anybody knows of that.
pub fn at_next_start(what: impl FnOnce() + 'static) {
    AT_NEXT_START.set(Some(Box::new(what)));
}

/// An answer that an image gives instead of doing what it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An error, and nothing is done.
    Errno(i32),
    /// Only so many sectors are done.
    Short(usize),
}

/// What a fault is met by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Met {
    Read,
    Write,
    Zero,
    Sync,
}

#[derive(Clone, Copy)]
struct Injected {
    by: Met,
    fault: Fault,
    times: usize,
    met: usize,
}

struct State {
    bytes: Mutex<Vec<u8>>,
    injected: Mutex<Option<Injected>>,
    fail: Mutex<Option<i32>>,
    fail_after: AtomicUsize,
    fail_zeroing: Mutex<Option<i32>>,
    fail_syncs: Mutex<Option<i32>>,
    longest: AtomicUsize,
    reads: AtomicUsize,
    writes: AtomicUsize,
    zeroes: AtomicUsize,
    syncs: AtomicUsize,
    poisoned: AtomicBool,
    unsynced: Unsynced,
    path: PathBuf,
    alignment: u32,
    holes: Mutex<HashMap<usize, ()>>,
    held: Mutex<Option<OpKind>>,
}

/// An image in memory whose operations finish when the scheduler says so.
#[derive(Clone)]
pub struct SimImage {
    state: Arc<State>,
}

impl SimImage {
    pub fn new(name: &str, size: usize, alignment: u32) -> SimImage {
        SimImage {
            state: Arc::new(State {
                bytes: Mutex::new(vec![0; size]),
                injected: Mutex::new(None),
                fail: Mutex::new(None),
                fail_after: AtomicUsize::new(0),
                fail_zeroing: Mutex::new(None),
                fail_syncs: Mutex::new(None),
                longest: AtomicUsize::new(0),
                reads: AtomicUsize::new(0),
                writes: AtomicUsize::new(0),
                zeroes: AtomicUsize::new(0),
                syncs: AtomicUsize::new(0),
                poisoned: AtomicBool::new(false),
                unsynced: Unsynced::default(),
                path: PathBuf::from(name),
                alignment,
                holes: Mutex::new((0..size / SECTOR).map(|s| (s, ())).collect()),
                held: Mutex::new(None),
            }),
        }
    }

    /// Another image with the same bytes and holes.
    pub fn copy(&self, name: &str) -> SimImage {
        let bytes = self.state.bytes.lock().unwrap();
        let copy = SimImage::new(name, bytes.len(), self.state.alignment);
        copy.state.bytes.lock().unwrap().copy_from_slice(&bytes);
        copy.state.holes.lock().unwrap().clone_from(&self.state.holes.lock().unwrap());
        copy
    }

    /// Makes writes and zeroing fail with `errno` after `count` more of them.
    pub fn fail_writes(&self, errno: i32, count: usize) {
        *self.state.fail.lock().unwrap() = Some(errno);
        self.state.fail_after.store(count, Ordering::SeqCst);
    }

    /// Flips a bit, as a bad medium does.
    pub fn flip(&self, bit: usize) {
        self.state.bytes.lock().unwrap()[bit / 8] ^= 1 << (bit % 8);
    }

    /// The next `times` operations of this kind meet a fault.
    pub fn inject(&self, by: Met, fault: Fault, times: usize) {
        *self.state.injected.lock().unwrap() = Some(Injected { by, fault, times, met: 0 });
    }

    /// Takes the fault away again. Returns how often it was met.
    pub fn heal(&self) -> usize {
        self.state.injected.lock().unwrap().take().map_or(0, |i| i.met)
    }

    /// Makes zeroing fail with `errno`, and nothing else.
    pub fn fail_zeroing(&self, errno: i32) {
        *self.state.fail_zeroing.lock().unwrap() = Some(errno);
    }

    /// Zeroing works again.
    pub fn heal_zeroing(&self) {
        *self.state.fail_zeroing.lock().unwrap() = None;
    }

    /// Writes work again.
    pub fn heal_writes(&self) {
        *self.state.fail.lock().unwrap() = None;
    }

    /// How often a range was to be zeroed.
    pub fn zeroes(&self) -> usize {
        self.state.zeroes.load(Ordering::SeqCst)
    }

    /// Makes syncs fail with `errno`.
    pub fn fail_syncs(&self, errno: i32) {
        *self.state.fail_syncs.lock().unwrap() = Some(errno);
    }

    /// The longest buffer that was read into.
    pub fn longest_read(&self) -> usize {
        self.state.longest.load(Ordering::SeqCst)
    }

    /// How many reads and writes were asked for.
    pub fn transfers(&self) -> (usize, usize) {
        (self.state.reads.load(Ordering::SeqCst), self.state.writes.load(Ordering::SeqCst))
    }

    /// How many syncs were asked for.
    pub fn syncs(&self) -> usize {
        self.state.syncs.load(Ordering::SeqCst)
    }

    /// Keeps operations of this kind from moving, or lets all go on.
    pub fn hold(&self, kind: Option<OpKind>) {
        *self.state.held.lock().unwrap() = kind;
    }

    /// Keeps writes from moving, or lets all go on.
    pub fn hold_writes(&self, held: bool) {
        self.hold(held.then_some(OpKind::Write { durable: false }));
    }

    /// How many operations were started and have not ended.
    pub fn in_flight(&self) -> usize {
        PENDING.with_borrow(|p| p.iter().filter(|p| Arc::ptr_eq(&p.image, &self.state)).count())
    }

    /// Keeps the operations that are in flight now from moving, or lets them go on. Later ones move.
    pub fn hold_in_flight(&self, held: bool) {
        PENDING.with_borrow_mut(|p| {
            p.iter_mut().filter(|p| Arc::ptr_eq(&p.image, &self.state)).for_each(|p| p.held = held)
        });
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state.bytes.lock().unwrap().clone()
    }

    /// How many sectors were written at least once and not given back since.
    pub fn sectors_in_use(&self) -> usize {
        self.state.bytes.lock().unwrap().len() / SECTOR - self.state.holes.lock().unwrap().len()
    }
}

impl Image for SimImage {
    fn next_data(&self, from: ByteOffset) -> Option<ByteOffset> {
        let holes = self.state.holes.lock().unwrap();
        let sectors = self.state.bytes.lock().unwrap().len() / SECTOR;
        let first = usize::try_from(from.0).unwrap() / SECTOR;
        let data = (first..sectors).find(|sector| !holes.contains_key(sector)).unwrap_or(sectors);
        Some(ByteOffset(from.0.max((data * SECTOR) as u64)))
    }

    fn size_bytes(&self) -> u64 {
        self.state.bytes.lock().unwrap().len() as u64
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: self.state.alignment, memory_bytes: 1 }
    }
    fn grow(&self, size_bytes: u64) -> Result<(), halfsilver::image::ImageError> {
        let mut bytes = self.state.bytes.lock().unwrap();
        let (before, size) = (bytes.len() / SECTOR, usize::try_from(size_bytes).unwrap());
        bytes.resize(size, 0);
        self.state.holes.lock().unwrap().extend((before..size / SECTOR).map(|sector| (sector, ())));
        Ok(())
    }
    fn start(&self, _queue: &IoQueue, ticket: OpTicket) {
        if let Some(what) = AT_NEXT_START.take() {
            what();
        }
        let (data, len) = match ticket.kind() {
            OpKind::Write { .. } => (ticket.copy_out(), ticket.len()),
            OpKind::Read => (vec![0; ticket.len()], ticket.len()),
            OpKind::Zero { len, .. } => (vec![0; usize::try_from(len).unwrap()], usize::try_from(len).unwrap()),
            _ => (Vec::new(), 0),
        };
        let at = usize::try_from(ticket.at().0).unwrap();
        let unit = self.state.alignment as usize;
        assert!(at.is_multiple_of(unit) && len.is_multiple_of(unit), "misaligned transfer of {len} at {at}");
        assert!(len.is_multiple_of(SECTOR) && at + len <= self.state.bytes.lock().unwrap().len(), "outside the image");
        match ticket.kind() {
            OpKind::Sync => _ = self.state.syncs.fetch_add(1, Ordering::SeqCst),
            OpKind::Write { .. } => _ = self.state.writes.fetch_add(1, Ordering::SeqCst),
            OpKind::Zero { .. } => _ = self.state.zeroes.fetch_add(1, Ordering::SeqCst),
            OpKind::Read => {
                self.state.reads.fetch_add(1, Ordering::SeqCst);
                self.state.longest.fetch_max(len, Ordering::SeqCst);
            }
            _ => {}
        }
        let left = (0..len / SECTOR).collect();
        PENDING
            .with_borrow_mut(|p| p.push(Pending { image: self.state.clone(), ticket, left, data, len, held: false }));
    }
    fn path(&self) -> &Path {
        &self.state.path
    }
    fn unsynced(&self) -> Option<&Unsynced> {
        Some(&self.state.unsynced)
    }
    fn is_poisoned(&self) -> bool {
        self.state.poisoned.load(Ordering::SeqCst)
    }
    fn poison(&self) {
        self.state.poisoned.store(true, Ordering::SeqCst);
    }
}

impl State {
    /// The fault that an operation of this kind meets now.
    fn meets(&self, kind: OpKind) -> Option<Fault> {
        let by = match kind {
            OpKind::Read => Met::Read,
            OpKind::Write { .. } => Met::Write,
            OpKind::Zero { .. } => Met::Zero,
            OpKind::Sync => Met::Sync,
            _ => return None,
        };
        let mut injected = self.injected.lock().unwrap();
        let injected = injected.as_mut().filter(|i| i.by == by && i.met < i.times)?;
        injected.met += 1;
        Some(injected.fault)
    }
}

fn movable(p: &[Pending]) -> Vec<usize> {
    (0..p.len()).filter(|&i| !p[i].held && *p[i].image.held.lock().unwrap() != Some(p[i].ticket.kind())).collect()
}

/// The bytes of all operations in flight, but for those of tables.
pub fn bytes_in_flight() -> usize {
    let is_table = |p: &Pending| ["table", "durable", "bitmap"].iter().any(|name| p.image.path == Path::new(name));
    PENDING.with_borrow(|p| p.iter().filter(|p| !is_table(p)).map(|p| p.len).sum())
}

/// How many operations could move at the next [`step_io`].
pub fn pending_io() -> usize {
    PENDING.with_borrow(|p| movable(p).len())
}

/// Keeps all operations that are in flight now from moving, or lets them go on. Returns how many there are.
pub fn hold_all_in_flight(held: bool) -> usize {
    PENDING.with_borrow_mut(|p| {
        p.iter_mut().for_each(|p| p.held = held);
        p.len()
    })
}

/// Ends all operations that may move. Nobody is told before the next poll.
pub fn finish_io() {
    let mut rng = Rng::new(3);
    while pending_io() > 0 {
        step_io(&mut rng);
    }
}

/// Moves some sectors of one operation in flight, and finishes it when all have moved.
pub fn step_io(rng: &mut Rng) {
    let mut op = PENDING.with_borrow_mut(|p| {
        let movable = movable(p);
        p.swap_remove(movable[rng.below(movable.len())])
    });
    let kind = op.ticket.kind();
    let changes = matches!(kind, OpKind::Write { .. } | OpKind::Zero { .. });
    if let (OpKind::Zero { .. }, Some(errno)) = (kind, *op.image.fail_zeroing.lock().unwrap()) {
        op.ticket.finish(Err(io::Error::from_raw_os_error(errno)));
        return;
    }
    if let (OpKind::Sync, Some(errno)) = (kind, *op.image.fail_syncs.lock().unwrap()) {
        op.ticket.finish(Err(io::Error::from_raw_os_error(errno)));
        return;
    }
    if changes && op.left.len() == op.len / SECTOR {
        let fail = *op.image.fail.lock().unwrap();
        if let Some(errno) = fail {
            let left = op.image.fail_after.load(Ordering::SeqCst);
            if left == 0 {
                op.ticket.finish(Err(io::Error::from_raw_os_error(errno)));
                return;
            }
            op.image.fail_after.store(left - 1, Ordering::SeqCst);
        }
    }
    let mut short = None;
    if op.left.len() == op.len / SECTOR {
        match op.image.meets(kind) {
            Some(Fault::Errno(errno)) => return op.ticket.finish(Err(io::Error::from_raw_os_error(errno))),
            Some(Fault::Short(sectors)) => {
                op.left.truncate(sectors);
                short = Some(sectors * SECTOR);
            }
            None => {}
        }
    }
    let moves = if short.is_some() || rng.chance(50) { op.left.len() } else { rng.below(op.left.len() + 1) };
    let at = usize::try_from(op.ticket.at().0).unwrap();
    for _ in 0..moves {
        let sector = op.left.swap_remove(rng.below(op.left.len()));
        let (disk, buf) = (at + sector * SECTOR..at + (sector + 1) * SECTOR, sector * SECTOR..(sector + 1) * SECTOR);
        let mut bytes = op.image.bytes.lock().unwrap();
        let mut holes = op.image.holes.lock().unwrap();
        match kind {
            OpKind::Read => op.data[buf].copy_from_slice(&bytes[disk]),
            OpKind::Write { .. } => {
                holes.remove(&(disk.start / SECTOR));
                bytes[disk].copy_from_slice(&op.data[buf]);
            }
            OpKind::Zero { unmap, .. } => {
                if unmap {
                    holes.insert(disk.start / SECTOR, ());
                }
                bytes[disk].fill(0);
            }
            _ => unreachable!(),
        }
    }
    if op.left.is_empty() {
        let done = short.unwrap_or(op.len);
        if kind == OpKind::Read {
            op.ticket.copy_in(&op.data[..done]);
        }
        op.ticket.finish(Ok(done));
    } else {
        PENDING.with_borrow_mut(|p| p.push(op));
    }
}

/// The images in flight.
pub struct Sim;

impl Device for Sim {
    fn pending() -> usize {
        pending_io()
    }
    fn step(rng: &mut Rng) {
        step_io(rng);
    }
}

pub type Scheduler = schedule::Scheduler<Sim>;

/// Forgets what an aborted run left behind.
pub fn reset() {
    let left = PENDING.with_borrow_mut(std::mem::take);
    drop(left);
    drop(AT_NEXT_START.take());
}
