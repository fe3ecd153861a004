//! What was measured: one sample a round and backend, and the medians and ratios that follow from them.

use serde_json::{Map, Value, json};

use crate::load::Measured;
use crate::place::Device;

/// What is the same for all rounds and backends that are compared with each other.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Row {
    pub(crate) case: u32,
    pub(crate) what: String,
    pub(crate) device: Device,
    pub(crate) queues: usize,
}

/// What one backend showed in one round.
pub(crate) struct Sample {
    pub(crate) row: Row,
    pub(crate) backend: String,
    pub(crate) round: usize,
    /// Figures by their names; the unit is the end of the name.
    pub(crate) figures: Vec<(&'static str, f64)>,
}

impl Sample {
    pub(crate) fn figure(&self, name: &str) -> Option<f64> {
        self.figures.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }
}

/// The figures of a round of load.
pub(crate) fn figures(measured: &Measured, bytes: usize, cpu: std::time::Duration) -> Vec<(&'static str, f64)> {
    let at = |quantile| measured.latency.value_at_quantile(quantile) as f64 / 1000.0;
    let per_second = measured.per_second();
    vec![
        ("per_s", per_second),
        ("mib_per_s", per_second * bytes as f64 / f64::from(1 << 20)),
        ("p50_us", at(0.5)),
        ("p90_us", at(0.9)),
        ("p99_us", at(0.99)),
        ("p999_us", at(0.999)),
        ("max_us", measured.latency.max() as f64 / 1000.0),
        ("cpu_us", cpu.as_secs_f64() * 1e6 / measured.answered.max(1) as f64),
    ]
}

/// A value and how far the rounds are apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) rounds: usize,
}

impl Spread {
    /// The median and the quartiles; None without values.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.retain(|v| v.is_finite());
        if values.is_empty() {
            return None;
        }
        values.sort_by(f64::total_cmp);
        let at = |quantile: f64| {
            let place = quantile * (values.len() - 1) as f64;
            let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Some(Spread { median: at(0.5), low: at(0.25), high: at(0.75), rounds: values.len() })
    }

    pub(crate) fn json(self) -> Value {
        json!({ "median": self.median, "low": self.low, "high": self.high, "rounds": self.rounds })
    }
}

/// All samples of a run.
#[derive(Default)]
pub(crate) struct Results {
    samples: Vec<Sample>,
    /// The backends in the order in which they are shown; they are measured in another one each round.
    backends: Vec<String>,
    /// What cases found out besides, by name.
    pub(crate) facts: Map<String, Value>,
}

impl Results {
    pub(crate) fn add(&mut self, sample: Sample) {
        self.show(&sample.backend);
        self.samples.push(sample);
    }

    /// Shows a backend after those that are shown already.
    pub(crate) fn show(&mut self, backend: &str) {
        if !self.backends.iter().any(|name| name == backend) {
            self.backends.push(backend.to_owned());
        }
    }

    /// The rows in the order in which they were measured.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        for sample in &self.samples {
            if !rows.contains(&sample.row) {
                rows.push(sample.row.clone());
            }
        }
        rows
    }

    /// The backends of a row in the order in which they are shown.
    pub(crate) fn backends(&self, row: &Row) -> Vec<String> {
        let is_there = |name: &&String| self.samples.iter().any(|s| s.row == *row && s.backend == **name);
        self.backends.iter().filter(is_there).cloned().collect()
    }

    fn values(&self, row: &Row, backend: &str, figure: &str) -> Vec<(usize, f64)> {
        let of_it = self.samples.iter().filter(|s| s.row == *row && s.backend == backend);
        of_it.filter_map(|s| Some((s.round, s.figure(figure)?))).collect()
    }

    /// A backend's figure over all rounds.
    pub(crate) fn spread(&self, row: &Row, backend: &str, figure: &str) -> Option<Spread> {
        Spread::of(self.values(row, backend, figure).into_iter().map(|(_, v)| v).collect())
    }

    /// The ratio of two backends' figures, taken within each round: what drifts over the run is in both of them.
    pub(crate) fn ratio(&self, row: &Row, ours: &str, theirs: &str, figure: &str) -> Option<Spread> {
        self.ratio_between((row, ours), (row, theirs), figure)
    }

    /// The same with two rows.
    pub(crate) fn ratio_between(&self, ours: (&Row, &str), theirs: (&Row, &str), figure: &str) -> Option<Spread> {
        let others = self.values(theirs.0, theirs.1, figure);
        let of_round = |round| others.iter().find(|(r, _)| *r == round).map(|(_, v)| *v);
        let values = self.values(ours.0, ours.1, figure);
        Spread::of(values.into_iter().filter_map(|(round, v)| Some(v / of_round(round)?)).collect())
    }

    /// The backends that a backend of a row is held against: QEMU's counterpart, and the same thing with nothing in
    /// its way.
    pub(crate) fn references(&self, row: &Row, backend: &str) -> (Option<String>, Option<String>) {
        let all = self.backends(row);
        let there = |name: String| all.contains(&name).then_some(name).filter(|name| name != backend);
        // A further build is held against its own figures.
        let suffix = backend.find(" (also").map_or("", |at| &backend[at..]);
        let own = |name: &str| there(format!("{name}{suffix}"));
        let word = backend.strip_suffix(suffix).unwrap_or(backend);
        let qsd = match row.case {
            4 => there(format!("qsd {word}")),
            _ => all.iter().find(|name| name.starts_with("qsd")).cloned().and_then(there),
        };
        let base = match row.case {
            1 => own("io_uring"),
            2 if word.contains("mirror") => own("mirror, no snapshot"),
            2 => own("no snapshot").filter(|_| !word.starts_with("qsd")),
            4 if word.starts_with("qsd") => own("qsd alone"),
            4 => own("alone"),
            5 if word.contains("volume") => own("1 volume"),
            5 => own("1 snapshot"),
            _ => None,
        };
        (qsd, base)
    }

    /// The names of a row's figures.
    pub(crate) fn figure_names(&self, row: &Row) -> Vec<&'static str> {
        let mut names = Vec::new();
        for sample in self.samples.iter().filter(|s| s.row == *row) {
            for (name, _) in &sample.figures {
                if !names.contains(name) {
                    names.push(*name);
                }
            }
        }
        names
    }

    /// The row with these words, if it was measured.
    pub(crate) fn find(&self, case: u32, what: &str, device: Device, queues: usize) -> Option<Row> {
        self.rows().into_iter().find(|r| (r.case, &*r.what, r.device, r.queues) == (case, what, device, queues))
    }

    /// The raw rounds.
    pub(crate) fn rounds_json(&self) -> Value {
        let of_sample = |sample: &Sample| {
            let figures: Map<_, _> = sample.figures.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
            let Row { case, what, device, queues } = &sample.row;
            json!({
                "case": case, "what": what, "device": device.name(), "queues": queues,
                "backend": sample.backend, "round": sample.round, "figures": figures,
            })
        };
        self.samples.iter().map(of_sample).collect()
    }

    /// The medians and spreads of every figure of every row and backend.
    pub(crate) fn summary_json(&self) -> Value {
        let mut summary = Vec::new();
        for row in self.rows() {
            for backend in self.backends(&row) {
                let first = self.samples.iter().find(|s| s.row == row && s.backend == backend);
                let names = first.iter().flat_map(|s| s.figures.iter().map(|(name, _)| *name));
                let of_name = |name: &str| Some((name.to_owned(), self.spread(&row, &backend, name)?.json()));
                let figures: Map<_, _> = names.filter_map(of_name).collect();
                let Row { case, what, device, queues } = &row;
                summary.push(json!({
                    "case": case, "what": what, "device": device.name(), "queues": queues,
                    "backend": backend, "figures": figures,
                }));
            }
        }
        Value::Array(summary)
    }
}
