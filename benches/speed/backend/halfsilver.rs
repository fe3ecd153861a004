//! A halfsilver daemon with a state directory on the measured device and a run directory on a tmpfs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::child::{PATIENCE, Server};
use super::http::{self, Answer};
use crate::place::Place;
use crate::{Result, stop};

/// A build of the daemon.
#[derive(Clone)]
pub(crate) struct Build {
    /// The name in tables: `halfsilver`, or `also-1` and so on.
    pub(crate) name: String,
    pub(crate) binary: PathBuf,
}

/// A disk that it serves.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl Disk {
    pub(crate) fn new(name: &str, path: &Path) -> Disk {
        Disk { name: name.to_owned(), path: path.to_owned() }
    }
}

/// A running daemon.
pub(crate) struct Halfsilver {
    build: Build,
    queues: usize,
    disks: Vec<Disk>,
    state_dir: PathBuf,
    run_dir: PathBuf,
    log: PathBuf,
    server: Server,
}

impl Halfsilver {
    /// Starts a daemon of its own for these disks and waits until it serves.
    pub(crate) fn start(
        build: &Build,
        place: &Place,
        label: &str,
        queues: usize,
        disks: Vec<Disk>,
    ) -> Result<Halfsilver> {
        let of = |what: &str| format!("{}-{label}-{what}", build.name);
        let (state_dir, run_dir, log) = (place.image(&of("state")), place.run(&of("run")), place.run(&of("log")));
        let server = spawn(build, &state_dir, &run_dir, &log, queues, &disks)?;
        let mut daemon = Halfsilver { build: build.clone(), queues, disks, state_dir, run_dir, log, server };
        daemon.wait_up()?;
        Ok(daemon)
    }

    pub(crate) fn name(&self) -> &str {
        &self.build.name
    }

    pub(crate) fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// The socket of a disk or of `disk@snapshot`.
    pub(crate) fn socket(&self, what: &str) -> PathBuf {
        self.run_dir.join(format!("{what}.sock"))
    }

    fn wait_up(&mut self) -> Result<()> {
        let control = self.run_dir.join("control.sock");
        let is_up = || http::send(&control, "GET", "/v1/status", "").is_ok_and(|a| a.status == 200);
        self.server.wait_for("the daemon to answer", is_up)
    }

    /// Starts it again after a stop or a kill, and waits for nothing.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        self.server = spawn(&self.build, &self.state_dir, &self.run_dir, &self.log, self.queues, &self.disks)?;
        Ok(())
    }

    pub(crate) fn stop(&mut self) -> Result<()> {
        self.server.stop()
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        self.server.kill()
    }

    pub(crate) fn send(&self, method: &str, path: &str, body: &str) -> Result<Answer> {
        http::send(&self.run_dir.join("control.sock"), method, path, body)
    }

    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        self.send("GET", path, "")?.json()
    }

    /// Takes a snapshot of a disk; with `wait`, until it is quiesced.
    pub(crate) fn snapshot(&self, disk: &str, name: &str, strategy: &str, wait: bool) -> Result<()> {
        let body = json!({ "name": name, "disks": [disk], "strategy": strategy, "wait": wait }).to_string();
        let made = self.send("POST", "/v1/snapshots", &body)?.json()?;
        let snapshot = &made[0];
        if snapshot["strategy"] != strategy || (wait && snapshot["state"] != "quiesced") {
            return Err(format!("not the snapshot that was asked for: {snapshot}").into());
        }
        Ok(())
    }

    /// Makes a volume off a snapshot.
    pub(crate) fn volume(&self, name: &str, from: &str) -> Result<()> {
        let body = json!({ "name": name, "from": from }).to_string();
        self.send("POST", "/v1/volumes", &body)?.json().map(drop)
    }

    pub(crate) fn delete_volume(&self, name: &str) -> Result<()> {
        let answer = self.send("DELETE", &format!("/v1/volumes/{name}?force=true"), "")?;
        if answer.status == 204 { Ok(()) } else { Err(format!("volume {name} stays: {}", answer.body).into()) }
    }

    /// A job as it is now.
    pub(crate) fn job(&self, job: &Value) -> Result<Value> {
        self.get(&format!("/v1/jobs/{}", job["id"]))
    }

    /// Waits until a job is done.
    pub(crate) fn wait_for_job(&self, job: &Value) -> Result<()> {
        loop {
            match self.job(job)?["state"].as_str() {
                Some("done") => return Ok(()),
                Some("running") => {}
                state => return Err(format!("a job is {state:?}: {job}").into()),
            }
            stop::check()?;
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Serves a disk anew, with this durability of its snapshots. Its clients lose their connections.
    pub(crate) fn set_durability(&self, disk: &str, durability: &str) -> Result<()> {
        let Disk { path, .. } = self.disks.iter().find(|d| d.name == disk).ok_or("no such disk")?;
        self.send("DELETE", &format!("/v1/disks/{disk}?force=true"), "")?.json()?;
        let body = json!({ "path": path, "queues": self.queues, "durability": durability }).to_string();
        self.send_until_free("PUT", &format!("/v1/disks/{disk}"), &body, "it is in use")
    }

    /// Gives a disk a second leg and waits until it is in sync.
    pub(crate) fn mirror(&self, disk: &str, leg: &Path) -> Result<()> {
        self.send("POST", &format!("/v1/disks/{disk}/mirror"), &json!({ "path": leg }).to_string())?.json()?;
        self.wait_in_sync(disk)
    }

    pub(crate) fn unmirror(&self, disk: &str, leg: &Path) -> Result<()> {
        self.send("DELETE", &format!("/v1/disks/{disk}/mirror?leg={}", leg.display()), "")?.json().map(drop)
    }

    /// Waits until both legs of a disk are in sync.
    pub(crate) fn wait_in_sync(&self, disk: &str) -> Result<()> {
        loop {
            let shown = self.get(&format!("/v1/disks/{disk}"))?;
            let legs = shown["legs"].as_array().ok_or("a disk without legs")?;
            if legs.len() == 2 && legs.iter().all(|leg| leg["state"] == "in-sync") {
                return Ok(());
            }
            if let Some(failed) = legs.iter().find(|leg| leg["state"] == "failed") {
                return Err(format!("a leg failed: {failed}").into());
            }
            stop::check()?;
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks for a deletion, and waits for nothing.
    pub(crate) fn begin_delete(&self, reference: &str) -> Result<()> {
        // A reader that has just left is not forgotten at once.
        self.send_until_free("DELETE", &format!("/v1/snapshots/{reference}"), "", "is being read")
    }

    /// Sends a request again for as long as it is refused because of somebody who is about to leave.
    fn send_until_free(&self, method: &str, path: &str, body: &str, refused: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.send(method, path, body)?;
            if answer.status == 409 && answer.body.contains(refused) && Instant::now() < deadline {
                stop::check()?;
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            return answer.json().map(drop);
        }
    }

    /// Deletes a snapshot and waits until it is gone, also when that takes a fold.
    pub(crate) fn delete(&self, reference: &str) -> Result<()> {
        self.begin_delete(reference)?;
        let path = format!("/v1/snapshots/{reference}");
        while self.send("GET", &path, "")?.status != 404 {
            stop::check()?;
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

fn spawn(build: &Build, state_dir: &Path, run_dir: &Path, log: &Path, queues: usize, disks: &[Disk]) -> Result<Server> {
    let mut command = Command::new(&build.binary);
    command.arg("serve").arg("--state-dir").arg(state_dir).arg("--run-dir").arg(run_dir);
    for disk in disks {
        let Disk { name, path } = disk;
        command.args(["--disk", &format!("name={name},path={},queues={queues}", path.display())]);
    }
    command.env_remove("HALFSILVER_CONTROL").env_remove("NOTIFY_SOCKET").env("RUST_LOG", "warn");
    Server::start(command, log)
}
