//! A simulated machine: the daemon's own code runs on it, thread by thread, and it may end at each step.
//!
//! What always holds: a thread lets others go on before each call that changes something, and each change is counted, so that
//! an end may come between any two of them. A put of the records is atomic, and durable when it returns; until then the old
//! ones or the new ones are found.
//!
//! Not simulated: images that fail, a host user who changes files.

mod files;
mod locks;
mod sockets;
mod store;
mod threads;

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use halfsilver::host::{FileKind, Host, Look, RingWork, Running};
use halfsilver::image::{Direct, Image, ImageError, ImageErrorKind, ImageOp, ImageOptions, IoQueue, SharedImage};
use halfsilver::store::{
    ExaminedRecords, Fingerprint, Identity, RecordError, RecordStore, RunTableFacts, Table, TableError, TableName,
};
use halfsilver::vhost_user::{ServeOptions, Server};
use uuid::Uuid;

use self::files::{Files, Node, copy_of};
use self::locks::Locks;
pub use self::sockets::Socket;
use self::store::{Content, Store};
pub use self::threads::Thread;
use self::threads::{is_running, wait_for};
use crate::media::{self, Medium};
use crate::schedule::Rng;

pub const STATE: &str = "/state";
pub const RUN: &str = "/run";
pub const DISKS: &str = "/disks";

/// How often a lock that somebody has is asked for again.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// How a process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Kill,
    PowerCut(Loss),
}

/// Which of the sectors that were not synced a power cut leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    /// None, and no name that was not synced.
    All,
    /// The newest of each.
    Nothing,
    /// Each for itself: what was stored, or any write since.
    Mixed,
    /// Each for itself: what was stored, or the last write.
    OldOrNew,
    /// Those of tables, and none of images.
    OnlyTables,
    /// Those of images, and none of tables.
    OnlyImages,
    /// Each file in one of these ways.
    EachItsOwn,
}

impl End {
    pub fn some(rng: &mut Rng) -> End {
        match rng.below(100) {
            0..30 => End::Kill,
            30..42 => End::PowerCut(Loss::All),
            42..50 => End::PowerCut(Loss::Nothing),
            50..66 => End::PowerCut(Loss::Mixed),
            66..74 => End::PowerCut(Loss::OldOrNew),
            74..84 => End::PowerCut(Loss::OnlyTables),
            84..90 => End::PowerCut(Loss::OnlyImages),
            _ => End::PowerCut(Loss::EachItsOwn),
        }
    }

    pub fn is_power_cut(self) -> bool {
        self != End::Kill
    }
}

/// What outlives a process.
#[derive(Clone, Default)]
struct Left {
    files: Files,
    records: Option<Content>,
    /// What is being put in its place.
    putting: Option<Content>,
    boot: Uuid,
    /// How many identifiers were given.
    ids: u128,
}

/// What does not.
#[derive(Default)]
struct Process {
    /// Threads that others have begun, for the scheduler.
    begun: Vec<(String, Thread)>,
    sockets: BTreeMap<PathBuf, Arc<Socket>>,
    timers: Vec<(Instant, Waker)>,
    is_putting: bool,
    locks: Locks,
}

// A thread of this host never leaves the thread that made it, which is that of the test.
struct Here(Process);
// SAFETY: every call on a host asserts that it is made on the thread on which the host was made (`Sim::process`).
unsafe impl Send for Here {}

/// A simulated machine with one process.
pub struct Sim {
    left: Mutex<Left>,
    process: Mutex<Here>,
    owner: std::thread::ThreadId,
    began: Instant,
    passed_ns: AtomicU64,
    has_ended: AtomicBool,
    /// How many changes of the records are refused next, and whether it is not known what these leave.
    refusals: AtomicU64,
    is_in_doubt: AtomicBool,
    /// How many threads to wait for a snapshot's requests are refused next.
    no_threads: AtomicU64,
    me: Weak<Sim>,
}

struct Joined(Arc<AtomicBool>);

impl Running for Joined {
    fn is_ended(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
    fn join(self: Box<Self>) -> bool {
        assert!(self.is_ended(), "a thread that runs is joined");
        false
    }
}

impl Sim {
    fn with(left: Left) -> Arc<Sim> {
        Arc::new_cyclic(|me| Sim {
            left: Mutex::new(left),
            process: Mutex::new(Here(Process::default())),
            owner: std::thread::current().id(),
            began: Instant::now(),
            passed_ns: AtomicU64::new(0),
            has_ended: AtomicBool::new(false),
            refusals: AtomicU64::new(0),
            is_in_doubt: AtomicBool::new(false),
            no_threads: AtomicU64::new(0),
            me: me.clone(),
        })
    }

    /// A machine without anything.
    pub fn new() -> Arc<Sim> {
        Sim::with(Left { boot: Uuid::from_u128(1), ids: 100, ..Left::default() })
    }

    /// What a process finds that begins after this one has ended.
    pub fn after(&self, end: End, rng: &mut Rng) -> Arc<Sim> {
        let left = self.left();
        let records = if left.putting.is_some() && rng.chance(50) { &left.putting } else { &left.records };
        let boot = if end.is_power_cut() { Uuid::from_u128(left.boot.as_u128() + 1) } else { left.boot };
        Sim::with(Left {
            files: left.files.after(end, rng),
            records: records.clone(),
            putting: None,
            boot,
            ids: left.ids,
        })
    }

    fn left(&self) -> MutexGuard<'_, Left> {
        self.left.lock().unwrap()
    }

    fn process(&self) -> MutexGuard<'_, Here> {
        assert_eq!(std::thread::current().id(), self.owner, "a simulated host has one thread");
        self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A disk's image that was there long before.
    pub fn put_image(&self, path: &Path, bytes: Vec<u8>) {
        let medium = Medium::with(&path.display().to_string(), bytes);
        self.left().files.put_durable(path, Node::Image(medium, true));
    }

    /// What is in an image now.
    pub fn bytes_of(&self, path: &Path) -> Option<Vec<u8>> {
        match &self.left().files.names.get(path)?.node {
            Node::Image(medium, _) => Some(medium.bytes()),
            _ => None,
        }
    }

    /// A file that is gone for good, whatever was durable.
    pub fn lose(&self, path: &Path) {
        self.left().files.lose(path);
    }

    /// The images of a directory.
    pub fn images_in(&self, directory: &Path) -> Vec<Medium> {
        let left = self.left();
        let here = left.files.names.iter().filter(|(path, _)| path.parent() == Some(directory));
        let image = |(_, file): (&PathBuf, &files::File)| match &file.node {
            Node::Image(medium, _) => Some(medium.clone()),
            _ => None,
        };
        here.filter_map(image).collect()
    }

    /// Differs when an entry of a mapped table was made or deleted: a kill may come before what follows.
    pub fn entries(&self) -> u64 {
        self.left().files.entries()
    }

    /// The threads that were begun since this was asked last.
    pub fn take_begun(&self) -> Vec<(String, Thread)> {
        std::mem::take(&mut self.process().0.begun)
    }

    pub fn socket(&self, path: &Path) -> Option<Arc<Socket>> {
        self.process().0.sockets.get(path).cloned()
    }

    /// Lets time pass until somebody who waits for that goes on. False when nobody does.
    pub fn pass_time(&self) -> bool {
        let now = self.now();
        let mut process = self.process();
        let Some(next) = process.0.timers.iter().map(|(at, _)| *at).min() else { return false };
        let ns = u64::try_from(next.saturating_duration_since(now).as_nanos()).unwrap();
        self.passed_ns.fetch_add(ns, Ordering::SeqCst);
        let due: Vec<_> = process.0.timers.extract_if(.., |(at, _)| *at <= next).collect();
        drop(process);
        due.into_iter().for_each(|(_, waker)| waker.wake());
        true
    }

    /// Lets so much time pass at once.
    pub fn skip(&self, time: Duration) {
        self.passed_ns.fetch_add(u64::try_from(time.as_nanos()).unwrap(), Ordering::SeqCst);
        let now = self.now();
        let due: Vec<_> = self.process().0.timers.extract_if(.., |(at, _)| *at <= now).collect();
        due.into_iter().for_each(|(_, waker)| waker.wake());
    }

    /// So many of the next changes of the records are refused, as by a full state directory.
    pub fn refuse_records(&self, changes: u64) {
        self.is_in_doubt.store(false, Ordering::SeqCst);
        self.refusals.store(changes, Ordering::SeqCst);
    }

    /// The same, and nobody knows whether they were stored before the next one that is not refused.
    pub fn doubt_records(&self, changes: u64) {
        self.refuse_records(changes);
        self.is_in_doubt.store(true, Ordering::SeqCst);
    }

    /// So many of the next threads that wait for the requests of a snapshot are refused, as by a machine that has no more.
    pub fn refuse_drains(&self, threads: u64) {
        self.no_threads.store(threads, Ordering::SeqCst);
    }

    /// The process has ended: from now on each call is refused and none waits.
    pub fn end(&self) {
        self.has_ended.store(true, Ordering::SeqCst);
        self.process().0.sockets.clear();
    }

    fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }

    /// Lets others go on first.
    fn step(&self) -> io::Result<()> {
        // What a request does on a ring itself is one step with what comes before it there.
        if !self.has_ended() && is_running() {
            wait_for(Box::pin(yield_now()));
        }
        match self.has_ended() {
            true => Err(io::Error::other("the process has ended")),
            false => Ok(()),
        }
    }

    /// A change of what outlives the process.
    fn change<T>(&self, change: impl FnOnce(&mut Left) -> io::Result<T>) -> io::Result<T> {
        self.step()?;
        let done = change(&mut self.left());
        media::count_change();
        done
    }

    fn lookup<T>(&self, path: &Path, look: impl FnOnce(&files::File) -> T) -> io::Result<T> {
        match self.left().files.names.get(path) {
            Some(file) => Ok(look(file)),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    fn open(&self, path: &Path, options: ImageOptions) -> Result<SharedImage, ImageError> {
        let deadline = self.now() + options.lock_wait;
        loop {
            let locks = self.process().0.locks.clone();
            let found = self.lookup(path, |file| match &file.node {
                Node::Image(medium, _) => Some((medium.clone(), locks.take(file.number, options.read_only))),
                _ => None,
            });
            match found.map_err(|e| ImageError::from_io(ImageOp::Open, path, None, &e))? {
                Some((_, None)) if self.now() < deadline => self.pause(LOCK_RETRY),
                Some((_, None)) => {
                    return Err(ImageError::new(ImageErrorKind::InUse, ImageOp::Open, path, "it is in use"));
                }
                Some((medium, Some(lock))) if medium.size_bytes() > 0 => {
                    return Ok(Arc::new(medium.opened_at(path, options.direct == Direct::On, lock)));
                }
                _ => return Err(ImageError::new(ImageErrorKind::Unsuitable, ImageOp::Open, path, "it is empty")),
            }
        }
    }

    fn table_at(&self, path: &Path, blocks: u64, name: TableName) -> Result<Arc<Table>, TableError> {
        let found = self.lookup(path, |file| match &file.node {
            Node::Table(table, its) if *its == name && (table.blocks()..=table.room()).contains(&blocks) => {
                Some(table.clone())
            }
            _ => None,
        });
        let damaged = || TableError::Damaged { path: path.to_owned(), what: "it is another one".to_owned() };
        found.map_err(|e| in_table(path, &e))?.ok_or_else(damaged)
    }
}

fn in_table(path: &Path, e: &io::Error) -> TableError {
    TableError::Io { path: path.to_owned(), message: e.to_string() }
}

fn exists() -> io::Error {
    io::Error::from_raw_os_error(libc::EEXIST)
}

fn missing() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

impl Host for Sim {
    fn boot(&self) -> Result<Uuid, TableError> {
        Ok(self.left().boot)
    }

    fn now(&self) -> Instant {
        if self.has_ended() {
            // Whatever waits for a time has waited for it.
            self.passed_ns.fetch_add(3_600_000_000_000, Ordering::SeqCst);
        }
        self.began + Duration::from_nanos(self.passed_ns.load(Ordering::SeqCst))
    }

    fn unix_ms(&self) -> u64 {
        1_700_000_000_000 + self.passed_ns.load(Ordering::SeqCst) / 1_000_000
    }

    fn new_id(&self) -> Uuid {
        let mut left = self.left();
        left.ids += 1;
        Uuid::from_u128(left.ids)
    }
    fn memory_left_bytes(&self) -> u64 {
        u64::MAX
    }

    fn start_thread(&self, name: &str, run: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Running>> {
        let ended = Arc::new(AtomicBool::new(false));
        let less = |left: u64| left.checked_sub(1);
        if name == "drain" && self.no_threads.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        if !self.has_ended() {
            let tell = ended.clone();
            let thread = Thread::new(move || {
                run();
                tell.store(true, Ordering::SeqCst);
            });
            self.process().0.begun.push((name.to_owned(), thread));
        }
        Ok(Box::new(Joined(ended)))
    }

    fn pause(&self, time: Duration) {
        if self.has_ended() {
            return;
        }
        // Time does not stand still for who looks again and again.
        let (at, me) = (self.now() + time.max(Duration::from_micros(1)), self.me.clone());
        wait_for(Box::pin(poll_fn(move |cx| {
            let Some(sim) = me.upgrade().filter(|sim| sim.now() < at) else { return Poll::Ready(()) };
            sim.process().0.timers.push((at, cx.waker().clone()));
            Poll::Pending
        })));
    }

    fn waits_by_pauses(&self) -> bool {
        true
    }

    fn on_ring(&self, work: RingWork) -> io::Result<()> {
        self.step()?;
        let done = Arc::new(AtomicBool::new(false));
        let tell = done.clone();
        let work: Pin<Box<dyn Future<Output = ()>>> = work(IoQueue::simulated());
        wait_for(Box::pin(async move {
            work.await;
            tell.store(true, Ordering::SeqCst);
        }));
        match done.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(io::Error::other("the process has ended")),
        }
    }

    fn create_image(&self, path: &Path, size_bytes: u64, direct: Direct) -> Result<SharedImage, ImageError> {
        let medium = Medium::new(&path.display().to_string(), usize::try_from(size_bytes).unwrap());
        let created = self.change(|left| match left.files.names.contains_key(path) {
            true => Err(exists()),
            false => {
                left.files.create(path, Node::Image(medium.clone(), false));
                Ok(())
            }
        });
        created.map_err(|e| ImageError::from_io(ImageOp::Open, path, None, &e))?;
        self.open(path, ImageOptions { direct, read_only: false, lock_wait: Duration::ZERO })
    }

    fn open_image(&self, path: &Path, options: ImageOptions) -> Result<SharedImage, ImageError> {
        self.step().map_err(|e| ImageError::from_io(ImageOp::Open, path, None, &e))?;
        self.open(path, options)
    }

    fn probe_image(&self, path: &Path, options: ImageOptions) -> Result<SharedImage, ImageError> {
        self.open(path, options)
    }

    fn look(&self, path: &Path) -> io::Result<Look> {
        let look = |kind| Look { kind, names: 1, identity: (0, 0) };
        if [STATE, "/state/images", "/state/tables", RUN, "/run/tables", DISKS].iter().any(|dir| Path::new(dir) == path)
        {
            return Ok(look(FileKind::Directory));
        }
        if self.process().0.sockets.contains_key(path) {
            return Ok(look(FileKind::Socket));
        }
        let number = self.lookup(path, |file| file.number)?;
        let names = self.left().files.names_of(number);
        Ok(Look { kind: FileKind::File, names, identity: (1, number) })
    }

    fn resolve(&self, path: &Path) -> PathBuf {
        path.to_owned()
    }

    fn fingerprint(&self, path: &Path) -> io::Result<Fingerprint> {
        if path.ends_with("records.redb") {
            let size_bytes = u64::from(self.left().records.is_some());
            return if size_bytes > 0 { Ok(Fingerprint { size_bytes, modified_ns: 0 }) } else { Err(missing()) };
        }
        let size_bytes = self.lookup(path, |file| match &file.node {
            Node::Image(medium, _) => medium.size_bytes(),
            _ => 1,
        })?;
        Ok(Fingerprint { size_bytes, modified_ns: 0 })
    }

    fn identity(&self, path: &Path) -> io::Result<Identity> {
        Ok(Identity::File { inode: Some(self.lookup(path, |file| file.number)?), born_ns: None })
    }

    fn holds_bytes(&self, path: &Path, from: u64) -> io::Result<bool> {
        let from = usize::try_from(from).unwrap();
        self.lookup(path, |file| match &file.node {
            Node::Image(medium, _) => medium.bytes().iter().skip(from).any(|byte| *byte != 0),
            Node::Table(table, _) | Node::Copy(table, _) => table.count() > 0,
            Node::Note(_) => true,
        })
    }

    fn free_bytes(&self, _directory: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let left = self.left();
        Ok(left.files.names.keys().filter(|path| path.parent() == Some(directory)).cloned().collect())
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|left| match (left.files.names.contains_key(from), left.files.names.contains_key(to)) {
            (false, _) => Err(missing()),
            (_, true) => Err(exists()),
            _ => {
                left.files.link(from, to);
                Ok(())
            }
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|left| {
            let is_there = left.files.names.contains_key(from);
            is_there.then(|| left.files.rename(from, to)).ok_or_else(missing)
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change(|left| {
            let is_there = left.files.names.contains_key(path);
            is_there.then(|| left.files.remove(path)).ok_or_else(missing)
        })
    }

    fn sync_directory_of(&self, path: &Path) -> io::Result<()> {
        let directory = path.parent().expect("a file in a directory").to_owned();
        self.change(|left| {
            left.files.sync(&directory);
            Ok(())
        })
    }

    fn write_note(&self, path: &Path, text: &str) -> io::Result<()> {
        // Data-path threads do it.
        if self.has_ended() {
            return Err(io::Error::other("the process has ended"));
        }
        self.left().files.create(path, Node::Note(text.to_owned()));
        media::count_change();
        Ok(())
    }

    fn read_note(&self, path: &Path) -> io::Result<String> {
        self.lookup(path, |file| match &file.node {
            Node::Note(text) => text.clone(),
            _ => String::new(),
        })
    }

    fn create_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<Arc<Table>, TableError> {
        let table = Arc::new(Table::in_memory(blocks)?);
        let created = self.change(|left| {
            left.files.create(path, Node::Table(table.clone(), name));
            Ok(())
        });
        created.map_err(|e| in_table(path, &e))?;
        Ok(table)
    }

    fn open_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<Arc<Table>, TableError> {
        self.step().map_err(|e| in_table(path, &e))?;
        self.table_at(path, blocks, name).inspect(|table| table.grow(blocks))
    }

    fn extend_table(&self, table: &Table, path: &Path, blocks: u64) -> Result<(), TableError> {
        self.step().map_err(|e| in_table(path, &e))?;
        table.reserve(None, blocks)
    }

    fn grow_image(&self, image: &SharedImage, size_bytes: u64) -> Result<(), ImageError> {
        self.step().map_err(|e| ImageError::from_io(ImageOp::Open, image.path(), None, &e))?;
        image.grow(size_bytes)
    }

    fn examine_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<RunTableFacts, TableError> {
        let table = self.table_at(path, blocks, name)?;
        Ok(RunTableFacts { ones: table.count(), is_broken: table.is_broken() })
    }

    fn save_table(&self, table: &Table, path: &Path) -> Result<Uuid, TableError> {
        let (seal, copy) = (self.new_id(), Arc::new(copy_of(table)));
        let saved = self.change(|left| {
            left.files.put_durable(path, Node::Copy(copy, seal));
            Ok(())
        });
        saved.map_err(|e| in_table(path, &e))?;
        Ok(seal)
    }

    fn load_table(&self, table: &Table, path: &Path, seal: Uuid) -> Result<(), TableError> {
        let found = self.lookup(path, |file| match &file.node {
            Node::Copy(copy, its) if *its == seal && copy.blocks() == table.blocks() => Some(copy.clone()),
            _ => None,
        });
        let damaged = || TableError::Damaged { path: path.to_owned(), what: "it is another one".to_owned() };
        let copy = found.map_err(|e| in_table(path, &e))?.ok_or_else(damaged)?;
        files::add(&copy, table);
        Ok(())
    }

    fn open_records(&self, _path: &Path) -> Result<Box<dyn RecordStore>, RecordError> {
        self.left().records.get_or_insert_default();
        Ok(Box::new(Store(self.me.clone())))
    }

    fn examine_records(&self, _path: &Path) -> Result<Option<ExaminedRecords>, RecordError> {
        let of = |content: &Content| ExaminedRecords {
            wrong: None,
            is_unclean: false,
            remembered: content.remembered(),
            dropped: content.dropped.clone(),
        };
        Ok(self.left().records.as_ref().map(of))
    }

    fn serve(&self, options: ServeOptions) -> io::Result<Arc<dyn Server>> {
        self.step()?;
        let (path, socket) = Socket::of(options, &self.me);
        self.process().0.sockets.insert(path, socket.clone());
        Ok(Arc::new(sockets::Listening(socket)))
    }

    fn clear_socket(&self, path: &Path) -> io::Result<()> {
        match self.process().0.sockets.contains_key(path) {
            true => Err(io::Error::other("another process is listening on this socket")),
            false => Ok(()),
        }
    }
}

/// Lets others go first, once.
pub async fn yield_now() {
    let mut waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
