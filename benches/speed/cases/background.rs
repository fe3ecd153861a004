//! Case 4: the guest while something else runs on its disk: a backup that reads the snapshot as fast as it can, a fold, a
//! volume that is made independent or updated, a restore.
//!
//! Each kind of work is a row of `WORKS`. A round has a turn with a snapshot and nothing else and a turn with the work
//! beside the guest, each with a fresh snapshot; a turn ends when the work does, if that is earlier.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::backend::{Halfsilver, Qsd};
use crate::lane::{Connection, Op};
use crate::load::{self, Load, Pattern};
use crate::random::Rng;
use crate::results::{Results, Row, Sample, figures};
use crate::stage::{Stage, progress};
use crate::{Result, cpu, stop};

pub(crate) const CASE: u32 = 4;
/// The request of backups, and of what fills a log.
const CHUNK_BYTES: usize = 256 << 10;

/// Something that runs beside a guest.
struct Work {
    name: &'static str,
    /// The strategy of the snapshot that it is about.
    strategy: &'static str,
    /// Whether the guest writes a part of the disk before, so that there is something to do.
    fills: bool,
    /// Whether it, or what is made ready for it, copies the whole disk.
    is_long: bool,
    /// Makes ready what it needs, before the guest writes.
    prepare: fn(&Halfsilver) -> Result<()>,
    /// Does it until its end or until it is told to stop; returns the bytes done.
    run: fn(&Halfsilver, &Arc<AtomicBool>) -> Result<u64>,
}

/// All of it. More is added here.
const WORKS: [Work; 5] = [
    Work { name: "backup", strategy: "copy-on-write", fills: false, is_long: false, prepare: nothing, run: back_up },
    Work { name: "fold", strategy: "write-logging", fills: true, is_long: false, prepare: nothing, run: fold },
    Work {
        name: "completion",
        strategy: "copy-on-write",
        fills: false,
        is_long: true,
        prepare: make_volume,
        run: complete,
    },
    Work {
        name: "update",
        strategy: "copy-on-write",
        fills: true,
        is_long: true,
        prepare: make_whole_volume,
        run: update,
    },
    Work { name: "restore", strategy: "copy-on-write", fills: true, is_long: false, prepare: nothing, run: restore },
];
const VOLUME: &str = "beside-volume";
/// How long QEMU's requests may take beside its backup.
const PATIENCE_WITH_QSD: Duration = Duration::from_secs(10);
/// One in so many blocks of the disk is filled.
const FILLED_PART: u64 = 16;
const SNAPSHOT: &str = "vm0@beside";

/// Reads the snapshot from its beginning on, again and again.
fn back_up(daemon: &Halfsilver, until: &Arc<AtomicBool>) -> Result<u64> {
    let mut reader = Connection::to_socket(&daemon.socket(SNAPSHOT), 1, true)?;
    let (pattern, until) = (Pattern::Sequential, Some(until.clone()));
    let reads = Load { bytes: CHUNK_BYTES, pattern, until, ..Load::random(Op::Read, 8, Duration::from_secs(600)) };
    Ok(load::run(&mut reader, &reads, 0)?.in_time * CHUNK_BYTES as u64)
}

/// Deletes the snapshot, for which its log is folded into the image.
fn fold(daemon: &Halfsilver, _until: &Arc<AtomicBool>) -> Result<u64> {
    let owned = daemon.get(&format!("/v1/snapshots/{SNAPSHOT}"))?["owned_bytes"].as_u64().unwrap_or(0);
    daemon.delete(SNAPSHOT)?;
    Ok(owned)
}

fn nothing(_daemon: &Halfsilver) -> Result<()> {
    Ok(())
}

fn make_volume(daemon: &Halfsilver) -> Result<()> {
    daemon.volume(VOLUME, SNAPSHOT)
}

/// One that has everything already.
fn make_whole_volume(daemon: &Halfsilver) -> Result<()> {
    make_volume(daemon)?;
    let job = daemon.send("POST", &format!("/v1/volumes/{VOLUME}/complete"), "")?.json()?;
    daemon.wait_for_job(&job)
}

/// Brings the volume to what the guest has written since.
fn update(daemon: &Halfsilver, until: &Arc<AtomicBool>) -> Result<u64> {
    let job = daemon.send("POST", &format!("/v1/volumes/{VOLUME}/update"), "")?.json()?;
    let done = follow(daemon, &job, until)?;
    daemon.wait_for_job(&job)?;
    Ok(done)
}

/// Copies the whole disk into a volume.
fn complete(daemon: &Halfsilver, until: &Arc<AtomicBool>) -> Result<u64> {
    let job = daemon.send("POST", &format!("/v1/volumes/{VOLUME}/complete"), "")?.json()?;
    let done = follow(daemon, &job, until)?;
    if daemon.job(&job)?["state"] == "running" {
        // Or its volume would not go.
        daemon.send("DELETE", &format!("/v1/jobs/{}", job["id"]), "")?;
    }
    Ok(done)
}

/// Takes the disk back under the guest, which goes on.
fn restore(daemon: &Halfsilver, until: &Arc<AtomicBool>) -> Result<u64> {
    let body = json!({ "from": SNAPSHOT, "force": true }).to_string();
    let job = daemon.send("POST", "/v1/disks/vm0/restore", &body)?.json()?;
    let done = follow(daemon, &job, until)?;
    // The snapshot cannot go before.
    daemon.wait_for_job(&job)?;
    Ok(done)
}

/// Waits for a job, at most until the turn is over; returns the bytes that it has done by then.
fn follow(daemon: &Halfsilver, job: &Value, until: &Arc<AtomicBool>) -> Result<u64> {
    loop {
        let now = daemon.job(job)?;
        if now["state"] != "running" || until.load(Relaxed) {
            return Ok(now["done_bytes"].as_u64().unwrap_or(0));
        }
        stop::check()?;
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The row of a guest's reads or writes beside a kind of work.
pub(crate) fn row_name(op: &str, work: &str) -> String {
    let article = if work.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("guest, 4K random {op} depth 32, beside {article} {work}")
}

/// The kinds of work that the guest is to notice little of.
pub(crate) fn works() -> impl Iterator<Item = &'static str> {
    WORKS.iter().map(|work| work.name)
}

pub(crate) fn run(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    for work in &WORKS {
        for (op, name) in [(Op::Read, "read"), (Op::Write, "write")] {
            // What has much to do before each turn is done once, and beside the writes alone, where there is little time.
            let is_short = stage.settings.quick && work.name != "backup";
            if is_short && op == Op::Read {
                continue;
            }
            let rounds = if is_short && work.is_long { 1 } else { stage.settings.fewer_rounds() };
            let row = stage.row(CASE, &row_name(name, work.name), 1);
            for round in 0..rounds {
                of_daemons(stage, work, op, &row, round, results)?;
                if work.name == "backup" {
                    of_qsd(stage, op, &row, round, results)?;
                }
            }
            progress(&row, results);
        }
    }
    Ok(())
}

fn of_daemons(
    stage: &mut Stage<'_>,
    work: &Work,
    op: Op,
    row: &Row,
    round: usize,
    results: &mut Results,
) -> Result<()> {
    let daemons = stage.daemons();
    for turn_of in Rng::turns(2 * daemons.len(), round) {
        let ((at, suffix), busy) = (&daemons[turn_of / 2], turn_of % 2 == 1);
        let figures = turn(stage, *at, work, op, round, busy)?;
        let backend = if busy { format!("{}{suffix}", work.name) } else { format!("alone{suffix}") };
        results.add(Sample { row: row.clone(), backend, round, figures });
    }
    Ok(())
}

type Figures = Vec<(&'static str, f64)>;

fn turn(stage: &Stage<'_>, at: usize, work: &Work, op: Op, round: usize, busy: bool) -> Result<Figures> {
    let daemon = stage.daemon(at)?;
    let mut connection = Connection::open(&stage.backends[at].target(), 1)?;
    daemon.snapshot("vm0", "beside", work.strategy, true)?;
    (work.prepare)(daemon)?;
    if work.fills {
        let blocks: Vec<u64> = (0..connection.bytes / CHUNK_BYTES as u64 / FILLED_PART).collect();
        let pattern = Pattern::Once(blocks.into());
        let writes = Load { bytes: CHUNK_BYTES, pattern, ..Load::random(Op::Write, 8, Duration::from_secs(600)) };
        load::run(&mut connection, &writes, 0)?;
    }
    let (until, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let load = Load { until: Some(over.clone()), ..Load::random(op, 32, stage.settings.round) };
    let before = stage.backends[at].cpu()?;
    let (measured, done) = std::thread::scope(|scope| {
        let beside = busy.then(|| {
            scope.spawn(|| {
                let began = Instant::now();
                let bytes = (work.run)(daemon, &until);
                over.store(true, Relaxed);
                bytes.map(|bytes| (bytes, began.elapsed()))
            })
        });
        let measured = load::run(&mut connection, &load, round as u64);
        until.store(true, Relaxed);
        let done = beside.map(|b| b.join().unwrap_or_else(|_| Err("the work panicked".into())));
        (measured, done)
    });
    let (measured, cpu) = (measured?, stage.backends[at].cpu()?.saturating_sub(before));
    let mut figures = figures(&measured, 4096, cpu);
    if let Some(done) = done {
        let (bytes, took) = done?;
        figures.push(("beside_mib_per_s", bytes as f64 / f64::from(1 << 20) / took.as_secs_f64()));
    }
    drop(connection);
    if daemon.send("GET", &format!("/v1/volumes/{VOLUME}"), "")?.status != 404 {
        daemon.delete_volume(VOLUME)?;
    }
    if daemon.send("GET", &format!("/v1/snapshots/{SNAPSHOT}"), "")?.status != 404 {
        daemon.delete(SNAPSHOT)?;
    }
    Ok(figures)
}

/// QEMU's own kind of backup copies into a file, which ours leaves to whoever reads. It begins before the load: case 3
/// shows why.
fn of_qsd(stage: &mut Stage<'_>, op: Op, row: &Row, round: usize, results: &mut Results) -> Result<()> {
    for busy in [false, true] {
        let target = stage.place.image("beside.raw");
        let turn = turn_of_qsd(stage, op, round, busy, &target);
        std::fs::remove_file(&target)?;
        let backend = if busy { "qsd backup" } else { "qsd alone" };
        match turn {
            Ok(figures) => results.add(Sample { row: row.clone(), backend: backend.to_owned(), round, figures }),
            Err(e) if stop::asked() => return Err(e),
            Err(e) => stage.qsd_failed(row, &e.to_string(), results)?,
        }
    }
    Ok(())
}

fn turn_of_qsd(stage: &mut Stage<'_>, op: Op, round: usize, busy: bool, target: &Path) -> Result<Figures> {
    let mut connection = Connection::open(&stage.backends[Stage::QSD].target(), 1)?;
    connection.lanes.iter_mut().for_each(|lane| lane.patience = PATIENCE_WITH_QSD);
    std::fs::File::create(target)?.set_len(connection.bytes)?;
    let over = Arc::new(AtomicBool::new(false));
    let load = Load { until: Some(over.clone()), ..Load::random(op, 32, stage.settings.round) };
    let aio = stage.aio;
    let qsd = stage.qsd_mut()?;
    if busy {
        qsd.begin_full_backup(target, aio)?
    } else {
        qsd.begin_copy_before_write(target, aio)?
    }
    let before = cpu::of_process(qsd.pid())?;
    let (measured, beside) = std::thread::scope(|scope| {
        let thread = scope.spawn(|| load::run(&mut connection, &load, round as u64));
        let beside = if busy { watch(qsd, &over, || thread.is_finished()) } else { Ok((0, Duration::ZERO)) };
        (thread.join().unwrap_or_else(|_| Err("the load panicked".into())), beside)
    });
    let measured = measured?;
    let cpu = cpu::of_process(qsd.pid())?.saturating_sub(before);
    let mut figures = figures(&measured, 4096, cpu);
    if busy {
        let (bytes, at) = beside?;
        figures.push(("beside_mib_per_s", bytes as f64 / f64::from(1 << 20) / at.as_secs_f64().max(1e-3)));
    }
    drop(connection);
    qsd.end_copy_before_write()?;
    Ok(figures)
}

/// Lets the backup run and follows it to its end or the load's; returns the bytes copied and when that was so.
fn watch(qsd: &mut Qsd, over: &AtomicBool, load_is_over: impl Fn() -> bool) -> Result<(u64, Duration)> {
    let began = Instant::now();
    let mut seen = (0, began.elapsed());
    let watched = (|| {
        qsd.unleash()?;
        while !load_is_over() && !stop::asked() {
            match qsd.progress()? {
                Some((done, all)) if done < all => seen = (done, began.elapsed()),
                _ => break,
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    })();
    over.store(true, Relaxed);
    watched.map(|()| seen)
}
