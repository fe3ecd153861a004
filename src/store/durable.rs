//! The durable copy of a table, changed in place sector by sector: for tables that must be right after a power cut.
//!
//! What always holds:
//! - A sector of 512 bytes checks itself. What a crash leaves is each sector as it was or as it became; anything else
//!   (and any other table's sector) is found at load and reported, never taken for bits.
//! - A commit stores bits as they were before its `first` step, so what that step syncs is never behind its bits.
//! - A commit covers every change made before it was asked for. Those who ask while one runs share the next one.
//! - A commit that is refused, by a write or by its `first` step, is told to those who wait; the next one stores its changes.
//! - After a failed sync or an abandoned commit nothing is accepted any more: what is on the medium is unknown.
//!
//! What is not done here: to decide what damage means to the one whose table it is.

use std::future::poll_fn;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use uuid::Uuid;

use super::{BlockIndex, BlockRange, Table, TableError};
use crate::crash;
use crate::image::{
    AlignedBuf, ByteOffset, ImageError, ImageErrorKind, ImageOp, IoBuf, IoQueue, SharedImage, join_all, read_exact_at,
    sync, write_all_at,
};

/// What a crash may leave old or new as a whole.
const SECTOR_BYTES: usize = 512;
const SECTOR_WORDS: usize = 63;
/// Blocks whose bits are in one sector.
const SECTOR_BITS: u64 = SECTOR_WORDS as u64 * 64;

const MAGIC: [u8; 8] = *b"HSDTABLE";
const FORMAT: u32 = 1;
/// Not zero in many bits: a sector of no bits that was written differs from one that never was.
const TAG: u32 = 0x5ec7_0b17;
const PAYLOAD_AT: usize = 64;
/// What the owner of a table may keep in its header.
pub const PAYLOAD_BYTES: usize = 256;
/// The caller's own bytes in the header: all of them change in one step.
pub type Payload = [u8; PAYLOAD_BYTES];

const CRC_AT: usize = SECTOR_BYTES - 8;
const TAG_AT: usize = SECTOR_BYTES - 4;

/// Sectors that are read at once.
const READ_SECTORS: u64 = 2048;
/// Sectors that are held in memory to be written, and writes that are in flight together.
const BATCH_SECTORS: usize = 16 * 1024;
const WRITES_MAX: usize = 64;

/// What was found when a table was loaded.
#[derive(Debug)]
pub struct LoadReport {
    /// The caller's bytes of the header.
    pub payload: Payload,
    /// Blocks whose bits were not readable, in order: their sectors' checksums are wrong.
    pub damaged: Vec<BlockRange>,
}

/// A table and the image that has its durable copy.
pub struct DurableTable {
    image: SharedImage,
    id: Uuid,
    table: Arc<Table>,
    state: Mutex<State>,
    /// Whether a commit runs, or the next one has something to do beside changes of bits. Changed under the lock.
    is_unsettled: AtomicBool,
}

struct State {
    payload: Payload,
    header_changed: bool,
    /// Whether a process before this one may have written what it had not synced yet: reading it proves nothing.
    left_unsynced: bool,
    running: bool,
    /// Commits that have begun, and the last one that is done.
    begun: u64,
    done: u64,
    /// The last one that was refused, and why.
    refused: Option<(u64, ImageError)>,
    /// Why nobody can say what is on the medium.
    doubt: Option<ImageError>,
    waiting: Vec<Waker>,
}

enum CommitTurn {
    Lead,
    Done(Result<(), ImageError>),
}

impl DurableTable {
    /// How many bytes the image of a table for `blocks` blocks has.
    #[must_use]
    pub fn image_bytes(blocks: u64) -> u64 {
        (1 + blocks.div_ceil(SECTOR_BITS)) * SECTOR_BYTES as u64
    }

    /// The durable copy of `table` on a new image of [`DurableTable::image_bytes`] zeros. It is there, with the bits
    /// that the table has now, when this returns. From now on the table remembers what changes.
    ///
    /// # Errors
    /// When the image has another size or refuses.
    pub async fn create(
        image: SharedImage,
        id: Uuid,
        table: Arc<Table>,
        payload: Payload,
        queue: &IoQueue,
    ) -> Result<DurableTable, TableError> {
        check_size(&image, table.blocks())?;
        let path = image.path().to_owned();
        let durable = DurableTable::new(image, id, table, payload);
        durable.lock().header_changed = true;
        let mut at = BlockIndex(0);
        while let Some(block) = durable.table.next_set(at) {
            durable.table.note_change(BlockRange::one(block));
            at = BlockIndex((block.0 / SECTOR_BITS + 1) * SECTOR_BITS);
        }
        durable.commit(queue).await.map_err(|e| TableError::image(&path, &e))?;
        Ok(durable)
    }

    /// Fills the empty table `into` from its durable copy. What is damaged is reported and left unset.
    ///
    /// # Errors
    /// `Damaged` when the header is, or it is the copy of another table or for another number of blocks; `Io` when the
    /// image cannot be read.
    pub async fn load(
        image: SharedImage,
        id: Uuid,
        into: Arc<Table>,
        queue: &IoQueue,
    ) -> Result<(DurableTable, LoadReport), TableError> {
        let path = image.path().to_owned();
        let table = into.clone();
        let take = |sector: u64, words: Option<[u64; SECTOR_WORDS]>| -> std::io::Result<()> {
            for (word, bits) in (sector * SECTOR_WORDS as u64..).zip(words.into_iter().flatten()) {
                table.or_word(word, bits)?;
            }
            Ok(())
        };
        let report = scan(&image, id, into.blocks(), queue, take).await?;
        log::debug!("{}: {} bits", path.display(), into.count());
        Ok((DurableTable::new(image, id, into, report.payload), report))
    }

    /// Takes up the durable copy of a table whose bits are known better, because its run copy outlived a process. The
    /// next commit writes what differs, also over what is damaged.
    ///
    /// # Errors
    /// As for [`DurableTable::load`].
    pub async fn resume(
        image: SharedImage,
        id: Uuid,
        table: Arc<Table>,
        queue: &IoQueue,
    ) -> Result<(DurableTable, LoadReport), TableError> {
        let mut stale = Vec::new();
        let compare = |sector: u64, words: Option<[u64; SECTOR_WORDS]>| -> std::io::Result<()> {
            let is_stale = words != Some(words_of(&table, sector));
            stale.extend(is_stale.then_some(sector));
            Ok(())
        };
        let report = scan(&image, id, table.blocks(), queue, compare).await?;
        let durable = DurableTable::new(image, id, table, report.payload);
        for sector in stale {
            durable.table.note_change(BlockRange::one(BlockIndex(sector * SECTOR_BITS)));
        }
        Ok((durable, report))
    }

    fn new(image: SharedImage, id: Uuid, table: Arc<Table>, payload: Payload) -> DurableTable {
        table.track(SECTOR_BITS);
        let state = State {
            payload,
            header_changed: false,
            left_unsynced: true,
            running: false,
            begun: 0,
            done: 0,
            refused: None,
            doubt: None,
            waiting: Vec::new(),
        };
        DurableTable { image, id, table, state: Mutex::new(state), is_unsettled: AtomicBool::new(true) }
    }

    /// The table, to be read and changed.
    #[must_use]
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Sets every bit that is set in `from`, a table for as many blocks. The next commit stores them.
    ///
    /// # Errors
    /// When no page can be had. Some of the bits may be set then.
    pub fn take_in(&self, from: &Table) -> std::io::Result<()> {
        self.table.merge(from)
    }

    /// Where the durable copy is.
    #[must_use]
    pub fn image(&self) -> &SharedImage {
        &self.image
    }

    /// Changes the caller's bytes of the header; the next commit stores them, in no order with the bits.
    pub fn set_payload(&self, payload: Payload) {
        let mut state = self.lock();
        state.header_changed |= state.payload != payload;
        state.payload = payload;
        self.is_unsettled.store(true, Ordering::SeqCst);
    }

    /// Whether a commit that is asked for now would store anything, or share one that does.
    #[must_use]
    pub fn needs_commit(&self) -> bool {
        // In this order: a commit says that it runs before it takes the changes.
        self.table.has_changes() || self.is_unsettled.load(Ordering::SeqCst)
    }

    /// Makes every change that was made before this call durable.
    ///
    /// # Errors
    /// When the image refuses: all who wait for this commit get the error, and the next one stores its changes too. After a
    /// failed sync later ones get the error that nothing is accepted.
    pub async fn commit(&self, queue: &IoQueue) -> Result<(), ImageError> {
        self.commit_after(queue, async || Ok(())).await
    }

    /// As [`DurableTable::commit`], but runs `first` between looking at the bits and storing them: it makes durable what
    /// the bits point to. Of those who share a commit one runs its `first`, perhaps several times, so it must serve all.
    ///
    /// # Errors
    /// As for [`DurableTable::commit`]. An error of `first` is one of the commit.
    pub async fn commit_after(
        &self,
        queue: &IoQueue,
        first: impl AsyncFn() -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        // The one that begins after now covers all that was done until now.
        let wanted = {
            let state = self.lock();
            if let Some(earlier) = &state.doubt {
                return Err(self.refusal(&format!("an earlier commit failed: {earlier}")));
            }
            state.begun + 1
        };
        match poll_fn(|cx| self.poll_turn(wanted, cx.waker())).await {
            CommitTurn::Done(result) => return result,
            CommitTurn::Lead => {}
        }
        let mut leader = Leader { durable: self, result: None };
        let result = self.store_changes(queue, first).await;
        leader.result = Some(result.clone());
        drop(leader);
        result
    }

    fn poll_turn(&self, wanted: u64, waker: &Waker) -> Poll<CommitTurn> {
        let mut state = self.lock();
        if state.done >= wanted {
            return Poll::Ready(CommitTurn::Done(Ok(())));
        }
        let refused = state.refused.as_ref().filter(|(last, _)| *last >= wanted).map(|(_, error)| error);
        if let Some(error) = state.doubt.as_ref().or(refused) {
            return Poll::Ready(CommitTurn::Done(Err(error.clone())));
        }
        if state.running {
            if !state.waiting.iter().any(|w| w.will_wake(waker)) {
                state.waiting.push(waker.clone());
            }
            return Poll::Pending;
        }
        state.running = true;
        state.begun += 1;
        self.is_unsettled.store(true, Ordering::SeqCst);
        Poll::Ready(CommitTurn::Lead)
    }

    async fn store_changes(
        &self,
        queue: &IoQueue,
        first: impl AsyncFn() -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let (header, left_unsynced) = {
            let mut state = self.lock();
            (std::mem::take(&mut state.header_changed).then_some(state.payload), state.left_unsynced)
        };
        let mut taken = Vec::new();
        let result = self.run(queue, first, header, left_unsynced, &mut taken).await;
        if result.is_err() {
            // Also what was written already: nothing of it is synced.
            self.lock().header_changed |= header.is_some();
            taken.into_iter().for_each(|sector| self.table.note_change(blocks_of(sector, self.table.blocks())));
        }
        result
    }

    /// Adds the sectors whose changes it takes to `taken`.
    async fn run(
        &self,
        queue: &IoQueue,
        first: impl AsyncFn() -> Result<(), ImageError>,
        header: Option<Payload>,
        left_unsynced: bool,
        taken: &mut Vec<u64>,
    ) -> Result<(), ImageError> {
        let (mut from, mut wrote) = (0, false);
        self.table.begin_to_take();
        loop {
            let sectors = self.table.take_changes(&mut from, BATCH_SECTORS);
            taken.extend_from_slice(&sectors);
            let runs = sectors.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], self.encode_run(run)));
            let runs: Vec<(u64, AlignedBuf)> = runs.collect();
            if wrote && runs.is_empty() {
                break;
            }
            first().await?;
            if runs.is_empty() {
                break;
            }
            wrote = true;
            crash::point("before a durable table is written");
            self.write_runs(queue, runs).await?;
        }
        if let Some(payload) = header {
            let sector = encode_header(self.id, self.table.blocks(), &payload);
            self.write(queue, ByteOffset(0), owned(&sector)).await?;
            wrote = true;
        }
        if wrote || left_unsynced {
            crash::point("before a durable table is synced");
            sync(&*self.image, queue).await?;
            crash::point("after a durable table was synced");
            self.lock().left_unsynced = false;
        }
        Ok(())
    }

    /// The sectors of a run as they are now.
    fn encode_run(&self, sectors: &[u64]) -> AlignedBuf {
        let mut bytes = AlignedBuf::zeroed(sectors.len() * SECTOR_BYTES);
        for (&sector, out) in sectors.iter().zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            encode_sector(self.id, sector, &words_of(&self.table, sector), out);
        }
        bytes
    }

    async fn write_runs(&self, queue: &IoQueue, runs: Vec<(u64, AlignedBuf)>) -> Result<(), ImageError> {
        let mut runs = runs.into_iter();
        loop {
            let some = runs.by_ref().take(WRITES_MAX);
            let writes: Vec<_> = some.map(|(sector, bytes)| self.write(queue, place_of(sector), bytes)).collect();
            if writes.is_empty() {
                return Ok(());
            }
            join_all(writes).await.into_iter().collect::<Result<(), ImageError>>()?;
        }
    }

    async fn write(&self, queue: &IoQueue, at: ByteOffset, bytes: AlignedBuf) -> Result<(), ImageError> {
        write_all_at(&*self.image, queue, at, IoBuf::Owned(bytes), false).await
    }

    fn refusal(&self, why: &str) -> ImageError {
        let message = format!("what is on the medium is unknown; check the storage, then restart ({why})");
        ImageError::new(ImageErrorKind::Poisoned, ImageOp::Sync, self.image.path(), message)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one who carries a commit out. Whatever becomes of it, those who wait go on.
struct Leader<'a> {
    durable: &'a DurableTable,
    /// None when it was dropped on its way: what it began may still reach the medium, after anything begun later.
    result: Option<Result<(), ImageError>>,
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        let mut state = self.durable.lock();
        state.running = false;
        match self.result.take() {
            Some(Ok(())) => state.done = state.begun,
            // A failed sync poisons the image.
            Some(Err(error)) if self.durable.image.is_poisoned() => state.doubt = Some(error),
            Some(Err(error)) => {
                log::warn!(
                    "{}: a commit was refused, the next one tries again: {error}",
                    self.durable.image.path().display()
                );
                state.refused = Some((state.begun, error));
            }
            None => state.doubt = Some(self.durable.refusal("a commit was abandoned")),
        }
        if let Some(error) = &state.doubt {
            log::error!("{}: a commit failed, none is accepted any more: {error}", self.durable.image.path().display());
        }
        // Also while what was refused is not stored: who looks between two lines here must not find it settled.
        let is_stored = state.doubt.is_none() && state.done == state.begun;
        let is_settled = is_stored && !state.header_changed && !state.left_unsynced;
        self.durable.is_unsettled.store(!is_settled, Ordering::SeqCst);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl std::fmt::Debug for DurableTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DurableTable({} at {})", self.id, self.image.path().display())
    }
}

/// Reads a durable copy: the payload of its header, each sector's words to `take` (None for damaged ones).
async fn scan(
    image: &SharedImage,
    id: Uuid,
    blocks: u64,
    queue: &IoQueue,
    mut take: impl FnMut(u64, Option<[u64; SECTOR_WORDS]>) -> std::io::Result<()>,
) -> Result<LoadReport, TableError> {
    check_size(image, blocks)?;
    let sectors = blocks.div_ceil(SECTOR_BITS);
    let header = read(image, queue, ByteOffset(0), 1).await?;
    let payload = decode_header(id, blocks, &header).map_err(|what| damaged(image.path(), what))?;
    let mut report = LoadReport { payload, damaged: Vec::new() };
    for first in (0..sectors).step_by(usize::try_from(READ_SECTORS).expect("small")) {
        let bytes = read(image, queue, place_of(first), (sectors - first).min(READ_SECTORS)).await?;
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
            let range = blocks_of(sector, blocks);
            let words = decode_sector(id, sector, range.count(), bytes);
            if words.is_none() {
                match report.damaged.last_mut() {
                    Some(before) if before.end == range.start => before.end = range.end,
                    _ => report.damaged.push(range),
                }
            }
            take(sector, words).map_err(|e| TableError::io(image.path(), &e))?;
        }
    }
    Ok(report)
}

async fn read(image: &SharedImage, queue: &IoQueue, at: ByteOffset, sectors: u64) -> Result<AlignedBuf, TableError> {
    let len = usize::try_from(sectors).expect("a chunk fits in memory") * SECTOR_BYTES;
    let into = IoBuf::Owned(AlignedBuf::zeroed(len));
    match read_exact_at(&**image, queue, at, into).await {
        Ok(IoBuf::Owned(bytes)) => Ok(bytes),
        Ok(_) => unreachable!("a transfer gives back the buffer it was given"),
        Err(e) => Err(TableError::image(image.path(), &e)),
    }
}

fn words_of(table: &Table, sector: u64) -> [u64; SECTOR_WORDS] {
    let first = sector * SECTOR_WORDS as u64;
    std::array::from_fn(|word| table.word_at(first + word as u64))
}

fn place_of(sector: u64) -> ByteOffset {
    ByteOffset((1 + sector) * SECTOR_BYTES as u64)
}

fn blocks_of(sector: u64, blocks: u64) -> BlockRange {
    let start = sector * SECTOR_BITS;
    BlockRange { start: BlockIndex(start), end: BlockIndex((start + SECTOR_BITS).min(blocks)) }
}

/// Puts checksum and tag behind a sector's content. `number` is the place of the sector in the image.
fn seal(id: Uuid, number: u64, sector: &mut [u8]) {
    let crc = checksum(id, number, &sector[..CRC_AT]);
    sector[CRC_AT..TAG_AT].copy_from_slice(&crc.to_le_bytes());
    sector[TAG_AT..].copy_from_slice(&TAG.to_le_bytes());
}

fn is_sealed(id: Uuid, number: u64, sector: &[u8]) -> bool {
    sector[CRC_AT..TAG_AT] == checksum(id, number, &sector[..CRC_AT]).to_le_bytes()
        && sector[TAG_AT..] == TAG.to_le_bytes()
}

fn checksum(id: Uuid, number: u64, content: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&number.to_le_bytes());
    crc.update(id.as_bytes());
    crc.update(content);
    crc.finalize()
}

fn encode_sector(id: Uuid, sector: u64, words: &[u64; SECTOR_WORDS], out: &mut [u8]) {
    for (word, out) in words.iter().zip(out.chunks_exact_mut(8)) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    seal(id, sector + 1, out);
}

/// The words of a sector for `bits` blocks, or None if it is not one of this table at this place.
fn decode_sector(id: Uuid, sector: u64, bits: u64, bytes: &[u8]) -> Option<[u64; SECTOR_WORDS]> {
    if *bytes == [0; SECTOR_BYTES] {
        return Some([0; SECTOR_WORDS]);
    }
    if !is_sealed(id, sector + 1, bytes) {
        return None;
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"));
    let words: [u64; SECTOR_WORDS] = std::array::from_fn(word);
    let fits = (0u64..).step_by(64).zip(words).all(|(first, word)| match bits.saturating_sub(first) {
        0 => word == 0,
        some @ 1..64 => word >> some == 0,
        _ => true,
    });
    fits.then_some(words)
}

/// Magic (8 bytes), format (u32), sector size (u32), blocks (u64), id (16 bytes), zeros, payload from byte 64 on, zeros,
/// checksum and tag. Little-endian.
fn encode_header(id: Uuid, blocks: u64, payload: &Payload) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    sector[..8].copy_from_slice(&MAGIC);
    sector[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    sector[12..16].copy_from_slice(&512u32.to_le_bytes());
    sector[16..24].copy_from_slice(&blocks.to_le_bytes());
    sector[24..40].copy_from_slice(id.as_bytes());
    sector[PAYLOAD_AT..PAYLOAD_AT + PAYLOAD_BYTES].copy_from_slice(payload);
    seal(id, 0, &mut sector);
    sector
}

fn decode_header(id: Uuid, blocks: u64, found: &[u8]) -> Result<Payload, &'static str> {
    let payload = found[PAYLOAD_AT..PAYLOAD_AT + PAYLOAD_BYTES].try_into().expect("that many bytes");
    let expected = encode_header(id, blocks, &payload);
    let id_found = Uuid::from_slice(&found[24..40]).expect("sixteen bytes");
    if !is_sealed(id_found, 0, found) || found[..8] != expected[..8] {
        Err("the header does not match its checksum")
    } else if found[8..16] != expected[8..16] {
        Err("it has a format that this program does not know")
    } else if found[24..40] != expected[24..40] {
        Err("it is another table")
    } else if found != expected {
        Err("it is for another number of blocks")
    } else {
        Ok(payload)
    }
}

fn owned(bytes: &[u8]) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(bytes.len());
    buf.copy_from_slice(bytes);
    buf
}

fn check_size(image: &SharedImage, blocks: u64) -> Result<(), TableError> {
    if image.size_bytes() == DurableTable::image_bytes(blocks) {
        Ok(())
    } else {
        Err(damaged(image.path(), "it does not have the size of such a table"))
    }
}

fn damaged(path: &Path, what: &str) -> TableError {
    TableError::Damaged { path: path.to_owned(), what: what.to_owned() }
}

#[cfg(test)]
#[path = "durable_tests.rs"]
mod tests;
