//! Case 1: reads and writes with no snapshot.

use crate::Result;
use crate::lane::Op;
use crate::load::{Load, Pattern};
use crate::results::Results;
use crate::stage::Stage;

pub(crate) const CASE: u32 = 1;

/// A load with its name.
struct Named {
    what: String,
    load: Load,
}

fn loads(stage: &Stage<'_>, queues: usize) -> Vec<Named> {
    let duration = stage.settings.round;
    let mut loads = Vec::new();
    let mut add = |what: String, op, bytes, depth, pattern| {
        loads.push(Named { what, load: Load { op, bytes, depth, queues, pattern, duration, trace: false } });
    };
    let ops = [(Op::Read, "read"), (Op::Write, "write")];
    // In a quick run two queues are only looked at where they matter most.
    let depths: &[usize] = if stage.settings.quick && queues > 1 { &[32] } else { &[1, 32, 128] };
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

pub(crate) fn run(stage: &Stage<'_>, results: &mut Results) -> Result<()> {
    for queues in [1, 2] {
        let mut connections = stage.connect(queues)?;
        for Named { what, load } in loads(stage, queues) {
            stage.take_turns(&stage.row(CASE, &what, queues), &load, &mut connections, results)?;
        }
    }
    Ok(())
}
