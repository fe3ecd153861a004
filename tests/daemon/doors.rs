//! Frontends that come while a command is about to close their socket.
//!
//! What always holds: who was served is never cut off by a command that was not forced. It is refused, or the frontend finds
//! nobody. Who meets whom is left to the machine; a sound daemon passes however that goes.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Answer, Daemon, PATIENCE};
use crate::volumes::{daemon_with_snapshot, made};

/// How often each command is given at least; and then until it was carried out once.
const ROUNDS: usize = 40;
/// How long a visitor stays at most, in steps of 100 us; and away.
const STAY_MAX: u32 = 20;
/// VHOST_USER_GET_FEATURES, version 1, without a payload.
const GET_FEATURES: [u32; 3] = [1, 1, 0];
const ANSWER_BYTES: usize = 20;

/// Comes to a socket, asks for the features, stays for a moment, and leaves; again and again.
struct Visitor {
    ends: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    cut_off: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Visitor {
    fn at(socket: PathBuf) -> Visitor {
        let (ends, served, cut_off) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (until, counts) = (ends.clone(), (served.clone(), cut_off.clone()));
        let visit = move || {
            for round in 0.. {
                if until.load(SeqCst) {
                    return;
                }
                let pause = Duration::from_micros(100) * (round * 7 % STAY_MAX + 1);
                match visit(&socket, pause) {
                    None => {}
                    Some(is_cut_off) => {
                        counts.0.fetch_add(1, SeqCst);
                        counts.1.fetch_add(usize::from(is_cut_off), SeqCst);
                    }
                }
                std::thread::sleep(Duration::from_micros(100) * (round * 3 % STAY_MAX + 1));
            }
        };
        Visitor { ends, served, cut_off, thread: Some(std::thread::spawn(visit)) }
    }

    /// How often it was served, and then cut off.
    fn leave(mut self) -> (usize, usize) {
        self.ends.store(true, SeqCst);
        self.thread.take().unwrap().join().unwrap();
        (self.served.load(SeqCst), self.cut_off.load(SeqCst))
    }
}

/// Whether the visitor was cut off. None if it was never served.
fn visit(socket: &PathBuf, stay: Duration) -> Option<bool> {
    let mut stream = UnixStream::connect(socket).ok()?;
    let asked: Vec<u8> = GET_FEATURES.iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&asked).ok()?;
    stream.read_exact(&mut [0; ANSWER_BYTES]).ok()?;
    stream.set_read_timeout(Some(stay)).unwrap();
    match stream.read(&mut [0; 1]) {
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Some(false),
        _ => Some(true),
    }
}

/// Gives a command that is refused with `code` while somebody is connected, undoes it where it was carried out, and so on.
fn under_visits(socket: PathBuf, code: &str, ask: impl Fn() -> Answer, undo: impl Fn()) {
    let (visitor, mut done, mut rounds) = (Visitor::at(socket), 0, 0);
    let began = Instant::now();
    while rounds < ROUNDS || done == 0 {
        assert!(began.elapsed() < *PATIENCE, "{done} of {rounds} carried out");
        rounds += 1;
        let answer = ask();
        if answer.status < 400 {
            done += 1;
            undo();
        } else {
            assert_eq!(answer.refused(), code, "{}", answer.body);
        }
    }
    let (served, cut_off) = visitor.leave();
    println!("{done} of {rounds} carried out; a visitor was served {served} times");
    assert_eq!(cut_off, 0, "visitors were served and then cut off, of {served}");
}

fn with_clone() -> Daemon {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    daemon
}

#[test]
fn nobody_is_cut_off_by_disabling_a_volume() {
    let daemon = with_clone();
    let post = |what: &str| daemon.send("POST", &format!("/v1/volumes/clone/{what}"), "");
    let enable = || {
        post("enable").ok();
    };
    under_visits(daemon.socket("clone"), "volume-busy", || post("disable"), enable);
}

#[test]
fn nobody_is_cut_off_by_deleting_a_volume() {
    let daemon = with_clone();
    let make = || {
        made(&daemon, "clone", "vm0@daily");
    };
    under_visits(daemon.socket("clone"), "volume-busy", || daemon.send("DELETE", "/v1/volumes/clone", ""), make);
}

#[test]
fn nobody_is_cut_off_by_updating_a_volume() {
    let daemon = with_clone();
    let update = || daemon.send("POST", "/v1/volumes/clone/update", "");
    under_visits(daemon.socket("clone"), "volume-busy", update, || {});
}

#[test]
fn nobody_is_cut_off_by_removing_a_disk() {
    let daemon = Daemon::with_disks(&[1 << 20], "");
    let body = json!({ "path": daemon.image("vm0") }).to_string();
    let add = || {
        daemon.send("PUT", "/v1/disks/vm0", &body).ok();
    };
    under_visits(daemon.socket("vm0"), "disk-busy", || daemon.send("DELETE", "/v1/disks/vm0", ""), add);
}

#[test]
fn nobody_is_cut_off_by_deleting_a_snapshot() {
    let daemon = Daemon::with_disks(&[1 << 20], "");
    let take = || {
        daemon.api().create("daily", &["vm0"], &json!({ "wait": true })).ok();
    };
    take();
    let delete = || daemon.send("DELETE", "/v1/snapshots/vm0@daily", "");
    under_visits(daemon.socket("vm0@daily"), "snapshot-busy", delete, take);
}
