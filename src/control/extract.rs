//! Untrusted requests into checked values, and errors into answers.
//!
//! A body is read up to a limit and within a time; JSON must have exactly the fields of its type. The Content-Type of a
//! request is not looked at: only the host user can reach the socket, so there is no browser to be protected from.

use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::error::{ApiError, ErrorCode, PROBLEM_JSON};

/// The largest body that is read.
pub(super) const BODY_LEN_MAX: usize = 64 * 1024;
/// How much of a larger body is thrown away before answering, since most clients read only when they have written.
const DISCARD_LEN_MAX: usize = 4 * 1024 * 1024;
/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The JSON body of a request.
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let late = |_| {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            ApiError::new(ErrorCode::RequestTimeout, message)
        };
        let bytes = timeout(BODY_TIMEOUT, read_body(request.into_body())).await.map_err(late)??;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            ApiError::new(ErrorCode::InvalidRequest, format!("the body is not the JSON expected here: {error}"))
        })
    }
}

async fn read_body(mut body: Body) -> Result<Bytes, ApiError> {
    let mut bytes = Vec::new();
    let mut len = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            ApiError::new(ErrorCode::InvalidRequest, format!("the body could not be read: {error}"))
        })?;
        let Some(data) = frame.data_ref() else { continue };
        len += data.len();
        if len <= BODY_LEN_MAX {
            bytes.extend_from_slice(data);
        } else if len > DISCARD_LEN_MAX {
            break;
        }
    }
    if len > BODY_LEN_MAX {
        let message = format!("the body has more than {BODY_LEN_MAX} bytes");
        return Err(ApiError::new(ErrorCode::BodyTooLarge, message));
    }
    Ok(bytes.into())
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::new(ErrorCode::InvalidName, rejection.body_text())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(ErrorCode::InvalidRequest, rejection.body_text())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.code.status() >= 500 {
            log::error!("a control request failed: {self}");
        }
        let status = StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], Json(self.problem())).into_response()
    }
}
