//! What the project wants to reach, beside what was measured. Whether it is met is computed, never written by hand.

use serde_json::{Value, json};

use super::table::Table;
use super::{number, ratio};
use crate::cases::{background, cut, first_writes, many, plain, scale};
use crate::place::Device;
use crate::results::{Results, Spread};
use crate::stage::QSD_IO_URING;

/// Medians of fewer rounds say nothing.
const ROUNDS_MIN: usize = 5;
/// Nor does a ratio to what is itself not the same from round to round: its upper quartile is at most so many times the lower.
const STEADY_MAX: f64 = 1.5;

/// Which side of the bound is wanted.
#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// One thing to reach.
pub(crate) struct Claim {
    what: String,
    unit: &'static str,
    bound: Bound,
    measured: Option<Spread>,
    /// What it is held against, by itself.
    other: Option<Spread>,
}

impl Claim {
    fn verdict(&self) -> &'static str {
        let Some(spread) = self.measured else { return "not measured" };
        let met = match self.bound {
            Bound::AtLeast(least) => spread.median >= least,
            Bound::AtMost(most) => spread.median <= most,
        };
        let is_steady = self.other.is_none_or(|other| other.high <= STEADY_MAX * other.low);
        match (spread.rounds < ROUNDS_MIN, is_steady, met) {
            (true, ..) => "too few rounds",
            (_, false, _) => "not measurable now",
            (.., true) => "met",
            (.., false) => "not met",
        }
    }

    fn bound_text(&self) -> String {
        match self.bound {
            Bound::AtLeast(least) => format!("at least {least}{}", self.unit),
            Bound::AtMost(most) => format!("at most {most}{}", self.unit),
        }
    }

    fn measured_text(&self) -> String {
        match self.measured {
            Some(s) if s.median >= 10.0 => format!("{} ({}-{})", number(s.median), number(s.low), number(s.high)),
            other => ratio(other),
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "what": self.what, "bound": self.bound_text(), "measured": self.measured.map(Spread::json),
            "verdict": self.verdict(),
        })
    }
}

/// All of it, in the order of the cases.
pub(crate) fn compute(results: &Results) -> Vec<Claim> {
    let mut claims = Vec::new();
    of_plain(results, &mut claims);
    of_first_writes(results, &mut claims);
    of_cut(results, &mut claims);
    of_background(results, &mut claims);
    of_many(results, &mut claims);
    let row = results.find(scale::CASE, scale::FOUR_DISKS, Device::Shm, 1);
    claims.push(Claim {
        what: "resident memory, idle, 4 disks connected".to_owned(),
        unit: " MiB",
        bound: Bound::AtMost(40.0),
        measured: row.and_then(|row| results.spread(&row, "halfsilver", "resident_mib")),
        other: None,
    });
    for (figure, what, unit, bound) in [
        ("with_volumes_mib", "resident memory", " MiB", Bound::AtMost(200.0)),
        ("slowest_create_ms", "the slowest creation", " ms", Bound::AtMost(1000.0)),
    ] {
        let row = results.find(scale::CASE, scale::VOLUMES, Device::Shm, 1);
        claims.push(Claim {
            what: format!("{}: {what}", scale::VOLUMES),
            unit,
            bound,
            measured: row.and_then(|row| results.spread(&row, "halfsilver", figure)),
            other: None,
        });
    }
    claims
}

fn of_plain(results: &Results, claims: &mut Vec<Claim>) {
    let mut add = |device: Device, what: &str, other: &str, figure: &str, of: &str, bound| {
        let row = results.find(plain::CASE, what, device, 1);
        claims.push(Claim {
            what: format!("{what}, {}: {of} against {other}", device.name()),
            unit: " x",
            bound,
            measured: row.as_ref().and_then(|row| results.ratio(row, "halfsilver", other, figure)),
            other: row.and_then(|row| results.spread(&row, other, figure)),
        });
    };
    add(Device::Shm, "4K random read depth 32", "qsd", "per_s", "rate", Bound::AtLeast(2.2));
    add(Device::Shm, "4K random read depth 32", QSD_IO_URING, "per_s", "rate", Bound::AtLeast(2.2));
    add(Device::Shm, "4K random read depth 32", "io_uring", "per_s", "rate", Bound::AtLeast(0.85));
    add(Device::Shm, "4K random write depth 32", "qsd", "per_s", "rate", Bound::AtLeast(2.2));
    add(Device::Shm, "4K random write depth 32", QSD_IO_URING, "per_s", "rate", Bound::AtLeast(2.2));
    for device in [Device::Shm, Device::Disk] {
        for what in ["4K random read depth 1", "4K random write depth 1"] {
            add(device, what, "qsd", "p50_us", "p50", Bound::AtMost(0.9));
        }
    }
    let on_disk = [
        "4K random read depth 32",
        "4K random write depth 32",
        "256K sequential read depth 8",
        "256K sequential write depth 8",
    ];
    for what in on_disk {
        add(Device::Disk, what, "io_uring", "per_s", "rate", Bound::AtLeast(0.95));
        add(Device::Disk, what, "qsd", "cpu_us", "server CPU a request", Bound::AtMost(0.7));
    }
    for device in [Device::Shm, Device::Disk] {
        let row = results.find(plain::CASE, plain::IDLE, device, 2);
        claims.push(Claim {
            what: format!("no spinning, {}: server CPU in an idle second", device.name()),
            unit: " us",
            bound: Bound::AtMost(1000.0),
            measured: row.and_then(|row| results.spread(&row, "halfsilver", "idle_cpu_us_per_s")),
            other: None,
        });
    }
}

fn of_first_writes(results: &Results, claims: &mut Vec<Claim>) {
    use first_writes::{COPY_ON_WRITE, NO_SNAPSHOT, QSD, SPARSE_FILE, WRITE_LOGGING};
    let mut add = |device: Device, ours: &str, other: &str, figure: &str, of: &str, bound| {
        let row = first_writes::reach_row(results, device);
        claims.push(Claim {
            what: format!("4K first writes depth 32, {}, {ours}: {of} against {other}", device.name()),
            unit: " x",
            bound,
            measured: row.as_ref().and_then(|row| results.ratio(row, ours, other, figure)),
            other: row.and_then(|row| results.spread(&row, other, figure)),
        });
    };
    add(Device::Disk, COPY_ON_WRITE, QSD, "per_s", "rate", Bound::AtLeast(1.6));
    add(Device::Shm, COPY_ON_WRITE, QSD, "per_s", "rate", Bound::AtLeast(4.0));
    add(Device::Shm, COPY_ON_WRITE, QSD, "p999_us", "p99.9", Bound::AtMost(0.25));
    add(Device::Disk, WRITE_LOGGING, NO_SNAPSHOT, "per_s", "rate", Bound::AtLeast(0.9));
    add(Device::Disk, WRITE_LOGGING, SPARSE_FILE, "per_s", "rate", Bound::AtLeast(0.9));
}

fn of_cut(results: &Results, claims: &mut Vec<Claim>) {
    for device in [Device::Shm, Device::Disk] {
        for what in [cut::READS, cut::WRITES] {
            for strategy in ["copy-on-write", "write-logging"] {
                let row = results.find(cut::CASE, what, device, 1);
                let of = |figure| row.as_ref().and_then(|row| results.spread(row, strategy, figure));
                claims.push(Claim {
                    what: format!("{what}, {}, {strategy}: rate around it against before", device.name()),
                    unit: " x",
                    bound: Bound::AtLeast(0.9),
                    measured: of("cut_ratio"),
                    other: None,
                });
                claims.push(Claim {
                    what: format!(
                        "{what}, {}, {strategy}: rate around it against the slower of before and after",
                        device.name()
                    ),
                    unit: " x",
                    bound: Bound::AtLeast(0.9),
                    measured: of("dip_ratio"),
                    other: None,
                });
                claims.push(Claim {
                    what: format!("{what}, {}, {strategy}: longest request against the longest before", device.name()),
                    unit: " x",
                    bound: Bound::AtMost(1.0),
                    measured: of("longest_ratio"),
                    other: None,
                });
                claims.push(Claim {
                    what: format!(
                        "{what}, {}, {strategy}: longest request against the longest before and after",
                        device.name()
                    ),
                    unit: " x",
                    bound: Bound::AtMost(1.0),
                    measured: of("longest_of_all_ratio"),
                    other: None,
                });
            }
        }
    }
}

fn of_background(results: &Results, claims: &mut Vec<Claim>) {
    for work in background::works() {
        for op in ["read", "write"] {
            let what = background::row_name(op, work);
            let row = results.find(background::CASE, &what, Device::Disk, 1);
            claims.push(Claim {
                what: format!("{what}, disk: rate against alone"),
                unit: " x",
                bound: Bound::AtLeast(0.8),
                measured: row.as_ref().and_then(|row| results.ratio(row, work, "alone", "per_s")),
                other: row.and_then(|row| results.spread(&row, "alone", "per_s")),
            });
        }
    }
}

fn of_many(results: &Results, claims: &mut Vec<Claim>) {
    for device in [Device::Shm, Device::Disk] {
        for what in [many::READS, many::WRITES] {
            for kind in many::Kind::ALL {
                let row = results.find(many::CASE, what, device, 1);
                let (ours, other) = (kind.name(32), kind.name(1));
                let ratio = row.as_ref().and_then(|row| results.ratio(row, &ours, &other, "per_s"));
                claims.push(Claim {
                    what: format!("{what}, {}: {ours} against {other}", device.name()),
                    unit: " x",
                    bound: Bound::AtLeast(0.95),
                    measured: ratio,
                    other: row.and_then(|row| results.spread(&row, &other, "per_s")),
                });
            }
        }
    }
}

/// All of it as a table.
pub(crate) fn table(claims: &[Claim]) -> Table {
    let line =
        |claim: &Claim| vec![claim.what.clone(), claim.bound_text(), claim.measured_text(), claim.verdict().to_owned()];
    let head = ["", "wanted", "median (quartiles)", ""].map(str::to_owned).to_vec();
    Table { title: "Reach".to_owned(), head, lines: claims.iter().map(line).collect() }
}
