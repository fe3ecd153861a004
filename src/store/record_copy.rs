//! The second copy of the records: what is gone on with when the first cannot be read.
//!
//! What always holds: it is never older than the records, because it is on stable storage before what it says is committed; it
//! may be ahead of them by the one change that was under way, as if that had been committed. When it cannot be written it is
//! removed before anything is committed.
//!
//! The file: a line that says what it is; CRC-32 of the rest in eight hexadecimal digits and a newline; the layout of the store
//! and the number of the next job; how many records there are, and each name with its record as the store has it; how many names
//! were let go, and these. Numbers have eight bytes, least significant first; what is not a number follows its length.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::intact::Content;
use super::sync_directory_of;

const FIRST_LINE: &[u8] = b"halfsilver records, second copy, 1\n";

/// Where a second copy is.
pub(super) struct RecordCopy(PathBuf);

impl RecordCopy {
    /// That of the store at this path.
    pub(super) fn of(store: &Path) -> RecordCopy {
        RecordCopy(store.with_extension("copy"))
    }

    /// Makes it say this, on stable storage. If that cannot be there is none.
    pub(super) fn put(&self, content: &Content) -> io::Result<()> {
        self.write(content).or_else(|e| {
            log::warn!("{}: the records have no second copy until it can be written: {e}", self.0.display());
            self.remove()
        })
    }

    fn write(&self, content: &Content) -> io::Result<()> {
        let beside = self.0.with_extension("copy.new");
        let written = || {
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            file.write_all(&encode(content))?;
            file.sync_all()?;
            std::fs::rename(&beside, &self.0)?;
            sync_directory_of(&self.0)
        };
        written().inspect_err(|_| drop(std::fs::remove_file(&beside)))
    }

    fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
            Ok(()) => sync_directory_of(&self.0),
        }
    }

    /// What it says. None if there is none that is whole.
    pub(super) fn read(&self) -> Option<Content> {
        let bytes = std::fs::read(&self.0).ok()?;
        let found = decode(&bytes);
        if found.is_none() {
            log::warn!("{}: the second copy of the records is damaged", self.0.display());
        }
        found
    }
}

fn encode(content: &Content) -> Vec<u8> {
    let mut body = Vec::new();
    let number = |body: &mut Vec<u8>, n: u64| body.extend_from_slice(&n.to_le_bytes());
    let bytes = |body: &mut Vec<u8>, bytes: &[u8]| {
        body.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        body.extend_from_slice(bytes);
    };
    number(&mut body, content.layout.unwrap_or(0));
    number(&mut body, content.next_job.unwrap_or(0));
    number(&mut body, content.disks.len() as u64);
    for (name, value) in &content.disks {
        bytes(&mut body, name.as_bytes());
        bytes(&mut body, value);
    }
    number(&mut body, content.dropped.len() as u64);
    content.dropped.iter().for_each(|name| bytes(&mut body, name.as_bytes()));
    let crc = format!("{:08x}\n", crc32fast::hash(&body));
    [FIRST_LINE, crc.as_bytes(), &body].concat()
}

fn decode(bytes: &[u8]) -> Option<Content> {
    let rest = bytes.strip_prefix(FIRST_LINE)?;
    let (crc, body) = rest.split_at_checked(9)?;
    if crc != format!("{:08x}\n", crc32fast::hash(body)).as_bytes() {
        return None;
    }
    let mut left = body;
    let layout = take_number(&mut left)?;
    let next_job = take_number(&mut left)?;
    let mut disks = BTreeMap::new();
    for _ in 0..take_number(&mut left)? {
        let name = String::from_utf8(take_bytes(&mut left)?.to_vec()).ok()?;
        disks.insert(name, take_bytes(&mut left)?.to_vec());
    }
    let count = take_number(&mut left)?;
    let names = (0..count).map(|_| String::from_utf8(take_bytes(&mut left)?.to_vec()).ok());
    let dropped = names.collect::<Option<_>>()?;
    let some = |n: u64| Some(n).filter(|n| *n != 0);
    left.is_empty().then_some(Content { layout: some(layout), next_job: some(next_job), disks, dropped })
}

fn take_number(left: &mut &[u8]) -> Option<u64> {
    let (number, rest) = left.split_first_chunk()?;
    *left = rest;
    Some(u64::from_le_bytes(*number))
}

fn take_bytes<'a>(left: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(take_number(left)?).ok()?;
    let (bytes, rest) = left.split_at_checked(len)?;
    *left = rest;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Content {
        Content {
            layout: Some(6),
            next_job: Some(33),
            disks: [("vm1".to_owned(), vec![0, 255, 7]), ("é".to_owned(), Vec::new())].into(),
            dropped: ["a".to_owned(), "vm1@b".to_owned()].into(),
        }
    }

    #[test]
    fn what_was_put_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let copy = RecordCopy::of(&dir.path().join("records.redb"));
        assert_eq!(copy.read(), None);
        for content in [content(), Content::default()] {
            copy.put(&content).unwrap();
            assert_eq!(copy.read(), Some(content));
        }
        let good = encode(&content());
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bad), None, "bit {bit}");
        }
        (0..good.len()).for_each(|len| assert_eq!(decode(&good[..len]), None, "cut to {len}"));
    }

    /// An older one is worse than none.
    #[test]
    fn one_that_cannot_be_written_goes() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("records.redb");
        let copy = RecordCopy::of(&store);
        copy.put(&content()).unwrap();
        std::fs::create_dir(store.with_extension("copy.new")).unwrap();
        copy.put(&Content::default()).unwrap();
        assert_eq!(copy.read(), None);
        std::fs::create_dir(store.with_extension("copy")).unwrap();
        copy.put(&content()).unwrap_err();
    }
}
