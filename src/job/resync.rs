//! Making the second leg of a mirror equal to the first again (source 002 [0062]: the copy of RAID-1).
//!
//! The bitmap of the pair is the state: a copy that was stopped or cut off goes on with the regions that are left. A
//! block is copied under its own lock, a few side by side, so a guest's write waits for at most one block's copy.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Outcome, Pace};
use crate::image::IoQueue;
use crate::mirror::{CopyCursor, Disk, Pair, PairError};

/// Blocks that are copied side by side.
const SIDE_BY_SIDE: u64 = 8;

/// After this many bytes the legs are synced and what was copied is struck off the bitmap.
const CHECKPOINT_BYTES: u64 = 256 << 20;

/// Copies to the leg of `pair` that is being resynchronised what it lacks, and says that it is in sync.
///
/// # Errors
/// When the leg is dropped meanwhile, the other one cannot be read, or the bitmap cannot be stored.
pub async fn resync(queue: IoQueue, disk: Arc<Disk>, pair: Arc<Pair>, pace: Arc<Pace>) -> Result<Outcome, PairError> {
    let left = pair.status().iter().map(|leg| leg.left_bytes).sum();
    pace.total_bytes.store(left, Ordering::Relaxed);
    let (locks, block_bytes) = (disk.block_locks(), u64::from(disk.geometry().block_bytes));
    let mut cursor = CopyCursor::default();
    loop {
        let mut since_checkpoint = 0;
        loop {
            let copied = {
                let turn = disk.background_turn(SIDE_BY_SIDE * block_bytes, block_bytes).await;
                pair.copy_some(&queue, locks, &mut cursor, turn.blocks(block_bytes)).await?
            };
            let Some(bytes) = copied else { break };
            if !pace.step(&queue, bytes).await {
                pair.clean(&queue, locks).await?;
                return Ok(Outcome::Stopped);
            }
            since_checkpoint += bytes;
            if since_checkpoint >= CHECKPOINT_BYTES {
                since_checkpoint = 0;
                pair.clean(&queue, locks).await?;
            }
        }
        if pair.finish_copy(&queue).await? {
            pair.clean(&queue, locks).await?;
            return Ok(Outcome::Done);
        }
    }
}
