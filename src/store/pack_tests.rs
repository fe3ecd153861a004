//! The bytes of packs as docs/on-disk-format.md has them, what is left of torn and flipped ones, and what places take.
//!
//! What a kill or a power cut leaves of a whole pack is for `tests/packs`.

use super::format::{ENTRIES_MAX, Entry, Header};
use super::*;

const ID: Uuid = Uuid::from_u128(0x0123_4567_89ab_cdef);
const KEY: Uuid = Uuid::from_u128(0xfedc_ba98_7654_3210);

fn put(unit: &mut [u8], at: usize, bytes: &[u8]) {
    unit[at..at + bytes.len()].copy_from_slice(bytes);
}

fn header(entries: usize) -> Header {
    let entry = |i: u64| Entry { block: 1000 + i, bytes: Some((Place(100 + u32::try_from(i).unwrap()), 77)) };
    Header { sequence: 9, arrived: 8, synced: 5, span: 3, entries: (0..entries as u64).map(entry).collect() }
}

fn encoded(header: &Header) -> Vec<u8> {
    let mut unit = vec![0; UNIT_BYTES];
    header.encode(KEY, Place(42), &mut unit);
    unit
}

#[test]
fn the_first_unit_is_as_the_page_says() {
    let mut unit = vec![0; 4096];
    put(&mut unit, 0, b"HSPACK01");
    put(&mut unit, 8, &1u32.to_le_bytes());
    put(&mut unit, 12, &4096u32.to_le_bytes());
    put(&mut unit, 16, &(1u64 << 30).to_le_bytes());
    put(&mut unit, 24, ID.as_bytes());
    put(&mut unit, 40, KEY.as_bytes());
    put(&mut unit, 56, &8192u32.to_le_bytes());
    let crc = crc32fast::hash(&unit[..64]);
    put(&mut unit, 64, &crc.to_le_bytes());
    let identity = Identity { id: ID, key: KEY, size_bytes: 1 << 30, block_bytes: 8192 };
    let mut made = vec![1; 4096];
    identity.encode(&mut made);
    assert!(made == unit);
    assert_eq!(Identity::decode(&unit), Ok(identity));
}

#[test]
fn a_header_is_as_the_page_says() {
    let mut unit = vec![0; 4096];
    put(&mut unit, 0, b"HSPACKHD");
    put(&mut unit, 8, KEY.as_bytes());
    put(&mut unit, 24, &42u32.to_le_bytes());
    put(&mut unit, 28, &3u32.to_le_bytes());
    put(&mut unit, 32, &9u64.to_le_bytes());
    put(&mut unit, 40, &8u64.to_le_bytes());
    put(&mut unit, 48, &5u64.to_le_bytes());
    put(&mut unit, 56, &2u32.to_le_bytes());
    put(&mut unit, 64, &1000u64.to_le_bytes());
    put(&mut unit, 72, &100u32.to_le_bytes());
    put(&mut unit, 76, &77u32.to_le_bytes());
    put(&mut unit, 80, &1001u64.to_le_bytes()); // Zeros: no place, no checksum.
    let mut crc = crc32fast::Hasher::new();
    crc.update(&unit[..60]);
    crc.update(&unit[64..]);
    put(&mut unit, 60, &crc.finalize().to_le_bytes());
    let mut expected = header(2);
    expected.entries[1].bytes = None;
    assert!(encoded(&expected) == unit);
    assert_eq!(Header::decode(KEY, Place(42), &unit), Some(expected));
    assert_eq!(ENTRIES_MAX, 252);
}

#[test]
fn a_header_counts_where_it_was_put_in_its_own_pack() {
    let unit = encoded(&header(3));
    assert_eq!(Header::decode(KEY, Place(43), &unit), None, "a copy of it is none");
    assert_eq!(Header::decode(ID, Place(42), &unit), None, "that of another pack is none");
}

#[test]
fn a_header_that_is_torn_anywhere_is_the_old_one_or_the_new_one_or_none() {
    let old = Header { sequence: 4, ..header(ENTRIES_MAX) };
    let mut new = header(5);
    new.entries.iter_mut().for_each(|entry| entry.block += 1 << 40);
    for (old, new) in [(&old, &new), (&new, &old)] {
        let (before, after) = (encoded(old), encoded(new));
        for at in 0..=UNIT_BYTES {
            for torn in [[&after[..at], &before[at..]].concat(), [&before[..at], &after[at..]].concat()] {
                let found = Header::decode(KEY, Place(42), &torn);
                assert!(found.is_none_or(|found| found == *old || found == *new), "torn at {at}");
            }
        }
    }
}

#[test]
fn every_flipped_bit_of_a_header_is_found() {
    let mut unit = encoded(&header(7));
    for bit in 0..UNIT_BYTES * 8 {
        unit[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Header::decode(KEY, Place(42), &unit), None, "bit {bit}");
        unit[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn a_million_blocks_of_a_large_disk_take_little_memory() {
    const BLOCKS: u64 = 1 << 28;
    let units = units_of(BLOCKS * 4096, 4096).unwrap();
    let mut places = Places::new(1, 1 << 28, units);
    for first in (0..1_000_000u64).step_by(32) {
        let grant = places.grant(32).unwrap();
        let entry = |i: u64| {
            let place = Place(grant.units[0].start + u32::try_from(i).unwrap());
            Entry { block: (first + i).wrapping_mul(0x9e37_79b1) % BLOCKS, bytes: Some((place, 0)) }
        };
        let entries: Vec<Entry> = (0..32).map(entry).collect();
        places.arrive(&grant, &entries);
    }
    assert_eq!(places.count(), 1_000_000);
    // With the bits that say which blocks count: all of their pages.
    let bytes = places.memory_bytes() as u64 + BLOCKS / 8;
    println!("{} KiB of places, {} KiB with bits", places.memory_bytes() >> 10, bytes >> 10);
    assert!(bytes <= 64 << 20, "{bytes} bytes");
}
