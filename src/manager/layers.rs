//! The layers of versions: their images and tables, made, opened again, and removed.
//!
//! What always holds: what is made here is ours to remove; a disk's own image and the legs of its mirror never are.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::control::api::{self, DiskConfig, Durability};
use crate::control::{ApiError, ErrorCode, Name};
use crate::crash;
use crate::door::{Bytes, Geometry, LayerSpec};
use crate::host::Host;
use crate::image::{Direct, ImageError, ImageErrorKind, ImageOptions, IoQueue, SharedImage};
use crate::manager::entry::DiskEntry;
use crate::manager::relations::in_volume;
use crate::manager::{Manager, image_error, table_error};
use crate::recovery::{ChangedUse, ImageUse, LayerSource, NotCarriedOut, PackUse, TableSource, TableUse, Why};
use crate::store::{DurableTable, Layout, PAYLOAD_BYTES, Pack, Table, TableError};

/// How long a start waits for the transfers of a process that was killed.
pub(crate) const OLD_TRANSFERS_WAIT: Duration = Duration::from_secs(30);

impl Manager {
    /// Runs something on a ring of its own.
    pub(crate) fn block_on<T: 'static>(&self, work: impl AsyncFnOnce(IoQueue) -> T + 'static) -> Result<T, String> {
        self.host.block_on(work).map_err(|e| format!("no ring: {e}"))
    }

    /// Removes a file that is ours. That it is gone already is fine.
    pub(crate) fn remove_file(&self, path: &Path) {
        remove_file(&*self.host, path);
    }

    /// How the blocks of a layer are to lie that is made for a disk or volume; `asked` beats what is set of it.
    pub(crate) fn layout_for(&self, disk: &DiskEntry, asked: Option<api::Layout>) -> Result<Layout, ApiError> {
        match asked.unwrap_or(disk.config().layout()) {
            api::Layout::Auto | api::Layout::Sparse => Ok(Layout::Sparse),
            api::Layout::Packed if disk.is_volume() => Err(packed_volume(&disk.name.get())),
            api::Layout::Packed => Ok(Layout::Packed),
        }
    }

    /// An empty image and table for what is saved for a frozen version.
    pub(crate) fn make_frozen_layer(
        &self,
        (path, layout): (&Path, Layout),
        id: Uuid,
        config: &DiskConfig,
        geometry: &Geometry,
    ) -> Result<LayerSpec, ApiError> {
        let image = self.make_bytes((path, layout), id, config, geometry)?;
        let made = match config.durability() {
            Durability::Process => self.make_run_table(id, geometry).map(|table| LayerSpec::Table(image, table)),
            Durability::Power => self.make_saved_table(id, geometry).map(|table| LayerSpec::Saved(image, table)),
        };
        made.inspect_err(|_| self.remove_layer(id, path)).map_err(table_error)
    }

    /// An empty log for what is written to a live version, whose table is durable from now on.
    pub(crate) fn make_log(
        &self,
        (path, layout): (&Path, Layout),
        id: Uuid,
        config: &DiskConfig,
        geometry: &Geometry,
    ) -> Result<LayerSpec, ApiError> {
        let image = self.make_bytes((path, layout), id, config, geometry)?;
        let made = self.make_durable_table(&self.places.log_table(id), id, geometry);
        let made = made.and_then(|table| LayerSpec::log(image, table));
        made.inspect_err(|_| self.remove_layer(id, path)).map_err(table_error)
    }

    fn make_saved_table(&self, id: Uuid, geometry: &Geometry) -> Result<DurableTable, TableError> {
        let path = self.places.saved_table(id);
        // It is not frozen yet, so this is of a creation that a kill ended.
        self.remove_file(&path);
        self.make_durable_table(&path, id, geometry)
    }

    pub(crate) fn make_durable_table(
        &self,
        path: &Path,
        id: Uuid,
        geometry: &Geometry,
    ) -> Result<DurableTable, TableError> {
        let table = self.make_run_table(id, geometry)?;
        let image = self.make_durable_image(path, geometry)?;
        let made =
            self.block_on(async move |queue| DurableTable::create(image, id, table, [0; PAYLOAD_BYTES], &queue).await);
        let table = made.map_err(|message| TableError::Io { path: path.to_owned(), message })??;
        self.store_name(path)?;
        Ok(table)
    }

    /// An image of zeros for the durable copy of a table.
    pub(crate) fn make_durable_image(&self, path: &Path, geometry: &Geometry) -> Result<SharedImage, TableError> {
        let size = DurableTable::image_bytes(geometry.blocks());
        self.host.create_image(path, size, Direct::Off).map_err(|e| TableError::image(path, &e))
    }

    /// A new file is there with its name, also after a power cut.
    pub(crate) fn store_name(&self, path: &Path) -> Result<(), TableError> {
        self.host.sync_directory_of(path).map_err(|e| TableError::io(path, &e))
    }

    pub(crate) fn make_run_table(&self, id: Uuid, geometry: &Geometry) -> Result<Arc<Table>, TableError> {
        self.host.create_table(&self.places.run_table(id), geometry.blocks(), self.host.table_name(id)?)
    }

    /// An empty dirty bitmap for the version `id`.
    pub(crate) fn make_changed_table(&self, id: Uuid, geometry: &Geometry) -> Result<Arc<Table>, TableError> {
        let path = self.places.changed_table(id);
        self.host.create_table(&path, geometry.blocks(), self.host.table_name(id)?)
    }

    /// An empty layer's bytes, which are there with their name when this returns: the records are about to name them.
    fn make_bytes(
        &self,
        (path, layout): (&Path, Layout),
        id: Uuid,
        config: &DiskConfig,
        geometry: &Geometry,
    ) -> Result<Bytes, ApiError> {
        let shape = (geometry.size_bytes, geometry.block_bytes);
        let (size_bytes, unit_bytes) = match layout {
            Layout::Sparse => shape,
            Layout::Packed => {
                let Some(bytes) = Pack::image_bytes(shape.0, shape.1) else {
                    let message = "layout: the disk is too large for packed layers with blocks of its size";
                    return Err(ApiError::new(ErrorCode::Unsupported, message).with_action("ask for sparse ones"));
                };
                (bytes, Pack::UNIT_BYTES)
            }
        };
        let image = self.make_image(path, config, size_bytes, unit_bytes)?;
        let made = match layout {
            Layout::Sparse => self.store_file(&image).map(|()| Bytes::Image(image)),
            Layout::Packed => self.make_pack(image, id, shape).map(|pack| Bytes::Pack(Arc::new(pack))),
        };
        made.inspect_err(|_| self.remove_file(path)).map_err(table_error)
    }

    fn make_pack(&self, image: SharedImage, id: Uuid, shape: (u64, u32)) -> Result<Pack, TableError> {
        let (path, key) = (image.path().to_owned(), self.host.new_id());
        let failed = |message: String| TableError::Io { path: path.clone(), message };
        let made = self.block_on(async move |queue| Pack::create(image, (id, key), shape, &queue).await);
        let pack = made.map_err(failed)??;
        self.host.sync_directory_of(&path).map_err(|e| TableError::io(&path, &e))?;
        Ok(pack)
    }

    /// A new image as its disk's is opened, through the page cache where that is the only way to move such units.
    fn make_image(
        &self,
        path: &Path,
        config: &DiskConfig,
        size_bytes: u64,
        unit_bytes: u32,
    ) -> Result<SharedImage, ApiError> {
        let create = |direct| self.host.create_image(path, size_bytes, direct);
        let created = match create(direct_of(config)) {
            Err(e) if config.direct && e.kind == ImageErrorKind::Unsuitable => {
                log::info!("{} is used through the page cache: {e}", path.display());
                create(Direct::Off)
            }
            Ok(image) if image.alignment().offset_bytes > unit_bytes => {
                drop(image);
                self.remove_file(path);
                create(Direct::Off)
            }
            other => other,
        };
        let created = created.map_err(image_error)?;
        crash::point("after an image was made");
        Ok(created)
    }

    /// A new file is there with its name and its size, also after a power cut.
    pub(crate) fn store_file(&self, image: &SharedImage) -> Result<(), TableError> {
        let path = image.path().to_owned();
        let of = image.clone();
        let failed = |message: String| TableError::Io { path: path.clone(), message };
        let synced = self.block_on(async move |queue| crate::image::sync(&*of, &queue).await);
        synced.map_err(failed)?.map_err(|e| TableError::image(&path, &e))?;
        self.store_name(&path)
    }

    /// Removes the dirty bitmap of a version or bookmark that is not remembered any more.
    pub(crate) fn remove_changed_table(&self, id: Uuid) {
        self.remove_file(&self.places.changed_table(id));
        self.remove_file(&self.places.saved_changes(id));
    }

    /// Removes a layer that was made here: its image and its tables.
    pub(crate) fn remove_layer(&self, id: Uuid, image: &Path) {
        self.remove_file(image);
        self.remove_tables_of_layer(id);
    }

    pub(crate) fn remove_tables_of_layer(&self, id: Uuid) {
        self.remove_file(&self.places.run_table(id));
        self.remove_file(&self.places.broken_mark(id));
        self.remove_file(&self.places.durable_table(id));
        self.remove_file(&self.places.log_table(id));
        self.remove_file(&self.places.saved_table(id));
        self.remove_file(&self.places.given_up_table(id));
    }
}

/// The layers of one disk, in our directories.
#[derive(Clone, Copy)]
pub(crate) struct DiskLayers<'a> {
    pub(crate) manager: &'a Manager,
    pub(crate) config: &'a DiskConfig,
    /// Of the live version.
    pub(crate) geometry: Geometry,
    /// After a kill the old process's last transfers may still run; nothing is read or written before they are done.
    pub(crate) lock_wait: Duration,
}

impl<'a> DiskLayers<'a> {
    /// The same for versions of this size.
    fn of_size(self, size_bytes: u64) -> DiskLayers<'a> {
        DiskLayers { geometry: Geometry { size_bytes, ..self.geometry }, ..self }
    }

    /// The durable table that goes by this name, as it was decided.
    pub(crate) fn open_table(&self, id: Uuid, how: &TableUse) -> Result<DurableTable, NotCarriedOut> {
        let which = how.durable.ok_or_else(|| NotCarriedOut(format!("table {id} is not durable")))?;
        let place = which.place(self.manager.places.tables(), id);
        let options = ImageOptions { direct: Direct::Off, read_only: false, lock_wait: self.lock_wait };
        let durable = self.manager.host.open_image(&place, options)?;
        let table = match how.source {
            TableSource::Committed(_) => self.committed_table(id, durable, how)?,
            _ => {
                let table = self.left_table(id, how)?;
                let host = &self.manager.host;
                host.block_on(async move |queue| DurableTable::resume(durable, id, table, &queue).await)??.0
            }
        };
        Ok(table)
    }

    /// The table of a version as it was left: by a clean stop, or by a daemon that was killed in this boot.
    fn left_table(&self, id: Uuid, how: &TableUse) -> Result<Arc<Table>, NotCarriedOut> {
        let (places, host) = (&self.manager.places, &self.manager.host);
        let table = match how.source {
            TableSource::Saved(seal) => {
                let table = self.manager.make_run_table(id, &self.geometry)?;
                host.load_table(&table, &places.durable_table(id), seal)?;
                table
            }
            _ => host.open_table(&places.run_table(id), self.geometry.blocks(), host.table_name(id)?)?,
        };
        if how.is_broken {
            table.mark_broken();
        }
        Ok(table)
    }

    /// A table as it was committed last to its durable copy.
    fn committed_table(&self, id: Uuid, durable: SharedImage, how: &TableUse) -> Result<DurableTable, NotCarriedOut> {
        let (places, host, place) = (&self.manager.places, &self.manager.host, durable.path().to_owned());
        // Under another name until it is filled: half of it must not be believed if we are killed meanwhile.
        let filling = places.run_table(id).with_extension("filling");
        let table = host.create_table(&filling, self.geometry.blocks(), host.table_name(id)?)?;
        let (table, report) =
            host.block_on(async move |queue| DurableTable::load(durable, id, table, &queue).await)??;
        if !report.damaged.is_empty() {
            return Err(NotCarriedOut(format!("{} is damaged", place.display())));
        }
        if how.is_broken {
            table.table().mark_broken(); // Under this name nobody has to ask again.
        }
        host.rename(&filling, &places.run_table(id))?;
        Ok(table)
    }

    /// An image of the disk's size: what is cut off would read as an error, or as zeros.
    fn open_whole(&self, path: &Path) -> Result<SharedImage, NotCarriedOut> {
        let image = open_image(&*self.manager.host, path, self.config, self.lock_wait)?;
        let (size_bytes, layout) = (image.size_bytes(), Layout::Sparse);
        match size_bytes == self.geometry.size_bytes {
            true => Ok(image),
            false => Err(Why::Size { path: path.to_owned(), size_bytes, layout }.into()),
        }
    }

    /// The bytes of the version `id`, as it was decided.
    fn open_bytes(&self, id: Uuid, image: &ImageUse) -> Result<Bytes, NotCarriedOut> {
        let Some(PackUse { believed, .. }) = image.pack else { return Ok(Bytes::Image(self.open_whole(&image.path)?)) };
        let (host, units) = (&*self.manager.host, (self.config, Pack::UNIT_BYTES));
        let opened = open_made_here(host, &image.path, units, options_of(self.config, self.lock_wait))?;
        let shape = (self.geometry.size_bytes, self.geometry.block_bytes);
        let memory = host.memory_for_a_pack();
        let open = async move |queue: IoQueue| Pack::open(opened, id, shape, believed, memory, &queue).await;
        let pack = host.block_on(open)??;
        Ok(Bytes::Pack(Arc::new(pack)))
    }
}

impl LayerSource for DiskLayers<'_> {
    fn open_full(&self, image: &Path, size_bytes: u64) -> Result<SharedImage, NotCarriedOut> {
        self.of_size(size_bytes).open_whole(image)
    }

    fn open_saved(
        &self,
        id: Uuid,
        size_bytes: u64,
        image: &ImageUse,
        how: &TableUse,
    ) -> Result<LayerSpec, NotCarriedOut> {
        let of = self.of_size(size_bytes);
        let image = of.open_bytes(id, image)?;
        if how.durable.is_none() {
            return Ok(LayerSpec::Table(image, of.left_table(id, how)?));
        }
        let table = of.open_table(id, how)?;
        // Writes go by its entries from now on, and those that were made just before a kill, or that a deletion handed
        // over, may not be durable yet.
        let bytes = image.clone();
        let committed = self
            .manager
            .host
            .block_on(async move |queue| table.commit_after(&queue, || bytes.sync(&queue)).await.map(|()| table))??;
        Ok(LayerSpec::Saved(image, committed))
    }

    fn open_log(
        &self,
        id: Uuid,
        size_bytes: u64,
        image: &ImageUse,
        how: &TableUse,
    ) -> Result<LayerSpec, NotCarriedOut> {
        let of = self.of_size(size_bytes);
        let table = of.open_table(id, how)?;
        Ok(LayerSpec::log(of.open_bytes(id, image)?, table)?)
    }

    fn open_changed(&self, id: Uuid, size_bytes: u64, from: ChangedUse) -> Result<Arc<Table>, NotCarriedOut> {
        let of = self.of_size(size_bytes);
        let (places, host) = (&self.manager.places, &self.manager.host);
        match from {
            ChangedUse::Saved(seal) => {
                let table = self.manager.make_changed_table(id, &of.geometry)?;
                host.load_table(&table, &places.saved_changes(id), seal)?;
                Ok(table)
            }
            ChangedUse::Run => {
                Ok(host.open_table(&places.changed_table(id), of.geometry.blocks(), host.table_name(id)?)?)
            }
        }
    }
}

/// Opens a layer's image as its disk's is opened.
pub(crate) fn open_image(
    host: &dyn Host,
    path: &Path,
    config: &DiskConfig,
    lock_wait: Duration,
) -> Result<SharedImage, ImageError> {
    open_made_here(host, path, (config, config.block_size), options_of(config, lock_wait))
}

fn options_of(config: &DiskConfig, lock_wait: Duration) -> ImageOptions {
    ImageOptions { direct: direct_of(config), read_only: false, lock_wait }
}

/// Opens an image that was made here, or like those that were: through the page cache where there is no other way to move
/// units of so many bytes.
pub(crate) fn open_made_here(
    host: &dyn Host,
    path: &Path,
    (config, unit_bytes): (&DiskConfig, u32),
    options: ImageOptions,
) -> Result<SharedImage, ImageError> {
    let open = |direct| host.open_image(path, ImageOptions { direct, ..options });
    match open(direct_of(config)) {
        Err(e) if config.direct && e.kind == ImageErrorKind::Unsuitable => open(Direct::Off),
        Ok(image) if image.alignment().offset_bytes > unit_bytes => {
            drop(image);
            open(Direct::Off)
        }
        other => other,
    }
}

pub(crate) fn direct_of(config: &DiskConfig) -> Direct {
    if config.direct { Direct::On } else { Direct::Off }
}

/// Why no layer of a volume is packed, and what to do.
pub(crate) fn packed_volume(name: &Name) -> ApiError {
    let why = "the layers of a volume are sparse: any of its logs may become its full image, a plain raw file";
    ApiError::new(ErrorCode::Unsupported, in_volume(name, why)).with_action(format!(
        "leave the layout out; or make a disk of it, whose layers may be packed: halfsilver volume complete {name}, then \
         halfsilver volume promote {name}"
    ))
}

/// Removes a file that is ours. That it is gone already is fine.
pub(crate) fn remove_file(host: &dyn Host, path: &Path) {
    crash::point("before a file is removed");
    match host.remove(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => log::error!("cannot remove {}: {e}", path.display()),
        _ => {}
    }
}
