"""Dropout that knows nothing of the layout: the step's place, and each rank's slice of the keyed mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.ops.dropout import bias_dropout_add
from megalm.ops.random import DropoutKey
from megalm.parallel.groups import TensorParallel


@dataclass(frozen=True)
class Place:
    """Which forward this is: the seed, the step (from 0) and the global index of each sample (int64 [b], beside the model)."""

    seed: int
    step: int | Tensor
    samples: Tensor

    def traceable(self) -> Place:
        """The same with the step as a tensor, so that compiled code serves every step."""
        return Place(self.seed, torch.tensor(self.step), self.samples)


class StepContext:
    """Set by the engine before each forward; a layer reads it once and carries the value into its recomputation."""

    def __init__(self, seed: int):
        self.seed = seed
        self.place: Place | None = None

    def set(self, step: int, samples: Tensor) -> None:
        self.place = Place(self.seed, step, samples)


def hidden_dropout(x: Tensor, residual: Tensor | None, probability: float, place: Place, layer: int | Tensor, op: int,
                   tp: TensorParallel, backend: str) -> Tensor:
    """residual + dropout(x) of hidden states [s/tp or s, b, h]: a rank draws the mask of its own positions only."""
    length = x.shape[0]
    start, whole = (tp.rank * length, tp.size * length) if tp.shards_sequence else (0, length)
    extents = [(start, start + length, whole), (0, x.shape[2], x.shape[2])]
    key = DropoutKey(place.seed, place.step, layer, op)
    return bias_dropout_add(x, None, residual, key, place.samples, extents, probability, backend=backend)
