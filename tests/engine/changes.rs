//! Dirty bitmaps, one rule at a time. Random histories are in `run/noted.rs` and `volumes.rs`.

use std::sync::Arc;

use halfsilver::engine::{
    Backing, ChangeSource, Changed, Changes, Cut, Layer, NewLayer, NoChanges, PreparedSnapshot, Request, Version,
    VersionId, Writers,
};
use halfsilver::image::ByteOffset;
use halfsilver::store::{BlockIndex, Table};

use crate::bench::{BLOCK, BLOCK_SECTORS, Bench, block, write_of};
use crate::sim::Rng;

fn cut(bench: &Bench, to_log: bool, changed: Option<Arc<Table>>) -> Cut {
    let layer = Layer::of(Backing::One(Arc::new(bench.empty_image("layer"))), bench.table());
    let layer = if to_log { NewLayer::Live { layer } } else { NewLayer::Frozen { layer } };
    let prepared = PreparedSnapshot { disk: bench.disk.clone(), layer, new_live: VersionId::new_v4(), changed };
    let cut = bench.editor.cut(vec![prepared], Writers::Request).unwrap();
    cut.frozen[0].set_quiesced();
    cut
}

fn noting(bench: &Bench) -> Cut {
    cut(bench, false, Some(bench.table()))
}

fn blocks(changes: &Changes) -> Vec<u64> {
    changes.clone().into_runs().flat_map(|run| run.iter().collect::<Vec<_>>()).map(|block| block.0).collect()
}

fn since(bench: &Bench, version: &Version) -> Vec<u64> {
    blocks(&bench.disk.changes(version.id, None).unwrap())
}

fn live_table(bench: &Bench) -> Option<Arc<Table>> {
    let chain = bench.disk.chain();
    chain.version(chain.live()).changed().and_then(Changed::table).cloned()
}

#[test]
fn each_change_is_noted_by_whole_blocks() {
    for to_log in [false, true] {
        let bench = Bench::with_blocks(u32::try_from(BLOCK).unwrap(), 6);
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let a = cut(&bench, to_log, Some(bench.table()));
        assert_eq!(since(&bench, &a.frozen[0]), [] as [u64; 0]);
        bench.write(&bench.ticket(), 3..4, 2);
        assert_eq!(since(&bench, &a.frozen[0]), [0], "a sector counts as its block");
        let at = ByteOffset(2 * BLOCK as u64);
        bench.request(&bench.ticket(), Request::WriteZeroes { at, len: 512, unmap: false, durable: false }).unwrap();
        assert_eq!(since(&bench, &a.frozen[0]), [0, 2]);
        let b = cut(&bench, to_log, Some(bench.table()));
        bench.write(&bench.ticket(), block(0).start..block(1).end, 3);
        assert_eq!(since(&bench, &a.frozen[0]), [0, 1, 2]);
        assert_eq!(since(&bench, &b.frozen[0]), [0, 1]);
        let between = bench.disk.changes(a.frozen[0].id, Some(b.frozen[0].id)).unwrap();
        assert_eq!((blocks(&between), between.source()), (vec![0, 2], ChangeSource::Changed));
        let same = bench.disk.changes(b.frozen[0].id, Some(b.frozen[0].id)).unwrap();
        assert_eq!(blocks(&same), [] as [u64; 0]);
        let wrong = bench.disk.changes(b.frozen[0].id, Some(a.frozen[0].id));
        assert_eq!(wrong.err(), Some(NoChanges::Order));
        assert_eq!(bench.disk.changes(VersionId::nil(), None).err(), Some(NoChanges::Gone));
    }
}

/// Whoever finds the bytes after a kill finds the bit.
#[test]
fn a_change_is_noted_before_its_bytes_are_on_their_way() {
    for with_versions in [false, true] {
        let bench = Bench::new();
        let a = noting(&bench);
        if !with_versions {
            // The plain way: one version, and a mark that asks.
            a.frozen[0].set_leaves_mark(true);
            bench.retire(&a.frozen[0]);
            assert_eq!(bench.disk.chain().live(), 0);
        }
        bench.live.hold_writes(true);
        let mut scheduler = bench.start_write(&bench.ticket(), block(1), 2);
        assert!(!scheduler.settle(&mut Rng::new(1)) && bench.live.in_flight() == 1, "the write is held");
        assert_eq!(since(&bench, &a.frozen[0]), [1]);
        bench.live.hold_writes(false);
        assert!(scheduler.settle(&mut Rng::new(1)));
    }
}

/// A write of an old epoch is one of its own version's, which both it and the newer ones show.
#[test]
fn an_old_write_is_noted_for_its_own_version() {
    let bench = Bench::new();
    let a = noting(&bench);
    let old = bench.ticket();
    let b = noting(&bench);
    bench.write(&bench.ticket(), block(3), 5);
    bench.write(&old, block(1), 4);
    bench.write(&old, block(3), 6);
    // The last one went to two places, of which a kill may leave one.
    assert_eq!(blocks(&bench.disk.changes(a.frozen[0].id, Some(b.frozen[0].id)).unwrap()), [1, 3]);
    assert_eq!(since(&bench, &b.frozen[0]), [3]);
    assert_eq!(since(&bench, &a.frozen[0]), [1, 3]);
}

/// A kill may leave it on one side of a split, and the other one differs.
#[test]
fn an_old_write_is_noted_on_both_sides_of_a_split() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (old, leg) = (bench.ticket(), bench.live.copy("leg"));
    let [frozen, live] = [&leg, &bench.live].map(|image| Backing::One(Arc::new(image.clone())));
    let layer = NewLayer::Split { frozen, live };
    let (disk, changed) = (bench.disk.clone(), Some(bench.table()));
    let prepared = PreparedSnapshot { disk, layer, new_live: VersionId::new_v4(), changed };
    let cut = bench.editor.cut(vec![prepared], Writers::Request).unwrap();
    bench.write(&old, block(1), 4);
    drop(old);
    cut.frozen[0].set_quiesced();
    assert_eq!(since(&bench, &cut.frozen[0]), [1]);
}

#[test]
fn a_discard_is_noted_when_it_is_carried_out() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let a = noting(&bench);
    let discard = |index: u64| {
        let at = ByteOffset(index * BLOCK as u64);
        bench.request(&bench.ticket(), Request::Discard { at, len: BLOCK as u64 }).unwrap();
    };
    discard(1);
    assert_eq!(since(&bench, &a.frozen[0]), [] as [u64; 0], "it is only remembered");
    bench.write(&bench.ticket(), block(2), 2);
    discard(2);
    assert_eq!(since(&bench, &a.frozen[0]), [2]);
    let b = noting(&bench);
    bench.retire(&b.frozen[0]);
    a.frozen[0].set_leaves_mark(true);
    bench.retire(&a.frozen[0]);
    let (disk, queue, ticket) = (bench.disk.clone(), bench.queue.clone(), bench.ticket());
    bench.run(async move { disk.carry_out_discard(&queue, &ticket, BlockIndex(0), 1).await.unwrap() });
    assert_eq!(since(&bench, &a.frozen[0]), [1, 2]);
}

#[test]
fn what_was_noted_outlives_its_version() {
    for leaves_mark in [false, true] {
        let bench = Bench::new();
        let a = noting(&bench);
        bench.write(&bench.ticket(), block(0), 1);
        let b = noting(&bench);
        bench.write(&bench.ticket(), block(1), 2);
        let c = noting(&bench);
        bench.write(&bench.ticket(), block(2), 3);
        b.frozen[0].set_leaves_mark(leaves_mark);
        bench.retire(&b.frozen[0]);
        assert_eq!(since(&bench, &a.frozen[0]), [0, 1, 2]);
        assert_eq!(since(&bench, &c.frozen[0]), [2]);
        assert_eq!(bench.disk.changes(b.frozen[0].id, None).is_ok(), leaves_mark);
        if leaves_mark {
            assert_eq!(since(&bench, &b.frozen[0]), [1, 2]);
            let to_c = bench.disk.changes(b.frozen[0].id, Some(c.frozen[0].id)).unwrap();
            assert_eq!(blocks(&to_c), [1]);
            bench.editor.forget_mark(&bench.disk, b.frozen[0].id);
            assert_eq!(since(&bench, &a.frozen[0]), [0, 1, 2]);
        }
        bench.retire(&c.frozen[0]);
        assert_eq!(since(&bench, &a.frozen[0]), [0, 1, 2]);
        bench.retire(&a.frozen[0]);
        assert!(live_table(&bench).is_none(), "nobody can ask any more");
        bench.write(&bench.ticket(), block(3), 4);
    }
}

/// The guest goes on, and everything counts as changed; from the next cut on it is known again.
#[test]
fn a_table_that_is_not_to_be_believed_is_never_taken_for_an_empty_one() {
    let bench = Bench::new();
    let a = noting(&bench);
    bench.write(&bench.ticket(), block(0), 1);
    live_table(&bench).unwrap().mark_broken();
    bench.write(&bench.ticket(), block(1), 2);
    let by_owners = bench.disk.changes(a.frozen[0].id, None).unwrap();
    assert_eq!((by_owners.source(), blocks(&by_owners)), (ChangeSource::Owned, vec![0, 1]));
    let b = noting(&bench);
    bench.write(&bench.ticket(), block(2), 3);
    assert_eq!(since(&bench, &b.frozen[0]), [2]);
    a.frozen[0].set_leaves_mark(true);
    bench.retire(&a.frozen[0]);
    // No version stands for the bookmark whose blocks could be looked at.
    assert!(matches!(bench.disk.changes(a.frozen[0].id, None), Err(NoChanges::Unknown(_))));
    assert_eq!(since(&bench, &b.frozen[0]), [2]);
    // And what is unknown stays so when it is merged.
    bench.retire(&b.frozen[0]);
    assert!(matches!(bench.disk.changes(a.frozen[0].id, None), Err(NoChanges::Unknown(_))));
}

#[test]
fn nothing_is_said_by_owners_across_a_split() {
    let bench = Bench::new();
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (a, _) = bench.cut();
    a.frozen[0].set_quiesced();
    let kept = bench.live.copy("kept");
    let (b, _) = bench.cut_to_split(&kept);
    b.frozen[0].set_quiesced();
    assert_eq!(blocks(&bench.disk.changes(a.frozen[0].id, Some(b.frozen[0].id)).unwrap()), [] as [u64; 0]);
    assert!(matches!(bench.disk.changes(a.frozen[0].id, None), Err(NoChanges::Unknown(_))));
    assert!(matches!(bench.disk.changes(b.frozen[0].id, None), Err(NoChanges::Unknown(_))));
}

#[test]
fn a_moment_that_is_not_settled_has_no_differences() {
    let bench = Bench::new();
    let layer = Layer::of(Backing::One(Arc::new(bench.empty_image("layer"))), bench.table());
    let cut = bench.cut_with(NewLayer::Frozen { layer });
    assert_eq!(bench.disk.changes(cut.frozen[0].id, None).err(), Some(NoChanges::Draining));
    cut.frozen[0].set_quiesced();
    bench.disk.break_version(&cut.frozen[0], "no room");
    assert_eq!(bench.disk.changes(cut.frozen[0].id, None).err(), Some(NoChanges::Broken("no room".to_owned())));
}

#[test]
fn runs_are_found_across_words() {
    let bench = Bench::with_blocks(4096, 200);
    let a = noting(&bench);
    for range in [60..70, 128..192, 199..200] {
        bench.write(&bench.ticket(), range.start * BLOCK_SECTORS..range.end * BLOCK_SECTORS, 1);
    }
    let changes = bench.disk.changes(a.frozen[0].id, None).unwrap();
    let runs: Vec<_> = changes.clone().into_runs().map(|run| (run.start.0, run.end.0)).collect();
    assert_eq!(runs, [(60, 70), (128, 192), (199, 200)]);
    assert_eq!((changes.count(), changes.count_with(&changes)), (75, 75));
    bench.on(bench.disk.attach_live(), &bench.ticket(), write_of(0..8, 1)).unwrap();
    assert_eq!(changes.count(), 76, "it goes by the tables");
}
