//! What can be asked for, as a value, and as it is written on the command line.

use std::fmt;

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
    },
    /// Lets a leg of a disk go.
    Unmirror {
        /// Which.
        disk: Name,
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
            Command::CreateSnapshot { disks, name } => {
                write!(f, "snapshot create {name}")?;
                disks.iter().try_for_each(|disk| write!(f, " --disk {disk}"))
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
            Command::Mirror { disk } => write!(f, "disk mirror {disk}"),
            Command::Unmirror { disk } => write!(f, "disk unmirror {disk}"),
            Command::Restore { disk, from, .. } => write!(f, "disk restore {disk} --from {from}{force}"),
            Command::RestoreToNow { disk, volume, .. } => write!(f, "disk restore {disk} --from {volume}{force}"),
            Command::CreateVolume { name, from } => write!(f, "volume create {name} --from {from}"),
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
            Command::WaitForJob { job } => write!(f, "job wait {job}"),
        }
    }
}
