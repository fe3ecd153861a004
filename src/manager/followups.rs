//! What the daemon tries again by itself: what could not be served, stored or opened when it was due.
//!
//! What always holds: each is tried on a thread of its own, so that one that hangs holds up none of the others; the time
//! between two tries grows up to [`PAUSE_MAX`]; nobody waits for any of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::control::Name;
use crate::control::api::DeleteSnapshotOptions;
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, Made, SnapshotEntry, locked};
use crate::registry::ClaimKey;

/// How long after the first failure it is tried again.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// How long at most.
const PAUSE_MAX: Duration = Duration::from_secs(20);

/// Something to be tried again.
#[derive(Clone)]
pub(crate) enum FollowUp {
    /// Serve a disk or volume that could not be.
    Serve(Name),
    /// Record that a snapshot is quiesced, whose cut was at that moment, and open its socket.
    Quiesce(Arc<DiskEntry>, Arc<SnapshotEntry>, Instant),
    /// Open the socket of a quiesced snapshot.
    Open(Arc<DiskEntry>, Arc<SnapshotEntry>),
    /// Store what a disk's record should say.
    Record(Arc<DiskEntry>),
    /// The same, and then say what outlives a power cut.
    Durable(Arc<DiskEntry>),
    /// Remove what was made for snapshots that are none, once no record of these disks can name it.
    Unmake(Vec<Arc<DiskEntry>>, Arc<Made>),
    /// Serve again what was to be removed, once its record is known to be there.
    Stay(Arc<DiskEntry>),
    /// Go on with the restore of a disk that somebody else was changing.
    Restore(Arc<DiskEntry>),
    /// Delete a snapshot that nobody is to have.
    LetGo(Uuid),
    /// Let go of what was taken for updates and is not needed any more.
    Tidy,
}

/// Those that wait.
#[derive(Default)]
pub(crate) struct FollowUps(Vec<(Instant, Duration, FollowUp)>);

impl Manager {
    /// Has something tried again later.
    pub(crate) fn follow_up(&self, what: FollowUp) {
        self.follow_up_after(what, PAUSE_MIN);
    }

    /// Has something done as soon as nobody else changes what it is about.
    pub(crate) fn follow_up_at_once(&self, what: FollowUp) {
        self.follow_up_after(what, Duration::ZERO);
        self.try_follow_ups();
    }

    fn follow_up_after(&self, what: FollowUp, pause: Duration) {
        let mut follow_ups = locked(&self.follow_ups);
        // The newest word on a thing counts.
        follow_ups.0.retain(|(.., other)| match (other, &what) {
            (FollowUp::Serve(other), FollowUp::Serve(name)) => other != name,
            (FollowUp::Restore(other), FollowUp::Restore(disk))
            | (FollowUp::Record(other), FollowUp::Record(disk))
            | (FollowUp::Stay(other), FollowUp::Stay(disk)) => !Arc::ptr_eq(other, disk),
            (FollowUp::LetGo(other), FollowUp::LetGo(id)) => other != id,
            (FollowUp::Tidy, FollowUp::Tidy) => false,
            _ => true,
        });
        follow_ups.0.push((self.host.now() + pause, pause, what));
    }

    /// Tries what is due.
    pub(crate) fn try_follow_ups(&self) {
        let now = self.host.now();
        let due: Vec<_> = locked(&self.follow_ups).0.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, pause, what) in due {
            let (me, later) = (self.me.clone(), what.clone());
            let started = self.start_thread("follow-up", move || {
                let Some(manager) = me.upgrade() else { return };
                if !manager.is_stopping() && !manager.try_now(&what) {
                    manager.follow_up_after(what, next(pause));
                }
            });
            if started.is_err() {
                self.follow_up_after(later, next(pause));
            }
        }
    }

    /// Returns whether it is over.
    pub(crate) fn try_now(&self, what: &FollowUp) -> bool {
        match what {
            FollowUp::Tidy => self.tidy_moments(),
            FollowUp::LetGo(id) => {
                let options = DeleteSnapshotOptions { force: true, ..DeleteSnapshotOptions::default() };
                self.delete_by_id(*id, options)
                    .inspect_err(|e| log::warn!("snapshot {id} does not go yet: {e}"))
                    .is_ok()
            }
            FollowUp::Serve(name) => self.serve_again_if_possible(name),
            FollowUp::Quiesce(disk, entry, at) => !self.is_there(disk, entry) || self.quiesced_since(disk, entry, *at),
            FollowUp::Open(disk, entry) => self.claimed("open a socket", disk, || {
                let is_due = self.is_there(disk, entry) && entry.may_be_read(&disk.facts()) && !entry.is_open();
                !is_due || self.open_socket(disk, entry)
            }),
            FollowUp::Restore(disk) => self.claimed("restore", disk, || {
                self.resume_restores(Some(disk.id));
                true
            }),
            FollowUp::Stay(disk) => self.claimed("serve again", disk, || {
                if !self.is_served(disk) {
                    return true;
                }
                let is_known = self.persist(std::slice::from_ref(disk)).is_ok();
                if is_known && locked(&disk.server).is_none() {
                    self.serve_what_stays(disk);
                }
                is_known
            }),
            FollowUp::Record(disk) => self.is_recorded(disk),
            FollowUp::Durable(disk) => self.claimed("store a record", disk, || {
                let is_recorded = !self.is_served(disk) || self.persist(std::slice::from_ref(disk)).is_ok();
                if is_recorded {
                    disk.disk.durability_recorded();
                }
                is_recorded
            }),
            FollowUp::Unmake(disks, made) => {
                let is_known = disks.iter().all(|disk| self.is_recorded(disk));
                if is_known && !self.is_stopping() {
                    self.remove_made(made);
                }
                is_known
            }
        }
    }

    /// Stores what the record of a disk should say, if it is there. Returns whether that is over.
    fn is_recorded(&self, disk: &Arc<DiskEntry>) -> bool {
        self.claimed("store a record", disk, || {
            !self.is_served(disk) || self.persist(std::slice::from_ref(disk)).is_ok()
        })
    }

    /// Does something with a disk claimed. Returns whether it is over, as it is when the daemon goes down before.
    pub(crate) fn claimed(&self, operation: &str, disk: &DiskEntry, work: impl FnOnce() -> bool) -> bool {
        let claim = self.claim_patiently(operation, disk.name.get().as_str(), ClaimKey::Entity(disk.id));
        claim.is_none_or(|_claim| work())
    }
}

/// How long after a failure it is tried again, if it was tried after `pause`.
fn next(pause: Duration) -> Duration {
    (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX)
}
