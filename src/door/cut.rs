//! Snapshots come and go: cut, moved over, let go of.

use std::sync::Arc;

use uuid::Uuid;

use super::engine::{Disk, Engine, locked};
use super::error::{Error, no_mirror};
use super::spec::LayerSpec;
use crate::engine::{self, Backing, Epoch, PreparedSnapshot, RetireError, TooManyDraining, VersionId, Writers};
use crate::image::SharedImage;
use crate::store::{DurableTable, Table};

/// What the snapshot of one disk needs.
pub struct SnapshotSpec {
    /// The disk.
    pub disk: Uuid,
    /// Where its full image goes.
    pub layer: NewLayer,
    /// The name that the new live version gets.
    pub new_live: VersionId,
    /// An empty table in which it is noted what is written to it.
    pub changed: Arc<Table>,
}

/// Where the full image goes at a cut, and what the version without it gets ([`engine::NewLayer`]).
pub enum NewLayer {
    /// With the live version; this is for what is saved for the frozen one.
    Frozen(LayerSpec),
    /// It stays; this is the log of the live version.
    Live(LayerSpec),
    /// Each version takes a leg of the mirror, whose split is prepared ([`Disk::split`]).
    Split,
}

/// What a cut came to.
pub struct Cut {
    /// The epoch that ended with it.
    pub ended: Epoch,
    /// Frozen versions whose leg failed after its split was prepared and before the cut, and why: nothing was frozen on it.
    pub lost: Vec<(VersionId, String)>,
}

impl Engine {
    /// Freezes the live versions of a group of disks at one cut.
    ///
    /// # Errors
    /// When too many older cuts still drain, or a disk has no mirror to be split; nothing has changed then.
    ///
    /// # Panics
    /// When a disk's full image is to be moved while a log lies above it, or a disk is being restored. Nothing has changed
    /// then.
    pub fn cut(&self, group: Vec<SnapshotSpec>, writers: Writers) -> Result<Cut, Error> {
        let (mut prepared, mut splits) = (Vec::new(), Vec::new());
        for SnapshotSpec { disk, layer, new_live, changed } in group {
            let open = self.find(disk).ok_or_else(|| Error::Io("a disk is not served any more".to_owned()))?;
            let frozen = live_of(&open.disk);
            let layer = match layer {
                NewLayer::Frozen(layer) => engine::NewLayer::Frozen { layer: self.layer(frozen, layer) },
                NewLayer::Live(layer) => engine::NewLayer::Live { layer: self.layer(new_live, layer) },
                NewLayer::Split => {
                    let live = locked(&open.mirror).clone();
                    let (live, leg) =
                        live.and_then(|pair| Some((pair.clone(), pair.second()?))).ok_or_else(no_mirror)?;
                    splits.push((frozen, live.clone(), leg.id));
                    engine::NewLayer::Split { frozen: Backing::One(leg.image), live: Backing::Pair(live) }
                }
            };
            prepared.push(PreparedSnapshot { disk: open.disk.clone(), layer, new_live, changed: Some(changed) });
        }
        let cut = self.editor.cut(prepared, writers)?;
        let lost = splits.into_iter().filter_map(|(frozen, pair, leg)| {
            match pair.status().into_iter().find(|status| status.id == leg)?.state {
                engine::LegState::Failed(reason) => Some((frozen, reason)),
                _ => None,
            }
        });
        Ok(Cut { ended: cut.ended, lost: lost.collect() })
    }

    /// Moves the frontends that still write what ended with `ended`, or before, over to the live versions of these disks.
    /// Returns how many moved.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    pub fn cut_over(&self, disks: &[Uuid], ended: Epoch) -> Result<usize, TooManyDraining> {
        let disks: Vec<_> = disks.iter().filter_map(|id| self.find(*id)).collect();
        let disks: Vec<&engine::Disk> = disks.iter().map(|open| &*open.disk).collect();
        self.editor.cut_over(&disks, ended)
    }
}

fn live_of(disk: &engine::Disk) -> VersionId {
    let chain = disk.chain();
    chain.version(chain.live()).id
}

impl Disk {
    /// Begins to let a frozen, quiesced version go, of which a mark stays or not. Returns the epoch that must drain before
    /// [`Disk::retire`] ([`engine::ChainEditor::begin_retire`]).
    ///
    /// # Errors
    /// When too many older cuts still drain, or another version of this disk is on its way out.
    pub fn begin_retire(&self, version: VersionId, leaves_mark: bool) -> Result<Epoch, RetireError> {
        let disk = &self.open().disk;
        let chain = disk.chain();
        // One that has left the chain waits only to be forgotten.
        let Some(index) = chain.position(version) else { return Ok(Epoch(0)) };
        chain.version(index).set_leaves_mark(leaves_mark);
        self.engine.editor.begin_retire(disk, chain.version(index))
    }

    /// Has what is saved for some versions outlive a power cut from now on, in these new images of their tables, and what
    /// `version` shows with it. The records do not say so yet ([`Disk::durability_recorded`]).
    ///
    /// # Errors
    /// When something cannot be stored; then it is as it was.
    pub fn save_durably(&self, version: VersionId, tables: Vec<(VersionId, SharedImage)>) -> Result<(), Error> {
        let (disk, engine) = (self.open().disk.clone(), self.engine.clone());
        disk.durability_changes();
        let (of, ids): (_, Vec<_>) = (disk.clone(), tables.iter().map(|(id, _)| *id).collect());
        let done = self.engine.on_ring(async move |queue| -> Result<(), Error> {
            for (id, image) in tables {
                let chain = of.chain();
                let table = chain.position(id).and_then(|index| chain.layer(index).table().cloned());
                let table = table.ok_or_else(|| Error::Io("the snapshot is gone".to_owned()))?;
                let payload = [0; crate::store::PAYLOAD_BYTES];
                let durable = DurableTable::create(image, id, table, payload, &queue).await?;
                engine.editor.save_durably(&of, id, Some(engine.saved(id, durable)));
            }
            // Whoever was decided before saves without making that durable.
            of.changes_passed().await;
            Ok(of.make_durable(&queue, version).await?)
        });
        done.inspect_err(|_| {
            ids.iter().for_each(|id| self.engine.editor.save_durably(&disk, *id, None));
            disk.durability_recorded();
        })
    }
}
