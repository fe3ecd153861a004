//! How lists are cut down: by what they are asked for, and in pages.
//!
//! What always holds: a page goes on after a name and not after a place in the list, so nothing is shown twice or left out
//! because something else came or went meanwhile. No state is kept between two pages.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{
    Bookmark, BookmarkState, Disk, DiskState, Job, JobKind, JobState, Snapshot, SnapshotState, Strategy, Volume,
    VolumeState, invalid,
};
use crate::control::error::ApiError;
use crate::control::name::SnapshotRef;

/// A name in which `*` stands for any text and `?` for any character.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "vm*")]
pub struct Glob(String);

impl Glob {
    /// Whether this text is one of those that are meant.
    pub fn matches(&self, text: &str) -> bool {
        let (pattern, text) = (self.0.as_bytes(), text.as_bytes());
        let (mut at, mut seen) = (0, 0);
        // Where the last star is, and how much of the text it stands for.
        let mut star: Option<(usize, usize)> = None;
        while seen < text.len() {
            match pattern.get(at) {
                Some(b'*') => {
                    star = Some((at, seen));
                    at += 1;
                }
                Some(&byte) if byte == b'?' || byte == text[seen] => (at, seen) = (at + 1, seen + 1),
                _ => {
                    let Some((at_star, taken)) = star else { return false };
                    star = Some((at_star, taken + 1));
                    (at, seen) = (at_star + 1, taken + 1);
                }
            }
        }
        pattern[at..].iter().all(|byte| *byte == b'*')
    }

    /// The text of it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Glob {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-@*?".contains(&byte);
        match text.bytes().all(fits) && (1..=129).contains(&text.len()) {
            true => Ok(Self(text.to_owned())),
            false => Err(format!("{text:?} is no name, also with * for any text and ? for any character")),
        }
    }
}

impl TryFrom<String> for Glob {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Glob> for String {
    fn from(glob: Glob) -> Self {
        glob.0
    }
}

fn fits(glob: Option<&Glob>, text: impl ToString) -> bool {
    glob.is_none_or(|glob| glob.matches(&text.to_string()))
}

fn is<T: PartialEq>(wanted: Option<T>, found: T) -> bool {
    wanted.is_none_or(|wanted| wanted == found)
}

/// What a list is asked for.
pub trait ListQuery {
    /// What is listed.
    type Item;
    /// What pages are sorted by: a name, `disk@name`, or a number.
    type Key: Ord + std::fmt::Display;

    /// The page that is wanted: at most how many, and after what.
    fn page(&self) -> (Option<u32>, Option<&str>);

    /// Whether an item is wanted.
    fn wants(&self, item: &Self::Item) -> bool;

    /// What a page says where the next one begins.
    fn key_of(item: &Self::Item) -> Self::Key;

    /// The key that a client has sent; it need not be there any more.
    ///
    /// # Errors
    /// `invalid-request`, `invalid-name`.
    fn key(text: &str) -> Result<Self::Key, ApiError>;

    /// The items of a list that are wanted, and whether more of them follow. Pages are sorted by the key; without one the
    /// list keeps its order.
    ///
    /// # Errors
    /// `invalid-request` if the page makes no sense.
    fn select(&self, mut items: Vec<Self::Item>) -> Result<(Vec<Self::Item>, bool), ApiError> {
        let (limit, after) = self.page();
        items.retain(|item| self.wants(item));
        if limit == Some(0) {
            return Err(invalid("limit: a page has at least one item".to_owned()));
        }
        if limit.is_some() || after.is_some() {
            items.sort_by_cached_key(Self::key_of);
        }
        if let Some(after) = after.map(Self::key).transpose()? {
            items.retain(|item| Self::key_of(item) > after);
        }
        let most = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
        let more = items.len() > most;
        items.truncate(most);
        Ok((items, more))
    }
}

macro_rules! list_query {
    (
        $(#[$meta:meta])* $name:ident of $item:ty, $key:ty, after $after:literal;
        { $($(#[$doc:meta])* $field:ident: $type:ty,)* }
        wants: $wants:expr, key: $key_of:expr, parse: $parse:expr
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
        #[serde(deny_unknown_fields)]
        #[into_params(parameter_in = Query)]
        pub struct $name {
            $($(#[$doc])* #[serde(default, skip_serializing_if = "Option::is_none")] pub $field: Option<$type>,)*
            /// At most so many. Whether there are more says a `Link` header.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[param(minimum = 1)]
            pub limit: Option<u32>,
            #[doc = $after]
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub after: Option<String>,
        }

        impl ListQuery for $name {
            type Item = $item;
            type Key = $key;

            fn page(&self) -> (Option<u32>, Option<&str>) {
                (self.limit, self.after.as_deref())
            }

            fn wants(&self, item: &$item) -> bool {
                ($wants)(self, item)
            }

            fn key_of(item: &$item) -> $key {
                ($key_of)(item)
            }

            fn key(text: &str) -> Result<$key, ApiError> {
                ($parse)(text)
            }
        }
    };
}

list_query! {
    /// The query of `GET /v1/disks`.
    DiskList of Disk, String, after "Only those whose names come after this one.";
    {
        /// Only those in this state.
        state: DiskState,
        /// Only those of this name, in which `*` stands for any text.
        name: Glob,
    }
    wants: |query: &DiskList, disk: &Disk| is(query.state, disk.state) && fits(query.name.as_ref(), &disk.name),
    key: |disk: &Disk| disk.name.to_string(),
    parse: |text: &str| Ok(text.to_owned())
}

list_query! {
    /// The query of `GET /v1/snapshots`.
    SnapshotList of Snapshot, SnapshotRef, after "Only those that come after this one, `disk@name`.";
    {
        /// Only those of this disk or volume; `*` stands for any text.
        disk: Glob,
        /// Only those in this state.
        state: SnapshotState,
        /// Only those of this cut.
        #[param(value_type = Option<String>, format = "uuid")]
        group: Uuid,
        /// Only those that are stored so.
        strategy: Strategy,
        /// Only those of this name, without the disk; `*` stands for any text.
        name: Glob,
    }
    wants: |query: &SnapshotList, snapshot: &Snapshot| {
        fits(query.disk.as_ref(), &snapshot.disk)
            && is(query.state, snapshot.state)
            && is(query.group, snapshot.group)
            && is(query.strategy, snapshot.strategy)
            && fits(query.name.as_ref(), &snapshot.name)
    },
    key: Snapshot::reference,
    parse: |text: &str| Ok(text.parse()?)
}

list_query! {
    /// The query of `GET /v1/volumes`.
    VolumeList of Volume, String, after "Only those whose names come after this one.";
    {
        /// Only those that stand, or stood, on this snapshot, `disk@name`; `*` stands for any text.
        from: Glob,
        /// Only those in this state.
        state: VolumeState,
    }
    wants: |query: &VolumeList, volume: &Volume| is(query.state, volume.state) && fits(query.from.as_ref(), &volume.from),
    key: |volume: &Volume| volume.name.to_string(),
    parse: |text: &str| Ok(text.to_owned())
}

list_query! {
    /// The query of `GET /v1/bookmarks`.
    BookmarkList of Bookmark, SnapshotRef, after "Only those that come after this one, `disk@name`.";
    {
        /// Only those of this disk or volume; `*` stands for any text.
        disk: Glob,
        /// Only those in this state.
        state: BookmarkState,
    }
    wants: |query: &BookmarkList, bookmark: &Bookmark| {
        is(query.state, bookmark.state) && fits(query.disk.as_ref(), &bookmark.disk)
    },
    key: Bookmark::reference,
    parse: |text: &str| Ok(text.parse()?)
}

list_query! {
    /// The query of `GET /v1/jobs`.
    JobList of Job, u64, after "Only those with a greater number.";
    {
        /// Only those that do this.
        kind: JobKind,
        /// Only those in this state.
        state: JobState,
        /// Only those of this disk or volume; `*` stands for any text.
        disk: Glob,
    }
    wants: |query: &JobList, job: &Job| {
        is(query.kind, job.kind) && is(query.state, job.state) && fits(query.disk.as_ref(), &job.disk)
    },
    key: |job: &Job| job.id,
    parse: |text: &str| text.parse().map_err(|_| invalid(format!("after: {text:?} is not the number of a job")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glob(text: &str) -> Glob {
        text.parse().unwrap()
    }

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, yes, no) in [
            ("vm1", &["vm1"][..], &["vm", "vm12", "avm1"][..]),
            ("vm*", &["vm", "vm1", "vm-a"], &["v", "xvm"]),
            ("*", &["", "a"], &[]),
            ("*1", &["1", "vm1", "11"], &["vm", "1a"]),
            ("a*b*c", &["abc", "a-b-b-c", "abcbc"], &["ab", "abcb"]),
            ("vm?@*", &["vm1@a"], &["vm@a", "vm12@a"]),
        ] {
            yes.iter().for_each(|text| assert!(glob(pattern).matches(text), "{pattern} {text}"));
            no.iter().for_each(|text| assert!(!glob(pattern).matches(text), "{pattern} {text}"));
        }
        for bad in ["", "VM", "a/b", "[a]", &"x".repeat(130)] {
            assert!(bad.parse::<Glob>().is_err(), "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_text_with_parts_replaced_by_stars_is_found(parts in proptest::collection::vec("[a-c]{0,3}", 1..5)) {
            let pattern = format!("*{}", parts.join("*"));
            proptest::prop_assert!(glob(&pattern).matches(&parts.concat()));
            proptest::prop_assert!(glob(&pattern).matches(&parts.join("c")));
            let longer = format!("{pattern}d");
            proptest::prop_assert!(!glob(&longer).matches(&parts.concat()));
        }
    }
}
