//! Images: who may use them at once, what they may be, and what they cost.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::client::{SECTOR, tags};
use crate::harness::{Daemon, Rng, allocated, can_mount, run, seeds};

const SIZE: u64 = 1 << 20;
const SECTORS: usize = 2048;

/// Whether this program of QEMU's does it.
fn qemu(program: &str, args: &[&str], image: &Path) -> Result<(), String> {
    let output = crate::harness::command(program).args(args).arg(image).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    if output.status.success() { Ok(()) } else { Err(text) }
}

const QEMU_WRITE: [&str; 4] = ["-f", "raw", "-c", "write -P 5 0 512"];
const QEMU_READ: [&str; 5] = ["-r", "-f", "raw", "-c", "read 0 512"];

#[test]
fn an_image_in_use_is_kept_from_qemu_and_from_us() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..SECTORS, 1);
    daemon.snap("a");
    let image = daemon.image("vm0");
    for path in [&image, &daemon.snapshot_image("vm0@a")] {
        let refused = qemu("qemu-io", &QEMU_WRITE, path).unwrap_err();
        assert!(refused.contains("lock"), "{refused}");
        let refused = qemu("qemu-img", &["resize", "-f", "raw", "--shrink"], path).unwrap_err();
        assert!(!refused.is_empty());
    }
    // Who tolerates changes may look.
    qemu("qemu-img", &["info", "-U", "-f", "raw"], &image).unwrap();
    // A second disk on it, by whatever name.
    let (link, hard) = (daemon.path("link"), daemon.path("hard"));
    std::os::unix::fs::symlink(&image, &link).unwrap();
    std::fs::hard_link(&image, &hard).unwrap();
    for path in [&image, &link, &hard] {
        let refused = daemon.send("PUT", "/v1/disks/vm1", &json!({ "path": path }).to_string());
        assert_eq!(refused.refused(), "conflict");
        assert!(refused.body.contains("in use"), "{}", refused.body);
        let readonly = json!({ "path": path, "readonly": true }).to_string();
        assert_eq!(daemon.send("PUT", "/v1/disks/vm1", &readonly).refused(), "conflict");
    }
    // A snapshot's image is nobody's disk.
    let frozen = json!({ "path": daemon.snapshot_image("vm0@a") }).to_string();
    assert_eq!(daemon.send("PUT", "/v1/disks/vm1", &frozen).refused(), "conflict");
    // A second daemon.
    let mut other = daemon.beside("e");
    other.arg_disk("vm0", "");
    let refusal = other.refused_start();
    assert!(refusal.contains("in use"), "{refusal}");
    assert_eq!(tags(&daemon.content("vm0@a")), vec![1; SECTORS]);
    assert_eq!(tags(&daemon.content("vm0")), vec![1; SECTORS]);
}

#[test]
fn an_image_that_qemu_has_is_left_to_it() {
    let mut daemon = Daemon::place();
    let image = daemon.make_image("vm0", SIZE);
    daemon.arg_disk("vm0", "");
    let mut qemu = crate::harness::command("qemu-io")
        .args(["-f", "raw"])
        .arg(&image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(qemu.stdin.as_mut().unwrap(), "length").unwrap();
    let mut line = String::new();
    BufReader::new(qemu.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("MiB"), "{line}");
    let refusal = daemon.refused_start();
    assert!(refusal.contains("in use") && refusal.contains("vm0.raw"), "{refusal}");
    drop(qemu.stdin.take());
    assert!(qemu.wait().unwrap().success());
    daemon.start();
}

#[test]
fn read_only_disks_share_with_readers_and_not_with_writers() {
    let mut daemon = Daemon::place();
    let image = daemon.make_image("vm0", SIZE);
    qemu("qemu-io", &QEMU_WRITE, &image).unwrap();
    daemon.arg_disk("vm0", "readonly=on");
    daemon.start();
    let mut other = daemon.beside("e");
    other.arg_disk("vm0", "readonly=on");
    other.start();
    qemu("qemu-io", &QEMU_READ, &image).unwrap();
    let refused = qemu("qemu-io", &QEMU_WRITE, &image).unwrap_err();
    assert!(refused.contains("lock"), "{refused}");
    let mut writer = daemon.beside("f");
    writer.arg_disk("vm0", "");
    assert!(writer.refused_start().contains("in use"));

    let expected = std::fs::read(&image).unwrap();
    assert!(crate::client::Client::connect(&daemon.socket("vm0"), 1, false).is_err(), "it is read-only");
    assert!(daemon.content("vm0") == expected && other.content("vm0") == expected);
    // Snapshots of it cost nothing and are what it is.
    daemon.snap("a");
    daemon.snap("b");
    assert!(daemon.content("vm0@a") == expected);
    assert_eq!(allocated(&daemon.snapshot_image("vm0@a")), 0);
    daemon.restart();
    assert!(daemon.content("vm0@b") == expected);
    daemon.delete("vm0@a");
    assert!(daemon.content("vm0@b") == expected);
    daemon.delete("vm0@b");
    daemon.assert_only_disks_left();
    assert!(std::fs::read(&image).unwrap() == expected);
}

#[test]
fn images_that_cannot_be_disks_are_refused_with_what_to_do() {
    let daemon = Daemon::place();
    let refusal_of = |path: &Path, options: &str| {
        let mut daemon = daemon.beside("e");
        daemon.arg_disk_at("vm0", path, options);
        daemon.refused_start()
    };
    for (size, words) in [(0, ["is empty", "truncate -s"]), (1000, ["not a multiple of 512", "truncate -s %512"])] {
        let image = daemon.make_image("vm0", size);
        let refusal = refusal_of(&image, "");
        assert!(words.iter().all(|w| refusal.contains(w)) && refusal.contains("vm0"), "{refusal}");
        assert_eq!(std::fs::metadata(&image).unwrap().len(), size, "it was not changed");
    }
    for path in [daemon.dir.path(), Path::new("/dev/null")] {
        let refusal = refusal_of(path, "");
        assert!(refusal.contains("neither a regular file nor a block device"), "{refusal}");
    }
    run("mkfifo", &[daemon.path("fifo").to_str().unwrap()]);
    assert!(refusal_of(&daemon.path("fifo"), "").contains("neither a regular file"));
    let missing = refusal_of(&daemon.path("missing"), "");
    assert!(missing.contains("missing") && missing.contains("No such file"), "{missing}");
}

#[test]
fn a_file_system_without_o_direct_says_so() {
    if !can_mount("a_file_system_without_o_direct_says_so") {
        return;
    }
    let mut daemon = Daemon::place();
    let place = daemon.path("ram");
    std::fs::create_dir(&place).unwrap();
    run("mount", &["-t", "ramfs", "ramfs", place.to_str().unwrap()]);
    let _mount = Unmount(place.clone());
    let image = place.join("vm0.raw");
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let mut other = daemon.beside("e");
    other.arg_disk_at("vm0", &image, "");
    let refusal = other.refused_start();
    assert!(refusal.contains("no O_DIRECT") && refusal.contains("direct=off"), "{refusal}");
    daemon.arg_disk_at("vm0", &image, "direct=off");
    // A disk on a proper file system, with its snapshot where there is no O_DIRECT.
    daemon.make_image("vm1", SIZE);
    daemon.arg_disk("vm1", "");
    daemon.start();
    for disk in ["vm0", "vm1"] {
        daemon.client(disk).write(0..SECTORS, 1);
    }
    daemon.snap("a");
    let there = json!({ "image": place.join("b.img"), "wait": true });
    daemon.api().create("a", &["vm1"], &there).ok();
    for disk in ["vm0", "vm1"] {
        daemon.client(disk).write(3..900, 2);
        assert_eq!(tags(&daemon.content(&format!("{disk}@a"))), vec![1; SECTORS]);
    }
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        // It may be unmounted already.
        crate::harness::command("umount").arg("-l").arg(&self.0).output().ok();
    }
}

/// A loop device on a file, gone when dropped.
struct Loop {
    device: PathBuf,
}

impl Loop {
    fn new(file: &Path, sector_bytes: u32) -> Loop {
        let sector = sector_bytes.to_string();
        Loop { device: run("losetup", &["--find", "--show", "-b", &sector, file.to_str().unwrap()]).into() }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        crate::harness::command("losetup").arg("-d").arg(&self.device).status().ok();
    }
}

/// Random writes of sectors, some smaller than the image's own, on one side; an array on the other.
fn random_writes_with_snapshots(daemon: &mut Daemon, image: &Path, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut client = daemon.client("vm0");
    let mut live = vec![0u64; client.sectors()];
    let mut frozen: Vec<(String, Vec<u64>)> = Vec::new();
    for round in 0..4 {
        for i in 0..40u64 {
            let first = rng.below(live.len() - 40);
            let longest = if rng.chance(70) { 9 } else { 40 };
            let range = first..first + 1 + rng.below(longest);
            let tag = if rng.chance(20) { 0 } else { round * 100 + i + 1 };
            match tag {
                0 => client.zero(range.clone(), rng.chance(50)),
                tag => client.write(range.clone(), tag),
            }
            live[range].fill(tag);
        }
        client.flush();
        let name = format!("s{round}");
        daemon.snap(&name);
        frozen.push((format!("vm0@{name}"), live.clone()));
    }
    client.write(live.len() - 1..live.len(), 9999);
    live[client.sectors() - 1] = 9999;
    let check = |daemon: &Daemon, frozen: &[(String, Vec<u64>)]| {
        for (reference, content) in frozen {
            assert!(tags(&daemon.content(reference)) == *content, "{reference}");
        }
    };
    check(daemon, &frozen);
    drop(client);
    daemon.restart();
    check(daemon, &frozen);
    daemon.delete(&frozen.remove(1).0);
    check(daemon, &frozen);
    frozen.iter().for_each(|(reference, _)| daemon.delete(reference));
    assert_eq!(tags(&daemon.content("vm0")), live);
    daemon.assert_only_disks_left();
    daemon.stop();
    assert_eq!(tags(&std::fs::read(image).unwrap()), live, "the image is the disk");
}

#[test]
fn through_the_page_cache_and_with_large_blocks() {
    for options in ["direct=off", "block-size=64K", "direct=off,block-size=1M"] {
        for size in [SIZE, SIZE + 512] {
            let mut daemon = Daemon::with_disks(&[size], options);
            let image = daemon.image("vm0");
            random_writes_with_snapshots(&mut daemon, &image, seeds(options, 1)[0]);
        }
    }
}

#[test]
fn block_devices_of_either_sector_size() {
    if !can_mount("block_devices_of_either_sector_size") {
        return;
    }
    let rows = [(512, "", 512), (4096, "", 512), (4096, "direct=off", 512), (4096, "logical-block-size=4096", 4096)];
    for (sector_bytes, options, shown) in rows.into_iter().chain([(512, "logical-block-size=4096", 4096)]) {
        let mut daemon = Daemon::place();
        let file = daemon.make_image("backing", SIZE);
        let device = Loop::new(&file, sector_bytes);
        daemon.arg_disk_at("vm0", &device.device, options);
        daemon.start();
        assert_eq!(daemon.show_disk("vm0")["size_bytes"], SIZE);
        assert_eq!(daemon.reader("vm0").request_alignment(), shown, "the guest sees the disk's sectors");
        assert_eq!(daemon.show_disk("vm0")["logical_block_size"], shown);
        let path = device.device.clone();
        random_writes_with_snapshots(&mut daemon, &path, seeds("block devices", 1)[0]);
    }
}

#[test]
fn a_mounted_block_device_is_refused() {
    if !can_mount("a_mounted_block_device_is_refused") {
        return;
    }
    let mut daemon = Daemon::place();
    let file = daemon.make_image("backing", 4 << 20);
    run("mkfs.ext4", &["-q", "-F", file.to_str().unwrap()]);
    let device = Loop::new(&file, 512);
    let place = daemon.path("mounted");
    std::fs::create_dir(&place).unwrap();
    run("mount", &[device.device.to_str().unwrap(), place.to_str().unwrap()]);
    let mounted = Unmount(place.clone());
    daemon.arg_disk_at("vm0", &device.device, "");
    let refusal = daemon.refused_start();
    assert!(refusal.contains("mounted"), "{refusal}");
    run("umount", &[place.to_str().unwrap()]);
    // The kernel lets go of the device a moment after the mount is gone.
    let exclusive = || {
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), libc::O_EXCL).open(&device.device)
    };
    crate::harness::wait_until("the device to be free", || exclusive().is_ok());
    daemon.start();
    // And while it is served, nobody mounts it for writing.
    let mount = crate::harness::command("mount").arg(&device.device).arg(&place).output().unwrap();
    assert!(!mount.status.success(), "a device in use was mounted");
    daemon.stop();
    drop(mounted);
}

#[test]
fn holes_stay_holes() {
    let daemon = Daemon::with_disks(&[4 << 20], "");
    let raw = daemon.image("vm0");
    let mut client = daemon.client("vm0");
    assert_eq!(allocated(&raw), 0);
    client.write(0..1024, 1);
    let used = allocated(&raw);
    daemon.snap("a");
    let image = daemon.snapshot_image("vm0@a");
    assert_eq!(allocated(&image), 0);
    // What was never written is preserved without costing anything.
    client.write(4096..6144, 2);
    assert_eq!(daemon.show("vm0@a")["owned_bytes"], 1 << 20);
    assert_eq!(allocated(&image), 0);
    assert_eq!(tags(&daemon.content("vm0@a"))[4000..6200], [0; 2200]);
    // Zeroing with unmap gives storage back, after the old bytes were kept.
    let before = allocated(&raw);
    client.zero(0..512, true);
    assert!(allocated(&raw) + 200_000 < before, "{} of {before}", allocated(&raw));
    assert_eq!(tags(&client.read(0..1024))[510..514], [0, 0, 1, 1]);
    assert!((200_000..400_000).contains(&allocated(&image)), "{}", allocated(&image));
    let mut expected = vec![0; 8192];
    expected[..1024].fill(1);
    assert_eq!(tags(&daemon.content("vm0@a")), expected);
    // Without unmap the storage stays.
    let before = allocated(&raw);
    client.zero(512..1024, false);
    assert!(allocated(&raw) >= before && before < used + (2 << 20));
    assert_eq!(tags(&client.read(0..1024)), vec![0; 1024]);
    assert_eq!(tags(&daemon.content("vm0@a")), expected);
    // A handover keeps holes, too.
    client.write(0..8, 3);
    daemon.snap("b");
    client.write(6144..8192, 4);
    daemon.snap("c");
    daemon.delete("vm0@b");
    assert_eq!(tags(&daemon.content("vm0@a")), expected);
    assert!(allocated(&image) < (1 << 20) + 100_000);
    daemon.delete("vm0@a");
    daemon.delete("vm0@c");
    daemon.assert_only_disks_left();
}

#[test]
fn discards_wait_for_the_snapshots_that_read_there() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let raw = daemon.image("vm0");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    let full = allocated(&raw);
    // Nobody reads there: at once.
    client.discard(0..256);
    assert!(allocated(&raw) + 100_000 < full);
    assert_eq!(client.tag(0), 0);
    client.write(0..256, 1);
    daemon.snap("a");
    daemon.snap("b");
    let image = daemon.snapshot_image("vm0@b");
    let full = allocated(&raw);
    client.discard(0..1024);
    assert_eq!((allocated(&raw), allocated(&image)), (full, 0), "a discard is never worth a copy");
    for reference in ["vm0@a", "vm0@b"] {
        assert_eq!(tags(&daemon.content(reference)), vec![1; SECTORS]);
    }
    // What is written meanwhile is wanted.
    client.write(512..520, 2);
    daemon.delete("vm0@a");
    assert_eq!(allocated(&raw), full);
    drop(client);
    daemon.restart();
    assert_eq!(tags(&daemon.content("vm0@b")), vec![1; SECTORS]);
    daemon.delete("vm0@b");
    let mut expected = vec![0; 1024];
    expected[512..520].fill(2);
    expected.resize(SECTORS, 1);
    assert_eq!(tags(&daemon.content("vm0")), expected, "the discards are carried out");
    assert!(allocated(&raw) + 400_000 < full, "{} of {full}", allocated(&raw));
    daemon.assert_only_disks_left();
    daemon.stop();
    assert_eq!(tags(&std::fs::read(&raw).unwrap()), expected);
}

#[test]
fn the_command_line_takes_and_shows_a_snapshot() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..8, 1);
    let (image, socket) = (daemon.path("own.img"), daemon.path("own.sock"));
    let place = ["--image", image.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
    let create = [&["--json", "snapshot", "create", "x", "--disk", "vm0", "--wait"], &place[..]].concat();
    let output = daemon.cli(&create);
    assert!(output.status.success(), "{output:?}");
    let snapshot: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&snapshot["state"], &snapshot["owned_bytes"]), (&json!("quiesced"), &json!(0)));
    assert_eq!(snapshot["image"], json!(image));
    let mut reader = crate::client::Client::connect(&socket, 1, true).unwrap();
    assert_eq!((reader.size(), reader.tag(7)), (SIZE, 1));
    drop(reader);
    assert!(daemon.cli(&["snapshot", "delete", "vm0@x", "--force"]).status.success());
    assert!(!image.exists() && !socket.exists());
    let list = daemon.cli(&["--json", "snapshot", "list"]);
    assert_eq!(serde_json::from_slice::<Value>(&list.stdout).unwrap(), json!([]));
}

const _: () = assert!(SECTORS * SECTOR == 1 << 20);
