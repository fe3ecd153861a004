//! The routes of changes: what differs between two moments, maps of volumes, bookmarks.
//!
//! A list may have a range for every other block of a huge disk, so it is never held in memory: pieces of it are made
//! when the client has taken the one before, on a thread that may block.

use std::io;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use uuid::Uuid;

use super::api::{Bookmark, ByteRange, DiffQuery, DiffSource, VolumeMap, VolumeStatus};
use super::error::{ApiError, ErrorCode};
use super::name::{Name, SnapshotRef};
use super::routes::{Context, PathText, QueryText, Refused, Reply};
use super::service::Service;

/// Says what a list of differences goes by ([`DiffSource`]).
pub const DIFF_SOURCE: &str = "halfsilver-diff-source";
/// About how much of a list is made at once.
const PIECE_BYTES: usize = 64 << 10;

/// Runs of something, in order, that are found when they are asked for.
pub type Runs<T> = Box<dyn Iterator<Item = T> + Send>;

/// What differs between two moments.
pub struct Diff {
    /// What it goes by.
    pub source: DiffSource,
    /// In ascending order; no two of them touch.
    pub ranges: Runs<ByteRange>,
}

/// A [`VolumeMap`] whose lists are still to be found.
pub struct FoundMap {
    /// All but the lists.
    pub head: VolumeMap,
    /// The blocks that are the volume's own: first, and how many.
    pub owned: Runs<(u64, u64)>,
    /// Those that were written, if that is known.
    pub changed: Option<Runs<(u64, u64)>>,
}

/// Pieces of text that are one JSON document, a range a line.
type Text = Box<dyn Iterator<Item = String> + Send>;

fn list(items: impl Iterator<Item = String> + Send + 'static) -> Text {
    let mut items = items.peekable();
    if items.peek().is_none() {
        return Box::new(std::iter::once("[]".to_owned()));
    }
    let mut is_first = true;
    let lines = items.map(move |item| if std::mem::take(&mut is_first) { item } else { format!(",\n{item}") });
    Box::new(std::iter::once("[\n".to_owned()).chain(lines).chain(std::iter::once("\n]".to_owned())))
}

fn text_of_diff(ranges: Runs<ByteRange>) -> Text {
    let line = |ByteRange { offset, length }| format!(r#"{{"offset":{offset},"length":{length}}}"#);
    Box::new(list(ranges.map(line)).chain(std::iter::once("\n".to_owned())))
}

fn json(value: &impl Serialize) -> Result<String, ApiError> {
    serde_json::to_string(value).map_err(|e| ApiError::new(ErrorCode::Internal, e.to_string()))
}

fn text_of_map(map: FoundMap) -> Result<Text, ApiError> {
    let run = |(first, count): (u64, u64)| format!("[{first},{count}]");
    let VolumeMap { name, block_size, blocks, size_bytes, reason, .. } = &map.head;
    let head = format!(
        "{{\"name\":{},\"block_size\":{block_size},\"blocks\":{blocks},\"size_bytes\":{size_bytes},\"reason\":{},\n\"owned\":",
        json(name)?,
        json(reason)?
    );
    let changed =
        map.changed.map_or_else(|| Box::new(std::iter::once("null".to_owned())) as Text, |c| list(c.map(run)));
    let once = |text: &str| std::iter::once(text.to_owned());
    Ok(Box::new(
        std::iter::once(head)
            .chain(list(map.owned.map(run)))
            .chain(once(",\n\"changed\":"))
            .chain(changed)
            .chain(once("}\n")),
    ))
}

/// An answer that is made while it is sent.
fn stream(text: Text) -> Body {
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(1);
    tokio::spawn(async move {
        let mut text = text;
        loop {
            let made = tokio::task::spawn_blocking(move || {
                let mut piece = String::new();
                let mut is_last = false;
                while piece.len() < PIECE_BYTES && !is_last {
                    match text.next() {
                        Some(more) => piece.push_str(&more),
                        None => is_last = true,
                    }
                }
                (piece, is_last, text)
            });
            let (piece, is_last, rest) = match made.await {
                Ok(made) => made,
                Err(error) => {
                    // The client must not take what it has got for all of it.
                    let broken = sender.send(Err(io::Error::other(error))).await;
                    return drop(broken);
                }
            };
            // A client that has left wants no more.
            if sender.send(Ok(piece.into())).await.is_err() || is_last {
                return;
            }
            text = rest;
        }
    });
    Body::from_stream(ReceiverStream::new(receiver))
}

fn answer(diff: Diff) -> Response {
    let headers = [(header::CONTENT_TYPE.as_str(), "application/json"), (DIFF_SOURCE, diff.source.as_str())];
    (headers, stream(text_of_diff(diff.ranges))).into_response()
}

/// A snapshot or bookmark by its name or its id.
pub(super) fn moment(service: &dyn Service, text: &str) -> Result<SnapshotRef, ApiError> {
    match text.parse::<Uuid>() {
        Ok(id) => service.moment_of_id(id),
        Err(_) => Ok(text.parse()?),
    }
}

/// Lists what differs between a snapshot or bookmark and a later one, or the present.
#[utoipa::path(get, path = "/v1/snapshots/{snapshot}/diff", tag = "snapshots",
    params(("snapshot" = String, Path, description = "disk@name, or an id", example = "vm1@daily"), DiffQuery),
    responses((status = 200, description = "Ranges of bytes that may differ, in order; all others are equal. The header \
        halfsilver-diff-source says what this goes by.", body = [ByteRange]), Refused))]
pub(super) async fn diff_snapshot(
    State(context): State<Context>,
    path: PathText,
    query: QueryText<DiffQuery>,
) -> Result<Response, ApiError> {
    let (from, Query(DiffQuery { to })) = (path?.0, query?);
    let work = move |service: &dyn Service| {
        let from = moment(service, &from)?;
        let to = to.map(|to| moment(service, &to)).transpose()?;
        service.diff_snapshot(&from, to.as_ref())
    };
    context.call(work).await.map(answer)
}

/// Lists what differs between a volume as it was made and a snapshot of it, or its present.
#[utoipa::path(get, path = "/v1/volumes/{volume}/diff", tag = "volumes", params(("volume" = Name, Path), DiffQuery),
    responses((status = 200, description = "Ranges of bytes that may differ, in order; all others are equal. The header \
        halfsilver-diff-source says what this goes by.", body = [ByteRange]), Refused))]
pub(super) async fn diff_volume(
    State(context): State<Context>,
    path: PathText,
    query: QueryText<DiffQuery>,
) -> Result<Response, ApiError> {
    let (volume, Query(DiffQuery { to })): (Name, _) = (path?.parse()?, query?);
    let work = move |service: &dyn Service| {
        let to = to.map(|to| moment(service, &to)).transpose()?;
        service.diff_volume(&volume, to.as_ref())
    };
    context.call(work).await.map(answer)
}

/// Lists which blocks of a volume are its own, and which were written.
#[utoipa::path(get, path = "/v1/volumes/{volume}/map", tag = "volumes", params(("volume" = Name, Path)),
    responses((status = 200, description = "Runs of blocks", body = VolumeMap), Refused))]
pub(super) async fn map_volume(State(context): State<Context>, path: PathText) -> Result<Response, ApiError> {
    let volume: Name = path?.parse()?;
    let text = context.call(move |service| text_of_map(service.map_volume(&volume)?)).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], stream(text)).into_response())
}

/// Says how much of a volume is its own, and how far it is from its source.
#[utoipa::path(get, path = "/v1/volumes/{volume}/status", tag = "volumes", params(("volume" = Name, Path)),
    responses((status = 200, description = "Counts and percentages", body = VolumeStatus), Refused))]
pub(super) async fn volume_status(State(context): State<Context>, path: PathText) -> Reply<VolumeStatus> {
    let volume: Name = path?.parse()?;
    context.call(move |service| service.volume_status(&volume)).await.map(Json)
}

#[utoipa::path(get, path = "/v1/bookmarks/{bookmark}", tag = "bookmarks",
    params(("bookmark" = String, Path, description = "disk@name, or an id", example = "vm1@daily")),
    responses((status = 200, description = "The bookmark", body = Bookmark), Refused))]
pub(super) async fn get_bookmark(State(context): State<Context>, path: PathText) -> Reply<Bookmark> {
    let bookmark = path?.0;
    let get = move |service: &dyn Service| {
        let found = moment(service, &bookmark).map_err(|error| match error.code {
            ErrorCode::SnapshotNotFound => {
                ApiError::new(ErrorCode::BookmarkNotFound, format!("there is no bookmark {bookmark}"))
            }
            _ => error,
        });
        service.get_bookmark(&found?)
    };
    context.call(get).await.map(Json)
}

/// Forgets a bookmark. Changes since older ones are still known.
#[utoipa::path(delete, path = "/v1/bookmarks/{bookmark}", tag = "bookmarks",
    params(("bookmark" = String, Path, description = "disk@name", example = "vm1@daily")),
    responses((status = 204, description = "It is gone"), Refused))]
pub(super) async fn delete_bookmark(State(context): State<Context>, path: PathText) -> Result<StatusCode, ApiError> {
    let bookmark: SnapshotRef = path?.parse()?;
    context.call(move |service| service.delete_bookmark(&bookmark)).await?;
    Ok(StatusCode::NO_CONTENT)
}
