//! One request at a time to the daemon, over HTTP/1.1 on its Unix socket.
//!
//! Invariants: each request has a connection of its own; every failure becomes one line that says where the daemon was
//! looked for, or what it refused and what to do. Nothing is retried: only the caller knows what may be done twice.

use std::cell::Cell;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::CliError;
use crate::control::{Event, Problem};

/// How long a question may take. Work that may rightly take longer has no limit.
const ASK_TIMEOUT: Duration = Duration::from_secs(30);
/// How much longer than a command waits an answer may take that says how far the work is.
const ANSWER_GRACE: Duration = Duration::from_secs(2);
/// The longest line of an event stream, and the longest answer to a question, that is read.
const ANSWER_LEN_MAX: usize = 64 << 20;

/// A daemon that may or may not be there.
pub(super) struct Client {
    control: PathBuf,
    runtime: Runtime,
    /// Until when whoever asks waits for answers.
    until: Cell<Option<Instant>>,
}

/// An answer below 400.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// Whether a list goes on.
    pub(super) has_next: bool,
    body: Bytes,
}

/// A value for a query: what is not plainly itself there, as `%` and two digits a byte.
pub(super) fn query_value(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// What of a query is said, as text.
pub(super) fn query_of(query: &impl Serialize) -> String {
    let pairs = serde_json::to_value(query).ok().and_then(|value| value.as_object().cloned()).unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let said = pairs.iter().filter(|(_, value)| !value.is_null());
    said.map(|(key, value)| format!("{key}={}", query_value(&text(value)))).collect::<Vec<_>>().join("&")
}

impl Answer {
    /// The JSON of the answer.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, CliError> {
        serde_json::from_slice(&self.body).map_err(|error| {
            CliError::Failed(format!(
                "the daemon's answer is not understood ({error}); use the halfsilver of its version"
            ))
        })
    }
}

impl Client {
    pub(super) fn new(control: PathBuf) -> Result<Self, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| CliError::Failed(format!("cannot start an event loop: {error}")))?;
        Ok(Self { control, runtime, until: Cell::new(None) })
    }

    /// From now on no answer is waited for longer than this, and a moment.
    pub(super) fn answer_until(&self, until: Option<Instant>) {
        self.until.set(until);
    }

    /// Asks for something that is answered at once.
    pub(super) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.request(Method::GET, path, Bytes::new(), Some(ASK_TIMEOUT))?.json()
    }

    /// The same for a list that may go on.
    pub(super) fn get_page(&self, path: &str) -> Result<Answer, CliError> {
        self.request(Method::GET, path, Bytes::new(), Some(ASK_TIMEOUT))
    }

    /// The same, or `None` when there is no such thing.
    pub(super) fn find<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, CliError> {
        self.runtime.block_on(async {
            let response = self.limited(self.send(Method::GET, path, Bytes::new()), Some(ASK_TIMEOUT)).await?;
            if response.status() == StatusCode::NOT_FOUND {
                return Ok(None);
            }
            self.finish(response).await?.json().map(Some)
        })
    }

    /// Sends JSON and waits as long as it takes.
    pub(super) fn put(&self, method: Method, path: &str, body: &impl Serialize) -> Result<Answer, CliError> {
        let body = serde_json::to_vec(body)
            .map_err(|error| CliError::Failed(format!("the request cannot be written as JSON: {error}")))?;
        self.request(method, path, body.into(), None)
    }

    /// Asks for something to be done that needs no words, and waits as long as it takes.
    pub(super) fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.request(Method::POST, path, Bytes::new(), None)?.json()
    }

    /// The same, where there is nothing to be said afterwards.
    pub(super) fn post_only(&self, path: &str) -> Result<(), CliError> {
        self.request(Method::POST, path, Bytes::new(), None).map(drop)
    }

    /// Deletes and waits as long as it takes.
    pub(super) fn delete(&self, path: &str) -> Result<Answer, CliError> {
        self.request(Method::DELETE, path, Bytes::new(), None)
    }

    /// Follows the event stream; ends only with an error.
    pub(super) fn follow(&self, mut each: impl FnMut(Event) -> Result<(), CliError>) -> Result<(), CliError> {
        self.runtime.block_on(async {
            let response = self.limited(self.send(Method::GET, "/v1/events", Bytes::new()), Some(ASK_TIMEOUT)).await?;
            let mut response = self.accepted(response).await?;
            let mut pending = Vec::new();
            while let Some(frame) = response.body_mut().frame().await {
                let frame = frame.map_err(|error| self.lost(&error))?;
                pending.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    let Some(data) = line.strip_prefix(b"data:") else { continue };
                    let event = Answer { status: StatusCode::OK, has_next: false, body: Bytes::copy_from_slice(data) };
                    each(event.json()?)?;
                }
                if pending.len() > ANSWER_LEN_MAX {
                    return Err(self.lost(&"a line has no end"));
                }
            }
            let message = format!("the daemon at {} stopped; start it again", self.control.display());
            Err(CliError::Failed(message))
        })
    }

    /// Hands over the lines of a list of any length as they come; the last one need not end. Returns the header `name`.
    pub(super) fn lines(
        &self,
        path: &str,
        name: Option<&str>,
        mut each: impl FnMut(&str) -> Result<(), CliError>,
    ) -> Result<Option<String>, CliError> {
        self.runtime.block_on(async {
            let response = self.limited(self.send(Method::GET, path, Bytes::new()), Some(ASK_TIMEOUT)).await?;
            let mut response = self.accepted(response).await?;
            let header = name.and_then(|name| response.headers().get(name)?.to_str().ok()).map(str::to_owned);
            let mut pending = Vec::new();
            let no_text = |error: &std::str::Utf8Error| self.lost(error);
            while let Some(frame) = response.body_mut().frame().await {
                let frame = frame.map_err(|error| self.lost(&error))?;
                pending.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
                let whole = pending.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
                let lines: Vec<u8> = pending.drain(..whole).collect();
                for line in std::str::from_utf8(&lines).map_err(|e| no_text(&e))?.lines() {
                    each(line)?;
                }
                if pending.len() > ANSWER_LEN_MAX {
                    return Err(self.lost(&"a line has no end"));
                }
            }
            for line in std::str::from_utf8(&pending).map_err(|e| no_text(&e))?.lines() {
                each(line)?;
            }
            Ok(header)
        })
    }

    fn request(&self, method: Method, path: &str, body: Bytes, limit: Option<Duration>) -> Result<Answer, CliError> {
        let exchange = async {
            let response = self.send(method, path, body).await?;
            self.finish(response).await
        };
        self.runtime.block_on(self.limited(exchange, limit))
    }

    async fn limited<T>(
        &self,
        work: impl Future<Output = Result<T, CliError>>,
        limit: Option<Duration>,
    ) -> Result<T, CliError> {
        let left = self.until.get().map(|until| until.saturating_duration_since(Instant::now()) + ANSWER_GRACE);
        let Some(limit) = limit.into_iter().chain(left).min() else { return work.await };
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
            let (path, seconds) = (self.control.display(), limit.as_secs());
            Err(CliError::Failed(format!(
                "the daemon at {path} did not answer within {seconds} s; see its log and 'halfsilver status'"
            )))
        })
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, CliError> {
        let stream = UnixStream::connect(&self.control).await.map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.lost(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| CliError::Failed(format!("the request cannot be sent: {error}")))?;
        sender.send_request(request).await.map_err(|error| self.lost(&error))
    }

    async fn finish(&self, response: Response<Incoming>) -> Result<Answer, CliError> {
        let response = self.accepted(response).await?;
        let (status, has_next) = (response.status(), response.headers().contains_key(header::LINK));
        Ok(Answer { status, has_next, body: self.read(response).await? })
    }

    /// Passes on what the daemon accepted; what it refused becomes an error.
    async fn accepted(&self, response: Response<Incoming>) -> Result<Response<Incoming>, CliError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.read(response).await?;
        Err(CliError::Failed(match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => format!("{}; {}", problem.detail, problem.action),
            Err(_) => format!("what answers at {} is no halfsilver ({status}); see --control", self.control.display()),
        }))
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Bytes, CliError> {
        let limited = http_body_util::Limited::new(response.into_body(), ANSWER_LEN_MAX);
        Ok(limited.collect().await.map_err(|error| self.lost(&error))?.to_bytes())
    }

    fn unreachable(&self, error: &io::Error) -> CliError {
        let path = self.control.display();
        CliError::Failed(match error.kind() {
            io::ErrorKind::PermissionDenied => {
                format!("may not use the control socket {path}; run this as the daemon's user or as root")
            }
            _ => format!(
                "no daemon answers at {path} ({error}); start one with 'halfsilver serve', or name its socket with --control"
            ),
        })
    }

    fn lost(&self, error: &dyn std::fmt::Display) -> CliError {
        let path = self.control.display();
        CliError::Failed(format!("the daemon at {path} broke off ({error}); see its log and 'halfsilver status'"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_encoded() {
        assert_eq!(query_value("/images/vm-1_~.raw"), "/images/vm-1_~.raw");
        assert_eq!(query_value("/a b&c=d+%é"), "/a%20b%26c%3Dd%2B%25%C3%A9");
    }
}
