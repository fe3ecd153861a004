//! The world, as commands, the manager and a start touch it: files, tables, records, sockets, threads and time.
//!
//! What always holds:
//! - Each call is one step that a kill or a power cut may come before or after; no order of steps is known here.
//! - Who calls holds no lock that another thread may want: a host may let all others go on first.
//! - A thread waits only by its host, so that a host decides in which order threads go on.

mod machine;
mod memory;
mod wait;

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::image::{Direct, ImageError, ImageOptions, IoQueue, SharedImage};
use crate::store::{
    ExaminedRecords, Fingerprint, Identity, RecordError, RecordStore, RunTableFacts, Table, TableError, TableName,
};
use crate::vhost_user::{ServeOptions, Server};

pub use crate::image::{SYSCTL, probe_ring};
pub use machine::Machine;
pub use wait::receive;

/// What runs on a ring of its own.
pub type RingWork = Box<dyn FnOnce(IoQueue) -> Pin<Box<dyn Future<Output = ()>>>>;

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A plain file.
    File,
    /// A directory.
    Directory,
    /// A socket.
    Socket,
    /// Anything else, a symbolic link among it.
    Other,
}

/// How a file looks; a symbolic link is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// What it is.
    pub kind: FileKind,
    /// Under how many names it is there.
    pub names: u64,
    /// The device and number that it has, whatever it is called.
    pub identity: (u64, u64),
}

/// A thread that a host has begun.
pub trait Running: Send {
    /// Whether it has ended.
    fn is_ended(&self) -> bool;

    /// Whether it panicked. Waits for its end.
    fn join(self: Box<Self>) -> bool;
}

/// A machine, real or simulated.
pub trait Host: Send + Sync + 'static {
    /// The boot of the machine.
    ///
    /// # Errors
    /// When it cannot be told.
    fn boot(&self) -> Result<Uuid, TableError>;

    /// A time that never goes back.
    fn now(&self) -> Instant;

    /// The time of day, in milliseconds since 1970.
    fn unix_ms(&self) -> u64;

    /// An identifier that nothing has.
    fn new_id(&self) -> Uuid;

    /// Bytes of memory that can be had without anything being killed or swapped out.
    fn memory_left_bytes(&self) -> u64;

    /// Begins a thread.
    ///
    /// # Errors
    /// When the system has no room for one.
    fn start_thread(&self, name: &str, run: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Running>>;

    /// Lets others go on until so much time has passed.
    fn pause(&self, time: Duration);

    /// Whether a thread must wait by [`Host::pause`] alone: where one that waits in another way would keep all others from
    /// going on.
    fn waits_by_pauses(&self) -> bool;

    /// Runs work to its end on a ring of its own, in this thread.
    ///
    /// # Errors
    /// When there is no ring.
    fn on_ring(&self, work: RingWork) -> io::Result<()>;

    /// Makes an image of zeros where nothing is.
    ///
    /// # Errors
    /// When it cannot be made.
    fn create_image(&self, path: &Path, size_bytes: u64, direct: Direct) -> Result<SharedImage, ImageError>;

    /// Opens an image, to use it.
    ///
    /// # Errors
    /// When it cannot be used so.
    fn open_image(&self, path: &Path, options: ImageOptions) -> Result<SharedImage, ImageError>;

    /// Opens an image as [`Host::open_image`] would, only to look at it.
    ///
    /// # Errors
    /// When it could not be used so.
    fn probe_image(&self, path: &Path, options: ImageOptions) -> Result<SharedImage, ImageError>;

    /// How a file looks.
    ///
    /// # Errors
    /// When there is none, or it cannot be looked at.
    fn look(&self, path: &Path) -> io::Result<Look>;

    /// Where a path leads; as it is, if nothing is there.
    fn resolve(&self, path: &Path) -> PathBuf;

    /// Size and time of change of an image, by which one is recognised that was changed by somebody else.
    ///
    /// # Errors
    /// When it cannot be looked at.
    fn fingerprint(&self, path: &Path) -> io::Result<Fingerprint>;

    /// What tells an image from every other.
    ///
    /// # Errors
    /// When it cannot be looked at.
    fn identity(&self, path: &Path) -> io::Result<Identity>;

    /// Whether a file has a byte from `from` on that is not zero.
    ///
    /// # Errors
    /// When it cannot be read.
    fn holds_bytes(&self, path: &Path, from: u64) -> io::Result<bool>;

    /// How many bytes can still be written to the file system of a directory.
    ///
    /// # Errors
    /// When it cannot be told.
    fn free_bytes(&self, directory: &Path) -> io::Result<u64>;

    /// What is in a directory. Nothing is in one that is not there.
    ///
    /// # Errors
    /// When it cannot be read.
    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>>;

    /// Another name for a file.
    ///
    /// # Errors
    /// When the system refuses.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Another name in the place of the old one.
    ///
    /// # Errors
    /// When the system refuses.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Takes a file's name away.
    ///
    /// # Errors
    /// When there is none, or the system refuses.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a file's directory durable.
    ///
    /// # Errors
    /// When the system refuses.
    fn sync_directory_of(&self, path: &Path) -> io::Result<()>;

    /// A small text, as it is now. It outlives a kill, and perhaps a power cut.
    ///
    /// # Errors
    /// When it cannot be written.
    fn write_note(&self, path: &Path, text: &str) -> io::Result<()>;

    /// What [`Host::write_note`] left.
    ///
    /// # Errors
    /// When there is none.
    fn read_note(&self, path: &Path) -> io::Result<String>;

    /// [`Table::create`].
    ///
    /// # Errors
    /// When it cannot be made.
    fn create_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<Arc<Table>, TableError>;

    /// [`Table::open`].
    ///
    /// # Errors
    /// When it is missing, or is not the one.
    fn open_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<Arc<Table>, TableError>;

    /// [`Table::reserve`] of the table at a path.
    ///
    /// # Errors
    /// When there is no room.
    fn extend_table(&self, table: &Table, path: &Path, blocks: u64) -> Result<(), TableError>;

    /// [`crate::image::Image::grow`].
    ///
    /// # Errors
    /// When it cannot have that size.
    fn grow_image(&self, image: &SharedImage, size_bytes: u64) -> Result<(), ImageError>;

    /// What [`Host::open_table`] would find. It changes nothing.
    ///
    /// # Errors
    /// When it is missing, or is not the one.
    fn examine_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<RunTableFacts, TableError>;

    /// [`Table::save`].
    ///
    /// # Errors
    /// When the copy cannot be made durable.
    fn save_table(&self, table: &Table, path: &Path) -> Result<Uuid, TableError>;

    /// [`Table::load`].
    ///
    /// # Errors
    /// When the copy is missing, damaged or another one.
    fn load_table(&self, table: &Table, path: &Path, seal: Uuid) -> Result<(), TableError>;

    /// Opens or creates the records.
    ///
    /// # Errors
    /// When they cannot be used.
    fn open_records(&self, path: &Path) -> Result<Box<dyn RecordStore>, RecordError>;

    /// Looks at the records and changes nothing. None when there are none.
    ///
    /// # Errors
    /// When they cannot be read.
    fn examine_records(&self, path: &Path) -> Result<Option<ExaminedRecords>, RecordError>;

    /// Serves a socket.
    ///
    /// # Errors
    /// When it cannot be had.
    fn serve(&self, options: ServeOptions) -> io::Result<Arc<dyn Server>>;

    /// Removes a socket that nobody serves any more.
    ///
    /// # Errors
    /// When somebody does, or something else is there.
    fn clear_socket(&self, path: &Path) -> io::Result<()>;
}

impl dyn Host {
    /// What work comes to that runs on a ring of its own, in this thread.
    ///
    /// # Errors
    /// When there is no ring.
    ///
    /// # Panics
    /// When a host says that work is done which is not.
    pub fn block_on<T: 'static>(&self, work: impl AsyncFnOnce(IoQueue) -> T + 'static) -> io::Result<T> {
        let out = std::rc::Rc::new(std::cell::RefCell::new(None));
        let put = out.clone();
        self.on_ring(Box::new(move |queue| {
            Box::pin(async move {
                let value = work(queue).await;
                *put.borrow_mut() = Some(value);
            })
        }))?;
        Ok(out.take().expect("a host runs work to its end"))
    }

    /// Bytes of memory that one pack may take: half of what is left, so that it is that disk which is not served, and not
    /// all of them.
    #[must_use]
    pub fn memory_for_a_pack(&self) -> u64 {
        self.memory_left_bytes() / 2
    }

    /// The name of a table of this boot.
    ///
    /// # Errors
    /// When the boot cannot be told.
    pub fn table_name(&self, id: Uuid) -> Result<TableName, TableError> {
        Ok(TableName { id, boot: self.boot()? })
    }

    /// Whether nothing is at a path.
    #[must_use]
    pub fn is_free(&self, path: &Path) -> bool {
        matches!(self.look(path), Err(e) if e.kind() == io::ErrorKind::NotFound)
    }

    /// Whether anything is at a path.
    #[must_use]
    pub fn is_there(&self, path: &Path) -> bool {
        self.look(path).is_ok()
    }

    /// Whether a path leads to a directory, over links too.
    #[must_use]
    pub fn is_directory(&self, path: &Path) -> bool {
        self.look(&self.resolve(path)).is_ok_and(|look| look.kind == FileKind::Directory)
    }
}
