//! The epoch counter of the daemon and how many are inside which epoch.
//!
//! What always holds (the rules of the cut, sources 002 [0045], [0051]; figure 4; rules 1, 2 and 4 are [`super::ticket`]'s):
//! - There is one counter, moved once for a whole group of disks (rule 3).
//! - A count's slot is used again only when nobody is inside the epoch that had it.
//! - Nobody ever waits to enter. Only [`EpochClock::wait_drained`] and [`EpochClock::wait_quiet`] wait, and guests do not call
//!   them.
//! - A disk's versions change by its own requests alone, and are quiet when those have drained. They are read by others, too:
//!   the volumes on them, what is restored from them, and whoever reads those. What goes waits for all of these. Who has once
//!   been a reader stays one, so nobody is ever left out who reads there.

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
    owner: Option<Arc<Owner>>,
}

/// The disk whose requests are counted.
struct Owner {
    /// The disks that read its versions. Changed with the lanes locked.
    readers: Mutex<Vec<Weak<Owner>>>,
}

impl Owner {
    /// It and all that read its versions, or versions of those.
    fn with_readers(self: &Arc<Owner>) -> Vec<Arc<Owner>> {
        let mut all = vec![self.clone()];
        let mut at = 0;
        while let Some(owner) = all.get(at).cloned() {
            for reader in lock(&owner.readers).iter().filter_map(Weak::upgrade) {
                if !all.iter().any(|known| Arc::ptr_eq(known, &reader)) {
                    all.push(reader);
                }
            }
            at += 1;
        }
        all
    }
}

struct Shared {
    current: AtomicU64,
    lanes: RwLock<Vec<Arc<Lane>>>,
    // Who waits for an epoch to drain sleeps here; leavers of old epochs knock.
    drained: (Mutex<Vec<Waker>>, Condvar),
}

/// The daemon's one epoch counter, as all disks go by it or as one of them does.
#[derive(Clone)]
pub struct EpochClock {
    shared: Arc<Shared>,
    owner: Option<Arc<Owner>>,
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
                drained: (Mutex::new(Vec::new()), Condvar::new()),
            }),
            owner: None,
        }
    }

    /// The same counter for one more disk, which waits for its own requests alone.
    #[must_use]
    pub(super) fn of_disk(&self) -> EpochClock {
        EpochClock { shared: self.shared.clone(), owner: Some(Arc::new(Owner { readers: Mutex::default() })) }
    }

    /// From now on another disk reads versions of this one.
    pub(super) fn read_by(&self, reader: &EpochClock) {
        let (Some(owner), Some(reader)) = (&self.owner, &reader.owner) else { return };
        // Whoever looks whether an epoch has drained sees all of it or nothing.
        let _lanes = self.shared.lanes.write().unwrap_or_else(PoisonError::into_inner);
        let mut readers = lock(&owner.readers);
        readers.retain(|known| known.strong_count() > 0);
        if !readers.iter().any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(reader))) {
            readers.push(Arc::downgrade(reader));
        }
    }

    /// The epoch that requests enter now.
    #[must_use]
    pub fn current(&self) -> Epoch {
        Epoch(self.shared.current.load(Ordering::SeqCst))
    }

    /// Counts for one more worker.
    pub(super) fn way(&self) -> Arc<Way> {
        let lane = Arc::new(Lane { inside: std::array::from_fn(|_| AtomicU32::new(0)), owner: self.owner.clone() });
        self.shared.lanes.write().unwrap_or_else(PoisonError::into_inner).push(lane.clone());
        Arc::new(Way { shared: self.shared.clone(), lane })
    }

    /// Leave to move the counter once. The caller makes sure that no other does meanwhile.
    ///
    /// # Errors
    /// When [`EPOCHS_DRAINING_MAX`] epochs are still draining.
    pub fn room(&self) -> Result<Room, TooManyDraining> {
        let current = self.current();
        let all = EpochClock { shared: self.shared.clone(), owner: None };
        let is_free = current.0 < EPOCHS_DRAINING_MAX || all.is_drained(Epoch(current.0 - EPOCHS_DRAINING_MAX));
        if is_free { Ok(Room { current }) } else { Err(TooManyDraining) }
    }

    /// Moves the counter by one: the cut. Returns the new epoch. Everything for it is published first.
    pub fn advance(&self, room: Room) -> Epoch {
        let coming = room.coming();
        self.shared.current.store(coming.0, Ordering::SeqCst);
        coming
    }

    /// Whether no request is inside `epoch` or an older one, and none can enter any more: of this disk and of those that read
    /// its versions, if this is the counter of a disk. False for the current epoch.
    #[must_use]
    pub fn is_drained(&self, epoch: Epoch) -> bool {
        self.is_left(epoch, Owner::with_readers)
    }

    /// The same for the disk's own requests alone.
    #[must_use]
    pub fn is_quiet(&self, epoch: Epoch) -> bool {
        self.is_left(epoch, |owner| vec![owner.clone()])
    }

    fn is_left(&self, epoch: Epoch, by: fn(&Arc<Owner>) -> Vec<Arc<Owner>>) -> bool {
        loop {
            let current = self.current();
            if epoch >= current {
                return false;
            }
            let oldest = (current.0).saturating_sub(EPOCHS_DRAINING_MAX);
            let lanes = self.shared.lanes.read().unwrap_or_else(PoisonError::into_inner);
            let owners = self.owner.as_ref().map(by);
            let counts = |lane: &&Arc<Lane>| match (&owners, &lane.owner) {
                (Some(owners), Some(of)) => owners.iter().any(|owner| Arc::ptr_eq(owner, of)),
                _ => true,
            };
            let is_empty =
                |lane: &Arc<Lane>| (oldest..=epoch.0).all(|e| lane.inside[slot(Epoch(e))].load(Ordering::SeqCst) == 0);
            if lanes.iter().filter(counts).all(is_empty) {
                return true;
            }
            // A counter that moved meanwhile has given the oldest slot to its new epoch, whose leavers wake nobody.
            if self.current() == current {
                return false;
            }
        }
    }

    /// Waits until it [is drained](EpochClock::is_drained).
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

    /// Blocks the thread until it [is drained](EpochClock::is_drained), at most for `timeout`. Returns whether it is.
    #[must_use]
    pub fn wait_drained(&self, epoch: Epoch, timeout: Duration) -> bool {
        self.wait(timeout, || self.is_drained(epoch))
    }

    /// Blocks the thread until it [is quiet](EpochClock::is_quiet), at most for `timeout`. Returns whether it is.
    #[must_use]
    pub fn wait_quiet(&self, epoch: Epoch, timeout: Duration) -> bool {
        self.wait(timeout, || self.is_quiet(epoch))
    }

    fn wait(&self, timeout: Duration, is_over: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let (mutex, condvar) = &self.shared.drained;
        let mut guard = lock(mutex);
        loop {
            if is_over() {
                return true;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            guard = condvar.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// That the slot of the coming epoch is free of old ones. It stays so until the counter moves: who counts itself into an
/// epoch that has ended, having looked at the counter before, sees that at once and leaves ([`super::ticket`]).
#[must_use]
#[derive(Debug)]
pub struct Room {
    current: Epoch,
}

impl Room {
    /// The epoch that begins when the counter moves.
    #[must_use]
    pub fn coming(&self) -> Epoch {
        self.current.next()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker looks at the counter, sleeps, and counts itself in when its epoch's slot is to be the coming one's.
    #[test]
    fn leave_to_move_is_not_taken_back_by_who_only_looks_in() {
        let clock = EpochClock::new(Epoch(1));
        let way = clock.way();
        let seen = way.current();
        for _ in 0..EPOCHS_DRAINING_MAX {
            clock.advance(clock.room().unwrap());
        }
        let room = clock.room().unwrap();
        way.count_in(seen);
        assert_eq!(clock.room().err(), Some(TooManyDraining), "it counts like any other for who asks now");
        assert_eq!(clock.advance(room), Epoch(65));
        way.count_out(seen);
        assert!(clock.is_drained(Epoch(64)));
    }
}
