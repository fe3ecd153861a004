//! Where the images are: a folder on the device that is measured, which goes away with everything in it.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::random::Rng;
use crate::{Result, stop};

/// The device that a case is measured on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub(crate) enum Device {
    /// /dev/shm: what the software costs.
    Shm,
    /// The real disk, with `O_DIRECT`.
    Disk,
}

impl Device {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Device::Shm => "shm",
            Device::Disk => "disk",
        }
    }
}

/// Folders for images and for sockets; both are removed when this is dropped.
pub(crate) struct Place {
    pub(crate) device: Device,
    images: TempDir,
    /// On a tmpfs, as `/run` is.
    run: TempDir,
}

impl Place {
    /// Makes the folders.
    ///
    /// # Errors
    /// When there is less room than `bytes_needed`.
    pub(crate) fn new(device: Device, dir: &Path, bytes_needed: u64) -> Result<Place> {
        let at = match device {
            Device::Shm => Path::new("/dev/shm"),
            Device::Disk => dir,
        };
        std::fs::create_dir_all(at).map_err(|e| format!("{}: {e}", at.display()))?;
        let free = rustix::fs::statvfs(at).map(|s| s.f_bavail * s.f_frsize)?;
        if free < bytes_needed {
            let mib = |bytes: u64| bytes >> 20;
            let at = at.display();
            return Err(format!("{at} has {} MiB free, {} MiB are needed", mib(free), mib(bytes_needed)).into());
        }
        let temp = |at: &Path| tempfile::Builder::new().prefix("hs-bench-").tempdir_in(at);
        let images = temp(at).map_err(|e| format!("{}: {e}", at.display()))?;
        let run = temp(Path::new("/dev/shm")).map_err(|e| format!("/dev/shm: {e}"))?;
        Ok(Place { device, images, run })
    }

    /// A file on the device.
    pub(crate) fn image(&self, name: &str) -> PathBuf {
        self.images.path().join(name)
    }

    /// A socket, log or other small file.
    pub(crate) fn run(&self, name: &str) -> PathBuf {
        self.run.path().join(name)
    }

    /// Makes an image of random bytes: nothing in it is a hole, and nothing can be compressed.
    pub(crate) fn prefilled(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.image(name);
        eprintln!("  filling {} ({} MiB)", path.display(), bytes >> 20);
        let mut options = File::options();
        let mut file = options.write(true).create_new(true).custom_flags(libc::O_CLOEXEC).open(&path)?;
        let mut rng = Rng::new(bytes);
        let mut chunk = vec![0; 4 << 20];
        let mut left = bytes;
        while left > 0 {
            stop::check()?;
            rng.fill(&mut chunk);
            let part = left.min(chunk.len() as u64);
            file.write_all(&chunk[..part as usize]).map_err(|e| format!("{}: {e}", path.display()))?;
            left -= part;
        }
        file.sync_all()?;
        // What is cached would be thrown out piece by piece while O_DIRECT requests are measured.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(path)
    }

    /// Makes an image that is one hole.
    pub(crate) fn sparse(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.image(name);
        File::create(&path)?.set_len(bytes).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(path)
    }
}
