//! A served disk and its snapshots, as the manager holds them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use crate::control::api::{self, DiskConfig, DiskState, SnapshotState};
use crate::control::timestamp::Timestamp;
use crate::control::{EventBus, EventKind, Name, Notice, SnapshotRef};
use crate::image::SharedImage;
use crate::mirror::{Disk, Version};
use crate::store::{DiskRecord, SnapshotRecord, Table};
use crate::vhost_user::{Observer, QueueStats, ServerHandle};

/// Locks a mutex whose data stays valid whatever happened to an earlier holder.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts the frontends of one socket and says when they come and go.
#[derive(Debug)]
pub(super) struct Frontends {
    count: AtomicU32,
    disk: Name,
    snapshot: Option<SnapshotRef>,
    bus: Arc<EventBus>,
}

impl Frontends {
    pub(super) fn new(disk: &Name, snapshot: Option<&SnapshotRef>, bus: &Arc<EventBus>) -> Arc<Frontends> {
        let (disk, snapshot, bus) = (disk.clone(), snapshot.cloned(), bus.clone());
        Arc::new(Frontends { count: AtomicU32::new(0), disk, snapshot, bus })
    }

    pub(super) fn count(&self) -> u32 {
        self.count.load(Ordering::SeqCst)
    }

    fn publish(&self, kind: EventKind) {
        let notice = match &self.snapshot {
            Some(snapshot) => Notice::of_snapshot(kind, snapshot),
            None => Notice::of_disk(kind, &self.disk),
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

/// A snapshot. Without a version it is only a record: of content that was lost.
pub(super) struct SnapshotEntry {
    pub(super) reference: SnapshotRef,
    pub(super) id: Uuid,
    pub(super) record: Mutex<SnapshotRecord>,
    pub(super) version: Option<Arc<Version>>,
    pub(super) table: Option<Arc<Table>>,
    pub(super) server: Mutex<Option<ServerHandle>>,
    pub(super) frontends: Arc<Frontends>,
    /// Why there is no socket although the content is whole.
    pub(super) socket_error: Mutex<Option<String>>,
    pub(super) drain: Mutex<Option<Duration>>,
}

impl SnapshotEntry {
    /// Why the content cannot be vouched for, if so.
    pub(super) fn broken(&self) -> Option<String> {
        let now = self.version.as_ref().and_then(|v| v.broken()).map(str::to_owned);
        now.or_else(|| locked(&self.record).broken.clone())
    }

    pub(super) fn state(&self) -> SnapshotState {
        let record = locked(&self.record);
        let broken = record.broken.is_some() || self.version.as_ref().is_some_and(|v| v.broken().is_some());
        match (record.deleting, broken, record.quiesced_ms) {
            (true, ..) => SnapshotState::Deleting,
            (_, true, _) => SnapshotState::Broken,
            (_, _, Some(_)) => SnapshotState::Quiesced,
            (_, _, None) => SnapshotState::Draining,
        }
    }

    pub(super) fn to_record(&self) -> SnapshotRecord {
        let mut record = locked(&self.record).clone();
        if record.broken.is_none() {
            record.broken = self.version.as_ref().and_then(|v| v.broken()).map(str::to_owned);
        }
        record
    }

    pub(super) fn to_api(&self, disk: &DiskEntry) -> api::Snapshot {
        let state = self.state();
        let reason = self.broken().or_else(|| locked(&self.socket_error).clone());
        let record = locked(&self.record).clone();
        let geometry = disk.disk.geometry();
        let owned = self.table.as_ref().map_or(0, |t| t.count() * u64::from(geometry.block_bytes));
        api::Snapshot {
            id: self.id,
            group: record.group,
            disk: self.reference.disk.clone(),
            name: self.reference.name.clone(),
            strategy: record.strategy.parse().unwrap_or(api::Strategy::CopyOnWrite),
            writers: record.writers.parse().unwrap_or(api::Writers::Request),
            state,
            reason,
            epoch: record.ended,
            socket: record.socket,
            image: Some(record.image),
            block_size: geometry.block_bytes,
            owned_bytes: owned.min(geometry.size_bytes),
            size_bytes: geometry.size_bytes,
            created_at: Timestamp::from_unix_ms(record.created_ms),
            quiesced_at: record.quiesced_ms.map(Timestamp::from_unix_ms),
            old_frontends: 0,
        }
    }
}

/// A served disk.
pub(super) struct DiskEntry {
    pub(super) name: Name,
    pub(super) id: Uuid,
    /// As it is served: with the socket and the serial filled in.
    pub(super) config: DiskConfig,
    pub(super) disk: Arc<Disk>,
    pub(super) image: SharedImage,
    pub(super) server: ServerHandle,
    pub(super) frontends: Arc<Frontends>,
    pub(super) live: Mutex<(Uuid, u64)>,
    pub(super) snapshots: Mutex<Vec<Arc<SnapshotEntry>>>,
    pub(super) failure_told: AtomicBool,
}

impl DiskEntry {
    pub(super) fn snapshots(&self) -> Vec<Arc<SnapshotEntry>> {
        locked(&self.snapshots).clone()
    }

    pub(super) fn snapshot(&self, name: &Name) -> Option<Arc<SnapshotEntry>> {
        self.snapshots().into_iter().find(|s| s.reference.name == *name)
    }

    /// What is remembered of it while it is served.
    pub(super) fn to_record(&self) -> DiskRecord {
        let (live, live_began) = *locked(&self.live);
        DiskRecord {
            id: self.id,
            name: self.name.to_string(),
            config: serde_json::to_value(&self.config).expect("a configuration is plain data"),
            live,
            live_began,
            snapshots: self.snapshots().iter().map(|s| s.to_record()).collect(),
            saved: None,
            saved_discards: None,
        }
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.image.is_poisoned().then(|| {
            format!(
                "a sync of {} failed, so it is unknown what of the last writes is stored",
                self.config.path.display()
            )
        })
    }

    pub(super) fn to_api(&self) -> api::Disk {
        let reason = self.failure();
        let frontends = self.frontends.count();
        let (size_bytes, block_size) = (self.disk.geometry().size_bytes, self.disk.geometry().block_bytes);
        api::Disk {
            id: self.id,
            name: self.name.clone(),
            path: self.config.path.clone(),
            socket: self.config.socket.clone().unwrap_or_default(),
            size_bytes,
            block_size,
            queues: self.config.queues,
            direct: self.config.direct,
            readonly: self.config.readonly,
            serial: self.config.serial.clone().unwrap_or_default(),
            state: if reason.is_some() { DiskState::Failed } else { DiskState::Serving },
            reason,
            connected: frontends > 0,
            frontends,
            epoch: locked(&self.live).1,
            snapshots: u32::try_from(locked(&self.snapshots).len()).unwrap_or(u32::MAX),
            allocated_bytes: self.image.allocated_bytes().unwrap_or(size_bytes),
            shared: self.config.shared,
            legs: Vec::new(),
        }
    }

    pub(super) fn stats(&self) -> QueueStats {
        self.server.stats()
    }
}
