"""Stages: the slowest is as fast as any split allows, and embedding and head count."""
from __future__ import annotations

import itertools

import pytest

from megalm.plan import partition
from megalm.plan.partition import Costs
from tests.config.trees import config


def splits(layers, pp):
    """Every way to give each of pp stages at least one layer."""
    for cuts in itertools.combinations(range(1, layers), pp - 1):
        yield tuple(b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True))


@pytest.mark.parametrize("first, last", [(0.0, 0.0), (0.2, 1.3), (0.0, 2.5), (3.0, 0.4), (10.0, 10.0)])
@pytest.mark.parametrize("layers, pp", [(4, 1), (4, 4), (5, 2), (9, 4), (12, 5)])
def test_no_split_has_a_faster_slowest_stage(layers, pp, first, last):
    cost = Costs(first, 1.0, last)
    counts = partition.balance(layers, pp, cost)
    assert sum(counts) == layers and len(counts) == pp and min(counts) >= 1
    best = min(max(partition.stage_costs(split, cost)) for split in splits(layers, pp))
    assert max(partition.stage_costs(counts, cost)) == pytest.approx(best)


def test_layers_left_over_go_to_later_stages():
    assert partition.balance(9, 4, Costs(0.0, 1.0, 0.0)) == (2, 2, 2, 3)


def test_head_and_embedding_count():
    assert partition.balance(80, 4, Costs(0.0, 1.0, 1.2)) == (20, 20, 21, 19)
    large = config(model={"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 1024})
    counts = partition.balance(12, 2, partition.costs(large, 50304))
    assert counts == (8, 4)     # the head costs as much as 4.4 layers


def test_bounds_keep_the_ends_together():
    assert partition.bounds((4,)) == (0, 8)
    assert partition.bounds((1, 2, 1)) == (0, 3, 5, 8)
    names = partition.layer_names(4)
    assert [names[a:b] for a, b in itertools.pairwise(partition.bounds((1, 2, 1)))] == [
        ("embedding", "position", "layers.0"), ("layers.1", "layers.2"), ("layers.3", "final_norm", "head")]
