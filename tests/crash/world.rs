//! A random run of the daemon on a simulated host: commands and guests side by side, an end at any step, what is found after
//! each end, and the next run on what was left, which may end the same way.
//!
//! The daemon is the real one: its commands are asked for by the door that HTTP uses (`control::Service`), and its starts are
//! its own. Nothing of an order of steps is known here.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use halfsilver::control::api::{DiskConfig, Durability, Layout, Snapshot, Volume};
use halfsilver::control::{ApiError, Name, Service};
use halfsilver::daemon::Given;
use halfsilver::daemon::config::DiskSpec;
use halfsilver::engine::{Request, RequestError, Ticket};
use halfsilver::image::{ByteOffset, IoQueue};
use halfsilver::manager::{Manager, Places};
use uuid::Uuid;

use crate::found;
use crate::media::{self, SECTOR, Scheduler, set_aside};
use crate::schedule::Rng;
use crate::sim::{DISKS, End, Loss, RUN, STATE, Sim, Thread};
use crate::spec::{self, Kind, Spec};

/// Ends inside what was begun after an end, and so on.
const DEPTH_MAX: usize = 2;
const COMMANDS_MAX: usize = 3;
const HELD_MAX: usize = 2;

pub type Counts = BTreeMap<String, u64>;

/// What a run is about.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub sectors: usize,
    pub disks: usize,
    /// Whether the first disk is mirrored from the start.
    pub is_mirrored: bool,
    /// Whether copy-on-write snapshots outlive a power cut.
    pub power: bool,
    /// How often each command is given, as weights.
    pub weights: [usize; COMMANDS.len()],
    /// Whether the records refuse changes now and then.
    pub refuses: bool,
    /// How the layers of disks lie unless something else is asked for, which it is half the time if this is `auto`.
    pub layout: Layout,
    /// How often each strategy is asked for: copy-on-write, write logging, write mirroring.
    pub strategies: [usize; 3],
}

/// Commands about snapshots, and about snapshots and legs.
const OF_VOLUMES: [usize; COMMANDS.len()] = [14, 3, 8, 1, 22, 6, 18, 20, 12, 0, 6, 10, 0, 0, 6, 2, 2, 3, 6];
const OF_RESTORES: [usize; COMMANDS.len()] = [22, 2, 8, 1, 8, 2, 2, 2, 2, 24, 2, 2, 0, 0, 3, 1, 2, 4, 8];
const OF_SNAPSHOTS: [usize; COMMANDS.len()] = [30, 6, 24, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 4, 3, 4];
#[cfg(feature = "planted")]
const OF_LEGS: [usize; COMMANDS.len()] = [30, 0, 30, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 4, 0, 0, 0, 3, 6];

/// What can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    Create,
    CreateGroup,
    Delete,
    DeleteGroup,
    MakeVolume,
    DeleteVolume,
    Complete,
    Promote,
    Update,
    Restore,
    Disable,
    Enable,
    Mirror,
    Unmirror,
    Rename,
    Set,
    ForgetBookmark,
    StopJob,
    ResumeJob,
}

pub const COMMANDS: [Command; 19] = [
    Command::Create,
    Command::CreateGroup,
    Command::Delete,
    Command::DeleteGroup,
    Command::MakeVolume,
    Command::DeleteVolume,
    Command::Complete,
    Command::Promote,
    Command::Update,
    Command::Restore,
    Command::Disable,
    Command::Enable,
    Command::Mirror,
    Command::Unmirror,
    Command::Rename,
    Command::Set,
    Command::ForgetBookmark,
    Command::StopJob,
    Command::ResumeJob,
];

impl Shape {
    /// Seeds take turns in what they are about.
    pub fn of(seed: u64) -> Shape {
        let mut rng = Rng::new(seed ^ 0x7368_6170);
        let blocks = 2 + rng.below(5);
        let tail = if rng.chance(50) { rng.below(8) } else { 0 };
        //               create, group, delete, dgroup, volume, dvol, complete, promote, update, restore
        let mirrors = [22, 2, 16, 2, 4, 1, 2, 1, 1, 4, 1, 1, 14, 8, 3, 2, 1, 3, 6];
        let all = [16, 4, 12, 3, 10, 3, 6, 4, 5, 8, 3, 4, 5, 4, 5, 3, 3, 3, 5];
        let weights = [OF_SNAPSHOTS, OF_VOLUMES, OF_RESTORES, mirrors, all][usize::try_from(seed % 5).unwrap()];
        let is_mirrored = seed % 5 == 3 && rng.chance(70);
        let (sectors, disks, power) = (blocks * 8 + tail, 1 + rng.below(2), seed % 3 == 1);
        let layout = Layout::ALL[rng.below(Layout::ALL.len())];
        Shape { sectors, disks, is_mirrored, power, weights, refuses: seed % 4 == 2, layout, strategies: [40, 40, 20] }
    }

    /// Logs on a disk of two blocks: what needs many changes of one block.
    #[cfg(feature = "planted")]
    pub fn of_logs(seed: u64) -> Shape {
        let (weights, strategies) = (OF_SNAPSHOTS, [15, 85, 0]);
        Shape { sectors: 16, disks: 1, is_mirrored: false, weights, strategies, ..Shape::of(seed) }
    }

    /// Snapshots that outlive power cuts, on a disk of two blocks.
    #[cfg(feature = "planted")]
    pub fn of_saved(seed: u64) -> Shape {
        Shape { strategies: [100, 0, 0], power: true, ..Shape::of_logs(seed) }
    }

    /// Volumes off a disk of two blocks.
    #[cfg(feature = "planted")]
    pub fn of_volumes(seed: u64) -> Shape {
        Shape { weights: OF_VOLUMES, strategies: [50, 50, 0], ..Shape::of_logs(seed) }
    }

    /// Restores on a disk of two blocks.
    #[cfg(feature = "planted")]
    pub fn of_restores(seed: u64) -> Shape {
        let mut weights = OF_RESTORES;
        weights[4..9].fill(0);
        Shape { weights, strategies: [60, 40, 0], ..Shape::of_logs(seed) }
    }

    /// A mirror, its legs and its splits.
    #[cfg(feature = "planted")]
    pub fn of_legs(seed: u64) -> Shape {
        Shape { is_mirrored: true, weights: OF_LEGS, strategies: [10, 10, 80], ..Shape::of_logs(seed) }
    }
}

pub struct World {
    pub sim: Arc<Sim>,
    /// Whether what is found is gone on with, and must not be changed.
    pub goes_on: bool,
    /// What has started.
    pub manager: Rc<RefCell<Option<Arc<Manager>>>>,
    /// The same before it has started.
    pub(crate) opened: Rc<RefCell<Option<Arc<Manager>>>>,
    pub spec: Rc<RefCell<Spec>>,
    pub(crate) scheduler: Scheduler,
    keepers: usize,
    pub(crate) rng: Rng,
    pub(crate) failure: Rc<RefCell<Option<String>>>,
    pub(crate) now: Rc<RefCell<Vec<Command>>>,
    pub(crate) shape: Shape,
    depth: usize,
    is_stopping: bool,
    pub(crate) counts: Rc<RefCell<Counts>>,
    held: Vec<(Uuid, Ticket)>,
    seen: (u64, u64),
    steps: usize,
}

impl Drop for World {
    fn drop(&mut self) {
        self.held.clear();
        self.sim.end();
        if let Some(manager) = &*self.opened.borrow() {
            manager.going_down();
        }
        drop(std::mem::take(&mut self.scheduler));
        drop(self.sim.take_begun());
        // The last one that has it, after all threads.
        self.manager.borrow_mut().take();
        self.opened.borrow_mut().take();
    }
}

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// The daemon on a host.
fn start(sim: &Arc<Sim>, specs: &[DiskSpec], opened: &RefCell<Option<Arc<Manager>>>) -> Result<Arc<Manager>, String> {
    let places = Places::to_look_at(Path::new(STATE), Path::new(RUN));
    let manager = Manager::open(sim.clone(), places).map_err(|e| e.to_string())?;
    *opened.borrow_mut() = Some(manager.clone());
    let given = Given { disks: specs, bad_disks: &[], take_flushed: &[], strict: false };
    manager.take_up(given).map_err(|e| e.message)?;
    manager.listening();
    Ok(manager)
}

/// A seed's run from the beginning.
pub fn run(seed: u64, shape: Shape, actions: usize, counts: &Rc<RefCell<Counts>>) -> Result<(), String> {
    let (sim, mut rng) = (Sim::new(), Rng::new(seed));
    // Disks have sectors of 512 bytes whatever their images are written in.
    media::set_unit(if (seed / 7).is_multiple_of(2) { 512 } else { 4096 });
    let mut specs = Vec::new();
    for disk in ["a", "b"].iter().take(shape.disks) {
        let path = Path::new(DISKS).join(format!("{disk}.raw"));
        sim.put_image(&path, spec::initial(shape.sectors));
        let mut config = DiskConfig::new(&path);
        config.durability = Some(if shape.power { Durability::Power } else { Durability::Process });
        config.layout = Some(shape.layout);
        if *disk == "a" && shape.is_mirrored {
            config.mirror = Some(Path::new(DISKS).join("a.leg"));
        }
        specs.push(DiskSpec { name: name(disk), config });
    }
    let rng = Rng::new(rng.next());
    let mut world = World::on(sim, Spec::new(), rng, shape, 0, counts.clone());
    world.start(specs);
    while world.manager.borrow().is_none() {
        world.step_quietly()?;
    }
    let disks = world.ask(|manager| manager.list_disks())??;
    for disk in disks {
        let id = disk.id.ok_or("a disk without an id")?;
        world.spec.borrow_mut().add_disk(id, disk.name.as_str(), shape.sectors);
    }
    world.run(actions)
}

impl World {
    pub fn on(sim: Arc<Sim>, spec: Spec, rng: Rng, shape: Shape, depth: usize, counts: Rc<RefCell<Counts>>) -> World {
        World {
            sim,
            goes_on: false,
            manager: Rc::default(),
            opened: Rc::default(),
            spec: Rc::new(RefCell::new(spec)),
            scheduler: Scheduler::default(),
            keepers: 0,
            rng,
            failure: Rc::default(),
            now: Rc::default(),
            shape,
            depth,
            is_stopping: false,
            counts,
            held: Vec::new(),
            seen: (media::changes(), 0),
            steps: 0,
        }
    }

    pub fn start(&mut self, specs: Vec<DiskSpec>) {
        let (sim, served, failure) = (self.sim.clone(), self.manager.clone(), self.failure.clone());
        let opened = self.opened.clone();
        self.scheduler.spawn(Thread::new(move || match start(&sim, &specs, &opened) {
            Ok(manager) => *served.borrow_mut() = Some(manager),
            Err(e) => *failure.borrow_mut() = Some(format!("it does not start: {e}")),
        }));
    }

    /// What the daemon answers; everything goes on meanwhile, and nothing ends.
    pub fn ask<T: 'static>(
        &mut self,
        question: impl FnOnce(&Manager) -> Result<T, ApiError> + 'static,
    ) -> Result<Result<T, String>, String> {
        let manager = self.manager.borrow().clone().ok_or("it is not served")?;
        let put = Rc::new(RefCell::new(None));
        let answer = put.clone();
        self.finish(Thread::new(move || {
            let given = question(&manager).map_err(|e| e.message);
            drop(manager);
            *answer.borrow_mut() = Some(given);
        }))?;
        put.take().ok_or_else(|| "it has not answered".to_owned())
    }

    pub fn count(&self, what: &str) {
        *self.counts.borrow_mut().entry(what.to_owned()).or_default() += 1;
    }

    /// Runs something to its end; everything else goes on meanwhile, and nothing ends.
    pub fn finish<T: 'static>(&mut self, work: impl Future<Output = T> + 'static) -> Result<T, String> {
        let put = Rc::new(RefCell::new(None));
        let out = put.clone();
        self.scheduler.spawn(async move {
            let value = work.await;
            *put.borrow_mut() = Some(value);
        });
        for _ in 0..1_000_000 {
            if let Some(value) = out.borrow_mut().take() {
                return Ok(value);
            }
            self.step_quietly()?;
        }
        Err("it never ends".to_owned())
    }

    /// Serves, and ends at many steps; then, without an end, everything comes to rest and is looked at.
    pub fn run(&mut self, actions: usize) -> Result<(), String> {
        for _ in 0..actions {
            if self.manager.borrow().is_some() {
                self.act();
            }
            for _ in 0..1 + self.rng.below(10) {
                self.step()?;
            }
        }
        if self.rng.chance(25) && self.manager.borrow().is_some() {
            return self.stop();
        }
        self.come_to_rest()?;
        found::at_rest(self)
    }

    /// Goes down, and may end amid that. Then everything is found as it was, whatever happens to the host.
    fn stop(&mut self) -> Result<(), String> {
        self.held.clear();
        let manager = self.manager.borrow().clone().ok_or("it is not served")?;
        let told = manager.list_snapshots().map_err(|e| e.message)?;
        let told_of_volumes = manager.list_volumes().map_err(|e| e.message)?;
        let stopped = Rc::new(RefCell::new(None));
        let tell = stopped.clone();
        self.is_stopping = true;
        self.sim.refuse_records(0);
        self.scheduler.spawn(Thread::new(move || *tell.borrow_mut() = Some(manager.stop().map_err(|e| e.to_string()))));
        for _ in 0..2_000_000 {
            if let Some(stopped) = stopped.borrow_mut().take() {
                stopped.map_err(|e| format!("it does not stop: {e}"))?;
                self.count("after a clean stop");
                let mut rng = Rng::new(self.rng.next());
                let end = if rng.chance(50) { End::Kill } else { End::PowerCut(Loss::All) };
                let left = self.sim.after(end, &mut rng);
                let _aside = set_aside();
                // All is on stable storage, so a power cut is no more than a kill is.
                let ended = found::Ended {
                    spec: &self.spec.borrow(),
                    told: &told,
                    told_of_volumes: &told_of_volumes,
                    end: End::Kill,
                };
                let mut next = World::on(left, Spec::default(), rng, self.shape, self.depth + 1, self.counts.clone());
                return found::find(&mut next, &ended).map(drop).map_err(|e| format!("after a clean stop: {e}"));
            }
            if !self.step()? {
                self.sim.pass_time();
            }
        }
        Err("it does not stop".to_owned())
    }

    fn come_to_rest(&mut self) -> Result<(), String> {
        self.held.clear();
        self.sim.refuse_records(0);
        for _ in 0..2_000_000 {
            if self.step()? {
                continue;
            }
            // The housekeeper looks round for ever.
            if self.scheduler.tasks() <= self.keepers {
                return Ok(());
            }
            if !self.sim.pass_time() {
                break;
            }
        }
        Err(format!("{} threads hang, amid {:?}", self.scheduler.tasks() - self.keepers, self.now.borrow()))
    }

    /// Moves something, and does not end in between.
    pub fn step_quietly(&mut self) -> Result<(), String> {
        if !self.move_on()? {
            self.sim.pass_time();
        }
        self.seen.0 = media::changes();
        Ok(())
    }

    fn move_on(&mut self) -> Result<bool, String> {
        for (name, thread) in self.sim.take_begun() {
            self.keepers += usize::from(name == "housekeeper");
            self.scheduler.spawn(thread);
        }
        let moved = self.scheduler.step(&mut self.rng);
        self.steps += 1;
        if let Some(epoch) = self.epoch() {
            self.spec.borrow_mut().epoch_is(epoch);
        }
        match self.failure.borrow_mut().take() {
            Some(failure) => Err(failure),
            None => Ok(moved),
        }
    }

    fn epoch(&self) -> Option<u64> {
        Some(self.manager.borrow().as_ref()?.epoch().0)
    }

    /// Moves something, and ends in between. False when nothing can move.
    fn step(&mut self) -> Result<bool, String> {
        let mut moved = self.move_on()?;
        if !moved || self.rng.chance(2) {
            // While guests are at work time passes, too.
            moved |= self.manager.borrow().is_some() && !self.now.borrow().is_empty() && self.sim.pass_time();
        }
        let now = (media::changes(), self.sim.entries());
        if self.seen != now {
            self.end_here(self.seen.0 == now.0)?;
            self.seen = (media::changes(), now.1);
        }
        Ok(moved)
    }

    /// What would be found if it ended now; now and then also what comes of it. If only entries have changed, which no power
    /// cut leaves, it is killed.
    fn end_here(&mut self, only_entries: bool) -> Result<(), String> {
        let (percent, deeper) = [(30, 8), (20, 5), (15, 0)][self.depth];
        if !self.rng.chance(percent) {
            return Ok(());
        }
        let end = if only_entries { End::Kill } else { End::some(&mut self.rng) };
        let mut rng = Rng::new(self.rng.next());
        let goes_on = self.depth < DEPTH_MAX && rng.chance(deeper);
        let what = |e: String| {
            let amid = self.now.borrow();
            format!("depth {}, step {}, {end:?}, amid {amid:?}: {e}", self.depth, self.steps)
        };
        self.count_state(end);
        // What could be asked at this moment, and so must be true afterwards.
        let told: Vec<Snapshot> =
            self.manager.borrow().as_ref().map(|m| m.list_snapshots().unwrap_or_default()).unwrap_or_default();
        let volumes: Vec<Volume> =
            self.manager.borrow().as_ref().map(|m| m.list_volumes().unwrap_or_default()).unwrap_or_default();
        let left = self.sim.after(end, &mut rng);
        let shape = self.shape;
        let _aside = set_aside();
        let ended = found::Ended { spec: &self.spec.borrow(), told: &told, told_of_volumes: &volumes, end };
        let mut next = World::on(left, Spec::default(), rng, shape, self.depth + 1, self.counts.clone());
        next.goes_on = goes_on;
        let spec = found::find(&mut next, &ended).map_err(what)?;
        if !goes_on {
            return Ok(());
        }
        *next.spec.borrow_mut() = spec;
        let actions = 6 + next.rng.below(24);
        crate::trace(|| format!("--- goes on at depth {} after {end:?} at step {}", self.depth + 1, self.steps));
        next.run(actions).map_err(|e| what(format!("\n  then {e}")))
    }

    /// Another end, before it has started.
    pub fn ends_amid_start(&mut self) -> Option<(End, World)> {
        if self.depth > DEPTH_MAX || !self.rng.chance(2) {
            return None;
        }
        let end = End::some(&mut self.rng);
        let mut rng = Rng::new(self.rng.next());
        self.count_state(end);
        let left = self.sim.after(end, &mut rng);
        Some((end, World::on(left, Spec::default(), rng, self.shape, self.depth + 1, self.counts.clone())))
    }

    fn count_state(&self, end: End) {
        let add = |what: String| *self.counts.borrow_mut().entry(what).or_default() += 1;
        add("states".to_owned());
        add(if end.is_power_cut() { "power cuts" } else { "kills" }.to_owned());
        add(format!("depth {}", self.depth));
        if self.manager.borrow().is_none() {
            add("amid a start".to_owned());
        }
        if self.is_stopping {
            add("amid a stop".to_owned());
        }
        self.now.borrow().iter().for_each(|command| add(format!("amid {command:?}")));
        if let Some(manager) = &*self.manager.borrow() {
            for job in manager.list_jobs().unwrap_or_default() {
                if job.state == halfsilver::control::api::JobState::Running {
                    add(format!("amid a job: {}", job.kind));
                }
            }
        }
    }

    fn act(&mut self) {
        if self.shape.refuses && self.rng.chance(4) {
            let changes = 1 + self.rng.below(3);
            self.sim.refuse_records(changes as u64);
            self.count("refusals of the records");
        }
        match self.rng.below(100) {
            0..45 => self.submit(),
            // The bitmaps of mirrors are cleaned now and then.
            45..53 if self.shape.is_mirrored => self.sim.skip(Duration::from_secs(5)),
            45..55 => self.flush(),
            55..58 if !self.held.is_empty() => drop(self.held.swap_remove(self.rng.below(self.held.len()))),
            58.. if self.now.borrow().len() < COMMANDS_MAX => {
                let mut at = self.rng.below(self.shape.weights.iter().sum());
                for (command, weight) in COMMANDS.into_iter().zip(self.shape.weights) {
                    if at < weight {
                        return self.command(command);
                    }
                    at -= weight;
                }
            }
            _ => {}
        }
    }

    // Guests.

    fn some_line(&mut self) -> Option<(Uuid, Arc<crate::sim::Socket>, usize)> {
        let lines: Vec<_> = {
            let spec = self.spec.borrow();
            let here = |(id, line): (&Uuid, &spec::Line)| (*id, line.names.clone(), line.sectors(), line.is_away);
            spec.lines.iter().map(here).filter(|(.., is_away)| !is_away).collect()
        };
        if lines.is_empty() {
            return None;
        }
        let (id, names, sectors, _) = lines[self.rng.below(lines.len())].clone();
        let socket = names.iter().find_map(|name| self.sim.socket(&Path::new(RUN).join(format!("{name}.sock"))))?;
        // A name may be that of another disk by now.
        let manager = self.manager.borrow().clone()?;
        (manager.disk_at(&socket.attachment) == Some(id)).then_some((id, socket, sectors))
    }

    fn range(&mut self, sectors: usize) -> std::ops::Range<usize> {
        let first = self.rng.below(sectors);
        let longest = if self.rng.chance(75) { 10 } else { 24 };
        let mut range = first..first + 1 + self.rng.below((sectors - first).min(longest));
        if self.rng.chance(45) {
            range.start = range.start / 8 * 8; // Whole blocks.
            range.end = range.end.next_multiple_of(8).min(sectors);
        }
        range
    }

    fn ticket(&mut self, id: Uuid, socket: &crate::sim::Socket) -> Ticket {
        let held = self.held.iter().position(|(of, _)| *of == id);
        if let Some(at) = held.filter(|_| self.rng.chance(30)) {
            return self.held[at].1.again();
        }
        let ticket = socket.attachment.lane().enter();
        if self.held.len() < HELD_MAX && self.rng.chance(6) {
            self.held.push((id, ticket.again()));
        }
        ticket
    }

    fn submit(&mut self) {
        let Some((id, socket, sectors)) = self.some_line() else { return };
        let Some(in_flight) = socket.begin() else { return };
        let (ticket, mut range) = (self.ticket(id, &socket), self.range(sectors));
        let (kind, durable) = match self.rng.below(100) {
            0..70 => (Kind::Write, self.rng.chance(15)),
            70..85 => (Kind::Zeroes, self.rng.chance(15)),
            _ => (Kind::Discard, false),
        };
        if kind == Kind::Discard {
            range.start = range.start.next_multiple_of(8);
            if range.end != sectors {
                range.end = range.end / 8 * 8;
            }
            if range.is_empty() {
                return;
            }
        }
        let number = self.spec.borrow_mut().begin_change(id, ticket.epoch().0, range.clone(), kind, durable);
        media::count_change();
        let (at, len) = (ByteOffset((range.start * SECTOR) as u64), (range.len() * SECTOR) as u64);
        let request = match kind {
            Kind::Write => Request::Write { at, from: spec::filled(range.start, range.len(), number), durable },
            Kind::Zeroes => Request::WriteZeroes { at, len, unmap: self.rng.chance(50), durable },
            Kind::Discard => Request::Discard { at, len },
        };
        let (spec, failure) = (self.spec.clone(), self.failure.clone());
        self.scheduler.spawn(async move {
            match socket.attachment.execute(&IoQueue::simulated(), &ticket, request).await {
                Ok(()) => spec.borrow_mut().end_change(id, number),
                // What a volume stands on may be lost.
                Err(RequestError::Broken(_)) => {}
                Err(e) => *failure.borrow_mut() = Some(format!("a guest's request failed: {e}")),
            }
            media::count_change();
            drop((ticket, in_flight));
        });
    }

    fn flush(&mut self) {
        let Some((id, socket, _)) = self.some_line() else { return };
        let Some(in_flight) = socket.begin() else { return };
        let (ticket, flush) = (self.ticket(id, &socket), self.spec.borrow().begin_flush(id));
        let (spec, failure) = (self.spec.clone(), self.failure.clone());
        self.scheduler.spawn(async move {
            match socket.attachment.execute(&IoQueue::simulated(), &ticket, Request::Flush).await {
                Ok(()) => spec.borrow_mut().end_flush(&flush),
                Err(RequestError::Broken(_)) => {}
                Err(e) => *failure.borrow_mut() = Some(format!("a flush failed: {e}")),
            }
            media::count_change();
            drop((ticket, in_flight));
        });
    }
}
