//! Letting a frozen version go: its blocks are handed to the neighbour that reads them there, or folded, and made durable;
//! then it leaves its chain.
//!
//! What always holds:
//! - Nothing moves before the epoch has drained in which requests still went by the old state ([`ChainEditor::begin_retire`]).
//! - Nothing is lost that the live version reads: trouble there is an error, and begins again. A frozen version that cannot
//!   take over what it reads is broken, durably if it would be believed after a power cut.

use std::ops::Range;
use std::sync::Arc;

use super::plan::save_for_older;
use super::runs::{alike, those};
use super::{
    Chain, ChainEditor, Copied, Copy, Disk, Epoch, Link, Ticket, TooManyDraining, Version, VersionId, VersionIn,
    VersionIndex,
};
use crate::image::{IoQueue, join_all};
use crate::store::{BlockIndex, BlockRange, Table};

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
    /// Begins to let a frozen, quiesced version go: nothing more is kept for it, and if it is a pivot with a log above,
    /// writes of the version above go to its image from now on. Returns the epoch that must drain before
    /// [`Disk::let_go_of_some`] may begin, so that no request still goes by the old state.
    ///
    /// # Errors
    /// When too many older cuts still drain, or another version of this disk is on its way out.
    pub fn begin_retire(&self, disk: &Disk, version: &Version) -> Result<Epoch, RetireError> {
        let _editing = self.begin();
        let room = self.clock.room().map_err(RetireError::TooManyDraining)?;
        // Two at once would each go by a neighbour that the other takes away.
        let other = |l: &Link| l.version.is_retiring() && l.version.id != version.id;
        if disk.chain().links().iter().any(other) {
            return Err(RetireError::Busy);
        }
        version.set_retiring();
        // An epoch without a version of its own: a grace period.
        Ok(self.clock.advance(room).previous())
    }

    /// Takes a version whose blocks have been handed over out of its chain. A pivot leaves its image to the neighbour
    /// that everything was folded into. Readers that are still at an image that goes keep it open.
    pub fn finish_retire(&self, disk: &Disk, id: VersionId) {
        disk.durability_changes();
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
    /// How many blocks there are to hand over or to fold before a version can go.
    #[must_use]
    pub fn blocks_to_let_go(&self, id: VersionId) -> u64 {
        let chain = self.chain();
        chain.position(id).and_then(|i| moving_table(chain.at(i))).map_or(0, |(_, table)| table.count())
    }

    /// Does the next blocks, up to `most`, that must move before version `id` can go, at or after `from`: an entry of the
    /// version itself goes to the neighbour that reads it there; if it is the pivot, an entry of the neighbour that takes its
    /// image over is folded into that. Neighbouring blocks go together, and several such runs side by side. None when all is
    /// done.
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
    ) -> Result<Option<Copied>, String> {
        let chain = self.chain();
        let Some(retiring) = chain.position(id) else { return Ok(None) };
        let Some((_, table)) = moving_table(chain.at(retiring)) else { return Ok(None) };
        self.copy_next(from, most, |at| table.next_set(at), |run| self.let_go_of_run(queue, id, run)).await
    }

    /// The caller holds the locks of `run`.
    async fn let_go_of_run(&self, queue: &IoQueue, id: VersionId, run: BlockRange) -> Result<(), String> {
        // Only now: a cut may have come in between.
        let chain = self.chain();
        let Some(retiring) = chain.position(id) else { return Ok(()) };
        let Some((owner, table)) = moving_table(chain.at(retiring)) else { return Ok(()) };
        // A guest's write may have come before us.
        let left = those(run, |block| table.get(block));
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
        join_all(moves).await.into_iter().collect()
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
                        Ok(copied) => copied.enter(),
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
            self.copy_blocks(queue, heir.chain, part, Copy { from: retiring.index, to: heir.index }).await?.enter();
            Ok(())
        });
        join_all(copies).await.into_iter().collect()
    }

    /// Moves entries of a log into the full image below, after saving what older versions read there.
    async fn fold(&self, queue: &IoQueue, chain: &Chain, blocks: BlockRange, copy: Copy) -> Result<(), String> {
        loop {
            let saves = alike(blocks, |block| save_for_older(chain.at(copy.to), block))
                .into_iter()
                .filter_map(|(part, save)| Some((part, save?)));
            let saves: Vec<_> = saves.map(|(part, save)| self.save_for_fold(queue, chain, part, save)).collect();
            if saves.is_empty() {
                break;
            }
            join_all(saves).await.into_iter().collect::<Result<(), String>>()?;
        }
        self.copy_blocks(queue, chain, blocks, copy).await?.enter();
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
            Ok(copied) => {
                copied.enter();
                self.commit_saved(queue, chain.at(save.to)).await
            }
            Err(e) => Err(e),
        };
        let Err(reason) = saved else { return Ok(()) };
        // Those that read through it must not count on what no power cut would leave.
        chain.at(save.to).take_back(blocks);
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
        match self.copy_blocks(queue, chain, blocks, copy).await {
            Ok(copied) => copied.enter(),
            Err(reason) => {
                self.give_up(chain.at(copy.from), &reason).map_err(|e| e.to_string())?;
                self.hand_to_older(queue, chain.at(copy.from), blocks).await?;
            }
        }
        Ok(())
    }

    /// Makes durable what a version has handed over before it leaves its chain, and its layer with it.
    ///
    /// # Errors
    /// When an image refuses that the live version needs. A frozen version that cannot take it over is broken.
    pub async fn settle(&self, queue: &IoQueue, id: VersionId) -> Result<(), String> {
        let chain = self.chain();
        let Some(index) = chain.position(id) else { return Ok(()) };
        let give_up = |version, reason: &str| self.give_up(chain.at(version), reason).map_err(|e| e.to_string());
        let settling = Settling::decide(chain.at(index));
        let stored = self.flush_layers(queue, &chain, settling.stores.clone()).await;
        match (stored.map_err(|e| e.to_string()), settling.is_for_live) {
            (Ok(()), _) => {}
            (Err(reason), true) => return Err(reason),
            (Err(reason), false) => return settling.heirs.into_iter().try_for_each(|heir| give_up(heir, &reason)),
        }
        let mut lost = None;
        for heir in settling.heirs.clone() {
            if let Err(reason) = self.commit_saved(queue, chain.at(heir)).await {
                lost = Some((heir, reason));
            }
        }
        let Some((newest, reason)) = lost else { return Ok(()) };
        let outlives = |heir| chain.layer(heir).saved_durably().is_some();
        settling.lost_with(newest, outlives).into_iter().try_for_each(|heir| give_up(heir, &reason))
    }
}

/// What is made durable before a version leaves its chain, whose blocks have been handed over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settling {
    /// The layers that are stored first, in order from the pivot on.
    pub stores: Range<VersionIndex>,
    /// Whether the live version reads those. Otherwise only the heirs are to read them, and are lost if they cannot be stored.
    pub is_for_live: bool,
    /// The older versions that were handed blocks, or read them through one that was: their entries are stored after that.
    pub heirs: Range<VersionIndex>,
}

impl Settling {
    /// What there is to do for a version.
    #[must_use]
    pub fn decide(of: VersionIn<'_>) -> Settling {
        let segment = of.segment();
        let heirs = segment.first..of.index.min(segment.pivot);
        let is_for_live = segment.last == of.chain.live();
        // What is handed to older versions below the pivot is in their layers. On the old side of a split the full image is
        // an older version's from now on, if there is one.
        let stores = match of.index >= segment.pivot {
            true if is_for_live => true,
            true => !heirs.is_empty(),
            false => false,
        };
        let stores = if stores { segment.pivot..segment.last + 1 } else { 0..0 };
        Settling { stores, is_for_live, heirs }
    }

    /// Whom it costs that the entries of heirs cannot be stored, of which `newest` is the newest. What that was handed is read
    /// by older ones through it, and no power cut would leave it. One that does not outlive a power cut has what it needs.
    #[must_use]
    pub fn lost_with(&self, newest: VersionIndex, outlives: impl Fn(VersionIndex) -> bool) -> Vec<VersionIndex> {
        self.heirs.clone().filter(|&heir| heir == newest || heir < newest && outlives(heir)).collect()
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
