//! Names of disks and snapshots, as checked values.
//!
//! A name becomes part of file names (`<run-dir>/<disk>@<name>.sock`), so the alphabet is the protection: without
//! `.`, `/` and `@` no name can leave a directory or be mistaken for a `disk@name` pair. A [`Name`] that exists is
//! valid; there is no other way to make one than through [`FromStr`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The longest name, in bytes.
pub const NAME_LEN_MAX: usize = 64;

/// The name of a disk or of a snapshot: 1 to 64 of `a-z`, `0-9` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z0-9-]{1,64}$", example = "vm1")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text is not a [`Name`] or a [`SnapshotRef`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("a name cannot be empty")]
    Empty,
    /// More than [`NAME_LEN_MAX`] bytes were given.
    #[error("a name has at most {NAME_LEN_MAX} characters, this one has {0}")]
    TooLong(usize),
    /// A character outside the alphabet; the name is shown with control characters escaped.
    #[error("{0:?} is not a name: only a-z, 0-9 and - are allowed")]
    Alphabet(String),
    /// Not of the form `disk@name`.
    #[error("{0:?} is not a snapshot: write DISK@NAME")]
    NotASnapshot(String),
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > NAME_LEN_MAX {
            return Err(NameError::TooLong(text.chars().count()));
        }
        if !text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-')) {
            return Err(NameError::Alphabet(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Which snapshot: `disk@name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotRef {
    /// The disk it was taken of.
    pub disk: Name,
    /// Its own name, unique among the snapshots of that disk.
    pub name: Name,
}

impl FromStr for SnapshotRef {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (disk, name) = text.split_once('@').ok_or_else(|| NameError::NotASnapshot(text.to_owned()))?;
        Ok(Self { disk: disk.parse()?, name: name.parse()? })
    }
}

impl fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.disk, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_alphabet_makes_a_name() {
        for good in ["a", "0", "-", "vm-1", &"x".repeat(64)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "A", "a/b", "a b", "a@b", "a\0", "é", "a_b", "a\n", &"x".repeat(65)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_snapshot_is_a_disk_and_a_name() {
        let snapshot: SnapshotRef = "vm1@daily".parse().unwrap();
        assert_eq!((snapshot.disk.as_str(), snapshot.name.as_str()), ("vm1", "daily"));
        assert_eq!(snapshot.to_string(), "vm1@daily");
        for bad in ["vm1", "@", "vm1@", "@daily", "vm1@a@b", "vm1@../x"] {
            assert!(bad.parse::<SnapshotRef>().is_err(), "{bad:?}");
        }
    }
}
