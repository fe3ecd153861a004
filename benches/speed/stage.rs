//! One device with its prefilled image and all contenders on it, which stay up while rounds take turns.

use std::time::Duration;

use crate::backend::halfsilver::Disk;
use crate::backend::qsd::Aio;
use crate::backend::{Backend, Halfsilver, Qsd};
use crate::lane::{Connection, Op};
use crate::load::Load;
use crate::place::{Device, Place};
use crate::random::Rng;
use crate::results::{Results, Row, Sample, Spread};
use crate::settings::Settings;
use crate::{Result, load, results, stop};

/// The queues that disks and exports have.
pub(crate) const QUEUES_MAX: usize = 2;

/// The name of qemu-storage-daemon with `aio=io_uring` where `aio=native` is faster.
pub(crate) const QSD_IO_URING: &str = "qsd, io_uring";

/// A device under measurement.
pub(crate) struct Stage<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) place: Place,
    pub(crate) image: std::path::PathBuf,
    pub(crate) aio: Aio,
    pub(crate) backends: Vec<Backend>,
    restarts: usize,
}

impl<'a> Stage<'a> {
    /// Makes the image and starts everybody.
    pub(crate) fn new(settings: &'a Settings, device: Device, results: &mut Results) -> Result<Stage<'a>> {
        let bytes = settings.image_bytes();
        // Room for the image, copies for further builds, and what snapshots and backups take at most.
        let needed = bytes * (settings.builds.len() as u64 + 3);
        let place = Place::new(device, &settings.dir, needed)?;
        let image = place.prefilled("disk.raw", bytes)?;
        let aio = best_aio(settings, &place, &image, results)?;
        let mut backends = Vec::new();
        for (i, build) in settings.builds.iter().enumerate() {
            // A daemon locks its image, so that a second one needs a copy.
            let own = if i == 0 { image.clone() } else { place.prefilled(&format!("{}.raw", build.name), bytes)? };
            let daemon = Halfsilver::start(build, &place, "main", QUEUES_MAX, vec![Disk::new("vm0", &own)])?;
            backends.push(Backend::Halfsilver(Box::new(daemon)));
        }
        backends.insert(1, Backend::Qsd(Qsd::start(&place, "main", &image, aio, QUEUES_MAX)?));
        backends.insert(2, Backend::Plain(image.clone()));
        Ok(Stage { settings, place, image, aio, backends, restarts: 0 })
    }

    pub(crate) fn device(&self) -> Device {
        self.place.device
    }

    pub(crate) fn row(&self, case: u32, what: &str, queues: usize) -> Row {
        Row { case, what: what.to_owned(), device: self.device(), queues }
    }

    /// Connections to all contenders, in their order.
    pub(crate) fn connect(&self, queues: usize) -> Result<Vec<Connection>> {
        self.backends.iter().map(|b| Connection::open(&b.target(), queues)).collect()
    }

    /// Adds the way of qemu-storage-daemon that is slower here, if that is the one with io_uring, which is what halfsilver
    /// uses. To be taken away again by [`Stage::drop_other_qsd`].
    pub(crate) fn add_other_qsd(&mut self) -> Result<()> {
        if self.aio == Aio::Native {
            let other = Qsd::start(&self.place, "other", &self.image, Aio::IoUring, QUEUES_MAX)?.named(QSD_IO_URING);
            self.backends.push(Backend::Qsd(other));
        }
        Ok(())
    }

    pub(crate) fn drop_other_qsd(&mut self) {
        self.backends.retain(|b| b.name() != QSD_IO_URING);
    }

    /// The daemon at this place of the list.
    pub(crate) fn daemon(&self, at: usize) -> Result<&Halfsilver> {
        match &self.backends[at] {
            Backend::Halfsilver(daemon) => Ok(daemon),
            _ => Err("that contender is no halfsilver".into()),
        }
    }

    pub(crate) fn daemon_mut(&mut self, at: usize) -> Result<&mut Halfsilver> {
        match &mut self.backends[at] {
            Backend::Halfsilver(daemon) => Ok(daemon),
            _ => Err("that contender is no halfsilver".into()),
        }
    }

    /// The places of all halfsilver builds in the list, and what is added to the names of the further ones.
    pub(crate) fn daemons(&self) -> Vec<(usize, String)> {
        let ours = self.backends.iter().enumerate().filter(|(_, b)| matches!(b, Backend::Halfsilver(_)));
        ours.map(|(at, b)| (at, if at == 0 { String::new() } else { format!(" ({})", b.name()) })).collect()
    }

    /// The place of qemu-storage-daemon in the list.
    pub(crate) const QSD: usize = 1;
    /// The place of plain io_uring in the list.
    pub(crate) const PLAIN: usize = 2;

    pub(crate) fn qsd_mut(&mut self) -> Result<&mut Qsd> {
        match &mut self.backends[Self::QSD] {
            Backend::Qsd(qsd) => Ok(qsd),
            _ => Err("that contender is no qemu-storage-daemon".into()),
        }
    }

    /// Kills it and starts another one in its place.
    pub(crate) fn restart_qsd(&mut self) -> Result<()> {
        self.qsd_mut()?.kill()?;
        self.restarts += 1;
        let label = format!("again-{}", self.restarts);
        self.backends[Self::QSD] = Backend::Qsd(Qsd::start(&self.place, &label, &self.image, self.aio, QUEUES_MAX)?);
        Ok(())
    }

    /// Takes down that qemu-storage-daemon did not get through a round, and starts another one.
    pub(crate) fn qsd_failed(&mut self, row: &Row, why: &str, results: &mut Results) -> Result<()> {
        let name = format!("qsd failed on {}, {}", row.device.name(), row.what);
        eprintln!("  {name}: {why}");
        let rounds = results.facts.get(&name).and_then(|fact| fact["rounds"].as_u64()).unwrap_or(0);
        results.facts.insert(name, serde_json::json!({ "rounds": rounds + 1, "why": why }));
        self.restart_qsd()
    }

    /// Runs a load on everybody in turns, after one short turn each that is not counted.
    pub(crate) fn take_turns(
        &self,
        row: &Row,
        load: &Load,
        connections: &mut [Connection],
        results: &mut Results,
    ) -> Result<()> {
        let warm_up = Load { duration: self.settings.round / 4, ..load.clone() };
        for connection in connections.iter_mut() {
            load::run(connection, &warm_up, 0)?;
        }
        self.backends.iter().for_each(|backend| results.show(backend.name()));
        for round in 0..self.settings.rounds {
            for at in Rng::turns(self.backends.len(), round) {
                let backend = &self.backends[at];
                let figures = measure(backend, &mut connections[at], load, round as u64 + 1)?;
                results.add(Sample { row: row.clone(), backend: backend.name().to_owned(), round, figures });
            }
        }
        progress(row, results);
        Ok(())
    }
}

/// One round of load on one backend.
pub(crate) fn measure(
    backend: &Backend,
    connection: &mut Connection,
    load: &Load,
    seed: u64,
) -> Result<Vec<(&'static str, f64)>> {
    stop::check()?;
    let before = backend.cpu()?;
    let measured = load::run(connection, load, seed)?;
    let cpu = backend.cpu()?.saturating_sub(before);
    Ok(results::figures(&measured, load.bytes, cpu))
}

/// One line on stderr about a row that is done.
pub(crate) fn progress(row: &Row, results: &Results) {
    let mut line = format!("  {:4} {}q {:28}", row.device.name(), row.queues, row.what);
    for backend in results.backends(row) {
        if let Some(Spread { median, .. }) = results.spread(row, &backend, "per_s") {
            line.push_str(&format!("  {backend} {median:.0}/s"));
        }
    }
    eprintln!("{line}");
}

/// Looks at both ways in which qemu-storage-daemon can do its I/O, and takes the one that is faster here.
fn best_aio(settings: &Settings, place: &Place, image: &std::path::Path, results: &mut Results) -> Result<Aio> {
    let kinds = [Aio::IoUring, Aio::Native];
    let mut servers = Vec::new();
    for kind in kinds {
        let server = Qsd::start(place, &format!("first-{}", kind.name()), image, kind, 1)?;
        let connection = Connection::open(&crate::lane::Target::Socket(server.socket()), 1)?;
        servers.push((server, connection, Vec::new()));
    }
    let duration = settings.round.min(Duration::from_millis(300));
    for seed in 0..4 {
        for op in [Op::Read, Op::Write] {
            let load = Load::random(op, 32, duration);
            for (_, connection, rates) in &mut servers {
                let measured = load::run(connection, &load, seed)?;
                if seed > 0 {
                    rates.push(measured.per_second());
                }
            }
        }
    }
    // The best round of each: what disturbs a round makes it slower, never faster.
    let of_both: Vec<f64> = servers.iter().map(|(_, _, rates)| rates.iter().copied().fold(0.0, f64::max)).collect();
    let best = if of_both[0] >= of_both[1] { Aio::IoUring } else { Aio::Native };
    let device = place.device.name();
    let found =
        format!("aio={} (4 KiB at depth 32: io_uring {:.0}/s, native {:.0}/s)", best.name(), of_both[0], of_both[1]);
    eprintln!("  {device}: qemu-storage-daemon with {found}");
    results.facts.insert(format!("qsd on {device}"), found.into());
    Ok(best)
}
