//! What `serve` is told: `--disk`, the other options, and the configuration file, into one [`ServeConfig`].
//!
//! Invariants: unknown and repeated keys are refused, so that a misspelt option is never silently ignored; every error
//! is one line that names the key, and for a file the line; the command line beats the file and the file the defaults;
//! all paths of a [`ServeConfig`] are absolute. One disk of the file that is wrong takes no other with it: it is
//! [`BadDisk`]. It opens no image and makes no directory.

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use toml::Spanned;

use crate::control::Name;
use crate::control::api::{DiskConfig, Durability, Layout};
use crate::control::socket::SOCKET_PATH_LEN_MAX;

const KEYS: &str = "name, path, mirror, socket, queues, direct, readonly, shared, durability, layout, serial, block-size, \
     logical-block-size, segments-max, discard-granularity, discard-max, background";

/// Everything the daemon needs to know to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeConfig {
    /// The control socket.
    pub control: PathBuf,
    /// Where the durable records and tables are.
    pub state_dir: PathBuf,
    /// Where sockets and mapped tables are, which need not survive a reboot.
    pub run_dir: PathBuf,
    /// The disks, those of the file first; no two share a name or a socket. Their `socket` is always set.
    pub disks: Vec<DiskSpec>,
    /// Disks of the file that are left out, because what is said of them is wrong.
    pub bad_disks: Vec<BadDisk>,
    /// Disks of which what was flushed last is taken, as if the machine had gone down.
    pub take_flushed: Vec<Name>,
    /// Whether a disk of the configuration that cannot be served ends the start.
    pub strict: bool,
}

/// A named disk, as `--disk` and a `[[disk]]` table describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its name.
    pub name: Name,
    /// How it is served.
    pub config: DiskConfig,
}

/// A disk of the file that cannot be served as it is described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadDisk {
    /// Its name, if it has one that a disk can have.
    pub name: Option<Name>,
    /// What is wrong, and where.
    pub why: String,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A `--disk` is wrong.
    #[error("--disk: {0}")]
    Option(String),
    /// Two things would be in one place, or a place has no room.
    #[error("{0}")]
    Place(String),
    /// The file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is wrong.
    #[error("{}:{line}: {message}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A disk of the file is wrong, and all or none are to be served.
    #[error("{0}")]
    Disk(String),
    /// No default could be made.
    #[error("{0}")]
    NoDefault(&'static str),
}

/// What the process was started with, apart from its arguments.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Whether it runs as root.
    pub root: bool,
    /// Relative paths of the command line start here.
    pub directory: PathBuf,
    /// HOME.
    pub home: Option<PathBuf>,
    /// XDG_STATE_HOME.
    pub state_home: Option<PathBuf>,
    /// XDG_RUNTIME_DIR.
    pub runtime_dir: Option<PathBuf>,
}

impl Environment {
    /// That of this process. Variables that are empty or not absolute count as absent, as XDG asks.
    ///
    /// # Errors
    /// If there is no current directory.
    pub fn current() -> Result<Self, ConfigError> {
        let read = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let directory = env::current_dir().map_err(|source| ConfigError::Read { path: PathBuf::from("."), source })?;
        let root = rustix::process::geteuid().is_root();
        let (home, state_home, runtime_dir) = (read("HOME"), read("XDG_STATE_HOME"), read("XDG_RUNTIME_DIR"));
        Ok(Self { root, directory, home, state_home, runtime_dir })
    }

    /// Where the control socket is when nothing else is said.
    ///
    /// # Errors
    /// If there is no run directory to put it in.
    pub fn default_control(&self) -> Result<PathBuf, ConfigError> {
        Ok(control_in(&self.default_run_dir()?))
    }

    fn default_run_dir(&self) -> Result<PathBuf, ConfigError> {
        if self.root {
            return Ok(PathBuf::from("/run/halfsilver"));
        }
        let none = "XDG_RUNTIME_DIR is not set; name the places with --run-dir and --control";
        Ok(self.runtime_dir.as_ref().ok_or(ConfigError::NoDefault(none))?.join("halfsilver"))
    }

    fn default_state_dir(&self) -> Result<PathBuf, ConfigError> {
        if self.root {
            return Ok(PathBuf::from("/var/lib/halfsilver"));
        }
        let in_home = || self.home.as_ref().map(|home| home.join(".local/state"));
        let none = "neither XDG_STATE_HOME nor HOME is set; name the place with --state-dir";
        Ok(self.state_home.clone().or_else(in_home).ok_or(ConfigError::NoDefault(none))?.join("halfsilver"))
    }

    fn absolute(&self, path: &Path) -> PathBuf {
        self.directory.join(path)
    }
}

fn control_in(run_dir: &Path) -> PathBuf {
    run_dir.join("control.sock")
}

/// The options of `serve`.
#[derive(Clone, Debug, Default)]
pub struct ServeOptions {
    /// `--config`
    pub config: Option<PathBuf>,
    /// `--control`
    pub control: Option<PathBuf>,
    /// `--state-dir`
    pub state_dir: Option<PathBuf>,
    /// `--run-dir`
    pub run_dir: Option<PathBuf>,
    /// `--disk`, as often as it was given.
    pub disks: Vec<RawDisk>,
    /// `--take-flushed`, as often as it was given.
    pub take_flushed: Vec<Name>,
    /// `--strict`
    pub strict: bool,
}

impl ServeOptions {
    /// Options, file and defaults together.
    ///
    /// # Errors
    /// If any of them is wrong, or two disks of the command line share a name or a socket; of the file's disks only with
    /// `strict`.
    pub fn resolve(self, environment: &Environment) -> Result<ServeConfig, ConfigError> {
        let mut file = FileConfig::default();
        if let Some(path) = &self.config {
            file = FileConfig::read(&environment.absolute(path))?;
        }
        let place =
            |option: Option<PathBuf>, file: Option<PathBuf>| option.map(|path| environment.absolute(&path)).or(file);
        let run_dir = place(self.run_dir, file.run_dir).map_or_else(|| environment.default_run_dir(), Ok)?;
        let state_dir = place(self.state_dir, file.state_dir).map_or_else(|| environment.default_state_dir(), Ok)?;
        let control = place(self.control, file.control).unwrap_or_else(|| control_in(&run_dir));

        let mut given = Vec::new();
        for raw in self.disks {
            let disk = raw.check(&environment.directory).map_err(ConfigError::Option)?;
            add(&mut given, disk).map_err(ConfigError::Option)?;
        }
        file.disks.retain(|disk| given.iter().all(|other| other.name != disk.name));
        file.bad_disks.retain(|bad| given.iter().all(|other| Some(&other.name) != bad.name.as_ref()));
        for disk in file.disks.iter_mut().chain(&mut given) {
            disk.config.socket = Some(disk.config.socket_or_default(&run_dir, &disk.name));
        }
        let mut sockets = Sockets::default();
        sockets.take(None, &control).map_err(ConfigError::Place)?;
        for disk in &given {
            sockets.take_that_of(disk).map_err(ConfigError::Place)?;
        }
        // The first one of the file has it: whoever is connected there goes on.
        let mut disks = Vec::new();
        for disk in file.disks {
            match sockets.take_that_of(&disk) {
                Ok(()) => disks.push(disk),
                Err(why) => file.bad_disks.push(BadDisk { name: Some(disk.name), why }),
            }
        }
        if let Some(bad) = file.bad_disks.first().filter(|_| self.strict) {
            return Err(ConfigError::Disk(bad.why.clone()));
        }
        disks.extend(given);
        let (bad_disks, take_flushed, strict) = (file.bad_disks, self.take_flushed, self.strict);
        Ok(ServeConfig { control, state_dir, run_dir, disks, bad_disks, take_flushed, strict })
    }
}

fn add(disks: &mut Vec<DiskSpec>, disk: DiskSpec) -> Result<(), String> {
    if disks.iter().any(|other| other.name == disk.name) {
        return Err(format!("name: two disks are named {}", disk.name));
    }
    disks.push(disk);
    Ok(())
}

/// The sockets that are given away, each with its owner; that of the control socket has no name.
#[derive(Default)]
struct Sockets(Vec<(Option<Name>, PathBuf)>);

impl Sockets {
    fn take_that_of(&mut self, disk: &DiskSpec) -> Result<(), String> {
        disk.config.socket.as_deref().map_or(Ok(()), |socket| self.take(Some(&disk.name), socket))
    }

    fn take(&mut self, name: Option<&Name>, socket: &Path) -> Result<(), String> {
        let owner = |name: Option<&Name>| name.map_or("the control socket".to_owned(), |name| format!("disk {name}"));
        let len = socket.as_os_str().len();
        if len > SOCKET_PATH_LEN_MAX {
            return Err(format!(
                "socket: {} of {} has {len} bytes, a socket's path at most {SOCKET_PATH_LEN_MAX}; choose a shorter one",
                socket.display(),
                owner(name)
            ));
        }
        if let Some((other, _)) = self.0.iter().find(|(_, path)| path == socket) {
            return Err(format!("socket: {} and {} share {}", owner(other.as_ref()), owner(name), socket.display()));
        }
        self.0.push((name.cloned(), socket.to_owned()));
        Ok(())
    }
}

/// A disk as it was written down: keys are known and given once, values have their type, nothing more is checked.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RawDisk {
    name: Option<String>,
    path: Option<PathBuf>,
    mirror: Option<PathBuf>,
    socket: Option<PathBuf>,
    queues: Option<u16>,
    direct: Option<Switch>,
    readonly: Option<Switch>,
    shared: Option<Switch>,
    durability: Option<Durability>,
    layout: Option<Layout>,
    serial: Option<String>,
    block_size: Option<Size>,
    logical_block_size: Option<Size>,
    segments_max: Option<u16>,
    discard_granularity: Option<Size>,
    discard_max: Option<Size>,
    background: Option<Window>,
}

impl RawDisk {
    /// As a table of the file has it. A message starts with the key.
    fn read(table: toml::Table) -> Result<RawDisk, String> {
        for (key, value) in &table {
            let alone = toml::Table::from_iter([(key.clone(), value.clone())]);
            RawDisk::deserialize(alone).map_err(|e| format!("{key}: {}", e.message()))?;
        }
        RawDisk::deserialize(table).map_err(|e| e.message().to_owned())
    }

    /// The disk, with relative paths starting at `directory` (absolute).
    ///
    /// # Errors
    /// A message that starts with the key.
    pub fn check(self, directory: &Path) -> Result<DiskSpec, String> {
        let name = self.name.ok_or("name: is missing")?;
        let name = name.parse::<Name>().map_err(|error| format!("name: {error}"))?;
        let absolute = |key: &str, path: PathBuf| {
            if path.as_os_str().is_empty() { Err(format!("{key}: is empty")) } else { Ok(directory.join(path)) }
        };
        let mut config = DiskConfig::new(absolute("path", self.path.ok_or("path: is missing")?)?);
        config.mirror = self.mirror.map(|path| absolute("mirror", path)).transpose()?;
        config.socket = self.socket.map(|socket| absolute("socket", socket)).transpose()?;
        config.queues = self.queues;
        config.direct = self.direct.map_or(config.direct, |Switch(on)| on);
        config.readonly = self.readonly.map(|Switch(on)| on);
        config.shared = self.shared.map_or(config.shared, |Switch(on)| on);
        config.durability = self.durability;
        config.layout = self.layout;
        config.block_size = self.block_size.map_or(config.block_size, |Size(bytes)| bytes);
        config.logical_block_size = self.logical_block_size.map(|Size(bytes)| bytes);
        config.segments_max = self.segments_max;
        config.discard_granularity = self.discard_granularity.map(|Size(bytes)| bytes);
        config.discard_max = self.discard_max.map(|Size(bytes)| bytes.into());
        config.background_bytes = self.background.map(|Window(Size(bytes))| bytes);
        config.serial = self.serial;
        config.check().map_err(|error| error.message)?;
        Ok(DiskSpec { name, config })
    }

    /// Sets one key from its text.
    ///
    /// # Errors
    /// A message that starts with the key, also if it was set before.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), String> {
            if slot.replace(value).is_some() { Err("is given twice".to_owned()) } else { Ok(()) }
        }
        let set = match key {
            "name" => once(&mut self.name, value.to_owned()),
            "path" => once(&mut self.path, value.into()),
            "mirror" => once(&mut self.mirror, value.into()),
            "socket" => once(&mut self.socket, value.into()),
            "queues" => match value.parse() {
                Ok(queues) => once(&mut self.queues, queues),
                Err(_) => Err(format!("{value:?} is not a number from 1 to 16")),
            },
            "direct" => value.parse().and_then(|switch| once(&mut self.direct, switch)),
            "readonly" => value.parse().and_then(|switch| once(&mut self.readonly, switch)),
            "shared" => value.parse().and_then(|switch| once(&mut self.shared, switch)),
            "durability" => value.parse().and_then(|durability| once(&mut self.durability, durability)),
            "layout" => value.parse().and_then(|layout| once(&mut self.layout, layout)),
            "serial" => once(&mut self.serial, value.to_owned()),
            "block-size" => value.parse().and_then(|size| once(&mut self.block_size, size)),
            "logical-block-size" => value.parse().and_then(|size| once(&mut self.logical_block_size, size)),
            "segments-max" => match value.parse() {
                Ok(segments) => once(&mut self.segments_max, segments),
                Err(_) => Err(format!("{value:?} is not a number from 1 to 32766")),
            },
            "discard-granularity" => value.parse().and_then(|size| once(&mut self.discard_granularity, size)),
            "discard-max" => value.parse().and_then(|size| once(&mut self.discard_max, size)),
            "background" => value.parse().and_then(|window| once(&mut self.background, window)),
            _ => return Err(format!("{key:?} is not a key; the keys are {KEYS}")),
        };
        set.map_err(|message| format!("{key}: {message}"))
    }
}

impl FromStr for RawDisk {
    type Err = String;

    /// Reads `key=value,…`; a comma that belongs to a value is written twice, as for QEMU.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut raw = Self::default();
        for item in split_commas(text) {
            let (key, value) = item
                .split_once('=')
                .ok_or_else(|| format!("{item:?} is not of the form key=value; the keys are {KEYS}"))?;
            raw.set(key, value)?;
        }
        Ok(raw)
    }
}

/// Splits at single commas and turns double ones into one.
fn split_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        let separates = char == ',' && chars.next_if_eq(&',').is_none();
        match items.last_mut() {
            Some(item) if !separates => item.push(char),
            _ => items.push(String::new()),
        }
    }
    items
}

/// on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "toml::Value")]
struct Switch(bool);

impl FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" | "true" | "yes" => Ok(Self(true)),
            "off" | "false" | "no" => Ok(Self(false)),
            _ => Err(format!("{text:?} is neither on nor off")),
        }
    }
}

impl TryFrom<toml::Value> for Switch {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        match value {
            toml::Value::Boolean(on) => Ok(Self(on)),
            toml::Value::String(text) => text.parse(),
            other => Err(format!("{other} is neither on nor off")),
        }
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "toml::Value")]
struct Size(u32);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, factor) = match text.as_bytes().last() {
            Some(b'K' | b'k') => (&text[..text.len() - 1], 1 << 10),
            Some(b'M' | b'm') => (&text[..text.len() - 1], 1 << 20),
            _ => (text, 1),
        };
        let digits = Some(digits).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        let bytes = digits.and_then(|digits| digits.parse::<u32>().ok()).and_then(|number| number.checked_mul(factor));
        bytes.map(Self).ok_or_else(|| format!("{text:?} is not a size such as 4096, 64K or 1M"))
    }
}

impl TryFrom<toml::Value> for Size {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        match value {
            toml::Value::String(text) => text.parse(),
            other => other.to_string().parse(),
        }
    }
}

/// A number of bytes, or off for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "toml::Value")]
struct Window(Size);

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = if text == "off" { Ok(Size(0)) } else { text.parse() };
        size.map(Self).map_err(|_| format!("{text:?} is neither off nor a size such as 64K or 1M"))
    }
}

impl TryFrom<toml::Value> for Window {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        match value {
            toml::Value::Boolean(false) => "off".parse(),
            toml::Value::String(text) => text.parse(),
            other => other.to_string().parse(),
        }
    }
}

/// What the file says, with absolute paths.
#[derive(Debug, Default)]
struct FileConfig {
    control: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    disks: Vec<DiskSpec>,
    bad_disks: Vec<BadDisk>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawFile {
    control: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    #[serde(default)]
    disk: Vec<Spanned<toml::Table>>,
}

impl FileConfig {
    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Relative paths start at the directory of the file. Each disk by itself is right or wrong.
    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let wrong = |span: Option<Range<usize>>, message: &dyn fmt::Display| {
            let before = span.and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            ConfigError::File { path: path.to_owned(), line, message }
        };
        let raw: RawFile = toml::from_str(text).map_err(|error| wrong(error.span(), &error.message()))?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        let absolute = |path: Option<PathBuf>| path.map(|path| directory.join(path));
        let (mut disks, mut bad_disks) = (Vec::new(), Vec::new());
        for disk in raw.disk {
            let (span, table) = (disk.span(), disk.into_inner());
            let name = table.get("name").and_then(|name| name.as_str()?.parse().ok());
            let added =
                RawDisk::read(table).and_then(|raw| raw.check(directory)).and_then(|disk| add(&mut disks, disk));
            if let Err(message) = added {
                bad_disks.push(BadDisk { name, why: wrong(Some(span), &message).to_string() });
            }
        }
        let (control, state_dir, run_dir) = (absolute(raw.control), absolute(raw.state_dir), absolute(raw.run_dir));
        Ok(Self { control, state_dir, run_dir, disks, bad_disks })
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
