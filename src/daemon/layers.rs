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
use crate::control::api::DiskConfig;
use crate::image::{
    Direct, Executor, FileImage, Image, ImageError, ImageErrorKind, ImageOptions, RingOptions, SharedImage,
};
use crate::mirror::{Backing, Chain, Geometry, Layer, Log, Owned, VersionIndex};
use crate::store::{DurableTable, Fingerprint, PAYLOAD_BYTES, SnapshotRecord, Table, TableError, TableName};

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
        let image = create_image(path, config, geometry)?;
        let table = self.make_run_table(id, geometry).inspect_err(|_| remove_file(path)).map_err(table_error)?;
        Ok(Layer::of(Backing::One(image), Arc::new(table)))
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
        let made = store_file(&image)
            .and_then(|()| self.make_log_tables(id, geometry))
            .inspect_err(|_| self.remove_layer(id, path));
        Ok(Layer::logged(Backing::One(image), Arc::new(made.map_err(table_error)?)))
    }

    fn make_log_tables(&self, id: Uuid, geometry: &Geometry) -> Result<Log, TableError> {
        let table = Arc::new(self.make_run_table(id, geometry)?);
        let path = self.places.log_table(id);
        let size = DurableTable::image_bytes(geometry.blocks());
        let image = FileImage::create(&path, size, Direct::Off).map_err(|e| in_table(&path, &e))?;
        let image: SharedImage = Arc::new(image);
        let made =
            block_on(async move |queue| DurableTable::create(image, id, table, [0; PAYLOAD_BYTES], &queue).await);
        let table = made.map_err(|message| TableError::Io { path: path.clone(), message })??;
        crate::store::sync_directory_of(&path)
            .map_err(|e| TableError::Io { path: path.clone(), message: e.to_string() })?;
        Ok(Log { table, freed: Table::in_memory(geometry.blocks())? })
    }

    fn make_run_table(&self, id: Uuid, geometry: &Geometry) -> Result<Table, TableError> {
        Table::create(&self.places.run_table(id), geometry.blocks(), TableName::of_this_boot(id)?)
    }

    /// The table of a version as it was left: by a clean stop, or by a daemon that was killed in this boot.
    fn left_table(&self, id: Uuid, geometry: &Geometry, trust: Trust, seal: Option<Uuid>) -> Result<Table, String> {
        match trust {
            Trust::Saved => {
                let table = self.make_run_table(id, geometry).map_err(|e| e.to_string())?;
                let seal = seal.ok_or("its table was not saved")?;
                table.load(&self.places.durable_table(id), seal).map_err(|e| e.to_string())?;
                Ok(table)
            }
            Trust::SameBoot => {
                let name = TableName::of_this_boot(id).map_err(|e| e.to_string())?;
                Table::open(&self.places.run_table(id), geometry.blocks(), name).map_err(|e| e.to_string())
            }
            Trust::PowerCut => Err("its table was not on stable storage".to_owned()),
            Trust::Changed => Err("the disk's image was changed while the daemon was not running".to_owned()),
        }
    }

    /// Opens a log again. Its durable table is what remains after a power cut.
    fn open_log(
        &self,
        (id, path, seal): (Uuid, &Path, Option<Uuid>),
        (config, geometry): (&DiskConfig, &Geometry),
        trust: Trust,
    ) -> Result<Layer, String> {
        let options = ImageOptions { direct: Direct::Off, read_only: false, lock_wait: lock_wait(trust) };
        let place = self.places.log_table(id);
        let durable: SharedImage = Arc::new(FileImage::open(&place, options).map_err(|e| e.to_string())?);
        let table = match self.left_table(id, geometry, trust, seal) {
            Ok(table) => {
                let table = Arc::new(table);
                block_on(async move |queue| DurableTable::resume(durable, id, table, &queue).await)?
                    .map_err(|e| e.to_string())?
                    .0
            }
            Err(why) => {
                if trust != Trust::PowerCut {
                    log::warn!("log {}: {why}; what was flushed last is taken", path.display());
                }
                // Under another name until it is filled: half of it must not be believed if we are killed meanwhile.
                let filling = self.places.run_table(id).with_extension("filling");
                let name = TableName::of_this_boot(id).map_err(|e| e.to_string())?;
                let table = Table::create(&filling, geometry.blocks(), name).map_err(|e| e.to_string())?;
                let table = Arc::new(table);
                let loaded = block_on(async move |queue| DurableTable::load(durable, id, table, &queue).await)?;
                let (table, report) = loaded.map_err(|e| e.to_string())?;
                if let Some(range) = report.damaged.first() {
                    return Err(format!(
                        "{} is damaged: nobody knows whether {} of the disk's blocks, from block {} on, are in the log",
                        place.display(),
                        report.damaged.iter().map(|r| r.count()).sum::<u64>(),
                        range.start.0
                    ));
                }
                std::fs::rename(&filling, self.places.run_table(id)).map_err(|e| e.to_string())?;
                table
            }
        };
        let image = open_image(path, config, trust).map_err(|e| e.to_string())?;
        let freed = Table::in_memory(geometry.blocks()).map_err(|e| e.to_string())?;
        Ok(Layer::logged(Backing::One(image), Arc::new(Log { table, freed })))
    }

    /// Removes a layer that was made here: its image and its tables.
    pub(super) fn remove_layer(&self, id: Uuid, image: &Path) {
        remove_file(image);
        remove_file(&self.places.run_table(id));
        remove_file(&self.places.durable_table(id));
        remove_file(&self.places.log_table(id));
    }
}

/// The layers of one disk, in our directories.
pub(super) struct DiskLayers<'a> {
    pub(super) manager: &'a Manager,
    pub(super) config: &'a DiskConfig,
    pub(super) geometry: &'a Geometry,
    pub(super) trust: Trust,
}

impl LayerSource for DiskLayers<'_> {
    fn is_file(&self, path: &Path) -> bool {
        std::fs::symlink_metadata(path).is_ok_and(|m| m.is_file())
    }

    fn fingerprint(&self, path: &Path) -> Option<Fingerprint> {
        Fingerprint::of(path).ok()
    }

    fn open_full(&self, path: &Path) -> Result<SharedImage, String> {
        open_image(path, self.config, self.trust).map_err(|e| e.to_string())
    }

    fn open_frozen(&self, record: &SnapshotRecord) -> Result<Layer, String> {
        let table = self.manager.left_table(record.id, self.geometry, self.trust, record.saved_table)?;
        let image = open_image(&record.image, self.config, self.trust).map_err(|e| e.to_string())?;
        Ok(Layer::of(Backing::One(image), Arc::new(table)))
    }

    fn open_log(&self, id: Uuid, path: &Path, seal: Option<Uuid>) -> Result<Layer, String> {
        self.manager.open_log((id, path, seal), (self.config, self.geometry), self.trust)
    }
}

/// The file that a version's content takes room in beside the full image: for one whose layer has everything, or that lies
/// above the pivot, the log of the version above it.
pub(super) fn space_of(chain: &Chain, index: VersionIndex) -> (PathBuf, Option<Arc<Table>>) {
    let segment = chain.segment_of(index);
    let at = if index >= segment.pivot && index < segment.last { index + 1 } else { index };
    let layer = chain.layer(at);
    let table = match &layer.owned {
        Owned::Table(table) => Some(table.clone()),
        Owned::All => None,
    };
    (layer.image.path().to_owned(), table)
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
    Ok(Arc::new(created.map_err(image_error)?))
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
    let open = |direct| FileImage::open(path, ImageOptions { direct, read_only: false, lock_wait: lock_wait(trust) });
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

pub(super) fn direct_of(config: &DiskConfig) -> Direct {
    if config.direct { Direct::On } else { Direct::Off }
}

fn in_table(path: &Path, e: &ImageError) -> TableError {
    TableError::Io { path: path.to_owned(), message: e.to_string() }
}

/// Removes a file that is ours. That it is gone already is fine.
pub(super) fn remove_file(path: &Path) {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => log::error!("cannot remove {}: {e}", path.display()),
        _ => {}
    }
}
