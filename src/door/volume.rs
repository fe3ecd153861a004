//! Volumes: what they stand on, made independent, begun anew, put on another snapshot (source 004).

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::engine::{Disk, Engine, locked};
use super::error::Error;
use super::spec::{BaseSpec, LayerSpec};
use crate::engine::{Backing, Changed, Layer, Log, VersionId};
use crate::store::{DurableTable, Table};

/// The log that a volume gets with its next base: closed when this is dropped, unless [`Disk::move_base`] has taken it.
pub struct NextLog {
    engine: Arc<Engine>,
    disk: Uuid,
}

impl Drop for NextLog {
    fn drop(&mut self) {
        if let Some(open) = self.engine.find(self.disk) {
            *locked(&open.next_log) = None;
        }
    }
}

impl Disk {
    /// A frozen version of this disk, for a volume to stand on; `name` is for messages.
    #[must_use]
    pub fn base(&self, version: VersionId, name: &str) -> BaseSpec {
        let open = self.open();
        let logical_block_bytes = open.disk.geometry().logical_block_bytes;
        let size_bytes = open.disk.size_of(version);
        BaseSpec { disk: Ok(self.id), version, name: name.to_owned(), size_bytes, logical_block_bytes }
    }

    /// Lets a volume stand on its own: its oldest log, which is at `path` now, is its full image. False if that does not own
    /// everything; nothing has changed then. Everything must be durable before.
    #[must_use]
    pub fn make_independent(&self, path: &Path) -> bool {
        let disk = self.open().disk.clone();
        let log = disk.oldest_log();
        let is_done = self.engine.editor.make_independent(&disk);
        if let (true, Some((_, Backing::One(image)))) = (is_done, log)
            && image.path() != path
        {
            image.moved(path);
        }
        is_done
    }

    /// Drops what was written to a volume without snapshots, and begins anew with an empty log. Nobody may be at work on it.
    ///
    /// # Panics
    /// When it has snapshots, or stands on nothing.
    pub fn begin_anew(&self, live: VersionId, layer: LayerSpec, changed: Arc<Table>) {
        let layer = self.engine.layer(live, layer);
        self.engine.editor.begin_anew(&self.open().disk, live, layer, Changed::Noted(changed));
    }

    /// Fills the table of the log that a volume gets with its next base, on the image that it has: with the blocks that it
    /// need not copy again when it is put on the second of two versions of `source`, having stood on the first one; it began
    /// as its version `origin` shows. What it says is durable when this returns. Returns why nothing is kept, if so, beside it.
    ///
    /// # Errors
    /// When its content is in more than one image, or something cannot be stored.
    pub fn prepare_update(
        &self,
        origin: VersionId,
        source: Uuid,
        (old, new): (VersionId, VersionId),
        table: DurableTable,
    ) -> Result<(NextLog, Option<String>), Error> {
        let open = self.open();
        let image = open.disk.only_image().ok_or_else(|| "its content is in more than one image".to_owned())?;
        let kept = match (open.disk.base_broken(), self.engine.find(source)) {
            (None, Some(source)) => open.disk.blocks_to_keep(origin, &source.disk, (old, new)),
            (None, None) => Err("its source is not served".to_owned()),
            (Some(why), _) => Err(format!("it was broken: {why}")),
        };
        if let Ok(kept) = &kept {
            table.take_in(kept).map_err(|e| format!("its table cannot grow: {e}"))?;
        }
        let bytes = Backing::One(image.clone());
        let table = self
            .engine
            .on_ring(async move |queue| crate::job::store_kept(&queue, &table, &bytes).await.map(|()| table))?;
        let log = Log { freed: Table::in_memory(table.table().blocks())?, table };
        *locked(&open.next_log) = Some(Layer::logged(Backing::One(image), Arc::new(log)));
        Ok((NextLog { engine: self.engine.clone(), disk: self.id }, kept.err()))
    }

    /// Puts a volume on another version, with the log that is prepared ([`Disk::prepare_update`]), and its image at `path`
    /// now. Nobody may be at work on it.
    ///
    /// # Panics
    /// When it has snapshots, or the log is another volume's.
    pub fn move_base(
        &self,
        base: &BaseSpec,
        (origin, live): (VersionId, VersionId),
        (log, changed): (NextLog, Arc<Table>),
        path: &Path,
    ) {
        let open = self.open();
        assert_eq!(log.disk, self.id, "the log of another volume");
        let log = locked(&open.next_log).take().expect("an update is prepared");
        let image = open.disk.only_image();
        let view = self.engine.view(base);
        self.engine.editor.move_base(&open.disk, view, (origin, live), log, Changed::Noted(changed));
        if let Some(image) = image.filter(|image| image.path() != path) {
            image.moved(path);
        }
    }
}
