//! The daemon is killed at any moment, and no guest may notice: no error, no lost or doubled request, no lost sector, no
//! snapshot that is not exactly what it was.
//!
//! `vm.rs` is the guest, `run.rs` kills, `../oracle.rs` knows what every version may show. HALFSILVER_KILLS asks for longer
//! runs (`scripts/kills`).

mod counts;
#[cfg(feature = "planted")]
pub(crate) mod points;
mod restarts;
mod run;
mod vm;

use crate::harness::{from_env, seeds};

#[test]
fn kills_at_any_moment_under_load_are_not_the_guests_problem() {
    let kills = from_env("HALFSILVER_KILLS", 250) as usize;
    let seed = seeds("kills", 1)[0];
    let counts = run::run(seed, kills);
    println!("seed {seed}: {counts:#?}");
    counts.require_all_reached();
}

/// A short run, for planted defects.
#[cfg(feature = "planted")]
pub(crate) fn one_run(seed: u64, kills: usize) {
    println!("{} kills", run::run(seed, kills).kills);
}
