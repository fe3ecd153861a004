//! The rules of the cut (design: "The cut"), explored: the engine's own epoch clock, intake, chain and locks run on a
//! scheduler that decides every order of every atomic operation from a seed. Each rule is then left out in turn, and
//! some order must show it.
//!
//! Not checked here: weak memory (the scheduler is sequentially consistent; the fences and orderings are argued in
//! `src/engine/epoch.rs`), and rules 4 to 6, which `tests/engine/defects.rs` shows on one thread.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a test that cannot go on panics")]

mod background;
mod connection;
mod cut;
mod locks;
mod unsynced;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

/// Plants are process-wide: one test at a time.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

const SEED: u64 = 0x5eed;

fn config() -> Config {
    let mut config = Config::new();
    config.max_steps = shuttle::MaxSteps::ContinueAfter(20_000);
    config.stack_size = 0x4_0000;
    config
}

/// Runs `test` in `orders` random orders and as many in which few preemptions come at the worst places.
fn explore(orders: usize, test: impl Fn() + Send + Sync + Clone + 'static) {
    halfsilver::planted::explore();
    let random = RandomScheduler::new_from_seed(SEED, orders);
    Runner::new(random, config()).run(test.clone());
    let few = PctScheduler::new_from_seed(SEED, 3, orders);
    Runner::new(few, config()).run(test);
}

/// Whether some order makes `test` panic.
fn is_noticed(
    orders: usize,
    test: impl Fn() + Send + Sync + Clone + std::panic::RefUnwindSafe + std::panic::UnwindSafe + 'static,
) -> bool {
    std::panic::catch_unwind(move || explore(orders, test)).is_err()
}

/// One line of the list that `scripts/planted` prints.
fn report(defect: halfsilver::planted::Defect, noticed: bool, file: &str) {
    let how = if noticed { "noticed by" } else { "NOT NOTICED by" };
    println!("planted: {defect:?}: {how} tests/model/{file}: some order of atomic operations");
}
