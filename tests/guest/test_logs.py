"""Write-logging snapshots: a guest goes on in a log, which is folded back into the raw image under it."""

import os

import kit
import test_guests
from kit import require

SEED = test_guests.SEED
# Files that nobody changes, in VLUN A and in the log: the guest can verify them at any time, beside its load.
STILL_FILES = 30
# Enough in the log that a fold takes a while.
FILL_MIB = 12
DELAY_MS = 5


class Logs(test_guests.GuestTest):
    def _until_a_log_is_there(self):
        """A guest whose load goes on in a log, and the bounds of what the snapshot may hold."""
        disk = self.data_disk(queues=2)
        daemon = self.daemon(disk, needs="writes_logs")
        guest = self.guest(daemon, disk, cpus=2)
        guest.mount("/dev/vda")
        self.make_still(guest, "before")
        load = guest.start_load("/mnt", SEED)
        load.require_progress(files=20)
        finished_before = load.marks()
        snapshot = daemon.snapshot_create(disk, "daily", "write-logging")
        require(snapshot.state == "quiesced", f"after --wait the snapshot is {snapshot.state}")
        load.phase("during")
        bounds = finished_before, load.marks()
        self.make_still(guest, "after")
        guest.run(f"dd if=/dev/urandom of=/mnt/fill bs=1M count={FILL_MIB} conv=fsync 2>/dev/null && sha256sum /mnt/fill "
                  ">/tmp/fill")
        load.require_progress()
        return disk, daemon, guest, load, snapshot, bounds

    def make_still(self, guest, name):
        guest.run(f"mkdir /mnt/{name} && hs-guest quick /mnt/{name} {SEED} {STILL_FILES} && sync")

    def require_still(self, guest):
        """Everything that the load does not write is read from the disk again."""
        guest.run("echo 3 >/proc/sys/vm/drop_caches")
        for name in ("before", "after"):
            require(guest.verify(f"/mnt/{name}", SEED).files == {0: STILL_FILES}, f"/mnt/{name} misses files")
        guest.run("sha256sum -c /tmp/fill >/dev/null")

    def require_vlun_a(self, disk, daemon, bounds, load, again=True):
        """A second guest copies the frozen disk out, and the copy is judged."""
        snapshot = self.served(daemon, disk, "daily")
        copy = kit.back_up(self.workspace, snapshot, disk.path.stat().st_size, load.require_progress, again)
        kit.judge_image(self.workspace, copy, SEED, *bounds)
        return kit.sha256(copy)

    def require_one_raw_image(self, disk, daemon, guest, load, snapshot):
        """After the fold: nothing but the raw image is left, and it is what the guest saw."""
        require(daemon.snapshots() == [], "the snapshot is still listed")
        load.require_progress()
        load.stop()
        guest.verify("/mnt", SEED, load.marks())
        self.require_still(guest)
        guest.run("umount /mnt; echo 3 >/proc/sys/vm/drop_caches")
        seen = guest.run("sha256sum </dev/vda", 240).split()[0]
        guest.require_no_io_errors()
        guest.power_off()
        daemon.stop()
        require(not os.path.exists(snapshot.image), f"{snapshot.image} is still there")
        left = [path.name for path in (daemon.state_dir / "images").iterdir()]
        require(not left, f"images are left: {left}")
        require(kit.sha256(disk.path) == seen, "the raw image is not what the guest saw last")
        kit.judge_image(self.workspace, disk.path, SEED, load.marks())

    def test_log_is_folded_under_the_running_guest(self):
        disk, daemon, guest, load, snapshot, bounds = self._until_a_log_is_there()
        frozen = self.require_vlun_a(disk, daemon, bounds, load)
        require(kit.sha256(disk.path) == frozen, "the raw image did not stay with VLUN A")
        deletion, job = daemon.snapshot_delete_slowly(disk, "daily", DELAY_MS)
        require(job["kind"] == "fold", f"the job is {job}")
        load.require_progress()
        self.require_still(guest)
        require([j["id"] for j in daemon.jobs()] == [job["id"]], "the fold was over before the guest had done anything")
        daemon.set_pace(job, 0)
        deletion.wait()
        self.require_one_raw_image(disk, daemon, guest, load, snapshot)

    def test_log_and_its_fold_outlive_kills_of_the_daemon(self):
        disk, daemon, guest, load, snapshot, bounds = self._until_a_log_is_there()
        daemon.kill()
        daemon.start()
        load.require_progress()
        self.require_still(guest)
        self.require_vlun_a(disk, daemon, bounds, load, again=False)
        deletion, job = daemon.snapshot_delete_slowly(disk, "daily", DELAY_MS)
        kit.eventually("some blocks are folded", lambda: daemon.jobs()[0]["done_bytes"] > 64 << 12)
        load.require_progress()
        daemon.kill()
        deletion.wait(status=1)
        daemon.start()
        # The fold is taken up again by itself.
        kit.eventually("the snapshot is gone", lambda: daemon.snapshots() == [])
        self.require_one_raw_image(disk, daemon, guest, load, snapshot)
