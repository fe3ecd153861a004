//! The vhost-user-blk socket as frontends see it: real sockets, real shared memory, real threads.
//!
//! `ring` drives rings by hand, `blkio` is a client that somebody else wrote, the `hostile_*` tables send what nobody
//! should, `inflight` and `vmm` outlive the daemon, `shared` has several frontends on one socket. Every test runs alone (it counts descriptors and threads of this process).

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_sign_loss, missing_docs, unreachable_pub)]

mod blkio_client;
mod config;
mod events;
mod forms;
mod hostile_memory;
mod hostile_messages;
mod hostile_requests;
mod inflight;
mod orders;
mod places;
mod program;
mod ring;
mod session;
mod shared;
mod sigbus;
mod support;
mod vmm;
