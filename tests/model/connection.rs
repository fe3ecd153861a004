//! A cut that pins the connections of its moment, explored: one frontend that was there before the cut writes a chain
//! over its two queues, each link only after the one before was acknowledged; another one, which comes at some
//! moment, writes elsewhere and over the first one's links. Then the first one is cut over while it writes, or leaves.
//!
//! The frozen version must hold a beginning of the chain, all of it that was acknowledged before the cutover (all of
//! it if the frontend left), nothing of what the frontend wrote that came after the cut, and must never change again.

use std::sync::Arc;

use halfsilver::engine::{
    Attachment, Backing, ChainEditor, Cut, Disk, DiskOptions, Epoch, EpochClock, EpochLane, Layer, NewLayer,
    PreparedSnapshot, Request, Writers,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, IoQueue};
use halfsilver::planted::{Defect, plant};
use shuttle::rand::Rng;
use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::{future::block_on, thread};

use crate::cut::{DISK_BYTES, FOREVER, SECTOR, memory};
use crate::{alone, explore, is_noticed};

/// Links of the chain: link i goes through queue i % 2 to sector i.
const LINKS: usize = 6;
/// Where the newcomer writes besides: a sector of its own in the same block.
const NEWCOMERS: usize = LINKS;
const NEWCOMERS_BYTE: u8 = 0xee;
const ORDERS: usize = 1000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    CutOver,
    Leaves,
}

fn write(attachment: &Attachment, lane: &EpochLane, sector: usize, byte: u8) -> (Epoch, Epoch) {
    let mut data = AlignedBuf::zeroed(SECTOR);
    data.fill(byte);
    let from = GuestBuf::from_owned(data).0;
    let ticket = lane.enter();
    let request = Request::Write { at: ByteOffset((sector * SECTOR) as u64), from, durable: false };
    block_on(attachment.execute(&IoQueue::simulated(), &ticket, request)).unwrap();
    (ticket.entered(), ticket.epoch())
}

fn read(attachment: &Attachment, lane: &EpochLane) -> Vec<u8> {
    let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(DISK_BYTES));
    let request = Request::Read { at: ByteOffset(0), into };
    block_on(attachment.execute(&IoQueue::simulated(), &lane.enter(), request)).unwrap();
    memory.to_vec().chunks(SECTOR).map(|sector| sector[0]).collect()
}

/// Whose turn it is on which queue, and how many links were acknowledged.
struct Turns {
    next: Mutex<usize>,
    changed: Condvar,
    acknowledged: AtomicUsize,
}

/// One queue of the frontend that was there before the cut.
fn write_links(attachment: &Attachment, queue: usize, turns: &Turns) {
    let lane = attachment.lane();
    for link in (queue..LINKS).step_by(2) {
        let mut next = turns.next.lock().unwrap();
        while *next != link {
            next = turns.changed.wait(next).unwrap();
        }
        drop(next);
        write(attachment, &lane, link, mark(link));
        // Before and after the cutover it reads what it wrote.
        let seen = read(attachment, &lane)[link];
        assert!(seen == mark(link) || link == 0 && seen == NEWCOMERS_BYTE, "link {link} reads {seen}");
        turns.acknowledged.store(link + 1, Ordering::SeqCst);
        *turns.next.lock().unwrap() += 1;
        turns.changed.notify_all();
    }
}

fn mark(link: usize) -> u8 {
    u8::try_from(link + 1).unwrap()
}

/// Lets the others go on for a while, or not: a cut may come at any time.
fn pause() {
    let turns = if shuttle::rand::thread_rng().gen_bool(0.5) { 0 } else { 200 };
    (0..turns).for_each(|_| thread::yield_now());
}

/// The cut as the daemon makes it: [`ChainEditor::cut`] sets the pins, then moves the counter, and has the defect that
/// does it the other way round.
fn cut(disk: &Arc<Disk>, editor: &ChainEditor) -> Cut {
    let table = Arc::new(Disk::table_in_memory(DISK_BYTES as u64, 4096).unwrap());
    let layer = NewLayer::Frozen { layer: Layer::of(Backing::One(memory()), table) };
    let prepared = PreparedSnapshot { disk: disk.clone(), layer, new_live: uuid::Uuid::new_v4(), changed: None };
    pause();
    editor.cut(vec![prepared], Writers::Connection).unwrap()
}

fn one_order(end: End) {
    let clock = EpochClock::new(Epoch(1));
    let editor = ChainEditor::new(clock.clone());
    let discards = std::sync::Arc::new(Disk::table_in_memory(DISK_BYTES as u64, 4096).unwrap());
    let options = DiskOptions { image: Backing::One(memory()), block_bytes: 4096, read_only: false, discards };
    let disk = Disk::new(clock.clone(), options);
    let turns = Arc::new(Turns { next: Mutex::new(0), changed: Condvar::new(), acknowledged: AtomicUsize::new(0) });

    let old = disk.attach_live().connect();
    let threads: Vec<_> = (0..2)
        .map(|queue| {
            let (old, turns) = (old.clone(), turns.clone());
            thread::spawn(move || write_links(&old, queue, &turns))
        })
        .collect();
    drop(old); // The connection ends with its queues.
    let is_cut = Arc::new(AtomicBool::new(false));
    let newcomer = {
        let (disk, is_cut) = (disk.clone(), is_cut.clone());
        thread::spawn(move || {
            let is_new = is_cut.load(Ordering::SeqCst);
            let attachment = disk.attach_live().connect();
            let lane = attachment.lane();
            for sector in [NEWCOMERS, 0] {
                let (entered, acts_in) = write(&attachment, &lane, sector, NEWCOMERS_BYTE);
                assert!(!is_new || entered == acts_in, "it came after the cut and acts in {acts_in} at {entered}");
            }
            is_new
        })
    };

    pause();
    let before_cut = turns.acknowledged.load(Ordering::SeqCst);
    let Cut { ended, frozen } = cut(&disk, &editor);
    is_cut.store(true, Ordering::SeqCst);
    pause();
    let mut kept = before_cut;
    if end == End::CutOver {
        kept = turns.acknowledged.load(Ordering::SeqCst);
        editor.cut_over(&[&disk], ended).unwrap();
    }
    let last = disk.connections().wait_free(ended, FOREVER).expect("nobody holds it for ever");
    assert!(disk.clock().wait_quiet(last, FOREVER));
    frozen[0].set_quiesced();

    let (view, lane) = (disk.attach_frozen(frozen[0].id), clock.lane());
    let seen = read(&view, &lane);
    check(&seen, if end == End::Leaves { LINKS } else { kept });
    for thread in threads {
        thread.join().unwrap();
    }
    let is_new = newcomer.join().unwrap();
    assert!(!is_new || !seen.contains(&NEWCOMERS_BYTE), "it came after the cut and is in the version: {seen:?}");
    assert_eq!(read(&view, &lane), seen, "a frozen version changed after it was quiesced");
    let live = read(&disk.attach_live(), &lane);
    let expected: Vec<u8> = (1..LINKS).map(mark).chain([NEWCOMERS_BYTE]).collect();
    assert_eq!(live[1..=NEWCOMERS], expected, "the live version has the writes of both");
}

/// A beginning of the chain, at least `kept` long. Sector 0 may also be the newcomer's, if it was there before the cut.
fn check(seen: &[u8], kept: usize) {
    let there = |link: usize| seen[link] == mark(link) || link == 0 && seen[0] == NEWCOMERS_BYTE;
    let length = (0..LINKS).take_while(|&link| there(link)).count();
    assert!((length..LINKS).all(|link| seen[link] == 0), "not a beginning of the chain: {seen:?}");
    assert!(length >= kept, "{kept} links belong to the version, {length} are in it");
}

#[test]
fn connections_stay_with_the_version_of_the_cut_until_the_cutover() {
    let _alone = alone();
    explore(ORDERS, || one_order(End::CutOver));
}

#[test]
fn connections_stay_with_the_version_of_the_cut_until_they_leave() {
    let _alone = alone();
    explore(ORDERS, || one_order(End::Leaves));
}

#[test]
fn planted_pins_after_the_cut_are_noticed() {
    let _alone = alone();
    let cases = [
        (Defect::PinAfterCut, End::CutOver),
        (Defect::PinAfterCut, End::Leaves),
        (Defect::CutOverAfterMove, End::CutOver),
    ];
    let noticed = cases.map(|(defect, end)| {
        plant(Some(defect));
        let noticed = is_noticed(10 * ORDERS, move || one_order(end));
        plant(None);
        crate::report(defect, noticed, &format!("connection.rs ({end:?})"));
        noticed
    });
    assert_eq!(noticed, [true; 3]);
}
