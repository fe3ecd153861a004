//! Making the second leg of a mirror equal to the first again (source 002 [0062]: the copy of RAID-1).
//!
//! The bitmap of the pair is the state: a copy that was stopped or cut off goes on with the regions that are left. A
//! block is copied under its own lock, a few side by side, so a guest's write waits for at most one block's copy.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::pace::Pace;
use super::step::{CopyStep, Outcome, run};
use crate::engine::{Copied, CopyCursor, Disk, Pair, PairError, Ticket};
use crate::image::IoQueue;
use crate::store::BlockIndex;

struct Resyncing<'a> {
    disk: &'a Disk,
    pair: &'a Pair,
    cursor: CopyCursor,
}

impl CopyStep for Resyncing<'_> {
    type Error = PairError;

    const SIDE_BY_SIDE: usize = 8;

    const CHECKPOINT_BYTES: u64 = 256 << 20;

    /// The cursor says where it goes on.
    async fn copy(
        &mut self,
        queue: &IoQueue,
        _ticket: &Ticket,
        next: BlockIndex,
        most: usize,
    ) -> Result<Option<Copied>, PairError> {
        let copied = self.pair.copy_some(queue, self.disk.block_locks(), &mut self.cursor, most).await?;
        Ok(copied.map(|bytes| Copied { next, bytes }))
    }

    /// Syncs the legs, and strikes what was copied off the bitmap.
    async fn store(&mut self, queue: &IoQueue) -> Result<(), PairError> {
        self.pair.clean(queue, self.disk.block_locks()).await.map(drop)
    }
}

/// Copies to the leg of `pair` that is being resynchronised what it lacks, and says that it is in sync.
///
/// # Errors
/// When the leg is dropped meanwhile, the other one cannot be read, or the bitmap cannot be stored.
pub async fn resync(queue: IoQueue, disk: Arc<Disk>, pair: Arc<Pair>, pace: Arc<Pace>) -> Result<Outcome, PairError> {
    let left = pair.status().iter().map(|leg| leg.left_bytes).sum();
    pace.total_bytes.store(left, Ordering::Relaxed);
    let mut step = Resyncing { disk: &disk, pair: &pair, cursor: CopyCursor::default() };
    loop {
        let outcome = run(&mut step, &queue, &disk, &pace).await?;
        if outcome == Outcome::Stopped {
            step.store(&queue).await?;
            return Ok(outcome);
        }
        if pair.finish_copy(&queue).await? {
            // The leg is in sync, and nothing may say otherwise. What stays on the bitmap is struck off later.
            if let Err(e) = step.store(&queue).await {
                log::warn!("a leg is in sync, and the bitmap still has what was copied: {e}");
            }
            return Ok(outcome);
        }
    }
}
