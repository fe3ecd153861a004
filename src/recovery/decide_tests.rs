//! Decisions as a table: record, shutdown and evidence in, what becomes of each thing out.

use std::collections::BTreeSet;

use super::fixture::{Found, ITSELF, OTHER, SIZE, id, legs_of, logged, put, record, restored, set, split, volume};
use super::{
    ChangedUse, Content, JobKind, LegUse, Recovery, Role, ServedVersion, Shutdown, SnapshotFate, TableSource, Why,
    decide, decide_flushed, settle,
};
use crate::door::LegState;
use crate::store::{Believed, DeletionRecord, DiskRecord, Layout, Pack, RestorePhase, Work, WorkRecord};

const ENDS: [Shutdown; 4] = [Shutdown::Clean, Shutdown::Killed, Shutdown::PowerCut, Shutdown::Changed];

/// One letter for each snapshot: kept, broken, deleting, gone, waiting.
fn fates(recovery: &Recovery) -> String {
    let letter = |fate| match fate {
        SnapshotFate::Kept => 'k',
        SnapshotFate::Broken(_) => 'b',
        SnapshotFate::Deleting => 'd',
        SnapshotFate::Gone => 'g',
        SnapshotFate::Waits => 'w',
    };
    recovery.snapshots().map(|(_, fate)| letter(fate)).collect()
}

fn reason(recovery: &Recovery, at: usize) -> Option<Why> {
    recovery.snapshots().nth(at).and_then(|(_, fate)| match fate {
        SnapshotFate::Broken(why) => Some(why),
        _ => None,
    })
}

fn content(recovery: &Recovery) -> &'static str {
    match recovery.disk {
        Content::Whole => "whole",
        Content::AsFlushed => "flushed",
        Content::Hollow(_) => "hollow",
        Content::Unserved(_) => "unserved",
    }
}

/// A row: what is found, and what becomes of the disk and its snapshots after each of the four ends.
type Row = (&'static str, fn() -> DiskRecord, fn(&mut Found, &mut DiskRecord), [(&'static str, &'static str); 4]);

fn check(rows: &[Row]) {
    for (what, record, change, expected) in rows {
        for (shutdown, expected) in ENDS.into_iter().zip(expected) {
            let (mut found, mut record) = (Found::default(), record());
            found.legs = legs_of([LegState::InSync, LegState::Split]);
            change(&mut found, &mut record);
            let recovery = decide(&record, shutdown, &found);
            assert_eq!((content(&recovery), fates(&recovery).as_str()), *expected, "{what}, after {shutdown:?}");
        }
    }
}

const ALL_LOST: (&str, &str) = ("whole", "bb");

/// Another image is at the path of one that was recognised before.
fn replace(found: &mut Found, record: &mut DiskRecord, path: &str) {
    put(&mut found.strangers, path);
    put(&mut found.changed, path);
    record.identities.insert(path.into(), ITSELF);
}

#[test]
fn a_stranger_is_not_taken_for_an_image_that_was() {
    check(&[
        (
            "the disk's",
            record,
            |f, r| replace(f, r, "/vm1.raw"),
            [("unserved", "ww"), ("unserved", "ww"), ("unserved", "ww"), ("unserved", "ww")],
        ),
        (
            "the disk's, of which nothing is kept",
            record,
            |f, r| {
                r.snapshots.clear();
                replace(f, r, "/vm1.raw");
            },
            [("unserved", ""); 4],
        ),
        (
            "the disk's, a copy that looks as it did at the stop",
            record,
            |f, r| {
                replace(f, r, "/vm1.raw");
                f.changed.clear();
            },
            [("whole", "kk"), ("whole", "kk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "the disk's, a copy like the records",
            record,
            |f, r| {
                replace(f, r, "/vm1.raw");
                r.kept_in = Some(OTHER);
            },
            [("whole", "kk"), ("whole", "kk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "a snapshot's",
            record,
            |f, r| replace(f, r, "/b.img"),
            [("whole", "bb"), ("whole", "bb"), ("flushed", "bb"), ALL_LOST],
        ),
        ("the image below a log", logged, |f, r| replace(f, r, "/vm1.raw"), [("unserved", "www"); 4]),
    ]);
    // What becomes of the snapshots below is told by how the daemon ended.
    for (mut record, log) in [(logged(), "/live.log"), (volume(), "/clone.log")] {
        let mut found = Found::default();
        replace(&mut found, &mut record, log);
        for shutdown in ENDS {
            assert_eq!(content(&decide(&record, shutdown, &found)), "unserved", "{log}, after {shutdown:?}");
        }
    }
    let (mut found, mut record) =
        (Found { legs: legs_of([LegState::InSync, LegState::InSync]), ..Found::default() }, split());
    record.snapshots.pop();
    record.live_splits = false;
    replace(&mut found, &mut record, "/leg1");
    for shutdown in [Shutdown::Killed, Shutdown::PowerCut] {
        let recovery = decide(&record, shutdown, &found);
        assert_eq!(content(&recovery), if shutdown == Shutdown::Killed { "whole" } else { "flushed" });
        let leg = &recovery.mirror.unwrap().legs[1].1;
        assert!(matches!(leg, LegUse::Unused(why) if why.is_stranger()), "{leg:?}");
    }
    replace(&mut found, &mut record, "/leg0");
    assert!(decide(&record, Shutdown::Killed, &found).why_unserved().is_some());
}

#[test]
fn what_is_saved_below_a_full_image() {
    check(&[
        ("all is there", record, |_, _| {}, [("whole", "kk"), ("whole", "kk"), ("flushed", "bb"), ALL_LOST]),
        (
            "durable",
            record,
            |_, r| r.snapshots.iter_mut().for_each(|s| s.durable = true),
            [("whole", "kk"), ("whole", "kk"), ("flushed", "kk"), ALL_LOST],
        ),
        (
            "durable, and the newer one drains",
            record,
            |_, r| {
                r.snapshots.iter_mut().for_each(|s| s.durable = true);
                r.snapshots[1].quiesced_ms = None;
            },
            // Older ones read through it all the same.
            [("whole", "kk"), ("whole", "kk"), ("flushed", "kb"), ALL_LOST],
        ),
        (
            "an image is missing",
            record,
            |f, _| put(&mut f.missing, "/b.img"),
            [("whole", "bb"), ("whole", "bb"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "the older image is missing",
            record,
            |f, _| put(&mut f.missing, "/a.img"),
            [("whole", "bk"), ("whole", "bk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "an image was written",
            record,
            |f, _| put(&mut f.changed, "/b.img"),
            [("whole", "bb"), ("whole", "kk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "an image has another size",
            record,
            |f, _| set(&mut f.sizes, "/a.img", 512),
            [("whole", "bk"), ("whole", "bk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "a table as left is lost",
            record,
            |f, _| put(&mut f.no_left, id(2)),
            [("whole", "bk"), ("whole", "bk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "the table of a durable one is lost",
            record,
            |f, r| {
                r.snapshots[0].durable = true;
                f.no_left.insert(id(2));
            },
            [("whole", "kk"), ("whole", "kk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "and it drained",
            record,
            |f, r| {
                (r.snapshots[0].durable, r.snapshots[0].quiesced_ms) = (true, None);
                f.no_left.insert(id(2));
            },
            [("whole", "kk"), ("whole", "bk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "the durable table is damaged",
            record,
            |f, r| {
                r.snapshots[1].durable = true;
                f.damaged.insert(id(3));
            },
            [("whole", "kk"), ("whole", "kk"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "a version was given up",
            record,
            |f, r| {
                r.snapshots.iter_mut().for_each(|s| s.durable = true);
                f.given_up.insert(id(3));
            },
            [("whole", "kb"), ("whole", "kb"), ("flushed", "kb"), ALL_LOST],
        ),
        (
            "a run table says that it is broken",
            record,
            |f, _| put(&mut f.flagged, id(3)),
            [("whole", "kk"), ("whole", "kb"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "a mark says so",
            record,
            |f, _| set(&mut f.marks, id(3), "no space".to_owned()),
            [("whole", "kb"), ("whole", "kb"), ("flushed", "bb"), ALL_LOST],
        ),
        (
            "a deletion is under way",
            record,
            |_, r| r.snapshots[1].deletion = Some(DeletionRecord::default()),
            [("whole", "kd"), ("whole", "kd"), ("flushed", "bg"), ("whole", "bg")],
        ),
        (
            "a cut was being prepared",
            record,
            |_, r| r.snapshots[1].ended = 0,
            [("whole", "kd"), ("whole", "kd"), ("flushed", "bg"), ("whole", "bg")],
        ),
        ("the disk's image is missing", record, |f, _| put(&mut f.missing, "/vm1.raw"), [("unserved", "ww"); 4]),
        (
            "the disk's image takes larger units",
            record,
            |f, _| set(&mut f.units, "/vm1.raw", 8192),
            [("unserved", "ww"); 4],
        ),
        (
            "the record says that one is broken",
            record,
            |_, r| r.snapshots[1].broken = Some("it is".to_owned()),
            [("whole", "kb"), ("whole", "kb"), ("flushed", "bb"), ALL_LOST],
        ),
        ("the record contradicts itself", record, |_, r| r.snapshots[1].owns_all = true, [("unserved", "ww"); 4]),
    ]);
}

#[test]
fn logs_above_a_full_image() {
    // Snapshots wait for their disk, unless they are lost whatever becomes of it.
    let (waits, cut, unserved) = (("unserved", "www"), ("unserved", "bbw"), ("unserved", "bbb"));
    check(&[
        ("all is there", logged, |_, _| {}, [("whole", "kkk"), ("whole", "kkk"), ("flushed", "bbk"), unserved]),
        (
            "the log's run table is lost",
            logged,
            |f, _| put(&mut f.no_left, id(9)),
            // What the guests were told is written must not be gone without a word.
            [("flushed", "kkk"), waits, ("flushed", "bbk"), unserved],
        ),
        (
            "the durable table is damaged",
            logged,
            |f, _| put(&mut f.damaged, id(9)),
            [("whole", "kkk"), ("whole", "kkk"), cut, unserved],
        ),
        ("the durable table is lost", logged, |f, _| put(&mut f.no_durable, id(9)), [waits, waits, cut, unserved]),
        ("the log is missing", logged, |f, _| put(&mut f.missing, "/live.log"), [waits, waits, cut, unserved]),
        (
            "the log was written",
            logged,
            |f, _| put(&mut f.changed, "/live.log"),
            [waits, ("whole", "kkk"), ("flushed", "bbk"), unserved],
        ),
        (
            "nobody knows how the log looked",
            logged,
            |_, r| r.live_saved = None,
            [waits, ("whole", "kkk"), ("flushed", "bbk"), unserved],
        ),
        (
            "it drained",
            logged,
            |_, r| r.snapshots[2].quiesced_ms = None,
            [("whole", "kkk"), ("whole", "kkk"), ("flushed", "bbb"), unserved],
        ),
    ]);
}

/// The newer of two snapshots, and of [`logged`] the log too, are packed.
fn packed(mut record: DiskRecord, found: &mut Found) -> DiskRecord {
    let bytes = Pack::image_bytes(SIZE, 4096).unwrap();
    record.snapshots[1].layout = Layout::Packed;
    set(&mut found.sizes, "/b.img", bytes);
    if record.live_log.is_some() {
        record.live_layout = Layout::Packed;
        set(&mut found.sizes, "/live.log", bytes);
    }
    record
}

type PackRow = (&'static str, fn(&mut Found, &mut DiskRecord), [(&'static str, &'static str); 4]);

fn packs(rows: &[PackRow]) {
    for (what, change, expected) in rows {
        for (shutdown, expected) in ENDS.into_iter().zip(expected) {
            let mut found = Found::default();
            let mut record = packed(logged(), &mut found);
            record.snapshots.iter_mut().for_each(|s| s.durable = true);
            change(&mut found, &mut record);
            let recovery = decide(&record, shutdown, &found);
            assert_eq!((content(&recovery), fates(&recovery).as_str()), *expected, "{what}, after {shutdown:?}");
        }
    }
}

#[test]
fn packs_are_believed_by_how_the_daemon_ended() {
    use Believed::{Arrived, Saved, Synced};
    let (whole, flushed, unserved) = (("whole", "kkk"), ("flushed", "kkk"), ("unserved", "bbb"));
    let waits = ("unserved", "www");
    packs(&[
        ("all is there", |_, _| {}, [whole, whole, flushed, unserved]),
        ("what was saved is not", |f, _| f.no_packs.push((id(9), Saved)), [waits, whole, flushed, unserved]),
        ("what had arrived is not", |f, _| f.no_packs.push((id(9), Arrived)), [whole, waits, flushed, unserved]),
        ("what was synced is not", |f, _| f.no_packs.push((id(9), Synced)), [whole, whole, waits, unserved]),
        (
            "of what was saved for a snapshot, what was saved at the stop is not",
            |f, _| f.no_packs.push((id(3), Saved)),
            [("whole", "bbk"), whole, flushed, unserved],
        ),
        (
            "of what was saved for a snapshot, what had arrived is not",
            |f, _| f.no_packs.push((id(3), Arrived)),
            [whole, ("whole", "bbk"), flushed, unserved],
        ),
        (
            "of what was saved for a snapshot, what was synced is not",
            |f, _| f.no_packs.push((id(3), Synced)),
            [whole, whole, ("flushed", "bbk"), unserved],
        ),
        ("a log of the disk's size", |f, _| set(&mut f.sizes, "/live.log", SIZE), [waits, waits, waits, unserved]),
        ("a full image", |_, r| r.snapshots[2].layout = Layout::Packed, [waits, waits, waits, waits]),
    ]);
}

#[test]
fn a_log_that_is_not_as_it_was_left_is_had_as_it_was_flushed_if_that_is_said() {
    use Believed::{Arrived, Saved, Synced};
    for (shutdown, lost, expected) in [
        (Shutdown::Clean, vec![Saved], "flushed"),
        (Shutdown::Killed, vec![Arrived], "flushed"),
        (Shutdown::Clean, vec![Saved, Synced], "unserved"),
        (Shutdown::Killed, vec![Arrived, Synced], "unserved"),
        (Shutdown::Clean, vec![], "whole"),
    ] {
        let mut found = Found::default();
        let record = packed(logged(), &mut found);
        found.no_packs = lost.iter().map(|&believed| (id(9), believed)).collect();
        let said = decide(&record, shutdown, &found).why_unserved().map(Why::to_string).unwrap_or_default();
        assert_eq!(said.contains("--take-flushed"), expected == "flushed", "{said}");
        assert_eq!(content(&decide_flushed(&record, shutdown, &found)), expected, "{lost:?} after {shutdown:?}");
    }
}

#[test]
fn legs_and_what_was_split_off() {
    let forgets = |record: &DiskRecord, shutdown, found: &Found| {
        let recovery = decide(record, shutdown, found);
        recovery.mirror.unwrap().legs.iter().map(|(_, leg)| leg.clone()).collect::<Vec<_>>()
    };
    check(&[
        ("all is there", split, |_, _| {}, [("whole", "kkk"), ("whole", "kkk"), ("flushed", "bbk"), ("whole", "bbb")]),
        (
            "the leg of the snapshot is missing",
            split,
            |f, _| put(&mut f.missing, "/leg1"),
            [("whole", "bbb"), ("whole", "bbb"), ("flushed", "bbb"), ("whole", "bbb")],
        ),
        ("the leg of the disk is missing", split, |f, _| put(&mut f.missing, "/leg0"), [("unserved", "www"); 4]),
        (
            "the leg of the disk was written",
            split,
            |f, _| put(&mut f.changed, "/leg0"),
            [("unserved", "www"); 4], // Its record has fingerprints in all of these.
        ),
    ]);
    let mut record = split();
    let mut found = Found { legs: legs_of([LegState::InSync, LegState::Split]), ..Found::default() };
    let in_sync = LegUse::InUse(LegState::InSync);
    assert_eq!(forgets(&record, Shutdown::Clean, &found), [in_sync.clone(), LegUse::Held]);
    let broken = |found: &Found| {
        let recovery = decide(&split(), Shutdown::Killed, found);
        recovery.versions.iter().filter_map(|version| version.broken.clone()).collect::<Vec<_>>()
    };
    assert_eq!(broken(&found), [], "the snapshot has its leg");
    // The mirror went without it before the cut, and a kill came before that was noted of the snapshot.
    let failed = LegState::Failed("it failed before the last start".to_owned());
    let without = Found { legs: legs_of([LegState::InSync, failed]), ..Found::default() };
    assert_eq!(broken(&without), [Why::LegFailed("/leg1".into())], "a write that was acknowledged missed its leg");
    // With a snapshot that goes, and whose leg nobody knows any more, the leg goes.
    record.snapshots[2].deletion = Some(DeletionRecord::default());
    found.changed.insert("/leg1".into());
    assert_eq!(forgets(&record, Shutdown::Clean, &found), [in_sync.clone(), LegUse::Forgotten]);
    // Without a split both are in use, or why one is not.
    (record.live_splits, record.snapshots) = (false, Vec::new());
    found.legs = legs_of([LegState::InSync, LegState::Resynchronising]);
    let unused = |why| LegUse::Unused(why);
    assert_eq!(forgets(&record, Shutdown::Clean, &found)[1], unused(Why::ImageChanged("/leg1".into())));
    record.saved = None;
    assert_eq!(forgets(&record, Shutdown::Killed, &found)[1], LegUse::InUse(LegState::Resynchronising));
    found.legs.pop();
    assert_eq!(
        forgets(&record, Shutdown::Killed, &found),
        [in_sync, unused(Why::NotAttached)],
        "recorded, not attached"
    );
    found.sizes.insert("/leg1".into(), 512);
    let recovery = decide(&record, Shutdown::Killed, &found);
    assert_eq!(recovery.why_unserved(), Some(&Why::LegSize("/leg1".into())));
}

#[test]
fn changed_tables_are_believed_after_a_stop_and_a_kill_and_never_else() {
    for shutdown in ENDS {
        let recovery = decide(&record(), shutdown, &Found::default());
        let expected = match shutdown {
            Shutdown::Clean => Ok(ChangedUse::Saved(id(99))),
            Shutdown::Killed => Ok(ChangedUse::Run),
            Shutdown::PowerCut => Err(Why::ChangesCut),
            Shutdown::Changed => Err(Why::DiskChanged),
        };
        for version in &recovery.versions {
            assert_eq!(version.changed, Some(expected.clone()), "{shutdown:?}: {:?}", version.role);
        }
        assert_eq!(recovery.bookmarks, [None], "the oldest has nothing before it");
    }
    let lost = |change: fn(&mut Found, &mut DiskRecord), shutdown| {
        let (mut found, mut record) = (Found::default(), record());
        change(&mut found, &mut record);
        decide(&record, shutdown, &found).version(Role::Live).unwrap().changed.clone()
    };
    for shutdown in [Shutdown::Clean, Shutdown::Killed] {
        let once = |_: &mut Found, r: &mut DiskRecord| r.live_changed.as_mut().unwrap().lost = Some("once".to_owned());
        assert_eq!(lost(once, shutdown), Some(Err(Why::Said("once".to_owned()))), "what was lost once stays lost");
        assert_eq!(lost(|_, r| r.live_changed = None, shutdown), None, "what was never noted");
        let gone = lost(|f, _| put(&mut f.no_changes, id(9)), shutdown);
        assert!(matches!(gone, Some(Err(Why::Table(_)))), "{gone:?}");
    }
    assert_eq!(lost(|f, _| put(&mut f.flagged, id(9)), Shutdown::Killed), Some(Err(Why::ChangesIncomplete)));
    let not_saved = |_: &mut Found, r: &mut DiskRecord| r.live_changed.as_mut().unwrap().saved = None;
    assert_eq!(lost(not_saved, Shutdown::Clean), Some(Err(Why::ChangesNotSaved)));
}

/// Requests from before it may have reached one leg only.
#[test]
fn a_split_that_still_drained_is_doubted() {
    let whole = |record: &DiskRecord| {
        let found = Found { legs: legs_of([LegState::InSync, LegState::Split]), ..Found::default() };
        decide(record, Shutdown::Killed, &found).version(Role::Live).unwrap().changed.clone().unwrap().is_ok()
    };
    let mut record = split();
    assert!(whole(&record), "it had drained");
    record.snapshots[2].quiesced_ms = None;
    assert!(!whole(&record));
    let mut record = logged();
    record.snapshots[2].quiesced_ms = None;
    assert!(whole(&record), "without a split there is one place for both");
}

#[test]
fn a_restore_in_place() {
    let decided = |change: fn(&mut Found, &mut DiskRecord), shutdown| {
        let (mut found, mut record) = (Found::default(), restored(record(), id(3), true));
        record.snapshots[1].durable = true;
        change(&mut found, &mut record);
        let recovery = decide(&record, shutdown, &found);
        let pending = recovery.restore.as_ref().map(|r| r.pending.as_ref().ok().map(|table| table.source.clone()));
        (content(&recovery), pending)
    };
    let committed = Some(Some(TableSource::Committed(None)));
    let nothing = |_: &mut Found, _: &mut DiskRecord| {};
    assert_eq!(decided(nothing, Shutdown::Clean), ("whole", committed.clone()), "a clean stop commits it");
    assert_eq!(decided(nothing, Shutdown::Killed), ("whole", Some(Some(TableSource::Run))));
    assert_eq!(decided(nothing, Shutdown::PowerCut), ("flushed", committed));
    assert_eq!(decided(nothing, Shutdown::Changed).0, "unserved");
    for shutdown in [Shutdown::Clean, Shutdown::PowerCut] {
        assert_eq!(decided(|f, _| put(&mut f.damaged, id(70)), shutdown).0, "unserved", "{shutdown:?}");
    }
    let source = |_: &mut Found, r: &mut DiskRecord| r.restore.as_mut().unwrap().source = id(80);
    let unbegun = |_: &mut Found, r: &mut DiskRecord| r.restore.as_mut().unwrap().phase = RestorePhase::Prepared;
    for shutdown in [Shutdown::Clean, Shutdown::Killed, Shutdown::PowerCut] {
        assert_eq!(decided(|f, _| put(&mut f.missing, "/b.img"), shutdown).0, "unserved", "{shutdown:?}");
        assert_eq!(decided(source, shutdown).0, "unserved", "{shutdown:?}");
        assert_eq!(decided(unbegun, shutdown).1, None, "{shutdown:?}: the table says nothing");
        // One that broke while it was served is there all the same.
        let broke = |_: &mut Found, r: &mut DiskRecord| r.snapshots[1].broken = Some("it broke".to_owned());
        assert_ne!(decided(broke, shutdown).0, "unserved", "{shutdown:?}");
    }
    assert_eq!(decided(|f, _| put(&mut f.no_left, id(70)), Shutdown::Killed).0, "unserved");
    // One that is over, but for its record, needs nothing.
    let over = |f: &mut Found, r: &mut DiskRecord| {
        put(&mut f.empty, id(70));
        r.restore.as_mut().unwrap().source = id(80);
    };
    assert_eq!(decided(over, Shutdown::Clean), ("whole", None));
    assert_eq!(decided(over, Shutdown::Killed), ("whole", None));
    assert_eq!(decided(over, Shutdown::PowerCut), ("flushed", None));
    assert_eq!(decided(over, Shutdown::Changed).0, "unserved");
    // What is committed is written anew by what is known better.
    assert_eq!(decided(|f, _| put(&mut f.damaged, id(70)), Shutdown::Killed).0, "whole");
}

type Change = fn(&mut Found, &mut DiskRecord, &mut DiskRecord);

/// Decides on a disk and a volume on its snapshot `a`.
fn both(change: Change) -> [Recovery; 2] {
    let (mut found, mut disk, mut clone) = (Found::default(), record(), volume());
    change(&mut found, &mut disk, &mut clone);
    let mut recoveries = [&clone, &disk].map(|record| decide(record, Shutdown::Clean, &found));
    settle(&mut recoveries, &[]);
    let [clone, disk] = recoveries;
    [disk, clone]
}

/// What is smaller than it was is not the disk, or not yet all of it; what has grown is.
#[test]
fn a_disk_whose_image_has_become_smaller_is_not_served() {
    let of = |size| {
        let found = Found { sizes: [("/vm1.raw".into(), size)].into(), ..Found::default() };
        decide(&record(), Shutdown::Clean, &found)
    };
    let why = Why::Shrunk { path: "/vm1.raw".into(), size_bytes: SIZE / 2, before_bytes: SIZE };
    assert_eq!(of(SIZE / 2).disk, Content::Unserved(why));
    assert_eq!(content(&of(2 * SIZE)), "whole");
}

#[test]
fn what_volumes_stand_on() {
    let [disk, clone] = both(|_, _, _| {});
    assert_eq!((content(&disk), content(&clone), fates(&clone).as_str()), ("whole", "whole", "k"));
    let [disk, clone] = both(|f, _, _| put(&mut f.missing, "/a.img"));
    let why = Why::BaseLost { from: "vm1@a".to_owned(), why: Box::new(Why::Missing("/a.img".into())) };
    assert_eq!((content(&disk), clone.why_hollow()), ("whole", Some(&why)));
    assert_eq!(reason(&clone, 0), Some(why), "its snapshots show the same");
    let hollow: [(&str, Change); 5] = [
        ("the disk is not served", |f, _, _| put(&mut f.missing, "/vm1.raw")),
        ("the snapshot is unknown", |_, _, v| v.volume.as_mut().unwrap().snapshot = id(80)),
        ("the snapshot goes", |_, d, _| d.snapshots[0].deletion = Some(DeletionRecord::default())),
        ("the disk has another size", |_, _, v| v.volume.as_mut().unwrap().size_bytes = 512),
        ("the snapshot broke", |f, _, _| set(&mut f.marks, id(2), "it broke".to_owned())),
    ];
    for (what, change) in hollow {
        let [_, clone] = both(change);
        assert_ne!(content(&clone), "whole", "{what}");
    }
    let [_, clone] = both(|f, _, _| put(&mut f.missing, "/clone.log"));
    assert_eq!(content(&clone), "unserved", "its own log is lost");
    // One that cannot be had takes along what stands on it.
    let mut top = volume();
    (top.id, top.name, top.live) = (id(110), "top".to_owned(), id(111));
    (top.snapshots, top.volume.as_mut().unwrap().snapshot) = (Vec::new(), id(62));
    top.volume.as_mut().unwrap().origin = id(112);
    let found = Found { missing: BTreeSet::from(["/a.img".into()]), ..Found::default() };
    let mut all = [&top, &volume(), &record()].map(|record| decide(record, Shutdown::Clean, &found));
    settle(&mut all, &[]);
    assert_eq!(all.each_ref().map(content), ["hollow", "hollow", "whole"]);
    // What is served already counts.
    let served = |broken| [ServedVersion { id: id(2), size_bytes: SIZE, broken }];
    for (broken, expected) in [(None, "whole"), (Some(Why::Broke), "hollow")] {
        let mut alone = [decide(&volume(), Shutdown::Clean, &Found::default())];
        settle(&mut alone, &served(broken));
        assert_eq!(content(&alone[0]), expected);
    }
}

#[test]
fn what_disks_are_restored_from() {
    let [disk, _] = both(|_, d, _| *d = restored(d.clone(), id(62), false));
    assert_eq!(content(&disk), "whole");
    let [disk, _] = both(|f, d, _| {
        *d = restored(d.clone(), id(62), false);
        f.missing.insert("/x.img".into());
    });
    assert!(matches!(disk.why_hollow(), Some(Why::RestoreLost { from, .. }) if from == "clone@x"), "{:?}", disk.disk);
    // One that is over, but for its record, needs nothing.
    let [disk, _] = both(|f, d, _| {
        *d = restored(d.clone(), id(62), false);
        f.missing.insert("/x.img".into());
        put(&mut f.empty, id(70));
    });
    assert_eq!((content(&disk), disk.jobs()), ("whole", Vec::new()));
}

#[test]
fn one_name_for_two_things() {
    let [disk, clone] = both(|_, d, v| v.snapshots[0].id = d.snapshots[1].id);
    for recovery in [disk, clone] {
        assert!(matches!(recovery.why_unserved(), Some(Why::Contradiction(_))), "{:?}", recovery.disk);
    }
}

#[test]
fn discards_are_advice() {
    let mut record = record();
    record.saved_discards = Some(id(98));
    let decided = |shutdown, found: &Found| decide(&record, shutdown, found).discards.map(|d| d.ok());
    let mut found = Found::default();
    assert_eq!(decided(Shutdown::Clean, &found), Some(Some(id(98))));
    assert_eq!(decided(Shutdown::Killed, &found), None);
    found.no_left.insert(id(100));
    assert_eq!(decided(Shutdown::Clean, &found), Some(None));
}

/// Jobs go on, or wait as the user left them, and those whose disk is not served are not there.
#[test]
fn jobs_that_go_on() {
    let jobs = |recovery: &Recovery| recovery.jobs().into_iter().map(|j| (j.kind, j.is_stopped)).collect::<Vec<_>>();
    let deletion = || JobKind::Deletion { name: "b".to_owned(), folds: false };
    for is_stopped in [false, true] {
        let mut record = restored(record(), id(2), true);
        record.restore.as_mut().unwrap().phase = if is_stopped { RestorePhase::Stopped } else { RestorePhase::Active };
        record.snapshots[1].deletion = Some(DeletionRecord { stopped: is_stopped, ..DeletionRecord::default() });
        let recovery = decide(&record, Shutdown::Killed, &Found::default());
        assert_eq!(jobs(&recovery), [(deletion(), is_stopped), (JobKind::Restore, is_stopped)]);
        let lost = Found { missing: BTreeSet::from(["/vm1.raw".into()]), ..Found::default() };
        assert_eq!(jobs(&decide(&record, Shutdown::Killed, &lost)), []);
        let [_, clone] = both(|_, _, v| {
            let work = WorkRecord { work: Work::Complete, stopped: true, delay_ms: 0, bytes_per_second: 0 };
            v.work = Some(work);
        });
        assert_eq!(jobs(&clone), [(JobKind::Work(Work::Complete), true)]);
    }
    // A leg that a snapshot has is not brought up to date, one whose split never came to be is.
    let mut record = split();
    for (states, splits, expected) in [
        ([LegState::InSync, LegState::Split], true, 0),
        ([LegState::InSync, LegState::Split], false, 1),
        ([LegState::InSync, LegState::Resynchronising], false, 1),
        ([LegState::InSync, LegState::InSync], false, 0),
    ] {
        if !splits {
            (record.live_splits, record.snapshots) = (false, Vec::new());
        }
        let found = Found { legs: legs_of(states.clone()), ..Found::default() };
        for is_stopped in [false, true] {
            record.mirror.as_mut().unwrap().stopped = is_stopped;
            let resyncs = vec![(JobKind::Resync, is_stopped); expected];
            assert_eq!(jobs(&decide(&record, Shutdown::Killed, &found)), resyncs, "{states:?}");
        }
    }
}

/// What is told for good is what no file could change that is put back.
#[test]
fn what_is_lost_for_good() {
    let why = |change: fn(&mut Found, &mut DiskRecord), shutdown, at| {
        let (mut found, mut record) = (Found::default(), record());
        change(&mut found, &mut record);
        reason(&decide(&record, shutdown, &found), at).unwrap()
    };
    let nothing = |_: &mut Found, _: &mut DiskRecord| {};
    assert_eq!(why(nothing, Shutdown::PowerCut, 1), Why::PowerCut);
    assert_eq!(why(nothing, Shutdown::PowerCut, 0), Why::ReadsThrough { for_good: true });
    let missing = |f: &mut Found, _: &mut DiskRecord| put(&mut f.missing, "/b.img");
    assert_eq!(why(missing, Shutdown::Killed, 0), Why::ReadsThrough { for_good: false });
    for (reason, is) in [(Why::PowerCut, true), (Why::Broke, true), (Why::DiskChanged, false), (Why::NotSaved, false)] {
        assert_eq!(reason.is_for_good(), is, "{reason}");
        assert!(reason.in_record().contains("delete it and take another"), "{reason}");
    }
}
