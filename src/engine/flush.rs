//! Flushes: what was acknowledged becomes durable, the bytes before the entries that point to them.
//!
//! A log's table is committed to its durable copy in these steps: look at the entries, sync the images, store the
//! entries, sync them (design: Durability). Only then are places given back whose entries were deleted. Several logs are
//! looked at from the live version inwards, and stored from the pivot outwards. What has not changed since it was stored costs
//! nothing ([decision 0049](../../docs/decisions/0049-a-flush-stores-what-has-changed.md)).

use std::pin::Pin;
use std::sync::Arc;

use super::place::Freed;
use super::restoring::Restore;
use super::{Chain, Disk, Epoch, Layer, Log, RequestError, VersionId, VersionIn, VersionIndex};
use crate::image::{ImageError, IoQueue, join_all};

impl Disk {
    /// Makes durable what requests of `epoch` wrote.
    pub(super) async fn flush(&self, queue: &IoQueue, epoch: Epoch) -> Result<(), RequestError> {
        // What was brought back before the last end of the daemon is flushed too, and is not known before that.
        self.wait_to_read().await;
        let chain = self.chain();
        if let Restore::Lost(reason) = chain.restore() {
            return Err(RequestError::Broken(reason.clone()));
        }
        // Before the commit: only what was deleted until now is deleted durably when it is done.
        let freed = logs_of(&chain).filter(|(_, log)| log.freed.count() > 0);
        let freed: Vec<Freed> = freed.flat_map(|(index, log)| self.some_freed(index, log)).collect();
        self.flush_from(queue, chain.at(chain.at_epoch(epoch))).await?;
        for place in freed {
            self.reclaim(queue, &chain, place).await;
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
        if logs_of(&chain).next().is_none() && chain.restoring().is_none() {
            return Ok(());
        }
        Ok(self.flush_live(queue, &chain).await?)
    }

    /// Makes durable what a version shows, if it is to outlive a power cut: one at or above the pivot, or one whose layer
    /// is saved durably. It should be quiesced, or about to be.
    ///
    /// # Errors
    /// When an image refuses.
    pub async fn make_durable(&self, queue: &IoQueue, id: VersionId) -> Result<(), String> {
        let chain = self.chain();
        let Some(index) = chain.position(id) else { return Ok(()) };
        let of = chain.at(index);
        if of.is_below_pivot() && of.layer().saved_durably().is_none() {
            return Ok(());
        }
        self.flush_layers(queue, &chain, of.way()).await.map_err(text)?;
        for layer in of.way() {
            self.commit_saved(queue, of.other(layer)).await?;
        }
        Ok(())
    }

    /// Makes durable what was saved for a version, the bytes before the entries, if it is to outlive a power cut. The
    /// overwrite of what was saved comes after that. Those who ask at the same time share the syncs.
    pub(super) async fn commit_saved(&self, queue: &IoQueue, of: VersionIn<'_>) -> Result<(), String> {
        let layer = of.layer();
        let Some(saved) = layer.saved_durably() else { return Ok(()) };
        let bytes = async || layer.image.sync(queue).await;
        saved.table.commit_after(queue, bytes).await.map_err(|e| e.to_string())
    }

    /// Makes durable what the live version and version `of` read: their layers, on their ways to the pivot. Takes no
    /// lock.
    pub(super) async fn flush_from(&self, queue: &IoQueue, of: VersionIn<'_>) -> Result<(), RequestError> {
        let chain = of.chain;
        self.flush_live(queue, chain).await?;
        let live = chain.at(chain.live()).way();
        // What only a version shows that still drains is not worth a guest's error.
        let rest: Vec<VersionIndex> = of.way().filter(|i| !live.contains(i)).collect();
        if let Err(e) = self.flush_layers(queue, chain, rest.iter().copied()).await {
            self.break_version(of.version(), &e.to_string());
            self.break_readers_of_failed(queue, chain, &rest).await;
        }
        Ok(())
    }

    /// Makes durable what the live version shows. That a block has been brought back comes after its bytes and the entry
    /// that points to them: until then a power cut shows the block as it was restored.
    pub(super) async fn flush_live(&self, queue: &IoQueue, chain: &Chain) -> Result<(), ImageError> {
        let live = chain.at(chain.live()).way();
        let Some(restoring) = chain.restoring() else { return self.flush_layers(queue, chain, live).await };
        restoring.pending().commit_after(queue, async || self.flush_layers(queue, chain, live.clone()).await).await
    }

    /// Breaks every frozen version that reads in one of `layers` whose image cannot be synced: nobody knows what it has
    /// on stable storage, whoever's bytes they are.
    async fn break_readers_of_failed(&self, queue: &IoQueue, chain: &Chain, layers: &[VersionIndex]) {
        for &layer in layers {
            // An image whose sync has failed once says so ever after.
            if let Err(e) = chain.layer(layer).image.sync(queue).await {
                let readers = (0..chain.live()).filter(|&version| chain.at(version).way().contains(&layer));
                readers.for_each(|version| self.break_version(chain.version(version), &e.to_string()));
            }
        }
    }

    /// The layers are in order from the pivot on.
    pub(super) async fn flush_layers(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        layers: impl Iterator<Item = VersionIndex>,
    ) -> Result<(), ImageError> {
        let layers: Vec<&Layer> = layers.map(|i| chain.layer(i)).collect();
        commit(queue, &layers).await
    }

    /// Whether some bytes of the live version are where only a log's table says.
    pub(super) fn has_logs(&self, chain: &Chain) -> bool {
        logs_of(chain).next().is_some()
    }
}

/// Syncs the images of layers and commits their tables, the last one being the farthest from the pivot.
///
/// A write to one log deletes entries of those that are farther out. So each log is looked at before those nearer to the
/// pivot, and stored when they are: no deletion is durable before the entry that it makes way for. Each log has its own
/// image synced between looking and storing: a commit of a nearer one may be shared with somebody who began it for fewer
/// layers, and syncs only theirs.
///
/// What has not changed since it was stored is left out, above all quiesced logs, however many there are. That is asked when
/// the changes of those farther out have been taken: an entry that one of them makes way for is known by then.
fn commit<'a>(
    queue: &'a IoQueue,
    layers: &'a [&'a Layer],
) -> Pin<Box<dyn Future<Output = Result<(), ImageError>> + 'a>> {
    Box::pin(async move {
        let changed = layers.iter().rposition(|layer| layer.needs_storing());
        let Some((farthest, nearer)) = changed.and_then(|at| layers[..=at].split_last()) else { return Ok(()) };
        let first = async || -> Result<(), ImageError> {
            let image: Pin<Box<dyn Future<Output = Result<(), ImageError>>>> =
                Box::pin(async { if farthest.image.needs_sync() { farthest.image.sync(queue).await } else { Ok(()) } });
            join_all([image, commit(queue, nearer)]).await.into_iter().collect()
        };
        match farthest.log() {
            Some(log) => log.table.commit_after(queue, first).await,
            None => first().await,
        }
    })
}

fn text(e: ImageError) -> String {
    e.to_string()
}

fn logs_of(chain: &Chain) -> impl Iterator<Item = (VersionIndex, &Arc<Log>)> {
    chain.at(chain.live()).way().filter_map(|i| Some((i, chain.layer(i).log()?)))
}
