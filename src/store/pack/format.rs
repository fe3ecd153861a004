//! The bytes of a pack: its first unit, and headers (docs/on-disk-format.md, "Packs").
//!
//! What always holds:
//! - What is decoded was encoded for this pack, at this position, and is whole: anything else is no header. A guest's bytes
//!   cannot pass for one, because a header carries a key that only the pack's first unit has.
//! - A header names blocks, and where the bytes of each are, with their checksum.

use uuid::Uuid;

/// What places are counted in. A header takes one unit.
pub(super) const UNIT_BYTES: usize = 4096;
/// Blocks that one header can name.
pub(super) const ENTRIES_MAX: usize = (UNIT_BYTES - ENTRIES_AT) / ENTRY_BYTES;

const MAGIC: [u8; 8] = *b"HSPACK01";
const FORMAT: u32 = 1;
const FIRST_CRC_AT: usize = 64;

const HEADER_MAGIC: [u8; 8] = *b"HSPACKHD";
const HEADER_CRC_AT: usize = 60;
const ENTRIES_AT: usize = 64;
const ENTRY_BYTES: usize = 16;

/// A place in a pack, in units from its beginning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Place(pub(super) u32);

/// What a pack is, once and for all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    /// Its UUID.
    pub(super) id: Uuid,
    /// What its headers carry, and nobody else knows.
    pub(super) key: Uuid,
    /// Bytes of the disk whose blocks it has.
    pub(super) size_bytes: u64,
    pub(super) block_bytes: u32,
}

/// What a header says of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) block: u64,
    /// Where its bytes are and their checksum; None if they are zeros.
    pub(super) bytes: Option<(Place, u32)>,
}

/// What went into a pack at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Header {
    /// Grows from header to header. Of two that name a block the higher one is right.
    pub(super) sequence: u64,
    /// All headers up to this one, and the bytes of their blocks, had arrived when this one was written.
    pub(super) arrived: u64,
    /// They had been synced.
    pub(super) synced: u64,
    /// Units from here to the next place of a header.
    pub(super) span: u32,
    pub(super) entries: Vec<Entry>,
}

impl Identity {
    /// Fills the pack's first unit.
    pub(super) fn encode(&self, out: &mut [u8]) {
        out.fill(0);
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        out[12..16].copy_from_slice(&4096u32.to_le_bytes());
        out[16..24].copy_from_slice(&self.size_bytes.to_le_bytes());
        out[24..40].copy_from_slice(self.id.as_bytes());
        out[40..56].copy_from_slice(self.key.as_bytes());
        out[56..60].copy_from_slice(&self.block_bytes.to_le_bytes());
        let crc = crc32fast::hash(&out[..FIRST_CRC_AT]);
        out[FIRST_CRC_AT..FIRST_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// What the first unit says, or what is wrong with it.
    pub(super) fn decode(found: &[u8]) -> Result<Identity, &'static str> {
        let identity = Identity {
            id: uuid_at(found, 24),
            key: uuid_at(found, 40),
            size_bytes: u64_at(found, 16),
            block_bytes: u32_at(found, 56),
        };
        let mut expected = vec![0; found.len()];
        identity.encode(&mut expected);
        if found[..8] != expected[..8] || u32_at(found, FIRST_CRC_AT) != crc32fast::hash(&found[..FIRST_CRC_AT]) {
            Err("its first unit does not match its checksum")
        } else if found != expected {
            Err("it has a format that this program does not know")
        } else {
            Ok(identity)
        }
    }
}

impl Header {
    /// Fills the unit at `place`.
    ///
    /// # Panics
    /// When there are too many entries.
    pub(super) fn encode(&self, key: Uuid, place: Place, out: &mut [u8]) {
        assert!(self.entries.len() <= ENTRIES_MAX, "a header has room for {ENTRIES_MAX} entries");
        out.fill(0);
        out[..8].copy_from_slice(&HEADER_MAGIC);
        out[8..24].copy_from_slice(key.as_bytes());
        out[24..28].copy_from_slice(&place.0.to_le_bytes());
        out[28..32].copy_from_slice(&self.span.to_le_bytes());
        out[32..40].copy_from_slice(&self.sequence.to_le_bytes());
        out[40..48].copy_from_slice(&self.arrived.to_le_bytes());
        out[48..56].copy_from_slice(&self.synced.to_le_bytes());
        let count = u32::try_from(self.entries.len()).expect("few");
        out[56..60].copy_from_slice(&count.to_le_bytes());
        for (entry, out) in self.entries.iter().zip(out[ENTRIES_AT..].chunks_exact_mut(ENTRY_BYTES)) {
            let (place, crc) = entry.bytes.unwrap_or((Place(0), 0));
            out[..8].copy_from_slice(&entry.block.to_le_bytes());
            out[8..12].copy_from_slice(&place.0.to_le_bytes());
            out[12..].copy_from_slice(&crc.to_le_bytes());
        }
        let crc = header_checksum(out);
        out[HEADER_CRC_AT..ENTRIES_AT].copy_from_slice(&crc.to_le_bytes());
    }

    /// Whether a header of this pack was written at `place`, be it whole or not.
    pub(super) fn is_begun(key: Uuid, place: Place, found: &[u8]) -> bool {
        found[..8] == HEADER_MAGIC && found[8..24] == *key.as_bytes() && u32_at(found, 24) == place.0
    }

    /// The header that is at `place`; None if there is none of this pack, or it is not whole.
    pub(super) fn decode(key: Uuid, place: Place, found: &[u8]) -> Option<Header> {
        let count = usize::try_from(u32_at(found, 56)).ok()?;
        if !Header::is_begun(key, place, found)
            || count > ENTRIES_MAX
            || u32_at(found, HEADER_CRC_AT) != header_checksum(found)
        {
            return None;
        }
        let entries = found[ENTRIES_AT..].chunks_exact(ENTRY_BYTES).take(count).map(|entry| {
            let bytes = (Place(u32_at(entry, 8)), u32_at(entry, 12));
            Entry { block: u64_at(entry, 0), bytes: Some(bytes).filter(|(place, _)| place.0 > 0) }
        });
        Some(Header {
            sequence: u64_at(found, 32),
            arrived: u64_at(found, 40),
            synced: u64_at(found, 48),
            span: u32_at(found, 28),
            entries: entries.collect(),
        })
    }
}

fn header_checksum(unit: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&unit[..HEADER_CRC_AT]);
    crc.update(&unit[ENTRIES_AT..]);
    crc.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn uuid_at(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_slice(&bytes[at..at + 16]).expect("sixteen bytes")
}
