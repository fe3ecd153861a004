//! A disk: its chain, its block locks, and the requests on it.
//!
//! What always holds:
//! - A write takes its block locks first and looks at the chain second, so that it sees every version that a
//!   holder of those locks before it saw.
//! - A read of the live pivot takes no lock and looks at no table.
//! - Trouble with a frozen version's image breaks that version and never fails the guest's request.
//!
//! Changes of the chain itself (cut, retire) are in [`super::snapshot`].

use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwap, ArcSwapOption};

use super::chain::{Chain, Layer, Link, Owned, Version, VersionId, VersionIndex};
use super::lock::{BLOCKS_PER_GUARD_MAX, BlockLocks};
use super::planted::{self, Defect};
use super::read::usize_of;
use super::{
    Background, Backing, Changed, Connection, Connections, EpochClock, EpochLane, GuestQueue, Mark, Request,
    RequestError, Ticket, View,
};
use crate::image::{ByteOffset, GuestBuf, ImageError, ImageErrorKind, ImageOp, IoQueue, SharedImage};
use crate::store::{BlockRange, Table, TableError};

/// What a part of a request copies at most, if its blocks are not larger.
const PART_BYTES_MAX: u64 = 4 << 20;

/// What frontends see of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes; a multiple of 512.
    pub size_bytes: u64,
    /// Logical block size to announce (512 or 4096).
    pub logical_block_bytes: u32,
    /// The block size of tables and locks: what discards and zeroes are best aligned to.
    pub block_bytes: u32,
}

impl Geometry {
    /// The geometry of a disk on this image.
    #[must_use]
    pub fn of(image: &Backing, block_bytes: u32) -> Geometry {
        Geometry {
            size_bytes: image.size_bytes(),
            logical_block_bytes: image.alignment().offset_bytes.max(512),
            block_bytes,
        }
    }

    /// How many blocks the tables have.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.block_bytes))
    }

    /// How many blocks a part of a request may have: as many as one guard holds, but no more bytes than can be copied
    /// in memory of our own for each request of each queue.
    #[must_use]
    pub fn blocks_per_part(&self) -> u64 {
        (PART_BYTES_MAX / u64::from(self.block_bytes)).clamp(1, BLOCKS_PER_GUARD_MAX)
    }

    /// The blocks that some bytes touch.
    #[must_use]
    pub fn covering(&self, at: ByteOffset, len: u64) -> BlockRange {
        BlockRange::covering(at, len, self.block_bytes)
    }

    /// The bytes of some blocks; the disk's last block may be short.
    #[must_use]
    pub fn bytes(&self, blocks: BlockRange) -> (ByteOffset, u64) {
        blocks.bytes(self.block_bytes, self.size_bytes)
    }
}

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
    pub discards: Table,
}

/// A disk and all its versions.
pub struct Disk {
    pub(super) clock: EpochClock,
    pub(super) geometry: Geometry,
    pub(super) chain: ArcSwap<Chain>,
    pub(super) locks: BlockLocks,
    /// Who is connected to the live version, and who of them stays with an older one.
    pub(super) connections: Connections,
    /// Moments of which only the changes are remembered, oldest first.
    pub(super) marks: ArcSwap<Vec<Arc<Mark>>>,
    /// Blocks that a guest discarded while some version still read them.
    pub(super) discards: Arc<Table>,
    pub(super) observer: OnceLock<Arc<dyn DiskObserver>>,
    /// What a volume stands on. Other disks have no place for it, and never look.
    pub(super) base: OnceLock<ArcSwapOption<View>>,
    pub(super) background: Arc<Background>,
    read_only: bool,
}

/// What one socket serves: the live version of a disk, or a frozen one.
#[derive(Clone)]
pub struct Attachment {
    disk: Arc<Disk>,
    target: Target,
    connection: Option<Arc<Connection>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    Live,
    Frozen(VersionId),
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
        Ok(Disk::new(clock, DiskOptions { image: Backing::One(image), block_bytes, read_only, discards }))
    }

    /// A disk with the versions that it had before, oldest first.
    #[must_use]
    pub fn with_chain(clock: EpochClock, options: DiskOptions, links: Vec<Link>) -> Arc<Disk> {
        Disk::announcing(None, clock, options, links)
    }

    /// The same, for guests that have always seen these logical blocks, whatever the image has now.
    #[must_use]
    pub fn announcing(
        logical_block_bytes: Option<u32>,
        clock: EpochClock,
        options: DiskOptions,
        links: Vec<Link>,
    ) -> Arc<Disk> {
        let mut geometry = Geometry::of(&options.image, options.block_bytes);
        geometry.logical_block_bytes = logical_block_bytes.unwrap_or(geometry.logical_block_bytes);
        let base = match options.image {
            Backing::View(view) => OnceLock::from(ArcSwapOption::from(Some(view))),
            Backing::One(_) | Backing::Pair(_) => OnceLock::new(),
        };
        Arc::new(Disk {
            connections: Connections::new(clock.clone()),
            clock,
            geometry,
            chain: ArcSwap::from_pointee(Chain::new(links)),
            locks: BlockLocks::new(),
            marks: ArcSwap::default(),
            discards: Arc::new(options.discards),
            observer: OnceLock::new(),
            base,
            background: Arc::default(),
            read_only: options.read_only,
        })
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

    /// Size and block sizes.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
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

    /// The live version (VLUN B), to be served.
    #[must_use]
    pub fn attach_live(self: &Arc<Disk>) -> Attachment {
        Attachment { disk: self.clone(), target: Target::Live, connection: None }
    }

    /// A frozen version (VLUN A), to be served read-only. It should be quiesced.
    #[must_use]
    pub fn attach_frozen(self: &Arc<Disk>, version: VersionId) -> Attachment {
        Attachment { disk: self.clone(), target: Target::Frozen(version), connection: None }
    }

    /// Breaks a frozen version and says so once.
    pub fn break_version(&self, version: &Version, reason: &str) {
        let chain = self.chain();
        // All of this first: a daemon that is killed now must not find the version whole.
        let marks = version.broken().is_none() && !planted::is(Defect::BrokenNotMarked);
        if let Some(observer) = self.observer.get().filter(|_| marks) {
            observer.version_breaks(version.id, reason);
        }
        if let Some(layer) = chain.position(version.id).map(|i| chain.layer(i)) {
            if let Owned::Table(table) = &layer.owned
                && !planted::is(Defect::BrokenNotMarked)
            {
                table.mark_broken();
            }
            if let Some(saved) = layer.saved.as_ref().filter(|_| version.broken().is_none())
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
    pub(super) fn give_up(&self, chain: &Chain, index: VersionIndex, reason: &str) -> Result<(), ImageError> {
        let layer = chain.layer(index);
        if let Some(saved) = layer.saved.as_ref().filter(|_| !planted::is(Defect::GivenUpInMemory)) {
            (saved.revoke)().map_err(|e| {
                let what = format!("a snapshot cannot keep what is overwritten ({reason}), nor be given up ({e})");
                ImageError::new(ImageErrorKind::Io, ImageOp::Write, layer.image.path(), what)
            })?;
        }
        self.break_version(chain.version(index), reason);
        Ok(())
    }
}

impl Attachment {
    /// The disk behind it.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Size and block sizes.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.disk.geometry
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.disk.read_only || self.target != Target::Live
    }

    /// The same for one frontend's connection, which ends when this and all its clones and lanes are gone. A frozen
    /// version does not ask who reads it.
    #[must_use]
    pub fn connect(&self) -> Attachment {
        let connection = (self.target == Target::Live).then(|| self.disk.connections.join());
        Attachment { disk: self.disk.clone(), target: self.target, connection }
    }

    /// Where a worker says that it is at work for the guest, one for each worker. A backup is no guest.
    #[must_use]
    pub fn guest_queue(&self) -> Option<GuestQueue> {
        (self.target == Target::Live).then(|| self.disk.background.guest_queue())
    }

    /// A way into the epochs, one for each worker.
    #[must_use]
    pub fn lane(&self) -> EpochLane {
        match &self.connection {
            Some(connection) => connection.lane(),
            None => self.disk.clock.lane(),
        }
    }

    /// Executes one request. The caller keeps the ticket until this has finished and is recorded.
    ///
    /// # Errors
    /// When the request does not fit the disk or cannot be carried out; the guest gets an I/O error.
    pub async fn execute(&self, queue: &IoQueue, ticket: &Ticket, request: Request) -> Result<(), RequestError> {
        let disk = &*self.disk;
        // Also what would not read it: half a volume is no volume.
        if let Some(reason) = disk.base_broken() {
            return Err(RequestError::Broken(reason));
        }
        match request {
            Request::Read { at, into } => {
                self.check(at, into.len() as u64)?;
                // A backup's. What volumes read of a frozen version is their own guests'.
                if self.target != Target::Live && disk.yields() {
                    return Box::pin(self.read_in_turns(queue, ticket, at, into)).await;
                }
                disk.read(queue, self.target, ticket.epoch(), at, into).await
            }
            Request::Write { at, from, durable } => {
                self.check_change(at, from.len() as u64)?;
                disk.write(queue, ticket, at, super::write::Data::Guest(from), durable).await
            }
            Request::WriteZeroes { at, len, unmap, durable } => {
                self.check_change(at, len)?;
                disk.write(queue, ticket, at, super::write::Data::Zeros { len, unmap }, durable).await
            }
            Request::Discard { at, len } => {
                self.check_change(at, len)?;
                Box::pin(disk.discard(queue, ticket.epoch(), at, len)).await
            }
            Request::Flush if self.target == Target::Live => Box::pin(disk.flush(queue, ticket.epoch())).await,
            Request::Flush => Ok(()),
        }
    }

    /// Reads piece by piece beside a guest that is at work. A frozen version is the same for all of them.
    async fn read_in_turns(
        &self,
        queue: &IoQueue,
        ticket: &Ticket,
        at: ByteOffset,
        into: GuestBuf,
    ) -> Result<(), RequestError> {
        let (mut done, len) = (0, into.len() as u64);
        while done < len {
            let turn = self.disk.background_turn(len - done, 1).await;
            let piece = into.slice(usize_of(done)..usize_of(done + turn.bytes()));
            self.disk.read(queue, self.target, ticket.epoch(), at.add(done), piece).await?;
            done += turn.bytes();
        }
        Ok(())
    }

    fn check(&self, at: ByteOffset, len: u64) -> Result<(), RequestError> {
        let size = self.disk.geometry.size_bytes;
        let fits = at.0.checked_add(len).is_some_and(|end| end <= size);
        if fits && at.0.is_multiple_of(512) && len.is_multiple_of(512) {
            Ok(())
        } else {
            Err(RequestError::OutOfRange { at, len, size })
        }
    }

    fn check_change(&self, at: ByteOffset, len: u64) -> Result<(), RequestError> {
        if self.is_read_only() { Err(RequestError::ReadOnly) } else { self.check(at, len) }
    }
}

/// The version that a request on `target` in `epoch` is about.
pub(super) fn index_of(chain: &Chain, target: Target, epoch: super::Epoch) -> Result<VersionIndex, RequestError> {
    match target {
        Target::Live => Ok(chain.at_epoch(epoch)),
        Target::Frozen(id) => {
            let index = chain.position(id).ok_or_else(|| RequestError::Broken("it was deleted".to_owned()))?;
            let version = chain.version(index);
            match version.broken() {
                Some(reason) => Err(RequestError::Broken(reason.to_owned())),
                // Nothing is kept for it any more, so what it shows may be newer than it should be.
                None if version.is_retiring() => Err(RequestError::Broken("it is being deleted".to_owned())),
                None => Ok(index),
            }
        }
    }
}
