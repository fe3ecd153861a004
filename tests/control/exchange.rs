//! The smallest HTTP client that shows exactly what was answered.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use crate::rig::PATIENCE;

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// One request on one connection.
pub(crate) fn exchange(path: &Path, method: &str, target: &str, body: &[u8]) -> Answer {
    let mut stream = request(path, method, target, body);
    let (status, headers) = read_head(&mut stream);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    Answer { status, headers, body: text }
}

/// Sends a request and leaves the answer to be read.
pub(crate) fn request(path: &Path, method: &str, target: &str, body: &[u8]) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    let head =
        format!("{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    match stream.write_all(&[head.as_bytes(), body].concat()) {
        // Who needs no body to answer may have answered and hung up: the answer is there all the same.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
        written => written.unwrap(),
    }
    BufReader::new(stream)
}

pub(crate) fn read_head(stream: &mut impl BufRead) -> (u16, Vec<(String, String)>) {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status in {line:?}")).parse().unwrap();
    let mut headers = Vec::new();
    loop {
        line.clear();
        stream.read_line(&mut line).unwrap();
        let Some((key, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((key.to_lowercase(), value.to_owned()));
    }
    (status, headers)
}

/// An event stream that is known to listen.
pub(crate) fn listen(path: &Path) -> BufReader<UnixStream> {
    let mut stream = request(path, "GET", "/v1/events", b"");
    let (status, headers) = read_head(&mut stream);
    assert_eq!(status, 200);
    assert!(headers.contains(&("content-type".to_owned(), "text/event-stream".to_owned())));
    assert!(read_until(&mut stream, ":").contains("listening"));
    stream
}

/// The next line that starts so.
pub(crate) fn read_until(stream: &mut impl BufRead, start: &str) -> String {
    let mut line = String::new();
    while !line.starts_with(start) {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the stream ended before {start:?}");
    }
    line.trim_end().to_owned()
}
