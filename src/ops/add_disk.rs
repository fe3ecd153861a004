//! Disks are added, with what is remembered of them: at a start, by a command, and when what they lacked is back.
//!
//! What is made of what was left of a disk is decided in the room `recovery`, and carried out in
//! [`crate::manager::opening`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use uuid::Uuid;

use crate::control::api::{Difference, DiskConfig};
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, PutOutcome};
use crate::host::{Host, receive};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::planned::Planned;
use crate::manager::relations::set_of;
use crate::manager::sockets::serial_of;
use crate::manager::unserved::{Unserved, images_of};
use crate::registry::{ClaimKey, Command, Wanted, cleared_by};
use crate::store::DiskRecord;

impl Manager {
    pub(crate) fn put(&self, name: &Name, config: &DiskConfig) -> Result<PutOutcome, ApiError> {
        let _claim = self.claim_to_add("disk add", name, &self.completed(name, config), None)?;
        // What was set meanwhile counts.
        let config = self.completed(name, config);
        if let Ok(old) = self.disk(name) {
            if old.is_volume() {
                return Err(not_a_disk(name));
            }
            if old.config() == config {
                return Ok(PutOutcome::Unchanged(old.to_api(self)));
            }
            return Err(self.configured_differently(name, &old.config(), &config));
        }
        let places: Vec<PathBuf> =
            [Some(&config.path), config.mirror.as_ref()].into_iter().flatten().cloned().collect();
        let entry = self.add_now(name, config).map_err(|e| self.named_user(name, &places, e))?;
        self.hurry_unserved();
        self.bus.publish(Notice::of_disk(EventKind::DiskAdded, name));
        Ok(PutOutcome::Created(entry.to_api(self)))
    }

    /// A disk of that name is served otherwise. What can be set is set; for the rest it has to go first.
    fn configured_differently(&self, name: &Name, is: &DiskConfig, wanted: &DiskConfig) -> ApiError {
        let differences = is.differences(wanted);
        let what: Vec<String> = differences.iter().map(Difference::to_string).collect();
        let message = format!("disk {name} exists and is configured differently: {}", what.join("; "));
        let error = ApiError::new(ErrorCode::DiskExists, message);
        let (disk, registry) = (name.clone(), self.registry());
        if !differences.iter().all(|d| d.can_be_set) {
            let remove = Command::RemoveDisk { disk, force: false };
            return cleared_by(error, registry.steps_to([remove]), Some("use another name"));
        }
        let readonly = differences.iter().any(|d| d.key == "readonly").then(|| wanted.readonly());
        let set: Vec<String> = differences.iter().map(|d| format!("--{} {}", d.key, d.wanted)).collect();
        let set = format!("halfsilver disk set {name} {}", set.join(" "));
        let cleared = cleared_by(error, registry.steps_for(&Command::Set { disk, readonly }), None);
        let before = if cleared.commands.is_empty() { String::new() } else { format!("{}; then ", cleared.action) };
        let commands = cleared.commands.iter().cloned().chain([set.clone()]).collect();
        ApiError { action: format!("{before}{set}"), commands, ..cleared }
    }

    /// Says who uses an image that cannot be had, where that is known here.
    pub(crate) fn named_user(&self, name: &Name, places: &[PathBuf], error: ApiError) -> ApiError {
        let records = || self.all_disks().into_iter().filter(|disk| disk.name.get() != *name).map(|d| d.to_record());
        let used = || records().flat_map(|r| images_of(&r)).find(|(path, _)| places.contains(path));
        match (error.code == ErrorCode::Conflict).then(used).flatten() {
            None => error,
            Some((path, whose)) => in_use(name, &path, &whose),
        }
    }

    /// What must be nobody else's while a disk is added of which this may be remembered, and the disks of what it reads
    /// through: they stay as they are meanwhile.
    pub(crate) fn claim_to_add(
        &self,
        operation: &str,
        name: &Name,
        config: &DiskConfig,
        record: Option<&DiskRecord>,
    ) -> Result<crate::manager::claims::Held<'_>, ApiError> {
        self.claim_decided(&format!("{operation} {name}"), &|registry| {
            let known = registry.named(name);
            let id = record.map(|r| r.id).or(known.map(|disk| disk.id));
            let places = [&config.socket, &config.mirror].into_iter().flatten().chain([&config.path]);
            let places = places.map(|path| ClaimKey::Path(path.clone()));
            let mut wanted =
                Wanted::changing(places.chain([ClaimKey::Name(name.clone())]).chain(id.map(ClaimKey::Entity)));
            let sources =
                record.map_or_else(|| known.into_iter().flat_map(|disk| disk.sources()).collect(), sources_of);
            let holders = sources.into_iter().filter_map(|source| registry.snapshot(source).map(|(disk, _)| disk.id));
            wanted.needs = holders.filter(|holder| Some(*holder) != id).map(ClaimKey::Entity).collect();
            Ok(wanted)
        })
    }

    /// Decides about a disk and serves it. It is claimed.
    pub(crate) fn add_now(&self, name: &Name, config: DiskConfig) -> Result<Arc<DiskEntry>, ApiError> {
        let take_flushed: Vec<Name> =
            locked(&self.unserved).get(name).filter(|u| u.takes_flushed).map(|u| u.name.clone()).into_iter().collect();
        let planned = self.plan(name, config)?;
        if let Some(base) = self.base_not_served(&planned) {
            let message = format!("volume {name}: what it stands on is not served: {base}");
            return Err(ApiError::new(ErrorCode::DiskFailed, message));
        }
        let recovery = self.decide(std::slice::from_ref(&planned), &take_flushed)?.into_iter().flatten().next();
        let entry = self.add_planned(planned, recovery)?;
        self.resume_restores(Some(entry.id));
        Ok(entry)
    }

    /// The configuration with everything said that has a default. Who says nothing of a second leg means what is there, and
    /// of what was set, as it was set.
    pub(crate) fn completed(&self, name: &Name, config: &DiskConfig) -> DiskConfig {
        let served = self.disk(name).ok().map(|disk| disk.to_record());
        let record = served.or_else(|| self.remembered(name).ok().flatten());
        let path = record.as_ref().and_then(|r| r.config.get("path")?.as_str()).map(PathBuf::from);
        let set = record.as_ref().map(set_of).unwrap_or_default();
        let logical = record.as_ref().and_then(|r| r.config.get("logical_block_size")?.as_u64());
        let logical = logical.and_then(|size| u32::try_from(size).ok());
        let legs = record.and_then(|r| r.mirror).map(|m| m.legs).unwrap_or_default();
        let is_leg = legs.iter().any(|leg| leg.path == config.path);
        let mut config = config.clone();
        if is_leg || path.as_ref() == Some(&config.path) {
            config = config.or_set(&set);
            config.logical_block_size = config.logical_block_size.or(logical);
        }
        if is_leg && config.mirror.is_none() {
            config.mirror = legs.into_iter().map(|leg| leg.path).find(|path| *path != config.path);
        }
        config = config.filled();
        config.socket = Some(config.socket_or_default(self.places.run_dir(), name));
        config.serial.get_or_insert_with(|| serial_of(name.as_str()));
        config
    }

    /// What is remembered of a disk, if it goes with this configuration.
    fn record_of(&self, name: &Name, config: &DiskConfig) -> Result<Option<DiskRecord>, ApiError> {
        let Some(record) = self.remembered(name)? else { return Ok(None) };
        let old: Option<DiskConfig> = serde_json::from_value(record.config.clone()).ok();
        if record.is_volume() {
            // What the configuration of a volume that stands on something has for a path is no path.
            let is_it = old.is_some_and(|old| old.path == config.path);
            return if is_it { Ok(Some(record)) } else { Err(not_a_disk(name)) };
        }
        let legs: Vec<_> = record.mirror.iter().flat_map(|m| &m.legs).map(|leg| &leg.path).collect();
        let is_known = |path: &PathBuf| match legs.is_empty() {
            true => old.as_ref().is_some_and(|o| o.path == *path),
            false => legs.contains(&path),
        };
        let sizes = |config: &DiskConfig| (config.block_size, config.logical_block_size());
        let same = |old: &DiskConfig| is_known(&config.path) && sizes(old) == sizes(config);
        let now = old.as_ref().map(|o| o.path.display().to_string()).unwrap_or_default();
        if record.former_legs.contains(&config.path) {
            let message = format!(
                "disk {name} is {now} now; {} was a leg of it once, and does not have what was written since",
                config.path.display()
            );
            return Err(ApiError::new(ErrorCode::DiskExists, message)
                .with_action(format!("serve it with path={now}, or {} under another name", config.path.display())));
        }
        if old.as_ref().is_some_and(same) {
            let other = config.mirror.as_ref().filter(|path| legs.len() > 1 && !legs.contains(path));
            if let Some(other) = other {
                let message = format!("disk {name} has other legs than {}", other.display());
                return Err(ApiError::new(ErrorCode::DiskExists, message).with_action(
                    "leave mirror= out, and change legs with 'halfsilver disk mirror' and 'disk unmirror'",
                ));
            }
            return Ok(Some(record));
        }
        let with = what_is_kept(&record);
        if with.is_empty() {
            return Ok(None); // Another image under an old name: a new disk.
        }
        let was = old.map_or_else(String::new, |o| {
            let (path, block, logical) = (o.path.display(), o.block_size, o.logical_block_size());
            format!(" of {path} with block size {block} and logical block size {logical}")
        });
        let message = format!("disk {name} is remembered{was}, with {}", with.join(", "));
        Err(ApiError::new(ErrorCode::DiskExists, message).with_action(format!(
            "serve it as it was, or use another name, or give up what is remembered: halfsilver disk forget {name}"
        )))
    }

    pub(crate) fn plan(&self, name: &Name, config: DiskConfig) -> Result<Planned, ApiError> {
        let record = self.record_of(name, &config)?;
        let of_volume = record.as_ref().is_some_and(|r| r.volume.is_some());
        for path in [Some(&config.path), config.mirror.as_ref()].into_iter().flatten().filter(|_| !of_volume) {
            self.refuse_what_others_have(name, path, record.is_none())?;
        }
        Ok(Planned { name: name.clone(), config, record })
    }

    /// An image that something has which is not served is not served as another disk's: nobody else keeps it from that.
    pub(crate) fn refuse_what_others_have(&self, name: &Name, path: &Path, is_new: bool) -> Result<(), ApiError> {
        let refuse = |whose: String| Err(in_use(name, path, &whose));
        let unserved: Vec<Unserved> = locked(&self.unserved).values().cloned().collect();
        let others = unserved.iter().filter(|u| u.name != *name).filter_map(|u| u.record.as_ref());
        let theirs: Vec<(PathBuf, String)> = others.flat_map(images_of).collect();
        if let Some((_, whose)) = theirs.iter().find(|(its, _)| its == path) {
            return refuse(whose.clone());
        }
        let all = theirs.iter().map(|(path, _)| path.clone()).chain([path.to_owned()]).collect();
        let mut found = resolved_in_time(&self.host, all);
        let resolved = found.pop().unwrap_or_else(|| path.to_owned());
        if let Some((_, (_, whose))) = found.iter().zip(&theirs).find(|(its, _)| **its == resolved) {
            return refuse(whose.clone());
        }
        // While a record cannot be read, what lies where our images are may be anybody's.
        let is_unknown = unserved.iter().any(|u| u.record.is_none() && !u.is_new);
        match is_new && is_unknown && [path, &resolved].iter().any(|p| p.parent() == Some(&*self.places.images_dir())) {
            true => refuse("the image of something whose record cannot be read".to_owned()),
            false => Ok(()),
        }
    }
}

/// The snapshots that a disk or volume reads through of others, and its own one that it is restored from.
fn sources_of(record: &DiskRecord) -> Vec<Uuid> {
    let restored = record.restore.as_ref().filter(|r| r.is_shown()).map(|r| r.source);
    record.volume.as_ref().map(|volume| volume.snapshot).into_iter().chain(restored).collect()
}

fn in_use(name: &Name, path: &Path, whose: &str) -> ApiError {
    let message = format!("{name}: {}: it is in use as {whose}", path.display());
    ApiError::new(ErrorCode::Conflict, message).with_action("name another image")
}

/// How long names may take to be resolved.
const RESOLVE_WAIT: Duration = Duration::from_secs(2);

/// Where these paths lead, each as it is if nothing is there. As they are, if that cannot be said in time: where one lies may
/// never answer.
fn resolved_in_time(host: &Arc<dyn Host>, paths: Vec<PathBuf>) -> Vec<PathBuf> {
    let (tell, told) = channel();
    let (of, on) = (paths.clone(), host.clone());
    let resolve = move || {
        let found = of.into_iter().map(|path| on.resolve(&path)).collect();
        if tell.send(found).is_err() {
            log::debug!("nobody waits any more for where paths lead");
        }
    };
    // None of those that a stop joins.
    if let Err(e) = host.start_thread("resolve", Box::new(resolve)) {
        log::error!("no thread can look where paths lead: {e}");
    }
    receive(&**host, &told, RESOLVE_WAIT).unwrap_or(paths)
}

/// What would be lost if a disk's record gave way to another one.
fn what_is_kept(record: &DiskRecord) -> Vec<String> {
    let counted = |n: usize, what: &str| (n > 0).then(|| format!("{n} {what}{}", if n == 1 { "" } else { "s" }));
    let restore = record.restore.as_ref().filter(|r| r.is_shown()).map(|r| format!("a restore from {}", r.from));
    let legs = record.mirror.as_ref().map_or(0, |m| m.legs.len());
    [
        restore,
        counted(record.snapshots.len(), "snapshot"),
        counted(record.bookmarks.len(), "bookmark"),
        record.live_log.as_ref().map(|log| format!("its newest content in {}", log.display())),
        record.work.as_ref().map(|_| "work that is not done".to_owned()),
        (legs > 1).then(|| "two legs".to_owned()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The name belongs to a volume.
pub(crate) fn not_a_disk(name: &Name) -> ApiError {
    ApiError::new(ErrorCode::DiskExists, format!("{name} is the name of a volume")).with_action("use another name")
}
