//! halfsilver: a vhost-user-blk backend that freezes a running disk into a point-in-time volume.
//!
//! The rooms, and what each may use (`tests/architecture.rs` keeps this table true):
//!
//! | room         | one job                                                            | may use        |
//! |--------------|--------------------------------------------------------------------|----------------|
//! | `image`      | bytes at positions; owns buffers until the kernel is done           | –              |
//! | `store`      | durable records and tables; commit order; recovery                  | image          |
//! | `mirror`     | epochs, versions, tables, locks, strategies                         | image, store   |
//! | `job`        | paced background copying over `mirror`                              | mirror, store, image |
//! | `vhost_user` | untrusted guest and frontend bytes into typed requests              | mirror, image  |
//! | `control`    | HTTP API, events, metrics; no policy                                | mirror, job    |
//! | `daemon`     | configuration, wiring, systemd                                      | all            |
//! | `cli`        | the command line, a client of the API                               | control, daemon (for `serve`) |

pub mod cli;
pub mod control;
pub mod daemon;
pub mod image;
pub mod job;
pub mod mirror;
pub mod store;
mod sync;
pub mod vhost_user;
