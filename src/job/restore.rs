//! Bringing back what a restore in place still shows of an older version (source 004), a few blocks at a time.
//!
//! The table of pending blocks is the state: a job that was stopped or cut off goes on with the blocks that are left.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Outcome, Pace};
use crate::crash;
use crate::image::IoQueue;
use crate::mirror::{Disk, RequestError};
use crate::store::BlockIndex;

/// Blocks that are brought back side by side.
const SIDE_BY_SIDE: usize = 32;

/// After this many bytes what was brought back is made durable, so that a power cut does not begin anew.
const CHECKPOINT_BYTES: u64 = 256 << 20;

/// Brings all pending blocks back and makes them durable. The restore can be ended then.
///
/// # Errors
/// When what is restored cannot be read or the disk not be written. What was brought back stays; begin again for the rest.
pub async fn restore(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, RequestError> {
    let block_bytes = u64::from(disk.geometry().block_bytes);
    let lane = disk.clock().lane();
    let (mut at, mut since_checkpoint) = (BlockIndex(0), 0);
    loop {
        // Guests bring blocks back as well.
        let left = disk.blocks_to_bring_back() * block_bytes;
        pace.total_bytes.store(pace.done_bytes.load(Ordering::Relaxed) + left, Ordering::Relaxed);
        let some = {
            let turn = pace.turn(&disk, SIDE_BY_SIDE).await;
            let ticket = lane.enter();
            disk.bring_back_some(&queue, &ticket, at, turn.blocks(block_bytes)).await?
        };
        let Some((next, blocks)) = some else { break };
        at = next;
        let bytes = blocks * block_bytes;
        since_checkpoint += bytes;
        if since_checkpoint >= CHECKPOINT_BYTES {
            since_checkpoint = 0;
            disk.store_brought_back(&queue).await?;
        }
        crash::point("between two blocks of a restore");
        if !pace.step(&queue, bytes).await {
            return Ok(Outcome::Stopped);
        }
    }
    disk.store_brought_back(&queue).await?;
    crash::point("after the last block of a restore");
    Ok(Outcome::Done)
}
