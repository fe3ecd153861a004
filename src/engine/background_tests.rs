//! The window, turn by turn.

use std::pin::pin;
use std::sync::atomic::AtomicUsize;
use std::task::Wake;

use super::*;

const K: u64 = 1 << 10;

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

fn with_window(bytes: u64) -> (Arc<Background>, GuestQueue) {
    let background = Arc::new(Background::default());
    background.set_window(bytes);
    let guest = background.guest_queue();
    (background, guest)
}

/// One look: the turn, if it is there.
fn look(future: std::pin::Pin<&mut impl Future<Output = Turn>>, woken: &Arc<Woken>) -> Option<Turn> {
    let waker = Waker::from(woken.clone());
    match future.poll(&mut Context::from_waker(&waker)) {
        Poll::Ready(turn) => Some(turn),
        Poll::Pending => None,
    }
}

/// A turn that does not have to wait.
#[track_caller]
fn now(background: &Arc<Background>, most: u64, least: u64) -> Turn {
    look(pin!(background.turn(most, least)), &Arc::default()).expect("it waits")
}

#[track_caller]
fn assert_waits(background: &Arc<Background>, most: u64, least: u64) {
    assert!(look(pin!(background.turn(most, least)), &Arc::default()).is_none(), "it does not wait");
}

#[test]
fn beside_an_idle_guest_a_turn_is_all_that_is_wanted() {
    let (background, guest) = with_window(128 * K);
    let turns: Vec<_> = (0..100).map(|_| now(&background, 1 << 30, 1)).collect();
    assert!(turns.iter().all(|turn| turn.bytes() == 1 << 30));
    assert_eq!((background.in_flight_bytes(), background.waited()), (0, Duration::ZERO));
    // They do not keep others waiting when the guest comes.
    guest.begins();
    let beside = [now(&background, 1 << 30, 1), now(&background, 1 << 30, 1)];
    assert!(beside.iter().all(|turn| turn.bytes() == 64 * K));
    assert_waits(&background, K, 1);
}

#[test]
fn beside_an_active_guest_no_more_than_the_window_is_in_flight() {
    let (background, guest) = with_window(128 * K);
    guest.begins();
    let (first, small) = (now(&background, 256 * K, 1), now(&background, 8 * K, 1));
    assert_eq!((first.bytes(), small.bytes(), background.in_flight_bytes()), (64 * K, 8 * K, 72 * K));
    assert_waits(&background, 64 * K, 1);
    let rest = now(&background, 56 * K, 1);
    assert_eq!(background.in_flight_bytes(), 128 * K);
    assert_waits(&background, 512, 1);
    drop(small);
    assert_eq!(now(&background, 8 * K, 1).bytes(), 8 * K);
    drop((first, rest));
    assert_eq!(background.in_flight_bytes(), 0);
}

#[test]
fn there_is_progress_with_any_window_and_any_block() {
    let (background, guest) = with_window(4 * K);
    guest.begins();
    assert_eq!(now(&background, 1 << 20, 1).bytes(), 4 * K);
    let block = now(&background, 8 << 20, 1 << 20);
    assert_eq!((block.bytes(), block.blocks(1 << 20), background.in_flight_bytes()), (1 << 20, 1, 1 << 20));
    assert_waits(&background, 4 * K, 1);
    drop(block);
    assert_eq!(now(&background, 4 * K, 1).blocks(64 * K), 1);
}

#[test]
fn without_a_limit_nobody_yields() {
    let (background, guest) = with_window(0);
    guest.begins();
    let turns = [now(&background, 1 << 30, 1), now(&background, 1 << 30, 1)];
    assert!(turns.iter().all(|turn| turn.bytes() == 1 << 30));
}

#[test]
fn who_waits_is_served_in_order_and_nobody_overtakes() {
    let (background, guest) = with_window(64 * K);
    guest.begins();
    let held = now(&background, 64 * K, 1);
    let woken: [Arc<Woken>; 3] = Default::default();
    let mut first = pin!(background.turn(64 * K, 1));
    let mut second = pin!(background.turn(4 * K, 1));
    let mut third = pin!(background.turn(4 * K, 1));
    assert!(look(first.as_mut(), &woken[0]).is_none());
    assert!(look(second.as_mut(), &woken[1]).is_none());
    assert!(look(third.as_mut(), &woken[2]).is_none());
    drop(held);
    let counts = || woken.each_ref().map(|w| w.0.load(std::sync::atomic::Ordering::SeqCst));
    assert_eq!(counts(), [1, 0, 0]);
    assert_waits(&background, 4 * K, 1);
    drop(look(first, &woken[0]).expect("it is its turn"));
    assert_eq!(counts(), [1, 1, 1], "both fit");
    assert!(look(third, &woken[2]).is_some() && look(second, &woken[1]).is_some());
    assert_eq!((background.waiting(), background.in_flight_bytes()), (0, 0));
    assert!(background.waited() > Duration::ZERO);
}

#[test]
fn who_gives_up_leaves_nobody_behind() {
    let (background, guest) = with_window(64 * K);
    guest.begins();
    let woken: [Arc<Woken>; 2] = Default::default();
    for is_given in [false, true] {
        let held = [now(&background, 32 * K, 1), now(&background, 16 * K, 1)];
        let mut leaves = Box::pin(background.turn(64 * K, 1));
        let mut stays = pin!(background.turn(16 * K, 1));
        assert!(look(leaves.as_mut(), &woken[0]).is_none());
        assert!(look(stays.as_mut(), &woken[1]).is_none());
        if is_given {
            drop(held);
            assert_eq!(background.in_flight_bytes(), 64 * K, "the first has been given all, and does not know yet");
            drop(leaves);
            assert!(look(stays, &woken[1]).is_some());
        } else {
            drop(leaves);
            assert!(look(stays, &woken[1]).is_some(), "the second fits beside what is held");
            drop(held);
        }
        assert_eq!((background.waiting(), background.in_flight_bytes()), (0, 0));
    }
}

#[test]
fn who_waits_is_given_everything_when_the_guest_has_gone() {
    let (background, guest) = with_window(64 * K);
    guest.begins();
    let held = now(&background, 64 * K, 1);
    let woken: [Arc<Woken>; 2] = Default::default();
    let mut waiting = [Box::pin(background.turn(1 << 20, 1)), Box::pin(background.turn(1 << 20, 1))];
    for (turn, woken) in waiting.iter_mut().zip(&woken) {
        assert!(look(turn.as_mut(), woken).is_none());
    }
    drop(guest);
    while background.guest_is_active() {
        std::thread::yield_now();
    }
    drop(held);
    for (mut turn, woken) in waiting.into_iter().zip(&woken) {
        assert_eq!(look(turn.as_mut(), woken).expect("there is no limit now").bytes(), 1 << 20);
    }
}

#[test]
fn a_guest_is_active_until_a_moment_after_its_last_queue_ended() {
    let background = Arc::new(Background::default());
    assert!(!background.guest_is_active());
    let queues = [background.guest_queue(), background.guest_queue()];
    assert!(!background.guest_is_active());
    queues.iter().for_each(GuestQueue::begins);
    queues[0].begins();
    queues[0].ends(Instant::now());
    queues[0].ends(Instant::now());
    assert!(background.guest_is_active(), "the other queue is at work");
    let before = background.born;
    std::thread::sleep(LINGER + Duration::from_millis(1));
    queues[1].ends(before);
    assert!(!background.guest_is_active(), "that was long ago");
    queues[1].begins();
    queues[1].ends(Instant::now() + Duration::from_secs(3600));
    assert!(background.guest_is_active(), "that was just now");
    queues[1].begins();
    queues[1].ends(before);
    queues[0].begins();
    drop(queues);
    let busy = background.busy.load(Ordering::SeqCst);
    assert_eq!(busy, 0, "a queue that goes in the middle of its work is at work no more");
    while background.guest_is_active() {
        std::thread::yield_now();
    }
}

/// A holder hangs: who waits goes on beside it after a while, and so does who comes then, until it gives its turn back.
#[test]
fn who_waits_behind_a_holder_that_hangs_goes_on_beside_it() {
    let (background, guest) = with_window(64 * K);
    guest.begins();
    let hangs = now(&background, 64 * K, 1);
    let woken = Arc::new(Woken::default());
    let mut waits = pin!(background.turn(1 << 20, 4 * K));
    assert!(look(waits.as_mut(), &woken).is_none());
    background.relieve();
    assert!(look(waits.as_mut(), &woken).is_none(), "that turn was given just now");
    lock(&background.turns).in_flight.moved -= STALL;
    background.relieve();
    assert_eq!(woken.0.load(std::sync::atomic::Ordering::SeqCst), 1);
    let beside = look(waits.as_mut(), &woken).expect("it goes on beside the one that hangs");
    assert_eq!((beside.bytes(), background.in_flight_bytes()), (64 * K, 64 * K));
    assert_eq!(now(&background, 1 << 20, 128 * K).bytes(), 128 * K);
    drop((hangs, beside));
    let next = now(&background, 64 * K, 1);
    assert_waits(&background, K, 1);
    drop(next);
}

/// The guest has gone, and whoever holds a turn hangs: nobody else has to wait for anything.
#[test]
fn who_waited_for_a_guest_that_has_gone_goes_on() {
    let (background, guest) = with_window(64 * K);
    guest.begins();
    let _hangs = now(&background, 64 * K, 1);
    let mut waits = pin!(background.turn(1 << 20, 1));
    assert!(look(waits.as_mut(), &Arc::default()).is_none());
    drop(guest);
    while background.guest_is_active() {
        std::thread::yield_now();
    }
    background.relieve();
    assert_eq!(look(waits.as_mut(), &Arc::default()).expect("nobody is in its way").bytes(), 1 << 20);
}
