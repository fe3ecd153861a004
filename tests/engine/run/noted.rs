//! What the engine says has changed, held against the arrays: each block that differs between two moments is in it. And
//! no block is in it that nobody wrote in between, but for discards, which may be carried out later, and for writes that came
//! when their epoch was over: where they go to several places they are noted for all.

use std::sync::Arc;

use halfsilver::engine::{ChangeSource, Changes, Epoch, NoChanges, Version};
use halfsilver::store::{BlockIndex, Table};

use super::Run;
use crate::sim::{Rng, SECTOR};
use crate::world::{Moment, Tags};

/// What a run does beside the rest, by a generator of its own: the rest stays as it was for each seed.
pub struct Noting {
    rng: Rng,
    /// Some cuts of this run make no table.
    some_unknown: bool,
    /// None does.
    never: bool,
    /// A cut made none.
    any_unknown: bool,
}

impl Noting {
    pub fn of(seed: u64) -> Noting {
        let mut rng = Rng::new(seed ^ 0xc4a6_ed00);
        let (never, some_unknown) = (rng.chance(15), rng.chance(20));
        Noting { rng, some_unknown, never, any_unknown: false }
    }
}

/// One end of a difference.
struct End {
    moment: Moment,
    /// None is the present.
    version: Option<uuid::Uuid>,
}

impl Run {
    /// The dirty bitmap for a version that begins with a cut.
    pub(super) fn changed_table(&mut self) -> Option<Arc<Table>> {
        let without = self.noting.never || self.noting.some_unknown && self.noting.rng.chance(30);
        self.noting.any_unknown |= without;
        (!without).then(|| Arc::new(self.shape.table(self.sectors)))
    }

    /// Decides whether a mark of a version stays that is about to be deleted.
    pub(super) fn leave_mark(&mut self, version: &Version) {
        // Of one that broke while it drained the rest was noted for the next one.
        version.set_leaves_mark(self.noting.rng.chance(40) && version.broken().is_none());
    }

    /// Now and then forgets a mark.
    pub(super) fn forget_mark(&mut self) {
        let marks = self.disk.marks();
        if !marks.is_empty() && self.noting.rng.chance(2) {
            let which = self.noting.rng.below(marks.len());
            self.forget(marks[which].id);
        }
    }

    pub(super) fn forget_marks(&mut self) {
        self.disk.marks().iter().for_each(|mark| self.forget(mark.id));
    }

    fn forget(&self, id: uuid::Uuid) {
        self.editor.forget_mark(&self.disk, id);
        self.world.borrow_mut().marks.retain(|mark| mark.id != id);
        self.world.borrow_mut().counts.marks_forgotten += 1;
    }

    pub(super) fn sometimes_compare_moments(&mut self) {
        if self.noting.rng.chance(4) {
            self.compare_moments();
        }
    }

    /// Each moment that is settled with each later one, and with the present.
    pub(super) fn compare_moments(&mut self) {
        let mut ends: Vec<End> = Vec::new();
        {
            let world = self.world.borrow();
            let quiesced = world.arrays.iter().filter(|a| a.version.as_ref().is_some_and(|v| v.is_quiesced()));
            for array in quiesced {
                let version = array.version.as_ref().unwrap();
                let moment = Moment { id: version.id, ended: array.ended.unwrap(), sectors: array.sectors.clone() };
                ends.push(End { version: Some(version.id), moment });
            }
            ends.extend(world.marks.iter().map(|m| End { version: Some(m.id), moment: m.clone() }));
            let live = world.arrays.last().unwrap();
            let moment = Moment { id: uuid::Uuid::nil(), ended: Epoch(u64::MAX), sectors: live.sectors.clone() };
            ends.push(End { version: None, moment });
        }
        ends.sort_by_key(|end| end.moment.ended);
        for (i, from) in ends.iter().enumerate() {
            for to in &ends[i + 1..] {
                self.compare(from, to);
            }
        }
    }

    fn compare(&mut self, from: &End, to: &End) {
        let Some(first) = from.version else { return };
        let what = format!("changes from epoch {} to {}", from.moment.ended, to.moment.ended);
        let mut world = self.world.borrow_mut();
        let is_mark = world.marks.iter().any(|mark| mark.id == first);
        let changes = match self.disk.changes(first, to.version) {
            Ok(changes) => changes,
            // Of what is lost nothing is said.
            Err(NoChanges::Broken(_)) if world.any_fault => return,
            Err(NoChanges::Unknown(_)) if self.noting.any_unknown => {
                world.counts.unknown_changes += 1;
                return;
            }
            Err(e) => return world.fail(format!("{what}: {e}")),
        };
        world.counts.comparisons += 1;
        world.counts.comparisons_of_marks += u64::from(is_mark);
        world.counts.comparisons_by_owners += u64::from(changes.source() == ChangeSource::Owned);
        let block_sectors = self.shape.block / SECTOR;
        let (before, after) = (from.moment.sectors.len(), to.moment.sectors.len());
        if changes.blocks() != after.div_ceil(block_sectors) as u64 {
            return world.fail(format!("{what}: of {} blocks, and {after} sectors", changes.blocks()));
        }
        world.counts.comparisons_across_sizes += u64::from(before < after);
        for block in 0..after.div_ceil(block_sectors) {
            let sectors = block * block_sectors..((block + 1) * block_sectors).min(after);
            let is_in = changes.contains(BlockIndex(block as u64));
            // What the older one does not have is other content, whatever it is.
            let is_new = sectors.end > before && before < after;
            if is_new && !is_in {
                return world.fail(format!("{what}: block {block} is new, and is not among them"));
            }
            if is_new {
                continue;
            }
            let differs = |s: &usize| from.moment.sectors[*s].is_disjoint(&to.moment.sectors[*s]);
            if let Some(sector) = sectors.clone().find(differs).filter(|_| !is_in) {
                let (was, is) = (&from.moment.sectors[sector], &to.moment.sectors[sector]);
                let source = changes.source();
                let e = format!("{what}, {source:?}: sector {sector} was {was:?}, is {is:?}, and is not among them");
                return world.fail(e);
            }
            // A request of a version that broke goes on with the next one.
            let is_exact = changes.source() == ChangeSource::Changed && !self.shape.faults;
            let wrote = world.written.iter().any(|w| {
                let in_between = (w.is_late || w.epoch > from.moment.ended) && w.epoch <= to.moment.ended;
                in_between && w.sectors.start < sectors.end && sectors.start < w.sectors.end
            });
            if is_in && !wrote && is_exact {
                return world.fail(format!("{what}: block {block} is among them, and nobody wrote it"));
            }
        }
        if let Err(e) = runs_are_whole(&changes) {
            world.fail(format!("{what}: {e}"));
        }
    }
}

/// The runs have the same blocks, are in order and do not touch.
fn runs_are_whole(changes: &Changes) -> Result<(), String> {
    let one_by_one: Vec<u64> = (0..changes.blocks()).filter(|&b| changes.contains(BlockIndex(b))).collect();
    let runs: Vec<_> = changes.clone().into_runs().collect();
    let in_runs: Vec<u64> = runs.iter().flat_map(|run| run.iter()).map(|block| block.0).collect();
    if one_by_one != in_runs || changes.count() != one_by_one.len() as u64 {
        return Err(format!("the runs {runs:?} are not the blocks {one_by_one:?}"));
    }
    match runs.windows(2).any(|two| two[0].end >= two[1].start) {
        true => Err(format!("the runs {runs:?} touch")),
        false => Ok(()),
    }
}

/// What a moment that is remembered showed.
pub(super) fn moment_of(version: &Version, ended: Epoch, sectors: Vec<Tags>) -> Moment {
    Moment { id: version.id, ended, sectors }
}
