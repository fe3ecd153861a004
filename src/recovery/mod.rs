//! What a start makes of what was left, decided once and purely; a start carries it out, and `check` prints it.
//!
//! What always holds:
//! - [`decide`] and [`settle`] look only through [`Evidence`], which never changes anything: what is said is what a start does.
//! - A snapshot of which something is missing is broken and says why, and so are those that read through it. A disk whose live
//!   version cannot be had is not served at all: an older content under its name would be a lie.
//! - Nobody who carries a decision out decides again: what fails meanwhile is an error, and the disk is not served.
//!
//! What is not known here: names of sockets, jobs and commands.

mod carry_out;
mod decide;
mod decision;
mod evidence;
mod files;
mod record;
mod settle;
mod updates;
mod why;

pub use carry_out::{LayerSource, NotCarriedOut, Taken, carry_out};
pub use decide::{decide, decide_flushed};
pub use decision::{
    ChangedUse, Content, ImageUse, Job, JobKind, LayerUse, LegUse, MirrorRecovery, PackUse, Recovery, RestoreRecovery,
    Role, SnapshotFate, TableSource, TableUse, VersionRecovery,
};
pub use evidence::{Durable, DurableFacts, Evidence, ImageFacts};
pub use files::{Files, ImageSetup};
pub use settle::{ServedVersion, duplicates, settle};
pub use updates::Need;
pub use why::Why;

use uuid::Uuid;

use crate::store::{Believed, DiskRecord};

/// How the daemon ended the last time, and so what is believed of what it left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shutdown {
    /// It stopped, and the disk's image looks as it did then: everything is believed that still looks as it was left.
    Clean,
    /// It was killed in this boot: the tables in the run directory are believed, which the kernel kept.
    Killed,
    /// The machine went down: what was made durable is believed. That is full images, logs as of their last flush, and what
    /// was saved for snapshots of disks with `durability=power`.
    PowerCut,
    /// It stopped, but somebody wrote the disk's image since.
    Changed,
}

impl Shutdown {
    /// How the daemon that served this disk last ended, for a start in the boot `boot`.
    #[must_use]
    pub fn of(record: &DiskRecord, evidence: &dyn Evidence, boot: Uuid) -> Shutdown {
        // Of a mirror each leg is looked at by itself, and what a volume stands on with its disk.
        let looks = match record.mirror.is_some() || record.volume.is_some() {
            true => record.saved,
            false => evidence.full_image_looks(),
        };
        match record.saved {
            Some(_) if record.saved == looks => Shutdown::Clean,
            Some(_) => Shutdown::Changed,
            None if record.boot == Some(boot) => Shutdown::Killed,
            None => Shutdown::PowerCut,
        }
    }

    /// What is believed of packs.
    #[must_use]
    pub fn of_packs(self) -> Believed {
        match self {
            Shutdown::Clean => Believed::Saved,
            Shutdown::Killed => Believed::Arrived,
            Shutdown::PowerCut | Shutdown::Changed => Believed::Synced,
        }
    }
}

#[cfg(test)]
mod decide_tests;
#[cfg(test)]
mod fixture;
