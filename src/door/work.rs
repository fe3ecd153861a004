//! Background copying, asked for by what is to be done. Each blocks its thread, and ends with an answer; how far it is, how
//! fast it goes and whether it is to stop is in its [`Pace`], a page of numbers for both sides.

use std::sync::Arc;

use super::engine::{Disk, locked};
use crate::engine::{Backing, Epoch, VersionId};
use crate::job::{self, Outcome, Pace};
use crate::store::BlockIndex;

/// What is to be done to a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// Give a volume everything that it does not own.
    Complete,
    /// The same after it was put on another snapshot.
    Update,
    /// Bring back what a restore still shows of an older version.
    Restore,
    /// Make the second leg equal to the first.
    Resync,
    /// Carry out the discards that waited for a version to go.
    Discards,
}

/// How letting a version go has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Retired {
    /// It was told to stop.
    Stopped,
    /// The version has left the chain; why it was broken then, if so.
    Gone(Option<String>),
}

impl Disk {
    /// Does a piece of work to its end, or until it is to stop. When it is done nothing is left of it: a volume can stand on
    /// its own, a restore can be ended.
    ///
    /// # Errors
    /// When something cannot be read or written. What was copied stays; begin again when it can be.
    pub fn run(&self, work: Work, pace: &Arc<Pace>) -> Result<Outcome, String> {
        let (open, pace) = (self.open(), pace.clone());
        let (disk, pair) = (open.disk.clone(), locked(&open.mirror).clone());
        let of = disk.clone();
        let done = self.engine.on_ring(async move |queue| -> Result<Outcome, String> {
            match (work, pair) {
                (Work::Complete, _) => job::complete(queue, disk, pace).await,
                (Work::Update, _) => job::update(queue, disk, pace).await,
                (Work::Restore, _) => job::restore(queue, disk, pace).await.map_err(|e| e.to_string()),
                (Work::Discards, _) => job::carry_out_discards(queue, disk, pace).await.map_err(|e| e.to_string()),
                (Work::Resync, Some(pair)) => job::resync(queue, disk, pair, pace).await.map_err(|e| e.to_string()),
                (Work::Resync, None) => Err("it has no second leg".to_owned()),
            }
        });
        let done = done.map_err(|e| e.to_string())?;
        let chain = of.chain();
        // By the bits: counts follow them.
        let is_over = || match work {
            Work::Complete | Work::Update => chain.without_origin().is_some(),
            Work::Restore => chain.restoring().is_some_and(|of| of.pending().table().next_set(BlockIndex(0)).is_none()),
            Work::Resync | Work::Discards => true,
        };
        if done == Outcome::Done && !is_over() { Err("some blocks are left; resume it".to_owned()) } else { Ok(done) }
    }

    /// Lets a version go when `grace` has drained ([`Disk::begin_retire`]).
    ///
    /// # Errors
    /// When a block cannot be moved to where the live version needs it; begin again when that can be done.
    pub fn retire(&self, id: VersionId, grace: Epoch, pace: &Arc<Pace>) -> Result<Retired, String> {
        let (open, pace, editor) = (self.open(), pace.clone(), self.engine.editor.clone());
        let chain = open.disk.chain();
        let Some(index) = chain.position(id) else { return Ok(Retired::Gone(None)) };
        let version = chain.version(index).clone();
        if let (true, Backing::One(image), None) =
            (chain.layer(index).is_full(), &chain.layer(index).image, chain.heir_of_pivot(index))
        {
            *locked(&open.left_leg) = Some(image.clone());
        }
        let (disk, of) = (open.disk.clone(), version.clone());
        let done = self.engine.on_ring(async move |queue| job::retire(queue, editor, disk, of, grace, pace).await);
        match done.map_err(|e| e.to_string())? {
            Outcome::Stopped => Ok(Retired::Stopped),
            Outcome::Done => Ok(Retired::Gone(version.broken().map(str::to_owned))),
        }
    }
}
