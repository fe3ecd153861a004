//! Ctrl-C: the first one asks for an orderly end, in which everything that was made is removed; one that comes seconds
//! later kills.

use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

use crate::Result;

/// When an end was asked for, in seconds since the machine started; 0 when it was not.
static ASKED_AT: AtomicI64 = AtomicI64::new(0);
/// Some programs send the same signal twice at once, which is meant as one.
const SECONDS_BETWEEN: i64 = 2;

extern "C" fn on_signal(signal: libc::c_int) {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: async-signal-safe; the pointer is to a local that lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    let first = ASKED_AT.compare_exchange(0, now.tv_sec.max(1), SeqCst, SeqCst).unwrap_or_else(|at| at);
    if first != 0 && now.tv_sec - first > SECONDS_BETWEEN {
        // SAFETY: both are async-signal-safe; the default action ends the process.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
}

/// From now on SIGINT and SIGTERM are noticed instead of ending the process.
pub(crate) fn listen() {
    let handler = on_signal as extern "C" fn(libc::c_int);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only touches an atomic and makes async-signal-safe calls.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether an orderly end was asked for.
pub(crate) fn asked() -> bool {
    ASKED_AT.load(SeqCst) != 0
}

/// Fails when an orderly end was asked for.
pub(crate) fn check() -> Result<()> {
    if asked() { Err("interrupted".into()) } else { Ok(()) }
}
