//! Volumes, bookmarks and the jobs survive: the daemon dies at every durable step of completing, promoting, disabling,
//! enabling, beginning anew, restoring and deleting, and at any other moment; what was acknowledged is there afterwards.
//!
//! `state.rs` is the oracle. After a death `halfsilver check` must be content, contents must be right from the first moment
//! on, jobs must end by themselves, every difference must be told, and no file may be left when all is deleted.

#[cfg(feature = "planted")]
mod points;
mod random;
mod state;
mod told;

use std::time::Duration;

use serde_json::Value;

use crate::client::Client;
use crate::harness::{Daemon, PATIENCE, Rng, names_in, wait_until};
use state::{Answered, Branch, DISK, Op, State, is_of_restore, list, text};

/// Small, so that a life is short; its blocks are few.
const SIZE: u64 = 256 << 10;
const SECTORS: usize = (SIZE / 512) as usize;
const STRATEGIES: [&str; 2] = ["copy-on-write", "write-logging"];

/// A write that was not answered: each of its sectors may be there.
struct Flight {
    what: String,
    sectors: std::ops::Range<usize>,
    tag: u64,
}

/// A daemon and what it must show.
struct Life {
    daemon: Daemon,
    rng: Rng,
    state: State,
    tag: u64,
}

impl Life {
    /// A disk of which each sector has something. The daemon does not run yet.
    fn new(seed: u64) -> Life {
        let mut daemon = Daemon::place();
        let image = daemon.make_image(DISK, SIZE);
        let content: Vec<u64> = (1..=SECTORS as u64).collect();
        let bytes: Vec<u8> = content.iter().flat_map(|tag| tag.to_le_bytes().repeat(512 / 8)).collect();
        std::fs::write(image, bytes).unwrap();
        daemon.arg_disk(DISK, "block-size=16K");
        let mut state = State::default();
        let disk = Branch { content, stands_on: None, is_volume: false, disabled: false };
        state.branches.insert(DISK.to_owned(), disk);
        Life { daemon, rng: Rng::new(seed), state, tag: 10_000 }
    }

    /// Some writes that are acknowledged and not flushed. The last one is not if the daemon died over it.
    fn write(&mut self, what: &str) -> Option<Flight> {
        let mut client = None;
        // A frontend that has just left is not forgotten at once.
        wait_until("a connection, or its death", || {
            client = Client::connect(&self.daemon.socket(what), 1, false).ok();
            client.is_some() || self.is_dead()
        });
        let Some(mut client) = client else {
            return Some(Flight { what: what.to_owned(), sectors: 0..0, tag: 0 });
        };
        for _ in 0..1 + self.rng.below(4) {
            let from = self.rng.below(SECTORS - 1);
            let sectors = from..from + 1 + self.rng.below((SECTORS - from).min(60));
            self.tag += 1;
            if !try_write(&mut client, sectors.clone(), self.tag, || self.is_dead()) {
                return Some(Flight { what: what.to_owned(), sectors, tag: self.tag });
            }
            self.state.branches.get_mut(what).unwrap().content[sectors].fill(self.tag);
        }
        None
    }

    fn is_dead(&mut self) -> bool {
        !self.daemon.is_running() || self.daemon.has_died_by(libc::SIGKILL)
    }

    /// Waits until no job is at work and no snapshot comes or goes. False if the daemon died over it.
    fn settle(&mut self) -> bool {
        let mut is_dead = false;
        let mut last = String::new();
        let deadline = std::time::Instant::now() + *PATIENCE;
        loop {
            is_dead = is_dead || self.is_dead();
            if is_dead {
                return false;
            }
            let (jobs, snapshots) = (self.daemon.get("/v1/jobs"), self.daemon.get("/v1/snapshots"));
            if (jobs.status, snapshots.status) == (200, 200) {
                let (jobs, snapshots) = (jobs.json(), snapshots.json());
                let (jobs, snapshots) = (jobs.as_array().unwrap(), snapshots.as_array().unwrap());
                let failed = jobs.iter().find(|j| j["state"] == "failed");
                assert!(failed.is_none(), "{failed:?}");
                let is_ours = |s: &Value| text(&s["name"]).starts_with("restore-");
                if jobs.iter().all(|j| j["state"] == "done")
                    && snapshots.iter().all(|s| s["state"] == "quiesced" && !is_ours(s))
                {
                    return true;
                }
                last = format!("{jobs:?} {snapshots:?}");
            }
            assert!(std::time::Instant::now() < deadline, "it does not come to rest: {last}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What was not to be: a snapshot of a restore that a kill left, which a user deletes.
    fn delete_left_by_restores(&self) {
        wait_until("jobs to end", || list(&self.daemon, "jobs").iter().all(|j| j["state"] != "running"));
        for snapshot in list(&self.daemon, "snapshots") {
            let name = format!("{}@{}", text(&snapshot["disk"]), text(&snapshot["name"]));
            if is_of_restore(&name) && self.daemon.get(&format!("/v1/snapshots/{name}")).status == 200 {
                let answer = self.daemon.send("DELETE", &format!("/v1/snapshots/{name}?force=true"), "");
                assert!(answer.status == 404 || answer.status < 300, "{}", answer.body);
            }
        }
    }

    /// The daemon is dead; what the next ones make of it is one of these states, and stays it.
    fn rise(&mut self, mut allowed: Vec<State>, flight: Option<Flight>, what: &str) {
        self.require_content_check(what, false);
        self.daemon.start();
        let reads = State::reads_of(&self.daemon);
        if let Some(Flight { what, sectors, tag }) = flight {
            for state in &mut allowed {
                let (Some(branch), Some(read)) = (state.branches.get_mut(&what), reads.get(&what)) else { continue };
                sectors.clone().filter(|&at| read[at] == tag).for_each(|at| branch.content[at] = tag);
            }
        }
        let allowed: Vec<_> = allowed.iter().filter(|state| state.allows(&reads)).cloned().collect();
        assert!(!allowed.is_empty(), "{what}: at once it shows what was never there: {reads:?}");
        self.delete_left_by_restores();
        assert!(self.settle(), "{what}: it died without being killed");
        self.look(&allowed, what);
    }

    /// What is seen at rest is one of these states.
    fn look(&mut self, allowed: &[State], what: &str) {
        let found = State::of(&self.daemon, allowed);
        let Some(state) = allowed.iter().find(|state| **state == found) else {
            panic!("{what}: found {}\nallowed {:#?}", brief(&found), allowed.iter().map(brief).collect::<Vec<_>>());
        };
        self.state = state.clone();
        self.state.require_differences(&self.daemon, what);
    }

    /// `halfsilver check` finds nothing wrong; after a clean stop nothing at all.
    fn require_content_check(&self, what: &str, is_clean: bool) {
        let output = self.daemon.check(&["--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["ok"], true, "{what}: {report}");
        if is_clean {
            assert_eq!(report["findings"], serde_json::json!([]), "{what}: after a clean stop");
        }
    }

    /// A clean stop and a start change nothing.
    fn stop_and_start(&mut self, what: &str) {
        self.daemon.stop();
        self.require_content_check(what, true);
        self.daemon.start();
        let now = self.state.clone();
        self.look(&[now], what);
    }

    /// Everything goes, and nothing is left but the disk, and raw images of what became one.
    fn delete_all(&mut self, what: &str) {
        while let Some(op) = self.next_deletion() {
            let after = op.outcomes(&self.state).pop().unwrap();
            assert_eq!(op.ask(&self.daemon), Answered::Yes, "{what}: {op:?}");
            assert!(self.settle());
            self.state = after;
        }
        let promoted: Vec<String> = self.state.branches.keys().filter(|name| *name != DISK).cloned().collect();
        for name in promoted {
            let image = text(&self.daemon.show_disk(&name)["path"]);
            wait_until("its reader to be forgotten", || self.daemon.show_disk(&name)["frontends"] == 0);
            assert_eq!(self.daemon.send("DELETE", &format!("/v1/disks/{name}"), "").status, 204, "{what}");
            let bytes = std::fs::read(&image).unwrap();
            assert_eq!(crate::client::tags(&bytes), self.state.branches[&name].content, "{what}: {name} alone");
            std::fs::remove_file(image).unwrap();
            self.state.branches.remove(&name);
        }
        let images = names_in(&self.daemon.state_dir().join("images"));
        assert!(images.is_empty(), "{what}: {images:?}");
        self.daemon.assert_only_disks_left();
        let now = self.state.clone();
        self.look(&[now], what);
    }

    /// What can be deleted next: volumes before what they stand on.
    fn next_deletion(&self) -> Option<Op> {
        let State { branches, snapshots, bookmarks } = &self.state;
        let stands = |of: &str| branches.values().any(|b| b.stands_on.as_ref().is_some_and(|on| on == of));
        let volume = branches.iter().find(|(name, b)| {
            let of = format!("{name}@");
            b.is_volume && !snapshots.keys().any(|s| s.starts_with(&of) && stands(s))
        });
        if let Some((name, _)) = volume {
            return Some(Op::DeleteVolume(name.clone()));
        }
        if let Some(snapshot) = snapshots.keys().find(|s| !stands(s)) {
            return Some(Op::DeleteSnapshot { snapshot: snapshot.clone(), keep_bookmark: false });
        }
        bookmarks.keys().next().map(|bookmark| Op::DeleteBookmark(bookmark.clone()))
    }
}

/// Writes, and waits for the answer or the end of the daemon. Whether the answer came.
fn try_write(
    client: &mut Client,
    sectors: std::ops::Range<usize>,
    tag: u64,
    mut is_over: impl FnMut() -> bool,
) -> bool {
    client.queues[0].submit_write(0, sectors, tag, false);
    let deadline = std::time::Instant::now() + *PATIENCE;
    loop {
        let was_over = is_over();
        match client.queues[0].answers(Duration::from_millis(if was_over { 1 } else { 20 })).as_slice() {
            [] if was_over => return false,
            [] => assert!(std::time::Instant::now() < deadline, "a write is not answered"),
            answers => {
                assert_eq!(answers, [(0, 0)]);
                return true;
            }
        }
    }
}

/// A state in a few words.
fn brief(state: &State) -> String {
    let sum =
        |content: &[u64]| content.iter().fold(0_u64, |sum, tag| sum.wrapping_mul(31).wrapping_add(*tag)) % 100_000;
    let mut all = String::new();
    for (name, b) in &state.branches {
        all += &format!(
            "{name}={} on {:?} volume {} disabled {}; ",
            sum(&b.content),
            b.stands_on,
            b.is_volume,
            b.disabled
        );
    }
    for (kind, moments) in [("snapshot", &state.snapshots), ("bookmark", &state.bookmarks)] {
        moments.iter().for_each(|(name, content)| all += &format!("{kind} {name}={}; ", sum(content)));
    }
    all
}
