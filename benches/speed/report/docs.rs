//! The results in docs/benchmark.md, between two markers. Nobody writes there by hand.

use std::path::Path;

use serde_json::Value;

use super::reach::{self, Claim};
use super::table::{self, Table};
use super::{machine, ratio};
use crate::Result;
use crate::results::Results;
use crate::settings::Settings;

const BEGIN: &str = "<!-- results: written by scripts/bench --docs -->";
const END: &str = "<!-- end of results -->";

fn markdown(table: &Table) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&table.head) + &line(&vec!["---".to_owned(); table.head.len()]);
    table.lines.iter().for_each(|cells| text.push_str(&line(cells)));
    text
}

/// One line a row and contender: its rate against QEMU's and against the base.
fn ratios(results: &Results) -> Table {
    let mut lines = Vec::new();
    for row in results.rows() {
        for backend in results.backends(&row) {
            let (qsd, base) = results.references(&row, &backend);
            let of = |other: &Option<String>, figure| {
                let spread = other.as_ref().and_then(|other| results.ratio(&row, &backend, other, figure));
                spread.map(|spread| ratio(Some(spread)))
            };
            let against_base = of(&base, "per_s").map(|text| format!("{text} {}", base.clone().unwrap_or_default()));
            if let (None, None) = (of(&qsd, "per_s"), &against_base) {
                continue;
            }
            let cell = |text: Option<String>| text.unwrap_or_default();
            let cpu = cell(of(&qsd, "cpu_us"));
            lines.push(vec![
                table::title(&row).replace(" | ", ", "),
                backend.clone(),
                cell(of(&qsd, "per_s")),
                cpu,
                cell(against_base),
            ]);
        }
    }
    let head = ["", "", "rate x qsd", "CPU x qsd", "rate x base"].map(str::to_owned).to_vec();
    Table { title: String::new(), head, lines }
}

/// Replaces what is between the markers.
pub(crate) fn write(path: &Path, settings: &Settings, claims: &[Claim], results: &Results) -> Result<()> {
    let described: Value = machine::describe(settings);
    let text = std::fs::read_to_string(path)?;
    let from = text.find(BEGIN).ok_or("docs/benchmark.md has no place for results")? + BEGIN.len();
    let to = text.find(END).ok_or("docs/benchmark.md has no end of results")?;
    let (rounds, round_ms) = (settings.rounds, settings.round.as_millis());
    let new = format!(
        "\n\n{}. {rounds} rounds of {round_ms} ms.\n\n{}\n{}\n",
        machine::line(&described),
        markdown(&reach::table(claims)),
        markdown(&ratios(results))
    );
    std::fs::write(path, format!("{}{new}{}", &text[..from], &text[to..]))?;
    Ok(())
}
