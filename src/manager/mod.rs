//! The manager: which disks are served, their snapshots, and what is remembered of them.
//!
//! What always holds:
//! - What changes a disk has claimed it ([`claims`]); reading waits for nobody.
//! - A record is durable before what it announces can be seen, and files go before their record goes.
//! - While a disk is served its record does not say "saved": a start after anything but a clean stop does not
//!   vouch for its snapshots.

pub(crate) mod changes;
pub(crate) mod claims;
pub(crate) mod entry;
pub(crate) mod followups;
pub(crate) mod identities;
pub(crate) mod jobs;
pub(crate) mod layers;
pub(crate) mod legs;
pub(crate) mod names;
pub(crate) mod opening;
pub(crate) mod orphans;
pub(crate) mod places;
pub(crate) mod planned;
pub(crate) mod quiesced;
pub(crate) mod recording;
pub(crate) mod relations;
pub(crate) mod restoring;
pub(crate) mod save;
pub(crate) mod sockets;
pub(crate) mod split;
pub(crate) mod unserved;
pub(crate) mod view;
pub(crate) mod volumes;
pub(crate) mod work;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use uuid::Uuid;

use crate::control::{ApiError, ErrorCode, EventBus, EventKind, Name, Notice};
use crate::crash;
use crate::door::{Attachment, Engine, Epoch, Event, Supervisor, VersionId};
use crate::host::{Host, Running, receive};
use crate::image::{ImageError, ImageErrorKind};
use crate::manager::entry::{DiskEntry, Recorded, SnapshotEntry, locked};
use crate::manager::followups::{FollowUp, FollowUps};
use crate::manager::identities::RecognisedRecords;
use crate::manager::jobs::JobEntry;
pub use crate::manager::places::{PlaceError, Places};
use crate::manager::unserved::Unserved;
use crate::registry::Claims;
use crate::store::{DiskRecord, RecordError, RecordStore, TableError};

/// How often write-intent bitmaps are cleaned: regions that were written in between stay marked.
const CLEAN_INTERVAL: Duration = Duration::from_secs(5);

/// Why the daemon cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A directory cannot be used.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The records cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The system refused something basic.
    #[error("{0}")]
    System(String),
}

/// Runs the disks.
pub struct Manager {
    pub(crate) host: Arc<dyn Host>,
    pub(crate) places: Arc<Places>,
    pub(crate) records: Box<dyn RecordStore>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) bus: Arc<EventBus>,
    pub(crate) disks: Mutex<BTreeMap<Name, Arc<DiskEntry>>>,
    /// What is remembered or configured and cannot be served.
    pub(crate) unserved: Mutex<BTreeMap<Name, Unserved>>,
    /// What a start that is under way has found remembered, and may have yet to open.
    pub(crate) starting: Mutex<Vec<DiskRecord>>,
    /// What is wrong and is said of nothing that is listed.
    pub(crate) problems: Mutex<Vec<String>>,
    pub(crate) jobs: Mutex<BTreeMap<u64, Arc<JobEntry>>>,
    /// The number that a job got last by the clock.
    pub(crate) last_by_clock: Mutex<u64>,
    /// Who is changing what.
    pub(crate) claims: Mutex<Claims>,
    /// Rings when a claim was let go.
    pub(crate) released: Condvar,
    pub(crate) follow_ups: Mutex<FollowUps>,
    /// Held by who looks which restores can go on: each goes on once.
    pub(crate) resuming: Mutex<()>,
    /// Whether the control socket answers.
    pub(crate) is_listening: AtomicBool,
    pub(crate) stopping: AtomicBool,
    pub(crate) threads: Mutex<Vec<Box<dyn Running>>>,
    pub(crate) house: Sender<HouseNews>,
    /// For the threads that the manager starts itself.
    pub(crate) me: Weak<Manager>,
}

/// What the housekeeper is told.
pub(crate) enum HouseNews {
    /// The engine has noticed something of a disk.
    Engine(Uuid, Event),
    /// The daemon is going down.
    Stopping,
}

/// What the engine asks for and tells, on data-path threads: files are written at once, all else is the housekeeper's.
struct EngineRoom {
    tell: Sender<HouseNews>,
    host: Arc<dyn Host>,
    places: Arc<Places>,
}

impl Supervisor for EngineRoom {
    fn told(&self, disk: Uuid, event: Event) {
        if self.tell.send(HouseNews::Engine(disk, event)).is_err() {
            log::debug!("something happened to a disk while the daemon ends");
        }
    }

    fn breaks(&self, version: VersionId, reason: &str) {
        let mark = self.places.broken_mark(version);
        if let Err(e) = self.host.write_note(&mark, reason) {
            log::error!(
                "{} cannot be made; a kill now would lose the word that a snapshot is broken: {e}",
                mark.display()
            );
        }
    }

    /// A version below the pivot is not believed after a power cut unless its durable table has its name. Changing a name
    /// needs no room, unlike writing the word "broken" where there is none.
    fn give_up(&self, version: VersionId) -> Result<(), String> {
        let (path, given_up) = (self.places.saved_table(version), self.places.given_up_table(version));
        let renamed = match self.host.rename(&path, &given_up) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => self.host.sync_directory_of(&path),
        };
        renamed.map_err(|e| format!("{} cannot be renamed: {e}", path.display()))
    }
}

impl Manager {
    /// A manager without disks.
    ///
    /// # Errors
    /// When the records are lost or cannot be opened, or the system has no room for a thread.
    pub fn open(host: Arc<dyn Host>, places: Places) -> Result<Arc<Manager>, OpenError> {
        places.refuse_lost_records(&*host)?;
        let records = RecognisedRecords::new(host.open_records(&places.records())?, host.clone(), places.tables());
        let remembered = records.disks()?;
        let problem = records.made_anew().map(|wrong| {
            format!("{wrong}; a new one was made from its second copy, which has {} disks", remembered.disks.len())
        });
        let dropped = records.dropped()?;
        places.remove_orphans(&*host, &remembered, &dropped)?;
        places.clear_dead_sockets(&*host);
        if !dropped.is_empty() && remembered.unreadable.is_empty() {
            records.forget_dropped()?;
        }
        let ((house, inbox), places) = (channel(), Arc::new(places));
        let room = EngineRoom { tell: house.clone(), host: host.clone(), places: places.clone() };
        let engine = Engine::new(host.clone(), Arc::new(room), first_epoch(&remembered.disks));
        let manager = Arc::new_cyclic(|me| Manager {
            host,
            places,
            records: Box::new(records),
            engine,
            bus: Arc::new(EventBus::default()),
            disks: Mutex::default(),
            unserved: Mutex::default(),
            starting: Mutex::default(),
            problems: Mutex::new(problem.into_iter().collect()),
            jobs: Mutex::default(),
            last_by_clock: Mutex::default(),
            claims: Mutex::default(),
            released: Condvar::new(),
            follow_ups: Mutex::default(),
            resuming: Mutex::default(),
            is_listening: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            threads: Mutex::default(),
            house,
            me: me.clone(),
        });
        let keeper = manager.me.clone();
        let started = manager.start_thread("housekeeper", move || keep_house(&keeper, &inbox));
        started.map_err(|e| OpenError::System(format!("cannot start a thread: {e}")))?;
        Ok(manager)
    }

    /// From here on no command begins, and what goes on ends where it can be gone on with.
    pub fn going_down(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.released.notify_all();
    }

    /// The epoch that requests enter now.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.engine.epoch()
    }

    /// The disk or volume that is served so.
    #[must_use]
    pub fn disk_at(&self, attachment: &Attachment) -> Option<Uuid> {
        self.engine.disk_at(attachment).filter(|id| self.all_disks().iter().any(|disk| disk.id == *id))
    }

    /// A number that no job had before.
    pub(crate) fn next_job_id(&self) -> u64 {
        match self.records.take_job_ids(1) {
            Ok(ids) => ids.start,
            Err(e) => {
                // One that the clock gives is not given twice either.
                log::warn!("a job gets a number by the clock: {e}");
                let mut last = locked(&self.last_by_clock);
                *last = self.host.unix_ms().max(*last + 1);
                *last
            }
        }
    }

    /// Whether this very disk or volume is served, and not one that has its name now.
    pub(crate) fn is_served(&self, disk: &DiskEntry) -> bool {
        locked(&self.disks).get(&disk.name.get()).is_some_and(|served| std::ptr::eq(&**served, disk))
    }

    /// Whether this very snapshot is there.
    pub(crate) fn is_there(&self, disk: &DiskEntry, snapshot: &Arc<SnapshotEntry>) -> bool {
        self.is_served(disk) && disk.snapshots().iter().any(|s| Arc::ptr_eq(s, snapshot))
    }

    /// Whether the daemon is going down.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(crate) fn refuse_when_stopping(&self) -> Result<(), ApiError> {
        if self.is_stopping() {
            return Err(ApiError::new(ErrorCode::Unavailable, "the daemon is going down"));
        }
        Ok(())
    }

    /// Starts a thread that the daemon's end waits for.
    pub(crate) fn start_thread(&self, name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let mut threads = locked(&self.threads);
        // A thread that has ended keeps its stack until it is joined.
        for ended in threads.extract_if(.., |t| t.is_ended()) {
            if ended.join() {
                log::error!("a thread panicked");
            }
        }
        let started = self.host.start_thread(name, Box::new(run));
        threads.push(started.inspect_err(|e| log::error!("cannot start the thread {name}: {e}"))?);
        Ok(())
    }

    pub(crate) fn disk(&self, name: &Name) -> Result<Arc<DiskEntry>, ApiError> {
        // At one moment: it may be about to be served.
        let disks = locked(&self.disks);
        if let Some(disk) = disks.get(name) {
            return Ok(disk.clone());
        }
        self.refuse_unserved(name)?;
        Err(ApiError::disk_not_found(name))
    }

    pub(crate) fn all_disks(&self) -> Vec<Arc<DiskEntry>> {
        locked(&self.disks).values().cloned().collect()
    }

    /// Makes the records of these disks durable.
    pub(crate) fn persist(&self, disks: &[Arc<DiskEntry>]) -> Result<(), ApiError> {
        let records: Vec<DiskRecord> = disks.iter().map(|d| d.to_record()).collect();
        self.records.put(&records.iter().collect::<Vec<_>>()).map_err(record_error)
    }

    /// Changes what is recorded of a claimed disk, and records it. What cannot be recorded is taken back.
    pub(crate) fn change(&self, disk: &Arc<DiskEntry>, change: impl FnOnce()) -> Result<(), ApiError> {
        let before = Recorded::of(disk);
        change();
        self.persist(std::slice::from_ref(disk)).inspect_err(|_| before.put_back(disk))
    }

    /// Stores what the record of a claimed disk should say, now or when the records take it.
    pub(crate) fn persist_later(&self, disk: &Arc<DiskEntry>) {
        if let Err(e) = self.persist(std::slice::from_ref(disk)) {
            log::warn!("{}: what is recorded of it is put right later: {e}", disk.name);
            self.follow_up(FollowUp::Record(disk.clone()));
        }
    }

    /// Tells what the engine has noticed of a disk.
    fn tell(&self, id: Uuid, event: Event) {
        let Some(disk) = self.all_disks().into_iter().find(|disk| disk.id == id) else { return };
        match event {
            Event::VersionBroken(version, why) => self.tell_broken(disk, version, why),
            Event::LegOut(path, why) => {
                self.bus.publish(Notice::of_disk(EventKind::LegFailed, &disk.name.get()).with_leg(&path).because(why));
            }
        }
    }

    fn tell_broken(&self, disk: Arc<DiskEntry>, id: Uuid, reason: String) {
        if let Some(snapshot) = disk.snapshots().into_iter().find(|s| s.id == id) {
            log::error!("snapshot {} is broken: {reason}", snapshot.reference());
            self.bus.publish(Notice::of_snapshot(EventKind::SnapshotBroken, &snapshot.reference()).because(reason));
            // Its old frontends go on with the live version, which has all that they wrote.
            if let Err(e) = self.move_frontends(&snapshot) {
                log::warn!("snapshot {}: its frontends stay with it: {}", snapshot.reference(), e.message);
            }
            crash::point("before it is recorded that a version is broken");
            // Beside no other change, whose record this one would undo; so nobody here waits for it.
            self.follow_up_at_once(FollowUp::Record(disk));
        }
    }

    fn tell_failures(&self) {
        for disk in self.all_disks() {
            if let Some(reason) = disk.failure()
                && !disk.failure_told.swap(true, Ordering::SeqCst)
            {
                log::error!("disk {} has failed: {reason}", disk.name);
                let kind = if disk.is_volume() { EventKind::VolumeBroken } else { EventKind::DiskFailed };
                self.bus.publish(Notice::of_disk(kind, &disk.name.get()).because(reason));
            }
        }
    }
}

/// What data-path threads must not do themselves: recording and telling.
fn keep_house(manager: &Weak<Manager>, inbox: &Receiver<HouseNews>) {
    let Some(host) = manager.upgrade().map(|manager| manager.host.clone()) else { return };
    let mut last_clean = host.now();
    loop {
        let news = receive(&*host, inbox, Duration::from_millis(500));
        let Some(manager) = manager.upgrade() else { return };
        match news {
            Ok(HouseNews::Engine(disk, event)) => manager.tell(disk, event),
            // Guests wait for the next daemon; what is still to be told is in the records that are saved.
            Ok(HouseNews::Stopping) => return,
            Err(RecvTimeoutError::Timeout) if manager.is_stopping() => return,
            Err(RecvTimeoutError::Timeout) => {
                manager.tell_failures();
                manager.all_disks().iter().for_each(|disk| disk.disk.relieve_background());
                manager.try_follow_ups();
                if host.now() - last_clean >= CLEAN_INTERVAL {
                    last_clean = host.now();
                    manager.clean_mirrors();
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Epochs go on where they were, so that versions stay in order.
fn first_epoch(disks: &[DiskRecord]) -> Epoch {
    let used = disks.iter().flat_map(|d| d.snapshots.iter().map(|s| s.ended).chain([d.live_began]));
    // A cut that was prepared takes two more when it is taken up.
    Epoch(used.max().unwrap_or(0) + 3)
}

pub(crate) fn record_error(e: RecordError) -> ApiError {
    let code = if matches!(e, RecordError::NoSpace(_)) { ErrorCode::NoSpace } else { ErrorCode::Io };
    ApiError::new(code, e.to_string())
}

pub(crate) fn engine_error(e: crate::door::Error) -> ApiError {
    use crate::door::Error;
    let code = match e {
        Error::Image(e) => return image_error(e),
        Error::Table(e) => return table_error(e),
        Error::Mirror(_) => ErrorCode::MirrorNotInSync,
        Error::Broken(_) => ErrorCode::SnapshotBroken,
        Error::Busy(_) => ErrorCode::Unavailable,
        Error::Io(_) => ErrorCode::Io,
    };
    ApiError::new(code, e.to_string())
}

pub(crate) fn table_error(e: TableError) -> ApiError {
    let code = if matches!(e, TableError::NoSpace { .. }) { ErrorCode::NoSpace } else { ErrorCode::Io };
    ApiError::new(code, e.to_string())
}

pub(crate) fn image_error(e: ImageError) -> ApiError {
    let code = match e.kind {
        ImageErrorKind::NoSpace => ErrorCode::NoSpace,
        ImageErrorKind::InUse => ErrorCode::Conflict,
        ImageErrorKind::Unsuitable => ErrorCode::InvalidConfig,
        _ if e.errno == Some(libc::EEXIST) => ErrorCode::Conflict,
        _ if matches!(e.errno, Some(libc::ENOENT | libc::EACCES | libc::EPERM | libc::EISDIR)) => {
            ErrorCode::InvalidConfig
        }
        _ => ErrorCode::Io,
    };
    ApiError::new(code, e.to_string())
}
