//! Kicks and calls by other things than eventfds: pairs of sockets as Linux' virtio_uml has them, and pipes.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::hostile_messages::send_vring_fd;
use super::ring::*;
use super::support::*;

const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;

/// Two ends: what is handed over, and what stays with the driver.
fn pair(kind: &str, backend_reads: bool) -> (File, File) {
    let (backend, driver) = match kind {
        "socket" => {
            let (a, b) = UnixStream::pair().unwrap();
            (OwnedFd::from(a), OwnedFd::from(b))
        }
        _ => {
            let (read, write) = std::io::pipe().unwrap();
            if backend_reads { (read.into(), write.into()) } else { (write.into(), read.into()) }
        }
    };
    (File::from(backend), File::from(driver))
}

fn set_blocking(file: &File, blocks: bool) {
    use rustix::fs::OFlags;
    rustix::fs::fcntl_setfl(file, if blocks { OFlags::empty() } else { OFlags::NONBLOCK }).unwrap();
}

#[test]
fn kicks_and_calls_by_pipes_and_sockets() {
    let _alone = alone();
    for kind in ["socket", "pipe"] {
        for blocks in [false, true] {
            let server = TestServer::new(1, false);
            let expected = server.image.content();
            let mut guest = Guest::with(&server.socket(), 1, F_EVENT_IDX);
            let ((kick, mut kicker), (call, mut called)) = (pair(kind, true), pair(kind, false));
            set_blocking(&kick, blocks);
            set_blocking(&call, blocks);
            assert!(send_vring_fd(&guest, SET_VRING_KICK, 0, Some(&kick)), "{kind}");
            assert!(send_vring_fd(&guest, SET_VRING_CALL, 0, Some(&call)), "{kind}");
            // A ring whose call is new is signalled at once.
            called.read_exact(&mut [0; 8]).unwrap();
            for i in 0..50u64 {
                guest.header(T_IN, i);
                guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
                guest.announce(0, 0);
                std::io::Write::write_all(&mut kicker, &1u64.to_ne_bytes()).unwrap();
                let mut count = [0; 8];
                called.read_exact(&mut count).unwrap();
                assert_eq!((u64::from_ne_bytes(count), guest.poll_used(0)), (1, Some((0, 513))), "{kind}");
                assert_eq!(guest.memory.read(DATA, 512), expected[i as usize * 512..][..512]);
            }
        }
    }
}

/// Nobody reads the calls: what is full stays full, and the queue goes on.
#[test]
fn a_call_that_nobody_reads_holds_up_nothing() {
    let _alone = alone();
    for kind in ["socket", "pipe"] {
        let server = TestServer::new(1, false);
        let mut guest = Guest::with(&server.socket(), 1, F_EVENT_IDX);
        let (call, driver) = pair(kind, false);
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

/// A ring whose kicks have ended is looked at from time to time.
#[test]
fn a_kick_whose_other_end_is_gone_is_polled() {
    let _alone = alone();
    for kind in ["socket", "pipe"] {
        let server = TestServer::new(1, false);
        let mut guest = Guest::new(&server.socket(), 1);
        let (kick, kicker) = pair(kind, true);
        assert!(send_vring_fd(&guest, SET_VRING_KICK, 0, Some(&kick)), "{kind}");
        drop((kick, kicker));
        std::thread::sleep(Duration::from_millis(20));
        guest.read_sectors(0, 512);
        drop(guest);
        server.wait_idle();
    }
}
