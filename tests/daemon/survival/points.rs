//! The daemon dies at the durable steps of these scripts (`src/crash.rs`).

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::state::{Answered, Op};
use super::{Life, STRATEGIES};
use crate::harness::{Rng, seeds};

/// A step of a script.
enum Step {
    Write(&'static str),
    Do(Op),
}

fn snapshot(disk: &str, name: &str, strategy: &'static str) -> Step {
    Step::Do(Op::Snapshot { disk: disk.to_owned(), name: name.to_owned(), strategy })
}

fn gone(snapshot: &str, keep_bookmark: bool) -> Step {
    Step::Do(Op::DeleteSnapshot { snapshot: snapshot.to_owned(), keep_bookmark })
}

fn volume(name: &str, from: &str) -> Step {
    Step::Do(Op::CreateVolume { name: name.to_owned(), from: from.to_owned() })
}

/// Completed with a snapshot of its own, and promoted; another one is deleted when it is independent.
fn completions(strategy: &'static str) -> Vec<Step> {
    vec![
        snapshot("vm0", "a", strategy),
        Step::Write("vm0"),
        volume("clone", "vm0@a"),
        Step::Write("clone"),
        snapshot("clone", "s", strategy),
        Step::Write("clone"),
        Step::Do(Op::Complete("clone".to_owned())),
        gone("clone@s", strategy == STRATEGIES[0]),
        Step::Do(Op::Promote("clone".to_owned())),
        Step::Write("clone"),
        volume("two", "vm0@a"),
        Step::Write("two"),
        Step::Do(Op::Complete("two".to_owned())),
        Step::Do(Op::DeleteVolume("two".to_owned())),
        gone("vm0@a", false),
    ]
}

/// Disabled, enabled, begun anew and deleted.
fn turns(strategy: &'static str) -> Vec<Step> {
    let enable = |fresh| Step::Do(Op::Enable { name: "clone".to_owned(), fresh });
    vec![
        snapshot("vm0", "a", strategy),
        volume("clone", "vm0@a"),
        Step::Write("clone"),
        Step::Do(Op::Disable("clone".to_owned())),
        enable(false),
        Step::Write("clone"),
        Step::Do(Op::Disable("clone".to_owned())),
        enable(true),
        Step::Write("clone"),
        Step::Do(Op::DeleteVolume("clone".to_owned())),
    ]
}

/// Bookmarks, and restores to a snapshot and to a volume.
fn restores(strategy: &'static str) -> Vec<Step> {
    let restore = |from: &str| Step::Do(Op::Restore { from: from.to_owned() });
    vec![
        snapshot("vm0", "a", strategy),
        Step::Write("vm0"),
        snapshot("vm0", "b", strategy),
        Step::Write("vm0"),
        gone("vm0@b", true),
        Step::Write("vm0"),
        // Before a restore, which notes all that differs: what was noted for it alone must still be told.
        Step::Do(Op::DeleteBookmark("vm0@b".to_owned())),
        restore("vm0@a"),
        volume("clone", "vm0@a"),
        Step::Write("clone"),
        Step::Write("vm0"),
        restore("clone"),
        Step::Do(Op::DeleteVolume("clone".to_owned())),
        gone("vm0@a", true),
    ]
}

/// What a script does, and the steps that it must have died at.
struct Script {
    name: &'static str,
    steps: fn(&'static str) -> Vec<Step>,
    points: &'static [&'static str],
}

const SCRIPTS: [Script; 3] = [
    Script {
        name: "completions",
        steps: completions,
        points: &[
            "before records are committed",
            "after records were committed",
            "before a table's file has its size",
            "before a table's file has its header",
            "before a durable table is written",
            "before a durable table is synced",
            "after a durable table was synced",
            "after an image was made",
            "before a file is removed",
            "between two blocks of a deletion",
            "after the last block of a deletion",
            "before a snapshot is forgotten",
            "after a snapshot was forgotten",
            "before a volume is recorded",
            "after a volume was forgotten",
            "between two steps of a completion",
            "after a full image got its second name",
            "before a volume is recorded as independent",
            "after a volume was recorded as independent",
            "after a volume was promoted",
        ],
    },
    Script {
        name: "turns",
        steps: turns,
        points: &[
            "before records are committed",
            "after records were committed",
            "before a volume is recorded",
            "after a volume was recorded as disabled",
            "after a volume was recorded as enabled",
            "before a volume is begun anew",
            "after a volume was begun anew",
            "before a file is removed",
            "after a volume was forgotten",
        ],
    },
    Script {
        name: "restores",
        steps: restores,
        points: &[
            "before records are committed",
            "after records were committed",
            "before a durable table is synced",
            "before a snapshot is forgotten",
            "after a snapshot was forgotten",
            "before a bookmark is forgotten",
            "after a bookmark was forgotten",
            "before it is recorded that a layer outlives power cuts",
            "before a restore is recorded",
            "after a restore was recorded",
            "after a restore was begun",
            "between two blocks of a restore",
            "after the last block of a restore",
            "after a restore was forgotten",
            "before a file is removed",
        ],
    },
];

/// One life that ends at the `count`-th time at a point, and what is made of it. At which point it died.
fn life(seed: u64, script: &Script, strategy: &'static str, point: &str, count: usize) -> Option<String> {
    let what = format!("{}, {strategy}, {count}:{point}", script.name);
    let mut life = Life::new(seed);
    life.daemon.crash_at = Some(format!("{count}:{point}"));
    life.daemon.spawn();
    life.daemon.crash_at = None;
    let mut allowed = vec![life.state.clone()];
    let (mut is_dead, mut flight) = (false, None);
    while !is_dead && !life.daemon.is_up() {
        is_dead = life.is_dead();
    }
    for step in (script.steps)(strategy) {
        if is_dead {
            break;
        }
        match step {
            Step::Write(to) => {
                flight = life.write(to);
                is_dead = flight.is_some();
                allowed = vec![life.state.clone()];
            }
            Step::Do(op) => {
                allowed = op.outcomes(&life.state);
                if op.ask(&life.daemon) == Answered::Yes {
                    // Then the work behind it goes on after a death.
                    allowed = allowed.split_off(allowed.len() - 1);
                    life.state = allowed[0].clone();
                    is_dead = !life.settle();
                } else {
                    is_dead = true;
                    life.daemon.wait_exit();
                }
            }
        }
    }
    if !is_dead {
        life.daemon.terminate();
        is_dead = !life.daemon.wait_exit().success();
    }
    let log = life.daemon.log_text();
    let died = log.lines().find_map(|l| l.strip_prefix("crash point: ")).map(str::to_owned);
    assert_eq!(died.is_some(), is_dead, "{what}");
    let what = format!("{what}, {}", died.as_deref().unwrap_or("a clean stop"));
    life.rise(allowed, flight, &what);
    life.stop_and_start(&what);
    life.delete_all(&what);
    died
}

/// Lives side by side, each with a daemon of its own.
fn side_by_side(lives: impl Iterator<Item = impl FnOnce() + Send> + Send) {
    let lives = Mutex::new(lives);
    let work = || {
        while let Some(life) = { lives.lock().unwrap().next() } {
            life();
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
}

/// The first time at each point, and some later one.
#[test]
fn planted_deaths_at_every_point_of_volumes_restores_and_bookmarks() {
    let seed = seeds("survival at every point", 1)[0];
    let missed = Mutex::new(Vec::new());
    let pairs = SCRIPTS.iter().flat_map(|script| script.points.iter().map(move |point| (script, *point)));
    let lives = pairs.enumerate().map(|(i, (script, point))| {
        let missed = &missed;
        move || {
            let (seed, mut rng) = (seed + i as u64, Rng::new(seed + i as u64));
            let strategy = STRATEGIES[rng.below(2)];
            // What is saved for a snapshot is under copy-on-write alone.
            let strategy = if point.contains("outlives") { STRATEGIES[0] } else { strategy };
            if life(seed, script, strategy, point, 1).is_none() {
                missed.lock().unwrap().push((script.name, point));
            }
            life(seed, script, STRATEGIES[rng.below(2)], point, 2 + rng.below(10));
        }
    });
    side_by_side(lives);
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "never died at: {missed:?}");
}

/// Every time at every point, under both strategies.
#[test]
#[ignore = "it takes a minute or two: scripts/soak --deaths runs it"]
fn planted_deaths_at_every_step_of_volumes_restores_and_bookmarks() {
    let seed = seeds("survival at every step", 1)[0];
    for script in &SCRIPTS {
        for strategy in STRATEGIES {
            let is_over = AtomicUsize::new(usize::MAX);
            let lives = (1..).take_while(|at| *at < is_over.load(Ordering::SeqCst)).map(|at| {
                let is_over = &is_over;
                move || {
                    if life(seed + at as u64, script, strategy, "*", at).is_none() {
                        // The next one may have more steps.
                        is_over.fetch_min(at + 2, Ordering::SeqCst);
                    }
                }
            });
            side_by_side(lives);
            println!("{}, {strategy}: up to step {}", script.name, is_over.into_inner());
        }
    }
}
