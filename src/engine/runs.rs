//! Neighbouring blocks that a background job copies together: one guard, one read and one write for all of them. On storage
//! that is limited in requests a second, a request for each block would take them from the guests.
//!
//! What always holds:
//! - A run is locked as a whole only if nobody holds or wants one of its blocks. Otherwise each block is copied under its own
//!   lock, so nobody waits longer for a contended block than for the copy of one.
//! - What is to be done with a block is looked at under the guard, as for one block: a run that was found before may have
//!   holes by then, and only what is left of it is copied.

use smallvec::SmallVec;

use super::{Disk, Mode};
use crate::image::join_all;
use crate::store::{BlockIndex, BlockRange};

/// A step of a background job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copied {
    /// Where to go on.
    pub next: BlockIndex,
    /// How many bytes are done with.
    pub bytes: u64,
}

impl Disk {
    /// The first `most` blocks, one at least, of those that `next` finds at or after a block, from `from` on: neighbours
    /// together.
    pub(super) fn next_runs(
        &self,
        from: BlockIndex,
        most: usize,
        next: impl Fn(BlockIndex) -> Option<BlockIndex>,
    ) -> Vec<BlockRange> {
        let blocks_max = self.geometry().blocks_per_run();
        let after = |block: &BlockIndex| next(BlockIndex(block.0 + 1));
        let mut runs: Vec<BlockRange> = Vec::new();
        for block in std::iter::successors(next(from), after).take(most.max(1)) {
            match runs.last_mut() {
                Some(run) if run.end == block && run.count() < blocks_max => run.end = BlockIndex(block.0 + 1),
                _ => runs.push(BlockRange::one(block)),
            }
        }
        runs
    }

    /// Does `copy` for up to `most` of the blocks that `next` finds, from `from` on: neighbours together, and several such
    /// runs side by side. None when there is none.
    ///
    /// # Errors
    /// The first one, when all have ended.
    pub(super) async fn copy_next<E, F: Future<Output = Result<(), E>>>(
        &self,
        from: BlockIndex,
        most: usize,
        next: impl Fn(BlockIndex) -> Option<BlockIndex>,
        copy: impl Fn(BlockRange) -> F,
    ) -> Result<Option<Copied>, E> {
        let runs = self.next_runs(from, most, next);
        let Some(next) = runs.last().map(|last| last.end) else { return Ok(None) };
        let bytes = runs.iter().map(|&run| self.geometry().bytes(run).1).sum();
        self.copy_runs(runs, copy).await?;
        Ok(Some(Copied { next, bytes }))
    }

    /// Does `copy` for all `runs` side by side: for a whole run under one guard, or for each of its blocks under its own.
    ///
    /// # Errors
    /// The first one, when all have ended.
    pub(super) async fn copy_runs<E, F: Future<Output = Result<(), E>>>(
        &self,
        runs: impl IntoIterator<Item = BlockRange>,
        copy: impl Fn(BlockRange) -> F,
    ) -> Result<(), E> {
        let copy = &copy;
        let copies = runs.into_iter().map(|run| async move {
            if run.count() > 1
                && let Some(_guard) = self.locks.try_exclusive(run)
            {
                return copy(run).await;
            }
            let alone = run.iter().map(|block| async move {
                let one = BlockRange::one(block);
                let _guard = self.locks.acquire(one, Mode::Exclusive).await;
                copy(one).await
            });
            join_all(alone).await.into_iter().collect()
        });
        join_all(copies).await.into_iter().collect()
    }
}

/// The runs of `blocks` for which `of` says the same.
pub(super) fn alike<T: PartialEq>(blocks: BlockRange, of: impl Fn(BlockIndex) -> T) -> SmallVec<[(BlockRange, T); 1]> {
    let mut runs: SmallVec<[(BlockRange, T); 1]> = SmallVec::new();
    for block in blocks.iter() {
        let what = of(block);
        match runs.last_mut() {
            Some((run, same)) if *same == what => run.end = BlockIndex(block.0 + 1),
            _ => runs.push((BlockRange::one(block), what)),
        }
    }
    runs
}

/// The runs of `blocks` that `is_one` picks.
pub(super) fn those(blocks: BlockRange, is_one: impl Fn(BlockIndex) -> bool) -> impl Iterator<Item = BlockRange> {
    alike(blocks, is_one).into_iter().filter(|(_, is_one)| *is_one).map(|(run, _)| run)
}
