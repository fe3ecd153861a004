//! What a run of kills got to do: the rare states are counted, and a run that has not reached one of them goes on.

use std::collections::BTreeMap;

use super::vm::{KINDS, Kind};

/// What a run got to do.
#[derive(Default, Debug)]
pub(super) struct Counts {
    pub(super) kills: usize,
    pub(super) in_flight: BTreeMap<&'static str, usize>,
    /// Kills amid something, by name.
    pub(super) amid: BTreeMap<&'static str, usize>,
    pub(super) taken: BTreeMap<String, usize>,
    pub(super) groups: usize,
    pub(super) commands_lost_and_done: usize,
    pub(super) commands_lost_and_not_done: usize,
    pub(super) outlived: usize,
    pub(super) deaths_max: usize,
    pub(super) answered: u64,
    pub(super) snapshots_checked: usize,
}

const AMID: [&str; 11] = [
    "start",
    "connecting",
    "load",
    "create",
    "create of a group",
    "draining",
    "cutover",
    "delete",
    "merge",
    "fold",
    "resync",
];
pub(super) const STRATEGIES: [&str; 3] = ["copy-on-write", "write-logging", "write-mirroring"];

impl Counts {
    pub(super) fn amid(&mut self, what: &'static str) {
        assert!(AMID.contains(&what));
        *self.amid.entry(what).or_default() += 1;
    }

    /// The first rare state that was not seen.
    pub(super) fn missing(&self) -> Option<String> {
        let kind = KINDS.into_iter().map(name_of).find(|kind| !self.in_flight.contains_key(kind));
        let amid = AMID.into_iter().find(|what| !self.amid.contains_key(what));
        let strategy = STRATEGIES.into_iter().find(|s| !self.taken.contains_key(*s));
        let said = |what: &str, which: &str| format!("{what}: {which}");
        kind.map(|k| said("nothing of this kind was in flight", k))
            .or_else(|| amid.map(|a| said("no kill amid", a)))
            .or_else(|| strategy.map(|s| said("no snapshot by", s)))
            .or_else(|| (self.groups == 0).then(|| said("no snapshot of", "a group")))
            .or_else(|| {
                (self.commands_lost_and_done == 0).then(|| said("no lost answer of", "a command that was done"))
            })
            .or_else(|| (self.commands_lost_and_not_done == 0).then(|| said("no lost answer of", "one that was not")))
    }

    /// Every rare state was seen.
    pub(super) fn require_all_reached(&self) {
        assert_eq!(self.missing(), None);
        assert!(self.outlived > 0 && self.deaths_max > 1, "no request has outlived two daemons");
    }
}

pub(super) fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Read => "read",
        Kind::Write => "write",
        Kind::WriteZeroes => "write-zeroes",
        Kind::Discard => "discard",
        Kind::Flush => "flush",
    }
}
