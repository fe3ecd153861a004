//! A small world that grows: what commands make, and what happens by itself.

use halfsilver::control::api::{JobKind, JobState};
use halfsilver::control::{Name, SnapshotRef};
use halfsilver::registry::{
    Bookmark, Command, Disk, Job, Kind, Leg, LegState, Phase, Registry, Restore, Snapshot, SnapshotPhase, Source, Step,
};
use uuid::Uuid;

/// Numbers from a seed (splitmix64).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n.max(1)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        let len = u64::try_from(items.len()).unwrap();
        (len > 0).then(|| &items[usize::try_from(self.below(len)).unwrap()])
    }
}

#[derive(Default)]
pub(crate) struct World {
    disks: Vec<Disk>,
    jobs: Vec<Job>,
    next: u128,
    next_job: u64,
}

/// Where legs are; the first is a disk's own image.
const LEGS: [&str; 3] = ["/own", "/other", "/third"];

fn two_legs() -> Vec<Leg> {
    LEGS[..2].iter().map(|path| Leg { path: path.into(), state: LegState::InSync }).collect()
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

impl World {
    pub(crate) fn registry(&self) -> Registry {
        Registry::new(self.disks.clone(), self.jobs.clone())
    }

    fn id(&mut self) -> Uuid {
        self.next += 1;
        Uuid::from_u128(self.next)
    }

    fn become_what_is_in(&mut self, registry: &Registry) {
        self.disks = registry.disks().cloned().collect();
        self.jobs = registry.jobs().cloned().collect();
    }

    fn disk(&mut self, id: Uuid) -> Option<&mut Disk> {
        self.disks.iter_mut().find(|disk| disk.id == id)
    }

    fn add_job(&mut self, kind: JobKind, disk: Uuid, snapshot: Option<Uuid>) {
        self.next_job += 1;
        self.jobs.push(Job {
            id: self.next_job,
            kind,
            disk,
            snapshot,
            state: JobState::Running,
            is_paced: self.next_job.is_multiple_of(3),
        });
    }

    fn add_disk(&mut self, kind: Kind) -> Uuid {
        let id = self.id();
        let disk = Disk {
            id,
            name: name(&format!("d{}", self.next)),
            kind,
            phase: Phase::Served,
            is_unreadable: false,
            is_readonly: false,
            failure: None,
            frontends: 0,
            is_socket_named: !self.next.is_multiple_of(3),
            legs: if kind == Kind::Disk && self.next.is_multiple_of(4) { two_legs() } else { Vec::new() },
            restore: None,
            has_work: false,
            is_in_log: kind != Kind::Disk,
            snapshots: Vec::new(),
            bookmarks: Vec::new(),
        };
        self.disks.push(disk);
        id
    }

    fn some_disk(&self, rng: &mut Rng) -> Option<Disk> {
        rng.pick(&self.disks).cloned()
    }

    fn some_snapshot(&self, rng: &mut Rng) -> Option<(Disk, Snapshot)> {
        let all: Vec<_> = self.disks.iter().flat_map(|d| d.snapshots.iter().map(move |s| (d, s))).collect();
        rng.pick(&all).map(|(disk, snapshot)| ((*disk).clone(), (*snapshot).clone()))
    }

    /// Something happens: a command that is allowed, or what nobody asked for.
    pub(crate) fn happen(&mut self, rng: &mut Rng) {
        if self.disks.is_empty() || rng.chance(6) {
            self.add_disk(Kind::Disk);
        }
        if rng.chance(60) {
            let command = self.some_command(rng);
            if halfsilver::registry::decide(&self.registry(), &command).is_ok() {
                self.carry_out(&command);
            }
            return;
        }
        let Some(picked) = self.some_disk(rng) else { return };
        let (job_kind, is_lost) = (rng.below(4), rng.chance(20));
        let disk = self.disk(picked.id).unwrap();
        match rng.below(10) {
            0 => disk.frontends = u32::from(disk.frontends == 0 && disk.phase == Phase::Served),
            1 if job_kind == 0 && disk.kind == Kind::Disk => disk.is_readonly = disk.restore.is_none(),
            1 if job_kind == 1 => {
                let states = [LegState::InSync, LegState::Syncing, LegState::Failed];
                let held = |leg: &&mut Leg| !matches!(leg.state, LegState::Held { .. });
                disk.legs.iter_mut().filter(held).for_each(|leg| leg.state = *rng.pick(&states).unwrap());
            }
            2 => {
                if let Some(snapshot) = disk.snapshots.last_mut() {
                    snapshot.readers = u32::from(snapshot.phase == SnapshotPhase::Quiesced);
                }
            }
            3 => {
                for snapshot in disk.snapshots.iter_mut().filter(|s| s.phase == SnapshotPhase::Draining) {
                    (snapshot.phase, snapshot.old_frontends) = (SnapshotPhase::Quiesced, 0);
                }
            }
            4 => {
                let states = [JobState::Stopped, JobState::Failed, JobState::Running];
                if let Some(job) = self.jobs.iter_mut().find(|job| job.disk == picked.id) {
                    job.state = *rng.pick(&states).unwrap();
                }
            }
            5 => {
                let job = self.jobs.iter().find(|job| job.disk == picked.id && job.state == JobState::Running);
                if let Some(job) = job.map(|job| job.id) {
                    self.step(&Step::Run(Command::WaitForJob { job }));
                }
            }
            6 if job_kind == 0 => {
                disk.phase = Phase::Unserved { why: "its image is gone".to_owned() };
                disk.frontends = 0;
                disk.snapshots.iter_mut().for_each(|s| (s.readers, s.old_frontends) = (0, 0));
                // Nobody drains when nobody runs, and no job either.
                disk.snapshots.iter_mut().filter(|s| s.phase == SnapshotPhase::Draining).for_each(|s| {
                    s.phase = SnapshotPhase::Quiesced;
                });
                self.jobs.retain(|job| job.disk != picked.id);
            }
            7 if is_lost && disk.restore.as_ref().is_some_and(|r| !disk.snapshots.iter().any(|s| s.id == r.source)) => {
                disk.restore.iter_mut().for_each(|restore| restore.is_lost = true);
                self.jobs.retain(|job| job.disk != picked.id || job.kind != JobKind::Restore);
            }
            // Of such a one nothing is known.
            8 if job_kind == 1 && disk.snapshots.is_empty() && disk.kind == Kind::Disk && disk.restore.is_none() => {
                disk.phase = Phase::Unserved { why: "its record cannot be read".to_owned() };
                (disk.is_unreadable, disk.frontends, disk.bookmarks) = (true, 0, Vec::new());
                self.jobs.retain(|job| job.disk != picked.id);
            }
            // What was deleted is gone, and its job still gives storage back.
            9 => {
                let going = disk.snapshots.iter().position(|s| s.phase == SnapshotPhase::Going);
                if let Some(going) = going {
                    let gone = disk.snapshots.remove(going);
                    disk.snapshots.iter_mut().for_each(|s| s.through.retain(|id| *id != gone.id));
                    disk.is_in_log &= !disk.snapshots.is_empty();
                }
            }
            8 if job_kind == 0 => {
                if let Some(snapshot) = disk.snapshots.first_mut() {
                    snapshot.broken = Some("no room was left".to_owned());
                }
            }
            _ => {}
        }
    }

    pub(crate) fn some_command(&self, rng: &mut Rng) -> Command {
        let force = rng.chance(50);
        let disk = self.some_disk(rng).map_or_else(|| name("nothing"), |disk| disk.name);
        let is_volume = |d: &&Disk| d.is_volume();
        let volumes: Vec<Disk> = self.disks.iter().filter(is_volume).cloned().collect();
        let volume = rng.pick(&volumes).map_or_else(|| disk.clone(), |volume| volume.name.clone());
        let snapshot = self.some_snapshot(rng).map(|(disk, s)| disk.reference(&s.name));
        let snapshot = snapshot.unwrap_or_else(|| SnapshotRef { disk: disk.clone(), name: name("none") });
        let job = rng.pick(&self.jobs).map_or(77, |job| job.id);
        let fresh = name(&format!("n{}", self.next + 1));
        let to = self.some_disk(rng).filter(|_| rng.chance(20)).map_or(fresh, |disk| disk.name);
        match rng.below(28) {
            0..5 => {
                let to = name(&format!("s{}", rng.below(12)));
                Command::CreateSnapshot { disks: vec![disk], name: to, splits: rng.chance(20) }
            }
            5 => Command::DeleteSnapshot { snapshot, force, keep_bookmark: rng.chance(50) },
            6 => Command::RemoveDisk { disk, force },
            7 => Command::DeleteVolume { volume, force },
            8 => Command::CreateVolumeOfNow { name: to, of: disk },
            9..11 => Command::CreateVolume { name: to, from: snapshot },
            11 => Command::Restore { disk, from: snapshot, force },
            12 => {
                // One that has something to do with the disk.
                let from = self.disks.iter().find(|d| d.name == snapshot.disk);
                let base = from.and_then(|d| self.lowest(d)).map_or(disk, |d| d.name.clone());
                Command::Restore { disk: base, from: snapshot, force }
            }
            13 => Command::Complete { volume },
            14 => Command::Promote { volume },
            15 => Command::Disable { volume, force },
            16 => Command::Enable { volume, fresh: force },
            17 => Command::Mirror { disk, path: rng.pick(&LEGS).unwrap().into() },
            18 => Command::Forget { disk },
            19 => Command::StopJob { job },
            20 => Command::ResumeJob { job },
            21 => Command::Set {
                disk,
                readonly: [None, Some(true), Some(false)][usize::from(force) + usize::from(rng.chance(50))],
            },
            22 => Command::RestoreToNow { disk, volume, force },
            23 => Command::Unmirror { disk, leg: rng.chance(50).then(|| rng.pick(&LEGS).unwrap().into()) },
            24 => self.some_bookmark(rng).unwrap_or(Command::Update { volume, force }),
            25 => Command::Update { volume, force },
            26 => Command::Resize { disk, size_bytes: 1 << 30 },
            _ => Command::Rename { disk, to, is_volume: false, force },
        }
    }

    fn some_bookmark(&self, rng: &mut Rng) -> Option<Command> {
        let of = |disk: &Disk| disk.bookmarks.iter().map(|b| disk.reference(&b.name)).collect::<Vec<_>>();
        let all: Vec<SnapshotRef> = self.disks.iter().flat_map(of).collect();
        rng.pick(&all).map(|bookmark| Command::DeleteBookmark { bookmark: bookmark.clone() })
    }

    /// The disk at the bottom of what a volume stands on.
    fn lowest<'a>(&'a self, disk: &'a Disk) -> Option<&'a Disk> {
        match disk.kind {
            Kind::Disk => Some(disk),
            Kind::Volume(source) | Kind::Independent(source) => {
                let below = self.disks.iter().find(|d| d.id == source.disk)?;
                self.lowest(below)
            }
        }
    }

    fn step(&mut self, step: &Step) {
        let mut registry = self.registry();
        registry.carry_out(step);
        self.become_what_is_in(&registry);
    }

    /// What a command that was decided does.
    pub(crate) fn carry_out(&mut self, command: &Command) {
        let registry = self.registry();
        match command {
            Command::CreateSnapshot { disks, name, splits } => {
                let (group, ids) = (self.id(), disks.iter().map(|_| self.id()).collect::<Vec<_>>());
                for (named, id) in disks.iter().zip(ids) {
                    let disk = self.disks.iter_mut().find(|d| d.name == *named).unwrap();
                    disk.snapshots.iter_mut().for_each(|s| s.through.push(id));
                    disk.snapshots.push(Snapshot {
                        id,
                        name: name.clone(),
                        group,
                        phase: SnapshotPhase::Draining,
                        broken: None,
                        readers: 0,
                        is_socket_named: disk.is_socket_named,
                        old_frontends: disk.frontends,
                        // Some are those of updates.
                        taken_for: id.as_u128().is_multiple_of(4).then_some(id),
                        keeps_bookmark: false,
                        through: Vec::new(),
                    });
                    if *splits {
                        disk.legs[1].state = LegState::Held { by: id };
                    }
                    // Some write logs.
                    disk.is_in_log |= id.as_u128().is_multiple_of(5);
                }
            }
            Command::CreateVolume { name, from } => {
                let (of, on) = registry.snapshot_named(from).unwrap();
                let id = self.add_disk(Kind::Volume(Source { snapshot: on.id, disk: of.id }));
                self.disk(id).unwrap().name = name.clone();
            }
            Command::Restore { disk, from, .. } => {
                let (source, target) = (registry.snapshot_named(from).unwrap().1.id, registry.named(disk).unwrap().id);
                let through = registry.through(source);
                self.disk(target).unwrap().restore = Some(Restore { source, through, is_lost: false });
                self.add_job(JobKind::Restore, target, None);
            }
            Command::Complete { volume } => {
                let id = registry.named(volume).unwrap().id;
                self.disk(id).unwrap().has_work = true;
                if registry.job_on(id, |j| matches!(j.kind, JobKind::Migrate | JobKind::Update)).is_none() {
                    self.add_job(JobKind::Migrate, id, None);
                }
            }
            Command::DeleteSnapshot { snapshot, keep_bookmark, .. } => {
                let (disk, found) = registry.snapshot_named(snapshot).unwrap();
                let (disk, found) = (disk.id, found.id);
                if self.jobs.iter().any(|job| job.snapshot == Some(found)) {
                    return;
                }
                let disk_of = self.disk(disk).unwrap();
                let going = disk_of.snapshots.iter_mut().find(|s| s.id == found).unwrap();
                (going.phase, going.readers, going.old_frontends) = (SnapshotPhase::Going, 0, 0);
                going.keeps_bookmark = *keep_bookmark;
                let left = Bookmark { id: found, name: going.name.clone(), taken_for: going.taken_for };
                // Some are handed over at once, and give storage back for a while.
                if *keep_bookmark && found.as_u128().is_multiple_of(2) {
                    disk_of.bookmarks.push(left);
                }
                self.add_job(JobKind::Merge, disk, Some(found));
            }
            Command::Promote { volume } => {
                let id = registry.named(volume).unwrap().id;
                self.disk(id).unwrap().kind = Kind::Disk;
            }
            Command::Rename { disk, to, .. } => {
                let id = registry.named(disk).unwrap().id;
                self.disk(id).unwrap().name = to.clone();
            }
            Command::Enable { volume, fresh: true } => {
                let id = registry.named(volume).unwrap().id;
                self.jobs.retain(|job| job.disk != id);
                let disk = self.disk(id).unwrap();
                (disk.phase, disk.has_work) = (Phase::Served, false);
            }
            Command::Mirror { disk, path } => {
                let id = registry.named(disk).unwrap().id;
                let legs = &mut self.disk(id).unwrap().legs;
                let is_it = |leg: &Leg| leg.path == *path && matches!(leg.state, LegState::InSync | LegState::Syncing);
                if legs.iter().any(is_it) || legs.is_empty() && path.as_os_str() == LEGS[0] {
                    return;
                }
                if legs.is_empty() {
                    legs.push(Leg { path: LEGS[0].into(), state: LegState::InSync });
                }
                legs.retain(|leg| leg.state == LegState::InSync);
                legs.push(Leg { path: path.clone(), state: LegState::Syncing });
                self.jobs.retain(|job| job.disk != id || job.kind != JobKind::Mirror);
                self.add_job(JobKind::Mirror, id, None);
            }
            Command::Update { .. } | Command::RestoreToNow { .. } | Command::CreateVolumeOfNow { .. } => {}
            other => self.step(&Step::Run(other.clone())),
        }
    }
}
