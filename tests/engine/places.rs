//! Places of blocks that a frozen version does not have, with something in them: zeros that are saved there are written.

use std::sync::Arc;

use halfsilver::engine::{
    Backing, ChainEditor, Disk, DiskOptions, EpochClock, Layer, Link, NewLayer, Saved, Version, VersionId,
};
use halfsilver::image::OpKind;

use crate::bench::{BLOCK_SECTORS, Bench, block, first_bytes, write_of};
use crate::sim::{Rng, SimImage};

/// What block 0 shows as zeros, in a frozen version whose place for it has something else.
const STALE: u8 = 7;

/// The same disk, as a process finds it that comes after a kill: with the entries and the images that there are.
fn taken_up(bench: &mut Bench) {
    let left = bench.disk.chain();
    let links = left.links().iter().map(|link| {
        let layer = match link.layer.table() {
            Some(table) => Layer::of(link.layer.image.clone(), table.clone()),
            None => Layer::full(link.layer.image.clone()),
        };
        let version = Version::new(link.version.id, link.version.began);
        Link { version, layer, splits: link.splits }
    });
    let geometry = bench.disk.geometry();
    let discards = Disk::table_in_memory(geometry.size_bytes, geometry.block_bytes).unwrap();
    let image = Backing::One(Arc::new(bench.live.clone()));
    let options =
        DiskOptions { image, block_bytes: geometry.block_bytes, read_only: false, discards: Arc::new(discards) };
    let clock = EpochClock::new(bench.clock.current().next());
    bench.disk = Disk::with_chain(clock.clone(), options, links.collect());
    (bench.editor, bench.clock) = (Arc::new(ChainEditor::new(clock.clone())), clock);
}

/// A kill between the deletion of an entry and the emptying of its place.
#[test]
fn a_kill_before_a_place_is_emptied_changes_no_frozen_version() {
    for deleted_before in [false, true] {
        let mut bench = Bench::new();
        bench.write(&bench.ticket(), 0..bench.sectors(), STALE);
        let oldest = deleted_before.then(|| bench.cut());
        let old = bench.ticket();
        let (cut, image) = bench.cut();
        bench.write(&bench.ticket(), block(0), 1);
        assert!(bench.entry(bench.disk.chain().live() - 1, 0), "its bytes are saved");
        // What is written to VLUN A as a whole is VLUN B's as well, and the entry goes.
        image.hold(Some(OpKind::Zero { len: 4096, unmap: true }));
        let mut draining = bench.start_write(&old, block(0), 0);
        assert!(!draining.settle(&mut Rng::new(1)), "the place is not emptied yet");
        assert!(!bench.entry(bench.disk.chain().live() - 1, 0), "and the entry is gone");
        assert_eq!(bench.live()[block(0)], [0; BLOCK_SECTORS]);
        assert_eq!(first_bytes(&image.bytes())[block(0)], [STALE; BLOCK_SECTORS]);
        std::mem::forget(draining);
        crate::sim::reset();
        image.hold(None);
        drop(old);
        taken_up(&mut bench);
        let version = bench.disk.chain().version(bench.disk.chain().position(cut.frozen[0].id).unwrap()).clone();
        version.set_quiesced();
        let shown = bench.frozen(&version).unwrap();
        assert_eq!(shown[block(0)], [0; BLOCK_SECTORS]);
        bench.write(&bench.ticket(), 0..bench.sectors(), 2);
        assert_eq!(bench.frozen(&version).unwrap(), shown, "what is saved for it is what it showed");
        drop(oldest);
    }
}

/// What a deletion hands over is saved like anything else.
#[test]
fn zeros_that_are_handed_to_a_place_with_something_in_it_are_written() {
    let mut bench = Bench::new();
    let (older, places) = bench.cut();
    let (newer, _) = bench.cut();
    bench.write(&bench.ticket(), block(0), 1);
    assert!(bench.entry(1, 0), "the newer one has the zeros");
    // As a kill left it.
    bench.run({
        let (image, queue) = (Backing::One(Arc::new(places.clone())), bench.queue.clone());
        async move {
            let mut stale = halfsilver::image::AlignedBuf::zeroed(4096);
            stale.fill(STALE);
            let buf = halfsilver::image::IoBuf::Owned(stale);
            image.write(&queue, halfsilver::image::ByteOffset(0), buf, false).await.unwrap();
        }
    });
    let ids = [older.frozen[0].id, newer.frozen[0].id];
    taken_up(&mut bench);
    let of = |id: VersionId| bench.disk.chain().version(bench.disk.chain().position(id).unwrap()).clone();
    let [older, newer] = ids.map(of);
    older.set_quiesced();
    bench.retire(&newer);
    assert!(bench.entry(0, 0), "it was handed over");
    assert_eq!(bench.frozen(&older).unwrap()[block(0)], [0; BLOCK_SECTORS]);
}

/// A place that could not be emptied.
#[test]
fn a_place_that_could_not_be_emptied_costs_no_snapshot() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), STALE);
    let old = bench.ticket();
    let (cut, image) = bench.cut();
    bench.write(&bench.ticket(), block(0), 1);
    image.fail_zeroing(libc::EIO);
    bench.write(&old, block(0), 0);
    assert_eq!(first_bytes(&image.bytes())[block(0)], [STALE; BLOCK_SECTORS], "it is not emptied");
    image.heal_zeroing();
    drop(old);
    let version = &cut.frozen[0];
    version.set_quiesced();
    assert_eq!(version.broken(), None);
    bench.write(&bench.ticket(), block(0), 2);
    assert_eq!(bench.frozen(version).unwrap()[block(0)], [0; BLOCK_SECTORS]);
}

/// Bytes that were saved, but not their entry, because that could not be made durable.
#[test]
fn what_an_attempt_to_save_leaves_is_not_taken_for_zeros() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), STALE);
    let old = bench.ticket();
    let (image, (table, durable)) = (bench.empty_image("frozen"), bench.durable_table());
    let revoke = Box::new(|| Err("not now".to_owned()));
    let layer = Layer::saved(Backing::One(Arc::new(image.clone())), Arc::new(Saved { table, revoke }));
    let cut = bench.cut_with(NewLayer::Frozen { layer });
    durable.fail_writes(libc::ENOSPC, 0);
    bench.request(&bench.ticket(), write_of(block(0), 1)).unwrap_err();
    assert_eq!(first_bytes(&image.bytes())[block(0)], [STALE; BLOCK_SECTORS], "the bytes are there");
    assert!(!bench.entry(0, 0), "and no entry");
    durable.heal_writes();
    bench.write(&old, block(0), 0);
    drop(old);
    let version = &cut.frozen[0];
    version.set_quiesced();
    bench.write(&bench.ticket(), block(0), 2);
    assert_eq!(bench.frozen(version).unwrap()[block(0)], [0; BLOCK_SECTORS]);
}

/// The common case: nothing was ever written there.
#[test]
fn zeros_are_not_written_to_a_new_image() {
    let bench = Bench::new();
    let (_cut, image): (_, SimImage) = bench.cut();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    assert!((0..4).all(|at| bench.entry(0, at)));
    assert_eq!((image.transfers().1, image.zeroes(), image.sectors_in_use()), (0, 0, 0));
}
