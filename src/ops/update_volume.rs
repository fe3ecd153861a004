//! Volumes that are brought to their source's present (source 004: image update, figure 10): put on a new snapshot of the
//! source by one record, on the same image. What is copied afterwards is copied as when a volume is completed.
//!
//! What always holds:
//! - A volume shows the old content or the new one, whole: which of them is in one record, and what that names is durable
//!   before. No request is under way meanwhile.
//! - A snapshot that was taken for an update says so in its own record. It goes when its volume stands on it no more; a
//!   bookmark stays, from which the next update counts, while nothing newer takes its place. Others are never touched.
//! - What is not known to be alike is copied.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use crate::control::api::{self, DeleteSnapshotOptions, JobKind, JobPatch, JobState, SnapshotRequest, Writers};
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, SnapshotRef};
use crate::crash;
use crate::door::{BaseSpec, NextLog, VOLUMES_DEEP_MAX};
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::manager::followups::FollowUp;
use crate::manager::jobs::JobEntry;
use crate::manager::recording;
use crate::manager::relations::in_volume;
use crate::manager::sockets::serve_live;
use crate::manager::{Manager, engine_error, record_error, table_error};
use crate::recovery::Need;
use crate::registry::{ClaimKey, Command, Registry, Wanted};
use crate::store::{RecordError, Table, VolumeRecord, Work, WorkRecord};

/// What a volume is about to become.
struct Next {
    base: BaseSpec,
    volume: VolumeRecord,
    live: Uuid,
    path: PathBuf,
    log: NextLog,
    changed: Arc<Table>,
    /// Why nothing is kept, if so.
    copies_all: Option<String>,
}

impl Manager {
    /// Brings a volume to its source's present. It shows that when this returns.
    pub(crate) fn update(&self, name: &Name, force: bool, pacing: JobPatch) -> Result<api::Job, ApiError> {
        let updated = self.update_with_snapshot(name, force, pacing);
        // What it stood on before; or what was taken for nothing.
        self.tidy_moments_later();
        Ok(updated?.to_api())
    }

    fn update_with_snapshot(&self, name: &Name, force: bool, pacing: JobPatch) -> Result<Arc<JobEntry>, ApiError> {
        let command = Command::Update { volume: name.clone(), force };
        // Until it is over, what is taken for it stays.
        let _claim = self.claim(&command)?;
        let disk = self.volume_to_update(name)?;
        let source = self.source_of(&disk)?;
        let reference = SnapshotRef { name: name_for(name, &source)?, disk: source.name.get() };
        let request = SnapshotRequest {
            name: reference.name.clone(),
            disks: vec![reference.disk.clone()],
            strategy: None,
            layout: None,
            writers: Writers::Request,
            socket: None,
            image: None,
        };
        let in_update = |e: ApiError| ApiError { message: in_volume(name, &e.message), ..e };
        self.create_for(&request, Some(disk.id)).map_err(in_update)?;
        let _waits = self.waiting_for(&disk, format!("snapshot {reference} to be quiesced"));
        let needs = |_: &Registry| {
            let keys = [ClaimKey::Entity(source.id)].into_iter().collect();
            Ok(Wanted { changes: Default::default(), needs: keys })
        };
        self.when_quiesced(&format!("volume update {name}"), &reference, needs, |source, entry| {
            self.update_now(&disk, source, entry, (&command, pacing))
        })
    }

    /// A volume that can be updated now, as far as its images go.
    fn volume_to_update(&self, name: &Name) -> Result<Arc<DiskEntry>, ApiError> {
        let disk = self.volume(name)?;
        let facts = disk.facts();
        let Some(image) = facts.only_image() else {
            let message = in_volume(name, "its content is in more than one image");
            let action = format!("see 'halfsilver volume show {name}'");
            return Err(ApiError::new(ErrorCode::VolumeBusy, message).with_action(action));
        };
        if facts.live().is_poisoned {
            let message = in_volume(name, &format!("a sync of {} failed", image.display()));
            return Err(ApiError::new(ErrorCode::DiskFailed, message)
                .with_action("check the storage, then start the daemon anew"));
        }
        Ok(disk)
    }

    /// The disk or volume that it was made off.
    fn source_of(&self, volume: &DiskEntry) -> Result<Arc<DiskEntry>, ApiError> {
        let name = &volume.name.get();
        let Some(of) = locked(&volume.relations).relation().cloned() else {
            return Err(self.no_volume(name));
        };
        let served = self.all_disks().into_iter().find(|d| d.id == of.source);
        let disk = match &served {
            Some(source) => source.name.get(),
            None => self.name_now(of.snapshot, &of.from).parse::<SnapshotRef>()?.disk,
        };
        let source = served.map_or_else(|| self.disk(&disk), Ok).map_err(|e| {
            ApiError { message: in_volume(name, &format!("its source {disk} is not there: {}", e.message)), ..e }
                .with_action(format!("serve {disk} again, or make another volume"))
        })?;
        let other = |what: &str| {
            let what = format!("{disk} {what}, so there is no present that it could be brought to");
            Err(ApiError::new(ErrorCode::Conflict, in_volume(name, &what)).with_action("make another volume"))
        };
        if of.source != source.id {
            return other("is another disk than the one that it was made off");
        }
        if source.facts().geometry.size_bytes != volume.facts().geometry.size_bytes {
            return other("has another size now");
        }
        Ok(source)
    }

    /// The update itself. The volume is claimed, and stays so until it is served again.
    fn update_now(
        &self,
        disk: &Arc<DiskEntry>,
        source: &Arc<DiskEntry>,
        entry: &SnapshotEntry,
        (command, pacing): (&Command, JobPatch),
    ) -> Result<Arc<JobEntry>, ApiError> {
        // From here on nobody writes it, and nobody connects. A frontend may have come meanwhile.
        let server = locked(&disk.server).clone();
        self.stop_servers(disk, server.as_slice(), command, || Ok(()))?;
        *locked(&disk.server) = None;
        let was_served = server.is_some();
        drop(server);
        let moved = self.put_on(disk, source, entry, pacing);
        if was_served && !locked(&disk.relations).disabled {
            self.serve_again(disk)?;
        }
        let job = moved?;
        crash::point("after a volume was updated");
        Ok(job)
    }

    fn serve_again(&self, disk: &Arc<DiskEntry>) -> Result<(), ApiError> {
        let e = match serve_live(&*self.host, &disk.name.get(), &disk.config(), &disk.disk, &disk.frontends) {
            Ok(server) => {
                *locked(&disk.server) = Some(server);
                return Ok(());
            }
            Err(e) => e,
        };
        locked(&disk.relations).disabled = true;
        self.persist(std::slice::from_ref(disk))?;
        let socket = disk.socket();
        let message =
            in_volume(&disk.name.get(), &format!("it is disabled now: cannot serve {}: {e}", socket.display()));
        Err(ApiError::new(ErrorCode::Conflict, message)
            .with_action(format!("make room for its socket, then: halfsilver volume enable {}", disk.name)))
    }

    /// One record, one chain. Nobody is connected.
    fn put_on(
        &self,
        disk: &Arc<DiskEntry>,
        source: &Arc<DiskEntry>,
        entry: &SnapshotEntry,
        pacing: JobPatch,
    ) -> Result<Arc<JobEntry>, ApiError> {
        let live = self.host.new_id();
        // Its files have a name from here on that a start knows: half of them must not be taken for somebody's content.
        locked(&disk.relations).next_live = Some(live);
        self.persist(std::slice::from_ref(disk))?;
        let made = self.make_next(disk, source, entry, live).and_then(|next| self.put_in_place(disk, next, pacing));
        made.map_err(|e| ApiError { message: in_volume(&disk.name.get(), &e.message), ..e })
    }

    /// Everything that the record is about to name is there, and durable, when this returns.
    fn make_next(
        &self,
        disk: &Arc<DiskEntry>,
        source: &Arc<DiskEntry>,
        entry: &SnapshotEntry,
        live: Uuid,
    ) -> Result<Next, ApiError> {
        let unsupported = |what: String| Err(ApiError::new(ErrorCode::Unsupported, what));
        let from = entry.reference().to_string();
        let (facts, base) = (disk.facts(), source.disk.base(entry.id, &from));
        if source.facts().depth >= VOLUMES_DEEP_MAX {
            return unsupported(format!("{VOLUMES_DEEP_MAX} volumes would stand on each other below it"));
        }
        let (unit, block) = (base.logical_block_bytes, facts.geometry.block_bytes);
        if unit > block {
            return unsupported(format!(
                "the logical blocks of {} have {unit} bytes, more than its {block}",
                source.name
            ));
        }
        let Some(old) = facts.only_image().map(Path::to_owned) else {
            return Err(ApiError::new(ErrorCode::Internal, "its content is in more than one image"));
        };
        let Some(was) = locked(&disk.relations).relation().cloned() else {
            return Err(self.no_volume(&disk.name.get()));
        };
        let undo = |e: ApiError| {
            self.remove_next(live);
            e
        };
        let geometry = &facts.geometry;
        let table = self.make_durable_table(&self.places.log_table(live), live, geometry).map_err(table_error);
        let prepared = table.and_then(|table| {
            let update = disk.disk.prepare_update(was.origin, source.id, (was.snapshot, entry.id), table);
            update.map_err(engine_error)
        });
        let (log, copies_all) = prepared.map_err(undo)?;
        let changed = self.make_changed_table(live, geometry).map_err(table_error).map_err(undo)?;
        let path = match old == self.places.log_image(facts.live().id) {
            true => self.link_own_image(disk, &old).map_err(|e| {
                undo(ApiError::new(ErrorCode::Io, format!("{} gets no other name: {e}", old.display())))
            })?,
            false => old, // Its name already, or the user's choice.
        };
        let volume = VolumeRecord {
            snapshot: entry.id,
            from,
            source: source.id,
            origin: self.host.new_id(),
            size_bytes: was.size_bytes,
            created_ms: was.created_ms,
        };
        Ok(Next { base, volume, live, path, log, changed, copies_all })
    }

    /// The files of a live version that never came to be.
    fn remove_next(&self, live: Uuid) {
        for table in [self.places.log_table(live), self.places.run_table(live)] {
            self.remove_file(&table);
        }
        self.remove_changed_table(live);
    }

    fn put_in_place(&self, disk: &Arc<DiskEntry>, next: Next, pacing: JobPatch) -> Result<Arc<JobEntry>, ApiError> {
        let Next { base, volume, live, path, log, changed, copies_all } = next;
        let facts = disk.facts();
        let (old_live, old_path) = (facts.live().id, facts.live().image.clone());
        let (origin, from) = (volume.origin, volume.from.clone());
        let old = locked(&disk.relations).clone();
        let mut relations = old.clone();
        relations.work = (old.volume.is_none() || old.work.is_some()).then(|| WorkRecord {
            work: Work::Update,
            stopped: false,
            delay_ms: pacing.delay_ms.or(old.work.as_ref().map(|w| w.delay_ms)).unwrap_or(0),
            bytes_per_second: pacing.bytes_per_second.or(old.work.as_ref().map(|w| w.bytes_per_second)).unwrap_or(0),
        });
        (relations.volume, relations.stood_on, relations.next_live) = (Some(volume), None, None);
        relations.own_image = path == self.places.own_image(disk.id);
        relations.logical_block_bytes.get_or_insert(facts.geometry.logical_block_bytes);
        let mut record = recording::updated(disk.to_record(), live, &path, &from);
        relations.put_into(&mut record);
        crash::point("before a volume is recorded as updated");
        if let Err(e) = self.records.put(&[&record]) {
            return Err(self.after_refused_record(disk, live, (path != old_path).then_some(&path), e));
        }
        crash::point("after a volume was recorded as updated");
        disk.disk.move_base(&base, (origin, live), (log, changed), &path);
        let work = relations.work.clone();
        *locked(&disk.relations) = relations;
        *locked(&disk.path) = PathBuf::from(&from);
        disk.failure_told.store(false, Ordering::SeqCst);
        if path != old_path {
            self.remove_file(&old_path);
        }
        let tables = [self.places.log_table(old_live), self.places.run_table(old_live)];
        tables.iter().chain([&self.places.durable_table(old_live)]).for_each(|table| self.remove_file(table));
        self.remove_changed_table(old_live);
        let notice = Notice::of_disk(EventKind::VolumeUpdated, &disk.name.get());
        match copies_all {
            None => log::info!("volume {}: updated to {from}", disk.name),
            Some(ref why) => log::warn!("volume {}: updated to {from}, and keeps nothing: {why}", disk.name),
        }
        self.bus.publish(match copies_all {
            None => notice,
            Some(why) => notice.because(format!("it keeps nothing of what it had: {why}")),
        });
        Ok(self.job_after_update(disk, work))
    }

    /// While nobody knows whether the record was stored the volume is not served: each of the two goes with the bytes as they
    /// are now.
    fn after_refused_record(
        &self,
        disk: &Arc<DiskEntry>,
        live: Uuid,
        second_name: Option<&PathBuf>,
        e: RecordError,
    ) -> ApiError {
        let is_unknown = matches!(e, RecordError::Unknown(_));
        let e = record_error(e);
        if is_unknown {
            log::error!("volume {}: it is disabled until its record can be stored", disk.name);
            locked(&disk.relations).disabled = true;
            return e.with_action(format!("make room, then: halfsilver volume enable {}", disk.name));
        }
        self.remove_next(live);
        second_name.into_iter().for_each(|path| self.remove_file(path));
        e
    }

    /// The job that copies what is missing; one that is over if nothing is to be copied.
    fn job_after_update(&self, disk: &Arc<DiskEntry>, work: Option<WorkRecord>) -> Arc<JobEntry> {
        // What was stopped is begun anew, whatever it was.
        let is_old = |job: &JobEntry| job.is_on(disk) && job.is_work() && job.state() != JobState::Done;
        locked(&self.jobs).retain(|_, job| !is_old(job));
        match work {
            Some(work) => {
                let job = self.job_of(disk, &work);
                job.pace.total_bytes.store(disk.facts().bytes_to_fill, Ordering::Relaxed);
                self.run_work(disk, &work.work, job.clone());
                job
            }
            None => {
                let job = self.new_job(JobKind::Update, disk, None);
                self.end_job(&job, JobState::Done, None);
                job
            }
        }
    }

    /// Lets go of what was taken for updates and restores and is not needed any more, on a thread of its own.
    pub(crate) fn tidy_moments_later(&self) {
        if self.is_stopping() {
            return; // The next start does it.
        }
        let me = self.me.clone();
        let tidy = move || {
            if let Some(manager) = me.upgrade()
                && !manager.tidy_moments()
            {
                manager.follow_up(FollowUp::Tidy);
            }
        };
        if let Err(e) = self.start_thread("tidy", tidy) {
            log::warn!("snapshots that were taken for updates stay for now: {e}");
        }
    }

    /// Returns whether nothing is left to be looked at again.
    pub(crate) fn tidy_moments(&self) -> bool {
        let records = match self.records.disks() {
            // Nobody knows what one needs that cannot be read.
            Ok(remembered) if !remembered.unreadable.is_empty() => return true,
            Ok(remembered) => remembered.disks,
            Err(e) => {
                log::warn!("snapshots that were taken for updates stay for now: {e}");
                return false;
            }
        };
        let is_done = Cell::new(true);
        for disk in self.all_disks() {
            // What an update or a restore that is under way has taken is not needed by any record yet.
            let is_settled = |whose: &Uuid| {
                let is_settled = !self.is_being_changed(*whose);
                is_done.set(is_done.get() && is_settled);
                is_settled
            };
            let let_go = |reference: &SnapshotRef, refused: Option<ApiError>| {
                let Some(e) = refused else { return };
                is_done.set(false);
                log::debug!("{reference}, which was taken by the daemon, stays for now: {}", e.message);
            };
            let facts = disk.facts();
            for snapshot in disk.snapshots() {
                let taken_for = locked(&snapshot.record).taken_for;
                let Some(volume) = taken_for.filter(is_settled) else { continue };
                let need = Need::of(&records, volume, snapshot.id);
                if need != Need::Snapshot {
                    let keep_bookmark = need == Need::Bookmark && snapshot.unreadable(&facts).is_none();
                    let options = DeleteSnapshotOptions { keep_bookmark, ..DeleteSnapshotOptions::default() };
                    let_go(&snapshot.reference(), self.delete_by_id(snapshot.id, options).err());
                }
            }
            for bookmark in disk.bookmarks(&disk.facts()) {
                let Some(volume) = bookmark.taken_for.filter(is_settled) else { continue };
                let is_there = disk.snapshots().iter().any(|s| s.id == bookmark.id);
                let Ok(name) = bookmark.name.parse() else { continue };
                if !is_there && Need::of(&records, volume, bookmark.id) == Need::Nothing {
                    let reference = SnapshotRef { disk: disk.name.get(), name };
                    let_go(&reference, self.remove_bookmark(&reference).err());
                }
            }
        }
        is_done.get()
    }
}

/// A name that no snapshot or bookmark of the source has.
fn name_for(volume: &Name, source: &DiskEntry) -> Result<Name, ApiError> {
    let bookmarks = source.bookmarks(&source.facts());
    let is_free = |name: &Name| {
        source.snapshot(name).is_none() && !bookmarks.iter().any(|bookmark| bookmark.name == name.as_str())
    };
    let short: String = volume.as_str().chars().take(48).collect();
    let mut n = 1;
    loop {
        let name = format!("{short}-update-{n}").parse()?;
        if is_free(&name) {
            return Ok(name);
        }
        n += 1;
    }
}
