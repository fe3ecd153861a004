//! Records on real files: damage of every kind is found and named, or gives exactly what was recorded.
//!
//! Checked: single flipped bits, of a file that was closed and of one whose writer was killed, with commits before the
//! last one still in it; records that cannot be read beside others. Not checked: several flipped bits, somebody who computes new checksums.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt;

use redb::StorageBackend;
use redb::backends::FileBackend;
use uuid::Uuid;

use super::*;
use crate::store::Layout;
use crate::store::{
    BookmarkRecord, ChangedRecord, Fingerprint, RestorePhase, RestoreRecord, RestoreSourceKind, SnapshotRecord,
    Strategy, VolumeRecord, Work, WorkRecord, Writers,
};

thread_local! {
    /// How many syncs succeed from now on; after that neither syncs nor writes do. None while all do.
    static SYNCS_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// A file on storage that refuses when a test wants it to.
#[derive(Debug)]
struct Faulty(FileBackend);

fn works() -> io::Result<()> {
    if SYNCS_LEFT.get() == Some(0) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
}

impl StorageBackend for Faulty {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(at, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        works().and_then(|()| self.0.set_len(len))
    }
    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        works().and_then(|()| self.0.write(at, bytes))
    }
    fn sync_data(&self) -> io::Result<()> {
        works()?;
        SYNCS_LEFT.set(SYNCS_LEFT.get().map(|left| left - 1));
        self.0.sync_data()
    }
}

pub(super) fn create(path: &Path) -> Result<Database, redb::DatabaseError> {
    let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    Database::builder().create_with_backend(Faulty(FileBackend::new(file)?))
}

/// xorshift64*: small, and the same everywhere.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n as u64).unwrap()
    }
}

fn snapshot(disk: &str, name: &str, ended: u64) -> SnapshotRecord {
    SnapshotRecord {
        id: Uuid::new_v4(),
        group: Uuid::new_v4(),
        name: name.into(),
        strategy: Strategy::CopyOnWrite,
        writers: Writers::Request,
        began: ended,
        ended,
        size_bytes: 1 << 20,
        image: format!("/images/{disk}@{name}.img").into(),
        layout: Layout::Packed,
        owns_all: false,
        splits: false,
        durable: false,
        socket: format!("/run/{disk}@{name}.sock").into(),
        created_ms: 1_700_000_000_000,
        quiesced_ms: Some(1_700_000_000_001),
        broken: None,
        deletion: None,
        saved: Some(Fingerprint { size_bytes: 1 << 20, modified_ns: 17 }),
        saved_table: Some(Uuid::new_v4()),
        changed: Some(ChangedRecord { saved: Some(Uuid::new_v4()), lost: None }),
        taken_for: None,
    }
}

fn bookmark(name: &str) -> BookmarkRecord {
    let id = Uuid::new_v4();
    let changed = Some(ChangedRecord { saved: None, lost: Some("a power cut".into()) });
    let (name, group) = (name.into(), id);
    BookmarkRecord {
        id,
        group,
        name,
        began: 1,
        ended: 2,
        size_bytes: 1 << 20,
        created_ms: 3,
        quiesced_ms: Some(4),
        changed,
        taken_for: Some(id),
    }
}

fn disk(name: &str) -> DiskRecord {
    DiskRecord {
        id: Uuid::new_v4(),
        name: name.into(),
        size_bytes: 1 << 20,
        config: serde_json::json!({ "path": format!("/{name}.raw"), "queues": 2 }),
        live: Uuid::new_v4(),
        live_began: 7,
        live_log: None,
        live_layout: Layout::Packed,
        live_saved_table: None,
        live_saved: None,
        live_splits: false,
        live_changed: Some(ChangedRecord::default()),
        bookmarks: vec![bookmark("z")],
        mirror: None,
        volume: None,
        stood_on: None,
        disabled: false,
        own_image: false,
        logical_block_bytes: None,
        work: None,
        next_live: None,
        set: serde_json::Value::Null,
        restore: None,
        former_legs: Vec::new(),
        identities: BTreeMap::new(),
        kept_in: None,
        boot: Some(Uuid::new_v4()),
        snapshots: vec![snapshot(name, "a", 3), snapshot(name, "b", 5)],
        saved: None,
        saved_discards: None,
    }
}

/// The bytes of a store with some disks and some history, closed or as a killed process leaves it.
fn file_with_history(path: &Path, closed: bool) -> (Vec<u8>, Vec<DiskRecord>, BTreeSet<String>) {
    let records = Records::open(path).unwrap();
    let mut disks: Vec<DiskRecord> = ["vm0", "vm1", "vm2"].map(disk).into();
    let volume = VolumeRecord {
        snapshot: disks[0].snapshots[0].id,
        from: "vm0@a".to_owned(),
        source: disks[0].id,
        origin: Uuid::new_v4(),
        size_bytes: 1 << 20,
        created_ms: 3,
    };
    let work = WorkRecord { work: Work::Complete, stopped: true, delay_ms: 4, bytes_per_second: 5 };
    (disks[1].volume, disks[1].work, disks[1].disabled) = (Some(volume.clone()), Some(work), true);
    (disks[2].stood_on, disks[2].own_image, disks[2].logical_block_bytes) = (Some(volume), true, Some(512));
    disks[2].live_changed = Some(ChangedRecord { saved: Some(Uuid::new_v4()), lost: Some("it was lost".to_owned()) });
    disks[0].restore = Some(RestoreRecord {
        id: Uuid::new_v4(),
        source: disks[0].snapshots[1].id,
        from: "vm0@b".to_owned(),
        source_kind: RestoreSourceKind::Disk,
        phase: RestorePhase::Active,
        delay_ms: 6,
        bytes_per_second: 7,
    });
    records.put(&disks.iter().collect::<Vec<_>>()).unwrap();
    disks[1].snapshots.remove(0);
    records.put(&[&disks[1]]).unwrap();
    disks[2].saved = Some(Fingerprint { size_bytes: 5, modified_ns: 6 });
    records.put(&[&disks[2]]).unwrap();
    let (now, dropped) = (all(&records), records.dropped().unwrap());
    assert_eq!((now, dropped.len()), (disks.clone(), 2));
    let killed = std::fs::read(path).unwrap();
    drop(records);
    (if closed { std::fs::read(path).unwrap() } else { killed }, disks, dropped)
}

/// All disks, whose records can be read.
fn all(records: &Records) -> Vec<DiskRecord> {
    let Remembered { disks, unreadable } = records.disks().unwrap();
    assert!(unreadable.is_empty(), "{unreadable:?}");
    disks
}

/// None when the damage was found; else what is read.
fn reading(bytes: &[u8]) -> Option<(Vec<DiskRecord>, BTreeSet<String>)> {
    let content = intact::read(bytes).ok()?.content;
    check_layout(content.layout).ok()?;
    let remembered = decode_all(&content);
    remembered.unreadable.is_empty().then_some((remembered.disks, content.dropped))
}

/// Flips bits of a file one at a time: after each, the damage is found or everything is as it was. Returns how many were
/// found.
fn flip(bytes: &mut [u8], bits: impl IntoIterator<Item = usize>, good: &(Vec<DiskRecord>, BTreeSet<String>)) -> usize {
    let mut found = 0;
    for bit in bits {
        bytes[bit / 8] ^= 1 << (bit % 8);
        match reading(bytes) {
            None => found += 1,
            Some(read) => assert!(read == *good, "flipped bit {bit} (byte {}): something else was read", bit / 8),
        }
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    found
}

/// The pages that hold a record as it is now.
fn pages_with(bytes: &[u8], record: &DiskRecord) -> Vec<usize> {
    let value = encode(record).unwrap();
    let needle = &value[..60];
    let holds = |page: &[u8]| page.windows(needle.len()).any(|w| w == needle);
    bytes.chunks(4096).enumerate().filter(|(_, page)| holds(page)).map(|(i, _)| i).collect()
}

#[test]
fn every_flipped_bit_of_the_records_is_found_or_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let seed: u64 = std::env::var("HALFSILVER_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_251_121);
    let every = std::env::var("HALFSILVER_EVERY_BIT").is_ok();
    println!("HALFSILVER_SEED={seed}; HALFSILVER_EVERY_BIT=1 flips all bits of all pages in use, for minutes");
    let mut rng = Rng(seed | 1);
    for closed in [true, false] {
        let (mut bytes, disks, dropped) = file_with_history(&dir.path().join(format!("closed-{closed}")), closed);
        let pages = pages_with(&bytes, &disks[0]);
        let bits = bytes.len() * 8;
        let good = (disks, dropped);
        assert_eq!(reading(&bytes), Some(good.clone()));
        if every {
            let in_use = |page: &usize| bytes[page * 4096..(page + 1) * 4096].iter().any(|byte| *byte != 0);
            let pages: Vec<usize> = (0..bits / 8 / 4096).filter(in_use).collect();
            let all = pages.iter().flat_map(|page| page * 4096 * 8..(page + 1) * 4096 * 8);
            let found = flip(&mut bytes, all, &good);
            println!("closed {closed}: {found} of all {} bits of {} pages were found", pages.len() << 15, pages.len());
            continue;
        }
        let header = flip(&mut bytes, 0..HEADER_BITS, &good);
        assert!(header > 1000, "{header} of the header's bits matter");
        // A closed file is small, so it can be tried in full where the records are.
        let step = if closed { 1 } else { 61 };
        let of_page = |page: &usize| (page * 4096 * 8..(page + 1) * 4096 * 8).step_by(step);
        let tried: Vec<usize> = pages.iter().flat_map(of_page).collect();
        let found = flip(&mut bytes, tried.iter().copied(), &good);
        assert!(found * 4 >= tried.len(), "{found} of {} bits of the records' pages were found", tried.len());
        let used: Vec<usize> = (0..bits / 8).filter(|&byte| bytes[byte] != 0).collect();
        let some: Vec<usize> = (0..4000).map(|_| used[rng.below(used.len())] * 8 + rng.below(8)).collect();
        let sampled = flip(&mut bytes, some, &good);
        println!(
            "closed {closed}: found {header} of {HEADER_BITS} in the header, {found} of {} in {} pages of records, {sampled} of 4000 elsewhere",
            tried.len(),
            pages.len()
        );
    }
}

const HEADER_BITS: usize = 512 * 8;

fn forget_copy(path: &Path) {
    drop(std::fs::remove_file(path.with_extension("copy")));
}

/// Whatever is wrong with the store, what is gone on with is what was committed last, with every number of a job.
#[test]
fn a_store_that_cannot_be_read_is_made_anew_from_its_second_copy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records.redb");
    let records = Records::open(&path).unwrap();
    let (mut vm0, vm1) = (disk("vm0"), disk("vm1"));
    records.put(&[&vm0, &vm1]).unwrap();
    let first = records.take_job_ids(JOB_LOT).unwrap();
    vm0.snapshots.pop();
    records.put(&[&vm0]).unwrap();
    let (good, dropped) = (std::fs::read(&path).unwrap(), records.dropped().unwrap());
    let copy = std::fs::read(path.with_extension("copy")).unwrap();
    drop(records);
    let damages: [(&str, &dyn Fn()); 4] = [
        ("missing", &|| std::fs::remove_file(&path).unwrap()),
        ("empty", &|| std::fs::write(&path, []).unwrap()),
        ("is damaged", &|| std::fs::write(&path, &good[..4096]).unwrap()),
        ("is damaged", &|| {
            let flipped = |(at, byte): (usize, &u8)| if at >= 512 && at % 16 == 0 { byte ^ 4 } else { *byte };
            std::fs::write(&path, good.iter().enumerate().map(flipped).collect::<Vec<_>>()).unwrap();
        }),
    ];
    for (what, damage) in damages {
        std::fs::write(path.with_extension("copy"), &copy).unwrap();
        damage();
        let bad = std::fs::read(&path).unwrap_or_default();
        let examined = Records::examine(&path).unwrap().unwrap();
        assert!(examined.wrong.unwrap().contains(what));
        assert_eq!(std::fs::read(&path).unwrap_or_default(), bad, "{what}: it is only looked at");
        let records = Records::open(&path).unwrap();
        assert!(records.made_anew().unwrap().contains(what));
        assert_eq!((all(&records), records.dropped().unwrap()), (vec![vm0.clone(), vm1.clone()], dropped.clone()));
        assert!(records.take_job_ids(1).unwrap().start >= first.end);
        drop(records);
        if !bad.is_empty() {
            assert_eq!(std::fs::read(path.with_extension("unreadable")).unwrap(), bad, "{what}");
        }
        let records = Records::open(&path).unwrap();
        assert_eq!((all(&records), records.made_anew()), (vec![vm0.clone(), vm1.clone()], None));
    }
}

/// One that is older than the store, or ahead of it by what was refused, is no copy of it.
#[test]
fn the_second_copy_says_what_the_store_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records.redb");
    let copied = || decode_all(&RecordCopy::of(&path).read().unwrap()).disks;
    let records = Records::open(&path).unwrap();
    assert!(!path.with_extension("copy").exists());
    records.put(&[&disk("vm0")]).unwrap();
    assert_eq!(copied(), all(&records));
    records.rename("vm0", &DiskRecord { name: "vm1".to_owned(), ..all(&records).remove(0) }).unwrap();
    assert_eq!(copied(), all(&records));
    drop(records);
    // As a kill leaves it between the copy and the commit, or whoever puts an older store back.
    RecordCopy::of(&path).put(&Content { layout: Some(LAYOUT), ..Content::default() }).unwrap();
    let records = Records::open(&path).unwrap();
    assert_eq!(copied(), all(&records));
    assert_eq!(all(&records).len(), 1);
}

#[test]
fn a_damaged_file_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records");
    let (good, disks, dropped) = file_with_history(&path, false);
    let mut rng = Rng(7);
    let (mut refused, mut opened) = (0, 0);
    for round in 0..150 {
        let mut bad = good.clone();
        let byte = if round % 3 == 0 { rng.below(320) } else { rng.below(15 * 4096) };
        bad[byte] ^= 1 << rng.below(8);
        std::fs::write(&path, &bad).unwrap();
        forget_copy(&path);
        match Records::open(&path) {
            Ok(records) => {
                opened += 1;
                assert_eq!((all(&records), records.dropped().unwrap()), (disks.clone(), dropped.clone()));
            }
            Err(e) => {
                refused += 1;
                assert!(e.to_string().contains("records"), "{e}");
                assert!(std::fs::read(&path).unwrap() == bad, "byte {byte}: refused, and changed");
            }
        }
    }
    assert!(refused > 20 && opened > 20, "{refused} refused, {opened} opened");
    for len in [1, 100, 4096, good.len() - 4096, good.len() - 1] {
        std::fs::write(&path, &good[..len]).unwrap();
        forget_copy(&path);
        match Records::open(&path) {
            Ok(records) => assert_eq!(all(&records), disks, "cut to {len}"),
            Err(e) => assert!(e.to_string().contains("damaged"), "{e}"),
        }
    }
}

/// The newest commit is on stable storage before the header names it. If that is all that was lost, it counts.
#[test]
fn a_header_that_names_the_commit_before_the_last_one_is_seen_through() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records");
    let (mut bytes, disks, dropped) = file_with_history(&path, false);
    bytes[9] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let records = Records::open(&path).unwrap();
    assert_eq!((all(&records), records.dropped().unwrap()), (disks.clone(), dropped));
    drop(records);
    assert_eq!(all(&Records::open(&path).unwrap()), disks);
}

#[test]
fn a_record_checks_itself_and_its_name() {
    let record = disk("vm0");
    let value = encode(&record).unwrap();
    assert_eq!(decode("vm0", &value).unwrap(), record);
    assert!(decode("vm1", &value).is_err(), "under another name");
    for bit in 0..value.len() * 8 {
        let mut bad = value.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let answer = decode("vm0", &bad);
        assert!(matches!(answer, Err(UnreadableRecord::Damaged(_))), "flipped bit {bit} went unnoticed");
    }
    for len in 0..value.len() {
        assert!(decode("vm0", &value[..len]).is_err(), "cut to {len}");
    }
}

/// Puts bytes in the place of a record, as another program would, or a medium that forgets.
fn put_bytes(path: &Path, name: &str, value: &[u8]) {
    let database = Database::create(path).unwrap();
    let change = begin(&database).unwrap();
    change.open_table(DISKS).unwrap().insert(name, value).unwrap();
    change.commit().unwrap();
}

fn bytes_of(path: &Path, name: &str) -> Vec<u8> {
    intact::read(&std::fs::read(path).unwrap()).unwrap().content.disks[name].clone()
}

fn with_unknown_field(record: &DiskRecord) -> Vec<u8> {
    let mut json = serde_json::to_value(record).unwrap();
    json["snapshots"][0]["locked_until"] = 7.into();
    seal(&record.name, FORMAT, json.to_string().as_bytes())
}

#[test]
fn a_record_that_cannot_be_read_stays_and_does_not_stop_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let [good, other] = ["vm0", "vm1"].map(disk);
    let mut flipped = encode(&other).unwrap();
    flipped[200] ^= 1;
    let newer: fn(&UnreadableRecord) -> bool = |why| matches!(why, UnreadableRecord::Newer(_));
    let damaged: fn(&UnreadableRecord) -> bool = |why| matches!(why, UnreadableRecord::Damaged(_));
    let json = serde_json::to_vec(&other).unwrap();
    let cases = [
        ("newer", seal("vm1", FORMAT + 1, b"whatever it may be"), newer),
        ("field", with_unknown_field(&other), newer),
        ("flipped", flipped, damaged),
        ("renamed", seal("vm1", FORMAT, &serde_json::to_vec(&good).unwrap()), damaged),
        ("empty", Vec::new(), damaged),
        ("unsealed", json.clone(), damaged),
        ("format", seal("vm1", FORMAT - 1, &json), damaged),
    ];
    for (what, value, is_it) in cases {
        let path = dir.path().join(what);
        Records::open(&path).unwrap().put(&[&good, &other]).unwrap();
        put_bytes(&path, "vm1", &value);
        let examined = Records::examine(&path).unwrap().unwrap();
        let records = Records::open(&path).unwrap();
        let remembered = records.disks().unwrap();
        assert_eq!(examined.remembered, remembered, "{what}");
        assert_eq!(remembered.disks, std::slice::from_ref(&good), "{what}");
        let why = &remembered.unreadable["vm1"];
        assert!(remembered.unreadable.len() == 1 && is_it(why), "{what}: {why}");
        // It is not replaced, alone or with others, and the others are.
        let mut changed = good.clone();
        changed.live_began = 9;
        for put in [vec![&other], vec![&changed, &other]] {
            assert!(matches!(records.put(&put), Err(RecordError::Kept { disk, .. }) if disk == "vm1"), "{what}");
        }
        assert_eq!(records.disks().unwrap(), remembered, "{what}");
        records.put(&[&changed]).unwrap();
        records.take_job_ids(1).unwrap();
        records.forget_dropped().unwrap();
        drop(records);
        assert_eq!(bytes_of(&path, "vm1"), value, "{what}: byte for byte");
        let records = Records::open(&path).unwrap();
        assert_eq!(records.disks().unwrap().unreadable, remembered.unreadable, "{what}");
        records.remove("vm1").unwrap();
        assert_eq!(all(&records), [changed], "{what}");
        assert!(records.dropped().unwrap().is_empty(), "{what}: nobody knows what it named");
        records.put(&[&other]).unwrap();
    }
}

#[test]
fn a_store_of_another_layout_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records");
    Records::open(&path).unwrap().put(&[&disk("vm0")]).unwrap();
    for layout in [1, LAYOUT - 1, LAYOUT + 1] {
        let database = Database::create(&path).unwrap();
        let change = begin(&database).unwrap();
        change.open_table(META).unwrap().insert("format", layout).unwrap();
        change.commit().unwrap();
        drop(database);
        let before = std::fs::read(&path).unwrap();
        assert!(matches!(Records::open(&path), Err(RecordError::Layout { found }) if found == layout));
        assert!(matches!(Records::examine(&path), Err(RecordError::Layout { found }) if found == layout));
        assert!(std::fs::read(&path).unwrap() == before);
    }
}

#[test]
fn the_number_of_a_job_is_never_given_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records");
    let (mut given, mut last) = (BTreeSet::new(), 0);
    for (round, closed) in [true, false, true, false, true].into_iter().enumerate() {
        let records = Records::open(&path).unwrap();
        for count in [1, 1, 3, 1, 40, 0, 1, 31, 2] {
            let ids = records.take_job_ids(count).unwrap();
            assert_eq!(ids.end - ids.start, count);
            for id in ids {
                assert!(given.insert(id) && id > last, "round {round}: {id} after {last}");
                last = id;
            }
        }
        records.put(&[&disk("vm0")]).unwrap();
        // As a kill leaves it, or closed.
        let killed = std::fs::read(&path).unwrap();
        drop(records);
        if !closed {
            std::fs::write(&path, killed).unwrap();
        }
    }
    assert_eq!(given.first(), Some(&1));
}

/// A transaction is two syncs, and jobs begin while guests write.
#[test]
fn numbers_of_jobs_are_set_aside_in_lots() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records");
    let records = Records::open(&path).unwrap();
    let changed = || std::fs::metadata(&path).unwrap().mtime_nsec();
    let next_stored = || intact::read(&std::fs::read(&path).unwrap()).unwrap().content.next_job.unwrap();
    records.take_job_ids(1).unwrap();
    let (before, lot_end) = (changed(), next_stored());
    assert_eq!(lot_end, 1 + JOB_LOT, "it is stored before it is given");
    for _ in 1..JOB_LOT {
        records.take_job_ids(1).unwrap();
    }
    assert_eq!((changed(), next_stored()), (before, lot_end), "the rest of a lot costs nothing");
    assert_eq!(records.take_job_ids(1).unwrap(), lot_end..lot_end + 1);
    assert_eq!(next_stored(), lot_end + JOB_LOT);
}

#[test]
fn what_is_let_go_is_remembered_until_it_is_recorded_again_or_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(&dir.path().join("records")).unwrap();
    let mut record = disk("vm0");
    records.put(&[&record]).unwrap();
    assert!(records.dropped().unwrap().is_empty());
    let gone = record.snapshots.remove(0);
    records.put(&[&record]).unwrap();
    assert_eq!(records.dropped().unwrap(), BTreeSet::from([gone.id.to_string(), "vm0@a".to_owned()]));
    record.snapshots.push(snapshot("vm0", "a", 9));
    records.put(&[&record]).unwrap();
    assert_eq!(records.dropped().unwrap(), BTreeSet::from([gone.id.to_string()]));
    records.remove("vm0").unwrap();
    let names: BTreeSet<String> = record.names().into_iter().chain([gone.id.to_string()]).collect();
    assert_eq!(records.dropped().unwrap(), names);
    records.forget_dropped().unwrap();
    assert!(records.dropped().unwrap().is_empty() && all(&records).is_empty());
}

/// One transaction, in which nothing is let go; what others say of it by its id is said with the new name.
#[test]
fn a_record_gets_another_name_with_all_that_it_names() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(&dir.path().join("records.redb")).unwrap();
    let old = disk("vm0");
    let mut clone = disk("clone");
    clone.volume = Some(VolumeRecord {
        snapshot: old.snapshots[0].id,
        from: "vm0@a".to_owned(),
        source: old.id,
        origin: Uuid::new_v4(),
        size_bytes: 4096,
        created_ms: 1,
    });
    clone.restore = Some(RestoreRecord {
        id: Uuid::new_v4(),
        source: old.bookmarks[0].id,
        from: "vm0@z".to_owned(),
        source_kind: RestoreSourceKind::Volume,
        phase: RestorePhase::Active,
        delay_ms: 0,
        bytes_per_second: 0,
    });
    records.put(&[&old, &clone]).unwrap();
    let mut new = DiskRecord { name: "clone".to_owned(), ..old.clone() };
    let before = all(&records);
    records.rename("vm0", &new).unwrap_err();
    assert_eq!(all(&records), before, "what has the name keeps it");
    new.name = "web".to_owned();
    records.rename("vm0", &new).unwrap();
    let now = all(&records);
    assert_eq!(now.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["clone", "web"]);
    assert_eq!(now[1].names(), old.names(), "images are called what they were called");
    assert!(records.dropped().unwrap().is_empty());
    let from = (&now[0].volume.as_ref().unwrap().from, &now[0].restore.as_ref().unwrap().from);
    let moment = &old.bookmarks[0].name;
    assert_eq!(from, (&format!("web@{}", old.snapshots[0].name), &format!("web@{moment}")));
    // A snapshot of the next disk of that name is another thing, whatever it is called.
    let mut next = disk("vm0");
    next.snapshots.truncate(1);
    next.snapshots[0].image = format!("/images/{}.img", next.snapshots[0].id).into();
    records.put(&[&next]).unwrap();
    records.remove("vm0").unwrap();
    assert!(records.dropped().unwrap().is_disjoint(&old.names()));
}

/// redb does not open a file that it has only begun to make, so that is done beside the place.
#[test]
fn a_store_has_its_name_when_it_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let (path, beside) = (dir.path().join("records.redb"), dir.path().join("records.new"));
    std::fs::write(&beside, vec![0; 1 << 20]).unwrap();
    drop(Records::open(&path).unwrap());
    assert!(path.exists() && !beside.exists(), "it is made beside its place, also where one was begun before");
    let made = Records::examine(&path).unwrap().unwrap();
    assert_eq!((made.is_unclean, made.remembered), (false, Remembered::default()));
    // What an older program has only begun to make is refused, and not taken for an empty one.
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    forget_copy(&path);
    assert!(Records::open(&path).is_err());
}

/// Removing a disk leaves its image, also one that was made here; a volume's goes with it.
#[test]
fn the_image_of_a_disk_is_not_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(&dir.path().join("records.redb")).unwrap();
    let mut clone = DiskRecord { own_image: true, ..disk("clone") };
    let image = clone.own_image_name();
    records.put(&[&clone]).unwrap();
    records.remove("clone").unwrap();
    assert!(!records.dropped().unwrap().contains(&image));
    clone.stood_on = Some(VolumeRecord {
        snapshot: Uuid::new_v4(),
        from: "vm0@a".to_owned(),
        source: Uuid::new_v4(),
        origin: Uuid::new_v4(),
        size_bytes: 4096,
        created_ms: 1,
    });
    records.put(&[&clone]).unwrap();
    let promoted = DiskRecord { stood_on: None, ..clone.clone() };
    records.put(&[&promoted]).unwrap();
    assert!(!records.dropped().unwrap().contains(&image), "a promotion lets nothing go");
    records.put(&[&clone]).unwrap();
    records.remove("clone").unwrap();
    assert!(records.dropped().unwrap().contains(&image));
}

/// At whichever sync the storage begins to refuse: what was refused has not taken place, or that is said to be unknown and
/// is taken back as soon as the storage takes writes.
#[test]
fn what_is_refused_has_not_taken_place() {
    let (mut known, mut unknown) = (0, 0);
    for renames in [false, true] {
        for syncs in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("records.redb");
            let records = Records::open(&path).unwrap();
            let old = disk("vm0");
            let new = DiskRecord {
                name: if renames { "vm1" } else { "vm0" }.to_owned(),
                snapshots: Vec::new(),
                ..old.clone()
            };
            records.put(&[&old]).unwrap();
            SYNCS_LEFT.set(Some(syncs));
            let done = if renames { records.rename("vm0", &new) } else { records.put(&[&new]) };
            SYNCS_LEFT.set(None);
            let found = intact::read(&std::fs::read(&path).unwrap()).map(|whole| decode_all(&whole.content).disks);
            match done {
                Ok(()) => break,
                Err(RecordError::Unknown(_)) => {
                    unknown += 1;
                    let found = found.unwrap();
                    assert!(found == std::slice::from_ref(&old) || found == [new], "after {syncs} syncs");
                }
                Err(_) => {
                    known += 1;
                    assert_eq!(found.unwrap(), std::slice::from_ref(&old), "after {syncs} syncs");
                }
            }
            assert_eq!(all(&records), std::slice::from_ref(&old), "after {syncs} syncs");
            let copy = RecordCopy::of(&path).read().unwrap();
            assert_eq!(decode_all(&copy).disks, std::slice::from_ref(&old), "the copy after {syncs} syncs");
            assert!(records.dropped().unwrap().is_disjoint(&old.names()), "after {syncs} syncs");
            let other = disk("vm2");
            records.put(&[&other]).unwrap();
            assert_eq!(all(&records), [old, other], "after {syncs} syncs");
        }
    }
    assert!(known > 0 && unknown > 0, "{known} refusals were known, {unknown} were not");
}
