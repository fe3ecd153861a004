//! Claims of commands and jobs on the disks that they change, and the registry that is decided by.
//!
//! What always holds:
//! - The lock over the claims covers memory only: nothing is read, written or waited for under it but a claim.
//! - A command is decided about and gets its claim in one step, so what it was decided by stays true until it lets go.
//! - A command waits for another one's claim for [`CLAIM_WAIT`] at most; a job waits until the daemon goes down.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::control::api;
use crate::control::timestamp::Timestamp;
use crate::control::{ApiError, ErrorCode, Name};
use crate::manager::Manager;
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::jobs::JobEntry;
use crate::registry::{self, ClaimKey, Command, Plan, Refusal, Registry, Wanted, decide};

/// How long a command waits for what another one has claimed.
const CLAIM_WAIT: Duration = Duration::from_secs(10);
/// How long a connection that stands in the way may take to hang up.
const HANG_UP_WAIT: Duration = Duration::from_secs(1);
/// How often it is looked at.
const HANG_UP_LOOK: Duration = Duration::from_millis(5);
/// How long a job waits to record what it did when the daemon goes down.
const RECORD_WAIT: Duration = Duration::from_secs(15);
/// How often a job that waits looks whether the daemon is going down.
const LOOK: Duration = Duration::from_millis(200);

/// Why something is not claimed.
struct Denied {
    error: ApiError,
    /// Whether that may be over in a moment.
    may_pass: bool,
}

impl From<ApiError> for Denied {
    fn from(error: ApiError) -> Denied {
        Denied { error, may_pass: false }
    }
}

impl From<Refusal> for Denied {
    fn from(refusal: Refusal) -> Denied {
        Denied { may_pass: refusal.may_pass, error: refusal.into() }
    }
}

/// A claim, until this is dropped.
pub(crate) struct Held<'a> {
    manager: &'a Manager,
    id: u64,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        locked(&self.manager.claims).release(self.id);
        self.manager.released.notify_all();
    }
}

/// That the holder of a claim waits for something, until this is dropped.
pub(crate) struct Waits<'a> {
    manager: &'a Manager,
    id: Option<u64>,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut claims = locked(&self.manager.claims);
        self.id.into_iter().for_each(|id| claims.note(id, None));
    }
}

impl Manager {
    /// Decides about a command and claims what it is about.
    pub(crate) fn claim(&self, command: &Command) -> Result<(Held<'_>, Plan), ApiError> {
        self.claim_with(command, [])
    }

    /// The same, with something else that it changes.
    pub(crate) fn claim_with(
        &self,
        command: &Command,
        also: impl IntoIterator<Item = ClaimKey>,
    ) -> Result<(Held<'_>, Plan), ApiError> {
        let also: Vec<ClaimKey> = also.into_iter().collect();
        let operation = command.to_string().trim_start_matches("halfsilver ").to_owned();
        self.claim_when(&operation, || {
            let registry = self.registry();
            let mut plan = decide(&registry, command)?;
            plan.wanted.changes.extend(also.iter().cloned());
            Ok((plan.wanted.clone(), names_of(&registry, &plan.wanted), plan))
        })
    }

    /// Claims without a decision: for what is not in the registry yet, and for the ends of jobs.
    pub(crate) fn claim_keys(&self, operation: &str, names: &[&str], wanted: Wanted) -> Result<Held<'_>, ApiError> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        self.claim_when(operation, || Ok((wanted.clone(), names.clone(), ()))).map(|(held, ())| held)
    }

    /// Claims what `decide` wants, whenever it can still be had.
    pub(crate) fn claim_decided(
        &self,
        operation: &str,
        decide: &dyn Fn(&Registry) -> Result<Wanted, Refusal>,
    ) -> Result<Held<'_>, ApiError> {
        let claimed = self.claim_when(operation, || {
            let registry = self.registry();
            let wanted = decide(&registry)?;
            let names = names_of(&registry, &wanted);
            Ok((wanted, names, ()))
        });
        claimed.map(|(held, ())| held)
    }

    fn claim_when<T>(
        &self,
        operation: &str,
        decide: impl Fn() -> Result<(Wanted, Vec<String>, T), Denied>,
    ) -> Result<(Held<'_>, T), ApiError> {
        let (since, deadline) = (self.host.now(), self.host.now() + CLAIM_WAIT);
        let mut claims = locked(&self.claims);
        let mut waiting = None;
        let ended = loop {
            if let Err(e) = self.refuse_when_stopping() {
                break Err(e);
            }
            let (wanted, names, decided) = match decide() {
                Ok(decided) => decided,
                Err(Denied { may_pass: true, .. }) if self.host.now() - since < HANG_UP_WAIT => {
                    claims = self.host.wait(&self.released, &self.claims, claims, HANG_UP_LOOK);
                    continue;
                }
                Err(denied) => break Err(denied.error),
            };
            let claim = registry::Claim { operation: operation.to_owned(), names, wanted, since, waits_for: None };
            let (refused, by) = match claims.take(claim.clone()) {
                Ok(id) => break Ok((Held { manager: self, id }, decided)),
                Err(held) => (claimed(held, self.host.now()), spoken_of(held)),
            };
            let Some(left) = deadline.checked_duration_since(self.host.now()) else { break Err(refused) };
            let id = *waiting.get_or_insert_with(|| claims.wait(claim));
            claims.note(id, Some(by));
            claims = self.host.wait(&self.released, &self.claims, claims, left);
        };
        waiting.into_iter().for_each(|id| claims.release(id));
        ended
    }

    /// Says that a command waits for something without having claimed anything, until this is dropped.
    pub(crate) fn announce(&self, operation: &str, name: &str, waits_for: String) -> Held<'_> {
        let (operation, names, since) = (operation.to_owned(), vec![name.to_owned()], self.host.now());
        let claim = registry::Claim { operation, names, wanted: Wanted::default(), since, waits_for: Some(waits_for) };
        Held { manager: self, id: locked(&self.claims).wait(claim) }
    }

    /// Says what the command waits for that has claimed a disk, until this is dropped.
    pub(crate) fn waiting_for(&self, disk: &DiskEntry, what: String) -> Waits<'_> {
        let mut claims = locked(&self.claims);
        let id = claims.of(&ClaimKey::Entity(disk.id));
        id.into_iter().for_each(|id| claims.note(id, Some(what.clone())));
        Waits { manager: self, id }
    }

    /// The requests in flight that a disk waits for, by their disks: its own, and those of what reads it or is read by it.
    pub(crate) fn requests_of(&self, disk: &DiskEntry) -> String {
        let registry = self.registry();
        let Some(own) = registry.disk(disk.id) else { return format!("requests in flight of {}", disk.name) };
        let is_family = |other: &&registry::Disk| {
            !other.is_unserved() && (registry.comes_from(other, own) || registry.comes_from(own, other))
        };
        let names: Vec<&str> = registry.disks().filter(is_family).map(|disk| disk.name.as_str()).collect();
        format!("requests in flight of {}", names.join(", "))
    }

    /// Claims what a job works on, however long that takes. None when the daemon goes down.
    pub(crate) fn claim_for_job(&self, job: &JobEntry) -> Option<Held<'_>> {
        let operation = format!("{} (job {})", job.kind, job.id);
        self.claim_noting(&operation, job.disk.name.get().as_str(), ClaimKey::Entity(job.disk.id), &job.waits_for)
    }

    /// Claims one thing, however long that takes. None when the daemon goes down.
    pub(crate) fn claim_patiently(&self, operation: &str, name: &str, key: ClaimKey) -> Option<Held<'_>> {
        self.claim_noting(operation, name, key, &Mutex::new(None))
    }

    /// The same, and notes who is waited for.
    fn claim_noting(
        &self,
        operation: &str,
        name: &str,
        key: ClaimKey,
        waits_for: &Mutex<Option<String>>,
    ) -> Option<Held<'_>> {
        let (since, names) = (self.host.now(), vec![name.to_owned()]);
        let mut claims = locked(&self.claims);
        let mut waiting = None;
        let claimed = loop {
            if self.is_stopping() {
                break None;
            }
            let wanted = Wanted::changing([key.clone()]);
            let claim = registry::Claim {
                operation: operation.to_owned(),
                names: names.clone(),
                wanted,
                since,
                waits_for: None,
            };
            let by = match claims.take(claim.clone()) {
                Ok(id) => break Some(Held { manager: self, id }),
                Err(held) => spoken_of(held),
            };
            let id = *waiting.get_or_insert_with(|| claims.wait(claim));
            claims.note(id, Some(by.clone()));
            *locked(waits_for) = Some(by);
            claims = self.host.wait(&self.released, &self.claims, claims, LOOK);
        };
        waiting.into_iter().for_each(|id| claims.release(id));
        *locked(waits_for) = None;
        claimed
    }

    /// Waits until nothing is claimed any more, at most for `timeout`. Returns what is still claimed then.
    pub(crate) fn wait_unclaimed(&self, timeout: Duration) -> Vec<String> {
        let deadline = self.host.now() + timeout;
        let mut claims = locked(&self.claims);
        loop {
            let left: Vec<String> =
                claims.held().map(|c| format!("{} ({})", c.operation, c.names.join(", "))).collect();
            let Some(time) = deadline.checked_duration_since(self.host.now()).filter(|_| !left.is_empty()) else {
                return left;
            };
            claims = self.host.wait(&self.released, &self.claims, claims, time);
        }
    }

    /// Whether a command is changing this disk or volume.
    pub(crate) fn is_being_changed(&self, id: uuid::Uuid) -> bool {
        locked(&self.claims).held().any(|claim| claim.wanted.changes.contains(&ClaimKey::Entity(id)))
    }

    /// The same for what has a name and perhaps no identifier yet.
    pub(crate) fn is_name_claimed(&self, name: &Name) -> bool {
        locked(&self.claims).held().any(|claim| claim.wanted.changes.contains(&ClaimKey::Name(name.clone())))
    }

    /// Claims what a job has changed already, so that it is recorded: also while the daemon goes down, when nothing new is
    /// begun and what is claimed is let go soon.
    pub(crate) fn claim_to_record(&self, job: &JobEntry) -> Option<Held<'_>> {
        let deadline = self.host.now() + RECORD_WAIT;
        loop {
            if let Some(held) = self.claim_for_job(job) {
                return Some(held);
            }
            let wanted = Wanted::changing([ClaimKey::Entity(job.disk.id)]);
            let (operation, names) = (format!("{} (job {})", job.kind, job.id), vec![job.disk.name.to_string()]);
            let claim = registry::Claim { operation, names, wanted, since: self.host.now(), waits_for: None };
            if let Ok(id) = locked(&self.claims).take(claim) {
                return Some(Held { manager: self, id });
            }
            if self.host.now() >= deadline {
                return None;
            }
            self.host.pause(HANG_UP_LOOK);
        }
    }

    /// Everything that is claimed, the oldest first, and then what is waited for.
    pub(crate) fn claims_to_api(&self) -> Vec<api::Claim> {
        let to_api = |claim: &registry::Claim, held| api::Claim {
            held,
            operation: claim.operation.clone(),
            entities: claim.names.clone(),
            since: Timestamp::ago(self.host.now() - claim.since),
            waits_for: claim.waits_for.clone(),
        };
        let claims = locked(&self.claims);
        let held = claims.held().map(|claim| to_api(claim, true));
        held.chain(claims.waiting().map(|claim| to_api(claim, false))).collect()
    }
}

/// The names of what is changed.
fn names_of(registry: &Registry, wanted: &Wanted) -> Vec<String> {
    let named = |key: &ClaimKey| match key {
        ClaimKey::Entity(id) => registry.disk(*id).map(|disk| disk.name.to_string()),
        ClaimKey::Name(name) => Some(name.to_string()),
        ClaimKey::Path(_) => None,
    };
    wanted.changes.iter().filter_map(named).collect()
}

/// Who has it.
fn spoken_of(by: &registry::Claim) -> String {
    format!("'{}' on {}", by.operation, by.names.join(", "))
}

/// Who has it, and since when.
fn claimed(by: &registry::Claim, now: Instant) -> ApiError {
    let seconds = (now - by.since).as_secs();
    let waits = by.waits_for.as_ref().map(|what| format!(", which waits for {what}")).unwrap_or_default();
    let message = format!("'{}' has been at work on {} for {seconds} s{waits}", by.operation, by.names.join(", "));
    ApiError::new(ErrorCode::Unavailable, message)
        .with_action("try again when it is done; 'halfsilver status' lists what is claimed")
}
