//! One cut through several disks: chains of writes, each submitted only after the one before was acknowledged, hop
//! between disks, queues and threads. Whatever a group of snapshots shows must be a beginning of each chain.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use serde_json::json;

use crate::client::{Client, Queue, SECTOR, tags};
use crate::harness::{Daemon, Rng, from_env, seeds, wait_until};

const DISKS: [&str; 3] = ["vm0", "vm1", "vm2"];
/// The first chain belongs to all threads, the others to one each.
const CHAINS: usize = 4;
const THREADS: usize = CHAINS - 1;
/// Sectors of one chain on one disk.
const ROOM: usize = 24;
const NOISE: std::ops::Range<usize> = CHAINS * ROOM..2048;

/// How far a chain is.
#[derive(Default)]
struct Progress {
    submitted: AtomicU64,
    acknowledged: AtomicU64,
}

/// Where a step of a chain is written.
fn place(chain: usize, step: u64) -> (usize, usize) {
    let mut rng = Rng::new(step << 8 | chain as u64);
    rng.next();
    (rng.below(DISKS.len()), chain * ROOM + rng.below(ROOM))
}

fn tag(chain: usize, step: u64) -> u64 {
    (chain as u64 + 1) << 48 | step
}

struct Shared {
    progress: [Progress; CHAINS],
    /// The last step of the chain that all threads share; whoever holds it may take the next.
    baton: Mutex<u64>,
    stop: AtomicBool,
}

/// One queue of each disk.
fn work(shared: &Shared, own: usize, mut queues: Vec<&mut Queue>, mut rng: Rng) {
    let write = |queues: &mut Vec<&mut Queue>, chain: usize, step: u64| {
        let (disk, sector) = place(chain, step);
        shared.progress[chain].submitted.store(step, SeqCst);
        queues[disk].write(sector..sector + 1, tag(chain, step));
        shared.progress[chain].acknowledged.store(step, SeqCst);
    };
    let mut step = 0;
    while !shared.stop.load(SeqCst) {
        if rng.chance(50) {
            let mut baton = shared.baton.lock().unwrap();
            *baton += 1;
            write(&mut queues, 0, *baton);
        } else {
            step += 1;
            write(&mut queues, own, step);
        }
    }
}

/// Large writes elsewhere, many at once, so that cuts find requests on their way.
fn make_noise(shared: &Shared, mut queues: Vec<&mut Queue>, mut rng: Rng) {
    while !shared.stop.load(SeqCst) {
        for queue in &mut queues {
            while queue.in_flight() < 4 {
                let at = NOISE.start + rng.below(NOISE.len() - 64);
                queue.submit_write(queue.in_flight(), at..at + 64, 1, false);
            }
            // All together: a slot is used again only when nothing is on its way.
            while queue.in_flight() > 0 {
                for (_, ret) in queue.answers(Duration::from_secs(60)) {
                    assert_eq!(ret, 0);
                }
            }
        }
    }
}

/// The last step of the chain that is there; panics when one before it is missing.
fn check_chain(chain: usize, contents: &[Vec<u64>], group: &str) -> u64 {
    let step_of = |tag: u64| tag & ((1 << 48) - 1);
    let own = chain * ROOM..(chain + 1) * ROOM;
    let last = contents.iter().flat_map(|c| &c[own.clone()]).map(|&t| step_of(t)).max().unwrap();
    let mut expected = HashMap::new();
    for step in 1..=last {
        expected.insert(place(chain, step), tag(chain, step));
    }
    for (disk, content) in contents.iter().enumerate() {
        for sector in own.clone() {
            let should = expected.get(&(disk, sector)).copied().unwrap_or(0);
            let (is, should) = (step_of(content[sector]), step_of(should));
            assert_eq!(is, should, "{group}: chain {chain} ends at {last}, but {} sector {sector}", DISKS[disk]);
        }
    }
    last
}

#[test]
fn a_group_shows_a_beginning_of_every_chain() {
    for seed in seeds("chain", 1) {
        one_run(seed, from_env("HALFSILVER_GROUPS", 40));
    }
}

/// Takes this many groups under load; panics when one is wrong.
pub(crate) fn one_run(seed: u64, groups: u64) {
    let daemon = Daemon::with_disks(&[1 << 20; 3], "queues=4");
    let mut clients: Vec<Client> = DISKS.iter().map(|d| daemon.client_with_queues(d, THREADS + 1)).collect();
    let mut by_thread: Vec<Vec<&mut Queue>> = (0..=THREADS).map(|_| Vec::new()).collect();
    for client in &mut clients {
        client.queues.iter_mut().zip(&mut by_thread).for_each(|(queue, thread)| thread.push(queue));
    }
    let shared = Shared { progress: Default::default(), baton: Mutex::new(0), stop: AtomicBool::new(false) };
    let mut ends = Vec::new();
    std::thread::scope(|scope| {
        let noise = by_thread.pop().unwrap();
        scope.spawn(|| make_noise(&shared, noise, Rng::new(seed)));
        for (i, queues) in by_thread.drain(..).enumerate() {
            let (shared, rng) = (&shared, Rng::new(seed + 1 + i as u64));
            scope.spawn(move || work(shared, i + 1, queues, rng));
        }
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for group in 0..groups {
                ends.push(one_group(&daemon, &shared, &format!("g{group}")));
                if group >= 4 {
                    let old = group - 4;
                    DISKS.iter().for_each(|d| daemon.delete(&format!("{d}@g{old}")));
                }
            }
        }));
        shared.stop.store(true, SeqCst);
        checked.unwrap_or_else(|e| std::panic::resume_unwind(e));
    });
    assert!(ends.windows(2).all(|w| w[0].iter().zip(w[1]).all(|(a, b)| *a <= b)), "{ends:?}");
    println!("the chains were cut at {:?} … {:?}", ends[0], ends[ends.len() - 1]);
    assert!(ends[ends.len() - 1].iter().all(|&end| end > groups), "the chains hardly moved: {ends:?}");
}

fn one_group(daemon: &Daemon, shared: &Shared, name: &str) -> [u64; CHAINS] {
    let before: Vec<_> = shared.progress.iter().map(|p| p.acknowledged.load(SeqCst)).collect();
    daemon.api().create(name, &DISKS, &json!({})).ok();
    let after: Vec<_> = shared.progress.iter().map(|p| p.submitted.load(SeqCst)).collect();
    let references = DISKS.map(|d| format!("{d}@{name}"));
    wait_until("a group to be quiesced", || references.iter().all(|r| daemon.state(r) == "quiesced"));
    let contents = references.map(|r| tags(&daemon.reader(&r).read(0..CHAINS * ROOM)));
    let ends: [u64; CHAINS] = std::array::from_fn(|chain| check_chain(chain, &contents, name));
    for (chain, end) in ends.iter().enumerate() {
        let (before, after) = (before[chain], after[chain]);
        assert!((before..=after).contains(end), "{name}: chain {chain} is cut at {end}, not in {before}..={after}");
    }
    ends
}

const _: () = assert!(NOISE.end * SECTOR <= 1 << 20);
