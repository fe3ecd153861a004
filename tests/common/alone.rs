//! Planted defects are process-wide: a test that plants one is alone.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// Tests that plant defects take this for writing, all others for reading: a planted defect is process-wide.
static ALONE: RwLock<()> = RwLock::new(());

pub type Others = Rc<RwLockReadGuard<'static, ()>>;

thread_local! {
    static OTHERS: RefCell<Weak<RwLockReadGuard<'static, ()>>> = const { RefCell::new(Weak::new()) };
    static PLANTS: Cell<bool> = const { Cell::new(false) };
}

/// Nobody plants a defect while this is kept, except the test itself. Each thread takes the lock once.
pub fn undisturbed() -> Option<Others> {
    (!PLANTS.get()).then(|| {
        OTHERS.with_borrow_mut(|others| {
            others.upgrade().unwrap_or_else(|| {
                let guard = Rc::new(ALONE.read().unwrap_or_else(PoisonError::into_inner));
                *others = Rc::downgrade(&guard);
                guard
            })
        })
    })
}

/// Runs `test` with a defect that nobody else sees.
#[cfg(feature = "planted")]
pub fn with_planted<T>(defect: halfsilver::planted::Defect, test: impl FnOnce() -> T) -> std::thread::Result<T> {
    use halfsilver::planted::plant;
    let _alone = ALONE.write().unwrap_or_else(PoisonError::into_inner);
    PLANTS.set(true);
    plant(Some(defect));
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
    plant(None);
    PLANTS.set(false);
    done
}
