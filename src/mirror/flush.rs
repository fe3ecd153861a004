//! Flushes: what was acknowledged becomes durable, the bytes before the entries that point to them.
//!
//! A log's table is committed to its durable copy in these steps: look at the entries, sync the images, store the
//! entries, sync them (design: Durability). Only then are places given back whose entries were deleted. Several logs are
//! looked at from the live version inwards, and stored from the pivot outwards.

use std::pin::Pin;

use super::chain::{Chain, Log, VersionIndex};
use super::join::join_all;
use super::lock::Mode;
use super::planted::{self, Defect};
use super::{Backing, Disk, Epoch, RequestError, VersionId};
use crate::image::{ImageError, IoQueue};
use crate::store::{BlockIndex, BlockRange};

/// Places that one flush gives back at most, so that it does not take long.
const RECLAIMED_MAX: usize = 64;

impl Disk {
    /// Makes durable what requests of `epoch` wrote.
    pub(super) async fn flush(&self, queue: &IoQueue, epoch: Epoch) -> Result<(), RequestError> {
        let chain = self.chain();
        // Before the commit: only what was deleted until now is deleted durably when it is done.
        let freed: Vec<_> = logs_of(&chain).map(|(index, log)| (index, some_freed(log))).collect();
        self.flush_from(queue, &chain, chain.at_epoch(epoch)).await?;
        for (index, block) in freed.into_iter().flat_map(|(index, blocks)| blocks.into_iter().map(move |b| (index, b)))
        {
            self.reclaim(queue, &chain, index, block).await;
        }
        Ok(())
    }

    /// Brings the durable tables of logs up to date, the bytes first. A background job calls it before places go that
    /// they still point to.
    ///
    /// # Errors
    /// When an image refuses.
    pub async fn commit_logs(&self, queue: &IoQueue) -> Result<(), RequestError> {
        let chain = self.chain();
        if logs_of(&chain).next().is_none() {
            return Ok(());
        }
        Ok(self.flush_layers(queue, &chain, &way(&chain, chain.live())).await?)
    }

    /// Makes durable what a version shows, if it is to outlive a power cut: one at or above the pivot, or one whose layer
    /// is saved durably. It should be quiesced, or about to be.
    ///
    /// # Errors
    /// When an image refuses.
    pub async fn make_durable(&self, queue: &IoQueue, id: VersionId) -> Result<(), String> {
        let chain = self.chain();
        let Some(index) = chain.position(id) else { return Ok(()) };
        let is_below = index < chain.pivot_of(index);
        if is_below && chain.layer(index).saved.is_none() {
            return Ok(());
        }
        let way = way(&chain, index);
        self.flush_layers(queue, &chain, &way).await.map_err(|e| e.to_string())?;
        for layer in way {
            self.commit_saved(queue, &chain, layer).await?;
        }
        Ok(())
    }

    /// Makes durable what was saved for a version, the bytes before the entries, if it is to outlive a power cut. The
    /// overwrite of what was saved comes after that. Those who ask at the same time share the syncs.
    pub(super) async fn commit_saved(&self, queue: &IoQueue, chain: &Chain, index: VersionIndex) -> Result<(), String> {
        let layer = chain.layer(index);
        let Some(saved) = &layer.saved else { return Ok(()) };
        saved.table.commit_after(queue, || layer.image.sync(queue)).await.map_err(|e| e.to_string())
    }

    /// Makes durable what a version has handed over before it leaves its chain, and its layer with it.
    ///
    /// # Errors
    /// When an image refuses that the live version needs. A frozen version that cannot take it over is broken.
    pub async fn settle(&self, queue: &IoQueue, id: VersionId) -> Result<(), String> {
        let chain = self.chain();
        let Some(index) = chain.position(id) else { return Ok(()) };
        let segment = chain.segment_of(index);
        let older = segment.first..index.min(segment.pivot);
        let layers: Vec<VersionIndex> = (segment.pivot..=segment.last).collect();
        if segment.last == chain.live() && index >= segment.pivot {
            self.flush_layers(queue, &chain, &layers).await.map_err(text)?;
        } else if index >= segment.pivot
            && !older.is_empty()
            && let Err(e) = self.flush_layers(queue, &chain, &layers).await
        {
            // Only they are to read the full image.
            return older
                .into_iter()
                .try_for_each(|version| self.give_up(&chain, version, &e.to_string()))
                .map_err(text);
        }
        for version in older {
            if let Err(reason) = self.commit_saved(queue, &chain, version).await {
                self.give_up(&chain, version, &reason).map_err(text)?;
            }
        }
        Ok(())
    }

    /// Makes durable what the live version and version `index` read: their layers, on their ways to the pivot. Takes no
    /// lock.
    pub(super) async fn flush_from(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        index: VersionIndex,
    ) -> Result<(), RequestError> {
        let live = way(chain, chain.live());
        self.flush_layers(queue, chain, &live).await?;
        // What only a version shows that still drains is not worth a guest's error.
        let rest: Vec<VersionIndex> = way(chain, index).into_iter().filter(|i| !live.contains(i)).collect();
        if let Err(e) = self.flush_layers(queue, chain, &rest).await {
            self.break_version(chain.version(index), &e.to_string());
            self.break_readers_of_failed(queue, chain, &rest).await;
        }
        Ok(())
    }

    /// Breaks every frozen version that reads in one of `layers` whose image cannot be synced: nobody knows what it has
    /// on stable storage, whoever's bytes they are.
    async fn break_readers_of_failed(&self, queue: &IoQueue, chain: &Chain, layers: &[VersionIndex]) {
        for &layer in layers {
            // An image whose sync has failed once says so ever after.
            if let Err(e) = chain.layer(layer).image.sync(queue).await {
                let readers = (0..chain.live()).filter(|&version| way(chain, version).contains(&layer));
                readers.for_each(|version| self.break_version(chain.version(version), &e.to_string()));
            }
        }
    }

    /// The layers are in order from the pivot on.
    async fn flush_layers(&self, queue: &IoQueue, chain: &Chain, layers: &[VersionIndex]) -> Result<(), ImageError> {
        let images: Vec<&Backing> = layers.iter().map(|&i| &chain.layer(i).image).collect();
        let logs: Vec<&Log> = layers.iter().filter_map(|&i| chain.layer(i).log.as_deref()).collect();
        commit(queue, &images, &logs).await
    }

    /// Whether some bytes of the live version are where only a log's table says.
    pub(super) fn has_logs(&self, chain: &Chain) -> bool {
        logs_of(chain).next().is_some()
    }

    /// Gives the place of a deleted entry back, unless the block has an entry again.
    async fn reclaim(&self, queue: &IoQueue, chain: &Chain, index: VersionIndex, block: BlockIndex) {
        let Some(log) = &chain.layer(index).log else { return };
        let one = BlockRange::one(block);
        let _guard = self.locks.acquire(one, Mode::Exclusive).await;
        log.freed.clear(one);
        if log.table.table().get(block) && !planted::is(Defect::ReclaimBlindly) {
            return;
        }
        let (at, len) = self.geometry.bytes(one);
        if let Err(e) = chain.layer(index).image.release(queue, at, len).await {
            log::warn!("the space of superseded blocks is not given back: {e}");
        }
    }
}

/// Commits logs, the last one being the farthest from the pivot, after syncing the images.
///
/// A write to one log deletes entries of those that are farther out. So each log is looked at before those nearer to the
/// pivot, and stored when they are: no deletion is durable before the entry that it makes way for.
fn commit<'a>(
    queue: &'a IoQueue,
    images: &'a [&'a Backing],
    logs: &'a [&'a Log],
) -> Pin<Box<dyn Future<Output = Result<(), ImageError>> + 'a>> {
    Box::pin(async move {
        match logs.split_last() {
            Some((farthest, nearer)) => farthest.table.commit_after(queue, || commit(queue, images, nearer)).await,
            None => join_all(images.iter().map(|image| image.sync(queue)).collect()).await.into_iter().collect(),
        }
    })
}

fn text(e: ImageError) -> String {
    e.to_string()
}

/// The layers that a version reads.
fn way(chain: &Chain, index: VersionIndex) -> Vec<VersionIndex> {
    let pivot = chain.pivot_of(index);
    (pivot.min(index)..=pivot.max(index)).collect()
}

fn logs_of(chain: &Chain) -> impl Iterator<Item = (VersionIndex, &Log)> {
    way(chain, chain.live()).into_iter().filter_map(|i| Some((i, chain.layer(i).log.as_deref()?)))
}

fn some_freed(log: &Log) -> Vec<BlockIndex> {
    let next = |from: Option<BlockIndex>| log.freed.next_set(from.map_or(BlockIndex(0), |b| BlockIndex(b.0 + 1)));
    std::iter::successors(next(None), |&block| next(Some(block))).take(RECLAIMED_MAX).collect()
}
