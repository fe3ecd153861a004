//! The steps of the daemon in their order, on a simulated host. Each function names the one of `src/ops/` or `src/manager/`
//! whose order it has; what decides anything (`recovery`, `recording`, jobs, the engine) is the daemon's own code.
//!
//! Left out: sockets, events, stops, cutovers, and what follows from images that fail.

mod evidence;
mod legs;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex};

use halfsilver::engine::{
    Backing, Chain, ChainEditor, Disk, DiskObserver, DiskOptions, Epoch, EpochClock, Geometry, Layer, Link, Log,
    NewLayer, PreparedSnapshot, RetireError, Saved, Version, VersionId, Writers,
};
use halfsilver::image::{IoQueue, SharedImage};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::manager::recording;
use halfsilver::recovery::{
    ChangedUse, LayerSource, LegUse, NotCarriedOut, Recovery, TableSource, TableUse, Taken, carry_out,
};
use halfsilver::store::{BlockIndex, DiskRecord, DurableTable, PAYLOAD_BYTES, SnapshotRecord, Table};
use uuid::Uuid;

pub use self::evidence::decided;
use self::legs::{Mirror, open_base};
use crate::host::{Host, Lock, yield_now};
use crate::media::{self, run, set_aside};
use crate::oracle::{Fact, Oracle};
use crate::run::{Shape, Slip, Strategy};
use crate::schedule::Rng;

/// Tasks that others have begun, for the scheduler.
pub type Begun = Rc<RefCell<Vec<Pin<Box<dyn Future<Output = ()>>>>>>;

/// A snapshot, as the daemon holds it (`entry::SnapshotEntry`).
pub struct Entry {
    pub id: Uuid,
    pub record: RefCell<SnapshotRecord>,
    pub version: Option<Arc<Version>>,
}

/// What goes on at a moment, by name and how often.
#[derive(Default)]
pub struct Phases(RefCell<BTreeMap<&'static str, usize>>);
pub struct Phase(Rc<Phases>, &'static str);

impl Phases {
    pub fn begin(self: &Rc<Self>, name: &'static str) -> Phase {
        *self.0.borrow_mut().entry(name).or_default() += 1;
        Phase(self.clone(), name)
    }

    pub fn now(&self) -> Vec<&'static str> {
        self.0.borrow().iter().filter(|(_, times)| **times > 0).map(|(name, _)| *name).collect()
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        *self.0.0.borrow_mut().get_mut(self.1).unwrap() -= 1;
    }
}

/// No image fails here, so no version breaks.
#[derive(Default)]
struct Broken(Mutex<Vec<String>>);

impl DiskObserver for Broken {
    fn version_broken(&self, version: VersionId, reason: &str) {
        self.0.lock().unwrap().push(format!("version {version} broke without a fault: {reason}"));
    }
}

/// A daemon that serves one disk.
pub struct Daemon {
    pub host: Rc<RefCell<Host>>,
    pub oracle: Rc<RefCell<Oracle>>,
    pub queue: IoQueue,
    pub clock: EpochClock,
    editor: Arc<ChainEditor>,
    pub disk: Arc<Disk>,
    pub entries: RefCell<Vec<Rc<Entry>>>,
    pub phases: Rc<Phases>,
    shape: Shape,
    id: Uuid,
    path: RefCell<PathBuf>,
    mirror: RefCell<Option<Mirror>>,
    former_legs: RefCell<Vec<PathBuf>>,
    /// Snapshots that were not recorded as quiesced when the last daemon ended, and are now.
    drained_at_the_end: RefCell<Vec<Uuid>>,
    structure: Lock,
    /// One deletion at a time (`Manager::begin_retire` waits for its turn).
    turn: Lock,
    resyncs: Cell<bool>,
    cleans: Cell<bool>,
    begun: Begun,
    broken: Arc<Broken>,
    me: Weak<Daemon>,
}

fn log_table(id: Uuid) -> PathBuf {
    PathBuf::from(format!("tables/{id}.log"))
}

/// As `layers::DiskLayers`.
struct Layers {
    host: Rc<RefCell<Host>>,
    blocks: u64,
    slip: Option<Slip>,
}

impl Layers {
    fn open(&self, path: &Path) -> Result<SharedImage, NotCarriedOut> {
        self.host.borrow().open(path).map_err(NotCarriedOut)
    }

    /// `DiskLayers::left_table`.
    fn left_table(&self, id: Uuid) -> Result<Arc<Table>, NotCarriedOut> {
        self.host.borrow().run_tables.get(&id).cloned().ok_or_else(|| NotCarriedOut("no run table".to_owned()))
    }

    /// `DiskLayers::open_table`. Nothing else goes on meanwhile.
    fn open_table(&self, id: Uuid, how: &TableUse) -> Result<DurableTable, NotCarriedOut> {
        let (durable, queue) = (self.open(&log_table(id))?, IoQueue::simulated());
        let _aside = set_aside();
        if how.source == TableSource::Run {
            let table = self.left_table(id)?;
            let resumed = async move { DurableTable::resume(durable, id, table, &queue).await };
            return Ok(run(&mut Rng::new(1), resumed)?.0);
        }
        let table = Arc::new(Table::in_memory(self.blocks).unwrap());
        let into = table.clone();
        let loaded = run(&mut Rng::new(1), async move { DurableTable::load(durable, id, into, &queue).await });
        let (durable, report) = loaded?;
        if !report.damaged.is_empty() {
            return Err(NotCarriedOut(format!("{} is damaged", log_table(id).display())));
        }
        self.host.borrow_mut().run_tables.insert(id, table);
        Ok(durable)
    }
}

impl LayerSource for Layers {
    fn open_full(&self, image: &Path) -> Result<SharedImage, NotCarriedOut> {
        self.open(image)
    }

    fn open_saved(&self, id: Uuid, image: &Path, how: &TableUse) -> Result<Layer, NotCarriedOut> {
        let image = Backing::One(self.open(image)?);
        if how.durable.is_none() {
            return Ok(Layer::of(image, self.left_table(id)?));
        }
        let table = self.open_table(id, how)?;
        if self.slip == Some(Slip::SavedNotCommitted) {
            return Ok(saved(image, table));
        }
        let (queue, bytes) = (IoQueue::simulated(), image.clone());
        let _aside = set_aside();
        let committed =
            run(
                &mut Rng::new(1),
                async move { table.commit_after(&queue, || bytes.sync(&queue)).await.map(|()| table) },
            );
        Ok(saved(image, committed?))
    }

    fn open_log(&self, id: Uuid, image: &Path, how: &TableUse) -> Result<Layer, NotCarriedOut> {
        let table = self.open_table(id, how)?;
        let image = self.open(image)?;
        let freed = Table::in_memory(self.blocks).unwrap();
        Ok(Layer::logged(Backing::One(image), Arc::new(Log { table, freed })))
    }

    fn open_changed(&self, id: Uuid, _from: ChangedUse) -> Result<Arc<Table>, NotCarriedOut> {
        let changed = self.host.borrow().changed.get(&id).cloned();
        changed.ok_or_else(|| NotCarriedOut("no dirty bitmap".to_owned()))
    }
}

/// What outlives a power cut. No image fails here, so it is never given up.
fn saved(image: Backing, table: DurableTable) -> Layer {
    Layer::saved(image, Arc::new(Saved { table, revoke: Box::new(|| Err("no image fails here".to_owned())) }))
}

/// `manager::first_epoch`.
fn first_epoch(record: &DiskRecord) -> Epoch {
    let used = record.snapshots.iter().map(|s| s.ended).chain([record.live_began]).max();
    Epoch(used.unwrap_or(0) + 3)
}

/// `Places::remove_orphans`.
fn remove_orphans(host: &mut Host) {
    let Some(record) = host.record.clone() else { return };
    let parts = record.snapshots.iter().filter(|s| !s.owns_all).map(|s| s.id);
    let live = record.live_log.as_ref().map(|_| record.live);
    let bitmap = record.mirror.as_ref().map(|m| m.bitmap);
    let ids: Vec<Uuid> = parts.chain(live).chain(bitmap).collect();
    let is_orphan = |path: &Path| {
        let id = path.file_stem().and_then(|s| s.to_str()?.parse::<Uuid>().ok());
        (path.starts_with("tables") || path.starts_with("images")) && id.is_some_and(|id| !ids.contains(&id))
    };
    let orphans: Vec<_> = host.files.keys().filter(|path| is_orphan(path)).cloned().collect();
    orphans.iter().for_each(|path| host.remove_file(path));
    host.run_tables.retain(|id, _| ids.contains(id));
}

impl Daemon {
    /// The first part of a start, up to where the record is put that says that the disk is served: `Manager::take_up` and
    /// `Manager::add_disk`.
    pub async fn open(
        host: Rc<RefCell<Host>>,
        oracle: Rc<RefCell<Oracle>>,
        shape: Shape,
        phases: Rc<Phases>,
        begun: Begun,
    ) -> Result<Rc<Daemon>, String> {
        let _phase = phases.begin("a start");
        remove_orphans(&mut host.borrow_mut());
        let recovery = decided(&host, shape)?;
        let Recovery { record, .. } = &recovery;
        if let Some(why) = recovery.why_unserved() {
            return Err(why.to_string());
        }
        let path: PathBuf = record.config["path"].as_str().unwrap().into();
        let queue = IoQueue::simulated();
        let (backing, mirror) = open_base(&host, &recovery, &path, shape, &queue).await?;
        let geometry = Geometry::of(&backing, shape.block);
        let layers = Layers { host: host.clone(), blocks: geometry.blocks(), slip: shape.slip };
        let taken = carry_out(&recovery, &backing, 1, &layers).map_err(|e| e.to_string())?;
        let clock = EpochClock::new(first_epoch(record));
        let discards = Table::in_memory(geometry.blocks()).unwrap();
        let options =
            DiskOptions { image: backing, block_bytes: shape.block, read_only: false, discards: Arc::new(discards) };
        let drained = record.snapshots.iter().filter(|s| s.quiesced_ms.is_none()).map(|s| s.id).collect();
        let Taken { links, snapshots, marks } = taken;
        let disk = Disk::with_chain(clock.clone(), options, links);
        let broken = Arc::new(Broken::default());
        disk.observe(broken.clone());
        disk.remember_marks(marks);
        let (mut former_legs, mut path) = (record.former_legs.clone(), path);
        let forgotten = recovery.mirror.iter().flat_map(|m| &m.legs).filter(|(_, leg)| *leg == LegUse::Forgotten);
        for (gone, _) in forgotten {
            former_legs.push(gone.clone());
            path.clone_from(&mirror.as_ref().unwrap().legs[0].0.path);
        }
        let daemon = Rc::new_cyclic(|me| Daemon {
            editor: Arc::new(ChainEditor::new(clock.clone())),
            entries: RefCell::default(),
            host,
            oracle,
            queue,
            clock,
            disk,
            phases: phases.clone(),
            shape,
            id: record.id,
            path: RefCell::new(path),
            mirror: RefCell::new(mirror),
            former_legs: RefCell::new(former_legs),
            drained_at_the_end: RefCell::new(drained),
            structure: Lock::default(),
            turn: Lock::default(),
            resyncs: Cell::new(false),
            cleans: Cell::new(false),
            begun,
            broken,
            me: me.clone(),
        });
        for (record, version) in snapshots {
            daemon.take_entry(record, version);
        }
        Ok(daemon)
    }

    /// `Manager::entry_of`, `Manager::settle_mark`.
    fn take_entry(&self, record: SnapshotRecord, version: Option<Arc<Version>>) {
        if version.is_none() && record.deleting {
            if !record.owns_all {
                self.remove_layer(record.id, &record.image);
            }
            self.editor.forget_mark(&self.disk, record.id);
            return;
        }
        self.entries.borrow_mut().push(Rc::new(Entry { id: record.id, record: RefCell::new(record), version }));
    }

    /// The rest of a start: the end of `Manager::add_disk`.
    pub async fn go_on(&self) {
        let _phase = self.phases.begin("a start");
        // In `Manager::add_disk`, before the record
        if self.shape.slip != Some(Slip::DrainedNotStored) {
            for version in self.drained_at_the_end.take() {
                self.disk.make_durable(&self.queue, version).await.unwrap();
            }
        }
        self.put(self.to_record()).await;
        self.resume_mirror().await;
        // `Manager::resume_snapshot`
        for entry in self.entries.borrow().clone() {
            if entry.version.is_some() && entry.record.borrow().deleting {
                let daemon = self.me();
                self.begin(async move { daemon.run_deletion(entry).await });
            }
        }
    }

    fn me(&self) -> Rc<Daemon> {
        self.me.upgrade().unwrap()
    }

    fn begin(&self, task: impl Future<Output = ()> + 'static) {
        self.begun.borrow_mut().push(Box::pin(task));
    }

    fn fail(&self, what: String) {
        self.broken.0.lock().unwrap().push(what);
    }

    /// What went wrong, if anything.
    pub fn failure(&self) -> Option<String> {
        self.broken.0.lock().unwrap().first().cloned()
    }

    fn fact(&self, id: Uuid, tell: impl FnOnce(&mut Fact)) {
        if let Some(fact) = self.oracle.borrow_mut().facts.get_mut(&id) {
            tell(fact);
            media::count_change();
        }
    }

    fn new_id(&self) -> Uuid {
        let mut host = self.host.borrow_mut();
        host.names += 1;
        Uuid::from_u128(host.names)
    }

    /// `DiskEntry::to_record`.
    pub fn to_record(&self) -> DiskRecord {
        let chain = self.disk.chain();
        let entries = self.entries.borrow();
        let to_record = |e: &Rc<Entry>| recording::of_snapshot(e.record.borrow().clone(), e.version.as_deref(), &chain);
        let snapshots = entries.iter().filter_map(to_record).collect();
        let boot = self.host.borrow().boot;
        let config = serde_json::json!({ "path": &*self.path.borrow() });
        let mut record = recording::of_disk((self.id, "disk", boot), config, &chain, snapshots);
        record.mirror = self.mirror.borrow().as_ref().map(Mirror::to_record);
        record.former_legs = self.former_legs.borrow().clone();
        record
    }

    async fn put(&self, record: DiskRecord) {
        let _phase = self.phases.begin("a put of the records");
        Host::put(&self.host, record).await;
    }

    /// `Manager::persist`. The structure is locked.
    async fn persist(&self) {
        self.put(self.to_record()).await;
    }

    /// `Manager::remove_layer`.
    fn remove_layer(&self, id: Uuid, image: &Path) {
        let mut host = self.host.borrow_mut();
        host.remove_file(image);
        host.run_tables.remove(&id);
        host.remove_file(&log_table(id));
    }

    fn run_table(&self, id: Uuid) -> Arc<Table> {
        let table = Arc::new(Table::in_memory(self.disk.geometry().blocks()).unwrap());
        self.host.borrow_mut().run_tables.insert(id, table.clone());
        table
    }

    /// `Manager::create`, for one disk.
    pub async fn create(&self, asked: Strategy) {
        let _structure = self.structure.lock().await;
        let _phase = self.phases.begin("the creation of a snapshot");
        // `Manager::prepare`
        let chain = self.disk.chain();
        let live = chain.version(chain.live()).clone();
        let strategy = if self.disk.can_move_pivot() { asked } else { Strategy::WriteLogging };
        let new_live = self.new_id();
        let changed = Arc::new(Table::in_memory(self.disk.geometry().blocks()).unwrap());
        self.host.borrow_mut().changed.insert(new_live, changed.clone());
        let Some((layer, image)) = self.prepare_layer(strategy, live.id, new_live).await else { return };
        let record = new_record(live.id, live.began, strategy, image);
        let pending = recording::before_cut(self.to_record(), &self.disk.chain(), record.clone(), &layer, new_live);
        let fact = Fact { strategy, created: false, quiesced: false, deletion_begun: false, deleted: false };
        self.oracle.borrow_mut().facts.insert(live.id, fact);
        if self.shape.slip != Some(Slip::NoPendingRecord) {
            let _phase = self.phases.begin("a pending record");
            self.put(pending).await;
        }
        // `Manager::cut`
        let entry = Rc::new(Entry { id: live.id, record: RefCell::new(record), version: Some(live) });
        self.entries.borrow_mut().push(entry.clone());
        let prepared = PreparedSnapshot { disk: self.disk.clone(), layer, new_live, changed: Some(changed) };
        let cut = self.editor.cut(vec![prepared], Writers::Request).expect("few epochs drain");
        self.oracle.borrow_mut().cut(cut.ended, new_live);
        media::count_change();
        entry.record.borrow_mut().ended = cut.ended.0;
        self.persist().await;
        self.fact(entry.id, |fact| fact.created = true);
        let daemon = self.me();
        self.begin(async move {
            daemon.clock.drained(cut.ended).await;
            daemon.quiesced(&entry).await;
        });
    }

    /// `Manager::prepare_layer`: the layer, and its image if that is not the full one.
    async fn prepare_layer(&self, strategy: Strategy, frozen: Uuid, live: Uuid) -> Option<(NewLayer, PathBuf)> {
        let size = usize::try_from(self.disk.geometry().size_bytes).unwrap();
        match strategy {
            // `Manager::make_frozen_layer`
            Strategy::CopyOnWrite => {
                let path = PathBuf::from(format!("images/{frozen}.img"));
                let image = self.create_image(&path, size).await;
                let layer = match self.shape.saved_outlive {
                    false => Layer::of(image, self.run_table(frozen)),
                    true => saved(image, self.make_durable_table(frozen).await),
                };
                Some((NewLayer::Frozen { layer }, path))
            }
            // `Manager::make_log`
            Strategy::WriteLogging => {
                let path = PathBuf::from(format!("images/{live}.log"));
                let image = self.create_image(&path, size).await;
                let table = self.make_durable_table(live).await;
                let freed = Table::in_memory(table.table().blocks()).unwrap();
                let layer = Layer::logged(image, Arc::new(Log { table, freed }));
                Some((NewLayer::Live { layer }, path))
            }
            // `Manager::split`
            Strategy::WriteMirroring => {
                let _phase = self.phases.begin("a split");
                let pair = self.mirror.borrow().as_ref().filter(|m| m.legs.len() == 2).map(|m| m.pair.clone())?;
                if self.shape.slip != Some(Slip::SplitNotPrepared) {
                    pair.prepare_split(&self.queue).await.ok()?;
                }
                let frozen = pair.second()?;
                let live = pair.detached().map_err(|e| self.fail(e.to_string())).ok()?;
                self.mirror.borrow_mut().as_mut()?.pair = live.clone();
                let path = frozen.image.path().to_owned();
                Some((NewLayer::Split { frozen: Backing::One(frozen.image), live: Backing::Pair(live) }, path))
            }
        }
    }

    /// `layers::create_image`.
    async fn create_image(&self, path: &Path, size: usize) -> Backing {
        let image: SharedImage = Arc::new(self.host.borrow_mut().create_file(path, size));
        if self.shape.slip != Some(Slip::ImageNotStored) {
            halfsilver::image::sync(&*image, &self.queue).await.unwrap();
            Host::sync_directory_of(&self.host, path).await;
        }
        Backing::One(image)
    }

    /// `Manager::make_durable_table`.
    async fn make_durable_table(&self, id: Uuid) -> DurableTable {
        let (table, place) = (self.run_table(id), log_table(id));
        let bytes = usize::try_from(DurableTable::image_bytes(table.blocks())).unwrap();
        let durable: SharedImage = Arc::new(self.host.borrow_mut().create_file(&place, bytes));
        let made = DurableTable::create(durable, id, table, [0; PAYLOAD_BYTES], &self.queue).await;
        if self.shape.slip != Some(Slip::TableNotNamed) {
            Host::sync_directory_of(&self.host, &place).await;
        }
        made.unwrap()
    }

    /// `Manager::quiesced`.
    async fn quiesced(&self, entry: &Rc<Entry>) {
        let _phase = self.phases.begin("a snapshot's becoming quiesced");
        // `snapshots::store_shown`
        if self.shape.slip != Some(Slip::QuiescedNotStored)
            && let Err(e) = self.disk.make_durable(&self.queue, entry.id).await
        {
            self.fail(e);
        }
        let _structure = self.structure.lock().await;
        entry.version.as_ref().unwrap().set_quiesced();
        entry.record.borrow_mut().quiesced_ms = Some(1);
        self.persist().await;
        self.fact(entry.id, |fact| fact.quiesced = true);
    }

    /// The snapshots that could be deleted now.
    pub fn deletable(&self) -> Vec<Rc<Entry>> {
        let entries = self.entries.borrow();
        let can = |e: &&Rc<Entry>| {
            let drained = e.version.as_ref().is_none_or(|v| v.is_quiesced());
            drained && !e.record.borrow().deleting
        };
        entries.iter().filter(can).cloned().collect()
    }

    /// `Manager::delete` and `Manager::begin_deletion`.
    pub async fn delete(&self, entry: Rc<Entry>) {
        {
            let _structure = self.structure.lock().await;
            if entry.record.borrow().deleting {
                return;
            }
            self.fact(entry.id, |fact| fact.deletion_begun = true);
            if entry.version.is_none() {
                let record = entry.record.borrow().clone();
                if record.owns_all {
                    self.after_split(&entry, None).await;
                }
                self.gone(&entry, (!record.owns_all).then_some((entry.id, record.image))).await;
                return;
            }
            entry.record.borrow_mut().deleting = true;
            if self.shape.slip != Some(Slip::DeletionNotRecorded) {
                self.persist().await;
            }
        }
        self.run_deletion(entry).await;
    }

    /// `Manager::retire`, the job of a deletion.
    async fn run_deletion(&self, entry: Rc<Entry>) {
        let mut turn = Some(self.turn.lock().await);
        let version = entry.version.clone().unwrap();
        let grace = loop {
            match self.editor.begin_retire(&self.disk, &version) {
                Ok(grace) => break grace,
                Err(RetireError::TooManyDraining(_)) => yield_now().await,
                Err(RetireError::Busy) => return self.fail("two deletions at once".to_owned()),
            }
        };
        let _phase = self.phases.begin(what_deletion(&self.disk.chain(), entry.id));
        let left = left_behind(&self.disk.chain(), entry.id);
        let leg = leg_of(&self.disk.chain(), entry.id);
        let pace = Arc::new(Pace::default());
        let (queue, editor, disk) = (self.queue.clone(), self.editor.clone(), self.disk.clone());
        match job::retire(queue, editor, disk, version, grace, pace.clone()).await {
            Ok(Outcome::Done) => {}
            other => return self.fail(format!("a deletion ended with {other:?}")),
        }
        if self.shape.slip == Some(Slip::NextBeforeRecord) {
            turn = None;
        }
        if self.shape.slip == Some(Slip::TableInUseRemoved) {
            // The thread sleeps just here: that is when it matters.
            for _ in 0..20 {
                yield_now().await;
            }
        }
        {
            let _structure = self.structure.lock().await;
            let is_split = entry.record.borrow().strategy == Strategy::WriteMirroring.name();
            let is_broken =
                entry.record.borrow().broken.is_some() || entry.version.as_ref().unwrap().broken().is_some();
            let comes_back = leg.is_some() && !is_broken;
            if is_split && !comes_back {
                self.after_split(&entry, None).await;
            }
            if is_split && comes_back && self.shape.slip == Some(Slip::LegBackBeforeRecord) {
                self.after_split(&entry, leg).await;
                self.gone(&entry, left).await;
            } else {
                self.gone(&entry, left).await;
                if is_split && comes_back {
                    self.after_split(&entry, leg).await;
                }
            }
        }
        drop(turn);
        if self.disk.discards().count() > 0 {
            let _phase = self.phases.begin("discards that were put off");
            let done = job::carry_out_discards(self.queue.clone(), self.disk.clone(), pace).await;
            if let Err(e) = done {
                self.fail(e.to_string());
            }
        }
    }

    /// `Manager::gone`.
    async fn gone(&self, entry: &Rc<Entry>, left: Option<(Uuid, PathBuf)>) {
        let _phase = self.phases.begin("the end of a deletion");
        let forget = || self.entries.borrow_mut().retain(|e| !Rc::ptr_eq(e, entry));
        if entry.version.is_none() {
            self.editor.forget_mark(&self.disk, entry.id);
            forget();
        }
        if let (Some((id, image)), Some(Slip::RemovedBeforeRecord)) = (&left, self.shape.slip) {
            self.remove_layer(*id, image);
        }
        self.persist().await;
        if let Some((id, image)) = left {
            let chain = self.disk.chain();
            let has_table = chain.position(id).is_some_and(|at| chain.layer(at).table().is_some());
            if has_table && self.shape.slip != Some(Slip::TableInUseRemoved) {
                self.host.borrow_mut().remove_file(&image);
                self.host.borrow_mut().remove_file(&log_table(id));
            } else {
                self.remove_layer(id, &image);
            }
        }
        forget();
        self.fact(entry.id, |fact| fact.deleted = true);
    }

    /// Who owns which blocks, for people.
    pub fn describe(&self) -> String {
        let chain = self.disk.chain();
        let describe = |link: &Link| {
            let bits = match link.layer.table() {
                None => "all".to_owned(),
                Some(table) => {
                    let bit = |block| if table.get(BlockIndex(block)) { '1' } else { '0' };
                    (0..table.blocks()).map(bit).collect()
                }
            };
            let record =
                self.entries.borrow().iter().find(|e| e.id == link.version.id).map(|e| e.record.borrow().clone());
            let what = record.map_or_else(String::new, |r| {
                let quiesced = if r.quiesced_ms.is_some() { ", quiesced" } else { "" };
                let deleting = if r.deleting { ", being deleted" } else { "" };
                format!(" {} until {}{quiesced}{deleting}, broken: {:?}", r.strategy, r.ended, r.broken)
            });
            format!("\n  {} [{bits}] in {}{what}", link.version.id, link.layer.image.path().display())
        };
        let chain: String = chain.links().iter().map(describe).collect();
        format!("legs {:?}{chain}", self.legs())
    }
}

fn new_record(id: Uuid, began: Epoch, strategy: Strategy, image: PathBuf) -> SnapshotRecord {
    SnapshotRecord {
        id,
        group: id,
        name: id.to_string(),
        strategy: strategy.name().to_owned(),
        writers: "request".to_owned(),
        began: began.0,
        ended: 0,
        image,
        owns_all: false,
        splits: false,
        durable: false,
        socket: PathBuf::new(),
        created_ms: 1,
        quiesced_ms: None,
        broken: None,
        deleting: false,
        keep_image: false,
        stopped: false,
        saved: None,
        saved_table: None,
        changed: None,
        keep_bookmark: false,
        taken_for: None,
    }
}

fn what_deletion(chain: &Chain, id: Uuid) -> &'static str {
    let Some(at) = chain.position(id) else { return "a deletion" };
    let segment = chain.segment_of(at);
    match at {
        at if at < segment.pivot => "a merge",
        at if at > segment.pivot => "a hand-over to a newer log",
        at if at < segment.last => "a fold",
        at if at > segment.first => "a hand-over of a full image",
        _ => "the end of a leg's snapshot",
    }
}

/// `deletion::leg_of`.
fn leg_of(chain: &Chain, id: Uuid) -> Option<SharedImage> {
    let index = chain.position(id)?;
    match (chain.layer(index).table(), &chain.layer(index).image, chain.heir_of_pivot(index)) {
        (None, Backing::One(image), None) => Some(image.clone()),
        _ => None,
    }
}

/// `deletion::left_behind`.
fn left_behind(chain: &Chain, id: Uuid) -> Option<(Uuid, PathBuf)> {
    let index = chain.position(id)?;
    let at = chain.heir_of_pivot(index).unwrap_or(index);
    let layer = chain.layer(at);
    layer.table().is_some().then(|| (chain.version(at).id, layer.image.path().to_owned()))
}
