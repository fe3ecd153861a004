//! A frozen version of a disk as the full image below a volume (source 004; design: "A volume is a chain of its own that
//! falls through to a frozen version of another chain").
//!
//! What always holds:
//! - It is only read. A volume's writes go to its log, and nothing is ever folded into a frozen version.
//! - What it shows never changes: it goes by the version's name, and each read resolves its blocks anew as any reader of
//!   the snapshot does. The disk that has it waits for who reads it before it lets it go ([`View::read_by`]).
//! - When the version is broken, going or gone, every read says so, and so does the volume ([`View::broken`]).

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use super::{Background, EpochClock, Geometry, VersionId};
use crate::image::{Alignment, ByteOffset, ImageError, ImageErrorKind, ImageOp, IoBuf, IoQueue};
use crate::store::Table;

/// How many volumes may stand on each other: each is one more step of a read.
pub const VOLUMES_DEEP_MAX: usize = 32;

/// What any version can be read in.
const SECTOR_BYTES: u32 = 512;

/// The disk that has a view's version, as the view knows it.
pub trait VersionSource: Send + Sync {
    /// The size of a version, and the block sizes.
    fn geometry_of(&self, version: VersionId) -> Geometry;

    /// Why a version cannot be read for a reason of its own, if so.
    fn why_unreadable(&self, version: VersionId) -> Option<String>;

    /// Why what it stands on cannot be read, if so.
    fn base_broken(&self) -> Option<String>;

    /// Whether what a version shows is to outlive a power cut.
    fn outlives_power_cut(&self, version: VersionId) -> bool;

    /// Fills `buf` with what the view's version shows from `at` on. Gives the buffer back. Boxed, because what is read may
    /// be a volume's, too.
    fn read_view<'a>(&'a self, queue: &'a IoQueue, view: &'a View, at: ByteOffset, buf: IoBuf) -> ViewRead<'a>;

    /// How many of the `len` bytes from `at` on a version is known to show as zeros.
    fn zeros_of(&self, version: VersionId, at: ByteOffset, len: u64) -> u64;

    /// What it stands on, if it is a volume that is not independent.
    fn base(&self) -> Option<Arc<View>>;

    /// The counter by which its requests go.
    fn clock(&self) -> &EpochClock;

    /// Its guest, and who has to yield to it.
    fn background(&self) -> &Arc<Background>;

    /// Tables of the blocks that a version of a volume has in layers of the volume's own. None if it is no volume, or its
    /// blocks have another size.
    fn owned_above_base(&self, version: VersionId, block_bytes: u32) -> Option<Vec<Arc<Table>>>;
}

/// See [`VersionSource::read_view`].
pub(super) type ViewRead<'a> = Pin<Box<dyn Future<Output = Result<IoBuf, ImageError>> + 'a>>;

/// A frozen version, seen from above.
pub struct View {
    /// The disk that has the version, or why there is none.
    source: Result<Arc<dyn VersionSource>, String>,
    version: VersionId,
    name: PathBuf,
    size_bytes: u64,
    logical_block_bytes: u32,
}

impl View {
    /// A quiesced version of a disk; `name` is for messages.
    #[must_use]
    pub fn of(disk: Arc<dyn VersionSource>, version: VersionId, name: &str) -> Arc<View> {
        let Geometry { size_bytes, logical_block_bytes, .. } = disk.geometry_of(version);
        Arc::new(View { source: Ok(disk), version, name: name.into(), size_bytes, logical_block_bytes })
    }

    /// A version that is lost, and why.
    #[must_use]
    pub fn lost(reason: &str, version: VersionId, name: &str, size_bytes: u64) -> Arc<View> {
        let source = Err(reason.to_owned());
        Arc::new(View { source, version, name: name.into(), size_bytes, logical_block_bytes: SECTOR_BYTES })
    }

    /// Before the requests of a disk read it: those of the disk that has it are waited for together with them from then on.
    pub(super) fn read_by(&self, reader: &EpochClock) {
        if let Ok(source) = &self.source {
            source.clock().read_by(reader);
        }
    }

    /// Why it cannot be read, if so.
    #[must_use]
    pub fn broken(&self) -> Option<String> {
        let why = match &self.source {
            Err(reason) => reason.clone(),
            Ok(disk) => match disk.why_unreadable(self.version) {
                Some(reason) => reason,
                None => return disk.base_broken(),
            },
        };
        Some(format!("{}: {why}", self.name.display()))
    }

    /// Whether what it shows is to outlive a power cut.
    #[must_use]
    pub fn outlives_power_cut(&self) -> bool {
        self.source.as_ref().is_ok_and(|disk| disk.outlives_power_cut(self.version))
    }

    /// How many views lie on each other, this one included.
    #[must_use]
    pub fn depth(&self) -> usize {
        1 + self.source.as_ref().ok().and_then(|disk| disk.base()).map_or(0, |below| below.depth())
    }

    /// The version and the disk that has it, if there is one.
    pub(super) fn frozen(&self) -> Option<(&Arc<dyn VersionSource>, VersionId)> {
        self.source.as_ref().ok().map(|disk| (disk, self.version))
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: SECTOR_BYTES, memory_bytes: 1 }
    }

    /// The logical blocks that its disk shows.
    pub(super) fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }

    pub(super) fn path(&self) -> &Path {
        &self.name
    }

    pub(super) fn version(&self) -> VersionId {
        self.version
    }

    pub(super) fn read<'a>(&'a self, queue: &'a IoQueue, at: ByteOffset, buf: IoBuf) -> ViewRead<'a> {
        match &self.source {
            Ok(disk) => disk.read_view(queue, self, at, buf),
            Err(reason) => Box::pin(std::future::ready(Err(self.refusal(ImageOp::Read, reason)))),
        }
    }

    /// See [`super::Backing::known_zeros`].
    pub(super) fn known_zeros(&self, at: ByteOffset, len: u64) -> u64 {
        let source = self.source.as_ref().ok();
        source.map_or(0, |disk| disk.zeros_of(self.version, at, len))
    }

    pub(super) fn refusal(&self, op: ImageOp, why: &str) -> ImageError {
        ImageError::new(ImageErrorKind::Io, op, &self.name, why)
    }
}
