//! The daemon, the guest beside the hostile one, and what must be true in the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;

use crate::harness::{Daemon, wait_until};
use crate::ring::Guest;

pub(crate) const SIZE: u64 = 64 << 20;
/// What the allocator keeps of threads that have ended.
const MAPS_KEPT: usize = 60;

pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    neighbour: Option<JoinHandle<()>>,
    over: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    before: Taken,
    cuts: u32,
}

/// What the process has of the system.
#[derive(Clone, Copy, Debug)]
struct Taken {
    maps: usize,
    descriptors: usize,
    threads: usize,
}

impl Scene {
    pub(crate) fn new() -> Scene {
        Scene::with(|_| String::new())
    }

    /// The same, with options of the disk at which the hostile frontend is.
    pub(crate) fn with(options: impl FnOnce(&Daemon) -> String) -> Scene {
        let mut daemon = Daemon::place();
        daemon.make_image("vm0", SIZE);
        daemon.make_image("vm1", SIZE);
        let options = options(&daemon);
        daemon.arg_disk("vm0", &options);
        daemon.arg_disk("vm1", "");
        daemon.start();
        let (over, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut client = daemon.client("vm1");
        let (is_over, count) = (over.clone(), served.clone());
        let neighbour = std::thread::spawn(move || {
            for tag in 1.. {
                let at = (tag as usize * 8) % 4096;
                client.write(at..at + 8, tag);
                assert_eq!(client.tag(at + 7), tag);
                count.fetch_add(1, SeqCst);
                if is_over.load(SeqCst) {
                    return;
                }
            }
        });
        let before = Taken { maps: 0, descriptors: 0, threads: 0 };
        let mut scene = Scene { daemon, neighbour: Some(neighbour), over, served, before, cuts: 0 };
        // What is made once and kept is made before it is counted.
        for _ in 0..2 {
            drop(Guest::new(&scene.socket(), 1));
            scene.left();
            scene.others_go_on();
        }
        scene.before = scene.taken();
        scene
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.daemon.socket("vm0")
    }

    /// Waits until nobody is at the hostile one's disk.
    #[track_caller]
    pub(crate) fn left(&self) {
        wait_until("the hostile frontend to be gone", || self.daemon.show_disk("vm0")["frontends"] == 0);
    }

    /// The neighbour's requests are answered, and a snapshot of its disk is quiesced.
    #[track_caller]
    pub(crate) fn others_go_on(&mut self) {
        self.daemon.require_running();
        self.cuts += 1;
        let name = format!("s{}", self.cuts);
        self.daemon.snapshot(&name, &["vm1"]);
        self.daemon.delete(&format!("vm1@{name}"));
        let now = self.served.load(SeqCst);
        let neighbour = self.neighbour.as_ref().unwrap();
        wait_until("the neighbour", || self.served.load(SeqCst) > now + 20 || neighbour.is_finished());
        assert!(!neighbour.is_finished(), "a request of the neighbour's has failed");
    }

    fn taken(&self) -> Taken {
        let at = format!("/proc/{}", self.daemon.pid());
        let count = |what: &str| std::fs::read_dir(format!("{at}/{what}")).unwrap().count();
        let maps = std::fs::read_to_string(format!("{at}/maps")).unwrap().lines().count();
        Taken { maps, descriptors: count("fd"), threads: count("task") }
    }

    /// The most memory that the daemon has had since [`Scene::forget_peak`], in bytes.
    pub(crate) fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    pub(crate) fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.daemon.pid()), "5").unwrap();
    }

    /// Everything is as it was.
    #[track_caller]
    pub(crate) fn end(mut self) {
        self.left();
        self.others_go_on();
        let before = self.before;
        let mut now = self.taken();
        wait_until("all that was taken to be given back", || {
            now = self.taken();
            let is_back = now.maps <= before.maps + MAPS_KEPT
                && now.descriptors <= before.descriptors
                && now.threads <= before.threads;
            if !is_back {
                println!("{now:?}, and it was {before:?}");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            is_back
        });
        self.over.store(true, SeqCst);
        self.neighbour.take().unwrap().join().expect("a request of the neighbour's has failed");
        self.daemon.stop();
    }
}
