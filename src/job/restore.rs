//! Bringing back what a restore in place still shows of an older version (source 004), a few blocks at a time.
//!
//! The table of pending blocks is the state: a job that was stopped or cut off goes on with the blocks that are left.

use std::sync::Arc;

use super::pace::Pace;
use super::step::{CopyStep, Outcome, run};
use crate::crash;
use crate::engine::{Copied, Disk, RequestError, Ticket};
use crate::image::IoQueue;
use crate::store::BlockIndex;

struct BringingBack<'a>(&'a Disk);

impl CopyStep for BringingBack<'_> {
    type Error = RequestError;

    const CHECKPOINT_BYTES: u64 = 256 << 20;

    async fn copy(
        &mut self,
        queue: &IoQueue,
        ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<Copied>, RequestError> {
        self.0.bring_back_some(queue, ticket, from, most).await
    }

    async fn store(&mut self, queue: &IoQueue) -> Result<(), RequestError> {
        self.0.store_brought_back(queue).await
    }

    fn left_bytes(&self) -> Option<u64> {
        Some(self.0.blocks_to_bring_back() * u64::from(self.0.geometry().block_bytes))
    }

    fn between_steps(&self) {
        crash::point("between two blocks of a restore");
    }
}

/// Brings all pending blocks back and makes them durable. The restore can be ended then.
///
/// # Errors
/// When what is restored cannot be read or the disk not be written. What was brought back stays; begin again for the rest.
pub async fn restore(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, RequestError> {
    let mut step = BringingBack(&disk);
    if run(&mut step, &queue, &disk, &pace).await? == Outcome::Stopped {
        return Ok(Outcome::Stopped);
    }
    step.store(&queue).await?;
    crash::point("after the last block of a restore");
    Ok(Outcome::Done)
}
