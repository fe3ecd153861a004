//! A rough look at the cost of a request against plain io_uring. Run it by name, in release:
//! `cargo test --release --test wire speed -- --ignored --nocapture`.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use halfsilver::image::{Direct, FileImage, ImageOptions};
use halfsilver::mirror::{Disk, Epoch, EpochClock};
use halfsilver::vhost_user::{NoObserver, ServeOptions, SocketSource, serve};
use io_uring::{IoUring, opcode, types};

use super::ring::*;
use super::support::*;

const DEPTH: u16 = 32;
const FILE_BYTES: u64 = 256 << 20;
const RUN: Duration = Duration::from_secs(2);

fn plain(file: &std::fs::File, random: &mut Random) -> f64 {
    let mut ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(64).unwrap();
    let mut buffers = vec![[0u8; 4096]; usize::from(DEPTH)];
    let mut push = |ring: &mut IoUring, i: u64| {
        let at = random.below(FILE_BYTES / 4096) * 4096;
        let buffer = buffers[i as usize].as_mut_ptr();
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), buffer, 4096).offset(at).build().user_data(i);
        // SAFETY: the buffer lives until the ring is dropped, with nothing in flight then.
        unsafe { ring.submission().push(&entry).unwrap() };
    };
    (0..u64::from(DEPTH)).for_each(|i| push(&mut ring, i));
    let (began, mut n) = (Instant::now(), 0u64);
    while began.elapsed() < RUN {
        ring.submit_and_wait(1).unwrap();
        let done: Vec<u64> = ring.completion().map(|c| c.user_data()).collect();
        n += done.len() as u64;
        done.into_iter().for_each(|i| push(&mut ring, i));
    }
    let rate = n as f64 / began.elapsed().as_secs_f64();
    ring.submit_and_wait(usize::from(DEPTH)).unwrap();
    rate
}

fn through_the_socket(path: &Path, direct: Direct, random: &mut Random) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let image = FileImage::open(path, ImageOptions { direct, read_only: false }).unwrap();
    let server = serve(ServeOptions {
        name: "speed".to_owned(),
        socket: SocketSource::Path(dir.path().join("s")),
        attachment: Disk::plain(EpochClock::new(Epoch(0)), Arc::new(image), false).attach_live(),
        queues: 1,
        serial: String::new(),
        observer: Arc::new(NoObserver),
        once: false,
    })
    .unwrap();
    let mut guest = Guest::new(&dir.path().join("s"), 1);
    let mut kicks = 0u64;
    let start = |guest: &mut Guest, slot: u16, random: &mut Random, kicks: &mut u64| {
        let header = HEADER + u64::from(slot) * 16;
        guest.header_at(header, T_IN, random.below(FILE_BYTES / 4096) * 8);
        let data = DATA + u64::from(slot) * 4096;
        guest.chain(0, slot * 3, &[(header, 16, 0), (data, 4096, WRITE), (STATUS + u64::from(slot), 1, WRITE)]);
        let old = guest.queues[0].next_avail;
        guest.announce(0, slot * 3);
        if guest.avail_event(0) == old {
            guest.kick(0);
            *kicks += 1;
        }
    };
    (0..DEPTH).for_each(|slot| start(&mut guest, slot, random, &mut kicks));
    let (began, mut n) = (Instant::now(), 0u64);
    while began.elapsed() < RUN {
        // As a driver does: sleep until called, then take all there is.
        let used = guest.queues[0].last_used;
        guest.set_used_event(0, used);
        if guest.used_index(0) == used {
            let mut poll = [rustix::event::PollFd::from_borrowed_fd(
                // SAFETY: the guest's own eventfd, open while the guest lives.
                unsafe { std::os::fd::BorrowedFd::borrow_raw(guest.queues[0].call.as_raw_fd()) },
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut poll, None).unwrap();
            drop(guest.queues[0].call.read());
        }
        while let Some((id, _)) = guest.poll_used(0) {
            n += 1;
            start(&mut guest, id as u16 / 3, random, &mut kicks);
        }
    }
    let rate = n as f64 / began.elapsed().as_secs_f64();
    println!("  {} kicks for {n} requests", kicks);
    drop(guest);
    server.stop();
    rate
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    let _alone = alone();
    let mut random = Random::new("speed");
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let block: Vec<u8> = (0..1u32 << 20).map(|i| i as u8).collect();
    for _ in 0..FILE_BYTES >> 20 {
        std::io::Write::write_all(&mut file.as_file(), &block).unwrap();
    }
    for _ in 0..3 {
        let plain = plain(file.as_file(), &mut random);
        let ours = through_the_socket(file.path(), Direct::Off, &mut random);
        println!("plain {plain:.0}/s, socket {ours:.0}/s: {:.2}", ours / plain);
    }
}
