//! Snapshots: taking them, opening them when they are quiesced, and deleting them.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::entry::{DiskEntry, Frontends, SnapshotEntry, locked};
use super::jobs::JobEntry;
use super::manager::{Manager, image_error, table_error};
use crate::control::api::{self, JobKind, JobState, SnapshotRequest, SnapshotState, Strategy, Writers};
use crate::control::socket::SOCKET_PATH_LEN_MAX;
use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, Deletion, ErrorCode, EventKind, Notice, SnapshotRef};
use crate::image::{Direct, Executor, FileImage, Image, ImageErrorKind, RingOptions};
use crate::job::{self, Outcome};
use crate::mirror::{self, Backing, Epoch, NewLayer, Owned, PreparedSnapshot};
use crate::store::{SnapshotRecord, Table, TableName};
use crate::vhost_user::{ServeOptions, SocketSource, serve};

/// How long a deletion waits for a snapshot to be quiesced, and for its own job, before it answers.
const DELETION_WAIT: Duration = Duration::from_secs(60);
/// How often a thread that waits looks whether the daemon is going down.
const LOOK: Duration = Duration::from_millis(200);

/// A snapshot that is ready for its cut.
struct Ready {
    disk: Arc<DiskEntry>,
    entry: Arc<SnapshotEntry>,
    prepared: PreparedSnapshot,
    new_live: Uuid,
}

impl Manager {
    pub(super) fn create(&self, request: &SnapshotRequest) -> Result<Vec<api::Snapshot>, ApiError> {
        let _structure = locked(&self.structure);
        self.refuse_when_stopping()?;
        check_supported(request)?;
        let disks = request.disks.iter().map(|d| self.disk(d)).collect::<Result<Vec<_>, _>>()?;
        for disk in &disks {
            if let Some(reason) = disk.failure() {
                return Err(ApiError::new(ErrorCode::DiskFailed, format!("disk {}: {reason}", disk.name)));
            }
            if disk.snapshot(&request.name).is_some() {
                let message = format!("disk {} has a snapshot {} already", disk.name, request.name);
                return Err(ApiError::new(ErrorCode::SnapshotExists, message));
            }
        }
        let group = Uuid::new_v4();
        let mut ready = Vec::new();
        for disk in &disks {
            match self.prepare(disk, request, group) {
                Ok(one) => ready.push(one),
                Err(e) => return Err(self.undo(&ready, e)),
            }
        }
        for one in &ready {
            locked(&one.disk.snapshots).push(one.entry.clone());
        }
        if let Err(e) = self.persist(&disks) {
            return Err(self.undo(&ready, e));
        }
        self.cut(ready, &disks)
    }

    /// The cut itself. Everything it needs is durable.
    fn cut(&self, mut ready: Vec<Ready>, disks: &[Arc<DiskEntry>]) -> Result<Vec<api::Snapshot>, ApiError> {
        let new_lives: Vec<Uuid> = ready.iter().map(|r| r.new_live).collect();
        let mut prepared = Vec::new();
        let mut entries = Vec::new();
        for one in ready.drain(..) {
            prepared.push(one.prepared);
            entries.push((one.disk, one.entry));
        }
        // A cut is refused before it changes anything; the entries then go as in undo().
        let cut = self.editor.cut(prepared, mirror::Writers::Request).map_err(|e| {
            self.forget(&entries);
            ApiError::new(ErrorCode::Unavailable, e.to_string())
        })?;
        let at = Instant::now();
        for ((disk, entry), live) in entries.iter().zip(new_lives) {
            locked(&entry.record).ended = cut.ended.0;
            *locked(&disk.live) = (live, cut.ended.next().0);
        }
        let recorded = self.persist(disks);
        for ((disk, entry), version) in entries.iter().zip(&cut.frozen) {
            if recorded.is_err() {
                disk.disk.break_version(version, "the cut could not be recorded");
            }
            log::info!("snapshot {}: taken at epoch {}", entry.reference, cut.ended);
            self.bus.publish(Notice::of_snapshot(EventKind::SnapshotCreated, &entry.reference));
        }
        let answer = entries.iter().map(|(disk, entry)| entry.to_api(disk)).collect();
        // Also when they could not be recorded: they must be quiesced to be deleted.
        let (me, ended) = (self.me.clone(), cut.ended);
        let waits = self.start_thread("drain", move || {
            loop {
                let Some(manager) = me.upgrade() else { return };
                if manager.clock.wait_drained(ended, LOOK) {
                    return manager.quiesced(&entries, at.elapsed());
                }
                if manager.is_stopping() {
                    return; // The end of the daemon drains everything itself.
                }
            }
        });
        recorded?;
        waits.map_err(|e| ApiError::new(ErrorCode::Io, format!("nobody can wait for the snapshot's requests: {e}")))?;
        Ok(answer)
    }

    /// Makes the image, the table and the entry of a snapshot.
    fn prepare(&self, disk: &Arc<DiskEntry>, request: &SnapshotRequest, group: Uuid) -> Result<Ready, ApiError> {
        let reference = SnapshotRef { disk: disk.name.clone(), name: request.name.clone() };
        let geometry = disk.disk.geometry();
        let path = request.image.clone().unwrap_or_else(|| self.places.snapshot_image(&reference));
        let socket = request.socket.clone().unwrap_or_else(|| self.places.snapshot_socket(&reference));
        let chain = disk.disk.chain();
        let live = chain.version(chain.live()).clone();
        let in_snapshot = |e: ApiError| ApiError { message: format!("snapshot {reference}: {}", e.message), ..e };
        self.check_place(&socket).map_err(in_snapshot)?;

        let direct = if disk.config.direct { Direct::On } else { Direct::Off };
        let created = match FileImage::create(&path, geometry.size_bytes, direct) {
            Err(e) if disk.config.direct && e.kind == ImageErrorKind::Unsuitable => {
                log::info!("snapshot {reference}: {} is used through the page cache: {e}", path.display());
                FileImage::create(&path, geometry.size_bytes, Direct::Off)
            }
            Ok(image) if image.alignment().offset_bytes > geometry.block_bytes => {
                drop(image);
                remove_file(&path);
                FileImage::create(&path, geometry.size_bytes, Direct::Off)
            }
            other => other,
        };
        let image: crate::image::SharedImage = Arc::new(created.map_err(|e| in_snapshot(image_error(e)))?);
        let table = TableName::of_this_boot(live.id)
            .and_then(|table| Table::create(&self.places.run_table(live.id), geometry.blocks(), table));
        let table = table.map_err(|e| {
            remove_file(&path);
            in_snapshot(table_error(e))
        })?;
        let table = Arc::new(table);
        let new_live = Uuid::new_v4();
        let record = SnapshotRecord {
            id: live.id,
            group,
            name: request.name.to_string(),
            strategy: Strategy::CopyOnWrite.to_string(),
            writers: request.writers.to_string(),
            began: live.began.0,
            ended: 0,
            image: path,
            socket,
            created_ms: Timestamp::now().unix_ms(),
            quiesced_ms: None,
            broken: None,
            deleting: false,
            saved: None,
            saved_table: None,
        };
        let entry = Arc::new(SnapshotEntry {
            id: live.id,
            frontends: Frontends::new(&disk.name, Some(&reference), &self.bus),
            reference,
            record: Mutex::new(record),
            version: Some(live),
            table: Some(table.clone()),
            server: Mutex::new(None),
            socket_error: Mutex::new(None),
            drain: Mutex::new(None),
        });
        let prepared = PreparedSnapshot {
            disk: disk.disk.clone(),
            layer: NewLayer::Frozen { image: Backing::One(image), table },
            new_live,
        };
        Ok(Ready { disk: disk.clone(), entry, prepared, new_live })
    }

    /// Whether a snapshot's socket can be made there later on, as far as that can be told before the cut.
    fn check_place(&self, socket: &Path) -> Result<(), ApiError> {
        let len = socket.as_os_str().len();
        let bad = |what: String| {
            let message = format!("its socket {} cannot be made: {what}", socket.display());
            Err(ApiError::new(ErrorCode::InvalidRequest, message).with_action("name another one with --socket"))
        };
        if len > SOCKET_PATH_LEN_MAX {
            return bad(format!("a socket's path has at most {SOCKET_PATH_LEN_MAX} bytes, this one {len}"));
        }
        if !socket.parent().is_some_and(Path::is_dir) {
            return bad("its directory does not exist".to_owned());
        }
        if std::fs::symlink_metadata(socket).is_ok_and(|m| !m.file_type().is_socket()) {
            return bad("something else is there".to_owned());
        }
        for disk in self.all_disks() {
            let of_snapshot = disk.snapshots().into_iter().find(|s| locked(&s.record).socket == socket);
            if disk.config.socket.as_deref() == Some(socket) {
                return bad(format!("disk {} has it", disk.name));
            }
            if let Some(snapshot) = of_snapshot {
                return bad(format!("snapshot {} has it", snapshot.reference));
            }
        }
        Ok(())
    }

    fn undo(&self, ready: &[Ready], error: ApiError) -> ApiError {
        let entries: Vec<_> = ready.iter().map(|r| (r.disk.clone(), r.entry.clone())).collect();
        self.forget(&entries);
        error
    }

    /// Takes snapshots that never came to be out of everything.
    fn forget(&self, entries: &[(Arc<DiskEntry>, Arc<SnapshotEntry>)]) {
        for (disk, entry) in entries {
            locked(&disk.snapshots).retain(|s| !Arc::ptr_eq(s, entry));
            self.remove_files(&locked(&entry.record));
        }
        let disks: Vec<_> = entries.iter().map(|(disk, _)| disk.clone()).collect();
        if let Err(e) = self.persist(&disks) {
            log::error!("cannot forget an unfinished snapshot: {e}");
        }
    }

    /// All requests of their epoch are done: these snapshots never change again.
    pub(super) fn quiesced(&self, entries: &[(Arc<DiskEntry>, Arc<SnapshotEntry>)], drain: Duration) {
        let _structure = locked(&self.structure);
        for (disk, entry) in entries {
            if let Some(version) = &entry.version {
                version.set_quiesced();
            }
            if !disk.snapshots().iter().any(|s| Arc::ptr_eq(s, entry)) {
                continue; // Its disk has been removed, and must not come back with it.
            }
            locked(&entry.drain).get_or_insert(drain);
            if entry.broken().is_none() && !self.is_stopping() {
                self.open_socket(disk, entry);
            }
            locked(&entry.record).quiesced_ms = Some(Timestamp::now().unix_ms());
            if let Err(e) = self.persist(std::slice::from_ref(disk)) {
                log::error!("cannot record that snapshot {} is quiesced: {e}", entry.reference);
            }
            if entry.broken().is_none() {
                log::info!("snapshot {}: quiesced after {drain:.1?}", entry.reference);
                self.bus.publish(Notice::of_snapshot(EventKind::SnapshotQuiesced, &entry.reference));
            }
        }
    }

    fn open_socket(&self, disk: &DiskEntry, entry: &SnapshotEntry) {
        let socket = locked(&entry.record).socket.clone();
        let server = serve(ServeOptions {
            name: entry.reference.to_string(),
            socket: SocketSource::Path(socket.clone()),
            attachment: disk.disk.attach_frozen(entry.id),
            queues: disk.config.queues,
            serial: entry.reference.name.as_str().chars().take(20).collect(),
            frontends_max: 1, // As many as its disk has.
            observer: entry.frontends.clone(),
            once: false,
        });
        match server {
            Ok(server) => *locked(&entry.server) = Some(server),
            Err(e) => {
                let what = format!("its socket {} cannot be opened: {e}", socket.display());
                log::error!("snapshot {}: {what}", entry.reference);
                *locked(&entry.socket_error) = Some(what);
            }
        }
    }

    /// Goes on with a snapshot after a restart.
    pub(super) fn resume_snapshot(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) {
        let is_served = entry.version.is_some() && entry.broken().is_none();
        if !is_served || locked(&entry.record).deleting {
            clear_socket(&locked(&entry.record));
        }
        if entry.version.is_none() {
            return;
        }
        if locked(&entry.record).deleting {
            if let Err(e) = self.start_retire(disk, entry) {
                log::error!("snapshot {}: its deletion cannot go on: {e}", entry.reference);
            }
        } else if is_served {
            self.open_socket(disk, entry);
        }
    }

    pub(super) fn delete(&self, reference: &SnapshotRef, force: bool) -> Result<Deletion, ApiError> {
        let deadline = Instant::now() + DELETION_WAIT;
        let job = loop {
            let structure = locked(&self.structure);
            self.refuse_when_stopping()?;
            let disk = self.disk(&reference.disk).map_err(|_| ApiError::snapshot_not_found(reference))?;
            let entry = disk.snapshot(&reference.name).ok_or_else(|| ApiError::snapshot_not_found(reference))?;
            if entry.version.is_none() {
                self.gone(&disk, &entry)?;
                return Ok(Deletion::Done);
            }
            let drained = entry.version.as_ref().is_some_and(|v| v.is_quiesced());
            match entry.state() {
                // One whose job has failed is tried again.
                SnapshotState::Deleting => match self.running_deletion(reference) {
                    Some(job) => break job,
                    None => break self.start_retire(&disk, &entry)?,
                },
                // Its requests are still on their way; they must arrive first.
                _ if !drained => {
                    if Instant::now() >= deadline {
                        let message = format!("snapshot {reference} is still draining");
                        return Err(ApiError::new(ErrorCode::SnapshotBusy, message)
                            .with_action("try again when the requests that were in flight at the cut are done"));
                    }
                }
                _ if !force && entry.frontends.count() > 0 => {
                    let message = format!("snapshot {reference} is being read");
                    return Err(ApiError::new(ErrorCode::SnapshotBusy, message));
                }
                _ => break self.begin_deletion(&disk, &entry)?,
            }
            drop(structure);
            std::thread::sleep(Duration::from_millis(10));
        };
        if !job.wait(deadline.saturating_duration_since(Instant::now())) {
            let disk = self.disk(&reference.disk)?;
            if let Some(entry) = disk.snapshot(&reference.name) {
                return Ok(Deletion::Started(entry.to_api(&disk)));
            }
        }
        let ended = job.to_api();
        match ended.state {
            JobState::Failed | JobState::Stopped => {
                let why = ended.reason.unwrap_or_else(|| "it was stopped".to_owned());
                Err(ApiError::new(ErrorCode::Io, format!("snapshot {reference} is not deleted yet: {why}")))
            }
            JobState::Done | JobState::Running => Ok(Deletion::Done),
        }
    }

    fn running_deletion(&self, reference: &SnapshotRef) -> Option<Arc<JobEntry>> {
        let works = |j: &Arc<JobEntry>| j.disk == reference.disk && j.snapshot.as_ref() == Some(&reference.name);
        self.running_jobs().into_iter().find(works)
    }

    fn begin_deletion(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) -> Result<Arc<JobEntry>, ApiError> {
        locked(&entry.record).deleting = true;
        if let Err(e) = self.persist(std::slice::from_ref(disk)) {
            locked(&entry.record).deleting = false;
            return Err(e);
        }
        match self.start_retire(disk, entry) {
            Ok(job) => {
                drop(locked(&entry.server).take());
                Ok(job)
            }
            Err(refused) => {
                // It is still whole and served.
                locked(&entry.record).deleting = false;
                self.persist(std::slice::from_ref(disk))?;
                Err(refused)
            }
        }
    }

    fn start_retire(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) -> Result<Arc<JobEntry>, ApiError> {
        let version = entry.version.clone().expect("only versions in a chain are retired");
        let grace = self
            .editor
            .begin_retire(&disk.disk, &version)
            .map_err(|e| ApiError::new(ErrorCode::SnapshotBusy, e.to_string()))?;
        let job = self.new_job(JobKind::Merge, &disk.name, Some(&entry.reference.name));
        let (me, disk, entry, ours) = (self.me.clone(), disk.clone(), entry.clone(), job.clone());
        let started = self.start_thread("delete", move || {
            let Some(manager) = me.upgrade() else { return };
            let (state, reason) = match manager.retire(&disk, &entry, grace, &ours) {
                Ok(Outcome::Done) => (JobState::Done, None),
                Ok(Outcome::Stopped) => (JobState::Stopped, Some("the daemon is going down".to_owned())),
                Err(reason) => (JobState::Failed, Some(reason)),
            };
            manager.end_job(&ours, state, reason);
        });
        if let Err(e) = started {
            self.end_job(&job, JobState::Failed, Some(format!("it has no thread: {e}")));
        }
        Ok(job)
    }

    /// The job of a deletion, on a thread and ring of its own.
    fn retire(
        &self,
        disk: &Arc<DiskEntry>,
        entry: &Arc<SnapshotEntry>,
        grace: Epoch,
        job: &JobEntry,
    ) -> Result<Outcome, String> {
        let executor = Executor::new(RingOptions { entries: 8 }).map_err(|e| format!("no ring for the job: {e}"))?;
        let version = entry.version.clone().expect("only versions in a chain are retired");
        let queue = executor.queue().clone();
        let work = job::retire(queue.clone(), self.editor.clone(), disk.disk.clone(), version, grace, job.pace.clone());
        if executor.block_on(work).map_err(|e| e.to_string())?? == Outcome::Stopped {
            return Ok(Outcome::Stopped);
        }
        {
            let _structure = locked(&self.structure);
            self.gone(disk, entry).map_err(|e| e.to_string())?;
        }
        if disk.disk.discards().count() > 0 {
            let work = job::carry_out_discards(queue, disk.disk.clone(), job.pace.clone());
            match executor.block_on(work).map_err(|e| e.to_string())? {
                Ok(_) => {}
                // The snapshot is gone all the same; the storage comes back with a later discard.
                Err(e) => log::warn!("disk {}: discards that were put off cannot be carried out: {e}", disk.name),
            }
        }
        Ok(Outcome::Done)
    }

    /// Forgets a snapshot that nobody reads any more, and removes what it had.
    fn gone(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) -> Result<(), ApiError> {
        locked(&disk.snapshots).retain(|s| !Arc::ptr_eq(s, entry));
        // First the files: a record without them is cleared away at the next start, files without a record never.
        self.remove_files(&locked(&entry.record));
        let persisted = self.persist(std::slice::from_ref(disk));
        log::info!("snapshot {}: deleted", entry.reference);
        self.bus.publish(Notice::of_snapshot(EventKind::SnapshotDeleted, &entry.reference));
        persisted
    }

    pub(super) fn remove_files(&self, record: &SnapshotRecord) {
        remove_file(&record.image);
        remove_file(&self.places.run_table(record.id));
        remove_file(&self.places.durable_table(record.id));
    }

    /// Saves what a clean stop leaves: the snapshots' bytes and tables first, and only then the word that they are there.
    pub(super) fn save(&self, disk: &DiskEntry) -> Result<(), String> {
        let executor = Executor::new(RingOptions { entries: 8 }).map_err(|e| e.to_string())?;
        let sync = |image: Backing| -> Result<(), String> {
            let queue = executor.queue().clone();
            let done = executor.block_on(async move { image.sync(&queue).await });
            done.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
        };
        if !disk.config.readonly {
            sync(Backing::One(disk.image.clone()))?;
        }
        let chain = disk.disk.chain();
        let mut seals = Vec::new();
        // From the newest to the oldest: what cannot be saved is lost, and with it those that read through it.
        let mut lost: Option<String> = None;
        for link in chain.links().iter().rev() {
            let Owned::Table(table) = &link.layer.owned else { continue };
            if lost.is_none() {
                let saved = sync(link.layer.image.clone())
                    .and_then(|()| table.save(&self.places.durable_table(link.version.id)).map_err(|e| e.to_string()));
                match saved {
                    Ok(seal) => seals.push((link.version.id, seal)),
                    Err(e) => lost = Some(format!("it, or one that it reads through, could not be saved: {e}")),
                }
            }
            if let Some(reason) = &lost {
                disk.disk.break_version(&link.version, reason);
            }
        }
        let mut record = disk.to_record();
        for snapshot in &mut record.snapshots {
            snapshot.saved_table = seals.iter().find(|(id, _)| *id == snapshot.id).map(|(_, seal)| *seal);
        }
        let discards = disk.disk.discards().save(&self.places.durable_table(disk.id));
        record.saved_discards = Some(discards.map_err(|e| e.to_string())?);
        let looks = |path: &Path| crate::store::Fingerprint::of(path).map_err(|e| format!("{}: {e}", path.display()));
        for snapshot in &mut record.snapshots {
            snapshot.saved = looks(&snapshot.image).ok();
        }
        record.saved = Some(looks(&disk.config.path)?);
        self.records.put([&record]).map_err(|e| e.to_string())
    }
}

fn check_supported(request: &SnapshotRequest) -> Result<(), ApiError> {
    if let Some(strategy) = request.strategy.filter(|s| *s != Strategy::CopyOnWrite) {
        let message = format!("this version has no {strategy} snapshots");
        return Err(ApiError::new(ErrorCode::Unsupported, message).with_action("use copy-on-write"));
    }
    if request.writers != Writers::Request {
        let message = format!("this version has no snapshots by {}", request.writers);
        return Err(ApiError::new(ErrorCode::Unsupported, message).with_action("use writers=request"));
    }
    Ok(())
}

/// Removes the socket that a killed daemon left of a snapshot that is not served any more.
pub(super) fn clear_socket(record: &SnapshotRecord) {
    if let Err(e) = crate::vhost_user::clear_stale(&record.socket) {
        log::warn!("the socket of a snapshot that is not served stays: {e}");
    }
}

/// Removes a file that is ours. That it is gone already is fine.
pub(super) fn remove_file(path: &Path) {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => log::error!("cannot remove {}: {e}", path.display()),
        _ => {}
    }
}
