//! Who is changing what at this moment.
//!
//! What always holds: nothing is changed by two at a time, and nothing goes or changes that somebody needs meanwhile. All
//! that a command wants is claimed at once, so no two wait for each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

use uuid::Uuid;

use crate::control::Name;

/// What can be claimed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClaimKey {
    /// A disk or volume with all that belongs to it.
    Entity(Uuid),
    /// A name that something is about to get, or that a record has.
    Name(Name),
    /// The path of a socket or an image that is about to be used.
    Path(PathBuf),
}

/// What a command wants for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// What it changes.
    pub changes: BTreeSet<ClaimKey>,
    /// What must stay as it is meanwhile.
    pub needs: BTreeSet<ClaimKey>,
}

impl Wanted {
    /// Changes these.
    #[must_use]
    pub fn changing(keys: impl IntoIterator<Item = ClaimKey>) -> Wanted {
        Wanted { changes: keys.into_iter().collect(), needs: BTreeSet::new() }
    }

    fn collides(&self, other: &Wanted) -> bool {
        let touches = |one: &BTreeSet<ClaimKey>, other: &BTreeSet<ClaimKey>| one.iter().any(|key| other.contains(key));
        touches(&self.changes, &other.changes)
            || touches(&self.changes, &other.needs)
            || touches(&self.needs, &other.changes)
    }
}

/// What a command has claimed.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The command, as it is spoken of.
    pub operation: String,
    /// The names of what it changes.
    pub names: Vec<String>,
    /// What it has for itself.
    pub wanted: Wanted,
    /// Since when.
    pub since: Instant,
    /// What it waits for, if it does.
    pub waits_for: Option<String>,
}

/// All claims.
#[derive(Debug, Default)]
pub struct Claims {
    held: BTreeMap<u64, Claim>,
    waiting: BTreeMap<u64, Claim>,
    next: u64,
}

impl Claims {
    /// Claims, unless somebody else has what is wanted.
    ///
    /// # Errors
    /// Who has it.
    pub fn take(&mut self, claim: Claim) -> Result<u64, &Claim> {
        let colliding = self.held.iter().find(|(_, held)| held.wanted.collides(&claim.wanted)).map(|(id, _)| *id);
        if let Some(id) = colliding {
            return Err(&self.held[&id]);
        }
        self.next += 1;
        self.held.insert(self.next, claim);
        Ok(self.next)
    }

    /// Notes what would be claimed and is waited for. It keeps nobody from anything.
    pub fn wait(&mut self, claim: Claim) -> u64 {
        self.next += 1;
        self.waiting.insert(self.next, claim);
        self.next
    }

    /// Lets a claim go, or waits no more.
    pub fn release(&mut self, id: u64) {
        self.held.remove(&id);
        self.waiting.remove(&id);
    }

    /// Says what somebody waits for who has claimed something or would like to.
    pub fn note(&mut self, id: u64, waits_for: Option<String>) {
        if let Some(claim) = self.held.get_mut(&id).or_else(|| self.waiting.get_mut(&id)) {
            claim.waits_for = waits_for;
        }
    }

    /// The claim of something.
    pub fn of(&self, key: &ClaimKey) -> Option<u64> {
        self.held.iter().find(|(_, claim)| claim.wanted.changes.contains(key)).map(|(id, _)| *id)
    }

    /// The oldest first.
    pub fn held(&self) -> impl Iterator<Item = &Claim> {
        self.held.values()
    }

    /// Those who have claimed nothing yet, in the order in which they came.
    pub fn waiting(&self) -> impl Iterator<Item = &Claim> {
        self.waiting.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(changes: &[u128], needs: &[u128]) -> Claim {
        let keys = |ids: &[u128]| ids.iter().map(|id| ClaimKey::Entity(Uuid::from_u128(*id))).collect();
        let wanted = Wanted { changes: keys(changes), needs: keys(needs) };
        Claim { operation: "a test".to_owned(), names: Vec::new(), wanted, since: Instant::now(), waits_for: None }
    }

    #[test]
    fn nothing_is_changed_by_two_and_nothing_needed_is_changed() {
        let mut claims = Claims::default();
        let first = claims.take(claim(&[1], &[2])).unwrap();
        assert!(claims.take(claim(&[1], &[])).is_err(), "changed by two");
        assert!(claims.take(claim(&[2], &[])).is_err(), "needed by the first");
        assert!(claims.take(claim(&[3], &[1])).is_err(), "changed by the first");
        let second = claims.take(claim(&[3], &[2])).unwrap();
        assert!(claims.take(claim(&[4, 3], &[])).is_err(), "all or nothing");
        claims.release(first);
        claims.take(claim(&[1], &[2])).unwrap();
        claims.release(second);
        claims.take(claim(&[4, 3], &[])).unwrap();
    }

    #[test]
    fn who_waits_keeps_nobody_from_anything() {
        let mut claims = Claims::default();
        let waiting = claims.wait(claim(&[1], &[]));
        let held = claims.take(claim(&[1], &[])).unwrap();
        assert_eq!((claims.held().count(), claims.waiting().count()), (1, 1));
        claims.note(waiting, Some("the other one".to_owned()));
        assert_eq!(claims.waiting().next().unwrap().waits_for.as_deref(), Some("the other one"));
        assert_eq!(claims.of(&ClaimKey::Entity(Uuid::from_u128(1))), Some(held));
        claims.release(waiting);
        assert_eq!((claims.held().count(), claims.waiting().count()), (1, 0));
    }
}
