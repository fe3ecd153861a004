//! Lives of a daemon, one after the other: each is killed by a plan, under the load of two guests, and the next one must go
//! on from there.
//!
//! Two disks, one of them mirrored. Between kills there are snapshots of every strategy, deletions, folds, copies of legs,
//! cutovers. Commands of which the answer was lost may have been carried out or not; but wholly, and those that were
//! answered for good.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::counts::{Counts, STRATEGIES, name_of};
use super::vm::{KINDS, Vm};
use crate::client::tags;
use crate::harness::{Answer, Daemon, PATIENCE, Rng, wait_until};
use crate::oracle::{Array, DISKS, Phase, World};
use crate::vmm::Vmm;

const SIZES: [u64; 2] = [4 << 20, (4 << 20) + 512];
const SNAPSHOTS_MAX: usize = 6;
/// After so many kills everything comes to rest and is looked at.
const REST_EVERY: usize = 12;

/// What a life is for, and so when it ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Plan {
    /// While it starts and takes up what the last one left.
    Start,
    /// Under load, with nothing else.
    Load,
    /// In the middle of a snapshot command.
    Create,
    /// While frontends still write a snapshot.
    Drain,
    /// In the middle of a deletion, and perhaps of a fold.
    Delete,
    /// In the middle of the copying of a leg.
    Resync,
}

/// What comes after a rest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    Only,
    /// All snapshots go, and a leg is split off.
    Anew,
    /// All snapshots go.
    #[cfg_attr(not(feature = "planted"), allow(dead_code, reason = "for the sweep of points"))]
    Clean,
}

/// What is known of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Known {
    There,
    /// The answer was lost: there or not.
    Asked,
    /// Its deletion was answered.
    Going,
    /// Its deletion was asked for, and the answer was lost.
    AskedToGo,
}

enum Command {
    Create { references: Vec<String>, pins: bool },
    Delete { reference: String },
    Cutover,
}

/// A command on its way.
struct Underway {
    command: Command,
    began: Instant,
    answer: Receiver<Answer>,
}

pub(super) struct Run {
    pub(super) daemon: Daemon,
    rng: Rng,
    pub(super) world: World,
    pub(super) vms: Vec<Vm>,
    known: BTreeMap<String, Known>,
    underway: Option<Underway>,
    names: usize,
    /// How long the last start and the last snapshot took.
    start_took: Duration,
    create_took: Duration,
    counts: Counts,
}

pub(super) fn run(seed: u64, kills: usize) -> Counts {
    let mut run = Run::new(seed);
    let began = Instant::now();
    // A little longer if something rare has not been reached.
    while run.counts.kills < kills || (run.counts.missing().is_some() && run.counts.kills < 4 * kills) {
        let plan = run.plan();
        match plan {
            Plan::Start => run.life_that_does_not_begin(),
            plan => run.life(plan),
        }
        if run.counts.kills.is_multiple_of(REST_EVERY) {
            run.rest();
        }
        if run.counts.kills.is_multiple_of(100) {
            println!("seed {seed}: {} kills, {:.0?}", run.counts.kills, began.elapsed());
        }
    }
    run.end()
}

impl Run {
    pub(super) fn new(seed: u64) -> Run {
        let mut rng = Rng::new(seed);
        let mut daemon = Daemon::place();
        let block = ["4K", "4K", "16K"][rng.below(3)];
        for (i, disk) in DISKS.iter().enumerate() {
            daemon.make_image(disk, SIZES[i]);
        }
        // One of the two has packed layers.
        let layout = |disk: u64| ["sparse", "packed"][usize::try_from((seed + disk) % 2).unwrap()];
        daemon.arg_disk(DISKS[0], &format!("queues=2,block-size={block},layout={}", layout(0)));
        let leg = daemon.path("leg.raw");
        let mirrored = format!("queues=2,block-size={block},layout={},mirror={}", layout(1), leg.display());
        daemon.arg_disk(DISKS[1], &mirrored);
        let began = Instant::now();
        daemon.start();
        let start_took = began.elapsed();
        wait_until("both legs to be in sync", || in_sync(&daemon));
        // Tags are numbers of changes; zero is what was never written.
        let mut world = World::default();
        world.next = 1;
        let mut vms = Vec::new();
        let first = rng.below(2);
        for (disk, name) in DISKS.iter().enumerate() {
            let sectors = SIZES[disk] as usize / 512;
            let live = Array { name: (*name).to_owned(), disk, phase: Phase::Live, sectors: vec![vec![0]; sectors] };
            world.arrays.push(live);
            let vmm = [Vmm::Qemu, Vmm::CloudHypervisor][(disk + first) % 2];
            vms.push(Vm::connect(disk, &daemon.socket(name), sectors, vmm));
        }
        let (known, counts) = (BTreeMap::new(), Counts::default());
        let create_took = Duration::from_millis(5);
        Run { daemon, rng, world, vms, known, underway: None, names: 0, start_took, create_took, counts }
    }

    fn plan(&mut self) -> Plan {
        match self.rng.below(100) {
            0..16 => Plan::Start,
            16..26 => Plan::Load,
            26..50 => Plan::Create,
            50..62 => Plan::Drain,
            62..92 => Plan::Delete,
            _ => Plan::Resync,
        }
    }

    // ---- lives

    /// Killed before it is ready, at best amid its first messages.
    fn life_that_does_not_begin(&mut self) {
        self.ensure_dead();
        let limit = self.start_took.as_micros() as usize * 13 / 10;
        let after = Duration::from_micros(self.rng.below(limit.max(1000)) as u64);
        self.daemon.spawn();
        self.kill_after(after);
        let (mut tried, mut connected) = (false, 0);
        while !self.is_dead() {
            for vm in &mut self.vms {
                vm.submit(1, &mut self.rng, &mut self.world);
                match vm.try_connect() {
                    Some(false) => tried = true,
                    Some(true) => connected += 1,
                    None => drop(vm.poll(&mut self.world)),
                }
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        self.counts.amid(match (tried, connected) {
            (_, 0) => "start",
            _ => "connecting",
        });
        self.bury();
    }

    fn life(&mut self, plan: Plan) {
        self.ensure_alive();
        let short = Duration::from_micros(self.rng.below(8000) as u64);
        self.load_for(short);
        if plan != Plan::Drain && self.rng.chance(50) {
            self.order_create(false);
            self.settle_command();
        }
        let mut after = match plan {
            Plan::Create if self.rng.chance(70) => self.rng.below(self.create_took.as_micros() as usize),
            Plan::Create | Plan::Delete | Plan::Resync => self.rng.below(15_000),
            _ => self.rng.below(40_000),
        };
        let mut amid = Vec::new();
        match plan {
            Plan::Start => unreachable!("it has no life"),
            Plan::Load => amid.push("load"),
            Plan::Create => self.order_create(false),
            Plan::Drain => {
                self.settle_command();
                self.order_create(true);
                self.settle_command();
                if self.world.arrays.iter().any(|a| a.phase == Phase::Pinned) {
                    amid.push("draining");
                }
            }
            Plan::Delete => amid.extend(self.order_slow_delete()),
            Plan::Resync => amid.extend(self.slow_resync()),
        }
        if plan == Plan::Drain && self.rng.chance(40) {
            self.load_for(short);
            self.order_cutover();
            after = self.rng.below(700);
        }
        self.kill_after(Duration::from_micros(after as u64));
        while !self.is_dead() {
            self.load_once();
        }
        amid.into_iter().for_each(|what| self.counts.amid(what));
        self.bury();
    }

    fn ensure_dead(&mut self) {
        if self.daemon.is_running() {
            self.kill_after(Duration::ZERO);
            while !self.is_dead() {
                std::thread::yield_now();
            }
            self.counts.amid("load");
            self.bury();
        }
    }

    /// Starts a daemon, unless one runs, and connects everybody to it again.
    pub(super) fn ensure_alive(&mut self) {
        if self.daemon.is_running() {
            return;
        }
        let began = Instant::now();
        self.daemon.spawn();
        while !self.vms.iter().all(Vm::is_connected) || !self.daemon.is_up() {
            assert!(began.elapsed() < *PATIENCE, "the daemon does not come back");
            self.daemon.require_running();
            for vm in &mut self.vms {
                vm.submit(1, &mut self.rng, &mut self.world);
                match vm.try_connect() {
                    None => drop(vm.poll(&mut self.world)),
                    Some(_) => std::thread::sleep(Duration::from_micros(500)),
                }
            }
        }
        self.start_took = began.elapsed();
        self.recognise();
    }

    fn kill_after(&mut self, after: Duration) {
        let pid = rustix::process::Pid::from_raw(self.daemon.pid() as i32).unwrap();
        std::thread::spawn(move || {
            std::thread::sleep(after);
            // The child is waited for only after it has died, so the number is still its own.
            let killed = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            // Gone already: the test has failed meanwhile and has ended it.
            assert!(matches!(killed, Ok(()) | Err(rustix::io::Errno::SRCH)));
        });
    }

    pub(super) fn is_dead(&mut self) -> bool {
        self.daemon.has_died_by(libc::SIGKILL)
    }

    /// After a death: what was answered is answered, all else is owed by the next daemon.
    pub(super) fn bury(&mut self) {
        self.counts.kills += 1;
        for vm in &mut self.vms {
            let open = vm.bereaved(&mut self.world);
            for (kind, n) in KINDS.into_iter().zip(open).filter(|(_, n)| *n > 0) {
                *self.counts.in_flight.entry(name_of(kind)).or_default() += n;
            }
        }
        if let Some(underway) = self.underway.take() {
            let answer = underway.answer.recv_timeout(*PATIENCE).expect("a command hangs at a dead daemon");
            self.answered(underway.command, &answer);
        }
        // Nobody is left who would change a snapshot.
        let known = &self.known;
        self.world.freeze(|a| known.get(&a.name) != Some(&Known::Asked));
    }

    pub(super) fn load_once(&mut self) {
        let mut answered = 0;
        for vm in &mut self.vms {
            vm.submit(6, &mut self.rng, &mut self.world);
            answered += vm.poll(&mut self.world);
        }
        self.hear();
        if answered == 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    pub(super) fn load_for(&mut self, time: Duration) {
        let began = Instant::now();
        while began.elapsed() < time {
            self.load_once();
        }
    }

    // ---- commands

    fn send(&mut self, command: Command, method: &'static str, path: String, body: String) {
        assert!(self.underway.is_none());
        let (tell, answer) = channel();
        let api = self.daemon.api();
        std::thread::spawn(move || tell.send(api.send(method, &path, &body)));
        self.underway = Some(Underway { command, began: Instant::now(), answer });
    }

    fn hear(&mut self) {
        let Some(underway) = &self.underway else { return };
        match underway.answer.try_recv() {
            Ok(answer) => {
                let Underway { command, began, .. } = self.underway.take().unwrap();
                if matches!(command, Command::Create { .. }) {
                    self.create_took = began.elapsed();
                }
                self.answered(command, &answer);
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => panic!("a command's thread has died"),
        }
    }

    /// A clean stop.
    pub(super) fn stop(&mut self) {
        self.daemon.stop();
        self.bury();
    }

    #[cfg(feature = "planted")]
    pub(super) fn order_delete_oldest_of(&mut self, disk: usize) {
        let reference = self.known.keys().find(|r| r.starts_with(&format!("{}@", DISKS[disk]))).cloned();
        if let Some(reference) = reference {
            self.order_delete(reference);
        }
    }

    pub(super) fn settle_command(&mut self) {
        let began = Instant::now();
        while self.underway.is_some() {
            assert!(began.elapsed() < *PATIENCE, "a command takes too long");
            self.load_once();
        }
    }

    /// Asks for a snapshot, if there is room for one.
    fn order_create(&mut self, pins: bool) {
        let is_pinned = self.world.arrays.iter().any(|a| matches!(a.phase, Phase::Pinned | Phase::Cutting));
        if self.underway.is_some() || is_pinned || self.known.len() >= SNAPSHOTS_MAX {
            return;
        }
        let disks = match self.rng.below(6) {
            0 | 1 => vec![0, 1],
            2 => vec![0],
            _ => vec![1],
        };
        let strategy = match (self.rng.below(10), disks.as_slice()) {
            (0..4, [1]) => STRATEGIES[2],
            (0..8, _) => STRATEGIES[0],
            _ => STRATEGIES[1],
        };
        self.order_create_of(disks, strategy, pins);
    }

    pub(super) fn order_create_of(&mut self, disks: Vec<usize>, strategy: &str, pins: bool) {
        self.names += 1;
        let name = format!("s{}", self.names);
        let references: Vec<_> = disks.iter().map(|&d| format!("{}@{name}", DISKS[d])).collect();
        for (&disk, reference) in disks.iter().zip(&references) {
            self.world.begin_cut(disk, reference.clone());
            self.known.insert(reference.clone(), Known::Asked);
        }
        let disks: Vec<_> = disks.iter().map(|&d| DISKS[d]).collect();
        let writers = if pins { "connection" } else { "request" };
        let body = json!({ "name": name, "disks": disks, "strategy": strategy, "writers": writers });
        self.send(Command::Create { references, pins }, "POST", "/v1/snapshots".to_owned(), body.to_string());
    }

    /// Asks for a deletion, slows it down, and says amid what the daemon is then.
    fn order_slow_delete(&mut self) -> Option<&'static str> {
        self.settle_command();
        let there = |(name, known): (&String, &Known)| (*known == Known::There).then(|| name.clone());
        let mut there: Vec<_> = self.known.iter().filter_map(there).collect();
        there.retain(|name| self.world.array(name).phase == Phase::Frozen);
        if there.is_empty() {
            return None;
        }
        let reference = there.swap_remove(self.rng.below(there.len()));
        self.order_delete(reference);
        self.slow_job(|kind| matches!(kind, "fold" | "merge"))
    }

    fn order_delete(&mut self, reference: String) {
        self.known.insert(reference.clone(), Known::AskedToGo);
        let path = format!("/v1/snapshots/{reference}");
        self.send(Command::Delete { reference }, "DELETE", path, String::new());
    }

    fn slow_resync(&mut self) -> Option<&'static str> {
        self.slow_job(|kind| kind == "mirror")
    }

    /// Makes a running job slow. Its kind, if there is one.
    fn slow_job(&mut self, is_one: impl Fn(&str) -> bool) -> Option<&'static str> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(30) {
            self.load_once();
            let jobs = self.daemon.get("/v1/jobs").json();
            let is_one = |j: &&Value| j["state"] == "running" && is_one(j["kind"].as_str().unwrap());
            let Some(job) = jobs.as_array().unwrap().iter().find(is_one).cloned() else { continue };
            let path = format!("/v1/jobs/{}", job["id"]);
            if self.daemon.send("PATCH", &path, r#"{"delay_ms":20}"#).status == 200
                && self.daemon.get(&path).json()["state"] == "running"
            {
                return Some(match job["kind"].as_str().unwrap() {
                    "fold" => "fold",
                    "merge" => "merge",
                    _ => "resync",
                });
            }
        }
        None
    }

    pub(super) fn order_cutover(&mut self) {
        let pinned = self.world.arrays.iter().find(|a| a.phase == Phase::Pinned).map(|a| a.name.clone());
        if let Some(reference) = pinned.filter(|_| self.underway.is_none()) {
            // From now on a write may belong to it, or not any more.
            for array in self.world.arrays.iter_mut().filter(|a| a.phase == Phase::Pinned) {
                array.phase = Phase::Cutting;
            }
            self.send(Command::Cutover, "POST", format!("/v1/snapshots/{reference}/cutover"), String::new());
        }
    }

    /// A command's answer. Status 599 is none: the daemon died over it.
    fn answered(&mut self, command: Command, answer: &Answer) {
        let is_lost = answer.status == 599;
        if is_lost {
            self.counts.amid(match &command {
                Command::Create { references, .. } if references.len() > 1 => "create of a group",
                Command::Create { .. } => "create",
                Command::Delete { .. } => "delete",
                Command::Cutover => "cutover",
            });
        }
        match command {
            Command::Create { references, pins } if (200..300).contains(&answer.status) => {
                let shown = answer.json();
                for (reference, shown) in references.iter().zip(shown.as_array().unwrap()) {
                    self.known.insert(reference.clone(), Known::There);
                    *self.counts.taken.entry(shown["strategy"].as_str().unwrap().to_owned()).or_default() += 1;
                    let is_pinned = pins && shown["old_frontends"] != json!(0);
                    self.world.array(reference).phase = if is_pinned { Phase::Pinned } else { Phase::Frozen };
                }
                self.counts.groups += usize::from(references.len() > 1);
            }
            Command::Create { .. } if is_lost => {}
            Command::Create { references, .. } => {
                // A leg that is not there, or a split that is there already.
                let code = answer.refused();
                assert!(["no-second-leg", "mirror-not-in-sync"].contains(&&*code), "{}", answer.body);
                references.iter().for_each(|reference| self.forget(reference));
            }
            Command::Delete { .. } if is_lost => {}
            Command::Delete { reference } => {
                match answer.status {
                    409 if answer.body.contains("is being read") => self.known.insert(reference, Known::There),
                    204 => {
                        self.forget(&reference);
                        None
                    }
                    _ => {
                        answer.ok();
                        self.known.insert(reference, Known::Going)
                    }
                };
            }
            Command::Cutover if is_lost => {}
            Command::Cutover => {
                answer.ok();
                self.world.freeze(|_| true);
            }
        }
    }

    fn forget(&mut self, reference: &str) {
        self.known.remove(reference);
        self.world.arrays.retain(|a| a.name != reference);
    }

    // ---- after a start

    /// What the new daemon has must be what the old one had, and what became of lost commands is seen.
    fn recognise(&mut self) {
        let mut listed = BTreeMap::new();
        for s in self.daemon.snapshots() {
            let reference = format!("{}@{}", s["disk"].as_str().unwrap(), s["name"].as_str().unwrap());
            assert!(self.known.contains_key(&reference), "{reference} was never asked for, or was deleted");
            assert_eq!(s["reason"], Value::Null, "{s}");
            listed.insert(reference, s["state"].as_str().unwrap().to_owned());
        }
        let mut fates: BTreeMap<String, Vec<bool>> = BTreeMap::new();
        for (reference, known) in self.known.clone() {
            let state = listed.get(&reference).map(String::as_str);
            let is_going = matches!(state, None | Some("deleting" | "folding"));
            if known == Known::Asked {
                let (_, name) = reference.split_once('@').unwrap();
                fates.entry(name.to_owned()).or_default().push(is_going);
            }
            match (known, state) {
                (Known::There, Some("quiesced")) => {}
                (Known::Asked | Known::AskedToGo, Some("quiesced")) => {
                    match known {
                        Known::Asked => self.counts.commands_lost_and_done += 1,
                        _ => self.counts.commands_lost_and_not_done += 1,
                    }
                    self.known.insert(reference.clone(), Known::There);
                }
                (Known::There, _) => panic!("{reference} is {state:?}"),
                (Known::Asked, _) => self.counts.commands_lost_and_not_done += 1,
                (Known::AskedToGo, _) => self.counts.commands_lost_and_done += 1,
                (Known::Going, _) => assert!(is_going, "{reference} was on its way out, and is {state:?}"),
            }
            match state {
                None => self.forget(&reference),
                Some(_) if is_going => drop(self.known.insert(reference, Known::Going)),
                Some(_) => {}
            }
        }
        for (name, fates) in fates {
            assert!(fates.iter().all(|f| *f == fates[0]), "the group {name} was taken in part: {fates:?}");
        }
        self.world.freeze(|_| true);
        let there: Vec<_> = self.known.iter().filter(|(_, k)| **k == Known::There).map(|(r, _)| r.clone()).collect();
        if !there.is_empty() && self.rng.chance(30) {
            let reference = there[self.rng.below(there.len())].clone();
            self.check(&reference);
        }
    }

    fn check(&mut self, reference: &str) {
        let content = self.daemon.content(reference);
        self.world.check_all(reference, &content);
        self.counts.snapshots_checked += 1;
    }

    /// Everything comes to rest: all requests are answered, all jobs done, and every version is read.
    fn rest(&mut self) {
        let then = if self.rng.chance(50) { Rest::Anew } else { Rest::Only };
        self.rest_and(then);
    }

    pub(super) fn rest_and(&mut self, then: Rest) {
        self.ensure_alive();
        self.settle_command();
        self.order_cutover();
        self.settle_command();
        self.drain();
        let going: Vec<_> = self.known.iter().filter(|(_, k)| **k == Known::Going).map(|(r, _)| r.clone()).collect();
        for reference in going {
            self.daemon.api().wait_gone(&reference);
            self.forget(&reference);
        }
        wait_until("all jobs to be done", || {
            let jobs = self.daemon.get("/v1/jobs").json();
            let jobs = jobs.as_array().unwrap();
            assert!(jobs.iter().all(|j| j["state"] != "failed" && j["state"] != "stopped"), "{jobs:?}");
            jobs.iter().all(|j| j["state"] == "done")
        });
        for reference in self.known.keys().cloned().collect::<Vec<_>>() {
            wait_until("a snapshot to be quiesced", || self.daemon.state(&reference) == "quiesced");
            self.world.array(&reference).phase = Phase::Frozen;
            self.check(&reference);
        }
        self.complete_mirror();
        // The guest's own view of the whole disk: it has the socket, so it reads itself.
        for (disk, vm) in self.vms.iter_mut().enumerate() {
            vm.read_all(&mut self.world);
            assert!(vm.in_flight() == 0, "{}", DISKS[disk]);
        }
        match then {
            Rest::Only => {}
            Rest::Anew => self.begin_anew(),
            Rest::Clean => self.be_clean(),
        }
    }

    /// Every request is answered, and no answer is too many.
    fn drain(&mut self) {
        let began = Instant::now();
        while self.vms.iter().any(|vm| vm.in_flight() > 0) {
            assert!(began.elapsed() < *PATIENCE, "requests are not answered");
            let answered: usize = self.vms.iter_mut().map(|vm| vm.poll(&mut self.world)).sum();
            if answered == 0 {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        self.vms.iter().for_each(Vm::require_quiet);
    }

    /// Without snapshots and with both legs every strategy can be had, and not only another log.
    fn begin_anew(&mut self) {
        self.be_clean();
        self.order_create_of(vec![1], STRATEGIES[2], false);
        self.settle_command();
    }

    fn be_clean(&mut self) {
        self.delete_all();
        self.complete_mirror();
        wait_until("both legs to be in sync", || in_sync(&self.daemon));
    }

    fn delete_all(&mut self) {
        let mut all: Vec<_> = self.known.keys().cloned().collect();
        while !all.is_empty() {
            let reference = all.swap_remove(self.rng.below(all.len()));
            self.daemon.delete(&reference);
            self.forget(&reference);
        }
    }

    /// A leg that an older snapshot has taken over with the one that went is not the disk's any more: it gets it again, if
    /// nobody has it.
    fn complete_mirror(&mut self) {
        let disk = self.daemon.show_disk(DISKS[1]);
        let legs = disk["legs"].as_array().unwrap();
        if legs.len() > 1 {
            return;
        }
        let both = [self.daemon.image(DISKS[1]), self.daemon.path("leg.raw")];
        let other = both.into_iter().find(|path| json!(path) != legs[0]["path"]).unwrap();
        let answer = self.daemon.send("POST", "/v1/disks/vm1/mirror", &json!({ "path": other }).to_string());
        if answer.status >= 400 {
            assert!(self.known.keys().any(|r| r.starts_with("vm1@")), "{}", answer.body);
        }
    }

    /// All snapshots go, the daemon stops, and the raw images alone are the disks.
    fn end(mut self) -> Counts {
        self.rest();
        self.drain();
        self.delete_all();
        self.complete_mirror();
        wait_until("both legs to be in sync", || in_sync(&self.daemon));
        for vm in &mut self.vms {
            vm.read_all(&mut self.world);
        }
        self.daemon.stop();
        for (name, image) in
            [(0, self.daemon.image(DISKS[0])), (1, self.daemon.image(DISKS[1])), (1, self.daemon.path("leg.raw"))]
                .map(|(disk, image)| (DISKS[disk], image))
        {
            self.world.check_all(name, &std::fs::read(image).unwrap());
        }
        let legs = [self.daemon.image(DISKS[1]), self.daemon.path("leg.raw")].map(|p| tags(&std::fs::read(p).unwrap()));
        assert!(legs[0] == legs[1], "the legs differ");
        for vm in &self.vms {
            self.counts.outlived += vm.outlived;
            self.counts.deaths_max = self.counts.deaths_max.max(vm.deaths_max);
            self.counts.answered += vm.answered;
        }
        self.counts
    }
}

fn in_sync(daemon: &Daemon) -> bool {
    let disk = daemon.show_disk(DISKS[1]);
    let legs = disk["legs"].as_array().unwrap();
    legs.len() == 2 && legs.iter().all(|leg| leg["state"] == "in-sync")
}
