//! What a frontend can cause to be logged, however often it comes.

use std::time::{Duration, Instant};

use vhost::VhostBackend;

use crate::ring::{ENTRIES, Guest};
use crate::scene::Scene;

/// Lines that may be logged at once, and a few that somebody else caused.
const AT_ONCE: usize = 20;

/// Does something many times, and counts the lines of the log.
fn lines_of(what: impl FnOnce(&Scene)) {
    let scene = Scene::new();
    let (before, began) = (scene.daemon.log_text().lines().count(), Instant::now());
    what(&scene);
    scene.left();
    let lines = scene.daemon.log_text().lines().count() - before;
    println!("{lines} lines in {:.1?}", began.elapsed());
    assert!(lines <= AT_ONCE + began.elapsed().as_secs() as usize, "{lines} lines in {:?}", began.elapsed());
    assert!(lines > 0, "and there is something to be read");
    scene.end();
}

#[test]
fn reconnecting_fills_no_log() {
    lines_of(|scene| {
        for _ in 0..300 {
            let guest = Guest::connect(&scene.socket(), 0);
            assert!(guest.frontend.set_vring_num(0, 3).is_err());
        }
    });
}

#[test]
fn restarting_a_ring_fills_no_log() {
    lines_of(|scene| {
        let mut guest = Guest::new(&scene.socket(), 1);
        let until = Instant::now() + Duration::from_secs(2);
        let mut rounds = 0;
        while Instant::now() < until || rounds < 100 {
            guest.set_avail_index(0, guest.used_index(0).wrapping_add(ENTRIES + 1));
            guest.kick(0);
            assert!(guest.is_broken(0));
            guest.frontend.get_vring_base(0).unwrap();
            guest.start_queue(0, 0);
            rounds += 1;
        }
    });
}
