//! The version chain: which versions a disk has, who owns which block, and where a version's bytes are.
//!
//! A chain is immutable; a change publishes a new one ([`super::Disk`]). Bits of block maps and the flags
//! of versions change in place.
//!
//! What always holds:
//! - Versions are ordered by the epoch in which they began; the last one is live.
//! - A chain has one segment, and one more for each split of a mirror: nothing is read across a split ([0062], figure 9).
//! - Of a segment exactly one version, the pivot, owns every block. Walking from a version towards its pivot, the first
//!   one that owns a block has its bytes (002 [0075], [0092]-[0097]; figures 14 and 21).

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::restoring::Restore;
use super::{Epoch, Layer, RequestError, Restoring, Version, VersionId};
use crate::store::{BlockIndex, BlockRange};

/// A version's place in its chain; 0 is the oldest.
pub type VersionIndex = usize;

/// A version and its layer.
#[derive(Clone)]
pub struct Link {
    /// Who.
    pub version: Arc<Version>,
    /// With what.
    pub layer: Layer,
    /// Whether the mirror was split when it began: it shares no bytes with older versions.
    pub splits: bool,
}

/// Versions that share bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// The oldest of them.
    pub first: VersionIndex,
    /// The newest of them.
    pub last: VersionIndex,
    /// The one that owns everything.
    pub pivot: VersionIndex,
}

impl Segment {
    /// Who takes the image of a pivot over when it goes: the version above it, whose log is folded into it, or else the
    /// one below. None if it is no pivot, or alone.
    #[must_use]
    pub fn heir_of(self, index: VersionIndex) -> Option<VersionIndex> {
        match index {
            i if i != self.pivot => None,
            i if i < self.last => Some(i + 1),
            i if i > self.first => Some(i - 1),
            _ => None,
        }
    }
}

/// All versions of a disk at one moment.
#[derive(Clone)]
pub struct Chain {
    links: Vec<Link>,
    segments: Vec<Segment>,
    restore: Restore,
}

impl Chain {
    /// A chain of `links`, oldest first.
    ///
    /// # Panics
    /// When not exactly one of a segment owns everything, or they are not in order.
    #[must_use]
    pub fn new(links: Vec<Link>) -> Chain {
        let mut segments = Vec::with_capacity(1);
        let mut first = 0;
        for last in 0..links.len() {
            if last + 1 < links.len() && !links[last + 1].splits {
                continue;
            }
            let mut pivots = (first..=last).filter(|&i| links[i].layer.is_full());
            let (Some(pivot), None) = (pivots.next(), pivots.next()) else {
                panic!("a segment of a chain has exactly one pivot");
            };
            segments.push(Segment { first, last, pivot });
            first = last + 1;
        }
        assert!(!segments.is_empty(), "a chain has a version");
        assert!(links.is_sorted_by(|a, b| a.version.began < b.version.began), "versions are in order of their epochs");
        Chain { links, segments, restore: Restore::None }
    }

    /// The same with other versions.
    #[must_use]
    pub(super) fn with_links(&self, links: Vec<Link>) -> Chain {
        self.with_restore_of(links, self.restore.clone())
    }

    /// The same versions, of which the live one is restored, or is not any more.
    #[must_use]
    pub(super) fn with_restore(&self, restore: Restore) -> Chain {
        self.with_restore_of(self.links.clone(), restore)
    }

    fn with_restore_of(&self, links: Vec<Link>, restore: Restore) -> Chain {
        Chain { restore, ..Chain::new(links) }
    }

    /// Whether the live version is being restored in place.
    #[must_use]
    pub(super) fn restore(&self) -> &Restore {
        &self.restore
    }

    /// What the live version is restored to, while some of its blocks show another version.
    #[must_use]
    pub fn restoring(&self) -> Option<&Arc<Restoring>> {
        match &self.restore {
            Restore::Active(restoring) => Some(restoring),
            Restore::None | Restore::Closed { .. } | Restore::Lost(_) => None,
        }
    }

    /// Why pending blocks cannot be shown, if a restore lost what it goes back to.
    #[must_use]
    pub fn restore_lost(&self) -> Option<&str> {
        match &self.restore {
            Restore::Lost(reason) => Some(reason),
            Restore::None | Restore::Closed { .. } | Restore::Active(_) => None,
        }
    }

    /// Where the disk's own version is that the live one is restored to.
    pub(super) fn restored(&self, id: VersionId) -> Result<VersionIndex, RequestError> {
        self.position(id).ok_or_else(|| RequestError::Broken("the snapshot that is restored is gone".to_owned()))
    }

    /// The versions, oldest first.
    #[must_use]
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The newest version.
    #[must_use]
    pub fn live(&self) -> VersionIndex {
        self.links.len() - 1
    }

    /// The version that owns everything that this one can read.
    #[must_use]
    pub fn pivot_of(&self, index: VersionIndex) -> VersionIndex {
        self.segment_of(index).pivot
    }

    /// The versions that share bytes with this one.
    #[must_use]
    pub fn segment_of(&self, index: VersionIndex) -> Segment {
        match self.segments[..] {
            [only] => only,
            _ => *self.segments.iter().find(|s| index <= s.last).expect("every version is in a segment"),
        }
    }

    /// The segments that are newer than that of `index`.
    #[must_use]
    pub fn segments_after(&self, index: VersionIndex) -> &[Segment] {
        &self.segments[self.segments.partition_point(|s| s.first <= index)..]
    }

    /// Whether the log above this pivot is being folded into it: it is on its way out, so the version above takes
    /// its image over, and writes of that version go there at once.
    #[must_use]
    pub fn folds_into(&self, pivot: VersionIndex) -> bool {
        self.segment_of(pivot).last > pivot && self.links[pivot].version.is_retiring()
    }

    /// Who takes the image of a pivot over when it goes ([`Segment::heir_of`]).
    #[must_use]
    pub fn heir_of_pivot(&self, index: VersionIndex) -> Option<VersionIndex> {
        self.segment_of(index).heir_of(index)
    }

    /// A version's layer.
    #[must_use]
    pub fn layer(&self, index: VersionIndex) -> &Layer {
        &self.links[index].layer
    }

    /// A version.
    #[must_use]
    pub fn version(&self, index: VersionIndex) -> &Arc<Version> {
        &self.links[index].version
    }

    /// Where the version with this name is.
    #[must_use]
    pub fn position(&self, id: VersionId) -> Option<VersionIndex> {
        self.links.iter().position(|l| l.version.id == id)
    }

    /// The version that a request of `epoch` reads and writes: the newest that began then or before.
    ///
    /// One that broke while its requests were still under way has no bytes to show them. They go on with the next
    /// newer one, which has all that they have written: the guest does not notice that a snapshot was lost.
    #[must_use]
    pub fn at_epoch(&self, epoch: Epoch) -> VersionIndex {
        let own = self.links.iter().rposition(|l| l.version.began <= epoch).unwrap_or(0);
        (own..self.live()).find(|&i| self.links[i].version.broken().is_none()).unwrap_or(self.live())
    }

    /// A version of it, to be asked.
    #[must_use]
    pub fn at(&self, index: VersionIndex) -> VersionIn<'_> {
        VersionIn { chain: self, index }
    }
}

/// A version in its chain.
#[derive(Clone, Copy)]
pub struct VersionIn<'a> {
    /// Its chain.
    pub chain: &'a Chain,
    /// Its place there.
    pub index: VersionIndex,
}

impl<'a> VersionIn<'a> {
    /// Another version of the same chain.
    #[must_use]
    pub fn other(self, index: VersionIndex) -> VersionIn<'a> {
        VersionIn { index, ..self }
    }

    /// Its layer.
    #[must_use]
    pub fn layer(self) -> &'a Layer {
        self.chain.layer(self.index)
    }

    /// The version.
    #[must_use]
    pub fn version(self) -> &'a Arc<Version> {
        self.chain.version(self.index)
    }

    /// The versions that share bytes with it.
    #[must_use]
    pub fn segment(self) -> Segment {
        self.chain.segment_of(self.index)
    }

    /// Whether it is older than the pivot, which the versions between go through to.
    #[must_use]
    pub fn is_below_pivot(self) -> bool {
        self.index < self.segment().pivot
    }

    /// The versions whose layers it reads, from the pivot on if it is newer than that.
    pub(super) fn way(self) -> RangeInclusive<VersionIndex> {
        let pivot = self.segment().pivot;
        pivot.min(self.index)..=pivot.max(self.index)
    }

    /// The version whose layer has the bytes of `block` as this one shows it.
    #[must_use]
    pub fn resolve(self, block: BlockIndex) -> VersionIndex {
        self.resolve_without(block, &[])
    }

    /// As [`VersionIn::resolve`], when the entries that the versions `gone` have for the block are deleted.
    #[must_use]
    pub fn resolve_without(self, block: BlockIndex, gone: &[VersionIndex]) -> VersionIndex {
        let pivot = self.segment().pivot;
        let mut at = self.index;
        while at != pivot && (gone.contains(&at) || !self.chain.layer(at).owns(block)) {
            if at < pivot {
                at += 1;
            } else {
                at -= 1;
            }
        }
        at
    }

    /// The runs of `blocks` by the version whose layer has their bytes.
    pub(super) fn owners(self, blocks: BlockRange) -> impl Iterator<Item = (BlockRange, VersionIn<'a>)> {
        let mut next = None;
        let mut left = blocks;
        std::iter::from_fn(move || {
            let (mut run, owner) = next.take().or_else(|| self.first_run(&mut left))?;
            while let Some((more, same)) = self.first_run(&mut left) {
                if same != owner {
                    next = Some((more, same));
                    break;
                }
                run.end = more.end;
            }
            Some((run, self.other(owner)))
        })
    }

    /// Takes the first of `blocks` whose bytes the same layer has, as far as one word of each table says it, and that version.
    fn first_run(self, blocks: &mut BlockRange) -> Option<(BlockRange, VersionIndex)> {
        if blocks.is_empty() {
            return None;
        }
        let (mut at, pivot) = (self.index, self.segment().pivot);
        let mut count = blocks.count();
        while at != pivot {
            let (owns, alike) = self.chain.layer(at).table().map_or((true, count), |table| table.alike(blocks.start));
            count = count.min(alike);
            if owns {
                break;
            }
            if at < pivot {
                at += 1;
            } else {
                at -= 1;
            }
        }
        let run = BlockRange { start: blocks.start, end: BlockIndex(blocks.start.0 + count) };
        blocks.start = run.end;
        Some((run, at))
    }

    /// The nearest older version that reads `block` through this one or a newer one and still keeps its blocks: the one whose
    /// bytes a change of this one would change. Only it is ever copied to; those before it read through it (sources 002
    /// [0097]).
    #[must_use]
    pub fn nearest_reader(self, block: BlockIndex) -> Option<VersionIndex> {
        let segment = self.segment();
        if self.index > segment.pivot {
            return None; // Older versions walk towards the pivot, away from here.
        }
        for at in (segment.first..self.index).rev() {
            // What came behind its end, and behind those of all before it, is newer than they are.
            if self.chain.layer(at).owns(block) || !self.chain.version(at).reaches(block) {
                return None;
            }
            if self.chain.version(at).keeps_blocks() {
                return Some(at);
            }
        }
        None
    }

    /// As [`VersionIn::nearest_reader`], but for a discard: also a version that is going or lost still reads, so long as
    /// nothing older than this one owns the block.
    #[must_use]
    pub fn is_read_through(self, block: BlockIndex) -> bool {
        let (segment, Some(older)) = (self.segment(), self.index.checked_sub(1)) else { return false };
        let reads = || self.chain.version(older).reaches(block) && !self.chain.layer(older).owns(block);
        self.index <= segment.pivot && self.index > segment.first && reads()
    }

    /// What the live version is restored to, if this is the live one and the block still shows that.
    #[must_use]
    pub fn pending(self, block: BlockIndex) -> Option<&'a Arc<Restoring>> {
        let restoring = self.chain.restoring().filter(|_| self.index == self.chain.live());
        restoring.filter(|restoring| restoring.is_pending(block))
    }
}

/// Which version a request is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    Live,
    Frozen(VersionId),
}

/// The version that a request on `target` in `epoch` is about.
pub(super) fn index_of(chain: &Chain, target: Target, epoch: Epoch) -> Result<VersionIndex, RequestError> {
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
