//! How far a live version is with a restore in place, as its chain says it.
//!
//! What always holds:
//! - A block is *pending* while its bit is set: the live version shows what it is restored to, and nothing reads what the
//!   live version's own place for the block has. The bit goes when that place has the block's bytes, and never comes back.
//! - A gate is opened once, and nothing waits at it after that.

use std::sync::Arc;
use std::task::{Poll, Waker};

use super::{VersionId, View};
use crate::store::{BlockIndex, DurableTable};
use crate::sync::{Mutex, lock};

/// What a live version is restored to.
#[derive(Clone)]
pub enum RestoreSource {
    /// A frozen version of the same disk.
    Own(VersionId),
    /// A frozen version of another disk.
    View(Arc<View>),
}

/// A restore under way.
pub struct Restoring {
    pending: DurableTable,
    source: RestoreSource,
}

/// How far a chain's live version is with a restore.
#[derive(Clone)]
pub(super) enum Restore {
    /// There is none.
    None,
    /// One is about to begin: changes wait, so that none is decided by what the disk was before. Reads wait too if what
    /// they would show is not known yet.
    Closed { gate: Arc<Gate>, reads_wait: bool },
    /// Pending blocks show what is restored.
    Active(Arc<Restoring>),
    /// What pending blocks should show cannot be had, and why.
    Lost(String),
}

impl Restore {
    /// Where changes wait, if they do.
    pub(super) fn gate(&self) -> Option<Arc<Gate>> {
        match self {
            Restore::Closed { gate, .. } => Some(gate.clone()),
            Restore::None | Restore::Active(_) | Restore::Lost(_) => None,
        }
    }
}

/// Where requests wait, without a lock and without a thread. Opened once.
#[derive(Default)]
pub struct Gate {
    state: Mutex<(bool, Vec<Waker>)>,
}

impl Gate {
    /// Waits until it is opened.
    pub async fn opened(&self) {
        std::future::poll_fn(|cx| {
            let mut state = lock(&self.state);
            if state.0 {
                return Poll::Ready(());
            }
            if !state.1.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.1.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    /// Lets everybody go on who waits.
    pub fn open(&self) {
        let waiting = {
            let mut state = lock(&self.state);
            state.0 = true;
            std::mem::take(&mut state.1)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Restoring {
    /// A restore to `source` of the blocks that are set in `pending`.
    #[must_use]
    pub fn new(pending: DurableTable, source: RestoreSource) -> Arc<Restoring> {
        Arc::new(Restoring { pending, source })
    }

    /// The blocks that are still to be brought back.
    #[must_use]
    pub fn pending(&self) -> &DurableTable {
        &self.pending
    }

    /// What is restored.
    #[must_use]
    pub fn source(&self) -> &RestoreSource {
        &self.source
    }

    pub(super) fn is_pending(&self, block: BlockIndex) -> bool {
        self.pending.table().get(block)
    }
}
