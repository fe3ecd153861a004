//! The page: what was wanted, what was measured, pictures. It is one file with nothing to load.

use serde_json::Value;

use super::pictures::{self, Bar, Line};
use super::reach::{self, Claim};
use super::table::{self, Table};
use super::{machine, number};
use crate::Result;
use crate::place::Device;
use crate::results::{Results, Row};
use crate::settings::Settings;

const STYLE: &str = "body{font:15px/1.45 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}\
table{border-collapse:collapse;margin:.6em 0 1.6em;font-size:13px}td,th{padding:.15em .7em;text-align:right;\
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}.met{color:#177245}\
.not-met{color:#b3261e;font-weight:bold}svg{max-width:100%;height:auto;margin:.6em 0}h3{margin-bottom:.2em}\
summary{cursor:pointer}";

const TITLES: [(u32, &str, &str); 7] = [
    (1, "Plain reads and writes", "No snapshot. Ratios of requests a second; the rule is at 1."),
    (2, "First writes while a snapshot is active", "Each turn has a fresh snapshot, and no block is written twice."),
    (3, "The moment of the snapshot", "Slices of 10 ms; the command's time is red. One round of several is drawn."),
    (4, "Beside a backup and a fold", "What the guest keeps while other work reads or writes the same disk."),
    (5, "Thirty-two snapshots against one", "Each owns something."),
    (6, "Scale", "A sparse disk of 16 TiB, and the memory of an idle daemon with four disks."),
    (7, "Restart", "From the signal until a client that connects again has its first answer."),
];

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The whole page.
pub(crate) fn html(machine: &Value, settings: &Settings, claims: &[Claim], results: &Results) -> Result<String> {
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>halfsilver: speed</title>\
         <style>{STYLE}</style><h1>halfsilver: speed</h1><p>{}</p><p>{} rounds of {:.0} ms of each contender, in \
         turns. Figures are medians, spreads are quartiles, ratios are taken within a round.</p>",
        escape(&machine::line(machine)),
        settings.rounds,
        settings.round.as_secs_f64() * 1000.0,
    );
    page.push_str("<h2>Reach</h2>");
    page.push_str(&html_table(&reach::table(claims)));
    for (case, title, says) in TITLES {
        let rows: Vec<Row> = results.rows().into_iter().filter(|row| row.case == case).collect();
        if rows.is_empty() {
            continue;
        }
        page.push_str(&format!("<h2>{case}. {title}</h2><p>{says}</p>"));
        for device in [Device::Shm, Device::Disk] {
            let rows: Vec<Row> = rows.iter().filter(|row| row.device == device).cloned().collect();
            for picture in pictures_of(case, device, &rows, results)? {
                page.push_str(&picture);
            }
        }
        page.push_str("<details><summary>All figures</summary>");
        for row in &rows {
            let table = table::of_row(results, row);
            page.push_str(&format!("<h3>{}</h3>{}", escape(&table.title), html_table(&table)));
        }
        page.push_str("</details>");
    }
    page.push_str("<h2>Found out besides</h2><ul>");
    for (name, fact) in results.facts.iter().filter(|(name, _)| !name.starts_with("cut/")) {
        page.push_str(&format!("<li>{}: {}</li>", escape(name), escape(&fact.to_string())));
    }
    page.push_str("</ul></html>\n");
    Ok(page)
}

fn html_table(table: &Table) -> String {
    let mut text = String::from("<table><tr>");
    for cell in &table.head {
        text.push_str(&format!("<th>{}</th>", escape(cell)));
    }
    for line in &table.lines {
        text.push_str("</tr><tr>");
        for cell in line {
            let class = match cell.as_str() {
                "met" => " class=\"met\"",
                "not met" => " class=\"not-met\"",
                _ => "",
            };
            text.push_str(&format!("<td{class}>{}</td>", escape(cell)));
        }
    }
    text + "</tr></table>"
}

fn pictures_of(case: u32, device: Device, rows: &[Row], results: &Results) -> Result<Vec<String>> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let name = device.name();
    let mut all = Vec::new();
    match case {
        1 | 2 => {
            let against = ratio_bars(rows, results);
            if !against.is_empty() {
                let unit = "times the requests a second of qemu-storage-daemon";
                all.push(pictures::bars(&format!("Against qemu-storage-daemon, {name}"), unit, &against, Some(1.0))?);
            }
            let cpu = figure_bars(rows, results, "cpu_us");
            all.push(pictures::bars(&format!("CPU time of the server a request, {name}"), "microseconds", &cpu, None)?);
            for row in rows.iter().filter(|row| row.queues == 1 && row.what.ends_with("depth 32")) {
                all.push(latency(row, results)?);
            }
        }
        3 => all.extend(cuts(device, results)?),
        4 | 5 => {
            let rates = figure_bars(rows, results, "per_s");
            all.push(pictures::bars(&format!("Requests a second, {name}"), "requests a second", &rates, None)?);
        }
        6 => {
            let bars = figure_bars(rows, results, "with_snapshot_mib");
            all.push(pictures::bars("Resident memory with a snapshot of 16 TiB", "MiB", &bars, None)?);
        }
        _ => {
            let bars = figure_bars(rows, results, "first_answer_ms");
            all.push(pictures::bars(&format!("First answer after a restart, {name}"), "ms", &bars, None)?);
        }
    }
    Ok(all)
}

fn group(row: &Row) -> String {
    if row.queues == 1 { row.what.clone() } else { format!("{}, {} queues", row.what, row.queues) }
}

/// Bars of every contender's rate against QEMU's.
fn ratio_bars(rows: &[Row], results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    for row in rows {
        for backend in results.backends(row) {
            let (Some(qsd), _) = results.references(row, &backend) else { continue };
            if let Some(spread) = results.ratio(row, &backend, &qsd, "per_s") {
                bars.push(Bar { group: group(row), backend, spread });
            }
        }
    }
    bars
}

fn figure_bars(rows: &[Row], results: &Results, figure: &str) -> Vec<Bar> {
    let mut bars = Vec::new();
    for row in rows {
        for backend in results.backends(row) {
            if let Some(spread) = results.spread(row, &backend, figure) {
                bars.push(Bar { group: group(row), backend, spread });
            }
        }
    }
    bars
}

fn latency(row: &Row, results: &Results) -> Result<String> {
    let figures = ["p50_us", "p90_us", "p99_us", "p999_us", "max_us"];
    let line = |backend: String| {
        let of = |(i, figure): (usize, &&str)| Some((i as f64, results.spread(row, &backend, figure)?.median));
        Line { points: figures.iter().enumerate().filter_map(of).collect(), name: backend }
    };
    let lines: Vec<Line> = results.backends(row).into_iter().map(line).collect();
    let title = format!("Latency, {}, {}", row.what, row.device.name());
    pictures::percentiles(&title, &["p50", "p90", "p99", "p99.9", "longest"], &lines)
}

/// The time lines that case 3 kept.
fn cuts(device: Device, results: &Results) -> Result<Vec<String>> {
    let mut all = Vec::new();
    let prefix = format!("cut/{}/", device.name());
    for (name, fact) in results.facts.iter().filter(|(name, _)| name.starts_with(&prefix)) {
        let Some((what, backend)) = name[prefix.len()..].split_once('/') else { continue };
        let number_at = |key: &str| fact[key].as_f64().unwrap_or(0.0);
        let command = (number_at("from_ms"), number_at("to_ms"));
        for (key, unit) in [("requests", "requests in 10 ms"), ("longest_us", "longest, us")] {
            let values = fact[key].as_array().map(Vec::as_slice).unwrap_or_default();
            let values = values.iter().enumerate();
            let points: Vec<(f64, f64)> =
                values.map(|(i, v)| (i as f64 * number_at("slice_ms"), v.as_f64().unwrap_or(0.0))).collect();
            let took = number(command.1 - command.0);
            let title = format!("{backend}: {what}, {} (the command took {took} ms)", device.name());
            all.push(pictures::time_line(&title, unit, backend, &points, command)?);
        }
    }
    Ok(all)
}
