//! What a daemon finds that takes over from a dead one: the inflight region, rings with and without answers, and nonsense.
//!
//! The region is laid out here by the vhost-user specification ("Inflight I/O tracking"), not by the code under test: it
//! is what a daemon of another version, or a hostile frontend, would leave.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};

use super::ring::*;
use super::support::*;
use super::vmm::{Survivor, Vmm};

const VMMS: [Vmm; 2] = [Vmm::Qemu, Vmm::CloudHypervisor];

/// One queue's part of a region that a frontend kept.
struct Region {
    file: File,
    part: u64,
}

impl Region {
    /// A fresh one, given to a frontend that has not connected yet.
    fn keep(survivor: &mut Survivor, queues: u16) -> Vec<Region> {
        let stride = (16 + 16 * u64::from(ENTRIES)).next_multiple_of(64);
        let file = memfd(stride * u64::from(queues)).unwrap();
        let info = VhostUserInflight::new(stride * u64::from(queues), 0, queues, ENTRIES);
        survivor.inflight = Some((info, file.try_clone().unwrap()));
        let one = |queue| {
            let region = Region { file: file.try_clone().unwrap(), part: stride * u64::from(queue) };
            region.put(8, &1u16.to_le_bytes());
            region.put(10, &ENTRIES.to_le_bytes());
            region
        };
        (0..queues).map(one).collect()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, self.part + at).unwrap();
    }

    fn set_head(&self, head: u16, in_flight: u8, next: u16, counter: u64) {
        let at = 16 + 16 * u64::from(head);
        self.put(at, &[in_flight]);
        self.put(at + 6, &next.to_le_bytes());
        self.put(at + 8, &counter.to_le_bytes());
    }

    fn set_last_batch(&self, head: u16, used_idx: u16) {
        self.put(12, &head.to_le_bytes());
        self.put(14, &used_idx.to_le_bytes());
    }

    fn is_in_flight(&self, head: u16) -> bool {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, self.part + 16 + 16 * u64::from(head)).unwrap();
        byte[0] != 0
    }
}

/// Lays out a write of one sector in the descriptors from `head` on, and announces it.
fn announce_write(guest: &mut Guest, queue: usize, head: u16, sector: u64, byte: u8) {
    let place = u64::from(head) * 1024;
    guest.header_at(HEADER + 0x1_0000 + place, T_OUT, sector);
    guest.memory.write(DATA + place, &[byte; 512]);
    guest.memory.write(DATA + place + 512, &[0xaa]);
    guest.chain(
        queue,
        head,
        &[(HEADER + 0x1_0000 + place, 16, 0), (DATA + place, 512, 0), (DATA + place + 512, 1, WRITE)],
    );
    guest.announce(queue, head);
}

fn status_of(guest: &Guest, head: u16) -> u8 {
    guest.memory.read(DATA + u64::from(head) * 1024 + 512, 1)[0]
}

/// A frontend whose daemon has just gone.
fn orphan(server: &TestServer, queues: usize, vmm: Vmm) -> Survivor {
    let mut survivor = Survivor::connect(&server.socket(), queues, ENTRIES, vmm).unwrap();
    hang_up(&survivor);
    server.wait_idle();
    survivor.guest.queues.iter_mut().for_each(|q| while q.call.read().is_ok() {});
    survivor
}

fn hang_up(survivor: &Survivor) {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open for as long as the frontend, which outlives this borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(survivor.guest.frontend.as_raw_fd()) };
    rustix::net::shutdown(fd, rustix::net::Shutdown::Both).unwrap();
}

#[test]
fn what_was_in_flight_is_run_again_in_the_order_of_its_submission() {
    let _alone = alone();
    let mut rng = Random::new("order");
    for vmm in VMMS {
        let server = TestServer::new(2, false);
        let mut survivor = orphan(&server, 2, vmm);
        let regions = Region::keep(&mut survivor, 2);
        for queue in 0..2 {
            // Heads in any order; the counters say which came first. Every other one goes to the same sector.
            let mut heads: Vec<u16> = (0..40).map(|i| i * 3).collect();
            for i in (1..heads.len()).rev() {
                heads.swap(i, rng.below(i as u64 + 1) as usize);
            }
            let first = rng.next() >> 1;
            for (i, &head) in heads.iter().enumerate() {
                let sector = 100 * (queue as u64 + 1) + if i % 2 == 0 { 0 } else { 1 + i as u64 };
                announce_write(&mut survivor.guest, queue, head, sector, i as u8 + 1);
                regions[queue].set_head(head, 1, 0, first + 7 * i as u64);
            }
            // Two more that nobody had taken.
            announce_write(&mut survivor.guest, queue, 200, 90, 90);
            announce_write(&mut survivor.guest, queue, 203, 91, 91);
            survivor.guest.queues[queue].next_avail = 42;
            heads.extend([200, 203]);
            if queue == 1 {
                survivor.reconnect(&server.socket()).unwrap();
            }
            let expected = heads;
            if queue == 1 {
                let answered: Vec<u16> = (0..42).map(|_| survivor.guest.wait_used(1).0 as u16).collect();
                assert_eq!(answered, expected, "{vmm:?}");
                let content = server.image.content();
                assert_eq!(content[200 * 512], 39, "{vmm:?}: the last write of the sector is not the last one");
                assert!(expected.iter().all(|&head| status_of(&survivor.guest, head) == S_OK));
                assert!((0..256).all(|head| !regions[1].is_in_flight(head)));
            }
        }
        (0..42).for_each(|_| assert!(survivor.guest.wait_used(0).0 < 256));
        for queue in 0..2 {
            assert_eq!((survivor.guest.poll_used(queue), survivor.guest.used_index(queue)), (None, 42), "{vmm:?}");
        }
    }
}

#[test]
fn what_was_announced_while_nobody_served_is_taken() {
    let _alone = alone();
    for vmm in VMMS {
        let server = TestServer::new(2, false);
        let mut survivor = Survivor::connect(&server.socket(), 2, ENTRIES, vmm).unwrap();
        for head in [0, 3, 6] {
            announce_write(&mut survivor.guest, 1, head, 5, head as u8);
            survivor.guest.kick(1);
            assert_eq!(survivor.guest.wait_used(1).0, u32::from(head));
        }
        hang_up(&survivor);
        server.wait_idle();
        for head in [9, 12, 15] {
            announce_write(&mut survivor.guest, 1, head, 6, head as u8);
        }
        // No kick: the daemon that would have eaten it is dead.
        survivor.reconnect(&server.socket()).unwrap();
        for head in [9u16, 12, 15] {
            let (answered, _) =
                survivor.guest.wait_used_for(1, Duration::from_secs(5)).expect("a request is forgotten");
            assert_eq!((answered as u16, status_of(&survivor.guest, head)), (head, S_OK), "{vmm:?}");
        }
        assert_eq!(survivor.guest.used_index(1), 6);
    }
}

#[test]
fn an_answer_that_was_not_told_any_more_is_told_by_the_next_daemon() {
    let _alone = alone();
    for vmm in VMMS {
        let server = TestServer::new(1, false);
        let mut survivor = Survivor::connect(&server.socket(), 1, ENTRIES, vmm).unwrap();
        announce_write(&mut survivor.guest, 0, 0, 5, 1);
        survivor.guest.kick(0);
        until("the request is answered", || survivor.guest.used_index(0) == 1);
        hang_up(&survivor);
        server.wait_idle();
        // As if the daemon had died between the used index and the call.
        while survivor.guest.queues[0].call.read().is_ok() {}
        survivor.reconnect(&server.socket()).unwrap();
        until("the driver is called", || survivor.guest.queues[0].call.read().is_ok());
    }
}

#[test]
fn a_ring_that_is_stopped_at_once_has_run_what_was_in_flight() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    for round in 0..300u64 {
        let mut survivor = orphan(&server, 1, Vmm::Qemu);
        let regions = Region::keep(&mut survivor, 1);
        for (i, head) in [6, 0, 3].into_iter().enumerate() {
            announce_write(&mut survivor.guest, 0, head, round, round as u8);
            regions[0].set_head(head, 1, 0, i as u64);
        }
        survivor.reconnect_and_stop(&server.socket()).unwrap();
        let told = survivor.guest.frontend.get_vring_base(0).unwrap();
        assert_eq!((told, survivor.guest.used_index(0)), (3, 3), "round {round}: requests in flight were left behind");
        assert_eq!(server.image.content()[round as usize * 512], round as u8);
        drop(survivor);
        server.wait_idle();
    }
}

/// After whatever somebody left in a region: the daemon serves others, and nothing of the disk has changed.
#[test]
fn nonsense_in_an_inflight_region_harms_nobody() {
    let _alone = alone();
    let mut rng = Random::new("nonsense");
    let server = TestServer::new(2, false);
    let before = server.image.content();
    let descriptors = settled_descriptors();
    for round in 0..150 {
        let vmm = VMMS[round % 2];
        let mut survivor = orphan(&server, 2, vmm);
        let regions = Region::keep(&mut survivor, 2);
        // A few honest reads of which the daemon knows nothing.
        for head in [0u16, 3, 6] {
            survivor.guest.header(T_IN, u64::from(head));
            let status = STATUS + u64::from(head);
            survivor.guest.chain(
                0,
                head,
                &[(HEADER, 16, 0), (DATA + u64::from(head) * 512, 512, WRITE), (status, 1, WRITE)],
            );
            survivor.guest.announce(0, head);
        }
        for region in &regions {
            match rng.below(5) {
                0 => {
                    let mut bytes = vec![0; 16 * usize::from(ENTRIES)];
                    rng.fill(&mut bytes);
                    region.put(16, &bytes);
                }
                // Flags on heads that nobody announced; the same counter; a counter at its end.
                1 => (0..ENTRIES).for_each(|head| region.set_head(head, 1, head, u64::MAX)),
                2 => (0..ENTRIES).step_by(5).for_each(|head| region.set_head(head, 0xff, u16::MAX, 0)),
                // A loop, and a chain that leaves the region.
                3 => (0..ENTRIES).for_each(|head| region.set_head(head, 1, [head ^ 1, 9999][head as usize % 2], 3)),
                _ => {}
            }
            region.set_last_batch(rng.next() as u16, rng.next() as u16);
            match rng.below(4) {
                0 => region.set_last_batch(rng.below(u64::from(ENTRIES)) as u16, 1),
                1 => region.put(0, &rng.next().to_le_bytes()),
                2 if rng.below(3) == 0 => region.put(8, &(rng.next() as u16).to_le_bytes()),
                _ => {}
            }
        }
        let wild = rng.next() as u16;
        if rng.below(2) == 0 {
            // The used index, too, is the guest's to write.
            survivor.guest.memory.word(survivor.guest.used_at(1)).store(wild, SeqCst);
        }
        // It may be refused, or its requests; the daemon may say that the ring broke.
        if survivor.reconnect(&server.socket()).is_ok() {
            survivor.guest.kick(0);
            survivor.guest.kick(1);
            survivor.guest.wait_used_for(0, Duration::from_millis(2));
        }
        drop(survivor);
        server.wait_idle();
    }
    let mut sane = Survivor::connect(&server.socket(), 2, ENTRIES, Vmm::Qemu).unwrap();
    assert_eq!(sane.guest.read_sectors(0, 4096), before[..4096]);
    drop(sane);
    server.wait_idle();
    assert!(server.image.content() == before, "the disk has changed");
    until("descriptors are closed", || open_descriptors() <= descriptors);
}

#[test]
fn cloud_hypervisor_connects_and_connects_again() {
    let _alone = alone();
    let server = TestServer::new(2, false);
    server.image.delay_ms.store(2, SeqCst);
    let mut survivor = Survivor::connect(&server.socket(), 2, ENTRIES, Vmm::CloudHypervisor).unwrap();
    let mut expected = 0;
    for round in 0..10u64 {
        for queue in 0..2 {
            for i in 0..8u16 {
                announce_write(
                    &mut survivor.guest,
                    queue,
                    queue as u16 * 100 + i * 3,
                    round * 8 + u64::from(i),
                    round as u8,
                );
            }
            survivor.guest.kick(queue);
        }
        // In the middle of them; what was taken is drained, the rest stays in the ring.
        hang_up(&survivor);
        server.wait_idle();
        survivor.reconnect(&server.socket()).unwrap();
        expected += 8;
        for queue in 0..2 {
            let mut heads: Vec<u32> = (0..8).map(|_| survivor.guest.wait_used(queue).0).collect();
            heads.sort_unstable();
            assert_eq!(heads, (0..8).map(|i| queue as u32 * 100 + i * 3).collect::<Vec<_>>(), "exactly once");
            assert_eq!(survivor.guest.used_index(queue), expected);
        }
        let content = server.image.content();
        assert!((0..8).all(|i| content[(round as usize * 8 + i) * 512] == round as u8));
    }
}

/// No frontend says it again, and the guest goes by it: a write that it was told of must outlive a power cut.
#[test]
fn a_guest_that_switched_to_writethrough_stays_there() {
    let _alone = alone();
    for vmm in VMMS {
        let server = TestServer::new(1, false);
        let durable = || server.image.durable_writes.load(SeqCst);
        let mut survivor = Survivor::connect(&server.socket(), 1, ENTRIES, vmm).unwrap();
        let again = |survivor: &mut Survivor| {
            hang_up(survivor);
            server.wait_idle();
            survivor.reconnect(&server.socket()).unwrap();
            let before = durable();
            survivor.guest.write_sectors(0, &[1; 512]);
            durable() - before
        };
        assert_eq!(again(&mut survivor), 0, "{vmm:?}: writeback, as at the start");
        survivor.guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
        assert_eq!(again(&mut survivor), 1, "{vmm:?}");
        assert_eq!(again(&mut survivor), 1, "{vmm:?}: also the second time");
        survivor.guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();
        assert_eq!(again(&mut survivor), 0, "{vmm:?}: and it may switch back");
    }
}
