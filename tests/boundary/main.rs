//! The seam of kernel and process: what a hostile frontend does to the daemon with descriptors, mappings and memory, and
//! what it costs everybody else, which is nothing.
//!
//! Each test serves two disks. Somebody hostile is at `vm0`; at `vm1` a guest works all the time, none of whose requests
//! may fail. In the end the daemon lives, a snapshot of `vm1` is quiesced, and mappings, descriptors and threads are back
//! to where they were.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the sizes in these tests are small")]

#[allow(dead_code, unused_imports, reason = "shared with the tests of the daemon")]
#[path = "../daemon/client.rs"]
mod client;
mod copies;
mod events;
#[allow(dead_code, unused_imports, reason = "shared with the tests of the daemon")]
#[path = "../daemon/harness.rs"]
mod harness;
mod lines;
mod memory;
#[allow(dead_code, unused_imports, reason = "shared with the tests of the daemon")]
#[path = "../daemon/random.rs"]
mod random;
#[allow(dead_code, unreachable_pub, reason = "shared with the tests of the wire")]
#[path = "../wire/ring.rs"]
mod ring;
mod scene;
#[allow(dead_code, reason = "shared with the tests of the daemon")]
#[path = "../daemon/silent.rs"]
mod silent;
