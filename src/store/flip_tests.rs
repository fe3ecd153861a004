//! Every flipped bit of saved and run tables: found and named, never served.

use std::os::unix::fs::FileExt;
use std::path::Path;

use uuid::Uuid;

use super::{BlockIndex, BlockRange, RunTableFacts, Table, TableError, TableName, examine_run_table};

/// More than a page of bits, the last one in use only in part.
const BLOCKS: u64 = 40_000;

fn fill(table: &Table) {
    for (start, end) in [(3, 70), (500, 501), (32_767, 32_770), (BLOCKS - 1, BLOCKS)] {
        let range = BlockRange { start: BlockIndex(start), end: BlockIndex(end) };
        table.prepare(range).unwrap();
        table.set(range);
    }
}

/// Flips bits one at a time in a file and puts each back.
fn each_flip(path: &Path, bits: impl Iterator<Item = usize>, mut check: impl FnMut(usize)) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    for bit in bits {
        let mut byte = [0];
        file.read_exact_at(&mut byte, bit as u64 / 8).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit as u64 / 8).unwrap();
        check(bit);
        file.write_all_at(&byte, bit as u64 / 8).unwrap();
    }
}

#[test]
fn every_flipped_bit_of_a_saved_table_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    let table = Table::in_memory(BLOCKS).unwrap();
    fill(&table);
    let seal = table.save(&path).unwrap();
    let bits = usize::try_from(std::fs::metadata(&path).unwrap().len()).unwrap() * 8;
    assert!(bits > 2 * 4096 * 8, "two pages are there");
    let into = || Table::in_memory(BLOCKS).unwrap();
    // The header, the first page with its number and checksum, and the second page with larger steps.
    let first = (44 + 4108) * 8;
    each_flip(&path, (0..first).chain((first..bits).step_by(13)), |bit| {
        let answer = into().load(&path, seal);
        assert!(matches!(answer, Err(TableError::Damaged { .. })), "flipped bit {bit}: {answer:?}");
    });
    let back = into();
    back.load(&path, seal).unwrap();
    assert_eq!(back.count(), table.count());
}

#[test]
fn every_flipped_bit_of_a_run_tables_header_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    let name = TableName::of_this_boot(Uuid::new_v4()).unwrap();
    let table = Table::create(&path, BLOCKS, name).unwrap();
    fill(&table);
    let ones = table.count();
    drop(table);
    assert_eq!(examine_run_table(&path, BLOCKS, name).unwrap(), RunTableFacts { ones, is_broken: false });
    each_flip(&path, 0..4096 * 8, |bit| {
        let (opened, examined) = match bit {
            // Opening it is slower, and what is behind is zeros alike.
            0..800 => (Some(Table::open(&path, BLOCKS, name)), examine_run_table(&path, BLOCKS, name)),
            _ => (None, examine_run_table(&path, BLOCKS, name)),
        };
        match bit {
            // The mark of a broken table is the one bit that may be either, and then it says so.
            512 => {
                assert!(opened.unwrap().unwrap().is_broken());
                assert_eq!(examined.unwrap(), RunTableFacts { ones, is_broken: true });
            }
            _ => {
                assert!(matches!(examined, Err(TableError::Damaged { .. })), "bit {bit}: {examined:?}");
                assert!(opened.is_none_or(|o| matches!(o, Err(TableError::Damaged { .. }))), "bit {bit}");
            }
        }
    });
    // Bits behind the last block are damage; those before it have no checksum, and the kernel's word.
    each_flip(&path, (4096 * 8 + 40_000..4096 * 8 + 40_200).chain([3 * 4096 * 8 - 1]), |bit| {
        let examined = examine_run_table(&path, BLOCKS, name);
        let opened = Table::open(&path, BLOCKS, name);
        assert!(examined.is_err() && opened.is_err(), "bit {bit}: {examined:?}, {opened:?}");
    });
}
