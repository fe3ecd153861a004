//! The command line: `serve` starts the daemon, everything else is a client of its control socket.
//!
//! Invariants: exit status 0 means done, 1 refused or failed with one line on stderr that says what to do (how far a long
//! wait is may stand before it), 2 usage; what a script reads goes to stdout and nothing else does; a reader that closes stdout early ends the command
//! quietly. No policy lives here: the daemon decides, this shows.

mod args;
mod changes;
mod check_page;
mod client;
mod commands;
mod lists;
mod mirror;
mod output;
mod pages;
mod restore;
mod snapshots;
mod volumes;
mod wait;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use crate::control::ApiError;
use crate::daemon::check::{CheckOptions, check};
use crate::daemon::config::{ConfigError, Environment, ServeOptions};
use crate::daemon::{self, ServeError};
use args::{CheckArgs, Cli, Command, ServeArgs};
use output::Output;

/// Why a command did not end with status 0.
#[derive(Debug)]
enum CliError {
    /// The arguments contradict each other: status 2.
    Usage(String),
    /// Refused or failed: status 1 and this line, without a name before it and without a full stop.
    Failed(String),
    /// Nobody reads our output any more: status 0, in silence.
    OutputClosed,
}

impl CliError {
    /// Of arguments that the daemon would refuse whatever it serves. What it advises to those who write JSON is left out.
    fn of_arguments(error: ApiError) -> Self {
        let is_general = error.action == error.code.action();
        Self::Usage(if is_general { error.message } else { error.to_string() })
    }
}

impl From<io::Error> for CliError {
    /// Of writing to stdout.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Failed(format!("cannot write the output: {error}")),
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Option(_) => Self::Usage(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Runs the command line of this process and returns its exit status.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match dispatch(cli) {
        Ok(()) | Err(CliError::OutputClosed) => ExitCode::SUCCESS,
        Err(CliError::Usage(message)) => usage(&named_command().error(ErrorKind::ArgumentConflict, message)),
        Err(CliError::Failed(message)) => {
            let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
            writeln!(io::stderr(), "halfsilver: {}", output::text(Some(line))).ok();
            ExitCode::FAILURE
        }
    }
}

/// The command that this process was asked for: its usage is what is shown.
fn named_command() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    for word in std::env::args().skip(1) {
        if let Some(next) = command.find_subcommand(&word) {
            command = next.clone();
        }
    }
    command
}

/// Shows help on stdout or a usage error on stderr; 0 or 2.
fn usage(error: &clap::Error) -> ExitCode {
    error.print().ok();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn dispatch(cli: Cli) -> Result<(), CliError> {
    let environment = Environment::current()?;
    let output = Output::new(cli.json);
    let control = cli.control.filter(|path| !path.as_os_str().is_empty());
    match cli.command {
        Command::Serve(args) => serve(args, control, &environment),
        Command::Check(args) => examine(args, &output, &environment),
        Command::Completions { shell } => completions(shell),
        Command::Man { dir } => man(dir.as_deref()),
        Command::Client(command) => {
            let control = match control {
                Some(path) => environment.directory.join(path),
                None => environment.default_control()?,
            };
            commands::run(command, &client::Client::new(control)?, &output, &environment.directory)
        }
    }
}

fn serve(args: ServeArgs, control: Option<PathBuf>, environment: &Environment) -> Result<(), CliError> {
    let ServeArgs { config, state_dir, run_dir, disks, take_flushed, strict } = args;
    let options = ServeOptions { config, control, state_dir, run_dir, disks, take_flushed, strict };
    let config = options.resolve(environment)?;
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    daemon::serve(config).map_err(|error| match error {
        ServeError::Option(error) => CliError::Usage(error.to_string()),
        error => CliError::Failed(error.to_string()),
    })
}

fn examine(args: CheckArgs, output: &Output, environment: &Environment) -> Result<(), CliError> {
    let CheckArgs { config, state_dir, run_dir, repair } = args;
    let places = ServeOptions { config, state_dir, run_dir, ..ServeOptions::default() }.resolve(environment)?;
    let options = CheckOptions { state_dir: places.state_dir, run_dir: places.run_dir, repair };
    let report = check(&options).map_err(|error| CliError::Failed(error.to_string()))?;
    output.show(&report, check_page::page)?;
    if report.ok {
        return Ok(());
    }
    let state_dir = report.state_dir.display();
    Err(CliError::Failed(format!("{}: {}", state_dir, check_page::verdict(&report))))
}

fn completions(shell: clap_complete::Shell) -> Result<(), CliError> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "halfsilver", &mut text);
    Ok(output::write(&text)?)
}

fn man(dir: Option<&Path>) -> Result<(), CliError> {
    let Some(dir) = dir else {
        let mut text = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut text)?;
        return Ok(output::write(&text)?);
    };
    let written = std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Cli::command(), dir));
    written.map_err(|error| CliError::Failed(format!("cannot write the pages to {}: {error}", dir.display())))
}
