//! The synchronisation types of the parts whose interleavings are explored: the standard ones, or with the feature
//! `model` those of a scheduler that tries every order.

#[cfg(not(feature = "model"))]
mod imp {
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock};
}
#[cfg(feature = "model")]
mod imp {
    pub(crate) use shuttle::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock};
}
pub(crate) use imp::*;

/// Locks a mutex whose data stays valid whatever happened to an earlier holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
