//! How much memory is left: to this machine, and to the control group that this process is in.

use std::fs::read_to_string;
use std::path::Path;

/// Bytes that can be had without anything being killed or swapped out. What cannot be told limits nothing.
pub(super) fn left_bytes() -> u64 {
    let text = read_to_string("/proc/meminfo").unwrap_or_default();
    let of_machine = number_after(&text, "MemAvailable:").map(|kib| kib * 1024);
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let of_group = group.and_then(|group| left_to_group(&Path::new("/sys/fs/cgroup").join(group)));
    of_machine.into_iter().chain(of_group).min().unwrap_or(u64::MAX)
}

/// None if it may have all that there is. Cached files make way.
fn left_to_group(group: &Path) -> Option<u64> {
    let read = |name: &str| read_to_string(group.join(name)).ok();
    let (most, used) = (read("memory.max")?.trim().parse::<u64>().ok()?, read("memory.current")?.trim().parse().ok()?);
    let cached = number_after(&read("memory.stat")?, "file").unwrap_or(0);
    Some(most.saturating_sub(u64::saturating_sub(used, cached)))
}

fn number_after(text: &str, name: &str) -> Option<u64> {
    let mut words =
        text.lines().map(str::split_whitespace).find_map(|mut words| (words.next() == Some(name)).then_some(words))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_to_a_group_is_its_limit_without_what_it_needs() {
        let group = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(group.path().join(name), text).unwrap();
        assert_eq!(left_to_group(group.path()), None, "there is no limit to be read");
        put("memory.max", "1000\n");
        put("memory.current", "700\n");
        put("memory.stat", "anon 300\nfile 400\nfile_mapped 5\n");
        assert_eq!(left_to_group(group.path()), Some(700));
        put("memory.max", "max\n");
        assert_eq!(left_to_group(group.path()), None);
    }

    #[test]
    fn this_machine_has_some_left() {
        assert!(left_bytes() > 1 << 20);
    }
}
