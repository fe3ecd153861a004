//! Case 8: sparse layers beside packed ones, in turns, each with a fresh snapshot.
//!
//! What a packed layer gains at first writes it may lose later: a block that is overwritten moves, and a backup finds blocks
//! in the order in which they were written. So those have rows too.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::lane::{Connection, Op};
use crate::load::{self, Load, Pattern};
use crate::random::Rng;
use crate::results::{Results, Sample};
use crate::stage::{Stage, measure, progress};
use crate::{Result, results, stop};

pub(crate) const CASE: u32 = 8;
pub(crate) const LAYOUTS: [&str; 2] = ["sparse", "packed"];
const BLOCK_BYTES: usize = 4096;
/// The request of a backup.
const CHUNK_BYTES: usize = 256 << 10;

/// A row: what the guest does, or a backup afterwards.
struct Kind {
    what: &'static str,
    strategy: &'static str,
    op: Op,
    depth: usize,
    /// Which part of the disk is written at random before, in sixteenths.
    written_before: u64,
    then: Then,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Blocks that were not written since the snapshot.
    FirstWrites,
    /// Those that were.
    Overwrites,
    /// The snapshot is read from its beginning on.
    Backup,
}

const LOGGED: &str = "write-logging";
const SAVED: &str = "copy-on-write";

#[rustfmt::skip]
const KINDS: [Kind; 7] = [
    Kind { what: "4K random first write depth 32 into a log", strategy: LOGGED, op: Op::Write, depth: 32, written_before: 0, then: Then::FirstWrites },
    Kind { what: "4K random first write depth 32 under copy-on-write", strategy: SAVED, op: Op::Write, depth: 32, written_before: 0, then: Then::FirstWrites },
    Kind { what: "4K random first write depth 1 into a log, each synced", strategy: LOGGED, op: Op::SyncedWrite, depth: 1, written_before: 0, then: Then::FirstWrites },
    Kind { what: "4K random overwrite depth 32 in a log", strategy: LOGGED, op: Op::Write, depth: 32, written_before: 1, then: Then::Overwrites },
    Kind { what: "4K random overwrite depth 1 in a log", strategy: LOGGED, op: Op::Write, depth: 1, written_before: 1, then: Then::Overwrites },
    Kind { what: "4K random overwrite depth 1 in a log, each synced", strategy: LOGGED, op: Op::SyncedWrite, depth: 1, written_before: 1, then: Then::Overwrites },
    Kind { what: "backup, 256K depth 8, all of it overwritten at random", strategy: SAVED, op: Op::Read, depth: 8, written_before: 16, then: Then::Backup },
];

pub(crate) fn run(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    let daemons = stage.daemons();
    for kind in &KINDS {
        let row = stage.row(CASE, kind.what, 1);
        LAYOUTS.iter().for_each(|layout| results.show(layout));
        // To overwrite the whole disk takes long.
        let rounds = if kind.then == Then::Backup { stage.settings.fewer_rounds() } else { stage.settings.rounds };
        for round in 0..rounds {
            for turn_of in Rng::turns(LAYOUTS.len() * daemons.len(), round) {
                let ((at, suffix), layout) = (&daemons[turn_of / LAYOUTS.len()], LAYOUTS[turn_of % LAYOUTS.len()]);
                let figures = turn(stage, *at, kind, layout, round)?;
                results.add(Sample { row: row.clone(), backend: format!("{layout}{suffix}"), round, figures });
            }
        }
        progress(&row, results);
    }
    Ok(())
}

fn turn(stage: &Stage<'_>, at: usize, kind: &Kind, layout: &str, round: usize) -> Result<Vec<(&'static str, f64)>> {
    let (daemon, backend) = (stage.daemon(at)?, &stage.backends[at]);
    let mut connection = Connection::open(&backend.target(), 1)?;
    let body = json!({ "name": "laid", "disks": ["vm0"], "strategy": kind.strategy, "layout": layout, "wait": true });
    let made = daemon.send("POST", "/v1/snapshots", &body.to_string())?.json()?;
    if made[0]["layout"] != layout || made[0]["state"] != "quiesced" {
        return Err(format!("not the snapshot that was asked for: {made}").into());
    }
    let mut blocks: Vec<u64> = (0..connection.bytes / BLOCK_BYTES as u64).collect();
    Rng::new(round as u64 + 8000).shuffle(&mut blocks);
    let before = blocks.len() * usize::try_from(kind.written_before)? / 16;
    let written = Load {
        pattern: Pattern::Once(Arc::new(blocks[..before].to_vec())),
        ..Load::random(Op::Write, 32, Duration::from_secs(600))
    };
    load::run(&mut connection, &written, 0)?;
    let load = Load { depth: kind.depth, ..Load::random(kind.op, kind.depth, stage.settings.round) };
    let figures = match kind.then {
        Then::FirstWrites => {
            let load = Load { pattern: Pattern::Once(Arc::new(blocks)), ..load };
            measure(backend, &mut connection, &load, round as u64)?
        }
        Then::Overwrites => {
            blocks.truncate(before);
            // Each again and again, in another order.
            Rng::new(round as u64 + 9000).shuffle(&mut blocks);
            let again = blocks.repeat(8);
            let load = Load { pattern: Pattern::Once(Arc::new(again)), ..load };
            measure(backend, &mut connection, &load, round as u64)?
        }
        Then::Backup => {
            stop::check()?;
            let mut reader = Connection::to_socket(&daemon.socket("vm0@laid"), 1, true)?;
            let load = Load { bytes: CHUNK_BYTES, pattern: Pattern::Sequential, ..load };
            let cpu = backend.cpu()?;
            let measured = load::run(&mut reader, &load, 0)?;
            results::figures(&measured, CHUNK_BYTES, backend.cpu()?.saturating_sub(cpu))
        }
    };
    drop(connection);
    daemon.delete("vm0@laid")?;
    Ok(figures)
}
