//! Waiting by a host: for a bell to ring, for a message.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Host;

/// How often it is looked where threads wait by pauses.
const LOOK: Duration = Duration::from_millis(1);

impl dyn Host {
    /// Lets go of `held`, waits until `bell` rings or so much time has passed, and takes it again.
    pub fn wait<'a, T>(
        &self,
        bell: &Condvar,
        mutex: &'a Mutex<T>,
        held: MutexGuard<'a, T>,
        time: Duration,
    ) -> MutexGuard<'a, T> {
        if !self.waits_by_pauses() {
            return bell.wait_timeout(held, time).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(held);
        self.pause(time.min(LOOK));
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a thread may wait for something else than a host in one go, at most for `time`. Where threads wait by pauses
    /// others have gone on meanwhile, and it may only look.
    #[must_use]
    pub fn patience(&self, time: Duration) -> Duration {
        if !self.waits_by_pauses() {
            return time;
        }
        self.pause(time.min(LOOK));
        Duration::ZERO
    }
}

/// A message, if it comes in time.
///
/// # Errors
/// When none does, or none can come any more.
pub fn receive<T>(host: &dyn Host, from: &Receiver<T>, time: Duration) -> Result<T, RecvTimeoutError> {
    if !host.waits_by_pauses() {
        return from.recv_timeout(time);
    }
    let deadline = host.now() + time;
    loop {
        match from.try_recv() {
            Ok(message) => return Ok(message),
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) => {}
        }
        let left = deadline.saturating_duration_since(host.now());
        if left.is_zero() {
            return Err(RecvTimeoutError::Timeout);
        }
        host.pause(left.min(LOOK));
    }
}
