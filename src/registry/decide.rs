//! Whether a command may be carried out, and what it then changes and needs.

use std::collections::BTreeSet;
use std::fmt;

use uuid::Uuid;

use super::advice::Step;
use super::claims::{ClaimKey, Wanted};
use super::command::Command;
use super::entity::{Disk, Registry, Snapshot};
use super::obstacle::{Obstacle, ObstacleKind, delete_snapshot};
use super::table::{Answer, Operation};
use crate::control::api::{JobKind, JobState};
use crate::control::{ApiError, ErrorCode, Name, SnapshotRef};

/// A command that may be carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The disks and volumes that it is about, in the order in which it names them.
    pub disks: Vec<Uuid>,
    /// The snapshot that it is about.
    pub snapshot: Option<Uuid>,
    /// What it changes and needs meanwhile.
    pub wanted: Wanted,
    /// What it waits for first.
    pub waits_for: Vec<Obstacle>,
}

/// Why a command is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The stable code of the first thing that stands in the way.
    pub code: ErrorCode,
    /// What stands in the way.
    pub what: Vec<String>,
    /// The commands that clear it, in their order; carried out, they make the command succeed.
    pub steps: Vec<Step>,
    /// What to do where no command helps.
    pub instead: Option<String>,
    /// What can be done besides, so that the command is another one.
    pub besides: Option<&'static str>,
    /// Whether all that stands in the way are connections: one of them may just be hanging up.
    pub may_pass: bool,
    /// The same command as it would not be refused, if force is enough.
    pub forced: Option<Box<Command>>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what.join("; "))
    }
}

/// How many steps an advice spells out.
const STEPS_SHOWN_MAX: usize = 6;

impl Refusal {
    /// One that no command clears.
    #[must_use]
    pub fn for_good(code: ErrorCode, what: impl Into<String>, instead: impl Into<String>) -> Refusal {
        Refusal {
            code,
            what: vec![what.into()],
            steps: Vec::new(),
            instead: Some(instead.into()),
            besides: None,
            may_pass: false,
            forced: None,
        }
    }

    /// What to do about it, as one line.
    #[must_use]
    pub fn advice(&self) -> String {
        if let Some(instead) = &self.instead {
            return instead.clone();
        }
        let mut shown: Vec<String> = self.steps.iter().take(STEPS_SHOWN_MAX).map(Step::to_string).collect();
        if self.steps.len() > STEPS_SHOWN_MAX {
            shown.push(format!("ask again, for {} more", self.steps.len() - STEPS_SHOWN_MAX));
        }
        let steps = (!shown.is_empty()).then(|| shown.join("; then "));
        let forced = self.forced.as_ref().map(|forced| format!("force it: {forced}"));
        let ways: Vec<String> = [self.besides.map(str::to_owned), steps, forced].into_iter().flatten().collect();
        if ways.is_empty() { self.code.action().to_owned() } else { ways.join("; or ") }
    }
}

/// An error that these steps clear; or something else, which makes the command another one.
#[must_use]
pub fn cleared_by(error: ApiError, steps: Vec<Step>, besides: Option<&'static str>) -> ApiError {
    if steps.is_empty() && besides.is_none() {
        return error;
    }
    let (code, what) = (error.code, vec![error.message]);
    Refusal { code, what, steps, instead: None, besides, may_pass: false, forced: None }.into()
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        let commands = refusal.steps.iter().filter(|step| matches!(step, Step::Run(_))).map(Step::to_string).collect();
        let error = ApiError::new(refusal.code, refusal.to_string()).with_action(refusal.advice());
        ApiError { commands, ..error }
    }
}

/// Decides. Two calls with the same values answer the same.
///
/// # Errors
/// What stands in the way, and what clears it.
pub fn decide(registry: &Registry, command: &Command) -> Result<Plan, Refusal> {
    Decision { registry, command }.run().map_err(|refusal| match refusal.instead {
        Some(_) => refusal,
        None => Refusal { steps: registry.steps_for(command), ..refusal },
    })
}

/// The same without the advice, which costs more than the decision.
pub(super) fn decide_only(registry: &Registry, command: &Command) -> Result<Plan, Vec<Obstacle>> {
    let decision = Decision { registry, command };
    match decision.run() {
        Ok(plan) => Ok(plan),
        Err(refusal) if refusal.instead.is_some() => Err(Vec::new()),
        Err(_) => Err(decision.in_the_way()),
    }
}

struct Decision<'a> {
    registry: &'a Registry,
    command: &'a Command,
}

/// What a command is about.
enum Target<'a> {
    Disk(Operation, &'a Disk),
    Snapshot(Operation, &'a Disk, &'a Snapshot),
}

impl<'a> Decision<'a> {
    fn run(&self) -> Result<Plan, Refusal> {
        let targets = self.targets()?;
        self.refuse_unrelated(&targets)?;
        match self.taken_name(&targets) {
            None => {}
            Some(Err(refusal)) => return Err(refusal),
            Some(Ok((code, taken))) => {
                return Err(Refusal {
                    code,
                    what: vec![taken.what],
                    steps: Vec::new(),
                    instead: None,
                    besides: Some("use another name"),
                    may_pass: false,
                    forced: None,
                });
            }
        }
        let mut plan = self.wanted(&targets);
        let mut refused: Option<Refusal> = None;
        for target in &targets {
            let (operation, name) = (target.operation(), target.disk().name.as_str());
            for obstacle in target.obstacles(self.registry, self.command) {
                match operation.about(obstacle.kind) {
                    Answer::Fine => {}
                    Answer::Waits => plan.waits_for.push(obstacle),
                    Answer::Forced if self.command.is_forced() => {}
                    Answer::Never => {
                        let is_volume = target.disk().is_volume();
                        let instead = operation.instead(obstacle.kind, (name, is_volume));
                        return Err(Refusal::for_good(target.code(obstacle.kind), obstacle.what, instead));
                    }
                    Answer::Forced | Answer::Refused => {
                        let refusal = refused.get_or_insert_with(|| Refusal {
                            code: target.code(obstacle.kind),
                            what: Vec::new(),
                            steps: Vec::new(),
                            instead: None,
                            besides: None,
                            may_pass: true,
                            forced: self.command.forced().map(Box::new),
                        });
                        if operation.about(obstacle.kind) == Answer::Refused {
                            refusal.forced = None;
                        }
                        if operation.besides(obstacle.kind).is_some() {
                            refusal.besides = operation.besides(obstacle.kind);
                        }
                        refusal.may_pass &= matches!(
                            obstacle.kind,
                            ObstacleKind::ReadBy | ObstacleKind::Attached | ObstacleKind::NamedSocket
                        );
                        if !refusal.what.contains(&obstacle.what) {
                            refusal.what.push(obstacle.what);
                        }
                    }
                }
            }
        }
        refused.map_or(Ok(plan), Err)
    }

    /// What refuses the command and can be cleared, in the order in which it is.
    fn in_the_way(&self) -> Vec<Obstacle> {
        let Ok(targets) = self.targets() else { return Vec::new() };
        let refuses = |operation: Operation, obstacle: &Obstacle| match operation.about(obstacle.kind) {
            Answer::Refused => true,
            Answer::Forced => !self.command.is_forced(),
            Answer::Fine | Answer::Waits | Answer::Never => false,
        };
        let of = |target: &Target| {
            let operation = target.operation();
            let all = target.obstacles(self.registry, self.command).into_iter();
            all.filter(|obstacle| refuses(operation, obstacle)).collect::<Vec<_>>()
        };
        let mut found: Vec<Obstacle> = targets.iter().flat_map(of).collect();
        found.sort_by_key(|obstacle| obstacle.kind);
        let taken = self.taken_name(&targets).and_then(Result::ok).map(|(_, taken)| taken);
        taken.into_iter().chain(found).collect()
    }

    fn targets(&self) -> Result<Vec<Target<'a>>, Refusal> {
        use Operation as Op;
        let on_disk = |op, name: &Name| Ok(vec![Target::Disk(op, self.disk(name)?)]);
        let on_volume = |op, name: &Name| Ok(vec![Target::Disk(op, self.volume(name)?)]);
        let on_snapshot = |op, reference: &SnapshotRef| {
            let (disk, snapshot) = self.snapshot(reference)?;
            Ok(vec![Target::Snapshot(op, disk, snapshot)])
        };
        match self.command {
            Command::CreateSnapshot { disks, .. } => {
                disks.iter().map(|name| Ok(Target::Disk(Op::Freeze, self.disk(name)?))).collect()
            }
            Command::CutOver { snapshot } => on_snapshot(Op::CutOver, snapshot),
            Command::DeleteSnapshot { snapshot, keep_bookmark, .. } => {
                let (disk, found) = self.snapshot(snapshot)?;
                let left = keep_bookmark.then_some(Target::Snapshot(Op::LeaveBookmark, disk, found));
                Ok([Target::Snapshot(Op::DeleteSnapshot, disk, found)].into_iter().chain(left).collect())
            }
            Command::DeleteBookmark { bookmark } => {
                let disk = self.registry.named(&bookmark.disk).filter(|d| d.bookmark(&bookmark.name).is_some());
                Ok(vec![Target::Disk(Op::DeleteBookmark, disk.ok_or_else(|| self.no_bookmark(bookmark))?)])
            }
            Command::RemoveDisk { disk, .. } => on_disk(Op::RemoveDisk, disk),
            Command::Forget { disk } => on_disk(Op::Forget, disk),
            Command::Set { disk, readonly } => {
                let disk = self.disk(disk)?;
                let is_other = *readonly == Some(true) && !disk.is_readonly || readonly.is_some() && disk.is_volume();
                Ok(vec![Target::Disk(if is_other { Op::SetReadOnly } else { Op::Set }, disk)])
            }
            Command::Rename { disk, is_volume: true, .. } => on_volume(Op::Rename, disk),
            Command::Rename { disk, .. } => on_disk(Op::Rename, disk),
            Command::Mirror { disk, .. } => on_disk(Op::Mirror, disk),
            Command::Unmirror { disk, .. } => on_disk(Op::Unmirror, disk),
            Command::Resize { disk, .. } => on_disk(Op::Resize, disk),
            Command::Restore { disk, from, .. } => {
                let (source, snapshot) = self.snapshot(from)?;
                let first =
                    [Target::Disk(Op::Restore, self.disk(disk)?), Target::Snapshot(Op::UseSnapshot, source, snapshot)];
                let through = self.registry.through(snapshot.id).into_iter();
                let through = through.filter_map(|id| self.registry.snapshot(id));
                Ok(first
                    .into_iter()
                    .chain(through.map(|(disk, s)| Target::Snapshot(Op::ReadThrough, disk, s)))
                    .collect())
            }
            Command::RestoreToNow { disk, volume, .. } => {
                let disk = self.disk(disk)?;
                let source = self.registry.named(volume).ok_or_else(|| self.no_volume(volume))?;
                Ok(vec![Target::Disk(Op::Restore, disk), Target::Disk(Op::Freeze, source)])
            }
            Command::CreateVolume { from, .. } => on_snapshot(Op::UseSnapshot, from),
            Command::CreateVolumeOfNow { of, .. } => on_disk(Op::Freeze, of),
            Command::DeleteVolume { volume, .. } => on_volume(Op::DeleteVolume, volume),
            Command::Complete { volume } => on_volume(Op::Complete, volume),
            Command::Update { volume, .. } => on_volume(Op::Update, volume),
            Command::Promote { volume } => on_volume(Op::Promote, volume),
            Command::Disable { volume, .. } => on_volume(Op::Disable, volume),
            Command::Enable { volume, fresh } => on_volume(if *fresh { Op::EnableFresh } else { Op::Enable }, volume),
            Command::StopJob { job } => self.job(*job, |state| state == JobState::Running),
            Command::ResumeJob { job } => {
                self.job(*job, |_| true)?;
                let job = self.registry.job(*job).filter(|job| matches!(job.kind, JobKind::Migrate | JobKind::Update));
                let disk = job.and_then(|job| self.registry.disk(job.disk));
                Ok(disk.map(|disk| Target::Disk(Op::Complete, disk)).into_iter().collect())
            }
            Command::HurryJob { job } => self.job(*job, |_| true),
            Command::WaitForJob { job } => self.job(*job, |state| state == JobState::Running),
        }
    }

    fn job(&self, id: u64, is_possible: impl Fn(JobState) -> bool) -> Result<Vec<Target<'a>>, Refusal> {
        let error = |error: ApiError| Refusal::for_good(error.code, error.message, error.action);
        let job = self.registry.job(id).ok_or_else(|| error(ApiError::job_not_found(id)))?;
        match job.state {
            JobState::Done => Err(error(ApiError::job_ended(id, job.state))),
            state if !is_possible(state) => Err(error(ApiError::job_unfinished(id))),
            _ => Ok(Vec::new()),
        }
    }

    fn disk(&self, name: &Name) -> Result<&'a Disk, Refusal> {
        self.registry.named(name).ok_or_else(|| missing(ErrorCode::DiskNotFound, format!("there is no disk {name}")))
    }

    fn volume(&self, name: &Name) -> Result<&'a Disk, Refusal> {
        let volume = self.registry.named(name).filter(|disk| disk.is_volume());
        volume.ok_or_else(|| self.no_volume(name))
    }

    fn no_volume(&self, name: &Name) -> Refusal {
        let error = ApiError::volume_not_found(name, self.registry.named(name).is_some());
        Refusal::for_good(error.code, error.message, error.action)
    }

    fn no_bookmark(&self, reference: &SnapshotRef) -> Refusal {
        let refusal = missing(ErrorCode::BookmarkNotFound, format!("there is no bookmark {reference}"));
        match self.registry.snapshot_named(reference) {
            None => refusal,
            Some(_) => {
                let instead = format!("{reference} is a snapshot: see 'halfsilver snapshot show {reference}'");
                Refusal { instead: Some(instead), ..refusal }
            }
        }
    }

    fn snapshot(&self, reference: &SnapshotRef) -> Result<(&'a Disk, &'a Snapshot), Refusal> {
        if let Some(found) = self.registry.snapshot_named(reference) {
            return Ok(found);
        }
        let refusal = missing(ErrorCode::SnapshotNotFound, format!("there is no snapshot {reference}"));
        let disk = self.registry.named(&reference.disk);
        Err(match disk.is_some_and(|disk| disk.bookmarks.iter().any(|b| b.name == reference.name)) {
            false => refusal,
            true => {
                let instead = format!(
                    "{reference} is a bookmark: see 'halfsilver bookmark show {reference}' and 'bookmark delete'"
                );
                Refusal { instead: Some(instead), ..refusal }
            }
        })
    }

    /// A disk is taken back to what it was, or to what has grown from that.
    fn refuse_unrelated(&self, targets: &[Target]) -> Result<(), Refusal> {
        let [Target::Disk(Operation::Restore, disk), of, ..] = targets else { return Ok(()) };
        if disk.is_volume() {
            return Ok(()); // That is refused as such.
        }
        let (source, name) = (of.disk(), &disk.name);
        let is_now = matches!(self.command, Command::RestoreToNow { .. });
        let refuse = |what: String| {
            let instead = format!("name a snapshot of {name}, or a volume that was made off one");
            Err(Refusal::for_good(ErrorCode::InvalidRequest, what, instead))
        };
        match self.registry.comes_from(source, disk) {
            true if is_now && source.id == disk.id => refuse(format!("disk {name} cannot be restored from itself")),
            true => Ok(()),
            false => refuse(format!("{} does not stand on disk {name}, and has nothing of it", source.name)),
        }
    }

    /// New things need names that nothing has. What has the name, or a refusal if nothing clears that.
    fn taken_name(&self, targets: &[Target]) -> Option<Result<(ErrorCode, Obstacle), Refusal>> {
        let taken = |code, what: String, delete: Command| {
            let cleared_by = vec![Step::Run(delete)];
            Some(Ok((code, Obstacle { kind: ObstacleKind::NameTaken, what, cleared_by })))
        };
        match self.command {
            Command::CreateSnapshot { name, .. } => targets.iter().map(Target::disk).find_map(|disk| {
                let (title, reference) = (disk.title(), disk.reference(name));
                if disk.snapshot(name).is_some() {
                    let what = format!("{title} has a snapshot {name} already");
                    return taken(ErrorCode::SnapshotExists, what, delete_snapshot(reference));
                }
                disk.bookmark(name)?;
                let delete = Command::DeleteBookmark { bookmark: reference };
                taken(ErrorCode::SnapshotExists, format!("{title} has a bookmark {name} already"), delete)
            }),
            Command::CreateVolume { name, .. }
            | Command::CreateVolumeOfNow { name, .. }
            | Command::Rename { to: name, .. } => {
                let is_itself = |other: &Disk| {
                    targets.iter().any(|t| matches!(t, Target::Disk(Operation::Rename, disk) if disk.id == other.id))
                };
                let other = self.registry.named(name).filter(|other| !is_itself(other))?;
                if other.is_volume() {
                    let delete = Command::DeleteVolume { volume: name.clone(), force: false };
                    return taken(ErrorCode::VolumeExists, format!("volume {name} exists"), delete);
                }
                let what = format!("{name} is the name of a disk");
                Some(Err(Refusal::for_good(ErrorCode::DiskExists, what, "use another name")))
            }
            _ => None,
        }
    }

    /// What it changes, and what must stay as it is meanwhile.
    fn wanted(&self, targets: &[Target]) -> Plan {
        let mut plan = Plan::default();
        let mut wanted = Wanted::default();
        let entity = ClaimKey::Entity;
        for target in targets {
            match target {
                Target::Snapshot(Operation::ReadThrough | Operation::LeaveBookmark, ..) => {}
                Target::Snapshot(_, disk, snapshot) => {
                    plan.disks.push(disk.id);
                    plan.snapshot = Some(snapshot.id);
                }
                Target::Disk(_, disk) => plan.disks.push(disk.id),
            }
            match target {
                Target::Snapshot(Operation::UseSnapshot | Operation::CutOver, disk, _) => {
                    wanted.needs.insert(entity(disk.id));
                }
                _ => {
                    wanted.changes.insert(entity(target.disk().id));
                }
            }
        }
        match self.command {
            // What it is restored through must be made to outlive power cuts.
            Command::Restore { .. } => {
                let snapshot = plan.snapshot.unwrap_or_default();
                let below = self.registry.through(snapshot).into_iter().chain([snapshot]);
                let holders: BTreeSet<Uuid> =
                    below.filter_map(|id| self.registry.snapshot(id).map(|(disk, _)| disk.id)).collect();
                wanted.changes.extend(holders.into_iter().map(entity));
            }
            // Also of a name that a start is about to serve.
            Command::CreateVolume { name, .. }
            | Command::Rename { to: name, .. }
            | Command::RemoveDisk { disk: name, .. }
            | Command::Forget { disk: name }
            | Command::DeleteVolume { volume: name, .. } => {
                wanted.changes.insert(ClaimKey::Name(name.clone()));
            }
            Command::ResumeJob { job } => {
                wanted.changes.extend(self.registry.job(*job).map(|job| entity(job.disk)));
            }
            _ => {}
        }
        wanted.needs.retain(|key| !wanted.changes.contains(key));
        plan.wanted = wanted;
        plan
    }
}

fn missing(code: ErrorCode, what: String) -> Refusal {
    Refusal::for_good(code, what, code.action())
}

impl<'a> Target<'a> {
    fn operation(&self) -> Operation {
        match self {
            Target::Disk(operation, _) | Target::Snapshot(operation, _, _) => *operation,
        }
    }

    fn disk(&self) -> &'a Disk {
        match self {
            Target::Disk(_, disk) | Target::Snapshot(_, disk, _) => disk,
        }
    }

    /// The code of a refusal because of such an obstacle.
    fn code(&self, kind: ObstacleKind) -> ErrorCode {
        match (self.operation(), self.operation().code(kind)) {
            (Operation::Rename, ErrorCode::DiskBusy) if self.disk().is_volume() => ErrorCode::VolumeBusy,
            (_, code) => code,
        }
    }

    fn obstacles(&self, registry: &Registry, command: &Command) -> Vec<Obstacle> {
        match self {
            Target::Disk(_, disk) => {
                registry.of_disk(disk).into_iter().chain(registry.of_legs(command, disk)).collect()
            }
            Target::Snapshot(_, disk, snapshot) => registry.of_snapshot(disk, snapshot),
        }
    }
}
