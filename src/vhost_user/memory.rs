//! The guest's memory: regions that the frontend shares, and addresses in them.
//!
//! What always holds:
//! - A [`MemoryMap`] never changes. A frontend that adds or removes a region gets a new one; requests that are running
//!   keep the old one, and with it the mappings, until they are done.
//! - No two regions overlap, neither in guest-physical nor in frontend addresses, and no region wraps around.
//! - Nothing here gives out a reference into guest memory: only addresses for the kernel, and copies.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::features::MEMORY_SLOTS_MAX;
use super::limits::{Limits, frontend_bytes_max};
use super::mapping::{MapError, Mapping};
use crate::image::IoSegment;

/// Pieces of host memory; most requests have one.
pub(super) type Segments = smallvec::SmallVec<[IoSegment; 4]>;

/// An address in the guest's physical memory, as descriptors have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct GuestAddress(pub(super) u64);

/// An address in the frontend's own memory, as ring addresses have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FrontendAddress(pub(super) u64);

/// What a frontend says of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionSpec {
    pub(super) guest: GuestAddress,
    pub(super) frontend: FrontendAddress,
    pub(super) size_bytes: u64,
    pub(super) file_offset: u64,
}

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("a memory region has no bytes, wraps around or is larger than this machine's addresses")]
    Size,
    #[error("memory regions overlap at guest address {0:#x}")]
    Overlap(u64),
    #[error("more than {MEMORY_SLOTS_MAX} memory regions")]
    TooMany,
    #[error("no memory region at guest address {0:#x} with that size and frontend address")]
    Unknown(u64),
    #[error("more memory than this machine could have")]
    TooMuch,
    #[error("cannot map a memory region: {0}")]
    Map(#[from] MapError),
}

impl From<MemoryError> for io::Error {
    fn from(e: MemoryError) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidInput, e)
    }
}

/// A mapped region. The memory is unmapped when the last map that has it is gone.
#[derive(Debug)]
struct Region {
    spec: RegionSpec,
    mapping: Mapping,
}

impl Region {
    fn map(spec: RegionSpec, file: &File, limits: &Arc<Limits>) -> Result<Region, MemoryError> {
        let ends = [spec.guest.0, spec.frontend.0, spec.file_offset].map(|from| from.checked_add(spec.size_bytes));
        if spec.size_bytes == 0 || spec.size_bytes > isize::MAX.unsigned_abs() as u64 || ends.contains(&None) {
            return Err(MemoryError::Size);
        }
        let mapping = Mapping::new(file, spec.file_offset, spec.size_bytes, limits)?;
        Ok(Region { spec, mapping })
    }

    fn guest_end(&self) -> u64 {
        self.spec.guest.0 + self.spec.size_bytes
    }

    fn overlaps(&self, other: &RegionSpec) -> bool {
        let meet = |a: u64, b: u64| a < b + other.size_bytes && b < a + self.spec.size_bytes;
        meet(self.spec.guest.0, other.guest.0) || meet(self.spec.frontend.0, other.frontend.0)
    }
}

/// All of a frontend's memory at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct MemoryMap {
    // Sorted by guest address.
    regions: Vec<Arc<Region>>,
}

impl MemoryMap {
    /// Maps a whole table.
    ///
    /// # Errors
    /// When any region is refused; then nothing stays mapped.
    pub(super) fn from_table(table: Vec<(RegionSpec, File)>, limits: &Arc<Limits>) -> Result<MemoryMap, MemoryError> {
        let mut map = MemoryMap::default();
        for (spec, file) in table {
            map = map.with(spec, &file, limits)?;
        }
        Ok(map)
    }

    /// This map and one region more.
    ///
    /// # Errors
    /// When the region is not one, overlaps another or cannot be mapped.
    pub(super) fn with(&self, spec: RegionSpec, file: &File, limits: &Arc<Limits>) -> Result<MemoryMap, MemoryError> {
        if self.regions.len() >= MEMORY_SLOTS_MAX {
            return Err(MemoryError::TooMany);
        }
        let total = self.regions.iter().map(|r| r.spec.size_bytes).fold(spec.size_bytes, u64::saturating_add);
        if total > frontend_bytes_max() {
            return Err(MemoryError::TooMuch);
        }
        let region = Region::map(spec, file, limits)?;
        if self.regions.iter().any(|r| r.overlaps(&spec)) {
            return Err(MemoryError::Overlap(spec.guest.0));
        }
        let at = self.regions.partition_point(|r| r.spec.guest < spec.guest);
        let mut regions = self.regions.clone();
        regions.insert(at, Arc::new(region));
        Ok(MemoryMap { regions })
    }

    /// This map without a region, which must be named exactly.
    ///
    /// # Errors
    /// When there is no such region.
    pub(super) fn without(
        &self,
        guest: GuestAddress,
        size: u64,
        at: FrontendAddress,
    ) -> Result<MemoryMap, MemoryError> {
        let is_it = |r: &Arc<Region>| r.spec.guest == guest && r.spec.size_bytes == size && r.spec.frontend == at;
        let mut regions = self.regions.clone();
        let index = regions.iter().position(is_it).ok_or(MemoryError::Unknown(guest.0))?;
        regions.remove(index);
        Ok(MemoryMap { regions })
    }

    /// How many regions there are.
    pub(super) fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Whether a region's memory was found missing (see [`super::sigbus`]).
    pub(super) fn is_poisoned(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.is_poisoned())
    }

    /// Adds the host memory of `len` bytes at a guest address to `out`. Regions that touch are one memory. False when
    /// a byte lies outside; `out` may then hold a part.
    pub(super) fn translate(&self, at: GuestAddress, len: u64, out: &mut Segments) -> bool {
        let Some(end) = at.0.checked_add(len) else { return false };
        let mut from = at.0;
        let mut index = self.regions.partition_point(|r| r.guest_end() <= from);
        while from < end {
            let Some(region) = self.regions.get(index).filter(|r| r.spec.guest.0 <= from) else { return false };
            let to = end.min(region.guest_end());
            let (Ok(offset), Ok(piece)) = (usize::try_from(from - region.spec.guest.0), usize::try_from(to - from))
            else {
                return false;
            };
            out.push(IoSegment { address: region.mapping.as_ptr().wrapping_add(offset), len: piece });
            from = to;
            index += 1;
        }
        true
    }

    /// The host address of `len` bytes at a frontend address, all in one region, if there is such.
    pub(super) fn frontend_range(&self, at: FrontendAddress, len: u64) -> Option<*mut u8> {
        let end = at.0.checked_add(len)?;
        let inside = |r: &&Arc<Region>| r.spec.frontend <= at && end <= r.spec.frontend.0 + r.spec.size_bytes;
        let region = self.regions.iter().find(inside)?;
        let offset = usize::try_from(at.0 - region.spec.frontend.0).ok()?;
        Some(region.mapping.as_ptr().wrapping_add(offset))
    }

    /// The host address of `len` bytes at a guest address, if one region has them all: the common case.
    fn in_one_region(&self, at: GuestAddress, len: usize) -> Option<*mut u8> {
        let region = self.regions.get(self.regions.partition_point(|r| r.guest_end() <= at.0))?;
        let offset = at.0.checked_sub(region.spec.guest.0)?;
        let fits = len as u64 <= region.spec.size_bytes - offset;
        let offset = usize::try_from(offset).ok()?;
        fits.then(|| region.mapping.as_ptr().wrapping_add(offset))
    }

    /// Copies `into.len()` bytes out of the guest's memory, once. False when a byte lies outside.
    pub(super) fn copy_out(&self, at: GuestAddress, into: &mut [u8]) -> bool {
        if let Some(from) = self.in_one_region(at, into.len()) {
            // SAFETY: memory of a mapping that `self` keeps alive, `into.len()` bytes of it; `into` is ours and does not
            // overlap it. The guest may race; any bytes are valid u8.
            unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
            return true;
        }
        let mut segments = Segments::new();
        if !self.translate(at, into.len() as u64, &mut segments) {
            return false;
        }
        let mut done = 0;
        for s in segments {
            // SAFETY: translate gave memory of a mapping that `self` keeps alive, and the lengths add up to that of
            // `into`, which is ours and does not overlap it. The guest may race; any bytes are valid u8.
            unsafe { std::ptr::copy_nonoverlapping(s.address, into.as_mut_ptr().add(done), s.len) };
            done += s.len;
        }
        true
    }

    /// Copies `bytes` into the guest's memory. False when a byte lies outside; nothing is written then.
    pub(super) fn copy_in(&self, at: GuestAddress, bytes: &[u8]) -> bool {
        if let Some(to) = self.in_one_region(at, bytes.len()) {
            // SAFETY: as in copy_out, with the roles exchanged.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
            return true;
        }
        let mut segments = Segments::new();
        if !self.translate(at, bytes.len() as u64, &mut segments) {
            return false;
        }
        let mut done = 0;
        for s in segments {
            // SAFETY: as in copy_out, with the roles exchanged.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(done), s.address, s.len) };
            done += s.len;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(len: u64) -> File {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        file
    }

    fn spec(guest: u64, frontend: u64, size_bytes: u64, file_offset: u64) -> RegionSpec {
        RegionSpec { guest: GuestAddress(guest), frontend: FrontendAddress(frontend), size_bytes, file_offset }
    }

    #[test]
    fn regions_are_validated() {
        let limits = Limits::new();
        let base = MemoryMap::default().with(spec(0x10000, 0x7000_0000, 0x4000, 0), &memfd(0x4000), &limits).unwrap();
        let rows = [
            ("empty", spec(0, 0, 0, 0)),
            ("guest wraps", spec(u64::MAX - 0xfff, 0, 0x2000, 0)),
            ("frontend wraps", spec(0, u64::MAX - 0xfff, 0x2000, 0)),
            ("offset wraps", spec(0, 0, 0x2000, u64::MAX - 0xfff)),
            ("offset misaligned", spec(0, 0, 0x1000, 8)),
            ("longer than the file", spec(0, 0, 0x5000, 0)),
            ("overlap in the guest", spec(0x13000, 0, 0x2000, 0)),
            ("overlap in the frontend", spec(0, 0x6fff_f000, 0x2000, 0)),
            ("the same again", spec(0x10000, 0x7000_0000, 0x4000, 0)),
        ];
        for (name, spec) in rows {
            assert!(base.with(spec, &memfd(0x4000), &limits).is_err(), "{name}");
        }
        assert!(base.without(GuestAddress(0x10000), 0x4000, FrontendAddress(0x7000_1000)).is_err());
        assert!(base.without(GuestAddress(0x10000), 0x4000, FrontendAddress(0x7000_0000)).is_ok());
    }

    #[test]
    fn only_memory_that_can_be_written_is_mapped() {
        use rustix::fs::{Mode, OFlags, SealFlags};
        let limits = Limits::new();
        let refused = |file: File| {
            let error = MemoryMap::default().with(spec(0, 0, 0x1000, 0), &file, &limits).unwrap_err();
            error.to_string()
        };
        let open = |path: &str, flags| File::from(rustix::fs::open(path, flags, Mode::empty()).unwrap());
        for path in ["/dev/zero", "/dev/null"] {
            assert!(refused(open(path, OFlags::RDWR)).contains("regular file"), "{path}");
        }
        assert!(refused(open("/", OFlags::RDONLY)).contains("regular file"));
        assert!(refused(open("/proc/self/exe", OFlags::RDONLY)).contains("written"));
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
        for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
            let sealed = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
            sealed.set_len(0x1000).unwrap();
            rustix::fs::fcntl_add_seals(&sealed, seal).unwrap();
            assert!(refused(sealed).contains("sealed"), "{seal:?}");
        }
        assert!(refused(memfd(0)).contains("only 0 bytes"));
        let all = MemoryMap::default().with(spec(0, 0, 1, 0), &memfd(1), &limits).unwrap();
        assert!(
            all.copy_in(GuestAddress(0), &[1]) && !all.copy_in(GuestAddress(0), &[1, 2]),
            "what was asked for counts"
        );
        assert!(!all.copy_out(GuestAddress(1), &mut [0]));
    }

    #[test]
    fn addresses_cross_regions_that_touch_and_no_gap() {
        let limits = Limits::new();
        let table = [spec(0x2000, 0x9000, 0x1000, 0), spec(0x1000, 0x5000, 0x1000, 0), spec(0x4000, 0x1000, 0x1000, 0)];
        let map = MemoryMap::from_table(table.map(|spec| (spec, memfd(0x1000))).into(), &limits).unwrap();
        let mut out = Segments::new();
        assert!(map.translate(GuestAddress(0x1f00), 0x200, &mut out));
        assert_eq!(out.iter().map(|s| s.len).collect::<Vec<_>>(), [0x100, 0x100]);
        for (at, len, ok) in
            [(0xfff, 1, false), (0x1000, 0x2000, true), (0x2fff, 2, false), (0x4fff, 2, false), (u64::MAX, 2, false)]
        {
            assert_eq!(map.translate(GuestAddress(at), len, &mut Segments::new()), ok, "{at:#x}+{len}");
        }
        assert!(map.copy_in(GuestAddress(0x1ffe), b"abcd"));
        let mut back = [0; 4];
        assert!(map.copy_out(GuestAddress(0x1ffe), &mut back));
        assert_eq!(&back, b"abcd");
        assert!(map.frontend_range(FrontendAddress(0x5800), 0x800).is_some());
        assert!(map.frontend_range(FrontendAddress(0x5800), 0x801).is_none());
    }
}
