//! Whether a file of records is whole, found out in a copy of it in memory: the file itself is only read.
//!
//! What always holds: what is read here was reached through checksums from the newest commit that the file vouches for.
//! redb verifies pages only after a crash, and falls back to an older commit when the newest does not verify. An older
//! record is a lie about the images, so here a commit that was durable must verify or the file is damaged. That can be
//! told because all commits have two phases: the one that the header names was on stable storage before it was named.
//!
//! What is not done here: to change the file, or to know what a record means.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use redb::backends::InMemoryBackend;
use redb::{
    Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, StorageError, TableDefinition, TableError,
    WriteTransaction,
};

pub(super) const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
pub(super) const DISKS: TableDefinition<&str, &[u8]> = TableDefinition::new("disks");
/// Names of files that were let go on purpose, so that a start may remove what is left of them.
pub(super) const DROPPED: TableDefinition<&str, ()> = TableDefinition::new("dropped");

// The header of redb's file format 3 (docs/design.md of the crate): a byte of flags, and two commit slots.
const FLAGS_AT: usize = 9;
const PRIMARY: u8 = 1;
const UNCLEAN: u8 = 2;
const TWO_PHASES: u8 = 4;
const SLOTS_AT: [usize; 2] = [64, 192];
const TRANSACTION_AT: usize = 104;
const HEADER_BYTES: usize = 320;

/// Everything that is in a file of records, as bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// None before the first commit.
    pub(super) layout: Option<u64>,
    /// The number of the next job. None before the first one.
    pub(super) next_job: Option<u64>,
    pub(super) disks: BTreeMap<String, Vec<u8>>,
    pub(super) dropped: BTreeSet<String>,
}

/// A file of records that was found whole.
pub(super) struct Whole {
    pub(super) content: Content,
    /// Whether its last writer was killed: the next one puts it in order.
    pub(super) is_unclean: bool,
}

/// The content of the newest commit of a file with these bytes.
pub(super) fn read(bytes: &[u8]) -> Result<Whole, String> {
    if bytes.len() < HEADER_BYTES {
        return Err(format!("it has only {} bytes", bytes.len()));
    }
    let flags = bytes[FLAGS_AT];
    let is_unclean = flags & UNCLEAN != 0;
    if flags & TWO_PHASES == 0 {
        // Never committed by this program: the one commit that redb finds.
        return Ok(Whole { content: open(bytes.to_vec())?, is_unclean });
    }
    let named = usize::from(flags & PRIMARY);
    let content = open_slot(bytes, named)?;
    // A commit that was on its way when the power went, or that the header has forgotten: whole or not, the one before
    // it is. If it is whole it counts.
    if transaction(bytes, 1 - named) > transaction(bytes, named)
        && let Ok(newer) = open_slot(bytes, 1 - named)
    {
        return Ok(Whole { content: newer, is_unclean });
    }
    Ok(Whole { content, is_unclean })
}

fn transaction(bytes: &[u8], slot: usize) -> u64 {
    let at = SLOTS_AT[slot] + TRANSACTION_AT;
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The content of one commit, which must verify.
fn open_slot(bytes: &[u8], slot: usize) -> Result<Content, String> {
    let mut bytes = bytes.to_vec();
    bytes[FLAGS_AT] &= !PRIMARY;
    bytes[FLAGS_AT] |= if slot == 1 { PRIMARY } else { 0 };
    open(bytes)
}

fn open(bytes: Vec<u8>) -> Result<Content, String> {
    guarded(move || {
        let len = bytes.len() as u64;
        let backend = InMemoryBackend::new();
        backend.set_len(len).and_then(|()| backend.write(0, &bytes)).map_err(|e| e.to_string())?;
        let mut database = Builder::new().create_with_backend(backend).map_err(|e| e.to_string())?;
        // What it may have to put in order is of the copy; what does not match its checksum is an error.
        database.check_integrity().map_err(|e| e.to_string())?;
        content_of(&database)
    })
}

/// Everything in an open database.
pub(super) fn content_of(database: &Database) -> Result<Content, String> {
    let read = database.begin_read().map_err(|e| e.to_string())?;
    let meta = match read.open_table(META) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(Content::default()),
        meta => meta.map_err(|e| e.to_string())?,
    };
    let dropped = match read.open_table(DROPPED) {
        Err(TableError::TableDoesNotExist(_)) => None,
        dropped => Some(dropped.map_err(|e| e.to_string())?),
    };
    let disks = read.open_table(DISKS).map_err(|e| e.to_string())?;
    content_from(&meta, &disks, dropped.as_ref()).map_err(|e| e.to_string())
}

/// Everything as it will be when a change is committed.
pub(super) fn content_after(change: &WriteTransaction) -> Result<Content, redb::Error> {
    let (meta, disks, dropped) = (change.open_table(META)?, change.open_table(DISKS)?, change.open_table(DROPPED)?);
    Ok(content_from(&meta, &disks, Some(&dropped))?)
}

fn content_from(
    meta: &impl ReadableTable<&'static str, u64>,
    disks: &impl ReadableTable<&'static str, &'static [u8]>,
    dropped: Option<&impl ReadableTable<&'static str, ()>>,
) -> Result<Content, StorageError> {
    let number = |name| Ok::<_, StorageError>(meta.get(name)?.map(|value| value.value()));
    let mut content = Content { layout: number("format")?, next_job: number("next_job")?, ..Content::default() };
    for entry in disks.iter()? {
        let (name, value) = entry?;
        content.disks.insert(name.value().to_owned(), value.value().to_vec());
    }
    if let Some(dropped) = dropped {
        for entry in dropped.iter()? {
            content.dropped.insert(entry?.0.value().to_owned());
        }
    }
    Ok(content)
}

thread_local! {
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs what may panic on bytes that nobody should have written. The panic is an error like any other, so nothing is
/// said of it on stderr.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let loud = take_hook();
        set_hook(Box::new(move |info| {
            if !IS_GUARDED.get() {
                loud(info);
            }
        }));
    });
    let outer = IS_GUARDED.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    IS_GUARDED.set(outer);
    done.unwrap_or_else(|_| Err("its pages make no sense".to_owned()))
}
