//! Memory tables that make no sense, and memory that changes while requests use it.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::ring::*;
use super::support::*;

fn region(guest: u64, size: u64, user: u64, offset: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: size,
        userspace_addr: user,
        mmap_offset: offset,
        mmap_handle: -1,
    }
}

#[test]
fn tables() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    drop(Guest::new(&server.socket(), 1));
    server.wait_idle();
    let file = memfd(1 << 20).unwrap();
    let descriptors = settled_descriptors();
    let page = 4096;
    let rows: &[(&str, &[VhostUserMemoryRegionInfo])] = &[
        ("overlap in the guest", &[region(0, 8 * page, 0, 0), region(4 * page, page, 1 << 40, 0)]),
        ("overlap in the frontend", &[region(0, 8 * page, 0, 0), region(1 << 30, page, 4 * page, 0)]),
        ("the same twice", &[region(0, page, 0, 0), region(0, page, 0, 0)]),
        ("one inside the other", &[region(page, page, 1 << 40, 0), region(0, 8 * page, 0, 0)]),
        ("offset misaligned", &[region(0, page, 0, 1)]),
        ("offset behind the file", &[region(0, page, 0, 1 << 20)]),
        ("larger than the file", &[region(0, 2 << 20, 0, 0)]),
        ("16 EiB", &[region(0, u64::MAX, 0, 0)]),
        ("8 EiB", &[region(0, 1 << 63, 0, 0)]),
    ];
    for (name, regions) in rows {
        for one_by_one in [false, true] {
            let mut guest = Guest::connect(&server.socket(), 0);
            let regions: Vec<_> =
                regions.iter().map(|r| VhostUserMemoryRegionInfo { mmap_handle: file.as_raw_fd(), ..*r }).collect();
            let taken = if one_by_one {
                regions.iter().all(|r| guest.frontend.add_mem_region(r).is_ok())
            } else {
                guest.frontend.set_mem_table(&regions).is_ok()
            };
            assert!(!taken, "{name}");
            drop(guest);
            server.wait_idle();
            drop(Guest::new(&server.socket(), 1));
            server.wait_idle();
            until(&format!("{name}: descriptors are closed"), || open_descriptors() == descriptors);
        }
    }
    println!("memory tables: {} rows", rows.len() * 2);
}

#[test]
fn as_many_regions_as_were_offered_and_no_more() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::connect(&server.socket(), 0);
    let slots = guest.frontend.get_max_mem_slots().unwrap();
    let file = memfd(4096).unwrap();
    let nth = |i: u64| VhostUserMemoryRegionInfo {
        mmap_handle: file.as_raw_fd(),
        ..region(i << 20, 4096, 1 << 40 | i << 20, 0)
    };
    for i in 0..slots {
        guest.frontend.add_mem_region(&nth(i)).unwrap();
    }
    assert!(guest.frontend.add_mem_region(&nth(slots)).is_err());
}

#[test]
fn a_region_that_goes_while_a_request_uses_it() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    let extra = GuestMemory::new(1 << 32, 1 << 20);
    guest.frontend.add_mem_region(&extra.region()).unwrap();
    let expected = server.image.content();
    server.image.delay_ms.store(50, SeqCst);
    guest.header(T_IN, 8);
    guest.chain(0, 0, &[(HEADER, 16, 0), (1 << 32, 4096, WRITE), (STATUS, 1, WRITE)]);
    guest.submit(0, 0);
    until("the request runs", || server.image.running.load(SeqCst) == 1);
    guest.frontend.remove_mem_region(&extra.region()).unwrap();
    assert_eq!(server.image.running.load(SeqCst), 1, "removing a region does not wait");
    assert_eq!((guest.wait_used(0), guest.status()), ((0, 4097), S_OK));
    assert_eq!(extra.read(1 << 32, 4096), expected[4096..8192]);
    server.image.delay_ms.store(0, SeqCst);
    assert_eq!(guest.run(T_IN, 8, &[(1 << 32, 4096, WRITE)]), (S_IOERR, 1), "the region is still there");
    guest.frontend.add_mem_region(&extra.region()).unwrap();
    assert_eq!(guest.run(T_IN, 8, &[(1 << 32, 4096, WRITE)]), (S_OK, 4097));
}

#[test]
fn tables_are_swapped_while_requests_run() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    server.image.delay_ms.store(2, SeqCst);
    let mut guest = Guest::new(&server.socket(), 1);
    for i in 0..100u16 {
        guest.header(T_IN, 8);
        guest.memory.write(STATUS, &[0xaa]);
        guest.chain(0, i % 60, &[(HEADER, 16, 0), (DATA, 4096, WRITE), (STATUS, 1, WRITE)]);
        guest.submit(0, i % 60);
        guest.frontend.set_mem_table(&[guest.memory.region()]).unwrap();
        assert_eq!((guest.wait_used(0), guest.status()), ((u32::from(i % 60), 4097), S_OK));
    }
}

#[test]
fn a_ring_whose_memory_goes_stops_and_the_connection_goes_on() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    guest.read_sectors(0, 512);
    guest.frontend.remove_mem_region(&guest.memory.region()).unwrap();
    assert!(guest.is_broken(0));
    guest.frontend.add_mem_region(&guest.memory.region()).unwrap();
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 1);
    guest.start_queue(0, 1);
    guest.read_sectors(0, 512);
}
