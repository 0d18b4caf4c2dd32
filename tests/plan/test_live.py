"""Parameters, gradient and optimizer bytes of every rank equal what its live engine holds; the parts are the model's own."""
from __future__ import annotations

import pytest

from megalm.plan import activations, make_plan
from megalm.plan.memory import rank_memory
from megalm.plan.parameters import stage_parts
from tests import dist
from tests.config.trees import config
from tests.plan.live import measure, saved_by_a_layer

# Sizes that dp divides nowhere, so that every kind of padding shows.
GPT = {"num_layers": 3, "hidden_size": 40, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 52,
       "seq_length": 8, "vocab_size": 301, "vocab_multiple": 4}
LLAMA = {**GPT, "normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary", "num_attention_heads": 4,
         "tie_embeddings": False, "bias": False, "qk_norm": True}
FEW_GROUPS = {**GPT, "num_query_groups": 2}

LAYOUTS = [
    # model, dtype, parallel, ranks; "immediate": DeepSpeed adds each bf16 gradient to the fp32 buffer at once
    (GPT, "fp32", {"zero_stage": 0}, 2),
    (GPT, "fp32", {"zero_stage": 1}, 3),
    (GPT, "fp32", {"zero_stage": 2}, 3),
    (GPT, "fp32", {"zero_stage": 3}, 3),
    (LLAMA, "bf16", {"zero_stage": 1}, 3),
    (LLAMA, "bf16", {"zero_stage": 2}, 3),
    (LLAMA, "bf16", {"zero_stage": 3}, 3),
    (LLAMA, "fp32", {"tp": 2, "zero_stage": 2}, 4),
    (FEW_GROUPS, "bf16", {"tp": 4, "sequence_parallel": True}, 4),
    (FEW_GROUPS, "fp32", {"tp": 4, "zero_stage": 3}, 4),
    (GPT, "fp32", {"pp": 2, "zero_stage": 0}, 2),
    (GPT, "bf16", {"pp": 3}, 3),
    (LLAMA, "fp32", {"pp": 2, "stages": [1, 2]}, 6),
    (GPT, "bf16", {"tp": 2, "pp": 2, "sequence_parallel": True}, 4),
    (LLAMA, "bf16", {"tp": 2, "pp": 2, "sequence_parallel": True}, 8),
    (GPT, "bf16 immediate", {"pp": 2}, 4),
]


LLAMA_LAYER = {"normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary", "bias": False,
               "num_query_groups": 2}
LAYERS = [
    # attention backend, model, dtype, recompute, tp, sequence parallel
    ("torch", {}, "bf16", "none", 1, False),
    ("torch", {}, "bf16", "full", 1, False),
    ("torch", LLAMA_LAYER, "fp32", "selective", 1, False),
    ("torch", {**LLAMA_LAYER, "activation": "geglu"}, "bf16", "none", 1, False),
    ("torch", LLAMA_LAYER, "bf16", "none", 2, True),
    ("torch", LLAMA_LAYER, "bf16", "none", 2, False),
    ("torch", {"qk_norm": True, "dropout": 0.1}, "bf16", "none", 1, False),
    ("reference", {"attention_dropout": 0.1}, "bf16", "none", 1, False),
    ("reference", {"attention_dropout": 0.1}, "fp32", "selective", 1, False),
    ("torch", {"num_query_groups": 1}, "bf16", "none", 2, True),
    ("torch", {"parallel_residual": True, "activation": "gelu_exact", "position_embedding": "rotary", "rotary_fraction": 0.5},
     "bf16", "none", 2, True),
    ("torch", {**LLAMA_LAYER, "head_dim": 48, "qkv_bias": True}, "bf16", "none", 1, False),
    ("reference", {}, "bf16", "none", 1, False),
    ("reference", {"attention_dropout": 0.1}, "fp32", "none", 1, False),
    ("reference", {}, "bf16", "selective", 1, False),
    ("torch", {}, "bf16", "selective", 2, True),
    ("torch", {"hidden_size": 512}, "bf16", "selective", 1, False),
    ("torch", {"num_query_groups": 2}, "fp32", "none", 1, False),
    ("torch", {**LLAMA_LAYER, "num_query_groups": 4}, "fp32", "none", 2, True),
    ("torch", {**LLAMA_LAYER, "num_query_groups": 1}, "fp32", "none", 1, False),
    ("torch", {**LLAMA_LAYER, "qk_norm": True}, "fp32", "none", 1, False),
]
DOCUMENTS = [
    ("torch", LLAMA_LAYER, "bf16", "none", 1, False),
    ("torch", LLAMA_LAYER, "fp32", "selective", 2, True),
    ("reference", {}, "fp32", "none", 1, False),
    ("reference", {}, "bf16", "selective", 1, False),
]
WINDOW = [
    ("torch", {"sliding_window": 40}, "bf16", "none", 1, False),
    ("torch", {**LLAMA_LAYER, "sliding_window": 40}, "fp32", "selective", 2, True),
    ("torch", {**LLAMA_LAYER, "sliding_window": 40}, "bf16", "none", 1, False),
]
CASES = [*((*case, {}) for case in LAYERS + WINDOW),
         *((*case, {"document_mask": True, "reset_positions": True}) for case in DOCUMENTS + WINDOW)]


@pytest.mark.parametrize("attention, model, dtype, recompute, tp, sequence_parallel, data", CASES)
def test_a_layer_keeps_what_the_plan_says(attention, model, dtype, recompute, tp, sequence_parallel, data):
    sections = {"model": {"hidden_size": 256, "seq_length": 128, **model}, "precision": {"dtype": dtype}, "batch": {"micro": 2},
                "parallel": {"tp": tp, "sequence_parallel": sequence_parallel}, "recompute": {"mode": recompute},
                "data": data,
                "kernels": {"attention": attention, "rotary": "torch"}}  # auto means other ones to the plan than to a CPU
    planned = config(**sections)
    estimate = activations.layer_activations(planned, make_plan(planned, tp), recompute)
    if planned.model.gated and recompute != "full":
        # The plan counts what a GPU keeps; on a CPU swiglu and geglu keep silu or gelu of the gate, because that is faster there.
        tokens = planned.batch.micro * planned.model.seq_length
        estimate += tokens * planned.model.ffn_hidden_size // tp * activations.WIDTH[dtype]
    for live in dist.run(saved_by_a_layer, tp, sections):
        assert estimate == pytest.approx(live, rel=0.03)


@pytest.mark.parametrize("model, dtype, parallel, ranks", LAYOUTS)
def test_bytes_are_the_engines(model, dtype, parallel, ranks):
    dtype, _, immediate = dtype.partition(" ")
    dp = ranks // (parallel.get("tp", 1) * parallel.get("pp", 1))
    # With four micro-batches every stage has accumulated a gradient before its last forward.
    sections = {"model": model, "precision": {"dtype": dtype}, "parallel": parallel, "batch": {"micro": 1, "global": 4 * dp},
                "deepspeed": {"bf16": {"immediate_grad_update": bool(immediate)}}}
    planned = config(**sections)
    plan = make_plan(planned, ranks)
    for rank, live in enumerate(dist.run(measure, ranks, sections)):
        place = plan.place(rank)
        held = rank_memory(planned, plan, place.pp, place.dp)
        assert {name: getattr(held, name) for name in ("parameters", "weights", "gradients", "optimizer")} == {
            name: live[name] for name in ("parameters", "weights", "gradients", "optimizer")}, f"rank {rank}"
        assert [(part.name, part.shape, part.dim, part.kind) for part in sorted(
            stage_parts(planned, plan, place.pp), key=lambda part: part.name)] == live["parts"], f"rank {rank}"
