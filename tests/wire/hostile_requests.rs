//! Chains, rings and requests that no driver should send. Each row gets a fresh connection to one server; afterwards a
//! sane frontend must be served, nothing may leak, and the disk must be what it was.

use super::ring::*;
use super::support::*;

/// What must come of a row.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// The status byte and the used length.
    Status(u8, u32),
    /// The chain comes back with length 0: there was nowhere to write a status.
    Returned,
    /// The ring stops, and its error event says so.
    Broken,
}
use Expect::{Broken, Returned, Status};

type Row = (&'static str, fn(&mut Guest) -> u16, Expect);

const IOERR: Expect = Status(S_IOERR, 1);
const UNSUPP: Expect = Status(S_UNSUPP, 1);
const LAST_SECTOR: u64 = DISK_BYTES as u64 / 512 - 1;

fn io(g: &mut Guest, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u16 {
    g.header(kind, sector);
    let mut pieces = vec![(HEADER, 16, 0)];
    pieces.extend_from_slice(data);
    pieces.push((STATUS, 1, WRITE));
    g.chain(0, 0, &pieces)
}

fn ranges(g: &mut Guest, kind: u32, bytes: &[u8]) -> u16 {
    g.memory.write(DATA, bytes);
    io(g, kind, 0, &[(DATA, bytes.len() as u32, 0)])
}

fn table(g: &mut Guest, entries: &[(u64, u32, u16, u16)], len: u32, flags: u16) -> u16 {
    g.header(T_IN, 0);
    let bytes: Vec<u8> = entries.iter().flat_map(|e| encode(*e)).collect();
    g.memory.write(TABLE, &bytes);
    g.descriptor(0, 0, (TABLE, len, flags, 1));
    0
}

const SANE_TABLE: [(u64, u32, u16, u16); 3] =
    [(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)];

pub const CHAINS: &[Row] = &[
    (
        "a loop of one",
        |g| {
            g.descriptor(0, 0, (DATA, 16, NEXT, 0));
            0
        },
        Returned,
    ),
    (
        "a loop of two",
        |g| {
            g.descriptor(0, 0, (DATA, 16, NEXT, 1));
            g.descriptor(0, 1, (DATA, 16, NEXT, 0));
            0
        },
        Returned,
    ),
    (
        "a loop of writable ones",
        |g| {
            g.descriptor(0, 0, (STATUS, 1, NEXT | WRITE, 0));
            0
        },
        Returned,
    ),
    (
        "next out of range",
        |g| {
            g.descriptor(0, 0, (HEADER, 16, NEXT, ENTRIES));
            0
        },
        Returned,
    ),
    (
        "next far out of range",
        |g| {
            g.descriptor(0, 0, (HEADER, 16, NEXT, u16::MAX));
            0
        },
        Returned,
    ),
    (
        "no status, header only",
        |g| {
            g.header(T_FLUSH, 0);
            g.chain(0, 0, &[(HEADER, 16, 0)])
        },
        Returned,
    ),
    (
        "status not writable",
        |g| {
            g.header(T_IN, 0);
            g.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, 0)])
        },
        Returned,
    ),
    (
        "status of no bytes",
        |g| {
            g.header(T_OUT, 0);
            g.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 0, WRITE)])
        },
        Returned,
    ),
    (
        "status outside memory",
        |g| {
            g.header(T_FLUSH, 0);
            g.chain(0, 0, &[(HEADER, 16, 0), (0x10, 1, WRITE)])
        },
        Returned,
    ),
    (
        "status at the end of addresses",
        |g| {
            g.header(T_FLUSH, 0);
            g.chain(0, 0, &[(HEADER, 16, 0), (u64::MAX, 2, WRITE)])
        },
        Returned,
    ),
    ("only a status", |g| g.chain(0, 0, &[(STATUS, 1, WRITE)]), IOERR),
    ("a header of no bytes", |g| g.chain(0, 0, &[(HEADER, 0, 0), (STATUS, 1, WRITE)]), IOERR),
    (
        "a header of 15 bytes",
        |g| {
            g.header(T_FLUSH, 0);
            g.chain(0, 0, &[(HEADER, 15, 0), (STATUS, 1, WRITE)])
        },
        IOERR,
    ),
    (
        "a split header of 8 bytes",
        |g| {
            g.header(T_FLUSH, 0);
            g.chain(0, 0, &[(HEADER, 4, 0), (HEADER + 4, 4, 0), (STATUS, 1, WRITE)])
        },
        IOERR,
    ),
    ("header outside memory", |g| g.chain(0, 0, &[(0, 16, 0), (STATUS, 1, WRITE)]), IOERR),
    (
        "header across the end of memory",
        |g| g.chain(0, 0, &[(GUEST_BASE + MEMORY_BYTES - 8, 16, 0), (STATUS, 1, WRITE)]),
        IOERR,
    ),
    ("header writable", |g| g.chain(0, 0, &[(HEADER, 16, WRITE), (STATUS, 1, WRITE)]), IOERR),
    ("data of no bytes", |g| io(g, T_IN, 0, &[(DATA, 0, WRITE)]), IOERR),
    ("an empty piece among data", |g| io(g, T_IN, 0, &[(DATA, 512, WRITE), (DATA, 0, WRITE)]), IOERR),
    ("read data readable", |g| io(g, T_IN, 0, &[(DATA, 512, 0)]), IOERR),
    ("write data writable", |g| io(g, T_OUT, 0, &[(DATA, 512, WRITE)]), IOERR),
    ("readable behind writable", |g| io(g, T_IN, 0, &[(DATA, 512, WRITE), (DATA, 512, 0)]), IOERR),
    ("data in both directions, read", |g| io(g, T_IN, 0, &[(DATA, 512, 0), (DATA, 512, WRITE)]), IOERR),
    ("data in both directions, write", |g| io(g, T_OUT, 0, &[(DATA, 512, 0), (DATA, 512, WRITE)]), IOERR),
    ("data outside memory", |g| io(g, T_IN, 0, &[(0x10, 512, WRITE)]), IOERR),
    ("data across the end of memory", |g| io(g, T_IN, 0, &[(GUEST_BASE + MEMORY_BYTES - 256, 512, WRITE)]), IOERR),
    ("data whose address wraps", |g| io(g, T_IN, 0, &[(u64::MAX - 100, 512, WRITE)]), IOERR),
    (
        "total over 4 GiB",
        |g| {
            let p: Vec<_> = (0..3).map(|_| (DATA, u32::MAX - 511, WRITE)).collect();
            io(g, T_IN, 0, &p)
        },
        IOERR,
    ),
    ("indirect of no bytes", |g| table(g, &SANE_TABLE, 0, INDIRECT), Returned),
    ("indirect of 40 bytes", |g| table(g, &SANE_TABLE, 40, INDIRECT), Returned),
    ("indirect of 4 GiB", |g| table(g, &SANE_TABLE, u32::MAX - 15, INDIRECT), Returned),
    (
        "indirect outside memory",
        |g| {
            g.descriptor(0, 0, (0x1000, 48, INDIRECT, 0));
            0
        },
        Returned,
    ),
    (
        "indirect across the end of memory",
        |g| {
            g.descriptor(0, 0, (GUEST_BASE + MEMORY_BYTES - 16, 48, INDIRECT, 0));
            0
        },
        Returned,
    ),
    ("indirect and next", |g| table(g, &SANE_TABLE, 48, INDIRECT | NEXT), Returned),
    (
        "indirect inside indirect",
        |g| table(g, &[(HEADER, 16, NEXT, 1), (TABLE, 48, INDIRECT, 0), (STATUS, 1, WRITE, 0)], 48, INDIRECT),
        Returned,
    ),
    (
        "indirect with a loop",
        |g| table(g, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 1)], 32, INDIRECT),
        Returned,
    ),
    (
        "indirect with next out of range",
        |g| table(g, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 9)], 32, INDIRECT),
        Returned,
    ),
];

pub const REQUESTS: &[Row] = &[
    ("read beyond the end", |g| io(g, T_IN, LAST_SECTOR + 1, &[(DATA, 512, WRITE)]), IOERR),
    ("read across the end", |g| io(g, T_IN, LAST_SECTOR, &[(DATA, 1024, WRITE)]), IOERR),
    ("write beyond the end", |g| io(g, T_OUT, LAST_SECTOR + 1, &[(DATA, 512, 0)]), IOERR),
    ("write across the end", |g| io(g, T_OUT, LAST_SECTOR, &[(DATA, 1024, 0)]), IOERR),
    ("sector × 512 overflows", |g| io(g, T_OUT, u64::MAX / 512 + 1, &[(DATA, 512, 0)]), IOERR),
    ("sector × 512 wraps to 0", |g| io(g, T_OUT, 1 << 55, &[(DATA, 512, 0)]), IOERR),
    ("position + length overflows", |g| io(g, T_OUT, u64::MAX / 512, &[(DATA, 1024, 0)]), IOERR),
    ("the last sector there is", |g| io(g, T_OUT, u64::MAX, &[(DATA, 512, 0)]), IOERR),
    ("length 511", |g| io(g, T_OUT, 0, &[(DATA, 511, 0)]), IOERR),
    ("length 513", |g| io(g, T_IN, 0, &[(DATA, 513, WRITE)]), IOERR),
    ("length 1", |g| io(g, T_IN, 0, &[(DATA, 1, WRITE)]), IOERR),
    ("read without data", |g| io(g, T_IN, 0, &[]), IOERR),
    ("write without data", |g| io(g, T_OUT, 0, &[]), IOERR),
    ("unknown type", |g| io(g, 99, 0, &[]), UNSUPP),
    ("unknown type with data", |g| io(g, 0xffff_ffff, 0, &[(DATA, 512, WRITE)]), UNSUPP),
    ("SCSI command", |g| io(g, 2, 0, &[(DATA, 512, WRITE)]), UNSUPP),
    ("legacy barrier bit, read without data", |g| io(g, 0x8000_0000, 0, &[]), IOERR),
    ("SCSI command out", |g| io(g, 3, 0, &[(DATA, 512, 0)]), UNSUPP),
    ("discard in the wrong direction", |g| ranges(g, 10, &range(0, 8, 0)), UNSUPP),
    ("secure erase", |g| ranges(g, 14, &range(0, 8, 0)), UNSUPP),
    ("zone report", |g| io(g, 16, 0, &[(DATA, 512, WRITE)]), UNSUPP),
    ("discard of no segments", |g| io(g, T_DISCARD, 0, &[]), IOERR),
    ("discard of half a segment", |g| ranges(g, T_DISCARD, &[0; 8]), IOERR),
    ("discard of a segment and a half", |g| ranges(g, T_DISCARD, &[0; 24]), IOERR),
    ("discard of 4097 segments", |g| ranges(g, T_DISCARD, &range(0, 8, 0).repeat(4097)), IOERR),
    (
        "discard of 16 MiB of segments",
        |g| {
            let p: Vec<_> = (0..64).map(|_| (DATA, 256 << 10, 0)).collect();
            io(g, T_DISCARD, 0, &p)
        },
        IOERR,
    ),
    ("discard of 0 sectors", |g| ranges(g, T_DISCARD, &range(0, 0, 0)), IOERR),
    ("discard of too many sectors", |g| ranges(g, T_DISCARD, &range(0, (1 << 21) + 1, 0)), IOERR),
    ("discard beyond the end", |g| ranges(g, T_DISCARD, &range(LAST_SECTOR, 2, 0)), IOERR),
    ("discard that overflows", |g| ranges(g, T_DISCARD, &range(u64::MAX, 1, 0)), IOERR),
    ("discard that wraps to 0", |g| ranges(g, T_DISCARD, &range(1 << 55, 8, 0)), IOERR),
    (
        "discard with a good and a bad segment",
        |g| ranges(g, T_DISCARD, &[range(0, 8, 0), range(LAST_SECTOR, 2, 0)].concat()),
        IOERR,
    ),
    ("discard with the unmap flag", |g| ranges(g, T_DISCARD, &range(0, 8, 1)), UNSUPP),
    ("discard with unknown flags", |g| ranges(g, T_DISCARD, &range(0, 8, 0x80)), UNSUPP),
    ("discard whose segment is writable", |g| io(g, T_DISCARD, 0, &[(DATA, 16, WRITE)]), IOERR),
    ("discard outside memory", |g| io(g, T_DISCARD, 0, &[(0x10, 16, 0)]), IOERR),
    ("write-zeroes of no segments", |g| io(g, T_WRITE_ZEROES, 0, &[]), IOERR),
    ("write-zeroes of 0 sectors", |g| ranges(g, T_WRITE_ZEROES, &range(0, 0, 0)), IOERR),
    ("write-zeroes of 4097 segments", |g| ranges(g, T_WRITE_ZEROES, &range(0, 8, 0).repeat(4097)), IOERR),
    ("write-zeroes of too many sectors", |g| ranges(g, T_WRITE_ZEROES, &range(0, u32::MAX, 0)), IOERR),
    ("write-zeroes beyond the end", |g| ranges(g, T_WRITE_ZEROES, &range(LAST_SECTOR + 1, 1, 0)), IOERR),
    (
        "write-zeroes of more than the disk has",
        |g| ranges(g, T_WRITE_ZEROES, &range(0, LAST_SECTOR as u32 + 1, 0).repeat(2)),
        IOERR,
    ),
    ("write-zeroes with unknown flags", |g| ranges(g, T_WRITE_ZEROES, &range(0, 8, 2)), UNSUPP),
    (
        "write-zeroes with a good and an unknown segment",
        |g| ranges(g, T_WRITE_ZEROES, &[range(0, 8, 0), range(8, 8, 4)].concat()),
        UNSUPP,
    ),
    ("GET_ID without a buffer", |g| io(g, T_GET_ID, 0, &[]), IOERR),
    ("GET_ID with a readable buffer", |g| io(g, T_GET_ID, 0, &[(DATA, 20, 0)]), IOERR),
    ("GET_ID into 5 bytes", |g| io(g, T_GET_ID, 0, &[(DATA, 5, WRITE)]), Status(S_OK, 6)),
    ("GET_ID into 64 bytes", |g| io(g, T_GET_ID, 0, &[(DATA, 64, WRITE)]), Status(S_OK, 21)),
    ("GET_ID outside memory", |g| io(g, T_GET_ID, 0, &[(0x10, 20, WRITE)]), IOERR),
    ("FLUSH with data to read", |g| io(g, T_FLUSH, 0, &[(DATA, 512, 0)]), Status(S_OK, 1)),
    ("FLUSH with data to write", |g| io(g, T_FLUSH, 0, &[(DATA, 512, WRITE)]), Status(S_OK, 1)),
    ("FLUSH with a sector", |g| io(g, T_FLUSH, u64::MAX, &[]), Status(S_OK, 1)),
];

/// Overlapping segments are the driver's right; both are carried out, in order.
#[test]
fn overlapping_segments_zero_their_union() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let mut guest = Guest::new(&server.socket(), 1);
    let mut expected = server.image.content();
    // Of a discard only whole blocks of eight sectors count.
    for (kind, at, zeroed) in [(T_DISCARD, 0u64, 8), (T_WRITE_ZEROES, 64, 12)] {
        let bytes = [range(at, 8, 0), range(at + 4, 8, 0), range(at, 8, 0)].concat();
        let head = ranges(&mut guest, kind, &bytes);
        guest.submit(0, head);
        assert_eq!((guest.wait_used(0).1, guest.status()), (1, S_OK));
        expected[at as usize * 512..(at as usize + zeroed) * 512].fill(0);
    }
    assert!(server.image.content() == expected);
}

pub const READ_ONLY: &[Row] = &[
    ("write to a read-only disk", |g| io(g, T_OUT, 0, &[(DATA, 512, 0)]), IOERR),
    ("discard on a read-only disk", |g| ranges(g, T_DISCARD, &range(0, 8, 0)), IOERR),
    ("write-zeroes on a read-only disk", |g| ranges(g, T_WRITE_ZEROES, &range(0, 8, 1)), IOERR),
    ("read of a read-only disk", |g| io(g, T_IN, 0, &[(DATA, 512, WRITE)]), Status(S_OK, 513)),
    ("flush of a read-only disk", |g| io(g, T_FLUSH, 0, &[]), Status(S_OK, 1)),
    ("GET_ID of a read-only disk", |g| io(g, T_GET_ID, 0, &[(DATA, 20, WRITE)]), Status(S_OK, 21)),
];

/// Rows about the ring itself announce what they want; the returned head is announced once more by the harness.
pub const RINGS: &[Row] = &[
    (
        "avail index one ring ahead and one more",
        |g| {
            let n = g.queues[0].next_avail;
            g.set_avail_index(0, n.wrapping_add(ENTRIES + 1));
            NONE
        },
        Broken,
    ),
    (
        "avail index half way round",
        |g| {
            let n = g.queues[0].next_avail;
            g.set_avail_index(0, n.wrapping_add(0x8000));
            NONE
        },
        Broken,
    ),
    (
        "avail index backwards",
        |g| {
            let n = g.queues[0].next_avail;
            g.set_avail_index(0, n.wrapping_sub(1));
            NONE
        },
        Broken,
    ),
    ("head out of range", |_| ENTRIES, Broken),
    ("head far out of range", |_| u16::MAX, Broken),
    (
        "the same head twice at once",
        |g| {
            let head = io(g, T_IN, 0, &[(DATA, 512, WRITE)]);
            g.announce(0, head);
            head
        },
        Broken,
    ),
];
const NONE: u16 = 0x7777;

fn run_table(rows: &[Row], read_only: bool, without: u64) -> usize {
    let server = TestServer::new(1, read_only);
    let expected = server.image.content();
    let sane = |what: &str| {
        let mut guest = Guest::new(&server.socket(), 1);
        assert_eq!(guest.read_sectors(16, 4096), expected[8192..12288], "{what}: a sane frontend is not served");
        drop(guest);
        server.wait_idle();
    };
    sane("at the start");
    let (descriptors, threads_before) = (settled_descriptors(), threads());
    for (name, build, expect) in rows {
        let mut guest = Guest::with(&server.socket(), 1, without);
        // One good request first, so that indices are not at their start.
        guest.run(T_FLUSH, 0, &[]);
        guest.memory.write(STATUS, &[0xaa]);
        let head = build(&mut guest);
        if head == NONE {
            guest.kick(0);
        } else {
            guest.submit(0, head);
        }
        match *expect {
            Status(status, len) => {
                assert_eq!(guest.wait_used(0), (u32::from(head), len), "{name}: used entry");
                assert_eq!(guest.status(), status, "{name}: status");
            }
            Returned => {
                assert_eq!(guest.wait_used(0), (u32::from(head), 0), "{name}: used entry");
                assert_eq!(guest.status(), 0xaa, "{name}: a status was written");
            }
            Broken => assert!(guest.is_broken(0), "{name}: the ring goes on"),
        }
        if matches!(expect, Broken) {
            // The connection lives, and its base can be asked for.
            vhost::VhostBackend::get_vring_base(&guest.frontend, 0).unwrap();
        } else {
            // The same ring goes on.
            assert_eq!(guest.read_sectors(16, 512), expected[8192..8704], "{name}: the ring does not go on");
        }
        assert!(server.image.content() == expected, "{name}: the disk changed");
        drop(guest);
        server.wait_idle();
        sane(name);
        until("threads end", || threads() == threads_before);
        until(&format!("{name}: descriptors are closed"), || open_descriptors() == descriptors);
    }
    rows.len()
}

#[test]
fn chains() {
    let _alone = alone();
    println!("chains: {} rows", run_table(CHAINS, false, 0));
}

#[test]
fn requests() {
    let _alone = alone();
    println!("requests: {} rows", run_table(REQUESTS, false, 0) + run_table(READ_ONLY, true, 0));
}

#[test]
fn rings() {
    let _alone = alone();
    println!("rings: {} rows", run_table(RINGS, false, 0));
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let _alone = alone();
    let rows: &[Row] = &[
        ("indirect", |g| table(g, &SANE_TABLE, 48, INDIRECT), Returned),
        ("discard", |g| ranges(g, T_DISCARD, &range(0, 8, 0)), UNSUPP),
        ("write-zeroes", |g| ranges(g, T_WRITE_ZEROES, &range(0, 8, 0)), UNSUPP),
    ];
    println!("not negotiated: {} rows", run_table(rows, false, F_INDIRECT | 1 << 13 | 1 << 14));
}

/// Descriptors, headers and data that change while they are read: whatever comes of it, the daemon and the rest of the
/// disk are as before.
#[test]
fn a_guest_that_rewrites_its_requests() {
    let _alone = alone();
    let mut random = Random::new("a_guest_that_rewrites_its_requests");
    let server = TestServer::new(1, true);
    let expected = server.image.content();
    let mut guest = Guest::new(&server.socket(), 1);
    let deadline = std::time::Instant::now() + std::time::Duration::from_millis(500);
    let mut answered = 0;
    while std::time::Instant::now() < deadline {
        guest.header(T_IN, 0);
        guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        guest.submit(0, 0);
        let bytes = encode((random.next(), random.next() as u32, random.next() as u16, random.next() as u16));
        for _ in 0..20 {
            let at = GUEST_BASE + random.below(3) * 16;
            let from = random.below(8) as usize;
            guest.memory.write(at + from as u64, &bytes[from..from + 8]);
            guest.memory.write(HEADER, &bytes);
        }
        guest.wait_used(0);
        answered += 1;
    }
    println!("rewritten while read: {answered} requests");
    assert!(server.image.content() == expected);
    drop(guest);
    Guest::new(&server.socket(), 1).read_sectors(0, 512);
}
