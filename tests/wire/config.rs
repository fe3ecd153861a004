//! The config space changes while a frontend is connected.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;

use halfsilver::vhost_user::Server as _;
use vhost::vhost_user::VhostUserFrontend;

use crate::ring::Guest;
use crate::support::{TestServer, alone};

/// It is told as often as there is room for, which is enough: what is unread says all that more would say.
#[test]
fn a_frontend_that_never_reads_its_channel_holds_up_nobody() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::connect(&server.socket(), 0);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    for _ in 0..100_000 {
        server.handle.config_changed();
    }
    ours.set_nonblocking(true).unwrap();
    let mut told = 0;
    let ended = loop {
        let mut message = [0; 12];
        match ours.read_exact(&mut message) {
            Ok(()) => assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "whole messages"),
            Err(e) => break e.kind(),
        }
        told += 1;
    };
    assert_eq!(ended, ErrorKind::WouldBlock);
    assert!((1..100_000).contains(&told), "{told}");
    server.handle.config_changed();
    ours.set_nonblocking(false).unwrap();
    ours.read_exact(&mut [0; 12]).unwrap();
}
