//! Power cuts under the real daemon on a real file system: everything that reaches the device below ext4 is recorded, and
//! the machine is found again as it would be after a cut anywhere in that.
//!
//! The state directory and the images are on ext4, on a loop device, on a file that qemu-storage-daemon exports and logs
//! (blklogwrites). A cut keeps what was written until the last flush that was complete, and of the rest everything,
//! nothing, or some sectors. Then ext4 replays its journal, the daemon starts in another boot, and the oracle is asked.
//!
//! Not shown: media that forget what they acknowledged. Longer runs: HALFSILVER_CUTS, HALFSILVER_SEED.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use serde_json::json;

use crate::client::{Client, tags};
use crate::harness::{Daemon, Rng, can_mount, command, from_env, run, seeds, wait_until};

const DEVICE_BYTES: u64 = 32 << 20;
const DISK_BYTES: u64 = 256 << 10;
const SECTORS: usize = 512;
/// What is written as a whole or not at all.
const UNIT: u64 = 512;
const SUPERBLOCK_END: u64 = 4096;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// A device whose writes and flushes are logged, with a file system on it.
struct Recorded {
    dir: PathBuf,
    qsd: Child,
    device: String,
    mounted: PathBuf,
}

impl Recorded {
    /// Mounted at `place`. The device as it was before is `before.img` in `dir`.
    fn mount(dir: &Path, place: &Path) -> Recorded {
        std::fs::create_dir(dir).unwrap();
        let at = |name: &str| dir.join(name);
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        File::create(at("disk.img")).unwrap().set_len(DEVICE_BYTES).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-J", "size=4", &text(at("disk.img"))]);
        std::fs::copy(at("disk.img"), at("before.img")).unwrap();
        for name in ["log.img", "export"] {
            File::create(at(name)).unwrap();
        }
        let node = |name: &str, file: &str| format!("driver=file,node-name={name},filename={}", text(at(file)));
        let qsd = command("qemu-storage-daemon")
            .args(["--blockdev", &node("f", "disk.img"), "--blockdev", &node("l", "log.img")])
            .args(["--blockdev", "driver=blklogwrites,node-name=w,file=f,log=l"])
            .arg("--export")
            .arg(format!("type=fuse,id=e,node-name=w,mountpoint={},writable=on", text(at("export"))))
            .stdin(Stdio::null())
            .stdout(File::create(at("qsd.log")).unwrap())
            .stderr(File::options().append(true).open(at("qsd.log")).unwrap())
            .spawn()
            .expect("qemu-storage-daemon starts; scripts/deps installs it");
        let export = at("export");
        wait_until("the export", || std::fs::metadata(&export).is_ok_and(|m| m.len() == DEVICE_BYTES));
        let device = run("losetup", &["-f", "--show", &text(at("export"))]);
        make_dir(place);
        run("mount", &["-t", "ext4", &device, place.to_str().unwrap()]);
        make_dir(place);
        Recorded { dir: dir.to_owned(), qsd, device, mounted: place.to_owned() }
    }

    /// How much has been logged: what was acknowledged before is in there.
    fn position(&self) -> u64 {
        std::fs::metadata(self.dir.join("log.img")).unwrap().len()
    }

    /// Ends the recording.
    fn finish(mut self) -> Log {
        self.release();
        Log::read(&self.dir)
    }

    fn release(&mut self) {
        unmount(&self.mounted);
        run("losetup", &["-d", &self.device]);
        // SAFETY: a plain system call on a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.qsd.id().cast_signed(), libc::SIGTERM) }, 0);
        assert!(self.qsd.wait().unwrap().success());
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let quietly = |program: &str, args: &[&str]| {
                let done = command(program).args(args).stderr(Stdio::null()).status();
                println!("{program}: {done:?}");
            };
            quietly("umount", &["-l", self.mounted.to_str().unwrap()]);
            quietly("losetup", &["-d", &self.device]);
            println!("killed: {:?}, {:?}", self.qsd.kill(), self.qsd.wait());
            quietly("umount", &["-l", self.dir.join("export").to_str().unwrap()]);
        }
    }
}

fn make_dir(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(path).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
}

/// What reached the device, in order, in the format of the kernel's dm-log-writes.
struct Log {
    dir: PathBuf,
    file: File,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    /// Place on the device and length, in bytes.
    at: u64,
    len: u64,
    flags: u64,
    /// Where its bytes are in the log, and where it ends there.
    data: u64,
    end: u64,
}

impl Log {
    fn read(dir: &Path) -> Log {
        let file = File::open(dir.join("log.img")).unwrap();
        let length = file.metadata().unwrap().len();
        let mut head = [0; 32];
        file.read_exact_at(&mut head, 0).unwrap();
        let number = |at: usize, bytes: &[u8]| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let sector = number(24, &head) & 0xffff_ffff;
        let (mut at, mut entries) = (sector, Vec::new());
        while at < length {
            file.read_exact_at(&mut head, at).unwrap();
            let [place, count, flags] = [0, 8, 16].map(|i| number(i, &head));
            let data = at + sector;
            at = data + if flags & DISCARD != 0 { 0 } else { count * sector };
            entries.push(Entry { at: place * sector, len: count * sector, flags, data, end: at });
        }
        Log { dir: dir.to_owned(), file, entries }
    }

    fn bytes(&self, entry: &Entry) -> Vec<u8> {
        let mut bytes = vec![0; entry.len as usize];
        if entry.flags & DISCARD == 0 {
            self.file.read_exact_at(&mut bytes, entry.data).unwrap();
        }
        bytes
    }

    fn apply(&self, entry: &Entry, to: &File) {
        to.write_all_at(&self.bytes(entry), entry.at).unwrap();
    }

    /// The device when the power goes after `count` entries. Returns the position of the cut, for the oracle.
    fn cut(&self, count: usize, what_of_the_rest: Rest, rng: &mut Rng) -> (PathBuf, u64) {
        // Another file each time: a loop device of the last one may not have gone yet, and remembers.
        let path = self.dir.join(format!("cut-{}.img", rng.next()));
        std::fs::copy(self.dir.join("before.img"), &path).unwrap();
        let device = File::options().write(true).open(&path).unwrap();
        let entries = &self.entries[..count];
        let flushed = entries.iter().rposition(|e| e.flags & FLUSH != 0).map_or(0, |i| i + 1);
        entries[..flushed].iter().for_each(|entry| self.apply(entry, &device));
        for entry in &entries[flushed..] {
            match what_of_the_rest {
                Rest::All => self.apply(entry, &device),
                _ if entry.flags & FUA != 0 => self.apply(entry, &device),
                Rest::Nothing => {}
                Rest::SomeSectors => {
                    let keep = [0, 10, 50, 90, 100][rng.below(5)];
                    // ext4 has no second copy of its superblock that it would look at by itself.
                    let unit = if entry.at < SUPERBLOCK_END { entry.len.max(1) } else { UNIT };
                    for (i, sector) in self.bytes(entry).chunks(unit as usize).enumerate() {
                        if rng.chance(keep) {
                            device.write_all_at(sector, entry.at + i as u64 * unit).unwrap();
                        }
                    }
                }
            }
        }
        (path, entries.last().map_or(0, |e| e.end))
    }
}

#[derive(Clone, Copy, Debug)]
enum Rest {
    All,
    Nothing,
    SomeSectors,
}

/// What was done, each with the position of the log before it began and after it was acknowledged.
#[derive(Default)]
struct History {
    writes: Vec<Write>,
    snapshots: Vec<Taken>,
}

struct Write {
    sectors: Range<usize>,
    tag: u64,
    began: u64,
    /// From which position on it is durable for certain.
    durable: Option<u64>,
}

struct Taken {
    reference: String,
    survives: bool,
    content: Vec<u64>,
    began: u64,
    ready: u64,
    deleted: Option<(u64, u64)>,
}

impl History {
    fn live(&self) -> Vec<u64> {
        let mut content = vec![0; SECTORS];
        self.writes.iter().for_each(|w| content[w.sectors.clone()].fill(w.tag));
        content
    }

    fn flushed(&mut self, position: u64) {
        self.writes.iter_mut().for_each(|w| w.durable = w.durable.or(Some(position)));
    }

    /// Whether the live disk may show this after a cut at `position`.
    fn check_live(&self, position: u64, shown: &[u64]) {
        for (sector, &tag) in shown.iter().enumerate() {
            let mut allowed = vec![0];
            for write in self.writes.iter().filter(|w| w.sectors.contains(&sector) && w.began <= position) {
                if write.durable.is_some_and(|durable| durable <= position) {
                    allowed.clear();
                }
                allowed.push(write.tag);
            }
            let all: Vec<_> = self
                .writes
                .iter()
                .filter(|w| w.sectors.contains(&sector))
                .map(|w| (w.tag, w.began, w.durable))
                .collect();
            assert!(allowed.contains(&tag), "sector {sector} shows {tag}, of {allowed:?}; cut at {position}, {all:?}");
        }
    }
}

/// The daemon's directories are on the recorded device, but for the run directory, which a power cut takes.
fn place(mirrored: bool) -> Daemon {
    let mut daemon = Daemon::place();
    let image = daemon.state_dir().join("vm0.raw");
    let leg =
        if mirrored { format!(",mirror={}", daemon.state_dir().join("leg.raw").display()) } else { String::new() };
    daemon.arg_disk_at("vm0", &image, &format!("durability=power{leg}"));
    daemon
}

fn load(daemon: &mut Daemon, recorded: &Recorded, mirrored: bool, rng: &mut Rng) -> History {
    let image = File::create(daemon.state_dir().join("vm0.raw")).unwrap();
    image.set_len(DISK_BYTES).unwrap();
    image.sync_all().unwrap();
    File::open(daemon.state_dir()).unwrap().sync_all().unwrap();
    daemon.start();
    let mut history = History::default();
    let mut client = daemon.client("vm0");
    for step in 0..60u64 {
        match rng.below(20) {
            0..12 => some_writes(&mut client, recorded, &mut history, 100 * (step + 1), rng),
            12..15 => {
                client.flush();
                history.flushed(recorded.position());
            }
            15..17 if history.snapshots.iter().filter(|s| s.deleted.is_none()).count() < 5 => {
                // There is one leg when an older snapshot got the other one's image.
                let in_sync = || {
                    let legs = daemon.show_disk("vm0")["legs"].as_array().unwrap().clone();
                    legs.len() == 2 && legs.iter().all(|leg| leg["state"] == "in-sync")
                };
                let strategy = match rng.below(3) {
                    0 => "write-logging",
                    1 if mirrored && in_sync() => "write-mirroring",
                    _ => "copy-on-write",
                };
                take(daemon, recorded, &mut history, &format!("s{step}"), strategy);
            }
            17 => {
                let left: Vec<usize> =
                    (0..history.snapshots.len()).filter(|&i| history.snapshots[i].deleted.is_none()).collect();
                if !left.is_empty() {
                    let gone = &mut history.snapshots[left[rng.below(left.len())]];
                    let began = recorded.position();
                    daemon.delete(&gone.reference);
                    gone.deleted = Some((began, recorded.position()));
                }
            }
            18 => {
                drop(client);
                if rng.chance(40) {
                    daemon.kill();
                    daemon.start();
                } else {
                    daemon.restart();
                    history.flushed(recorded.position());
                }
                client = daemon.client("vm0");
            }
            _ => {}
        }
    }
    assert_eq!(tags(&client.read_all()), history.live());
    drop(client);
    daemon.kill();
    history
}

fn take(daemon: &Daemon, recorded: &Recorded, history: &mut History, name: &str, strategy: &str) {
    let (content, began) = (history.live(), recorded.position());
    let answer = daemon.api().create(name, &["vm0"], &json!({ "strategy": strategy, "wait": true }));
    answer.ok();
    assert_eq!(answer.json()[0]["durability"], "power");
    let reference = format!("vm0@{name}");
    wait_until("the snapshot", || daemon.state(&reference) == "quiesced");
    let ready = recorded.position();
    history.snapshots.push(Taken { reference, survives: true, content, began, ready, deleted: None });
}

/// A few writes at the same time, to different places.
fn some_writes(client: &mut Client, recorded: &Recorded, history: &mut History, tag: u64, rng: &mut Rng) {
    let (queue, began) = (&mut client.queues[0], recorded.position());
    let first = history.writes.len();
    for slot in 0..1 + rng.below(6) {
        let at = slot * 80 + rng.below(40);
        let sectors = at..at + 1 + rng.below(39);
        let is_durable = rng.chance(15);
        queue.submit_write(slot, sectors.clone(), tag + slot as u64, is_durable);
        // Until it is known when.
        let durable = is_durable.then_some(u64::MAX);
        history.writes.push(Write { sectors, tag: tag + slot as u64, began, durable });
    }
    while queue.in_flight() > 0 {
        let answers = queue.answers(*crate::harness::PATIENCE);
        assert!(!answers.is_empty() && answers.iter().all(|(_, ret)| *ret == 0), "{answers:?}");
    }
    let done = recorded.position();
    history.writes[first..].iter_mut().filter_map(|w| w.durable.as_mut()).for_each(|durable| *durable = done);
}

/// Starts the daemon on what the cut left, and holds it to the oracle.
fn look(daemon: &mut Daemon, device: &Path, position: u64, history: &History, go_on: bool) {
    let place = daemon.state_dir();
    run("mount", &["-t", "ext4", "-o", "loop", device.to_str().unwrap(), place.to_str().unwrap()]);
    let _mounted = Mounted(place);
    daemon.lose_run_tables();
    daemon.boot_again();
    daemon.start();
    let shown = tags(&daemon.content("vm0"));
    history.check_live(position, &shown);
    let found = daemon.snapshots();
    for taken in &history.snapshots {
        let found = found.iter().find(|s| format!("vm0@{}", s["name"].as_str().unwrap()) == taken.reference);
        let state = found.map(|s| s["state"].as_str().unwrap().to_owned());
        let (deletion, deleted) = taken.deleted.unwrap_or((u64::MAX, u64::MAX));
        let what = format!("{} is {state:?}", taken.reference);
        if position <= taken.began || position >= deleted {
            assert!(state.as_deref().is_none_or(|s| s == "deleting" || s == "folding"), "{what}");
        } else if position >= taken.ready && position <= deletion && taken.survives {
            assert_eq!(state.as_deref(), Some("quiesced"), "{what}: {found:?}");
        }
        if state.as_deref() == Some("quiesced") {
            assert_eq!(tags(&daemon.content(&taken.reference)), taken.content, "{what}");
        }
    }
    if go_on {
        goes_on(daemon, shown);
    }
    daemon.kill();
}

/// The disk is used as before, and everything can go.
fn goes_on(daemon: &Daemon, mut live: Vec<u64>) {
    let mut client = daemon.client("vm0");
    client.write(5..300, 7);
    live[5..300].fill(7);
    client.flush();
    drop(client);
    daemon.api().create("after", &["vm0"], &json!({ "wait": true })).ok();
    daemon.client("vm0").write(100..400, 8);
    assert_eq!(tags(&daemon.content("vm0@after")), live);
    for snapshot in daemon.snapshots() {
        let reference = format!("vm0@{}", snapshot["name"].as_str().unwrap());
        // Those whose deletion goes on by itself may be gone already.
        if !matches!(snapshot["state"].as_str(), Some("deleting" | "folding")) {
            daemon.delete(&reference);
        }
        daemon.api().wait_gone(&reference);
    }
    live[100..400].fill(8);
    assert_eq!(tags(&daemon.content("vm0")), live);
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A daemon that failed a test may still have files there.
            println!("umount: {:?}", command("umount").arg("-l").arg(&self.0).status());
        } else {
            unmount(&self.0);
        }
    }
}

/// The last transfers of a process that was killed keep its files open for a moment.
fn unmount(place: &Path) {
    let quiet = |program: &mut std::process::Command| program.stderr(Stdio::null()).status().is_ok_and(|s| s.success());
    wait_until("the file system to be free", || quiet(command("umount").arg(place)));
}

fn power_cuts(name: &str, mirrored: bool) {
    if !can_mount(name) {
        return;
    }
    for seed in seeds(name, 1) {
        let mut rng = Rng::new(seed);
        let mut daemon = place(mirrored);
        let recorded = Recorded::mount(&daemon.path("recorded"), &daemon.state_dir());
        let history = load(&mut daemon, &recorded, mirrored, &mut rng);
        let log = recorded.finish();
        let (whole, _) = log.cut(log.entries.len(), Rest::All, &mut rng);
        let same = std::fs::read(whole).unwrap() == std::fs::read(daemon.path("recorded/disk.img")).unwrap();
        assert!(same, "the log does not have all that reached the device");
        println!("{} entries, {} snapshots", log.entries.len(), history.snapshots.len());
        // Before the first record there is no disk yet.
        let first =
            history.writes.first().map_or(0, |w| log.entries.iter().position(|e| e.end >= w.began).unwrap_or(0));
        for cut in 0..from_env("HALFSILVER_CUTS", 60) {
            let count = first + 1 + rng.below(log.entries.len() - first);
            let rest = [Rest::SomeSectors, Rest::Nothing, Rest::SomeSectors, Rest::All][cut as usize % 4];
            println!("cut {cut}: after {count} entries, of the rest {rest:?}");
            let (device, position) = log.cut(count, rest, &mut rng);
            look(&mut daemon, &device, position, &history, cut % 3 == 0);
            std::fs::remove_file(device).unwrap();
        }
    }
}

#[test]
fn what_was_promised_is_there_after_every_cut() {
    power_cuts("what_was_promised_is_there_after_every_cut", false);
}

#[test]
fn what_was_promised_by_a_mirror_is_there_after_every_cut() {
    power_cuts("what_was_promised_by_a_mirror_is_there_after_every_cut", true);
}

/// What is in the recorded device at this moment, and all that a cut then may make of it.
fn cuts_here(recorded: Recorded, rng: &mut Rng, mut look: impl FnMut(&Path)) {
    let now = recorded.position();
    let log = recorded.finish();
    let count = log.entries.iter().take_while(|entry| entry.end <= now).count();
    for rest in [Rest::Nothing, Rest::SomeSectors, Rest::SomeSectors, Rest::All] {
        println!("of the rest {rest:?}");
        let (device, _) = log.cut(count, rest, rng);
        look(&device);
    }
}

#[test]
fn what_a_clean_stop_has_saved_is_there_after_a_cut() {
    let name = "what_a_clean_stop_has_saved_is_there_after_a_cut";
    if !can_mount(name) {
        return;
    }
    let (mut rng, mut daemon) = (Rng::new(seeds(name, 1)[0]), Daemon::place());
    let path = daemon.state_dir().join("vm0.raw");
    daemon.arg_disk_at("vm0", &path, "direct=off");
    let recorded = Recorded::mount(&daemon.path("recorded"), &daemon.state_dir());
    let image = File::create(&path).unwrap();
    image.write_all_at(&vec![0; DISK_BYTES as usize], 0).unwrap();
    image.sync_all().unwrap();
    drop(image);
    daemon.start();
    let (mut client, mut expected) = (daemon.client("vm0"), Vec::new());
    for (tag, range) in [(1, 0..SECTORS), (2, 10..50), (3, 30..200)] {
        client.write(range, tag);
        let snapshot = format!("s{tag}");
        daemon.snap(&snapshot);
        expected.push((format!("vm0@{snapshot}"), tags(&client.read_all())));
    }
    client.write(100..400, 4);
    expected.push(("vm0".to_owned(), tags(&client.read_all())));
    drop(client);
    daemon.stop();
    cuts_here(recorded, &mut rng, |device| {
        let place = daemon.state_dir();
        run("mount", &["-t", "ext4", "-o", "loop", device.to_str().unwrap(), place.to_str().unwrap()]);
        let _mounted = Mounted(place);
        daemon.lose_run_tables();
        daemon.boot_again();
        daemon.start();
        for (what, content) in &expected {
            assert!(what == "vm0" || daemon.state(what) == "quiesced", "{}", daemon.show(what));
            assert_eq!(tags(&daemon.content(what)), *content, "{what}");
        }
        daemon.kill();
    });
}

#[test]
fn a_durable_write_is_on_the_medium_when_it_is_answered() {
    use halfsilver::image::{
        AlignedBuf, ByteOffset, Direct, Executor, FileImage, IoBuf, RingOptions, sync, write_all_at,
    };
    let name = "a_durable_write_is_on_the_medium_when_it_is_answered";
    if !can_mount(name) {
        return;
    }
    let (mut rng, daemon) = (Rng::new(seeds(name, 1)[0]), Daemon::place());
    let recorded = Recorded::mount(&daemon.path("recorded"), &daemon.state_dir());
    let (path, executor) = (daemon.state_dir().join("image"), Executor::new(RingOptions::default()).unwrap());
    let (at, queue) = (path.clone(), executor.queue().clone());
    let done = executor.block_on(async move {
        let image = FileImage::create(&at, DISK_BYTES, Direct::Off)?;
        sync(&image, &queue).await?;
        File::open(at.parent().unwrap()).unwrap().sync_all().unwrap();
        let mut bytes = AlignedBuf::zeroed(8192);
        bytes.fill(7);
        write_all_at(&image, &queue, ByteOffset(4096), IoBuf::Owned(bytes), true).await
    });
    done.unwrap().unwrap();
    cuts_here(recorded, &mut rng, |device| {
        let place = daemon.state_dir();
        run("mount", &["-t", "ext4", "-o", "loop", device.to_str().unwrap(), place.to_str().unwrap()]);
        let _mounted = Mounted(place);
        let found = std::fs::read(&path).unwrap();
        assert_eq!((found[4095], &found[4096..12288], found[12288]), (0, [7; 8192].as_slice(), 0));
    });
}
