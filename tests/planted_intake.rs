//! Rule 1 of the cut, and what happens without it: a request that is announced after the cut lands in the old epoch.
//! Needs the feature `planted`.

#![cfg(feature = "planted")]

use halfsilver::engine::{Epoch, EpochClock};
use halfsilver::planted::{Defect, plant};
use halfsilver::vhost_user::{AvailSource, intake};

/// A ring whose driver announces a request just after a cut, both just before the index is loaded.
struct LateRing {
    clock: EpochClock,
    announced: bool,
}

impl AvailSource for LateRing {
    type Item = ();

    fn load_avail(&mut self) -> bool {
        self.clock.advance(self.clock.room().expect("few epochs"));
        self.announced = true;
        true
    }

    fn pop(&mut self) -> Option<()> {
        std::mem::take(&mut self.announced).then_some(())
    }
}

fn epoch_of_a_late_request() -> Epoch {
    let clock = EpochClock::new(Epoch(1));
    let lane = clock.lane();
    let mut ring = LateRing { clock, announced: false };
    let mut epoch = None;
    assert_eq!(intake(&lane, &mut ring, |_, (), ticket| epoch = Some(ticket.epoch())), 1);
    epoch.expect("one request was taken")
}

#[test]
fn entering_before_loading_is_noticed() {
    assert_eq!(epoch_of_a_late_request(), Epoch(2));
    plant(Some(Defect::EpochBeforeAvail));
    let planted = epoch_of_a_late_request();
    plant(None);
    assert_eq!(planted, Epoch(1), "the planted defect does nothing");
    println!(
        "planted: EpochBeforeAvail: noticed by tests/planted_intake.rs: a request after the cut is in the old epoch"
    );
}
