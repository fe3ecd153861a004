//! Where the copies of tables are, by the stable name of whose they are (docs/on-disk-format.md, "Files").
//!
//! What always holds: what is in the state directory survives, what is in the run directory is of one boot.

use std::path::{Path, PathBuf};

use uuid::Uuid;

/// The two directories that tables are in.
#[derive(Clone, Debug)]
pub struct TableFiles {
    state: PathBuf,
    run: PathBuf,
}

impl TableFiles {
    /// Below these directories.
    #[must_use]
    pub fn below(state_dir: &Path, run_dir: &Path) -> TableFiles {
        TableFiles { state: state_dir.join("tables"), run: run_dir.join("tables") }
    }

    /// The directory of those that survive.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// The directory of those of this boot.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run
    }

    /// What a clean stop saves of a table.
    #[must_use]
    pub fn saved(&self, id: Uuid) -> PathBuf {
        self.state.join(format!("{id}.table"))
    }

    /// The mapped table.
    #[must_use]
    pub fn run(&self, id: Uuid) -> PathBuf {
        self.run.join(format!("{id}.bits"))
    }

    /// The durable table of a log, of pending blocks, or a write-intent bitmap: committed while it is in use.
    #[must_use]
    pub fn log(&self, id: Uuid) -> PathBuf {
        self.state.join(format!("{id}.log"))
    }

    /// The durable table of a snapshot that outlives a power cut. A version may have had a log before it was frozen, whose
    /// table still waits to be removed.
    #[must_use]
    pub fn durable(&self, id: Uuid) -> PathBuf {
        self.state.join(format!("{id}.saved"))
    }

    /// What becomes of it when the snapshot is given up: older ones still read by it.
    #[must_use]
    pub fn given_up(&self, id: Uuid) -> PathBuf {
        self.state.join(format!("{id}.lost"))
    }

    /// The mapped dirty bitmap of a version, or of a bookmark.
    #[must_use]
    pub fn changed(&self, id: Uuid) -> PathBuf {
        self.run.join(format!("{id}.changed"))
    }

    /// What a clean stop saves of it.
    #[must_use]
    pub fn saved_changes(&self, id: Uuid) -> PathBuf {
        self.state.join(format!("{id}.changes"))
    }

    /// Says why a version broke, to whoever comes after a kill of the daemon.
    #[must_use]
    pub fn broken_mark(&self, id: Uuid) -> PathBuf {
        self.run.join(format!("{id}.broken"))
    }
}
