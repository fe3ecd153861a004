//! Tables across processes, pages and sizes, and files that are none.

use super::*;

fn range(start: u64, end: u64) -> BlockRange {
    BlockRange { start: BlockIndex(start), end: BlockIndex(end) }
}

#[test]
fn sets_clears_and_finds_bits_across_pages() {
    let table = Table::in_memory(3 * PAGE_BITS).unwrap();
    let across = range(PAGE_BITS - 2, PAGE_BITS + 3);
    table.prepare(across).unwrap();
    table.set(across);
    assert_eq!(table.count(), 5);
    assert_eq!(table.next_set(BlockIndex(0)), Some(BlockIndex(PAGE_BITS - 2)));
    assert_eq!(table.next_set(BlockIndex(PAGE_BITS + 3)), None);
    assert_eq!(table.next_clear(BlockIndex(0)), Some(BlockIndex(0)));
    assert_eq!(table.next_clear(BlockIndex(PAGE_BITS - 2)), Some(BlockIndex(PAGE_BITS + 3)));
    table.clear(range(PAGE_BITS - 2, PAGE_BITS));
    assert_eq!(table.next_set(BlockIndex(0)), Some(BlockIndex(PAGE_BITS)));
    assert!(!table.get(BlockIndex(2 * PAGE_BITS + 1)), "an absent page reads as zeros");
}

#[test]
fn a_saved_table_comes_back_and_every_flipped_bit_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    let table =
        Table::create(&dir.path().join("run"), 100_000, TableName { id: Uuid::nil(), boot: Uuid::nil() }).unwrap();
    table.prepare(range(0, 100_000)).unwrap();
    table.set(range(7, 9));
    table.set(range(99_000, 99_010));
    let seal = table.save(&path).unwrap();
    let back = Table::in_memory(100_000).unwrap();
    back.load(&path, seal).unwrap();
    assert_eq!(back.count(), 12);
    assert!(back.get(BlockIndex(8)) && back.get(BlockIndex(99_009)) && !back.get(BlockIndex(9)));

    let good = std::fs::read(&path).unwrap();
    for at in (0..64).chain((64..good.len()).step_by(61)) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).unwrap();
        assert!(Table::in_memory(100_000).unwrap().load(&path, seal).is_err(), "flip at byte {at} went unnoticed");
    }
    std::fs::write(&path, &good[..good.len() - 1]).unwrap();
    assert!(Table::in_memory(100_000).unwrap().load(&path, seal).is_err());
    std::fs::write(&path, &good).unwrap();
    assert!(Table::in_memory(99_999).unwrap().load(&path, seal).is_err(), "another size");

    let later = table.save(&path).unwrap();
    assert!(Table::in_memory(100_000).unwrap().load(&path, seal).is_err(), "a later copy");
    std::fs::write(&path, &good).unwrap();
    assert!(Table::in_memory(100_000).unwrap().load(&path, later).is_err(), "an earlier copy");
    std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", &path).unwrap();
    assert!(Table::in_memory(100_000).unwrap().load(&path, seal).is_err(), "a link");
}

#[test]
fn a_table_comes_back_to_the_next_process_with_all_its_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    let name = TableName::of_this_boot(Uuid::new_v4()).unwrap();
    let blocks = 5 * PAGE_BITS + 70;
    let table = Table::create(&path, blocks, name).unwrap();
    for part in [range(5, 9), range(3 * PAGE_BITS - 1, 3 * PAGE_BITS + 2), range(blocks - 1, blocks)] {
        table.prepare(part).unwrap();
        table.set(part);
    }
    drop(table);
    let back = Table::open(&path, blocks, name).unwrap();
    assert_eq!(back.count(), 8);
    assert!(back.get(BlockIndex(8)) && back.get(BlockIndex(blocks - 1)) && !back.get(BlockIndex(9)));
    assert!(!back.pages.is_present(1) && !back.pages.is_present(4), "pages that were never used stay so");
    assert!(!back.is_broken());
    back.mark_broken();
    drop(back);
    let again = Table::open(&path, blocks, name).unwrap();
    assert!(again.is_broken());
    assert_eq!(again.count(), 8);
    again.clear(range(5, 6));
    again.prepare(range(PAGE_BITS, PAGE_BITS + 1)).unwrap();
    again.set(range(PAGE_BITS, PAGE_BITS + 1));
    assert_eq!(Table::open(&path, blocks, name).unwrap().count(), 8);
}

#[test]
fn a_run_table_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    let name = TableName::of_this_boot(Uuid::new_v4()).unwrap();
    let table = Table::create(&path, 1000, name).unwrap();
    table.prepare(range(0, 1000)).unwrap();
    table.set(range(0, 1000));
    drop(table);
    let refused = |blocks, name, what: &str| {
        let answer = Table::open(&path, blocks, name);
        assert!(matches!(answer, Err(TableError::Damaged { .. })), "{what}: {answer:?}");
    };
    refused(1001, name, "another size");
    refused(999, name, "bits behind the end");
    refused(PAGE_BITS + 1, name, "another length");
    refused(1000, TableName { id: Uuid::new_v4(), ..name }, "another table");
    refused(1000, TableName { boot: Uuid::new_v4(), ..name }, "another boot");
    let good = std::fs::read(&path).unwrap();
    for at in (0..100 * 8).chain((800..PAGE_BYTES * 8).step_by(97)) {
        let mut bad = good.clone();
        bad[at / 8] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).unwrap();
        // The mark of a broken table is the one bit that may be either.
        if at == FLAGS_WORD * 64 {
            assert!(Table::open(&path, 1000, name).unwrap().is_broken());
        } else {
            refused(1000, name, &format!("flip of bit {at}"));
        }
    }
    let mut bad = good.clone();
    bad[PAGE_BYTES + 125] = 1;
    std::fs::write(&path, &bad).unwrap();
    refused(1000, name, "the bit of a block that is not there");
    std::fs::write(&path, &good[..good.len() - 1]).unwrap();
    refused(1000, name, "cut short");
    std::fs::write(&path, &good).unwrap();
    assert_eq!(Table::open(&path, 1000, name).unwrap().count(), 1000);
    std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
    assert!(matches!(Table::open(&path, 1000, name), Err(TableError::Io { .. })), "missing");
    std::os::unix::fs::symlink("elsewhere", &path).unwrap();
    assert!(Table::open(&path, 1000, name).is_err(), "a link");
}

#[test]
fn the_table_of_a_huge_disk_opens_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    let name = TableName::of_this_boot(Uuid::new_v4()).unwrap();
    let blocks = 1 << 32; // 16 TiB of 4 KiB blocks
    let table = Table::create(&path, blocks, name).unwrap();
    for block in (0..blocks).step_by(1 << 27) {
        table.prepare(range(block, block + 1)).unwrap();
        table.set(range(block, block + 1));
    }
    drop(table);
    let began = std::time::Instant::now();
    assert_eq!(Table::open(&path, blocks, name).unwrap().count(), 32);
    assert!(began.elapsed() < std::time::Duration::from_secs(1), "it took {:?}", began.elapsed());
}

#[test]
fn a_table_of_a_huge_disk_costs_what_is_used() {
    let table = Table::in_memory(1 << 32).unwrap(); // 16 TiB of 4 KiB blocks
    table.prepare(range(1 << 31, (1 << 31) + 1)).unwrap();
    table.set(range(1 << 31, (1 << 31) + 1));
    assert_eq!(table.next_set(BlockIndex(0)), Some(BlockIndex(1 << 31)));
    let page = table.pages.next_present(0).unwrap();
    assert_eq!((page as u64, table.pages.next_present(page + 1)), ((1 << 31) / PAGE_BITS, None));
}

fn one(block: u64) -> BlockRange {
    range(block, block + 1)
}

fn all_set(table: &Table) -> Vec<u64> {
    let next = |from: u64| table.next_set(BlockIndex(from)).map(|block| block.0);
    std::iter::successors(next(0), |block| next(block + 1)).collect()
}

/// Bits that were there stay where they are, in every way of looking at them, and new ones come behind them.
#[test]
fn a_table_grows_and_keeps_its_bits() {
    let directory = tempfile::tempdir().unwrap();
    let (path, name) = (directory.path().join("t.bits"), TableName::of_this_boot(Uuid::new_v4()).unwrap());
    for file in [None, Some(path.as_path())] {
        let table = match file {
            Some(path) => Table::create(path, 5, name).unwrap(),
            None => Table::in_memory(5).unwrap(),
        };
        table.track(100);
        let mut expected = Vec::new();
        let mut blocks = 5;
        for more in [1, 60, PAGE_BITS, 3, 5 * PAGE_BITS + 7, 70 * PAGE_BITS] {
            expected.push(blocks - 1);
            table.note(one(blocks - 1)).unwrap();
            let grown = blocks + more;
            table.reserve(file, grown).unwrap();
            assert_eq!((table.blocks(), table.room(), all_set(&table)), (blocks, grown, expected.clone()));
            assert_eq!(table.next_clear(BlockIndex(blocks - 1)), None, "what there is room for is not asked for");
            table.grow(grown);
            assert_eq!((table.blocks(), table.next_clear(BlockIndex(blocks - 1))), (grown, Some(BlockIndex(blocks))));
            blocks = grown;
        }
        let across = range(5 * PAGE_BITS - 3, 8 * PAGE_BITS + 3);
        table.prepare(across).unwrap();
        table.set(across);
        expected.extend(across.iter().map(|block| block.0));
        expected.sort_unstable();
        expected.dedup();
        assert_eq!((all_set(&table), table.count()), (expected.clone(), expected.len() as u64));
        assert!(table.take_changes(&mut 0, usize::MAX).contains(&(8 * PAGE_BITS / 100)));
        if let Some(path) = file {
            drop(table);
            let again = Table::open(path, blocks, name).unwrap();
            assert_eq!(all_set(&again), expected);
            assert_eq!(
                crate::store::run_header::examine_run_table(path, blocks, name).unwrap().ones,
                expected.len() as u64
            );
        }
    }
}

/// A growth that a kill cut off before it was recorded leaves room, and the table is still that of the smaller disk.
#[test]
fn room_that_nothing_came_of_is_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let (path, name) = (directory.path().join("t.bits"), TableName::of_this_boot(Uuid::new_v4()).unwrap());
    let table = Table::create(&path, 1000, name).unwrap();
    table.note(one(999)).unwrap();
    table.mark_broken();
    table.reserve(Some(&path), 3 * PAGE_BITS).unwrap();
    drop(table);
    let facts = crate::store::run_header::examine_run_table(&path, 1000, name).unwrap();
    assert_eq!((facts.ones, facts.is_broken), (1, true), "flags stay as they are");
    let table = Table::open(&path, 1000, name).unwrap();
    assert_eq!((table.blocks(), all_set(&table)), (1000, vec![999]));
    table.save(&directory.path().join("t.table")).unwrap();
    drop(table);
    // As a start opens it that finds the larger size in its record.
    let table = Table::open(&path, 3 * PAGE_BITS, name).unwrap();
    table.note(one(2 * PAGE_BITS)).unwrap();
    drop(table);
    for (blocks, what) in [(1000, "bits of blocks"), (3 * PAGE_BITS + 1, "another size")] {
        let found = crate::store::run_header::examine_run_table(&path, blocks, name).unwrap_err().to_string();
        assert!(found.contains(what), "{found}");
        assert_eq!(Table::open(&path, blocks, name).unwrap_err().to_string(), found);
    }
}
