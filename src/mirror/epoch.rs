//! The epoch counter of the daemon and who is inside which epoch.
//!
//! What always holds (the rules of the cut, sources 002 [0045], [0051]; figure 4):
//! 1. A worker loads the avail index first (acquire), then enters ([`EpochLane::enter`]).
//! 2. Entering counts the worker into the epoch it read, fences, and reads the counter again; if it moved, the
//!    worker leaves and tries again. So nobody can slip into an epoch after it was found empty.
//! 3. There is one counter, moved once for a whole group of disks.
//! 4. A [`Ticket`] is held for all parts of a request, and is dropped exactly once, also on errors.
//!
//! A request is counted in the epoch that it entered. It acts in that one too, unless its [`Connection`] is pinned.
//! Nobody ever waits to enter. Only [`EpochClock::wait_drained`] waits, and guests do not call it.

use std::cell::Cell;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::Connection;
use super::planted::{self, Defect};
use crate::sync::{AtomicU32, AtomicU64, Condvar, Mutex, Ordering, RwLock, fence, lock};

/// The number of an epoch. It grows by one at each cut.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }

    /// The epoch before this one.
    ///
    /// # Panics
    /// Before the first.
    #[must_use]
    pub fn previous(self) -> Epoch {
        Epoch(self.0.checked_sub(1).expect("an epoch that followed another"))
    }
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How many epochs may be draining at once; a cut beyond that is refused, so that a count's slot is never reused
/// while somebody is still in it.
pub const EPOCHS_DRAINING_MAX: u64 = 63;
const SLOTS: usize = 64;
const _: () = assert!(EPOCHS_DRAINING_MAX == SLOTS as u64 - 1);

fn slot(epoch: Epoch) -> usize {
    usize::try_from(epoch.0 % SLOTS as u64).expect("less than SLOTS")
}

/// One worker's counts, on cache lines of its own.
#[repr(align(128))]
struct Lane {
    inside: [AtomicU32; SLOTS],
}

struct Shared {
    current: AtomicU64,
    lanes: RwLock<Vec<Arc<Lane>>>,
    // Who waits for an epoch to drain sleeps here; leavers of old epochs knock.
    drained: (Mutex<Vec<Waker>>, Condvar),
}

/// The daemon's one epoch counter.
#[derive(Clone)]
pub struct EpochClock {
    shared: Arc<Shared>,
}

// What a lane and its tickets share: one reference for each of them to count, not two.
struct Way {
    shared: Arc<Shared>,
    lane: Arc<Lane>,
}

/// One worker's way into epochs.
pub struct EpochLane {
    way: Arc<Way>,
    connection: Option<Arc<Connection>>,
    // The epoch that was entered last, and the one in which its requests act: it stays so for the whole epoch.
    seen: Cell<Option<(Epoch, Epoch)>>,
}

/// Being inside an epoch. Dropping it leaves.
#[must_use = "a ticket that is dropped at once protects nothing"]
pub struct Ticket {
    way: Arc<Way>,
    entered: Epoch,
    acts_in: Epoch,
    // Of a pinned request: it is there until the request is done.
    pinned: Option<Arc<Connection>>,
    #[cfg(feature = "planted")]
    has_left: std::cell::Cell<bool>,
}

impl EpochClock {
    /// A clock that stands at `start`.
    #[must_use]
    pub fn new(start: Epoch) -> EpochClock {
        EpochClock {
            shared: Arc::new(Shared {
                current: AtomicU64::new(start.0),
                lanes: RwLock::new(Vec::new()),
                drained: (Mutex::new(Vec::new()), Condvar::new()),
            }),
        }
    }

    /// The epoch that requests enter now.
    #[must_use]
    pub fn current(&self) -> Epoch {
        Epoch(self.shared.current.load(Ordering::SeqCst))
    }

    /// A way in for one more worker.
    #[must_use]
    pub fn lane(&self) -> EpochLane {
        self.lane_of(None)
    }

    pub(super) fn lane_of(&self, connection: Option<Arc<Connection>>) -> EpochLane {
        let lane = Arc::new(Lane { inside: std::array::from_fn(|_| AtomicU32::new(0)) });
        self.shared.lanes.write().unwrap_or_else(std::sync::PoisonError::into_inner).push(lane.clone());
        let way = Arc::new(Way { shared: self.shared.clone(), lane });
        EpochLane { way, connection, seen: Cell::new(None) }
    }

    /// Moves the counter by one: the cut. Returns the new epoch. The caller makes sure that cuts do not run
    /// side by side and that everything for the new epoch is published first.
    ///
    /// # Errors
    /// When [`EPOCHS_DRAINING_MAX`] epochs are still draining.
    pub fn advance(&self) -> Result<Epoch, TooManyDraining> {
        if !self.can_advance() {
            return Err(TooManyDraining);
        }
        let next = self.current().next();
        self.shared.current.store(next.0, Ordering::SeqCst);
        Ok(next)
    }

    /// Whether the counter may move: the slot of the coming epoch is not in use by an old one.
    #[must_use]
    pub fn can_advance(&self) -> bool {
        let now = self.current();
        now.0 < EPOCHS_DRAINING_MAX || self.is_drained(Epoch(now.0 - EPOCHS_DRAINING_MAX))
    }

    /// Whether nobody is inside `epoch` or an older one, and nobody can enter any more. False for the current epoch.
    #[must_use]
    pub fn is_drained(&self, epoch: Epoch) -> bool {
        let current = self.current();
        if epoch >= current {
            return false;
        }
        let oldest = (current.0).saturating_sub(EPOCHS_DRAINING_MAX);
        let lanes = self.shared.lanes.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        lanes.iter().all(|lane| (oldest..=epoch.0).all(|e| lane.inside[slot(Epoch(e))].load(Ordering::SeqCst) == 0))
    }

    /// Waits until `epoch` and all older ones have drained.
    pub async fn drained(&self, epoch: Epoch) {
        poll_fn(|cx| {
            let mut wakers = lock(&self.shared.drained.0);
            if self.is_drained(epoch) {
                return Poll::Ready(());
            }
            wakers.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Blocks the thread until `epoch` and all older ones have drained, at most for `timeout`. Returns whether they have.
    #[must_use]
    pub fn wait_drained(&self, epoch: Epoch, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let (mutex, condvar) = &self.shared.drained;
        let mut guard = lock(mutex);
        loop {
            if self.is_drained(epoch) {
                return true;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            guard = condvar.wait_timeout(guard, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

/// A cut was refused because the counts of [`EPOCHS_DRAINING_MAX`] epochs are still in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many snapshots are still draining; wait until one is quiesced")]
pub struct TooManyDraining;

impl EpochLane {
    /// Enters the current epoch. Load the avail index before you call this (rule 1).
    pub fn enter(&self) -> Ticket {
        loop {
            let epoch = Epoch(self.way.shared.current.load(Ordering::SeqCst));
            let count = &self.way.lane.inside[slot(epoch)];
            count.fetch_add(1, Ordering::SeqCst);
            // Orders the count before the second look: either the cut's drain sees the count, or we see the cut.
            fence(Ordering::SeqCst);
            let mut ticket = Ticket::inside(&self.way, epoch);
            if planted::is(Defect::NoEpochRecheck) || self.way.shared.current.load(Ordering::SeqCst) == epoch.0 {
                if let Some(connection) = &self.connection {
                    self.act_by(connection, &mut ticket);
                }
                return ticket;
            }
            drop(ticket);
        }
    }

    /// Has a request act in the epoch in which its connection does. It is inside the epoch that it entered, so all
    /// pins that count for that one are there.
    fn act_by(&self, connection: &Arc<Connection>, ticket: &mut Ticket) {
        let entered = ticket.entered;
        ticket.acts_in = match self.seen.get() {
            Some((same, acts_in)) if same == entered => acts_in,
            _ => {
                let acts_in = connection.acts_in(entered);
                self.seen.set(Some((entered, acts_in)));
                acts_in
            }
        };
        if ticket.acts_in != entered {
            ticket.pinned = Some(connection.clone());
        }
    }
}

impl Drop for EpochLane {
    fn drop(&mut self) {
        let mut lanes = self.way.shared.lanes.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Tickets that outlive their lane keep counting: the lane goes only when nobody is inside.
        lanes.retain(|l| !Arc::ptr_eq(l, &self.way.lane) || l.inside.iter().any(|c| c.load(Ordering::SeqCst) != 0));
    }
}

impl Ticket {
    /// For a lane that has just been counted into `epoch`.
    fn inside(way: &Arc<Way>, epoch: Epoch) -> Ticket {
        Ticket {
            way: way.clone(),
            entered: epoch,
            acts_in: epoch,
            pinned: None,
            #[cfg(feature = "planted")]
            has_left: std::cell::Cell::new(false),
        }
    }

    fn leave(&self) {
        let left = self.way.lane.inside[slot(self.entered)].fetch_sub(1, Ordering::SeqCst) - 1;
        if left == 0 && self.way.shared.current.load(Ordering::SeqCst) != self.entered.0 {
            let wakers = std::mem::take(&mut *lock(&self.way.shared.drained.0));
            self.way.shared.drained.1.notify_all();
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// The epoch in which the request acts: the version that it reads, and the first one that it changes.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.acts_in
    }

    /// The epoch that this ticket is inside of, and keeps from draining.
    #[must_use]
    pub fn entered(&self) -> Epoch {
        self.entered
    }

    /// One more ticket for the same epochs, for the next request that the same avail index announced.
    pub fn again(&self) -> Ticket {
        // This ticket keeps the epoch from draining, so no second look is needed.
        self.way.lane.inside[slot(self.entered)].fetch_add(1, Ordering::SeqCst);
        let mut ticket = Ticket::inside(&self.way, self.entered);
        (ticket.acts_in, ticket.pinned) = (self.acts_in, self.pinned.clone());
        ticket
    }

    /// The epoch that a request would enter now: what rule 4 forbids to use for the parts of one request.
    #[cfg(feature = "planted")]
    pub(super) fn epoch_of_now(&self) -> Epoch {
        Epoch(self.way.shared.current.load(Ordering::SeqCst))
    }

    /// Leaves although the request is still running: what rule 4 forbids.
    #[cfg(feature = "planted")]
    pub(super) fn leave_early(&self) {
        if !self.has_left.replace(true) {
            self.leave();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        #[cfg(feature = "planted")]
        if self.has_left.get() {
            return;
        }
        self.leave();
    }
}
