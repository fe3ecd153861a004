//! Commands that are refused half way, one by one: what they left as it was.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::control::api::{
    DeleteSnapshotOptions, DiskConfig, DiskState, Durability, Job, JobKind, JobState, LegState, RestoreRequest,
    SnapshotRequest, SnapshotState, Strategy, VolumeRequest, VolumeSource, VolumeState, Writers,
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
    write_to(world, "a.sock", sectors);
}

fn write_to(world: &mut World, socket: &str, sectors: std::ops::Range<usize>) {
    let socket = world.sim.socket(&Path::new(RUN).join(socket)).unwrap();
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

/// Waits until something is so.
fn wait_until(world: &mut World, what: &str, is_so: impl Fn(&Manager) -> Result<bool, ApiError> + Clone + 'static) {
    for _ in 0..2000 {
        let is_so = is_so.clone();
        if world.ask(move |daemon| is_so(daemon)).unwrap().unwrap() {
            return;
        }
        for _ in 0..20 {
            world.step_quietly().unwrap();
        }
    }
    panic!("never: {what}");
}

fn no_snapshot_is_left(world: &mut World) {
    wait_until(world, "what was refused has gone", |daemon| Ok(daemon.list_snapshots()?.is_empty()));
}

/// Gives a command on a thread of its own; what it answers is there when it is over.
fn give(
    world: &mut World,
    command: impl FnOnce(&Manager) -> Result<(), ApiError> + 'static,
) -> Rc<RefCell<Option<Result<(), ApiError>>>> {
    let answer: Rc<RefCell<Option<Result<(), ApiError>>>> = Rc::default();
    let (put, daemon) = (answer.clone(), world.manager.borrow().clone().unwrap());
    world.scheduler.spawn(Thread::new(move || {
        let done = command(&daemon);
        drop(daemon);
        *put.borrow_mut() = Some(done);
    }));
    answer
}

/// Takes a snapshot whose cut comes to be, and is then refused because that cannot be recorded.
fn refuse_after_the_cut(world: &mut World, request: SnapshotRequest) {
    let before = world.manager.borrow().as_ref().unwrap().epoch();
    let answer = give(world, move |daemon| daemon.create_snapshots(&request).map(drop));
    while world.manager.borrow().as_ref().unwrap().epoch() == before {
        world.step_quietly().unwrap();
    }
    world.sim.refuse_records(1);
    while answer.borrow().is_none() {
        world.step_quietly().unwrap();
    }
    assert!(answer.take().unwrap().unwrap_err().message.contains("full"));
    world.sim.refuse_records(0);
}

/// Disk `a` with the legs `a.raw` and `a.leg`, which is being made.
fn mirrored(sectors: usize) -> World {
    let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
    sim.put_image(&path, spec::initial(sectors));
    let mut world = serving(sim, &path);
    let leg = Path::new(DISKS).join("a.leg");
    let answer = give(&mut world, move |daemon| daemon.mirror_disk(&name("a"), &leg).map(drop));
    let daemon = world.manager.borrow().clone().unwrap();
    while daemon.list_jobs().unwrap().is_empty() {
        assert!(answer.borrow().is_none(), "{answer:?}");
        world.step_quietly().unwrap();
    }
    world
}

/// A refused split leaves the mirror as it was: two legs.
#[test]
fn the_leg_of_a_refused_split_comes_back() {
    let _undisturbed = crate::alone::undisturbed();
    let mut world = mirrored(16);
    synchronised(&mut world);
    let request = SnapshotRequest { strategy: Some(Strategy::WriteMirroring), ..snapshot("daily") };
    refuse_after_the_cut(&mut world, request);
    write(&mut world, 0..8);
    no_snapshot_is_left(&mut world);
    synchronised(&mut world);
    let disks = world.ask(|daemon| daemon.list_disks()).unwrap().unwrap();
    let states: Vec<_> = disks[0].legs.iter().map(|leg| leg.state).collect();
    assert_eq!(states, [LegState::InSync, LegState::InSync]);
    let bytes = |file: &str| world.sim.bytes_of(&Path::new(DISKS).join(file)).unwrap();
    assert!(bytes("a.raw") == bytes("a.leg"));
}

/// What was refused goes by itself, also if the daemon ends before it has gone.
#[test]
fn what_was_refused_goes_after_any_end() {
    for is_killed in [true, false] {
        let _undisturbed = crate::alone::undisturbed();
        let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
        sim.put_image(&path, spec::initial(16));
        let mut world = serving(sim.clone(), &path);
        // While it is under way nothing goes.
        let request = sim.socket(&Path::new(RUN).join("a.sock")).unwrap().attachment.lane().enter();
        refuse_after_the_cut(&mut world, snapshot("daily"));
        // Something else that is recorded.
        done(&mut world, |daemon| daemon.set_disk(&name("a"), &Default::default()).map(drop));
        let listed = world.ask(|daemon| daemon.list_snapshots()).unwrap().unwrap();
        assert_eq!(listed.len(), 1, "it goes when its requests have ended");
        if !is_killed {
            let daemon = world.manager.borrow().clone().unwrap();
            daemon.going_down();
            drop(request);
            world.finish(Thread::new(move || daemon.stop().unwrap())).unwrap();
        }
        let left = sim.after(End::Kill, &mut Rng::new(1));
        drop(world);

        let mut world = serving(left.clone(), &path);
        no_snapshot_is_left(&mut world);
        take(&mut world, "daily");
    }
}

/// A snapshot of which nobody knows whether it was recorded leaves its name as soon as that is known.
#[test]
fn a_snapshot_that_was_in_doubt_leaves_its_name() {
    let _undisturbed = crate::alone::undisturbed();
    let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
    sim.put_image(&path, spec::initial(16));
    let mut world = serving(sim.clone(), &path);
    let before = images(&sim).len();
    sim.doubt_records(3);
    let refused = world.ask(|daemon| daemon.create_snapshots(&snapshot("daily")).map(drop)).unwrap();
    assert!(refused.unwrap_err().contains("not known"));
    assert!(images(&sim).len() > before, "a record may name it");
    sim.refuse_records(0);
    for _ in 0..20_000 {
        if images(&sim).len() == before {
            break;
        }
        world.step_quietly().unwrap();
    }
    take(&mut world, "daily");
    assert_eq!(images(&sim).len(), before + 1);
}

fn jobs_of(world: &mut World, kind: JobKind) -> Vec<Job> {
    let jobs = world.ask(|daemon| daemon.list_jobs()).unwrap().unwrap();
    jobs.into_iter().filter(|job| job.kind == kind).collect()
}

/// A synchronisation that was stopped is one job, however many snapshots are refused.
#[test]
fn refused_snapshots_leave_a_stopped_synchronisation_alone() {
    let _undisturbed = crate::alone::undisturbed();
    let mut world = mirrored(1 << 15);
    done(&mut world, |daemon| {
        let job = daemon.list_jobs()?.pop().expect("it is synchronised");
        daemon.delete_job(job.id).map(drop)
    });
    let stopped = jobs_of(&mut world, JobKind::Mirror);
    assert_eq!(stopped.iter().map(|job| job.state).collect::<Vec<_>>(), [JobState::Stopped]);
    for refusals in [1, 1, 1000] {
        world.sim.refuse_records(refusals);
        let refused = world.ask(|daemon| daemon.create_snapshots(&snapshot("daily")).map(drop)).unwrap();
        assert!(refused.unwrap_err().contains("full"));
        world.sim.refuse_records(0);
    }
    let now: Vec<_> = jobs_of(&mut world, JobKind::Mirror).iter().map(|job| (job.id, job.state)).collect();
    assert_eq!(now, [(stopped[0].id, JobState::Stopped)]);
}

/// That a layer outlives power cuts is said as soon as the record says so, also if that was refused at first.
#[test]
fn what_outlives_power_cuts_is_said_when_a_refused_record_is_stored() {
    let _undisturbed = crate::alone::undisturbed();
    let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
    sim.put_image(&path, spec::initial(16));
    let mut world = serving(sim.clone(), &path);
    take(&mut world, "daily");
    sim.refuse_records(1);
    let refused = world.ask(|daemon| daemon.restore_disk(&name("a"), &to_daily()).map(drop)).unwrap();
    assert!(refused.unwrap_err().contains("full"));
    sim.refuse_records(0);
    let outlives = |daemon: &Manager| Ok(daemon.list_snapshots()?[0].durability == Durability::Power);
    wait_until(&mut world, "it outlives power cuts", outlives);
}

/// Without a thread that waits for its requests a snapshot is quiesced later.
#[test]
fn a_snapshot_without_a_thread_is_quiesced_later() {
    let _undisturbed = crate::alone::undisturbed();
    let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
    sim.put_image(&path, spec::initial(16));
    let mut world = serving(sim.clone(), &path);
    let request = sim.socket(&Path::new(RUN).join("a.sock")).unwrap().attachment.lane().enter();
    sim.refuse_drains(1);
    done(&mut world, |daemon| daemon.create_snapshots(&snapshot("daily")).map(drop));
    for _ in 0..2000 {
        world.step_quietly().unwrap();
    }
    let state = |daemon: &Manager| Ok(daemon.list_snapshots()?[0].state);
    assert_eq!(world.ask(state).unwrap().unwrap(), SnapshotState::Draining);
    drop(request);
    wait_until(&mut world, "it is quiesced", move |daemon| Ok(state(daemon)? == SnapshotState::Quiesced));
    assert!(sim.socket(&Path::new(RUN).join("a@daily.sock")).is_some());
}

/// Disk `a` with the snapshot `daily`, and the volume `v` on that, to which something was written.
fn with_volume(sim: &Arc<Sim>, path: &Path) -> World {
    sim.put_image(path, spec::initial(32));
    let mut world = serving(sim.clone(), path);
    take(&mut world, "daily");
    let from = VolumeSource::Snapshot(SnapshotRef { disk: name("a"), name: name("daily") });
    let request = VolumeRequest { name: name("v"), from, socket: None, image: None, block_size: None };
    done(&mut world, move |daemon| daemon.create_volume(&request).map(drop));
    write_to(&mut world, "v.sock", 0..8);
    world
}

fn to_volume() -> RestoreRequest {
    RestoreRequest { from: VolumeSource::Now(name("v")), force: true, delay_ms: 0, bytes_per_second: 0 }
}

/// What was taken for a restore goes with it, also if the daemon was killed before the restore began.
#[test]
fn what_was_taken_for_a_restore_goes_after_a_kill() {
    let _undisturbed = crate::alone::undisturbed();
    let (mut rng, mut begun) = (Rng::new(1), 0);
    let path = PathBuf::from(DISKS).join("a.raw");
    for steps in (0..4000).step_by(23) {
        let sim = Sim::new();
        let mut world = with_volume(&sim, &path);
        let answer = give(&mut world, |daemon| daemon.restore_disk(&name("a"), &to_volume()).map(drop));
        for _ in 0..steps {
            world.step_quietly().unwrap();
        }
        let is_over = answer.borrow().is_some();
        let left = sim.after(End::Kill, &mut rng);
        drop(world);

        let mut world = serving(left, &path);
        begun += usize::from(world.ask(|daemon| Ok(daemon.list_disks()?[0].restoring.is_some())).unwrap().unwrap());
        let is_left = |s: &halfsilver::control::api::Snapshot| s.name.as_str().starts_with("restore-");
        wait_until(&mut world, &format!("what was taken has gone, after {steps} steps"), move |daemon| {
            Ok(!daemon.list_snapshots()?.iter().any(is_left))
        });
        if is_over {
            break;
        }
    }
    assert!(begun > 0, "some of them go on");
}

/// While it is recorded that a restore has ended, what it is restored from stays: the record may be refused.
#[test]
fn what_a_disk_is_restored_from_stays_until_its_end_is_recorded() {
    let _undisturbed = crate::alone::undisturbed();
    let (mut rng, mut failed) = (Rng::new(1), 0);
    let path = PathBuf::from(DISKS).join("a.raw");
    for steps in 0..400 {
        let sim = Sim::new();
        let mut world = with_volume(&sim, &path);
        let of_volume = || SnapshotRef { disk: name("v"), name: name("now") };
        done(&mut world, |daemon| {
            let request = SnapshotRequest { disks: vec![name("v")], ..snapshot("now") };
            daemon.create_snapshots(&request).map(drop)
        });
        let quiesced =
            |daemon: &Manager| Ok(daemon.list_snapshots()?.iter().all(|s| s.state == SnapshotState::Quiesced));
        wait_until(&mut world, "all are quiesced", quiesced);
        let request = RestoreRequest { from: VolumeSource::Snapshot(of_volume()), ..to_volume() };
        done(&mut world, move |daemon| daemon.restore_disk(&name("a"), &request).map(drop));
        for _ in 0..steps {
            world.step_quietly().unwrap();
        }
        world.sim.refuse_records(1);
        let deleted = give(&mut world, move |daemon| {
            let options = DeleteSnapshotOptions { force: true, ..DeleteSnapshotOptions::default() };
            let mut last = Ok(());
            for _ in 0..30 {
                last = daemon.delete_snapshot(&of_volume(), options).map(drop);
                if last.is_ok() {
                    break;
                }
                daemon.list_disks()?; // Others go on.
            }
            last
        });
        while deleted.borrow().is_none() {
            world.step_quietly().unwrap();
        }
        synchronised(&mut world);
        let state = jobs_of(&mut world, JobKind::Restore).pop().unwrap().state;
        failed += usize::from(state == JobState::Failed);
        let left = sim.after(End::Kill, &mut rng);
        drop(world);

        let mut world = serving(left.clone(), &path);
        let disks = world.ask(|daemon| daemon.list_disks()).unwrap().unwrap();
        assert_eq!(disks[0].state, DiskState::Serving, "after {steps} steps: {:?}", disks[0].reason);
        synchronised(&mut world);
        let mut wanted = spec::initial(32);
        spec::fill(&mut wanted[..8 * SECTOR], 0, 7);
        assert!(left.bytes_of(&path).unwrap() == wanted, "after {steps} steps it is not restored");
        if state == JobState::Done && failed > 0 {
            return;
        }
    }
    panic!("the end of the restore must be refused, and come before that");
}

/// What is not served any more, because its second leg could not be added, is listed at each moment.
#[test]
fn a_disk_whose_leg_is_refused_is_there_at_each_moment() {
    let _undisturbed = crate::alone::undisturbed();
    let (sim, path) = (Sim::new(), PathBuf::from(DISKS).join("a.raw"));
    sim.put_image(&path, spec::initial(16));
    let mut world = serving(sim.clone(), &path);
    take(&mut world, "daily");
    let left = sim.after(End::Kill, &mut Rng::new(1));
    drop(world);

    let mut world = World::on(left, Spec::new(), Rng::new(1), Shape::of(0), 0, Rc::new(RefCell::default()));
    let mut config = DiskConfig::new(&path);
    config.mirror = Some("/nowhere/a.leg".into());
    world.start(vec![DiskSpec { name: name("a"), config: config.clone() }]);
    while world.manager.borrow().is_none() {
        world.step_quietly().unwrap();
    }
    let daemon = world.manager.borrow().clone().unwrap();
    assert_eq!(daemon.list_unserved().unwrap().len(), 1);
    config.mirror = Some(Path::new(DISKS).join("a.leg"));
    let added = give(&mut world, move |daemon| daemon.put_disk(&name("a"), &config).map(drop));
    let mut was_served = false;
    while added.borrow().is_none() {
        world.step_quietly().unwrap();
        let is_served = world.sim.socket(&Path::new(RUN).join("a.sock")).is_some();
        if is_served && !std::mem::replace(&mut was_served, true) {
            world.sim.refuse_records(1);
        }
        let (served, unserved) = (daemon.list_snapshots().unwrap(), daemon.list_unserved().unwrap());
        assert!(!served.is_empty() || !unserved.is_empty(), "it is nowhere");
    }
    assert!(was_served && added.take().unwrap().unwrap_err().message.contains("full"));
    drop(daemon);
}

/// What a volume stands on stays also while a start has yet to open the volume.
#[test]
fn what_a_volume_stands_on_stays_amid_a_start() {
    let _undisturbed = crate::alone::undisturbed();
    let (mut rng, mut refused) = (Rng::new(1), 0);
    let path = PathBuf::from(DISKS).join("a.raw");
    for steps in 0.. {
        let sim = Sim::new();
        let world = with_volume(&sim, &path);
        let left = sim.after(End::Kill, &mut rng);
        drop(world);

        let mut world = World::on(left, Spec::new(), Rng::new(1), Shape::of(0), 0, Rc::new(RefCell::default()));
        world.start(Vec::new());
        while world.sim.socket(&Path::new(RUN).join("a.sock")).is_none() {
            world.step_quietly().unwrap();
        }
        for _ in 0..steps {
            world.step_quietly().unwrap();
        }
        let is_over = world.manager.borrow().is_some();
        let daemon = world.opened.borrow().clone().unwrap();
        let answer: Rc<RefCell<Option<bool>>> = Rc::default();
        let put = answer.clone();
        world.scheduler.spawn(Thread::new(move || {
            let options = DeleteSnapshotOptions { force: true, ..DeleteSnapshotOptions::default() };
            let daily = SnapshotRef { disk: name("a"), name: name("daily") };
            let deleted = daemon.delete_snapshot(&daily, options);
            drop(daemon);
            *put.borrow_mut() = Some(deleted.is_ok());
        }));
        while answer.borrow().is_none() || world.manager.borrow().is_none() {
            world.step_quietly().unwrap();
        }
        assert!(!answer.take().unwrap(), "after {steps} steps it is deleted");
        let volumes = world.ask(|daemon| daemon.list_volumes()).unwrap().unwrap();
        assert!(volumes[0].state == VolumeState::Serving, "after {steps} steps: {:?}", volumes[0].reason);
        refused += 1;
        if is_over {
            break;
        }
    }
    assert!(refused > 10, "it must be asked for while the volume is opened");
}
