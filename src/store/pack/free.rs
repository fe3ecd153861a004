//! Which units of a pack are free, and sets of units.
//!
//! What always holds: runs are as long as they can be, no two of them touch each other.

use std::collections::BTreeMap;

/// Runs that are looked at for one that is long enough.
const LOOKS_MAX: usize = 64;

/// A run of units.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Units {
    pub(super) start: u32,
    pub(super) count: u32,
}

/// Runs of free units.
pub(super) struct FreeRuns {
    block_units: u32,
    pub(super) runs: BTreeMap<u32, u32>,
    pub(super) units: u32,
    /// Those of them that blocks can have: a block lies in one run.
    pub(super) usable: u32,
}

impl FreeRuns {
    /// None yet, for blocks of so many units.
    pub(super) fn of(block_units: u32) -> FreeRuns {
        FreeRuns { block_units, runs: BTreeMap::new(), units: 0, usable: 0 }
    }

    /// How many of so many units in a run blocks can have.
    pub(super) fn whole(&self, count: u32) -> u32 {
        count / self.block_units * self.block_units
    }

    /// Takes a run out. Returns how long it was.
    pub(super) fn remove(&mut self, start: u32) -> Option<u32> {
        let count = self.runs.remove(&start)?;
        self.units -= count;
        self.usable -= self.whole(count);
        Some(count)
    }

    /// Adds a run, which is joined with its neighbours.
    pub(super) fn add(&mut self, units: Units) {
        let Units { mut start, mut count } = units;
        if let Some((&before, &len)) = self.runs.range(..start).next_back()
            && before + len == start
        {
            self.remove(before);
            (start, count) = (before, len + count);
        }
        count += self.remove(start + count).unwrap_or(0);
        self.runs.insert(start, count);
        self.units += count;
        self.usable += self.whole(count);
    }

    /// Takes the beginning of a run.
    fn split(&mut self, start: u32, used: u32) -> Units {
        let count = self.remove(start).expect("it was found");
        if used < count {
            self.add(Units { start: start + used, count: count - used });
        }
        Units { start, count: used }
    }

    /// So many units in one run, if one of the first ones is long enough.
    pub(super) fn take_one(&mut self, need: u32) -> Option<Units> {
        let start = self.runs.iter().take(LOOKS_MAX).find(|(_, count)| **count >= need).map(|(&start, _)| start)?;
        Some(self.split(start, need))
    }

    /// As many units as can be had, `need` at most.
    pub(super) fn take_pieces(&mut self, need: u32) -> Vec<Units> {
        let (mut left, mut taken, mut from) = (need, Vec::new(), 0);
        while left > 0
            && let Some((&start, &count)) = self.runs.range(from..).find(|(_, count)| **count >= self.block_units)
        {
            let used = self.whole(count).min(left);
            taken.push(self.split(start, used));
            left -= used;
            from = start + used;
        }
        taken
    }
}

/// A set of units, one bit for each.
pub(super) struct UnitSet(Vec<u64>);

impl UnitSet {
    /// None of so many units.
    pub(super) fn none_of(units: u32) -> UnitSet {
        UnitSet(vec![0; units.div_ceil(64) as usize])
    }

    /// Adds a unit. False if it was there.
    pub(super) fn add(&mut self, unit: u32) -> bool {
        let (word, bit) = (&mut self.0[unit as usize / 64], 1 << (unit % 64));
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    pub(super) fn has(&self, unit: u32) -> bool {
        self.0[unit as usize / 64] & (1 << (unit % 64)) != 0
    }
}
