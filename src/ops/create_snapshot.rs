//! Snapshots: taking them, and opening them when they are quiesced.
//!
//! What always holds: before a cut the records say what they would after it. A daemon that is killed around the cut comes
//! back with the new live version either way, and removes the snapshot that nobody was told of.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::control::api::{self, SnapshotRequest, SnapshotState, Strategy, Writers};
use crate::control::socket::SOCKET_PATH_LEN_MAX;
use crate::control::{ApiError, ErrorCode, EventKind, Notice, SnapshotRef};
use crate::crash;
use crate::door::{self, Cut, DiskFacts, Epoch, NewLayer, SnapshotSpec};
use crate::host::FileKind;
use crate::manager::entry::{DiskEntry, Frontends, Made, SnapshotEntry, locked};
use crate::manager::followups::FollowUp;
use crate::manager::recording;
use crate::manager::{Manager, engine_error, record_error};
use crate::registry::{ClaimKey, Command};
use crate::store::{DeletionRecord, DiskRecord, Layout, RecordError, SnapshotRecord};

/// How often a thread that waits looks whether the daemon is going down.
const LOOK: Duration = Duration::from_millis(200);

/// How much room the state directory must have for a snapshot or volume to begin: for some changes of the records, each with
/// their second copy, and for small tables.
const ROOM_MIN_BYTES: u64 = 512 << 10;

/// A snapshot that is ready for its cut.
struct Ready {
    disk: Arc<DiskEntry>,
    entry: Arc<SnapshotEntry>,
    prepared: SnapshotSpec,
    /// What the records say after the cut, but for its epoch.
    pending: DiskRecord,
    /// The layer that was made for it.
    made: Option<(Uuid, PathBuf)>,
    /// The version that has a dirty bitmap for it.
    new_live: Uuid,
}

fn made_for(ready: &[Ready]) -> Made {
    let layers = ready.iter().filter_map(|one| one.made.clone()).collect();
    Made { layers, changed: ready.iter().map(|one| one.new_live).collect() }
}

impl Manager {
    pub(crate) fn create(&self, request: &SnapshotRequest) -> Result<Vec<api::Snapshot>, ApiError> {
        self.create_for(request, None)
    }

    /// The same for the update of a volume: what is taken belongs to that.
    pub(crate) fn create_for(
        &self,
        request: &SnapshotRequest,
        volume: Option<Uuid>,
    ) -> Result<Vec<api::Snapshot>, ApiError> {
        let splits = request.strategy == Some(api::Strategy::WriteMirroring);
        let command = Command::CreateSnapshot { disks: request.disks.clone(), name: request.name.clone(), splits };
        let places = [&request.socket, &request.image].into_iter().flatten();
        let _claim = self.claim_with(&command, places.map(|path| ClaimKey::Path(path.clone())))?;
        let disks = request.disks.iter().map(|d| self.disk(d)).collect::<Result<Vec<_>, _>>()?;
        if let (Some(image), Some(disk)) = (&request.image, request.disks.first()) {
            self.refuse_what_others_have(disk, image, true)?;
        }
        self.refuse_without_room()?;
        let group = self.host.new_id();
        let mut ready = Vec::new();
        for disk in &disks {
            match self.prepare(disk, request, group, volume) {
                Ok(one) => ready.push(one),
                Err(e) => return Err(self.undo(ready, e)),
            }
        }
        // Older ones may read through what is not to outlive a power cut, also if this comes to nothing in the middle.
        disks.iter().for_each(|disk| disk.disk.durability_changes());
        let done = self.record_and_cut(ready, &disks, request);
        disks.iter().for_each(|disk| disk.disk.durability_recorded());
        done
    }

    fn record_and_cut(
        &self,
        ready: Vec<Ready>,
        disks: &[Arc<DiskEntry>],
        request: &SnapshotRequest,
    ) -> Result<Vec<api::Snapshot>, ApiError> {
        if let Err(e) = self.records.put(&ready.iter().map(|one| &one.pending).collect::<Vec<_>>()) {
            if matches!(e, RecordError::Unknown(_)) {
                disks.iter().for_each(|disk| self.undo_split(disk));
                self.unmake(disks.to_vec(), made_for(&ready));
                return Err(record_error(e));
            }
            return Err(self.undo(ready, record_error(e)));
        }
        self.cut(ready, disks, request.writers)
    }

    /// The cut itself. Everything it needs is durable.
    fn cut(
        &self,
        ready: Vec<Ready>,
        disks: &[Arc<DiskEntry>],
        writers: Writers,
    ) -> Result<Vec<api::Snapshot>, ApiError> {
        let mut prepared = Vec::new();
        let mut entries = Vec::new();
        let made = made_for(&ready);
        for one in ready {
            locked(&one.disk.snapshots).push(one.entry.clone());
            prepared.push(one.prepared);
            entries.push((one.disk, one.entry));
        }
        let writers = match writers {
            Writers::Request => door::Writers::Request,
            Writers::Connection => door::Writers::Connection,
        };
        // A cut is refused before it changes anything; the entries then go as in undo().
        crash::point("before the cut");
        let Cut { ended, lost } = self.engine.cut(prepared, writers).map_err(|e| {
            self.take_back(&entries, made);
            engine_error(e)
        })?;
        crash::point("after the cut");
        let at = self.host.now();
        for (_, entry) in &entries {
            locked(&entry.record).ended = ended.0;
        }
        let recorded = self.persist(disks);
        for (disk, entry) in &entries {
            if recorded.is_err() {
                // Nobody is to have it: it goes when it is quiesced, and whatever is recorded of the disk until then says so.
                locked(&entry.record).deletion = Some(DeletionRecord::default());
                self.follow_up(FollowUp::LetGo(entry.id));
            }
            if let Some((_, why)) = lost.iter().find(|(version, _)| *version == entry.id) {
                disk.disk.break_version(entry.id, why);
            }
            log::info!("snapshot {}: taken at epoch {ended}", entry.reference());
            self.bus.publish(Notice::of_snapshot(EventKind::SnapshotCreated, &entry.reference()));
        }
        let answer = entries.iter().map(|(disk, entry)| entry.to_api(&disk.facts())).collect();
        // Each for itself: a frontend that stays on one disk does not hold up the other. Also when they could not be recorded.
        entries.into_iter().for_each(|(disk, entry)| self.drain(disk, entry, at));
        recorded?;
        Ok(answer)
    }

    /// Waits for the requests of a snapshot whose cut was at that moment, on a thread of its own; if there is none, now and
    /// then.
    fn drain(&self, disk: Arc<DiskEntry>, entry: Arc<SnapshotEntry>, at: Instant) {
        let (me, later) = (self.me.clone(), FollowUp::Quiesce(disk.clone(), entry.clone(), at));
        let again = later.clone();
        let started = self.start_thread("drain", move || {
            loop {
                let Some(manager) = me.upgrade() else { return };
                if disk.disk.wait_quiet(ended_of(&entry), LOOK) {
                    if !manager.quiesced_since(&disk, &entry, at) {
                        manager.follow_up(again);
                    }
                    return;
                }
                // The end of the daemon drains everything itself; a disk that was removed is let go.
                if manager.is_stopping() || !manager.is_there(&disk, &entry) {
                    return;
                }
            }
        });
        if started.is_err() {
            self.follow_up(later);
        }
    }

    /// Makes the layer and the entry of a snapshot.
    fn prepare(
        &self,
        disk: &Arc<DiskEntry>,
        request: &SnapshotRequest,
        group: Uuid,
        taken_for: Option<Uuid>,
    ) -> Result<Ready, ApiError> {
        let reference = SnapshotRef { disk: disk.name.get(), name: request.name.clone() };
        let socket = request.socket.clone().unwrap_or_else(|| self.places.snapshot_socket(&reference));
        let facts = disk.facts();
        let live = facts.live();
        let in_snapshot = |e: ApiError| ApiError { message: format!("snapshot {reference}: {}", e.message), ..e };
        self.check_place(&socket).map_err(in_snapshot)?;

        let asked = request.strategy.unwrap_or(Strategy::CopyOnWrite);
        // Just before a log is forgotten that has been folded, the records still name it, and by the name of the version
        // that is to be frozen: whatever is made under that name would be in its place.
        let has_log = !facts.can_move_pivot() || self.host.is_there(&self.places.log_table(live.id));
        let strategy = if has_log { Strategy::WriteLogging } else { asked };
        if strategy != asked {
            log::info!("snapshot {reference}: {strategy}, not {asked}: the disk's log is not folded yet");
        }
        let new_live = self.host.new_id();
        let table_error = |e| in_snapshot(crate::manager::table_error(e));
        let changed = self.make_changed_table(new_live, &facts.geometry).map_err(table_error)?;
        let prepared = self.prepare_layer((disk, &facts), request, strategy, new_live);
        let (layer, made) = prepared.inspect_err(|_| self.remove_changed_table(new_live)).map_err(in_snapshot)?;
        let record = SnapshotRecord {
            id: live.id,
            group,
            name: request.name.to_string(),
            strategy: strategy.into(),
            writers: request.writers.into(),
            began: live.began.0,
            ended: 0,
            size_bytes: facts.geometry.size_bytes,
            image: made.clone(),
            layout: Layout::Sparse,
            owns_all: false,
            splits: false,
            durable: false,
            socket,
            created_ms: self.host.unix_ms(),
            quiesced_ms: None,
            broken: None,
            deletion: None,
            saved: None,
            saved_table: None,
            changed: None,
            taken_for,
        };
        let pending = recording::before_cut(disk.record_by(&facts), &facts, record.clone(), &layer, new_live);
        let entry = Arc::new(SnapshotEntry {
            id: live.id,
            frontends: Frontends::new(&disk.name, Some(&request.name), &self.bus),
            disk: disk.name.clone(),
            name: request.name.clone(),
            record: Mutex::new(record),
            is_lost: false,
            server: Mutex::new(None),
            socket_error: Mutex::new(None),
            drain: Mutex::new(None),
            is_forgotten: AtomicBool::new(false),
        });
        let prepared = SnapshotSpec { disk: disk.id, layer, new_live, changed };
        let made = match strategy {
            Strategy::CopyOnWrite => Some((entry.id, made)),
            Strategy::WriteLogging => Some((new_live, made)),
            Strategy::WriteMirroring => None, // It is the disk's own leg.
        };
        Ok(Ready { disk: disk.clone(), entry, prepared, pending, made, new_live })
    }

    /// What the strategy needs, and the file that was made for it.
    fn prepare_layer(
        &self,
        (disk, facts): (&DiskEntry, &DiskFacts),
        request: &SnapshotRequest,
        strategy: Strategy,
        new_live: Uuid,
    ) -> Result<(NewLayer, PathBuf), ApiError> {
        let (geometry, frozen) = (&facts.geometry, facts.live().id);
        let layout = self.layout_for(disk, request.layout)?;
        match strategy {
            Strategy::CopyOnWrite => {
                let reference = SnapshotRef { disk: disk.name.get(), name: request.name.clone() };
                let path = request.image.clone().unwrap_or_else(|| self.free_snapshot_image(&reference, frozen));
                let layer = self.make_frozen_layer((&path, layout), frozen, &disk.config(), geometry)?;
                Ok((NewLayer::Frozen(layer), path))
            }
            Strategy::WriteLogging => {
                let path = request.image.clone().unwrap_or_else(|| self.places.log_image(new_live));
                let layer = self.make_log((&path, layout), new_live, &disk.config(), geometry)?;
                Ok((NewLayer::Live(layer), path))
            }
            Strategy::WriteMirroring if request.image.is_some() => {
                let message = "image: a write-mirroring snapshot takes the disk's second leg, no other image";
                Err(ApiError::new(ErrorCode::InvalidRequest, message).with_action("leave --image out"))
            }
            Strategy::WriteMirroring if request.layout == Some(api::Layout::Packed) => {
                let message =
                    "layout: a write-mirroring snapshot has the disk's second leg, a full image, which is sparse";
                Err(ApiError::new(ErrorCode::InvalidRequest, message).with_action("leave --layout out"))
            }
            Strategy::WriteMirroring => Ok((NewLayer::Split, self.split(disk)?)),
        }
    }

    /// Where the image of a snapshot goes when nothing else is said. A disk that had this one's name before keeps its images.
    fn free_snapshot_image(&self, reference: &SnapshotRef, frozen: Uuid) -> PathBuf {
        let usual = reference.to_string();
        let (served, unserved) = self.all_there();
        let is_taken = served.iter().any(|disk| disk.to_record().names().contains(&usual))
            || unserved.iter().filter_map(|u| u.record.as_ref()).any(|r| r.names().contains(&usual));
        match is_taken {
            false => self.places.snapshot_image(&usual),
            true => self.places.snapshot_image(&frozen),
        }
    }

    /// Refuses to begin what would be stuck half way: without room for the records that it takes from here to its end.
    pub(crate) fn refuse_without_room(&self) -> Result<(), ApiError> {
        let state_dir = self.places.state_dir();
        match self.host.free_bytes(state_dir) {
            Ok(free) if free < ROOM_MIN_BYTES => {
                let message = format!("the state directory {} has only {free} bytes left", state_dir.display());
                Err(ApiError::new(ErrorCode::NoSpace, message).with_action(format!(
                    "make room there, at least {ROOM_MIN_BYTES} bytes: delete snapshots or volumes, or grow its file system"
                )))
            }
            // What cannot be told is found out on the way.
            _ => Ok(()),
        }
    }

    /// Whether a snapshot's socket can be made there later on, as far as that can be told before the cut.
    pub(crate) fn check_place(&self, socket: &Path) -> Result<(), ApiError> {
        let len = socket.as_os_str().len();
        let refuse = |code, what: String| {
            let message = format!("its socket {} cannot be made: {what}", socket.display());
            Err(ApiError::new(code, message).with_action("name another one with --socket"))
        };
        let bad = |what: String| refuse(ErrorCode::InvalidRequest, what);
        let taken = |what: String| refuse(ErrorCode::Conflict, what);
        if len > SOCKET_PATH_LEN_MAX {
            return bad(format!("a socket's path has at most {SOCKET_PATH_LEN_MAX} bytes, this one {len}"));
        }
        if !socket.parent().is_some_and(|dir| self.host.is_directory(dir)) {
            return bad("its directory does not exist".to_owned());
        }
        if self.host.look(socket).is_ok_and(|look| look.kind != FileKind::Socket) {
            return taken("something else is there".to_owned());
        }
        for disk in self.all_disks() {
            let of_snapshot = disk.snapshots().into_iter().find(|s| locked(&s.record).socket == socket);
            if disk.socket() == socket {
                let what = if disk.is_volume() { "volume" } else { "disk" };
                return taken(format!("{what} {} has it", disk.name));
            }
            if let Some(snapshot) = of_snapshot {
                return taken(format!("snapshot {} has it", snapshot.reference()));
            }
        }
        Ok(())
    }

    /// What was made for snapshots that no record knows of goes.
    fn undo(&self, ready: Vec<Ready>, error: ApiError) -> ApiError {
        ready.iter().for_each(|one| self.undo_split(&one.disk));
        self.remove_made(&made_for(&ready));
        error
    }

    /// A leg that was split for nothing comes back.
    fn undo_split(&self, disk: &Arc<DiskEntry>) {
        match self.take_unheld_leg_back(disk) {
            Ok(true) => self.start_resync(disk),
            Ok(false) => {}
            Err(e) => log::error!("disk {}: a leg does not come back: {}", disk.name, e.message),
        }
    }

    /// Removes what was made for snapshots that are none, when no record can name it any more.
    fn unmake(&self, disks: Vec<Arc<DiskEntry>>, made: Made) {
        match self.persist(&disks) {
            Ok(()) => self.remove_made(&made),
            Err(e) => {
                log::warn!("what was made for snapshots that were refused is removed later: {e}");
                self.follow_up(FollowUp::Unmake(disks, Arc::new(made)));
            }
        }
    }

    pub(crate) fn remove_made(&self, made: &Made) {
        made.layers.iter().for_each(|(id, image)| self.remove_layer(*id, image));
        made.changed.iter().for_each(|id| self.remove_changed_table(*id));
    }

    /// Takes out of everything what a refused cut was to make.
    fn take_back(&self, entries: &[(Arc<DiskEntry>, Arc<SnapshotEntry>)], made: Made) {
        let disks: Vec<_> = entries.iter().map(|(disk, _)| disk.clone()).collect();
        for (disk, entry) in entries {
            locked(&disk.snapshots).retain(|s| !Arc::ptr_eq(s, entry));
        }
        disks.iter().for_each(|disk| self.undo_split(disk));
        self.unmake(disks, made);
    }

    /// If all requests of its epoch are done a snapshot, whose cut was at that moment, never changes again. Returns whether
    /// that is so and could be recorded; before it is, nobody is told.
    pub(crate) fn quiesced_since(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>, at: Instant) -> bool {
        if !disk.disk.wait_quiet(ended_of(entry), LOOK) {
            return false;
        }
        let drain = self.host.now() - at;
        if !entry.is_lost {
            disk.disk.store_shown(entry.id);
        }
        // If nobody gets the claim the end of the daemon records it.
        self.claimed(&format!("quiesce {}", entry.reference()), disk, || self.record_quiesced(disk, entry, drain))
    }

    /// The same at the end of the daemon, when nobody is left who could claim anything.
    pub(crate) fn store_and_record_quiesced(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>) {
        if locked(&entry.record).quiesced_ms.is_some() {
            return;
        }
        if !entry.is_lost {
            disk.disk.store_shown(entry.id);
        }
        if !self.record_quiesced(disk, entry, Duration::ZERO) {
            log::error!("snapshot {}: a start finds it as it drained", entry.reference());
        }
    }

    /// The same, with the disk claimed.
    fn record_quiesced(&self, disk: &Arc<DiskEntry>, entry: &Arc<SnapshotEntry>, drain: Duration) -> bool {
        disk.disk.set_quiesced(entry.id);
        if !disk.snapshots().iter().any(|s| Arc::ptr_eq(s, entry)) {
            return true; // Its disk has been removed, and must not come back with it.
        }
        if locked(&entry.record).quiesced_ms.is_some() {
            return true;
        }
        let drain = *locked(&entry.drain).get_or_insert(drain);
        // Durable before anybody is told: from then on a power cut must not break it.
        let quiesced_ms = Some(self.host.unix_ms());
        let mut record = disk.to_record();
        record.snapshots.iter_mut().filter(|s| s.id == entry.id).for_each(|s| s.quiesced_ms = quiesced_ms);
        if let Err(e) = self.records.put(&[&record]) {
            let what = format!("that it is quiesced cannot be recorded yet: {e}");
            if locked(&entry.socket_error).replace(what.clone()).as_ref() != Some(&what) {
                log::error!("snapshot {}: {what}", entry.reference());
            }
            return false;
        }
        *locked(&entry.socket_error) = None;
        crash::point("before a snapshot is opened");
        if entry.may_be_read(&disk.facts()) && !self.is_stopping() && !self.open_socket(disk, entry) {
            self.follow_up(FollowUp::Open(disk.clone(), entry.clone()));
        }
        locked(&entry.record).quiesced_ms = quiesced_ms;
        if entry.may_be_read(&disk.facts()) {
            log::info!("snapshot {}: quiesced after {drain:.1?}", entry.reference());
            self.bus.publish(Notice::of_snapshot(EventKind::SnapshotQuiesced, &entry.reference()));
        }
        true
    }

    /// Moves the frontends that still write a snapshot over to the live version.
    pub(crate) fn cut_over(&self, reference: &SnapshotRef) -> Result<api::Snapshot, ApiError> {
        let _claim = self.claim(&Command::CutOver { snapshot: reference.clone() })?;
        let disk = self.disk(&reference.disk)?;
        let entry = disk.snapshot(&reference.name).ok_or_else(|| ApiError::snapshot_not_found(reference))?;
        if entry.state(&disk.facts()) != SnapshotState::Quiesced {
            self.move_frontends(&entry)?;
        }
        Ok(entry.to_api(&disk.facts()))
    }

    /// The cutover itself: of all disks whose snapshots were taken at the same cut, so that they stay one moment.
    pub(crate) fn move_frontends(&self, entry: &SnapshotEntry) -> Result<(), ApiError> {
        let (group, ended) = {
            let record = locked(&entry.record);
            (record.group, record.ended)
        };
        if ended == 0 || entry.is_lost {
            return Ok(());
        }
        let of_group = |d: &Arc<DiskEntry>| d.snapshots().iter().any(|s| locked(&s.record).group == group);
        let disks: Vec<_> = self.all_disks().into_iter().filter(of_group).collect();
        let all: Vec<Uuid> = disks.iter().map(|d| d.id).collect();
        let moved = self
            .engine
            .cut_over(&all, Epoch(ended))
            .map_err(|e| ApiError::new(ErrorCode::Unavailable, e.to_string()))?;
        if moved > 0 {
            log::info!("snapshot {}: {moved} frontends go on with the live version", entry.reference());
            for disk in &disks {
                for snapshot in disk.snapshots().iter().filter(|s| locked(&s.record).group == group) {
                    self.bus.publish(Notice::of_snapshot(EventKind::SnapshotCutover, &snapshot.reference()));
                }
            }
        }
        Ok(())
    }
}

/// The epoch that ended with a snapshot.
fn ended_of(entry: &SnapshotEntry) -> Epoch {
    Epoch(locked(&entry.record).ended)
}
