//! vhost-user-blk: untrusted bytes from guests and frontends into typed requests.
//!
//! What always holds:
//! - No field of a frontend or guest is used before it was copied and checked. What is wrong gets an error status, a
//!   stopped ring or a closed connection with one log line; the daemon and other connections never notice.
//! - Requests enter their epoch by [`intake`], which keeps rule 1 of the cut, and are drained before a ring's base is
//!   told, a device is reset or a connection ends.
//!
//! What this room does not know: versions, strategies, where bytes are. It hands [`crate::engine::Request`]s on.

mod chain;
mod command;
mod event;
mod features;
mod inflight;
mod intake;
mod limits;
mod mapping;
mod memory;
mod message;
mod places;
mod polling;
mod request;
mod ring;
mod seat;
mod server;
mod session;
mod sigbus;
mod socket;
mod stats;
mod worker;

pub use features::{Hints, QUEUES_MAX};
pub use intake::{AvailSource, intake};
pub use seat::Offer;
pub use server::{FRONTENDS_MAX, ServeOptions, Server, ServerHandle, SocketSource, serve};
pub use socket::clear_stale;
pub use stats::{Direction, DirectionStats, LATENCY_BUCKETS, QueueStats, bucket_bound};

use std::time::Duration;

/// Who wants to know what happens on a socket with one frontend or several. Called on the server's own threads:
/// return quickly.
pub trait Observer: Send + Sync + 'static {
    /// A frontend has connected.
    fn connected(&self) {}

    /// A frontend is gone, and all its requests are done.
    fn disconnected(&self) {}

    /// A request's answer was put on the ring of `queue`.
    fn request_done(&self, queue: usize, direction: Direction, bytes: u64, ok: bool, latency: Duration) {
        // Most observers read Server::stats() instead.
        let _: (usize, Direction, u64, bool, Duration) = (queue, direction, bytes, ok, latency);
    }
}

/// An observer that does not look.
#[derive(Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {}
