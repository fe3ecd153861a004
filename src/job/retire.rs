//! Letting a frozen version go, and what was put off until it is gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::pace::Pace;
use super::step::{CopyStep, Outcome, run};
use crate::crash;
use crate::engine::{ChainEditor, Copied, Disk, Epoch, RequestError, Ticket, Version, VersionId};
use crate::image::IoQueue;
use crate::store::BlockIndex;

struct LettingGo<'a>(&'a Disk, VersionId);

impl CopyStep for LettingGo<'_> {
    type Error = String;

    async fn copy(
        &mut self,
        queue: &IoQueue,
        ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<Copied>, String> {
        self.0.let_go_of_some(queue, ticket, self.1, from, most).await
    }

    fn between_steps(&self) {
        crash::point("between two blocks of a deletion");
    }
}

struct CarryingOut<'a>(&'a Disk);

impl CopyStep for CarryingOut<'_> {
    type Error = RequestError;

    const SIDE_BY_SIDE: usize = 16;

    async fn copy(
        &mut self,
        queue: &IoQueue,
        ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<Copied>, RequestError> {
        let next = self.0.carry_out_discard(queue, ticket, from, most).await?;
        Ok(next.map(|next| Copied { next, bytes: 0 }))
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
    if pace.unless_stopped(disk.clock().drained(grace)).await.is_none() {
        return Ok(Outcome::Stopped);
    }
    // Of a job that goes on, some is done already.
    let done = pace.done_bytes.load(Ordering::Relaxed);
    let total = done + disk.blocks_to_let_go(version.id) * u64::from(disk.geometry().block_bytes);
    pace.total_bytes.store(total, Ordering::Relaxed);
    if run(&mut LettingGo(&disk, version.id), &queue, &disk, &pace).await? == Outcome::Stopped {
        return Ok(Outcome::Stopped);
    }
    crash::point("after the last block of a deletion");
    disk.settle(&queue, version.id).await?;
    editor.finish_retire(&disk, version.id);
    Ok(Outcome::Done)
}

/// Carries out the discards that were put off and that nobody's reading stands against any more.
///
/// # Errors
/// When the image refuses; the rest stays put off.
pub async fn carry_out_discards(queue: IoQueue, disk: Arc<Disk>, pace: Arc<Pace>) -> Result<Outcome, RequestError> {
    run(&mut CarryingOut(&disk), &queue, &disk, &pace).await
}
