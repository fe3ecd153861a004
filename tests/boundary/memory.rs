//! Memory that is not there, or comes and goes; more of it than a machine has; and other things than memory.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::harness::{PATIENCE, can_mount, wait_until};
use crate::ring::{DATA, GUEST_BASE, Guest, GuestMemory, HEADER, MEMORY_BYTES, S_OK, STATUS, T_IN, WRITE, memfd};
use crate::scene::Scene;
use crate::silent::SilentFile;

const LARGE_PAGE: u64 = 2 << 20;
const TIB: u64 = 1 << 40;

/// A memory file of large pages, of which the machine has none free. None where it has no such files.
fn large_pages(len: u64) -> Option<File> {
    let file = rustix::fs::memfd_create("guest", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).ok()?;
    let file = File::from(file);
    file.set_len(len).unwrap();
    Some(file)
}

fn region(file: &File, at: u64, len: u64, offset: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: at,
        memory_size: len,
        userspace_addr: at,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    }
}

/// Whether the daemon has hung up.
fn is_closed(guest: &mut Guest) -> bool {
    guest.frontend.get_features().is_err()
}

/// Whoever touches such memory, or lets it go, may hang with what every other thread needs for its own.
#[test]
fn memory_whose_server_may_fall_silent_is_refused() {
    if !can_mount("memory_whose_server_may_fall_silent_is_refused") {
        return;
    }
    let mut scene = Scene::new();
    let silent = SilentFile::mount(&scene.daemon.path("silent"), 1 << 20);
    let file = File::options().read(true).write(true).open(silent.path()).unwrap();
    let mut guest = Guest::connect(&scene.socket(), 0);
    guest.frontend.add_mem_region(&region(&file, GUEST_BASE, 1 << 20, 0)).ok();
    assert!(is_closed(&mut guest), "memory on FUSE was taken");
    drop(guest);
    let mut guest = Guest::connect(&scene.socket(), 0);
    guest.frontend.set_inflight_fd(&VhostUserInflight::new(16 << 10, 0, 1, 128), file.as_raw_fd()).ok();
    assert!(is_closed(&mut guest), "an inflight region on FUSE was taken");
    drop(guest);
    scene.others_go_on();
    scene.end();
}

#[test]
fn large_pages_that_are_not_there() {
    let mut scene = Scene::new();
    let Some(file) = large_pages(2 * LARGE_PAGE) else { return println!("no large pages here: not tried") };
    // As an inflight region, which is a few KiB of the page.
    let mut guest = Guest::connect(&scene.socket(), 0);
    let inflight = VhostUserInflight::new(16 << 10, 0, 1, 128);
    guest.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).ok();
    assert!(is_closed(&mut guest), "an inflight region that is not there was taken");
    drop(guest);
    scene.others_go_on();
    // As memory with rings in it, some of it and the whole.
    for len in [64 << 10, LARGE_PAGE - 4096, LARGE_PAGE, LARGE_PAGE + (64 << 10)] {
        scene.left();
        let mut guest = Guest::connect(&scene.socket(), 0);
        guest.frontend.add_mem_region(&region(&file, GUEST_BASE, len, 0)).unwrap();
        let config = VringConfigData {
            queue_max_size: 128,
            queue_size: 128,
            flags: 0,
            desc_table_addr: GUEST_BASE,
            avail_ring_addr: GUEST_BASE + 0x2000,
            used_ring_addr: GUEST_BASE + 0x3000,
            log_addr: None,
        };
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let f = &mut guest.frontend;
        f.set_vring_num(0, 128).unwrap();
        f.set_vring_base(0, 0).unwrap();
        f.set_vring_addr(0, &config).unwrap();
        f.set_vring_call(0, &call).unwrap();
        f.set_vring_kick(0, &kick).ok();
        f.set_vring_enable(0, true).ok();
        kick.write(1).unwrap();
        wait_until("the connection to be closed", || is_closed(&mut guest));
        scene.others_go_on();
    }
    scene.end();
}

#[test]
fn regions_that_end_within_a_page_are_unmapped() {
    let mut scene = Scene::new();
    let ordinary = memfd(1 << 20).unwrap();
    let large = large_pages(LARGE_PAGE).into_iter();
    for (file, page) in large.map(|file| (file, LARGE_PAGE)).chain([(ordinary, 4096)]) {
        for _ in 0..4 {
            scene.left();
            let mut guest = Guest::connect(&scene.socket(), 0);
            for i in 1..=100 {
                let len = page - (page / 8) * i.min(7);
                guest.frontend.add_mem_region(&region(&file, i * TIB, len, 0)).unwrap();
            }
            guest.frontend.remove_mem_region(&region(&file, TIB, page - page / 8, 0)).unwrap();
        }
    }
    scene.others_go_on();
    scene.end();
}

/// What may be sent as memory, and is none that could be used.
#[test]
fn what_is_no_memory_is_refused() {
    use rustix::fs::{Mode, OFlags, SealFlags};
    let mut scene = Scene::new();
    let open = |path: &str, flags| File::from(rustix::fs::open(path, flags, Mode::empty()).unwrap());
    let sealed = |seal| {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(1 << 20).unwrap();
        rustix::fs::fcntl_add_seals(&file, seal).unwrap();
        file
    };
    let path = scene.daemon.path("memory");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let path = path.to_str().unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
    let rows = [
        ("/dev/zero", open("/dev/zero", OFlags::RDWR)),
        ("/dev/null", open("/dev/null", OFlags::RDWR)),
        ("a directory", open("/", OFlags::RDONLY)),
        ("read-only", open(path, OFlags::RDONLY)),
        ("write-only", open(path, OFlags::WRONLY)),
        ("a path only", open(path, OFlags::PATH)),
        ("no bytes", memfd(0).unwrap()),
        ("too few bytes", memfd(4096).unwrap()),
        ("sealed", sealed(SealFlags::WRITE)),
        ("sealed from now on", sealed(SealFlags::FUTURE_WRITE)),
        ("an eventfd", File::from(event)),
        ("a socket", File::from(std::os::fd::OwnedFd::from(socket))),
        ("a pipe", File::from(std::os::fd::OwnedFd::from(std::io::pipe().unwrap().0))),
    ];
    for (name, file) in &rows {
        for what in ["region", "table", "inflight"] {
            scene.left();
            let mut guest = Guest::connect(&scene.socket(), 0);
            let region = region(file, GUEST_BASE, 1 << 20, 0);
            let taken = match what {
                "region" => guest.frontend.add_mem_region(&region).is_ok(),
                "table" => guest.frontend.set_mem_table(&[region]).is_ok(),
                _ => {
                    let inflight = VhostUserInflight::new(1 << 20, 0, 1, 128);
                    guest.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).is_ok() && !is_closed(&mut guest)
                }
            };
            assert!(!taken, "{name} was taken as {what}");
        }
    }
    scene.others_go_on();
    scene.end();
}

#[test]
fn more_memory_than_a_machine_has_is_refused_and_others_get_theirs() {
    let mut scene = Scene::new();
    let file = memfd(64 * TIB).unwrap();
    let mut guest = Guest::connect(&scene.socket(), 0);
    let taken = (0..7).take_while(|i| {
        let region = region(&file, i * 32 * TIB, 18 * TIB, 0);
        guest.frontend.add_mem_region(&region).is_ok()
    });
    assert_eq!(taken.count(), 0);
    drop(guest);
    scene.left();
    // As much as is to be had, in as many pieces.
    let mut guest = Guest::connect(&scene.socket(), 0);
    let mut total = 0;
    for i in 0..509 {
        if guest.frontend.add_mem_region(&region(&file, i * TIB, TIB / 8, 0)).is_err() {
            break;
        }
        total += TIB / 8;
    }
    println!("{} GiB were taken", total >> 30);
    assert!(total >= TIB / 2, "a large guest has its place");
    assert!(total <= 16 * TIB, "no guest is that large");
    let image = scene.daemon.make_image("vm2", 1 << 20);
    scene.daemon.send("PUT", "/v1/disks/vm2", &json!({ "path": image }).to_string()).ok();
    let mut other = Guest::new(&scene.daemon.socket("vm2"), 1);
    let added = GuestMemory::new(TIB, 256 << 20);
    other.frontend.add_mem_region(&added.region()).unwrap();
    assert_eq!(other.run(T_IN, 0, &[(TIB + 1, 4096, WRITE)]), (S_OK, 4097));
    scene.others_go_on();
    drop((guest, other));
    wait_until("the other disk to go", || scene.daemon.send("DELETE", "/v1/disks/vm2", "").status == 204);
    scene.end();
}

/// Reads through a snapshot of a mirrored disk, into memory that is away for moments.
#[test]
fn memory_that_comes_and_goes_is_no_fault_of_a_leg() {
    let mut scene = Scene::with(|daemon| format!("mirror={}", daemon.path("leg.raw").display()));
    let in_sync = |scene: &Scene| {
        let disk = scene.daemon.show_disk("vm0");
        disk["legs"].as_array().unwrap().iter().filter(|leg| leg["state"] == "in-sync").count() == 2
    };
    wait_until("both legs to be in sync", || in_sync(&scene));
    scene.daemon.snapshot("away", &["vm0"]);
    let socket = scene.daemon.socket("vm0@away");
    let (failed, closed) = (AtomicU64::new(0), AtomicU64::new(0));
    let until = Instant::now() + Duration::from_secs(3);
    let deadline = Instant::now() + *PATIENCE;
    while Instant::now() < until || failed.load(SeqCst) + closed.load(SeqCst) < 5 {
        assert!(Instant::now() < deadline, "the memory was never away in time");
        let mut guest = Guest::new(&socket, 1);
        let memory = guest.memory.file.try_clone().unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    // The rings stay, the data goes.
                    memory.set_len(DATA - GUEST_BASE).unwrap();
                    memory.set_len(MEMORY_BYTES).unwrap();
                }
            });
            'reads: for _ in 0..2000 {
                guest.header(T_IN, 0);
                guest.memory.write(STATUS, &[0xaa]);
                let head = guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 256 << 10, WRITE), (STATUS, 1, WRITE)]);
                guest.submit(0, head);
                while guest.wait_used_for(0, Duration::from_millis(20)).is_none() {
                    if is_closed(&mut guest) {
                        closed.fetch_add(1, SeqCst);
                        break 'reads;
                    }
                }
                if guest.status() != S_OK {
                    failed.fetch_add(1, SeqCst);
                }
            }
            over.store(true, SeqCst);
        });
    }
    println!("{failed:?} reads failed, {closed:?} connections were closed");
    assert!(!scene.daemon.log_text().contains("a leg of the mirror is dropped"));
    assert!(in_sync(&scene), "a leg was dropped: {}", scene.daemon.show_disk("vm0")["legs"]);
    scene.others_go_on();
    scene.daemon.delete("vm0@away");
    scene.end();
}
