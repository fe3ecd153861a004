//! A guest that goes on whatever happens to the daemon: requests of all kinds on several queues, each judged when answered.
//!
//! What always holds: a request is answered once, with status OK, however many daemons die meanwhile; answers are looked
//! for only when the guest was called, so that a call that is lost is a request that hangs.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};

use crate::client::SECTOR;
use crate::harness::Rng;
use crate::oracle::{DISKS, World};
use crate::ring::{DATA, HEADER, S_OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, WRITE, range as segment};
use crate::vmm::{Survivor, Vmm};

/// Requests at once on one queue.
pub(super) const DEPTH: usize = 20;
pub(super) const QUEUES: usize = 2;
/// Sectors of the longest request.
const LONGEST: usize = 64;
const ENTRIES: u16 = 128;

/// What a guest asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
}

pub(super) const KINDS: [Kind; 5] = [Kind::Read, Kind::Write, Kind::WriteZeroes, Kind::Discard, Kind::Flush];

/// A request in flight.
struct Running {
    kind: Kind,
    /// Of the change or the read in the world.
    id: u64,
    sectors: Range<usize>,
    /// How many daemons have died over it.
    deaths: usize,
}

pub(super) struct Vm {
    disk: usize,
    socket: PathBuf,
    survivor: Survivor,
    connected: bool,
    slots: Vec<Vec<Option<Running>>>,
    sectors: usize,
    /// Requests over which at least one daemon has died, and that were answered after all.
    pub(super) outlived: usize,
    pub(super) deaths_max: usize,
    pub(super) answered: u64,
}

/// Where a slot's header, status and segment are.
fn head_place(queue: usize, slot: usize) -> u64 {
    HEADER + 0x1_0000 + ((queue * DEPTH + slot) * 64) as u64
}

fn data_place(queue: usize, slot: usize) -> u64 {
    DATA + ((queue * DEPTH + slot) * LONGEST * SECTOR) as u64
}

impl Vm {
    pub(super) fn connect(disk: usize, socket: &Path, sectors: usize, vmm: Vmm) -> Vm {
        let survivor = Survivor::connect(socket, QUEUES, ENTRIES, vmm).unwrap();
        let slots = (0..QUEUES).map(|_| (0..DEPTH).map(|_| None).collect()).collect();
        let socket = socket.to_owned();
        Vm { disk, socket, survivor, connected: true, slots, sectors, outlived: 0, deaths_max: 0, answered: 0 }
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connected
    }

    /// One attempt, if it is needed. An error is a daemon that is not there yet, or that died meanwhile. None if it was
    /// connected already.
    pub(super) fn try_connect(&mut self) -> Option<bool> {
        if self.connected {
            return None;
        }
        self.connected = self.survivor.reconnect(&self.socket).is_ok();
        Some(self.connected)
    }

    /// The daemon is dead. What it has answered is taken in; the rest it did not live to answer. Returns how many of each
    /// kind those are, and how many of all had not even been taken from the ring, as far as the region tells.
    pub(super) fn bereaved(&mut self, world: &mut World) -> [usize; KINDS.len()] {
        self.connected = false;
        (0..QUEUES).for_each(|queue| self.take_answers(queue, world));
        let mut open = [0; KINDS.len()];
        for running in self.slots.iter_mut().flatten().flatten() {
            running.deaths += 1;
            open[KINDS.iter().position(|k| *k == running.kind).unwrap()] += 1;
        }
        open
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.iter().flatten().flatten().count()
    }

    /// Takes in what the guest was called for.
    pub(super) fn poll(&mut self, world: &mut World) -> usize {
        let before = self.answered;
        for queue in 0..QUEUES {
            if self.survivor.guest.queues[queue].call.read().is_ok() {
                self.take_answers(queue, world);
            }
        }
        (self.answered - before) as usize
    }

    fn take_answers(&mut self, queue: usize, world: &mut World) {
        loop {
            while let Some((head, _)) = self.survivor.guest.poll_used(queue) {
                self.answer(queue, head, world);
            }
            // Ask to be called for the next one, and look again: it may have come meanwhile.
            let index = self.survivor.guest.queues[queue].last_used;
            self.survivor.guest.set_used_event(queue, index);
            fence(Ordering::SeqCst);
            if self.survivor.guest.used_index(queue) == index {
                return;
            }
        }
    }

    fn answer(&mut self, queue: usize, head: u32, world: &mut World) {
        let (name, guest) = (DISKS[self.disk], &self.survivor.guest);
        let slot = head as usize / 3;
        let running = self.slots[queue].get_mut(slot).and_then(Option::take);
        let running = running.unwrap_or_else(|| panic!("{name}: queue {queue} head {head} is answered twice"));
        let status = guest.memory.read(head_place(queue, slot) + 16, 1)[0];
        let Running { kind, id, sectors, deaths } = running;
        assert_eq!(status, S_OK, "{name}: {kind:?} of {sectors:?} failed after {deaths} deaths");
        match kind {
            Kind::Read => world.end_read(id, &guest.memory.read(data_place(queue, slot), sectors.len() * SECTOR)),
            Kind::Flush => {}
            _ => world.end_change(id),
        }
        self.answered += 1;
        self.outlived += usize::from(deaths > 0);
        self.deaths_max = self.deaths_max.max(deaths);
    }

    /// Announces some requests, also when nobody serves.
    pub(super) fn submit(&mut self, count: usize, rng: &mut Rng, world: &mut World) {
        for _ in 0..count {
            let queue = rng.below(QUEUES);
            let Some(slot) = self.slots[queue].iter().position(Option::is_none) else { continue };
            self.submit_one(queue, slot, rng, world);
        }
        (0..QUEUES).for_each(|queue| self.survivor.guest.kick(queue));
    }

    fn submit_one(&mut self, queue: usize, slot: usize, rng: &mut Rng, world: &mut World) {
        let kind = match rng.below(100) {
            0..25 => Kind::Read,
            25..78 => Kind::Write,
            78..86 => Kind::WriteZeroes,
            86..94 => Kind::Discard,
            _ => Kind::Flush,
        };
        let sectors = self.range(rng);
        let (at, data, len) = (head_place(queue, slot), data_place(queue, slot), (sectors.len() * SECTOR) as u32);
        let guest = &mut self.survivor.guest;
        let (code, id, piece) = match kind {
            Kind::Read => {
                guest.memory.write(data, &vec![0xa5; len as usize]);
                (T_IN, world.begin_read(DISKS[self.disk], sectors.clone()), Some((data, len, WRITE)))
            }
            Kind::Write => {
                let (id, tag) = world.begin_change(self.disk, sectors.clone(), None, false);
                guest.memory.write(data, &tag.to_le_bytes().repeat(len as usize / 8));
                (T_OUT, id, Some((data, len, 0)))
            }
            Kind::WriteZeroes | Kind::Discard => {
                let is_discard = kind == Kind::Discard;
                let (id, _) = world.begin_change(self.disk, sectors.clone(), Some(0), is_discard);
                let unmap = u32::from(!is_discard && rng.chance(60));
                guest.memory.write(at + 32, &segment(sectors.start as u64, sectors.len() as u32, unmap));
                (if is_discard { T_DISCARD } else { T_WRITE_ZEROES }, id, Some((at + 32, 16, 0)))
            }
            Kind::Flush => (T_FLUSH, 0, None),
        };
        let first = if matches!(kind, Kind::Read | Kind::Write) { sectors.start as u64 } else { 0 };
        guest.header_at(at, code, first);
        guest.memory.write(at + 16, &[0xaa]);
        let pieces: Vec<_> = [(at, 16, 0)].into_iter().chain(piece).chain([(at + 16, 1, WRITE)]).collect();
        let head = guest.chain(queue, slot as u16 * 3, &pieces);
        guest.announce(queue, head);
        self.slots[queue][slot] = Some(Running { kind, id, sectors, deaths: 0 });
    }

    fn range(&self, rng: &mut Rng) -> Range<usize> {
        let first = if rng.chance(50) { rng.below(self.sectors / 8) } else { rng.below(self.sectors) };
        let longest = if rng.chance(80) { 12 } else { LONGEST };
        let mut range = first..first + 1 + rng.below(longest.min(self.sectors - first));
        if rng.chance(40) {
            range.start = range.start / 8 * 8;
            range.end = range.end.next_multiple_of(8).min(self.sectors);
        }
        range.end = range.end.min(range.start + LONGEST);
        range
    }

    /// Reads the whole disk. Nothing may be in flight.
    pub(super) fn read_all(&mut self, world: &mut World) {
        for first in (0..self.sectors).step_by(LONGEST) {
            let sectors = first..self.sectors.min(first + LONGEST);
            let id = world.begin_read(DISKS[self.disk], sectors.clone());
            let got = self.survivor.guest.read_sectors(first as u64, sectors.len() * SECTOR);
            while self.survivor.guest.queues[0].call.read().is_ok() {}
            let index = self.survivor.guest.queues[0].last_used;
            self.survivor.guest.set_used_event(0, index);
            world.end_read(id, &got);
        }
    }

    /// After everything was answered: no answer too many.
    pub(super) fn require_quiet(&self) {
        for queue in 0..QUEUES {
            let guest = &self.survivor.guest;
            assert_eq!(guest.used_index(queue), guest.avail_index(queue), "{}: queue {queue}", DISKS[self.disk]);
        }
    }
}
