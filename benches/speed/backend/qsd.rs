//! qemu-storage-daemon: a vhost-user-blk export of a raw file with an iothread, and its QMP monitor.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::child::{PATIENCE, Server};
use crate::place::Place;
use crate::{Result, stop};

/// How it does its I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Aio {
    IoUring,
    Native,
}

impl Aio {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Aio::IoUring => "io_uring",
            Aio::Native => "native",
        }
    }
}

/// A running qemu-storage-daemon.
pub(crate) struct Qsd {
    name: String,
    socket: PathBuf,
    monitor: Monitor,
    server: Server,
}

impl Qsd {
    /// The same server under another name in tables and results.
    pub(crate) fn named(self, name: &str) -> Qsd {
        Qsd { name: name.to_owned(), ..self }
    }

    /// The name in tables and results.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Serves an image. Its lock is left out: the same image is served by the other backends.
    pub(crate) fn start(place: &Place, label: &str, image: &Path, aio: Aio, queues: usize) -> Result<Qsd> {
        let socket = place.run(&format!("qsd-{label}.sock"));
        let qmp = place.run(&format!("qsd-{label}.qmp"));
        let (image, aio) = (image.display(), aio.name());
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", "iothread,id=io0"]).args([
            "--blockdev",
            &format!("driver=file,node-name=disk0,filename={image},aio={aio},cache.direct=on,locking=off"),
        ]);
        let (at, iothread) = (socket.display(), "writable=on,iothread=io0");
        command.args([
            "--export",
            &format!(
                "type=vhost-user-blk,id=export0,node-name=disk0,addr.type=unix,addr.path={at},num-queues={queues},\
                 {iothread}"
            ),
        ]);
        command.args(["--chardev", &format!("socket,id=qmp0,path={},server=on,wait=off", qmp.display())]);
        command.args(["--monitor", "chardev=qmp0"]);
        let mut server = Server::start(command, &place.run(&format!("qsd-{label}.log")))?;
        server.wait_for("qemu-storage-daemon", || socket.exists() && qmp.exists())?;
        let monitor = Monitor::connect(&qmp)?;
        Ok(Qsd { name: "qsd".to_owned(), socket, monitor, server })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.server.pid()
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        self.server.kill()
    }

    /// Begins to copy what is about to be overwritten into a file, which must be there and as long as the image.
    pub(crate) fn begin_copy_before_write(&mut self, target: &Path, aio: Aio) -> Result<()> {
        self.begin_backup(target, aio, json!({ "sync": "none" }))
    }

    /// Begins to copy all that is there at this moment, at first next to nothing of it.
    pub(crate) fn begin_full_backup(&mut self, target: &Path, aio: Aio) -> Result<()> {
        self.begin_backup(target, aio, json!({ "sync": "full", "speed": 65536 }))
    }

    /// From now on it copies as fast as it can.
    pub(crate) fn unleash(&mut self) -> Result<()> {
        self.monitor.command("block-job-set-speed", &json!({ "device": "job0", "speed": 0 }))
    }

    fn begin_backup(&mut self, target: &Path, aio: Aio, mut job: Value) -> Result<()> {
        let file = json!({
            "driver": "file", "node-name": "target0", "filename": target, "aio": aio.name(),
            "cache": { "direct": true }, "locking": "off",
        });
        self.monitor.command("blockdev-add", &file)?;
        for (key, value) in [("job-id", "job0"), ("device", "disk0"), ("target", "target0")] {
            job[key] = value.into();
        }
        self.monitor.command("blockdev-backup", &job)
    }

    /// Bytes that the job has copied and will have copied in the end; None when it has ended.
    pub(crate) fn progress(&mut self) -> Result<Option<(u64, u64)>> {
        let jobs = self.monitor.ask("query-jobs", &json!({}))?;
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == "job0"));
        Ok(job.and_then(|job| Some((job["current-progress"].as_u64()?, job["total-progress"].as_u64()?))))
    }

    /// Ends that if it has not ended, and lets the file go.
    pub(crate) fn end_copy_before_write(&mut self) -> Result<()> {
        if self.progress()?.is_some() {
            self.monitor.command("job-cancel", &json!({ "id": "job0" }))?;
            while self.progress()?.is_some() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.monitor.command("blockdev-del", &json!({ "node-name": "target0" }))
    }
}

/// The monitor: one command at a time. Events are skipped.
struct Monitor {
    from: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects and is greeted. A connection that comes while the daemon starts is now and then never greeted.
    fn connect(path: &Path) -> Result<Monitor> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Monitor::greet(path) {
                Ok(monitor) => return Ok(monitor),
                Err(e) if Instant::now() > deadline || stop::asked() => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn greet(path: &Path) -> Result<Monitor> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut monitor = Monitor { from: BufReader::new(stream) };
        monitor.line()?;
        monitor.command("qmp_capabilities", &json!({}))?;
        monitor.from.get_ref().set_read_timeout(Some(PATIENCE))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            return Err("qemu-storage-daemon closed its monitor".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Sends a command and takes its answer. QEMU 7.2 now and then loses the first bytes that it is sent after its start. It
    /// complains of each piece of what is left, without the command's id, and has done nothing then: it is told again, once.
    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": command }));
        self.from.get_mut().write_all(text.as_bytes())?;
        let mut told_again = false;
        loop {
            let mut answer = self.line()?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            match (answer.get("error"), answer.get("id")) {
                (None, _) => {}
                (Some(_), Some(_)) => {
                    return Err(format!("qemu-storage-daemon refused {command} {arguments}: {answer}").into());
                }
                (Some(_), None) if told_again => {}
                (Some(_), None) => {
                    told_again = true;
                    self.from.get_mut().write_all(text.as_bytes())?;
                }
            }
        }
    }

    fn command(&mut self, command: &str, arguments: &Value) -> Result<()> {
        self.ask(command, arguments).map(drop)
    }
}
