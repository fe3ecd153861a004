//! Single rules of the mirror, step by step, each with the one situation that it is about.

use std::sync::Arc;

use halfsilver::engine::{
    Backing, BlockPlan, Changed, Copy, Disk, Layer, NewLayer, PreparedSnapshot, Request, RequestError, RestoreSource,
    Version, VersionId, View, Writers,
};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf, OpKind};
use halfsilver::store::BlockIndex;

use crate::bench::{BLOCK, BLOCKS, Bench, block, write_of};
use crate::sim::{Rng, SECTOR, Scheduler};

#[test]
fn a_first_write_saves_exactly_its_block() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let (cut, frozen) = bench.cut();
    bench.write(&bench.ticket(), 9..10, 2);
    assert_eq!(frozen.sectors_in_use(), 8, "one block of eight sectors is saved, no more");
    assert_eq!(bench.frozen(&cut.frozen[0]).unwrap(), vec![1; 32]);
    bench.write(&bench.ticket(), 8..16, 3);
    assert_eq!(frozen.sectors_in_use(), 8, "and it is saved once");
    assert_eq!(bench.frozen(&cut.frozen[0]).unwrap(), vec![1; 32]);
}

#[test]
fn a_write_is_saved_once_however_many_snapshots_there_are() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let cuts: Vec<_> = (0..5).map(|_| bench.cut()).collect();
    bench.write(&bench.ticket(), 0..8, 2);
    let used: Vec<usize> = cuts.iter().map(|(_, image)| image.sectors_in_use()).collect();
    assert_eq!(used, [0, 0, 0, 0, 8], "only the nearest older version keeps the block");
    for (cut, _) in &cuts {
        assert_eq!(bench.frozen(&cut.frozen[0]).unwrap(), vec![1; 32], "older ones read through newer ones");
    }
}

/// A read has a version until it ends: the full image goes to VLUN B while a read of VLUN A is at the device.
#[test]
fn a_read_in_flight_shows_its_version_when_the_full_image_moves_away() {
    for writers in [Writers::Connection, Writers::Request] {
        let bench = Bench::new();
        bench.write(&bench.ticket(), 0..32, 1);
        let (old, new) = (bench.disk.attach_live().connect(), bench.disk.attach_live());
        let (lane, scheduler) = (old.lane(), &mut Rng::new(1));
        let (mut read, memory) = bench.start_read(old.clone(), &lane.enter(), block(0));
        bench.live.hold_in_flight(true);
        let image = bench.empty_image("frozen");
        let layer = NewLayer::Frozen { layer: Layer::of(Backing::One(Arc::new(image)), bench.table()) };
        let (disk, new_live) = (bench.disk.clone(), VersionId::new_v4());
        let prepared = PreparedSnapshot { disk, layer, new_live, changed: None };
        bench.editor.cut(vec![prepared], writers).unwrap();
        bench.on(new, &bench.ticket(), write_of(block(0), 9)).unwrap();
        assert_eq!(bench.live()[block(0)], [9; 8]);
        bench.live.hold_in_flight(false);
        assert!(read.settle(scheduler));
        assert_eq!(memory(), [1; 8], "{writers:?}: what VLUN A shows, as the next read of it will");
        if writers == Writers::Connection {
            let (mut next, memory) = bench.start_read(old, &lane.enter(), block(0));
            assert!(next.settle(scheduler));
            assert_eq!(memory(), [1; 8]);
        }
    }
}

/// Whatever a job takes for its end: while a block is pending there is none, and what is shown stays right.
#[test]
fn a_restore_with_a_pending_block_does_not_end() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, _) = bench.cut();
    cut.frozen[0].set_quiesced();
    bench.write(&bench.ticket(), block(2), 3);
    crate::restore::restore(&bench, RestoreSource::Own(cut.frozen[0].id));
    assert!(!bench.editor.end_restore(&bench.disk));
    assert_eq!(bench.read(&bench.ticket(), 0..bench.sectors()), vec![1; bench.sectors()]);
    assert_eq!(bench.disk.blocks_to_bring_back(), 1);
}

#[test]
fn holes_stay_holes() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..8, 1);
    let (cut, frozen) = bench.cut();
    bench.write(&bench.ticket(), 0..32, 2);
    assert_eq!(frozen.sectors_in_use(), 8, "blocks that were never written take no room when they are saved");
    let mut expected = vec![1; 8];
    expected.resize(32, 0);
    assert_eq!(bench.frozen(&cut.frozen[0]).unwrap(), expected);
}

/// Source 002 [0051], figures 22, 23 and 27 (block 2701): the draining write reaches both versions, and nothing else
/// of either changes.
#[test]
fn a_draining_write_onto_a_block_that_a_newer_write_took_reaches_both_versions() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let old = bench.ticket();
    let (cut, _) = bench.cut();
    bench.write(&bench.ticket(), 2..4, 9);
    bench.write(&old, 4..6, 5);
    drop(old);
    let sectors = |changes: &[(usize, u8)]| {
        let mut all = vec![1u8; 32];
        changes.iter().for_each(|(at, fill)| all[*at] = *fill);
        all
    };
    assert!(bench.clock.is_drained(cut.ended));
    assert_eq!(bench.frozen(&cut.frozen[0]).unwrap(), sectors(&[(4, 5), (5, 5)]));
    assert_eq!(bench.live(), sectors(&[(2, 9), (3, 9), (4, 5), (5, 5)]));
}

#[test]
fn a_version_drains_exactly_as_long_as_a_request_of_its_epoch_runs() {
    let bench = Bench::new();
    let old = bench.ticket();
    let (cut, _) = bench.cut();
    assert!(!bench.clock.is_drained(cut.ended));
    let also_old = old.again();
    drop(old);
    assert!(!bench.clock.is_drained(cut.ended));
    let new = bench.ticket();
    drop(also_old);
    assert!(bench.clock.is_drained(cut.ended), "requests of the new epoch are not waited for");
    drop(new);
}

#[test]
fn trouble_on_the_frozen_image_breaks_that_version_only() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let (older, _) = bench.cut();
    let (newer, image) = bench.cut();
    image.fail_writes(libc::ENOSPC, 0);
    bench.write(&bench.ticket(), 0..8, 2);
    assert_eq!(bench.live()[0], 2, "the guest's write is done");
    assert!(newer.frozen[0].broken().is_some_and(|why| why.contains("No space")));
    assert!(matches!(bench.frozen(&newer.frozen[0]), Err(RequestError::Broken(_))));
    assert_eq!(bench.frozen(&older.frozen[0]).unwrap(), vec![1; 32], "the older one keeps its own copy then");
}

#[test]
fn a_discard_waits_until_nobody_reads_the_block() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let (cut, _) = bench.cut();
    let discard = Request::Discard { at: ByteOffset(0), len: (2 * BLOCK) as u64 };
    bench.request(&bench.ticket(), discard).unwrap();
    assert_eq!(bench.disk.discards().count(), 2);
    assert_eq!(bench.live.sectors_in_use(), 32, "nothing is given back while VLUN A reads it");
    assert_eq!(bench.frozen(&cut.frozen[0]).unwrap(), vec![1; 32]);
    bench.write(&bench.ticket(), 0..8, 2);
    assert_eq!(bench.disk.discards().count(), 1, "what is written again is wanted");
}

#[test]
fn the_plan_of_a_write_can_be_read() {
    let bench = Bench::new();
    let block = BlockIndex(0);
    let plan = |writer, whole| BlockPlan::decide(bench.disk.chain().at(writer), block, whole);
    assert_eq!(plan(0, false), BlockPlan::plain(0));
    bench.cut();
    let first = BlockPlan { preserve: Some(Copy { from: 1, to: 0 }), ..BlockPlan::plain(1) };
    assert_eq!(plan(1, false), first);
    assert_eq!(plan(0, false), BlockPlan::plain(1));
    bench.write(&bench.ticket(), 0..1, 1);
    assert_eq!(plan(1, false), BlockPlan::plain(1));
    assert_eq!(plan(0, false), BlockPlan { others: vec![0], ..BlockPlan::plain(1) }, "a part goes to both");
    assert_eq!(plan(0, true), BlockPlan { supersedes: vec![0], ..BlockPlan::plain(1) }, "a whole block to one");
}

/// The guest never waits for a backup: a read of VLUN A takes no lock.
#[test]
fn a_reader_of_the_frozen_version_does_not_delay_a_write() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let (cut, _) = bench.cut();
    let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(BLOCKS * BLOCK));
    let read = Request::Read { at: ByteOffset(0), into };
    let mut backup = Scheduler::default();
    bench.start(&mut backup, bench.disk.attach_frozen(cut.frozen[0].id), bench.ticket(), read);
    assert!(backup.step(&mut Rng::new(1)), "the read is submitted to the live image");
    bench.live.hold_in_flight(true);
    bench.write(&bench.ticket(), 0..8, 2);
    assert_eq!(bench.live()[..8], [2; 8], "the write of the same block is done while the read is not");
    bench.live.hold_in_flight(false);
    assert!(backup.settle(&mut Rng::new(2)));
    assert!(memory.to_vec().iter().all(|&b| b == 1), "and it still shows the old bytes");
}

/// While one block is being saved, only writes of that block wait, and other requests do not.
#[test]
fn saving_a_block_holds_up_that_block_only() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let (_, frozen) = bench.cut();
    bench.write(&bench.ticket(), 8..16, 4);
    frozen.hold(Some(OpKind::Write { durable: false }));
    let mut waiting = Scheduler::default();
    let write = |fill: u8, sectors: usize| {
        let mut data = AlignedBuf::zeroed(SECTOR);
        data.fill(fill);
        let at = ByteOffset((sectors * SECTOR) as u64);
        Request::Write { at, from: GuestBuf::from_owned(data).0, durable: false }
    };
    bench.start(&mut waiting, bench.disk.attach_live(), bench.ticket(), write(2, 0));
    bench.start(&mut waiting, bench.disk.attach_live(), bench.ticket(), write(3, 1));
    assert!(!waiting.settle(&mut Rng::new(3)), "both wait for the block to be saved");
    assert_eq!(waiting.tasks(), 2);
    bench.write(&bench.ticket(), 9..10, 5);
    assert_eq!(bench.live()[9], 5, "a block that is saved already is written at once");
    let (into, _) = GuestBuf::from_owned(AlignedBuf::zeroed(BLOCK));
    bench.request(&bench.ticket(), Request::Read { at: ByteOffset(0), into }).unwrap();
    frozen.hold(None);
    assert!(waiting.settle(&mut Rng::new(4)));
    assert_eq!(bench.live()[..2], [2, 3]);
}

/// A container that cannot give storage back must not be filled with zeros instead.
#[test]
fn a_discard_that_the_container_cannot_do_is_left_alone() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..8, 1);
    bench.live.fail_zeroing(libc::EOPNOTSUPP);
    let discard = Request::Discard { at: ByteOffset(0), len: (2 * BLOCK) as u64 };
    bench.request(&bench.ticket(), discard).unwrap();
    assert_eq!(bench.live()[..8], [1; 8]);
    assert_eq!(bench.live.sectors_in_use(), 8, "no room is taken for zeros that nobody asked for");
}

/// A guest gets gigabytes zeroed with one small request; what is copied for it must not take gigabytes of memory.
#[test]
fn the_memory_of_a_request_does_not_grow_with_the_block_size() {
    let bench = Bench::with_blocks(1 << 20, 8);
    let (cut, _) = bench.cut();
    let len = bench.disk.geometry().size_bytes;
    let zeroes = Request::WriteZeroes { at: ByteOffset(0), len, unmap: false, durable: false };
    bench.request(&bench.ticket(), zeroes).unwrap();
    assert!(bench.live.longest_read() <= 4 << 20, "{} bytes are copied at once", bench.live.longest_read());
    assert_eq!(cut.frozen[0].preserved_blocks.load(std::sync::atomic::Ordering::Relaxed), 8);
}

/// A discard that comes late is only advice about what its own epoch showed.
#[test]
fn a_draining_discard_does_not_take_what_a_newer_epoch_wrote() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    bench.cut();
    let old = bench.ticket();
    bench.cut();
    bench.write(&bench.ticket(), 0..8, 2);
    bench.request(&old, Request::Discard { at: ByteOffset(0), len: BLOCK as u64 }).unwrap();
    assert_eq!(bench.disk.discards().count(), 0, "it would later take away what was read in between");
    assert_eq!(bench.live()[..8], [2; 8]);
}

/// Deleting the entry of the newer bytes would show what the write should have replaced: then rather the guest knows.
#[test]
fn an_entry_is_kept_when_the_bytes_that_replace_it_cannot_be_stored() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let old = bench.ticket();
    bench.cut_to_log();
    bench.write(&bench.ticket(), 0..16, 9);
    bench.live.fail_writes(libc::EIO, 0);
    // A whole block, and a part that goes to both images.
    assert!(matches!(bench.request(&old, write_of(0..10, 5)), Err(RequestError::Image(_))));
    assert_eq!(bench.read(&bench.ticket(), 0..8), [9; 8]);
}

/// The same on a leg that a frozen version took: it and who reads there are broken, and the guest notices nothing.
#[test]
fn who_would_read_on_a_leg_that_fails_is_broken() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let old = bench.ticket();
    let (older, _) = bench.cut();
    bench.write(&bench.ticket(), 0..16, 2);
    let (split, leg) = bench.cut_to_split(&bench.live);
    leg.fail_writes(libc::EIO, 0);
    bench.write(&old, 0..8, 5);
    assert!(older.frozen[0].broken().is_some(), "its own entry is deleted, and the leg does not have the bytes");
    assert!(split.frozen[0].broken().is_some());
    assert_eq!(bench.live()[..16], [[5; 8], [2; 8]].concat());
}

/// A deletion must come to its end, or no other snapshot of the disk could be deleted after it.
#[test]
fn a_leg_that_fails_can_be_deleted_and_costs_the_version_that_would_take_it_over() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let (oldest, _) = bench.cut();
    let (older, _) = bench.cut();
    // No neighbours, which would be copied together.
    bench.write(&bench.ticket(), block(0), 2);
    bench.write(&bench.ticket(), block(2), 2);
    let (split, leg) = bench.cut_to_split(&bench.live);
    leg.fail_writes(libc::EIO, 1);
    bench.retire(&split.frozen[0]);
    assert!(older.frozen[0].broken().is_some(), "the leg took one of its two blocks");
    assert_eq!(bench.frozen(&oldest.frozen[0]).unwrap(), [1; 32], "the one before got the other");
    bench.retire(&older.frozen[0]);
    assert_eq!(bench.frozen(&oldest.frozen[0]).map_err(|_| "lost"), Err("lost"), "it is next to take the leg over");
    bench.retire(&oldest.frozen[0]);
    assert_eq!(bench.disk.chain().links().len(), 1);
    assert_eq!(bench.live(), [[2; 8], [1; 8], [2; 8], [1; 8]].concat());
}

/// What older versions read on an image whose sync failed may not be on stable storage either.
#[test]
fn a_frozen_image_that_cannot_be_synced_breaks_all_who_read_there() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..32, 1);
    let (elsewhere, _) = bench.cut();
    bench.cut_to_split(&bench.live);
    let (older, _) = bench.cut();
    let old = bench.ticket();
    let (newer, image) = bench.cut();
    image.fail_syncs(libc::EIO);
    bench.request(&old, Request::Flush).unwrap();
    assert!(newer.frozen[0].broken().is_some(), "its own image");
    assert!(older.frozen[0].broken().is_some(), "it reads there what the newer one has saved");
    assert!(elsewhere.frozen[0].broken().is_none(), "on the other side of a split nobody reads there");
    bench.request(&bench.ticket(), Request::Flush).unwrap();
}

/// A durable write needs the entry that points to it, also if an earlier write made that, and also if it was deleted.
#[test]
fn a_durable_write_of_a_log_makes_earlier_entries_durable() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let old = bench.ticket();
    let (_, durable) = bench.cut_to_durable_log();
    let write = |ticket: &halfsilver::engine::Ticket, block: usize, durable: bool| {
        let from = GuestBuf::from_owned(AlignedBuf::zeroed(BLOCK)).0;
        bench.request(ticket, Request::Write { at: ByteOffset((block * BLOCK) as u64), from, durable }).unwrap();
    };
    let now = bench.ticket();
    write(&now, 1, false);
    assert_eq!(bench.entries_of(&durable), Vec::<u64>::new(), "nobody asked for it");
    write(&now, 1, true);
    assert_eq!(bench.entries_of(&durable), [1]);
    write(&now, 2, false);
    bench.request(&now, Request::Flush).unwrap();
    assert_eq!(bench.entries_of(&durable), [1, 2]);
    // A draining write deletes the entry (figure 16), and a durable one after it must not come back to it.
    write(&old, 1, false);
    write(&old, 1, true);
    assert_eq!(bench.entries_of(&durable), [2]);
}

#[test]
fn a_group_that_cannot_be_cut_changes_no_disk() {
    let bench = Bench::new();
    let other = Disk::plain(bench.clock.clone(), Arc::new(bench.empty_image("other")), false).unwrap();
    let prepared = |disk: &Arc<Disk>, of: fn(Layer) -> NewLayer| PreparedSnapshot {
        disk: disk.clone(),
        layer: of(Layer::of(Backing::One(Arc::new(bench.empty_image("layer"))), bench.table())),
        new_live: VersionId::new_v4(),
        changed: None,
    };
    let (to_log, to_frozen) = (|layer| NewLayer::Live { layer }, |layer| NewLayer::Frozen { layer });
    bench.editor.cut(vec![prepared(&other, to_log)], Writers::Request).unwrap();
    let group = vec![prepared(&bench.disk, to_frozen), prepared(&other, to_frozen)];
    let cut =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bench.editor.cut(group, Writers::Request).map(drop)));
    assert!(cut.is_err(), "a log lies above the full image of the second disk");
    assert_eq!(bench.disk.chain().live(), 0, "the first one has a version of an epoch that never came");
    assert_eq!(bench.editor.cut(vec![prepared(&bench.disk, to_frozen)], Writers::Request).unwrap().frozen.len(), 1);
}

/// What a disk's requests of its own have left is quiet; what goes waits for whoever reads its versions too, and for nobody else.
#[test]
fn a_disk_waits_for_itself_and_what_goes_for_its_readers() {
    let bench = Bench::new();
    let one = bench.disk.clone();
    let other = Disk::plain(bench.clock.clone(), Arc::new(bench.empty_image("other")), false).unwrap();
    let elsewhere = other.clock().lane().enter();
    let (cut, _) = bench.cut();
    assert!(one.clock().is_drained(cut.ended), "nobody is at work on it");
    assert!(!other.clock().is_quiet(cut.ended) && !bench.clock.is_drained(cut.ended));
    let (volume, _) = crate::volumes::volume_of(&bench, &one, &cut.frozen[0]);
    let (sibling, _) = crate::volumes::volume_of(&bench, &one, &cut.frozen[0]);
    assert!(one.clock().is_drained(cut.ended));
    let reads = volume.clock().lane().enter();
    let (next, _) = bench.cut();
    assert!(!one.clock().is_drained(next.ended), "a volume on it is at work");
    assert!(one.clock().is_quiet(next.ended), "a volume writes nothing there");
    assert!(sibling.clock().is_drained(next.ended), "they do not read each other");
    drop(reads);
    assert!(one.clock().is_drained(next.ended) && volume.clock().is_drained(next.ended));
    let writes = one.clock().lane().enter();
    let (last, _) = bench.cut();
    assert!(!one.clock().is_quiet(last.ended));
    assert!(volume.clock().is_drained(last.ended), "what it stands on reads nothing of it");
    drop((writes, elsewhere));
    assert!(bench.clock.is_drained(last.ended));
}

/// Who reads a volume reads what that stands on.
#[test]
fn what_goes_waits_for_the_readers_of_its_readers() {
    let bench = Bench::new();
    let (cut, _) = bench.cut();
    cut.frozen[0].set_quiesced();
    let (volume, _) = crate::volumes::volume_of(&bench, &bench.disk, &cut.frozen[0]);
    let (_, version) = cut_beside(&bench, &volume, &bench.disk);
    let (upper, _) = crate::volumes::volume_of(&bench, &volume, &version);
    assert!(cut_beside(&bench, &bench.disk, &upper).0);
    // Also when the one between is not open any more.
    drop(volume);
    assert!(cut_beside(&bench, &bench.disk, &upper).0);
}

/// Who waits for requests that may hang, of a volume's storage say, ends when it is told to, and the next one goes on.
#[test]
fn a_deletion_that_waits_for_requests_stops_when_it_is_to() {
    let bench = Bench::new();
    let (cut, _) = bench.cut();
    let hangs = bench.ticket();
    let (mut deletion, pace) = bench.start_retiring(&cut.frozen[0]);
    deletion.poll();
    pace.stop();
    assert!(deletion.settle(&mut Rng::new(11)), "it waits for requests");
    assert_eq!(bench.disk.chain().links().len(), 2, "it has not waited for them");
    drop(hangs);
    bench.retire(&cut.frozen[0]);
    assert_eq!(bench.disk.chain().links().len(), 1);
}

/// Cuts a disk while a request of another one is under way, and returns whether it waits for that, and the frozen version.
fn cut_beside(bench: &Bench, disk: &Arc<Disk>, other: &Arc<Disk>) -> (bool, Arc<Version>) {
    let under_way = other.clock().lane().enter();
    let layer = Layer::of(Backing::One(Arc::new(bench.empty_image("log"))), bench.table());
    let prepared = PreparedSnapshot {
        disk: disk.clone(),
        layer: NewLayer::Live { layer },
        new_live: VersionId::new_v4(),
        changed: None,
    };
    let cut = bench.editor.cut(vec![prepared], Writers::Request).unwrap();
    let waits = !disk.clock().is_drained(cut.ended);
    drop(under_way);
    assert!(disk.clock().is_drained(cut.ended));
    cut.frozen[0].set_quiesced();
    (waits, cut.frozen[0].clone())
}

/// What is restored from another disk is one of its readers, and so is a volume that is put on it.
#[test]
fn who_is_restored_from_a_disk_or_put_on_it_reads_there() {
    let bench = Bench::new();
    let disk = || Disk::plain(bench.clock.clone(), Arc::new(bench.empty_image("other")), false).unwrap();
    let (source, next) = (disk(), disk());
    let (waits, version) = cut_beside(&bench, &source, &bench.disk);
    assert!(!waits, "nothing of it is read there yet");
    crate::restore::restore(&bench, RestoreSource::View(View::of(source.clone(), version.id, "source@a")));
    assert!(cut_beside(&bench, &source, &bench.disk).0, "what is restored from it is at work");

    let (volume, image) = crate::volumes::volume_of(&bench, &source, &version);
    let (waits, version) = cut_beside(&bench, &next, &volume);
    assert!(!waits, "the volume is on another disk yet");
    let ids = (VersionId::new_v4(), VersionId::new_v4());
    let layer = Layer::of(Backing::One(Arc::new(image)), bench.table());
    let view = View::of(next.clone(), version.id, "next@a");
    bench.editor.move_base(&volume, view, ids, layer, Changed::unknown("nobody noted it"));
    assert!(cut_beside(&bench, &next, &volume).0, "the volume on it is at work");
}
