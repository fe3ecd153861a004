//! The socket file: who may use it, what it may replace, and when it goes.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use halfsilver::control::server::SHUTDOWN_GRACE;
use halfsilver::control::socket::SocketError;
use halfsilver::control::{Server, ServerError};

use crate::exchange::{exchange, listen, read_until, request};
use crate::fake::Fake;
use crate::rig::{Rig, dead_socket};

fn start(path: &Path) -> Result<Server, ServerError> {
    Server::start(path, Arc::new(Fake::default()))
}

#[test]
fn the_mode_is_0600_and_the_file_goes_at_the_end() {
    let rig = Rig::new();
    assert_eq!(fs::metadata(&rig.path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(rig.server.path(), rig.path);
    rig.server.shutdown();
    assert!(!rig.path.exists());
    let server = start(&rig.path).unwrap();
    drop(server);
    assert!(!rig.path.exists());
}

#[test]
fn a_dead_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    dead_socket(&path);
    assert!(path.exists());
    let server = start(&path).unwrap();
    assert_eq!(exchange(&path, "GET", "/v1/version", b"").status, 200);
    server.shutdown();
}

#[test]
fn a_live_socket_is_refused_and_goes_on() {
    let rig = Rig::new();
    let error = start(&rig.path).unwrap_err();
    assert!(matches!(error, ServerError::Socket(SocketError::InUse(_))), "{error}");
    assert_eq!(rig.get("/v1/version").status, 200);

    // One that listens and never accepts is alive too, even with a full backlog.
    let path = rig.directory.path().join("deaf.sock");
    let _deaf = UnixListener::bind(&path).unwrap();
    assert!(matches!(start(&path), Err(ServerError::Socket(SocketError::InUse(_)))));
}

#[test]
fn only_a_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let dead = directory.path().join("dead.sock");
    dead_socket(&dead);
    let precious = |path: &Path| fs::write(path, "precious").unwrap();
    let make: [(&str, &dyn Fn()); 4] = [
        ("a file", &|| precious(&path)),
        ("a directory", &|| fs::create_dir(&path).unwrap()),
        ("a link to a dead socket", &|| symlink(&dead, &path).unwrap()),
        ("a link to nothing", &|| symlink("/no/such", &path).unwrap()),
    ];
    for (what, make) in make {
        make();
        let error = start(&path).unwrap_err();
        assert!(matches!(error, ServerError::Socket(SocketError::NotASocket(_))), "{what}: {error}");
        fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
    }
    assert!(dead.exists());
}

#[test]
fn impossible_places_are_refused_clearly() {
    let directory = tempfile::tempdir().unwrap();
    let missing = start(&directory.path().join("none/control.sock")).unwrap_err().to_string();
    assert!(missing.contains("none/control.sock") && missing.contains("No such file"), "{missing}");
    let long = start(&directory.path().join("x".repeat(108))).unwrap_err();
    assert!(matches!(long, ServerError::Socket(SocketError::TooLong(_))), "{long}");
}

#[test]
fn only_one_of_many_starts_wins() {
    const STARTS: usize = 4;
    let directory = tempfile::tempdir().unwrap();
    // The window is narrow, so it is tried often: without the lock about one round in a hundred goes wrong.
    for round in 0..400 {
        let path = directory.path().join(format!("{round}.sock"));
        dead_socket(&path);
        let together = Barrier::new(STARTS);
        let start_together = || {
            together.wait();
            start(&path)
        };
        let started: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..STARTS).map(|_| scope.spawn(start_together)).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
        });
        assert_eq!(started.len(), 1, "round {round}");
        assert!(path.exists());
    }
}

#[test]
fn listeners_and_silent_clients_do_not_hold_up_the_end() {
    let rig = Rig::new();
    let mut listener = listen(&rig.path);
    let _silent = UnixStream::connect(&rig.path).unwrap();
    let mut half = request(&rig.path, "GET", "/v1/version", b"");
    read_until(&mut half, "{");
    let start = Instant::now();
    rig.server.shutdown();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let mut rest = String::new();
    listener.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("0\r\n\r\n"), "the stream ends in order: {rest:?}");
    assert!(!rig.path.exists());
}

#[test]
fn a_client_that_never_finishes_is_cut_off_at_the_end() {
    use std::io::Write;
    let rig = Rig::new();
    let mut slow = UnixStream::connect(&rig.path).unwrap();
    slow.write_all(b"PUT /v1/disks/vm1 HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{").unwrap();
    assert_eq!(rig.get("/v1/version").status, 200);
    let start = Instant::now();
    rig.server.shutdown();
    assert!(start.elapsed() < SHUTDOWN_GRACE + Duration::from_secs(2), "{:?}", start.elapsed());
}

/// Only root can become another user, so this shows something only there.
#[test]
fn another_user_is_dropped_even_if_the_mode_lets_it_in() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let rig = Rig::new();
    fs::set_permissions(rig.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&rig.path, fs::Permissions::from_mode(0o666)).unwrap();
    let program = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
        try:\n    s.sendall(b'GET /v1/version HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n    got = s.recv(100)\n\
        except OSError:\n    got = b''\nsys.exit(len(got))\n";
    let run = |uid: u32| {
        use std::os::unix::process::CommandExt;
        Command::new("python3").args(["-c", program]).arg(&rig.path).uid(uid).status()
    };
    let Ok(root) = run(0) else { return };
    assert_eq!(root.code(), Some(100), "root is answered");
    assert_eq!(run(65_534).unwrap().code(), Some(0), "nobody is not");
}
