//! Disks are opened: a start hands over what it has decided and opened, and gets a disk or a refusal.

use std::sync::{Arc, Mutex};

use super::engine::{Disk, Engine, Open, Pending, Watch};
use super::error::Error;
use super::legs;
use super::spec::{BaseSpec, DiskSpec, ImageSpec, LayerSpec, RestoreSpec};
use crate::engine::{
    self, Backing, DiskOptions, Geometry, Layer, Link, Log, RestoreSource, Restoring, Saved, Version, VersionId, View,
};
use crate::store::DurableTable;

impl Engine {
    /// Opens a disk.
    ///
    /// # Errors
    /// When its mirror cannot be used, memory runs out, or it is open.
    ///
    /// # Panics
    /// When the versions make no chain: not exactly one of a segment has everything, or they are not in order.
    pub fn open(self: &Arc<Engine>, spec: DiskSpec) -> Result<Disk, Error> {
        let image = self.backing(spec.image, spec.block_bytes)?;
        let newest = spec.versions.len().saturating_sub(1);
        let size_bytes = spec.versions.last().map(|live| live.size_bytes);
        let mut links = Vec::new();
        for (at, version) in spec.versions.into_iter().enumerate() {
            let layer = self.layer_on(version.id, version.layer, || image.clone());
            let opened = Version::noting(version.id, version.began, version.changed);
            if at < newest {
                // Also what a volume stands on: nobody is left who could change it.
                opened.set_quiesced();
                opened.keep_size(Geometry { size_bytes: version.size_bytes, ..Geometry::of(&image, spec.block_bytes) });
            }
            if let Some(reason) = version.broken {
                opened.set_broken(reason);
            }
            links.push(Link { version: opened, layer, splits: version.splits });
        }
        let mirror = match &image {
            Backing::Pair(pair) => Some(pair.clone()),
            Backing::One(_) | Backing::Packed(_) | Backing::View(_) => None,
        };
        let (block_bytes, read_only) = (spec.block_bytes, spec.read_only);
        let options = DiskOptions { image, block_bytes, read_only, discards: spec.discards };
        let disk = engine::Disk::announcing(spec.logical_block_bytes, self.clock.clone(), options, links);
        size_bytes.into_iter().for_each(|bytes| disk.begin_with_size(bytes));
        disk.background().set_window(spec.window_bytes);
        disk.observe(Arc::new(Watch { id: spec.id, supervisor: self.supervisor.clone() }));
        disk.remember_marks(spec.marks);
        let restore = spec.restore.and_then(|restore| self.take_up_restore(&disk, restore));
        let open = Open {
            disk,
            mirror: Mutex::new(mirror),
            left_leg: Mutex::default(),
            restore: Mutex::new(restore),
            next_log: Mutex::default(),
        };
        let disk = self.enter(spec.id, open)?;
        disk.watch_legs();
        Ok(disk)
    }

    fn backing(&self, image: ImageSpec, block_bytes: u32) -> Result<Backing, Error> {
        Ok(match image {
            ImageSpec::Image(image) => Backing::One(image),
            ImageSpec::Base(base) => Backing::View(self.view(&base)),
            ImageSpec::Mirror { .. } => Backing::Pair(legs::open(self, image, block_bytes)?),
        })
    }

    /// The version that a volume stands on. One that is lost says why at each request.
    pub(super) fn view(&self, base: &BaseSpec) -> Arc<View> {
        let lost = |why: &str| View::lost(why, base.version, &base.name, base.size_bytes);
        match &base.disk {
            Err(why) => lost(why),
            Ok(id) => match self.find(*id) {
                Some(open) => View::of(open.disk.clone(), base.version, &base.name),
                None => lost("its disk is not served"),
            },
        }
    }

    /// A layer of its own for a version.
    pub(super) fn layer(&self, version: VersionId, layer: LayerSpec) -> Layer {
        self.layer_on(version, layer, || unreachable!("a new layer is beside the disk's image"))
    }

    fn layer_on(&self, version: VersionId, layer: LayerSpec, own: impl FnOnce() -> Backing) -> Layer {
        match layer {
            LayerSpec::Base => Layer::full(own()),
            LayerSpec::Full(image) => Layer::full(Backing::One(image)),
            LayerSpec::Table(bytes, table) => Layer::of(bytes.backing(), table),
            LayerSpec::Saved(bytes, table) => Layer::saved(bytes.backing(), self.saved(version, table)),
            LayerSpec::Log(bytes, table, freed) => Layer::logged(bytes.backing(), Arc::new(Log { table, freed })),
        }
    }

    /// What a frozen version's layer has to survive a power cut.
    pub(super) fn saved(&self, version: VersionId, table: DurableTable) -> Arc<Saved> {
        let supervisor = self.supervisor.clone();
        Arc::new(Saved { table, revoke: Box::new(move || supervisor.give_up(version)) })
    }

    /// Has a restore go on that had begun: at once, or when what it goes back to is there.
    fn take_up_restore(&self, disk: &Arc<engine::Disk>, restore: RestoreSpec) -> Option<Pending> {
        let RestoreSpec { pending, own, lost } = restore;
        if let Some(own) = own {
            self.editor.resume_restore(disk, Restoring::new(pending, RestoreSource::Own(own)));
            return None;
        }
        let mut closed = Some(self.editor.close(disk, true));
        if let Some(why) = lost {
            closed.take().into_iter().for_each(|closed| closed.lose(why.clone()));
        }
        Some(Pending { blocks: pending, source: None, closed })
    }
}
