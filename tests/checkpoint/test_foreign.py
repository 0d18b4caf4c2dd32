"""Checkpoints of Megatron-LM and GPT-NeoX, laid out here as those programs lay them out, are read, merged over tp and stages."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from megalm.checkpoint import CheckpointError, Fragment, read_weights
from megalm.checkpoint.foreign import sources
from megalm.checkpoint.foreign.megatron import open_megatron
from megalm.checkpoint.foreign.neox import open_neox
from megalm.checkpoint.foreign.pickles import load_pickle
from megalm.checkpoint.huggingface import open_huggingface
from megalm.checkpoint.huggingface.read import part_shapes
from megalm.config.schema import Model
from megalm.tools.convert import main
from tests import dist
from tests.checkpoint import megatron_core
from tests.checkpoint.test_huggingface import Hostile
from tests.config.trees import config, tree

COMMON = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 8, "ffn_hidden_size": 48, "seq_length": 16,
          "vocab_size": 250}
GPT = Model(**COMMON)
LLAMA = Model(**COMMON, num_query_groups=4, normalization="rms_norm", activation="swiglu", position_embedding="rotary",
              tie_embeddings=False, bias=False, qkv_bias=True, qk_norm=True)
NEOX = Model(**COMMON, position_embedding="rotary", rotary_fraction=0.5, tie_embeddings=False, parallel_residual=True,
             activation="gelu_exact")


def draw(model: Model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {part: torch.randn(shape, generator=generator) for part, shape in part_shapes(model).items()}


def share(tensor: torch.Tensor, rank: int, tp: int, dim: int = 0) -> torch.Tensor:
    return tensor.chunk(tp, dim)[rank]


def vocabulary(tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """Rows of one rank of the vocabulary, padded to a multiple of 64 tp as --make-vocab-size-divisible-by 64 does."""
    rows = -(-len(tensor) // (64 * tp)) * 64 * tp
    return share(torch.cat((tensor, torch.full((rows - len(tensor), tensor.shape[1]), 7.0))), rank, tp)


def fused(parts: dict, name: str, suffix: str, model: Model, rank: int, tp: int) -> torch.Tensor:
    """Group by group: the queries of the group, its key, its value."""
    q, k, v = (parts[f"{name}.{part}.{suffix}"] for part in ("query", "key", "value"))
    d, groups = model.head_dim, model.num_query_groups
    wide = model.num_attention_heads // groups * d
    rows = []
    for g in range(rank * groups // tp, (rank + 1) * groups // tp):
        rows += [q[g * wide:(g + 1) * wide], k[g * d:(g + 1) * d], v[g * d:(g + 1) * d]]
    return torch.cat(rows)


def layer(parts: dict, i: int, model: Model, rank: int, tp: int, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """One layer of one tp rank; `names`: what the tensors are called."""
    found = {}
    for suffix in ("weight", "bias"):
        name, theirs = f"layers.{i}", {key: f"{value}{suffix}" for key, value in names.items()}
        for part, key in (("attention.norm", "norm1"), ("mlp.norm", "norm2"), ("attention.query_norm", "q_norm"),
                          ("attention.key_norm", "k_norm")):
            if f"{name}.{part}.{suffix}" in parts:
                found[theirs[key]] = parts[f"{name}.{part}.{suffix}"]
        if f"{name}.attention.query.{suffix}" in parts:
            found[theirs["qkv"]] = fused(parts, f"{name}.attention", suffix, model, rank, tp)
        for part, key in (("attention.projection", "projection"), ("mlp.down", "down")):
            if f"{name}.{part}.{suffix}" in parts:
                whole = parts[f"{name}.{part}.{suffix}"]
                found[theirs[key]] = share(whole, rank, tp, 1) if whole.dim() == 2 else whole
        wide = [parts[f"{name}.mlp.{part}.{suffix}"] for part in ("gate", "up") if f"{name}.mlp.{part}.{suffix}" in parts]
        if wide:
            found[theirs["up"]] = torch.cat([share(tensor, rank, tp) for tensor in wide])
    return found


CORE = {"norm1": "input_layernorm.", "norm2": "pre_mlp_layernorm.", "qkv": "self_attention.linear_qkv.",
        "projection": "self_attention.linear_proj.", "up": "mlp.linear_fc1.", "down": "mlp.linear_fc2.",
        "q_norm": "self_attention.q_layernorm.", "k_norm": "self_attention.k_layernorm."}
FUSED_NORMS = CORE | {"norm1": "self_attention.linear_qkv.layer_norm_", "norm2": "mlp.linear_fc1.layer_norm_"}
OLD = {"norm1": "input_layernorm.", "norm2": "post_attention_layernorm.", "qkv": "self_attention.query_key_value.",
       "projection": "self_attention.dense.", "up": "mlp.dense_h_to_4h.", "down": "mlp.dense_4h_to_h."}
IN_NEOX = OLD | {"qkv": "attention.query_key_value.", "projection": "attention.dense."}


def megatron(folder: Path, model: Model, parts: dict, tp: int, pp: int, names: dict, arguments: dict) -> None:
    """iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt as Megatron-LM saves it: names of Core, or of language_model."""
    old = names is OLD
    for rank in range(tp):
        for stage in range(pp):
            state: dict = {}
            per_stage = model.num_layers // pp
            decoder = "language_model.encoder" if old else "decoder"
            if stage == 0:
                first = "language_model.embedding" if old else "embedding"
                state[f"{first}.word_embeddings.weight"] = vocabulary(parts["embedding.word.weight"], rank, tp)
                if "embedding.position.weight" in parts:
                    state[f"{first}.position_embeddings.weight"] = parts["embedding.position.weight"]
            for i in range(per_stage):
                found = layer(parts, stage * per_stage + i, model, rank, tp, names)
                state |= {f"{decoder}.layers.{i}.{key}": value for key, value in found.items()}
                state[f"{decoder}.layers.{i}.mlp._extra_state"] = None
            if stage == pp - 1:
                norm = {name[11:]: tensor for name, tensor in parts.items() if name.startswith("final_norm")}
                state |= {f"{decoder}.final_layernorm.{name}": tensor for name, tensor in norm.items()}
                head = parts["embedding.word.weight" if model.tie_embeddings else "head.weight"]
                last = "word_embeddings_for_head.weight" if old and model.tie_embeddings else "output_layer.weight"
                state[f"language_model.{last}" if old and not model.tie_embeddings else last] = vocabulary(head, rank, tp)
            place = folder / "iter_0000100" / (f"mp_rank_{rank:02d}_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}")
            place.mkdir(parents=True)
            content = {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 100,
                       "model": nested(state) if old else state, "rng_state": [{"np": ("MT19937", [1, 2], 3)}]}
            torch.save(content, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def nested(state: dict) -> dict:
    """{"language_model": {"embedding": {"word_embeddings": {"weight": ...}}, "encoder": {"layers.0...": ...}}}."""
    found: dict = {}
    for key, value in state.items():
        at = found
        *path, last = key.split(".", 2) if ".encoder." in key else key.split(".")
        for word in path:
            at = at.setdefault(word, {})
        at[last] = value
    return found


def neox(folder: Path, model: Model, parts: dict, tp: int) -> None:
    """global_step7/layer_LL-model_TT-model_states.pt as DeepSpeed's pipeline saves GPT-NeoX: two layers without weights."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    last = model.num_layers + 3
    for rank in range(tp):
        contents = {0: {"word_embeddings.weight": vocabulary(parts["embedding.word.weight"], rank, tp)},
                    last: {f"norm.{name[11:]}": parts[name] for name in parts if name.startswith("final_norm")},
                    last + 1: {"final_linear.weight": vocabulary(parts["head.weight"], rank, tp)}}
        for i in range(model.num_layers):
            contents[i + 2] = layer(parts, i, model, rank, tp, IN_NEOX) | {"attention.rotary_emb.inv_freq": torch.ones(4)}
        for number, content in contents.items():
            torch.save(content, step / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")


def check(weights, parts: dict) -> None:
    """Whole and by slices, every part is there bit for bit."""
    assert set(weights) == set(parts)
    for part, expected in parts.items():
        assert torch.equal(weights[part], expected), part
        dim = expected.dim() - 1
        low, high = expected.shape[dim] // 4, expected.shape[dim] // 2
        target = torch.zeros_like(expected.narrow(dim, low, high - low)).reshape(-1)
        weights.fill(Fragment(part, "master", tuple(expected.shape), dim, low, high, 0, target))
        assert torch.equal(target, expected.narrow(dim, low, high - low).reshape(-1)), part


@pytest.mark.parametrize("model, tp, pp, names", [
    (GPT, 1, 1, CORE), (GPT, 2, 2, CORE), (GPT, 2, 2, OLD), (LLAMA, 4, 1, FUSED_NORMS), (LLAMA, 2, 4, CORE),
], ids=["gpt", "gpt-tp2-pp2", "gpt-old-tp2-pp2", "llama-fused-tp4", "llama-tp2-pp4"])
def test_megatron(model, tp, pp, names, tmp_path):
    parts = draw(model)
    megatron(tmp_path, model, parts, tp, pp, names, {"num_attention_heads": 8, "norm_epsilon": 1e-5, "num_experts": None})
    check(open_megatron(tmp_path, model), parts)


@pytest.mark.parametrize("tp", [1, 2])
def test_neox(tp, tmp_path):
    parts = draw(NEOX)
    neox(tmp_path, NEOX, parts, tp)
    check(open_neox(tmp_path, NEOX), parts)


def test_convert_reads_them_with_a_config(tmp_path, capsys):
    parts = draw(NEOX)
    neox(tmp_path / "neox", NEOX, parts, 2)
    spec, path = f"neox:{tmp_path / 'neox'}", tmp_path / "config.json"
    path.write_text(json.dumps(tree() | {"model": NEOX.model_dump(mode="json"), "tokenizer": {"type": "bytes"}}))
    assert main(["--from", spec, "--to", f"hf:{tmp_path / 'hf'}"]) == 2
    assert "--config is needed" in capsys.readouterr().err
    assert main(["--from", spec, "--config", str(path), "--to", f"hf:{tmp_path / 'hf'}"]) == 0
    assert main(["--from", spec, "--config", str(path), "--to", str(tmp_path / "ours")]) == 0
    for weights in (open_huggingface(tmp_path / "hf").weights, read_weights(tmp_path / "ours")):
        assert all(torch.equal(weights[part], tensor) for part, tensor in parts.items())


WRONG = [
    ({"num_attention_heads": 4}, GPT, "model.num_attention_heads: 8 here, 4 there"),
    ({"num_experts": 8}, GPT, "num_experts 8 isn't supported"),
    ({}, GPT.model_copy(update={"ffn_hidden_size": 64}), "layers.0.mlp.linear_fc1.weight of tp rank 0 is [24, 32], not [32, 32]"),
    ({}, GPT.model_copy(update={"num_layers": 5}), "decoder.layers.4.input_layernorm.weight is missing"),
    ({}, GPT.model_copy(update={"num_layers": 3}), "decoder.layers.3.input_layernorm.weight has no place in the model"),
]


@pytest.mark.parametrize("arguments, model, message", WRONG)
def test_another_model_is_refused(arguments, model, message, tmp_path):
    megatron(tmp_path, GPT, draw(GPT), 2, 1, CORE, arguments)
    with pytest.raises(CheckpointError) as error:
        sources.open_for(f"megatron:{tmp_path}", model, 250)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, model", [("megatron", LLAMA), ("neox", NEOX)])
def test_an_output_layer_of_its_own_is_not_dropped_for_a_tied_model(kind, model, tmp_path):
    """Whereas one that was written twice is the same."""
    parts, tied = draw(model), model.model_copy(update={"tie_embeddings": True})

    def write(folder):
        megatron(folder, model, parts, 2, 2, CORE, {}) if kind == "megatron" else neox(folder, model, parts, 2)

    write(tmp_path / "untied")
    with pytest.raises(CheckpointError, match="model.tie_embeddings: true here, and the output layer there has its own weights"):
        sources.open_for(f"{kind}:{tmp_path / 'untied'}", tied, 250)
    parts["head.weight"] = parts["embedding.word.weight"]
    write(tmp_path / "tied")
    del parts["head.weight"]
    check(sources.open_for(f"{kind}:{tmp_path / 'tied'}", tied, 250), parts)


def test_what_is_not_there_or_not_supported(tmp_path):
    for opener, message in ((open_megatron, "no mp_rank_"), (open_neox, "no layer_")):
        with pytest.raises(CheckpointError, match=message):
            opener(tmp_path, GPT)
    megatron(tmp_path / "megatron", GPT, draw(GPT), 2, 2, CORE, {})
    neox(tmp_path / "neox", NEOX, draw(NEOX), 2)
    file = tmp_path / "megatron" / "iter_0000100" / "mp_rank_01_000" / "model_optim_rng.pt"
    torch.save({**torch.load(file, weights_only=False), "checkpoint_version": 1.0}, tmp_path / "older")
    (tmp_path / "older").rename(file)
    with pytest.raises(CheckpointError, match="checkpoint version 1.0 isn't supported"):
        open_megatron(tmp_path / "megatron", GPT)
    file.unlink()
    with pytest.raises(CheckpointError, match="the files of stage 0, tp rank 1 are missing"):
        open_megatron(tmp_path / "megatron", GPT)
    (tmp_path / "megatron" / "iter_0000100" / "metadata.json").touch()
    with pytest.raises(CheckpointError, match="torch_dist isn't supported"):
        open_megatron(tmp_path / "megatron", GPT)
    (tmp_path / "neox" / "global_step7" / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="layer_03-model_01-model_states.pt is missing"):
        open_neox(tmp_path / "neox", NEOX)
    (tmp_path / "neox" / "global_step7" / "layer_03-model_00-model_states.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="layer_0"):
        open_neox(tmp_path / "neox", NEOX)


def test_a_file_of_an_old_torch_is_named_as_that(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old.pt: no file of torch.save, or one of before torch 1.6.* make a new"):
        load_pickle(tmp_path / "old.pt")


@pytest.mark.parametrize("kind", ["megatron", "neox"])
def test_a_hostile_pickle_is_inert(kind, tmp_path):
    if kind == "megatron":
        megatron(tmp_path, GPT, draw(GPT), 1, 1, CORE, {"harmless": Hostile(tmp_path / "mark")})
        file, opener = next(tmp_path.rglob("model_optim_rng.pt")), lambda: open_megatron(tmp_path, GPT)
    else:
        neox(tmp_path, NEOX, draw(NEOX), 1)
        file, opener = next(tmp_path.rglob("layer_03*")), lambda: open_neox(tmp_path, NEOX)
        torch.save({"norm.weight": Hostile(tmp_path / "mark")}, file)
    with pytest.raises(CheckpointError, match="refused: it holds more than tensors, and would call") as error:
        opener()
    assert "\n" not in str(error.value) and not (tmp_path / "mark").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "mark").exists(), "the pickle was harmless: the test proved nothing"


def saved_by_megatron_core(rank: int, world_size: int, folder: Path) -> None:
    megatron_core.main(folder)


def test_megatron_core_s_own_model_gives_the_same_logits(tmp_path):
    """Weights saved from Megatron Core's GPTModel, in a process of its own that has torch already, run by megalm."""
    from tests.model.test_transformers import logits

    dist.run(saved_by_megatron_core, 1, tmp_path, group=False, timeout=120)
    answer = torch.load(tmp_path / "answer.pt", weights_only=True)
    section = answer["model"]
    model = config(model=section).model.model_copy(update={"vocab_size": 256})
    parts = dict(open_megatron(tmp_path, model))
    with torch.no_grad():
        ours = logits(section, parts, answer["tokens"], "torch")
    assert answer["logits"].std() > 0.1
    torch.testing.assert_close(ours, answer["logits"][..., :ours.shape[-1]], atol=1e-4, rtol=0)
