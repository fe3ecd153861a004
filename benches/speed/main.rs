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
    for &device in &settings.devices {
        eprintln!("{}:", device.name());
        let mut stage = Stage::new(&settings, device, &mut results)?;
        for &case in &settings.cases {
            match case {
                1 => cases::plain::run(&stage, &mut results)?,
                2 => cases::first_writes::run(&mut stage, &mut results)?,
                3 => cases::cut::run(&mut stage, &mut results)?,
                4 => cases::background::run(&mut stage, &mut results)?,
                5 => cases::many::run(&mut stage, &mut results)?,
                6 => cases::scale::run(&mut stage, &mut results)?,
                7 => cases::restart::run(&mut stage, &mut results)?,
                _ => {}
            }
        }
    }
    report::table::print(&results);
    Ok(())
}
