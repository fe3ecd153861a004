//! Buffers of transfers: our own aligned memory, and guest memory used in place.
//!
//! Guest memory can change under us at any time, so nothing here ever makes a `&[u8]` of it: it is handed
//! to the kernel, or copied once with raw pointers into memory of our own.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// The alignment of [`AlignedBuf`]: a page, which satisfies every `O_DIRECT` device seen so far.
pub const PAGE_BYTES: u32 = 4096;

/// What a thread keeps of the memory that it is done with, in bytes and in pieces.
const KEPT_BYTES_MAX: usize = 512 << 10;
const KEPT_MAX: usize = 64;

/// Memory that was in use before, to be used again by this thread.
#[derive(Default)]
struct Kept {
    buffers: Vec<AlignedBuf>,
    bytes: usize,
}

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::default();
}

/// Page-aligned memory of our own, always initialised.
pub struct AlignedBuf {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: AlignedBuf owns its allocation exclusively, like a Box<[u8]>.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only gives `&[u8]`, like a Box<[u8]>.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// Zeroed memory of `len` bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> AlignedBuf {
        let layout = Self::layout(len);
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(raw) else { handle_alloc_error(layout) };
        AlignedBuf { base, len }
    }

    /// Memory of `len` bytes with any content, for a transfer that fills it. Copies of blocks come and go too often to be
    /// zeroed each time.
    #[must_use]
    pub fn scratch(len: usize) -> AlignedBuf {
        let again = KEPT.with_borrow_mut(|kept| {
            let index = kept.buffers.iter().rposition(|b| b.len == len)?;
            kept.bytes -= len;
            Some(kept.buffers.swap_remove(index))
        });
        again.unwrap_or_else(|| AlignedBuf::zeroed(len))
    }

    /// Leaves the memory to the next [`AlignedBuf::scratch`] of this thread.
    pub fn recycle(self) {
        KEPT.with_borrow_mut(|kept| {
            if kept.buffers.len() < KEPT_MAX && kept.bytes + self.len <= KEPT_BYTES_MAX {
                kept.bytes += self.len;
                kept.buffers.push(self);
            }
        });
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), PAGE_BYTES as usize).expect("a buffer is far smaller than isize::MAX")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: `base` came from alloc_zeroed with this layout and is freed only here.
        unsafe { dealloc(self.base.as_ptr(), Self::layout(self.len)) }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `base` is valid for `len` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in deref, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// One piece of guest memory as the kernel takes it (`struct iovec`): a host address and a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct IoSegment {
    /// Host address.
    pub address: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

// The kernel reads arrays of IoSegment as struct iovec.
const _: () = assert!(size_of::<IoSegment>() == size_of::<libc::iovec>());

/// Whatever keeps a guest's memory mapped. Dropping the last one may unmap it.
pub type GuestPin = Arc<dyn Send + Sync>;

/// Guest memory, used in place. Keeps the mapping alive for as long as it exists.
#[derive(Clone)]
pub struct GuestBuf {
    segments: Segments,
    len: usize,
    pin: GuestPin,
    /// Whether it is memory of our own.
    is_owned: bool,
}

#[derive(Clone)]
enum Segments {
    One(IoSegment),
    // On the heap, so that its address is stable while the kernel has yet to read it.
    Many(Box<[IoSegment]>),
}

// SAFETY: the segments are addresses that only the kernel and raw copies use, valid while `pin` lives.
unsafe impl Send for GuestBuf {}
// SAFETY: as for Send; no method gives out a reference into the memory.
unsafe impl Sync for GuestBuf {}

impl GuestBuf {
    /// Guest memory made of `segments` in order.
    ///
    /// # Safety
    /// Every segment must be mapped readable and writable for as long as `pin` (or a clone of it) lives,
    /// and must lie outside any memory that Rust references point to.
    #[must_use]
    pub unsafe fn new(segments: &[IoSegment], pin: GuestPin) -> GuestBuf {
        let len = segments.iter().map(|s| s.len).sum();
        let segments = match segments {
            [one] => Segments::One(*one),
            many => Segments::Many(many.into()),
        };
        GuestBuf { segments, len, pin, is_owned: false }
    }

    /// A buffer over `memory`: of a copy that is used as the guest's would be.
    #[must_use]
    pub fn from_owned(memory: AlignedBuf) -> (GuestBuf, Arc<OwnedGuest>) {
        let owned = Arc::new(OwnedGuest { memory });
        let segment = IoSegment { address: owned.memory.base.as_ptr(), len: owned.memory.len };
        // SAFETY: the memory lives as long as the pin, and OwnedGuest gives out copies only.
        let buf = unsafe { GuestBuf::new(&[segment], owned.clone()) };
        (GuestBuf { is_owned: true, ..buf }, owned)
    }

    /// Whether it is memory of our own: whoever made it has counted it.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        self.is_owned
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, in order.
    #[must_use]
    pub fn segments(&self) -> &[IoSegment] {
        match &self.segments {
            Segments::One(s) => std::slice::from_ref(s),
            Segments::Many(s) => s,
        }
    }

    /// Whether every piece starts at a multiple of `memory_bytes` and has a length of a multiple of `length_bytes`.
    #[must_use]
    pub fn is_aligned(&self, memory_bytes: u32, length_bytes: u32) -> bool {
        self.segments().iter().all(|s| {
            (s.address as usize).is_multiple_of(memory_bytes as usize) && s.len.is_multiple_of(length_bytes as usize)
        })
    }

    /// The part of this buffer in `range`.
    ///
    /// # Panics
    /// When the range leaves the buffer.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> GuestBuf {
        assert!(range.start <= range.end && range.end <= self.len, "slice {range:?} of {} bytes", self.len);
        if range == (0..self.len) {
            return self.clone();
        }
        let mut out = Vec::new();
        let mut at = 0;
        for s in self.segments() {
            let (from, to) = (range.start.max(at), range.end.min(at + s.len));
            if from < to {
                out.push(IoSegment { address: s.address.wrapping_add(from - at), len: to - from });
            }
            at += s.len;
        }
        // SAFETY: sub-ranges of segments that this buffer's pin already keeps mapped.
        let part = unsafe { GuestBuf::new(&out, self.pin.clone()) };
        GuestBuf { is_owned: self.is_owned, ..part }
    }

    /// Copies the guest's bytes out, once. What the guest changes afterwards is not seen.
    #[must_use]
    pub fn copy_out(&self) -> AlignedBuf {
        let mut out = AlignedBuf::scratch(self.len);
        let mut at = 0;
        for s in self.segments() {
            // SAFETY: the segment is mapped while `pin` lives; `out` has room for the sum of the lengths and is
            // memory of our own, so the two do not overlap. The guest may race; any bytes it leaves are valid u8.
            unsafe { std::ptr::copy_nonoverlapping(s.address, out.as_mut_ptr().add(at), s.len) };
            at += s.len;
        }
        out
    }

    /// Copies `bytes` into the start of the guest's memory.
    ///
    /// # Panics
    /// When there are more bytes than room.
    pub fn copy_in(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len, "{} bytes into {}", bytes.len(), self.len);
        let mut rest = bytes;
        for s in self.segments() {
            let n = s.len.min(rest.len());
            // SAFETY: as in copy_out, with the roles exchanged.
            unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), s.address, n) };
            rest = &rest[n..];
        }
    }
}

impl std::fmt::Debug for GuestBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuestBuf({} bytes in {} segments)", self.len, self.segments().len())
    }
}

/// Memory that plays the guest (see [`GuestBuf::from_owned`]).
pub struct OwnedGuest {
    memory: AlignedBuf,
}

impl OwnedGuest {
    /// A copy of the bytes. Call it when no operation on the buffer is in flight.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.memory.len];
        // SAFETY: the allocation lives as long as self; `out` is a different one of the same length.
        unsafe { std::ptr::copy_nonoverlapping(self.memory.base.as_ptr(), out.as_mut_ptr(), out.len()) };
        out
    }
}

/// The buffer of one operation, owned by the queue while the operation is in flight.
#[derive(Debug)]
pub enum IoBuf {
    /// No bytes move (sync, zero, discard).
    None,
    /// Our own memory, whole.
    Owned(AlignedBuf),
    /// A part of our own memory that other operations use too; only written from, never read into.
    Shared(Arc<AlignedBuf>, Range<usize>),
    /// Guest memory in place.
    Guest(GuestBuf),
}

impl IoBuf {
    /// How many bytes the operation moves.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            IoBuf::None => 0,
            IoBuf::Owned(b) => b.len(),
            IoBuf::Shared(_, r) => r.len(),
            IoBuf::Guest(g) => g.len(),
        }
    }

    /// Whether no bytes move.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The part of the buffer from byte `from` on, to continue a transfer that stopped there.
    pub(super) fn rest_segments(&mut self, from: usize) -> Vec<IoSegment> {
        match self {
            IoBuf::None => Vec::new(),
            IoBuf::Owned(b) => {
                let len = b.len();
                vec![IoSegment { address: b.as_mut_ptr().wrapping_add(from), len: len - from }]
            }
            IoBuf::Shared(b, r) => {
                vec![IoSegment { address: b.as_ptr().cast_mut().wrapping_add(r.start + from), len: r.len() - from }]
            }
            IoBuf::Guest(g) => {
                let mut skip = from;
                let mut out = Vec::new();
                for s in g.segments() {
                    let n = skip.min(s.len);
                    skip -= n;
                    if n < s.len {
                        out.push(IoSegment { address: s.address.wrapping_add(n), len: s.len - n });
                    }
                }
                out
            }
        }
    }

    /// One address and length, when the bytes are in one piece.
    pub(super) fn single(&mut self) -> Option<(*mut u8, usize)> {
        match self {
            IoBuf::None => None,
            IoBuf::Owned(b) => Some((b.as_mut_ptr(), b.len())),
            IoBuf::Shared(b, r) => Some((b.as_ptr().cast_mut().wrapping_add(r.start), r.len())),
            IoBuf::Guest(g) => match g.segments() {
                [s] => Some((s.address, s.len)),
                _ => None,
            },
        }
    }

    /// The iovec array, when the bytes are in several pieces.
    pub(super) fn vectored(&self) -> Option<(*const libc::iovec, u32)> {
        match self {
            IoBuf::Guest(g) => match &g.segments {
                Segments::Many(s) => Some((s.as_ptr().cast(), u32::try_from(s.len()).expect("segments are bounded"))),
                Segments::One(_) => None,
            },
            _ => None,
        }
    }
}
