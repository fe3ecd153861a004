//! The types of disks and their legs: how a disk is to be served, and how it is.
//!
//! The rules of the whole module hold here too: what a client sends is unchecked until its `check` has passed.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::settings::Settings;
use super::{
    BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, DiskState, Durability, Layout, LegState, QUEUES_MAX, RestoreStatus, SERIAL_LEN_MAX,
    check_absolute, check_socket, invalid,
};
use crate::control::error::{ApiError, ErrorCode};
use crate::control::name::Name;

/// [`DiskConfig::background_bytes`] when nothing is said.
const BACKGROUND_BYTES: u32 = 128 << 10;
const BACKGROUND_BYTES_MAX: u32 = 1 << 30;
/// What the transfers of any device are multiples of.
const BACKGROUND_BYTES_UNIT: u32 = 4096;

/// [`DiskConfig::logical_block_size`] when nothing was ever said.
const LOGICAL_BLOCK_SIZE: u32 = 512;
/// [`DiskConfig::segments_max`] when nothing is said, and at most: what the largest ring holds.
const SEGMENTS_MAX: (u16, u16) = (126, 32766);
/// [`DiskConfig::discard_granularity`] when nothing is said, at least and at most.
const DISCARD_GRANULARITY: (u32, u32, u32) = (32 << 10, 4096, 1 << 30);
/// [`DiskConfig::discard_max`] when nothing is said, and at most: what the config space can say.
const DISCARD_MAX: (u64, u64) = (1 << 30, (u32::MAX as u64) << 9);

/// How a disk is served: what `--disk` and `PUT /v1/disks/{disk}` say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image: an absolute path of a raw file or block device.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// A second image that is kept equal, as RAID-1 does: the other leg, an absolute path.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub mirror: Option<PathBuf>,
    /// The vhost-user socket, an absolute path; `<run-dir>/<disk>.sock` when absent.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// The most virtqueues a frontend may use, 1 to 16; what was set or 1 when absent.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 16)]
    pub queues: Option<u16>,
    /// Whether the image is opened with O_DIRECT.
    #[serde(default = "yes")]
    pub direct: bool,
    /// Whether guests may only read; what was set or false when absent.
    #[serde(default)]
    pub readonly: Option<bool>,
    /// What the guest sees as the serial, up to 20 printable ASCII characters; what was set or the disk's name when absent.
    #[serde(default)]
    pub serial: Option<String>,
    /// The size of the blocks that tables count in: a power of two from 4096 to 1048576.
    #[serde(default = "block_size_min")]
    pub block_size: u32,
    /// The size of the sectors that guests see, 512 or 4096, which stays the same for the life of the disk, wherever its
    /// image is; what was said when it was added or 512 when absent.
    #[serde(default)]
    #[schema(minimum = 512, maximum = 4096)]
    pub logical_block_size: Option<u32>,
    /// How many data segments a request may have that suits the disk, 1 to 32766; what was set or 126 when absent. A request
    /// with more is served too. A guest whose rings have fewer entries than two more, and no indirect descriptors, needs it
    /// smaller: 6 for a queue size of 8.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 32766)]
    pub segments_max: Option<u16>,
    /// What guests' discards are best multiples of: a power of two from 4096 to 1073741824; what was set or 32768, below which
    /// Windows discards nothing, when absent.
    #[serde(default)]
    pub discard_granularity: Option<u32>,
    /// The most bytes of one range of a discard that suits the disk, a multiple of 512; what was set or 1073741824 when
    /// absent. A larger one is served too.
    #[serde(default)]
    pub discard_max: Option<u64>,
    /// Whether several frontends may be connected at the same time.
    #[serde(default)]
    pub shared: bool,
    /// What snapshots outlive that are taken from now on; what was set or `process` when absent.
    #[serde(default)]
    pub durability: Option<Durability>,
    /// The most bytes that backups and jobs have in flight while the guest is at work: a multiple of 4096 up to
    /// 1073741824; 0 for no limit; what was set or 131072 when absent.
    #[serde(default)]
    #[schema(maximum = 1_073_741_824)]
    pub background_bytes: Option<u32>,
    /// How the blocks of snapshots lie that are taken from now on; what was set or `auto` when absent.
    #[serde(default)]
    pub layout: Option<Layout>,
}

fn yes() -> bool {
    true
}

fn block_size_min() -> u32 {
    BLOCK_SIZE_MIN
}

/// Whether tables can count in blocks of that size.
pub(super) fn check_block_size(key: &str, size: u32) -> Result<(), ApiError> {
    match size.is_power_of_two() && (BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&size) {
        true => Ok(()),
        false => Err(invalid(format!("{key}: {size} is not a power of two from 4K to 1M"))),
    }
}

impl DiskConfig {
    /// The configuration with nothing but the image given.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            mirror: None,
            socket: None,
            queues: None,
            direct: yes(),
            readonly: None,
            serial: None,
            block_size: block_size_min(),
            logical_block_size: None,
            segments_max: None,
            discard_granularity: None,
            discard_max: None,
            shared: false,
            durability: None,
            background_bytes: None,
            layout: None,
        }
    }

    /// The most virtqueues a frontend may use.
    pub fn queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// Whether guests may only read.
    pub fn readonly(&self) -> bool {
        self.readonly.unwrap_or(false)
    }

    /// What snapshots outlive.
    pub fn durability(&self) -> Durability {
        self.durability.unwrap_or(Durability::Process)
    }

    /// The size of the sectors that guests see.
    pub fn logical_block_size(&self) -> u32 {
        self.logical_block_size.unwrap_or(LOGICAL_BLOCK_SIZE)
    }

    /// How many data segments a request may have that suits the disk.
    pub fn segments_max(&self) -> u16 {
        self.segments_max.unwrap_or(SEGMENTS_MAX.0)
    }

    /// What guests' discards are best multiples of.
    pub fn discard_granularity(&self) -> u32 {
        self.discard_granularity.unwrap_or(DISCARD_GRANULARITY.0)
    }

    /// How the blocks of snapshots lie.
    pub fn layout(&self) -> Layout {
        self.layout.unwrap_or(Layout::Auto)
    }

    /// The most bytes of one range of a discard that suits the disk.
    pub fn discard_max(&self) -> u64 {
        self.discard_max.unwrap_or(DISCARD_MAX.0)
    }

    /// The most bytes that backups and jobs have in flight while the guest is at work; 0 for no limit.
    pub fn background_bytes(&self) -> u32 {
        self.background_bytes.unwrap_or(BACKGROUND_BYTES)
    }

    /// The same with everything said but the places and the serial.
    #[must_use]
    pub fn filled(self) -> Self {
        Self {
            queues: Some(self.queues()),
            readonly: Some(self.readonly()),
            durability: Some(self.durability()),
            background_bytes: Some(self.background_bytes()),
            logical_block_size: Some(self.logical_block_size()),
            segments_max: Some(self.segments_max()),
            discard_granularity: Some(self.discard_granularity()),
            discard_max: Some(self.discard_max()),
            layout: Some(self.layout()),
            ..self
        }
    }

    /// What is said here; where nothing is, what was set.
    #[must_use]
    pub fn or_set(self, set: &DiskPatch) -> Self {
        set.clone().with(&DiskPatch::of(&self)).put_into(self)
    }

    /// With what a patch says in the place of what is said here.
    #[must_use]
    pub fn patched(&self, patch: &DiskPatch) -> Self {
        DiskPatch::of(self).with(patch).put_into(self.clone())
    }

    /// Whether every value is one that could be served.
    ///
    /// # Errors
    /// `invalid-request`, with a message that starts with the key.
    pub fn check(&self) -> Result<(), ApiError> {
        check_absolute("path", &self.path)?;
        if let Some(mirror) = &self.mirror {
            check_absolute("mirror", mirror)?;
            if *mirror == self.path {
                return Err(invalid(format!("mirror: {} is the disk's path already", mirror.display()))
                    .with_action("name another image, best on another device"));
            }
            if self.readonly() {
                return Err(invalid("mirror: a disk with readonly=on cannot have one".to_owned())
                    .with_action("leave out one of the two"));
            }
        }
        if let Some(socket) = &self.socket {
            check_socket("socket", socket)?;
        }
        check_block_size("block-size", self.block_size)?;
        if let Some(size) = self.logical_block_size.filter(|size| ![512, 4096].contains(size)) {
            return Err(invalid(format!("logical-block-size: {size} is neither 512 nor 4096")));
        }
        DiskPatch::of(self).check()
    }

    /// Where the disk's vhost-user socket goes.
    pub fn socket_or_default(&self, run_dir: &Path, disk: &Name) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| run_dir.join(format!("{disk}.sock")))
    }
}

/// What is done to each key that can be set, written down once.
macro_rules! settings {
    ($($key:ident),* $(,)?) => {
        impl DiskPatch {
            /// The keys, as JSON has them.
            pub const KEYS: &[&str] = &[$(stringify!($key)),*];

            /// What a configuration says of what can be changed.
            pub fn of(config: &DiskConfig) -> Self {
                Self { $($key: config.$key.clone()),* }
            }

            /// A configuration that says this.
            fn put_into(self, config: DiskConfig) -> DiskConfig {
                DiskConfig { $($key: self.$key,)* ..config }
            }

            /// What was set before and what is set now.
            #[must_use]
            pub fn with(self, newer: &Self) -> Self {
                Self { $($key: newer.$key.clone().or(self.$key)),* }
            }

            /// What of it a configuration has as well: what it says otherwise was said later, and is set no more.
            #[must_use]
            pub fn still_in(self, config: &DiskConfig) -> Self {
                Self { $($key: self.$key.filter(|set| Some(set) == config.$key.as_ref())),* }
            }
        }
    };
}

/// What of a disk or volume can be changed while it is served: the body of `PATCH /v1/disks/{disk}`. What is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskPatch {
    /// What snapshots outlive that are taken from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durability: Option<Durability>,
    /// The most bytes that backups and jobs have in flight while the guest is at work: a multiple of 4096 up to
    /// 1073741824; 0 for no limit. Counts at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1_073_741_824)]
    pub background_bytes: Option<u32>,
    /// The most virtqueues of the next frontend, 1 to 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub queues: Option<u16>,
    /// Whether the next frontend may only read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readonly: Option<bool>,
    /// What the next frontend sees as the serial, up to 20 printable ASCII characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How many data segments a request of the next frontend may have that suits the disk, 1 to 32766.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32766)]
    pub segments_max: Option<u16>,
    /// What discards of the next frontend are best multiples of: a power of two from 4096 to 1073741824.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard_granularity: Option<u32>,
    /// The most bytes of one range of a discard of the next frontend that suits the disk, a multiple of 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard_max: Option<u64>,
    /// How the blocks of snapshots lie that are taken from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
}

settings!(
    durability,
    layout,
    background_bytes,
    queues,
    readonly,
    serial,
    segments_max,
    discard_granularity,
    discard_max
);

impl DiskPatch {
    /// Whether every value is one that could be served.
    ///
    /// # Errors
    /// `invalid-request`, with a message that starts with the key.
    pub fn check(&self) -> Result<(), ApiError> {
        if let Some(queues) = self.queues.filter(|queues| !(1..=QUEUES_MAX).contains(queues)) {
            return Err(invalid(format!("queues: {queues} is not from 1 to {QUEUES_MAX}")));
        }
        let fits = |window: u32| window <= BACKGROUND_BYTES_MAX && window.is_multiple_of(BACKGROUND_BYTES_UNIT);
        if let Some(window) = self.background_bytes.filter(|window| !fits(*window)) {
            return Err(invalid(format!("background: {window} is neither off nor a multiple of 4K up to 1024M")));
        }
        let (segments, (least, most)) = (1..=SEGMENTS_MAX.1, (DISCARD_GRANULARITY.1, DISCARD_GRANULARITY.2));
        if let Some(wrong) = self.segments_max.filter(|n| !segments.contains(n)) {
            return Err(invalid(format!("segments-max: {wrong} is not from 1 to {}", SEGMENTS_MAX.1)));
        }
        let suits = |bytes: u32| bytes.is_power_of_two() && (least..=most).contains(&bytes);
        if let Some(wrong) = self.discard_granularity.filter(|bytes| !suits(*bytes)) {
            return Err(invalid(format!("discard-granularity: {wrong} is not a power of two from 4K to 1024M")));
        }
        let suits = |bytes: u64| bytes > 0 && bytes.is_multiple_of(512) && bytes <= DISCARD_MAX.1;
        if let Some(wrong) = self.discard_max.filter(|bytes| !suits(*bytes)) {
            return Err(invalid(format!("discard-max: {wrong} is not a multiple of 512 up to {}", DISCARD_MAX.1)));
        }
        match &self.serial {
            Some(serial) if serial.len() > SERIAL_LEN_MAX || serial.is_empty() => {
                Err(invalid(format!("serial: {serial:?} is not 1 to {SERIAL_LEN_MAX} characters long")))
            }
            Some(serial) if !serial.bytes().all(|byte| matches!(byte, 0x20..=0x7e)) => {
                Err(invalid(format!("serial: {serial:?} has characters other than printable ASCII")))
            }
            _ => Ok(()),
        }
    }

    /// The same, and whether anything is to be changed at all.
    ///
    /// # Errors
    /// `invalid-request`.
    pub fn check_change(&self) -> Result<(), ApiError> {
        if *self == Self::default() {
            return Err(invalid(format!("none of {} is there", Self::KEYS.join(", "))));
        }
        self.check()
    }
}

/// The body of `PUT /v1/disks/{disk}/size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// The new size in bytes, a multiple of 512. It is not less than what the disk has.
    pub size_bytes: u64,
}

impl ResizeRequest {
    /// The new size, if it is one.
    ///
    /// # Errors
    /// `invalid-request`.
    pub fn validate(&self) -> Result<u64, ApiError> {
        match self.size_bytes {
            0 => Err(ApiError::new(ErrorCode::InvalidRequest, "size_bytes: a disk has at least one sector")),
            bytes if !bytes.is_multiple_of(512) => {
                Err(ApiError::new(ErrorCode::InvalidRequest, format!("size_bytes: {bytes} is no multiple of 512")))
            }
            bytes => Ok(bytes),
        }
    }
}

/// The body of `POST /v1/disks/{disk}/rename`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameRequest {
    /// The new name. No disk or volume may have it.
    pub name: String,
    /// Also while a frontend is connected to a socket that is called after the disk: it stays connected, and finds the
    /// socket under the new name only when it connects again.
    #[serde(default)]
    pub force: bool,
}

impl RenameRequest {
    /// The new name, if it is one.
    ///
    /// # Errors
    /// `invalid-name`.
    pub fn validate(&self) -> Result<Name, ApiError> {
        Ok(self.name.parse()?)
    }
}

/// A disk. Of one that is not served `size_bytes` and `allocated_bytes` are 0, and what its record does not tell is null, 0,
/// false or empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Stays the same as long as the disk exists, across restarts; null when its record cannot be read.
    #[schema(value_type = Option<String>, format = "uuid")]
    pub id: Option<Uuid>,
    /// Its name.
    pub name: Name,
    /// The image; with a mirror, the first leg. Null when its record cannot be read.
    #[schema(value_type = Option<String>)]
    pub path: Option<PathBuf>,
    /// The vhost-user socket. Null when its record cannot be read.
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// The size that guests see.
    pub size_bytes: u64,
    /// The size of the blocks that tables count in.
    pub block_size: u32,
    /// How guests see it, and how its snapshots are taken.
    #[serde(flatten)]
    pub settings: Settings,
    /// Whether the image is opened with O_DIRECT.
    pub direct: bool,
    /// Whether guests may only read.
    pub readonly: bool,
    /// Whether it can be used.
    pub state: DiskState,
    /// Why it failed, or is not served.
    pub reason: Option<String>,
    /// Whether any frontend is connected.
    pub connected: bool,
    /// How many frontends are connected.
    pub frontends: u32,
    /// The processes of those, as far as the system tells.
    #[serde(default)]
    pub frontend_pids: Vec<u32>,
    /// The epoch in which its live version began.
    pub epoch: u64,
    /// How many snapshots it has.
    pub snapshots: u32,
    /// The storage that its image takes.
    pub allocated_bytes: u64,
    /// Whether several frontends may be connected at the same time.
    pub shared: bool,
    /// The images that are kept equal; empty when the disk has no mirror.
    pub legs: Vec<Leg>,
    /// The restore in place that is under way.
    #[serde(default)]
    pub restoring: Option<RestoreStatus>,
}

impl Disk {
    /// A disk of which nothing is known but that it cannot be served.
    pub fn unserved(name: Name, reason: String) -> Self {
        Self {
            id: None,
            name,
            path: None,
            socket: None,
            size_bytes: 0,
            block_size: 0,
            settings: Settings::default(),
            direct: false,
            readonly: false,
            state: DiskState::Unserved,
            reason: Some(reason),
            connected: false,
            frontends: 0,
            frontend_pids: Vec::new(),
            epoch: 0,
            snapshots: 0,
            allocated_bytes: 0,
            shared: false,
            legs: Vec::new(),
            restoring: None,
        }
    }

    /// The same, with what its configuration says.
    #[must_use]
    pub fn with_config(self, config: &DiskConfig) -> Self {
        Self {
            path: Some(config.path.clone()),
            socket: config.socket.clone(),
            block_size: config.block_size,
            settings: Settings::of(config),
            direct: config.direct,
            readonly: config.readonly(),
            shared: config.shared,
            ..self
        }
    }
}

/// One of the two images of a mirrored disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Leg {
    /// The image.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// How well it is.
    pub state: LegState,
    /// Why it is not in sync.
    pub reason: Option<String>,
    /// How much has to be copied until it is in sync.
    pub remaining_bytes: u64,
}

/// The body of `POST /v1/disks/{disk}/mirror`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorRequest {
    /// The image that becomes the second leg, an absolute path. Whatever it holds is overwritten.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

impl MirrorRequest {
    /// Whether the path is one.
    ///
    /// # Errors
    /// `invalid-request`.
    pub fn check(&self) -> Result<(), ApiError> {
        check_absolute("path", &self.path)
    }
}

/// The query of `DELETE /v1/disks/{disk}/mirror`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LegQuery {
    /// The leg to let go, an absolute path; the second one when absent.
    #[serde(default)]
    #[param(value_type = Option<String>, required = false)]
    pub leg: Option<PathBuf>,
}

impl LegQuery {
    /// Whether the path is one.
    ///
    /// # Errors
    /// `invalid-request`.
    pub fn check(&self) -> Result<(), ApiError> {
        self.leg.as_ref().map_or(Ok(()), |leg| check_absolute("leg", leg))
    }
}
