//! Where it was measured, and with which versions.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::settings::Settings;

fn first_line_of(program: &Path, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}

fn value_in(path: &str, key: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_once(':').map_or("unknown", |(_, value)| value.trim()).to_owned()
}

/// Cores, kernel, processor, memory, file system and versions.
pub(crate) fn describe(settings: &Settings) -> Value {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZeroUsize::get);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let file_system = first_line_of(Path::new("stat"), &["-f", "-c", "%T", &settings.dir.display().to_string()]);
    let builds: Vec<Value> = settings
        .builds
        .iter()
        .map(|build| json!({ "name": build.name, "version": first_line_of(&build.binary, &["--version"]) }))
        .collect();
    json!({
        "cores": cores,
        "cpu": value_in("/proc/cpuinfo", "model name"),
        "kernel": kernel.trim(),
        "memory": value_in("/proc/meminfo", "MemTotal"),
        "real_disk_file_system": file_system,
        "halfsilver": builds,
        "commit": first_line_of(Path::new("git"), &["describe", "--always", "--dirty"]),
        "qemu_storage_daemon": first_line_of(Path::new("qemu-storage-daemon"), &["--version"]),
        "date": first_line_of(Path::new("date"), &["-u", "+%Y-%m-%d %H:%M UTC"]),
    })
}

/// The same in one line.
pub(crate) fn line(machine: &Value) -> String {
    let text = |key: &str| machine[key].as_str().unwrap_or("unknown").to_owned();
    format!(
        "{} cores of {}, {} memory, Linux {}, real disk with {}; {}; halfsilver {}; {}",
        machine["cores"],
        text("cpu"),
        text("memory"),
        text("kernel"),
        text("real_disk_file_system"),
        text("qemu_storage_daemon"),
        text("commit"),
        text("date")
    )
}
