//! What becomes of legs in situations to which random runs seldom come: one is lost, or its bitmap cannot be stored.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::control::api::{DiskConfig, LegState, SnapshotRequest, Strategy, Writers};
use halfsilver::control::{ApiError, Service};
use halfsilver::daemon::config::DiskSpec;
use halfsilver::manager::Manager;

use crate::media::{Op, set_aside};
use crate::schedule::Rng;
use crate::sim::{DISKS, End, RUN, STATE, Sim, Thread};
use crate::spec::{self, Spec};
use crate::world::{Shape, World, name};

const SECTORS: usize = 16;

fn at(file: &str) -> PathBuf {
    Path::new(DISKS).join(file)
}

fn world_on(sim: Arc<Sim>, rng: &mut Rng) -> World {
    let shape = Shape { sectors: SECTORS, disks: 1, is_mirrored: true, ..Shape::of(3) };
    World::on(sim, Spec::default(), Rng::new(rng.next()), shape, 0, Rc::default())
}

/// Waits until it serves.
fn started(world: &mut World, specs: Vec<DiskSpec>) -> Result<(), String> {
    world.start(specs);
    while world.manager.borrow().is_none() {
        world.step_quietly()?;
    }
    Ok(())
}

/// Disk `a` on `a.raw`, with `a.leg` in sync.
fn mirrored(rng: &mut Rng) -> World {
    let sim = Sim::new();
    sim.put_image(&at("a.raw"), spec::initial(SECTORS));
    let mut config = DiskConfig::new(at("a.raw"));
    config.mirror = Some(at("a.leg"));
    let mut world = world_on(sim, rng);
    started(&mut world, vec![DiskSpec { name: name("a"), config }]).unwrap();
    while states_of(&mut world) != [LegState::InSync, LegState::InSync] {
        world.step_quietly().unwrap();
    }
    world
}

fn states_of(world: &mut World) -> Vec<LegState> {
    let disks = world.ask(|manager| manager.list_disks()).unwrap().unwrap();
    disks[0].legs.iter().map(|leg| leg.state).collect()
}

/// Gives a command; what it answers is there when it is over.
fn give<T: 'static>(
    world: &mut World,
    command: impl FnOnce(&Manager) -> Result<T, ApiError> + 'static,
) -> Rc<RefCell<Option<Result<T, ApiError>>>> {
    let (answer, manager) = (Rc::new(RefCell::new(None)), world.manager.borrow().clone().unwrap());
    let put = answer.clone();
    world.scheduler.spawn(Thread::new(move || *put.borrow_mut() = Some(command(&manager))));
    answer
}

#[test]
fn a_split_that_never_came_to_be_holds_no_leg_that_is_gone() {
    let _undisturbed = crate::alone::undisturbed();
    let (mut rng, held, given_up) = (Rng::new(1), Cell::new(0), Cell::new(0));
    for steps in 0..2000 {
        let mut world = mirrored(&mut rng);
        let over = give(&mut world, |manager| {
            manager.create_snapshots(&SnapshotRequest {
                name: name("s"),
                disks: vec![name("a")],
                strategy: Some(Strategy::WriteMirroring),
                layout: None,
                writers: Writers::Request,
                socket: None,
                image: None,
            })
        });
        for _ in 0..steps {
            world.step_quietly().unwrap();
        }
        let is_over = over.borrow().is_some();
        let left = world.sim.after(End::Kill, &mut rng);
        left.lose(&at("a.leg"));
        let _aside = set_aside();
        let mut next = world_on(left, &mut rng);
        started(&mut next, Vec::new()).unwrap();
        let snapshots = next.ask(|manager| manager.list_snapshots()).unwrap().unwrap();
        if snapshots.is_empty() {
            // Whatever the bitmap said of it: it has failed, or is no leg any more.
            let states = states_of(&mut next);
            let is_given_up = states[1..].iter().all(|state| *state == LegState::Failed);
            assert!(states[0] == LegState::InSync && is_given_up, "after {steps} steps: {states:?}");
            let added = next.ask(|manager| manager.mirror_disk(&name("a"), &at("other.leg"))).unwrap();
            added.unwrap_or_else(|e| panic!("after {steps} steps no other leg is taken: {e}"));
            given_up.set(given_up.get() + 1);
        } else {
            held.set(held.get() + 1);
        }
        if is_over {
            break;
        }
    }
    assert!(held.get() > 0 && given_up.get() > 0, "both must come up: {held:?}, {given_up:?}");
}

#[test]
fn an_image_that_could_not_be_added_as_a_leg_again_is_not_the_disk() {
    let _undisturbed = crate::alone::undisturbed();
    let (mut rng, mut refused) = (Rng::new(1), 0);
    for syncs in 0..8 {
        let mut world = mirrored(&mut rng);
        world.ask(|manager| manager.unmirror_disk(&name("a"), None)).unwrap().unwrap();
        // From now on it lacks what is written.
        let over = give(&mut world, |manager| manager.mirror_disk(&name("a"), &at("a.leg")).map(drop));
        let mut fails = false;
        while over.borrow().is_none() {
            world.step_quietly().unwrap();
            let bitmap = world.sim.images_in(&Path::new(STATE).join("tables")).pop();
            if let Some(bitmap) = bitmap.filter(|_| !fails) {
                bitmap.fail(Op::Sync, syncs, libc::EIO);
                fails = true;
            }
        }
        assert!(fails, "a mirror has a bitmap");
        if over.borrow().as_ref().unwrap().is_ok() {
            continue;
        }
        refused += 1;
        let left = world.sim.after(End::Kill, &mut rng);
        let _aside = set_aside();
        let mut next = world_on(left, &mut rng);
        let spec = DiskSpec { name: name("a"), config: DiskConfig::new(at("a.leg")) };
        started(&mut next, vec![spec]).unwrap();
        let is_served = next.sim.socket(&Path::new(RUN).join("a.sock")).is_some();
        assert!(!is_served, "after {syncs} syncs: what was a leg is served as the disk");
    }
    assert!(refused > 1, "the bitmap must fail early and late");
}
