"""DeepSpeed's FusedAdam where its operation was built with DeepSpeed: nothing is compiled inside a training job."""

from __future__ import annotations

from typing import Any

import torch

from megalm.optim.optimizer import Groups, device_type


def fused_adam(groups: Groups, optimizer: Any) -> torch.optim.Optimizer:
    """A maker of optim.build_optimizer. Raises RuntimeError, with the reason, where there is none."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from deepspeed.ops.adam import FusedAdam

    if optimizer.name != "adamw":
        raise RuntimeError("DeepSpeed's fused optimizer is Adam's")
    if device_type(groups) != "cuda":
        raise RuntimeError("DeepSpeed's FusedAdam needs a GPU")
    if not installed_ops.get("fused_adam") or accelerator_name != get_accelerator()._name:  # else DeepSpeed would compile it now
        raise RuntimeError("DeepSpeed's FusedAdam is not built; DS_BUILD_FUSED_ADAM=1 builds it when DeepSpeed is installed")
    return FusedAdam(groups, lr=optimizer.lr, betas=tuple(optimizer.betas), eps=optimizer.eps, adam_w_mode=True)
