//! What the user sees: aligned tables or JSON on stdout, a spinner or a bar on stderr while something takes long.
//!
//! Each answer is written in one go. Control characters cannot get here unescaped: names have none, and paths and
//! reasons are passed through [`text`].

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::CliError;

/// How often a line says how far the work is where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// A bar's line; its prefix says what is left.
const BAR: &str = "{msg} {bar:30} {percent}% of {binary_total_bytes}{prefix}";

/// Where and how to print.
pub(super) struct Output {
    pub(super) json: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints one value: its JSON, or what `human` makes of it.
    pub(super) fn show<T: Serialize + ?Sized>(
        &self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        if !self.json {
            return Ok(write(human(value).as_bytes())?);
        }
        let mut json = serde_json::to_vec_pretty(value).map_err(io::Error::from)?;
        json.push(b'\n');
        Ok(write(&json)?)
    }

    /// Prints one of many values: its JSON on one line, or what `human` makes of it.
    pub(super) fn follow<T: Serialize>(&self, value: &T, human: impl FnOnce(&T) -> String) -> Result<(), CliError> {
        if !self.json {
            return Ok(write(human(value).as_bytes())?);
        }
        let mut json = serde_json::to_vec(value).map_err(io::Error::from)?;
        json.push(b'\n');
        Ok(write(&json)?)
    }

    /// Whether a screen can be cleared and drawn again.
    pub(super) fn is_screen(&self) -> bool {
        !self.json && io::stdout().is_terminal()
    }
}

/// Writes all of it to stdout.
pub(super) fn write(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// Turns a spinner on a terminal until dropped; elsewhere does nothing.
pub(super) struct Spinner(ProgressBar);

impl Spinner {
    pub(super) fn start(message: String) -> Self {
        if !io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::default_spinner());
        bar.set_message(message);
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Turns a spinner on a terminal until it is known how far the work is, then shows a bar; elsewhere writes a line to stderr
/// now and then.
pub(super) struct Progress {
    spinner: Spinner,
    message: String,
    /// When a line was written last.
    told: Cell<Option<Instant>>,
}

impl Progress {
    pub(super) fn start(message: String) -> Self {
        let told = Cell::new(Some(Instant::now()));
        Self { spinner: Spinner::start(message.clone()), message, told }
    }

    /// Shows how far the work is.
    pub(super) fn show(&self, done_bytes: u64, total_bytes: u64, left_seconds: Option<u64>) {
        let Spinner(bar) = &self.spinner;
        if total_bytes == 0 {
            return;
        }
        if bar.is_hidden() && self.told.get().is_none_or(|told| told.elapsed() >= LINE_INTERVAL) {
            self.told.set(Some(Instant::now()));
            let percent = u128::from(done_bytes) * 100 / u128::from(total_bytes);
            let left = left_seconds.map_or_else(String::new, |seconds| format!(", {} left", duration(seconds)));
            // That nobody reads it any more is no reason to stop waiting.
            writeln!(io::stderr(), "{}: {percent}% of {}{left}", self.message, size(total_bytes)).ok();
        }
        let is_spinner = bar.length().is_none();
        bar.set_prefix(left_seconds.map_or_else(String::new, |seconds| format!(", {} left", duration(seconds))));
        bar.set_length(total_bytes);
        bar.set_position(done_bytes);
        if let (true, Ok(style)) = (is_spinner, ProgressStyle::with_template(BAR)) {
            bar.set_style(style);
        }
    }
}

/// Rows under a heading, each column as wide as its widest cell.
pub(super) fn table<const N: usize>(heading: [&str; N], rows: Vec<[String; N]>) -> String {
    let mut lines = vec![heading.map(str::to_owned)];
    lines.extend(rows);
    let mut widths = [0; N];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut table = String::new();
    for line in &lines {
        let cells: Vec<_> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        table.push_str(cells.join("  ").trim_end());
        table.push('\n');
    }
    table
}

/// Names and values, one a line.
pub(super) fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    fields.iter().map(|(name, value)| format!("{name:width$}  {value}").trim_end().to_owned() + "\n").collect()
}

/// A size for people, to a tenth of the largest unit that it has one of.
#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // What would be shown as 1024.0 is one of the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A time for people, in its two largest units.
pub(super) fn duration(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// Text of unknown origin, with control characters escaped; `-` for nothing.
pub(super) fn text(text: Option<impl AsRef<str>>) -> String {
    let escape = |char: char| if char.is_control() { char.escape_default().to_string() } else { char.to_string() };
    text.map_or_else(|| "-".to_owned(), |text| text.as_ref().chars().map(escape).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (bytes, shown) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (12_897_485, "12.3 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (1 << 40, "1.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), shown);
        }
    }

    #[test]
    fn durations_are_short() {
        for (seconds, shown) in [(0, "0 s"), (59, "59 s"), (90, "1 min 30 s"), (7_260, "2 h 1 min")] {
            assert_eq!(duration(seconds), shown);
        }
    }

    #[test]
    fn columns_are_aligned() {
        let rows = vec![["a".to_owned(), "1".to_owned()], ["long".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "N"], rows), "NAME  N\na     1\nlong\n");
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(text(Some("a\x1b[2J\n")), "a\\u{1b}[2J\\n");
    }
}
