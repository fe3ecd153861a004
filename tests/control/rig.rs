//! A control server with the fake service behind it.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use halfsilver::control::api::DiskConfig;
use halfsilver::control::{Server, Service};
use serde_json::Value;

use crate::exchange::{Answer, exchange};
use crate::fake::{Fake, name};

/// Long enough for a loaded machine, short enough for a hang to be seen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A server with a fake behind it, in a directory of its own.
pub(crate) struct Rig {
    pub(crate) fake: Arc<Fake>,
    pub(crate) server: Server,
    pub(crate) path: PathBuf,
    pub(crate) directory: tempfile::TempDir,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let fake = Arc::new(Fake::default());
        let service: Arc<dyn Service> = fake.clone();
        let server = Server::start(&path, service).unwrap();
        Self { fake, server, path, directory }
    }

    /// With the disks vm1 and vm2.
    pub(crate) fn with_disks() -> Self {
        let rig = Self::new();
        for disk in ["vm1", "vm2"] {
            rig.fake.put_disk(&name(disk), &DiskConfig::new(format!("/images/{disk}.raw"))).unwrap();
        }
        rig
    }

    /// With vm1@daily too, still draining.
    pub(crate) fn with_snapshot(strategy: &str) -> Self {
        let rig = Self::with_disks();
        let body = format!(r#"{{"name":"daily","disks":["vm1"],"strategy":"{strategy}"}}"#);
        assert_eq!(rig.post("/v1/snapshots", &body).status, 201);
        rig
    }

    pub(crate) fn get(&self, target: &str) -> Answer {
        self.send("GET", target, "")
    }

    pub(crate) fn post(&self, target: &str, body: &str) -> Answer {
        self.send("POST", target, body)
    }

    pub(crate) fn send(&self, method: &str, target: &str, body: &str) -> Answer {
        exchange(&self.path, method, target, body.as_bytes())
    }

    /// Sends a request that must be refused, and returns the problem.
    pub(crate) fn refused(&self, method: &str, target: &str, body: &str) -> Value {
        let answer = self.send(method, target, body);
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{method} {target}: {answer:?}");
        let problem = answer.json();
        assert_eq!(problem["status"], answer.status);
        for key in ["type", "title", "detail", "code", "action"] {
            assert!(problem[key].as_str().is_some_and(|text| !text.is_empty()), "{key} in {problem}");
        }
        problem
    }
}

/// The socket of a listener that is gone. A child that another test just made has a copy of what listens until its program
/// begins, so it may answer for a moment yet.
pub(crate) fn dead_socket(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
    while UnixStream::connect(path).is_ok() {
        std::thread::yield_now();
    }
}
