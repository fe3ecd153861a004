//! Discards: advice, so never worth a copy.
//!
//! While an older version reads through a block, a discard of it is only remembered. It is carried out when the last
//! such version has gone ([`Disk::carry_out_discard`]), unless the guest wrote the block meanwhile.

use super::chain::{Chain, Owned};
use super::lock::Mode;
use super::planted::{self, Defect};
use super::{Disk, Epoch, RequestError, Ticket};
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
        let _guard = self.locks.acquire(blocks, Mode::Shared).await;
        let chain = self.chain();
        let writer = chain.at_epoch(epoch);
        let home = if chain.pivot() >= writer { chain.pivot() } else { writer };
        let mut next = blocks.start;
        while next < blocks.end {
            let (start, fate) = (next, fate(&chain, writer, next));
            while next < blocks.end && self::fate(&chain, writer, next) == fate {
                next = BlockIndex(next.0 + 1);
            }
            let run = BlockRange { start, end: next };
            match fate {
                Fate::Now => {
                    let (at, len) = self.geometry.bytes(run);
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
        let (writer, pivot) = (chain.at_epoch(ticket.epoch()), chain.pivot());
        if self.discards.get(block) && pivot >= writer && fate(&chain, writer, block) == Fate::Now {
            let (at, len) = self.geometry.bytes(one);
            chain.layer(pivot).image.release(queue, at, len).await?;
            self.discards.clear(one);
        }
        Ok(Some(BlockIndex(block.0 + 1)))
    }
}

fn fate(chain: &Chain, writer: usize, block: BlockIndex) -> Fate {
    if planted::is(Defect::DiscardAtOnce) {
        return Fate::Now;
    }
    if chain.pivot() >= writer {
        let newer = (writer..chain.pivot()).any(|i| chain.layer(i).owns(block));
        return match chain.is_read_through(writer, block) {
            // A newer epoch has written the block already, and guests may have read what it wrote.
            _ if newer => Fate::Never,
            true => Fate::Later,
            false => Fate::Now,
        };
    }
    // A log above the pivot: a hole in an owned block reads as zeros; a block it does not own is the pivot's.
    match &chain.layer(writer).owned {
        Owned::Table(table) if table.get(block) && writer == chain.live() => Fate::Now,
        _ => Fate::Never,
    }
}
