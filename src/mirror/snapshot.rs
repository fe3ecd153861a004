//! Changes of the chain: the cut, and letting a version go.
//!
//! A cut (source 002 [0045], [0048]; figure 4) in steps: everything for the coming epoch is prepared, then published
//! to all disks of the group, then one counter moves. Nobody is paused. A request that has the new chain before
//! the counter moved does what it would have done with the old one: its version keeps its place in the chain, and
//! the places where its bytes go are the same.

use std::sync::Arc;

use super::backing::Backing;
use super::chain::{Chain, Link, VersionIn, VersionIndex};
use super::changed::Changed;
use super::connection::PinChange;
use super::disk::Disk;
use super::editor::ChainEditor;
use super::epoch::{Epoch, TooManyDraining};
use super::layer::Layer;
use super::plan::{Copy, save_for_older};
use super::planted::{self, Defect};
use super::restoring::Restore;
use super::runs::{alike, those};
use super::ticket::Ticket;
use super::version::{Version, VersionId};
use crate::image::{IoQueue, join_all};
use crate::store::{BlockIndex, BlockRange, Table};

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
    /// Freezes a group of disks at one cut.
    ///
    /// # Errors
    /// When too many older cuts still drain; nothing has changed then.
    ///
    /// # Panics
    /// When a disk's full image is to be moved or split while a log lies above it ([`Disk::can_move_pivot`]), or a disk
    /// is being restored.
    pub fn cut(&self, group: Vec<PreparedSnapshot>, writers: Writers) -> Result<Cut, TooManyDraining> {
        let _editing = self.begin();
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
        let _editing = self.begin();
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
        let _editing = self.begin();
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
    /// [`Disk::let_go_of_some`] may begin, so that no request still goes by the old state.
    ///
    /// # Errors
    /// When too many older cuts still drain, or another version of this disk is on its way out.
    pub fn begin_retire(&self, disk: &Disk, version: &Version) -> Result<Epoch, RetireError> {
        let _editing = self.begin();
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
        let _editing = self.begin();
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
        ChainEditor::keep_changes(disk, chain.at(index), &links);
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
        chain.position(id).and_then(|i| moving_table(chain.at(i))).map_or(0, |(_, table)| table.count())
    }

    /// Does the next blocks, up to `most`, that must move before version `id` can go, at or after `from`: an entry of the
    /// version itself goes to the neighbour that reads it there; if it is the pivot, an entry of the neighbour that takes its
    /// image over is folded into that. Neighbouring blocks go together, and several such runs side by side. Returns where to
    /// go on and how many there were, or None when all is done.
    ///
    /// The ticket makes the retirement of an heir wait until these blocks have arrived there.
    ///
    /// # Errors
    /// When a block cannot be moved to where the live version needs it. Nothing is lost; it can be tried again.
    pub async fn let_go_of_some(
        &self,
        queue: &IoQueue,
        _ticket: &Ticket,
        id: VersionId,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<(BlockIndex, u64)>, String> {
        let chain = self.chain();
        let Some(retiring) = chain.position(id) else { return Ok(None) };
        if planted::is(Defect::DeleteWithoutHandover) {
            return Ok(None);
        }
        let Some((_, table)) = moving_table(chain.at(retiring)) else { return Ok(None) };
        let runs = self.next_runs(from, most, |at| table.next_set(at));
        let Some(next) = runs.last().map(|last| last.end) else { return Ok(None) };
        let count = runs.iter().map(|run| run.count()).sum();
        self.copy_runs(runs, |run| self.let_go_of_run(queue, id, run)).await?;
        Ok(Some((next, count)))
    }

    /// The caller holds the locks of `run`.
    async fn let_go_of_run(&self, queue: &IoQueue, id: VersionId, run: BlockRange) -> Result<(), String> {
        // Only now: a cut may have come in between.
        let chain = self.chain();
        let Some(retiring) = chain.position(id) else { return Ok(()) };
        let Some((owner, table)) = moving_table(chain.at(retiring)) else { return Ok(()) };
        // A guest's write may have come before us.
        let left = those(run, |block| table.get(block) || planted::is(Defect::LetGoOfOverwritten));
        let moves = left.map(|part| {
            let chain = &chain;
            async move {
                if owner < retiring {
                    self.give_to_older(queue, chain, part, Copy { from: owner, to: retiring }).await
                } else if owner > retiring {
                    self.fold(queue, chain, part, Copy { from: owner, to: retiring }).await
                } else if chain.at(retiring).is_below_pivot() {
                    self.hand_to_older(queue, chain.at(retiring), part).await
                } else {
                    self.hand_to_newer(queue, chain.at(retiring), part).await
                }
            }
        });
        join_all(moves.collect()).await.into_iter().collect()
    }

    /// Below the pivot the nearest older version reads here. One that cannot take the blocks is lost; then the next older
    /// one reads here.
    async fn hand_to_older(&self, queue: &IoQueue, retiring: VersionIn<'_>, blocks: BlockRange) -> Result<(), String> {
        let chain = retiring.chain;
        // Each turn without an end breaks a version.
        loop {
            let heirs = alike(blocks, |block| retiring.nearest_reader(block));
            let copies = heirs.into_iter().filter_map(|(part, heir)| {
                let heir = heir?;
                Some(async move {
                    match self.copy_blocks(queue, chain, part, Copy { from: retiring.index, to: heir }).await {
                        // Durable with the rest ([`Disk::settle`]): until then the entry that it was copied from is.
                        Ok(()) => chain.at(heir).set(part),
                        Err(reason) => self.give_up(chain.at(heir), &reason).map_err(|e| e.to_string())?,
                    }
                    Ok(())
                })
            });
            let copies: Vec<_> = copies.collect();
            if copies.is_empty() {
                return Ok(());
            }
            join_all(copies).await.into_iter().collect::<Result<(), String>>()?;
        }
    }

    /// Above the pivot the next newer version reads here, and the live one through it.
    async fn hand_to_newer(&self, queue: &IoQueue, retiring: VersionIn<'_>, blocks: BlockRange) -> Result<(), String> {
        let heir = retiring.other(retiring.index + 1);
        let copies = those(blocks, |block| !heir.layer().owns(block)).map(|part| async move {
            if planted::is(Defect::HandOverBitFirst) {
                heir.set(part);
            }
            self.copy_blocks(queue, heir.chain, part, Copy { from: retiring.index, to: heir.index }).await?;
            heir.set(part);
            Ok(())
        });
        join_all(copies.collect()).await.into_iter().collect()
    }

    /// Moves entries of a log into the full image below, after saving what older versions read there.
    async fn fold(&self, queue: &IoQueue, chain: &Chain, blocks: BlockRange, copy: Copy) -> Result<(), String> {
        while !planted::is(Defect::FoldWithoutPreserve) {
            let saves = alike(blocks, |block| save_for_older(chain.at(copy.to), block))
                .into_iter()
                .filter_map(|(part, save)| Some((part, save?)));
            let saves: Vec<_> = saves.map(|(part, save)| self.save_for_fold(queue, chain, part, save)).collect();
            if saves.is_empty() {
                break;
            }
            join_all(saves).await.into_iter().collect::<Result<(), String>>()?;
        }
        if planted::is(Defect::FoldDropsFirst) {
            self.drop_entries(queue, chain.at(copy.from), blocks).await;
        }
        self.copy_blocks(queue, chain, blocks, copy).await?;
        self.drop_entries(queue, chain.at(copy.from), blocks).await;
        Ok(())
    }

    /// Saves what an older version reads, or gives that version up.
    async fn save_for_fold(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        blocks: BlockRange,
        save: Copy,
    ) -> Result<(), String> {
        let saved = match self.copy_blocks(queue, chain, blocks, save).await {
            Ok(()) => {
                chain.at(save.to).set(blocks);
                match planted::is(Defect::FoldBeforeSaved) {
                    true => Ok(()),
                    false => self.commit_saved(queue, chain.at(save.to)).await,
                }
            }
            failed => failed,
        };
        let Err(reason) = saved else { return Ok(()) };
        // Those that read through it must not count on what no power cut would leave.
        if !planted::is(Defect::FoldedEntryKept) {
            chain.at(save.to).clear(blocks);
        }
        self.give_up(chain.at(save.to), &reason).map_err(|e| e.to_string())
    }

    /// Moves entries of an older version into the full image of a frozen pivot, which that version takes over. If they
    /// cannot be put there the older version is lost; those that read the entries through it get them themselves.
    async fn give_to_older(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        blocks: BlockRange,
        copy: Copy,
    ) -> Result<(), String> {
        if let Err(reason) = self.copy_blocks(queue, chain, blocks, copy).await {
            self.give_up(chain.at(copy.from), &reason).map_err(|e| e.to_string())?;
            self.hand_to_older(queue, chain.at(copy.from), blocks).await?;
        }
        Ok(())
    }
}

/// Whose entries must move before a version can go.
fn moving_table(retiring: VersionIn<'_>) -> Option<(VersionIndex, &Arc<Table>)> {
    let owner = match retiring.layer().table() {
        Some(_) => retiring.index,
        None => retiring.chain.heir_of_pivot(retiring.index)?,
    };
    Some((owner, retiring.other(owner).layer().table()?))
}
