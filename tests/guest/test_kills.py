"""One guest through many kills of its daemon, with snapshots taken and deleted in between. The guest must not notice."""

import random
import time

import kit
import test_guests
from kit import Guest, require

SEED = test_guests.SEED
KILLS = 20
STRATEGIES = ("copy-on-write", "write-logging")
SNAPSHOTS_MAX = 4


class Kills(test_guests.GuestTest):
    def test_guest_goes_on_through_twenty_kills(self):
        seed = time.time_ns()
        print(f"seed {seed}", flush=True)
        rng = random.Random(seed)
        disk = self.data_disk(queues=2)
        daemon = self.daemon(disk, needs="keeps_snapshots")
        guest = self.guest(daemon, disk, cpus=2)
        guest.mount("/dev/vda")
        load = guest.start_load("/mnt", SEED)
        bounds = {}
        for kill in range(KILLS):
            load.require_progress(files=2, block_writes=8)
            if len(bounds) < SNAPSHOTS_MAX and kill % 2 == 0:
                self._take(daemon, disk, load, bounds, f"s{kill}", STRATEGIES[kill // 10])
            deletion = None
            if len(bounds) > 2 and kill % 4 == 3:
                name = rng.choice(list(bounds))
                del bounds[name]
                deletion = self.workspace.start(f"delete-{name}", [daemon.binary, "--control", daemon.control, "snapshot",
                                                                   "delete", f"{disk.name}@{name}"])
            # At any moment, also amid the deletion.
            time.sleep(rng.random() / 10)
            daemon.kill()
            daemon.start()
            if deletion:
                deletion.wait(status=None)
                kit.eventually("the deletion is over", lambda: self._is_gone(daemon, disk, name))
            for name in bounds:
                state = daemon.snapshot_show(disk, name).state
                require(state == "quiesced", f"after kill {kill} {name} is {state}")
        load.require_progress(files=2, block_writes=8)
        self._judge_all(daemon, disk, bounds)
        load.stop()
        guest.verify("/mnt", SEED, load.marks())
        guest.require_no_io_errors()
        guest.power_off()
        for name in bounds:
            daemon.snapshot_delete(disk, name)
        require(daemon.snapshots() == [], "a snapshot is still listed")
        daemon.stop()
        kit.judge_image(self.workspace, disk.path, SEED, load.marks())

    def _take(self, daemon, disk, load, bounds, name, strategy):
        before = load.marks()
        snapshot = daemon.snapshot_create(disk, name, strategy)
        require(snapshot.state == "quiesced", f"after --wait {name} is {snapshot.state}")
        load.phase(name)
        bounds[name] = before, load.marks()

    def _is_gone(self, daemon, disk, name):
        """A deletion that was begun goes on by itself; one whose command the kill came before is asked for again."""
        if len(daemon.snapshots()) == 0 or daemon.ask("snapshot", "show", f"{disk.name}@{name}", status=None).returncode:
            return True
        daemon.ask("snapshot", "delete", f"{disk.name}@{name}", status=None)
        return False

    def _judge_all(self, daemon, disk, bounds):
        """One backup guest copies every snapshot out, and each copy is judged."""
        snapshots = {name: daemon.snapshot_show(disk, name) for name in bounds}
        require(len(snapshots) >= 2, f"only {list(snapshots)} are left")
        copies = {}
        for name in snapshots:
            copies[name] = self.workspace.path / f"{name}-copy.raw"
            with open(copies[name], "wb") as file:
                file.truncate(disk.path.stat().st_size)
        disks = [(snapshot.socket, 1) for snapshot in snapshots.values()] + list(copies.values())
        backup = Guest(self.workspace, "guest2", disks)
        letters = "abcdefghijklmnop"
        for i in range(len(copies)):
            source, target = f"/dev/vd{letters[i]}", f"/dev/vd{letters[i + len(copies)]}"
            backup.run(f"dd if={source} of={target} bs=1M conv=fsync 2>/dev/null", 240)
        backup.require_no_io_errors()
        backup.power_off()
        for name, copy in copies.items():
            kit.judge_image(self.workspace, copy, SEED, *bounds[name])
