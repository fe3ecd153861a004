//! The images that are there are taken for a disk's own, although they are others than those that were: its user has said that
//! they are copies.
//!
//! What always holds: only what was refused as a stranger is accepted; what is decided afterwards is decided as ever, so that an
//! image of the wrong size still does not do.

use std::path::{Path, PathBuf};

use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::manager::entry::locked;
use crate::manager::planned::{Planned, unserved};
use crate::manager::{Manager, record_error};
use crate::recovery::Recovery;
use crate::store::{DiskRecord, Fingerprint};

impl Manager {
    /// Serves a disk or volume with the images that are there, which are to have what the ones had that were there before.
    pub(crate) fn accept(&self, name: &Name) -> Result<(), ApiError> {
        if self.disk(name).is_ok() {
            return Err(ApiError::new(ErrorCode::DiskBusy, format!("{name} is served: there is nothing to accept")));
        }
        let known = locked(&self.unserved).get(name).map(|unserved| (unserved.config.clone(), unserved.record.clone()));
        let (config, record) = known.ok_or_else(|| ApiError::disk_not_found(name))?;
        let Some(config) = config else {
            return Err(ApiError::new(ErrorCode::DiskFailed, format!("nobody knows how {name} would be served")));
        };
        let _claim = self.claim_to_add("disk accept", name, &config, record.as_ref())?;
        let planned = self.plan(name, config.clone())?;
        let decided = self.decide_alone(&planned, false)?;
        let is_stranger = decided.and_then(|d| Some(d.why_unserved()?.is_stranger())).unwrap_or(false);
        let Some(record) = planned.record.clone().filter(|_| is_stranger) else {
            let message = format!("{name}: none of its images is another one than it was");
            return Err(ApiError::new(ErrorCode::Conflict, message)
                .with_action(format!("see what it lacks: halfsilver disk show {name}")));
        };
        let accepted = Planned { record: Some(self.accepted(record)), ..planned };
        // With another reason not to serve it nothing is accepted: the right image may come back.
        if let Some(why) = self.decide_alone(&accepted, false)?.as_ref().and_then(Recovery::why_unserved) {
            return Err(unserved(name.as_str(), why));
        }
        self.records.put(&accepted.record.iter().collect::<Vec<_>>()).map_err(record_error)?;
        self.add_now(name, config)?;
        log::warn!("{name}: its images were accepted as copies of those that were there");
        self.hurry_unserved();
        self.bus.publish(Notice::of_disk(EventKind::DiskAdded, name));
        Ok(())
    }

    /// A record that goes with the images as they are now. One that has become smaller has not what was at its end.
    fn accepted(&self, record: DiskRecord) -> DiskRecord {
        let identities = record.images().into_iter().filter_map(|path| {
            let identity = self.host.identity(&path).ok()?;
            Some((path, identity))
        });
        let mut accepted = DiskRecord { identities: identities.collect(), kept_in: None, ..record };
        let look = |path: &Path, saved: &mut Option<Fingerprint>| {
            let Some(before) = saved else { return };
            if let Ok(now) = self.host.fingerprint(path)
                && now.size_bytes >= before.size_bytes
            {
                *before = now;
            }
        };
        let own = accepted.config.get("path").and_then(|path| path.as_str()).map(PathBuf::from);
        if let Some(own) = own.filter(|_| accepted.mirror.is_none() && accepted.volume.is_none()) {
            look(&own, &mut accepted.saved);
        }
        if let Some(log) = &accepted.live_log {
            look(log, &mut accepted.live_saved);
        }
        accepted.snapshots.iter_mut().for_each(|s| look(&s.image, &mut s.saved));
        accepted.mirror.iter_mut().flat_map(|m| &mut m.legs).for_each(|leg| look(&leg.path, &mut leg.saved));
        accepted
    }
}
