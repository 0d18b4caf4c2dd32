"""What every layer of a model is built from, handed down in one object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megalm.config import Config, ConfigError

# Each registers its backends.
from megalm.ops import activation, attention, cross_entropy, dropout, norm, rotary, softmax  # noqa: F401
from megalm.ops.registry import REGISTRY, Features, choose
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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

    @cached_property
    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) [s, d/2] of all positions, which every layer shares."""
        model = self.config.model
        return rotary.rotary_tables(model.seq_length, model.head_dim, model.rotary_theta, model.rotary_scaling, self.device)


def layer_number(index: int, build: Build) -> int | Tensor:
    """A layer's number as its dropout keys have it: a tensor where layers are compiled, so that they are the same code."""
    return torch.tensor(index) if build.config.train.compile else index


def attention_traits(config: Config) -> tuple[str, ...]:
    """What the model's attention asks of a backend."""
    dims = attention.dims_trait(config.model.head_dim, config.model.head_dim)
    return attention.plain_traits(DTYPES[config.precision.dtype], dims, config.model.attention_dropout > 0)


def choose_kernels(config: Config, device: torch.device) -> dict[str, str]:
    """{operation: its backend and why}, settled before any layer is built.

    Raises ConfigError, with every one, for named backends that can't serve this model here.
    """
    chosen, problems = {}, []
    traits = {"attention": attention_traits(config), "activation": (config.model.activation,),
              "norm": (config.model.normalization,)}
    for op, name in config.kernels.model_dump().items():
        try:
            run, reason = choose(op, name, Features(device.type, DTYPES[config.precision.dtype], traits.get(op, ())))
        except ValueError as error:
            problems.append(str(error))
            continue
        backend = next(backend.name for backend in REGISTRY.backends[op].values() if backend.run is run)
        chosen[op] = f"{backend}, {reason}"
    if problems:
        raise ConfigError(problems)
    return chosen
