//! Case 2: writes of blocks that nobody has written since the snapshot, each with a fresh snapshot.
//!
//! QEMU's copy job copies 64 KiB at once, so that fifteen of sixteen neighbours are no first writes any more. In the
//! rows that the reach goes by, every write has such a cluster to itself; one more row writes anywhere.
//!
//! What a file system charges for the room of a log shows in plain io_uring's rows: into the image, into an empty sparse
//! file, and into one whose room is reserved.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Backend;
use crate::lane::{Connection, Op};
use crate::load::{Load, Pattern};
use crate::place::Device;
use crate::random::Rng;
use crate::results::{Results, Row, Sample};
use crate::stage::{Stage, measure, progress};
use crate::{Result, load};

pub(crate) const CASE: u32 = 2;
const CLUSTER_BYTES: u64 = 64 << 10;
const BLOCK_BYTES: u64 = 4096;

pub(crate) const COPY_ON_WRITE: &str = "copy-on-write";
pub(crate) const WRITE_LOGGING: &str = "write-logging";
pub(crate) const NO_SNAPSHOT: &str = "no snapshot";
pub(crate) const QSD: &str = "qsd copy-before-write";
pub(crate) const SPARSE_FILE: &str = "io_uring, sparse file";

/// Who writes, and what stands in its way.
struct Contender {
    name: String,
    backend: usize,
    how: How,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    NoSnapshot,
    Strategy(&'static str),
    /// Copy-on-write that outlives a power cut.
    Power,
    Mirroring,
    Qsd,
    Plain(Room),
}

/// Whether the file that plain io_uring writes has room for what is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    /// The image, written before.
    Written,
    /// None yet: the file system finds it for each write.
    Sparse,
    /// Set aside by fallocate, and never written.
    Reserved,
}

/// Which blocks are written in which order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// One block in each cluster, clusters in random order.
    Clusters,
    /// Any block once.
    Anywhere,
    /// From the beginning.
    Sequential,
}

/// The name of the row with 4 KiB writes at this depth.
pub(crate) fn row_of_depth(depth: usize) -> String {
    format!("4K random first write depth {depth}")
}

pub(crate) fn run(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    let mut loads = vec![
        (row_of_depth(1), Order::Clusters, 4096, 1, 1),
        (row_of_depth(32), Order::Clusters, 4096, 32, 1),
        ("64K sequential first write depth 8".to_owned(), Order::Sequential, 64 << 10, 8, 1),
    ];
    if !stage.settings.quick {
        loads.push(("4K random first write depth 32, anywhere".to_owned(), Order::Anywhere, 4096, 32, 1));
        loads.push((row_of_depth(32), Order::Clusters, 4096, 32, 2));
    }
    for mirrored in [false, true] {
        let leg = stage.place.image("leg.raw");
        if mirrored {
            begin_mirrors(stage, &leg)?;
        }
        let contenders = contenders(stage, mirrored);
        for (what, order, bytes, depth, queues) in &loads {
            if stage.settings.quick && mirrored && *depth != 32 {
                continue;
            }
            let row = stage.row(CASE, what, *queues);
            let load =
                Load { bytes: *bytes, queues: *queues, ..Load::random(Op::Write, *depth, longest(stage, *order)) };
            // The reach goes by depth 32, without mirrors.
            let all = *depth == 32 && !mirrored;
            let rounds = if all { stage.settings.rounds } else { stage.settings.fewer_rounds() };
            contenders.iter().for_each(|contender| results.show(&contender.name));
            for round in 0..rounds {
                for at in Rng::turns(contenders.len(), round) {
                    let contender = &contenders[at];
                    if stage.settings.quick && *depth != 32 && matches!(contender.how, How::Plain(_)) {
                        continue;
                    }
                    let figures = turn(stage, contender, &load, *order, round)?;
                    results.add(Sample { row: row.clone(), backend: contender.name.clone(), round, figures });
                }
            }
            progress(&row, results);
        }
        if mirrored {
            end_mirrors(stage, &leg)?;
        }
    }
    Ok(())
}

/// What is logged anywhere takes far longer to fold than to write: those rounds are short.
fn longest(stage: &Stage<'_>, order: Order) -> Duration {
    if order == Order::Anywhere { stage.settings.round / 4 } else { stage.settings.round }
}

fn contenders(stage: &Stage<'_>, mirrored: bool) -> Vec<Contender> {
    let mut all = Vec::new();
    for (backend, suffix) in stage.daemons() {
        let mut add = |name: &str, how| all.push(Contender { name: format!("{name}{suffix}"), backend, how });
        if mirrored {
            add("mirror, no snapshot", How::NoSnapshot);
            add("write-mirroring", How::Mirroring);
            continue;
        }
        add(NO_SNAPSHOT, How::NoSnapshot);
        add(COPY_ON_WRITE, How::Strategy(COPY_ON_WRITE));
        add("copy-on-write, power", How::Power);
        add(WRITE_LOGGING, How::Strategy(WRITE_LOGGING));
    }
    if !mirrored {
        all.insert(2, Contender { name: QSD.to_owned(), backend: Stage::QSD, how: How::Qsd });
        for (name, room) in
            [("io_uring", Room::Written), (SPARSE_FILE, Room::Sparse), ("io_uring, reserved file", Room::Reserved)]
        {
            all.push(Contender { name: name.to_owned(), backend: Stage::PLAIN, how: How::Plain(room) });
        }
    }
    all
}

fn leg_of(leg: &std::path::Path, at: usize) -> PathBuf {
    leg.with_extension(format!("{at}.raw"))
}

fn begin_mirrors(stage: &mut Stage<'_>, leg: &std::path::Path) -> Result<()> {
    for (at, _) in stage.daemons() {
        let leg = leg_of(leg, at);
        std::fs::File::create(&leg)?.set_len(std::fs::metadata(&stage.image)?.len())?;
        stage.daemon(at)?.mirror("vm0", &leg)?;
    }
    Ok(())
}

fn end_mirrors(stage: &mut Stage<'_>, leg: &std::path::Path) -> Result<()> {
    for (at, _) in stage.daemons() {
        let leg = leg_of(leg, at);
        stage.daemon(at)?.unmirror("vm0", &leg)?;
        std::fs::remove_file(&leg)?;
    }
    Ok(())
}

/// The blocks of a round, the same for every contender.
fn blocks(bytes: u64, block_bytes: u64, order: Order, round: usize) -> Vec<u64> {
    let mut rng = Rng::new(round as u64 + 1000);
    let mut blocks: Vec<u64> = match order {
        Order::Clusters => {
            let in_cluster = CLUSTER_BYTES / BLOCK_BYTES;
            (0..bytes / CLUSTER_BYTES).map(|cluster| cluster * in_cluster + rng.below(in_cluster)).collect()
        }
        Order::Anywhere | Order::Sequential => (0..bytes / block_bytes).collect(),
    };
    if order != Order::Sequential {
        rng.shuffle(&mut blocks);
    }
    blocks
}

/// A snapshot, a round of first writes, and the end of the snapshot.
fn turn(
    stage: &mut Stage<'_>,
    contender: &Contender,
    load: &Load,
    order: Order,
    round: usize,
) -> Result<Vec<(&'static str, f64)>> {
    let at = contender.backend;
    if let How::Plain(room) = contender.how {
        return turn_of_plain(stage, room, load, order, round);
    }
    if contender.how == How::Power {
        stage.daemon(at)?.set_durability("vm0", "power")?;
    }
    let mut connection = Connection::open(&stage.backends[at].target(), load.queues)?;
    let reads = Load { queues: load.queues, ..Load::random(Op::Read, load.depth, Duration::from_millis(20)) };
    load::run(&mut connection, &reads, 0)?;
    let target = stage.place.image("copy-before-write.raw");
    match contender.how {
        How::NoSnapshot | How::Plain(_) => {}
        How::Strategy(strategy) => stage.daemon(at)?.snapshot("vm0", "first", strategy, true)?,
        How::Power => stage.daemon(at)?.snapshot("vm0", "first", COPY_ON_WRITE, true)?,
        How::Mirroring => stage.daemon(at)?.snapshot("vm0", "first", "write-mirroring", true)?,
        How::Qsd => {
            std::fs::File::create(&target)?.set_len(connection.bytes)?;
            let aio = stage.aio;
            stage.qsd_mut()?.begin_copy_before_write(&target, aio)?;
        }
    }
    let blocks = blocks(connection.bytes, load.bytes as u64, order, round);
    let load = Load { pattern: Pattern::Once(Arc::new(blocks)), ..load.clone() };
    let figures = measure(&stage.backends[at], &mut connection, &load, round as u64)?;
    drop(connection);
    match contender.how {
        How::NoSnapshot | How::Plain(_) => {}
        How::Strategy(_) => stage.daemon(at)?.delete("vm0@first")?,
        How::Power => {
            stage.daemon(at)?.delete("vm0@first")?;
            stage.daemon(at)?.set_durability("vm0", "process")?;
        }
        How::Mirroring => {
            stage.daemon(at)?.delete("vm0@first")?;
            stage.daemon(at)?.wait_in_sync("vm0")?;
        }
        How::Qsd => {
            stage.qsd_mut()?.end_copy_before_write()?;
            std::fs::remove_file(&target)?;
        }
    }
    Ok(figures)
}

/// The same writes by plain io_uring.
fn turn_of_plain(
    stage: &Stage<'_>,
    room: Room,
    load: &Load,
    order: Order,
    round: usize,
) -> Result<Vec<(&'static str, f64)>> {
    let bytes = std::fs::metadata(&stage.image)?.len();
    let fresh = stage.place.image("room.raw");
    let path = if room == Room::Written { &stage.image } else { &fresh };
    if room != Room::Written {
        let file = std::fs::File::create(&fresh)?;
        file.set_len(bytes)?;
        if room == Room::Reserved {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, bytes)?;
        }
        // As a snapshot does: the file is there before the first write.
        file.sync_all()?;
    }
    let backend = Backend::Plain(path.clone());
    let mut connection = Connection::open(&backend.target(), load.queues)?;
    let load =
        Load { pattern: Pattern::Once(Arc::new(blocks(bytes, load.bytes as u64, order, round))), ..load.clone() };
    let figures = measure(&backend, &mut connection, &load, round as u64);
    drop(connection);
    if room != Room::Written {
        std::fs::remove_file(&fresh)?;
    }
    figures
}

/// The row that the reach goes by.
pub(crate) fn reach_row(results: &Results, device: Device) -> Option<Row> {
    results.find(CASE, &row_of_depth(32), device, 1)
}
