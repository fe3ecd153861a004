//! Entries and places: what a layer has of a block, where it is, and what may be relied on where it has nothing. With its
//! *entry*, a bit of the layer's table, a block is *held*: its *place*, its own position in the layer's image, has its bytes.
//!
//! What always holds:
//! - Nobody reads the place of a block that is not held. Bytes come before their entry ([`Unheld::enter`]); an entry is
//!   deleted, and its generation tells readers, before its place changes ([`Disk::drop_entries`]).
//! - Such a block is *empty*, a hole, or *stale*, which may be anything. Above the pivot all are taken for stale: whatever comes
//!   there is written whole. Below it zeros are not written to blocks that are known to be empty ([`super::layer::Places`]).
//! - A kill comes between any two steps: bytes and entry, the entry's deletion and the emptying of the place. A take-up
//!   finds the entries as they were, and takes all other blocks for stale.
//! - A *freed* place, of a log, is given back when its entry's deletion is durable, if nothing came there since. A take-up
//!   has forgotten it; the room comes back with the log's end.

use super::runs::alike;
use super::{Backing, Chain, Disk, Log, Mode, VersionIn, VersionIndex};
use crate::image::{ByteOffset, ImageError, IoQueue};
use crate::store::{BlockIndex, BlockRange};

/// Places that one flush gives back at most, so that it does not take long.
const RECLAIMED_MAX: usize = 64;

/// Blocks that are not held, with bytes in their places, or on their way there. If it is dropped they are stale.
#[must_use = "the blocks are stale when it is dropped"]
pub(super) struct Unheld<'a> {
    of: VersionIn<'a>,
    blocks: BlockRange,
    is_settled: bool,
}

impl Unheld<'_> {
    /// The bytes are there: the blocks are held from now on.
    pub(super) fn enter(mut self) {
        self.of.enter(self.blocks);
        self.is_settled = true;
    }

    /// The places are holes now.
    fn emptied(mut self) {
        self.is_settled = true;
    }
}

impl Drop for Unheld<'_> {
    fn drop(&mut self) {
        if !self.is_settled {
            self.of.layer().places().doubt();
        }
    }
}

impl<'a> VersionIn<'a> {
    /// Says that there are bytes in these blocks' places, or will be, and no entries.
    pub(super) fn unheld(self, blocks: BlockRange) -> Unheld<'a> {
        Unheld { of: self, blocks, is_settled: false }
    }

    /// The bytes of blocks are in its layer: they are held from now on, if that has a table.
    pub(super) fn enter(self, blocks: BlockRange) {
        if let Some(table) = self.layer().table() {
            table.set(blocks);
        }
    }

    /// Blocks are not held after all, and their bytes stay where they are.
    pub(super) fn take_back(self, blocks: BlockRange) {
        self.layer().places().doubt();
        if let Some(table) = self.layer().table() {
            table.clear(blocks);
        }
    }

    /// Brings zeros to places that have no entries. They take no room.
    pub(super) async fn put_zeros(self, queue: &IoQueue, at: ByteOffset, len: u64) -> Result<(), ImageError> {
        let layer = self.layer();
        if self.is_below_pivot() && layer.places().are_empty() {
            return Ok(());
        }
        layer.image.zero(queue, at, len, true).await
    }
}

impl Disk {
    /// The bytes of blocks as far as an image has them: that of a version which was frozen before its disk grew ends earlier.
    pub(super) fn bytes_in(&self, image: &Backing, blocks: BlockRange) -> (ByteOffset, u64) {
        let (at, len) = self.geometry().bytes(blocks);
        (at, len.min(image.size_bytes().saturating_sub(at.0)))
    }

    /// Deletes entries that home has superseded and gives their space back (sources 002 [0077], [0083], [0095]; figures
    /// 16 and 23). The sources delete first; here home has the bytes first, so that no reader sees older ones.
    ///
    /// Readers that resolved to the entries find the change when they resolve again, also if the blocks have
    /// new entries by then ([`super::BlockLocks::generation`]).
    pub(super) async fn drop_entries(&self, queue: &IoQueue, of: VersionIn<'_>, blocks: BlockRange) {
        let layer = of.layer();
        debug_assert!(!layer.is_full(), "the pivot has no entries to delete");
        let unheld = of.unheld(blocks);
        if let Some(table) = layer.table() {
            table.clear(blocks);
        }
        self.locks.advance_generation(blocks);
        if let Some(log) = layer.log() {
            // Not before this is durable. If it cannot be remembered the room comes back with the log's end.
            match log.freed.prepare(blocks) {
                Ok(()) => log.freed.set(blocks),
                Err(e) => log::debug!("the space of superseded blocks is not given back: {e}"),
            }
            return;
        }
        let (at, len) = self.bytes_in(&layer.image, blocks);
        let done = match of.is_below_pivot() {
            // What is saved there later may be zeros, which are not written.
            true => layer.image.zero(queue, at, len, true).await,
            false => layer.image.release(queue, at, len).await,
        };
        match done {
            Ok(()) => unheld.emptied(),
            Err(e) => log::warn!("the space of superseded blocks is not given back: {e}"),
        }
    }

    /// Some freed places of a log: neighbours together.
    pub(super) fn some_freed(&self, index: VersionIndex, log: &Log) -> Vec<Freed> {
        let runs = self.next_runs(BlockIndex(0), RECLAIMED_MAX, |from| log.freed.next_set(from));
        runs.into_iter().map(|blocks| Freed { index, blocks, generation: self.locks.generation(blocks) }).collect()
    }

    /// Gives the places of deleted entries back, unless a block has an entry again. One that some of the blocks had meanwhile
    /// may be durable although it is deleted again: then the places wait for the next flush.
    pub(super) async fn reclaim(&self, queue: &IoQueue, chain: &Chain, place: Freed) {
        let Some(log) = chain.layer(place.index).log() else { return };
        let _guard = self.locks.acquire(place.blocks, Mode::Exclusive).await;
        let is_same = self.locks.generation(place.blocks) == place.generation;
        for (run, is_held) in alike(place.blocks, |block| log.table.table().get(block)) {
            if is_same || is_held {
                log.freed.clear(run);
            }
            if !is_same || is_held {
                continue;
            }
            let image = &chain.layer(place.index).image;
            let (at, len) = self.bytes_in(image, run);
            if let Err(e) = image.release(queue, at, len).await {
                log::warn!("the space of superseded blocks is not given back: {e}");
            }
        }
    }
}

/// Places of deleted entries, and the generation of their blocks' locks after that.
pub(super) struct Freed {
    index: VersionIndex,
    blocks: BlockRange,
    generation: u64,
}
