//! Requests of any length, in any number of segments, on rings of any size: what was offered to the driver is a hint.

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::ring::*;
use super::support::*;

const LARGE_DISK_BYTES: usize = 48 << 20;

/// Pieces of `len` bytes each, `count` of them, from DATA on; every other place of the guest's is between them.
fn pieces(count: usize, len: u32, flags: u16) -> Vec<(u64, u32, u16)> {
    (0..count as u64).map(|i| (DATA + i * u64::from(len), len, flags)).collect()
}

fn large_server() -> TestServer {
    TestServer::on(MemImage::new(LARGE_DISK_BYTES), 1, false, 1)
}

fn guest_with_ring(server: &TestServer, entries: u16, without: u64) -> Guest {
    let mut guest = Guest::with(&server.socket(), 0, without);
    guest.add_queue(0, entries);
    guest.start_queue(0, 0);
    guest
}

/// Runs a request whose descriptors are in an indirect table.
fn run_indirect(guest: &mut Guest, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
    let table_at = DATA + (56 << 20);
    guest.header(kind, sector);
    guest.memory.write(STATUS, &[0xaa]);
    let mut pieces = vec![(HEADER, 16, 0)];
    pieces.extend_from_slice(data);
    pieces.push((STATUS, 1, WRITE));
    let last = pieces.len() - 1;
    let link = |i: usize| if i < last { (NEXT, i as u16 + 1) } else { (0, 0) };
    let table: Vec<u8> = pieces
        .iter()
        .enumerate()
        .flat_map(|(i, &(at, len, flags))| encode((at, len, flags | link(i).0, link(i).1)))
        .collect();
    guest.memory.write(table_at, &table);
    guest.descriptor(0, 0, (table_at, table.len() as u32, INDIRECT, 0));
    guest.submit(0, 0);
    let (id, written) = guest.wait_used(0);
    assert_eq!(id, 0);
    (guest.status(), written)
}

#[test]
fn a_request_has_what_the_ring_can_hold() {
    let _alone = alone();
    let mut random = Random::new("a_request_has_what_the_ring_can_hold");
    let server = large_server();
    let mut expected = server.image.content();
    let rows = [
        ("1 MiB in one segment", 256, 1, 1 << 20),
        ("40 MiB in one segment", 256, 1, 40 << 20),
        ("254 segments of 4 KiB", 256, 254, 4096),
        ("a sector in pieces of a byte", 1024, 512, 1),
        ("pieces of 3 bytes", 4096, 2048, 3),
        ("1025 segments", 2048, 1025, 512),
        ("pieces that are no sectors", 4096, 4000, 3 * 512 + 128),
        ("40 MiB in pages", 16384, 10240, 4096),
        ("all that the largest ring holds", 32768, 32766 / 2 * 2, 1024),
    ];
    for (name, entries, count, len) in rows {
        for is_indirect in [false, true] {
            let ring = if is_indirect { 4 } else { entries };
            let mut guest = guest_with_ring(&server, ring, 0);
            let total = count * len as usize;
            assert_eq!(total % 512, 0, "{name}");
            let sector = random.below(((LARGE_DISK_BYTES - total) / 512) as u64 + 1);
            let at = sector as usize * 512;
            let mut run = |kind, flags| match is_indirect {
                true => run_indirect(&mut guest, kind, sector, &pieces(count, len, flags)),
                false => guest.run(kind, sector, &pieces(count, len, flags)),
            };
            assert_eq!(run(T_IN, WRITE), (S_OK, total as u32 + 1), "{name}");
            assert!(guest.memory.read(DATA, total) == expected[at..at + total], "{name}: what was read");
            let mut bytes = vec![0; total];
            random.fill(&mut bytes);
            guest.memory.write(DATA, &bytes);
            let mut run = |kind, flags| match is_indirect {
                true => run_indirect(&mut guest, kind, sector, &pieces(count, len, flags)),
                false => guest.run(kind, sector, &pieces(count, len, flags)),
            };
            assert_eq!(run(T_OUT, 0), (S_OK, 1), "{name}");
            expected[at..at + total].copy_from_slice(&bytes);
            assert!(server.image.content() == expected, "{name}: what was written");
            drop(guest);
            server.wait_idle();
        }
    }
}

#[test]
fn rings_of_every_size() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let expected = server.image.content();
    for power in 1..=15u32 {
        let entries = 1u16 << power;
        for without in [0, F_INDIRECT, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX] {
            let mut guest = guest_with_ring(&server, entries, without);
            // Small rings go round several times.
            for i in 0..20u64 {
                if without & F_INDIRECT == 0 {
                    assert_eq!(run_indirect(&mut guest, T_IN, i, &[(DATA, 512, WRITE)]), (S_OK, 513));
                } else if entries > 2 {
                    assert_eq!(guest.run(T_IN, i, &[(DATA, 512, WRITE)]), (S_OK, 513));
                } else {
                    assert_eq!(guest.run(T_FLUSH, 0, &[]), (S_OK, 1));
                    continue;
                }
                assert_eq!(guest.memory.read(DATA, 512), expected[i as usize * 512..][..512], "{entries} entries");
            }
            drop(guest);
            server.wait_idle();
        }
    }
}

/// More is announced at once than may be in flight; all of it is answered, and the rest waits in the ring meanwhile.
#[test]
fn a_full_ring_of_long_requests() {
    let _alone = alone();
    let server = large_server();
    let mut guest = guest_with_ring(&server, 4096, 0);
    let table_at = DATA + (40 << 20);
    let count = 4094u16;
    let mut table = encode((HEADER, 16, NEXT, 1)).to_vec();
    for i in 0..count {
        table.extend(encode((DATA + u64::from(i) * 512, 512, NEXT | WRITE, i + 2)));
    }
    table.extend(encode((STATUS, 1, WRITE, 0)));
    guest.memory.write(table_at, &table);
    guest.header(T_IN, 0);
    for head in 0..200 {
        guest.descriptor(0, head, (table_at, table.len() as u32, INDIRECT, 0));
        guest.announce(0, head);
    }
    guest.kick(0);
    for _ in 0..200 {
        assert_eq!(guest.wait_used(0).1, u32::from(count) * 512 + 1);
    }
    assert!(guest.memory.read(DATA, usize::from(count) * 512) == server.image.content()[..usize::from(count) * 512]);
}

#[test]
fn a_part_that_fails_fails_the_request() {
    let _alone = alone();
    let server = large_server();
    let before = server.image.content();
    let mut guest = guest_with_ring(&server, 256, 0);
    server.image.fails_from.store(33 << 20, SeqCst);
    assert_eq!(guest.run(T_IN, 0, &[(DATA, 40 << 20, WRITE)]), (S_IOERR, 1));
    guest.memory.write(DATA, &[7; 512]);
    assert_eq!(guest.run(T_OUT, 0, &[(DATA, 40 << 20, 0)]), (S_IOERR, 1));
    server.image.fails_from.store(u64::MAX, SeqCst);
    assert!(server.image.content()[33 << 20..] == before[33 << 20..]);
    assert_eq!(guest.run(T_IN, 0, &[(DATA, 40 << 20, WRITE)]), (S_OK, (40 << 20) + 1));
}

#[test]
fn more_ranges_than_offered() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    let mut expected = server.image.content();
    for (kind, from) in [(T_DISCARD, 0u64), (T_WRITE_ZEROES, 4096)] {
        let bytes: Vec<u8> = (0..200).flat_map(|i| range(from + i * 16, 8, 0)).collect();
        guest.memory.write(DATA, &bytes);
        assert_eq!(guest.run(kind, 0, &[(DATA, bytes.len() as u32, 0)]), (S_OK, 1));
        for i in 0..200 {
            expected[(from as usize + i * 16) * 512..][..8 * 512].fill(0);
        }
    }
    assert!(server.image.content() == expected);
}

/// A large discard is a call or few, also where there is something, and readers go on beside many of them.
#[test]
fn large_discards_cost_few_calls_and_hold_up_no_reader() {
    let _alone = alone();
    let server = large_server();
    let mut guest = guest_with_ring(&server, 256, 0);
    guest.memory.write(DATA, &range(0, 40 << 11, 0));
    assert_eq!(guest.run(T_DISCARD, 0, &[(DATA, 16, 0)]), (S_OK, 1));
    assert_eq!(server.image.zeroes.load(SeqCst), 1);
    assert!(server.image.content()[..40 << 20].iter().all(|&b| b == 0));
    server.image.delay_ms.store(100, SeqCst);
    guest.header(T_DISCARD, 0);
    for i in 0..64u16 {
        guest.chain(0, i * 3, &[(HEADER, 16, 0), (DATA, 16, 0), (STATUS, 1, WRITE)]);
        guest.announce(0, i * 3);
    }
    guest.kick(0);
    until("the discards run", || server.image.running.load(SeqCst) > 0);
    // No more of them than leave room for others.
    assert!(server.image.running.load(SeqCst) <= 2, "{} at once", server.image.running.load(SeqCst));
    let header = HEADER + 64;
    guest.header_at(header, T_IN, 47 << 11);
    guest.chain(0, 200, &[(header, 16, 0), (DATA + 4096, 512, WRITE), (STATUS + 1, 1, WRITE)]);
    guest.submit(0, 200);
    let before = std::iter::from_fn(|| Some(guest.wait_used(0).0)).take_while(|head| *head != 200).count();
    assert!(before < 16, "{before} of the discards were answered before the read");
    for _ in before..64 {
        guest.wait_used(0);
    }
    server.image.delay_ms.store(0, SeqCst);
}

/// The size of a ring is known after the config space was read: the next one is told what such a ring holds.
#[test]
fn a_ring_that_is_too_small_is_found_out() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let segments = |guest: &mut Guest| {
        use vhost::vhost_user::VhostUserFrontend;
        let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
        let config = guest.frontend.get_config(12, 4, flags, &[0; 4]).unwrap().1;
        u32::from_le_bytes(config[..4].try_into().unwrap())
    };
    for (entries, without, told) in [(8, 0, 126), (256, F_INDIRECT, 126), (8, F_INDIRECT, 6), (4, F_INDIRECT, 2)] {
        let mut guest = guest_with_ring(&server, entries, without);
        guest.read_sectors(0, 512);
        drop(guest);
        server.wait_idle();
        assert_eq!(segments(&mut Guest::connect(&server.socket(), 0)), told);
        server.wait_idle();
    }
}

/// What drivers of virtio 0.9 send, and how QEMU takes it.
#[test]
fn request_types_of_the_first_drivers() {
    let _alone = alone();
    const BARRIER: u32 = 0x8000_0000;
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    let mut expected = server.image.content();
    for (syncs, kind) in [(1, T_FLUSH | 1), (2, T_FLUSH | BARRIER), (3, T_FLUSH | 1 | BARRIER)] {
        assert_eq!(guest.run(kind, 0, &[]), (S_OK, 1), "type {kind:#x}");
        assert_eq!(server.image.syncs.load(SeqCst), syncs, "type {kind:#x}");
        guest.memory.write(DATA, &[kind as u8; 512]);
        assert_eq!(guest.run(T_OUT | BARRIER, 3, &[(DATA, 512, 0)]), (S_OK, 1));
        expected[3 * 512..4 * 512].fill(kind as u8);
    }
    assert_eq!(guest.run(T_IN | BARRIER, 3, &[(DATA, 512, WRITE)]), (S_OK, 513));
    assert_eq!(guest.memory.read(DATA, 512), expected[3 * 512..4 * 512]);
    for kind in [T_GET_ID, T_GET_ID | 1, T_GET_ID | BARRIER] {
        assert_eq!(guest.run(kind, 0, &[(DATA, 7, WRITE)]), (S_OK, 8));
        assert_eq!(guest.memory.read(DATA, 7), SERIAL.as_bytes()[..7]);
    }
    assert!(server.image.content() == expected);
}

/// The library checks segments against what was offered.
#[test]
fn another_client_reads_a_megabyte_in_one_segment() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let (mut blkio, mut queues) = super::blkio_client::connect(&server.socket(), 1, false);
    let region = blkio.alloc_mem_region(1 << 20).unwrap();
    blkio.map_mem_region(&region).unwrap();
    queues[0].read(0, region.addr as *mut u8, 1 << 20, 0, blkio::ReqFlags::empty());
    let mut out = [MaybeUninit::<blkio::Completion>::uninit()];
    let mut timeout = Duration::from_secs(10);
    assert_eq!(queues[0].do_io(&mut out, 1, Some(&mut timeout), None).unwrap(), 1);
    // SAFETY: do_io has filled it.
    assert_eq!(unsafe { out[0].assume_init_ref() }.ret, 0);
    // SAFETY: the region is mapped, and nothing is in flight.
    let read = unsafe { std::slice::from_raw_parts(region.addr as *const u8, 1 << 20) };
    assert!(read == &server.image.content()[..1 << 20]);
}
