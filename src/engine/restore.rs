//! Restoring in place: the live version shows an older point in time at once, and gets its bytes block by block (source
//! 004: only what differs is copied back, and a block that is asked for goes first). [`super::restoring`] says how far it is.
//!
//! What always holds:
//! - Who changes a pending block holds its lock exclusively and writes the whole of it, filled from what is restored.
//! - That a bit went is durable after the bytes are. A flush covers both.
//! - What is restored never changes, and nothing of it goes while a block is pending: a restored disk is not frozen, and
//!   loses no version. Whoever starts a restore sees to that.
//!
//! What is not done here: copying at a pace, and remembering that a disk is being restored.

use std::sync::Arc;

use super::geometry::usize_of;
use super::restoring::Restore;
use super::runs::those;
use super::{
    Backing, ChainEditor, Changes, Copied, Disk, Gate, RequestError, RestoreSource, Restoring, Saved, Ticket,
    VersionId, VersionIn,
};
use crate::image::{AlignedBuf, IoBuf, IoQueue, join_all};
use crate::store::{BlockIndex, BlockRange, Table};

/// A disk whose changes wait for a restore to begin. Dropping it lets them go on as if nothing had been.
#[must_use = "changes go on when it is dropped"]
pub struct ClosedDisk {
    editor: Arc<ChainEditor>,
    disk: Arc<Disk>,
    gate: Arc<Gate>,
}

impl ChainEditor {
    /// Holds up the changes of a disk that is not being restored yet, so that a restore can begin; with `reads_wait` also
    /// its reads. Changes that were decided before may still be under way ([`Disk::changes_passed`]).
    pub fn close(self: &Arc<ChainEditor>, disk: &Arc<Disk>, reads_wait: bool) -> ClosedDisk {
        let gate = Arc::new(Gate::default());
        self.publish(disk, Restore::Closed { gate: gate.clone(), reads_wait });
        ClosedDisk { editor: self.clone(), disk: disk.clone(), gate }
    }

    /// Goes on with a restore that was begun before the disk was served.
    pub fn resume_restore(&self, disk: &Disk, restoring: Arc<Restoring>) {
        self.publish(disk, Restore::Active(restoring));
    }

    /// Ends a restore of which no block is pending. False if one is; nothing has changed then.
    ///
    /// That it has ended may be recorded already, so this must not panic: the job would have ended, and nobody said so.
    #[must_use]
    pub fn end_restore(&self, disk: &Disk) -> bool {
        // By the bits: the count follows them, and a guest's write may just have brought the last block back.
        let left = disk.chain().restoring().and_then(|of| of.pending().table().next_set(BlockIndex(0)));
        if let Some(left) = left {
            log::error!("a restore is not ended while {left:?} is pending");
            return false;
        }
        self.publish(disk, Restore::None);
        true
    }

    /// Has what is saved for a frozen version below the pivot outlive a power cut from now on, or no longer. What was saved before is not
    /// durable by that, and changes that were decided before go by the old state ([`Disk::changes_passed`]).
    pub fn save_durably(&self, disk: &Disk, version: VersionId, saved: Option<Arc<Saved>>) {
        let _editing = self.begin();
        let chain = disk.chain();
        let mut links = chain.links().to_vec();
        if let Some(link) = links.iter_mut().find(|link| link.version.id == version) {
            link.layer = link.layer.with_saved(saved);
        }
        disk.chain.store(Arc::new(chain.with_links(links)));
    }

    fn publish(&self, disk: &Disk, restore: Restore) {
        if let Restore::Active(restoring) = &restore
            && let RestoreSource::View(view) = restoring.source()
        {
            view.read_by(&disk.clock);
        }
        let _editing = self.begin();
        disk.chain.store(Arc::new(disk.chain().with_restore(restore)));
    }
}

impl ClosedDisk {
    /// Begins the restore: from here on pending blocks show what is restored. What was discarded before is forgotten: it
    /// may be wanted again.
    pub fn begin(self, restoring: Arc<Restoring>) {
        self.disk.discards.clear(all_of(&self.disk));
        self.editor.publish(&self.disk, Restore::Active(restoring));
    }

    /// Every request on the disk fails from here on.
    pub fn lose(self, reason: String) {
        self.editor.publish(&self.disk, Restore::Lost(reason));
    }
}

impl Drop for ClosedDisk {
    fn drop(&mut self) {
        if matches!(self.disk.chain().restore(), Restore::Closed { gate, .. } if Arc::ptr_eq(gate, &self.gate)) {
            self.editor.publish(&self.disk, Restore::None);
        }
        self.gate.open();
    }
}

impl Disk {
    pub(super) async fn wait_to_read(&self) {
        loop {
            match self.chain().restore() {
                Restore::Closed { gate, reads_wait: true } => gate.opened().await,
                _ => return,
            }
        }
    }

    /// Waits until every change that was decided before this call is carried out. Newer ones are not waited for.
    pub async fn changes_passed(&self) {
        self.locks.passed(self.geometry().blocks()).await;
    }

    /// Sets in `pending` each block that the live version has in another place than what is to be restored: the others
    /// show the same bytes already. They are noted as changed. Changes of the disk must be held up; what was found before
    /// that is found at once.
    ///
    /// # Errors
    /// When there is no room for the bits.
    pub fn find_differences(&self, source: &RestoreSource, pending: &Table) -> std::io::Result<()> {
        self.add_differences(source, pending)?;
        self.note_pending(pending);
        Ok(())
    }

    /// The same, when it is known what was changed on both sides since they were equal: for what shares no place with the
    /// disk. Changes of the disk must be held up.
    ///
    /// # Errors
    /// When there is no room for the bits.
    pub fn add_changes(&self, changed: &[Changes], pending: &Table) -> std::io::Result<()> {
        changed.iter().flat_map(Changes::runs).try_for_each(|run| pending.add(run))?;
        self.note_pending(pending);
        Ok(())
    }

    fn note_pending(&self, pending: &Table) {
        // What the live version shows there changes when the restore begins, long before the bytes do.
        let chain = self.chain();
        if chain.at(chain.live()).has_noted_all() {
            return;
        }
        let mut next = pending.next_set(BlockIndex(0));
        while let Some(start) = next {
            let end = pending.next_clear(start).unwrap_or(BlockIndex(self.geometry().blocks()));
            chain.at(chain.live()).note(BlockRange { start, end });
            next = pending.next_set(end);
        }
    }

    fn add_differences(&self, source: &RestoreSource, pending: &Table) -> std::io::Result<()> {
        let chain = self.chain();
        let mut version = match source {
            RestoreSource::Own(id) => Some(*id),
            RestoreSource::View(_) => None,
        };
        let mut above = match source {
            RestoreSource::View(view) => Some(view.clone()),
            RestoreSource::Own(_) => None,
        };
        // What volumes have themselves, down to the disk's own version that they stand on.
        while let Some(view) = above.take() {
            let Some((disk, id)) = view.frozen() else { break };
            if std::ptr::addr_eq(self, Arc::as_ptr(disk)) {
                version = Some(id);
                break;
            }
            let Some(tables) = disk.owned_above_base(id, self.geometry().block_bytes) else { break };
            tables.iter().try_for_each(|table| pending.merge(table))?;
            above = disk.base();
        }
        let live = chain.live();
        let Some(index) = version.and_then(|id| chain.position(id)) else { return add_all(self, pending) };
        let (pivot, is_split) = (chain.pivot_of(live), chain.pivot_of(index) != chain.pivot_of(live));
        if is_split {
            return add_all(self, pending); // After the split of a mirror nothing is shared.
        }
        // Both walk towards the pivot. What nobody owns on either way is in the same place.
        (index..pivot).chain(pivot.max(index) + 1..=live).try_for_each(|i| add_owned(chain.at(i), pending))
    }

    /// How many blocks are still to be brought back.
    #[must_use]
    pub fn blocks_to_bring_back(&self) -> u64 {
        self.chain().restoring().map_or(0, |restoring| restoring.pending().table().count())
    }

    /// Brings up to `most` pending blocks back, at or after `from`: neighbours together, and several such runs side by side.
    /// None when there is none. The ticket keeps the disk's versions from going meanwhile.
    ///
    /// # Errors
    /// When what is restored cannot be read, or the disk cannot be written. Those blocks are still pending then.
    pub async fn bring_back_some(
        &self,
        queue: &IoQueue,
        _ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<Copied>, RequestError> {
        let chain = self.chain();
        let Some(restoring) = chain.restoring() else { return Ok(None) };
        let pending = restoring.pending().table();
        self.copy_next(from, most, |at| pending.next_set(at), |run| self.bring_back(queue, run)).await
    }

    /// The caller holds the locks of `run`.
    async fn bring_back(&self, queue: &IoQueue, run: BlockRange) -> Result<(), RequestError> {
        let chain = self.chain();
        let Some(restoring) = chain.restoring() else { return Ok(()) };
        // A guest's write may have come before us.
        let left = those(run, |block| restoring.is_pending(block));
        let mut sources: Vec<(BlockRange, Backing)> = Vec::with_capacity(1);
        for part in left {
            match restoring.source() {
                RestoreSource::View(view) => sources.push((part, Backing::View(view.clone()))),
                RestoreSource::Own(id) => {
                    let of = chain.at(chain.restored(*id)?).owners(part);
                    sources.extend(of.map(|(part, owner)| (part, owner.layer().image.clone())));
                }
            }
        }
        let copies = sources.into_iter().map(|(part, source)| {
            let chain = &chain;
            async move {
                let (at, len) = self.geometry().bytes(part);
                let into = IoBuf::Owned(AlignedBuf::zeroed(usize_of(len)));
                let IoBuf::Owned(bytes) = source.read(queue, at, into).await? else {
                    unreachable!("a transfer gives back the buffer it was given")
                };
                self.write_blocks(queue, chain, part, bytes).await
            }
        });
        join_all(copies).await.into_iter().collect()
    }

    /// Makes durable what was brought back until now.
    ///
    /// # Errors
    /// When an image or the table refuses.
    pub async fn store_brought_back(&self, queue: &IoQueue) -> Result<(), RequestError> {
        Ok(self.flush_live(queue, &self.chain()).await?)
    }
}

fn all_of(disk: &Disk) -> BlockRange {
    BlockRange { start: BlockIndex(0), end: BlockIndex(disk.geometry().blocks()) }
}

fn add_all(disk: &Disk, pending: &Table) -> std::io::Result<()> {
    // Nobody else changes it, so the count says it.
    if pending.count() < disk.geometry().blocks() { pending.add(all_of(disk)) } else { Ok(()) }
}

/// Adds the blocks that a version has itself.
fn add_owned(of: VersionIn<'_>, pending: &Table) -> std::io::Result<()> {
    of.layer().table().map_or(Ok(()), |table| pending.merge(table))
}
