//! What a write must touch, decided before anything is touched.
//!
//! Pure: looks at a chain and its tables, does nothing. The executor ([`super::Disk`]) carries a plan out. Figures
//! 11, 16, 18, 20 and 22, 23, 25, 27 of source 002 are what these rules come to for one frozen version; design.md has
//! them for any number.

use smallvec::{SmallVec, smallvec};

use super::{Chain, RestoreSource, Restoring, Segment, VersionIn, VersionIndex};
use crate::store::{BlockIndex, BlockRange};

/// A block's bytes go from one version's layer into another's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copy {
    /// Whose layer has them.
    pub from: VersionIndex,
    /// Whose layer gets them.
    pub to: VersionIndex,
}

/// Where the rest of a partly written block comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fill {
    /// The layer of a version.
    Layer(VersionIndex),
    /// What the disk is restored to, outside its chain.
    Restored,
}

/// What to do with a block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockPlan {
    /// First save the old bytes for an older version that reads them here (figure 25, 2503-2504).
    pub preserve: Option<Copy>,
    /// The layer that the write goes to: the pivot's, or the writer's own log.
    pub home: VersionIndex,
    /// The rest of a partly written block comes from there, because home does not have it.
    pub fill_from: Option<Fill>,
    /// The block becomes an entry of home's table (figure 18, 1804).
    pub adopts: bool,
    /// The write goes to these layers as well: newer versions must see it and have bytes of their own (002 [0051]).
    pub others: Vec<VersionIndex>,
    /// Afterwards home has all that these layers have of the block: their entries are deleted and their space is given
    /// back (figures 16 and 23).
    pub supersedes: Vec<VersionIndex>,
    /// The block shows what the disk is restored to, and not home. Afterwards it shows home.
    pub settles: bool,
}

/// Neighbouring blocks with the same plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// Which blocks.
    pub blocks: BlockRange,
    /// What to do with each.
    pub plan: BlockPlan,
}

/// Whose content a write that failed at one of its targets has spoilt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Harmed {
    /// The live version reads there, now or when the superseded entries are deleted: the guest must know.
    Guest,
    /// Only these frozen versions do: they are broken, and the guest notices nothing.
    Frozen(Vec<VersionIndex>),
}

impl Run {
    /// Who is harmed when a write of version `writer` fails at one of the targets.
    #[must_use]
    pub fn harmed_at(&self, writer: VersionIn<'_>, target: VersionIndex) -> Harmed {
        let (chain, plan) = (writer.chain, &self.plan);
        let shows = |version: VersionIndex| {
            let shown = |block| chain.at(version).resolve_without(block, &plan.supersedes);
            self.blocks.iter().any(|block| shown(block) == target)
        };
        let is_new_in_home = target == plan.home && (plan.adopts || plan.fill_from.is_some());
        if is_new_in_home || shows(chain.live()) {
            return Harmed::Guest;
        }
        Harmed::Frozen((writer.index..chain.live()).filter(|&version| shows(version)).collect())
    }
}

/// What a write does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WritePlan {
    /// The version that the write belongs to.
    pub writer: VersionIndex,
    /// Its blocks, in order, in runs.
    pub runs: SmallVec<[Run; 1]>,
}

impl BlockPlan {
    /// Nothing but the write itself.
    #[must_use]
    pub fn plain(home: VersionIndex) -> BlockPlan {
        BlockPlan {
            preserve: None,
            home,
            fill_from: None,
            adopts: false,
            others: Vec::new(),
            supersedes: Vec::new(),
            settles: false,
        }
    }

    /// What a write of version `writer` does with `block`, of which it writes the `whole` or a part.
    #[must_use]
    pub fn decide(writer: VersionIn<'_>, block: BlockIndex, whole: bool) -> BlockPlan {
        let (chain, segment) = (writer.chain, writer.segment());
        let mut plan = if segment.pivot >= writer.index {
            BlockPlan { preserve: save_for_older(writer, block), ..BlockPlan::plain(segment.pivot) }
        } else if chain.folds_into(segment.pivot) && writer.index == segment.pivot + 1 {
            into_the_base(writer, block, whole)
        } else {
            into_the_log(writer, block, whole)
        };
        // Versions from the writer's on that have bytes of their own for this block must show the write as well
        // (002 [0051]: writes to VLUN A are applied to VLUN B, not the other way round).
        add_owners(chain, Segment { first: writer.index, ..segment }, block, whole, &mut plan);
        for newer in chain.segments_after(writer.index) {
            plan.others.push(newer.pivot);
            add_owners(chain, *newer, block, whole, &mut plan);
        }
        if let Some(restoring) = writer.pending(block) {
            plan.settles = true;
            plan.fill_from = (!whole).then(|| rest_of_restored(chain, restoring, block));
        }
        plan.others.sort_unstable();
        // From the pivot outwards: a version whose entry is gone must not show that of one between it and the pivot.
        plan.supersedes.sort_unstable_by_key(|&i| i.abs_diff(chain.pivot_of(i)));
        plan
    }

    /// Whether it does anything but write to one place, and so must be alone on the block.
    #[must_use]
    pub fn excludes(&self) -> bool {
        let alone = !self.adopts && self.fill_from.is_none() && self.others.is_empty() && self.supersedes.is_empty();
        self.preserve.is_some() || !alone || self.settles
    }

    /// All layers that are written to.
    pub fn targets(&self) -> impl Iterator<Item = VersionIndex> {
        std::iter::once(self.home).chain(self.others.iter().copied())
    }
}

/// Old bytes that the nearest older version reads at or above `home` (figure 25).
pub(super) fn save_for_older(home: VersionIn<'_>, block: BlockIndex) -> Option<Copy> {
    home.nearest_reader(block).map(|to| Copy { from: home.other(to).resolve(block), to })
}

/// Where the rest of a pending block comes from.
fn rest_of_restored(chain: &Chain, restoring: &Restoring, block: BlockIndex) -> Fill {
    let own = match restoring.source() {
        RestoreSource::View(_) => None,
        RestoreSource::Own(id) => chain.position(*id),
    };
    // A version that is gone, which nobody lets happen, is an error when the block is filled.
    own.map_or(Fill::Restored, |index| Fill::Layer(chain.at(index).resolve(block)))
}

/// The pivot goes away and this version's log is folded into its image: the write need not go to the log any more.
fn into_the_base(writer: VersionIn<'_>, block: BlockIndex, whole: bool) -> BlockPlan {
    let base = writer.other(writer.index - 1);
    let mut plan = BlockPlan { preserve: save_for_older(base, block), ..BlockPlan::plain(base.index) };
    if writer.layer().owns(block) {
        plan.fill_from = (!whole).then_some(Fill::Layer(writer.index));
        plan.supersedes.push(writer.index);
    }
    plan
}

/// The pivot is older than the writer: the write goes to the writer's own image (figure 18).
fn into_the_log(writer: VersionIn<'_>, block: BlockIndex, whole: bool) -> BlockPlan {
    let mut plan = BlockPlan::plain(writer.index);
    if !writer.layer().owns(block) {
        plan.adopts = true;
        plan.fill_from = (!whole).then(|| Fill::Layer(writer.resolve(block)));
    }
    plan
}

/// The versions of `segment` that have the block themselves, beside the pivot and home. A write of the whole block
/// deletes their entries, and they show home's (figures 16 and 23); a part is written to each of them.
fn add_owners(chain: &Chain, segment: Segment, block: BlockIndex, whole: bool, plan: &mut BlockPlan) {
    for i in segment.first..=segment.last {
        let known = i == plan.home || i == segment.pivot || plan.supersedes.contains(&i);
        if !known && chain.layer(i).owns(block) {
            match whole {
                true => plan.supersedes.push(i),
                false => plan.others.push(i),
            }
        }
    }
}

impl WritePlan {
    /// What a write of version `writer` to `blocks` does; `is_whole` says which of them it covers entirely.
    #[must_use]
    pub fn decide(writer: VersionIn<'_>, blocks: BlockRange, is_whole: impl Fn(BlockIndex) -> bool) -> WritePlan {
        let (chain, index) = (writer.chain, writer.index);
        if chain.live() == 0 && chain.restoring().is_none() {
            // No other version, no table to look at: the common case.
            return WritePlan { writer: index, runs: smallvec![Run { blocks, plan: BlockPlan::plain(0) }] };
        }
        let mut runs: SmallVec<[Run; 1]> = SmallVec::new();
        for block in blocks.iter() {
            let plan = BlockPlan::decide(writer, block, is_whole(block));
            match runs.last_mut() {
                Some(run) if run.plan == plan => run.blocks.end = BlockIndex(block.0 + 1),
                _ => runs.push(Run { blocks: BlockRange::one(block), plan }),
            }
        }
        WritePlan { writer: index, runs }
    }

    /// The one layer that all bytes go to as they are, if there is one.
    #[must_use]
    pub fn single_target(&self) -> Option<VersionIndex> {
        let home = self.runs.first()?.plan.home;
        let direct = |plan: &BlockPlan| plan.home == home && plan.fill_from.is_none() && plan.others.is_empty();
        self.runs.iter().all(|run| direct(&run.plan)).then_some(home)
    }
}
