"""Which samples a rank reads at a step: arithmetic on the step, so that the position in the data is one integer.

The global batch of step n is the samples [n * global_batch, (n + 1) * global_batch), however it is split: a change of dp, of the
micro-batch or of the accumulation changes who reads a sample, never which samples a step sees.
"""
from __future__ import annotations

import numpy as np


def accumulation_steps(global_batch: int, micro_batch: int, dp: int) -> int:
    """Micro-batches per rank and step. Raises ValueError unless global_batch is a multiple of micro_batch * dp."""
    if global_batch < 1 or micro_batch < 1 or dp < 1 or global_batch % (micro_batch * dp):
        raise ValueError(f"the global batch, {global_batch}, must be a multiple of micro-batch x dp = {micro_batch} x {dp}")
    return global_batch // (micro_batch * dp)


def sample_indices(step: int, *, global_batch: int, micro_batch: int, dp: int, dp_rank: int) -> np.ndarray:
    """The global sample indices that one data-parallel rank reads at a step (from 0), int64 [accumulation steps, micro_batch].

    Micro-batch m of rank r is the samples from step * global_batch + (m * dp + r) * micro_batch on, as in Megatron-LM.
    """
    if not 0 <= dp_rank < dp:
        raise ValueError(f"data-parallel rank {dp_rank} of {dp}")
    accumulation = accumulation_steps(global_batch, micro_batch, dp)
    batch = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    return batch.reshape(accumulation, dp, micro_batch)[:, dp_rank]
