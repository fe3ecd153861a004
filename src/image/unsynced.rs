//! Whether there is anything on an image that a sync would make durable. A flush asks each image that it is about, and most
//! have not changed since the last one.
//!
//! What always holds: a write notes itself when it has ended and before anybody is told; a sync covers the writes that ended
//! before it began, and counts when it has succeeded. Until the first one everything is in doubt: an earlier process may have
//! left what it had not synced.
//!
//! Syncs are numbered as they begin. A write notes the number of the next one to begin, which covers it; in the common case
//! that is noted already, and nothing is written to memory that the workers share.

use crate::sync::{AtomicU64, Ordering};

/// What was written to an image, and what was synced, by numbers of syncs.
pub struct Unsynced {
    /// The number of the next sync to begin.
    next: AtomicU64,
    /// The last one that is needed for what was written.
    needed: AtomicU64,
    /// The last one that has succeeded.
    done: AtomicU64,
}

impl Default for Unsynced {
    fn default() -> Unsynced {
        Unsynced { next: AtomicU64::new(1), needed: AtomicU64::new(1), done: AtomicU64::new(0) }
    }
}

impl Unsynced {
    /// A write has ended, well or not.
    pub fn note_write(&self) {
        let next = self.next.load(Ordering::SeqCst);
        if self.needed.load(Ordering::SeqCst) < next {
            self.needed.fetch_max(next, Ordering::SeqCst);
        }
    }

    /// A sync is about to begin. Returns its number.
    #[must_use]
    pub fn begin_sync(&self) -> u64 {
        self.next.fetch_add(1, Ordering::SeqCst)
    }

    /// That sync has succeeded.
    pub fn end_sync(&self, number: u64) {
        self.done.fetch_max(number, Ordering::SeqCst);
    }

    /// Whether a write that has ended is not covered by a sync that has.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.needed.load(Ordering::SeqCst) > self.done.load(Ordering::SeqCst)
    }
}

impl std::fmt::Debug for Unsynced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unsynced({})", self.is_dirty())
    }
}
