//! A vhost-user-blk backend for one raw file, after the backend program conventions of QEMU's vhost-user document.
//!
//! No snapshots and no control socket: that is `halfsilver serve`. Run it where a management layer expects a backend
//! program that it starts itself.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgGroup, Parser};
use halfsilver::engine::{Attachment, Disk, Epoch, EpochClock};
use halfsilver::image::{Direct, FileImage, ImageErrorKind, ImageOptions};
use halfsilver::vhost_user::{Hints, NoObserver, ServeOptions, Server, ServerHandle, SocketSource, serve};

/// Serves a raw file or block device as a vhost-user-blk disk.
#[derive(Parser, Debug)]
#[command(version, group = ArgGroup::new("from").args(["socket_path", "fd", "print_capabilities"]).required(true))]
struct Options {
    /// Listen on a socket at this path
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
    /// Serve the frontend on this inherited descriptor, and exit when it disconnects
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(i32).range(0..))]
    fd: Option<RawFd>,
    /// Print what this program can do as JSON, and exit
    #[arg(long)]
    print_capabilities: bool,
    /// The raw file or block device to serve
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    blk_file: Option<PathBuf>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
}

const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;
const QUEUES: u16 = 4;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let options = Options::parse();
    if options.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vhost-user-halfsilver-blk: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    let file = options.blk_file.ok_or("--blk-file is missing")?;
    let once = options.fd.is_some();
    let socket = match (options.socket_path, options.fd) {
        (Some(path), _) => SocketSource::Path(path),
        (None, Some(fd)) => SocketSource::Fd(inherited(fd)?),
        (None, None) => return Err("--socket-path or --fd is missing".into()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Before the socket exists: whoever sees it may already send the signal.
    let signals = {
        let _guard = runtime.enter();
        use tokio::signal::unix::{SignalKind, signal};
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let handle = Arc::new(serve(ServeOptions {
        name: file.file_name().map_or_else(|| "disk".to_owned(), |n| n.to_string_lossy().into_owned()),
        attachment: open(&file, options.read_only)?,
        socket,
        queues: QUEUES,
        serial: "halfsilver".to_owned(),
        frontends_max: 1,
        hints: Hints::default(),
        observer: Arc::new(NoObserver),
        once,
    })?);
    runtime.block_on(until_over(signals, handle.clone()));
    handle.stop();
    // The thread that waits for the server's end has seen it.
    drop(runtime);
    Ok(())
}

async fn until_over(
    (mut terminate, mut interrupt): (tokio::signal::unix::Signal, tokio::signal::unix::Signal),
    handle: Arc<ServerHandle>,
) {
    let ended = tokio::task::spawn_blocking(move || handle.wait());
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = ended => {}
    }
}

/// Takes the descriptor that the parent left open for us.
fn inherited(fd: RawFd) -> Result<OwnedFd, String> {
    // SAFETY: asks whether the descriptor is open; no memory is involved.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(format!("--fd {fd}: no such descriptor was inherited"));
    }
    // SAFETY: open, and by the convention ours: nothing in this program has opened or taken it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Around the page cache where the file system can.
fn open(path: &Path, read_only: bool) -> Result<Attachment, String> {
    let open = |direct| FileImage::open(path, ImageOptions { direct, read_only, lock_wait: Duration::ZERO });
    let image = match open(Direct::On) {
        Err(e) if e.kind == ImageErrorKind::Unsuitable => open(Direct::Off),
        other => other,
    };
    let image = image.map_err(|e| e.to_string())?;
    let disk = Disk::plain(EpochClock::new(Epoch(0)), Arc::new(image), read_only).map_err(|e| e.to_string())?;
    Ok(disk.attach_live())
}
