//! What a start makes of the disks that are remembered, with the configurations that they would be served with.
//!
//! The decisions are those of the room `recovery`; here the evidence for them is put together, by a start and by `check`.

use std::time::Duration;

use uuid::Uuid;

use crate::control::api::DiskConfig;
use crate::control::{ApiError, ErrorCode, Name};
use crate::host::Host;
use crate::image::ImageError;
use crate::image::ImageOp;
use crate::manager::Manager;
use crate::manager::layers::{OLD_TRANSFERS_WAIT, direct_of};
use crate::recovery::{Files, ImageSetup, Recovery, ServedVersion, Shutdown, Why, decide, decide_flushed, settle};
use crate::store::{DiskRecord, TableFiles};

/// What a start makes of a disk. With `take_flushed` the user has said that its guests were stopped ([`decide_flushed`]).
pub(crate) fn recovery_of(
    record: &DiskRecord,
    config: &DiskConfig,
    (host, tables, boot): (&dyn Host, &TableFiles, Uuid),
    lock_wait: Duration,
    take_flushed: bool,
) -> Recovery {
    let (path, block_bytes) = (config.path.clone(), config.block_size);
    let setup = ImageSetup { path, block_bytes, direct: direct_of(config), read_only: config.readonly() };
    let evidence = Files { host, tables, boot, setup, lock_wait };
    let shutdown = Shutdown::of(record, &evidence, boot);
    if take_flushed { decide_flushed(record, shutdown, &evidence) } else { decide(record, shutdown, &evidence) }
}

/// How long a start waits for somebody who holds a disk's images.
fn lock_wait(record: Option<&DiskRecord>) -> Duration {
    // After a kill the old process's last transfers may still run; nothing is read or written before they are done.
    if record.is_some_and(|r| r.saved.is_none()) { OLD_TRANSFERS_WAIT } else { Duration::ZERO }
}

/// How long one waits that carries a decision out. Of what was looked at just now the kernel may hold a file, and with it our
/// own lock, for a moment longer than we do.
pub(crate) fn lock_wait_after_decision(record: Option<&DiskRecord>) -> Duration {
    let looked_at = if record.is_some() { Duration::from_secs(2) } else { Duration::ZERO };
    lock_wait(record).max(looked_at)
}

/// A disk that is to be served.
#[derive(Clone)]
pub(crate) struct Planned {
    pub(crate) name: Name,
    pub(crate) config: DiskConfig,
    /// What is remembered of it.
    pub(crate) record: Option<DiskRecord>,
}

impl Manager {
    /// What a start makes of some disks, in their order; None of those of which nothing is remembered.
    pub(crate) fn decide(&self, planned: &[Planned], take_flushed: &[Name]) -> Result<Vec<Option<Recovery>>, ApiError> {
        let of = |p: &Planned| self.decide_alone(p, take_flushed.contains(&p.name)).transpose();
        let decided = planned.iter().map(of).map(Option::transpose).collect::<Result<Vec<Option<Recovery>>, _>>()?;
        let is_known: Vec<bool> = decided.iter().map(Option::is_some).collect();
        let mut recoveries: Vec<Recovery> = decided.into_iter().flatten().collect();
        settle(&mut recoveries, &self.served_versions());
        let mut recoveries = recoveries.into_iter();
        Ok(is_known.into_iter().map(|is_known| if is_known { recoveries.next() } else { None }).collect())
    }

    /// What a start makes of a disk by itself, whatever becomes of others; None if nothing is remembered of it.
    pub(crate) fn decide_alone(&self, planned: &Planned, takes_flushed: bool) -> Result<Option<Recovery>, ApiError> {
        let Planned { config, record, .. } = planned;
        let Some(record) = record else { return Ok(None) };
        let boot = self.host.boot().map_err(crate::manager::table_error)?;
        let wait = lock_wait(Some(record));
        Ok(Some(recovery_of(record, config, (&*self.host, self.places.tables(), boot), wait, takes_flushed)))
    }

    fn served_versions(&self) -> Vec<ServedVersion> {
        let of_disk = |disk: &std::sync::Arc<crate::manager::entry::DiskEntry>| {
            let facts = disk.facts();
            let version = |entry: std::sync::Arc<crate::manager::entry::SnapshotEntry>| {
                let is_going = facts.version(entry.id).map_or(!entry.is_lost, |version| version.is_retiring);
                let why = entry.unreadable(&facts).map(Why::Said);
                let size_bytes = facts.version(entry.id).map_or(0, |version| version.size_bytes);
                ServedVersion { id: entry.id, size_bytes, broken: why.or(is_going.then_some(Why::Deleting)) }
            };
            disk.snapshots().into_iter().map(version).collect::<Vec<_>>()
        };
        self.all_disks().iter().flat_map(of_disk).collect()
    }
}

/// That a disk which is remembered is not served.
pub(crate) fn unserved(name: &str, why: &Why) -> ApiError {
    let put_back = "put back what is missing, and it is served again by itself; nothing has been changed";
    match why {
        Why::Image { kind, errno, text } => {
            let error = ImageError {
                kind: *kind,
                op: ImageOp::Open,
                path: "".into(),
                at: None,
                message: String::new(),
                errno: *errno,
            };
            ApiError { message: text.clone(), ..crate::manager::image_error(error) }
        }
        why if why.is_stranger() => {
            let to_do = advice_on_stranger(name);
            ApiError::new(ErrorCode::DiskFailed, format!("{why}; nothing of it is changed; {to_do}")).with_action(to_do)
        }
        Why::Unit { unit_bytes, .. } => ApiError::new(ErrorCode::InvalidConfig, why.to_string())
            .with_action(format!("give it block-size={unit_bytes}, or direct=off")),
        Why::Mirror(_) | Why::LegSize(_) | Why::NoLeg => ApiError::new(ErrorCode::MirrorNotInSync, why.to_string()),
        _ => ApiError::new(ErrorCode::DiskFailed, why.to_string()).with_action(put_back),
    }
}

/// What to do about a disk that has other images than it had.
pub(crate) fn advice_on_stranger(name: &str) -> String {
    format!(
        "put the right one back, and it is served again by itself; or say that this one is a copy of it: halfsilver disk \
         accept {name}; or give up what is remembered of it: halfsilver disk forget {name}"
    )
}
