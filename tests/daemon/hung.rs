//! What hangs holds up itself only: a file system that stands still, a file that never answers, a socket that nobody
//! accepts at, a state directory without room. Changes of other disks are answered, and reading never waits.
//!
//! How long each answer took is printed. The bounds are generous, because the machine may be busy; what is to be seen is
//! that nothing waits for what hangs.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::asking::ask_within;
use crate::client::Client;
use crate::harness::{Answer, Daemon, Events, can_mount, wait_until};
use crate::silent::SilentFile;
use crate::trouble::{Mount, Standstill};

const SIZE: u64 = 1 << 20;
/// What a change of another disk may take; and what reading may.
const CHANGE: Duration = Duration::from_secs(10);
const READING: Duration = Duration::from_secs(5);
/// More than the daemon could have threads for.
const CALLS: usize = 70;
/// TimeoutStopSec of `qemu/systemd/halfsilver.service`.
const STOP: Duration = Duration::from_secs(90);

const IN_FLIGHT: &str = "the snapshot of a disk with a request that hangs";

type Request<'a> = (&'a str, &'a str, &'a str);

/// Everything that only reads, and what waits least of all.
const READINGS: [&str; 8] = [
    "/v1/status",
    "/v1/version",
    "/v1/disks",
    "/v1/snapshots",
    "/v1/volumes",
    "/v1/jobs",
    "/v1/disks/slow",
    "/metrics",
];

#[track_caller]
fn answers(daemon: &Daemon, request: Request, bound: Duration) -> (Answer, Duration) {
    let (method, path, _) = request;
    let Some((answer, took)) = ask_within(daemon, request, bound) else {
        panic!("{method} {path} is not answered within {bound:?}");
    };
    println!("{method} {path}: {} after {took:.1?}", answer.status);
    (answer, took)
}

/// Everything that only reads is answered, whatever hangs.
#[track_caller]
fn reading_goes_on(daemon: &Daemon) {
    let mut longest = Duration::ZERO;
    for path in READINGS {
        let Some((answer, took)) = ask_within(daemon, ("GET", path, ""), READING) else {
            panic!("GET {path} is not answered within {READING:?}");
        };
        let may_be_gone = path == "/v1/disks/slow" && answer.status == 404;
        assert!(answer.status == 200 || may_be_gone, "{path}: {} {}", answer.status, answer.body);
        longest = longest.max(took);
    }
    println!("reading: {longest:.1?} at most");
}

/// Reading goes on, and so does what others do; `round` keeps the names apart.
#[track_caller]
fn others_go_on(daemon: &Daemon, round: &str) {
    reading_goes_on(daemon);
    let create = json!({ "name": round, "disks": ["vm0"], "wait": true }).to_string();
    let (answer, _) = answers(daemon, ("POST", "/v1/snapshots", &create), CHANGE);
    assert_eq!(answer.status, 201, "{}", answer.body);
    let image = daemon.make_image(&format!("more-{round}"), SIZE);
    let add = json!({ "path": image }).to_string();
    let path = format!("/v1/disks/more-{round}");
    assert_eq!(answers(daemon, ("PUT", &path, &add), CHANGE).0.status, 201);
    assert_eq!(answers(daemon, ("DELETE", &path, ""), CHANGE).0.status, 204);
    let mut client = daemon.client("vm0");
    client.write(0..64, 3);
    assert_eq!(client.tag(63), 3);
    assert_eq!(answer.json()[0]["state"], "quiesced");
    let volume = json!({ "name": format!("v-{round}"), "from": format!("vm0@{round}") }).to_string();
    assert_eq!(answers(daemon, ("POST", "/v1/volumes", &volume), CHANGE).0.status, 201);
    let path = format!("/v1/volumes/v-{round}");
    assert_eq!(answers(daemon, ("DELETE", &path, ""), CHANGE).0.status, 204);
    let path = format!("/v1/snapshots/vm0@{round}");
    assert_eq!(answers(daemon, ("DELETE", &path, ""), CHANGE).0.status, 204);
}

/// Whether `status` names an operation on this entity: an entry of its `claims` has it among its `entities`.
fn is_claimed(daemon: &Daemon, entity: &str) -> bool {
    let (status, _) = ask_within(daemon, ("GET", "/v1/status", ""), READING).expect("status is answered");
    let status = status.json();
    let claims = status["claims"].as_array().cloned().unwrap_or_default();
    claims.iter().any(|claim| claim["entities"].as_array().is_some_and(|all| all.contains(&json!(entity))))
}

/// The operation that hangs is at work: others are asked after it.
fn at_work(daemon: &Daemon, entity: &str) {
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until && !is_claimed(daemon, entity) {
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
fn assert_claimed(daemon: &Daemon, entity: &str) {
    assert!(is_claimed(daemon, entity), "status names no operation on {entity}");
}

/// Asks on a thread of its own, and is told nothing unless it is asked for.
fn ask_in_vain(daemon: &Daemon, (method, path, body): Request) -> std::thread::JoinHandle<Answer> {
    let (api, method, path, body) = (daemon.api(), method.to_owned(), path.to_owned(), body.to_owned());
    std::thread::spawn(move || api.send(&method, &path, &body))
}

/// A daemon with `vm0`, and with `slow`, whose image is on a file system that can be made to stand still. The guest of
/// `slow` has a write in flight then.
struct Slow {
    daemon: Daemon,
    standstill: Option<Standstill>,
    guest: Client,
    // After all that has files there.
    _mount: Mount,
}

impl Slow {
    fn new() -> Slow {
        let mut daemon = Daemon::place();
        daemon.make_image("vm0", SIZE);
        daemon.arg_disk("vm0", "");
        let mount = Mount::ext4(&daemon.path("slow"), 16 << 20);
        std::fs::File::create(daemon.path("slow/slow.raw")).unwrap().set_len(SIZE).unwrap();
        daemon.arg_disk_at("slow", &daemon.path("slow/slow.raw"), "");
        daemon.start();
        let mut guest = daemon.client("slow");
        guest.write(0..8, 1);
        Slow { daemon, standstill: None, guest, _mount: mount }
    }

    /// From here on whatever is written there hangs.
    fn stand_still(&mut self) {
        self.standstill = Some(Standstill::begin(&self.daemon.path("slow")));
    }

    /// So does a write of the guest.
    fn stand_still_with_a_write(&mut self) {
        self.stand_still();
        self.guest.queues[0].submit_write(0, 0..8, 2, false);
        let pid = self.daemon.pid();
        wait_until("the write to hang", || has_hanging_thread(pid));
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // Or the daemon cannot be ended.
        drop(self.standstill.take());
    }
}

/// Whether a thread of a process waits for something that no signal ends.
pub(crate) fn has_hanging_thread(pid: u32) -> bool {
    let tasks = Path::new("/proc").join(pid.to_string()).join("task");
    let hangs = |task: std::fs::DirEntry| state_in(&task.path()) == Some('D');
    std::fs::read_dir(tasks).is_ok_and(|all| all.flatten().any(hangs))
}

fn state_in(proc: &Path) -> Option<char> {
    let stat = std::fs::read_to_string(proc.join("stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// A disk hangs for good, its removal with it: all else goes on, `status` names the claim, and when the disk moves again
/// the removal ends as it was meant.
#[test]
fn a_removal_of_a_disk_that_hangs_holds_up_itself_only() {
    if !can_mount("a_removal_of_a_disk_that_hangs_holds_up_itself_only") {
        return;
    }
    let mut slow = Slow::new();
    slow.stand_still_with_a_write();
    let removal = ask_in_vain(&slow.daemon, ("DELETE", "/v1/disks/slow?force=true", ""));
    at_work(&slow.daemon, "slow");
    others_go_on(&slow.daemon, "a");
    assert_claimed(&slow.daemon, "slow");
    // Another one on the same disk is refused, or waits with a bound; it says who has it.
    let (answer, _) = answers(&slow.daemon, ("DELETE", "/v1/disks/slow?force=true", ""), Duration::from_secs(60));
    assert!(answer.status >= 400 && answer.body.contains("slow"), "{} {}", answer.status, answer.body);
    drop(slow.standstill.take());
    let removed = removal.join().unwrap();
    assert!((200..300).contains(&removed.status), "{} {}", removed.status, removed.body);
    assert_eq!(slow.daemon.get("/v1/disks/slow").status, 404);
}

/// As many calls that hang as there are threads for calls, and more.
#[test]
fn many_calls_that_hang_hold_up_no_other() {
    if !can_mount("many_calls_that_hang_hold_up_no_other") {
        return;
    }
    let mut slow = Slow::new();
    slow.stand_still_with_a_write();
    let calls: Vec<_> =
        (0..CALLS).map(|_| ask_in_vain(&slow.daemon, ("DELETE", "/v1/disks/slow?force=true", ""))).collect();
    at_work(&slow.daemon, "slow");
    others_go_on(&slow.daemon, "a");
    assert_claimed(&slow.daemon, "slow");
    others_go_on(&slow.daemon, "b");
    drop(slow.standstill.take());
    let answered = calls.into_iter().map(|call| call.join().unwrap().status).filter(|s| (200..300).contains(s)).count();
    assert_eq!(answered, 1, "one of them has removed it");
}

/// What is made on a file system that stands still: each of these hangs or is refused, and nothing else waits for it.
#[test]
fn what_is_made_where_all_stands_still_holds_up_itself_only() {
    if !can_mount("what_is_made_where_all_stands_still_holds_up_itself_only") {
        return;
    }
    for (what, method, path, body) in [
        ("a snapshot's image", "POST", "/v1/snapshots", r#"{"name":"s","disks":["vm1"],"image":"$SLOW/s.img"}"#),
        ("a volume's image", "POST", "/v1/volumes", r#"{"name":"new","from":"vm1","image":"$SLOW/v.log"}"#),
        ("a leg", "POST", "/v1/disks/vm1/mirror", r#"{"path":"$SLOW/leg.raw"}"#),
        ("a disk's leg", "PUT", "/v1/disks/new", r#"{"path":"$DIR/new.raw","mirror":"$SLOW/leg.raw"}"#),
        (IN_FLIGHT, "POST", "/v1/snapshots", r#"{"name":"s","disks":["slow"],"wait":true}"#),
    ] {
        println!("{what}:");
        let mut slow = Slow::new();
        let image = slow.daemon.make_image("vm1", SIZE);
        slow.daemon.send("PUT", "/v1/disks/vm1", &json!({ "path": image }).to_string()).ok();
        slow.daemon.make_image("new", SIZE);
        match what {
            IN_FLIGHT => slow.stand_still_with_a_write(),
            _ => slow.stand_still(),
        }
        let directory = slow.daemon.dir.path().to_str().unwrap().to_owned();
        let body = body.replace("$SLOW", &format!("{directory}/slow")).replace("$DIR", &directory);
        let call = ask_in_vain(&slow.daemon, (method, path, &body));
        others_go_on(&slow.daemon, "a");
        drop(slow.standstill.take());
        let answer = call.join().unwrap();
        println!("{what}: {} in the end", answer.status);
        assert_ne!(answer.status, 599, "{what}: {}", answer.body);
        others_go_on(&slow.daemon, "b");
    }
}

/// Tells a daemon to end. Returns whether it has in time: a thread that the kernel does not let go keeps the process, but its
/// first thread has ended.
fn ends_in_time(daemon: &mut Daemon) -> bool {
    let (began, process) = (Instant::now(), Path::new("/proc").join(daemon.pid().to_string()));
    daemon.terminate();
    let has_ended = || matches!(state_in(&process), None | Some('Z' | 'X'));
    while !has_ended() && began.elapsed() < STOP {
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("ended: {}, after {:.1?}", has_ended(), began.elapsed());
    has_ended()
}

/// The end of the daemon waits for nothing that hangs: it ends within the time that its unit gives it, as far as the
/// kernel lets it go, and the next one serves again.
#[test]
fn the_daemon_ends_while_a_disk_hangs() {
    if !can_mount("the_daemon_ends_while_a_disk_hangs") {
        return;
    }
    let mut slow = Slow::new();
    slow.daemon.snap("a");
    slow.daemon.client("vm0").write(0..64, 4);
    slow.stand_still_with_a_write();
    let removal = ask_in_vain(&slow.daemon, ("DELETE", "/v1/disks/slow?force=true", ""));
    wait_until("the removal to be at work", || has_hanging_thread(slow.daemon.pid()));
    let in_time = ends_in_time(&mut slow.daemon);
    drop(slow.standstill.take());
    removal.join().unwrap();
    wait_until("the process to be gone", || slow.daemon.ended().is_some());
    assert!(in_time, "the daemon is still there {STOP:?} after it was told to end");
    slow.daemon.start();
    assert_eq!(slow.daemon.state("vm0@a"), "quiesced", "what does not hang is saved as ever");
    assert_eq!(slow.daemon.client("vm0").tag(10), 4);
}

/// A socket that is listened at and never accepted at, with as many waiting as it has room for.
struct Deaf {
    path: PathBuf,
    _listener: UnixListener,
    _waiting: Vec<std::os::fd::OwnedFd>,
}

impl Deaf {
    fn listen(path: PathBuf) -> Deaf {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, listen, socket_with};
        let listener = UnixListener::bind(&path).unwrap();
        listen(&listener, 0).unwrap();
        let mut waiting = Vec::new();
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            match connect(&socket, &SocketAddrUnix::new(&path).unwrap()) {
                Ok(()) => waiting.push(socket),
                Err(e) => {
                    assert_eq!(e, rustix::io::Errno::AGAIN);
                    return Deaf { path, _listener: listener, _waiting: waiting };
                }
            }
        }
    }
}

/// A disk, a snapshot or a volume whose socket's place is taken by somebody who does not even accept: it is refused, or is
/// there without its socket and says so, in bounded time; nobody else waits.
#[test]
fn a_socket_that_nobody_accepts_at_is_in_use() {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    std::fs::rename(daemon.make_image("new", SIZE), daemon.path("slow.raw")).unwrap();
    daemon.send("PUT", "/v1/disks/slow", &json!({ "path": daemon.path("slow.raw") }).to_string()).ok();
    let deaf = Deaf::listen(daemon.path("deaf.sock"));
    let image = daemon.make_image("vm9", SIZE);
    let disk = json!({ "path": image, "socket": deaf.path }).to_string();
    let snapshot = json!({ "name": "s", "disks": ["vm1"], "socket": deaf.path, "wait": true }).to_string();
    let volume = json!({ "name": "v", "from": "vm1", "socket": deaf.path }).to_string();
    for (method, path, body) in
        [("PUT", "/v1/disks/vm9", disk), ("POST", "/v1/volumes", volume), ("POST", "/v1/snapshots", snapshot)]
    {
        let (answer, _) = answers(&daemon, (method, path, &body), CHANGE);
        let is_told = answer.body.contains("deaf.sock");
        assert!(is_told, "{method} {path}: {} {}", answer.status, answer.body);
        assert!(answer.status >= 400 || path == "/v1/snapshots", "{method} {path}: {}", answer.body);
        others_go_on(&daemon, "a");
    }
    // Many at once.
    let calls: Vec<_> = (0..CALLS).map(|_| ask_in_vain(&daemon, ("PUT", "/v1/disks/vm9", &disk_at(&daemon)))).collect();
    others_go_on(&daemon, "b");
    for call in calls {
        assert!(call.join().unwrap().status >= 400);
    }
    assert!(deaf.path.exists(), "it is somebody else's");
}

fn disk_at(daemon: &Daemon) -> String {
    json!({ "path": daemon.image("vm9"), "socket": daemon.path("deaf.sock") }).to_string()
}

/// One that takes a volume's place while that is disabled.
#[test]
fn enabling_where_nobody_accepts_is_refused() {
    let daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    daemon.send("PUT", "/v1/disks/slow", &json!({ "path": daemon.make_image("slow", SIZE) }).to_string()).ok();
    daemon.send("POST", "/v1/volumes", r#"{"name":"v","from":"vm1"}"#).ok();
    daemon.send("POST", "/v1/volumes/v/disable", "").ok();
    let deaf = Deaf::listen(daemon.socket("v"));
    let (refused, _) = answers(&daemon, ("POST", "/v1/volumes/v/enable", ""), CHANGE);
    assert!(refused.status >= 400 && refused.body.contains("v.sock"), "{} {}", refused.status, refused.body);
    others_go_on(&daemon, "a");
    let path = deaf.path.clone();
    drop(deaf);
    std::fs::remove_file(path).unwrap();
    let (enabled, _) = answers(&daemon, ("POST", "/v1/volumes/v/enable", ""), CHANGE);
    assert_eq!(enabled.status, 200, "{}", enabled.body);
}

/// No room in the state directory: what would need some is refused for that reason, at once; reading and guests go on, and
/// with room all is well again.
#[test]
fn a_full_state_directory_refuses_and_holds_nothing_up() {
    if !can_mount("a_full_state_directory_refuses_and_holds_nothing_up") {
        return;
    }
    let (daemon, _mount) = crate::faults::on_small("state");
    let image = daemon.make_image("slow", SIZE);
    daemon.send("PUT", "/v1/disks/slow", &json!({ "path": image }).to_string()).ok();
    daemon.make_image("new", SIZE);
    let filler = crate::faults::fill(&daemon.state_dir());
    let new = json!({ "path": daemon.image("new") }).to_string();
    let mut wrong = Vec::new();
    for (method, path, body) in [
        ("POST", "/v1/snapshots", r#"{"name":"a","disks":["vm0"],"wait":true}"#),
        ("POST", "/v1/snapshots", r#"{"name":"b","disks":["vm0","slow"],"wait":true}"#),
        ("POST", "/v1/volumes", r#"{"name":"v","from":"vm0"}"#),
        ("PUT", "/v1/disks/new", &new),
    ] {
        let (answer, _) = answers(&daemon, (method, path, body), CHANGE);
        // What finds room after all may be done.
        if answer.status >= 400 && answer.refused() != "no-space" {
            wrong.push(format!("{method} {path}: {}", answer.body));
        }
        reading_goes_on(&daemon);
        daemon.client("vm0").write(0..64, 5);
    }
    std::fs::remove_file(filler).unwrap();
    others_go_on(&daemon, "later");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// daemon ends, and what hung is refused when the image is gone.
#[test]
fn adding_an_image_that_never_answers_holds_up_itself_only() {
    if !can_mount("adding_an_image_that_never_answers_holds_up_itself_only") {
        return;
    }
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut silent = SilentFile::mount(&daemon.path("silent"), SIZE as usize);
    silent.fall_silent();
    let add = json!({ "path": silent.path() }).to_string();
    let first = ask_in_vain(&daemon, ("PUT", "/v1/disks/slow", &add));
    at_work(&daemon, "slow");
    others_go_on(&daemon, "a");
    assert_claimed(&daemon, "slow");
    let more: Vec<_> = (0..CALLS).map(|_| ask_in_vain(&daemon, ("PUT", "/v1/disks/slow", &add))).collect();
    others_go_on(&daemon, "b");
    let began = Instant::now();
    daemon.terminate();
    let ended = std::iter::from_fn(|| {
        std::thread::sleep(Duration::from_millis(50));
        (began.elapsed() < STOP).then(|| daemon.ended().is_some())
    });
    let in_time = ended.into_iter().any(|has_ended| has_ended);
    println!("ended: {in_time}, after {:.1?}", began.elapsed());
    silent.end();
    more.into_iter().chain([first]).for_each(|call| drop(call.join().unwrap()));
    assert!(in_time, "the daemon is still there {STOP:?} after it was told to end");
    daemon.start();
    assert_eq!(daemon.client("vm0").tag(63), 3);
}

/// A start waits for no image either: what answers is served, and the rest is listed.
#[test]
fn a_start_waits_for_no_image_that_never_answers() {
    if !can_mount("a_start_waits_for_no_image_that_never_answers") {
        return;
    }
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..64, 3);
    daemon.snap("a");
    daemon.stop();
    let silent = SilentFile::mount(&daemon.path("silent"), SIZE as usize);
    silent.fall_silent();
    daemon.arg_disk_at("slow", &silent.path(), "");
    daemon.start();
    assert_eq!(daemon.client("vm0").tag(63), 3);
    assert_eq!(daemon.state("vm0@a"), "quiesced");
    let disk = daemon.show_disk("slow");
    assert_eq!(disk["state"], "unserved", "{disk}");
    assert!(disk["reason"].is_string(), "{disk}");
    others_go_on(&daemon, "b");
}

/// A disk whose image falls silent while a guest reads it: its removal hangs by itself, and the daemon ends.
#[test]
fn a_disk_that_falls_silent_holds_up_itself_only() {
    if !can_mount("a_disk_that_falls_silent_holds_up_itself_only") {
        return;
    }
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut silent = SilentFile::mount(&daemon.path("silent"), SIZE as usize);
    daemon.send("PUT", "/v1/disks/slow", &json!({ "path": silent.path() }).to_string()).ok();
    let mut guest = daemon.client("slow");
    guest.write(0..8, 1);
    silent.fall_silent();
    guest.queues[0].submit_read(0, 0..8);
    let removal = ask_in_vain(&daemon, ("DELETE", "/v1/disks/slow?force=true", ""));
    at_work(&daemon, "slow");
    others_go_on(&daemon, "a");
    assert_claimed(&daemon, "slow");
    let in_time = ends_in_time(&mut daemon);
    silent.end();
    removal.join().unwrap();
    drop(guest);
    wait_until("the process to be gone", || daemon.ended().is_some());
    assert!(in_time, "the daemon is still there {STOP:?} after it was told to end");
    daemon.start();
    assert_eq!(daemon.client("vm0").tag(63), 3);
}

/// Events of other disks are told while a disk hangs.
#[test]
fn events_go_on_while_a_disk_hangs() {
    if !can_mount("events_go_on_while_a_disk_hangs") {
        return;
    }
    let mut slow = Slow::new();
    slow.stand_still_with_a_write();
    let events: Events = slow.daemon.events();
    let removal = ask_in_vain(&slow.daemon, ("DELETE", "/v1/disks/slow?force=true", ""));
    at_work(&slow.daemon, "slow");
    others_go_on(&slow.daemon, "a");
    assert_claimed(&slow.daemon, "slow");
    events.wait_for("SNAPSHOT_CREATED", "vm0@a");
    events.wait_for("DISK_REMOVED", "more-a");
    drop(slow.standstill.take());
    removal.join().unwrap();
    events.wait_for("DISK_REMOVED", "slow");
}
