//! A served disk and its snapshots, as the manager holds them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use crate::control::api::{self, DiskConfig, DiskState, Durability, SnapshotState};
use crate::control::timestamp::Timestamp;
use crate::control::{EventBus, EventKind, Name, Notice, SnapshotRef};
use crate::door::{Disk, DiskFacts, Trouble};
use crate::host::{Host, receive};
use crate::manager::Manager;
use crate::manager::legs::Mirror;
use crate::manager::names::CurrentName;
use crate::manager::recording;
use crate::manager::relations::Relations;
use crate::store::{BookmarkRecord, DeletionRecord, DiskRecord, Layout, RestoreRecord, SnapshotRecord};
use crate::vhost_user::{Observer, QueueStats, Server};

/// How long it is waited for an image that is asked how much storage it takes.
const LOOK_WAIT: Duration = Duration::from_millis(20);

/// Locks a mutex whose data stays valid whatever happened to an earlier holder.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts the frontends of one socket and says when they come and go.
#[derive(Debug)]
pub(crate) struct Frontends {
    count: AtomicU32,
    disk: CurrentName,
    snapshot: Option<Name>,
    bus: Arc<EventBus>,
}

impl Frontends {
    pub(crate) fn new(disk: &CurrentName, snapshot: Option<&Name>, bus: &Arc<EventBus>) -> Arc<Frontends> {
        let (disk, snapshot, bus) = (disk.clone(), snapshot.cloned(), bus.clone());
        Arc::new(Frontends { count: AtomicU32::new(0), disk, snapshot, bus })
    }

    pub(crate) fn count(&self) -> u32 {
        self.count.load(Ordering::SeqCst)
    }

    fn publish(&self, kind: EventKind) {
        let notice = match &self.snapshot {
            Some(name) => Notice::of_snapshot(kind, &SnapshotRef { disk: self.disk.get(), name: name.clone() }),
            None => Notice::of_disk(kind, &self.disk.get()),
        };
        self.bus.publish(notice);
    }
}

impl Observer for Frontends {
    fn connected(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.publish(EventKind::FrontendConnected);
    }

    fn disconnected(&self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
        self.publish(EventKind::FrontendDisconnected);
    }
}

/// A snapshot.
pub(crate) struct SnapshotEntry {
    pub(crate) disk: CurrentName,
    pub(crate) name: Name,
    pub(crate) id: Uuid,
    pub(crate) record: Mutex<SnapshotRecord>,
    /// Whether it is only a record: of content that was lost.
    pub(crate) is_lost: bool,
    pub(crate) server: Mutex<Option<Arc<dyn Server>>>,
    pub(crate) frontends: Arc<Frontends>,
    /// Why there is no socket although the content is whole.
    pub(crate) socket_error: Mutex<Option<String>>,
    pub(crate) drain: Mutex<Option<Duration>>,
    /// Whether the records are to forget it. It is listed until they have.
    pub(crate) is_forgotten: AtomicBool,
}

impl SnapshotEntry {
    /// Its full name.
    pub(crate) fn reference(&self) -> SnapshotRef {
        SnapshotRef { disk: self.disk.get(), name: self.name.clone() }
    }

    /// Changes what is remembered of its deletion, if one is under way; otherwise that is the default.
    pub(crate) fn change_deletion<T: Default>(&self, change: impl FnOnce(&mut DeletionRecord) -> T) -> T {
        locked(&self.record).deletion.as_mut().map(change).unwrap_or_default()
    }

    /// Whether its socket is open.
    pub(crate) fn is_open(&self) -> bool {
        locked(&self.server).is_some()
    }

    /// Why its own content cannot be vouched for, if so.
    pub(crate) fn broken(&self, facts: &DiskFacts) -> Option<String> {
        let now = facts.version(self.id).and_then(|version| version.broken.clone());
        now.or_else(|| locked(&self.record).broken.clone())
    }

    /// Why what it shows cannot be vouched for, if so.
    pub(crate) fn unreadable(&self, facts: &DiskFacts) -> Option<String> {
        self.broken(facts).or_else(|| facts.base_broken.clone())
    }

    /// Whether it is there for readers, as soon as it is quiesced: it is whole, and stays.
    pub(crate) fn may_be_read(&self, facts: &DiskFacts) -> bool {
        !self.is_lost && locked(&self.record).deletion.is_none() && self.broken(facts).is_none()
    }

    /// How many frontends still write it rather than the live version.
    pub(crate) fn old_frontends(&self, facts: &DiskFacts) -> u32 {
        let drains = locked(&self.record).quiesced_ms.is_none();
        let holders = facts.version(self.id).filter(|_| drains).map_or(0, |version| version.old_frontends);
        u32::try_from(holders).unwrap_or(u32::MAX)
    }

    pub(crate) fn state(&self, facts: &DiskFacts) -> SnapshotState {
        let broken = self.unreadable(facts).is_some();
        let record = locked(&self.record);
        match (record.deletion.is_some(), broken, record.quiesced_ms) {
            (true, ..) if facts.folds(self.id) => SnapshotState::Folding,
            (true, ..) => SnapshotState::Deleting,
            (_, true, _) => SnapshotState::Broken,
            (_, _, Some(_)) => SnapshotState::Quiesced,
            (_, _, None) => SnapshotState::Draining,
        }
    }

    /// What is remembered of it. None if it is not frozen yet, or has left the chain already.
    fn to_record(&self, facts: &DiskFacts) -> Option<SnapshotRecord> {
        if self.is_forgotten.load(Ordering::SeqCst) {
            return None;
        }
        let record = locked(&self.record).clone();
        if self.is_lost { Some(record) } else { recording::of_snapshot(record, facts) }
    }

    pub(crate) fn to_api(&self, facts: &DiskFacts) -> api::Snapshot {
        let (state, old_frontends) = (self.state(facts), self.old_frontends(facts));
        let reason = self.unreadable(facts).or_else(|| locked(&self.socket_error).clone());
        let record = locked(&self.record).clone();
        let (geometry, version) = (&facts.geometry, facts.version(self.id));
        let space = facts.space_of(self.id).map(|version| (version.image.clone(), version.layout()));
        let (image, layout) = space.unwrap_or((record.image, record.layout));
        let durable = version.map_or(record.durable, |version| version.outlives_power_cut);
        api::Snapshot {
            id: self.id,
            group: record.group,
            disk: self.disk.get(),
            name: self.name.clone(),
            strategy: record.strategy.into(),
            durability: if durable { Durability::Power } else { Durability::Process },
            writers: record.writers.into(),
            state,
            reason,
            epoch: record.ended,
            socket: record.socket,
            image: Some(image),
            layout: match layout {
                Layout::Sparse => api::Layout::Sparse,
                Layout::Packed => api::Layout::Packed,
            },
            block_size: geometry.block_bytes,
            owned_bytes: version.map_or(0, |version| facts.owned_bytes(version)),
            size_bytes: record.size_bytes,
            created_at: Timestamp::from_unix_ms(record.created_ms),
            quiesced_at: record.quiesced_ms.map(Timestamp::from_unix_ms),
            old_frontends,
        }
    }
}

/// What was made for snapshots: layers, and dirty bitmaps by their versions.
pub(crate) struct Made {
    pub(crate) layers: Vec<(Uuid, PathBuf)>,
    pub(crate) changed: Vec<Uuid>,
}

/// What is remembered of a disk while it is served: where its versions are at this moment.
pub(crate) fn record_of(
    (id, name, boot): (Uuid, &Name, Uuid),
    config: &DiskConfig,
    facts: &DiskFacts,
    snapshots: &[Arc<SnapshotEntry>],
) -> DiskRecord {
    let config = serde_json::to_value(config).expect("a configuration is plain data");
    let snapshots = snapshots.iter().filter_map(|s| s.to_record(facts)).collect();
    recording::of_disk((id, name.as_str(), boot), config, facts, snapshots)
}

/// A served disk.
pub(crate) struct DiskEntry {
    pub(crate) name: CurrentName,
    pub(crate) id: Uuid,
    /// The boot of the machine.
    pub(crate) boot: Uuid,
    /// As it was served at first: with the serial filled in. What may change meanwhile is said elsewhere.
    pub(crate) config: DiskConfig,
    pub(crate) socket: Mutex<PathBuf>,
    pub(crate) disk: Arc<Disk>,
    /// What it stands on, and what is being done about that.
    pub(crate) relations: Mutex<Relations>,
    /// Its image, or of its legs the one that it is known by.
    pub(crate) path: Mutex<PathBuf>,
    pub(crate) mirror: Mutex<Option<Mirror>>,
    pub(crate) former_legs: Mutex<Vec<PathBuf>>,
    /// Its restore in place, if one is under way.
    pub(crate) restore: Mutex<Option<RestoreRecord>>,
    /// Whether a snapshot is on its way out. Until the records have forgotten one, the next one may not begin: its blocks
    /// would be folded below a log that a restart still finds.
    pub(crate) retires: AtomicBool,
    /// Whether somebody is at the write-intent bitmap.
    pub(crate) cleaning: AtomicBool,
    /// None while it is disabled.
    pub(crate) server: Mutex<Option<Arc<dyn Server>>>,
    pub(crate) frontends: Arc<Frontends>,
    pub(crate) snapshots: Mutex<Vec<Arc<SnapshotEntry>>>,
    /// What is known of bookmarks but for their tables, oldest first.
    pub(crate) bookmarks: Mutex<Vec<BookmarkRecord>>,
    pub(crate) failure_told: AtomicBool,
    /// Servers of snapshots that were deleted under their readers.
    pub(crate) abandoned: Mutex<Vec<Arc<dyn Server>>>,
    pub(crate) allocated: Allocated,
}

/// What the record of a disk says beyond its configuration and its versions, at one moment.
pub(crate) struct Recorded {
    relations: Relations,
    path: PathBuf,
    mirror: Option<Mirror>,
    former_legs: Vec<PathBuf>,
    restore: Option<RestoreRecord>,
}

impl Recorded {
    pub(crate) fn of(disk: &DiskEntry) -> Recorded {
        Recorded {
            relations: locked(&disk.relations).clone(),
            path: locked(&disk.path).clone(),
            mirror: locked(&disk.mirror).clone(),
            former_legs: locked(&disk.former_legs).clone(),
            restore: locked(&disk.restore).clone(),
        }
    }

    pub(crate) fn put_back(self, disk: &DiskEntry) {
        *locked(&disk.relations) = self.relations;
        *locked(&disk.path) = self.path;
        *locked(&disk.mirror) = self.mirror;
        *locked(&disk.former_legs) = self.former_legs;
        *locked(&disk.restore) = self.restore;
    }
}

/// How much storage an image takes, looked at by a thread of its own: one that does not answer holds up nobody.
#[derive(Default)]
pub(crate) struct Allocated(Arc<Looked>);

#[derive(Default)]
struct Looked {
    is_looking: AtomicBool,
    last: Mutex<Option<u64>>,
}

impl Allocated {
    /// What is known now, which is what was known before if the image does not answer at once.
    fn look(&self, host: &dyn Host, disk: &Arc<Disk>) -> Option<u64> {
        if !self.0.is_looking.swap(true, Ordering::SeqCst) {
            let (of, disk, (tell, told)) = (self.0.clone(), disk.clone(), channel());
            let look = move || {
                *locked(&of.last) = disk.allocated_bytes();
                drop(disk);
                of.is_looking.store(false, Ordering::SeqCst);
                drop(tell);
            };
            match host.start_thread("look", Box::new(look)) {
                // An error says that it is done.
                Ok(_) => drop(receive(host, &told, LOOK_WAIT) as Result<(), _>),
                Err(_) => self.0.is_looking.store(false, Ordering::SeqCst),
            }
        }
        *locked(&self.0.last)
    }
}

impl DiskEntry {
    /// What its versions are like now.
    pub(crate) fn facts(&self) -> DiskFacts {
        self.disk.facts()
    }

    pub(crate) fn snapshots(&self) -> Vec<Arc<SnapshotEntry>> {
        locked(&self.snapshots).clone()
    }

    pub(crate) fn snapshot(&self, name: &Name) -> Option<Arc<SnapshotEntry>> {
        self.snapshots().into_iter().find(|s| s.name == *name)
    }

    /// What is remembered of it while it is served.
    pub(crate) fn to_record(&self) -> DiskRecord {
        self.record_by(&self.facts())
    }

    /// The same, as its chain was at one look.
    pub(crate) fn record_by(&self, facts: &DiskFacts) -> DiskRecord {
        let of = (self.id, &self.name.get(), self.boot);
        let mut record = record_of(of, &self.config(), facts, &self.snapshots());
        record.bookmarks = self.bookmarks(facts);
        locked(&self.relations).put_into(&mut record);
        record.mirror = locked(&self.mirror).as_ref().map(Mirror::to_record);
        record.former_legs = locked(&self.former_legs).clone();
        record.restore.clone_from(&locked(&self.restore));
        record
    }

    /// Where frontends connect.
    pub(crate) fn socket(&self) -> PathBuf {
        locked(&self.socket).clone()
    }

    /// How it would be served again: its legs may have changed since it was served, and what was set.
    pub(crate) fn config(&self) -> DiskConfig {
        let mut config = self.config.patched(&locked(&self.relations).set);
        config.path = locked(&self.path).clone();
        config.socket = Some(self.socket());
        let legs = locked(&self.mirror).as_ref().map(Mirror::to_record).map(|m| m.legs).unwrap_or_default();
        config.mirror = legs.into_iter().map(|leg| leg.path).find(|path| *path != config.path);
        config
    }

    /// Whether a frozen version has this image for itself.
    pub(crate) fn holds_leg(&self, path: &Path) -> bool {
        self.facts().frozen().iter().any(|version| version.has_image() && version.image == path)
    }

    /// Why it cannot be used: what it is restored from or stands on is lost, or a sync of its image, of a volume that of any
    /// of its logs, has failed.
    pub(crate) fn failure(&self) -> Option<String> {
        let is_volume = self.is_volume();
        let Trouble { restore_lost, base_broken, poisoned, is_pivot_poisoned } = self.disk.trouble();
        restore_lost.or(base_broken.filter(|_| is_volume)).or_else(|| {
            let poisoned = match is_volume {
                true => poisoned.into_iter().next()?,
                false => is_pivot_poisoned.then(|| locked(&self.path).clone())?,
            };
            let path = poisoned.display();
            Some(format!("a sync of {path} failed, so it is unknown what of the last writes is stored"))
        })
    }

    /// How guests see it: the size of its sectors is what they have always seen.
    pub(crate) fn settings(&self, facts: &DiskFacts) -> api::Settings {
        let logical_block_size = facts.geometry.logical_block_bytes;
        api::Settings { logical_block_size, ..api::Settings::of(&self.config()) }
    }

    pub(crate) fn to_api(&self, manager: &Manager) -> api::Disk {
        let facts = self.facts();
        let (reason, config) = (self.failure(), self.config());
        let (frontends, restoring) = (self.frontends.count(), self.restore_status(manager, &facts));
        let (size_bytes, block_size) = (facts.geometry.size_bytes, facts.geometry.block_bytes);
        let settings = self.settings(&facts);
        // Not below, where locks are held until all of it is there: the image may keep it waiting.
        let allocated_bytes = self.allocated.look(&*manager.host, &self.disk).unwrap_or(size_bytes);
        api::Disk {
            id: Some(self.id),
            name: self.name.get(),
            path: Some(locked(&self.path).clone()),
            socket: config.socket.clone(),
            size_bytes,
            block_size,
            settings,
            direct: config.direct,
            readonly: config.readonly(),
            state: if reason.is_some() { DiskState::Failed } else { DiskState::Serving },
            reason,
            connected: frontends > 0,
            frontends,
            frontend_pids: locked(&self.server).as_ref().map(|server| server.frontend_pids()).unwrap_or_default(),
            epoch: facts.live().began.0,
            snapshots: u32::try_from(self.snapshots().len()).unwrap_or(u32::MAX),
            allocated_bytes,
            shared: config.shared,
            legs: locked(&self.mirror).as_ref().map(|m| m.legs_to_api(&facts)).unwrap_or_default(),
            restoring,
        }
    }

    pub(crate) fn stats(&self) -> QueueStats {
        locked(&self.server).as_ref().map(|server| server.stats()).unwrap_or_default()
    }

    /// Finishes all requests and closes the socket.
    pub(crate) fn stop_server(&self) {
        let server = locked(&self.server).clone();
        if let Some(server) = server {
            server.stop();
        }
    }

    /// Hangs up on those who read a snapshot that was deleted under them. They have the disk's images.
    pub(crate) fn stop_abandoned(&self) {
        let servers = std::mem::take(&mut *locked(&self.abandoned));
        servers.iter().for_each(|server| server.stop());
    }
}

/// How often who waits for its turn looks again.
pub(crate) const RETIRE_LOOK: Duration = Duration::from_millis(20);

/// The turn of a deletion among those of its disk, until this is dropped.
pub(crate) struct RetireTurn<'a>(&'a AtomicBool);

impl RetireTurn<'_> {
    pub(crate) fn take(retires: &AtomicBool) -> Option<RetireTurn<'_>> {
        (!retires.swap(true, Ordering::AcqRel)).then(|| RetireTurn(retires))
    }
}

impl Drop for RetireTurn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Whether a name in a request is this id.
pub(crate) fn is_id(name: &Name, id: Uuid) -> bool {
    name.as_str().parse() == Ok(id)
}
