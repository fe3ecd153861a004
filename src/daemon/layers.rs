//! The layers of versions: their images and tables, made, opened again, and removed.
//!
//! What always holds: what is made here is ours to remove; a disk's own image and the legs of its mirror never are.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::manager::{Manager, image_error, table_error};
use super::takeup::{LayerSource, Trust};
use crate::control::ApiError;
use crate::control::api::{DiskConfig, Durability};
use crate::crash;
use crate::image::{
    Direct, Executor, FileImage, Image, ImageError, ImageErrorKind, ImageOptions, RingOptions, SharedImage,
};
use crate::mirror::planted::{self, Defect};
use crate::mirror::{Backing, Chain, Geometry, Layer, Log, Revoke, Saved, VersionIndex};
use crate::store::{
    DurableTable, Fingerprint, LoadReport, PAYLOAD_BYTES, SnapshotRecord, Table, TableError, TableName,
};

/// How long a start waits for the transfers of a process that was killed.
pub(super) const OLD_TRANSFERS_WAIT: Duration = Duration::from_secs(30);

/// Runs something on a ring of its own.
pub(super) fn block_on<T: 'static>(
    future: impl AsyncFnOnce(crate::image::IoQueue) -> T + 'static,
) -> Result<T, String>
where
{
    let executor = Executor::new(RingOptions { entries: 8 }).map_err(|e| format!("no ring: {e}"))?;
    let queue = executor.queue().clone();
    executor.block_on(async move { future(queue).await }).map_err(|e| e.to_string())
}

impl Manager {
    /// An empty image and table for what is saved for a frozen version.
    pub(super) fn make_frozen_layer(
        &self,
        path: &Path,
        id: Uuid,
        config: &DiskConfig,
        geometry: &Geometry,
    ) -> Result<Layer, ApiError> {
        let image = Backing::One(create_image(path, config, geometry)?);
        let made = match config.durability {
            Durability::Process => self.make_run_table(id, geometry).map(|table| Layer::of(image, Arc::new(table))),
            Durability::Power => self
                .make_saved_table(id, geometry)
                .map(|table| Layer::saved(image, Arc::new(Saved { table, revoke: self.revoke(id) }))),
        };
        made.inspect_err(|_| self.remove_layer(id, path)).map_err(table_error)
    }

    /// An empty log for what is written to a live version, whose table is durable from now on.
    pub(super) fn make_log(
        &self,
        path: &Path,
        id: Uuid,
        config: &DiskConfig,
        geometry: &Geometry,
    ) -> Result<Layer, ApiError> {
        let image = create_image(path, config, geometry)?;
        let made = self
            .make_durable_table(&self.places.log_table(id), id, geometry)
            .and_then(|table| Ok(Log { table, freed: Table::in_memory(geometry.blocks())? }));
        let log = made.inspect_err(|_| self.remove_layer(id, path)).map_err(table_error)?;
        Ok(Layer::logged(Backing::One(image), Arc::new(log)))
    }

    fn make_saved_table(&self, id: Uuid, geometry: &Geometry) -> Result<DurableTable, TableError> {
        let path = self.places.saved_table(id);
        // It is not frozen yet, so this is of a creation that a kill ended.
        remove_file(&path);
        self.make_durable_table(&path, id, geometry)
    }

    pub(super) fn make_durable_table(
        &self,
        path: &Path,
        id: Uuid,
        geometry: &Geometry,
    ) -> Result<DurableTable, TableError> {
        self.make_durable_copy(path, id, Arc::new(self.make_run_table(id, geometry)?))
    }

    /// The durable copy of a table that is there, on a new file.
    pub(super) fn make_durable_copy(
        &self,
        path: &Path,
        id: Uuid,
        table: Arc<Table>,
    ) -> Result<DurableTable, TableError> {
        let (path, size) = (path.to_owned(), DurableTable::image_bytes(table.blocks()));
        let image = FileImage::create(&path, size, Direct::Off).map_err(|e| in_table(&path, &e))?;
        let image: SharedImage = Arc::new(image);
        let made =
            block_on(async move |queue| DurableTable::create(image, id, table, [0; PAYLOAD_BYTES], &queue).await);
        let table = made.map_err(|message| TableError::Io { path: path.clone(), message })??;
        crate::store::sync_directory_of(&path)
            .map_err(|e| TableError::Io { path: path.clone(), message: e.to_string() })?;
        Ok(table)
    }

    /// A version below the pivot is not believed after a power cut unless its durable table has its name. Changing a name
    /// needs no room, unlike writing the word "broken" where there is none.
    pub(super) fn revoke(&self, id: Uuid) -> Revoke {
        let (path, given_up) = (self.places.saved_table(id), self.places.given_up_table(id));
        Box::new(move || {
            let renamed = match std::fs::rename(&path, &given_up) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
                _ => crate::store::sync_directory_of(&path),
            };
            renamed.map_err(|e| format!("{} cannot be renamed: {e}", path.display()))
        })
    }

    fn make_run_table(&self, id: Uuid, geometry: &Geometry) -> Result<Table, TableError> {
        Table::create(&self.places.run_table(id), geometry.blocks(), TableName::of_this_boot(id)?)
    }

    /// An empty changed table for the version `id`.
    pub(super) fn make_changed_table(&self, id: Uuid, geometry: &Geometry) -> Result<Arc<Table>, TableError> {
        let path = self.places.changed_table(id);
        Ok(Arc::new(Table::create(&path, geometry.blocks(), TableName::of_this_boot(id)?)?))
    }

    /// Removes the changed table of a version or bookmark that is not remembered any more.
    pub(super) fn remove_changed_table(&self, id: Uuid) {
        remove_file(&self.places.changed_table(id));
        remove_file(&self.places.saved_changes(id));
    }

    /// Removes a layer that was made here: its image and its tables.
    pub(super) fn remove_layer(&self, id: Uuid, image: &Path) {
        remove_file(image);
        remove_file(&self.places.run_table(id));
        remove_file(&self.places.broken_mark(id));
        remove_file(&self.places.durable_table(id));
        remove_file(&self.places.log_table(id));
        remove_file(&self.places.saved_table(id));
        remove_file(&self.places.given_up_table(id));
    }
}

/// The layers of one disk, in our directories.
pub(super) struct DiskLayers<'a> {
    pub(super) manager: &'a Manager,
    pub(super) config: &'a DiskConfig,
    pub(super) geometry: &'a Geometry,
    pub(super) trust: Trust,
}

impl DiskLayers<'_> {
    /// The table of a version as it was left: by a clean stop, or by a daemon that was killed in this boot.
    fn left_table(&self, id: Uuid, seal: Option<Uuid>) -> Result<Table, String> {
        match self.trust {
            Trust::Saved => {
                let table = self.manager.make_run_table(id, self.geometry).map_err(|e| e.to_string())?;
                let seal = seal.ok_or("its table was not saved")?;
                table.load(&self.manager.places.durable_table(id), seal).map_err(|e| e.to_string())?;
                Ok(table)
            }
            Trust::SameBoot => {
                let name = TableName::of_this_boot(id).map_err(|e| e.to_string())?;
                let path = self.manager.places.run_table(id);
                Table::open(&path, self.geometry.blocks(), name).map_err(|e| e.to_string())
            }
            Trust::PowerCut => Err("its table was not on stable storage".to_owned()),
            Trust::Changed => Err("the disk's image was changed while the daemon was not running".to_owned()),
        }
    }

    /// The table of a version that has a durable one at `place`: as it was left, or else as it was committed last.
    fn durable_table(
        &self,
        (id, image): (Uuid, &Path),
        place: &Path,
        left: Result<Table, String>,
        is_lost: bool,
    ) -> Result<DurableTable, String> {
        match left {
            Ok(table) => {
                if is_lost {
                    table.mark_broken();
                }
                let (table, durable) = (Arc::new(table), self.open_durable(place)?);
                let resumed = block_on(async move |queue| DurableTable::resume(durable, id, table, &queue).await)?;
                resumed.map(|(table, _)| table).map_err(|e| e.to_string())
            }
            Err(why) => {
                if self.trust != Trust::PowerCut {
                    log::warn!("{}: {why}; what was made durable last is taken", image.display());
                }
                self.committed_table((id, image), place, is_lost)
            }
        }
    }

    /// The table of a restore, of which blocks are pending: as it was left, or as it was committed last.
    pub(super) fn open_pending(&self, id: Uuid, place: &Path) -> Result<DurableTable, String> {
        match self.trust {
            Trust::SameBoot => {
                let left = self.left_table(id, None).map_err(|why| without_run_table(&why))?;
                self.durable_table((id, place), place, Ok(left), false)
            }
            // A clean stop commits it.
            Trust::Saved | Trust::PowerCut | Trust::Changed => self.committed_table((id, place), place, false),
        }
    }

    fn open_durable(&self, place: &Path) -> Result<SharedImage, String> {
        let options = ImageOptions { direct: Direct::Off, read_only: false, lock_wait: lock_wait(self.trust) };
        Ok(Arc::new(FileImage::open(place, options).map_err(|e| e.to_string())?))
    }

    /// A table as it was committed last to the durable copy at `place`.
    fn committed_table(&self, (id, image): (Uuid, &Path), place: &Path, is_lost: bool) -> Result<DurableTable, String> {
        let (places, durable) = (&self.manager.places, self.open_durable(place)?);
        // Under another name until it is filled: half of it must not be believed if we are killed meanwhile.
        let filling = places.run_table(id).with_extension("filling");
        let name = TableName::of_this_boot(id).map_err(|e| e.to_string())?;
        let table = Arc::new(Table::create(&filling, self.geometry.blocks(), name).map_err(|e| e.to_string())?);
        let loaded = block_on(async move |queue| DurableTable::load(durable, id, table, &queue).await)?;
        let (table, report) = loaded.map_err(|e| e.to_string())?;
        if let Some(what) = damage_of(place, image, &report) {
            return Err(what);
        }
        if is_lost {
            table.table().mark_broken(); // Under this name nobody has to ask again.
        }
        std::fs::rename(&filling, places.run_table(id)).map_err(|e| e.to_string())?;
        Ok(table)
    }
}

impl LayerSource for DiskLayers<'_> {
    fn is_file(&self, path: &Path) -> bool {
        std::fs::symlink_metadata(path).is_ok_and(|m| m.is_file())
    }

    fn fingerprint(&self, path: &Path) -> Option<Fingerprint> {
        Fingerprint::of(path).ok()
    }

    fn broke(&self, id: Uuid) -> Option<String> {
        self.manager.places.why_broken(id)
    }

    fn open_full(&self, path: &Path) -> Result<SharedImage, String> {
        open_whole(path, self.config, self.geometry, self.trust)
    }

    fn open_frozen(&self, record: &SnapshotRecord) -> Result<Layer, String> {
        let left = self.left_table(record.id, record.saved_table);
        let image = Backing::One(open_whole(&record.image, self.config, self.geometry, self.trust)?);
        if !record.durable {
            return Ok(Layer::of(image, Arc::new(left?)));
        }
        let (places, id) = (&self.manager.places, record.id);
        let given_up = places.given_up_table(id);
        let is_given_up = given_up.exists();
        // Older ones still read through one that was given up, by a table that is as durable as theirs.
        let place = if is_given_up { given_up } else { places.saved_table(id) };
        let is_lost = is_given_up || (left.is_err() && is_only_in_memory(record, self.trust));
        let table = self.durable_table((id, &record.image), &place, left, is_lost)?;
        let saved = Saved { table, revoke: self.manager.revoke(record.id) };
        // Writes go by its entries from now on, and those that were made just before a kill, or that a deletion handed
        // over, may not be durable yet.
        let bytes = image.clone();
        let committed = block_on(async move |queue| {
            let done = saved.table.commit_after(&queue, || bytes.sync(&queue)).await;
            done.map(|()| saved).map_err(|e| e.to_string())
        })??;
        Ok(Layer::saved(image, Arc::new(committed)))
    }

    fn open_changed(&self, id: Uuid, seal: Option<Uuid>) -> Result<Arc<Table>, String> {
        let places = &self.manager.places;
        if self.trust == Trust::Saved {
            let seal = seal.ok_or("its changed table was not saved")?;
            let table = self.manager.make_changed_table(id, self.geometry).map_err(|e| e.to_string())?;
            table.load(&places.saved_changes(id), seal).map_err(|e| e.to_string())?;
            return Ok(table);
        }
        let name = TableName::of_this_boot(id).map_err(|e| e.to_string())?;
        Table::open(&places.changed_table(id), self.geometry.blocks(), name).map(Arc::new).map_err(|e| e.to_string())
    }

    fn open_log(&self, id: Uuid, path: &Path, seal: Option<Uuid>) -> Result<Layer, String> {
        let left = self.left_table(id, seal);
        if let (Trust::SameBoot, Err(why)) = (self.trust, &left)
            && !planted::is(Defect::FlushedTakenUnasked)
        {
            // The guest may go on: what it was told is written must not be gone without a word.
            return Err(without_run_table(why));
        }
        let place = self.manager.places.log_table(id);
        let table = self.durable_table((id, path), &place, left, false)?;
        let image = open_whole(path, self.config, self.geometry, self.trust)?;
        let freed = Table::in_memory(self.geometry.blocks()).map_err(|e| e.to_string())?;
        Ok(Layer::logged(Backing::One(image), Arc::new(Log { table, freed })))
    }
}

/// What of a durable table cannot be read.
pub(super) fn damage_of(place: &Path, image: &Path, report: &LoadReport) -> Option<String> {
    let range = report.damaged.first()?;
    let blocks = report.damaged.iter().map(|r| r.count()).sum::<u64>();
    Some(format!(
        "{} is damaged: it does not tell whether {blocks} of the disk's blocks, from block {} on, are in {}",
        place.display(),
        range.start.0,
        image.display()
    ))
}

/// Whether what a daemon knew of a snapshot is nowhere if its run table is gone: requests that drain take entries of newer
/// versions away in memory only.
pub(super) fn is_only_in_memory(record: &SnapshotRecord, trust: Trust) -> bool {
    trust == Trust::SameBoot && record.quiesced_ms.is_none()
}

/// Why a log is not served in the boot in which its run table was lost.
pub(super) fn without_run_table(why: &str) -> String {
    format!(
        "{why}; without it what was written after the last flush is lost. Put it back, or stop the guests, start with \
         --take-flushed DISK, and start the guests anew"
    )
}

/// The file that a version's content takes room in beside the full image: for one whose layer has everything, or that lies
/// above the pivot, the log of the version above it.
pub(super) fn space_of(chain: &Chain, index: VersionIndex) -> (PathBuf, Option<Arc<Table>>) {
    let segment = chain.segment_of(index);
    let at = if index >= segment.pivot && index < segment.last { index + 1 } else { index };
    let layer = chain.layer(at);
    (layer.image.path().to_owned(), layer.table().cloned())
}

fn lock_wait(trust: Trust) -> Duration {
    // After a kill the old process's last transfers may still run; nothing is read or written before they are done.
    if trust == Trust::SameBoot { OLD_TRANSFERS_WAIT } else { Duration::ZERO }
}

/// A new image as its disk's is opened, through the page cache where that is all there is.
fn create_image(path: &Path, config: &DiskConfig, geometry: &Geometry) -> Result<SharedImage, ApiError> {
    let create = |direct| FileImage::create(path, geometry.size_bytes, direct);
    let created = match create(direct_of(config)) {
        Err(e) if config.direct && e.kind == ImageErrorKind::Unsuitable => {
            log::info!("{} is used through the page cache: {e}", path.display());
            create(Direct::Off)
        }
        Ok(image) if image.alignment().offset_bytes > geometry.block_bytes => {
            drop(image);
            remove_file(path);
            create(Direct::Off)
        }
        other => other,
    };
    let created = created.map_err(image_error)?;
    crash::point("after an image was made");
    let created: SharedImage = Arc::new(created);
    // The records are about to name it.
    store_file(&created).inspect_err(|_| remove_file(path)).map_err(table_error)?;
    Ok(created)
}

/// A new file is there with its name and its size, also after a power cut.
pub(super) fn store_file(image: &SharedImage) -> Result<(), TableError> {
    let path = image.path().to_owned();
    let of = image.clone();
    let failed = |message: String| TableError::Io { path: path.clone(), message };
    let synced = block_on(async move |queue| crate::image::sync(&*of, &queue).await);
    synced.and_then(|done| done.map_err(|e| e.to_string())).map_err(failed)?;
    crate::store::sync_directory_of(&path).map_err(|e| failed(e.to_string()))
}

/// Opens a layer's image as its disk's is opened.
pub(super) fn open_image(path: &Path, config: &DiskConfig, trust: Trust) -> Result<SharedImage, ImageError> {
    let options = ImageOptions { direct: direct_of(config), read_only: false, lock_wait: lock_wait(trust) };
    open_made_here(path, config, options)
}

/// Opens an image that was made here, or like those that were: through the page cache where there is no other way.
pub(super) fn open_made_here(
    path: &Path,
    config: &DiskConfig,
    options: ImageOptions,
) -> Result<SharedImage, ImageError> {
    let open = |direct| FileImage::open(path, ImageOptions { direct, ..options });
    let image = match open(direct_of(config)) {
        Err(e) if config.direct && e.kind == ImageErrorKind::Unsuitable => open(Direct::Off),
        Ok(image) if image.alignment().offset_bytes > config.block_size => {
            drop(image);
            open(Direct::Off)
        }
        other => other,
    };
    image.map(|image| Arc::new(image) as SharedImage)
}

/// The same, if it has the size of the disk: what is cut off would read as an error, or as zeros.
pub(super) fn open_whole(
    path: &Path,
    config: &DiskConfig,
    geometry: &Geometry,
    trust: Trust,
) -> Result<SharedImage, String> {
    let image = open_image(path, config, trust).map_err(|e| e.to_string())?;
    match image.size_bytes() == geometry.size_bytes {
        true => Ok(image),
        false => Err(format!("its image {} has {} bytes, not the disk's", path.display(), image.size_bytes())),
    }
}

pub(super) fn direct_of(config: &DiskConfig) -> Direct {
    if config.direct { Direct::On } else { Direct::Off }
}

fn in_table(path: &Path, e: &ImageError) -> TableError {
    TableError::Io { path: path.to_owned(), message: e.to_string() }
}

/// Removes a file that is ours. That it is gone already is fine.
pub(super) fn remove_file(path: &Path) {
    crash::point("before a file is removed");
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => log::error!("cannot remove {}: {e}", path.display()),
        _ => {}
    }
}
