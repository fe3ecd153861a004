//! What happened, told to whoever listens.
//!
//! Invariants: sequence numbers go up by one an event and every subscriber sees them in order; a subscriber that is too
//! slow is told so by a [`EventKind::Lagged`] event, never by silence; publishing never blocks and never fails, whatever
//! the subscribers do. Events are a notice, not a record: the state itself is in the disks and snapshots, and a client
//! that starts to listen reads that first.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use utoipa::ToSchema;

use super::name::{Name, SnapshotRef};
use super::timestamp::Timestamp;
use super::words::words;

/// How many events a subscriber may fall behind before it misses some.
pub const EVENT_BACKLOG: usize = 256;

words! {
    /// What kind of thing happened.
    EventKind {
        /// A disk is served.
        DiskAdded = "DISK_ADDED",
        /// A disk is no longer served.
        DiskRemoved = "DISK_REMOVED",
        /// How a disk or volume is served was changed.
        DiskChanged = "DISK_CHANGED",
        /// A disk has another size; the reason says which, and which it had.
        DiskResized = "DISK_RESIZED",
        /// A disk or volume has another name; the reason says which one it had.
        DiskRenamed = "DISK_RENAMED",
        /// A disk stopped working; see the reason.
        DiskFailed = "DISK_FAILED",
        /// A leg of a mirrored disk gets no writes any more; see the reason. The disk goes on with the other one.
        LegFailed = "LEG_FAILED",
        /// A leg of a mirrored disk has every write that was acknowledged.
        LegInSync = "LEG_IN_SYNC",
        /// A frontend connected to a disk or, if one is named, a snapshot.
        FrontendConnected = "FRONTEND_CONNECTED",
        /// A frontend went away from a disk or, if one is named, a snapshot.
        FrontendDisconnected = "FRONTEND_DISCONNECTED",
        /// The cut was made.
        SnapshotCreated = "SNAPSHOT_CREATED",
        /// The frontends that still wrote the snapshot were moved over to the live version.
        SnapshotCutover = "SNAPSHOT_CUTOVER",
        /// The snapshot never changes again and its socket is open.
        SnapshotQuiesced = "SNAPSHOT_QUIESCED",
        /// The snapshot's log is being folded back.
        SnapshotFolding = "SNAPSHOT_FOLDING",
        /// The snapshot can no longer be trusted; see the reason.
        SnapshotBroken = "SNAPSHOT_BROKEN",
        /// The snapshot is gone.
        SnapshotDeleted = "SNAPSHOT_DELETED",
        /// A volume is there; it is named as a disk is.
        VolumeCreated = "VOLUME_CREATED",
        /// What the volume stands on, or its log, can no longer be trusted; see the reason.
        VolumeBroken = "VOLUME_BROKEN",
        /// The volume has everything itself, and does not need its snapshot any more.
        VolumeIndependent = "VOLUME_INDEPENDENT",
        /// The volume shows its source's present; the reason says why it must copy everything, if so.
        VolumeUpdated = "VOLUME_UPDATED",
        /// The volume is a disk from now on.
        VolumePromoted = "VOLUME_PROMOTED",
        /// The volume is not served until it is enabled.
        VolumeDisabled = "VOLUME_DISABLED",
        /// The volume is served again.
        VolumeEnabled = "VOLUME_ENABLED",
        /// The volume is gone.
        VolumeDeleted = "VOLUME_DELETED",
        /// A snapshot was deleted and left a bookmark of the same name.
        BookmarkCreated = "BOOKMARK_CREATED",
        /// A bookmark was forgotten.
        BookmarkDeleted = "BOOKMARK_DELETED",
        /// A job began, or went on after it was stopped.
        JobStarted = "JOB_STARTED",
        /// A job finished.
        JobDone = "JOB_DONE",
        /// A job was stopped.
        JobStopped = "JOB_STOPPED",
        /// A job gave up; see the reason.
        JobFailed = "JOB_FAILED",
        /// Something is wrong that is said of nothing else; see the reason.
        Problem = "PROBLEM",
        /// This subscriber was too slow and missed events; see the reason for how many.
        Lagged = "LAGGED",
    }
}

/// What is to be published; the bus adds number and time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    kind: EventKind,
    disk: Option<Name>,
    snapshot: Option<Name>,
    job: Option<u64>,
    leg: Option<PathBuf>,
    reason: Option<String>,
}

impl Notice {
    /// Something about a disk.
    pub fn of_disk(kind: EventKind, disk: &Name) -> Self {
        Self { kind, disk: Some(disk.clone()), snapshot: None, job: None, leg: None, reason: None }
    }

    /// Something that is wrong and is said of nothing that has a name.
    pub fn of_problem(why: &str) -> Self {
        let (kind, reason) = (EventKind::Problem, Some(why.to_owned()));
        Self { kind, disk: None, snapshot: None, job: None, leg: None, reason }
    }

    /// Something about a snapshot.
    pub fn of_snapshot(kind: EventKind, snapshot: &SnapshotRef) -> Self {
        Self { snapshot: Some(snapshot.name.clone()), ..Self::of_disk(kind, &snapshot.disk) }
    }

    /// The same, and which job it is about.
    pub fn with_job(self, job: u64) -> Self {
        Self { job: Some(job), ..self }
    }

    /// The same, and which leg of the disk it is about.
    pub fn with_leg(self, leg: impl Into<PathBuf>) -> Self {
        Self { leg: Some(leg.into()), ..self }
    }

    /// The same, and why.
    pub fn because(self, reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..self }
    }

    fn into_event(self, seq: u64) -> Event {
        let Self { kind, disk, snapshot, job, leg, reason } = self;
        Event { seq, time: Timestamp::now(), event: kind, disk, snapshot, job, leg, reason }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts the events of this run of the daemon, from 1. A `LAGGED` event has the number of the last one missed.
    pub seq: u64,
    /// When it happened.
    pub time: Timestamp,
    /// What happened.
    pub event: EventKind,
    /// The disk or volume it is about.
    pub disk: Option<Name>,
    /// The snapshot of that disk it is about.
    pub snapshot: Option<Name>,
    /// The job it is about.
    pub job: Option<u64>,
    /// The image of that disk, one of its legs, it is about.
    #[schema(value_type = Option<String>)]
    pub leg: Option<PathBuf>,
    /// Why.
    pub reason: Option<String>,
}

/// Takes events from any thread and gives them to every subscriber.
#[derive(Debug)]
pub struct EventBus {
    sender: broadcast::Sender<Event>,
    /// The number of the latest event; held while sending, so that numbers arrive in order.
    seq: Mutex<u64>,
}

impl Default for EventBus {
    fn default() -> Self {
        Self::new(EVENT_BACKLOG)
    }
}

impl EventBus {
    /// A bus whose subscribers may fall `backlog` events behind (at least 1).
    pub fn new(backlog: usize) -> Self {
        Self { sender: broadcast::Sender::new(backlog.max(1)), seq: Mutex::new(0) }
    }

    /// Tells every subscriber. Callable from any thread; never waits for them. Returns the event's number.
    pub fn publish(&self, notice: Notice) -> u64 {
        let mut seq = self.seq.lock().unwrap_or_else(PoisonError::into_inner);
        *seq += 1;
        // The only error is that nobody listens.
        self.sender.send(notice.into_event(*seq)).ok();
        *seq
    }

    /// Listens from now on.
    pub fn subscribe(&self) -> Subscription {
        let seq = self.seq.lock().unwrap_or_else(PoisonError::into_inner);
        Subscription { receiver: self.sender.subscribe(), last_seq: *seq }
    }
}

/// One listener.
#[derive(Debug)]
pub struct Subscription {
    receiver: broadcast::Receiver<Event>,
    last_seq: u64,
}

impl Subscription {
    /// The next event, or a [`EventKind::Lagged`] one in place of those that were missed; `None` when the bus is gone.
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        let event = match self.receiver.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                let reason = Some(format!("{missed} events were missed"));
                let (seq, time, event) = (self.last_seq + missed, Timestamp::now(), EventKind::Lagged);
                Event { seq, time, event, disk: None, snapshot: None, job: None, leg: None, reason }
            }
            Err(broadcast::error::RecvError::Closed) => return None,
        };
        self.last_seq = event.seq;
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn added() -> Notice {
        Notice::of_disk(EventKind::DiskAdded, &"vm1".parse().unwrap())
    }

    #[tokio::test]
    async fn numbers_arrive_in_order_from_many_threads() {
        let bus = Arc::new(EventBus::new(1024));
        let mut subscription = bus.subscribe();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| assert!(bus.publish(added()) > 0)));
            }
        });
        for seq in 1..=400 {
            assert_eq!(subscription.next().await.unwrap().seq, seq);
        }
    }

    #[tokio::test]
    async fn the_slow_are_told() {
        let bus = EventBus::new(4);
        let mut subscription = bus.subscribe();
        (0..10).for_each(|_| assert!(bus.publish(added()) > 0));
        let lagged = subscription.next().await.unwrap();
        assert_eq!((lagged.event, lagged.seq), (EventKind::Lagged, 6));
        assert_eq!(subscription.next().await.unwrap().seq, 7);
        drop(bus);
        for _ in 8..=10 {
            assert!(subscription.next().await.is_some());
        }
        assert!(subscription.next().await.is_none());
    }
}
