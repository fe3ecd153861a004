//! Where the blocks of a pack are, and which of its units are free. Pure memory: nothing is read or written here.
//!
//! What always holds:
//! - A unit is in use from the moment it is given out. It is given out again only when a header that supersedes all that
//!   was there has arrived and was synced, and no read that began before that is under way.
//! - Of two headers that name a block the one with the higher sequence is right, in whichever order they arrive.
//! - That a block is zeros is remembered like a place: an older header may still name a place for it.
//! - Headers are only ever where a header was first, so that whoever walks from one to the next by their spans meets all.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque, hash_map};
use std::hash::{BuildHasherDefault, Hasher};

use super::format::{Entry, Place};

/// Free units that are kept to be written again; others are given back to the file system, if that can be done.
const KEPT_UNITS_MAX: u32 = 4096;

/// A run of units.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Units {
    pub(super) start: u32,
    pub(super) count: u32,
}

/// Spreads numbers of blocks that follow each other.
#[derive(Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u32(u32::from(byte)));
    }
    fn write_u32(&mut self, number: u32) {
        let mixed = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

type ByBlock<T> = HashMap<u32, T, BuildHasherDefault<NumberHasher>>;

/// What a pack has of a block.
#[derive(Clone, Copy)]
struct Held {
    /// 0 if it is zeros.
    place: u32,
    header: u32,
}

/// A header, or the place of one.
#[derive(Clone, Copy, Debug)]
struct Slot {
    place: u32,
    span: u32,
    sequence: u64,
    /// How many blocks have their bytes by it.
    live: u32,
}

/// Units that nothing names any more.
#[derive(Default)]
struct Freed {
    units: Vec<Units>,
    slots: Vec<u32>,
}

/// Units for what is written at once.
pub(super) struct Grant {
    slot: u32,
    pub(super) header: Place,
    pub(super) span: u32,
    pub(super) sequence: u64,
    pub(super) arrived: u64,
    pub(super) synced: u64,
    /// For the bytes of the blocks, one after the other.
    pub(super) units: Vec<Units>,
}

/// A sync that has begun.
pub(super) struct Syncing {
    arrived: u64,
    freed: Freed,
}

/// The places of a pack.
pub(super) struct Places {
    block_units: u32,
    units: u32,
    /// From here on nothing was ever written.
    high: u32,
    blocks: ByBlock<Held>,
    slots: Vec<Slot>,
    free_slots: Vec<u32>,
    free: BTreeMap<u32, u32>,
    free_units: u32,
    /// Free too, and given back to the file system.
    holes: Vec<Units>,
    next_sequence: u64,
    in_flight: BTreeSet<u64>,
    synced: u64,
    /// What became free since a sync began last.
    superseded: Freed,
    superseded_units: u32,
    /// What reads may still be at.
    leaving: VecDeque<(u64, Freed)>,
    generation: u64,
    reads: BTreeMap<u64, u32>,
}

impl Places {
    /// Of an empty pack of so many units, the first of which is not given out.
    pub(super) fn new(block_units: u32, units: u32) -> Places {
        Places {
            block_units,
            units,
            high: 1,
            blocks: HashMap::default(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            free: BTreeMap::new(),
            free_units: 0,
            holes: Vec::new(),
            next_sequence: 1,
            in_flight: BTreeSet::new(),
            synced: 0,
            superseded: Freed::default(),
            superseded_units: 0,
            leaving: VecDeque::new(),
            generation: 0,
            reads: BTreeMap::new(),
        }
    }

    /// Takes a header up, after all those with higher sequences.
    pub(super) fn take_up(&mut self, place: Place, span: u32, sequence: u64, entries: &[Entry]) {
        let slot = u32::try_from(self.slots.len()).expect("fewer than units");
        self.slots.push(Slot { place: place.0, span, sequence, live: 0 });
        self.high = self.high.max(place.0 + span);
        self.next_sequence = self.next_sequence.max(sequence + 1);
        // Of two entries for a block the later one is right.
        for entry in entries.iter().rev() {
            let place = entry.bytes.map_or(0, |(place, _)| place.0);
            self.high = self.high.max(place + self.block_units);
            if let hash_map::Entry::Vacant(vacant) = self.blocks.entry(number(entry.block)) {
                vacant.insert(Held { place, header: slot });
                self.slots[slot as usize].live += 1;
            }
        }
    }

    /// Ends the taking up: what no header names is free once that is synced. `end` is where nothing was ever written.
    pub(super) fn taken_up(&mut self, end: u32) {
        self.high = self.high.max(end.min(self.units));
        let mut used: Vec<Units> = self.slots.iter().map(|slot| Units { start: slot.place, count: 1 }).collect();
        let held = self.blocks.values().filter(|held| held.place > 0);
        used.extend(held.map(|held| Units { start: held.place, count: self.block_units }));
        used.sort_unstable_by_key(|units| units.start);
        let mut next = 1;
        for units in used {
            if units.start > next {
                self.supersede(Units { start: next, count: units.start - next });
            }
            next = next.max(units.start + units.count);
        }
        if self.high > next {
            self.supersede(Units { start: next, count: self.high - next });
        }
        let dead = (0u32..).zip(&self.slots).filter(|(_, slot)| slot.live == 0).map(|(at, _)| at);
        self.superseded.slots.extend(dead);
    }

    /// Whether a header that was taken up, or has arrived, names the block.
    pub(super) fn knows(&self, block: u64) -> bool {
        self.blocks.contains_key(&number(block))
    }

    /// How many blocks it has, zeros too.
    pub(super) fn count(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// The place of a block; None if it is zeros.
    pub(super) fn place_of(&self, block: u64) -> Option<Place> {
        self.blocks.get(&number(block)).filter(|held| held.place > 0).map(|held| Place(held.place))
    }

    /// Begins a read of what is in its place now.
    pub(super) fn begin_read(&mut self) -> u64 {
        *self.reads.entry(self.generation).or_default() += 1;
        self.generation
    }

    /// Ends a read.
    pub(super) fn end_read(&mut self, generation: u64) {
        if let Some(count) = self.reads.get_mut(&generation) {
            *count -= 1;
            if *count == 0 {
                self.reads.remove(&generation);
                self.let_go();
            }
        }
    }

    /// Units for a header and the bytes of so many blocks. None if there is no room.
    pub(super) fn grant(&mut self, blocks: u32) -> Option<Grant> {
        let need = blocks * self.block_units;
        let kept = (self.units / 64).clamp(1, KEPT_UNITS_MAX);
        let reuses = self.free_units >= need.max(kept);
        let (slot, units) = match reuses {
            true => self.grant_again(need).or_else(|| self.grant_new(need)),
            false => self.grant_new(need).or_else(|| {
                std::mem::take(&mut self.holes).into_iter().for_each(|units| self.add_free(units));
                self.grant_again(need)
            }),
        }?;
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let Slot { place, span, .. } = self.slots[slot as usize];
        self.slots[slot as usize].sequence = sequence;
        // It has not arrived itself.
        self.in_flight.insert(sequence);
        let arrived = self.arrived();
        Some(Grant { slot, header: Place(place), span, sequence, arrived, synced: self.synced, units })
    }

    /// The highest sequence of which all up to it have arrived.
    fn arrived(&self) -> u64 {
        self.in_flight.first().map_or(self.next_sequence, |first| *first) - 1
    }

    fn grant_new(&mut self, need: u32) -> Option<(u32, Vec<Units>)> {
        let (place, span) = (self.high, need + 1);
        if self.units - self.high < span {
            return None;
        }
        self.high += span;
        let units = Units { start: place + 1, count: need };
        Some((self.add_slot(place, span), Some(units).filter(|units| units.count > 0).into_iter().collect()))
    }

    fn add_slot(&mut self, place: u32, span: u32) -> u32 {
        self.slots.push(Slot { place, span, sequence: 0, live: 0 });
        u32::try_from(self.slots.len() - 1).expect("fewer than units")
    }

    fn grant_again(&mut self, need: u32) -> Option<(u32, Vec<Units>)> {
        if self.free_slots.is_empty() && self.high == self.units {
            return None;
        }
        let units = self.take_free(need)?;
        let slot = self.free_slots.pop().unwrap_or_else(|| {
            self.high += 1;
            self.add_slot(self.high - 1, 1)
        });
        Some((slot, units))
    }

    /// Free units, in one run if there is one that is long enough.
    fn take_free(&mut self, need: u32) -> Option<Vec<Units>> {
        let block = self.block_units;
        let whole = |count: u32| count / block * block;
        let one = self.free.iter().find(|(_, count)| **count >= need).map(|(&start, _)| start);
        let starts: Vec<u32> = match one {
            Some(start) => vec![start],
            None if self.free.values().map(|&count| whole(count)).sum::<u32>() < need => return None,
            None => self.free.iter().filter(|(_, count)| **count >= block).map(|(&start, _)| start).collect(),
        };
        let (mut left, mut taken) = (need, Vec::new());
        for start in starts {
            if left == 0 {
                break;
            }
            let count = self.free.remove(&start).expect("it was found");
            let used = whole(count).min(left);
            taken.push(Units { start, count: used });
            if used < count {
                self.free.insert(start + used, count - used);
            }
            left -= used;
        }
        self.free_units -= need;
        Some(taken)
    }

    /// What was granted has arrived.
    pub(super) fn arrive(&mut self, grant: &Grant, entries: &[Entry]) {
        self.in_flight.remove(&grant.sequence);
        for entry in entries {
            let (block, place) = (number(entry.block), entry.bytes.map_or(0, |(place, _)| place.0));
            let now = Held { place, header: grant.slot };
            let gone = match self.blocks.get_mut(&block) {
                Some(held) if self.slots[held.header as usize].sequence > grant.sequence => place,
                Some(held) => {
                    let was = std::mem::replace(held, now);
                    self.slots[grant.slot as usize].live += 1;
                    let slot = &mut self.slots[was.header as usize];
                    slot.live -= 1;
                    if slot.live == 0 && was.header != grant.slot {
                        self.superseded.slots.push(was.header);
                        self.superseded_units += 1;
                    }
                    was.place
                }
                None => {
                    self.blocks.insert(block, now);
                    self.slots[grant.slot as usize].live += 1;
                    0
                }
            };
            if gone > 0 {
                self.supersede(Units { start: gone, count: self.block_units });
            }
        }
        if self.slots[grant.slot as usize].live == 0 {
            self.superseded.slots.push(grant.slot);
            self.superseded_units += 1;
        }
    }

    fn supersede(&mut self, units: Units) {
        self.superseded_units += units.count;
        self.superseded.units.push(units);
    }

    /// What was granted has failed. With `is_void`, what may have arrived of the header is gone; otherwise nobody knows
    /// what is there, and it is never given out again, nor do headers say that all have arrived.
    pub(super) fn fail(&mut self, grant: &Grant, is_void: bool) {
        if is_void {
            self.in_flight.remove(&grant.sequence);
            grant.units.iter().for_each(|&units| self.supersede(units));
            self.superseded.slots.push(grant.slot);
        }
    }

    /// Whether so much waits for a sync that one should be made.
    pub(super) fn wants_sync(&self) -> bool {
        self.superseded_units > (self.units / 8).clamp(16, 16 * KEPT_UNITS_MAX)
    }

    /// Whether a sync would make any unit free.
    pub(super) fn gains_by_sync(&self) -> bool {
        self.superseded_units > 0
    }

    /// Before a sync begins.
    pub(super) fn begin_sync(&mut self) -> Syncing {
        self.superseded_units = 0;
        Syncing { arrived: self.arrived(), freed: std::mem::take(&mut self.superseded) }
    }

    /// After it was done.
    pub(super) fn end_sync(&mut self, syncing: Syncing) {
        self.synced = self.synced.max(syncing.arrived);
        self.leaving.push_back((self.generation, syncing.freed));
        self.generation += 1;
        self.let_go();
    }

    fn let_go(&mut self) {
        let oldest_read = self.reads.keys().next().copied();
        while let Some((generation, _)) = self.leaving.front()
            && oldest_read.is_none_or(|oldest| oldest > *generation)
        {
            let (_, freed) = self.leaving.pop_front().expect("it is there");
            freed.slots.into_iter().for_each(|slot| self.free_slots.push(slot));
            freed.units.into_iter().for_each(|units| self.add_free(units));
        }
    }

    fn add_free(&mut self, units: Units) {
        self.free_units += units.count;
        let Units { mut start, mut count } = units;
        if let Some((&before, &len)) = self.free.range(..start).next_back()
            && before + len == start
        {
            self.free.remove(&before);
            (start, count) = (before, len + count);
        }
        if let Some(len) = self.free.remove(&(start + count)) {
            count += len;
        }
        self.free.insert(start, count);
    }

    /// Free units that are not kept, and are to be given back to the file system: taken out until that is done
    /// ([`Places::put_back`]).
    pub(super) fn take_surplus(&mut self) -> Vec<Units> {
        let kept = (self.units / 64).clamp(1, KEPT_UNITS_MAX);
        let mut surplus = Vec::new();
        while self.free_units > 2 * kept
            && let Some((start, count)) = self.free.pop_last()
        {
            self.free_units -= count;
            surplus.push(Units { start, count });
        }
        surplus
    }

    /// Puts back what was taken out by [`Places::take_surplus`].
    pub(super) fn put_back(&mut self, units: Units) {
        self.holes.push(units);
    }

    /// Bytes of memory that this takes, about.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        // One control byte an entry, and room for one in eight more.
        self.blocks.capacity() * 8 / 7 * (size_of::<(u32, Held)>() + 1)
            + self.slots.capacity() * size_of::<Slot>()
            + self.free.len() * 16
    }
}

/// A pack's disk has fewer blocks than fit here ([`super::Pack::units_of`]).
fn number(block: u64) -> u32 {
    u32::try_from(block).expect("a pack has fewer than 2^32 blocks")
}
