//! Raw files and block devices as images. Never format-probed: every byte of the file is the guest's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::{
    Alignment, ByteOffset, Image, ImageError, ImageErrorKind, ImageOp, IoQueue, LockMode, OpTicket, Unsynced, inline,
    lock,
};

/// Whether transfers go around the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Direct {
    /// `O_DIRECT`.
    #[default]
    On,
    /// Through the page cache.
    Off,
}

/// How to open an image.
#[derive(Clone, Copy, Debug)]
pub struct ImageOptions {
    /// Page cache or not.
    pub direct: Direct,
    /// Open for reading only.
    pub read_only: bool,
    /// How long to wait for a lock that somebody else holds. The kernel holds a dead process's lock until the last
    /// transfer of it is done, so waiting for the lock is waiting for those.
    pub lock_wait: Duration,
}

/// How often a lock is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// A raw file or a block device.
#[derive(Debug)]
pub struct FileImage {
    file: Arc<File>,
    path: PathBuf,
    /// Its name since it was renamed.
    moved: OnceLock<PathBuf>,
    /// It only grows.
    size_bytes: AtomicU64,
    is_block: bool,
    alignment: Alignment,
    // Small transfers need no ring.
    is_in_memory: bool,
    poisoned: AtomicBool,
    unsynced: Unsynced,
}

/// Guest sectors; a disk's size is a multiple of this (virtio 1.2, 5.2.4).
const SECTOR_BYTES: u64 = 512;

impl FileImage {
    /// Opens and locks an existing raw file or block device.
    ///
    /// # Errors
    /// When it cannot be opened, is in use, is neither file nor block device, has a size that is not a
    /// multiple of 512, or lies on a file system without `O_DIRECT` (the message says `direct=off`).
    pub fn open(path: &Path, options: ImageOptions) -> Result<FileImage, ImageError> {
        let meta = std::fs::metadata(path).map_err(|e| open_error(path, &e))?;
        let is_block = meta.file_type().is_block_device();
        if !is_block && !meta.is_file() {
            let message = "it is neither a regular file nor a block device";
            return Err(ImageError::new(ImageErrorKind::Unsuitable, ImageOp::Open, path, message));
        }
        let mut flags = libc::O_CLOEXEC | libc::O_NOCTTY;
        if is_block && !options.read_only {
            flags |= libc::O_EXCL; // Refused when the device is mounted or claimed.
        }
        let file = open_with(path, options, flags)?;
        let mode = if options.read_only { LockMode::Read } else { LockMode::Write };
        Self::finish_open(file, path, options, is_block, mode)
    }

    /// Opens a file or block device as [`FileImage::open`] would, with the same locks and only if it could be written by
    /// whoever asks, but only to read: to find out whether it could be.
    ///
    /// # Errors
    /// As for [`FileImage::open`].
    pub fn probe(path: &Path, options: ImageOptions) -> Result<FileImage, ImageError> {
        let meta = std::fs::metadata(path).map_err(|e| open_error(path, &e))?;
        let is_block = meta.file_type().is_block_device();
        if !is_block && !meta.is_file() {
            let message = "it is neither a regular file nor a block device";
            return Err(ImageError::new(ImageErrorKind::Unsuitable, ImageOp::Open, path, message));
        }
        let (mut claim, mut mode) = (0, LockMode::Read);
        if !options.read_only {
            let may_write =
                rustix::fs::accessat(rustix::fs::CWD, path, rustix::fs::Access::WRITE_OK, rustix::fs::AtFlags::EACCESS);
            may_write.map_err(|e| open_error(path, &e.into()))?;
            claim = if is_block { libc::O_EXCL } else { 0 };
            mode = LockMode::Write;
        }
        let options = ImageOptions { read_only: true, ..options };
        let file = open_with(path, options, libc::O_CLOEXEC | libc::O_NOCTTY | claim)?;
        Self::finish_open(file, path, options, is_block, mode)
    }

    /// Creates a sparse file of `size_bytes`, mode 0600, open for writing and locked. Fails if the name is taken,
    /// also by a dangling symbolic link.
    ///
    /// # Errors
    /// When the file cannot be created, sized or locked. What was created is removed again.
    pub fn create(path: &Path, size_bytes: u64, direct: Direct) -> Result<FileImage, ImageError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| open_error(path, &e))?;
        let made = file
            .set_len(size_bytes)
            .map_err(|e| ImageError::from_io(ImageOp::Open, path, None, &e))
            .and_then(|()| FileImage::open(path, ImageOptions { direct, read_only: false, lock_wait: Duration::ZERO }));
        if made.is_err()
            && let Err(e) = std::fs::remove_file(path)
        {
            log::warn!("{}: left behind after a failed creation: {e}", path.display());
        }
        made
    }

    fn finish_open(
        file: File,
        path: &Path,
        options: ImageOptions,
        is_block: bool,
        mode: LockMode,
    ) -> Result<FileImage, ImageError> {
        wait_for_lock(&file, mode, path, options.lock_wait).map_err(|e| match e.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => ImageError::new(
                ImageErrorKind::InUse,
                ImageOp::Open,
                path,
                "it is in use, by another disk or leg of this daemon, or by QEMU, qemu-img or another halfsilver; end that first",
            ),
            _ => open_error(path, &e),
        })?;
        let size_bytes = size_of_container(&file, is_block).map_err(|e| open_error(path, &e))?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            let message = if size_bytes == 0 {
                "it is empty; give it the size of the disk, for example with truncate -s 10G".to_owned()
            } else {
                format!("its size of {size_bytes} bytes is not a multiple of 512; grow it with truncate -s %512")
            };
            return Err(ImageError::new(ImageErrorKind::Unsuitable, ImageOp::Open, path, message));
        }
        let is_in_memory = inline::is_in_memory(file.as_fd()).map_err(|e| open_error(path, &e))?;
        let mut alignment = Alignment { offset_bytes: 1, memory_bytes: 1 };
        if options.direct == Direct::On {
            let direct = direct_alignment(&file).map_err(|e| open_error(path, &e))?;
            match size_bytes.is_multiple_of(direct.offset_bytes.into()) {
                // There is nothing that transfers could go around.
                _ if is_in_memory => use_page_cache(&file).map_err(|e| open_error(path, &e))?,
                true => alignment = direct,
                false => {
                    let (shown, unit) = (path.display(), direct.offset_bytes);
                    log::info!("{shown}: its end is no whole unit of {unit} bytes; it is used through the page cache");
                    use_page_cache(&file).map_err(|e| open_error(path, &e))?;
                }
            }
        }
        let poisoned = AtomicBool::new(false);
        Ok(FileImage {
            file: Arc::new(file),
            path: path.to_owned(),
            moved: OnceLock::new(),
            size_bytes: AtomicU64::new(size_bytes),
            is_block,
            alignment,
            is_in_memory,
            poisoned,
            unsynced: Unsynced::default(),
        })
    }
}

impl Image for FileImage {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn grow(&self, size_bytes: u64) -> Result<(), ImageError> {
        let refused = |e: &io::Error| ImageError::from_io(ImageOp::Open, self.path(), None, e);
        let has_bytes = size_of_container(&self.file, self.is_block).map_err(|e| refused(&e))?;
        let unit_bytes = u64::from(self.alignment.offset_bytes);
        let unsuitable =
            |what: String| Err(ImageError::new(ImageErrorKind::Unsuitable, ImageOp::Open, self.path(), what));
        if !size_bytes.is_multiple_of(unit_bytes.max(SECTOR_BYTES)) {
            return unsuitable(format!("its size must be a multiple of {} bytes", unit_bytes.max(SECTOR_BYTES)));
        }
        if has_bytes > size_bytes || self.is_block && has_bytes != size_bytes {
            let first = if has_bytes < size_bytes { "let it grow first, then " } else { "" };
            return unsuitable(format!("it has {has_bytes} bytes; {first}ask for the size that it has"));
        }
        if has_bytes < size_bytes {
            self.file.set_len(size_bytes).map_err(|e| refused(&e))?;
        }
        self.file.sync_all().map_err(|e| refused(&e))?;
        self.size_bytes.fetch_max(size_bytes, Ordering::AcqRel);
        Ok(())
    }

    fn alignment(&self) -> Alignment {
        self.alignment
    }

    fn start(&self, queue: &IoQueue, ticket: OpTicket) {
        if self.is_in_memory && inline::fits(&ticket) {
            return inline::carry_out(self.file.as_fd(), ticket);
        }
        queue.submit_on_file(&self.file, ticket);
    }

    fn path(&self) -> &Path {
        self.moved.get().unwrap_or(&self.path)
    }

    fn next_data(&self, from: ByteOffset) -> Option<ByteOffset> {
        // Nothing goes by the position of the descriptor that this moves.
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(from.0)) {
            Ok(at) => Some(ByteOffset(at)),
            Err(rustix::io::Errno::NXIO) => Some(ByteOffset(self.size_bytes())),
            Err(_) => None,
        }
    }

    fn moved(&self, path: &Path) {
        if self.moved.set(path.to_owned()).is_err() {
            log::debug!("{}: it was renamed before", self.path.display());
        }
    }

    fn unsynced(&self) -> Option<&Unsynced> {
        Some(&self.unsynced)
    }

    fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    fn poison(&self) {
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            log::error!("{}: a sync failed; no write to it is accepted any more", self.path().display());
        }
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.file.metadata().ok().filter(|m| m.is_file()).map(|m| m.blocks() * 512)
    }
}

fn wait_for_lock(file: &File, mode: LockMode, path: &Path, wait: Duration) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match lock::lock(file, mode) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && began.elapsed() < wait => {
                std::thread::sleep(LOCK_RETRY);
            }
            done => {
                if began.elapsed() > LOCK_RETRY {
                    log::info!("{}: waited {:.1?} for its lock", path.display(), began.elapsed());
                }
                return done;
            }
        }
    }
}

fn open_with(path: &Path, options: ImageOptions, flags: i32) -> Result<File, ImageError> {
    let open = |flags| OpenOptions::new().read(true).write(!options.read_only).custom_flags(flags).open(path);
    let direct = if options.direct == Direct::On { libc::O_DIRECT } else { 0 };
    // Nobody needs to know when a disk was last read. Only the owner may say so.
    let quiet = open(flags | direct | libc::O_NOATIME);
    let opened = quiet.or_else(|e| if e.raw_os_error() == Some(libc::EPERM) { open(flags | direct) } else { Err(e) });
    opened.map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) if options.direct == Direct::On && open(flags).is_ok() => ImageError::new(
            ImageErrorKind::Unsuitable,
            ImageOp::Open,
            path,
            "its file system has no O_DIRECT; add direct=off to use the page cache",
        ),
        Some(libc::EBUSY) => ImageError::new(
            ImageErrorKind::InUse,
            ImageOp::Open,
            path,
            "the block device is mounted or claimed by another driver; unmount it first",
        ),
        _ => open_error(path, &e),
    })
}

fn open_error(path: &Path, e: &io::Error) -> ImageError {
    ImageError::from_io(ImageOp::Open, path, None, e)
}

fn size_of_container(file: &File, is_block: bool) -> io::Result<u64> {
    if !is_block {
        return Ok(file.metadata()?.len());
    }
    use std::io::{Seek, SeekFrom};
    (&*file).seek(SeekFrom::End(0))
}

/// Takes `O_DIRECT` off.
fn use_page_cache(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags & !rustix::fs::OFlags::DIRECT)?)
}

/// What `O_DIRECT` asks for, from statx (Linux 6.1), else the safe answer.
fn direct_alignment(file: &File) -> io::Result<Alignment> {
    // SAFETY: struct statx is plain integers; all zeros is a valid value.
    let mut stx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a NUL-terminated empty string and `stx` is one struct statx, both alive across the call.
    let rc =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stx) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    if stx.stx_mask & libc::STATX_DIOALIGN != 0 && stx.stx_dio_offset_align > 0 {
        return Ok(Alignment {
            offset_bytes: stx.stx_dio_offset_align.max(512),
            memory_bytes: stx.stx_dio_mem_align.max(1),
        });
    }
    Ok(Alignment { offset_bytes: 4096, memory_bytes: 4096 })
}
