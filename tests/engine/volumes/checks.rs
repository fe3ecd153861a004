//! What the random trees of volumes show, and what the engine says of them, against the arrays.

use super::{
    AlignedBuf, Attachment, BlockIndex, ByteOffset, ChangeSource, GuestBuf, NoChanges, Rc, RefCell, Request,
    RequestError, SECTOR, SECTORS, Scheduler, Tree, tags,
};

impl Tree {
    pub(super) fn shown(&mut self, attachment: Attachment) -> Result<Vec<u64>, RequestError> {
        let (into, memory) = GuestBuf::from_owned(AlignedBuf::zeroed(SECTORS * SECTOR));
        let (answer, mut scheduler) = (Rc::new(RefCell::new(None)), Scheduler::default());
        let (put, queue, ticket) = (answer.clone(), self.queue.clone(), self.clock.lane().enter());
        scheduler.spawn(async move {
            let done = attachment.execute(&queue, &ticket, Request::Read { at: ByteOffset(0), into }).await;
            *put.borrow_mut() = Some(done);
        });
        assert!(scheduler.settle(&mut self.rng));
        answer.take().unwrap().map(|()| tags(&memory.to_vec()))
    }

    /// Every version of every disk and volume.
    pub(super) fn check(&mut self) {
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            let (id, live, disk) = (node.id, node.live.clone(), node.disk.clone());
            let frozen: Vec<_> = node.frozen.iter().map(|f| (f.version.id, f.bytes.clone())).collect();
            assert_eq!(self.shown(disk.attach_live()).unwrap(), live, "the live version of node {id}");
            for (version, bytes) in frozen {
                assert_eq!(self.shown(disk.attach_frozen(version)).unwrap(), bytes, "a frozen version of node {id}");
            }
        }
    }

    /// What differs between two moments of a disk or volume is in what the engine says has changed.
    pub(super) fn compare(&mut self) {
        for node in &self.nodes {
            let frozen = node.frozen.iter().filter(|f| f.version.is_quiesced()).map(|f| (f.version.id, &f.bytes));
            let ends: Vec<_> = node.origin.iter().map(|(id, bytes)| (*id, bytes)).chain(frozen).collect();
            for (i, (from, was)) in ends.iter().enumerate() {
                let later = ends[i + 1..].iter().map(|(to, is)| (Some(*to), *is));
                for (to, is) in later.chain([(None, &node.live)]) {
                    let changes = match node.disk.changes(*from, to) {
                        // Of an independent volume there is no older version to compare with, if nothing was noted.
                        Err(NoChanges::Unknown(_)) if node.disk.base().is_none() && node.is_origin(*from) => continue,
                        changes => changes.unwrap(),
                    };
                    self.counts.by_owners += u64::from(changes.source() == ChangeSource::Owned);
                    for sector in (0..SECTORS).filter(|&s| was[s] != is[s]) {
                        let block = BlockIndex(sector as u64 / 8);
                        assert!(changes.contains(block), "node {}: sector {sector} from {from} to {to:?}", node.id);
                    }
                }
            }
            if let Some((_, was)) = &node.origin {
                let owned = node.disk.owned_by_volume();
                let differs = |s: &usize| was[*s] != node.live[*s];
                let missing = (0..SECTORS)
                    .filter(differs)
                    .find(|&s| owned.as_ref().is_some_and(|owned| !owned.contains(BlockIndex(s as u64 / 8))));
                assert_eq!(missing, None, "node {}: a sector that it does not own differs", node.id);
                self.counts.compared += 1;
            }
        }
    }

    /// A discard gives the guest's own bytes away and nobody else's: they stay, or are zeros.
    pub(super) fn discard(&mut self) {
        let (at, sectors) = (self.rng.below(self.nodes.len()), self.range());
        let (offset, len) = (ByteOffset((sectors.start * SECTOR) as u64), (sectors.len() * SECTOR) as u64);
        let (attachment, mut scheduler) = (self.nodes[at].disk.attach_live(), Scheduler::default());
        self.start(&mut scheduler, attachment.clone(), Request::Discard { at: offset, len });
        assert!(scheduler.settle(&mut self.rng));
        let now = self.shown(attachment).unwrap();
        for (sector, (got, old)) in now.iter().zip(&self.nodes[at].live).enumerate() {
            assert!(got == old || *got == 0 && sectors.contains(&sector), "a discard: sector {sector} shows {got}");
        }
        self.counts.discarded += u64::from(now != self.nodes[at].live);
        self.nodes[at].live = now;
    }
}
