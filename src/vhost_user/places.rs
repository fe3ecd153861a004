//! Who of those that are connected may have running rings on a disk.
//!
//! What always holds:
//! - There are no more holders than places. A frontend takes a place with its first running ring, and has it until its
//!   connection has ended. So who connects and says nothing, or never starts, keeps nobody out.
//! - Who wants a place that somebody holds who is hanging up waits until it is free.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a frontend that waits for a place looks whether it still has to.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The places of one socket.
pub(super) struct Places {
    most: usize,
    holders: Mutex<Vec<Holder>>,
    freed: Condvar,
}

struct Holder {
    connection: u64,
    stream: Arc<UnixStream>,
}

/// A place. Dropping it gives it back.
pub(super) struct Place {
    places: Arc<Places>,
    connection: u64,
}

impl Places {
    pub(super) fn new(most: usize) -> Arc<Places> {
        Arc::new(Places { most, holders: Mutex::default(), freed: Condvar::new() })
    }

    /// How many there are.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Whether all are held by frontends that stay.
    pub(super) fn are_taken(&self) -> bool {
        let holders = self.holders();
        holders.len() >= self.most && !holders.iter().any(|h| has_hung_up(&h.stream))
    }

    /// Whether this connection has one.
    pub(super) fn are_held_by(&self, connection: u64) -> bool {
        self.holders().iter().any(|h| h.connection == connection)
    }

    /// Takes a place. None when they are held by frontends that stay, or the server stops.
    pub(super) fn take(
        self: &Arc<Self>,
        connection: u64,
        stream: &Arc<UnixStream>,
        is_stopping: &AtomicBool,
    ) -> Option<Place> {
        let mut holders = self.holders();
        while holders.len() >= self.most {
            let may_be_free = holders.iter().any(|h| has_hung_up(&h.stream));
            if !may_be_free || is_stopping.load(Ordering::Acquire) || has_hung_up(stream) {
                return None;
            }
            holders = self.freed.wait_timeout(holders, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
        holders.push(Holder { connection, stream: stream.clone() });
        Some(Place { places: self.clone(), connection })
    }

    fn holders(&self) -> MutexGuard<'_, Vec<Holder>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.holders().retain(|h| h.connection != self.connection);
        self.places.freed.notify_all();
    }
}

/// Whether the other end has hung up.
pub(super) fn has_hung_up(stream: &UnixStream) -> bool {
    let mut poll = [rustix::event::PollFd::new(stream, rustix::event::PollFlags::RDHUP)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(0))
}
