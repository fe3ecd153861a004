//! Turns in the background: while the guest is active no more than the window is in flight, and whoever waits gets a turn
//! or gives up, whenever the guest comes and goes.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use halfsilver::engine::Background;
use halfsilver::planted::{Defect, plant};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::{future::block_on, thread};

use crate::{alone, explore, is_noticed, report};

const PIECE: u64 = 64 << 10;

/// Workers that take turns while the guest is at work all the time (`stays`), or comes and goes.
fn one_order(stays: bool) {
    let background = Arc::new(Background::default());
    background.set_window(2 * PIECE);
    let in_flight = Arc::new(AtomicU64::new(0));
    let guest = background.guest_queue();
    if stays {
        guest.begins();
    }
    let mut threads: Vec<_> = (0..3)
        .map(|worker| {
            let (background, in_flight) = (background.clone(), in_flight.clone());
            thread::spawn(move || {
                for round in 0..2 {
                    if (worker, round) == (2, 0) {
                        give_up(&background);
                    }
                    let turn = block_on(background.turn((1 + worker % 2) * PIECE, 1));
                    let all = in_flight.fetch_add(turn.bytes(), Ordering::SeqCst) + turn.bytes();
                    assert!(!stays || all <= 2 * PIECE, "{all} bytes are in flight");
                    thread::yield_now();
                    in_flight.fetch_sub(turn.bytes(), Ordering::SeqCst);
                }
            })
        })
        .collect();
    if !stays {
        let background = background.clone();
        threads.push(thread::spawn(move || {
            let guest = background.guest_queue();
            for _ in 0..2 {
                guest.begins();
                thread::yield_now();
                guest.ends(Instant::now());
            }
            guest.begins();
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    drop(guest);
    assert_eq!((background.in_flight_bytes(), background.waiting()), (0, 0));
    assert!(!background.guest_is_active(), "all its queues have gone");
}

/// Asks for a turn and loses interest, perhaps when it has been given already.
fn give_up(background: &Arc<Background>) {
    let mut looks = 0;
    block_on(async {
        let mut turn = Box::pin(background.turn(PIECE, 1));
        std::future::poll_fn(|cx: &mut Context<'_>| {
            looks += 1;
            match turn.as_mut().poll(cx) {
                Poll::Pending if looks < 2 => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
    });
}

#[test]
fn turns_keep_the_window_and_leave_nobody_behind() {
    let _alone = alone();
    for stays in [false, true] {
        explore(1500, move || one_order(stays));
    }
}

#[test]
fn planted_windows_not_kept_and_turns_not_passed_on_are_noticed() {
    let _alone = alone();
    for defect in [Defect::WindowNotKept, Defect::TurnNotPassedOn] {
        plant(Some(defect));
        let noticed = is_noticed(200, || one_order(true));
        plant(None);
        report(defect, noticed, "background.rs");
        assert!(noticed, "{defect:?}");
    }
}
