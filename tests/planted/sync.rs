//! The synchronisation types of the parts whose interleavings are explored. Each is, from when it is made, the standard one
//! or, in a program that explores (`explore`), that of a scheduler that tries every order.
//!
//! What always holds: a program explores from its beginning or not at all, so no two kinds meet.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::AtomicBool;
use std::sync::{LockResult, PoisonError};
use std::time::Duration;

pub(crate) use std::sync::atomic::Ordering;

static EXPLORES: AtomicBool = AtomicBool::new(false);

/// From here on everything that is made belongs to the scheduler.
pub(crate) fn explore() {
    EXPLORES.store(true, Ordering::Relaxed);
}

/// Whether this program explores.
pub(crate) fn explores() -> bool {
    EXPLORES.load(Ordering::Relaxed)
}

/// Either kind.
enum Kind<S, E> {
    Standard(S),
    Explored(E),
}

/// Makes the kind of this program.
fn kind<S, E>(standard: impl FnOnce() -> S, explored: impl FnOnce() -> E) -> Kind<S, E> {
    if explores() { Kind::Explored(explored()) } else { Kind::Standard(standard()) }
}

/// Calls the same on either kind.
macro_rules! on {
    ($kind:expr, $it:ident => $call:expr) => {
        match $kind {
            Kind::Standard($it) => $call,
            Kind::Explored($it) => $call,
        }
    };
}

pub(crate) fn fence(order: Ordering) {
    if explores() { shuttle::sync::atomic::fence(order) } else { std::sync::atomic::fence(order) }
}

macro_rules! atomic {
    ($name:ident, $value:ty) => {
        pub(crate) struct $name(Kind<std::sync::atomic::$name, Box<shuttle::sync::atomic::$name>>);

        #[allow(dead_code, reason = "each type has what some other one needs")]
        impl $name {
            pub(crate) fn new(value: $value) -> $name {
                let explored = || Box::new(shuttle::sync::atomic::$name::new(value));
                $name(kind(|| std::sync::atomic::$name::new(value), explored))
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                on!(&self.0, it => it.load(order))
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                on!(&self.0, it => it.store(value, order))
            }

            pub(crate) fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                on!(&self.0, it => it.fetch_add(value, order))
            }

            pub(crate) fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                on!(&self.0, it => it.fetch_sub(value, order))
            }

            pub(crate) fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                on!(&self.0, it => it.fetch_and(value, order))
            }

            pub(crate) fn fetch_max(&self, value: $value, order: Ordering) -> $value {
                on!(&self.0, it => it.fetch_max(value, order))
            }

            pub(crate) fn compare_exchange(
                &self,
                now: $value,
                new: $value,
                done: Ordering,
                not: Ordering,
            ) -> Result<$value, $value> {
                on!(&self.0, it => it.compare_exchange(now, new, done, not))
            }

            pub(crate) fn compare_exchange_weak(
                &self,
                now: $value,
                new: $value,
                done: Ordering,
                not: Ordering,
            ) -> Result<$value, $value> {
                on!(&self.0, it => it.compare_exchange_weak(now, new, done, not))
            }
        }
    };
}
atomic!(AtomicU32, u32);
atomic!(AtomicU64, u64);

/// What a lock gives, of either kind.
pub(crate) struct Held<S, E>(Kind<S, E>);

pub(crate) type MutexGuard<'a, T> = Held<std::sync::MutexGuard<'a, T>, shuttle::sync::MutexGuard<'a, T>>;
type ReadGuard<'a, T> = Held<std::sync::RwLockReadGuard<'a, T>, shuttle::sync::RwLockReadGuard<'a, T>>;
type WriteGuard<'a, T> = Held<std::sync::RwLockWriteGuard<'a, T>, shuttle::sync::RwLockWriteGuard<'a, T>>;

impl<T, S: Deref<Target = T>, E: Deref<Target = T>> Deref for Held<S, E> {
    type Target = T;

    fn deref(&self) -> &T {
        on!(&self.0, guard => guard)
    }
}

impl<T, S: DerefMut<Target = T>, E: DerefMut<Target = T>> DerefMut for Held<S, E> {
    fn deref_mut(&mut self) -> &mut T {
        on!(&mut self.0, guard => guard)
    }
}

/// That an earlier holder has panicked is handed on.
fn each<G, H>(result: LockResult<G>, held: impl Fn(G) -> H) -> LockResult<H> {
    result.map(&held).map_err(|e| PoisonError::new(held(e.into_inner())))
}

fn standard<S, E>(result: LockResult<S>) -> LockResult<Held<S, E>> {
    each(result, |guard| Held(Kind::Standard(guard)))
}

fn explored<S, E>(result: LockResult<E>) -> LockResult<Held<S, E>> {
    each(result, |guard| Held(Kind::Explored(guard)))
}

pub(crate) struct Mutex<T>(Kind<std::sync::Mutex<T>, shuttle::sync::Mutex<T>>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Mutex<T> {
        Mutex(match explores() {
            true => Kind::Explored(shuttle::sync::Mutex::new(value)),
            false => Kind::Standard(std::sync::Mutex::new(value)),
        })
    }

    pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        match &self.0 {
            Kind::Standard(mutex) => standard(mutex.lock()),
            Kind::Explored(mutex) => explored(mutex.lock()),
        }
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Mutex<T> {
        Mutex::new(T::default())
    }
}

pub(crate) struct RwLock<T>(Kind<std::sync::RwLock<T>, shuttle::sync::RwLock<T>>);

impl<T> RwLock<T> {
    pub(crate) fn new(value: T) -> RwLock<T> {
        RwLock(match explores() {
            true => Kind::Explored(shuttle::sync::RwLock::new(value)),
            false => Kind::Standard(std::sync::RwLock::new(value)),
        })
    }

    pub(crate) fn read(&self) -> LockResult<ReadGuard<'_, T>> {
        match &self.0 {
            Kind::Standard(lock) => standard(lock.read()),
            Kind::Explored(lock) => explored(lock.read()),
        }
    }

    pub(crate) fn write(&self) -> LockResult<WriteGuard<'_, T>> {
        match &self.0 {
            Kind::Standard(lock) => standard(lock.write()),
            Kind::Explored(lock) => explored(lock.write()),
        }
    }
}

pub(crate) struct Condvar(Kind<std::sync::Condvar, shuttle::sync::Condvar>);

impl Condvar {
    pub(crate) fn new() -> Condvar {
        Condvar(kind(std::sync::Condvar::new, shuttle::sync::Condvar::new))
    }

    pub(crate) fn notify_all(&self) {
        on!(&self.0, condvar => condvar.notify_all())
    }

    pub(crate) fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        wait: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, bool)> {
        match (&self.0, guard.0) {
            (Kind::Standard(condvar), Kind::Standard(guard)) => {
                each(condvar.wait_timeout(guard, wait), |(guard, end)| (Held(Kind::Standard(guard)), end.timed_out()))
            }
            (Kind::Explored(condvar), Kind::Explored(guard)) => {
                each(condvar.wait_timeout(guard, wait), |(guard, end)| (Held(Kind::Explored(guard)), end.timed_out()))
            }
            _ => unreachable!("no two kinds meet"),
        }
    }
}

/// Locks a mutex whose data stays valid whatever happened to an earlier holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
