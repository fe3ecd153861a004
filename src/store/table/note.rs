//! Tables that note what happens to blocks: bits that are only ever set, by many, and looked at by the word.
//!
//! What always holds: a bit that is set already costs a load, and a page that nobody has written is not touched.

use std::io;
use std::sync::atomic::Ordering;

use super::{PAGE_WORDS, Table, words_of};
use crate::store::{BlockIndex, BlockRange};

impl Table {
    /// Sets the bits of `range`, and faults in what that needs.
    ///
    /// # Errors
    /// When no page can be had. Some of the bits may be set then, and some are not.
    pub fn note(&self, range: BlockRange) -> io::Result<()> {
        words_of(range).try_for_each(|(index, bits)| self.or_word(index, bits))
    }

    /// Sets bits of blocks `index` × 64 and on.
    pub(crate) fn or_word(&self, index: u64, bits: u64) -> io::Result<()> {
        let block = BlockIndex(index * 64);
        let (page, word, _) = Self::place(block);
        if bits & !self.word_at(index) != 0 {
            self.prepare(BlockRange::one(block))?;
            let old = self.pages.word(page, word).fetch_or(bits, Ordering::SeqCst);
            self.ones.fetch_add(u64::from((bits & !old).count_ones()), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Sets the bits of `range` in a table that nobody else changes meanwhile, and faults in what that needs: a bit that is
    /// set already is no change.
    ///
    /// # Errors
    /// When no page can be had. Some of the bits may be set then, and some are not.
    pub fn add(&self, range: BlockRange) -> io::Result<()> {
        words_of(range).try_for_each(|(index, bits)| self.add_word(index, bits))
    }

    fn add_word(&self, index: u64, bits: u64) -> io::Result<()> {
        if bits & !self.word_at(index) != 0 {
            self.or_word(index, bits)?;
            self.note_change(BlockRange { start: BlockIndex(index * 64), end: BlockIndex((index + 1) * 64) });
        }
        Ok(())
    }

    /// Sets every bit that is set in `other`, a table for as many blocks or fewer. Nobody else changes this one meanwhile.
    ///
    /// # Errors
    /// When no page can be had. Some of the bits may be set then, and some are not.
    pub fn merge(&self, other: &Table) -> io::Result<()> {
        debug_assert!(other.blocks() <= self.blocks(), "it has room for all of them");
        let mut next = other.next_word(0);
        while let Some(index) = next {
            self.add_word(index, other.word_at(index))?;
            next = other.next_word(index + 1);
        }
        Ok(())
    }

    /// The bits of blocks `index` × 64 and on; zeros behind the last block.
    #[must_use]
    pub fn word_at(&self, index: u64) -> u64 {
        let (page, word) = (index / PAGE_WORDS as u64, index % PAGE_WORDS as u64);
        match (usize::try_from(page), usize::try_from(word)) {
            (Ok(page), Ok(word)) if self.pages.is_present(page) => self.pages.word(page, word).load(Ordering::SeqCst),
            _ => 0,
        }
    }

    /// The first word at or after `index`, in words of 64 blocks, in a page that may have bits.
    #[must_use]
    pub fn next_word(&self, index: u64) -> Option<u64> {
        let first = usize::try_from(index / PAGE_WORDS as u64).ok()?;
        let found = self.pages.next_present(first)?;
        Some(if found == first { index } else { (found * PAGE_WORDS) as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> BlockRange {
        BlockRange { start: BlockIndex(start), end: BlockIndex(end) }
    }

    fn set_in(table: &Table) -> Vec<u64> {
        let mut found = Vec::new();
        let mut at = BlockIndex(0);
        while let Some(block) = table.next_set(at) {
            found.push(block.0);
            at = BlockIndex(block.0 + 1);
        }
        found
    }

    #[test]
    fn bits_are_noted_across_words_and_pages() {
        let table = Table::in_memory(200_000).unwrap();
        for (from, to) in [(0, 1), (62, 66), (128, 192), (32_700, 33_000), (199_999, 200_000)] {
            table.note(range(from, to)).unwrap();
            table.note(range(from, to)).unwrap();
        }
        let expected: Vec<u64> =
            [0..1, 62..66, 128..192, 32_700..33_000, 199_999..200_000].into_iter().flatten().collect();
        assert_eq!(set_in(&table), expected);
        assert_eq!(table.count(), expected.len() as u64);
        table.note(range(5, 5)).unwrap();
        assert_eq!(table.count(), expected.len() as u64, "an empty range has no bits");
    }

    #[test]
    fn a_merge_is_the_union_and_touches_no_page_that_has_nothing() {
        let (one, other) = (Table::in_memory(1 << 32).unwrap(), Table::in_memory(1 << 32).unwrap());
        one.note(range(7, 9)).unwrap();
        other.note(range(8, 10)).unwrap();
        other.note(range(1 << 31, (1 << 31) + 70)).unwrap();
        one.merge(&other).unwrap();
        assert_eq!(one.count(), 3 + 70);
        assert_eq!(other.count(), 2 + 70, "the other stays as it is");
        assert_eq!(one.next_word(1000), Some(1 << 25));
        assert_eq!(one.next_word((1 << 25) + 600), None);
        assert_eq!((one.word_at(0), one.word_at((1 << 25) + 1)), (0b11_1000_0000, 0b11_1111));
    }

    /// 16 TiB of blocks of 4 KiB: whoever holds up a guest meanwhile must not go through all of them.
    #[test]
    fn tables_of_a_huge_disk_cost_what_is_used() {
        let blocks = 1 << 32;
        let (one, other) = (Table::in_memory(blocks).unwrap(), Table::in_memory(blocks).unwrap());
        other.track(4032);
        one.note(range(5, 9)).unwrap();
        one.note(range(blocks - 1, blocks)).unwrap();
        let began = std::time::Instant::now();
        other.merge(&one).unwrap();
        assert_eq!(
            (other.next_set(BlockIndex(9)), other.next_clear(BlockIndex(5))),
            (Some(BlockIndex(blocks - 1)), Some(BlockIndex(9)))
        );
        other.clear(range(0, blocks - 1));
        assert_eq!(set_in(&other), [blocks - 1]);
        assert_eq!(other.count(), 1);
        other.clear(range(0, blocks));
        assert!(began.elapsed() < std::time::Duration::from_millis(500), "it took {:?}", began.elapsed());
        assert_eq!((set_in(&other), other.count()), (Vec::new(), 0));
    }

    #[test]
    fn only_what_was_merged_counts_as_changed() {
        let blocks = 200 * 4032;
        let (one, other) = (Table::in_memory(blocks).unwrap(), Table::in_memory(blocks).unwrap());
        other.track(4032);
        one.note(range(4031, 4033)).unwrap();
        one.note(range(150 * 4032, 150 * 4032 + 1)).unwrap();
        other.merge(&one).unwrap();
        assert_eq!(other.take_changes(&mut 0, 1000), [0, 1, 150]);
        other.set(range(4032, 3 * 4032 + 1));
        assert_eq!(other.take_changes(&mut 0, 1000), [1, 2, 3]);
        other.clear(range(70 * 4032 - 1, 140 * 4032));
        assert_eq!(other.take_changes(&mut 0, 1000), (69..140).collect::<Vec<_>>());
    }

    /// Word by word it is what it is bit by bit.
    #[test]
    fn words_are_set_and_cleared_as_their_bits_would_be() {
        let blocks = 3 * 32768 + 77;
        let table = Table::in_memory(blocks).unwrap();
        let mut bits = vec![false; usize::try_from(blocks).unwrap()];
        let mut state = 1u64;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for _ in 0..300 {
            let start = below(blocks);
            let most = if below(2) == 0 { 130 } else { 70_000 };
            let end = (start + 1 + below(most)).min(blocks);
            let sets = below(2) == 0;
            if sets {
                table.prepare(range(start, end)).unwrap();
                table.set(range(start, end));
            } else {
                table.clear(range(start, end));
            }
            bits[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(sets);
            let at = below(blocks);
            let from = usize::try_from(at).unwrap();
            let next = |bit: bool| (from..bits.len()).find(|&b| bits[b] == bit).map(|b| BlockIndex(b as u64));
            assert_eq!((table.next_set(BlockIndex(at)), table.next_clear(BlockIndex(at))), (next(true), next(false)));
            assert_eq!(table.count(), bits.iter().filter(|&&bit| bit).count() as u64);
        }
    }
}
