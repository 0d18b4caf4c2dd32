"""Every kernel against float64, forward and backward, in three orders of threads and blocks, and under AddressSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megalm.tools.build_kernels import build_shim
from megalm.tools.kernel_cases import small

CASES = {case.name: case for case in small()}
ORDERS = [0, 1, 7]


@pytest.mark.parametrize("name", CASES)
def test_against_float64(shim, name):
    case = CASES[name]
    for order in ORDERS:
        shim.set_order(order)
        # Another order computes the same sums: one dtype shows a missing barrier as well as three.
        for dtype in case.dtypes if order == 0 else case.dtypes[:1]:
            case.check(dtype)


def test_address_sanitizer(tmp_path):
    """One dtype of each case; a process of its own, as the sanitizer must be there before Python is."""
    library = build_shim(tmp_path, sanitize=True)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    done = subprocess.run([sys.executable, "-m", "megalm.tools.kernel_cases", str(library), "--first-dtype"],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
