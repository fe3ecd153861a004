//! Options that several commands have, and values that are read from one argument.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use uuid::Uuid;

use crate::cli::wait::Patience;
use crate::control::SnapshotRef;
use crate::control::api::{DiskPatch, Durability, JOB_DELAY_MS_MAX, JobPatch, Layout, QUEUES_MAX};
use crate::control::name::NameError;

/// How long a command waits that waits.
#[derive(Debug, Args)]
pub(in crate::cli) struct WaitLimit {
    /// Wait no longer than this, and then say how far it is: seconds, or a number with s, m or h
    #[arg(long, value_name = "SECONDS|5m", requires = "wait", value_parser = span)]
    wait_timeout: Option<Duration>,
}

impl WaitLimit {
    pub(in crate::cli) fn patience(&self, wait: bool) -> Patience {
        Patience { wait, most: self.wait_timeout }
    }
}

/// Which part of a list is shown. A name may have * in it, which stands for any text.
#[derive(Debug, Args)]
pub(in crate::cli) struct PageArgs<A>
where
    A: Clone + Send + Sync + FromStr + 'static,
    A::Err: std::error::Error + Send + Sync + 'static,
{
    /// At most so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(in crate::cli) limit: Option<u32>,
    /// Only those that come after this one, which need not be there any more
    #[arg(long, value_name = "LAST")]
    pub(in crate::cli) after: Option<A>,
}

/// How fast a job goes.
#[derive(Debug, Args)]
pub(in crate::cli) struct PaceArgs {
    /// The pause between two steps, in milliseconds
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(..=i64::from(JOB_DELAY_MS_MAX)))]
    delay_ms: Option<u32>,
    /// The most bytes in a second, such as 20M; 0 for as many as it can
    #[arg(long, value_name = "RATE", value_parser = rate)]
    limit: Option<u64>,
}

impl PaceArgs {
    pub(in crate::cli) fn patch(&self) -> JobPatch {
        JobPatch { delay_ms: self.delay_ms, bytes_per_second: self.limit }
    }
}

/// How large a disk is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum SizeArg {
    /// So many bytes.
    Whole(u64),
    /// So many bytes more.
    More(u64),
}

impl FromStr for SizeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("{text:?} is no size; use bytes, or a number with K, M, G or T: 200G, or +50G for that much more")
        };
        match text.strip_prefix('+') {
            Some(more) => rate(more).map(SizeArg::More),
            None => rate(text).map(SizeArg::Whole),
        }
        .map_err(|_| wrong())
    }
}

impl SizeArg {
    /// The size that a disk of `bytes` is to have.
    pub(in crate::cli) fn of(self, bytes: u64) -> u64 {
        match self {
            SizeArg::Whole(size) => size,
            SizeArg::More(more) => bytes.saturating_add(more),
        }
    }
}

/// A snapshot or bookmark by its name or its id.
#[derive(Clone, Debug)]
pub(in crate::cli) enum MomentArg {
    Name(SnapshotRef),
    Id(Uuid),
}

impl FromStr for MomentArg {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.parse() {
            Ok(id) => Ok(MomentArg::Id(id)),
            Err(_) => text.parse().map(MomentArg::Name),
        }
    }
}

impl fmt::Display for MomentArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MomentArg::Name(name) => name.fmt(f),
            MomentArg::Id(id) => id.fmt(f),
        }
    }
}

/// What can be set of disks and volumes alike.
#[derive(Debug, Args)]
pub(in crate::cli) struct SetArgs {
    /// What the next snapshots outlive: process, the daemon's end; power, also a power cut
    #[arg(long, value_parser = one_of(Durability::ALL, Durability::as_str))]
    durability: Option<Durability>,
    /// How the blocks of the next snapshots lie in their images, and those of logs: at their own places, or as they came
    #[arg(long, value_parser = one_of(Layout::ALL, Layout::as_str))]
    layout: Option<Layout>,
    /// The most that backups and jobs have in flight while the guest is at work; off for no limit
    #[arg(long, value_name = "SIZE|off", value_parser = window)]
    background: Option<u32>,
    /// The most virtqueues of the next frontend, 1 to 16
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    queues: Option<u16>,
    /// What the next frontend sees as the serial
    #[arg(long)]
    serial: Option<String>,
    /// How many data segments a request of the next frontend is told to have, for guests with small rings
    #[arg(long, value_name = "N")]
    segments_max: Option<u16>,
    /// What discards of the next frontend are best multiples of
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    discard_granularity: Option<u32>,
    /// What one range of a discard of the next frontend is told to have at most
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    discard_max: Option<u64>,
}

impl SetArgs {
    pub(in crate::cli) fn patch(self, readonly: Option<bool>) -> DiskPatch {
        let Self { durability, layout, background, queues, serial, segments_max, discard_granularity, discard_max } =
            self;
        DiskPatch {
            durability,
            background_bytes: background,
            queues,
            readonly,
            serial,
            segments_max,
            discard_granularity,
            discard_max,
            layout,
        }
    }
}

pub(in crate::cli) fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{text:?} is neither on nor off")),
    }
}

pub(in crate::cli) fn window(text: &str) -> Result<u32, String> {
    let size = if text == "off" { Ok(0) } else { rate(text) };
    size.ok()
        .and_then(|size| u32::try_from(size).ok())
        .ok_or_else(|| format!("{text:?} is neither off nor a size such as 64K or 1M"))
}

/// A time: seconds, or a number with a unit.
pub(in crate::cli) fn span(text: &str) -> Result<Duration, String> {
    let (digits, seconds) = match text.as_bytes().last() {
        Some(b's') => (&text[..text.len() - 1], 1),
        Some(b'm') => (&text[..text.len() - 1], 60),
        Some(b'h') => (&text[..text.len() - 1], 3600),
        _ => (text, 1),
    };
    let number = digits.parse::<u32>().ok().filter(|_| !digits.starts_with('+'));
    let wrong = || format!("{text:?} is no time; use seconds, or a number with s, m or h, such as 5m");
    number.map(|number| Duration::from_secs(u64::from(number) * seconds)).ok_or_else(wrong)
}

/// Bytes in a second, with K, M, G or T for powers of 1024.
pub(in crate::cli) fn rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no rate; use bytes, or a number with K, M, G or T, such as 20M");
    let (digits, shift) = match text.char_indices().last() {
        Some((at, unit)) if !unit.is_ascii_digit() => {
            let place = "KMGT".find(unit.to_ascii_uppercase()).ok_or_else(wrong)?;
            (&text[..at], 10 * (u32::try_from(place).map_err(|_| wrong())? + 1))
        }
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

pub(in crate::cli) fn block_size(text: &str) -> Result<u32, String> {
    rate(text)
        .ok()
        .and_then(|size| u32::try_from(size).ok())
        .ok_or_else(|| format!("{text:?} is no size; use 4K to 1M"))
}

/// Takes one of some words, which help and completions show.
pub(in crate::cli) fn one_of<T>(all: &'static [T], word: fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err = String> + Copy + Send + Sync + 'static,
{
    PossibleValuesParser::new(all.iter().map(|value| word(*value))).try_map(|text| text.parse::<T>())
}
