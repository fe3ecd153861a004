"""Several guests on one disk, and snapshots that those who are connected go on writing (writers: connection).

There is no file system: guests write patterns to areas of their own, as programs do that know of each other. Beside
them one guest numbers blocks of a log without a pause, so that a snapshot always meets writes in flight.
"""

import hashlib
import time

import kit
import test_guests
from kit import Disk, Guest, require

DISK_MIB = 64
AREA_BYTES = 64 << 10
# The log: block i of 4 KiB is LOG_BLOCK + i and says i in each of its 16-byte lines.
LOG_BLOCK = (4 << 20) // 4096
BLOCK_BYTES = 4096
LINE_BYTES = 16


def area_of(text, size=AREA_BYTES):
    return f"{text:<{LINE_BYTES - 1}}\n".encode() * (size // LINE_BYTES)


class Areas:
    """A guest's view of /dev/vda: numbered areas, each filled with one text. Nothing is taken from its page cache."""

    def __init__(self, guest):
        self.guest = guest
        self.log_began = False

    def put(self, area, text):
        self.guest.run(f"yes '{text:<{LINE_BYTES - 1}}' | head -c {AREA_BYTES} >/tmp/area && "
                       f"dd if=/tmp/area of=/dev/vda bs={AREA_BYTES} seek={area} conv=notrunc,fsync 2>/dev/null")

    def require(self, area, text, why):
        """`text` None: nobody has written there."""
        self.guest.run("echo 3 >/proc/sys/vm/drop_caches")
        seen = self.guest.run(f"dd if=/dev/vda bs={AREA_BYTES} skip={area} count=1 2>/dev/null | tee /tmp/seen | "
                              "sha256sum").split()[0]
        expected = bytes(AREA_BYTES) if text is None else area_of(text)
        if seen != hashlib.sha256(expected).hexdigest():
            lines = self.guest.run("tr '\\0' '.' </tmp/seen | fold -w 16 | sort | uniq -c | head -5")
            raise kit.Failure(f"{self.guest.name}: area {area} should be {text!r} ({why}), and is:\n{lines}")

    def start_log(self):
        """Begins to write the log, one block after the other, each only when the one before is on the disk."""
        require(not self.log_began, "a guest has one log")
        self.log_began = True
        self.guest.run("echo 0 >/tmp/finished; rm -f /tmp/stop")
        self.guest.run(
            "(i=0; while [ ! -e /tmp/stop ]; do i=$((i + 1)); "
            f"yes \"$(printf '%-{LINE_BYTES - 1}d' $i)\" | head -c {BLOCK_BYTES} >/tmp/block; "
            f"dd if=/tmp/block of=/dev/vda bs={BLOCK_BYTES} seek=$(({LOG_BLOCK} + i)) conv=notrunc,fsync "
            "2>/dev/null || break; echo $i >/tmp/next; mv /tmp/next /tmp/finished; done; touch /tmp/stopped) &")

    def finished(self):
        """The newest block of the log whose write is known to be done; the next one may be in flight."""
        return int(self.guest.run("cat /tmp/finished"))

    def require_log_progress(self, blocks=5):
        before = self.finished()
        kit.eventually(f"{self.guest.name} writes {blocks} more blocks of its log",
                       lambda: self.finished() >= before + blocks)

    def stop_log(self):
        self.guest.run("touch /tmp/stop")
        kit.eventually("the log stops", lambda: self.guest.run("ls /tmp/stopped 2>/dev/null; true"))
        return self.finished()


def judge(image, areas, log_at_least, log_at_most):
    """Holds a raw image of the host against what it should have. Returns how long its log is."""
    with open(image, "rb") as file:
        for area, text in areas.items():
            file.seek(area * AREA_BYTES)
            expected = bytes(AREA_BYTES) if text is None else area_of(text)
            require(file.read(AREA_BYTES) == expected, f"{image}: area {area} is not {text!r}")
        length, number, file_blocks = 0, 0, (DISK_MIB << 20) // BLOCK_BYTES
        while LOG_BLOCK + number + 1 < file_blocks:
            number += 1
            file.seek((LOG_BLOCK + number) * BLOCK_BYTES)
            block = file.read(BLOCK_BYTES)
            if block == area_of(number, BLOCK_BYTES):
                require(length == number - 1, f"{image}: block {number} of the log is there, {length + 1} is not")
                length = number
            else:
                require(block == bytes(BLOCK_BYTES), f"{image}: block {number} of the log is {block[:LINE_BYTES]}…")
    require(length >= log_at_least, f"{image}: the log ends at {length}, and {log_at_least} was written in time")
    require(length <= log_at_most, f"{image}: the log ends at {length}, and {log_at_most} is the last that may be there")
    return length


class Shared(test_guests.GuestTest):
    def shared_disk(self):
        disk = Disk.create(self.workspace, "vm1", DISK_MIB, queues=2, ext4=False, shared=True)
        return disk, self.daemon(disk, needs="shares_disks")

    def join(self, daemon, disk, name):
        guest = Guest(self.workspace, name, [(daemon.socket(disk), disk.queues)], cpus=2)
        return guest, Areas(guest)

    def test_two_guests_share_a_disk(self):
        disk, daemon = self.shared_disk()
        guest1, one = self.join(daemon, disk, "guest1")
        guest2, two = self.join(daemon, disk, "guest2")
        one.start_log()
        for turn in range(3):
            one.put(turn, f"one-{turn}")
            two.put(8 + turn, f"two-{turn}")
            two.require(turn, f"one-{turn}", "the other guest wrote it")
            one.require(8 + turn, f"two-{turn}", "the other guest wrote it")
        two.put(0, "two-over-one")
        one.require(0, "two-over-one", "the last one who wrote it")
        guest2.power_off()
        one.require_log_progress()
        guest3, three = self.join(daemon, disk, "guest3")
        three.require(10, "two-2", "a guest that has left wrote it")
        guest3.kill()
        one.require_log_progress()
        finished = one.stop_log()
        guest1.require_no_io_errors()
        guest1.power_off()
        daemon.stop()
        judge(disk.path, {0: "two-over-one", 1: "one-1", 2: "one-2", 3: None, 8: "two-0", 10: "two-2"},
              finished, finished)

    def _until_guest1_has_what_guest2_has_not(self):
        """A disk, a guest on VLUN A that writes a log, a guest on VLUN B, and a snapshot that cannot quiesce yet."""
        disk, daemon = self.shared_disk()
        guest1, one = self.join(daemon, disk, "guest1")
        one.put(0, "one-before")
        one.put(1, "one-before")
        one.start_log()
        one.require_log_progress()
        snapshot = daemon.snapshot_by_connection(disk, "s")
        require(snapshot.state == "draining", f"guest 1 is connected, and the snapshot is {snapshot.state}")
        guest2, two = self.join(daemon, disk, "newcomer")
        two.require(0, "one-before", "VLUN B begins as VLUN A")
        one.put(2, "one-during")
        two.require(2, "one-during", "VLUN B has the writes to VLUN A")
        two.put(3, "two-during")
        two.put(1, "two-over-one")
        one.require(3, None, "VLUN A has no writes to VLUN B")
        one.require(1, "one-before", "VLUN A has no writes to VLUN B")
        two.require(1, "two-over-one", "VLUN B has its own")
        one.put(4, "one-under")
        two.put(4, "two-over")
        one.require(4, "one-under", "VLUN A has no writes to VLUN B")
        # A write to VLUN A goes to VLUN B, too, over what is there.
        two.put(5, "two-under")
        one.put(5, "one-over")
        two.require(5, "one-over", "VLUN B has the writes to VLUN A")
        one.require_log_progress()
        time.sleep(1)
        now = daemon.snapshot_show(disk, "s")
        require(now.state == "draining" and not now.socket.exists(),
                f"guest 1 is still connected; the snapshot is {now.state}")
        return disk, daemon, (guest1, one), (guest2, two)

    VLUN_A = {0: "one-before", 1: "one-before", 2: "one-during", 3: None, 4: "one-under", 5: "one-over", 6: None}
    VLUN_B = {0: "one-before", 1: "two-over-one", 2: "one-during", 3: "two-during", 4: "two-over", 5: "one-over"}

    def _quiesced(self, daemon, disk):
        def look():
            snapshot = daemon.snapshot_show(disk, "s")
            require(snapshot.state in ("draining", "quiesced"), f"the snapshot is {snapshot.state}")
            return snapshot if snapshot.state == "quiesced" and snapshot.socket.exists() else None
        return kit.eventually("the snapshot is quiesced", look)

    def test_guest_goes_on_with_vlun_a_until_the_cutover(self):
        disk, daemon, (guest1, one), (guest2, two) = self._until_guest1_has_what_guest2_has_not()
        finished_before = one.finished()
        daemon.snapshot_cutover(disk, "s")
        in_flight_after = one.finished() + 1
        snapshot = self._quiesced(daemon, disk)
        # Guest 1 has not noticed, but for what it sees now.
        one.require_log_progress()
        for area, text in self.VLUN_B.items():
            one.require(area, text, "guest 1 is on VLUN B now")
        one.put(6, "one-after")
        two.require(6, "one-after", "both are on VLUN B")
        two.put(7, "two-after")
        one.require(7, "two-after", "both are on VLUN B")
        copy = kit.back_up(self.workspace, snapshot, disk.path.stat().st_size, one.require_log_progress)
        length = judge(copy, self.VLUN_A, finished_before, in_flight_after)
        daemon.snapshot_delete(disk, "s")
        finished = one.stop_log()
        require(finished > length, "the log did not go on after the cutover")
        for guest in (guest1, guest2):
            guest.require_no_io_errors()
            guest.power_off()
        daemon.stop()
        judge(disk.path, self.VLUN_B | {6: "one-after", 7: "two-after"}, finished, finished)

    def test_guest_goes_on_with_vlun_a_until_it_is_shut_down(self):
        disk, daemon, (guest1, one), (guest2, two) = self._until_guest1_has_what_guest2_has_not()
        guest1.require_no_io_errors()
        finished = one.finished()
        guest1.power_off()
        snapshot = self._quiesced(daemon, disk)
        two.put(7, "two-after")
        # The same guest, booted again, is a new connection.
        guest3, three = self.join(daemon, disk, "guest1-again")
        three.require(1, "two-over-one", "who connects after the snapshot is on VLUN B")
        three.put(6, "one-again")
        two.require(6, "one-again", "both are on VLUN B")
        copy = kit.back_up(self.workspace, snapshot, disk.path.stat().st_size)
        most = (DISK_MIB << 20) // BLOCK_BYTES
        length = judge(copy, self.VLUN_A | {7: None}, finished, most)
        daemon.snapshot_delete(disk, "s")
        for guest in (guest2, guest3):
            guest.require_no_io_errors()
            guest.power_off()
        daemon.stop()
        # All that guest 1 ever wrote belongs to both.
        judge(disk.path, self.VLUN_B | {6: "one-again", 7: "two-after"}, length, length)
