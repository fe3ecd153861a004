//! What a daemon with one disk, its snapshots, volumes and bookmarks must show, as plain arrays; and what a command makes
//! of that, when its answer came and when it did not.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, wait_until};

/// A disk, or a volume.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Branch {
    /// The tag of each sector.
    pub(super) content: Vec<u64>,
    /// The snapshot that it stands on.
    pub(super) stands_on: Option<String>,
    pub(super) is_volume: bool,
    pub(super) disabled: bool,
}

/// Everything that can be seen when no job runs.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct State {
    pub(super) branches: BTreeMap<String, Branch>,
    /// `disk@name`, and what it shows.
    pub(super) snapshots: BTreeMap<String, Vec<u64>>,
    /// `disk@name`, and what it showed.
    pub(super) bookmarks: BTreeMap<String, Vec<u64>>,
}

/// What a user asks for.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Op {
    Snapshot { disk: String, name: String, strategy: &'static str },
    DeleteSnapshot { snapshot: String, keep_bookmark: bool },
    DeleteBookmark(String),
    CreateVolume { name: String, from: String },
    DeleteVolume(String),
    Complete(String),
    Promote(String),
    Disable(String),
    Enable { name: String, fresh: bool },
    Restore { from: String },
}

pub(super) const DISK: &str = "vm0";

/// What became of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Answered {
    Yes,
    /// The daemon is dead.
    No,
}

/// What a restore from a volume is taken from: a snapshot that comes and goes with it.
pub(super) fn is_of_restore(snapshot: &str) -> bool {
    snapshot.contains("@restore-")
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

pub(super) fn list(daemon: &Daemon, what: &str) -> Vec<Value> {
    let answer = daemon.get(&format!("/v1/{what}"));
    answer.ok();
    answer.json().as_array().unwrap().clone()
}

pub(super) fn shown(daemon: &Daemon, what: &str) -> Vec<u64> {
    tags(&daemon.content(what))
}

impl Op {
    fn request(&self) -> (&'static str, String, String) {
        let none = String::new;
        match self {
            Op::Snapshot { disk, name, strategy } => {
                let body = json!({ "name": name, "disks": [disk], "strategy": strategy, "wait": true });
                ("POST", "/v1/snapshots".to_owned(), body.to_string())
            }
            Op::DeleteSnapshot { snapshot, keep_bookmark } => {
                ("DELETE", format!("/v1/snapshots/{snapshot}?keep-bookmark={keep_bookmark}"), none())
            }
            Op::DeleteBookmark(bookmark) => ("DELETE", format!("/v1/bookmarks/{bookmark}"), none()),
            Op::CreateVolume { name, from } => {
                ("POST", "/v1/volumes".to_owned(), json!({ "name": name, "from": from }).to_string())
            }
            Op::DeleteVolume(name) => ("DELETE", format!("/v1/volumes/{name}?force=true"), none()),
            Op::Complete(name) => ("POST", format!("/v1/volumes/{name}/complete"), none()),
            Op::Promote(name) => ("POST", format!("/v1/volumes/{name}/promote"), none()),
            Op::Disable(name) => ("POST", format!("/v1/volumes/{name}/disable"), none()),
            Op::Enable { name, fresh } => ("POST", format!("/v1/volumes/{name}/enable?fresh={fresh}"), none()),
            Op::Restore { from } => ("POST", format!("/v1/disks/{DISK}/restore"), json!({ "from": from }).to_string()),
        }
    }

    /// Asks, and again while a frontend that has just left is not forgotten.
    #[track_caller]
    pub(super) fn ask(&self, daemon: &Daemon) -> Answered {
        let (method, path, body) = self.request();
        let mut answered = None;
        wait_until("an answer", || {
            let answer = daemon.send(method, &path, &body);
            let left = ["frontend connected", "is being read"].iter().any(|what| answer.body.contains(what));
            answered = match answer.status {
                200..300 => Some(Answered::Yes),
                599 => Some(Answered::No),
                409 if left => None,
                _ => panic!("{self:?}: {} {}", answer.status, answer.body),
            };
            answered.is_some()
        });
        answered.unwrap_or(Answered::No)
    }

    /// All that may be found when the answer did not come, when no job is left; the last one is what must be found when it
    /// came.
    pub(super) fn outcomes(&self, before: &State) -> Vec<State> {
        let mut after = before.clone();
        let mut all = vec![before.clone()];
        let branch = |state: &mut State, name: &String| -> Branch { state.branches.remove(name).unwrap() };
        match self {
            Op::Snapshot { disk, name, .. } => {
                after.snapshots.insert(format!("{disk}@{name}"), before.branches[disk].content.clone());
            }
            Op::DeleteSnapshot { snapshot, keep_bookmark } => {
                let content = after.snapshots.remove(snapshot).unwrap();
                if *keep_bookmark {
                    after.bookmarks.insert(snapshot.clone(), content);
                }
            }
            Op::DeleteBookmark(bookmark) => drop(after.bookmarks.remove(bookmark).unwrap()),
            Op::CreateVolume { name, from } => {
                let from = match from.contains('@') {
                    true => from.clone(),
                    false => {
                        let taken = format!("{from}@{name}");
                        after.snapshots.insert(taken.clone(), before.branches[from].content.clone());
                        all.push(after.clone());
                        taken
                    }
                };
                let content = after.snapshots[&from].clone();
                let made = Branch { content, stands_on: Some(from), is_volume: true, disabled: false };
                after.branches.insert(name.clone(), made);
            }
            Op::DeleteVolume(name) => {
                branch(&mut after, name);
                let of = format!("{name}@");
                after.snapshots.retain(|snapshot, _| !snapshot.starts_with(&of));
                after.bookmarks.retain(|bookmark, _| !bookmark.starts_with(&of));
            }
            Op::Complete(name) => after.branches.get_mut(name).unwrap().stands_on = None,
            Op::Promote(name) => after.branches.get_mut(name).unwrap().is_volume = false,
            Op::Disable(name) => after.branches.get_mut(name).unwrap().disabled = true,
            Op::Enable { name, fresh } => {
                let of = after.branches.get_mut(name).unwrap();
                if *fresh {
                    of.content = before.snapshots[of.stands_on.as_ref().unwrap()].clone();
                    all.push(after.clone());
                }
                after.branches.get_mut(name).unwrap().disabled = false;
            }
            Op::Restore { from } => {
                let content = before.snapshots.get(from).unwrap_or_else(|| &before.branches[from].content).clone();
                after.branches.get_mut(DISK).unwrap().content = content;
            }
        }
        all.push(after);
        all
    }
}

impl State {
    /// What can be read before the jobs have ended: whatever it is, it is there already.
    pub(super) fn reads_of(daemon: &Daemon) -> BTreeMap<String, Vec<u64>> {
        let mut reads = BTreeMap::new();
        for disk in list(daemon, "disks") {
            let name = text(&disk["name"]);
            reads.insert(name.clone(), shown(daemon, &name));
        }
        for volume in list(daemon, "volumes").iter().filter(|v| v["state"] == "serving") {
            let name = text(&volume["name"]);
            reads.insert(name.clone(), shown(daemon, &name));
        }
        for snapshot in list(daemon, "snapshots") {
            let name = format!("{}@{}", text(&snapshot["disk"]), text(&snapshot["name"]));
            if snapshot["state"] == "quiesced" && !is_of_restore(&name) {
                reads.insert(name.clone(), shown(daemon, &name));
            }
        }
        reads
    }

    /// Whether all that was read is this.
    pub(super) fn allows(&self, reads: &BTreeMap<String, Vec<u64>>) -> bool {
        reads.iter().all(|(name, content)| {
            self.branches.get(name).map(|b| &b.content).or(self.snapshots.get(name)) == Some(content)
        })
    }

    /// What is there when all jobs have ended. Disabled volumes are enabled for as long as they are read. The contents of
    /// bookmarks are those of `known`.
    pub(super) fn of(daemon: &Daemon, known: &[State]) -> State {
        let mut state = State::default();
        for disk in list(daemon, "disks") {
            let (name, restoring) = (text(&disk["name"]), &disk["restoring"]);
            assert!(disk["state"] == "serving" && restoring.is_null(), "{disk}");
            let content = shown(daemon, &name);
            state.branches.insert(name, Branch { content, stands_on: None, is_volume: false, disabled: false });
        }
        for volume in list(daemon, "volumes") {
            let name = text(&volume["name"]);
            let disabled = volume["state"] == "disabled";
            assert!(disabled || volume["state"] == "serving", "{volume}");
            if disabled {
                daemon.send("POST", &format!("/v1/volumes/{name}/enable"), "").ok();
            }
            let content = shown(daemon, &name);
            if disabled {
                daemon.send("POST", &format!("/v1/volumes/{name}/disable?force=true"), "").ok();
            }
            let stands_on = (volume["independent"] == false).then(|| text(&volume["from"]));
            state.branches.insert(name, Branch { content, stands_on, is_volume: true, disabled });
        }
        for snapshot in list(daemon, "snapshots") {
            assert_eq!(snapshot["state"], "quiesced", "{snapshot}");
            let name = format!("{}@{}", text(&snapshot["disk"]), text(&snapshot["name"]));
            state.snapshots.insert(name.clone(), shown(daemon, &name));
        }
        for bookmark in list(daemon, "bookmarks") {
            assert_eq!(bookmark["state"], "kept", "{bookmark}");
            let name = format!("{}@{}", text(&bookmark["disk"]), text(&bookmark["name"]));
            let content = known.iter().find_map(|k| k.bookmarks.get(&name).or(k.snapshots.get(&name)));
            state.bookmarks.insert(name, content.cloned().unwrap_or_default());
        }
        state
    }

    /// What a backup would copy since each moment must be all that differs.
    #[track_caller]
    pub(super) fn require_differences(&self, daemon: &Daemon, what: &str) {
        for (moment, then) in self.bookmarks.iter().chain(&self.snapshots) {
            let now = &self.branches[moment.split_once('@').unwrap().0];
            let mut missed: Vec<_> = (0..then.len()).filter(|&i| then[i] != now.content[i]).collect();
            let answer = daemon.get(&format!("/v1/snapshots/{moment}/diff"));
            assert_eq!(answer.status, 200, "{what}: what changed since {moment}: {}", answer.body);
            for range in answer.json().as_array().unwrap() {
                let sector = |value: &Value| value.as_u64().unwrap() as usize / 512;
                let (start, len) = (sector(&range["offset"]), sector(&range["length"]));
                missed.retain(|at| !(start..start + len).contains(at));
            }
            assert!(missed.is_empty(), "{what}: sectors {missed:?} differ from {moment}, and nobody says so");
        }
    }
}
