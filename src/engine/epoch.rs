//! The epoch counter of the daemon and how many are inside which epoch.
//!
//! What always holds (the rules of the cut, sources 002 [0045], [0051]; figure 4; rules 1, 2 and 4 are [`super::ticket`]'s):
//! - There is one counter, moved once for a whole group of disks (rule 3).
//! - A count's slot is used again only when nobody is inside the epoch that had it.
//! - Nobody ever waits to enter. Only [`EpochClock::wait_drained`] waits, and guests do not call it.
//! - A disk waits for the requests of its family: its own, and those of the disks that read its versions or have done so, which
//!   are the volumes on it and what is restored from them. Families only grow, so nobody is ever left out who reads there.

use std::future::poll_fn;
use std::sync::{Arc, PoisonError, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use crate::sync::{AtomicU32, AtomicU64, Condvar, Mutex, Ordering, RwLock, lock};

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
    /// None if it may be at any disk.
    family: Option<Arc<Family>>,
}

/// The family that a disk belongs to, by a number. Changed under the lock of the lanes alone.
struct Family(std::sync::atomic::AtomicU64);

impl Family {
    fn number(&self) -> u64 {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

struct Shared {
    current: AtomicU64,
    lanes: RwLock<Vec<Arc<Lane>>>,
    /// Those of all disks that go by this counter, and the next number.
    families: Mutex<(Vec<Weak<Family>>, u64)>,
    // Who waits for an epoch to drain sleeps here; leavers of old epochs knock.
    drained: (Mutex<Vec<Waker>>, Condvar),
}

/// The daemon's one epoch counter, as all disks go by it or as one of them does.
#[derive(Clone)]
pub struct EpochClock {
    shared: Arc<Shared>,
    family: Option<Arc<Family>>,
}

/// One worker's way into epochs: what it and its tickets share, one reference for each of them to count. When the last of
/// them is gone, so are its counts.
pub(super) struct Way {
    shared: Arc<Shared>,
    lane: Arc<Lane>,
}

impl EpochClock {
    /// A clock that stands at `start`.
    #[must_use]
    pub fn new(start: Epoch) -> EpochClock {
        EpochClock {
            shared: Arc::new(Shared {
                current: AtomicU64::new(start.0),
                lanes: RwLock::new(Vec::new()),
                families: Mutex::new((Vec::new(), 0)),
                drained: (Mutex::new(Vec::new()), Condvar::new()),
            }),
            family: None,
        }
    }

    /// The same counter for one more disk, which waits for its own requests alone.
    #[must_use]
    pub(super) fn of_disk(&self) -> EpochClock {
        let (families, next) = &mut *lock(&self.shared.families);
        *next += 1;
        let family = Arc::new(Family(std::sync::atomic::AtomicU64::new(*next)));
        families.retain(|family| family.strong_count() > 0);
        families.push(Arc::downgrade(&family));
        EpochClock { shared: self.shared.clone(), family: Some(family) }
    }

    /// From now on two disks wait for each other's requests, and for those of all whom they waited for.
    pub(super) fn join(&self, other: &EpochClock) {
        let (Some(one), Some(other)) = (&self.family, &other.family) else { return };
        // Whoever looks whether an epoch has drained sees the one or the other.
        let _lanes = self.shared.lanes.write().unwrap_or_else(PoisonError::into_inner);
        let (from, to) = (other.number(), one.number());
        for family in lock(&self.shared.families).0.iter().filter_map(Weak::upgrade).filter(|f| f.number() == from) {
            family.0.store(to, std::sync::atomic::Ordering::SeqCst);
        }
    }

    /// The epoch that requests enter now.
    #[must_use]
    pub fn current(&self) -> Epoch {
        Epoch(self.shared.current.load(Ordering::SeqCst))
    }

    /// Counts for one more worker.
    pub(super) fn way(&self) -> Arc<Way> {
        let lane = Arc::new(Lane { inside: std::array::from_fn(|_| AtomicU32::new(0)), family: self.family.clone() });
        self.shared.lanes.write().unwrap_or_else(PoisonError::into_inner).push(lane.clone());
        Arc::new(Way { shared: self.shared.clone(), lane })
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
        let all = EpochClock { shared: self.shared.clone(), family: None };
        now.0 < EPOCHS_DRAINING_MAX || all.is_drained(Epoch(now.0 - EPOCHS_DRAINING_MAX))
    }

    /// Whether nobody is inside `epoch` or an older one, and nobody can enter any more; of the disk's family, if this is the
    /// counter of a disk. False for the current epoch.
    #[must_use]
    pub fn is_drained(&self, epoch: Epoch) -> bool {
        let current = self.current();
        if epoch >= current {
            return false;
        }
        let oldest = (current.0).saturating_sub(EPOCHS_DRAINING_MAX);
        let lanes = self.shared.lanes.read().unwrap_or_else(PoisonError::into_inner);
        let ours = self.family.as_ref().map(|family| family.number());
        let counts = |lane: &&Arc<Lane>| match (ours, &lane.family) {
            (Some(ours), Some(family)) => family.number() == ours,
            _ => true,
        };
        let is_empty =
            |lane: &Arc<Lane>| (oldest..=epoch.0).all(|e| lane.inside[slot(Epoch(e))].load(Ordering::SeqCst) == 0);
        lanes.iter().filter(counts).all(is_empty)
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
            guard = condvar.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A cut was refused because the counts of [`EPOCHS_DRAINING_MAX`] epochs are still in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many snapshots are still draining; wait until one is quiesced")]
pub struct TooManyDraining;

impl Way {
    /// The epoch that requests enter now.
    pub(super) fn current(&self) -> Epoch {
        Epoch(self.shared.current.load(Ordering::SeqCst))
    }

    /// One more is inside `epoch`.
    pub(super) fn count_in(&self, epoch: Epoch) {
        self.lane.inside[slot(epoch)].fetch_add(1, Ordering::SeqCst);
    }

    /// One less is; the last one of an epoch that has ended wakes those who wait for it.
    pub(super) fn count_out(&self, epoch: Epoch) {
        let left = self.lane.inside[slot(epoch)].fetch_sub(1, Ordering::SeqCst) - 1;
        if left == 0 && self.current() != epoch {
            let wakers = std::mem::take(&mut *lock(&self.shared.drained.0));
            self.shared.drained.1.notify_all();
            wakers.into_iter().for_each(Waker::wake);
        }
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.shared.lanes.write().unwrap_or_else(PoisonError::into_inner).retain(|lane| !Arc::ptr_eq(lane, &self.lane));
    }
}
