//! Ctrl-C: the first one asks for an orderly end, in which everything that was made is removed; the second one kills.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::Result;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(signal: libc::c_int) {
    if ASKED.swap(true, SeqCst) {
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
    ASKED.load(SeqCst)
}

/// Fails when an orderly end was asked for.
pub(crate) fn check() -> Result<()> {
    if asked() { Err("interrupted".into()) } else { Ok(()) }
}
