//! What remembers disks, whatever it is kept in.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;

use super::record::DiskRecord;

/// The tables of the store, and how a record is wrapped. Another one is refused rather than guessed at.
pub(super) const LAYOUT: u64 = 6;

/// The records could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The store or the system below it refused.
    #[error("records: {0}")]
    Store(String),
    /// The state directory is full.
    #[error("records: {0}")]
    NoSpace(String),
    /// The system refused, and nobody knows whether before or after the change was stored. It is taken back, if it was, before
    /// anything else is stored; whoever dies before that finds the old records or the new ones.
    #[error("records: {0}; whether that was stored is not known until the state directory takes writes again")]
    Unknown(String),
    /// The store was written by another version.
    #[error("records: they have layout {found}, this program knows layout {LAYOUT}; use the version that wrote them")]
    Layout {
        /// What they say.
        found: u64,
    },
    /// The file is not what a commit left.
    #[error(
        "records: {} is damaged: {what}; put a good copy of it back, and see 'halfsilver check' for what else there is",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A record that cannot be read is not replaced.
    #[error("records: the record of disk {disk} cannot be read: {why}")]
    Kept {
        /// Whose record.
        disk: String,
        /// Why not.
        why: UnreadableRecord,
    },
}

/// Why the record of one disk cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnreadableRecord {
    /// It is as it was stored, by a program that knows more.
    #[error("a newer program wrote it ({0}); use that one")]
    Newer(String),
    /// It is not what was stored.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// All that is remembered, by name: of each disk its record, or why that cannot be read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remembered {
    /// Those that can be read.
    pub disks: Vec<DiskRecord>,
    /// Those that cannot. Nobody knows which files they name.
    pub unreadable: BTreeMap<String, UnreadableRecord>,
}

/// Records of disks by their names. Each change is one transaction: it is durable when the call returns, and until then
/// either the old records or the new ones are found. One that is refused changes nothing, unless the error is
/// [`RecordError::Unknown`].
pub trait RecordStore: Send + Sync {
    /// What was wrong with the store when it was opened, if it could not be read and was made anew from its second copy.
    fn made_anew(&self) -> Option<String> {
        None
    }

    /// All that is remembered.
    ///
    /// # Errors
    /// When the store refuses.
    fn disks(&self) -> Result<Remembered, RecordError>;

    /// Stores all of `disks`.
    ///
    /// # Errors
    /// When the store refuses, or a record of that name cannot be read; nothing has changed then.
    fn put(&self, disks: &[&DiskRecord]) -> Result<(), RecordError>;

    /// Stores a record in the place of the one that its disk has under another name.
    ///
    /// # Errors
    /// When the store refuses, or there is a record of its name; nothing has changed then.
    fn rename(&self, from: &str, disk: &DiskRecord) -> Result<(), RecordError>;

    /// Forgets a disk, also one whose record cannot be read. What that named is not known to be let go then.
    ///
    /// # Errors
    /// When the store refuses.
    fn remove(&self, name: &str) -> Result<(), RecordError>;

    /// The names ([`DiskRecord::names`]) of what was recorded once and let go since: its files need not be kept.
    ///
    /// # Errors
    /// When the store refuses.
    fn dropped(&self) -> Result<BTreeSet<String>, RecordError>;

    /// Forgets what was let go, after its files were removed.
    ///
    /// # Errors
    /// When the store refuses.
    fn forget_dropped(&self) -> Result<(), RecordError>;

    /// So many numbers for jobs that nobody has been given before, whatever ended in between.
    ///
    /// # Errors
    /// When the store refuses.
    fn take_job_ids(&self, count: u64) -> Result<Range<u64>, RecordError>;
}
