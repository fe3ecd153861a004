//! Mirrored disks: their legs, made, opened, replaced, split and joined again (source 002 [0062]; figures 9 to 13).
//!
//! What always holds: which legs are good is said by the write-intent bitmap alone, which is durable before a write is
//! acknowledged that some leg misses. The records say only where legs are. An image that was a leg and is none any more is
//! remembered as such, so that it is not served as the disk by mistake.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use uuid::Uuid;

use super::entry::{DiskEntry, SnapshotEntry, locked};
use super::jobs::JobEntry;
use super::layers::{block_on, open_image, open_made_here, remove_file, store_file};
use super::manager::{Manager, image_error, table_error};
use crate::control::api::{self, DiskConfig, JobKind, JobState, LegState};
use crate::control::{ApiError, ErrorCode, EventBus, EventKind, Name, Notice, SnapshotRef};
use crate::image::{Direct, FileImage, ImageOptions, IoQueue, SharedImage};
use crate::job::{self, Outcome};
use crate::mirror::{self, Backing, Disk, LegImage, Pair, PairError, PairObserver};
use crate::recovery::{LegUse, Recovery};
use crate::registry::{ClaimKey, Command};
use crate::store::{LegRecord, MirrorRecord};

/// How long a change of the mirror waits for the requests in flight.
const DRAIN_WAIT: Duration = Duration::from_secs(30);

/// The mirror of a served disk.
pub(super) struct Mirror {
    pub(super) bitmap: Uuid,
    /// What the live version writes by.
    pub(super) pair: Arc<Pair>,
    pub(super) legs: Vec<(LegRecord, Option<SharedImage>)>,
    /// Whether its synchronisation was stopped by the user, and waits to be resumed.
    pub(super) is_stopped: bool,
}

impl Mirror {
    pub(super) fn to_record(&self) -> MirrorRecord {
        let legs = self.legs.iter().map(|(leg, _)| LegRecord { saved: None, ..leg.clone() }).collect();
        MirrorRecord { bitmap: self.bitmap, legs, stopped: self.is_stopped }
    }

    fn state_of(&self, id: Uuid) -> Option<mirror::LegState> {
        self.pair.status().into_iter().find(|leg| leg.id == id).map(|leg| leg.state)
    }

    pub(super) fn legs_to_api(&self) -> Vec<api::Leg> {
        let status = self.pair.status();
        let leg = |(record, _): &(LegRecord, Option<SharedImage>)| {
            let found = status.iter().find(|leg| leg.id == record.id);
            let (state, reason) = match found.map(|leg| leg.state.clone()) {
                Some(mirror::LegState::InSync) => (LegState::InSync, None),
                Some(mirror::LegState::Resynchronising) => (LegState::Resynchronising, None),
                Some(mirror::LegState::Split) => (LegState::Split, None),
                Some(mirror::LegState::Failed(reason)) => (LegState::Failed, Some(reason)),
                None => (LegState::Failed, Some("it is not in use".to_owned())),
            };
            let remaining_bytes = found.map_or(0, |leg| leg.left_bytes);
            api::Leg { path: record.path.clone(), state, reason, remaining_bytes }
        };
        self.legs.iter().map(leg).collect()
    }
}

/// Tells of dropped legs, and breaks what was frozen on one.
struct Legs {
    disk: Name,
    bus: Arc<EventBus>,
    of: Weak<Disk>,
    /// Where the legs are, also those that come later.
    paths: Arc<std::sync::Mutex<Vec<(Uuid, PathBuf)>>>,
}

impl PairObserver for Legs {
    fn leg_dropped(&self, leg: Uuid, reason: &str) {
        let path = locked(&self.paths).iter().find(|(id, _)| *id == leg).map(|(_, path)| path.clone());
        let path = path.unwrap_or_default();
        if let Some(disk) = self.of.upgrade() {
            let chain = disk.chain();
            for link in &chain.links()[..chain.live()] {
                if link.layer.image.path() == path && matches!(link.layer.image, Backing::One(_)) {
                    disk.break_version(&link.version, reason);
                }
            }
        }
        self.bus.publish(Notice::of_disk(EventKind::LegFailed, &self.disk).with_leg(&path).because(reason));
    }
}

/// The full image of a disk as it is opened, and its mirror.
pub(super) struct Base {
    pub(super) backing: Backing,
    pub(super) mirror: Option<Mirror>,
}

fn pair_error(e: PairError) -> ApiError {
    match e {
        PairError::Image(e) => image_error(e),
        e => ApiError::new(ErrorCode::MirrorNotInSync, e.to_string()),
    }
}

fn in_ring<T: 'static>(work: impl AsyncFnOnce(IoQueue) -> Result<T, PairError> + 'static) -> Result<T, ApiError> {
    block_on(work).map_err(|e| ApiError::new(ErrorCode::Io, e))?.map_err(pair_error)
}

/// The image of a leg, made if there is none.
fn leg_image(path: &Path, size_bytes: u64, config: &DiskConfig) -> Result<SharedImage, ApiError> {
    if matches!(std::fs::symlink_metadata(path), Err(e) if e.kind() == std::io::ErrorKind::NotFound) {
        log::info!("{} is made as a leg", path.display());
        let direct = super::layers::direct_of(config);
        let made = match FileImage::create(path, size_bytes, direct) {
            Err(e) if config.direct && e.kind == crate::image::ImageErrorKind::Unsuitable => {
                FileImage::create(path, size_bytes, Direct::Off)
            }
            made => made,
        };
        let image: SharedImage = Arc::new(made.map_err(image_error)?);
        store_file(&image).map_err(table_error)?;
        return Ok(image);
    }
    let image = open_image(path, config, Duration::ZERO).map_err(image_error)?;
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
pub(super) fn check_new_leg(path: &Path, config: &DiskConfig, disk: &Disk) -> Result<(), ApiError> {
    if matches!(std::fs::symlink_metadata(path), Err(e) if e.kind() == std::io::ErrorKind::NotFound) {
        let parent = path.parent().filter(|dir| !dir.is_dir());
        return parent.map_or(Ok(()), |dir| {
            let message = format!("mirror: there is no directory {} for {}", dir.display(), path.display());
            Err(ApiError::new(ErrorCode::InvalidConfig, message).with_action("make it first, or name another image"))
        });
    }
    let image = leg_image(path, disk.geometry().size_bytes, config)?;
    let chain = disk.chain();
    check_units(path, &image, chain.layer(chain.pivot_of(chain.live())).image.alignment().offset_bytes)
}

/// The image that is to become a leg of a disk, if it can.
fn new_leg(disk: &DiskEntry, path: &Path) -> Result<SharedImage, ApiError> {
    if *locked(&disk.path) == path && locked(&disk.mirror).is_none() {
        let message = format!("{} is its image already; a mirror has two", path.display());
        return Err(ApiError::new(ErrorCode::Conflict, message).with_action("name another image for the second leg"));
    }
    leg_image(path, disk.disk.geometry().size_bytes, &disk.config)
}

/// A leg is written in the units of the other one.
fn check_units(path: &Path, leg: &SharedImage, other_bytes: u32) -> Result<(), ApiError> {
    if leg.alignment().offset_bytes > other_bytes.max(512) {
        let message = format!("{} needs larger units than the disk's other image", path.display());
        return Err(ApiError::new(ErrorCode::InvalidConfig, message));
    }
    Ok(())
}

impl Manager {
    fn bitmap_path(&self, id: Uuid) -> PathBuf {
        self.places.log_table(id)
    }

    /// A pair of one leg; the other is attached later.
    fn make_pair(&self, first: LegImage, block_bytes: u32) -> Result<(Uuid, Arc<Pair>), ApiError> {
        let id = Uuid::new_v4();
        let path = self.bitmap_path(id);
        let bytes = Pair::bitmap_bytes(first.image.size_bytes(), block_bytes);
        let bitmap: SharedImage = Arc::new(FileImage::create(&path, bytes, Direct::Off).map_err(image_error)?);
        let made =
            in_ring(async move |queue| Pair::create(first, bitmap, id, block_bytes, &queue).await).and_then(|pair| {
                match crate::store::sync_directory_of(&path) {
                    Ok(()) => Ok(pair),
                    Err(e) => Err(ApiError::new(ErrorCode::Io, format!("{}: {e}", path.display()))),
                }
            });
        made.map(|pair| (id, pair)).inspect_err(|_| remove_file(&path))
    }

    /// Opens the full image of a disk: its one image, or the legs of its mirror that are to be used.
    pub(super) fn open_base(
        &self,
        config: &DiskConfig,
        recovery: Option<&Recovery>,
        options: ImageOptions,
    ) -> Result<Base, ApiError> {
        let open = |path: &Path| FileImage::open(path, options).map(|image| Arc::new(image) as SharedImage);
        let mirrored = recovery.and_then(|r| Some((r.record.mirror.as_ref()?, r.mirror.as_ref()?)));
        let Some((mirror, decided)) = mirrored else {
            // That of a volume which became independent was a log, wherever it lies.
            let image = match recovery.is_some_and(|r| r.record.logical_block_bytes.is_some()) {
                true => open_made_here(&config.path, config, options),
                false => open(&config.path),
            };
            return Ok(Base { backing: Backing::One(image.map_err(image_error)?), mirror: None });
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
            images.extend(image.clone().map(|image| LegImage { id: leg.id, image }));
            if *what != LegUse::Forgotten {
                legs.push((leg.clone(), image));
            }
        }
        let (id, block_bytes) = (mirror.bitmap, config.block_size);
        let bitmap = ImageOptions { direct: Direct::Off, read_only: false, lock_wait: options.lock_wait };
        let bitmap: SharedImage = Arc::new(FileImage::open(&self.bitmap_path(id), bitmap).map_err(image_error)?);
        let pair = in_ring(async move |queue| Pair::open(&images, bitmap, id, block_bytes, &queue).await)?;
        let mirror = Mirror { bitmap: id, pair: pair.clone(), legs, is_stopped: mirror.stopped };
        Ok(Base { backing: Backing::Pair(pair), mirror: Some(mirror) })
    }

    /// What a mirrored disk does once it is served: legs that are behind are brought up to date.
    pub(super) fn resume_mirror(&self, disk: &Arc<DiskEntry>) {
        self.watch_legs(disk);
        let behind: Option<(Arc<Pair>, Option<LegImage>)> = locked(&disk.mirror).as_ref().and_then(|mirror| {
            // If no snapshot holds it, it is a split that never came to be.
            let is_split = |leg: &LegRecord| mirror.state_of(leg.id) == Some(mirror::LegState::Split);
            let split = mirror.legs.iter().find(|(leg, _)| is_split(leg) && !disk.holds_leg(&leg.path));
            if let Some((leg, image)) = split {
                return image.clone().map(|image| (mirror.pair.clone(), Some(LegImage { id: leg.id, image })));
            }
            let resyncs = |(leg, _): &&(LegRecord, Option<SharedImage>)| {
                mirror.state_of(leg.id) == Some(mirror::LegState::Resynchronising)
            };
            mirror.legs.iter().find(resyncs).map(|_| (mirror.pair.clone(), None))
        });
        let Some((pair, back)) = behind else { return };
        if let Some(leg) = back {
            let of = pair.clone();
            if let Err(e) = in_ring(async move |queue| of.attach(&queue, leg, false).await) {
                return log::error!("disk {}: a leg does not come back: {}", disk.name, e.message);
            }
        }
        if locked(&disk.mirror).as_ref().is_some_and(|mirror| mirror.is_stopped) {
            let job = self.new_job(JobKind::Mirror, disk, None);
            return self.end_job(&job, JobState::Stopped, None);
        }
        self.start_resync(disk, pair);
    }

    fn watch_legs(&self, disk: &Arc<DiskEntry>) {
        let mirror = locked(&disk.mirror);
        let Some(mirror) = mirror.as_ref() else { return };
        let paths: Vec<_> = mirror.legs.iter().map(|(leg, _)| (leg.id, leg.path.clone())).collect();
        locked(&disk.leg_paths).extend(paths);
        mirror.pair.observe(Arc::new(Legs {
            disk: disk.name.clone(),
            bus: self.bus.clone(),
            of: Arc::downgrade(&disk.disk),
            paths: disk.leg_paths.clone(),
        }));
    }

    /// Gives a disk a second leg, or puts one in the place of a failed one.
    pub(super) fn mirror(&self, name: &Name, path: &Path) -> Result<api::Disk, ApiError> {
        let place = ClaimKey::Path(path.to_owned());
        let _claim = self.claim_with(&Command::Mirror { disk: name.clone() }, [place])?;
        let disk = self.disk(name)?;
        self.refuse_what_others_have(name, path, true)?;
        let in_disk = |e: ApiError| ApiError { message: format!("disk {name}: {}", e.message), ..e };
        self.add_leg(&disk, path).map_err(in_disk)?;
        Ok(disk.to_api())
    }

    pub(super) fn add_leg(&self, disk: &Arc<DiskEntry>, path: &Path) -> Result<(), ApiError> {
        // What is wrong with the image is said before anything changes for its sake.
        let mut opened = None;
        if locked(&disk.mirror).is_none() {
            let image = new_leg(disk, path)?;
            let chain = disk.disk.chain();
            check_units(path, &image, chain.layer(chain.pivot_of(chain.live())).image.alignment().offset_bytes)?;
            opened = Some(image);
            self.make_mirror(disk)?;
        }
        let job = self.job_on(disk, |job| job.kind == JobKind::Mirror);
        let (pair, failed, again) = {
            let mirror = locked(&disk.mirror);
            let mirror = mirror.as_ref().expect("just made");
            let (mut failed, mut again) = (None, None);
            for (leg, _) in &mirror.legs {
                match (mirror.state_of(leg.id), leg.path == path) {
                    (Some(mirror::LegState::InSync), true) => return Ok(()),
                    // Whoever asks again wants it to go on.
                    (Some(mirror::LegState::Resynchronising), true) => again = Some(mirror.pair.clone()),
                    (Some(mirror::LegState::Split), _) => {
                        let message = format!("its leg {} is held by a snapshot", leg.path.display());
                        return Err(ApiError::new(ErrorCode::MirrorNotInSync, message)
                            .with_action("delete that snapshot first; its leg then comes back by itself"));
                    }
                    (Some(mirror::LegState::Resynchronising), false) => match &job {
                        Some(job) if job.state() == JobState::Running => {
                            let message =
                                format!("its leg {} is being synchronised by job {}", leg.path.display(), job.id);
                            return Err(ApiError::new(ErrorCode::MirrorNotInSync, message).with_action(format!(
                                "wait for it: halfsilver job wait {0}; or: halfsilver job stop {0}",
                                job.id
                            )));
                        }
                        // One that nobody goes on with gives way.
                        _ => failed = Some(leg.clone()),
                    },
                    (Some(mirror::LegState::Failed(_)) | None, _) => failed = Some(leg.clone()),
                    (Some(mirror::LegState::InSync), false) => {}
                }
            }
            if failed.is_none() && again.is_none() && mirror.legs.len() > 1 {
                return Err(ApiError::new(ErrorCode::Conflict, "it has two good legs")
                    .with_action(format!("let one go first: halfsilver disk unmirror {}", disk.name)));
            }
            (mirror.pair.clone(), failed, again)
        };
        if let Some(pair) = again {
            self.start_resync(disk, pair);
            return Ok(());
        }
        // What worked on a leg that goes has nothing to go on with.
        self.forget_resyncs_of(disk);
        // The failed leg itself, taken again, may still be open.
        if opened.is_none() && failed.as_ref().is_none_or(|failed| failed.path != path) {
            opened = Some(new_leg(disk, path)?);
        }
        if let Some(failed) = failed {
            self.let_leg_go(disk, &failed)?;
        }
        // Also when it was tried before: a leg that is added must miss no write.
        self.swap(disk, Backing::Pair(pair.clone()))?;
        let leg = LegRecord { id: Uuid::new_v4(), path: path.to_owned(), saved: None };
        let image = match opened {
            Some(image) => image,
            None => new_leg(disk, path)?,
        };
        check_units(path, &image, pair.alignment().offset_bytes)?;
        if let Some(mirror) = locked(&disk.mirror).as_mut() {
            mirror.legs.push((leg.clone(), Some(image.clone())));
        }
        locked(&disk.former_legs).retain(|former| former != path);
        let attached = self.persist(std::slice::from_ref(disk)).and_then(|()| {
            let (of, leg) = (pair.clone(), LegImage { id: leg.id, image });
            in_ring(async move |queue| of.attach(&queue, leg, true).await)
        });
        if let Err(e) = attached {
            if let Some(mirror) = locked(&disk.mirror).as_mut() {
                mirror.legs.retain(|(l, _)| l.id != leg.id);
            }
            self.persist(std::slice::from_ref(disk))?;
            return Err(e);
        }
        locked(&disk.leg_paths).push((leg.id, leg.path));
        self.start_resync(disk, pair);
        Ok(())
    }

    /// Makes a pair with the disk's one image as its only leg.
    fn make_mirror(&self, disk: &Arc<DiskEntry>) -> Result<(), ApiError> {
        let chain = disk.disk.chain();
        let Backing::One(image) = chain.layer(chain.pivot_of(chain.live())).image.clone() else {
            return Err(ApiError::new(ErrorCode::Internal, "it is mirrored already"));
        };
        let leg = LegRecord { id: Uuid::new_v4(), path: locked(&disk.path).clone(), saved: None };
        let first = LegImage { id: leg.id, image: image.clone() };
        let (bitmap, pair) = self.make_pair(first, disk.config.block_size)?;
        *locked(&disk.mirror) =
            Some(Mirror { bitmap, pair: pair.clone(), legs: vec![(leg, Some(image))], is_stopped: false });
        self.watch_legs(disk);
        Ok(())
    }

    /// Swaps the view of the full image, and waits until nobody goes by the old one.
    fn swap(&self, disk: &DiskEntry, image: Backing) -> Result<(), ApiError> {
        let busy = |what: String| ApiError::new(ErrorCode::Unavailable, what);
        let grace = self.editor.replace_full_image(&disk.disk, image).map_err(|e| busy(e.to_string()))?;
        if self.clock.wait_drained(grace, DRAIN_WAIT) {
            return Ok(());
        }
        Err(busy("requests are in flight that do not end; try again later".to_owned()))
    }

    fn let_leg_go(&self, disk: &Arc<DiskEntry>, leg: &LegRecord) -> Result<(), ApiError> {
        let pair = {
            let mut mirror = locked(&disk.mirror);
            let mirror = mirror.as_mut().ok_or_else(|| ApiError::no_second_leg(&disk.name))?;
            mirror.legs.retain(|(l, _)| l.id != leg.id);
            if let Some((stays, _)) = mirror.legs.first()
                && *locked(&disk.path) == leg.path
            {
                locked(&disk.path).clone_from(&stays.path); // The disk is known by the leg that is left.
            }
            mirror.pair.clone()
        };
        locked(&disk.former_legs).push(leg.path.clone());
        // Remembered as no leg any more before the pair forgets that it was one.
        self.persist(std::slice::from_ref(disk))?;
        let id = leg.id;
        in_ring(async move |queue| pair.forget(&queue, id).await)
    }

    /// Lets a leg go; its file stays.
    pub(super) fn unmirror(&self, name: &Name, path: Option<&Path>) -> Result<api::Disk, ApiError> {
        let _claim = self.claim(&Command::Unmirror { disk: name.clone() })?;
        let disk = self.disk(name)?;
        let (goes, stays) = {
            let mirror = locked(&disk.mirror);
            let mirror = mirror.as_ref().filter(|m| m.legs.len() == 2).ok_or_else(|| ApiError::no_second_leg(name))?;
            let goes = match path {
                None => 1,
                Some(path) => mirror.legs.iter().position(|(leg, _)| leg.path == path).ok_or_else(|| {
                    ApiError::new(ErrorCode::InvalidRequest, format!("disk {name} has no leg {}", path.display()))
                })?,
            };
            (mirror.legs[goes].clone(), mirror.legs[1 - goes].clone())
        };
        let state = |id| locked(&disk.mirror).as_ref().and_then(|m| m.state_of(id));
        if state(goes.0.id) == Some(mirror::LegState::Split) {
            let holder = disk.snapshots().into_iter().find(|s| locked(&s.record).image == goes.0.path);
            let holder = holder.map_or_else(|| format!("{name}@NAME"), |s| s.reference.to_string());
            let message = format!("disk {name}: {} is held by snapshot {holder}", goes.0.path.display());
            return Err(ApiError::new(ErrorCode::DiskBusy, message).with_action(format!(
                "delete that one, and its image stays as it is: halfsilver snapshot delete {holder} --keep-image"
            )));
        }
        let Some(image) = stays.1.filter(|_| state(stays.0.id) == Some(mirror::LegState::InSync)) else {
            let message = format!("disk {name}: {} is its only good leg", goes.0.path.display());
            return Err(ApiError::new(ErrorCode::MirrorNotInSync, message));
        };
        if let Some(job) = self.job_on(&disk, |j| j.kind == JobKind::Mirror && j.state() == JobState::Running)
            && !job.abandon(DRAIN_WAIT)
        {
            let message = format!("job {} does not stop: it waits for a block", job.id);
            return Err(ApiError::new(ErrorCode::Unavailable, message).with_action(format!(
                "see 'halfsilver job show {}'; then again: halfsilver disk unmirror {name}",
                job.id
            )));
        }
        // Before the record says so nothing may count on the leg that goes: the other one alone must have everything.
        if let Some(pair) = locked(&disk.mirror).as_ref().map(|m| m.pair.clone()) {
            let id = goes.0.id;
            in_ring(async move |queue| pair.let_go(&queue, id).await)?;
        }
        // From here on only the leg that stays is the disk.
        let old = locked(&disk.mirror).take();
        locked(&disk.former_legs).push(goes.0.path.clone());
        *locked(&disk.path) = stays.0.path;
        if let Err(e) = self.persist(std::slice::from_ref(&disk)) {
            *locked(&disk.mirror) = old;
            locked(&disk.former_legs).pop();
            return Err(e);
        }
        self.swap(&disk, Backing::One(image))?;
        if let Some(old) = old {
            remove_file(&self.bitmap_path(old.bitmap));
        }
        self.forget_resyncs_of(&disk);
        Ok(disk.to_api())
    }

    pub(super) fn start_resync(&self, disk: &Arc<DiskEntry>, pair: Arc<Pair>) {
        if self.is_stopping() {
            return; // The next start goes on with it.
        }
        match self.job_on(disk, |j| j.kind == JobKind::Mirror) {
            // It copies whatever is marked, also what has just been.
            Some(job) if job.state() == JobState::Running => {}
            Some(job) => {
                job.begin_again();
                self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name).with_job(job.id));
                self.run_resync(disk, pair, job);
            }
            None => {
                let job = self.new_job(JobKind::Mirror, disk, None);
                self.run_resync(disk, pair, job);
            }
        }
    }

    /// Takes the jobs off the list that synchronised what is no leg any more.
    fn forget_resyncs_of(&self, disk: &DiskEntry) {
        let is_old =
            |job: &JobEntry| job.is_on(disk) && job.kind == JobKind::Mirror && job.state() != JobState::Running;
        locked(&self.jobs).retain(|_, job| !is_old(job));
    }

    /// Goes on with a synchronisation that was stopped or failed.
    pub(super) fn resume_resync(&self, disk: &Arc<DiskEntry>, job: Arc<JobEntry>) -> Result<(), ApiError> {
        let pair = locked(&disk.mirror).as_ref().map(|m| m.pair.clone());
        let pair = pair.ok_or_else(|| ApiError::no_second_leg(&disk.name))?;
        if let Some(mirror) = locked(&disk.mirror).as_mut() {
            mirror.is_stopped = false;
        }
        self.persist(std::slice::from_ref(disk))?;
        job.begin_again();
        self.bus.publish(Notice::of_disk(EventKind::JobStarted, &disk.name).with_job(job.id));
        self.run_resync(disk, pair, job);
        Ok(())
    }

    fn run_resync(&self, disk: &Arc<DiskEntry>, pair: Arc<Pair>, job: Arc<JobEntry>) {
        if let Some(mirror) = locked(&disk.mirror).as_mut() {
            mirror.is_stopped = false;
        }
        let (on, of, ours) = (disk.clone(), disk.clone(), job.clone());
        let run = move |manager: &Manager| {
            let (disk, pace) = (on.disk.clone(), ours.pace.clone());
            let done = block_on(async move |queue| job::resync(queue, disk, pair, pace).await)?;
            let outcome = done.map_err(|e| e.to_string())?;
            let legs = locked(&on.mirror).as_ref().map(Mirror::legs_to_api).unwrap_or_default();
            if let (Outcome::Done, Some(leg)) = (outcome, legs.last()) {
                manager.bus.publish(Notice::of_disk(EventKind::LegInSync, &on.name).with_leg(&leg.path));
            }
            Ok(outcome)
        };
        let mark_stopped = move || {
            if let Some(mirror) = locked(&of.mirror).as_mut() {
                mirror.is_stopped = true;
            }
        };
        self.run_job("mirror", &job, run, mark_stopped, |_, _| ());
    }

    /// What a write-mirroring snapshot needs: the leg that it takes, and what the live version goes on with.
    pub(super) fn split(&self, disk: &DiskEntry) -> Result<(Backing, Backing), ApiError> {
        let pair = locked(&disk.mirror).as_ref().filter(|m| m.legs.len() == 2).map(|m| m.pair.clone());
        let pair = pair.ok_or_else(|| ApiError::no_second_leg(&disk.name))?;
        let of = pair.clone();
        in_ring(async move |queue| of.prepare_split(&queue).await)
            .map_err(|e| ApiError { message: format!("disk {}: {}", disk.name, e.message), ..e })?;
        let frozen = pair.second().ok_or_else(|| ApiError::no_second_leg(&disk.name))?;
        let live = pair.detached().map_err(pair_error)?;
        if let Some(mirror) = locked(&disk.mirror).as_mut() {
            mirror.pair = live.clone();
        }
        Ok((Backing::One(frozen.image), Backing::Pair(live)))
    }

    /// A leg that failed after its split was prepared and before the cut: nothing was frozen on it yet.
    pub(super) fn check_split(disk: &DiskEntry, entry: &SnapshotEntry, version: &mirror::Version) {
        let path = locked(&entry.record).image.clone();
        let state = locked(&disk.mirror).as_ref().and_then(|mirror| {
            let (leg, _) = mirror.legs.iter().find(|(leg, _)| leg.path == path)?;
            mirror.state_of(leg.id)
        });
        if let Some(mirror::LegState::Failed(reason)) = state {
            disk.disk.break_version(version, &reason);
        }
    }

    /// A leg comes back to the mirror, with what was written since it was split.
    pub(super) fn rejoin(&self, disk: &Arc<DiskEntry>, path: &Path, image: SharedImage) -> Result<(), String> {
        let (pair, id) = {
            let mirror = locked(&disk.mirror);
            let mirror = mirror.as_ref().ok_or("the disk has no mirror any more")?;
            let (leg, _) = mirror.legs.iter().find(|(leg, _)| leg.path == path).ok_or("it is no leg any more")?;
            (mirror.pair.clone(), leg.id)
        };
        let (of, leg) = (pair.clone(), LegImage { id, image: image.clone() });
        in_ring(async move |queue| of.attach(&queue, leg, false).await).map_err(|e| e.message)?;
        if let Some(mirror) = locked(&disk.mirror).as_mut()
            && let Some((_, place)) = mirror.legs.iter_mut().find(|(leg, _)| leg.id == id)
        {
            *place = Some(image);
        }
        self.start_resync(disk, pair);
        Ok(())
    }

    /// Lets a leg go that does not come back, if there is one at `path`: by the bitmap alone nobody can tell any more what
    /// it holds. Its file stays.
    pub(super) fn lose_leg(&self, disk: &Arc<DiskEntry>, path: &Path) -> Result<(), ApiError> {
        let leg = locked(&disk.mirror)
            .as_ref()
            .and_then(|m| m.legs.iter().find(|(leg, _)| leg.path == path).map(|(leg, _)| leg.clone()));
        leg.map_or(Ok(()), |leg| self.let_leg_go(disk, &leg))
    }

    /// What becomes of the leg that a write-mirroring snapshot had.
    pub(super) fn after_split(&self, disk: &Arc<DiskEntry>, entry: &SnapshotEntry, image: Option<SharedImage>) {
        let (path, keep) = {
            let record = locked(&entry.record);
            (record.image.clone(), record.keep_image)
        };
        let reference: &SnapshotRef = &entry.reference;
        let broken = entry.broken().is_some();
        let done = match image.filter(|_| !keep) {
            Some(image) if !broken => self.rejoin(disk, &path, image),
            _ => self.lose_leg(disk, &path).map_err(|e| e.message),
        };
        match done {
            Ok(()) if keep => log::info!("snapshot {reference}: {} stays as it is", path.display()),
            Ok(()) => {}
            Err(e) => log::error!("snapshot {reference}: {} does not come back as a leg: {e}", path.display()),
        }
    }

    /// Clears what the bitmaps need not remember any more, now and then.
    pub(super) fn clean_mirrors(&self) {
        for disk in self.all_disks() {
            let pair = locked(&disk.mirror).as_ref().map(|m| m.pair.clone());
            let Some(pair) = pair.filter(|p| p.marked_bytes() > 0) else { continue };
            if disk.cleaning.swap(true, std::sync::atomic::Ordering::AcqRel) {
                continue;
            }
            let of = disk.clone();
            let started = self.start_thread("clean", move || {
                let disk = of.disk.clone();
                let done = block_on(async move |queue| pair.clean(&queue, disk.block_locks()).await);
                if let Err(e) = done.and_then(|d| d.map_err(|e| e.to_string())) {
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
    /// Whether a leg of it is to be synchronised.
    pub(super) fn has_leg_behind(&self) -> bool {
        let mirror = locked(&self.mirror);
        let status = mirror.as_ref().map(|mirror| mirror.pair.status()).unwrap_or_default();
        status.iter().any(|leg| leg.state == mirror::LegState::Resynchronising)
    }
}
