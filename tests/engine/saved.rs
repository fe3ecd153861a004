//! What is saved for a version that outlives a power cut: bytes, entry, overwrite, in this order, with shared syncs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use halfsilver::engine::{Backing, Cut, Layer, NewLayer, Saved};
use halfsilver::image::OpKind;

use crate::bench::{Bench, block, write_of};
use crate::sim::{self, Rng, Scheduler, SimImage};

/// A frozen version whose table is durable, its images, and whether it was given up.
struct Frozen {
    cut: Cut,
    image: SimImage,
    durable: SimImage,
    given_up: Arc<AtomicBool>,
}

fn cut(bench: &Bench, can_be_given_up: bool) -> Frozen {
    let (image, given_up) = (bench.empty_image("frozen"), Arc::new(AtomicBool::new(false)));
    let (table, durable) = bench.durable_table();
    let flag = given_up.clone();
    let revoke = Box::new(move || {
        flag.store(can_be_given_up, Ordering::SeqCst);
        if can_be_given_up { Ok(()) } else { Err("no".to_owned()) }
    });
    let layer = Layer::saved(Backing::One(Arc::new(image.clone())), Arc::new(Saved { table, revoke }));
    Frozen { cut: bench.cut_with(NewLayer::Frozen { layer }), image, durable, given_up }
}

#[test]
fn the_overwrite_waits_for_the_bytes_and_the_entry() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (frozen, mut rng) = (cut(&bench, true), Rng::new(1));
    for held in [&frozen.image, &frozen.durable] {
        let at = if std::ptr::eq(held, &raw const frozen.image) { 0 } else { 1 };
        held.hold(Some(OpKind::Sync));
        let mut write = bench.start_write(&bench.ticket(), block(at), 2);
        while write.step(&mut rng) {}
        assert_eq!(write.tasks(), 1, "the write waits");
        assert_eq!(bench.live()[block(at)], [1; 8], "nothing is overwritten yet");
        held.hold(None);
        assert!(write.settle(&mut rng));
        assert_eq!(bench.live()[block(at)], [2; 8]);
        assert!(bench.entries_of(&frozen.durable).contains(&(at as u64)));
    }
    assert_eq!(bench.entries_of(&frozen.durable), [0, 1]);
    frozen.cut.frozen[0].set_quiesced();
    assert_eq!(bench.frozen(&frozen.cut.frozen[0]).unwrap(), vec![1; bench.sectors()]);
}

#[test]
fn writes_at_the_same_time_share_the_syncs() {
    const WRITES: usize = 64;
    let mut most = 0;
    for seed in 0..50 {
        let bench = Bench::with_blocks(4096, WRITES);
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let frozen = cut(&bench, true);
        let before = frozen.image.syncs() + frozen.durable.syncs();
        let mut scheduler = Scheduler::default();
        for at in 0..WRITES {
            bench.start(&mut scheduler, bench.disk.attach_live(), bench.ticket(), write_of(block(at), 2));
        }
        // All are there before the first is done with, as with a deep queue.
        scheduler.poll();
        sim::finish_io();
        assert!(scheduler.settle(&mut Rng::new(seed)));
        assert_eq!(bench.entries_of(&frozen.durable).len(), WRITES);
        most = most.max(frozen.image.syncs() + frozen.durable.syncs() - before);
    }
    println!("{most} syncs for {WRITES} first writes");
    assert!(most <= WRITES / 4, "{most} syncs for {WRITES} writes");
}

#[test]
fn what_cannot_be_saved_is_given_up_before_the_overwrite() {
    for (fail_image, errno) in [(true, libc::ENOSPC), (true, libc::EIO), (false, libc::ENOSPC), (false, libc::EIO)] {
        for can_be_given_up in [true, false] {
            let bench = Bench::new();
            bench.write(&bench.ticket(), 0..bench.sectors(), 1);
            let frozen = cut(&bench, can_be_given_up);
            bench.write(&bench.ticket(), block(0), 2);
            let failing = if fail_image { &frozen.image } else { &frozen.durable };
            failing.fail_syncs(errno);
            let done = bench.request(&bench.ticket(), write_of(block(1), 2));
            let version = &frozen.cut.frozen[0];
            version.set_quiesced();
            assert_eq!(done.is_ok(), can_be_given_up, "{done:?}");
            assert_eq!(frozen.given_up.load(Ordering::SeqCst), can_be_given_up);
            assert_eq!(version.broken().is_some(), can_be_given_up);
            if !can_be_given_up {
                assert_eq!(bench.live()[block(1)], [1; 8], "what cannot be saved is not overwritten");
                assert_eq!(bench.frozen(version).unwrap(), vec![1; bench.sectors()]);
            }
            // An older one would not count on an entry that is not durable.
            assert!(!bench.entry(0, 1), "the entry that could not be committed was taken back");
        }
    }
}

/// What a deletion handed to a version that cannot store it is read by older ones, which must not count on it.
#[test]
fn those_that_read_what_a_deletion_handed_over_are_lost_with_it() {
    for failing in 0..3 {
        let bench = Bench::new();
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let frozen: Vec<Frozen> = (0..4).map(|_| cut(&bench, true)).collect();
        bench.write(&bench.ticket(), block(0), 2);
        frozen.iter().for_each(|f| f.cut.frozen[0].set_quiesced());
        frozen[failing].durable.fail_syncs(libc::EIO);
        frozen[failing].image.fail_syncs(libc::EIO);
        bench.retire(&frozen[3].cut.frozen[0]);
        for (i, one) in frozen[..3].iter().enumerate() {
            let version = &one.cut.frozen[0];
            assert_eq!(version.broken().is_some(), i <= failing, "{failing}: {i}");
            assert_eq!(one.given_up.load(Ordering::SeqCst), i <= failing, "{failing}: {i}");
            if i > failing {
                assert_eq!(bench.frozen(version).unwrap(), vec![1; bench.sectors()], "{failing}: {i}");
            }
        }
    }
}

#[test]
fn what_a_fold_cannot_save_is_taken_back() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let frozen = cut(&bench, true);
    frozen.cut.frozen[0].set_quiesced();
    let (pivot, _log) = bench.cut_to_log();
    pivot.frozen[0].set_quiesced();
    bench.write(&bench.ticket(), block(1), 2);
    frozen.durable.fail_syncs(libc::EIO);
    bench.retire(&pivot.frozen[0]);
    assert!(frozen.cut.frozen[0].broken().is_some() && frozen.given_up.load(Ordering::SeqCst));
    assert!(!bench.entry(0, 1), "the entry that could not be committed was taken back");
    assert_eq!(bench.live()[block(1)], [2; 8]);
}
