//! The daemon: configuration, wiring, start and stop.
//!
//! [`config`] turns the command line and the configuration file into a [`ServeConfig`]; [`serve`] runs it: directories
//! and lock, records, disks, control socket, then it waits for SIGTERM or SIGINT and goes down without loss.

pub mod check;
pub mod config;
mod diff;
mod service;
mod start;
mod stop;

use std::sync::Arc;

use config::ServeConfig;

use crate::control::{ApiError, ErrorCode, Server, ServerError};
use crate::host::{Machine, probe_ring};
use crate::manager::{Manager, OpenError, PlaceError, Places};
use crate::store::RecordError;
pub use start::Given;

/// Why the daemon did not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A directory cannot be used.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The records cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// What is remembered cannot be gone on with.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// An option names what is not there.
    #[error("{0}")]
    Option(ApiError),
    /// A disk cannot be served.
    #[error(transparent)]
    Disk(#[from] ApiError),
    /// The control socket cannot be opened.
    #[error(transparent)]
    Control(#[from] ServerError),
    /// The system refused something basic.
    #[error("{0}")]
    System(String),
    /// Not everything could be saved at the end.
    #[error("{0}; the snapshots of that disk will not be vouched for at the next start")]
    Unsaved(String),
    /// Something did not end in time.
    #[error("{0}; what they have is as after a kill, and nothing that was acknowledged is lost")]
    Hung(String),
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When something cannot be served, or not everything could be saved at the end.
pub fn serve(config: ServeConfig) -> Result<(), ServeError> {
    // Everything we make is ours alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // Before any thread starts, so that none of them is interrupted.
    let signals = Signals::block()?;
    raise_descriptor_limit();
    // Before anything is looked at: without it every disk would seem to be broken.
    probe_ring().map_err(ServeError::System)?;
    let places = Places::open(&config.state_dir, &config.run_dir)?;
    let manager = Manager::open(Arc::new(Machine), places)?;
    let served = start(&manager, &config);
    let control = match served {
        Ok(control) => control,
        Err(e) => {
            // What was taken up already goes back as it was.
            if let Err(also) = manager.stop() {
                log::error!("{also}");
            }
            return Err(e);
        }
    };
    manager.listening();
    notify(&[sd_notify::NotifyState::Ready]);
    log::info!("ready; the control socket is {}", config.control.display());
    let signal = signals.wait()?;
    log::info!("{signal}: going down");
    notify(&[sd_notify::NotifyState::Stopping]);
    manager.going_down();
    control.shutdown();
    let stopped = manager.stop();
    if matches!(stopped, Err(ServeError::Hung(_))) {
        // Nobody may wait for what still hangs, not even to take it down.
        std::mem::forget(manager);
    }
    stopped?;
    log::info!("all is saved");
    Ok(())
}

fn start(manager: &Arc<Manager>, config: &ServeConfig) -> Result<Server, ServeError> {
    let (disks, bad_disks, take_flushed) = (&config.disks, &config.bad_disks, &config.take_flushed);
    let given = Given { disks, bad_disks, take_flushed, strict: config.strict };
    manager.refuse_unknown(given).map_err(|e| match e.code {
        ErrorCode::DiskNotFound => ServeError::Option(e),
        _ => ServeError::Disk(e),
    })?;
    manager.take_up(given)?;
    Ok(Server::start(&config.control, manager.clone())?)
}

/// SIGTERM and SIGINT, taken by waiting rather than by a handler.
struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks the signals in this thread and all that it starts.
    fn block() -> Result<Signals, ServeError> {
        // SAFETY: sigset_t is plain data that sigemptyset initialises.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is a valid sigset_t across these calls; no pointer is kept.
        let rc = unsafe {
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            let mut blocked = set;
            // A write beyond the limit of file sizes is to be an error of that write, not the end of all disks.
            libc::sigaddset(&raw mut blocked, libc::SIGXFSZ);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, std::ptr::null_mut())
        };
        if rc == 0 { Ok(Signals(set)) } else { Err(ServeError::System(format!("cannot block signals: error {rc}"))) }
    }

    fn wait(&self) -> Result<&'static str, ServeError> {
        let mut signal = 0;
        // SAFETY: both point to values that live across the call.
        let rc = unsafe { libc::sigwait(&raw const self.0, &raw mut signal) };
        match (rc, signal) {
            (0, libc::SIGINT) => Ok("SIGINT"),
            (0, _) => Ok("SIGTERM"),
            _ => Err(ServeError::System(format!("cannot wait for signals: error {rc}"))),
        }
    }
}

fn notify(state: &[sd_notify::NotifyState]) {
    if let Err(e) = sd_notify::notify(state) {
        log::warn!("cannot tell the service manager: {e}");
    }
}

/// Each queue of each disk takes a few descriptors.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        log::warn!("cannot raise the limit of open files: {e}");
    }
}
