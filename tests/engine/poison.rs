//! An image whose sync has failed: nobody can say what is on its medium, so nothing more is accepted and nothing is trusted.

use std::sync::{Arc, Mutex};

use halfsilver::image::{self, AlignedBuf, ByteOffset, Image, ImageError, ImageErrorKind, IoBuf, IoQueue, OpKind};

use crate::sim::{Rng, Scheduler, SimImage};

fn run(work: impl AsyncFnOnce(&IoQueue) -> Result<(), ImageError> + 'static) -> Result<(), ImageErrorKind> {
    let (answer, mut scheduler) = (Arc::new(Mutex::new(None)), Scheduler::default());
    let put = answer.clone();
    scheduler.spawn(async move { *put.lock().unwrap() = Some(work(&IoQueue::simulated()).await) });
    assert!(scheduler.settle(&mut Rng::new(1)));
    let done = answer.lock().unwrap().take().unwrap();
    done.map_err(|e| e.kind)
}

#[test]
fn nothing_is_accepted_after_a_failed_sync() {
    let image = SimImage::new("disk", 8192, 512);
    let of = image.clone();
    image.fail_syncs(libc::EIO);
    assert_eq!(run(async move |queue| image::sync(&of, queue).await), Err(ImageErrorKind::Io));
    assert!(image.is_poisoned());
    let refused = Err(ImageErrorKind::Poisoned);
    let of = image.clone();
    assert_eq!(run(async move |queue| image::sync(&of, queue).await), refused);
    for unmap in [true, false] {
        let of = image.clone();
        assert_eq!(run(async move |queue| image::zero_range(&of, queue, ByteOffset(0), 4096, unmap).await), refused);
    }
    let of = image.clone();
    let write = async move |queue: &IoQueue| {
        let bytes = IoBuf::Owned(AlignedBuf::zeroed(4096));
        image::write_all_at(&of, queue, ByteOffset(0), bytes, false).await
    };
    assert_eq!(run(write), refused);
}

/// The kernel tells of a failure once: to whoever syncs first.
#[test]
fn a_sync_is_not_trusted_when_another_one_failed_while_it_ran() {
    let (image, answer, mut scheduler) =
        (SimImage::new("disk", 8192, 512), Arc::new(Mutex::new(None)), Scheduler::default());
    image.hold(Some(OpKind::Sync));
    let (of, put) = (image.clone(), answer.clone());
    scheduler.spawn(async move { *put.lock().unwrap() = Some(image::sync(&of, &IoQueue::simulated()).await) });
    assert!(!scheduler.settle(&mut Rng::new(1)), "it runs");
    image.poison();
    image.hold(None);
    assert!(scheduler.settle(&mut Rng::new(1)));
    let done = answer.lock().unwrap().take().unwrap();
    assert_eq!(done.map_err(|e| e.kind), Err(ImageErrorKind::Poisoned));
}
