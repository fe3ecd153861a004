//! Waiting for several operations at once.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

/// Runs all futures together and returns their answers in order.
pub async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    enum Part<F: Future> {
        Running(Pin<Box<F>>),
        Done(F::Output),
    }
    let mut parts: Vec<Part<F>> = futures.into_iter().map(|f| Part::Running(Box::pin(f))).collect();
    if let [Part::Running(only)] = parts.as_mut_slice() {
        return vec![only.await];
    }
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
