//! Commands whose record is refused, one by one: what they left as it was.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::control::Service;
use halfsilver::control::api::{DiskConfig, DiskState, JobState};
use halfsilver::daemon::config::DiskSpec;
use halfsilver::manager::Manager;

use crate::schedule::Rng;
use crate::sim::{DISKS, End, Sim};
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
