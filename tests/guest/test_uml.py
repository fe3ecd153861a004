"""User-mode Linux, whose own vhost-user driver connects to the disks without a VMM: ext4, XFS and Btrfs at once, at nearly
native speed, and a snapshot by each strategy under their load.

What must hold: a second kernel that mounts what was frozen replays its journal, finds every file that was finished before the
command, and its checker finds nothing; the running disks are right to the end.
"""

import json
import pathlib
import subprocess
import threading

import kit
import test_guests
from kit import Disk, Verdict, require, run

SEED = test_guests.SEED
DISK_MIB = 400
THREADS = 2
PROGRAM = "linux.uml"

# How each file system is made, and checked without a change.
FILE_SYSTEMS = {
    "ext4": (("mkfs.ext4", "-q", "-F"), "e2fsck -fn"),
    "xfs": (("mkfs.xfs", "-q", "-f"), "xfs_repair -n"),
    "btrfs": (("mkfs.btrfs", "-q", "-f"), "btrfs check --readonly"),
}
# How each is made as large as its disk, while it is mounted.
GROWN_BY = {
    "ext4": "resize2fs /dev/vda",
    "xfs": "xfs_growfs /mnt/xfs",
    "btrfs": "btrfs filesystem resize max /mnt/btrfs",
}
MORE_MIB = 300


class Uml:
    """A User-mode Linux with some disks, /dev/vda, /dev/vdb, …; process 1 carries out what it is sent, line by line."""

    def __init__(self, workspace, name, sockets):
        self.name, self.lines, self.changed = name, [], threading.Condition()
        self.loads = {}
        devices = [f"virtio_uml.device={socket}:2" for socket in sockets]
        command = [PROGRAM, "mem=512M", "rootfstype=hostfs", "rootflags=/", "rw", f"init={kit.REPO}/qemu/guest/uml-init",
                   f"umid={workspace.path.name}-{name}", *devices, "con0=fd:0,fd:1", "con=null", "quiet"]
        self.log = open(workspace.path / f"{name}.log", "w")
        print(*command, file=self.log, flush=True)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        preexec_fn=kit._die_with_parent, start_new_session=True,
                                        env={"LD_PRELOAD": str(kit.KIT / "uml-xstate.so"), "PATH": "/usr/bin:/usr/sbin:/bin:/sbin",
                                             "TMPDIR": "/dev/shm", "HOME": str(workspace.path)})
        workspace.children.append(self)
        threading.Thread(target=self._read, daemon=True).start()
        self._wait("it is ready", lambda: "uml-ready" in self.lines, kit.BOOT_SECONDS_MAX)

    def _read(self):
        for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip("\r\n")
            with self.changed:
                print(line, file=self.log, flush=True)
                word, _, rest = line.partition(" ")
                if word.startswith("load:"):
                    self.loads[word.removeprefix("load:")].take(rest)
                else:
                    self.lines.append(line)
                self.changed.notify_all()
        with self.changed:
            self.lines.append("uml-gone")
            self.changed.notify_all()

    def _wait(self, what, check, seconds=kit.COMMAND_SECONDS_MAX):
        with self.changed:
            answer = self.changed.wait_for(lambda: check() or "uml-gone" in self.lines, seconds)
            require(answer and check(), f"{self.name}: {what}: not within {seconds} s: {self.lines[-8:]}")

    def send(self, line):
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def run(self, line, seconds=240):
        """What a command says; it must succeed."""
        with self.changed:
            begin = len(self.lines)
        self.send(line)
        done = lambda: next((i for i in range(begin, len(self.lines)) if self.lines[i].startswith("uml-done ")), None)
        self._wait(line, lambda: done() is not None, seconds)
        with self.changed:
            end = done()
            said = "\n".join(self.lines[begin:end])
            require(self.lines[end] == "uml-done 0", f"{self.name}: {line}: {self.lines[end]}:\n{said}")
            return said

    def start_load(self, name, directory):
        """Files and blocks that are written until `stop_load`; what is finished is told on the console."""
        load = self.loads[name] = kit.LoadRecords()
        stop = f"/run/halfsilver-{name}"
        self.run(f"rm -f {stop}; (while [ ! -e {stop} ]; do sleep 0.1; done; echo stop; sleep 5) | "
                 f"{kit.KIT}/hs-guest load {directory} {SEED} {THREADS} 2>&1 | sed -u 's/^/load:{name} /' &")
        return load

    def stop_load(self, name):
        self.run(f": >/run/halfsilver-{name}")
        self._wait("the load ends", lambda: self.loads[name].ended)
        require(not self.loads[name].errors, f"the load on {name} saw {self.loads[name].errors[:5]}")

    def require_progress(self, files):
        """Waits until each thread of each load has finished so many more files."""
        with self.changed:
            before = {name: load.marks() for name, load in self.loads.items()}
        gone_on = lambda load, marks: (len(load.files) == THREADS and load.blocks > marks.blocks and
                                       all(n >= marks.files.get(t, 0) + files for t, n in load.files.items()))
        self._wait(f"{files} more files", lambda: all(gone_on(self.loads[n], marks) for n, marks in before.items()))

    def marks(self):
        with self.changed:
            return {name: load.marks() for name, load in self.loads.items()}

    def verify(self, directory, at_least=None):
        return Verdict.of(self.run(f"{kit.KIT}/hs-guest verify {directory} {SEED}"), at_least)

    def kill(self):
        # Its processes are processes of the host, in a group of their own.
        with kit.contextlib.suppress(ProcessLookupError):
            kit.os.killpg(self.process.pid, kit.signal.SIGKILL)
        self.process.wait(10)


class UserMode(test_guests.GuestTest):
    def setUp(self):
        super().setUp()
        if kit.os.environ.get("HS_BACKEND") == "stand-in":
            self.skipTest("the stand-in keeps no snapshots")
        require(kit.shutil.which(PROGRAM), f"{PROGRAM} is not there: run scripts/deps")

    def disks(self):
        for name, (make, _) in FILE_SYSTEMS.items():
            disk = Disk.create(self.workspace, name, DISK_MIB, ext4=False)
            run(*make, disk.path)
            yield disk

    def mount_all(self, uml):
        for letter, name in zip("abc", FILE_SYSTEMS):
            uml.run(f"mkdir -p /mnt/{name} && mount -t {name} /dev/vd{letter} /mnt/{name}")

    def unmount_and_check(self, uml):
        for letter, (name, (_, check)) in zip("abc", FILE_SYSTEMS.items()):
            uml.run(f"umount /mnt/{name}")
            uml.run(f"{check} /dev/vd{letter}")

    def judge(self, daemon, snapshot, finished):
        """Mounts what was frozen in a second kernel: volumes, so that journals can be replayed."""
        for name in FILE_SYSTEMS:
            daemon.ask("volume", "create", f"{name}-copy", "--from", f"{name}@{snapshot}")
        show = lambda name: json.loads(daemon.ask("volume", "show", f"{name}-copy", "--json").stdout)
        other = Uml(self.workspace, f"judge-{snapshot}", [pathlib.Path(show(name)["socket"]) for name in FILE_SYSTEMS])
        self.mount_all(other)
        for name in FILE_SYSTEMS:
            if name == "btrfs":
                # Blocks that are overwritten without a sync go elsewhere there, and are found after the next commit.
                finished[name].blocks = 0
            verdict = other.verify(f"/mnt/{name}", finished[name])
            require(verdict.checked_files > 0, f"{name}@{snapshot} has no files")
        self.unmount_and_check(other)
        other.kill()
        for name in FILE_SYSTEMS:
            kit.eventually(f"nobody is connected to {name}-copy", lambda: show(name)["frontends"] == 0)
            daemon.ask("volume", "delete", f"{name}-copy")
            daemon.ask("snapshot", "delete", f"{name}@{snapshot}", "--wait")

    def test_three_file_systems_under_load_and_a_snapshot_by_each_strategy(self):
        disks = list(self.disks())
        daemon = self.daemon(*disks, needs="makes_volumes")
        uml = Uml(self.workspace, "uml", [daemon.socket(disk) for disk in disks])
        require(uml.run("cat /sys/block/vda/queue/logical_block_size") == "512", "the sectors are not 512 bytes")
        self.mount_all(uml)
        for name in FILE_SYSTEMS:
            uml.start_load(name, f"/mnt/{name}")
        uml.require_progress(files=20)
        for strategy in ("copy-on-write", "write-logging", "write-mirroring"):
            if strategy == "write-mirroring":
                for disk in disks:
                    daemon.ask("disk", "mirror", disk.name, self.workspace.path / f"{disk.name}.leg", "--wait")
            finished = uml.marks()
            names = [word for disk in disks for word in ("--disk", disk.name)]
            daemon.ask("snapshot", "create", strategy, *names, "--strategy", strategy, "--wait")
            uml.require_progress(files=10)
            self.judge(daemon, strategy, finished)
            uml.require_progress(files=10)
        for name in FILE_SYSTEMS:
            uml.stop_load(name)
        marks = uml.marks()
        for name in FILE_SYSTEMS:
            uml.verify(f"/mnt/{name}", marks[name])
            require(min(marks[name].files.values()) > 40, f"{name}: only {marks[name]} were written")
        self.unmount_and_check(uml)
        require("I/O error" not in uml.run("dmesg"), "the guest saw I/O errors")
        uml.kill()
        print(f"  {({name: sum(mark.files.values()) for name, mark in marks.items()})} files", flush=True)
        daemon.stop()

    def test_three_file_systems_grow_under_load(self):
        """The guest sees the new size without looking for it, its file systems take it up, and a snapshot keeps the old one."""
        disks = list(self.disks())
        daemon = self.daemon(*disks, needs="makes_volumes")
        uml = Uml(self.workspace, "uml", [daemon.socket(disk) for disk in disks])
        self.mount_all(uml)
        for name in FILE_SYSTEMS:
            uml.start_load(name, f"/mnt/{name}")
        uml.require_progress(files=20)
        finished = uml.marks()
        names = [word for disk in disks for word in ("--disk", disk.name)]
        daemon.ask("snapshot", "create", "smaller", *names, "--wait")
        for letter, disk in zip("abc", disks):
            shown = daemon.ask("disk", "resize", disk.name, "--size", f"+{MORE_MIB}M", "--json").stdout
            size = json.loads(shown)["size_bytes"]
            require(size == (DISK_MIB + MORE_MIB) << 20, f"{disk.name} has {size} bytes")
            kit.eventually(f"the guest sees it of {disk.name}",
                           lambda: int(uml.run(f"cat /sys/block/vd{letter}/size")) * 512 == size)
        uml.require_progress(files=5)
        for name, grow in GROWN_BY.items():
            uml.run(grow)
            # More than the disk had before: some of it lies in what is new.
            uml.run(f"dd if=/dev/urandom of=/mnt/{name}/large bs=1M count={DISK_MIB} 2>/dev/null && sync -f /mnt/{name}")
            uml.run(f"sha256sum /mnt/{name}/large >/mnt/{name}/large.sum")
        uml.require_progress(files=5)
        self.judge(daemon, "smaller", finished)
        for name in FILE_SYSTEMS:
            uml.stop_load(name)
        marks = uml.marks()
        for letter, name in zip("abc", FILE_SYSTEMS):
            uml.run(f"umount /mnt/{name} && mount -t {name} /dev/vd{letter} /mnt/{name} && sha256sum -c /mnt/{name}/large.sum")
            uml.verify(f"/mnt/{name}", marks[name])
        self.unmount_and_check(uml)
        require("I/O error" not in uml.run("dmesg"), "the guest saw I/O errors")
        uml.kill()
        daemon.stop()
