//! Backups and jobs yield to the guest: beside one that is at work they have no more bytes in flight than the window, they
//! end all the same, and when it has gone they have all that they want.

use std::sync::Arc;

use halfsilver::engine::{Attachment, Disk, GuestQueue, RestoreSource, Turn};
use halfsilver::job::{self, Outcome, Pace};

use crate::bench::{BLOCK, Bench, Memory, block, read_of};
use crate::sim::{self, Rng, Scheduler};

const K: usize = 1 << 10;
const SECTORS_OF_256K: usize = 512;

/// A guest of the disk that is at work until this is dropped, and the window beside it.
fn guest_at_work(disk: &Arc<Disk>, window: usize) -> GuestQueue {
    disk.background().set_window(window as u64);
    let guest = disk.attach_live().guest_queue().expect("the live version has guests");
    guest.begins();
    guest
}

fn wait_until_idle(disk: &Disk) {
    while disk.background().guest_is_active() {
        std::thread::yield_now();
    }
}

/// All of the window at once, so that everybody else waits.
fn take_all(bench: &Bench, disk: &Arc<Disk>) -> Turn {
    let background = disk.background().clone();
    bench.run(async move { background.turn(1, 1 << 20).await })
}

/// Runs it to its end. Returns the most bytes that were in flight after any step.
fn most_in_flight(scheduler: &mut Scheduler, seed: u64) -> usize {
    let (mut rng, mut most) = (Rng::new(seed), 0);
    loop {
        let is_over = scheduler.poll();
        most = most.max(sim::bytes_in_flight());
        if is_over {
            return most;
        }
        assert!(sim::pending_io() > 0, "it waits for what never comes");
        sim::step_io(&mut rng);
    }
}

/// A backup's reads, side by side, of all of the disk.
fn start_backup(bench: &Bench, frozen: &Attachment) -> (Scheduler, Vec<Memory>) {
    let mut scheduler = Scheduler::default();
    let parts = (0..bench.sectors()).step_by(SECTORS_OF_256K).map(|from| {
        let (request, memory) = read_of(from..from + SECTORS_OF_256K);
        bench.start(&mut scheduler, frozen.clone(), bench.ticket(), request);
        memory
    });
    let parts = parts.collect();
    (scheduler, parts)
}

/// A disk of 2 MiB with a snapshot whose blocks were written again, half of them.
fn with_snapshot(to_log: bool) -> (Bench, Attachment) {
    let bench = Bench::with_blocks(u32::try_from(BLOCK).unwrap(), (2048 * K) / BLOCK);
    bench.write(&bench.ticket(), 0..bench.sectors(), 1);
    let (cut, _) = if to_log { bench.cut_to_log() } else { bench.cut() };
    cut.frozen[0].set_quiesced();
    for from in (0..bench.sectors()).step_by(64) {
        bench.write(&bench.ticket(), from..from + 32, 2);
    }
    let frozen = bench.disk.attach_frozen(cut.frozen[0].id);
    (bench, frozen)
}

fn assert_all(parts: &[Memory], fill: u8) {
    assert!(parts.iter().all(|memory| memory().iter().all(|&byte| byte == fill)), "the backup has other bytes");
}

#[test]
fn a_backup_beside_a_guest_at_work_keeps_the_window_and_ends() {
    for (to_log, window) in [(false, 128 * K), (true, 128 * K), (true, 4 * K)] {
        let (bench, frozen) = with_snapshot(to_log);
        let guest = guest_at_work(&bench.disk, window);
        let (mut backup, parts) = start_backup(&bench, &frozen);
        let most = most_in_flight(&mut backup, 1);
        assert!(most <= window, "{most} bytes in flight");
        // The image of a log's frozen version is read in one piece.
        assert!(!to_log || most == window, "{most} bytes in flight are less than it may have");
        assert_all(&parts, 1);
        assert_eq!(bench.disk.background().in_flight_bytes(), 0);
        drop(guest);
    }
}

#[test]
fn a_backup_alone_has_all_in_flight() {
    let (bench, frozen) = with_snapshot(true);
    bench.disk.background().set_window(4096);
    let (mut backup, parts) = start_backup(&bench, &frozen);
    assert_eq!(most_in_flight(&mut backup, 2), 2048 * K);
    assert_all(&parts, 1);
    assert!(bench.disk.background().waited().is_zero());
}

#[test]
fn a_backup_has_all_in_flight_when_the_guest_has_gone() {
    let (bench, frozen) = with_snapshot(true);
    let guest = guest_at_work(&bench.disk, 64 * K);
    let (mut backup, parts) = start_backup(&bench, &frozen);
    assert!(!backup.poll());
    assert_eq!(sim::bytes_in_flight(), 64 * K);
    // In the middle of its requests.
    drop(guest);
    wait_until_idle(&bench.disk);
    sim::finish_io();
    assert!(!backup.poll());
    assert_eq!(sim::bytes_in_flight(), 2048 * K - 64 * K);
    assert!(backup.settle(&mut Rng::new(3)));
    assert_all(&parts, 1);
}

#[test]
fn a_backup_that_leaves_gives_its_turns_back() {
    let (bench, frozen) = with_snapshot(true);
    let _guest = guest_at_work(&bench.disk, 64 * K);
    let (mut first, _) = start_backup(&bench, &frozen);
    let (mut second, parts) = start_backup(&bench, &frozen);
    assert!(!first.poll() && !second.poll());
    drop(first);
    assert!(second.settle(&mut Rng::new(4)), "it waits for the one that has left");
    assert_all(&parts, 1);
}

/// What it stands on is another disk, whose guest suffers as well. What the volume's own guest reads there is no backup.
#[test]
fn a_volumes_backup_yields_to_the_guest_below_and_its_guest_does_not() {
    let (bench, frozen) = with_snapshot(true);
    let version = bench.disk.chain().links()[0].version.clone();
    let (volume, _) = crate::volumes::volume_of(&bench, &bench.disk, &version);
    let _below = guest_at_work(&bench.disk, 64 * K);
    let turn = take_all(&bench, &bench.disk);
    let origin = volume.attach_frozen(volume.chain().links()[0].version.id);
    let (mut backup, shown) = bench.start_read(origin, &bench.ticket(), block(0));
    assert!(!backup.settle(&mut Rng::new(5)), "it does not wait for its turn");
    assert_eq!(
        crate::volumes::read_all(&bench, &volume).unwrap(),
        vec![1; bench.sectors()],
        "the volume's guest waits"
    );
    drop(turn);
    assert!(backup.settle(&mut Rng::new(6)));
    assert_eq!(shown(), [1; 8]);
    assert!(frozen.guest_queue().is_none(), "a backup is no guest");
}

/// A job, and a guest that it has to yield to.
struct Working {
    bench: Bench,
    job: Scheduler,
    guest: GuestQueue,
    /// Whose guest it is.
    disk: Arc<Disk>,
    /// How many blocks it copies side by side when that guest is idle.
    alone: usize,
}

const WINDOW: usize = 2 * BLOCK;

/// A job's name, and how to begin it.
type Case = (&'static str, fn() -> Working);

fn all_jobs() -> Vec<Case> {
    fn start(bench: &Bench, job: impl Future<Output = Outcome> + 'static) -> Scheduler {
        assert!(bench.disk.chain().links().len() < 8);
        let mut scheduler = Scheduler::default();
        scheduler.spawn(async move { assert_eq!(job.await, Outcome::Done) });
        scheduler
    }
    fn work(bench: Bench, job: Scheduler, alone: usize) -> Working {
        let disk = bench.disk.clone();
        Working { guest: guest_at_work(&disk, WINDOW), bench, job, disk, alone }
    }
    fn complete(of_volume: bool) -> Working {
        let bench = Bench::with_blocks(u32::try_from(BLOCK).unwrap(), 64);
        bench.write(&bench.ticket(), 0..bench.sectors(), 1);
        let (cut, _) = bench.cut_to_log();
        cut.frozen[0].set_quiesced();
        let (volume, _) = crate::volumes::volume_of(&bench, &bench.disk, &cut.frozen[0]);
        let complete = job::complete(bench.queue.clone(), volume.clone(), Arc::new(Pace::default()));
        let job = start(&bench, async move { complete.await.unwrap() });
        let disk = if of_volume { volume } else { bench.disk.clone() };
        Working { guest: guest_at_work(&disk, WINDOW), bench, job, disk, alone: 32 }
    }
    vec![
        ("a completion, beside the volume's guest", || complete(true)),
        ("a completion, beside the guest of what it stands on", || complete(false)),
        ("a restore", || {
            let bench = Bench::new();
            bench.write(&bench.ticket(), 0..bench.sectors(), 1);
            let (cut, _) = bench.cut();
            cut.frozen[0].set_quiesced();
            bench.write(&bench.ticket(), 0..bench.sectors(), 2);
            crate::restore::restore(&bench, RestoreSource::Own(cut.frozen[0].id));
            let restore = job::restore(bench.queue.clone(), bench.disk.clone(), Arc::new(Pace::default()));
            let job = start(&bench, async move { restore.await.unwrap() });
            work(bench, job, 4)
        }),
        ("a resynchronisation", || {
            let (bench, pair, ..) = Bench::mirrored();
            bench.write(&bench.ticket(), 0..bench.sectors(), 1);
            let resync = job::resync(bench.queue.clone(), bench.disk.clone(), pair, Arc::new(Pace::default()));
            let job = start(&bench, async move { resync.await.unwrap() });
            work(bench, job, 4)
        }),
        ("a fold", || {
            let bench = Bench::new();
            let (cut, _) = bench.cut_to_log();
            bench.write(&bench.ticket(), 0..bench.sectors(), 2);
            let (job, _) = bench.start_retiring(&cut.frozen[0]);
            work(bench, job, 1)
        }),
        ("discards that were put off", || {
            let bench = Bench::new();
            bench.write(&bench.ticket(), 0..bench.sectors(), 1);
            let (cut, _) = bench.cut();
            let len = bench.disk.geometry().size_bytes;
            let discard = halfsilver::engine::Request::Discard { at: halfsilver::image::ByteOffset(0), len };
            bench.request(&bench.ticket(), discard).unwrap();
            bench.retire(&cut.frozen[0]);
            let discards = job::carry_out_discards(bench.queue.clone(), bench.disk.clone(), Arc::new(Pace::default()));
            let job = start(&bench, async move { discards.await.unwrap() });
            work(bench, job, 1)
        }),
    ]
}

#[test]
fn jobs_beside_a_guest_that_never_pauses_keep_the_window_and_end() {
    for (what, make) in all_jobs() {
        let mut at = make();
        let most = most_in_flight(&mut at.job, 7);
        assert!(most > 0 && most <= WINDOW, "{what}: {most} bytes in flight");
    }
}

#[test]
fn jobs_alone_work_side_by_side() {
    for (what, make) in all_jobs() {
        let Working { mut job, guest, disk, alone, bench: _bench } = make();
        drop(guest);
        wait_until_idle(&disk);
        let most = most_in_flight(&mut job, 8);
        assert!(most >= alone * BLOCK, "{what}: {most} bytes in flight");
    }
}

/// A turn comes first: who waits for one holds up neither a cut nor a guest's write.
#[test]
fn jobs_that_wait_for_a_turn_hold_no_epoch_and_no_block() {
    for (what, make) in all_jobs() {
        let Working { mut job, guest: _guest, bench, disk, .. } = make();
        let turn = take_all(&bench, &disk);
        assert!(!job.settle(&mut Rng::new(9)), "{what}: it does not wait");
        let epoch = bench.clock.current();
        bench.clock.advance(bench.clock.room().unwrap());
        assert!(bench.clock.is_drained(epoch), "{what}: it holds its epoch");
        bench.write(&bench.ticket(), 0..bench.sectors(), 9);
        drop(turn);
        assert!(job.settle(&mut Rng::new(10)), "{what}: it is not woken");
    }
}
