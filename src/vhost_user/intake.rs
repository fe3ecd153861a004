//! Taking requests from a ring into an epoch: the one place where rule 1 of the cut is kept.
//!
//! What always holds:
//! - The avail index is loaded (acquire) before the epoch is entered, once for a whole batch, so that a request which
//!   the driver submitted after it saw another one complete can never be in an older epoch than that one
//!   (sources 002 [0051], figure 4).
//! - Each request gets a ticket of its own for the batch's epoch.
//!
//! It knows nothing of rings or guests, so that a model can drive it with a ring of its own.

use crate::engine::{EpochLane, Ticket};

/// Where requests come from: a ring.
pub trait AvailSource {
    /// One announced request.
    type Item;

    /// Loads the avail index with acquire ordering, and fixes how far [`AvailSource::pop`] goes. Returns whether
    /// anything is announced.
    fn load_avail(&mut self) -> bool;

    /// The next request before the loaded index.
    fn pop(&mut self) -> Option<Self::Item>;
}

/// Takes everything that the ring announces now. Returns how many requests that were.
pub fn intake<S: AvailSource>(
    lane: &EpochLane,
    source: &mut S,
    mut each: impl FnMut(&mut S, S::Item, Ticket),
) -> usize {
    if !source.load_avail() {
        return 0;
    }
    let batch = lane.enter();
    let mut taken = 0;
    while let Some(item) = source.pop() {
        taken += 1;
        each(source, item, batch.again());
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Epoch, EpochClock};

    struct FakeRing<'a> {
        announced: u16,
        next: u16,
        loaded: u16,
        on_load: Box<dyn FnMut() + 'a>,
    }

    impl AvailSource for FakeRing<'_> {
        type Item = u16;
        fn load_avail(&mut self) -> bool {
            self.loaded = self.announced;
            (self.on_load)();
            self.loaded != self.next
        }
        fn pop(&mut self) -> Option<u16> {
            (self.next != self.loaded).then(|| {
                self.next += 1;
                self.next
            })
        }
    }

    #[test]
    fn a_cut_between_load_and_entry_puts_the_batch_into_the_new_epoch() {
        let clock = EpochClock::new(Epoch(5));
        let lane = clock.lane();
        let cut = clock.clone();
        let on_load = Box::new(move || assert_eq!(cut.advance(cut.room().unwrap()), Epoch(6)));
        let mut ring = FakeRing { announced: 3, next: 0, loaded: 0, on_load };
        let mut tickets = Vec::new();
        let taken = intake(&lane, &mut ring, |_, item, ticket| tickets.push((item, ticket)));
        assert_eq!(taken, 3);
        assert!(tickets.iter().all(|(_, t)| t.epoch() == Epoch(6)));
        assert!(clock.is_drained(Epoch(5)));
    }

    #[test]
    fn an_empty_ring_enters_nothing() {
        let clock = EpochClock::new(Epoch(0));
        let lane = clock.lane();
        let mut ring = FakeRing { announced: 0, next: 0, loaded: 0, on_load: Box::new(|| {}) };
        assert_eq!(intake(&lane, &mut ring, |_, _, _| unreachable!()), 0);
    }
}
