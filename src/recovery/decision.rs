//! A decision, as a value: what becomes of a disk, its versions, tables, legs, bookmarks and restore.

use std::path::PathBuf;

use uuid::Uuid;

use super::evidence::Durable;
use super::{Shutdown, Why};
use crate::door::{LegState, PairFacts};
use crate::store::{Believed, DiskRecord, PackFacts, RestorePhase, SnapshotRecord, Work};

/// What a start makes of a disk.
#[derive(Debug)]
pub struct Recovery {
    /// What is remembered of it. A cut that was being prepared is settled.
    pub record: DiskRecord,
    /// How the daemon ended.
    pub shutdown: Shutdown,
    /// What is served.
    pub disk: Content,
    /// Its size, as far as its full image can be looked at.
    pub size_bytes: Option<u64>,
    /// The size of its full image, if that has room for more: the disk grows into it.
    pub grows_to: Option<u64>,
    /// Its mirror, if it has one that can be looked at.
    pub mirror: Option<MirrorRecovery>,
    /// Oldest first; the last one is live, and the first one of a volume shows what it stands on.
    pub versions: Vec<VersionRecovery>,
    /// By the order of the record: what was changed up to each bookmark.
    pub bookmarks: Vec<Option<Result<ChangedUse, Why>>>,
    /// Discards that were put off at a clean stop: the seal of their table, or why they are forgotten. They are advice.
    pub discards: Option<Result<Uuid, Why>>,
    /// A restore in place that goes on. One that has not begun is forgotten, and so is one that is over.
    pub restore: Option<RestoreRecovery>,
}

/// What is served of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Everything that was acknowledged.
    Whole,
    /// What was flushed.
    AsFlushed,
    /// It is there, and each request on it fails: what it stands on, or is restored from, is lost, but not its own content.
    Hollow(Why),
    /// It is not opened, and nothing of it is changed.
    Unserved(Why),
}

/// Where a version stands in its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It shows what a volume stands on.
    Origin,
    /// The snapshot at this place of the record.
    Frozen(usize),
    /// The live version.
    Live,
}

/// What becomes of a version.
#[derive(Debug)]
pub struct VersionRecovery {
    /// Its stable name.
    pub id: Uuid,
    /// Its first epoch.
    pub began: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Where it stands.
    pub role: Role,
    /// Whether the mirror was split when it began; of one whose elders in its segment are lost, when they began.
    pub splits: bool,
    /// Its layer, or why there is none.
    pub layer: Result<LayerUse, Why>,
    /// Why it cannot be vouched for, if so.
    pub broken: Option<Why>,
    /// What is known of its changes. None if nothing was noted.
    pub changed: Option<Result<ChangedUse, Why>>,
}

/// How a layer is taken up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerUse {
    /// It is the disk's full image: its own, its mirror, or what a volume stands on.
    Base,
    /// A full image beside that: a leg that a snapshot has for itself, or that of a volume that became independent.
    Full(PathBuf),
    /// A log, with its durable table.
    Log(ImageUse, TableUse),
    /// What is saved for a frozen version.
    Saved(ImageUse, TableUse),
}

/// How the image of a layer is taken up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageUse {
    /// Where it is.
    pub path: PathBuf,
    /// If it is a pack: how that is taken up.
    pub pack: Option<PackUse>,
}

/// How a pack is taken up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackUse {
    /// What is believed of it.
    pub believed: Believed,
    /// What was found of it.
    pub facts: PackFacts,
}

/// Which copy of a table is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableSource {
    /// What a clean stop saved under this seal.
    Saved(Uuid),
    /// The run table, which a daemon left that was killed in this boot.
    Run,
    /// The durable copy, as it was committed last; and why no other one is right, where that is not to be expected.
    Committed(Option<Why>),
}

/// How a table is taken up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableUse {
    /// Which copy of it is right.
    pub source: TableSource,
    /// The durable copy that goes on with it. None if it has none.
    pub durable: Option<Durable>,
    /// What of the durable copy is damaged, and written anew.
    pub mended: Option<Why>,
    /// Whether its version cannot be vouched for. Others go on reading through it.
    pub is_broken: bool,
}

/// Where a dirty bitmap is that is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangedUse {
    /// A clean stop saved it under this seal.
    Saved(Uuid),
    /// In the run directory.
    Run,
}

/// What becomes of a mirror.
#[derive(Debug)]
pub struct MirrorRecovery {
    /// In the order of the record.
    pub legs: Vec<(PathBuf, LegUse)>,
    /// What its bitmap says.
    pub facts: Option<PairFacts>,
}

/// What becomes of a leg.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LegUse {
    /// It is a part of the mirror, in this state.
    InUse(LegState),
    /// A snapshot has it for itself.
    Held,
    /// It is not opened, and why.
    Unused(Why),
    /// It is no leg any more: it goes with a snapshot that was being deleted and whose content is lost, so nobody knows what
    /// is on it. Its file stays.
    Forgotten,
}

/// What becomes of a restore in place.
#[derive(Debug)]
pub struct RestoreRecovery {
    /// The table of what is pending.
    pub pending: Result<TableUse, Why>,
}

/// What becomes of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotFate {
    /// It is whole.
    Kept,
    /// Its deletion goes on.
    Deleting,
    /// It was being deleted, and nothing is left that others need.
    Gone,
    /// It cannot be vouched for.
    Broken(Why),
    /// Its disk is not served, and so nothing happens to it.
    Waits,
}

/// A job that is there again after a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// What it does.
    pub kind: JobKind,
    /// Whether it waits to be resumed, because a user had stopped it; else it goes on.
    pub is_stopped: bool,
}

/// What a job does that goes on after a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// It deletes a snapshot.
    Deletion {
        /// The snapshot's name.
        name: String,
        /// Whether a log is folded into what it has; otherwise others take over what they need of it.
        folds: bool,
    },
    /// It copies back what is restored.
    Restore,
    /// It completes or updates a volume.
    Work(Work),
    /// It brings a leg up to date.
    Resync,
}

impl Recovery {
    /// The jobs that a start goes on with.
    #[must_use]
    pub fn jobs(&self) -> Vec<Job> {
        if matches!(self.disk, Content::Unserved(_)) {
            return Vec::new();
        }
        let job = |kind, is_stopped| Job { kind, is_stopped };
        let deleted = self.snapshots().filter(|(_, fate)| *fate == SnapshotFate::Deleting);
        let deletions = deleted.map(|(s, _)| {
            job(
                JobKind::Deletion { name: s.name.clone(), folds: self.folds(s.id) },
                s.deletion.is_some_and(|d| d.stopped),
            )
        });
        // What is pending is not there while the source is lost.
        let restores = self.restore.is_some() && !matches!(self.disk, Content::Hollow(Why::RestoreLost { .. }));
        let restore = self
            .record
            .restore
            .iter()
            .filter(|_| restores)
            .map(|r| job(JobKind::Restore, r.phase == RestorePhase::Stopped));
        let work = self.record.work.iter().map(|w| job(JobKind::Work(w.work.clone()), w.stopped));
        let is_stopped = self.record.mirror.as_ref().is_some_and(|mirror| mirror.stopped);
        let resync = self.mirror.iter().filter(|m| m.is_behind()).map(|_| job(JobKind::Resync, is_stopped));
        deletions.chain(restore).chain(work).chain(resync).collect()
    }

    /// Whether a version has the full image of its segment, and a log lies above it.
    fn folds(&self, id: Uuid) -> bool {
        let at = self.versions.iter().position(|v| v.id == id);
        let has_all = |v: &VersionRecovery| matches!(v.layer, Ok(LayerUse::Base | LayerUse::Full(_)));
        at.is_some_and(|at| has_all(&self.versions[at]) && self.versions.get(at + 1).is_some_and(|next| !next.splits))
    }

    /// The snapshots as they are remembered, oldest first, each with what becomes of it.
    pub fn snapshots(&self) -> impl Iterator<Item = (&SnapshotRecord, SnapshotFate)> {
        self.record.snapshots.iter().enumerate().map(|(at, record)| (record, self.fate_of(at, record)))
    }

    fn fate_of(&self, at: usize, record: &SnapshotRecord) -> SnapshotFate {
        let version = self.version(Role::Frozen(at));
        let why = version.and_then(|v| v.broken.clone().or_else(|| v.layer.as_ref().err().cloned()));
        let why = record.broken.clone().map(Why::Said).or(why);
        match (&self.disk, why) {
            (Content::Unserved(_), Some(why)) if record.deletion.is_none() => SnapshotFate::Broken(why),
            (Content::Unserved(_), _) => SnapshotFate::Waits,
            _ if record.deletion.is_some() && version.is_none_or(|v| v.layer.is_err()) => SnapshotFate::Gone,
            _ if record.deletion.is_some() => SnapshotFate::Deleting,
            (_, Some(why)) => SnapshotFate::Broken(why),
            (Content::Hollow(why), None) if self.record.volume.is_some() => SnapshotFate::Broken(why.clone()),
            (_, None) => SnapshotFate::Kept,
        }
    }

    pub(super) fn version(&self, role: Role) -> Option<&VersionRecovery> {
        self.versions.iter().find(|v| v.role == role)
    }

    /// Why it is not served, if so.
    #[must_use]
    pub fn why_unserved(&self) -> Option<&Why> {
        match &self.disk {
            Content::Unserved(why) => Some(why),
            Content::Whole | Content::AsFlushed | Content::Hollow(_) => None,
        }
    }

    /// Why all requests on it fail, if so.
    #[must_use]
    pub fn why_hollow(&self) -> Option<&Why> {
        match &self.disk {
            Content::Hollow(why) => Some(why),
            Content::Whole | Content::AsFlushed | Content::Unserved(_) => None,
        }
    }
}

impl MirrorRecovery {
    /// Whether a leg is to be brought up to date: also one whose split never came to be, and no snapshot has it.
    fn is_behind(&self) -> bool {
        let in_state =
            |wanted: LegState| self.legs.iter().filter(move |(_, leg)| *leg == LegUse::InUse(wanted.clone()));
        let may_differ = self.facts.as_ref().is_some_and(|facts| facts.regions > 0 || !facts.damaged.is_empty());
        in_state(LegState::Resynchronising).count() > 0
            || in_state(LegState::Split).count() > 0
            || (in_state(LegState::InSync).count() == 2 && may_differ)
    }
}

impl LayerUse {
    pub(super) fn table(&self) -> Option<&TableUse> {
        match self {
            LayerUse::Log(_, table) | LayerUse::Saved(_, table) => Some(table),
            LayerUse::Base | LayerUse::Full(_) => None,
        }
    }
}
