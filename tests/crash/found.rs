//! What must be found after an end: by the arrays of the specification, by what somebody was told, and by what `check` says
//! that a start does.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::control::Service;
use halfsilver::control::api::{
    Disk, Durability, JobKind, JobState, Layout, Leg, LegState, Snapshot, SnapshotState, Volume, VolumeState,
};
use halfsilver::daemon::check::{CheckReport, CheckedJob, DiskVerdict, SnapshotVerdict, examine};
use halfsilver::engine::{Request, RequestError};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, IoQueue};
use halfsilver::manager::Places;
use uuid::Uuid;

use crate::media::{self, SECTOR, set_aside};
use crate::sim::{End, RUN, STATE, Socket, Thread};
use crate::spec::{self, Entry, Line, Moment, Spec, check};
use crate::world::World;

/// A run that has ended.
pub struct Ended<'a> {
    pub spec: &'a Spec,
    /// What the daemon said at that moment.
    pub told: &'a [Snapshot],
    pub told_of_volumes: &'a [Volume],
    pub end: End,
}

/// All that a daemon lists.
struct Listed {
    disks: Vec<Disk>,
    volumes: Vec<Volume>,
    snapshots: Vec<Snapshot>,
    unserved: Vec<String>,
}

/// Starts what was left, and looks at everything. Returns the specification from here on.
pub fn find(world: &mut World, ended: &Ended) -> Result<Spec, String> {
    let (sim, said) = (world.sim.clone(), Rc::new(RefCell::new(None)));
    let (put, before) = (said.clone(), media::changes());
    world.finish(Thread::new(move || {
        let places = Places::to_look_at(Path::new(STATE), Path::new(RUN));
        *put.borrow_mut() = Some(examine(&*sim, &places).map_err(|e| format!("it cannot be examined: {e}")));
    }))?;
    if media::changes() != before {
        return Err("check has changed something".to_owned());
    }
    let said: CheckReport = said.take().ok_or("check says nothing")??;
    // A pack that an operation has begun is not taken for something that may be missed.
    for kept in said.findings.iter().filter(|finding| finding.what.starts_with("no record names it")) {
        let bytes = world.sim.bytes_of(&kept.path).unwrap_or_default();
        if bytes.starts_with(b"HSPACK01") && bytes[4096..].iter().all(|byte| *byte == 0) {
            return Err(format!("nobody takes {} away: {}", kept.path.display(), kept.what));
        }
    }
    world.start(Vec::new());
    for _ in 0..1_000_000 {
        if world.manager.borrow().is_some() {
            break;
        }
        let before = media::changes();
        world.step_quietly()?;
        if before != media::changes() {
            end_amid_start(world, ended)?;
        }
    }
    let listed = list(world)?;
    is_as_said(&said, &listed, world).map_err(|e| format!("check said otherwise: {e}"))?;
    let next = judge(world, ended, &listed)?;
    if world.goes_on {
        return Ok(next);
    }
    // What a leg lacks is copied to it first, or under the guests' writes.
    let first = world.rng.chance(50);
    if first {
        legs_become_equal(world, &listed)?;
    }
    frozen_versions_stay_as_they_are(world, &listed)?;
    if !first {
        legs_become_equal(world, &listed)?;
    }
    Ok(next)
}

/// Whatever the end left in the places of frozen versions: when guests overwrite everything, they show what they showed.
fn frozen_versions_stay_as_they_are(world: &mut World, listed: &Listed) -> Result<(), String> {
    let frozen: Vec<&Snapshot> = listed.snapshots.iter().filter(|s| s.state == SnapshotState::Quiesced).collect();
    let mut shown = Vec::new();
    for snapshot in &frozen {
        shown.push(read(world, &snapshot.socket));
    }
    let names = listed.disks.iter().map(|d| d.name.as_str()).chain(listed.volumes.iter().map(|v| v.name.as_str()));
    for name in names {
        let Some(socket) = world.sim.socket(&Path::new(RUN).join(format!("{name}.sock"))) else { continue };
        let sectors = usize::try_from(socket.attachment.geometry().size_bytes).unwrap() / SECTOR;
        let from = spec::filled(0, sectors, u64::MAX >> 1);
        let written = world.finish(async move {
            let ticket = socket.attachment.lane().enter();
            let request = Request::Write { at: ByteOffset(0), from, durable: false };
            socket.attachment.execute(&IoQueue::simulated(), &ticket, request).await
        })?;
        match written {
            Ok(()) | Err(RequestError::Broken(_)) => {}
            Err(e) => return Err(format!("{name} cannot be overwritten: {e}")),
        }
    }
    for (snapshot, before) in frozen.into_iter().zip(shown) {
        // Its deletion may have gone on, and that of what it belongs to.
        let (Ok(before), Ok(after)) = (before, read(world, &snapshot.socket)) else { continue };
        if before != after {
            return Err(format!("snapshot {}@{} changes when its disk is overwritten", snapshot.disk, snapshot.name));
        }
        world.count("snapshots that stayed the same under writes after an end");
    }
    Ok(())
}

/// Now and then it ends again before it has started.
fn end_amid_start(world: &mut World, ended: &Ended) -> Result<(), String> {
    let Some((end, next)) = world.ends_amid_start() else { return Ok(()) };
    let _aside = set_aside();
    // It goes before what was set aside comes back.
    let mut next = next;
    // After any power cut only what is durable is there.
    let as_if = if ended.end.is_power_cut() { ended.end } else { end };
    let again = Ended { end: as_if, ..*ended };
    find(&mut next, &again).map(drop).map_err(|e| format!("\n  then {end:?} amid its start: {e}"))
}

fn list(world: &mut World) -> Result<Listed, String> {
    let unserved = world.ask(|manager| manager.list_unserved())??;
    Ok(Listed {
        disks: world.ask(|manager| manager.list_disks())??,
        volumes: world.ask(|manager| manager.list_volumes())??,
        snapshots: world.ask(|manager| manager.list_snapshots())??,
        unserved: unserved.into_iter().map(|u| format!("{}: {}", u.name, u.reason)).collect(),
    })
}

/// What was taken up is what `check` said before anything was opened.
fn is_as_said(said: &CheckReport, listed: &Listed, world: &World) -> Result<(), String> {
    let is_unserved = |name: &str| listed.unserved.iter().any(|u| u.starts_with(&format!("{name}: ")));
    let mut snapshots: BTreeMap<String, &Snapshot> =
        listed.snapshots.iter().map(|s| (format!("{}@{}", s.disk, s.name), s)).collect();
    for disk in &said.disks {
        let volume = listed.volumes.iter().find(|v| v.name.as_str() == disk.name);
        let is_broken = volume.is_some_and(|v| v.state == VolumeState::Broken);
        // One that has everything already, although the records say that it stands on something, soon stands on nothing.
        let is_completed = |job: &CheckedJob| ["migrate", "update"].contains(&job.kind) && !job.stopped;
        if disk.verdict == DiskVerdict::NotServed && disk.from.is_some() && disk.jobs.iter().any(is_completed) {
            snapshots.retain(|name, _| !name.starts_with(&format!("{}@", disk.name)));
            continue;
        }
        let agrees = match disk.verdict {
            DiskVerdict::Served | DiskVerdict::ServedAsFlushed => !is_unserved(&disk.name) && !is_broken,
            DiskVerdict::NotServed => is_unserved(&disk.name) || is_broken,
        };
        if !agrees {
            let state = volume.map(|v| v.state);
            return Err(format!(
                "{} is to be {:?} ({:?}), and is {state:?}: {:?}",
                disk.name, disk.verdict, disk.reason, listed.unserved
            ));
        }
        if is_unserved(&disk.name) {
            continue;
        }
        for snapshot in &disk.snapshots {
            let found = snapshots.remove(&snapshot.snapshot);
            let state = found.map(|s| s.state);
            let agrees = match snapshot.verdict {
                // One that the daemon took for itself goes when its volume has copied the rest.
                SnapshotVerdict::Kept => {
                    matches!(state, Some(SnapshotState::Quiesced)) || is_daemons(&snapshot.snapshot)
                }
                // That is begun when the rest is served.
                SnapshotVerdict::Tidied => state.is_none_or(|state| state != SnapshotState::Broken),
                // It may be over by now.
                SnapshotVerdict::Deleting => {
                    matches!(state, None | Some(SnapshotState::Deleting | SnapshotState::Folding))
                }
                SnapshotVerdict::Broken => {
                    matches!(state, Some(SnapshotState::Broken)) || is_daemons(&snapshot.snapshot)
                }
                SnapshotVerdict::Waits => state.is_some(),
            };
            if !agrees {
                let reason = found.and_then(|s| s.reason.clone());
                return Err(format!(
                    "{} is to be {:?} ({:?}), and is {state:?} ({reason:?})",
                    snapshot.snapshot, snapshot.verdict, snapshot.reason
                ));
            }
            world.count(&format!("snapshots said to be {:?}", snapshot.verdict));
        }
    }
    if let Some((name, _)) = snapshots.first_key_value() {
        return Err(format!("nothing was said of {name}"));
    }
    let names = listed.disks.iter().map(|d| d.name.as_str()).chain(listed.volumes.iter().map(|v| v.name.as_str()));
    for name in names {
        if !said.disks.iter().any(|disk| disk.name == name) {
            return Err(format!("nothing was said of {name}"));
        }
    }
    world.count("compared with check");
    Ok(())
}

/// Once nothing is copied to legs any more, those that are in sync are equal.
fn legs_become_equal(world: &mut World, listed: &Listed) -> Result<(), String> {
    if listed.disks.iter().all(|disk| disk.legs.len() < 2) {
        return Ok(());
    }
    for _ in 0..100_000 {
        if let Some(compared) = legs_are_equal(world)? {
            (0..compared).for_each(|_| world.count("pairs of legs that were equal after an end"));
            return Ok(());
        }
        for _ in 0..20 {
            world.step_quietly()?;
        }
    }
    Err("a leg is synchronised for ever".to_owned())
}

/// Legs that are in sync are equal, while no guest writes. Returns of how many disks, or None while something is copied to a
/// leg.
fn legs_are_equal(world: &mut World) -> Result<Option<usize>, String> {
    let (disks, jobs) = world.ask(|manager| Ok((manager.list_disks()?, manager.list_jobs()?)))??;
    if jobs.iter().any(|job| job.kind == JobKind::Mirror && job.state == JobState::Running) {
        return Ok(None);
    }
    let mut compared = 0;
    for disk in disks {
        let is_in_sync = |leg: &&Leg| leg.state == LegState::InSync;
        let in_sync: Vec<&Leg> = disk.legs.iter().filter(is_in_sync).collect();
        let [one, other] = in_sync[..] else { continue };
        let of = |leg: &Leg| world.sim.bytes_of(&leg.path).ok_or_else(|| format!("{} is gone", leg.path.display()));
        let (ones, others) = (of(one)?, of(other)?);
        let sectors = ones.chunks_exact(SECTOR).zip(others.chunks_exact(SECTOR));
        if let Some(at) = sectors.into_iter().position(|(one, other)| one != other) {
            let (one, other) = (one.path.display(), other.path.display());
            return Err(format!("{one} and {other} are in sync as legs of {}, and differ in sector {at}", disk.name));
        }
        compared += 1;
    }
    Ok(Some(compared))
}

fn judge(world: &mut World, ended: &Ended, listed: &Listed) -> Result<Spec, String> {
    let (spec, is_power_cut) = (ended.spec, ended.end.is_power_cut());
    let mut next = spec.after();
    let disks = listed.disks.iter().filter_map(|d| Some((d.id?, d.name.to_string(), None)));
    let volumes = listed.volumes.iter().map(|v| (v.id, v.name.to_string(), Some(v)));
    let there: BTreeMap<Uuid, (String, Option<&Volume>)> =
        disks.chain(volumes).map(|(id, name, volume)| (id, (name, volume))).collect();
    told(spec, listed, &there)?;
    for (id, (name, volume)) in &there {
        let from = volume.map(|v| v.from_id);
        let what = |e: String| format!("{name}: {e}");
        let bytes = match volume.map(|v| v.state) {
            Some(VolumeState::Disabled | VolumeState::Broken) => None,
            _ => Some(read(world, &Path::new(RUN).join(format!("{name}.sock"))).map_err(what)?),
        };
        let was_broken = ended.told_of_volumes.iter().any(|v| v.id == *id && v.reason.is_some());
        if volume.is_some_and(|v| v.state == VolumeState::Broken) && !is_power_cut && !was_broken {
            return Err(what(format!("it did not outlive a kill: {:?}", volume.and_then(|v| v.reason.clone()))));
        }
        let before = spec.lines.get(id);
        // What it was updated to, if it has been and nobody was told yet.
        let moved = before.is_none_or(|line| from.is_some() && line.from != from);
        let on = from.filter(|_| moved).and_then(|from| of_snapshot(spec, listed, &there, from));
        match (bytes, before, on) {
            // What it was updated to and made independent of, and the snapshot is gone: some moment of its source.
            (Some(bytes), Some(_), None) if moved => {
                let past = spec.all_pasts(bytes.len() / SECTOR).find_map(|sets| check(&bytes, sets).ok());
                let found = past.ok_or_else(|| what("it shows no moment of anything".to_owned()))?;
                next.add_volume(*id, name, from.unwrap_or_default(), found.iter().map(|e| vec![*e]).collect());
            }
            (Some(bytes), Some(line), None) => {
                let found = is_one_of(&bytes, line, is_power_cut).map_err(what)?;
                next.found_line(*id, name, from, Some((line, found)), is_power_cut);
            }
            (Some(bytes), _, Some(sectors)) => {
                let found = check(&bytes, &sectors).map_err(what)?;
                next.add_volume(*id, name, from.unwrap_or_default(), found.iter().map(|e| vec![*e]).collect());
            }
            (Some(_), None, None) => return Err(what("nobody knows what it should show".to_owned())),
            (None, Some(line), None) => next.keep_line(*id, name, from, line, is_power_cut),
            (None, _, Some(sectors)) => next.add_volume(*id, name, from.unwrap_or_default(), sectors),
            (None, None, None) => {}
        }
    }
    for snapshot in &listed.snapshots {
        let reference = format!("{}@{}", snapshot.disk, snapshot.name);
        let what = |e: String| format!("snapshot {reference}: {e}");
        outlives(snapshot, ended).map_err(what)?;
        let Some(line) = there.iter().find(|(_, (name, _))| *name == snapshot.disk.as_str()).map(|(id, _)| *id) else {
            return Err(what("its disk is not there".to_owned()));
        };
        let moment = Moment {
            line,
            name: snapshot.name.to_string(),
            epoch: snapshot.epoch,
            // The daemon deletes those that it took for itself when it likes.
            is_certain: snapshot.state == SnapshotState::Quiesced && !is_daemons(&reference),
            deletions: 0,
        };
        if snapshot.state != SnapshotState::Quiesced {
            next.moments.insert(snapshot.id, moment);
            continue;
        }
        if is_daemons(&reference) && world.sim.socket(&snapshot.socket).is_none() {
            continue; // It has gone since it was listed.
        }
        let Some(sectors) = spec.frozen(line, snapshot.epoch) else {
            return Err(what(format!("nobody knows what epoch {} showed", snapshot.epoch)));
        };
        let bytes = read(world, &snapshot.socket).map_err(what)?;
        let found = check(&bytes, &sectors).map_err(what)?;
        let after = if is_power_cut { "after a power cut" } else { "after a kill" };
        world.count(&format!("snapshots {after}"));
        if snapshot.layout == Layout::Packed {
            world.count(&format!("packed snapshots {after}"));
        }
        next.found_moment(snapshot.id, moment, &found);
    }
    Ok(next)
}

/// What a snapshot shows that a volume stands on.
fn of_snapshot(
    spec: &Spec,
    listed: &Listed,
    there: &BTreeMap<Uuid, (String, Option<&Volume>)>,
    id: Uuid,
) -> Option<Vec<Vec<Entry>>> {
    if let Some(sectors) = spec.frozen_of(id) {
        return Some(sectors);
    }
    let snapshot = listed.snapshots.iter().find(|s| s.id == id)?;
    let line = there.iter().find(|(_, (name, _))| *name == snapshot.disk.as_str())?.0;
    spec.frozen(*line, snapshot.epoch)
}

/// Whether it is named by the daemon, as those are that it takes for restores and updates.
fn is_daemons(snapshot: &str) -> bool {
    snapshot.contains("@restore-") || snapshot.contains("-update-")
}

/// What somebody was told holds.
fn told(spec: &Spec, listed: &Listed, there: &BTreeMap<Uuid, (String, Option<&Volume>)>) -> Result<(), String> {
    if let Some(unserved) = listed.unserved.first() {
        return Err(format!("it is not served: {unserved}"));
    }
    for (id, line) in &spec.lines {
        match there.get(id) {
            None if line.deletions == 0 => return Err(format!("{:?} is gone", line.names)),
            Some((name, _)) if !line.names.contains(name) => {
                return Err(format!("{:?} is called {name}", line.names));
            }
            _ => {}
        }
    }
    for (id, (name, _)) in there {
        if spec.gone.contains(id) {
            return Err(format!("{name} was deleted, and is back"));
        }
        if !spec.lines.contains_key(id) && !spec.coming.contains(name) {
            return Err(format!("nobody has made {name}"));
        }
    }
    for (id, moment) in &spec.moments {
        let is_there = listed.snapshots.iter().any(|s| s.id == *id);
        let stays = moment.is_certain && moment.deletions == 0 && !spec.going.contains(&moment.name);
        if !is_there && stays && there.contains_key(&moment.line) {
            let names = &spec.lines[&moment.line].names;
            return Err(format!(
                "snapshot {} ({id}) of {names:?}, which ended epoch {}, is gone",
                moment.name, moment.epoch
            ));
        }
    }
    for snapshot in &listed.snapshots {
        let name = format!("{}@{}", snapshot.disk, snapshot.name);
        if spec.gone.contains(&snapshot.id) {
            return Err(format!("snapshot {name} was deleted, and is back"));
        }
        let is_coming = spec.coming.contains(&format!("@{}", snapshot.name));
        if !spec.moments.contains_key(&snapshot.id) && !is_coming && !is_daemons(&name) {
            return Err(format!("nobody has made snapshot {name}"));
        }
    }
    Ok(())
}

/// Whether a snapshot is as whole as it must be.
fn outlives(snapshot: &Snapshot, ended: &Ended) -> Result<(), String> {
    let was = ended.told.iter().find(|s| s.id == snapshot.id);
    let says = |what: &str| Err(format!("it {what}: {:?}", snapshot.reason));
    match (snapshot.state, was) {
        (SnapshotState::Broken, Some(was)) if was.reason.is_some() => Ok(()),
        // One that is lost is off the list before the records have forgotten it.
        (SnapshotState::Broken, None) if ended.spec.moments.get(&snapshot.id).is_some_and(|m| m.deletions > 0) => {
            Ok(())
        }
        (SnapshotState::Broken, _) if !ended.end.is_power_cut() => says("did not outlive a kill"),
        (SnapshotState::Broken, Some(was))
            if was.state == SnapshotState::Quiesced && was.durability == Durability::Power =>
        {
            says("did not outlive a power cut")
        }
        _ => Ok(()),
    }
}

fn is_one_of(bytes: &[u8], line: &Line, is_power_cut: bool) -> Result<Vec<Entry>, String> {
    let mut why = String::new();
    for sectors in line.contents(is_power_cut) {
        match check(bytes, sectors) {
            Ok(found) => return Ok(found),
            Err(e) => why = if why.is_empty() { e } else { format!("{why}; or {e}") },
        }
    }
    Err(why)
}

/// The whole content that a socket shows.
fn read(world: &mut World, path: &Path) -> Result<Vec<u8>, String> {
    let socket: Arc<Socket> = world.sim.socket(path).ok_or_else(|| format!("nobody listens at {}", path.display()))?;
    let sectors = usize::try_from(socket.attachment.geometry().size_bytes).unwrap() / SECTOR;
    let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(sectors * SECTOR));
    let done = world.finish(async move {
        let ticket = socket.attachment.lane().enter();
        socket.attachment.execute(&IoQueue::simulated(), &ticket, Request::Read { at: ByteOffset(0), into }).await
    })?;
    done.map(|()| memory.to_vec()).map_err(|e| format!("it cannot be read: {e}"))
}

/// Nothing goes on any more: everything shows what was written.
pub fn at_rest(world: &mut World) -> Result<(), String> {
    let in_end = |e: String| format!("in the end {e}");
    legs_are_equal(world).map_err(in_end)?.ok_or("in the end a leg is synchronised")?;
    let listed = list(world).map_err(in_end)?;
    let spec = world.spec.borrow().clone();
    let ended = Ended { spec: &spec, told: &listed.snapshots, told_of_volumes: &listed.volumes, end: End::Kill };
    judge(world, &ended, &listed).map(drop).map_err(in_end)
}
