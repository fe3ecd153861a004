//! Taking up the versions of a disk that is remembered.
//!
//! What is believed depends on how the daemon ended. After a clean stop: everything, if it still looks as it was left. After
//! a kill in this boot: the tables in the run directory, which the kernel kept. After a power cut: what was made
//! durable: full images, logs as of their last flush, and what was saved for snapshots of disks with durability=power.
//!
//! What always holds: a snapshot of which something is missing is broken and says why, and so are those that read through
//! it. If the live version cannot be had, the disk is not served at all: an older content under its name would be a lie.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, ErrorCode};
use crate::image::SharedImage;
use crate::mirror::planted::{self, Defect};
use crate::mirror::{Backing, Changed, Epoch, Layer, Link, Mark, Version};
use crate::store::{ChangedRecord, DiskRecord, Fingerprint, SnapshotRecord, Table};

const POWER_CUT: &str = "the host went down while it was served, and what was saved for it was not on stable storage; \
     delete this snapshot and take another (on a disk with durability=power it would have been kept)";
const UNFINISHED: &str = "the host went down before all of it was on stable storage; delete it and take another";
const CHANGED: &str = "the disk's image was changed while the daemon was not running; \
     delete this snapshot and take another";
const READS_THROUGH: &str = "a newer snapshot through which it reads is lost; delete it and take another";
pub(super) const CHANGES_CUT: &str =
    "the host went down while it was served, and what was noted of its changes with it";
const CHANGES_SPLIT: &str = "the daemon ended while requests from before a split were on their way to both legs";
pub(super) const CHANGES_CHANGED: &str = "the disk's image was changed while the daemon was not running";
pub(super) const BROKE: &str = "it broke just before the daemon or the host went down; delete it and take another";

/// How the daemon ended the last time, and so what is believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trust {
    /// It stopped cleanly, and the disk's image looks as it did then.
    Saved,
    /// It was killed in this boot.
    SameBoot,
    /// The machine went down.
    PowerCut,
    /// It stopped cleanly, but somebody wrote the disk's image since.
    Changed,
}

impl Trust {
    /// What is believed of a disk whose image looks like that, in the boot `boot`.
    #[must_use]
    pub fn of(record: &DiskRecord, looks: Option<Fingerprint>, boot: Uuid) -> Trust {
        match record.saved {
            Some(_) if record.saved == looks || planted::is(Defect::ChangedDiskTaken) => Trust::Saved,
            Some(_) => Trust::Changed,
            None if record.boot == Some(boot) || planted::is(Defect::OtherBootBelieved) => Trust::SameBoot,
            None => Trust::PowerCut,
        }
    }
}

/// Where the layers of a remembered disk come from after an end of the daemon that it knows of. An error is the reason why
/// one cannot be had.
pub trait LayerSource {
    /// Whether there is a plain file.
    fn is_file(&self, path: &Path) -> bool;

    /// How an image looks, if it is there.
    fn fingerprint(&self, path: &Path) -> Option<Fingerprint>;

    /// Why a version broke before the daemon or the host went down, if it is known.
    fn broke(&self, _id: Uuid) -> Option<String> {
        None
    }

    /// A full image beside the disk's own: a leg that a snapshot has for itself.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open_full(&self, path: &Path) -> Result<SharedImage, String>;

    /// What is saved for a frozen version.
    ///
    /// # Errors
    /// When it cannot be opened, or not be believed after this end of the daemon.
    fn open_frozen(&self, record: &SnapshotRecord) -> Result<Layer, String>;

    /// The log at `path` of the version `id`, whose table was saved under `seal` at a clean stop.
    ///
    /// # Errors
    /// When it cannot be opened, or not be believed after this end of the daemon.
    fn open_log(&self, id: Uuid, path: &Path, seal: Option<Uuid>) -> Result<Layer, String>;

    /// The changed table of the version `id`, which was saved under `seal` at a clean stop. Asked for only after such an
    /// end of the daemon, or its death in this boot.
    ///
    /// # Errors
    /// When it cannot be had.
    fn open_changed(&self, _id: Uuid, _seal: Option<Uuid>) -> Result<Arc<Table>, String> {
        Err("its changed table is not there".to_owned())
    }
}

/// What is taken up of a disk.
pub struct Taken {
    /// Oldest first; the last one is live.
    pub links: Vec<Link>,
    /// Oldest first. Those without a version are lost.
    pub snapshots: Vec<(SnapshotRecord, Option<Arc<Version>>)>,
    /// What is known of changes up to bookmarks and to snapshots without a version.
    pub marks: Vec<Mark>,
}

/// A version as it is remembered; without a snapshot it is the live one, or what a volume stands on.
struct Slot {
    id: Uuid,
    began: u64,
    image: PathBuf,
    owns_all: bool,
    splits: bool,
    snapshot: Option<SnapshotRecord>,
    saved_table: Option<Uuid>,
    /// How a log looked at the last clean stop.
    saved: Option<Fingerprint>,
    changed: Option<ChangedRecord>,
}

impl Taken {
    /// A disk of which nothing is remembered.
    #[must_use]
    pub fn of_new_disk(base: Backing) -> Taken {
        let link = Link { version: Version::new(Uuid::new_v4(), Epoch(0)), layer: Layer::full(base), splits: false };
        Taken { links: vec![link], snapshots: Vec::new(), marks: Vec::new() }
    }
}

/// The versions of a disk whose full image is `base`, known as `path`; of a volume that is what it stands on.
///
/// # Errors
/// When what the live version needs is not there or cannot be believed.
pub fn take_up(
    mut record: DiskRecord,
    base: &Backing,
    path: &Path,
    trust: Trust,
    source: &dyn LayerSource,
) -> Result<Taken, ApiError> {
    settle_pending(&mut record);
    let way = TakeUp { base, trust, source };
    let bookmarks = std::mem::take(&mut record.bookmarks);
    let mark = |id, began, changed| Mark { id, began: Epoch(began), changed: way.changed(id, changed) };
    // An independent volume still knows what was written since it was made.
    let origin = record.stood_on.as_ref().map(|volume| mark(volume.origin, 0, None));
    let marks = origin.into_iter().chain(bookmarks.iter().map(|b| mark(b.id, b.began, b.changed.as_ref()))).collect();
    let mut taken = Taken { links: Vec::new(), snapshots: Vec::new(), marks };
    let mut slots = slots_of(record, path);
    doubt_splits(&mut slots);
    // From the newest segment to the oldest.
    let mut is_newest = true;
    while !slots.is_empty() {
        let first = slots.iter().rposition(|s| s.splits).unwrap_or(0);
        let segment = slots.split_off(first);
        way.segment(segment, is_newest, &mut taken)?;
        is_newest = false;
    }
    taken.links.reverse();
    taken.snapshots.reverse();
    let lost = taken.snapshots.iter().filter(|(_, version)| version.is_none());
    taken.marks.extend(lost.map(|(record, _)| mark(record.id, record.began, record.changed.as_ref())));
    // Of what a volume stands on too: nobody is left who could change it.
    let frozen = taken.links.len() - 1;
    taken.links[..frozen].iter().for_each(|link| link.version.set_quiesced());
    Ok(taken)
}

/// What stays the same while a disk's versions are taken up.
struct TakeUp<'a> {
    base: &'a Backing,
    trust: Trust,
    source: &'a dyn LayerSource,
}

impl TakeUp<'_> {
    /// From the newest version to the oldest; appends.
    fn segment(&self, segment: Vec<Slot>, is_newest: bool, taken: &mut Taken) -> Result<(), ApiError> {
        let (splits, known) = (segment.first().is_some_and(|s| s.splits), taken.links.len());
        let pivot = segment.iter().position(|s| s.owns_all);
        let mut lost: Option<String> = match (pivot, self.trust) {
            (None, _) => Some("its records name no full image".to_owned()),
            (_, Trust::Changed) => Some(CHANGED.to_owned()),
            _ => None,
        };
        for (i, slot) in segment.into_iter().enumerate().rev() {
            let is_at_or_above = pivot.is_some_and(|p| i >= p);
            let needed = is_newest && is_at_or_above;
            // A disk's own image that was changed is served as it is, if nothing lies above it.
            let usable = lost.is_none() || (needed && slot.snapshot.is_none() && slot.owns_all);
            let layer = match usable {
                true => self.layer(&slot, is_at_or_above, is_newest),
                false => Err(lost.clone().unwrap_or_default()),
            };
            match layer {
                Ok(layer) => self.take(slot, layer, taken),
                Err(why) if needed => {
                    let what = "its newest content is in a log that cannot be taken up";
                    return Err(ApiError::new(ErrorCode::DiskFailed, format!("{what}: {why}"))
                        .with_action("restore what is missing; nothing has been changed"));
                }
                Err(why) => {
                    if let Some(mut snapshot) = slot.snapshot {
                        log::debug!("snapshot {} cannot be taken up: {why}", snapshot.name);
                        snapshot.broken.get_or_insert(why);
                        // Each by itself: when one is deleted, the others must not be taken for the segment before.
                        snapshot.splits = splits;
                        taken.snapshots.push((snapshot, None));
                    }
                    lost.get_or_insert_with(|| READS_THROUGH.to_owned());
                }
            }
        }
        // When the version that began with the split is lost, the next one begins with it.
        if let Some(oldest) = taken.links[known..].last_mut() {
            oldest.splits = splits;
        }
        Ok(())
    }

    fn layer(&self, slot: &Slot, is_at_or_above: bool, is_newest: bool) -> Result<Layer, String> {
        if slot.owns_all && is_newest {
            return Ok(Layer::full(self.base.clone()));
        }
        if !slot.owns_all && !self.source.is_file(&slot.image) {
            return Err(format!("its image {} is missing or is not a file", slot.image.display()));
        }
        if let (Trust::Saved, Some(snapshot)) = (self.trust, &slot.snapshot)
            && !planted::is(Defect::ChangedCopiesTaken)
            && (snapshot.saved.is_none() || snapshot.saved != self.source.fingerprint(&slot.image))
        {
            return Err(format!("its image {} was changed while the daemon was not running", slot.image.display()));
        }
        if self.trust == Trust::Saved && slot.saved.is_some() && slot.saved != self.source.fingerprint(&slot.image) {
            return Err(format!("{} was changed while the daemon was not running", slot.image.display()));
        }
        if slot.owns_all {
            return Ok(Layer::full(Backing::One(self.source.open_full(&slot.image)?)));
        }
        if is_at_or_above {
            return self.source.open_log(slot.id, &slot.image, slot.saved_table);
        }
        let snapshot = slot.snapshot.as_ref().ok_or("the live version has no layer")?;
        if self.trust == Trust::PowerCut && !snapshot.durable {
            return Err(POWER_CUT.to_owned());
        }
        self.source.open_frozen(snapshot)
    }

    /// What is known of the changes of a version.
    fn changed(&self, id: Uuid, record: Option<&ChangedRecord>) -> Option<Changed> {
        let record = record?;
        let is_believed = match self.trust {
            _ if record.lost.is_some() => Err(record.lost.clone().unwrap_or_default()),
            Trust::PowerCut if !planted::is(Defect::ChangesBelievedAfterCut) => Err(CHANGES_CUT.to_owned()),
            Trust::Changed => Err(CHANGES_CHANGED.to_owned()),
            Trust::Saved | Trust::SameBoot | Trust::PowerCut => Ok(()),
        };
        let opened = is_believed.and_then(|()| self.source.open_changed(id, record.saved));
        Some(match opened {
            Ok(table) => Changed::Noted(table),
            Err(why) => {
                log::warn!("version {id}: everything counts as changed: {why}");
                Changed::unknown(&why)
            }
        })
    }

    /// Appends a version that is all there.
    fn take(&self, slot: Slot, layer: Layer, taken: &mut Taken) {
        let changed = self.changed(slot.id, slot.changed.as_ref());
        let version = Version::noting(slot.id, Epoch(slot.began), changed);
        if let Some(mut snapshot) = slot.snapshot {
            version.set_leaves_mark(snapshot.keep_bookmark);
            version.set_quiesced();
            if let Some(reason) = self.source.broke(slot.id) {
                snapshot.broken.get_or_insert(reason);
            }
            if let Some(table) = layer.table()
                && table.is_broken()
            {
                snapshot.broken.get_or_insert_with(|| BROKE.to_owned());
            }
            let is_unfinished = snapshot.quiesced_ms.is_none() && !planted::is(Defect::UnfinishedKept);
            if self.trust == Trust::PowerCut && is_unfinished {
                snapshot.broken.get_or_insert_with(|| UNFINISHED.to_owned());
            }
            // Nobody is left who could change it.
            snapshot.quiesced_ms.get_or_insert_with(|| Timestamp::now().unix_ms());
            if let Some(reason) = &snapshot.broken {
                version.set_broken(reason.clone());
            }
            taken.snapshots.push((snapshot, Some(version.clone())));
        }
        taken.links.push(Link { version, layer, splits: slot.splits });
    }
}

/// A cut that was prepared: whether it came to be or not, there may be bytes of the new live version. The snapshot, of which
/// nobody was told, goes.
fn settle_pending(record: &mut DiskRecord) {
    let newest = record.snapshots.iter().flat_map(|s| [s.began, s.ended]).chain([record.live_began]).max();
    if let Some(pending) = record.snapshots.last_mut().filter(|s| s.ended == 0) {
        pending.ended = newest.unwrap_or(0) + 1;
        pending.deleting = !planted::is(Defect::PendingKept);
        record.live_began = pending.ended + 1;
    }
}

/// A request from before a split that was on its way when the daemon was killed may have reached one of the legs only. It was
/// noted for the older version alone: nobody knew of the newer one yet.
fn doubt_splits(slots: &mut [Slot]) {
    for newer in 1..slots.len() {
        let drained = slots[newer - 1].snapshot.as_ref().is_some_and(|s| s.quiesced_ms.is_some());
        let slot = &mut slots[newer];
        if let Some(changed) = slot.changed.as_mut().filter(|_| slot.splits && !drained)
            && !planted::is(Defect::SplitNotDoubted)
        {
            changed.lost.get_or_insert_with(|| CHANGES_SPLIT.to_owned());
        }
    }
}

fn slots_of(record: DiskRecord, path: &Path) -> Vec<Slot> {
    let live = Slot {
        id: record.live,
        began: record.live_began,
        owns_all: record.live_log.is_none(),
        image: record.live_log.unwrap_or_else(|| path.to_owned()),
        splits: record.live_splits,
        snapshot: None,
        saved_table: record.live_saved_table,
        saved: record.live_saved,
        changed: record.live_changed,
    };
    let has_pivot = live.owns_all || record.volume.is_some() || record.snapshots.iter().any(|s| s.owns_all);
    debug_assert!(has_pivot, "somebody has the full image");
    let frozen = record.snapshots.into_iter().map(|s| Slot {
        id: s.id,
        began: s.began,
        image: s.image.clone(),
        owns_all: s.owns_all,
        splits: s.splits,
        saved_table: s.saved_table,
        saved: None,
        changed: s.changed.clone(),
        snapshot: Some(s),
    });
    // What a volume stands on has everything that it does not have itself; no request acts there.
    let origin = record.volume.map(|volume| Slot {
        id: volume.origin,
        began: 0,
        owns_all: true,
        image: path.to_owned(),
        splits: false,
        snapshot: None,
        saved_table: None,
        saved: None,
        changed: None,
    });
    origin.into_iter().chain(frozen).chain([live]).collect()
}

#[cfg(test)]
#[path = "takeup_tests.rs"]
mod tests;
