//! One frontend's connection: its messages, its memory, its rings.
//!
//! What always holds:
//! - A message is answered when it has taken effect: workers have obeyed, or have drained where the protocol asks for it.
//! - What was not offered is refused; a refusal closes the connection (after the reply that was asked for), since a
//!   frontend that goes on after one would have another idea of the device than we do.
//! - When the session ends, every request is done and no thread of it is left; then its connection to the disk ends.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::Observer;
use super::eventfd::EventFd;
use super::features::{self, ConfigSpace, EVENT_IDX, INDIRECT_DESC, MEMORY_SLOTS_MAX, PROTOCOL_FEATURES};
use super::inflight::InflightRegion;
use super::limits::Limits;
use super::memory::{FrontendAddress, GuestAddress, MemoryMap, RegionSpec};
use super::request::{Rules, SERIAL_BYTES};
use super::ring::{Ring, RingAddresses, RingSetup};
use super::stats::QueueCounters;
use super::worker::{Command, Kick, Worker, WorkerContext};
use crate::engine::Attachment;

/// What a session serves.
#[derive(Clone)]
pub(super) struct SessionContext {
    pub(super) name: String,
    pub(super) attachment: Attachment,
    pub(super) serial: [u8; SERIAL_BYTES],
    /// One for each queue.
    pub(super) counters: Vec<Arc<QueueCounters>>,
    /// Whether the frontend may only read, also what could be written.
    pub(super) read_only: bool,
    pub(super) observer: Arc<dyn Observer>,
    /// What all frontends of the socket may take.
    pub(super) limits: Arc<Limits>,
}

impl SessionContext {
    fn is_read_only(&self) -> bool {
        self.read_only || self.attachment.is_read_only()
    }
}

/// Serves one connection until it ends, for whatever reason. Logs the reason unless the frontend just left.
pub(super) fn run(mut context: SessionContext, stream: UnixStream, is_stopping: &AtomicBool) {
    // Whoever is connected at a cut may stay with the version of before. It ends with the session, below.
    context.attachment = context.attachment.connect();
    let (name, limits) = (context.name.clone(), context.limits.clone());
    let closer = match stream.try_clone() {
        Ok(clone) => Arc::new(Closer { stream: clone, reason: Mutex::new(None) }),
        Err(e) => return limits.complain(format_args!("{name}: cannot serve a connection: {e}")),
    };
    let session = Arc::new(Mutex::new(Session::new(context, closer.clone())));
    let mut handler = BackendReqHandler::from_stream(stream, session.clone());
    let ended = loop {
        if let Err(e) = handler.handle_request() {
            break e;
        }
    };
    // Requests may still run; the socket stays open until they are done, so that a frontend that waits for its end knows.
    session.lock().unwrap_or_else(PoisonError::into_inner).stop_all_rings();
    drop(handler);
    drop(session);
    closer.hang_up();
    let reason = closer.reason.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (reason, ended) {
        (Some(reason), _) => limits.complain(format_args!("{name}: closed the connection: {reason}")),
        (None, Error::Disconnected) => log::debug!("{name}: the frontend left"),
        (None, _) if is_stopping.load(Ordering::Acquire) => {}
        (None, Error::SocketBroken(e)) => log::debug!("{name}: the frontend is gone: {e}"),
        (None, e) => limits.complain(format_args!("{name}: closed the connection: {e}")),
    }
}

/// Ends a connection from a worker.
struct Closer {
    stream: UnixStream,
    reason: Mutex<Option<String>>,
}

impl Closer {
    fn close(&self, reason: &str) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.to_owned());
        self.hang_up();
    }

    fn hang_up(&self) {
        if let Err(e) = self.stream.shutdown(std::net::Shutdown::Both) {
            log::debug!("the connection was closed already: {e}");
        }
    }
}

/// One queue as the frontend has set it up.
#[derive(Default)]
struct Vring {
    entries: Option<u16>,
    addresses: Option<RingAddresses>,
    base: u16,
    kick: Option<Kick>,
    call: Option<EventFd>,
    err: Option<EventFd>,
    enabled: bool,
    started: bool,
    // Stays from one start to the next.
    worker: Option<Worker>,
}

struct Session {
    context: SessionContext,
    closer: Arc<Closer>,
    features: u64,
    config: ConfigSpace,
    durable: Arc<AtomicBool>,
    memory: Arc<MemoryMap>,
    inflight: Option<Arc<InflightRegion>>,
    vrings: Vec<Vring>,
}

fn refuse(what: impl Into<String>) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, what.into()))
}

fn failed(e: impl Into<io::Error>) -> Error {
    Error::ReqHandlerError(e.into())
}

impl Session {
    fn new(context: SessionContext, closer: Arc<Closer>) -> Session {
        let queues = context.counters.len();
        let read_only = context.is_read_only();
        let queues_offered = u16::try_from(queues).unwrap_or(features::QUEUES_MAX);
        Session {
            config: ConfigSpace::new(context.attachment.geometry(), read_only, queues_offered),
            context,
            closer,
            features: 0,
            durable: Arc::new(AtomicBool::new(true)),
            memory: Arc::new(MemoryMap::default()),
            inflight: None,
            vrings: std::iter::repeat_with(Vring::default).take(queues).collect(),
        }
    }

    fn offered(&self) -> u64 {
        features::offered(self.context.is_read_only())
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let queues = self.vrings.len();
        usize::try_from(index)
            .ok()
            .and_then(|i| self.vrings.get_mut(i))
            .ok_or_else(|| refuse(format!("there is no queue {index}, only {queues}")))
    }

    /// A queue whose setup may be changed now.
    fn resting_vring(&mut self, index: u32, what: &str) -> Result<&mut Vring> {
        let vring = self.vring(index)?;
        if vring.started {
            Err(refuse(format!("the {what} of queue {index} changed while it runs")))
        } else {
            Ok(vring)
        }
    }

    /// Leaves what the guest said of its cache to the next daemon.
    fn note_cache(&self) {
        if let Some(region) = &self.inflight {
            region.note_writethrough(!self.config.is_writeback());
        }
    }

    fn update_durable(&self) {
        let durable = Rules::must_be_durable(self.features, self.config.is_writeback());
        self.durable.store(durable, Ordering::Release);
    }

    /// Starts a queue if the frontend has said all that it takes.
    fn start_if_ready(&mut self, index: u32) -> Result<()> {
        let features = self.features;
        let memory = self.memory.clone();
        let region = self.inflight.clone();
        let rules = Box::new(Rules {
            capacity_bytes: self.context.attachment.geometry().size_bytes,
            features,
            durable: true,
            read_only: self.context.is_read_only(),
            serial: self.context.serial,
        });
        let vring = self.vring(index)?;
        let Some(kick) = vring.kick.clone().filter(|_| vring.enabled && !vring.started) else { return Ok(()) };
        let (Some(entries), Some(addresses)) = (vring.entries, vring.addresses) else {
            return Err(refuse(format!("queue {index} was started without a size or addresses")));
        };
        let setup = RingSetup {
            entries,
            addresses,
            event_idx: features & EVENT_IDX != 0,
            indirect: features & INDIRECT_DESC != 0,
        };
        let base = vring.base;
        let inflight = match region {
            Some(region) => Some(
                u16::try_from(index)
                    .ok()
                    .and_then(|i| region.queue(i))
                    .ok_or_else(|| refuse(format!("queue {index} is not in the inflight region")))?,
            ),
            None => None,
        };
        let (call, err) = (vring.call.clone(), vring.err.clone());
        let worker = self.worker(index)?;
        for command in
            [Command::Call(call), Command::Err(err), Command::Start { setup, memory, base, inflight, kick, rules }]
        {
            worker.call(command).map_err(failed)?;
        }
        self.vring(index)?.started = true;
        Ok(())
    }

    fn worker(&mut self, index: u32) -> Result<&Worker> {
        let queue = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        let closer = self.closer.clone();
        let context = WorkerContext {
            name: format!("{} queue {index}", self.context.name),
            queue,
            attachment: self.context.attachment.clone(),
            counters: self.context.counters.get(queue).ok_or(Error::InvalidParam)?.clone(),
            observer: self.context.observer.clone(),
            limits: self.context.limits.clone(),
            durable: self.durable.clone(),
            close: Arc::new(move |reason| closer.close(reason)),
        };
        let slot = &mut self.vring(index)?.worker;
        if slot.is_none() {
            *slot = Some(Worker::spawn(context).map_err(failed)?);
        }
        slot.as_ref().ok_or(Error::BackendInternalError)
    }

    /// Drains a queue and remembers where it stopped.
    fn stop_ring(&mut self, index: u32) -> Result<()> {
        let vring = self.vring(index)?;
        vring.kick = None;
        if std::mem::take(&mut vring.started)
            && let Some(worker) = &vring.worker
        {
            vring.base = worker.call(Command::Stop).map_err(failed)?;
        }
        Ok(())
    }

    /// Drains all queues.
    fn stop_all_rings(&mut self) {
        for vring in &mut self.vrings {
            // A worker that has died has nothing in flight; dropping it drains it otherwise.
            vring.started = false;
            vring.worker = None;
        }
    }

    fn reset(&mut self) {
        self.stop_all_rings();
        let enabled = self.features & PROTOCOL_FEATURES == 0;
        for vring in &mut self.vrings {
            let (call, err) = (vring.call.take(), vring.err.take());
            *vring = Vring { call, err, enabled, ..Vring::default() };
        }
        self.inflight = None;
        self.config.reset();
        self.update_durable();
    }

    /// Tells a running worker of a change.
    fn tell(&mut self, index: u32, command: Command) -> Result<()> {
        let vring = self.vring(index)?;
        if let Some(worker) = vring.worker.as_ref().filter(|_| vring.started) {
            worker.call(command).map_err(failed)?;
        }
        Ok(())
    }

    fn set_memory(&mut self, memory: MemoryMap) -> Result<()> {
        self.memory = Arc::new(memory);
        for index in 0..self.vrings.len() {
            let memory = self.memory.clone();
            self.tell(u32::try_from(index).unwrap_or(u32::MAX), Command::Memory(memory))?;
        }
        Ok(())
    }
}

fn event(fd: Option<File>) -> Result<Option<EventFd>> {
    fd.map(EventFd::from_frontend).transpose().map_err(failed)
}

fn region_spec(guest: u64, frontend: u64, size_bytes: u64, file_offset: u64) -> RegionSpec {
    RegionSpec { guest: GuestAddress(guest), frontend: FrontendAddress(frontend), size_bytes, file_offset }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered() != 0 {
            return Err(refuse(format!("features {:#x} were not offered", features & !self.offered())));
        }
        if features != self.features && self.vrings.iter().any(|v| v.started) {
            return Err(refuse("the features changed while queues run"));
        }
        self.features = features;
        if features & PROTOCOL_FEATURES == 0 {
            // Without protocol features there is no SET_VRING_ENABLE: rings start enabled.
            self.vrings.iter_mut().for_each(|v| v.enabled = true);
        }
        self.update_durable();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let spec =
            |r: &VhostUserMemoryRegion| region_spec(r.guest_phys_addr, r.user_addr, r.memory_size, r.mmap_offset);
        let table = regions.iter().map(spec).zip(files).collect();
        let memory = MemoryMap::from_table(table, &self.context.limits).map_err(failed)?;
        self.set_memory(memory)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let entries = Ring::check_entries(num).map_err(|e| refuse(e.to_string()))?;
        let vring = self.vring(index)?;
        if vring.started && vring.entries == Some(entries) {
            return Ok(());
        }
        self.resting_vring(index, "size")?.entries = Some(entries);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = RingAddresses {
            descriptors: FrontendAddress(descriptor),
            avail: FrontendAddress(available),
            used: FrontendAddress(used),
        };
        let vring = self.vring(index)?;
        if vring.started && vring.addresses == Some(addresses) {
            return Ok(());
        }
        self.resting_vring(index, "addresses")?.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| refuse(format!("{base} is not an index of a split ring")))?;
        self.resting_vring(index, "base")?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop_ring(index)?;
        let base = self.vring(index)?.base;
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        let kick = event(fd)?.map_or(Kick::Poll, Kick::Event);
        self.vring(index)?.kick = Some(kick.clone());
        self.tell(index, Command::Kick(kick))?;
        self.start_if_ready(index)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        let call = event(fd)?;
        self.vring(index)?.call = call.clone();
        self.tell(index, Command::Call(call))
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        let err = event(fd)?;
        self.vring(index)?.err = err.clone();
        self.tell(index, Command::Err(err))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(features::protocol_offered())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !features::protocol_offered().bits();
        if unknown != 0 {
            return Err(refuse(format!("protocol features {unknown:#x} were not offered")));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        self.tell(index, Command::Enable(enable))?;
        self.start_if_ready(index)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.config.read(offset, size).ok_or_else(|| refuse(format!("no config space at {offset}+{size}")))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        if self.features & features::CONFIG_WCE == 0 || !self.config.write(offset, buf) {
            return Err(refuse(format!("config space at {offset}+{} cannot be written so", buf.len())));
        }
        self.update_durable();
        self.note_cache();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_SLOTS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let spec = region_spec(region.guest_phys_addr, region.user_addr, region.memory_size, region.mmap_offset);
        let memory = self.memory.with(spec, &fd, &self.context.limits).map_err(failed)?;
        self.set_memory(memory)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest, size, frontend) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let memory = self.memory.without(GuestAddress(guest), size, FrontendAddress(frontend)).map_err(failed)?;
        self.set_memory(memory)
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, entries) = (inflight.num_queues, inflight.queue_size);
        let (file, bytes) = InflightRegion::create(queues, entries, self.vrings.len()).map_err(failed)?;
        Ok((VhostUserInflight::new(bytes, 0, queues, entries), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        if self.vrings.iter().any(|v| v.started) {
            return Err(refuse("the inflight region changed while queues run"));
        }
        // The message is packed: copy the fields out.
        let (offset, bytes) = (inflight.mmap_offset, inflight.mmap_size);
        let (queues, entries) = (inflight.num_queues, inflight.queue_size);
        let (queues_max, limits) = (self.vrings.len(), &self.context.limits);
        let region = InflightRegion::open(&file, offset, bytes, queues, entries, queues_max, limits).map_err(failed)?;
        // The guest said so to an earlier daemon, and goes by it.
        if region.is_writethrough() {
            self.config.set_writeback(false);
            self.update_durable();
        }
        self.inflight = Some(region);
        self.note_cache();
        Ok(())
    }

    // The rest belongs to protocol features that are not offered.

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(refuse("GPU_SET_SOCKET was not offered"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(refuse("GET_SHARED_OBJECT was not offered"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(refuse("SET_DEVICE_STATE_FD was not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(refuse("CHECK_DEVICE_STATE was not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(refuse("GET_SHMEM_CONFIG was not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(refuse("SET_LOG_BASE was not offered"))
    }
}
