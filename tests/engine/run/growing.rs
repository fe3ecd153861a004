//! The disk of a run grows, now and then: its versions have arrays of different sizes from then on.

use halfsilver::engine::{GrowError, SizedTables};
use halfsilver::image::Image;

use super::Run;
use crate::sim::SECTOR;
use crate::world::Tags;

/// No disk of a run gets more blocks than these.
const BLOCKS_MAX: usize = 24;

impl Run {
    /// As the daemon does it: room in the tables, then in the image, then the size. It is refused where it must be, and then
    /// nothing has changed.
    pub(super) fn grow(&mut self) {
        let unit = self.shape.live_alignment.max(self.shape.frozen_alignment.unwrap_or(512)) as usize / SECTOR;
        let block = self.shape.block / SECTOR;
        let sectors = self.sectors + unit * (1 + self.rng.below(3 * block / unit));
        if sectors.div_ceil(block) > BLOCKS_MAX {
            return;
        }
        let size = (sectors * SECTOR) as u64;
        let is_draining = {
            let world = self.world.borrow();
            let frozen = world.arrays.iter().filter_map(|array| array.version.as_ref());
            frozen.into_iter().any(|version| !version.is_quiesced() && version.broken().is_none())
        };
        match self.disk.can_grow(size) {
            Ok(()) => assert!(!is_draining && self.pair.is_none() && self.disk.can_move_pivot()),
            Err(GrowError::Draining) => return assert!(is_draining),
            Err(GrowError::Mirrored) => return assert!(self.pair.is_some()),
            Err(GrowError::InLog) => return assert!(!self.disk.can_move_pivot()),
            Err(e) => panic!("{e}"),
        }
        assert_eq!(self.editor.grow(&self.disk, size), Err(GrowError::NoRoom));
        let SizedTables { discards, changed } = self.disk.sized_tables();
        for table in std::iter::once(discards).chain(changed.map(|(_, table)| table)) {
            table.reserve(None, sectors.div_ceil(block) as u64).unwrap();
        }
        self.live_image.grow(size).unwrap();
        self.editor.grow(&self.disk, size).unwrap();
        self.sectors = sectors;
        let mut world = self.world.borrow_mut();
        let live = world.arrays.last_mut().unwrap();
        live.sectors.resize(sectors, Tags::from([0]));
        world.counts.growths += 1;
        world.counts.growths_under_snapshots += u64::from(world.arrays.len() > 1);
    }
}
