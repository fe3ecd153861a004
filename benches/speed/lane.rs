//! One queue of a backend, with memory for its requests: a virtqueue through blkio, or an io_uring on the file itself.
//!
//! The loop that drives it is the same for both. Memory is mapped once, before anything is measured.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use io_uring::{IoUring, opcode, types};

use crate::Result;
use crate::random::Rng;

/// The most requests of one queue at a time.
pub(crate) const DEPTH_MAX: usize = 128;
/// The memory of one queue's requests. They lie side by side: a wide stride would share few sets of the caches.
const LANE_BYTES: usize = 4 << 20;
/// The longest that any request may take, if nothing else is said.
const ANSWER: Duration = Duration::from_secs(30);

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    Read,
    Write,
    /// A write, and a sync before the next one.
    SyncedWrite,
}

/// Where the queues of a connection come from.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// A vhost-user-blk socket.
    Socket(PathBuf),
    /// A file, by io_uring and `O_DIRECT`.
    File(PathBuf),
}

/// A connection with its queues. Queues can be taken to threads of their own for the time of a round.
pub(crate) struct Connection {
    // Before what they are queues of, so that they go first.
    pub(crate) lanes: Vec<Lane>,
    _blkio: Option<Blkio>,
    _memory: Option<Memory>,
    pub(crate) bytes: u64,
}

/// One queue.
pub(crate) struct Lane {
    inner: Inner,
    /// `LANE_BYTES`, of which this lane's requests are the only users.
    memory: *mut u8,
    /// How long a request may take before the backend counts as dead.
    pub(crate) patience: Duration,
}

enum Inner {
    Queue(Blkioq),
    File { file: File, ring: Option<Box<IoUring>> },
}

// SAFETY: the memory is a mapping that the Connection keeps for longer than its lanes, and only this lane uses its part.
unsafe impl Send for Lane {}

/// An anonymous mapping, for requests that need no vhost-user.
struct Memory {
    at: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: it only owns the mapping, until it is dropped; which thread does that makes no difference.
unsafe impl Send for Memory {}

impl Memory {
    fn new(bytes: usize) -> Result<Memory> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping touches nothing else.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Memory { at, bytes })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping of new(); lanes that point into it are dropped before it.
        unsafe { libc::munmap(self.at, self.bytes) };
    }
}

impl Connection {
    /// Opens this many queues.
    pub(crate) fn open(target: &Target, queues: usize) -> Result<Connection> {
        match target {
            Target::Socket(path) => Connection::to_socket(path, queues, false),
            Target::File(path) => Connection::to_file(path, queues),
        }
    }

    /// Opens a snapshot's socket.
    pub(crate) fn to_socket(path: &Path, queues: usize, read_only: bool) -> Result<Connection> {
        let text = |e: blkio::Error| format!("{}: {e}", path.display());
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(text)?;
        blkio.set_str("path", path.to_str().ok_or("a path that is not UTF-8")?).map_err(text)?;
        blkio.set_bool("read-only", read_only).map_err(text)?;
        blkio.connect().map_err(text)?;
        blkio.set_i32("num-queues", i32::try_from(queues)?).map_err(text)?;
        blkio.set_i32("queue-size", 256).map_err(text)?;
        let started = blkio.start().map_err(text)?;
        let bytes = blkio.get_u64("capacity").map_err(text)?;
        let region = blkio.alloc_mem_region(queues * LANE_BYTES).map_err(text)?;
        blkio.map_mem_region(&region).map_err(text)?;
        let lane = |(i, queue)| Lane::new(Inner::Queue(queue), (region.addr + i * LANE_BYTES) as *mut u8);
        let lanes = started.queues.into_iter().enumerate().map(lane).collect();
        Ok(Connection { lanes, _blkio: Some(blkio), _memory: None, bytes })
    }

    fn to_file(path: &Path, queues: usize) -> Result<Connection> {
        use std::os::unix::fs::OpenOptionsExt;
        let memory = Memory::new(queues * LANE_BYTES)?;
        let mut lanes = Vec::new();
        let mut bytes = 0;
        for i in 0..queues {
            let file = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
            let file = file.map_err(|e| format!("{}: {e}", path.display()))?;
            bytes = file.metadata()?.len();
            let at = memory.at.cast::<u8>().wrapping_add(i * LANE_BYTES);
            lanes.push(Lane::new(Inner::File { file, ring: None }, at));
        }
        Ok(Connection { lanes, _blkio: None, _memory: Some(memory), bytes })
    }
}

impl Lane {
    fn new(inner: Inner, memory: *mut u8) -> Lane {
        // SAFETY: this lane's part of the mapping, which has no requests yet.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory, LANE_BYTES) };
        Rng::new(memory as u64).fill(bytes);
        Lane { inner, memory, patience: ANSWER }
    }

    /// In the thread that will drive it, before the clock starts.
    pub(crate) fn prepare(&mut self) -> Result<()> {
        if let Inner::File { ring, .. } = &mut self.inner {
            // As the daemon's own rings. A ring with a single issuer belongs to the thread that made it.
            let built = IoUring::builder()
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .build(DEPTH_MAX as u32)?;
            *ring = Some(Box::new(built));
        }
        Ok(())
    }

    /// In the thread that drove it, after its last request was answered.
    pub(crate) fn finish(&mut self) {
        if let Inner::File { ring, .. } = &mut self.inner {
            *ring = None;
        }
    }

    /// Queues a request on a slot that has none. It goes out with the next wait.
    pub(crate) fn submit(&mut self, op: Op, offset: u64, bytes: usize, slot: usize) -> Result<()> {
        assert!(slot < DEPTH_MAX && (slot + 1) * bytes <= LANE_BYTES);
        let at = self.memory.wrapping_add(slot * bytes);
        match (&mut self.inner, op) {
            (Inner::Queue(queue), Op::Read) => queue.read(offset, at, bytes, slot, ReqFlags::empty()),
            (Inner::Queue(queue), Op::Write) => queue.write(offset, at, bytes, slot, ReqFlags::empty()),
            // The device knows no such flag: blkio sends a flush after the write, and answers when that is done.
            (Inner::Queue(queue), Op::SyncedWrite) => queue.write(offset, at, bytes, slot, ReqFlags::FUA),
            (Inner::File { file, ring }, op) => {
                let (fd, len) = (types::Fd(file.as_raw_fd()), u32::try_from(bytes)?);
                let entry = match op {
                    Op::Read => opcode::Read::new(fd, at, len).offset(offset).build(),
                    Op::Write => opcode::Write::new(fd, at, len).offset(offset).build(),
                    Op::SyncedWrite => opcode::Write::new(fd, at, len).offset(offset).rw_flags(libc::RWF_DSYNC).build(),
                };
                let ring = ring.as_mut().ok_or("the lane was not prepared")?;
                // SAFETY: the slot's memory outlives the lane, and the caller has no other request on it.
                unsafe { ring.submission().push(&entry.user_data(slot as u64)) }?;
            }
        }
        Ok(())
    }

    /// Sends what was queued, waits for at least one answer and hands over the slots of all that are there.
    ///
    /// # Errors
    /// When a request fails, or none is answered for long.
    pub(crate) fn wait(&mut self, bytes: usize, done: &mut Vec<usize>) -> Result<()> {
        done.clear();
        match &mut self.inner {
            Inner::Queue(queue) => {
                let mut out: [MaybeUninit<Completion>; DEPTH_MAX] = [const { MaybeUninit::uninit() }; DEPTH_MAX];
                let mut patience = self.patience;
                let got = queue.do_io(&mut out, 1, Some(&mut patience), None).map_err(|e| format!("no answer: {e}"))?;
                for completion in &out[..got] {
                    // SAFETY: do_io has filled the first `got`.
                    let completion = unsafe { completion.assume_init_ref() };
                    if completion.ret != 0 {
                        return Err(format!("a request failed: {}", completion.ret).into());
                    }
                    done.push(completion.user_data);
                }
            }
            Inner::File { ring, .. } => {
                let ring = ring.as_mut().ok_or("the lane was not prepared")?;
                loop {
                    match ring.submit_and_wait(1) {
                        Ok(_) => break,
                        Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                for entry in ring.completion() {
                    if usize::try_from(entry.result()) != Ok(bytes) {
                        return Err(format!("a request ended with {}", entry.result()).into());
                    }
                    done.push(entry.user_data() as usize);
                }
            }
        }
        Ok(())
    }
}
