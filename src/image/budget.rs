//! Bytes of memory that may be in use at once for one purpose.
//!
//! What always holds: no more than the budget is out, and who waits is served in order of arrival, so a large piece does
//! not wait for ever behind small ones. What one piece may ask for is cut to the whole budget: then it is alone.
//!
//! Whoever holds a share waits for nothing that another share of the same kind is needed for, or nobody would go on.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// A budget that threads share.
#[derive(Debug)]
pub struct Budget {
    bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    left: u64,
    /// Who waits, the first in front. An entry stays until its turn, or until it gives up.
    waiting: VecDeque<(u64, Waker)>,
    next_id: u64,
}

/// A part of a budget. Dropping it gives it back.
#[derive(Debug)]
#[must_use = "the bytes are given back when the share is dropped"]
pub struct Share {
    budget: Arc<Budget>,
    bytes: u64,
}

/// Somebody's place in the queue.
struct Place<'a> {
    budget: &'a Budget,
    id: Option<u64>,
}

impl Budget {
    /// A budget of so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<Budget> {
        Arc::new(Budget { bytes, state: Mutex::new(State { left: bytes, waiting: VecDeque::new(), next_id: 0 }) })
    }

    /// Waits until so many bytes are left, and takes them.
    pub async fn take(self: &Arc<Self>, bytes: u64) -> Share {
        let bytes = bytes.min(self.bytes);
        let mut place = Place { budget: self, id: None };
        poll_fn(|cx| place.poll(bytes, cx.waker())).await;
        Share { budget: self.clone(), bytes }
    }

    /// How many bytes nobody has.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.state().left
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the first who waits look again.
    fn wake_first(state: MutexGuard<'_, State>) {
        let first = state.waiting.front().map(|(_, waker)| waker.clone());
        drop(state);
        if let Some(waker) = first {
            waker.wake();
        }
    }
}

impl Place<'_> {
    fn poll(&mut self, bytes: u64, waker: &Waker) -> Poll<()> {
        let mut state = self.budget.state();
        let is_first = state.waiting.front().is_none_or(|(first, _)| Some(*first) == self.id);
        if is_first && state.left >= bytes {
            state.left -= bytes;
            if self.id.take().is_some() {
                state.waiting.pop_front();
                Budget::wake_first(state);
            }
            return Poll::Ready(());
        }
        match self.id.and_then(|id| state.waiting.iter_mut().find(|(waiting, _)| *waiting == id)) {
            Some((_, before)) => before.clone_from(waker),
            None => {
                let id = state.next_id;
                state.next_id += 1;
                state.waiting.push_back((id, waker.clone()));
                self.id = Some(id);
            }
        }
        Poll::Pending
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let mut state = self.budget.state();
            state.waiting.retain(|(waiting, _)| *waiting != id);
            Budget::wake_first(state);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.budget.state();
        state.left += self.bytes;
        Budget::wake_first(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::Context;

    fn look<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn who_came_first_is_served_first_and_more_than_all_is_all() {
        let budget = Budget::new(10);
        let Poll::Ready(first) = look(pin!(budget.take(8))) else { panic!("there was enough") };
        let (mut large, mut small) = (pin!(budget.take(100)), pin!(budget.take(1)));
        assert!(look(large.as_mut()).is_pending() && look(small.as_mut()).is_pending());
        assert_eq!(budget.left(), 2, "a small one does not overtake");
        drop(first);
        let Poll::Ready(all) = look(large.as_mut()) else { panic!("all is free") };
        assert_eq!(budget.left(), 0);
        assert!(look(small.as_mut()).is_pending());
        drop(all);
        assert!(look(small.as_mut()).is_ready());
    }

    #[test]
    fn who_gives_up_is_in_nobodys_way() {
        let budget = Budget::new(4);
        let Poll::Ready(held) = look(pin!(budget.take(3))) else { panic!("there was enough") };
        let mut second = pin!(budget.take(1));
        {
            let mut first = Box::pin(budget.take(4));
            assert!(look(first.as_mut()).is_pending() && look(second.as_mut()).is_pending());
        }
        assert!(look(second).is_ready());
        drop(held);
        assert_eq!(budget.left(), 4);
    }
}
