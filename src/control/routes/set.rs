//! Routes of disks and volumes that are there: what of them is set anew, and how one that is not served is forgotten.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::{Context, PathText, Refused, Reply};
use crate::control::api::{Disk, DiskPatch, RenameRequest, ResizeRequest, Volume};
use crate::control::error::ApiError;
use crate::control::extract::JsonBody;
use crate::control::name::Name;

/// Changes how a disk is served, and remembers it: `durability` and `layout` count for the next snapshots, `background_bytes` at once,
/// `queues`, `readonly` and `serial` for the next frontend that connects.
#[utoipa::path(patch, path = "/v1/disks/{disk}", tag = "disks", params(("disk" = Name, Path)), request_body = DiskPatch,
    responses((status = 200, description = "The disk as it is set now", body = Disk), Refused))]
pub(super) async fn set_disk(
    State(context): State<Context>,
    path: PathText,
    JsonBody(patch): JsonBody<DiskPatch>,
) -> Reply<Disk> {
    let disk: Name = path?.parse()?;
    patch.check_change()?;
    context.call(move |service| service.set_disk(&disk, &patch)).await.map(Json)
}

/// Changes how a volume is served, and remembers it; as that of disks, without `readonly`.
#[utoipa::path(patch, path = "/v1/volumes/{volume}", tag = "volumes", params(("volume" = Name, Path)),
    request_body = DiskPatch,
    responses((status = 200, description = "The volume as it is set now", body = Volume), Refused))]
pub(super) async fn set_volume(
    State(context): State<Context>,
    path: PathText,
    JsonBody(patch): JsonBody<DiskPatch>,
) -> Reply<Volume> {
    let volume: Name = path?.parse()?;
    patch.check_change()?;
    context.call(move |service| service.set_volume(&volume, &patch)).await.map(Json)
}

/// Gives a disk another name; its snapshots, bookmarks, volumes, jobs and guests stay with it.
#[utoipa::path(post, path = "/v1/disks/{disk}/rename", tag = "disks", params(("disk" = Name, Path)),
    request_body = RenameRequest,
    responses((status = 200, description = "The disk under its new name", body = Disk), Refused))]
pub(super) async fn rename_disk(
    State(context): State<Context>,
    path: PathText,
    JsonBody(request): JsonBody<RenameRequest>,
) -> Reply<Disk> {
    let (disk, to): (Name, Name) = (path?.parse()?, request.validate()?);
    context.call(move |service| service.rename_disk(&disk, &to, request.force)).await.map(Json)
}

/// Makes a disk larger under its guest, which is told. Its image grows with it, but for a block device, which has to have that
/// size already; snapshots and bookmarks keep theirs. The size that it has changes nothing.
#[utoipa::path(put, path = "/v1/disks/{disk}/size", tag = "disks", params(("disk" = Name, Path)),
    request_body = ResizeRequest,
    responses((status = 200, description = "The disk with its new size", body = Disk), Refused))]
pub(super) async fn resize_disk(
    State(context): State<Context>,
    path: PathText,
    JsonBody(request): JsonBody<ResizeRequest>,
) -> Reply<Disk> {
    let (disk, size_bytes): (Name, u64) = (path?.parse()?, request.validate()?);
    context.call(move |service| service.resize_disk(&disk, size_bytes)).await.map(Json)
}

/// Gives a volume another name; its snapshots, bookmarks, volumes, jobs and guests stay with it.
#[utoipa::path(post, path = "/v1/volumes/{volume}/rename", tag = "volumes", params(("volume" = Name, Path)),
    request_body = RenameRequest,
    responses((status = 200, description = "The volume under its new name", body = Volume), Refused))]
pub(super) async fn rename_volume(
    State(context): State<Context>,
    path: PathText,
    JsonBody(request): JsonBody<RenameRequest>,
) -> Reply<Volume> {
    let (volume, to): (Name, Name) = (path?.parse()?, request.validate()?);
    context.call(move |service| service.rename_volume(&volume, &to, request.force)).await.map(Json)
}

/// Forgets a disk or volume that is not served, and all that is remembered of it. A disk's own image stays.
#[utoipa::path(post, path = "/v1/disks/{disk}/forget", tag = "disks", params(("disk" = Name, Path)),
    responses((status = 204, description = "Nothing is remembered of it"), Refused))]
pub(super) async fn forget_disk(State(context): State<Context>, path: PathText) -> Result<StatusCode, ApiError> {
    let disk: Name = path?.parse()?;
    context.call(move |service| service.forget_disk(&disk)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Serves a disk or volume that is not served because other images are where its own were: they are copies of those.
#[utoipa::path(post, path = "/v1/disks/{disk}/accept", tag = "disks", params(("disk" = Name, Path)),
    responses((status = 204, description = "It is served with the images that are there"), Refused))]
pub(super) async fn accept_disk(State(context): State<Context>, path: PathText) -> Result<StatusCode, ApiError> {
    let disk: Name = path?.parse()?;
    context.call(move |service| service.accept_disk(&disk)).await?;
    Ok(StatusCode::NO_CONTENT)
}
