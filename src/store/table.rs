//! A table: one bit a block.
//!
//! In memory it is a mapping, of a file in the run directory or of nothing: a header page, then the bits. Pages are
//! taken on first use, so a table of a 16 TiB disk costs what is written, not what could be. A page is faulted in with a
//! system call that can fail ([`Table::prepare`]) before a bit in it is first set: a full run directory is an error, not
//! a SIGBUS. The mapping outlives a killed process; the header tells the next one whose it is ([`Table::open`]).
//!
//! The saved copy is the list of its non-empty pages, each with a checksum. It has a seal, which the records keep: a
//! whole copy from another time or of another table would show wrong bytes, so it is not believed.

mod note;
mod pages;

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use uuid::Uuid;

use self::pages::{Mapping, Pages, Words};
use super::error::TableError;
use super::run_header::{self, BROKEN, FLAGS_WORD, PAGE_BYTES, RunHeader, TableName};
use super::{BlockIndex, BlockRange};

use crate::crash;

const PAGE_BITS: u64 = PAGE_BYTES as u64 * 8;
const PAGE_WORDS: usize = PAGE_BYTES / 8;

const MAGIC: [u8; 8] = *b"HSTABLE1";
/// Saved copy: magic, blocks (u64 LE), pages (u64 LE), seal (16 bytes), CRC-32 of the 40 bytes before it (u32 LE).
const HEADER_BYTES: usize = 44;

/// One bit a block, shared by all workers.
pub struct Table {
    pages: Pages,
    /// How many blocks it is for, and how many there is room for: those of a disk that is about to grow.
    blocks: AtomicU64,
    room: AtomicU64,
    ones: AtomicU64,
    flags: AtomicU64,
    changes: OnceLock<Changes>,
}

/// Which groups of blocks have changed since somebody last asked.
struct Changes {
    group_blocks: u64,
    // One bit a group.
    groups: Words,
    // Whether some group may have changed since somebody last began to ask.
    any: AtomicBool,
}

impl Table {
    /// An empty table for `blocks` blocks, in memory only.
    ///
    /// # Errors
    /// When address space runs out.
    pub fn in_memory(blocks: u64) -> Result<Table, TableError> {
        let mapping = Mapping::of_nothing(Self::pages_for(blocks));
        Ok(Self::of(Pages::of(mapping.map_err(|e| TableError::io(Path::new("(memory)"), &e))?, 0, 0), blocks))
    }

    /// An empty table for `blocks` blocks, mapped from a new file at `path` (mode 0600; an old one is replaced).
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path, blocks: u64, name: TableName) -> Result<Table, TableError> {
        let error = |e: io::Error| TableError::io(path, &e);
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error(e)),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(error)?;
        crash::point("before a table's file has its size");
        file.set_len(Self::mapping_bytes(blocks) as u64).map_err(error)?;
        crash::point("before a table's file has its header");
        // Last: a file that was not finished is not believed.
        file.write_all_at(&RunHeader { blocks, name }.page(), 0).map_err(error)?;
        Self::map(path, &file, blocks, Self::pages_for(blocks))
    }

    /// The table that an earlier process of this boot left at `path`, with all its bits: those who could write it have
    /// ended. It must be the one of this name, for this number of blocks; it may have room for more.
    ///
    /// # Errors
    /// `Damaged` when it is another one or anything about it does not fit; `Io` when it is missing or cannot be mapped.
    pub fn open(path: &Path, blocks: u64, name: TableName) -> Result<Table, TableError> {
        let error = |e: io::Error| TableError::io(path, &e);
        let damaged = |what: &str| TableError::Damaged { path: path.to_owned(), what: what.to_owned() };
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map_err(error)?;
        let room = run_header::check(&file, path, &RunHeader { blocks, name })?.room_pages;
        let table = Self::map(path, &file, blocks, room)?;
        for pages in run_header::pages_with_data(&file, table.pages.end()).map_err(error)? {
            table.pages.populate(pages.start, pages.len()).map_err(error)?;
            let words = pages.flat_map(|page| (0..PAGE_WORDS).map(move |word| (page, word)));
            let ones = words.map(|(page, word)| table.pages.word(page, word).load(Ordering::SeqCst).count_ones());
            table.ones.fetch_add(ones.map(u64::from).sum(), Ordering::Relaxed);
        }
        // What a growth that was cut off has made room for has nothing.
        let behind = std::iter::successors(table.next_word(blocks / 64), |word| table.next_word(word + 1));
        let bits =
            |word: u64| if word == blocks / 64 { table.word_at(word) >> (blocks % 64) } else { table.word_at(word) };
        if behind.into_iter().any(|word| bits(word) != 0) {
            return Err(damaged("it has bits of blocks that the disk does not have"));
        }
        Ok(table)
    }

    fn map(path: &Path, file: &File, blocks: u64, pages: usize) -> Result<Table, TableError> {
        let error = |e: io::Error| TableError::io(path, &e);
        let mapping = Mapping::of_file(file, 0, pages + 1).map_err(error)?;
        let table = Self::of(Pages::of(mapping, 1, 0), blocks);
        // The flags are stored without a system call and must find their page.
        table.pages.populate_header().map_err(error)?;
        Ok(table)
    }

    /// The header page and the pages of bits.
    fn mapping_bytes(blocks: u64) -> usize {
        (Self::pages_for(blocks) + 1) * PAGE_BYTES
    }

    fn pages_for(blocks: u64) -> usize {
        usize::try_from(run_header::pages_for(blocks)).expect("tables fit the address space")
    }

    fn of(pages: Pages, blocks: u64) -> Table {
        let [blocks, room] = [blocks, blocks].map(AtomicU64::new);
        Table { pages, blocks, room, ones: AtomicU64::new(0), flags: AtomicU64::new(0), changes: OnceLock::new() }
    }

    /// Makes room for the bits of `blocks` blocks, in its file too if it has one. For how many blocks the table is stays as it
    /// is ([`Table::grow`]), and nobody who uses it meanwhile notices. One caller at a time.
    ///
    /// # Errors
    /// When there is no room. What was made of it stays, and is used by the next call.
    pub fn reserve(&self, file: Option<&Path>, blocks: u64) -> Result<(), TableError> {
        let (have, pages) = (self.pages.end(), Self::pages_for(blocks));
        let more = pages.saturating_sub(have);
        let extend = |mapping| (more > 0).then(|| self.pages.extend(Pages::of(mapping, 0, have)));
        if let Some(path) = file {
            let error = |e: io::Error| TableError::io(path, &e);
            let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path);
            let file = file.map_err(error)?;
            if more > 0 {
                let bytes = Self::mapping_bytes(blocks) as u64;
                if file.metadata().map_err(error)?.len() < bytes {
                    file.set_len(bytes).map_err(error)?;
                }
                extend(Mapping::of_file(&file, have + 1, more).map_err(error)?);
            }
            crash::point("before the header of a table says that it has grown");
            run_header::say_blocks(&file, path, blocks)?;
        } else if more > 0 {
            extend(Mapping::of_nothing(more).map_err(|e| TableError::io(Path::new("(memory)"), &e))?);
        }
        if let Some(changes) = self.changes.get() {
            changes.groups.extend(Self::words_of_groups(blocks, changes.group_blocks));
        }
        self.room.fetch_max(blocks, Ordering::SeqCst);
        Ok(())
    }

    /// From now on it is for so many blocks, for which there is room. Their bits are clear.
    ///
    /// # Panics
    /// When there is none.
    pub fn grow(&self, blocks: u64) {
        assert!((self.blocks()..=self.room()).contains(&blocks), "a table grows into its room");
        self.blocks.store(blocks, Ordering::SeqCst);
    }

    /// Says in the table itself that it cannot be vouched for. An atomic store in the mapping, no system call: it is
    /// made before the overwrite goes on that the table cannot follow, so whoever opens the table after a kill knows.
    pub fn mark_broken(&self) {
        self.flags().fetch_or(BROKEN, Ordering::SeqCst);
    }

    /// Whether [`Table::mark_broken`] was called, in this process or an earlier one.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.flags().load(Ordering::SeqCst) & BROKEN != 0
    }

    /// How many blocks the table is for.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::SeqCst)
    }

    /// For how many blocks there is room ([`Table::reserve`]).
    #[must_use]
    pub fn room(&self) -> u64 {
        self.room.load(Ordering::SeqCst)
    }

    /// How many bits are set. It follows the bits: whether there is one at all is what [`Table::next_set`] says.
    #[must_use]
    pub fn count(&self) -> u64 {
        let ones = self.ones.load(Ordering::Relaxed);
        // Who clears a bit may be faster than who has just set it, and is still to count it.
        if ones > self.blocks() { 0 } else { ones }
    }

    /// Whether the block's bit is set.
    #[must_use]
    pub fn get(&self, block: BlockIndex) -> bool {
        let (page, word, bit) = Self::place(block);
        self.pages.is_present(page) && self.pages.word(page, word).load(Ordering::SeqCst) & bit != 0
    }

    /// Whether the block's bit is set, and for how many blocks from it on that is the same, as far as its word says.
    #[must_use]
    pub fn alike(&self, block: BlockIndex) -> (bool, u64) {
        let rest = self.word_at(block.0 / 64) >> (block.0 % 64);
        let is_set = rest & 1 != 0;
        let alike = if is_set { rest.trailing_ones() } else { rest.trailing_zeros() };
        (is_set, u64::from(alike).min(64 - block.0 % 64))
    }

    /// Makes sure that the bits of `range` can be set.
    ///
    /// # Errors
    /// When no page can be had (the run directory is full, or memory is).
    pub fn prepare(&self, range: BlockRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let (first, ..) = Self::place(range.start);
        let (last, ..) = Self::place(BlockIndex(range.end.0 - 1));
        let mut page = first;
        while page <= last {
            let is_present = self.pages.is_present(page);
            let alike = (page..=last).take_while(|&page| self.pages.is_present(page) == is_present).count();
            if !is_present {
                self.pages.populate(page, alike)?;
            }
            page += alike;
        }
        Ok(())
    }

    /// Sets the bits of `range`, which must have been prepared.
    ///
    /// # Panics
    /// When it was not.
    pub fn set(&self, range: BlockRange) {
        // Never less than there are: some go by a count of zero.
        self.ones.fetch_add(range.count(), Ordering::SeqCst);
        let mut before = 0;
        for (index, bits) in words_of(range) {
            let (page, word, _) = Self::place(BlockIndex(index * 64));
            assert!(self.pages.is_present(page), "bits are set only after Table::prepare");
            let old = self.pages.word(page, word).fetch_or(bits, Ordering::SeqCst);
            before += u64::from((bits & old).count_ones());
        }
        if before > 0 {
            self.ones.fetch_sub(before, Ordering::SeqCst);
        }
        self.note_change(range);
    }

    /// Clears the bits of `range`. Pages that were never used cost nothing.
    pub fn clear(&self, range: BlockRange) {
        let mut at = range.start.0;
        while let Some(used) = self.next_word(at / 64).filter(|_| at < range.end.0) {
            at = at.max(used * 64);
            let end = ((at / PAGE_BITS + 1) * PAGE_BITS).min(range.end.0);
            for (index, bits) in words_of(BlockRange { start: BlockIndex(at), end: BlockIndex(end) }) {
                let (page, word, _) = Self::place(BlockIndex(index * 64));
                let word = self.pages.word(page, word);
                if word.load(Ordering::SeqCst) & bits != 0 {
                    let old = word.fetch_and(!bits, Ordering::SeqCst);
                    self.ones.fetch_sub(u64::from((bits & old).count_ones()), Ordering::Relaxed);
                }
            }
            at = end;
        }
        self.note_change(range);
    }

    /// From now on remembers which groups of `group_blocks` blocks change. The first call counts.
    pub(super) fn track(&self, group_blocks: u64) {
        let groups = || Words::zeros(Self::words_of_groups(self.blocks(), group_blocks));
        self.changes.get_or_init(|| Changes { group_blocks, groups: groups(), any: AtomicBool::new(false) });
    }

    fn words_of_groups(blocks: u64, group_blocks: u64) -> usize {
        usize::try_from(blocks.div_ceil(group_blocks).div_ceil(64)).expect("far fewer than the bits")
    }

    /// Remembers a change of `range`, if changes are remembered: also of bits that had their value already, because
    /// whoever gave it to them may not have come to this line yet. After the bits: whoever takes the change sees them.
    pub(super) fn note_change(&self, range: BlockRange) {
        let Some(changes) = self.changes.get() else { return };
        if range.is_empty() {
            return;
        }
        let (first, last) = (range.start.0 / changes.group_blocks, (range.end.0 - 1) / changes.group_blocks);
        for (word, groups) in words_of(BlockRange { start: BlockIndex(first), end: BlockIndex(last + 1) }) {
            let word = usize::try_from(word).expect("far fewer than the bits");
            changes.groups.get(word).expect("a group of the table").fetch_or(groups, Ordering::SeqCst);
        }
        // After the groups: who does not see it yet need not know of them.
        if !changes.any.load(Ordering::SeqCst) {
            changes.any.store(true, Ordering::SeqCst);
        }
    }

    /// Whether changes may have been remembered since [`Table::begin_to_take`] was called.
    pub(super) fn has_changes(&self) -> bool {
        self.changes.get().is_some_and(|changes| changes.any.load(Ordering::SeqCst))
    }

    /// Somebody is about to take all changes ([`Table::take_changes`]).
    pub(super) fn begin_to_take(&self) {
        if let Some(changes) = self.changes.get() {
            changes.any.store(false, Ordering::SeqCst);
        }
    }

    /// Takes the groups that have changed, at least `enough` of them if there are as many, in ascending order, and goes
    /// on from `from`. Changes of their bits that come later are remembered anew.
    pub(super) fn take_changes(&self, from: &mut usize, enough: usize) -> Vec<u64> {
        let mut taken = Vec::new();
        let Some(changes) = self.changes.get() else { return taken };
        while let Some(word) = changes.groups.get(*from).filter(|_| taken.len() < enough) {
            if word.load(Ordering::SeqCst) != 0 {
                let bits = word.swap(0, Ordering::SeqCst);
                taken.extend((0..64).filter(|bit| bits & (1 << bit) != 0).map(|bit| *from as u64 * 64 + bit));
            }
            *from += 1;
        }
        taken
    }

    /// The first block at or after `from` whose bit is set.
    #[must_use]
    pub fn next_set(&self, from: BlockIndex) -> Option<BlockIndex> {
        let mut at = from.0;
        while at < self.blocks() {
            at = at.max(self.next_word(at / 64)? * 64);
            // Bits below `at` in its word are not asked for.
            let rest = self.word_at(at / 64) & (u64::MAX << (at % 64));
            if rest != 0 {
                let found = at / 64 * 64 + u64::from(rest.trailing_zeros());
                return (found < self.blocks()).then_some(BlockIndex(found));
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The first unset bit at or after `from`.
    #[must_use]
    pub fn next_clear(&self, from: BlockIndex) -> Option<BlockIndex> {
        let mut at = from.0;
        while at < self.blocks() {
            let (page, word, bit) = Self::place(BlockIndex(at));
            if !self.pages.is_present(page) {
                return Some(BlockIndex(at));
            }
            // Bits below `at` in its word are not asked for.
            let rest = !self.pages.word(page, word).load(Ordering::SeqCst) & !(bit - 1);
            if rest != 0 {
                let found = at / 64 * 64 + u64::from(rest.trailing_zeros());
                return (found < self.blocks()).then_some(BlockIndex(found));
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Writes a saved copy to `path`: complete, synced and renamed into place, or an error. Returns its seal, which
    /// no other copy has.
    ///
    /// Nobody may change the table meanwhile, or the copy holds some of the changes.
    ///
    /// # Errors
    /// When the copy cannot be made durable.
    pub fn save(&self, path: &Path) -> Result<Uuid, TableError> {
        let seal = Uuid::new_v4();
        let error = |e: io::Error| TableError::io(path, &e);
        let beside = path.with_extension("new");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&beside)
            .map_err(error)?;
        let mut out = BufWriter::new(file);
        let pages: Vec<usize> =
            std::iter::successors(self.pages.next_present(0), |&p| self.pages.next_present(p + 1)).collect();
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&self.blocks().to_le_bytes());
        header.extend_from_slice(&(pages.len() as u64).to_le_bytes());
        header.extend_from_slice(seal.as_bytes());
        header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
        out.write_all(&header).map_err(error)?;
        for page in pages {
            // The page's number goes first and is part of its checksum: a page in the wrong place is found.
            let mut bytes = Vec::with_capacity(8 + PAGE_BYTES + 4);
            bytes.extend_from_slice(&(page as u64).to_le_bytes());
            for word in 0..PAGE_WORDS {
                bytes.extend_from_slice(&self.pages.word(page, word).load(Ordering::SeqCst).to_le_bytes());
            }
            bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
            out.write_all(&bytes).map_err(error)?;
        }
        let file = out.into_inner().map_err(|e| error(e.into_error()))?;
        crash::point("before a saved table is synced");
        file.sync_all().map_err(error)?;
        crash::point("before a saved table gets its name");
        std::fs::rename(&beside, path).map_err(error)?;
        crash::point("before the name of a saved table is synced");
        sync_directory_of(path).map_err(error)?;
        Ok(seal)
    }

    /// Fills this empty table from the saved copy with this seal.
    ///
    /// # Errors
    /// When the copy is missing, damaged, another one, or for another number of blocks.
    pub fn load(&self, path: &Path, seal: Uuid) -> Result<(), TableError> {
        let error = |e: io::Error| TableError::io(path, &e);
        let damaged = |what: &str| TableError::Damaged { path: path.to_owned(), what: what.to_owned() };
        // A copy is a file that was made here: not a link, and not a pipe that would keep us waiting.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(error)?;
        let mut file = BufReader::new(file);
        let mut header = [0; HEADER_BYTES];
        file.read_exact(&mut header).map_err(|_| damaged("the header is cut short"))?;
        let (body, crc) = header.split_at(HEADER_BYTES - 4);
        if crc != crc32fast::hash(body).to_le_bytes() || !body.starts_with(&MAGIC) {
            return Err(damaged("the header does not match its checksum"));
        }
        if u64_at(body, 8) != self.blocks() {
            return Err(damaged("it is for a disk of another size"));
        }
        if body[24..40] != *seal.as_bytes() {
            return Err(damaged("it is not the copy that was saved last"));
        }
        for _ in 0..u64_at(body, 16) {
            let mut bytes = [0; 8 + PAGE_BYTES + 4];
            file.read_exact(&mut bytes).map_err(|_| damaged("pages are missing"))?;
            let (body, crc) = bytes.split_at(8 + PAGE_BYTES);
            if crc != crc32fast::hash(body).to_le_bytes() {
                return Err(damaged("a page does not match its checksum"));
            }
            let page = usize::try_from(u64_at(body, 0)).ok().filter(|&p| p < self.pages.end());
            let page = page.ok_or_else(|| damaged("a page lies outside the table"))?;
            let start = page as u64 * PAGE_BITS;
            let blocks = BlockRange { start: BlockIndex(start), end: BlockIndex(start + 1) };
            self.prepare(blocks).map_err(error)?;
            for word in 0..PAGE_WORDS {
                let value = u64_at(body, 8 + word * 8);
                let old = self.pages.word(page, word).swap(value, Ordering::SeqCst);
                if old != 0 {
                    return Err(damaged("a page is there twice"));
                }
                self.ones.fetch_add(u64::from(value.count_ones()), Ordering::Relaxed);
            }
        }
        match file.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(damaged("there is more than it should hold")),
            Err(e) => Err(error(e)),
        }
    }

    fn place(block: BlockIndex) -> (usize, usize, u64) {
        let page = usize::try_from(block.0 / PAGE_BITS).expect("tables fit the address space");
        let word = usize::try_from(block.0 % PAGE_BITS / 64).expect("a word of a page");
        (page, word, 1 << (block.0 % 64))
    }

    fn flags(&self) -> &AtomicU64 {
        self.pages.header_word(FLAGS_WORD).unwrap_or(&self.flags)
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({} of {} blocks)", self.count(), self.blocks())
    }
}

/// The words of 64 blocks that a range lies in, and its bits in each.
fn words_of(range: BlockRange) -> impl Iterator<Item = (u64, u64)> {
    let mut at = range.start.0;
    std::iter::from_fn(move || {
        if at >= range.end.0 {
            return None;
        }
        let (start, end) = (at, range.end.0.min((at / 64 + 1) * 64));
        at = end;
        Some((start / 64, (u64::MAX >> (64 - (end - start))) << (start % 64)))
    })
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Makes a rename or an unlink in `path`'s directory durable.
///
/// # Errors
/// When the system refuses.
pub fn sync_directory_of(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests;
