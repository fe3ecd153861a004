//! Case 6: a sparse disk of 16 TiB, a hundred volumes of it, and a daemon with four disks and nothing to do.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::backend::halfsilver::Disk;
use crate::backend::{Halfsilver, Qsd};
use crate::lane::{Connection, Op, Target};
use crate::load::{self, Load};
use crate::place::Device;
use crate::results::{Results, Sample};
use crate::stage::{QUEUES_MAX, Stage};
use crate::{Result, cpu};

pub(crate) const CASE: u32 = 6;
/// ext4's files end a block before 16 TiB.
const BYTES: u64 = (16 << 40) - (64 << 10);
pub(crate) const HUGE: &str = "sparse disk of 16 TiB";
pub(crate) const VOLUMES: &str = "100 volumes of a sparse disk of 16 TiB";
const VOLUMES_COUNT: usize = 100;
pub(crate) const FOUR_DISKS: &str = "four disks connected, idle";

type Figures = Vec<(&'static str, f64)>;

pub(crate) fn run(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    // The same on both devices: it is about what is kept in memory. A tmpfs takes files of this size always.
    if stage.device() != Device::Shm {
        return Ok(());
    }
    let image = stage.place.sparse("huge.raw", BYTES)?;
    for round in 0..stage.settings.rounds {
        for build in &stage.settings.builds {
            let mut add = |what: &str, figures| {
                results.add(Sample { row: stage.row(CASE, what, 1), backend: build.name.clone(), round, figures });
            };
            if round < stage.settings.fewer_rounds() {
                let label = format!("huge-{round}");
                let daemon = Halfsilver::start(build, &stage.place, &label, 1, vec![Disk::new("vm0", &image)])?;
                add(HUGE, of_daemon(daemon)?);
            }
            let label = format!("volumes-{round}");
            let daemon = Halfsilver::start(build, &stage.place, &label, 1, vec![Disk::new("vm0", &image)])?;
            add(VOLUMES, with_volumes(daemon)?);
            let mut disks = Vec::new();
            for i in 0..4 {
                let path = stage.place.image(&format!("idle-{i}.raw"));
                std::fs::File::create(&path)?.set_len(64 << 30)?;
                disks.push(Disk::new(&format!("vm{i}"), &path));
            }
            let label = format!("four-{round}");
            add(FOUR_DISKS, idle(Halfsilver::start(build, &stage.place, &label, QUEUES_MAX, disks)?)?);
        }
        if round >= stage.settings.fewer_rounds() {
            continue;
        }
        let qsd = Qsd::start(&stage.place, &format!("huge-{round}"), &image, stage.aio, 1)?;
        let figures = of_qsd(qsd, &stage.place.image("huge-target.raw"))?;
        results.add(Sample { row: stage.row(CASE, HUGE, 1), backend: "qsd".to_owned(), round, figures });
    }
    for what in [HUGE, VOLUMES, FOUR_DISKS] {
        show(stage, what, results);
    }
    Ok(())
}

fn show(stage: &Stage<'_>, what: &str, results: &Results) {
    let row = stage.row(CASE, what, 1);
    for backend in results.backends(&row) {
        let mut line = format!("  {what}, {backend}:");
        let figures = [
            "create_ms",
            "slowest_create_ms",
            "delete_ms",
            "before_mib",
            "with_snapshot_mib",
            "with_volumes_mib",
            "after_mib",
            "resident_mib",
        ];
        for name in figures {
            if let Some(spread) = results.spread(&row, &backend, name) {
                line.push_str(&format!(" {name} {:.1}", spread.median));
            }
        }
        eprintln!("{line}");
    }
}

fn mib(pid: u32) -> Result<f64> {
    Ok(cpu::resident_bytes(pid)? as f64 / f64::from(1 << 20))
}

/// Some requests all over the disk, so that whatever is made when it is needed has been made.
fn touch(target: &Target) -> Result<Connection> {
    let mut connection = Connection::open(target, 1)?;
    for op in [Op::Write, Op::Read] {
        load::run(&mut connection, &Load::random(op, 32, Duration::from_millis(50)), 6)?;
    }
    Ok(connection)
}

/// With `around`, what creates and deletes the snapshot.
fn with_snapshot(
    pid: u32,
    target: &Target,
    create: impl FnOnce() -> Result<()>,
    between: impl FnOnce(Connection) -> Result<()>,
    delete: impl FnOnce() -> Result<()>,
) -> Result<Figures> {
    let connection = touch(target)?;
    let before = mib(pid)?;
    let began = Instant::now();
    create()?;
    let created = began.elapsed();
    let at_once = mib(pid)?;
    between(connection)?;
    let with_snapshot = mib(pid)?;
    let began = Instant::now();
    delete()?;
    let deleted = began.elapsed();
    Ok(vec![
        ("create_ms", created.as_secs_f64() * 1000.0),
        ("delete_ms", deleted.as_secs_f64() * 1000.0),
        ("before_mib", before),
        ("created_mib", at_once),
        ("with_snapshot_mib", with_snapshot),
        ("after_mib", mib(pid)?),
    ])
}

/// First writes all over the disk.
fn write_on(mut connection: Connection) -> Result<()> {
    load::run(&mut connection, &Load::random(Op::Write, 32, Duration::from_millis(100)), 7).map(drop)
}

fn of_daemon(mut daemon: Halfsilver) -> Result<Figures> {
    let target = Target::Socket(daemon.socket("vm0"));
    let figures = with_snapshot(
        daemon.pid(),
        &target,
        || daemon.snapshot("vm0", "huge", "copy-on-write", true),
        write_on,
        || daemon.delete("vm0@huge"),
    )?;
    daemon.stop()?;
    Ok(figures)
}

/// A hundred volumes off one snapshot, each with a frontend that has written to it.
fn with_volumes(mut daemon: Halfsilver) -> Result<Figures> {
    let connection = touch(&Target::Socket(daemon.socket("vm0")))?;
    let before = mib(daemon.pid())?;
    daemon.snapshot("vm0", "base", "copy-on-write", true)?;
    let mut took_ms = Vec::new();
    for i in 0..VOLUMES_COUNT {
        let began = Instant::now();
        daemon.volume(&format!("v{i}"), "vm0@base")?;
        took_ms.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    let created = mib(daemon.pid())?;
    for i in 0..VOLUMES_COUNT {
        let mut writer = Connection::open(&Target::Socket(daemon.socket(&format!("v{i}"))), 1)?;
        load::run(&mut writer, &Load::random(Op::Write, 32, Duration::from_millis(2)), 8)?;
    }
    drop(connection);
    let written = mib(daemon.pid())?;
    daemon.stop()?;
    Ok(vec![
        ("create_ms", took_ms.iter().sum::<f64>() / took_ms.len() as f64),
        ("slowest_create_ms", took_ms.iter().copied().fold(0.0, f64::max)),
        ("before_mib", before),
        ("with_volumes_mib", created),
        ("after_mib", written),
    ])
}

fn of_qsd(qsd: Qsd, file: &Path) -> Result<Figures> {
    std::fs::File::create(file)?.set_len(BYTES)?;
    let (pid, target) = (qsd.pid(), Target::Socket(qsd.socket()));
    let qsd = std::cell::RefCell::new(qsd);
    let figures = with_snapshot(
        pid,
        &target,
        || qsd.borrow_mut().begin_copy_before_write(file, crate::backend::qsd::Aio::Native),
        write_on,
        || qsd.borrow_mut().end_copy_before_write(),
    )?;
    std::fs::remove_file(file)?;
    Ok(figures)
}

/// Memory and CPU of a daemon with four connected clients that have asked for something and then do nothing.
fn idle(mut daemon: Halfsilver) -> Result<Figures> {
    let mut connections = Vec::new();
    for i in 0..4 {
        connections.push(touch(&Target::Socket(daemon.socket(&format!("vm{i}"))))?);
    }
    let before = cpu::of_process(daemon.pid())?;
    let began = Instant::now();
    std::thread::sleep(Duration::from_millis(500));
    let used = (cpu::of_process(daemon.pid())? - before).as_secs_f64() / began.elapsed().as_secs_f64();
    let figures = vec![("resident_mib", mib(daemon.pid())?), ("idle_cpu_us_per_s", used * 1e6)];
    drop(connections);
    daemon.stop()?;
    Ok(figures)
}
