//! What must be found after an end: by the oracle's arrays, by what somebody was told, and by the table in
//! docs/on-disk-format.md ("What is believed depends on how the daemon ended").

use std::cell::RefCell;
use std::rc::Rc;

use halfsilver::engine::{ChangeSource, LegState, NoChanges, Request};
use halfsilver::image::ByteOffset;
use halfsilver::recovery::{LayerUse, LegUse, Recovery, SnapshotFate};
use halfsilver::store::{BlockIndex, SnapshotRecord};
use uuid::Uuid;

use crate::daemon::{Begun, Daemon, Entry, decided};
use crate::host::{End, Host};
use crate::media::run;
use crate::oracle::{self, Oracle};
use crate::run::{COMPARED, Counts, Shape, Strategy, entries_of_logs, legs_are_equal, read};
use crate::schedule::Rng;

/// Takes the disk up and looks at everything. Returns the specification from here on.
pub fn find(
    host: Host,
    oracle: &Rc<RefCell<Oracle>>,
    end: End,
    shape: Shape,
    rng: &mut Rng,
    counts: &Rc<RefCell<Counts>>,
) -> Result<Oracle, String> {
    let (host, of) = (Rc::new(RefCell::new(host)), oracle.clone());
    let said = decided(&host, shape)?;
    let opened = run(rng, async move { Daemon::open(host, of, shape, Rc::default(), Begun::default()).await });
    let daemon = match (opened, said.why_unserved()) {
        (Ok(daemon), None) => daemon,
        (Ok(_), Some(why)) => return Err(format!("it starts although it was decided not to serve the disk: {why}")),
        (Err(e), _) => return Err(format!("it does not start: {e}")),
    };
    is_as_decided(&said, &daemon, counts).map_err(|e| format!("it was decided otherwise: {e}"))?;
    crate::trace(|| format!("after {end:?}: {}", daemon.describe()));
    told(&daemon, &oracle.borrow())?;
    legs_are_equal(&daemon)?;
    if end.is_power_cut() && entries_of_logs(&daemon) > 0 {
        counts.borrow_mut().add("entries of a log found after a power cut");
    }
    let bytes = read_live(&daemon, shape, rng)?;
    let live_bytes = bytes.clone();
    let oracle = oracle.borrow();
    let live = oracle.check_live(&bytes, end.is_power_cut()).map_err(|e| format!("the live version: {e}"))?;
    let (mut frozen, mut shown) = (Vec::new(), Vec::new());
    for entry in daemon.entries.borrow().iter() {
        let record = entry.record.borrow();
        let is_whole = judge_kept(&record, &daemon, &oracle, end, shape)?;
        if record.deleting || !is_whole {
            continue;
        }
        counts.borrow_mut().add(if end.is_power_cut() {
            "snapshots that outlived a power cut"
        } else {
            "snapshots that outlived a kill"
        });
        let bytes = read_frozen(&daemon, entry, shape, rng)?;
        what_changed_is_known(&daemon, entry.id, &bytes, &live_bytes, end, counts)?;
        let what = |e| format!("the {} snapshot {}: {e}", record.strategy, entry.id);
        frozen.push((entry.id, oracle.check_frozen(entry.id, &bytes).map_err(what)?));
        shown.push((entry.clone(), bytes));
    }
    let chain = daemon.disk.chain();
    frozen_versions_stay_as_they_are(&daemon, &shown, shape, rng, counts)?;
    Ok(oracle.after((chain.version(chain.live()).id, live), end.is_power_cut(), frozen))
}

/// Whatever the end left in the places of frozen versions: when the guest overwrites everything, they show what they showed.
fn frozen_versions_stay_as_they_are(
    daemon: &Rc<Daemon>,
    shown: &[(Rc<Entry>, Vec<u8>)],
    shape: Shape,
    rng: &mut Rng,
    counts: &Rc<RefCell<Counts>>,
) -> Result<(), String> {
    if shown.is_empty() {
        return Ok(());
    }
    let (of, from) = (daemon.clone(), oracle::filled(0, shape.sectors, u64::MAX >> 1));
    let written = run(rng, async move {
        let request = Request::Write { at: ByteOffset(0), from, durable: false };
        let ticket = of.clock.lane().enter();
        of.disk.attach_live().execute(&of.queue, &ticket, request).await
    });
    written.map_err(|e| format!("the disk cannot be overwritten: {e}"))?;
    for (entry, bytes) in shown {
        if read_frozen(daemon, entry, shape, rng)? != *bytes {
            let what = &entry.record.borrow().strategy;
            return Err(format!("the {what} snapshot {} changes when the disk is overwritten", entry.id));
        }
        counts.borrow_mut().add("snapshots that stayed the same under writes after an end");
    }
    Ok(())
}

/// What was taken up is what was decided before anything was opened, which `halfsilver check` prints.
fn is_as_decided(said: &Recovery, daemon: &Daemon, counts: &Rc<RefCell<Counts>>) -> Result<(), String> {
    let (entries, chain) = (daemon.entries.borrow(), daemon.disk.chain());
    for (record, fate) in said.snapshots() {
        let entry = entries.iter().find(|e| e.id == record.id);
        let is_in_chain = chain.position(record.id).is_some();
        let broken = entry.and_then(|e| e.record.borrow().broken.clone());
        let is_deleting = entry.is_some_and(|e| e.record.borrow().deleting);
        let (kind, agrees) = match &fate {
            SnapshotFate::Kept => ("kept", is_in_chain && !is_deleting && broken.is_none()),
            SnapshotFate::Deleting => ("deleted", is_in_chain && is_deleting),
            SnapshotFate::Gone => ("gone", entry.is_none() && !is_in_chain),
            SnapshotFate::Broken(why) => ("broken", !is_deleting && broken == Some(why.in_record())),
            SnapshotFate::Waits => ("waiting", false),
        };
        if !agrees {
            return Err(format!(
                "snapshot {} is to be {fate:?}: in the chain {is_in_chain}, broken {broken:?}",
                record.id
            ));
        }
        counts.borrow_mut().add(format!("snapshots that were said to be {kind}"));
    }
    if let Some(entry) = entries.iter().find(|e| !said.record.snapshots.iter().any(|s| s.id == e.id)) {
        return Err(format!("nothing was said of snapshot {}", entry.id));
    }
    let kept: Vec<_> = said.versions.iter().filter(|v| v.layer.is_ok()).collect();
    if kept.len() != chain.links().len() {
        return Err(format!("{} versions are to be kept, and {} are", kept.len(), chain.links().len()));
    }
    for (version, link) in kept.into_iter().zip(chain.links()) {
        let is_full = matches!(version.layer, Ok(LayerUse::Base | LayerUse::Full(_)));
        // With a snapshot that is gone, what was noted for it may be forgotten at once.
        let is_known = link.version.changed().map(|changed| changed.known().is_ok());
        let said_of_changes = version.changed.as_ref().map(Result::is_ok);
        let is_it = version.id == link.version.id
            && version.splits == link.splits
            && is_full == link.layer.is_full()
            && (is_known.is_none() || is_known == said_of_changes);
        if !is_it {
            return Err(format!("version {} is to be {version:?}", link.version.id));
        }
    }
    let in_use = |(path, leg): &(_, LegUse)| matches!(leg, LegUse::InUse(_)).then(|| std::path::PathBuf::clone(path));
    let used: Vec<_> = said.mirror.iter().flat_map(|m| m.legs.iter().filter_map(in_use)).collect();
    let legs = daemon.legs();
    let has_failed = |path| legs.iter().any(|(leg, state)| leg == path && matches!(state, LegState::Failed(_)));
    if used.iter().any(|path| has_failed(path) || !legs.iter().any(|(leg, _)| leg == path)) {
        return Err(format!("the legs {used:?} are to be used, and they are {legs:?}"));
    }
    counts.borrow_mut().add(COMPARED);
    Ok(())
}

/// Each block that differs from the snapshot is among those that are said to; after a power cut nobody says so by what was
/// noted before it.
fn what_changed_is_known(
    daemon: &Daemon,
    id: Uuid,
    was: &[u8],
    is: &[u8],
    end: End,
    counts: &Rc<RefCell<Counts>>,
) -> Result<(), String> {
    let changes = match daemon.disk.changes(id, None) {
        Ok(changes) => changes,
        Err(NoChanges::Unknown(_)) => return Ok(()),
        Err(e) => return Err(format!("what changed since snapshot {id}: {e}")),
    };
    let is_noted = changes.source() == ChangeSource::Changed;
    if is_noted && end.is_power_cut() {
        return Err(format!("what was noted since snapshot {id} is believed after a power cut"));
    }
    counts.borrow_mut().add(if is_noted { "changes that outlived a kill" } else { "changes told by owners" });
    let block = daemon.disk.geometry().block_bytes as usize;
    let differs = |at: &usize| was[at * block..].chunks(block).next() != is[at * block..].chunks(block).next();
    let missing = (0..was.len().div_ceil(block)).filter(differs).find(|&at| !changes.contains(BlockIndex(at as u64)));
    match missing {
        Some(at) => Err(format!("block {at} differs from snapshot {id}, and is not among those that changed")),
        None => Ok(()),
    }
}

/// What somebody was told holds.
fn told(daemon: &Daemon, oracle: &Oracle) -> Result<(), String> {
    let entries = daemon.entries.borrow();
    for (id, fact) in &oracle.facts {
        let record = entries.iter().find(|e| e.id == *id).map(|e| e.record.borrow());
        let wrong = match &record {
            Some(_) if fact.deleted => "was deleted, and is back",
            Some(record) if fact.quiesced && record.quiesced_ms.is_none() => "was quiesced, and is not",
            None if fact.created && !fact.deletion_begun => "is gone",
            _ => continue,
        };
        return Err(format!("the {} snapshot {id} {wrong}", fact.strategy.name()));
    }
    match entries.iter().find(|e| !oracle.facts.contains_key(&e.id)) {
        Some(unknown) => Err(format!("a snapshot {} that nobody made", unknown.id)),
        None => Ok(()),
    }
}

/// Whether a snapshot is kept, after it was looked whether it must be or must not.
fn judge_kept(
    record: &SnapshotRecord,
    daemon: &Daemon,
    oracle: &Oracle,
    end: End,
    shape: Shape,
) -> Result<bool, String> {
    let is_whole = record.broken.is_none();
    let says = |what: &str| {
        let reason = record.broken.as_deref().unwrap_or("whole");
        Err(format!("the {} snapshot {} {what}: {reason}", record.strategy, record.id))
    };
    if record.deleting {
        return Ok(false);
    }
    let has_layer = daemon.disk.chain().position(record.id).is_some();
    if is_whole && !has_layer {
        return says("is said to be whole, and is not in the chain");
    }
    let fact = &oracle.facts[&record.id];
    let was_whole = oracle.frozen.iter().any(|a| a.id == record.id);
    if !end.is_power_cut() {
        return if is_whole || !was_whole { Ok(is_whole) } else { says("did not outlive a kill") };
    }
    let outlives = match fact.strategy {
        Strategy::CopyOnWrite => shape.saved_outlive,
        Strategy::WriteLogging | Strategy::WriteMirroring => true,
    };
    if outlives && fact.quiesced && was_whole && !is_whole {
        return says("did not outlive a power cut");
    }
    // Who got a full image of another one's has all of it.
    if is_whole && !outlives && !record.owns_all {
        return says("is said to have outlived a power cut");
    }
    Ok(is_whole)
}

fn read_live(daemon: &Rc<Daemon>, shape: Shape, rng: &mut Rng) -> Result<Vec<u8>, String> {
    let of = daemon.clone();
    run(rng, async move { read(&of.disk.attach_live(), &of.queue, &of.clock, shape.sectors).await })
        .map_err(|e| format!("the live version cannot be read: {e}"))
}

fn read_frozen(daemon: &Rc<Daemon>, entry: &Entry, shape: Shape, rng: &mut Rng) -> Result<Vec<u8>, String> {
    let (of, id): (_, Uuid) = (daemon.clone(), entry.id);
    run(rng, async move { read(&of.disk.attach_frozen(id), &of.queue, &of.clock, shape.sectors).await })
        .map_err(|e| format!("snapshot {id} cannot be read: {e}"))
}

/// Nothing goes on any more: everything shows what was written, and what had begun is done.
pub fn at_rest(daemon: &Rc<Daemon>, shape: Shape, rng: &mut Rng) -> Result<(), String> {
    let in_end = |e: String| format!("in the end {e}");
    told(daemon, &daemon.oracle.borrow()).map_err(in_end)?;
    legs_are_equal(daemon).map_err(in_end)?;
    let bytes = read_live(daemon, shape, rng)?;
    daemon.oracle.borrow().check_live(&bytes, false).map_err(|e| format!("in the end the live version: {e}"))?;
    for entry in daemon.entries.borrow().iter() {
        let record = entry.record.borrow();
        if record.deleting {
            return Err(format!("in the end snapshot {} is still being deleted", entry.id));
        }
        if record.broken.is_none() && entry.version.as_ref().is_some_and(|v| v.broken().is_none()) {
            let bytes = read_frozen(daemon, entry, shape, rng)?;
            let what = |e| format!("in the end the {} snapshot {}: {e}", record.strategy, entry.id);
            daemon.oracle.borrow().check_frozen(entry.id, &bytes).map_err(what)?;
        }
    }
    Ok(())
}
