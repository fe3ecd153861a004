//! What is known of the legs of a pair, and how it is remembered. Pure: no I/O, no locks.
//!
//! What always holds: there are two places; at least one of them has a leg that is in sync, and that one is never
//! dropped. Which of two legs in sync is read is the same for all: the one in the lower place.

use std::path::PathBuf;

use uuid::Uuid;

use super::PairError;
use crate::image::SharedImage;
use crate::store::{PAYLOAD_BYTES, Payload};

/// A leg's image and its stable name.
#[derive(Clone)]
pub struct LegImage {
    /// Its stable name.
    pub id: Uuid,
    /// Its bytes.
    pub image: SharedImage,
}

/// What may be expected of a leg.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LegState {
    /// It has every byte: it is read, and it takes over.
    InSync,
    /// It gets every write, but some regions are still to be copied to it. Never read.
    Resynchronising,
    /// It was detached at a cut. It differs only in regions whose bits are set.
    Split,
    /// It was dropped, and why. It comes back only as a full copy.
    Failed(String),
}

/// One leg, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegStatus {
    /// Its stable name.
    pub id: Uuid,
    /// Where its bytes are; None when its image was not given.
    pub path: Option<PathBuf>,
    /// What may be expected of it.
    pub state: LegState,
    /// Bytes that are still to be copied to it.
    pub left_bytes: u64,
}

#[derive(Clone)]
pub(super) struct Leg {
    pub(super) id: Uuid,
    pub(super) image: Option<SharedImage>,
    pub(super) state: LegState,
    /// The number of the split that detached it: views from before that split still write to it.
    pub(super) split: u64,
}

/// The legs at one moment.
#[derive(Clone)]
pub(super) struct State {
    /// Grows with every change.
    pub(super) version: u64,
    pub(super) legs: [Option<Leg>; 2],
    /// How many splits there were since the start.
    pub(super) splits: u64,
    /// The second leg is about to be split: whoever starts after a crash finds it split.
    pub(super) splitting: bool,
    /// Bits must stay although no leg asks for it just now: a leg is being added.
    pub(super) keep_bits: bool,
}

impl State {
    pub(super) fn leg(&self, place: usize) -> Option<&Leg> {
        self.legs[place].as_ref()
    }

    fn is(&self, place: usize, wanted: &LegState) -> bool {
        self.leg(place).is_some_and(|leg| leg.state == *wanted)
    }

    /// The places of the legs that are in sync, the one to be read first.
    pub(super) fn in_sync(&self) -> impl Iterator<Item = usize> {
        (0..2).filter(|&place| self.is(place, &LegState::InSync))
    }

    /// The places that a write goes to by a view that has seen `splits` splits.
    pub(super) fn written(&self, splits: u64) -> impl Iterator<Item = usize> {
        (0..2).filter(move |&place| match self.leg(place).map(|leg| (&leg.state, leg.split)) {
            Some((LegState::InSync | LegState::Resynchronising, _)) => true,
            Some((LegState::Split, split)) => splits < split,
            Some((LegState::Failed(_), _)) | None => false,
        })
    }

    /// Whether a write must set the bits of its regions first: there is another leg that it could miss.
    pub(super) fn marks(&self) -> bool {
        self.legs.iter().flatten().filter(|leg| !matches!(leg.state, LegState::Failed(_))).count() == 2
    }

    /// Whether both legs have what is written, so that bits may be cleared once it is stored on both.
    pub(super) fn cleans(&self) -> bool {
        self.written(self.splits).count() == 2 && !self.splitting && !self.keep_bits
    }

    pub(super) fn resynchronising(&self) -> Option<usize> {
        (0..2).find(|&place| self.is(place, &LegState::Resynchronising))
    }

    /// Where a new leg can go, which is where none is or a failed or split one.
    pub(super) fn vacant(&self) -> Option<usize> {
        (0..2)
            .rev()
            .find(|&place| self.leg(place).is_none_or(|leg| matches!(leg.state, LegState::Failed(_) | LegState::Split)))
    }

    /// What an operation that failed on some of the legs it went to (`written`) does to them. Returns the legs that are
    /// dropped now, and whether the operation has succeeded all the same.
    pub(super) fn drop_failed(&mut self, written: &[Uuid], failed: &[(Uuid, String)]) -> (Vec<(Uuid, String)>, bool) {
        let id_of = |leg: &Option<Leg>| leg.as_ref().map(|leg| leg.id);
        let has = |id: Uuid| written.contains(&id) && !failed.iter().any(|(f, _)| *f == id);
        let carried = self.in_sync().any(|place| id_of(&self.legs[place]).is_some_and(has));
        // Somebody must stay: if none that is in sync has it, the one that is read.
        let stays = if carried { None } else { self.in_sync().next().and_then(|place| id_of(&self.legs[place])) };
        let mut dropped = Vec::new();
        for leg in self.legs.iter_mut().flatten() {
            let failure = failed.iter().find(|(id, _)| *id == leg.id && Some(*id) != stays);
            if let (Some(failure), false) = (failure, matches!(leg.state, LegState::Failed(_))) {
                leg.state = LegState::Failed(failure.1.clone());
                dropped.push(failure.clone());
            }
        }
        self.splitting &= dropped.is_empty();
        (dropped, carried)
    }
}

const FORMAT: u32 = 1;
const IDS_AT: [usize; 2] = [32, 48];
const STATES_AT: usize = 24;
const REASON_FORGOTTEN: &str = "it failed before the last start";

/// What a pair's bitmap is made for. Everything must be the same at the next start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    pub(super) size_bytes: u64,
    pub(super) region_bytes: u32,
}

impl State {
    /// Format (u32), region size (u32), size (u64), 8 zeros, the states of both places (u8 each), 6 zeros, both ids;
    /// zeros. Little-endian.
    pub(super) fn payload(&self, shape: Shape) -> Payload {
        let mut payload = [0; PAYLOAD_BYTES];
        payload[..4].copy_from_slice(&FORMAT.to_le_bytes());
        payload[4..8].copy_from_slice(&shape.region_bytes.to_le_bytes());
        payload[8..16].copy_from_slice(&shape.size_bytes.to_le_bytes());
        for place in 0..2 {
            let Some(leg) = self.leg(place) else { continue };
            payload[STATES_AT + place] = match leg.state {
                LegState::InSync if self.splitting && place == 1 => 4,
                LegState::InSync => 1,
                LegState::Resynchronising => 2,
                LegState::Failed(_) => 3,
                LegState::Split => 4,
            };
            payload[IDS_AT[place]..IDS_AT[place] + 16].copy_from_slice(leg.id.as_bytes());
        }
        payload
    }

    /// The legs that a payload speaks of, each with its image from `images`. A leg that is wanted and has none failed.
    pub(super) fn from_payload(payload: &Payload, shape: Shape, images: &[LegImage]) -> Result<State, PairError> {
        let refused = |what: &str| PairError::Refused(what.to_owned());
        let mut state = State { version: 0, legs: [None, None], splits: 0, splitting: false, keep_bits: false };
        if payload[..4] != FORMAT.to_le_bytes() {
            return Err(refused("the record of its legs has a format that this program does not know"));
        }
        if payload[4..16] != state.payload(shape)[4..16] {
            return Err(refused("it is for images of another size, or for another block size"));
        }
        for place in 0..2 {
            let id = Uuid::from_slice(&payload[IDS_AT[place]..IDS_AT[place] + 16]).expect("sixteen bytes");
            let image = images.iter().find(|leg| leg.id == id).map(|leg| leg.image.clone());
            let missing = || LegState::Failed("its image was not there at the start".to_owned());
            let leg_state = match payload[STATES_AT + place] {
                0 => continue,
                1 if image.is_none() => missing(),
                2 if image.is_none() => missing(),
                1 => LegState::InSync,
                2 => LegState::Resynchronising,
                3 => LegState::Failed(REASON_FORGOTTEN.to_owned()),
                4 => LegState::Split,
                _ => return Err(refused("the record of its legs has a state that this program does not know")),
            };
            state.legs[place] = Some(Leg { id, image, state: leg_state, split: 0 });
        }
        if state.in_sync().next().is_none() {
            return Err(refused(
                "none of its images that are there has all the data; bring back the one that was in sync",
            ));
        }
        Ok(state)
    }
}
