//! `disk mirror`: gives a disk a second leg, and waits until it is in sync if that is wanted.

use std::path::Path;

use hyper::Method;

use super::CliError;
use super::client::Client;
use super::output::{Output, text};
use super::pages::disk_fields;
use super::wait::{Far, Patience, Wait, newest_job, refuse_ended};
use crate::control::Name;
use crate::control::api::{Disk, JobKind, JobState, LegState, MirrorRequest};

/// How often in a row a leg is seen without a job that synchronises it until it is given up. One is over before its leg is
/// in sync, and one begins after the leg is there.
const LOOKS_WITHOUT_JOB: u32 = 25;

pub(super) fn mirror(
    name: &Name,
    leg: &Path,
    patience: Patience,
    client: &Client,
    output: &Output,
) -> Result<(), CliError> {
    let wait = Wait::begin(format!("mirroring {name}"), format!("halfsilver disk show {name}"), patience, client);
    let request = MirrorRequest { path: leg.to_owned() };
    let mut disk: Disk = client.put(Method::POST, &format!("/v1/disks/{name}/mirror"), &request)?.json()?;
    let mut in_time = Ok(());
    if patience.wait {
        let mut without_job = 0;
        (disk, in_time) = wait.look(|client| in_sync(name, leg, &mut without_job, client))?;
    }
    drop(wait);
    output.show(&disk, disk_fields)?;
    in_time
}

/// How far the leg is; an error when it no longer gets there by itself.
fn in_sync(name: &Name, leg: &Path, without_job: &mut u32, client: &Client) -> Result<(Disk, Far), CliError> {
    let failed = |what: String| Err(CliError::Failed(format!("leg {} of disk {name} {what}", leg.display())));
    // Before the disk: a job that is over is, when its leg is looked at.
    let job = newest_job(client, |job| job.kind == JobKind::Mirror && job.disk == *name)?;
    let disk: Disk = client.get(&format!("/v1/disks/{name}"))?;
    let Some(found) = disk.legs.iter().find(|other| other.path == leg) else {
        return failed("was let go meanwhile; add it again".to_owned());
    };
    match found.state {
        LegState::InSync => return Ok((disk, Far::Over)),
        LegState::Resynchronising => {}
        LegState::Failed | LegState::Split => {
            let reason = text(found.reason.as_ref());
            return failed(format!("is {}: {reason}; see 'halfsilver disk show {name}'", found.state));
        }
    }
    let far = match job.filter(|job| job.state != JobState::Done) {
        Some(job) => {
            refuse_ended(&job)?;
            *without_job = 0;
            Far::Job(job)
        }
        None => {
            *without_job += 1;
            Far::At(format!("leg {} is {}", leg.display(), found.state))
        }
    };
    if *without_job > LOOKS_WITHOUT_JOB {
        return failed("is not in sync, and no job synchronises it; add it again".to_owned());
    }
    Ok((disk, far))
}
