//! Case 5: thirty-two snapshots against one, and thirty-two volumes on a snapshot against one.
//!
//! Each of the snapshots owns something: the guest writes between them. The oldest one is read through all of them. Each
//! of the volumes was written, too.

use std::sync::Arc;

use crate::Result;
use crate::lane::{Connection, Op};
use crate::load::{self, Load, Pattern};
use crate::random::Rng;
use crate::results::{Results, Sample};
use crate::stage::{Stage, measure, progress};

pub(crate) const CASE: u32 = 5;
pub(crate) const READS: &str = "guest, 4K random read depth 32";
pub(crate) const WRITES: &str = "guest, 4K first write depth 32";
pub(crate) const OLDEST: &str = "oldest snapshot, 4K random read depth 32";
/// Snapshots, or volumes, of the two contenders.
const COUNTS: [usize; 2] = [1, 32];
/// First writes to each volume.
const WRITTEN_TO_VOLUMES: usize = 256;

/// What there are many of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Snapshots,
    Volumes,
}

impl Kind {
    pub(crate) const ALL: [Kind; 2] = [Kind::Snapshots, Kind::Volumes];

    /// The contender's name in results.
    pub(crate) fn name(self, count: usize) -> String {
        let one = match self {
            Kind::Snapshots => "snapshot",
            Kind::Volumes => "volume",
        };
        if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") }
    }
}

pub(crate) fn run(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    for round in 0..stage.settings.rounds {
        for (at, suffix) in stage.daemons() {
            for count in COUNTS {
                let name = |kind: Kind| format!("{}{suffix}", kind.name(count));
                turn_with_snapshots(stage, at, count, round, &name(Kind::Snapshots), results)?;
                turn_with_volumes(stage, at, count, round, &name(Kind::Volumes), results)?;
            }
        }
    }
    for what in [READS, OLDEST, WRITES] {
        progress(&stage.row(CASE, what, 1), results);
    }
    Ok(())
}

fn turn_with_snapshots(
    stage: &Stage<'_>,
    at: usize,
    count: usize,
    round: usize,
    name: &str,
    results: &mut Results,
) -> Result<()> {
    let (daemon, backend) = (stage.daemon(at)?, &stage.backends[at]);
    let mut connection = Connection::open(&backend.target(), 1)?;
    let mut add = |what: &str, figures| {
        results.add(Sample { row: stage.row(CASE, what, 1), backend: name.to_owned(), round, figures });
    };
    let blocks = blocks(connection.bytes, round);
    // As many writes in all with either count, so that as much has been saved.
    let between = 4096 / count;
    let (written, rest) = blocks.split_at(between * count);
    for (i, part) in written.chunks(between).enumerate() {
        daemon.snapshot("vm0", &format!("s{i}"), "copy-on-write", true)?;
        load::run(&mut connection, &once(stage, part.to_vec()), 0)?;
    }
    let reads = Load::random(Op::Read, 32, stage.settings.round);
    // One snapshot was preceded by one long burst of writes, thirty-two by many short ones: both begin alike now.
    load::run(&mut connection, &Load { duration: stage.settings.round / 2, ..reads.clone() }, 0)?;
    add(READS, measure(backend, &mut connection, &reads, round as u64)?);
    let mut oldest = Connection::to_socket(&daemon.socket("vm0@s0"), 1, true)?;
    add(OLDEST, measure(backend, &mut oldest, &reads, round as u64)?);
    drop(oldest);
    add(WRITES, measure(backend, &mut connection, &once(stage, rest.to_vec()), round as u64)?);
    drop(connection);
    for i in 0..count {
        daemon.delete(&format!("vm0@s{i}"))?;
    }
    Ok(())
}

/// The disk that the volumes stand on.
fn turn_with_volumes(
    stage: &Stage<'_>,
    at: usize,
    count: usize,
    round: usize,
    name: &str,
    results: &mut Results,
) -> Result<()> {
    let (daemon, backend) = (stage.daemon(at)?, &stage.backends[at]);
    let mut connection = Connection::open(&backend.target(), 1)?;
    let mut add = |what: &str, figures| {
        results.add(Sample { row: stage.row(CASE, what, 1), backend: name.to_owned(), round, figures });
    };
    daemon.snapshot("vm0", "base", "copy-on-write", true)?;
    let blocks = blocks(connection.bytes, round);
    for i in 0..count {
        let volume = format!("v{i}");
        daemon.volume(&volume, "vm0@base")?;
        let mut writer = Connection::to_socket(&daemon.socket(&volume), 1, false)?;
        load::run(&mut writer, &once(stage, blocks[..WRITTEN_TO_VOLUMES].to_vec()), 0)?;
    }
    let reads = Load::random(Op::Read, 32, stage.settings.round);
    load::run(&mut connection, &Load { duration: stage.settings.round / 2, ..reads.clone() }, 0)?;
    add(READS, measure(backend, &mut connection, &reads, round as u64)?);
    add(WRITES, measure(backend, &mut connection, &once(stage, blocks), round as u64)?);
    drop(connection);
    for i in 0..count {
        daemon.delete_volume(&format!("v{i}"))?;
    }
    daemon.delete("vm0@base")
}

fn once(stage: &Stage<'_>, blocks: Vec<u64>) -> Load {
    Load { pattern: Pattern::Once(Arc::new(blocks)), ..Load::random(Op::Write, 32, stage.settings.round) }
}

fn blocks(bytes: u64, round: usize) -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..bytes / 4096).collect();
    Rng::new(round as u64 + 5000).shuffle(&mut blocks);
    blocks
}
