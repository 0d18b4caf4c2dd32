"""Bytes on a rank: arithmetic on numbers worked out by hand. tests/plan/test_live.py holds it to the engine's tensors."""
from __future__ import annotations

import dataclasses

import pytest

from megalm.plan import activations, make_plan
from megalm.plan.memory import REDUCE_BUCKET, memory, rank_memory
from megalm.plan.parameters import model_size, parts, stage_parts
from tests.config.trees import config

# One layer of hidden 8 and ffn 32, vocabulary 16: attention 4 x 64 + 32, MLP 2 x 256 + 40, two norms of 16, positions 4 x 8.
TINY = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 4, "vocab_size": 16, "vocab_multiple": 4}
LAYER = (256 + 32) + (512 + 40) + 32
SIZE = LAYER + 16 * 8 + 4 * 8 + 16


def plan_of(world_size=1, **sections):
    tiny = config(model={**TINY, **sections.pop("model", {})}, **sections)
    return tiny, make_plan(tiny, world_size)


def test_counts_by_hand():
    assert model_size(*plan_of()) == SIZE
    assert model_size(*plan_of(model={"tie_embeddings": False})) == SIZE + 16 * 8
    assert model_size(*plan_of(model={"bias": False})) == SIZE - 32 - 40
    assert model_size(*plan_of(model={"normalization": "rms_norm"})) == SIZE - 3 * 8
    assert model_size(*plan_of(model={"position_embedding": "rotary"})) == SIZE - 4 * 8
    assert model_size(*plan_of(model={"num_query_groups": 1})) == SIZE - 2 * (4 * 8 + 4)
    assert model_size(*plan_of(model={"qk_norm": True})) == SIZE + 4 * 4
    for gated in ("swiglu", "geglu"):
        assert model_size(*plan_of(model={"activation": gated, "ffn_hidden_size": 32})) == SIZE + 32 * 8 + 32
    assert model_size(*plan_of(model={"vocab_size": 15, "vocab_multiple": 32})) == SIZE + 16 * 8


def test_names_kinds_and_shares():
    few_groups = {"num_query_groups": 1, "num_attention_heads": 4, "qk_norm": True}
    found = {part.name: part for part in parts(*plan_of(4, model=few_groups, parallel={"tp": 4, "sequence_parallel": True}))}
    key, down = found["layers.0.attention.key.weight"], found["layers.0.mlp.down.weight"]
    assert found["layers.0.attention.query.weight"].local_shape(4) == (2, 8)
    assert (key.kind, key.dim, key.local_shape(4)) == ("partial", None, (2, 8))
    assert (down.kind, down.dim, down.local_shape(4)) == ("sharded", 1, (8, 8))
    for name in ("layers.0.attention.norm.weight", "layers.0.attention.query_norm.bias", "layers.0.mlp.down.bias",
                 "embedding.position.weight", "final_norm.weight"):
        assert found[name].kind == "partial"
    assert found["embedding.word.weight"].decays and not found["layers.0.attention.query.bias"].decays
    plain = {part.name: part.kind for part in parts(*plan_of(2, parallel={"tp": 2}))}
    assert plain["layers.0.attention.key.weight"] == "sharded" and plain["final_norm.weight"] == "replicated"


def test_tied_copy_is_on_the_last_stage():
    def embeddings(world, pp, tied):
        model = {"num_layers": 2, "tie_embeddings": tied}
        held = stage_parts(*plan_of(world, model=model, parallel={"pp": world}), pp)
        return [part.name for part in held if part.name in ("embedding.word.weight", "head.weight")]

    assert embeddings(2, 0, tied=True) == embeddings(2, 1, tied=True) == ["embedding.word.weight"]
    assert embeddings(1, 0, tied=True) == ["embedding.word.weight"]
    assert embeddings(2, 1, tied=False) == ["head.weight"]


MATRICES = 4 * 64 + 512 + 16 * 8 + 4 * 8    # decays
VECTORS = SIZE - MATRICES


@pytest.mark.parametrize("dtype, zero, world, weights, gradients, optimizer", [
    ("fp32", 0, 1, 4 * SIZE, 4 * SIZE, 8 * SIZE),
    ("fp32", 0, 3, 4 * SIZE, 4 * SIZE, 8 * SIZE),
    ("fp32", 1, 2, 4 * SIZE, 4 * SIZE, 12 * SIZE // 2),
    # 928 and 120 are padded to 930 and 120: a multiple of 6 each
    ("fp32", 1, 3, 4 * 1050, 4 * SIZE, 12 * 1050 // 3),
    ("bf16", 1, 1, 2 * SIZE, 6 * SIZE, 12 * SIZE),
    ("bf16", 1, 3, 2 * 1050, 4 * 1050 + 2 * SIZE, 12 * 1050 // 3),
    ("bf16", 2, 3, 2 * 1050, 4 * 1050 // 3, 12 * 1050 // 3),
    ("fp16", 1, 2, 2 * SIZE, 2 * SIZE, 12 * SIZE // 2),
    ("fp32", 3, 2, 2 * SIZE, 2 * SIZE, 6 * SIZE),
    ("bf16", 3, 2, SIZE, 2 * SIZE, 6 * SIZE),
])
def test_state_by_hand(dtype, zero, world, weights, gradients, optimizer):
    assert (MATRICES, VECTORS) == (928, 120)
    tiny, plan = plan_of(world, parallel={"zero_stage": zero}, precision={"dtype": dtype}, batch={"global": 12})
    held = rank_memory(tiny, plan, 0)
    assert (held.parameters, held.weights, held.gradients, held.optimizer) == (SIZE, weights, gradients, optimizer)
    assert held.total == weights + gradients + optimizer + held.activations + held.working


def test_zero_3_pads_each_parameter():
    tiny, plan = plan_of(5, parallel={"zero_stage": 3}, precision={"dtype": "fp32"}, batch={"global": 10})
    sizes = [192, 24, 64, 8, 8, 8, 256, 32, 256, 8, 8, 8, 16 * 8, 4 * 8, 8, 8]  # qkv, projection, up, down, norms, embeddings
    assert sum(sizes) == SIZE
    assert rank_memory(tiny, plan, 0).weights == 4 * sum(-(-size // 5) for size in sizes)


def test_zero_2_in_fp32_keeps_whole_gradients():
    tiny, plan = plan_of(2, parallel={"zero_stage": 2}, precision={"dtype": "fp32"})
    ranks = [rank_memory(tiny, plan, 0, dp) for dp in (0, 1)]
    # The partition ends inside one matrix and inside one vector, which both ranks keep.
    assert sum(held.gradients for held in ranks) == 4 * (SIZE + 256 + 8)
    assert memory(tiny, plan)[0].gradients == max(held.gradients for held in ranks)


def test_sgd_without_momentum_keeps_masters_only():
    for momentum, moments in ((0.0, 0), (0.9, 1)):
        tiny, plan = plan_of(optimizer={"name": "sgd", "momentum": momentum})
        assert rank_memory(tiny, plan, 0).optimizer == 4 * SIZE * (1 + moments)


def test_buckets_and_gathered_weights():
    plain = rank_memory(*plan_of(), 0)
    assert plain.working == 0  # BF16_Optimizer reduces its own buffer
    assert rank_memory(*plan_of(precision={"dtype": "fp32"}), 0).working == 4 * REDUCE_BUCKET
    small = {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert rank_memory(*plan_of(precision={"dtype": "fp32"}, deepspeed=small), 0).working == 4000
    zero3 = rank_memory(*plan_of(precision={"dtype": "fp32"}, deepspeed=small, parallel={"zero_stage": 3}), 0)
    assert zero3.working == 4000 + 4 * (2 * LAYER + SIZE)


def test_activations():
    def of(world=1, pp=0, **sections):
        return rank_memory(*plan_of(world, **sections), pp).activations

    wide = {"model": {"num_layers": 4, "num_attention_heads": 4}, "batch": {"micro": 1, "global": 8}}
    none, selective, full = (of(**wide, recompute={"mode": mode}) for mode in ("none", "selective", "full"))
    assert full < selective == none  # the fused attention keeps no scores
    scores = {**wide, "kernels": {"attention": "reference"}}
    assert full < of(**scores, recompute={"mode": "selective"}) < of(**scores)
    # 1F1B: the first of four stages has four micro-batches in flight, the last but one two
    pipeline = {**wide, "parallel": {"pp": 4, "stages": [1, 1, 1, 1]}}
    assert of(4, 0, **pipeline) == 2 * of(4, 2, **pipeline)
    sharded = of(4, **wide, parallel={"tp": 4})
    assert of(4, **wide, parallel={"tp": 4, "sequence_parallel": True}) < sharded < none
    assert of(**{**wide, "kernels": {"attention": "reference"}}) > none
    assert of(**{**wide, "model": {**wide["model"], "dropout": 0.1}}) == none  # keyed masks are drawn again, not kept


def test_one_layer_by_hand():
    tiny, plan = plan_of()
    # bf16, 4 tokens: four [s, b, h] around the norms; q, k, v; context; up and its activation; the fp32 log-sum-exp of 2 heads
    assert activations.layer_activations(tiny, plan, "none") == 2 * 4 * (4 * 8 + 3 * 8 + 8 + 2 * 32) + 4 * 2 * 4
    assert activations.layer_activations(tiny, plan, "full") == 2 * 4 * 8


def test_plan_lists_memory_as_integers():
    for held in memory(*plan_of(8, parallel={"tp": 2}, batch={"global": 8})):
        assert all(isinstance(value, int) for value in dataclasses.asdict(held).values())
