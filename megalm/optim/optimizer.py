"""The optimizer that DeepSpeed's wrappers step: AdamW (Loshchilov and Hutter 2019) or SGD with momentum."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from megalm.config import ConfigError
from megalm.ops.registry import REGISTRY
from megalm.optim.param_groups import param_groups

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch has kernels that take one pass over a parameter and its moments."""

Groups = list[dict[str, Any]]
Maker = Callable[[Groups, Any], torch.optim.Optimizer]
"""(groups of param_groups, config.optimizer) -> optimizer. Raises ImportError or RuntimeError, with the reason, when it can't."""

_log = logging.getLogger(__name__)


def build_optimizer(optimizer: Any, named_parameters: Iterable[tuple[str, nn.Parameter]],
                    makers: Mapping[str, Maker] | None = None, zero_stage: int = 0) -> torch.optim.Optimizer:
    """The optimizer of the config's section over the trainable parameters, in decay groups.

    `optimizer.impl`: "torch" is torch's, fused where the device has it; "apex" NVIDIA apex's; any other name is looked up in
    `makers`, through which the engine offers DeepSpeed's. "auto" takes the first that can serve, in the order measured for the
    device (ops/backends.json), and logs it. Raises ConfigError when the one named can't serve.
    """
    groups = param_groups(named_parameters, optimizer.weight_decay)
    if not any(group["params"] for group in groups):
        raise ValueError("the model has no trainable parameter")
    known: dict[str, Maker] = {"torch": _torch, "apex": partial(_apex, zero_stage=zero_stage), **(makers or {})}
    if optimizer.impl == "auto":
        return _fastest(known, groups, optimizer)
    if optimizer.impl not in known:
        raise ConfigError([f"optimizer.impl {optimizer.impl!r} isn't offered here; available: auto, {', '.join(known)}"])
    try:
        return known[optimizer.impl](groups, optimizer)
    except (ImportError, RuntimeError) as error:
        asked = f"optimizer.impl {optimizer.impl!r} can't make {optimizer.name!r}"
        raise ConfigError([f'{asked}: {_reason(error)}; "auto" takes what can']) from error


def _fastest(known: Mapping[str, Maker], groups: Groups, optimizer: Any) -> torch.optim.Optimizer:
    device, passed = device_type(groups), []
    for name in REGISTRY.order("optimizer", device):
        if name not in known:
            continue
        try:
            made = known[name](groups, optimizer)
        except (ImportError, RuntimeError) as error:
            passed.append(f"not {name}: {_reason(error)}")
            continue
        _log.info("optimizer %s on %s: %s (%s)", optimizer.name, device, name,
                  "; ".join([f"the fastest that serves on {device}", *passed]))
        return made
    raise ConfigError([f"optimizer.impl 'auto' finds none for {optimizer.name!r} on {device} ({'; '.join(passed)})"])


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def device_type(groups: Groups) -> str:
    """Where the parameters are."""
    return next(parameter.device.type for group in groups for parameter in group["params"])


def _torch(groups: Groups, optimizer: Any) -> torch.optim.Optimizer:
    fused = device_type(groups) in FUSED_DEVICES
    if optimizer.name == "sgd":
        return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=tuple(optimizer.betas), eps=optimizer.eps, fused=fused)


def _apex(groups: Groups, optimizer: Any, zero_stage: int = 0) -> torch.optim.Optimizer:
    apex = importlib.import_module("apex.optimizers")
    if device_type(groups) != "cuda":
        raise RuntimeError("NVIDIA apex's optimizers need a GPU")
    if optimizer.name == "sgd":
        return apex.FusedSGD(groups, lr=optimizer.lr, momentum=optimizer.momentum)
    if zero_stage == 3:
        # DeepSpeed steps the pieces of a group one after the other there.
        raise RuntimeError("its FusedAdam counts the steps of a whole parameter group, which ZeRO 3 steps in pieces")
    return apex.FusedAdam(groups, lr=optimizer.lr, betas=tuple(optimizer.betas), eps=optimizer.eps, adam_w_mode=True)
