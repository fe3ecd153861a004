//! Waiting for several operations at once.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use smallvec::{SmallVec, smallvec};

/// Runs all futures together and returns their answers in order. One alone costs nothing more than itself.
pub async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> SmallVec<[F::Output; 1]> {
    enum Part<F: Future> {
        Running(Pin<Box<F>>),
        Done(F::Output),
    }
    let mut futures = futures.into_iter();
    let Some(first) = futures.next() else { return SmallVec::new() };
    let Some(second) = futures.next() else { return smallvec![first.await] };
    let all = [first, second].into_iter().chain(futures);
    let mut parts: Vec<Part<F>> = all.map(|f| Part::Running(Box::pin(f))).collect();
    poll_fn(|cx| {
        let mut all_done = true;
        for part in &mut parts {
            if let Part::Running(future) = part {
                match future.as_mut().poll(cx) {
                    Poll::Ready(answer) => *part = Part::Done(answer),
                    Poll::Pending => all_done = false,
                }
            }
        }
        if all_done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    let done = |part| match part {
        Part::Done(answer) => answer,
        Part::Running(_) => unreachable!("all parts are done"),
    };
    parts.into_iter().map(done).collect()
}
