//! The synchronisation types of the parts whose interleavings are explored: the standard ones. `scripts/weave` puts
//! `tests/planted/sync.rs` in the place of this file, which can exchange them for those of a scheduler that tries every order.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock};

/// Locks a mutex whose data stays valid whatever happened to an earlier holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
