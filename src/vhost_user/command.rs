//! What a session tells the worker of a queue.
//!
//! A command is carried out before it is answered, so when a message is answered the ring obeys it already.

use std::sync::Arc;

use super::event::Event;
use super::inflight::InflightQueue;
use super::memory::MemoryMap;
use super::request::Rules;
use super::ring::RingSetup;

/// How the driver says that there is something in the ring.
#[derive(Clone, Debug)]
pub(super) enum Kick {
    /// By a descriptor.
    Event(Event),
    /// Not at all: look.
    Poll,
}

/// What a session tells a worker to do.
pub(super) enum Command {
    /// Serve this ring from `base` on.
    Start {
        setup: RingSetup,
        memory: Arc<MemoryMap>,
        base: u16,
        inflight: Option<InflightQueue>,
        kick: Kick,
        rules: Box<Rules>,
    },
    /// Finish what is in flight, and answer with the base.
    Stop,
    /// The frontend's memory changed.
    Memory(Arc<MemoryMap>),
    /// Another way to be kicked.
    Kick(Kick),
    /// Where to tell the driver of answers.
    Call(Option<Event>),
    /// Where to tell the frontend that the ring broke.
    Err(Option<Event>),
    /// End the thread. Only after a stop.
    Exit,
}
