//! A simulated image, a server on it, and what must be true after every test.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use halfsilver::engine::{Disk, Epoch, EpochClock};
use halfsilver::image::{Alignment, Completion, Image, IoQueue, OpKind, OpTicket};
use halfsilver::vhost_user::{Direction, Hints, Observer, ServeOptions, ServerHandle, SocketSource, serve};

/// Tests count this process's descriptors and threads, so they run one at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A small generator whose whole state is printed when a test begins.
pub struct Random(pub u64);

impl Random {
    /// Seeded by HALFSILVER_SEED, or by the clock. Prints the seed: it shows when a test fails.
    pub fn new(test: &str) -> Random {
        let seed = std::env::var("HALFSILVER_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
        });
        println!("{test}: HALFSILVER_SEED={seed}");
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        bytes.iter_mut().for_each(|b| *b = self.next() as u8);
    }
}

/// An image in memory whose operations can be slow, and that remembers what was asked of it.
pub struct MemImage {
    pub bytes: Mutex<Vec<u8>>,
    pub delay_ms: AtomicU64,
    pub running: AtomicUsize,
    pub durable_writes: AtomicUsize,
    pub plain_writes: AtomicUsize,
    pub syncs: AtomicUsize,
    pub zeroes: AtomicUsize,
    /// Transfers that reach this position fail.
    pub fails_from: AtomicU64,
    poisoned: AtomicBool,
}

impl MemImage {
    pub fn new(len: usize) -> Arc<MemImage> {
        let mut bytes = vec![0; len];
        Random(0x5eed).fill(&mut bytes);
        Arc::new(MemImage {
            bytes: Mutex::new(bytes),
            delay_ms: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            durable_writes: AtomicUsize::new(0),
            plain_writes: AtomicUsize::new(0),
            syncs: AtomicUsize::new(0),
            zeroes: AtomicUsize::new(0),
            fails_from: AtomicU64::new(u64::MAX),
            poisoned: AtomicBool::new(false),
        })
    }

    pub fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn carry_out(&self, ticket: OpTicket) {
        let at = ticket.at().0 as usize;
        if (at + ticket.len()) as u64 > self.fails_from.load(Ordering::SeqCst) {
            self.running.fetch_sub(1, Ordering::SeqCst);
            return ticket.finish(Err(std::io::Error::from_raw_os_error(libc::EIO)));
        }
        let mut bytes = self.bytes.lock().unwrap();
        let n = match ticket.kind() {
            OpKind::Read => {
                ticket.copy_in(&bytes[at..at + ticket.len()]);
                ticket.len()
            }
            OpKind::Write { durable } => {
                let data = ticket.copy_out();
                bytes[at..at + data.len()].copy_from_slice(&data);
                let counter = if durable { &self.durable_writes } else { &self.plain_writes };
                counter.fetch_add(1, Ordering::SeqCst);
                data.len()
            }
            OpKind::Zero { len, .. } => {
                bytes[at..at + len as usize].fill(0);
                self.zeroes.fetch_add(1, Ordering::SeqCst);
                0
            }
            OpKind::Sync => {
                self.syncs.fetch_add(1, Ordering::SeqCst);
                0
            }
            OpKind::Event | OpKind::Timeout => unreachable!(),
        };
        drop(bytes);
        self.running.fetch_sub(1, Ordering::SeqCst);
        ticket.finish(Ok(n));
    }
}

/// An operation that waits for its time.
struct Late {
    image: *const MemImage,
    held: Mutex<Option<(OpTicket, Pin<Box<Completion>>)>>,
}

// SAFETY: made, woken and dropped on the one thread that owns the queue; the image outlives the server's threads.
unsafe impl Send for Late {}
// SAFETY: as for Send.
unsafe impl Sync for Late {}

impl Wake for Late {
    fn wake(self: Arc<Self>) {
        if let Some((ticket, timer)) = self.held.lock().unwrap().take() {
            drop(timer);
            // SAFETY: tests keep the image until the server has stopped, which waits for this operation.
            unsafe { &*self.image }.carry_out(ticket);
        }
    }
}

impl Image for MemImage {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    fn alignment(&self) -> Alignment {
        Alignment { offset_bytes: 1, memory_bytes: 1 }
    }
    fn start(&self, queue: &IoQueue, ticket: OpTicket) {
        self.running.fetch_add(1, Ordering::SeqCst);
        let delay_ms = self.delay_ms.load(Ordering::SeqCst);
        if delay_ms == 0 {
            return self.carry_out(ticket);
        }
        let mut timer = Box::pin(queue.sleep(Duration::from_millis(delay_ms)));
        let late = Arc::new(Late { image: self, held: Mutex::new(None) });
        let waker = Waker::from(late.clone());
        assert!(timer.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        *late.held.lock().unwrap() = Some((ticket, timer));
    }
    fn path(&self) -> &Path {
        Path::new("memory")
    }
    fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }
    fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
    }
}

/// Counts what it is told.
#[derive(Default)]
pub struct Counting {
    pub connected: AtomicUsize,
    pub disconnected: AtomicUsize,
    pub requests: Mutex<BTreeMap<&'static str, u64>>,
}

impl Observer for Counting {
    fn connected(&self) {
        self.connected.fetch_add(1, Ordering::SeqCst);
    }
    fn disconnected(&self) {
        self.disconnected.fetch_add(1, Ordering::SeqCst);
    }
    fn request_done(&self, _queue: usize, direction: Direction, _bytes: u64, _ok: bool, _latency: Duration) {
        *self.requests.lock().unwrap().entry(direction.name()).or_default() += 1;
    }
}

/// A server on a simulated image.
pub struct TestServer {
    pub handle: ServerHandle,
    pub disk: Arc<Disk>,
    pub image: Arc<MemImage>,
    pub observer: Arc<Counting>,
    pub clock: EpochClock,
    dir: tempfile::TempDir,
}

pub const SERIAL: &str = "serial-0123456789";
pub const DISK_BYTES: usize = 4 << 20;

impl TestServer {
    pub fn new(queues: u16, read_only: bool) -> TestServer {
        TestServer::shared(queues, read_only, 1)
    }

    /// One to which several frontends may be connected at once.
    pub fn shared(queues: u16, read_only: bool, frontends_max: usize) -> TestServer {
        TestServer::on(MemImage::new(DISK_BYTES), queues, read_only, frontends_max)
    }

    pub fn on(image: Arc<MemImage>, queues: u16, read_only: bool, frontends_max: usize) -> TestServer {
        let dir = tempfile::tempdir().unwrap();
        let observer = Arc::new(Counting::default());
        let clock = EpochClock::new(Epoch(0));
        let disk = Disk::plain(clock.clone(), image.clone(), read_only).unwrap();
        let handle = serve(ServeOptions {
            name: "test".to_owned(),
            socket: SocketSource::Path(dir.path().join("sock")),
            attachment: disk.attach_live(),
            queues,
            serial: SERIAL.to_owned(),
            frontends_max,
            observer: observer.clone(),
            once: false,
            hints: Hints::default(),
        })
        .unwrap();
        TestServer { handle, disk, image, observer, clock, dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    /// Waits until nobody is connected any more.
    pub fn wait_idle(&self) {
        until("the session ends", || {
            !self.handle.is_connected()
                && self.observer.connected.load(Ordering::SeqCst) == self.observer.disconnected.load(Ordering::SeqCst)
        });
    }
}

/// Waits for something that must become true soon.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// This process's open descriptors.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The same, once what was dropped before has closed its own.
pub fn settled_descriptors() -> usize {
    until("threads end", || threads() <= 1);
    let mut last = open_descriptors();
    let mut same = 0;
    while same < 20 {
        std::thread::sleep(Duration::from_millis(1));
        let now = open_descriptors();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

/// The server's threads in this process, by their names.
pub fn threads() -> usize {
    let is_ours = |name: &str| name.starts_with("vu-") || name.starts_with("serve-") || name.trim_end() == "q0";
    let name = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.ok()?.path().join("comm")).ok();
    std::fs::read_dir("/proc/self/task").unwrap().filter_map(name).filter(|n| is_ours(n)).count()
}
