//! What differs: between snapshots, bookmarks and the present, and between volumes and what they stand on.
//!
//! What this does not do: read images. It goes by tables, so a block that was written with what it had counts as
//! different; what is not listed is equal.

use crate::manager::entry::is_id;
use std::sync::Arc;

use uuid::Uuid;

use crate::control::api::{ByteRange, DiffSource, VolumeMap, VolumeStatus};
use crate::control::changes::{Diff, FoundMap};
use crate::control::{ApiError, ErrorCode, Name, SnapshotRef};
use crate::door::{ChangeSource, Geometry, NoChanges, Runs};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, locked};
use crate::store::{BlockRange, VolumeRecord};

impl Manager {
    /// The disk or volume with this id, unless one has that very name.
    pub(crate) fn disk_name(&self, name: &Name) -> Name {
        let by_id = || self.all_disks().iter().find(|d| is_id(name, d.id)).map(|d| d.name.get());
        if self.disk(name).is_ok() { name.clone() } else { by_id().unwrap_or_else(|| name.clone()) }
    }

    pub(crate) fn diff(&self, from: &SnapshotRef, to: Option<&SnapshotRef>) -> Result<Diff, ApiError> {
        let disk = self.disk(&from.disk).map_err(|_| ApiError::snapshot_not_found(from))?;
        let first = disk.moment(from)?;
        diff(&disk, first, from, to)
    }

    pub(crate) fn diff_of_volume(&self, volume: &Name, to: Option<&SnapshotRef>) -> Result<Diff, ApiError> {
        let (disk, record) = self.served_volume(volume)?;
        diff(&disk, record.origin, &format!("volume {} as it was made", disk.name), to)
    }

    fn served_volume(&self, name: &Name) -> Result<(Arc<DiskEntry>, VolumeRecord), ApiError> {
        let name = &self.disk_name(name);
        self.refuse_unserved(name).map_err(|e| ApiError { code: ErrorCode::Conflict, ..e })?;
        let disk = self.disk(name).map_err(|_| self.no_volume(name))?;
        let volume = locked(&disk.relations).relation().cloned();
        let volume = volume.ok_or_else(|| self.no_volume(name))?;
        Ok((disk, volume))
    }

    pub(crate) fn map_of_volume(&self, name: &Name) -> Result<FoundMap, ApiError> {
        let (disk, volume) = self.served_volume(name)?;
        let geometry = disk.facts().geometry;
        let (changed, reason) = match disk.disk.written_since(volume.origin) {
            Ok(runs) => (Some(runs), None),
            Err(why) => (None, Some(why)),
        };
        let head = VolumeMap {
            name: disk.name.get(),
            block_size: geometry.block_bytes,
            blocks: geometry.blocks(),
            size_bytes: geometry.size_bytes,
            reason,
            owned: Vec::new(),
            changed: None,
        };
        let runs = |runs: Runs| Box::new(runs.map(|run| (run.start.0, run.count()))) as _;
        let all = || Box::new(std::iter::once((0_u64, geometry.blocks()))) as _;
        Ok(FoundMap { head, owned: disk.disk.owned_by_volume().map_or_else(all, runs), changed: changed.map(runs) })
    }

    pub(crate) fn status_of_volume(&self, name: &Name) -> Result<VolumeStatus, ApiError> {
        let (disk, volume) = self.served_volume(name)?;
        let geometry = disk.facts().geometry;
        let from = self.name_now(volume.snapshot, &volume.from);
        let source = self.all_disks().into_iter().find(|d| d.snapshots().iter().any(|s| s.id == volume.snapshot));
        let at = source.as_ref().map(|source| (source.id, volume.snapshot));
        let counts = disk.disk.volume_counts(volume.origin, at);
        let source_changed = match (&source, counts.source_changed) {
            (Some(source), Err(e)) => {
                Err(format!("it is not known what was written to {} since {from}: {e}", source.name))
            }
            (Some(_), known) => known,
            (None, _) => Err(format!("{from} is not there")),
        };
        let (differing, owned) = (counts.differing, counts.owned);
        let blocks = geometry.blocks();
        Ok(VolumeStatus {
            id: disk.id,
            name: disk.name.get(),
            source: from.split('@').next().unwrap_or_default().to_owned(),
            from,
            block_size: geometry.block_bytes,
            blocks,
            owned_blocks: owned,
            changed_blocks: counts.changed.as_ref().ok().copied(),
            source_changed_blocks: source_changed.as_ref().ok().copied(),
            differing_blocks: differing,
            percent_differing: differing.map(|part| VolumeStatus::percent(part, blocks)),
            percent_complete: VolumeStatus::percent(owned, blocks),
            reason: counts.changed.err().or(source_changed.err()),
        })
    }
}

fn diff(
    disk: &DiskEntry,
    first: Uuid,
    from: &dyn std::fmt::Display,
    to: Option<&SnapshotRef>,
) -> Result<Diff, ApiError> {
    if let Some(to) = to.filter(|to| to.disk != disk.name.get()) {
        let message = format!("to: {to} is not of {}", disk.name);
        return Err(ApiError::new(ErrorCode::InvalidRequest, message).with_action("name two moments of one disk"));
    }
    let facts = disk.facts();
    if let Some(reason) = &facts.base_broken {
        return Err(ApiError::new(ErrorCode::SnapshotBroken, format!("{}: {reason}", disk.name)));
    }
    let last = to.map(|to| disk.moment(to)).transpose()?;
    let until = to.map_or_else(|| "the present".to_owned(), ToString::to_string);
    let (source, runs) = disk.disk.changes(first, last).map_err(|e| match e {
        NoChanges::Gone => ApiError::snapshot_not_found(from),
        NoChanges::Order => ApiError::new(ErrorCode::InvalidRequest, format!("{from} is newer than {until}"))
            .with_action("name the older one first"),
        NoChanges::Draining => ApiError::new(ErrorCode::SnapshotBusy, format!("{from} or {until} is still draining"))
            .with_action("try again when it is quiesced"),
        NoChanges::Broken(reason) => ApiError::new(ErrorCode::SnapshotBroken, format!("{from} or {until}: {reason}")),
        NoChanges::Unknown(why) => ApiError::new(
            ErrorCode::ChangesUnknown,
            format!("everything may have changed between {from} and {until}: {why}"),
        ),
    })?;
    let sized = |id| facts.version(id).map(|v| v.size_bytes).or_else(|| facts.mark(id).map(|m| m.size_bytes));
    let size_bytes = last.and_then(sized).unwrap_or(facts.geometry.size_bytes);
    let geometry = Geometry { size_bytes, ..facts.geometry };
    let source = match source {
        ChangeSource::Changed => DiffSource::ChangedTables,
        ChangeSource::Owned => DiffSource::OwnedTables,
    };
    let range = move |run: BlockRange| {
        let (at, length) = geometry.bytes(run);
        ByteRange { offset: at.0, length }
    };
    Ok(Diff { source, ranges: Box::new(runs.map(range)) })
}
