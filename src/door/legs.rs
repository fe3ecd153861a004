//! The legs of a mirror: made, added, split, joined again, let go.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use uuid::Uuid;

use super::engine::{Disk, Engine, Event, Supervisor, locked};
use super::error::{Error, no_mirror};
use super::spec::ImageSpec;
use crate::engine::{self, Backing, LegImage, LegState, Pair, PairError, PairFacts, PairObserver};
use crate::image::{IoQueue, SharedImage};

/// Tells of legs that are out, and breaks what was frozen on one.
struct Legs {
    id: Uuid,
    supervisor: Arc<dyn Supervisor>,
    of: Weak<engine::Disk>,
}

impl PairObserver for Legs {
    fn leg_dropped(&self, _leg: Uuid, path: &Path, reason: &str) {
        if let Some(disk) = self.of.upgrade() {
            let chain = disk.chain();
            for link in &chain.links()[..chain.live()] {
                if link.layer.image.path() == path && matches!(link.layer.image, Backing::One(_)) {
                    disk.break_version(&link.version, reason);
                }
            }
        }
        self.supervisor.told(self.id, Event::LegOut(path.to_owned(), reason.to_owned()));
    }
}

/// How many bytes the image of a mirror's write-intent bitmap has.
#[must_use]
pub fn bitmap_bytes(size_bytes: u64, block_bytes: u32) -> u64 {
    Pair::bitmap_bytes(size_bytes, block_bytes)
}

/// What the write-intent bitmap of a mirror says of its legs, given the images that are there. Nothing is changed.
///
/// # Errors
/// As opening it.
pub async fn examine_mirror(
    images: &[LegImage],
    (bitmap, id): (SharedImage, Uuid),
    size_bytes: u64,
    block_bytes: u32,
    queue: &IoQueue,
) -> Result<PairFacts, PairError> {
    Pair::examine(images, bitmap, id, size_bytes, block_bytes, queue).await
}

/// Opens the legs of a mirror.
pub(super) fn open(engine: &Engine, image: ImageSpec, block_bytes: u32) -> Result<Arc<Pair>, Error> {
    let ImageSpec::Mirror { id, bitmap, legs, unused } = image else { return Err(no_mirror()) };
    engine.on_ring(async move |queue| -> Result<_, PairError> {
        let pair = Pair::open(&legs, bitmap, id, block_bytes, &queue).await?;
        // That of a split that never came to be: no snapshot has it, so no deletion brings it back.
        for leg in pair.status().into_iter().filter(|leg| leg.state == LegState::Split) {
            if unused.contains(&leg.id) {
                pair.forget(&queue, leg.id).await?;
            }
        }
        Ok(pair)
    })
}

impl Disk {
    pub(super) fn watch_legs(&self) {
        let open = self.open();
        if let Some(pair) = &*locked(&open.mirror) {
            let (supervisor, of) = (self.engine.supervisor.clone(), Arc::downgrade(&open.disk));
            pair.observe(Arc::new(Legs { id: self.id, supervisor, of }));
        }
    }

    fn mirror(&self) -> Result<Arc<Pair>, Error> {
        locked(&self.open().mirror).clone().ok_or_else(no_mirror)
    }

    /// Makes the disk's one image the first leg of a mirror, which nothing goes by yet ([`Disk::write_by_mirror`]). `bitmap`
    /// is an image of [`bitmap_bytes`] zeros.
    ///
    /// # Errors
    /// When it is mirrored already, or the bitmap cannot be stored.
    pub fn make_mirror(&self, leg: Uuid, (bitmap, id): (SharedImage, Uuid)) -> Result<(), Error> {
        let open = self.open();
        let chain = open.disk.chain();
        let Backing::One(image) = chain.layer(chain.pivot_of(chain.live())).image.clone() else {
            return Err(Error::Mirror("it is mirrored already".to_owned()));
        };
        let (first, block_bytes) = (LegImage { id: leg, image }, open.disk.geometry().block_bytes);
        let made =
            self.engine.on_ring(async move |queue| Pair::create(first, bitmap, id, block_bytes, &queue).await)?;
        *locked(&open.mirror) = Some(made);
        self.watch_legs();
        Ok(())
    }

    /// Has requests write by the mirror, and waits until all do: a leg that is added must miss no write.
    ///
    /// # Errors
    /// When too many older cuts still drain, there is no mirror, or requests are in flight that do not end in `time`.
    pub fn write_by_mirror(&self, time: Duration) -> Result<(), Error> {
        let pair = self.mirror()?;
        self.write_by(Backing::Pair(pair), time)
    }

    /// Lets one leg go and has requests write the other one alone, which has everything; waits until all do.
    ///
    /// # Errors
    /// As before, or when the leg that stays is not in sync. The one that goes is one that has failed then.
    pub fn write_by_leg(&self, stays: Uuid, goes: Option<Uuid>, time: Duration) -> Result<(), Error> {
        let pair = self.mirror()?;
        let image = pair.image_of(stays).ok_or_else(no_mirror)?;
        if let Some(goes) = goes {
            self.engine.on_ring(async move |queue| pair.let_go(&queue, goes).await)?;
        }
        self.write_by(Backing::One(image), time)
    }

    fn write_by(&self, image: Backing, time: Duration) -> Result<(), Error> {
        let open = self.open();
        let grace = self.engine.editor.replace_full_image(&open.disk, image)?;
        let host = &self.engine.host;
        let deadline = host.now() + time;
        while host.now() < deadline {
            if open.disk.clock().wait_drained(grace, host.patience(time)) {
                return Ok(());
            }
        }
        Err(Error::Busy("requests are in flight that do not end; try again later".to_owned()))
    }

    /// Forgets a mirror that nothing goes by.
    pub fn forget_mirror(&self) {
        let open = self.open();
        let gone = locked(&open.mirror).take();
        drop(gone);
    }

    /// Adds a leg, to which everything is to be copied.
    ///
    /// # Errors
    /// When it does not fit, or the bitmap cannot be stored.
    pub fn add_leg(&self, leg: LegImage) -> Result<(), Error> {
        self.attach_leg(leg, true)
    }

    /// Brings a leg back that was split for nothing.
    ///
    /// # Errors
    /// When it is not that leg, or its image is not known; or the bitmap cannot be stored.
    pub fn bring_leg_back(&self, id: Uuid) -> Result<(), Error> {
        let image = self.mirror()?.image_of(id).ok_or_else(no_mirror)?;
        self.attach_leg(LegImage { id, image }, false)
    }

    /// The records have forgotten the version that has left the chain ([`Disk::retire`]). The leg that it had alone comes
    /// back, if it is named, or is closed.
    ///
    /// # Errors
    /// As [`Disk::bring_leg_back`].
    pub fn retired_forgotten(&self, back: Option<Uuid>) -> Result<(), Error> {
        let open = self.open();
        open.disk.durability_recorded();
        let left = locked(&open.left_leg).take();
        let Some(id) = back else { return Ok(()) };
        self.attach_leg(LegImage { id, image: left.ok_or_else(no_mirror)? }, false)
    }

    fn attach_leg(&self, leg: LegImage, full: bool) -> Result<(), Error> {
        let pair = self.mirror()?;
        self.engine.on_ring(async move |queue| pair.attach(&queue, leg, full).await)
    }

    /// Forgets a leg that was split or has failed; with `is_in_use` one that is let go by this.
    ///
    /// # Errors
    /// When no other leg is in sync, or the bitmap cannot be stored.
    pub fn forget_leg(&self, leg: Uuid, is_in_use: bool) -> Result<(), Error> {
        let pair = self.mirror()?;
        self.engine.on_ring(async move |queue| {
            if is_in_use {
                pair.let_go(&queue, leg).await?;
            }
            pair.forget(&queue, leg).await
        })
    }

    /// Prepares the split of the mirror at the next cut. Returns the image of the leg that the frozen version is to have.
    ///
    /// # Errors
    /// When not both legs are in sync, or the bitmap cannot be stored.
    pub fn split(&self) -> Result<PathBuf, Error> {
        let pair = self.mirror()?;
        let of = pair.clone();
        self.engine.on_ring(async move |queue| of.prepare_split(&queue).await)?;
        let leg = pair.second().ok_or_else(no_mirror)?;
        *locked(&self.open().mirror) = Some(pair.detached()?);
        Ok(leg.image.path().to_owned())
    }

    /// Clears what the bitmap need not remember any more.
    ///
    /// # Errors
    /// When the legs or the bitmap cannot be stored.
    pub fn clean_mirror(&self) -> Result<(), Error> {
        let (pair, disk) = (self.mirror()?, self.open().disk.clone());
        self.engine.on_ring(async move |queue| pair.clean(&queue, disk.block_locks()).await.map(drop))
    }
}
