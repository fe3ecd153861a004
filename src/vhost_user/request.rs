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
use super::features::{
    DISCARD, RANGE_SECTORS_MAX, RANGE_SEGMENTS_MAX, REQUEST_BYTES_MAX, SECTOR_BYTES, SEGMENT_BYTES_MAX, SEGMENTS_MAX,
    SIZE_MAX, WRITE_ZEROES,
};
use super::memory::{GuestAddress, MemoryMap, Segments};
use super::stats::Direction;
use crate::engine::Request;
use crate::image::{ByteOffset, GuestBuf, IoSegment};

const HEADER_BYTES: u64 = 16;
const STATUS_BYTES: u64 = 1;
const RANGE_BYTES: usize = 16;
/// The size of the answer to GET_ID.
pub(super) const SERIAL_BYTES: usize = blk::VIRTIO_BLK_ID_BYTES as usize;

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

/// What requests are held against; fixed while a ring runs, but for `durable`.
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
    /// Further segments of a discard or write-zeroes request.
    pub(super) rest: Vec<Request>,
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
    match header.kind {
        blk::VIRTIO_BLK_T_IN => transfer(&header, &body, memory, rules, false),
        blk::VIRTIO_BLK_T_OUT if rules.read_only => Err(Refusal::Request("a write to a read-only disk")),
        blk::VIRTIO_BLK_T_OUT => transfer(&header, &body, memory, rules, true),
        // Data with a flush means nothing and is left alone.
        blk::VIRTIO_BLK_T_FLUSH => Ok(Parsed::Execute(job(Direction::Flush, Request::Flush, 0, 1))),
        blk::VIRTIO_BLK_T_GET_ID => get_id(&body, memory, rules),
        blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES => ranges(&header, &body, memory, rules),
        other => Err(Refusal::Type(other)),
    }
}

fn job(direction: Direction, first: Request, bytes: u64, written: u32) -> Job {
    Job { direction, first, rest: Vec::new(), bytes, written }
}

/// What a refused request asked for, as far as that can be told. For the statistics only: the guest may have changed
/// the header since it was refused.
pub(super) fn direction_asked(chain: &RawChain, memory: &MemoryMap) -> Option<Direction> {
    let readable = chain.readable().iter().map(|p| u64::from(p.len)).sum();
    match read_header(chain.readable(), readable, memory).ok()?.kind {
        blk::VIRTIO_BLK_T_IN => Some(Direction::Read),
        blk::VIRTIO_BLK_T_OUT => Some(Direction::Write),
        blk::VIRTIO_BLK_T_FLUSH => Some(Direction::Flush),
        blk::VIRTIO_BLK_T_DISCARD => Some(Direction::Discard),
        blk::VIRTIO_BLK_T_WRITE_ZEROES => Some(Direction::WriteZeroes),
        _ => None,
    }
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
    if len > REQUEST_BYTES_MAX {
        return Err(Refusal::Request("more bytes than a request may have"));
    }
    let at = check_range(header.sector, len, rules)?;
    let mut segments = Segments::new();
    let mut count = 0;
    for piece in window(pieces, skip, len) {
        count += 1;
        if rules.features & SIZE_MAX != 0 && piece.len > SEGMENT_BYTES_MAX {
            return Err(Refusal::Request("a segment longer than offered"));
        }
        if !memory.translate(piece.at, u64::from(piece.len), &mut segments) {
            return Err(Refusal::Memory);
        }
    }
    if count > SEGMENTS_MAX {
        return Err(Refusal::Chain(ChainFault::TooLong));
    }
    let buf = guest_buf(&segments, memory);
    let written = if is_write { 1 } else { u32::try_from(len).unwrap_or(0) + 1 };
    let (direction, request) = if is_write {
        (Direction::Write, Request::Write { at, from: buf, durable: rules.durable })
    } else {
        (Direction::Read, Request::Read { at, into: buf })
    };
    Ok(Parsed::Execute(job(direction, request, len, written)))
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
fn ranges(header: &Header, body: &Body<'_>, memory: &MemoryMap, rules: &Rules) -> Result<Parsed, Refusal> {
    let is_discard = header.kind == blk::VIRTIO_BLK_T_DISCARD;
    if rules.read_only {
        return Err(Refusal::Request("a discard or write-zeroes request to a read-only disk"));
    }
    if rules.features & if is_discard { DISCARD } else { WRITE_ZEROES } == 0 {
        return Err(Refusal::Type(header.kind));
    }
    let len = usize::try_from(body.readable_bytes).unwrap_or(usize::MAX);
    let segments_max = RANGE_SEGMENTS_MAX as usize;
    if len == 0 || !len.is_multiple_of(RANGE_BYTES) || len / RANGE_BYTES > segments_max || body.writable_bytes > 0 {
        return Err(Refusal::Request("a discard or write-zeroes request without 1 to 32 whole segments"));
    }
    let mut bytes = [0u8; RANGE_BYTES * RANGE_SEGMENTS_MAX as usize];
    copy_from(body.readable, HEADER_BYTES, &mut bytes[..len], memory)?;
    let mut total = 0;
    let mut requests = Vec::with_capacity(len / RANGE_BYTES);
    for segment in bytes[..len].chunks_exact(RANGE_BYTES) {
        let (request, len) = range(segment, is_discard, rules)?;
        total += len;
        requests.push(request);
    }
    let direction = if is_discard { Direction::Discard } else { Direction::WriteZeroes };
    let mut rest = requests.into_iter();
    let first = rest.next().ok_or(Refusal::Request("no segment"))?;
    Ok(Parsed::Execute(Job { direction, first, rest: rest.collect(), bytes: total, written: 1 }))
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
    if sectors == 0 || sectors > RANGE_SECTORS_MAX {
        return Err(Refusal::Request("a segment of no sectors, or of more than offered"));
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
