//! Volumes that become independent, and independent volumes that become disks.
//!
//! What always holds:
//! - Until the record says that a volume is independent, it stands on its snapshot, and that is not deleted. From then on
//!   its oldest log, which has everything on stable storage, is its full image.
//! - That log gets a name that no start takes for an orphan's, by a hard link: at each moment the record names a file that is
//!   there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::control::api::{self, JobKind, JobPatch, JobState};
use crate::control::{ApiError, EventKind, Name, Notice};
use crate::crash;
use crate::door::{Outcome, Work};
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::entry::{RETIRE_LOOK, RetireTurn};
use crate::manager::jobs::JobEntry;
use crate::manager::recording;
use crate::manager::{Manager, record_error};
use crate::registry::Command;
use crate::store::{self, RecordError, WorkRecord};

impl Manager {
    /// Begins to make a volume independent, or goes on with it (source 004: forced migration).
    pub(crate) fn begin_completion(&self, name: &Name, pacing: JobPatch) -> Result<api::Job, ApiError> {
        let _claim = self.claim(&Command::Complete { volume: name.clone() })?;
        let disk = self.volume(name)?;
        if let Some(job) = self.work_of(&disk) {
            crate::manager::work::apply(pacing, &job.pace);
            if job.state() != JobState::Running {
                self.go_on_with_work(&disk, job.clone())?;
            }
            return Ok(job.to_api());
        }
        let record = WorkRecord {
            work: store::Work::Complete,
            stopped: false,
            delay_ms: pacing.delay_ms.unwrap_or(0),
            bytes_per_second: pacing.bytes_per_second.unwrap_or(0),
        };
        Ok(self.begin_work(&disk, record)?.to_api())
    }

    /// The job: copies, and then records that the volume is independent.
    pub(crate) fn complete(&self, disk: &Arc<DiskEntry>, job: &JobEntry) -> Result<Outcome, String> {
        // A version that goes would take with it what is put into its log.
        let turn = loop {
            match RetireTurn::take(&disk.retires) {
                Some(turn) => break turn,
                None if job.pace.is_stopped() => return Ok(Outcome::Stopped),
                None => self.host.pause(RETIRE_LOOK),
            }
        };
        let facts = disk.facts();
        let is_update = job.kind == JobKind::Update;
        let total = if is_update { job.pace.total_bytes.load(Ordering::Relaxed) } else { facts.geometry.size_bytes };
        job.begins_with(total.saturating_sub(facts.bytes_to_fill));
        let done = disk.disk.run(if is_update { Work::Update } else { Work::Complete }, &job.pace)?;
        if done == Outcome::Done {
            let Some(_claim) = self.claim_for_job(job) else {
                return Ok(Outcome::Stopped); // A restart finds nothing left to copy.
            };
            self.make_independent(disk)?;
        }
        drop(turn);
        self.tidy_moments_later();
        Ok(done)
    }

    /// One record, one chain. The volume is claimed.
    fn make_independent(&self, disk: &Arc<DiskEntry>) -> Result<(), String> {
        let facts = disk.facts();
        let Some((oldest, old)) = facts.oldest_log() else {
            return Err("it has no log that could be its full image".to_owned());
        };
        let old = old.to_owned();
        let path = match old == self.places.log_image(oldest) {
            true => {
                self.link_own_image(disk, &old).map_err(|e| format!("{} gets no other name: {e}", old.display()))?
            }
            false => old.clone(), // The user's choice.
        };
        crash::point("before a volume is recorded as independent");
        let mut relations = locked(&disk.relations).clone();
        relations.stood_on = relations.volume.take();
        (relations.work, relations.own_image) = (None, path == self.places.own_image(disk.id));
        relations.logical_block_bytes.get_or_insert(facts.geometry.logical_block_bytes);
        let mut record = recording::independent(disk.to_record(), oldest, &path);
        relations.put_into(&mut record);
        if let Err(e) = self.records.put(&[&record]) {
            // Unless they may name it, nothing does.
            if path != old && !matches!(e, RecordError::Unknown(_)) {
                self.remove_file(&path);
            }
            return Err(record_error(e).message);
        }
        crash::point("after a volume was recorded as independent");
        if !disk.disk.make_independent(&path) {
            // A start takes it as it is recorded.
            return Err("its chain has changed since; start the daemon anew".to_owned());
        }
        let from = relations.relation().map(|v| v.from.clone()).unwrap_or_default();
        *locked(&disk.relations) = relations;
        locked(&disk.path).clone_from(&path);
        if path != old {
            self.remove_file(&old);
        }
        for table in [self.places.log_table(oldest), self.places.run_table(oldest), self.places.durable_table(oldest)] {
            self.remove_file(&table);
        }
        // If what it stood on was lost, nothing of it could be read until now.
        self.open_sockets_of_snapshots(disk);
        log::info!("volume {}: independent of {from}; its image is {}", disk.name, path.display());
        self.bus.publish(Notice::of_disk(EventKind::VolumeIndependent, &disk.name.get()));
        Ok(())
    }

    pub(crate) fn link_own_image(&self, disk: &DiskEntry, log: &Path) -> std::io::Result<PathBuf> {
        let path = self.places.own_image(disk.id);
        match self.host.look(&path) {
            // From the last time: a record of which nobody knows whether it was stored may name it.
            Ok(there) if there.identity == self.host.look(log)?.identity => {}
            // That of a log which has gone since.
            Ok(_) => self.host.remove(&path).and_then(|()| self.host.link(log, &path))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => self.host.link(log, &path)?,
            Err(e) => return Err(e),
        }
        crash::point("after a full image got its second name");
        self.host.sync_directory_of(&path)?;
        Ok(path)
    }

    /// Makes an independent volume a disk. Its guests notice nothing.
    pub(crate) fn promote(&self, name: &Name) -> Result<api::Disk, ApiError> {
        let _claim = self.claim(&Command::Promote { volume: name.clone() })?;
        let disk = self.volume(name)?;
        let stood_on = locked(&disk.relations).stood_on.clone();
        self.change(&disk, || locked(&disk.relations).stood_on = None)?;
        crash::point("after a volume was promoted");
        if let Some(volume) = &stood_on {
            disk.disk.forget_mark(volume.origin);
            // It may have forgotten its own table with that. The records first: while they name it, it must be there.
            match self.persist(std::slice::from_ref(&disk)) {
                Ok(()) => self.remove_changes_of_gone(&disk, volume.origin),
                Err(e) => log::warn!("disk {name}: its dirty bitmap stays: {e}"),
            }
        }
        log::info!("volume {name}: a disk from now on, on {}", locked(&disk.path).display());
        self.bus.publish(Notice::of_disk(EventKind::VolumePromoted, name));
        self.tidy_moments_later();
        Ok(disk.to_api(self))
    }
}
