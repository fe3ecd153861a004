//! What may stand in the way of a command: everything that is the case with a disk or a snapshot and that some command
//! must mind. What each command minds is in [`super::table`].

use uuid::Uuid;

use super::advice::Step;
use super::command::Command;
use super::edge::EdgeKind;
use super::entity::{Disk, Job, Kind, Phase, Registry, Restore, Snapshot, SnapshotPhase};
use crate::control::SnapshotRef;
use crate::control::api::{JobKind, JobState};

/// What kind of thing stands in the way. In the order in which they are cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObstacleKind {
    /// It is remembered and not served.
    Unserved,
    /// Its record cannot be read.
    Unreadable,
    /// It is on its socket.
    Served,
    /// Its socket is closed.
    Disabled,
    /// It is a volume, or was before it was independent.
    IsVolume,
    /// It reads through a snapshot.
    OnSnapshot,
    /// It has everything itself.
    Independent,
    /// A sync has failed, or its base is lost.
    Failed,
    /// Nobody may write it.
    ReadOnly,
    /// A volume stands on it, or on one of its snapshots.
    StoodOn,
    /// Something whose record cannot be read may need it, or one of its snapshots.
    MayBeNeeded,
    /// A disk is restored from it, or from one of its snapshots.
    RestoredFrom,
    /// What a disk is restored from reads through it, or through one of its snapshots.
    RestoredThrough,
    /// A disk was being restored from it, or through it, and waits for what it lacks.
    RestoreWaits,
    /// What is not copied yet of its own restore is lost.
    RestoreLost,
    /// It is being restored itself.
    Restoring,
    /// A job copies what it does not own.
    Working,
    /// Such a job was stopped or has failed.
    WorkLeft,
    /// A job synchronises one of its legs.
    Syncing,
    /// A job gives back the storage of a snapshot that is gone.
    GivingBack,
    /// A job deletes it, or one of its snapshots.
    Going,
    /// Such a job was stopped or has failed.
    GoingStopped,
    /// Frontends from before the cut still write it, or one of its snapshots.
    OldFrontends,
    /// It, or one of its snapshots, still drains.
    Draining,
    /// It cannot be vouched for.
    Broken,
    /// It, or one of its snapshots, is read.
    ReadBy,
    /// A frontend is connected.
    Attached,
    /// A frontend is connected to a socket that is called after it, or after one of its snapshots.
    NamedSocket,
    /// It has snapshots.
    HasSnapshots,
    /// It has bookmarks that users asked for.
    HasBookmarks,
    /// It has bookmarks that updates left.
    LeftBookmarks,
    /// Its newest content is in a log.
    InLog,
    /// It has two legs.
    Mirrored,
    /// A job that gives storage back was stopped or has failed.
    GiveBackLeft,
    /// It is being deleted, and leaves no bookmark.
    LeavesNone,
    /// It has no second leg.
    NoSecondLeg,
    /// A snapshot holds a leg that is needed.
    LegHeld,
    /// A leg that is needed is not in sync.
    LegNotInSync,
    /// It has as many legs as a mirror has.
    LegsTaken,
    /// Something else has the name that is wanted.
    NameTaken,
}

impl ObstacleKind {
    /// All of them, in order.
    pub const ALL: [ObstacleKind; 40] = {
        use ObstacleKind::*;
        [
            Unserved,
            Unreadable,
            Served,
            Disabled,
            IsVolume,
            OnSnapshot,
            Independent,
            Failed,
            ReadOnly,
            StoodOn,
            MayBeNeeded,
            RestoredFrom,
            RestoredThrough,
            RestoreWaits,
            RestoreLost,
            Restoring,
            Working,
            WorkLeft,
            Syncing,
            GivingBack,
            Going,
            GoingStopped,
            OldFrontends,
            Draining,
            Broken,
            ReadBy,
            Attached,
            NamedSocket,
            HasSnapshots,
            HasBookmarks,
            LeftBookmarks,
            InLog,
            Mirrored,
            GiveBackLeft,
            LeavesNone,
            NoSecondLeg,
            LegHeld,
            LegNotInSync,
            LegsTaken,
            NameTaken,
        ]
    };
}

/// Something that stands in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// What kind.
    pub kind: ObstacleKind,
    /// The same in words, as a sentence of its own.
    pub what: String,
    /// What clears it, as far as anything does.
    pub cleared_by: Vec<Step>,
}

fn obstacle(kind: ObstacleKind, what: String, cleared_by: Vec<Step>) -> Obstacle {
    Obstacle { kind, what, cleared_by }
}

fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

pub(super) fn delete_snapshot(snapshot: SnapshotRef) -> Command {
    Command::DeleteSnapshot { snapshot, force: false, keep_bookmark: false }
}

fn bookmarks_of(disk: &Disk) -> impl Iterator<Item = Obstacle> {
    let of = |is_left: bool| disk.bookmarks.iter().filter(move |b| b.taken_for.is_some() == is_left);
    let found = |is_left: bool, kind, whose: &str| {
        let steps = of(is_left).map(|b| Step::Run(Command::DeleteBookmark { bookmark: disk.reference(&b.name) }));
        let steps: Vec<Step> = steps.collect();
        let what = format!("{} has {}{whose}", disk.title(), counted(steps.len(), "bookmark"));
        (!steps.is_empty()).then(|| obstacle(kind, what, steps))
    };
    let users = found(false, ObstacleKind::HasBookmarks, "");
    users.into_iter().chain(found(true, ObstacleKind::LeftBookmarks, " that updates left"))
}

impl Registry {
    /// Everything that is the case with a disk or volume, and with its snapshots.
    #[must_use]
    pub fn of_disk(&self, disk: &Disk) -> Vec<Obstacle> {
        let mut found = self.of_itself(disk);
        let own: Vec<Uuid> = disk.snapshots.iter().map(|s| s.id).collect();
        found.extend(self.needs(disk, &own));
        for snapshot in &disk.snapshots {
            found.extend(self.life_of(disk, snapshot));
        }
        let title = disk.title();
        if disk.frontends > 0 {
            let what = format!("{title} has {} connected", counted(disk.frontends as usize, "frontend"));
            found.push(obstacle(ObstacleKind::Attached, what, vec![Step::Disconnect(disk.name.clone())]));
        }
        if disk.frontends > 0 && disk.is_socket_named {
            let count = counted(disk.frontends as usize, "frontend");
            let what = format!("{title} has {count} connected to its socket, which is called after it");
            found.push(obstacle(ObstacleKind::NamedSocket, what, vec![Step::Disconnect(disk.name.clone())]));
        }
        let delete = |s: &Snapshot| Step::Run(delete_snapshot(disk.reference(&s.name)));
        let deletions: Vec<Step> = disk.snapshots.iter().map(delete).collect();
        if !disk.snapshots.is_empty() {
            let what = format!("{title} has {}", counted(disk.snapshots.len(), "snapshot"));
            found.push(obstacle(ObstacleKind::HasSnapshots, what, deletions.clone()));
        }
        found.extend(bookmarks_of(disk));
        if disk.is_in_log {
            let what = format!("the newest content of {title} is in a log, which is folded when its snapshots go");
            found.push(obstacle(ObstacleKind::InLog, what, deletions));
        }
        if !disk.legs.is_empty() {
            let unmirror = Step::Run(Command::Unmirror { disk: disk.name.clone(), leg: None });
            found.push(obstacle(ObstacleKind::Mirrored, format!("{title} has a mirror"), vec![unmirror]));
        }
        found.sort_by_key(|o| o.kind);
        found
    }

    /// Everything that is the case with a snapshot, and with its disk as far as that concerns it.
    #[must_use]
    pub fn of_snapshot(&self, disk: &Disk, snapshot: &Snapshot) -> Vec<Obstacle> {
        let mut found = self.of_itself(disk);
        found.extend(self.needs(disk, &[snapshot.id]));
        found.extend(self.life_of(disk, snapshot));
        if snapshot.phase == SnapshotPhase::Going && !snapshot.keeps_bookmark {
            let what = format!("snapshot {} is being deleted without a bookmark", disk.reference(&snapshot.name));
            found.push(obstacle(ObstacleKind::LeavesNone, what, Vec::new()));
        }
        if let Some(why) = &snapshot.broken {
            let what = format!("snapshot {} is broken: {why}", disk.reference(&snapshot.name));
            found.push(obstacle(ObstacleKind::Broken, what, Vec::new()));
        }
        found.sort_by_key(|o| o.kind);
        found
    }

    /// What is the case with a disk or volume by itself.
    fn of_itself(&self, disk: &Disk) -> Vec<Obstacle> {
        let (title, name) = (disk.title(), &disk.name);
        let mut found = Vec::new();
        let mut add = |kind, what: String, steps| found.push(obstacle(kind, what, steps));
        match &disk.phase {
            Phase::Unserved { why } => {
                let what = format!("{title} is not served: {why}");
                add(ObstacleKind::Unserved, what, vec![Step::PutBack(name.clone())]);
            }
            Phase::Served => {
                let disable = Command::Disable { volume: name.clone(), force: false };
                add(ObstacleKind::Served, format!("{title} is served"), vec![Step::Run(disable)]);
            }
            Phase::Disabled => {
                let enable = Command::Enable { volume: name.clone(), fresh: false };
                add(ObstacleKind::Disabled, format!("{title} is disabled"), vec![Step::Run(enable)]);
            }
        }
        if disk.is_unreadable {
            let what = format!("nobody knows what {title} has, and what needs it");
            add(ObstacleKind::Unreadable, what, vec![Step::PutBack(name.clone())]);
        }
        match disk.kind {
            Kind::Disk => {}
            Kind::Volume(_) => {
                add(ObstacleKind::IsVolume, format!("{name} is a volume"), Vec::new());
                let complete = Command::Complete { volume: name.clone() };
                add(ObstacleKind::OnSnapshot, format!("{title} stands on a snapshot"), vec![Step::Run(complete)]);
            }
            Kind::Independent(_) => {
                add(ObstacleKind::IsVolume, format!("{name} is a volume"), Vec::new());
                add(ObstacleKind::Independent, format!("{title} is independent already"), Vec::new());
            }
        }
        if let Some(why) = &disk.failure {
            add(ObstacleKind::Failed, format!("{title}: {why}"), vec![Step::PutBack(name.clone())]);
        }
        if disk.is_readonly {
            let set = Command::Set { disk: name.clone(), readonly: Some(false) };
            add(ObstacleKind::ReadOnly, format!("{title} is read-only"), vec![Step::Run(set)]);
        }
        if let Some(restore) = &disk.restore {
            found.push(self.own_restore(disk, restore));
        }
        let job = |is_it: &dyn Fn(&Job) -> bool| self.job_on(disk.id, is_it);
        let copies = |j: &Job| matches!(j.kind, JobKind::Migrate | JobKind::Update);
        match job(&copies) {
            Some(job) if job.state == JobState::Running => {
                let what = format!("{title}: job {} copies what it does not own", job.id);
                // Waiting for it would make the volume another thing; what is copied stays copied.
                found.push(obstacle(ObstacleKind::Working, what, vec![Step::Run(Command::StopJob { job: job.id })]));
            }
            Some(job) if disk.has_work => {
                let what = format!("{title}: job {}, which copies what it does not own, is {}", job.id, job.state);
                found.push(obstacle(ObstacleKind::WorkLeft, what, go_on_with(job)));
            }
            _ => {}
        }
        // One whose snapshot is gone still gives storage back.
        let is_there = |id: Uuid| disk.snapshots.iter().any(|s| s.id == id);
        let gives_back = |j: &Job| j.snapshot.is_some_and(|id| !is_there(id));
        if let Some(job) = job(&|j| j.state == JobState::Running && gives_back(j)) {
            let what = format!("{title}: job {} gives back what a deleted snapshot had", job.id);
            found.push(obstacle(ObstacleKind::GivingBack, what, go_on_with(job)));
        }
        if let Some(job) = job(&|j| j.state != JobState::Running && gives_back(j)) {
            let what =
                format!("{title}: job {}, which gives back what a deleted snapshot had, is {}", job.id, job.state);
            found.push(obstacle(ObstacleKind::GiveBackLeft, what, go_on_with(job)));
        }
        if let Some(job) = job(&|j| j.kind == JobKind::Mirror && j.state == JobState::Running) {
            let what = format!("{title}: job {} synchronises one of its legs", job.id);
            found.push(obstacle(ObstacleKind::Syncing, what, go_on_with(job)));
        }
        found
    }

    fn own_restore(&self, disk: &Disk, restore: &Restore) -> Obstacle {
        let title = disk.title();
        let from = self.name_of(restore.source);
        if restore.is_lost {
            let what = format!("{title} was being restored from {from}, and what was not copied yet cannot be had");
            return obstacle(ObstacleKind::RestoreLost, what, vec![Step::PutBack(disk.name.clone())]);
        }
        let (by, steps) = self.job_of_restore(disk);
        obstacle(ObstacleKind::Restoring, format!("{title} is being restored from {from}{by}"), steps)
    }

    /// By which job a disk is restored, and what ends that.
    fn job_of_restore(&self, disk: &Disk) -> (String, Vec<Step>) {
        match self.job_on(disk.id, |j| j.kind == JobKind::Restore) {
            Some(job) => (format!(" by job {}", job.id), go_on_with(job)),
            None => (String::new(), vec![Step::PutBack(disk.name.clone())]),
        }
    }

    /// Who needs one of these snapshots of a disk.
    fn needs(&self, disk: &Disk, snapshots: &[Uuid]) -> Vec<Obstacle> {
        let mut found: Vec<Obstacle> = Vec::new();
        for unreadable in self.disks().filter(|d| d.is_unreadable && d.id != disk.id && !snapshots.is_empty()) {
            let name = &unreadable.name;
            let what = format!("the record of {name} cannot be read, and it may need a snapshot of {}", disk.title());
            let forget = Step::Run(Command::Forget { disk: name.clone() });
            found.push(obstacle(ObstacleKind::MayBeNeeded, what, vec![forget]));
        }
        for id in snapshots {
            let edges: Vec<_> = self.edges().filter(|edge| edge.needed == *id).collect();
            let needers = |kind| {
                let of_kind = edges.iter().filter(move |edge| edge.kind == kind);
                let mut needers: Vec<&Disk> = of_kind.filter_map(|edge| self.disk(edge.needer)).collect();
                needers.sort_by(|one, other| one.name.cmp(&other.name));
                needers
            };
            let named = self.name_of(*id);
            let volumes = needers(EdgeKind::StandsOn);
            if !volumes.is_empty() {
                let names = volumes.iter().map(|v| v.name.as_str()).collect::<Vec<_>>().join(", ");
                let what = if volumes.len() == 1 { "volume" } else { "volumes" };
                let delete = |v: &&Disk| Step::Run(Command::DeleteVolume { volume: v.name.clone(), force: false });
                let what = format!("snapshot {named} is needed by {what} {names}");
                found.push(obstacle(ObstacleKind::StoodOn, what, volumes.iter().map(delete).collect()));
            }
            for (edge, kind, way) in [
                (EdgeKind::RestoredFrom, ObstacleKind::RestoredFrom, "from"),
                (EdgeKind::RestoredThrough, ObstacleKind::RestoredThrough, "through"),
            ] {
                // The disk's own restore is said of the disk.
                for needer in needers(edge).into_iter().filter(|needer| needer.id != disk.id) {
                    let (by, steps) = self.job_of_restore(needer);
                    let what = format!("disk {} is being restored {way} snapshot {named}{by}", needer.name);
                    found.push(obstacle(kind, what, steps));
                }
            }
            let waits = |d: &&Disk| {
                d.restore.as_ref().is_some_and(|r| r.is_lost && (r.source == *id || r.through.contains(id)))
            };
            for needer in self.disks().filter(|d| d.id != disk.id).filter(waits) {
                let what = format!(
                    "disk {} is being restored from snapshot {named} and waits for it: whoever forces this gives up the rest of it",
                    needer.name
                );
                found.push(obstacle(ObstacleKind::RestoreWaits, what, vec![Step::PutBack(needer.name.clone())]));
            }
        }
        found
    }

    /// Where a snapshot is in its life.
    fn life_of(&self, disk: &Disk, snapshot: &Snapshot) -> Vec<Obstacle> {
        let reference = disk.reference(&snapshot.name);
        let mut found = Vec::new();
        match snapshot.phase {
            SnapshotPhase::Quiesced | SnapshotPhase::Lost => {}
            SnapshotPhase::Draining if snapshot.old_frontends > 0 => {
                let count = counted(snapshot.old_frontends as usize, "frontend");
                let what = format!("{count} from before the cut may still write snapshot {reference}");
                let over = Step::Run(Command::CutOver { snapshot: reference.clone() });
                found.push(obstacle(ObstacleKind::OldFrontends, what, vec![over]));
            }
            SnapshotPhase::Draining => {
                let what = format!("snapshot {reference} is still draining");
                found.push(obstacle(ObstacleKind::Draining, what, vec![Step::WaitForDrain(reference.clone())]));
            }
            SnapshotPhase::Going => {
                let job = self.job_on(disk.id, |j| j.snapshot == Some(snapshot.id));
                let delete = Step::Run(delete_snapshot(reference.clone()));
                let (kind, what, steps) = match job {
                    Some(job) if job.state == JobState::Running => {
                        (ObstacleKind::Going, format!("is being deleted by job {}", job.id), go_on_with(job))
                    }
                    Some(job) => {
                        let what = format!("is being deleted by job {}, which is {}", job.id, job.state);
                        (ObstacleKind::GoingStopped, what, go_on_with(job))
                    }
                    None => (ObstacleKind::GoingStopped, "is being deleted".to_owned(), vec![delete]),
                };
                found.push(obstacle(kind, format!("snapshot {reference} {what}"), steps));
            }
        }
        if snapshot.readers > 0 {
            let what =
                format!("snapshot {reference} is being read by {}", counted(snapshot.readers as usize, "frontend"));
            found.push(obstacle(ObstacleKind::ReadBy, what, vec![Step::DisconnectReaders(reference.clone())]));
        }
        if snapshot.readers > 0 && snapshot.is_socket_named {
            let count = counted(snapshot.readers as usize, "frontend");
            let what = format!("snapshot {reference} has {count} connected to its socket, which is called after it");
            found.push(obstacle(ObstacleKind::NamedSocket, what, vec![Step::DisconnectReaders(reference)]));
        }
        found
    }

    /// A snapshot's full name, also of one that is gone.
    fn name_of(&self, snapshot: Uuid) -> String {
        let found = self.snapshot(snapshot).map(|(disk, s)| disk.reference(&s.name).to_string());
        found.unwrap_or_else(|| "a snapshot that is not served".to_owned())
    }
}

/// What brings a job to its end.
fn go_on_with(job: &Job) -> Vec<Step> {
    let id = job.id;
    // One that was told to go slowly may take years.
    let hurry = job.is_paced.then_some(Command::HurryJob { job: id });
    let resume = matches!(job.state, JobState::Stopped | JobState::Failed).then_some(Command::ResumeJob { job: id });
    hurry.into_iter().chain(resume).chain([Command::WaitForJob { job: id }]).map(Step::Run).collect()
}
