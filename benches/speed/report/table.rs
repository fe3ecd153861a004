//! The table on the terminal: medians, and ratios with their quartiles.

use crate::results::{Results, Row, Spread};

/// Ratios as people read them.
fn ratio(spread: Option<Spread>) -> String {
    spread.map_or_else(|| "-".to_owned(), |s| format!("{:.2} ({:.2}-{:.2})", s.median, s.low, s.high))
}

fn number(value: f64) -> String {
    match value {
        v if v >= 10_000.0 => format!("{:.1}k", v / 1000.0),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn line(results: &Results, row: &Row, backend: &str) -> Vec<String> {
    let figure = |name| results.spread(row, backend, name).map_or_else(|| "-".to_owned(), |s| number(s.median));
    let against = |other: &str| {
        if backend == other { String::new() } else { ratio(results.ratio(row, backend, other, "per_s")) }
    };
    vec![
        backend.to_owned(),
        figure("per_s"),
        figure("mib_per_s"),
        figure("p50_us"),
        figure("p99_us"),
        figure("p999_us"),
        figure("max_us"),
        figure("cpu_us"),
        against("qsd"),
        against("io_uring"),
    ]
}

const HEAD: [&str; 10] =
    ["", "req/s", "MiB/s", "p50 us", "p99 us", "p99.9 us", "max us", "CPU us/req", "x qsd", "x io_uring"];

/// Prints all rows with a rate.
pub(crate) fn print(results: &Results) {
    for row in results.rows() {
        println!(
            "\n{} | {} | {} queue{}",
            row.what,
            row.device.name(),
            row.queues,
            if row.queues == 1 { "" } else { "s" }
        );
        print_lines(&HEAD.map(str::to_owned));
        for backend in results.backends(&row) {
            print_lines(&line(results, &row, &backend));
        }
    }
}

fn print_lines(cells: &[String]) {
    let mut text = String::new();
    for (i, cell) in cells.iter().enumerate() {
        match i {
            0 => text.push_str(&format!("  {cell:24}")),
            8.. => text.push_str(&format!(" {cell:>19}")),
            _ => text.push_str(&format!(" {cell:>10}")),
        }
    }
    println!("{}", text.trim_end());
}
