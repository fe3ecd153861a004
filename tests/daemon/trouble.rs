//! Trouble on the side of the snapshots: no space where their images are, and a file system that stands still.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::client::tags;
use crate::harness::{Daemon, can_mount, run, wait_until};
use crate::hung::has_hanging_thread;

const SIZE: u64 = 4 << 20;
const SECTORS: usize = 8192;

/// A small file system, gone when dropped.
pub(crate) struct Mount {
    path: PathBuf,
}

impl Mount {
    pub(crate) fn tmpfs(path: &Path, size: &str) -> Mount {
        std::fs::create_dir(path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", path.to_str().unwrap()]);
        Mount { path: path.to_owned() }
    }

    pub(crate) fn ext4(path: &Path, bytes: u64) -> Mount {
        let image = path.with_extension("ext4");
        std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", "-m", "0", image.to_str().unwrap()]);
        std::fs::create_dir(path).unwrap();
        run("mount", &["-o", "loop", image.to_str().unwrap(), path.to_str().unwrap()]);
        Mount { path: path.to_owned() }
    }

    fn used(&self) -> u64 {
        let line = run("df", &["--output=used", "-B1", self.path.to_str().unwrap()]);
        line.lines().nth(1).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a daemon that failed a test may still have files there.
        let done = crate::harness::command("umount").arg("-l").arg(&self.path).status();
        if !done.is_ok_and(|s| s.success()) {
            println!("cannot unmount {}", self.path.display());
        }
    }
}

/// A reader gets errors, not bytes.
#[track_caller]
fn assert_unreadable(daemon: &Daemon, reference: &str) {
    if let Ok(mut reader) = crate::client::Client::connect(&daemon.socket(reference), 1, true) {
        for sector in [0, 1000, SECTORS - 1] {
            reader.queues[0].submit_read(0, sector..sector + 1);
            assert_ne!(reader.queues[0].wait_one().1, 0, "{reference} is broken and shows sector {sector}");
        }
    }
}

fn no_space(mount: impl FnOnce(&Path) -> Mount) {
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "queues=2");
    let small = mount(&daemon.path("small"));
    daemon.start();
    let events = daemon.events();
    let mut client = daemon.client_with_queues("vm0", 2);
    client.write(0..SECTORS, 1);
    daemon.snap("old");
    client.write(100..200, 2);
    let used = small.used();
    let image = daemon.path("small/b.img");
    daemon.api().create("b", &["vm0"], &json!({ "image": image, "wait": true })).ok();
    assert_eq!(tags(&daemon.reader("vm0@b").read(99..101)), [1, 2]);
    // More than fits. The guest notices nothing.
    for (i, queue) in client.queues.iter_mut().enumerate() {
        for slot in 0..8 {
            let at = (i * 8 + slot) * 500;
            queue.submit_write(slot, at..at + 500, 3, false);
        }
    }
    for queue in &mut client.queues {
        while queue.in_flight() > 0 {
            let answers = queue.answers(*crate::harness::PATIENCE);
            assert!(!answers.is_empty() && answers.iter().all(|(_, ret)| *ret == 0), "a guest's write failed");
        }
    }
    let event = events.wait_for("SNAPSHOT_BROKEN", "vm0@b");
    let reason = event["reason"].as_str().unwrap();
    assert!(reason.contains("b.img") && reason.contains("No space"), "{reason}");
    assert_eq!(daemon.state("vm0@b"), "broken");
    assert_eq!(daemon.show("vm0@b")["reason"], event["reason"]);
    assert_unreadable(&daemon, "vm0@b");
    // The guest's disk is right, and so is the older snapshot, which needed those blocks too.
    let expected = |base: u64, middle: std::ops::Range<usize>, tag: u64| {
        let mut all = vec![base; SECTORS];
        all[middle].fill(tag);
        all
    };
    assert_eq!(tags(&client.read_all()), expected(1, 0..8000, 3));
    assert_eq!(tags(&daemon.content("vm0@old")), vec![1; SECTORS]);
    // A newer one is not concerned.
    daemon.snap("new");
    client.write(7900..8100, 4);
    assert_eq!(tags(&daemon.content("vm0@new")), expected(1, 0..8000, 3));
    assert_eq!(tags(&daemon.content("vm0@old")), vec![1; SECTORS]);
    drop(client);
    daemon.restart();
    assert_eq!(daemon.state("vm0@b"), "broken");
    assert_unreadable(&daemon, "vm0@b");
    for (reference, content) in [("vm0@old", vec![1; SECTORS]), ("vm0@new", expected(1, 0..8000, 3))] {
        assert_eq!(tags(&daemon.content(reference)), content, "{reference} after a restart");
    }
    daemon.delete("vm0@b");
    assert!(!image.exists() && small.used() <= used, "the space is not given back: {} of {used}", small.used());
    assert_eq!(tags(&daemon.content("vm0@old")), vec![1; SECTORS]);
    daemon.delete("vm0@new");
    assert_eq!(tags(&daemon.content("vm0@old")), vec![1; SECTORS]);
    daemon.delete("vm0@old");
    daemon.assert_only_disks_left();
    daemon.stop();
}

#[test]
fn no_space_on_a_snapshots_ext4() {
    if can_mount("no_space_on_a_snapshots_ext4") {
        no_space(|path| Mount::ext4(path, 1 << 20));
    }
}

#[test]
fn no_space_on_a_snapshots_tmpfs() {
    if can_mount("no_space_on_a_snapshots_tmpfs") {
        no_space(|path| Mount::tmpfs(path, "1m"));
    }
}

/// What a version has lost is known to whoever comes after a death, however soon that is.
#[cfg(feature = "planted")]
#[test]
fn planted_death_before_a_broken_version_is_recorded() {
    if !can_mount("planted_death_before_a_broken_version_is_recorded") {
        return;
    }
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "");
    let _small = Mount::tmpfs(&daemon.path("small"), "1m");
    daemon.crash_at = Some("1:before it is recorded that a version is broken".to_owned());
    daemon.start();
    daemon.crash_at = None;
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.api().create("a", &["vm0"], &json!({ "image": daemon.path("small/a.img"), "wait": true })).ok();
    for slot in 0..8 {
        client.queues[0].submit_write(slot, slot * 500..slot * 500 + 500, 2, false);
    }
    wait_until("its death", || daemon.has_died_by(libc::SIGKILL));
    drop(client);
    daemon.start();
    daemon.assert_broken("vm0@a", "");
    assert_unreadable(&daemon, "vm0@a");
}

#[test]
fn no_space_for_what_a_deleted_neighbour_hands_over() {
    if !can_mount("no_space_for_what_a_deleted_neighbour_hands_over") {
        return;
    }
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "");
    let _small = Mount::tmpfs(&daemon.path("small"), "1m");
    daemon.start();
    let events = daemon.events();
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.snap("oldest");
    let image = daemon.path("small/a.img");
    daemon.api().create("a", &["vm0"], &json!({ "image": image, "wait": true })).ok();
    daemon.snap("b");
    client.write(0..SECTORS, 2);
    assert_eq!(tags(&daemon.content("vm0@a")), vec![1; SECTORS]);
    // Everything that b owns belongs to a then, and does not fit.
    daemon.delete("vm0@b");
    events.wait_for("SNAPSHOT_BROKEN", "vm0@a");
    assert_eq!(daemon.state("vm0@a"), "broken");
    assert_unreadable(&daemon, "vm0@a");
    assert_eq!(tags(&daemon.content("vm0@oldest")), vec![1; SECTORS]);
    assert_eq!(tags(&client.read_all()), vec![2; SECTORS]);
    daemon.delete("vm0@a");
    assert_eq!(tags(&daemon.content("vm0@oldest")), vec![1; SECTORS]);
    daemon.delete("vm0@oldest");
    daemon.assert_only_disks_left();
}

/// A log has the only copy of what the guest writes, so the guest must hear of it; nothing else is lost.
#[test]
fn no_space_in_a_log_fails_the_guests_write_and_nothing_else() {
    if !can_mount("no_space_in_a_log_fails_the_guests_write_and_nothing_else") {
        return;
    }
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "");
    let _small = Mount::tmpfs(&daemon.path("small"), "1m");
    daemon.start();
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    let log = daemon.path("small/a.log");
    daemon.api().create("a", &["vm0"], &json!({ "strategy": "write-logging", "image": log, "wait": true })).ok();
    let queue = &mut client.queues[0];
    let patience = *crate::harness::PATIENCE;
    let mut expected = vec![1; SECTORS];
    let mut refused = Vec::new();
    for at in (4..SECTORS - 100).step_by(100) {
        if queue.try_write(at..at + 100, 2, patience) {
            expected[at..at + 100].fill(2);
        } else {
            refused.push(at..at + 100);
        }
    }
    assert!(!refused.is_empty() && refused.len() < SECTORS / 100 - 5, "{} writes were refused", refused.len());
    assert!(queue.try_write(4..104, 3, patience), "what the log has already is written in place");
    expected[4..104].fill(3);
    let check = |seen: Vec<u64>, when: &str| {
        for (sector, tag) in seen.into_iter().enumerate() {
            let may_be_new = refused.iter().any(|range| range.contains(&sector));
            assert!(tag == expected[sector] || may_be_new && tag == 2, "{when}: sector {sector} is {tag}");
        }
    };
    check(tags(&client.read_all()), "with the log");
    assert_eq!(tags(&daemon.content("vm0@a")), vec![1; SECTORS]);
    daemon.delete("vm0@a");
    check(tags(&client.read_all()), "without it");
    client.write(0..SECTORS, 4);
    client.flush();
    assert_eq!(tags(&client.read_all()), vec![4; SECTORS]);
    daemon.assert_only_disks_left();
}

/// A fold that finds no space fails. What waits for it says so instead of waiting, and goes on after it.
#[test]
fn a_deletion_does_not_wait_for_one_that_has_failed() {
    if !can_mount("a_deletion_does_not_wait_for_one_that_has_failed") {
        return;
    }
    let mut daemon = Daemon::place();
    let small = Mount::tmpfs(&daemon.path("small"), "256k");
    let image = daemon.path("small/vm0.raw");
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    daemon.arg_disk_at("vm0", &image, "");
    daemon.start();
    let log = json!({ "strategy": "write-logging", "wait": true });
    daemon.api().create("a", &["vm0"], &log).ok();
    daemon.client("vm0").write(0..SECTORS, 2);
    daemon.api().create("b", &["vm0"], &log).ok();
    let first = daemon.send("DELETE", "/v1/snapshots/vm0@a", "");
    assert!(first.status >= 400 && first.body.contains("No space"), "{} {}", first.status, first.body);
    let job = daemon.get("/v1/jobs").json()[0]["id"].clone();
    let second = daemon.send("DELETE", "/v1/snapshots/vm0@b", "");
    assert!(second.status >= 400, "{} {}", second.status, second.body);
    assert!(second.body.contains(&format!("job {job}, has failed")), "{}", second.body);
    assert_eq!(tags(&daemon.client("vm0").read_all()), vec![2; SECTORS]);
    run("mount", &["-o", "remount,size=4m", daemon.path("small").to_str().unwrap()]);
    daemon.delete("vm0@a");
    daemon.delete("vm0@b");
    assert_eq!(tags(&daemon.client("vm0").read_all()), vec![2; SECTORS]);
    daemon.assert_only_disks_left();
    daemon.stop();
    drop(small);
}

#[test]
fn a_snapshot_that_finds_no_space_at_all_is_refused() {
    if !can_mount("a_snapshot_that_finds_no_space_at_all_is_refused") {
        return;
    }
    let mut daemon = Daemon::place();
    daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "");
    let _small = Mount::ext4(&daemon.path("small"), 1 << 20);
    daemon.start();
    // No inode is left.
    let mut count = 0;
    while std::fs::File::create(daemon.path(&format!("small/{count}"))).is_ok() {
        count += 1;
    }
    let refused = daemon.api().create("a", &["vm0"], &json!({ "image": daemon.path("small/a.img"), "wait": true }));
    assert_eq!(refused.refused(), "no-space");
    assert_eq!(daemon.snapshots(), Vec::<Value>::new());
    daemon.client("vm0").write(0..10, 1);
    daemon.assert_only_disks_left();
}

/// Stops all writing to a file system, until dropped.
pub(crate) struct Standstill(PathBuf);

impl Standstill {
    pub(crate) fn begin(path: &Path) -> Standstill {
        run("fsfreeze", &["--freeze", path.to_str().unwrap()]);
        Standstill(path.to_owned())
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        run("fsfreeze", &["--unfreeze", self.0.to_str().unwrap()]);
    }
}

/// A write hangs: the cut is made all the same, the snapshot drains until the write is done, and then has it. More
/// cuts than the clock has room for are refused, and nothing is lost by it.
#[test]
fn a_write_that_hangs_holds_up_its_snapshots_only() {
    if !can_mount("a_write_that_hangs_holds_up_its_snapshots_only") {
        return;
    }
    let mut daemon = Daemon::place();
    let _slow = Mount::ext4(&daemon.path("slow"), 8 << 20);
    std::fs::File::create(daemon.path("slow/vm0.raw")).unwrap().set_len(1 << 20).unwrap();
    daemon.arg_disk_at("vm0", &daemon.path("slow/vm0.raw"), "");
    daemon.make_image("vm1", 1 << 20);
    daemon.arg_disk("vm1", "");
    daemon.start();
    let (mut slow, mut quick) = (daemon.client("vm0"), daemon.client("vm1"));
    slow.write(0..2048, 1);
    daemon.snapshot("before", &["vm1"]);
    let standstill = Standstill::begin(&daemon.path("slow"));
    slow.queues[0].submit_write(0, 0..8, 2, false);
    wait_until("the write to hang", || has_hanging_thread(daemon.pid()));
    daemon.api().create("a", &["vm0", "vm1"], &json!({})).ok();
    assert_eq!((daemon.state("vm0@a"), daemon.state("vm1@a")), ("draining".to_owned(), "draining".to_owned()));
    assert!(!daemon.socket("vm0@a").exists() && !daemon.socket("vm1@a").exists());
    // The other disk goes on, and many more cuts are made.
    let mut refused = None;
    for i in 0..80 {
        quick.write(i..i + 1, 7);
        let answer = daemon.api().create(&format!("s{i}"), &["vm1"], &json!({}));
        if answer.status != 201 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("the clock has no room for so many");
    assert_eq!(refused.refused(), "unavailable");
    assert!(refused.body.contains("draining"), "{}", refused.body);
    let count = daemon.snapshots().len();
    // A deletion needs a cut too. It is refused or waits, and the snapshot is still there and whole.
    let api = daemon.api();
    let deletion = std::thread::spawn(move || api.send("DELETE", "/v1/snapshots/vm1@before", ""));
    std::thread::sleep(std::time::Duration::from_millis(300));
    drop(standstill);
    let deletion = deletion.join().unwrap();
    assert_eq!(slow.queues[0].wait_one(), (0, 0));
    wait_until("all to be quiesced", || {
        daemon.snapshots().iter().all(|s| s["state"] == "quiesced" || s["name"] == "before")
    });
    match deletion.status {
        204 | 202 => daemon.api().wait_gone("vm1@before"),
        _ => {
            assert_eq!(deletion.refused(), "snapshot-busy");
            assert_eq!(daemon.state("vm1@before"), "quiesced");
            assert_eq!(tags(&daemon.content("vm1@before")), vec![0; 2048]);
        }
    }
    // The write was on its way at the cut, so it belongs to the snapshot.
    let content = tags(&daemon.content("vm0@a"));
    assert_eq!((content[0], content[7], content[8]), (2, 2, 1));
    assert_eq!(tags(&daemon.content("vm1@a")), vec![0; 2048]);
    assert!(count > 60, "{count}");
    for snapshot in daemon.snapshots() {
        let reference = format!("{}@{}", snapshot["disk"].as_str().unwrap(), snapshot["name"].as_str().unwrap());
        daemon.delete(&reference);
    }
    daemon.assert_only_disks_left();
    drop((slow, quick));
    daemon.stop();
}
