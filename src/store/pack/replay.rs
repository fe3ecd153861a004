//! What is found of a pack: its headers one by one, those that are whole, and what is not there.
//!
//! What always holds:
//! - A header counts, with all its blocks, if it is known that everything up to it is there; otherwise only if the bytes of
//!   each block that no higher header names are what its checksum says. So the highest is looked at first: a place is
//!   written again only when a header that supersedes it is durable ([`super::places`]).
//! - What nothing but damage explains is an error: a header that had arrived and is not whole although the machine has not
//!   stopped since, or any that is not whole where all was saved.
//! - The order of positions means nothing, and a torn header hides no other one: they are independent of each other.
//! - Nothing is changed here. Headers that do not count are named, be they torn beyond recognition, so that they can be taken
//!   away before later ones say that everything up to them had arrived.

use std::cmp::Reverse;

use super::format::{Entry, Header, Identity, Place, UNIT_BYTES};
use super::places::Places;
use super::{Believed, units_of};
use crate::image::{AlignedBuf, ByteOffset, IoBuf, IoQueue, SharedImage, read_exact_at};
use crate::store::TableError;

/// Units that are read at once where what is wanted is close to each other.
const WINDOW_UNITS: u32 = 256;
/// A header after which another one is not expected that close.
const LONG_SPAN: u32 = 32;

/// What the taking up takes for each header, and for each block that is named, at most: vectors and maps that grow have room
/// for twice as much as is in them, and are there twice while they do.
const HEADER_MEMORY_BYTES: u64 = 96;
const BLOCK_MEMORY_BYTES: u64 = 48;

/// What was found.
pub(super) struct Found {
    pub(super) identity: Identity,
    pub(super) places: Places,
    /// Headers that do not count.
    pub(super) torn: Vec<Place>,
}

/// A header that was met on the way. Its entries are read again when its turn comes: what guests wrote decides how many
/// headers there are.
#[derive(Clone, Copy)]
struct Met {
    place: Place,
    span: u32,
    sequence: u64,
}

/// What is met on the way from the first unit to the last one.
struct Walk {
    headers: Vec<Met>,
    /// Where one of ours is that is torn, so that nobody knows what it said.
    unreadable: Vec<Place>,
    /// The highest sequences that headers say had arrived, and were synced.
    arrived: u64,
    synced: u64,
    /// From here on nothing was ever written.
    end: u32,
}

/// Whether there is nothing behind the first unit of a pack. False for what is none.
pub(super) async fn is_unwritten(image: &SharedImage, queue: &IoQueue) -> Result<bool, TableError> {
    let mut reader = Reader { image, queue, window: None };
    let units = match first_unit(&mut reader).await {
        Ok((_, units)) => units,
        Err(TableError::Damaged { .. }) => return Ok(false),
        Err(e) => return Err(e),
    };
    let mut at = 1;
    while at < units {
        if reader.unit(at, WINDOW_UNITS).await?.iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
        at = (at + 1).max(reader.next_data(at + 1).unwrap_or(units));
    }
    Ok(true)
}

/// What a pack is, and how many units it has.
async fn first_unit(reader: &mut Reader<'_>) -> Result<(Identity, u32), TableError> {
    let image = reader.image;
    let damaged = |what: &str| TableError::Damaged { path: image.path().to_owned(), what: what.to_owned() };
    if image.size_bytes() < UNIT_BYTES as u64 {
        return Err(damaged("it is cut short"));
    }
    let identity = Identity::decode(reader.unit(0, 1).await?).map_err(damaged)?;
    let Some(units) = units_of(identity.size_bytes, identity.block_bytes) else {
        return Err(damaged("it is larger than a pack can be"));
    };
    match image.size_bytes() == u64::from(units) * UNIT_BYTES as u64 {
        true => Ok((identity, units)),
        false => Err(damaged("it does not have the size of such a pack")),
    }
}

/// Reads a pack, with so many bytes of memory at most.
pub(super) async fn replay(
    image: &SharedImage,
    believed: Believed,
    memory_bytes_max: u64,
    queue: &IoQueue,
) -> Result<Found, TableError> {
    let mut reader = Reader { image, queue, window: None };
    let damaged = |what: &str| TableError::Damaged { path: image.path().to_owned(), what: what.to_owned() };
    let (identity, units) = first_unit(&mut reader).await?;
    let walked = walk(&mut reader, &identity, units, memory_bytes_max).await?;
    let Walk { mut headers, mut unreadable, arrived, synced, end } = walked;
    // Up to where headers count unread, and from where they may be torn.
    let (trusted, torn_from) = match believed {
        Believed::Saved => (arrived, u64::MAX),
        // A sync that failed may have taken pages with it that had arrived.
        Believed::Arrived => (synced, arrived + 1),
        Believed::Synced => (synced, synced + 1),
    };
    headers.sort_unstable_by_key(|met| Reverse(met.sequence));
    let (blocks, block_units) = (identity.blocks(), identity.block_units());
    let disk_blocks = u32::try_from(blocks).expect("fewer than units");
    let (mut places, mut torn) = (Places::new(block_units, disk_blocks, units), Vec::new());
    let mut data = Reader { image, queue, window: None };
    for (at, &Met { place, span, sequence }) in headers.iter().enumerate() {
        reader.read_ahead(&headers[at..]).await;
        let header = Header::decode(identity.key, place, reader.unit(place.0, 1).await?);
        let Some(header) = header.filter(|header| (header.span, header.sequence) == (span, sequence)) else {
            return Err(damaged("a header was changed while it was read"));
        };
        let fits = header.entries.iter().all(|entry| {
            let end = entry.bytes.map_or(0, |(place, _)| u64::from(place.0) + u64::from(block_units));
            entry.block < blocks && end <= u64::from(units)
        });
        if !fits || u64::from(place.0) + u64::from(span) > u64::from(units) || span == 0 {
            return Err(damaged("a header names what is not in it"));
        }
        if sequence > trusted && !is_whole(&mut data, &places, &header, block_units).await {
            if sequence < torn_from {
                return Err(damaged("a block that had arrived does not match its checksum"));
            }
            torn.push(place);
            places.take_up_place(place, span);
            continue;
        }
        places.take_up(place, span, sequence, &header.entries);
    }
    drop(headers);
    places.without_held(&mut unreadable);
    if !unreadable.is_empty() && believed == Believed::Saved {
        return Err(damaged("a header does not match its checksum"));
    }
    torn.append(&mut unreadable);
    if !places.taken_up(end) {
        return Err(damaged("two blocks are said to be in the same place"));
    }
    Ok(Found { identity, places, torn })
}

/// All headers, and where nothing was ever written.
async fn walk(
    reader: &mut Reader<'_>,
    identity: &Identity,
    units: u32,
    memory_bytes_max: u64,
) -> Result<Walk, TableError> {
    let mut found = Walk { headers: Vec::new(), unreadable: Vec::new(), arrived: 0, synced: 0, end: 1 };
    let (mut at, mut window, mut entries) = (1, WINDOW_UNITS, 0);
    while at < units {
        let unit = reader.unit(at, window).await?;
        if let Some(header) = Header::decode(identity.key, Place(at), unit) {
            let span = header.span.max(1);
            window = if span < LONG_SPAN { WINDOW_UNITS } else { 1 };
            found.headers.push(Met { place: Place(at), span: header.span, sequence: header.sequence });
            found.arrived = found.arrived.max(header.arrived);
            found.synced = found.synced.max(header.synced);
            entries += header.entries.len() as u64;
            let blocks = entries.min(identity.blocks());
            let memory_bytes = found.headers.len() as u64 * HEADER_MEMORY_BYTES + blocks * BLOCK_MEMORY_BYTES;
            if memory_bytes > memory_bytes_max {
                let message = format!(
                    "what was written to it may take more than {} MiB of memory to take up, and no more can be had for it",
                    memory_bytes_max >> 20
                );
                return Err(TableError::Io { path: reader.image.path().to_owned(), message });
            }
            at = at.saturating_add(span);
            found.end = at;
            continue;
        }
        let is_empty = unit.iter().all(|&byte| byte == 0);
        if Header::is_begun(identity.key, Place(at), unit) {
            found.unreadable.push(Place(at));
        }
        at += 1;
        window = WINDOW_UNITS;
        if is_empty {
            at = at.max(reader.next_data(at).unwrap_or(units).min(units));
        } else {
            found.end = at;
        }
    }
    Ok(found)
}

/// Whether the bytes are there of all blocks that nothing higher names. Those that cannot be read are taken to be: who reads
/// them is told.
async fn is_whole(data: &mut Reader<'_>, places: &Places, header: &Header, block_units: u32) -> bool {
    let mut seen = std::collections::BTreeSet::new();
    let counts = |entry: &&Entry| !places.knows(entry.block) && seen.insert(entry.block);
    let named = header.entries.iter().rev().filter(counts).filter_map(|entry| entry.bytes);
    let mut named: Vec<(Place, u32)> = named.collect();
    named.sort_unstable();
    let block_bytes = block_units as usize * UNIT_BYTES;
    for run in named.chunk_by(|(before, _), (next, _)| before.0 + block_units == next.0) {
        for run in run.chunks((WINDOW_UNITS / block_units).max(1) as usize) {
            let (first, blocks) = (run[0].0.0, u32::try_from(run.len()).expect("few"));
            if let Ok(bytes) = data.read(first, blocks * block_units).await {
                let pairs = bytes.chunks_exact(block_bytes).zip(run);
                if pairs.into_iter().any(|(bytes, (_, checksum))| crc32fast::hash(bytes) != *checksum) {
                    return false;
                }
                continue;
            }
            for (place, checksum) in run {
                match data.read(place.0, block_units).await {
                    Ok(bytes) if crc32fast::hash(bytes) != *checksum => return false,
                    Ok(_) => {}
                    Err(e) => log::warn!("a block is taken to be there that cannot be read: {e}"),
                }
            }
        }
    }
    true
}

/// Reads units, some ahead.
struct Reader<'a> {
    image: &'a SharedImage,
    queue: &'a IoQueue,
    window: Option<(u32, AlignedBuf)>,
}

impl Reader<'_> {
    /// Reads ahead what the next headers are in, if they are close to each other and the first is not there yet.
    async fn read_ahead(&mut self, next: &[Met]) {
        let Some(first) = next.first().filter(|met| !self.has(met.place.0)) else { return };
        let (mut from, mut end) = (first.place.0, first.place.0 + 1);
        for met in &next[1..] {
            let wider = (from.min(met.place.0), end.max(met.place.0 + 1));
            if wider.1 - wider.0 > WINDOW_UNITS {
                break;
            }
            (from, end) = wider;
        }
        if end - from > 1 && self.load(from, end - from).await.is_err() {
            self.window = None; // Who asks for one of them is told.
        }
    }

    fn has(&self, at: u32) -> bool {
        self.window.as_ref().is_some_and(|(from, bytes)| {
            let count = u32::try_from(bytes.len() / UNIT_BYTES).expect("a window is small");
            (*from..from + count).contains(&at)
        })
    }

    /// One unit, and so many with it if they are not there yet.
    async fn unit(&mut self, at: u32, ahead: u32) -> Result<&[u8], TableError> {
        let units = u32::try_from(self.image.size_bytes() / UNIT_BYTES as u64).unwrap_or(u32::MAX);
        if !self.has(at) {
            let count = ahead.min(units - at).max(1);
            match self.load(at, count).await {
                // Something behind it that nobody asked for, perhaps.
                Err(_) if count > 1 => self.load(at, 1).await?,
                loaded => loaded?,
            }
        }
        let (from, bytes) = self.window.as_ref().expect("it was just read");
        let skip = (at - from) as usize * UNIT_BYTES;
        Ok(&bytes[skip..skip + UNIT_BYTES])
    }

    /// Exactly these units.
    async fn read(&mut self, at: u32, count: u32) -> Result<&[u8], TableError> {
        self.load(at, count).await?;
        Ok(&self.window.as_ref().expect("it was just read").1)
    }

    async fn load(&mut self, at: u32, count: u32) -> Result<(), TableError> {
        let len = count as usize * UNIT_BYTES;
        let into = match self.window.take() {
            Some((_, buf)) if buf.len() == len => buf,
            _ => AlignedBuf::zeroed(len),
        };
        let from = ByteOffset(u64::from(at) * UNIT_BYTES as u64);
        match read_exact_at(&**self.image, self.queue, from, IoBuf::Owned(into)).await {
            Ok(IoBuf::Owned(bytes)) => self.window = Some((at, bytes)),
            Ok(_) => unreachable!("a transfer gives back the buffer it was given"),
            Err(e) => return Err(TableError::image(self.image.path(), &e)),
        }
        Ok(())
    }

    /// The first unit from `at` on in which there may be anything; None if that is not known, or there is none.
    fn next_data(&self, at: u32) -> Option<u32> {
        let from = ByteOffset(u64::from(at) * UNIT_BYTES as u64);
        match self.image.next_data(from) {
            Some(data) => u32::try_from(data.0 / UNIT_BYTES as u64).ok(),
            None => Some(at),
        }
    }
}
