"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

DECAY = "decay"
NO_DECAY = "no_decay"


def param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups, always both and in this order: "decay" (parameters of two or more dims) and "no_decay" (the rest).

    Matrices and embeddings decay; biases and norm gains, which are 1-D, don't. Each group has "name", "params" (in the
    given order, each parameter once) and "weight_decay". A group may be empty, as on a stage without norms: DeepSpeed
    drops it then, which is why groups are told apart by their names. Frozen parameters are in neither.
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    for _, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            (decay if parameter.dim() >= 2 else plain).append(parameter)
    return [{"name": DECAY, "params": decay, "weight_decay": weight_decay},
            {"name": NO_DECAY, "params": plain, "weight_decay": 0.0}]
