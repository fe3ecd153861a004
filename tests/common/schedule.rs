//! A scheduler that decides every order from a seed: which task is polled next, and which operation of the simulated
//! images moves. What the images are is theirs ([`Device`]).

use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// xorshift64*: small, and the same everywhere.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from((self.next() >> 33) % n as u64).unwrap()
    }
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// Where operations in flight wait until the scheduler moves them.
pub trait Device {
    /// How many operations could move.
    fn pending() -> usize;
    /// Moves some sectors of one of them.
    fn step(rng: &mut Rng);
    /// Forgets those that are left when a scheduler is dropped, where it has the device for itself.
    fn reset() {}
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    ready: Arc<Flag>,
}

/// Polls tasks in an order that the seed decides.
pub struct Scheduler<D: Device> {
    tasks: Vec<Task>,
    device: PhantomData<D>,
}

impl<D: Device> Default for Scheduler<D> {
    fn default() -> Scheduler<D> {
        Scheduler { tasks: Vec::new(), device: PhantomData }
    }
}

impl<D: Device> Scheduler<D> {
    pub fn spawn(&mut self, future: impl Future<Output = ()> + 'static) {
        self.tasks.push(Task { future: Box::pin(future), ready: Arc::new(Flag(AtomicBool::new(true))) });
    }

    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// Polls one ready task or moves one operation. False when nothing can move.
    pub fn step(&mut self, rng: &mut Rng) -> bool {
        let ready: Vec<usize> =
            (0..self.tasks.len()).filter(|&i| self.tasks[i].ready.0.load(Ordering::SeqCst)).collect();
        let io = D::pending();
        if ready.is_empty() && io == 0 {
            return false;
        }
        if !ready.is_empty() && (io == 0 || rng.chance(60)) {
            self.poll_one(ready[rng.below(ready.len())]);
        } else {
            D::step(rng);
        }
        true
    }

    fn poll_one(&mut self, i: usize) {
        let task = &mut self.tasks[i];
        task.ready.0.store(false, Ordering::SeqCst);
        let waker = Waker::from(task.ready.clone());
        if let Poll::Ready(()) = task.future.as_mut().poll(&mut Context::from_waker(&waker)) {
            drop(self.tasks.swap_remove(i));
        }
    }

    /// Polls until no task is ready, and moves no operation. Returns whether all have ended.
    pub fn poll(&mut self) -> bool {
        while let Some(i) = self.tasks.iter().position(|task| task.ready.0.load(Ordering::SeqCst)) {
            self.poll_one(i);
        }
        self.tasks.is_empty()
    }

    /// Runs everything to its end. False when tasks are left that nothing will wake.
    pub fn settle(&mut self, rng: &mut Rng) -> bool {
        while self.step(rng) {}
        self.tasks.is_empty()
    }
}

impl<D: Device> Drop for Scheduler<D> {
    fn drop(&mut self) {
        self.tasks.clear();
        D::reset();
    }
}

/// Runs one future to its end, alone.
pub fn run<D: Device, T: 'static>(rng: &mut Rng, future: impl Future<Output = T> + 'static) -> T {
    let out = std::rc::Rc::new(std::cell::RefCell::new(None));
    let put = out.clone();
    let mut scheduler = Scheduler::<D>::default();
    scheduler.spawn(async move {
        let value = future.await;
        *put.borrow_mut() = Some(value);
    });
    assert!(scheduler.settle(rng), "it is never done");
    out.take().unwrap()
}
