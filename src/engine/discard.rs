//! Discards: advice, so never worth a copy.
//!
//! While an older version reads through a block, a discard of it is only remembered. It is carried out when the last
//! such version has gone ([`Disk::carry_out_discard`]), unless the guest wrote the block meanwhile.

use super::restoring::Restore;
use super::{Chain, Disk, Epoch, Mode, RequestError, Ticket, VersionIn, VersionIndex};
use crate::image::{ByteOffset, IoQueue};
use crate::store::{BlockIndex, BlockRange};

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
        let block = u64::from(self.geometry.block_bytes);
        let end = at.0 + len;
        // Only whole blocks (the disk's last one may be short); the rest of the range is not worth anything.
        let first = at.0.div_ceil(block);
        let last = if end == self.geometry.size_bytes { self.geometry.blocks() } else { end / block };
        let mut next = first;
        while next < last {
            let until = last.min(next + self.geometry.blocks_per_part());
            self.discard_part(queue, epoch, BlockRange { start: BlockIndex(next), end: BlockIndex(until) }).await?;
            next = until;
        }
        Ok(())
    }

    async fn discard_part(&self, queue: &IoQueue, epoch: Epoch, blocks: BlockRange) -> Result<(), RequestError> {
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
        let mut next = blocks.start;
        while next < blocks.end {
            let (start, (fate, home)) = (next, fate(writer, next));
            while next < blocks.end && self::fate(writer, next) == (fate, home) {
                next = BlockIndex(next.0 + 1);
            }
            let run = BlockRange { start, end: next };
            match fate {
                Fate::Now => {
                    let (at, len) = self.geometry.bytes(run);
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

    /// Carries out the first remembered discard at or after `from` that nobody's reading stands against. Returns
    /// where to go on, or None at the end.
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
    ) -> Result<Option<BlockIndex>, RequestError> {
        let Some(block) = self.discards.next_set(from) else { return Ok(None) };
        let one = BlockRange::one(block);
        let _guard = self.locks.acquire(one, Mode::Exclusive).await;
        let chain = self.chain();
        if !matches!(chain.restore(), Restore::None) {
            return Ok(Some(BlockIndex(block.0 + 1))); // What was discarded before may be wanted again.
        }
        let writer = chain.at(chain.at_epoch(ticket.epoch()));
        let pivot = writer.segment().pivot;
        let is_wanted = self.discards.get(block);
        if is_wanted && pivot >= writer.index && fate(writer, block) == (Fate::Now, pivot) {
            let (at, len) = self.geometry.bytes(one);
            writer.note(one);
            chain.layer(pivot).image.release(queue, at, len).await?;
            self.discards.clear(one);
        }
        Ok(Some(BlockIndex(block.0 + 1)))
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
