//! How long a worker looks before it sleeps.
//!
//! A guest that waits for each answer before it sends the next request pays for two wake-ups a request: its own, and ours.
//! Ours is saved by looking at the ring for a moment after an answer, during which the driver need not kick either; and by
//! looking for the answer of a single request, if that comes soon.
//!
//! What always holds: a look is bounded, there is at most one after each answer and one after each request, and looks that
//! were in vain make the next ones shorter. So an idle guest costs nothing (docs/decisions/0032-a-look-before-sleeping.md).
//! It knows no rings; the worker does the looking.

use std::time::Duration;

/// The first look.
const WINDOW_MIN: Duration = Duration::from_micros(4);
/// Who comes later than this many of the longest looks is not being waited for.
const LOST: u32 = 8;

/// How long to look for one kind of thing.
#[derive(Debug)]
pub(super) struct Polling {
    window: Duration,
    window_max: Duration,
}

impl Polling {
    /// Looks of at most `window_max`, and none at first.
    pub(super) fn new(window_max: Duration) -> Polling {
        Polling { window: Duration::ZERO, window_max }
    }

    /// How long to look now; zero is not at all.
    pub(super) fn window(&self) -> Duration {
        self.window
    }

    /// It took this long, looks included, until what was looked for came.
    pub(super) fn took(&mut self, time: Duration) {
        if time > self.window_max * LOST {
            self.window = Duration::ZERO;
        } else if time > self.window_max {
            // The longest look would not have found it.
            self.window = if self.window > WINDOW_MIN { self.window / 2 } else { Duration::ZERO };
        } else if time > self.window {
            self.window = (self.window * 2).clamp(WINDOW_MIN, self.window_max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(50);

    fn after(times_us: &[u64]) -> Duration {
        let mut polling = Polling::new(MAX);
        times_us.iter().for_each(|us| polling.took(Duration::from_micros(*us)));
        polling.window()
    }

    #[test]
    fn looks_become_as_long_as_they_must_and_no_longer() {
        assert_eq!(after(&[]), Duration::ZERO);
        assert_eq!(after(&[20; 9]), Duration::from_micros(32));
        assert_eq!(after(&[49; 9]), MAX);
    }

    #[test]
    fn looks_in_vain_become_shorter_until_there_are_none() {
        assert_eq!(after(&[30, 30, 30, 30, 60]), Duration::from_micros(16));
        assert_eq!(after(&[30, 30, 30, 30, 60, 60, 60, 60]), Duration::ZERO);
        assert_eq!(after(&[30, 30, 30, 30, 1_000]), Duration::ZERO, "nobody is being waited for");
    }
}
