//! The whole daemon from outside: the real binary, real images on a real file system, its control socket, and a
//! vhost-user-blk client that somebody else wrote.
//!
//! Seeds are printed and can be given (HALFSILVER_SEED); longer runs are asked for with HALFSILVER_SEEDS and
//! HALFSILVER_STEPS. Tests that need root (loop devices, small file systems) say so and pass where there is none.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the sizes in these tests are small")]

mod advice;
mod announced;
mod api;
mod asking;
mod background;
mod chain;
mod changes;
mod check;
mod client;
mod doors;
mod durability;
mod faults;
mod forms;
mod golden;
mod growth;
mod guards;
mod harness;
mod hung;
mod images;
mod independent;
mod kills;
mod lifecycle;
mod load;
mod mirror;
mod mirror_jobs;
mod misconfigured;
mod no_room;
mod oracle;
mod packed;
#[cfg(feature = "planted")]
mod planted;
mod points;
mod power;
mod random;
mod refused;
mod rename;
mod restart;
mod restore;
#[allow(dead_code, unreachable_pub, reason = "shared with the tests of the wire")]
#[path = "../wire/ring.rs"]
mod ring;
mod silent;
mod stopped_jobs;
mod strangers;
mod strategies;
mod survival;
mod trouble;
mod unreadable;
mod unserved;
mod updates;
#[allow(dead_code, unreachable_pub, reason = "shared with the tests of the wire")]
#[path = "../wire/vmm.rs"]
mod vmm;
mod volumes;
mod watch;
