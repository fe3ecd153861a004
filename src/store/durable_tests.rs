//! The durable table on a simulated medium: what a power cut leaves, what damage looks like, who shares a commit.
//!
//! Checked: unsynced sectors lost, kept or older than the last write; tears inside a sector; every flipped bit; failed
//! and abandoned commits. Not checked: a medium that forgets what it acknowledged.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Context;

use super::*;
use crate::image::{Alignment, Image, OpKind, OpTicket};

type Sector = [u8; SECTOR_BYTES];

#[derive(Clone)]
enum Event {
    Write(usize, Box<Sector>),
    Sync,
}

#[derive(Default)]
struct MediumState {
    sectors: Vec<Sector>,
    events: Vec<Event>,
    fail_writes: Option<i32>,
    fail_syncs: Option<i32>,
    hold_syncs: bool,
    longest_run: usize,
}

/// An image that finishes everything at once and remembers the order. Syncs can be held.
struct Medium {
    state: Mutex<MediumState>,
    poisoned: AtomicBool,
    path: PathBuf,
}

thread_local! {
    static HELD: RefCell<Vec<OpTicket>> = const { RefCell::new(Vec::new()) };
}

impl Medium {
    fn new(sectors: Vec<Sector>) -> Arc<Medium> {
        let state = Mutex::new(MediumState { sectors, ..MediumState::default() });
        Arc::new(Medium { state, poisoned: AtomicBool::new(false), path: "medium".into() })
    }

    fn for_blocks(blocks: u64) -> Arc<Medium> {
        let sectors = usize::try_from(DurableTable::image_bytes(blocks)).unwrap() / SECTOR_BYTES;
        Medium::new(vec![[0; SECTOR_BYTES]; sectors])
    }

    fn with<T>(&self, f: impl FnOnce(&mut MediumState) -> T) -> T {
        f(&mut self.state.lock().unwrap())
    }

    fn syncs(&self) -> usize {
        self.with(|s| s.events.iter().filter(|e| matches!(e, Event::Sync)).count())
    }
}

impl Image for Medium {
    fn size_bytes(&self) -> u64 {
        self.with(|s| s.sectors.len() * SECTOR_BYTES) as u64
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: 1, memory_bytes: 1 }
    }
    fn path(&self) -> &Path {
        &self.path
    }
    fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }
    fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
    }
    fn start(&self, _queue: &IoQueue, ticket: OpTicket) {
        let at = usize::try_from(ticket.at().0).unwrap();
        assert!(at.is_multiple_of(SECTOR_BYTES), "a table is written in whole sectors");
        let first = at / SECTOR_BYTES;
        let mut state = self.state.lock().unwrap();
        let failure = match ticket.kind() {
            OpKind::Write { .. } => state.fail_writes,
            OpKind::Sync => state.fail_syncs,
            _ => None,
        };
        let result = match (ticket.kind(), failure) {
            (_, Some(errno)) => Err(io::Error::from_raw_os_error(errno)),
            (OpKind::Read, _) => {
                let len = ticket.len();
                ticket.copy_in(&state.sectors.concat()[at..at + len]);
                Ok(len)
            }
            (OpKind::Write { .. }, _) => {
                let bytes = ticket.copy_out();
                assert!(bytes.len().is_multiple_of(SECTOR_BYTES));
                state.longest_run = state.longest_run.max(bytes.len() / SECTOR_BYTES);
                for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
                    let bytes: Sector = bytes.try_into().unwrap();
                    state.sectors[sector] = bytes;
                    state.events.push(Event::Write(sector, Box::new(bytes)));
                }
                Ok(bytes.len())
            }
            (OpKind::Sync, _) => {
                state.events.push(Event::Sync);
                if state.hold_syncs {
                    HELD.with_borrow_mut(|held| held.push(ticket));
                    return;
                }
                Ok(0)
            }
            (kind, _) => unreachable!("{kind:?}"),
        };
        drop(state);
        ticket.finish(result);
    }
}

fn release_syncs() {
    for ticket in HELD.with_borrow_mut(std::mem::take) {
        ticket.finish(Ok(0));
    }
}

/// Polls once.
fn poll<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => Some(answer),
        Poll::Pending => None,
    }
}

/// What a future that never waits answers.
fn now<T>(future: impl Future<Output = T>) -> T {
    poll(pin!(future)).expect("nothing is held")
}

fn range(start: u64, end: u64) -> BlockRange {
    BlockRange { start: BlockIndex(start), end: BlockIndex(end) }
}

fn set(table: &Table, range: BlockRange) {
    table.prepare(range).unwrap();
    table.set(range);
}

fn clear(table: &Table, range: BlockRange) {
    table.clear(range);
}

fn bits(table: &Table) -> Vec<bool> {
    (0..table.blocks()).map(|b| table.get(BlockIndex(b))).collect()
}

fn table_of(blocks: u64) -> Arc<Table> {
    Arc::new(Table::in_memory(blocks).unwrap())
}

const ID: Uuid = Uuid::from_u128(0x1234_5678);

fn create(medium: &Arc<Medium>, blocks: u64, queue: &IoQueue) -> DurableTable {
    now(DurableTable::create(medium.clone(), ID, table_of(blocks), [7; PAYLOAD_BYTES], queue)).unwrap()
}

fn load(medium: Arc<Medium>, blocks: u64, queue: &IoQueue) -> Result<(Vec<bool>, LoadReport), TableError> {
    let (durable, report) = now(DurableTable::load(medium, ID, table_of(blocks), queue))?;
    assert_eq!(durable.table().count(), bits(durable.table()).iter().filter(|b| **b).count() as u64);
    Ok((bits(durable.table()), report))
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n as u64).unwrap()
    }
}

/// What the medium may hold after a cut just before event `cut`: every sector as at the last sync before it, or as any
/// write since then made it.
fn after_cut(start: &[Sector], events: &[Event], cut: usize, rng: &mut Rng) -> Vec<Sector> {
    let synced = events[..cut].iter().rposition(|e| matches!(e, Event::Sync)).unwrap_or(0);
    let mut sectors = start.to_vec();
    for event in &events[..synced] {
        if let Event::Write(sector, bytes) = event {
            sectors[*sector] = **bytes;
        }
    }
    for event in &events[synced..cut] {
        if let Event::Write(sector, bytes) = event
            && rng.below(2) == 0
        {
            sectors[*sector] = **bytes;
        }
    }
    sectors
}

#[test]
fn every_power_cut_leaves_each_sector_as_it_was_committed_or_as_it_was_being_committed() {
    let queue = IoQueue::simulated();
    let blocks = 5 * SECTOR_BITS + 100;
    let (mut in_between, mut payload_moved) = (0, 0);
    for seed in 1..=40 {
        println!("seed {seed}");
        let mut rng = Rng(seed * 0x9e37_79b9 + 1);
        let medium = Medium::for_blocks(blocks);
        let start = medium.with(|s| s.sectors.clone());
        let durable = create(&medium, blocks, &queue);
        let created = medium.with(|s| s.events.len());
        let mut commits = vec![(created, bits(durable.table()), [7; PAYLOAD_BYTES])];
        for step in 0..12u8 {
            for _ in 0..rng.below(6) {
                let start = rng.below(usize::try_from(blocks).unwrap()) as u64;
                let some = range(start, (start + 1 + rng.below(5000) as u64).min(blocks));
                if rng.below(3) == 0 { durable.table().clear(some) } else { set(durable.table(), some) }
            }
            let mut payload = commits.last().unwrap().2;
            if rng.below(3) == 0 {
                payload = [step; PAYLOAD_BYTES];
                durable.set_payload(payload);
            }
            now(durable.commit(&queue)).unwrap();
            commits.push((medium.with(|s| s.events.len()), bits(durable.table()), payload));
        }
        let events = medium.with(|s| s.events.clone());
        for cut in created..=events.len() {
            let done = commits.iter().rposition(|(end, ..)| *end <= cut).unwrap();
            let next = if commits[done].0 == cut { done } else { done + 1 };
            let (found, report) = load(Medium::new(after_cut(&start, &events, cut, &mut rng)), blocks, &queue).unwrap();
            assert!(report.damaged.is_empty(), "cut {cut}");
            let (old, new) = (&commits[done], &commits[next]);
            assert!(report.payload == old.2 || report.payload == new.2, "cut {cut}");
            payload_moved += usize::from(report.payload != old.2);
            let sector = usize::try_from(SECTOR_BITS).unwrap();
            for ((found, old), new) in found.chunks(sector).zip(old.1.chunks(sector)).zip(new.1.chunks(sector)) {
                assert!(found == old || found == new, "cut {cut} made something new");
                in_between += usize::from(found != old);
            }
        }
    }
    assert!(in_between > 100 && payload_moved > 10, "{in_between} sectors and {payload_moved} headers were ahead");
}

#[test]
fn a_table_comes_back_and_only_what_changed_is_written() {
    let queue = IoQueue::simulated();
    let blocks = 100 * SECTOR_BITS;
    let medium = Medium::for_blocks(blocks);
    let table = table_of(blocks);
    set(&table, range(3 * SECTOR_BITS, 3 * SECTOR_BITS + 2));
    let durable = now(DurableTable::create(medium.clone(), ID, table, [1; PAYLOAD_BYTES], &queue)).unwrap();
    let events = || medium.with(|s| s.events.len());
    assert_eq!(events(), 3, "one sector of bits, the header, a sync");
    now(durable.commit(&queue)).unwrap();
    assert_eq!(events(), 3, "nothing changed");
    set(durable.table(), range(SECTOR_BITS - 1, 4 * SECTOR_BITS + 1));
    now(durable.commit(&queue)).unwrap();
    assert_eq!(events(), 3 + 5 + 1, "five sectors and a sync");
    assert_eq!(medium.with(|s| s.longest_run), 5, "in one write");
    durable.table().clear(range(SECTOR_BITS - 1, SECTOR_BITS));
    now(durable.commit(&queue)).unwrap();
    assert_eq!(events(), 9 + 2);
    let (found, report) = load(medium, blocks, &queue).unwrap();
    assert_eq!(found, bits(durable.table()));
    assert_eq!((report.payload, report.damaged.len()), ([1; PAYLOAD_BYTES], 0));
}

#[test]
fn bits_set_while_their_bytes_are_being_synced_wait_for_the_next_commit() {
    let queue = IoQueue::simulated();
    let medium = Medium::for_blocks(1000);
    let durable = create(&medium, 1000, &queue);
    set(durable.table(), range(0, 1));
    let first = async || {
        set(durable.table(), range(1, 2)); // Its bytes are written, but not synced by this.
        Ok(())
    };
    now(durable.commit_after(&queue, first)).unwrap();
    let (found, _) = load(medium.clone(), 1000, &queue).unwrap();
    assert!(found[0] && !found[1], "a bit is durable before its bytes are");
    now(durable.commit(&queue)).unwrap();
    assert!(load(medium, 1000, &queue).unwrap().0[1]);
}

#[test]
fn what_is_to_be_synced_first_is_synced_even_when_no_bit_changed() {
    let queue = IoQueue::simulated();
    let durable = create(&Medium::for_blocks(1000), 1000, &queue);
    let ran = std::cell::Cell::new(0);
    now(durable.commit_after(&queue, async || {
        ran.set(ran.get() + 1);
        Ok(())
    }))
    .unwrap();
    assert_eq!(ran.get(), 1);
}

#[test]
fn those_who_ask_while_a_commit_runs_share_the_next_one() {
    let queue = IoQueue::simulated();
    let medium = Medium::for_blocks(10 * SECTOR_BITS);
    let durable = create(&medium, 10 * SECTOR_BITS, &queue);
    let before = medium.syncs();
    medium.with(|s| s.hold_syncs = true);
    set(durable.table(), range(0, 1));
    let mut first = pin!(durable.commit(&queue));
    assert!(poll(first.as_mut()).is_none());
    let mut others: Vec<_> = (1..8)
        .map(|i| {
            set(durable.table(), range(i * SECTOR_BITS, i * SECTOR_BITS + 1));
            Box::pin(durable.commit(&queue))
        })
        .collect();
    assert!(others.iter_mut().all(|other| poll(other.as_mut()).is_none()));
    release_syncs();
    assert!(poll(first.as_mut()).unwrap().is_ok());
    assert!(others.iter_mut().all(|other| poll(other.as_mut()).is_none()), "the running commit did not cover them");
    assert_eq!(medium.syncs(), before + 2);
    release_syncs();
    assert!(others.iter_mut().all(|other| poll(other.as_mut()).unwrap().is_ok()));
    assert_eq!(medium.syncs(), before + 2, "seven shared one sync");
    let (found, _) = load(medium, 10 * SECTOR_BITS, &queue).unwrap();
    assert_eq!(found, bits(durable.table()));
}

#[test]
fn a_commit_of_which_nobody_knows_what_it_left_is_the_last_one() {
    let queue = IoQueue::simulated();
    for what in ["sync", "abandoned"] {
        let medium = Medium::for_blocks(1000);
        let durable = create(&medium, 1000, &queue);
        medium.with(|s| s.hold_syncs = true);
        set(durable.table(), range(0, 1));
        let mut running = Box::pin(durable.commit(&queue));
        assert!(poll(running.as_mut()).is_none());
        set(durable.table(), range(1, 2));
        let mut second = Box::pin(durable.commit(&queue));
        let mut third = Box::pin(durable.commit(&queue));
        assert!(poll(second.as_mut()).is_none() && poll(third.as_mut()).is_none());
        medium.with(|s| s.fail_syncs = (what == "sync").then_some(libc::EIO));
        release_syncs();
        assert!(poll(running.as_mut()).unwrap().is_ok(), "{what}: this one had stored everything");
        if what == "abandoned" {
            assert!(poll(second.as_mut()).is_none());
            drop(second);
        } else {
            assert!(poll(second.as_mut()).unwrap().is_err(), "{what}");
        }
        assert!(poll(third.as_mut()).unwrap().is_err(), "{what}");
        medium.with(|s| (s.fail_syncs, s.hold_syncs) = (None, false));
        release_syncs();
        let events = medium.with(|s| s.events.len());
        let later = now(durable.commit(&queue)).unwrap_err();
        assert_eq!(later.kind, ImageErrorKind::Poisoned, "{what}");
        assert_eq!(medium.with(|s| s.events.len()), events, "{what}: nothing is tried again");
    }
}

/// A lack of space that is over, say. Nobody can have relied on what was not stored.
#[test]
fn a_commit_that_is_refused_is_told_to_all_who_wait_and_stored_by_the_next_one() {
    let queue = IoQueue::simulated();
    for what in ["write", "first"] {
        let medium = Medium::for_blocks(2 * SECTOR_BITS);
        let durable = create(&medium, 2 * SECTOR_BITS, &queue);
        medium.with(|s| s.hold_syncs = true);
        set(durable.table(), range(0, 1));
        let mut running = Box::pin(durable.commit(&queue));
        assert!(poll(running.as_mut()).is_none());
        set(durable.table(), range(1, 2));
        set(durable.table(), range(SECTOR_BITS, SECTOR_BITS + 1));
        durable.set_payload([7; PAYLOAD_BYTES]);
        let fails = async || {
            let error = ImageError::new(ImageErrorKind::Io, ImageOp::Write, "elsewhere", "it failed");
            if what == "first" { Err(error) } else { Ok(()) }
        };
        let mut second = Box::pin(durable.commit_after(&queue, fails));
        let mut third = Box::pin(durable.commit_after(&queue, fails));
        assert!(poll(second.as_mut()).is_none() && poll(third.as_mut()).is_none());
        medium.with(|s| s.fail_writes = (what == "write").then_some(libc::ENOSPC));
        release_syncs();
        assert!(poll(running.as_mut()).unwrap().is_ok(), "{what}: this one had stored everything");
        assert!(poll(second.as_mut()).unwrap().is_err(), "{what}: it is refused");
        assert!(poll(third.as_mut()).unwrap().is_err(), "{what}: who shares it is told");
        medium.with(|s| (s.fail_writes, s.hold_syncs) = (None, false));
        clear(durable.table(), range(1, 2));
        now(durable.commit(&queue)).unwrap();
        let (stored, report) = load(medium, 2 * SECTOR_BITS, &queue).unwrap();
        let set: Vec<usize> = (0..stored.len()).filter(|&block| stored[block]).collect();
        assert_eq!(set, [0, usize::try_from(SECTOR_BITS).unwrap()], "{what}: as the table is now");
        assert_eq!(report.payload, [7; PAYLOAD_BYTES], "{what}");
        now(durable.commit(&queue)).unwrap();
    }
}

/// Who was told late has what it asked for, if a later commit has stored it.
#[test]
fn who_waits_for_a_refused_commit_leads_no_other_one() {
    let queue = IoQueue::simulated();
    let medium = Medium::for_blocks(1000);
    let durable = create(&medium, 1000, &queue);
    medium.with(|s| s.hold_syncs = true);
    let mut running = Box::pin(durable.commit_after(&queue, async || Ok(())));
    set(durable.table(), range(0, 1));
    assert!(poll(running.as_mut()).is_none());
    let mut waits = Box::pin(durable.commit(&queue));
    let mut leads = Box::pin(durable.commit(&queue));
    assert!(poll(waits.as_mut()).is_none() && poll(leads.as_mut()).is_none());
    set(durable.table(), range(1, 2));
    release_syncs();
    assert!(poll(running.as_mut()).unwrap().is_ok());
    medium.with(|s| s.fail_writes = Some(libc::ENOSPC));
    assert!(poll(leads.as_mut()).unwrap().is_err());
    medium.with(|s| (s.fail_writes, s.hold_syncs) = (None, false));
    now(durable.commit(&queue)).unwrap();
    assert!(poll(waits.as_mut()).unwrap().is_ok(), "the next one has stored it");
    assert_eq!(load(medium, 1000, &queue).unwrap().0.iter().filter(|&&bit| bit).count(), 2);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let queue = IoQueue::simulated();
    let blocks = 2 * SECTOR_BITS + 5;
    let medium = Medium::for_blocks(blocks);
    let durable = create(&medium, blocks, &queue);
    set(durable.table(), range(5, 900));
    set(durable.table(), range(SECTOR_BITS + 70, SECTOR_BITS + 71));
    set(durable.table(), range(2 * SECTOR_BITS, blocks));
    now(durable.commit(&queue)).unwrap();
    let good = medium.with(|s| s.sectors.clone());
    for sector in 0..good.len() {
        for bit in 0..SECTOR_BYTES * 8 {
            let mut bad = good.clone();
            bad[sector][bit / 8] ^= 1 << (bit % 8);
            match load(Medium::new(bad), blocks, &queue) {
                Err(TableError::Damaged { .. }) => assert_eq!(sector, 0, "only the header stops a load"),
                Err(e) => panic!("{e}"),
                Ok((found, report)) => {
                    let place = blocks_of(sector as u64 - 1, blocks);
                    assert_eq!(report.damaged, [place], "bit {bit} of sector {sector}");
                    assert!(place.iter().all(|b| !found[usize::try_from(b.0).unwrap()]));
                }
            }
        }
    }
    // Sectors in each other's place, of another table, half old and half new.
    let mut bad = good.clone();
    bad.swap(1, 2);
    assert_eq!(load(Medium::new(bad), blocks, &queue).unwrap().1.damaged, [range(0, 2 * SECTOR_BITS)]);
    let mut bad = good.clone();
    encode_sector(Uuid::from_u128(9), 0, &words_of(durable.table(), 0), &mut bad[1]);
    assert_eq!(load(Medium::new(bad), blocks, &queue).unwrap().1.damaged, [range(0, SECTOR_BITS)]);
    let mut bad = good.clone();
    bad[1][256..].fill(0);
    assert_eq!(load(Medium::new(bad), blocks, &queue).unwrap().1.damaged, [range(0, SECTOR_BITS)]);
    // Bits of blocks that are not there, and the wrong table altogether.
    let mut bad = good.clone();
    encode_sector(ID, 2, &[1 << 5; SECTOR_WORDS], &mut bad[3]);
    assert_eq!(load(Medium::new(bad), blocks, &queue).unwrap().1.damaged, [range(2 * SECTOR_BITS, blocks)]);
    for (id, blocks) in [(Uuid::from_u128(9), blocks), (ID, blocks + 1), (ID, SECTOR_BITS)] {
        let answer = now(DurableTable::load(Medium::new(good.clone()), id, table_of(blocks), &queue));
        assert!(matches!(answer, Err(TableError::Damaged { .. })), "{answer:?}");
    }
}

#[test]
fn a_table_that_outlived_its_process_is_stored_where_it_differs() {
    let queue = IoQueue::simulated();
    let blocks = 6 * SECTOR_BITS;
    let medium = Medium::for_blocks(blocks);
    let durable = create(&medium, blocks, &queue);
    for sector in [0, 1, 2, 4] {
        set(durable.table(), range(sector * SECTOR_BITS, sector * SECTOR_BITS + 9));
    }
    now(durable.commit(&queue)).unwrap();
    let table = table_of(blocks);
    for sector in [0, 1, 3, 4] {
        set(&table, range(sector * SECTOR_BITS, sector * SECTOR_BITS + 9));
    }
    set(&table, range(SECTOR_BITS, SECTOR_BITS + 10));
    medium.with(|s| s.sectors[5][17] ^= 1);
    let (durable, report) = now(DurableTable::resume(medium.clone(), ID, table, &queue)).unwrap();
    assert_eq!(report.damaged, [range(4 * SECTOR_BITS, 5 * SECTOR_BITS)]);
    let events = medium.with(|s| s.events.len());
    now(durable.commit(&queue)).unwrap();
    assert_eq!(medium.with(|s| s.events.len()) - events, 4 + 1, "four sectors differ");
    let (found, report) = load(medium, blocks, &queue).unwrap();
    assert_eq!(found, bits(durable.table()));
    assert!(report.damaged.is_empty());
}
