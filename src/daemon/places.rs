//! Where the daemon keeps things: the state directory, which survives, and the run directory, which need not.
//!
//! What always holds: both are ours alone to write, and real directories; one daemon at a time has a state directory, and
//! one a run directory: what another one keeps in it would look like strays.

use std::collections::HashSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use uuid::Uuid;

use crate::control::SnapshotRef;
use crate::store::DiskRecord;

/// The directories, checked and locked.
#[derive(Debug)]
pub struct Places {
    state_dir: PathBuf,
    run_dir: PathBuf,
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
        Ok(Places { state_dir: state_dir.to_owned(), run_dir: run_dir.to_owned(), _locks: locks })
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

    /// The durable copy of a table.
    #[must_use]
    pub fn durable_table(&self, id: Uuid) -> PathBuf {
        self.state_dir.join("tables").join(format!("{id}.table"))
    }

    /// The mapped copy of a table.
    #[must_use]
    pub fn run_table(&self, id: Uuid) -> PathBuf {
        self.run_dir.join("tables").join(format!("{id}.bits"))
    }

    /// Where a snapshot's image goes when nothing else is said.
    #[must_use]
    pub fn snapshot_image(&self, reference: &impl std::fmt::Display) -> PathBuf {
        self.state_dir.join("images").join(format!("{reference}.img"))
    }

    /// The durable table of a log, or of a snapshot that outlives a power cut: committed while it is in use.
    #[must_use]
    pub fn log_table(&self, id: Uuid) -> PathBuf {
        self.state_dir.join("tables").join(format!("{id}.log"))
    }

    /// What becomes of the durable table of a snapshot that is given up: older ones still read by it.
    #[must_use]
    pub fn given_up_table(&self, id: Uuid) -> PathBuf {
        self.log_table(id).with_extension("lost")
    }

    /// Says why a version broke, to whoever comes after a kill of the daemon.
    #[must_use]
    pub fn broken_mark(&self, id: Uuid) -> PathBuf {
        self.run_dir.join("tables").join(format!("{id}.broken"))
    }

    /// Where the log of a live version goes when nothing else is said. It has no snapshot's name: it may outlive the
    /// snapshot for which it was made.
    #[must_use]
    pub fn log_image(&self, id: Uuid) -> PathBuf {
        self.state_dir.join("images").join(format!("{id}.log"))
    }

    /// Removes the tables and images of snapshots that no record knows: what a daemon left that was killed after it
    /// had made them and before they were recorded, or after they were forgotten and before they were removed.
    ///
    /// Only files that are named as ours are looked at, and only in our own directories.
    pub fn remove_strays(&self, disks: &[DiskRecord]) {
        let snapshots = || disks.iter().flat_map(|d| &d.snapshots);
        // Who has a full image has no table.
        let logs = disks.iter().filter(|d| d.live_log.is_some()).map(|d| d.live);
        let bitmaps = disks.iter().filter_map(|d| Some(d.mirror.as_ref()?.bitmap));
        let parts = snapshots().filter(|s| !s.owns_all).map(|s| s.id);
        let ids: HashSet<Uuid> = disks.iter().map(|d| d.id).chain(logs).chain(bitmaps).chain(parts).collect();
        // By name and not by path: the directory may have been moved since.
        let named = |d: &DiskRecord| d.snapshots.iter().map(|s| format!("{}@{}", d.name, s.name)).collect::<Vec<_>>();
        let references: HashSet<String> = disks.iter().flat_map(named).collect();
        let is_stray_table = |path: &Path| {
            let is_ours = path
                .extension()
                .is_some_and(|e| ["table", "new", "bits", "log", "lost", "filling"].iter().any(|ours| e == *ours));
            let id = path.file_stem().and_then(|s| s.to_str()?.parse::<Uuid>().ok());
            is_ours && id.is_some_and(|id| !ids.contains(&id))
        };
        let versions: HashSet<Uuid> = snapshots().map(|s| s.id).collect();
        let is_stray_mark = |path: &Path| {
            let id = path.file_stem().and_then(|s| s.to_str()?.parse::<Uuid>().ok());
            path.extension().is_some_and(|e| e == "broken") && id.is_some_and(|id| !versions.contains(&id))
        };
        let is_stray_image = |path: &Path| {
            let reference = path.file_stem().and_then(|s| s.to_str()?.parse::<SnapshotRef>().ok());
            path.extension().is_some_and(|e| e == "img")
                && reference.is_some_and(|r| !references.contains(&r.to_string()))
        };
        remove_if(&self.state_dir.join("tables"), is_stray_table);
        remove_if(&self.run_dir.join("tables"), |path| is_stray_table(path) || is_stray_mark(path));
        remove_if(&self.state_dir.join("images"), |path| is_stray_image(path) || is_stray_table(path));
    }

    /// Where a snapshot's socket goes when nothing else is said.
    #[must_use]
    pub fn snapshot_socket(&self, reference: &impl std::fmt::Display) -> PathBuf {
        self.run_dir.join(format!("{reference}.sock"))
    }
}

fn remove_if(dir: &Path, is_stray: impl Fn(&Path) -> bool) {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => return log::warn!("cannot look for strays in {}: {e}", dir.display()),
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_stray(path)) {
        log::info!("removing {}, which an unfinished operation left", path.display());
        super::layers::remove_file(&path);
    }
}

/// Makes a directory of mode 0700. A user may give us a symbolic link for the top ones, but not for what we keep below.
fn make(dir: &Path, top: bool) -> Result<(), PlaceError> {
    let error = |source| PlaceError::Io { path: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(error)?;
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

fn is_same(one: &Path, other: &Path) -> Result<bool, PlaceError> {
    let look = |dir: &Path| {
        let meta = std::fs::metadata(dir).map_err(|source| PlaceError::Io { path: dir.to_owned(), source })?;
        Ok((meta.dev(), meta.ino()))
    };
    Ok(look(one)? == look(other)?)
}

fn lock(dir: &Path, option: &'static str) -> Result<File, PlaceError> {
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
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder).map_err(error)?;
            let holder = holder.trim().parse::<u32>().map(|pid| format!(" (process {pid})")).unwrap_or_default();
            return Err(PlaceError::InUse { path: dir.to_owned(), holder, option });
        }
        Err(e) => return Err(error(e.into())),
    }
    file.set_len(0).map_err(error)?;
    writeln!(file, "{}", std::process::id()).map_err(error)?;
    Ok(file)
}
