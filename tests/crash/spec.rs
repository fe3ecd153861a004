//! The specification of a host: what each disk, volume and snapshot on it may show, now and after an end.
//!
//! A sector's bytes name the write that made them and the place they were made for. Each array holds for each sector the
//! writes that it may show: the last one, and those whose order the guest left open. Of a live version there is a second
//! array, of the writes that may be found after a power cut: from the last one that a flush or a durable write made durable
//! on. Whenever the epoch moves on, what was live becomes a past; a write of an old epoch changes those pasts that see it.
//! That, and nothing of a strategy, is what a snapshot of that epoch must show.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use halfsilver::image::{AlignedBuf, GuestBuf};
use uuid::Uuid;

use crate::media::SECTOR;

/// A write by its number; with [`ZEROS`], one that leaves zeros.
pub type Entry = u64;
pub type Sets = Vec<Vec<Entry>>;
const ZEROS: u64 = 1 << 63;
/// What was there at the beginning, where it was not zeros.
const INITIAL: Entry = 1;

fn number(entry: Entry) -> u64 {
    entry & !ZEROS
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
    epoch: u64,
    sectors: Range<usize>,
    kind: Kind,
    is_durable: bool,
    /// Changes of some of these sectors that were in flight when it began.
    beside: Vec<u64>,
    /// Whether its disk has become something else while it was in flight: then it came before that, or after.
    is_beside_a_change_of_all: bool,
}

/// A content that a disk may have.
#[derive(Clone)]
pub struct Live {
    key: u64,
    pub sectors: Sets,
    durable: Sets,
    /// Whether it began at a moment that is not known: then what it began with may come after a write that was acknowledged.
    is_open: bool,
}

/// A disk or volume.
#[derive(Clone)]
pub struct Line {
    /// What it is called, and then what it may be called by now.
    pub names: Vec<String>,
    /// How many commands delete it: then it need not be found.
    pub deletions: usize,
    /// The snapshot that it was made off last, of a volume.
    pub from: Option<Uuid>,
    /// Whether it is being changed to something that is known afterwards only; its guests are away meanwhile.
    pub is_away: bool,
    lives: Vec<Live>,
    pasts: BTreeMap<u64, Vec<Sets>>,
    changes: Vec<Change>,
}

/// A snapshot.
#[derive(Clone)]
pub struct Moment {
    pub line: Uuid,
    pub name: String,
    pub epoch: u64,
    /// Whether it must be found.
    pub is_certain: bool,
    /// How many commands delete it.
    pub deletions: usize,
}

/// A flush that has begun: what it must make durable.
pub struct Flush {
    line: Uuid,
    upto: u64,
    now: Vec<(u64, Sets)>,
}

#[derive(Clone, Default)]
pub struct Spec {
    last: u64,
    epoch: u64,
    pub lines: BTreeMap<Uuid, Line>,
    pub moments: BTreeMap<Uuid, Moment>,
    /// What was deleted, for good.
    pub gone: BTreeSet<Uuid>,
    /// Names that commands may have given by now.
    pub coming: Vec<String>,
    /// Names of snapshots that commands delete: whatever has one by then.
    pub going: Vec<String>,
}

impl Live {
    fn of(key: u64, sectors: Sets) -> Live {
        Live { key, durable: sectors.clone(), sectors, is_open: false }
    }
}

impl Line {
    fn new(name: String, from: Option<Uuid>, live: Live) -> Line {
        let (pasts, changes) = (BTreeMap::new(), Vec::new());
        Line { names: vec![name], deletions: 0, from, is_away: false, lives: vec![live], pasts, changes }
    }

    /// What it may show, also after a power cut.
    pub fn contents(&self, after_power_cut: bool) -> impl Iterator<Item = &Sets> {
        self.lives.iter().map(move |live| if after_power_cut { &live.durable } else { &live.sectors })
    }

    pub fn sectors(&self) -> usize {
        self.lives[0].sectors.len()
    }
}

impl Spec {
    pub fn new() -> Spec {
        Spec { last: INITIAL, ..Spec::default() }
    }

    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// A disk with the bytes of [`initial`].
    pub fn add_disk(&mut self, id: Uuid, name: &str, sectors: usize) {
        let sectors = (0..sectors).map(|s| vec![if is_zero_at_first(s) { ZEROS } else { INITIAL }]).collect();
        let live = Live::of(self.next(), sectors);
        self.lines.insert(id, Line::new(name.to_owned(), None, live));
    }

    pub fn line_named(&self, name: &str) -> Option<Uuid> {
        let is_called = |line: &Line| line.names.iter().any(|its| its == name);
        self.lines.iter().find(|(_, line)| is_called(line)).map(|(id, _)| *id)
    }

    /// The epoch has moved on: what was live until then is a past of the old one.
    pub fn epoch_is(&mut self, epoch: u64) {
        if self.epoch > 0 && epoch > self.epoch {
            for line in self.lines.values_mut() {
                line.pasts.insert(epoch - 1, line.lives.iter().map(|live| live.sectors.clone()).collect());
            }
        }
        self.epoch = epoch;
    }

    pub fn begin_change(&mut self, line: Uuid, epoch: u64, sectors: Range<usize>, kind: Kind, is_durable: bool) -> u64 {
        let number = self.next();
        crate::trace(|| format!("change {number} of {line}, {sectors:?}, epoch {epoch}, durable: {is_durable}"));
        let entry = if kind == Kind::Write { number } else { number | ZEROS };
        let line = self.lines.get_mut(&line).expect("a line");
        let overlaps = |c: &&Change| c.sectors.start < sectors.end && sectors.start < c.sectors.end;
        let beside = line.changes.iter().filter(overlaps).map(|c| c.number).collect();
        let push = |array: &mut Sets| array[sectors.clone()].iter_mut().for_each(|set| set.push(entry));
        line.pasts_seeing(epoch).for_each(push);
        line.lives.iter_mut().flat_map(|live| [&mut live.sectors, &mut live.durable]).for_each(push);
        line.changes.push(Change {
            number,
            epoch,
            sectors,
            kind,
            is_durable,
            beside,
            is_beside_a_change_of_all: false,
        });
        number
    }

    /// It was acknowledged: what was complete before it began is gone.
    pub fn end_change(&mut self, line: Uuid, number_of: u64) {
        crate::trace(|| format!("change {number_of} ends"));
        let Some(line) = self.lines.get_mut(&line) else { return };
        let Some(at) = line.changes.iter().position(|c| c.number == number_of) else { return };
        let change = line.changes.swap_remove(at);
        if change.kind == Kind::Discard {
            return;
        }
        let stays = |e: &Entry| number(*e) >= change.number || change.beside.contains(&number(*e));
        let prune = |array: &mut Sets| array[change.sectors.clone()].iter_mut().for_each(|set| set.retain(stays));
        line.pasts_seeing(change.epoch).for_each(prune);
        if change.is_beside_a_change_of_all {
            return;
        }
        for live in line.lives.iter_mut().filter(|live| !live.is_open) {
            prune(&mut live.sectors);
            if change.is_durable {
                prune(&mut live.durable);
            }
        }
    }

    pub fn begin_flush(&self, line: Uuid) -> Flush {
        let now = self.lines[&line].lives.iter().map(|live| (live.key, live.sectors.clone())).collect();
        Flush { line, upto: self.last, now }
    }

    /// It was acknowledged: what was acknowledged before it began, or came later, is what a power cut leaves.
    pub fn end_flush(&mut self, flush: &Flush) {
        let Some(line) = self.lines.get_mut(&flush.line) else { return };
        for live in line.lives.iter_mut().filter(|live| !live.is_open) {
            let Some((_, now)) = flush.now.iter().find(|(key, _)| *key == live.key) else { continue };
            for (set, now) in live.durable.iter_mut().zip(now) {
                set.retain(|e| number(*e) > flush.upto || now.contains(e));
            }
        }
    }

    /// What a snapshot may show.
    pub fn frozen(&self, line: Uuid, epoch: u64) -> Option<Sets> {
        let pasts = self.lines.get(&line)?.pasts.get(&epoch)?;
        let mut all = pasts.first()?.clone();
        for other in &pasts[1..] {
            for (set, more) in all.iter_mut().zip(other) {
                set.extend(more.iter().filter(|e| !set.contains(e)).copied().collect::<Vec<_>>());
            }
        }
        Some(all)
    }

    /// What any disk showed at the end of any epoch, of those of this size.
    pub fn all_pasts(&self, sectors: usize) -> impl Iterator<Item = &Sets> {
        self.lines.values().flat_map(|line| line.pasts.values().flatten()).filter(move |sets| sets.len() == sectors)
    }

    pub fn frozen_of(&self, moment: Uuid) -> Option<Sets> {
        let moment = self.moments.get(&moment)?;
        self.frozen(moment.line, moment.epoch)
    }

    /// A volume that shows this.
    pub fn add_volume(&mut self, id: Uuid, name: &str, from: Uuid, sectors: Sets) {
        let live = Live::of(self.next(), sectors);
        self.lines.insert(id, Line::new(name.to_owned(), Some(from), live));
    }

    /// From some moment on it may show this.
    pub fn may_become(&mut self, line: Uuid, mut sectors: Sets) {
        let key = self.next();
        let line = self.lines.get_mut(&line).expect("a line");
        // What is in flight may come after that moment.
        for change in &line.changes {
            let entry = if change.kind == Kind::Write { change.number } else { change.number | ZEROS };
            sectors[change.sectors.clone()].iter_mut().for_each(|set| set.push(entry));
        }
        line.lives.push(Live { key, durable: sectors.clone(), sectors, is_open: true });
    }

    /// It shows the newest of what it may have become, or what it was before.
    pub fn has_become(&mut self, line: Uuid, is_changed: bool) {
        let Some(line) = self.lines.get_mut(&line) else { return };
        let stays = if is_changed { line.lives.pop() } else { Some(line.lives.remove(0)) };
        line.changes.iter_mut().for_each(|change| change.is_beside_a_change_of_all |= is_changed);
        line.lives.clear();
        line.lives.extend(stays.map(|live| Live { is_open: false, ..live }));
    }

    /// From here on what was found is what was written. After a power cut it is on stable storage; after a kill what is there
    /// stays as it was.
    pub fn after(&self) -> Spec {
        Spec { last: self.last, gone: self.gone.clone(), ..Spec::default() }
    }

    /// A line as it was found: this content, of those that it might have had.
    pub fn found_line(
        &mut self,
        id: Uuid,
        name: &str,
        from: Option<Uuid>,
        found: Option<(&Line, Vec<Entry>)>,
        is_durable: bool,
    ) {
        let Some((before, found)) = found else { return };
        let key = self.next();
        let sectors: Sets = found.iter().map(|e| vec![*e]).collect();
        let fits = |live: &&Live| live.sectors.iter().zip(&found).all(|(set, e)| set.contains(e));
        let durable = before.lives.iter().find(fits).filter(|_| !is_durable).map(|live| live.durable.clone());
        let live = Live { key, durable: durable.unwrap_or_else(|| sectors.clone()), sectors, is_open: false };
        self.lines.insert(id, Line::new(name.to_owned(), from, live));
    }

    /// A line that does not show what it has.
    pub fn keep_line(&mut self, id: Uuid, name: &str, from: Option<Uuid>, before: &Line, after_power_cut: bool) {
        let key = self.next();
        let mut all = before.lives[0].clone();
        for other in &before.lives[1..] {
            let into = all.sectors.iter_mut().zip(&other.sectors).chain(all.durable.iter_mut().zip(&other.durable));
            into.for_each(|(set, more)| set.extend(more));
        }
        if after_power_cut {
            all.sectors.clone_from(&all.durable);
        }
        self.lines.insert(id, Line::new(name.to_owned(), from, Live { key, is_open: false, ..all }));
    }

    /// A snapshot as it was found.
    pub fn found_moment(&mut self, id: Uuid, moment: Moment, found: &[Entry]) {
        if let Some(line) = self.lines.get_mut(&moment.line) {
            line.pasts.insert(moment.epoch, vec![found.iter().map(|e| vec![*e]).collect()]);
        }
        self.moments.insert(id, moment);
    }
}

impl Line {
    /// The pasts that see a change of an epoch.
    fn pasts_seeing(&mut self, epoch: u64) -> impl Iterator<Item = &mut Sets> {
        self.pasts.range_mut(epoch..).flat_map(|(_, past)| past)
    }
}

/// Which writes a version shows, as one of those that each sector may show.
pub fn check(bytes: &[u8], sets: &Sets) -> Result<Vec<Entry>, String> {
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
