//! Random commands, each of which may be cut off by a kill: while it is carried out, while its job is at work, amid the next
//! start. A guest writes meanwhile where the command leaves the content alone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::state::{Answered, DISK, Op, State};
use super::{Flight, Life, SECTORS, STRATEGIES, try_write};
use crate::harness::{Rng, from_env, seeds};

const SEEDS: u64 = 2;
const STEPS: u64 = 40;
const VOLUMES_MAX: usize = 3;
const MOMENTS_MAX: usize = 5;

/// What the run has come to.
#[derive(Default, Debug)]
struct Counts {
    kills: usize,
    amid_commands: usize,
    amid_starts: usize,
    amid_writes: usize,
    done: std::collections::BTreeMap<&'static str, usize>,
}

fn word(op: &Op) -> &'static str {
    match op {
        Op::Snapshot { .. } => "snapshot",
        Op::DeleteSnapshot { keep_bookmark: true, .. } => "snapshot to bookmark",
        Op::DeleteSnapshot { .. } => "snapshot deleted",
        Op::DeleteBookmark(_) => "bookmark deleted",
        Op::CreateVolume { .. } => "volume",
        Op::DeleteVolume(_) => "volume deleted",
        Op::Complete(_) => "completed",
        Op::Promote(_) => "promoted",
        Op::Disable(_) => "disabled",
        Op::Enable { fresh: true, .. } => "begun anew",
        Op::Enable { .. } => "enabled",
        Op::Restore { .. } => "restored",
    }
}

/// Who may write while this is carried out: it changes nothing of that content, and freezes none of it.
fn guest_of(op: &Op) -> Option<String> {
    match op {
        Op::Complete(name) => Some(name.clone()),
        Op::DeleteSnapshot { snapshot, .. } => snapshot.split_once('@').map(|(disk, _)| disk.to_owned()),
        Op::CreateVolume { from, .. } => from.split_once('@').map(|(disk, _)| disk.to_owned()),
        Op::DeleteVolume(_) | Op::Disable(_) | Op::Enable { .. } => Some(DISK.to_owned()),
        _ => None,
    }
}

/// All that makes sense now.
fn possible(state: &State, rng: &mut Rng, names: &mut usize) -> Vec<Op> {
    let State { branches, snapshots, bookmarks } = state;
    let mut new_name = |kind: &str| {
        *names += 1;
        format!("{kind}{names}")
    };
    let stood_on = |snapshot: &String| branches.values().any(|b| b.stands_on.as_ref() == Some(snapshot));
    let of = |name: &String| format!("{name}@");
    let mut ops = Vec::new();
    for (name, branch) in branches.iter().filter(|(_, b)| !b.disabled) {
        let own = snapshots.keys().chain(bookmarks.keys()).filter(|moment| moment.starts_with(&of(name))).count();
        if own < MOMENTS_MAX {
            let strategy = STRATEGIES[rng.below(2)];
            ops.push(Op::Snapshot { disk: name.clone(), name: new_name("s"), strategy });
        }
        if branches.len() <= VOLUMES_MAX && rng.chance(30) {
            ops.push(Op::CreateVolume { name: new_name("v"), from: name.clone() });
        }
        if branch.is_volume {
            ops.push(Op::Disable(name.clone()));
        }
    }
    for snapshot in snapshots.keys() {
        if !stood_on(snapshot) {
            ops.push(Op::DeleteSnapshot { snapshot: snapshot.clone(), keep_bookmark: rng.chance(60) });
        }
        if branches.len() <= VOLUMES_MAX {
            ops.push(Op::CreateVolume { name: new_name("v"), from: snapshot.clone() });
        }
        if snapshot.starts_with(&of(&DISK.to_owned())) {
            ops.push(Op::Restore { from: snapshot.clone() });
        }
    }
    ops.extend(bookmarks.keys().filter(|_| rng.chance(40)).map(|bookmark| Op::DeleteBookmark(bookmark.clone())));
    for (name, branch) in branches.iter().filter(|(_, b)| b.is_volume) {
        let own = |moment: &&String| moment.starts_with(&of(name));
        if !snapshots.keys().filter(own).any(stood_on) && rng.chance(30) {
            ops.push(Op::DeleteVolume(name.clone()));
        }
        match (&branch.stands_on, branch.disabled) {
            (Some(_), _) => ops.extend([Op::Complete(name.clone()), Op::Complete(name.clone())]),
            (None, false) => ops.push(Op::Promote(name.clone())),
            (None, true) => {}
        }
        if branch.disabled {
            let fresh = branch.stands_on.is_some() && !snapshots.keys().chain(bookmarks.keys()).any(|m| own(&m));
            ops.push(Op::Enable { name: name.clone(), fresh: false });
            ops.extend(fresh.then(|| Op::Enable { name: name.clone(), fresh }));
        } else if stands_on_disk(state, name) {
            ops.push(Op::Restore { from: name.clone() });
        }
    }
    ops
}

/// Whether a volume leads to the disk, by however many others.
fn stands_on_disk(state: &State, name: &str) -> bool {
    let mut at = name.to_owned();
    while let Some(on) = state.branches.get(&at).and_then(|b| b.stands_on.clone()) {
        at = on.split_once('@').unwrap().0.to_owned();
    }
    at == DISK
}

impl Life {
    /// Writes until it is told to stop or the daemon is gone. The writes that were answered, and the one that was not.
    fn guest(
        client: crate::client::Client,
        what: &str,
        mut rng: Rng,
        first_tag: u64,
        stop: &AtomicBool,
        killed: &AtomicBool,
    ) -> (Vec<Flight>, Option<Flight>) {
        let (mut client, mut answered) = (client, Vec::new());
        for tag in first_tag.. {
            if stop.load(Ordering::SeqCst) {
                break;
            }
            let from = rng.below(SECTORS - 1);
            let sectors = from..from + 1 + rng.below((SECTORS - from).min(40));
            let flight = Flight { what: what.to_owned(), sectors: sectors.clone(), tag };
            if !try_write(&mut client, sectors, tag, || killed.load(Ordering::SeqCst)) {
                return (answered, Some(flight));
            }
            answered.push(flight);
        }
        (answered, None)
    }

    /// One command, perhaps with a guest beside it, and perhaps with a kill over it.
    fn command(&mut self, op: &Op, counts: &mut Counts) {
        let what = format!("{op:?}");
        let is_killed = self.rng.chance(60);
        let longest = if self.rng.chance(50) { 8_000 } else { 60_000 };
        let after = Duration::from_micros(self.rng.below(longest) as u64);
        let guest = guest_of(op).filter(|name| self.state.branches.get(name).is_some_and(|b| !b.disabled));
        let guest = guest.filter(|_| self.rng.chance(60)).map(|name| (self.daemon.client(&name), name));
        let (first_tag, seed) = (self.tag + 1, self.rng.next());
        let (stop, killed) = (&AtomicBool::new(false), &AtomicBool::new(false));
        let before = self.state.clone();
        let daemon = &self.daemon;
        let (answered, guest) = std::thread::scope(|scope| {
            let guest = guest.map(|(client, name)| {
                scope.spawn(move || Life::guest(client, &name, Rng::new(seed), first_tag, stop, killed))
            });
            let asked = scope.spawn(|| op.ask(daemon));
            if is_killed {
                std::thread::sleep(after);
                daemon.signal(libc::SIGKILL);
                killed.store(true, Ordering::SeqCst);
            }
            let answered = asked.join().expect("the command is possible");
            stop.store(true, Ordering::SeqCst);
            (answered, guest.map(|guest| guest.join().unwrap()))
        });
        let mut allowed = op.outcomes(&before);
        if answered == Answered::Yes {
            allowed = allowed.split_off(allowed.len() - 1);
        }
        let (written, flight) = guest.unwrap_or_default();
        for state in &mut allowed {
            for Flight { what, sectors, tag } in &written {
                if let Some(branch) = state.branches.get_mut(what) {
                    branch.content[sectors.clone()].fill(*tag);
                }
            }
        }
        self.tag = first_tag + written.len() as u64 + 1;
        *counts.done.entry(word(op)).or_default() += 1;
        if !is_killed {
            assert_eq!(answered, Answered::Yes, "{what}");
            assert!(flight.is_none(), "{what}: a write was not answered");
            assert!(self.settle());
            return self.look(&allowed, &what);
        }
        self.daemon.wait_exit();
        counts.kills += 1;
        counts.amid_commands += usize::from(answered == Answered::No);
        counts.amid_writes += usize::from(flight.is_some());
        while self.rng.chance(25) {
            self.daemon.spawn();
            std::thread::sleep(Duration::from_micros(self.rng.below(40_000) as u64));
            self.daemon.kill();
            counts.amid_starts += 1;
        }
        self.rise(allowed, flight, &what);
    }
}

#[test]
fn random_commands_on_volumes_and_bookmarks_survive_kills() {
    let steps = from_env("HALFSILVER_STEPS", STEPS) as usize;
    let mut counts = Counts::default();
    for seed in seeds("survival", SEEDS) {
        let (mut life, mut names) = (Life::new(seed), 0);
        life.daemon.start();
        for step in 0..steps {
            let to: Vec<_> = life.state.branches.iter().filter(|(_, b)| !b.disabled).map(|(n, _)| n.clone()).collect();
            for name in to {
                if life.rng.chance(60) {
                    assert!(life.write(&name).is_none());
                }
            }
            let state = life.state.clone();
            let ops = possible(&state, &mut life.rng, &mut names);
            // Each kind as likely as any other.
            let kinds: Vec<_> = ops.iter().map(word).collect::<std::collections::BTreeSet<_>>().into_iter().collect();
            let kind = kinds[life.rng.below(kinds.len())];
            let ops: Vec<_> = ops.iter().filter(|op| word(op) == kind).collect();
            let op = ops[life.rng.below(ops.len())].clone();
            life.command(&op, &mut counts);
            if life.rng.chance(10) {
                life.stop_and_start(&format!("seed {seed}, step {step}"));
            }
        }
        life.delete_all(&format!("seed {seed}"));
    }
    println!("{counts:?}");
}
