//! One disk: its images, tables and legs, looked at without changing them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::changes;
use super::restore::look_at_restore;
use super::verdict::{self, Found, Lost, Place, Slot};
use super::{CheckedDisk, CheckedSnapshot, DiskVerdict, Examination, SnapshotVerdict};
use crate::control::Name;
use crate::control::api::DiskConfig;
use crate::daemon::layers::{block_on, damage_of, direct_of, is_only_in_memory, without_run_table};
use crate::daemon::takeup::Trust;
use crate::image::{Direct, FileImage, Image, ImageError, ImageErrorKind, SharedImage};
use crate::mirror::{LegImage, LegState, Pair, PairFacts};
use crate::store::{
    DiskRecord, DurableTable, Fingerprint, LoadReport, MirrorRecord, Table, TableError, TableName, examine_run_table,
};

const MENDED: &str = "nothing: its other copy is whole, and the next start writes it anew";
const PUT_BACK: &str = "put back what is missing; nothing has been changed";
const PUT_BACK_OR_DELETE: &str =
    "put back what is missing before the next start, or delete the volume: every request on it fails";
const POWER_CUT: &str = "the host went down while it was served, and what was saved for it was not on stable storage";

/// What a disk's layers are measured by.
#[derive(Clone, Copy)]
struct Shape {
    size_bytes: u64,
    block_bytes: u32,
}

impl Shape {
    fn blocks(self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.block_bytes))
    }
}

/// Examines a disk and says what a start would do.
pub(super) fn examine(of: &mut Examination, record: &DiskRecord) -> CheckedDisk {
    let config: Option<DiskConfig> = serde_json::from_value(record.config.clone()).ok();
    let from = record.volume.as_ref().or(record.stood_on.as_ref()).map(|volume| volume.from.clone());
    let path = config.as_ref().filter(|_| record.volume.is_none()).map(|c| c.path.clone());
    let mut checked = CheckedDisk {
        name: record.name.clone(),
        path,
        from,
        independent: record.stood_on.is_some(),
        disabled: record.disabled,
        ended: String::new(),
        verdict: DiskVerdict::NotServed,
        reason: None,
        action: None,
        snapshots: Vec::new(),
        bookmarks: Vec::new(),
    };
    let refuse = |mut checked: CheckedDisk, reason: String, action: &str| {
        checked.snapshots = record.snapshots.iter().map(|s| waiting(record, &s.name, s.broken.as_ref())).collect();
        (checked.reason, checked.action) = (Some(reason), Some(action.to_owned()));
        checked
    };
    let Some(config) = config.filter(|_| record.name.parse::<Name>().is_ok()) else {
        let action = "put a good copy of records.redb back";
        return refuse(checked, "its name or configuration cannot be understood".to_owned(), action);
    };
    let looks = match (&record.mirror, &record.volume) {
        (Some(_), _) | (_, Some(_)) => record.saved,
        (None, None) => Fingerprint::of(&config.path).ok(),
    };
    let trust = Trust::of(record, looks, of.boot);
    checked.ended = ended(trust).to_owned();
    let shape = match base_of(of, record, &config) {
        Ok(shape) => shape,
        Err(why) => return refuse(checked, why, PUT_BACK),
    };
    look_at_discards(of, record, trust, shape);
    let outcome = verdict::what_a_start_would_do(record, &config.path, trust, |slot, place| {
        look_at_layer(of, slot, place, (&config, shape, trust))
    });
    checked.snapshots = outcome.snapshots;
    checked.bookmarks = changes::look_at_changes(of, record, shape.blocks(), trust);
    if let (Ok(_), Some(why)) = (&outcome.disk, look_at_restore(of, record, shape.blocks(), trust, &checked.snapshots))
    {
        return refuse(checked, why, PUT_BACK);
    }
    match outcome.disk {
        Ok(false) => {
            checked.verdict = DiskVerdict::Served;
            if trust == Trust::Changed {
                checked.reason =
                    Some("its image was changed since the last stop; it is served as it is now".to_owned());
            }
        }
        Ok(true) => {
            checked.verdict = DiskVerdict::ServedAsFlushed;
            checked.reason = Some("what was acknowledged after the last flush may be missing".to_owned());
        }
        Err(why) => (checked.reason, checked.action) = (Some(why), Some(PUT_BACK.to_owned())),
    }
    checked
}

fn ended(trust: Trust) -> &'static str {
    match trust {
        Trust::Saved => "a clean stop",
        Trust::SameBoot => "a kill in this boot",
        Trust::PowerCut => "a power cut, or a kill before the last boot",
        Trust::Changed => "a clean stop, but its image was changed since",
    }
}

fn waiting(disk: &DiskRecord, name: &str, broken: Option<&String>) -> CheckedSnapshot {
    let verdict = if broken.is_some() { SnapshotVerdict::Broken } else { SnapshotVerdict::Waits };
    let snapshot = format!("{}@{name}", disk.name);
    CheckedSnapshot { snapshot, verdict, reason: broken.cloned(), action: None, for_good: false }
}

/// Says of each volume whether what it stands on would be there. Returns whether anything has changed by that: volumes may
/// stand on each other.
pub(super) fn look_at_base(checked: &mut [CheckedDisk], records: &[DiskRecord]) -> bool {
    let mut has_changed = false;
    for (at, record) in records.iter().enumerate() {
        let Some(volume) = &record.volume else { continue };
        if checked[at].verdict == DiskVerdict::NotServed {
            continue;
        }
        let base = records.iter().zip(&*checked).find_map(|(record, checked)| {
            let index = record.snapshots.iter().position(|s| s.id == volume.snapshot)?;
            checked.snapshots.get(index)
        });
        if base.is_some_and(|base| base.verdict == SnapshotVerdict::Kept) {
            continue;
        }
        let why = base.and_then(|base| base.reason.clone()).unwrap_or_else(|| "it is not there".to_owned());
        let reason = format!("it stands on {}: {why}", volume.from);
        let volume = &mut checked[at];
        volume.verdict = DiskVerdict::NotServed;
        for snapshot in volume.snapshots.iter_mut().filter(|s| s.verdict == SnapshotVerdict::Kept) {
            (snapshot.verdict, snapshot.reason) = (SnapshotVerdict::Broken, Some(reason.clone()));
        }
        (volume.reason, volume.action) = (Some(reason), Some(PUT_BACK_OR_DELETE.to_owned()));
        has_changed = true;
    }
    has_changed
}

/// Opens an image as a start would, but only to read.
fn probe(path: &Path, config: &DiskConfig, falls_back: bool) -> Result<FileImage, ImageError> {
    match FileImage::probe(path, direct_of(config)) {
        Err(e) if falls_back && config.direct && e.kind == ImageErrorKind::Unsuitable => {
            FileImage::probe(path, Direct::Off)
        }
        Ok(image) if falls_back && image.alignment().offset_bytes > config.block_size => {
            FileImage::probe(path, Direct::Off)
        }
        other => other,
    }
}

/// The full image: the disk's one image, or its mirror.
fn base_of(of: &mut Examination, record: &DiskRecord, config: &DiskConfig) -> Result<Shape, String> {
    if let Some(volume) = &record.volume {
        // What it stands on is looked at with its disk.
        return Ok(Shape { size_bytes: volume.size_bytes, block_bytes: config.block_size });
    }
    let Some(mirror) = &record.mirror else {
        // That of a volume which became independent was a log.
        let image = probe(&config.path, config, record.logical_block_bytes.is_some()).map_err(|e| e.to_string())?;
        return shape_of(&image, config);
    };
    // Those from before the last split; the full image of the newer ones is the mirror.
    let split_off = match record.live_splits {
        true => &record.snapshots[..],
        false => &record.snapshots[..record.snapshots.iter().rposition(|s| s.splits).unwrap_or(0)],
    };
    let (mut images, mut shape, mut why) = (Vec::new(), None, None);
    for leg in &mirror.legs {
        if split_off.iter().any(|s| s.owns_all && s.image == leg.path) {
            continue;
        }
        let found = if record.saved.is_some() && leg.saved != Fingerprint::of(&leg.path).ok() {
            Err("it was changed while the daemon was not running".to_owned())
        } else {
            probe(&leg.path, config, false).map_err(|e| e.to_string())
        };
        match found {
            Ok(image) => {
                let this = shape_of(&image, config)?;
                if shape.get_or_insert(this).size_bytes != this.size_bytes {
                    return Err(format!("{} has another size than the other leg", leg.path.display()));
                }
                images.push(LegImage { id: leg.id, image: Arc::new(image) });
            }
            Err(e) => {
                let action = "put it back, or add another leg with 'halfsilver disk mirror'";
                of.problem(&leg.path, format!("a leg of disk {} is not used: {e}", record.name), action);
                why.get_or_insert(e);
            }
        }
    }
    let shape = shape.ok_or_else(|| why.unwrap_or_else(|| "none of its legs is there".to_owned()))?;
    look_at_bitmap(of, record, mirror, images, shape)?;
    Ok(shape)
}

fn shape_of(image: &FileImage, config: &DiskConfig) -> Result<Shape, String> {
    let unit = image.alignment().offset_bytes;
    if unit > config.block_size {
        let path = image.path().display();
        return Err(format!("{path} takes units of {unit} bytes, more than its block size of {}", config.block_size));
    }
    Ok(Shape { size_bytes: image.size_bytes(), block_bytes: config.block_size })
}

fn look_at_bitmap(
    of: &mut Examination,
    record: &DiskRecord,
    mirror: &MirrorRecord,
    images: Vec<LegImage>,
    shape: Shape,
) -> Result<(), String> {
    let (id, path) = (mirror.bitmap, of.places.log_table(mirror.bitmap));
    let bitmap: SharedImage = Arc::new(FileImage::probe(&path, Direct::Off).map_err(|e| e.to_string())?);
    let Shape { size_bytes, block_bytes } = shape;
    let facts: PairFacts =
        block_on(async move |queue| Pair::examine(&images, bitmap, id, size_bytes, block_bytes, &queue).await)?
            .map_err(|e| e.to_string())?;
    if !facts.damaged.is_empty() {
        let what = format!("{} are damaged; their regions are copied anew", count(facts.damaged.len(), "range"));
        of.problem(&path, what, "nothing: the next start takes them as different");
    }
    let path_of = |id| mirror.legs.iter().find(|leg| leg.id == id).map_or_else(PathBuf::new, |leg| leg.path.clone());
    let both = facts.legs.iter().filter(|(_, state)| *state == LegState::InSync).count() == 2;
    for (id, state) in &facts.legs {
        let path = path_of(*id);
        match state {
            LegState::InSync => {}
            LegState::Resynchronising => {
                let what = format!("this leg of disk {} is behind in {}", record.name, count_regions(facts.regions));
                of.note(&path, what, "nothing: the next start goes on");
            }
            LegState::Split => {}
            LegState::Failed(reason) => {
                let what = format!("this leg of disk {} has failed: {reason}", record.name);
                of.problem(&path, what, "replace it with 'halfsilver disk mirror'");
            }
        }
    }
    if both && facts.regions > 0 {
        let what = format!("the legs of disk {} may differ in {}", record.name, count_regions(facts.regions));
        of.note(&path, what, "nothing: the next start copies them");
    }
    Ok(())
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

fn count_regions(regions: u64) -> String {
    count(usize::try_from(regions).unwrap_or(usize::MAX), "region")
}

/// Discards that were put off are advice: if they are lost, nothing is.
fn look_at_discards(of: &mut Examination, record: &DiskRecord, trust: Trust, shape: Shape) {
    let (Trust::Saved, Some(seal)) = (trust, record.saved_discards) else { return };
    let path = of.places.durable_table(record.id);
    let loaded = Table::in_memory(shape.blocks()).and_then(|table| table.load(&path, seal));
    if let Err(e) = loaded {
        let action = "nothing: some space is given back later than it could be";
        of.problem(&path, format!("discards of disk {} that were put off are forgotten: {e}", record.name), action);
    }
}

/// A layer, and what the mark of its version says.
fn look_at_layer(
    of: &mut Examination,
    slot: &Slot,
    place: Place,
    by: (&DiskConfig, Shape, Trust),
) -> Result<Found, Lost> {
    let found = look_at_what_is_left(of, slot, place, by)?;
    Ok(Found { broken: of.places.why_broken(slot.id).or(found.broken), ..found })
}

fn look_at_what_is_left(
    of: &mut Examination,
    slot: &Slot,
    place: Place,
    (config, shape, trust): (&DiskConfig, Shape, Trust),
) -> Result<Found, Lost> {
    if slot.owns_all && place.is_newest {
        return Ok(Found { is_as_flushed: trust == Trust::PowerCut, ..Found::default() });
    }
    let lost = |why: String| Lost { why, for_good: false };
    let image = slot.image.display();
    let is_file = std::fs::symlink_metadata(&slot.image).map(|m| m.is_file()).unwrap_or(false);
    if !is_file && !slot.owns_all {
        return Err(lost(format!("its image {image} is missing or is not a file")));
    }
    if let (Trust::Saved, Some(snapshot)) = (trust, &slot.snapshot)
        && (snapshot.saved.is_none() || snapshot.saved != Fingerprint::of(&slot.image).ok())
    {
        return Err(lost(format!("its image {image} was changed while the daemon was not running")));
    }
    if trust == Trust::Saved && slot.saved.is_some() && slot.saved != Fingerprint::of(&slot.image).ok() {
        return Err(lost(format!("{image} was changed while the daemon was not running")));
    }
    let opened = || {
        let opened = probe(&slot.image, config, true).map_err(|e| lost(e.to_string()))?;
        match opened.size_bytes() == shape.size_bytes {
            true => Ok(()),
            false => Err(lost(format!("its image {image} has {} bytes, not the disk's", opened.size_bytes()))),
        }
    };
    if slot.owns_all {
        return opened().map(|()| Found::default());
    }
    if place.is_at_or_above {
        let found = look_at_log(of, slot, shape, trust).map_err(lost)?;
        return opened().map(|()| found);
    }
    let is_durable = slot.snapshot.as_ref().is_some_and(|s| s.durable);
    if trust == Trust::PowerCut && !is_durable {
        return Err(Lost { why: POWER_CUT.to_owned(), for_good: true });
    }
    let left = look_at_table(of, slot, shape, trust);
    let is_broken = match is_durable {
        true => look_at_saved(of, slot, (shape, trust), left),
        false => left,
    };
    let is_broken = is_broken.map_err(lost)?;
    opened().map(|()| Found { broken: because(is_broken), ..Found::default() })
}

/// The table of a version as it was left. Returns whether it says that it is broken.
fn look_at_table(of: &Examination, slot: &Slot, shape: Shape, trust: Trust) -> Result<bool, String> {
    match trust {
        Trust::Saved => {
            let seal = slot.saved_table.ok_or("its table was not saved")?;
            let table = Table::in_memory(shape.blocks()).map_err(|e| e.to_string())?;
            table.load(&of.places.durable_table(slot.id), seal).map_err(|e| e.to_string())?;
            Ok(false)
        }
        Trust::SameBoot => {
            let name = TableName { id: slot.id, boot: of.boot };
            let facts = examine_run_table(&of.places.run_table(slot.id), shape.blocks(), name);
            facts.map(|facts| facts.is_broken).map_err(|e| e.to_string())
        }
        Trust::PowerCut => Err("its table was not on stable storage".to_owned()),
        Trust::Changed => Err("the disk's image was changed while the daemon was not running".to_owned()),
    }
}

/// The tables of a snapshot that outlives a power cut. Returns whether they say that it is broken.
fn look_at_saved(
    of: &mut Examination,
    slot: &Slot,
    (shape, trust): (Shape, Trust),
    left: Result<bool, String>,
) -> Result<bool, String> {
    let given_up = of.places.given_up_table(slot.id);
    let is_given_up = given_up.exists();
    let path = if is_given_up { given_up } else { of.places.saved_table(slot.id) };
    let is_unknown = left.is_err() && slot.snapshot.as_ref().is_some_and(|s| is_only_in_memory(s, trust));
    let is_broken = is_given_up || is_unknown || left == Ok(true);
    match (left, look_at_durable(&path, slot, shape)?) {
        (Ok(_), Some(what)) => of.problem(&path, what, MENDED),
        (Err(_), Some(what)) => return Err(what),
        (_, None) => {}
    }
    Ok(is_broken)
}

fn because(is_broken: bool) -> Option<String> {
    is_broken.then(|| verdict::BROKE.to_owned())
}

/// A log's tables: its durable one is what counts when the machine went down.
fn look_at_log(of: &mut Examination, slot: &Slot, shape: Shape, trust: Trust) -> Result<Found, String> {
    let path = of.places.log_table(slot.id);
    let damaged = look_at_durable(&path, slot, shape)?;
    match (look_at_table(of, slot, shape, trust), damaged) {
        (Ok(is_broken), damaged) => {
            if let Some(what) = damaged {
                of.problem(&path, what, MENDED);
            }
            Ok(Found { broken: because(is_broken), is_as_flushed: false })
        }
        (Err(_), Some(what)) => Err(what),
        (Err(why), None) if trust == Trust::SameBoot => Err(without_run_table(&why)),
        (Err(why), None) => {
            if trust != Trust::PowerCut {
                let what = format!("the log's newest table is lost: {why}");
                of.problem(&slot.image, what, "put it back before the next start, which takes what was flushed last");
            }
            Ok(Found { broken: None, is_as_flushed: true })
        }
    }
}

/// A durable table as it is stored. Returns what of it is damaged.
fn look_at_durable(path: &Path, slot: &Slot, shape: Shape) -> Result<Option<String>, String> {
    let id = slot.id;
    let image: SharedImage = Arc::new(FileImage::probe(path, Direct::Off).map_err(|e| e.to_string())?);
    let table = Arc::new(Table::in_memory(shape.blocks()).map_err(|e| e.to_string())?);
    let loaded = block_on(async move |queue| -> Result<LoadReport, TableError> {
        Ok(DurableTable::load(image, id, table, &queue).await?.1)
    })?;
    let report = loaded.map_err(|e| e.to_string())?;
    Ok(damage_of(path, &slot.image, &report))
}
