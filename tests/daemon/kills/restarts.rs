//! A restart for an upgrade, as a service manager does it: SIGTERM, the end, the next daemon. Guests wait, and that is all.

use std::time::{Duration, Instant};

use super::counts::STRATEGIES;
use super::run::{Rest, Run};
use crate::harness::{PATIENCE, seeds};

const RESTARTS: usize = 20;

/// How long the guests had no answer, the longest of them.
fn restart(run: &mut Run) -> Duration {
    run.load_for(Duration::from_millis(30));
    let mut last: Vec<_> = run.vms.iter().map(|vm| (vm.answered, Instant::now())).collect();
    let mut gaps = vec![Duration::ZERO; last.len()];
    let mut look = |run: &Run| {
        let now = Instant::now();
        for (i, vm) in run.vms.iter().enumerate().filter(|(i, vm)| vm.answered != last[*i].0).collect::<Vec<_>>() {
            gaps[i] = gaps[i].max(now - last[i].1);
            last[i] = (vm.answered, now);
        }
    };
    run.daemon.terminate();
    while !run.daemon.has_stopped() {
        run.load_once();
        look(run);
    }
    run.bury();
    look(run);
    run.ensure_alive();
    look(run);
    let (before, began) = (run.vms.iter().map(|vm| vm.answered).collect::<Vec<_>>(), Instant::now());
    while run.vms.iter().zip(&before).any(|(vm, before)| vm.answered < before + 100) {
        assert!(began.elapsed() < *PATIENCE, "a guest has no answer after a restart");
        run.load_once();
        look(run);
    }
    gaps.into_iter().max().unwrap()
}

#[test]
fn restarts_for_an_upgrade_fail_no_request() {
    let mut run = Run::new(seeds("restarts", 1)[0]);
    // One snapshot of each kind that can be there at the same time: a log must come last.
    for (disks, strategy) in [(vec![1], STRATEGIES[2]), (vec![0, 1], STRATEGIES[0]), (vec![0], STRATEGIES[1])] {
        run.load_for(Duration::from_millis(20));
        run.order_create_of(disks, strategy, false);
        run.settle_command();
    }
    let mut gaps: Vec<_> = (0..RESTARTS).map(|_| restart(&mut run)).collect();
    run.rest_and(Rest::Only);
    assert_eq!(run.daemon.snapshots().len(), 4);
    gaps.sort();
    println!(
        "no answer for {:.1?} (median), {:.1?} (longest) over {RESTARTS} restarts",
        gaps[RESTARTS / 2],
        gaps[RESTARTS - 1]
    );
    run.rest_and(Rest::Clean);
    run.stop();
}
