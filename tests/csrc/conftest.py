"""The kernels of csrc/ on the CPU: compiled once a session with the shim, in use while a test asks for them."""

from __future__ import annotations

import shutil

import pytest
import torch

from megalm.ops.library import drop_shim, use_shim
from megalm.ops.registry import REGISTRY
from megalm.tools.build_kernels import build_shim


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory):
    """The path of the library made with the shim."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def shim(shim_library):
    """The library made with the shim, which serves tensors on the CPU until the test is over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny work: other threads would only be waited for
    yield use_shim(shim_library)
    drop_shim()
    torch.set_num_threads(threads)
    REGISTRY.chosen.clear()
