//! One pack on one medium, moved step by step.

use std::path::Path;
use std::sync::Arc;

use halfsilver::image::{AlignedBuf, ByteOffset, ImageError, IoBuf, IoQueue};
use halfsilver::store::{Believed, Pack, PackFacts, TableError};

use crate::lives::{ID, KEY, filled, tag_of};
use crate::media::{self, Medium};
use crate::schedule::Rng;

pub const BLOCK: usize = 4096;
/// Sectors of a unit, which is a block here.
pub const SECTORS: usize = BLOCK / media::SECTOR;

pub struct One {
    pub rng: Rng,
    pub medium: Medium,
    pub queue: IoQueue,
    pub pack: Arc<Pack>,
    shape: (u64, u32),
}

impl One {
    pub fn new(blocks: usize) -> One {
        One::on(blocks, |medium| medium)
    }

    pub fn on(blocks: usize, change: impl FnOnce(Medium) -> Medium) -> One {
        let shape = ((blocks * BLOCK) as u64, u32::try_from(BLOCK).unwrap());
        let size = usize::try_from(Pack::image_bytes(shape.0, shape.1).unwrap()).unwrap();
        let (medium, queue, mut rng) = (change(Medium::new("pack", size)), IoQueue::simulated(), Rng::new(1));
        let (image, used) = (Arc::new(medium.clone()), queue.clone());
        let pack = media::run(&mut rng, async move { Pack::create(image, (ID, KEY), shape, &used).await.unwrap() });
        One { rng, medium, queue, pack: Arc::new(pack), shape }
    }

    /// Writes `tag` to each of so many blocks.
    pub fn write(&mut self, first: usize, count: usize, tag: u64) -> Result<(), ImageError> {
        let (pack, queue) = (self.pack.clone(), self.queue.clone());
        media::run(&mut self.rng, async move {
            let buf = IoBuf::Owned(filled(count * BLOCK, &[(tag, count * BLOCK)]));
            pack.write(&queue, ByteOffset((first * BLOCK) as u64), buf, false).await
        })
    }

    pub fn zero(&mut self, block: usize) -> Result<(), ImageError> {
        let (pack, queue) = (self.pack.clone(), self.queue.clone());
        media::run(
            &mut self.rng,
            async move { pack.zero(&queue, ByteOffset((block * BLOCK) as u64), BLOCK as u64).await },
        )
    }

    pub fn sync(&mut self) -> Result<(), ImageError> {
        let (pack, queue) = (self.pack.clone(), self.queue.clone());
        media::run(&mut self.rng, async move { pack.sync(&queue).await })
    }

    /// What a block shows: a tag if it is one whole write, 0 if it is zeros.
    pub fn tag(&mut self, block: usize) -> Result<Option<u64>, ImageError> {
        let (pack, queue) = (self.pack.clone(), self.queue.clone());
        media::run(&mut self.rng, async move {
            let into = IoBuf::Owned(AlignedBuf::zeroed(BLOCK));
            let IoBuf::Owned(bytes) = pack.read(&queue, ByteOffset((block * BLOCK) as u64), into).await? else {
                panic!("another buffer")
            };
            Ok(tag_of(&bytes))
        })
    }

    /// Goes on with what is left.
    pub fn take_up(&mut self, left: Medium, believed: Believed) -> Result<(), TableError> {
        let (image, queue, shape) = (Arc::new(left.clone()), self.queue.clone(), self.shape);
        let open = async move { Pack::open(image, ID, shape, believed, u64::MAX, &queue).await };
        let pack = media::run(&mut self.rng, open)?;
        (self.medium, self.pack) = (left, Arc::new(pack));
        Ok(())
    }

    /// What somebody finds who only looks.
    pub fn examine(&mut self, left: &Medium, believed: Believed) -> Result<PackFacts, TableError> {
        let (image, queue, shape) = (Arc::new(left.clone()), self.queue.clone(), self.shape);
        media::run(&mut self.rng, async move { Pack::examine(image, ID, shape, believed, u64::MAX, &queue).await })
    }

    /// The same medium, opened directly in units of a block, by somebody else.
    pub fn opened_directly(&mut self) {
        media::set_unit(u32::try_from(BLOCK).unwrap());
        let direct = self.medium.opened_at(Path::new("pack"), true, ());
        media::set_unit(512);
        self.take_up(direct, Believed::Arrived).unwrap();
    }

    /// What was written last, of which a kill takes nothing away.
    pub fn all_that_arrived(&self) -> Medium {
        self.medium.after_loss(|_, versions| versions)
    }
}
