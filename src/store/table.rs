//! A table: one bit a block.
//!
//! In memory it is a mapping, of a file in the run directory or of nothing. Pages are taken on first use, so a table
//! of a 16 TiB disk costs what is written, not what could be. A page is faulted in with a system call that can
//! fail ([`Table::prepare`]) before a bit in it is first set: a full run directory is an error, not a SIGBUS.
//!
//! The durable copy is the list of its non-empty pages, each with a checksum. It has a seal, which the records keep: a
//! whole copy from another time or of another table would show wrong bytes, so it is not believed.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

use uuid::Uuid;

use super::{BlockIndex, BlockRange};

const PAGE_BYTES: usize = 4096;
const PAGE_BITS: u64 = PAGE_BYTES as u64 * 8;
const PAGE_WORDS: usize = PAGE_BYTES / 8;

const MAGIC: [u8; 8] = *b"HSTABLE1";
/// Durable copy: magic, blocks (u64 LE), pages (u64 LE), seal (16 bytes), CRC-32 of the 40 bytes before it (u32 LE).
const HEADER_BYTES: usize = 44;

/// A table could not be made, loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The system refused.
    #[error("table {}: {message}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        message: String,
    },
    /// The durable copy is not what was saved.
    #[error("table {} is damaged: {what}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
}

/// One bit a block, shared by all workers.
pub struct Table {
    base: NonNull<AtomicU64>,
    pages: usize,
    blocks: u64,
    // One bit a page: has it been faulted in? Pages that have not are all zeros and are not touched.
    present: Box<[AtomicU64]>,
    ones: AtomicU64,
}

// SAFETY: the mapping is owned by the table and accessed only through atomics.
unsafe impl Send for Table {}
// SAFETY: as for Send.
unsafe impl Sync for Table {}

impl Table {
    /// An empty table for `blocks` blocks, in memory only.
    ///
    /// # Errors
    /// When address space runs out.
    pub fn in_memory(blocks: u64) -> Result<Table, TableError> {
        let len = Self::mapping_bytes(blocks);
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let raw = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        Self::from_mapping(raw.map_err(|e| io_error(Path::new("(memory)"), &e.into()))?, blocks)
    }

    /// An empty table for `blocks` blocks, mapped from a new file at `path` (mode 0600; an old one is replaced).
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path, blocks: u64) -> Result<Table, TableError> {
        let error = |e: io::Error| io_error(path, &e);
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error(e)),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(error)?;
        let len = Self::mapping_bytes(blocks);
        file.set_len(len as u64).map_err(error)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice, of a file just made with that length.
        // The run directory is ours alone (mode 0700), so nobody shortens the file.
        let raw = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        };
        Self::from_mapping(raw.map_err(|e| error(e.into()))?, blocks)
    }

    fn mapping_bytes(blocks: u64) -> usize {
        usize::try_from(blocks.div_ceil(PAGE_BITS).max(1)).expect("tables fit the address space") * PAGE_BYTES
    }

    fn from_mapping(raw: *mut std::ffi::c_void, blocks: u64) -> Result<Table, TableError> {
        let pages = Self::mapping_bytes(blocks) / PAGE_BYTES;
        Ok(Table {
            base: NonNull::new(raw.cast()).expect("mmap never returns null"),
            pages,
            blocks,
            present: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            ones: AtomicU64::new(0),
        })
    }

    /// How many blocks the table is for.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// How many bits are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.ones.load(Ordering::Relaxed)
    }

    /// Whether the block's bit is set.
    #[must_use]
    pub fn get(&self, block: BlockIndex) -> bool {
        let (page, word, bit) = Self::place(block);
        self.is_present(page) && self.word(page, word).load(Ordering::SeqCst) & bit != 0
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
        for page in first..=last {
            if self.is_present(page) {
                continue;
            }
            let address = self.base.as_ptr().wrapping_add(page * PAGE_WORDS);
            // SAFETY: the page lies inside the mapping that self owns; populating changes no content.
            unsafe { rustix::mm::madvise(address.cast(), PAGE_BYTES, rustix::mm::Advice::LinuxPopulateWrite) }
                .map_err(|e| if e == rustix::io::Errno::FAULT { rustix::io::Errno::NOSPC } else { e })?;
            self.present[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
        Ok(())
    }

    /// Sets the bits of `range`, which must have been prepared.
    ///
    /// # Panics
    /// When it was not.
    pub fn set(&self, range: BlockRange) {
        for block in range.iter() {
            let (page, word, bit) = Self::place(block);
            assert!(self.is_present(page), "bits are set only after Table::prepare");
            if self.word(page, word).fetch_or(bit, Ordering::SeqCst) & bit == 0 {
                self.ones.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Clears the bits of `range`.
    pub fn clear(&self, range: BlockRange) {
        for block in range.iter() {
            let (page, word, bit) = Self::place(block);
            if self.is_present(page) && self.word(page, word).fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
                self.ones.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// The first block at or after `from` whose bit is set.
    #[must_use]
    pub fn next_set(&self, from: BlockIndex) -> Option<BlockIndex> {
        let mut at = from.0;
        while at < self.blocks {
            let (page, word, bit) = Self::place(BlockIndex(at));
            if !self.is_present(page) {
                at = (page as u64 + 1) * PAGE_BITS;
                continue;
            }
            // Bits below `at` in its word are not asked for.
            let rest = self.word(page, word).load(Ordering::SeqCst) & !(bit - 1);
            if rest != 0 {
                let found = at / 64 * 64 + u64::from(rest.trailing_zeros());
                return (found < self.blocks).then_some(BlockIndex(found));
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Writes a durable copy to `path`: complete, synced and renamed into place, or an error. Returns its seal, which
    /// no other copy has.
    ///
    /// Nobody may change the table meanwhile, or the copy holds some of the changes.
    ///
    /// # Errors
    /// When the copy cannot be made durable.
    pub fn save(&self, path: &Path) -> Result<Uuid, TableError> {
        let seal = Uuid::new_v4();
        let error = |e: io::Error| io_error(path, &e);
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
        let pages: Vec<usize> = (0..self.pages).filter(|&p| self.is_present(p)).collect();
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&self.blocks.to_le_bytes());
        header.extend_from_slice(&(pages.len() as u64).to_le_bytes());
        header.extend_from_slice(seal.as_bytes());
        header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
        out.write_all(&header).map_err(error)?;
        for page in pages {
            // The page's number goes first and is part of its checksum: a page in the wrong place is found.
            let mut bytes = Vec::with_capacity(8 + PAGE_BYTES + 4);
            bytes.extend_from_slice(&(page as u64).to_le_bytes());
            for word in 0..PAGE_WORDS {
                bytes.extend_from_slice(&self.word(page, word).load(Ordering::SeqCst).to_le_bytes());
            }
            bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
            out.write_all(&bytes).map_err(error)?;
        }
        let file = out.into_inner().map_err(|e| error(e.into_error()))?;
        file.sync_all().map_err(error)?;
        std::fs::rename(&beside, path).map_err(error)?;
        sync_directory_of(path).map_err(error)?;
        Ok(seal)
    }

    /// Fills this empty table from the durable copy with this seal.
    ///
    /// # Errors
    /// When the copy is missing, damaged, another one, or for another number of blocks.
    pub fn load(&self, path: &Path, seal: Uuid) -> Result<(), TableError> {
        let error = |e: io::Error| io_error(path, &e);
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
        if u64_at(body, 8) != self.blocks {
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
            let page = usize::try_from(u64_at(body, 0)).ok().filter(|&p| p < self.pages);
            let page = page.ok_or_else(|| damaged("a page lies outside the table"))?;
            let start = page as u64 * PAGE_BITS;
            let blocks = BlockRange { start: BlockIndex(start), end: BlockIndex(start + 1) };
            self.prepare(blocks).map_err(error)?;
            for word in 0..PAGE_WORDS {
                let value = u64_at(body, 8 + word * 8);
                let old = self.word(page, word).swap(value, Ordering::SeqCst);
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

    fn is_present(&self, page: usize) -> bool {
        self.present[page / 64].load(Ordering::SeqCst) & (1 << (page % 64)) != 0
    }

    fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages && word < PAGE_WORDS);
        // SAFETY: the index is inside the mapping, which self owns and which is aligned to a page.
        unsafe { self.base.add(page * PAGE_WORDS + word).as_ref() }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrowed from self is left.
        if let Err(e) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.pages * PAGE_BYTES) } {
            log::error!("cannot unmap a table: {e}");
        }
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({} of {} blocks)", self.count(), self.blocks)
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn io_error(path: &Path, e: &io::Error) -> TableError {
    TableError::Io { path: path.to_owned(), message: e.to_string() }
}

/// Makes a rename or an unlink in `path`'s directory durable.
fn sync_directory_of(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
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
        table.clear(range(PAGE_BITS - 2, PAGE_BITS));
        assert_eq!(table.next_set(BlockIndex(0)), Some(BlockIndex(PAGE_BITS)));
        assert!(!table.get(BlockIndex(2 * PAGE_BITS + 1)), "an absent page reads as zeros");
    }

    #[test]
    fn a_saved_table_comes_back_and_every_flipped_bit_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let table = Table::create(&dir.path().join("run"), 100_000).unwrap();
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
    fn a_table_of_a_huge_disk_costs_what_is_used() {
        let table = Table::in_memory(1 << 32).unwrap(); // 16 TiB of 4 KiB blocks
        table.prepare(range(1 << 31, (1 << 31) + 1)).unwrap();
        table.set(range(1 << 31, (1 << 31) + 1));
        assert_eq!(table.next_set(BlockIndex(0)), Some(BlockIndex(1 << 31)));
        let present: u32 = table.present.iter().map(|w| w.load(Ordering::Relaxed).count_ones()).sum();
        assert_eq!(present, 1);
    }
}
