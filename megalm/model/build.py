"""What every layer of a model is built from, handed down in one object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megalm.config import Config, ConfigError

# Each registers its backends.
from megalm.ops import activation, attention, cross_entropy, dropout, norm, rotary, sdpa, softmax  # noqa: F401
from megalm.ops.registry import Features, choose_name
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import Place, StepContext
from megalm.plan.backends import attention_traits, keeps_scores

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

    def documents(self, place: Place | None) -> attention.Documents | None:
        """The bounds that data.document_mask asks for; None beside a step, as in generation."""
        if place is None or not self.config.data.document_mask:
            return None
        assert place.documents is not None, "data.document_mask without the micro-batch's documents"
        return place.documents

    def positions(self, place: Place | None) -> Tensor | None:
        """int64 [s, b] where data.reset_positions asks for it; None: 0, 1, ..., s - 1."""
        if place is None or not self.config.data.reset_positions:
            return None
        assert place.positions is not None, "data.reset_positions without the micro-batch's documents"
        return place.positions

    @cached_property
    def recomputes_scores(self) -> bool:
        """Whether recompute.mode selective has anything to do: the backend that attention takes here keeps scores."""
        return self.config.recompute.mode == "selective" and keeps_scores(self.config, self.attention_backend, self.device.type)

    @cached_property
    def leaves_compiled_code(self) -> bool:
        """Whether attention is called between two compiled parts of a layer and not compiled with them."""
        train = self.config.train
        return train.compile and sdpa.leaves_compiled_code(self.device.type, self.attention_backend, train.deterministic)

    @cached_property
    def attention_backend(self) -> str:
        """The backend that attention takes here."""
        features = Features(self.device.type, self.dtype, attention_traits(self.config))
        return choose_name("attention", self.config.kernels.attention, features)[0]

    @cached_property
    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) [s, r/2] of all positions, which every layer shares; r is rotary_dim."""
        model = self.config.model
        return rotary.rotary_tables(model.seq_length, model.rotary_dim, model.rotary_theta, model.rotary_scaling, self.device)


def layer_number(index: int, build: Build) -> int | Tensor:
    """A layer's number as its dropout keys have it: a tensor where layers are compiled, so that they are the same code."""
    return torch.tensor(index) if build.config.train.compile else index


def choose_kernels(config: Config, device: torch.device) -> dict[str, str]:
    """{operation: its backend and why}, settled before any layer is built.

    Raises ConfigError, with every one, for named backends that can't serve this model here.
    """
    chosen, problems = {}, []
    traits = {"attention": attention_traits(config), "activation": (config.model.activation,),
              "norm": (config.model.normalization,)}
    for op, name in config.kernels.model_dump().items():
        try:
            backend, reason = choose_name(op, name, Features(device.type, DTYPES[config.precision.dtype], traits.get(op, ())))
        except ValueError as error:
            problems.append(str(error))
            continue
        chosen[op] = f"{backend}, {reason}"
    if problems:
        raise ConfigError(problems)
    return chosen
