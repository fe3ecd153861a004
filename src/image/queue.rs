//! One worker's I/O queue: operations in flight, the ring that carries them, and who waits for them.
//!
//! What always holds:
//! - An operation's buffer and the file that it names by number live in its slot from [`IoQueue::begin`] until the kernel
//!   (or the simulated image) has finished it; a dropped [`Completion`] only abandons the answer, never those two. So no
//!   number is ever somebody else's by the time that the kernel looks at it.
//! - The kernel is given slot numbers with a generation, never addresses or guest-given indices; a completion that
//!   does not match its slot is a bug and panics.
//! - Dropping the queue cancels what only waits (events, timers) and waits for everything else.
//!
//! A queue belongs to one thread. It does no polling when nothing is ready: [`IoQueue::turn`] sleeps in the kernel.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::{Budget, ByteOffset, Image, IoBuf, IoSegment};

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Fill the buffer from the image.
    Read,
    /// Write the buffer to the image; `durable` asks for the bytes to be on stable storage at completion.
    Write {
        /// Complete only when durable (`RWF_DSYNC`).
        durable: bool,
    },
    /// Make all earlier completed writes durable.
    Sync,
    /// Make `len` bytes read as zeros. With `unmap` the storage is released, without it stays allocated.
    Zero {
        /// How many bytes.
        len: u64,
        /// Whether to give the storage back.
        unmap: bool,
    },
    /// Wait for an eventfd (no image).
    Event,
    /// Wait for a time to pass (no image).
    Timeout,
}

/// How to set up a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingOptions {
    /// Submission entries; a power of two. Completions get twice as many.
    pub entries: u32,
}

impl Default for RingOptions {
    fn default() -> RingOptions {
        RingOptions { entries: 256 }
    }
}

/// A finished operation: how many bytes moved, and the buffer back.
#[derive(Debug)]
pub struct Completed {
    /// Bytes moved, or the system's error.
    pub result: io::Result<usize>,
    /// The buffer that was given.
    pub buf: IoBuf,
}

enum SlotState {
    Free,
    InFlight { waker: Option<Waker>, abandoned: bool },
    Done(i32),
}

struct Slot {
    generation: u32,
    state: SlotState,
    kind: OpKind,
    buf: IoBuf,
    // What the kernel reads after submission returns to us stays here until completion: the file, too, because what is
    // submitted may be looked at later.
    file: Option<Held>,
    segments: Vec<IoSegment>,
    timespec: Box<types::Timespec>,
    event: Box<u64>,
}

/// A file that operations in flight name by its number. Those of one queue share it: a count that threads share is only
/// touched when the first one begins and the last one ends.
type Held = Rc<Arc<File>>;

/// The bytes of copies that a queue of our own may have at once.
const COPIES_BYTES_MAX: u64 = 32 << 20;

struct Inner {
    slots: RefCell<Vec<Slot>>,
    held: RefCell<Vec<Weak<Arc<File>>>>,
    copies: RefCell<Arc<Budget>>,
    free: RefCell<Vec<u32>>,
    in_flight: Cell<usize>,
    ring: RefCell<Option<IoUring>>,
    unsubmitted: Cell<bool>,
    wakers: Cell<Vec<Waker>>,
}

/// One thread's queue of operations. Cloning gives another handle to the same queue.
#[derive(Clone)]
pub struct IoQueue {
    inner: Rc<Inner>,
}

/// The right and the duty to finish one operation. Held by an image between start and completion.
///
/// Dropping it unfinished finishes the operation with `ECANCELED`.
pub struct OpTicket {
    inner: Option<Rc<Inner>>,
    slot: u32,
    generation: u32,
    at: ByteOffset,
    skip: usize,
}

/// The answer of one operation, to be awaited.
pub struct Completion {
    inner: Rc<Inner>,
    slot: u32,
    generation: u32,
    taken: bool,
}

impl IoQueue {
    /// A queue on an io_uring of its own.
    ///
    /// # Errors
    /// When the kernel refuses a ring (io_uring disabled, or out of memory or descriptors).
    pub fn with_ring(options: RingOptions) -> io::Result<IoQueue> {
        // One thread submits, and completion work runs when that thread asks for completions: cheaper, and
        // no interrupts between two requests. With the task-run flag the kernel says that completions wait for
        // that, so that a turn which does not wait takes them too. Kernels before 6.1 do not know these flags.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(options.entries * 2)
            .build(options.entries)
            .or_else(|_| IoUring::builder().setup_cqsize(options.entries * 2).build(options.entries))?;
        Ok(IoQueue::new(Some(ring)))
    }

    /// A queue without a ring, for simulated images that finish their operations themselves.
    #[must_use]
    pub fn simulated() -> IoQueue {
        IoQueue::new(None)
    }

    fn new(ring: Option<IoUring>) -> IoQueue {
        IoQueue {
            inner: Rc::new(Inner {
                slots: RefCell::new(Vec::new()),
                held: RefCell::new(Vec::new()),
                copies: RefCell::new(Budget::new(COPIES_BYTES_MAX)),
                free: RefCell::new(Vec::new()),
                in_flight: Cell::new(0),
                ring: RefCell::new(ring),
                unsubmitted: Cell::new(false),
                wakers: Cell::default(),
            }),
        }
    }

    /// How many operations are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.inner.in_flight.get()
    }

    /// What copies of a guest's bytes are taken from.
    #[must_use]
    pub fn copies(&self) -> Arc<Budget> {
        self.inner.copies.borrow().clone()
    }

    /// Takes them from this budget from now on, which other queues may share.
    pub fn share_copies(&self, budget: Arc<Budget>) {
        self.inner.copies.replace(budget);
    }

    /// Starts an operation on `image` at `at`, with the buffer from byte `skip` on.
    #[must_use]
    pub fn begin(&self, image: &dyn Image, kind: OpKind, at: ByteOffset, buf: IoBuf, skip: usize) -> Completion {
        let (slot, generation) = self.reserve(kind, buf);
        let ticket = OpTicket { inner: Some(self.inner.clone()), slot, generation, at, skip };
        image.start(self, ticket);
        Completion { inner: self.inner.clone(), slot, generation, taken: false }
    }

    /// Waits for an eventfd to be signalled and takes its count.
    #[must_use]
    pub fn event(&self, file: &Arc<File>) -> Completion {
        let (slot, generation) = self.reserve(OpKind::Event, IoBuf::None);
        let address: *mut u64 = {
            let slot = &mut self.inner.slots.borrow_mut()[slot as usize];
            slot.file = Some(self.inner.hold(file));
            &mut *slot.event
        };
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), address.cast(), 8).build();
        self.push(entry, slot, generation);
        Completion { inner: self.inner.clone(), slot, generation, taken: false }
    }

    /// Waits for `time` to pass.
    #[must_use]
    pub fn sleep(&self, time: Duration) -> Completion {
        let (slot, generation) = self.reserve(OpKind::Timeout, IoBuf::None);
        let entry = {
            let mut slots = self.inner.slots.borrow_mut();
            let s = &mut slots[slot as usize];
            *s.timespec = types::Timespec::from(time);
            opcode::Timeout::new(&raw const *s.timespec).build()
        };
        self.push(entry, slot, generation);
        Completion { inner: self.inner.clone(), slot, generation, taken: false }
    }

    /// Asks the kernel to give up an operation that waits for an event or a time.
    pub fn cancel(&self, completion: &Completion) {
        let user_data = pack(completion.slot, completion.generation);
        let waiting = matches!(
            self.inner.slots.borrow()[completion.slot as usize],
            Slot { generation, state: SlotState::InFlight { .. }, .. } if generation == completion.generation
        );
        if waiting {
            self.push_raw(&opcode::AsyncCancel::new(user_data).build().user_data(CANCEL));
        }
    }

    /// Submits what was started, without waiting.
    pub fn submit(&self) {
        self.inner.submit();
    }

    /// Whether operations have finished that a [`IoQueue::turn`] would take without waiting.
    #[must_use]
    pub fn has_answers(&self) -> bool {
        let mut ring = self.inner.ring.borrow_mut();
        ring.as_mut().is_some_and(|ring| !ring.completion().is_empty() || kernel_has_work(ring))
    }

    /// Gives a ticket's operation to this queue's ring, as a transfer on `file`.
    ///
    /// # Panics
    /// On a queue without a ring: files need one.
    pub(super) fn submit_on_file(&self, file: &Arc<File>, mut ticket: OpTicket) {
        let fd = types::Fd(file.as_raw_fd());
        let entry = {
            let mut slots = self.inner.slots.borrow_mut();
            let slot = &mut slots[ticket.slot as usize];
            slot.file = Some(self.inner.hold(file));
            let at = ticket.at.0;
            if ticket.skip > 0 {
                slot.segments = slot.buf.rest_segments(ticket.skip);
            }
            match slot.kind {
                OpKind::Read | OpKind::Write { .. } => {
                    let single = if ticket.skip > 0 { None } else { slot.buf.single() };
                    let is_durable = slot.kind == (OpKind::Write { durable: true });
                    let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
                    if let Some((address, len)) = single {
                        let len = u32::try_from(len).expect("transfers are bounded far below 4 GiB");
                        if slot.kind == OpKind::Read {
                            opcode::Read::new(fd, address, len).offset(at).build()
                        } else {
                            opcode::Write::new(fd, address, len).offset(at).rw_flags(flags).build()
                        }
                    } else {
                        let (iov, count) = if ticket.skip > 0 {
                            let n = u32::try_from(slot.segments.len()).expect("segments are bounded");
                            (slot.segments.as_ptr().cast::<libc::iovec>(), n)
                        } else {
                            slot.buf.vectored().expect("a transfer has bytes")
                        };
                        if slot.kind == OpKind::Read {
                            opcode::Readv::new(fd, iov, count).offset(at).build()
                        } else {
                            opcode::Writev::new(fd, iov, count).offset(at).rw_flags(flags).build()
                        }
                    }
                }
                OpKind::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
                OpKind::Zero { len, unmap } => {
                    let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
                    opcode::Fallocate::new(fd, len).offset(at).mode(mode | libc::FALLOC_FL_KEEP_SIZE).build()
                }
                OpKind::Event | OpKind::Timeout => unreachable!("not operations on an image"),
            }
        };
        ticket.inner = None; // From here on the ring finishes it.
        self.push(entry, ticket.slot, ticket.generation);
    }

    /// Submits what was started and takes what has finished; with `wait`, sleeps until something has.
    /// Wakes whoever awaited it. Returns how many operations finished.
    ///
    /// # Errors
    /// When the kernel refuses the ring itself; nothing can be salvaged then.
    pub fn turn(&self, wait: bool) -> io::Result<usize> {
        let mut ring = self.inner.ring.borrow_mut();
        let Some(ring) = ring.as_mut() else { return Ok(0) };
        let has_answers = !ring.completion().is_empty();
        if self.inner.unsubmitted.get() || (wait && !has_answers) || kernel_has_work(ring) {
            let want = usize::from(wait && !has_answers);
            loop {
                match ring.submit_and_wait(want) {
                    Ok(_) => break,
                    Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                    // Completions must be taken before more can be submitted.
                    Err(e) if is_passing(&e) => break,
                    Err(e) => return Err(e),
                }
            }
            self.inner.unsubmitted.set(!ring.submission().is_empty());
        }
        let mut n = 0;
        let mut wakers = self.inner.wakers.take();
        for cqe in ring.completion() {
            if cqe.user_data() == CANCEL {
                continue;
            }
            n += 1;
            let (slot, generation) = unpack(cqe.user_data());
            wakers.extend(self.inner.finish(slot, generation, completion_result(&cqe)));
        }
        wakers.drain(..).for_each(Waker::wake);
        self.inner.wakers.set(wakers); // Keep the allocation.
        Ok(n)
    }

    fn reserve(&self, kind: OpKind, buf: IoBuf) -> (u32, u32) {
        let mut slots = self.inner.slots.borrow_mut();
        self.inner.in_flight.set(self.inner.in_flight.get() + 1);
        let state = SlotState::InFlight { waker: None, abandoned: false };
        if let Some(index) = self.inner.free.borrow_mut().pop() {
            let slot = &mut slots[index as usize];
            slot.state = state;
            slot.kind = kind;
            slot.buf = buf;
            return (index, slot.generation);
        }
        let index = u32::try_from(slots.len()).expect("in-flight operations are bounded by the queues");
        slots.push(Slot {
            generation: 0,
            state,
            kind,
            buf,
            file: None,
            segments: Vec::new(),
            timespec: Box::new(types::Timespec::new()),
            event: Box::new(0),
        });
        (index, 0)
    }

    fn push(&self, entry: squeue::Entry, slot: u32, generation: u32) {
        self.push_raw(&entry.user_data(pack(slot, generation)));
    }

    fn push_raw(&self, entry: &squeue::Entry) {
        let mut ring = self.inner.ring.borrow_mut();
        let ring = ring.as_mut().expect("an operation on a file needs a queue with a ring");
        loop {
            // SAFETY: every address in the entry points into its slot (buffer, segment array, timespec, event), which
            // keeps them, and the file, until finish() sees the completion.
            if unsafe { ring.submission().push(entry) }.is_ok() {
                let waiting = ring.submission().len();
                self.inner.unsubmitted.set(true);
                if waiting < SUBMITTED_AT_ONCE {
                    return;
                }
                match ring.submit() {
                    // What is refused now goes with the next turn.
                    Err(e) if !is_passing(&e) => panic!("io_uring_enter failed while submitting: {e}"),
                    _ => return self.inner.unsubmitted.set(!ring.submission().is_empty()),
                }
            }
            // The submission queue is full: hand over what is there. EBUSY (completions to be taken
            // first) cannot last: the kernel keeps overflowing completions in a list of its own.
            match ring.submit() {
                Ok(_) => {}
                Err(e) if is_passing(&e) => {}
                Err(e) => panic!("io_uring_enter failed while submitting: {e}"),
            }
        }
    }
}

/// This many operations are handed to the kernel without waiting for more, so that the device works on them while the
/// next ones are prepared (docs/decisions/0032-a-look-before-sleeping.md).
const SUBMITTED_AT_ONCE: usize = 8;

/// `user_data` of cancel requests, whose own completions mean nothing to anybody.
const CANCEL: u64 = u64::MAX;

fn pack(slot: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(slot)
}

fn unpack(user_data: u64) -> (u32, u32) {
    #[allow(clippy::cast_possible_truncation)] // The low half is the slot.
    let slot = user_data as u32;
    (slot, (user_data >> 32) as u32)
}

/// Whether the kernel will take the submissions when it is asked again.
fn is_passing(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
}

/// Whether only a call can bring the completions that wait in the kernel.
fn kernel_has_work(ring: &mut IoUring) -> bool {
    let submission = ring.submission();
    submission.taskrun() || submission.cq_overflow()
}

fn completion_result(cqe: &cqueue::Entry) -> i32 {
    cqe.result()
}

impl Inner {
    /// Keeps a file open for one more operation.
    fn hold(&self, file: &Arc<File>) -> Held {
        let mut held = self.held.borrow_mut();
        if let Some(same) = held.iter().filter_map(Weak::upgrade).find(|same| Arc::ptr_eq(same, file)) {
            return same;
        }
        held.retain(|other| other.strong_count() > 0);
        let new = Rc::new(file.clone());
        held.push(Rc::downgrade(&new));
        new
    }

    /// Records an operation's result. Returns the waker to call once no borrow is held.
    fn finish(&self, index: u32, generation: u32, result: i32) -> Option<Waker> {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[index as usize];
        assert_eq!(slot.generation, generation, "completion of an operation that is not in flight");
        let SlotState::InFlight { waker, abandoned } = &mut slot.state else {
            panic!("operation completed twice");
        };
        let (waker, abandoned) = (waker.take(), *abandoned);
        slot.file = None;
        if abandoned {
            self.release(slot, index);
        } else {
            slot.state = SlotState::Done(result);
        }
        self.in_flight.set(self.in_flight.get() - 1);
        waker
    }

    fn submit(&self) {
        if !self.unsubmitted.get() {
            return;
        }
        let mut ring = self.ring.borrow_mut();
        let Some(ring) = ring.as_mut() else { return };
        match ring.submit() {
            Err(e) if !is_passing(&e) => log::error!("io_uring refused a submission: {e}"),
            _ => self.unsubmitted.set(!ring.submission().is_empty()),
        }
    }

    fn release(&self, slot: &mut Slot, index: u32) -> IoBuf {
        slot.state = SlotState::Free;
        slot.generation = slot.generation.wrapping_add(1);
        slot.segments.clear();
        self.free.borrow_mut().push(index);
        std::mem::replace(&mut slot.buf, IoBuf::None)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(mut ring) = self.ring.borrow_mut().take() else { return };
        let waiting: Vec<u64> = self
            .slots
            .borrow()
            .iter()
            .enumerate()
            .filter(|(_, s)| {
                matches!(s.state, SlotState::InFlight { .. }) && matches!(s.kind, OpKind::Event | OpKind::Timeout)
            })
            .map(|(i, s)| pack(u32::try_from(i).expect("slots are counted in u32"), s.generation))
            .collect();
        for user_data in waiting {
            let entry = opcode::AsyncCancel::new(user_data).build().user_data(CANCEL);
            // SAFETY: a cancel entry holds no address.
            while unsafe { ring.submission().push(&entry) }.is_err() {
                if let Err(e) = ring.submit() {
                    log::error!("io_uring refused to cancel at shutdown: {e}");
                    break;
                }
            }
        }
        while self.in_flight.get() > 0 {
            if let Err(e) = ring.submit_and_wait(1)
                && e.raw_os_error() != Some(libc::EINTR)
            {
                // The kernel may still write into the buffers: leaking them is the only safe way out.
                log::error!("io_uring failed at shutdown with {} operations in flight: {e}", self.in_flight.get());
                std::mem::forget(std::mem::take(&mut *self.slots.borrow_mut()));
                return;
            }
            let done: Vec<(u64, i32)> = ring.completion().map(|c| (c.user_data(), c.result())).collect();
            for (user_data, result) in done {
                if user_data != CANCEL {
                    let (slot, generation) = unpack(user_data);
                    drop(self.finish(slot, generation, result));
                }
            }
        }
    }
}

impl OpTicket {
    /// What to do.
    #[must_use]
    pub fn kind(&self) -> OpKind {
        self.with_slot(|s| s.kind)
    }

    /// Where.
    #[must_use]
    pub fn at(&self) -> ByteOffset {
        self.at
    }

    /// How many bytes are still to move.
    #[must_use]
    pub fn len(&self) -> usize {
        self.with_slot(|s| s.buf.len()) - self.skip
    }

    /// Whether no bytes are to move.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shows the memory that is still to be filled or written, without giving it to a ring.
    pub(super) fn with_segments<R>(&self, f: impl FnOnce(&[IoSegment]) -> R) -> R {
        let skip = self.skip;
        self.with_slot(|slot| {
            if let IoBuf::Guest(guest) = &slot.buf
                && skip == 0
            {
                return f(guest.segments());
            }
            match slot.buf.single().filter(|_| skip == 0) {
                Some((address, len)) => f(&[IoSegment { address, len }]),
                None => f(&slot.buf.rest_segments(skip)),
            }
        })
    }

    /// A copy of the bytes to write.
    #[must_use]
    pub fn copy_out(&self) -> Vec<u8> {
        let skip = self.skip;
        self.with_slot(|s| match &s.buf {
            IoBuf::None => Vec::new(),
            IoBuf::Owned(b) => b[skip..].to_vec(),
            IoBuf::Shared(b, r) => b[r.start + skip..r.end].to_vec(),
            IoBuf::Guest(g) => g.copy_out()[skip..].to_vec(),
        })
    }

    /// Fills the buffer of a read with `bytes`.
    ///
    /// # Panics
    /// When there are more bytes than room, or the buffer is not one to read into.
    pub fn copy_in(&self, bytes: &[u8]) {
        let skip = self.skip;
        self.with_slot(|s| match &mut s.buf {
            IoBuf::Owned(b) => b[skip..skip + bytes.len()].copy_from_slice(bytes),
            IoBuf::Guest(g) => g.slice(skip..skip + bytes.len()).copy_in(bytes),
            IoBuf::None | IoBuf::Shared(..) => panic!("not a buffer to read into"),
        });
    }

    /// Finishes the operation.
    pub fn finish(mut self, result: io::Result<usize>) {
        self.finish_raw(match result {
            Ok(n) => i32::try_from(n).expect("transfers are bounded far below 2 GiB"),
            Err(e) => -e.raw_os_error().unwrap_or(libc::EIO),
        });
    }

    fn finish_raw(&mut self, result: i32) {
        if let Some(inner) = self.inner.take()
            && let Some(waker) = inner.finish(self.slot, self.generation, result)
        {
            waker.wake();
        }
    }

    fn with_slot<R>(&self, f: impl FnOnce(&mut Slot) -> R) -> R {
        let inner = self.inner.as_ref().expect("the ticket is finished only once");
        f(&mut inner.slots.borrow_mut()[self.slot as usize])
    }
}

impl Drop for OpTicket {
    fn drop(&mut self) {
        self.finish_raw(-libc::ECANCELED);
    }
}

impl Future for Completion {
    type Output = Completed;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completed> {
        let inner = self.inner.clone();
        let mut slots = inner.slots.borrow_mut();
        let slot = &mut slots[self.slot as usize];
        assert!(slot.generation == self.generation && !self.taken, "a completion is taken once");
        match &mut slot.state {
            SlotState::InFlight { waker, .. } => {
                if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                    *waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
            SlotState::Done(result) => {
                let result = match usize::try_from(*result) {
                    Ok(n) => Ok(n),
                    Err(_) => Err(io::Error::from_raw_os_error(-*result)),
                };
                let buf = inner.release(slot, self.slot);
                self.taken = true;
                Poll::Ready(Completed { result, buf })
            }
            SlotState::Free => unreachable!("a slot is freed only by its completion"),
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut slots = self.inner.slots.borrow_mut();
        let slot = &mut slots[self.slot as usize];
        match &mut slot.state {
            SlotState::InFlight { abandoned, .. } => *abandoned = true,
            SlotState::Done(_) => drop(self.inner.release(slot, self.slot)),
            SlotState::Free => unreachable!("a slot is freed only by its completion"),
        }
    }
}
