"""The line at the end of a session."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import part_seconds
from tests.dist import ROOT


def test_seconds_are_by_part():
    times = [("tests/parity/test_parity.py::a", 2.0), ("tests/plan/test_plan.py::parity", 1.0),
             ("tests/parity/test_x.py::b", 0.5), ("tests/csrc/test_norm.py::c", 4.0), ("tests/test_cli.py::d", 8.0)]
    assert part_seconds(times) == {"parity": 2.5, "kernels": 4.0, "the rest": 9.0}
    assert part_seconds([]) == {}


def test_a_session_ends_with_them():
    command = [sys.executable, "-m", "pytest", "-q", "tests/plan/test_partition.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert any(line.startswith("seconds: the rest ") for line in result.stdout.splitlines()), result.stdout
