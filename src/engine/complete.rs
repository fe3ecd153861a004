//! Making a volume independent (source 004: forced migration, figure 8): what it does not own is copied from what it
//! stands on, and then that leaves its chain.
//!
//! What always holds:
//! - Blocks go into the oldest log, above the origin: what is newer reads through it, so all versions keep their content.
//! - Blocks are copied under their locks, and looked at again under them; their bits follow their bytes. So a guest's write
//!   waits for one run of blocks at most ([`super::runs`]), and no reader sees a place that is not filled.
//! - The origin leaves only when the log owns every block. Nothing takes an entry out of that log meanwhile, unless its
//!   version is deleted; whoever completes a volume makes sure that no version of it is on its way out.

use std::sync::Arc;

use super::geometry::BLOCKS_PER_PART_MAX;
use super::runs::those;
use super::{
    Backing, Chain, ChainEditor, Changed, Copied, Copy, Disk, Layer, Link, Mark, Ticket, VersionId, VersionIndex,
};
use crate::image::{IoQueue, join_all};
use crate::store::{BlockIndex, BlockRange, Table};

/// What a volume stands on, in its chain, and the log that it is copied to.
const ORIGIN: VersionIndex = 0;
const OLDEST_LOG: VersionIndex = 1;

impl Disk {
    /// Copies up to `most` blocks, at or after `from`, that the volume does not own: neighbours together, and several such
    /// runs side by side. None when there is none.
    ///
    /// The ticket keeps what it reads from being taken away.
    ///
    /// # Errors
    /// When what it stands on cannot be read, the log cannot be written, or a version of it is being deleted. What could be
    /// copied besides is kept; it can be tried again.
    pub async fn fill_some(
        &self,
        queue: &IoQueue,
        _ticket: &Ticket,
        from: BlockIndex,
        most: usize,
    ) -> Result<Option<Copied>, String> {
        let chain = self.chain();
        let Some(table) = table_to_fill(&chain)? else { return Ok(None) };
        if let Some(filled) = table.next_clear(from).and_then(|first| self.fill_zeros(first)) {
            return Ok(Some(filled));
        }
        self.copy_next(from, most, |at| table.next_clear(at), |run| self.fill_run(queue, run)).await
    }

    /// Takes over blocks that are holes below and in the log, as far as that can be told, without moving a byte. None if the
    /// first one is none, or somebody is at work on one: nobody is made to wait for so many.
    fn fill_zeros(&self, first: BlockIndex) -> Option<Copied> {
        let end = self.geometry().blocks().min(first.0 + BLOCKS_PER_PART_MAX);
        let (at, len) = self.geometry().bytes(BlockRange { start: first, end: BlockIndex(end) });
        let run = self.whole_blocks(first, self.chain().layer(ORIGIN).image.known_zeros(at, len))?;
        let _guard = self.locks.try_exclusive(run)?;
        let chain = self.chain();
        let table = table_to_fill(&chain).ok()??;
        // What the guest wrote meanwhile is in the log, and so is what was there of an entry that is gone.
        let zeros = chain.layer(OLDEST_LOG).image.known_zeros(at, self.geometry().bytes(run).1);
        let run = self.whole_blocks(first, zeros)?;
        table.prepare(run).ok()?;
        chain.at(OLDEST_LOG).enter(run);
        Some(Copied { next: run.end, bytes: self.geometry().bytes(run).1 })
    }

    /// The blocks from `first` on that so many bytes cover; None if they do not cover one.
    pub(super) fn whole_blocks(&self, first: BlockIndex, bytes: u64) -> Option<BlockRange> {
        let geometry = self.geometry();
        let (at, _) = geometry.bytes(BlockRange::one(first));
        let end = match at.0 + bytes == geometry.size_bytes {
            true => geometry.blocks(),
            false => (at.0 + bytes) / u64::from(geometry.block_bytes),
        };
        (end > first.0).then_some(BlockRange { start: first, end: BlockIndex(end) })
    }

    /// The caller holds the locks of `run`.
    async fn fill_run(&self, queue: &IoQueue, run: BlockRange) -> Result<(), String> {
        // Only now: a guest may have written some of it, and a cut may have come in between.
        let chain = self.chain();
        let Some(table) = table_to_fill(&chain)? else { return Ok(()) };
        let left = those(run, |block| !table.get(block));
        let copies = left.map(|part| {
            let chain = &chain;
            async move {
                table.prepare(part).map_err(|e| format!("its table cannot grow: {e}"))?;
                self.copy_blocks(queue, chain, part, Copy { from: ORIGIN, to: OLDEST_LOG }).await?.enter();
                Ok(())
            }
        });
        join_all(copies).await.into_iter().collect()
    }

    /// How many blocks there are to copy before it can be independent; None if it stands on nothing.
    #[must_use]
    pub fn blocks_to_fill(&self) -> Option<u64> {
        let chain = self.chain();
        let (_, table) = oldest_log(&chain)?;
        Some(self.geometry().blocks().saturating_sub(table.count()))
    }

    /// How many bytes those are.
    #[must_use]
    pub fn bytes_to_fill(&self) -> u64 {
        let bytes = self.blocks_to_fill().unwrap_or(0) * u64::from(self.geometry().block_bytes);
        bytes.min(self.geometry().size_bytes)
    }

    /// The oldest log of a volume that stands on something: its version and its image.
    #[must_use]
    pub fn oldest_log(&self) -> Option<(VersionId, Backing)> {
        let chain = self.chain();
        oldest_log(&chain).map(|(link, _)| (link.version.id, link.layer.image.clone()))
    }
}

/// The oldest log above what a volume stands on.
fn oldest_log(chain: &Chain) -> Option<(&Link, &Arc<Table>)> {
    let [origin, oldest, ..] = chain.links() else { return None };
    match (&origin.layer.image, oldest.layer.table()) {
        (Backing::View(_), Some(table)) => Some((oldest, table)),
        _ => None,
    }
}

/// The table of the log that is to be filled; None if there is nothing that the volume stands on.
fn table_to_fill(chain: &Chain) -> Result<Option<&Arc<Table>>, String> {
    // What is handed to a newer version is looked for once; what comes into a log behind that would be lost.
    if chain.links().iter().any(|link| link.version.is_retiring()) {
        return Err("one of its snapshots is being deleted; go on with that first".to_owned());
    }
    Ok(oldest_log(chain).map(|(_, table)| table))
}

impl Chain {
    /// The same without what a volume stands on: its oldest log owns everything, and becomes the pivot. None if that is not
    /// so.
    #[must_use]
    pub fn without_origin(&self) -> Option<Chain> {
        let (_, table) = oldest_log(self)?;
        // By the bits: the count follows them, and a guest may just have written the last block.
        if table.next_clear(BlockIndex(0)).is_some() {
            return None;
        }
        let mut links = self.links()[OLDEST_LOG..].to_vec();
        links[0].layer = Layer::full(links[0].layer.image.clone());
        Some(Chain::new(links))
    }
}

impl ChainEditor {
    /// Lets a volume stand on its own: what it stands on leaves its chain. Requests that go by the old chain find the same
    /// bytes in the same places. False if its oldest log does not own everything; nothing has changed then.
    ///
    /// Everything must be durable before, and so must be that it is so.
    #[must_use]
    pub fn make_independent(&self, disk: &Disk) -> bool {
        let _editing = self.begin();
        let whole = disk.chain();
        let Some(chain) = whole.without_origin() else { return false };
        // What was written since the volume was made is still asked for.
        let origin = whole.version(ORIGIN);
        disk.remember_marks(vec![Mark {
            id: origin.id,
            began: origin.began,
            size_bytes: origin.size_within(disk.geometry().size_bytes),
            changed: None,
        }]);
        disk.chain.store(Arc::new(chain));
        if let Some(base) = disk.base.get() {
            base.store(None);
        }
        true
    }

    /// Drops what was written to a volume without snapshots, and begins anew with an empty log. Nobody may be at work on it.
    ///
    /// # Panics
    /// When it has snapshots, or stands on nothing.
    pub fn begin_anew(&self, disk: &Disk, live: VersionId, layer: Layer, changed: Changed) {
        let _editing = self.begin();
        let chain = disk.chain();
        let [origin, old] = chain.links() else { panic!("a volume with snapshots is not begun anew") };
        assert!(matches!(origin.layer.image, Backing::View(_)), "a volume that stands on nothing is not begun anew");
        let version = super::Version::noting(live, old.version.began, Some(changed));
        disk.chain.store(Arc::new(Chain::new(vec![origin.clone(), Link { version, layer, splits: false }])));
    }
}
