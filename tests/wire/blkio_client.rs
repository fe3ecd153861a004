//! blkio: a vhost-user-blk client that somebody else wrote, against a byte array.

use halfsilver::vhost_user::Server as _;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags, iovec};

use super::support::*;

const BUFFER: usize = 16 << 10;

pub fn connect(socket: &Path, queues: i32, read_only: bool) -> (Blkio, Vec<Blkioq>) {
    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", socket.to_str().unwrap()).unwrap();
    blkio.set_bool("read-only", read_only).unwrap();
    blkio.connect().unwrap();
    blkio.set_i32("num-queues", queues).unwrap();
    let queues = blkio.start().unwrap().queues;
    (blkio, queues)
}

fn region(blkio: &mut Blkio, len: usize) -> MemoryRegion {
    let region = blkio.alloc_mem_region(len).unwrap();
    blkio.map_mem_region(&region).unwrap();
    region
}

/// Waits for `n` answers: who was answered, and how.
fn answers(queue: &mut Blkioq, n: usize) -> Vec<(usize, i32)> {
    let mut out: Vec<MaybeUninit<Completion>> = (0..n).map(|_| MaybeUninit::uninit()).collect();
    let mut timeout = Duration::from_secs(10);
    let got = queue.do_io(&mut out, n, Some(&mut timeout), None).unwrap();
    assert_eq!(got, n, "answers are missing");
    // SAFETY: do_io has filled the first `got` of them.
    out[..got].iter().map(|c| unsafe { c.assume_init_ref() }).map(|c| (c.user_data, c.ret)).collect()
}

fn slice<'a>(region: MemoryRegion, index: usize) -> &'a mut [u8] {
    assert!((index + 1) * BUFFER <= region.len);
    // SAFETY: the region is mapped until it is freed; tests use one slice at a time, with no request on it.
    unsafe { std::slice::from_raw_parts_mut((region.addr + index * BUFFER) as *mut u8, BUFFER) }
}

#[test]
fn random_requests_against_a_byte_array() {
    let _alone = alone();
    let mut random = Random::new("random_requests_against_a_byte_array");
    let server = TestServer::new(4, false);
    let mut expected = server.image.content();
    let (mut blkio, mut queues) = connect(&server.socket(), 4, false);
    assert_eq!(blkio.get_u64("capacity").unwrap(), DISK_BYTES as u64);
    let memory = region(&mut blkio, BUFFER * 64);
    const DEPTH: usize = 40;
    for round in 0..300 {
        // Requests at once do not overlap: each has a part of the disk.
        let part = DISK_BYTES / DEPTH / 512 * 512;
        let mut reads = Vec::new();
        for i in 0..DEPTH {
            let queue = &mut queues[(i + round) % 4];
            let len = 512 * (1 + random.below(16) as usize);
            let at = i * part + 512 * random.below(((part - len) / 512) as u64) as usize;
            let buffer = slice(memory, i);
            match random.below(10) {
                0..4 => {
                    queue.read(at as u64, buffer.as_mut_ptr(), len, i, ReqFlags::empty());
                    reads.push((i, at, len));
                }
                4..7 => {
                    random.fill(&mut buffer[..len]);
                    expected[at..at + len].copy_from_slice(&buffer[..len]);
                    queue.write(at as u64, buffer.as_ptr(), len, i, ReqFlags::empty());
                }
                7 => {
                    queue.discard(at as u64, len as u64, i, ReqFlags::empty());
                    // Only whole blocks are given back.
                    let whole = at.next_multiple_of(4096)..(at + len) / 4096 * 4096;
                    if !whole.is_empty() {
                        expected[whole].fill(0);
                    }
                }
                8 => {
                    let flags = if random.below(2) == 0 { ReqFlags::NO_UNMAP } else { ReqFlags::empty() };
                    queue.write_zeroes(at as u64, len as u64, i, flags);
                    expected[at..at + len].fill(0);
                }
                _ => queue.flush(i, ReqFlags::empty()),
            }
        }
        for (q, queue) in queues.iter_mut().enumerate() {
            let mine = (0..DEPTH).filter(|i| (i + round) % 4 == q).count();
            assert!(answers(queue, mine).iter().all(|(_, ret)| *ret == 0), "round {round}");
        }
        for (i, at, len) in reads {
            assert!(slice(memory, i)[..len] == expected[at..at + len], "round {round}: read of {len} at {at}");
        }
    }
    assert!(server.image.content() == expected);
}

#[test]
fn vectored_requests() {
    let _alone = alone();
    let mut random = Random::new("vectored_requests");
    let server = TestServer::new(1, false);
    let mut expected = server.image.content();
    let (mut blkio, mut queues) = connect(&server.socket(), 1, false);
    let memory = region(&mut blkio, BUFFER * 4);
    for i in 0..50 {
        let segments = 1 + random.below(100) as usize;
        let at = 512 * random.below(1000) as usize;
        let buffer = slice(memory, 0);
        random.fill(buffer);
        let pieces: Vec<iovec> = (0..segments)
            .map(|s| iovec { iov_base: buffer[s % 16 * 512..].as_mut_ptr().cast(), iov_len: 512 })
            .collect();
        if i % 2 == 0 {
            for s in 0..segments {
                expected[at + s * 512..][..512].copy_from_slice(&buffer[s % 16 * 512..][..512]);
            }
            queues[0].writev(at as u64, pieces.as_ptr(), segments as u32, 0, ReqFlags::empty());
        } else {
            queues[0].readv(at as u64, pieces.as_ptr(), segments.min(16) as u32, 0, ReqFlags::empty());
        }
        assert_eq!(answers(&mut queues[0], 1), [(0, 0)]);
        if i % 2 == 1 {
            let len = segments.min(16) * 512;
            assert!(slice(memory, 0)[..len] == expected[at..at + len]);
        }
    }
    assert!(server.image.content() == expected);
}

#[test]
fn a_read_only_disk() {
    let _alone = alone();
    let server = TestServer::new(1, true);
    let expected = server.image.content();
    let mut writable = Blkio::new("virtio-blk-vhost-user").unwrap();
    writable.set_str("path", server.socket().to_str().unwrap()).unwrap();
    assert!(writable.connect().is_err() || writable.start().is_err(), "blkio sees that the disk is read-only");
    drop(writable);
    server.wait_idle();
    let (mut blkio, mut queues) = connect(&server.socket(), 1, true);
    let memory = region(&mut blkio, BUFFER);
    queues[0].read(0, slice(memory, 0).as_mut_ptr(), 4096, 0, ReqFlags::empty());
    assert_eq!(answers(&mut queues[0], 1), [(0, 0)]);
    assert!(slice(memory, 0)[..4096] == expected[..4096]);
}

#[test]
fn coming_and_going_200_times() {
    let _alone = alone();
    let server = TestServer::new(2, false);
    let expected = server.image.content();
    for i in 0..200usize {
        let (mut blkio, mut queues) = connect(&server.socket(), 1 + (i % 2) as i32, false);
        let memory = region(&mut blkio, BUFFER);
        let at = i * 4096;
        queues[0].read(at as u64, slice(memory, 0).as_mut_ptr(), 4096, i, ReqFlags::empty());
        assert_eq!(answers(&mut queues[0], 1), [(i, 0)]);
        assert!(slice(memory, 0)[..4096] == expected[at..at + 4096]);
    }
    server.wait_idle();
    assert_eq!(server.observer.connected.load(SeqCst), 200);
    assert_eq!(server.handle.stats().of(halfsilver::vhost_user::Direction::Read).requests, 200);
}

#[test]
fn regions_come_and_go_while_requests_run() {
    let _alone = alone();
    let mut random = Random::new("regions_come_and_go_while_requests_run");
    let server = TestServer::new(1, false);
    server.image.delay_ms.store(1, SeqCst);
    let expected = server.image.content();
    let (mut blkio, mut queues) = connect(&server.socket(), 1, false);
    let memory = region(&mut blkio, BUFFER * 32);
    for round in 0..60 {
        let mut reads = Vec::new();
        for i in 0..32 {
            let at = 512 * random.below(4000) as usize;
            queues[0].read(at as u64, slice(memory, i).as_mut_ptr(), 4096, i, ReqFlags::empty());
            reads.push((i, at));
        }
        // Submit, and let them run while other regions change.
        let mut none: [MaybeUninit<Completion>; 0] = [];
        queues[0].do_io(&mut none, 0, None, None).unwrap();
        let extra: Vec<_> = (0..3).map(|_| region(&mut blkio, 64 << 10)).collect();
        for r in &extra {
            blkio.unmap_mem_region(r);
            blkio.free_mem_region(r);
        }
        assert!(answers(&mut queues[0], 32).iter().all(|(_, ret)| *ret == 0), "round {round}");
        for (i, at) in reads {
            assert!(slice(memory, i)[..4096] == expected[at..at + 4096], "round {round}");
        }
    }
}

#[test]
fn two_clients_share_a_disk() {
    let _alone = alone();
    let mut random = Random::new("two_clients_share_a_disk");
    let server = TestServer::shared(2, false, 2);
    let mut expected = server.image.content();
    let mut clients: Vec<_> = (0..2).map(|_| connect(&server.socket(), 2, false)).collect();
    let memories: Vec<_> = clients.iter_mut().map(|(blkio, _)| region(blkio, BUFFER * 16)).collect();
    const DEPTH: usize = 16;
    let part = DISK_BYTES / DEPTH / 512 * 512;
    for round in 0..200 {
        // Both have requests in flight at once: one writes every other part, the other one reads or writes the rest.
        let mut reads = Vec::new();
        for i in 0..DEPTH {
            let (client, queue) = ((i + round) % 2, i / 2 % 2);
            let buffer = slice(memories[client], i);
            let len = 512 * (1 + random.below(16) as usize);
            let at = i * part + 512 * random.below(((part - len) / 512) as u64) as usize;
            let queue = &mut clients[client].1[queue];
            if random.below(2) == 0 {
                random.fill(&mut buffer[..len]);
                expected[at..at + len].copy_from_slice(&buffer[..len]);
                queue.write(at as u64, buffer.as_ptr(), len, i, ReqFlags::empty());
            } else {
                queue.read(at as u64, buffer.as_mut_ptr(), len, i, ReqFlags::empty());
                reads.push((client, i, at, len));
            }
        }
        let mut none: [MaybeUninit<Completion>; 0] = [];
        for queue in clients.iter_mut().flat_map(|(_, queues)| queues) {
            queue.do_io(&mut none, 0, None, None).unwrap();
        }
        for queue in clients.iter_mut().flat_map(|(_, queues)| queues) {
            assert!(answers(queue, DEPTH / 4).iter().all(|(_, ret)| *ret == 0), "round {round}");
        }
        for (client, i, at, len) in reads {
            let seen = &slice(memories[client], i)[..len];
            assert!(*seen == expected[at..at + len], "round {round}: client {client} reads {len} at {at}");
        }
    }
    assert!(server.image.content() == expected);
    let requests: u64 = server.handle.stats().directions.iter().map(|d| d.requests).sum();
    assert_eq!(requests, 200 * DEPTH as u64, "both are counted together");
}
