//! The flowcharts of source 002, figures 11 to 27, one test each, on a frozen version (VLUN A, with a request of its
//! own time that still drains) and a live one (VLUN B). Comments and messages cite the flowcharts' blocks.
//!
//! Where the engine does it differently, the test says so and holds it to what that must achieve:
//! - Reads take no lock (figures 19 and 26): they look at the table again after they have read.
//! - Bytes come before the change of the table that points readers to them (1502 to 1604, 1804, 2003 to 2007, 2202,
//!   2303, 2503, 2703 to 2707): whoever reads in between must not be shown bytes that are not there yet.

use std::ops::Range;
use std::sync::Arc;

use halfsilver::engine::{BlockPlan, Copy, Fill, Ticket, Version};
use halfsilver::store::BlockIndex;

use crate::bench::{BLOCK_SECTORS, Bench, block, first_bytes};
use crate::sim::{self, Rng, Scheduler, SimImage};

/// The places of VLUN A and VLUN B in the chain.
const A: usize = 0;
const B: usize = 1;
/// What blocks 0 to 2 hold before the cut. Block 3 was never written.
const OLD: u8 = 1;

struct Mirror {
    bench: Bench,
    /// A process that was there before the backup was asked for (301).
    first: Ticket,
    /// One that came afterwards (304).
    second: Ticket,
    vlun_a: Arc<Version>,
    image_a: SimImage,
    image_b: SimImage,
}

impl Mirror {
    fn of(cut: impl FnOnce(&Bench) -> (Arc<Version>, SimImage, SimImage)) -> Mirror {
        let bench = Bench::new();
        bench.write(&bench.ticket(), 0..3 * BLOCK_SECTORS, OLD);
        let first = bench.ticket();
        let (vlun_a, image_a, image_b) = cut(&bench);
        let second = bench.ticket();
        Mirror { bench, first, second, vlun_a, image_a, image_b }
    }

    fn write_mirroring() -> Mirror {
        Mirror::of(|bench| {
            let (cut, leg) = bench.cut_to_split(&bench.live);
            (cut.frozen[0].clone(), leg, bench.live.clone())
        })
    }

    fn write_logging() -> Mirror {
        Mirror::of(|bench| {
            let (cut, log) = bench.cut_to_log();
            (cut.frozen[0].clone(), bench.live.clone(), log)
        })
    }

    fn copy_on_write() -> Mirror {
        Mirror::of(|bench| {
            let (cut, frozen) = bench.cut();
            (cut.frozen[0].clone(), frozen, bench.live.clone())
        })
    }

    /// What a write to VLUN A or VLUN B will do.
    fn plan(&self, vlun: usize, block: usize, whole: bool) -> BlockPlan {
        BlockPlan::decide(self.bench.disk.chain().at(vlun), BlockIndex(block as u64), whole)
    }

    fn entry(&self, vlun: usize, block: usize) -> bool {
        self.bench.entry(vlun, block)
    }

    fn write_a(&self, sectors: Range<usize>, fill: u8) {
        self.bench.write(&self.first, sectors, fill);
    }

    fn write_b(&self, sectors: Range<usize>, fill: u8) {
        self.bench.write(&self.second, sectors, fill);
    }

    fn start_write_a(&self, sectors: Range<usize>, fill: u8) -> Scheduler {
        self.bench.start_write(&self.first, sectors, fill)
    }

    fn start_write_b(&self, sectors: Range<usize>, fill: u8) -> Scheduler {
        self.bench.start_write(&self.second, sectors, fill)
    }

    fn read_a(&self, sectors: Range<usize>) -> Vec<u8> {
        self.bench.read(&self.first, sectors)
    }

    fn read_b(&self, sectors: Range<usize>) -> Vec<u8> {
        self.bench.read(&self.second, sectors)
    }

    /// The existing processes end: VLUN A can be taken for the backup. Then it goes, and the disk is one raw image.
    fn back_up_and_end(self, vlun_a: [u8; 4], vlun_b: [u8; 4]) {
        let whole = |blocks: [u8; 4]| blocks.into_iter().flat_map(same).collect::<Vec<u8>>();
        let Mirror { bench, first, second, vlun_a: version, .. } = self;
        let ended = first.epoch();
        assert!(!bench.clock.is_drained(ended), "an existing process still runs");
        drop(first);
        assert!(bench.clock.is_drained(ended), "and nobody waits for the new one");
        assert_eq!(bench.frozen(&version).unwrap(), whole(vlun_a), "the backup");
        assert_eq!(bench.read(&second, 0..bench.sectors()), whole(vlun_b), "VLUN B");
        drop(second);
        bench.retire(&version);
        let chain = bench.disk.chain();
        assert_eq!(chain.links().len(), 1);
        assert_eq!(chain.pivot_of(chain.live()), chain.live());
        assert_eq!(bench.read(&bench.ticket(), 0..bench.sectors()), whole(vlun_b), "the disk afterwards");
    }
}

/// A block full of one byte.
fn same(fill: u8) -> Vec<u8> {
    vec![fill; BLOCK_SECTORS]
}

fn on(image: &SimImage, sectors: Range<usize>) -> Vec<u8> {
    first_bytes(&image.bytes())[sectors].to_vec()
}

fn ends(mut scheduler: Scheduler) -> bool {
    scheduler.settle(&mut Rng::new(11))
}

/// It has done all that it can while something holds it up.
fn is_stuck(scheduler: &mut Scheduler) -> bool {
    !scheduler.settle(&mut Rng::new(13))
}

#[test]
fn figure_11_writes_of_vlun_a_go_to_both_images_and_writes_of_vlun_b_to_image_b() {
    let mirror = Mirror::write_mirroring();
    assert_eq!(mirror.plan(A, 0, true), BlockPlan { others: vec![B], ..BlockPlan::plain(A) }, "1103");
    assert_eq!(mirror.plan(B, 0, true), BlockPlan::plain(B), "1104");
    mirror.write_a(block(0), 5); // 1101, 1103
    assert_eq!((on(&mirror.image_a, block(0)), on(&mirror.image_b, block(0))), (same(5), same(5)), "1103");
    mirror.write_b(block(1), 9); // 1102, 1104
    assert_eq!((on(&mirror.image_a, block(1)), on(&mirror.image_b, block(1))), (same(OLD), same(9)), "1104");
    // One-way: the later write to VLUN A is mirrored onto what VLUN B wrote, in just its own sectors.
    mirror.write_a(10..12, 6);
    assert_eq!(on(&mirror.image_a, block(1)), [1, 1, 6, 6, 1, 1, 1, 1]);
    assert_eq!(on(&mirror.image_b, block(1)), [9, 9, 6, 6, 9, 9, 9, 9]);
    mirror.write_a(block(1), 6);
    mirror.back_up_and_end([5, 6, 1, 0], [5, 6, 1, 0]);
}

#[test]
fn figure_12_existing_processes_read_image_a_and_new_ones_image_b() {
    let mirror = Mirror::write_mirroring();
    let read = halfsilver::image::OpKind::Read;
    // Both images still hold the same, so each is held up in turn to see who reads there.
    mirror.image_b.hold(Some(read));
    assert_eq!(mirror.read_a(block(0)), same(OLD), "1205: the existing process does not need image B");
    mirror.image_b.hold(None);
    mirror.image_a.hold(Some(read));
    assert_eq!(mirror.read_b(block(0)), same(OLD), "1204: the new process does not need image A");
    mirror.image_a.hold(None);
    mirror.write_b(block(0), 9);
    assert_eq!((mirror.read_a(block(0)), mirror.read_b(block(0))), (same(OLD), same(9)));
    mirror.back_up_and_end([1, 1, 1, 0], [9, 1, 1, 0]);
}

/// Other than in the figure, 1304 and 1305 run at the same time, and writes of VLUN B share the lock with each other,
/// as on any disk: what excludes them is the write that goes to two images.
#[test]
fn figure_13_the_lock_keeps_both_images_in_one_order() {
    let mirror = Mirror::write_mirroring();
    mirror.image_b.hold_writes(true);
    let mut first = mirror.start_write_a(block(0), 5); // 1301
    assert!(is_stuck(&mut first), "1303: it has the lock, and waits for image B");
    assert_eq!((on(&mirror.image_a, block(0)), on(&mirror.image_b, block(0))), (same(5), same(OLD)), "1304, not 1305");
    let mut second = mirror.start_write_b(block(0), 9); // 1302
    let mut third = mirror.start_write_a(2..3, 7);
    assert!(is_stuck(&mut second) && is_stuck(&mut third), "1303: the lock is taken, so they are suspended");
    assert_eq!((mirror.image_b.in_flight(), mirror.image_a.in_flight()), (1, 0), "and have written nothing");
    let mut elsewhere = mirror.start_write_b(block(1), 4);
    assert!(is_stuck(&mut elsewhere));
    assert_eq!(mirror.image_b.in_flight(), 2, "another block has another lock");
    mirror.image_b.hold_writes(false);
    assert!(ends(first) && ends(second) && ends(third) && ends(elsewhere), "1307: the lock goes on");
    assert_eq!(on(&mirror.image_a, block(0)), [5, 5, 7, 5, 5, 5, 5, 5], "1304");
    assert_eq!(on(&mirror.image_b, block(0)), [9, 9, 7, 9, 9, 9, 9, 9], "1305 and 1306, in the order of arrival");

    // The other way round: the write of VLUN A waits for the one of VLUN B, and comes last on image B.
    mirror.image_b.hold_writes(true);
    let mut second = mirror.start_write_b(block(2), 9);
    assert!(is_stuck(&mut second));
    let mut first = mirror.start_write_a(block(2), 5);
    assert!(is_stuck(&mut first));
    assert_eq!((on(&mirror.image_a, block(2)), mirror.image_a.in_flight()), (same(OLD), 0), "1303");
    mirror.image_b.hold_writes(false);
    assert!(ends(second) && ends(first));
    assert_eq!((on(&mirror.image_a, block(2)), on(&mirror.image_b, block(2))), (same(5), same(5)));
}

#[test]
fn figure_15_a_write_to_vlun_a_makes_both_find_it_in_image_a() {
    let mirror = Mirror::write_logging();
    mirror.write_b(block(0), 9);
    assert!(mirror.entry(B, 0) && !mirror.entry(B, 1));
    mirror.write_a(block(0), 5); // 1501
    assert!(!mirror.entry(B, 0), "1502: the table of image B says that image A has it");
    assert_eq!(on(&mirror.image_a, block(0)), same(5), "1503");
    mirror.image_b.hold(Some(halfsilver::image::OpKind::Read));
    assert_eq!(mirror.read_b(block(0)), same(5), "VLUN B reads it from image A");
    mirror.image_b.hold(None);
    // The alternative: a second write to VLUN B moves the block to image B.
    mirror.write_b(block(0), 8);
    assert!(mirror.entry(B, 0));
    assert_eq!((on(&mirror.image_a, block(0)), on(&mirror.image_b, block(0))), (same(5), same(8)));
    mirror.back_up_and_end([5, 1, 1, 0], [8, 1, 1, 0]);
}

/// Other than in the figure, 1605 comes before 1604: a reader in between would be led to image A too early.
#[test]
fn figure_16_a_write_to_vlun_a_takes_the_entry_and_the_space_out_of_image_b() {
    let mirror = Mirror::write_logging();
    mirror.write_b(block(0), 9);
    mirror.write_b(block(1), 9);
    assert_eq!(mirror.image_b.sectors_in_use(), 16);
    // 1603, no: 1605 and nothing else.
    assert_eq!(mirror.plan(A, 2, true), BlockPlan::plain(A));
    mirror.write_a(block(2), 5); // 1601
    assert_eq!((on(&mirror.image_a, block(2)), mirror.image_b.sectors_in_use()), (same(5), 16), "1605");
    // 1603, yes.
    assert_eq!(mirror.plan(A, 0, true), BlockPlan { supersedes: vec![B], ..BlockPlan::plain(A) }, "1604");
    mirror.image_a.hold_writes(true);
    let mut first = mirror.start_write_a(block(0), 5); // 1601, 1602
    assert!(is_stuck(&mut first));
    assert!(mirror.entry(B, 0), "image A does not have the bytes, so the entry stays");
    assert_eq!(mirror.read_b(block(0)), same(9), "and VLUN B is not shown what image A had before");
    mirror.image_a.hold_writes(false);
    assert!(ends(first));
    assert_eq!(on(&mirror.image_a, block(0)), same(5), "1605");
    assert!(!mirror.entry(B, 0), "1604: the entry is deleted");
    assert_eq!(mirror.image_b.sectors_in_use(), 8, "1604: the space is given back");
    // The figure knows whole blocks only. A part of one is written to both, and the entry stays.
    assert_eq!(mirror.plan(A, 1, false), BlockPlan { others: vec![B], ..BlockPlan::plain(A) });
    mirror.write_a(9..10, 6);
    assert!(mirror.entry(B, 1));
    assert_eq!(on(&mirror.image_a, block(1)), [1, 6, 1, 1, 1, 1, 1, 1]);
    assert_eq!(on(&mirror.image_b, block(1)), [9, 6, 9, 9, 9, 9, 9, 9]);
}

#[test]
fn figure_17_a_read_of_vlun_b_goes_where_its_table_says() {
    let mirror = Mirror::write_logging();
    mirror.write_b(block(0), 9);
    let read = halfsilver::image::OpKind::Read;
    assert!(mirror.entry(B, 0), "1703, yes");
    mirror.image_a.hold(Some(read));
    assert_eq!(mirror.read_b(block(0)), same(9), "1705: from image B, without image A");
    mirror.image_a.hold(None);
    assert!(!mirror.entry(B, 1), "1703, no");
    mirror.image_b.hold(Some(read));
    assert_eq!(mirror.read_b(block(1)), same(OLD), "1704: from image A, without image B");
    mirror.image_b.hold(None);
    assert_eq!(mirror.read_b(7..9), [9, OLD], "1701: a read across both");
}

/// Other than in the figure, 1805 comes before 1804: a reader in between would be led to bytes that are not there yet.
#[test]
fn figure_18_a_write_to_vlun_b_makes_an_entry_and_goes_to_image_b() {
    let mirror = Mirror::write_logging();
    // 1803, no.
    assert_eq!(mirror.plan(B, 0, true), BlockPlan { adopts: true, ..BlockPlan::plain(B) }, "1804");
    mirror.image_b.hold_writes(true);
    let mut second = mirror.start_write_b(block(0), 9); // 1801, 1802
    assert!(is_stuck(&mut second));
    assert!(!mirror.entry(B, 0), "image B does not have the bytes, so there is no entry");
    assert_eq!(mirror.read_b(block(0)), same(OLD), "and VLUN B still shows those of image A");
    mirror.image_b.hold_writes(false);
    assert!(ends(second));
    assert!(mirror.entry(B, 0), "1804");
    assert_eq!((on(&mirror.image_a, block(0)), on(&mirror.image_b, block(0))), (same(OLD), same(9)), "1805");
    // 1803, yes: 1805 and nothing else.
    assert_eq!(mirror.plan(B, 0, true), BlockPlan::plain(B));
    mirror.write_b(1..2, 8);
    assert_eq!(on(&mirror.image_b, block(0)), [9, 8, 9, 9, 9, 9, 9, 9], "1805");
    // The figure knows whole blocks only. The first part of a block brings the rest along from image A.
    assert_eq!(
        mirror.plan(B, 1, false),
        BlockPlan { adopts: true, fill_from: Some(Fill::Layer(A)), ..BlockPlan::plain(B) }
    );
    mirror.write_b(10..11, 7);
    assert_eq!(on(&mirror.image_b, block(1)), [1, 1, 7, 1, 1, 1, 1, 1]);
    let Mirror { bench, first, second, vlun_a, .. } = mirror;
    drop((first, second));
    bench.retire(&vlun_a);
    let expected = [[9, 8, 9, 9, 9, 9, 9, 9], [1, 1, 7, 1, 1, 1, 1, 1], [1; 8], [0; 8]].concat();
    assert_eq!(bench.live(), expected, "the log was folded into the image that the disk began with");
}

/// Other than in the figure, reads take no lock (1903, 1907): a backup would hold up the guest. What must hold instead:
/// nobody waits for a reader, and a reader shows nothing that was not its version's while it read.
#[test]
fn figure_19_reads_of_a_log_hold_up_nobody_and_show_no_freed_place() {
    let mirror = Mirror::write_logging();
    mirror.write_b(block(0), 9);
    let live = mirror.bench.disk.attach_live();
    // 1901, 1905: VLUN A is read from image A. 1902, 1904: VLUN B from image A or from image B.
    assert_eq!((mirror.read_a(block(0)), mirror.read_b(block(0))), (same(OLD), same(9)), "1905, 1906");
    assert_eq!((mirror.read_a(block(1)), mirror.read_b(block(1))), (same(OLD), same(OLD)), "1905, 1905");

    // 1906 under way, while a write to VLUN A takes the entry away and gives its place back.
    let (reader, shown) = mirror.bench.start_read(live.clone(), &mirror.second, block(0));
    mirror.image_b.hold_in_flight(true);
    mirror.write_a(block(0), 5);
    assert!(!mirror.entry(B, 0), "the write did not wait for the reader (no 1903)");
    mirror.image_b.hold_in_flight(false);
    assert!(ends(reader));
    assert_eq!(shown(), same(5), "not what is left in the place");

    // 1905 under way for VLUN B, while a write to VLUN B makes an entry: either is right, and nobody waits.
    let (reader, shown) = mirror.bench.start_read(live, &mirror.second, block(1));
    mirror.image_a.hold_in_flight(true);
    mirror.write_b(block(1), 7);
    mirror.image_a.hold_in_flight(false);
    assert!(ends(reader));
    assert_eq!(shown(), same(7));

    assert_eq!(entry_deleted_and_made_anew(), same(8), "a new entry is not taken for the old one");
}

/// What a read of VLUN B shows that was led to an entry which was deleted while it read, and made anew before it looked
/// at the table again.
pub fn entry_deleted_and_made_anew() -> Vec<u8> {
    let mirror = Mirror::write_logging();
    mirror.write_b(block(0), 9);
    let (reader, shown) = mirror.bench.start_read(mirror.bench.disk.attach_live(), &mirror.second, block(0));
    mirror.image_b.hold_in_flight(true);
    mirror.write_a(block(0), 5);
    mirror.image_b.hold_in_flight(false);
    sim::finish_io(); // It reads the place that was given back.
    mirror.write_b(block(0), 8);
    assert!(mirror.entry(B, 0));
    assert!(ends(reader));
    shown()
}

/// Other than in the figure, the bytes come first: 2005 before 2004, and 2008 before 2007 (figures 16 and 18).
#[test]
fn figure_20_writes_to_both_volumes_of_a_log_go_one_after_the_other() {
    let mirror = Mirror::write_logging();
    mirror.write_b(block(0), 9);
    // 2001 with an entry; 2006 comes while it has the lock.
    mirror.image_a.hold_writes(true);
    let mut first = mirror.start_write_a(block(0), 5);
    assert!(is_stuck(&mut first), "2002, 2003: it has the lock");
    let mut second = mirror.start_write_b(block(0), 8);
    assert!(is_stuck(&mut second));
    assert_eq!(mirror.image_b.in_flight(), 0, "2002: suspended");
    mirror.image_a.hold_writes(false);
    assert!(ends(first), "2005, 2004, 2009");
    assert!(!mirror.entry(B, 0), "2004");
    assert!(ends(second), "2002: its turn");
    assert!(mirror.entry(B, 0), "2003, no: 2007 made an entry again");
    assert_eq!((on(&mirror.image_a, block(0)), on(&mirror.image_b, block(0))), (same(5), same(8)), "2005, 2008");

    // 2006 without an entry; 2001 comes while it has the lock.
    mirror.image_b.hold_writes(true);
    let mut second = mirror.start_write_b(block(1), 8);
    assert!(is_stuck(&mut second));
    let mut first = mirror.start_write_a(block(1), 5);
    assert!(is_stuck(&mut first));
    assert_eq!((mirror.image_a.in_flight(), mirror.entry(B, 1)), (0, false), "2002: suspended");
    mirror.image_b.hold_writes(false);
    assert!(ends(second), "2008, 2007, 2009");
    assert!(mirror.entry(B, 1), "2007");
    assert!(ends(first));
    assert!(!mirror.entry(B, 1), "2003, yes: 2004");
    assert_eq!((on(&mirror.image_a, block(1)), mirror.read_b(block(1))), (same(5), same(5)), "2005");

    // 2003, no, for VLUN A: 2005 at once. 2003, yes, for VLUN B: 2008 at once.
    mirror.write_a(block(2), 4);
    mirror.write_b(block(0), 7);
    assert_eq!((on(&mirror.image_a, block(2)), on(&mirror.image_b, block(0))), (same(4), same(7)));
    mirror.back_up_and_end([5, 5, 4, 0], [7, 5, 4, 0]);
}

#[test]
fn figure_22_a_write_to_vlun_a_makes_both_find_it_in_image_b() {
    let mirror = Mirror::copy_on_write();
    mirror.write_b(block(0), 9);
    assert!(mirror.entry(A, 0), "the second data: the table of image A says that image A has the old data");
    assert_eq!((on(&mirror.image_a, block(0)), on(&mirror.image_b, block(0))), (same(OLD), same(9)), "replicated");
    mirror.write_a(block(0), 5); // 2201
    assert!(!mirror.entry(A, 0), "2202: the table of image A says that image B has it");
    assert_eq!(on(&mirror.image_b, block(0)), same(5), "2203");
    mirror.image_a.hold(Some(halfsilver::image::OpKind::Read));
    assert_eq!((mirror.read_a(block(0)), mirror.read_b(block(0))), (same(5), same(5)), "both from image B");
    mirror.image_a.hold(None);
    mirror.back_up_and_end([5, 1, 1, 0], [5, 1, 1, 0]);
}

/// Other than in the figure, 2304 comes before 2303: a reader of VLUN A in between would be led to image B too early.
#[test]
fn figure_23_a_write_to_vlun_a_takes_the_entry_and_the_space_out_of_image_a() {
    let mirror = Mirror::copy_on_write();
    mirror.write_b(block(0), 9);
    mirror.write_b(block(1), 9);
    assert_eq!(mirror.image_a.sectors_in_use(), 16);
    // 2302, no: 2304 and nothing else.
    assert_eq!(mirror.plan(A, 2, true), BlockPlan::plain(B));
    mirror.write_a(block(2), 5);
    assert_eq!((on(&mirror.image_b, block(2)), mirror.image_a.sectors_in_use()), (same(5), 16), "2304");
    // 2302, yes.
    assert_eq!(mirror.plan(A, 0, true), BlockPlan { supersedes: vec![A], ..BlockPlan::plain(B) }, "2303");
    mirror.image_b.hold_writes(true);
    let mut first = mirror.start_write_a(block(0), 5); // 2301
    assert!(is_stuck(&mut first));
    assert!(mirror.entry(A, 0), "image B does not have the bytes, so the entry stays");
    assert_eq!(mirror.read_a(block(0)), same(OLD), "and VLUN A is not shown what VLUN B wrote");
    mirror.image_b.hold_writes(false);
    assert!(ends(first));
    assert_eq!(on(&mirror.image_b, block(0)), same(5), "2304");
    assert!(!mirror.entry(A, 0), "2303: the entry is deleted");
    assert_eq!(mirror.image_a.sectors_in_use(), 8, "[0095]: the space is given back");
    // The figure knows whole blocks only. A part of one is written to both, and the entry stays.
    assert_eq!(mirror.plan(A, 1, false), BlockPlan { others: vec![A], ..BlockPlan::plain(B) });
    mirror.write_a(9..10, 6);
    assert!(mirror.entry(A, 1));
    assert_eq!(on(&mirror.image_a, block(1)), [1, 6, 1, 1, 1, 1, 1, 1]);
    assert_eq!(on(&mirror.image_b, block(1)), [9, 6, 9, 9, 9, 9, 9, 9]);
}

#[test]
fn figure_24_a_read_of_vlun_a_goes_where_its_table_says() {
    let mirror = Mirror::copy_on_write();
    mirror.write_b(block(0), 9);
    let read = halfsilver::image::OpKind::Read;
    assert!(mirror.entry(A, 0), "2402, yes");
    mirror.image_b.hold(Some(read));
    assert_eq!(mirror.read_a(block(0)), same(OLD), "2404: from image A, without image B");
    mirror.image_b.hold(None);
    assert!(!mirror.entry(A, 1), "2402, no");
    mirror.image_a.hold(Some(read));
    assert_eq!(mirror.read_a(block(1)), same(OLD), "2403: from image B, without image A");
    mirror.image_a.hold(None);
    assert_eq!(mirror.bench.frozen(&mirror.vlun_a).unwrap(), [same(1), same(1), same(1), same(0)].concat(), "2401");
    assert_eq!(mirror.read_b(7..9), [9, OLD]);
}

/// Other than in the figure, 2504 comes before 2503: a reader of VLUN A in between would be led to bytes that are not
/// there yet. Both come before 2505.
#[test]
fn figure_25_a_write_to_vlun_b_saves_the_old_data_first() {
    let mirror = Mirror::copy_on_write();
    // 2502, no.
    let saves = BlockPlan { preserve: Some(Copy { from: B, to: A }), ..BlockPlan::plain(B) };
    assert_eq!(mirror.plan(B, 0, true), saves);
    assert_eq!(mirror.plan(B, 0, false), saves, "a part of a block saves the whole");
    mirror.image_a.hold_writes(true);
    mirror.image_b.hold_writes(true);
    let mut second = mirror.start_write_b(block(0), 9); // 2501
    assert!(is_stuck(&mut second));
    assert_eq!((mirror.image_a.in_flight(), mirror.image_b.in_flight()), (1, 0), "2504 before 2505");
    assert!(!mirror.entry(A, 0), "image A does not have the bytes, so there is no entry");
    mirror.image_a.hold_writes(false);
    assert!(is_stuck(&mut second));
    assert_eq!((mirror.image_a.in_flight(), mirror.image_b.in_flight()), (0, 1), "2505 after 2504");
    assert_eq!((on(&mirror.image_a, block(0)), mirror.image_a.sectors_in_use()), (same(OLD), 8), "2504");
    assert!(mirror.entry(A, 0), "2503, before 2505 changes anything");
    assert_eq!(mirror.read_a(block(0)), same(OLD));
    mirror.image_b.hold_writes(false);
    assert!(ends(second));
    assert_eq!(on(&mirror.image_b, block(0)), same(9), "2505");
    // 2502, yes: 2505 and nothing else.
    assert_eq!(mirror.plan(B, 0, true), BlockPlan::plain(B));
    mirror.write_b(1..2, 8);
    assert_eq!((on(&mirror.image_b, 1..2), mirror.image_a.sectors_in_use()), (vec![8], 8), "2505");
    // A block that was never written is saved as the hole that it is.
    mirror.write_b(block(3), 4);
    assert_eq!((mirror.entry(A, 3), mirror.image_a.sectors_in_use(), mirror.read_a(block(3))), (true, 8, same(0)));
}

/// Other than in the figure, reads take no lock (2603, 2607): a backup would hold up the guest. What must hold instead:
/// nobody waits for a reader and no reader waits, and a reader of VLUN A shows nothing that VLUN B wrote.
#[test]
fn figure_26_reads_hold_up_nobody_and_show_nothing_new() {
    let mirror = Mirror::copy_on_write();
    let frozen = mirror.bench.disk.attach_frozen(mirror.vlun_a.id);
    // 2601, 2604, 2606: VLUN A is led to image B. While it reads, VLUN B saves the block and writes it.
    let (reader, shown) = mirror.bench.start_read(frozen.clone(), &mirror.second, block(0));
    assert_eq!((mirror.image_a.in_flight(), mirror.image_b.in_flight()), (0, 1), "2606");
    mirror.image_b.hold_in_flight(true);
    mirror.write_b(block(0), 9);
    assert_eq!(on(&mirror.image_b, block(0)), same(9), "the write did not wait for the reader (no 2603)");
    mirror.image_b.hold_in_flight(false);
    assert!(ends(reader));
    assert_eq!(shown(), same(OLD), "it looked at the table again, and went to image A: 2605");

    // While a block is saved and locked, nobody who reads it waits.
    mirror.image_a.hold_writes(true);
    let mut second = mirror.start_write_b(block(1), 9);
    assert!(is_stuck(&mut second));
    assert_eq!(mirror.read_b(block(1)), same(OLD), "2602, 2606");
    let (reader, shown) = mirror.bench.start_read(frozen, &mirror.second, block(1));
    assert!(ends(reader));
    assert_eq!(shown(), same(OLD), "2601, 2606");
    mirror.image_a.hold_writes(false);
    assert!(ends(second));
    mirror.back_up_and_end([1, 1, 1, 0], [9, 9, 1, 0]);
}

/// Other than in the figure, the bytes come first: 2705 before 2704, and 2708 before 2707 (figures 23 and 25).
#[test]
fn figure_27_writes_to_both_volumes_go_one_after_the_other() {
    let mirror = Mirror::copy_on_write();
    // 2706 without an entry; 2701 comes while it has the lock.
    mirror.image_a.hold_writes(true);
    let mut second = mirror.start_write_b(block(0), 9);
    assert!(is_stuck(&mut second), "2702, 2703, 2708");
    let mut first = mirror.start_write_a(block(0), 5);
    assert!(is_stuck(&mut first));
    assert_eq!(mirror.image_b.in_flight(), 0, "2702: suspended; what is being saved does not change");
    mirror.image_a.hold_writes(false);
    assert!(ends(second), "2708, 2707, 2709, 2710");
    assert_eq!((mirror.entry(A, 0), on(&mirror.image_b, block(0))), (true, same(9)), "2707, 2709");
    assert!(ends(first), "2702: its turn");
    assert_eq!((mirror.entry(A, 0), on(&mirror.image_b, block(0))), (false, same(5)), "2703, yes: 2704, 2705");
    assert_eq!((mirror.read_a(block(0)), mirror.read_b(block(0))), (same(5), same(5)));

    // 2701 with an entry; 2706 comes while it has the lock.
    mirror.write_b(block(1), 9);
    mirror.image_b.hold_writes(true);
    let mut first = mirror.start_write_a(block(1), 5);
    assert!(is_stuck(&mut first));
    let mut second = mirror.start_write_b(block(1), 8);
    assert!(is_stuck(&mut second));
    assert_eq!(mirror.image_b.in_flight(), 1, "2702: suspended");
    mirror.image_b.hold_writes(false);
    assert!(ends(first), "2705, 2704, 2710");
    assert!(ends(second), "2702: its turn");
    assert!(mirror.entry(A, 1), "2703, no: 2707 made an entry again");
    assert_eq!((on(&mirror.image_a, block(1)), on(&mirror.image_b, block(1))), (same(5), same(8)), "2708, 2709");

    // 2703, no, for VLUN A: 2705 at once. 2703, yes, for VLUN B: 2709 at once.
    mirror.write_a(block(2), 4);
    mirror.write_b(block(1), 7);
    assert_eq!((on(&mirror.image_b, block(2)), on(&mirror.image_b, block(1))), (same(4), same(7)));
    mirror.back_up_and_end([5, 5, 4, 0], [5, 7, 4, 0]);
}
