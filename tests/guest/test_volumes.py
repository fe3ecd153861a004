"""Volumes, which a second guest mounts, repairs and changes while the first goes on; and disks that are taken back."""

import json
import pathlib

import kit
import test_guests
from kit import Disk, Guest, require

SEED = test_guests.SEED


class Volumes(test_guests.GuestTest):
    def volume(self, daemon, name, source):
        """Makes a volume; returns what `volume show` says of it."""
        daemon.ask("volume", "create", name, "--from", source)
        return json.loads(daemon.ask("volume", "show", name, "--json").stdout)

    def require_clean(self, path):
        """A file system that was unmounted: nothing to replay, nothing to repair."""
        require("needs_recovery" not in kit.run("dumpe2fs", "-h", path).stdout, "its journal was not replayed")
        kit.run("e2fsck", "-fn", path)

    def test_a_second_guest_mounts_a_volume_and_replays_its_journal(self):
        disk = self.data_disk(queues=2)
        daemon = self.daemon(disk, needs="makes_volumes")
        guest = self.guest(daemon, disk, cpus=2)
        guest.mount("/dev/vda")
        load = guest.start_load("/mnt", SEED)
        load.require_progress(files=20)
        finished_before = load.marks()
        snapshot = daemon.snapshot_create(disk, "daily")
        load.phase("during")
        known_after = load.marks()
        size_bytes = disk.path.stat().st_size
        before = kit.sha256(kit.back_up(self.workspace, snapshot, size_bytes, load.require_progress, again=False))

        # A disk that was frozen under a running guest looks as after a crash. A read-write mount replays its journal.
        volume = self.volume(daemon, "clone", "vm1@daily")
        scratch = self.workspace.path / "volume-copied-out.raw"
        with open(scratch, "wb") as file:
            file.truncate(size_bytes)
        other = Guest(self.workspace, "guest3", [(pathlib.Path(volume["socket"]), 1), scratch])
        require(other.run("blockdev --getro /dev/vda") == "0", "a volume is writable, and the guest sees it read-only")
        other.mount("/dev/vda")
        require("recovery complete" in other.run("dmesg"), "there was no journal to replay")
        verdict = other.verify("/mnt", SEED, finished_before)
        for thread, number in known_after.files.items():
            require(verdict.files.get(thread, 0) <= number + 1, f"thread {thread} has files from after the snapshot")
        # It is a disk like any other: what is written stays through a reboot of its guest, without the source's files.
        other.run(f"mkdir /mnt/own && hs-guest quick /mnt/own {SEED} 20 && umount /mnt")
        other.reboot()
        other.mount("/dev/vda")
        require(other.verify("/mnt/own", SEED).files == {0: 20}, "what was written to the volume is gone")
        other.run("umount /mnt && dd if=/dev/vda of=/dev/vdb bs=1M conv=fsync 2>/dev/null", 240)
        other.require_no_io_errors()
        other.power_off()
        self.require_clean(scratch)

        # Neither the frozen version nor the running disk has changed by that.
        load.require_progress()
        again = kit.back_up(self.workspace, daemon.snapshot_show(disk, "daily"), size_bytes, load.require_progress, False)
        require(kit.sha256(again) == before, "the snapshot changed while a volume on it was written")
        kit.judge_image(self.workspace, again, SEED, finished_before, known_after)
        load.stop()
        guest.verify("/mnt", SEED, load.marks())
        require(guest.run("ls -d /mnt/own", status=None).startswith("ls:"), "the volume's files are on the disk")
        guest.require_no_io_errors()
        guest.power_off()
        daemon.ask("volume", "delete", "clone")
        daemon.snapshot_delete(disk, "daily")
        daemon.stop()
        kit.judge_image(self.workspace, disk.path, SEED, load.marks())

    def test_a_wrecked_root_disk_is_restored_and_boots_at_once(self):
        disk = Disk.copy_of(self.workspace, "vm1", kit.KIT / "root.img")
        daemon = self.daemon(disk, needs="makes_volumes")
        guest = self.guest(daemon, disk, root="/dev/vda")
        guest.run(f"mkdir -p /srv && hs-guest quick /srv {SEED} 10 && sync")
        daemon.snapshot_create(disk, "daily")
        # What a user fears: the guest's system is overwritten, with everything that is on it.
        guest.run("sync; dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null", status=None)
        busy = daemon.ask("disk", "restore", "vm1", "--from", "vm1@daily", status=1)
        require("frontend" in busy.stderr, f"a disk in use is to be restored only by force: {busy.stderr}")
        guest.kill()
        kit.eventually("the frontend has gone", lambda: not self.disk(daemon, "vm1")["connected"])

        # Slowly, so that the guest boots from a disk that is brought back block by block.
        daemon.ask("disk", "restore", "vm1", "--from", "vm1@daily", "--delay-ms", "20")
        guest = self.guest(daemon, disk, name="guest2", root="/dev/vda")
        require("root=/dev/vda" in guest.ready, f"the guest did not boot from the restored disk: {guest.ready}")
        job = next(iter(daemon.jobs()), None)
        require(job and job["kind"] == "restore", f"the restore was over before the guest was up: {job}")
        require(guest.verify("/srv", SEED).files == {0: 10}, "files are missing on the restored disk")
        guest.run(f"mkdir -p /srv/after && hs-guest quick /srv/after {SEED} 10 && sync")
        daemon.kill()
        daemon.start()
        require(guest.verify("/srv", SEED).files == {0: 10}, "files are missing after the daemon was killed")
        daemon.set_pace(next(iter(daemon.jobs())), 0)
        kit.eventually("the restore ends", lambda: self.disk(daemon, "vm1")["restoring"] is None)
        for directory in ("/srv", "/srv/after"):
            require(guest.verify(directory, SEED).files == {0: 10}, f"files are missing in {directory}")
        guest.require_no_io_errors()
        guest.power_off()
        daemon.snapshot_delete(disk, "daily")
        daemon.stop()
        kit.run("e2fsck", "-fy", "-E", "journal_only", disk.path, status=None)
        kit.run("e2fsck", "-fn", disk.path)

    def disk(self, daemon, name):
        return json.loads(daemon.ask("disk", "show", name, "--json").stdout)
