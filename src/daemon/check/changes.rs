//! What `check` says of changed tables: which of them a start would believe, and so since which bookmarks it would be known
//! what changed.
//!
//! A table that is lost costs a backup that copies everything, never a byte: it makes no verdict worse. That its file is
//! damaged is a problem all the same.

use super::{CheckedBookmark, Examination};
use crate::daemon::takeup::{CHANGES_CHANGED, CHANGES_CUT, Trust};
use crate::store::{ChangedRecord, DiskRecord, Table, TableName, examine_run_table};
use uuid::Uuid;

/// Looks at the tables of all versions and bookmarks of a disk. Returns its bookmarks, oldest first.
pub(super) fn look_at_changes(
    of: &mut Examination,
    record: &DiskRecord,
    blocks: u64,
    trust: Trust,
) -> Vec<CheckedBookmark> {
    let snapshots = record.snapshots.iter().map(|s| (s.began, s.id, s.changed.as_ref()));
    let bookmarks = record.bookmarks.iter().map(|b| (b.began, b.id, b.changed.as_ref()));
    let mut markers: Vec<_> = snapshots.chain(bookmarks).collect();
    markers.sort_by_key(|(began, ..)| *began);
    markers.push((record.live_began, record.live, record.live_changed.as_ref()));
    let lost: Vec<_> = markers
        .into_iter()
        .map(|(began, id, changed)| (began, why_lost(of, &record.name, id, changed, (blocks, trust)).err()))
        .collect();
    let of_bookmark = |name: &str, since: u64| CheckedBookmark {
        bookmark: format!("{}@{name}", record.name),
        lost: lost.iter().filter(|(began, _)| *began > since).find_map(|(_, why)| why.clone()),
    };
    record.bookmarks.iter().map(|b| of_bookmark(&b.name, b.began)).collect()
}

fn why_lost(
    of: &mut Examination,
    disk: &str,
    id: Uuid,
    changed: Option<&ChangedRecord>,
    (blocks, trust): (u64, Trust),
) -> Result<(), String> {
    let Some(changed) = changed else { return Err("nothing was noted".to_owned()) };
    if let Some(why) = &changed.lost {
        return Err(why.clone());
    }
    let (path, found) = match trust {
        Trust::PowerCut => return Err(CHANGES_CUT.to_owned()),
        Trust::Changed => return Err(CHANGES_CHANGED.to_owned()),
        Trust::Saved => {
            let path = of.places.saved_changes(id);
            let Some(seal) = changed.saved else { return Err("its changed table was not saved".to_owned()) };
            let loaded = Table::in_memory(blocks).and_then(|table| table.load(&path, seal));
            (path, loaded.map(|_| false))
        }
        Trust::SameBoot => {
            let path = of.places.changed_table(id);
            let found = examine_run_table(&path, blocks, TableName { id, boot: of.boot });
            (path, found.map(|facts| facts.is_broken))
        }
    };
    match found {
        Ok(false) => Ok(()),
        Ok(true) => Err("not everything could be noted".to_owned()),
        Err(e) => {
            let what = format!("it is not known any more what was written to {disk}: {e}");
            of.problem(&path, what, "nothing: the next incremental backup copies everything");
            Err(e.to_string())
        }
    }
}
