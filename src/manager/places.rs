//! Where the daemon keeps things: the state directory, which survives, and the run directory, which need not.
//!
//! What always holds: both are ours alone to write, and real directories; one daemon at a time has a state directory, and
//! one a run directory: what another one keeps in it would look like orphans.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use uuid::Uuid;

use crate::control::{Name, SnapshotRef};
use crate::host::Host;
use crate::manager::orphans;
use crate::store::{DiskRecord, Remembered, TableFiles};

/// The directories, checked and locked.
#[derive(Debug)]
pub struct Places {
    state_dir: PathBuf,
    run_dir: PathBuf,
    tables: TableFiles,
    // None for who only looks.
    _locks: Vec<File>,
}

/// A directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The system refused.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others could change what is in it.
    #[error("cannot use {}: {what}", path.display())]
    Unsafe {
        /// Which one.
        path: PathBuf,
        /// Why, and what to do.
        what: String,
    },
    /// The records are not there, but what they would speak of is.
    #[error(
        "{} {what}, but there are files that only records can tell of, such as {}; put the records back, or see \
         'halfsilver check', or move {} out of the way to begin with nothing",
        records.display(),
        example.display(),
        state_dir.display()
    )]
    RecordsLost {
        /// The store of records.
        records: PathBuf,
        /// What is the matter with it.
        what: &'static str,
        /// One of the files.
        example: PathBuf,
        /// The state directory.
        state_dir: PathBuf,
    },
    /// Another daemon has the directory.
    #[error("{} is in use by another halfsilver{holder}; stop it first, or use another {option}", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The holder, as far as it is known.
        holder: String,
        /// The option that names another one.
        option: &'static str,
    },
}

impl Places {
    /// Makes, checks and locks the directories.
    ///
    /// # Errors
    /// When one cannot be made or is not safe, or another daemon has it.
    pub fn open(state_dir: &Path, run_dir: &Path) -> Result<Places, PlaceError> {
        for dir in [state_dir, run_dir] {
            make(dir, true)?;
        }
        for dir in [state_dir.join("tables"), state_dir.join("images"), run_dir.join("tables")] {
            make(&dir, false)?;
        }
        let mut locks = vec![lock(state_dir, "--state-dir")?];
        if !is_same(state_dir, run_dir)? {
            locks.push(lock(run_dir, "--run-dir")?);
        }
        Ok(Places { _locks: locks, ..Places::to_look_at(state_dir, run_dir) })
    }

    /// The same places where nothing is to be made or locked: for who only looks, and on a host that has them already.
    #[must_use]
    pub fn to_look_at(state_dir: &Path, run_dir: &Path) -> Places {
        let tables = TableFiles::below(state_dir, run_dir);
        Places { state_dir: state_dir.to_owned(), run_dir: run_dir.to_owned(), tables, _locks: Vec::new() }
    }

    /// The state directory.
    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The run directory.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The store of records.
    #[must_use]
    pub fn records(&self) -> PathBuf {
        self.state_dir.join("records.redb")
    }

    /// Where tables are.
    #[must_use]
    pub fn tables(&self) -> &TableFiles {
        &self.tables
    }

    /// The durable copy of a table.
    #[must_use]
    pub fn durable_table(&self, id: Uuid) -> PathBuf {
        self.tables.saved(id)
    }

    /// The mapped copy of a table.
    #[must_use]
    pub fn run_table(&self, id: Uuid) -> PathBuf {
        self.tables.run(id)
    }

    /// Where a snapshot's image goes when nothing else is said.
    #[must_use]
    pub fn snapshot_image(&self, reference: &impl std::fmt::Display) -> PathBuf {
        self.state_dir.join("images").join(format!("{reference}.img"))
    }

    /// The durable table of a log, or a write-intent bitmap: committed while it is in use.
    #[must_use]
    pub fn log_table(&self, id: Uuid) -> PathBuf {
        self.tables.log(id)
    }

    /// The durable table of a snapshot that outlives a power cut.
    #[must_use]
    pub fn saved_table(&self, id: Uuid) -> PathBuf {
        self.tables.durable(id)
    }

    /// What becomes of it when the snapshot is given up.
    #[must_use]
    pub fn given_up_table(&self, id: Uuid) -> PathBuf {
        self.tables.given_up(id)
    }

    /// The mapped dirty bitmap of a version, or of a bookmark.
    #[must_use]
    pub fn changed_table(&self, id: Uuid) -> PathBuf {
        self.tables.changed(id)
    }

    /// What a clean stop saves of it.
    #[must_use]
    pub fn saved_changes(&self, id: Uuid) -> PathBuf {
        self.tables.saved_changes(id)
    }

    /// Says why a version broke, to whoever comes after a kill of the daemon.
    #[must_use]
    pub fn broken_mark(&self, id: Uuid) -> PathBuf {
        self.tables.broken_mark(id)
    }

    /// Where the log of a live version goes when nothing else is said. It has no snapshot's name: it may outlive the
    /// snapshot for which it was made.
    #[must_use]
    pub fn log_image(&self, id: Uuid) -> PathBuf {
        self.state_dir.join("images").join(format!("{id}.log"))
    }

    /// Where the full image of a volume is that became independent.
    #[must_use]
    pub fn own_image(&self, id: Uuid) -> PathBuf {
        self.images_dir().join(format!("{id}.raw"))
    }

    /// Our directories in which files have names that records know.
    pub(crate) fn own_dirs(&self) -> [PathBuf; 3] {
        [self.tables.state_dir().to_owned(), self.images_dir(), self.tables.run_dir().to_owned()]
    }

    /// Where images go when nothing else is said.
    pub(crate) fn images_dir(&self) -> PathBuf {
        self.state_dir.join("images")
    }

    /// Refuses when there are no records, but files that may be the only copy of what records once told of: to go on
    /// would mean to serve something else under the name of what is lost.
    ///
    /// # Errors
    /// When that is so, or a directory cannot be read.
    pub fn refuse_lost_records(&self, host: &dyn Host) -> Result<(), PlaceError> {
        let records = self.records();
        // What it had may be in its second copy. If that is not whole either, there are records then that name no disk.
        if host.is_there(&records.with_extension("copy")) {
            return Ok(());
        }
        match host.fingerprint(&records) {
            Ok(look) if look.size_bytes > 0 => Ok(()),
            Ok(_) => self.refuse_kept("is empty", &self.orphans(host, &[], &BTreeSet::new())?),
            Err(_) => self.refuse_kept("is missing", &self.orphans(host, &[], &BTreeSet::new())?),
        }
    }

    fn refuse_kept(&self, what: &'static str, orphans: &orphans::Orphans) -> Result<(), PlaceError> {
        // What is only in the run directory goes with the next boot anyhow.
        match orphans.kept.iter().find(|path| path.starts_with(&self.state_dir)) {
            None => Ok(()),
            Some(example) => Err(PlaceError::RecordsLost {
                records: self.records(),
                what,
                example: example.clone(),
                state_dir: self.state_dir.clone(),
            }),
        }
    }

    /// What no record names.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub(crate) fn orphans(
        &self,
        host: &dyn Host,
        disks: &[DiskRecord],
        dropped: &BTreeSet<String>,
    ) -> Result<orphans::Orphans, PlaceError> {
        orphans::find(host, self, disks, dropped)
            .map_err(|source| PlaceError::Io { path: self.state_dir.clone(), source })
    }

    /// Removes the tables and images that no record names and nobody misses: what a daemon left that was killed after it
    /// had made them and before they were recorded, or after they were forgotten and before they were removed. While there
    /// is a record that cannot be read nobody knows what it names, and everything stays.
    ///
    /// # Errors
    /// When there are no records at all, but files that may be missed.
    pub fn remove_orphans(
        &self,
        host: &dyn Host,
        remembered: &Remembered,
        dropped: &BTreeSet<String>,
    ) -> Result<(), PlaceError> {
        if !remembered.unreadable.is_empty() {
            return Ok(());
        }
        let orphans = self.orphans(host, &remembered.disks, dropped)?;
        if remembered.disks.is_empty() {
            self.refuse_kept("names no disk", &orphans)?;
        }
        for path in &orphans.removable {
            log::info!("removing {}, which an unfinished operation left", path.display());
            crate::manager::layers::remove_file(host, path);
        }
        for path in &orphans.kept {
            log::error!(
                "{} is named by no record, and may be the only copy of something: it is kept; see 'halfsilver check'",
                path.display()
            );
        }
        Ok(())
    }

    /// Removes the sockets of disks and snapshots that a daemon left which was killed, whatever they were called then.
    pub(crate) fn clear_dead_sockets(&self, host: &dyn Host) {
        let Ok(entries) = host.list(&self.run_dir) else { return };
        for path in entries {
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let is_ours = stem.parse::<Name>().is_ok() || stem.parse::<SnapshotRef>().is_ok();
            if is_ours
                && path.extension().is_some_and(|e| e == "sock")
                && let Err(e) = host.clear_socket(&path)
            {
                log::debug!("{} stays: {e}", path.display());
            }
        }
    }

    /// Where the socket of a disk or volume goes when nothing else is said.
    #[must_use]
    pub fn disk_socket(&self, name: &impl std::fmt::Display) -> PathBuf {
        self.run_dir.join(format!("{name}.sock"))
    }

    /// Where a snapshot's socket goes when nothing else is said.
    #[must_use]
    pub fn snapshot_socket(&self, reference: &impl std::fmt::Display) -> PathBuf {
        self.run_dir.join(format!("{reference}.sock"))
    }
}

/// Makes a directory of mode 0700. A user may give us a symbolic link for the top ones, but not for what we keep below.
fn make(dir: &Path, top: bool) -> Result<(), PlaceError> {
    let error = |source| PlaceError::Io { path: dir.to_owned(), source };
    let is_new = !dir.exists();
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(error)?;
    if is_new {
        // What is put into it must be found after a power cut.
        crate::store::sync_directory_of(dir).map_err(error)?;
    }
    let meta = if top { std::fs::metadata(dir) } else { std::fs::symlink_metadata(dir) }.map_err(error)?;
    let bad = |what: &str| Err(PlaceError::Unsafe { path: dir.to_owned(), what: what.to_owned() });
    let me = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        return bad("it is not a directory");
    }
    if meta.uid() != me && meta.uid() != 0 {
        return bad("it belongs to another user");
    }
    if meta.mode() & 0o022 != 0 {
        return bad("other users may write to it; take that right away (chmod go-w) or use another directory");
    }
    Ok(())
}

pub(crate) fn is_same(one: &Path, other: &Path) -> Result<bool, PlaceError> {
    let look = |dir: &Path| {
        let meta = std::fs::metadata(dir).map_err(|source| PlaceError::Io { path: dir.to_owned(), source })?;
        Ok((meta.dev(), meta.ino()))
    };
    Ok(look(one)? == look(other)?)
}

/// Locks a directory, and says in the file who has it. `option` names another one.
pub(crate) fn lock(dir: &Path, option: &'static str) -> Result<File, PlaceError> {
    let path = dir.join("lock");
    let error = |source: io::Error| PlaceError::Io { path: path.clone(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(error)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(in_use(dir, option, file).map_err(error)?),
        Err(e) => return Err(error(e.into())),
    }
    file.set_len(0).map_err(error)?;
    writeln!(file, "{}", std::process::id()).map_err(error)?;
    Ok(file)
}

/// That somebody else holds this lock.
pub(crate) fn in_use(dir: &Path, option: &'static str, mut lock: File) -> io::Result<PlaceError> {
    let mut holder = String::new();
    lock.read_to_string(&mut holder)?;
    let holder = holder.trim().parse::<u32>().map(|pid| format!(" (process {pid})")).unwrap_or_default();
    Ok(PlaceError::InUse { path: dir.to_owned(), holder, option })
}
