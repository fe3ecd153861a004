//! Simulated media that remember what is on stable storage.
//!
//! Checked by it: orders of polls and completions, transfers that are visible in part before they complete, power cuts
//! that lose, keep or age each unsynced sector on its own, errors of each kind of operation. Not checked: media that
//! forget what they acknowledged; memory ordering between threads.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use halfsilver::image::{Alignment, ByteOffset, Image, IoQueue, OpKind, OpTicket, Unsynced};

use crate::schedule::{Device, Rng};

pub const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

/// Kinds of operations that can be made to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read,
    Write,
    Zero,
    Sync,
}

/// Bytes of which those behind the last one that was ever written are zeros, and take no memory: a pack has many.
#[derive(Clone, Default)]
struct Bytes {
    size: usize,
    begun: Vec<u8>,
}

impl Bytes {
    fn of(bytes: Vec<u8>) -> Bytes {
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let mut begun = bytes;
        let size = begun.len();
        begun.truncate(end.next_multiple_of(SECTOR));
        Bytes { size, begun }
    }

    fn all(&self) -> Vec<u8> {
        let mut bytes = self.begun.clone();
        bytes.resize(self.size, 0);
        bytes
    }

    fn sector(&self, sector: usize) -> Sector {
        let at = sector * SECTOR;
        self.begun.get(at..at + SECTOR).map_or([0; SECTOR], |bytes| bytes.try_into().unwrap())
    }

    fn put(&mut self, sector: usize, bytes: &Sector) {
        let end = (sector + 1) * SECTOR;
        if end > self.begun.len() {
            if bytes.iter().all(|byte| *byte == 0) {
                return;
            }
            self.begun.resize(end, 0);
        }
        self.begun[end - SECTOR..end].copy_from_slice(bytes);
    }
}

#[derive(Default)]
struct State {
    now: Bytes,
    stored: Bytes,
    /// What was written to a sector since it was stored, oldest first, with when.
    unsynced: BTreeMap<usize, Vec<(u64, Sector)>>,
    clock: u64,
    fail: Option<(Op, usize, i32)>,
    /// Whether that is over after the first one.
    fails_once: bool,
    /// Sectors that cannot be read.
    rotten: BTreeSet<usize>,
    no_holes: bool,
    written: usize,
    read: usize,
    syncs: usize,
}

/// An image in memory whose operations finish when the scheduler says so.
#[derive(Clone)]
pub struct Medium {
    state: Arc<Mutex<State>>,
    poisoned: Arc<AtomicBool>,
    unsynced: Arc<Unsynced>,
    path: PathBuf,
    /// What it is called since it was opened, if that has changed.
    moved: OnceLock<PathBuf>,
    /// What transfers are multiples of, in bytes.
    unit: u32,
    /// What goes when nobody has it open any more, and no transfer to it is in flight.
    lock: Option<Arc<dyn Any + Send + Sync>>,
}

struct Pending {
    medium: Medium,
    ticket: OpTicket,
    began: u64,
    left: Vec<usize>,
    /// Sectors that have moved, and when.
    moved: Vec<(usize, u64)>,
    data: Vec<u8>,
    len: usize,
}

thread_local! {
    static UNIT: Cell<u32> = const { Cell::new(512) };
    static CHANGES: Cell<u64> = const { Cell::new(0) };
    static PENDING: RefCell<Vec<Pending>> = const { RefCell::new(Vec::new()) };
}

impl Medium {
    pub fn new(name: &str, size: usize) -> Medium {
        Medium::holding(name, Bytes { size, begun: Vec::new() })
    }

    /// A medium with these bytes on stable storage.
    pub fn with(name: &str, bytes: Vec<u8>) -> Medium {
        Medium::holding(name, Bytes::of(bytes))
    }

    fn holding(name: &str, bytes: Bytes) -> Medium {
        let state = State { now: bytes.clone(), stored: bytes, ..State::default() };
        Medium {
            state: Arc::new(Mutex::new(state)),
            poisoned: Arc::default(),
            unsynced: Arc::default(),
            path: name.into(),
            moved: OnceLock::new(),
            unit: 512,
            lock: None,
        }
    }

    /// The same medium, opened under a name, in larger units if it is direct and has whole ones. `lock` goes when it is
    /// closed.
    pub fn opened_at(&self, path: &Path, is_direct: bool, lock: impl Any + Send + Sync) -> Medium {
        let larger = Some(UNIT.get()).filter(|unit| is_direct && self.size_bytes().is_multiple_of((*unit).into()));
        let unit = larger.unwrap_or(512);
        let (moved, unsynced, lock) = (OnceLock::new(), Arc::default(), Some(Arc::new(lock) as Arc<_>));
        Medium { path: path.to_owned(), moved, unsynced, unit, lock, ..self.clone() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Makes operations of this kind fail after `after` more of them.
    pub fn fail(&self, op: Op, after: usize, errno: i32) {
        self.lock().fail = Some((op, after, errno));
    }

    /// Makes one operation of this kind fail, the next one.
    pub fn fail_once(&self, op: Op, errno: i32) {
        self.fail(op, 0, errno);
        self.lock().fails_once = true;
    }

    /// All operations work again.
    pub fn heal(&self) {
        self.lock().fail = None;
    }

    /// It cannot give storage back.
    pub fn without_holes(self) -> Medium {
        self.lock().no_holes = true;
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.lock().now.all()
    }
    pub fn written(&self) -> usize {
        self.lock().written
    }
    pub fn read(&self) -> usize {
        self.lock().read
    }
    pub fn syncs(&self) -> usize {
        self.lock().syncs
    }

    /// A sector cannot be read any more.
    pub fn rot(&self, sector: usize) {
        self.lock().rotten.insert(sector);
    }

    /// Changes a byte on stable storage, as a bad medium does.
    pub fn damage(&self, at: usize) {
        let mut state = self.lock();
        let State { now, stored, .. } = &mut *state;
        for bytes in [now, stored] {
            let mut sector = bytes.sector(at / SECTOR);
            sector[at % SECTOR] ^= 0x10;
            bytes.put(at / SECTOR, &sector);
        }
    }

    /// What a power cut leaves: each sector as stored, or as some write since made it.
    pub fn after_power_cut(&self, rng: &mut Rng) -> Medium {
        self.after_loss(|_, versions| rng.below(versions + 1))
    }

    /// The same, where `pick` says of each sector that was written since it was stored which of so many writes is there;
    /// 0 is what was stored.
    pub fn after_loss(&self, mut pick: impl FnMut(usize, usize) -> usize) -> Medium {
        let state = self.lock();
        let mut bytes = state.stored.clone();
        for (sector, versions) in &state.unsynced {
            let picked = pick(*sector, versions.len());
            if picked > 0 {
                bytes.put(*sector, &versions[picked - 1].1);
            }
        }
        Medium::holding(&self.path.display().to_string(), bytes)
    }

    /// What a kill of the process leaves: everything that was written, stored or not. Each transfer in flight has still
    /// arrived, or not.
    pub fn after_kill(&self, rng: &mut Rng) -> Medium {
        let state = self.lock();
        let mut left = State {
            now: state.now.clone(),
            stored: state.stored.clone(),
            unsynced: state.unsynced.clone(),
            clock: state.clock,
            syncs: state.syncs,
            ..State::default()
        };
        drop(state);
        PENDING.with_borrow(|pending| {
            for op in pending.iter().filter(|op| Arc::ptr_eq(&op.medium.state, &self.state)) {
                if rng.chance(50) {
                    op.left.iter().for_each(|&sector| op.put(&mut left, sector));
                }
            }
        });
        let (state, path) = (Arc::new(Mutex::new(left)), self.path().to_owned());
        let (poisoned, unsynced, moved) = Default::default();
        Medium { state, poisoned, unsynced, path, moved, unit: 512, lock: None }
    }

    /// How many sectors were written and are not on stable storage.
    pub fn unsynced_sectors(&self) -> usize {
        self.lock().unsynced.len()
    }

    /// Whether what was written to a sector last is not on stable storage.
    pub fn is_unsynced(&self, sector: usize) -> bool {
        self.lock().unsynced.contains_key(&sector)
    }
}

impl Pending {
    fn put(&self, state: &mut State, sector: usize) {
        let place = usize::try_from(self.ticket.at().0).unwrap() / SECTOR + sector;
        match self.ticket.kind() {
            OpKind::Write { .. } => {
                state.put(place, self.data[sector * SECTOR..(sector + 1) * SECTOR].try_into().unwrap());
            }
            OpKind::Zero { .. } => state.put(place, [0; SECTOR]),
            _ => {}
        }
    }
}

/// While this is kept the operations in flight wait beside, and nobody moves them.
pub struct Aside(Vec<Pending>);

/// Makes room for other media.
pub fn set_aside() -> Aside {
    Aside(PENDING.with_borrow_mut(std::mem::take))
}

impl Drop for Aside {
    fn drop(&mut self) {
        let mut back = std::mem::take(&mut self.0);
        PENDING.with_borrow_mut(|p| std::mem::swap(p, &mut back));
        drop(back);
    }
}

/// The units of what is opened directly from now on, in bytes.
pub fn set_unit(bytes: u32) {
    UNIT.set(bytes);
}

/// Grows with everything that changes what a power cut could leave.
pub fn changes() -> u64 {
    CHANGES.get()
}

/// Counts a change that is none of a medium.
pub fn count_change() {
    CHANGES.set(CHANGES.get() + 1);
}

impl State {
    fn put(&mut self, sector: usize, bytes: Sector) {
        self.now.put(sector, &bytes);
        count_change();
        self.clock += 1;
        let clock = self.clock;
        self.unsynced.entry(sector).or_default().push((clock, bytes));
        self.written += SECTOR;
    }

    /// Stores what was written until `clock`.
    fn store(&mut self, clock: u64) {
        count_change();
        let stored = &mut self.stored;
        self.unsynced.retain(|&sector, versions| {
            store_one(stored, sector, versions, clock);
            !versions.is_empty()
        });
    }

    /// Stores what was written to one sector until `clock`.
    fn store_sector(&mut self, sector: usize, clock: u64) {
        count_change();
        if let Some(versions) = self.unsynced.get_mut(&sector) {
            store_one(&mut self.stored, sector, versions, clock);
            if versions.is_empty() {
                self.unsynced.remove(&sector);
            }
        }
    }
}

fn store_one(stored: &mut Bytes, sector: usize, versions: &mut Vec<(u64, Sector)>, clock: u64) {
    let upto = versions.iter().take_while(|(at, _)| *at <= clock).count();
    if let Some((_, bytes)) = versions.drain(..upto).next_back() {
        stored.put(sector, &bytes);
    }
}

impl Image for Medium {
    fn size_bytes(&self) -> u64 {
        self.lock().now.size as u64
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: self.unit, memory_bytes: 1 }
    }
    fn grow(&self, size_bytes: u64) -> Result<(), halfsilver::image::ImageError> {
        let size = usize::try_from(size_bytes).unwrap();
        let mut state = self.lock();
        count_change();
        (state.now.size, state.stored.size) = (size, size);
        Ok(())
    }
    fn start(&self, _queue: &IoQueue, ticket: OpTicket) {
        let (data, len) = match ticket.kind() {
            OpKind::Write { .. } => (ticket.copy_out(), ticket.len()),
            OpKind::Read => (vec![0; ticket.len()], ticket.len()),
            OpKind::Zero { len, .. } => (Vec::new(), usize::try_from(len).unwrap()),
            _ => (Vec::new(), 0),
        };
        let at = usize::try_from(ticket.at().0).unwrap();
        let unit = usize::try_from(self.unit).unwrap();
        assert!(at.is_multiple_of(unit) && len.is_multiple_of(unit), "misaligned transfer of {len} at {at}");
        let began = {
            let state = self.lock();
            assert!(at + len <= state.now.size, "outside the image");
            state.clock
        };
        let (left, moved) = ((0..len / SECTOR).collect(), Vec::new());
        let pending = Pending { medium: self.clone(), ticket, began, left, moved, data, len };
        PENDING.with_borrow_mut(|p| p.push(pending));
    }
    fn next_data(&self, from: ByteOffset) -> Option<ByteOffset> {
        let state = self.lock();
        let (begun, size) = (state.now.begun.len() as u64, state.now.size as u64);
        (!state.no_holes).then_some(ByteOffset(if from.0 < begun { from.0 } else { size }))
    }
    fn path(&self) -> &Path {
        self.moved.get().unwrap_or(&self.path)
    }
    fn moved(&self, path: &Path) {
        self.moved.set(path.to_owned()).expect("an image moves once");
    }
    fn unsynced(&self) -> Option<&Unsynced> {
        Some(&self.unsynced)
    }
    fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }
    fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
    }
}

fn pending_io() -> usize {
    PENDING.with_borrow(Vec::len)
}

/// Moves some sectors of one operation in flight, and finishes it when all have moved.
fn step_io(rng: &mut Rng) {
    let mut op = PENDING.with_borrow_mut(|p| {
        let i = rng.below(p.len());
        p.swap_remove(i)
    });
    let kind = op.ticket.kind();
    let class = match kind {
        OpKind::Read => Op::Read,
        OpKind::Write { .. } => Op::Write,
        OpKind::Zero { .. } => Op::Zero,
        _ => Op::Sync,
    };
    let at = usize::try_from(op.ticket.at().0).unwrap() / SECTOR;
    let medium = op.medium.clone();
    let mut state = medium.lock();
    if op.left.len() == op.len / SECTOR {
        if state.no_holes && class == Op::Zero {
            drop(state);
            op.ticket.finish(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)));
            return;
        }
        if let Some((fails, after, errno)) = state.fail
            && fails == class
        {
            if after == 0 {
                // Some of it may have arrived.
                if class == Op::Write && rng.chance(50) {
                    state.put(at, op.data[..SECTOR].try_into().unwrap());
                }
                if std::mem::take(&mut state.fails_once) {
                    state.fail = None;
                }
                drop(state);
                op.ticket.finish(Err(io::Error::from_raw_os_error(errno)));
                return;
            }
            state.fail = Some((fails, after - 1, errno));
        }
    }
    if class == Op::Read && state.rotten.range(at..at + op.len / SECTOR).next().is_some() {
        drop(state);
        op.ticket.finish(Err(io::Error::from_raw_os_error(libc::EIO)));
        return;
    }
    let moves = if rng.chance(60) { op.left.len() } else { rng.below(op.left.len() + 1) };
    let offset = if moves == op.left.len() { 0 } else { rng.below(op.left.len() - moves) };
    let moved: Vec<usize> = op.left.drain(offset..offset + moves).collect();
    for sector in moved {
        if class == Op::Read {
            op.data[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(&state.now.sector(at + sector));
        } else {
            op.put(&mut state, sector);
            op.moved.push((at + sector, state.clock));
        }
    }
    if !op.left.is_empty() {
        drop(state);
        PENDING.with_borrow_mut(|p| p.push(op));
        return;
    }
    match kind {
        OpKind::Read => state.read += op.len,
        OpKind::Sync => {
            state.syncs += 1;
            state.store(op.began);
        }
        // Its own bytes, not what came to the same place later.
        OpKind::Write { durable: true } => op.moved.iter().for_each(|&(place, at)| state.store_sector(place, at)),
        _ => {}
    }
    drop(state);
    if class == Op::Read {
        op.ticket.copy_in(&op.data);
    }
    op.ticket.finish(Ok(op.len));
}

/// All media of this thread.
pub struct Media;

impl Device for Media {
    fn pending() -> usize {
        PENDING.with_borrow(Vec::len)
    }
    fn step(rng: &mut Rng) {
        step_io(rng);
    }
    fn reset() {
        drop(PENDING.with_borrow_mut(std::mem::take));
    }
}

pub type Scheduler = crate::schedule::Scheduler<Media>;

/// Runs one future to its end, alone.
pub fn run<T: 'static>(rng: &mut Rng, future: impl Future<Output = T> + 'static) -> T {
    crate::schedule::run::<Media, T>(rng, future)
}
