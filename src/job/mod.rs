//! Background copying over the mirror: paced, with progress, stopped between two blocks.
//!
//! What always holds: a job locks one block at a time, so a guest's write waits for at most one block's copy; a job that
//! is stopped has done whole blocks only, and can be begun again from the start.
//!
//! What this room does not know: who asked, and what is recorded about it.

mod restore;
mod resync;

pub use restore::restore;
pub use resync::resync;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::crash;
use crate::image::IoQueue;
use crate::mirror::planted::{self, Defect};
use crate::mirror::{ChainEditor, Disk, Epoch, RequestError, Version};
use crate::store::BlockIndex;

/// A job looks this often whether its pace has changed or it should stop.
const PAUSE_SLICE: Duration = Duration::from_millis(50);

/// How fast a job goes, how far it is, and whether it should stop. Shared with whoever watches it.
#[derive(Debug, Default)]
pub struct Pace {
    /// The pause after each block, in milliseconds.
    pub delay_ms: AtomicU32,
    /// Whether to stop before the next block.
    pub stop: AtomicBool,
    /// Bytes done.
    pub done_bytes: AtomicU64,
    /// Bytes to do in all, as far as known.
    pub total_bytes: AtomicU64,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is done.
    Done,
    /// It was told to stop.
    Stopped,
}

impl Pace {
    /// Whether it should stop.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Counts a step of `bytes`, pauses as long as asked for, and says whether to go on.
    async fn step(&self, queue: &IoQueue, bytes: u64) -> bool {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
        let mut paused = Duration::ZERO;
        loop {
            if self.stop.load(Ordering::Acquire) {
                return false;
            }
            // Looked at anew in each slice: a pause of an hour can be shortened.
            let delay = Duration::from_millis(u64::from(self.delay_ms.load(Ordering::Relaxed)));
            let Some(left) = delay.checked_sub(paused).filter(|left| !left.is_zero()) else { return true };
            let slice = left.min(PAUSE_SLICE);
            drop(queue.sleep(slice).await);
            paused += slice;
        }
    }
}

/// Lets a frozen version go: waits until nobody goes by the old state (`grace`), hands its blocks to the neighbour that
/// reads through it, and takes it out of its chain. Its image may be removed afterwards.
///
/// The version must be retiring ([`ChainEditor::begin_retire`]).
///
/// # Errors
/// When a block cannot be moved to where the live version needs it; begin again when that can be done.
pub async fn retire(
    queue: IoQueue,
    editor: Arc<ChainEditor>,
    disk: Arc<Disk>,
    version: Arc<Version>,
    grace: Epoch,
    pace: Arc<Pace>,
) -> Result<Outcome, String> {
    if !planted::is(Defect::FoldWithoutGrace) {
        disk.clock().drained(grace).await;
    }
    let block_bytes = u64::from(disk.geometry().block_bytes);
    // Of a job that goes on, some is done already.
    let done = pace.done_bytes.load(Ordering::Relaxed);
    pace.total_bytes.store(done + disk.blocks_to_let_go(version.id) * block_bytes, Ordering::Relaxed);
    let lane = disk.clock().lane();
    let mut at = BlockIndex(0);
    loop {
        let next = {
            let ticket = lane.enter();
            disk.let_go_of_next(&queue, &ticket, version.id, at).await?
        };
        let Some(next) = next else { break };
        at = next;
        crash::point("between two blocks of a deletion");
        if !pace.step(&queue, block_bytes).await {
            return Ok(Outcome::Stopped);
        }
    }
    crash::point("after the last block of a deletion");
    if !planted::is(Defect::GoneBeforeCommit) {
        disk.settle(&queue, version.id).await?;
    }
    editor.finish_retire(&disk, version.id);
    Ok(Outcome::Done)
}

/// Carries out the discards that were put off and that nobody's reading stands against any more.
///
/// # Errors
/// When the image refuses; the rest stays put off.
pub async fn carry_out_discards(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, RequestError> {
    let lane = disk.clock().lane();
    let mut at = BlockIndex(0);
    loop {
        let next = {
            let ticket = lane.enter();
            disk.carry_out_discard(&queue, &ticket, at).await?
        };
        let Some(next) = next else { return Ok(Outcome::Done) };
        at = next;
        if !pace.step(&queue, 0).await {
            return Ok(Outcome::Stopped);
        }
    }
}
