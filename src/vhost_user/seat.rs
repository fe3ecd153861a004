//! What a connection has of its server: what is offered to it, its place, and that it is counted.
//!
//! What always holds: a frontend is counted from its first message until its connection has ended, however it ends, and
//! enters through the door of the server, so that who holds that door finds nobody who is not counted.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Observer;
use super::features::Hints;
use super::limits::Limits;
use super::message::Backchannel;
use super::places::{Place, Places};
use super::request::SERIAL_BYTES;
use super::socket::SocketName;
use super::stats::QueueCounters;
use crate::engine::Attachment;

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
    /// What their drivers are told.
    pub hints: Hints,
}

/// What a session serves.
#[derive(Clone)]
pub(super) struct SessionContext {
    pub(super) name: String,
    pub(super) attachment: Attachment,
    pub(super) serial: [u8; SERIAL_BYTES],
    /// One for each queue.
    pub(super) counters: Vec<Arc<QueueCounters>>,
    /// Whether the frontend may only read, also what could be written.
    pub(super) read_only: bool,
    /// What the driver is told.
    pub(super) hints: Hints,
    /// Which of several frontends it is, for the log.
    pub(super) number: Option<u64>,
    pub(super) observer: Arc<dyn Observer>,
    /// What all frontends of the socket may take.
    pub(super) limits: Arc<Limits>,
}

impl SessionContext {
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only || self.attachment.is_read_only()
    }
}

/// What a server shares with its connections.
pub(super) struct Shared {
    pub(super) stop: AtomicBool,
    pub(super) places: Arc<Places>,
    pub(super) readers: Arc<Readers>,
    /// Those that have said something.
    pub(super) connected: Mutex<Vec<Frontend>>,
    pub(super) wake: OwnedFd,
    pub(super) offer: Mutex<Offer>,
    /// None for a socket that somebody else made.
    pub(super) place: Option<Arc<SocketName>>,
    /// As many as any frontend was ever offered.
    pub(super) counters: Mutex<Vec<Arc<QueueCounters>>>,
    pub(super) ended: (Mutex<bool>, Condvar),
    /// Held while a frontend gets its session, or while none is to get one.
    pub(super) door: Mutex<()>,
}

/// The readers of something that never changes. It can go while they are connected: each request is answered with an error
/// from then on, since a guest whose disk hangs up waits for it for ever.
#[derive(Debug, Default)]
pub(super) struct Readers {
    is_gone: AtomicBool,
    is_closed: AtomicBool,
    in_flight: AtomicUsize,
}

impl Readers {
    /// Begins a request, which ends when the answer is dropped. None when there is nothing to be read any more.
    pub(super) fn begin(self: &Arc<Self>) -> Option<Reading> {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        let reading = Reading(self.clone());
        (!self.is_gone.load(Ordering::SeqCst)).then_some(reading)
    }

    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::SeqCst)
    }

    /// Lets no request begin any more.
    pub(super) fn go(&self) {
        self.is_gone.store(true, Ordering::SeqCst);
    }

    /// Nobody can connect any more.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }

    /// Whether nobody can connect, and no request is in flight.
    pub(super) fn are_done(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst) && self.in_flight.load(Ordering::SeqCst) == 0
    }
}

/// A request of a reader, however it ends.
pub(super) struct Reading(Arc<Readers>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A frontend that has said something.
pub(super) struct Frontend {
    pub(super) connection: u64,
    pub(super) pid: Option<u32>,
    pub(super) backchannel: Option<Backchannel>,
}

impl Shared {
    pub(super) fn new(offer: Offer, place: Option<Arc<SocketName>>, frontends_max: usize) -> io::Result<Shared> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Shared {
            stop: AtomicBool::new(false),
            places: Places::new(frontends_max),
            readers: Arc::default(),
            connected: Mutex::default(),
            wake: rustix::event::eventfd(0, flags)?,
            offer: Mutex::new(offer),
            place,
            counters: Mutex::default(),
            ended: (Mutex::new(false), Condvar::new()),
            door: Mutex::new(()),
        })
    }

    pub(super) fn counters(&self) -> MutexGuard<'_, Vec<Arc<QueueCounters>>> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connected(&self) -> MutexGuard<'_, Vec<Frontend>> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a frontend what is offered now.
    pub(super) fn make_offer(&self, context: &mut SessionContext) {
        let offer = self.offer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let len = offer.serial.len().min(SERIAL_BYTES);
        context.name = match context.number {
            Some(number) => format!("{} frontend {number}", offer.name),
            None => offer.name,
        };
        context.serial = [0; SERIAL_BYTES];
        context.serial[..len].copy_from_slice(&offer.serial.as_bytes()[..len]);
        context.read_only = offer.read_only;
        context.hints = offer.hints;
        let queues = usize::from(offer.queues);
        let mut counters = self.counters();
        if counters.len() < queues {
            counters.resize_with(queues, Arc::default);
        }
        context.counters = counters[..queues].to_vec();
    }

    pub(super) fn wake(&self) {
        if let Err(e) = rustix::io::write(&self.wake, &1u64.to_ne_bytes())
            && e != rustix::io::Errno::AGAIN
        {
            log::error!("cannot wake a server: {e}");
        }
    }
}

/// What a connection has of its server. When it is dropped, the connection is over, however that came.
pub(super) struct Seat {
    id: u64,
    shared: Arc<Shared>,
    stream: Arc<UnixStream>,
    observer: Arc<dyn Observer>,
    pub(super) has_spoken: Arc<AtomicBool>,
    pub(super) done: Arc<AtomicBool>,
}

impl Seat {
    pub(super) fn new(id: u64, shared: &Arc<Shared>, stream: &Arc<UnixStream>, observer: &Arc<dyn Observer>) -> Seat {
        let (shared, stream, observer) = (shared.clone(), stream.clone(), observer.clone());
        Seat { id, shared, stream, observer, has_spoken: Arc::default(), done: Arc::default() }
    }

    /// The frontend has said something: it is counted, and gets what is offered now. False when the server stops.
    pub(super) fn enter(&self, context: &mut SessionContext) -> bool {
        let _door = self.shared.door.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_stopping() {
            // Whoever held the door has found that nobody is here.
            return false;
        }
        self.shared.make_offer(context);
        let pid = rustix::net::sockopt::socket_peercred(&*self.stream).ok();
        let pid = pid.and_then(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()).ok());
        self.shared.connected().push(Frontend { connection: self.id, pid, backchannel: None });
        self.has_spoken.store(true, Ordering::Release);
        self.observer.connected();
        true
    }

    /// A place for running rings. None when others have them all.
    pub(super) fn take_place(&self) -> Option<Place> {
        self.shared.places.take(self.id, &self.stream, &self.shared.stop)
    }

    /// Where the frontend is told what it did not ask for.
    pub(super) fn set_backchannel(&self, backchannel: Backchannel) {
        if let Some(frontend) = self.shared.connected().iter_mut().find(|f| f.connection == self.id) {
            frontend.backchannel = Some(backchannel);
        }
    }

    /// Tells the frontend, if it can be told, that the config space has changed.
    pub(super) fn tell_of_change(&self) {
        let connected = self.shared.connected();
        let mut own = connected.iter().filter(|f| f.connection == self.id);
        own.find_map(|f| f.backchannel.as_ref()).into_iter().for_each(Backchannel::tell_of_change);
    }

    /// Offers no more segments than these to the frontends that come next.
    pub(super) fn offer_segments(&self, segments: u16) {
        let hints = &mut self.shared.offer.lock().unwrap_or_else(PoisonError::into_inner).hints;
        hints.segments = hints.segments.min(segments);
    }

    /// Those who read what it reads.
    pub(super) fn readers(&self) -> &Arc<Readers> {
        &self.shared.readers
    }

    /// The connection.
    pub(super) fn stream(&self) -> &Arc<UnixStream> {
        &self.stream
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.connected().retain(|f| f.connection != self.id);
        if self.has_spoken.load(Ordering::Acquire) {
            self.observer.disconnected();
        }
        self.done.store(true, Ordering::Release);
        self.shared.wake();
    }
}
