//! How long to look at an idle ring before sleeping.
//!
//! A guest that waits for each answer before it sends the next request pays for two wake-ups a request: its own, and ours.
//! Ours is saved by looking at the ring for a moment after an answer, during which the driver need not kick either.
//!
//! What always holds: the moment is at most [`WINDOW_MAX`], and it shrinks to nothing as soon as one such moment was in
//! vain, so an idle guest costs nothing. It knows no rings; the worker does the looking.

use std::time::Duration;

/// The longest look. About what a guest needs from our interrupt to its next request.
const WINDOW_MAX: Duration = Duration::from_micros(50);
/// The first one.
const WINDOW_MIN: Duration = Duration::from_micros(4);

/// The window of one ring.
#[derive(Debug, Default)]
pub(super) struct Polling {
    window: Duration,
}

impl Polling {
    /// How long to look now; zero is not at all.
    pub(super) fn window(&self) -> Duration {
        self.window
    }

    /// The ring was idle for this long, looks included, until the next request came.
    pub(super) fn idled(&mut self, idle: Duration) {
        if idle > WINDOW_MAX {
            // A longer look would not have found it.
            self.window = Duration::ZERO;
        } else if idle > self.window {
            self.window = (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_grows_to_what_is_needed_and_no_further() {
        let mut polling = Polling::default();
        assert_eq!(polling.window(), Duration::ZERO);
        for _ in 0..20 {
            polling.idled(Duration::from_micros(20));
        }
        assert_eq!(polling.window(), Duration::from_micros(32));
        for _ in 0..20 {
            polling.idled(Duration::from_micros(49));
        }
        assert_eq!(polling.window(), WINDOW_MAX);
    }

    #[test]
    fn one_long_silence_ends_the_looking() {
        let mut polling = Polling::default();
        (0..20).for_each(|_| polling.idled(Duration::from_micros(30)));
        polling.idled(Duration::from_millis(1));
        assert_eq!(polling.window(), Duration::ZERO);
    }
}
