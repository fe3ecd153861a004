//! Several frontends on one socket: they see each other's writes, and nothing else of each other.

use halfsilver::vhost_user::Server as _;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use halfsilver::engine::{Backing, ChainEditor, Cut, Disk, Layer, NewLayer, PreparedSnapshot, Writers};
use halfsilver::vhost_user::{Direction, FRONTENDS_MAX, Hints, NoObserver, ServeOptions, SocketSource, serve};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::ring::*;
use super::support::*;

/// A write whose answer nobody waits for yet.
fn begin_write(guest: &mut Guest, sector: u64, byte: u8) {
    guest.header(T_OUT, sector);
    guest.memory.write(DATA, &[byte; 512]);
    guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    guest.submit(0, 0);
}

fn require_refused(socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "not refused");
}

#[test]
fn each_reads_what_the_other_wrote() {
    let _alone = alone();
    let server = TestServer::shared(2, false, 2);
    let mut guests = [Guest::new(&server.socket(), 2), Guest::new(&server.socket(), 1)];
    for round in 0..20u8 {
        let (writer, reader) = (usize::from(round % 2), usize::from(1 - round % 2));
        guests[writer].write_sectors(u64::from(round), &[round + 1; 512]);
        assert_eq!(guests[reader].read_sectors(u64::from(round), 512), [round + 1; 512]);
    }
    let stats = server.handle.queue_stats();
    assert_eq!((stats[0].of(Direction::Write).requests, stats[0].of(Direction::Read).requests), (20, 20));
    assert_eq!((server.handle.frontends(), server.disk.connections().count()), (2, 2));
}

#[test]
fn one_leaves_and_the_other_goes_on() {
    let _alone = alone();
    let server = TestServer::shared(1, false, 2);
    let mut stays = Guest::new(&server.socket(), 1);
    for round in 0..5u8 {
        let mut leaves = Guest::new(&server.socket(), 1);
        server.image.delay_ms.store(40, SeqCst);
        begin_write(&mut leaves, 8, round + 1);
        until("the request runs", || server.image.running.load(SeqCst) == 1);
        server.image.delay_ms.store(0, SeqCst);
        drop(leaves);
        stays.write_sectors(16, &[round; 512]);
        until("one is gone", || server.handle.frontends() == 1);
        assert!(server.handle.is_connected() && server.disk.connections().count() == 1);
        assert_eq!(stays.read_sectors(8, 512), [round + 1; 512], "what it left was not finished");
    }
    let told = (server.observer.connected.load(SeqCst), server.observer.disconnected.load(SeqCst));
    assert_eq!(told, (6, 5));
    drop(stays);
    server.wait_idle();
    assert_eq!((server.disk.connections().count(), server.handle.stats().of(Direction::Write).requests), (0, 10));
}

#[test]
fn one_more_than_may_be_is_refused_until_a_place_is_free() {
    let _alone = alone();
    let server = TestServer::shared(1, false, 2);
    let mut first = Guest::new(&server.socket(), 1);
    let second = Guest::new(&server.socket(), 1);
    require_refused(&server.socket());
    drop(second);
    // At once, while the other one is hanging up.
    let mut third = Guest::new(&server.socket(), 1);
    require_refused(&server.socket());
    first.write_sectors(0, &[1; 512]);
    assert_eq!(third.read_sectors(0, 512), [1; 512]);
}

#[test]
fn sixteen_frontends_come_and_go() {
    let _alone = alone();
    let (descriptors, threads_before) = (settled_descriptors(), threads());
    {
        let server = TestServer::shared(2, false, FRONTENDS_MAX);
        for round in 0..2u8 {
            let mut guests: Vec<_> = (0..FRONTENDS_MAX).map(|_| Guest::new(&server.socket(), 2)).collect();
            require_refused(&server.socket());
            assert_eq!((server.handle.frontends(), server.disk.connections().count()), (16, 16));
            server.image.delay_ms.store(5, SeqCst);
            for (i, guest) in guests.iter_mut().enumerate() {
                begin_write(guest, i as u64, round * 16 + i as u8);
            }
            for guest in &mut guests {
                assert_eq!((guest.wait_used(0), guest.status()), ((0, 1), S_OK));
            }
            server.image.delay_ms.store(0, SeqCst);
            for i in 0..FRONTENDS_MAX {
                let byte = round * 16 + i as u8;
                assert_eq!(guests[(i + 5) % FRONTENDS_MAX].read_sectors(i as u64, 512), [byte; 512]);
            }
            drop(guests);
            server.wait_idle();
        }
    }
    until("threads end", || threads() == threads_before);
    until("descriptors are closed", || open_descriptors() == descriptors);
}

#[test]
fn a_hostile_frontend_does_not_disturb_the_others() {
    let _alone = alone();
    let server = TestServer::shared(1, false, 3);
    let mut sane = Guest::new(&server.socket(), 1);
    type Attack = fn(&TestServer, &mut Guest);
    let attacks: [(&str, Attack, bool); 6] = [
        ("takes its memory away", |_, guest| guest.memory.file.set_len(0).unwrap(), true),
        ("breaks its ring", |_, guest| guest.set_avail_index(0, 5000), false),
        ("has requests that point nowhere", |_, guest| assert_eq!(guest.chain(0, 0, &[(1 << 60, 16, 0)]), 0), false),
        (
            "maps more memory than it has",
            |_, guest| {
                let region = VhostUserMemoryRegionInfo { memory_size: u64::MAX, ..guest.memory.region() };
                assert!(guest.frontend.set_mem_table(&[region]).is_err());
            },
            true,
        ),
        ("floods the messages", |_, guest| (0..500).for_each(|_| drop(guest.frontend.get_features())), false),
        (
            "sends half a message",
            |server, _| {
                // Beside its own connection, which takes the third place: the session waits for the other half.
                let mut half = UnixStream::connect(server.socket()).unwrap();
                half.write_all(&[1, 0]).unwrap();
                until("it has a session", || server.handle.frontends() == 3);
            },
            false,
        ),
    ];
    for (name, attack, closes) in attacks {
        let mut hostile = Guest::new(&server.socket(), 1);
        begin_write(&mut hostile, 32, 7);
        hostile.wait_used(0);
        hostile.announce(0, 0);
        attack(&server, &mut hostile);
        hostile.kick(0);
        for i in 0..50u8 {
            sane.write_sectors(u64::from(i), &[i; 512]);
            assert_eq!(sane.read_sectors(u64::from(i), 512), [i; 512], "{name}");
        }
        if closes {
            until(name, || server.handle.frontends() == 1);
        }
        drop(hostile);
        until(name, || server.handle.frontends() == 1);
        assert!(sane.queues[0].err.read().is_err(), "{name}: the other one's ring is said to be broken");
    }
}

#[test]
fn a_stop_finishes_the_requests_of_all() {
    let _alone = alone();
    let server = TestServer::shared(1, false, 4);
    let mut guests: Vec<_> = (0..4).map(|_| Guest::new(&server.socket(), 1)).collect();
    server.image.delay_ms.store(60, SeqCst);
    for (i, guest) in guests.iter_mut().enumerate() {
        begin_write(guest, i as u64, 9);
    }
    until("requests run", || server.image.running.load(SeqCst) == 4);
    server.handle.stop();
    assert_eq!((server.image.running.load(SeqCst), server.handle.frontends()), (0, 0));
    for guest in &mut guests {
        assert_eq!((guest.wait_used(0), guest.status()), ((0, 1), S_OK));
    }
    assert_eq!(server.disk.connections().count(), 0);
}

#[test]
fn as_many_as_make_sense() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    for (frontends_max, ok) in [(0, false), (1, true), (FRONTENDS_MAX, true), (FRONTENDS_MAX + 1, false)] {
        let clock = halfsilver::engine::EpochClock::new(halfsilver::engine::Epoch(0));
        let served = serve(ServeOptions {
            name: "t".to_owned(),
            socket: SocketSource::Path(dir.path().join("sock")),
            attachment: Disk::plain(clock, MemImage::new(1 << 20), false).unwrap().attach_live(),
            queues: 1,
            serial: String::new(),
            frontends_max,
            observer: Arc::new(NoObserver),
            once: false,
            hints: Hints::default(),
        });
        assert_eq!(served.is_ok(), ok, "{frontends_max}");
    }
}

/// A cut of the server's disk that pins who is connected.
fn cut(server: &TestServer) -> Cut {
    let image = MemImage::new(DISK_BYTES);
    image.bytes.lock().unwrap().fill(0);
    let prepared = PreparedSnapshot {
        disk: server.disk.clone(),
        layer: NewLayer::Frozen {
            layer: Layer::of(Backing::One(image), Arc::new(Disk::table_in_memory(DISK_BYTES as u64, 4096).unwrap())),
        },
        new_live: uuid::Uuid::new_v4(),
        changed: None,
    };
    ChainEditor::new(server.clock.clone()).cut(vec![prepared], Writers::Connection).unwrap()
}

#[test]
fn who_is_connected_at_a_cut_stays_with_the_frozen_version() {
    let _alone = alone();
    let server = TestServer::shared(1, false, 2);
    let original = server.image.content();
    let mut old = Guest::new(&server.socket(), 1);
    let Cut { ended, frozen } = cut(&server);
    let mut new = Guest::new(&server.socket(), 1);
    new.write_sectors(0, &[2; 512]);
    old.write_sectors(1, &[1; 512]);
    assert_eq!(old.read_sectors(0, 1024), [&original[..512], &[1; 512]].concat(), "VLUN A has no writes to VLUN B");
    assert_eq!(new.read_sectors(0, 1024), [[2; 512], [1; 512]].concat(), "VLUN B has the writes to VLUN A");
    assert_eq!(server.disk.connections().holders(ended), 1);
    assert_eq!(server.disk.connections().wait_free(ended, Duration::ZERO), None);

    // It leaves, with a request that is still running.
    server.image.delay_ms.store(50, SeqCst);
    begin_write(&mut old, 2, 3);
    until("the request runs", || server.image.running.load(SeqCst) > 0);
    server.image.delay_ms.store(0, SeqCst);
    drop(old);
    let last = server.disk.connections().wait_free(ended, Duration::from_secs(5)).expect("it has left");
    assert!(server.clock.wait_drained(last, Duration::from_secs(5)));
    frozen[0].set_quiesced();
    new.write_sectors(1, &[4; 512]);

    // Its guest comes back, to VLUN B; a backup guest looks at VLUN A.
    let mut back = Guest::new(&server.socket(), 1);
    assert_eq!(back.read_sectors(0, 1536), [[2; 512], [4; 512], [3; 512]].concat());
    back.write_sectors(2, &[5; 512]);
    let dir = tempfile::tempdir().unwrap();
    let backup = serve(ServeOptions {
        name: "backup".to_owned(),
        socket: SocketSource::Path(dir.path().join("sock")),
        attachment: server.disk.attach_frozen(frozen[0].id),
        queues: 1,
        serial: String::new(),
        frontends_max: 2,
        observer: Arc::new(NoObserver),
        once: false,
        hints: Hints::default(),
    })
    .unwrap();
    let mut readers = [Guest::new(&dir.path().join("sock"), 1), Guest::new(&dir.path().join("sock"), 1)];
    let expected = [&original[..512], &[1; 512], &[3; 512], &original[1536..4096]].concat();
    for reader in &mut readers {
        assert_eq!(reader.read_sectors(0, 4096), expected);
    }
    assert_eq!((server.disk.connections().count(), backup.frontends()), (2, 2), "a backup's are not the live disk's");
}
