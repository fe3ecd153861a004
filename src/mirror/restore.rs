//! Restoring in place: the live version shows an older point in time at once, and gets its bytes block by block (source
//! 004: only what differs is copied back, and a block that is asked for goes first).
//!
//! What always holds:
//! - A block is *pending* while its bit is set: the live version shows what it is restored to, and nothing reads what the
//!   live version's own place for the block has. The bit goes when that place has the block's bytes, and never comes back.
//! - Who changes a pending block holds its lock exclusively and writes the whole of it, filled from what is restored.
//! - That a bit went is durable after the bytes are. A flush covers both.
//! - What is restored never changes, and nothing of it goes while a block is pending: a restored disk is not frozen, and
//!   loses no version. Whoever starts a restore sees to that.
//!
//! What is not done here: copying at a pace, and remembering that a disk is being restored.

use std::sync::Arc;
use std::task::{Poll, Waker};

use super::chain::{Chain, Owned, Saved, VersionId, VersionIndex};
use super::join::join_all;
use super::plan::Fill;
use super::planted::{self, Defect};
use super::read::{owners, usize_of};
use super::runs::those;
use super::{Backing, ChainEditor, Changes, Disk, RequestError, Ticket, View};
use crate::image::{AlignedBuf, IoBuf, IoQueue};
use crate::store::{BlockIndex, BlockRange, DurableTable, Table};
use crate::sync::{Mutex, lock};

/// What a live version is restored to.
#[derive(Clone)]
pub enum RestoreSource {
    /// A frozen version of the same disk.
    Own(VersionId),
    /// A frozen version of another disk.
    View(Arc<View>),
}

/// A restore under way.
pub struct Restoring {
    pending: DurableTable,
    source: RestoreSource,
}

/// How far a chain's live version is with a restore.
#[derive(Clone)]
pub(super) enum Restore {
    /// There is none.
    None,
    /// One is about to begin: changes wait, so that none is decided by what the disk was before. Reads wait too if what
    /// they would show is not known yet.
    Closed { gate: Arc<Gate>, reads_wait: bool },
    /// Pending blocks show what is restored.
    Active(Arc<Restoring>),
    /// What pending blocks should show cannot be had, and why.
    Lost(String),
}

impl Restore {
    /// Where changes wait, if they do.
    pub(super) fn gate(&self) -> Option<Arc<Gate>> {
        match self {
            Restore::Closed { gate, .. } => Some(gate.clone()),
            Restore::None | Restore::Active(_) | Restore::Lost(_) => None,
        }
    }
}

/// Where requests wait, without a lock and without a thread. Opened once.
#[derive(Default)]
pub struct Gate {
    state: Mutex<(bool, Vec<Waker>)>,
}

impl Gate {
    /// Waits until it is opened.
    pub async fn opened(&self) {
        std::future::poll_fn(|cx| {
            let mut state = lock(&self.state);
            if state.0 {
                return Poll::Ready(());
            }
            if !state.1.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.1.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    /// Lets everybody go on who waits.
    pub fn open(&self) {
        let waiting = {
            let mut state = lock(&self.state);
            state.0 = true;
            std::mem::take(&mut state.1)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Restoring {
    /// A restore to `source` of the blocks that are set in `pending`.
    #[must_use]
    pub fn new(pending: DurableTable, source: RestoreSource) -> Arc<Restoring> {
        Arc::new(Restoring { pending, source })
    }

    /// The blocks that are still to be brought back.
    #[must_use]
    pub fn pending(&self) -> &DurableTable {
        &self.pending
    }

    /// What is restored.
    #[must_use]
    pub fn source(&self) -> &RestoreSource {
        &self.source
    }

    pub(super) fn is_pending(&self, block: BlockIndex) -> bool {
        self.pending.table().get(block)
    }

    /// Where the disk's own version is that is restored.
    pub(super) fn position(&self, chain: &Chain, id: VersionId) -> Result<VersionIndex, RequestError> {
        chain.position(id).ok_or_else(|| RequestError::Broken("the snapshot that is restored is gone".to_owned()))
    }

    /// Where the rest of a block comes from that is written in part.
    pub(super) fn fill(&self, chain: &Chain, block: BlockIndex) -> Fill {
        let own = match &self.source {
            RestoreSource::View(_) => None,
            RestoreSource::Own(id) => chain.position(*id),
        };
        // A version that is gone, which nobody lets happen, is an error when the block is filled.
        own.map_or(Fill::Restored, |index| Fill::Layer(chain.resolve(index, block)))
    }
}

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

    /// Ends a restore of which no block is pending.
    ///
    /// # Panics
    /// When one is.
    pub fn end_restore(&self, disk: &Disk) {
        let left = disk.chain().restoring().map_or(0, |restoring| restoring.pending.table().count());
        assert!(left == 0, "a restore ends with {left} blocks pending");
        self.publish(disk, Restore::None);
    }

    /// Has what is saved for a frozen version outlive a power cut from now on, or no longer. What was saved before is not
    /// durable by that, and changes that were decided before go by the old state ([`Disk::changes_passed`]).
    pub fn save_durably(&self, disk: &Disk, version: VersionId, saved: Option<Arc<Saved>>) {
        let _editing = lock(&self.editing);
        let chain = disk.chain();
        let mut links = chain.links().to_vec();
        if let Some(link) = links.iter_mut().find(|link| link.version.id == version) {
            link.layer.saved = saved;
        }
        disk.chain.store(Arc::new(chain.with_links(links)));
    }

    fn publish(&self, disk: &Disk, restore: Restore) {
        let _editing = lock(&self.editing);
        disk.chain.store(Arc::new(disk.chain().with_restore(restore)));
    }
}

impl ClosedDisk {
    /// Begins the restore: from here on pending blocks show what is restored. What was discarded before is forgotten: it
    /// may be wanted again.
    pub fn begin(self, restoring: Arc<Restoring>) {
        if !planted::is(Defect::DiscardsOutliveRestore) {
            self.disk.discards.clear(all_of(&self.disk));
        }
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
    /// Why pending blocks cannot be shown, if a restore lost what it goes back to.
    #[must_use]
    pub fn restore_lost(&self) -> Option<String> {
        match self.chain().restore() {
            Restore::Lost(reason) => Some(reason.clone()),
            Restore::None | Restore::Closed { .. } | Restore::Active(_) => None,
        }
    }

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
        if !planted::is(Defect::OldPlansNotAwaited) {
            self.locks.passed(self.geometry.blocks()).await;
        }
    }

    /// Sets in `pending` each block that the live version has in another place than what is to be restored: the others
    /// show the same bytes already. They are noted as changed. Changes of the disk must be held up.
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
        for run in changed.iter().flat_map(Changes::runs) {
            pending.prepare(run)?;
            pending.set(run);
        }
        self.note_pending(pending);
        Ok(())
    }

    fn note_pending(&self, pending: &Table) {
        // What the live version shows there changes when the restore begins, long before the bytes do.
        let chain = self.chain();
        let mut next = pending.next_set(BlockIndex(0));
        while let Some(start) = next {
            let end = pending.next_clear(start).unwrap_or(BlockIndex(self.geometry.blocks()));
            if !planted::is(Defect::RestoreNotNoted) {
                chain.note(chain.live(), BlockRange { start, end });
            }
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
            if std::ptr::eq(self, &raw const **disk) {
                version = Some(id);
                break;
            }
            let of = disk.chain();
            let (Some(index), Some(base)) = (of.position(id), disk.base()) else { break };
            if disk.geometry.block_bytes != self.geometry.block_bytes || of.pivot_of(index) != 0 {
                break;
            }
            (1..=index).try_for_each(|i| add_owned(&of, i, pending))?;
            above = Some(base.clone());
        }
        let live = chain.live();
        let Some(index) = version.and_then(|id| chain.position(id)) else { return add_all(self, pending) };
        let (pivot, is_split) = (chain.pivot_of(live), chain.pivot_of(index) != chain.pivot_of(live));
        if is_split {
            return add_all(self, pending); // After the split of a mirror nothing is shared.
        }
        // Both walk towards the pivot. What nobody owns on either way is in the same place.
        (index..pivot).chain(pivot.max(index) + 1..=live).try_for_each(|i| add_owned(&chain, i, pending))
    }

    /// How many blocks are still to be brought back.
    #[must_use]
    pub fn blocks_to_bring_back(&self) -> u64 {
        self.chain().restoring().map_or(0, |restoring| restoring.pending.table().count())
    }

    /// Brings up to `most` pending blocks back, at or after `from`: neighbours together, and several such runs side by side.
    /// Returns where to go on and how many there were, or None when there is none. The ticket keeps the disk's versions from
    /// going meanwhile.
    ///
    /// # Errors
    /// When what is restored cannot be read, or the disk cannot be written. Those blocks are still pending then.
    pub async fn bring_back_some(
        &self,
        queue: &IoQueue,
        _ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<(BlockIndex, u64)>, RequestError> {
        let chain = self.chain();
        let Some(restoring) = chain.restoring() else { return Ok(None) };
        let runs = self.next_runs(from, most, |at| restoring.pending.table().next_set(at));
        let Some(next) = runs.last().map(|last| last.end) else { return Ok(None) };
        let count = runs.iter().map(|run| run.count()).sum();
        self.copy_runs(runs, |run| self.bring_back(queue, run)).await?;
        Ok(Some((next, count)))
    }

    /// The caller holds the locks of `run`.
    async fn bring_back(&self, queue: &IoQueue, run: BlockRange) -> Result<(), RequestError> {
        let chain = self.chain();
        let Some(restoring) = chain.restoring() else { return Ok(()) };
        // A guest's write may have come before us.
        let left = those(run, |block| restoring.is_pending(block) || planted::is(Defect::BroughtBackOverWritten));
        let mut sources: Vec<(BlockRange, Backing)> = Vec::with_capacity(1);
        for part in left {
            match &restoring.source {
                RestoreSource::View(view) => sources.push((part, Backing::View(view.clone()))),
                RestoreSource::Own(id) => {
                    let of = owners(&chain, restoring.position(&chain, *id)?, part);
                    sources.extend(of.map(|(part, owner)| (part, chain.layer(owner).image.clone())));
                }
            }
        }
        let copies = sources.into_iter().map(|(part, source)| {
            let chain = &chain;
            async move {
                let (at, len) = self.geometry.bytes(part);
                let into = IoBuf::Owned(AlignedBuf::zeroed(usize_of(len)));
                let IoBuf::Owned(bytes) = source.read(queue, at, into).await? else {
                    unreachable!("a transfer gives back the buffer it was given")
                };
                self.write_blocks(queue, chain, part, bytes).await
            }
        });
        join_all(copies.collect()).await.into_iter().collect()
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
    BlockRange { start: BlockIndex(0), end: BlockIndex(disk.geometry.blocks()) }
}

fn add_all(disk: &Disk, pending: &Table) -> std::io::Result<()> {
    pending.prepare(all_of(disk))?;
    pending.set(all_of(disk));
    Ok(())
}

/// Adds the blocks that a version has itself.
fn add_owned(chain: &Chain, index: VersionIndex, pending: &Table) -> std::io::Result<()> {
    let Owned::Table(table) = &chain.layer(index).owned else { return Ok(()) };
    let mut at = BlockIndex(0);
    while let Some(block) = table.next_set(at) {
        pending.prepare(BlockRange::one(block))?;
        pending.set(BlockRange::one(block));
        at = BlockIndex(block.0 + 1);
    }
    Ok(())
}
