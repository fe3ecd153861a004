//! The engine as the daemon asks it, and a disk that is open there.
//!
//! What always holds: a disk is known by its id from [`Engine::open`] on until its [`Disk`] is dropped; what is served of
//! it meanwhile goes on until its sockets are closed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::error::Error;
use super::facts::{DiskFacts, Trouble};
use crate::engine::{
    self, Attachment, ChainEditor, ClosedDisk, DiskObserver, Epoch, EpochClock, Layer, Pair, RestoreSource, VersionId,
};
use crate::host::Host;
use crate::image::{IoQueue, SharedImage};
use crate::store::DurableTable;

/// What the engine has noticed by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A frozen version is broken, and why.
    VersionBroken(VersionId, String),
    /// A leg is out of its mirror: its image, and why.
    LegOut(PathBuf, String),
}

/// Whom the engine asks and tells. Called on data-path threads: be quick.
pub trait Supervisor: Send + Sync + 'static {
    /// Something happened to a disk.
    fn told(&self, disk: Uuid, event: Event);

    /// A frozen version is about to be broken, and why. It is so when this returns: who comes after a kill must find it so.
    fn breaks(&self, version: VersionId, reason: &str);

    /// Makes durable that nothing of what is saved for a version is to be believed any more. May be asked again.
    ///
    /// # Errors
    /// Why it cannot be had.
    fn give_up(&self, version: VersionId) -> Result<(), String>;
}

/// All disks that are open, and the one counter of epochs.
pub struct Engine {
    pub(super) host: Arc<dyn Host>,
    pub(super) supervisor: Arc<dyn Supervisor>,
    pub(super) clock: EpochClock,
    pub(super) editor: Arc<ChainEditor>,
    disks: Mutex<BTreeMap<Uuid, Arc<Open>>>,
}

/// A disk that is open in the engine. It is closed when this is dropped.
pub struct Disk {
    pub(super) engine: Arc<Engine>,
    /// Its name.
    pub id: Uuid,
}

/// What the engine has of a disk.
pub(super) struct Open {
    pub(super) disk: Arc<engine::Disk>,
    /// The legs by which the live version writes, or is about to.
    pub(super) mirror: Mutex<Option<Arc<Pair>>>,
    /// The leg that a version has alone which is about to leave the chain, or has.
    pub(super) left_leg: Mutex<Option<SharedImage>>,
    pub(super) restore: Mutex<Option<Pending>>,
    /// The log that a volume gets with its next base, as long as there is a [`super::NextLog`] for it.
    pub(super) next_log: Mutex<Option<Layer>>,
}

/// A restore in place that has not begun, or not again.
pub(super) struct Pending {
    pub(super) blocks: DurableTable,
    /// None while it waits for the volume that it goes back to.
    pub(super) source: Option<RestoreSource>,
    /// None when all requests fail meanwhile.
    pub(super) closed: Option<ClosedDisk>,
}

/// Locks a mutex whose data stays valid whatever happened to an earlier holder.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes on what the engine notices of one disk.
pub(super) struct Watch {
    pub(super) id: Uuid,
    pub(super) supervisor: Arc<dyn Supervisor>,
}

impl DiskObserver for Watch {
    fn version_breaks(&self, version: VersionId, reason: &str) {
        self.supervisor.breaks(version, reason);
    }

    fn version_broken(&self, version: VersionId, reason: &str) {
        self.supervisor.told(self.id, Event::VersionBroken(version, reason.to_owned()));
    }
}

impl Engine {
    /// An engine without disks, whose counter stands at `start`.
    #[must_use]
    pub fn new(host: Arc<dyn Host>, supervisor: Arc<dyn Supervisor>, start: Epoch) -> Arc<Engine> {
        let clock = EpochClock::new(start);
        let editor = Arc::new(ChainEditor::new(clock.clone()));
        Arc::new(Engine { host, supervisor, clock, editor, disks: Mutex::default() })
    }

    /// The epoch that requests enter now.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.clock.current()
    }

    /// The disk that is served so.
    #[must_use]
    pub fn disk_at(&self, attachment: &Attachment) -> Option<Uuid> {
        locked(&self.disks).iter().find(|(_, open)| Arc::ptr_eq(&open.disk, attachment.disk())).map(|(id, _)| *id)
    }

    pub(super) fn enter(self: &Arc<Engine>, id: Uuid, open: Open) -> Result<Disk, Error> {
        let mut disks = locked(&self.disks);
        if disks.contains_key(&id) {
            return Err(Error::Io("it is still being closed; try again".to_owned()));
        }
        disks.insert(id, Arc::new(open));
        Ok(Disk { engine: self.clone(), id })
    }

    pub(super) fn find(&self, id: Uuid) -> Option<Arc<Open>> {
        locked(&self.disks).get(&id).cloned()
    }

    /// Runs work on a ring of its own, in this thread.
    pub(super) fn on_ring<T: 'static, E: Into<Error> + 'static>(
        &self,
        work: impl AsyncFnOnce(IoQueue) -> Result<T, E> + 'static,
    ) -> Result<T, Error> {
        self.host.block_on(work).map_err(|e| Error::Io(format!("no ring: {e}")))?.map_err(Into::into)
    }
}

impl Disk {
    pub(super) fn open(&self) -> Arc<Open> {
        self.engine.find(self.id).expect("a disk is open until this is dropped")
    }

    /// What it is like now.
    #[must_use]
    pub fn facts(&self) -> DiskFacts {
        let open = self.open();
        let mirror = locked(&open.mirror).clone();
        let mut facts = DiskFacts::of(&open.disk, mirror.as_deref());
        facts.restore_waits = locked(&open.restore).as_ref().is_some_and(|pending| pending.source.is_none());
        facts
    }

    /// What makes all of it useless now.
    #[must_use]
    pub fn trouble(&self) -> Trouble {
        Trouble::of(&self.open().disk)
    }

    /// How much storage the live version's full image takes, if that can be told. The image may keep the caller waiting.
    #[must_use]
    pub fn allocated_bytes(&self) -> Option<u64> {
        let chain = self.open().disk.chain();
        chain.layer(chain.pivot_of(chain.live())).image.allocated_bytes()
    }

    /// The live version, or a frozen one, which should be quiesced: to be served.
    #[must_use]
    pub fn attach(&self, frozen: Option<VersionId>) -> Attachment {
        let disk = &self.open().disk;
        frozen.map_or_else(|| disk.attach_live(), |version| disk.attach_frozen(version))
    }

    /// Lets background work go on that waits behind a holder of a turn that hangs; to be called now and then.
    pub fn relieve_background(&self) {
        self.open().disk.background().relieve();
    }

    /// What background work may have in flight beside an active guest; 0 for as much as it wants.
    pub fn set_window(&self, bytes: u64) {
        self.open().disk.background().set_window(bytes);
    }

    /// Breaks a frozen version.
    pub fn break_version(&self, version: VersionId, reason: &str) {
        let disk = &self.open().disk;
        let chain = disk.chain();
        if let Some(index) = chain.position(version) {
            disk.break_version(chain.version(index), reason);
        }
    }

    /// Waits until a version that ended with `ended` never changes again, at most for twice `time`. Returns whether that is so.
    #[must_use]
    pub fn wait_quiet(&self, ended: Epoch, time: Duration) -> bool {
        let (open, host) = (self.open(), &self.engine.host);
        let free = open.disk.connections().wait_free(ended, host.patience(time));
        free.is_some_and(|last| open.disk.clock().wait_quiet(last, host.patience(time)))
    }

    /// What a version shows outlives a power cut from now on, if it is one of those that do. Otherwise it is broken.
    pub fn store_shown(&self, version: VersionId) {
        let of = self.open().disk.clone();
        if let Err(e) = self.engine.on_ring(async move |queue| of.make_durable(&queue, version).await) {
            self.break_version(version, &format!("it could not be stored: {e}"));
        }
    }

    /// Says that a version never changes again.
    pub fn set_quiesced(&self, version: VersionId) {
        let chain = self.open().disk.chain();
        if let Some(index) = chain.position(version) {
            chain.version(index).set_quiesced();
        }
    }

    /// What outlives a power cut is about to change, and the records do not say so yet: until they do
    /// ([`Disk::durability_recorded`]) nothing is said to.
    pub fn durability_changes(&self) {
        self.open().disk.durability_changes();
    }

    /// The records say what has changed.
    pub fn durability_recorded(&self) {
        self.open().disk.durability_recorded();
    }

    /// Notes what was noted for a mark for the next newer one, too: the mark may go then, from the records first.
    pub fn hand_on_mark(&self, id: VersionId) {
        self.engine.editor.hand_on_mark(&self.open().disk, id);
    }

    /// Takes a mark away; what was noted for it goes to the next newer one.
    pub fn forget_mark(&self, id: VersionId) {
        self.engine.editor.forget_mark(&self.open().disk, id);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Not under the lock: what it has may be closed by that.
        let closed = locked(&self.engine.disks).remove(&self.id);
        drop(closed);
    }
}
