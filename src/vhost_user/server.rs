//! A socket and the frontends that connect to it.
//!
//! What always holds:
//! - At most [`ServeOptions::frontends_max`] frontends have running rings ([`Places`]); each has its own thread, state and
//!   connection to the disk. A frontend that comes when all places are taken is refused with a log line; one that comes
//!   while an old one is hanging up gets its turn. Some more may be connected that have not started yet.
//! - Who connects gets a session with its first message. Who says nothing is not counted, and in nobody's way.
//! - After [`ServerHandle::stop`] every request is done, no thread is left, and the socket is gone.
//! - A frontend gets a session at the door and nowhere else. Who holds it ([`Server::hold`]), finds nobody connected and says
//!   that the server stops ([`Server::begin_to_stop`]) cuts nobody off.
//! - Counters outlive connections, and sessions share those of a queue.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Observer;
use super::features::{Hints, QUEUES_MAX};
use super::limits::Limits;
use super::message::Backchannel;
use super::places::has_hung_up;
use super::request::SERIAL_BYTES;
use super::seat::{Offer, Seat, SessionContext, Shared};
use super::session;
use super::socket::BoundSocket;
use super::stats::{QueueCounters, QueueStats};
use crate::engine::Attachment;

/// The most frontends that one socket may be asked to serve at once. Each may have a thread and an io_uring for each
/// queue, and some hundred mappings.
pub const FRONTENDS_MAX: usize = 16;
/// How many may be connected beside those that have places. One more, and the first that has none makes room.
const WITHOUT_PLACE_MAX: usize = 16;
/// How long a message that is being handled may take to end by itself when the server stops.
const STOP_PATIENCE: Duration = Duration::from_secs(1);
/// How often who abandons a server looks whether its requests are done.
const ABANDON_LOOK: Duration = Duration::from_millis(1);
/// How long to leave the socket alone when the system has no descriptors left.
const PAUSE_MS: i32 = 100;
/// How long a frontend waits for one of too many others to end.
const ROOM_WAIT: Duration = Duration::from_secs(2);

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
    /// What drivers are told.
    pub hints: Hints,
    /// Who is told.
    pub observer: Arc<dyn Observer>,
    /// Whether to end when the first frontend has left, and nobody else is connected.
    pub once: bool,
}

impl Offer {
    fn first(options: &ServeOptions) -> Offer {
        let ServeOptions { name, queues, serial, hints, .. } = options;
        Offer { name: name.clone(), queues: *queues, serial: serial.clone(), read_only: false, hints: *hints }
    }
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

    /// Ends the serving of something that is only read, without hanging up on its readers: the socket goes, and when this
    /// returns no request is in flight; each that comes is answered with an error. It ends when the last reader has left.
    fn abandon(&self);

    /// How many frontends are connected.
    fn frontends(&self) -> usize;

    /// The processes of those that are connected, as far as the system tells.
    fn frontend_pids(&self) -> Vec<u32>;

    /// Tells those that are connected, and can be told, that the config space has changed. Waits for nobody.
    fn config_changed(&self);

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
    let context = SessionContext {
        name,
        attachment,
        serial,
        counters,
        read_only: false,
        hints: Hints::default(),
        number: None,
        observer,
        limits,
    };
    let place = bound.as_ref().and_then(BoundSocket::name);
    let shared = Arc::new(Shared::new(offer, place, frontends_max)?);
    let mut server = Acceptor::new(shared.clone(), context, bound, once)?;
    let ended = Ended(shared.clone());
    let thread = std::thread::Builder::new().name(name_of_thread).spawn(move || {
        // Moved in, so that waiters are told even if the thread panics.
        let _ended = ended;
        if let Some(stream) = first {
            server.start(stream);
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

    fn abandon(&self) {
        self.shared.readers.go();
        self.shared.wake();
        while !self.shared.readers.are_done() {
            std::thread::sleep(ABANDON_LOOK);
        }
    }

    fn frontends(&self) -> usize {
        self.shared.connected().len()
    }

    fn frontend_pids(&self) -> Vec<u32> {
        self.shared.connected().iter().filter_map(|frontend| frontend.pid).collect()
    }

    fn config_changed(&self) {
        let connected = self.shared.connected();
        connected.iter().filter_map(|frontend| frontend.backchannel.as_ref()).for_each(Backchannel::tell_of_change);
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

/// Tells waiters that the server has ended.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        *self.0.ended.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.ended.1.notify_all();
    }
}

/// Somebody who has connected.
struct Connection {
    id: u64,
    stream: Arc<UnixStream>,
    thread: JoinHandle<()>,
    has_spoken: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
}

impl Connection {
    fn is_leaving(&self) -> bool {
        self.done.load(Ordering::Acquire) || has_hung_up(&self.stream)
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
    once: bool,
    epoll: OwnedFd,
    active: Vec<Connection>,
    // A frontend that waits for one that is hanging up; those behind it stay in the socket's backlog.
    waiting: Option<(UnixStream, Instant)>,
    // How many have come, and whether any of those that have left had said something.
    came: u64,
    has_served: bool,
}

impl Acceptor {
    fn new(
        shared: Arc<Shared>,
        context: SessionContext,
        socket: Option<BoundSocket>,
        once: bool,
    ) -> io::Result<Acceptor> {
        let raw = epoll::create(true)?;
        // SAFETY: epoll::create gave a new descriptor that nobody else owns.
        let epoll: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) };
        let server = Acceptor {
            shared,
            context,
            socket,
            once,
            epoll,
            active: Vec::new(),
            waiting: None,
            came: 0,
            has_served: false,
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
            if self.shared.readers.is_gone() {
                self.close();
            }
            let is_over = (self.once && self.has_served) || self.socket.is_none();
            if is_over && self.active.is_empty() {
                return Ok(());
            }
            if let Some((stream, came)) = self.waiting.take() {
                self.admit(stream, came);
            }
            // Whom the one that waits made room for may not go.
            timeout_ms = if self.accept_all() && self.waiting.is_none() { -1 } else { PAUSE_MS };
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
                Ok((stream, _)) => self.admit(stream, Instant::now()),
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

    fn admit(&mut self, stream: UnixStream, came: Instant) {
        self.reap();
        let places = self.shared.places.clone();
        if places.are_taken() {
            let pids =
                self.shared.connected().iter().filter_map(|f| f.pid).map(|pid| pid.to_string()).collect::<Vec<_>>();
            let by = if pids.is_empty() { String::new() } else { format!(" (process {})", pids.join(", ")) };
            match places.most() {
                1 => self.complain(format_args!("refused a frontend: another one is connected{by}")),
                all => self.complain(format_args!("refused a frontend: {all} others are connected{by}")),
            }
        } else if self.active.iter().any(|c| c.is_leaving() && places.are_held_by(c.id)) {
            self.waiting = Some((stream, came));
        } else if self.active.len() < places.most() + WITHOUT_PLACE_MAX {
            self.start(stream);
        } else {
            // Those that wait longest without having started anything.
            let mut idle = self.active.iter().filter(|c| !places.are_held_by(c.id) && !c.is_leaving());
            if let Some(first) = idle.clone().find(|c| !c.has_spoken.load(Ordering::Acquire)).or_else(|| idle.next()) {
                self.complain(format_args!("closed a connection that has started nothing: too many others wait"));
                first.shut(std::net::Shutdown::Both);
                self.waiting = Some((stream, came));
            } else if came.elapsed() < ROOM_WAIT {
                self.waiting = Some((stream, came));
            } else {
                self.complain(format_args!(
                    "refused a frontend: too many others have hung up and do not come to an end"
                ));
            }
        }
    }

    fn complain(&self, what: std::fmt::Arguments<'_>) {
        self.context.limits.complain(format_args!("{}: {what}", self.context.name));
    }

    fn start(&mut self, stream: UnixStream) {
        self.came += 1;
        let mut context = self.context.clone();
        if self.shared.places.most() > 1 {
            // Several may have something to complain about.
            context.number = Some(self.came);
        }
        let started = stream.set_nonblocking(false).and_then(|()| stream.try_clone()).and_then(|clone| {
            let stream = Arc::new(stream);
            let seat = Seat::new(self.came, &self.shared, &stream, &context.observer);
            let (has_spoken, done) = (seat.has_spoken.clone(), seat.done.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vu-{}", self.context.name))
                .spawn(move || session::run(context, clone, &seat))?;
            Ok(Connection { id: self.came, stream, thread, has_spoken, done })
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
            self.has_served |= connection.has_spoken.load(Ordering::Acquire);
            if connection.thread.join().is_err() {
                log::error!("{}: a session panicked", self.context.name);
            }
        }
    }

    /// Lets nobody in any more.
    fn close(&mut self) {
        (self.socket, self.waiting) = (None, None);
        self.shared.readers.close();
    }

    /// Ends all sessions, as gently as they let us.
    fn finish(&mut self) {
        self.close();
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
