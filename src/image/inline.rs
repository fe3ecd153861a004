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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{AlignedBuf, ByteOffset, Direct, Executor, FileImage, GuestBuf, Image, ImageOptions, IoBuf};
    use crate::image::{IoQueue, RingOptions, read_exact_at, sync, write_all_at};
    use std::time::Duration;

    fn options() -> ImageOptions {
        ImageOptions { direct: Direct::On, read_only: false, lock_wait: Duration::ZERO }
    }

    fn run(image: &std::sync::Arc<FileImage>, work: impl AsyncFnOnce(&FileImage, &IoQueue) + 'static) {
        let executor = Executor::new(RingOptions { entries: 8 }).unwrap();
        let (queue, image) = (executor.queue().clone(), image.clone());
        executor.block_on(async move { work(&image, &queue).await }).unwrap();
    }

    fn bytes(fill: impl Fn(usize) -> u8, len: usize) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed(len);
        buf.iter_mut().enumerate().for_each(|(i, b)| *b = fill(i));
        buf
    }

    #[test]
    fn what_lies_in_memory_is_known() {
        let (memory, disk) = (tempfile::tempfile_in("/dev/shm").unwrap(), tempfile::tempfile_in(".").unwrap());
        use std::os::fd::AsFd;
        assert!(is_in_memory(memory.as_fd()).unwrap());
        assert!(!is_in_memory(disk.as_fd()).unwrap());
    }

    #[test]
    fn transfers_do_what_they_say_on_either_side_of_the_limit() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("image");
        let image = std::sync::Arc::new(FileImage::create(&path, 1 << 20, Direct::On).unwrap());
        for (at, len, durable) in
            [(0, 4096, false), (8192, INLINE_BYTES_MAX, true), (4096, INLINE_BYTES_MAX * 2, false)]
        {
            run(&image, async move |image, queue| {
                let pattern = |i: usize| u8::try_from((i + len) % 251).unwrap();
                let at = ByteOffset(at);
                write_all_at(image, queue, at, IoBuf::Owned(bytes(pattern, len)), durable).await.unwrap();
                sync(image, queue).await.unwrap();
                let into = IoBuf::Owned(AlignedBuf::zeroed(len));
                let IoBuf::Owned(back) = read_exact_at(image, queue, at, into).await.unwrap() else { unreachable!() };
                assert!(back[..] == bytes(pattern, len)[..], "{len} bytes at {at}");
            });
        }
    }

    #[test]
    fn several_pieces_of_guest_memory_are_one_transfer() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("image");
        let image = std::sync::Arc::new(FileImage::create(&path, 64 << 10, Direct::On).unwrap());
        let (guest, memory) = GuestBuf::from_owned(bytes(|i| u8::try_from(i / 4096).unwrap(), 16 << 10));
        let piece = |from: usize| guest.segments()[0].address.wrapping_add(from);
        let pieces = [IoSegment { address: piece(8192), len: 4096 }, IoSegment { address: piece(0), len: 4096 }];
        // SAFETY: both pieces lie in the memory that the pin keeps.
        let scattered = unsafe { GuestBuf::new(&pieces, memory) };
        run(&image, async move |image, queue| {
            write_all_at(image, queue, ByteOffset(4096), IoBuf::Guest(scattered), false).await.unwrap();
        });
        let content = std::fs::read(&path).unwrap();
        assert_eq!([content[4095], content[4096], content[8191], content[8192], content[12288]], [0, 2, 2, 0, 0]);
    }

    #[test]
    fn the_end_of_the_file_and_its_refusals_are_reported() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("image");
        drop(FileImage::create(&path, 64 << 10, Direct::On).unwrap());
        let image = std::sync::Arc::new(FileImage::open(&path, ImageOptions { read_only: true, ..options() }).unwrap());
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
        run(&image, async move |image, queue| {
            let into = || IoBuf::Owned(AlignedBuf::zeroed(8192));
            let short = read_exact_at(image, queue, ByteOffset(0), into()).await.unwrap_err();
            assert_eq!(short.kind, crate::image::ImageErrorKind::Truncated);
            let refused = write_all_at(image, queue, ByteOffset(0), into(), false).await.unwrap_err();
            assert_eq!(refused.errno, Some(libc::EBADF));
            assert!(!image.is_poisoned(), "nothing that was reported as stored is in doubt");
        });
    }
}
