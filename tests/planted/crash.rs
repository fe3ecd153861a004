//! Named moments at which a test kills the program: before and after each step that outlives it.
//!
//! What always holds: HALFSILVER_CRASH_AT=N:NAME kills the process when it comes to that point for the N-th time, as
//! `kill -9` would, and says so on standard error. `N:*` is the N-th point of any name, those around answers left out:
//! guests come to them whenever they like. Without it a point does nothing. In the crate itself, `src/crash.rs`, it never does.

/// A point; the test's list in `tests/daemon/kills/points.rs` has its name.
pub(crate) fn point(name: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static AT: LazyLock<Option<(u64, String)>> = LazyLock::new(|| {
        let at = std::env::var("HALFSILVER_CRASH_AT").ok()?;
        let (count, name) = at.split_once(':').expect("HALFSILVER_CRASH_AT is N:NAME");
        Some((count.parse().expect("HALFSILVER_CRASH_AT begins with a number"), name.to_owned()))
    });
    static PASSED: AtomicU64 = AtomicU64::new(0);
    let Some((count, at)) = &*AT else { return };
    let is_it = at == name || (at == "*" && !name.contains("answers"));
    if is_it && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *count {
        eprintln!("crash point: {name}");
        let killed = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        unreachable!("a process outlives its end: {killed:?}");
    }
}
