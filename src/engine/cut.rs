//! The cut: freezing the live versions of a group of disks at one instant, and moving frontends over afterwards.
//!
//! A cut (source 002 [0045], [0048]; figure 4) in steps: everything for the coming epoch is prepared, then published
//! to all disks of the group, then one counter moves. Nobody is paused. A request that has the new chain before
//! the counter moved does what it would have done with the old one: its version keeps its place in the chain, and
//! the places where its bytes go are the same.

use std::sync::Arc;

use super::restoring::Restore;
use super::{
    Backing, Chain, ChainEditor, Changed, Disk, Epoch, Layer, Link, PinChange, TooManyDraining, Version, VersionId,
};
use crate::store::Table;

/// Where the pivot goes at a cut, and what the version without it gets: all that a strategy is.
pub enum NewLayer {
    /// Copy-on-write: the full image goes with the live version, the frozen one gets an empty image for what is
    /// saved (002 [0092]; figure 21).
    Frozen {
        /// An empty image of the disk's size, with an empty table.
        layer: Layer,
    },
    /// Write logging: the full image stays with the frozen version, the live one gets an empty image for what is
    /// written (002 [0074], [0076]; figure 14).
    Live {
        /// An empty image of the disk's size, with an empty table.
        layer: Layer,
    },
    /// Write mirroring: each version takes a full image (002 [0062], [0063]; figure 9).
    Split {
        /// The leg that the frozen version takes.
        frozen: Backing,
        /// What the live version keeps.
        live: Backing,
    },
}

/// Who stays with the frozen version when it is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writers {
    /// The requests in flight; the next ones of every frontend belong to the live version.
    Request,
    /// All requests of the frontends that are connected, until they disconnect or are cut over ([0045], [0051]:
    /// active processes keep VLUN A, new ones start on VLUN B).
    Connection,
}

/// What a snapshot of one disk needs, made before the cut.
pub struct PreparedSnapshot {
    /// The disk to freeze.
    pub disk: Arc<Disk>,
    /// How.
    pub layer: NewLayer,
    /// The name that the new live version gets.
    pub new_live: VersionId,
    /// An empty table in which it is noted what is written to it from its beginning on.
    pub changed: Option<Arc<Table>>,
}

/// A cut that was made.
pub struct Cut {
    /// The epoch that ended with it.
    pub ended: Epoch,
    /// The frozen versions, in the order of the group.
    pub frozen: Vec<Arc<Version>>,
}

impl PreparedSnapshot {
    fn assert_fits(&self) {
        assert!(matches!(self.disk.chain().restore(), Restore::None), "a disk is frozen while it is restored");
        let moves = !matches!(self.layer, NewLayer::Live { .. });
        assert!(!moves || self.disk.can_move_pivot(), "the full image is moved or split while a log lies above it");
        let blocks = self.disk.geometry().blocks();
        assert!(
            self.changed.as_ref().is_none_or(|table| table.blocks() >= blocks),
            "the disk has grown since it was made"
        );
    }
}

impl ChainEditor {
    /// Freezes a group of disks at one cut.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    ///
    /// # Panics
    /// When a disk's full image is to be moved or split while a log lies above it ([`Disk::can_move_pivot`]), or a disk
    /// is being restored. Nothing has changed then.
    pub fn cut(&self, group: Vec<PreparedSnapshot>, writers: Writers) -> Result<Cut, TooManyDraining> {
        let _editing = self.begin();
        let room = self.clock.room()?;
        // All of them first: half a group that is published would have a version of an epoch that never comes.
        group.iter().for_each(PreparedSnapshot::assert_fits);
        let coming = room.coming();
        let disks: Vec<_> = group.iter().map(|prepared| prepared.disk.clone()).collect();
        let pin = || match writers {
            Writers::Request => Vec::new(),
            // Nobody joins before these are dropped, so that who is connected is the same for the whole group.
            Writers::Connection => disks.iter().map(|disk| disk.connections.pin(coming.previous())).collect(),
        };
        let mut frozen = Vec::with_capacity(group.len());
        for prepared in group {
            let disk = prepared.disk.clone();
            let began = coming;
            frozen.push(disk.publish(prepared, began));
        }
        let pins = pin();
        self.clock.advance(room);
        drop(pins);
        Ok(Cut { ended: coming.previous(), frozen })
    }

    /// Moves the connections that still act in `ended` or before over to where they would act without: the versions that
    /// ended with it drain from now on. A cut by itself, without a new version. Returns how many connections moved.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    pub fn cut_over(&self, disks: &[&Disk], ended: Epoch) -> Result<usize, TooManyDraining> {
        let _editing = self.begin();
        let room = self.clock.room()?;
        let coming = room.coming();
        let changes: Vec<_> = disks.iter().map(|disk| disk.connections.release(ended, coming)).collect();
        self.clock.advance(room);
        Ok(changes.iter().map(PinChange::count).sum())
    }

    /// Puts another view of the same bytes in the place of the disk's full image. Returns the epoch that must drain before
    /// nobody goes by the old one.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    pub fn replace_full_image(&self, disk: &Disk, image: Backing) -> Result<Epoch, TooManyDraining> {
        let _editing = self.begin();
        let room = self.clock.room()?;
        let chain = disk.chain();
        let mut links = chain.links().to_vec();
        links[chain.pivot_of(chain.live())].layer.image = image;
        disk.chain.store(Arc::new(chain.with_links(links)));
        Ok(self.clock.advance(room).previous())
    }
}

impl Disk {
    /// Whether the live version has the full image, so that a cut may move it (copy-on-write) or split it (write
    /// mirroring). While a log lies above the pivot, a cut can only add another log.
    #[must_use]
    pub fn can_move_pivot(&self) -> bool {
        let chain = self.chain();
        chain.pivot_of(chain.live()) == chain.live()
    }

    /// Publishes a new live version that begins at `began`.
    fn publish(&self, prepared: PreparedSnapshot, began: Epoch) -> Arc<Version> {
        let chain = self.chain();
        let mut links = chain.links().to_vec();
        let last = links.last_mut().expect("a chain is never empty");
        let frozen = last.version.clone();
        frozen.keep_size(self.geometry());
        let (layer, splits) = match prepared.layer {
            NewLayer::Frozen { layer } => {
                layer.places().begin_empty();
                (std::mem::replace(&mut last.layer, layer), false)
            }
            NewLayer::Live { layer } => (layer, false),
            NewLayer::Split { frozen, live } => {
                last.layer.image = frozen;
                (Layer::full(live), true)
            }
        };
        let version = Version::noting(prepared.new_live, began, prepared.changed.map(Changed::Noted));
        links.push(Link { version, layer, splits });
        self.chain.store(Arc::new(Chain::new(links)));
        frozen
    }
}
