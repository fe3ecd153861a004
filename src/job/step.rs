//! The one loop of all background copying.
//!
//! What always holds: a step takes a turn first, before the epoch and the block locks, so that a guest at work goes first
//! ([`Disk::background_turn`]); no pause is made in one, and none is begun when the job should stop.

use std::sync::atomic::Ordering;

use super::pace::Pace;
use crate::engine::{Copied, Disk, Ticket};
use crate::image::IoQueue;
use crate::store::BlockIndex;

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is done.
    Done,
    /// It was told to stop.
    Stopped,
}

/// What a job does in each step. The blocks that are left are its state: it can be begun again from the start.
pub(super) trait CopyStep {
    type Error;

    /// The most blocks of a step, side by side.
    const SIDE_BY_SIDE: usize = 32;

    /// After this many bytes what was copied is made durable, so that a power cut does not begin everything again.
    const CHECKPOINT_BYTES: u64 = u64::MAX;

    /// Copies up to `most` blocks at or after `from`. None when none is left.
    async fn copy(
        &mut self,
        queue: &IoQueue,
        ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<Copied>, Self::Error>;

    /// Makes durable what was copied until now.
    async fn store(&mut self, _queue: &IoQueue) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The bytes that are left, if guests do a part of the work as well.
    fn left_bytes(&self) -> Option<u64> {
        None
    }

    /// Where a test kills the program.
    fn between_steps(&self) {}
}

/// Does steps until nothing is left to copy, which is not stored yet, or it is to stop.
pub(super) async fn run<S: CopyStep>(
    step: &mut S,
    queue: &IoQueue,
    disk: &Disk,
    pace: &Pace,
) -> Result<Outcome, S::Error> {
    let block_bytes = u64::from(disk.geometry().block_bytes);
    let lane = disk.clock().lane();
    let (mut at, mut since_checkpoint) = (BlockIndex(0), 0);
    loop {
        if let Some(left) = step.left_bytes() {
            pace.total_bytes.store(pace.done_bytes.load(Ordering::Relaxed) + left, Ordering::Relaxed);
        }
        let copied = {
            let turn = pace.turn(disk, S::SIDE_BY_SIDE).await;
            let ticket = lane.enter();
            step.copy(queue, &ticket, at, turn.blocks(block_bytes)).await?
        };
        let Some(Copied { next, bytes }) = copied else { return Ok(Outcome::Done) };
        at = next;
        since_checkpoint += bytes;
        if since_checkpoint >= S::CHECKPOINT_BYTES {
            since_checkpoint = 0;
            step.store(queue).await?;
        }
        step.between_steps();
        if !pace.step(queue, bytes).await {
            return Ok(Outcome::Stopped);
        }
    }
}
