//! A frozen version of a disk as the full image below a volume (source 004; design: "A volume is a chain of its own that
//! falls through to a frozen version of another chain").
//!
//! What always holds:
//! - It is only read. A volume's writes go to its log, and nothing is ever folded into a frozen version.
//! - What it shows never changes: it goes by the version's name, and each read resolves its blocks anew as any reader of
//!   the snapshot does. The epochs of a daemon are one counter, so the reader's ticket holds up the version's deletion.
//! - When the version is broken, going or gone, every read says so, and so does the volume ([`View::broken`]).

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use super::disk::Target;
use super::{Disk, Epoch, VersionId};
use crate::image::{Alignment, ByteOffset, GuestBuf, ImageError, ImageErrorKind, ImageOp, IoBuf, IoQueue};

/// How many volumes may stand on each other: each is one more step of a read.
pub const VOLUMES_DEEP_MAX: usize = 32;

/// A frozen version, seen from above.
pub struct View {
    /// The disk that has the version, or why there is none.
    source: Result<Arc<Disk>, String>,
    version: VersionId,
    name: PathBuf,
    size_bytes: u64,
    alignment: Alignment,
}

impl View {
    /// A quiesced version of a disk; `name` is for messages.
    #[must_use]
    pub fn of(disk: Arc<Disk>, version: VersionId, name: &str) -> Arc<View> {
        let geometry = disk.geometry();
        let alignment = Alignment { offset_bytes: geometry.logical_block_bytes, memory_bytes: 1 };
        let size_bytes = geometry.size_bytes;
        Arc::new(View { source: Ok(disk), version, name: name.into(), size_bytes, alignment })
    }

    /// A version that is lost, and why.
    #[must_use]
    pub fn lost(reason: &str, version: VersionId, name: &str, size_bytes: u64) -> Arc<View> {
        let alignment = Alignment { offset_bytes: 512, memory_bytes: 1 };
        Arc::new(View { source: Err(reason.to_owned()), version, name: name.into(), size_bytes, alignment })
    }

    /// Why it cannot be read, if so.
    #[must_use]
    pub fn broken(&self) -> Option<String> {
        let why = match &self.source {
            Err(reason) => return Some(format!("{}: {reason}", self.name.display())),
            Ok(disk) => {
                let chain = disk.chain();
                let version = chain.position(self.version).map(|index| chain.version(index));
                match version {
                    None => "it was deleted".to_owned(),
                    Some(version) if version.is_retiring() => "it is being deleted".to_owned(),
                    Some(version) => match version.broken() {
                        Some(reason) => reason.to_owned(),
                        None => return disk.base_broken(),
                    },
                }
            }
        };
        Some(format!("{}: {why}", self.name.display()))
    }

    /// How many views lie on each other, this one included.
    #[must_use]
    pub fn depth(&self) -> usize {
        1 + self.source.as_ref().ok().and_then(|disk| disk.base()).map_or(0, |below| below.depth())
    }

    /// The version and the disk that has it, if there is one.
    pub(super) fn frozen(&self) -> Option<(&Arc<Disk>, VersionId)> {
        self.source.as_ref().ok().map(|disk| (disk, self.version))
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn alignment(&self) -> Alignment {
        self.alignment
    }

    pub(super) fn path(&self) -> &Path {
        &self.name
    }

    /// Boxed, because what it reads may be a volume's, too.
    pub(super) fn read<'a>(
        &'a self,
        queue: &'a IoQueue,
        at: ByteOffset,
        buf: IoBuf,
    ) -> Pin<Box<dyn Future<Output = Result<IoBuf, ImageError>> + 'a>> {
        Box::pin(async move {
            match buf {
                IoBuf::Guest(guest) => {
                    self.read_into(queue, at, guest.clone()).await?;
                    Ok(IoBuf::Guest(guest))
                }
                IoBuf::Owned(memory) => {
                    let (guest, _memory) = GuestBuf::from_owned(memory);
                    self.read_into(queue, at, guest.clone()).await?;
                    Ok(IoBuf::Owned(guest.copy_out()))
                }
                IoBuf::Shared(..) | IoBuf::None => Err(self.refusal(ImageOp::Read, "nothing can be read into that")),
            }
        })
    }

    async fn read_into(&self, queue: &IoQueue, at: ByteOffset, into: GuestBuf) -> Result<(), ImageError> {
        if let Some(reason) = self.broken() {
            return Err(self.refusal(ImageOp::Read, &reason));
        }
        let Ok(disk) = &self.source else { unreachable!("a version without a disk is broken") };
        // A frozen version is the same in every epoch.
        let read = disk.read(queue, Target::Frozen(self.version), Epoch(0), at, into).await;
        read.map_err(|e| self.refusal(ImageOp::Read, &e.to_string()))
    }

    /// See [`super::Backing::known_zeros`].
    pub(super) fn known_zeros(&self, at: ByteOffset, len: u64) -> u64 {
        let source = self.source.as_ref().ok();
        source.map_or(0, |disk| disk.known_zeros(Target::Frozen(self.version), at, len))
    }

    pub(super) fn refusal(&self, op: ImageOp, why: &str) -> ImageError {
        ImageError::new(ImageErrorKind::Io, op, &self.name, why)
    }
}
