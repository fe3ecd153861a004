//! From a raw chain to a validated request, or to the answer that it deserves.
//!
//! What always holds:
//! - The header and discard segments are copied once; decisions are made on the copies.
//! - A [`Request`] that leaves here lies inside the disk, in whole sectors, and its buffer inside the guest's memory.
//! - The guest gets UNSUPP for what it could not know that we do not do, IOERR for what is wrong.
//!
//! It executes nothing. Layouts: virtio 1.2, 5.2.6; framing is free (2.7.4.1), so header and status may be anywhere.

use std::sync::Arc;

use virtio_bindings::virtio_blk as blk;

use super::chain::{ChainFault, Piece, RawChain};
use super::features::{DISCARD, RANGE_SEGMENTS_MAX, RING_ENTRIES_MAX, SECTOR_BYTES, WRITE_ZEROES};
use super::memory::{GuestAddress, MemoryMap, Segments};
use super::stats::Direction;
use crate::engine::Request;
use crate::image::{ByteOffset, GuestBuf, IoSegment};

const HEADER_BYTES: u64 = 16;
const STATUS_BYTES: u64 = 1;
const RANGE_BYTES: usize = 16;
/// The size of the answer to GET_ID.
pub(super) const SERIAL_BYTES: usize = blk::VIRTIO_BLK_ID_BYTES as usize;

/// Legacy drivers set it on requests that later ones must not overtake. It was not offered, and means nothing, as to QEMU.
const BARRIER: u32 = blk::VIRTIO_BLK_T_BARRIER;
/// Says that data goes to the device, and is a part of the types of writes, discards and zeroes.
const OUT: u32 = blk::VIRTIO_BLK_T_OUT;

/// A flush of drivers of the first hour.
const FLUSH_OUT: u32 = blk::VIRTIO_BLK_T_FLUSH | OUT;

/// The bytes of a chain (virtio 1.2, 2.7.4); with a sector less, so that what was written can be told in 32 bits.
const CHAIN_BYTES_MAX: u64 = u32::MAX as u64 - SECTOR_BYTES;

/// What a part of a transfer has at most: segments as many as one system call takes (`UIO_MAXIOV`), and bytes.
const PART_SEGMENTS_MAX: usize = 1024;
const PART_BYTES_MAX: usize = 32 << 20;
/// The most pieces of a frontend's memory that one request may touch: two for each descriptor that it can have.
const REQUEST_SEGMENTS_MAX: usize = 4 * RING_ENTRIES_MAX as usize;
/// Where parts end if they can: units of images are not split then.
const PART_UNIT_BYTES: usize = 4096;
const SECTOR: usize = 512;
/// The smallest blocks that disks have: what one request reads is never in more places than it has blocks.
const BLOCK_BYTES_MIN: u64 = 4096;

const _: () = assert!(SECTOR as u64 == SECTOR_BYTES);

/// The status byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

const _: () = assert!(
    Status::Ok as u32 == blk::VIRTIO_BLK_S_OK
        && Status::IoError as u32 == blk::VIRTIO_BLK_S_IOERR
        && Status::Unsupported as u32 == blk::VIRTIO_BLK_S_UNSUPP
);

/// What requests are held against; fixed while a ring runs, but for `durable` and the capacity, which only grows.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) capacity_bytes: u64,
    /// The virtio features that were negotiated.
    pub(super) features: u64,
    /// Whether a write must be durable before it completes.
    pub(super) durable: bool,
    pub(super) read_only: bool,
    pub(super) serial: [u8; SERIAL_BYTES],
}

/// A validated request, to be executed part by part.
pub(super) struct Job {
    pub(super) direction: Direction,
    pub(super) first: Request,
    /// What follows it: further parts of a transfer, or segments of a discard or write-zeroes request.
    pub(super) rest: Vec<Request>,
    /// How many pieces of memory or segments its parts have together: what it costs to keep.
    pub(super) pieces: usize,
    /// Bytes for the statistics.
    pub(super) bytes: u64,
    /// Bytes written into the chain when it succeeds, status included.
    pub(super) written: u32,
}

/// What to do with a chain.
pub(super) enum Parsed {
    /// Execute it, then write the status.
    Execute(Job),
    /// The answer is known: this status, and the number of bytes written with it.
    Answer(Status, u32),
}

/// What is wrong with a request, for the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Chain(#[from] ChainFault),
    #[error("a header of {0} bytes")]
    ShortHeader(u64),
    #[error("no byte to write the status to")]
    NoStatus,
    #[error("memory outside the guest's")]
    Memory,
    #[error("{0}")]
    Request(&'static str),
    #[error("unknown request type {0:#x}")]
    Type(u32),
    #[error("a segment with unknown flags {0:#x}")]
    Flags(u32),
}

impl Refusal {
    /// What the guest is told.
    pub(super) fn status(&self) -> Status {
        match self {
            Refusal::Type(_) | Refusal::Flags(_) => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

struct Header {
    kind: u32,
    sector: u64,
}

/// The chain as the request sees it, header and status cut off.
struct Body<'a> {
    readable: &'a [Piece],
    writable: &'a [Piece],
    /// Bytes to read behind the header.
    readable_bytes: u64,
    /// Bytes to write before the status.
    writable_bytes: u64,
}

/// Validates the chain that was read with the outcome `walked`.
///
/// # Errors
/// When it is not a request that can be executed; the refusal says which status it deserves.
pub(super) fn parse(
    chain: &RawChain,
    walked: Result<(), ChainFault>,
    memory: &Arc<MemoryMap>,
    rules: &Rules,
) -> Result<Parsed, Refusal> {
    walked?;
    let total = |pieces: &[Piece]| pieces.iter().map(|p| u64::from(p.len)).sum::<u64>();
    let (readable, writable) = (total(chain.readable()), total(chain.writable()));
    if writable < STATUS_BYTES {
        return Err(Refusal::NoStatus);
    }
    let header = read_header(chain.readable(), readable, memory)?;
    let body = Body {
        readable: chain.readable(),
        writable: chain.writable(),
        readable_bytes: readable - HEADER_BYTES,
        writable_bytes: writable - STATUS_BYTES,
    };
    if readable + writable > CHAIN_BYTES_MAX {
        return Err(Refusal::Request("more bytes than a chain may have"));
    }
    match direction_of(header.kind) {
        Some(Direction::Read) => transfer(&header, &body, memory, rules, false),
        Some(Direction::Write) if rules.read_only => Err(Refusal::Request("a write to a read-only disk")),
        Some(Direction::Write) => transfer(&header, &body, memory, rules, true),
        // Data with a flush means nothing and is left alone.
        Some(direction @ Direction::Flush) => Ok(Parsed::Execute(Job {
            direction,
            first: Request::Flush,
            rest: Vec::new(),
            pieces: 0,
            bytes: 0,
            written: 1,
        })),
        Some(direction @ (Direction::Discard | Direction::WriteZeroes)) => {
            ranges(direction, header.kind, &body, memory, rules)
        }
        None if header.kind & !(OUT | BARRIER) == blk::VIRTIO_BLK_T_GET_ID => get_id(&body, memory, rules),
        None => Err(Refusal::Type(header.kind)),
    }
}

/// What a request of this type does, if it is counted. As QEMU has it, the barrier bit means nothing and
/// `VIRTIO_BLK_T_FLUSH_OUT` is a flush, while discards and zeroes must say that their segments go to the device.
fn direction_of(kind: u32) -> Option<Direction> {
    match kind & !BARRIER {
        blk::VIRTIO_BLK_T_IN => Some(Direction::Read),
        blk::VIRTIO_BLK_T_OUT => Some(Direction::Write),
        blk::VIRTIO_BLK_T_FLUSH | FLUSH_OUT => Some(Direction::Flush),
        blk::VIRTIO_BLK_T_DISCARD => Some(Direction::Discard),
        blk::VIRTIO_BLK_T_WRITE_ZEROES => Some(Direction::WriteZeroes),
        _ => None,
    }
}

/// What a refused request asked for, as far as that can be told. For the statistics only: the guest may have changed
/// the header since it was refused.
pub(super) fn direction_asked(chain: &RawChain, memory: &MemoryMap) -> Option<Direction> {
    let readable = chain.readable().iter().map(|p| u64::from(p.len)).sum();
    direction_of(read_header(chain.readable(), readable, memory).ok()?.kind)
}

fn read_header(readable: &[Piece], total: u64, memory: &MemoryMap) -> Result<Header, Refusal> {
    if total < HEADER_BYTES {
        return Err(Refusal::ShortHeader(total));
    }
    let mut bytes = [0u8; 16];
    copy_from(readable, 0, &mut bytes, memory)?;
    let (kind, sector) = (u32::from_le_bytes(part(&bytes, 0)), u64::from_le_bytes(part(&bytes, 8)));
    Ok(Header { kind, sector })
}

fn part<const N: usize>(bytes: &[u8], from: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[from + i])
}

/// Copies guest bytes from position `skip` of `pieces` on.
fn copy_from(pieces: &[Piece], skip: u64, into: &mut [u8], memory: &MemoryMap) -> Result<(), Refusal> {
    let mut at = 0;
    for piece in window(pieces, skip, into.len() as u64) {
        let to = at + piece.len as usize;
        if !memory.copy_out(piece.at, &mut into[at..to]) {
            return Err(Refusal::Memory);
        }
        at = to;
    }
    Ok(())
}

/// The parts of `pieces` that hold `len` bytes from position `skip` on.
fn window(pieces: &[Piece], skip: u64, len: u64) -> impl Iterator<Item = Piece> + '_ {
    let mut at = 0u64;
    pieces.iter().filter_map(move |p| {
        let here = at;
        at += u64::from(p.len);
        let from = skip.max(here);
        let to = (skip + len).min(at);
        let piece_len = u32::try_from(to.checked_sub(from)?).ok().filter(|n| *n > 0)?;
        // An address that wraps lies outside every region, which translate finds out.
        Some(Piece { at: GuestAddress(p.at.0.wrapping_add(from - here)), len: piece_len })
    })
}

/// Whole sectors inside the disk.
fn check_range(sector: u64, len: u64, rules: &Rules) -> Result<ByteOffset, Refusal> {
    let at = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Request("a sector number that overflows"))?;
    let end = at.checked_add(len).ok_or(Refusal::Request("a range that overflows"))?;
    if end > rules.capacity_bytes {
        return Err(Refusal::Request("a range beyond the end of the disk"));
    }
    Ok(ByteOffset(at))
}

fn transfer(
    header: &Header,
    body: &Body<'_>,
    memory: &Arc<MemoryMap>,
    rules: &Rules,
    is_write: bool,
) -> Result<Parsed, Refusal> {
    let (pieces, skip, len, other) = if is_write {
        (body.readable, HEADER_BYTES, body.readable_bytes, body.writable_bytes)
    } else {
        (body.writable, 0, body.writable_bytes, body.readable_bytes)
    };
    if len == 0 || other > 0 {
        return Err(Refusal::Request("data in the wrong direction, or none"));
    }
    if !len.is_multiple_of(SECTOR_BYTES) {
        return Err(Refusal::Request("a length that is not a multiple of a sector"));
    }
    let at = check_range(header.sector, len, rules)?;
    let mut segments = Segments::new();
    for piece in window(pieces, skip, len) {
        if !memory.translate(piece.at, u64::from(piece.len), &mut segments) {
            return Err(Refusal::Memory);
        }
        if segments.len() > REQUEST_SEGMENTS_MAX {
            return Err(Refusal::Request("more pieces of memory than a request may have"));
        }
    }
    let request = |(at, buf)| match is_write {
        true => Request::Write { at, from: buf, durable: rules.durable },
        false => Request::Read { at, into: buf },
    };
    let is_one = segments.len() <= PART_SEGMENTS_MAX && len <= PART_BYTES_MAX as u64;
    let (first, rest, pieces) = if is_one {
        (request((at, guest_buf(&segments, memory))), Vec::new(), segments.len())
    } else {
        let mut parts = parts(at, &segments, memory).into_iter().map(request);
        (parts.next().ok_or(Refusal::Request("no data"))?, parts.collect(), 2 * segments.len())
    };
    Ok(Parsed::Execute(Job {
        direction: if is_write { Direction::Write } else { Direction::Read },
        // It may be read from as many places, each by an operation of its own.
        pieces: pieces.max(rest.len()).max(usize::try_from(len / BLOCK_BYTES_MIN).unwrap_or(usize::MAX)),
        first,
        rest,
        bytes: len,
        written: if is_write { 1 } else { u32::try_from(len).unwrap_or(0) + 1 },
    }))
}

/// Cuts a transfer of whole sectors into parts of whole sectors that can each be carried out at once, whatever the
/// segments that it came in.
fn parts(mut at: ByteOffset, segments: &[IoSegment], memory: &Arc<MemoryMap>) -> Vec<(ByteOffset, GuestBuf)> {
    let mut parts = Vec::new();
    // Of the first one left, so many bytes are in parts already.
    let (mut left, mut taken) = (segments, 0);
    while !left.is_empty() {
        let ahead = left.iter().take(PART_SEGMENTS_MAX).map(|s| s.len).sum::<usize>() - taken;
        let mut part_bytes = ahead.min(PART_BYTES_MAX);
        if part_bytes < ahead || left.len() > PART_SEGMENTS_MAX {
            // Each segment has a byte at least, so there are two sectors and more.
            let unit = if part_bytes >= 2 * PART_UNIT_BYTES { PART_UNIT_BYTES } else { SECTOR };
            let over = usize::try_from(at.0 % unit as u64).unwrap_or(0);
            part_bytes = (over + part_bytes) / unit * unit - over;
        }
        let mut part = Segments::new();
        let mut rest = part_bytes;
        while rest > 0 {
            let len = rest.min(left[0].len - taken);
            part.push(IoSegment { address: left[0].address.wrapping_add(taken), len });
            rest -= len;
            taken += len;
            if taken == left[0].len {
                (left, taken) = (&left[1..], 0);
            }
        }
        parts.push((at, guest_buf(&part, memory)));
        at = at.add(part_bytes as u64);
    }
    parts
}

fn guest_buf(segments: &[IoSegment], memory: &Arc<MemoryMap>) -> GuestBuf {
    // SAFETY: every segment came from `memory.translate`, so it lies in a shared read-write mapping that lives as long
    // as the map, which is the pin; no Rust reference ever points into it.
    unsafe { GuestBuf::new(segments, memory.clone()) }
}

/// The serial number. A short buffer gets what fits, as QEMU has it.
fn get_id(body: &Body<'_>, memory: &MemoryMap, rules: &Rules) -> Result<Parsed, Refusal> {
    if body.writable_bytes == 0 {
        return Err(Refusal::Request("no buffer for the serial number"));
    }
    let len = usize::try_from(body.writable_bytes).unwrap_or(usize::MAX).min(SERIAL_BYTES);
    let mut at = 0;
    for piece in window(body.writable, 0, len as u64) {
        let to = at + piece.len as usize;
        if !memory.copy_in(piece.at, &rules.serial[at..to]) {
            return Err(Refusal::Memory);
        }
        at = to;
    }
    Ok(Parsed::Answer(Status::Ok, u32::try_from(len).unwrap_or(0) + 1))
}

/// Discard and write-zeroes: all segments are validated before the first one is executed.
fn ranges(
    direction: Direction,
    kind: u32,
    body: &Body<'_>,
    memory: &MemoryMap,
    rules: &Rules,
) -> Result<Parsed, Refusal> {
    let is_discard = direction == Direction::Discard;
    if rules.read_only {
        return Err(Refusal::Request("a discard or write-zeroes request to a read-only disk"));
    }
    if rules.features & if is_discard { DISCARD } else { WRITE_ZEROES } == 0 {
        return Err(Refusal::Type(kind));
    }
    let len = usize::try_from(body.readable_bytes).unwrap_or(usize::MAX);
    let count = len / RANGE_BYTES;
    if count == 0 || !len.is_multiple_of(RANGE_BYTES) || count > RANGE_SEGMENTS_MAX || body.writable_bytes > 0 {
        return Err(Refusal::Request("a discard or write-zeroes request without 1 to 4096 whole segments"));
    }
    let mut bytes: smallvec::SmallVec<[u8; 32 * RANGE_BYTES]> = smallvec::smallvec![0; len];
    copy_from(body.readable, HEADER_BYTES, &mut bytes, memory)?;
    let mut total = 0;
    let mut range_of = |segment: &[u8]| {
        let (request, len) = range(segment, is_discard, rules)?;
        total += len;
        Ok::<Request, Refusal>(request)
    };
    let first = range_of(&bytes[..RANGE_BYTES])?;
    let rest: Vec<Request> = bytes[RANGE_BYTES..].chunks_exact(RANGE_BYTES).map(range_of).collect::<Result<_, _>>()?;
    // One request is one ticket: as long as it lasts nothing is quiesced.
    if total > rules.capacity_bytes {
        return Err(Refusal::Request("segments of more bytes than the disk has"));
    }
    Ok(Parsed::Execute(Job { direction, first, rest, pieces: count, bytes: total, written: 1 }))
}

fn range(segment: &[u8], is_discard: bool, rules: &Rules) -> Result<(Request, u64), Refusal> {
    let sector = u64::from_le_bytes(part(segment, 0));
    let sectors = u32::from_le_bytes(part(segment, 8));
    let flags = u32::from_le_bytes(part(segment, 12));
    // The only flag there is means nothing to a discard, where it must be refused (virtio 1.2, 5.2.6.2).
    let known = if is_discard { 0 } else { blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
    if flags & !known != 0 {
        return Err(Refusal::Flags(flags));
    }
    if sectors == 0 {
        return Err(Refusal::Request("a segment of no sectors"));
    }
    let len = u64::from(sectors) * SECTOR_BYTES;
    let at = check_range(sector, len, rules)?;
    let request = if is_discard {
        Request::Discard { at, len }
    } else {
        Request::WriteZeroes { at, len, unmap: flags != 0, durable: rules.durable }
    };
    Ok((request, len))
}

impl Rules {
    /// Whether writes complete only when durable: the driver does not know FLUSH, or asked for writethrough.
    pub(super) fn must_be_durable(features: u64, is_writeback: bool) -> bool {
        let knows_flush = features & super::features::FLUSH != 0;
        let wrote_through = features & super::features::CONFIG_WCE != 0 && !is_writeback;
        !knows_flush || wrote_through
    }
}
