//! Stopping and starting: what a clean stop keeps, and what nobody can vouch for after anything else.

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::{Client, SECTOR, tags};
use crate::harness::{Api, Daemon, Rng, from_env, seeds, wait_until};

const SIZE: u64 = 1 << 20;
const ALL: std::ops::Range<usize> = 0..SIZE as usize / SECTOR;

/// The tags that a disk or snapshot shows.
#[track_caller]
fn shows(daemon: &Daemon, what: &str) -> Vec<u64> {
    tags(&daemon.content(what))
}

fn record_in(state_dir: &Path, name: &str) -> std::path::PathBuf {
    state_dir.join(name)
}

#[test]
fn a_clean_stop_keeps_disks_snapshots_and_content() {
    let mut daemon = Daemon::with_disks(&[SIZE], "queues=2,serial=first");
    // The second disk comes through the API.
    let image = daemon.make_image("vm1", SIZE + 512);
    let config = json!({ "path": image, "queues": 3, "block_size": 8192, "serial": "second" }).to_string();
    assert_eq!(daemon.send("PUT", "/v1/disks/vm1", &config).status, 201);
    let mut expected: Vec<(String, Vec<u64>)> = Vec::new();
    let mut ids: Vec<Value> = Vec::new();
    for round in 0..4u64 {
        let name = format!("s{round}");
        for disk in ["vm0", "vm1"] {
            let mut client = daemon.client(disk);
            client.write(0..64 + 100 * round as usize, 2 * round + 1);
            client.write(1000..1003, 100 + round);
        }
        daemon.snapshot(&name, &["vm0", "vm1"]);
        for disk in ["vm0", "vm1"] {
            expected.push((format!("{disk}@{name}"), shows(&daemon, disk)));
            ids.push(daemon.show(&format!("{disk}@{name}"))["id"].clone());
            let mut client = daemon.client(disk);
            client.write(7..9 + 50 * round as usize, 2 * round + 2);
            client.discard(1024..1032);
        }
        let live = ["vm0", "vm1"].map(|d| shows(&daemon, d));
        let disks = daemon.get("/v1/disks").json();
        let of_disk = |d: &Value, key: &str| d[key].clone();
        let before: Vec<_> = disks.as_array().unwrap().iter().map(|d| of_disk(d, "id")).collect();
        if round == 1 {
            // What is remembered needs no arguments any more.
            daemon.forget_args();
        }
        daemon.restart();
        let disks = daemon.get("/v1/disks").json();
        assert_eq!(disks.as_array().unwrap().iter().map(|d| of_disk(d, "id")).collect::<Vec<_>>(), before);
        assert_eq!((&disks[0]["serial"], &disks[1]["serial"]), (&json!("first"), &json!("second")));
        assert_eq!((&disks[0]["queues"], &disks[1]["block_size"]), (&json!(2), &json!(8192)));
        assert_eq!(["vm0", "vm1"].map(|d| shows(&daemon, d)), live, "round {round}");
        for ((reference, content), id) in expected.iter().zip(&ids) {
            assert_eq!(daemon.state(reference), "quiesced", "{}", daemon.show(reference));
            assert_eq!(daemon.show(reference)["id"], *id);
            assert!(shows(&daemon, reference) == *content, "{reference} in round {round}");
        }
    }
    // In any order, with a restart in between.
    for at in [5, 0, 3, 1] {
        let (reference, _) = expected.remove(at);
        daemon.delete(&reference);
    }
    daemon.restart();
    for (reference, content) in &expected {
        assert!(shows(&daemon, reference) == *content, "{reference}");
        daemon.delete(reference);
    }
    daemon.assert_only_disks_left();
    daemon.stop();
    assert!(!daemon.socket("vm0").exists() && !daemon.socket("vm1").exists());
}

#[test]
fn after_a_kill_snapshots_and_the_disk_are_right() {
    let mut daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(ALL, 1);
    daemon.snapshot("a", &["vm0", "vm1"]);
    client.write(10..20, 2);
    daemon.snapshot("b", &["vm0"]);
    client.write(0..100, 3);
    let live = tags(&client.read_all());
    let frozen = ["vm0@a", "vm0@b", "vm1@a"].map(|reference| (reference, shows(&daemon, reference)));
    daemon.kill();
    drop(client);
    // The sockets of the dead are still there.
    assert!(daemon.socket("vm0@a").exists() && daemon.socket("vm0").exists());
    daemon.start();
    let all_right = |daemon: &Daemon| {
        for (reference, content) in &frozen {
            assert_eq!(daemon.state(reference), "quiesced");
            assert_eq!(shows(daemon, reference), *content, "{reference}");
        }
    };
    all_right(&daemon);
    assert_eq!(shows(&daemon, "vm0"), live);
    daemon.client("vm0").write(50..60, 4);
    let now = shows(&daemon, "vm0");
    daemon.snap("c");
    daemon.client("vm0").write(0..300, 5);
    assert_eq!(shows(&daemon, "vm0@c"), now);
    daemon.restart();
    assert_eq!(shows(&daemon, "vm0@c"), now);
    all_right(&daemon);
    for (reference, _) in &frozen {
        daemon.delete(reference);
    }
    assert_eq!(shows(&daemon, "vm0@c"), now);
    daemon.delete("vm0@c");
    daemon.assert_only_disks_left();
    daemon.stop();
}

#[test]
fn a_broken_snapshot_stays_broken_after_a_second_kill_and_a_clean_stop() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.snap("a");
    daemon.kill();
    daemon.lose_run_tables();
    for _ in 0..2 {
        daemon.start();
        daemon.assert_broken("vm0@a", "table");
        daemon.kill();
    }
    daemon.start();
    daemon.restart();
    daemon.assert_broken("vm0@a", "table");
    // Its name is taken until it is deleted.
    let again = daemon.api().create("a", &["vm0"], &json!({}));
    assert_eq!(again.refused(), "snapshot-exists");
    daemon.delete("vm0@a");
    daemon.snap("a");
    daemon.delete("vm0@a");
    daemon.assert_only_disks_left();
}

#[test]
fn an_image_changed_while_stopped_breaks_its_snapshots_only() {
    let mut daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    for disk in ["vm0", "vm1"] {
        daemon.client(disk).write(0..50, 1);
    }
    daemon.snapshot("a", &["vm0", "vm1"]);
    daemon.stop();
    let image = std::fs::File::options().write(true).open(daemon.image("vm0")).unwrap();
    image.write_all_at(&[9; SECTOR], 20 * SECTOR as u64).unwrap();
    drop(image);
    daemon.start();
    daemon.assert_broken("vm0@a", "was changed while the daemon was not running");
    assert_eq!(daemon.client("vm0").tag(20), 0x0909_0909_0909_0909);
    assert_eq!(daemon.client("vm0").tag(21), 1);
    assert_eq!(daemon.state("vm1@a"), "quiesced");
    assert_eq!(shows(&daemon, "vm1@a")[..51], [[1; 50].as_slice(), &[0]].concat());
    daemon.delete("vm0@a");
    daemon.delete("vm1@a");
    daemon.assert_only_disks_left();
}

#[test]
fn an_image_that_grew_while_stopped_breaks_its_snapshots() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..50, 1);
    daemon.snap("a");
    daemon.stop();
    let image = std::fs::File::options().write(true).open(daemon.image("vm0")).unwrap();
    image.set_len(2 * SIZE).unwrap();
    drop(image);
    daemon.start();
    daemon.assert_broken("vm0@a", "was changed while the daemon was not running");
    assert_eq!(daemon.show_disk("vm0")["size_bytes"], 2 * SIZE);
    daemon.delete("vm0@a");
    daemon.snap("b");
    assert_eq!(shows(&daemon, "vm0@b").len(), 2 * ALL.end);
}

/// Something that happens to the files of a snapshot while the daemon is not running.
type Damage = (&'static str, fn(&Daemon, &Value));

fn image_of(snapshot: &Value) -> std::path::PathBuf {
    snapshot["image"].as_str().unwrap().into()
}

fn table_of(daemon: &Daemon, snapshot: &Value) -> std::path::PathBuf {
    daemon.durable_table(snapshot["id"].as_str().unwrap())
}

/// Puts a symbolic link to the same bytes in a file's place.
fn replace_by_link(path: &Path) {
    let beside = path.with_extension("beside");
    std::fs::rename(path, &beside).unwrap();
    std::os::unix::fs::symlink(&beside, path).unwrap();
}

fn cut_short(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 512).unwrap();
}

fn flip(path: &Path, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

const DAMAGES: &[Damage] = &[
    ("image missing", |_, s| std::fs::remove_file(image_of(s)).unwrap()),
    ("image cut short", |_, s| cut_short(&image_of(s))),
    ("image is a link", |_, s| replace_by_link(&image_of(s))),
    ("image is a directory", |_, s| {
        std::fs::remove_file(image_of(s)).unwrap();
        std::fs::create_dir(image_of(s)).unwrap();
    }),
    ("image written", |_, s| flip(&image_of(s), 5)),
    ("table missing", |d, s| std::fs::remove_file(table_of(d, s)).unwrap()),
    ("table cut short", |d, s| cut_short(&table_of(d, s))),
    ("table empty", |d, s| std::fs::write(table_of(d, s), "").unwrap()),
    ("table with a flipped bit", |d, s| flip(&table_of(d, s), 40)),
    ("table of another size", |d, s| flip(&table_of(d, s), 8)),
    ("table is a link", |d, s| replace_by_link(&table_of(d, s))),
];

/// One disk a damage, three snapshots each; the middle one is damaged on even disks, another one on odd ones.
#[test]
fn damage_breaks_that_snapshot_and_the_older_ones() {
    let mut daemon = Daemon::with_disks(&vec![SIZE; DAMAGES.len()], "");
    let disks: Vec<_> = (0..DAMAGES.len()).map(|i| format!("vm{i}")).collect();
    let disks: Vec<&str> = disks.iter().map(String::as_str).collect();
    let names = ["a", "b", "c"];
    for (round, name) in names.iter().enumerate() {
        for disk in &disks {
            daemon.client(disk).write(round * 8..round * 8 + 100, round as u64 + 1);
        }
        daemon.snapshot(name, &disks);
    }
    for disk in &disks {
        daemon.client(disk).write(0..300, 9);
    }
    let mut expected: Vec<Vec<u64>> = Vec::new();
    for name in names {
        expected.push(shows(&daemon, &format!("vm0@{name}")));
    }
    let victim_of = |i: usize| if i.is_multiple_of(2) { 1 } else { i / 2 % 3 };
    let snapshots: Vec<Value> =
        disks.iter().enumerate().map(|(i, d)| daemon.show(&format!("{d}@{}", names[victim_of(i)]))).collect();
    daemon.stop();
    for ((_, damage), snapshot) in DAMAGES.iter().zip(&snapshots) {
        damage(&daemon, snapshot);
    }
    daemon.start();
    for (i, (what, _)) in DAMAGES.iter().enumerate() {
        for (at, name) in names.iter().enumerate() {
            let reference = format!("{}@{name}", disks[i]);
            if at > victim_of(i) {
                assert_eq!(daemon.state(&reference), "quiesced", "{what}: {reference}");
                assert_eq!(shows(&daemon, &reference), expected[at], "{what}: {reference}");
                continue;
            }
            assert_eq!(daemon.state(&reference), "broken", "{what}: {reference}");
            let why = if at == victim_of(i) { "" } else { "a newer snapshot through which it reads is lost" };
            daemon.assert_broken(&reference, why);
        }
        assert_eq!(shows(&daemon, disks[i])[..301], [[9; 300].as_slice(), &[0]].concat(), "{what}");
    }
    // Writes go on, whole snapshots stay right, and everything can be deleted.
    for (i, (what, _)) in DAMAGES.iter().enumerate() {
        daemon.client(disks[i]).write(0..400, 10);
        for (at, name) in names.iter().enumerate().rev() {
            let reference = format!("{}@{name}", disks[i]);
            if at > victim_of(i) {
                assert_eq!(shows(&daemon, &reference), expected[at], "{what}: {reference}");
            }
            daemon.delete(&reference);
        }
    }
    assert_eq!(daemon.snapshots(), Vec::<Value>::new());
}

#[test]
fn a_table_from_another_time_is_not_believed() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(ALL, 1);
    let a = daemon.snap("a");
    daemon.client("vm0").write(0..100, 2);
    daemon.stop();
    let table = table_of(&daemon, &a);
    let old = std::fs::read(&table).unwrap();
    daemon.start();
    daemon.client("vm0").write(200..300, 2);
    daemon.stop();
    // As if the state directory came back from a backup, in part.
    std::fs::write(&table, old).unwrap();
    daemon.start();
    daemon.assert_broken("vm0@a", "");
    daemon.delete("vm0@a");
    daemon.assert_only_disks_left();
}

/// The size of a disk on which a deletion goes on until it is told to pause.
pub(crate) const SLOW_SIZE: u64 = 64 << 20;

/// Lays out a deletion that takes long, and returns when it is on its way: `b` is deleted, `a` inherits.
pub(crate) fn slow_deletion(daemon: &Daemon) -> Vec<u64> {
    let mut client = daemon.client("vm0");
    let mut write_all = |tag| {
        (0..SLOW_SIZE as usize / SECTOR).step_by(ALL.end).for_each(|at| client.write(at..at + ALL.end, tag));
    };
    write_all(1);
    daemon.snap("a");
    daemon.snap("b");
    write_all(2);
    drop(client);
    let expected = shows(daemon, "vm0@a");
    let api = daemon.api();
    std::thread::spawn(move || api.send("DELETE", "/v1/snapshots/vm0@b", ""));
    let mut job = Value::Null;
    wait_until("the job", || {
        job = daemon.get("/v1/jobs").json()[0].clone();
        !job.is_null()
    });
    let path = format!("/v1/jobs/{}", job["id"]);
    daemon.send("PATCH", &path, r#"{"delay_ms":3600000}"#).ok();
    assert_eq!(daemon.get(&path).json()["state"], "running");
    assert_eq!(daemon.state("vm0@b"), "deleting");
    expected
}

#[test]
fn a_deletion_that_is_stopped_goes_on_at_the_next_start() {
    let mut daemon = Daemon::with_disks(&[SLOW_SIZE], "");
    let expected = slow_deletion(&daemon);
    daemon.restart();
    daemon.api().wait_gone("vm0@b");
    assert_eq!(shows(&daemon, "vm0@a"), expected);
    assert!(!daemon.snapshot_image("vm0@b").exists());
    daemon.delete("vm0@a");
    daemon.assert_only_disks_left();
    daemon.stop();
}

#[test]
fn a_deletion_that_is_killed_goes_on_at_the_next_start() {
    let mut daemon = Daemon::with_disks(&[SLOW_SIZE], "");
    let expected = slow_deletion(&daemon);
    daemon.kill();
    daemon.start();
    daemon.api().wait_gone("vm0@b");
    assert!(!daemon.snapshot_image("vm0@b").exists());
    assert_eq!(shows(&daemon, "vm0@a"), expected);
    daemon.delete("vm0@a");
    daemon.assert_only_disks_left();
    assert_eq!(shows(&daemon, "vm0"), vec![2; SLOW_SIZE as usize / SECTOR]);
}

#[test]
fn what_is_not_a_record_is_refused_and_left_alone() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.stop();
    let records = record_in(&daemon.state_dir(), "records.redb");
    std::fs::write(&records, "this is not a store").unwrap();
    std::fs::remove_file(records.with_extension("copy")).unwrap();
    assert!(daemon.refused_start().contains("records"));
    assert_eq!(std::fs::read(&records).unwrap(), b"this is not a store");
}

/// What was acknowledged to whoever took and deleted snapshots until the daemon was gone.
#[derive(Default)]
struct Acknowledged {
    /// Snapshots and the tag in their first sector.
    taken: Vec<(String, u64)>,
    /// Asked for, and nobody knows.
    open: Vec<String>,
}

fn take_and_delete_until_gone(api: &Api, mut client: Client, rng: &mut Rng, tag: &mut u64) -> Acknowledged {
    let mut done = Acknowledged::default();
    loop {
        *tag += 1;
        let name = format!("s{tag}");
        let disks: &[&str] = if rng.chance(50) { &["vm0"] } else { &["vm0", "vm1"] };
        if !client.queues[0].try_write(0..1, *tag, std::time::Duration::from_millis(500)) {
            return done;
        }
        done.open = disks.iter().map(|d| format!("{d}@{name}")).collect();
        if api.create(&name, disks, &json!({})).status != 201 {
            return done;
        }
        done.taken.extend(std::mem::take(&mut done.open).into_iter().map(|r| (r, *tag)));
        if done.taken.len() > 3 {
            let (victim, _) = done.taken.remove(rng.below(done.taken.len()));
            let path = format!("/v1/snapshots/{victim}");
            done.open = vec![victim];
            if api.send("DELETE", &path, "").status != 204 {
                return done;
            }
            done.open.clear();
        }
    }
}

/// Stopped or killed at any moment of taking and deleting snapshots: it starts again, what was acknowledged holds, and
/// when all snapshots are deleted nothing is left of any of them.
#[test]
fn at_whatever_moment_it_ends_nothing_is_left_lying_about() {
    let seed = seeds("at whatever moment", 1)[0];
    let mut rng = Rng::new(seed);
    let mut daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    let mut tag = 0;
    for round in 0..from_env("HALFSILVER_ENDS", 16) {
        let by_kill = rng.chance(60);
        let delay = std::time::Duration::from_micros(rng.below(150_000) as u64);
        let (api, client) = (daemon.api(), daemon.client("vm0"));
        let Acknowledged { taken, open } = std::thread::scope(|scope| {
            let (api, rng, tag) = (&api, &mut rng, &mut tag);
            let worker = scope.spawn(move || take_and_delete_until_gone(api, client, rng, tag));
            std::thread::sleep(delay);
            daemon.signal(if by_kill { libc::SIGKILL } else { libc::SIGTERM });
            worker.join().unwrap()
        });
        let status = daemon.wait_exit();
        assert!(by_kill || status.success(), "round {round}: {status}");
        daemon.start();
        let names: Vec<String> = daemon
            .snapshots()
            .iter()
            .map(|s| format!("{}@{}", s["disk"].as_str().unwrap(), s["name"].as_str().unwrap()))
            .collect();
        let how = if by_kill { "killed" } else { "stopped" };
        for (reference, tag) in &taken {
            assert!(names.contains(reference), "round {round}: {how}, and {reference} is lost, there are {names:?}");
            let state = daemon.state(reference);
            assert_eq!(state, "quiesced", "round {round}: {how}: {reference}");
            if reference.starts_with("vm0@") {
                assert_eq!(daemon.reader(reference).tag(0), *tag, "round {round}: {reference}");
            }
        }
        for name in names {
            let known = taken.iter().any(|(r, _)| *r == name) || open.contains(&name);
            assert!(known, "round {round}: {name} came from nowhere");
            // A deletion may be going on.
            if daemon.get(&format!("/v1/snapshots/{name}")).status == 200 {
                let answer = daemon.send("DELETE", &format!("/v1/snapshots/{name}?force=true"), "");
                assert!([204, 202, 404].contains(&answer.status), "round {round}: {name}: {answer:?}");
            }
        }
        wait_until("the last deletion", || daemon.snapshots().is_empty());
        daemon.assert_only_disks_left();
    }
}

#[test]
fn a_disk_that_cannot_be_served_costs_neither_the_others_nor_its_snapshots() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let image = daemon.make_image("vm1", SIZE);
    daemon.send("PUT", "/v1/disks/vm1", &json!({ "path": image }).to_string()).ok();
    daemon.client("vm1").write(0..10, 1);
    daemon.snapshot("a", &["vm0", "vm1"]);
    daemon.client("vm1").write(0..10, 2);
    daemon.stop();
    let away = daemon.path("away");
    std::fs::rename(&image, &away).unwrap();
    daemon.start();
    assert_eq!(daemon.state("vm0@a"), "quiesced");
    assert!(!daemon.socket("vm1").exists() && !daemon.socket("vm1@a").exists());
    assert!(daemon.snapshot_image("vm1@a").exists(), "{}", daemon.log_text());
    daemon.stop();
    std::fs::rename(&away, &image).unwrap();
    daemon.start();
    assert_eq!(tags(&daemon.reader("vm1@a").read(8..12)), [1, 1, 0, 0]);
    for reference in ["vm0@a", "vm1@a"] {
        daemon.delete(reference);
    }
    daemon.assert_only_disks_left();
}

#[test]
fn a_configuration_may_change_between_starts() {
    let mut daemon = Daemon::with_disks(&[SIZE], "queues=1");
    daemon.client("vm0").write(0..10, 1);
    daemon.snap("a");
    daemon.client("vm0").write(0..10, 2);
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk("vm0", "queues=3,serial=new,direct=off");
    daemon.start();
    assert_eq!(daemon.show_disk("vm0")["queues"], 3);
    assert_eq!(daemon.reader("vm0@a").tag(9), 1);
    daemon.stop();
    // With another block size the snapshot's table would mean something else.
    daemon.forget_args();
    daemon.arg_disk("vm0", "block-size=8K");
    let refusal = daemon.refused_start();
    assert!(refusal.contains("vm0 is remembered") && refusal.contains("with 1 snapshot"), "{refusal}");
    daemon.forget_args();
    daemon.start();
    assert_eq!(daemon.reader("vm0@a").tag(9), 1);
    daemon.delete("vm0@a");
    daemon.stop();
    daemon.arg_disk("vm0", "block-size=8K");
    daemon.start();
    assert_eq!((&daemon.show_disk("vm0")["block_size"], daemon.client("vm0").tag(9)), (&json!(8192), 2));
    daemon.stop();
    daemon.start();
    daemon.assert_only_disks_left();
}
