//! What a disk or volume has to do with others: what it stands on, or stood on; whether it is served; and the work on it
//! that goes on after a restart. Remembered in its record, and held by its entry.

use crate::control::Name;
use crate::control::api::{DiskPatch, VolumeState};
use crate::store::{DiskRecord, VolumeRecord, WorkRecord};

use crate::manager::entry::{DiskEntry, locked};

/// See above. A disk that never was a volume has nothing of this but perhaps work.
#[derive(Clone, Debug, Default)]
pub(crate) struct Relations {
    /// What it stands on, if it is a volume.
    pub(crate) volume: Option<VolumeRecord>,
    /// What it stood on, if it is a volume that became independent.
    pub(crate) stood_on: Option<VolumeRecord>,
    /// Whether its socket is closed until it is enabled.
    pub(crate) disabled: bool,
    /// Whether its full image was made here, under the name of the disk's identifier.
    pub(crate) own_image: bool,
    /// The logical block size that guests have always seen, whatever the image has.
    pub(crate) logical_block_bytes: Option<u32>,
    /// What a job is doing to it.
    pub(crate) work: Option<WorkRecord>,
    /// The live version that an update is about to give it.
    pub(crate) next_live: Option<uuid::Uuid>,
    /// What was set while it was served, and counts where a configuration says nothing.
    pub(crate) set: DiskPatch,
}

impl Relations {
    pub(crate) fn of(record: &DiskRecord) -> Relations {
        Relations {
            volume: record.volume.clone(),
            stood_on: record.stood_on.clone(),
            disabled: record.disabled,
            own_image: record.own_image,
            logical_block_bytes: record.logical_block_bytes,
            work: record.work.clone(),
            next_live: record.next_live,
            set: set_of(record),
        }
    }

    pub(crate) fn put_into(&self, record: &mut DiskRecord) {
        record.volume.clone_from(&self.volume);
        record.stood_on.clone_from(&self.stood_on);
        record.disabled = self.disabled;
        record.own_image = self.own_image;
        record.logical_block_bytes = self.logical_block_bytes;
        record.work.clone_from(&self.work);
        record.next_live = self.next_live;
        record.set = serde_json::to_value(&self.set).expect("settings are plain data");
    }

    /// What it stands on, or stood on.
    pub(crate) fn relation(&self) -> Option<&VolumeRecord> {
        self.volume.as_ref().or(self.stood_on.as_ref())
    }
}

impl DiskEntry {
    /// Whether it is a volume, also an independent one.
    pub(crate) fn is_volume(&self) -> bool {
        locked(&self.relations).relation().is_some()
    }

    /// Whether it can be used.
    pub(crate) fn volume_state(&self, failure: Option<&String>) -> VolumeState {
        match (failure, locked(&self.relations).disabled) {
            (Some(_), _) => VolumeState::Broken,
            (None, true) => VolumeState::Disabled,
            (None, false) => VolumeState::Serving,
        }
    }
}

/// What was set of a disk or volume, as its record says. What is not understood was never set.
pub(crate) fn set_of(record: &DiskRecord) -> DiskPatch {
    serde_json::from_value(record.set.clone()).unwrap_or_default()
}

/// How a volume is spoken of.
pub(crate) fn in_volume(name: &Name, what: &str) -> String {
    format!("volume {name}: {what}")
}
