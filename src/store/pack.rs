//! A pack: blocks of a disk, one after the other in the order in which they were written (source 002 [0075], [0093]: the
//! lookup table with pointers). Seen from outside it is bytes at positions, zeros where nothing was written.
//!
//! What always holds:
//! - Blocks that are written at the same time go there together, with a header that names them. A block never changes where
//!   it is: it is written anew elsewhere, and readers see the one or the other.
//! - What a kill or a power cut leaves of a write is all of its blocks of one header, or none. What was synced is there.
//! - Where a block is is memory, made from the headers when the pack is taken up ([`replay`]); its size goes by what was
//!   written, not by the disk's.
//!
//! What is not done here: to say which blocks count. That is a table's, as with any image.

mod format;
mod free;
mod gather;
mod places;
mod replay;

use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use self::format::{Identity, Place, UNIT_BYTES};
use self::free::Units;
use self::gather::{Bytes, Gathered};
use self::places::{Doubt, Places, Syncing};
use self::replay::replay;
use super::TableError;
use crate::image::{
    AlignedBuf, ByteOffset, GuestBuf, ImageError, ImageErrorKind, ImageOp, IoBuf, IoQueue, SharedImage, join_all,
    needs_sync, read_exact_at, release_range, sync, write_all_at, zero_range,
};

const UNIT: u64 = UNIT_BYTES as u64;

/// What is known of how a pack was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Believed {
    /// All of it is there, and nothing was under way: what is not whole is damaged.
    Saved,
    /// What had arrived is there: the machine has not stopped since.
    Arrived,
    /// What was synced is there.
    Synced,
}

/// What somebody who only looked knows of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PackFacts {
    /// How many writes are not believed, because not all of them had arrived: their blocks show what was there before.
    pub torn: usize,
}

/// See the file's header.
pub struct Pack {
    image: SharedImage,
    identity: Identity,
    places: Mutex<Places>,
    gathered: Gathered,
}

impl Identity {
    fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.block_bytes))
    }

    /// Units that the bytes of a block take.
    fn block_units(&self) -> u32 {
        self.block_bytes / 4096
    }
}

/// How many units a pack has: enough for each block with a header of its own, and for what is not free yet. None if places
/// have no room for so many.
fn units_of(size_bytes: u64, block_bytes: u32) -> Option<u32> {
    if block_bytes == 0 || !(block_bytes as usize).is_multiple_of(UNIT_BYTES) {
        return None;
    }
    let blocks = size_bytes.div_ceil(u64::from(block_bytes));
    let block_units = u64::from(block_bytes) / UNIT;
    let live = blocks.checked_mul(block_units + 1)?;
    u32::try_from(1 + live + (live / 8).clamp(1024, 1 << 20)).ok()
}

impl Pack {
    /// What its image's transfers are multiples of.
    pub const UNIT_BYTES: u32 = 4096;

    /// How many bytes the image of a pack for such a disk has; most of them are never written. None if there cannot be one.
    #[must_use]
    pub fn image_bytes(size_bytes: u64, block_bytes: u32) -> Option<u64> {
        units_of(size_bytes, block_bytes).map(|units| u64::from(units) * UNIT)
    }

    /// An empty pack on a new image of [`Pack::image_bytes`] zeros, which is there when this returns. `key` is random, and
    /// nobody is told.
    ///
    /// # Errors
    /// When the image has another size or refuses.
    pub async fn create(
        image: SharedImage,
        (id, key): (Uuid, Uuid),
        (size_bytes, block_bytes): (u64, u32),
        queue: &IoQueue,
    ) -> Result<Pack, TableError> {
        let path = image.path().to_owned();
        let units = units_of(size_bytes, block_bytes).filter(|&u| u64::from(u) * UNIT == image.size_bytes());
        let Some(units) = units else {
            return Err(TableError::Damaged { path, what: "it does not have the size of such a pack".to_owned() });
        };
        let identity = Identity { id, key, size_bytes, block_bytes };
        let mut first = AlignedBuf::zeroed(UNIT_BYTES);
        identity.encode(&mut first);
        let written = write_all_at(&*image, queue, ByteOffset(0), IoBuf::Owned(first), false).await;
        written.map_err(|e| TableError::image(&path, &e))?;
        sync(&*image, queue).await.map_err(|e| TableError::image(&path, &e))?;
        let blocks = u32::try_from(identity.blocks()).expect("fewer than units");
        Ok(Pack::with(image, identity, Places::new(identity.block_units(), blocks, units)))
    }

    /// Takes a pack up, as it was left, with `memory_bytes_max` bytes of memory at most.
    ///
    /// # Errors
    /// `Damaged` when it is not whole, or the pack of something else; `Io` when the image refuses, or so much memory is not
    /// enough for what was written to it.
    pub async fn open(
        image: SharedImage,
        id: Uuid,
        (size_bytes, block_bytes): (u64, u32),
        believed: Believed,
        memory_bytes_max: u64,
        queue: &IoQueue,
    ) -> Result<Pack, TableError> {
        let path = image.path().to_owned();
        let mut found = replay(&image, believed, memory_bytes_max, queue).await?;
        check_identity(&image, &found.identity, id, (size_bytes, block_bytes))?;
        // Later headers will say that everything up to them had arrived, and what is left of a torn one may become whole by
        // what is left of another one in its place.
        for &torn in &found.torn {
            let done = zero_range(&*image, queue, position(torn), UNIT, false).await;
            done.map_err(|e| TableError::image(&path, &e))?;
        }
        if !found.torn.is_empty() {
            log::info!("{}: {} writes had not arrived", path.display(), found.torn.len());
        }
        sync(&*image, queue).await.map_err(|e| TableError::image(&path, &e))?;
        found.places.was_synced();
        log::debug!("{}: {} blocks", path.display(), found.places.count());
        Ok(Pack::with(image, found.identity, found.places))
    }

    /// Looks at a pack as [`Pack::open`] would, and changes nothing.
    ///
    /// # Errors
    /// As for [`Pack::open`].
    pub async fn examine(
        image: SharedImage,
        id: Uuid,
        shape: (u64, u32),
        believed: Believed,
        memory_bytes_max: u64,
        queue: &IoQueue,
    ) -> Result<PackFacts, TableError> {
        let found = replay(&image, believed, memory_bytes_max, queue).await?;
        check_identity(&image, &found.identity, id, shape)?;
        Ok(PackFacts { torn: found.torn.len() })
    }

    /// Whether an image is a pack in which nothing was written, whatever it is the pack of.
    ///
    /// # Errors
    /// When the image refuses.
    pub async fn is_unwritten(image: SharedImage, queue: &IoQueue) -> Result<bool, TableError> {
        replay::is_unwritten(&image, queue).await
    }

    fn with(image: SharedImage, identity: Identity, places: Places) -> Pack {
        Pack { image, identity, places: Mutex::new(places), gathered: Gathered::of(identity.block_bytes) }
    }

    /// Where its bytes are.
    #[must_use]
    pub fn image(&self) -> &SharedImage {
        &self.image
    }

    /// The size of the disk whose blocks it has.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.identity.size_bytes
    }

    /// What is written at once: whole blocks. The disk's last one may be short.
    #[must_use]
    pub fn block_bytes(&self) -> u32 {
        self.identity.block_bytes
    }

    /// How many of the `len` bytes from `at` on are zeros because nothing else was written.
    #[must_use]
    pub fn known_zeros(&self, at: ByteOffset, len: u64) -> u64 {
        let places = self.lock();
        let block_bytes = u64::from(self.identity.block_bytes);
        let first_data =
            (at.0 / block_bytes..(at.0 + len).div_ceil(block_bytes)).find(|&b| places.place_of(b).is_some());
        first_data.map_or(len, |block| (block * block_bytes).saturating_sub(at.0))
    }

    /// Fills `buf` from `at` on. Gives the buffer back.
    ///
    /// # Errors
    /// When the image refuses.
    pub async fn read(&self, queue: &IoQueue, at: ByteOffset, buf: IoBuf) -> Result<IoBuf, ImageError> {
        match buf {
            IoBuf::Guest(guest) if !self.takes_guest(at, &guest) => {
                let len = guest.len() as u64;
                // Before it is known where the bytes are: who has a share may wait for a place that a read is at.
                let _share = if guest.is_owned() { None } else { Some(queue.copies().take(len + 2 * UNIT).await) };
                let copy = self.read_placed(queue, at, IoBuf::Owned(AlignedBuf::scratch(guest.len()))).await?;
                if let IoBuf::Owned(copy) = copy {
                    guest.copy_in(&copy);
                    copy.recycle();
                }
                Ok(IoBuf::Guest(guest))
            }
            buf => self.read_placed(queue, at, buf).await,
        }
    }

    /// As [`Pack::read`], into our own memory, or that of a guest which the image takes.
    async fn read_placed(&self, queue: &IoQueue, at: ByteOffset, buf: IoBuf) -> Result<IoBuf, ImageError> {
        let (reading, pieces) = self.places_of(at, buf.len());
        let buf = match (&pieces[..], buf) {
            ([Piece { place: Some(from), len, .. }], buf)
                if matches!(buf, IoBuf::Guest(_)) || self.takes(*from, *len) =>
            {
                read_exact_at(&*self.image, queue, *from, buf).await?
            }
            (_, IoBuf::Guest(guest)) => {
                self.read_pieces(queue, &pieces, &guest).await?;
                IoBuf::Guest(guest)
            }
            (_, IoBuf::Owned(mut owned)) => {
                let reads = pieces.iter().filter_map(|piece| Some((piece, piece.place?)));
                let reads = reads.map(|(piece, from)| async move {
                    // The image may move whole units only. Blocks are whole units.
                    let (first, end) = (from.0 / UNIT, (from.0 + piece.len as u64).div_ceil(UNIT));
                    let len = usize::try_from((end - first) * UNIT).expect("a buffer and two units");
                    let into = IoBuf::Owned(AlignedBuf::scratch(len));
                    let done = read_exact_at(&*self.image, queue, ByteOffset(first * UNIT), into).await?;
                    Ok((piece, usize::try_from(from.0 - first * UNIT).expect("less than a unit"), done))
                });
                let reads: Vec<_> = reads.collect();
                pieces.iter().filter(|piece| piece.place.is_none()).for_each(|p| owned[p.at..p.at + p.len].fill(0));
                for done in join_all(reads).await {
                    let (piece, skip, IoBuf::Owned(bytes)) = done? else {
                        unreachable!("a transfer gives back the buffer it was given")
                    };
                    owned[piece.at..piece.at + piece.len].copy_from_slice(&bytes[skip..skip + piece.len]);
                    bytes.recycle();
                }
                IoBuf::Owned(owned)
            }
            (_, other) => other,
        };
        drop(reading);
        Ok(buf)
    }

    /// Whether the image reads these bytes into a guest's memory without a copy, wherever their blocks are.
    fn takes_guest(&self, at: ByteOffset, guest: &GuestBuf) -> bool {
        let alignment = self.image.alignment();
        self.takes(at, guest.len()) && guest.is_aligned(alignment.memory_bytes, alignment.offset_bytes)
    }

    /// Whether the image moves these bytes without those around them.
    fn takes(&self, at: ByteOffset, len: usize) -> bool {
        let unit = u64::from(self.image.alignment().offset_bytes);
        at.0.is_multiple_of(unit) && (len as u64).is_multiple_of(unit)
    }

    async fn read_pieces(&self, queue: &IoQueue, pieces: &[Piece], guest: &GuestBuf) -> Result<(), ImageError> {
        let mut reads = Vec::new();
        for piece in pieces {
            let into = guest.slice(piece.at..piece.at + piece.len);
            match piece.place {
                Some(from) => reads.push(read_exact_at(&*self.image, queue, from, IoBuf::Guest(into))),
                None => into.copy_in(&AlignedBuf::zeroed(piece.len)),
            }
        }
        join_all(reads).await.into_iter().try_for_each(|done| done.map(drop))
    }

    /// Where bytes are now: neighbours together. They stay there until the first part of the answer goes.
    fn places_of(&self, at: ByteOffset, len: usize) -> (Reading<'_>, Vec<Piece>) {
        let block_bytes = u64::from(self.identity.block_bytes);
        let mut pieces: Vec<Piece> = Vec::with_capacity(1);
        let mut places = self.lock();
        let (mut done, len64) = (0, len as u64);
        while done < len64 {
            let (block, skip) = ((at.0 + done) / block_bytes, (at.0 + done) % block_bytes);
            let part = (block_bytes - skip).min(len64 - done);
            let place = places.place_of(block).map(|place| position(place).add(skip));
            let joins = pieces.last().is_some_and(|last| match (last.place, place) {
                (None, None) => true,
                (Some(last_at), Some(place)) => last_at.add(last.len as u64) == place,
                _ => false,
            });
            let part_len = usize::try_from(part).expect("a part of a block");
            match pieces.last_mut() {
                Some(last) if joins => last.len += part_len,
                _ => pieces.push(Piece { at: usize::try_from(done).expect("within a buffer"), len: part_len, place }),
            }
            done += part;
        }
        let generation = places.begin_read();
        (Reading { pack: self, generation }, pieces)
    }

    /// Stores all of `buf`, whole blocks; with `durable`, on stable storage.
    ///
    /// # Errors
    /// When the image refuses, or has no room.
    pub async fn write(&self, queue: &IoQueue, at: ByteOffset, buf: IoBuf, durable: bool) -> Result<(), ImageError> {
        let first = self.first_block(at, buf.len() as u64, ImageOp::Write)?;
        let parts = Bytes::split(buf, self.identity.block_bytes as usize, self.gathered.blocks_max());
        let writes = parts.into_iter().map(|(skip, bytes)| self.put(queue, first + skip, bytes));
        join_all(writes).await.into_iter().collect::<Result<(), _>>()?;
        if durable { self.sync(queue).await } else { Ok(()) }
    }

    /// Makes whole blocks zero. They take no room, and those of which nothing was written need nothing.
    ///
    /// # Errors
    /// When the image refuses.
    pub async fn zero(&self, queue: &IoQueue, at: ByteOffset, len: u64) -> Result<(), ImageError> {
        let first = self.first_block(at, len, ImageOp::Zero)?;
        let end = first + len.div_ceil(u64::from(self.identity.block_bytes));
        let known: Vec<u64> = {
            let places = self.lock();
            (first..end).filter(|&block| !places.is_zeros(block)).collect()
        };
        let most = self.gathered.blocks_max();
        let runs = known.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(most));
        let zeros = runs.map(|run| self.put(queue, run[0], Bytes::Zeros { blocks: run.len() }));
        join_all(zeros).await.into_iter().collect()
    }

    fn first_block(&self, at: ByteOffset, len: u64, op: ImageOp) -> Result<u64, ImageError> {
        let block_bytes = u64::from(self.identity.block_bytes);
        let end = at.0 + len;
        let is_whole = end.is_multiple_of(block_bytes) || end == self.identity.size_bytes;
        if at.0.is_multiple_of(block_bytes) && is_whole && end <= self.identity.blocks() * block_bytes {
            return Ok(at.0 / block_bytes);
        }
        let what = format!("{len} bytes at {at} are no whole blocks of its disk");
        Err(ImageError::new(ImageErrorKind::Unsuitable, op, self.image.path(), what))
    }

    /// Whether a sync would make anything durable, or has something to say.
    #[must_use]
    pub fn needs_sync(&self) -> bool {
        needs_sync(&*self.image)
    }

    /// Whether nobody knows what a write has left that failed, so that what is there is not to be believed as it is. A sync
    /// settles that, if the image works again.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.lock().is_in_doubt()
    }

    /// Makes everything that completed before durable; units that nothing names since are free then.
    ///
    /// # Errors
    /// When the image refuses; it is failed then.
    pub async fn sync(&self, queue: &IoQueue) -> Result<(), ImageError> {
        if let Err(e) = self.settle_doubts(queue).await {
            log::debug!("what failed writes have left stays unknown: {e}");
        }
        let mut syncing = SyncUnderWay { pack: self, syncing: Some(self.lock().begin_sync()) };
        sync(&*self.image, queue).await?;
        let runs = {
            let mut places = self.lock();
            places.end_sync(syncing.syncing.take().expect("it has begun"));
            places.take_surplus()
        };
        let mut surplus = Surplus { pack: self, runs, released: None };
        while let Some(units) = surplus.runs.pop() {
            surplus.released = Some(units);
            let at = position(Place(units.start));
            if let Err(e) = release_range(&*self.image, queue, at, bytes_of(units.count)).await {
                log::warn!("the space of superseded blocks is not given back: {e}");
            }
            surplus.released = None;
            self.lock().put_back(units);
        }
        Ok(())
    }

    /// Makes the headers of failed writes void, so that their room can be had again.
    async fn settle_doubts(&self, queue: &IoQueue) -> Result<(), ImageError> {
        loop {
            let mut settling = Settling { pack: self, doubt: self.lock().take_doubt() };
            let Some(doubt) = &settling.doubt else { return Ok(()) };
            let voided = zero_range(&*self.image, queue, position(doubt.header), UNIT, false).await;
            let doubt = settling.doubt.take().expect("it was there");
            match voided {
                Ok(()) => self.lock().settle(doubt),
                Err(e) => {
                    self.lock().keep_doubt(doubt, true);
                    return Err(e);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_identity(
    image: &SharedImage,
    found: &Identity,
    id: Uuid,
    (size_bytes, block_bytes): (u64, u32),
) -> Result<(), TableError> {
    match *found == (Identity { id, key: found.key, size_bytes, block_bytes }) {
        true => Ok(()),
        false => {
            let what = "it is the pack of something else".to_owned();
            Err(TableError::Damaged { path: image.path().to_owned(), what })
        }
    }
}

/// A sync, which may be abandoned or fail.
struct SyncUnderWay<'a> {
    pack: &'a Pack,
    syncing: Option<Syncing>,
}

impl Drop for SyncUnderWay<'_> {
    fn drop(&mut self) {
        if let Some(syncing) = self.syncing.take() {
            self.pack.lock().abandon_sync(syncing);
        }
    }
}

/// A header that is made void, which may be abandoned.
struct Settling<'a> {
    pack: &'a Pack,
    doubt: Option<Doubt>,
}

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        if let Some(doubt) = self.doubt.take() {
            self.pack.lock().keep_doubt(doubt, false);
        }
    }
}

/// Free units that are given back one after the other, which may be abandoned.
struct Surplus<'a> {
    pack: &'a Pack,
    runs: Vec<Units>,
    released: Option<Units>,
}

impl Drop for Surplus<'_> {
    fn drop(&mut self) {
        let mut places = self.pack.lock();
        self.runs.drain(..).for_each(|units| places.put_back(units));
        self.released.take().into_iter().for_each(|units| places.give_up(units));
    }
}

/// A part of a buffer, and where its bytes are; None if they are zeros.
struct Piece {
    at: usize,
    len: usize,
    place: Option<ByteOffset>,
}

/// While it is there, no place that was in use when it began is written.
struct Reading<'a> {
    pack: &'a Pack,
    generation: u64,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.pack.lock().end_read(self.generation);
    }
}

fn position(place: Place) -> ByteOffset {
    ByteOffset(bytes_of(place.0))
}

fn bytes_of(units: u32) -> u64 {
    u64::from(units) * UNIT
}

impl std::fmt::Debug for Pack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pack({} at {})", self.identity.id, self.image.path().display())
    }
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
