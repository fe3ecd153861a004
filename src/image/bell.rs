//! Counting up an event descriptor that others share, without ever waiting for them.
//!
//! A write to an eventfd waits while its count is full, unless O_NONBLOCK is set, and whoever shares the descriptor can
//! clear that between a look and the write. A ring that has it registered is the way around: the kernel counts it up by
//! itself when an operation of that ring completes, and leaves a count that is full as it is. So the bell is a small ring
//! that does nothing but NOPs (docs/decisions/0050-signals-that-cannot-wait.md).
//!
//! What always holds: the bell keeps the descriptor that is registered, and it is never the number alone that counts.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode};

/// How often a submission that the kernel does not take now is tried again.
const TRIES: usize = 8;

/// A ring that signals. It is used by one thread at a time.
pub struct Bell {
    ring: IoUring,
    registered: Option<Arc<File>>,
}

impl Bell {
    /// A bell that signals nobody yet.
    ///
    /// # Errors
    /// When the kernel refuses a ring.
    pub fn new() -> io::Result<Bell> {
        Ok(Bell { ring: IoUring::new(2)?, registered: None })
    }

    /// Adds one to the count of an eventfd, if there is room. Never waits.
    ///
    /// # Errors
    /// When it is not an eventfd, or the kernel has no memory for it.
    pub fn ring(&mut self, event: &Arc<File>) -> io::Result<()> {
        if !self.registered.as_ref().is_some_and(|registered| Arc::ptr_eq(registered, event)) {
            self.forget()?;
            self.ring.submitter().register_eventfd(event.as_raw_fd())?;
            self.registered = Some(event.clone());
        }
        let entry = opcode::Nop::new().build();
        // SAFETY: the entry names no memory and no descriptor. If there is no room, what waits there signals too.
        drop(unsafe { self.ring.submission().push(&entry) });
        let mut submitted = self.ring.submit();
        for _ in 1..TRIES {
            match &submitted {
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    submitted = self.ring.submit();
                }
                _ => break,
            }
        }
        self.ring.completion().for_each(drop);
        submitted.map(drop)
    }

    /// Lets the descriptor go.
    ///
    /// # Errors
    /// When the kernel refuses, which it does not as far as is known.
    pub fn forget(&mut self) -> io::Result<()> {
        if self.registered.take().is_some() { self.ring.submitter().unregister_eventfd() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn event(flags: rustix::event::EventfdFlags) -> Arc<File> {
        Arc::new(File::from(rustix::event::eventfd(0, flags).unwrap()))
    }

    fn count(event: &Arc<File>) -> u64 {
        let mut bytes = [0; 8];
        (&**event).read_exact(&mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn each_signal_counts_whoever_it_is_for() {
        let mut bell = Bell::new().unwrap();
        let (one, other) = (event(rustix::event::EventfdFlags::NONBLOCK), event(rustix::event::EventfdFlags::empty()));
        for event in [&one, &one, &other, &one] {
            bell.ring(event).unwrap();
        }
        assert_eq!((count(&one), count(&other)), (3, 1));
        bell.forget().unwrap();
        assert_eq!(Arc::strong_count(&one), 1);
    }

    #[test]
    fn a_full_count_holds_nobody_up() {
        let mut bell = Bell::new().unwrap();
        let full = event(rustix::event::EventfdFlags::empty());
        rustix::io::write(&*full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..1000 {
            bell.ring(&full).unwrap();
        }
        assert!(count(&full) >= u64::MAX - 1);
        let pipe = OwnedFd::from(std::io::pipe().unwrap().0);
        assert!(bell.ring(&Arc::new(File::from(pipe))).is_err(), "that is no eventfd");
        bell.ring(&full).unwrap();
        assert_eq!(count(&full), 1);
    }
}
