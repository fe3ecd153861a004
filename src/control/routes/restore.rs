//! The route that takes a disk back to an older point in time.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::{Context, PathText, Refused};
use crate::control::api::{Job, RestoreDisk};
use crate::control::error::ApiError;
use crate::control::extract::JsonBody;
use crate::control::name::Name;

/// Takes a disk back to an older point in time. It shows that when this answers; the job copies what differs.
#[utoipa::path(post, path = "/v1/disks/{disk}/restore", tag = "disks", params(("disk" = Name, Path)),
    request_body = RestoreDisk,
    responses((status = 202, description = "The disk is restored; the job copies what differs", body = Job), Refused))]
pub(super) async fn restore_disk(
    State(context): State<Context>,
    path: PathText,
    JsonBody(body): JsonBody<RestoreDisk>,
) -> Result<(StatusCode, Json<Job>), ApiError> {
    let (disk, request): (Name, _) = (path?.parse()?, body.validate()?);
    let job = context.call(move |service| service.restore_disk(&disk, &request)).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}
