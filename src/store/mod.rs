//! What must outlive a process: tables of blocks, and records of disks and versions.
//!
//! What always holds:
//! - A table's run copy is a shared mapping: a set bit is in the page cache at once, without a system call.
//! - A saved copy is complete and checksummed or it is not there: it is written beside its place, synced, renamed.
//! - A durable table changes in place, in sectors that check themselves: a crash leaves each of them old or new.
//! - Records change in transactions of redb; what a start finds is some committed state.
//!
//! What this room does not know: what a bit or a record means to a guest.

mod block;
mod durable;
mod error;
#[cfg(test)]
mod flip_tests;
mod identity;
mod intact;
mod pack;
mod record;
mod record_copy;
mod record_store;
mod records;
mod run_header;
mod table;
mod table_files;
mod work;

pub use block::{BlockIndex, BlockRange};
pub use durable::{DurableTable, LoadReport, PAYLOAD_BYTES, Payload};
pub use error::TableError;
pub use identity::Identity;
pub use pack::{Believed, Pack, PackFacts};
pub use record::{
    BookmarkRecord, ChangedRecord, DeletionRecord, DiskRecord, Fingerprint, Layout, LegRecord, MirrorRecord,
    RestorePhase, RestoreRecord, RestoreSourceKind, SnapshotRecord, Strategy, VolumeRecord, Writers, names_let_go,
};
pub use record_store::{RecordError, RecordStore, Remembered, UnreadableRecord};
pub use records::{ExaminedRecords, Records};
pub use run_header::{RunTableFacts, TableName, examine_run_table};
pub use table::{Table, sync_directory_of};
pub use table_files::TableFiles;
pub use work::{Work, WorkRecord};
