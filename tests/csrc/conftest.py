"""The kernels of csrc/ on the CPU: compiled once a session with the shim, in use while a test asks for them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalm.ops.library import drop_shim, use_shim
from megalm.ops.registry import REGISTRY
from megalm.tools.build_kernels import CSRC, GXX_FLAGS, build_shim


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory):
    """The path of the library made with the shim."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def build_with_shim(tmp_path_factory) -> Callable[..., None]:
    """`build(source, to, *flags)`: a program or a library of one file, and of what runs its threads, which is compiled once."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    fibers = tmp_path_factory.mktemp("fibers") / "fibers.o"
    subprocess.run(["g++", *GXX_FLAGS, f"-I{CSRC}", "-c", str(CSRC / "shim/fibers.cpp"), "-o", str(fibers)], check=True)

    def build(source: Path, to: Path, *flags: str) -> None:
        command = ["g++", *GXX_FLAGS, *flags, f"-I{CSRC}", str(source), "-x", "none", str(fibers), "-o", str(to)]
        subprocess.run(command, check=True)

    return build


@pytest.fixture
def shim(shim_library):
    """The library made with the shim, which serves tensors on the CPU until the test is over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny work: other threads would only be waited for
    yield use_shim(shim_library)
    drop_shim()
    torch.set_num_threads(threads)
    REGISTRY.chosen.clear()
