//! Files in our own directories that no record names: which of them may go.
//!
//! What always holds: a file goes only if a record once named it and let it go, if a record says that its version has a
//! full image, or if there is nothing in it. Anything else may be the only copy of what a guest wrote, and is kept: the
//! records may be older than it, or may have been lost.
//!
//! Only files that are named as ours are looked at, and only in our own directories. The full image of a volume that became
//! independent goes only if it was let go, or is about to be named and has its old name still: a disk may have been made of
//! it and removed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use crate::control::SnapshotRef;
use crate::host::Host;
use crate::image::{Direct, ImageOptions};
use crate::manager::places::Places;
use crate::store::{DiskRecord, Pack};

/// Where the content of a saved table, of a durable one and of a mapped one begins.
const SAVED_TABLE_AT: u64 = 44;
const DURABLE_TABLE_AT: u64 = 512;
const RUN_TABLE_AT: u64 = 4096;

/// What no record names.
#[derive(Debug, Default)]
pub(crate) struct Orphans {
    /// What an unfinished operation left: nobody needs it.
    pub(crate) removable: Vec<PathBuf>,
    /// What may be the only copy of something.
    pub(crate) kept: Vec<PathBuf>,
}

/// What the records say of names.
struct Names {
    /// UUIDs and snapshots that have files.
    used: BTreeSet<String>,
    /// Those that may go: they were let go, or have a full image instead.
    free: BTreeSet<String>,
    /// Versions of which a mark may say that they broke.
    frozen: BTreeSet<String>,
    /// Versions and bookmarks that may have dirty bitmaps, whatever else they have.
    noting: BTreeSet<String>,
    /// What the full images would be called of those that have none of ours.
    no_image: BTreeSet<String>,
}

impl Names {
    fn of(disks: &[DiskRecord], dropped: &BTreeSet<String>) -> Names {
        let snapshots = || disks.iter().flat_map(|d| &d.snapshots);
        // Who has a full image has no table.
        let logs = disks.iter().filter(|d| d.live_log.is_some()).map(|d| d.live);
        let bitmaps = disks.iter().filter_map(|d| Some(d.mirror.as_ref()?.bitmap));
        let restores = disks.iter().filter_map(|d| Some(d.restore.as_ref()?.id));
        let parts = snapshots().filter(|s| !s.owns_all).map(|s| s.id);
        let ids =
            disks.iter().map(|d| d.id).chain(logs).chain(bitmaps).chain(restores).chain(parts).map(|id| id.to_string());
        // By name and not by path: the directory may have been moved since.
        let named = disks.iter().flat_map(DiskRecord::image_names);
        let (own, others): (Vec<_>, Vec<_>) = disks.iter().partition(|d| d.own_image);
        let own = own.into_iter().map(DiskRecord::own_image_name);
        let used: BTreeSet<String> = ids.chain(named).chain(own).collect();
        let no_image = others.into_iter().map(DiskRecord::own_image_name).collect();
        let all = disks.iter().flat_map(DiskRecord::names).chain(dropped.iter().cloned());
        let frozen = snapshots().map(|s| s.id.to_string()).collect();
        let live = disks.iter().filter(|d| d.live_changed.is_some()).map(|d| d.live);
        let bookmarks = disks.iter().flat_map(|d| d.bookmarks.iter().map(|b| b.id));
        let noting = live.chain(bookmarks).chain(snapshots().filter(|s| s.changed.is_some()).map(|s| s.id));
        let noting = noting.map(|id| id.to_string()).collect();
        let free = all.filter(|name| !used.contains(name)).collect();
        Names { free, used, frozen, noting, no_image }
    }
}

/// Looks for what no record names.
///
/// # Errors
/// When a directory cannot be read.
pub(crate) fn find(
    host: &dyn Host,
    places: &Places,
    disks: &[DiskRecord],
    dropped: &BTreeSet<String>,
) -> io::Result<Orphans> {
    let names = Names::of(disks, dropped);
    let mut orphans = Orphans::default();
    let mut changes = Vec::new();
    // All that has one name goes or stays together: a log of zeros has nothing in it but in its table.
    let mut unnamed: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for dir in places.own_dirs() {
        for path in host.list(&dir)? {
            if let Some(name) = full_image_name(&path).filter(|_| dir == places.images_dir()) {
                // One that no record names is that of a disk that was removed, and stays.
                let is_second_name = || names.no_image.contains(&name) && has_two_names(host, &path);
                if names.free.contains(&name) || is_second_name() {
                    orphans.removable.push(path);
                }
                continue;
            }
            match name_of(&path, dir == places.images_dir()) {
                Some(name) if is_of_changes(&path) && names.noting.contains(&name) => {}
                // Only says what to copy: nobody misses it.
                Some(name) if is_of_changes(&path) && names.free.contains(&name) => orphans.removable.push(path),
                Some(_) if is_of_changes(&path) => changes.push(path),
                Some(name) if names.used.contains(&name) => {}
                Some(name) if is_mark(&path) && names.frozen.contains(&name) => {}
                Some(name) if names.free.contains(&name) => orphans.removable.push(path),
                Some(name) => unnamed.entry(name).or_default().push(path),
                None => {}
            }
        }
    }
    let (full, empty): (Vec<_>, Vec<_>) =
        unnamed.into_values().partition(|paths| paths.iter().any(|path| holds_something(host, path)));
    orphans.kept.extend(full.into_iter().flatten());
    // Where something is kept the records may be others than those of these files, and an empty image of a snapshot is
    // missed when they come back.
    if orphans.kept.is_empty() {
        orphans.removable.extend(empty.into_iter().flatten());
        orphans.removable.append(&mut changes);
    }
    orphans.removable.sort();
    orphans.kept.sort();
    Ok(orphans)
}

/// The name that records would use for a file of ours: `disk@snapshot` or a UUID of an image, else a UUID.
fn name_of(path: &Path, is_image: bool) -> Option<String> {
    let (stem, extension) = (path.file_stem()?.to_str()?, path.extension()?.to_str()?);
    match extension {
        "img" if is_image && stem.parse::<SnapshotRef>().is_ok() => Some(stem.to_owned()),
        "img" if !is_image => None,
        "img" | "log" => stem.parse::<Uuid>().ok().map(|id| id.to_string()),
        "table" | "new" | "bits" | "filling" | "saved" | "lost" | "broken" | "changed" | "changes" if !is_image => {
            stem.parse::<Uuid>().ok().map(|id| id.to_string())
        }
        _ => None,
    }
}

/// The name of the full image of a volume that became independent.
fn full_image_name(path: &Path) -> Option<String> {
    let id = path.file_stem()?.to_str()?.parse::<Uuid>().ok()?;
    path.extension().is_some_and(|e| e == "raw").then(|| format!("{id}.raw"))
}

/// Whether a file is there under another name too: the log that was about to get this one.
fn has_two_names(host: &dyn Host, path: &Path) -> bool {
    host.look(path).is_ok_and(|look| look.names > 1)
}

/// Whether it says why a version broke.
fn is_mark(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "broken")
}

/// Whether it is a dirty bitmap.
fn is_of_changes(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "changed" || e == "changes")
}

/// Whether it is a pack that nothing was written to: it begins with what it is.
fn is_unwritten_pack(host: &dyn Host, path: &Path) -> bool {
    let options = ImageOptions { direct: Direct::Off, read_only: true, lock_wait: Duration::ZERO };
    let Ok(image) = host.probe_image(path, options) else { return false };
    let found = host.block_on(async move |queue| Pack::is_unwritten(image, &queue).await);
    matches!(found, Ok(Ok(true)))
}

/// Whether there is anything in a file that somebody may miss. What cannot be read may be missed.
fn holds_something(host: &dyn Host, path: &Path) -> bool {
    let is_table = path.parent().is_some_and(|dir| dir.ends_with("tables"));
    let from = match path.extension().and_then(|e| e.to_str()) {
        Some("new" | "filling") => return false, // Half of something that is whole elsewhere.
        Some("broken") => return false,
        Some("table") => SAVED_TABLE_AT,
        Some("log" | "saved" | "lost") if is_table => DURABLE_TABLE_AT,
        Some("bits") => RUN_TABLE_AT,
        _ => 0,
    };
    host.holds_bytes(path, from).unwrap_or(true) && (is_table || !is_unwritten_pack(host, path))
}
