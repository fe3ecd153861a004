"""What the guest tests and the demo are made of: a daemon, guests, a load, a judge.

Invariants:
- Every wait has a limit, and what ran out is named in the error.
- Every child dies with this process, however that ends.
- What a child printed is in a file of the workspace; a workspace that saw a failure is kept.

It knows nothing of how a snapshot works: it sees the sockets, the command line and the metrics that a user sees.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

REPO = pathlib.Path(__file__).resolve().parents[2]
KIT = pathlib.Path(os.environ.get("GUEST_KIT", REPO / ".guest"))
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))
os.environ["PATH"] += ":/usr/sbin:/sbin"

BOOT_SECONDS_MAX = 90
COMMAND_SECONDS_MAX = 60


class Failure(AssertionError):
    """What was expected did not happen; the text says what, and what was seen instead."""


def require(condition, text):
    if not condition:
        raise Failure(text)


def eventually(what, check, seconds=COMMAND_SECONDS_MAX, every=0.05):
    """Returns the first true answer of `check`."""
    end = time.monotonic() + seconds
    while True:
        answer = check()
        if answer:
            return answer
        require(time.monotonic() < end, f"{what}: not within {seconds} s")
        time.sleep(every)


def tail(path, lines=25):
    with contextlib.suppress(OSError):
        return "\n".join(pathlib.Path(path).read_text(errors="replace").splitlines()[-lines:])
    return ""


def run(*command, timeout=COMMAND_SECONDS_MAX, status=0, text=None):
    """Runs a program of the host to its end; `status` is the exit status expected, None for any."""
    done = subprocess.run([str(c) for c in command], stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=timeout, text=True, errors="replace")
    said = done.stdout + done.stderr
    require(status is None or done.returncode == status,
            f"{' '.join(map(str, command))}: exit status {done.returncode}, expected {status}:\n{said}")
    require(text is None or text in said, f"{' '.join(map(str, command))}: did not say {text!r}:\n{said}")
    return done


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allocated_bytes(path):
    return os.stat(path).st_blocks * 512


_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent():
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Workspace:
    """A folder and the children that use it. Leaving it ends them; after a failure, or with `keep`, it stays."""

    def __init__(self, name, keep=False):
        # Not /tmp: it may be a tmpfs, which takes no O_DIRECT on older kernels.
        where = os.environ.get("HS_TMPDIR", "/var/tmp")
        self.path = pathlib.Path(tempfile.mkdtemp(prefix=f"hs-{name}-", dir=where))
        self.keep = keep
        self.children = []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for child in reversed(self.children):
            child.kill()
        failed = kind is not None and issubclass(kind, Exception)  # Ctrl-C and SIGTERM are none
        if not failed and not self.keep:
            shutil.rmtree(self.path, ignore_errors=True)
        return False

    def logs(self):
        """The ends of what the children said, for a report of a failure."""
        parts = [f"--- {log.name}\n{tail(log)}" for log in sorted(self.path.glob("*.log")) if log.stat().st_size]
        return "\n".join(parts)

    def start(self, name, command, **options):
        child = Child(name, [str(c) for c in command], self.path / f"{name}.log", **options)
        self.children.append(child)
        return child


class Child:
    """A program that runs beside us, in a process group of its own so that Ctrl-C reaches it only through us."""

    def __init__(self, name, command, log, env=None):
        self.name, self.log = name, log
        with open(log, "ab") as out:
            out.write(f"$ {' '.join(command)}\n".encode())
            out.flush()
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                            start_new_session=True, preexec_fn=_die_with_parent,
                                            env=os.environ | (env or {}))

    def alive(self):
        return self.process.poll() is None

    def require_alive(self):
        require(self.alive(), f"{self.name} has ended with status {self.process.returncode}:\n{tail(self.log)}")
        return True

    def wait(self, seconds=COMMAND_SECONDS_MAX, status=0):
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name} is still running after {seconds} s:\n{tail(self.log)}") from None
        require(status is None or self.process.returncode == status,
                f"{self.name} ended with status {self.process.returncode}, expected {status}:\n{tail(self.log)}")

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        if self.alive():
            self.process.kill()
        self.process.wait(10)


@dataclasses.dataclass
class Disk:
    name: str
    path: pathlib.Path
    queues: int = 1
    shared: bool = False

    @classmethod
    def create(cls, workspace, name, mib, queues=1, ext4=True, shared=False):
        path = workspace.path / f"{name}.raw"
        with open(path, "wb") as file:
            file.truncate(mib << 20)
        if ext4:
            run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
        return cls(name, path, queues, shared)

    @classmethod
    def copy_of(cls, workspace, name, source, queues=1):
        path = workspace.path / f"{name}.raw"
        run("cp", "--sparse=always", source, path)
        return cls(name, path, queues)


@dataclasses.dataclass
class Snapshot:
    """What `snapshot show --json` says; only what the tests look at."""
    id: str
    socket: pathlib.Path
    state: str
    image: str
    owned_bytes: int


class Daemon:
    """`halfsilver serve` with its own state and run directories. standin.py has the same face on another backend."""

    name = "halfsilver"
    keeps_snapshots = True
    locks_images = True
    shares_disks = True
    writes_logs = True
    makes_volumes = True

    def __init__(self, workspace, disks, binary=None):
        self.workspace, self.disks = workspace, disks
        self.binary = binary or os.environ.get("HALFSILVER_BIN", TARGET / "debug/halfsilver")
        require(os.access(self.binary, os.X_OK), f"{self.binary} is not there: run cargo build first")
        self.run_dir = workspace.path / "run"
        self.state_dir = workspace.path / "state"
        self.control = workspace.path / "control.sock"
        self.child = None

    def socket(self, disk):
        return self.run_dir / f"{disk.name}.sock"

    def start(self):
        self.run_dir.mkdir(exist_ok=True)
        self.state_dir.mkdir(exist_ok=True)
        command = [self.binary, "serve", "--control", self.control, "--state-dir", self.state_dir,
                   "--run-dir", self.run_dir]
        for disk in self.disks:
            options = f"name={disk.name},path={disk.path},socket={self.socket(disk)},queues={disk.queues}"
            command += ["--disk", options + (",shared=on" if disk.shared else "")]
        self.child = self.workspace.start("daemon", command)
        # `status` answers as soon as the daemon serves.
        eventually("halfsilver status answers",
                   lambda: self.child.require_alive() and self.ask("status", status=None).returncode == 0, 20)
        return self

    def stop(self):
        self.child.signal(signal.SIGTERM)
        self.child.wait(30, status=0)

    def kill(self):
        self.child.kill()

    def ask(self, *command, status=0):
        return run(self.binary, "--control", self.control, *command, status=status)

    def snapshot_create(self, disk, name, strategy="copy-on-write"):
        self.ask("snapshot", "create", name, "--disk", disk.name, "--strategy", strategy, "--wait")
        return self.snapshot_show(disk, name)

    def snapshot_by_connection(self, disk, name):
        """A snapshot that the frontends of this moment go on writing; it is not quiesced yet."""
        self.ask("snapshot", "create", name, "--writers", "connection", "--disk", disk.name)
        return self.snapshot_show(disk, name)

    def snapshot_cutover(self, disk, name):
        self.ask("snapshot", "cutover", f"{disk.name}@{name}")

    def snapshot_show(self, disk, name):
        seen = json.loads(self.ask("snapshot", "show", f"{disk.name}@{name}", "--json").stdout)
        return Snapshot(seen["id"], pathlib.Path(seen["socket"]), seen["state"], seen["image"], seen["owned_bytes"])

    def snapshot_delete(self, disk, name):
        self.ask("snapshot", "delete", f"{disk.name}@{name}")

    def snapshots(self):
        return [s["id"] for s in json.loads(self.ask("snapshot", "list", "--json").stdout)]

    def send(self, method, path, body=None):
        """What the control socket answers, without the time that a command line takes."""
        connection = http.client.HTTPConnection("halfsilver", timeout=COMMAND_SECONDS_MAX)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(COMMAND_SECONDS_MAX)
        connection.sock.connect(str(self.control))
        connection.request(method, path, body)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        require(answer.status < 300, f"{method} {path}: {answer.status} {answer.reason}\n{text}")
        return text

    def jobs(self, state="running"):
        return [job for job in json.loads(self.send("GET", "/v1/jobs")) if job["state"] == state]

    def snapshot_delete_slowly(self, disk, name, delay_ms):
        """Begins to delete a snapshot, with a pause after each block; `set_pace` makes it quick again."""
        deletion = self.workspace.start(f"delete-{name}", [self.binary, "--control", self.control, "snapshot", "delete",
                                                           f"{disk.name}@{name}", "--wait"])
        job = eventually("the job of the deletion", lambda: next(iter(self.jobs()), None), every=0)
        self.set_pace(job, delay_ms)
        return deletion, job

    def set_pace(self, job, delay_ms):
        self.send("PATCH", f"/v1/jobs/{job['id']}", json.dumps({"delay_ms": delay_ms}))

    def metrics(self):
        """Prometheus samples by name with labels, as in {'halfsilver_preserved_bytes_total{disk="vm1"}': 4096.0}."""
        samples = {}
        for line in self.send("GET", "/metrics").splitlines():
            match = re.fullmatch(r"([a-zA-Z_:][^\s{]*(?:\{.*\})?)\s+(\S+)(?:\s+\S+)?", line)
            if match and not line.startswith("#"):
                samples[match[1]] = float(match[2])
        return samples


def served_within(before, after, disk, direction, share=0.99):
    """The time in seconds within which the daemon served this share of the requests between two looks at its metrics.

    It is the upper end of a histogram bucket; None when there was no request, or no such metric.
    """
    counts = {}
    for sample, count in (after or {}).items():
        match = re.fullmatch(r"halfsilver_request_duration_seconds_bucket\{(.*)\}", sample)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1])) if match else {}
        if labels.get("disk") == disk.name and labels.get("direction") == direction:
            counts[float(labels["le"])] = count - before.get(sample, 0)
    total = counts.get(float("inf"), 0)
    return next((bound for bound in sorted(counts) if total and counts[bound] >= share * total), None)


def backend(workspace, disks, binary=None):
    """The daemon under test; HS_BACKEND=stand-in takes QEMU's own vhost-user-blk backend instead."""
    choice = os.environ.get("HS_BACKEND", "halfsilver")
    if choice == "stand-in":
        from standin import StandIn
        return StandIn(workspace, disks)
    require(choice == "halfsilver", f"HS_BACKEND={choice}: there is halfsilver and stand-in")
    return Daemon(workspace, disks, binary)


def accelerator():
    """kvm where it really runs a guest, else tcg. Opening /dev/kvm proves nothing: a kernel is booted, once a host boot."""
    boot_id = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    cache = KIT / "accelerator"
    with contextlib.suppress(OSError, ValueError):
        choice, seen_boot_id = cache.read_text().split()
        if seen_boot_id == boot_id:
            return choice
    choice = "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) and _kvm_boots() else "tcg,thread=multi"
    cache.write_text(f"{choice} {boot_id}\n")
    return choice


def _kvm_boots():
    with Workspace("probe") as workspace:
        serial = workspace.path / "serial"
        child = workspace.start("probe", ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-M", "q35", "-m",
                                          "256", "-nodefaults", "-display", "none", "-serial", f"file:{serial}",
                                          "-no-reboot", "-kernel", KIT / "vmlinuz",
                                          "-append", "console=ttyS0 panic=-1"])
        end = time.monotonic() + 8
        while child.alive() and time.monotonic() < end:
            if "Memory:" in tail(serial, 1000):
                return True
            time.sleep(0.05)
    return False


@functools.cache
def reconnect_option():
    """Since QEMU 9.2 the pause between two attempts to reconnect is given in milliseconds."""
    version = re.search(r"version (\d+)\.(\d+)", run("qemu-system-x86_64", "--version").stdout)
    return "reconnect-ms=100" if (int(version[1]), int(version[2])) >= (9, 2) else "reconnect=1"


class Port:
    """A virtio-serial port of a guest: lines both ways. We listen, QEMU connects, so no early line is lost."""

    def __init__(self, path, log):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.log = log
        self.lines = []
        self.changed = threading.Condition()
        self.connection = None
        self.closed = False
        self.listeners = []

    def accept(self):
        self.listener.settimeout(20)
        self.connection, _ = self.listener.accept()
        self.connection.setblocking(True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            with contextlib.suppress(OSError), open(self.log, "a") as log:
                for raw in self.connection.makefile("rb"):
                    line = raw.decode(errors="replace").rstrip("\n")
                    print(line, file=log, flush=True)
                    with self.changed:
                        for listener in self.listeners:
                            listener(line)
                        self.lines.append(line)
                        self.changed.notify_all()
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()

    def send(self, text):
        self.connection.sendall(f"{text}\n".encode())

    def wait(self, what, check, seconds):
        """Waits until `check()` is true; it is tried with the lock held, after every line."""
        with self.changed:
            if not self.changed.wait_for(lambda: check() or self.closed, seconds):
                raise Failure(f"{what}: not within {seconds} s; last lines: {self.lines[-5:]}")
            answer = check()
            require(answer, f"{what}: the guest has gone; last lines: {self.lines[-5:]}")
            return answer


class Guest:
    """A QEMU guest that runs the kit's kernel and does what it is told.

    `disks` come up as /dev/vda, /dev/vdb, …: a (socket, queues) pair for a vhost-user disk, a path for a raw image.
    """

    def __init__(self, workspace, name, disks, cpus=1, memory_mib=256, root=None):
        self.name, self.cpus = name, cpus
        self.console = workspace.path / f"{name}-console.log"
        sockets = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-", dir=workspace.path))
        self.agent = Port(sockets / "agent", workspace.path / f"{name}-agent.log")
        self.load_port = Port(sockets / "load", workspace.path / f"{name}-load.log")
        # No self-tests of ciphers: nobody needs them, and under software emulation the kernel has hung in them.
        append = "console=ttyS0 panic=-1 quiet loglevel=5 random.trust_cpu=on cryptomgr.notests" + (f" root={root}" if root else "")
        command = [
            "qemu-system-x86_64", "-name", name, "-accel", accelerator(), "-cpu", "max", "-M", "q35,memory-backend=mem",
            "-object", f"memory-backend-memfd,id=mem,size={memory_mib}M,share=on", "-m", f"{memory_mib}M",
            "-smp", cpus, "-nodefaults", "-no-user-config", "-display", "none",
            "-kernel", KIT / "vmlinuz", "-initrd", KIT / "initramfs.gz", "-append", append,
            "-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={sockets}/agent", "-device", "virtserialport,chardev=agent,name=agent",
            "-chardev", f"socket,id=load,path={sockets}/load", "-device", "virtserialport,chardev=load,name=load",
            "-qmp", f"unix:{sockets}/qmp,server=on,wait=off",
        ]
        for i, disk in enumerate(disks):
            if isinstance(disk, tuple):
                path, queues = disk
                command += ["-chardev", f"socket,id=disk{i},path={path},{reconnect_option()}",
                            "-device", f"vhost-user-blk-pci,chardev=disk{i},num-queues={queues}"]
            else:
                command += ["-drive", f"if=none,id=disk{i},file={disk},format=raw,cache=none,aio=threads",
                            "-device", f"virtio-blk-pci,drive=disk{i}"]
        self.qmp_path = sockets / "qmp"
        self.child = workspace.start(name, command)
        for port in (self.agent, self.load_port):
            try:
                port.accept()
            except TimeoutError:
                self.child.require_alive()
                raise Failure(f"{name}: QEMU did not open its ports:\n{tail(self.child.log)}") from None
        self.ready = ""
        self.wait_ready()

    def wait_ready(self):
        """Until the guest says that it is up; once for each boot."""
        def newest():
            return next((line for line in self.agent.lines if line.startswith("@@ready")), None)
        try:
            self.ready = self.agent.wait(f"{self.name} boots", newest, BOOT_SECONDS_MAX)
        except Failure as failure:
            raise Failure(f"{failure}\n{tail(self.child.log)}\n{tail(self.console)}") from None
        with self.agent.changed:
            self.agent.lines.clear()

    def run(self, command, seconds=COMMAND_SECONDS_MAX, status=0):
        """Runs a shell command in the guest; returns what it printed. `status` None takes any exit status."""
        with self.agent.changed:
            self.agent.lines.clear()
        self.agent.send(command)

        def answer():
            return next((line for line in self.agent.lines if line.startswith("@@rc ")), None)
        code = int(self.agent.wait(f"{self.name}: {command}", answer, seconds).split()[1])
        printed = "\n".join(self.agent.lines[:-1])
        require(status is None or code == status,
                f"{self.name}: {command}: exit status {code}, expected {status}:\n{printed}")
        return printed

    def reboot(self):
        """A reset from inside the running machine; QEMU goes on."""
        with self.agent.changed:
            self.agent.lines.clear()
        self.agent.send("reboot -f")
        self.wait_ready()

    def power_off(self):
        self.agent.send("sync; poweroff -f")
        self.child.wait(30)

    def quit(self):
        """QEMU's own quit: the guest is not asked, as when an operator stops a VM hard."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(10)
            monitor.connect(str(self.qmp_path))
            monitor.sendall(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
            self.child.wait(30)

    def kill(self):
        self.child.kill()

    def mount(self, device, options="defaults"):
        self.run(f"mount -t ext4 -o {options} {device} /mnt")

    def require_no_io_errors(self):
        bad = self.run("dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|Aborting journal|"
                       "Remounting filesystem read-only|blocked for more than' | head -5; true")
        require(not bad, f"{self.name}: its kernel complains:\n{bad}")

    def verify(self, directory, seed, at_least=None):
        """Judges the load's files inside the guest; returns a Verdict."""
        return Verdict.of(self.run(f"hs-guest verify {directory} {seed}", status=None), at_least)

    def start_load(self, directory, seed, threads=2):
        load = Load(self)
        self.run(f"start_load {directory} {seed} {threads}")
        self.load_port.wait("the load begins", lambda: load.began, COMMAND_SECONDS_MAX)
        return load


@dataclasses.dataclass
class Marks:
    """How far the load had come, by what it had printed: of each thread the newest finished file, and block write."""
    files: dict
    blocks: int

    def total_files(self):
        return sum(self.files.values())


class LoadRecords:
    """What `hs-guest load` has told, line by line; qemu/guest/hs-guest.c says what each promises."""

    def __init__(self):
        self.files, self.blocks, self.phases, self.errors = {}, 0, {}, []
        self.began = self.ended = False

    def take(self, line):
        kind, _, rest = line.partition(" ")
        fields = dict(word.split("=", 1) for word in rest.split() if "=" in word)
        if kind == "file":
            self.files[int(fields["thread"])] = int(fields["number"])
        elif kind == "block":
            self.blocks = int(fields["number"])
        elif kind == "phase":
            name = fields.pop("name")
            self.phases[name] = {key: int(value) for key, value in fields.items()}
        elif kind == "load-began":
            self.began = True
        elif kind == "load-ended":
            self.ended = True
        else:
            self.errors.append(line)

    def marks(self):
        """To be asked when no line is being taken."""
        return Marks(dict(self.files), self.blocks)


class Load(LoadRecords):
    """The records of `hs-guest load` in a guest, and its controls."""

    def __init__(self, guest):
        super().__init__()
        self.guest, self.port = guest, guest.load_port
        with self.port.changed:
            self.port.listeners[:] = [self.take]

    def marks(self):
        with self.port.changed:
            return super().marks()

    def require_progress(self, files=10, block_writes=32, seconds=COMMAND_SECONDS_MAX):
        """Waits until every thread has gone on: a load that stands still is a hung disk."""
        before = self.marks()
        self.port.wait(f"{self.guest.name} writes {files} more files in each thread and {block_writes} more blocks",
                       lambda: self.blocks >= before.blocks + block_writes and len(self.files) > 0 and
                       all(n >= before.files.get(t, 0) + files for t, n in self.files.items()), seconds)
        self.require_no_errors()

    def require_no_errors(self):
        require(not self.errors, f"the load saw errors: {self.errors[:5]}")

    def phase(self, name):
        """Begins a phase; what the ended one saw is in `phases` then."""
        seen = len(self.phases)
        self.port.send(f"phase {name}")
        self.port.wait("the phase ends", lambda: len(self.phases) > seen, COMMAND_SECONDS_MAX)

    def stop(self):
        self.port.send("stop")
        self.port.wait("the load ends", lambda: self.ended, COMMAND_SECONDS_MAX)
        self.require_no_errors()


@dataclasses.dataclass
class Verdict:
    """What `hs-guest verify` found in a copy that passed."""
    files: dict
    blocks: int
    checked_files: int

    @classmethod
    def of(cls, printed, at_least=None, at_most=None):
        """Raises unless all is right, nothing finished by `at_least` is missing, nothing begun after `at_most` is in.

        `at_most` are the marks after a round trip to the load (`Load.phase`) that followed the cut.
        """
        require("verify-ended complaints=0" in printed, f"the content is wrong:\n{printed}")
        verdict = cls({}, 0, 0)
        for thread, newest, files in re.findall(r"verified thread=(\d+) newest=(\d+) files=(\d+)", printed):
            verdict.files[int(thread)] = int(newest)
            verdict.checked_files += int(files)
        found = re.search(r"verified blocks newest=(\d+)", printed)
        verdict.blocks = int(found[1]) if found else 0
        if at_least:
            for thread, number in at_least.files.items():
                require(verdict.files.get(thread, 0) >= number,
                        f"thread {thread}: file {number} was finished in time, the newest one here is "
                        f"{verdict.files.get(thread, 0)}")
            require(verdict.blocks >= at_least.blocks,
                    f"block write {at_least.blocks} was finished in time, the newest one here is {verdict.blocks}")
        if at_most:
            for thread, number in at_most.files.items():
                # One more file may have been in its slot with its record not yet printed, and no second one.
                require(verdict.files.get(thread, 0) <= number + 1,
                        f"thread {thread}: file {verdict.files.get(thread, 0)} was written after the snapshot "
                        f"({number} was the newest)")
            # Every 16th block write is printed.
            require(verdict.blocks <= at_most.blocks + 16,
                    f"block write {verdict.blocks} was made after the snapshot ({at_most.blocks} was the newest)")
        return verdict


def judge_image(workspace, image, seed, at_least=None, at_most=None):
    """Judges a copied-out ext4 image on the host: journal replay, e2fsck, then every file. Works on a copy of it."""
    work = workspace.path / f"{pathlib.Path(image).stem}-judged.raw"
    run("cp", "--sparse=always", "--reflink=auto", image, work)
    # 0: nothing to do, 1: the journal was replayed
    replay = run("e2fsck", "-fy", "-E", "journal_only", work, status=None)
    require(replay.returncode in (0, 1), f"journal replay: {replay.stdout}{replay.stderr}")
    run("e2fsck", "-fn", work)
    out = workspace.path / f"{work.stem}-files"
    out.mkdir()
    run("debugfs", "-R", f"rdump / {out}", work)
    verdict = Verdict.of(run(KIT / "hs-guest", "verify", out, seed, status=None).stdout, at_least, at_most)
    shutil.rmtree(out)
    work.unlink()
    return verdict


def back_up(workspace, snapshot, size_bytes, while_copying=lambda: None, again=True):
    """Boots a second guest on a frozen version, reads it, copies it out from inside and reads it `again`.

    Returns the path of the copy. Raises unless what was read and the copy, as the host sees it, are one content.
    """
    scratch = workspace.path / "copied-out.raw"
    with open(scratch, "wb") as file:
        file.truncate(size_bytes)
    guest = Guest(workspace, "guest2", [(snapshot.socket, 1), scratch])
    require(guest.run("blockdev --getro /dev/vda") == "1", "VLUN A is not read-only in the backup guest")
    require(guest.run("blockdev --getsize64 /dev/vda") == str(size_bytes), "VLUN A has another size than the disk")

    def read_hash():
        guest.run("echo 3 >/proc/sys/vm/drop_caches")
        return guest.run("sha256sum </dev/vda", 240).split()[0]
    first = read_hash()
    while_copying()
    guest.run("dd if=/dev/vda of=/dev/vdb bs=1M conv=fsync 2>/dev/null", 240)
    while_copying()
    second = read_hash() if again else first
    require(first == second, f"VLUN A changed under the backup guest: sha256 {first}, later {second}")
    guest.require_no_io_errors()
    guest.power_off()
    copy = sha256(scratch)
    require(copy == first, f"the copy is not VLUN A: sha256 {copy}, read in the guest {first}")
    return scratch
