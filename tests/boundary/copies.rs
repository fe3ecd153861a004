//! Memory that requests cost the daemon.

use serde_json::json;

use crate::ring::{GUEST_BASE, Guest, HEADER, INDIRECT, S_OK, STATUS, T_IN, T_OUT, WRITE, encode};
use crate::scene::Scene;

const TABLES: u64 = GUEST_BASE + 0x21_0000;
const TABLE_BYTES: u64 = 0x800;
const BUFFER: u64 = GUEST_BASE + 0x30_0000;
const SEGMENT: u64 = 256 << 10;
const SEGMENTS: u64 = 124;
const REQUESTS: u16 = 40;
/// The guest's memory, the budget of its disk, and room for what the allocator keeps and for what is no copy.
const MORE_BYTES: u64 = (64 << 20) + (32 << 20) + (160 << 20);

/// 40 requests of 31 MiB at once, whose buffer begins so many bytes behind an aligned one.
fn large_requests(guest: &mut Guest, kind: u32, behind: u64) {
    guest.header(kind, 0);
    let flags = if kind == T_IN { WRITE } else { 0 };
    for head in 0..REQUESTS {
        let at = TABLES + u64::from(head) * TABLE_BYTES;
        let segments = (0..SEGMENTS).map(|i| (BUFFER + behind + i * SEGMENT, SEGMENT as u32, flags));
        let pieces: Vec<_> = std::iter::once((HEADER, 16, 0)).chain(segments).chain([(STATUS, 1, WRITE)]).collect();
        for (i, &(piece, len, flags)) in pieces.iter().enumerate() {
            let next = if i + 1 < pieces.len() { crate::ring::NEXT } else { 0 };
            guest.memory.write(at + i as u64 * 16, &encode((piece, len, flags | next, i as u16 + 1)));
        }
        guest.descriptor(0, head, (at, pieces.len() as u32 * 16, INDIRECT, 0));
        guest.announce(0, head);
    }
    guest.kick(0);
    for _ in 0..REQUESTS {
        guest.wait_used_for(0, *crate::harness::PATIENCE).expect("a large request is answered");
        assert_eq!(guest.status(), S_OK);
    }
}

#[test]
fn large_requests_are_copied_piece_by_piece() {
    let mut scene = Scene::new();
    let mut guest = Guest::new(&scene.socket(), 1);
    guest.write_sectors(8, &[7; 4096]);
    scene.forget_peak();
    let before = scene.peak();
    large_requests(&mut guest, T_IN, 1);
    assert_eq!(guest.memory.read(BUFFER + 1 + 4095, 4098), [&[0][..], &[7; 4096], &[0]].concat());
    guest.memory.write(BUFFER + 3, &[9; 512]);
    guest.memory.write(BUFFER + 3 + (30 << 20), &[8; 512]);
    large_requests(&mut guest, T_OUT, 3);
    let more = scene.peak() - before;
    println!("{} MiB more", more >> 20);
    assert_eq!(guest.read_sectors(0, 512), [9; 512]);
    assert_eq!(guest.read_sectors((30 << 20) / 512, 512), [8; 512]);
    assert!(more < MORE_BYTES, "{more} bytes more");
    scene.others_go_on();
    drop(guest);
    scene.end();
}

/// What goes to a pack is copied there.
#[test]
fn writes_to_a_packed_log_have_a_budget() {
    let mut scene = Scene::new();
    let mut guest = Guest::new(&scene.socket(), 1);
    let logged = json!({ "strategy": "write-logging", "layout": "packed", "wait": true });
    scene.daemon.api().create("old", &["vm0"], &logged).ok();
    guest.memory.write(BUFFER, &vec![5; 31 << 20]);
    scene.forget_peak();
    let before = scene.peak();
    large_requests(&mut guest, T_OUT, 0);
    let more = scene.peak() - before;
    println!("{} MiB more", more >> 20);
    assert!(more < MORE_BYTES, "{more} bytes more");
    assert_eq!(guest.read_sectors(0, 512), [5; 512]);
    scene.daemon.delete("vm0@old");
    scene.others_go_on();
    drop(guest);
    scene.end();
}

/// Also those that must be copied for the device as well: whoever has a part of the budget never waits for another one.
#[test]
fn first_writes_under_a_snapshot_have_a_budget() {
    let mut scene = Scene::new();
    let mut guest = Guest::new(&scene.socket(), 1);
    for behind in [0, 3] {
        guest.memory.write(BUFFER + behind, &vec![5; 31 << 20]);
        large_requests(&mut guest, T_OUT, 0);
        scene.daemon.snap("old");
        guest.memory.write(BUFFER + behind, &vec![6; 31 << 20]);
        scene.forget_peak();
        let before = scene.peak();
        large_requests(&mut guest, T_OUT, behind);
        let more = scene.peak() - before;
        println!("{} MiB more", more >> 20);
        assert!(more < MORE_BYTES, "{more} bytes more");
        assert_eq!(scene.daemon.content("vm0@old")[512..31 << 20], vec![5; (31 << 20) - 512]);
        assert_eq!(guest.read_sectors(0, 512), [6; 512]);
        scene.daemon.delete("vm0@old");
    }
    scene.others_go_on();
    drop(guest);
    scene.end();
}
