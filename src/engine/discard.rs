//! Discards: advice, so never worth a copy.
//!
//! While an older version reads through a block, a discard of it is only remembered. It is carried out when the last
//! such version has gone ([`Disk::carry_out_discard`]), unless the guest wrote the block meanwhile.

use smallvec::{SmallVec, smallvec};

use super::restoring::Restore;
use super::runs::{alike, those};
use super::{Chain, Disk, Epoch, Mode, RequestError, Ticket, VersionIn, VersionIndex};
use crate::image::{ByteOffset, IoQueue};
use crate::store::{BlockIndex, BlockRange};

/// A container is asked once in so many bytes where it has anything.
const LOOK_BYTES: u64 = 256 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nobody reads it: give the storage back.
    Now,
    /// An older version still reads it.
    Later,
    /// It would show older bytes, or is not worth anything.
    Never,
}

impl Disk {
    pub(super) async fn discard(
        &self,
        queue: &IoQueue,
        epoch: Epoch,
        at: ByteOffset,
        len: u64,
    ) -> Result<(), RequestError> {
        let geometry = self.geometry();
        let block = u64::from(geometry.block_bytes);
        let end = at.0 + len;
        // Only whole blocks (the disk's last one may be short); the rest of the range is not worth anything.
        let first = at.0.div_ceil(block);
        let last = if end == geometry.size_bytes { geometry.blocks() } else { end / block };
        let (mut next, mut looked_until) = (BlockIndex(first), first);
        while next.0 < last {
            if next.0 >= looked_until {
                looked_until = last.min(next.0 + (LOOK_BYTES / block).max(1));
                let ahead = BlockRange { start: next, end: BlockIndex(looked_until) };
                if let Some(empty) = self.without_room(epoch, ahead) {
                    next = empty.end;
                    continue;
                }
            }
            let until = BlockIndex(looked_until.min(next.0 + geometry.blocks_per_discard()));
            self.discard_part(queue, epoch, BlockRange { start: next, end: until }).await?;
            next = until;
        }
        Ok(())
    }

    /// The first of `blocks`, as far as they take no room where a discard would give it back. Nothing is to be done for them,
    /// whoever is at work on them.
    fn without_room(&self, epoch: Epoch, blocks: BlockRange) -> Option<BlockRange> {
        let chain = self.chain.load();
        let writer = chain.at(chain.at_epoch(epoch));
        let home = chain.layer(writer.segment().pivot.max(writer.index));
        let (at, len) = self.geometry().bytes(blocks);
        self.whole_blocks(blocks.start, home.image.known_zeros(at, len))
    }

    async fn discard_part(&self, queue: &IoQueue, epoch: Epoch, blocks: BlockRange) -> Result<(), RequestError> {
        // Others get at the image in between, and at the locks, which only so many can share.
        let _turn = self.discarding.take(1).await;
        let excludes = |chain: &Chain| chain.links().iter().any(|l| l.layer.image.excludes());
        let mut mode = if excludes(&self.chain()) { Mode::Exclusive } else { Mode::Shared };
        let (_guard, chain) = loop {
            let guard = self.locks.acquire(blocks, mode).await;
            let chain = self.chain();
            if let Some(gate) = chain.restore().gate() {
                drop(guard);
                gate.opened().await;
                continue;
            }
            if mode == Mode::Exclusive || !excludes(&chain) {
                break (guard, chain);
            }
            mode = Mode::Exclusive;
        };
        let writer = chain.at(chain.at_epoch(epoch));
        for (run, (fate, home)) in fates(writer, blocks) {
            match fate {
                Fate::Now => {
                    let (at, len) = self.geometry().bytes(run);
                    writer.note(run);
                    chain.layer(home).image.release(queue, at, len).await?;
                    self.discards.clear(run);
                }
                Fate::Later => match self.discards.prepare(run) {
                    Ok(()) => self.discards.set(run),
                    Err(e) => log::debug!("a discard is not remembered: {e}"),
                },
                Fate::Never => {}
            }
        }
        Ok(())
    }

    /// Carries out the first remembered discards at or after `from`: up to `most` neighbours, those that nobody's reading stands
    /// against. Returns where to go on, or None at the end.
    ///
    /// It changes what the ticket's epoch shows, as the guest's own discard would have: a snapshot taken meanwhile
    /// is not quiesced before it is done.
    ///
    /// # Errors
    /// When the image refuses.
    pub async fn carry_out_discard(
        &self,
        queue: &IoQueue,
        ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<BlockIndex>, RequestError> {
        let Some(first) = self.discards.next_set(from) else { return Ok(None) };
        let end = self.discards.next_clear(first).map_or(self.geometry().blocks(), |end| end.0);
        let most = self.geometry().blocks_per_run().min(most.max(1) as u64);
        let run = BlockRange { start: first, end: BlockIndex(end.min(first.0 + most)) };
        self.copy_runs([run], |run| self.give_back(queue, ticket, run)).await?;
        Ok(Some(run.end))
    }

    /// The caller holds the locks of `blocks`.
    async fn give_back(&self, queue: &IoQueue, ticket: &Ticket, blocks: BlockRange) -> Result<(), RequestError> {
        let chain = self.chain();
        if !matches!(chain.restore(), Restore::None) {
            return Ok(()); // What was discarded before may be wanted again.
        }
        let writer = chain.at(chain.at_epoch(ticket.epoch()));
        let pivot = writer.segment().pivot;
        if pivot < writer.index {
            return Ok(());
        }
        let is_due = |block| self.discards.get(block) && fate(writer, block) == (Fate::Now, pivot);
        for run in those(blocks, is_due) {
            let (at, len) = self.geometry().bytes(run);
            writer.note(run);
            chain.layer(pivot).image.release(queue, at, len).await?;
            self.discards.clear(run);
        }
        Ok(())
    }
}

/// What becomes of each of some blocks, as [`fate`] says it.
fn fates(writer: VersionIn<'_>, blocks: BlockRange) -> SmallVec<[(BlockRange, (Fate, VersionIndex)); 1]> {
    match writer.chain.live() == 0 && writer.chain.restoring().is_none() {
        true => smallvec![(blocks, fate(writer, blocks.start))],
        false => alike(blocks, |block| fate(writer, block)),
    }
}

/// What becomes of a discard of version `writer`, and of whose layer it would be.
fn fate(writer: VersionIn<'_>, block: BlockIndex) -> (Fate, VersionIndex) {
    let (chain, segment) = (writer.chain, writer.segment());
    let pivot = segment.pivot;
    if writer.pending(block).is_some() {
        // It is not in the place that would be given back.
        return (Fate::Never, pivot);
    }
    if !chain.segments_after(writer.index).is_empty() {
        // It would have to be carried out on both sides of the split, to stay one content.
        return (Fate::Never, pivot);
    }
    if pivot >= writer.index {
        let is_written = || (writer.index..=segment.last).any(|i| i != pivot && chain.layer(i).owns(block));
        let fate = match writer.is_read_through(block) {
            // A newer epoch has written the block already, and guests may have read what it wrote.
            _ if is_written() || segment.last > pivot => Fate::Never,
            true => Fate::Later,
            false => Fate::Now,
        };
        return (fate, pivot);
    }
    // A log above the pivot: a hole in an owned block reads as zeros; a block it does not own is the pivot's.
    let in_own_log = writer.layer().owns(block) && writer.index == chain.live();
    (if in_own_log && !chain.folds_into(pivot) { Fate::Now } else { Fate::Never }, writer.index)
}
