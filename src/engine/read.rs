//! Reads of a version (source 002 [0096], [0102]; figures 24 and 26).
//!
//! Figure 26 takes a lock for each read. A backup would then hold up the guest's writes, so here a read that went
//! through a table is resolved again after it was read: a bit is set before the overwrite that it announces is
//! submitted, so "still the same owner" means that what was read had not been overwritten.
//!
//! What always holds: a read shows one version to its end, that of its epoch, whatever cuts come meanwhile. Also a read of
//! the full image is looked at again: a cut publishes its chain before anything of the newer version is submitted.

use std::sync::Arc;

use smallvec::SmallVec;

use super::chain::{Target, index_of};
use super::geometry::usize_of;
use super::restoring::Restore;
use super::runs::alike;
use super::view::ViewRead;
use super::{
    Background, Backing, Chain, Disk, Epoch, EpochClock, Geometry, RequestError, RestoreSource, VersionId,
    VersionSource, View,
};
use crate::image::{ByteOffset, GuestBuf, ImageOp, IoBuf, IoQueue, join_all};
use crate::store::{BlockRange, Table};

/// Neighbouring blocks whose bytes are in the same image.
struct Extent {
    blocks: BlockRange,
    image: Backing,
}

/// One, most of the time.
type Extents = SmallVec<[Extent; 1]>;

impl Disk {
    pub(super) async fn read(
        &self,
        queue: &IoQueue,
        target: Target,
        epoch: Epoch,
        at: ByteOffset,
        into: GuestBuf,
    ) -> Result<(), RequestError> {
        if into.is_empty() {
            return Ok(());
        }
        let pivot = pivot_shown(&self.chain.load(), target, epoch)?.cloned();
        let into = match pivot {
            None => into,
            Some(pivot) => {
                let IoBuf::Guest(into) = pivot.read(queue, at, IoBuf::Guest(into)).await? else {
                    unreachable!("a transfer gives back the buffer it was given")
                };
                // The full image may have gone to a newer version, which has overwritten it, or a restore have begun; a
                // frozen pivot on its way out is overwritten by the log above it.
                if pivot_shown(&self.chain.load(), target, epoch)?.is_some_and(|now| now.is(&pivot)) {
                    return Ok(());
                }
                into
            }
        };
        // Boxed, so that requests which need no table do not carry the room for this.
        Box::pin(self.read_through_tables(queue, target, epoch, at, into)).await
    }

    async fn read_through_tables(
        &self,
        queue: &IoQueue,
        target: Target,
        epoch: Epoch,
        at: ByteOffset,
        into: GuestBuf,
    ) -> Result<(), RequestError> {
        let geometry = self.geometry();
        let part_bytes = geometry.blocks_per_part() * u64::from(geometry.block_bytes);
        let (mut done, len) = (0, into.len() as u64);
        while done < len {
            let here = at.add(done);
            // Parts end at block boundaries, so that no block is resolved twice.
            let part = (part_bytes - here.0 % u64::from(geometry.block_bytes)).min(len - done);
            let range = usize_of(done)..usize_of(done + part);
            self.read_part(queue, target, epoch, here, &into.slice(range)).await?;
            done += part;
        }
        Ok(())
    }

    async fn read_part(
        &self,
        queue: &IoQueue,
        target: Target,
        epoch: Epoch,
        at: ByteOffset,
        into: &GuestBuf,
    ) -> Result<(), RequestError> {
        let blocks = self.geometry().covering(at, into.len() as u64);
        if target == Target::Live {
            self.wait_to_read().await;
        }
        let mut generation = self.locks.generation(blocks);
        let mut extents = self.extents(target, epoch, blocks)?;
        loop {
            let reads = extents.iter().map(|extent| {
                let (from, len) = self.geometry().bytes(extent.blocks);
                let (from, to) = (from.max(at), (from.0 + len).min(at.0 + into.len() as u64));
                let piece = into.slice(usize_of(from.0 - at.0)..usize_of(to - at.0));
                extent.image.read(queue, from, IoBuf::Guest(piece))
            });
            let done = join_all(reads).await;
            let generation_now = self.locks.generation(blocks);
            let now = self.extents(target, epoch, blocks)?;
            let same = (generation == generation_now) && is_same(&now, &extents);
            if same {
                for read in done {
                    read?;
                }
                return Ok(());
            }
            (extents, generation) = (now, generation_now);
        }
    }

    /// How many of the bytes from `at` on a version shows as zeros, as far as its images can tell at once. As a read, it is
    /// resolved again afterwards.
    pub(super) fn known_zeros(&self, target: Target, at: ByteOffset, len: u64) -> u64 {
        let blocks = self.geometry().covering(at, len);
        let generation = self.locks.generation(blocks);
        let Ok(extents) = self.extents(target, Epoch(0), blocks) else { return 0 };
        let mut end = at.0;
        for extent in &extents {
            let (from, bytes) = self.geometry().bytes(extent.blocks);
            let (from, to) = (from.max(at), (from.0 + bytes).min(at.0 + len));
            let zeros = extent.image.known_zeros(from, to - from.0);
            end = from.0 + zeros;
            if end < to {
                break;
            }
        }
        let Ok(now) = self.extents(target, Epoch(0), blocks) else { return 0 };
        let is_same = self.locks.generation(blocks) == generation && is_same(&now, &extents);
        if is_same { end - at.0 } else { 0 }
    }

    fn extents(&self, target: Target, epoch: Epoch, blocks: BlockRange) -> Result<Extents, RequestError> {
        let chain = self.chain();
        let index = index_of(&chain, target, epoch)?;
        let of = |index, blocks| {
            let owners = chain.at(index).owners(blocks);
            owners.map(|(blocks, owner)| Extent { blocks, image: owner.layer().image.clone() })
        };
        if index < chain.live() {
            return Ok(of(index, blocks).collect());
        }
        if let Restore::Lost(reason) = chain.restore() {
            return Err(RequestError::Broken(reason.clone()));
        }
        let Some(restoring) = chain.restoring() else { return Ok(of(index, blocks).collect()) };
        let mut extents = Extents::new();
        // Each bit is looked at once: what is found the same by the next look was the same all the time.
        for (run, is_pending) in alike(blocks, |block| restoring.is_pending(block)) {
            match restoring.source() {
                _ if !is_pending => extents.extend(of(index, run)),
                RestoreSource::View(view) => extents.push(Extent { blocks: run, image: Backing::View(view.clone()) }),
                RestoreSource::Own(id) => extents.extend(of(chain.restored(*id)?, run)),
            }
        }
        Ok(extents)
    }
}

/// The image of the version, if it owns every block.
fn pivot_shown(chain: &Chain, target: Target, epoch: Epoch) -> Result<Option<&Backing>, RequestError> {
    let index = index_of(chain, target, epoch)?;
    let is_restored = index == chain.live() && !matches!(chain.restore(), Restore::None);
    Ok((index == chain.pivot_of(index) && !is_restored).then(|| &chain.layer(index).image))
}

/// Whether the same images have the same blocks.
fn is_same(now: &[Extent], before: &[Extent]) -> bool {
    now.len() == before.len() && now.iter().zip(before).all(|(a, b)| a.blocks == b.blocks && a.image.is(&b.image))
}

impl VersionSource for Disk {
    fn geometry_of(&self, version: VersionId) -> Geometry {
        Geometry { size_bytes: self.size_of(version), ..self.geometry() }
    }

    fn clock(&self) -> &EpochClock {
        &self.clock
    }

    fn why_unreadable(&self, version: VersionId) -> Option<String> {
        match index_of(&self.chain(), Target::Frozen(version), Epoch(0)) {
            Err(RequestError::Broken(reason)) => Some(reason),
            Err(e) => Some(e.to_string()),
            Ok(_) => None,
        }
    }

    fn base_broken(&self) -> Option<String> {
        Disk::base_broken(self)
    }

    fn outlives_power_cut(&self, version: VersionId) -> bool {
        let chain = self.chain();
        chain.position(version).is_some_and(|index| self.shown_outlives_power_cut(chain.at(index)))
    }

    fn read_view<'a>(&'a self, queue: &'a IoQueue, view: &'a View, at: ByteOffset, buf: IoBuf) -> ViewRead<'a> {
        Box::pin(async move {
            let read = async |into| {
                // A frozen version is the same in every epoch.
                let read = self.read(queue, Target::Frozen(view.version()), Epoch(0), at, into).await;
                read.map_err(|e| view.refusal(ImageOp::Read, &e.to_string()))
            };
            match buf {
                IoBuf::Guest(guest) => {
                    read(guest.clone()).await?;
                    Ok(IoBuf::Guest(guest))
                }
                IoBuf::Owned(memory) => {
                    let (guest, _memory) = GuestBuf::from_owned(memory);
                    read(guest.clone()).await?;
                    Ok(IoBuf::Owned(guest.copy_out()))
                }
                IoBuf::Shared(..) | IoBuf::None => Err(view.refusal(ImageOp::Read, "nothing can be read into that")),
            }
        })
    }

    fn zeros_of(&self, version: VersionId, at: ByteOffset, len: u64) -> u64 {
        self.known_zeros(Target::Frozen(version), at, len)
    }

    fn base(&self) -> Option<Arc<View>> {
        Disk::base(self)
    }

    fn background(&self) -> &Arc<Background> {
        Disk::background(self)
    }

    fn owned_above_base(&self, version: VersionId, block_bytes: u32) -> Option<Vec<Arc<Table>>> {
        let chain = self.chain();
        let index = chain.position(version)?;
        let is_volume = self.base.get().is_some_and(|base| base.load().is_some()) && chain.pivot_of(index) == 0;
        if !is_volume || self.geometry().block_bytes != block_bytes {
            return None;
        }
        Some((1..=index).filter_map(|i| chain.layer(i).table().cloned()).collect())
    }
}
