"""Reducing gradients over the data-parallel ranks without needless copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor


class FrugalReduction(DeepSpeedEngine):
    """DeepSpeed's engine where its optimizer wrapper does not reduce by itself (BF16_Optimizer, or no wrapper at all).

    DeepSpeed copies all gradients into one buffer, reduces that and copies back, over a single rank too.
    """

    def _reduce_non_expert_gradients(self, grads: Sequence[Tensor], elements_per_buffer: int) -> None:
        group = self.mpu.get_data_parallel_group()
        if dist.get_world_size(group) == 1:
            return
        if not hasattr(self.optimizer, "get_grads_for_reduction"):
            super()._reduce_non_expert_gradients(grads, elements_per_buffer)
            return
        for flat in grads:  # BF16_Optimizer's are flat buffers already: one a parameter group
            reduced = self.allreduce_bucket([flat], group)
            assert reduced.data_ptr() == flat.data_ptr(), "a bucket of one flat buffer is that buffer"
