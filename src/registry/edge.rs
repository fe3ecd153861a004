//! What needs what: edges from who needs to what is needed.

use uuid::Uuid;

use super::entity::{Kind, Registry};

/// Why something is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EdgeKind {
    /// A volume reads through a snapshot.
    StandsOn,
    /// A disk is being restored from a snapshot.
    RestoredFrom,
    /// What a disk is being restored from reads through a snapshot, of the same disk or below a volume.
    RestoredThrough,
}

/// One need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    /// The disk or volume that needs something.
    pub needer: Uuid,
    /// The snapshot that is needed.
    pub needed: Uuid,
    /// Why.
    pub kind: EdgeKind,
}

impl Registry {
    /// All needs. Of what is gone too: an edge whose snapshot is not there is a loss.
    pub fn edges(&self) -> impl Iterator<Item = Edge> + '_ {
        self.disks().flat_map(|disk| {
            let edge = |kind| move |needed| Edge { needer: disk.id, needed, kind };
            let stands = match disk.kind {
                Kind::Volume { on } => Some(on),
                Kind::Disk | Kind::Independent { .. } => None,
            };
            // What is lost needs nothing: it waits, and can be given up.
            let restore = disk.restore.as_ref().filter(|restore| !restore.is_lost);
            let through = restore.iter().flat_map(|r| r.through.clone()).collect::<Vec<_>>();
            stands
                .map(edge(EdgeKind::StandsOn))
                .into_iter()
                .chain(restore.map(|r| r.source).map(edge(EdgeKind::RestoredFrom)))
                .chain(through.into_iter().map(edge(EdgeKind::RestoredThrough)))
        })
    }

    /// The snapshots that one reads through: others of its disk, and what its disk stands on, down to a full image.
    #[must_use]
    pub fn through(&self, snapshot: Uuid) -> Vec<Uuid> {
        let mut found: Vec<Uuid> = Vec::new();
        let mut at = Some(snapshot);
        while let Some((disk, snapshot)) = at.and_then(|id| self.snapshot(id)) {
            found.extend(&snapshot.through);
            at = match disk.kind {
                // Nothing stands on itself, but a record might say so.
                Kind::Volume { on } if !found.contains(&on) => Some(on),
                _ => None,
            };
            found.extend(at);
        }
        found
    }
}
