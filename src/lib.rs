//! halfsilver: a vhost-user-blk backend that freezes a running disk into a point-in-time volume.
//!
//! The rooms, and what each may use (`tests/architecture.rs` keeps this table true; docs/architecture.md has the picture):
//!
//! | room         | one job                                                   | may use                       |
//! |--------------|-----------------------------------------------------------|-------------------------------|
//! | `image`      | bytes at positions; owns buffers until the kernel is done | sync                          |
//! | `store`      | durable records, and tables of blocks                     | image, crash                  |
//! | `engine`     | epochs, versions, block locks, copy-on-write              | image, store, sync            |
//! | `job`        | paced background copying over `engine`                    | engine, store, image, crash   |
//! | `door`       | what others ask of `engine` and `job`, by values          | engine, job, store, image, host |
//! | `vhost_user` | untrusted guest and frontend bytes into typed requests    | engine, image, crash          |
//! | `host`       | the world as commands and starts touch it; this machine   | image, store, vhost_user      |
//! | `control`    | HTTP API, events, metrics; no policy                      | –                             |
//! | `registry`   | what there is, and what needs what; decides, purely       | control (names and words)     |
//! | `recovery`   | what a start makes of what was left: decided, and opened  | door, store, image, host      |
//! | `manager`    | who is served, who changes what, what is tried again      | registry, recovery, control, door, vhost_user, store, image, host, crash |
//! | `ops`        | one file a command: what it does, in which order          | manager, registry, recovery, control, door, vhost_user, store, image, host, crash |
//! | `daemon`     | configuration, start and stop, the service for `control`  | manager, recovery, control, door, vhost_user, store, host |
//! | `cli`        | the command line, a client of the API                     | control, daemon (for `serve`, `check`) |
//! | `sync`       | the synchronisation types that explored tests replace     | –                             |
//! | `crash`      | points at which a test kills the program                  | –                             |

pub mod cli;
pub mod control;
mod crash;
pub mod daemon;
pub mod door;
pub mod engine;
pub mod host;
pub mod image;
pub mod job;
pub mod manager;
mod ops;
pub mod recovery;
pub mod registry;
pub mod store;
mod sync;
pub mod vhost_user;
