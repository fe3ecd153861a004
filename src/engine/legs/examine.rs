//! What a write-intent bitmap says of its legs, found out without changing it.

use std::sync::Arc;

use uuid::Uuid;

use super::state::{Shape, State};
use super::{LegImage, LegState, Pair, PairError, REGION_BYTES_MIN};
use crate::image::{IoQueue, SharedImage};
use crate::store::{BlockRange, DurableTable, Table};

/// What was found.
#[derive(Debug)]
pub struct PairFacts {
    /// Both places, as a start would take them up: a leg whose image was not given has failed.
    pub legs: Vec<(Uuid, LegState)>,
    /// Regions in which the legs may differ.
    pub regions: u64,
    /// Regions of sectors that are damaged; they are taken as set.
    pub damaged: Vec<BlockRange>,
}

impl Pair {
    /// Looks at a bitmap as [`Pair::open`] would, given the images that are there.
    ///
    /// # Errors
    /// As there.
    pub async fn examine(
        images: &[LegImage],
        bitmap: SharedImage,
        id: Uuid,
        size_bytes: u64,
        block_bytes: u32,
        queue: &IoQueue,
    ) -> Result<PairFacts, PairError> {
        let region_bytes = block_bytes.max(REGION_BYTES_MIN);
        let table = Arc::new(Table::in_memory(size_bytes.div_ceil(u64::from(region_bytes)))?);
        let (durable, report) = DurableTable::load(bitmap, id, table, queue).await?;
        let state = State::from_payload(&report.payload, Shape { size_bytes, region_bytes }, images)?;
        let legs = state.legs.iter().flatten().map(|leg| (leg.id, leg.state.clone())).collect();
        Ok(PairFacts { legs, regions: durable.table().count(), damaged: report.damaged })
    }
}
