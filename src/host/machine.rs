//! The machine that the daemon runs on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;
use uuid::Uuid;

use super::{FileKind, Host, Look, RingWork, Running, memory};
use crate::image::{Direct, FileImage, ImageError, ImageOptions, SharedImage};
use crate::store::{
    self, ExaminedRecords, Fingerprint, Identity, RecordError, RecordStore, Records, RunTableFacts, Table, TableError,
    TableName, examine_run_table,
};
use crate::vhost_user::{self, ServeOptions, Server};

/// This machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine;

struct Thread(JoinHandle<()>);

impl Running for Thread {
    fn is_ended(&self) -> bool {
        self.0.is_finished()
    }

    fn join(self: Box<Self>) -> bool {
        self.0.join().is_err()
    }
}

impl Host for Machine {
    fn boot(&self) -> Result<Uuid, TableError> {
        Ok(TableName::of_this_boot(Uuid::nil())?.boot)
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn unix_ms(&self) -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn new_id(&self) -> Uuid {
        Uuid::new_v4()
    }

    fn memory_left_bytes(&self) -> u64 {
        memory::left_bytes()
    }

    fn start_thread(&self, name: &str, run: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Running>> {
        Ok(Box::new(Thread(std::thread::Builder::new().name(name.to_owned()).spawn(run)?)))
    }

    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn waits_by_pauses(&self) -> bool {
        false
    }

    fn on_ring(&self, work: RingWork) -> io::Result<()> {
        crate::image::block_on(async move |queue| work(queue).await)
    }

    fn create_image(&self, path: &Path, size_bytes: u64, direct: Direct) -> Result<SharedImage, ImageError> {
        Ok(Arc::new(FileImage::create(path, size_bytes, direct)?))
    }

    fn open_image(&self, path: &Path, options: ImageOptions) -> Result<SharedImage, ImageError> {
        Ok(Arc::new(FileImage::open(path, options)?))
    }

    fn probe_image(&self, path: &Path, options: ImageOptions) -> Result<SharedImage, ImageError> {
        Ok(Arc::new(FileImage::probe(path, options)?))
    }

    fn look(&self, path: &Path) -> io::Result<Look> {
        let meta = std::fs::symlink_metadata(path)?;
        let kind = match meta.file_type() {
            kind if kind.is_file() => FileKind::File,
            kind if kind.is_dir() => FileKind::Directory,
            kind if kind.is_socket() => FileKind::Socket,
            _ => FileKind::Other,
        };
        Ok(Look { kind, names: meta.nlink(), identity: (meta.dev(), meta.ino()) })
    }

    fn resolve(&self, path: &Path) -> PathBuf {
        std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
    }

    fn fingerprint(&self, path: &Path) -> io::Result<Fingerprint> {
        Fingerprint::of(path)
    }

    fn identity(&self, path: &Path) -> io::Result<Identity> {
        Identity::of(path)
    }

    fn holds_bytes(&self, path: &Path, from: u64) -> io::Result<bool> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
        let mut at = from;
        let mut buffer = vec![0; 64 << 10];
        while let Some((start, end)) = next_data(&file, at)? {
            at = start;
            while at < end {
                let len = usize::try_from((end - at).min(buffer.len() as u64)).expect("no more than the buffer");
                let got = file.read_at(&mut buffer[..len], at)?;
                if got == 0 {
                    return Ok(false);
                }
                if buffer[..got].iter().any(|byte| *byte != 0) {
                    return Ok(true);
                }
                at += got as u64;
            }
        }
        Ok(false)
    }

    fn free_bytes(&self, directory: &Path) -> io::Result<u64> {
        let found = rustix::fs::statvfs(directory)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        match std::fs::read_dir(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries?.map(|entry| Ok(entry?.path())).collect(),
        }
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::hard_link(from, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn sync_directory_of(&self, path: &Path) -> io::Result<()> {
        store::sync_directory_of(path)
    }

    fn write_note(&self, path: &Path, text: &str) -> io::Result<()> {
        std::fs::write(path, text)
    }

    fn read_note(&self, path: &Path) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned())
    }

    fn create_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<Arc<Table>, TableError> {
        Ok(Arc::new(Table::create(path, blocks, name)?))
    }

    fn open_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<Arc<Table>, TableError> {
        Ok(Arc::new(Table::open(path, blocks, name)?))
    }

    fn extend_table(&self, table: &Table, path: &Path, blocks: u64) -> Result<(), TableError> {
        table.reserve(Some(path), blocks)
    }

    fn grow_image(&self, image: &SharedImage, size_bytes: u64) -> Result<(), ImageError> {
        image.grow(size_bytes)
    }

    fn examine_table(&self, path: &Path, blocks: u64, name: TableName) -> Result<RunTableFacts, TableError> {
        examine_run_table(path, blocks, name)
    }

    fn save_table(&self, table: &Table, path: &Path) -> Result<Uuid, TableError> {
        table.save(path)
    }

    fn load_table(&self, table: &Table, path: &Path, seal: Uuid) -> Result<(), TableError> {
        table.load(path, seal)
    }

    fn open_records(&self, path: &Path) -> Result<Box<dyn RecordStore>, RecordError> {
        Ok(Box::new(Records::open(path)?))
    }

    fn examine_records(&self, path: &Path) -> Result<Option<ExaminedRecords>, RecordError> {
        Records::examine(path)
    }

    fn serve(&self, options: ServeOptions) -> io::Result<Arc<dyn Server>> {
        Ok(Arc::new(vhost_user::serve(options)?))
    }

    fn clear_socket(&self, path: &Path) -> io::Result<()> {
        vhost_user::clear_stale(path)
    }
}

fn next_data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => Ok(Some((start, rustix::fs::seek(file, SeekFrom::Hole(start))?))),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_a_directory_is_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (there, link) = (dir.path().join("there"), dir.path().join("link"));
        std::fs::create_dir(&there).unwrap();
        std::os::unix::fs::symlink(&there, &link).unwrap();
        std::fs::write(there.join("file"), "x").unwrap();
        let host: &dyn Host = &Machine;
        let are = [&there, &link, &link.join("file"), &dir.path().join("nothing")].map(|path| host.is_directory(path));
        assert_eq!(are, [true, true, false, false]);
    }
}
