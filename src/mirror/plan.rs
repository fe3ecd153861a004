//! What a write must touch, decided before anything is touched.
//!
//! Pure: looks at a chain and its tables, does nothing. The executor ([`super::Disk`]) carries a plan out. Figures 22,
//! 23, 25 and 27 of source 002 are what these rules come to for one frozen version; design.md has them for any number.

use super::chain::{Chain, VersionIndex};
use super::planted::{self, Defect};
use crate::store::{BlockIndex, BlockRange};

/// A block's bytes go from one version's layer into another's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copy {
    /// Whose layer has them.
    pub from: VersionIndex,
    /// Whose layer gets them.
    pub to: VersionIndex,
}

/// Which layers a write goes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Targets {
    /// One: the common case.
    One(VersionIndex),
    /// Several, ascending.
    Many(Vec<VersionIndex>),
}

impl Targets {
    /// The targets, ascending.
    #[must_use]
    pub fn as_slice(&self) -> &[VersionIndex] {
        match self {
            Targets::One(one) => std::slice::from_ref(one),
            Targets::Many(many) => many,
        }
    }
}

/// What to do with a block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockPlan {
    /// First save the old bytes for an older version that reads them here (figure 25, 2503-2504).
    pub preserve: Option<Copy>,
    /// The writing version does not own the block yet and will: the rest of a partly written block comes from this
    /// version's layer (figure 18, 1804; only when the pivot is older than the writer).
    pub adopt_from: Option<VersionIndex>,
    /// Then write here.
    pub targets: Targets,
}

/// Neighbouring blocks with the same plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// Which blocks.
    pub blocks: BlockRange,
    /// What to do with each.
    pub plan: BlockPlan,
}

/// What a write does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WritePlan {
    /// The version that the write belongs to.
    pub writer: VersionIndex,
    /// Its blocks, in order, in runs.
    pub runs: Vec<Run>,
}

impl BlockPlan {
    /// What a write of version `writer` does with `block`.
    #[must_use]
    pub fn decide(chain: &Chain, writer: VersionIndex, block: BlockIndex) -> BlockPlan {
        let preserve = chain.nearest_reader(writer, block).map(|to| Copy { from: chain.resolve(to, block), to });
        let (home, adopt_from) = if chain.pivot() >= writer {
            (chain.pivot(), None)
        } else {
            let owns = chain.layer(writer).owns(block);
            (writer, (!owns).then(|| chain.resolve(writer, block)))
        };
        // Versions from the writer's on that have bytes of their own for this block must get the write as well
        // (002 [0051]: writes to VLUN A are applied to VLUN B, not the other way round).
        let other = |i: &VersionIndex| *i != home && chain.layer(*i).owns(block);
        let mut others = (writer..=chain.live()).filter(other).peekable();
        let targets = if others.peek().is_none() || planted::is(Defect::DrainNotMirrored) {
            Targets::One(home)
        } else {
            let mut many: Vec<VersionIndex> = others.chain([home]).collect();
            many.sort_unstable();
            Targets::Many(many)
        };
        BlockPlan { preserve, adopt_from, targets }
    }

    /// Whether it copies, takes over or writes to several places, and so must be alone on the block.
    #[must_use]
    pub fn excludes(&self) -> bool {
        self.preserve.is_some() || self.adopt_from.is_some() || matches!(self.targets, Targets::Many(_))
    }
}

impl WritePlan {
    /// What a write of version `writer` to `blocks` does.
    #[must_use]
    pub fn decide(chain: &Chain, writer: VersionIndex, blocks: BlockRange) -> WritePlan {
        if chain.live() == 0 {
            // No other version, no table to look at: the common case.
            let plan = BlockPlan { preserve: None, adopt_from: None, targets: Targets::One(0) };
            return WritePlan { writer, runs: vec![Run { blocks, plan }] };
        }
        let mut runs: Vec<Run> = Vec::with_capacity(1);
        for block in blocks.iter() {
            let plan = BlockPlan::decide(chain, writer, block);
            match runs.last_mut() {
                Some(run) if run.plan == plan => run.blocks.end = BlockIndex(block.0 + 1),
                _ => runs.push(Run { blocks: BlockRange::one(block), plan }),
            }
        }
        WritePlan { writer, runs }
    }

    /// Whether any of its blocks must be locked exclusively.
    #[must_use]
    pub fn excludes(&self) -> bool {
        self.runs.iter().any(|run| run.plan.excludes())
    }

    /// The one layer that all bytes go to as they are, if there is one.
    #[must_use]
    pub fn single_target(&self) -> Option<VersionIndex> {
        let mut targets = self.runs.iter().map(|run| match (&run.plan.targets, run.plan.adopt_from) {
            (Targets::One(one), None) => Some(*one),
            _ => None,
        });
        let first = targets.next()??;
        targets.all(|t| t == Some(first)).then_some(first)
    }
}
