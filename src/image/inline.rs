//! Transfers that the calling thread carries out itself: on files that live in memory.
//!
//! io_uring has no way to try such a file without blocking (tmpfs does not know `IOCB_NOWAIT`), so it hands each transfer
//! to a kernel thread of its own. The copy is cheaper than that hand-over (docs/decisions/0030-files-in-memory.md).
//!
//! What always holds: only bounded transfers are made here, so that a thread is never away for longer than a large
//! request's copy takes. It does not know what the bytes are for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::IoSegment;
use super::queue::{OpKind, OpTicket};

/// Larger transfers go to the ring, where kernel threads copy side by side.
const INLINE_BYTES_MAX: usize = 64 << 10;

/// Whether the file's bytes are in memory, and nowhere else.
pub(super) fn is_in_memory(fd: BorrowedFd<'_>) -> io::Result<bool> {
    const RAMFS_MAGIC: libc::__fsword_t = 0x8584_58f6;
    let kind = rustix::fs::fstatfs(fd)?.f_type;
    Ok(kind == libc::TMPFS_MAGIC || kind == RAMFS_MAGIC)
}

/// Whether this operation is one to be carried out at once.
pub(super) fn fits(ticket: &OpTicket) -> bool {
    match ticket.kind() {
        OpKind::Read | OpKind::Write { .. } => ticket.len() <= INLINE_BYTES_MAX,
        OpKind::Sync => true,
        OpKind::Zero { .. } | OpKind::Event | OpKind::Timeout => false,
    }
}

/// Carries the operation out and finishes it.
pub(super) fn carry_out(fd: BorrowedFd<'_>, ticket: OpTicket) {
    let at = i64::try_from(ticket.at().0);
    let (kind, fd) = (ticket.kind(), fd.as_raw_fd());
    let result = match (kind, at) {
        (_, Err(_)) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        (OpKind::Sync, _) => {
            // SAFETY: no memory is involved, and the descriptor is open while it is borrowed.
            moved(unsafe { libc::fdatasync(fd) } as isize)
        }
        (_, Ok(at)) => ticket.with_segments(|segments| transfer(fd, kind, at, segments)),
    };
    ticket.finish(result);
}

fn transfer(fd: i32, kind: OpKind, at: i64, segments: &[IoSegment]) -> io::Result<usize> {
    let is_durable = kind == (OpKind::Write { durable: true });
    if let [one] = segments
        && !is_durable
    {
        // SAFETY: the segment's memory is kept by the operation's buffer in its slot, which the ticket holds until it is
        // finished; guest memory is only ever touched by the kernel here.
        return moved(unsafe {
            match kind {
                OpKind::Read => libc::pread64(fd, one.address.cast(), one.len, at),
                _ => libc::pwrite64(fd, one.address.cast(), one.len, at),
            }
        });
    }
    let count = i32::try_from(segments.len()).expect("segments are bounded");
    let iov = segments.as_ptr().cast::<libc::iovec>();
    let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
    // SAFETY: as above, and IoSegment has the layout of struct iovec.
    moved(unsafe {
        match kind {
            OpKind::Read => libc::preadv2(fd, iov, count, at, 0),
            _ => libc::pwritev2(fd, iov, count, at, flags),
        }
    })
}

fn moved(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
