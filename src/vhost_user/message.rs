//! Messages of the vhost-user protocol: bytes and descriptors of a frontend, and what it is answered.
//!
//! What always holds:
//! - A message has a bounded size, the protocol's version and no more descriptors than there is room for; descriptors that
//!   nobody asked for are closed with it.
//! - Sizes of bodies are checked here, what is in them by [`super::session`].
//!
//! Why not the `vhost` crate's handler: docs/decisions/0054-messages-are-read-here.md.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

const HEADER_BYTES: usize = 12;
/// The most bytes of a body. The largest is a memory table, with 32 bytes for each descriptor.
const BODY_BYTES_MAX: usize = 4096;
const FILES_MAX: usize = 64;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// The frontend has hung up between two messages.
    #[error("the frontend left")]
    Left,
    /// It went away amid a message, or the system refuses.
    #[error("the frontend is gone: {0}")]
    Gone(io::Error),
    /// It sent what it should not.
    #[error("{0}")]
    Refused(String),
}

/// What is wrong with a message.
pub(super) fn refused(what: impl Into<String>) -> Ended {
    Ended::Refused(what.into())
}

/// A message, its body not looked at.
pub(super) struct Message {
    pub(super) request: FrontendReq,
    pub(super) body: Vec<u8>,
    pub(super) files: Vec<File>,
    needs_reply: bool,
}

/// One end of a connection.
pub(super) struct Channel {
    stream: UnixStream,
}

impl Channel {
    pub(super) fn new(stream: UnixStream) -> Channel {
        Channel { stream }
    }

    /// Waits until the frontend says something. False when it hangs up without a word.
    pub(super) fn has_begun(&self) -> bool {
        let mut first = [0; 1];
        loop {
            match rustix::net::recv(&self.stream, &mut first[..], RecvFlags::PEEK) {
                Ok((_, n)) => return n > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Waits until there is something to read, or the other end has hung up. False when the time was over before.
    pub(super) fn wait(&self, time: Option<Duration>) -> bool {
        let time = time.and_then(|time| Timespec::try_from(time).ok());
        let mut poll = [PollFd::new(&self.stream, PollFlags::IN | PollFlags::RDHUP)];
        !matches!(rustix::event::poll(&mut poll, time.as_ref()), Ok(0) | Err(rustix::io::Errno::INTR))
    }

    /// The next message.
    ///
    /// # Errors
    /// When the frontend has hung up, or what it sent is no message.
    pub(super) fn receive(&self) -> Result<Message, Ended> {
        let mut files = Vec::new();
        let mut header = [0; HEADER_BYTES];
        if !self.fill(&mut header, &mut files)? {
            return Err(Ended::Left);
        }
        let word = |i: usize| u32::from_ne_bytes(std::array::from_fn(|j| header[4 * i + j]));
        let (request, flags, size) = (word(0), word(1), word(2));
        if flags & VERSION_MASK != VERSION || flags & !(VERSION_MASK | NEED_REPLY) != 0 {
            return Err(refused(format!("a message with flags {flags:#x}")));
        }
        let request = FrontendReq::try_from(request).map_err(|_| refused(format!("unknown message {request}")))?;
        let size = usize::try_from(size).ok().filter(|size| *size <= BODY_BYTES_MAX);
        let mut body = vec![0; size.ok_or_else(|| refused(format!("a message {request:?} of {} bytes", word(2))))?];
        if !body.is_empty() && !self.fill(&mut body, &mut files)? {
            return Err(Ended::Gone(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(Message { request, body, files, needs_reply: flags & NEED_REPLY != 0 })
    }

    /// Reads until `bytes` is full. False when the other end has hung up before the first one.
    fn fill(&self, bytes: &mut [u8], files: &mut Vec<File>) -> Result<bool, Ended> {
        let mut done = 0;
        while done < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(&mut bytes[done..])];
            let got = match rustix::net::recvmsg(&self.stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => got,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(Ended::Gone(e.into())),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    files.extend(rights.map(File::from));
                }
            }
            if got.flags.contains(ReturnFlags::CTRUNC) || files.len() > FILES_MAX {
                return Err(refused("more descriptors than there is room for"));
            }
            match got.bytes {
                0 if done == 0 => return Ok(false),
                0 => return Err(Ended::Gone(io::ErrorKind::UnexpectedEof.into())),
                n => done += n,
            }
        }
        Ok(true)
    }

    /// Answers a message.
    ///
    /// # Errors
    /// When the frontend is gone.
    pub(super) fn reply(&self, to: FrontendReq, body: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), Ended> {
        self.send(&packed(to as u32, VERSION | REPLY, body), file).map_err(Ended::Gone)
    }

    /// Tells that a message that has no answer of its own was obeyed or not, if that was asked for.
    ///
    /// # Errors
    /// When the frontend is gone.
    pub(super) fn acknowledge(&self, message: &Message, is_ok: bool) -> Result<(), Ended> {
        if !message.needs_reply {
            return Ok(());
        }
        self.reply(message.request, &u64::from(!is_ok).to_ne_bytes(), None)
    }

    fn send(&self, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let mut done = 0;
        while done < bytes.len() {
            let from = [IoSlice::new(&bytes[done..])];
            match rustix::net::sendmsg(&self.stream, &from, &mut control, SendFlags::NOSIGNAL) {
                Ok(n) => {
                    done += n;
                    control.clear();
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// A header and its body.
fn packed(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).expect("answers are short");
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

impl Message {
    /// That there is no body.
    pub(super) fn nothing(&self) -> Result<(), Ended> {
        self.words::<0>().map(drop)
    }

    /// A body of one number.
    pub(super) fn number(&self) -> Result<u64, Ended> {
        self.words::<2>().map(|[low, high]| wide(low, high))
    }

    /// A body of exactly so many 32-bit words.
    pub(super) fn words<const N: usize>(&self) -> Result<[u32; N], Ended> {
        if self.body.len() != 4 * N {
            return Err(self.odd());
        }
        Ok(self.leading())
    }

    /// The first words of a body that is at least as long.
    pub(super) fn leading<const N: usize>(&self) -> [u32; N] {
        std::array::from_fn(|i| u32::from_ne_bytes(std::array::from_fn(|j| self.body[4 * i + j])))
    }

    /// That the body has not the size that its kind has.
    pub(super) fn odd(&self) -> Ended {
        refused(format!("a message {:?} of {} bytes", self.request, self.body.len()))
    }

    /// The only descriptor.
    pub(super) fn take_file(&mut self) -> Result<File, Ended> {
        match self.files.len() {
            1 => Ok(self.files.remove(0)),
            n => Err(refused(format!("a message {:?} with {n} descriptors", self.request))),
        }
    }
}

/// Whether a message is answered with something else than that it was obeyed.
pub(super) fn has_answer(request: FrontendReq) -> bool {
    matches!(
        request,
        FrontendReq::GET_FEATURES
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_CONFIG
            | FrontendReq::GET_INFLIGHT_FD
    )
}

/// Whether a message may have descriptors. REM_MEM_REG may have one for frontends of old; it is closed.
pub(super) fn takes_files(request: FrontendReq) -> bool {
    matches!(
        request,
        FrontendReq::SET_MEM_TABLE
            | FrontendReq::ADD_MEM_REG
            | FrontendReq::REM_MEM_REG
            | FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR
            | FrontendReq::SET_INFLIGHT_FD
            | FrontendReq::SET_BACKEND_REQ_FD
    )
}

/// The queue that a descriptor is for, and the descriptor unless it says that there is none.
pub(super) fn vring_file(message: &mut Message) -> Result<(u32, Option<File>), Ended> {
    const NONE: u64 = 0x100;
    let value = message.number()?;
    let index = u32::try_from(value & 0xff).unwrap_or(u32::MAX);
    match value & NONE {
        0 => Ok((index, Some(message.take_file()?))),
        _ if message.files.is_empty() => Ok((index, None)),
        _ => Err(refused(format!("a message {:?} with a descriptor that it denies", message.request))),
    }
}

/// Offset, size and flags of a part of the config space, and the bytes that came with it: as many, or more (SPDK).
pub(super) fn config_part(message: &Message) -> Result<([u32; 3], &[u8]), Ended> {
    if message.body.len() < 12 {
        return Err(message.odd());
    }
    let (part @ [_, size, flags], bytes) = (message.leading(), &message.body[12..]);
    if size == 0 || u64::from(size) > bytes.len() as u64 || flags & !3 != 0 {
        return Err(refused(format!("{size} bytes of config space in {}, with flags {flags:#x}", bytes.len())));
    }
    Ok((part, bytes))
}

/// Size and offset in bytes, queues and entries. Some send the end of the struct, which is padding, and others do not.
pub(super) fn inflight_of(message: &Message) -> Result<(u64, u64, u16, u16), Ended> {
    if !matches!(message.body.len(), 20 | 24) {
        return Err(message.odd());
    }
    let [s0, s1, o0, o1, numbers] = message.leading();
    let [q0, q1, e0, e1] = numbers.to_ne_bytes();
    Ok((wide(s0, s1), wide(o0, o1), u16::from_ne_bytes([q0, q1]), u16::from_ne_bytes([e0, e1])))
}

/// A 64-bit number of two words of this machine.
pub(super) fn wide(first: u32, second: u32) -> u64 {
    let (a, b) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes(std::array::from_fn(|i| if i < 4 { a[i] } else { b[i - 4] }))
}

/// Where the frontend is told what it did not ask for (VHOST_USER_SET_BACKEND_REQ_FD).
#[derive(Debug)]
pub(super) struct Backchannel {
    socket: File,
}

impl Backchannel {
    /// # Errors
    /// When the descriptor is no Unix socket.
    pub(super) fn new(file: File) -> io::Result<Backchannel> {
        match rustix::net::sockopt::socket_domain(&file) {
            Ok(rustix::net::AddressFamily::UNIX) => Ok(Backchannel { socket: file }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not a Unix socket")),
        }
    }

    /// Says that the config space has changed. Waits for nothing, not even for an acknowledgement: a frontend that has left so
    /// many of these unread that there is no room for another one will find it changed by those.
    pub(super) fn tell_of_change(&self) {
        if let Err(e) = self.config_changed() {
            log::debug!("a frontend is not told of a change of its disk: {e}");
        }
    }

    fn config_changed(&self) -> io::Result<()> {
        let bytes = packed(BackendReq::CONFIG_CHANGE_MSG as u32, VERSION, &[]);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::net::send(self.socket.as_fd(), &bytes, flags)? {
            n if n == bytes.len() => Ok(()),
            _ => Err(io::Error::other("the frontend reads too slowly")),
        }
    }
}
