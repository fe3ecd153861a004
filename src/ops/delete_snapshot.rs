//! Letting snapshots go: by jobs that hand over or fold, one at a time for each disk.
//!
//! What always holds: the records forget a layer before its files are removed, and remember where everything is before
//! that; a job that is stopped, killed or fails has moved whole blocks only and is begun again from where it is.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use uuid::Uuid;

use crate::control::api::{DeleteSnapshotOptions, JobKind, JobState, SnapshotState};
use crate::control::{ApiError, Deletion, ErrorCode, EventKind, Notice, SnapshotRef};
use crate::crash;
use crate::door::{Epoch, LayerKind, Outcome, RetireError, Retired, Work};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, RETIRE_LOOK, RetireTurn, SnapshotEntry, locked};
use crate::manager::jobs::JobEntry;
use crate::registry::Command;
use crate::store::{DeletionRecord, Strategy};

/// How long a deletion waits for a snapshot to be quiesced, and for its own job, before it answers.
const DELETION_WAIT: Duration = Duration::from_secs(60);
/// How long a deletion that has come to its end waits before it asks the records again to forget the snapshot.
const RECORD_PAUSE: Duration = Duration::from_millis(500);

impl Manager {
    /// Goes on with a snapshot after a restart.
    pub(crate) fn resume_snapshot(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) {
        let is_served = !entry.is_lost && entry.unreadable(&disk.facts()).is_none();
        let deletion = locked(&entry.record).deletion;
        if !is_served || deletion.is_some() {
            crate::manager::sockets::clear_socket(&*self.host, &locked(&entry.record));
        }
        if entry.is_lost {
            return;
        }
        if let Some(deletion) = deletion {
            let job = self.new_deletion(disk, entry);
            if deletion.stopped {
                self.leave_stopped(&job);
            } else {
                self.run_deletion(disk, entry, job);
            }
        } else if is_served {
            self.resume_socket(disk, entry);
        }
    }

    pub(crate) fn delete(&self, reference: &SnapshotRef, options: DeleteSnapshotOptions) -> Result<Deletion, ApiError> {
        self.delete_if(reference, |_| true, options)
    }

    /// Deletes this very snapshot, whatever its disk is called by now. None when it is gone.
    pub(crate) fn delete_by_id(&self, id: Uuid, options: DeleteSnapshotOptions) -> Result<Option<Deletion>, ApiError> {
        let mut last = None;
        loop {
            let there = self.all_disks().iter().flat_map(|disk| disk.snapshots()).find(|s| s.id == id);
            let Some(reference) = there.map(|entry| entry.reference()) else { return Ok(None) };
            match self.delete_if(&reference, |entry| entry.id == id, options) {
                // It got another name on the way.
                Err(e) if e.code == ErrorCode::SnapshotNotFound && last.as_ref() != Some(&reference) => {
                    last = Some(reference);
                }
                done => return done.map(Some),
            }
        }
    }

    /// Deletes what has this name, if it is the one that is meant.
    fn delete_if(
        &self,
        reference: &SnapshotRef,
        is_it: impl Fn(&SnapshotEntry) -> bool,
        options: DeleteSnapshotOptions,
    ) -> Result<Deletion, ApiError> {
        let DeleteSnapshotOptions { force, keep_image, keep_bookmark, wait_timeout_ms } = options;
        let deadline =
            self.host.now() + wait_timeout_ms.map_or(DELETION_WAIT, |ms| DELETION_WAIT.min(Duration::from_millis(ms)));
        let mut waits_for: Option<Arc<SnapshotEntry>> = None;
        let mut announced = None;
        let job = loop {
            let command = Command::DeleteSnapshot { snapshot: reference.clone(), force, keep_bookmark };
            let (claim, _) = self.claim(&command)?;
            let disk = self.disk(&reference.disk)?;
            let entry = disk.snapshot(&reference.name).ok_or_else(|| disk.no_snapshot(reference))?;
            if !is_it(&entry) {
                return Err(ApiError::snapshot_not_found(reference));
            }
            // Its disk may have got another name meanwhile, and this be that of another one.
            if !Arc::ptr_eq(waits_for.get_or_insert_with(|| entry.clone()), &entry) {
                return Err(ApiError::snapshot_not_found(reference));
            }
            if entry.is_lost {
                // Its image is ours to remove only if it was made for it.
                let record = locked(&entry.record).clone();
                if record.owns_all {
                    // Nobody knows in what its leg differs from the other: it does not come back.
                    self.lose_leg(&disk, &record.image)?;
                }
                let left = (!record.owns_all).then_some((entry.id, record.image));
                self.gone(&disk, &entry, left)?;
                return Ok(Deletion::Done);
            }
            let facts = disk.facts();
            let drained = facts.version(entry.id).is_some_and(|version| version.is_quiesced);
            match (entry.state(&facts), self.deletion_of(&disk, &entry)) {
                // One whose job has failed or was stopped is tried again.
                (SnapshotState::Deleting | SnapshotState::Folding, _)
                    if keep_image
                        && entry.change_deletion(|deletion| !std::mem::replace(&mut deletion.keep_image, true)) =>
                {
                    let kept = self.persist(std::slice::from_ref(&disk)).and_then(|()| self.lose_leg_of(&disk, &entry));
                    kept.inspect_err(|_| entry.change_deletion(|deletion| deletion.keep_image = false))?;
                    // Then once more, as it was meant.
                }
                (SnapshotState::Deleting | SnapshotState::Folding, Some(job)) => match job.state() {
                    JobState::Running => break job,
                    _ => break self.resume_deletion(&disk, &entry, job)?,
                },
                // Its requests are still on their way; they must arrive first.
                _ if !drained => {
                    if entry.old_frontends(&facts) > 0 {
                        self.move_frontends(&entry)?;
                    } else if self.host.now() >= deadline {
                        let message = format!("snapshot {reference} is still draining");
                        return Err(ApiError::new(ErrorCode::SnapshotBusy, message).with_action(format!(
                            "wait until {reference} is quiesced: halfsilver snapshot show {reference}"
                        )));
                    }
                }
                // Also one that nobody was to have.
                _ => {
                    break self.begin_deletion(
                        &disk,
                        &entry,
                        &command,
                        DeletionRecord { keep_image, keep_bookmark, stopped: false },
                    )?;
                }
            }
            announced.get_or_insert_with(|| {
                let what = format!("snapshot {reference} to be quiesced: {}", self.requests_of(&disk));
                self.announce(&format!("snapshot delete {reference}"), reference.disk.as_str(), what)
            });
            drop(claim);
            self.host.pause(Duration::from_millis(10));
        };
        drop(announced);
        if !job.wait(deadline.saturating_duration_since(self.host.now())) {
            let left = job.snapshot.as_ref().filter(|entry| self.is_there(&job.disk, entry));
            if let Some(entry) = left {
                return Ok(Deletion::Started(entry.to_api(&job.disk.facts())));
            }
        }
        let ended = job.to_api();
        match ended.state {
            JobState::Failed | JobState::Stopped => {
                let why = ended.reason.unwrap_or_else(|| "its job was stopped".to_owned());
                let disk = &job.disk;
                // What this one waits behind goes first; then it is asked for again.
                let other = job.snapshot.as_ref().and_then(|entry| self.deletion_in_the_way(disk, entry.id));
                let action = match other {
                    Some((id, _)) => format!("halfsilver job resume {id}; then halfsilver job wait {id}"),
                    None => format!("go on with it: halfsilver job resume {}", job.id),
                };
                Err(ApiError::new(ErrorCode::Io, format!("snapshot {reference} is not deleted yet: {why}"))
                    .with_action(action))
            }
            JobState::Done | JobState::Running => Ok(Deletion::Done),
        }
    }

    /// The newest job that deletes this snapshot.
    fn deletion_of(&self, disk: &DiskEntry, entry: &Arc<SnapshotEntry>) -> Option<Arc<JobEntry>> {
        self.job_on(disk, |job| job.snapshot.as_ref().is_some_and(|s| Arc::ptr_eq(s, entry)))
    }

    fn begin_deletion(
        &self,
        disk: &Arc<DiskEntry>,
        entry: &Arc<SnapshotEntry>,
        command: &Command,
        deletion: DeletionRecord,
    ) -> Result<Arc<JobEntry>, ApiError> {
        if deletion.keep_image {
            refuse_if_read_through(disk, entry)?;
        }
        let server = locked(&entry.server).clone();
        let job = self.stop_servers(disk, server.as_slice(), command, || {
            let was = locked(&entry.record).deletion.replace(deletion);
            let begun = self.persist(std::slice::from_ref(disk));
            let loses_leg = || if deletion.keep_image { self.lose_leg_of(disk, entry) } else { Ok(()) };
            if let Err(e) = begun.and_then(|()| loses_leg()) {
                locked(&entry.record).deletion = was;
                self.persist_later(disk);
                return Err(e);
            }
            Ok(self.start_deletion(disk, entry))
        })?;
        *locked(&entry.server) = None;
        Ok(job)
    }

    fn start_deletion(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) -> Arc<JobEntry> {
        let job = self.new_deletion(disk, entry);
        self.run_deletion(disk, entry, job.clone());
        job
    }

    fn new_deletion(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) -> Arc<JobEntry> {
        let kind = if disk.facts().folds(entry.id) { JobKind::Fold } else { JobKind::Merge };
        self.new_job(kind, disk, Some(entry))
    }

    /// Goes on with a deletion that was stopped or failed.
    pub(crate) fn resume_deletion(
        &self,
        disk: &Arc<DiskEntry>,
        entry: &Arc<SnapshotEntry>,
        job: Arc<JobEntry>,
    ) -> Result<Arc<JobEntry>, ApiError> {
        let was_stopped = entry.change_deletion(|deletion| std::mem::take(&mut deletion.stopped));
        self.persist(std::slice::from_ref(disk))
            .inspect_err(|_| entry.change_deletion(|deletion| deletion.stopped = was_stopped))?;
        job.begin_again();
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name.get()).with_job(job.id));
        self.run_deletion(disk, entry, job.clone());
        Ok(job)
    }

    fn run_deletion(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>, job: Arc<JobEntry>) {
        let (on, going, stopped, ours) = (disk.clone(), entry.clone(), entry.clone(), job.clone());
        let run = move |manager: &Manager| manager.retire(&on, &going, &ours);
        let mark_stopped = move || stopped.change_deletion(|deletion| deletion.stopped = true);
        if job.kind == JobKind::Fold {
            self.bus.publish(Notice::of_snapshot(EventKind::SnapshotFolding, &entry.reference()));
        }
        self.run_job("delete", &job, run, mark_stopped, |_, _| ());
    }

    /// Waits for its turn: two deletions would each go by a neighbour that the other takes away.
    fn begin_retire<'a>(
        &self,
        disk: &'a DiskEntry,
        entry: &SnapshotEntry,
        job: &JobEntry,
    ) -> Result<Option<(Epoch, RetireTurn<'a>)>, String> {
        let leaves_bookmark = locked(&entry.record).leaves_bookmark();
        let _waits = Noted(&job.waits_for);
        let mut waits_for = None;
        loop {
            let turn = RetireTurn::take(&disk.retires);
            let mut by_another = true;
            match turn.as_ref().map(|_| disk.disk.begin_retire(entry.id, leaves_bookmark)) {
                Some(Ok(grace)) => return Ok(turn.map(|turn| (grace, turn))),
                None => {}
                Some(Err(RetireError::TooManyDraining(_))) => by_another = false,
                Some(Err(RetireError::Busy)) => {
                    if let Some((other, what)) = self.deletion_in_the_way(disk, entry.id) {
                        return Err(format!("the deletion of another snapshot, job {other}, {what}"));
                    }
                }
            }
            if job.pace.is_stopped() {
                return Ok(None);
            }
            drop(turn);
            if waits_for.replace(by_another) != Some(by_another) {
                *locked(&job.waits_for) = Some(match by_another {
                    true => format!("the deletion of another snapshot of {}", disk.name),
                    false => self.requests_of(disk),
                });
            }
            self.host.pause(RETIRE_LOOK);
        }
    }

    /// The job that deletes another version of the disk, if it does not go on by itself, and why.
    fn deletion_in_the_way(&self, disk: &DiskEntry, id: Uuid) -> Option<(u64, &'static str)> {
        let facts = disk.facts();
        let goes = facts.versions.iter().find(|version| version.is_retiring && version.id != id)?;
        let other = disk.snapshots().into_iter().find(|s| s.id == goes.id)?;
        let job = self.deletion_of(disk, &other)?;
        match job.state() {
            JobState::Stopped => Some((job.id, "was stopped")),
            JobState::Failed => Some((job.id, "has failed")),
            JobState::Running | JobState::Done => None,
        }
    }

    /// The job of a deletion, on a thread and ring of its own.
    fn retire(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>, job: &JobEntry) -> Result<Outcome, String> {
        // Nobody knows what the leg of one that is broken has: it does not come back.
        if entry.broken(&disk.facts()).is_some() {
            let Some(_claim) = self.claim_to_record(job) else { return Ok(Outcome::Stopped) };
            self.lose_leg_of(disk, entry).map_err(|e| e.message)?;
        }
        let Some((grace, turn)) = self.begin_retire(disk, entry, job)? else { return Ok(Outcome::Stopped) };
        // What is not needed any more when it has gone.
        let facts = disk.facts();
        let (left, leg) = (facts.left_behind(entry.id), facts.leg_of(entry.id).map(Path::to_owned));
        let Retired::Gone(broken) = disk.disk.retire(entry.id, grace, &job.pace)? else {
            return Ok(Outcome::Stopped);
        };
        // Only here is still known why it broke.
        if let Some(reason) = broken {
            locked(&entry.record).broken.get_or_insert(reason);
        }
        // Until the records have forgotten it no other deletion may begin (`DiskEntry::retires`): whatever keeps them from it is
        // waited for.
        loop {
            let forgotten = self.claim_to_record(job).map(|_claim| self.forget_retired(disk, entry, (&left, &leg)));
            match forgotten {
                Some(Ok(())) => break,
                _ if self.is_stopping() => {
                    std::mem::forget(turn); // Nothing else begins.
                    return Ok(Outcome::Stopped);
                }
                Some(Err(e)) => log::warn!("snapshot {}: the records do not forget it yet: {e}", entry.reference()),
                None => {}
            }
            self.host.pause(RECORD_PAUSE);
        }
        drop(turn);
        if disk.facts().discarded_blocks > 0
            && let Err(e) = disk.disk.run(Work::Discards, &job.pace)
        {
            // The snapshot is gone all the same; the storage comes back with a later discard.
            log::warn!("disk {}: discards that were put off cannot be carried out: {e}", disk.name);
        }
        Ok(Outcome::Done)
    }

    /// Has the records forget a snapshot that has left the chain, and what is said there of its leg.
    fn forget_retired(
        &self,
        disk: &Arc<DiskEntry>,
        entry: &Arc<SnapshotEntry>,
        (left, leg): (&Option<(Uuid, PathBuf)>, &Option<PathBuf>),
    ) -> Result<(), ApiError> {
        let (is_split, keep) = {
            let record = locked(&entry.record);
            (record.strategy == Strategy::WriteMirroring, record.leaves_image())
        };
        let back = leg.as_ref().filter(|_| is_split && !keep && entry.broken(&disk.facts()).is_none());
        // A leg that goes must not be taken for one that comes back, and one that is written again not for a snapshot:
        // whenever the daemon is killed.
        if is_split && back.is_none() {
            self.lose_leg_of(disk, entry)?;
        }
        self.gone(disk, entry, left.clone())?;
        if let Err(e) = self.rejoin(disk, back.map(|leg| &**leg)) {
            log::error!("snapshot {}: its leg does not come back: {e}", entry.reference());
        }
        Ok(())
    }

    /// Forgets a snapshot that nobody reads any more, and removes the layer that it leaves behind.
    fn gone(
        &self,
        disk: &Arc<DiskEntry>,
        entry: &Arc<SnapshotEntry>,
        left: Option<(Uuid, PathBuf)>,
    ) -> Result<(), ApiError> {
        if entry.is_lost {
            disk.disk.forget_mark(entry.id);
            // Others are left out of the records as soon as they have left the chain.
            entry.is_forgotten.store(true, Ordering::SeqCst);
        }
        // The records first: while they name a layer, it must be there. Orphans are removed at the next start.
        crash::point("before a snapshot is forgotten");
        if let Err(e) = self.persist(std::slice::from_ref(disk)) {
            entry.is_forgotten.store(false, Ordering::SeqCst);
            return Err(e);
        }
        crash::point("after a snapshot was forgotten");
        if let Some((id, image)) = left {
            if disk.facts().version(id).is_some_and(|version| version.layer != LayerKind::Full) {
                // Its log has gone, it was frozen meanwhile, and the run table is that of what is saved for it now.
                self.remove_file(&image);
                self.remove_file(&self.places.log_table(id));
            } else {
                self.remove_layer(id, &image);
            }
        }
        let stays = DiskEntry::bookmark_of(entry, &disk.facts());
        if let Some(bookmark) = stays {
            locked(&disk.bookmarks).push(bookmark);
            self.bus.publish(Notice::of_snapshot(EventKind::BookmarkCreated, &entry.reference()));
        } else {
            self.remove_changes_of_gone(disk, entry.id);
        }
        locked(&disk.snapshots).retain(|s| !Arc::ptr_eq(s, entry));
        log::info!("snapshot {}: deleted", entry.reference());
        self.bus.publish(Notice::of_snapshot(EventKind::SnapshotDeleted, &entry.reference()));
        Ok(())
    }
}

/// An older snapshot that reads through it takes its image over: then that does not stay as it is.
fn refuse_if_read_through(disk: &DiskEntry, entry: &SnapshotEntry) -> Result<(), ApiError> {
    let facts = disk.facts();
    let Some(older) = facts.heir_of_pivot(entry.id) else { return Ok(()) };
    let older =
        disk.snapshots().into_iter().find(|s| s.id == older.id).map_or_else(String::new, |s| s.reference().to_string());
    let message =
        format!("the image of snapshot {} cannot be kept: snapshot {older} reads through it", entry.reference());
    Err(ApiError::new(ErrorCode::SnapshotBusy, message).with_action(format!("delete {older} first")))
}

/// That a job waits for something, until this is dropped.
struct Noted<'a>(&'a Mutex<Option<String>>);

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        *locked(self.0) = None;
    }
}
