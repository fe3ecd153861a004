//! The version chain: which versions a disk has, who owns which block, and where a version's bytes are.
//!
//! A chain is immutable; a change publishes a new one ([`super::Disk`]). Bits of owned tables and the flags
//! of versions change in place.
//!
//! What always holds:
//! - Versions are ordered by the epoch in which they began; the last one is live.
//! - A chain has one segment, and one more for each split of a mirror: nothing is read across a split ([0062], figure 9).
//! - Of a segment exactly one version, the pivot, owns every block. Walking from a version towards its pivot, the first
//!   one that owns a block has its bytes (002 [0075], [0092]-[0097]; figures 14 and 21).

use std::sync::Arc;

use super::epoch::Epoch;
use super::layer::Layer;
use super::request::RequestError;
use super::restoring::{Restore, Restoring};
use super::version::{Version, VersionId};
use crate::store::BlockIndex;

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

    /// What the live version is restored to, if this block of version `index` still shows that.
    #[must_use]
    pub fn pending(&self, index: VersionIndex, block: BlockIndex) -> Option<&Arc<Restoring>> {
        self.restoring().filter(|restoring| index == self.live() && restoring.is_pending(block))
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

    /// Who takes the image of a pivot over when it goes: the version above it, whose log is folded into it, or else the
    /// one below. None if it is no pivot, or alone.
    #[must_use]
    pub fn heir_of_pivot(&self, index: VersionIndex) -> Option<VersionIndex> {
        let segment = self.segment_of(index);
        match index {
            i if i != segment.pivot => None,
            i if i < segment.last => Some(i + 1),
            i if i > segment.first => Some(i - 1),
            _ => None,
        }
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

    /// The version whose layer has the bytes of `block` as `index` shows it.
    #[must_use]
    pub fn resolve(&self, index: VersionIndex, block: BlockIndex) -> VersionIndex {
        self.resolve_without(index, block, &[])
    }

    /// As [`Chain::resolve`], when the entries that the versions `gone` have for the block are deleted.
    #[must_use]
    pub fn resolve_without(&self, index: VersionIndex, block: BlockIndex, gone: &[VersionIndex]) -> VersionIndex {
        let pivot = self.pivot_of(index);
        let mut at = index;
        while at != pivot && (gone.contains(&at) || !self.links[at].layer.owns(block)) {
            if at < pivot {
                at += 1;
            } else {
                at -= 1;
            }
        }
        at
    }

    /// The nearest version older than `index` that reads `block` through `index` or a newer one and still keeps its
    /// blocks: the one whose bytes a change of `index` would change. Only it is ever copied to; those
    /// before it read through it (sources 002 [0097]).
    #[must_use]
    pub fn nearest_reader(&self, index: VersionIndex, block: BlockIndex) -> Option<VersionIndex> {
        let segment = self.segment_of(index);
        if index > segment.pivot {
            return None; // Older versions walk towards the pivot, away from here.
        }
        for at in (segment.first..index).rev() {
            if self.links[at].layer.owns(block) {
                return None;
            }
            if self.links[at].version.keeps_blocks() {
                return Some(at);
            }
        }
        None
    }

    /// As [`Chain::nearest_reader`], but for a discard: also a version that is going or lost still reads, so long as
    /// nothing older than `index` owns the block.
    #[must_use]
    pub fn is_read_through(&self, index: VersionIndex, block: BlockIndex) -> bool {
        let segment = self.segment_of(index);
        index <= segment.pivot && index > segment.first && !self.links[index - 1].layer.owns(block)
    }
}

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
