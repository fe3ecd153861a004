//! Sockets of a simulated host, and what a frontend would get there.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use halfsilver::engine::Attachment;
use halfsilver::vhost_user::{Offer, QueueStats, ServeOptions, Server, SocketSource};

use super::{Sim, wait_for, yield_now};

/// What is served at a path.
pub struct Socket {
    pub attachment: Attachment,
    path: Mutex<PathBuf>,
    in_flight: AtomicUsize,
    is_closed: AtomicBool,
    is_stopped: AtomicBool,
    door: Mutex<()>,
    sim: Weak<Sim>,
}

/// A request that its server waits for.
pub struct InFlight(Arc<Socket>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Socket {
    pub(super) fn of(options: ServeOptions, sim: &Weak<Sim>) -> (PathBuf, Arc<Socket>) {
        let SocketSource::Path(path) = options.socket else { panic!("only paths are simulated") };
        let socket = Socket {
            attachment: options.attachment,
            path: Mutex::new(path.clone()),
            in_flight: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            door: Mutex::new(()),
            sim: sim.clone(),
        };
        (path, Arc::new(socket))
    }

    /// Begins a request. None when nobody serves it any more.
    pub fn begin(self: &Arc<Socket>) -> Option<InFlight> {
        if self.is_closed.load(Ordering::SeqCst) {
            return None;
        }
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        Some(InFlight(self.clone()))
    }
}

/// The daemon's side of it.
pub(super) struct Listening(pub(super) Arc<Socket>);

impl Server for Listening {
    fn stop(&self) {
        let Some(sim) = self.0.sim.upgrade() else { return };
        self.begin_to_stop();
        if self.0.is_stopped.swap(true, Ordering::SeqCst) || sim.has_ended() {
            return;
        }
        while !sim.has_ended() && self.0.in_flight.load(Ordering::SeqCst) > 0 {
            wait_for(Box::pin(yield_now()));
        }
        let path = self.0.path.lock().unwrap().clone();
        sim.process().0.sockets.remove(&path);
    }

    fn hold(&self) -> MutexGuard<'_, ()> {
        self.0.door.lock().unwrap()
    }

    fn begin_to_stop(&self) {
        self.0.is_closed.store(true, Ordering::SeqCst);
    }

    fn frontends(&self) -> usize {
        0
    }

    fn abandon(&self) {
        self.stop();
    }

    fn frontend_pids(&self) -> Vec<u32> {
        Vec::new()
    }

    fn config_changed(&self) {}

    fn stats(&self) -> QueueStats {
        QueueStats::default()
    }

    fn queue_stats(&self) -> Vec<QueueStats> {
        Vec::new()
    }

    fn offer(&self, _offer: Offer) {}

    fn move_socket(&self, to: &Path) -> io::Result<()> {
        let Some(sim) = self.0.sim.upgrade() else { return Err(io::Error::other("the machine is gone")) };
        sim.step()?;
        let mut path = self.0.path.lock().unwrap();
        let sockets = &mut sim.process().0.sockets;
        if sockets.contains_key(to) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        if let Some(socket) = sockets.remove(&*path) {
            sockets.insert(to.to_owned(), socket);
        }
        to.clone_into(&mut path);
        Ok(())
    }

    fn rename(&self, _name: String) {}
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop();
    }
}
