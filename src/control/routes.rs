//! The routes: each checks its input, calls the service on a thread that may block, and answers.
//!
//! No state is kept between requests and no policy is made here. Whatever `router` serves, the OpenAPI document at the
//! end of this file describes; a test holds the two against each other.

mod group;
mod lists;
mod restore;
mod set;
mod volume;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use utoipa::{IntoResponses, OpenApi};

use super::api::{
    CreateSnapshots, CreateVolume, CutoverQuery, DeleteQuery, DeleteSnapshotOptions, Disk, DiskConfig, Glob, Job,
    JobPatch, LegQuery, LegState, MirrorRequest, Snapshot, SnapshotState, Status, VersionInfo, Volume,
};
use super::changes;
use super::error::{ApiError, ErrorCode, Problem};
use super::event::{Event, Subscription};
use super::extract::JsonBody;
use super::metrics::OPENMETRICS_TEXT;
use super::name::{Name, SnapshotRef};
use super::service::{Deletion, JobDeletion, PutOutcome, Service};
use super::stop::Stop;
use super::strict::refuse_unknown;
use super::timestamp::Timestamp;

/// How often a silent event stream shows that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How often a waiting request looks again even if no event tells it to.
const RECHECK: Duration = Duration::from_millis(500);

/// How many commands may be under way: one more is refused, since it would wait for what the others wait for.
pub(super) const COMMANDS_MAX: usize = 256;

/// What every handler may use.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) service: Arc<dyn Service>,
    pub(super) started_at: Timestamp,
    pub(super) stop: Stop,
}

impl Context {
    /// Calls the service where blocking is allowed.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Service) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let service = Arc::clone(&self.service);
        let panicked = |_| ApiError::new(ErrorCode::Internal, "the request stopped halfway");
        tokio::task::spawn_blocking(move || work(&*service)).await.map_err(panicked)?
    }
}

pub(super) type Reply<T> = Result<Json<T>, ApiError>;
pub(super) type PathText = Result<Path<String>, PathRejection>;
pub(super) type QueryText<T> = Result<Query<T>, QueryRejection>;

/// Everything that the control socket answers.
pub(super) fn router(context: Context) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/status", get(status))
        .route("/v1/disks", get(lists::list_disks))
        .route("/v1/disks/{disk}", get(get_disk).put(put_disk).patch(set::set_disk).delete(delete_disk))
        .route("/v1/disks/{disk}/mirror", post(mirror_disk).delete(unmirror_disk))
        .route("/v1/disks/{disk}/restore", post(restore::restore_disk))
        .route("/v1/disks/{disk}/size", put(set::resize_disk))
        .route("/v1/disks/{disk}/rename", post(set::rename_disk))
        .route("/v1/disks/{disk}/forget", post(set::forget_disk))
        .route("/v1/disks/{disk}/accept", post(set::accept_disk))
        .route("/v1/snapshots", get(lists::list_snapshots).post(create_snapshots).delete(group::delete_group))
        .route("/v1/snapshots/{snapshot}", get(get_snapshot).delete(delete_snapshot))
        .route("/v1/snapshots/{snapshot}/cutover", post(cut_over_snapshot))
        .route("/v1/snapshots/{snapshot}/diff", get(changes::diff_snapshot))
        .route("/v1/bookmarks", get(lists::list_bookmarks))
        .route("/v1/bookmarks/{bookmark}", get(changes::get_bookmark).delete(changes::delete_bookmark))
        .route("/v1/volumes", get(lists::list_volumes).post(create_volume))
        .route("/v1/volumes/{volume}", get(get_volume).patch(set::set_volume).delete(delete_volume))
        .route("/v1/volumes/{volume}/diff", get(changes::diff_volume))
        .route("/v1/volumes/{volume}/map", get(changes::map_volume))
        .route("/v1/volumes/{volume}/status", get(changes::volume_status))
        .route("/v1/volumes/{volume}/rename", post(set::rename_volume))
        .route("/v1/volumes/{volume}/complete", post(volume::complete_volume))
        .route("/v1/volumes/{volume}/update", post(volume::update_volume))
        .route("/v1/volumes/{volume}/promote", post(volume::promote_volume))
        .route("/v1/volumes/{volume}/disable", post(volume::disable_volume))
        .route("/v1/volumes/{volume}/enable", post(volume::enable_volume))
        .route("/v1/jobs", get(lists::list_jobs))
        .route("/v1/jobs/{id}", get(get_job).patch(patch_job).delete(delete_job))
        .route("/v1/jobs/{id}/resume", post(resume_job))
        .route("/v1/events", get(events))
        .route("/v1/openapi.json", get(openapi))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn(refuse_unknown))
        .layer(middleware::from_fn_with_state(Arc::new(Semaphore::new(COMMANDS_MAX)), bound_commands))
        .layer(middleware::from_fn(log_request))
        .with_state(context)
}

/// Refuses a command when too many are under way. Reading is always allowed.
async fn bound_commands(State(places): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    if request.method().is_safe() {
        return next.run(request).await;
    }
    match places.try_acquire() {
        Ok(_place) => next.run(request).await,
        Err(_) => {
            let message = format!("{COMMANDS_MAX} commands are under way and do not end");
            let error = ApiError::new(ErrorCode::Unavailable, message);
            error.with_action("see what they wait for: halfsilver status").into_response()
        }
    }
}

/// Leaves a line in the log for whatever may have changed something.
async fn log_request(request: Request, next: Next) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let level = if method.is_safe() { log::Level::Debug } else { log::Level::Info };
    let response = next.run(request).await;
    log::log!(level, "control: {method} {uri} answered {}", response.status().as_u16());
    response
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is nothing at {}", uri.path()))
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(ErrorCode::MethodNotAllowed, format!("{method} is not a method of {}", uri.path()))
}

/// The answer to everything that is refused or fails.
#[derive(IntoResponses)]
#[response(status = "default", description = "Refused or failed", content_type = "application/problem+json")]
pub(super) struct Refused(#[allow(dead_code, reason = "only its schema is used")] Problem);

#[utoipa::path(get, path = "/v1/version", tag = "daemon",
    responses((status = 200, description = "What is running", body = VersionInfo), Refused))]
async fn version(State(context): State<Context>) -> Reply<VersionInfo> {
    context.call(|service| Ok(service.version())).await.map(Json)
}

#[utoipa::path(get, path = "/v1/status", tag = "daemon",
    responses((status = 200, description = "Everything at a glance", body = Status), Refused))]
async fn status(State(context): State<Context>) -> Reply<Status> {
    let started_at = context.started_at;
    let work = move |service: &dyn Service| {
        Ok(Status {
            state: "serving".to_owned(),
            version: service.version(),
            pid: std::process::id(),
            started_at,
            disks: service.list_disks()?,
            snapshots: service.list_snapshots()?,
            volumes: service.list_volumes()?,
            jobs: service.list_jobs()?,
            claims: service.list_claims()?,
            unserved: service.list_unserved()?,
            problems: service.problems(),
        })
    };
    context.call(work).await.map(Json)
}

#[utoipa::path(get, path = "/v1/disks/{disk}", tag = "disks", params(("disk" = Name, Path)),
    responses((status = 200, description = "The disk", body = Disk), Refused))]
async fn get_disk(State(context): State<Context>, path: PathText) -> Reply<Disk> {
    let disk: Name = path?.parse()?;
    context.call(move |service| service.get_disk(&disk)).await.map(Json)
}

/// Serves a disk; the same configuration twice is no error.
#[utoipa::path(put, path = "/v1/disks/{disk}", tag = "disks", params(("disk" = Name, Path)), request_body = DiskConfig,
    responses((status = 200, description = "It was served already, configured the same", body = Disk),
        (status = 201, description = "It is served now", body = Disk), Refused))]
async fn put_disk(
    State(context): State<Context>,
    path: PathText,
    JsonBody(config): JsonBody<DiskConfig>,
) -> Result<(StatusCode, Json<Disk>), ApiError> {
    let disk: Name = path?.parse()?;
    config.check()?;
    match context.call(move |service| service.put_disk(&disk, &config)).await? {
        PutOutcome::Created(disk) => Ok((StatusCode::CREATED, Json(disk))),
        PutOutcome::Unchanged(disk) => Ok((StatusCode::OK, Json(disk))),
    }
}

/// Stops serving a disk, or forgets one that is not served; its image stays.
#[utoipa::path(delete, path = "/v1/disks/{disk}", tag = "disks", params(("disk" = Name, Path), DeleteQuery),
    responses((status = 204, description = "It is no longer served"), Refused))]
async fn delete_disk(
    State(context): State<Context>,
    path: PathText,
    options: QueryText<DeleteQuery>,
) -> Result<StatusCode, ApiError> {
    let (disk, force): (Name, bool) = (path?.parse()?, options?.force);
    context.call(move |service| service.delete_disk(&disk, force)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a disk a second leg, or replaces the failed one, and starts to synchronise it.
#[utoipa::path(post, path = "/v1/disks/{disk}/mirror", tag = "disks", params(("disk" = Name, Path)),
    request_body = MirrorRequest,
    responses((status = 200, description = "It is a leg of the disk already, and in sync", body = Disk),
        (status = 202, description = "It is being synchronised; see the leg's state and the job", body = Disk), Refused))]
async fn mirror_disk(
    State(context): State<Context>,
    path: PathText,
    JsonBody(body): JsonBody<MirrorRequest>,
) -> Result<(StatusCode, Json<Disk>), ApiError> {
    let disk: Name = path?.parse()?;
    body.check()?;
    let work = move |service: &dyn Service| {
        let disk = service.mirror_disk(&disk, &body.path)?;
        let in_sync = disk.legs.iter().any(|leg| leg.path == body.path && leg.state == LegState::InSync);
        Ok((if in_sync { StatusCode::OK } else { StatusCode::ACCEPTED }, Json(disk)))
    };
    context.call(work).await
}

/// Lets a leg of a disk go; its file stays as a plain raw image.
#[utoipa::path(delete, path = "/v1/disks/{disk}/mirror", tag = "disks", params(("disk" = Name, Path), LegQuery),
    responses((status = 200, description = "The disk without that leg", body = Disk), Refused))]
async fn unmirror_disk(State(context): State<Context>, path: PathText, query: QueryText<LegQuery>) -> Reply<Disk> {
    let (disk, Query(query)): (Name, _) = (path?.parse()?, query?);
    query.check()?;
    context.call(move |service| service.unmirror_disk(&disk, query.leg.as_deref())).await.map(Json)
}

/// Takes one cut through any number of disks.
#[utoipa::path(post, path = "/v1/snapshots", tag = "snapshots", request_body = CreateSnapshots,
    responses((status = 201, description = "One snapshot a disk, in the order of the request", body = [Snapshot]),
        Refused))]
async fn create_snapshots(
    State(context): State<Context>,
    JsonBody(body): JsonBody<CreateSnapshots>,
) -> Result<(StatusCode, Json<Vec<Snapshot>>), ApiError> {
    let (request, patience) = (body.validate()?, body.wait_timeout_ms.map(Duration::from_millis));
    // Listening begins before the cut, so that no event falls between the two.
    let events = context.service.events().subscribe();
    let mut snapshots = context.call(move |service| service.create_snapshots(&request)).await?;
    if body.wait {
        snapshots = drained(&context, snapshots, events, patience).await?;
    }
    Ok((StatusCode::CREATED, Json(snapshots)))
}

/// Waits until none of the snapshots is draining, or for so long.
async fn drained(
    context: &Context,
    mut snapshots: Vec<Snapshot>,
    mut events: Subscription,
    patience: Option<Duration>,
) -> Result<Vec<Snapshot>, ApiError> {
    let mut stop = context.stop.clone();
    let asked = Instant::now();
    while snapshots.iter().any(|snapshot| snapshot.state == SnapshotState::Draining) {
        let left = patience.map(|patience| patience.saturating_sub(asked.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            break;
        }
        tokio::select! {
            Some(_) = events.next() => {}
            () = tokio::time::sleep(left.map_or(RECHECK, |left| left.min(RECHECK))) => {}
            () = stop.wait() => {
                return Err(ApiError::new(ErrorCode::Unavailable, "the daemon stops; the snapshot may still drain"));
            }
        }
        let refresh = move |service: &dyn Service| {
            for snapshot in snapshots.iter_mut().filter(|snapshot| snapshot.state == SnapshotState::Draining) {
                let reference = snapshot.reference();
                let latest = service.get_snapshot(&reference)?;
                if latest.id != snapshot.id {
                    return Err(ApiError::snapshot_not_found(reference));
                }
                *snapshot = latest;
            }
            Ok(snapshots)
        };
        snapshots = context.call(refresh).await?;
    }
    Ok(snapshots)
}

#[utoipa::path(get, path = "/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "disk@name, or an id", example = "vm1@daily")),
    responses((status = 200, description = "The snapshot", body = Snapshot), Refused))]
async fn get_snapshot(State(context): State<Context>, path: PathText) -> Reply<Snapshot> {
    let snapshot = path?.0;
    context.call(move |service| service.get_snapshot(&changes::moment(service, &snapshot)?)).await.map(Json)
}

/// Moves the frontends that still write the snapshot (VLUN A) over to the live version (VLUN B).
#[utoipa::path(post, path = "/v1/snapshots/{snapshot}/cutover", tag = "snapshots",
    params(("snapshot" = String, Path, description = "disk@name", example = "vm1@daily"), CutoverQuery),
    responses((status = 200, description = "The snapshot; none of them writes it any more", body = Snapshot), Refused))]
async fn cut_over_snapshot(
    State(context): State<Context>,
    path: PathText,
    query: QueryText<CutoverQuery>,
) -> Reply<Snapshot> {
    let (snapshot, Query(query)): (SnapshotRef, _) = (path?.parse()?, query?);
    query.check()?;
    let events = context.service.events().subscribe();
    let mut snapshots = vec![context.call(move |service| service.cut_over_snapshot(&snapshot)).await?];
    if query.wait {
        let patience = query.wait_timeout_ms.map(Duration::from_millis);
        snapshots = drained(&context, snapshots, events, patience).await?;
    }
    Ok(Json(snapshots.remove(0)))
}

/// Removes a snapshot, or starts to.
#[utoipa::path(delete, path = "/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "disk@name", example = "vm1@daily"), DeleteSnapshotOptions),
    responses((status = 202, description = "It is being removed, and gone when GET answers 404", body = Snapshot),
        (status = 204, description = "It is gone"), Refused))]
async fn delete_snapshot(
    State(context): State<Context>,
    path: PathText,
    options: QueryText<DeleteSnapshotOptions>,
) -> Result<Response, ApiError> {
    let (snapshot, Query(options)): (SnapshotRef, _) = (path?.parse()?, options?);
    Ok(match context.call(move |service| service.delete_snapshot(&snapshot, options)).await? {
        Deletion::Done => StatusCode::NO_CONTENT.into_response(),
        Deletion::Started(snapshot) => (StatusCode::ACCEPTED, Json(snapshot)).into_response(),
    })
}

/// Makes a volume: a writable branch off a snapshot.
#[utoipa::path(post, path = "/v1/volumes", tag = "volumes", request_body = CreateVolume,
    responses((status = 201, description = "The volume, whose socket is open", body = Volume), Refused))]
async fn create_volume(
    State(context): State<Context>,
    JsonBody(body): JsonBody<CreateVolume>,
) -> Result<(StatusCode, Json<Volume>), ApiError> {
    let request = body.validate()?;
    let volume = context.call(move |service| service.create_volume(&request)).await?;
    Ok((StatusCode::CREATED, Json(volume)))
}

#[utoipa::path(get, path = "/v1/volumes/{volume}", tag = "volumes", params(("volume" = Name, Path)),
    responses((status = 200, description = "The volume", body = Volume), Refused))]
async fn get_volume(State(context): State<Context>, path: PathText) -> Reply<Volume> {
    let volume: Name = path?.parse()?;
    context.call(move |service| service.get_volume(&volume)).await.map(Json)
}

/// Deletes a volume and what was written to it; its snapshot stays.
#[utoipa::path(delete, path = "/v1/volumes/{volume}", tag = "volumes", params(("volume" = Name, Path), DeleteQuery),
    responses((status = 204, description = "It is gone"), Refused))]
async fn delete_volume(
    State(context): State<Context>,
    path: PathText,
    options: QueryText<DeleteQuery>,
) -> Result<StatusCode, ApiError> {
    let (volume, force): (Name, bool) = (path?.parse()?, options?.force);
    context.call(move |service| service.delete_volume(&volume, force)).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = u64, Path)),
    responses((status = 200, description = "The job", body = Job), Refused))]
async fn get_job(State(context): State<Context>, path: PathText) -> Reply<Job> {
    let id = job_id(path)?;
    context.call(move |service| service.get_job(id)).await.map(Json)
}

/// Changes the pace of a job.
#[utoipa::path(patch, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = u64, Path)), request_body = JobPatch,
    responses((status = 200, description = "The job as it is now", body = Job), Refused))]
async fn patch_job(State(context): State<Context>, path: PathText, JsonBody(patch): JsonBody<JobPatch>) -> Reply<Job> {
    let id = job_id(path)?;
    patch.check_change()?;
    context.call(move |service| service.patch_job(id, patch)).await.map(Json)
}

/// Stops a running job between two blocks; forgets one that has ended.
#[utoipa::path(delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = u64, Path)),
    responses((status = 200, description = "It ran, is stopped and can be resumed", body = Job),
        (status = 204, description = "It had ended and is no longer listed"), Refused))]
async fn delete_job(State(context): State<Context>, path: PathText) -> Result<Response, ApiError> {
    let id = job_id(path)?;
    Ok(match context.call(move |service| service.delete_job(id)).await? {
        JobDeletion::Stopped(job) => Json(job).into_response(),
        JobDeletion::Removed => StatusCode::NO_CONTENT.into_response(),
    })
}

/// Goes on with a stopped job.
#[utoipa::path(post, path = "/v1/jobs/{id}/resume", tag = "jobs", params(("id" = u64, Path)),
    responses((status = 200, description = "The job, which runs", body = Job), Refused))]
async fn resume_job(State(context): State<Context>, path: PathText) -> Reply<Job> {
    let id = job_id(path)?;
    context.call(move |service| service.resume_job(id)).await.map(Json)
}

fn job_id(path: PathText) -> Result<u64, ApiError> {
    let Path(text) = path?;
    text.parse().map_err(|_| ApiError::job_not_found(text))
}

/// Follows what happens from now on, as server-sent events.
#[utoipa::path(get, path = "/v1/events", tag = "daemon",
    responses((status = 200, description = "A stream: the `event` of each is the kind, the `id` its number, the `data` \
        this JSON", body = Event, content_type = "text/event-stream"), Refused))]
async fn events(State(context): State<Context>) -> impl IntoResponse {
    let subscription = context.service.events().subscribe();
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(forward(subscription, sender, context.stop));
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

/// Carries events to one client until it leaves or the server stops.
async fn forward(mut subscription: Subscription, client: mpsc::Sender<Result<SseEvent, Infallible>>, mut stop: Stop) {
    // A first line at once, so that the client knows that it is listening.
    let mut message = SseEvent::default().comment("listening");
    let stopped = stop.wait();
    tokio::pin!(stopped);
    loop {
        tokio::select! {
            sent = client.send(Ok(message)) => if sent.is_err() { return },
            () = &mut stopped => return,
        }
        let event = tokio::select! {
            event = subscription.next() => event,
            () = client.closed() => return,
            () = &mut stopped => return,
        };
        let Some(event) = event else { return };
        let named = SseEvent::default().id(event.seq.to_string()).event(event.event.as_str());
        message = match named.json_data(&event) {
            Ok(message) => message,
            Err(error) => return log::error!("event {} has no JSON: {error}", event.seq),
        };
    }
}

/// All counters, as OpenMetrics text.
#[utoipa::path(get, path = "/metrics", tag = "daemon",
    responses((status = 200, description = "OpenMetrics text for Prometheus", body = String,
        content_type = "application/openmetrics-text"), Refused))]
async fn metrics(State(context): State<Context>) -> Result<impl IntoResponse, ApiError> {
    let unencodable = |error| ApiError::new(ErrorCode::Internal, format!("the counters cannot be encoded: {error}"));
    let text = context.call(move |service| service.metrics().encode().map_err(unencodable)).await?;
    Ok(([(header::CONTENT_TYPE, OPENMETRICS_TEXT)], text))
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "daemon",
    responses((status = 200, description = "This document", body = Object), Refused))]
async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}

/// What describes all routes.
pub(super) fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

#[derive(OpenApi)]
#[openapi(
    info(title = "halfsilver control API", description = "HTTP/1.1 on a Unix socket. Errors are RFC 9457 problems."),
    paths(
        version,
        status,
        lists::list_disks,
        get_disk,
        put_disk,
        set::set_disk,
        delete_disk,
        set::forget_disk,
        set::accept_disk,
        set::rename_disk,
        set::resize_disk,
        mirror_disk,
        unmirror_disk,
        restore::restore_disk,
        lists::list_snapshots,
        create_snapshots,
        group::delete_group,
        get_snapshot,
        cut_over_snapshot,
        delete_snapshot,
        lists::list_volumes,
        create_volume,
        get_volume,
        set::set_volume,
        set::rename_volume,
        delete_volume,
        changes::diff_snapshot,
        changes::diff_volume,
        changes::map_volume,
        changes::volume_status,
        lists::list_bookmarks,
        changes::get_bookmark,
        changes::delete_bookmark,
        volume::complete_volume,
        volume::update_volume,
        volume::promote_volume,
        volume::disable_volume,
        volume::enable_volume,
        lists::list_jobs,
        get_job,
        patch_job,
        delete_job,
        resume_job,
        events,
        openapi,
        metrics
    ),
    components(schemas(Problem, Glob))
)]
struct Document;
