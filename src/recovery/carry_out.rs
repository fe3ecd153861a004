//! Carries a decision out: opens what is kept of a disk's versions, and nothing else.
//!
//! What always holds: nothing is decided here. What cannot be opened although it was to be is an error, and the disk is not
//! served.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::{ChangedUse, ImageUse, LayerUse, Recovery, Role, TableUse, VersionRecovery, Why};
use crate::door::{Changed, Epoch, LayerSpec, Mark, VersionSpec};
use crate::image::{ImageError, SharedImage};
use crate::store::{SnapshotRecord, Table, TableError};

/// What was decided cannot be done: something has changed since, or the system refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotCarriedOut(pub String);

impl From<ImageError> for NotCarriedOut {
    fn from(e: ImageError) -> NotCarriedOut {
        NotCarriedOut(e.to_string())
    }
}

impl From<TableError> for NotCarriedOut {
    fn from(e: TableError) -> NotCarriedOut {
        NotCarriedOut(e.to_string())
    }
}

impl From<Why> for NotCarriedOut {
    fn from(why: Why) -> NotCarriedOut {
        NotCarriedOut(why.to_string())
    }
}

impl From<std::io::Error> for NotCarriedOut {
    fn from(e: std::io::Error) -> NotCarriedOut {
        NotCarriedOut(e.to_string())
    }
}

/// Opens layers as it was decided, each of a version of the given size.
pub trait LayerSource {
    /// A full image beside the disk's own.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open_full(&self, image: &Path, size_bytes: u64) -> Result<SharedImage, NotCarriedOut>;

    /// What is saved for a frozen version.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open_saved(
        &self,
        id: Uuid,
        size_bytes: u64,
        image: &ImageUse,
        table: &TableUse,
    ) -> Result<LayerSpec, NotCarriedOut>;

    /// The log of a version.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open_log(
        &self,
        id: Uuid,
        size_bytes: u64,
        image: &ImageUse,
        table: &TableUse,
    ) -> Result<LayerSpec, NotCarriedOut>;

    /// The dirty bitmap of a version or bookmark.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open_changed(&self, id: Uuid, size_bytes: u64, from: ChangedUse) -> Result<Arc<Table>, NotCarriedOut>;
}

/// What is taken up of a disk.
pub struct Taken {
    /// Oldest first; the last one is live.
    pub versions: Vec<VersionSpec>,
    /// Oldest first, and whether they have a version. Those without are lost.
    pub snapshots: Vec<(SnapshotRecord, bool)>,
    /// What is known of changes up to bookmarks and to snapshots without a version.
    pub marks: Vec<Mark>,
}

impl Taken {
    /// A disk of which nothing is remembered; `live` becomes the name of its live version.
    #[must_use]
    pub fn of_new_disk(live: Uuid, size_bytes: u64) -> Taken {
        let (layer, began) = (LayerSpec::Base, Epoch(0));
        let live = VersionSpec { id: live, began, size_bytes, splits: false, layer, broken: None, changed: None };
        Taken { versions: vec![live], snapshots: Vec::new(), marks: Vec::new() }
    }
}

/// Opens the versions of a disk. Snapshots that drained when the daemon ended never change again: they are quiesced at
/// `now_ms`.
///
/// # Errors
/// When the decision is not to serve the disk, or something that was to be opened cannot be.
pub fn carry_out(recovery: &Recovery, now_ms: u64, source: &dyn LayerSource) -> Result<Taken, NotCarriedOut> {
    if let Some(why) = recovery.why_unserved() {
        return Err(why.clone().into());
    }
    let record = &recovery.record;
    // An independent volume still knows what was written since it was made.
    let origin = record.stood_on.as_ref().map(|volume| {
        let (id, size_bytes) = (volume.origin, volume.size_bytes);
        Mark { id, began: Epoch(0), size_bytes, changed: None }
    });
    let mut taken = Taken { versions: Vec::new(), snapshots: Vec::new(), marks: origin.into_iter().collect() };
    for (bookmark, changed) in record.bookmarks.iter().zip(&recovery.bookmarks) {
        let changed = open_changed(bookmark.id, bookmark.size_bytes, changed.as_ref(), source)?;
        let (id, began, size_bytes) = (bookmark.id, Epoch(bookmark.began), bookmark.size_bytes);
        taken.marks.push(Mark { id, began, size_bytes, changed });
    }
    for version in &recovery.versions {
        let (id, began, size_bytes) = (version.id, Epoch(version.began), version.size_bytes);
        let changed = open_changed(id, size_bytes, version.changed.as_ref(), source)?;
        let mut snapshot = match version.role {
            Role::Frozen(at) => Some(record.snapshots[at].clone()),
            Role::Origin | Role::Live => None,
        };
        let Ok(layer) = &version.layer else {
            let mut snapshot = snapshot.ok_or_else(|| NotCarriedOut("the live version has no layer".to_owned()))?;
            let why = version.broken.as_ref().or(version.layer.as_ref().err());
            snapshot.broken = why.map(Why::in_record);
            snapshot.splits = version.splits;
            taken.marks.push(Mark { id, began, size_bytes, changed });
            taken.snapshots.push((snapshot, false));
            continue;
        };
        let layer = open_layer(version, layer, source)?;
        if let Some(snapshot) = &mut snapshot {
            snapshot.quiesced_ms.get_or_insert(now_ms);
            snapshot.broken = version.broken.as_ref().map(Why::in_record);
        }
        let broken = snapshot.as_ref().and_then(|snapshot| snapshot.broken.clone());
        taken.versions.push(VersionSpec { id, began, size_bytes, splits: version.splits, layer, broken, changed });
        taken.snapshots.extend(snapshot.map(|snapshot| (snapshot, true)));
    }
    Ok(taken)
}

fn open_layer(
    version: &VersionRecovery,
    layer: &LayerUse,
    source: &dyn LayerSource,
) -> Result<LayerSpec, NotCarriedOut> {
    let size_bytes = version.size_bytes;
    match layer {
        LayerUse::Base => Ok(LayerSpec::Base),
        LayerUse::Full(image) => Ok(LayerSpec::Full(source.open_full(image, size_bytes)?)),
        LayerUse::Log(image, table) => source.open_log(version.id, size_bytes, image, table),
        LayerUse::Saved(image, table) => source.open_saved(version.id, size_bytes, image, table),
    }
}

fn open_changed(
    id: Uuid,
    size_bytes: u64,
    changed: Option<&Result<ChangedUse, Why>>,
    source: &dyn LayerSource,
) -> Result<Option<Changed>, NotCarriedOut> {
    Ok(match changed {
        None => None,
        Some(Ok(from)) => Some(Changed::Noted(source.open_changed(id, size_bytes, *from)?)),
        Some(Err(why)) => {
            log::warn!("version {id}: everything counts as changed: {why}");
            Some(Changed::unknown(&why.to_string()))
        }
    })
}
