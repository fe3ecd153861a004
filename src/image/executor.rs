//! A worker's tasks: futures polled on the thread of one [`IoQueue`].
//!
//! A wake-up from the same thread costs a push on a list; one from another thread also signals an eventfd that the
//! ring waits for. A task that is ready is polled once for any number of wake-ups.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::ThreadId;

use super::{Completion, IoQueue, RingOptions};

type Task = Pin<Box<dyn Future<Output = ()>>>;

thread_local! {
    // Asking the library for it counts references.
    static THIS_THREAD: ThreadId = std::thread::current().id();
}

struct ReadyList {
    owner: ThreadId,
    tasks: Mutex<Vec<u32>>,
    event: Arc<File>,
}

impl ReadyList {
    fn push(&self, task: u32) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        if THIS_THREAD.with(|id| *id) != self.owner {
            self.signal();
        }
    }

    fn signal(&self) {
        // An eventfd refuses only when its count is full, and then it is signalled already.
        if let Err(e) = rustix::io::write(&*self.event, &1u64.to_ne_bytes()) {
            log::error!("cannot wake a worker: {e}");
        }
    }
}

struct TaskWaker {
    list: Arc<ReadyList>,
    task: u32,
    queued: AtomicBool,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.list.push(self.task);
        }
    }
}

struct TaskSlot {
    future: Option<Task>,
    waker: Waker,
    state: Arc<TaskWaker>,
}

/// Polls tasks on the thread that made it.
pub struct Executor {
    // Before `queue`: tasks hold completions, which must go before the queue waits for them.
    slots: RefCell<Vec<TaskSlot>>,
    free: RefCell<Vec<u32>>,
    live: Cell<usize>,
    ready: Arc<ReadyList>,
    wake_up: RefCell<Option<Completion>>,
    queue: IoQueue,
}

/// Wakes an executor from any thread.
#[derive(Clone)]
pub struct RemoteWaker {
    list: Arc<ReadyList>,
}

impl RemoteWaker {
    /// Makes the executor's next [`Executor::turn`] return.
    pub fn wake(&self) {
        self.list.signal();
    }
}

impl Executor {
    /// An executor with a ring of its own, for the calling thread.
    ///
    /// # Errors
    /// When the kernel refuses a ring or an eventfd.
    pub fn new(options: RingOptions) -> io::Result<Executor> {
        let event = Arc::new(File::from(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?));
        let ready = ReadyList { owner: std::thread::current().id(), tasks: Mutex::new(Vec::new()), event };
        Ok(Executor {
            slots: RefCell::new(Vec::new()),
            free: RefCell::new(Vec::new()),
            live: Cell::new(0),
            ready: Arc::new(ready),
            wake_up: RefCell::new(None),
            queue: IoQueue::with_ring(options)?,
        })
    }

    /// The queue that this executor's tasks use.
    #[must_use]
    pub fn queue(&self) -> &IoQueue {
        &self.queue
    }

    /// A handle to wake this executor from other threads.
    #[must_use]
    pub fn remote_waker(&self) -> RemoteWaker {
        RemoteWaker { list: self.ready.clone() }
    }

    /// How many tasks have not finished.
    #[must_use]
    pub fn live_tasks(&self) -> usize {
        self.live.get()
    }

    /// Adds a task and polls it at once. Returns whether it finished in that poll.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) -> bool {
        let index = self.reserve();
        {
            let mut slots = self.slots.borrow_mut();
            slots[index as usize].future = Some(Box::pin(future));
        }
        self.live.set(self.live.get() + 1);
        self.poll_task(index)
    }

    /// Runs `future` to its end on this executor, with all other tasks.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> io::Result<T> {
        let out = std::rc::Rc::new(RefCell::new(None));
        let put = out.clone();
        self.spawn(async move {
            let value = future.await;
            *put.borrow_mut() = Some(value);
        });
        loop {
            if let Some(value) = out.borrow_mut().take() {
                return Ok(value);
            }
            self.turn(true)?;
        }
    }

    /// Takes finished operations and polls the tasks that became ready. With `wait`, sleeps until something happens.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn turn(&self, wait: bool) -> io::Result<()> {
        self.arm_wake_up();
        let idle = self.ready.tasks.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        self.queue.turn(wait && idle)?;
        self.run_ready();
        Ok(())
    }

    /// Polls the tasks that are ready now.
    pub fn run_ready(&self) {
        let mut batch = std::mem::take(&mut *self.ready.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for &task in &batch {
            self.poll_task(task);
        }
        batch.clear();
        let mut tasks = self.ready.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.is_empty() {
            *tasks = batch; // Keep the allocation.
        }
    }

    fn arm_wake_up(&self) {
        let mut wake_up = self.wake_up.borrow_mut();
        let waker = Waker::noop();
        let armed = match wake_up.as_mut() {
            Some(completion) => Pin::new(completion).poll(&mut Context::from_waker(waker)).is_pending(),
            None => false,
        };
        if !armed {
            *wake_up = Some(self.queue.event(&self.ready.event));
        }
    }

    fn reserve(&self) -> u32 {
        if let Some(index) = self.free.borrow_mut().pop() {
            return index;
        }
        let mut slots = self.slots.borrow_mut();
        let task = u32::try_from(slots.len()).expect("tasks are bounded by the queues");
        let state = Arc::new(TaskWaker { list: self.ready.clone(), task, queued: AtomicBool::new(false) });
        slots.push(TaskSlot { future: None, waker: state.clone().into(), state });
        task
    }

    fn poll_task(&self, index: u32) -> bool {
        let (mut future, waker) = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[index as usize];
            slot.state.queued.store(false, Ordering::Release);
            // A wake-up that came late, for a task that has ended, finds nothing to do.
            let Some(future) = slot.future.take() else { return true };
            // Taken and put back: a clone would count references.
            (future, std::mem::replace(&mut slot.waker, Waker::noop().clone()))
        };
        let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
        self.slots.borrow_mut()[index as usize].waker = waker;
        match polled {
            Poll::Pending => {
                self.slots.borrow_mut()[index as usize].future = Some(future);
                false
            }
            Poll::Ready(()) => {
                self.live.set(self.live.get() - 1);
                self.free.borrow_mut().push(index);
                true
            }
        }
    }
}

/// Runs something on a small ring of its own, in this thread.
///
/// # Errors
/// When there is no ring, or it fails.
pub fn block_on<T: 'static>(future: impl AsyncFnOnce(IoQueue) -> T + 'static) -> io::Result<T> {
    let executor = Executor::new(RingOptions { entries: 8 })?;
    let queue = executor.queue().clone();
    executor.block_on(async move { future(queue).await })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// So its number is nobody else's when the kernel comes to look at it.
    #[test]
    fn what_was_not_submitted_yet_keeps_its_file() {
        let queue = IoQueue::with_ring(RingOptions { entries: 8 }).unwrap();
        let file = || Arc::new(File::from(rustix::event::eventfd(5, rustix::event::EventfdFlags::CLOEXEC).unwrap()));
        let (taken, left) = (file(), file());
        let files = [Arc::downgrade(&taken), Arc::downgrade(&left)];
        let held = || files.each_ref().map(|file| file.strong_count());
        let (first, _second, abandoned) = (queue.event(&taken), queue.event(&taken), queue.event(&left));
        drop((taken, left, abandoned));
        assert_eq!(held(), [1, 1]);
        while queue.in_flight() > 1 {
            queue.turn(true).unwrap();
        }
        assert_eq!(held(), [1, 0], "one still waits for the first");
        drop((first, queue));
    }

    #[test]
    fn operations_finish_although_the_thread_never_has_time_to_wait() {
        let executor = Executor::new(RingOptions { entries: 8 }).unwrap();
        let queue = executor.queue().clone();
        executor.spawn(async move { drop(queue.sleep(Duration::from_millis(1)).await) });
        let patience = Instant::now() + Duration::from_secs(2);
        while executor.live_tasks() > 0 && Instant::now() < patience {
            executor.turn(false).unwrap();
        }
        assert_eq!(executor.live_tasks(), 0, "a guest that always has the next request ready starves those in flight");
    }
}
