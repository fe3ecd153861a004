//! Whether this process may use io_uring at all: a kernel, a sysctl or a container's seccomp profile may forbid it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::{Bell, IoQueue, block_on};

/// Where Linux 6.6 and newer say who may use it.
pub const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";

/// Uses a ring as workers do, once.
///
/// # Errors
/// Why it cannot be used, and what forbids it as far as that can be told.
pub fn probe_ring() -> Result<(), String> {
    let event = || rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).map_err(io::Error::from);
    let used = block_on(async |queue: IoQueue| queue.sleep(Duration::ZERO).await)
        .map(drop)
        .and_then(|()| Bell::new()?.ring(&Arc::new(File::from(event()?))));
    used.map_err(|e| {
        let disabled = std::fs::read_to_string(SYSCTL).map(|text| text.trim().to_owned()).unwrap_or_default();
        let why = match (e.raw_os_error(), disabled.as_str()) {
            (Some(libc::ENOSYS), _) => "this kernel was built without it".to_owned(),
            (Some(libc::EPERM), "1" | "2") => format!("{SYSCTL} is {disabled}; set it to 0"),
            (Some(libc::EPERM | libc::EACCES), _) => {
                "it is forbidden, most likely by the seccomp profile of a container, which \
                                                      must allow io_uring_setup, io_uring_enter and io_uring_register"
                    .to_owned()
            }
            (Some(libc::ENOMEM), _) => "there is no memory that may be locked: raise RLIMIT_MEMLOCK".to_owned(),
            _ => "the kernel refuses it".to_owned(),
        };
        format!("io_uring cannot be used ({e}): {why}")
    })
}
