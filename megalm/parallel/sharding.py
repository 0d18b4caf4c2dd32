"""The registry of parameters: what kind each one is and which parts of which full weights it holds.

One declaration, made where the parameter is created, drives DeepSpeed's tensor-parallel marks, the reduction of partial
gradients, the initial values, checkpoints, conversion and the parity tests.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.ops.random import normal
from megalm.parallel.collectives import copy_to_tp
from megalm.parallel.groups import TensorParallel


class Kind(enum.Enum):
    """How a parameter lives on the tensor-parallel ranks."""

    SHARDED = "sharded"        # each rank holds a slice
    REPLICATED = "replicated"  # whole on each rank, and each rank computes its whole gradient
    PARTIAL = "partial"        # whole on each rank, but the gradient of a rank is a term of the sum over tp


@dataclass(frozen=True)
class Part:
    """The slice [start, stop) along `dim` of the full weight `name` that a parameter holds; dim None: the whole weight."""

    name: str
    full_shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.full_shape
        shape = list(self.full_shape)
        shape[self.dim] = self.stop - self.start
        return tuple(shape)

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)


@dataclass(frozen=True)
class Declared:
    """A parameter's kind, its parts (stacked along dim 0 in this order) and its initial values.

    `std`: standard deviation of the normal initial values; None: the constant `fill`.
    """

    kind: Kind
    parts: tuple[Part, ...]
    std: float | None = None
    fill: float = 0.0


def declare(parameter: nn.Parameter, kind: Kind, parts: Sequence[Part], *, std: float | None = None,
            fill: float = 0.0) -> nn.Parameter:
    """Attach the declaration; DeepSpeed's clipping norm counts a parameter on every tp rank iff it carries the mark."""
    assert parameter.numel() == sum(part.numel for part in parts), (tuple(parameter.shape), parts)
    parameter.megalm = Declared(kind, tuple(parts), std, fill)
    parameter.tensor_model_parallel = kind is Kind.SHARDED
    return parameter


def declared(parameter: Tensor) -> Declared:
    """The declaration of a parameter; AssertionError where a layer forgot it."""
    found = getattr(parameter, "megalm", None)
    assert found is not None, f"a parameter of shape {tuple(parameter.shape)} has no declared kind"
    return found


def part_slices(parameter: Tensor, local: Tensor | None = None) -> Iterator[tuple[Part, Tensor]]:
    """Each part with its view of `local`, a tensor laid out like the parameter (the parameter itself by default).

    Fused parts are stacked along dim 0, so a part is a contiguous range of the flattened parameter.
    """
    local = parameter if local is None else local
    flat, offset = local.reshape(-1), 0
    for part in declared(parameter).parts:
        yield part, flat[offset:offset + part.numel].view(part.local_shape)
        offset += part.numel


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter from (seed, canonical part name) alone, so that no layout enters the initial weights."""
    for parameter in module.parameters():
        declaration = declared(parameter)
        if declaration.std is None:
            parameter.fill_(declaration.fill)
            continue
        for part, view in part_slices(parameter, parameter.detach()):
            view.copy_(normal(seed, part.name, part.full_shape, part.dim, part.start, part.stop, declaration.std))
    return module


def use(parameter: nn.Parameter, tp: TensorParallel) -> Tensor:
    """The parameter as a layer's forward should use it.

    At pp = 1 a partial gradient is completed by an identity whose backward all-reduces over tp, which is exact under
    ZeRO 0-3; in a pipeline the engine reduces all partial gradients at once instead.
    """
    if tp.complete_in_backward and parameter.megalm.kind is Kind.PARTIAL:
        return copy_to_tp(parameter, tp)
    return parameter
