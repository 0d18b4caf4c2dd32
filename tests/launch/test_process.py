"""The primitives that leave no process behind."""

from __future__ import annotations

import subprocess
import sys

from tests.launch.launcher import exists, wait_until

PARENT = """
import os, sys, time
from megalm.parallel.process import die_with_parent
parent = os.getpid()
pid = os.fork()
if pid == 0:
    die_with_parent(parent {wrong})
    print(os.getpid(), flush=True)
    time.sleep(1000)
time.sleep(1000)
"""

ORPHAN = """
import os, time
from megalm.launch.process import adopt_orphans, descendants, end_descendants
adopt_orphans()
if os.fork() == 0:          # a child whose own child outlives it, in a session of its own
    if os.fork() == 0:
        os.setsid()
        time.sleep(1000)
    os._exit(0)
time.sleep(0.2)
before = descendants(os.getpid())
killed = end_descendants(patience=0.1)
print(len(killed), set(killed) <= set(before), descendants(os.getpid()))
"""


def test_a_child_dies_with_a_killed_parent():
    process = subprocess.Popen([sys.executable, "-c", PARENT.format(wrong="")], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    assert exists(child)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not exists(child), 10)


def test_a_child_whose_parent_is_already_another_ends_at_once():
    with subprocess.Popen([sys.executable, "-c", PARENT.format(wrong="+ 1")], stdout=subprocess.PIPE, text=True) as process:
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        wait_until(lambda: open(children).read() != "" and not exists(int(open(children).read())), 20)  # noqa: SIM115
        process.kill()
        assert process.stdout.read() == ""


def test_orphans_are_found_and_ended():
    result = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=60)
    assert result.stdout.split(maxsplit=1) == ["1", "True []\n"], result.stderr
