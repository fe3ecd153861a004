//! The control socket and the command line, from outside: a real socket, the real binary, and a fake service behind.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]

mod changes;
mod changing;
mod cli;
mod exchange;
mod fake;
mod http;
mod lists;
mod openapi;
mod rig;
mod socket;
mod waiting;
