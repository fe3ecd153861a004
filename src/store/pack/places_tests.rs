//! Places without media: whatever is written in whatever sizes, there is room for it in the end, and what must stay where it
//! is stays.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        u32::try_from((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % u64::from(n)).unwrap()
    }
}

/// What a header on the medium says.
#[derive(Clone)]
struct Written {
    span: u32,
    sequence: u64,
    entries: Vec<Entry>,
}

struct Model {
    rng: Rng,
    block_units: u32,
    disk_blocks: u32,
    units: u32,
    most: u32,
    places: Places,
    /// By where they are.
    headers: BTreeMap<u32, Written>,
    /// Headers and places of blocks that counted when a sync began last that was done.
    synced: BTreeSet<u32>,
    /// Headers below this sequence were synced.
    stored: u64,
}

impl Model {
    fn new(seed: u64) -> Model {
        let mut rng = Rng(seed | 1);
        let (block_units, disk_blocks) = (1 + rng.below(2), 3 + rng.below(60));
        let most = 1 + rng.below(disk_blocks);
        // What is under way takes at most a quarter of it.
        let slack = 4 * (most * block_units + 1);
        let units = 1 + disk_blocks * (block_units + 1) + slack;
        let places = Places::new(block_units, disk_blocks, units);
        let (headers, synced) = (BTreeMap::new(), BTreeSet::new());
        Model { rng, block_units, disk_blocks, units, most, places, headers, synced, stored: 0 }
    }

    /// The units that count: of headers that are right for some block, and of what they name.
    fn counting(&self) -> BTreeSet<u32> {
        let mut newest: Vec<(&u32, &Written)> = self.headers.iter().collect();
        newest.sort_unstable_by_key(|(_, written)| std::cmp::Reverse(written.sequence));
        let (mut known, mut units) = (BTreeSet::new(), BTreeSet::new());
        for (place, written) in newest {
            for entry in written.entries.iter().rev() {
                if known.insert(entry.block) {
                    units.insert(*place);
                    let bytes = entry.bytes.map(|(at, _)| at.0..at.0 + self.block_units);
                    units.extend(bytes.into_iter().flatten());
                }
            }
        }
        units
    }

    fn room(&self) -> String {
        let Places { high, free, free_slots, holes, slots, superseded_units, .. } = &self.places;
        let holes: u32 = holes.iter().map(|units| units.count).sum();
        format!(
            "{} blocks of {}, {} units, slack {}, new ones from {high}, {} of {} headers, {} units ({} usable), {holes} in \
             holes, {superseded_units} superseded",
            self.disk_blocks,
            self.block_units,
            self.units,
            self.places.slack(),
            free_slots.len(),
            slots.len(),
            free.units,
            free.usable,
        )
    }

    fn sync(&mut self) {
        let syncing = self.places.begin_sync();
        let counting = self.counting();
        self.places.end_sync(syncing);
        (self.synced, self.stored) = (counting, self.places.next_sequence);
        let surplus = self.places.take_surplus();
        assert!(surplus.len() <= RUNS_MAX);
        surplus.into_iter().for_each(|units| self.places.put_back(units));
    }

    fn write(&mut self) {
        let count = 1 + self.rng.below(self.most);
        let first = self.rng.below(self.disk_blocks);
        let is_zeros = self.rng.below(4) == 0;
        let granted = if is_zeros { 0 } else { count };
        let grant = self.places.grant(granted).unwrap_or_else(|| {
            let room = self.room();
            assert_eq!(
                self.places.relief(),
                Relief::Sync,
                "no room for {granted}, and nothing waits for a sync: {room}"
            );
            self.sync();
            self.places.grant(granted).unwrap_or_else(|| panic!("no room for {granted} after a sync: {}", self.room()))
        });
        let starts = |units: &Units| (units.start..units.start + units.count).step_by(self.block_units as usize);
        let mut starts = grant.units.iter().flat_map(starts);
        let entries: Vec<Entry> = (0..count)
            .map(|i| {
                let block = u64::from((first + i) % self.disk_blocks);
                let bytes = if is_zeros { None } else { Some((Place(starts.next().unwrap()), 0)) };
                Entry { block, bytes }
            })
            .collect();
        assert!(starts.next().is_none(), "no more than was asked for");
        self.check(&grant);
        if self.rng.below(8) == 0 {
            self.places.fail(&grant, &entries, Left::Nothing);
            self.headers.remove(&grant.header.0);
        } else {
            let (span, sequence) = (grant.span, grant.sequence);
            self.headers.insert(grant.header.0, Written { span, sequence, entries: entries.clone() });
            self.places.arrive(&grant, &entries);
        }
        if self.places.wants_sync() {
            self.sync();
        }
    }

    /// Nothing is given out that counts, now or as it was synced last, and no header is where others lead over.
    fn check(&self, grant: &Grant) {
        let counting = self.counting();
        let given = grant.units.iter().flat_map(|units| units.start..units.start + units.count);
        for unit in given.chain([grant.header.0]) {
            assert!(unit > 0 && unit < self.units, "unit {unit} is outside");
            assert!(!counting.contains(&unit), "unit {unit} counts");
            assert!(!self.synced.contains(&unit), "unit {unit} counts after a power cut");
        }
        for (place, written) in self.headers.iter().filter(|(place, _)| **place != grant.header.0) {
            let is_led_over = (place + 1..place + written.span).contains(&grant.header.0);
            assert!(!is_led_over, "the header at {} is behind the one at {place}", grant.header.0);
            let holds = |units: &Units| (units.start..units.start + units.count).contains(place);
            assert!(!grant.units.iter().any(holds), "blocks go to where the header at {place} is");
        }
    }

    /// Somebody else takes it up, who knows only what is on the medium; after a power cut not all of it is.
    fn take_up(&mut self) {
        if self.rng.below(2) == 0 {
            let (stored, rng) = (self.stored, &mut self.rng);
            self.headers.retain(|_, written| written.sequence < stored || rng.below(2) == 0);
        }
        let mut places = Places::new(self.block_units, self.disk_blocks, self.units);
        let mut newest: Vec<_> = self.headers.iter().collect();
        newest.sort_unstable_by_key(|(_, written)| std::cmp::Reverse(written.sequence));
        for (place, written) in newest {
            places.take_up(Place(*place), written.span, written.sequence, &written.entries);
        }
        assert!(places.taken_up(self.places.high), "nothing is in two places");
        self.places = places;
        // All of it is synced before anything else is done.
        (self.synced, self.stored) = (self.counting(), self.places.next_sequence);
    }
}

#[test]
fn there_is_always_room_for_what_is_written_again() {
    for seed in 1..300 {
        println!("seed {seed}");
        let mut model = Model::new(seed * 0x9e37_79b9);
        for _ in 0..600 {
            match model.rng.below(100) {
                0..90 => model.write(),
                90..97 => model.sync(),
                _ => model.take_up(),
            }
        }
    }
}

#[test]
fn zeros_over_zeros_take_no_room() {
    let mut places = Places::new(1, 16, 16 * 2 + 64);
    for _ in 0..1000 {
        let grant = places.grant(0).expect("a place for a header");
        places.arrive(&grant, &[Entry { block: 3, bytes: None }]);
        if places.wants_sync() {
            let syncing = places.begin_sync();
            places.end_sync(syncing);
        }
    }
    assert!(places.high < 40, "{} units", places.high);
}

#[test]
fn two_blocks_in_one_place_are_found() {
    let mut places = Places::new(1, 16, 16 * 2 + 64);
    let entry = |block| Entry { block, bytes: Some((Place(2), 0)) };
    places.take_up(Place(3), 1, 2, &[entry(4)]);
    places.take_up(Place(1), 2, 1, &[entry(5)]);
    assert!(!places.taken_up(4));
}

#[test]
fn what_may_come_back_is_not_zeros_and_holds_nobody_up() {
    let mut places = Places::new(1, 16, 16 * 2 + 64);
    let grant = places.grant(1).unwrap();
    assert!(places.is_zeros(3));
    places.fail(&grant, &[Entry { block: 3, bytes: Some((Place(grant.units[0].start), 7)) }], Left::Anything);
    assert!(!places.is_zeros(3) && places.is_zeros(4));
    assert_eq!(places.relief(), Relief::Never, "nobody waits for it");
    let later = places.grant(1).unwrap();
    assert!(later.arrived < grant.sequence, "no header says that it had arrived");
}

#[test]
fn what_could_not_be_made_void_is_free_when_it_was() {
    let mut places = Places::new(1, 16, 16 * 2 + 64);
    let of = |grant: &Grant| [Entry { block: 3, bytes: Some((Place(grant.units[0].start), 7)) }];
    let failed: Vec<Grant> = (0..2).map(|_| places.grant(1).unwrap()).collect();
    failed.iter().for_each(|grant| places.fail(grant, &of(grant), Left::Header));
    assert_eq!(places.relief(), Relief::Void);
    let doubt = places.take_doubt().unwrap();
    assert_eq!(places.relief(), Relief::Wait, "until it is void");
    places.keep_doubt(doubt, true);
    for left in [1, 0] {
        assert!(places.is_in_doubt() && !places.is_zeros(3));
        let doubt = places.take_doubt().unwrap();
        places.settle(doubt);
        assert_eq!(places.is_in_doubt(), left > 0);
    }
    assert!(places.is_zeros(3) && places.take_doubt().is_none());
    assert_eq!(places.relief(), Relief::Sync);
    let syncing = places.begin_sync();
    places.end_sync(syncing);
    assert_eq!((places.free.units, places.free_slots.len()), (2, 2));
    let later = places.grant(1).unwrap();
    assert_eq!(later.arrived, failed[1].sequence);
}

#[test]
fn a_sync_that_came_to_nothing_frees_nothing_and_forgets_nothing() {
    let mut places = Places::new(1, 16, 16 * 2 + 64);
    let write = |places: &mut Places| {
        let grant = places.grant(1).unwrap();
        let place = Place(grant.units[0].start);
        places.arrive(&grant, &[Entry { block: 3, bytes: Some((place, 0)) }]);
        place
    };
    write(&mut places);
    write(&mut places);
    let syncing = places.begin_sync();
    assert_eq!(places.relief(), Relief::Wait, "until that ends");
    places.abandon_sync(syncing);
    assert_eq!((places.free.units, places.relief()), (0, Relief::Sync));
    let syncing = places.begin_sync();
    places.end_sync(syncing);
    assert_eq!((places.free.units, places.free_slots.len()), (1, 1));
}
