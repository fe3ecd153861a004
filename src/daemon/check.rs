//! `halfsilver check`: what is in a state directory, what a start would do with it, and what is wrong.
//!
//! What always holds:
//! - Nobody else has the directory meanwhile. Without `repair` nothing is changed, and nothing is made.
//! - What is repaired cannot lose anything: no image, log, durable table or record is ever removed that is not let go.
//!
//! What is not done here: to decide what a start does with a disk. The room `recovery` decides, here as in a start.

mod disk;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::Serialize;
use uuid::Uuid;

use crate::control::Name;
use crate::control::api::DiskConfig;
use crate::daemon::ServeError;
use crate::host::{Host, Machine, SYSCTL, probe_ring};
use crate::manager::places::{self, PlaceError, Places};
use crate::manager::planned::recovery_of;
use crate::recovery::{Need, Recovery, duplicates, settle};
use crate::store::{DiskRecord, ExaminedRecords, RecordStore, Records};

/// What to examine.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// The state directory.
    pub state_dir: PathBuf,
    /// The run directory.
    pub run_dir: PathBuf,
    /// Whether to repair what can be repaired without a loss.
    pub repair: bool,
}

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// The state directory.
    pub state_dir: PathBuf,
    /// The run directory.
    pub run_dir: PathBuf,
    /// Whether nothing is wrong.
    pub ok: bool,
    /// By name.
    pub disks: Vec<CheckedDisk>,
    /// What is wrong or worth knowing, beside what is said of disks and snapshots.
    pub findings: Vec<Finding>,
    /// What was repaired.
    pub repaired: Vec<String>,
}

/// What a start would do with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskVerdict {
    /// With everything that was acknowledged.
    Served,
    /// With what was flushed.
    ServedAsFlushed,
    /// Not at all; or it is a volume, and every request on it fails.
    NotServed,
}

/// What a start would do with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotVerdict {
    /// It is whole.
    Kept,
    /// Its deletion goes on.
    Deleting,
    /// It was taken for the update of a volume that does not stand on it, and is deleted.
    Tidied,
    /// It cannot be vouched for.
    Broken,
    /// It stays as it is until its disk is served.
    Waits,
}

/// A disk, and what a start would do with it.
#[derive(Clone, Debug, Serialize)]
pub struct CheckedDisk {
    /// Its name.
    pub name: String,
    /// Its image, as far as it is known. None of a volume.
    pub path: Option<PathBuf>,
    /// The snapshot that it stands on, or stood on, if it is a volume.
    pub from: Option<String>,
    /// Whether it is a volume that stands on nothing any more.
    pub independent: bool,
    /// Whether it is a volume that is not served until it is enabled.
    pub disabled: bool,
    /// How the daemon ended, as far as this disk tells.
    pub ended: String,
    /// What a start would do.
    pub verdict: DiskVerdict,
    /// Why, if not everything is as it was.
    pub reason: Option<String>,
    /// What to do then.
    pub action: Option<String>,
    /// Oldest first.
    pub snapshots: Vec<CheckedSnapshot>,
    /// Oldest first.
    pub bookmarks: Vec<CheckedBookmark>,
    /// What would go on.
    pub jobs: Vec<CheckedJob>,
}

/// A job that is there again after a start.
#[derive(Clone, Debug, Serialize)]
pub struct CheckedJob {
    /// `restore`, `migrate`, `update`, `mirror`, `merge` or `fold`, as in the list of jobs.
    pub kind: &'static str,
    /// The snapshot that is deleted.
    pub snapshot: Option<String>,
    /// Whether it waits to be resumed, because a user had stopped it.
    pub stopped: bool,
}

/// A bookmark, and whether it would still be known what changed since.
#[derive(Clone, Debug, Serialize)]
pub struct CheckedBookmark {
    /// `disk@name`.
    pub bookmark: String,
    /// Why that would not be known.
    pub lost: Option<String>,
}

/// A snapshot, and what a start would do with it.
#[derive(Clone, Debug, Serialize)]
pub struct CheckedSnapshot {
    /// `disk@name`.
    pub snapshot: String,
    /// What a start would do.
    pub verdict: SnapshotVerdict,
    /// Whether its deletion leaves a bookmark.
    pub leaves_bookmark: bool,
    /// Why, if it is not kept.
    pub reason: Option<String>,
    /// What to do then.
    pub action: Option<String>,
    /// Why, as it is to be remembered, if nothing that could be put back would change it.
    #[serde(skip)]
    pub(crate) for_good: Option<String>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Something is wrong.
    Problem,
    /// Nothing is wrong, but it is good to know.
    Note,
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Where.
    pub path: PathBuf,
    /// What.
    pub what: String,
    /// What to do.
    pub action: String,
}

/// How long to wait for the last transfers of a daemon that was killed just now.
const PROBE_WAIT: Duration = Duration::from_secs(2);

const DO_REPAIR: &str = "run 'halfsilver check --repair'";

/// Examines, and repairs if that is wanted.
///
/// # Errors
/// When a daemon is running, the directory is not there, or the system refuses.
pub fn check(options: &CheckOptions) -> Result<CheckReport, ServeError> {
    let CheckOptions { state_dir, run_dir, repair } = options;
    let there = std::fs::metadata(state_dir);
    there.map_err(|source| PlaceError::Io { path: state_dir.clone(), source })?;
    let places = Places::to_look_at(state_dir, run_dir);
    let _locks = match repair {
        true => lock_to_repair(state_dir, run_dir)?,
        false => lock_to_look(state_dir)?.into_iter().collect(),
    };
    let look = || -> Result<Examination, ServeError> {
        let mut examined = Examination::of(&Machine, &places)?;
        examined.look_at_ring();
        examined.look_at_directories();
        examined.look_at_records();
        Ok(examined)
    };
    if !repair {
        return Ok(look()?.into_report(Vec::new()));
    }
    let repaired = look()?.repair()?;
    Ok(look()?.into_report(repaired))
}

/// The same of a host's state directory, of which nobody keeps daemons away: what a start would do with what is there.
///
/// # Errors
/// When the system refuses.
pub fn examine(host: &dyn Host, places: &Places) -> Result<CheckReport, ServeError> {
    let mut examined = Examination::of(host, places)?;
    examined.look_at_records();
    Ok(examined.into_report(Vec::new()))
}

/// Keeps daemons away from both: the run directory may be that of one with another state directory, whose tables no record
/// here names.
fn lock_to_repair(state_dir: &Path, run_dir: &Path) -> Result<Vec<File>, PlaceError> {
    let mut locks = vec![places::lock(state_dir, "--state-dir")?];
    if run_dir.is_dir() && !places::is_same(state_dir, run_dir)? {
        locks.push(places::lock(run_dir, "--run-dir")?);
    }
    Ok(locks)
}

/// Keeps daemons away without changing the file that they lock. Where none is, no daemon has ever run.
fn lock_to_look(state_dir: &Path) -> Result<Option<File>, PlaceError> {
    let path = state_dir.join("lock");
    let error = |source: std::io::Error| PlaceError::Io { path: path.clone(), source };
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(error)?,
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(places::in_use(state_dir, "--state-dir", file).map_err(error)?),
        Err(e) => Err(error(e.into())),
    }
}

/// What was found, and what can be done about it.
struct Examination<'a> {
    host: &'a dyn Host,
    places: &'a Places,
    boot: Uuid,
    findings: Vec<Finding>,
    disks: Vec<CheckedDisk>,
    /// What is recorded of those disks, as far as it can be read.
    records: Vec<DiskRecord>,
    /// Files and directories whose mode is too wide, and the mode that they should have.
    modes: Vec<(PathBuf, u32)>,
    removable: Vec<PathBuf>,
    /// Whether redb has something to put in order.
    recovers: bool,
}

impl<'a> Examination<'a> {
    fn of(host: &'a dyn Host, places: &'a Places) -> Result<Examination<'a>, ServeError> {
        let boot = host.boot().map_err(|e| ServeError::System(e.to_string()))?;
        Ok(Examination {
            host,
            places,
            boot,
            findings: Vec::new(),
            disks: Vec::new(),
            records: Vec::new(),
            modes: Vec::new(),
            removable: Vec::new(),
            recovers: false,
        })
    }

    fn into_report(self, repaired: Vec<String>) -> CheckReport {
        let is_good = |disk: &CheckedDisk| {
            disk.verdict != DiskVerdict::NotServed
                && disk.snapshots.iter().all(|s| s.verdict != SnapshotVerdict::Broken)
        };
        let ok = self.findings.iter().all(|f| f.severity == Severity::Note) && self.disks.iter().all(is_good);
        let (state_dir, run_dir) = (self.places.state_dir().to_owned(), self.places.run_dir().to_owned());
        CheckReport { state_dir, run_dir, ok, disks: self.disks, findings: self.findings, repaired }
    }

    fn found(&mut self, severity: Severity, path: &Path, what: impl Into<String>, action: impl Into<String>) {
        let finding = Finding { severity, path: path.to_owned(), what: what.into(), action: action.into() };
        if !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }

    fn problem(&mut self, path: &Path, what: impl Into<String>, action: impl Into<String>) {
        self.found(Severity::Problem, path, what, action);
    }

    fn note(&mut self, path: &Path, what: impl Into<String>, action: impl Into<String>) {
        self.found(Severity::Note, path, what, action);
    }

    /// Whether a start could serve anything.
    fn look_at_ring(&mut self) {
        if let Err(why) = probe_ring() {
            self.problem(Path::new(SYSCTL), why, "allow io_uring, or no disk is served");
        }
    }

    /// Modes and owners of what the daemon made, by the rules of [`Places::open`].
    fn look_at_directories(&mut self) {
        let me = rustix::process::geteuid().as_raw();
        let [tables, images, run_tables] = self.places.own_dirs();
        let (state, run) = (self.places.state_dir().to_owned(), self.places.run_dir().to_owned());
        for (dir, is_top) in [(state, true), (run, true), (tables, false), (images, false), (run_tables, false)] {
            let meta = if is_top { std::fs::metadata(&dir) } else { std::fs::symlink_metadata(&dir) };
            let meta = match meta {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue, // Made by the next start.
                Err(e) => {
                    self.problem(&dir, format!("it cannot be looked at: {e}"), "see to it that it can be");
                    continue;
                }
                Ok(meta) => meta,
            };
            if !meta.is_dir() {
                self.problem(&dir, "it is not a directory", "put the directory back; no daemon starts like this");
            } else if meta.uid() != me && meta.uid() != 0 {
                self.problem(&dir, format!("it belongs to user {}", meta.uid()), "give it back with chown");
            } else if meta.mode() & 0o022 != 0 {
                self.problem(&dir, "other users may write to it; no daemon starts like this", DO_REPAIR);
                self.modes.push((dir.clone(), meta.mode() & 0o7755));
            }
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                let Ok(meta) = entry.metadata() else { continue };
                if !meta.is_file() {
                    continue;
                }
                if meta.uid() != me {
                    self.problem(
                        &entry.path(),
                        format!("it belongs to user {}", meta.uid()),
                        "give it back with chown",
                    );
                } else if meta.mode() & 0o077 != 0 {
                    self.problem(&entry.path(), "other users may read or write it", DO_REPAIR);
                    self.modes.push((entry.path(), 0o600));
                }
            }
        }
    }

    fn look_at_records(&mut self) {
        let path = self.places.records();
        let restore = "put a good copy of it back; without it nobody knows what the other files are";
        let examined = match self.host.examine_records(&path) {
            Ok(Some(examined)) => examined,
            Ok(None) => {
                self.look_at_orphans(&[], &ExaminedRecords::default());
                self.removable.clear(); // When the records come back they may name them.
                if let Err(e) = self.places.refuse_lost_records(self.host) {
                    self.problem(&path, format!("a start would refuse: {e}"), restore);
                }
                return;
            }
            Err(e) => return self.problem(&path, format!("a start would refuse: {e}"), restore),
        };
        if let Some(wrong) = &examined.wrong {
            self.recovers = true;
            self.problem(&path, wrong, "nothing: the next start, or a repair, makes it anew from its second copy");
        }
        if examined.is_unclean {
            self.recovers = true;
            self.note(&path, "its last writer was killed", "nothing: the next start puts it in order");
        }
        let records = examined.remembered.disks.clone();
        for (name, why) in &examined.remembered.unreadable {
            self.disks.push(disk::unreadable(name, why));
        }
        for (what, _) in duplicates(&records) {
            self.problem(&path, what, "put a good copy of it back");
        }
        if examined.remembered.unreadable.is_empty() {
            self.look_at_orphans(&records, &examined);
        }
        self.look_at_disks(&records);
        self.records = records;
        self.disks.sort_by(|one, other| one.name.cmp(&other.name));
    }

    fn look_at_disks(&mut self, records: &[DiskRecord]) {
        let config_of = |record: &DiskRecord| -> Option<DiskConfig> {
            let is_name = record.name.parse::<Name>().is_ok();
            serde_json::from_value(record.config.clone()).ok().filter(|_| is_name)
        };
        let configs: Vec<Option<DiskConfig>> = records.iter().map(config_of).collect();
        let known = || records.iter().zip(&configs).filter_map(|(record, config)| Some((record, config.as_ref()?)));
        let by = (self.host, self.places.tables(), self.boot);
        let mut recoveries: Vec<Recovery> =
            known().map(|(record, config)| recovery_of(record, config, by, PROBE_WAIT, false)).collect();
        settle(&mut recoveries, &[]);
        let mut recoveries = recoveries.into_iter();
        for (record, config) in records.iter().zip(&configs) {
            let checked = match config.as_ref().and_then(|config| Some((config, recoveries.next()?))) {
                Some((config, recovery)) => disk::tell(self, config, &recovery),
                None => disk::not_understood(record),
            };
            self.disks.push(checked);
        }
        self.look_at_moments(records);
    }

    /// Snapshots that a start tidies away, because they were taken for updates and are not needed any more.
    fn look_at_moments(&mut self, records: &[DiskRecord]) {
        // Nobody knows what one needs that cannot be read.
        if self.disks.len() > records.len() {
            return;
        }
        for (record, checked) in records.iter().zip(&mut self.disks) {
            for (snapshot, checked) in record.snapshots.iter().zip(&mut checked.snapshots) {
                let need = snapshot.taken_for.map(|volume| Need::of(records, volume, snapshot.id));
                let Some(need) = need.filter(|need| *need != Need::Snapshot) else { continue };
                if checked.verdict == SnapshotVerdict::Kept {
                    checked.verdict = SnapshotVerdict::Tidied;
                    checked.leaves_bookmark = need == Need::Bookmark;
                    checked.reason = Some("it was taken for an update, and nothing stands on it".to_owned());
                }
            }
        }
    }

    fn look_at_orphans(&mut self, records: &[DiskRecord], examined: &ExaminedRecords) {
        let orphans = match self.places.orphans(self.host, records, &examined.dropped) {
            Ok(orphans) => orphans,
            Err(e) => {
                let state_dir = self.places.state_dir().to_owned();
                return self.problem(&state_dir, format!("a start would refuse: {e}"), "see to it that it can be read");
            }
        };
        for path in &orphans.removable {
            self.note(path, "an unfinished operation left it", "nothing: the next start removes it");
        }
        for path in &orphans.kept {
            self.problem(
                path,
                "no record names it, and there is something in it: it may be the only copy of what a guest wrote",
                "put the records back that name it; if you are sure that nobody needs it, remove it yourself",
            );
        }
        self.removable = orphans.removable;
    }

    /// Does what cannot lose anything. Returns what was done.
    fn repair(self) -> Result<Vec<String>, ServeError> {
        let mut done = Vec::new();
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| PlaceError::Io { path, source }
        };
        for (path, mode) in &self.modes {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(*mode)).map_err(io(path))?;
            done.push(format!("{}: its mode is {mode:o} now", path.display()));
        }
        for path in &self.removable {
            std::fs::remove_file(path).map_err(io(path))?;
            done.push(format!("{}: removed", path.display()));
        }
        let broken = self.broken_for_good();
        if self.recovers || !broken.is_empty() {
            let records = Records::open(&self.places.records())?;
            if self.recovers {
                done.push(format!("{}: put in order", self.places.records().display()));
            }
            if !broken.is_empty() {
                records.put(&broken.iter().map(|(record, _)| record).collect::<Vec<_>>())?;
                done.extend(broken.into_iter().flat_map(|(_, said)| said));
            }
        }
        Ok(done)
    }

    /// Records of disks with snapshots that can never be believed, with the reason in them; and what to say of it.
    fn broken_for_good(&self) -> Vec<(DiskRecord, Vec<String>)> {
        let mut changed = Vec::new();
        for record in &self.records {
            let Some(checked) = self.disks.iter().find(|disk| disk.name == record.name) else { continue };
            let (mut record, mut said) = (record.clone(), Vec::new());
            for (snapshot, checked) in record.snapshots.iter_mut().zip(&checked.snapshots) {
                if let (Some(reason), None) = (&checked.for_good, &snapshot.broken) {
                    snapshot.broken = Some(reason.clone());
                    said.push(format!("{}: marked as broken: {reason}", checked.snapshot));
                }
            }
            if !said.is_empty() {
                changed.push((record, said));
            }
        }
        changed
    }
}
