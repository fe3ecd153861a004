//! What can be asked for, as a value, and as it is written on the command line.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::control::{Name, SnapshotRef};

/// A command that changes what there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Freezes disks at one instant.
    CreateSnapshot {
        /// Which.
        disks: Vec<Name>,
        /// The name of each snapshot.
        name: Name,
        /// Whether each takes a leg of its disk's mirror.
        splits: bool,
    },
    /// Moves the frontends that still write a snapshot over to the live version.
    CutOver {
        /// Which.
        snapshot: SnapshotRef,
    },
    /// Deletes a snapshot.
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotRef,
        /// Also while it is read.
        force: bool,
        /// Whether a bookmark is to stay.
        keep_bookmark: bool,
    },
    /// Forgets a bookmark.
    DeleteBookmark {
        /// Which.
        bookmark: SnapshotRef,
    },
    /// Stops serving a disk.
    RemoveDisk {
        /// Which.
        disk: Name,
        /// Also while frontends are connected or snapshots exist.
        force: bool,
    },
    /// Forgets a disk or volume that is not served, and all that is remembered of it.
    Forget {
        /// Which.
        disk: Name,
    },
    /// Changes how a disk is served.
    Set {
        /// Which.
        disk: Name,
        /// Whether nobody may write it, if that is said.
        readonly: Option<bool>,
    },
    /// Makes a disk larger.
    Resize {
        /// Which.
        disk: Name,
        /// Its new size in bytes.
        size_bytes: u64,
    },
    /// Gives a disk or volume another name.
    Rename {
        /// Which.
        disk: Name,
        /// Its new name.
        to: Name,
        /// Whether a volume is meant.
        is_volume: bool,
        /// Also while frontends are connected to a socket that is called after it.
        force: bool,
    },
    /// Gives a disk a second leg.
    Mirror {
        /// Which.
        disk: Name,
        /// The image that becomes the leg.
        path: PathBuf,
    },
    /// Lets a leg of a disk go.
    Unmirror {
        /// Which.
        disk: Name,
        /// Which of its legs, if that is said; the last one otherwise.
        leg: Option<PathBuf>,
    },
    /// Takes a disk back to a snapshot.
    Restore {
        /// Which.
        disk: Name,
        /// To what.
        from: SnapshotRef,
        /// Also while frontends are connected.
        force: bool,
    },
    /// Takes a disk back to what a volume is now: to a snapshot that is taken for that.
    RestoreToNow {
        /// Which.
        disk: Name,
        /// To what.
        volume: Name,
        /// Also while frontends are connected.
        force: bool,
    },
    /// Makes a volume off a snapshot.
    CreateVolume {
        /// The volume's name.
        name: Name,
        /// What it stands on.
        from: SnapshotRef,
    },
    /// Makes a volume off a snapshot of this moment, which is taken for that and has the volume's name.
    CreateVolumeOfNow {
        /// The volume's name.
        name: Name,
        /// The disk or volume of which it is taken.
        of: Name,
    },
    /// Deletes a volume and what was written to it.
    DeleteVolume {
        /// Which.
        volume: Name,
        /// Also while frontends are connected or snapshots exist.
        force: bool,
    },
    /// Makes a volume independent of what it stands on.
    Complete {
        /// Which.
        volume: Name,
    },
    /// Brings a volume to its source's present.
    Update {
        /// Which.
        volume: Name,
        /// Also while frontends are connected.
        force: bool,
    },
    /// Makes an independent volume a disk.
    Promote {
        /// Which.
        volume: Name,
    },
    /// Closes a volume's socket.
    Disable {
        /// Which.
        volume: Name,
        /// Also while frontends are connected.
        force: bool,
    },
    /// Serves a disabled volume again.
    Enable {
        /// Which.
        volume: Name,
        /// Without what was written to it.
        fresh: bool,
    },
    /// Stops a job between two blocks.
    StopJob {
        /// Which.
        job: u64,
    },
    /// Goes on with a stopped or failed job.
    ResumeJob {
        /// Which.
        job: u64,
    },
    /// Lets a job go as fast as it can.
    HurryJob {
        /// Which.
        job: u64,
    },
    /// Waits until a job is done. Changes nothing by itself, but is part of advice.
    WaitForJob {
        /// Which.
        job: u64,
    },
}

impl Command {
    /// The same command, forced; None if there is no such thing.
    #[must_use]
    pub fn forced(&self) -> Option<Command> {
        let mut forced = self.clone();
        match &mut forced {
            Command::DeleteSnapshot { force, .. }
            | Command::RemoveDisk { force, .. }
            | Command::Restore { force, .. }
            | Command::RestoreToNow { force, .. }
            | Command::DeleteVolume { force, .. }
            | Command::Update { force, .. }
            | Command::Rename { force, .. }
            | Command::Disable { force, .. } => *force = true,
            _ => return None,
        }
        (forced != *self).then_some(forced)
    }

    /// Whether it is forced.
    #[must_use]
    pub fn is_forced(&self) -> bool {
        matches!(
            self,
            Command::DeleteSnapshot { force: true, .. }
                | Command::RemoveDisk { force: true, .. }
                | Command::Restore { force: true, .. }
                | Command::RestoreToNow { force: true, .. }
                | Command::DeleteVolume { force: true, .. }
                | Command::Update { force: true, .. }
                | Command::Rename { force: true, .. }
                | Command::Disable { force: true, .. }
        )
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let force = if self.is_forced() { " --force" } else { "" };
        write!(f, "halfsilver ")?;
        match self {
            Command::CreateSnapshot { disks, name, splits } => {
                write!(f, "snapshot create {name}")?;
                disks.iter().try_for_each(|disk| write!(f, " --disk {disk}"))?;
                f.write_str(if *splits { " --strategy write-mirroring" } else { "" })
            }
            Command::CutOver { snapshot } => write!(f, "snapshot cutover {snapshot} --wait"),
            Command::DeleteSnapshot { snapshot, keep_bookmark, .. } => {
                let keep = if *keep_bookmark { " --keep-bookmark" } else { "" };
                write!(f, "snapshot delete {snapshot}{keep}{force}")
            }
            Command::DeleteBookmark { bookmark } => write!(f, "bookmark delete {bookmark}"),
            Command::RemoveDisk { disk, .. } => write!(f, "disk remove {disk}{force}"),
            Command::Forget { disk } => write!(f, "disk forget {disk}"),
            Command::Set { disk, readonly } => {
                let readonly = readonly.map(|on| if on { " --readonly on" } else { " --readonly off" });
                write!(f, "disk set {disk}{}", readonly.unwrap_or_default())
            }
            Command::Rename { disk, to, is_volume, .. } => {
                write!(f, "{} rename {disk} {to}{force}", if *is_volume { "volume" } else { "disk" })
            }
            Command::Resize { disk, size_bytes } => write!(f, "disk resize {disk} --size {size_bytes}"),
            Command::Mirror { disk, path } => write!(f, "disk mirror {disk} {} --wait", quoted(path)),
            Command::Unmirror { disk, leg: None } => write!(f, "disk unmirror {disk}"),
            Command::Unmirror { disk, leg: Some(leg) } => write!(f, "disk unmirror {disk} --leg {}", quoted(leg)),
            Command::Restore { disk, from, .. } => write!(f, "disk restore {disk} --from {from}{force}"),
            Command::RestoreToNow { disk, volume, .. } => write!(f, "disk restore {disk} --from {volume}{force}"),
            Command::CreateVolume { name, from } => write!(f, "volume create {name} --from {from}"),
            Command::CreateVolumeOfNow { name, of } => write!(f, "volume create {name} --from {of}"),
            Command::DeleteVolume { volume, .. } => write!(f, "volume delete {volume}{force}"),
            Command::Complete { volume } => write!(f, "volume complete {volume} --wait"),
            Command::Update { volume, .. } => write!(f, "volume update {volume}{force}"),
            Command::Promote { volume } => write!(f, "volume promote {volume}"),
            Command::Disable { volume, .. } => write!(f, "volume disable {volume}{force}"),
            Command::Enable { volume, fresh } => {
                write!(f, "volume enable {volume}{}", if *fresh { " --fresh" } else { "" })
            }
            Command::StopJob { job } => write!(f, "job stop {job}"),
            Command::ResumeJob { job } => write!(f, "job resume {job}"),
            Command::HurryJob { job } => write!(f, "job set {job} --delay-ms 0 --limit 0"),
            Command::WaitForJob { job } => write!(f, "job wait {job}"),
        }
    }
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/-._~@+,:%".contains(c);
    if text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}
