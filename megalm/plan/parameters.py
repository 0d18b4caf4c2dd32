"""Every part of every layer: its canonical name, full shape, kind, and the shape one tp rank holds.

A part is what init, checkpoint and conversion speak of; a parameter is what one rank stores. Query, key and value rows are parts
of one fused parameter, and so are gate and up, so a parameter is a list of parts stacked along dim 0.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megalm.config import Config

from .plan import Plan

SHARDED, REPLICATED, PARTIAL = "sharded", "replicated", "partial"


@dataclass(frozen=True)
class Part:
    """One canonical part. `partial` is replicated with a gradient that is a term of the sum over tp."""
    name: str                   # layers.3.attention.query.weight
    layer: str                  # layers.3
    parameter: str              # the local parameter it is stacked into: layers.3.attention.qkv.weight
    shape: tuple[int, ...]      # of the whole
    kind: str                   # sharded, replicated or partial
    dim: int | None             # the dim split over tp; None: whole on every rank

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """What one of tp ranks holds."""
        return tuple(size // tp if dim == self.dim else size for dim, size in enumerate(self.shape))

    def local_size(self, tp: int) -> int:
        """Elements one of tp ranks holds."""
        return math.prod(self.local_shape(tp))

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices and embeddings."""
        return len(self.shape) >= 2


def parts(config: Config, plan: Plan) -> tuple[Part, ...]:
    """All parts of the model in the order of plan.layers; a tied head has none of its own."""
    return tuple(part for layer in plan.layers for part in layer_parts(config, plan, layer))


def stage_parts(config: Config, plan: Plan, pp: int) -> tuple[Part, ...]:
    """The parts that stage `pp` stores; with tied embeddings the last of several stages has a copy of embedding.word.weight."""
    found = [part for layer in plan.stage_layers(pp) for part in layer_parts(config, plan, layer)]
    if config.model.tie_embeddings and plan.pp > 1 and pp == plan.pp - 1:
        found += layer_parts(config, plan, "embedding")
    return tuple(found)


def parameter_sizes(parts_held: Iterable[Part], tp: int) -> dict[str, tuple[int, bool]]:
    """Local parameter -> (elements on one tp rank, whether it decays)."""
    sizes: dict[str, tuple[int, bool]] = {}
    for part in parts_held:
        before = sizes.get(part.parameter, (0, part.decays))[0]
        sizes[part.parameter] = (before + part.local_size(tp), part.decays)
    return sizes


def model_size(config: Config, plan: Plan) -> int:
    """Parameters of the whole model, tied ones once, padded vocabulary included."""
    return sum(math.prod(part.shape) for part in parts(config, plan))


def layer_parts(config: Config, plan: Plan, layer: str) -> list[Part]:
    """The parts of one layer of plan.layers."""
    model = config.model
    shared = PARTIAL if plan.sequence_parallel else REPLICATED  # a rank sees only its share of the positions
    vocabulary = (plan.padded_vocab_size, model.hidden_size)
    if layer == "embedding":
        return [_sharded(layer, "embedding.word.weight", vocabulary, 0)]
    if layer == "position":
        shape = (model.seq_length, model.hidden_size)
        return [_whole(layer, "embedding.position.weight", shape, shared)] if model.position_embedding == "learned" else []
    if layer == "final_norm":
        return list(_norm(config, layer, "final_norm", model.hidden_size, shared))
    if layer == "head":
        return [] if model.tie_embeddings else [_sharded(layer, "head.weight", vocabulary, 0)]
    return [*_attention(config, plan, layer, shared), *_mlp(config, layer, shared)]


def _attention(config: Config, plan: Plan, layer: str, shared: str) -> Iterator[Part]:
    model, name = config.model, f"{layer}.attention"
    h, d = model.hidden_size, model.head_dim
    query, key_value = model.num_attention_heads * d, model.num_query_groups * d
    split = model.num_query_groups >= plan.tp
    yield from _norm(config, layer, f"{name}.norm", h, shared)
    for suffix, columns in (("weight", (h,)), ("bias", ())) if model.qkv_bias else (("weight", (h,)),):
        fused = f"{name}.qkv.{suffix}" if split else None
        yield _sharded(layer, f"{name}.query.{suffix}", (query, *columns), 0, fused)
        for which in ("key", "value"):
            part = f"{name}.{which}.{suffix}"
            shape = (key_value, *columns)
            # With fewer groups than ranks each rank uses one group of a whole copy: its gradient covers that group only.
            yield _sharded(layer, part, shape, 0, fused) if split else _whole(layer, part, shape, PARTIAL)
    if model.qk_norm:
        for which in ("query_norm", "key_norm"):
            yield from _norm(config, layer, f"{name}.{which}", d, PARTIAL if plan.tp > 1 else REPLICATED)
    yield _sharded(layer, f"{name}.projection.weight", (h, query), 1)
    if model.bias:
        yield _whole(layer, f"{name}.projection.bias", (h,), shared)


def _mlp(config: Config, layer: str, shared: str) -> Iterator[Part]:
    model, name = config.model, f"{layer}.mlp"
    h, ffn = model.hidden_size, model.ffn_hidden_size
    wide = ("gate", "up") if model.gated else ("up",)
    yield from _norm(config, layer, f"{name}.norm", h, shared)
    for suffix, columns in (("weight", (h,)), ("bias", ())) if model.mlp_bias else (("weight", (h,)),):
        fused = f"{name}.gate_up.{suffix}" if len(wide) == 2 else None
        for which in wide:
            yield _sharded(layer, f"{name}.{which}.{suffix}", (ffn, *columns), 0, fused)
    yield _sharded(layer, f"{name}.down.weight", (h, ffn), 1)
    if model.mlp_bias:
        yield _whole(layer, f"{name}.down.bias", (h,), shared)


def _norm(config: Config, layer: str, name: str, size: int, kind: str) -> Iterator[Part]:
    yield _whole(layer, f"{name}.weight", (size,), kind)
    if config.model.normalization == "layer_norm":
        yield _whole(layer, f"{name}.bias", (size,), kind)


def _sharded(layer: str, name: str, shape: tuple[int, ...], dim: int, parameter: str | None = None) -> Part:
    return Part(name, layer, parameter or name, shape, SHARDED, dim)


def _whole(layer: str, name: str, shape: tuple[int, ...], kind: str) -> Part:
    return Part(name, layer, name, shape, kind, None)
