//! The specification: one array of bytes a version (design: "The oracle").
//!
//! A sector is a tag, repeated; the array holds for each sector the set of tags it may show. A set has more than one
//! member only where the guest left the order open (overlapping requests in flight) or gave the bytes away (discards).

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use halfsilver::engine::{Epoch, Version};
use halfsilver::image::{AlignedBuf, GuestBuf};

use crate::sim::SECTOR;

pub type Tags = BTreeSet<u64>;

/// What one version may show.
#[derive(Clone)]
pub struct Array {
    pub key: u64,
    /// The last epoch that belongs to it; None for the live one.
    pub ended: Option<Epoch>,
    pub version: Option<Arc<Version>>,
    pub sectors: Vec<Tags>,
}

impl Array {
    /// Whether a change of `epoch` changes this version: every version from the change's own to the live one.
    pub fn sees(&self, epoch: Epoch) -> bool {
        self.ended.is_none_or(|ended| epoch <= ended)
    }

    /// Those of some sectors that it has. Only requests of a version that broke, which go on with a newer one, reach behind
    /// its end.
    pub fn has_of(&self, sectors: &Range<usize>) -> Range<usize> {
        let (end, len) = (sectors.end, self.sectors.len());
        let is_broken = || self.version.as_ref().is_some_and(|version| version.broken().is_some());
        assert!(end <= len || is_broken(), "a request behind the end of its version");
        sectors.start.min(len)..end.min(len)
    }
}

/// A frozen version that was deleted, of which the engine keeps a mark.
#[derive(Clone)]
pub struct Moment {
    pub id: uuid::Uuid,
    pub ended: Epoch,
    pub sectors: Vec<Tags>,
}

/// A change that there was.
pub struct Written {
    pub id: u64,
    pub epoch: Epoch,
    pub sectors: Range<usize>,
    /// Whether it came when its epoch was over, or was still in flight then, or may be carried out later.
    pub is_late: bool,
}

/// A change in flight.
pub struct Change {
    pub id: u64,
    pub epoch: Epoch,
    pub sectors: Range<usize>,
    pub tag: u64,
    pub is_discard: bool,
    /// Sectors on which another change was in flight at some time during this one.
    pub contested: BTreeSet<usize>,
}

/// A read in flight and what each of its sectors may have shown so far.
pub struct Watch {
    pub id: u64,
    pub keys: Vec<u64>,
    pub first: usize,
    pub allowed: Vec<Tags>,
}

/// What a run got to do: the rare states are counted, so that a test can insist on them.
#[derive(Default, Debug, Clone)]
pub struct Counts {
    pub operations: u64,
    pub cuts: u64,
    pub deletes: u64,
    pub deletes_in_the_middle: u64,
    pub draining_changes: u64,
    pub broken: u64,
    pub refused_reads: u64,
    pub discards: u64,
    pub deferred: u64,
    pub frozen_reads: u64,
    pub preserved_blocks: u64,
    pub holes_kept: u64,
    pub logs: u64,
    pub packs: u64,
    pub saved_durably: u64,
    pub splits: u64,
    pub splits_of_pairs: u64,
    pub folds: u64,
    pub held: u64,
    pub comparisons: u64,
    pub comparisons_of_marks: u64,
    pub comparisons_by_owners: u64,
    pub unknown_changes: u64,
    pub marks_forgotten: u64,
    pub by_connection: u64,
    pub moved: u64,
    pub growths: u64,
    pub growths_under_snapshots: u64,
    pub reads_behind_the_end: u64,
    pub comparisons_across_sizes: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Counts) {
        self.operations += other.operations;
        self.cuts += other.cuts;
        self.deletes += other.deletes;
        self.deletes_in_the_middle += other.deletes_in_the_middle;
        self.draining_changes += other.draining_changes;
        self.broken += other.broken;
        self.refused_reads += other.refused_reads;
        self.discards += other.discards;
        self.deferred += other.deferred;
        self.frozen_reads += other.frozen_reads;
        self.preserved_blocks += other.preserved_blocks;
        self.holes_kept += other.holes_kept;
        self.logs += other.logs;
        self.packs += other.packs;
        self.saved_durably += other.saved_durably;
        self.splits += other.splits;
        self.splits_of_pairs += other.splits_of_pairs;
        self.folds += other.folds;
        self.held += other.held;
        self.comparisons += other.comparisons;
        self.comparisons_of_marks += other.comparisons_of_marks;
        self.comparisons_by_owners += other.comparisons_by_owners;
        self.unknown_changes += other.unknown_changes;
        self.marks_forgotten += other.marks_forgotten;
        self.by_connection += other.by_connection;
        self.moved += other.moved;
        self.growths += other.growths;
        self.growths_under_snapshots += other.growths_under_snapshots;
        self.reads_behind_the_end += other.reads_behind_the_end;
        self.comparisons_across_sizes += other.comparisons_across_sizes;
    }
}

#[derive(Default)]
pub struct World {
    pub arrays: Vec<Array>,
    pub changes: Vec<Change>,
    pub watches: Vec<Watch>,
    pub marks: Vec<Moment>,
    pub written: Vec<Written>,
    pub counts: Counts,
    pub failure: Option<String>,
    pub next: u64,
    /// Whether some image, perhaps of a version that is gone, was made to fail: older versions read through it.
    pub any_fault: bool,
}

impl World {
    /// How many sectors a version has.
    pub fn size_of(&self, key: u64) -> usize {
        self.arrays.iter().find(|array| array.key == key).map_or(0, |array| array.sectors.len())
    }

    pub fn fail(&mut self, what: String) {
        self.failure.get_or_insert(what);
    }

    pub fn begin_change(&mut self, epoch: Epoch, sectors: Range<usize>, tag: u64, is_discard: bool) -> u64 {
        self.next += 1;
        if std::env::var_os("ORACLE_TRACE").is_some() {
            println!("{}: change begins: epoch {epoch} sectors {sectors:?} tag {tag} discard {is_discard}", self.next);
        }
        let mut contested = BTreeSet::new();
        for other in &mut self.changes {
            for s in other.sectors.clone().filter(|s| sectors.contains(s)) {
                other.contested.insert(s);
                contested.insert(s);
            }
        }
        for array in self.arrays.iter_mut().filter(|a| a.sees(epoch)) {
            for s in array.has_of(&sectors) {
                array.sectors[s].insert(tag);
            }
            for watch in self.watches.iter_mut().filter(|w| w.keys.contains(&array.key)) {
                for s in sectors.clone() {
                    if let Some(allowed) = s.checked_sub(watch.first).and_then(|i| watch.allowed.get_mut(i)) {
                        allowed.insert(tag);
                    }
                }
            }
        }
        let is_late = is_discard || self.arrays.iter().any(|a| a.ended.is_some_and(|ended| epoch <= ended));
        self.written.push(Written { id: self.next, epoch, sectors: sectors.clone(), is_late });
        self.changes.push(Change { id: self.next, epoch, sectors, tag, is_discard, contested });
        self.next
    }

    pub fn end_change(&mut self, id: u64) {
        let i = self.changes.iter().position(|c| c.id == id).unwrap();
        let change = self.changes.swap_remove(i);
        if std::env::var_os("ORACLE_TRACE").is_some() {
            println!("{id}: change ends, contested {:?}", change.contested);
        }
        if change.is_discard {
            return;
        }
        for array in self.arrays.iter_mut().filter(|a| a.sees(change.epoch)) {
            for s in array.has_of(&change.sectors).filter(|s| !change.contested.contains(s)) {
                array.sectors[s] = Tags::from([change.tag]);
            }
        }
    }

    pub fn begin_read(&mut self, keys: Vec<u64>, sectors: Range<usize>) -> u64 {
        self.next += 1;
        let mut allowed = vec![Tags::new(); sectors.len()];
        for array in self.arrays.iter().filter(|a| keys.contains(&a.key)) {
            for (set, s) in allowed.iter_mut().zip(array.has_of(&sectors)) {
                set.extend(&array.sectors[s]);
            }
        }
        self.watches.push(Watch { id: self.next, keys, first: sectors.start, allowed });
        self.next
    }

    pub fn end_read(&mut self, id: u64, got: &[u8], what: &str) {
        let i = self.watches.iter().position(|w| w.id == id).unwrap();
        let watch = self.watches.swap_remove(i);
        for (i, (sector, allowed)) in got.chunks(SECTOR).zip(&watch.allowed).enumerate() {
            let s = watch.first + i;
            match tag_of(sector) {
                Some(tag) if allowed.contains(&tag) => {
                    // A frozen version never changes again: what it has shown once, it shows for ever.
                    if let [key] = watch.keys[..]
                        && let Some(array) = self.arrays.iter_mut().find(|a| a.key == key)
                        && array.version.as_ref().is_some_and(|v| v.is_quiesced())
                    {
                        array.sectors[s] = Tags::from([tag]);
                    }
                }
                Some(tag) => self.fail(format!("{what}: sector {s} shows {tag}, allowed {allowed:?}")),
                None => self.fail(format!("{what}: sector {s} is torn")),
            }
        }
    }
}

pub fn tag_of(sector: &[u8]) -> Option<u64> {
    let mut words = sector.chunks(8).map(|w| u64::from_le_bytes(w.try_into().unwrap()));
    let first = words.next()?;
    words.all(|w| w == first).then_some(first)
}

pub fn filled(sectors: usize, tag: u64) -> GuestBuf {
    let mut memory = AlignedBuf::zeroed(sectors * SECTOR);
    memory.chunks_mut(8).for_each(|w| w.copy_from_slice(&tag.to_le_bytes()));
    GuestBuf::from_owned(memory).0
}
