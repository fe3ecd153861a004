//! Records on real files: damage of every kind is found and named, or gives exactly what was recorded.
//!
//! Checked: single flipped bits, of a file that was closed and of one whose writer was killed, with commits before the
//! last one still in it; older formats. Not checked: several flipped bits, somebody who computes new checksums.

use std::collections::BTreeSet;

use super::*;
use crate::store::Work;

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
        strategy: "copy-on-write".into(),
        writers: "request".into(),
        began: ended,
        ended,
        image: format!("/images/{disk}@{name}.img").into(),
        owns_all: false,
        splits: false,
        durable: false,
        socket: format!("/run/{disk}@{name}.sock").into(),
        created_ms: 1_700_000_000_000,
        quiesced_ms: Some(1_700_000_000_001),
        broken: None,
        deleting: false,
        keep_image: false,
        stopped: false,
        saved: Some(Fingerprint { size_bytes: 1 << 20, modified_ns: 17 }),
        saved_table: Some(Uuid::new_v4()),
        changed: Some(ChangedRecord { saved: Some(Uuid::new_v4()), lost: None }),
        keep_bookmark: false,
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
        config: serde_json::json!({ "path": format!("/{name}.raw"), "queues": 2 }),
        live: Uuid::new_v4(),
        live_began: 7,
        live_log: None,
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
        source: Some(disks[0].id),
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
        is_own: true,
        is_ours: false,
        is_active: true,
        stopped: false,
        delay_ms: 6,
        bytes_per_second: 7,
    });
    records.put(&disks).unwrap();
    disks[1].snapshots.remove(0);
    records.put([&disks[1]]).unwrap();
    disks[2].saved = Some(Fingerprint { size_bytes: 5, modified_ns: 6 });
    records.put([&disks[2]]).unwrap();
    let (now, dropped) = (records.disks().unwrap(), records.dropped().unwrap());
    assert_eq!((now, dropped.len()), (disks.clone(), 2));
    let killed = std::fs::read(path).unwrap();
    drop(records);
    (if closed { std::fs::read(path).unwrap() } else { killed }, disks, dropped)
}

/// None when the damage was found; else what is read.
fn reading(bytes: &[u8]) -> Option<(Vec<DiskRecord>, BTreeSet<String>)> {
    let content = intact::read(bytes).ok()?.content;
    check_format(content.format).ok()?;
    let disks = content.disks.iter().map(|(name, value)| decode(content.format, name, value));
    Some((disks.collect::<Result<_, _>>().ok()?, content.dropped))
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
        match Records::open(&path) {
            Ok(records) => {
                opened += 1;
                assert_eq!((records.disks().unwrap(), records.dropped().unwrap()), (disks.clone(), dropped.clone()));
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
        match Records::open(&path) {
            Ok(records) => assert_eq!(records.disks().unwrap(), disks, "cut to {len}"),
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
    assert_eq!((records.disks().unwrap(), records.dropped().unwrap()), (disks.clone(), dropped));
    drop(records);
    assert_eq!(Records::open(&path).unwrap().disks().unwrap(), disks);
}

#[test]
fn a_record_checks_itself_and_its_name() {
    let record = disk("vm0");
    let value = encode(&record).unwrap();
    assert_eq!(decode(Some(FORMAT), "vm0", &value).unwrap(), record);
    assert!(decode(Some(FORMAT), "vm1", &value).is_err(), "under another name");
    for bit in 0..value.len() * 8 {
        let mut bad = value.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let answer = decode(Some(FORMAT), "vm0", &bad);
        assert!(matches!(answer, Err(RecordError::Damaged { .. })), "flipped bit {bit} went unnoticed");
    }
    for len in 0..value.len() {
        assert!(decode(Some(FORMAT), "vm0", &value[..len]).is_err(), "cut to {len}");
    }
}

/// As an older program wrote it: one phase, and plain JSON before there were checksums.
fn older_file(path: &Path, format: u64, disks: &[DiskRecord]) {
    let database = Database::create(path).unwrap();
    let change = database.begin_write().unwrap();
    change.open_table(META).unwrap().insert("format", format).unwrap();
    {
        let mut table = change.open_table(DISKS).unwrap();
        for disk in disks {
            let mut json = serde_json::to_value(disk).unwrap();
            json.as_object_mut().unwrap().remove("volume");
            let json = serde_json::to_vec(&json).unwrap();
            let value = if format < FORMAT_SEALED { json } else { seal(&disk.name, &json) };
            table.insert(disk.name.as_str(), value.as_slice()).unwrap();
        }
    }
    change.commit().unwrap();
}

#[test]
fn older_formats_are_read_and_become_this_one_and_later_ones_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let disks: Vec<DiskRecord> = ["vm0", "vm1"].map(disk).into();
    for format in FORMAT_FIRST..FORMAT {
        let path = dir.path().join(format!("format-{format}"));
        older_file(&path, format, &disks);
        let examined = Records::examine(&path).unwrap().unwrap();
        assert_eq!(examined.format, Some(format));
        assert_eq!(examined.disks.into_iter().collect::<Result<Vec<_>, _>>().unwrap(), disks);
        assert_eq!(Records::open(&path).unwrap().disks().unwrap(), disks);
        assert_eq!(Records::examine(&path).unwrap().unwrap().format, Some(FORMAT));
        assert_eq!(Records::open(&path).unwrap().disks().unwrap(), disks);
    }
    let path = dir.path().join("later");
    older_file(&path, FORMAT + 1, &disks);
    let before = std::fs::read(&path).unwrap();
    assert!(matches!(Records::open(&path), Err(RecordError::Format { .. })));
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn what_is_let_go_is_remembered_until_it_is_recorded_again_or_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(&dir.path().join("records")).unwrap();
    let mut record = disk("vm0");
    records.put([&record]).unwrap();
    assert!(records.dropped().unwrap().is_empty());
    let gone = record.snapshots.remove(0);
    records.put([&record]).unwrap();
    assert_eq!(records.dropped().unwrap(), BTreeSet::from([gone.id.to_string(), "vm0@a".to_owned()]));
    record.snapshots.push(snapshot("vm0", "a", 9));
    records.put([&record]).unwrap();
    assert_eq!(records.dropped().unwrap(), BTreeSet::from([gone.id.to_string()]));
    records.remove("vm0").unwrap();
    let all: BTreeSet<String> = record.names().into_iter().chain([gone.id.to_string()]).collect();
    assert_eq!(records.dropped().unwrap(), all);
    records.forget_dropped().unwrap();
    assert!(records.dropped().unwrap().is_empty() && records.disks().unwrap().is_empty());
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
    assert_eq!((made.format, made.disks.len()), (Some(FORMAT), 0));
    // What an older program has only begun to make is refused, and not taken for an empty one.
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    assert!(Records::open(&path).is_err());
}

/// Removing a disk leaves its image, also one that was made here; a volume's goes with it.
#[test]
fn the_image_of_a_disk_is_not_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(&dir.path().join("records.redb")).unwrap();
    let mut clone = DiskRecord { own_image: true, ..disk("clone") };
    let image = clone.own_image_name();
    records.put([&clone]).unwrap();
    records.remove("clone").unwrap();
    assert!(!records.dropped().unwrap().contains(&image));
    clone.stood_on = Some(VolumeRecord {
        snapshot: Uuid::new_v4(),
        from: "vm0@a".to_owned(),
        source: None,
        origin: Uuid::new_v4(),
        size_bytes: 4096,
        created_ms: 1,
    });
    records.put([&clone]).unwrap();
    let promoted = DiskRecord { stood_on: None, ..clone.clone() };
    records.put([&promoted]).unwrap();
    assert!(!records.dropped().unwrap().contains(&image), "a promotion lets nothing go");
    records.put([&clone]).unwrap();
    records.remove("clone").unwrap();
    assert!(records.dropped().unwrap().contains(&image));
}
