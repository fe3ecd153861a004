//! The route that deletes all snapshots of one cut.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;

use super::{Context, QueryText, Refused};
use crate::control::api::{DeleteGroupOptions, DeletionState, GroupDeletion};
use crate::control::error::ApiError;

/// Deletes all snapshots of one cut, or none of them if one of them cannot be deleted.
#[utoipa::path(delete, path = "/v1/snapshots", tag = "snapshots", params(DeleteGroupOptions),
    responses((status = 200, description = "All of them are gone", body = [GroupDeletion]),
        (status = 202, description = "Some of them are not gone yet, or were refused after others were begun",
            body = [GroupDeletion]), Refused))]
pub(super) async fn delete_group(
    State(context): State<Context>,
    options: QueryText<DeleteGroupOptions>,
) -> Result<(StatusCode, Json<Vec<GroupDeletion>>), ApiError> {
    let Query(options) = options?;
    let done = context.call(move |service| service.delete_group(options.group, options.of_each())).await?;
    let all_gone = done.iter().all(|each| each.state == DeletionState::Deleted);
    Ok((if all_gone { StatusCode::OK } else { StatusCode::ACCEPTED }, Json(done)))
}
