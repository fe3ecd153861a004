//! Commands that are refused half way, one by one: what they left as it was.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::control::api::{
    DiskConfig, DiskState, JobState, RestoreRequest, SnapshotRequest, SnapshotState, VolumeSource, Writers,
};
use halfsilver::control::{ApiError, Service, SnapshotRef};
use halfsilver::daemon::config::DiskSpec;
use halfsilver::engine::Request;
use halfsilver::host::Host;
use halfsilver::image::ByteOffset;
use halfsilver::manager::Manager;

use crate::media::{Medium, Op, SECTOR};
use crate::schedule::Rng;
use crate::sim::{DISKS, End, RUN, STATE, Sim, Thread};
use crate::spec::{self, Spec};
use crate::world::{Shape, World, name};

/// A daemon that serves disk `a` with this image.
fn serving(sim: Arc<Sim>, path: &Path) -> World {
    let mut world = World::on(sim, Spec::new(), Rng::new(1), Shape::of(0), 0, Rc::new(RefCell::default()));
    world.start(vec![DiskSpec { name: name("a"), config: DiskConfig::new(path) }]);
    while world.manager.borrow().is_none() {
        world.step_quietly().unwrap();
    }
    world
}

fn done(world: &mut World, ask: impl FnOnce(&Manager) -> Result<(), halfsilver::control::ApiError> + 'static) {
    world.ask(ask).unwrap().unwrap();
}

fn synchronised(world: &mut World) {
    while world.ask(|daemon| daemon.list_jobs()).unwrap().unwrap().iter().any(|job| job.state == JobState::Running) {
        world.step_quietly().unwrap();
    }
}

/// A mirror that is refused does not make a disk again of what was let go: it does not have what was written since.
#[test]
fn what_was_a_leg_once_stays_that_when_a_mirror_is_refused() {
    for refusals in 1..=3 {
        let _undisturbed = crate::alone::undisturbed();
        let (sim, old, new) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"), PathBuf::from(DISKS).join("new.raw"));
        sim.put_image(&old, spec::initial(16));
        let mut world = serving(sim.clone(), &old);
        let leg = new.clone();
        done(&mut world, move |daemon| daemon.mirror_disk(&name("a"), &leg).map(drop));
        synchronised(&mut world);
        let leg = old.clone();
        done(&mut world, move |daemon| daemon.unmirror_disk(&name("a"), Some(&leg)).map(drop));
        sim.refuse_records(refusals);
        let leg = old.clone();
        let refused = world.ask(move |daemon| daemon.mirror_disk(&name("a"), &leg).map(drop)).unwrap();
        assert!(refused.unwrap_err().contains("full"));
        sim.refuse_records(0);
        // Something else that is recorded.
        done(&mut world, |daemon| daemon.set_disk(&name("a"), &Default::default()).map(drop));
        let left = sim.after(End::Kill, &mut Rng::new(1));
        drop(world);

        let mut world = serving(left, &old);
        let disks = world.ask(|daemon| daemon.list_disks()).unwrap().unwrap();
        let reason = disks[0].reason.clone().unwrap_or_default();
        assert!(disks[0].state != DiskState::Serving && reason.contains("was a leg"), "{:?}", disks[0]);
    }
}

fn images(sim: &Sim) -> Vec<Medium> {
    sim.images_in(&Path::new(STATE).join("images"))
}

fn snapshot(named: &str) -> SnapshotRequest {
    SnapshotRequest {
        name: named.parse().unwrap(),
        disks: vec![name("a")],
        strategy: None,
        layout: None,
        writers: Writers::Request,
        socket: None,
        image: None,
    }
}

/// Takes a snapshot, and waits until nothing changes it any more.
fn take(world: &mut World, named: &'static str) {
    done(world, move |daemon| daemon.create_snapshots(&snapshot(named)).map(drop));
    let quiesced = move |daemon: &Manager| {
        let there = daemon.list_snapshots()?;
        Ok(there.iter().any(|s| s.name.as_str() == named && s.state == SnapshotState::Quiesced))
    };
    while !world.ask(quiesced).unwrap().unwrap() {
        world.step_quietly().unwrap();
    }
}

/// A snapshot that was refused leaves nothing that its name is refused for afterwards.
#[test]
fn a_refused_snapshot_leaves_its_name_free() {
    let _undisturbed = crate::alone::undisturbed();
    let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
    sim.put_image(&path, spec::initial(16));
    let mut world = serving(sim.clone(), &path);
    let before = images(&sim).len();
    sim.refuse_records(1000);
    let refused = world.ask(|daemon| daemon.create_snapshots(&snapshot("daily")).map(drop)).unwrap();
    assert!(refused.unwrap_err().contains("full"));
    assert_eq!(images(&sim).len(), before);
    sim.refuse_records(0);
    take(&mut world, "daily");
    assert_eq!(images(&sim).len(), before + 1);
}

/// What a guest writes to some blocks that are not zeros.
fn write(world: &mut World, sectors: std::ops::Range<usize>) {
    let socket = world.sim.socket(&Path::new(RUN).join("a.sock")).unwrap();
    let (at, from) = (ByteOffset((sectors.start * SECTOR) as u64), spec::filled(sectors.start, sectors.len(), 7));
    let host = world.sim.clone();
    // On a thread: a version that cannot be kept is said to be broken on storage, too.
    let written = Rc::new(RefCell::new(None));
    let put = written.clone();
    let work = Thread::new(move || {
        let done = (&*host as &dyn Host).block_on(async move |queue| {
            let ticket = socket.attachment.lane().enter();
            socket.attachment.execute(&queue, &ticket, Request::Write { at, from, durable: false }).await
        });
        *put.borrow_mut() = Some(done.unwrap());
    });
    world.finish(work).unwrap();
    written.take().unwrap().unwrap();
}

fn to_daily() -> RestoreRequest {
    let from = VolumeSource::Snapshot(SnapshotRef { disk: name("a"), name: name("daily") });
    RestoreRequest { from, force: true, delay_ms: 0, bytes_per_second: 0 }
}

/// A restart goes on with a job that has failed, also when it was to be resumed and that was refused.
#[test]
fn a_refused_resumption_does_not_stop_a_job() {
    let _undisturbed = crate::alone::undisturbed();
    let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
    sim.put_image(&path, spec::initial(32));
    let mut world = serving(sim.clone(), &path);
    take(&mut world, "daily");
    write(&mut world, 16..24);
    let disk = sim.images_in(Path::new(DISKS)).remove(0);
    disk.fail(Op::Write, 0, libc::EIO);
    done(&mut world, |daemon| daemon.restore_disk(&name("a"), &to_daily()).map(drop));
    let job = |world: &mut World| world.ask(|daemon| daemon.list_jobs()).unwrap().unwrap().pop();
    synchronised(&mut world);
    let failed = job(&mut world).unwrap();
    assert_eq!(failed.state, JobState::Failed);
    disk.heal();
    sim.refuse_records(1);
    let refused = world.ask(move |daemon| daemon.resume_job(failed.id).map(drop)).unwrap();
    assert!(refused.unwrap_err().contains("full"));
    // Something else that is recorded.
    done(&mut world, |daemon| daemon.set_disk(&name("a"), &Default::default()).map(drop));
    let left = sim.after(End::Kill, &mut Rng::new(1));
    drop(world);

    let mut world = serving(left.clone(), &path);
    synchronised(&mut world);
    assert!(job(&mut world).is_none_or(|job| job.state == JobState::Done), "{:?}", job(&mut world));
    assert_eq!(left.bytes_of(&path).unwrap(), spec::initial(32));
}

/// What a snapshot could not keep while a restore from it was made ready is not taken for what the disk had.
#[test]
fn a_snapshot_that_breaks_beside_a_restore_is_not_restored_from() {
    let _undisturbed = crate::alone::undisturbed();
    const SECTORS: usize = 32;
    let block = 16..24;
    let mut late = 0;
    for steps in 0..600 {
        let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
        sim.put_image(&path, spec::initial(SECTORS));
        let mut world = serving(sim.clone(), &path);
        take(&mut world, "daily");
        let answer: Rc<RefCell<Option<Result<(), ApiError>>>> = Rc::default();
        let (put, daemon) = (answer.clone(), world.manager.borrow().clone().unwrap());
        world.scheduler.spawn(Thread::new(move || {
            let done = daemon.restore_disk(&name("a"), &to_daily()).map(drop);
            drop(daemon);
            *put.borrow_mut() = Some(done);
        }));
        for _ in 0..steps {
            world.step_quietly().unwrap();
        }
        images(&sim).iter().for_each(|image| image.fail(Op::Write, 0, libc::ENOSPC));
        write(&mut world, block.clone());
        let is_restoring = |daemon: &Manager| Ok(daemon.list_disks()?[0].restoring.is_some());
        // Otherwise it may have been written afterwards.
        let was_before = answer.borrow().is_none() && !world.ask(is_restoring).unwrap().unwrap();
        while answer.borrow().is_none() {
            world.step_quietly().unwrap();
        }
        let answered = answer.take().unwrap();
        if answered.is_ok() {
            synchronised(&mut world);
            let range = block.start * SECTOR..block.end * SECTOR;
            let (now, then) = (sim.bytes_of(&path).unwrap(), spec::initial(SECTORS));
            assert!(
                !was_before || now[range.clone()] == then[range],
                "after {steps} steps: what was written is shown as restored"
            );
            if !was_before {
                break;
            }
        }
        late += usize::from(answered.is_err_and(|e| e.message.contains("while it was made ready")));
    }
    assert!(late > 0, "it broke in time, or too late");
}
