//! A frontend: blkio, with memory for its requests and sectors that say who wrote them.
//!
//! A sector is a tag, repeated; zero is what was never written.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, ReqFlags};

pub(crate) const SECTOR: usize = 512;
/// The room of one request.
pub(crate) const SLOT: usize = 256 << 10;
/// How many requests a queue can have at once.
pub(crate) const SLOTS: usize = 32;
const ANSWER: Duration = Duration::from_secs(60);

/// A connection. Its queues can be taken to threads of their own.
pub(crate) struct Client {
    // Before the connection, so that they go first.
    pub(crate) queues: Vec<Queue>,
    blkio: Blkio,
    size: u64,
}

/// One queue and its memory.
pub(crate) struct Queue {
    queue: Blkioq,
    memory: *mut u8,
    in_flight: usize,
}

// SAFETY: the memory is a shared mapping that lives as long as the queue's region registry, and only this value uses it.
unsafe impl Send for Queue {}

impl Client {
    pub(crate) fn connect(socket: &Path, queues: usize, read_only: bool) -> Result<Client, String> {
        let text = |e: blkio::Error| format!("{}: {e}", socket.display());
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(text)?;
        blkio.set_str("path", socket.to_str().unwrap()).map_err(text)?;
        blkio.set_bool("read-only", read_only).map_err(text)?;
        blkio.connect().map_err(text)?;
        blkio.set_i32("num-queues", queues as i32).map_err(text)?;
        blkio.set_i32("queue-size", 128).map_err(text)?;
        let started = blkio.start().map_err(text)?;
        let size = blkio.get_u64("capacity").map_err(text)?;
        let region = blkio.alloc_mem_region(queues * SLOTS * SLOT).map_err(text)?;
        blkio.map_mem_region(&region).map_err(text)?;
        let queue = |(i, queue)| Queue { queue, memory: (region.addr + i * SLOTS * SLOT) as *mut u8, in_flight: 0 };
        Ok(Client { queues: started.queues.into_iter().enumerate().map(queue).collect(), blkio, size })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn sectors(&self) -> usize {
        self.size as usize / SECTOR
    }

    pub(crate) fn request_alignment(&self) -> i32 {
        self.blkio.get_i32("request-alignment").unwrap()
    }

    fn q(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }

    /// Writes a tag to some sectors, and waits.
    #[track_caller]
    pub(crate) fn write(&mut self, sectors: Range<usize>, tag: u64) {
        self.q().write(sectors, tag);
    }

    #[track_caller]
    pub(crate) fn read(&mut self, sectors: Range<usize>) -> Vec<u8> {
        self.q().read(sectors)
    }

    #[track_caller]
    pub(crate) fn tag(&mut self, sector: usize) -> u64 {
        tag_of(&self.read(sector..sector + 1)).unwrap()
    }

    #[track_caller]
    pub(crate) fn zero(&mut self, sectors: Range<usize>, unmap: bool) {
        self.q().submit_zeroes(0, sectors, unmap);
        assert_eq!(self.q().wait_one(), (0, 0));
    }

    #[track_caller]
    pub(crate) fn discard(&mut self, sectors: Range<usize>) {
        self.q().submit_discard(0, sectors);
        assert_eq!(self.q().wait_one(), (0, 0));
    }

    #[track_caller]
    pub(crate) fn flush(&mut self) {
        self.q().submit_flush(0);
        assert_eq!(self.q().wait_one(), (0, 0));
    }

    /// All bytes of the disk.
    #[track_caller]
    pub(crate) fn read_all(&mut self) -> Vec<u8> {
        let sectors = self.sectors();
        self.read(0..sectors)
    }
}

impl Queue {
    /// The memory of a slot; no request may be using it.
    fn slot(&mut self, slot: usize, len: usize) -> &mut [u8] {
        assert!(slot < SLOTS && len <= SLOT);
        // SAFETY: inside this queue's part of the mapping; the caller has no request on this slot.
        unsafe { std::slice::from_raw_parts_mut(self.memory.add(slot * SLOT), len) }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn submit_write(&mut self, slot: usize, sectors: Range<usize>, tag: u64, durable: bool) {
        let len = sectors.len() * SECTOR;
        let buffer = self.slot(slot, len);
        buffer.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&tag.to_le_bytes()));
        let (from, at) = (buffer.as_ptr(), (sectors.start * SECTOR) as u64);
        let flags = if durable { ReqFlags::FUA } else { ReqFlags::empty() };
        self.queue.write(at, from, len, slot, flags);
        self.submitted();
    }

    pub(crate) fn submit_read(&mut self, slot: usize, sectors: Range<usize>) {
        let len = sectors.len() * SECTOR;
        let buffer = self.slot(slot, len);
        buffer.fill(0xa5);
        let (into, at) = (buffer.as_mut_ptr(), (sectors.start * SECTOR) as u64);
        self.queue.read(at, into, len, slot, ReqFlags::empty());
        self.submitted();
    }

    pub(crate) fn submit_zeroes(&mut self, slot: usize, sectors: Range<usize>, unmap: bool) {
        let flags = if unmap { ReqFlags::empty() } else { ReqFlags::NO_UNMAP };
        self.queue.write_zeroes((sectors.start * SECTOR) as u64, (sectors.len() * SECTOR) as u64, slot, flags);
        self.submitted();
    }

    pub(crate) fn submit_discard(&mut self, slot: usize, sectors: Range<usize>) {
        let (at, len) = ((sectors.start * SECTOR) as u64, (sectors.len() * SECTOR) as u64);
        self.queue.discard(at, len, slot, ReqFlags::empty());
        self.submitted();
    }

    pub(crate) fn submit_flush(&mut self, slot: usize) {
        self.queue.flush(slot, ReqFlags::empty());
        self.submitted();
    }

    /// Tells the daemon at once.
    fn submitted(&mut self) {
        self.in_flight += 1;
        self.queue.do_io(&mut [], 0, None, None).unwrap();
    }

    /// What a read put into its slot.
    pub(crate) fn bytes(&mut self, slot: usize, len: usize) -> &[u8] {
        self.slot(slot, len)
    }

    /// Answers that are there, after waiting up to `patience` for the first: slot and result.
    pub(crate) fn answers(&mut self, patience: Duration) -> Vec<(usize, i32)> {
        let mut out: [MaybeUninit<Completion>; SLOTS] = [const { MaybeUninit::uninit() }; SLOTS];
        let least = usize::from(self.in_flight > 0 && !patience.is_zero());
        let mut timeout = patience;
        let timeout = (least > 0).then_some(&mut timeout);
        let Ok(got) = self.queue.do_io(&mut out, least, timeout, None) else { return Vec::new() };
        self.in_flight -= got;
        // SAFETY: do_io has filled the first `got`.
        out[..got].iter().map(|c| unsafe { c.assume_init_ref() }).map(|c| (c.user_data, c.ret)).collect()
    }

    /// Waits for the answer to the only request.
    #[track_caller]
    pub(crate) fn wait_one(&mut self) -> (usize, i32) {
        let answers = self.answers(ANSWER);
        assert_eq!(answers.len(), 1, "one answer was waited for");
        answers[0]
    }

    #[track_caller]
    pub(crate) fn write(&mut self, sectors: Range<usize>, tag: u64) {
        let step = SLOT / SECTOR;
        for from in sectors.clone().step_by(step) {
            self.submit_write(0, from..sectors.end.min(from + step), tag, false);
            assert_eq!(self.wait_one(), (0, 0), "write of {sectors:?}");
        }
    }

    /// As [`Queue::write`], for when the daemon may be gone: whether it was acknowledged.
    pub(crate) fn try_write(&mut self, sectors: Range<usize>, tag: u64, patience: Duration) -> bool {
        self.submit_write(0, sectors, tag, false);
        self.answers(patience) == [(0, 0)]
    }

    #[track_caller]
    pub(crate) fn read(&mut self, sectors: Range<usize>) -> Vec<u8> {
        let (mut all, step) = (Vec::new(), SLOT / SECTOR);
        for from in sectors.clone().step_by(step) {
            let part = from..sectors.end.min(from + step);
            self.submit_read(0, part.clone());
            assert_eq!(self.wait_one(), (0, 0), "read of {part:?}");
            all.extend_from_slice(self.bytes(0, part.len() * SECTOR));
        }
        all
    }
}

/// The tag of a sector; None when it is torn.
pub(crate) fn tag_of(sector: &[u8]) -> Option<u64> {
    assert_eq!(sector.len(), SECTOR);
    let mut words = sector.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap()));
    let first = words.next()?;
    words.all(|w| w == first).then_some(first)
}

/// The tags of all sectors.
#[track_caller]
pub(crate) fn tags(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(SECTOR).map(|s| tag_of(s).expect("no sector is torn")).collect()
}
