"""What every layer of a model is built from, handed down in one object."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megalm.config import Config
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext


@dataclass(frozen=True)
class Build:
    """The config, this rank's side of tensor parallelism, the step context, and where parameters live."""

    config: Config
    tp: TensorParallel
    context: StepContext
    dtype: torch.dtype
    device: torch.device

    @property
    def std(self) -> float:
        """Standard deviation of the initial weights."""
        return self.config.model.init_std

    @property
    def residual_std(self) -> float:
        """That of the two projections that write to the residual stream (Radford et al., GPT-2, 2019, section 2.3)."""
        return self.std / math.sqrt(2 * self.config.model.num_layers)
