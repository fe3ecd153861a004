//! What is set of a disk or volume, as it is shown; and in what two configurations differ.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{DiskConfig, DiskPatch, Durability, Layout};

/// How guests see a disk or volume, and how its snapshots are taken. Of one that is not served, what its record does not
/// tell is 0 or empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Settings {
    /// The size of the sectors that guests see.
    #[serde(default)]
    pub logical_block_size: u32,
    /// How many data segments a request may have that suits the disk.
    #[serde(default)]
    pub segments_max: u16,
    /// What guests' discards are best multiples of.
    #[serde(default)]
    pub discard_granularity: u32,
    /// The most bytes of one range of a discard that suits the disk.
    #[serde(default)]
    pub discard_max: u64,
    /// The most virtqueues a frontend may use.
    pub queues: u16,
    /// What the guest sees as the serial.
    pub serial: String,
    /// What snapshots outlive that are taken from now on.
    pub durability: Durability,
    /// The most bytes that backups and jobs have in flight while the guest is at work; 0 for no limit.
    pub background_bytes: u32,
    /// How the blocks of snapshots lie that are taken from now on.
    pub layout: Layout,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            logical_block_size: 0,
            segments_max: 0,
            discard_granularity: 0,
            discard_max: 0,
            queues: 0,
            serial: String::new(),
            durability: Durability::Process,
            background_bytes: 0,
            layout: Layout::Auto,
        }
    }
}

impl Settings {
    /// What a configuration says.
    pub fn of(config: &DiskConfig) -> Self {
        Self {
            logical_block_size: config.logical_block_size(),
            segments_max: config.segments_max(),
            discard_granularity: config.discard_granularity(),
            discard_max: config.discard_max(),
            queues: config.queues(),
            serial: config.serial.clone().unwrap_or_default(),
            durability: config.durability(),
            background_bytes: config.background_bytes(),
            layout: config.layout(),
        }
    }
}

/// One key in which two configurations differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// As `--disk` and the options of `disk set` have it.
    pub key: String,
    /// The value of the one that is there.
    pub is: String,
    /// The value of the other one.
    pub wanted: String,
    /// Whether it can be changed while the disk is served.
    pub can_be_set: bool,
}

impl Difference {
    /// A key as the command line has it.
    pub fn option(key: &str) -> String {
        key.trim_end_matches("_bytes").replace('_', "-")
    }

    /// A value as the command line has it.
    fn text(key: &str, value: &serde_json::Value) -> String {
        match (key, value) {
            ("background_bytes", value) if value.as_u64() == Some(0) => "off".to_owned(),
            (_, serde_json::Value::Null) => "nothing".to_owned(),
            (_, serde_json::Value::Bool(on)) => if *on { "on" } else { "off" }.to_owned(),
            (_, serde_json::Value::String(text)) => text.clone(),
            (_, other) => other.to_string(),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}, not {}", self.key, self.is, self.wanted)
    }
}

impl DiskConfig {
    /// In what this and another one differ, with everything said.
    pub fn differences(&self, wanted: &Self) -> Vec<Difference> {
        let keys = |value: Result<serde_json::Value, _>| match value {
            Ok(serde_json::Value::Object(keys)) => keys,
            _ => serde_json::Map::new(),
        };
        let (is, wanted) = (keys(serde_json::to_value(self)), keys(serde_json::to_value(wanted)));
        let differs = is.into_iter().filter(|(key, value)| wanted.get(key) != Some(value));
        let to_difference = |(key, value): (String, serde_json::Value)| Difference {
            is: Difference::text(&key, &value),
            wanted: wanted.get(&key).map(|value| Difference::text(&key, value)).unwrap_or_default(),
            can_be_set: DiskPatch::KEYS.contains(&key.as_str()),
            key: Difference::option(&key),
        };
        differs.map(to_difference).collect()
    }
}
