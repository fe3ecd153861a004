//! Power cuts between the durable tables of several logs: what was flushed must be in one of them at any moment.
//!
//! Checked: the order in which entries are looked at and stored. Not checked: that what was stored is synced; the tests
//! of `store/durable.rs` do that.

use std::sync::Arc;

use halfsilver::engine::{Backing, Layer, Log, NewLayer, Request, RestoreSource, Restoring};
use halfsilver::image::OpKind;
use halfsilver::store::{DurableTable, PAYLOAD_BYTES};

use crate::bench::{BLOCKS, Bench, block, write_of};
use crate::sim::{Rng, Scheduler, SimImage};

const SEEDS: u64 = 200;

/// A snapshot by write logging, as the daemon makes logs. Returns the durable table of the new one.
fn cut_to_durable_log(bench: &Bench) -> SimImage {
    let bytes = DurableTable::image_bytes(bench.disk.geometry().blocks());
    let durable = SimImage::new("durable", usize::try_from(bytes).unwrap(), 512);
    let (image, table, queue, log) =
        (Arc::new(durable.clone()), bench.table(), bench.queue.clone(), bench.empty_image("log"));
    let made = Arc::new(std::sync::Mutex::new(None));
    let put = made.clone();
    let mut scheduler = Scheduler::default();
    scheduler.spawn(async move {
        let table = DurableTable::create(image, uuid::Uuid::nil(), table, [0; PAYLOAD_BYTES], &queue).await.unwrap();
        *put.lock().unwrap() = Some(table);
    });
    assert!(scheduler.settle(&mut Rng::new(1)));
    let log_of = Log { table: made.lock().unwrap().take().unwrap(), freed: Arc::into_inner(bench.table()).unwrap() };
    bench.cut_with(NewLayer::Live { layer: Layer::logged(Backing::One(Arc::new(log)), Arc::new(log_of)) });
    durable
}

/// Whether the durable table has an entry for the block, as it is stored now.
fn stored(durable: &SimImage, block: usize) -> bool {
    durable.bytes()[512] & 1 << block != 0
}

/// A flush, a write of an older epoch that takes the place of a newer log's entry, and another flush, in any order of
/// their steps. What was flushed before, or what replaced it, must be found whenever the power goes.
#[test]
fn a_deletion_in_one_log_is_not_durable_before_the_entry_in_another() {
    for seed in 0..SEEDS {
        let bench = Bench::new();
        let mut rng = Rng::new(seed);
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let nearer = cut_to_durable_log(&bench);
        let old = bench.ticket();
        let farther = cut_to_durable_log(&bench);
        bench.write(&bench.ticket(), 0..bench.sectors(), 2);
        bench.request(&bench.ticket(), Request::Flush).unwrap();
        assert!((0..BLOCKS).all(|b| stored(&farther, b) && !stored(&nearer, b)));
        let mut scheduler = Scheduler::default();
        for at in 0..BLOCKS {
            bench.start(&mut scheduler, bench.disk.attach_live(), old.again(), write_of(block(at), 3));
            bench.start(&mut scheduler, bench.disk.attach_live(), bench.ticket(), Request::Flush);
        }
        while scheduler.step(&mut rng) {
            let lost = (0..BLOCKS).find(|&b| !stored(&farther, b) && !stored(&nearer, b));
            assert!(lost.is_none(), "seed {seed}: the power goes, and block {lost:?} is what it was before the flush");
        }
        bench.request(&bench.ticket(), Request::Flush).unwrap();
        assert!((0..BLOCKS).all(|b| stored(&nearer, b) && !stored(&farther, b)));
        assert_eq!(bench.read(&bench.ticket(), 0..bench.sectors()), vec![3; bench.sectors()]);
    }
}

/// A moment without room in the state directory: what is asked for then fails, and what is asked for afterwards does not.
#[test]
fn a_refusal_costs_one_flush() {
    for durable_write in [false, true] {
        let bench = Bench::new();
        let first = cut_to_durable_log(&bench);
        let second = cut_to_durable_log(&bench);
        for refuses in [&second, &first, &second] {
            bench.write(&bench.ticket(), 0..bench.sectors(), 2);
            refuses.fail_writes(libc::ENOSPC, 0);
            let mut write = write_of(block(0), 3);
            if let Request::Write { durable, .. } = &mut write {
                *durable = true;
            }
            let request = if durable_write { write } else { Request::Flush };
            // A log that has nothing new to store is not asked.
            let is_refused = bench.request(&bench.ticket(), request).is_err();
            refuses.heal_writes();
            bench.request(&bench.ticket(), Request::Flush).unwrap();
            assert!((0..BLOCKS).all(|b| stored(&second, b)), "refused before: {is_refused}");
        }
        assert!(!stored(&first, 0));
    }
}

/// The same while a restore is under way, and of what was saved.
#[test]
fn a_refusal_costs_one_flush_of_a_restore() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, _) = bench.cut();
    cut.frozen[0].set_quiesced();
    bench.write(&bench.ticket(), 0..bench.sectors(), 2);
    let (pending, stored) = bench.durable_table();
    let closed = bench.editor.close(&bench.disk, false);
    let source = RestoreSource::Own(cut.frozen[0].id);
    bench.disk.find_differences(&source, pending.table()).unwrap();
    closed.begin(Restoring::new(pending, source));
    bench.write(&bench.ticket(), block(1), 3);
    stored.fail_writes(libc::ENOSPC, 0);
    bench.request(&bench.ticket(), Request::Flush).unwrap_err();
    stored.heal_writes();
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    assert_eq!(bench.entries_of(&stored), [0, 2, 3]);
}

/// What a flush costs does not grow with the snapshots of a disk: quiesced logs have everything on stable storage.
#[test]
fn a_flush_syncs_what_has_changed_however_many_logs_there_are() {
    let mut costs = Vec::new();
    for logs in [1, 10, 100] {
        let bench = Bench::new();
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let mut images = vec![bench.live.clone()];
        for _ in 0..logs {
            let (cut, log, durable) = bench.cut_to_log_with_table();
            let queue = bench.queue.clone();
            let (disk, frozen) = (bench.disk.clone(), cut.frozen[0].id);
            bench.run(async move { disk.make_durable(&queue, frozen).await.unwrap() });
            cut.frozen[0].set_quiesced();
            bench.write(&bench.ticket(), block(1), 2);
            images.extend([log, durable]);
        }
        let syncs = || images.iter().map(SimImage::syncs).sum::<usize>();
        let cost_of = |request: Option<Request>| {
            if let Some(request) = request {
                bench.request(&bench.ticket(), request).unwrap();
            }
            let before = syncs();
            bench.request(&bench.ticket(), Request::Flush).unwrap();
            syncs() - before
        };
        cost_of(None);
        // Nothing, a block that the log has, and one that it gets.
        costs.push([cost_of(None), cost_of(Some(write_of(block(1), 3))), cost_of(Some(write_of(block(2), 3)))]);
    }
    assert_eq!(costs, [[0, 1, 2]; 3], "syncs of a flush with 1, 10 and 100 logs");
}

/// A flush that waits for another one, and meanwhile a write of an older epoch takes the place of a newer log's entry: the log
/// that had not changed when the flush began is stored before that deletion is.
#[test]
fn a_log_that_changes_while_a_flush_waits_is_not_left_out() {
    let bench = Bench::new();
    let mut rng = Rng::new(1);
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (_, _, nearer) = bench.cut_to_log_with_table();
    let old = bench.ticket();
    let (_, image, farther) = bench.cut_to_log_with_table();
    bench.write(&bench.ticket(), 0..bench.sectors(), 2);
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    bench.write(&bench.ticket(), block(1), 2);
    image.hold(Some(OpKind::Sync));
    let mut flushes = Scheduler::default();
    for _ in 0..2 {
        bench.start(&mut flushes, bench.disk.attach_live(), bench.ticket(), Request::Flush);
    }
    assert!(!flushes.settle(&mut rng), "one waits for the image, and the other for that one");
    bench.write(&old, block(0), 3);
    assert!(!bench.entry(2, 0), "its entry makes way for that in the other log");
    image.hold(None);
    assert!(flushes.settle(&mut rng));
    assert!(stored(&nearer, 0) && !stored(&farther, 0), "the power goes, and block 0 is what it was before the flush");
}

/// A log that was left out is asked again when something is written to it: by an old epoch, or by a job.
#[test]
fn a_quiesced_log_that_changes_is_stored_by_the_next_flush() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let nearer = cut_to_durable_log(&bench);
    let old = bench.ticket();
    let farther = cut_to_durable_log(&bench);
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    bench.write(&old, block(0), 2);
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    assert!(stored(&nearer, 0) && !stored(&farther, 0));
    bench.write(&bench.ticket(), block(1), 3);
    bench.write(&old, block(1), 4);
    bench.request(&bench.ticket(), Request::Flush).unwrap();
    assert!(stored(&nearer, 1) && !stored(&farther, 1));
}
