//! Case 3: the moment of the snapshot, in slices of 10 ms, and a hundred snapshots in a row.
//!
//! The slices around the cut are those that the command's time touches, and one on each side. They are held against the
//! slices before them in the same round; a moment at which nothing happens is looked at in the same way, as a control.
//! What the snapshot costs from then on, first writes and reads through tables, is no matter of the cut: so they are held
//! against the slower of before and after, too.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::lane::{Connection, Op};
use crate::load::{self, Load, Measured};
use crate::random::Rng;
use crate::results::{Results, Row, Sample, Spread};
use crate::stage::Stage;
use crate::{Result, stop};

pub(crate) const CASE: u32 = 3;
pub(crate) const SLICE: Duration = Duration::from_millis(10);
/// How long QEMU's requests may take while its copy job begins.
const PATIENCE_WITH_QSD: Duration = Duration::from_secs(2);
/// The file that QEMU's copy job copies into.
const TARGET: &str = "copy-before-write.raw";
const IN_A_ROW: usize = 100;

pub(crate) const READS: &str = "the cut under 4K random read depth 32";
pub(crate) const WRITES: &str = "the cut under 4K random write depth 32";
pub(crate) const STORM: &str = "100 snapshots in a row, 4K random write depth 32";

struct Contender {
    name: String,
    backend: usize,
    /// None: QEMU's copy job begins.
    strategy: Option<&'static str>,
}

fn contenders(stage: &Stage<'_>) -> Vec<Contender> {
    let mut all = Vec::new();
    for (backend, suffix) in stage.daemons() {
        for strategy in ["copy-on-write", "write-logging"] {
            all.push(Contender { name: format!("{strategy}{suffix}"), backend, strategy: Some(strategy) });
        }
    }
    all.insert(2, Contender { name: "qsd copy-before-write".to_owned(), backend: Stage::QSD, strategy: None });
    all
}

pub(crate) fn run(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    // Long enough for slices before, around and after the cut.
    let duration = stage.settings.round.max(Duration::from_millis(200));
    let contenders = contenders(stage);
    for (what, op) in [(READS, Op::Read), (WRITES, Op::Write)] {
        let row = stage.row(CASE, what, 1);
        contenders.iter().for_each(|contender| results.show(&contender.name));
        for round in 0..stage.settings.rounds {
            for at in Rng::turns(contenders.len(), round) {
                let contender = &contenders[at];
                let load = Load { trace: true, ..Load::random(op, 32, duration) };
                let seen = match turn(stage, contender, &load, round) {
                    Ok(seen) => seen,
                    // QEMU 7.2 waits for the export to be idle, which it never is, and now and then forgets requests.
                    Err(e) if contender.strategy.is_none() && !stop::asked() => {
                        stage.qsd_failed(&row, &e.to_string(), results)?;
                        std::fs::remove_file(stage.place.image(TARGET)).ok();
                        continue;
                    }
                    Err(e) => return Err(format!("{what}, {}: {e}", contender.name).into()),
                };
                let figures = seen.figures();
                // One round of each is drawn.
                if round == stage.settings.rounds / 2 {
                    let name = format!("cut/{}/{what}/{}", stage.device().name(), contender.name);
                    results.facts.insert(name, seen.json());
                }
                results.add(Sample { row: row.clone(), backend: contender.name.clone(), round, figures });
            }
        }
        show(&row, results);
    }
    storm(stage, results)
}

fn show(row: &Row, results: &Results) {
    for backend in results.backends(row) {
        let figure = |name| results.spread(row, &backend, name).map_or(f64::NAN, |s| s.median);
        let (cut, control) = (figure("cut_ratio"), figure("control_ratio"));
        let (command_us, device) = (figure("command_us"), row.device.name());
        eprintln!(
            "  {device:4} {:40} {backend:24} slices {cut:.2} (control {control:.2}), command {command_us:.0} us",
            row.what
        );
    }
}

/// A round with a cut in its middle.
struct Seen {
    measured: Measured,
    /// When the command was sent and when it was answered, counted from the round's start.
    command: (Duration, Duration),
    duration: Duration,
}

impl Seen {
    /// Requests answered in each slice, and the longest of them in microseconds.
    fn slices(&self) -> Vec<(f64, f64)> {
        let count = (self.duration.as_nanos() / SLICE.as_nanos()) as usize;
        let mut slices = vec![(0.0, 0.0); count];
        for &(at, took) in &self.measured.trace {
            if let Some((requests, longest)) = slices.get_mut((u128::from(at) / SLICE.as_nanos()) as usize) {
                *requests += 1.0;
                *longest = f64::max(*longest, took as f64 / 1000.0);
            }
        }
        slices
    }

    /// Of the slices that this time touches, and one on each side: requests in a slice against the median of those
    /// before, and the longest request.
    fn around(&self, from: Duration, to: Duration) -> (f64, f64) {
        let slices = self.slices();
        let place = |at: Duration| (at.as_nanos() / SLICE.as_nanos()) as usize;
        let first = place(from).saturating_sub(1).min(slices.len() - 1);
        let last = (place(to) + 1).min(slices.len() - 1);
        // The first slice has the start of the load in it.
        let before: Vec<f64> = slices[1..first.max(2)].iter().map(|s| s.0).collect();
        let median = Spread::of(before).map_or(f64::NAN, |s| s.median);
        let part = &slices[first..=last];
        let mean = part.iter().map(|s| s.0).sum::<f64>() / part.len() as f64;
        (mean / median, part.iter().map(|s| s.1).fold(0.0, f64::max))
    }

    fn figures(&self) -> Vec<(&'static str, f64)> {
        let (from, to) = self.command;
        let (cut_ratio, cut_longest_us) = self.around(from, to);
        // A quarter of the round earlier nothing happens.
        let (control_ratio, control_longest_us) = self.around(from - self.duration / 4, to - self.duration / 4);
        let slices = self.slices();
        let place = |at: Duration| (at.as_nanos() / SLICE.as_nanos()) as usize;
        let longest = |part: &[(f64, f64)]| part.iter().map(|s| s.1).fold(0.0, f64::max);
        let median = |part: &[(f64, f64)]| {
            Spread::of(part.iter().map(|s| s.0).collect::<Vec<_>>()).map_or(f64::NAN, |s| s.median)
        };
        let before = &slices[..place(from).saturating_sub(1)];
        let after = &slices[(place(to) + 2).min(slices.len())..];
        let before_longest_us = longest(before);
        // The first slice has the start of the load in it.
        let before_rate = median(before.get(1..).unwrap_or_default());
        let slower_side = (median(after) / before_rate).min(1.0);
        let after_per_s = median(after) / SLICE.as_secs_f64();
        vec![
            ("cut_ratio", cut_ratio),
            ("dip_ratio", cut_ratio / slower_side),
            ("longest_of_all_ratio", cut_longest_us / before_longest_us.max(longest(after))),
            ("control_ratio", control_ratio),
            ("cut_longest_us", cut_longest_us),
            ("control_longest_us", control_longest_us),
            ("before_longest_us", before_longest_us),
            ("longest_ratio", cut_longest_us / before_longest_us),
            ("command_us", (to - from).as_secs_f64() * 1e6),
            ("after_per_s", after_per_s),
        ]
    }

    fn json(&self) -> serde_json::Value {
        let slices = self.slices();
        let requests: Vec<f64> = slices.iter().map(|s| s.0).collect();
        let longest_us: Vec<f64> = slices.iter().map(|s| s.1).collect();
        let (from, to) = self.command;
        json!({
            "slice_ms": SLICE.as_millis() as u64, "requests": requests, "longest_us": longest_us,
            "from_ms": from.as_secs_f64() * 1000.0, "to_ms": to.as_secs_f64() * 1000.0,
        })
    }
}

/// The load in a thread of its own, and something that is done beside it at some moment.
fn beside<T>(
    connection: &mut Connection,
    load: &Load,
    seed: u64,
    action: impl FnOnce() -> Result<T>,
) -> Result<(Measured, T)> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| load::run(connection, load, seed));
        let done = action();
        let measured = thread.join().unwrap_or_else(|_| Err("the load panicked".into()))?;
        Ok((measured, done?))
    })
}

fn turn(stage: &mut Stage<'_>, contender: &Contender, load: &Load, round: usize) -> Result<Seen> {
    let at = contender.backend;
    let mut connection = Connection::open(&stage.backends[at].target(), load.queues)?;
    load::run(&mut connection, &Load::random(Op::Read, 32, Duration::from_millis(20)), 0)?;
    let target = stage.place.image(TARGET);
    if contender.strategy.is_none() {
        std::fs::File::create(&target)?.set_len(connection.bytes)?;
        connection.lanes.iter_mut().for_each(|lane| lane.patience = PATIENCE_WITH_QSD);
    }
    let aio = stage.aio;
    let half = load.duration / 2;
    let (measured, (sent, answered)) = beside(&mut connection, load, round as u64, || {
        std::thread::sleep(half);
        let sent = Instant::now();
        match contender.strategy {
            Some(strategy) => stage.daemon(at)?.snapshot("vm0", "cut", strategy, false)?,
            None => stage.qsd_mut()?.begin_copy_before_write(&target, aio)?,
        }
        Ok((sent, Instant::now()))
    })?;
    drop(connection);
    match contender.strategy {
        Some(_) => stage.daemon(at)?.delete("vm0@cut")?,
        None => {
            stage.qsd_mut()?.end_copy_before_write()?;
            std::fs::remove_file(&target)?;
        }
    }
    let command = (sent - measured.began, answered - measured.began);
    Ok(Seen { measured, command, duration: load.duration })
}

/// A hundred snapshots, each as soon as the one before has been answered.
fn storm(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    let row = stage.row(CASE, STORM, 1);
    for round in 0..stage.settings.fewer_rounds() {
        for (at, suffix) in stage.daemons() {
            let daemon = stage.daemon(at)?;
            let mut connection = Connection::open(&stage.backends[at].target(), 1)?;
            let until = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            let load = Load {
                trace: true,
                until: Some(until.clone()),
                ..Load::random(Op::Write, 32, Duration::from_secs(60))
            };
            let (measured, (began, commands)) = beside(&mut connection, &load, round as u64, || {
                let taken = (|| {
                    std::thread::sleep(Duration::from_millis(100));
                    let (began, mut commands) = (Instant::now(), Vec::new());
                    for i in 0..IN_A_ROW {
                        stop::check()?;
                        let sent = Instant::now();
                        daemon.snapshot("vm0", &format!("s{i}"), "copy-on-write", false)?;
                        commands.push(sent.elapsed().as_secs_f64() * 1e6);
                    }
                    Ok((began, commands))
                })();
                until.store(true, std::sync::atomic::Ordering::Relaxed);
                taken
            })?;
            drop(connection);
            for i in 0..IN_A_ROW {
                daemon.delete(&format!("vm0@s{i}"))?;
            }
            let figures = storm_figures(&measured, began, commands);
            results.add(Sample { row: row.clone(), backend: format!("copy-on-write{suffix}"), round, figures });
        }
    }
    for backend in results.backends(&row) {
        let figure = |name| results.spread(&row, &backend, name).map_or(f64::NAN, |s| s.median);
        let (command, ratio, longest) = (figure("command_us"), figure("during_ratio"), figure("cut_longest_us"));
        let device = row.device.name();
        eprintln!("  {device:4} {STORM} {backend}: {command:.0} us each, rate {ratio:.2}, longest {longest:.0} us");
    }
    Ok(())
}

fn storm_figures(measured: &Measured, began: Instant, commands: Vec<f64>) -> Vec<(&'static str, f64)> {
    let cut = (began - measured.began).as_nanos();
    let (before, during): (Vec<_>, Vec<_>) = measured.trace.iter().partition(|(at, _)| u128::from(*at) < cut);
    let took = |part: &[(u64, u64)]| part.iter().map(|(_, took)| *took).max().unwrap_or(0) as f64 / 1000.0;
    let seconds = measured.elapsed.as_secs_f64() - cut as f64 / 1e9;
    let rate_before = before.len() as f64 / (cut as f64 / 1e9);
    let rate_during = during.len() as f64 / seconds;
    let longest_command = commands.iter().copied().fold(0.0, f64::max);
    vec![
        ("command_us", Spread::of(commands).map_or(f64::NAN, |s| s.median)),
        ("longest_command_us", longest_command),
        ("snapshots_per_s", IN_A_ROW as f64 / seconds),
        ("during_per_s", rate_during),
        ("during_ratio", rate_during / rate_before),
        ("before_longest_us", took(&before)),
        ("cut_longest_us", took(&during)),
    ]
}
