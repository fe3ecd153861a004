"""QEMU's own vhost-user-blk backend behind the face of kit.Daemon: the control group of the guest tests.

`HS_BACKEND=stand-in scripts/test --only guest` runs the same tests on it. A test that fails there too is wrong about
the guest, QEMU or the machine; one that fails only on halfsilver has found a defect of halfsilver.
Its frozen version is a plain copy made while the whole daemon is stopped: the pause that halfsilver does without.
It does not outlive the daemon.
"""

import json
import signal
import socket

from kit import Snapshot, eventually, require, run


class StandIn:
    name = "qemu-storage-daemon"
    keeps_snapshots = False
    locks_images = False  # QEMU's exports share their image with other writers
    shares_disks = False  # an export takes one client
    writes_logs = False
    makes_volumes = False

    def __init__(self, workspace, disks):
        self.workspace, self.disks = workspace, disks
        self.run_dir = workspace.path / "run"
        self.child = None
        self.frozen = {}

    def socket(self, disk):
        return self.run_dir / f"{disk.name}.sock"

    def start(self):
        self.run_dir.mkdir(exist_ok=True)
        self.monitor_path = self.run_dir / "qmp.sock"
        for path in (self.monitor_path, *map(self.socket, self.disks)):
            path.unlink(missing_ok=True)  # left by one that was killed; a new socket file means that it listens
        command = ["qemu-storage-daemon",
                   "--chardev", f"socket,id=qmp,path={self.monitor_path},server=on,wait=off",
                   "--monitor", "chardev=qmp"]
        for disk in self.disks:
            command += [
                "--blockdev", f"driver=file,node-name={disk.name}-file,filename={disk.path},"
                              "cache.direct=on,discard=unmap",
                "--blockdev", f"driver=raw,node-name={disk.name},file={disk.name}-file",
                "--export", f"type=vhost-user-blk,id={disk.name},node-name={disk.name},writable=on,"
                            f"addr.type=unix,addr.path={self.socket(disk)},num-queues={disk.queues}"]
        self.child = self.workspace.start("daemon", command)
        eventually("the stand-in listens", lambda: self.child.require_alive() and
                   all(path.exists() for path in (self.monitor_path, *map(self.socket, self.disks))), 20)
        self.monitor = socket.socket(socket.AF_UNIX)
        self.monitor.settimeout(30)
        self.monitor.connect(str(self.monitor_path))
        self.answers = self.monitor.makefile("rb")
        self.answers.readline()
        self._do("qmp_capabilities")
        return self

    def stop(self):
        self.child.signal(signal.SIGTERM)
        self.child.wait(30)

    def kill(self):
        self.child.kill()

    def _do(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self.answers.readline())
            if "event" not in answer:
                require("return" in answer, f"{command}: {answer}")
                return answer["return"]

    def snapshot_create(self, disk, name, strategy="copy-on-write"):
        require(strategy == "copy-on-write", f"{self.name} has no {strategy}")
        # While the daemon stands still, the file holds every acknowledged write: a consistent cut.
        image = self.workspace.path / f"{disk.name}@{name}.image"
        self.child.signal(signal.SIGSTOP)
        try:
            run("cp", "--sparse=always", disk.path, image)
        finally:
            self.child.signal(signal.SIGCONT)
        frozen = f"{disk.name}-frozen"
        path = self.run_dir / f"{disk.name}@{name}.sock"
        self._do("blockdev-add", driver="raw", read_only=True, node_name=frozen,
                 file={"driver": "file", "filename": str(image)})
        self._do("block-export-add", type="vhost-user-blk", id=frozen, node_name=frozen, writable=False,
                 addr={"type": "unix", "path": str(path)})
        self.frozen[f"{disk.name}@{name}"] = (path, image)
        return self.snapshot_show(disk, name)

    def snapshot_show(self, disk, name):
        path, image = self.frozen[f"{disk.name}@{name}"]
        return Snapshot(f"{disk.name}@{name}", path, "quiesced", str(image), image.stat().st_blocks * 512)

    def snapshot_delete(self, disk, name):
        frozen = f"{disk.name}-frozen"
        path, image = self.frozen.pop(f"{disk.name}@{name}")
        self._do("block-export-del", id=frozen, mode="hard")
        eventually("the export is gone",
                   lambda: all(export["id"] != frozen for export in self._do("query-block-exports")))
        self._do("blockdev-del", node_name=frozen)
        path.unlink(missing_ok=True)
        image.unlink()

    def snapshots(self):
        return list(self.frozen)

    def metrics(self):
        return None
