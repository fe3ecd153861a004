//! Write logging, writers by connection and shared disks, from outside: whatever the strategy, the contents are the same.

use std::ops::Range;

use serde_json::{Value, json};

use crate::client::{Client, tags};
use crate::harness::{Daemon, Rng, from_env, seeds, wait_until};

pub(crate) const SIZE: u64 = 1 << 20;
pub(crate) const ALL: Range<usize> = 0..2048;

fn logging() -> Value {
    json!({ "strategy": "write-logging", "wait": true })
}

fn log_snapshot(daemon: &Daemon, name: &str) -> Value {
    let answer = daemon.api().create(name, &["vm0"], &logging());
    answer.ok();
    let snapshot = answer.json()[0].clone();
    assert_eq!(snapshot["strategy"], "write-logging", "{snapshot}");
    snapshot
}

pub(crate) fn shows(daemon: &Daemon, what: &str) -> Vec<u64> {
    tags(&daemon.content(what))
}

fn raw(daemon: &Daemon) -> Vec<u64> {
    tags(&std::fs::read(daemon.image("vm0")).unwrap())
}

#[test]
fn a_log_takes_the_writes_and_is_folded_back() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    let snapshot = log_snapshot(&daemon, "a");
    client.write(3..5, 2);
    client.write(8..16, 3);
    client.zero(100..110, false);
    let mut live = vec![1; ALL.end];
    live[3..5].fill(2);
    live[8..16].fill(3);
    live[100..110].fill(0);
    assert_eq!(raw(&daemon), vec![1; ALL.end], "the full image stays with VLUN A");
    assert_eq!(shows(&daemon, "vm0@a"), vec![1; ALL.end]);
    assert_eq!(tags(&client.read_all()), live);
    let log = snapshot["image"].as_str().unwrap().to_owned();
    assert!(std::path::Path::new(&log).exists() && log.starts_with(daemon.state_dir().to_str().unwrap()));
    client.flush();
    daemon.delete("vm0@a");
    assert_eq!(raw(&daemon), live, "one raw image is left");
    assert_eq!(tags(&client.read_all()), live);
    assert!(!std::path::Path::new(&log).exists());
    daemon.assert_only_disks_left();
}

#[test]
fn while_a_log_is_there_every_snapshot_is_one() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.snap("cow");
    client.write(0..16, 2);
    log_snapshot(&daemon, "log");
    client.write(8..24, 3);
    assert_eq!(daemon.snap("also")["strategy"], "write-logging", "whatever was asked for");
    client.write(16..32, 4);
    let refused = daemon.send("DELETE", "/v1/disks/vm0?force=true", "");
    assert_eq!(refused.refused(), "disk-busy");
    assert!(refused.body.contains("log"), "{}", refused.body);
    let expect = |changes: &[(Range<usize>, u64)]| {
        let mut all = vec![1; ALL.end];
        changes.iter().for_each(|(at, tag)| all[at.clone()].fill(*tag));
        all
    };
    let live = expect(&[(0..16, 2), (8..24, 3), (16..32, 4)]);
    let check = |names: &[&str]| {
        for name in names {
            let content = match *name {
                "vm0@cow" => expect(&[]),
                "vm0@log" => expect(&[(0..16, 2)]),
                _ => expect(&[(0..16, 2), (8..24, 3)]),
            };
            assert_eq!(shows(&daemon, name), content, "{name}");
        }
    };
    check(&["vm0@cow", "vm0@log", "vm0@also"]);
    daemon.delete("vm0@log");
    check(&["vm0@cow", "vm0@also"]);
    daemon.delete("vm0@also");
    check(&["vm0@cow"]);
    assert_eq!(tags(&client.read_all()), live);
    assert_eq!(daemon.snap("again")["strategy"], "copy-on-write", "the logs are folded");
    daemon.delete("vm0@again");
    daemon.delete("vm0@cow");
    assert_eq!(raw(&daemon), live);
    daemon.assert_only_disks_left();
}

/// How a daemon may end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    Stop,
    Kill,
    /// Killed, and the run directory's tables with it.
    Cleared,
    /// Killed, and the machine boots again. The page cache is kept here, so what was not flushed is there too.
    PowerCut,
}

/// Ends the daemon and starts it again. Returns what `check` said in between.
pub(crate) fn end_and_start(daemon: &mut Daemon, how: End) -> Value {
    match how {
        End::Stop => daemon.stop(),
        End::Kill | End::Cleared | End::PowerCut => daemon.kill(),
    }
    match how {
        End::Cleared => daemon.lose_run_tables(),
        End::PowerCut => daemon.boot_again(),
        End::Stop | End::Kill => {}
    }
    let told = serde_json::from_slice(&daemon.check(&["--json"]).stdout).unwrap();
    daemon.start();
    told
}

pub(crate) fn end(daemon: &mut Daemon, how: End) {
    let told = end_and_start(daemon, how);
    // What `check` said of each snapshot is what has become of it.
    for said in told["disks"][0]["snapshots"].as_array().unwrap() {
        let (name, verdict) = (said["snapshot"].as_str().unwrap(), said["verdict"].as_str().unwrap());
        let found = daemon.snapshots().into_iter().find(|s| format!("vm0@{}", s["name"].as_str().unwrap()) == name);
        match (verdict, found.as_ref().map(|s| s["state"].as_str().unwrap())) {
            ("kept", Some("quiesced")) | ("broken", Some("broken")) | ("deleting", _) => {}
            other => panic!("{name} after {how:?}: {other:?}, {told}"),
        }
    }
}

#[test]
fn a_log_outlives_stops_kills_and_power_cuts() {
    for how in [End::Stop, End::Kill, End::PowerCut] {
        let mut daemon = Daemon::with_disks(&[SIZE], "");
        let mut client = daemon.client("vm0");
        client.write(ALL, 1);
        log_snapshot(&daemon, "a");
        client.write(0..100, 2);
        log_snapshot(&daemon, "b");
        client.write(50..150, 3);
        client.flush();
        let live = tags(&client.read_all());
        drop(client);
        for _ in 0..2 {
            end(&mut daemon, how);
            assert_eq!(shows(&daemon, "vm0"), live, "{how:?}");
            assert_eq!(shows(&daemon, "vm0@a"), vec![1; ALL.end], "{how:?}");
            assert_eq!(shows(&daemon, "vm0@b")[..101], [vec![2; 100], vec![1]].concat(), "{how:?}");
        }
        daemon.client("vm0").write(140..160, 4);
        daemon.delete("vm0@a");
        daemon.delete("vm0@b");
        let now = shows(&daemon, "vm0");
        assert_eq!((now[100..140].to_vec(), now[140..160].to_vec()), (vec![3; 40], vec![4; 20]), "{how:?}");
        assert_eq!(raw(&daemon), now);
        daemon.assert_only_disks_left();
    }
}

#[test]
fn a_log_that_was_changed_while_stopped_is_not_served() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    let log = log_snapshot(&daemon, "a")["image"].as_str().unwrap().to_owned();
    daemon.client("vm0").write(0..100, 2);
    daemon.stop();
    let whole = std::fs::read(&log).unwrap();
    std::fs::write(&log, &whole).unwrap();
    let told = serde_json::from_slice::<Value>(&daemon.check(&["--json"]).stdout).unwrap();
    assert_eq!(told["disks"][0]["verdict"], "not-served", "{told}");
    let said = daemon.refused_start();
    assert!(said.contains("was changed while the daemon was not running"), "{said}");
}

/// Without the run table nobody knows what was written to the log since the last flush, and the guest may go on.
#[test]
fn a_log_without_its_run_table_is_served_only_on_demand() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    log_snapshot(&daemon, "a");
    client.write(0..100, 2);
    client.flush();
    client.write(0..50, 3); // In blocks that the log has.
    client.write(1000..1050, 3); // In new ones.
    drop(client);
    daemon.kill();
    daemon.lose_run_tables();
    let said = daemon.refused_start();
    assert!(said.contains("last flush") && said.contains("--take-flushed"), "{said}");
    daemon.arg("--take-flushed=vm0");
    daemon.start();
    assert_eq!(shows(&daemon, "vm0")[..101], [vec![3; 50], vec![2; 50], vec![1]].concat());
    assert_eq!(shows(&daemon, "vm0")[1000..1050], [1; 50]);
    assert_eq!(shows(&daemon, "vm0@a"), vec![1; ALL.end]);
    daemon.delete("vm0@a");
    daemon.assert_only_disks_left();
}

/// After a power cut what was flushed is there, and what was saved by copying is broken and says why.
#[test]
fn a_power_cut_breaks_what_was_saved_and_nothing_else() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.snap("cow");
    client.write(0..100, 2);
    log_snapshot(&daemon, "log");
    client.write(50..150, 3);
    client.flush();
    let live = tags(&client.read_all());
    drop(client);
    end(&mut daemon, End::PowerCut);
    daemon.assert_broken("vm0@cow", "the host went down");
    assert_eq!(shows(&daemon, "vm0@log")[..101], [vec![2; 100], vec![1]].concat());
    assert_eq!(shows(&daemon, "vm0"), live);
    daemon.delete("vm0@log");
    daemon.delete("vm0@cow");
    assert_eq!(raw(&daemon), live);
    daemon.assert_only_disks_left();
}

#[test]
fn a_damaged_log_table_stops_the_disk_from_being_served() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    log_snapshot(&daemon, "a");
    client.write(0..100, 2);
    client.flush();
    drop(client);
    daemon.kill();
    daemon.boot_again();
    let table = std::fs::read_dir(daemon.state_dir().join("tables")).unwrap().map(|e| e.unwrap().path());
    let table = table.into_iter().find(|p| p.extension().is_some_and(|e| e == "log")).unwrap();
    let whole = std::fs::read(&table).unwrap();
    let mut damaged = whole.clone();
    damaged[512 + 9] ^= 4;
    std::fs::write(&table, &damaged).unwrap();
    let said = daemon.refused_start();
    assert!(said.contains("damaged") && said.contains("log"), "{said}");
    std::fs::write(&table, &whole).unwrap();
    daemon.start();
    assert_eq!(shows(&daemon, "vm0")[..101], [vec![2; 100], vec![1]].concat());
}

/// A fold that is slowed down, stopped, killed and resumed, under a guest that writes.
#[test]
fn a_fold_is_stopped_and_resumed_also_across_restarts() {
    // Beside a guest at work it goes block by block, and can be slowed down before it is done.
    let mut daemon = Daemon::with_disks(&[SIZE], "background=4K");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    log_snapshot(&daemon, "a");
    client.write(ALL, 2);
    let api = daemon.api();
    let deleting = std::thread::spawn(move || api.send("DELETE", "/v1/snapshots/vm0@a", ""));
    let mut job = Value::Null;
    wait_until("the job", || {
        client.write(0..1, 2);
        job = daemon.get("/v1/jobs").json()[0].clone();
        !job.is_null()
    });
    let path = format!("/v1/jobs/{}", job["id"]);
    daemon.send("PATCH", &path, r#"{"delay_ms":20}"#).ok();
    assert_eq!((job["kind"].clone(), daemon.state("vm0@a")), (json!("fold"), "folding".to_owned()));
    client.write(4..12, 3);
    let stopped = daemon.send("DELETE", &path, "");
    stopped.ok();
    assert_eq!(stopped.json()["state"], "stopped", "{}", stopped.body);
    assert!(deleting.join().unwrap().status >= 400, "the deletion says that it is not done");
    let live = tags(&client.read_all());
    drop(client);
    for how in [End::Stop, End::Kill, End::PowerCut] {
        end(&mut daemon, how);
        assert_eq!(shows(&daemon, "vm0"), live, "{how:?}");
        let jobs = daemon.get("/v1/jobs").json();
        assert_eq!((jobs[0]["state"].clone(), jobs[0]["kind"].clone()), (json!("stopped"), json!("fold")), "{how:?}");
        let mut client = daemon.client("vm0");
        client.write(20..21, 5);
        client.flush();
        client.write(20..21, 2);
        client.flush();
    }
    let jobs = daemon.get("/v1/jobs").json();
    let path = format!("/v1/jobs/{}", jobs[0]["id"]);
    assert_eq!(daemon.send("DELETE", &path, "").refused(), "conflict", "it is all that is left of the work");
    daemon.send("POST", &format!("{path}/resume"), "").ok();
    daemon.api().wait_gone("vm0@a");
    wait_until("the job to end", || daemon.get(&path).json()["state"] == "done");
    assert_eq!(raw(&daemon), live);
    daemon.assert_only_disks_left();
}

/// Random writes, snapshots of both strategies, deletions in any order, and ends of every kind in between.
#[test]
fn mixed_chains_survive_whatever_comes() {
    mixed_chains(&["mixed chains", ""], &[End::Stop, End::Kill, End::Kill]);
}

/// On a disk with durability=power also power cuts are survived by all, if what was written last was flushed.
#[test]
fn mixed_durable_chains_survive_whatever_comes() {
    mixed_chains(&["mixed durable chains", "durability=power"], &[End::Kill, End::PowerCut, End::PowerCut]);
}

/// The same over packed layers.
#[test]
fn mixed_packed_chains_survive_whatever_comes() {
    mixed_chains(&["mixed packed chains", "layout=packed"], &[End::Stop, End::Kill, End::Kill]);
    let options = "durability=power,layout=packed";
    mixed_chains(&["mixed packed durable chains", options], &[End::Kill, End::PowerCut, End::PowerCut]);
}

fn mixed_chains([name, options]: &[&str; 2], ends: &[End; 3]) {
    for seed in seeds(name, 2) {
        let mut rng = Rng::new(seed);
        let mut daemon = Daemon::with_disks(&[SIZE], options);
        let mut live = vec![0; ALL.end];
        let mut frozen: Vec<(String, Vec<u64>)> = Vec::new();
        for step in 0..from_env("HALFSILVER_STEPS", 60) {
            let mut client = daemon.client("vm0");
            for _ in 0..rng.below(20) {
                let first = rng.below(ALL.end);
                let range = first..(first + 1 + rng.below(40)).min(ALL.end);
                let tag = rng.next();
                client.write(range.clone(), tag);
                live[range].fill(tag);
            }
            client.flush();
            drop(client);
            match rng.below(10) {
                0..4 if frozen.len() < 8 => {
                    let name = format!("s{step}");
                    let strategy = if rng.chance(50) { "write-logging" } else { "copy-on-write" };
                    let options = json!({ "strategy": strategy, "wait": true });
                    daemon.api().create(&name, &["vm0"], &options).ok();
                    frozen.push((format!("vm0@{name}"), live.clone()));
                }
                4..6 if !frozen.is_empty() => {
                    let (gone, _) = frozen.remove(rng.below(frozen.len()));
                    daemon.delete(&gone);
                }
                at @ 6..9 => end(&mut daemon, ends[at - 6]),
                _ => {}
            }
            assert_eq!(shows(&daemon, "vm0"), live, "seed {seed} step {step}");
            for (reference, content) in &frozen {
                assert_eq!(shows(&daemon, reference), *content, "seed {seed} step {step}: {reference}");
            }
        }
        while !frozen.is_empty() {
            let (gone, _) = frozen.remove(rng.below(frozen.len()));
            daemon.delete(&gone);
        }
        assert_eq!(raw(&daemon), live, "seed {seed}");
        daemon.assert_only_disks_left();
    }
}

fn shared(daemon: &Daemon) -> Client {
    Client::connect(&daemon.socket("vm0"), 1, false).unwrap()
}

#[test]
fn frontends_that_were_there_keep_vlun_a_until_they_are_cut_over() {
    for strategy in ["copy-on-write", "write-logging"] {
        let daemon = Daemon::with_disks(&[SIZE], "shared=on");
        let (mut old, mut leaves) = (shared(&daemon), shared(&daemon));
        old.write(ALL, 1);
        let options = json!({ "strategy": strategy, "writers": "connection" });
        daemon.api().create("a", &["vm0"], &options).ok();
        let mut new = shared(&daemon);
        old.write(0..8, 2);
        new.write(8..16, 3);
        leaves.write(16..20, 4);
        let snapshot = daemon.show("vm0@a");
        assert_eq!((&snapshot["state"], &snapshot["old_frontends"]), (&json!("draining"), &json!(2)), "{snapshot}");
        assert!(!daemon.socket("vm0@a").exists());
        let refused = daemon.send("DELETE", "/v1/snapshots/vm0@a", "");
        assert_eq!(refused.refused(), "snapshot-busy");
        assert!(refused.body.contains("cutover"), "{}", refused.body);
        assert_eq!(tags(&old.read(0..24)), [vec![2; 8], vec![1; 8], vec![4; 4], vec![1; 4]].concat());
        assert_eq!(tags(&new.read(0..24)), [vec![2; 8], vec![3; 8], vec![4; 4], vec![1; 4]].concat());
        drop(leaves);
        wait_until("one to leave", || daemon.show("vm0@a")["old_frontends"] == 1);
        let done = daemon.cli(&["snapshot", "cutover", "vm0@a", "--wait"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        old.write(0..1, 5);
        let frozen = shows(&daemon, "vm0@a");
        assert_eq!(frozen[..24], [vec![2; 8], vec![1; 8], vec![4; 4], vec![1; 4]].concat(), "{strategy}");
        assert_eq!(tags(&old.read(0..16)), [vec![5], vec![2; 7], vec![3; 8]].concat(), "{strategy}");
        drop((old, new));
        daemon.delete("vm0@a");
        assert_eq!(raw(&daemon)[..20], [vec![5], vec![2; 7], vec![3; 8], vec![4; 4]].concat());
        daemon.assert_only_disks_left();
    }
}

#[test]
fn the_last_old_frontend_that_leaves_quiesces_the_snapshot() {
    let mut daemon = Daemon::with_disks(&[SIZE], "shared=on");
    let mut old = shared(&daemon);
    old.write(ALL, 1);
    let by_connection = json!({ "writers": "connection" });
    daemon.api().create("a", &["vm0"], &by_connection).ok();
    old.write(0..8, 2);
    // A second one-way mirror while the first still drains: quiescing happens in order.
    daemon.api().create("b", &["vm0"], &json!({})).ok();
    old.write(8..16, 3);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!((daemon.state("vm0@a"), daemon.state("vm0@b")), ("draining".to_owned(), "draining".to_owned()));
    drop(old);
    wait_until("both to be quiesced", || ["a", "b"].iter().all(|s| daemon.state(&format!("vm0@{s}")) == "quiesced"));
    let content = [vec![2; 8], vec![3; 8], vec![1; 4]].concat();
    assert_eq!(shows(&daemon, "vm0@a")[..20], content);
    assert_eq!(shows(&daemon, "vm0@b")[..20], content);
    // A daemon that ends takes its connections along.
    let mut stays = shared(&daemon);
    daemon.api().create("c", &["vm0"], &by_connection).ok();
    stays.write(0..4, 6);
    daemon.kill();
    daemon.start();
    assert_eq!(shows(&daemon, "vm0@c")[..20], [vec![6; 4], vec![2; 4], vec![3; 8], vec![1; 4]].concat());
}

#[test]
fn without_shared_a_second_frontend_is_refused() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    let first = daemon.client("vm0");
    assert!(Client::connect(&daemon.socket("vm0"), 1, false).is_err());
    wait_until("the log", || daemon.log_text().contains("another one is connected"));
    drop(first);
}
