"""checkpoint.init_from with another program's weights: each rank fills its own slices, under any layout, with no conversion."""
from __future__ import annotations

import json

import pytest
import torch

from megalm.checkpoint import find, read_weights
from megalm.checkpoint.foreign import sources
from megalm.checkpoint.huggingface import open_huggingface
from tests import training
from tests.checkpoint import test_foreign
from tests.model.transformers_weights import gpt2, llama_like, neox, randomise, save

MODELS = {
    "gpt2": lambda: gpt2(vocab_size=257, n_positions=16),
    "qwen2": lambda: llama_like("Qwen2", vocab_size=257, num_key_value_heads=2, tie_word_embeddings=True).to(torch.bfloat16),
    "gpt_neox": lambda: neox(vocab_size=257),
}
LAYOUTS = {
    "gpt2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, "fp32"),
    "qwen2": (4, {"tp": 4, "zero_stage": 2}, "fp32"),  # fewer query groups than ranks
    "gpt_neox": (4, {"tp": 2, "dp": 2, "zero_stage": 3}, "bf16"),
}


def job(tmp_path, name, changes=None, **sections):
    changes = changes or {}
    save(randomise(MODELS[name]()), tmp_path / "hf")
    model = sources.describe(f"hf:{tmp_path / 'hf'}") | {"seq_length": 16, "vocab_size": None, "dropout": 0.0}
    path = training.write_config(tmp_path, train={"steps": 3}, checkpoint={"init_from": f"hf:{tmp_path / 'hf'}"}, **sections)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": model | changes}))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_a_run_of_any_layout_are_those_of_the_folder(name, tmp_path):
    world, parallel, dtype = LAYOUTS[name]
    path = job(tmp_path, name, parallel={"dp": "auto", **parallel}, precision={"dtype": dtype})
    # A step whose gradients aren't finite is skipped: what is saved is what was loaded.
    assert training.start(world, path, "train.stop_at=1", poisoned=(0,)) == [(0, "")] * world
    theirs, ours = open_huggingface(tmp_path / "hf").weights, read_weights(find(tmp_path / "run"))
    assert set(theirs) == set(ours)
    for part, tensor in theirs.items():
        assert torch.equal(ours[part][:tensor.shape[0]], tensor.float()), part
    assert ours.shape("embedding.word.weight")[0] == 384


@pytest.mark.parametrize("kind, parallel", [("megatron", {"tp": 2, "pp": 2}), ("neox", {"tp": 2, "dp": 2, "zero_stage": 3})])
def test_checkpoints_of_other_programs(kind, parallel, tmp_path):
    """Saved by two tensor-parallel ranks (and two stages), and read where they lie."""
    model = {"megatron": test_foreign.GPT, "neox": test_foreign.NEOX}[kind].model_copy(update={"vocab_size": 257})
    parts, spec = test_foreign.draw(model), f"{kind}:{tmp_path / 'theirs'}"
    if kind == "megatron":
        test_foreign.megatron(tmp_path / "theirs", model, parts, 2, 2, test_foreign.CORE, {"num_attention_heads": 8})
    else:
        test_foreign.neox(tmp_path / "theirs", model, parts, 2)
    parallel = {"dp": "auto", **parallel}
    path = training.write_config(tmp_path, train={"steps": 3}, checkpoint={"init_from": spec}, parallel=parallel)
    section = model.model_dump(mode="json") | {"vocab_size": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": section}))
    assert training.start(4, path, "train.stop_at=1", poisoned=(0,)) == [(0, "")] * 4
    ours = read_weights(find(tmp_path / "run"))
    assert set(ours) == set(parts)
    for part, tensor in parts.items():
        assert torch.equal(ours[part][:tensor.shape[0]], tensor), part


def test_a_loss_under_two_layouts_is_transformers(tmp_path):
    path = job(tmp_path, "gpt_neox")
    losses = []
    for world, name, *overrides in ((1, "one"), (4, "four", "parallel.tp=2", "parallel.pp=2")):
        assert training.start(world, path, "train.stop_at=1", f"train.dir={tmp_path / name}", *overrides) == [(0, "")] * world
        losses.append(training.records(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert training.start(1, path, "train.stop_at=1", f"train.dir={tmp_path / 'new'}", "checkpoint.init_from=null") == [(0, "")]
    assert abs(training.records(tmp_path / "new")[0]["loss"] - losses[0]) > 0.1


def test_all_differences_are_one_error_before_anything_runs(tmp_path):
    changes = {"norm_eps": 1e-3, "rotary_fraction": 0.5, "hidden_size": 32, "vocab_size": 300}
    path = job(tmp_path, "gpt_neox", changes)
    results = training.start(2, path, "parallel.tp=2")
    assert {code for code, _ in results} == {2}
    said = max((text for _, text in results), key=len)
    assert "is another model" in said and "`megalm convert --print-config hf:" in said and said.strip().count("\n") == 0
    for part in ("model.norm_eps: 0.001 here, 1e-05 in", "model.rotary_fraction: 0.5 here, 0.25 in",
                 "model.hidden_size: 32 here, 64 in", "model.vocab_size: 300 here, 257 in"):
        assert part in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_is_not_there(tmp_path):
    path = training.write_config(tmp_path, checkpoint={"init_from": "hf:nowhere/at/all"})
    ((code, said),) = training.start(1, path)
    assert (code, said) == (2, "error: nowhere/at/all: no such folder\n"), json.dumps(said)
