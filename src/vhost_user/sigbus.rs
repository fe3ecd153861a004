//! Surviving a frontend that shrinks its memory file behind our mapping.
//!
//! Touching a page of a mapping whose file no longer has it raises SIGBUS, which kills the process and with it every
//! other guest. So each guest mapping is registered here, to the end of its last page, and a process-wide handler lays
//! zero pages over a mapping that faults and marks it as poisoned; its session then closes.
//!
//! What always holds:
//! - The handler only reads atomics and makes one mmap call: no lock, no allocation. What it reads of a slot is of one
//!   owner: the slot's turn is looked at before and after.
//! - Whoever touches guest memory keeps its mapping alive meanwhile (a [`crate::image::GuestPin`]), so the registration
//!   of a faulting address cannot be taken back under the handler.
//! - A SIGBUS anywhere else does what it did before: nothing else is papered over.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};

/// Mappings at once, over all disks: more than the limits of sockets allow, unless there are hundreds.
const SLOTS: usize = 32768;

struct Slot {
    // Even when free or being changed, odd while it is registered. Never the same for two owners, but after 2^63 others.
    turn: AtomicUsize,
    is_taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    poisoned: AtomicPtr<AtomicBool>,
}

static REGISTRY: [Slot; SLOTS] = [const {
    Slot {
        turn: AtomicUsize::new(0),
        is_taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        poisoned: AtomicPtr::new(std::ptr::null_mut()),
    }
}; SLOTS];
/// One more than the highest slot ever used, so that the handler need not look at all of them.
static USED: AtomicUsize = AtomicUsize::new(0);

struct Previous(libc::sigaction);
static PREVIOUS: OnceLock<Previous> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// A registered mapping. Drop it before the memory is unmapped.
#[derive(Debug)]
pub(super) struct Guarded {
    slot: usize,
    // Boxed: the handler holds its address.
    poisoned: Box<AtomicBool>,
}

impl Guarded {
    /// Registers the mapping of `len` bytes at `start`, and installs the handler the first time.
    ///
    /// # Errors
    /// When too many mappings are registered, or the handler cannot be installed.
    pub(super) fn new(start: *mut u8, len: usize) -> io::Result<Guarded> {
        (*INSTALLED.get_or_init(install)).map_err(io::Error::from_raw_os_error)?;
        let poisoned = Box::new(AtomicBool::new(false));
        for (index, slot) in REGISTRY.iter().enumerate() {
            if slot.is_taken.load(Ordering::Relaxed) || slot.is_taken.swap(true, Ordering::AcqRel) {
                continue;
            }
            USED.fetch_max(index + 1, Ordering::AcqRel);
            slot.fill(start as usize, start as usize + len, (&raw const *poisoned).cast_mut());
            return Ok(Guarded { slot: index, poisoned });
        }
        Err(io::Error::new(io::ErrorKind::OutOfMemory, "too many guest memory regions are mapped"))
    }

    /// Whether the memory was found missing.
    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let slot = &REGISTRY[self.slot];
        slot.clear();
        slot.is_taken.store(false, Ordering::Release);
    }
}

impl Slot {
    /// Registers a mapping. The caller has taken the slot.
    fn fill(&self, start: usize, end: usize, poisoned: *mut AtomicBool) {
        let turn = self.turn.load(Ordering::Relaxed);
        // Who sees any of these sees that the turn before is over.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.poisoned.store(poisoned, Ordering::Relaxed);
        self.turn.store(turn.wrapping_add(1), Ordering::Release);
    }

    /// Takes the registration back.
    fn clear(&self) {
        self.turn.fetch_add(1, Ordering::AcqRel);
    }

    /// The mapping that is registered, all of it by one owner: where it begins and ends, and what to mark. None if there is
    /// none, or it changes just now. Async-signal-safe.
    fn registered(&self) -> Option<(usize, usize, *mut AtomicBool)> {
        let turn = self.turn.load(Ordering::Acquire);
        if turn.is_multiple_of(2) {
            return None;
        }
        let found = (
            self.start.load(Ordering::Relaxed),
            self.end.load(Ordering::Relaxed),
            self.poisoned.load(Ordering::Relaxed),
        );
        fence(Ordering::Acquire);
        (self.turn.load(Ordering::Relaxed) == turn).then_some(found)
    }
}

fn install() -> Result<(), i32> {
    let mut previous = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: asks for the current action; the kernel fills one struct sigaction.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), previous.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
    }
    // SAFETY: filled by the successful call above.
    let previous = unsafe { previous.assume_init() };
    // Before the handler can run: it needs the previous action.
    drop(PREVIOUS.set(Previous(previous)));
    // SAFETY: struct sigaction is plain integers and a mask; all zeros is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler is a static function of the signature that SA_SIGINFO asks for, and async-signal-safe.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes one siginfo_t that lives for the time of the handler.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Positive codes come from the kernel for a fault; others were sent by a process and have no address.
    if code <= 0 {
        // What was there before counts on the fault to happen again, which this one will not.
        end_by(signal);
    } else if !cover(address) {
        pass_on(signal, info, context);
    }
}

/// Lays zero pages over the registered mapping that `address` lies in. Async-signal-safe.
fn cover(address: usize) -> bool {
    for slot in &REGISTRY[..USED.load(Ordering::Acquire)] {
        let Some((start, end, poisoned)) = slot.registered() else { continue };
        if address < start || address >= end {
            continue;
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: replaces exactly the registered mapping, which its owner keeps until the Guarded is dropped; nothing
        // but guest memory, to which no Rust reference points, lies there. mmap is a bare system call here, and
        // __errno_location is the thread's own.
        unsafe {
            let errno = *libc::__errno_location();
            let rc =
                libc::mmap(start as *mut libc::c_void, end - start, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            *libc::__errno_location() = errno;
            if rc == libc::MAP_FAILED {
                return false;
            }
            (*poisoned).store(true, Ordering::Release);
        }
        return true;
    }
    false
}

/// Does with a SIGBUS that is none of ours what was done before.
fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.get().map(|p| (p.0.sa_sigaction, p.0.sa_flags));
    match previous {
        Some((handler, flags)) if handler != libc::SIG_DFL && handler != libc::SIG_IGN => {
            if flags & libc::SA_SIGINFO != 0 {
                // SAFETY: whoever installed it with SA_SIGINFO gave a function of this signature.
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(handler) };
                handler(signal, info, context);
            } else {
                // SAFETY: whoever installed it without SA_SIGINFO gave a function of this signature.
                let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(handler) };
                handler(signal);
            }
        }
        _ => end_by(signal),
    }
}

/// Has the signal end the process as it would have without us.
fn end_by(signal: i32) {
    // SAFETY: both calls are async-signal-safe. The default action is in place when the handler returns, and only then
    // is the raised signal delivered.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_never_read_as_of_two_owners() {
        static SLOT: Slot = Slot {
            turn: AtomicUsize::new(0),
            is_taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            poisoned: AtomicPtr::new(std::ptr::null_mut()),
        };
        static OVER: AtomicBool = AtomicBool::new(false);
        let owners = std::thread::spawn(|| {
            for start in (0..400_000).map(|i| i * 16) {
                SLOT.fill(start, start + 8, std::ptr::without_provenance_mut(start));
                SLOT.clear();
            }
            OVER.store(true, Ordering::Release);
        });
        let mut seen = 0;
        while !OVER.load(Ordering::Acquire) {
            if let Some((start, end, poisoned)) = SLOT.registered() {
                assert_eq!((end, poisoned.addr()), (start + 8, start));
                seen += 1;
            }
        }
        owners.join().unwrap();
        println!("{seen} owners were seen");
        assert!(SLOT.registered().is_none());
    }
}
