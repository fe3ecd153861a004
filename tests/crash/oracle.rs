//! The specification with durability: one array a version, and for the live one what a power cut may leave.
//!
//! A sector's bytes name the write that made them and the place they were made for. Each array holds for each sector the
//! writes that it may show: the last one, and those whose order the guest left open. Of the live version there is a
//! second array, of the writes that may be found after a power cut: from the last one that a flush or a durable write
//! made durable on.

use std::collections::BTreeMap;
use std::ops::Range;

use halfsilver::engine::Epoch;
use halfsilver::image::{AlignedBuf, GuestBuf};
use uuid::Uuid;

use crate::media::SECTOR;
use crate::run::Strategy;

/// A write by its number; with [`ZEROS`], one that leaves zeros.
pub type Entry = u64;
const ZEROS: u64 = 1 << 63;
/// What was there at the beginning, where it was not zeros.
const INITIAL: Entry = 1;

fn number(entry: Entry) -> u64 {
    entry & !ZEROS
}

/// What one version may show.
#[derive(Clone)]
pub struct Array {
    pub id: Uuid,
    /// The last epoch that belongs to it; None for the live one.
    pub ended: Option<Epoch>,
    pub sectors: Vec<Vec<Entry>>,
}

/// What somebody was told about a snapshot, and so must find after any end.
#[derive(Clone)]
pub struct Fact {
    pub strategy: Strategy,
    pub created: bool,
    pub quiesced: bool,
    pub deletion_begun: bool,
    pub deleted: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Write,
    Zeroes,
    Discard,
}

#[derive(Clone)]
struct Change {
    number: u64,
    epoch: Epoch,
    sectors: Range<usize>,
    kind: Kind,
    durable: bool,
    /// Changes of some of these sectors that were in flight when it began.
    beside: Vec<u64>,
}

/// A flush that has begun: what it must make durable.
pub struct Flush {
    upto: u64,
    now: Vec<Vec<Entry>>,
}

#[derive(Clone)]
pub struct Oracle {
    next: u64,
    pub live: Array,
    pub frozen: Vec<Array>,
    durable: Vec<Vec<Entry>>,
    changes: Vec<Change>,
    pub facts: BTreeMap<Uuid, Fact>,
}

impl Oracle {
    /// Of a disk with the bytes of [`initial`].
    pub fn new(live: Uuid, sectors: usize) -> Oracle {
        let sectors: Vec<_> = (0..sectors).map(|s| vec![if is_zero_at_first(s) { ZEROS } else { INITIAL }]).collect();
        Oracle {
            next: INITIAL,
            durable: sectors.clone(),
            live: Array { id: live, ended: None, sectors },
            frozen: Vec::new(),
            changes: Vec::new(),
            facts: BTreeMap::new(),
        }
    }

    pub fn begin_change(&mut self, epoch: Epoch, sectors: Range<usize>, kind: Kind, durable: bool) -> u64 {
        self.next += 1;
        let number = self.next;
        crate::trace(|| format!("change {number} of sectors {sectors:?} begins in epoch {epoch}, durable: {durable}"));
        let entry = if kind == Kind::Write { number } else { number | ZEROS };
        let overlaps = |c: &&Change| c.sectors.start < sectors.end && sectors.start < c.sectors.end;
        let beside = self.changes.iter().filter(overlaps).map(|c| c.number).collect();
        let seeing = self.frozen.iter_mut().filter(|a| a.ended.is_none_or(|ended| epoch <= ended));
        let arrays = seeing.map(|a| &mut a.sectors).chain([&mut self.live.sectors, &mut self.durable]);
        arrays.for_each(|array| array[sectors.clone()].iter_mut().for_each(|set| set.push(entry)));
        self.changes.push(Change { number, epoch, sectors, kind, durable, beside });
        number
    }

    /// It was acknowledged: what was complete before it began is gone.
    pub fn end_change(&mut self, number_of: u64) {
        let at = self.changes.iter().position(|c| c.number == number_of).expect("a change in flight");
        let change = self.changes.swap_remove(at);
        crate::trace(|| format!("change {number_of} ends, beside {:?}", change.beside));
        if change.kind == Kind::Discard {
            return;
        }
        let stays = |e: &Entry| number(*e) >= change.number || change.beside.contains(&number(*e));
        let seeing = self.frozen.iter_mut().filter(|a| a.ended.is_none_or(|ended| change.epoch <= ended));
        let arrays = seeing.map(|a| &mut a.sectors).chain([&mut self.live.sectors]);
        let durable = change.durable.then_some(&mut self.durable);
        let of_sectors = |array: &mut Vec<Vec<Entry>>| {
            array[change.sectors.clone()].iter_mut().for_each(|set| set.retain(stays));
        };
        arrays.chain(durable).for_each(of_sectors);
    }

    pub fn begin_flush(&self) -> Flush {
        Flush { upto: self.next, now: self.live.sectors.clone() }
    }

    /// It was acknowledged: what was acknowledged before it began, or came later, is what a power cut leaves.
    pub fn end_flush(&mut self, flush: &Flush) {
        crate::trace(|| format!("a flush of what was done at change {} ends", flush.upto));
        for (set, now) in self.durable.iter_mut().zip(&flush.now) {
            set.retain(|e| number(*e) > flush.upto || now.contains(e));
        }
    }

    pub fn cut(&mut self, ended: Epoch, new_live: Uuid) {
        crate::trace(|| format!("a cut ends epoch {ended}: {} is frozen, {new_live} is live", self.live.id));
        let mut frozen = self.live.clone();
        frozen.ended = Some(ended);
        self.live.id = new_live;
        self.frozen.push(frozen);
    }

    /// What the live version shows, as one of the writes that each sector may show.
    pub fn check_live(&self, bytes: &[u8], only_durable: bool) -> Result<Vec<Entry>, String> {
        check(bytes, if only_durable { &self.durable } else { &self.live.sectors })
    }

    pub fn check_frozen(&self, id: Uuid, bytes: &[u8]) -> Result<Vec<Entry>, String> {
        let array = self.frozen.iter().find(|a| a.id == id).ok_or("nobody cut it")?;
        check(bytes, &array.sectors)
    }

    /// From here on what was found is what was written. After a power cut it is on stable storage; after a kill what is
    /// there stays as it was.
    pub fn after(&self, live: (Uuid, Vec<Entry>), only_durable: bool, frozen: Vec<(Uuid, Vec<Entry>)>) -> Oracle {
        let sets = |found: Vec<Entry>| found.into_iter().map(|e| vec![e]).collect::<Vec<_>>();
        let (id, found) = (live.0, sets(live.1));
        let durable = if only_durable { found.clone() } else { self.durable.clone() };
        let frozen = frozen.into_iter().map(|(id, found)| {
            let ended = self.frozen.iter().find(|a| a.id == id).and_then(|a| a.ended);
            Array { id, ended, sectors: sets(found) }
        });
        Oracle {
            next: self.next,
            durable,
            live: Array { id, ended: None, sectors: found },
            frozen: frozen.collect(),
            changes: Vec::new(),
            facts: self.facts.clone(),
        }
    }
}

fn check(bytes: &[u8], sets: &[Vec<Entry>]) -> Result<Vec<Entry>, String> {
    let mut found = Vec::with_capacity(sets.len());
    for (place, (sector, set)) in bytes.chunks_exact(SECTOR).zip(sets).enumerate() {
        let allowed =
            || set.iter().map(|e| if *e & ZEROS == 0 { e.to_string() } else { format!("0 ({})", number(*e)) });
        let all = || allowed().collect::<Vec<_>>().join(", ");
        let Some((tag, of)) = tag_of(sector) else {
            return Err(format!("sector {place} is torn, allowed {}", all()));
        };
        if tag != 0 && of != place as u64 {
            return Err(format!("sector {place} shows {tag} of sector {of}, allowed {}", all()));
        }
        let fits = |e: &&Entry| if tag == 0 { **e & ZEROS != 0 } else { **e == tag };
        match set.iter().rev().find(fits) {
            Some(entry) => found.push(*entry),
            None => return Err(format!("sector {place} shows {tag}, allowed {}", all())),
        }
    }
    Ok(found)
}

/// Which write a sector's bytes are of, and for which sector.
fn tag_of(sector: &[u8]) -> Option<(u64, u64)> {
    let word = |i: usize| u64::from_le_bytes(sector[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
    let first = (word(0), word(1));
    sector[16..].chunks_exact(16).all(|pair| *pair == sector[..16]).then_some(first)
}

/// The bytes of a write of some sectors.
pub fn fill(bytes: &mut [u8], first: usize, tag: u64) {
    for (sector, bytes) in (first as u64..).zip(bytes.chunks_exact_mut(SECTOR)) {
        for pair in bytes.chunks_exact_mut(16) {
            pair[..8].copy_from_slice(&tag.to_le_bytes());
            pair[8..].copy_from_slice(&sector.to_le_bytes());
        }
    }
}

pub fn filled(first: usize, sectors: usize, tag: u64) -> GuestBuf {
    let mut memory = AlignedBuf::zeroed(sectors * SECTOR);
    fill(&mut memory, first, tag);
    GuestBuf::from_owned(memory).0
}

/// Some of it is zeros, some is not.
fn is_zero_at_first(sector: usize) -> bool {
    sector / 8 % 3 == 1
}

/// What a disk holds at the beginning.
pub fn initial(sectors: usize) -> Vec<u8> {
    let mut bytes = vec![0; sectors * SECTOR];
    for (sector, bytes) in bytes.chunks_exact_mut(SECTOR).enumerate().filter(|(s, _)| !is_zero_at_first(*s)) {
        fill(bytes, sector, INITIAL);
    }
    bytes
}
