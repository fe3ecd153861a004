//! What needs what: edges from who needs to what is needed.

use uuid::Uuid;

use super::entity::{Disk, Kind, Registry};

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
                Kind::Volume(source) => Some(source.snapshot),
                Kind::Disk | Kind::Independent(_) => None,
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
                Kind::Volume(source) if !found.contains(&source.snapshot) => Some(source.snapshot),
                _ => None,
            };
            found.extend(at);
        }
        found
    }

    /// Whether a disk's content has something of another one's: it is the same, or a volume that stands on it, or did.
    #[must_use]
    pub fn comes_from(&self, disk: &Disk, other: &Disk) -> bool {
        let (mut at, mut seen) = (disk, Vec::new());
        loop {
            if at.id == other.id {
                return true;
            }
            seen.push(at.id);
            let below = match at.kind {
                Kind::Volume(source) => self.snapshot(source.snapshot).map(|(disk, _)| disk),
                // It has all of that one as it was, and what was written to it since; of what lies below, nobody knows.
                Kind::Independent(source) => return source.disk == other.id,
                Kind::Disk => None,
            };
            // Nothing stands on itself, but a record might say so.
            let Some(below) = below.filter(|below| !seen.contains(&below.id)) else { return false };
            at = below;
        }
    }
}
