//! The thread that serves one virtqueue of one connection.
//!
//! What always holds:
//! - Only this thread touches the ring. The session sends [`Command`]s and waits for each to be carried out, so when a
//!   message is answered the ring already obeys it.
//! - A stop is answered when no request is in flight and nothing waits for a kick any more: the base is then final.
//! - A request's ticket lives until its used entry is visible to the driver, and goes exactly once.
//! - The thread sleeps in the kernel when there is nothing to do (a ring without a kick is looked at every millisecond).
//!
//! It knows no messages; that is [`super::session`].

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::Observer;
use super::chain::RawChain;
use super::command::{Command, Kick};
use super::event::Event;
use super::intake::intake;
use super::limits::Limits;
use super::memory::{GuestAddress, MemoryMap};
use super::polling::Polling;
use super::request::{Job, Parsed, Refusal, Rules, Status, direction_asked, parse};
use super::ring::{Ring, RingFault};
use super::seat::Readers;
use super::stats::{Direction, QueueCounters, Traffic};
use crate::engine::{Attachment, EpochLane, GuestQueue, Ticket};
use crate::image::{Bell, Completion, Executor, IoQueue, RemoteWaker, RingOptions};

/// How often a ring without a kick is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Kicks without a request, one after the other, after which each is followed by a rest of [`POLL_INTERVAL`]; after
/// as many more it is twice as long, and so on.
const IN_VAIN_MAX: u32 = 64;
/// The longest of these rests, in intervals.
const RESTS_MAX: u32 = 16;
/// Passes over the ring before completions get their turn.
const PASSES_MAX: usize = 4;
/// About what a guest needs from our interrupt to its next request.
const LOOK_FOR_REQUESTS_MAX: Duration = Duration::from_micros(50);
/// About what a fast disk needs.
const LOOK_FOR_ANSWERS_MAX: Duration = Duration::from_micros(80);
/// With more requests in flight than this nobody looks: a deeper queue hides a wake-up.
const IN_FLIGHT_LOOK_MAX: usize = 2;
/// Descriptors that are read before anything else gets its turn, and pieces of memory that the requests in flight may
/// have: beyond that the rest stays in the ring until some are done.
const PIECES_MAX: usize = 64 << 10;
/// What a request costs that has no piece, in pieces.
const REQUEST_PIECES: usize = 16;
/// Answers that are known while requests are still being taken become visible in groups of this many, so that the driver
/// has something to do meanwhile.
const ANSWERS_AT_ONCE: usize = 8;

/// What the worker is for.
pub(super) struct WorkerContext {
    /// For the log: disk and queue.
    pub(super) name: String,
    pub(super) queue: usize,
    pub(super) attachment: Attachment,
    pub(super) counters: Arc<QueueCounters>,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) limits: Arc<Limits>,
    /// Whether writes must be durable now; the session changes it when the guest does.
    pub(super) durable: Arc<AtomicBool>,
    pub(super) traffic: Arc<Traffic>,
    /// Of something that is only read.
    pub(super) readers: Option<Arc<Readers>>,
    /// Closes the connection, giving the reason.
    pub(super) close: Arc<dyn Fn(&str) + Send + Sync>,
}

/// A running worker.
pub(super) struct Worker {
    commands: mpsc::Sender<(Command, mpsc::SyncSender<Answer>)>,
    waker: RemoteWaker,
    thread: Option<std::thread::JoinHandle<()>>,
}

type Answer = Result<u16, RingFault>;

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system refuses a thread or an io_uring.
    pub(super) fn spawn(context: WorkerContext) -> io::Result<Worker> {
        let (commands, inbox) = mpsc::channel();
        let (ready, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(format!("q{}", context.queue)).spawn(move || {
            let executor = match Executor::new(RingOptions::default()) {
                Ok(executor) => executor,
                Err(e) => return drop(ready.send(Err(e))),
            };
            executor.queue().share_copies(context.limits.copies());
            drop(ready.send(Ok(executor.remote_waker())));
            let close = context.close.clone();
            if let Err(e) = Loop::new(context, executor, inbox).run() {
                close(&format!("io_uring failed: {e}"));
            }
        })?;
        let waker = started.recv().map_err(|_| io::Error::other("a queue's thread ended at once"))??;
        Ok(Worker { commands, waker, thread: Some(thread) })
    }

    /// Has the worker carry out a command. The answer of a stop is the base.
    ///
    /// # Errors
    /// When the ring cannot be served as it is, or the worker has died.
    pub(super) fn call(&self, command: Command) -> io::Result<u16> {
        let gone = || io::Error::other("a queue's thread has ended");
        let (reply, answer) = mpsc::sync_channel(1);
        self.commands.send((command, reply)).map_err(|_| gone())?;
        self.waker.wake();
        let answer = answer.recv().map_err(|_| gone())?;
        answer.map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Errors mean that the thread has ended already, which is what is wanted.
        drop(self.call(Command::Stop));
        drop(self.call(Command::Exit));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a queue's thread panicked");
        }
    }
}

/// A request whose answer is known, on its way to the used ring.
struct Done {
    head: u16,
    status_at: Option<GuestAddress>,
    memory: Arc<MemoryMap>,
    status: Status,
    written: u32,
    direction: Option<Direction>,
    bytes: u64,
    started: Instant,
    // Held until the entry is published: rule 4 of the cut.
    ticket: Ticket,
}

/// What the requests of a worker share.
struct Shared {
    name: String,
    attachment: Attachment,
    queue: IoQueue,
    done: RefCell<Vec<Done>>,
    in_flight: Cell<usize>,
    // What the requests in flight have, all together.
    pieces: Cell<usize>,
    limits: Arc<Limits>,
}

/// What a look at ring and queue has shown.
enum Found {
    Requests,
    Answers,
    Nothing,
}

struct Loop {
    // First: its completion must be gone before the executor's queue waits for what is in flight.
    waiting: Option<Completion>,
    ring: Option<Ring>,
    // What an earlier daemon took and did not answer.
    unanswered: Vec<u16>,
    rules: Rules,
    kick: Option<Kick>,
    // Kicks since there was a request.
    in_vain: u32,
    has_taken: bool,
    call: Option<Event>,
    err: Option<Event>,
    // None until somebody is to be told.
    bell: Option<Bell>,
    stopping: Option<mpsc::SyncSender<Answer>>,
    for_requests: Polling,
    for_answers: Polling,
    // When the driver was last given answers, if it has sent nothing since.
    answered_at: Option<Instant>,
    // When requests were last taken, if none has been answered since.
    taken_at: Option<Instant>,
    chain: RawChain,
    lane: Rc<EpochLane>,
    // Backups and jobs yield while it is at work. None if this is a backup itself.
    guest: Option<GuestQueue>,
    shared: Rc<Shared>,
    context: WorkerContext,
    inbox: mpsc::Receiver<(Command, mpsc::SyncSender<Answer>)>,
    executor: Executor,
}

impl Loop {
    fn new(
        context: WorkerContext,
        executor: Executor,
        inbox: mpsc::Receiver<(Command, mpsc::SyncSender<Answer>)>,
    ) -> Loop {
        let shared = Rc::new(Shared {
            name: context.name.clone(),
            attachment: context.attachment.clone(),
            queue: executor.queue().clone(),
            done: RefCell::new(Vec::new()),
            in_flight: Cell::new(0),
            pieces: Cell::new(0),
            limits: context.limits.clone(),
        });
        let rules = Rules { capacity_bytes: 0, features: 0, durable: true, read_only: true, serial: [0; 20] };
        Loop {
            waiting: None,
            ring: None,
            unanswered: Vec::new(),
            rules,
            kick: None,
            in_vain: 0,
            has_taken: false,
            call: None,
            err: None,
            bell: None,
            stopping: None,
            for_requests: Polling::new(LOOK_FOR_REQUESTS_MAX),
            for_answers: Polling::new(LOOK_FOR_ANSWERS_MAX),
            answered_at: None,
            taken_at: None,
            chain: RawChain::default(),
            lane: Rc::new(context.attachment.lane()),
            guest: context.attachment.guest_queue(),
            shared,
            context,
            inbox,
            executor,
        }
    }

    fn run(mut self) -> io::Result<()> {
        let mut more = false;
        loop {
            self.executor.turn(!more)?;
            while let Ok((command, reply)) = self.inbox.try_recv() {
                if matches!(command, Command::Exit) {
                    answer_to(&reply, Ok(0));
                    return Ok(());
                }
                self.obey(command, reply);
            }
            self.watch_kick();
            more = self.serve();
            self.finish_stop();
        }
    }

    fn obey(&mut self, command: Command, reply: mpsc::SyncSender<Answer>) {
        let answer = match command {
            Command::Start { setup, memory, base, inflight, kick, rules } => {
                match Ring::new(setup, memory, base, inflight) {
                    Ok((ring, unanswered)) => {
                        if !unanswered.is_empty() {
                            let what = format_args!(
                                "{}: {} requests in flight are run again",
                                self.context.name,
                                unanswered.len()
                            );
                            self.context.limits.mention(what);
                        }
                        self.ring = Some(ring);
                        self.unanswered = unanswered;
                        self.rules = *rules;
                        self.set_kick(Some(kick));
                        // An earlier daemon may have died between its last answer and the call that told of it.
                        if let Some(call) = &self.call {
                            signal(&mut self.bell, call);
                        }
                        Ok(0)
                    }
                    Err(fault) => Err(fault),
                }
            }
            Command::Stop => {
                self.set_kick(None);
                self.stopping = Some(reply);
                return;
            }
            Command::Memory(memory) => {
                if let Some(Err(fault)) = self.ring.as_mut().map(|r| r.remap(memory)) {
                    self.broken(&fault);
                }
                Ok(0)
            }
            Command::Kick(kick) => {
                self.set_kick(Some(kick));
                Ok(0)
            }
            Command::Call(call) => {
                self.call = call;
                self.let_go();
                // An answer may have gone out when there was nobody to tell.
                if let Some(call) = self.call.as_ref().filter(|_| self.ring.is_some()) {
                    signal(&mut self.bell, call);
                }
                Ok(0)
            }
            Command::Err(err) => {
                self.err = err;
                self.let_go();
                Ok(0)
            }
            Command::Exit => Ok(0),
        };
        answer_to(&reply, answer);
    }

    /// Has the bell keep no descriptor that the frontend may have taken back.
    fn let_go(&mut self) {
        if let Some(Err(e)) = self.bell.as_mut().map(Bell::forget) {
            log::debug!("{}: a descriptor is kept: {e}", self.context.name);
        }
    }

    fn set_kick(&mut self, kick: Option<Kick>) {
        if let Some(waiting) = &self.waiting {
            self.shared.queue.cancel(waiting);
        }
        // A wait that is being cancelled stays until it has ended: it must not eat a kick that is meant for somebody
        // else. watch_kick() begins the next one then.
        self.kick = kick;
    }

    /// Sees whether the driver kicked, and waits for the next kick.
    fn watch_kick(&mut self) {
        let mut rests = 0;
        if let Some(waiting) = self.waiting.as_mut() {
            let Poll::Ready(done) = Pin::new(waiting).poll(&mut Context::from_waker(Waker::noop())) else { return };
            self.waiting = None;
            match done.result {
                Ok(1..) => {
                    self.context.traffic.is_kicked.store(true, Ordering::Release);
                    self.in_vain = self.in_vain.saturating_add(1);
                    rests = (self.in_vain / IN_VAIN_MAX).min(RESTS_MAX);
                }
                // A kernel that does not wait for an eventfd with O_NONBLOCK: look at the ring from time to time.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => self.kick = self.kick.take().map(|_| Kick::Poll),
                Err(e) if matches!(e.raw_os_error(), Some(libc::ECANCELED | libc::ETIME | libc::EINTR)) => {}
                // A timer's own answer has no bytes.
                Ok(0) if matches!(self.kick, Some(Kick::Poll)) => {}
                other => {
                    let what = format_args!("{}: cannot wait for kicks ({other:?}); it is polled", self.context.name);
                    self.context.limits.complain(what);
                    self.kick = self.kick.take().map(|_| Kick::Poll);
                }
            }
        }
        self.waiting = match &self.kick {
            Some(Kick::Event(event)) if rests == 0 => Some(self.shared.queue.event(event.file())),
            Some(_) => Some(self.shared.queue.sleep(POLL_INTERVAL * rests.max(1))),
            None => None,
        };
    }

    /// Gives answers back and takes requests. Returns whether more is known to be in the ring.
    fn serve(&mut self) -> bool {
        self.flush();
        for _ in 0..PASSES_MAX {
            if self.stopping.is_some() || self.kick.is_none() {
                return false;
            }
            if self.shared.pieces.get() > PIECES_MAX {
                // There is more to do when some of them are done.
                return false;
            }
            self.rules.durable = self.context.durable.load(Ordering::Acquire);
            self.rules.capacity_bytes = self.context.attachment.geometry().size_bytes;
            if !self.begin_unanswered() {
                return false;
            }
            let Some(mut ring) = self.ring.take() else { return false };
            let started = Instant::now();
            let lane = self.lane.clone();
            ring.disarm();
            if ring.announces() {
                if let Some(since) = self.answered_at.take() {
                    self.for_requests.took(started.duration_since(since));
                }
                self.taken_at = Some(started);
            }
            let (mut told, mut read) = (false, 0);
            let taken = intake(&lane, &mut ring, |ring, head, ticket| {
                self.begin(ring, head, ticket, started);
                read += self.chain.steps();
                if read > PIECES_MAX || self.shared.pieces.get() > PIECES_MAX {
                    ring.pause();
                }
                if self.shared.done.borrow().len() >= ANSWERS_AT_ONCE {
                    self.answer(ring);
                    if !std::mem::replace(&mut told, true) {
                        self.tell(ring);
                    }
                }
            });
            if taken > 0 {
                if !std::mem::replace(&mut self.has_taken, true) {
                    self.context.traffic.is_taken.store(true, Ordering::Release);
                }
                self.in_vain = 0;
            }
            let fault = ring.take_fault();
            self.answer(&mut ring);
            self.tell(&mut ring);
            self.ring = Some(ring);
            if self.is_poisoned() {
                self.kick = None;
                (self.context.close)("the frontend's memory file was made smaller than its regions");
                return false;
            }
            if let Some(fault) = fault {
                self.broken(&fault);
                return false;
            }
            match self.look() {
                Found::Requests => {}
                Found::Answers => return true,
                Found::Nothing if self.ring.as_mut().is_some_and(Ring::arm) => {}
                Found::Nothing => return false,
            }
        }
        true
    }

    /// Looks for a while whether there is more to do, if that has been worth it lately.
    fn look(&mut self) -> Found {
        let Some(ring) = &self.ring else { return Found::Nothing };
        if ring.announces() {
            return Found::Requests;
        }
        let (in_flight, queue) = (self.shared.in_flight.get(), &self.shared.queue);
        if in_flight > IN_FLIGHT_LOOK_MAX {
            return Found::Nothing;
        }
        let (since, window) = match (self.answered_at, self.taken_at) {
            // The driver was just given something to do.
            (Some(at), _) => (at, self.for_requests.window()),
            (None, Some(at)) if in_flight > 0 => (at, self.for_answers.window()),
            _ => return Found::Nothing,
        };
        if window.is_zero() {
            return Found::Nothing;
        }
        queue.submit();
        loop {
            for _ in 0..8 {
                std::hint::spin_loop();
                if ring.announces() {
                    return Found::Requests;
                }
            }
            if in_flight > 0 && queue.has_answers() {
                return Found::Answers;
            }
            if since.elapsed() >= window {
                return Found::Nothing;
            }
        }
    }

    /// Starts again what an earlier daemon took and did not answer, in its order. Returns whether nothing of it is left;
    /// otherwise there is more to do when some of what is in flight is done.
    fn begin_unanswered(&mut self) -> bool {
        let Some(ring) = self.ring.take_if(|_| !self.unanswered.is_empty()) else { return true };
        let (lane, started) = (self.lane.clone(), Instant::now());
        let mut heads = std::mem::take(&mut self.unanswered).into_iter();
        while self.shared.pieces.get() <= PIECES_MAX
            && let Some(head) = heads.next()
        {
            self.begin(&ring, head, lane.enter(), started);
        }
        self.unanswered = heads.collect();
        self.ring = Some(ring);
        self.unanswered.is_empty()
    }

    /// Reads and validates one request, and starts it.
    fn begin(&mut self, ring: &Ring, head: u16, ticket: Ticket, started: Instant) {
        let memory = ring.memory().clone();
        let walked = self.chain.read(ring, head);
        let parsed = parse(&self.chain, walked, &memory, &self.rules);
        let mut direction = None;
        let (status, written, job) = match parsed {
            Ok(Parsed::Execute(job)) => {
                direction = Some(job.direction);
                (Status::Ok, job.written, Some(job))
            }
            Ok(Parsed::Answer(status, written)) => (status, written, None),
            Err(refusal) => {
                self.refused(head, &refusal);
                direction = direction_asked(&self.chain, &memory);
                (refusal.status(), 1, None)
            }
        };
        let mut done = Done {
            head,
            status_at: self.chain.status(),
            memory,
            status,
            written,
            direction,
            bytes: job.as_ref().map_or(0, |j| j.bytes),
            started,
            ticket,
        };
        let Some(job) = job else {
            self.shared.done.borrow_mut().push(done);
            return;
        };
        let reading = self.context.readers.as_ref().map(Readers::begin);
        if matches!(reading, Some(None)) {
            (done.status, done.written) = (Status::IoError, 1);
            return self.shared.done.borrow_mut().push(done);
        }
        if let Some(guest) = &self.guest {
            guest.begins();
        }
        let shared = self.shared.clone();
        let pieces = job.pieces + REQUEST_PIECES;
        shared.in_flight.set(shared.in_flight.get() + 1);
        shared.pieces.set(shared.pieces.get() + pieces);
        self.executor.spawn(async move {
            if !execute(&shared, &done.ticket, job).await {
                (done.status, done.written) = (Status::IoError, 1);
            }
            shared.pieces.set(shared.pieces.get() - pieces);
            drop(reading);
            shared.in_flight.set(shared.in_flight.get() - 1);
            shared.done.borrow_mut().push(done);
        });
    }

    fn refused(&self, head: u16, refusal: &Refusal) {
        let what = format_args!("{}: refused the request at descriptor {head}: {refusal}", self.context.name);
        self.context.limits.complain(what);
    }

    fn is_poisoned(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::is_poisoned)
    }

    /// Puts the known answers on the used ring: one index update, and at most one call.
    fn flush(&mut self) {
        let Some(mut ring) = self.ring.take() else {
            // Nobody to tell.
            let done = std::mem::take(&mut *self.shared.done.borrow_mut());
            if !done.is_empty() {
                self.pause(Instant::now());
            }
            return;
        };
        self.answer(&mut ring);
        self.tell(&mut ring);
        self.ring = Some(ring);
    }

    fn answer(&mut self, ring: &mut Ring) {
        let mut done = self.shared.done.borrow_mut();
        if done.is_empty() {
            return;
        }
        let now = Instant::now();
        self.pause(now);
        self.answered_at = Some(now);
        if let Some(since) = self.taken_at.take() {
            self.for_answers.took(now.duration_since(since));
        }
        for d in done.iter() {
            let told = d.status_at.is_some_and(|at| d.memory.copy_in(at, &[d.status as u8]));
            ring.push_used(d.head, if told { d.written } else { 0 });
            if let Some(direction) = d.direction {
                let (ok, latency) = (d.status == Status::Ok, now.duration_since(d.started));
                self.context.counters.record(direction, d.bytes, ok, latency);
                self.context.observer.request_done(self.context.queue, direction, d.bytes, ok, latency);
            }
        }
        ring.publish();
        // The tickets go here.
        done.clear();
    }

    /// The guest is not at work by this queue any more, if nothing is in flight.
    fn pause(&self, now: Instant) {
        if let Some(guest) = self.guest.as_ref().filter(|_| self.shared.in_flight.get() == 0) {
            guest.ends(now);
        }
    }

    /// Wakes the driver if it sleeps and there are answers that it has not been told of.
    fn tell(&mut self, ring: &mut Ring) {
        if ring.wants_call()
            && let Some(call) = &self.call
        {
            signal(&mut self.bell, call);
        }
    }

    fn broken(&mut self, fault: &RingFault) {
        self.context.limits.complain(format_args!("{}: the ring is broken and stops: {fault}", self.context.name));
        self.set_kick(None);
        if let Some(err) = &self.err {
            signal(&mut self.bell, err);
        }
    }

    fn finish_stop(&mut self) {
        // They are behind the base that is told, even if the ring is stopped before it was served.
        if self.stopping.is_some() && !self.begin_unanswered() {
            return;
        }
        let drains = self.shared.in_flight.get() > 0;
        if drains || self.waiting.is_some() || self.stopping.is_none() {
            return;
        }
        self.flush();
        let base = self.ring.take().map_or(0, |mut ring| {
            // Whoever serves the ring next finds a driver that kicks.
            ring.arm();
            ring.base()
        });
        if let Some(reply) = self.stopping.take() {
            answer_to(&reply, Ok(base));
        }
    }
}

/// Tells the frontend, whatever it does with the descriptor meanwhile.
fn signal(bell: &mut Option<Bell>, event: &Event) {
    if let Err(e) = event.signal(bell) {
        log::debug!("cannot signal the frontend: {e}");
    }
}

fn answer_to(reply: &mpsc::SyncSender<Answer>, answer: Answer) {
    if reply.send(answer).is_err() {
        log::debug!("a session ended before its queue had answered");
    }
}

/// Executes all parts of a request, in order. Returns whether all succeeded.
async fn execute(shared: &Shared, ticket: &Ticket, job: Job) -> bool {
    let mut failed = shared.attachment.execute(&shared.queue, ticket, job.first).await.err();
    for part in job.rest {
        if failed.is_some() {
            break;
        }
        failed = shared.attachment.execute(&shared.queue, ticket, part).await.err();
    }
    if let Some(e) = &failed {
        shared.limits.complain(format_args!("{}: a {} request failed: {e}", shared.name, job.direction.name()));
    }
    failed.is_none()
}
