//! Memory of a frontend's, mapped: what kind of file it is, how much of it the kernel really maps, and its end.
//!
//! What always holds:
//! - Only regular files are mapped, memory files among them: what else can be mapped has its own idea of a fault.
//! - A mapping ends where the kernel ends it, at a multiple of the file's pages, which may be of 2 MiB or 1 GiB. All of it
//!   is guarded, counted and unmapped; nothing but what was asked for is given out.
//! - The descriptor is not kept: the mapping keeps the file.
//!
//! Nothing here gives out a reference into the memory, only its address.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags};

use super::limits::{Limits, Mapped};
use super::sigbus::Guarded;

/// The smallest page there is. Where the machine has larger ones the kernel rounds further, also what is unmapped.
const PAGE_BYTES: u64 = 4096;

/// A mapping. It is unmapped when this is dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    // Goes first: the registration must go before the memory does.
    guard: Guarded,
    memory: Memory,
    // Last: it counts until it is unmapped.
    _mapped: Mapped,
}

#[derive(Debug)]
struct Memory {
    address: *mut u8,
    /// As the kernel rounds it.
    len: usize,
}

// SAFETY: the address is only that; who follows it answers for the access. Mapping and unmapping are of no thread.
unsafe impl Send for Memory {}
// SAFETY: as for Send; nothing changes before the drop.
unsafe impl Sync for Memory {}

/// Why something cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub(super) enum MapError {
    #[error("it is neither a memory file nor another regular file")]
    Kind,
    #[error("its file is on FUSE, where a server that falls silent holds up whoever touches the memory")]
    Fuse,
    #[error("its file has only {0} bytes")]
    Short(u64),
    #[error("its offset is not a multiple of its file's pages of {0} bytes")]
    Misaligned(u64),
    #[error("its file cannot be written through its descriptor, or is sealed against that")]
    ReadOnly,
    #[error("more memory, or in more pieces, than the frontends of a disk may share with it")]
    TooMuch,
    #[error("{0}")]
    System(#[from] io::Error),
}

impl Mapping {
    /// Maps `len` bytes of a file that a frontend sent.
    ///
    /// # Errors
    /// When it is not memory, is not all there, or is more than the socket's frontends may have.
    pub(super) fn new(file: &File, offset: u64, len: u64, limits: &Arc<Limits>) -> Result<Mapping, MapError> {
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(MapError::Kind);
        }
        // A mapping behind the end of a file is allowed, and every touch of it a SIGBUS.
        if offset.checked_add(len).is_none_or(|end| meta.len() < end) {
            return Err(MapError::Short(meta.len()));
        }
        let page_bytes = page_bytes(&rustix::fs::fstatfs(file).map_err(io::Error::from)?)?;
        if !offset.is_multiple_of(page_bytes) {
            return Err(MapError::Misaligned(page_bytes));
        }
        let rounded =
            len.checked_next_multiple_of(page_bytes).filter(|rounded| *rounded > 0).ok_or(MapError::TooMuch)?;
        let mapped = limits.map(rounded).ok_or(MapError::TooMuch)?;
        let memory = Memory::map(file, offset, usize::try_from(rounded).map_err(|_| MapError::TooMuch)?)?;
        let guard = Guarded::new(memory.address, memory.len)?;
        Ok(Mapping { guard, memory, _mapped: mapped })
    }

    /// Where it begins, at a multiple of a page.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.memory.address
    }

    /// Whether the memory was found missing (see [`super::sigbus`]).
    pub(super) fn is_poisoned(&self) -> bool {
        self.guard.is_poisoned()
    }
}

impl Memory {
    fn map(file: &File, offset: u64, len: usize) -> Result<Memory, MapError> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping at a place that the kernel chooses, where nothing else is.
        let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, file, offset) };
        match address {
            Ok(address) => Ok(Memory { address: address.cast(), len }),
            Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => Err(MapError::ReadOnly),
            Err(e) => Err(MapError::System(e.into())),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly what map() was given, rounded as the kernel does, and nobody has its address any more.
        if let Err(e) = unsafe { rustix::mm::munmap(self.address.cast(), self.len) } {
            log::error!("{} bytes of a frontend's memory cannot be unmapped: {e}", self.len);
        }
    }
}

/// The size of the pages that a file on such a file system is mapped in.
///
/// # Errors
/// When touching a page may take for ever: a thread that hangs in a fault, or in an unmapping, has what all other threads of the
/// process need for theirs.
fn page_bytes(system: &rustix::fs::StatFs) -> Result<u64, MapError> {
    const HUGETLBFS_MAGIC: libc::__fsword_t = 0x9584_58f6;
    const FUSE_MAGIC: libc::__fsword_t = 0x6573_5546;
    if system.f_type == FUSE_MAGIC {
        return Err(MapError::Fuse);
    }
    if system.f_type != HUGETLBFS_MAGIC {
        return Ok(PAGE_BYTES);
    }
    let sized = u64::try_from(system.f_bsize).ok().filter(|bytes| bytes.is_power_of_two() && *bytes >= PAGE_BYTES);
    Ok(sized.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the pages of its file system have no size"))?)
}
