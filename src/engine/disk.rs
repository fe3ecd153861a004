//! A disk: its chain, its block locks, and what else all that is done with it shares.
//!
//! What always holds:
//! - Who changes blocks takes their locks first and looks at the chain second, and so sees every version that a holder of
//!   those locks before saw.
//! - Trouble with a frozen version's image breaks that version and never fails the guest's request.
//!
//! What is not done here: requests ([`super::attachment`], [`super::read`], [`super::write`]) and changes of the chain.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwap, ArcSwapOption};

use super::{
    Background, Backing, BlockLocks, Chain, Changed, Connections, EpochClock, Geometry, Layer, Link, Mark, Turn,
    Version, VersionId, VersionIn, View,
};
use crate::image::{Budget, ImageError, ImageErrorKind, ImageOp, SharedImage};
use crate::store::{Table, TableError};

/// How many parts of discards are carried out at the same time.
const DISCARDS_AT_ONCE: u64 = 2;

/// Who is told what happens to a disk's versions. Called on data-path threads: be quick.
pub trait DiskObserver: Send + Sync {
    /// A frozen version is about to be broken, and why. Whoever comes after a kill of this process must find it so.
    fn version_breaks(&self, _version: VersionId, _reason: &str) {}

    /// A frozen version was broken, and why.
    fn version_broken(&self, version: VersionId, reason: &str);
}

/// How to make a disk.
pub struct DiskOptions {
    /// The raw image with everything, the pivot.
    pub image: Backing,
    /// The block size of tables and locks, in bytes; a power of two.
    pub block_bytes: u32,
    /// Whether all changes are refused.
    pub read_only: bool,
    /// Where the table of discards to be carried out later is kept.
    pub discards: Arc<Table>,
}

/// A disk and all its versions.
pub struct Disk {
    pub(super) clock: EpochClock,
    /// The size of the live version. It only grows ([`super::grow`]).
    pub(super) size_bytes: AtomicU64,
    logical_block_bytes: u32,
    block_bytes: u32,
    pub(super) chain: ArcSwap<Chain>,
    pub(super) locks: BlockLocks,
    /// Who is connected to the live version, and who of them stays with an older one.
    pub(super) connections: Connections,
    /// Moments of which only the changes are remembered, oldest first.
    pub(super) marks: ArcSwap<Vec<Arc<Mark>>>,
    /// Blocks that a guest discarded while some version still read them.
    pub(super) discards: Arc<Table>,
    /// Turns of discards that are carried out.
    pub(super) discarding: Arc<Budget>,
    pub(super) observer: OnceLock<Arc<dyn DiskObserver>>,
    /// What a volume stands on. Other disks have no place for it, and never look.
    pub(super) base: OnceLock<ArcSwapOption<View>>,
    pub(super) background: Arc<Background>,
    read_only: bool,
    /// How many changes of what outlives a power cut are not recorded yet.
    unrecorded: AtomicUsize,
}

impl Disk {
    /// A disk whose only version began at `began`.
    #[must_use]
    pub fn new(clock: EpochClock, options: DiskOptions) -> Arc<Disk> {
        let version = Version::new(uuid::Uuid::new_v4(), super::Epoch(0));
        let layer = Layer::full(options.image.clone());
        Disk::with_chain(clock, options, vec![Link { version, layer, splits: false }])
    }

    /// A disk on one raw image with 4 KiB blocks, of which nothing is remembered: for programs that only serve.
    ///
    /// # Errors
    /// When address space runs out.
    pub fn plain(clock: EpochClock, image: SharedImage, read_only: bool) -> Result<Arc<Disk>, TableError> {
        let block_bytes = image.alignment().offset_bytes.max(4096);
        let discards = Disk::table_in_memory(image.size_bytes(), block_bytes)?;
        Ok(Disk::new(
            clock,
            DiskOptions { image: Backing::One(image), block_bytes, read_only, discards: Arc::new(discards) },
        ))
    }

    /// A disk with the versions that it had before, oldest first.
    #[must_use]
    pub fn with_chain(clock: EpochClock, options: DiskOptions, links: Vec<Link>) -> Arc<Disk> {
        Disk::announcing(None, clock, options, links)
    }

    /// The same, with logical blocks of this size.
    #[must_use]
    pub fn announcing(
        logical_block_bytes: Option<u32>,
        clock: EpochClock,
        options: DiskOptions,
        links: Vec<Link>,
    ) -> Arc<Disk> {
        let mut geometry = Geometry::of(&options.image, options.block_bytes);
        geometry.logical_block_bytes = logical_block_bytes.unwrap_or(geometry.logical_block_bytes);
        let clock = clock.of_disk();
        let base = match options.image {
            Backing::View(view) => {
                view.read_by(&clock);
                OnceLock::from(ArcSwapOption::from(Some(view)))
            }
            Backing::One(_) | Backing::Pair(_) | Backing::Packed(_) => OnceLock::new(),
        };
        Arc::new(Disk {
            connections: Connections::new(clock.clone()),
            clock,
            size_bytes: AtomicU64::new(geometry.size_bytes),
            logical_block_bytes: geometry.logical_block_bytes,
            block_bytes: geometry.block_bytes,
            chain: ArcSwap::from_pointee(Chain::new(links)),
            locks: BlockLocks::new(),
            marks: ArcSwap::default(),
            discards: options.discards,
            discarding: Budget::new(DISCARDS_AT_ONCE),
            observer: OnceLock::new(),
            base,
            background: Arc::default(),
            read_only: options.read_only,
            unrecorded: AtomicUsize::new(0),
        })
    }

    /// What outlives a power cut is about to change, and the records do not say so yet: until they do
    /// ([`Disk::durability_recorded`]) nothing is said to.
    pub fn durability_changes(&self) {
        self.unrecorded.fetch_add(1, Ordering::SeqCst);
    }

    /// The records say what has changed.
    pub fn durability_recorded(&self) {
        self.unrecorded.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether what a version shows is to outlive a power cut: what it reads through, up to the full image, must, and what
    /// the disk stands on.
    #[must_use]
    pub fn shown_outlives_power_cut(&self, of: VersionIn<'_>) -> bool {
        let is_saved = |newer| of.chain.layer(newer).saved_durably().is_some();
        self.unrecorded.load(Ordering::SeqCst) == 0
            && (of.index..of.segment().pivot).all(is_saved)
            && self.base().is_none_or(|view| view.outlives_power_cut())
    }

    /// A new volume: what it stands on is its oldest version, and has everything; `live` is an empty log for what is
    /// written to it.
    #[must_use]
    pub fn volume(clock: EpochClock, options: DiskOptions, origin: VersionId, live: (VersionId, Layer)) -> Arc<Disk> {
        Disk::noting_volume(clock, options, origin, live, None)
    }

    /// The same, when it is noted what is written to it.
    #[must_use]
    pub fn noting_volume(
        clock: EpochClock,
        options: DiskOptions,
        origin: VersionId,
        live: (VersionId, Layer),
        changed: Option<Arc<Table>>,
    ) -> Arc<Disk> {
        let version = Version::new(origin, super::Epoch(0));
        version.set_quiesced();
        let origin = Link { version, layer: Layer::full(options.image.clone()), splits: false };
        // No request on it can be older.
        let version = Version::noting(live.0, clock.current(), changed.map(Changed::Noted));
        let live = Link { version, layer: live.1, splits: false };
        Disk::with_chain(clock, options, vec![origin, live])
    }

    /// An empty table that fits a disk of this geometry, in memory only.
    ///
    /// # Errors
    /// When address space runs out.
    pub fn table_in_memory(size_bytes: u64, block_bytes: u32) -> Result<Table, TableError> {
        Table::in_memory(size_bytes.div_ceil(u64::from(block_bytes)))
    }

    /// Names who is told about broken versions. The first call counts.
    pub fn observe(&self, observer: Arc<dyn DiskObserver>) {
        if self.observer.set(observer).is_err() {
            log::debug!("a disk's observer is named once");
        }
    }

    /// The clock that this disk's requests go by.
    #[must_use]
    pub fn clock(&self) -> &EpochClock {
        &self.clock
    }

    /// Size and block sizes of the live version, at this moment.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes.load(Ordering::SeqCst),
            logical_block_bytes: self.logical_block_bytes,
            block_bytes: self.block_bytes,
        }
    }

    /// The size of a version in bytes: what it was when it was frozen, or that of the live one.
    #[must_use]
    pub fn size_of(&self, version: VersionId) -> u64 {
        let (chain, live) = (self.chain(), self.geometry().size_bytes);
        chain.position(version).map_or(live, |index| chain.version(index).size_within(live))
    }

    /// Whether all changes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What it stands on, if it is a volume that is not independent.
    #[must_use]
    pub fn base(&self) -> Option<Arc<View>> {
        self.base.get()?.load_full()
    }

    /// Why what it stands on cannot be read, if so. Then nothing of the volume is vouched for.
    #[must_use]
    pub fn base_broken(&self) -> Option<String> {
        self.base.get()?.load().as_ref()?.broken()
    }

    /// The connections to the live version.
    #[must_use]
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// The versions of this moment.
    #[must_use]
    pub fn chain(&self) -> Arc<Chain> {
        self.chain.load_full()
    }

    /// The table of discards that wait for a version to go.
    #[must_use]
    pub fn discards(&self) -> &Table {
        &self.discards
    }

    /// Breaks a frozen version and says so once.
    pub fn break_version(&self, version: &Version, reason: &str) {
        let chain = self.chain();
        // All of this first: a daemon that is killed now must not find the version whole.
        let marks = version.broken().is_none();
        if let Some(observer) = self.observer.get().filter(|_| marks) {
            observer.version_breaks(version.id, reason);
        }
        if let Some(layer) = chain.position(version.id).map(|i| chain.layer(i)) {
            if let Some(table) = layer.table() {
                table.mark_broken();
            }
            if let Some(saved) = layer.saved_durably().filter(|_| version.broken().is_none())
                && let Err(e) = (saved.revoke)()
            {
                log::error!("a power cut before this is recorded would show a snapshot as whole that is broken: {e}");
            }
        }
        if version.set_broken(reason) {
            log::error!("a snapshot is broken: {reason}");
            if let Some(observer) = self.observer.get() {
                observer.version_broken(version.id, reason);
            }
        }
    }
}

impl Disk {
    /// Breaks a version that cannot keep what is about to be overwritten. That it is broken is durable before it is so, if
    /// the version is one that would be believed after a power cut; if that cannot be had the overwrite must not be made.
    pub(super) fn give_up(&self, of: VersionIn<'_>, reason: &str) -> Result<(), ImageError> {
        let layer = of.layer();
        if let Some(saved) = layer.saved_durably() {
            (saved.revoke)().map_err(|e| {
                let what = format!("a snapshot cannot keep what is overwritten ({reason}), nor be given up ({e})");
                ImageError::new(ImageErrorKind::Io, ImageOp::Write, layer.image.path(), what)
            })?;
        }
        self.break_version(of.version(), reason);
        Ok(())
    }
}

impl Disk {
    /// The locks of its blocks, for copies that go below its versions.
    #[must_use]
    pub fn block_locks(&self) -> &BlockLocks {
        &self.locks
    }

    /// Its guest, and who has to yield to it.
    #[must_use]
    pub fn background(&self) -> &Arc<Background> {
        &self.background
    }

    /// Waits for a turn on this disk and on all that it stands on: whoever reads or copies of a volume has I/O in flight
    /// there as well. As [`Background::turn`].
    pub async fn background_turn(&self, most: u64, least: u64) -> Turn {
        let mut turn = self.background.turn(most, least).await;
        let mut base = self.base();
        while let Some((disk, _)) = base.as_deref().and_then(View::frozen) {
            let below = disk.base();
            turn.extend_to(&disk.background().clone(), least).await;
            base = below;
        }
        turn
    }

    /// Whether background work on this disk has to wait for turns: its guest is active, or that of what it stands on.
    pub(super) fn yields(&self) -> bool {
        let mut base = self.base();
        let mut yields = self.background.is_bounded();
        while let Some((disk, _)) = base.as_deref().and_then(View::frozen).filter(|_| !yields) {
            yields = disk.background().is_bounded();
            base = disk.base();
        }
        yields
    }
}
