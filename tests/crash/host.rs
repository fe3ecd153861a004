//! A simulated machine: named files on media, records, and what is left of them after a kill or a power cut.
//!
//! A file's name is durable when its directory was synced, its size when it was; a removal is never waited for. A put of
//! the records is atomic, and durable when it returns; until then the old one or the new one is found.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use halfsilver::image::SharedImage;
use halfsilver::store::{BlockIndex, BlockRange, DiskRecord, Table};
use uuid::Uuid;

use crate::media::{self, Medium};
use crate::schedule::Rng;

/// How often others may go on while records are put: it takes as long as some transfers.
const PUT_STEPS: usize = 6;

#[derive(Clone)]
pub struct File {
    pub medium: Medium,
    /// Whether its directory says durably that it is there.
    pub is_named: bool,
    /// Whether its size was stored, before this start.
    is_sized: bool,
}

/// What survives a process.
#[derive(Clone, Default)]
pub struct Host {
    pub files: BTreeMap<PathBuf, File>,
    /// Removed, but perhaps not durably.
    pub removed: Vec<(PathBuf, File)>,
    pub record: Option<DiskRecord>,
    /// What is being put in its place.
    pub putting: Option<DiskRecord>,
    /// Mapped tables, which survive a kill.
    pub run_tables: BTreeMap<Uuid, Arc<Table>>,
    /// Mapped dirty bitmaps. After a power cut they are as old as can be, as where the run directory is on a disk.
    pub changed: BTreeMap<Uuid, Arc<Table>>,
    pub boot: Uuid,
    /// How many names were given.
    pub names: u128,
}

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
            0..12 => End::Kill,
            12..24 => End::PowerCut(Loss::All),
            24..32 => End::PowerCut(Loss::Nothing),
            32..52 => End::PowerCut(Loss::Mixed),
            52..62 => End::PowerCut(Loss::OldOrNew),
            62..76 => End::PowerCut(Loss::OnlyTables),
            76..84 => End::PowerCut(Loss::OnlyImages),
            _ => End::PowerCut(Loss::EachItsOwn),
        }
    }

    pub fn is_power_cut(self) -> bool {
        self != End::Kill
    }
}

impl Host {
    pub fn create_file(&mut self, path: &Path, bytes: usize) -> Medium {
        let medium = Medium::new(&path.display().to_string(), bytes);
        let old = self.files.insert(path.to_owned(), File { medium: medium.clone(), is_named: false, is_sized: false });
        assert!(old.is_none(), "{} exists", path.display());
        media::count_change();
        medium
    }

    /// A file that was there long before.
    pub fn put_file(&mut self, path: &Path, bytes: Vec<u8>) {
        let medium = Medium::with(&path.display().to_string(), bytes);
        self.files.insert(path.to_owned(), File { medium, is_named: true, is_sized: true });
    }

    pub fn open(&self, path: &Path) -> Result<SharedImage, String> {
        let file = self.files.get(path).ok_or_else(|| format!("{} is missing", path.display()))?;
        if file.medium.bytes().is_empty() {
            return Err(format!("{} is empty", path.display()));
        }
        Ok(Arc::new(file.medium.clone()))
    }

    pub fn remove_file(&mut self, path: &Path) {
        if let Some(file) = self.files.remove(path) {
            media::count_change();
            self.removed.push((path.to_owned(), file));
        }
    }

    /// Waits for the names in a directory to be durable.
    pub async fn sync_directory_of(host: &Rc<RefCell<Host>>, path: &Path) {
        let directory = path.parent().expect("a file in a directory").to_owned();
        let is_here = |path: &Path| path.parent() == Some(&directory);
        let names: Vec<_> = host.borrow().files.keys().filter(|path| is_here(path)).cloned().collect();
        yield_now().await;
        let mut host = host.borrow_mut();
        names.iter().for_each(|name| {
            if let Some(file) = host.files.get_mut(name) {
                file.is_named = true;
            }
        });
        host.removed.retain(|(path, _)| !is_here(path));
        media::count_change();
    }

    /// Differs when an entry of a mapped table was made or deleted: a kill may come before what follows.
    pub fn entries(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (id, table) in &self.run_tables {
            (id, table.is_broken()).hash(&mut hasher);
            let entries =
                std::iter::successors(table.next_set(BlockIndex(0)), |at| table.next_set(BlockIndex(at.0 + 1)));
            entries.for_each(|block| block.0.hash(&mut hasher));
        }
        hasher.finish()
    }

    /// One transaction of the records.
    pub async fn put(host: &Rc<RefCell<Host>>, record: DiskRecord) {
        let old = host.borrow_mut().putting.replace(record);
        assert!(old.is_none(), "records are put one after the other");
        media::count_change();
        for _ in 0..PUT_STEPS {
            yield_now().await;
        }
        let mut host = host.borrow_mut();
        host.record = host.putting.take();
        media::count_change();
    }

    /// What a process that begins now finds.
    pub fn after(&self, end: End, rng: &mut Rng) -> Host {
        let record = if self.putting.is_some() && rng.chance(50) { &self.putting } else { &self.record };
        let mut left = Host { record: record.clone(), boot: self.boot, names: self.names, ..Host::default() };
        let End::PowerCut(loss) = end else {
            left.run_tables = self.run_tables.iter().map(|(id, table)| (*id, Arc::new(copy_of(table)))).collect();
            left.changed = self.changed.iter().map(|(id, table)| (*id, Arc::new(copy_of(table)))).collect();
            left.files.clone_from(&self.files);
            left.files.values_mut().for_each(|file| {
                file.is_sized |= file.medium.syncs() > 0;
                file.medium = file.medium.after_kill(rng);
            });
            left.removed.clone_from(&self.removed);
            return left;
        };
        left.boot = Uuid::from_u128(self.boot.as_u128() + 1);
        let empty = |table: &Table| Arc::new(Table::in_memory(table.blocks()).unwrap());
        left.changed = self.changed.iter().map(|(id, table)| (*id, empty(table))).collect();
        for (path, file) in &self.files {
            let is_table = path.starts_with("tables");
            let loss = match loss {
                Loss::EachItsOwn => [Loss::All, Loss::Nothing, Loss::Mixed, Loss::OldOrNew][rng.below(4)],
                loss => loss,
            };
            let loses = |rng: &mut Rng| match loss {
                Loss::All => true,
                Loss::Nothing => false,
                Loss::OnlyTables => !is_table,
                Loss::OnlyImages => is_table,
                _ => rng.chance(50),
            };
            if !file.is_named && loses(rng) {
                continue;
            }
            let medium = if !file.is_sized && file.medium.syncs() == 0 && loses(rng) {
                Medium::new(&path.display().to_string(), 0)
            } else {
                file.medium.after_loss(|versions| match loss {
                    Loss::Mixed => rng.below(versions + 1),
                    _ if loses(rng) => 0,
                    _ => versions,
                })
            };
            left.files.insert(path.clone(), File { medium, is_named: true, is_sized: true });
        }
        for (path, file) in &self.removed {
            if !left.files.contains_key(path) && rng.chance(50) {
                let medium = file.medium.after_power_cut(rng);
                left.files.insert(path.clone(), File { medium, is_named: true, is_sized: true });
            }
        }
        left
    }

    /// The same once more, so that one can be tried and the other used.
    pub fn copy(&self) -> Host {
        let mut copy = self.clone();
        copy.run_tables.values_mut().for_each(|table| *table = Arc::new(copy_of(table)));
        copy.changed.values_mut().for_each(|table| *table = Arc::new(copy_of(table)));
        let mut none = Rng::new(0);
        copy.files.values_mut().for_each(|file| file.medium = file.medium.after_kill(&mut none));
        copy
    }
}

fn copy_of(table: &Table) -> Table {
    let copy = Table::in_memory(table.blocks()).unwrap();
    let mut at = BlockIndex(0);
    while let Some(block) = table.next_set(at) {
        copy.prepare(BlockRange::one(block)).unwrap();
        copy.set(BlockRange::one(block));
        at = BlockIndex(block.0 + 1);
    }
    if table.is_broken() {
        copy.mark_broken();
    }
    copy
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

/// A lock for tasks.
#[derive(Default)]
pub struct Lock {
    is_held: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

pub struct Held<'a>(&'a Lock);

impl Lock {
    pub async fn lock(&self) -> Held<'_> {
        poll_fn(|cx| {
            if self.is_held.replace(true) {
                self.waiting.borrow_mut().push(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        Held(self)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.is_held.set(false);
        self.0.waiting.take().into_iter().for_each(Waker::wake);
    }
}
