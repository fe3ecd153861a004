//! Case 7: how long a client that connects again has to wait for its first answer.

use std::time::Instant;

use crate::backend::child::PATIENCE;
use crate::lane::{Connection, Op};
use crate::load::{self, Load};
use crate::results::{Results, Sample};
use crate::stage::Stage;
use crate::{Result, stop};

pub(crate) const CASE: u32 = 7;

/// How the server ends. The time counts from the signal on, so that an orderly end is in it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Stop,
    Kill,
}

pub(crate) fn run(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    for (end, with_snapshot) in [(End::Stop, false), (End::Stop, true), (End::Kill, false), (End::Kill, true)] {
        let how = if end == End::Stop { "SIGTERM" } else { "SIGKILL" };
        let what = format!("restart by {how}, {} snapshot", if with_snapshot { "one" } else { "no" });
        let row = stage.row(CASE, &what, 1);
        for round in 0..stage.settings.fewer_rounds() {
            for (at, _) in stage.daemons() {
                let first_answer = of_daemon(stage, at, end, with_snapshot)?;
                let backend = stage.backends[at].name().to_owned();
                let figures = vec![("first_answer_ms", first_answer)];
                results.add(Sample { row: row.clone(), backend, round, figures });
            }
            if !with_snapshot && end == End::Kill {
                let figures = vec![("first_answer_ms", of_qsd(stage)?)];
                results.add(Sample { row: row.clone(), backend: "qsd".to_owned(), round, figures });
            }
        }
        for backend in results.backends(&row) {
            let spread = results.spread(&row, &backend, "first_answer_ms").map_or(f64::NAN, |s| s.median);
            eprintln!("  {:4} {what}, {backend}: first answer after {spread:.1} ms", row.device.name());
        }
    }
    Ok(())
}

fn of_daemon(stage: &mut Stage<'_>, at: usize, end: End, with_snapshot: bool) -> Result<f64> {
    let mut connection = Connection::open(&stage.backends[at].target(), 1)?;
    if with_snapshot {
        stage.daemon(at)?.snapshot("vm0", "restart", "copy-on-write", true)?;
    }
    load::run(&mut connection, &Load::random(Op::Write, 32, stage.settings.round / 5), 7)?;
    let began = Instant::now();
    match end {
        End::Stop => stage.daemon_mut(at)?.stop()?,
        End::Kill => stage.daemon_mut(at)?.kill()?,
    }
    drop(connection);
    stage.daemon_mut(at)?.start_again()?;
    let waited = first_answer(stage, at, began)?;
    if with_snapshot {
        stage.daemon(at)?.delete("vm0@restart")?;
    }
    Ok(waited)
}

fn of_qsd(stage: &mut Stage<'_>) -> Result<f64> {
    let began = Instant::now();
    stage.restart_qsd()?;
    first_answer(stage, Stage::QSD, began)
}

/// Connects until that succeeds, reads once, and says how many milliseconds have passed.
fn first_answer(stage: &Stage<'_>, at: usize, began: Instant) -> Result<f64> {
    loop {
        stop::check()?;
        match Connection::open(&stage.backends[at].target(), 1) {
            Ok(mut connection) => {
                let one = Load { pattern: load::Pattern::Once(vec![0].into()), ..Load::random(Op::Read, 1, PATIENCE) };
                load::run(&mut connection, &one, 0)?;
                return Ok(began.elapsed().as_secs_f64() * 1000.0);
            }
            Err(e) if began.elapsed() > PATIENCE => return Err(e),
            Err(_) => std::thread::sleep(std::time::Duration::from_micros(500)),
        }
    }
}
