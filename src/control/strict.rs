//! What a route takes: the query keys and the body that its description names, and nothing else.
//!
//! What always holds: the OpenAPI document is what is refused by, so a route that is added is strict by itself, and one whose
//! description lacks a key does not work.

use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;

use axum::body::HttpBody;
use axum::extract::{MatchedPath, Query, Request};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::RefOr;
use utoipa::openapi::path::{Operation, ParameterIn, PathItem};

use super::error::{ApiError, ErrorCode};
use super::routes::document;

/// What one method of one route takes.
struct Takes {
    query: BTreeSet<String>,
    body: bool,
}

static ROUTES: LazyLock<HashMap<(Method, String), Takes>> = LazyLock::new(|| {
    let takes = |operation: Operation| Takes {
        body: operation.request_body.is_some(),
        query: (operation.parameters.into_iter().flatten())
            .filter_map(|parameter| if let RefOr::T(parameter) = parameter { Some(parameter) } else { None })
            .filter(|parameter| parameter.parameter_in == ParameterIn::Query)
            .map(|parameter| parameter.name)
            .collect(),
    };
    let methods = |(path, item): (String, PathItem)| {
        let PathItem { get, put, post, delete, patch, .. } = item;
        let all = [
            (Method::GET, get),
            (Method::PUT, put),
            (Method::POST, post),
            (Method::DELETE, delete),
            (Method::PATCH, patch),
        ];
        all.into_iter().filter_map(move |(method, operation)| Some(((method, path.clone()), takes(operation?))))
    };
    document().paths.paths.into_iter().flat_map(methods).collect()
});

/// Refuses a request that says what its route does not know.
pub(super) async fn refuse_unknown(request: Request, next: Next) -> Response {
    match check(&request) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn check(request: &Request) -> Result<(), ApiError> {
    let Some(path) = request.extensions().get::<MatchedPath>() else { return Ok(()) };
    let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
    // One that the route has not is refused as that.
    let Some(takes) = ROUTES.get(&(method.clone(), path.as_str().to_owned())) else { return Ok(()) };
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(request.uri())?;
    let route = || format!("{method} {}", path.as_str());
    if let Some((key, _)) = pairs.iter().find(|(key, _)| !takes.query.contains(key)) {
        let error = ApiError::new(ErrorCode::InvalidRequest, format!("{key:?} is no query key of {}", route()));
        let known: Vec<&str> = takes.query.iter().map(String::as_str).collect();
        return Err(match known.is_empty() {
            true => error.with_action("leave it out: this route takes no query"),
            false => error.with_action(format!("leave it out, or use one of: {}", known.join(", "))),
        });
    }
    if !takes.body && !request.body().is_end_stream() {
        let error = ApiError::new(ErrorCode::InvalidRequest, format!("{} takes no body", route()));
        return Err(error.with_action("send none"));
    }
    Ok(())
}
