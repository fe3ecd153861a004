//! Random graphs of disks, volumes, snapshots and jobs under random commands: what is needed never goes, advice works, and
//! whatever is listed can be shown and removed.
//!
//! A graph grows by commands that were decided, and by what happens by itself: guests come and go, jobs end, images vanish.
//! Not shown here: that the daemon does what was decided.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod world;

use std::collections::BTreeSet;

use halfsilver::registry::{Answer, Command, EdgeKind, ObstacleKind, Operation, Registry, Step, decide};

use self::world::{Rng, World};

/// How many graphs are tried; `REGISTRY_GRAPHS` asks for more.
const GRAPHS: u64 = 100_000;
/// How much happens to a graph.
const EVENTS_MAX: u64 = 30;

fn graphs() -> u64 {
    std::env::var("REGISTRY_GRAPHS").ok().and_then(|n| n.parse().ok()).unwrap_or(GRAPHS)
}

fn first() -> u64 {
    std::env::var("REGISTRY_FIRST").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Every snapshot that something needs is there.
fn check_edges(registry: &Registry, seed: u64, what: &dyn std::fmt::Debug) {
    for edge in registry.edges() {
        let is_there = registry.snapshot(edge.needed).is_some();
        assert!(
            is_there,
            "seed {seed}: after {what:?} a snapshot is gone that {:?} needs ({:?})",
            edge.needer, edge.kind
        );
    }
}

/// The advice of a refusal, carried out step by step, makes the command succeed. Returns the registry after it.
fn follow(registry: &Registry, command: &Command, seed: u64) -> Registry {
    let refusal = decide(registry, command).unwrap_err();
    let mut registry = registry.clone();
    for step in &refusal.steps {
        if let Step::Run(wanted) = step {
            let decided = decide(&registry, wanted);
            assert!(decided.is_ok(), "seed {seed}: {command:?} advises {wanted:?}, which is refused: {decided:?}");
        }
        registry.carry_out(step);
        check_edges(&registry, seed, step);
    }
    // What was to be deleted may go with what needed it.
    let is_gone = match command {
        Command::DeleteSnapshot { snapshot, .. } => registry.snapshot_named(snapshot).is_none(),
        _ => false,
    };
    let decided = decide(&registry, command);
    assert!(
        decided.is_ok() || is_gone,
        "seed {seed}: {command:?} is refused ({refusal:?}), and after its advice: {decided:?}"
    );
    registry
}

/// Everything can go in the end.
fn remove_all(mut registry: Registry, seed: u64) {
    let names: Vec<_> = registry.disks().map(|disk| disk.name.clone()).collect();
    for name in names {
        let Some(disk) = registry.named(&name) else { continue };
        let command = match (disk.is_volume(), disk.is_unserved()) {
            (true, _) => Command::DeleteVolume { volume: name.clone(), force: true },
            (false, true) => Command::Forget { disk: name.clone() },
            (false, false) => Command::RemoveDisk { disk: name.clone(), force: true },
        };
        // What another one waits for is not forgotten, but removed by force.
        let command = match decide(&registry, &command) {
            Err(refusal) if refusal.instead.is_some() => Command::RemoveDisk { disk: name.clone(), force: true },
            _ => command,
        };
        if decide(&registry, &command).is_err() {
            registry = follow(&registry, &command, seed);
        }
        registry.carry_out(&Step::Run(command.clone()));
        check_edges(&registry, seed, &command);
        assert!(registry.named(&name).is_none(), "seed {seed}: {name} is still there after {command:?}");
    }
}

fn all_obstacles(registry: &Registry) -> BTreeSet<ObstacleKind> {
    let of = |disk: &halfsilver::registry::Disk| {
        let own = registry.of_disk(disk).into_iter();
        let snapshots = disk.snapshots.iter().flat_map(|s| registry.of_snapshot(disk, s));
        own.chain(snapshots).map(|obstacle| obstacle.kind).collect::<Vec<_>>()
    };
    registry.disks().flat_map(of).collect()
}

#[test]
fn what_is_needed_never_goes_and_advice_works() {
    let (mut kinds, mut obstacles, mut answers) = (BTreeSet::new(), BTreeSet::new(), [0u64; 3]);
    for seed in first()..first() + graphs() {
        let mut rng = Rng::new(seed);
        let mut world = World::default();
        for _ in 0..rng.below(EVENTS_MAX) {
            world.happen(&mut rng);
        }
        kinds.extend(world.registry().edges().map(|edge| edge.kind));
        if seed.is_multiple_of(16) {
            obstacles.extend(all_obstacles(&world.registry()));
        }
        for _ in 0..3 {
            let command = world.some_command(&mut rng);
            match decide(&world.registry(), &command) {
                Ok(_) => {
                    answers[0] += 1;
                    world.carry_out(&command);
                    check_edges(&world.registry(), seed, &command);
                }
                Err(refusal) if refusal.instead.is_some() => {
                    assert!(!refusal.advice().is_empty(), "seed {seed}: {command:?} is refused without a word");
                    answers[1] += 1;
                }
                Err(refusal) if refusal.steps.is_empty() && refusal.besides.is_some() => answers[1] += 1,
                Err(refusal) => {
                    assert!(
                        !refusal.steps.is_empty(),
                        "seed {seed}: {command:?} is refused without advice: {refusal:?}"
                    );
                    follow(&world.registry(), &command, seed);
                    answers[2] += 1;
                }
            }
        }
        if seed.is_multiple_of(4) {
            remove_all(world.registry(), seed);
        }
    }
    println!("allowed {}, never possible {}, refused with advice {}", answers[0], answers[1], answers[2]);
    let every = [EdgeKind::StandsOn, EdgeKind::RestoredFrom, EdgeKind::RestoredThrough];
    assert!(every.iter().all(|kind| kinds.contains(kind)), "not every kind of need came up: {kinds:?}");
    let rare = [
        ObstacleKind::InLog,
        ObstacleKind::LeftBookmarks,
        ObstacleKind::Mirrored,
        ObstacleKind::GiveBackLeft,
        ObstacleKind::LeavesNone,
    ];
    assert!(rare.iter().all(|kind| obstacles.contains(kind)), "not every obstacle came up: {obstacles:?}");
    assert!(answers.iter().all(|n| *n > graphs() / 100), "some answers are rare: {answers:?}");
}

/// What may go is refused for each kind of need, forced or not.
#[test]
fn no_need_is_overridden() {
    for kind in [ObstacleKind::StoodOn, ObstacleKind::RestoredFrom, ObstacleKind::RestoredThrough] {
        for operation in [Operation::RemoveDisk, Operation::DeleteVolume, Operation::DeleteSnapshot, Operation::Forget]
        {
            assert_eq!(operation.about(kind), Answer::Refused, "{operation:?} while {kind:?}");
        }
    }
}
