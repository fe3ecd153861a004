//! What is found of a pack: its headers one by one, those that are whole, and what is not there.
//!
//! What always holds:
//! - A header counts, with all its blocks, if it is known that everything up to it had arrived; otherwise only if the bytes
//!   of each block that no higher header names are what its checksum says. So the highest is looked at first: a place is
//!   written again only when a header that supersedes it is durable ([`super::places`]).
//! - The order of positions means nothing, and a torn header hides no other one: they are independent of each other.
//! - Nothing is changed here. Headers that do not count are named, so that they can be taken away before later ones say
//!   that everything up to them had arrived.

use super::format::{Header, Identity, Place, UNIT_BYTES};
use super::places::Places;
use super::{Believed, units_of};
use crate::image::{AlignedBuf, ByteOffset, IoBuf, IoQueue, SharedImage, read_exact_at};
use crate::store::TableError;

/// Units that are read at once where headers are close to each other.
const WINDOW_UNITS: u32 = 256;
/// A header after which another one is not expected that close.
const LONG_SPAN: u32 = 32;

/// What was found.
pub(super) struct Found {
    pub(super) identity: Identity,
    pub(super) places: Places,
    /// Headers that do not count.
    pub(super) torn: Vec<Place>,
    /// Whether there is nothing behind its first unit.
    pub(super) is_unwritten: bool,
}

/// Reads a pack.
pub(super) async fn replay(image: &SharedImage, believed: Believed, queue: &IoQueue) -> Result<Found, TableError> {
    let mut reader = Reader { image, queue, window: None };
    let damaged = |what: &str| TableError::Damaged { path: image.path().to_owned(), what: what.to_owned() };
    if image.size_bytes() < UNIT_BYTES as u64 {
        return Err(damaged("it is cut short"));
    }
    let identity = Identity::decode(reader.unit(0, 1).await?).map_err(damaged)?;
    let Some(units) = units_of(identity.size_bytes, identity.block_bytes) else {
        return Err(damaged("it is larger than a pack can be"));
    };
    if image.size_bytes() != u64::from(units) * UNIT_BYTES as u64 {
        return Err(damaged("it does not have the size of such a pack"));
    }
    let (headers, end) = walk(&mut reader, &identity, units).await?;
    let trusted = headers.iter().map(|(_, header)| match believed {
        Believed::Arrived => header.arrived,
        Believed::Synced => header.synced,
    });
    let trusted = trusted.max().unwrap_or(0);
    let mut in_order = headers;
    in_order.sort_unstable_by_key(|(_, header)| std::cmp::Reverse(header.sequence));
    let (blocks, block_units) = (identity.blocks(), identity.block_units());
    let disk_blocks = u32::try_from(blocks).expect("fewer than units");
    let (mut places, mut torn) = (Places::new(block_units, disk_blocks, units), Vec::new());
    for (place, header) in in_order {
        let fits = header.entries.iter().all(|entry| {
            let end = entry.bytes.map_or(0, |(place, _)| u64::from(place.0) + u64::from(block_units));
            entry.block < blocks && end <= u64::from(units)
        });
        if !fits || u64::from(place.0) + u64::from(header.span) > u64::from(units) || header.span == 0 {
            return Err(damaged("a header names what is not in it"));
        }
        if header.sequence > trusted && !is_whole(&mut reader, &places, &header, block_units).await? {
            torn.push(place);
            places.take_up_place(place, header.span);
            continue;
        }
        places.take_up(place, header.span, header.sequence, &header.entries);
    }
    if !places.taken_up(end) {
        return Err(damaged("two blocks are said to be in the same place"));
    }
    Ok(Found { identity, places, torn, is_unwritten: end == 1 })
}

/// All headers, and where nothing was ever written.
async fn walk(
    reader: &mut Reader<'_>,
    identity: &Identity,
    units: u32,
) -> Result<(Vec<(Place, Header)>, u32), TableError> {
    let (mut headers, mut at, mut end, mut window) = (Vec::new(), 1, 1, WINDOW_UNITS);
    while at < units {
        let unit = reader.unit(at, window).await?;
        let is_empty = unit.iter().all(|&byte| byte == 0);
        match Header::decode(identity.key, Place(at), unit) {
            Some(header) => {
                let span = header.span.max(1);
                window = if span < LONG_SPAN { WINDOW_UNITS } else { 1 };
                headers.push((Place(at), header));
                at = at.saturating_add(span);
                end = at;
            }
            None => {
                at += 1;
                window = WINDOW_UNITS;
                if !is_empty {
                    end = at;
                } else {
                    at = at.max(reader.next_data(at).unwrap_or(units).min(units));
                }
            }
        }
    }
    Ok((headers, end))
}

/// Whether the bytes are there of all blocks that nothing higher names.
async fn is_whole(
    reader: &mut Reader<'_>,
    places: &Places,
    header: &Header,
    block_units: u32,
) -> Result<bool, TableError> {
    let mut seen = std::collections::BTreeSet::new();
    for entry in header.entries.iter().rev() {
        if places.knows(entry.block) || !seen.insert(entry.block) {
            continue;
        }
        if let Some((place, checksum)) = entry.bytes
            && crc32fast::hash(reader.read(place.0, block_units).await?) != checksum
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Reads units, some ahead.
struct Reader<'a> {
    image: &'a SharedImage,
    queue: &'a IoQueue,
    window: Option<(u32, AlignedBuf)>,
}

impl Reader<'_> {
    /// One unit, and so many with it if they are not there yet.
    async fn unit(&mut self, at: u32, ahead: u32) -> Result<&[u8], TableError> {
        let units = u32::try_from(self.image.size_bytes() / UNIT_BYTES as u64).unwrap_or(u32::MAX);
        let is_there = self.window.as_ref().is_some_and(|(from, bytes)| {
            let count = u32::try_from(bytes.len() / UNIT_BYTES).expect("a window is small");
            (*from..from + count).contains(&at)
        });
        if !is_there {
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
