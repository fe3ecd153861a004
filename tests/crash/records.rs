//! The store below the records: what redb finds after any power cut is the last transaction that was committed, or the
//! one that was under way (docs/on-disk-format.md, "Assumptions").

use std::io;
use std::sync::{Arc, Mutex};

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

use crate::media::SECTOR;
use crate::schedule::Rng;

const DISKS: TableDefinition<&str, &[u8]> = TableDefinition::new("disks");
const PUTS: u64 = 24;
const STATES_PER_EVENT: usize = 3;

#[derive(Clone)]
enum Event {
    /// A piece of one sector.
    Write {
        at: usize,
        bytes: Vec<u8>,
    },
    Length(usize),
    Sync,
    /// A put of that number begins or has returned.
    Begins(u64),
    Returned(u64),
}

#[derive(Default, Debug)]
struct State {
    bytes: Vec<u8>,
    events: Vec<EventOf>,
}

struct EventOf(Event);

impl std::fmt::Debug for EventOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an event")
    }
}

/// A file in memory that remembers what was done to it.
#[derive(Clone, Default, Debug)]
struct File(Arc<Mutex<State>>);

impl File {
    fn with(bytes: Vec<u8>) -> File {
        File(Arc::new(Mutex::new(State { bytes, events: Vec::new() })))
    }

    fn note(&self, event: Event) {
        self.0.lock().unwrap().events.push(EventOf(event));
    }

    fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().events.iter().map(|e| e.0.clone()).collect()
    }
}

impl StorageBackend for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (state, at) = (self.0.lock().unwrap(), usize::try_from(offset).unwrap());
        let bytes = state.bytes.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).unwrap();
        self.0.lock().unwrap().bytes.resize(len, 0);
        self.note(Event::Length(len));
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        self.note(Event::Sync);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (mut at, mut rest) = (usize::try_from(offset).unwrap(), data);
        self.0.lock().unwrap().bytes[at..at + data.len()].copy_from_slice(data);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(SECTOR - at % SECTOR));
            self.note(Event::Write { at, bytes: piece.to_vec() });
            (at, rest) = (at + piece.len(), after);
        }
        Ok(())
    }
}

/// As `store::Records` puts and reads.
fn put(database: &Database, number: u64) {
    let change = database.begin_write().unwrap();
    // Records of all sizes, as snapshots come and go.
    let value = number.to_le_bytes().repeat(1 + usize::try_from(number * 37 % 900).unwrap());
    change.open_table(DISKS).unwrap().insert("disk", value.as_slice()).unwrap();
    change.open_table(DISKS).unwrap().insert(format!("disk {}", number % 5).as_str(), value.as_slice()).unwrap();
    change.commit().unwrap();
}

fn last_put(bytes: Vec<u8>) -> Result<Option<u64>, String> {
    let database = Database::builder().create_with_backend(File::with(bytes)).map_err(|e| e.to_string())?;
    let read = database.begin_read().map_err(|e| e.to_string())?;
    let table = match read.open_table(DISKS) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    let mut last = None;
    for entry in table.iter().map_err(|e| e.to_string())? {
        let (name, value) = entry.map_err(|e| e.to_string())?;
        let (number, all) = (u64::from_le_bytes(value.value()[..8].try_into().unwrap()), value.value());
        if all.len() != 8 * (1 + usize::try_from(number * 37 % 900).unwrap()) || all.chunks(8).any(|w| w != &all[..8]) {
            return Err(format!("the record of {} is damaged", name.value()));
        }
        if name.value() == "disk" {
            last = Some(number);
        }
    }
    Ok(last)
}

/// What is on stable storage, and what came since the last sync.
#[derive(Default, Clone)]
struct Stored {
    bytes: Vec<u8>,
    since: Vec<Event>,
}

fn apply(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write { at, bytes: piece } => {
            bytes.resize(bytes.len().max(at + piece.len()), 0);
            bytes[*at..at + piece.len()].copy_from_slice(piece);
        }
        Event::Length(len) => bytes.resize(*len, 0),
        Event::Sync | Event::Begins(_) | Event::Returned(_) => {}
    }
}

impl Stored {
    /// Each write since the last sync for itself: lost or there. A sector holds what came last of those that are there.
    fn after_power_cut(&self, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let kept = [0, 50, 50, 80, 100][rng.below(5)];
        for event in &self.since {
            // A length is there if anything of what followed it is, so it is kept.
            if matches!(event, Event::Length(_)) || rng.chance(kept) {
                apply(&mut bytes, event);
            }
        }
        bytes
    }
}

/// The events of some puts by a process that is killed afterwards: what closing would write is not there.
fn events_of_puts() -> Vec<Event> {
    let file = File::default();
    let database = Database::builder().create_with_backend(file.clone()).unwrap();
    for number in 1..=PUTS {
        file.note(Event::Begins(number));
        put(&database, number);
        file.note(Event::Returned(number));
    }
    file.events()
}

/// Cuts the power after each event. Returns how many states were right.
fn cut_everywhere(events: &[Event]) -> Result<u64, String> {
    let (mut stored, mut begun, mut returned, mut states) = (Stored::default(), None, None, 0);
    let mut rng = Rng::new(1);
    for (index, event) in events.iter().enumerate() {
        match event {
            Event::Sync => {
                let since = std::mem::take(&mut stored.since);
                since.iter().for_each(|event| apply(&mut stored.bytes, event));
            }
            Event::Begins(number) => begun = Some(*number),
            Event::Returned(number) => returned = Some(*number),
            write => stored.since.push(write.clone()),
        }
        // Before the first put returns there may be no store yet: the start makes one.
        if returned.is_none() {
            continue;
        }
        for _ in 0..STATES_PER_EVENT {
            let found = last_put(stored.after_power_cut(&mut rng));
            if !found.as_ref().is_ok_and(|found| *found == returned || *found == begun) {
                return Err(format!("event {index}: {found:?}, {returned:?} had returned, {begun:?} had begun"));
            }
            states += 1;
        }
    }
    Ok(states)
}

#[test]
fn redb_finds_its_last_transaction_after_any_power_cut() {
    let states = cut_everywhere(&events_of_puts()).unwrap();
    println!("{states} states of redb's file");
    assert!(states > 1000, "{states}");
}

/// The test above can fail.
#[test]
fn a_medium_that_forgets_a_sync_of_redb_is_noticed() {
    let mut events = events_of_puts();
    let mut left = 0;
    events.retain(|event| {
        left += usize::from(matches!(event, Event::Sync));
        !matches!(event, Event::Sync) || left % 7 != 0
    });
    let noticed = std::panic::catch_unwind(|| cut_everywhere(&events));
    assert!(!matches!(noticed, Ok(Ok(_))), "nothing was noticed");
}
