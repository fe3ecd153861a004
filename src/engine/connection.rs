//! Frontends that stay with the frozen version: those connected at a cut with writers by connection
//! (source 002 [0045], [0048], [0051]; figures 3C to 5D: active processes keep VLUN A, new ones start on VLUN B).
//!
//! What always holds:
//! - The epoch in which a request acts depends on its connection and on the epoch that it entered, and on nothing else:
//!   pins change only for epochs that nobody has entered yet, just before the counter moves. So the cut, and the
//!   cutover of all connections of a disk, are as atomic as the counter.
//! - Nobody joins between a change of pins and the move of the counter that makes it count.
//! - A connection is there until its session is over and its pinned requests are done.
//!
//! Nobody waits to enter. Only [`Connections::wait_free`] waits long, and guests do not call it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Epoch, EpochClock};
use crate::sync::{Condvar, Mutex, MutexGuard, lock};

/// Requests that enter `from` or later, and before `until`, act in `at`.
#[derive(Clone, Copy, Debug)]
struct Pin {
    at: Epoch,
    from: Epoch,
    until: Option<Epoch>,
}

impl Pin {
    fn covers(&self, entered: Epoch) -> bool {
        self.from <= entered && self.until.is_none_or(|until| entered < until)
    }
}

/// One connection's pins. A lane looks at them once an epoch.
#[derive(Default)]
struct Member {
    pins: Mutex<Vec<Pin>>,
}

struct Shared {
    // Held over a move of the counter, so nothing on the data path may take it.
    members: Mutex<Vec<Arc<Member>>>,
    // Who waits for an epoch to be free sleeps here.
    freed: Condvar,
}

/// The connections of one disk's live version.
pub struct Connections {
    clock: EpochClock,
    shared: Arc<Shared>,
}

/// One frontend's connection. The last holder leaves: its session, its lanes or one of its pinned requests.
pub struct Connection {
    clock: EpochClock,
    shared: Arc<Shared>,
    member: Arc<Member>,
}

/// A change of pins that begins to count when the counter moves. Keep it until then: nobody joins meanwhile. If it is
/// dropped and the counter has not moved, nothing has changed.
#[must_use = "dropped before the counter has moved, it changes nothing"]
pub struct PinChange<'a> {
    connections: &'a Connections,
    members: MutexGuard<'a, Vec<Arc<Member>>>,
    coming: Epoch,
    count: usize,
}

impl Connections {
    /// No connections, on a disk that goes by `clock`.
    #[must_use]
    pub fn new(clock: EpochClock) -> Connections {
        Connections { clock, shared: Arc::new(Shared { members: Mutex::new(Vec::new()), freed: Condvar::new() }) }
    }

    /// One more connection, without pins. Waits while a change of pins waits for the counter.
    #[must_use]
    pub fn join(&self) -> Arc<Connection> {
        let member = Arc::new(Member::default());
        lock(&self.shared.members).push(member.clone());
        Arc::new(Connection { clock: self.clock.clone(), shared: self.shared.clone(), member })
    }

    /// Pins all connections of this moment: what they ask for after `ended` acts in `ended`, the epoch that the coming
    /// cut ends. Call it just before the counter moves, and keep what it returns until the counter has.
    pub fn pin(&self, ended: Epoch) -> PinChange<'_> {
        let members = self.tidied();
        let pin = Pin { at: ended, from: ended.next(), until: None };
        members.iter().for_each(|member| lock(&member.pins).push(pin));
        let count = members.len();
        PinChange { connections: self, members, coming: ended.next(), count }
    }

    /// The cutover: pins at `up_to` and before do not count for what enters `from` or later, the coming epoch. Call it
    /// just before the counter moves, and keep what it returns until the counter has.
    pub fn release(&self, up_to: Epoch, from: Epoch) -> PinChange<'_> {
        let members = self.tidied();
        let mut count = 0;
        for member in members.iter() {
            let mut pins = lock(&member.pins);
            let mut held = pins.iter_mut().filter(|pin| pin.at <= up_to && pin.until.is_none()).peekable();
            count += usize::from(held.peek().is_some());
            held.for_each(|pin| pin.until = Some(from));
        }
        PinChange { connections: self, members, coming: from, count }
    }

    /// How many connections are there.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.shared.members).len()
    }

    /// How many connections still act in `epoch` or an older one, whatever they enter.
    #[must_use]
    pub fn holders(&self, epoch: Epoch) -> usize {
        let holds = |member: &&Arc<Member>| lock(&member.pins).iter().any(|p| p.at <= epoch && p.until.is_none());
        lock(&self.shared.members).iter().filter(holds).count()
    }

    /// Blocks the thread until no connection acts in `epoch` or an older one any more, whatever it enters, at most for
    /// `timeout`. Returns the last epoch whose requests may: once that is quiet
    /// ([`EpochClock::is_quiet`]), the version that ended with `epoch` never changes again.
    #[must_use]
    pub fn wait_free(&self, epoch: Epoch, timeout: Duration) -> Option<Epoch> {
        let deadline = Instant::now() + timeout;
        let mut members = lock(&self.shared.members);
        loop {
            if let Some(last) = last_pinned(&members, epoch) {
                return Some(last);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.shared.freed.wait_timeout(members, left);
            members = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    /// The members, without pins that nobody can act by any more.
    fn tidied(&self) -> MutexGuard<'_, Vec<Arc<Member>>> {
        let members = lock(&self.shared.members);
        for member in members.iter() {
            let is_over = |pin: &mut Pin| pin.until.is_some_and(|until| self.clock.is_quiet(until.previous()));
            lock(&member.pins).extract_if(.., is_over).for_each(drop);
        }
        members
    }
}

/// The last epoch whose requests may act in `epoch` or before; None while a connection does, whatever it enters.
fn last_pinned(members: &[Arc<Member>], epoch: Epoch) -> Option<Epoch> {
    let mut last = epoch;
    for member in members {
        for pin in lock(&member.pins).iter().filter(|pin| pin.at <= epoch) {
            last = last.max(pin.until?.previous());
        }
    }
    Some(last)
}

impl PinChange<'_> {
    /// How many connections it is about.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }
}

impl Drop for PinChange<'_> {
    fn drop(&mut self) {
        if self.connections.clock.current() < self.coming {
            for member in self.members.iter() {
                let mut pins = lock(&member.pins);
                pins.retain(|pin| pin.from != self.coming);
                let released = pins.iter_mut().filter(|pin| pin.until == Some(self.coming));
                released.for_each(|pin| pin.until = None);
            }
        }
        self.connections.shared.freed.notify_all();
    }
}

impl Connection {
    pub(super) fn clock(&self) -> &EpochClock {
        &self.clock
    }

    /// The epoch in which requests act that entered `entered`, which the caller is inside of.
    pub(super) fn acts_in(&self, entered: Epoch) -> Epoch {
        let pins = lock(&self.member.pins);
        let pinned = pins.iter().filter(|pin| pin.covers(entered)).map(|pin| pin.at).min();
        pinned.unwrap_or(entered)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.shared.members).retain(|member| !Arc::ptr_eq(member, &self.member));
        self.shared.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EpochLane;

    const NOW: Duration = Duration::ZERO;

    fn clock_and_connections() -> (EpochClock, Connections) {
        let clock = EpochClock::new(Epoch(1));
        (clock.clone(), Connections::new(clock))
    }

    /// A cut that pins everybody; returns the epoch that ended.
    fn cut(clock: &EpochClock, connections: &Connections) -> Epoch {
        let change = connections.pin(clock.current());
        let ended = clock.advance(clock.room().expect("few epochs")).previous();
        drop(change);
        ended
    }

    /// A cutover; returns the first epoch in which it counts.
    fn cut_over(clock: &EpochClock, connections: &Connections, up_to: Epoch) -> Epoch {
        let change = connections.release(up_to, clock.current().next());
        let from = clock.advance(clock.room().expect("few epochs"));
        drop(change);
        from
    }

    #[test]
    fn those_who_were_there_stay_and_those_who_come_go_on() {
        let (clock, connections) = clock_and_connections();
        let (old, nobody) = (connections.join(), clock.lane());
        let old_lane = old.lane();
        let before = old_lane.enter();
        assert_eq!(cut(&clock, &connections), Epoch(1));
        let new = connections.join();
        let acts = |lane: &EpochLane| (lane.enter().epoch(), lane.enter().entered());
        assert_eq!(before.epoch(), Epoch(1));
        assert_eq!(acts(&old_lane), (Epoch(1), Epoch(2)));
        assert_eq!(acts(&old.lane()), (Epoch(1), Epoch(2)), "a lane of later, too");
        assert_eq!(old_lane.enter().again().epoch(), Epoch(1));
        assert_eq!(acts(&new.lane()), (Epoch(2), Epoch(2)));
        assert_eq!(acts(&nobody), (Epoch(2), Epoch(2)));
        clock.advance(clock.room().expect("few epochs"));
        assert_eq!(acts(&old_lane), (Epoch(1), Epoch(3)), "a cut that is not by connection changes nothing");
        assert_eq!((connections.holders(Epoch(1)), connections.holders(Epoch(0))), (1, 0));
        assert_eq!(connections.count(), 2);
    }

    #[test]
    fn a_cutover_counts_for_what_enters_after_it() {
        let (clock, connections) = clock_and_connections();
        let old = connections.join();
        let lane = old.lane();
        let ended = cut(&clock, &connections);
        let running = lane.enter();
        assert_eq!(connections.wait_free(ended, NOW), None);
        let change = connections.release(ended, Epoch(3));
        assert_eq!(change.count(), 1);
        assert_eq!(lane.enter().epoch(), ended, "the counter has not moved");
        assert_eq!(old.lane().enter().epoch(), ended, "nor for a lane that looks at the pins only now");
        clock.advance(clock.room().expect("few epochs"));
        drop(change);
        assert_eq!(lane.enter().epoch(), Epoch(3));
        assert_eq!(connections.holders(ended), 0);
        let last = connections.wait_free(ended, NOW);
        assert_eq!(last, Some(Epoch(2)), "what runs since before the cutover is still to drain");
        assert!(!clock.is_drained(Epoch(2)));
        drop(running);
        assert!(clock.is_drained(Epoch(2)));
    }

    #[test]
    fn several_snapshots_pin_to_the_oldest_that_counts() {
        let (clock, connections) = clock_and_connections();
        let (first, lanes) = (connections.join(), |c: &Arc<Connection>| c.lane().enter().epoch());
        let one = cut(&clock, &connections);
        let second = connections.join();
        let two = cut(&clock, &connections);
        assert_eq!((lanes(&first), lanes(&second)), (one, two));
        assert_eq!((connections.holders(one), connections.holders(two)), (1, 2));
        let from = cut_over(&clock, &connections, one);
        assert_eq!((lanes(&first), lanes(&second)), (two, two), "the older one is over, the newer one is not");
        assert_eq!(connections.wait_free(one, NOW), Some(from.previous()));
        assert_eq!(connections.wait_free(two, NOW), None);
        let three = cut(&clock, &connections);
        let from = cut_over(&clock, &connections, three);
        assert_eq!((lanes(&first), lanes(&second)), (from, from), "the newest takes the older ones along");
        assert_eq!(connections.wait_free(three, NOW), Some(from.previous()));
    }

    #[test]
    fn a_connection_that_goes_holds_nothing() {
        let (clock, connections) = clock_and_connections();
        let (old, other) = (connections.join(), connections.join());
        let lane = old.lane();
        let ended = cut(&clock, &connections);
        let (running, more) = (lane.enter(), lane.enter().again());
        drop(other);
        drop((old, lane));
        assert_eq!(
            (connections.holders(ended), connections.wait_free(ended, NOW)),
            (1, None),
            "its requests still run"
        );
        drop(running);
        assert_eq!(connections.wait_free(ended, NOW), None);
        drop(more);
        assert_eq!(connections.wait_free(ended, NOW), Some(ended));
        assert!(clock.is_drained(ended) && connections.count() == 0);
    }

    #[test]
    fn waiters_are_told() {
        let (clock, connections) = clock_and_connections();
        let (leaves, stays) = (connections.join(), connections.join());
        let ended = cut(&clock, &connections);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| connections.wait_free(ended, Duration::from_secs(20)));
            std::thread::sleep(Duration::from_millis(10));
            drop(leaves);
            std::thread::sleep(Duration::from_millis(10));
            assert!(!waiter.is_finished());
            let from = cut_over(&clock, &connections, ended);
            assert_eq!(waiter.join().ok(), Some(Some(from.previous())));
        });
        drop(stays);
    }

    #[test]
    fn a_change_whose_cut_is_refused_is_taken_back() {
        let (clock, connections) = clock_and_connections();
        let old = connections.join();
        drop(connections.pin(Epoch(1)));
        clock.advance(clock.room().expect("few epochs"));
        assert_eq!((old.lane().enter().epoch(), connections.holders(Epoch(9))), (Epoch(2), 0));
        let ended = cut(&clock, &connections);
        drop(connections.release(ended, clock.current().next()));
        clock.advance(clock.room().expect("few epochs"));
        assert_eq!((old.lane().enter().epoch(), connections.holders(ended)), (ended, 1));
    }

    #[test]
    fn joining_waits_for_the_counter() {
        let (clock, connections) = clock_and_connections();
        let change = connections.pin(Epoch(1));
        std::thread::scope(|scope| {
            let joins = scope.spawn(|| connections.join().lane().enter().epoch());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!joins.is_finished(), "joined between the pins and the counter");
            clock.advance(clock.room().expect("few epochs"));
            drop(change);
            assert_eq!(joins.join().ok(), Some(Epoch(2)));
        });
    }

    #[test]
    fn pins_that_are_over_are_forgotten() {
        let (clock, connections) = clock_and_connections();
        let old = connections.join();
        for _ in 0..200 {
            let ended = cut(&clock, &connections);
            cut_over(&clock, &connections, ended);
        }
        assert!(lock(&old.member.pins).len() <= 2);
    }
}
