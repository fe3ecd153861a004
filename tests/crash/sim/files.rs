//! The names of a simulated host: which are there, which are durable, and what is behind them.
//!
//! A name is durable when its directory was synced, a size when its file was. A removal is never waited for, so a file may be
//! back after a power cut. What is in the run directory does not outlive one.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use halfsilver::store::{BlockIndex, BlockRange, Table, TableName};
use uuid::Uuid;

use super::{End, Loss, RUN};
use crate::media::Medium;
use crate::schedule::Rng;

#[derive(Clone)]
pub enum Node {
    /// An image, and whether its size was stored before this start.
    Image(Medium, bool),
    /// A mapped table.
    Table(Arc<Table>, TableName),
    /// A saved table: complete and durable, or not there.
    Copy(Arc<Table>, Uuid),
    Note(String),
}

/// A file; under two names it has the same number.
#[derive(Clone)]
pub struct File {
    pub number: u64,
    pub node: Node,
}

/// A change of names that is not durable yet.
#[derive(Clone)]
enum Change {
    Put(PathBuf, File),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

impl Change {
    fn is_in(&self, directory: &Path) -> bool {
        let (Change::Put(path, _) | Change::Remove(path) | Change::Rename(_, path)) = self;
        path.parent() == Some(directory)
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, File>) {
        match self {
            Change::Put(path, file) => drop(names.insert(path.clone(), file.clone())),
            Change::Remove(path) => drop(names.remove(path)),
            Change::Rename(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
        }
    }
}

#[derive(Clone, Default)]
pub struct Files {
    pub names: BTreeMap<PathBuf, File>,
    durable: BTreeMap<PathBuf, File>,
    changes: Vec<Change>,
    last: u64,
}

impl Files {
    /// A file that was there long before.
    pub fn put_durable(&mut self, path: &Path, node: Node) {
        self.last += 1;
        let file = File { number: self.last, node };
        self.names.insert(path.to_owned(), file.clone());
        self.durable.insert(path.to_owned(), file);
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.names);
        self.changes.push(change);
    }

    pub fn create(&mut self, path: &Path, node: Node) {
        self.last += 1;
        let file = File { number: self.last, node };
        self.change(Change::Put(path.to_owned(), file));
    }

    pub fn link(&mut self, from: &Path, to: &Path) {
        let file = self.names[from].clone();
        self.change(Change::Put(to.to_owned(), file));
    }

    pub fn rename(&mut self, from: &Path, to: &Path) {
        self.change(Change::Rename(from.to_owned(), to.to_owned()));
    }

    pub fn remove(&mut self, path: &Path) {
        self.change(Change::Remove(path.to_owned()));
    }

    /// It is gone, and no power cut brings it back.
    pub fn lose(&mut self, path: &Path) {
        self.names.remove(path);
        self.durable.remove(path);
        self.changes.retain(|change| !matches!(change, Change::Put(its, _) if its == path));
    }

    pub fn sync(&mut self, directory: &Path) {
        let (here, others) = self.changes.drain(..).partition(|change| change.is_in(directory));
        self.changes = others;
        let here: Vec<Change> = here;
        here.iter().for_each(|change| change.apply(&mut self.durable));
    }

    pub fn names_of(&self, number: u64) -> u64 {
        self.names.values().filter(|file| file.number == number).count() as u64
    }

    /// A hash of the entries of all mapped tables.
    pub fn entries(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (path, file) in &self.names {
            let Node::Table(table, _) = &file.node else { continue };
            (path, table.is_broken()).hash(&mut hasher);
            let next = |at: &BlockIndex| table.next_set(BlockIndex(at.0 + 1));
            std::iter::successors(table.next_set(BlockIndex(0)), next).for_each(|block| block.0.hash(&mut hasher));
        }
        hasher.finish()
    }

    /// What is found after an end.
    pub fn after(&self, end: End, rng: &mut Rng) -> Files {
        let mut left = Files { last: self.last, ..Files::default() };
        let mut found = BTreeMap::new();
        let End::PowerCut(loss) = end else {
            let mut copy = |file: &File| {
                let made = || File { number: file.number, node: file.node.after_kill(rng) };
                found.entry(file.number).or_insert_with(made).clone()
            };
            left.names = self.names.iter().map(|(path, file)| (path.clone(), copy(file))).collect();
            left.durable = self.durable.iter().map(|(path, file)| (path.clone(), copy(file))).collect();
            left.changes = self.changes.clone();
            for change in &mut left.changes {
                if let Change::Put(_, file) = change {
                    *file = copy(file);
                }
            }
            return left;
        };
        let mut names = self.durable.clone();
        let upto = rng.below(self.changes.len() + 1);
        let in_order = rng.chance(50);
        for (at, change) in self.changes.iter().enumerate() {
            let comes = match loss {
                Loss::All => false,
                Loss::Nothing => true,
                _ if in_order => at < upto,
                _ => rng.chance(50),
            };
            if comes {
                change.apply(&mut names);
            }
        }
        names.retain(|path, _| !path.starts_with(RUN));
        for (path, file) in names {
            let is_table = path.parent().is_some_and(|directory| directory.ends_with("tables"));
            let made = || File { number: file.number, node: file.node.after_loss(loss, is_table, rng) };
            let file = found.entry(file.number).or_insert_with(made).clone();
            left.names.insert(path, file);
        }
        left.durable = left.names.clone();
        left
    }
}

impl Node {
    fn after_kill(&self, rng: &mut Rng) -> Node {
        match self {
            Node::Image(medium, is_sized) => Node::Image(medium.after_kill(rng), *is_sized || medium.syncs() > 0),
            Node::Table(table, name) => Node::Table(Arc::new(copy_of(table)), *name),
            other => other.clone(),
        }
    }

    fn after_loss(&self, loss: Loss, is_table: bool, rng: &mut Rng) -> Node {
        let Node::Image(medium, is_sized) = self else { return self.clone() };
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
        if !is_sized && medium.syncs() == 0 && loses(rng) {
            return Node::Image(Medium::new("cut short", 0), true);
        }
        let left = medium.after_loss(|_, versions| match loss {
            Loss::Mixed => rng.below(versions + 1),
            _ if loses(rng) => 0,
            _ => versions,
        });
        Node::Image(left, true)
    }
}

/// Sets in one table what is set in another.
pub fn add(from: &Table, to: &Table) {
    let mut at = BlockIndex(0);
    while let Some(block) = from.next_set(at) {
        to.prepare(BlockRange::one(block)).unwrap();
        to.set(BlockRange::one(block));
        at = BlockIndex(block.0 + 1);
    }
}

/// The same bits in another table.
pub fn copy_of(table: &Table) -> Table {
    let copy = Table::in_memory(table.blocks()).unwrap();
    add(table, &copy);
    if table.is_broken() {
        copy.mark_broken();
    }
    copy
}
