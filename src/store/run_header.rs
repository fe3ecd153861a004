//! The header page of a run table: whose it is, and of which boot.
//!
//! A run table is trusted only in the boot that made it: what is in the page cache outlives a process, not the machine.
//! Nothing here knows what the bits mean; all of it is checked before the bits are mapped.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::SeekFrom;
use uuid::Uuid;

use super::error::TableError;

/// The unit of a table's mapping.
pub(super) const PAGE_BYTES: usize = 4096;
/// Which 64-bit word of the header page has the flags: changed in place, so not part of the checksum.
pub(super) const FLAGS_WORD: usize = 8;
/// Flag: the table cannot be vouched for.
pub(super) const BROKEN: u64 = 1;

const MAGIC: [u8; 8] = *b"HSRUNTAB";
const FORMAT: u32 = 1;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What tells a run table from others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableName {
    /// Whose table it is.
    pub id: Uuid,
    /// The boot in which it was made.
    pub boot: Uuid,
}

impl TableName {
    /// The name of a table in this boot of the machine.
    ///
    /// # Errors
    /// When the kernel does not tell which boot it is.
    pub fn of_this_boot(id: Uuid) -> Result<TableName, TableError> {
        let error = |message: String| TableError::Io { path: BOOT_ID.into(), message };
        let text = std::fs::read_to_string(Path::new(BOOT_ID)).map_err(|e| error(e.to_string()))?;
        let boot = Uuid::try_parse(text.trim()).map_err(|e| error(e.to_string()))?;
        Ok(TableName { id, boot })
    }
}

/// What a table's header must say.
pub(super) struct RunHeader {
    pub(super) blocks: u64,
    pub(super) name: TableName,
}

impl RunHeader {
    /// The header page of a new table. Magic (8 bytes), format (u32), page size (u32), blocks (u64), id, boot (16 bytes
    /// each), CRC-32 of these 56 bytes, zeros; flags in word 8; zeros. Little-endian but for the flags.
    pub(super) fn page(&self) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        page[12..16].copy_from_slice(&4096u32.to_le_bytes());
        page[16..24].copy_from_slice(&self.blocks.to_le_bytes());
        page[24..40].copy_from_slice(self.name.id.as_bytes());
        page[40..56].copy_from_slice(self.name.boot.as_bytes());
        let crc = crc32fast::hash(&page[..56]);
        page[56..60].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// Whether a page that was found is this header, whatever known flags it has; if not, what does not fit.
    pub(super) fn check(&self, found: &[u8; PAGE_BYTES]) -> Result<(), &'static str> {
        let expected = self.page();
        let flags = FLAGS_WORD * 8..FLAGS_WORD * 8 + 8;
        let differs = |range: Range<usize>| found[range.clone()] != expected[range];
        if differs(0..8) {
            Err("it is no run table, or was never finished")
        } else if found[56..60] != crc32fast::hash(&found[..56]).to_le_bytes() {
            Err("the header does not match its checksum")
        } else if differs(8..16) {
            Err("it has a format that this program does not know")
        } else if blocks_of(found) < self.blocks {
            Err("it is for a disk of another size")
        } else if differs(24..40) {
            Err("it is another table")
        } else if differs(40..56) {
            Err("it is of another boot of the machine")
        } else if differs(60..flags.start) || differs(flags.end..PAGE_BYTES) {
            Err("the header has something where nothing should be")
        } else if u64::from_ne_bytes(found[flags].try_into().expect("eight bytes")) & !BROKEN != 0 {
            Err("it has flags that this program does not know")
        } else {
            Ok(())
        }
    }
}

/// For how many blocks the table has room.
fn blocks_of(page: &[u8; PAGE_BYTES]) -> u64 {
    u64::from_le_bytes(page[16..24].try_into().expect("eight bytes"))
}

/// What the header of a run table says beyond what it must.
pub(super) struct Found {
    /// How many pages of bits it has. A disk that was about to grow may have made room for more than it has blocks.
    pub(super) room_pages: usize,
    pub(super) is_broken: bool,
}

/// Whether a file is the run table with this header, and what it has.
pub(super) fn check(file: &File, path: &Path, header: &RunHeader) -> Result<Found, TableError> {
    let error = |e: io::Error| TableError::io(path, &e);
    let damaged = |what: &str| TableError::Damaged { path: path.to_owned(), what: what.to_owned() };
    let (meta, bytes) = (file.metadata().map_err(error)?, PAGE_BYTES as u64);
    if !meta.is_file() || meta.len() < 2 * bytes || !meta.len().is_multiple_of(bytes) {
        return Err(damaged("it does not have the size of such a table"));
    }
    let mut page = [0; PAGE_BYTES];
    file.read_exact_at(&mut page, 0).map_err(error)?;
    header.check(&page).map_err(damaged)?;
    let (pages, room) = (pages_for(blocks_of(&page)), meta.len() / bytes - 1);
    // It gets longer before its header says so.
    if room < pages {
        return Err(damaged("it does not have the size of such a table"));
    }
    let flags = u64::from_ne_bytes(page[FLAGS_WORD * 8..FLAGS_WORD * 8 + 8].try_into().expect("eight bytes"));
    let room_pages = usize::try_from(room).expect("tables fit the address space");
    Ok(Found { room_pages, is_broken: flags & BROKEN != 0 })
}

/// Says in the header of a run table in use that it has room for at least so many blocks. In one write, which no kill
/// divides; the flags behind it stay as they are.
pub(super) fn say_blocks(file: &File, path: &Path, blocks: u64) -> Result<(), TableError> {
    let error = |e: io::Error| TableError::io(path, &e);
    let mut start = [0; FLAGS_WORD * 8 - 4];
    file.read_exact_at(&mut start, 0).map_err(error)?;
    if u64::from_le_bytes(start[16..24].try_into().expect("eight bytes")) >= blocks {
        return Ok(());
    }
    start[16..24].copy_from_slice(&blocks.to_le_bytes());
    let crc = crc32fast::hash(&start[..56]);
    start[56..60].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&start, 0).map_err(error)
}

/// How many pages the bits of so many blocks take.
pub(super) fn pages_for(blocks: u64) -> u64 {
    blocks.div_ceil(PAGE_BYTES as u64 * 8).max(1)
}

/// The pages of bits that a run table's file has something in, by their numbers, in order.
pub(super) fn pages_with_data(file: &File, pages: usize) -> io::Result<Vec<Range<usize>>> {
    let page_of = |at: u64| usize::try_from(at / PAGE_BYTES as u64).expect("tables fit the address space");
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut at = PAGE_BYTES as u64;
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(found),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        // Extents may be finer than pages; a page is taken once.
        let first = (page_of(start) - 1).max(found.last().map_or(0, |r| r.end));
        let last = page_of(end.next_multiple_of(PAGE_BYTES as u64)) - 1;
        found.extend((first < last).then_some(first..last.min(pages)));
        at = end;
    }
}

/// What a run table has, found out without mapping it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunTableFacts {
    /// How many bits are set.
    pub ones: u64,
    /// Whether it says that it cannot be vouched for.
    pub is_broken: bool,
}

/// Looks at a run table without changing it, as [`super::Table::open`] would.
///
/// # Errors
/// As there.
pub fn examine_run_table(path: &Path, blocks: u64, name: TableName) -> Result<RunTableFacts, TableError> {
    let error = |e: io::Error| TableError::io(path, &e);
    let damaged = |what: &str| TableError::Damaged { path: path.to_owned(), what: what.to_owned() };
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).map_err(error)?;
    let found = check(&file, path, &RunHeader { blocks, name })?;
    let mut facts = RunTableFacts { ones: 0, is_broken: found.is_broken };
    let mut page = [0; PAGE_BYTES];
    for number in pages_with_data(&file, found.room_pages).map_err(error)?.into_iter().flatten() {
        file.read_exact_at(&mut page, (number as u64 + 1) * PAGE_BYTES as u64).map_err(error)?;
        for (word, bytes) in (number as u64 * 512..).zip(page.chunks_exact(8)) {
            let bits = u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
            let beyond = match blocks.saturating_sub(word * 64) {
                some @ 0..64 => bits >> some != 0,
                _ => false,
            };
            if beyond {
                return Err(damaged("it has bits of blocks that the disk does not have"));
            }
            facts.ones += u64::from(bits.count_ones());
        }
    }
    Ok(facts)
}
