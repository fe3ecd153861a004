//! Changes of the chain: the cut, and letting a version go.
//!
//! A cut (source 002 [0045], [0048]; figure 4) in steps: everything for the coming epoch is prepared, then published
//! to all disks of the group, then one counter moves. Nobody is paused. A request that has the new chain before
//! the counter moved does what it would have done with the old one: under copy-on-write the image it writes stays
//! the same image, only its owner's name changes.

use std::sync::Arc;

use super::chain::{Chain, Layer, Link, Owned, Version, VersionId};
use super::lock::Mode;
use super::plan::Copy;
use super::planted::{self, Defect};
use super::{Backing, Disk, Epoch, EpochClock, Ticket, TooManyDraining};
use crate::image::IoQueue;
use crate::store::{BlockIndex, BlockRange, Table};
use crate::sync::{Mutex, lock};

/// Who may change chains: one at a time for the whole daemon, because a group is published at one cut.
pub struct ChainEditor {
    clock: EpochClock,
    editing: Mutex<()>,
}

/// What a frozen version will need, made before the cut.
pub struct PreparedSnapshot {
    /// The disk to freeze.
    pub disk: Arc<Disk>,
    /// An empty image of the disk's size for the blocks that are saved.
    pub image: Backing,
    /// An empty table for it.
    pub table: Arc<Table>,
    /// The name that the new live version gets.
    pub new_live: VersionId,
}

/// A cut that was made.
pub struct Cut {
    /// The epoch that ended with it.
    pub ended: Epoch,
    /// The frozen versions, in the order of the group.
    pub frozen: Vec<Arc<Version>>,
}

impl ChainEditor {
    /// The editor of the disks that go by `clock`.
    #[must_use]
    pub fn new(clock: EpochClock) -> ChainEditor {
        ChainEditor { clock, editing: Mutex::new(()) }
    }

    /// Freezes a group of disks at one cut, copy-on-write.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    pub fn cut(&self, group: Vec<PreparedSnapshot>) -> Result<Cut, TooManyDraining> {
        let _editing = lock(&self.editing);
        if !self.clock.can_advance() {
            return Err(TooManyDraining);
        }
        let coming = self.clock.current().next();
        let mut frozen = Vec::with_capacity(group.len());
        for prepared in group {
            let disk = prepared.disk.clone();
            let began = if planted::is(Defect::CutPerDisk) { self.clock.current().next() } else { coming };
            frozen.push(disk.publish_copy_on_write(prepared, began));
            if planted::is(Defect::CutPerDisk) {
                self.clock.advance()?;
                // Long enough for whole writes of a running guest; a real defect has all the time there is.
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        if !planted::is(Defect::CutPerDisk) {
            self.clock.advance()?;
        }
        Ok(Cut { ended: coming.previous(), frozen })
    }

    /// Begins to let a frozen version go: nothing more is kept for it. Returns the epoch that must drain
    /// before [`Disk::hand_over`] may begin, so that no request still goes by the old state.
    ///
    /// # Errors
    /// When too many older cuts still drain.
    pub fn begin_retire(&self, version: &Version) -> Result<Epoch, TooManyDraining> {
        let _editing = lock(&self.editing);
        if !self.clock.can_advance() {
            return Err(TooManyDraining);
        }
        version.set_retiring();
        // An epoch without a version of its own: a grace period.
        Ok(self.clock.advance()?.previous())
    }

    /// Takes a version whose blocks have been handed over out of its chain. Its image may be removed then; readers
    /// that are still at it keep it open.
    pub fn finish_retire(&self, disk: &Disk, id: VersionId) {
        let _editing = lock(&self.editing);
        let chain = disk.chain();
        let links = chain.links().iter().filter(|l| l.version.id != id).cloned().collect();
        disk.chain.store(Arc::new(Chain::new(links)));
    }
}

impl Disk {
    /// Publishes a new live version that begins at `began`. It takes the pivot's image along, and the frozen one
    /// gets the empty image (source 002 [0092]; figure 21).
    fn publish_copy_on_write(&self, prepared: PreparedSnapshot, began: Epoch) -> Arc<Version> {
        let chain = self.chain();
        let mut links = chain.links().to_vec();
        let last = links.last_mut().expect("a chain is never empty");
        let frozen = last.version.clone();
        let layer = Layer { image: prepared.image, owned: Owned::Table(prepared.table) };
        let pivot = std::mem::replace(&mut last.layer, layer);
        links.push(Link { version: Version::new(prepared.new_live, began), layer: pivot });
        self.chain.store(Arc::new(Chain::new(links)));
        frozen
    }

    /// Hands the first block at or after `from` that version `id` owns to the version that reads it there, if any.
    /// Returns where to go on, or None when all are handed over. One block is locked at a time.
    ///
    /// The ticket makes the retirement of a heir wait until this block has arrived there.
    pub async fn hand_over(
        &self,
        queue: &IoQueue,
        _ticket: &Ticket,
        id: VersionId,
        from: BlockIndex,
    ) -> Option<BlockIndex> {
        let chain = self.chain();
        let retiring = chain.position(id)?;
        if planted::is(Defect::DeleteWithoutHandover) {
            return None;
        }
        let Owned::Table(table) = &chain.layer(retiring).owned else {
            unreachable!("the pivot is not let go by handing over")
        };
        let block = table.next_set(from)?;
        let one = BlockRange::one(block);
        let _guard = self.locks.acquire(one, Mode::Exclusive).await;
        // A heir that cannot take the block is lost; then the next older one reads here.
        while let Some(heir) = chain.nearest_reader(retiring, block) {
            match self.copy_blocks(queue, &chain, one, Copy { from: retiring, to: heir }).await {
                Ok(()) => {
                    if let Owned::Table(heirs) = &chain.layer(heir).owned {
                        heirs.set(one);
                    }
                    break;
                }
                Err(reason) => self.break_version(chain.version(heir), &reason),
            }
        }
        Some(BlockIndex(block.0 + 1))
    }
}
