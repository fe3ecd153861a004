//! The command line, through the binary: shapes of the output, exit statuses, one line an error.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use halfsilver::control::api::{JobState, LegState, SnapshotState, Strategy};
use halfsilver::control::{EventKind, Service};
use serde_json::{Value, json};

use crate::fake::name;
use crate::rig::{Rig, dead_socket};

fn halfsilver() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfsilver"));
    command.env_remove("HALFSILVER_CONTROL").env_remove("XDG_RUNTIME_DIR").stdin(Stdio::null());
    command
}

impl Rig {
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = halfsilver();
        command.env("HALFSILVER_CONTROL", &self.path).current_dir(self.directory.path()).args(line.split_whitespace());
        command
    }

    pub(crate) fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Runs a command that must work, and returns what it printed.
    #[track_caller]
    pub(crate) fn done(&self, line: &str) -> String {
        let output = self.run(line);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{line}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub(crate) fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.done(line)).unwrap()
    }

    /// Runs a command that must be refused, and returns its one line.
    #[track_caller]
    pub(crate) fn fails(&self, line: &str) -> String {
        one_line(&self.run(line))
    }
}

#[track_caller]
pub(crate) fn one_line(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("halfsilver: ") && stderr.ends_with('\n') && stderr.lines().count() == 1, "{stderr:?}");
    stderr
}

#[test]
fn lists_are_arrays_and_the_rest_are_objects() {
    let rig = Rig::new();
    for line in ["--json disk list", "snapshot --json list", "volume list --json", "job list --json"] {
        assert_eq!(rig.done(line), "[]\n");
    }
    let disk = rig.json("disk add name=vm1,path=vm1.raw,queues=2 --json");
    assert_eq!(disk["path"], rig.directory.path().join("vm1.raw").to_str().unwrap());
    assert_eq!(rig.json("disk add vm1 --path vm1.raw --queues 2 --json"), disk);
    assert_eq!(rig.json("disk show vm1 --json"), disk);
    assert_eq!(rig.json("disk list --json"), json!([disk]));
    let other = rig.json("disk add vm2 --path /vm2.raw --readonly --direct off --block-size 64K --serial S --json");
    assert_eq!((&other["readonly"], &other["direct"], &other["serial"]), (&json!(true), &json!(false), &json!("S")));
    assert_eq!(other["block_size"], 65_536);

    let one = rig.json("--json snapshot create daily --disk vm1 --image own.img --strategy copy-on-write");
    assert_eq!((&one["disk"], &one["state"]), (&json!("vm1"), &json!("draining")));
    assert_eq!(one["image"], rig.directory.path().join("own.img").to_str().unwrap());
    let both = rig.json("snapshot create weekly --disk vm1 --disk vm2 --writers request --json");
    assert_eq!((&both[0]["disk"], &both[1]["disk"]), (&json!("vm1"), &json!("vm2")));
    assert_eq!(rig.json("snapshot list --json").as_array().unwrap().len(), 3);
    assert_eq!(rig.json("snapshot show vm1@daily --json"), one);
    let volume = rig.json("volume create --json clone --from vm1@daily --image clone.img");
    assert_eq!(
        (&volume["name"], &volume["from"], &volume["from_id"]),
        (&json!("clone"), &json!("vm1@daily"), &one["id"])
    );
    assert_eq!(volume["image"], rig.directory.path().join("clone.img").to_str().unwrap());
    assert_eq!(rig.json("volume show clone --json"), volume);
    assert_eq!(rig.json("volume list --json"), json!([volume]));
    assert_eq!(rig.json("volume create now --from vm2 --json")["from"], "vm2@now");
    assert_eq!(rig.json("status --json")["volumes"][0], volume);
    assert_eq!(rig.json("volume delete clone --json"), json!({ "name": "clone", "state": "deleted" }));
    let gone = rig.json("snapshot delete vm1@daily --force --json");
    assert_eq!(gone, json!({ "disk": "vm1", "name": "daily", "state": "deleted" }));
    assert_eq!(rig.json("disk remove vm1 --force --json"), json!({ "name": "vm1", "state": "removed" }));

    rig.fake.add_job(7);
    assert_eq!(rig.json("job list --json")[0]["id"], 7);
    assert_eq!(rig.json("job set 7 --delay-ms 20 --json")["delay_ms"], 20);
    assert_eq!(rig.json("job show 7 --json")["delay_ms"], 20);
    let stopped = rig.json("job stop 7 --json");
    assert_eq!((&stopped["id"], &stopped["state"]), (&json!(7), &json!("stopped")));
    assert_eq!(rig.json("job resume 7 --json")["state"], "running");
    rig.fake.set_job(7, JobState::Done, None);
    assert_eq!(rig.json("job wait 7 --json")["state"], "done");
    assert_eq!(rig.json("job stop 7 --json"), json!({ "id": 7, "state": "removed" }));
    let status = rig.json("status --json");
    assert_eq!((&status["state"], &status["disks"][0]["name"]), (&json!("serving"), &json!("vm2")));
}

#[test]
fn people_see_aligned_tables() {
    let rig = Rig::with_snapshot("copy-on-write");
    rig.fake.add_job(1);
    let disks = rig.done("disk list");
    let mut lines = disks.lines();
    assert_eq!(lines.next(), Some("DISK  STATE    SIZE     FRONTENDS  SNAPSHOTS  SOCKET"));
    assert_eq!(lines.next(), Some("vm1   serving  1.0 GiB  0          0          /run/fake/vm1.sock"));
    assert!(rig.done("job list").contains("1.0 MiB  12.3 MiB  8%       1 min 30 s  5 ms"));
    let job = rig.done("job show 1");
    assert!(job.contains("percent    8%\n") && job.contains("left       1 min 30 s\n"), "{job}");
    assert!(rig.done("snapshot list").contains("vm1@daily  draining  copy-on-write"));
    assert!(rig.done("snapshot show vm1@daily").contains("quiesced       -\n"));
    assert!(rig.done("snapshot show vm1@daily").contains("old frontends  0\n"));
    let disk = rig.done("disk show vm1");
    assert!(disk.contains("block size  4.0 KiB\n") && disk.contains("shared      false\n"), "{disk}");
    assert!(!disk.contains("LEG"));
    let status = rig.done("status");
    assert!(status.starts_with("halfsilver ") && status.contains("vm1@daily") && status.contains("fold"), "{status}");
}

#[test]
fn control_before_or_after() {
    let rig = Rig::with_disks();
    for arguments in [
        ["--control", "@", "disk", "list"],
        ["disk", "--control", "@", "list"],
        ["disk", "list", "--control", "@"],
        ["disk", "list", "--json", "--control=@"],
    ] {
        let arguments = arguments.map(|argument| argument.replace('@', rig.path.to_str().unwrap()));
        // The option beats the environment.
        let output = halfsilver().args(&arguments).env("HALFSILVER_CONTROL", "/no/such").output().unwrap();
        assert!(output.status.success(), "{arguments:?}");
    }
    let relative = rig.command("status --control control.sock").env_remove("HALFSILVER_CONTROL").output().unwrap();
    assert!(relative.status.success());
}

#[test]
fn refusals_are_one_line_and_status_1() {
    let rig = Rig::with_snapshot("write-logging");
    rig.fake.forbid(Strategy::WriteLogging);
    for (line, text) in [
        ("disk show vm9", "there is no disk vm9; "),
        ("disk remove vm1", "disk vm1 has snapshots; "),
        ("disk add vm1 --path /other", "configured differently; "),
        ("snapshot show vm1@x", "there is no snapshot vm1@x; "),
        ("snapshot delete vm1@daily", "is draining; "),
        ("snapshot create daily --disk vm1", "snapshot vm1@daily exists; "),
        ("snapshot create daily --disk vm1 --disk vm9", "; "),
        ("snapshot create a --disk vm1 --strategy write-logging", "not supported; "),
        ("snapshot create a --disk vm1 --strategy write-mirroring", "add one: halfsilver disk mirror vm1 PATH"),
        ("snapshot delete vm1@daily --keep-image --force", "is write-logging, so its image alone is not its content; "),
        ("snapshot cutover vm1@x", "there is no snapshot vm1@x; "),
        ("disk mirror vm9 b.raw", "there is no disk vm9; "),
        ("disk restore vm9 --from vm9@daily", "there is no disk vm9; "),
        ("disk restore vm1 --from vm1@x", "there is no snapshot vm1@x; "),
        ("disk unmirror vm1", "disk vm1 has no second leg; add one: halfsilver disk mirror vm1 PATH"),
        ("job resume 1", "there is no job 1; "),
        ("job wait 1", "there is no job 1; "),
        ("job show 1", "there is no job 1; "),
        ("job set 1 --delay-ms 1", "there is no job 1; "),
        ("serve --config no/such.toml", "cannot read "),
        ("serve --disk name=a,path=b,socket=s --disk name=c,path=d,socket=s", "disk a and disk c share "),
        ("status --control /no/such.sock", "no daemon answers at /no/such.sock "),
    ] {
        let stderr = rig.fails(line);
        assert!(stderr.contains(text), "{line}: {stderr}");
    }
}

/// Whoever finds out, the form is one: what is wrong, and the usage of the command that was asked for.
#[test]
fn usage_errors_have_one_form() {
    let rig = Rig::with_disks();
    for (line, command, text) in [
        ("disk show", "disk show", "required arguments"),
        ("disk set vm1", "disk set", "give one or more of --durability, --layout, "),
        ("volume set clone", "volume set", "give one or more of --durability, --layout, "),
        ("job set 1", "job set", "give one or more of --delay-ms, --limit"),
        ("snapshot create daily --disk vm1 --disk vm1", "snapshot create", "vm1 is named twice"),
        ("disk set vm1 --queues 2 --serial 123456789012345678901", "disk set", "is not 1 to 20 characters long"),
    ] {
        let output = rig.run(line);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(text), "{line}: {stderr}");
        assert!(stderr.contains(&format!("Usage: halfsilver {command} ")), "{line}: {stderr}");
        assert!(!stderr.contains("/v1/"), "it speaks of HTTP: {line}: {stderr}");
    }
    assert!(!String::from_utf8(rig.run("volume set clone").stderr).unwrap().contains("--readonly"));
}

#[test]
fn usage_is_status_2() {
    let rig = Rig::with_disks();
    for line in [
        "",
        "nonsense",
        "disk",
        "disk show",
        "disk show ..",
        "disk show VM1",
        "disk add vm3",
        "disk add path=x",
        "disk add name=vm3,path=x,size=1",
        "disk add name=vm3,path=x --path y",
        "disk add vm3 --path x --queues 17",
        "disk add vm3 --path x --mirror x",
        "disk add vm3 --path x --mirror y --readonly",
        "disk add vm3 --path x --shared=maybe",
        "disk mirror vm1",
        "disk restore vm1",
        "disk restore vm1 --from vm1@",
        "disk restore vm1 --from clone --delay-ms 3600001",
        "disk unmirror",
        "snapshot cutover vm1",
        "job resume",
        "job wait x",
        "serve --disk name=a,path=b,mirror=",
        "snapshot create daily",
        "snapshot create ../x --disk vm1",
        "snapshot create daily --disk vm1 --disk vm1",
        "snapshot create daily --disk vm1 --strategy cow",
        "snapshot create daily --disk vm1 --disk vm2 --socket s",
        "snapshot create daily --disk vm1 --disk vm2 --image i",
        "snapshot show vm1",
        "snapshot delete vm1@..",
        "job set 1",
        "job set 1 --delay-ms 3600001",
        "job show x",
        "serve --disk name=a",
        "serve --disk path=a,nmae=b",
        "serve --disk name=a,path=b --disk name=a,path=c",
        "serve --frobnicate",
        "completions tcl",
    ] {
        let output = rig.run(line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{line}");
    }
    assert_eq!(rig.json("snapshot list --json"), json!([]));
}

#[test]
fn without_a_daemon_status_says_where_it_looked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let status = |path: &Path| one_line(&halfsilver().args(["status", "--control"]).arg(path).output().unwrap());
    for stderr in [status(&path), {
        dead_socket(&path);
        status(&path)
    }] {
        assert!(stderr.contains(path.to_str().unwrap()) && stderr.contains("halfsilver serve"), "{stderr}");
    }
    // Something that is no halfsilver.
    let path = directory.path().join("other.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || drop(listener.accept().unwrap()));
    assert!(status(&path).contains("broke off"));
    other.join().unwrap();
}

#[test]
fn waiting_for_quiescence() {
    let rig = Rig::with_disks();
    let wait = |line: &str, state: SnapshotState, kind: EventKind| {
        let child = rig.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        while !rig.fake.has("vm1@daily") {
            std::thread::sleep(Duration::from_millis(5));
        }
        rig.fake.move_to("vm1@daily", state, kind);
        child.wait_with_output().unwrap()
    };
    let line = "snapshot create daily --disk vm1 --wait --json";
    let output = wait(line, SnapshotState::Quiesced, EventKind::SnapshotQuiesced);
    assert!(output.status.success() && output.stderr.is_empty());
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["state"], "quiesced");

    rig.fake.forget("vm1@daily");
    let output = wait(line, SnapshotState::Broken, EventKind::SnapshotBroken);
    assert!(one_line(&output).contains("vm1@daily is broken: no space\\nleft; "));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["state"], "broken");
}

#[test]
fn waiting_for_a_deletion() {
    let rig = Rig::with_snapshot("write-logging");
    rig.fake.quiesce("vm1@daily");
    assert_eq!(rig.json("snapshot delete vm1@daily --json")["state"], "folding");
    assert_eq!(rig.done("snapshot delete vm1@daily"), "vm1@daily folding\n");
    rig.fake.quiesce("vm1@daily");
    let child = rig.command("snapshot delete vm1@daily --wait").stdout(Stdio::piped()).spawn().unwrap();
    while rig.fake.get_snapshot(&"vm1@daily".parse().unwrap()).unwrap().state != SnapshotState::Folding {
        std::thread::sleep(Duration::from_millis(5));
    }
    rig.fake.forget("vm1@daily");
    assert_eq!(String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap(), "vm1@daily deleted\n");
}

#[test]
fn waiting_for_a_deletion_shows_its_job() {
    let rig = Rig::with_snapshot("write-logging");
    rig.fake.quiesce("vm1@daily");
    rig.fake.add_job(3);
    let line = "snapshot delete vm1@daily --wait";
    let child = rig.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    rig.fake.set_job(3, JobState::Stopped, None);
    let stderr = one_line(&child.wait_with_output().unwrap());
    assert!(stderr.contains("job 3 is stopped; resume it: halfsilver job resume 3"), "{stderr}");
}

#[test]
fn waiting_for_a_job() {
    let rig = Rig::with_snapshot("copy-on-write");
    rig.fake.add_job(3);
    for (state, reason) in [(JobState::Done, None), (JobState::Failed, Some("I/O\nerror")), (JobState::Stopped, None)] {
        rig.fake.set_job(3, JobState::Running, None);
        let command = &mut rig.command("job wait 3 --json");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(child.try_wait().unwrap().is_none());
        rig.fake.set_job(3, state, reason);
        let output = child.wait_with_output().unwrap();
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&job["state"], job["reason"].as_str()), (&json!(state), reason));
        match state {
            JobState::Done => assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..])),
            JobState::Failed => assert!(one_line(&output).contains("job 3 failed: I/O\\nerror; ")),
            _ => assert!(one_line(&output).contains("resume it: halfsilver job resume 3")),
        }
    }
    assert!(rig.fails("job stop 3").contains("job 3 is stopped and still has work to do; resume it"));
    assert!(rig.done("job resume 3").contains("running"));
    rig.fake.set_job(3, JobState::Done, None);
    assert!(rig.fails("job resume 3").contains("job 3 is done, so there is nothing to resume or stop; "));
    assert_eq!(rig.done("job stop 3"), "job 3 had ended, and is off the list\n");
}

#[test]
fn a_disk_with_two_legs() {
    let rig = Rig::with_disks();
    let both = rig.json("disk add vm3 --path a.raw --mirror b.raw --shared --json");
    assert_eq!(both["legs"][1]["path"], rig.directory.path().join("b.raw").to_str().unwrap());
    assert_eq!(both["shared"], true);
    assert_eq!(rig.json("disk add name=vm3,path=a.raw,mirror=b.raw,shared=on --json"), both);

    assert_eq!(rig.json("disk mirror vm1 b&=%.raw --json")["legs"][1]["state"], "resynchronising");
    let shown = rig.done("disk show vm1");
    assert!(shown.contains("/b&=%.raw") && shown.contains("resynchronising  1.0 GiB"), "{shown}");
    let status = rig.done("status");
    assert!(status.contains("REMAINING  REASON\nvm1 ") && !status.contains("a.raw"), "{status}");
    assert!(status.contains("mirror  vm1"), "{status}");

    let wait = |state: LegState| {
        let mut command = rig.command("disk mirror vm1 b&=%.raw --wait --json");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(child.try_wait().unwrap().is_none());
        rig.fake.set_second_leg("vm1", state);
        child.wait_with_output().unwrap()
    };
    assert!(one_line(&wait(LegState::Failed)).contains("b&=%.raw of disk vm1 is failed: I/O error; "));
    assert!(rig.done("status").contains("failed  768.0 MiB  I/O error"));
    let output = wait(LegState::InSync);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["legs"][1]["state"], "in-sync");
    assert!(!rig.done("status").contains("LEG"));

    assert!(rig.fails("disk unmirror vm1 --leg c.raw").contains("is no leg of vm1; "));
    assert_eq!(rig.json("disk unmirror vm1 --leg b&=%.raw --json")["legs"], json!([]));
    assert_eq!(rig.json("disk unmirror vm3 --json")["path"], both["path"]);
}

#[test]
fn a_disk_is_restored() {
    let rig = Rig::with_disks();
    rig.done("snapshot create daily --disk vm1");
    let job = rig.json("disk restore vm1 --from vm1@daily --force --delay-ms 5 --json");
    assert_eq!((&job["kind"], &job["disk"], &job["id"]), (&json!("restore"), &json!("vm1"), &json!(10)));
    let shown = rig.done("disk show vm1");
    assert!(shown.contains("RESTORED FROM  REMAINING\nvm1@daily "), "{shown}");
    rig.fake.set_job(10, JobState::Failed, Some("I/O error"));
    assert!(rig.fails("job wait 10").contains("I/O error"));
}

#[test]
fn old_frontends_are_moved_over() {
    let rig = Rig::with_disks();
    let created = rig.done("snapshot create daily --disk vm1 --writers connection");
    assert!(created.contains("old frontends  2\n"), "{created}");
    assert_eq!(rig.json("snapshot cutover vm1@daily --json")["old_frontends"], 0);
    rig.fake.quiesce("vm1@daily");
    assert!(rig.done("snapshot cutover vm1@daily --wait").contains("quiesced"));
    rig.fake.move_to("vm1@daily", SnapshotState::Broken, EventKind::SnapshotBroken);
    assert!(rig.fails("snapshot cutover vm1@daily").contains("snapshot vm1@daily is broken; "));
}

#[test]
fn a_kept_image_is_said_to_be_kept() {
    let rig = Rig::with_disks();
    assert!(rig.done("disk add vm3 --path a.raw --mirror b.raw").contains("in-sync"));
    for (options, said) in [("", "vm3@daily deleted\n"), (" --keep-image", "vm3@daily deleted, its image is kept\n")] {
        assert!(rig.done("snapshot create daily --disk vm3 --strategy write-mirroring").contains("draining"));
        rig.fake.quiesce("vm3@daily");
        assert_eq!(rig.done(&format!("snapshot delete vm3@daily{options}")), said);
    }
}

#[test]
fn events_are_one_object_a_line() {
    let rig = Rig::with_snapshot("copy-on-write");
    let mut child = rig.command("events --json").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Nothing tells from outside when the stream is open, so the event is repeated until it is seen.
    let fake = std::sync::Arc::clone(&rig.fake);
    let (seen, wait) = std::sync::mpsc::channel::<()>();
    let publisher = std::thread::spawn(move || {
        while wait.recv_timeout(Duration::from_millis(20)).is_err() {
            fake.quiesce("vm1@daily");
        }
    });
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    seen.send(()).unwrap();
    publisher.join().unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&event["event"], &event["snapshot"]), (&json!("SNAPSHOT_QUIESCED"), &json!("daily")));
    // With its reader gone it ends quietly at the next event.
    rig.fake.quiesce("vm1@daily");
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn events_end_with_the_daemon() {
    let rig = Rig::new();
    let path = rig.path.display().to_string();
    let child = rig.command("events").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    rig.server.shutdown();
    let stderr = one_line(&child.wait_with_output().unwrap());
    // Usually "stopped"; "no daemon answers" if this machine was too slow to start it in time.
    assert!(stderr.contains(&path), "{stderr}");
}

#[test]
fn status_is_watched_until_the_reader_leaves() {
    let rig = Rig::with_disks();
    let mut child = rig.command("status --watch --json").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let status: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(status["state"], "serving");
    }
    drop(lines);
    assert!(child.wait().unwrap().success());
}

#[test]
fn completions_and_manual_pages() {
    let rig = Rig::new();
    for shell in ["bash", "zsh", "fish"] {
        let text = rig.done(&format!("completions {shell}"));
        assert!(text.contains("snapshot") && text.contains("write-mirroring"), "{shell}");
    }
    assert!(rig.done("man").contains(".TH halfsilver 1"));
    assert_eq!(rig.done("man --dir pages/man1"), "");
    for page in ["halfsilver.1", "halfsilver-serve.1", "halfsilver-snapshot-create.1", "halfsilver-job-set.1"] {
        assert!(rig.directory.path().join("pages/man1").join(page).exists(), "{page}");
    }
    assert!(rig.done("--version").contains(env!("CARGO_PKG_VERSION")));
    assert!(rig.done("serve --help").contains("--state-dir"));
    for (line, text) in [
        ("serve --help", "mirror=other.raw"),
        ("serve --help", "--strict"),
        ("disk set --help", "queues, readonly and serial for the next frontend"),
        ("disk forget --help", "a disk's image stays"),
        ("snapshot delete --help", "none of them is"),
        ("job wait --help", "--wait-timeout <SECONDS|5m>"),
        ("volume list --help", "--after <LAST>"),
        ("disk mirror --help", "replace the failed one"),
        ("disk restore --help", "it shows that at once"),
        ("disk unmirror --help", "stays as a plain raw image"),
        ("snapshot cutover --help", "without a reconnect"),
        ("snapshot delete --help", "--keep-image"),
        ("job stop --help", "taken off the list"),
        ("job resume --help", "stopped job"),
        ("job wait --help", "fails if it fails or is stopped"),
    ] {
        assert!(rig.done(line).split_whitespace().collect::<Vec<_>>().join(" ").contains(text), "{line}");
    }
}

#[test]
fn a_closed_stdout_is_no_error() {
    let rig = Rig::with_disks();
    for line in ["disk list", "status --json", "completions bash", "man"] {
        let mut child = rig.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{line}");
    }
    assert!(rig.fake.get_disk(&name("vm1")).is_ok());
}

#[test]
fn volumes_are_shown_and_refused_in_one_line() {
    let rig = Rig::with_snapshot("copy-on-write");
    let page = rig.done("volume create clone --from vm1@daily");
    assert!(page.contains("from         vm1@daily\n") && page.contains("state        serving\n"), "{page}");
    let list = rig.done("volume list");
    assert_eq!(list.lines().next(), Some("VOLUME  STATE    FROM       OWNED  SIZE     FRONTENDS  SOCKET"));
    assert!(rig.done("status").contains("clone   serving  vm1@daily"));
    assert!(rig.fails("volume create clone --from vm1").contains("volume clone exists; delete it first"));
    assert!(rig.fails("volume show none").contains("there is no volume none"));
    assert!(rig.fails("volume create x --from vm1@none").contains("there is no snapshot vm1@none"));
    assert!(rig.fails("volume promote clone").contains("volume clone stands on snapshot vm1@daily"));
    assert!(rig.fails("volume enable clone --fresh").contains("it is served"));
    assert!(rig.done("volume disable clone").contains("state        disabled\n"));
    assert!(rig.done("volume enable clone --fresh").contains("state        serving\n"));
    let job = rig.json("volume complete clone --delay-ms 7 --limit 2M --json");
    assert_eq!(
        (&job["kind"], &job["delay_ms"], &job["bytes_per_second"]),
        (&json!("migrate"), &json!(7), &json!(2 << 20))
    );
    assert!(rig.done("job set 11 --limit 0").contains("limit      -\n"));
    assert_eq!(rig.done("volume delete clone"), "clone deleted\n");
    for line in [
        "volume create clone",
        "volume create A --from vm1",
        "volume create clone --from vm1@",
        "volume",
        "volume enable",
        "job set 11",
        "job set 11 --limit 3X",
    ] {
        assert_eq!(rig.run(line).status.code(), Some(2), "{line}");
    }
}
