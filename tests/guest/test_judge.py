"""The judge of copies must notice what is wrong with one: each test damages a good copy in one way. No guest runs."""

import re
import subprocess
import time
import unittest

import kit
from kit import Failure, Marks, Verdict, Workspace

SEED = 11
HEADER_NUMBER = slice(24, 32)  # where a file or a block says which one it is


class Judge(unittest.TestCase):
    def setUp(self):
        self.workspace = Workspace("judge")
        self.addCleanup(self.workspace.__exit__, None, None, None)
        self.copy = self.workspace.path / "copy"
        self.copy.mkdir()
        # The load itself, on the host's file system, until each slot was written more than once.
        load = subprocess.Popen([kit.KIT / "hs-guest", "load", self.copy, str(SEED), "1"], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(load.kill)
        end = time.monotonic() + 30
        for line in load.stdout:
            seen = re.match(r"file thread=0 number=(\d+)", line)
            if seen and int(seen[1]) >= 100 or time.monotonic() > end:
                break
        said, _ = load.communicate("stop\n", timeout=30)
        self.assertIn("load-ended", said)

    def verdict(self, **bounds):
        return Verdict.of(kit.run(kit.KIT / "hs-guest", "verify", self.copy, SEED, status=None).stdout, **bounds)

    def assert_noticed(self, text, **bounds):
        with self.assertRaisesRegex(Failure, text):
            self.verdict(**bounds)

    def newest_slot(self):
        return max((self.copy / "t0").glob("slot*"), key=lambda path: path.read_bytes()[HEADER_NUMBER][::-1])

    def change(self, path, at, new):
        content = bytearray(path.read_bytes())
        content[at:at + len(new)] = new
        path.write_bytes(content)

    def test_a_good_copy_passes(self):
        verdict = self.verdict()
        self.assertEqual(verdict.checked_files, 64)
        self.assertGreaterEqual(verdict.files[0], 100)

    def test_a_changed_byte_of_a_file_is_noticed(self):
        slot = self.newest_slot()
        self.change(slot, 1000, bytes([slot.read_bytes()[1000] ^ 1]))
        self.assert_noticed("other content")

    def test_a_file_cut_short_is_noticed(self):
        slot = self.newest_slot()
        slot.write_bytes(slot.read_bytes()[:-8])
        self.assert_noticed("other content")

    def test_a_missing_older_file_is_noticed(self):
        newest = int(self.newest_slot().name.removeprefix("slot"))
        (self.copy / f"t0/slot{(newest - 5) % 64:03}").unlink()
        self.assert_noticed("older file")

    def test_a_torn_block_is_noticed(self):
        blocks = (self.copy / "blocks").read_bytes()
        self.change(self.copy / "blocks", 5 * 4096 + 2048, blocks[6 * 4096 + 2048:7 * 4096])
        self.assert_noticed("never written there")

    def test_a_lost_block_write_is_noticed(self):
        """An old but whole block under newer ones: what a write of the wrong epoch would leave."""
        content = (self.copy / "blocks").read_bytes()
        numbers = [int.from_bytes(content[b * 4096:][HEADER_NUMBER], "little") for b in range(2048)]
        rewritten = sorted((b for b in range(2048) if numbers[b] > 2048), key=lambda b: numbers[b])
        # The block as `hs-guest` fills it before the load: write b to block b.
        fresh = self.workspace.path / "fresh"
        fresh.mkdir()
        load = subprocess.run([kit.KIT / "hs-guest", "load", fresh, str(SEED), "0"], input="stop\n", text=True,
                              capture_output=True, timeout=30)
        self.assertIn("load-ended", load.stdout)
        first = (fresh / "blocks").read_bytes()
        victim = next(b for b in rewritten if int.from_bytes(first[b * 4096:][HEADER_NUMBER], "little") == b)
        self.change(self.copy / "blocks", victim * 4096, first[victim * 4096:(victim + 1) * 4096])
        self.assert_noticed("it must hold")

    def test_files_outside_the_bounds_are_noticed(self):
        verdict = self.verdict()
        newest, blocks = verdict.files[0], verdict.blocks
        self.verdict(at_least=Marks({0: newest}, blocks), at_most=Marks({0: newest}, blocks))
        self.assert_noticed("finished in time", at_least=Marks({0: newest + 1}, blocks))
        self.assert_noticed("finished in time", at_least=Marks({0: newest}, blocks + 1))
        self.assert_noticed("after the snapshot", at_most=Marks({0: newest - 2}, blocks))
        self.assert_noticed("after the snapshot", at_most=Marks({0: newest}, blocks - 17))
