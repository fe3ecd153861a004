//! The signal that the server is to stop, for every task that would otherwise wait for ever.

use tokio::sync::watch;

/// Gives the signal; dropping it gives the signal too.
#[derive(Debug)]
pub(super) struct Stopper(watch::Sender<bool>);

/// Waits for the signal.
#[derive(Clone, Debug)]
pub(super) struct Stop(watch::Receiver<bool>);

/// A signal not yet given.
pub(super) fn channel() -> (Stopper, Stop) {
    let (sender, receiver) = watch::channel(false);
    (Stopper(sender), Stop(receiver))
}

impl Stopper {
    pub(super) fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Stop {
    /// Returns once the signal is given, at once if it was before. Cancel safe.
    pub(super) async fn wait(&mut self) {
        // An error means that the sender is gone, which is the signal as well.
        self.0.wait_for(|stop| *stop).await.map(drop).ok();
    }
}
