//! Whole transfers on an image: continued when short, bounced when misaligned, checked at the end.
//!
//! What always holds: what is bounced is bounced in pieces, and their bytes are taken from the queue's budget, so that no
//! guest decides how much memory its requests cost.

use std::io;
use std::sync::{Arc, LazyLock};

use super::{
    AlignedBuf, ByteOffset, GuestBuf, Image, ImageError, ImageErrorKind, ImageOp, IoBuf, IoQueue, OpKind, Share,
    Unsynced,
};

/// Zeros are written from a buffer of at most this many bytes where the container cannot zero a range itself.
const ZERO_CHUNK_BYTES: usize = 1 << 20;

/// The most bytes of a guest that are copied at once.
const COPY_BYTES_MAX: usize = 1 << 20;

/// Reads until `buf` is full. Gives the buffer back.
///
/// # Errors
/// The system's error, or `Truncated` when the image ends before the buffer does.
pub async fn read_exact_at(
    image: &dyn Image,
    queue: &IoQueue,
    at: ByteOffset,
    buf: IoBuf,
) -> Result<IoBuf, ImageError> {
    let alignment = image.alignment();
    let IoBuf::Guest(guest) = &buf else {
        return transfer(image, queue, OpKind::Read, at, buf).await;
    };
    let offset_bytes = u64::from(alignment.offset_bytes);
    if at.0.is_multiple_of(offset_bytes) && guest.is_aligned(alignment.memory_bytes, alignment.offset_bytes) {
        return transfer(image, queue, OpKind::Read, at, buf).await;
    }
    // The guest's buffer or position does not fit the device.
    Box::pin(read_by_copy(image, queue, at, guest)).await?;
    Ok(buf)
}

/// As [`read_exact_at`], through memory of our own: what fails here is not the guest's memory.
///
/// # Errors
/// As for [`read_exact_at`].
pub async fn read_by_copy(
    image: &dyn Image,
    queue: &IoQueue,
    at: ByteOffset,
    guest: &GuestBuf,
) -> Result<(), ImageError> {
    let unit = u64::from(image.alignment().offset_bytes);
    for piece in pieces(guest.len()) {
        let here = at.add(piece.start as u64);
        let from = here.0 / unit * unit;
        let len = (here.0 + piece.len() as u64).next_multiple_of(unit) - from;
        let _share = share_for(queue, guest, len).await;
        let len = usize::try_from(len).expect("a piece and two units of alignment");
        let cover = IoBuf::Owned(AlignedBuf::scratch(len));
        let IoBuf::Owned(cover) = transfer(image, queue, OpKind::Read, ByteOffset(from), cover).await? else {
            unreachable!("a transfer gives back the buffer it was given")
        };
        let skip = usize::try_from(here.0 - from).expect("less than one alignment unit");
        guest.slice(piece.clone()).copy_in(&cover[skip..skip + piece.len()]);
        cover.recycle();
    }
    Ok(())
}

async fn write_by_copy(
    image: &dyn Image,
    queue: &IoQueue,
    at: ByteOffset,
    guest: &GuestBuf,
    durable: bool,
) -> Result<(), ImageError> {
    for piece in pieces(guest.len()) {
        let here = at.add(piece.start as u64);
        let _share = share_for(queue, guest, piece.len() as u64).await;
        let copy = IoBuf::Owned(guest.slice(piece).copy_out());
        if let IoBuf::Owned(copy) = transfer(image, queue, OpKind::Write { durable }, here, copy).await? {
            copy.recycle();
        }
    }
    Ok(())
}

/// A share of the queue's budget for a copy of a guest's bytes. Who copies memory of our own may hold one already, and waits
/// for no other; so much of it is in use no more than twice.
async fn share_for(queue: &IoQueue, guest: &GuestBuf, len: u64) -> Option<Share> {
    match guest.is_owned() {
        true => None,
        false => Some(queue.copies().take(len).await),
    }
}

/// Ranges of `len` bytes, each short enough to be copied at once.
fn pieces(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len).step_by(COPY_BYTES_MAX).map(move |from| from..len.min(from + COPY_BYTES_MAX))
}

/// Writes all of `buf`; with `durable`, completes only when it is on stable storage.
///
/// `at` and the length must be multiples of the image's offset alignment; guest memory may lie anywhere.
///
/// # Errors
/// The system's error, or `Poisoned` after an earlier failed sync.
pub async fn write_all_at(
    image: &dyn Image,
    queue: &IoQueue,
    at: ByteOffset,
    buf: IoBuf,
    durable: bool,
) -> Result<(), ImageError> {
    if image.is_poisoned() {
        return Err(poisoned(image, ImageOp::Write));
    }
    let alignment = image.alignment();
    let _changed = Changed(image);
    let result = match &buf {
        IoBuf::Guest(guest) if !guest.is_aligned(alignment.memory_bytes, alignment.offset_bytes) => {
            Box::pin(write_by_copy(image, queue, at, guest, durable)).await
        }
        _ => transfer(image, queue, OpKind::Write { durable }, at, buf).await.map(drop),
    };
    if durable && result.as_ref().is_err_and(leaves_doubt) {
        // As after a failed sync: nobody can say what is on the medium.
        image.poison();
    }
    result
}

/// Makes `len` bytes at `at` read as zeros; `unmap` gives the storage back where the container can.
///
/// # Errors
/// As for writing.
pub async fn zero_range(
    image: &dyn Image,
    queue: &IoQueue,
    at: ByteOffset,
    len: u64,
    unmap: bool,
) -> Result<(), ImageError> {
    match begin_zero(image, queue, at, len, unmap).await? {
        Ok(_) => Ok(()),
        Err(e) if is_unsupported(&e) => write_zeros(image, queue, at, len).await,
        Err(e) => Err(ImageError::from_io(ImageOp::Zero, image.path(), Some(at), &e)),
    }
}

/// Gives the storage of `len` bytes at `at` back, if the container can: they read as zeros then. Where it cannot nothing
/// happens, because zeros that are written would take the very storage that was to be given back.
///
/// # Errors
/// As for writing.
pub async fn release_range(image: &dyn Image, queue: &IoQueue, at: ByteOffset, len: u64) -> Result<(), ImageError> {
    try_release_range(image, queue, at, len).await.map(drop)
}

/// As [`release_range`], and says whether the container could.
///
/// # Errors
/// As for writing.
pub async fn try_release_range(
    image: &dyn Image,
    queue: &IoQueue,
    at: ByteOffset,
    len: u64,
) -> Result<bool, ImageError> {
    match begin_zero(image, queue, at, len, true).await? {
        Ok(_) => Ok(true),
        Err(e) if is_unsupported(&e) => Ok(false),
        Err(e) => Err(ImageError::from_io(ImageOp::Discard, image.path(), Some(at), &e)),
    }
}

/// Makes everything that completed before durable.
///
/// # Errors
/// The system's error, which poisons the image; or `Poisoned` if it was before.
pub async fn sync(image: &dyn Image, queue: &IoQueue) -> Result<(), ImageError> {
    if image.is_poisoned() {
        return Err(poisoned(image, ImageOp::Sync));
    }
    let number = image.unsynced().map(Unsynced::begin_sync);
    let done = loop {
        match queue.begin(image, OpKind::Sync, ByteOffset(0), IoBuf::None, 0).await.result {
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            done => break done,
        }
    };
    match done {
        // Another worker's sync may have failed while ours ran and swallowed the error state.
        Ok(_) if !image.is_poisoned() => {
            if let (Some(unsynced), Some(number)) = (image.unsynced(), number) {
                unsynced.end_sync(number);
            }
            Ok(())
        }
        Ok(_) => Err(poisoned(image, ImageOp::Sync)),
        Err(e) => {
            image.poison();
            Err(ImageError::from_io(ImageOp::Sync, image.path(), None, &e))
        }
    }
}

/// Whether [`sync`] would make anything durable, or has something to say.
#[must_use]
pub fn needs_sync(image: &dyn Image) -> bool {
    image.is_poisoned() || image.unsynced().is_none_or(Unsynced::is_dirty)
}

/// Notes a change of the image when it has ended, whatever came of it.
struct Changed<'a>(&'a dyn Image);

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        if let Some(unsynced) = self.0.unsynced() {
            unsynced.note_write();
        }
    }
}

async fn transfer(
    image: &dyn Image,
    queue: &IoQueue,
    kind: OpKind,
    at: ByteOffset,
    mut buf: IoBuf,
) -> Result<IoBuf, ImageError> {
    let (len, mut moved) = (buf.len(), 0);
    let op = if kind == OpKind::Read { ImageOp::Read } else { ImageOp::Write };
    while moved < len {
        let here = at.add(moved as u64);
        let done = queue.begin(image, kind, here, buf, moved).await;
        buf = done.buf;
        match done.result {
            Ok(0) => {
                let message = format!("only {moved} of {len} bytes could be moved; was the image cut short?");
                let mut error = ImageError::new(ImageErrorKind::Truncated, op, image.path(), message);
                error.at = Some(here);
                return Err(error);
            }
            Ok(n) => moved += n,
            Err(e) if is_transient(&e) => {}
            Err(e) => return Err(ImageError::from_io(op, image.path(), Some(here), &e)),
        }
    }
    Ok(buf)
}

/// Asks the container to zero a range itself. The inner result is the container's answer.
async fn begin_zero(
    image: &dyn Image,
    queue: &IoQueue,
    at: ByteOffset,
    len: u64,
    unmap: bool,
) -> Result<io::Result<usize>, ImageError> {
    if image.is_poisoned() {
        return Err(poisoned(image, ImageOp::Zero));
    }
    let _changed = Changed(image);
    loop {
        match queue.begin(image, OpKind::Zero { len, unmap }, at, IoBuf::None, 0).await.result {
            Err(e) if is_transient(&e) => {}
            done => return Ok(done),
        }
    }
}

async fn write_zeros(image: &dyn Image, queue: &IoQueue, at: ByteOffset, len: u64) -> Result<(), ImageError> {
    let _changed = Changed(image);
    // The same for all that are in flight.
    static ZEROS: LazyLock<Arc<AlignedBuf>> = LazyLock::new(|| Arc::new(AlignedBuf::zeroed(ZERO_CHUNK_BYTES)));
    let mut done = 0;
    while done < len {
        let n = usize::try_from(len - done).unwrap_or(usize::MAX).min(ZERO_CHUNK_BYTES);
        let buf = IoBuf::Shared(ZEROS.clone(), 0..n);
        transfer(image, queue, OpKind::Write { durable: false }, at.add(done), buf).await?;
        done += n as u64;
    }
    Ok(())
}

/// Whether a durable write that failed like this may have left something that was reported as stored unstored. A
/// refusal for lack of space or for a bad address has not.
fn leaves_doubt(e: &ImageError) -> bool {
    let refused = [libc::ENOSPC, libc::EDQUOT, libc::EFAULT, libc::EINVAL, libc::ENOMEM, libc::EFBIG];
    e.errno.is_none_or(|errno| !refused.contains(&errno))
}

/// Whether the container does not know how to zero a range.
fn is_unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

fn is_transient(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn poisoned(image: &dyn Image, op: ImageOp) -> ImageError {
    let message = "an earlier sync failed, so what is on the medium is unknown; check the storage, then restart";
    ImageError::new(ImageErrorKind::Poisoned, op, image.path(), message)
}

/// The bytes of `guest` as one operation's buffer.
impl From<GuestBuf> for IoBuf {
    fn from(guest: GuestBuf) -> IoBuf {
        IoBuf::Guest(guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    #[test]
    fn who_copies_memory_of_our_own_waits_for_no_share() {
        let queue = IoQueue::simulated();
        let budget = queue.copies();
        let mut all = pin!(budget.take(u64::MAX));
        let cx = &mut Context::from_waker(Waker::noop());
        let all = all.as_mut().poll(cx);
        assert!(all.is_ready() && budget.left() == 0);
        let ours = GuestBuf::from_owned(AlignedBuf::zeroed(512)).0;
        assert!(pin!(share_for(&queue, &ours.slice(1..2), 1)).poll(cx).is_ready());
    }
}
