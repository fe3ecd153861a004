//! Event descriptors that are full, shared, always ready or something else; and numbers that others get meanwhile.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::fs::OFlags;
use serde_json::json;
use vhost::VhostBackend;
use vmm_sys_util::eventfd::EventFd;

use crate::harness::{PATIENCE, wait_until};
use crate::ring::{ENTRIES, F_EVENT_IDX, Guest, HEADER, STATUS, T_FLUSH, WRITE};
use crate::scene::Scene;

fn event(flags: EventfdFlags) -> EventFd {
    as_event(rustix::event::eventfd(0, flags).unwrap())
}

/// What the client's library sends as an event descriptor, whatever it is.
fn as_event(fd: impl Into<OwnedFd>) -> EventFd {
    // SAFETY: the descriptor was owned and is given away.
    unsafe { EventFd::from_raw_fd(fd.into().into_raw_fd()) }
}

fn set_blocking(event: &EventFd, blocks: bool) {
    // SAFETY: the descriptor is open for as long as the event, which outlives this borrow.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    rustix::fs::fcntl_setfl(fd, if blocks { OFlags::empty() } else { OFlags::NONBLOCK }).unwrap();
}

#[test]
fn a_call_that_is_full_and_blocks_holds_up_nobody() {
    let mut scene = Scene::new();
    let mut guest = Guest::with(&scene.socket(), 1, F_EVENT_IDX);
    let call = event(EventfdFlags::empty());
    guest.frontend.set_vring_call(0, &call).unwrap();
    let over = AtomicBool::new(false);
    let until = Instant::now() + Duration::from_secs(3);
    let answers = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(SeqCst) {
                set_blocking(&call, false);
                call.read().ok();
                call.write(u64::MAX - 1).ok();
                set_blocking(&call, true);
                // Who waits for room now does so for good.
                let (now, full) = (answers.load(SeqCst), Instant::now());
                while answers.load(SeqCst) < now + 2 {
                    if full.elapsed() > Duration::from_secs(1) {
                        return;
                    }
                    std::hint::spin_loop();
                }
            }
        });
        // Flushes of a disk on which nothing was written: the ring is all that there is to do.
        guest.header(T_FLUSH, 0);
        guest.chain(0, 0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
        while Instant::now() < until || answers.load(SeqCst) < 1000 {
            guest.submit(0, 0);
            if guest.wait_used_for(0, *PATIENCE).is_none() {
                break;
            }
            answers.fetch_add(1, SeqCst);
        }
        over.store(true, SeqCst);
    });
    let answers = answers.into_inner();
    println!("{answers} answers");
    assert!(answers >= 1000, "the queue hangs after {answers} answers");
    scene.others_go_on();
    drop(guest);
    scene.end();
}

#[test]
fn what_is_no_event_is_refused() {
    let mut scene = Scene::new();
    let file = |path: &str| File::options().read(true).write(true).open(path).unwrap();
    let path = scene.daemon.path("some-file");
    std::fs::write(&path, vec![1; 4096]).unwrap();
    let none = |fd: i32| {
        assert!(fd >= 0);
        // SAFETY: a descriptor that was just made here.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    // SAFETY: these calls touch no memory but an empty set of signals that lives across the call.
    let (timer, signal, poll, watch) = unsafe {
        let signals: libc::sigset_t = std::mem::zeroed();
        (
            none(libc::timerfd_create(libc::CLOCK_MONOTONIC, 0)),
            none(libc::signalfd(-1, &raw const signals, 0)),
            none(libc::epoll_create1(0)),
            none(libc::inotify_init1(0)),
        )
    };
    let (read, write) = std::io::pipe().unwrap();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let _ends = (read.try_clone().unwrap(), write.try_clone().unwrap());
    let rows = [
        ("a file", as_event(file(path.to_str().unwrap()))),
        ("/dev/zero", as_event(file("/dev/zero"))),
        ("/dev/null", as_event(file("/dev/null"))),
        ("a pipe to read", as_event(read)),
        ("a pipe to write", as_event(write)),
        ("a socket of another kind", as_event(socket)),
        ("a timer", as_event(timer)),
        ("signals", as_event(signal)),
        ("an epoll", as_event(poll)),
        ("an inotify", as_event(watch)),
        ("memory", as_event(crate::ring::memfd(4096).unwrap())),
        ("a semaphore", event(EventfdFlags::SEMAPHORE)),
    ];
    for (name, fd) in &rows {
        for what in ["kick", "call", "err"] {
            scene.left();
            let guest = Guest::new(&scene.socket(), 1);
            let taken = match what {
                "kick" => guest.frontend.set_vring_kick(0, fd).is_ok(),
                "call" => guest.frontend.set_vring_call(0, fd).is_ok(),
                _ => guest.frontend.set_vring_err(0, fd).is_ok(),
            };
            // One end of a pipe can be signalled. Kicks are read from eventfds alone.
            assert_eq!(taken, what != "kick" && *name == "a pipe to write", "{name} as {what}");
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), vec![1; 4096], "the file was written to");
    scene.others_go_on();
    scene.end();
}

/// Seconds of processor time of the thread that serves the first queue of the disk, which is the last one of that name.
fn processor_time(scene: &Scene) -> f64 {
    let at = format!("/proc/{}/task", scene.daemon.pid());
    let tasks = std::fs::read_dir(at).unwrap().map(|task| task.unwrap().path());
    let of = |task: std::path::PathBuf| {
        let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
        let (name, rest) = stat.split_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let ticks = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
        name.ends_with("(q0").then_some((fields[19].parse::<u64>().unwrap(), ticks / 100.0))
    };
    tasks.filter_map(of).max_by_key(|(born, _)| *born).unwrap().1
}

#[test]
fn a_kick_that_is_always_ready_costs_no_processor() {
    let mut scene = Scene::new();
    // Younger than the neighbour's queue by more than a clock tick.
    std::thread::sleep(Duration::from_millis(50));
    let mut guest = Guest::new(&scene.socket(), 1);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let kick = guest.queues[0].kick.try_clone().unwrap();
        let over = &over;
        scope.spawn(move || {
            while !over.load(SeqCst) {
                kick.write(1).ok();
            }
        });
        std::thread::sleep(Duration::from_millis(300));
        let (began, before) = (Instant::now(), processor_time(&scene));
        std::thread::sleep(Duration::from_secs(2));
        let used = processor_time(&scene) - before;
        println!("{used} s in {:.1?}", began.elapsed());
        assert!(used < began.elapsed().as_secs_f64() / 6.0, "it costs {used} s of {:?}", began.elapsed());
        // What it kicks for is still done, and soon.
        for _ in 0..20 {
            guest.read_sectors(0, 512);
        }
        over.store(true, SeqCst);
    });
    scene.others_go_on();
    drop(guest);
    scene.end();
}

/// A ring breaks, and its kick is given back at once: what waits for that must not read from who has its number next.
#[test]
fn a_number_that_is_somebody_elses_is_not_read() {
    let mut scene = Scene::new();
    let image = scene.daemon.make_image("vm2", 1 << 20);
    scene.daemon.send("PUT", "/v1/disks/vm2", &json!({ "path": image }).to_string()).ok();
    let socket = scene.daemon.socket("vm2");
    let over = AtomicBool::new(false);
    let until = Instant::now() + Duration::from_secs(4);
    let (rounds, (connections, broken)) = std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let (mut connections, mut broken) = (0, 0);
            while !over.load(SeqCst) {
                let stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
                let frontend = vhost::vhost_user::Frontend::from_stream(stream, 1);
                // One that comes while another one is leaving waits; but a program that another test starts has the end of that
                // one, too, for a moment. Nobody is served then.
                if frontend.get_features().is_ok() {
                    connections += 1;
                    broken += usize::from((0..10).any(|_| frontend.get_features().is_err()));
                }
            }
            (connections, broken)
        });
        let mut guest = Guest::new(&scene.socket(), 1);
        let mut rounds = 0u32;
        while Instant::now() < until {
            rounds += 1;
            guest.set_avail_index(0, guest.used_index(0).wrapping_add(ENTRIES + 1));
            guest.kick(0);
            let new = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            if rounds.is_multiple_of(2) {
                guest.frontend.set_vring_kick(0, &new).unwrap();
            }
            guest.queues[0].kick = new;
            guest.frontend.get_vring_base(0).unwrap();
            guest.set_avail_index(0, guest.used_index(0));
            guest.start_queue(0, guest.used_index(0));
        }
        over.store(true, SeqCst);
        (rounds, others.join().unwrap())
    });
    println!("{rounds} rounds, {connections} connections beside them, {broken} broken");
    assert!(connections > 0 && broken == 0, "{broken} of {connections} connections were broken");
    scene.others_go_on();
    wait_until("the other disk to go", || scene.daemon.send("DELETE", "/v1/disks/vm2", "").status == 204);
    scene.end();
}
