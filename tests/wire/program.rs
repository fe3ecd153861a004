//! The backend program after QEMU's conventions.

use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::ring::*;
use super::support::*;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-user-halfsilver-blk");

/// A running program on a file of its own.
pub struct Program {
    pub child: Child,
    dir: tempfile::TempDir,
}

impl Program {
    pub fn start(arguments: &[&str]) -> Program {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk"), vec![5; 1 << 20]).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("--blk-file").arg(dir.path().join("disk")).args(arguments);
        command.arg("--socket-path").arg(dir.path().join("sock")).stderr(Stdio::null());
        let program = Program { child: command.spawn().unwrap(), dir };
        until("the program listens", || UnixStream::connect(program.socket()).is_ok());
        program
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already, as the test wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn capabilities_are_printed() {
    let _alone = alone();
    let output = Command::new(PROGRAM).arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json, serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]}));
}

#[test]
fn usage_is_checked() {
    let _alone = alone();
    for arguments in [&[][..], &["--socket-path", "x"], &["--blk-file", "x"], &["--fd", "3", "--socket-path", "x"]] {
        assert_eq!(Command::new(PROGRAM).args(arguments).output().unwrap().status.code(), Some(2), "{arguments:?}");
    }
    let missing = Command::new(PROGRAM).args(["--socket-path=/nowhere/s", "--blk-file=/nowhere/d"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert_eq!(String::from_utf8(missing.stderr).unwrap().trim().lines().count(), 1);
}

#[test]
fn it_serves_a_socket_until_it_is_told_to_end() {
    let _alone = alone();
    let mut program = Program::start(&[]);
    for round in 0..2 {
        let mut guest = Guest::new(&program.socket(), 1);
        guest.write_sectors(8, &[round; 512]);
        assert_eq!(guest.read_sectors(8, 512), [round; 512]);
    }
    program.signal(rustix::process::Signal::TERM);
    assert!(program.child.wait().unwrap().success());
    assert!(!program.socket().exists());
}

#[test]
fn read_only_refuses_writes() {
    let _alone = alone();
    let program = Program::start(&["--read-only"]);
    let mut guest = Guest::new(&program.socket(), 1);
    assert_eq!(guest.read_sectors(0, 512), [5; 512]);
    assert_eq!(guest.run(T_OUT, 0, &[(DATA, 512, 0)]), (S_IOERR, 1));
}

#[test]
fn it_ends_with_the_frontend_of_an_inherited_descriptor() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    std::fs::write(dir.path().join("disk"), vec![5; 1 << 20]).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let frontend = std::thread::spawn(move || Guest::new(&path, 1).read_sectors(0, 512));
    let stream = listener.accept().unwrap().0;
    let mut command = Command::new(PROGRAM);
    command.arg("--fd=9").arg("--blk-file").arg(dir.path().join("disk"));
    let inherited = stream.as_raw_fd();
    // SAFETY: dup2 is async-signal-safe, and the descriptor is open in the parent until after the spawn.
    unsafe {
        command
            .pre_exec(move || if libc::dup2(inherited, 9) == 9 { Ok(()) } else { Err(std::io::Error::last_os_error()) })
    };
    let mut child = command.spawn().unwrap();
    drop(stream);
    assert_eq!(frontend.join().unwrap(), [5; 512]);
    assert!(child.wait().unwrap().success());
    // A descriptor that is not there.
    let none = UnixStream::pair().unwrap().0.into_raw_fd() + 100;
    let mut command = Command::new(PROGRAM);
    command.arg(format!("--fd={none}")).arg("--blk-file").arg(dir.path().join("disk"));
    assert_eq!(command.output().unwrap().status.code(), Some(1));
}
