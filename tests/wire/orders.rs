//! Messages in the order and shape in which each VMM sends them, from its source (docs/compatibility.md says which), and
//! what its guest does next: requests, a reset of the device, and everything again.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::Frontend;

use super::hostile_messages::{Message, send, u32s, u64s};
use super::ring::*;
use super::support::*;

/// A message, for each queue where it is about one.
#[derive(Clone, Copy)]
enum Step {
    Owner,
    GetFeatures,
    SetFeatures,
    GetProtocol,
    /// Those of what is offered that the VMM knows.
    SetProtocol(u64),
    Backchannel,
    QueueNum,
    Slots,
    /// Offset, size, and how many bytes come with it.
    GetConfig(u32, u32, usize),
    /// Asks for a region, once, and gives it back.
    Inflight,
    /// A table of one region, with room for so many.
    Table(usize),
    /// The same region by itself, once.
    Region,
    Num,
    /// The base is the used index, the avail index or 0.
    Base(Base),
    Addr,
    Call,
    /// A pair of sockets.
    CallPair,
    Kick,
    Enable(u32),
    GetBase,
    ResetDevice,
    /// These, queue by queue.
    Each(&'static [Step]),
}
use Step::*;

#[derive(Clone, Copy)]
enum Base {
    Used,
    Avail,
    Zero,
}

struct Vmm {
    name: &'static str,
    /// Virtio features that it does not know.
    without: u64,
    /// Whether it asks for acknowledgements once they are negotiated.
    acks: bool,
    connects: &'static [Step],
    starts: &'static [Step],
    /// What a reset by the driver comes to, before it starts again.
    resets: &'static [Step],
}

const PROTOCOL_MQ: u64 = 1;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
const PROTOCOL_CONFIG: u64 = 1 << 9;
const PROTOCOL_INFLIGHT: u64 = 1 << 12;
const PROTOCOL_SLOTS: u64 = 1 << 15;

const VMMS: &[Vmm] = &[
    Vmm {
        name: "QEMU",
        without: 0,
        acks: false,
        connects: &[
            GetFeatures,
            GetProtocol,
            SetProtocol(u64::MAX),
            Backchannel,
            QueueNum,
            Slots,
            Owner,
            GetFeatures,
            Call,
            GetConfig(0, 60, 60),
        ],
        starts: &[
            SetFeatures,
            Inflight,
            SetFeatures,
            Region,
            Each(&[Num, Base(Base::Used), Addr, Kick, Call]),
            Enable(1),
        ],
        resets: &[Enable(0), GetBase],
    },
    Vmm {
        name: "cloud-hypervisor to v50",
        without: 0,
        acks: true,
        connects: &[
            Owner,
            GetFeatures,
            GetProtocol,
            SetProtocol(PROTOCOL_CONFIG | PROTOCOL_MQ | PROTOCOL_SLOTS | PROTOCOL_REPLY_ACK | PROTOCOL_INFLIGHT),
            QueueNum,
            GetConfig(0x100, 60, 60),
        ],
        starts: &[SetFeatures, Table(1), Num, Inflight, Each(&[Addr, Base(Base::Avail), Call, Kick]), Enable(1)],
        resets: &[Enable(0)],
    },
    Vmm {
        name: "crosvm",
        without: 0,
        acks: false,
        connects: &[
            Owner,
            GetFeatures,
            GetProtocol,
            SetProtocol(PROTOCOL_CONFIG | PROTOCOL_MQ | PROTOCOL_BACKEND_REQ | PROTOCOL_REPLY_ACK),
            Backchannel,
            QueueNum,
            GetConfig(0, 8, 8),
            GetConfig(20, 4, 4),
            GetConfig(56, 4, 4),
            SetFeatures,
        ],
        starts: &[SetFeatures, Table(1), Each(&[Num, Addr, Base(Base::Avail), Call, Kick, Enable(1)])],
        resets: &[Each(&[Enable(0), GetBase])],
    },
    Vmm {
        name: "Firecracker",
        // Neither several queues nor discards.
        without: 1 << 12 | 1 << 13 | 1 << 14 | F_INDIRECT,
        acks: true,
        connects: &[
            Owner,
            GetFeatures,
            GetProtocol,
            SetProtocol(PROTOCOL_CONFIG | PROTOCOL_REPLY_ACK),
            GetConfig(0, 60, 60),
        ],
        starts: &[SetFeatures, Table(1), Num, Each(&[Addr, Base(Base::Avail), Call, Kick, Enable(1)])],
        resets: &[],
    },
    Vmm {
        name: "SPDK's initiator",
        without: 0,
        acks: false,
        connects: &[
            Owner,
            GetFeatures,
            SetFeatures,
            GetProtocol,
            SetProtocol(PROTOCOL_MQ | PROTOCOL_CONFIG),
            GetConfig(0, 256, 256),
        ],
        starts: &[Enable(1), QueueNum, Call, Table(1), GetFeatures, Each(&[Num, Base(Base::Zero), Addr, Kick])],
        resets: &[GetBase, Table(1), GetFeatures],
    },
    Vmm {
        name: "Dragonball",
        without: 0,
        acks: false,
        connects: &[
            GetFeatures,
            SetFeatures,
            GetProtocol,
            SetProtocol(u64::MAX),
            GetConfig(0x100, 60, 60),
            Owner,
            GetFeatures,
            SetFeatures,
            GetProtocol,
            SetProtocol(PROTOCOL_MQ | PROTOCOL_CONFIG | PROTOCOL_SLOTS | PROTOCOL_REPLY_ACK),
            QueueNum,
            Call,
        ],
        starts: &[Table(1), Num, Base(Base::Zero), Addr, Kick, Call, Enable(1)],
        resets: &[],
    },
    Vmm {
        name: "Linux's virtio_uml",
        without: 0,
        acks: true,
        connects: &[
            Owner,
            GetFeatures,
            GetProtocol,
            SetProtocol(PROTOCOL_REPLY_ACK | PROTOCOL_BACKEND_REQ | PROTOCOL_CONFIG),
            Backchannel,
            GetConfig(0, 8, 8),
            GetConfig(0, 36, 36),
        ],
        starts: &[SetFeatures, Table(2), Each(&[CallPair, Num, Base(Base::Zero), Addr]), Each(&[Kick, Enable(1)])],
        resets: &[Enable(0), GetFeatures],
    },
    Vmm {
        name: "one that resets the device",
        without: 0,
        acks: true,
        connects: &[Owner, GetFeatures, GetProtocol, SetProtocol(u64::MAX), QueueNum, GetConfig(0, 96, 96)],
        starts: &[SetFeatures, Table(8), Each(&[Kick, Call, Addr, Base(Base::Zero), Num]), Enable(1)],
        resets: &[ResetDevice],
    },
];

const QUEUES: usize = 2;

/// A VMM's end of the connection, message by message.
struct Sender {
    stream: UnixStream,
    acks: bool,
    may_ack: bool,
    offered: u64,
    protocol: u64,
    guest: Guest,
    without: u64,
    has_region: bool,
    inflight: Option<(Vec<u8>, File)>,
    pairs: Vec<UnixStream>,
    told: Option<UnixStream>,
}

impl Sender {
    fn new(server: &TestServer, vmm: &Vmm) -> Sender {
        let stream = UnixStream::connect(server.socket()).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        let memory = GuestMemory::new(GUEST_BASE, MEMORY_BYTES);
        let frontend = Frontend::from_stream(stream.try_clone().unwrap(), QUEUES as u64);
        let mut guest = Guest { frontend, memory, queues: Vec::new(), features: 0 };
        (0..QUEUES).for_each(|index| guest.add_queue(index, 128));
        let (acks, without) = (vmm.acks, vmm.without);
        Sender {
            stream,
            acks,
            may_ack: false,
            offered: 0,
            protocol: 0,
            guest,
            without,
            has_region: false,
            inflight: None,
            pairs: Vec::new(),
            told: None,
        }
    }

    /// Sends a message that is only acknowledged.
    fn tell(&mut self, code: u32, body: Vec<u8>, files: &[File]) {
        let wants = self.acks && self.may_ack;
        send(&self.stream, &Message(code, 1 | if wants { 8 } else { 0 }, None, body, 0), files);
        if wants {
            assert_eq!(self.reply(code).0, 0u64.to_ne_bytes(), "message {code} was refused");
        }
    }

    fn ask(&mut self, code: u32, body: Vec<u8>) -> Vec<u8> {
        send(&self.stream, &Message(code, 1, None, body, 0), &[]);
        self.reply(code).0
    }

    fn reply(&mut self, code: u32) -> (Vec<u8>, Option<File>) {
        use vmm_sys_util::sock_ctrl_msg::ScmSocket;
        let mut header = [0; 12];
        let mut fds = [0; 1];
        let mut iov = [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: 12 }];
        // SAFETY: the one buffer is alive across the call and of the length that it says.
        let (bytes, files) = unsafe { self.stream.recv_with_fds(&mut iov, &mut fds).unwrap() };
        assert_eq!(bytes, 12, "no answer to message {code}");
        let word = |i: usize| u32::from_ne_bytes(header[4 * i..4 * i + 4].try_into().unwrap());
        assert_eq!((word(0), word(1)), (code, 5));
        let mut body = vec![0; word(2) as usize];
        (&self.stream).read_exact(&mut body).unwrap();
        // SAFETY: a descriptor that was just received, and that nobody else has.
        let file = (files == 1).then(|| unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fds[0]) });
        (body, file)
    }

    fn number(&mut self, code: u32) -> u64 {
        u64::from_ne_bytes(self.ask(code, vec![]).try_into().unwrap())
    }

    fn steps(&mut self, steps: &[Step]) {
        for &step in steps {
            match step {
                Each(steps) => (0..QUEUES).for_each(|queue| steps.iter().for_each(|s| self.step(*s, queue))),
                Num | Base(_) | Addr | Call | CallPair | Kick | Enable(_) | GetBase => {
                    (0..QUEUES).for_each(|queue| self.step(step, queue));
                }
                _ => self.step(step, 0),
            }
        }
    }

    fn step(&mut self, step: Step, queue: usize) {
        let event = |file: &vmm_sys_util::eventfd::EventFd| {
            use std::os::fd::AsRawFd;
            // SAFETY: the event is open for as long as its queue.
            File::from(unsafe { std::os::fd::BorrowedFd::borrow_raw(file.as_raw_fd()) }.try_clone_to_owned().unwrap())
        };
        let index = queue as u32;
        match step {
            Owner => self.tell(3, vec![], &[]),
            GetFeatures => self.offered = self.number(1),
            SetFeatures => {
                self.guest.features = self.offered & !self.without;
                self.tell(2, u64s(&[self.guest.features]), &[]);
            }
            GetProtocol => self.protocol = self.number(15),
            SetProtocol(known) => {
                self.may_ack = self.protocol & known & PROTOCOL_REPLY_ACK != 0;
                self.tell(16, u64s(&[self.protocol & known]), &[]);
            }
            Backchannel => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                self.told = Some(ours);
                self.tell(21, vec![], &[File::from(OwnedFd::from(theirs))]);
            }
            QueueNum => assert_eq!(self.number(17), QUEUES as u64),
            Slots => assert!(self.number(36) >= 32),
            GetConfig(offset, size, room) => {
                let reply = self.ask(24, [u32s(&[offset, size, 1]), vec![0; room]].concat());
                assert_eq!(reply[..12], u32s(&[offset, size, 1]));
                assert_eq!(reply.len(), 12 + room);
                if offset % 0x100 == 0 {
                    assert_eq!(reply[12..20], (DISK_BYTES as u64 / 512).to_le_bytes(), "the capacity");
                }
            }
            Inflight => {
                if self.inflight.is_none() {
                    let wish = [u64s(&[0, 0]), vec![QUEUES as u8, 0, 128, 0], vec![0; 4]].concat();
                    send(&self.stream, &Message(31, 1, None, wish, 0), &[]);
                    let (info, file) = self.reply(31);
                    self.inflight = Some((info, file.expect("a region")));
                }
                let (info, file) = self.inflight.as_ref().unwrap();
                let (info, file) = (info.clone(), file.try_clone().unwrap());
                self.tell(32, info, &[file]);
            }
            Table(room) => {
                let region = self.guest.memory.region();
                let mut words = vec![region.guest_phys_addr, region.memory_size, region.userspace_addr, 0];
                words.resize(4 * room, 0);
                let file = self.guest.memory.file.try_clone().unwrap();
                self.tell(5, [u32s(&[1, 0]), u64s(&words)].concat(), &[file]);
            }
            Region => {
                let region = self.guest.memory.region();
                let file = self.guest.memory.file.try_clone().unwrap();
                let words = [0, region.guest_phys_addr, region.memory_size, region.userspace_addr, 0];
                if !std::mem::replace(&mut self.has_region, true) {
                    self.tell(37, u64s(&words), &[file]);
                }
            }
            Num => self.tell(8, u32s(&[index, 128]), &[]),
            Base(base) => {
                let base = match base {
                    Base::Used => self.guest.used_index(queue),
                    Base::Avail => self.guest.avail_index(queue),
                    Base::Zero => 0,
                };
                self.tell(10, u32s(&[index, u32::from(base)]), &[]);
            }
            Addr => {
                let c = self.guest.ring_config(queue);
                let places = [c.desc_table_addr, c.used_ring_addr, c.avail_ring_addr, u64::MAX];
                self.tell(9, [u32s(&[index, 0]), u64s(&places)].concat(), &[]);
            }
            Call => {
                let call = event(&self.guest.queues[queue].call);
                self.tell(13, u64s(&[queue as u64]), &[call]);
            }
            CallPair => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                self.pairs.push(ours);
                self.tell(13, u64s(&[queue as u64]), &[File::from(OwnedFd::from(theirs))]);
            }
            Kick => {
                let kick = event(&self.guest.queues[queue].kick);
                self.tell(12, u64s(&[queue as u64]), &[kick]);
            }
            Enable(on) => self.tell(18, u32s(&[index, on]), &[]),
            GetBase => {
                let reply = self.ask(11, u32s(&[index, 0]));
                assert_eq!(reply, u32s(&[index, u32::from(self.guest.queues[queue].next_avail)]));
            }
            ResetDevice => self.tell(34, vec![], &[]),
            Each(_) => unreachable!("queue by queue already"),
        }
    }

    /// As a driver that begins anew: empty rings, at other places.
    fn fresh_rings(&mut self) {
        for queue in 0..QUEUES {
            let at = GUEST_BASE + 0x10_0000 + queue as u64 * 0x1_0000;
            self.guest.memory.write(at, &[0; 0x1_0000]);
            let q = &mut self.guest.queues[queue];
            (q.at, q.next_avail, q.last_used) = (at, 0, 0);
        }
    }
}

#[test]
fn each_vmm_is_served() {
    let _alone = alone();
    let (descriptors, threads_before) = (settled_descriptors(), threads());
    for vmm in VMMS {
        let server = TestServer::new(QUEUES as u16, false);
        let expected = server.image.content();
        println!("{}", vmm.name);
        let mut sender = Sender::new(&server, vmm);
        sender.steps(vmm.connects);
        let rounds = if vmm.resets.is_empty() { 1 } else { 3 };
        for round in 0..rounds {
            sender.steps(vmm.starts);
            for queue in 0..QUEUES {
                for sector in 0..5 {
                    let answer = sender.guest.run_on(queue, T_IN, sector + round, &[(DATA, 512, WRITE)]);
                    assert_eq!(answer, (S_OK, 513), "{}", vmm.name);
                    let read = sender.guest.memory.read(DATA, 512);
                    assert_eq!(read, expected[(sector + round) as usize * 512..][..512], "{}", vmm.name);
                }
            }
            if let Some(told) = &mut sender.told {
                use halfsilver::vhost_user::Server as _;
                server.handle.config_changed();
                let mut message = [0; 12];
                told.read_exact(&mut message).unwrap();
                assert_eq!(message[..], u32s(&[2, 1, 0]), "{}: a change of the config space", vmm.name);
            }
            for pair in &mut sender.pairs {
                pair.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
                pair.read_exact(&mut [0; 8]).unwrap();
            }
            sender.pairs.clear();
            sender.steps(vmm.resets);
            sender.fresh_rings();
        }
        drop(sender);
        server.wait_idle();
    }
    until("threads end", || threads() == threads_before);
    until("descriptors are closed", || open_descriptors() == descriptors);
}
