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
use std::task::Waker;

use super::format::{Entry, Place};
use super::free::{FreeRuns, UnitSet, Units};

/// Free units that are kept to be written again; others are given back to the file system, if that can be done.
const KEPT_UNITS_MAX: u32 = 4096;
/// Runs of units that one sync gives back at most.
const RUNS_MAX: usize = 64;

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

/// What is left of a write that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Left {
    /// Nothing counts: its header is void.
    Nothing,
    /// Perhaps a header, which can be made void: nothing arrives any more.
    Header,
    /// Nobody knows, and it may still be under way.
    Anything,
}

/// A write that failed, whose header is to be made void.
pub(super) struct Doubt {
    slot: u32,
    pub(super) header: Place,
    sequence: u64,
    units: Vec<Units>,
}

/// What can be done when there is no room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Relief {
    /// A sync makes units free.
    Sync,
    /// Headers of failed writes are made void.
    Void,
    /// Units become free when what others do ends.
    Wait,
    /// There is none.
    Never,
}

/// The places of a pack.
pub(super) struct Places {
    block_units: u32,
    /// How many blocks the disk has.
    disk_blocks: u32,
    units: u32,
    /// From here on nothing was ever written.
    high: u32,
    blocks: ByBlock<Held>,
    slots: Vec<Slot>,
    free_slots: Vec<u32>,
    free: FreeRuns,
    /// Free too, and given back to the file system.
    holes: Vec<Units>,
    /// Units that are being given back.
    releasing: u32,
    next_sequence: u64,
    in_flight: BTreeSet<u64>,
    /// Those of which nobody knows what has arrived, with the blocks that they name, and how many name a block: each may
    /// count some day.
    unknown: BTreeMap<u64, Vec<u32>>,
    unknown_blocks: ByBlock<u32>,
    /// Those of them that can be made void, and how many are just being made.
    doubts: Vec<Doubt>,
    voiding: u32,
    synced: u64,
    /// Syncs that are under way.
    syncing: u32,
    /// What became free since a sync began last.
    superseded: Freed,
    superseded_units: u32,
    /// What reads may still be at.
    leaving: VecDeque<(u64, Freed)>,
    generation: u64,
    reads: BTreeMap<u64, u32>,
    /// Who waits for room.
    waiting: Vec<Waker>,
}

impl Places {
    /// Of an empty pack of so many units, the first of which is not given out.
    pub(super) fn new(block_units: u32, disk_blocks: u32, units: u32) -> Places {
        Places {
            block_units,
            disk_blocks,
            units,
            high: 1,
            blocks: HashMap::default(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            free: FreeRuns::of(block_units),
            holes: Vec::new(),
            releasing: 0,
            next_sequence: 1,
            in_flight: BTreeSet::new(),
            unknown: BTreeMap::new(),
            unknown_blocks: HashMap::default(),
            doubts: Vec::new(),
            voiding: 0,
            synced: 0,
            syncing: 0,
            superseded: Freed::default(),
            superseded_units: 0,
            leaving: VecDeque::new(),
            generation: 0,
            reads: BTreeMap::new(),
            waiting: Vec::new(),
        }
    }

    /// Units beyond those that a full disk with a header for each block takes.
    fn slack(&self) -> u32 {
        let full = u64::from(self.disk_blocks) * u64::from(self.block_units + 1);
        u32::try_from(u64::from(self.units - 1).saturating_sub(full)).expect("fewer than units")
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

    /// The place of a header that does not count: one can be written there again.
    pub(super) fn take_up_place(&mut self, place: Place, span: u32) {
        self.high = self.high.max(place.0 + span);
        self.slots.push(Slot { place: place.0, span, sequence: 0, live: 0 });
    }

    /// Ends the taking up: what no header names is free once that is synced. `end` is where nothing was ever written. False
    /// if two things are said to be in the same place.
    #[must_use]
    pub(super) fn taken_up(&mut self, end: u32) -> bool {
        self.high = self.high.max(end.min(self.units));
        let (mut used, mut led_over) = (UnitSet::none_of(self.high), UnitSet::none_of(self.high));
        used.add(0);
        let held = self.blocks.values().filter(|held| held.place > 0);
        let of_blocks = held.flat_map(|held| held.place..held.place + self.block_units);
        if !self.slots.iter().map(|slot| slot.place).chain(of_blocks).all(|unit| used.add(unit)) {
            return false;
        }
        for unit in self.slots.iter().flat_map(|slot| slot.place + 1..slot.place + slot.span) {
            led_over.add(unit);
        }
        let dead = (0u32..).zip(&self.slots).filter(|(_, slot)| slot.live == 0).map(|(at, _)| at);
        let dead: Vec<u32> = dead.collect();
        dead.into_iter().for_each(|slot| self.supersede_slot(slot));
        let (mut at, high) = (1, self.high);
        while at < high {
            let end = (at..high).find(|&unit| used.has(unit)).unwrap_or(high);
            let covered = (at..end).find(|&unit| !led_over.has(unit)).unwrap_or(end);
            self.take_up_gap(at, end, covered);
            at = (end..high).find(|&unit| !used.has(unit)).unwrap_or(high);
        }
        true
    }

    /// All that was taken up is on stable storage.
    pub(super) fn was_synced(&mut self) {
        self.synced = self.next_sequence - 1;
    }

    /// Units that nothing is in. From `covered` on no header's span leads over them, so that headers can be there again: as
    /// many as a header for each block takes, or each power cut would leave fewer places for headers.
    fn take_up_gap(&mut self, start: u32, end: u32, covered: u32) {
        let mut from = covered;
        let (open, wanted) = (end - from, self.disk_blocks + self.slack() / 2);
        let missing = wanted.saturating_sub(self.slots_len());
        let headers = open.div_ceil(self.block_units + 1).min(missing);
        let odd = (open - headers) % self.block_units;
        for _ in 0..headers + odd {
            let slot = self.add_slot(from, 1);
            self.supersede_slot(slot);
            from += 1;
        }
        for (start, end) in [(start, covered), (from, end)] {
            if end > start {
                self.supersede(Units { start, count: end - start });
            }
        }
    }

    /// Takes those out in which a block is that counts. `units` are in order.
    pub(super) fn without_held(&self, units: &mut Vec<Place>) {
        for held in self.blocks.values().filter(|held| held.place > 0) {
            let first = units.partition_point(|unit| unit.0 < held.place);
            let count = units[first..].iter().take_while(|unit| unit.0 < held.place + self.block_units).count();
            units.drain(first..first + count);
        }
    }

    /// Whether a header that was taken up, or has arrived, names the block.
    pub(super) fn knows(&self, block: u64) -> bool {
        self.blocks.contains_key(&number(block))
    }

    /// Whether a block is zeros, and is found as zeros by whoever takes the pack up.
    pub(super) fn is_zeros(&self, block: u64) -> bool {
        let block = number(block);
        self.blocks.get(&block).is_none_or(|held| held.place == 0) && !self.unknown_blocks.contains_key(&block)
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
        let (slot, units) = self.grant_units(blocks * self.block_units)?;
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
        let unknown = self.unknown.first_key_value().map(|(first, _)| first);
        let open = [self.in_flight.first(), unknown].into_iter().flatten().min();
        open.map_or(self.next_sequence, |first| *first) - 1
    }

    fn slots_len(&self) -> u32 {
        u32::try_from(self.slots.len()).expect("fewer than units")
    }

    fn kept(&self) -> u32 {
        (self.units / 64).clamp(1, KEPT_UNITS_MAX)
    }

    /// Whether enough new units are left after a header and so many behind it: for the places of headers and blocks that a
    /// full disk with a header for each block takes and that are not there yet, and for what waits for a sync.
    fn may_grow(&self, need: u32) -> bool {
        let Some(left) = (self.units - self.high).checked_sub(need + 1) else { return false };
        let (headers, data) = (self.slots_len() + 1, self.high - 1 - self.slots_len() + need);
        let all = u64::from(self.disk_blocks) * u64::from(self.block_units);
        let missing = u64::from(self.disk_blocks.saturating_sub(headers)) + all.saturating_sub(u64::from(data));
        u64::from(left) >= missing + u64::from(self.slack() / 2)
    }

    fn grant_units(&mut self, need: u32) -> Option<(u32, Vec<Units>)> {
        if need == 0 {
            return Some((self.take_slot()?, Vec::new()));
        }
        let grows = self.may_grow(need);
        if grows {
            // At the end all of it is one transfer. Otherwise it should be few.
            let is_plenty = self.free.units >= need.max(self.kept());
            let again = if is_plenty && !self.free_slots.is_empty() { self.free.take_one(need) } else { None };
            return Some(match again {
                Some(units) => (self.take_slot()?, vec![units]),
                None => (self.add_slot(self.high, need + 1), vec![self.take_new(need)]),
            });
        }
        while self.free.usable < need
            && let Some(hole) = self.holes.pop()
        {
            self.free.add(hole);
        }
        let new = need.saturating_sub(self.free.usable);
        if self.units - self.high < new + u32::from(self.free_slots.is_empty()) {
            return None;
        }
        let slot = self.take_slot()?;
        let mut units = match self.free.take_one(need) {
            Some(one) => vec![one],
            None => self.free.take_pieces(need),
        };
        if new > 0 {
            units.push(self.take_new(new));
        }
        Some((slot, units))
    }

    /// A place for a header.
    fn take_slot(&mut self) -> Option<u32> {
        self.free_slots.pop().or_else(|| (self.high < self.units).then(|| self.add_slot(self.high, 1)))
    }

    fn add_slot(&mut self, place: u32, span: u32) -> u32 {
        self.slots.push(Slot { place, span, sequence: 0, live: 0 });
        self.high = self.high.max(place + 1);
        self.slots_len() - 1
    }

    fn take_new(&mut self, count: u32) -> Units {
        let start = self.high;
        self.high += count;
        Units { start, count }
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
                        self.supersede_slot(was.header);
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
            self.supersede_slot(grant.slot);
        }
        self.wake();
    }

    fn supersede(&mut self, units: Units) {
        self.superseded_units += units.count;
        self.superseded.units.push(units);
    }

    fn supersede_slot(&mut self, slot: u32) {
        self.superseded_units += 1;
        self.superseded.slots.push(slot);
    }

    /// What was granted has failed. While nobody knows what is there it is not given out again, nor do headers say that all
    /// have arrived.
    pub(super) fn fail(&mut self, grant: &Grant, entries: &[Entry], left: Left) {
        self.in_flight.remove(&grant.sequence);
        let &Grant { slot, header, sequence, ref units, .. } = grant;
        let doubt = Doubt { slot, header, sequence, units: units.clone() };
        if left == Left::Nothing {
            self.give_back(doubt);
        } else {
            let blocks: Vec<u32> = entries.iter().map(|entry| number(entry.block)).collect();
            blocks.iter().for_each(|block| *self.unknown_blocks.entry(*block).or_default() += 1);
            self.unknown.insert(sequence, blocks);
            self.doubts.extend(Some(doubt).filter(|_| left == Left::Header));
        }
        self.wake();
    }

    /// Nothing that counts is there: it is free once that is synced.
    fn give_back(&mut self, doubt: Doubt) {
        doubt.units.into_iter().for_each(|units| self.supersede(units));
        self.supersede_slot(doubt.slot);
    }

    /// Whether nobody knows what is there of some write that failed.
    pub(super) fn is_in_doubt(&self) -> bool {
        !self.unknown.is_empty()
    }

    /// Takes one out whose header is to be made void, until it is said what came of that.
    pub(super) fn take_doubt(&mut self) -> Option<Doubt> {
        let doubt = self.doubts.pop()?;
        self.voiding += 1;
        Some(doubt)
    }

    /// Its header is void.
    pub(super) fn settle(&mut self, doubt: Doubt) {
        self.voiding -= 1;
        for block in self.unknown.remove(&doubt.sequence).into_iter().flatten() {
            if let hash_map::Entry::Occupied(mut count) = self.unknown_blocks.entry(block) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
        self.give_back(doubt);
        self.wake();
    }

    /// Its header is not void. With `may_try` that can be tried again, otherwise the last try may still be under way.
    pub(super) fn keep_doubt(&mut self, doubt: Doubt, may_try: bool) {
        self.voiding -= 1;
        self.doubts.extend(Some(doubt).filter(|_| may_try));
        self.wake();
    }

    /// Whether so much waits for a sync that one should be made.
    pub(super) fn wants_sync(&self) -> bool {
        self.syncing == 0 && self.superseded_units > (self.slack() / 4).clamp(1, 16 * KEPT_UNITS_MAX)
    }

    /// What can be done when there is no room.
    pub(super) fn relief(&self) -> Relief {
        if self.syncing > 0 || self.releasing > 0 || self.voiding > 0 || !self.in_flight.is_empty() {
            return Relief::Wait;
        }
        match (self.superseded_units > 0, self.leaving.is_empty()) {
            (true, _) => Relief::Sync,
            (false, false) => Relief::Wait,
            (false, true) if !self.doubts.is_empty() => Relief::Void,
            (false, true) => Relief::Never,
        }
    }

    /// Who waits for room is woken when there may be some.
    pub(super) fn wait(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|w| w.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }

    fn wake(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }

    /// Before a sync begins.
    pub(super) fn begin_sync(&mut self) -> Syncing {
        self.syncing += 1;
        self.superseded_units = 0;
        Syncing { arrived: self.arrived(), freed: std::mem::take(&mut self.superseded) }
    }

    /// After it was done.
    pub(super) fn end_sync(&mut self, syncing: Syncing) {
        self.syncing -= 1;
        self.synced = self.synced.max(syncing.arrived);
        self.leaving.push_back((self.generation, syncing.freed));
        self.generation += 1;
        self.let_go();
    }

    /// After it was not.
    pub(super) fn abandon_sync(&mut self, syncing: Syncing) {
        self.syncing -= 1;
        syncing.freed.units.into_iter().for_each(|units| self.supersede(units));
        syncing.freed.slots.into_iter().for_each(|slot| self.supersede_slot(slot));
        self.wake();
    }

    fn let_go(&mut self) {
        let oldest_read = self.reads.keys().next().copied();
        while let Some((generation, _)) = self.leaving.front()
            && oldest_read.is_none_or(|oldest| oldest > *generation)
        {
            let (_, freed) = self.leaving.pop_front().expect("it is there");
            self.free_slots.extend(freed.slots);
            freed.units.into_iter().for_each(|units| self.free.add(units));
            self.wake();
        }
    }

    /// Free units that are not kept, and are to be given back to the file system: taken out until that is done
    /// ([`Places::put_back`]).
    pub(super) fn take_surplus(&mut self) -> Vec<Units> {
        let (kept, mut surplus) = (self.kept(), Vec::new());
        while surplus.len() < RUNS_MAX
            && let Some(excess) =
                self.free.units.checked_sub(2 * kept).map(|units| self.free.whole(units)).filter(|&u| u > 0)
            && let Some((&start, &count)) = self.free.runs.last_key_value()
        {
            let units = Units { start: start + count.saturating_sub(excess), count: count.min(excess) };
            self.free.remove(start);
            if units.start > start {
                self.free.add(Units { start, count: units.start - start });
            }
            self.releasing += units.count;
            surplus.push(units);
        }
        surplus
    }

    /// Puts back what was taken out by [`Places::take_surplus`].
    pub(super) fn put_back(&mut self, units: Units) {
        self.releasing -= units.count;
        self.holes.push(units);
        self.wake();
    }

    /// Of what was taken out nobody knows whether it is being given back: it is not used again.
    pub(super) fn give_up(&mut self, units: Units) {
        self.releasing -= units.count;
        self.wake();
    }

    /// Bytes of memory that this takes, about.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        // One control byte an entry, and room for one in eight more.
        self.blocks.capacity() * 8 / 7 * (size_of::<(u32, Held)>() + 1)
            + self.slots.capacity() * size_of::<Slot>()
            + self.free.runs.len() * 16
    }
}

/// A pack's disk has fewer blocks than fit here ([`super::Pack::units_of`]).
fn number(block: u64) -> u32 {
    u32::try_from(block).expect("a pack has fewer than 2^32 blocks")
}

#[cfg(test)]
#[path = "places_tests.rs"]
mod tests;
