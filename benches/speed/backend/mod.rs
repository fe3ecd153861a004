//! What is compared: builds of halfsilver, qemu-storage-daemon, and plain io_uring on the same file.

pub(crate) mod child;
pub(crate) mod halfsilver;
pub(crate) mod http;
pub(crate) mod qsd;

use std::path::PathBuf;
use std::time::Duration;

use crate::lane::Target;
use crate::{Result, cpu};

pub(crate) use halfsilver::Halfsilver;
pub(crate) use qsd::Qsd;

/// One contender.
pub(crate) enum Backend {
    Halfsilver(Box<Halfsilver>),
    Qsd(Qsd),
    Plain(PathBuf),
}

impl Backend {
    /// The name in tables and results.
    pub(crate) fn name(&self) -> &str {
        match self {
            Backend::Halfsilver(daemon) => daemon.name(),
            Backend::Qsd(server) => server.name(),
            Backend::Plain(_) => "io_uring",
        }
    }

    /// Where the load connects to.
    pub(crate) fn target(&self) -> Target {
        match self {
            Backend::Halfsilver(daemon) => Target::Socket(daemon.socket("vm0")),
            Backend::Qsd(server) => Target::Socket(server.socket()),
            Backend::Plain(path) => Target::File(path.clone()),
        }
    }

    /// The server's process; None when the load is the server.
    pub(crate) fn pid(&self) -> Option<u32> {
        match self {
            Backend::Halfsilver(daemon) => Some(daemon.pid()),
            Backend::Qsd(server) => Some(server.pid()),
            Backend::Plain(_) => None,
        }
    }

    /// CPU time that the server has used. With plain io_uring that is this process, its load included.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        self.pid().map_or_else(cpu::of_self, cpu::of_process)
    }
}
