"""Which layers a stage holds: transformer layers spread so that the slowest stage is as fast as can be.

The layer list is ("embedding", "position", "layers.0", ..., "layers.N-1", "final_norm", "head"). Embedding and position stay
on the first stage, final norm and head on the last, and every stage has a transformer layer.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megalm.config import Config

from . import flops

# An embedding multiplies nothing but moves bytes: about 10 for each element, lookup and gradient together. On an accelerator a
# byte takes as long as some hundred multiply-adds.
EMBEDDING_FLOPS_PER_ELEMENT = 1000.0


class Costs(NamedTuple):
    """FLOPs or their equivalent in time, forward, for each token."""
    first: float    # embedding and position
    layer: float    # one transformer layer
    last: float     # final norm and head


def layer_names(num_layers: int) -> tuple[str, ...]:
    """The model's layers in order."""
    return ("embedding", "position", *(f"layers.{i}" for i in range(num_layers)), "final_norm", "head")


def costs(config: Config, padded_vocab_size: int) -> Costs:
    """What each kind of layer costs. All transformer layers cost the same."""
    return Costs(first=EMBEDDING_FLOPS_PER_ELEMENT * config.model.hidden_size,
                 layer=flops.layer_forward(config),
                 last=flops.head_forward(config, padded_vocab_size))


def stage_costs(counts: Sequence[int], cost: Costs) -> list[float]:
    """The cost of each stage that holds `counts` transformer layers."""
    result = [count * cost.layer for count in counts]
    result[0] += cost.first
    result[-1] += cost.last
    return result


def balance(num_layers: int, pp: int, cost: Costs) -> tuple[int, ...]:
    """Transformer layers of each stage with the least maximum cost.

    Each layer goes where the cost after adding it is least, which is optimal because layers cost the same. Of equal stages the
    later one takes it: under 1F1B it keeps fewer micro-batches' activations.
    """
    assert num_layers >= pp
    counts = [1] * pp
    for _ in range(num_layers - pp):
        after = [one + cost.layer for one in stage_costs(counts, cost)]
        counts[min(range(pp), key=lambda stage: (after[stage], -stage))] += 1
    return tuple(counts)


def bounds(counts: Sequence[int]) -> tuple[int, ...]:
    """pp + 1 bounds over the layer list for stages that hold `counts` transformer layers."""
    result = [0]
    for count in counts:
        result.append(result[-1] + count)
    # embedding and position come before the first layer, final norm and head after the last
    return (0, *(bound + 2 for bound in result[1:-1]), result[-1] + 4)
