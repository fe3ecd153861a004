//! Descriptor chains: from a head in the ring to lists of guest addresses, read once.
//!
//! What always holds: every descriptor is copied out of guest memory exactly once and only the copy is looked at; the
//! walk ends after a bounded number of steps whatever the guest wrote, which is what its ring or indirect table can hold; a
//! chain whose end cannot be found has no status.
//!
//! It does not know what the bytes mean; that is [`super::request`]. Addresses are not yet checked against memory.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::features::RING_ENTRIES_MAX;
use super::memory::GuestAddress;
use super::ring::{RawDescriptor, Ring};

const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;
const INDIRECT: u32 = VRING_DESC_F_INDIRECT;
const DESCRIPTOR_BYTES: u32 = 16;

/// A piece of guest memory, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) at: GuestAddress,
    pub(super) len: u32,
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainFault {
    #[error("a descriptor names one that its table does not have")]
    IndexOutOfRange,
    #[error("the chain is longer than its table, so it has a loop")]
    Loop,
    #[error("an indirect table, which was not negotiated")]
    IndirectNotNegotiated,
    #[error("an indirect table inside an indirect table")]
    IndirectInsideIndirect,
    #[error("an indirect table of {0} bytes")]
    IndirectSize(u32),
    #[error("an indirect table with a next descriptor behind it")]
    IndirectAndNext,
    #[error("an indirect table outside the guest's memory")]
    IndirectOutside,
    #[error("a descriptor of no bytes")]
    Empty,
    #[error("a readable descriptor after a writable one")]
    Order,
}

/// A chain as the guest wrote it: unvalidated pieces. Reused from request to request.
#[derive(Debug, Default)]
pub(super) struct RawChain {
    pieces: Vec<Piece>,
    readable: usize,
    steps: usize,
    table: Vec<u8>,
    status: Option<GuestAddress>,
}

impl RawChain {
    /// The pieces that the device reads.
    pub(super) fn readable(&self) -> &[Piece] {
        &self.pieces[..self.readable]
    }

    /// The pieces that the device writes, status included.
    pub(super) fn writable(&self) -> &[Piece] {
        &self.pieces[self.readable..]
    }

    /// Where the status byte goes: the last writable byte. None when the chain's end is not a writable descriptor, or
    /// cannot be found.
    pub(super) fn status(&self) -> Option<GuestAddress> {
        self.status
    }

    /// How many descriptors were read.
    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    /// Reads the chain that starts at `head`.
    ///
    /// # Errors
    /// The first fault. [`RawChain::status`] then still says where an error can be reported, if anywhere.
    pub(super) fn read(&mut self, ring: &Ring, head: u16) -> Result<(), ChainFault> {
        self.pieces.clear();
        self.readable = 0;
        self.steps = 0;
        self.status = None;
        let mut flaw = None;
        let walked = self.walk(ring, head, &mut flaw);
        if walked.is_err() {
            // The end was not found, so what was seen last is not the status.
            self.status = None;
        }
        walked.and(flaw.map_or(Ok(()), Err))
    }

    fn walk(&mut self, ring: &Ring, head: u16, flaw: &mut Option<ChainFault>) -> Result<(), ChainFault> {
        let mut index = head;
        for _ in 0..ring.setup().entries {
            let d = ring.descriptor(index).ok_or(ChainFault::IndexOutOfRange)?;
            let flags = u32::from(d.flags);
            if flags & INDIRECT != 0 {
                if flags & NEXT != 0 {
                    return Err(ChainFault::IndirectAndNext);
                }
                return self.read_indirect(ring, &d, flaw);
            }
            self.add(&d, flaw);
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = d.next;
        }
        Err(ChainFault::Loop)
    }

    fn read_indirect(
        &mut self,
        ring: &Ring,
        table: &RawDescriptor,
        flaw: &mut Option<ChainFault>,
    ) -> Result<(), ChainFault> {
        if !ring.setup().indirect {
            return Err(ChainFault::IndirectNotNegotiated);
        }
        let entries_max = u32::from(RING_ENTRIES_MAX);
        if table.len == 0 || !table.len.is_multiple_of(DESCRIPTOR_BYTES) || table.len / DESCRIPTOR_BYTES > entries_max {
            return Err(ChainFault::IndirectSize(table.len));
        }
        // All of it is copied, however little of it is used.
        self.steps += table.len as usize / DESCRIPTOR_BYTES as usize;
        let mut bytes = std::mem::take(&mut self.table);
        bytes.resize(table.len as usize, 0);
        let read = ring.memory().copy_out(GuestAddress(table.address), &mut bytes);
        let walked = if read { self.walk_table(&bytes, flaw) } else { Err(ChainFault::IndirectOutside) };
        self.table = bytes;
        walked
    }

    fn walk_table(&mut self, table: &[u8], flaw: &mut Option<ChainFault>) -> Result<(), ChainFault> {
        let (entries, _) = table.as_chunks::<{ DESCRIPTOR_BYTES as usize }>();
        let mut index = 0u16;
        for _ in 0..entries.len() {
            let d = RawDescriptor::parse(entries.get(usize::from(index)).ok_or(ChainFault::IndexOutOfRange)?);
            let flags = u32::from(d.flags);
            if flags & INDIRECT != 0 {
                return Err(ChainFault::IndirectInsideIndirect);
            }
            self.add(&d, flaw);
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = d.next;
        }
        Err(ChainFault::Loop)
    }

    /// Adds a descriptor. What is wrong with it alone is kept in `flaw`, so that the walk can go on to the status.
    fn add(&mut self, d: &RawDescriptor, flaw: &mut Option<ChainFault>) {
        self.steps += 1;
        let is_writable = u32::from(d.flags) & WRITE != 0;
        let found = if d.len == 0 {
            Some(ChainFault::Empty)
        } else if !is_writable && self.pieces.len() > self.readable {
            Some(ChainFault::Order)
        } else {
            None
        };
        self.status = None;
        if is_writable && d.len > 0 {
            self.status = d.address.checked_add(u64::from(d.len) - 1).map(GuestAddress);
        }
        if let Some(found) = found {
            flaw.get_or_insert(found);
            return;
        }
        self.pieces.push(Piece { at: GuestAddress(d.address), len: d.len });
        if !is_writable {
            self.readable = self.pieces.len();
        }
    }
}

impl RawDescriptor {
    fn parse(bytes: &[u8; DESCRIPTOR_BYTES as usize]) -> RawDescriptor {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = *bytes;
        RawDescriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }
}
