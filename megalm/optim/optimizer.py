"""The optimizer that DeepSpeed's wrappers step: AdamW (Loshchilov and Hutter 2019) or SGD with momentum."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from megalm.config import ConfigError
from megalm.optim.param_groups import param_groups

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch has kernels that take one pass over a parameter and its moments."""

Maker = Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer]
"""(groups of param_groups, config.optimizer) -> optimizer. Raises ImportError or RuntimeError when it isn't built."""


def build_optimizer(optimizer: Any, named_parameters: Iterable[tuple[str, nn.Parameter]],
                    makers: Mapping[str, Maker] | None = None) -> torch.optim.Optimizer:
    """The optimizer of the config's section over the trainable parameters, in decay groups.

    `optimizer.impl`: "auto" is torch's, fused where the device has it; "apex" NVIDIA Apex's; any other name is looked up in
    `makers`, through which the engine offers DeepSpeed's. Raises ConfigError when the one named isn't installed or built.
    """
    groups = param_groups(named_parameters, optimizer.weight_decay)
    if not any(group["params"] for group in groups):
        raise ValueError("the model has no trainable parameter")
    known: dict[str, Maker] = {"auto": _torch, "torch": _torch, "apex": _apex, **(makers or {})}
    if optimizer.impl not in known:
        raise ConfigError([f"optimizer.impl {optimizer.impl!r} isn't offered here; available: {', '.join(known)}"])
    try:
        return known[optimizer.impl](groups, optimizer)
    except (ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        asked = f"optimizer.impl {optimizer.impl!r} can't make {optimizer.name!r}"
        raise ConfigError([f'{asked}: {reason}; "auto" uses torch\'s own']) from error


def _torch(groups: list[dict[str, Any]], optimizer: Any) -> torch.optim.Optimizer:
    device = next(parameter.device for group in groups for parameter in group["params"])
    fused = device.type in FUSED_DEVICES
    if optimizer.name == "sgd":
        return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=tuple(optimizer.betas), eps=optimizer.eps, fused=fused)


def _apex(groups: list[dict[str, Any]], optimizer: Any) -> torch.optim.Optimizer:
    apex = importlib.import_module("apex.optimizers")
    if optimizer.name == "sgd":
        return apex.FusedSGD(groups, lr=optimizer.lr, momentum=optimizer.momentum)
    return apex.FusedAdam(groups, lr=optimizer.lr, betas=tuple(optimizer.betas), eps=optimizer.eps, adam_w_mode=True)
