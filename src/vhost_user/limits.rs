//! What the frontends of one socket may take of the process, over all their connections.
//!
//! What always holds:
//! - What they have mapped is bounded, in bytes and in mappings, and counted for as long as it is mapped, whichever
//!   connection it came by.
//! - Each socket has a share of its own that no other one can take; what goes beyond comes from a part that all share.
//!   So who takes much keeps others from taking much, and from nothing else.
//! - What they can cause to be logged is some lines at once and one a second, and the same line once a minute. Nothing is
//!   left out silently.
//!
//! Memory for copies is bounded by socket only: what all shared could be held by one whose storage hangs.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::features::MEMORY_SLOTS_MAX;
use crate::image::Budget;

const GIB: u64 = 1 << 30;

/// What a frontend may map at least, and at most. In between it is a multiple of the machine's memory: more than that is
/// no guest's.
const FRONTEND_BYTES: (u64, u64) = (1024 * GIB, 16 * 1024 * GIB);
const FRONTEND_TIMES_MEMORY: u64 = 4;
/// A socket may have so many times what a frontend may: a table is replaced while requests still use the old one.
const SOCKET_TIMES_FRONTEND: u64 = 2;
const SOCKET_MAPPINGS: u64 = 4 * MEMORY_SLOTS_MAX as u64;
/// A socket's own share.
const OWN: Amount = Amount { bytes: 256 * GIB, mappings: 64 };
/// What all sockets together may have beyond their own shares: half of the addresses that a process has.
const COMMON: Amount = Amount { bytes: 64 * 1024 * GIB, mappings: 12_000 };
/// The bytes of copies that the requests of a socket may have at once.
const COPIES_BYTES: u64 = 32 << 20;

/// Lines at once, and the time until there may be another one.
const LINES_AT_ONCE: u32 = 8;
const LINE_EVERY: Duration = Duration::from_secs(1);
/// The time until the same is said again, if it is among the last things said.
const SAME_EVERY: Duration = Duration::from_secs(60);
const RECENT_MAX: usize = 8;

/// The limits of one socket.
pub(super) struct Limits {
    mapped: Mutex<Amount>,
    lines: Mutex<Lines>,
    copies: Arc<Budget>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Amount {
    bytes: u64,
    mappings: u64,
}

impl Amount {
    fn map(self, other: Amount, f: impl Fn(u64, u64) -> u64) -> Amount {
        Amount { bytes: f(self.bytes, other.bytes), mappings: f(self.mappings, other.mappings) }
    }

    fn plus(self, other: Amount) -> Amount {
        self.map(other, u64::saturating_add)
    }

    fn minus(self, other: Amount) -> Amount {
        self.map(other, u64::saturating_sub)
    }

    fn fits(self, limit: Amount) -> bool {
        self.bytes <= limit.bytes && self.mappings <= limit.mappings
    }
}

/// What all sockets together have beyond their own shares.
static BEYOND: Mutex<Amount> = Mutex::new(Amount { bytes: 0, mappings: 0 });

struct Lines {
    left: u32,
    since: Instant,
    left_out: u64,
    /// What was said last, and when.
    recent: Vec<(String, Instant)>,
}

/// Something that is mapped for a socket. Dropping it says that it is not any more.
pub(super) struct Mapped {
    limits: Arc<Limits>,
    bytes: u64,
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({} bytes)", self.bytes)
    }
}

/// The bytes that one frontend may map.
pub(super) fn frontend_bytes_max() -> u64 {
    static MAX: OnceLock<u64> = OnceLock::new();
    *MAX.get_or_init(|| {
        let info = rustix::system::sysinfo();
        let memory = u64::from(info.mem_unit).saturating_mul(info.totalram);
        memory.saturating_mul(FRONTEND_TIMES_MEMORY).clamp(FRONTEND_BYTES.0, FRONTEND_BYTES.1)
    })
}

impl Limits {
    /// The limits of a socket of which nobody has taken anything yet.
    pub(super) fn new() -> Arc<Limits> {
        let lines = Lines { left: LINES_AT_ONCE, since: Instant::now(), left_out: 0, recent: Vec::new() };
        let copies = Budget::new(COPIES_BYTES);
        Arc::new(Limits { mapped: Mutex::default(), lines: Mutex::new(lines), copies })
    }

    /// What copies of its guests' bytes are taken from.
    pub(super) fn copies(&self) -> Arc<Budget> {
        self.copies.clone()
    }

    /// Counts one mapping of so many bytes. None when that is more than there may be.
    pub(super) fn map(self: &Arc<Limits>, bytes: u64) -> Option<Mapped> {
        let most = Amount { bytes: SOCKET_TIMES_FRONTEND * frontend_bytes_max(), mappings: SOCKET_MAPPINGS };
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let now = mapped.plus(Amount { bytes, mappings: 1 });
        let mut beyond = BEYOND.lock().unwrap_or_else(PoisonError::into_inner);
        let all_beyond = beyond.plus(now.minus(OWN)).minus(mapped.minus(OWN));
        let takes_more = !now.minus(OWN).fits(mapped.minus(OWN));
        if !now.fits(most) || takes_more && !all_beyond.fits(COMMON) {
            return None;
        }
        (*beyond, *mapped) = (all_beyond, now);
        Some(Mapped { limits: self.clone(), bytes })
    }

    /// Logs a warning that a guest or frontend has caused, unless there were too many.
    pub(super) fn complain(&self, what: fmt::Arguments<'_>) {
        self.say(log::Level::Warn, what);
    }

    /// As [`Limits::complain`], of something that is not wrong.
    pub(super) fn mention(&self, what: fmt::Arguments<'_>) {
        self.say(log::Level::Info, what);
    }

    fn say(&self, level: log::Level, what: fmt::Arguments<'_>) {
        let left_out =
            self.lines.lock().unwrap_or_else(PoisonError::into_inner).take(&what.to_string(), Instant::now());
        match left_out {
            None => {}
            Some(0) => log::log!(level, "{what}"),
            Some(n) => log::log!(level, "{what} ({n} more lines about this socket were left out before this one)"),
        }
    }
}

impl Lines {
    /// Whether there may be a line now, and how many there were that might not.
    fn take(&mut self, text: &str, now: Instant) -> Option<u64> {
        self.recent.retain(|(_, said)| now.saturating_duration_since(*said) < SAME_EVERY);
        if self.recent.iter().any(|(recent, _)| recent == text) {
            self.left_out += 1;
            return None;
        }
        let more = now.saturating_duration_since(self.since).as_nanos() / LINE_EVERY.as_nanos();
        if let Some(more) = u32::try_from(more).ok().filter(|more| self.left.saturating_add(*more) < LINES_AT_ONCE) {
            self.left += more;
            self.since += LINE_EVERY * more;
        } else {
            (self.left, self.since) = (LINES_AT_ONCE, now);
        }
        if self.left == 0 {
            self.left_out += 1;
            return None;
        }
        self.left -= 1;
        if self.recent.len() == RECENT_MAX {
            self.recent.remove(0);
        }
        self.recent.push((text.to_owned(), now));
        Some(std::mem::take(&mut self.left_out))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let mut mapped = self.limits.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let now = mapped.minus(Amount { bytes: self.bytes, mappings: 1 });
        let mut beyond = BEYOND.lock().unwrap_or_else(PoisonError::into_inner);
        *beyond = beyond.plus(now.minus(OWN)).minus(mapped.minus(OWN));
        *mapped = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_one_a_second_after_the_first_ones() {
        let begin = Instant::now();
        let mut lines = Lines { left: LINES_AT_ONCE, since: begin, left_out: 0, recent: Vec::new() };
        let mut number = 0;
        let mut shown = |lines: &mut Lines, ms: u64, tries: usize| {
            let mut text = || {
                number += 1;
                number.to_string()
            };
            (0..tries).filter_map(|_| lines.take(&text(), begin + Duration::from_millis(ms))).collect::<Vec<_>>()
        };
        assert_eq!(shown(&mut lines, 0, 1000), [0; 8]);
        assert_eq!(shown(&mut lines, 900, 10), [0; 0]);
        assert_eq!(shown(&mut lines, 1900, 10), [1002]);
        assert_eq!(shown(&mut lines, 2100, 10), [9]);
        assert_eq!(shown(&mut lines, 60_000, 100).len(), 8);
    }

    #[test]
    fn the_same_line_comes_once_a_minute() {
        let begin = Instant::now();
        let mut lines = Lines { left: LINES_AT_ONCE, since: begin, left_out: 0, recent: Vec::new() };
        let mut shown = |text: &str, s: u64| lines.take(text, begin + Duration::from_secs(s));
        assert_eq!((shown("a", 0), shown("b", 1), shown("a", 2), shown("b", 3)), (Some(0), Some(0), None, None));
        assert_eq!((shown("c", 4), shown("a", 59), shown("a", 60), shown("a", 61)), (Some(2), None, Some(1), None));
    }

    /// The only test of this process that goes beyond a socket's own share.
    #[test]
    fn a_socket_has_its_own_share_whatever_others_have() {
        let most = SOCKET_TIMES_FRONTEND * frontend_bytes_max();
        let (mut held, mut left) = (Vec::new(), COMMON.bytes);
        // Each takes all that one socket may have, until nothing is left for all.
        while left > 0 {
            let (greedy, beyond) = (Limits::new(), left.min(most - OWN.bytes));
            held.push(greedy.map(OWN.bytes + beyond).unwrap());
            assert!(greedy.map(most).is_none());
            left -= beyond;
        }
        let last = Limits::new();
        assert!(last.map(OWN.bytes + 1).is_none(), "nothing is left for all");
        let own: Vec<_> = (0..OWN.mappings).map(|_| last.map(OWN.bytes / OWN.mappings).unwrap()).collect();
        assert!(last.map(4096).is_none());
        drop(own);
        held.clear();
        assert_eq!(*BEYOND.lock().unwrap(), Amount::default());
        let many: Vec<_> = std::iter::repeat_with(|| last.map(4096)).take_while(Option::is_some).collect();
        assert_eq!(many.len() as u64, SOCKET_MAPPINGS);
    }
}
