//! A file system in user space with one file, which answers until it falls silent: from then on whatever is asked of it
//! hangs for good, also opening it.
//!
//! What is spoken is the kernel's FUSE protocol, as far as a raw image needs it; everything else is "not implemented".
//! When it is dropped all that hangs ends with an error.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const ANSWERS: u8 = 0;
const SILENT: u8 = 1;
const GONE: u8 = 2;

// Operations of the protocol.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const IN_HEADER_LEN: usize = 40;
const WRITE_IN_LEN: usize = 40;
const REQUEST_LEN_MAX: usize = (128 << 10) + 4096;
/// The node of the file; that of the directory is 1.
const FILE: u64 = 2;

pub(crate) struct SilentFile {
    directory: PathBuf,
    state: Arc<AtomicU8>,
    server: Option<JoinHandle<()>>,
}

impl SilentFile {
    /// Mounts it at `directory`, with a file of zeros in it, whatever its name. Needs root.
    pub(crate) fn mount(directory: &Path, size: usize) -> SilentFile {
        std::fs::create_dir(directory).unwrap();
        let device =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/fuse").unwrap();
        let c = |text: &str| std::ffi::CString::new(text).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let (source, target, kind, options) = (c("silent"), c(directory.to_str().unwrap()), c("fuse"), c(&options));
        // SAFETY: four strings that live across the call; the options are read as a string.
        let rc = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        let state = Arc::new(AtomicU8::new(ANSWERS));
        let ours = state.clone();
        let server = std::thread::spawn(move || serve(device, vec![0; size], &ours));
        SilentFile { directory: directory.to_owned(), state, server: Some(server) }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join("image.raw")
    }

    /// From here on nothing is answered.
    pub(crate) fn fall_silent(&self) {
        // What is looked up and not known any more would be the first to hang.
        std::fs::metadata(self.path()).unwrap();
        self.state.store(SILENT, Ordering::SeqCst);
    }

    /// Ends it: whatever hangs ends with an error.
    pub(crate) fn end(&mut self) {
        self.state.store(GONE, Ordering::SeqCst);
        if let Some(server) = self.server.take() {
            server.join().ok();
            let done = crate::harness::command("umount").arg("-l").arg(&self.directory).status();
            assert!(done.is_ok_and(|status| status.success()), "cannot unmount {}", self.directory.display());
        }
    }
}

impl Drop for SilentFile {
    fn drop(&mut self) {
        self.end();
    }
}

/// Closing the device is what ends all requests.
fn serve(mut device: File, mut bytes: Vec<u8>, state: &AtomicU8) {
    let mut request = vec![0; REQUEST_LEN_MAX];
    loop {
        match state.load(Ordering::SeqCst) {
            GONE => return,
            ANSWERS => {}
            _ => {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
        }
        match device.read(&mut request) {
            Ok(len) => answer(&mut device, &request[..len], &mut bytes),
            Err(e) if e.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_micros(200)),
            Err(_) => {} // Interrupted before it was read.
        }
    }
}

fn u32_at(request: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(request[at..at + 4].try_into().unwrap())
}

fn u64_at(request: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(request[at..at + 8].try_into().unwrap())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// The attributes of a node.
fn attributes(node: u64, size: u64) -> Vec<u8> {
    let (mode, size) = if node == FILE { (0o100_600, size) } else { (0o040_755, 0) };
    // Number, size, blocks and times; their parts of a second, mode, links, owner, group, device, unit and flags.
    [longs(&[node, size, size / 512, 0, 0, 0]), words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
}

fn answer(device: &mut File, request: &[u8], bytes: &mut [u8]) {
    const FOR_EVER: u64 = 1 << 30;
    let (operation, unique, node) = (u32_at(request, 4), u64_at(request, 8), u64_at(request, 16));
    let body = &request[IN_HEADER_LEN..];
    let size = bytes.len() as u64;
    let answer: Result<Vec<u8>, i32> = match operation {
        FORGET | BATCH_FORGET | INTERRUPT => return,
        INIT => {
            let version = [7, 31, 128 << 10, 0];
            Ok([words(&version), words(&[0, 128 << 10, 1, 0]), vec![0; 32]].concat())
        }
        LOOKUP => Ok([longs(&[FILE, 0, FOR_EVER, FOR_EVER]), words(&[0, 0]), attributes(FILE, size)].concat()),
        GETATTR => Ok([longs(&[FOR_EVER]), words(&[0, 0]), attributes(node, size)].concat()),
        // Room, and the sizes of a block and of a name.
        STATFS => Ok([longs(&[1 << 20; 5]), words(&[4096, 255, 4096, 0]), vec![0; 24]].concat()),
        OPEN => Ok([longs(&[1]), words(&[0, 0])].concat()),
        READ => {
            let (from, len) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
            Ok(bytes[from.min(bytes.len())..(from + len).min(bytes.len())].to_vec())
        }
        WRITE => {
            let (from, data) = (u64_at(body, 8) as usize, &body[WRITE_IN_LEN..]);
            match bytes.get_mut(from..from + data.len()) {
                Some(place) => {
                    place.copy_from_slice(data);
                    Ok(words(&[data.len() as u32, 0]))
                }
                None => Err(libc::EFBIG),
            }
        }
        _ => Err(libc::ENOSYS),
    };
    let (error, body) = match answer {
        Ok(body) => (0_i32, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let len = 16 + body.len() as u32;
    let header = [&len.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes()].concat();
    // An answer that is too late for a request that was ended is refused, and nobody misses it.
    device.write_all(&[header, body].concat()).ok();
}
