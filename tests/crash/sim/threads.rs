//! Threads of a simulated host. Each has a stack of its own, and all of them run on the one thread of the test: one goes on
//! when the scheduler polls it, until it waits for something.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

/// What a thread waits for.
pub type Wait = Pin<Box<dyn Future<Output = ()>>>;

const STACK_BYTES: usize = 256 << 10;

thread_local! {
    /// The thread that runs, if one does.
    static RUNNING: Cell<*const Yielder<(), Wait>> = const { Cell::new(std::ptr::null()) };
    /// Stacks that are not in use.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Whether a thread runs, and not work on a ring.
pub fn is_running() -> bool {
    !RUNNING.get().is_null()
}

/// Lets others go on until `what` is over.
pub fn wait_for(what: Wait) {
    let running = RUNNING.get();
    assert!(!running.is_null(), "only a thread of a simulated host waits");
    // SAFETY: it was put there by the thread that runs, on whose stack this call is; it lives as long as that stack.
    unsafe { &*running }.suspend(what);
    RUNNING.set(running);
}

/// A thread, as a task of a scheduler.
pub struct Thread {
    // None when it has ended.
    coroutine: Option<Coroutine<(), Wait, (), DefaultStack>>,
    waits_for: Option<Wait>,
}

impl Thread {
    pub fn new(run: impl FnOnce() + 'static) -> Thread {
        let stack = STACKS.with_borrow_mut(Vec::pop);
        let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("room for a stack"));
        let coroutine = Coroutine::with_stack(stack, move |yielder, ()| {
            RUNNING.set(yielder);
            run();
        });
        Thread { coroutine: Some(coroutine), waits_for: None }
    }

    /// Goes on until it waits or ends. Returns whether it has ended.
    fn go_on(&mut self) -> bool {
        let Some(coroutine) = &mut self.coroutine else { return true };
        let outer = RUNNING.replace(std::ptr::null());
        let came = coroutine.resume(());
        RUNNING.set(outer);
        match came {
            CoroutineResult::Yield(wait) => self.waits_for = Some(wait),
            CoroutineResult::Return(()) => {
                let stack = self.coroutine.take().map(Coroutine::into_stack);
                STACKS.with_borrow_mut(|stacks| stacks.extend(stack));
            }
        }
        self.coroutine.is_none()
    }
}

impl Future for Thread {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if let Some(wait) = &mut self.waits_for {
                if wait.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                self.waits_for = None;
            }
            if self.go_on() {
                return Poll::Ready(());
            }
        }
    }
}

/// A host has ended by then, so no call on it waits any more, and each is refused.
impl Drop for Thread {
    fn drop(&mut self) {
        self.waits_for = None;
        for _ in 0..1000 {
            if self.go_on() {
                return;
            }
            self.waits_for = None;
        }
        assert!(std::thread::panicking(), "a thread goes on for ever on a host that has ended");
        // A test that fails already need not clean up.
        std::mem::forget(self.coroutine.take());
    }
}
