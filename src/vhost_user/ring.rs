//! One split virtqueue in guest memory (virtio 1.2, 2.7).
//!
//! What always holds:
//! - Nothing in the ring is trusted: indices are bounded before use, each word is read once, and a ring that breaks the
//!   rules is *broken*: it hands out nothing more, and the daemon goes on.
//! - A head is in flight at most once; its bit goes when its used entry is written.
//! - The ring's memory is mapped for as long as the ring holds its [`MemoryMap`].
//!
//! It does not look into descriptors; that is [`super::chain`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::features::RING_ENTRIES_MAX;
use super::inflight::InflightQueue;
use super::intake::AvailSource;
use super::memory::{FrontendAddress, MemoryMap};
use crate::crash;

/// Where a ring is and how it was negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingSetup {
    pub(super) entries: u16,
    pub(super) addresses: RingAddresses,
    pub(super) event_idx: bool,
    pub(super) indirect: bool,
}

/// The three parts, in the frontend's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) descriptors: FrontendAddress,
    pub(super) avail: FrontendAddress,
    pub(super) used: FrontendAddress,
}

/// Why a ring cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingFault {
    #[error("a ring of {0} entries was asked for; sizes are powers of two up to {RING_ENTRIES_MAX}")]
    Size(u32),
    #[error("the {0} does not lie in the guest's memory")]
    Outside(&'static str),
    #[error("the {0} is not aligned")]
    Misaligned(&'static str),
    #[error("the avail index jumped from {from} to {to} in a ring of {entries} entries")]
    AvailJump { from: u16, to: u16, entries: u16 },
    #[error("the driver announced descriptor {0}, which the ring does not have")]
    HeadOutOfRange(u16),
    #[error("the driver announced descriptor {0} again while it is in flight")]
    HeadInFlight(u16),
    #[error("the inflight region has fewer entries than the ring's {0}")]
    Inflight(u16),
}

/// A descriptor as it lies in guest memory, little-endian.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct RawDescriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

const _: () = assert!(size_of::<RawDescriptor>() == 16 && align_of::<RawDescriptor>() == 8);

/// The ring's places in our address space.
#[derive(Clone, Copy)]
struct Places {
    descriptors: *const RawDescriptor,
    avail: *mut u16,
    used: *mut u16,
}

/// A ring that is being served.
pub(super) struct Ring {
    setup: RingSetup,
    // Its own: each request counts itself in, and no ring of another thread shares that.
    memory: Arc<MemoryMap>,
    // None when the frontend took the ring's memory away.
    places: Option<Places>,
    next_avail: u16,
    loaded_avail: u16,
    next_used: u16,
    published_used: u16,
    signalled_used: u16,
    // One bit a head.
    heads: Vec<u64>,
    inflight: Option<InflightQueue>,
    // Whether the driver is to kick. True at first: another backend may have left it so.
    is_armed: bool,
    // Whether no more is taken of what was loaded.
    is_paused: bool,
    // Heads whose used entries wait to be published.
    batch: Vec<u16>,
    fault: Option<RingFault>,
}

#[allow(clippy::cast_possible_truncation)] // It is 1.
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

// The rings' layout in 16-bit words: flags, index, then the entries (a used entry is four words), then the event index.
const FLAGS: usize = 0;
const INDEX: usize = 1;
const ENTRIES: usize = 2;

impl Ring {
    /// Checks a ring's size.
    ///
    /// # Errors
    /// When it is zero, not a power of two or more than is offered.
    pub(super) fn check_entries(entries: u32) -> Result<u16, RingFault> {
        u16::try_from(entries)
            .ok()
            .filter(|n| n.is_power_of_two() && *n <= RING_ENTRIES_MAX)
            .ok_or(RingFault::Size(entries))
    }

    /// A ring that goes on at avail index `base`. With inflight tracking it goes on after what was taken before, whatever
    /// the base, and the heads that were not answered are returned too, in their order.
    ///
    /// # Errors
    /// When a part of it is not in the guest's memory, or not aligned, or the inflight region has too few entries.
    pub(super) fn new(
        setup: RingSetup,
        memory: Arc<MemoryMap>,
        base: u16,
        inflight: Option<InflightQueue>,
    ) -> Result<(Ring, Vec<u16>), RingFault> {
        if inflight.as_ref().is_some_and(|i| i.entries() < setup.entries) {
            return Err(RingFault::Inflight(setup.entries));
        }
        let places = locate(&setup, &memory)?;
        let mut ring = Ring {
            setup,
            memory: Arc::new(MemoryMap::clone(&memory)),
            places: Some(places),
            next_avail: base,
            loaded_avail: base,
            next_used: 0,
            published_used: 0,
            signalled_used: 0,
            heads: vec![0; usize::from(setup.entries).div_ceil(64)],
            inflight,
            is_armed: true,
            is_paused: false,
            batch: Vec::new(),
            fault: None,
        };
        // The driver's view of what was used counts; after a drain it equals the base.
        ring.next_used = ring.load(places.used, INDEX, Ordering::Relaxed);
        (ring.published_used, ring.signalled_used) = (ring.next_used, ring.next_used);
        let mut unanswered = Vec::new();
        if let Some(inflight) = &mut ring.inflight {
            unanswered = inflight.recover(ring.next_used, setup.entries);
            // What was taken is what was used and what was not. After a crash no frontend knows better: QEMU says what
            // was used, cloud-hypervisor what is announced, which may be more than was taken.
            let count = u16::try_from(unanswered.len()).expect("no more than entries");
            ring.next_avail = ring.next_used.wrapping_add(count);
            ring.loaded_avail = ring.next_avail;
            unanswered.iter().for_each(|head| ring.heads[usize::from(head / 64)] |= 1 << (head % 64));
        }
        Ok((ring, unanswered))
    }

    /// Goes on in other memory; requests in flight keep the old one.
    ///
    /// # Errors
    /// When the ring is not in it. The ring then hands out nothing and takes no answers.
    pub(super) fn remap(&mut self, memory: Arc<MemoryMap>) -> Result<(), RingFault> {
        let located = locate(&self.setup, &memory);
        self.places = located.ok();
        self.memory = Arc::new(MemoryMap::clone(&memory));
        located.map(drop)
    }

    /// The memory that chains of this ring lie in.
    pub(super) fn memory(&self) -> &Arc<MemoryMap> {
        &self.memory
    }

    /// Whether memory of the frontend's that the ring uses was found missing.
    pub(super) fn is_poisoned(&self) -> bool {
        self.memory.is_poisoned() || self.inflight.as_ref().is_some_and(InflightQueue::is_poisoned)
    }

    /// Size and features.
    pub(super) fn setup(&self) -> &RingSetup {
        &self.setup
    }

    /// The avail index up to which requests were taken.
    pub(super) fn base(&self) -> u16 {
        self.next_avail
    }

    /// What broke the ring, if anything did since the last call.
    pub(super) fn take_fault(&mut self) -> Option<RingFault> {
        self.fault.take()
    }

    /// A descriptor of the table, read once. None when there is no such.
    pub(super) fn descriptor(&self, index: u16) -> Option<RawDescriptor> {
        let places = self.places.filter(|_| index < self.setup.entries)?;
        // SAFETY: inside the table that locate() found in memory that `self.memory` keeps mapped, and aligned. Volatile,
        // because the guest may write it at any time; every bit pattern is a valid RawDescriptor.
        let raw = unsafe { places.descriptors.add(usize::from(index)).read_volatile() };
        Some(raw.to_native())
    }

    /// Gives a chain back to the driver, with the number of bytes that were written into it. Seen by the driver after
    /// [`Ring::publish`].
    pub(super) fn push_used(&mut self, head: u16, written: u32) {
        self.heads[usize::from(head / 64)] &= !(1 << (head % 64));
        let Some(places) = self.places else { return };
        let entry = ENTRIES + usize::from(self.next_used % self.setup.entries) * 4;
        // SAFETY: inside the used ring that locate() found, whose entries are 4-aligned; mapped while `self.memory` is.
        unsafe {
            let at = places.used.add(entry).cast::<u32>();
            at.write_volatile(u32::from(head).to_le());
            at.add(1).write_volatile(written.to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(inflight) = &self.inflight {
            inflight.join_batch(head);
            self.batch.push(head);
        }
    }

    /// Makes the used entries visible to a driver that looks. One that sleeps is told after [`Ring::wants_call`].
    pub(super) fn publish(&mut self) {
        let Some(places) = self.places.filter(|_| self.published_used != self.next_used) else { return };
        crash::point("before answers are visible");
        self.store(places.used, INDEX, self.next_used);
        self.published_used = self.next_used;
        crash::point("after answers became visible");
        if let Some(inflight) = &self.inflight {
            inflight.end_batch(&self.batch, self.next_used);
            self.batch.clear();
        }
    }

    /// Whether the driver wants to be told of what was published since this was last asked.
    pub(super) fn wants_call(&mut self) -> bool {
        let Some(places) = self.places.filter(|_| self.signalled_used != self.published_used) else { return false };
        // The index must be visible before we look whether the driver sleeps (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        let wants = self.is_call_wanted(places);
        self.signalled_used = self.published_used;
        wants
    }

    fn is_call_wanted(&self, places: Places) -> bool {
        if self.setup.event_idx {
            let event = self.load(places.avail, ENTRIES + usize::from(self.setup.entries), Ordering::Relaxed);
            // Whether the event index is among the entries published since the last look.
            self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(self.signalled_used)
        } else {
            u32::from(self.load(places.avail, FLAGS, Ordering::Relaxed)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Whether a request is announced that was not taken yet.
    pub(super) fn announces(&self) -> bool {
        self.places.is_some_and(|places| self.load(places.avail, INDEX, Ordering::Relaxed) != self.next_avail)
    }

    /// Leaves what is announced in the ring until it is looked at again.
    pub(super) fn pause(&mut self) {
        self.is_paused = true;
    }

    /// Asks not to be kicked: the ring is being looked at. A driver with event indices does not kick again by itself.
    pub(super) fn disarm(&mut self) {
        if let Some(places) = self.places.filter(|_| self.is_armed) {
            self.is_armed = false;
            if !self.setup.event_idx {
                self.store(places.used, FLAGS, NO_NOTIFY);
            }
        }
    }

    /// Asks to be kicked for the next request. Returns whether there already is one.
    pub(super) fn arm(&mut self) -> bool {
        let Some(places) = self.places else { return false };
        self.is_armed = true;
        if self.setup.event_idx {
            self.store(places.used, ENTRIES + usize::from(self.setup.entries) * 4, self.next_avail);
        } else {
            self.store(places.used, FLAGS, 0);
        }
        // The wish must be visible before we look for requests that came without a kick.
        fence(Ordering::SeqCst);
        self.load(places.avail, INDEX, Ordering::Relaxed) != self.next_avail
    }

    fn load(&self, base: *mut u16, word: usize, order: Ordering) -> u16 {
        // SAFETY: callers name words inside the parts that locate() found, 2-aligned and mapped while `self.memory` is;
        // the guest's own accesses are outside this program's memory model, and atomic is the closest there is.
        u16::from_le(unsafe { AtomicU16::from_ptr(base.add(word)) }.load(order))
    }

    fn store(&self, base: *mut u16, word: usize, value: u16) {
        // SAFETY: as in load.
        unsafe { AtomicU16::from_ptr(base.add(word)) }.store(value.to_le(), Ordering::Release);
    }
}

impl AvailSource for Ring {
    type Item = u16;

    fn load_avail(&mut self) -> bool {
        let Some(places) = self.places.filter(|_| self.fault.is_none()) else { return false };
        self.is_paused = false;
        let to = self.load(places.avail, INDEX, Ordering::Acquire);
        let from = self.next_avail;
        if to.wrapping_sub(from) > self.setup.entries {
            self.fault = Some(RingFault::AvailJump { from, to, entries: self.setup.entries });
            return false;
        }
        self.loaded_avail = to;
        to != from
    }

    fn pop(&mut self) -> Option<u16> {
        let is_more = self.fault.is_none() && self.next_avail != self.loaded_avail && !self.is_paused;
        let places = self.places.filter(|_| is_more)?;
        let entry = ENTRIES + usize::from(self.next_avail % self.setup.entries);
        let head = self.load(places.avail, entry, Ordering::Relaxed);
        if head >= self.setup.entries {
            self.fault = Some(RingFault::HeadOutOfRange(head));
            return None;
        }
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        if self.heads[word] & bit != 0 {
            self.fault = Some(RingFault::HeadInFlight(head));
            return None;
        }
        self.heads[word] |= bit;
        if let Some(inflight) = &mut self.inflight {
            inflight.begin(head);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(head)
    }
}

impl RawDescriptor {
    /// From the ring's byte order.
    pub(super) fn to_native(self) -> RawDescriptor {
        RawDescriptor {
            address: u64::from_le(self.address),
            len: u32::from_le(self.len),
            flags: u16::from_le(self.flags),
            next: u16::from_le(self.next),
        }
    }
}

fn locate(setup: &RingSetup, memory: &MemoryMap) -> Result<Places, RingFault> {
    let entries = u64::from(setup.entries);
    let part = |name, at, len, align: usize| {
        let place = memory.frontend_range(at, len).ok_or(RingFault::Outside(name))?;
        if (place as usize).is_multiple_of(align) { Ok(place) } else { Err(RingFault::Misaligned(name)) }
    };
    Ok(Places {
        descriptors: part("descriptor table", setup.addresses.descriptors, entries * 16, 16)?.cast(),
        avail: part("avail ring", setup.addresses.avail, entries * 2 + 6, 2)?.cast(),
        used: part("used ring", setup.addresses.used, entries * 8 + 6, 4)?.cast(),
    })
}
