//! Simulated media that remember what is on stable storage, and a scheduler that decides every order from a seed.
//!
//! Checked by it: orders of polls and completions, transfers that are visible in part before they complete, power cuts
//! that lose, keep or age each unsynced sector on its own, errors of each kind of operation. Not checked: media that
//! forget what they acknowledged; memory ordering between threads.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use halfsilver::image::{Alignment, Image, IoQueue, OpKind, OpTicket};

pub const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

/// xorshift64*: small, and the same everywhere.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from((self.next() >> 33) % n as u64).unwrap()
    }
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// Kinds of operations that can be made to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read,
    Write,
    Zero,
    Sync,
}

#[derive(Default)]
struct State {
    now: Vec<u8>,
    stored: Vec<u8>,
    /// What was written to a sector since it was stored, oldest first, with when.
    unsynced: BTreeMap<usize, Vec<(u64, Sector)>>,
    clock: u64,
    fail: Option<(Op, usize, i32)>,
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
    path: PathBuf,
}

struct Pending {
    medium: Medium,
    ticket: OpTicket,
    began: u64,
    left: Vec<usize>,
    data: Vec<u8>,
    len: usize,
}

thread_local! {
    static PENDING: RefCell<Vec<Pending>> = const { RefCell::new(Vec::new()) };
}

impl Medium {
    pub fn new(name: &str, size: usize) -> Medium {
        Medium::with(name, vec![0; size])
    }

    /// A medium with these bytes on stable storage.
    pub fn with(name: &str, bytes: Vec<u8>) -> Medium {
        let state = State { now: bytes.clone(), stored: bytes, ..State::default() };
        Medium { state: Arc::new(Mutex::new(state)), poisoned: Arc::default(), path: name.into() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Makes operations of this kind fail after `after` more of them.
    pub fn fail(&self, op: Op, after: usize, errno: i32) {
        self.lock().fail = Some((op, after, errno));
    }

    /// It cannot give storage back.
    pub fn without_holes(self) -> Medium {
        self.lock().no_holes = true;
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.lock().now.clone()
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

    /// Changes a byte on stable storage, as a bad medium does.
    pub fn damage(&self, at: usize) {
        let mut state = self.lock();
        state.now[at] ^= 0x10;
        state.stored[at] ^= 0x10;
    }

    /// What a power cut leaves: each sector as stored, or as some write since made it.
    pub fn after_power_cut(&self, rng: &mut Rng) -> Medium {
        let state = self.lock();
        let mut bytes = state.stored.clone();
        for (sector, versions) in &state.unsynced {
            let pick = rng.below(versions.len() + 1);
            if pick > 0 {
                bytes[sector * SECTOR..][..SECTOR].copy_from_slice(&versions[pick - 1].1);
            }
        }
        Medium::with(&self.path.display().to_string(), bytes)
    }
}

impl State {
    fn put(&mut self, sector: usize, bytes: Sector) {
        self.now[sector * SECTOR..][..SECTOR].copy_from_slice(&bytes);
        self.clock += 1;
        let clock = self.clock;
        self.unsynced.entry(sector).or_default().push((clock, bytes));
        self.written += SECTOR;
    }

    /// Stores what was written until `clock`.
    fn store(&mut self, clock: u64, sectors: Option<std::ops::Range<usize>>) {
        let stored = &mut self.stored;
        self.unsynced.retain(|sector, versions| {
            if sectors.as_ref().is_none_or(|s| s.contains(sector)) {
                let upto = versions.iter().take_while(|(at, _)| *at <= clock).count();
                if let Some((_, bytes)) = versions.drain(..upto).next_back() {
                    stored[sector * SECTOR..][..SECTOR].copy_from_slice(&bytes);
                }
            }
            !versions.is_empty()
        });
    }
}

impl Image for Medium {
    fn size_bytes(&self) -> u64 {
        self.lock().now.len() as u64
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: 512, memory_bytes: 1 }
    }
    fn start(&self, _queue: &IoQueue, ticket: OpTicket) {
        let (data, len) = match ticket.kind() {
            OpKind::Write { .. } => (ticket.copy_out(), ticket.len()),
            OpKind::Read => (vec![0; ticket.len()], ticket.len()),
            OpKind::Zero { len, .. } => (Vec::new(), usize::try_from(len).unwrap()),
            _ => (Vec::new(), 0),
        };
        let at = usize::try_from(ticket.at().0).unwrap();
        assert!(at.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR), "misaligned transfer of {len} at {at}");
        let began = {
            let state = self.lock();
            assert!(at + len <= state.now.len(), "outside the image");
            state.clock
        };
        let pending = Pending { medium: self.clone(), ticket, began, left: (0..len / SECTOR).collect(), data, len };
        PENDING.with_borrow_mut(|p| p.push(pending));
    }
    fn path(&self) -> &Path {
        &self.path
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
                drop(state);
                op.ticket.finish(Err(io::Error::from_raw_os_error(errno)));
                return;
            }
            state.fail = Some((fails, after - 1, errno));
        }
    }
    let moves = if rng.chance(60) { op.left.len() } else { rng.below(op.left.len() + 1) };
    let offset = if moves == op.left.len() { 0 } else { rng.below(op.left.len() - moves) };
    let moved: Vec<usize> = op.left.drain(offset..offset + moves).collect();
    for sector in moved {
        let (place, part) = ((at + sector) * SECTOR, sector * SECTOR..(sector + 1) * SECTOR);
        match class {
            Op::Read => op.data[part].copy_from_slice(&state.now[place..place + SECTOR]),
            Op::Write => state.put(at + sector, op.data[part].try_into().unwrap()),
            Op::Zero => state.put(at + sector, [0; SECTOR]),
            Op::Sync => unreachable!(),
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
            state.store(op.began, None);
        }
        OpKind::Write { durable: true } => {
            let clock = state.clock;
            state.store(clock, Some(at..at + op.len / SECTOR));
        }
        _ => {}
    }
    drop(state);
    if class == Op::Read {
        op.ticket.copy_in(&op.data);
    }
    op.ticket.finish(Ok(op.len));
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    ready: Arc<Flag>,
}

/// Polls tasks in an order that the seed decides.
#[derive(Default)]
pub struct Scheduler {
    tasks: Vec<Task>,
}

impl Scheduler {
    pub fn spawn(&mut self, future: impl Future<Output = ()> + 'static) {
        self.tasks.push(Task { future: Box::pin(future), ready: Arc::new(Flag(AtomicBool::new(true))) });
    }

    /// Polls one ready task or moves one operation. False when nothing can move.
    pub fn step(&mut self, rng: &mut Rng) -> bool {
        let ready: Vec<usize> =
            (0..self.tasks.len()).filter(|&i| self.tasks[i].ready.0.load(Ordering::SeqCst)).collect();
        let io = pending_io();
        if ready.is_empty() && io == 0 {
            return false;
        }
        if !ready.is_empty() && (io == 0 || rng.chance(60)) {
            let i = ready[rng.below(ready.len())];
            let task = &mut self.tasks[i];
            task.ready.0.store(false, Ordering::SeqCst);
            let waker = Waker::from(task.ready.clone());
            if let Poll::Ready(()) = task.future.as_mut().poll(&mut Context::from_waker(&waker)) {
                drop(self.tasks.swap_remove(i));
            }
        } else {
            step_io(rng);
        }
        true
    }

    /// Runs everything to its end.
    pub fn settle(&mut self, rng: &mut Rng) {
        while self.step(rng) {}
        assert!(self.tasks.is_empty(), "{} tasks are left that nothing will wake", self.tasks.len());
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.tasks.clear();
        // What an aborted run left behind.
        drop(PENDING.with_borrow_mut(std::mem::take));
    }
}

/// Runs one future to its end, alone.
pub fn run<T: 'static>(rng: &mut Rng, future: impl Future<Output = T> + 'static) -> T {
    let out = std::rc::Rc::new(RefCell::new(None));
    let put = out.clone();
    let mut scheduler = Scheduler::default();
    scheduler.spawn(async move {
        let value = future.await;
        *put.borrow_mut() = Some(value);
    });
    scheduler.settle(rng);
    out.take().unwrap()
}
