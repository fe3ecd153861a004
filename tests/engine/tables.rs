//! Decisions that are made before anything is done, case by case: what is settled when a version goes, and who is harmed
//! when a write fails at one of its targets. The plans of writes are in `figures.rs` and `rules.rs`.

use std::ops::Range;
use std::sync::Arc;

use halfsilver::engine::{
    Backing, BlockPlan, Chain, Epoch, Harmed, Layer, Link, Run, Settling, Version, VersionId, VersionIndex,
};
use halfsilver::store::{BlockIndex, BlockRange, Table};

use crate::bench::{BLOCK, BLOCKS};
use crate::sim::SimImage;

const BLOCK_0: BlockIndex = BlockIndex(0);

/// A chain, the oldest version first: `F` owns everything, `x` block 0 and `-` nothing; at `|` the mirror was split.
fn chain(versions: &str) -> Chain {
    let mut links = Vec::new();
    let mut splits = false;
    for kind in versions.chars() {
        if kind == '|' {
            splits = true;
            continue;
        }
        let image = Backing::One(Arc::new(SimImage::new("layer", BLOCK * BLOCKS, 512)));
        let table = Arc::new(Table::in_memory(BLOCKS as u64).unwrap());
        if kind == 'x' {
            table.prepare(BlockRange::one(BLOCK_0)).unwrap();
            table.set(BlockRange::one(BLOCK_0));
        }
        let layer = if kind == 'F' { Layer::full(image) } else { Layer::of(image, table) };
        let version = Version::new(VersionId::from_u128(links.len() as u128), Epoch(links.len() as u64));
        links.push(Link { version, layer, splits: std::mem::take(&mut splits) });
    }
    Chain::new(links)
}

#[test]
fn what_is_settled_when_a_version_goes() {
    type Case = (&'static str, VersionIndex, Range<VersionIndex>, bool, Range<VersionIndex>, &'static str);
    let cases: [Case; 9] = [
        ("--F", 0, 0..0, true, 0..0, "nobody read through it"),
        ("--F", 1, 0..0, true, 0..1, "it was handed to the older one"),
        ("-F--", 1, 1..4, true, 0..1, "a pivot that a log was folded into"),
        ("-F--", 2, 1..4, true, 0..1, "a log was handed to the one above"),
        ("F|F", 0, 0..0, false, 0..0, "nobody is left on its side"),
        ("-F|F", 1, 1..2, false, 0..1, "the older one takes the full image over"),
        ("-F-|F", 2, 1..3, false, 0..1, "a log on the old side of a split"),
        ("-F|-F", 0, 0..0, false, 0..0, "the oldest on the old side"),
        ("-F|-F", 2, 0..0, true, 2..2, "nothing is handed across a split"),
    ];
    for (versions, goes, stores, is_for_live, heirs, why) in cases {
        let settling = Settling::decide(chain(versions).at(goes));
        assert_eq!(settling, Settling { stores, is_for_live, heirs }, "{versions} {goes}: {why}");
    }
}

#[test]
fn who_is_lost_with_an_heir_that_cannot_be_stored() {
    let settling = Settling { stores: 0..0, is_for_live: true, heirs: 1..5 };
    let cases: [(VersionIndex, &[VersionIndex], &[VersionIndex]); 4] = [
        (3, &[1, 2, 3, 4], &[1, 2, 3]), // Older ones read through it; newer ones do not.
        (3, &[1, 3], &[1, 3]),          // One that does not outlive a power cut has what it needs.
        (3, &[], &[3]),
        (1, &[1, 2, 3, 4], &[1]),
    ];
    for (newest, outlive, lost) in cases {
        assert_eq!(settling.lost_with(newest, |heir| outlive.contains(&heir)), lost, "{newest} of {outlive:?}");
    }
}

#[test]
fn who_is_harmed_when_a_write_fails_at_a_target() {
    let frozen = |lost: &[VersionIndex]| Harmed::Frozen(lost.to_vec());
    let cases = [
        ("-F", 1, true, 1, Harmed::Guest, "the live version's own place"),
        ("xF", 0, false, 1, Harmed::Guest, "VLUN B must have it"),
        ("xF", 0, false, 0, frozen(&[0]), "only VLUN A reads there"),
        ("xF", 0, true, 1, Harmed::Guest, "both read there when the entry is gone"),
        ("F-", 0, true, 0, Harmed::Guest, "the log reads through it"),
        ("Fx", 0, false, 0, frozen(&[0]), "the log has its own"),
        ("Fx", 0, false, 1, Harmed::Guest, "the log is the live version's"),
        ("Fx", 0, true, 0, Harmed::Guest, "the log reads there when its entry is gone"),
        ("F-", 1, false, 1, Harmed::Guest, "a new entry of the log"),
        ("F|F", 0, true, 0, frozen(&[0]), "its own side of the split"),
        ("F|F", 0, true, 1, Harmed::Guest, "the live side of the split"),
        ("-xF", 0, false, 1, frozen(&[0, 1]), "the oldest reads through the next one"),
        ("-xF", 1, false, 1, frozen(&[1]), "what an older one reads is saved before"),
    ];
    for (versions, writer, whole, target, harmed, why) in cases {
        let chain = chain(versions);
        let plan = BlockPlan::decide(chain.at(writer), BLOCK_0, whole);
        let run = Run { blocks: BlockRange::one(BLOCK_0), plan };
        assert!(run.plan.targets().any(|t| t == target), "{versions}: {:?}", run.plan);
        assert_eq!(run.harmed_at(chain.at(writer), target), harmed, "{versions} {writer} whole {whole}: {why}");
    }
}
