//! The routes that list things: cut down by what the query says, and in pages if it wants them.
//!
//! A list is always a plain array; that there is a next page, and where, says a `Link` header.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::{Context, QueryText, Refused};
use crate::control::api::{
    Bookmark, BookmarkList, Disk, DiskList, Job, JobList, ListQuery, Snapshot, SnapshotList, Volume, VolumeList,
};
use crate::control::error::ApiError;
use crate::control::service::Service;

/// Asks the service for a list, and answers what is wanted of it.
async fn answer<Q>(
    context: Context,
    uri: Uri,
    query: QueryText<Q>,
    list: impl FnOnce(&dyn Service) -> Result<Vec<Q::Item>, ApiError> + Send + 'static,
) -> Result<Response, ApiError>
where
    Q: ListQuery + Send + 'static,
    Q::Item: Serialize + Send + 'static,
{
    let Query(query) = query?;
    let select = move |service: &dyn Service| {
        let (items, more) = query.select(list(service)?)?;
        let next = items.last().filter(|_| more).map(|last| next_page(&uri, &Q::key_of(last).to_string()));
        Ok((next.map(|next| [(header::LINK, next)]), Json(items)).into_response())
    };
    context.call(select).await
}

/// The same list after the last item of this page. Keys have no character that a query could misunderstand.
fn next_page(uri: &Uri, last: &str) -> String {
    let pairs = uri.query().unwrap_or_default().split('&');
    let kept = pairs.filter(|pair| !pair.is_empty() && !pair.starts_with("after="));
    let query: Vec<_> = kept.map(str::to_owned).chain([format!("after={last}")]).collect();
    format!("<{}?{}>; rel=\"next\"", uri.path(), query.join("&"))
}

#[utoipa::path(get, path = "/v1/disks", tag = "disks", params(DiskList),
    responses((status = 200, description = "The disks, by name", body = [Disk],
        headers(("link" = Option<String>, description = "The next page, if there is one"))), Refused))]
pub(super) async fn list_disks(
    State(context): State<Context>,
    uri: Uri,
    query: QueryText<DiskList>,
) -> Result<Response, ApiError> {
    answer(context, uri, query, |service| service.list_disks()).await
}

#[utoipa::path(get, path = "/v1/snapshots", tag = "snapshots", params(SnapshotList),
    responses((status = 200, description = "The snapshots: by disk and age; in pages, by disk and name", body = [Snapshot],
        headers(("link" = Option<String>, description = "The next page, if there is one"))), Refused))]
pub(super) async fn list_snapshots(
    State(context): State<Context>,
    uri: Uri,
    query: QueryText<SnapshotList>,
) -> Result<Response, ApiError> {
    answer(context, uri, query, |service| service.list_snapshots()).await
}

#[utoipa::path(get, path = "/v1/volumes", tag = "volumes", params(VolumeList),
    responses((status = 200, description = "The volumes, by name", body = [Volume],
        headers(("link" = Option<String>, description = "The next page, if there is one"))), Refused))]
pub(super) async fn list_volumes(
    State(context): State<Context>,
    uri: Uri,
    query: QueryText<VolumeList>,
) -> Result<Response, ApiError> {
    answer(context, uri, query, |service| service.list_volumes()).await
}

#[utoipa::path(get, path = "/v1/bookmarks", tag = "bookmarks", params(BookmarkList),
    responses((status = 200, description = "The bookmarks: by disk and age; in pages, by disk and name", body = [Bookmark],
        headers(("link" = Option<String>, description = "The next page, if there is one"))), Refused))]
pub(super) async fn list_bookmarks(
    State(context): State<Context>,
    uri: Uri,
    query: QueryText<BookmarkList>,
) -> Result<Response, ApiError> {
    answer(context, uri, query, |service| service.list_bookmarks()).await
}

#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", params(JobList),
    responses((status = 200, description = "The jobs, by number", body = [Job],
        headers(("link" = Option<String>, description = "The next page, if there is one"))), Refused))]
pub(super) async fn list_jobs(
    State(context): State<Context>,
    uri: Uri,
    query: QueryText<JobList>,
) -> Result<Response, ApiError> {
    answer(context, uri, query, |service| service.list_jobs()).await
}
