"""Who reads which sample: the same global batch under every layout."""
from __future__ import annotations

import numpy as np
import pytest

from megalm.data.sampler import sample_indices

LAYOUTS = [(1, 1), (24, 1), (1, 24), (2, 3), (3, 4), (4, 2), (12, 2), (6, 1)]


@pytest.mark.parametrize("micro_batch, dp", LAYOUTS)
@pytest.mark.parametrize("first", [0, 24, 7, 24 * 10**9])
def test_the_global_batch_does_not_depend_on_the_layout(micro_batch, dp, first):
    rows = [sample_indices(first, global_batch=24, micro_batch=micro_batch, dp=dp, dp_rank=rank) for rank in range(dp)]
    assert all(row.shape == (24 // (micro_batch * dp), micro_batch) for row in rows)
    assert sorted(np.concatenate([row.ravel() for row in rows]).tolist()) == list(range(first, first + 24))


def test_place_of_each_micro_batch():
    for rank in range(3):
        got = sample_indices(130, global_batch=24, micro_batch=2, dp=3, dp_rank=rank)
        assert got.tolist() == [[130 + m * 2 * 3 + rank * 2 + j for j in range(2)] for m in range(4)]


def test_what_cannot_be_divided():
    for batch, micro, dp in ((24, 5, 1), (24, 2, 5), (2, 4, 1)):
        with pytest.raises(ValueError, match=f"{batch} is not divisible by batch.micro x dp = {micro} x {dp} = {micro * dp}"):
            sample_indices(0, global_batch=batch, micro_batch=micro, dp=dp, dp_rank=0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        sample_indices(0, global_batch=4, micro_batch=1, dp=2, dp_rank=2)
