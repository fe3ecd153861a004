//! One frontend's connection: its messages, its memory, its rings.
//!
//! What always holds:
//! - A message is answered when it has taken effect: workers have obeyed, or have drained where the protocol asks for it.
//! - What was not offered is refused; a refusal closes the connection (after the reply that was asked for), since a
//!   frontend that goes on after one would have another idea of the device than we do.
//! - The order of messages is the frontend's: a ring runs when all is known that it takes, whatever came last.
//! - When the session ends, every request is done and no thread of it is left; then its connection to the disk ends, and
//!   then its place is free.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;

use super::command::{Command, Kick};
use super::event::Event;
use super::features::{self, ConfigSpace, EVENT_IDX, INDIRECT_DESC, MEMORY_SLOTS_MAX, PROTOCOL_FEATURES};
use super::inflight::InflightRegion;
use super::memory::{FrontendAddress, GuestAddress, MemoryMap, RegionSpec};
use super::message::{
    Backchannel, Channel, Ended, Message, config_part, has_answer, inflight_of, refused, takes_files, vring_file, wide,
};
use super::places::Place;
use super::request::Rules;
use super::ring::{Ring, RingAddresses, RingSetup};
use super::seat::{Readers, Seat, SessionContext};
use super::stats::Traffic;
use super::worker::{Worker, WorkerContext};

/// How long after its first kick a guest may have announced nothing before that is worth a line.
const EMPTY_FOR: Duration = Duration::from_secs(5);

type Result<T> = std::result::Result<T, Ended>;

/// Serves one connection until it ends, for whatever reason. Logs the reason unless the frontend just left.
pub(super) fn run(mut context: SessionContext, stream: UnixStream, seat: &Seat) {
    let channel = Channel::new(stream);
    // Who says nothing is nobody yet.
    if !channel.has_begun() || !seat.enter(&mut context) {
        return;
    }
    let (name, limits) = (context.name.clone(), context.limits.clone());
    let closer = Arc::new(Closer { stream: seat.stream().clone(), reason: Mutex::new(None) });
    let readers = context.attachment.is_read_only().then(|| seat.readers().clone());
    let mut session = Session::new(context, closer.clone(), readers);
    let ended = loop {
        session.wait(&channel);
        if let Err(e) = channel.receive().and_then(|message| session.handle(&channel, message, seat)) {
            break e;
        }
    };
    // Requests may still run; the socket stays open until they are done, so that a frontend that waits for its end knows.
    session.stop_all_rings();
    drop(session);
    drop(channel);
    closer.hang_up();
    let reason = closer.reason.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (reason, ended) {
        (Some(reason), _) => limits.complain(format_args!("{name}: closed the connection: {reason}")),
        (None, Ended::Left) => log::debug!("{name}: the frontend left"),
        (None, _) if seat.is_stopping() => {}
        (None, e @ Ended::Gone(_)) => log::debug!("{name}: {e}"),
        (None, e) => limits.complain(format_args!("{name}: closed the connection: {e}")),
    }
}

/// Ends a connection from a worker.
struct Closer {
    stream: Arc<UnixStream>,
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
    call: Option<Event>,
    err: Option<Event>,
    enabled: bool,
    started: bool,
    // Stays from one start to the next.
    worker: Option<Worker>,
}

impl Vring {
    /// Drains the queue and remembers where it stopped.
    fn rest(&mut self) -> Result<()> {
        if std::mem::take(&mut self.started)
            && let Some(worker) = &self.worker
        {
            self.base = worker.call(Command::Stop).map_err(failed)?;
        }
        Ok(())
    }
}

struct Session {
    context: SessionContext,
    closer: Arc<Closer>,
    features: u64,
    config: ConfigSpace,
    /// The size that the frontend has read here.
    told_bytes: Option<u64>,
    durable: Arc<AtomicBool>,
    memory: Arc<MemoryMap>,
    inflight: Option<Arc<InflightRegion>>,
    traffic: Arc<Traffic>,
    readers: Option<Arc<Readers>>,
    /// Until when the guest may have announced nothing. None before the first ring runs, and after it was looked at.
    empty_until: Option<Instant>,
    vrings: Vec<Vring>,
    // Last: it is free when all else has ended.
    place: Option<Place>,
}

/// What a message is answered.
enum Answer {
    /// That it was obeyed, if that was asked for.
    Done,
    Bytes(Vec<u8>),
    File(Vec<u8>, File),
}

fn failed(e: impl Into<io::Error>) -> Ended {
    refused(e.into().to_string())
}

impl Session {
    fn new(context: SessionContext, closer: Arc<Closer>, readers: Option<Arc<Readers>>) -> Session {
        let queues = context.counters.len();
        let read_only = context.is_read_only();
        let queues_offered = u16::try_from(queues).unwrap_or(features::QUEUES_MAX);
        Session {
            config: ConfigSpace::new(&context.attachment.geometry(), read_only, queues_offered, context.hints),
            told_bytes: None,
            context,
            closer,
            features: 0,
            durable: Arc::new(AtomicBool::new(true)),
            memory: Arc::new(MemoryMap::default()),
            inflight: None,
            traffic: Arc::default(),
            readers,
            empty_until: None,
            place: None,
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
            .ok_or_else(|| refused(format!("there is no queue {index}, only {queues}")))
    }

    /// A queue whose setup may be changed now.
    fn resting_vring(&mut self, index: u32, what: &str) -> Result<&mut Vring> {
        let vring = self.vring(index)?;
        if vring.started {
            return Err(refused(format!("the {what} of queue {index} changed while it runs")));
        }
        Ok(vring)
    }

    /// Whether something may be changed that all queues go by.
    fn all_rest(&self, what: &str) -> Result<()> {
        match self.vrings.iter().any(|v| v.started) {
            true => Err(refused(format!("{what} changed while queues run"))),
            false => Ok(()),
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
    fn start_if_ready(&mut self, index: u32, seat: &Seat) -> Result<()> {
        let features = self.features;
        let (memory, region) = (self.memory.clone(), self.inflight.clone());
        let vring = self.vring(index)?;
        let Some(kick) = vring.kick.clone().filter(|_| vring.enabled && !vring.started) else { return Ok(()) };
        let (Some(entries), Some(addresses)) = (vring.entries, vring.addresses) else { return Ok(()) };
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
                    .ok_or_else(|| refused(format!("queue {index} is not in the inflight region")))?,
            ),
            None => None,
        };
        let (call, err) = (vring.call.clone(), vring.err.clone());
        self.take_place(seat)?;
        self.look_at_size(index, &setup, seat);
        let rules = Box::new(Rules {
            capacity_bytes: self.context.attachment.geometry().size_bytes,
            features,
            durable: true,
            read_only: self.context.is_read_only(),
            serial: self.context.serial,
        });
        let hint = match self.memory.regions() {
            0 => "; the frontend has shared no memory: with QEMU it takes a memory backend with share=on",
            _ => "",
        };
        let worker = self.worker(index)?;
        for command in
            [Command::Call(call), Command::Err(err), Command::Start { setup, memory, base, inflight, kick, rules }]
        {
            worker.call(command).map_err(|e| refused(format!("queue {index} cannot be served: {e}{hint}")))?;
        }
        self.vring(index)?.started = true;
        Ok(())
    }

    /// A driver that believes the config space waits for ever for room in a ring that is too small for it.
    /// What the config space says was read before the ring's size was known, so the next frontend is told better.
    fn look_at_size(&self, index: u32, setup: &RingSetup, seat: &Seat) {
        let room = setup.entries.saturating_sub(2);
        if !setup.indirect && room < self.context.hints.segments {
            seat.offer_segments(room.max(1));
            self.context.limits.complain(format_args!(
                "{}: queue {index} has {} entries and no indirect descriptors, and requests are told to have up to {} \
                 segments: a guest that does so hangs. Who connects next is told {room}; set segments-max={room} to keep it so",
                self.context.name,
                setup.entries,
                self.context.hints.segments
            ));
        }
    }

    /// Takes the place that running rings take.
    fn take_place(&mut self, seat: &Seat) -> Result<()> {
        if self.place.is_some() {
            return Ok(());
        }
        self.place = Some(seat.take_place().ok_or_else(|| refused("another frontend has running queues"))?);
        // Whoever has running queues at a cut may stay with the version of before. It ends with the session.
        self.context.attachment = self.context.attachment.connect();
        self.empty_until = Some(Instant::now() + EMPTY_FOR);
        // It may have connected again without another look, and have grown since the first one.
        if self.told_bytes != Some(self.context.attachment.geometry().size_bytes) {
            seat.tell_of_change();
        }
        if self.inflight.is_none() && !self.context.is_read_only() {
            self.context.limits.complain(format_args!(
                "{}: the frontend keeps no inflight region: if the daemon is killed, requests in flight are lost",
                self.context.name
            ));
        }
        Ok(())
    }

    /// Waits for the next message, and says once if what the guest announces cannot be seen from here.
    fn wait(&mut self, channel: &Channel) {
        while let Some(until) = self.empty_until {
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() && channel.wait(Some(left)) {
                return;
            }
            if left.is_zero() {
                self.empty_until = None;
                if self.traffic.is_one_sided() {
                    self.context.limits.complain(format_args!(
                        "{}: the guest kicks, but its rings are empty as they are seen here: is its memory shared? With \
                         QEMU it takes a memory backend with share=on",
                        self.context.name
                    ));
                }
            }
        }
    }

    fn worker(&mut self, index: u32) -> Result<&Worker> {
        let queue = usize::try_from(index).map_err(|_| refused("no such queue"))?;
        let closer = self.closer.clone();
        let context = WorkerContext {
            name: format!("{} queue {index}", self.context.name),
            queue,
            attachment: self.context.attachment.clone(),
            counters: self.context.counters.get(queue).ok_or_else(|| refused("no such queue"))?.clone(),
            observer: self.context.observer.clone(),
            limits: self.context.limits.clone(),
            durable: self.durable.clone(),
            traffic: self.traffic.clone(),
            readers: self.readers.clone(),
            close: Arc::new(move |reason| closer.close(reason)),
        };
        let slot = &mut self.vring(index)?.worker;
        if slot.is_none() {
            *slot = Some(Worker::spawn(context).map_err(failed)?);
        }
        slot.as_ref().ok_or_else(|| refused("a queue has no thread"))
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
        // The word on the cache stays: QEMU keeps its own copy over a reset and tells only what differs from that.
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

/// The messages.
impl Session {
    fn handle(&mut self, channel: &Channel, mut message: Message, seat: &Seat) -> Result<()> {
        let request = message.request;
        match self.obey(&mut message, seat) {
            Ok(Answer::Done) => channel.acknowledge(&message, true),
            Ok(Answer::Bytes(bytes)) => channel.reply(request, &bytes, None),
            Ok(Answer::File(bytes, file)) => channel.reply(request, &bytes, Some(file.as_fd())),
            Err(e) => {
                if !has_answer(request) {
                    channel.acknowledge(&message, false)?;
                }
                Err(e)
            }
        }
    }

    fn obey(&mut self, message: &mut Message, seat: &Seat) -> Result<Answer> {
        let number = |value: u64| Ok(Answer::Bytes(value.to_ne_bytes().to_vec()));
        if !message.files.is_empty() && !takes_files(message.request) {
            return Err(refused(format!("a message {:?} with descriptors", message.request)));
        }
        match message.request {
            FrontendReq::SET_OWNER => message.nothing()?,
            FrontendReq::RESET_OWNER | FrontendReq::RESET_DEVICE => {
                message.nothing()?;
                self.reset();
            }
            FrontendReq::GET_FEATURES => {
                message.nothing()?;
                return number(self.offered());
            }
            FrontendReq::SET_FEATURES => self.set_features(message.number()?)?,
            FrontendReq::GET_PROTOCOL_FEATURES => {
                message.nothing()?;
                return number(features::protocol_offered().bits());
            }
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let unknown = message.number()? & !features::protocol_offered().bits();
                if unknown != 0 {
                    return Err(refused(format!("protocol features {unknown:#x} were not offered")));
                }
            }
            FrontendReq::GET_QUEUE_NUM => {
                message.nothing()?;
                return number(self.vrings.len() as u64);
            }
            FrontendReq::GET_MAX_MEM_SLOTS => {
                message.nothing()?;
                return number(MEMORY_SLOTS_MAX as u64);
            }
            FrontendReq::SET_MEM_TABLE => self.set_mem_table(message)?,
            FrontendReq::ADD_MEM_REG => {
                let (region, file) = (region_of(message.words()?), message.take_file()?);
                self.set_memory(self.memory.with(region, &file, &self.context.limits).map_err(failed)?)?;
            }
            FrontendReq::REM_MEM_REG => {
                let RegionSpec { guest, frontend, size_bytes, .. } = region_of(message.words()?);
                self.set_memory(self.memory.without(guest, size_bytes, frontend).map_err(failed)?)?;
            }
            FrontendReq::SET_VRING_NUM => self.set_vring_num(message.words()?)?,
            FrontendReq::SET_VRING_ADDR => self.set_vring_addr(message.words()?)?,
            FrontendReq::SET_VRING_BASE => {
                let [index, base] = message.words()?;
                let base =
                    u16::try_from(base).map_err(|_| refused(format!("{base} is not an index of a split ring")))?;
                self.resting_vring(index, "base")?.base = base;
            }
            FrontendReq::GET_VRING_BASE => {
                let [index, _] = message.words()?;
                let vring = self.vring(index)?;
                vring.kick = None;
                vring.rest()?;
                return Ok(Answer::Bytes(bytes_of(&[index, u32::from(vring.base)])));
            }
            FrontendReq::SET_VRING_KICK => {
                let (index, file) = vring_file(message)?;
                let kick = file.map(Event::to_wait_for).transpose().map_err(failed)?.map_or(Kick::Poll, Kick::Event);
                self.vring(index)?.kick = Some(kick.clone());
                self.tell(index, Command::Kick(kick))?;
            }
            FrontendReq::SET_VRING_CALL => {
                let (index, file) = vring_file(message)?;
                let call = file.map(Event::to_signal).transpose().map_err(failed)?;
                self.vring(index)?.call.clone_from(&call);
                self.tell(index, Command::Call(call))?;
            }
            FrontendReq::SET_VRING_ERR => {
                let (index, file) = vring_file(message)?;
                let err = file.map(Event::to_signal).transpose().map_err(failed)?;
                self.vring(index)?.err.clone_from(&err);
                self.tell(index, Command::Err(err))?;
            }
            FrontendReq::SET_VRING_ENABLE => {
                let [index, enable @ 0..=1] = message.words()? else {
                    return Err(refused("a queue is to be enabled or disabled"));
                };
                let vring = self.vring(index)?;
                vring.enabled = enable == 1;
                if !vring.enabled {
                    // Who disables a ring may give its memory, and that of its buffers, to somebody else.
                    vring.rest()?;
                }
            }
            FrontendReq::GET_CONFIG => return self.get_config(message),
            FrontendReq::SET_CONFIG => self.set_config(message)?,
            FrontendReq::GET_INFLIGHT_FD => return self.get_inflight_fd(message),
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight_fd(message)?,
            FrontendReq::SET_BACKEND_REQ_FD => {
                message.nothing()?;
                seat.set_backchannel(Backchannel::new(message.take_file()?).map_err(failed)?);
            }
            other => return Err(refused(format!("a message {other:?}, for which nothing was offered"))),
        }
        // Whatever it was that a ring was waiting for.
        (0..self.vrings.len())
            .try_for_each(|index| self.start_if_ready(u32::try_from(index).unwrap_or(u32::MAX), seat))?;
        Ok(Answer::Done)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered() != 0 {
            return Err(refused(format!("features {:#x} were not offered", features & !self.offered())));
        }
        if features != self.features {
            self.all_rest("the features")?;
        }
        self.features = features;
        if features & PROTOCOL_FEATURES == 0 {
            // Without protocol features there is no SET_VRING_ENABLE: rings start enabled.
            self.vrings.iter_mut().for_each(|v| v.enabled = true);
        }
        self.update_durable();
        Ok(())
    }

    /// There may be room for more regions than are counted; each that is counted has a descriptor.
    fn set_mem_table(&mut self, message: &mut Message) -> Result<()> {
        if message.body.len() < 8 {
            return Err(message.odd());
        }
        let [count, _padding] = message.leading();
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let (regions, _) = message.body[8..].as_chunks::<32>();
        if count == 0 || count > regions.len() || count != message.files.len() {
            let files = message.files.len();
            return Err(refused(format!("a table of {count} memory regions with {files} descriptors")));
        }
        let spec = |bytes: &[u8; 32]| {
            let [guest, size, frontend, offset] =
                std::array::from_fn(|i| u64::from_ne_bytes(std::array::from_fn(|j| bytes[8 * i + j])));
            region_spec(guest, frontend, size, offset)
        };
        let table = regions.iter().map(spec).zip(std::mem::take(&mut message.files)).collect();
        let memory = MemoryMap::from_table(table, &self.context.limits).map_err(failed)?;
        self.set_memory(memory)
    }

    fn set_vring_num(&mut self, [index, num]: [u32; 2]) -> Result<()> {
        let entries = Ring::check_entries(num).map_err(|e| refused(e.to_string()))?;
        let vring = self.vring(index)?;
        if !(vring.started && vring.entries == Some(entries)) {
            self.resting_vring(index, "size")?.entries = Some(entries);
        }
        Ok(())
    }

    fn set_vring_addr(&mut self, words: [u32; 10]) -> Result<()> {
        let [index, flags, d0, d1, u0, u1, a0, a1, _log0, _log1] = words;
        let (descriptors, used, avail) = (wide(d0, d1), wide(u0, u1), wide(a0, a1));
        // The one flag there is asks for the used ring to be logged, which means nothing without a log.
        if flags & !1 != 0 || descriptors % 16 != 0 || used % 4 != 0 || avail % 2 != 0 {
            return Err(refused(format!("the addresses of queue {index} are not aligned, or have flags {flags:#x}")));
        }
        let addresses = RingAddresses {
            descriptors: FrontendAddress(descriptors),
            avail: FrontendAddress(avail),
            used: FrontendAddress(used),
        };
        let vring = self.vring(index)?;
        if !(vring.started && vring.addresses == Some(addresses)) {
            self.resting_vring(index, "addresses")?.addresses = Some(addresses);
        }
        Ok(())
    }

    /// What leaves the config space is answered with no bytes, as the protocol has it.
    fn get_config(&mut self, message: &Message) -> Result<Answer> {
        let ([offset, size, flags], room) = config_part(message)?;
        self.config.set_capacity(self.context.attachment.geometry().size_bytes);
        self.told_bytes = Some(self.config.capacity_bytes());
        let Some(mut bytes) = self.config.read(offset, size) else {
            return Ok(Answer::Bytes(bytes_of(&[offset, 0, flags])));
        };
        // As long as what was sent, which some go by.
        bytes.resize(room.len(), 0);
        Ok(Answer::Bytes([bytes_of(&[offset, size, flags]), bytes].concat()))
    }

    fn set_config(&mut self, message: &Message) -> Result<()> {
        let ([offset, size, _], room) = config_part(message)?;
        let bytes = &room[..usize::try_from(size).unwrap_or(room.len())];
        // A driver may say it before the features are known here; what it says counts if it has negotiated that.
        if !self.config.write(offset, bytes) {
            return Err(refused(format!("config space at {offset}+{} cannot be written so", bytes.len())));
        }
        self.update_durable();
        self.note_cache();
        Ok(())
    }

    fn get_inflight_fd(&mut self, message: &Message) -> Result<Answer> {
        let (_, _, queues, entries) = inflight_of(message)?;
        let (file, bytes) = InflightRegion::create(queues, entries, self.vrings.len()).map_err(failed)?;
        let numbers = [queues.to_ne_bytes(), entries.to_ne_bytes()].concat();
        Ok(Answer::File([&bytes.to_ne_bytes()[..], &[0; 8], &numbers, &[0; 4]].concat(), file))
    }

    fn set_inflight_fd(&mut self, message: &mut Message) -> Result<()> {
        self.all_rest("the inflight region")?;
        let (bytes, offset, queues, entries) = inflight_of(message)?;
        let file = message.take_file()?;
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
}

fn region_of(words: [u32; 10]) -> RegionSpec {
    let [_, _, g0, g1, s0, s1, f0, f1, o0, o1] = words;
    region_spec(wide(g0, g1), wide(f0, f1), wide(s0, s1), wide(o0, o1))
}

fn region_spec(guest: u64, frontend: u64, size_bytes: u64, file_offset: u64) -> RegionSpec {
    RegionSpec { guest: GuestAddress(guest), frontend: FrontendAddress(frontend), size_bytes, file_offset }
}

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
