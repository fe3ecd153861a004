//! Disks get a second leg, and lose one (source 002 [0062]).
//!
//! What always holds: what is wrong with an image is said before anything changes for its sake; an image that was a leg and is
//! none any more is remembered as such before the pair forgets it.

use crate::manager::legs::{Mirror, check_units};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::control::api::{self, JobKind, JobState};
use crate::control::{ApiError, ErrorCode, Name};
use crate::door::{self, LegImage, bitmap_bytes};
use crate::image::{Direct, SharedImage};
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::jobs::JobEntry;
use crate::manager::{Manager, engine_error, image_error, table_error};
use crate::registry::{ClaimKey, Command};
use crate::store::LegRecord;

/// How long a change of the mirror waits for the requests in flight.
const DRAIN_WAIT: Duration = Duration::from_secs(30);

impl Manager {
    /// The image that is to become a leg of a disk, if it can.
    fn new_leg(&self, disk: &DiskEntry, path: &Path) -> Result<SharedImage, ApiError> {
        if *locked(&disk.path) == path && locked(&disk.mirror).is_none() {
            let message = format!("{} is its image already; a mirror has two", path.display());
            return Err(
                ApiError::new(ErrorCode::Conflict, message).with_action("name another image for the second leg")
            );
        }
        self.leg_image(path, disk.facts().geometry.size_bytes, &disk.config)
    }

    /// Gives a disk a second leg, or puts one in the place of a failed one.
    pub(crate) fn mirror(&self, name: &Name, path: &Path) -> Result<api::Disk, ApiError> {
        let place = ClaimKey::Path(path.to_owned());
        let _claim = self.claim_with(&Command::Mirror { disk: name.clone(), path: path.to_owned() }, [place])?;
        let disk = self.disk(name)?;
        self.refuse_what_others_have(name, path, true)?;
        let in_disk = |e: ApiError| ApiError { message: format!("disk {name}: {}", e.message), ..e };
        let named = |e: ApiError| self.named_user(name, &[path.to_owned()], e);
        self.add_leg(&disk, path).map_err(|e| named(in_disk(e)))?;
        Ok(disk.to_api(self))
    }

    /// What is made for a leg that comes to nothing goes again.
    pub(crate) fn add_leg(&self, disk: &Arc<DiskEntry>, path: &Path) -> Result<(), ApiError> {
        let is_free = self.host.is_free(path);
        self.attach_leg(disk, path).inspect_err(|_| {
            let is_leg = locked(&disk.mirror).as_ref().is_some_and(|mirror| mirror.legs.iter().any(|l| l.path == path));
            if is_free && !is_leg && self.host.is_there(path) {
                self.remove_file(path);
            }
        })
    }

    fn attach_leg(&self, disk: &Arc<DiskEntry>, path: &Path) -> Result<(), ApiError> {
        // What is wrong with the image is said before anything changes for its sake.
        let mut opened = None;
        if locked(&disk.mirror).is_none() {
            let image = self.new_leg(disk, path)?;
            check_units(path, &image, disk.facts().unit_bytes)?;
            opened = Some(image);
            self.make_mirror(disk)?;
        }
        self.take_unheld_leg_back(disk)?;
        let facts = disk.facts();
        let (failed, again) = {
            let mirror = locked(&disk.mirror);
            let mirror = mirror.as_ref().expect("just made");
            let (mut failed, mut again) = (None, false);
            for leg in &mirror.legs {
                match (facts.leg(leg.id).map(|leg| leg.state.clone()), leg.path == path) {
                    (Some(door::LegState::InSync), true) => return Ok(()),
                    // Whoever asks again wants it to go on.
                    (Some(door::LegState::Resynchronising), true) => again = true,
                    (Some(door::LegState::Split), _) => {
                        let message = format!("its leg {} is held by a snapshot", leg.path.display());
                        return Err(ApiError::new(ErrorCode::MirrorNotInSync, message));
                    }
                    // One that nobody goes on with gives way: that was decided.
                    (Some(door::LegState::Resynchronising | door::LegState::Failed(_)) | None, _) => {
                        failed = Some(leg.clone());
                    }
                    (Some(door::LegState::InSync), false) => {}
                }
            }
            if failed.is_none() && !again && mirror.legs.len() > 1 {
                return Err(ApiError::new(ErrorCode::Conflict, "it has two good legs"));
            }
            (failed, again)
        };
        if again {
            self.start_resync(disk);
            return Ok(());
        }
        // What worked on a leg that goes has nothing to go on with.
        self.forget_resyncs_of(disk);
        // The failed leg itself, taken again, may still be open.
        if opened.is_none() && failed.as_ref().is_none_or(|failed| failed.path != path) {
            opened = Some(self.new_leg(disk, path)?);
        }
        if let Some(failed) = failed {
            self.let_leg_go(disk, &failed)?;
        }
        // Also when it was tried before: a leg that is added must miss no write.
        let waits = self.waiting_for(disk, self.requests_of(disk));
        disk.disk.write_by_mirror(DRAIN_WAIT).map_err(engine_error)?;
        drop(waits);
        let leg = LegRecord { id: self.host.new_id(), path: path.to_owned(), saved: None };
        let image = match opened {
            Some(image) => image,
            None => self.new_leg(disk, path)?,
        };
        check_units(path, &image, disk.facts().unit_bytes)?;
        if let Some(mirror) = locked(&disk.mirror).as_mut() {
            mirror.legs.push(leg.clone());
        }
        locked(&disk.former_legs).retain(|former| former != path);
        let attached = self
            .persist(std::slice::from_ref(disk))
            .and_then(|()| disk.disk.add_leg(LegImage { id: leg.id, image }).map_err(engine_error));
        if let Err(e) = attached {
            if let Some(mirror) = locked(&disk.mirror).as_mut() {
                mirror.legs.retain(|l| l.id != leg.id);
            }
            // It may have been one until now, and have missed what was written since; or it may have got some of it.
            locked(&disk.former_legs).push(leg.path);
            self.persist_later(disk);
            return Err(e);
        }
        self.start_resync(disk);
        Ok(())
    }

    /// Makes a mirror with the disk's one image as its only leg.
    fn make_mirror(&self, disk: &Arc<DiskEntry>) -> Result<(), ApiError> {
        let leg = LegRecord { id: self.host.new_id(), path: locked(&disk.path).clone(), saved: None };
        let (id, geometry) = (self.host.new_id(), disk.facts().geometry);
        let path = self.bitmap_path(id);
        let bytes = bitmap_bytes(geometry.size_bytes, geometry.block_bytes);
        let bitmap = self.host.create_image(&path, bytes, Direct::Off).map_err(image_error)?;
        let named = self.store_name(&path).map_err(table_error);
        let made = named.and_then(|()| disk.disk.make_mirror(leg.id, (bitmap, id)).map_err(engine_error));
        made.inspect_err(|_| self.remove_file(&path))?;
        *locked(&disk.mirror) = Some(Mirror { bitmap: id, legs: vec![leg], is_stopped: false });
        Ok(())
    }

    pub(crate) fn let_leg_go(&self, disk: &Arc<DiskEntry>, leg: &LegRecord) -> Result<(), ApiError> {
        let is_in_use = disk.facts().leg(leg.id).is_some_and(|leg| leg.state == door::LegState::Resynchronising);
        if locked(&disk.mirror).is_none() {
            return Err(ApiError::no_second_leg(&disk.name));
        }
        // Remembered as no leg any more before the pair forgets that it was one.
        self.change(disk, || {
            let mut mirror = locked(&disk.mirror);
            let legs = mirror.as_mut().map(|mirror| &mut mirror.legs);
            let stays = legs.and_then(|legs| {
                legs.retain(|l| l.id != leg.id);
                legs.first()
            });
            let mut path = locked(&disk.path);
            if let Some(stays) = stays.filter(|_| *path == leg.path) {
                path.clone_from(&stays.path); // The disk is known by the leg that is left.
            }
            locked(&disk.former_legs).push(leg.path.clone());
        })?;
        disk.disk.forget_leg(leg.id, is_in_use).map_err(engine_error)
    }

    fn abandon(&self, disk: &DiskEntry, job: &JobEntry) -> bool {
        let _waits = self.waiting_for(disk, format!("job {} of {} to stop", job.id, disk.name));
        job.abandon(DRAIN_WAIT)
    }

    /// Lets a leg go; its file stays.
    pub(crate) fn unmirror(&self, name: &Name, path: Option<&Path>) -> Result<api::Disk, ApiError> {
        let _claim = self.claim(&Command::Unmirror { disk: name.clone(), leg: path.map(Path::to_owned) })?;
        let disk = self.disk(name)?;
        let (goes, stays) = {
            let mirror = locked(&disk.mirror);
            let legs = mirror.as_ref().map(|m| m.legs.clone()).filter(|legs| !legs.is_empty());
            let mut legs = legs.ok_or_else(|| ApiError::no_second_leg(name))?;
            let goes = match path {
                // One that has a single leg is no mirror afterwards, either.
                None => legs.len() - 1,
                Some(path) => legs.iter().position(|leg| leg.path == path).ok_or_else(|| {
                    let message = format!("disk {name} has no leg {}", path.display());
                    let all: Vec<String> = legs.iter().map(|leg| leg.path.display().to_string()).collect();
                    ApiError::new(ErrorCode::InvalidRequest, message)
                        .with_action(format!("name one of its legs: {}", all.join(", ")))
                })?,
            };
            let goes = (legs.len() > 1).then(|| legs.remove(goes));
            (goes, legs.remove(0))
        };
        self.take_unheld_leg_back(&disk)?;
        let facts = disk.facts();
        let is = |leg: &LegRecord, state| facts.leg(leg.id).is_some_and(|leg| leg.state == state);
        // As it was decided; but a leg may have failed since.
        if goes.as_ref().is_some_and(|goes| is(goes, door::LegState::Split)) || !is(&stays, door::LegState::InSync) {
            let message = format!("disk {name}: its legs have changed meanwhile");
            return Err(ApiError::new(ErrorCode::MirrorNotInSync, message).with_action("ask again"));
        }
        if let Some(job) = self.job_on(&disk, |j| j.kind == JobKind::Mirror && j.state() == JobState::Running)
            && !self.abandon(&disk, &job)
        {
            let message = format!("job {} does not stop: it waits for a block", job.id);
            return Err(ApiError::new(ErrorCode::Unavailable, message).with_action(format!(
                "see 'halfsilver job show {}'; then again: halfsilver disk unmirror {name}",
                job.id
            )));
        }
        // Before the record says so nothing may count on the leg that goes: the other one alone must have everything.
        // If this is refused from here on, the leg that goes is one that has failed: this can be asked for again, and so can
        // a mirror.
        let goes_id = goes.as_ref().map(|goes| goes.id);
        let waits = self.waiting_for(&disk, self.requests_of(&disk));
        disk.disk.write_by_leg(stays.id, goes_id, DRAIN_WAIT).map_err(engine_error)?;
        drop(waits);
        // From here on only the leg that stays is the disk.
        let bitmap = locked(&disk.mirror).as_ref().map(|mirror| mirror.bitmap);
        self.change(&disk, || {
            *locked(&disk.mirror) = None;
            locked(&disk.former_legs).extend(goes.map(|goes| goes.path));
            *locked(&disk.path) = stays.path;
        })?;
        disk.disk.forget_mirror();
        if let Some(bitmap) = bitmap {
            self.remove_file(&self.bitmap_path(bitmap));
        }
        self.forget_resyncs_of(&disk);
        Ok(disk.to_api(self))
    }
}
