//! Image locks that QEMU, qemu-img and a second halfsilver honour.
//!
//! QEMU keeps one byte of the file for each permission it uses (from byte 100) and one for each it does not
//! share with others (from byte 200), and takes shared open-file-description locks on them; then it looks
//! whether anybody holds the opposite byte. The same here, so that either side sees the other.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What the holder does with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Reads it, and lets others read it, but not write.
    Read,
    /// Writes it alone; others may only read if they tolerate changes.
    Write,
}

const PERMISSION_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

// QEMU's permission bits: consistent-read 0, write 1, write-unchanged 2, resize 3.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;

impl LockMode {
    fn used(self) -> &'static [i64] {
        match self {
            LockMode::Read => &[CONSISTENT_READ],
            LockMode::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn unshared(self) -> &'static [i64] {
        &[WRITE, WRITE_UNCHANGED, RESIZE]
    }
}

/// Locks `file` until it is closed.
///
/// # Errors
/// `EAGAIN` when another open of the file uses it in a way that does not go together.
pub(super) fn lock(file: &File, mode: LockMode) -> io::Result<()> {
    for &bit in mode.used() {
        set_shared(file, PERMISSION_BASE + bit)?;
    }
    for &bit in mode.unshared() {
        set_shared(file, UNSHARED_BASE + bit)?;
    }
    // Both sides lock first and look second, so at least one of two racing openers sees the other.
    let unwelcome = mode.used().iter().map(|bit| UNSHARED_BASE + bit);
    let unshareable = mode.unshared().iter().map(|bit| PERMISSION_BASE + bit);
    for byte in unwelcome.chain(unshareable) {
        if is_held_by_other(file, byte)? {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
    }
    Ok(())
}

fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    // SAFETY: struct flock is plain integers; all zeros is a valid value (and l_pid must be 0 for OFD locks).
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).expect("lock types are tiny");
    lock.l_whence = i16::try_from(libc::SEEK_SET).expect("SEEK_SET is 0");
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn set_shared(file: &File, byte: i64) -> io::Result<()> {
    let lock = byte_lock(libc::F_RDLCK, byte);
    // SAFETY: fcntl reads one struct flock that lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn is_held_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    // SAFETY: fcntl reads and writes one struct flock that lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } == 0 {
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    } else {
        Err(io::Error::last_os_error())
    }
}
