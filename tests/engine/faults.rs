//! Every kind of fault of every image in every state: what the guest sees, and what becomes of snapshots.
//!
//! The rules are those of the design: trouble on the frozen side breaks that snapshot and never the guest's request,
//! trouble on the live side is an error of that request and of nothing else, a failed sync fails its image for good. In
//! each row all bytes are held against what may be there, and the fault must really have been met.
//!
//! Not here: faults of the records, of saved tables and of real file systems (`tests/daemon/faults.rs`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use halfsilver::engine::{Attachment, LegState, Pair, Request, RequestError, Ticket, Version};
use halfsilver::image::ByteOffset;
use halfsilver::job::{self, Outcome, Pace, resync};

use crate::bench::{Bench, read_of, write_of};
use crate::sim::Fault::{self, Errno, Short};
use crate::sim::Met::{self, Read, Sync, Write, Zero};
use crate::sim::SimImage;

const ALWAYS: usize = usize::MAX;
const SECTORS: usize = 32;
/// Part of a block, and part of the next.
const PROBE: std::ops::Range<usize> = 12..20;
/// Two whole blocks.
const ZEROED: std::ops::Range<usize> = 8..24;

/// What the disk is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    /// No snapshot.
    Alone,
    /// A copy-on-write snapshot with requests of its epoch.
    Draining,
    /// One without.
    Quiesced,
    /// A log above the snapshot's full image.
    Log,
    /// The same, with requests of the old epoch.
    DrainingLog,
    /// A mirror that was split, with requests of the old epoch.
    Split,
    /// A copy-on-write snapshot is deleted, and an older one needs what it has.
    Merge,
    /// The snapshot below a log is deleted.
    Fold,
    /// Two equal legs.
    Mirror,
    /// A second leg is being made equal.
    Resync,
}

/// What meets the fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ask {
    Write,
    DurableWrite,
    OldWrite,
    Zeroes,
    ReadLive,
    ReadSnapshot,
    /// A write and a flush.
    Flush,
    Delete,
    Resync,
}

struct Row {
    at: At,
    image: &'static str,
    by: Met,
    fault: Fault,
    times: usize,
    ask: Ask,
    /// `done` or `error`.
    guest: &'static str,
    /// `kept`, `broken`, or what becomes of a leg.
    snapshot: &'static str,
    /// The same once more when the fault is over: `well` or `failed`.
    then: &'static str,
}

/// One line a row, so that it can be read as a table.
#[rustfmt::skip]
fn rows() -> Vec<Row> {
    use At::*;
    let row = |at, image, by, fault, times, ask, guest, snapshot, then| {
        Row { at, image, by, fault, times, ask, guest, snapshot, then }
    };
    let (eio, nospc) = (Errno(libc::EIO), Errno(libc::ENOSPC));
    let (eintr, eagain) = (Errno(libc::EINTR), Errno(libc::EAGAIN));
    vec![
        row(Alone,    "live",    Write, nospc,    1,      Ask::Write,        "error", "-",      "well"),
        row(Alone,    "live",    Write, eio,      1,      Ask::Write,        "error", "-",      "well"),
        row(Alone,    "live",    Write, eio,      ALWAYS, Ask::Write,        "error", "-",      "well"),
        row(Alone,    "live",    Read,  eio,      1,      Ask::ReadLive,     "error", "-",      "well"),
        row(Alone,    "live",    Read,  eio,      ALWAYS, Ask::ReadLive,     "error", "-",      "well"),
        row(Alone,    "live",    Write, Short(1), 1,      Ask::Write,        "done",  "-",      "well"),
        row(Alone,    "live",    Write, Short(4), 1,      Ask::Write,        "done",  "-",      "well"),
        row(Alone,    "live",    Write, Short(7), 1,      Ask::Write,        "done",  "-",      "well"),
        row(Alone,    "live",    Write, Short(1), ALWAYS, Ask::Write,        "done",  "-",      "well"),
        row(Alone,    "live",    Write, Short(0), 1,      Ask::Write,        "error", "-",      "well"),
        row(Alone,    "live",    Read,  Short(3), 1,      Ask::ReadLive,     "done",  "-",      "well"),
        row(Alone,    "live",    Read,  Short(1), ALWAYS, Ask::ReadLive,     "done",  "-",      "well"),
        row(Alone,    "live",    Read,  Short(0), 1,      Ask::ReadLive,     "error", "-",      "well"),
        row(Alone,    "live",    Write, eintr,    3,      Ask::Write,        "done",  "-",      "well"),
        row(Alone,    "live",    Write, eagain,   3,      Ask::Write,        "done",  "-",      "well"),
        row(Alone,    "live",    Read,  eintr,    3,      Ask::ReadLive,     "done",  "-",      "well"),
        row(Alone,    "live",    Zero,  eintr,    3,      Ask::Zeroes,       "done",  "-",      "well"),
        row(Alone,    "live",    Zero,  eio,      1,      Ask::Zeroes,       "error", "-",      "well"),
        row(Alone,    "live",    Zero,  nospc,    1,      Ask::Zeroes,       "error", "-",      "well"),
        row(Alone,    "live",    Zero,  Errno(libc::EOPNOTSUPP), ALWAYS, Ask::Zeroes, "done", "-", "well"),
        row(Alone,    "live",    Sync,  eintr,    3,      Ask::Flush,        "done",  "-",      "well"),
        row(Alone,    "live",    Sync,  eio,      1,      Ask::Flush,        "error", "-",      "failed"),
        row(Alone,    "live",    Sync,  nospc,    1,      Ask::Flush,        "error", "-",      "failed"),
        row(Alone,    "live",    Write, eio,      1,      Ask::DurableWrite, "error", "-",      "failed"),
        row(Alone,    "live",    Write, nospc,    1,      Ask::DurableWrite, "error", "-",      "well"),

        row(Quiesced, "frozen",  Write, nospc,    1,      Ask::Write,        "done",  "broken", "well"),
        row(Quiesced, "frozen",  Write, eio,      1,      Ask::Write,        "done",  "broken", "well"),
        row(Quiesced, "frozen",  Write, eio,      ALWAYS, Ask::Write,        "done",  "broken", "well"),
        row(Quiesced, "frozen",  Write, Short(3), 1,      Ask::Write,        "done",  "kept",   "well"),
        row(Quiesced, "frozen",  Write, Short(0), 1,      Ask::Write,        "done",  "broken", "well"),
        row(Quiesced, "frozen",  Write, eintr,    3,      Ask::Write,        "done",  "kept",   "well"),
        row(Quiesced, "frozen",  Write, eio,      1,      Ask::Zeroes,       "done",  "broken", "well"),
        row(Quiesced, "frozen",  Read,  eio,      1,      Ask::ReadSnapshot, "error", "kept",   "well"),
        row(Quiesced, "frozen",  Read,  Short(5), 1,      Ask::ReadSnapshot, "done",  "kept",   "well"),
        row(Quiesced, "frozen",  Read,  Short(0), 1,      Ask::ReadSnapshot, "error", "kept",   "well"),
        row(Quiesced, "live",    Read,  eio,      1,      Ask::Write,        "done",  "broken", "well"),
        row(Quiesced, "live",    Read,  Short(2), 1,      Ask::Write,        "done",  "kept",   "well"),
        row(Quiesced, "live",    Read,  eio,      1,      Ask::ReadSnapshot, "error", "kept",   "well"),
        row(Quiesced, "live",    Write, nospc,    1,      Ask::Write,        "error", "kept",   "well"),
        row(Quiesced, "live",    Write, eio,      ALWAYS, Ask::Write,        "error", "kept",   "well"),
        row(Quiesced, "live",    Sync,  eio,      1,      Ask::Flush,        "error", "kept",   "failed"),
        row(Draining, "frozen",  Write, eio,      1,      Ask::OldWrite,     "done",  "broken", "well"),
        row(Draining, "frozen",  Write, nospc,    ALWAYS, Ask::OldWrite,     "done",  "broken", "well"),
        row(Draining, "frozen",  Write, Short(1), 1,      Ask::OldWrite,     "done",  "kept",   "well"),
        row(Draining, "live",    Write, eio,      1,      Ask::OldWrite,     "error", "kept",   "well"),

        row(Log,      "log",     Write, nospc,    1,      Ask::Write,        "error", "kept",   "well"),
        row(Log,      "log",     Write, eio,      ALWAYS, Ask::Write,        "error", "kept",   "well"),
        row(Log,      "log",     Write, Short(2), 1,      Ask::Write,        "done",  "kept",   "well"),
        row(Log,      "log",     Read,  eio,      1,      Ask::ReadLive,     "error", "kept",   "well"),
        row(Log,      "log",     Zero,  eio,      1,      Ask::Zeroes,       "error", "kept",   "well"),
        row(Log,      "log",     Sync,  eio,      1,      Ask::Flush,        "error", "kept",   "failed"),
        row(Log,      "live",    Read,  eio,      1,      Ask::Write,        "error", "kept",   "well"),
        row(Log,      "live",    Read,  eio,      1,      Ask::ReadSnapshot, "error", "kept",   "well"),
        row(Log,      "live",    Sync,  eio,      1,      Ask::Flush,        "error", "kept",   "failed"),
        row(Log,      "durable", Write, eio,      1,      Ask::Flush,        "error", "kept",   "well"),
        row(Log,      "durable", Write, nospc,    1,      Ask::Flush,        "error", "kept",   "well"),
        row(Log,      "durable", Write, Short(0), 1,      Ask::Flush,        "error", "kept",   "well"),
        row(Log,      "durable", Sync,  eio,      1,      Ask::Flush,        "error", "kept",   "failed"),
        row(DrainingLog, "live", Write, eio,      1,      Ask::OldWrite,     "error", "kept",   "well"),
        row(DrainingLog, "log",  Write, eio,      1,      Ask::OldWrite,     "error", "kept",   "well"),

        row(Split,    "frozen",  Write, eio,      1,      Ask::OldWrite,     "done",  "broken", "well"),
        row(Split,    "frozen",  Write, nospc,    ALWAYS, Ask::OldWrite,     "done",  "broken", "well"),
        row(Split,    "live",    Write, eio,      1,      Ask::OldWrite,     "error", "kept",   "well"),
        row(Split,    "frozen",  Read,  eio,      1,      Ask::ReadSnapshot, "error", "kept",   "well"),

        row(Merge,    "frozen",  Write, nospc,    1,      Ask::Delete,       "done",  "broken", "well"),
        row(Merge,    "frozen",  Write, eio,      ALWAYS, Ask::Delete,       "done",  "broken", "well"),
        row(Merge,    "newer",   Read,  eio,      1,      Ask::Delete,       "done",  "broken", "well"),
        row(Merge,    "frozen",  Write, Short(3), 1,      Ask::Delete,       "done",  "kept",   "well"),
        row(Fold,     "live",    Write, nospc,    1,      Ask::Delete,       "error", "-",      "well"),
        row(Fold,     "live",    Write, Short(3), 1,      Ask::Delete,       "done",  "-",      "well"),
        row(Fold,     "log",     Read,  eio,      1,      Ask::Delete,       "error", "-",      "well"),
        row(Fold,     "live",    Sync,  eio,      1,      Ask::Delete,       "error", "-",      "failed"),
        row(Fold,     "durable", Write, eio,      1,      Ask::Delete,       "error", "-",      "well"),
        row(Fold,     "durable", Sync,  eio,      1,      Ask::Delete,       "error", "-",      "failed"),

        row(Mirror,   "second",  Write, eio,      1,      Ask::Write,        "done",  "second leg fails", "well"),
        row(Mirror,   "second",  Write, nospc,    1,      Ask::Write,        "done",  "second leg fails", "well"),
        row(Mirror,   "second",  Write, Short(0), 1,      Ask::Write,        "done",  "second leg fails", "well"),
        row(Mirror,   "second",  Write, Short(2), 1,      Ask::Write,        "done",  "both stay",        "well"),
        row(Mirror,   "second",  Zero,  eio,      1,      Ask::Zeroes,       "done",  "second leg fails", "well"),
        row(Mirror,   "second",  Sync,  eio,      1,      Ask::Flush,        "done",  "second leg fails", "well"),
        row(Mirror,   "live",    Write, eio,      1,      Ask::Write,        "done",  "first leg fails",  "well"),
        row(Mirror,   "live",    Read,  eio,      1,      Ask::ReadLive,     "done",  "first leg fails",  "well"),
        row(Mirror,   "live",    Sync,  eio,      1,      Ask::Flush,        "done",  "first leg fails",  "well"),
        row(Mirror,   "live",    Write, eintr,    3,      Ask::Write,        "done",  "both stay",        "well"),
        row(Mirror,   "bitmap",  Write, eio,      1,      Ask::Write,        "error", "both stay",        "well"),
        row(Mirror,   "bitmap",  Sync,  eio,      1,      Ask::Write,        "error", "both stay",        "failed"),
        row(Resync,   "second",  Write, eio,      1,      Ask::Resync,       "error", "second leg fails", "failed"),
        row(Resync,   "second",  Sync,  eio,      1,      Ask::Resync,       "error", "second leg fails", "failed"),
        row(Resync,   "live",    Read,  eio,      1,      Ask::Resync,       "error", "being copied",     "well"),
        row(Resync,   "second",  Write, Short(3), 1,      Ask::Resync,       "done",  "both stay",        "well"),
        row(Resync,   "second",  Write, eio,      1,      Ask::Write,        "done",  "second leg fails", "well"),
    ]
}

/// What each sector may hold.
#[derive(Clone)]
struct Allowed(Vec<Vec<u8>>);

impl Allowed {
    fn all(fill: u8) -> Allowed {
        Allowed(vec![vec![fill]; SECTORS])
    }

    fn write(&mut self, sectors: std::ops::Range<usize>, fill: u8, is_done: bool) {
        for sector in &mut self.0[sectors] {
            match is_done {
                true => *sector = vec![fill],
                false => sector.push(fill),
            }
        }
    }

    fn check(&self, seen: &[u8], whose: &str) {
        for (sector, (seen, allowed)) in seen.iter().zip(&self.0).enumerate() {
            assert!(allowed.contains(seen), "{whose}: sector {sector} is {seen}, may be {allowed:?}");
        }
    }
}

struct World {
    bench: Bench,
    images: Vec<(&'static str, SimImage)>,
    pair: Option<Arc<Pair>>,
    old: Option<Ticket>,
    snapshot: Option<Arc<Version>>,
    deleted: Option<Arc<Version>>,
    live: Allowed,
    frozen: Allowed,
}

impl World {
    fn new(at: At) -> World {
        let (bench, pair, mut images) = match at {
            At::Mirror | At::Resync => {
                let (bench, pair, second, bitmap) = Bench::mirrored();
                (bench, Some(pair), vec![("second", second), ("bitmap", bitmap)])
            }
            _ => (Bench::new(), None, Vec::new()),
        };
        images.push(("live", bench.live.clone()));
        let (live, frozen) = (Allowed::all(1), Allowed::all(1));
        let mut world = World { bench, images, pair, old: None, snapshot: None, deleted: None, live, frozen };
        world.bench.write(&world.bench.ticket(), 0..SECTORS, 1);
        if at == At::Mirror {
            assert!(world.resync());
            // Cleaned: the next write must mark its region first.
            let (pair, disk, queue) =
                (world.pair.clone().unwrap(), world.bench.disk.clone(), world.bench.queue.clone());
            world.bench.run(async move {
                for _ in 0..2 {
                    pair.clean(&queue, disk.block_locks()).await.unwrap();
                }
            });
        }
        if matches!(at, At::Draining | At::DrainingLog | At::Split) {
            world.old = Some(world.bench.ticket());
        }
        world.cut(at);
        world
    }

    fn cut(&mut self, at: At) {
        let (cut, images) = match at {
            At::Alone | At::Mirror | At::Resync => return,
            At::Draining | At::Quiesced | At::Merge => {
                let (cut, frozen) = self.bench.cut();
                (cut, vec![("frozen", frozen)])
            }
            At::Log | At::DrainingLog | At::Fold => {
                let (cut, log, durable) = self.bench.cut_to_log_with_table();
                (cut, vec![("log", log), ("durable", durable)])
            }
            At::Split => {
                let (cut, leg) = self.bench.cut_to_split(&self.bench.live);
                (cut, vec![("frozen", leg)])
            }
        };
        self.images.extend(images);
        self.snapshot = Some(cut.frozen[0].clone());
        if at == At::Merge {
            let (newer, image) = self.bench.cut();
            self.images.push(("newer", image));
            self.deleted = Some(newer.frozen[0].clone());
        }
        if at == At::Fold {
            self.deleted = self.snapshot.take();
        }
        self.bench.write(&self.bench.ticket(), 0..8, 2);
        self.live.write(0..8, 2, true);
    }

    fn image(&self, name: &str) -> &SimImage {
        &self.images.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no {name}")).1
    }

    fn resync(&self) -> bool {
        let (queue, disk, pair) = (self.bench.queue.clone(), self.bench.disk.clone(), self.pair.clone().unwrap());
        if pair.status().iter().all(|leg| leg.state == LegState::InSync) {
            return true;
        }
        matches!(self.bench.run(resync(queue, disk, pair, Arc::new(Pace::default()))), Ok(Outcome::Done))
    }

    fn delete(&self) -> bool {
        let version = self.deleted.clone().unwrap();
        version.set_quiesced();
        // One that failed is begun again, as after a restart.
        let grace = self.bench.editor.begin_retire(&self.bench.disk, &version).unwrap_or(version.began);
        let (queue, editor, disk) = (self.bench.queue.clone(), self.bench.editor.clone(), self.bench.disk.clone());
        let pace = Arc::new(Pace::default());
        let job = job::retire(queue, editor, disk, version, grace, pace.clone());
        let done = self.bench.run(job);
        assert!(pace.done_bytes.load(Ordering::Relaxed) <= (SECTORS * 512) as u64);
        done == Ok(Outcome::Done)
    }

    /// Does it, and says whether the answer was good. Whatever it was, remembers what may be there now.
    fn ask(&mut self, ask: Ask, fill: u8) -> bool {
        let now = self.bench.ticket();
        let live = self.bench.disk.attach_live();
        let probe = |durable| {
            let Request::Write { at, from, .. } = write_of(PROBE, fill) else { unreachable!() };
            Request::Write { at, from, durable }
        };
        match ask {
            Ask::Write | Ask::DurableWrite => {
                let done = self.send(live, &now, probe(ask == Ask::DurableWrite));
                self.live.write(PROBE, fill, done);
                done
            }
            Ask::OldWrite => {
                let old = self.old.as_ref().unwrap_or(&now).again();
                let wide = write_of(4..20, fill);
                let done = self.send(live, &old, wide);
                self.live.write(4..20, fill, done);
                if self.old.is_some() {
                    self.frozen.write(4..20, fill, done);
                }
                done
            }
            Ask::Zeroes => {
                let (at, len) = (ByteOffset((ZEROED.start * 512) as u64), (ZEROED.len() * 512) as u64);
                let zeroes = Request::WriteZeroes { at, len, unmap: true, durable: false };
                let done = self.send(live, &now, zeroes);
                self.live.write(ZEROED, 0, done);
                done
            }
            Ask::ReadLive => self.read_live().is_ok(),
            Ask::ReadSnapshot => self.read_snapshot().is_ok(),
            Ask::Flush => {
                let wrote = self.send(live, &now, probe(false));
                self.live.write(PROBE, fill, wrote);
                let flushed = self.send(self.bench.disk.attach_live(), &now, Request::Flush);
                assert!(!flushed || wrote, "a flush is acknowledged after a write was refused for good");
                flushed
            }
            Ask::Delete => {
                // It waits for all requests from before.
                drop((now, live));
                self.delete()
            }
            Ask::Resync => self.resync(),
        }
    }

    fn send(&self, to: Attachment, ticket: &Ticket, request: Request) -> bool {
        self.bench.on(to, ticket, request).is_ok()
    }

    fn read_live(&self) -> Result<(), RequestError> {
        let (request, memory) = read_of(0..SECTORS);
        self.bench.request(&self.bench.ticket(), request)?;
        self.live.check(&memory(), "the disk");
        Ok(())
    }

    fn read_snapshot(&self) -> Result<(), RequestError> {
        let seen = self.bench.frozen(self.snapshot.as_ref().unwrap())?;
        self.frozen.check(&seen, "the snapshot");
        Ok(())
    }

    /// What has become of the snapshot, or of the legs.
    fn outcome(&self) -> String {
        if let Some(pair) = &self.pair {
            let states: Vec<_> = pair.status().into_iter().map(|leg| leg.state).collect();
            let is_failed = |state: &LegState| matches!(state, LegState::Failed(_));
            return match &states[..] {
                [LegState::InSync, LegState::InSync] => "both stay",
                [LegState::InSync, LegState::Resynchronising] => "being copied",
                [LegState::InSync, second] if is_failed(second) => "second leg fails",
                [first, LegState::InSync] if is_failed(first) => "first leg fails",
                other => panic!("{other:?}"),
            }
            .to_owned();
        }
        match (&self.snapshot, self.snapshot.as_ref().map(|_| self.read_snapshot())) {
            (Some(version), Some(Ok(()))) => {
                assert!(version.broken().is_none(), "it is broken, and can be read");
                "kept".to_owned()
            }
            (Some(version), Some(Err(RequestError::Broken(reason)))) => {
                assert_eq!(version.broken(), Some(reason.as_str()));
                assert!(reason.len() > 10, "a reason is given: {reason}");
                "broken".to_owned()
            }
            (_, Some(Err(other))) => format!("unreadable: {other}"),
            _ => "-".to_owned(),
        }
    }
}

/// Carries a row out; what the guest saw, what has become of the snapshot, and how it goes on.
fn carry_out(row: &Row) -> [String; 3] {
    let mut world = World::new(row.at);
    let image = world.image(row.image).clone();
    image.inject(row.by, row.fault, row.times);
    let done = world.ask(row.ask, 9);
    assert!(image.heal() > 0, "the fault was never met");
    let outcome = world.outcome();
    world.read_live().expect("when the fault is over the disk can be read");
    let again = world.ask(row.ask, 7);
    world.read_live().expect("and again");
    if row.ask == Ask::Flush && !again {
        let write = world.ask(Ask::Write, 6);
        let flush = world.ask(Ask::Flush, 5);
        assert!(!flush, "an image whose sync failed is trusted again (a write: {write})");
    }
    // What it was must not have changed for the worse by going on.
    let later = world.outcome();
    assert!(later == outcome || outcome == "being copied", "first {outcome}, then {later}");
    let word = |good| if good { "done" } else { "error" };
    [word(done).to_owned(), outcome, if again { "well" } else { "failed" }.to_owned()]
}

fn name_of(row: &Row) -> String {
    let fault = match row.fault {
        Errno(libc::EIO) => "I/O error".to_owned(),
        Errno(libc::ENOSPC) => "no space".to_owned(),
        Errno(libc::EINTR) => "EINTR".to_owned(),
        Errno(libc::EAGAIN) => "EAGAIN".to_owned(),
        Errno(libc::EOPNOTSUPP) => "not supported".to_owned(),
        Errno(other) => format!("errno {other}"),
        Short(0) => "nothing is moved".to_owned(),
        Short(n) => format!("only {n} sectors are moved"),
    };
    let times = match row.times {
        1 => "once".to_owned(),
        ALWAYS => "for ever".to_owned(),
        n => format!("{n} times"),
    };
    format!("{:?}: {fault} {times}", row.by)
}

#[test]
fn every_fault_has_the_outcome_of_the_design() {
    let mut wrong = Vec::new();
    let mut kinds = std::collections::BTreeSet::new();
    println!(
        "{:44} | {:22} | {:12} | {:6} | {:16} | {:6} | verdict",
        "kind", "where", "at", "guest", "snapshot", "then"
    );
    for row in rows() {
        let name = name_of(&row);
        let place = format!("{:?}, {}", row.at, row.image);
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| carry_out(&row)));
        let expected = [row.guest, row.snapshot, row.then];
        let (seen, verdict) = match ran {
            Ok(seen) if seen == expected => (seen, "as designed"),
            Ok(seen) => (seen, "WRONG"),
            Err(_) => (["panic".to_owned(), String::new(), String::new()], "WRONG"),
        };
        let ask = format!("{:?}", row.ask);
        println!("{name:44} | {place:22} | {ask:12} | {:6} | {:16} | {:6} | {verdict}", seen[0], seen[1], seen[2]);
        if verdict == "WRONG" {
            wrong.push(format!("{name}, {place}, {ask}: {seen:?} and not {expected:?}"));
        }
        kinds.insert((name, place, ask));
    }
    println!("{} kinds", kinds.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(kinds.len() >= 30, "only {} kinds ran", kinds.len());
}
