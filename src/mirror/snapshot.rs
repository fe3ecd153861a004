//! Changes of the chain: the cut, and letting a version go.
//!
//! A cut (source 002 [0045], [0048]; figure 4) in steps: everything for the coming epoch is prepared, then published
//! to all disks of the group, then one counter moves. Nobody is paused. A request that has the new chain before
//! the counter moved does what it would have done with the old one: its version keeps its place in the chain, and
//! the places where its bytes go are the same.

use std::sync::Arc;

use super::chain::{Chain, Layer, Link, Owned, Version, VersionId, VersionIndex};
use super::lock::Mode;
use super::plan::Copy;
use super::planted::{self, Defect};
use super::restore::Restore;
use super::{Backing, Changed, Disk, Epoch, EpochClock, PinChange, Ticket, TooManyDraining};
use crate::image::IoQueue;
use crate::store::{BlockIndex, BlockRange, Table};
use crate::sync::{Mutex, lock};

/// Who may change chains: one at a time for the whole daemon, because a group is published at one cut.
pub struct ChainEditor {
    clock: EpochClock,
    pub(super) editing: Mutex<()>,
}

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

/// A version cannot be let go now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RetireError {
    /// Too many older cuts still drain.
    #[error(transparent)]
    TooManyDraining(#[from] TooManyDraining),
    /// Another version of the disk is on its way out.
    #[error("another snapshot of the disk is being deleted")]
    Busy,
}

impl ChainEditor {
    /// The editor of the disks that go by `clock`.
    #[must_use]
    pub fn new(clock: EpochClock) -> ChainEditor {
        ChainEditor { clock, editing: Mutex::new(()) }
    }

    /// Freezes a group of disks at one cut.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    ///
    /// # Panics
    /// When a disk's full image is to be moved or split while a log lies above it ([`Disk::can_move_pivot`]), or a disk
    /// is being restored.
    pub fn cut(&self, group: Vec<PreparedSnapshot>, writers: Writers) -> Result<Cut, TooManyDraining> {
        let _editing = lock(&self.editing);
        if !self.clock.can_advance() {
            return Err(TooManyDraining);
        }
        let coming = self.clock.current().next();
        let disks: Vec<_> = group.iter().map(|prepared| prepared.disk.clone()).collect();
        let pin = || match writers {
            Writers::Request => Vec::new(),
            // Nobody joins before these are dropped, so that who is connected is the same for the whole group.
            Writers::Connection => disks.iter().map(|disk| disk.connections.pin(coming.previous())).collect(),
        };
        let mut frozen = Vec::with_capacity(group.len());
        for prepared in group {
            let disk = prepared.disk.clone();
            let began = if planted::is(Defect::CutPerDisk) { self.clock.current().next() } else { coming };
            frozen.push(disk.publish(prepared, began));
            if planted::is(Defect::CutPerDisk) {
                self.clock.advance()?;
                // Long enough for whole writes of a running guest; a real defect has all the time there is.
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        let pins = if planted::is(Defect::PinAfterCut) { Vec::new() } else { pin() };
        if !planted::is(Defect::CutPerDisk) {
            self.clock.advance()?;
        }
        drop(pins);
        if planted::is(Defect::PinAfterCut) {
            drop(pin());
        }
        Ok(Cut { ended: coming.previous(), frozen })
    }

    /// Moves the connections that still act in `ended` or before over to where they would act without: the versions that
    /// ended with it drain from now on. A cut by itself, without a new version. Returns how many connections moved.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    pub fn cut_over(&self, disks: &[&Disk], ended: Epoch) -> Result<usize, TooManyDraining> {
        let _editing = lock(&self.editing);
        if !self.clock.can_advance() {
            return Err(TooManyDraining);
        }
        let coming = self.clock.current().next();
        if planted::is(Defect::CutOverAfterMove) {
            self.clock.advance()?;
        }
        let changes: Vec<_> = disks.iter().map(|disk| disk.connections.release(ended, coming)).collect();
        if !planted::is(Defect::CutOverAfterMove) {
            self.clock.advance()?;
        }
        Ok(changes.iter().map(PinChange::count).sum())
    }

    /// Puts another view of the same bytes in the place of the disk's full image. Returns the epoch that must drain before
    /// nobody goes by the old one.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    pub fn replace_full_image(&self, disk: &Disk, image: Backing) -> Result<Epoch, TooManyDraining> {
        let _editing = lock(&self.editing);
        if !self.clock.can_advance() {
            return Err(TooManyDraining);
        }
        let chain = disk.chain();
        let mut links = chain.links().to_vec();
        links[chain.pivot_of(chain.live())].layer.image = image;
        disk.chain.store(Arc::new(chain.with_links(links)));
        Ok(self.clock.advance()?.previous())
    }

    /// Begins to let a frozen, quiesced version go: nothing more is kept for it, and if it is a pivot with a log above,
    /// writes of the version above go to its image from now on. Returns the epoch that must drain before
    /// [`Disk::let_go_of_next`] may begin, so that no request still goes by the old state.
    ///
    /// # Errors
    /// When too many older cuts still drain, or another version of this disk is on its way out.
    pub fn begin_retire(&self, disk: &Disk, version: &Version) -> Result<Epoch, RetireError> {
        let _editing = lock(&self.editing);
        if !self.clock.can_advance() {
            return Err(RetireError::TooManyDraining(TooManyDraining));
        }
        // Two at once would each go by a neighbour that the other takes away.
        let other = |l: &Link| l.version.is_retiring() && l.version.id != version.id;
        if disk.chain().links().iter().any(other) && !planted::is(Defect::RetiresSideBySide) {
            return Err(RetireError::Busy);
        }
        version.set_retiring();
        // An epoch without a version of its own: a grace period.
        Ok(self.clock.advance()?.previous())
    }

    /// Takes a version whose blocks have been handed over out of its chain. A pivot leaves its image to the neighbour
    /// that everything was folded into. Readers that are still at an image that goes keep it open.
    pub fn finish_retire(&self, disk: &Disk, id: VersionId) {
        let _editing = lock(&self.editing);
        let chain = disk.chain();
        let Some(index) = chain.position(id) else { return };
        let mut links = chain.links().to_vec();
        if let Some(heir) = chain.heir_of_pivot(index) {
            links[heir].layer = links[index].layer.clone();
        }
        let gone = links.remove(index);
        if gone.splits && links.get(index).is_some_and(|next| !next.splits) {
            links[index].splits = true;
        }
        ChainEditor::keep_changes(disk, &chain, index, &links);
        disk.chain.store(Arc::new(chain.with_links(links)));
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
        assert!(matches!(chain.restore(), Restore::None), "a disk is frozen while it is restored");
        let mut links = chain.links().to_vec();
        let movable = self.can_move_pivot();
        let last = links.last_mut().expect("a chain is never empty");
        let frozen = last.version.clone();
        let (layer, splits) = match prepared.layer {
            NewLayer::Frozen { layer } => {
                assert!(movable, "the full image is moved while a log lies above it");
                (std::mem::replace(&mut last.layer, layer), false)
            }
            NewLayer::Live { layer } => (layer, false),
            NewLayer::Split { frozen, live } => {
                assert!(movable, "a mirror is split while a log lies above it");
                last.layer.image = frozen;
                (Layer::full(live), true)
            }
        };
        let version = Version::noting(prepared.new_live, began, prepared.changed.map(Changed::Noted));
        links.push(Link { version, layer, splits });
        self.chain.store(Arc::new(Chain::new(links)));
        frozen
    }

    /// How many blocks there are to hand over or to fold before a version can go.
    #[must_use]
    pub fn blocks_to_let_go(&self, id: VersionId) -> u64 {
        let chain = self.chain();
        chain.position(id).and_then(|i| moving_table(&chain, i)).map_or(0, |(_, table)| table.count())
    }

    /// Does the next block that must move before version `id` can go, at or after `from`: an entry of the version itself
    /// goes to the neighbour that reads it there; if it is the pivot, an entry of the neighbour that takes its image over
    /// is folded into that. Returns where to go on, or None when all is done. One block is locked at a time.
    ///
    /// The ticket makes the retirement of an heir wait until this block has arrived there.
    ///
    /// # Errors
    /// When a block cannot be moved to where the live version needs it. Nothing is lost; it can be tried again.
    pub async fn let_go_of_next(
        &self,
        queue: &IoQueue,
        _ticket: &Ticket,
        id: VersionId,
        from: BlockIndex,
    ) -> Result<Option<BlockIndex>, String> {
        let chain = self.chain();
        let Some(retiring) = chain.position(id) else { return Ok(None) };
        if planted::is(Defect::DeleteWithoutHandover) {
            return Ok(None);
        }
        let Some((_, table)) = moving_table(&chain, retiring) else { return Ok(None) };
        let Some(block) = table.next_set(from) else { return Ok(None) };
        let one = BlockRange::one(block);
        let _guard = self.locks.acquire(one, Mode::Exclusive).await;
        // Only now: a cut may have come in between.
        let chain = self.chain();
        let Some(retiring) = chain.position(id) else { return Ok(None) };
        let Some((owner, table)) = moving_table(&chain, retiring) else { return Ok(None) };
        if !table.get(block) && !planted::is(Defect::LetGoOfOverwritten) {
            // A guest's write came before us.
        } else if owner < retiring {
            self.give_to_older(queue, &chain, one, Copy { from: owner, to: retiring }).await?;
        } else if owner > retiring {
            self.fold(queue, &chain, one, Copy { from: owner, to: retiring }).await?;
        } else if retiring < chain.pivot_of(retiring) {
            self.hand_to_older(queue, &chain, retiring, block).await?;
        } else {
            self.hand_to_newer(queue, &chain, retiring, block).await?;
        }
        Ok(Some(BlockIndex(block.0 + 1)))
    }

    /// Below the pivot the nearest older version reads here. One that cannot take the block is lost; then the next older
    /// one reads here.
    async fn hand_to_older(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        retiring: VersionIndex,
        block: BlockIndex,
    ) -> Result<(), String> {
        let one = BlockRange::one(block);
        while let Some(heir) = chain.nearest_reader(retiring, block) {
            match self.copy_blocks(queue, chain, one, Copy { from: retiring, to: heir }).await {
                // Durable with the rest ([`Disk::settle`]): until then the entry that it was copied from is.
                Ok(()) => {
                    set(chain, heir, one);
                    break;
                }
                Err(reason) => self.give_up(chain, heir, &reason).map_err(|e| e.to_string())?,
            }
        }
        Ok(())
    }

    /// Above the pivot the next newer version reads here, and the live one through it.
    async fn hand_to_newer(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        retiring: VersionIndex,
        block: BlockIndex,
    ) -> Result<(), String> {
        let (one, heir) = (BlockRange::one(block), retiring + 1);
        if !chain.layer(heir).owns(block) {
            if planted::is(Defect::HandOverBitFirst) {
                set(chain, heir, one);
            }
            self.copy_blocks(queue, chain, one, Copy { from: retiring, to: heir }).await?;
            set(chain, heir, one);
        }
        Ok(())
    }

    /// Moves one entry of a log into the full image below, after saving what an older version reads there.
    async fn fold(&self, queue: &IoQueue, chain: &Chain, one: BlockRange, copy: Copy) -> Result<(), String> {
        if !planted::is(Defect::FoldWithoutPreserve) {
            while let Some(to) = chain.nearest_reader(copy.to, one.start) {
                let save = Copy { from: chain.resolve(to, one.start), to };
                let saved = match self.copy_blocks(queue, chain, one, save).await {
                    Ok(()) => {
                        set(chain, to, one);
                        match planted::is(Defect::FoldBeforeSaved) {
                            true => Ok(()),
                            false => self.commit_saved(queue, chain, to).await,
                        }
                    }
                    failed => failed,
                };
                if let Err(reason) = saved {
                    // Those that read through it must not count on what no power cut would leave.
                    if let Owned::Table(table) = &chain.layer(to).owned
                        && !planted::is(Defect::FoldedEntryKept)
                    {
                        table.clear(one);
                    }
                    self.give_up(chain, to, &reason).map_err(|e| e.to_string())?;
                }
            }
        }
        if planted::is(Defect::FoldDropsFirst) {
            self.drop_entries(queue, chain, copy.from, one).await;
        }
        self.copy_blocks(queue, chain, one, copy).await?;
        self.drop_entries(queue, chain, copy.from, one).await;
        Ok(())
    }

    /// Moves one entry of an older version into the full image of a frozen pivot, which that version takes over. If it
    /// cannot be put there the older version is lost; those that read the entry through it get it themselves.
    async fn give_to_older(&self, queue: &IoQueue, chain: &Chain, one: BlockRange, copy: Copy) -> Result<(), String> {
        if let Err(reason) = self.copy_blocks(queue, chain, one, copy).await {
            self.give_up(chain, copy.from, &reason).map_err(|e| e.to_string())?;
            self.hand_to_older(queue, chain, copy.from, one.start).await?;
        }
        Ok(())
    }
}

/// Whose entries must move before the version at `index` can go.
fn moving_table(chain: &Chain, index: VersionIndex) -> Option<(VersionIndex, &Arc<Table>)> {
    let owner = match &chain.layer(index).owned {
        Owned::Table(_) => index,
        Owned::All => chain.heir_of_pivot(index)?,
    };
    let Owned::Table(table) = &chain.layer(owner).owned else { unreachable!("a segment has one pivot") };
    Some((owner, table))
}

fn set(chain: &Chain, index: VersionIndex, blocks: BlockRange) {
    if let Owned::Table(table) = &chain.layer(index).owned {
        table.set(blocks);
    }
}
