//! The daemon dies at every durable step in turn (`src/crash.rs`): of a start, of taking snapshots, of their draining, of
//! deletions and folds, of a clean stop, under every strategy. The next daemon must go on from there.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use super::counts::STRATEGIES;
use super::run::{Rest, Run};
use super::vm::Vm;
use crate::harness::seeds;

/// The points that a sweep must have come to.
const POINTS: [&str; 21] = [
    "before records are committed",
    "after records were committed",
    "before a saved table is synced",
    "before a saved table gets its name",
    "before the name of a saved table is synced",
    "before a table's file has its size",
    "before a table's file has its header",
    "before a durable table is written",
    "before a durable table is synced",
    "after a durable table was synced",
    "between two blocks of a deletion",
    "after the last block of a deletion",
    "after an image was made",
    "before a pack is written",
    "after a pack was written",
    "before a file is removed",
    "before the cut",
    "after the cut",
    "before a snapshot is opened",
    "before answers are visible",
    "after answers became visible",
];

/// After so many times at one point not every one is a death: a deletion goes on for long.
const DENSE: usize = 5;
/// And after so many it has been seen enough.
const TIMES_MAX: usize = 16;

/// Daemons that live at the same time.
const THREADS: usize = 2;

/// One life that is the same again and again, but for the point at which it ends.
struct Sweep {
    run: Run,
    strategy: &'static str,
}

impl Sweep {
    fn new(seed: u64, strategy: &'static str) -> Sweep {
        let mut run = Run::new(seed);
        run.load_for(Duration::from_millis(20));
        run.stop();
        Sweep { run, strategy }
    }

    /// Dies at a point of a start, of snapshots, of a deletion and a stop, and looks at what the next one makes of it.
    /// Whether it came to the point.
    fn life(&mut self, point: &str, count: usize) -> bool {
        let died = self.script(format!("{count}:{point}"));
        self.run.ensure_alive();
        self.run.load_for(Duration::from_millis(3));
        self.run.rest_and(Rest::Clean);
        self.run.stop();
        died
    }

    fn script(&mut self, at: String) -> bool {
        let run = &mut self.run;
        run.daemon.crash_at = Some(at);
        run.daemon.spawn();
        run.daemon.crash_at = None;
        while !run.vms.iter().all(Vm::is_connected) || !run.daemon.is_up() {
            if run.is_dead() {
                run.bury();
                return true;
            }
            for vm in &mut run.vms {
                if vm.try_connect().is_none() {
                    vm.poll(&mut run.world);
                }
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        let strategy = self.strategy;
        // The second disk has no mirror.
        let of_both = if strategy == STRATEGIES[1] { STRATEGIES[1] } else { STRATEGIES[0] };
        let steps: [&dyn Fn(&mut Run); 6] = [
            &|run| run.order_create_of(vec![1], strategy, false),
            &|run| run.order_create_of(vec![0, 1], of_both, false),
            &|run| run.order_delete_oldest_of(1),
            &|run| run.order_create_of(vec![1], STRATEGIES[0], true),
            &|run| run.order_cutover(),
            &|run| run.order_delete_oldest_of(0),
        ];
        for step in steps {
            step(run);
            run.settle_command();
            run.load_for(Duration::from_millis(2));
            if run.is_dead() {
                run.bury();
                return true;
            }
        }
        run.daemon.terminate();
        let status = run.daemon.wait_exit();
        run.bury();
        !status.success()
    }

    /// The points at which it died.
    fn end(self) -> Vec<String> {
        let log = self.run.daemon.log_text();
        log.lines().filter_map(|l| l.strip_prefix("crash point: ")).map(str::to_owned).collect()
    }
}

/// Dies at a point again and again, later each time, until a life comes to its end before that. Up to which time.
fn die_at(sweep: &mut Sweep, point: &str, times: usize) -> usize {
    let mut count = 1;
    while count <= times && sweep.life(point, count) {
        count += 1 + count.saturating_sub(DENSE) / 2;
    }
    count
}

/// A few deaths at one point, for planted defects.
pub(crate) fn deaths_at(seed: u64, strategy: &'static str, point: &str, times: usize) {
    die_at(&mut Sweep::new(seed, strategy), point, times);
}

#[test]
fn planted_deaths_at_every_durable_step_are_not_the_guests_problem() {
    let seed = seeds("points", 1)[0];
    // Each with a daemon of its own, two at the same time.
    let halves = POINTS.split_at(POINTS.len() / 2);
    let parts = STRATEGIES.into_iter().flat_map(|strategy| [(strategy, halves.0), (strategy, halves.1)]);
    let parts = Mutex::new(parts.enumerate());
    let hit = Mutex::new(BTreeSet::new());
    let work = || {
        loop {
            let Some((i, (strategy, points))) = parts.lock().unwrap().next() else { return };
            let mut sweep = Sweep::new(seed + i as u64, strategy);
            for &point in points {
                let count = die_at(&mut sweep, point, TIMES_MAX);
                println!("{strategy}: {point}: up to time {count}");
            }
            hit.lock().unwrap().extend(sweep.end());
        }
    };
    std::thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(work))));
    let hit = hit.into_inner().unwrap();
    let missed: Vec<_> = POINTS.into_iter().filter(|point| !hit.contains(*point)).collect();
    assert!(missed.is_empty(), "never died at: {missed:?}");
}
