//! What a well-behaved frontend relies on: config, notifications, draining, reset, coming and going.

use halfsilver::vhost_user::Server as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use halfsilver::engine::{Disk, Epoch, EpochClock};
use halfsilver::vhost_user::{Direction, Hints, NoObserver, ServeOptions, ServerHandle, SocketSource, serve};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use super::ring::*;
use super::support::*;

#[test]
fn features_and_config_are_what_was_promised() {
    let _alone = alone();
    for read_only in [false, true] {
        let server = TestServer::new(3, read_only);
        let mut guest = Guest::connect(&server.socket(), 0);
        let bits = |list: &[u32]| list.iter().fold(0u64, |a, b| a | 1 << b);
        let common = bits(&[32, 9, 11, 12, 2, 6, 10, 29, 28, 30]);
        assert_eq!(guest.features, common | if read_only { bits(&[5]) } else { bits(&[13, 14]) });
        assert_eq!(guest.frontend.get_queue_num().unwrap(), 3);
        assert!(guest.frontend.get_max_mem_slots().unwrap() >= 32);
        let config = guest.frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap().1;
        assert_eq!(config[0..8], (DISK_BYTES as u64 / 512).to_le_bytes());
        assert_eq!(config[34..36], 3u16.to_le_bytes());
        assert_eq!(config[36..40] == [0; 4], read_only);
    }
}

#[test]
fn requests_do_what_they_say() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    let mut expected = server.image.content();
    assert_eq!(guest.read_sectors(8, 4096), expected[4096..8192]);
    guest.write_sectors(16, &[7; 1024]);
    expected[8192..9216].fill(7);
    assert_eq!(guest.run(T_FLUSH, 0, &[]), (S_OK, 1));
    assert_eq!(server.image.syncs.load(SeqCst), 1);
    // Whole blocks of eight sectors, and one that is not.
    guest.memory.write(DATA, &[range(104, 16, 0), range(200, 2, 0)].concat());
    assert_eq!(guest.run(T_DISCARD, 0, &[(DATA, 32, 0)]), (S_OK, 1));
    expected[104 * 512..120 * 512].fill(0);
    guest.memory.write(DATA, &range(300, 8, 1));
    assert_eq!(guest.run(T_WRITE_ZEROES, 0, &[(DATA, 16, 0)]), (S_OK, 1));
    expected[300 * 512..308 * 512].fill(0);
    assert_eq!(guest.run(T_GET_ID, 0, &[(DATA, 20, WRITE)]), (S_OK, 21));
    let mut serial = SERIAL.as_bytes().to_vec();
    serial.resize(20, 0);
    assert_eq!(guest.memory.read(DATA, 20), serial);
    assert!(server.image.content() == expected, "the disk is not what was written");
    let stats = server.handle.stats();
    let numbers = |d| (stats.of(d).requests, stats.of(d).bytes, stats.of(d).errors);
    assert_eq!(numbers(Direction::Read), (1, 4096, 0));
    assert_eq!(numbers(Direction::Write), (1, 1024, 0));
    assert_eq!(numbers(Direction::Flush), (1, 0, 0));
    assert_eq!(numbers(Direction::Discard), (1, 9216, 0));
    assert_eq!(numbers(Direction::WriteZeroes), (1, 4096, 0));
    assert_eq!(stats.of(Direction::Read).latency.iter().sum::<u64>(), 1);
    assert_eq!(server.observer.requests.lock().unwrap()["write"], 1);
    drop(guest);
    server.wait_idle();
    drop(Guest::new(&server.socket(), 1));
    assert_eq!(server.handle.stats(), stats, "counters outlive connections");
}

/// What yields to the guest goes by this, so it must end with the guest's last request, however the guest ends.
#[test]
fn a_guest_is_active_from_its_request_to_a_moment_after_the_answer() {
    let _alone = alone();
    let server = TestServer::new(2, false);
    let is_active = || server.disk.background().guest_is_active();
    let mut guest = Guest::new(&server.socket(), 2);
    until("it is idle", || !is_active());
    server.image.delay_ms.store(50, SeqCst);
    guest.header(T_IN, 0);
    let slow = |guest: &mut Guest| {
        guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        guest.submit(0, 0);
        until("the request is taken", || server.image.running.load(SeqCst) == 1);
        assert!(is_active());
    };
    slow(&mut guest);
    guest.wait_used(0);
    until("the answer is a while ago", || !is_active());
    // Stopped in the middle of a request, and started again.
    slow(&mut guest);
    guest.frontend.get_vring_base(0).unwrap();
    until("the ring has been stopped for a while", || !is_active());
    guest.start_queue(0, 2);
    // Gone in the middle of a request, or of a batch with one that is refused.
    slow(&mut guest);
    drop(guest);
    server.wait_idle();
    until("it has gone for a while", || !is_active());
    let mut guest = Guest::new(&server.socket(), 1);
    guest.header(T_IN, 0);
    guest.chain(0, 4, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    guest.announce(0, 4);
    slow(&mut guest);
    // Its memory goes from under it.
    guest.memory.file.set_len(0).unwrap();
    until("its connection is closed", || !server.handle.is_connected());
    server.wait_idle();
    until("it has gone for a while", || !is_active());
    drop(guest);
}

#[test]
fn framing_is_free() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    let content = server.image.content();
    // Header in three pieces, data and status in one, read across two pieces that split a sector.
    guest.header(T_IN, 4);
    let pieces =
        [(HEADER, 3, 0), (HEADER + 3, 9, 0), (HEADER + 12, 4, 0), (DATA, 700, WRITE), (DATA + 700, 325, WRITE)];
    guest.chain(0, 0, &pieces);
    guest.submit(0, 0);
    assert_eq!(guest.wait_used(0), (0, 1025));
    assert_eq!(guest.memory.read(DATA, 1024), content[2048..3072]);
    assert_eq!(guest.memory.read(DATA + 1024, 1), [S_OK]);
    // Header and data in one piece; an indirect table behind a direct descriptor.
    guest.header_at(DATA, T_OUT, 40);
    guest.memory.write(DATA + 16, &[9; 512]);
    let table = [encode((DATA + 16, 512, NEXT, 1)), encode((STATUS, 1, WRITE, 0))].concat();
    guest.memory.write(TABLE, &table);
    guest.chain(0, 3, &[(DATA, 16, 0), (TABLE, 32, INDIRECT)]);
    guest.submit(0, 3);
    assert_eq!(guest.wait_used(0), (3, 1));
    assert_eq!(server.image.content()[40 * 512..41 * 512], [9; 512]);
}

#[test]
fn writethrough_when_the_guest_cannot_flush_or_says_so() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let counts = || (server.image.plain_writes.load(SeqCst), server.image.durable_writes.load(SeqCst));
    let mut guest = Guest::new(&server.socket(), 1);
    guest.write_sectors(0, &[1; 512]);
    assert_eq!(counts(), (1, 0));
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    guest.write_sectors(0, &[1; 512]);
    assert_eq!(counts(), (1, 1));
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();
    guest.write_sectors(0, &[1; 512]);
    assert_eq!(counts(), (2, 1));
    drop(guest);
    server.wait_idle();
    let mut guest = Guest::with(&server.socket(), 1, F_FLUSH);
    guest.write_sectors(0, &[1; 512]);
    assert_eq!(counts(), (2, 2));
    drop(guest);
    server.wait_idle();
    // A driver that does not know the switch is not bound by it.
    let mut guest = Guest::with(&server.socket(), 1, F_CONFIG_WCE);
    guest.write_sectors(0, &[1; 512]);
    assert_eq!(counts(), (3, 2));
}

#[test]
fn event_index_suppresses_both_ways() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    guest.read_sectors(0, 512);
    until("the device arms its event index", || guest.avail_event(0) == 1);
    while guest.queues[0].call.read().is_ok() {}
    // Far away: no call.
    guest.set_used_event(0, 100);
    guest.read_sectors(0, 512);
    std::thread::sleep(Duration::from_millis(5));
    assert!(guest.queues[0].call.read().is_err(), "called although the driver did not ask");
    // The next one: a call.
    guest.set_used_event(0, guest.used_index(0));
    guest.read_sectors(0, 512);
    until("the device calls", || guest.queues[0].call.read().is_ok());
    drop(guest);
    server.wait_idle();
    let mut guest = Guest::with(&server.socket(), 1, F_EVENT_IDX);
    guest.read_sectors(0, 512);
    until("the device calls without event index", || guest.queues[0].call.read().is_ok());
}

/// How a driver says that it sleeps, and learns that the device does.
struct Sleep {
    is_asleep: fn(&Guest, u16) -> bool,
    fall_asleep: fn(&Guest, u16),
    wake_up: fn(&Guest, u16),
}

/// Whoever looks first and then says that it sleeps is forgotten; so both sides say it first.
fn nobody_is_forgotten(guest: &mut Guest, sleep: &Sleep) {
    guest.header(T_IN, 0);
    let patience = Duration::from_secs(10);
    for round in 0..300u16 {
        guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        let before = guest.avail_index(0);
        guest.announce(0, 0);
        std::sync::atomic::fence(SeqCst);
        if (sleep.is_asleep)(guest, before) {
            guest.kick(0);
        }
        // Sometimes it finds the answer without sleeping, sometimes it falls asleep as the answer comes.
        let (began, busy) = (Instant::now(), Duration::from_micros(u64::from(round) * 7 % 900));
        while began.elapsed() < busy && guest.used_index(0) == before {
            std::hint::spin_loop();
        }
        (sleep.fall_asleep)(guest, before);
        std::sync::atomic::fence(SeqCst);
        let sleeps = guest.used_index(0) == before;
        while sleeps && guest.queues[0].call.read().is_err() {
            assert!(began.elapsed() < patience, "round {round}: it was forgotten");
            std::thread::sleep(Duration::from_micros(20));
        }
        assert_eq!(guest.wait_used(0).0, 0);
        (sleep.wake_up)(guest, before);
        while guest.queues[0].call.read().is_ok() {}
        // Sometimes the next request comes while the device still looks, sometimes long after that.
        std::thread::sleep(Duration::from_micros(u64::from(round % 3) * u64::from(round)));
    }
}

#[test]
fn a_driver_that_sleeps_by_the_event_indices_is_never_forgotten() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let by_index = Sleep {
        is_asleep: |guest, before| guest.avail_event(0) == before,
        fall_asleep: |guest, before| guest.set_used_event(0, before),
        wake_up: |guest, before| guest.set_used_event(0, before.wrapping_sub(100)),
    };
    nobody_is_forgotten(&mut Guest::new(&server.socket(), 1), &by_index);
}

#[test]
fn a_driver_that_sleeps_by_the_flags_is_never_forgotten() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let by_flags = Sleep {
        is_asleep: |guest, _| guest.used_flags(0) & 1 == 0,
        fall_asleep: |guest, _| guest.set_avail_flags(0, 0),
        wake_up: |guest, _| guest.set_avail_flags(0, 1),
    };
    let mut guest = Guest::with(&server.socket(), 1, F_EVENT_IDX);
    nobody_is_forgotten(&mut guest, &by_flags);
    // Stopped while it looks, or just after.
    guest.announce(0, 0);
    guest.kick(0);
    guest.wait_used(0);
    guest.frontend.get_vring_base(0).unwrap();
    assert_eq!(guest.used_flags(0), 0, "the next backend is not kicked");
}

#[test]
fn a_batch_is_one_call() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::with(&server.socket(), 1, F_EVENT_IDX);
    while guest.queues[0].call.read().is_ok() {}
    guest.header(T_IN, 0);
    for i in 0..32u16 {
        let status = STATUS + u64::from(i);
        guest.chain(0, i * 3, &[(HEADER, 16, 0), (DATA + u64::from(i) * 512, 512, WRITE), (status, 1, WRITE)]);
        guest.announce(0, i * 3);
    }
    guest.kick(0);
    for _ in 0..32 {
        guest.wait_used(0);
    }
    std::thread::sleep(Duration::from_millis(2));
    assert!(guest.queues[0].call.read().unwrap() <= 2, "a call for each request");
}

#[test]
fn a_queue_without_kicks_is_polled_and_one_without_calls_works() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::with(&server.socket(), 0, 0);
    guest.add_queue(0, ENTRIES);
    let config = guest.ring_config(0);
    guest.frontend.set_vring_num(0, ENTRIES).unwrap();
    guest.frontend.set_vring_addr(0, &config).unwrap();
    super::hostile_messages::send_vring_fd(&guest, 12, 0x100, None); // SET_VRING_KICK without a descriptor
    super::hostile_messages::send_vring_fd(&guest, 13, 0x100, None); // SET_VRING_CALL without a descriptor
    guest.frontend.set_vring_enable(0, true).unwrap();
    let expected = server.image.content();
    for i in 0..5 {
        assert_eq!(guest.read_sectors(i, 512), expected[i as usize * 512..][..512]);
    }
}

#[test]
fn vring_base_is_told_after_the_last_request_and_taken_up_again() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    server.image.delay_ms.store(60, SeqCst);
    let mut guest = Guest::new(&server.socket(), 1);
    let mut base = 0;
    for round in 1..=3u16 {
        guest.header(T_OUT, u64::from(round) * 8);
        for i in 0..4u16 {
            guest.chain(0, i * 3, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS + u64::from(i), 1, WRITE)]);
            guest.announce(0, i * 3);
        }
        guest.kick(0);
        until("requests run", || server.image.running.load(SeqCst) == 4);
        let asked = Instant::now();
        let told = guest.frontend.get_vring_base(0).unwrap() as u16;
        assert!(asked.elapsed() > Duration::from_millis(20), "answered before the requests were done");
        base += 4;
        assert_eq!((told, guest.used_index(0)), (base, base));
        assert_eq!(server.image.running.load(SeqCst), 0);
        // A stopped ring takes nothing.
        guest.chain(0, 30, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
        guest.submit(0, 30);
        assert!(guest.wait_used_for(0, Duration::from_millis(5)).is_some());
        while guest.poll_used(0).is_some() {}
        assert_eq!(guest.used_index(0), base);
        guest.start_queue(0, base);
        assert_eq!(guest.wait_used(0).0, 30);
        base += 1;
    }
}

#[test]
fn reset_device_drains_and_the_device_can_be_set_up_again() {
    let _alone = alone();
    let server = TestServer::new(2, false);
    server.image.delay_ms.store(40, SeqCst);
    let mut guest = Guest::new(&server.socket(), 2);
    guest.header(T_OUT, 8);
    guest.chain(1, 0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    guest.submit(1, 0);
    until("the request runs", || server.image.running.load(SeqCst) == 1);
    guest.frontend.reset_device().unwrap();
    assert_eq!(server.image.running.load(SeqCst), 0);
    assert_eq!(guest.used_index(1), 1);
    server.image.delay_ms.store(0, SeqCst);
    guest.queues[0].last_used = 0;
    guest.start_queue(0, 0);
    guest.read_sectors(0, 512);
}

/// QEMU keeps its own copy of the word over a reset and sends only what differs from that, so nobody would say it again; the
/// guest goes by that copy and sends no flush.
#[test]
fn a_guest_that_switched_to_writethrough_stays_there_over_a_reset() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    guest.frontend.reset_device().unwrap();
    guest.start_queue(0, 0);
    guest.write_sectors(0, &[1; 512]);
    assert_eq!(server.image.durable_writes.load(SeqCst), 1);
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();
    guest.write_sectors(0, &[2; 512]);
    assert_eq!(server.image.durable_writes.load(SeqCst), 1);
}

#[test]
fn a_disabled_queue_waits_and_goes_on() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    guest.frontend.set_vring_enable(0, false).unwrap();
    guest.header(T_IN, 8);
    guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    guest.submit(0, 0);
    assert!(guest.wait_used_for(0, Duration::from_millis(10)).is_none());
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.wait_used(0), (0, 513));
}

/// Who disables a queue may give its memory to somebody else: nothing of it is touched from then on.
#[test]
fn a_queue_is_drained_before_it_is_disabled() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    server.image.delay_ms.store(80, SeqCst);
    let mut guest = Guest::new(&server.socket(), 1);
    guest.header(T_IN, 8);
    guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    guest.submit(0, 0);
    until("the request runs", || server.image.running.load(SeqCst) == 1);
    guest.frontend.set_vring_enable(0, false).unwrap();
    assert_eq!((server.image.running.load(SeqCst), guest.used_index(0)), (0, 1));
    let (ring, others) = (guest.used_at(0), [0xaa; 4 + 8 * 16 + 2]);
    guest.memory.write(ring, &others);
    let Guest { memory, frontend, .. } = guest;
    drop(frontend);
    server.wait_idle();
    assert_eq!(memory.read(ring, others.len()), others);
}

#[test]
fn disconnect_drains_before_the_next_frontend_is_served() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    server.image.delay_ms.store(80, SeqCst);
    let mut guest = Guest::new(&server.socket(), 1);
    guest.header(T_OUT, 8);
    guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    guest.submit(0, 0);
    until("the request runs", || server.image.running.load(SeqCst) == 1);
    drop(guest);
    // At once, while the old one still drains.
    let mut next = Guest::new(&server.socket(), 1);
    assert_eq!(server.image.running.load(SeqCst), 0);
    next.read_sectors(0, 512);
}

#[test]
fn a_second_frontend_is_refused_while_the_first_one_lives() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut first = Guest::new(&server.socket(), 1);
    let mut second = UnixStream::connect(server.socket()).unwrap();
    second.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(std::io::Read::read(&mut second, &mut [0; 1]).unwrap(), 0);
    first.read_sectors(0, 512);
}

#[test]
fn stop_waits_for_requests_and_removes_the_socket() {
    let _alone = alone();
    let (descriptors, threads_before) = (settled_descriptors(), threads());
    {
        let server = TestServer::new(1, false);
        let mode = std::fs::metadata(server.socket()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        server.image.delay_ms.store(60, SeqCst);
        let mut guest = Guest::new(&server.socket(), 1);
        guest.header(T_OUT, 8);
        guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
        guest.submit(0, 0);
        until("the request runs", || server.image.running.load(SeqCst) == 1);
        assert!(server.handle.is_connected());
        server.handle.stop();
        assert_eq!(server.image.running.load(SeqCst), 0);
        assert_eq!((guest.wait_used(0), guest.status()), ((0, 1), S_OK));
        assert!(!server.socket().exists() && !server.handle.is_connected() && server.handle.is_ended());
        server.handle.stop();
    }
    until("threads end", || threads() == threads_before);
    until("descriptors are closed", || open_descriptors() == descriptors);
}

/// A command that holds the door either lets it go, and who has come is served, or stops the server, and then nobody that
/// has come meanwhile gets a session to be cut off from.
#[test]
fn who_comes_while_the_door_is_held_is_served_or_finds_nobody() {
    let _alone = alone();
    for stops in [false, true] {
        let server = TestServer::new(1, false);
        let door = server.handle.hold();
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        super::hostile_messages::send_get_features(&stream);
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let waits = std::io::Read::read(&mut stream, &mut [0; 1]).unwrap_err();
        assert_eq!((waits.kind(), server.handle.frontends()), (std::io::ErrorKind::WouldBlock, 0));
        if stops {
            server.handle.begin_to_stop();
        }
        drop(door);
        if stops {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            // Closed, with a message in it that nobody has read.
            assert_ne!(std::io::Read::read(&mut stream, &mut [0; 1]).ok(), Some(1));
            server.handle.stop();
        } else {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            assert_eq!(std::io::Read::read(&mut stream, &mut [0; 20]).unwrap(), 20);
        }
        assert_eq!(server.observer.connected.load(SeqCst) > 0, !stops, "stops: {stops}");
    }
}

fn serve_at(socket: SocketSource) -> std::io::Result<ServerHandle> {
    let attachment = Disk::plain(EpochClock::new(Epoch(0)), MemImage::new(1 << 20), false).unwrap().attach_live();
    let (name, serial, observer) = ("t".to_owned(), String::new(), Arc::new(NoObserver));
    let hints = Hints::default();
    serve(ServeOptions { name, socket, attachment, queues: 1, serial, frontends_max: 1, hints, observer, once: false })
}

#[test]
fn only_stale_sockets_are_replaced() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    drop(UnixListener::bind(path("stale")).unwrap());
    let over_stale = serve_at(SocketSource::Path(path("stale"))).unwrap();
    drop(Guest::connect(&path("stale"), 0));
    let _live = UnixListener::bind(path("live")).unwrap();
    std::fs::write(path("file"), b"data").unwrap();
    std::fs::create_dir(path("dir")).unwrap();
    std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
    let long = dir.path().join("x".repeat(200));
    for p in [path("live"), path("file"), path("dir"), path("link"), path("stale"), long, path("none/sock")] {
        assert!(serve_at(SocketSource::Path(p.clone())).is_err(), "{}", p.display());
    }
    assert_eq!(std::fs::read(path("file")).unwrap(), b"data");
    drop(over_stale);
    assert!(!path("stale").exists());
}

#[test]
fn inherited_sockets_are_served() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = serve_at(SocketSource::Fd(listener.into())).unwrap();
    for _ in 0..3 {
        Guest::new(&path, 1).read_sectors(0, 512);
    }
    server.stop();
    assert!(path.exists(), "a socket that somebody else made stays");
    // A connected one: the server ends with its frontend.
    let listener = UnixListener::bind(dir.path().join("pair")).unwrap();
    let (tell, told) = mpsc::channel();
    let accept = std::thread::spawn(move || {
        let server = serve_at(SocketSource::Fd(listener.accept().unwrap().0.into())).unwrap();
        server.wait();
        tell.send(server.is_ended()).unwrap();
    });
    Guest::new(&dir.path().join("pair"), 1).read_sectors(0, 512);
    assert!(told.recv_timeout(Duration::from_secs(5)).unwrap());
    accept.join().unwrap();
}

#[test]
fn requests_enter_the_epoch_of_their_moment() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    server.image.delay_ms.store(50, SeqCst);
    let mut guest = Guest::new(&server.socket(), 1);
    guest.header(T_OUT, 8);
    guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    guest.submit(0, 0);
    until("the request runs", || server.image.running.load(SeqCst) == 1);
    server.clock.advance(server.clock.room().unwrap());
    assert!(!server.clock.is_drained(Epoch(0)));
    assert!(server.clock.wait_drained(Epoch(0), Duration::from_secs(5)));
    assert_eq!(guest.used_index(0), 1, "the epoch drained before the request was answered");
}

#[test]
fn an_idle_queue_sleeps() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    guest.read_sectors(0, 512);
    let worker = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|path| std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name == "q0\n"))
        .unwrap();
    let switches = || {
        let status = std::fs::read_to_string(worker.join("status")).unwrap();
        status.lines().filter(|l| l.contains("ctxt_switches")).map(str::to_owned).collect::<Vec<_>>()
    };
    std::thread::sleep(Duration::from_millis(20));
    let before = switches();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(switches(), before, "the worker woke up with nothing to do");
    guest.read_sectors(0, 512);
}

#[test]
fn sixteen_queues_are_served_side_by_side() {
    let _alone = alone();
    let server = TestServer::new(16, false);
    let mut guest = Guest::new(&server.socket(), 16);
    let expected = server.image.content();
    guest.header(T_IN, 8);
    for queue in 0..16 {
        guest.memory.write(DATA, &[0xee; 512]);
        guest.chain(queue, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        guest.submit(queue, 0);
        assert_eq!((guest.wait_used(queue).1, guest.status()), (513, S_OK), "queue {queue}");
        assert_eq!(guest.memory.read(DATA, 512), expected[4096..4608], "queue {queue}");
    }
}
