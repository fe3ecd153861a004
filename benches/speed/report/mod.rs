//! What is shown of the results: a table, JSON, and a page with pictures.

pub(crate) mod docs;
pub(crate) mod machine;
pub(crate) mod page;
pub(crate) mod pictures;
pub(crate) mod reach;
pub(crate) mod table;

use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::results::{Results, Spread};
use crate::settings::Settings;

/// Ratios as people read them: the median and the quartiles.
pub(crate) fn ratio(spread: Option<Spread>) -> String {
    spread.map_or_else(|| "-".to_owned(), |s| format!("{:.2} ({:.2}-{:.2})", s.median, s.low, s.high))
}

pub(crate) fn number(value: f64) -> String {
    match value {
        v if !v.is_finite() => "-".to_owned(),
        v if v >= 10_000.0 => format!("{:.1}k", v / 1000.0),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Writes results.json and the page.
pub(crate) fn write(out: &Path, settings: &Settings, results: &Results) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let machine = machine::describe(settings);
    let reach = reach::compute(results);
    let all = json!({
        "machine": machine,
        "settings": {
            "quick": settings.quick, "cases": settings.cases, "rounds": settings.rounds,
            "round_ms": settings.round.as_secs_f64() * 1000.0, "image_bytes": settings.image_bytes(),
        },
        "reach": reach.iter().map(reach::Claim::json).collect::<Value>(),
        "summary": results.summary_json(),
        "facts": results.facts,
        "rounds": results.rounds_json(),
    });
    std::fs::write(out.join("results.json"), serde_json::to_string_pretty(&all)?)?;
    let page = page::html(&machine, settings, &reach, results)?;
    std::fs::write(out.join("index.html"), page)?;
    Ok(())
}
