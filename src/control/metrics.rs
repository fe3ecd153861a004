//! Counters, and how Prometheus reads them.
//!
//! A [`MetricsSnapshot`] is plain data that the service fills from its own counters at each scrape; nothing here is
//! touched by the data path, which only needs [`LatencyHistogram::bucket_index`] to know which of its own counters to
//! increment. Invariants: counters only grow while a disk exists; every disk has all five directions, so that a series
//! exists before its first request; times are seconds in the text and microseconds in the data.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::api::{Job, JobState, Leg, LegState};
use super::name::Name;

/// The media type of the text that [`MetricsSnapshot::encode`] writes.
pub const OPENMETRICS_TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The number of buckets with an upper bound: 1 µs, 2 µs, 4 µs … 2^24 µs (16.8 s).
pub const LATENCY_BUCKETS: usize = 25;

/// The kinds of requests that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
}

impl Direction {
    /// Every direction, in the order of [`DiskMetrics::directions`].
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// The value of the label `direction`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
        }
    }

    /// Its place in [`Direction::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// How long requests took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatencyHistogram {
    /// Entry `i` counts the requests of at most 2^i µs that are in no earlier entry; the last counts the rest.
    pub counts: [u64; LATENCY_BUCKETS + 1],
    /// The sum of all times, in microseconds.
    pub sum_us: u64,
}

impl LatencyHistogram {
    /// Which entry of [`LatencyHistogram::counts`] a request of this many microseconds belongs to.
    pub const fn bucket_index(latency_us: u64) -> usize {
        if latency_us <= 1 {
            return 0;
        }
        let log2_rounded_up = 64 - (latency_us - 1).leading_zeros() as usize;
        if log2_rounded_up < LATENCY_BUCKETS { log2_rounded_up } else { LATENCY_BUCKETS }
    }

    /// Counts one request.
    pub fn record(&mut self, latency_us: u64) {
        self.counts[Self::bucket_index(latency_us)] += 1;
        self.sum_us = self.sum_us.saturating_add(latency_us);
    }
}

/// The requests of one disk in one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectionMetrics {
    /// Requests completed, with or without success.
    pub requests: u64,
    /// Bytes moved by those that succeeded.
    pub bytes: u64,
    /// Requests completed with an error status.
    pub errors: u64,
    /// From the ring to the used ring.
    pub latency: LatencyHistogram,
}

/// The counters of one disk.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskMetrics {
    /// Its name.
    pub disk: Name,
    /// Frontends connected now.
    pub frontends_connected: u64,
    /// By [`Direction::index`].
    pub directions: [DirectionMetrics; Direction::ALL.len()],
    /// How long backups and jobs have waited for the guest, all of their steps together.
    pub background_wait_seconds: f64,
    /// Its legs, as in [`Disk::legs`](super::api::Disk::legs).
    pub legs: Vec<Leg>,
}

/// The counters of one snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotMetrics {
    /// The disk it was taken of.
    pub disk: Name,
    /// Its name.
    pub snapshot: Name,
    /// Blocks copied to it before they were overwritten.
    pub preserved_blocks: u64,
    /// The same in bytes.
    pub preserved_bytes: u64,
    /// How long its epoch took to drain; absent while it drains.
    pub drain_seconds: Option<f64>,
    /// Frontends that still write it rather than the live version.
    pub old_frontends: u64,
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricsSnapshot {
    /// One entry a disk.
    pub disks: Vec<DiskMetrics>,
    /// One entry a snapshot.
    pub snapshots: Vec<SnapshotMetrics>,
    /// All jobs; those that have ended are left out of the text.
    pub jobs: Vec<Job>,
}

impl MetricsSnapshot {
    /// The OpenMetrics text, which Prometheus reads.
    ///
    /// # Errors
    /// Never in practice: only writing to a `String` could fail.
    pub fn encode(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("halfsilver");
        registry.register_collector(Box::new(MetricsCollector(self)));
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// Gives a [`MetricsSnapshot`] to a registry.
#[derive(Debug)]
struct MetricsCollector(MetricsSnapshot);

/// No labels of its own: those of the family stand before it.
type NoLabels = [(&'static str, &'static str); 0];
type Labels<'a> = [(&'static str, &'a str); 2];

impl MetricsCollector {
    fn each_direction(
        &self,
        encoder: &mut MetricEncoder<'_>,
        encode: impl Fn(&mut MetricEncoder<'_>, &DirectionMetrics) -> fmt::Result,
    ) -> fmt::Result {
        for disk in &self.0.disks {
            for (direction, metrics) in Direction::ALL.iter().zip(&disk.directions) {
                let labels: Labels = [("disk", disk.disk.as_str()), ("direction", direction.as_str())];
                encode(&mut encoder.encode_family(&labels)?, metrics)?;
            }
        }
        Ok(())
    }

    fn each_snapshot(
        &self,
        encoder: &mut MetricEncoder<'_>,
        encode: impl Fn(&mut MetricEncoder<'_>, &SnapshotMetrics) -> fmt::Result,
    ) -> fmt::Result {
        for snapshot in &self.0.snapshots {
            let labels: Labels = [("disk", snapshot.disk.as_str()), ("snapshot", snapshot.snapshot.as_str())];
            encode(&mut encoder.encode_family(&labels)?, snapshot)?;
        }
        Ok(())
    }
}

impl MetricsCollector {
    fn legs(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let legs = || self.0.disks.iter().flat_map(|disk| disk.legs.iter().map(|leg| (disk.disk.as_str(), leg)));
        let help = "1 for the state that the leg is in, 0 for the others";
        let mut states = encoder.encode_descriptor("leg_state", help, None, MetricType::Gauge)?;
        for (disk, leg) in legs() {
            let path = leg.path.to_string_lossy();
            for state in LegState::ALL {
                let labels = [("disk", disk), ("leg", &*path), ("state", state.as_str())];
                states.encode_family(&labels)?.encode_gauge(&u64::from(leg.state == *state))?;
            }
        }
        let help = "Bytes to be copied until the leg is in sync";
        let mut remaining = encoder.encode_descriptor("leg_remaining_bytes", help, None, MetricType::Gauge)?;
        for (disk, leg) in legs() {
            let path = leg.path.to_string_lossy();
            remaining.encode_family(&[("disk", disk), ("leg", &*path)])?.encode_gauge(&leg.remaining_bytes)?;
        }
        Ok(())
    }

    fn each_unfinished_job(
        &self,
        encoder: &mut MetricEncoder<'_>,
        encode: impl Fn(&mut MetricEncoder<'_>, &Job) -> fmt::Result,
    ) -> fmt::Result {
        let unfinished = |job: &&Job| matches!(job.state, JobState::Running | JobState::Stopped);
        for job in self.0.jobs.iter().filter(unfinished) {
            let id = job.id.to_string();
            let labels = [("job", &*id), ("kind", job.kind.as_str()), ("disk", job.disk.as_str())];
            encode(&mut encoder.encode_family(&labels)?, job)?;
        }
        Ok(())
    }
}

fn counter(encoder: &mut MetricEncoder<'_>, value: u64) -> fmt::Result {
    encoder.encode_counter::<NoLabels, u64, f64>(&value, None)
}

#[expect(clippy::cast_precision_loss, reason = "a sum of 2^53 µs, 285 years, is still exact")]
fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

fn histogram(encoder: &mut MetricEncoder<'_>, latency: &LatencyHistogram) -> fmt::Result {
    let bound = |index: usize| if index < LATENCY_BUCKETS { seconds(1 << index) } else { f64::INFINITY };
    let buckets: Vec<(f64, u64)> = latency.counts.iter().enumerate().map(|(i, count)| (bound(i), *count)).collect();
    let count = latency.counts.iter().sum();
    encoder.encode_histogram::<NoLabels>(seconds(latency.sum_us), count, &buckets, None)
}

impl Collector for MetricsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge, Histogram, Info};

        let mut info = encoder.encode_descriptor("build", "What is running", None, Info)?;
        info.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;

        let mut requests = encoder.encode_descriptor("requests", "Requests completed", None, Counter)?;
        self.each_direction(&mut requests, |encoder, metrics| counter(encoder, metrics.requests))?;
        let mut bytes =
            encoder.encode_descriptor("request_bytes", "Bytes moved by requests that succeeded", None, Counter)?;
        self.each_direction(&mut bytes, |encoder, metrics| counter(encoder, metrics.bytes))?;
        let mut errors =
            encoder.encode_descriptor("request_errors", "Requests completed with an error", None, Counter)?;
        self.each_direction(&mut errors, |encoder, metrics| counter(encoder, metrics.errors))?;
        let help = "Time from the ring to the used ring";
        let mut latency = encoder.encode_descriptor("request_duration", help, Some(&Unit::Seconds), Histogram)?;
        self.each_direction(&mut latency, |encoder, metrics| histogram(encoder, &metrics.latency))?;

        let mut frontends = encoder.encode_descriptor("frontends_connected", "Frontends connected now", None, Gauge)?;
        for disk in &self.0.disks {
            let labels = [("disk", disk.disk.as_str())];
            frontends.encode_family(&labels)?.encode_gauge(&disk.frontends_connected)?;
        }

        let help = "How long backups and jobs have waited while the guest was at work, all their steps together";
        let mut waits = encoder.encode_descriptor("background_wait", help, Some(&Unit::Seconds), Counter)?;
        for disk in &self.0.disks {
            let labels = [("disk", disk.disk.as_str())];
            let waited = disk.background_wait_seconds;
            waits.encode_family(&labels)?.encode_counter::<NoLabels, f64, f64>(&waited, None)?;
        }

        let help = "Blocks copied to the snapshot before they were overwritten";
        let mut blocks = encoder.encode_descriptor("preserved_blocks", help, None, Counter)?;
        self.each_snapshot(&mut blocks, |encoder, metrics| counter(encoder, metrics.preserved_blocks))?;
        let help = "Bytes copied to the snapshot before they were overwritten";
        let mut bytes = encoder.encode_descriptor("preserved_bytes", help, None, Counter)?;
        self.each_snapshot(&mut bytes, |encoder, metrics| counter(encoder, metrics.preserved_bytes))?;
        let help = "Time from the cut until the last request of the old epoch was done";
        let mut drain = encoder.encode_descriptor("drain", help, Some(&Unit::Seconds), Gauge)?;
        for snapshot in &self.0.snapshots {
            let Some(drain_seconds) = snapshot.drain_seconds else { continue };
            let labels: Labels = [("disk", snapshot.disk.as_str()), ("snapshot", snapshot.snapshot.as_str())];
            drain.encode_family(&labels)?.encode_gauge(&drain_seconds)?;
        }
        let help = "Frontends that still write the snapshot rather than the live version";
        let mut old = encoder.encode_descriptor("old_frontends", help, None, Gauge)?;
        self.each_snapshot(&mut old, |encoder, metrics| encoder.encode_gauge(&metrics.old_frontends))?;
        self.legs(&mut encoder)?;
        let mut done = encoder.encode_descriptor("job_done_bytes", "What the job has done", None, Gauge)?;
        self.each_unfinished_job(&mut done, |encoder, job| encoder.encode_gauge(&job.done_bytes))?;
        let mut total = encoder.encode_descriptor("job_total_bytes", "What the job has to do in all", None, Gauge)?;
        self.each_unfinished_job(&mut total, |encoder, job| encoder.encode_gauge(&job.total_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_is_at_most_its_bound() {
        for (latency_us, index) in
            [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1 << 24, 24), ((1 << 24) + 1, 25), (u64::MAX, 25)]
        {
            assert_eq!(LatencyHistogram::bucket_index(latency_us), index, "{latency_us}");
        }
    }

    #[test]
    fn directions_are_indexed_by_their_order() {
        for (index, direction) in Direction::ALL.iter().enumerate() {
            assert_eq!(direction.index(), index);
        }
    }
}
