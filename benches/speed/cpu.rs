//! CPU time of processes, in nanoseconds.
//!
//! The kernel's clock of a whole process is read: it has the time of io_uring's kernel workers too, and of threads that
//! have ended meanwhile, which a sum over `/proc/PID/task` would lose.

use std::time::Duration;

use crate::Result;

/// CPU time that a process has used so far, all its threads together.
pub(crate) fn of_process(pid: u32) -> Result<Duration> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the pointer is to a local that lives through the call.
    let rc = unsafe { libc::clock_getcpuclockid(pid.cast_signed(), &mut clock) };
    if rc != 0 {
        return Err(format!("no CPU clock of process {pid}: {}", std::io::Error::from_raw_os_error(rc)).into());
    }
    read(clock)
}

/// CPU time that this process has used so far. While a round of plain io_uring runs, nothing else runs in it.
pub(crate) fn of_self() -> Result<Duration> {
    read(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn read(clock: libc::clockid_t) -> Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a local that lives through the call.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(format!("CPU time: {}", std::io::Error::last_os_error()).into());
    }
    Ok(Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec)?))
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident_bytes(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}
