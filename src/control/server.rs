//! The control server: one thread that answers HTTP/1.1 on a Unix socket.
//!
//! Invariants: it never runs on a thread of the data path and never waits for one except through the service; a peer of
//! another user is dropped before a byte of it is read; connections, headers and bodies are bounded in number, size and
//! time; it stops within [`SHUTDOWN_GRACE`] whatever its clients do, and its socket file goes first.

use std::io;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::routes::{Context, router};
use super::service::Service;
use super::socket::{self, SocketError, SocketFile, peer_allowed};
use super::stop::{self, Stop, Stopper};
use super::timestamp::Timestamp;

/// How long requests may take to finish once the server is to stop.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(3);
/// How long a client may take to send its headers, and how long an idle connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// More clients than this wait in the socket's backlog.
const CONNECTIONS_MAX: usize = 1024;
/// More blocking requests than this wait for each other: more than there may be commands ([`super::routes::COMMANDS_MAX`]), so
/// that whoever only reads has a thread whatever commands wait for.
const BLOCKING_THREADS_MAX: usize = 384;
/// The pause after a failed accept, which is how being out of file descriptors shows.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket could not be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The thread or its event loop could not be made.
    #[error("cannot start the control thread: {0}")]
    Thread(#[from] io::Error),
}

/// A running control server; dropping it stops it.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stop: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Makes the socket and answers on it from a thread of its own. Once this returns, clients can connect.
    ///
    /// # Errors
    /// If something else is at the path, its directory does not exist, or the system has no room for a thread.
    pub fn start(path: &Path, service: Arc<dyn Service>) -> Result<Self, ServerError> {
        let (listener, file) = socket::listen(path)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_name("control-call")
            .build()?;
        let (stop, stopped) = stop::channel();
        let router = router(Context { service, started_at: Timestamp::now(), stop: stopped.clone() });
        let run = move || run(runtime, listener, file, router, stopped);
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(run)?;
        Ok(Self { path: path.to_owned(), stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the socket, ends the event streams, lets requests finish for [`SHUTDOWN_GRACE`] and returns.
    pub fn shutdown(mut self) {
        self.stop_and_join();
    }

    fn stop_and_join(&mut self) {
        self.stop.stop();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the control thread had panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}

fn run(runtime: Runtime, listener: StdUnixListener, file: SocketFile, router: Router, stop: Stop) {
    let own_uid = rustix::process::geteuid().as_raw();
    let unfinished = runtime.block_on(async {
        match UnixListener::from_std(listener) {
            Ok(listener) => serve(listener, file, router, stop, own_uid).await,
            Err(error) => {
                log::error!("the control socket cannot be used: {error}");
                0
            }
        }
    });
    if unfinished > 0 {
        log::warn!("{unfinished} control requests were cut off");
    }
    // A call into the service that still blocks keeps its thread and is not waited for.
    runtime.shutdown_background();
}

/// Accepts until told to stop, then waits for the connections; returns how many did not finish in time.
async fn serve(listener: UnixListener, file: SocketFile, router: Router, mut stop: Stop, own_uid: u32) -> usize {
    let connection_stop = stop.clone();
    let stopped = stop.wait();
    tokio::pin!(stopped);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = &mut stopped => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) if is_allowed(&stream, own_uid) => {
                    connections.spawn(connection(stream, router.clone(), connection_stop.clone()));
                }
                Ok(_) => {}
                Err(error) => {
                    log::warn!("cannot accept a control connection: {error}");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
    drop(file);
    drop(listener);
    let finished = async { while connections.join_next().await.is_some() {} };
    tokio::time::timeout(SHUTDOWN_GRACE, finished).await.ok();
    connections.len()
}

fn is_allowed(stream: &UnixStream, own_uid: u32) -> bool {
    match stream.peer_cred() {
        Ok(peer) if peer_allowed(peer.uid(), own_uid) => true,
        Ok(peer) => {
            log::warn!("refused a control connection of user {}: only user {own_uid} and root may", peer.uid());
            false
        }
        Err(error) => {
            log::warn!("refused a control connection whose user is unknown: {error}");
            false
        }
    }
}

async fn connection(stream: UnixStream, router: Router, mut stop: Stop) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.wait() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        log::debug!("a control connection ended early: {error}");
    }
}
