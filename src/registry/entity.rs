//! The entities: disks and volumes, their snapshots and bookmarks, and jobs.

use std::collections::BTreeMap;
use std::path::PathBuf;

use uuid::Uuid;

use crate::control::api::{JobKind, JobState};
use crate::control::{Name, SnapshotRef};

/// Everything that is remembered at one moment, served or not.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    disks: BTreeMap<Uuid, Disk>,
    jobs: BTreeMap<u64, Job>,
}

/// A disk or a volume.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Stays the same as long as it exists.
    pub id: Uuid,
    /// How commands find it.
    pub name: Name,
    /// What it has to do with others.
    pub kind: Kind,
    /// Whether it is served.
    pub phase: Phase,
    /// Whether its record cannot be read, so that nobody knows what it needs.
    pub is_unreadable: bool,
    /// Whether nobody may write it.
    pub is_readonly: bool,
    /// Why it cannot be used although it is served: a failed sync, a lost base.
    pub failure: Option<String>,
    /// How many frontends are connected.
    pub frontends: u32,
    /// Whether its socket is called after it.
    pub is_socket_named: bool,
    /// The legs of its mirror; none if it has no mirror.
    pub legs: Vec<Leg>,
    /// Its restore in place, if one is under way.
    pub restore: Option<Restore>,
    /// Whether a copy that makes it independent was begun and is not done.
    pub has_work: bool,
    /// Whether its newest content is in a log above its full image.
    pub is_in_log: bool,
    /// Oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Oldest first.
    pub bookmarks: Vec<Bookmark>,
}

/// One image of a mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Where it is.
    pub path: PathBuf,
    /// How far it has what the disk has.
    pub state: LegState,
}

/// How far a leg has what its disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LegState {
    /// It has everything.
    InSync,
    /// What it lacks is copied to it, or will be.
    Syncing,
    /// A snapshot holds it, and it comes back when that goes.
    Held {
        /// The snapshot's identifier.
        by: Uuid,
    },
    /// It is left out.
    Failed,
}

/// What a disk has to do with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is a disk, and stands on nothing.
    Disk,
    /// It is a volume that reads through a snapshot.
    Volume(Source),
    /// It is a volume that stood on a snapshot, and has everything itself now.
    Independent(Source),
}

/// What a volume was made off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The snapshot's identifier; of what an independent volume stood on, it may be gone.
    pub snapshot: Uuid,
    /// The identifier of the disk or volume that it is, or was, a snapshot of.
    pub disk: Uuid,
}

/// Whether a disk is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// On its socket.
    Served,
    /// Its content is kept and its socket is closed.
    Disabled,
    /// It is remembered only.
    Unserved {
        /// What it lacks.
        why: String,
    },
}

/// A restore in place.
#[derive(Clone, Debug)]
pub struct Restore {
    /// The snapshot that is restored.
    pub source: Uuid,
    /// Snapshots that the source reads through, down to the last full image.
    pub through: Vec<Uuid>,
    /// Whether what is not copied yet is lost.
    pub is_lost: bool,
}

/// A snapshot of a disk or volume.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Stays the same as long as it exists.
    pub id: Uuid,
    /// Its name among those of its disk.
    pub name: Name,
    /// Shared by the snapshots of one cut.
    pub group: Uuid,
    /// Where it is in its life.
    pub phase: SnapshotPhase,
    /// Why it cannot be vouched for.
    pub broken: Option<String>,
    /// How many frontends read it.
    pub readers: u32,
    /// Whether its socket is called after it.
    pub is_socket_named: bool,
    /// How many frontends from before the cut still write it.
    pub old_frontends: u32,
    /// The volume for whose update it was taken, or the disk for whose restore.
    pub taken_for: Option<Uuid>,
    /// Whether it leaves a bookmark when it goes.
    pub keeps_bookmark: bool,
    /// Other snapshots of the same disk that it reads through, the nearest first.
    pub through: Vec<Uuid>,
}

/// Where a snapshot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotPhase {
    /// Requests of its epoch still run.
    Draining,
    /// It never changes again.
    Quiesced,
    /// It is being deleted.
    Going,
    /// Only its record is left: its content was lost.
    Lost,
}

/// What is left of a snapshot that was deleted.
#[derive(Clone, Debug)]
pub struct Bookmark {
    /// The snapshot's identifier.
    pub id: Uuid,
    /// The snapshot's name.
    pub name: Name,
    /// The volume for whose update its snapshot was taken: no user asked for such a bookmark.
    pub taken_for: Option<Uuid>,
}

/// A job that works on a disk.
#[derive(Clone, Debug)]
pub struct Job {
    /// Never given twice.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// The disk that it works on.
    pub disk: Uuid,
    /// The snapshot that it deletes.
    pub snapshot: Option<Uuid>,
    /// How far it is.
    pub state: JobState,
    /// Whether it was told to go slowly.
    pub is_paced: bool,
}

impl Registry {
    /// A registry of these.
    #[must_use]
    pub fn new(disks: impl IntoIterator<Item = Disk>, jobs: impl IntoIterator<Item = Job>) -> Registry {
        Registry {
            disks: disks.into_iter().map(|disk| (disk.id, disk)).collect(),
            jobs: jobs.into_iter().map(|job| (job.id, job)).collect(),
        }
    }

    /// The same with what each restore reads through.
    #[must_use]
    pub fn with_ways_of_restores(mut self) -> Registry {
        let source = |disk: &Disk| Some((disk.id, disk.restore.as_ref()?.source));
        let restores: Vec<(Uuid, Uuid)> = self.disks.values().filter_map(source).collect();
        for (id, source) in restores {
            let through = self.through(source);
            if let Some(restore) = self.disks.get_mut(&id).and_then(|disk| disk.restore.as_mut()) {
                restore.through = through;
            }
        }
        self
    }

    /// All disks and volumes.
    pub fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.disks.values()
    }

    /// All jobs, the oldest first.
    pub fn jobs(&self) -> impl DoubleEndedIterator<Item = &Job> {
        self.jobs.values()
    }

    /// The disk or volume with this identifier.
    #[must_use]
    pub fn disk(&self, id: Uuid) -> Option<&Disk> {
        self.disks.get(&id)
    }

    /// The disk or volume of this name.
    #[must_use]
    pub fn named(&self, name: &Name) -> Option<&Disk> {
        self.disks.values().find(|disk| disk.name == *name)
    }

    /// A job.
    #[must_use]
    pub fn job(&self, id: u64) -> Option<&Job> {
        self.jobs.get(&id)
    }

    /// The snapshot with this identifier, and its disk.
    #[must_use]
    pub fn snapshot(&self, id: Uuid) -> Option<(&Disk, &Snapshot)> {
        self.disks.values().find_map(|disk| Some((disk, disk.snapshots.iter().find(|s| s.id == id)?)))
    }

    /// A snapshot by its name, and its disk.
    #[must_use]
    pub fn snapshot_named(&self, reference: &SnapshotRef) -> Option<(&Disk, &Snapshot)> {
        let disk = self.named(&reference.disk)?;
        Some((disk, disk.snapshot(&reference.name)?))
    }

    /// The newest job of such a kind on a disk that is not done.
    #[must_use]
    pub fn job_on(&self, disk: Uuid, is_it: impl Fn(&Job) -> bool) -> Option<&Job> {
        self.jobs.values().rev().find(|job| job.disk == disk && job.state != JobState::Done && is_it(job))
    }

    pub(super) fn disks_mut(&mut self) -> &mut BTreeMap<Uuid, Disk> {
        &mut self.disks
    }

    pub(super) fn jobs_mut(&mut self) -> &mut BTreeMap<u64, Job> {
        &mut self.jobs
    }
}

impl Disk {
    /// Whether it is a volume, also an independent one.
    #[must_use]
    pub fn is_volume(&self) -> bool {
        self.kind != Kind::Disk
    }

    /// The snapshots that it stands on and is restored from.
    pub fn sources(&self) -> impl Iterator<Item = Uuid> {
        let on = match self.kind {
            Kind::Volume(on) => Some(on.snapshot),
            Kind::Disk | Kind::Independent(_) => None,
        };
        on.into_iter().chain(self.restore.as_ref().map(|restore| restore.source))
    }

    /// Whether it is only remembered.
    #[must_use]
    pub fn is_unserved(&self) -> bool {
        matches!(self.phase, Phase::Unserved { .. })
    }

    /// Its snapshot of that name.
    #[must_use]
    pub fn snapshot(&self, name: &Name) -> Option<&Snapshot> {
        self.snapshots.iter().find(|s| s.name == *name)
    }

    /// Its bookmark of that name. What is still a snapshot is none.
    #[must_use]
    pub fn bookmark(&self, name: &Name) -> Option<&Bookmark> {
        self.bookmarks.iter().find(|b| b.name == *name).filter(|_| self.snapshot(name).is_none())
    }

    /// The full name of one of its snapshots or bookmarks.
    #[must_use]
    pub fn reference(&self, name: &Name) -> SnapshotRef {
        SnapshotRef { disk: self.name.clone(), name: name.clone() }
    }

    /// How it is spoken of.
    #[must_use]
    pub fn title(&self) -> String {
        format!("{} {}", if self.is_volume() { "volume" } else { "disk" }, self.name)
    }
}
