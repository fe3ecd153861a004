//! Who keeps others out, and who does not: places go by running rings.

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use halfsilver::vhost_user::Server as _;

use super::hostile_messages::send_get_features;
use super::ring::*;
use super::support::*;

fn is_closed(stream: &UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    matches!(std::io::Read::read(&mut &*stream, &mut [0; 64]), Ok(0))
}

#[test]
fn who_says_nothing_has_no_place() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
    let mut guest = Guest::new(&server.socket(), 1);
    guest.read_sectors(0, 512);
    assert_eq!((server.handle.frontends(), server.observer.connected.load(SeqCst)), (1, 1));
    assert_eq!(server.handle.frontend_pids(), [std::process::id()]);
    drop(guest);
    server.wait_idle();
    Guest::new(&server.socket(), 1).read_sectors(0, 512);
    drop(silent);
}

#[test]
fn who_speaks_and_starts_nothing_has_no_place() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let speaks = || {
        let stream = UnixStream::connect(server.socket()).unwrap();
        send_get_features(&stream);
        std::io::Read::read_exact(&mut &stream, &mut [0; 20]).unwrap();
        stream
    };
    let spoken: Vec<_> = (0..40).map(|_| speaks()).collect();
    let mut guest = Guest::new(&server.socket(), 1);
    guest.read_sectors(0, 512);
    // Those that came first have made room.
    assert!(is_closed(&spoken[0]));
    drop(spoken);
    until("the others are gone", || server.handle.frontends() == 1);
    guest.read_sectors(0, 512);
}

/// Two that are connected: the first that runs has the disk, and the other one is told.
#[test]
fn the_first_whose_ring_runs_has_the_place() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut waits = Guest::with(&server.socket(), 0, 0);
    let mut runs = Guest::new(&server.socket(), 1);
    runs.read_sectors(0, 512);
    waits.add_queue(0, ENTRIES);
    let config = waits.ring_config(0);
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;
    waits.frontend.set_vring_num(0, ENTRIES).unwrap();
    waits.frontend.set_vring_addr(0, &config).unwrap();
    waits.frontend.set_vring_kick(0, &waits.queues[0].kick).unwrap();
    assert!(waits.frontend.set_vring_enable(0, true).is_err(), "two have running queues");
    runs.read_sectors(0, 512);
    drop(waits);
    drop(runs);
    server.wait_idle();
    Guest::new(&server.socket(), 1).read_sectors(0, 512);
}

/// One that has connected before the old one left starts when that has finished.
#[test]
fn a_place_is_taken_over_when_its_holder_has_finished() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut next = Guest::with(&server.socket(), 0, 0);
    let mut last = Guest::new(&server.socket(), 1);
    server.image.delay_ms.store(100, SeqCst);
    last.header(T_OUT, 8);
    last.memory.write(DATA, &[9; 512]);
    last.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    last.submit(0, 0);
    until("the request runs", || server.image.running.load(SeqCst) == 1);
    server.image.delay_ms.store(0, SeqCst);
    drop(last);
    next.add_queue(0, ENTRIES);
    next.start_queue(0, 0);
    assert_eq!(server.image.running.load(SeqCst), 0, "both had running requests");
    assert_eq!(next.read_sectors(8, 512), [9; 512]);
}

/// What is read goes under its readers: they get errors, not a disk that never answers.
#[test]
fn an_abandoned_server_answers_its_readers_with_errors() {
    let _alone = alone();
    let server = TestServer::new(1, true);
    let mut reader = Guest::new(&server.socket(), 1);
    reader.read_sectors(0, 512);
    server.image.delay_ms.store(50, SeqCst);
    reader.header(T_IN, 0);
    reader.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    reader.submit(0, 0);
    until("the read runs", || server.image.running.load(SeqCst) == 1);
    server.handle.abandon();
    assert_eq!(server.image.running.load(SeqCst), 0, "a read is in flight");
    assert_eq!((reader.wait_used(0), reader.status()), ((0, 513), S_OK));
    assert!(!server.socket().exists() && UnixStream::connect(server.socket()).is_err());
    for _ in 0..3 {
        assert_eq!(reader.run(T_IN, 0, &[(DATA, 512, WRITE)]), (S_IOERR, 1));
    }
    assert_eq!(server.handle.frontends(), 1);
    drop(reader);
    until("it ends with its last reader", || server.handle.is_ended());
}
