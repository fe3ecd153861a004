//! The write-intent bitmap of a pair: in which regions its legs may differ.
//!
//! What always holds:
//! - The bit of a region is durable before a write to it is begun on any leg.
//! - It is cleared only when both legs have everything of that region on stable storage and no write to it is under
//!   way: whoever held a lock of its blocks has let go since, and whoever came later has marked it as recent.

use std::sync::atomic::{Ordering, fence};

use crate::engine::{BlockLocks, Mode};
use crate::image::{ImageError, ImageOp, IoQueue};
use crate::store::{BlockIndex, BlockRange, DurableTable, Table, TableError};
use crate::sync::{Mutex, lock};

/// The bits, and what is known of them in memory. All tables are of regions.
pub(super) struct Intent {
    pub(super) durable: DurableTable,
    /// Bits that are known to be durable: a write to such a region goes on at once.
    ready: Table,
    /// Regions that were written since the last cleaning looked at them.
    recent: Table,
    /// Regions that are still to be copied to the leg that is synchronised.
    pub(super) to_copy: Table,
    /// Held while bits are set or cleared, never across a wait.
    changing: Mutex<Counts>,
}

/// How often something has happened since the start.
#[derive(Default)]
struct Counts {
    asked: u64,
    cleared: u64,
    looked: u64,
}

/// Regions whose bits could be cleared.
pub(super) struct Idle {
    pub(super) regions: Vec<BlockIndex>,
    /// Where to go on.
    pub(super) next: Option<BlockIndex>,
    /// Which look this was: nobody else may have taken the note of a write away since.
    look: u64,
}

impl Intent {
    pub(super) fn new(durable: DurableTable) -> Result<Intent, TableError> {
        let table = || Table::in_memory(durable.table().blocks());
        let (ready, recent, to_copy) = (table()?, table()?, table()?);
        Ok(Intent { durable, ready, recent, to_copy, changing: Mutex::new(Counts::default()) })
    }

    pub(super) fn bits(&self) -> &Table {
        self.durable.table()
    }

    /// Makes the bits of `regions` durable before this returns. They stay while the caller holds locks of blocks there.
    pub(super) async fn mark(&self, queue: &IoQueue, regions: BlockRange) -> Result<(), ImageError> {
        let path = self.durable.image().path();
        let full = |e: std::io::Error| ImageError::from_io(ImageOp::Write, path, None, &e);
        loop {
            set_quickly(&self.recent, regions).map_err(full)?;
            // Pairs with the fence of the cleaning: it sees that the region is recent, or we see that its bit is not
            // ready.
            fence(Ordering::SeqCst);
            if regions.iter().all(|region| self.ready.get(region)) {
                return Ok(());
            }
            let cleared = self.set(regions).map_err(full)?;
            self.durable.commit(queue).await?;
            self.ready.prepare(regions).map_err(full)?;
            let counts = lock(&self.changing);
            // Who does not hold the locks may be so slow that the bits are cleared again.
            if counts.cleared == cleared {
                self.ready.set(regions);
                return Ok(());
            }
        }
    }

    /// Sets bits, not yet durably. Returns how often bits had been cleared then.
    pub(super) fn set(&self, regions: BlockRange) -> std::io::Result<u64> {
        self.bits().prepare(regions)?;
        let counts = lock(&self.changing);
        self.bits().set(regions);
        Ok(counts.cleared)
    }

    /// Says that regions are to be copied to the leg that is synchronised.
    pub(super) fn ask_for_copy(&self, regions: BlockRange) -> std::io::Result<()> {
        self.to_copy.prepare(regions)?;
        let mut counts = lock(&self.changing);
        counts.asked += 1;
        self.to_copy.set(regions);
        Ok(())
    }

    /// How often a copy was asked for until now.
    pub(super) fn asked(&self) -> u64 {
        lock(&self.changing).asked
    }

    /// Says that a region was copied, unless somebody asked for a copy since `asked`.
    pub(super) fn copied(&self, region: BlockIndex, asked: u64) {
        let now = lock(&self.changing);
        if now.asked == asked {
            self.to_copy.clear(BlockRange::one(region));
        }
    }

    /// Asks for the copy of every region whose bit is set.
    pub(super) fn ask_for_all_copies(&self) -> std::io::Result<()> {
        // Pairs with the fence of a write: it sees the new leg, or we see its bit.
        fence(Ordering::SeqCst);
        let mut at = BlockIndex(0);
        while let Some(region) = self.bits().next_set(at) {
            self.ask_for_copy(BlockRange::one(region))?;
            at = BlockIndex(region.0 + 1);
        }
        Ok(())
    }

    /// Regions from `from` on whose bits could be cleared: not to be copied any more, and not written since the last
    /// time. Those that were are remembered as not recent.
    pub(super) fn idle_regions(&self, from: BlockIndex, most: usize) -> Idle {
        let mut counts = lock(&self.changing);
        counts.looked += 1;
        let mut idle = Idle { regions: Vec::new(), next: None, look: counts.looked };
        let mut at = from;
        while let Some(region) = self.bits().next_set(at) {
            if idle.regions.len() == most {
                idle.next = Some(region);
                return idle;
            }
            if self.recent.get(region) {
                self.recent.clear(BlockRange::one(region));
            } else if !self.to_copy.get(region) {
                idle.regions.push(region);
            }
            at = BlockIndex(region.0 + 1);
        }
        idle
    }

    /// Clears the bit of a region if nobody has written to it since it was found idle in that look, which is known only
    /// if nobody has looked again. `holds` is asked where no bit can be set meanwhile.
    pub(super) fn clear_if_idle(&self, region: BlockIndex, found: &Idle, holds: impl FnOnce() -> bool) -> bool {
        let one = BlockRange::one(region);
        let mut counts = lock(&self.changing);
        self.ready.clear(one);
        fence(Ordering::SeqCst);
        let looked_again = counts.looked != found.look;
        let is_recent = self.recent.get(region);
        let clear = !looked_again && !is_recent && !self.to_copy.get(region) && holds();
        if clear {
            counts.cleared += 1;
            self.bits().clear(one);
        }
        clear
    }
}

/// Waits until everybody who holds a lock of these blocks now has let it go. Holds each for no time.
pub(super) async fn wait_for_holders(locks: &BlockLocks, blocks: BlockRange) {
    for block in blocks.iter() {
        drop(locks.acquire(BlockRange::one(block), Mode::Exclusive).await);
    }
}

/// Sets bits, and writes to memory only where they are not set already.
fn set_quickly(table: &Table, range: BlockRange) -> std::io::Result<()> {
    if !range.iter().all(|region| table.get(region)) {
        table.prepare(range)?;
        table.set(range);
    }
    Ok(())
}
