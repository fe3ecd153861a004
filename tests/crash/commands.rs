//! Commands of a run: what is asked of the daemon, and what each answer says of what must be found from then on.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::control::api::{
    DeleteSnapshotOptions, DeletionState, DiskPatch, Durability, JobPatch, Layout, RestoreRequest, SnapshotRequest,
    SnapshotState, Strategy, UpdateQuery, VolumeRequest, VolumeSource, Writers,
};
use halfsilver::control::{ApiError, Deletion, ErrorCode, Service, SnapshotRef};
use halfsilver::manager::Manager;
use uuid::Uuid;

use crate::sim::{DISKS, Thread};
use crate::spec::{Moment, Spec};
use crate::world::{Command, World, name};

const DISK_NAMES: [&str; 4] = ["a", "b", "c", "d"];
const VOLUME_NAMES: [&str; 4] = ["v", "w", "x", "y"];
const SNAPSHOT_NAMES: [&str; 4] = ["s", "t", "u", "z"];

/// Few, so that one is asked for that another disk has, or had.
const LEG_NAMES: usize = 4;

/// What a command is carried out with.
struct Asked {
    manager: Arc<Manager>,
    spec: Rc<RefCell<Spec>>,
}

impl World {
    /// Gives a command, on a thread of its own.
    pub fn command(&mut self, command: Command) {
        let Some(manager) = self.manager.borrow().clone() else { return };
        let asked = Asked { manager, spec: self.spec.clone() };
        let Some(run) = self.choose(command, asked) else { return };
        self.now.borrow_mut().push(command);
        let (now, failure) = (self.now.clone(), self.failure.clone());
        let counts = self.counts.clone();
        self.scheduler.spawn(Thread::new(move || {
            crate::trace(|| format!("{command:?} begins"));
            let done = run();
            crate::trace(|| format!("{command:?}: {done:?}"));
            crate::media::count_change();
            let word = match &done {
                Ok(()) => "done",
                Err(e) if e.code == ErrorCode::Internal => {
                    *failure.borrow_mut() = Some(format!("{command:?}: {}", e.message));
                    "failed"
                }
                Err(_) => "refused",
            };
            *counts.borrow_mut().entry(format!("{command:?} {word}")).or_default() += 1;
            let mut now = now.borrow_mut();
            let at = now.iter().position(|c| *c == command).expect("it is under way");
            now.swap_remove(at);
        }));
    }

    fn some<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.rng.below(of.len())]
    }

    /// What is said of a layout: nothing, unless chains are to be mixed.
    fn some_layout(&mut self) -> Option<Layout> {
        let is_said = self.shape.layout == Layout::Auto && self.rng.chance(50);
        is_said.then(|| [Layout::Sparse, Layout::Packed][self.rng.below(2)])
    }

    fn some_disk(&mut self) -> Option<(Uuid, String)> {
        self.line_where(|line| line.from.is_none())
    }

    fn some_volume(&mut self) -> Option<(Uuid, String)> {
        self.line_where(|line| line.from.is_some())
    }

    fn line_where(&mut self, is_it: impl Fn(&crate::spec::Line) -> bool) -> Option<(Uuid, String)> {
        let lines: Vec<_> = {
            let spec = self.spec.borrow();
            let found = spec.lines.iter().filter(|(_, line)| is_it(line) && line.names.len() == 1);
            found.map(|(id, line)| (*id, line.names[0].clone())).collect()
        };
        (!lines.is_empty()).then(|| lines[self.rng.below(lines.len())].clone())
    }

    fn some_moment(&mut self) -> Option<(Uuid, SnapshotRef)> {
        let moments: Vec<_> = {
            let spec = self.spec.borrow();
            let named = |(id, moment): (&Uuid, &Moment)| {
                let line = spec.lines.get(&moment.line).filter(|line| line.names.len() == 1)?;
                Some((*id, SnapshotRef { disk: name(&line.names[0]), name: moment.name.parse().ok()? }))
            };
            spec.moments.iter().filter_map(named).collect()
        };
        (!moments.is_empty()).then(|| moments[self.rng.below(moments.len())].clone())
    }

    #[allow(clippy::too_many_lines, reason = "one arm a command")]
    fn choose(&mut self, command: Command, of: Asked) -> Option<Box<dyn FnOnce() -> Result<(), ApiError>>> {
        let force = true;
        Some(match command {
            Command::Create | Command::CreateGroup => {
                let [saved, logged, split] = self.shape.strategies;
                let (snapshot, at) = (self.some(&SNAPSHOT_NAMES), self.rng.below(saved + logged + split));
                let mut disks = vec![self.line_where(|_| true)?.1];
                if command == Command::CreateGroup {
                    let other = self.line_where(|_| true)?.1;
                    if !disks.contains(&other) {
                        disks.push(other);
                    }
                }
                let strategy = Some(match at {
                    at if at < saved => Strategy::CopyOnWrite,
                    at if at < saved + logged => Strategy::WriteLogging,
                    _ => Strategy::WriteMirroring,
                });
                let (disks, name) = (disks.iter().map(|d| name(d)).collect(), name(snapshot));
                let writers = Writers::Request;
                let layout = self.some_layout();
                let request = SnapshotRequest { name, disks, strategy, layout, writers, socket: None, image: None };
                Box::new(move || of.create(&request))
            }
            Command::Delete => {
                let (id, reference) = self.some_moment()?;
                let named = reference.name.to_string();
                let options = DeleteSnapshotOptions { force, keep_bookmark: self.rng.chance(20), ..Default::default() };
                Box::new(move || {
                    of.spec.borrow_mut().going.push(named.clone());
                    let done = of.delete(&[id], || {
                        let deletion = of.manager.delete_snapshot(&reference, options)?;
                        Ok(vec![(id, deletion)])
                    });
                    of.has_gone(&named);
                    done
                })
            }
            Command::DeleteGroup => {
                let (id, _) = self.some_moment()?;
                let options = DeleteSnapshotOptions { force, ..Default::default() };
                Box::new(move || of.delete_group(id, options))
            }
            Command::MakeVolume => {
                let volume = self.some(&VOLUME_NAMES);
                let from = match self.some_moment().filter(|_| self.rng.chance(75)) {
                    Some((_, reference)) => VolumeSource::Snapshot(reference),
                    None => VolumeSource::Now(name(&self.line_where(|_| true)?.1)),
                };
                let name = name(volume);
                let request = VolumeRequest { name, from, socket: None, image: None, block_size: None };
                Box::new(move || of.make_volume(&request))
            }
            Command::DeleteVolume => {
                let (id, volume) = self.some_volume()?;
                Box::new(move || of.delete_volume(id, &volume))
            }
            Command::Complete => {
                let (_, volume) = self.some_volume()?;
                let pacing = JobPatch { delay_ms: None, bytes_per_second: None };
                Box::new(move || of.manager.complete_volume(&name(&volume), pacing).map(drop))
            }
            Command::Promote => {
                let (id, volume) = self.some_volume()?;
                Box::new(move || {
                    of.manager.promote_volume(&name(&volume))?;
                    of.line(id, |line| line.from = None);
                    Ok(())
                })
            }
            Command::Update => {
                let (id, volume) = self.some_volume()?;
                let options = UpdateQuery { force, delay_ms: None, bytes_per_second: None };
                Box::new(move || of.update(id, &volume, options))
            }
            Command::Restore => {
                let (id, disk) = self.some_disk()?;
                let (moment, reference) = self.some_moment()?;
                let from = VolumeSource::Snapshot(reference);
                let request = RestoreRequest { from, force, delay_ms: 0, bytes_per_second: 0 };
                Box::new(move || of.restore(id, &disk, moment, &request))
            }
            Command::Disable => {
                let (_, volume) = self.some_volume()?;
                Box::new(move || of.manager.disable_volume(&name(&volume), force).map(drop))
            }
            Command::Enable => {
                let (id, volume) = self.some_volume()?;
                let fresh = self.rng.chance(40);
                Box::new(move || of.enable(id, &volume, fresh))
            }
            Command::Mirror => {
                let (_, disk) = self.some_disk()?;
                let leg = Path::new(DISKS).join(format!("{}.leg", self.rng.below(LEG_NAMES)));
                Box::new(move || of.manager.mirror_disk(&name(&disk), &leg).map(drop))
            }
            Command::Unmirror => {
                let (_, disk) = self.some_disk()?;
                Box::new(move || of.manager.unmirror_disk(&name(&disk), None).map(drop))
            }
            Command::Rename => {
                let (id, old) = self.line_where(|_| true)?;
                let is_volume = self.spec.borrow().lines[&id].from.is_some();
                let new = self.some(if is_volume { &VOLUME_NAMES } else { &DISK_NAMES });
                Box::new(move || of.rename(id, &old, new, is_volume))
            }
            Command::Set => {
                let (id, disk) = self.line_where(|_| true)?;
                let is_volume = self.spec.borrow().lines[&id].from.is_some();
                let durability = if self.rng.chance(50) { Durability::Power } else { Durability::Process };
                let layout = self.some_layout();
                let patch = DiskPatch { durability: Some(durability), layout, ..DiskPatch::default() };
                Box::new(move || match is_volume {
                    true => of.manager.set_volume(&name(&disk), &patch).map(drop),
                    false => of.manager.set_disk(&name(&disk), &patch).map(drop),
                })
            }
            Command::ForgetBookmark => Box::new(move || {
                let Some(bookmark) = of.manager.list_bookmarks()?.into_iter().next() else { return Ok(()) };
                of.manager.delete_bookmark(&SnapshotRef { disk: bookmark.disk, name: bookmark.name })
            }),
            Command::StopJob | Command::ResumeJob => {
                let at = self.rng.below(4);
                Box::new(move || {
                    let jobs = of.manager.list_jobs()?;
                    let Some(job) = jobs.get(at) else { return Ok(()) };
                    match command {
                        Command::StopJob => of.manager.delete_job(job.id).map(drop),
                        _ => of.manager.resume_job(job.id).map(drop),
                    }
                })
            }
        })
    }
}

impl Asked {
    fn line(&self, id: Uuid, with: impl FnOnce(&mut crate::spec::Line)) {
        if let Some(line) = self.spec.borrow_mut().lines.get_mut(&id) {
            with(line);
        }
    }

    fn moment(&self, id: Uuid, with: impl FnOnce(&mut Moment)) {
        if let Some(moment) = self.spec.borrow_mut().moments.get_mut(&id) {
            with(moment);
        }
    }

    /// While a command may give names, they may be found.
    fn coming<T>(&self, names: Vec<String>, work: impl FnOnce() -> Result<T, ApiError>) -> Result<T, ApiError> {
        self.spec.borrow_mut().coming.extend(names.clone());
        let done = work();
        let mut spec = self.spec.borrow_mut();
        for name in names {
            if let Some(at) = spec.coming.iter().position(|n| *n == name) {
                spec.coming.swap_remove(at);
            }
        }
        done
    }

    /// What snapshots there are, of those that nobody has been told of yet.
    fn note_snapshots(&self) -> Result<(), ApiError> {
        let there = self.manager.list_snapshots()?;
        let mut spec = self.spec.borrow_mut();
        for snapshot in there {
            let Some(line) = spec.line_named(snapshot.disk.as_str()).filter(|_| snapshot.epoch > 0) else { continue };
            if spec.moments.contains_key(&snapshot.id) || spec.gone.contains(&snapshot.id) {
                continue;
            }
            let (name, epoch) = (snapshot.name.to_string(), snapshot.epoch);
            spec.moments.insert(snapshot.id, Moment { line, name, epoch, is_certain: false, deletions: 0 });
        }
        Ok(())
    }

    fn create(&self, request: &SnapshotRequest) -> Result<(), ApiError> {
        // Whatever the disk is called by then.
        self.coming(vec![format!("@{}", request.name)], || {
            let made = self.manager.create_snapshots(request);
            // A cut that could not be recorded leaves broken ones.
            self.note_snapshots()?;
            made?.iter().for_each(|snapshot| self.moment(snapshot.id, |moment| moment.is_certain = true));
            Ok(())
        })
    }

    fn delete(
        &self,
        ids: &[Uuid],
        work: impl FnOnce() -> Result<Vec<(Uuid, Deletion)>, ApiError>,
    ) -> Result<(), ApiError> {
        // One that was just made may not be known yet, and be known afterwards.
        let known: Vec<Uuid> = ids.iter().filter(|id| self.spec.borrow().moments.contains_key(id)).copied().collect();
        for id in &known {
            self.moment(*id, |moment| moment.deletions += 1);
        }
        let done = work();
        let there = self.manager.list_snapshots().unwrap_or_default();
        let mut spec = self.spec.borrow_mut();
        for id in ids {
            let Some(moment) = spec.moments.get_mut(id) else { continue };
            moment.deletions -= usize::from(known.contains(id));
            let state = there.iter().find(|s| s.id == *id).map(|s| s.state);
            if !matches!(state, Some(SnapshotState::Quiesced | SnapshotState::Draining | SnapshotState::Broken)) {
                moment.is_certain = false;
            }
        }
        for (id, deletion) in done? {
            if matches!(deletion, Deletion::Done) {
                spec.moments.remove(&id);
                spec.gone.insert(id);
            }
        }
        Ok(())
    }

    /// Whatever had this name when it was deleted.
    fn has_gone(&self, name: &str) {
        let there = self.manager.list_snapshots().unwrap_or_default();
        let mut spec = self.spec.borrow_mut();
        if let Some(at) = spec.going.iter().position(|going| going == name) {
            spec.going.swap_remove(at);
        }
        let gone = |(id, moment): &(&Uuid, &mut Moment)| {
            let state = there.iter().find(|s| s.id == **id).map(|s| s.state);
            moment.name == name && !matches!(state, Some(SnapshotState::Quiesced | SnapshotState::Draining))
        };
        spec.moments.iter_mut().filter(gone).for_each(|(_, moment)| moment.is_certain = false);
    }

    fn delete_group(&self, of: Uuid, options: DeleteSnapshotOptions) -> Result<(), ApiError> {
        let there = self.manager.list_snapshots()?;
        let Some(group) = there.iter().find(|s| s.id == of).map(|s| s.group) else { return Ok(()) };
        let members: Vec<_> = there.into_iter().filter(|s| s.group == group).collect();
        let ids: Vec<Uuid> = members.iter().map(|s| s.id).collect();
        self.delete(&ids, || {
            let done = self.manager.delete_group(group, options)?;
            let is_deleted = |reference: &str| {
                let found = done.iter().find(|d| d.snapshot == reference);
                found.is_some_and(|d| d.state == DeletionState::Deleted)
            };
            let of_member = |s: &halfsilver::control::api::Snapshot| {
                is_deleted(&format!("{}@{}", s.disk, s.name)).then_some((s.id, Deletion::Done))
            };
            Ok(members.iter().filter_map(of_member).collect())
        })
    }

    fn make_volume(&self, request: &VolumeRequest) -> Result<(), ApiError> {
        let name = request.name.to_string();
        let VolumeSource::Now(_) = &request.from else { return self.make_volume_named(vec![name], request) };
        // The snapshot that is taken for it has its name, and goes if nothing comes of it: also when another command has made
        // a volume on it meanwhile that is gone by then.
        self.spec.borrow_mut().going.push(name.clone());
        let done = self.make_volume_named(vec![name.clone(), format!("@{name}")], request);
        self.has_gone(&name);
        done
    }

    fn make_volume_named(&self, names: Vec<String>, request: &VolumeRequest) -> Result<(), ApiError> {
        self.coming(names, || {
            let made = self.manager.create_volume(request);
            self.note_snapshots()?;
            let made = made?;
            let mut spec = self.spec.borrow_mut();
            if let Some(moment) = spec.moments.get_mut(&made.from_id) {
                moment.is_certain = true;
            }
            let sectors = spec.frozen_of(made.from_id).expect("a volume stands on a snapshot that is known");
            spec.add_volume(made.id, made.name.as_str(), made.from_id, sectors);
            Ok(())
        })
    }

    fn delete_volume(&self, id: Uuid, volume: &str) -> Result<(), ApiError> {
        self.line(id, |line| line.deletions += 1);
        let done = self.manager.delete_volume(&name(volume), true);
        if done.is_ok() {
            let mut spec = self.spec.borrow_mut();
            spec.lines.remove(&id);
            spec.moments.retain(|_, moment| moment.line != id);
            spec.gone.insert(id);
        } else {
            self.line(id, |line| line.deletions -= 1);
        }
        done
    }

    /// Its guests are away until it is known what it shows.
    fn away<T>(&self, id: Uuid, work: impl FnOnce() -> Result<T, ApiError>) -> Result<T, ApiError> {
        self.line(id, |line| line.is_away = true);
        let done = work();
        self.line(id, |line| line.is_away = false);
        done
    }

    fn update(&self, id: Uuid, volume: &str, options: UpdateQuery) -> Result<(), ApiError> {
        self.away(id, || {
            let before = self.spec.borrow().lines.get(&id).and_then(|line| line.from);
            let done = self.manager.update_volume(&name(volume), options);
            self.note_snapshots()?;
            let from = self.manager.get_volume(&name(volume)).ok().filter(|v| v.id == id).map(|v| v.from_id);
            let mut spec = self.spec.borrow_mut();
            if from != before
                && let Some(sectors) = from.and_then(|from| spec.frozen_of(from))
            {
                spec.may_become(id, sectors);
                spec.has_become(id, true);
                if let Some(line) = spec.lines.get_mut(&id) {
                    line.from = from;
                }
            }
            done.map(drop)
        })
    }

    fn restore(&self, id: Uuid, disk: &str, moment: Uuid, request: &RestoreRequest) -> Result<(), ApiError> {
        {
            let mut spec = self.spec.borrow_mut();
            let is_alone = spec.lines.get(&id).is_some_and(|line| line.contents(false).count() == 1);
            let Some(sectors) = spec.frozen_of(moment).filter(|_| is_alone) else { return Ok(()) };
            if sectors.len() != spec.lines[&id].sectors() {
                return Ok(());
            }
            spec.may_become(id, sectors);
        }
        let done = self.manager.restore_disk(&name(disk), request);
        self.spec.borrow_mut().has_become(id, done.is_ok());
        done.map(drop)
    }

    fn enable(&self, id: Uuid, volume: &str, fresh: bool) -> Result<(), ApiError> {
        self.away(id, || {
            if fresh {
                let mut spec = self.spec.borrow_mut();
                let from = spec.lines.get(&id).and_then(|line| line.from);
                let Some(sectors) = from.and_then(|from| spec.frozen_of(from)) else { return Ok(()) };
                spec.may_become(id, sectors);
            }
            let done = self.manager.enable_volume(&name(volume), fresh);
            if fresh {
                self.spec.borrow_mut().has_become(id, done.is_ok());
            }
            done.map(drop)
        })
    }

    fn rename(&self, id: Uuid, old: &str, new: &str, is_volume: bool) -> Result<(), ApiError> {
        self.line(id, |line| line.names.push(new.to_owned()));
        let done = match is_volume {
            true => self.manager.rename_volume(&name(old), &name(new), true).map(drop),
            false => self.manager.rename_disk(&name(old), &name(new), true).map(drop),
        };
        self.line(id, |line| {
            // Another one may give it a name at the same time.
            let at = line.names.iter().rposition(|name| name == new).expect("it was put there");
            line.names.remove(at.max(1));
            if done.is_ok() {
                new.clone_into(&mut line.names[0]);
            }
        });
        done
    }
}
