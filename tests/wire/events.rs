//! Calls by other things than eventfds: pairs of sockets as Linux' virtio_uml has them, and pipes. Kicks by nothing else.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::hostile_messages::send_vring_fd;
use super::ring::*;
use super::support::*;

const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;

/// Two ends: what is handed over to be signalled, and what stays with the driver.
fn pair(kind: &str) -> (File, File) {
    let (backend, driver) = match kind {
        "socket" => {
            let (a, b) = UnixStream::pair().unwrap();
            (OwnedFd::from(a), OwnedFd::from(b))
        }
        _ => {
            let (read, write) = std::io::pipe().unwrap();
            (write.into(), read.into())
        }
    };
    (File::from(backend), File::from(driver))
}

fn set_blocking(file: &File, blocks: bool) {
    use rustix::fs::OFlags;
    rustix::fs::fcntl_setfl(file, if blocks { OFlags::empty() } else { OFlags::NONBLOCK }).unwrap();
}

#[test]
fn calls_by_pipes_and_sockets() {
    let _alone = alone();
    for kind in ["socket", "pipe"] {
        for blocks in [false, true] {
            let server = TestServer::new(1, false);
            let expected = server.image.content();
            let mut guest = Guest::with(&server.socket(), 1, F_EVENT_IDX);
            let (call, mut called) = pair(kind);
            set_blocking(&call, blocks);
            assert!(send_vring_fd(&guest, SET_VRING_CALL, 0, Some(&call)), "{kind}");
            // A ring whose call is new is signalled at once.
            called.read_exact(&mut [0; 8]).unwrap();
            for i in 0..50u64 {
                guest.header(T_IN, i);
                guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
                guest.submit(0, 0);
                let mut count = [0; 8];
                called.read_exact(&mut count).unwrap();
                assert_eq!((u64::from_ne_bytes(count), guest.poll_used(0)), (1, Some((0, 513))), "{kind}");
                assert_eq!(guest.memory.read(DATA, 512), expected[i as usize * 512..][..512]);
            }
        }
    }
}

/// Who reads them would wait for another reader whose memory does not answer.
#[test]
fn kicks_by_pipes_and_sockets_are_refused() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let (read, _write) = std::io::pipe().unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    for kick in [File::from(OwnedFd::from(read)), File::from(OwnedFd::from(socket))] {
        let guest = Guest::new(&server.socket(), 1);
        assert!(!send_vring_fd(&guest, SET_VRING_KICK, 0, Some(&kick)));
        drop(guest);
        server.wait_idle();
    }
}

/// Nobody reads the calls: what is full stays full, and the queue goes on.
#[test]
fn a_call_that_nobody_reads_holds_up_nothing() {
    let _alone = alone();
    for kind in ["socket", "pipe"] {
        let server = TestServer::new(1, false);
        let mut guest = Guest::with(&server.socket(), 1, F_EVENT_IDX);
        let (call, driver) = pair(kind);
        set_blocking(&call, true);
        assert!(send_vring_fd(&guest, SET_VRING_CALL, 0, Some(&call)));
        for _ in 0..20_000 {
            assert_eq!(guest.run(T_FLUSH, 0, &[]), (S_OK, 1), "{kind}");
        }
        // Nor one that nobody could read any more.
        drop(driver);
        for _ in 0..10 {
            assert_eq!(guest.run(T_FLUSH, 0, &[]), (S_OK, 1), "{kind}");
        }
    }
}
