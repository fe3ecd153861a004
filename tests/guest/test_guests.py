"""What a Linux guest and a backup guest see of a halfsilver disk. Each test starts its own daemon and guests."""

import unittest

import kit
from kit import Disk, Guest, Workspace, require

SEED = 7
DISK_MIB = 64


class GuestTest(unittest.TestCase):
    def setUp(self):
        self.workspace = Workspace(self.id().rsplit(".", 1)[-1].removeprefix("test_").replace("_", "-")[:24])
        self.addCleanup(self._leave)

    def _leave(self):
        outcome = self._outcome.result
        failed = any(test is self for test, _ in outcome.failures + outcome.errors)
        self.workspace.__exit__(AssertionError if failed else None, None, None)
        if failed:
            print(f"{self.workspace.logs()}\nlogs and disks: {self.workspace.path}", flush=True)

    def daemon(self, *disks, needs=None):
        """Serves the disks. `needs` names what only halfsilver can do, and the stand-in cannot."""
        daemon = kit.backend(self.workspace, list(disks))
        if needs and not getattr(daemon, needs):
            self.skipTest(f"{daemon.name} has no {needs}")
        return daemon.start()

    def data_disk(self, **options):
        return Disk.create(self.workspace, "vm1", DISK_MIB, **options)

    def served(self, daemon, disk, name):
        """The snapshot, when it can be read."""
        def look():
            snapshot = daemon.snapshot_show(disk, name)
            return snapshot if snapshot.state == "quiesced" and snapshot.socket.exists() else None
        return kit.eventually(f"{disk.name}@{name} is served", look)

    def guest(self, daemon, *disks, name="guest1", **options):
        return Guest(self.workspace, name, [(daemon.socket(disk), disk.queues) for disk in disks], **options)


class Disks(GuestTest):
    def test_data_disk_keeps_its_files_through_a_reboot_of_the_guest(self):
        disk = self.data_disk()
        daemon = self.daemon(disk)
        guest = self.guest(daemon, disk)
        guest.mount("/dev/vda")
        load = guest.start_load("/mnt", SEED)
        load.require_progress(files=20)
        load.stop()
        # Not unmounted: the reset comes while the driver has the disk.
        guest.reboot()
        guest.mount("/dev/vda")
        guest.verify("/mnt", SEED, load.marks())
        again = guest.start_load("/mnt", SEED)
        again.require_progress()
        again.stop()
        guest.require_no_io_errors()
        guest.power_off()
        daemon.stop()
        kit.judge_image(self.workspace, disk.path, SEED, again.marks())

    def test_data_disk_survives_a_reset_with_requests_in_flight(self):
        disk = self.data_disk()
        daemon = self.daemon(disk)
        guest = self.guest(daemon, disk)
        guest.mount("/dev/vda")
        load = guest.start_load("/mnt", SEED)
        load.require_progress()
        finished = load.marks()
        guest.reboot()
        guest.mount("/dev/vda")
        guest.verify("/mnt", SEED, finished)
        guest.require_no_io_errors()
        guest.power_off()
        daemon.stop()

    def test_root_disk_boots_through_a_reboot(self):
        disk = Disk.copy_of(self.workspace, "vm1", kit.KIT / "root.img")
        daemon = self.daemon(disk)
        guest = self.guest(daemon, disk, root="/dev/vda")
        require("root=/dev/vda" in guest.ready, f"the guest did not boot from the disk: {guest.ready}")
        guest.run(f"mkdir -p /srv && hs-guest quick /srv {SEED} 10 && sync")
        guest.reboot()
        require("root=/dev/vda" in guest.ready, f"the guest did not boot again from the disk: {guest.ready}")
        require(guest.verify("/srv", SEED).files == {0: 10}, "files are missing after the reboot")
        guest.require_no_io_errors()
        guest.power_off()
        daemon.stop()
        kit.run("e2fsck", "-fy", "-E", "journal_only", disk.path, status=None)
        kit.run("e2fsck", "-fn", disk.path)

    def test_several_queues_carry_requests(self):
        disk = self.data_disk(queues=4)
        daemon = self.daemon(disk)
        guest = self.guest(daemon, disk, cpus=4)
        queues = guest.run("ls /sys/block/vda/mq").split()
        require(len(queues) == 4, f"the guest sees the queues {queues}, not 4")
        guest.mount("/dev/vda")
        # One writer tied to each CPU, and so to each queue.
        guest.run("for c in 0 1 2 3; do mkdir /mnt/c$c; "
                  f"taskset $((1 << c)) hs-guest quick /mnt/c$c {SEED} 15 >/dev/null & done; wait")
        interrupts = guest.run("grep -E 'virtio.*-req' /proc/interrupts")
        for queue in range(4):
            line = next((text for text in interrupts.splitlines() if text.endswith(f"-req.{queue}")), "")
            require(any(int(word) for word in line.split()[1:5] if word.isdigit()),
                    f"queue {queue} never completed a request:\n{interrupts}")
        for queue in range(4):
            require(guest.verify(f"/mnt/c{queue}", SEED).files == {0: 15}, f"CPU {queue} misses files")
        guest.require_no_io_errors()
        guest.power_off()
        daemon.stop()

    def test_frontend_leaves_and_comes_back(self):
        disk = self.data_disk(queues=2)
        daemon = self.daemon(disk)
        finished = None
        for leave in (Guest.quit, Guest.kill, Guest.power_off):
            guest = self.guest(daemon, disk, cpus=2)
            guest.mount("/dev/vda")
            if finished:
                guest.verify("/mnt", SEED, finished)
            load = guest.start_load("/mnt", SEED)
            load.require_progress()
            finished = load.marks()
            guest.require_no_io_errors()
            leave(guest)
            daemon.child.require_alive()
        daemon.stop()
        kit.judge_image(self.workspace, disk.path, SEED, finished)

    def test_guest_goes_on_when_the_daemon_is_restarted(self):
        self._restart(lambda daemon: daemon.stop())

    def test_guest_goes_on_when_the_daemon_is_killed(self):
        self._restart(lambda daemon: daemon.kill())

    def _restart(self, end):
        disk = self.data_disk(queues=2)
        daemon = self.daemon(disk)
        guest = self.guest(daemon, disk, cpus=2)
        guest.mount("/dev/vda")
        load = guest.start_load("/mnt", SEED)
        for _ in range(4):
            load.require_progress()
            end(daemon)
            daemon.start()
            load.require_progress()
        load.stop()
        guest.verify("/mnt", SEED, load.marks())
        guest.require_no_io_errors()
        guest.power_off()
        daemon.stop()
        kit.judge_image(self.workspace, disk.path, SEED, load.marks())

    def test_an_image_in_use_is_refused_to_other_writers(self):
        disk = self.data_disk(ext4=False)
        daemon = self.daemon(disk, needs="locks_images")
        write = ("qemu-io", "-f", "raw", "-c", "write 0 64k", disk.path)
        kit.run(*write, status=1, text="lock")
        kit.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", kit.KIT / "root.img", disk.path,
                status=1, text="lock")
        kit.run("timeout", "20", "qemu-system-x86_64", "-accel", "tcg", "-S", "-nodefaults", "-display", "none",
                "-drive", f"file={disk.path},format=raw", status=1, text="lock")
        daemon.stop()
        kit.run(*write)


class Snapshots(GuestTest):
    def test_backup_guest_copies_the_frozen_disk_while_the_guest_writes(self):
        disk = self.data_disk(queues=2)
        daemon = self.daemon(disk)
        guest = self.guest(daemon, disk, cpus=2)
        guest.mount("/dev/vda")
        load = guest.start_load("/mnt", SEED)
        load.require_progress(files=20)
        finished_before = load.marks()
        snapshot = daemon.snapshot_create(disk, "daily")
        require(snapshot.state == "quiesced", f"after --wait the snapshot is {snapshot.state}")
        load.phase("during")
        known_after = load.marks()
        copy = kit.back_up(self.workspace, snapshot, disk.path.stat().st_size, load.require_progress)
        kit.judge_image(self.workspace, copy, SEED, finished_before, known_after)
        owned = daemon.snapshot_show(disk, "daily").owned_bytes
        require(owned > 0, "the guest has overwritten blocks, and VLUN A owns none")
        metrics = daemon.metrics()
        if metrics is not None:
            counted = sum(value for name, value in metrics.items()
                          if name.startswith("halfsilver_preserved_bytes_total"))
            require(counted > 0, "halfsilver_preserved_bytes_total counts nothing")
            require(kit.served_within({}, metrics, disk, "write"), "the daemon's histogram has no write of vm1")
        daemon.snapshot_delete(disk, "daily")
        require(daemon.snapshots() == [], "the snapshot is still listed")
        require(not snapshot.socket.exists(), f"{snapshot.socket} is still there")
        load.require_progress()
        load.stop()
        guest.verify("/mnt", SEED, load.marks())
        guest.require_no_io_errors()
        guest.power_off()
        daemon.stop()
        kit.judge_image(self.workspace, disk.path, SEED, load.marks())

    def test_frozen_disk_refuses_writes_of_the_backup_guest(self):
        disk = self.data_disk()
        daemon = self.daemon(disk)
        snapshot = daemon.snapshot_create(disk, "daily")
        backup = Guest(self.workspace, "guest2", [(snapshot.socket, 1)])
        require(backup.run("blockdev --getro /dev/vda") == "1", "VLUN A is not read-only")
        backup.run("dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync", status=1)
        # The driver keeps a read-only flag of its own; without it the request reaches the daemon.
        backup.run("blockdev --setrw /dev/vda; dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync 2>&1; "
                   "echo 3 >/proc/sys/vm/drop_caches")
        seen = backup.run("sha256sum </dev/vda").split()[0]
        require(seen == kit.sha256(disk.path), "VLUN A is no longer what the disk was")
        backup.power_off()
        daemon.stop()

    def test_snapshot_keeps_its_content_when_the_daemon_is_restarted_and_killed(self):
        disk = self.data_disk(queues=2)
        daemon = self.daemon(disk, needs="keeps_snapshots")
        guest = self.guest(daemon, disk, cpus=2)
        guest.mount("/dev/vda")
        load = guest.start_load("/mnt", SEED)
        load.require_progress()
        finished_before = load.marks()
        daemon.snapshot_create(disk, "daily")
        load.phase("during")
        known_after = load.marks()
        for end in (daemon.stop, daemon.kill):
            load.require_progress()
            end()
            daemon.start()
        load.require_progress()
        copy = kit.back_up(self.workspace, self.served(daemon, disk, "daily"), disk.path.stat().st_size, again=False)
        kit.judge_image(self.workspace, copy, SEED, finished_before, known_after)
        load.stop()
        guest.verify("/mnt", SEED, load.marks())
        guest.require_no_io_errors()
        guest.power_off()
        daemon.snapshot_delete(disk, "daily")
        daemon.stop()
        kit.judge_image(self.workspace, disk.path, SEED, load.marks())

    def test_image_of_the_frozen_disk_is_refused_to_other_writers(self):
        disk = self.data_disk(ext4=False)
        daemon = self.daemon(disk, needs="locks_images")
        snapshot = daemon.snapshot_create(disk, "daily")
        kit.run("qemu-io", "-f", "raw", "-c", "write 0 4k", snapshot.image, status=1, text="lock")
        daemon.snapshot_delete(disk, "daily")
        daemon.stop()
