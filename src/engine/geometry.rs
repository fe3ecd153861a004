//! Positions of a disk: its size, its blocks, and how many of them are done at once.

use super::BLOCKS_PER_GUARD_MAX;
use crate::image::ByteOffset;
use crate::store::BlockRange;

/// What a part of a request copies at most, if its blocks are not larger.
const PART_BYTES_MAX: u64 = 4 << 20;

/// What one call gives back at most: for so long a file may keep its readers waiting.
const DISCARD_BYTES_MAX: u64 = 256 << 20;

/// The most bytes of a run: a guest's write to one of its blocks may wait for the copy of all of them, which at this size
/// takes little longer than that of one.
const RUN_BYTES_MAX: u64 = 64 << 10;

/// The most blocks of a part: what is planned at once.
pub(super) const BLOCKS_PER_PART_MAX: u64 = 1024;

/// The logical blocks of a disk of which nothing else is said.
pub(super) const LOGICAL_BLOCK_BYTES: u32 = 512;

/// What frontends see of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes; a multiple of 512.
    pub size_bytes: u64,
    /// Logical block size to announce (512 or 4096). It is a property of the disk, and not of where the disk is stored.
    pub logical_block_bytes: u32,
    /// The block size of tables and locks: what discards and zeroes are best aligned to.
    pub block_bytes: u32,
}

impl Geometry {
    /// How many blocks the tables have.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.block_bytes))
    }

    /// How many blocks a part of a request may have: not too many to be planned at once, and no more bytes than can be copied
    /// in memory of our own for each request of each queue.
    #[must_use]
    pub fn blocks_per_part(&self) -> u64 {
        (PART_BYTES_MAX / u64::from(self.block_bytes)).clamp(1, BLOCKS_PER_PART_MAX)
    }

    /// How many blocks of a discard are given back at once. Nothing is copied, so it is the locks that bound it.
    #[must_use]
    pub fn blocks_per_discard(&self) -> u64 {
        (DISCARD_BYTES_MAX / u64::from(self.block_bytes)).clamp(1, BLOCKS_PER_GUARD_MAX)
    }

    /// The blocks that some bytes touch.
    #[must_use]
    pub fn covering(&self, at: ByteOffset, len: u64) -> BlockRange {
        BlockRange::covering(at, len, self.block_bytes)
    }

    /// The bytes of some blocks; the disk's last block may be short.
    #[must_use]
    pub fn bytes(&self, blocks: BlockRange) -> (ByteOffset, u64) {
        blocks.bytes(self.block_bytes, self.size_bytes)
    }

    /// How many blocks a job copies under one guard at most.
    #[must_use]
    pub fn blocks_per_run(&self) -> u64 {
        (RUN_BYTES_MAX / u64::from(self.block_bytes)).clamp(1, BLOCKS_PER_GUARD_MAX)
    }
}

pub(super) fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a request's bytes fit the address space")
}
