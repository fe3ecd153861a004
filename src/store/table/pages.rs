//! The pages of bits of a table: a list of mappings, which only ever gets longer.
//!
//! What always holds: a page stays where it is until the table goes, so whoever has found it needs no lock and nobody waits
//! while a table grows; a page that is found is mapped; one that was never faulted in is not touched, and is all zeros.

use std::io;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

use super::{PAGE_BYTES, PAGE_WORDS};

/// Memory that is mapped, whole pages of it, as long as this is there.
pub(super) struct Mapping {
    base: NonNull<AtomicU64>,
    pages: usize,
}

// SAFETY: the memory is accessed only through atomics, and unmapped by whoever owns the mapping alone.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeros that no file has.
    pub(super) fn of_nothing(pages: usize) -> io::Result<Mapping> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let raw = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), pages * PAGE_BYTES, access, flags) }?;
        Ok(Mapping { base: NonNull::new(raw.cast()).expect("mmap never returns null"), pages })
    }

    /// Pages of a file that has them, from its page `first` on.
    ///
    /// The run directory is ours alone (mode 0700), so nobody shortens the file.
    pub(super) fn of_file(file: &std::fs::File, first: usize, pages: usize) -> io::Result<Mapping> {
        let (access, at) = (ProtFlags::READ | ProtFlags::WRITE, (first * PAGE_BYTES) as u64);
        // SAFETY: a new shared mapping at an address of the kernel's choice, of a file that has that length.
        let raw =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), pages * PAGE_BYTES, access, MapFlags::SHARED, file, at) }?;
        Ok(Mapping { base: NonNull::new(raw.cast()).expect("mmap never returns null"), pages })
    }

    pub(super) fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages && word < PAGE_WORDS);
        // SAFETY: the index is inside the mapping, which self owns and which is aligned to a page.
        unsafe { self.base.add(page * PAGE_WORDS + word).as_ref() }
    }

    /// Faults in pages, to be written.
    pub(super) fn populate(&self, first: usize, count: usize) -> io::Result<()> {
        assert!(first + count <= self.pages);
        let address = self.base.as_ptr().wrapping_add(first * PAGE_WORDS);
        // SAFETY: the pages lie inside the mapping that self owns; populating changes no content.
        unsafe { rustix::mm::madvise(address.cast(), count * PAGE_BYTES, rustix::mm::Advice::LinuxPopulateWrite) }
            .map_err(|e| if e == rustix::io::Errno::FAULT { rustix::io::Errno::NOSPC } else { e })?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrowed from self is left.
        if let Err(e) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.pages * PAGE_BYTES) } {
            log::error!("cannot unmap a table: {e}");
        }
    }
}

/// Consecutive pages of bits, and those that came when the table grew.
pub(super) struct Pages {
    mapping: Mapping,
    /// Which page of the mapping is the first of them: one has the header before it.
    skipped: usize,
    /// The number of the first of them.
    first: usize,
    count: usize,
    /// One bit a page: has it been faulted in?
    present: Box<[AtomicU64]>,
    more: OnceLock<Box<Pages>>,
}

impl Pages {
    /// All pages of a mapping but the `skipped` first ones; their numbers begin with `first`.
    pub(super) fn of(mapping: Mapping, skipped: usize, first: usize) -> Pages {
        let count = mapping.pages - skipped;
        let present = (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Pages { mapping, skipped, first, count, present, more: OnceLock::new() }
    }

    /// The page before the first one.
    pub(super) fn header_word(&self, word: usize) -> Option<&AtomicU64> {
        (self.skipped > 0).then(|| self.mapping.word(0, word))
    }

    /// These, and those that came later.
    fn all(&self) -> impl Iterator<Item = &Pages> {
        std::iter::successors(Some(self), |pages| pages.more.get().map(|more| &**more))
    }

    /// How many there are.
    pub(super) fn end(&self) -> usize {
        self.all().last().map_or(0, |last| last.first + last.count)
    }

    /// Adds those that follow.
    pub(super) fn extend(&self, pages: Pages) {
        let last = self.all().last().unwrap_or(self);
        assert_eq!(pages.first, last.first + last.count, "pages follow each other");
        assert!(last.more.set(Box::new(pages)).is_ok(), "a table grows for one at a time");
    }

    /// The pages that a page is among, and its place there.
    fn find(&self, page: usize) -> Option<(&Pages, usize)> {
        let pages = self.all().find(|pages| page < pages.first + pages.count)?;
        Some((pages, page - pages.first))
    }

    pub(super) fn is_present(&self, page: usize) -> bool {
        self.find(page).is_some_and(|(pages, at)| pages.present[at / 64].load(Ordering::SeqCst) & (1 << (at % 64)) != 0)
    }

    pub(super) fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        let (pages, at) = self.find(page).expect("a block of the table");
        pages.mapping.word(pages.skipped + at, word)
    }

    /// Faults in pages of bits, to be written.
    pub(super) fn populate(&self, first: usize, count: usize) -> io::Result<()> {
        let mut page = first;
        while page < first + count {
            let (pages, at) = self.find(page).expect("a block of the table");
            let some = (first + count - page).min(pages.count - at);
            pages.mapping.populate(pages.skipped + at, some)?;
            for at in at..at + some {
                pages.present[at / 64].fetch_or(1 << (at % 64), Ordering::SeqCst);
            }
            page += some;
        }
        Ok(())
    }

    /// Faults in the header.
    pub(super) fn populate_header(&self) -> io::Result<()> {
        self.mapping.populate(0, self.skipped)
    }

    /// The first page at or after `from` that was faulted in.
    pub(super) fn next_present(&self, from: usize) -> Option<usize> {
        self.all().filter(|pages| from < pages.first + pages.count).find_map(|pages| pages.next_of_these(from))
    }

    fn next_of_these(&self, from: usize) -> Option<usize> {
        let mut at = from.saturating_sub(self.first);
        while at < self.count {
            let rest = self.present[at / 64].load(Ordering::SeqCst) >> (at % 64);
            if rest != 0 {
                return Some(self.first + at + rest.trailing_zeros() as usize);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

/// Words that stay where they are while more follow them.
pub(super) struct Words {
    words: Box<[AtomicU64]>,
    more: OnceLock<Box<Words>>,
}

impl Words {
    pub(super) fn zeros(count: usize) -> Words {
        Words { words: (0..count).map(|_| AtomicU64::new(0)).collect(), more: OnceLock::new() }
    }

    pub(super) fn get(&self, index: usize) -> Option<&AtomicU64> {
        let mut index = index;
        let all = std::iter::successors(Some(self), |words| words.more.get().map(|more| &**more));
        for words in all {
            match words.words.get(index) {
                Some(word) => return Some(word),
                None => index -= words.words.len(),
            }
        }
        None
    }

    /// Makes sure that there are as many.
    pub(super) fn extend(&self, count: usize) {
        match (self.more.get(), count.saturating_sub(self.words.len())) {
            (_, 0) => {}
            (Some(more), left) => more.extend(left),
            (None, left) => {
                assert!(self.more.set(Box::new(Words::zeros(left))).is_ok(), "a table grows for one at a time");
            }
        }
    }
}
