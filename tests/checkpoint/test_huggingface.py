"""Folders in Hugging Face's format: read and written bit for bit, loaded by transformers, and refused with a reason."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalm.checkpoint import CheckpointError, Fragment
from megalm.checkpoint.huggingface import differences, family_of, open_huggingface
from megalm.checkpoint.huggingface.families import config_json
from megalm.checkpoint.huggingface.write import write_huggingface
from tests.checkpoint.fakes import Hasty
from tests.model.transformers_weights import BUILD, build, save, tokens


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(one: dict, other: dict) -> bool:
    """The same names, dtypes and bits."""
    return one.keys() == other.keys() and all(one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", BUILD)
def test_what_is_written_is_what_was_read_and_transformers_runs_it(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(name)
    save(model, tmp_path / "one")
    found = open_huggingface(tmp_path / "one")
    family = family_of(found.model, None)
    config = config_json(family, found.model, found.model.vocab_size)
    write_huggingface(tmp_path / "two", family, found.model, found.weights, config, disk=Hasty())
    assert family == found.config["model_type"]
    before = tensors(tmp_path / "one")
    assert equal(tensors(tmp_path / "two"), before) and len(before) > 20
    again = open_huggingface(tmp_path / "two")
    assert differences(again.model, found.model, ("", "")) == [] and again.model.seq_length == found.model.seq_length
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, model(tokens()).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox"])
def test_several_files_and_bf16(name, tmp_path):
    save(build(name).to(torch.bfloat16), tmp_path / "one", max_shard_size="100KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    found = open_huggingface(tmp_path / "one")
    config = config_json(name, found.model, found.model.vocab_size)
    write_huggingface(tmp_path / "two", name, found.model, found.weights, config, file_bytes=70_000, disk=Hasty())
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    before = tensors(tmp_path / "one")
    assert equal(tensors(tmp_path / "two"), before) and index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert all(dtype == torch.bfloat16 for dtype in map(found.weights.dtype, found.weights))


def test_a_base_model_s_names_and_buffers_and_the_older_pickles(tmp_path):
    model = build("gpt2")
    save(model, tmp_path / "one")
    whole = dict(open_huggingface(tmp_path / "one").weights)
    for folder in ("base", "pickle"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "one").items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file({**state, **buffers}, tmp_path / "base" / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    for folder in ("base", "pickle"):
        assert equal(dict(open_huggingface(tmp_path / folder).weights), whole)


def test_any_slice_of_a_part_is_read_alone(tmp_path):
    save(build("gpt_neox"), tmp_path)
    weights = open_huggingface(tmp_path).weights
    for part in weights:
        full = weights[part]
        for dim in range(full.dim()):
            low, high = full.shape[dim] // 4, 3 * full.shape[dim] // 4
            slab = full.narrow(dim, low, high - low).reshape(-1)
            target = torch.zeros(slab.numel() - 5)
            weights.fill(Fragment(part, "master", tuple(full.shape), dim, low, high, 3, target))
            assert torch.equal(target, slab[3:-2]), part


def change_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


REFUSED = [
    ("llama", {"model_type": "mamba"}, "model_type 'mamba' isn't supported; llama, mistral, qwen2, qwen3, gpt2, gpt_neox are"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantized weights aren't supported"),
    ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' isn't supported; silu"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}},
     "rope_scaling.rope_type: 'dynamic' isn't supported; default, linear and llama3 are"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
     "some layers have a sliding window and others not"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True isn't supported"),
    ("gpt_neox", {"hidden_act": "relu"}, "hidden_act: 'relu' isn't supported; gelu"),
    ("llama", {"hidden_size": "wide"}, "isn't a model"),
    ("llama", {"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight [64] has no place in the model"),
    ("llama", {"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
    ("llama", {"intermediate_size": 48}, "model.layers.0.mlp.gate_proj.weight is [96, 64], not [48, 64]"),
]


@pytest.mark.parametrize("name, keys, message", REFUSED)
def test_what_is_not_supported_is_named(name, keys, message, tmp_path):
    save(build(name), tmp_path)
    change_config(tmp_path, **keys)
    with pytest.raises(CheckpointError) as error:
        open_huggingface(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_there_or_broken(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_huggingface(tmp_path / "nowhere")
    save(build("llama"), tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=shards[0].name):
        open_huggingface(tmp_path)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[0].name} is missing, which the index names"):
        open_huggingface(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="isn't the name of a file inside"):
        open_huggingface(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match="no weights here"):
        open_huggingface(tmp_path)


class Hostile:
    """Pickles as a call of a function that leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_hostile_pickle_is_inert(tmp_path):
    save(build("llama"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Hostile(tmp_path / "mark")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused: it holds more than tensors") as error:
        open_huggingface(tmp_path / "model")
    assert "\n" not in str(error.value) and not (tmp_path / "mark").exists()
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "mark").exists(), "the pickle was harmless: the test proved nothing"


def test_a_model_no_family_can_express(tmp_path):
    save(build("gpt_neox"), tmp_path)
    model = open_huggingface(tmp_path).model.model_copy(update={"qk_norm": True})
    with pytest.raises(CheckpointError, match="gpt_neox is near, but can't be a model with model.qk_norm: True here, False"):
        family_of(model, None)
    with pytest.raises(CheckpointError, match="^llama can't be a model with .*normalization: 'layer_norm' here, 'rms_norm' in"):
        family_of(model, "llama")


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    save(build("llama"), tmp_path / "one")
    found = open_huggingface(tmp_path / "one")
    with pytest.raises(FileNotFoundError):
        write_huggingface(tmp_path / "two", "llama", found.model, found.weights, {}, {"a": tmp_path / "nothing"}, disk=Hasty())
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    with pytest.raises(CheckpointError, match="one is there already"):
        write_huggingface(tmp_path / "one", "llama", found.model, found.weights, {}, disk=Hasty())
