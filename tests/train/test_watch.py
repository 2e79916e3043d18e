"""A process that waits too long for the others ends, and says who is behind."""

import subprocess
import sys

import pytest

from jaxlm.processes.hang_watch import HUNG, behind

CODE = """
import time
from jaxlm.processes.hang_watch import Watch
class Client:
    def key_value_set(self, key, value, allow_overwrite): self.own = key, value
    def key_value_dir_get(self, prefix): return [self.own, (prefix + "1", "1 in a step"), (prefix + "2", "2 x")]
watch = Watch(0.6, 0, 3, Client())
for _ in range(24):
    time.sleep(0.05)
    watch.mark("in a save")
{end}
"""


def run(end: str) -> subprocess.CompletedProcess[str]:
    code = CODE.replace("{end}", end)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_process_that_marks_nothing_ends_with_stacks_and_one_line():
    done = run("time.sleep(60)")
    assert done.returncode == HUNG
    *stacks, line = done.stderr.splitlines()
    assert any("<string>" in one for one in stacks), "where the process stands"
    assert line.startswith("error: process 0: nothing finished for 0.6 s, in a save; process 1 is behind, in a step (")


def test_marks_and_the_end_keep_it_quiet():
    done = run("watch.close(); time.sleep(1)")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ({0: (5, "a"), 1: (5, "a")}, "all processes stand at the same place"),
        ({0: (5, "a"), 1: (3, "in a save")}, "process 1 is behind, in a save"),
        ({0: (2, "b"), 1: (2, "b"), 2: (4, "a")}, "process 0, 1 is behind, b"),
        ({0: (5, "a")}, "no word from process 1"),
    ],
)
def test_who_is_behind(reports, expected):
    assert behind(reports, max(2, len(reports))) == expected
