//! Messages that no frontend should send, as raw bytes and descriptors on the socket.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::ring::*;
use super::support::*;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const RESET_DEVICE: u32 = 34;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const SET_STATUS: u32 = 39;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;

/// A message: request, flags, the size its header claims (or its own), body, how many descriptors of /dev/null.
pub struct Message(pub u32, pub u32, pub Option<u32>, pub Vec<u8>, pub usize);

pub fn send(stream: &UnixStream, message: &Message, files: &[File]) {
    let Message(code, flags, size, body, _) = message;
    let mut bytes = Vec::new();
    for word in [*code, *flags, size.unwrap_or(body.len() as u32)] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    let fds: Vec<_> = files.iter().map(|f| f.as_raw_fd()).collect();
    // The other side may have closed already; the row looks at that.
    if let Err(e) = stream.send_with_fds(&[&bytes[..12], &bytes[12..]], &fds) {
        assert!(e.errno() == libc::EPIPE || e.errno() == libc::ECONNRESET, "{e}");
    }
}

pub fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Sends a SET_VRING_KICK, CALL or ERR on a frontend's own socket, with any payload, and reads the answer.
pub fn send_vring_fd(guest: &Guest, code: u32, value: u64, file: Option<&File>) -> bool {
    let stream = socket_of(guest);
    let files: Vec<File> = file.into_iter().map(|f| f.try_clone().unwrap()).collect();
    send(&stream, &Message(code, VERSION | NEED_REPLY, None, u64s(&[value]), 0), &files);
    let mut reply = [0; 20];
    (&stream).read_exact(&mut reply).is_ok() && reply[12..20] == [0; 8]
}

/// A message has so many descriptors, however many pieces it comes in.
#[test]
fn descriptors_do_not_add_up_over_the_pieces_of_a_message() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let before = settled_descriptors();
    let stream = UnixStream::connect(server.socket()).unwrap();
    let file = memfd(4096).unwrap();
    let files = [file.as_raw_fd(); 64];
    let header = [u32s(&[SET_MEM_TABLE, VERSION, 4000]), vec![0; 100]].concat();
    for byte in &header {
        if stream.send_with_fds(&[std::slice::from_ref(byte)], &files).is_err() {
            break;
        }
    }
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let closed = (&stream).read(&mut [0]);
    assert!(
        closed.as_ref().map_or_else(|e| e.kind() == std::io::ErrorKind::ConnectionReset, |n| *n == 0),
        "{closed:?}"
    );
    until("all are closed", || settled_descriptors() <= before + 2);
}

/// The first thing that frontends ask for.
pub fn send_get_features(stream: &UnixStream) {
    send(stream, &message(GET_FEATURES, vec![]), &[]);
}

fn socket_of(guest: &Guest) -> UnixStream {
    // SAFETY: the frontend's descriptor is open for as long as the guest, which outlives this borrow.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(guest.frontend.as_raw_fd()) };
    UnixStream::from(fd.try_clone_to_owned().unwrap())
}

fn message(code: u32, body: Vec<u8>) -> Message {
    Message(code, VERSION | NEED_REPLY, None, body, 0)
}

/// Rows for a connection that has negotiated everything and has memory, but no running queue. All close it.
fn rows() -> Vec<(&'static str, Message)> {
    let region = |guest: u64, size: u64, user: u64, offset: u64| u64s(&[0, guest, size, user, offset]);
    let table = |n: u32, pad: u32, regions: &[u64]| [u32s(&[n, pad]), u64s(regions)].concat();
    let with = |mut m: Message, fds: usize| {
        m.4 = fds;
        m
    };
    vec![
        ("request 0", message(0, vec![])),
        ("unknown request", message(200, vec![])),
        ("request u32::MAX", message(u32::MAX, vec![])),
        ("version 0", Message(GET_FEATURES, 0, None, vec![], 0)),
        ("version 2", Message(GET_FEATURES, 2, None, vec![], 0)),
        ("reserved flags", Message(GET_FEATURES, VERSION | 0x100, None, vec![], 0)),
        ("a reply", Message(GET_FEATURES, VERSION | 4, None, vec![], 0)),
        ("size 4 GiB", Message(SET_FEATURES, VERSION, Some(u32::MAX), vec![0; 8], 0)),
        ("size over a page", Message(SET_FEATURES, VERSION, Some(4097), vec![0; 4097], 0)),
        ("GET_FEATURES with a body", message(GET_FEATURES, vec![0; 8])),
        ("SET_OWNER with a body", message(SET_OWNER, vec![0; 8])),
        ("SET_FEATURES of 4 bytes", message(SET_FEATURES, vec![0; 4])),
        ("SET_FEATURES not offered", message(SET_FEATURES, u64s(&[1 << 63]))),
        ("SET_FEATURES packed ring", message(SET_FEATURES, u64s(&[1 << 34 | 1 << 32]))),
        ("SET_PROTOCOL_FEATURES not offered", message(SET_PROTOCOL_FEATURES, u64s(&[1 << 1]))),
        ("SET_PROTOCOL_FEATURES unknown", message(SET_PROTOCOL_FEATURES, u64s(&[1 << 63]))),
        ("GET_PROTOCOL_FEATURES with a body", message(GET_PROTOCOL_FEATURES, vec![0; 8])),
        ("GET_QUEUE_NUM with a descriptor", with(message(GET_QUEUE_NUM, vec![]), 1)),
        ("GET_FEATURES with descriptors", with(message(GET_FEATURES, vec![]), 3)),
        ("SET_STATUS", message(SET_STATUS, u64s(&[1]))),
        ("RESET_DEVICE with a body", message(RESET_DEVICE, vec![0; 8])),
        ("SET_LOG_BASE", with(message(SET_LOG_BASE, u64s(&[4096, 0])), 1)),
        ("GET_INFLIGHT_FD of no queues", message(GET_INFLIGHT_FD, vec![0; 24])),
        ("SET_INFLIGHT_FD of no queues", with(message(SET_INFLIGHT_FD, vec![0; 24]), 1)),
        ("SET_VRING_NUM size 0", message(SET_VRING_NUM, u32s(&[0, 0]))),
        ("SET_VRING_NUM size 3", message(SET_VRING_NUM, u32s(&[0, 3]))),
        ("SET_VRING_NUM size 32769", message(SET_VRING_NUM, u32s(&[0, 32769]))),
        ("SET_VRING_NUM size 65536", message(SET_VRING_NUM, u32s(&[0, 65536]))),
        ("SET_VRING_NUM size 2^31", message(SET_VRING_NUM, u32s(&[0, 1 << 31]))),
        ("SET_VRING_NUM of queue 1", message(SET_VRING_NUM, u32s(&[1, 8]))),
        ("SET_VRING_NUM of queue u32::MAX", message(SET_VRING_NUM, u32s(&[u32::MAX, 8]))),
        ("SET_VRING_BASE 65536", message(SET_VRING_BASE, u32s(&[0, 65536]))),
        ("SET_VRING_BASE of queue 99", message(SET_VRING_BASE, u32s(&[99, 0]))),
        ("GET_VRING_BASE of queue 99", message(GET_VRING_BASE, u32s(&[99, 0]))),
        ("SET_VRING_ENABLE of queue 99", message(SET_VRING_ENABLE, u32s(&[99, 1]))),
        ("SET_VRING_ENABLE 2", message(SET_VRING_ENABLE, u32s(&[0, 2]))),
        ("SET_VRING_ADDR of queue 99", message(SET_VRING_ADDR, [u32s(&[99, 0]), u64s(&[0; 4])].concat())),
        ("SET_VRING_ADDR short", message(SET_VRING_ADDR, vec![0; 39])),
        ("SET_VRING_ADDR unknown flags", message(SET_VRING_ADDR, [u32s(&[0, 0x80]), u64s(&[0; 4])].concat())),
        (
            "SET_VRING_ADDR descriptors misaligned",
            message(SET_VRING_ADDR, [u32s(&[0, 0]), u64s(&[8, 0, 0, 0])].concat()),
        ),
        ("SET_VRING_ADDR used misaligned", message(SET_VRING_ADDR, [u32s(&[0, 0]), u64s(&[0, 2, 0, 0])].concat())),
        ("SET_VRING_ADDR avail misaligned", message(SET_VRING_ADDR, [u32s(&[0, 0]), u64s(&[0, 0, 1, 0])].concat())),
        ("SET_VRING_KICK of queue 99", with(message(SET_VRING_KICK, u64s(&[99])), 1)),
        ("SET_VRING_KICK without its descriptor", message(SET_VRING_KICK, u64s(&[0]))),
        ("SET_VRING_KICK with a descriptor it denies", with(message(SET_VRING_KICK, u64s(&[0x100])), 1)),
        ("SET_VRING_KICK with two descriptors", with(message(SET_VRING_KICK, u64s(&[0])), 2)),
        ("SET_VRING_KICK not an eventfd", with(message(SET_VRING_KICK, u64s(&[0])), 1)),
        ("SET_VRING_CALL not an eventfd", with(message(SET_VRING_CALL, u64s(&[0])), 1)),
        ("SET_VRING_ERR not an eventfd", with(message(SET_VRING_ERR, u64s(&[0])), 1)),
        ("SET_VRING_CALL of queue 255", with(message(SET_VRING_CALL, u64s(&[255])), 1)),
        ("GET_CONFIG out of range", message(GET_CONFIG, [u32s(&[250, 10, 0]), vec![0; 10]].concat())),
        ("GET_CONFIG overflow", message(GET_CONFIG, [u32s(&[u32::MAX, 10, 0]), vec![0; 10]].concat())),
        ("GET_CONFIG size that lies", message(GET_CONFIG, [u32s(&[0, 60, 0]), vec![0; 10]].concat())),
        ("GET_CONFIG of no bytes", message(GET_CONFIG, u32s(&[0, 0, 0]))),
        ("SET_CONFIG of the capacity", message(SET_CONFIG, [u32s(&[0, 8, 0]), vec![0; 8]].concat())),
        ("SET_CONFIG of two bytes", message(SET_CONFIG, [u32s(&[32, 2, 0]), vec![0; 2]].concat())),
        ("SET_CONFIG of value 2", message(SET_CONFIG, [u32s(&[32, 1, 0]), vec![2]].concat())),
        ("SET_CONFIG out of range", message(SET_CONFIG, [u32s(&[300, 1, 0]), vec![0]].concat())),
        ("SET_MEM_TABLE of 0 regions", message(SET_MEM_TABLE, table(0, 0, &[]))),
        ("SET_MEM_TABLE of 33 regions", with(message(SET_MEM_TABLE, table(33, 0, &vec![0; 33 * 4])), 32)),
        ("SET_MEM_TABLE of u32::MAX regions", message(SET_MEM_TABLE, table(u32::MAX, 0, &[]))),
        ("SET_MEM_TABLE without descriptors", message(SET_MEM_TABLE, table(1, 0, &[0, 4096, 0, 0]))),
        ("SET_MEM_TABLE with too many descriptors", with(message(SET_MEM_TABLE, table(1, 0, &[0, 4096, 0, 0])), 2)),
        ("SET_MEM_TABLE of /dev/null", with(message(SET_MEM_TABLE, table(1, 0, &[0, 4096, 0, 0])), 1)),
        ("SET_MEM_TABLE with padding of /dev/null", with(message(SET_MEM_TABLE, table(1, 1, &[0, 4096, 0, 0])), 1)),
        ("SET_BACKEND_REQ_FD of /dev/null", with(message(SET_BACKEND_REQ_FD, vec![]), 1)),
        ("SET_BACKEND_REQ_FD without a descriptor", message(SET_BACKEND_REQ_FD, vec![])),
        ("SET_OWNER with descriptors", with(message(SET_OWNER, vec![]), 1)),
        ("more descriptors than there is room for", with(message(SET_MEM_TABLE, vec![0; 40]), 100)),
        ("SET_MEM_TABLE cut short", with(message(SET_MEM_TABLE, table(2, 0, &[0, 4096, 0, 0])), 2)),
        ("SET_MEM_TABLE of 2 bytes", message(SET_MEM_TABLE, vec![0; 2])),
        ("ADD_MEM_REG without a descriptor", message(ADD_MEM_REG, region(0, 4096, 0, 0))),
        ("ADD_MEM_REG with two descriptors", with(message(ADD_MEM_REG, region(0, 4096, 0, 0)), 2)),
        ("ADD_MEM_REG of no bytes", with(message(ADD_MEM_REG, region(0, 0, 0, 0)), 1)),
        ("ADD_MEM_REG that wraps", with(message(ADD_MEM_REG, region(u64::MAX, 4096, 0, 0)), 1)),
        ("REM_MEM_REG unknown", message(REM_MEM_REG, region(0xdead_0000, 4096, 0, 0))),
        ("REM_MEM_REG short", message(REM_MEM_REG, vec![0; 8])),
    ]
}

fn is_closed(stream: &UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut sink = [0; 512];
    loop {
        match (&*stream).read(&mut sink) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(e) => return e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn messages() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let expected = server.image.content();
    drop(Guest::new(&server.socket(), 1));
    server.wait_idle();
    let (descriptors, threads_before) = (settled_descriptors(), threads());
    let rows = rows();
    for (name, message) in &rows {
        let guest = Guest::with(&server.socket(), 0, 0);
        let files: Vec<File> = (0..message.4).map(|_| File::open("/dev/null").unwrap()).collect();
        let stream = socket_of(&guest);
        send(&stream, message, &files);
        // What waits for more bytes than come is ended by the hang-up.
        let waits_for_more = message.2.is_some_and(|size| size as usize > message.3.len());
        if matches!(*name, "GET_CONFIG out of range" | "GET_CONFIG overflow") {
            // The protocol has an answer for these: a reply of no bytes. The connection goes on.
            let mut reply = [0; 24];
            (&stream).read_exact(&mut reply).unwrap();
            assert_eq!(reply[16..20], [0; 4], "{name}: bytes from outside the config space");
        } else if !waits_for_more || message.2 == Some(u32::MAX) {
            assert!(is_closed(&stream), "{name}: the connection goes on");
        }
        drop((guest, stream, files));
        server.wait_idle();
        let mut sane = Guest::new(&server.socket(), 1);
        assert_eq!(sane.read_sectors(16, 4096), expected[8192..12288], "{name}: a sane frontend is not served");
        drop(sane);
        server.wait_idle();
        until("threads end", || threads() == threads_before);
        until(&format!("{name}: descriptors are closed"), || open_descriptors() == descriptors);
    }
    println!("messages: {} rows", rows.len());
}

/// The sane messages of a set-up, cut off after every byte.
#[test]
fn disconnect_at_every_byte_of_every_message() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    drop(Guest::new(&server.socket(), 1));
    server.wait_idle();
    let region = memfd(1 << 20).unwrap();
    let event = EventFd::new(0).unwrap();
    let descriptors = settled_descriptors();
    let set_up = [
        message(GET_FEATURES, vec![]),
        message(SET_OWNER, vec![]),
        message(SET_FEATURES, u64s(&[1 << 32 | 1 << 30])),
        message(GET_PROTOCOL_FEATURES, vec![]),
        message(SET_PROTOCOL_FEATURES, u64s(&[1 << 15 | 1 << 9 | 1 << 3 | 1])),
        message(GET_CONFIG, [u32s(&[0, 60, 0]), vec![0; 60]].concat()),
        message(ADD_MEM_REG, u64s(&[0, 0, 1 << 20, 0x1_0000_0000, 0])),
        message(SET_VRING_NUM, u32s(&[0, 128])),
        message(SET_VRING_ADDR, [u32s(&[0, 0]), u64s(&[0x1_0000_0000, 0x1_0000_4000, 0x1_0000_8000, 0])].concat()),
        message(SET_VRING_KICK, u64s(&[0])),
        message(SET_VRING_CALL, u64s(&[0])),
        message(SET_VRING_ENABLE, u32s(&[0, 1])),
        message(GET_VRING_BASE, u32s(&[0, 0])),
    ];
    let mut cuts = 0;
    for last in 0..set_up.len() {
        let total = 12 + set_up[last].3.len();
        for cut in [0, 1, 11, 12, 13, total - 1, total] {
            let stream = UnixStream::connect(server.socket()).unwrap();
            for (i, m) in set_up[..=last].iter().enumerate() {
                let mut bytes = u32s(&[m.0, m.1, m.3.len() as u32]);
                bytes.extend_from_slice(&m.3);
                bytes.truncate(if i == last { cut.min(bytes.len()) } else { usize::MAX });
                let fd = match m.0 {
                    ADD_MEM_REG => Some(region.as_raw_fd()),
                    SET_VRING_KICK | SET_VRING_CALL => Some(event.as_raw_fd()),
                    _ => None,
                };
                let fds: Vec<_> = fd.into_iter().filter(|_| !bytes.is_empty()).collect();
                if !bytes.is_empty() {
                    stream.send_with_fds(&[&bytes[..]], &fds).unwrap();
                }
            }
            drop(stream);
            cuts += 1;
        }
    }
    server.wait_idle();
    drop(Guest::new(&server.socket(), 1));
    server.wait_idle();
    until("descriptors are closed", || open_descriptors() == descriptors);
    println!("disconnects: {cuts} places");
}

#[test]
fn a_thousand_connects_a_second() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    drop(Guest::new(&server.socket(), 1));
    server.wait_idle();
    let (descriptors, threads_before) = (settled_descriptors(), threads());
    let began = Instant::now();
    for i in 0..1000 {
        let stream = UnixStream::connect(server.socket()).unwrap();
        if i % 3 == 0 {
            send(&stream, &message(GET_FEATURES, vec![]), &[]);
        }
        drop(stream);
        if i % 100 == 0 {
            server.wait_idle();
        }
    }
    let took = began.elapsed();
    server.wait_idle();
    // It waits in the backlog behind those that have left already.
    Guest::new(&server.socket(), 1).read_sectors(0, 512);
    until("descriptors and threads are gone", || open_descriptors() == descriptors && threads() == threads_before);
    println!("a thousand connects in {took:?}");
    assert!(took < Duration::from_secs(2));
}

#[test]
fn rings_cannot_change_while_they_run() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    type Change = fn(&mut Guest) -> vhost::Result<()>;
    let rows: &[(&str, Change)] = &[
        ("size", |g| vhost::VhostBackend::set_vring_num(&g.frontend, 0, 8)),
        ("base", |g| vhost::VhostBackend::set_vring_base(&g.frontend, 0, 0)),
        ("addresses", |g| {
            let mut config = g.ring_config(0);
            config.used_ring_addr += 0x1000;
            vhost::VhostBackend::set_vring_addr(&g.frontend, 0, &config)
        }),
        ("features", |g| vhost::VhostBackend::set_features(&g.frontend, g.features & !F_EVENT_IDX)),
    ];
    for (name, change) in rows {
        let mut guest = Guest::new(&server.socket(), 1);
        assert!(change(&mut guest).is_err(), "{name}");
        drop(guest);
        server.wait_idle();
        Guest::new(&server.socket(), 1).read_sectors(0, 512);
    }
    println!("changes while running: {} rows", rows.len());
}

#[test]
fn rings_outside_memory_do_not_start() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let end = GUEST_BASE + MEMORY_BYTES;
    type Change = fn(&mut vhost::VringConfigData, &Guest);
    let rows: &[(&str, Change)] = &[
        ("descriptors at 0", |c, _| c.desc_table_addr = 0),
        ("avail at 0", |c, _| c.avail_ring_addr = 0),
        ("used at 0", |c, _| c.used_ring_addr = 0),
        ("descriptors at the end", |c, g| c.desc_table_addr = g.memory.user(GUEST_BASE) + MEMORY_BYTES),
        ("used across the end", |c, g| c.used_ring_addr = g.memory.user(GUEST_BASE) + MEMORY_BYTES - 8),
        ("avail at the end of addresses", |c, _| c.avail_ring_addr = u64::MAX - 1),
        ("descriptors across the end", |c, g| c.desc_table_addr = g.memory.user(GUEST_BASE) + MEMORY_BYTES - 16),
    ];
    assert!(end > GUEST_BASE);
    for (name, change) in rows {
        let mut guest = Guest::with(&server.socket(), 0, 0);
        guest.add_queue(0, ENTRIES);
        let mut config = guest.ring_config(0);
        change(&mut config, &guest);
        use vhost::VhostBackend;
        use vhost::vhost_user::VhostUserFrontend;
        let started = guest
            .frontend
            .set_vring_num(0, ENTRIES)
            .and_then(|()| guest.frontend.set_vring_addr(0, &config))
            .and_then(|()| guest.frontend.set_vring_kick(0, &guest.queues[0].kick));
        let enabled = started.is_ok() && guest.frontend.set_vring_enable(0, true).is_ok();
        assert!(!enabled, "{name}");
        drop(guest);
        server.wait_idle();
        Guest::new(&server.socket(), 1).read_sectors(0, 512);
    }
    println!("rings outside memory: {} rows", rows.len());
}
