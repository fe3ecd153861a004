//! Restores in place: prepared, begun or given up, gone on with, ended (source 004).
//!
//! What always holds: from the moment on in which a restore is prepared until it is begun or given up the disk's changes
//! wait; its record is written in between.

use uuid::Uuid;

use super::engine::{Disk, Pending, locked};
use super::error::Error;
use super::spec::BaseSpec;
use crate::engine::{self, Changes, RestoreSource, Restoring, VersionId};
use crate::image::IoQueue;
use crate::store::{BlockIndex, BlockRange, DurableTable};

/// What a disk is to be restored to.
pub enum RestoreFrom {
    /// A frozen version of its own.
    Own(VersionId),
    /// A frozen version of a volume.
    Base(BaseSpec),
}

/// An independent volume, which shares no place with the disk. It may be known what both have changed since they did.
#[derive(Clone, Copy, Debug)]
pub struct Parted {
    /// The volume.
    pub volume: Uuid,
    /// The version of the volume that shows what it stood on.
    pub origin: VersionId,
    /// The version of the disk that it stood on.
    pub stood_on: VersionId,
    /// The version of the volume that is restored.
    pub restored: VersionId,
}

impl Disk {
    /// Makes durable what the live version shows: what is long is done before requests wait.
    ///
    /// # Errors
    /// When an image refuses.
    pub fn store_live(&self) -> Result<(), Error> {
        let disk = self.open().disk.clone();
        self.engine.on_ring(async move |queue| disk.store_brought_back(&queue).await)
    }

    /// Finds what differs, sets it in `blocks` durably, and holds up the disk's changes until [`Disk::begin_restore`] or
    /// [`Disk::give_restore_up`].
    ///
    /// # Errors
    /// When something cannot be stored, or what is restored is broken. Then changes go on.
    pub fn prepare_restore(
        &self,
        blocks: DurableTable,
        from: RestoreFrom,
        parted: Option<Parted>,
    ) -> Result<(), Error> {
        let open = self.open();
        let source = match from {
            RestoreFrom::Own(version) => RestoreSource::Own(version),
            RestoreFrom::Base(base) => RestoreSource::View(self.engine.view(&base)),
        };
        let volume = parted.and_then(|parted| Some((self.engine.find(parted.volume)?.disk.clone(), parted)));
        let find = |blocks: DurableTable| {
            let (of, source, volume) = (open.disk.clone(), source.clone(), volume.clone());
            self.engine.on_ring(async move |queue| -> Result<_, String> {
                let changed = || {
                    let (volume, parted) = volume?;
                    let theirs = volume.changes(parted.origin, Some(parted.restored)).ok()?;
                    let ours = of.changes(parted.stood_on, None).ok()?;
                    let is_alike = volume.geometry().block_bytes == of.geometry().block_bytes;
                    is_alike.then_some([theirs, ours])
                };
                find_pending(&of, &source, changed, &blocks, &queue).await.map(|()| blocks)
            })
        };
        // Once before requests wait: what is found again then costs little.
        let blocks = find(blocks)?;
        let closed = Some(self.engine.editor.close(&open.disk, false));
        let blocks = find(blocks)?;
        // What it could not save since it was quiesced is in no table, and would be shown as it is now. From here on nothing
        // is written that it would have to save.
        let broken = match &source {
            RestoreSource::View(view) => view.broken(),
            RestoreSource::Own(id) => {
                let chain = open.disk.chain();
                let version = chain.position(*id).map(|index| chain.version(index));
                version.map_or(Some("it is gone"), |version| version.broken()).map(str::to_owned)
            }
        };
        if let Some(why) = broken {
            return Err(Error::Broken(why));
        }
        *locked(&open.restore) = Some(Pending { blocks, source: Some(source), closed });
        Ok(())
    }

    /// Begins the restore that is prepared: what it goes back to is shown from here on, in one step.
    pub fn begin_restore(&self) {
        let prepared = locked(&self.open().restore).take();
        if let Some(Pending { blocks, source: Some(source), closed: Some(closed) }) = prepared {
            closed.begin(Restoring::new(blocks, source));
        }
    }

    /// Gives the restore up that is prepared, after its record was refused; with `is_unknown` it may be stored all the same.
    /// Then a start may take it for active, over what guests write from now on, unless its table says nothing: if it cannot
    /// be made to, every request fails.
    pub fn give_restore_up(&self, is_unknown: bool) {
        let Some(Pending { blocks, closed, .. }) = locked(&self.open().restore).take() else { return };
        let forgotten = self.engine.on_ring(async move |queue| forget_pending(&blocks, &queue).await);
        if let (true, Err(why), Some(closed)) = (is_unknown, forgotten, closed) {
            closed.lose(format!("it is not known whether a restore has begun: {why}; start the daemon anew"));
        }
    }

    /// Goes on with a restore that waits for the volume that it goes back to.
    ///
    /// # Errors
    /// Why that cannot be read.
    pub fn go_on_restoring(&self, base: &BaseSpec) -> Result<(), String> {
        let (open, view) = (self.open(), self.engine.view(base));
        if let Some(why) = view.broken() {
            return Err(why);
        }
        let waiting = locked(&open.restore).take_if(|pending| pending.source.is_none());
        if let Some(Pending { blocks, closed, .. }) = waiting {
            let closed = closed.unwrap_or_else(|| self.engine.editor.close(&open.disk, true));
            closed.begin(Restoring::new(blocks, RestoreSource::View(view)));
        }
        Ok(())
    }

    /// Every request on a disk whose restore waits for its volume fails from here on. It can still go on.
    pub fn lose_restore(&self, reason: &str) {
        let closed = locked(&self.open().restore)
            .as_mut()
            .filter(|pending| pending.source.is_none())
            .and_then(|pending| pending.closed.take());
        if let Some(closed) = closed {
            closed.lose(reason.to_owned());
        }
    }

    /// Ends a restore of which no block is pending. False if one is; nothing has changed then.
    #[must_use]
    pub fn end_restore(&self) -> bool {
        self.engine.editor.end_restore(&self.open().disk)
    }
}

/// Finds what differs and makes it durable. Changes of the disk are held up.
async fn find_pending(
    disk: &engine::Disk,
    source: &RestoreSource,
    changed: impl FnOnce() -> Option<[Changes; 2]>,
    pending: &DurableTable,
    queue: &IoQueue,
) -> Result<(), String> {
    disk.changes_passed().await;
    // What is not pending is shown as it is now, after a power cut too.
    disk.store_brought_back(queue).await.map_err(|e| e.to_string())?;
    let found = match changed() {
        Some(changed) => disk.add_changes(&changed, pending.table()),
        None => disk.find_differences(source, pending.table()),
    };
    found.map_err(|e| e.to_string())?;
    pending.commit(queue).await.map_err(|e| e.to_string())
}

/// Makes a table say nothing, whether it is believed or not.
async fn forget_pending(pending: &DurableTable, queue: &IoQueue) -> Result<(), String> {
    pending.table().clear(BlockRange { start: BlockIndex(0), end: BlockIndex(pending.table().blocks()) });
    pending.commit(queue).await.map_err(|e| e.to_string())
}
