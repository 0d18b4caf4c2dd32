"""One layer of a model, described so that either engine can build it where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerDescription:
    """A layer of the plan's layer list.

    Args:
        name: its name in `plan.layers`.
        build: makes the module, its parameters filled in.
        tied: descriptions with the same key share one module, whose only parameter is `weight`.
        forward: how to call a shared module in this place, as forward(module, hidden_states); None: module(hidden_states).
    """

    name: str
    build: Callable[[], nn.Module]
    tied: str | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
