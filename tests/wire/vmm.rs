//! A frontend that outlives the daemon: it keeps guest memory, rings and inflight region, and connects again.
//!
//! What always holds: messages are sent in the order in which that VMM sends them (docs/testing.md says where from), with
//! what it knows: QEMU gives the used index as a ring's base after a death, cloud-hypervisor the avail index.
//! An error means that the daemon went away meanwhile; the next attempt begins from the start.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};
use vhost::{Error, Result, VhostBackend};

use super::ring::{F_PROTOCOL, GUEST_BASE, Guest, GuestMemory, MEMORY_BYTES};

/// Whose order of messages it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vmm {
    Qemu,
    CloudHypervisor,
}

/// No message may take longer: a daemon that hangs must not hang the test.
const PATIENCE: Duration = Duration::from_secs(60);
const CONFIG_BYTES: u32 = 60;

// What cloud-hypervisor knows of virtio features: size-max, seg-max, ro, blk-size, flush, topology, config-wce, mq, discard,
// write-zeroes, log-all, indirect, event-idx, protocol features, version 1, in-order, order-platform, notification-data.
const CLOUD_HYPERVISOR_KNOWS: u64 = 1 << 1
    | 1 << 2
    | 1 << 5
    | 1 << 6
    | 1 << 9
    | 1 << 10
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 26
    | 1 << 28
    | 1 << 29
    | 1 << 30
    | 1 << 32
    | 1 << 35
    | 1 << 36
    | 1 << 38;

/// A VMM with a running guest.
pub struct Survivor {
    pub guest: Guest,
    vmm: Vmm,
    pub inflight: Option<(VhostUserInflight, File)>,
    protocol: VhostUserProtocolFeatures,
    was_connected: bool,
}

fn open(socket: &Path) -> Result<Frontend> {
    // Not by its own connect(), which sleeps before it tries a refused socket again.
    let stream = UnixStream::connect(socket).map_err(|e| Error::VhostUserProtocol(ProtocolError::SocketConnect(e)))?;
    let frontend = Frontend::from_stream(stream, 16);
    for which in [rustix::net::sockopt::Timeout::Recv, rustix::net::sockopt::Timeout::Send] {
        // SAFETY: the descriptor is open for as long as the frontend, which outlives this borrow.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(frontend.as_raw_fd()) };
        rustix::net::sockopt::set_socket_timeout(fd, which, Some(PATIENCE)).unwrap();
    }
    Ok(frontend)
}

impl Survivor {
    /// The first connection: everything is negotiated, and `queues` queues run.
    pub fn connect(socket: &Path, queues: usize, entries: u16, vmm: Vmm) -> Result<Survivor> {
        let memory = GuestMemory::new(GUEST_BASE, MEMORY_BYTES);
        let mut guest = Guest { frontend: open(socket)?, memory, queues: Vec::new(), features: 0 };
        (0..queues).for_each(|index| guest.add_queue(index, entries));
        let protocol = VhostUserProtocolFeatures::empty();
        let mut survivor = Survivor { guest, vmm, inflight: None, protocol, was_connected: false };
        survivor.establish()?;
        Ok(survivor)
    }

    /// Connects again, with the same memory, rings and inflight region.
    pub fn reconnect(&mut self, socket: &Path) -> Result<()> {
        self.guest.frontend = open(socket)?;
        self.establish()
    }

    /// As QEMU; each queue is disabled again at once, before anything is answered.
    pub fn reconnect_and_stop(&mut self, socket: &Path) -> Result<()> {
        self.guest.frontend = open(socket)?;
        self.set_up_as_qemu()?;
        let f = &mut self.guest.frontend;
        (0..self.guest.queues.len()).try_for_each(|index| f.set_vring_enable(index, false))
    }

    fn establish(&mut self) -> Result<()> {
        match self.vmm {
            Vmm::Qemu => self.establish_as_qemu()?,
            Vmm::CloudHypervisor => self.establish_as_cloud_hypervisor()?,
        }
        self.was_connected = true;
        Ok(())
    }

    fn region_wish(&self) -> VhostUserInflight {
        VhostUserInflight::new(0, 0, self.guest.queues.len() as u16, self.guest.queues[0].entries)
    }

    fn give_inflight(&mut self) -> Result<()> {
        if self.inflight.is_none() {
            let wish = self.region_wish();
            self.inflight = Some(self.guest.frontend.get_inflight_fd(&wish)?);
        }
        let (info, file) = self.inflight.as_ref().unwrap();
        self.guest.frontend.set_inflight_fd(info, file.as_raw_fd())
    }

    fn establish_as_qemu(&mut self) -> Result<()> {
        self.set_up_as_qemu()?;
        // Not every message is answered: this one tells that all before it were obeyed.
        self.guest.frontend.get_features().map(drop)
    }

    fn set_up_as_qemu(&mut self) -> Result<()> {
        let f = &mut self.guest.frontend;
        let offered = f.get_features()?;
        // Bits that mean something to this driver and to QEMU alike: all that is offered.
        self.guest.features = offered;
        let protocol = f.get_protocol_features()? & !VhostUserProtocolFeatures::STATUS;
        f.set_protocol_features(protocol)?;
        f.get_queue_num()?;
        f.get_max_mem_slots()?;
        f.set_owner()?;
        f.get_features()?;
        for (index, queue) in self.guest.queues.iter().enumerate() {
            f.set_vring_call(index, &queue.call)?;
        }
        f.get_config(0, CONFIG_BYTES, VhostUserConfigFlags::WRITABLE, &[0; CONFIG_BYTES as usize])?;
        f.set_features(offered)?;
        self.give_inflight()?;
        let f = &mut self.guest.frontend;
        f.set_features(offered)?;
        f.set_mem_table(&[self.guest.memory.region()])?;
        for index in 0..self.guest.queues.len() {
            let (config, base) = (self.guest.ring_config(index), self.guest.used_index(index));
            let (f, queue) = (&mut self.guest.frontend, &self.guest.queues[index]);
            f.set_vring_num(index, queue.entries)?;
            f.set_vring_base(index, base)?;
            f.set_vring_addr(index, &config)?;
            f.set_vring_kick(index, &queue.kick)?;
            f.set_vring_call(index, &queue.call)?;
        }
        let f = &mut self.guest.frontend;
        (0..self.guest.queues.len()).try_for_each(|index| f.set_vring_enable(index, true))
    }

    fn establish_as_cloud_hypervisor(&mut self) -> Result<()> {
        let f = &mut self.guest.frontend;
        f.set_owner()?;
        let offered = f.get_features()?;
        if !self.was_connected {
            self.guest.features = offered & CLOUD_HYPERVISOR_KNOWS;
            let known = VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::LOG_SHMFD
                | VhostUserProtocolFeatures::DEVICE_STATE;
            self.protocol = f.get_protocol_features()? & known;
        }
        assert_ne!(self.guest.features & F_PROTOCOL, 0);
        // It does not ask again what it knows.
        f.set_protocol_features(self.protocol)?;
        f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if !self.was_connected {
            f.get_queue_num()?;
            f.get_config(0, CONFIG_BYTES, VhostUserConfigFlags::WRITABLE, &[0; CONFIG_BYTES as usize])?;
        }
        f.set_features(self.guest.features)?;
        f.set_mem_table(&[self.guest.memory.region()])?;
        for (index, queue) in self.guest.queues.iter().enumerate() {
            f.set_vring_num(index, queue.entries)?;
        }
        self.give_inflight()?;
        for index in 0..self.guest.queues.len() {
            let (config, base) = (self.guest.ring_config(index), self.guest.avail_index(index));
            let (f, queue) = (&mut self.guest.frontend, &self.guest.queues[index]);
            f.set_vring_addr(index, &config)?;
            f.set_vring_base(index, base)?;
            f.set_vring_call(index, &queue.call)?;
            f.set_vring_kick(index, &queue.kick)?;
        }
        let f = &mut self.guest.frontend;
        (0..self.guest.queues.len()).try_for_each(|index| f.set_vring_enable(index, true))
    }
}
