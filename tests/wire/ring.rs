//! A driver that writes rings by hand: any descriptor, any index.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;

pub const F_FLUSH: u64 = 1 << 9;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_PROTOCOL: u64 = 1 << 30;

pub const MEMORY_BYTES: u64 = 64 << 20;
pub const GUEST_BASE: u64 = 0x10_0000;
pub const ENTRIES: u16 = 256;

/// Guest addresses that the helpers use.
pub const HEADER: u64 = GUEST_BASE + 0x20_0000;
pub const STATUS: u64 = GUEST_BASE + 0x20_1000;
pub const TABLE: u64 = GUEST_BASE + 0x20_2000;
pub const DATA: u64 = GUEST_BASE + 0x30_0000;
const QUEUE_STRIDE: u64 = 0x1_0000;
/// The parts of a ring of up to 2048 entries, behind its descriptors. Larger ones have room for one queue.
const AVAIL: u64 = 0x8000;
const USED: u64 = 0x2000;

/// Memory that guest and backend share.
pub struct GuestMemory {
    pub file: File,
    mapping: MmapRegion,
    base: u64,
}

impl GuestMemory {
    pub fn new(base: u64, len: u64) -> GuestMemory {
        let file = memfd(len).unwrap();
        let mapping = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), len as usize).unwrap();
        GuestMemory { file, mapping, base }
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.base,
            memory_size: self.mapping.size() as u64,
            userspace_addr: self.mapping.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn place(&self, at: u64, len: usize) -> *mut u8 {
        let offset = (at - self.base) as usize;
        assert!(offset + len <= self.mapping.size(), "the test writes outside its own memory");
        self.mapping.as_ptr().wrapping_add(offset)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        // SAFETY: place() checked the range of a mapping that self owns.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.place(at, bytes.len()), bytes.len()) }
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        // SAFETY: as in write.
        unsafe { std::ptr::copy_nonoverlapping(self.place(at, len), out.as_mut_ptr(), len) }
        out
    }

    pub fn user(&self, at: u64) -> u64 {
        self.mapping.as_ptr() as u64 + (at - self.base)
    }

    pub fn word(&self, at: u64) -> &AtomicU16 {
        // SAFETY: place() checked the range; the rings are aligned; the mapping lives as long as self.
        unsafe { AtomicU16::from_ptr(self.place(at, 2).cast()) }
    }
}

/// One queue, driven by hand.
pub struct Queue {
    pub at: u64,
    pub entries: u16,
    pub next_avail: u16,
    pub last_used: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
}

impl Queue {
    fn avail(&self) -> u64 {
        self.at + AVAIL.max(u64::from(self.entries) * 16)
    }

    fn used(&self) -> u64 {
        self.avail() + USED.max(u64::from(self.entries) * 2 + 0x1000)
    }
}

/// A frontend with a guest of its own.
pub struct Guest {
    pub frontend: Frontend,
    pub memory: GuestMemory,
    pub queues: Vec<Queue>,
    pub features: u64,
}

impl Guest {
    /// Connects and negotiates everything; no memory, no queue.
    pub fn connect(socket: &Path, without: u64) -> Guest {
        let mut frontend = Frontend::connect(socket, 16).unwrap();
        let features = frontend.get_features().unwrap() & !without;
        frontend.set_owner().unwrap();
        frontend.set_features(features).unwrap();
        if features & F_PROTOCOL != 0 {
            let protocol = frontend.get_protocol_features().unwrap();
            frontend.set_protocol_features(protocol & !VhostUserProtocolFeatures::STATUS).unwrap();
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let memory = GuestMemory::new(GUEST_BASE, MEMORY_BYTES);
        Guest { frontend, memory, queues: Vec::new(), features }
    }

    /// A guest with `queues` running queues.
    pub fn new(socket: &Path, queues: usize) -> Guest {
        Guest::with(socket, queues, 0)
    }

    /// The same, without some features.
    pub fn with(socket: &Path, queues: usize, without: u64) -> Guest {
        let mut guest = Guest::connect(socket, without);
        guest.frontend.set_mem_table(&[guest.memory.region()]).unwrap();
        for index in 0..queues {
            guest.add_queue(index, ENTRIES);
            guest.start_queue(index, 0);
        }
        guest
    }

    pub fn add_queue(&mut self, index: usize, entries: u16) {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let at = GUEST_BASE + index as u64 * QUEUE_STRIDE;
        let (kick, call, err) = (event(), event(), event());
        self.queues.push(Queue { at, entries, next_avail: 0, last_used: 0, kick, call, err });
    }

    pub fn ring_config(&self, queue: usize) -> VringConfigData {
        let q = &self.queues[queue];
        VringConfigData {
            queue_max_size: q.entries,
            queue_size: q.entries,
            flags: 0,
            desc_table_addr: self.memory.user(q.at),
            used_ring_addr: self.memory.user(q.used()),
            avail_ring_addr: self.memory.user(q.avail()),
            log_addr: None,
        }
    }

    pub fn start_queue(&mut self, queue: usize, base: u16) {
        let config = self.ring_config(queue);
        let q = &self.queues[queue];
        let f = &mut self.frontend;
        f.set_vring_num(queue, q.entries).unwrap();
        f.set_vring_base(queue, base).unwrap();
        f.set_vring_addr(queue, &config).unwrap();
        f.set_vring_call(queue, &q.call).unwrap();
        f.set_vring_err(queue, &q.err).unwrap();
        f.set_vring_kick(queue, &q.kick).unwrap();
        if self.features & F_PROTOCOL != 0 {
            f.set_vring_enable(queue, true).unwrap();
        }
    }

    pub fn descriptor(&self, queue: usize, index: u16, (at, len, flags, next): (u64, u32, u16, u16)) {
        self.memory.write(self.queues[queue].at + u64::from(index) * 16, &encode((at, len, flags, next)));
    }

    /// Writes a chain of descriptors from `head` on, linked in order. Flags other than NEXT are the caller's.
    pub fn chain(&self, queue: usize, head: u16, pieces: &[(u64, u32, u16)]) -> u16 {
        for (i, &(at, len, flags)) in pieces.iter().enumerate() {
            let index = head + i as u16;
            let next = if i + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(queue, index, (at, len, flags | next, index + 1));
        }
        head
    }

    pub fn header(&self, kind: u32, sector: u64) {
        self.header_at(HEADER, kind, sector);
    }

    pub fn header_at(&self, at: u64, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[0..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        self.memory.write(at, &bytes);
    }

    /// Puts a head on the avail ring, without a kick.
    pub fn announce(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let entry = q.avail() + 4 + u64::from(q.next_avail % q.entries) * 2;
        self.memory.word(entry).store(head, Ordering::Relaxed);
        q.next_avail = q.next_avail.wrapping_add(1);
        self.memory.word(q.avail() + 2).store(q.next_avail, Ordering::Release);
    }

    pub fn set_avail_index(&self, queue: usize, value: u16) {
        self.memory.word(self.queues[queue].avail() + 2).store(value, Ordering::Release);
    }

    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    pub fn submit(&mut self, queue: usize, head: u16) {
        self.announce(queue, head);
        self.kick(queue);
    }

    /// Asks to be called when the used index passes `index`.
    pub fn set_used_event(&self, queue: usize, index: u16) {
        let q = &self.queues[queue];
        self.memory.word(q.avail() + 4 + u64::from(q.entries) * 2).store(index, Ordering::SeqCst);
    }

    /// Asks not to be called, or to be called, without event indices.
    pub fn set_avail_flags(&self, queue: usize, flags: u16) {
        self.memory.word(self.queues[queue].avail()).store(flags, Ordering::SeqCst);
    }

    /// Whether the device asks not to be kicked, without event indices.
    pub fn used_flags(&self, queue: usize) -> u16 {
        self.memory.word(self.queues[queue].used()).load(Ordering::SeqCst)
    }

    /// What the device asks to be kicked for.
    pub fn avail_event(&self, queue: usize) -> u16 {
        let q = &self.queues[queue];
        fence(Ordering::SeqCst);
        self.memory.word(q.used() + 4 + u64::from(q.entries) * 8).load(Ordering::SeqCst)
    }

    pub fn used_index(&self, queue: usize) -> u16 {
        self.memory.word(self.queues[queue].used() + 2).load(Ordering::Acquire)
    }

    pub fn used_at(&self, queue: usize) -> u64 {
        self.queues[queue].used() + 2
    }

    pub fn avail_index(&self, queue: usize) -> u16 {
        self.memory.word(self.queues[queue].avail() + 2).load(Ordering::Acquire)
    }

    /// The next used entry, if there is one.
    pub fn poll_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let index = self.used_index(queue);
        let q = &mut self.queues[queue];
        if index == q.last_used {
            return None;
        }
        let entry = self.memory.read(q.used() + 4 + u64::from(q.last_used % q.entries) * 8, 8);
        q.last_used = q.last_used.wrapping_add(1);
        let part = |i: usize| u32::from_le_bytes(entry[i..i + 4].try_into().unwrap());
        Some((part(0), part(4)))
    }

    /// The next used entry.
    pub fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        self.wait_used_for(queue, Duration::from_secs(10)).expect("no answer within 10 s")
    }

    pub fn wait_used_for(&mut self, queue: usize, timeout: Duration) -> Option<(u32, u32)> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(entry) = self.poll_used(queue) {
                return Some(entry);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    pub fn status(&self) -> u8 {
        self.memory.read(STATUS, 1)[0]
    }

    /// Runs one request to its end: status and used length.
    pub fn run(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.run_on(0, kind, sector, data)
    }

    pub fn run_on(&mut self, queue: usize, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.header(kind, sector);
        self.memory.write(STATUS, &[0xaa]);
        let mut pieces = vec![(HEADER, 16, 0)];
        pieces.extend_from_slice(data);
        pieces.push((STATUS, 1, WRITE));
        let head = self.chain(queue, 0, &pieces);
        self.submit(queue, head);
        let (id, len) = self.wait_used(queue);
        assert_eq!(id, u32::from(head));
        (self.status(), len)
    }

    pub fn read_sectors(&mut self, sector: u64, len: usize) -> Vec<u8> {
        assert_eq!(self.run(T_IN, sector, &[(DATA, len as u32, WRITE)]), (S_OK, len as u32 + 1));
        self.memory.read(DATA, len)
    }

    pub fn write_sectors(&mut self, sector: u64, bytes: &[u8]) {
        self.memory.write(DATA, bytes);
        assert_eq!(self.run(T_OUT, sector, &[(DATA, bytes.len() as u32, 0)]), (S_OK, 1));
    }

    /// Whether the ring's error event was signalled.
    pub fn is_broken(&self, queue: usize) -> bool {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if self.queues[queue].err.read().is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        false
    }
}

/// A descriptor's bytes.
pub fn encode((at, len, flags, next): (u64, u32, u16, u16)) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..8].copy_from_slice(&at.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..16].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// One segment of a discard or write-zeroes request.
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..16].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// A file in memory, as frontends share.
pub fn memfd(len: u64) -> std::io::Result<File> {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?;
    let file = File::from(fd);
    file.set_len(len)?;
    Ok(file)
}
