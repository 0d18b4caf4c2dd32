"""Every kernel against float64, forward and backward, in three orders of threads and blocks, and under AddressSanitizer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megalm.tools.build_kernels import build_shim, sanitizer
from megalm.tools.kernel_cases import small

CASES = {case.name: case for case in small()}
ORDERS = [0, 1, 7]


@pytest.mark.parametrize("name", CASES)
def test_against_float64(shim, name):
    case = CASES[name]
    for order, dtype in case.runs(ORDERS):
        shim.set_order(order)
        case.check(dtype)


def test_address_sanitizer(tmp_path):
    """One dtype of each case; a process of its own, as the sanitizer must be there before Python is."""
    library = build_shim(tmp_path, sanitize=True)
    done = subprocess.run([*sanitizer(), sys.executable, "-m", "megalm.tools.kernel_cases", str(library), "--first-dtype"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
