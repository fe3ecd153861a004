//! Case 1: reads and writes with no snapshot.

use std::time::{Duration, Instant};

use crate::Result;
use crate::lane::Op;
use crate::load::{Load, Pattern};
use crate::results::{Results, Sample};
use crate::stage::{QUEUES_MAX, Stage};

pub(crate) const CASE: u32 = 1;
/// The row of servers that have a client and no requests.
pub(crate) const IDLE: &str = "idle, two queues connected";

/// A load with its name.
struct Named {
    what: String,
    load: Load,
}

fn loads(stage: &Stage<'_>, queues: usize) -> Vec<Named> {
    let duration = stage.settings.round;
    let mut loads = Vec::new();
    let mut add = |what: String, op, bytes, depth, pattern| {
        let load = Load { bytes, queues, pattern, ..Load::random(op, depth, duration) };
        loads.push(Named { what, load });
    };
    let ops = [(Op::Read, "read"), (Op::Write, "write")];
    // In a quick run two queues are only looked at where they matter most.
    let depths: &[usize] = match (stage.settings.quick, queues) {
        (true, 1) => &[1, 32],
        (true, _) => &[32],
        (false, _) => &[1, 32, 128],
    };
    for &depth in depths {
        for (op, name) in ops {
            add(format!("4K random {name} depth {depth}"), op, 4096, depth, Pattern::Random);
        }
    }
    if !stage.settings.quick || queues == 1 {
        for (op, name) in ops {
            add(format!("256K sequential {name} depth 8"), op, 256 << 10, 8, Pattern::Sequential);
        }
    }
    loads
}

/// What servers use that have a client and nothing to do. They take turns with each other on this assumption.
fn idle(stage: &Stage<'_>, results: &mut Results) -> Result<()> {
    let row = stage.row(CASE, IDLE, QUEUES_MAX);
    for round in 0..stage.settings.rounds.min(5) {
        let servers: Vec<_> = stage.backends.iter().filter(|b| b.pid().is_some()).collect();
        let before = servers.iter().map(|b| b.cpu()).collect::<Result<Vec<_>>>()?;
        let (began, span) = (Instant::now(), Duration::from_secs(1));
        std::thread::sleep(if stage.settings.quick { span / 5 } else { span });
        for (backend, before) in servers.iter().zip(before) {
            let cpu = backend.cpu()?.saturating_sub(before).as_secs_f64() / began.elapsed().as_secs_f64();
            let figures = vec![("idle_cpu_us_per_s", cpu * 1e6)];
            results.add(Sample { row: row.clone(), backend: backend.name().to_owned(), round, figures });
        }
    }
    Ok(())
}

pub(crate) fn run(stage: &mut Stage<'_>, results: &mut Results) -> Result<()> {
    stage.add_other_qsd()?;
    for queues in [1, 2] {
        let mut connections = stage.connect(queues)?;
        if queues == QUEUES_MAX {
            idle(stage, results)?;
        }
        for Named { what, load } in loads(stage, queues) {
            stage.take_turns(&stage.row(CASE, &what, queues), &load, &mut connections, results)?;
        }
    }
    stage.drop_other_qsd();
    Ok(())
}
