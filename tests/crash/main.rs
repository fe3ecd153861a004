//! Crash states under the whole daemon: a simulated host that ends at any step, and what is found afterwards.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

use std::sync::OnceLock;

#[path = "../common/alone.rs"]
mod alone;
mod commands;
mod defects;
mod found;
mod legs;
#[path = "../common/media.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod media;
mod records;
mod refused;
#[path = "../common/schedule.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod schedule;
mod sim;
mod spec;
mod states;
mod world;

/// What the daemon says, too.
struct Told;

impl log::Log for Told {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        println!("  {}: {}", record.level(), record.args());
    }
    fn flush(&self) {}
}

/// Tells what happens when `CRASH_TRACE` is set.
fn trace(what: impl FnOnce() -> String) {
    static TRACES: OnceLock<bool> = OnceLock::new();
    let traces = || {
        let traces = std::env::var_os("CRASH_TRACE").is_some();
        if traces && log::set_logger(&Told).is_ok() {
            log::set_max_level(log::LevelFilter::Debug);
        }
        traces
    };
    if *TRACES.get_or_init(traces) {
        println!("{}", what());
    }
}
