//! One daemon in a directory of its own: start, ask, stop, kill. Its log is shown when a test fails.

pub(crate) use crate::random::{Rng, from_env, seeds};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::Client;

/// How long anything may take that should be quick. Generous: the machine may be busy.
pub(crate) static PATIENCE: LazyLock<Duration> =
    LazyLock::new(|| Duration::from_secs(from_env("HALFSILVER_PATIENCE", 60)));

thread_local! {
    /// The deliberate defect that daemons started by this thread have.
    pub(crate) static PLANT: std::cell::RefCell<Option<String>> = const { std::cell::RefCell::new(None) };
}

/// A place with images, and the daemon that serves them.
pub(crate) struct Daemon {
    pub(crate) dir: Arc<TempDir>,
    name: String,
    /// Whose run directory it has: its own, unless told otherwise.
    run: String,
    child: Option<Child>,
    args: Vec<String>,
    /// The next one that is started kills itself at this point (src/crash.rs).
    pub(crate) crash_at: Option<String>,
}

/// What the control socket answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    #[track_caller]
    pub(crate) fn ok(&self) -> &Answer {
        assert!((200..300).contains(&self.status), "{} {}", self.status, self.body);
        self
    }

    /// The code of a refusal.
    #[track_caller]
    pub(crate) fn refused(&self) -> String {
        assert!(self.status >= 400, "{} {}", self.status, self.body);
        self.json()["code"].as_str().unwrap().to_owned()
    }
}

impl Daemon {
    /// A place in the temporary directory, with nothing in it and no daemon yet.
    pub(crate) fn place() -> Daemon {
        let dir = Arc::new(tempfile::Builder::new().prefix("hs-").tempdir().unwrap());
        Daemon { dir, name: "d".to_owned(), run: "d".to_owned(), child: None, args: Vec::new(), crash_at: None }
    }

    /// A daemon with disks vm0, vm1 … of these sizes, filled with nothing.
    pub(crate) fn with_disks(sizes: &[u64], options: &str) -> Daemon {
        let mut daemon = Daemon::place();
        for (i, &size) in sizes.iter().enumerate() {
            daemon.make_image(&format!("vm{i}"), size);
            daemon.arg_disk(&format!("vm{i}"), options);
        }
        daemon.start();
        daemon
    }

    /// Another daemon in the same directory, with a state and run directory of its own.
    pub(crate) fn beside(&self, name: &str) -> Daemon {
        Daemon {
            dir: self.dir.clone(),
            name: name.to_owned(),
            run: name.to_owned(),
            child: None,
            args: Vec::new(),
            crash_at: None,
        }
    }

    /// Another daemon with a state directory of its own in this one's run directory.
    pub(crate) fn beside_in_run_dir(&self, name: &str) -> Daemon {
        let mut other = self.beside(name);
        other.run.clone_from(&self.run);
        other
    }

    pub(crate) fn make_image(&self, disk: &str, size: u64) -> PathBuf {
        let path = self.image(disk);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// Serves this image from the next start on.
    pub(crate) fn arg_disk(&mut self, disk: &str, options: &str) {
        self.arg_disk_at(disk, &self.image(disk), options);
    }

    pub(crate) fn arg_disk_at(&mut self, disk: &str, image: &Path, options: &str) {
        let comma = if options.is_empty() { "" } else { "," };
        self.args.extend(["--disk".to_owned(), format!("name={disk},path={}{comma}{options}", image.display())]);
    }

    pub(crate) fn arg(&mut self, arg: &str) {
        self.args.push(arg.to_owned());
    }

    pub(crate) fn forget_args(&mut self) {
        self.args.clear();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn image(&self, disk: &str) -> PathBuf {
        self.path(&format!("{disk}.raw"))
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.path(&format!("{}-state", self.name))
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.path(&format!("{}-run", self.run))
    }

    /// The socket of a disk or of `disk@snapshot`.
    pub(crate) fn socket(&self, what: &str) -> PathBuf {
        self.run_dir().join(format!("{what}.sock"))
    }

    pub(crate) fn snapshot_image(&self, reference: &str) -> PathBuf {
        self.state_dir().join("images").join(format!("{reference}.img"))
    }

    pub(crate) fn durable_table(&self, id: &str) -> PathBuf {
        self.state_dir().join("tables").join(format!("{id}.table"))
    }

    fn control(&self) -> PathBuf {
        self.run_dir().join("control.sock")
    }

    fn log(&self) -> PathBuf {
        self.path(&format!("{}.log", self.name))
    }

    pub(crate) fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// The program, in the boot of the machine that the daemon finds itself in.
    pub(crate) fn program(&self) -> Command {
        let boot_id = self.boot_id();
        if !boot_id.exists() {
            return command(env!("CARGO_BIN_EXE_halfsilver"));
        }
        // Private from /proc on, which is a mount also where the root is none (in a chroot).
        let mut unshare = command("unshare");
        let hide = format!("mount --bind {} /proc/sys/kernel/random/boot_id", boot_id.display());
        let script = format!("mount --make-private /proc && {hide} && exec \"$0\" \"$@\"");
        unshare.args(["-m", "--propagation", "unchanged", "sh", "-c", &script]);
        unshare.arg(env!("CARGO_BIN_EXE_halfsilver"));
        unshare
    }

    pub(crate) fn serve_command(&self) -> Command {
        let log = File::options().create(true).append(true).open(self.log()).unwrap();
        let mut command = self.program();
        command.args(["serve", "--state-dir"]).arg(self.state_dir()).arg("--run-dir").arg(self.run_dir());
        if let Some(defect) = PLANT.with(|p| p.borrow().clone()) {
            command.env("HALFSILVER_PLANT", defect);
        }
        if let Some(at) = &self.crash_at {
            command.env("HALFSILVER_CRASH_AT", at);
        }
        command.args(&self.args).env_remove("HALFSILVER_CONTROL").env_remove("NOTIFY_SOCKET").env("RUST_LOG", "info");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
    }

    /// Starts the daemon, and waits for nothing.
    pub(crate) fn spawn(&mut self) {
        assert!(self.child.is_none());
        self.child = Some(self.serve_command().spawn().unwrap());
    }

    /// `halfsilver check` of this daemon's directories.
    pub(crate) fn check(&self, args: &[&str]) -> Output {
        let mut command = self.program();
        command.args(["check", "--state-dir"]).arg(self.state_dir()).arg("--run-dir").arg(self.run_dir());
        command.args(args).env_remove("HALFSILVER_CONTROL").stdin(Stdio::null());
        command.output().unwrap()
    }

    /// Starts the daemon and waits until it serves.
    #[track_caller]
    pub(crate) fn start(&mut self) {
        self.spawn();
        self.wait_up();
    }

    /// Waits until it serves.
    #[track_caller]
    pub(crate) fn wait_up(&mut self) {
        let deadline = Instant::now() + *PATIENCE;
        while !self.is_up() {
            if let Some(status) = self.ended() {
                panic!("the daemon ended at its start with {status}:\n{}", self.log_text());
            }
            assert!(Instant::now() < deadline, "the daemon does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        UnixStream::connect(self.control()).is_ok() && self.get("/v1/status").status == 200
    }

    /// Starts a daemon that must refuse; returns what it said.
    #[track_caller]
    pub(crate) fn refused_start(&self) -> String {
        let other_is_up = self.is_up();
        let mut command = self.serve_command();
        if !self.args.iter().any(|arg| arg == "--strict") {
            command.arg("--strict");
        }
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + *PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            // One that goes on is heard of at once, if no other one answers at its place.
            if Instant::now() > deadline || !other_is_up && self.is_up() {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("a start that should be refused goes on");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(status.code(), Some(1), "{text}");
        text
    }

    pub(crate) fn terminate(&self) {
        self.signal(libc::SIGTERM);
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: kill touches no memory; the child is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(self.pid() as i32, signal) }, 0);
    }

    pub(crate) fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Fails if it has ended.
    #[track_caller]
    pub(crate) fn require_running(&mut self) {
        if let Some(status) = self.ended() {
            panic!("the daemon ended with {status}:\n{}", self.log_text());
        }
    }

    /// How it has ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut().unwrap().try_wait().unwrap()?;
        self.child = None;
        Some(status)
    }

    /// Whether it has ended, and well.
    #[track_caller]
    pub(crate) fn has_stopped(&mut self) -> bool {
        let ended = self.ended().inspect(|status| assert!(status.success(), "{status}:\n{}", self.log_text()));
        ended.is_some()
    }

    /// Whether it has ended, by this signal and nothing else.
    #[track_caller]
    pub(crate) fn has_died_by(&mut self, signal: i32) -> bool {
        use std::os::unix::process::ExitStatusExt;
        let Some(status) = self.ended() else { return false };
        assert_eq!(status.signal(), Some(signal), "the daemon ended with {status}:\n{}", self.log_text());
        true
    }

    #[track_caller]
    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + *PATIENCE;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// SIGTERM, and it must end well.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        self.terminate();
        let status = self.wait_exit();
        assert!(status.success(), "{status}");
    }

    pub(crate) fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.wait_exit();
    }

    fn boot_id(&self) -> PathBuf {
        self.path(&format!("{}-boot", self.name))
    }

    /// From now on the daemon finds itself in another boot of the machine. Needs root.
    pub(crate) fn boot_again(&self) {
        std::fs::write(self.boot_id(), format!("{}\n", uuid::Uuid::new_v4())).unwrap();
    }

    /// A run directory that somebody cleared after the daemon was killed.
    pub(crate) fn lose_run_tables(&self) {
        for table in names_in(&self.run_dir().join("tables")) {
            std::fs::remove_file(self.run_dir().join("tables").join(table)).unwrap();
        }
    }

    #[track_caller]
    pub(crate) fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Sends a request to the control socket.
    pub(crate) fn send(&self, method: &str, path: &str, body: &str) -> Answer {
        send(&self.control(), method, path, body)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, "")
    }

    /// A client for the control socket that can be taken to another thread.
    pub(crate) fn api(&self) -> Api {
        Api { control: self.control() }
    }

    /// The command line, as a user has it.
    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        let mut command = command(env!("CARGO_BIN_EXE_halfsilver"));
        command.arg("--control").arg(self.control()).args(args).stdin(Stdio::null());
        command.output().unwrap()
    }

    #[track_caller]
    pub(crate) fn snapshot(&self, name: &str, disks: &[&str]) -> Vec<Value> {
        self.api().snapshot(name, disks)
    }

    /// A snapshot of vm0.
    #[track_caller]
    pub(crate) fn snap(&self, name: &str) -> Value {
        self.snapshot(name, &["vm0"]).remove(0)
    }

    #[track_caller]
    pub(crate) fn show(&self, reference: &str) -> Value {
        let answer = self.get(&format!("/v1/snapshots/{reference}"));
        answer.ok();
        answer.json()
    }

    #[track_caller]
    pub(crate) fn state(&self, reference: &str) -> String {
        self.show(reference)["state"].as_str().unwrap().to_owned()
    }

    /// The snapshot is broken, says why with this word, and has no socket.
    #[track_caller]
    pub(crate) fn assert_broken(&self, reference: &str, why: &str) {
        let snapshot = self.show(reference);
        assert_eq!(snapshot["state"], "broken", "{snapshot}");
        assert!(snapshot["reason"].as_str().unwrap().contains(why), "{snapshot}");
        assert!(!self.socket(reference).exists(), "{reference} is broken and has a socket");
    }

    #[track_caller]
    pub(crate) fn delete(&self, reference: &str) {
        self.api().delete(reference);
    }

    #[track_caller]
    pub(crate) fn show_disk(&self, disk: &str) -> Value {
        let answer = self.get(&format!("/v1/disks/{disk}"));
        answer.ok();
        answer.json()
    }

    pub(crate) fn snapshots(&self) -> Vec<Value> {
        self.get("/v1/snapshots").json().as_array().unwrap().clone()
    }

    #[track_caller]
    pub(crate) fn client(&self, disk: &str) -> Client {
        connect(&self.socket(disk), 1, false)
    }

    #[track_caller]
    pub(crate) fn client_with_queues(&self, disk: &str, queues: usize) -> Client {
        connect(&self.socket(disk), queues, false)
    }

    #[track_caller]
    pub(crate) fn reader(&self, what: &str) -> Client {
        connect(&self.socket(what), 1, true)
    }

    /// All bytes of a disk or snapshot, through its socket.
    #[track_caller]
    pub(crate) fn content(&self, what: &str) -> Vec<u8> {
        self.reader(what).read_all()
    }

    pub(crate) fn events(&self) -> Events {
        Events::listen(&self.control())
    }

    /// After the last snapshot was deleted: no image, table or socket but those of the disks is left.
    #[track_caller]
    pub(crate) fn assert_only_disks_left(&self) {
        assert_eq!(self.snapshots(), Vec::<Value>::new());
        let disks = self.get("/v1/disks").json();
        let disks = disks.as_array().unwrap();
        let of = |key: &str, end: &str| {
            let mut names: Vec<_> = disks.iter().map(|d| format!("{}{end}", d[key].as_str().unwrap())).collect();
            names.sort();
            names
        };
        assert_eq!(names_in(&self.state_dir().join("images")), Vec::<String>::new());
        let tables = names_in(&self.state_dir().join("tables"));
        let own = of("id", ".table");
        assert!(tables.iter().all(|t| own.contains(t)), "{tables:?}");
        assert_eq!(names_in(&self.run_dir().join("tables")), of("id", ".bits"));
        let mut sockets = of("name", ".sock");
        sockets.extend(["control.sock", "lock", "tables"].map(str::to_owned));
        sockets.sort();
        assert_eq!(names_in(&self.run_dir()), sockets);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
        if std::thread::panicking() {
            let log = self.log_text();
            let lines: Vec<_> = log.lines().collect();
            let from = lines.len().saturating_sub(60);
            println!("--- the daemon's log, last lines:\n{}\n---", lines[from..].join("\n"));
        }
    }
}

/// A program to be run. The client library's sockets are not closed on exec: a child of another test would keep a
/// connection open that this test has closed.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    let close = || {
        // SAFETY: a plain system call; it marks descriptors of this forked child only.
        let rc = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: close() only makes a system call.
    unsafe { command.pre_exec(close) };
    command
}

/// Connects; a child of another test that has not got to its exec may hold the connection that was there before.
#[track_caller]
fn connect(socket: &Path, queues: usize, read_only: bool) -> Client {
    let deadline = Instant::now() + *PATIENCE;
    loop {
        match Client::connect(socket, queues, read_only) {
            Ok(client) => return client,
            Err(e) if Instant::now() >= deadline => panic!("{e}"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// The control socket, for another thread.
#[derive(Clone)]
pub(crate) struct Api {
    control: PathBuf,
}

impl Api {
    pub(crate) fn send(&self, method: &str, path: &str, body: &str) -> Answer {
        send(&self.control, method, path, body)
    }

    /// Takes a snapshot and waits until it is quiesced.
    #[track_caller]
    pub(crate) fn snapshot(&self, name: &str, disks: &[&str]) -> Vec<Value> {
        let answer = self.create(name, disks, &json!({ "wait": true }));
        answer.ok();
        let snapshots = answer.json().as_array().unwrap().clone();
        assert!(snapshots.iter().all(|s| s["state"] == "quiesced"), "{snapshots:?}");
        snapshots
    }

    pub(crate) fn create(&self, name: &str, disks: &[&str], options: &Value) -> Answer {
        let mut body = json!({ "name": name, "disks": disks });
        body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        self.send("POST", "/v1/snapshots", &body.to_string())
    }

    #[track_caller]
    pub(crate) fn delete(&self, reference: &str) {
        let deadline = Instant::now() + *PATIENCE;
        loop {
            let answer = self.send("DELETE", &format!("/v1/snapshots/{reference}"), "");
            match answer.status {
                202 => self.wait_gone(reference),
                // A reader that has just left is not forgotten at once.
                409 if answer.body.contains("is being read") && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                _ => drop(answer.ok()),
            }
            return;
        }
    }

    #[track_caller]
    pub(crate) fn wait_gone(&self, reference: &str) {
        wait_until("a snapshot to go", || self.send("GET", &format!("/v1/snapshots/{reference}"), "").status == 404);
    }
}

fn send(control: &Path, method: &str, path: &str, body: &str) -> Answer {
    match try_send(control, method, path, body) {
        Ok(answer) => answer,
        Err(e) => Answer { status: 599, body: json!({ "code": "no-answer", "detail": e.to_string() }).to_string() },
    }
}

fn try_send(control: &Path, method: &str, path: &str, body: &str) -> std::io::Result<Answer> {
    let mut stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(*PATIENCE * 2))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: halfsilver\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let cut = || std::io::Error::other(format!("an answer without a head: {text:?}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(cut)?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(cut)?;
    let body = match head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        true => whole_of_chunks(body).ok_or_else(cut)?,
        false => body.to_owned(),
    };
    Ok(Answer { status, body })
}

/// The body of an answer whose length was not known before. None if it was cut off.
fn whole_of_chunks(mut rest: &str) -> Option<String> {
    let mut whole = String::new();
    loop {
        let (len, more) = rest.split_once("\r\n")?;
        let len = usize::from_str_radix(len, 16).ok()?;
        if len == 0 {
            return Some(whole);
        }
        whole.push_str(more.get(..len)?);
        rest = more[len..].strip_prefix("\r\n")?;
    }
}

/// The events since it began to listen.
pub(crate) struct Events {
    seen: Arc<(Mutex<Vec<Value>>, Condvar)>,
}

impl Events {
    fn listen(control: &Path) -> Events {
        let mut stream = UnixStream::connect(control).unwrap();
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: halfsilver\r\n\r\n").unwrap();
        let mut lines = BufReader::new(stream).lines();
        // Events are numbered from the moment the head was answered.
        assert!(lines.next().unwrap().unwrap().contains("200"));
        while !lines.next().unwrap().unwrap().is_empty() {}
        let seen: Arc<(Mutex<Vec<Value>>, Condvar)> = Arc::default();
        let ours = seen.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some(event) = line.strip_prefix("data:") {
                    ours.0.lock().unwrap().push(serde_json::from_str(event).unwrap());
                    ours.1.notify_all();
                }
            }
        });
        Events { seen }
    }

    pub(crate) fn seen(&self) -> Vec<Value> {
        self.seen.0.lock().unwrap().clone()
    }

    /// Waits for an event of this kind, about this disk or `disk@snapshot`.
    #[track_caller]
    pub(crate) fn wait_for(&self, kind: &str, about: &str) -> Value {
        let (disk, snapshot) = match about.split_once('@') {
            Some((disk, snapshot)) => (json!(disk), json!(snapshot)),
            None => (json!(about), Value::Null),
        };
        let deadline = Instant::now() + *PATIENCE;
        let mut seen = self.seen.0.lock().unwrap();
        loop {
            let is_it = |e: &&Value| e["event"] == kind && e["disk"] == disk && e["snapshot"] == snapshot;
            if let Some(event) = seen.iter().find(is_it) {
                return event.clone();
            }
            let left = deadline.checked_duration_since(Instant::now());
            let left = left.unwrap_or_else(|| panic!("no {kind} of {about} in {seen:?}"));
            seen = self.seen.1.wait_timeout(seen, left).unwrap().0;
        }
    }
}

#[track_caller]
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + *PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Bytes of storage that a file takes.
pub(crate) fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Runs a program that must succeed; returns what it printed.
#[track_caller]
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = command(program).args(args).stdin(Stdio::null()).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {out}{err}");
    out.trim().to_owned()
}

/// Whether loop devices and mounts can be made here; says so where not.
pub(crate) fn can_mount(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    if !root {
        println!("{test}: skipped, it needs root and loop devices");
    }
    root
}
