//! What a start makes of one disk. Pure: the evidence is asked, and nothing is changed.
//!
//! The rules are those of docs/on-disk-format.md, "What is believed depends on how the daemon ended".

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::record::{Remembered, contradictions, settle_pending, take_newest_segment, versions_of};
use super::{
    ChangedUse, Content, Durable, DurableFacts, Evidence, ImageFacts, ImageUse, LayerUse, LegUse, MirrorRecovery,
    PackUse, Recovery, RestoreRecovery, Role, Shutdown, TableSource, TableUse, VersionRecovery, Why,
};
use crate::door::LegState;
use crate::store::{
    Believed, ChangedRecord, DiskRecord, Fingerprint, Layout, LegRecord, MirrorRecord, Pack, SnapshotRecord,
};

/// Decides, as if whatever a volume stands on and a disk is restored from were there; [`super::settle`] looks at that.
#[must_use]
pub fn decide(record: &DiskRecord, shutdown: Shutdown, evidence: &dyn Evidence) -> Recovery {
    let contradiction = contradictions(record).into_iter().next();
    let mut record = record.clone();
    settle_pending(&mut record);
    let mut recovery = Recovery {
        shutdown,
        disk: if shutdown == Shutdown::PowerCut { Content::AsFlushed } else { Content::Whole },
        mirror: None,
        versions: Vec::new(),
        bookmarks: Vec::new(),
        discards: None,
        restore: None,
        size_bytes: None,
        grows_to: None,
        record,
    };
    if let Some(what) = contradiction {
        recovery.disk = Content::Unserved(Why::Contradiction(what));
        return recovery;
    }
    match size_of(&mut recovery, evidence) {
        Ok(size_bytes) => {
            recovery.size_bytes = Some(size_bytes);
            Decision { shutdown, evidence, size_bytes }.fill(&mut recovery);
        }
        Err(why) => recovery.disk = Content::Unserved(why),
    }
    recovery
}

/// The same for a disk of which the user has said that its guests were stopped: what was flushed is enough, of a log without
/// its run table, and of one that is not as it was saved.
#[must_use]
pub fn decide_flushed(record: &DiskRecord, shutdown: Shutdown, evidence: &dyn Evidence) -> Recovery {
    let decided = decide(record, shutdown, evidence);
    let is_enough = match (shutdown, decided.why_unserved()) {
        (Shutdown::Killed, _) => true,
        (Shutdown::Clean, Some(Why::LiveLost(why))) => matches!(**why, Why::FlushedIsWhole(_)),
        _ => false,
    };
    if is_enough { decide(record, Shutdown::PowerCut, evidence) } else { decided }
}

/// How large the disk is: as it was when it was served last, if its full image has room for that; by its mirror, or by what it
/// stands on.
fn size_of(recovery: &mut Recovery, evidence: &dyn Evidence) -> Result<u64, Why> {
    let record = &recovery.record;
    if let Some(volume) = &record.volume {
        return Ok(volume.size_bytes);
    }
    let Some(mirror) = record.mirror.clone() else {
        // That of a volume which became independent was a log, wherever it lies.
        let image = evidence.full_image(record.logical_block_bytes.is_some())?;
        recognise(record, &image.path, record.saved, evidence)?;
        let size_bytes = size_of_full(&image, evidence.block_bytes())?;
        let before_bytes = record.size_bytes;
        recovery.grows_to = (size_bytes > before_bytes).then_some(size_bytes);
        return match size_bytes < before_bytes {
            true => Err(Why::Shrunk { path: image.path, size_bytes, before_bytes }),
            false => Ok(before_bytes),
        };
    };
    let (legs, size) = decide_mirror(record, &mirror, evidence);
    recovery.mirror = Some(legs);
    size
}

/// Refuses another image than the one that was there. One that looks exactly as at the clean stop is the same somewhere else: a
/// copy that kept the time of the last write. Where the records are a copy themselves files are copies, too, and known by nothing.
fn recognise(record: &DiskRecord, path: &Path, saved: Option<Fingerprint>, found: &dyn Evidence) -> Result<(), Why> {
    let (Some(was), Some(now)) = (record.identities.get(path), found.identity(path)) else { return Ok(()) };
    let looks_the_same = saved.is_some_and(|looks| looks.modified_ns != 0) && saved == found.looks(path);
    let is_all_copied = record.kept_in.as_ref().zip(found.kept_in()).is_some_and(|(was, now)| was.is_other(&now));
    let is_copy = looks_the_same || (is_all_copied && was.is_file() && now.is_file());
    match was.is_other(&now) && !is_copy {
        true => Err(Why::Stranger { path: path.to_owned(), was: was.clone(), now }),
        false => Ok(()),
    }
}

fn size_of_full(image: &ImageFacts, block_bytes: u32) -> Result<u64, Why> {
    let ImageFacts { path, size_bytes, unit_bytes } = image.clone();
    if unit_bytes > block_bytes {
        return Err(Why::Unit { path, unit_bytes, block_bytes });
    }
    Ok(size_bytes)
}

/// Which legs are used, and how large they are.
fn decide_mirror(
    record: &DiskRecord,
    mirror: &MirrorRecord,
    evidence: &dyn Evidence,
) -> (MirrorRecovery, Result<u64, Why>) {
    // Those from before the last split; the full image of the newer ones is the mirror.
    let split_off = match record.live_splits {
        true => &record.snapshots[..],
        false => &record.snapshots[..record.snapshots.iter().rposition(|s| s.splits).unwrap_or(0)],
    };
    let mut size: Option<Result<u64, Why>> = None;
    let mut usable = Vec::new();
    let mut look = |leg: &LegRecord| {
        if split_off.iter().any(|s| s.owns_all && s.image == leg.path) {
            return LegUse::Held;
        }
        if let Err(why) = recognise(record, &leg.path, leg.saved, evidence) {
            return LegUse::Unused(why);
        }
        if record.saved.is_some() && leg.saved != evidence.looks(&leg.path) {
            return LegUse::Unused(Why::ImageChanged(leg.path.clone()));
        }
        let image = match evidence.leg(&leg.path) {
            Ok(image) => image,
            Err(e) => return LegUse::Unused(e.into()),
        };
        let this = size_of_full(&image, evidence.block_bytes());
        match (&size, &this) {
            (Some(Ok(size)), Ok(this)) if size != this => return LegUse::Unused(Why::LegSize(leg.path.clone())),
            (None, _) => size = Some(this),
            (Some(Ok(_)), Err(_)) => size = Some(this),
            _ => {}
        }
        usable.push(leg.id);
        LegUse::InUse(LegState::InSync)
    };
    let legs: Vec<_> = mirror.legs.iter().map(|leg| (leg.path.clone(), look(leg))).collect();
    let mut decided = MirrorRecovery { legs, facts: None };
    let unused = decided.legs.iter().find_map(|(_, leg)| match leg {
        LegUse::Unused(why) => Some(why.clone()),
        _ => None,
    });
    let size = match (size, &unused) {
        // Which of them is the disk nobody knows.
        (Some(_), Some(why @ Why::LegSize(_))) => Err(why.clone()),
        (Some(size), _) => size,
        (None, _) => Err(unused.clone().unwrap_or(Why::NoLeg)),
    };
    let facts = size.clone().and_then(|size| {
        evidence.mirror(mirror, &usable, size).map_err(|e| match &unused {
            Some(why) => Why::Mirror(format!("{e}; {why}")),
            None => e.into(),
        })
    });
    let facts = match facts {
        Ok(facts) => facts,
        Err(why) => return (decided, Err(why)),
    };
    for (leg, (_, what)) in mirror.legs.iter().zip(&mut decided.legs) {
        if matches!(what, LegUse::InUse(_)) {
            let state = facts.legs.iter().find(|(id, _)| *id == leg.id).map(|(_, state)| state.clone());
            // It is recorded before the bitmap is told of it.
            *what = state.map_or(LegUse::Unused(Why::NotAttached), LegUse::InUse);
        }
    }
    decided.facts = Some(facts);
    (decided, size)
}

/// What stays the same while a disk is decided on.
struct Decision<'a> {
    shutdown: Shutdown,
    evidence: &'a dyn Evidence,
    /// Of the live version.
    size_bytes: u64,
}

/// Where a version lies in its segment.
#[derive(Clone, Copy)]
struct Place {
    /// It has the full image, or a log above it.
    is_at_or_above: bool,
    /// It is in the segment of the live version.
    is_newest: bool,
}

impl Decision<'_> {
    /// How many blocks so many bytes take.
    fn blocks(&self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(u64::from(self.evidence.block_bytes()))
    }

    fn fill(&self, recovery: &mut Recovery) {
        let record = recovery.record.clone();
        if let (Shutdown::Clean, Some(seal)) = (self.shutdown, record.saved_discards) {
            let found = self.evidence.saved_table(record.id, self.blocks(self.size_bytes), seal);
            recovery.discards = Some(found.map(|()| seal).map_err(Why::from));
        }
        recovery.bookmarks =
            record.bookmarks.iter().map(|b| self.changed(b.id, b.size_bytes, b.changed.as_ref())).collect();
        let mut left = versions_of(&record);
        let mut is_newest = true;
        // From the newest segment to the oldest.
        while !left.is_empty() {
            self.segment(&record, take_newest_segment(&mut left), is_newest, recovery);
            is_newest = false;
        }
        recovery.versions.reverse();
        self.decide_restore(recovery);
        forget_legs(recovery);
    }

    /// From the newest version to the oldest; appends.
    fn segment(&self, record: &DiskRecord, segment: Vec<Remembered>, is_newest: bool, recovery: &mut Recovery) {
        let (splits, known) = (segment.first().is_some_and(|v| v.splits), recovery.versions.len());
        let pivot = segment.iter().position(|v| v.owns_all);
        let mut lost = match (pivot, self.shutdown) {
            (None, _) => Some(Why::NoFullImage),
            (_, Shutdown::Changed) => Some(Why::DiskChanged),
            _ => None,
        };
        for (i, version) in segment.into_iter().enumerate().rev() {
            let place = Place { is_at_or_above: pivot.is_some_and(|p| i >= p), is_newest };
            let is_needed = is_newest && place.is_at_or_above;
            // A disk's own image that was changed is served as it is, if nothing lies above it.
            let is_own = is_needed && version.owns_all && !matches!(version.role, Role::Frozen(_));
            let layer = match &lost {
                Some(why) if !is_own => Err(why.clone()),
                _ => self.layer(record, &version, place),
            };
            match &layer {
                Err(why) if is_needed => {
                    if recovery.why_unserved().is_none() {
                        recovery.disk = Content::Unserved(Why::LiveLost(Box::new(why.clone())));
                    }
                }
                Err(why) => {
                    lost.get_or_insert(Why::ReadsThrough { for_good: why.is_for_good() });
                }
                Ok(LayerUse::Log(_, TableUse { source: TableSource::Committed(_), .. })) if is_needed => {
                    if recovery.disk == Content::Whole {
                        recovery.disk = Content::AsFlushed;
                    }
                }
                Ok(_) => {}
            }
            let broken = self.broken(record, &version, &layer, recovery.mirror.as_ref());
            let changed = self.changed(version.id, version.size_bytes, version.changed.as_ref());
            let Remembered { id, role, began, size_bytes, .. } = version;
            // One that is lost is by itself: when it is deleted, the others must not be taken for the segment before.
            let splits = if layer.is_ok() { version.splits } else { splits };
            recovery.versions.push(VersionRecovery { id, began, size_bytes, role, splits, layer, broken, changed });
        }
        // When the version that began with the split is lost, the next one begins with it.
        if let Some(oldest) = recovery.versions[known..].iter_mut().rev().find(|v| v.layer.is_ok()) {
            oldest.splits = splits;
        }
    }

    fn layer(&self, record: &DiskRecord, version: &Remembered, place: Place) -> Result<LayerUse, Why> {
        if version.owns_all && place.is_newest {
            return Ok(LayerUse::Base);
        }
        let image = version.image.clone().ok_or(Why::NoFullImage)?;
        if !version.owns_all && !self.evidence.is_file(&image) {
            return Err(Why::Missing(image));
        }
        let is_as_saved = version.saved.is_some() && version.saved == self.evidence.looks(&image);
        if self.shutdown == Shutdown::Clean && !is_as_saved {
            return Err(Why::ImageChanged(image));
        }
        recognise(record, &image, version.saved, self.evidence)?;
        let found = self.evidence.layer_image(&image)?;
        let (block_bytes, is_packed) = (self.evidence.block_bytes(), version.layout == Layout::Packed);
        let size_bytes = match version.layout {
            Layout::Sparse => Some(version.size_bytes),
            Layout::Packed => Pack::image_bytes(version.size_bytes, block_bytes),
        };
        if Some(found.size_bytes) != size_bytes {
            return Err(Why::Size { path: image, size_bytes: found.size_bytes, layout: version.layout });
        }
        if version.owns_all {
            return Ok(LayerUse::Full(image));
        }
        // The table says whether the image is asked for at all.
        let table = if place.is_at_or_above {
            self.log_table(version, &image)?
        } else {
            let Role::Frozen(at) = version.role else { return Err(Why::NoFullImage) };
            self.table_of_saved(version, &record.snapshots[at])?
        };
        let mut pack = None;
        if is_packed {
            let believed = self.shutdown.of_packs();
            let look =
                |believed| self.evidence.pack(&image, version.id, version.size_bytes, believed).map_err(Why::from);
            let facts = look(believed).map_err(|why| match place.is_at_or_above && look(Believed::Synced).is_ok() {
                true => Why::FlushedIsWhole(Box::new(why)),
                false => why,
            })?;
            pack = Some(PackUse { believed, facts });
        }
        let image = ImageUse { path: image, pack };
        Ok(if place.is_at_or_above { LayerUse::Log(image, table) } else { LayerUse::Saved(image, table) })
    }

    /// The table of a version as it was left, and whether it says that the version is broken.
    fn left(&self, id: Uuid, size_bytes: u64, seal: Option<Uuid>) -> Result<(TableSource, bool), Why> {
        match self.shutdown {
            Shutdown::Clean => {
                let seal = seal.ok_or(Why::NotSaved)?;
                self.evidence.saved_table(id, self.blocks(size_bytes), seal)?;
                Ok((TableSource::Saved(seal), false))
            }
            Shutdown::Killed => {
                let facts = self.evidence.run_table(id, self.blocks(size_bytes))?;
                Ok((TableSource::Run, facts.is_broken))
            }
            Shutdown::PowerCut => Err(Why::NotStored),
            Shutdown::Changed => Err(Why::DiskChanged),
        }
    }

    /// A table that has a durable copy: as it was left, or else as it was committed last.
    fn durable(
        &self,
        (id, size_bytes, image): (Uuid, u64, Option<&Path>),
        durable: Durable,
        left: Result<(TableSource, bool), Why>,
    ) -> Result<TableUse, Why> {
        let facts = self.evidence.durable_table(durable, id, self.blocks(size_bytes))?;
        let damage = Why::damage(&facts, image.unwrap_or(&facts.place));
        let (durable, mut is_broken) = (Some(durable), false);
        match (left, damage) {
            (Ok((source, says_so)), mended) => {
                is_broken |= says_so;
                Ok(TableUse { source, durable, mended, is_broken })
            }
            (Err(_), Some(damage)) => Err(damage),
            (Err(why), None) => {
                let unexpected = Some(why).filter(|_| self.shutdown != Shutdown::PowerCut);
                Ok(TableUse { source: TableSource::Committed(unexpected), durable, mended: None, is_broken })
            }
        }
    }

    fn log_table(&self, version: &Remembered, image: &Path) -> Result<TableUse, Why> {
        let left = self.left(version.id, version.size_bytes, version.saved_table);
        if let (Shutdown::Killed, Err(why)) = (self.shutdown, &left) {
            // The guest may go on: what it was told is written must not be gone without a word.
            return Err(Why::WithoutRunTable(Box::new(why.clone())));
        }
        self.durable((version.id, version.size_bytes, Some(image)), Durable::Log, left)
    }

    /// The table of what is saved for a frozen version.
    fn table_of_saved(&self, version: &Remembered, record: &SnapshotRecord) -> Result<TableUse, Why> {
        if self.shutdown == Shutdown::PowerCut && !record.durable {
            return Err(Why::PowerCut);
        }
        let left = self.left(version.id, version.size_bytes, version.saved_table);
        if !record.durable {
            let (source, is_broken) = left?;
            return Ok(TableUse { source, durable: None, mended: None, is_broken });
        }
        // Older ones still read through one that was given up, by a table that is as durable as theirs.
        let is_given_up = self.evidence.is_given_up(version.id);
        let durable = if is_given_up { Durable::GivenUp } else { Durable::Saved };
        // Requests that drain take entries of newer versions away in memory only.
        let is_unknown = left.is_err() && self.shutdown == Shutdown::Killed && record.quiesced_ms.is_none();
        let mut table = self.durable((version.id, version.size_bytes, Some(&record.image)), durable, left)?;
        table.is_broken |= is_given_up || is_unknown;
        Ok(table)
    }

    /// Why a snapshot cannot be vouched for although its layer is there.
    fn broken(
        &self,
        record: &DiskRecord,
        version: &Remembered,
        layer: &Result<LayerUse, Why>,
        mirror: Option<&MirrorRecovery>,
    ) -> Option<Why> {
        let Role::Frozen(at) = version.role else { return None };
        let snapshot = &record.snapshots[at];
        if let Some(reason) = &snapshot.broken {
            return Some(Why::Said(reason.clone()));
        }
        let layer = layer.as_ref().ok()?;
        if let Some(reason) = self.evidence.why_broken(version.id) {
            return Some(match reason.is_empty() {
                true => Why::Broke,
                false => Why::Said(reason),
            });
        }
        if layer.table().is_some_and(|table| table.is_broken) {
            return Some(Why::Broke);
        }
        if let (LayerUse::Full(image), Some(mirror)) = (layer, mirror)
            && has_failed(record, mirror, image)
        {
            return Some(Why::LegFailed(image.clone()));
        }
        let is_unfinished = snapshot.quiesced_ms.is_none();
        (self.shutdown == Shutdown::PowerCut && is_unfinished).then_some(Why::Unfinished)
    }

    /// What is known of the changes of a version or bookmark.
    fn changed(&self, id: Uuid, size_bytes: u64, record: Option<&ChangedRecord>) -> Option<Result<ChangedUse, Why>> {
        let record = record?;
        if let Some(lost) = &record.lost {
            return Some(Err(Why::Said(lost.clone())));
        }
        Some(match self.shutdown {
            Shutdown::PowerCut => Err(Why::ChangesCut),
            Shutdown::Changed => Err(Why::DiskChanged),
            Shutdown::Clean => match record.saved {
                None => Err(Why::ChangesNotSaved),
                Some(seal) => {
                    let found = self.evidence.saved_changes(id, self.blocks(size_bytes), seal);
                    found.map(|()| ChangedUse::Saved(seal)).map_err(Why::from)
                }
            },
            Shutdown::Killed => match self.evidence.run_changes(id, self.blocks(size_bytes)) {
                Ok(facts) if facts.is_broken => Err(Why::ChangesIncomplete),
                Ok(_) => Ok(ChangedUse::Run),
                Err(e) => Err(e.into()),
            },
        })
    }

    /// A restore that has begun: the table of pending blocks, and the disk's own snapshot that they show.
    fn decide_restore(&self, recovery: &mut Recovery) {
        let Some(restore) = recovery.record.restore.clone().filter(|r| r.is_shown()) else { return };
        // All is brought back, durably: only the record does not say so yet. Nothing is needed of the source, which may be gone.
        let is_over = |facts: DurableFacts| facts.ones == 0 && facts.damaged.is_empty();
        if self.shutdown != Shutdown::Changed
            && self.evidence.durable_table(Durable::Log, restore.id, self.blocks(self.size_bytes)).is_ok_and(is_over)
        {
            recovery.record.restore = None;
            return;
        }
        let pending = self.pending(restore.id);
        let source = recovery.record.snapshots.iter().position(|s| s.id == restore.source);
        let source = source.and_then(|at| recovery.version(Role::Frozen(at)));
        let why = match (&pending, source) {
            (Err(why), _) => Some(why.clone()),
            (Ok(_), _) if !restore.is_own() => None,
            // One that broke while it was served is there all the same.
            (Ok(_), Some(source)) => source.layer.as_ref().err().cloned(),
            (Ok(_), None) => Some(Why::SnapshotLost),
        };
        if let Some(why) = why.filter(|_| recovery.why_unserved().is_none()) {
            recovery.disk = Content::Unserved(Why::RestoreLost { from: restore.from, why: Box::new(why) });
        }
        recovery.restore = Some(RestoreRecovery { pending });
    }

    fn pending(&self, id: Uuid) -> Result<TableUse, Why> {
        let left = match self.shutdown {
            Shutdown::Changed => return Err(Why::DiskChanged),
            Shutdown::Killed => {
                self.left(id, self.size_bytes, None).map_err(|why| Why::WithoutRunTable(Box::new(why)))?
            }
            // A clean stop commits it.
            Shutdown::Clean | Shutdown::PowerCut => {
                let table = self.durable((id, self.size_bytes, None), Durable::Log, Err(Why::NotStored))?;
                return Ok(TableUse { source: TableSource::Committed(None), ..table });
            }
        };
        self.durable((id, self.size_bytes, None), Durable::Log, Ok(left))
    }
}

/// Whether an image was a leg that its mirror durably goes without: then a write was acknowledged that it may not have. That is
/// durable before the write is acknowledged, which may be before the snapshot that has the leg is in the chain.
fn has_failed(record: &DiskRecord, mirror: &MirrorRecovery, image: &Path) -> bool {
    let legs = record.mirror.iter().flat_map(|mirror| &mirror.legs);
    let Some(leg) = legs.into_iter().find(|leg| leg.path == image) else { return false };
    let states = mirror.facts.iter().flat_map(|facts| &facts.legs);
    states.into_iter().any(|(id, state)| *id == leg.id && matches!(state, LegState::Failed(_)))
}

/// With a snapshot that goes because its leg is missing or changed, the leg goes too: nobody knows what is on it.
fn forget_legs(recovery: &mut Recovery) {
    let Recovery { record, versions, mirror: Some(mirror), .. } = recovery else { return };
    for version in versions.iter().filter(|v| v.layer.is_err()) {
        let Role::Frozen(at) = version.role else { continue };
        let gone = &record.snapshots[at];
        let left = mirror.legs.iter().filter(|(_, leg)| *leg != LegUse::Forgotten).count();
        if gone.deletion.is_some() && gone.owns_all && left > 1 {
            let is_it = |(path, _): &&mut (PathBuf, LegUse)| *path == gone.image;
            mirror.legs.iter_mut().filter(is_it).for_each(|(_, leg)| *leg = LegUse::Forgotten);
        }
    }
}
