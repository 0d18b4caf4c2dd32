"""Freed memory stays: a tensor of the same size is made again without a page fault."""

from __future__ import annotations

import resource

import pytest
import torch

from megalm.parallel.memory import keep_freed_memory
from tests import dist

BYTES = 64 << 20


def faults_of_a_second_tensor(rank: int, world: int, keep: bool) -> int | None:
    if keep and not keep_freed_memory():
        return None
    del_me = torch.zeros(BYTES, dtype=torch.uint8)
    del del_me
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(BYTES, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept():
    kept, = dist.run(faults_of_a_second_tensor, 1, True, group=False)
    if kept is None:
        pytest.skip("the C library isn't glibc")
    returned, = dist.run(faults_of_a_second_tensor, 1, False, group=False)
    assert kept < 100 < returned
