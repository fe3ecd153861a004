//! Reads of frozen versions, whole and in parts, and those that leave one.

use std::ops::Range;
use std::sync::Arc;

use halfsilver::engine::{Request, RequestError, Version};
use halfsilver::image::{AlignedBuf, ByteOffset, GuestBuf};

use super::Run;
use crate::sim::SECTOR;

impl Run {
    pub(super) fn read_frozen(&mut self) {
        let quiesced: Vec<(u64, Arc<Version>)> = self
            .world
            .borrow()
            .arrays
            .iter()
            .filter_map(|a| Some((a.key, a.version.clone()?)))
            .filter(|(_, v)| v.is_quiesced() && !v.is_retiring())
            .collect();
        if quiesced.is_empty() {
            return;
        }
        let (key, version) = quiesced[self.rng.below(quiesced.len())].clone();
        let sectors = self.world.borrow().size_of(key);
        let range = if self.rng.chance(20) { 0..sectors } else { self.range() };
        match range.end <= sectors {
            true => self.spawn_frozen_read(key, version, range),
            false => self.refuses_behind_its_end(version, range),
        }
    }

    pub(super) fn spawn_frozen_read(&mut self, key: u64, version: Arc<Version>, range: Range<usize>) {
        let ticket = self.lane.enter();
        let (world, queue) = (self.world.clone(), self.queue.clone());
        let attachment = self.disk.attach_frozen(version.id);
        let id = world.borrow_mut().begin_read(vec![key], range.clone());
        self.scheduler.spawn(async move {
            let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(range.len() * SECTOR));
            let at = ByteOffset((range.start * SECTOR) as u64);
            let done = attachment.execute(&queue, &ticket, Request::Read { at, into }).await;
            let mut world = world.borrow_mut();
            world.counts.frozen_reads += 1;
            match done {
                Ok(()) => world.end_read(id, &memory.to_vec(), &format!("read of version {key}")),
                Err(RequestError::Broken(_)) if version.broken().is_some() || version.is_retiring() => {
                    world.watches.retain(|w| w.id != id);
                    world.counts.refused_reads += 1;
                }
                Err(e) => world.fail(format!("read of version {key} failed: {e}")),
            }
            drop(ticket);
        });
    }

    /// A read of a frozen version that leaves it is an error, although its disk goes on there.
    fn refuses_behind_its_end(&mut self, version: Arc<Version>, range: Range<usize>) {
        let (ticket, queue, world) = (self.lane.enter(), self.queue.clone(), self.world.clone());
        let attachment = self.disk.attach_frozen(version.id);
        world.borrow_mut().counts.reads_behind_the_end += 1;
        self.scheduler.spawn(async move {
            let (into, _memory) = GuestBuf::from_owned(AlignedBuf::zeroed(range.len() * SECTOR));
            let at = ByteOffset((range.start * SECTOR) as u64);
            match attachment.execute(&queue, &ticket, Request::Read { at, into }).await {
                Err(RequestError::OutOfRange { .. } | RequestError::Broken(_)) => {}
                other => world.borrow_mut().fail(format!("a read behind the end of a version: {other:?}")),
            }
        });
    }
}
