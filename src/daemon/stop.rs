//! The end of the daemon: all requests done, all sockets closed, everything saved.
//!
//! What always holds: each disk ends by itself, so that one that hangs keeps no other from being saved; all of
//! it takes [`STOP_WAIT`] at most, which is less than a service manager waits. What hangs by then is as after a kill.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::control::api::JobState;
use crate::daemon::ServeError;
use crate::host::receive;
use crate::manager::entry::{DiskEntry, locked};
use crate::manager::{HouseNews, Manager};

/// How what was done to a disk ended; None if it hangs.
type Ended = Option<Result<(), String>>;

/// How long all of it may take: less than the 90 s that the unit in qemu/systemd gives a stop.
const STOP_WAIT: Duration = Duration::from_secs(80);
/// How long requests may take of that to end, and then jobs and other threads; the rest is for saving.
const REQUESTS_WAIT: Duration = Duration::from_secs(30);
const THREADS_WAIT: Duration = Duration::from_secs(10);
/// How long commands that are under way may take to end first.
const CLAIMS_WAIT: Duration = Duration::from_secs(10);

impl Manager {
    /// Finishes all requests, closes all sockets and saves everything.
    ///
    /// # Errors
    /// When some disk could not be saved, or hangs; all others are.
    pub fn stop(&self) -> Result<(), ServeError> {
        let deadline = self.host.now() + STOP_WAIT;
        self.going_down();
        for job in self.running_jobs() {
            job.pace.stop();
        }
        // Whatever is being changed is changed now, and nothing is after this.
        for left in self.wait_unclaimed(CLAIMS_WAIT) {
            log::error!("'{left}' is still under way, and is not waited for");
        }
        let disks = self.all_disks();
        let ended = self.for_each_disk(&disks, self.host.now() + REQUESTS_WAIT, |_, disk| {
            // Requests may still wait for a volume, when the start ends half way.
            disk.disk.lose_restore("the daemon is going down");
            disk.stop_server();
            disk.stop_abandoned();
            for snapshot in disk.snapshots() {
                let server = locked(&snapshot.server).take();
                drop(server);
            }
            Ok(())
        });
        if self.house.send(HouseNews::Stopping).is_err() {
            log::debug!("the housekeeper has left already");
        }
        let threads_left = self.join_threads(self.host.now() + THREADS_WAIT);
        // What a job or a command still changes must not be sealed.
        let is_ended = |disk: &&Arc<DiskEntry>| {
            let has_ended = ended.iter().any(|(of, done)| Arc::ptr_eq(of, disk) && *done == Some(Ok(())));
            has_ended
                && self.job_on(disk, |job| job.state() == JobState::Running).is_none()
                && !self.is_being_changed(disk.id)
                && !self.is_name_claimed(&disk.name.get())
        };
        let quiet: Vec<Arc<DiskEntry>> = disks.iter().filter(is_ended).cloned().collect();
        let saved = self.for_each_disk(&quiet, deadline, |manager, disk| {
            // No request is left, so every version is quiesced.
            for snapshot in disk.snapshots().iter().filter(|s| !s.is_lost) {
                manager.store_and_record_quiesced(disk, snapshot);
            }
            manager.save(disk)
        });
        let mut unsaved = None;
        let mut hung: Vec<String> = disks.iter().filter(|d| !is_ended(d)).map(|d| d.name.to_string()).collect();
        for (disk, done) in saved {
            match done {
                Some(Ok(())) => {}
                Some(Err(e)) => {
                    let what = format!("disk {} could not be saved: {e}", disk.name);
                    log::error!("{what}");
                    unsaved = Some(what);
                }
                None => hung.push(disk.name.to_string()),
            }
        }
        match (hung.is_empty(), unsaved) {
            (false, _) => Err(ServeError::Hung(format!(
                "these did not end in time: {}; their sockets are closed, and the kernel may keep this process until their \
                 storage answers",
                hung.join(", ")
            ))),
            (true, _) if threads_left > 0 => {
                Err(ServeError::Hung(format!("{threads_left} threads did not end in time")))
            }
            (true, Some(what)) => Err(ServeError::Unsaved(what)),
            (true, None) => Ok(()),
        }
    }

    /// Does something to each disk side by side, until the deadline. None of those that hang.
    fn for_each_disk(
        &self,
        disks: &[Arc<DiskEntry>],
        deadline: Instant,
        work: impl Fn(&Manager, &Arc<DiskEntry>) -> Result<(), String> + Clone + Send + 'static,
    ) -> Vec<(Arc<DiskEntry>, Ended)> {
        let begin = |disk: &Arc<DiskEntry>| {
            let (me, of, work, (tell, told)) = (self.me.clone(), disk.clone(), work.clone(), channel());
            let run = move || {
                let Some(manager) = me.upgrade() else { return };
                let done = work(&manager, &of);
                // Whoever is told may be the last one that has it, and closes the records.
                drop(manager);
                if tell.send(done).is_err() {
                    log::debug!("disk {}: nobody waits for it any more", of.name);
                }
            };
            // None of those that a stop joins: it has a time of its own.
            if let Err(e) = self.host.start_thread("stop", Box::new(run)) {
                log::error!("disk {}: no thread can end it: {e}", disk.name);
            }
            (disk.clone(), told)
        };
        let begun: Vec<_> = disks.iter().map(begin).collect();
        let wait = |(disk, told): (Arc<DiskEntry>, std::sync::mpsc::Receiver<Result<(), String>>)| {
            let done = receive(&*self.host, &told, deadline.saturating_duration_since(self.host.now())).ok();
            (disk, done)
        };
        begun.into_iter().map(wait).collect()
    }

    /// Joins the threads that end in time. Returns how many do not. A thread may start another one before it ends, and must
    /// not wait for us.
    fn join_threads(&self, deadline: Instant) -> usize {
        loop {
            let mut threads = std::mem::take(&mut *locked(&self.threads));
            for ended in threads.extract_if(.., |t| t.is_ended()) {
                if ended.join() {
                    log::error!("a thread panicked");
                }
            }
            if threads.is_empty() && locked(&self.threads).is_empty() {
                return 0;
            }
            let left = threads.len();
            locked(&self.threads).extend(threads);
            if self.host.now() >= deadline {
                return left;
            }
            self.host.pause(Duration::from_millis(5));
        }
    }
}
