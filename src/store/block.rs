//! Blocks: the unit of tables and locks.

use crate::image::ByteOffset;

/// The number of a block of a disk, from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockIndex(pub u64);

/// A run of blocks, from `start` to just before `end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockRange {
    /// The first block.
    pub start: BlockIndex,
    /// The block after the last one.
    pub end: BlockIndex,
}

impl BlockRange {
    /// The blocks that bytes `at .. at + len` touch. `len` is not 0.
    #[must_use]
    pub fn covering(at: ByteOffset, len: u64, block_bytes: u32) -> BlockRange {
        let block = u64::from(block_bytes);
        BlockRange { start: BlockIndex(at.0 / block), end: BlockIndex((at.0 + len).div_ceil(block)) }
    }

    /// One block.
    #[must_use]
    pub fn one(block: BlockIndex) -> BlockRange {
        BlockRange { start: block, end: BlockIndex(block.0 + 1) }
    }

    /// How many blocks.
    #[must_use]
    pub fn count(self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.count() == 0
    }

    /// Each block in order.
    pub fn iter(self) -> impl Iterator<Item = BlockIndex> {
        (self.start.0..self.end.0).map(BlockIndex)
    }

    /// The bytes of these blocks on a disk of `size_bytes`: position and length. The last block may be short.
    #[must_use]
    pub fn bytes(self, block_bytes: u32, size_bytes: u64) -> (ByteOffset, u64) {
        let from = self.start.0 * u64::from(block_bytes);
        let to = (self.end.0 * u64::from(block_bytes)).min(size_bytes);
        (ByteOffset(from), to.saturating_sub(from))
    }
}
