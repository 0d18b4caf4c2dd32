"""Reduced gradients by name; the global norm and clipping where DeepSpeed leaves them to us (fp32, ZeRO 0, pp = 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.groups import Groups
from megalm.parallel.sharding import Kind, Part, declared, part_slices


def global_norm(parameters: Sequence[Tensor], groups: Groups) -> Tensor:
    """2-norm of the whole model's gradient, every element counted once: a fp32 scalar, the same on every rank."""
    counted = [p.grad for p in parameters if p.grad is not None and (declared(p).kind is Kind.SHARDED or groups.tp.rank == 0)]
    norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=groups.device)]
    total = torch.stack([norm.float() for norm in norms]).square().sum()
    if groups.tp.size > 1:
        dist.all_reduce(total, group=groups.tp.group)
    return total.sqrt()


def clip(parameters: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale the gradients by limit / norm where the norm is above the limit (Pascanu et al., 2013)."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    if factor.item() < 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


def reduced_gradients(parameters: Sequence[Tensor]) -> Iterator[tuple[Part, Tensor]]:
    """(part, this rank's slice of its reduced gradient, fp32), between the reduction and the step.

    Collective over dp (each rank asks for the same parameters in the same order).
    """
    from deepspeed.utils import safe_get_full_grad

    for parameter in parameters:
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, declared(parameter)
        yield from part_slices(parameter, gradient.detach().float().reshape(-1))
