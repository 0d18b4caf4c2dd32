"""Which samples a rank reads: arithmetic on how many the run has consumed, so that the position in the data is one integer.

The global batch that begins at sample n is the samples [n, n + global_batch), however it is split: a change of dp, of the
micro-batch or of the accumulation changes who reads a sample, never which samples a step sees.
"""
from __future__ import annotations

import numpy as np

from megalm.plan.batch import accumulation_steps


def sample_indices(first: int, *, global_batch: int, micro_batch: int, dp: int, dp_rank: int) -> np.ndarray:
    """What a data-parallel rank reads of the global batch that begins at sample `first`: int64 [accumulation steps, micro_batch].

    Micro-batch m of rank r is the samples from first + (m * dp + r) * micro_batch on, as in Megatron-LM. Raises ValueError
    unless global_batch is a multiple of micro_batch * dp.
    """
    if not 0 <= dp_rank < dp:
        raise ValueError(f"data-parallel rank {dp_rank} of {dp}")
    accumulation, problem = accumulation_steps(global_batch, micro_batch, dp)
    if problem is not None:
        raise ValueError(problem)
    batch = np.arange(first, first + global_batch, dtype=np.int64)
    return batch.reshape(accumulation, dp, micro_batch)[:, dp_rank]
