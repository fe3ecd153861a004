//! What is told of a disk: plain values, taken from one look at its chain.
//!
//! What always holds: facts are as old as the look that they come from. Who decides by them has claimed the disk, or looks
//! again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use crate::engine::{
    Backing, Changed, Disk, Epoch, Geometry, Layer, LegStatus, Mark, Pair, Segment, VersionId, VersionIn, VersionIndex,
    VersionSource,
};
use crate::store::Layout;

/// A disk at one moment.
#[derive(Clone, Debug)]
pub struct DiskFacts {
    /// Size and block sizes.
    pub geometry: Geometry,
    /// Whether all changes are refused.
    pub is_read_only: bool,
    /// Oldest first; the last one is live.
    pub versions: Vec<VersionFacts>,
    /// Moments of which only the changes are remembered, oldest first.
    pub marks: Vec<MarkFacts>,
    /// Why what it stands on cannot be read, if so. Then nothing of a volume is vouched for.
    pub base_broken: Option<String>,
    /// How many volumes lie below it, each on the next.
    pub depth: usize,
    /// What transfers of the live version's full image must be aligned to.
    pub unit_bytes: u32,
    /// How far a restore in place is.
    pub restore: RestoreFacts,
    /// Whether a restore waits for the volume that it goes back to, also if every request fails meanwhile.
    pub restore_waits: bool,
    /// The legs of its mirror, in the order of their places.
    pub legs: Vec<LegStatus>,
    /// How many bytes lie where the legs may differ after a crash.
    pub marked_bytes: u64,
    /// How many bytes a volume still lacks of what it stands on, about.
    pub bytes_to_fill: u64,
    /// Blocks whose discard waits for a version to go.
    pub discarded_blocks: u64,
    /// How long background work has waited for the guest, all turns together.
    pub background_waited: Duration,
}

/// A version of it.
#[derive(Clone, Debug)]
pub struct VersionFacts {
    /// Its stable name.
    pub id: VersionId,
    /// The epoch in which it began.
    pub began: Epoch,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether the mirror was split when it began.
    pub splits: bool,
    /// The versions that share bytes with it.
    pub segment: Segment,
    /// Which blocks its layer has.
    pub layer: LayerKind,
    /// In what they are.
    pub stored: Stored,
    /// Where that is.
    pub image: PathBuf,
    /// Whether a sync of it has failed, so that nobody knows what is stored.
    pub is_poisoned: bool,
    /// How many blocks its layer has; None if it has every one.
    pub owned_blocks: Option<u64>,
    /// Why its content cannot be vouched for, if so.
    pub broken: Option<String>,
    /// Whether it never changes again.
    pub is_quiesced: bool,
    /// Whether it is being deleted.
    pub is_retiring: bool,
    /// Whether what it shows is to outlive a power cut.
    pub outlives_power_cut: bool,
    /// What is known of what was written in its epochs; None where nothing is noted.
    pub changed: Option<ChangedFacts>,
    /// How many frontends still write it rather than the live version.
    pub old_frontends: usize,
    /// Blocks and bytes that were copied into it before they were overwritten; holes count as blocks only.
    pub preserved: (u64, u64),
}

/// Which blocks a layer has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayerKind {
    /// Every one: the pivot's.
    Full,
    /// What was saved for a frozen version, as long as the machine runs.
    Table,
    /// The same, and it outlives a power cut.
    Saved,
    /// A log's.
    Log,
}

/// In what the bytes of a layer are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// One image.
    Image,
    /// The legs of a mirror.
    Mirror,
    /// A pack.
    Pack,
    /// A frozen version of another disk.
    Base,
}

/// What is known of what was written in some epochs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ChangedFacts {
    /// Why everything may have been, if so.
    pub lost: Option<String>,
}

/// A moment of which only the changes are remembered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MarkFacts {
    /// The name of the version that it was.
    pub id: VersionId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What is known of the changes up to it; None where nothing was noted.
    pub changed: Option<ChangedFacts>,
}

/// How far a restore in place is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RestoreFacts {
    /// There is none, or it has not begun.
    None,
    /// Pending blocks show what is restored.
    Active {
        /// How many blocks are pending, about.
        left_blocks: u64,
    },
    /// What pending blocks should show cannot be had, and why: every request fails.
    Lost(String),
}

/// What makes a disk useless as a whole: looked at often, so it costs nothing that grows with what its versions have.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Trouble {
    /// Why pending blocks cannot be shown, if a restore lost what it goes back to.
    pub restore_lost: Option<String>,
    /// Why what it stands on cannot be read, if so.
    pub base_broken: Option<String>,
    /// The images of which a sync has failed, oldest first.
    pub poisoned: Vec<PathBuf>,
    /// Whether that of the live version's pivot is one of them.
    pub is_pivot_poisoned: bool,
}

impl Trouble {
    pub(super) fn of(disk: &Disk) -> Trouble {
        let chain = disk.chain();
        let images = (0..chain.links().len()).map(|index| &chain.layer(index).image);
        let poisoned = images.filter(|image| image.is_poisoned()).map(|image| image.path().to_owned());
        Trouble {
            restore_lost: chain.restore_lost().map(str::to_owned),
            base_broken: disk.base_broken(),
            poisoned: poisoned.collect(),
            is_pivot_poisoned: chain.layer(chain.pivot_of(chain.live())).image.is_poisoned(),
        }
    }
}

impl DiskFacts {
    /// What is told of a disk.
    pub(super) fn of(disk: &Disk, mirror: Option<&Pair>) -> DiskFacts {
        // In this order: what leaves the chain is a mark, or merged, before.
        let chain = disk.chain();
        let marks = disk.marks();
        let full = &chain.layer(chain.pivot_of(chain.live())).image;
        let restore = match (chain.restore_lost(), chain.restoring()) {
            (Some(reason), _) => RestoreFacts::Lost(reason.to_owned()),
            (None, None) => RestoreFacts::None,
            (None, Some(restoring)) => RestoreFacts::Active { left_blocks: restoring.pending().table().count() },
        };
        let version = |index| {
            let mut facts = VersionFacts::of(chain.at(index));
            facts.size_bytes = chain.version(index).size_within(disk.geometry().size_bytes);
            facts.outlives_power_cut = disk.shown_outlives_power_cut(chain.at(index));
            // Who is quiesced has nobody left.
            if let Some(next) = chain.links().get(index + 1).filter(|_| !facts.is_quiesced) {
                facts.old_frontends = disk.connections().holders(next.version.began.previous());
            }
            facts
        };
        DiskFacts {
            geometry: disk.geometry(),
            is_read_only: disk.is_read_only(),
            versions: (0..chain.links().len()).map(version).collect(),
            marks: marks.iter().map(|m| MarkFacts::of(m, disk)).collect(),
            base_broken: disk.base_broken(),
            depth: VersionSource::base(disk).map_or(0, |view| view.depth()),
            unit_bytes: full.alignment().offset_bytes,
            restore,
            restore_waits: false,
            legs: mirror.map(Pair::status).unwrap_or_default(),
            marked_bytes: mirror.map_or(0, Pair::marked_bytes),
            bytes_to_fill: disk.bytes_to_fill(),
            discarded_blocks: disk.discards().count(),
            background_waited: disk.background().waited(),
        }
    }

    /// Where the version with this name is in the chain.
    #[must_use]
    pub fn position(&self, id: VersionId) -> Option<VersionIndex> {
        self.versions.iter().position(|version| version.id == id)
    }

    /// The version with this name, if it is in the chain.
    #[must_use]
    pub fn version(&self, id: VersionId) -> Option<&VersionFacts> {
        self.position(id).map(|index| &self.versions[index])
    }

    /// The mark that is left of the version with this name.
    #[must_use]
    pub fn mark(&self, id: VersionId) -> Option<&MarkFacts> {
        self.marks.iter().find(|mark| mark.id == id)
    }

    /// The leg with this name, if it is one.
    #[must_use]
    pub fn leg(&self, id: Uuid) -> Option<&LegStatus> {
        self.legs.iter().find(|leg| leg.id == id)
    }

    /// The live version.
    ///
    /// # Panics
    /// Never: a disk has one.
    #[must_use]
    pub fn live(&self) -> &VersionFacts {
        self.versions.last().expect("a disk has a live version")
    }

    /// The frozen versions, oldest first.
    #[must_use]
    pub fn frozen(&self) -> &[VersionFacts] {
        &self.versions[..self.versions.len() - 1]
    }

    /// The version that has the live one's full image.
    #[must_use]
    pub fn pivot(&self) -> &VersionFacts {
        &self.versions[self.live().segment.pivot]
    }

    /// Whether the live version has the full image, so that a cut may move or split it ([`Disk::can_move_pivot`]).
    #[must_use]
    pub fn can_move_pivot(&self) -> bool {
        self.live().layer == LayerKind::Full
    }

    /// Why pending blocks cannot be shown, if a restore lost what it goes back to.
    #[must_use]
    pub fn restore_lost(&self) -> Option<&str> {
        match &self.restore {
            RestoreFacts::Lost(reason) => Some(reason),
            RestoreFacts::None | RestoreFacts::Active { .. } => None,
        }
    }

    /// How many bytes a restore has still to bring back.
    #[must_use]
    pub fn bytes_to_bring_back(&self) -> u64 {
        match self.restore {
            RestoreFacts::Active { left_blocks } => self.bytes_of(left_blocks),
            RestoreFacts::None | RestoreFacts::Lost(_) => 0,
        }
    }

    /// How many bytes a version has itself.
    #[must_use]
    pub fn owned_bytes(&self, version: &VersionFacts) -> u64 {
        version.owned_blocks.map_or(version.size_bytes, |blocks| self.bytes_of(blocks).min(version.size_bytes))
    }

    fn bytes_of(&self, blocks: u64) -> u64 {
        self.geometry.size_bytes.min(blocks * u64::from(self.geometry.block_bytes))
    }

    /// Whether a version's content is folded into the full image when it goes.
    #[must_use]
    pub fn folds(&self, id: VersionId) -> bool {
        self.position(id).is_some_and(|at| {
            let segment = self.versions[at].segment;
            at == segment.pivot && at < segment.last
        })
    }

    /// The versions that one reads through towards its full image, without itself.
    #[must_use]
    pub fn way_of(&self, id: VersionId) -> &[VersionFacts] {
        let Some(at) = self.position(id) else { return &[] };
        let pivot = self.versions[at].segment.pivot;
        if pivot >= at { &self.versions[at + 1..=pivot] } else { &self.versions[pivot..at] }
    }

    /// Who takes the image of a pivot over when it goes.
    #[must_use]
    pub fn heir_of_pivot(&self, id: VersionId) -> Option<&VersionFacts> {
        let at = self.position(id)?;
        self.versions[at].segment.heir_of(at).map(|heir| &self.versions[heir])
    }

    /// The version whose image a version's content takes room in beside the full image: for one whose layer has everything, or that
    /// lies above the pivot, the log of the version above it.
    #[must_use]
    pub fn space_of(&self, id: VersionId) -> Option<&VersionFacts> {
        let at = self.position(id)?;
        let segment = self.versions[at].segment;
        let at = if at >= segment.pivot && at < segment.last { at + 1 } else { at };
        Some(&self.versions[at])
    }

    /// The layer that is not needed any more when a version has gone, by its version and its image: its own, or, when it
    /// leaves its full image to a neighbour, the neighbour's. None if it has a full image that nobody takes over: a disk's
    /// own image, or a leg.
    #[must_use]
    pub fn left_behind(&self, id: VersionId) -> Option<(VersionId, PathBuf)> {
        let goes = self.heir_of_pivot(id).or_else(|| self.version(id))?;
        (goes.layer != LayerKind::Full).then(|| (goes.id, goes.image.clone()))
    }

    /// The leg that a version has alone, if it has one.
    #[must_use]
    pub fn leg_of(&self, id: VersionId) -> Option<&Path> {
        let version = self.version(id)?;
        let is_alone = self.heir_of_pivot(id).is_none();
        (version.has_image() && version.layer == LayerKind::Full && is_alone).then_some(&version.image)
    }

    /// The one image in which a volume without snapshots has all that is its own: it is independent, or stands on something
    /// with one log above. None if it has more.
    #[must_use]
    pub fn only_image(&self) -> Option<&Path> {
        let is_simple = match &self.versions[..] {
            [live] => live.layer == LayerKind::Full,
            [origin, live] => origin.stored == Stored::Base && live.layer != LayerKind::Full,
            _ => false,
        };
        (is_simple && self.live().has_image()).then_some(&self.live().image)
    }

    /// The oldest log of a volume that stands on something, if it is one image: its version and that image.
    #[must_use]
    pub fn oldest_log(&self) -> Option<(VersionId, &Path)> {
        match &self.versions[..] {
            [origin, log, ..] if origin.stored == Stored::Base && log.has_image() && log.layer != LayerKind::Full => {
                Some((log.id, &log.image))
            }
            _ => None,
        }
    }
}

impl MarkFacts {
    fn of(mark: &Mark, disk: &Disk) -> MarkFacts {
        let size_bytes = mark.size_bytes.min(disk.geometry().size_bytes);
        MarkFacts { id: mark.id, size_bytes, changed: changed_of(mark.changed.as_ref()) }
    }
}

impl VersionFacts {
    fn of(of: VersionIn<'_>) -> VersionFacts {
        use std::sync::atomic::Ordering::Relaxed;
        let (version, layer) = (of.version(), of.layer());
        VersionFacts {
            id: version.id,
            began: version.began,
            size_bytes: version.size_within(u64::MAX),
            splits: of.chain.links()[of.index].splits,
            segment: of.segment(),
            layer: kind_of(layer),
            stored: match layer.image {
                Backing::One(_) => Stored::Image,
                Backing::Pair(_) => Stored::Mirror,
                Backing::Packed(_) => Stored::Pack,
                Backing::View(_) => Stored::Base,
            },
            image: layer.image.path().to_owned(),
            is_poisoned: layer.image.is_poisoned(),
            owned_blocks: layer.table().map(|table| table.count()),
            broken: version.broken().map(str::to_owned),
            is_quiesced: version.is_quiesced(),
            is_retiring: version.is_retiring(),
            outlives_power_cut: false,
            changed: changed_of(version.changed()),
            old_frontends: 0,
            preserved: (version.preserved_blocks.load(Relaxed), version.preserved_bytes.load(Relaxed)),
        }
    }

    /// Whether its layer is one image, which is no mirror, no pack, and no other disk's.
    #[must_use]
    pub fn has_image(&self) -> bool {
        self.stored == Stored::Image
    }

    /// How the blocks of its layer lie in its image.
    #[must_use]
    pub fn layout(&self) -> Layout {
        match self.stored {
            Stored::Pack => Layout::Packed,
            Stored::Image | Stored::Mirror | Stored::Base => Layout::Sparse,
        }
    }
}

fn kind_of(layer: &Layer) -> LayerKind {
    match layer.table() {
        None => LayerKind::Full,
        Some(_) if layer.log().is_some() => LayerKind::Log,
        Some(_) if layer.saved_durably().is_some() => LayerKind::Saved,
        Some(_) => LayerKind::Table,
    }
}

fn changed_of(changed: Option<&Changed>) -> Option<ChangedFacts> {
    changed.map(|changed| ChangedFacts { lost: changed.known().err().map(str::to_owned) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Versions 0, 1, … in one segment, of which the one at `pivot` has the full image.
    fn segment(count: usize, pivot: usize, stored: Stored) -> DiskFacts {
        let version = |at: usize| VersionFacts {
            id: id(at),
            began: Epoch(at as u64),
            size_bytes: 10_240,
            splits: false,
            segment: Segment { first: 0, last: count - 1, pivot },
            layer: if at == pivot { LayerKind::Full } else { LayerKind::Log },
            stored: if at == pivot { stored } else { Stored::Image },
            image: image(at),
            is_poisoned: false,
            owned_blocks: (at != pivot).then_some(3),
            broken: None,
            is_quiesced: at + 1 < count,
            is_retiring: false,
            outlives_power_cut: true,
            changed: None,
            old_frontends: 0,
            preserved: (0, 0),
        };
        DiskFacts {
            geometry: Geometry { size_bytes: 10_240, logical_block_bytes: 512, block_bytes: 4096 },
            is_read_only: false,
            versions: (0..count).map(version).collect(),
            marks: Vec::new(),
            base_broken: None,
            depth: 0,
            unit_bytes: 512,
            restore: RestoreFacts::None,
            restore_waits: false,
            legs: Vec::new(),
            marked_bytes: 0,
            bytes_to_fill: 0,
            discarded_blocks: 0,
            background_waited: Duration::ZERO,
        }
    }

    fn id(at: usize) -> VersionId {
        Uuid::from_u128(at as u128 + 1)
    }

    fn image(at: usize) -> PathBuf {
        format!("/images/{at}").into()
    }

    #[test]
    fn a_pivot_leaves_the_layer_of_who_takes_its_image_over() {
        let facts = segment(4, 1, Stored::Image);
        let left = |at| facts.left_behind(id(at));
        assert_eq!(left(0), Some((id(0), image(0))), "its own");
        assert_eq!(left(1), Some((id(2), image(2))), "the log above is folded");
        assert_eq!(left(2), Some((id(2), image(2))));
        assert_eq!(segment(3, 2, Stored::Image).left_behind(id(2)), Some((id(1), image(1))), "the one below takes it");
        assert_eq!(segment(1, 0, Stored::Image).left_behind(id(0)), None, "nobody takes it over");
        assert_eq!(facts.left_behind(id(9)), None);
        assert_eq!((0..4).filter(|&at| facts.folds(id(at))).collect::<Vec<_>>(), [1]);
        assert!(!segment(3, 2, Stored::Image).folds(id(2)));
    }

    #[test]
    fn a_leg_is_a_full_image_that_nobody_takes_over() {
        assert_eq!(segment(1, 0, Stored::Image).leg_of(id(0)), Some(&*image(0)));
        assert_eq!(segment(2, 1, Stored::Image).leg_of(id(1)), None, "the older one takes it over");
        assert_eq!(segment(1, 0, Stored::Mirror).leg_of(id(0)), None);
    }

    #[test]
    fn versions_read_towards_the_full_image() {
        let facts = segment(4, 1, Stored::Image);
        let way = |at| facts.way_of(id(at)).iter().map(|v| v.id).collect::<Vec<_>>();
        assert_eq!((way(0), way(1), way(3)), (vec![id(1)], vec![], vec![id(1), id(2)]));
        let space = |at| facts.space_of(id(at)).map(|version| version.image.clone());
        assert_eq!((space(0), space(1), space(3)), (Some(image(0)), Some(image(2)), Some(image(3))));
        assert!(!facts.can_move_pivot() && segment(2, 1, Stored::Image).can_move_pivot());
    }

    #[test]
    fn a_volume_that_can_be_updated_has_one_image() {
        assert_eq!(segment(1, 0, Stored::Image).only_image(), Some(&*image(0)));
        assert_eq!(segment(2, 0, Stored::Base).only_image(), Some(&*image(1)));
        for more in [segment(2, 0, Stored::Image), segment(3, 0, Stored::Base), segment(1, 0, Stored::Mirror)] {
            assert_eq!(more.only_image(), None);
        }
    }

    #[test]
    fn bytes_end_with_the_disk() {
        let mut facts = segment(2, 1, Stored::Image);
        assert_eq!(facts.owned_bytes(&facts.versions[0]), 10_240);
        assert_eq!(facts.owned_bytes(facts.live()), 10_240, "all of it");
        facts.restore = RestoreFacts::Active { left_blocks: 2 };
        assert_eq!(facts.bytes_to_bring_back(), 8192);
    }
}
