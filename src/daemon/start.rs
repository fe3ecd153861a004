//! What a start serves: the disks of the configuration, and what is remembered from before.
//!
//! What always holds: what cannot be served is noted with the reason, and all else is served; one image that never answers
//! holds a start up for [`OPEN_WAIT`] when it is looked at and once more when it is opened.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::control::api::DiskConfig;
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice};
use crate::daemon::config::{BadDisk, DiskSpec};
use crate::host::receive;
use crate::manager::entry::locked;
use crate::manager::planned::Planned;
use crate::manager::unserved::Unserved;
use crate::manager::{Manager, record_error};
use crate::recovery::{Recovery, settle};
use crate::store::{DiskRecord, Remembered};

/// How long a disk may take to be looked at, and then to be opened: longer than a start waits for the transfers of a process
/// that was killed.
const OPEN_WAIT: Duration = Duration::from_secs(35);

/// A disk, and what was decided about it if anything is remembered of it.
type LookedAt = (Planned, Option<Recovery>);

/// What is to be served at a start.
#[derive(Clone, Copy)]
pub struct Given<'a> {
    /// The disks of the configuration.
    pub disks: &'a [DiskSpec],
    /// Those of the configuration file that are left out.
    pub bad_disks: &'a [BadDisk],
    /// Those of which what was flushed last is taken.
    pub take_flushed: &'a [Name],
    /// Whether one of the configuration that cannot be served ends the start.
    pub strict: bool,
}

impl Manager {
    /// Refuses a name of which it is said that what was flushed is to be taken, if nothing is called so.
    ///
    /// # Errors
    /// `disk-not-found`, or why the records cannot be read.
    pub fn refuse_unknown(&self, given: Given) -> Result<(), ApiError> {
        let Remembered { disks: records, unreadable } = self.records.disks().map_err(record_error)?;
        let configured = given.disks.iter().map(|s| s.name.as_str());
        let remembered = records.iter().map(|r| r.name.as_str()).chain(unreadable.keys().map(String::as_str));
        let known: BTreeSet<&str> = configured.chain(remembered).collect();
        let Some(name) = given.take_flushed.iter().find(|name| !known.contains(name.as_str())) else { return Ok(()) };
        let error = ApiError::new(ErrorCode::DiskNotFound, format!("--take-flushed: there is no disk {name}"));
        let known: Vec<&str> = known.into_iter().collect();
        Err(match known.is_empty() {
            true => error.with_action("leave it out: nothing is configured or remembered"),
            false => error.with_action(format!("name one of: {}", known.join(", "))),
        })
    }

    /// Serves all that can be served.
    ///
    /// # Errors
    /// When the records cannot be read; with `strict` also when a disk of the configuration cannot be served.
    pub fn take_up(&self, given: Given) -> Result<(), ApiError> {
        let Remembered { disks: records, unreadable } = self.records.disks().map_err(record_error)?;
        // Jobs of what is opened first may end before the last one is: what that needs is needed.
        locked(&self.starting).clone_from(&records);
        for (name, why) in unreadable {
            let Ok(name) = name.parse::<Name>() else {
                log::error!("the record {name:?} cannot be read: {why}; it is left as it is");
                continue;
            };
            let config = given.disks.iter().find(|spec| spec.name == name).map(|spec| spec.config.clone());
            let why = format!("its record cannot be read: {why}");
            let (id, takes_flushed) = (self.host.new_id(), given.take_flushed.contains(&name));
            self.note_unserved(Unserved { name, id, record: None, config, why, is_new: false, takes_flushed });
        }
        self.note_bad_disks(given, &records);
        let mut wanted = Vec::new();
        for spec in given.disks.iter().filter(|spec| given.strict || !locked(&self.unserved).contains_key(&spec.name)) {
            let record = records.iter().find(|r| r.name == spec.name.as_str()).cloned();
            let known = records.iter().filter(|_| record.is_none()).find(|r| has_image(r, &spec.config.path));
            if let Some(known) = known {
                let why = format!(
                    "{} is the image of disk {}, which is remembered with it; say name={1} in the configuration",
                    spec.config.path.display(),
                    known.name
                );
                if given.strict {
                    return Err(ApiError::new(ErrorCode::Conflict, format!("disk {}: {why}", spec.name)));
                }
                let config = self.completed(&spec.name, &spec.config);
                self.not_served(Planned { name: spec.name.clone(), config, record }, given, why);
                continue;
            }
            wanted.push(Planned { config: self.completed(&spec.name, &spec.config), name: spec.name.clone(), record });
        }
        for record in records {
            let Ok(name) = record.name.parse::<Name>() else {
                log::error!("the record {:?} has no name that a disk can have; it is left as it is", record.name);
                continue;
            };
            let is_bad = given.bad_disks.iter().any(|bad| bad.name.as_ref() == Some(&name));
            if is_bad || given.disks.iter().any(|spec| spec.name == name) {
                continue;
            }
            match serde_json::from_value::<DiskConfig>(record.config.clone()) {
                Ok(config) => wanted.push(Planned { name, config, record: Some(record) }),
                Err(e) => self.note_unserved(Unserved {
                    id: record.id,
                    name,
                    record: Some(record),
                    config: None,
                    why: format!("its configuration cannot be understood: {e}"),
                    is_new: false,
                    takes_flushed: false,
                }),
            }
        }
        self.open_all(wanted, given)?;
        locked(&self.starting).clear();
        self.resume_restores(None);
        self.tidy_moments_later();
        Ok(())
    }

    /// What the configuration file says wrongly of a disk: that is unserved, also if it is remembered how it was served before.
    fn note_bad_disks(&self, given: Given, records: &[DiskRecord]) {
        for BadDisk { name, why } in given.bad_disks {
            // One that is described twice is served as it is described where that is right.
            let alone = name.clone().filter(|name| given.disks.iter().all(|spec| spec.name != *name));
            let Some(name) = alone.filter(|name| !locked(&self.unserved).contains_key(name)) else {
                log::error!("a disk of the configuration is left out: {why}");
                locked(&self.problems).push(why.clone());
                continue;
            };
            let record = records.iter().find(|r| r.name == name.as_str()).cloned();
            let id = record.as_ref().map_or_else(|| self.host.new_id(), |r| r.id);
            let (is_new, why) = (record.is_none(), format!("its configuration is wrong: {why}"));
            self.note_unserved(Unserved { name, id, record, config: None, why, is_new, takes_flushed: false });
        }
    }

    fn open_all(&self, wanted: Vec<Planned>, given: Given) -> Result<(), ApiError> {
        let is_given = |planned: &Planned| given.disks.iter().any(|spec| spec.name == planned.name);
        let (looked_at, refused) = self.look_at_all(wanted, given.take_flushed);
        for (planned, e) in refused {
            if given.strict && is_given(&planned) {
                return Err(e);
            }
            self.not_served(planned, given, e.message);
        }
        let (volumes, disks): (Vec<_>, Vec<_>) =
            looked_at.into_iter().partition(|(planned, _)| planned.record.as_ref().is_some_and(DiskRecord::is_volume));
        let opening: Vec<_> = disks.into_iter().map(|one| self.begin_to_open(one)).collect();
        let deadline = self.host.now() + OPEN_WAIT;
        for (planned, opened) in opening {
            let why = receive(&*self.host, &opened, deadline.saturating_duration_since(self.host.now()));
            let Err(e) = why.unwrap_or_else(|_| Err(no_answer())) else { continue };
            if given.strict && is_given(&planned) {
                return Err(e);
            }
            self.not_served(planned, given, e.message);
        }
        // Each after what it stands on.
        for one in in_order(volumes) {
            if let Some(base) = self.base_not_served(&one.0) {
                self.not_served(one.0, given, format!("what it stands on is not served: {base}"));
                continue;
            }
            let (planned, opened) = self.begin_to_open(one);
            if let Err(e) = receive(&*self.host, &opened, OPEN_WAIT).unwrap_or_else(|_| Err(no_answer())) {
                self.not_served(planned, given, e.message);
            } else if let Some(reason) = self.disk(&planned.name).ok().and_then(|disk| disk.failure()) {
                log::error!("volume {} is broken: {reason}; what was written to it is kept", planned.name);
            }
        }
        Ok(())
    }

    /// The disk or volume below one, if it is not served: then it may come back, and this one with it.
    pub(crate) fn base_not_served(&self, planned: &Planned) -> Option<Name> {
        let on = planned.record.as_ref()?.volume.as_ref()?.snapshot;
        let has = |record: &DiskRecord| record.snapshots.iter().any(|s| s.id == on);
        locked(&self.unserved).values().find(|u| u.record.as_ref().is_some_and(has)).map(|u| u.name.clone())
    }

    /// What is decided about each of these, and those that are refused or do not answer.
    fn look_at_all(&self, wanted: Vec<Planned>, take_flushed: &[Name]) -> (Vec<LookedAt>, Vec<(Planned, ApiError)>) {
        let look = |wanted: Planned| {
            let (me, (tell, told)) = (self.me.clone(), channel());
            let (of, takes_flushed) = (wanted.clone(), take_flushed.contains(&wanted.name));
            let started = self.start_thread("look", move || {
                let Some(manager) = me.upgrade() else { return };
                let Planned { name, config, .. } = of;
                let planned = manager.plan(&name, config);
                let decided = planned.and_then(|p| Ok((manager.decide_alone(&p, takes_flushed)?, p)));
                if tell.send(decided).is_err() {
                    log::debug!("disk {name}: nobody waits for it any more");
                }
            });
            if let Err(e) = started {
                log::error!("disk {}: no thread can look at it: {e}", wanted.name);
            }
            (wanted, told)
        };
        let looking: Vec<_> = wanted.into_iter().map(look).collect();
        let deadline = self.host.now() + OPEN_WAIT;
        let (mut found, mut refused) = (Vec::new(), Vec::new());
        for (wanted, told) in looking {
            match receive(&*self.host, &told, deadline.saturating_duration_since(self.host.now())) {
                Ok(Ok((decided, planned))) => found.push((planned, decided)),
                Ok(Err(e)) => refused.push((wanted, e)),
                Err(_) => refused.push((wanted, no_answer())),
            }
        }
        // Whether what they stand on and are restored from is there is seen over all of them.
        let known: Vec<bool> = found.iter().map(|(_, decided)| decided.is_some()).collect();
        let (plans, decided): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let mut recoveries: Vec<Recovery> = decided.into_iter().flatten().collect();
        settle(&mut recoveries, &[]);
        let mut recoveries = recoveries.into_iter();
        let settled = known.into_iter().map(|is_known| if is_known { recoveries.next() } else { None });
        (plans.into_iter().zip(settled).collect(), refused)
    }

    /// Opens a disk on a thread of its own, which goes on also when nobody waits for it any more.
    fn begin_to_open(
        &self,
        (planned, recovery): (Planned, Option<Recovery>),
    ) -> (Planned, Receiver<Result<(), ApiError>>) {
        let (me, (tell, told)) = (self.me.clone(), channel());
        let of = planned.clone();
        let started = self.start_thread("open", move || {
            let Some(manager) = me.upgrade() else { return };
            let name = of.name.clone();
            let held = manager.claim_to_add("start", &name, &of.config, of.record.as_ref());
            let added = held.and_then(|_claim| manager.add_planned(of, recovery).map(drop));
            let is_added = added.is_ok();
            if tell.send(added).is_err() && is_added {
                log::warn!("disk {name}: its image answers at last");
                manager.resume_restores(None);
                manager.hurry_unserved();
                manager.bus.publish(Notice::of_disk(EventKind::DiskAdded, &name));
            }
        });
        if let Err(e) = started {
            log::error!("disk {}: no thread can open it: {e}", planned.name);
        }
        (planned, told)
    }

    fn not_served(&self, planned: Planned, given: Given, why: String) {
        let Planned { name, config, record } = planned;
        if self.disk(&name).is_ok() {
            return; // It was opened meanwhile.
        }
        let id = record.as_ref().map_or_else(|| self.host.new_id(), |r| r.id);
        let (is_new, takes_flushed) = (record.is_none(), given.take_flushed.contains(&name));
        self.note_unserved(Unserved { name, id, record, config: Some(config), why, is_new, takes_flushed });
    }
}

fn no_answer() -> ApiError {
    ApiError::new(ErrorCode::DiskFailed, "its image does not answer")
}

/// Whether this is the image of a disk that is remembered, or one of its legs.
fn has_image(record: &DiskRecord, path: &Path) -> bool {
    let own = record.config.get("path").and_then(|path| path.as_str()).map(Path::new);
    let legs = record.mirror.iter().flat_map(|m| &m.legs).map(|leg| leg.path.as_path());
    own.into_iter().chain(legs).any(|its| its == path)
}

/// Volumes, each after those that it stands on.
fn in_order(mut left: Vec<LookedAt>) -> Vec<LookedAt> {
    let mut ordered = Vec::new();
    while !left.is_empty() {
        let base = |p: &Planned| p.record.as_ref().and_then(|r| r.volume.as_ref()).map(|v| v.snapshot);
        let has = |p: &Planned, id| p.record.iter().any(|r| r.snapshots.iter().any(|s| Some(s.id) == id));
        let waits = |p: &Planned| base(p).is_some() && left.iter().any(|(other, _)| has(other, base(p)));
        let next = left.iter().position(|(p, _)| !waits(p)).unwrap_or(0);
        ordered.push(left.swap_remove(next));
    }
    ordered
}
