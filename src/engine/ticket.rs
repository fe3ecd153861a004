//! Being inside an epoch: how a worker's requests enter and leave.
//!
//! What always holds (the rules of the cut, sources 002 [0045], [0051]; figure 4; rule 3 is [`super::epoch`]'s):
//! 1. A worker loads the avail index first (acquire), then enters ([`EpochLane::enter`]).
//! 2. Entering counts the worker into the epoch it read, fences, and reads the counter again; if it moved, the
//!    worker leaves and tries again. So nobody can slip into an epoch after it was found empty.
//! 4. A [`Ticket`] is held for all parts of a request, and is dropped exactly once, also on errors.
//!
//! A request is counted in the epoch that it entered. It acts in that one too, unless its [`Connection`] is pinned.

use std::cell::Cell;
use std::sync::Arc;

use super::epoch::Way;
use super::{Connection, Epoch, EpochClock};
use crate::sync::{Ordering, fence};

/// One worker's way into epochs.
pub struct EpochLane {
    way: Arc<Way>,
    connection: Option<Arc<Connection>>,
    // The epoch that was entered last, and the one in which its requests act: it stays so for the whole epoch.
    seen: Cell<Option<(Epoch, Epoch)>>,
}

/// Being inside an epoch. Dropping it leaves.
#[must_use = "a ticket that is dropped at once protects nothing"]
pub struct Ticket {
    way: Arc<Way>,
    entered: Epoch,
    acts_in: Epoch,
    // Of a pinned request: it is there until the request is done.
    pinned: Option<Arc<Connection>>,
}

impl EpochClock {
    /// A way in for one more worker.
    #[must_use]
    pub fn lane(&self) -> EpochLane {
        EpochLane { way: self.way(), connection: None, seen: Cell::new(None) }
    }
}

impl Connection {
    /// A way into the epochs for one of the connection's workers.
    #[must_use]
    pub fn lane(self: &Arc<Connection>) -> EpochLane {
        EpochLane { connection: Some(self.clone()), ..self.clock().lane() }
    }
}

impl EpochLane {
    /// Enters the current epoch. Load the avail index before you call this (rule 1).
    pub fn enter(&self) -> Ticket {
        loop {
            let epoch = self.way.current();
            self.way.count_in(epoch);
            // Orders the count before the second look: either the cut's drain sees the count, or we see the cut.
            fence(Ordering::SeqCst);
            let mut ticket = Ticket::inside(&self.way, epoch);
            if self.way.current() == epoch {
                if let Some(connection) = &self.connection {
                    self.act_by(connection, &mut ticket);
                }
                return ticket;
            }
            drop(ticket);
        }
    }

    /// Has a request act in the epoch in which its connection does. It is inside the epoch that it entered, so all
    /// pins that count for that one are there.
    fn act_by(&self, connection: &Arc<Connection>, ticket: &mut Ticket) {
        let entered = ticket.entered;
        ticket.acts_in = match self.seen.get() {
            Some((same, acts_in)) if same == entered => acts_in,
            _ => {
                let acts_in = connection.acts_in(entered);
                self.seen.set(Some((entered, acts_in)));
                acts_in
            }
        };
        if ticket.acts_in != entered {
            ticket.pinned = Some(connection.clone());
        }
    }
}

impl Ticket {
    /// For a lane that has just been counted into `epoch`.
    fn inside(way: &Arc<Way>, epoch: Epoch) -> Ticket {
        Ticket { way: way.clone(), entered: epoch, acts_in: epoch, pinned: None }
    }

    /// The epoch in which the request acts: the version that it reads, and the first one that it changes.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.acts_in
    }

    /// The epoch that this ticket is inside of, and keeps from draining.
    #[must_use]
    pub fn entered(&self) -> Epoch {
        self.entered
    }

    /// One more ticket for the same epochs, for the next request that the same avail index announced.
    pub fn again(&self) -> Ticket {
        // This ticket keeps the epoch from draining, so no second look is needed.
        self.way.count_in(self.entered);
        let mut ticket = Ticket::inside(&self.way, self.entered);
        (ticket.acts_in, ticket.pinned) = (self.acts_in, self.pinned.clone());
        ticket
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.way.count_out(self.entered);
    }
}
