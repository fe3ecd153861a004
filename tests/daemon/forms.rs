//! What guests and the machine are: sectors, serials, readers of what is deleted, and a kernel without io_uring.

use std::os::unix::process::CommandExt;
use std::process::Stdio;

use serde_json::json;

use crate::client::{Client, tags};
use crate::harness::Daemon;
use crate::ring::{DATA, Guest, T_GET_ID, T_IN, WRITE};

const SIZE: u64 = 4 << 20;

/// Sectors are a property of the disk: remembered, shown, and not changed by a later configuration.
#[test]
fn sectors_stay_what_they_were_said_to_be() {
    let mut daemon = Daemon::with_disks(&[SIZE], "logical-block-size=4096,segments-max=6");
    let shown = |daemon: &Daemon| {
        let disk = daemon.show_disk("vm0");
        (disk["logical_block_size"].clone(), disk["segments_max"].clone(), disk["discard_granularity"].clone())
    };
    assert_eq!(shown(&daemon), (json!(4096), json!(6), json!(32768)));
    assert_eq!(daemon.reader("vm0").request_alignment(), 4096);
    daemon.snap("a");
    assert_eq!(daemon.reader("vm0@a").request_alignment(), 4096, "a snapshot has the sectors of its disk");
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk("vm0", "");
    daemon.start();
    assert_eq!(shown(&daemon).0, 4096);
    daemon.stop();
    daemon.forget_args();
    daemon.arg_disk("vm0", "logical-block-size=512");
    let refusal = daemon.refused_start();
    assert!(refusal.contains("logical block size 4096"), "{refusal}");
}

/// An image of any size in sectors, in memory and not.
#[test]
fn images_of_any_number_of_sectors() {
    for directory in ["/dev/shm", "/var/tmp"] {
        let place = tempfile::tempdir_in(directory).unwrap();
        let image = place.path().join("odd.raw");
        let size = SIZE + 7 * 512;
        std::fs::File::create(&image).unwrap().set_len(size).unwrap();
        let mut daemon = Daemon::place();
        daemon.arg_disk_at("vm0", &image, "");
        daemon.start();
        let mut guest = daemon.client("vm0");
        assert_eq!((guest.size(), guest.request_alignment()), (size, 512));
        let last = guest.sectors() - 1;
        guest.write(last - 2..last + 1, 1);
        daemon.snap("a");
        guest.write(last..last + 1, 2);
        guest.write(0..1, 3);
        assert_eq!(tags(&daemon.content("vm0@a"))[last - 2..], [1, 1, 1]);
        assert_eq!(tags(&guest.read(last - 1..last + 1)), [1, 2]);
        drop(guest);
        daemon.delete("vm0@a");
        daemon.stop();
        assert_eq!(std::fs::metadata(&image).unwrap().len(), size, "the image has another size");
    }
}

/// The disks of a group have snapshots of one name, and long names begin alike.
#[test]
fn serials_of_a_group_differ() {
    let mut daemon = Daemon::with_disks(&[SIZE, SIZE], "");
    daemon.send("POST", "/v1/snapshots", &json!({ "name": "daily", "disks": ["vm0", "vm1"] }).to_string());
    let serial = |socket: &std::path::Path| {
        let mut guest = Guest::new(socket, 1);
        assert_eq!(guest.run(T_GET_ID, 0, &[(DATA, 20, WRITE)]).0, 0);
        String::from_utf8(guest.memory.read(DATA, 20)).unwrap().trim_end_matches('\0').to_owned()
    };
    crate::harness::wait_until("both are quiesced", || {
        ["vm0@daily", "vm1@daily"].iter().all(|s| daemon.show(s)["state"] == "quiesced" && daemon.socket(s).exists())
    });
    let serials: Vec<String> =
        ["vm0", "vm1", "vm0@daily", "vm1@daily"].iter().map(|name| serial(&daemon.socket(name))).collect();
    assert_eq!(serials, ["vm0", "vm1", "vm0@daily", "vm1@daily"]);
    daemon.stop();
}

/// Deleting by force what somebody reads ends that reading with an error.
#[test]
fn a_snapshot_that_is_deleted_under_its_reader_answers_with_errors() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..64, 1);
    daemon.snap("a");
    let mut reader = Guest::new(&daemon.socket("vm0@a"), 1);
    reader.read_sectors(0, 512);
    assert_eq!(daemon.send("DELETE", "/v1/snapshots/vm0@a", "").refused(), "snapshot-busy");
    let answer = daemon.send("DELETE", "/v1/snapshots/vm0@a?force=true", "");
    assert!(answer.status < 300, "{}", answer.status);
    for _ in 0..3 {
        assert_eq!(reader.run(T_IN, 0, &[(DATA, 512, WRITE)]), (1, 1));
    }
    // Another one of the same name is served beside it.
    daemon.snap("a");
    assert_eq!(tags(&daemon.content("vm0@a"))[..64], [1; 64]);
    assert_eq!(reader.run(T_IN, 0, &[(DATA, 512, WRITE)]), (1, 1));
    daemon.stop();
    drop(reader);
    daemon.start();
    let _: Client = daemon.client("vm0");
    // Who still reads what is gone does not keep its disk.
    let mut reader = Guest::new(&daemon.socket("vm0@a"), 1);
    daemon.send("DELETE", "/v1/snapshots/vm0@a?force=true", "").ok();
    daemon.api().wait_gone("vm0@a");
    assert_eq!(reader.run(T_IN, 0, &[(DATA, 512, WRITE)]), (1, 1));
    let image = daemon.image("vm0");
    daemon.send("DELETE", "/v1/disks/vm0", "").ok();
    daemon.send("PUT", "/v1/disks/vm0", &json!({ "path": image }).to_string()).ok();
    drop(reader);
}

/// A filter as that of a container: io_uring_setup is not permitted.
fn forbid_io_uring() -> std::io::Result<()> {
    let step =
        |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap_or(0), jt, jf, k };
    let number = u32::try_from(libc::SYS_io_uring_setup).unwrap_or(0);
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: plain system calls on values that live across them; they change this forked child only.
    let rc = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn without_io_uring_nothing_starts_and_nothing_is_broken() {
    let mut daemon = Daemon::with_disks(&[SIZE], "");
    daemon.client("vm0").write(0..64, 1);
    daemon.snap("a");
    daemon.stop();
    let forbidden = |mut command: std::process::Command| {
        // SAFETY: the filter only makes system calls, and allocates nothing.
        unsafe { command.pre_exec(forbid_io_uring) };
        command.stdin(Stdio::null()).output().unwrap()
    };
    let mut serve = daemon.serve_command();
    serve.stderr(Stdio::piped());
    let refused = forbidden(serve);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("io_uring cannot be used") && said.contains("seccomp"),
        "{said}"
    );
    let mut check = daemon.program();
    check.args(["check", "--state-dir"]).arg(daemon.state_dir()).arg("--run-dir").arg(daemon.run_dir());
    check.stdout(Stdio::piped());
    let checked = forbidden(check);
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(!checked.status.success() && said.contains("io_uring cannot be used"), "{said}");
    daemon.start();
    assert_eq!(daemon.show("vm0@a")["state"], "quiesced");
    assert_eq!(tags(&daemon.content("vm0@a"))[..64], [1; 64]);
}
