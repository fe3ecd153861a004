//! Disks that grow under their guests: who is told, what keeps its size, what is refused, and what an end of the daemon at any
//! moment leaves.

use std::io::Read;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::asking::follow_advice;
use crate::changes::keep_bookmark;
use crate::client::tags;
use crate::harness::{Answer, Daemon, wait_until};
use crate::ring::{DATA, Guest, S_IOERR, S_OK, T_OUT};
use crate::strategies::{End, SIZE, end_and_start, shows};

const MORE: u64 = 1 << 20;
const LARGER: u64 = SIZE + MORE;
const SECTORS: usize = (SIZE / 512) as usize;
const MORE_SECTORS: usize = (LARGER / 512) as usize;

fn resize(daemon: &Daemon, size_bytes: u64) -> Answer {
    daemon.send("PUT", "/v1/disks/vm0/size", &json!({ "size_bytes": size_bytes }).to_string())
}

fn size_of(daemon: &Daemon) -> u64 {
    daemon.show_disk("vm0")["size_bytes"].as_u64().unwrap()
}

/// What differs, in sectors.
#[track_caller]
fn diff(daemon: &Daemon, path: &str) -> Vec<(u64, u64)> {
    let answer = daemon.get(path);
    answer.ok();
    let sectors = |range: &Value, key: &str| range[key].as_u64().unwrap() / 512;
    answer.json().as_array().unwrap().iter().map(|r| (sectors(r, "offset"), sectors(r, "length"))).collect()
}

/// A guest with a channel by which it is told what it did not ask for.
fn listening_guest(daemon: &Daemon) -> (Guest, UnixStream) {
    let mut guest = Guest::connect(&daemon.socket("vm0"), 0);
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    guest.frontend.set_mem_table(&[guest.memory.region()]).unwrap();
    ours.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    (guest, ours)
}

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, which asks for no answer.
#[track_caller]
fn is_told(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

/// The capacity in bytes, as a driver reads it.
fn capacity(guest: &mut Guest) -> u64 {
    let (_, config) = guest.frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap();
    u64::from_le_bytes(config[..8].try_into().unwrap()) * 512
}

#[test]
fn a_disk_grows_under_its_guest_and_its_snapshots_do_not() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let events = daemon.events();
    let (mut guest, mut channel) = listening_guest(&daemon);
    assert_eq!(capacity(&mut guest), SIZE);
    guest.add_queue(0, 256);
    guest.start_queue(0, 0);
    let last = SECTORS as u64 - 1;
    guest.write_sectors(last, &[1; 512]);
    daemon.snap("a");
    let write = |guest: &mut Guest, sector: u64, fill: u8| {
        guest.memory.write(DATA, &[fill; 512]);
        guest.run(T_OUT, sector, &[(DATA, 512, 0)]).0
    };
    assert_eq!(write(&mut guest, last + 1, 2), S_IOERR, "there is nothing there yet");

    let done = daemon.cli(&["disk", "resize", "vm0", "--size", "+1M", "--json"]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(serde_json::from_slice::<Value>(&done.stdout).unwrap()["size_bytes"], LARGER);
    is_told(&mut channel);
    assert_eq!(capacity(&mut guest), LARGER);
    let event = events.wait_for("DISK_RESIZED", "vm0");
    assert!(event["reason"].as_str().unwrap().contains(&LARGER.to_string()), "{event}");
    assert_eq!(std::fs::metadata(daemon.image("vm0")).unwrap().len(), LARGER);

    assert_eq!(write(&mut guest, last + 1, 2), S_OK);
    assert_eq!(write(&mut guest, MORE_SECTORS as u64 - 1, 3), S_OK);
    assert_eq!(write(&mut guest, last, 4), S_OK);
    assert_eq!(daemon.show("vm0@a")["size_bytes"], SIZE);
    let frozen = daemon.content("vm0@a");
    assert_eq!((frozen.len() as u64, frozen[last as usize * 512]), (SIZE, 1));
    assert!(daemon.show("vm0@a")["owned_bytes"].as_u64().unwrap() <= 4096, "nothing of the tail is saved for it");
    let tail = (last / 8 * 8, MORE_SECTORS as u64 - last / 8 * 8);
    assert_eq!(diff(&daemon, "/v1/snapshots/vm0@a/diff"), [tail]);

    daemon.snap("b");
    assert_eq!(write(&mut guest, 0, 5), S_OK);
    assert_eq!(
        (daemon.show("vm0@b")["size_bytes"].as_u64(), daemon.content("vm0@b").len() as u64),
        (Some(LARGER), LARGER)
    );
    assert_eq!(diff(&daemon, "/v1/snapshots/vm0@a/diff?to=vm0@b"), [tail]);
    assert_eq!(diff(&daemon, "/v1/snapshots/vm0@b/diff"), [(0, 8)]);
    drop(guest);

    let expected = {
        let mut sectors = vec![0; MORE_SECTORS];
        (sectors[0], sectors[SECTORS - 1], sectors[SECTORS], sectors[MORE_SECTORS - 1]) = (5, 4, 2, 3);
        sectors
    };
    let firsts = |bytes: Vec<u8>| bytes.chunks(512).map(|sector| sector[0]).collect::<Vec<_>>();
    for how in [End::Kill, End::Stop, End::Kill] {
        let told = end_and_start(&mut daemon, how);
        for snapshot in told["disks"][0]["snapshots"].as_array().unwrap() {
            assert_eq!(snapshot["verdict"], "kept", "{told}");
        }
        assert_eq!(size_of(&daemon), LARGER);
        assert_eq!(firsts(daemon.client("vm0").read_all()), expected);
        let older = daemon.content("vm0@a");
        assert_eq!((older.len() as u64, older[last as usize * 512], older[0]), (SIZE, 1, 0));
        assert_eq!(diff(&daemon, "/v1/snapshots/vm0@a/diff?to=vm0@b"), [tail]);
    }
    // The older one goes: a bookmark keeps its size, and what it has of the newer one's blocks is handed on.
    keep_bookmark(&daemon, "vm0@a");
    assert_eq!(daemon.get("/v1/bookmarks/vm0@a").json()["size_bytes"], SIZE);
    assert_eq!(diff(&daemon, "/v1/snapshots/vm0@a/diff?to=vm0@b"), [tail]);
    daemon.delete("vm0@b");
    assert_eq!(firsts(daemon.client("vm0").read_all()), expected);
}

#[test]
fn what_cannot_grow_says_why_and_what_helps() {
    let daemon = Daemon::with_disks(&[SIZE], "");
    for (size, what) in [(SIZE - 4096, "does not shrink"), (0, "at least one sector"), (SIZE + 100, "multiple of 512")]
    {
        let refused = resize(&daemon, size);
        assert_eq!((refused.status, refused.refused().as_str()), (400, "invalid-request"), "{}", refused.body);
        assert!(refused.body.contains(what), "{}", refused.body);
    }
    resize(&daemon, SIZE).ok();
    assert_eq!(size_of(&daemon), SIZE);

    daemon.api().create("log", &["vm0"], &json!({ "strategy": "write-logging", "wait": true })).ok();
    let ask = || resize(&daemon, LARGER);
    assert_eq!(ask().refused(), "unsupported");
    follow_advice(&daemon, &ask);
    assert_eq!(size_of(&daemon), LARGER);

    daemon.snap("a");
    resize(&daemon, LARGER + MORE).ok();
    let refused = daemon.send("POST", "/v1/disks/vm0/restore", r#"{"from":"vm0@a"}"#);
    assert_eq!(refused.refused(), "invalid-request", "{}", refused.body);
    assert!(refused.body.contains(&LARGER.to_string()), "{}", refused.body);
    let volume = json!({ "name": "clone", "from": "vm0@a" }).to_string();
    daemon.send("POST", "/v1/volumes", &volume).ok();
    assert_eq!(daemon.get("/v1/volumes/clone").json()["size_bytes"], LARGER);
    let refused = daemon.send("PUT", "/v1/disks/clone/size", &json!({ "size_bytes": LARGER + MORE }).to_string());
    assert_eq!(refused.refused(), "unsupported", "{}", refused.body);
}

/// What a kill leaves between the image's growth and the record's: the same as somebody leaves who lets the image grow.
#[test]
fn an_image_that_grew_while_nobody_served_it_is_taken_up() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    daemon.snap("a");
    client.write(8..16, 2);
    client.flush();
    drop(client);
    daemon.kill();
    std::fs::File::options().write(true).open(daemon.image("vm0")).unwrap().set_len(LARGER).unwrap();
    let told = serde_json::from_slice::<Value>(&daemon.check(&["--json"]).stdout).unwrap();
    assert_eq!(told["disks"][0]["snapshots"][0]["verdict"], "kept", "{told}");
    daemon.start();
    assert_eq!(size_of(&daemon), LARGER);
    assert_eq!(shows(&daemon, "vm0@a"), vec![1; SECTORS]);
    assert_eq!(diff(&daemon, "/v1/snapshots/vm0@a/diff"), [(8, 8), (SECTORS as u64, MORE / 512)]);
    // A frontend that had read the size before is told at its first ring.
    let (mut guest, mut channel) = listening_guest(&daemon);
    guest.add_queue(0, 256);
    guest.start_queue(0, 0);
    is_told(&mut channel);
    assert_eq!(capacity(&mut guest), LARGER);
    guest.write_sectors(SECTORS as u64, &[7; 512]);
    drop(guest);
    daemon.restart();
    assert_eq!(size_of(&daemon), LARGER);
    assert_eq!(shows(&daemon, "vm0@a"), vec![1; SECTORS], "the growth was recorded");
    // One that became smaller is not the disk.
    daemon.kill();
    std::fs::File::options().write(true).open(daemon.image("vm0")).unwrap().set_len(SIZE).unwrap();
    daemon.start();
    let disk = daemon.show_disk("vm0");
    assert_eq!(disk["state"], "unserved", "{disk}");
    assert!(disk["reason"].as_str().unwrap().contains(&LARGER.to_string()), "{disk}");
}

#[test]
fn a_growth_outlives_a_power_cut_with_what_is_saved_before_it() {
    let mut daemon = Daemon::with_disks(&[SIZE], "durability=power");
    let mut client = daemon.client("vm0");
    client.write(0..SECTORS, 1);
    client.flush();
    daemon.snap("a");
    resize(&daemon, LARGER).ok();
    drop(client);
    wait_until("the frontend to be gone", || daemon.show_disk("vm0")["frontends"] == 0);
    let mut client = daemon.client("vm0");
    client.write(SECTORS - 4..SECTORS + 4, 2);
    client.flush();
    drop(client);
    end_and_start(&mut daemon, End::PowerCut);
    assert_eq!(size_of(&daemon), LARGER);
    assert_eq!(shows(&daemon, "vm0@a"), vec![1; SECTORS]);
    let live = tags(&daemon.client("vm0").read_all());
    assert_eq!((live.len(), &live[SECTORS - 5..SECTORS + 5]), (MORE_SECTORS, &[1, 2, 2, 2, 2, 2, 2, 2, 2, 0][..]));
}
