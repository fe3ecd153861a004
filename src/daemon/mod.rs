//! The daemon: configuration, wiring, start and stop.
//!
//! [`config`] turns the command line and the configuration file into a [`ServeConfig`]; [`serve`] runs it: directories
//! and lock, records, disks, control socket, then it waits for SIGTERM or SIGINT and goes down without loss.

mod changes;
pub mod check;
mod complete;
pub mod config;
mod deletion;
mod diff;
mod disabling;
mod disks;
mod entry;
mod jobs;
mod layers;
mod manager;
mod mirror;
mod places;
mod quiesced;
pub mod recording;
mod restore;
mod save;
mod service;
mod snapshots;
mod standing;
mod startup;
mod strays;
mod update;
mod volumes;
mod work;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use config::ServeConfig;
use manager::HouseNews;
pub use manager::Manager;
pub use places::{PlaceError, Places};

use crate::control::{ApiError, Server, ServerError};
use crate::mirror::planted::{self, Defect};
use crate::store::RecordError;
use entry::locked;

/// Why the daemon did not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A directory cannot be used.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The records cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
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
    let places = Places::open(&config.state_dir, &config.run_dir)?;
    let manager = Manager::open(places)?;
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
    notify(&[sd_notify::NotifyState::Ready]);
    log::info!("ready; the control socket is {}", config.control.display());
    let signal = signals.wait()?;
    log::info!("{signal}: going down");
    notify(&[sd_notify::NotifyState::Stopping]);
    manager.stopping.store(true, Ordering::SeqCst);
    control.shutdown();
    manager.stop()?;
    log::info!("all is saved");
    Ok(())
}

fn start(manager: &Arc<Manager>, config: &ServeConfig) -> Result<Server, ServeError> {
    manager.take_up(&config.disks, &config.take_flushed)?;
    Ok(Server::start(&config.control, manager.clone())?)
}

impl Manager {
    /// Finishes all requests, closes all sockets and saves everything.
    ///
    /// # Errors
    /// When some disk could not be saved; all others are.
    fn stop(&self) -> Result<(), ServeError> {
        self.stopping.store(true, Ordering::SeqCst);
        // Whatever is being changed is changed now, and nothing is after this.
        drop(locked(&self.structure));
        for job in self.running_jobs() {
            job.pace.stop.store(true, Ordering::Release);
        }
        let disks: Vec<_> = std::mem::take(&mut *locked(&self.disks)).into_values().collect();
        for disk in disks.iter().filter(|_| planted::is(Defect::SavedBeforeDrained)) {
            self.save(disk).map_err(ServeError::Unsaved)?;
        }
        for disk in &disks {
            // Requests may still wait for a volume, when the start ends half way.
            if let Some(awaited) = locked(&disk.awaited).take() {
                awaited.lose("the daemon is going down".to_owned());
            }
            disk.stop_server();
            for snapshot in disk.snapshots() {
                drop(locked(&snapshot.server).take());
            }
        }
        if self.house.send(HouseNews::Stopping).is_err() {
            log::debug!("the housekeeper has left already");
        }
        // A thread may start another one before it ends, and must not wait for us.
        loop {
            let threads = std::mem::take(&mut *locked(&self.threads));
            if threads.is_empty() {
                break;
            }
            for thread in threads {
                if thread.join().is_err() {
                    log::error!("a thread panicked");
                }
            }
        }
        let mut unsaved = None;
        for disk in &disks {
            // No request is left, so every version is quiesced.
            let draining: Vec<_> = disk
                .snapshots()
                .into_iter()
                .filter(|s| s.version.is_some() && locked(&s.record).quiesced_ms.is_none())
                .map(|s| (disk.clone(), s))
                .collect();
            self.quiesced(&draining, std::time::Duration::ZERO);
            if planted::is(Defect::SavedBeforeDrained) {
                continue;
            }
            if let Err(e) = self.save(disk) {
                unsaved = Some(format!("disk {} could not be saved: {e}", disk.name));
                log::error!("{}", unsaved.as_deref().unwrap_or_default());
            }
        }
        unsaved.map_or(Ok(()), |e| Err(ServeError::Unsaved(e)))
    }
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
