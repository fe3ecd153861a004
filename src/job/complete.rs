//! Giving a volume everything that it does not own (source 004: forced migration, figure 8).
//!
//! The table of its oldest log is the state: a job that was stopped or cut off goes on with the blocks that are left. Each
//! block is copied under its lock, many side by side, so a guest's write waits for the copy of one run of neighbours at most.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Outcome, Pace};
use crate::crash;
use crate::image::{ImageError, IoQueue};
use crate::mirror::planted::{self, Defect};
use crate::mirror::{Backing, Disk, Filled};
use crate::store::{BlockIndex, DurableTable};

/// Blocks that are copied side by side.
const SIDE_BY_SIDE: usize = 32;

/// After this many bytes the log is made durable, so that a power cut does not begin everything again.
const CHECKPOINT_BYTES: u64 = 1 << 30;

/// Copies to a volume's oldest log what it lacks, and makes it durable. What it stands on can leave its chain then
/// ([`crate::mirror::ChainEditor::make_independent`]). All that the volume has counts as done.
///
/// # Errors
/// When a block cannot be read or written, or the log cannot be stored. What was copied stays; begin again when it can be.
pub async fn complete(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, String> {
    pace.total_bytes.store(disk.geometry().size_bytes, Ordering::Relaxed);
    fill(queue, disk, pace).await
}

/// The same after the volume was put on another snapshot ([`crate::mirror::ChainEditor::move_base`]): what it has kept is not
/// counted. `total` has what there was to do when it was begun, 0 if that is not known any more.
///
/// # Errors
/// As [`complete`].
pub async fn update(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, String> {
    pace.total_bytes.fetch_max(disk.bytes_to_fill(), Ordering::Relaxed);
    fill(queue, disk, pace).await
}

/// Makes durable what a volume keeps that is put on another snapshot: `table` points to it in `image`.
///
/// # Errors
/// When either cannot be stored.
pub async fn store_kept(queue: &IoQueue, table: &DurableTable, image: &Backing) -> Result<(), ImageError> {
    if planted::is(Defect::KeptBeforeBytes) {
        return table.commit(queue).await;
    }
    // What was copied just before may not be there yet.
    table.commit_after(queue, || image.sync(queue)).await
}

async fn fill(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, String> {
    let block_bytes = u64::from(disk.geometry().block_bytes);
    // Of a volume that was written already, or a job that goes on, some is there.
    let total = pace.total_bytes.load(Ordering::Relaxed);
    pace.done_bytes.store(total.saturating_sub(disk.bytes_to_fill()), Ordering::Relaxed);
    let lane = disk.clock().lane();
    let (mut at, mut since_checkpoint) = (BlockIndex(0), 0);
    loop {
        let filled = {
            // What it stands on is read, and its guest may be at work as well.
            let turn = pace.turn(&disk, SIDE_BY_SIDE).await;
            let ticket = lane.enter();
            disk.fill_some(&queue, &ticket, at, turn.blocks(block_bytes)).await?
        };
        let Some(Filled { next, bytes }) = filled else { break };
        at = next;
        crash::point("between two steps of a completion");
        if !pace.step(&queue, bytes).await {
            return Ok(Outcome::Stopped);
        }
        since_checkpoint += bytes;
        if since_checkpoint >= CHECKPOINT_BYTES {
            since_checkpoint = 0;
            disk.commit_logs(&queue).await.map_err(|e| e.to_string())?;
        }
    }
    if !planted::is(Defect::IndependentBeforeStored) {
        disk.commit_logs(&queue).await.map_err(|e| e.to_string())?;
    }
    pace.done_bytes.store(total, Ordering::Relaxed);
    Ok(Outcome::Done)
}
