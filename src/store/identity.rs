//! What tells an image from every other, whatever it is called and whatever is in it.
//!
//! What always holds: only what stays the same over a restart of the machine is a part of it. So no device number is, and no
//! number of a file where the file system makes them up as it goes. What could not be told is no difference.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statfs, statx};
use serde::{Deserialize, Serialize};

/// File systems whose files may have other numbers after they were mounted anew: FUSE, FAT, exFAT, SMB and CIFS, 9P, overlays.
const FLEETING_NUMBERS: [i64; 7] =
    [0x6573_5546, 0x4d44, 0x2011_BAB0, 0xFF53_4D42, 0xFE53_4D42, 0x0102_1997, 0x794c_7630];

/// See above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Identity {
    /// A file: it keeps both when it gets another name, and a copy has others.
    File {
        /// Its number in its file system.
        inode: Option<u64>,
        /// When it was made, in nanoseconds since 1970.
        born_ns: Option<i64>,
    },
    /// A block device: what the kernel knows of it, by what that is.
    Device(BTreeMap<String, String>),
}

impl Identity {
    /// That of what a path leads to.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Identity> {
        let meta = std::fs::metadata(path)?;
        if meta.file_type().is_block_device() {
            let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
            return Ok(Identity::Device(facts_of(&PathBuf::from(format!("/sys/dev/block/{major}:{minor}")))));
        }
        let is_fleeting = statfs(path).is_ok_and(|s| FLEETING_NUMBERS.contains(&(s.f_type & 0xFFFF_FFFF)));
        let look = statx(CWD, path, AtFlags::empty(), StatxFlags::BTIME)?;
        let is_born = look.stx_mask & StatxFlags::BTIME.bits() != 0;
        let (born, inode) = (look.stx_btime, meta.ino());
        let born_ns = is_born.then(|| born.tv_sec * 1_000_000_000 + i64::from(born.tv_nsec));
        Ok(Identity::File { inode: (!is_fleeting).then_some(inode), born_ns })
    }

    /// Whether it is a file's, which a copy of everything does not have.
    #[must_use]
    pub fn is_file(&self) -> bool {
        matches!(self, Identity::File { .. })
    }

    /// Whether it is certain that these are two.
    #[must_use]
    pub fn is_other(&self, now: &Identity) -> bool {
        fn differ<T: PartialEq>(was: Option<&T>, now: Option<&T>) -> bool {
            was.zip(now).is_some_and(|(was, now)| was != now)
        }
        match (self, now) {
            (Identity::File { inode, born_ns }, Identity::File { inode: inode_now, born_ns: born_now }) => {
                differ(inode.as_ref(), inode_now.as_ref()) || differ(born_ns.as_ref(), born_now.as_ref())
            }
            (Identity::Device(was), Identity::Device(now)) => {
                let is_alien = !was.is_empty() && !now.is_empty() && !was.keys().any(|what| now.contains_key(what));
                is_alien || was.iter().any(|(what, value)| differ(Some(value), now.get(what)))
            }
            _ => true,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::File { inode, born_ns } => {
                f.write_str("the file")?;
                if let Some(inode) = inode {
                    write!(f, " with inode {inode}")?;
                }
                if let Some(born) = born_ns {
                    let (seconds, rest) = (born.div_euclid(1_000_000_000), born.rem_euclid(1_000_000_000));
                    write!(f, " made at {seconds}.{rest:09} s")?;
                }
                Ok(())
            }
            Identity::Device(facts) if facts.is_empty() => f.write_str("a block device"),
            Identity::Device(facts) => {
                let facts: Vec<_> = facts.iter().map(|(what, value)| format!("{what} {value}")).collect();
                write!(f, "the block device with {}", facts.join(", "))
            }
        }
    }
}

/// What the kernel knows of the block device that this directory of sysfs describes.
fn facts_of(sys: &Path) -> BTreeMap<String, String> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(sys.join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let mut facts = BTreeMap::new();
    let mut put = |what: &str, value: Option<String>| {
        value.into_iter().for_each(|value| drop(facts.insert(what.to_owned(), value)));
    };
    put("dm-uuid", read("dm/uuid"));
    put("md-uuid", read("md/uuid"));
    put("wwid", read("wwid").or_else(|| read("device/wwid")));
    put("serial", read("serial").or_else(|| read("device/serial")));
    put("nbd", read("backend"));
    let image = [read("device/cluster_fsid"), read("device/pool"), read("device/image_id")];
    put("rbd", image.into_iter().collect::<Option<Vec<_>>>().map(|parts| parts.join("/")));
    // What a loop device shows is a file's: which number the device has says nothing.
    let behind = read("loop/backing_file").and_then(|file| Identity::of(Path::new(&file)).ok());
    let offset = read("loop/offset").filter(|offset| offset != "0");
    put("loop", behind.map(|file| format!("{file}{}", offset.map(|at| format!(" from {at} on")).unwrap_or_default())));
    if let Some(number) = read("partition") {
        let in_uevent = |key: &str| read("uevent")?.lines().find_map(|line| Some(line.strip_prefix(key)?.to_owned()));
        put("partition-uuid", in_uevent("PARTUUID="));
        put("partition", Some(format!("{number} at {}", read("start").unwrap_or_default())));
        let whole = std::fs::canonicalize(sys).ok().and_then(|sys| sys.parent().map(Path::to_owned));
        for (what, value) in whole.iter().flat_map(|whole| facts_of(whole)) {
            put(&format!("disk-{what}"), Some(value));
        }
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(inode: Option<u64>, born_ns: Option<i64>) -> Identity {
        Identity::File { inode, born_ns }
    }

    fn device(facts: &[(&str, &str)]) -> Identity {
        Identity::Device(facts.iter().map(|(what, value)| ((*what).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn what_is_not_known_is_no_difference() {
        let known = file(Some(1), Some(2));
        for (other, differs) in [
            (known.clone(), false),
            (file(Some(1), None), false),
            (file(None, Some(2)), false),
            (file(None, None), false),
            (file(Some(1), Some(3)), true),
            (file(Some(3), Some(2)), true),
            (file(Some(3), None), true),
            (device(&[]), true),
        ] {
            assert_eq!((known.is_other(&other), other.is_other(&known)), (differs, differs), "{other}");
        }
        let known = device(&[("wwid", "a"), ("serial", "b")]);
        for (other, differs) in [
            (known.clone(), false),
            (device(&[]), false),
            (device(&[("wwid", "a")]), false),
            (device(&[("wwid", "a"), ("serial", "c")]), true),
            (device(&[("dm-uuid", "a")]), true),
        ] {
            assert_eq!((known.is_other(&other), other.is_other(&known)), (differs, differs), "{other}");
        }
    }

    /// A name says nothing, nor does what is in a file; another file in its place is another one.
    #[test]
    fn a_file_keeps_it_and_no_copy_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&path, "one").unwrap();
        let made = Identity::of(&path).unwrap();
        std::fs::write(&path, "another").unwrap();
        std::fs::rename(&path, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, &path).unwrap();
        assert_eq!(Identity::of(&path).unwrap(), made);
        std::fs::remove_file(&path).unwrap();
        std::fs::copy(&moved, &path).unwrap();
        assert!(made.is_other(&Identity::of(&path).unwrap()));
        Identity::of(&dir.path().join("c")).unwrap_err();
        println!("{made}");
    }
}
