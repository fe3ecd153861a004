//! What one socket serves: a version of a disk, and the requests on it.
//!
//! What always holds: a request is inside the disk, and a frozen version takes no change.

use std::sync::Arc;

use super::chain::Target;
use super::geometry::usize_of;
use super::write::Data;
use super::{Connection, Disk, EpochLane, Geometry, GuestQueue, Request, RequestError, Ticket, VersionId};
use crate::image::{ByteOffset, GuestBuf, IoQueue};

/// What one socket serves: the live version of a disk, or a frozen one.
#[derive(Clone)]
pub struct Attachment {
    disk: Arc<Disk>,
    target: Target,
    connection: Option<Arc<Connection>>,
}

impl Disk {
    /// The live version (VLUN B), to be served.
    #[must_use]
    pub fn attach_live(self: &Arc<Disk>) -> Attachment {
        Attachment { disk: self.clone(), target: Target::Live, connection: None }
    }

    /// A frozen version (VLUN A), to be served read-only. It should be quiesced.
    #[must_use]
    pub fn attach_frozen(self: &Arc<Disk>, version: VersionId) -> Attachment {
        Attachment { disk: self.clone(), target: Target::Frozen(version), connection: None }
    }
}

impl Attachment {
    /// The disk behind it.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Size and block sizes of what is served, at this moment: the live version may grow.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        let whole = self.disk.geometry();
        match self.target {
            Target::Live => whole,
            Target::Frozen(version) => Geometry { size_bytes: self.disk.size_of(version), ..whole },
        }
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.disk.is_read_only() || self.target != Target::Live
    }

    /// The same for one frontend's connection, which ends when this and all its clones and lanes are gone. A frozen
    /// version does not ask who reads it.
    #[must_use]
    pub fn connect(&self) -> Attachment {
        let connection = (self.target == Target::Live).then(|| self.disk.connections.join());
        Attachment { disk: self.disk.clone(), target: self.target, connection }
    }

    /// Where a worker says that it is at work for the guest, one for each worker. A backup is no guest.
    #[must_use]
    pub fn guest_queue(&self) -> Option<GuestQueue> {
        (self.target == Target::Live).then(|| self.disk.background.guest_queue())
    }

    /// A way into the epochs, one for each worker.
    #[must_use]
    pub fn lane(&self) -> EpochLane {
        match &self.connection {
            Some(connection) => connection.lane(),
            None => self.disk.clock.lane(),
        }
    }

    /// Executes one request. The caller keeps the ticket until this has finished and is recorded.
    ///
    /// # Errors
    /// When the request does not fit the disk or cannot be carried out; the guest gets an I/O error.
    pub async fn execute(&self, queue: &IoQueue, ticket: &Ticket, request: Request) -> Result<(), RequestError> {
        let disk = &*self.disk;
        // Also what would not read it: half a volume is no volume.
        if let Some(reason) = disk.base_broken() {
            return Err(RequestError::Broken(reason));
        }
        match request {
            Request::Read { at, into } => {
                self.check(at, into.len() as u64)?;
                // A backup's. What volumes read of a frozen version is their own guests'.
                if self.target != Target::Live && disk.yields() {
                    return Box::pin(self.read_in_turns(queue, ticket, at, into)).await;
                }
                disk.read(queue, self.target, ticket.epoch(), at, into).await
            }
            Request::Write { at, from, durable } => {
                self.check_change(at, from.len() as u64)?;
                disk.write(queue, ticket, at, Data::Guest(from), durable).await
            }
            Request::WriteZeroes { at, len, unmap, durable } => {
                self.check_change(at, len)?;
                disk.write(queue, ticket, at, Data::Zeros { len, unmap }, durable).await
            }
            Request::Discard { at, len } => {
                self.check_change(at, len)?;
                Box::pin(disk.discard(queue, ticket.epoch(), at, len)).await
            }
            Request::Flush if self.target == Target::Live => Box::pin(disk.flush(queue, ticket.epoch())).await,
            Request::Flush => Ok(()),
        }
    }

    /// Reads piece by piece beside a guest that is at work. A frozen version is the same for all of them.
    async fn read_in_turns(
        &self,
        queue: &IoQueue,
        ticket: &Ticket,
        at: ByteOffset,
        into: GuestBuf,
    ) -> Result<(), RequestError> {
        let (mut done, len) = (0, into.len() as u64);
        while done < len {
            let turn = self.disk.background_turn(len - done, 1).await;
            let piece = into.slice(usize_of(done)..usize_of(done + turn.bytes()));
            self.disk.read(queue, self.target, ticket.epoch(), at.add(done), piece).await?;
            done += turn.bytes();
        }
        Ok(())
    }

    fn check(&self, at: ByteOffset, len: u64) -> Result<(), RequestError> {
        let size = self.geometry().size_bytes;
        let fits = at.0.checked_add(len).is_some_and(|end| end <= size);
        if fits && at.0.is_multiple_of(512) && len.is_multiple_of(512) {
            Ok(())
        } else {
            Err(RequestError::OutOfRange { at, len, size })
        }
    }

    fn check_change(&self, at: ByteOffset, len: u64) -> Result<(), RequestError> {
        if self.is_read_only() { Err(RequestError::ReadOnly) } else { self.check(at, len) }
    }
}
