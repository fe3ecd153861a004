//! A server as a child process: it gets no Ctrl-C of the terminal, and does not outlive this process.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Result, stop};

/// How long a server may take to start, to end or to carry out a command.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running server and its log.
pub(crate) struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts it, with its output in `log`.
    pub(crate) fn start(mut command: Command, log: &Path) -> Result<Server> {
        let file = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let in_child = || {
            // SAFETY: plain system calls; the descriptors are those of the forked child only. Without the second one
            // it would hold the sockets of clients open that the client library does not close on exec.
            let rc = unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
            };
            if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        };
        // SAFETY: the closure only makes system calls.
        unsafe { command.pre_exec(in_child) };
        let program = command.get_program().to_owned();
        let child = command.spawn().map_err(|e| format!("{}: {e}", program.display()))?;
        Ok(Server { child, log: log.to_owned() })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it is up.
    pub(crate) fn wait_for(&mut self, what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            stop::check()?;
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the server ended with {status}:\n{}", self.last_lines()).into());
            }
            if Instant::now() > deadline {
                return Err(format!("waited too long for {what}:\n{}", self.last_lines()).into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// The end of its log.
    pub(crate) fn last_lines(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Asks it to end, and waits for that.
    pub(crate) fn stop(&mut self) -> Result<()> {
        // SAFETY: a signal to a child that has not been waited for yet.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                if status.success() {
                    return Ok(());
                }
                return Err(format!("the server ended with {status}:\n{}", self.last_lines()).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err("the server does not end".into())
    }

    /// Kills it, and waits for its end.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already, or it does now; either way nothing is left to do about it.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
