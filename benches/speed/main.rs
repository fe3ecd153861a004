//! The project's benchmark: halfsilver beside qemu-storage-daemon and plain io_uring, in turns in one run.
//!
//! `docs/benchmark.md` says what each case measures and what it does not show. `scripts/bench` runs it.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the sizes are small, and figures for people need no more than their first digits"
)]

mod backend;
mod cases;
mod cpu;
mod lane;
mod load;
mod place;
mod random;
mod report;
mod results;
mod settings;
mod stage;
mod stop;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use results::Results;
use settings::{Arguments, Settings};
use stage::Stage;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    stop::listen();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("scripts/bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let settings = Settings::new(arguments);
    let mut results = Results::default();
    let measured = measure(&settings, &mut results);
    // What was measured before an error or Ctrl-C is shown all the same.
    report::table::print(&results);
    let claims = report::reach::compute(&results);
    report::table::print_table(&report::reach::table(&claims));
    report::write(&arguments.out, &settings, &results)?;
    println!("\n{}", arguments.out.join("index.html").display());
    measured?;
    if arguments.docs {
        report::docs::write(std::path::Path::new("docs/benchmark.md"), &settings, &claims, &results)?;
    }
    Ok(())
}

fn measure(settings: &Settings, results: &mut Results) -> Result<()> {
    let began = Instant::now();
    for &device in &settings.devices {
        eprintln!("{}:", device.name());
        let mut stage = Stage::new(settings, device, results)?;
        for (case, what, run) in cases::ALL {
            if settings.cases.contains(&case) {
                eprintln!("{} after {:.0} s: case {case}, {what}", device.name(), began.elapsed().as_secs_f64());
                run(&mut stage, results).map_err(|e| format!("case {case}, {what}: {e}"))?;
            }
        }
    }
    eprintln!("measured in {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}
