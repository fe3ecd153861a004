//! What is said of things, and when: a wait ends with 1 and the reason when what it waited for cannot be used, nothing is
//! announced that is not durable, advice can be followed, and what is misspelt is not ignored.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::asking::{advised, cli_within, follow_advice, lift_paces, lingers, refused_by_cli, slowed, start_if_it_can};
use crate::harness::{Answer, Daemon, PATIENCE, command, run, wait_until};
use crate::independent::post;
use crate::restore;
use crate::strategies::{ALL, SIZE, shows};
use crate::volumes::{daemon_with_snapshot, delete, made};

/// A snapshot whose socket's place is taken cannot be used: who waits for it is told so, and why. The socket is opened when
/// its place is free, without anybody's doing.
#[test]
fn waiting_for_a_snapshot_without_a_socket_ends_with_1() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    let place = daemon.path("taken.sock");
    let listener = UnixListener::bind(&place).unwrap();
    let args = ["snapshot", "create", "a", "--disk", "vm0", "--socket", place.to_str().unwrap(), "--wait"];
    let output = cli_within(&daemon, &args, *PATIENCE).expect("the command ends");
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
    assert!(told.contains("taken.sock"), "{told}");
    drop(listener);
    std::fs::remove_file(&place).unwrap();
    if daemon.get("/v1/snapshots/vm0@a").status == 200 {
        wait_until("the socket to be opened", || place.exists());
        let mut reader = crate::client::Client::connect(&place, 1, true).unwrap();
        assert_eq!(reader.tag(7), 1);
        assert_eq!(daemon.show("vm0@a")["reason"], Value::Null, "what is mended is not complained of");
    }
}

fn limit(daemon: &Daemon, bytes: u64) {
    run("prlimit", &["--pid", &daemon.pid().to_string(), &format!("--fsize={bytes}:")]);
}

/// That a snapshot is quiesced is durable before anybody is told. While its record cannot be stored it is not announced,
/// and when it can it is, by itself; a power cut afterwards leaves it as it was announced.
#[test]
fn quiesced_is_announced_when_it_is_recorded() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    wait_until("the frontend to be seen", || daemon.show_disk("vm0")["frontends"] == 1);
    let events = daemon.events();
    daemon.api().create("a", &["vm0"], &json!({ "writers": "connection" })).ok();
    assert_eq!(daemon.state("vm0@a"), "draining");
    limit(&daemon, 1);
    drop(client);
    wait_until("the frontend to be gone", || daemon.show("vm0@a")["old_frontends"] == 0);
    // Longer than a daemon takes that does not mind.
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        let snapshot = daemon.show("vm0@a");
        assert_eq!(snapshot["state"], "draining", "it is shown as quiesced and not recorded: {snapshot}");
        assert!(!daemon.socket("vm0@a").exists(), "it has a socket and is not recorded as quiesced");
        let told = events.seen().iter().any(|e| e["event"] == "SNAPSHOT_QUIESCED");
        assert!(!told, "it is announced and not recorded");
        std::thread::sleep(Duration::from_millis(20));
    }
    limit(&daemon, 1 << 40);
    events.wait_for("SNAPSHOT_QUIESCED", "vm0@a");
    assert_eq!(shows(&daemon, "vm0@a"), vec![1; ALL.end]);
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.state("vm0@a"), "quiesced");
    assert_eq!(shows(&daemon, "vm0@a"), vec![1; ALL.end]);
}

/// Takes a lock of the kind that daemons take of directories; None if somebody has it.
fn lock(file: &std::fs::File) -> Option<()> {
    // SAFETY: flock only takes the descriptor, which is open for as long as the call.
    (unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0).then_some(())
}

/// Whoever may open the run directory can lock it for ever. A start is refused for that or does not mind; it does not wait.
#[test]
fn a_lock_on_a_directory_holds_up_no_start() {
    for what in ["run directory", "lock of the run directory", "state directory"] {
        let mut daemon = Daemon::with_disks(&[SIZE], "");
        daemon.stop();
        let path = match what {
            "run directory" => daemon.run_dir(),
            "state directory" => daemon.state_dir(),
            _ => daemon.run_dir().join("lock"),
        };
        let held = std::fs::File::open(&path).unwrap();
        lock(&held).expect("nobody has it");
        // It must serve or end; a start that waits does neither.
        let serves = start_if_it_can(&mut daemon);
        println!("with a lock on the {what}: serves: {serves}");
        if !serves {
            assert!(daemon.log_text().contains("in use"), "{}", daemon.log_text());
            drop(held);
            daemon.start();
        }
        daemon.client("vm0").write(0..8, 1);
    }
}

/// A name that no disk has is refused, and not passed over.
#[test]
fn a_misspelt_disk_to_take_flushed_is_refused() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.stop();
    daemon.arg("--take-flushed");
    daemon.arg("vm00");
    daemon.spawn();
    let status = daemon.wait_exit();
    assert_eq!(status.code(), Some(2), "it is the argument that is wrong");
    let log = daemon.log_text();
    let told = log.lines().rfind(|line| line.contains("vm00")).unwrap_or_else(|| panic!("vm00 is not named: {log}"));
    assert!(told.contains("take-flushed") || told.contains("no disk"), "{told}");
    daemon.forget_args();
    daemon.arg_disk("vm0", "");
    daemon.arg("--take-flushed");
    daemon.arg("vm0");
    daemon.start();
}

/// A log that is folded is told of.
#[test]
fn folding_is_told() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let events = daemon.events();
    daemon.client("vm0").write(ALL, 1);
    daemon.api().create("a", &["vm0"], &json!({ "strategy": "write-logging", "wait": true })).ok();
    daemon.client("vm0").write(ALL, 2);
    daemon.delete("vm0@a");
    events.wait_for("SNAPSHOT_DELETED", "vm0@a");
    let seen = events.seen();
    let position = |kind: &str| seen.iter().position(|e| e["event"] == kind && e["snapshot"] == "a");
    let folding = position("SNAPSHOT_FOLDING").unwrap_or_else(|| panic!("no SNAPSHOT_FOLDING in {seen:?}"));
    assert!(position("SNAPSHOT_QUIESCED").unwrap() < folding && folding < position("SNAPSHOT_DELETED").unwrap());
    // Of a snapshot that is only handed over it is not said.
    daemon.snap("b");
    daemon.client("vm0").write(ALL, 3);
    daemon.delete("vm0@b");
    events.wait_for("SNAPSHOT_DELETED", "vm0@b");
    assert!(!events.seen().iter().any(|e| e["event"] == "SNAPSHOT_FOLDING" && e["snapshot"] == "b"));
}

/// A refusal: the world in which it is made, and what is asked in it.
struct Refused {
    what: &'static str,
    world: fn() -> Daemon,
    method: &'static str,
    path: &'static str,
    body: &'static str,
}

fn logged() -> Daemon {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    for name in ["a", "b"] {
        daemon.api().create(name, &["vm0"], &json!({ "strategy": "write-logging", "wait": true })).ok();
        daemon.client("vm0").write(0..1000, 2);
    }
    daemon
}

fn with_volumes() -> Daemon {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    daemon.snapshot("s", &["clone"]);
    made(&daemon, "above", "clone@s");
    daemon.client("above").write(0..8, 3);
    daemon
}

fn merging() -> Daemon {
    const BIG: u64 = 32 << 20;
    let daemon = Daemon::with_disks(&[BIG], "");
    daemon.client("vm0").write(0..65536, 1);
    daemon.snap("old");
    daemon.snap("b");
    daemon.client("vm0").write(0..65536, 2);
    slowed(&daemon, "merge", ("DELETE", "/v1/snapshots/vm0@b", ""), false);
    daemon
}

fn merging_stopped() -> Daemon {
    let daemon = merging();
    let job = daemon.get("/v1/jobs").json()[0]["id"].clone();
    daemon.send("DELETE", &format!("/v1/jobs/{job}"), "").ok();
    daemon
}

fn completing() -> Daemon {
    let daemon = with_volumes();
    delete(&daemon, "above");
    post(&daemon, "clone/complete?delay_ms=3600000").ok();
    daemon
}

fn with_bookmark() -> Daemon {
    let daemon = daemon_with_snapshot("", "copy-on-write");
    daemon.snap("later");
    daemon.send("DELETE", "/v1/snapshots/vm0@daily?keep-bookmark=true", "").ok();
    daemon.api().wait_gone("vm0@daily");
    daemon
}

fn restoring() -> Daemon {
    let daemon = restore::changed_disk("copy-on-write");
    restore::begin(&daemon, "vm0@daily", restore::HOURS);
    daemon
}

fn restoring_from_volume() -> Daemon {
    let daemon = restore::changed_disk("copy-on-write");
    made(&daemon, "clone", "vm0@daily");
    daemon.client("clone").write(0..8, 3);
    restore::begin(&daemon, "clone", restore::HOURS);
    daemon
}

fn with_disabled_volume() -> Daemon {
    let daemon = with_volumes();
    delete(&daemon, "above");
    wait_until("the frontend to be gone", || post(&daemon, "clone/disable").status == 200);
    daemon
}

#[rustfmt::skip]
const REFUSED: &[Refused] = &[
    Refused { what: "the newest content is in a log", world: logged, method: "DELETE", path: "/v1/disks/vm0?force=true", body: "" },
    Refused { what: "a disk with snapshots", world: logged, method: "DELETE", path: "/v1/disks/vm0", body: "" },
    Refused { what: "a disk with a bookmark", world: with_bookmark, method: "DELETE", path: "/v1/disks/vm0", body: "" },
    Refused { what: "a disk that volumes stand on", world: with_volumes, method: "DELETE", path: "/v1/disks/vm0?force=true", body: "" },
    Refused { what: "a snapshot that a volume stands on", world: with_volumes, method: "DELETE", path: "/v1/snapshots/vm0@daily?force=true", body: "" },
    Refused { what: "a volume that others stand on", world: with_volumes, method: "DELETE", path: "/v1/volumes/clone?force=true", body: "" },
    Refused { what: "a volume with a snapshot", world: with_volumes, method: "DELETE", path: "/v1/volumes/clone", body: "" },
    Refused { what: "a volume to update that has a snapshot", world: with_volumes, method: "POST", path: "/v1/volumes/clone/update?force=true", body: "" },
    Refused { what: "a volume to promote that stands on something", world: with_volumes, method: "POST", path: "/v1/volumes/clone/promote", body: "" },
    Refused { what: "a disk whose snapshot is being deleted", world: merging, method: "DELETE", path: "/v1/disks/vm0?force=true", body: "" },
    Refused { what: "a restore beside a deletion", world: merging, method: "POST", path: "/v1/disks/vm0/restore", body: r#"{"from":"vm0@old"}"# },
    Refused { what: "a restore beside a stopped deletion", world: merging_stopped, method: "POST", path: "/v1/disks/vm0/restore", body: r#"{"from":"vm0@old"}"# },
    Refused { what: "a deletion behind a stopped one", world: merging_stopped, method: "DELETE", path: "/v1/snapshots/vm0@old", body: "" },
    Refused { what: "a volume's snapshot while it is completed", world: completing, method: "DELETE", path: "/v1/snapshots/clone@s?force=true", body: "" },
    Refused { what: "to promote a volume that is being completed", world: completing, method: "POST", path: "/v1/volumes/clone/promote", body: "" },
    Refused { what: "a disk that is being restored", world: restoring, method: "DELETE", path: "/v1/disks/vm0?force=true", body: "" },
    Refused { what: "a snapshot of a disk that is being restored", world: restoring, method: "POST", path: "/v1/snapshots", body: r#"{"name":"next","disks":["vm0"],"wait":true}"# },
    Refused { what: "a snapshot that is restored", world: restoring, method: "DELETE", path: "/v1/snapshots/vm0@daily?force=true", body: "" },
    Refused { what: "a leg for a disk that is being restored", world: restoring, method: "POST", path: "/v1/disks/vm0/mirror", body: r#"{"path":"$DIR/leg.raw"}"# },
    Refused { what: "a volume that is restored", world: restoring_from_volume, method: "DELETE", path: "/v1/volumes/clone?force=true", body: "" },
    Refused { what: "to enable anew with a snapshot", world: with_disabled_volume, method: "POST", path: "/v1/volumes/clone/enable?fresh=true", body: "" },
    Refused { what: "to promote what is disabled", world: with_disabled_volume, method: "POST", path: "/v1/volumes/clone/promote", body: "" },
];

/// Whoever does what a refusal advises, and asks again, gets in the end what was asked for: each command of the advice can
/// be run, and nobody is told to force what was forced.
#[test]
fn advice_that_is_followed_leads_there() {
    let mut wrong = Vec::new();
    for Refused { what, world, method, path, body } in REFUSED {
        let daemon = world();
        let body = body.replace("$DIR", daemon.dir.path().to_str().unwrap());
        let is_forced = path.contains("force=true");
        let first = daemon.send(method, path, &body);
        if first.status < 400 {
            wrong.push(format!("{what}: it is not refused: {}", first.body));
            continue;
        }
        lift_paces(&daemon);
        let forced = std::cell::RefCell::new(Vec::new());
        let ask = || -> Answer {
            let answer = daemon.send(method, path, &body);
            let is_refused = answer.status >= 400 && !lingers(&answer);
            if is_forced && is_refused && answer.json()["action"].as_str().unwrap().contains("force") {
                forced.borrow_mut().push(format!("{what}: to be forced, and was: {}", answer.body));
            }
            answer
        };
        let followed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| follow_advice(&daemon, &ask)));
        match followed {
            Ok(done) => println!("{what}: {done:?}"),
            Err(why) => {
                let why = why.downcast_ref::<String>().cloned().unwrap_or_default();
                wrong.push(format!("{what}: {why}"));
            }
        }
        wrong.append(&mut forced.borrow_mut());
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), REFUSED.len(), wrong.join("\n"));
}

/// The command line says the same of what was forced.
#[test]
fn who_forced_is_not_told_to_force() {
    let daemon = logged();
    let told = refused_by_cli(&daemon, &["disk", "remove", "vm0", "--force"]);
    assert!(!told.contains("force it") && !told.contains("--force"), "{told}");
    assert!(!advised(&told).is_empty(), "no command helps: {told}");
    let daemon = merging();
    let told = refused_by_cli(&daemon, &["disk", "remove", "vm0", "--force"]);
    assert!(!told.contains("force it") && !told.contains("--force"), "{told}");
    assert!(!advised(&told).is_empty(), "no command helps: {told}");
}

/// Advice is one of the program's commands: it knows each that it advises.
#[test]
fn the_program_knows_every_command_that_it_advises() {
    let mut wrong = Vec::new();
    for Refused { what, world, method, path, body } in REFUSED {
        let daemon = world();
        let body = body.replace("$DIR", daemon.dir.path().to_str().unwrap());
        let answer = daemon.send(method, path, &body);
        if answer.status < 400 {
            continue;
        }
        for words in advised(answer.json()["action"].as_str().unwrap()) {
            // Parsed whole, and not carried out: nobody answers there.
            let mut program = command(env!("CARGO_BIN_EXE_halfsilver"));
            let output = program.arg("--control").arg(daemon.path("nobody.sock")).args(&words).output().unwrap();
            if output.status.code() != Some(1) {
                wrong.push(format!("{what}: {words:?}: {}", String::from_utf8_lossy(&output.stderr)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
