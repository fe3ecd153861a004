//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::backend::halfsilver::Build;
use crate::place::Device;

/// Measures halfsilver beside qemu-storage-daemon and plain io_uring, in turns, on the same image.
#[derive(Parser)]
#[command(name = "scripts/bench", version, about, disable_version_flag = true)]
pub(crate) struct Arguments {
    /// Shorter rounds, fewer queues and depths, smaller images: under 3 minutes in all
    #[arg(long)]
    pub(crate) quick: bool,
    /// The cases to run: 1 plain, 2 first writes, 3 the cut, 4 beside background work, 5 many snapshots, 6 scale,
    /// 7 restart, 8 layouts
    #[arg(long, value_delimiter = ',', value_name = "N,...", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) cases: Vec<u32>,
    /// Where to measure
    #[arg(long, value_enum, default_value = "both")]
    pub(crate) device: Where,
    /// The folder on the real disk
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) dir: PathBuf,
    /// Where results.json and the page go
    #[arg(long, value_name = "DIR", default_value = "target/bench-results")]
    pub(crate) out: PathBuf,
    /// Rounds of each backend; the reach needs 5
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: Option<u32>,
    /// The length of a round, in milliseconds
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(20..=60000))]
    pub(crate) round_ms: Option<u64>,
    /// Another build of halfsilver, measured in the same turns on a copy of the image; may be given again
    #[arg(long, value_name = "BINARY")]
    pub(crate) also: Vec<PathBuf>,
    /// Writes the table of results into docs/benchmark.md as well
    #[arg(long)]
    pub(crate) docs: bool,
    /// Cargo's own word for a benchmark
    #[arg(long, hide = true)]
    pub(crate) bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Where {
    /// /dev/shm
    Shm,
    /// The real disk
    Disk,
    Both,
}

/// What the cases go by.
pub(crate) struct Settings {
    pub(crate) quick: bool,
    pub(crate) cases: Vec<u32>,
    pub(crate) devices: Vec<Device>,
    pub(crate) dir: PathBuf,
    pub(crate) rounds: usize,
    pub(crate) round: Duration,
    pub(crate) builds: Vec<Build>,
}

impl Settings {
    pub(crate) fn new(arguments: &Arguments) -> Settings {
        let devices = match arguments.device {
            Where::Shm => vec![Device::Shm],
            Where::Disk => vec![Device::Disk],
            Where::Both => vec![Device::Shm, Device::Disk],
        };
        let binary = std::env::var_os("HALFSILVER_BIN").map(PathBuf::from);
        let binary = binary.unwrap_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_halfsilver")));
        let mut builds = vec![Build { name: "halfsilver".to_owned(), binary }];
        let also = arguments.also.iter().enumerate();
        builds.extend(also.map(|(i, path)| Build { name: format!("also-{}", i + 1), binary: path.clone() }));
        let round_ms = arguments.round_ms.unwrap_or(if arguments.quick { 85 } else { 1000 });
        Settings {
            quick: arguments.quick,
            cases: if arguments.cases.is_empty() { (1..=8).collect() } else { arguments.cases.clone() },
            devices,
            dir: arguments.dir.clone(),
            rounds: arguments.rounds.unwrap_or(5) as usize,
            round: Duration::from_millis(round_ms),
            builds,
        }
    }

    /// Rounds of what the reach does not go by.
    pub(crate) fn fewer_rounds(&self) -> usize {
        if self.quick { self.rounds.min(2) } else { self.rounds }
    }

    /// The size of the prefilled image.
    pub(crate) fn image_bytes(&self) -> u64 {
        if self.quick { 512 << 20 } else { 2 << 30 }
    }
}
