//! Layers of a run that outlive a power cut.

use std::sync::Arc;

use halfsilver::engine::{Backing, Layer, Log, Saved};
use halfsilver::store::{DurableTable, PAYLOAD_BYTES, Table};

use super::{Run, wait};
use crate::sim::SimImage;

impl Run {
    /// As the daemon makes logs: with a durable table, so that what is superseded is given back later.
    pub(super) fn durable_log(&mut self, image: Backing, table: Arc<Table>) -> Layer {
        let durable = self.new_durable(&table);
        let table = self.durable_table(durable, table);
        Layer::logged(image, Arc::new(Log { table, freed: self.shape.table(self.sectors) }))
    }

    /// As the daemon makes what outlives a power cut.
    pub(super) fn saved(&mut self, image: Backing, table: Arc<Table>) -> Layer {
        self.world.borrow_mut().counts.saved_durably += 1;
        let durable = self.new_durable(&table);
        let made = self.durable_table(durable.clone(), table);
        if self.shape.faults && self.rng.chance(25) {
            self.make_faulty(&durable);
        }
        Layer::saved(image, Arc::new(Saved { table: made, revoke: Box::new(|| Ok(())) }))
    }

    fn new_durable(&self, table: &Table) -> SimImage {
        let bytes = DurableTable::image_bytes(table.blocks());
        SimImage::new("durable", usize::try_from(bytes).unwrap(), 512)
    }

    fn durable_table(&mut self, durable: SimImage, table: Arc<Table>) -> DurableTable {
        let queue = self.queue.clone();
        let made = async move {
            DurableTable::create(Arc::new(durable), uuid::Uuid::nil(), table, [0; PAYLOAD_BYTES], &queue).await.unwrap()
        };
        wait(&mut self.scheduler, &mut self.rng, made)
    }
}
