//! A socket and the frontends that connect to it.
//!
//! What always holds:
//! - At most [`ServeOptions::frontends_max`] sessions run; each has its own thread, state and connection to the disk. A
//!   frontend that comes when all places are taken is refused with a log line; one that comes while an old one is
//!   hanging up gets its turn.
//! - After [`ServerHandle::stop`] every request is done, no thread is left, and the socket is gone.
//! - A frontend gets a session at the door and nowhere else. Who holds it ([`Server::hold`]), finds nobody connected and says
//!   that the server stops ([`Server::begin_to_stop`]) cuts nobody off.
//! - Counters outlive connections, and sessions share those of a queue.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Observer;
use super::features::QUEUES_MAX;
use super::limits::Limits;
use super::request::SERIAL_BYTES;
use super::session::{self, SessionContext};
use super::socket::{BoundSocket, SocketName};
use super::stats::{QueueCounters, QueueStats};
use crate::engine::Attachment;

/// The most frontends that one socket may be asked to serve at once. Each may have a thread and an io_uring for each
/// queue, and some hundred mappings.
pub const FRONTENDS_MAX: usize = 16;
/// How long a message that is being handled may take to end by itself when the server stops.
const STOP_PATIENCE: Duration = Duration::from_secs(1);
/// How long to leave the socket alone when the system has no descriptors left.
const PAUSE_MS: i32 = 100;

/// Where frontends come from.
#[derive(Debug)]
pub enum SocketSource {
    /// A socket to be made at this path, mode 0600, and removed at the end.
    Path(PathBuf),
    /// A socket that somebody else made: listening, or connected to its only frontend.
    Fd(OwnedFd),
}

/// What to serve, and where.
pub struct ServeOptions {
    /// The disk's name, for the log.
    pub name: String,
    /// Where frontends connect.
    pub socket: SocketSource,
    /// What they get.
    pub attachment: Attachment,
    /// How many queues they may use: 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// The serial number that the guest can ask for; up to 20 bytes, longer ones are cut.
    pub serial: String,
    /// How many frontends may be connected at once: 1, or up to [`FRONTENDS_MAX`] if they know of each other.
    pub frontends_max: usize,
    /// Who is told.
    pub observer: Arc<dyn Observer>,
    /// Whether to end when the first frontend has left, and nobody else is connected.
    pub once: bool,
}

/// What the next frontends get that connect; those that are connected keep what they have.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The disk's name, for the log.
    pub name: String,
    /// How many queues they may use: 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// The serial number that the guest can ask for; up to 20 bytes, longer ones are cut.
    pub serial: String,
    /// Whether they may only read.
    pub read_only: bool,
}

impl Offer {
    fn first(options: &ServeOptions) -> Offer {
        Offer { name: options.name.clone(), queues: options.queues, serial: options.serial.clone(), read_only: false }
    }
}

struct Shared {
    stop: AtomicBool,
    connected: AtomicUsize,
    wake: OwnedFd,
    offer: Mutex<Offer>,
    /// None for a socket that somebody else made.
    place: Option<Arc<SocketName>>,
    /// As many as any frontend was ever offered.
    counters: Mutex<Vec<Arc<QueueCounters>>>,
    ended: (Mutex<bool>, Condvar),
    /// Held while a frontend gets its session, or while none is to get one.
    door: Mutex<()>,
}

/// A socket that is being served.
pub trait Server: Send + Sync {
    /// Finishes all requests, closes the connections and removes the socket. Waits for requests however long they take.
    /// Dropping the server does the same.
    fn stop(&self);

    /// Keeps frontends that come from getting a session until this is dropped: they wait. Those that have one are counted by
    /// then.
    fn hold(&self) -> MutexGuard<'_, ()>;

    /// Serves nobody who comes from now on, also who waits at a door that is held. Waits for nothing; [`Server::stop`] does.
    fn begin_to_stop(&self);

    /// How many frontends are connected.
    fn frontends(&self) -> usize;

    /// What was done since the server began, all queues and connections together.
    fn stats(&self) -> QueueStats;

    /// The same for each queue.
    fn queue_stats(&self) -> Vec<QueueStats>;

    /// Offers something else to the frontends that connect from now on. Queues beyond [`QUEUES_MAX`] are not.
    fn offer(&self, offer: Offer);

    /// Moves the socket, unless somebody else made it. Who is connected stays connected.
    ///
    /// # Errors
    /// When something else is at `to`, or the system refuses: it is where it was then.
    fn move_socket(&self, to: &Path) -> io::Result<()>;

    /// Says in the log of the next frontends what the disk is called now.
    fn rename(&self, name: String);
}

/// A socket of this machine that is being served. Dropping it stops the server.
pub struct ServerHandle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerHandle").field("connected", &self.is_connected()).finish_non_exhaustive()
    }
}

/// Serves a socket on threads of its own.
///
/// # Errors
/// When the options make no sense, or the socket cannot be had: something else is at its path, or a live process
/// listens there.
pub fn serve(options: ServeOptions) -> io::Result<ServerHandle> {
    check(&options)?;
    let offer = Offer::first(&options);
    let ServeOptions { name, socket, attachment, frontends_max, observer, once, .. } = options;
    let (bound, first) = open(socket)?;
    // What is offered is put in when a frontend comes.
    let (serial, counters) = ([0; SERIAL_BYTES], Vec::new());
    let (name_of_thread, limits) = (format!("serve-{name}"), Limits::new());
    let context = SessionContext { name, attachment, serial, counters, read_only: false, observer, limits };
    let place = bound.as_ref().and_then(BoundSocket::name);
    let shared = Arc::new(Shared::new(offer, place, usize::from(first.is_some()))?);
    let once = once || bound.is_none();
    let mut server = Acceptor::new(shared.clone(), context, bound, frontends_max, once)?;
    let ended = Ended(shared.clone());
    let thread = std::thread::Builder::new().name(name_of_thread).spawn(move || {
        // Moved in, so that waiters are told even if the thread panics.
        let _ended = ended;
        if let Some(stream) = first {
            server.start(stream);
            // It was counted before it had a session of its own.
            server.shared.connected.fetch_sub(1, Ordering::AcqRel);
        }
        if let Err(e) = server.run() {
            log::error!("{}: the socket cannot be served any more: {e}", server.context.name);
        }
        server.finish();
    })?;
    Ok(ServerHandle { shared, thread: Mutex::new(Some(thread)) })
}

fn check(options: &ServeOptions) -> io::Result<()> {
    let (queues, frontends_max) = (options.queues, options.frontends_max);
    if frontends_max == 0 || frontends_max > FRONTENDS_MAX {
        let what = format!("{frontends_max} frontends were asked for; a socket serves 1 to {FRONTENDS_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    if queues == 0 || queues > QUEUES_MAX {
        let what = format!("{queues} queues were asked for; a disk has 1 to {QUEUES_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    Ok(())
}

fn open(source: SocketSource) -> io::Result<(Option<BoundSocket>, Option<UnixStream>)> {
    match source {
        SocketSource::Path(path) => Ok((Some(BoundSocket::bind(&path)?), None)),
        SocketSource::Fd(fd) => {
            if rustix::net::sockopt::socket_acceptconn(&fd)? {
                return Ok((Some(BoundSocket::adopt(fd)?), None));
            }
            let stream = UnixStream::from(fd);
            stream.peer_addr()?;
            stream.set_nonblocking(false)?;
            Ok((None, Some(stream)))
        }
    }
}

impl ServerHandle {
    /// Waits until the server has ended: by [`ServerHandle::stop`], or because its only frontend has left.
    pub fn wait(&self) {
        let (mutex, condvar) = &self.shared.ended;
        let mut ended = mutex.lock().unwrap_or_else(PoisonError::into_inner);
        while !*ended {
            ended = condvar.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the server has ended.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        *self.shared.ended.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a frontend is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.frontends() > 0
    }
}

impl Server for ServerHandle {
    fn stop(&self) {
        self.begin_to_stop();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        match thread.map(JoinHandle::join) {
            Some(Err(_)) => log::error!("a server's thread panicked"),
            Some(Ok(())) => {}
            // Somebody else is stopping it.
            None => self.wait(),
        }
    }

    fn hold(&self) -> MutexGuard<'_, ()> {
        self.shared.door.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_to_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
    }

    fn frontends(&self) -> usize {
        self.shared.connected.load(Ordering::Acquire)
    }

    fn stats(&self) -> QueueStats {
        let mut total = QueueStats::default();
        self.shared.counters().iter().for_each(|c| c.add_to(&mut total));
        total
    }

    fn offer(&self, offer: Offer) {
        let offer = Offer { queues: offer.queues.clamp(1, QUEUES_MAX), ..offer };
        *self.shared.offer.lock().unwrap_or_else(PoisonError::into_inner) = offer;
    }

    fn move_socket(&self, to: &Path) -> io::Result<()> {
        self.shared.place.as_ref().map_or(Ok(()), |place| place.move_to(to))
    }

    fn rename(&self, name: String) {
        self.shared.offer.lock().unwrap_or_else(PoisonError::into_inner).name = name;
    }

    fn queue_stats(&self) -> Vec<QueueStats> {
        let one = |c: &Arc<QueueCounters>| {
            let mut stats = QueueStats::default();
            c.add_to(&mut stats);
            stats
        };
        self.shared.counters().iter().map(one).collect()
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn new(offer: Offer, place: Option<Arc<SocketName>>, connected: usize) -> io::Result<Shared> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Shared {
            stop: AtomicBool::new(false),
            connected: AtomicUsize::new(connected),
            wake: rustix::event::eventfd(0, flags)?,
            offer: Mutex::new(offer),
            place,
            counters: Mutex::default(),
            ended: (Mutex::new(false), Condvar::new()),
            door: Mutex::new(()),
        })
    }

    fn counters(&self) -> MutexGuard<'_, Vec<Arc<QueueCounters>>> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a frontend what is offered now.
    fn make_offer(&self, context: &mut SessionContext) {
        let offer = self.offer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let len = offer.serial.len().min(SERIAL_BYTES);
        context.name = offer.name;
        context.serial = [0; SERIAL_BYTES];
        context.serial[..len].copy_from_slice(&offer.serial.as_bytes()[..len]);
        context.read_only = offer.read_only;
        let queues = usize::from(offer.queues);
        let mut counters = self.counters();
        if counters.len() < queues {
            counters.resize_with(queues, Arc::default);
        }
        context.counters = counters[..queues].to_vec();
    }

    fn wake(&self) {
        if let Err(e) = rustix::io::write(&self.wake, &1u64.to_ne_bytes())
            && e != rustix::io::Errno::AGAIN
        {
            log::error!("cannot wake a server: {e}");
        }
    }
}

/// Tells waiters that the server has ended.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        *self.0.ended.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.ended.1.notify_all();
    }
}

/// One frontend's session.
struct Connection {
    stream: UnixStream,
    thread: JoinHandle<()>,
    done: Arc<AtomicBool>,
}

impl Connection {
    /// Whether the frontend has hung up or its session is over.
    fn is_leaving(&self) -> bool {
        let mut poll = [rustix::event::PollFd::new(&self.stream, rustix::event::PollFlags::RDHUP)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        self.done.load(Ordering::Acquire) || !matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(0))
    }

    fn shut(&self, how: std::net::Shutdown) {
        if let Err(e) = self.stream.shutdown(how) {
            log::debug!("the connection was closed already: {e}");
        }
    }
}

struct Acceptor {
    shared: Arc<Shared>,
    context: SessionContext,
    socket: Option<BoundSocket>,
    frontends_max: usize,
    once: bool,
    epoll: OwnedFd,
    active: Vec<Connection>,
    // A frontend that waits for one that is hanging up; those behind it stay in the socket's backlog.
    waiting: Option<UnixStream>,
    served: usize,
}

impl Acceptor {
    fn new(
        shared: Arc<Shared>,
        context: SessionContext,
        socket: Option<BoundSocket>,
        frontends_max: usize,
        once: bool,
    ) -> io::Result<Acceptor> {
        let raw = epoll::create(true)?;
        // SAFETY: epoll::create gave a new descriptor that nobody else owns.
        let epoll: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) };
        let server = Acceptor {
            shared,
            context,
            socket,
            frontends_max,
            once,
            epoll,
            active: Vec::new(),
            waiting: None,
            served: 0,
        };
        server.watch(server.shared.wake.as_raw_fd())?;
        if let Some(socket) = &server.socket {
            server.watch(socket.listener.as_raw_fd())?;
        }
        Ok(server)
    }

    fn watch(&self, fd: RawFd) -> io::Result<()> {
        // Edge-triggered: a connection that we leave in the backlog for now must not keep us awake.
        let event = epoll::Event::new(epoll::Events::EPOLLIN | epoll::Events::EPOLLET, u64::from(fd.unsigned_abs()));
        epoll::ctl(self.epoll.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_ADD, fd, event)
    }

    fn run(&mut self) -> io::Result<()> {
        let mut timeout_ms = -1;
        loop {
            self.sleep(timeout_ms)?;
            self.reap();
            if self.shared.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            if self.once && self.served > 0 && self.active.is_empty() {
                return Ok(());
            }
            if self.active.len() < self.frontends_max
                && let Some(stream) = self.waiting.take()
            {
                self.start(stream);
            }
            timeout_ms = if self.accept_all() { -1 } else { PAUSE_MS };
        }
    }

    fn sleep(&self, timeout_ms: i32) -> io::Result<()> {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 4];
        match epoll::wait(self.epoll.as_raw_fd(), timeout_ms, &mut events) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
            _ => {}
        }
        let mut count = [0u8; 8];
        match rustix::io::read(&self.shared.wake, &mut count) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes what wants to connect. False when the system would not let us, so that we must come again.
    fn accept_all(&mut self) -> bool {
        while let Some(socket) = self.socket.as_ref().filter(|_| self.waiting.is_none()) {
            match socket.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
                Err(e) => {
                    // No descriptors left, most likely. The connection stays in the backlog.
                    self.complain(format_args!("cannot accept a connection: {e}"));
                    return false;
                }
            }
        }
        true
    }

    fn admit(&mut self, stream: UnixStream) {
        self.reap();
        if self.active.len() < self.frontends_max {
            self.start(stream);
        } else if self.active.iter().any(Connection::is_leaving) {
            self.waiting = Some(stream);
        } else {
            match self.frontends_max {
                1 => self.complain(format_args!("refused a frontend: another one is connected")),
                all => self.complain(format_args!("refused a frontend: {all} others are connected")),
            }
        }
    }

    fn complain(&self, what: std::fmt::Arguments<'_>) {
        self.context.limits.complain(format_args!("{}: {what}", self.context.name));
    }

    fn start(&mut self, stream: UnixStream) {
        let shared = self.shared.clone();
        let _door = shared.door.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.stop.load(Ordering::Acquire) {
            // Whoever held the door has found that nobody is here.
            return;
        }
        self.served += 1;
        let mut context = self.context.clone();
        self.shared.make_offer(&mut context);
        if self.frontends_max > 1 {
            // Several may have something to complain about.
            context.name = format!("{} frontend {}", context.name, self.served);
        }
        let started = stream.set_nonblocking(false).and_then(|()| stream.try_clone()).and_then(|clone| {
            let guard = SessionGuard::new(&self.shared, &context.observer);
            let done = guard.done.clone();
            let thread = std::thread::Builder::new().name(format!("vu-{}", self.context.name)).spawn(move || {
                session::run(context, clone, &guard.shared.stop);
                drop(guard);
            })?;
            Ok(Connection { stream, thread, done })
        });
        match started {
            Ok(connection) => self.active.push(connection),
            Err(e) => {
                self.complain(format_args!("cannot serve a connection: {e}"));
                // It may have been the only one that this server was for.
                self.shared.wake();
            }
        }
    }

    fn reap(&mut self) {
        let over = |c: &mut Connection| c.done.load(Ordering::Acquire);
        for connection in self.active.extract_if(.., over) {
            if connection.thread.join().is_err() {
                log::error!("{}: a session panicked", self.context.name);
            }
        }
    }

    /// Ends all sessions, as gently as they let us.
    fn finish(&mut self) {
        self.socket = None;
        self.waiting = None;
        // No further message is read, but the answer to one that is being handled still goes out.
        self.active.iter().for_each(|c| c.shut(std::net::Shutdown::Read));
        let patience = Instant::now() + STOP_PATIENCE;
        let mut forced = false;
        while !self.active.is_empty() {
            if !forced && Instant::now() >= patience {
                forced = true;
                self.active.iter().for_each(|c| c.shut(std::net::Shutdown::Both));
            }
            if let Err(e) = self.sleep(PAUSE_MS) {
                log::error!("{}: cannot wait for the end of a session: {e}", self.context.name);
                std::thread::sleep(STOP_PATIENCE);
            }
            self.reap();
        }
    }
}

/// Says that a session begins, and that it is over, however it ended.
struct SessionGuard {
    shared: Arc<Shared>,
    observer: Arc<dyn Observer>,
    done: Arc<AtomicBool>,
}

impl SessionGuard {
    fn new(shared: &Arc<Shared>, observer: &Arc<dyn Observer>) -> SessionGuard {
        shared.connected.fetch_add(1, Ordering::AcqRel);
        observer.connected();
        let (shared, observer) = (shared.clone(), observer.clone());
        SessionGuard { shared, observer, done: Arc::new(AtomicBool::new(false)) }
    }
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.shared.connected.fetch_sub(1, Ordering::AcqRel);
        self.observer.disconnected();
        self.done.store(true, Ordering::Release);
        self.shared.wake();
    }
}
