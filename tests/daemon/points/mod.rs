//! Source 004's commands and calls one by one (its Tables 1 and 2), each driven over HTTP and judged by what it does.
//!
//! docs/point-in-time.md has the same tables for people. Both must be the same list; what that page says of a line over
//! HTTP must have been sent by its row here, and its commands must exist. The page's examples are run as they stand.

mod identifiers;
mod rows;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::harness::{Answer, Daemon, command, wait_until};
use crate::strategies::{ALL, End, SIZE, end_and_start, shows};

const GUIDE: &str = include_str!("../../../docs/point-in-time.md");
const BLOCK: usize = 4096;
const BLOCKS: usize = SIZE as usize / BLOCK;
const SECTORS: usize = BLOCK / 512;
/// Longer than any test: a job does one block and waits.
const HOURS: u32 = 3_600_000;

type Changes = [(Range<usize>, u64)];
/// Written to the volume `clone`: one block, and a part of one.
const IN_CLONE: &Changes = &[(16..24, 3), (100..101, 4)];
/// Written to its source since it was frozen: parts of two blocks, of which the volume has one, and the last six.
const IN_SOURCE: &Changes = &[(20..30, 5), (2000..2048, 6)];

type Row = (&'static str, fn(&Rig));

/// Table 1.
const COMMANDS: &[Row] = &[
    ("DisableSnap", rows::disable),
    ("EnableNewSnap", rows::enable_fresh),
    ("EnableSnap", rows::enable),
    ("GetSnapActiveConfig", rows::active_configuration),
    ("GetSnapConfig", rows::configuration),
    ("GetSnapStatus", rows::status),
    ("StartCompleteImage", rows::complete),
    ("StartImageUpdate", rows::update),
    ("StartSourceUpdate", rows::restore),
    ("SetCompleteImageDelay", rows::delay_complete),
    ("SetImageUpdateDelay", rows::delay_update),
    ("SetSourceUpdateDelay", rows::delay_restore),
    ("StopCompleteImage", rows::stop_complete),
    ("StopImageUpdate", rows::stop_update),
    ("StopSourceUpdate", rows::stop_restore),
];

/// Table 2.
const CALLS: &[Row] = &[
    ("DcsPITDeviceAbortImageCompletion", rows::stop_complete),
    ("DcsPITDeviceAbortImageUpdate", rows::stop_update),
    ("DcsPITDeviceAbortSourceUpdate", rows::stop_restore),
    ("DcsPITDeviceCloseHandle", identifiers::close_handle),
    ("DcsPITDeviceCreateHandle", identifiers::create_handle),
    ("DcsPITDeviceDelayImageCompletion", rows::delay_complete),
    ("DcsPITDeviceDelayImageUpdate", rows::delay_update),
    ("DcsPITDeviceDelaySourceUpdate", rows::delay_restore),
    ("DcsPITDeviceDisable", rows::disable),
    ("DcsPITDeviceEnable", rows::create),
    ("DcsPITDeviceGetActiveConfigure", rows::active_configuration),
    ("DcsPITDeviceGetActiveMaps", rows::maps),
    ("DcsPITDeviceGetConfigure", rows::configuration),
    ("DcsPITDeviceGetStatus", rows::status),
    ("DcsPITDeviceStartImageCompletion", rows::complete),
    ("DcsPITDeviceStartImageUpdate", rows::update),
    ("DcsPITDeviceStartSourceUpdate", rows::restore),
    ("DcsPMGenerateVolumeID", identifiers::identifiers_are_made),
    ("DcsPMGetSDSVolumeID", identifiers::identifier_of_a_disk),
    ("DcsPMListVolumes", identifiers::identifiers_are_listed),
    ("DcsPMTranslateVolumeID", identifiers::identifiers_are_looked_up),
];

/// A disk `vm0`, its snapshot `daily`, the volume `clone` on that, and what was sent to the daemon.
struct Rig {
    daemon: RefCell<Daemon>,
    sent: RefCell<Vec<(String, String)>>,
}

impl Rig {
    fn new() -> Rig {
        let daemon = Daemon::with_disks(&[SIZE], "");
        daemon.client("vm0").write(ALL, 1);
        daemon.snapshot("daily", &["vm0"]);
        daemon.send("POST", "/v1/volumes", r#"{"name":"clone","from":"vm0@daily"}"#).ok();
        let rig = Rig { daemon: RefCell::new(daemon), sent: RefCell::default() };
        rig.write("clone", IN_CLONE);
        rig.write("vm0", IN_SOURCE);
        rig
    }

    /// Writes, flushes, leaves, and waits until that is noticed.
    #[track_caller]
    fn write(&self, what: &str, changes: &Changes) {
        let daemon = self.daemon.borrow();
        let mut client = daemon.client(what);
        changes.iter().for_each(|(at, tag)| client.write(at.clone(), *tag));
        client.flush();
        drop(client);
        self.wait_left(what);
    }

    /// What a guest reads.
    #[track_caller]
    fn shows(&self, what: &str) -> Vec<u64> {
        let shown = shows(&self.daemon.borrow(), what);
        if !what.contains('@') {
            self.wait_left(what);
        }
        shown
    }

    fn wait_left(&self, what: &str) {
        let daemon = self.daemon.borrow();
        let kind = if what.starts_with("vm") { "disks" } else { "volumes" };
        wait_until("a frontend to be gone", || daemon.get(&format!("/v1/{kind}/{what}")).json()["frontends"] == 0);
    }

    fn send(&self, method: &str, path: &str, body: &str) -> Answer {
        self.sent.borrow_mut().push((method.to_owned(), path.to_owned()));
        self.daemon.borrow().send(method, path, body)
    }

    /// Sends what must work; the answer.
    #[track_caller]
    fn done(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = self.send(method, path, &if body.is_null() { String::new() } else { body.to_string() });
        answer.ok();
        if answer.body.is_empty() { Value::Null } else { answer.json() }
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        self.done("GET", path, &Value::Null)
    }

    #[track_caller]
    fn post(&self, path: &str) -> Value {
        self.done("POST", path, &Value::Null)
    }

    #[track_caller]
    fn clone(&self) -> Value {
        self.get("/v1/volumes/clone")
    }

    fn end(&self, how: End) {
        end_and_start(&mut self.daemon.borrow_mut(), how);
    }

    /// The job that was begun; a restart numbers it anew. What lets go of a snapshot afterwards is not meant.
    #[track_caller]
    fn job(&self) -> Value {
        let jobs = self.get("/v1/jobs");
        let jobs: Vec<_> = jobs.as_array().unwrap().iter().filter(|job| job["kind"] != "merge").collect();
        assert_eq!(jobs.len(), 1, "{jobs:?}");
        jobs[0].clone()
    }

    #[track_caller]
    fn pace(&self, delay_ms: u32) -> Value {
        self.done("PATCH", &format!("/v1/jobs/{}", self.job()["id"]), &json!({ "delay_ms": delay_ms }))
    }

    #[track_caller]
    fn wait_done(&self) {
        wait_until("a job to be done", || {
            let job = self.job();
            assert!(job["state"] == "running" || job["state"] == "done", "{job}");
            job["state"] == "done"
        });
    }

    #[track_caller]
    fn begin_restore(&self, delay_ms: u32) -> Value {
        let job = self.done("POST", "/v1/disks/vm0/restore", &json!({ "from": "clone", "delay_ms": delay_ms }));
        assert_eq!((&job["kind"], &job["disk"]), (&json!("restore"), &json!("vm0")));
        job
    }

    /// What the source still lacks of what it is restored to.
    fn pending(&self) -> Value {
        self.get("/v1/disks/vm0")["restoring"]["remaining_bytes"].clone()
    }
}

/// All sectors of a disk that was full of 1.
fn content(changes: &Changes) -> Vec<u64> {
    let mut all = vec![1; ALL.end];
    changes.iter().for_each(|(at, tag)| all[at.clone()].fill(*tag));
    all
}

fn blocks_of(changes: &Changes) -> BTreeSet<usize> {
    changes.iter().flat_map(|(at, _)| at.start / SECTORS..at.end.div_ceil(SECTORS)).collect()
}

/// Blocks that were written in either.
fn differing() -> usize {
    blocks_of(IN_CLONE).union(&blocks_of(IN_SOURCE)).count()
}

fn bits(runs: &Value) -> BTreeSet<usize> {
    let number = |v: &Value| usize::try_from(v.as_u64().unwrap()).unwrap();
    runs.as_array().unwrap().iter().flat_map(|r| number(&r[0])..number(&r[0]) + number(&r[1])).collect()
}

/// What the guide has in its tables: the command of the source, ours, ours over HTTP.
fn lines_of(table: &str) -> Vec<(String, Vec<String>, Vec<String>)> {
    let part = GUIDE.split("\n### ").find(|part| part.starts_with(table)).unwrap();
    let spans = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let rows = part.lines().filter(|line| line.starts_with("| `"));
    rows.map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
        assert_eq!(cells.len(), 4, "{line}");
        (spans(cells[0]).remove(0), spans(cells[1]), spans(cells[2]))
    })
    .collect()
}

/// Whether a request is one that the guide names, such as `PATCH /v1/jobs/{id}` or `POST /v1/x?delay_ms=MS`.
fn is_named((method, path): &(String, String), named: &str) -> bool {
    let (method_named, named) = named.split_once(' ').unwrap();
    let (named, query_named) = named.split_once('?').unwrap_or((named, ""));
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let same = |(a, b): (&str, &str)| a == b || b.starts_with('{');
    let is_query = match query_named.strip_suffix("=MS") {
        Some(key) => query.strip_prefix(key).is_some_and(|value| value.starts_with('=')),
        None => query == query_named,
    };
    method == method_named
        && is_query
        && path.split('/').count() == named.split('/').count()
        && path.split('/').zip(named.split('/')).all(same)
}

/// `volume enable NAME --fresh` is a command with that option.
#[track_caller]
fn is_a_command(line: &str) {
    let words = line.split(' ').take_while(|word| word.chars().all(|c| c.is_ascii_lowercase()));
    let output = command(env!("CARGO_BIN_EXE_halfsilver")).args(words).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && help.contains("Usage: "), "{line}");
    for option in line.split(' ').filter(|word| word.starts_with("--")) {
        assert!(help.split_whitespace().any(|word| word == option), "{line}: {help}");
    }
}

#[track_caller]
fn drive(table: &str, rows: &[Row]) {
    let lines = lines_of(table);
    let (told, driven): (Vec<_>, Vec<_>) =
        (lines.iter().map(|(name, ..)| name).collect(), rows.iter().map(|r| r.0).collect());
    assert_eq!(told, driven, "the guide and this test have the same lines in the same order");
    for ((name, ours, over_http), (_, row)) in lines.iter().zip(rows) {
        println!("{name}");
        let rig = Rig::new();
        row(&rig);
        for named in over_http {
            assert!(rig.sent.borrow().iter().any(|sent| is_named(sent, named)), "{name} has not sent {named}");
        }
        assert!(!over_http.is_empty(), "{name} is not there over HTTP");
        ours.iter().for_each(|line| is_a_command(line));
    }
}

#[test]
fn each_command_of_table_1_does_what_it_should() {
    drive("Table 1", COMMANDS);
}

#[test]
fn each_call_of_table_2_does_what_it_should() {
    drive("Table 2", CALLS);
}

/// The guide's examples, in its order and in one shell.
#[test]
fn the_guides_examples_run_as_they_stand() {
    let mut daemon = Daemon::place();
    daemon.make_image("vm1", SIZE);
    daemon.arg_disk("vm1", "");
    daemon.start();
    daemon.client("vm1").write(ALL, 1);
    let blocks: Vec<_> = GUIDE.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() > 5);
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_halfsilver")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let mut shell = command("sh");
    shell.args(["-e", "-x", "-c", &blocks.concat()]).current_dir(daemon.path("")).stdin(Stdio::null());
    shell.env("PATH", path).env("HALFSILVER_CONTROL", daemon.run_dir().join("control.sock"));
    let output = shell.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for kind in ["snapshots", "volumes", "bookmarks"] {
        assert_eq!(daemon.get(&format!("/v1/{kind}")).json(), json!([]), "nothing is left");
    }
    assert_eq!(shows(&daemon, "vm1"), vec![1; ALL.end]);
    assert_eq!(shows(&daemon, "copy"), vec![1; ALL.end]);
}
