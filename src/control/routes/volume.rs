//! What becomes of a volume: it is completed, promoted, disabled and enabled.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::{Context, PathText, QueryText, Refused, Reply};
use crate::control::api::{Disk, EnableQuery, ForceQuery, Job, JobPatch, UpdateQuery, Volume};
use crate::control::error::ApiError;
use crate::control::name::Name;

/// Copies what a volume does not own yet, until it is independent of its snapshot; goes on with that if it was stopped.
#[utoipa::path(post, path = "/v1/volumes/{volume}/complete", tag = "volumes",
    params(("volume" = Name, Path), JobPatch),
    responses((status = 202, description = "The job that does it", body = Job), Refused))]
pub(super) async fn complete_volume(
    State(context): State<Context>,
    path: PathText,
    query: QueryText<JobPatch>,
) -> Result<(StatusCode, Json<Job>), ApiError> {
    let (volume, pacing): (Name, JobPatch) = (path?.parse()?, query?.0);
    pacing.check()?;
    let job = context.call(move |service| service.complete_volume(&volume, pacing)).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Brings a volume to its source's present, which it shows when this is answered. One that was independent is so again when the
/// job is done; for another one it is over at once.
#[utoipa::path(post, path = "/v1/volumes/{volume}/update", tag = "volumes", params(("volume" = Name, Path), UpdateQuery),
    responses((status = 202, description = "The job that copies what differs", body = Job), Refused))]
pub(super) async fn update_volume(
    State(context): State<Context>,
    path: PathText,
    query: QueryText<UpdateQuery>,
) -> Result<(StatusCode, Json<Job>), ApiError> {
    let (volume, options): (Name, UpdateQuery) = (path?.parse()?, query?.0);
    options.pacing().check()?;
    let job = context.call(move |service| service.update_volume(&volume, options)).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Makes an independent volume a disk; its guests stay connected.
#[utoipa::path(post, path = "/v1/volumes/{volume}/promote", tag = "volumes", params(("volume" = Name, Path)),
    responses((status = 200, description = "The disk that it is now", body = Disk), Refused))]
pub(super) async fn promote_volume(State(context): State<Context>, path: PathText) -> Reply<Disk> {
    let volume: Name = path?.parse()?;
    context.call(move |service| service.promote_volume(&volume)).await.map(Json)
}

/// Closes a volume's socket until it is enabled; its content is kept.
#[utoipa::path(post, path = "/v1/volumes/{volume}/disable", tag = "volumes", params(("volume" = Name, Path), ForceQuery),
    responses((status = 200, description = "The volume, which is not served", body = Volume), Refused))]
pub(super) async fn disable_volume(
    State(context): State<Context>,
    path: PathText,
    query: QueryText<ForceQuery>,
) -> Reply<Volume> {
    let (volume, force): (Name, bool) = (path?.parse()?, query?.force);
    context.call(move |service| service.disable_volume(&volume, force)).await.map(Json)
}

/// Serves a disabled volume again.
#[utoipa::path(post, path = "/v1/volumes/{volume}/enable", tag = "volumes", params(("volume" = Name, Path), EnableQuery),
    responses((status = 200, description = "The volume, whose socket is open", body = Volume), Refused))]
pub(super) async fn enable_volume(
    State(context): State<Context>,
    path: PathText,
    query: QueryText<EnableQuery>,
) -> Reply<Volume> {
    let (volume, fresh): (Name, bool) = (path?.parse()?, query?.fresh);
    context.call(move |service| service.enable_volume(&volume, fresh)).await.map(Json)
}
