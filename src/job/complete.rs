//! Giving a volume everything that it does not own (source 004: forced migration, figure 8).
//!
//! The table of its oldest log is the state: a job that was stopped or cut off goes on with the blocks that are left. Each
//! block is copied under its lock, many side by side, so a guest's write waits for the copy of one run of neighbours at most.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::pace::Pace;
use super::step::{CopyStep, Outcome, run};
use crate::crash;
use crate::engine::{Backing, Copied, Disk, Ticket};
use crate::image::{ImageError, IoQueue};
use crate::store::{BlockIndex, DurableTable};

struct Filling<'a>(&'a Disk);

impl CopyStep for Filling<'_> {
    type Error = String;

    const CHECKPOINT_BYTES: u64 = 1 << 30;

    async fn copy(
        &mut self,
        queue: &IoQueue,
        ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<Copied>, String> {
        self.0.fill_some(queue, ticket, from, most).await
    }

    async fn store(&mut self, queue: &IoQueue) -> Result<(), String> {
        self.0.commit_logs(queue).await.map_err(|e| e.to_string())
    }

    fn between_steps(&self) {
        crash::point("between two steps of a completion");
    }
}

/// Copies to a volume's oldest log what it lacks, and makes it durable. What it stands on can leave its chain then
/// ([`crate::engine::ChainEditor::make_independent`]). All that the volume has counts as done.
///
/// # Errors
/// When a block cannot be read or written, or the log cannot be stored. What was copied stays; begin again when it can be.
pub async fn complete(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, String> {
    pace.total_bytes.store(disk.geometry().size_bytes, Ordering::Relaxed);
    fill(queue, disk, pace).await
}

/// The same after the volume was put on another snapshot ([`crate::engine::ChainEditor::move_base`]): what it has kept is not
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
    // What was copied just before may not be there yet.
    table.commit_after(queue, || image.sync(queue)).await
}

async fn fill(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, String> {
    // Of a volume that was written already, or a job that goes on, some is there.
    let total = pace.total_bytes.load(Ordering::Relaxed);
    pace.done_bytes.store(total.saturating_sub(disk.bytes_to_fill()), Ordering::Relaxed);
    let mut step = Filling(&disk);
    if run(&mut step, &queue, &disk, &pace).await? == Outcome::Stopped {
        return Ok(Outcome::Stopped);
    }
    step.store(&queue).await?;
    pace.done_bytes.store(total, Ordering::Relaxed);
    Ok(Outcome::Done)
}
