//! The results as tables of words, for the terminal, the page and the documentation.

use super::{number, ratio};
use crate::results::{Results, Row};

/// A row of the results as a table: a title, a head and lines.
pub(crate) struct Table {
    pub(crate) title: String,
    pub(crate) head: Vec<String>,
    pub(crate) lines: Vec<Vec<String>>,
}

pub(crate) fn title(row: &Row) -> String {
    let s = if row.queues == 1 { "" } else { "s" };
    format!("{} | {} | {} queue{s}", row.what, row.device.name(), row.queues)
}

const OF_LOAD: [(&str, &str); 8] = [
    ("per_s", "req/s"),
    ("mib_per_s", "MiB/s"),
    ("p50_us", "p50 us"),
    ("p99_us", "p99 us"),
    ("p999_us", "p99.9 us"),
    ("max_us", "max us"),
    ("cpu_us", "CPU us/req"),
    ("beside_mib_per_s", "beside MiB/s"),
];

pub(crate) fn of_row(results: &Results, row: &Row) -> Table {
    let names = results.figure_names(row);
    let is_load = names.contains(&"per_s");
    let columns: Vec<(&str, String)> = if is_load {
        let there = OF_LOAD.iter().filter(|(name, _)| names.contains(name));
        there.map(|(name, title)| (*name, (*title).to_owned())).collect()
    } else {
        names.iter().map(|name| (*name, name.replace('_', " "))).collect()
    };
    let mut head = vec![String::new()];
    head.extend(columns.iter().map(|(_, title)| title.clone()));
    if is_load {
        head.extend(["x qsd".to_owned(), base_title(row).to_owned()]);
    }
    let line = |backend: String| {
        let mut cells = vec![backend.clone()];
        for (name, _) in &columns {
            let spread = results.spread(row, &backend, name);
            cells.push(spread.map_or_else(|| "-".to_owned(), |s| number(s.median)));
        }
        if is_load {
            let (qsd, base) = results.references(row, &backend);
            for other in [qsd, base] {
                cells.push(other.map_or_else(String::new, |o| ratio(results.ratio(row, &backend, &o, "per_s"))));
            }
        }
        cells
    };
    let lines = results.backends(row).into_iter().map(line).collect();
    Table { title: title(row), head, lines }
}

/// What the last column compares with.
fn base_title(row: &Row) -> &'static str {
    match row.case {
        1 => "x io_uring",
        2 => "x no snapshot",
        4 => "x alone",
        5 => "x one",
        _ => "x base",
    }
}

/// Prints all rows.
pub(crate) fn print(results: &Results) {
    for row in results.rows() {
        print_table(&of_row(results, &row));
    }
}

pub(crate) fn print_table(table: &Table) {
    let Table { title, head, lines } = table;
    println!("\n{title}");
    let width = |i: usize| lines.iter().chain([head]).map(|l| l[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    for line in [head].into_iter().chain(lines) {
        let mut text = String::from("  ");
        for (i, cell) in line.iter().enumerate() {
            let pad = " ".repeat(widths[i] - cell.chars().count());
            text.push_str(&if i == 0 { format!("{cell}{pad}") } else { format!("  {pad}{cell}") });
        }
        println!("{}", text.trim_end());
    }
}
