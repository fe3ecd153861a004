//! The whole daemon on a simulated host, over many seeds.

use std::cell::RefCell;
use std::rc::Rc;

use crate::world::{Counts, Shape, run};

#[test]
fn a_seed() {
    let first: u64 = std::env::var("CRASH_FIRST").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let seeds: u64 = std::env::var("CRASH_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(5);
    let counts = Rc::new(RefCell::new(Counts::new()));
    for seed in first..first + seeds {
        let began = std::time::Instant::now();
        if let Err(e) = run(seed, Shape::of(seed), 60, &counts) {
            println!("panicked: seed {seed}: {}", e.replace('\n', " "));
        }
        println!("seed {seed}: {:?}", began.elapsed());
    }
    counts.borrow().iter().for_each(|(what, times)| println!("{times:8} {what}"));
}
