"""World size and batch are exact, or one line has all the numbers."""
from __future__ import annotations

import pytest

from megalm.plan import batch


def test_exact():
    assert batch.data_parallel(8, tp=2, pp=2, dp="auto") == (2, None)
    assert batch.data_parallel(8, tp=2, pp=2, dp=2) == (2, None)
    assert batch.accumulation_steps(24, 3, 2) == (4, None)


@pytest.mark.parametrize("world, tp, pp, dp, message", [
    (7, 2, 2, "auto", "world size 7 is not divisible by parallel.tp x parallel.pp = 2 x 2 = 4; the next that fit are 4 and 8"),
    (2, 2, 2, "auto", "world size 2 is not divisible by parallel.tp x parallel.pp = 2 x 2 = 4; the next that fit are 4"),
    (8, 2, 2, 4, "world size 8 is not parallel.tp x parallel.pp x parallel.dp = 2 x 2 x 4 = 16"),
])
def test_world_size_that_does_not_fit(world, tp, pp, dp, message):
    assert batch.data_parallel(world, tp, pp, dp)[1].startswith(message)


def test_batch_that_does_not_fit():
    assert batch.accumulation_steps(30, 2, 4)[1] == (
        "batch.global = 30 is not divisible by batch.micro x dp = 2 x 4 = 8; the next that fit are 24 and 32")


def test_bubble():
    assert batch.bubble(1, 5) == 0.0
    assert batch.bubble(4, 1) == 0.75       # one micro-batch: each stage works one slot in four
    assert batch.bubble(4, 9) == pytest.approx(0.25)


@pytest.mark.parametrize("vocab, padded", [(1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_padded_vocabulary(vocab, padded):
    assert batch.padded_vocabulary(vocab, 128) == padded
