"""The plan as a whole: what is derived, what is refused, what is noted, and that it needs no torch."""
from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megalm.plan import PlanError, backends, flops, make_plan
from tests.config.trees import config


def test_derived():
    plan = make_plan(config(parallel={"tp": 2, "pp": 2, "sequence_parallel": True}, batch={"micro": 2, "global": 12}), 12)
    assert (plan.world_size, plan.tp, plan.pp, plan.dp) == (12, 2, 2, 3)
    assert (plan.micro_batch, plan.global_batch, plan.accumulation_steps) == (2, 12, 2)
    assert (plan.vocab_size, plan.padded_vocab_size) == (300, 384)
    assert plan.bubble == pytest.approx(1 / 3)
    assert plan.sequence_parallel is True
    assert plan.layers == ("embedding", "position", "layers.0", "layers.1", "layers.2", "layers.3", "final_norm", "head")
    assert plan.stage_layers(0) + plan.stage_layers(1) == plan.layers
    assert plan.place(7) == (1, 0, 1) and plan.rank(pp=1, dp=0, tp=1) == 7


def test_stages_by_hand():
    plan = make_plan(config(parallel={"pp": 3, "stages": [2, 1, 1]}), 3)
    assert plan.stages == (0, 4, 5, 8)
    assert plan.stage_layers(2) == ("layers.3", "final_norm", "head")


def test_vocabulary():
    unknown = config(model={"vocab_size": None})
    assert make_plan(unknown, 1, vocab_size=257).vocab_size == 257
    assert make_plan(config(), 1, vocab_size=257).vocab_size == 300      # the model may be larger than its tokenizer
    with pytest.raises(PlanError, match=r"model\.vocab_size: missing"):
        make_plan(unknown, 1)
    with pytest.raises(PlanError, match=r"model\.vocab_size: 300 is smaller than the tokenizer's vocabulary of 301"):
        make_plan(config(), 1, vocab_size=301)


def test_all_problems_at_once():
    with pytest.raises(PlanError) as error:
        make_plan(config(parallel={"tp": 2, "pp": 2}, model={"vocab_size": None}), 6)
    assert [problem.split(":")[0].split(" is")[0] for problem in error.value.problems] == ["world size 6", "model.vocab_size"]
    with pytest.raises(PlanError, match=r"batch.global = 8 is not divisible by batch.micro x dp = 1 x 3 = 3"):
        make_plan(config(), 3)


@pytest.mark.parametrize("dtype, zero, pp, effective, wrapper", [
    ("fp32", 0, 1, 0, "none"),
    ("fp32", 0, 2, 1, "DeepSpeedZeroOptimizer"),
    ("fp32", 1, 1, 1, "DeepSpeedZeroOptimizer"),
    ("fp32", 2, 1, 2, "DeepSpeedZeroOptimizer"),
    ("fp32", 3, 1, 3, "DeepSpeedZeroOptimizer_Stage3"),
    ("bf16", 0, 1, 1, "BF16_Optimizer"),
    ("bf16", 0, 2, 1, "BF16_Optimizer"),
    ("bf16", 1, 1, 1, "BF16_Optimizer"),
    ("bf16", 2, 1, 2, "DeepSpeedZeroOptimizer"),
    ("bf16", 3, 1, 3, "DeepSpeedZeroOptimizer_Stage3"),
    ("fp16", 0, 1, 1, "DeepSpeedZeroOptimizer"),
    ("fp16", 1, 2, 1, "DeepSpeedZeroOptimizer"),
])
def test_zero_stage_and_wrapper(dtype, zero, pp, effective, wrapper):
    plan = make_plan(config(precision={"dtype": dtype}, parallel={"zero_stage": zero, "pp": pp}), pp)
    assert (plan.zero_stage, plan.wrapper) == (effective, wrapper)
    assert any(note.startswith("parallel.zero_stage 0 runs as 1") for note in plan.notes) == (effective != zero)


def test_notes():
    plan = make_plan(config(parallel={"pp": 4, "sequence_parallel": True}, batch={"global": 2}), 4)
    assert plan.sequence_parallel is False
    assert any("no effect" in note for note in plan.notes)
    assert any(note.startswith("each stage waits 60% of a step: 2 micro-batches in 4 stages") for note in plan.notes)
    assert make_plan(config(), 1).notes == ()


def test_plan_is_frozen_and_json():
    plan = make_plan(config(), 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.tp = 2
    read = json.loads(json.dumps(plan.to_dict()))
    assert read == plan.to_dict()
    assert read["stages"] == [0, 8] and read["layers"][0] == "embedding"


def test_intended_backends(monkeypatch):
    capabilities = {"megalm": {"cannot": {"float32": "half only"}}, "torch": {"avoid": {"dropout": "not keyed"}}}
    table = {"attention": ["megalm", "torch", "reference"], "backends": {"attention": capabilities}}
    monkeypatch.setattr(backends, "_table", lambda: table)

    def attention(**sections):
        return make_plan(config(**sections), 1).backends["attention"]

    assert attention() == "megalm"
    assert attention(precision={"dtype": "fp32"}) == "torch"
    assert attention(precision={"dtype": "fp32"}, model={"attention_dropout": 0.1}) == "reference"
    assert attention(kernels={"attention": "liger"}) == "liger"
    assert make_plan(config(kernels={"rotary": "reference"}), 1).backends["rotary"] == "reference"
    assert make_plan(config(), 1).backends["norm"] == "auto"
    capabilities |= {"torch": {"avoid": {"documents": "slow"}}, "reference": {"avoid": {"documents": "slower"}}}
    assert attention(precision={"dtype": "fp32"}, data={"document_mask": True}) == "torch"  # all avoid it: the first that serves
    monkeypatch.setattr(backends, "_table", dict)
    assert attention() == "auto"


FUSED = {"model": {"hidden_size": 512, "num_attention_heads": 8}}
OTHER = {"model": {"hidden_size": 384, "num_attention_heads": 8}}
DROPOUT = {"attention_dropout": 0.1}


@pytest.mark.parametrize("sections, intended, keeping", [
    (FUSED, "torch", {"reference"}),
    ({**FUSED, "data": {"document_mask": True}}, "megalm", {"reference"}),
    ({**FUSED, "model": {**FUSED["model"], "sliding_window": 40}}, "megalm", {"reference"}),
    ({**FUSED, "precision": {"dtype": "fp32"}, "data": {"document_mask": True}}, "torch", {"reference", "megalm"}),
    ({**OTHER, "data": {"document_mask": True}}, "torch", {"reference", "megalm"}),
    ({"model": {**FUSED["model"], **DROPOUT}}, "megalm", {"reference"}),
    ({"model": {**OTHER["model"], **DROPOUT}}, "megalm", {"reference", "megalm"}),
])
def test_selective_recomputation_is_for_scores(sections, intended, keeping):
    """Which attention a model is meant to run with, and which backends would keep scores for it on a GPU."""
    planned = config(**sections, recompute={"mode": "selective"})
    plan, named = make_plan(planned, 1), ("megalm", "torch", "flash_attn", "reference")
    assert plan.backends["attention"] == intended
    assert {name for name in named if backends.keeps_scores(planned, name)} == keeping
    assert backends.keeps_scores(planned, "torch", "cpu") == (planned.model.attention_dropout > 0)
    once, executed = (flops.per_token_executed(planned, 384, name) for name in ("torch", intended))
    again = planned.model.num_layers * flops.attention_core_forward(planned) * (intended in keeping)
    assert once == flops.per_token(planned, 384) and executed == once + again
    assert any("nothing to recompute" in note for note in plan.notes) == (intended not in keeping)


def test_every_operation_of_the_table_is_a_key():
    other = {"about", "measured", "backends", "decode", "optimizer"}  # decode is generation's, optimizer that of optimizer.impl
    operations = set(backends._table()) - other
    assert operations <= set(config().kernels.model_dump())


def test_no_torch_is_imported():
    code = ("import sys, megalm.plan, megalm.plan.memory, megalm.plan.flops; "
            "print(sorted({'torch', 'numpy', 'deepspeed', 'megalm.plan.memory'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['megalm.plan.memory']", done.stderr
