//! Mirrored disks: their legs, made, opened, replaced, split and joined again (source 002 [0062]; figures 9 to 13).
//!
//! What always holds: which legs are good is said by the write-intent bitmap alone, which is durable before a write is
//! acknowledged that some leg misses. The records say only where legs are. An image that was a leg and is none any more is
//! remembered as such, so that it is not served as the disk by mistake.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::control::api::{self, DiskConfig, JobKind, JobState, LegState};
use crate::control::{ApiError, ErrorCode, EventKind, Notice};
use crate::door::{self, DiskFacts, ImageSpec, LegImage, Outcome, Work};
use crate::image::{Direct, ImageOptions, SharedImage};
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::jobs::JobEntry;
use crate::manager::layers::{open_image, open_made_here};
use crate::manager::{Manager, engine_error, image_error, table_error};
use crate::recovery::{LegUse, Recovery};
use crate::store::{LegRecord, MirrorRecord};

/// The mirror of a served disk: where its legs are, in the order of their places. How they are is told by the engine.
#[derive(Clone)]
pub(crate) struct Mirror {
    pub(crate) bitmap: Uuid,
    pub(crate) legs: Vec<LegRecord>,
    /// Whether its synchronisation was stopped by the user, and waits to be resumed.
    pub(crate) is_stopped: bool,
}

impl Mirror {
    pub(crate) fn to_record(&self) -> MirrorRecord {
        let legs = self.legs.iter().map(|leg| LegRecord { saved: None, ..leg.clone() }).collect();
        MirrorRecord { bitmap: self.bitmap, legs, stopped: self.is_stopped }
    }

    pub(crate) fn legs_to_api(&self, facts: &DiskFacts) -> Vec<api::Leg> {
        let leg = |record: &LegRecord| {
            let found = facts.leg(record.id);
            let (state, reason) = match found.map(|leg| leg.state.clone()) {
                Some(door::LegState::InSync) => (LegState::InSync, None),
                Some(door::LegState::Resynchronising) => (LegState::Resynchronising, None),
                Some(door::LegState::Split) => (LegState::Split, None),
                Some(door::LegState::Failed(reason)) => (LegState::Failed, Some(reason)),
                None => (LegState::Failed, Some("it is not in use".to_owned())),
            };
            let remaining_bytes = found.map_or(0, |leg| leg.left_bytes);
            api::Leg { path: record.path.clone(), state, reason, remaining_bytes }
        };
        self.legs.iter().map(leg).collect()
    }
}

/// A leg is written in the units of the other one.
pub(crate) fn check_units(path: &Path, leg: &SharedImage, other_bytes: u32) -> Result<(), ApiError> {
    if leg.alignment().offset_bytes > other_bytes.max(512) {
        let message = format!("{} needs larger units than the disk's other image", path.display());
        return Err(ApiError::new(ErrorCode::InvalidConfig, message));
    }
    Ok(())
}

impl Manager {
    /// The image of a leg, made if there is none.
    pub(crate) fn leg_image(&self, path: &Path, size_bytes: u64, config: &DiskConfig) -> Result<SharedImage, ApiError> {
        if self.host.is_free(path) {
            log::info!("{} is made as a leg", path.display());
            let direct = crate::manager::layers::direct_of(config);
            let made = match self.host.create_image(path, size_bytes, direct) {
                Err(e) if config.direct && e.kind == crate::image::ImageErrorKind::Unsuitable => {
                    self.host.create_image(path, size_bytes, Direct::Off)
                }
                made => made,
            };
            let image = made.map_err(image_error)?;
            self.store_file(&image).map_err(table_error)?;
            return Ok(image);
        }
        let image = open_image(&*self.host, path, config, Duration::ZERO).map_err(image_error)?;
        if image.size_bytes() != size_bytes {
            let message = format!(
                "{} has {} bytes, the disk has {size_bytes}: a leg has the same size",
                path.display(),
                image.size_bytes()
            );
            return Err(ApiError::new(ErrorCode::InvalidConfig, message));
        }
        Ok(image)
    }

    /// Whether an image can become a second leg of a disk that is about to be served. It is not made yet.
    pub(crate) fn check_new_leg(&self, path: &Path, config: &DiskConfig, disk: &DiskFacts) -> Result<(), ApiError> {
        if self.host.is_free(path) {
            let parent = path.parent().filter(|dir| !self.host.is_directory(dir));
            return parent.map_or(Ok(()), |dir| {
                let message = format!("mirror: there is no directory {} for {}", dir.display(), path.display());
                Err(ApiError::new(ErrorCode::InvalidConfig, message)
                    .with_action("make it first, or name another image"))
            });
        }
        let image = self.leg_image(path, disk.geometry.size_bytes, config)?;
        check_units(path, &image, disk.unit_bytes)
    }

    pub(crate) fn bitmap_path(&self, id: Uuid) -> PathBuf {
        self.places.log_table(id)
    }

    /// Opens the images of a disk: its one image, or the legs of its mirror that are to be used.
    pub(crate) fn open_base(
        &self,
        config: &DiskConfig,
        recovery: Option<&Recovery>,
        options: ImageOptions,
    ) -> Result<(ImageSpec, Option<Mirror>), ApiError> {
        let open = |path: &Path| self.host.open_image(path, options);
        let mirrored = recovery.and_then(|r| Some((r.record.mirror.as_ref()?, r.mirror.as_ref()?)));
        let Some((mirror, decided)) = mirrored else {
            // That of a volume which became independent was a log, wherever it lies.
            let image = match recovery.is_some_and(|r| r.record.logical_block_bytes.is_some()) {
                true => open_made_here(&*self.host, &config.path, (config, config.block_size), options),
                false => open(&config.path),
            };
            return Ok((ImageSpec::Image(image.map_err(image_error)?), None));
        };
        let (mut legs, mut images) = (Vec::new(), Vec::new());
        for (leg, (_, what)) in mirror.legs.iter().zip(&decided.legs) {
            let image = match what {
                LegUse::InUse(_) => Some(open(&leg.path).map_err(image_error)?),
                LegUse::Held | LegUse::Forgotten => None,
                LegUse::Unused(why) => {
                    log::error!("{}: this leg is not used: {why}", leg.path.display());
                    None
                }
            };
            images.extend(image.map(|image| LegImage { id: leg.id, image }));
            if *what != LegUse::Forgotten {
                legs.push(leg.clone());
            }
        }
        let id = mirror.bitmap;
        let bitmap = ImageOptions { direct: Direct::Off, read_only: false, lock_wait: options.lock_wait };
        let bitmap = self.host.open_image(&self.bitmap_path(id), bitmap).map_err(image_error)?;
        let unused = mirror.legs.iter().zip(&decided.legs).filter(|(_, (_, what))| matches!(what, LegUse::Unused(_)));
        let unused: Vec<Uuid> = unused.map(|(leg, _)| leg.id).collect();
        let mirror = Mirror { bitmap: id, legs, is_stopped: mirror.stopped };
        Ok((ImageSpec::Mirror { id, bitmap, legs: images, unused }, Some(mirror)))
    }

    /// What a mirrored disk does once it is served: legs that are behind are brought up to date.
    pub(crate) fn resume_mirror(&self, disk: &Arc<DiskEntry>) {
        if let Err(e) = self.take_unheld_leg_back(disk) {
            return log::error!("disk {}: a leg does not come back: {}", disk.name, e.message);
        }
        if locked(&disk.mirror).is_none() || !disk.has_leg_behind() {
            return;
        }
        if locked(&disk.mirror).as_ref().is_some_and(|mirror| mirror.is_stopped) {
            let job = self.new_job(JobKind::Mirror, disk, None);
            return self.leave_stopped(&job);
        }
        self.start_resync(disk);
    }

    /// A split leg that no snapshot holds, of a split that never came to be or of a snapshot that has gone, is one that is to
    /// be synchronised. Returns whether there is one.
    pub(crate) fn take_unheld_leg_back(&self, disk: &DiskEntry) -> Result<bool, ApiError> {
        let facts = disk.facts();
        let unheld = locked(&disk.mirror).as_ref().and_then(|mirror| {
            let is_split = |leg: &LegRecord| facts.leg(leg.id).is_some_and(|leg| leg.state == door::LegState::Split);
            mirror.legs.iter().find(|leg| is_split(leg) && !disk.holds_leg(&leg.path)).map(|leg| leg.id)
        });
        let is_there = |leg: &Uuid| facts.leg(*leg).is_some_and(|leg| leg.path.is_some());
        let Some(leg) = unheld.filter(is_there) else { return Ok(false) };
        disk.disk.bring_leg_back(leg).map(|()| true).map_err(engine_error)
    }

    pub(crate) fn start_resync(&self, disk: &Arc<DiskEntry>) {
        if self.is_stopping() {
            return; // The next start goes on with it.
        }
        match self.job_on(disk, |j| j.kind == JobKind::Mirror) {
            // It copies whatever is marked, also what has just been.
            Some(job) if job.state() == JobState::Running => {}
            Some(job) => {
                job.begin_again();
                self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name.get()).with_job(job.id));
                self.run_resync(disk, job);
            }
            None => {
                let job = self.new_job(JobKind::Mirror, disk, None);
                self.run_resync(disk, job);
            }
        }
    }

    /// Takes the jobs off the list that synchronised what is no leg any more.
    pub(crate) fn forget_resyncs_of(&self, disk: &DiskEntry) {
        let is_old =
            |job: &JobEntry| job.is_on(disk) && job.kind == JobKind::Mirror && job.state() != JobState::Running;
        locked(&self.jobs).retain(|_, job| !is_old(job));
    }

    /// Goes on with a synchronisation that was stopped or failed.
    pub(crate) fn resume_resync(&self, disk: &Arc<DiskEntry>, job: Arc<JobEntry>) -> Result<(), ApiError> {
        if locked(&disk.mirror).is_none() {
            return Err(ApiError::no_second_leg(&disk.name));
        }
        self.change(disk, || locked(&disk.mirror).iter_mut().for_each(|mirror| mirror.is_stopped = false))?;
        job.begin_again();
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name.get()).with_job(job.id));
        self.run_resync(disk, job);
        Ok(())
    }

    pub(crate) fn run_resync(&self, disk: &Arc<DiskEntry>, job: Arc<JobEntry>) {
        if let Some(mirror) = locked(&disk.mirror).as_mut() {
            mirror.is_stopped = false;
        }
        let (on, of, ours, again) = (disk.clone(), disk.clone(), job.clone(), disk.clone());
        let copied = disk.legs_behind();
        let run = move |manager: &Manager| {
            let outcome = on.disk.run(Work::Resync, &ours.pace)?;
            let leg = locked(&on.mirror).as_ref().and_then(|mirror| mirror.legs.last().cloned());
            if let (Outcome::Done, Some(leg)) = (outcome, leg) {
                manager.bus.publish(Notice::of_disk(EventKind::LegInSync, &on.name.get()).with_leg(&leg.path));
            }
            Ok(outcome)
        };
        let mark_stopped = move || {
            if let Some(mirror) = locked(&of.mirror).as_mut() {
                mirror.is_stopped = true;
            }
        };
        // A leg that took the place of the one that failed found a job that was still running.
        let after = move |manager: &Manager, state| {
            let is_new = again.legs_behind().iter().any(|leg| !copied.contains(leg));
            if (state, is_new) == (JobState::Failed, true) {
                manager.start_resync(&again);
            }
        };
        self.run_job("mirror", &job, run, mark_stopped, after);
    }

    /// Clears what the bitmaps need not remember any more, now and then.
    pub(crate) fn clean_mirrors(&self) {
        for disk in self.all_disks() {
            if locked(&disk.mirror).is_none() || disk.facts().marked_bytes == 0 {
                continue;
            }
            if disk.cleaning.swap(true, std::sync::atomic::Ordering::AcqRel) {
                continue;
            }
            let of = disk.clone();
            let started = self.start_thread("clean", move || {
                if let Err(e) = of.disk.clean_mirror() {
                    log::warn!("disk {}: the write-intent bitmap is not cleaned: {e}", of.name);
                }
                of.cleaning.store(false, std::sync::atomic::Ordering::Release);
            });
            if started.is_err() {
                disk.cleaning.store(false, std::sync::atomic::Ordering::Release);
            }
        }
    }
}

impl DiskEntry {
    /// The legs of it that are to be synchronised.
    fn legs_behind(&self) -> Vec<Uuid> {
        let legs = self.facts().legs.into_iter();
        legs.filter(|leg| leg.state == door::LegState::Resynchronising).map(|leg| leg.id).collect()
    }

    /// Whether a leg of it is to be synchronised.
    pub(crate) fn has_leg_behind(&self) -> bool {
        !self.legs_behind().is_empty()
    }
}
