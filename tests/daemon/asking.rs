//! Asking the daemon with a bound, and doing what its refusals advise.
//!
//! What always holds: a question that is not answered in time fails its test and holds nothing up; advice is carried out
//! as it stands, by the command line, and nothing is known here of what it means.

use std::process::{Output, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Answer, Daemon, PATIENCE, command, wait_until};

/// How many pieces of advice may follow on each other before a command succeeds.
const ADVICE_MAX: usize = 20;

/// The answer, and how long it took; None if there is none in time. Then the call is left to itself.
pub(crate) fn ask_within(
    daemon: &Daemon,
    (method, path, body): (&str, &str, &str),
    bound: Duration,
) -> Option<(Answer, Duration)> {
    let (api, (tell, told)) = (daemon.api(), channel());
    let (method, path, body) = (method.to_owned(), path.to_owned(), body.to_owned());
    let began = Instant::now();
    std::thread::spawn(move || tell.send(api.send(&method, &path, &body)).ok());
    told.recv_timeout(bound).ok().map(|answer| (answer, began.elapsed()))
}

/// The command line. None if it has not ended in time; then it is ended.
pub(crate) fn cli_within(daemon: &Daemon, args: &[&str], bound: Duration) -> Option<Output> {
    let mut command = command(env!("CARGO_BIN_EXE_halfsilver"));
    command.arg("--control").arg(daemon.run_dir().join("control.sock")).args(args);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + bound;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() >= deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(child.wait_with_output().unwrap())
}

/// The sentence that the command line made of a refusal: the command must end with 1 and one line.
#[track_caller]
pub(crate) fn refused_by_cli(daemon: &Daemon, args: &[&str]) -> String {
    let output = cli_within(daemon, args, *PATIENCE).unwrap_or_else(|| panic!("{args:?} does not end"));
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{args:?}: {told}");
    told
}

/// The commands that a sentence advises, without the program's name. Advice for which the reader must think of a name (it
/// is in capitals) is none.
pub(crate) fn advised(sentence: &str) -> Vec<Vec<String>> {
    let rest = sentence.split("halfsilver ").skip(1);
    let commands = rest.map(|rest| rest.split([';', ')', '\'', ',', '"', '\n']).next().unwrap_or_default());
    let words = commands.map(|command| command.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    let is_name = |word: &String| word.chars().all(|c| c.is_ascii_uppercase());
    words.filter(|words| words.len() > 1 && !words.iter().any(is_name)).collect()
}

/// Whether a command of the advice changes something, or lets time pass; others only show.
#[expect(clippy::ptr_arg, reason = "a predicate of iterators over them")]
fn helps(words: &Vec<String>) -> bool {
    !["show", "list", "status"].iter().any(|shows| words.iter().any(|word| word == shows))
}

/// Takes every pause out of every job, so that what is waited for comes.
pub(crate) fn lift_paces(daemon: &Daemon) {
    for job in daemon.get("/v1/jobs").json().as_array().unwrap() {
        daemon.send("PATCH", &format!("/v1/jobs/{}", job["id"]), r#"{"delay_ms":0,"bytes_per_second":0}"#);
    }
}

/// Whether a refusal is because of a frontend. One that has just left is not forgotten at once.
pub(crate) fn lingers(answer: &Answer) -> bool {
    ["frontend connected", "is being read", "is read by"].iter().any(|said| answer.body.contains(said))
}

/// Asks, does what the refusal advises, and asks again, until it is done. What is advised may be refused itself, with
/// advice of its own. Returns what was carried out.
#[track_caller]
pub(crate) fn follow_advice(daemon: &Daemon, ask: &dyn Fn() -> Answer) -> Vec<String> {
    let mut done = Vec::new();
    loop {
        let mut answer = ask();
        wait_until("the last frontend to be forgotten", || {
            let lingers = answer.status >= 400 && lingers(&answer);
            if lingers {
                answer = ask();
            }
            !lingers
        });
        if answer.status < 400 {
            return done;
        }
        let action = answer.json()["action"].as_str().unwrap().to_owned();
        carry_out(daemon, &action, &answer.body, &mut done);
    }
}

/// Carries out a piece of advice, one step after the other; of alternatives the first one. `refusal` is what it was given
/// with.
#[track_caller]
fn carry_out(daemon: &Daemon, advice: &str, refusal: &str, done: &mut Vec<String>) {
    let steps: Vec<_> = advice.split("; then ").filter_map(|step| advised(step).into_iter().find(helps)).collect();
    assert!(!steps.is_empty(), "after {done:?}: no command helps with it: {refusal}");
    for step in steps {
        assert!(done.len() < ADVICE_MAX, "the advice leads nowhere: {done:?}, and then {refusal}");
        if done.last() == Some(&step.join(" ")) {
            std::thread::sleep(Duration::from_millis(100)); // It has begun what is waited for.
        }
        let words: Vec<_> = step.iter().map(String::as_str).collect();
        let output = cli_within(daemon, &words, *PATIENCE);
        let output = output.unwrap_or_else(|| panic!("the advice {words:?} of {refusal} does not end"));
        done.push(step.join(" "));
        if !output.status.success() {
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "the advice {words:?} of {refusal}: {told}");
            // Or what was in the way has gone meanwhile.
            if advised(&told).iter().any(helps) {
                carry_out(daemon, &told, &told, done);
            }
        }
    }
}

/// All jobs that there are.
pub(crate) fn jobs(daemon: &Daemon) -> Vec<Value> {
    daemon.get("/v1/jobs").json().as_array().unwrap().clone()
}

/// Begins something that has a job of this kind, finds the job while it runs, has it wait for hours and stops it if that
/// is wanted. The job's number; `begin` is asked on a thread of its own, because it may wait for the job.
#[track_caller]
pub(crate) fn slowed(daemon: &Daemon, kind: &str, request: (&str, &str, &str), stop: bool) -> u64 {
    let before = jobs(daemon);
    let (api, (method, path, body)) = (daemon.api(), request);
    let (method, path, body) = (method.to_owned(), path.to_owned(), body.to_owned());
    let asked = std::thread::spawn(move || api.send(&method, &path, &body));
    let mut found = None;
    wait_until("a job to run", || {
        let is_new = |job: &&Value| job["kind"] == kind && !before.iter().any(|old| old["id"] == job["id"]);
        found = jobs(daemon).iter().find(is_new).and_then(|job| job["id"].as_u64());
        assert!(found.is_some() || !asked.is_finished() || !jobs(daemon).is_empty(), "nothing is begun");
        found.is_some()
    });
    let path = format!("/v1/jobs/{}", found.unwrap());
    daemon.send("PATCH", &path, r#"{"delay_ms":3600000}"#).ok();
    if stop {
        daemon.send("DELETE", &path, "").ok();
        asked.join().unwrap();
    }
    found.unwrap()
}

/// Starts the daemon, and says whether it serves; what it said when it does not is in its log.
pub(crate) fn start_if_it_can(daemon: &mut Daemon) -> bool {
    daemon.spawn();
    let deadline = Instant::now() + *PATIENCE;
    loop {
        if daemon.is_up() {
            return true;
        }
        if daemon.ended().is_some() {
            return false;
        }
        assert!(Instant::now() < deadline, "the daemon neither serves nor ends");
        std::thread::sleep(Duration::from_millis(5));
    }
}
