"""Reading, overriding, and telling everything that is wrong at once."""
from __future__ import annotations

import json
import re

import pydantic
import pytest

from megalm.config import ConfigError, load, validate
from tests.config.trees import config, tree


def write(folder, content, name="c.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def problems_of(content, *overrides, folder):
    with pytest.raises(ConfigError) as error:
        load(write(folder, content), overrides)
    assert str(error.value) == "\n".join(error.value.problems)
    return error.value.problems


def test_defaults_are_filled_in():
    small = config()
    assert small.model.num_query_groups == 8
    assert small.model.ffn_hidden_size == 256
    assert small.model.head_dim == 8
    assert (small.parallel.tp, small.parallel.dp, small.batch.global_) == (1, "auto", 8)
    assert config(model={"activation": "swiglu"}).model.ffn_hidden_size == 192  # 8 * 64 / 3 = 170.7
    assert config(model={"activation": "geglu", "hidden_size": 4096}).model.ffn_hidden_size == 10944


def test_resolved_config_loads_as_itself(tmp_path):
    rotary = {"position_embedding": "rotary", "rotary_scaling": {"type": "linear", "factor": 2}}
    first = config(model={"num_query_groups": 2, **rotary}, parallel={"stages": [4]}, deepspeed={"csv_monitor": {}},
                   logging={"wandb": {"project": "p", "mode": "offline"}})
    again = load(write(tmp_path, first.model_dump(mode="json")))
    assert again == first


def test_a_config_is_what_is_said_not_how(tmp_path):
    text = json.dumps(tree(parallel={"tp": 1}))
    reordered = json.dumps(dict(reversed(tree().items())))
    assert load(write(tmp_path, text)) == load(write(tmp_path, "// note\n" + reordered))
    assert config() != config(train={"seed": 1})


def test_schema_key_and_comments(tmp_path):
    assert load(write(tmp_path, '// run\n{"$schema": "x", ' + json.dumps(tree())[1:-1] + ",}")) == config()


def test_frozen():
    with pytest.raises(pydantic.ValidationError):
        config().model.num_layers = 3


def test_overrides(tmp_path):
    path = write(tmp_path, tree())
    loaded = load(path, ["parallel.tp=2", "optimizer.betas=[0.8, 0.9]", "train.dir=runs/x", "data.train.0.weight=3",
                         "batch.global=16", "logging.wandb.project=p", "model.vocab_size=null", "train.dir=runs/1=2"])
    assert (loaded.parallel.tp, loaded.optimizer.betas, loaded.batch.global_) == (2, (0.8, 0.9), 16)
    assert loaded.train.dir == "runs/1=2"
    assert (loaded.data.train[0].weight, loaded.logging.wandb.project, loaded.model.vocab_size) == (3.0, "p", None)
    assert load(path, ['data.valid=[{"path": "v"}]']).data.valid[0].path == "v"


@pytest.mark.parametrize("override, message", [
    ("parallel.tp", "an override reads section.key=value"),
    ("=3", "an override reads section.key=value"),
    ("parallel..tp=3", "an override reads section.key=value"),
    ("train.steps.more=3", "train.steps is 10, it has no key more"),
    ("data.train.1.path=x", "data.train is a list of 1; 1 is no place in it"),
    ("data.train.first.path=x", "data.train is a list of 1; first is no place in it"),
    ("model.layers=3", "model.layers: unknown key (value 3); did you mean model.num_layers?"),
    ("parallel.tp=two", 'parallel.tp: an integer expected, "two" given'),
])
def test_wrong_override(override, message, tmp_path):
    [problem] = problems_of(tree(), override, folder=tmp_path)
    assert message in problem


@pytest.mark.parametrize("section, keys, message", [
    ("model", {"hiden_size": 64}, "model.hiden_size: unknown key (value 64); did you mean model.hidden_size?"),
    ("train", {"lr": 0.1}, "train.lr: unknown key (value 0.1); did you mean optimizer.lr?"),
    ("parallel", {"qqq": 1}, "parallel.qqq: unknown key (value 1); known keys of parallel: tp, pp, dp, sequence_parallel, "
                             "zero_stage, stages, schedule"),
    ("paralel", {"tp": 2}, 'paralel: unknown key (value {"tp": 2}); did you mean parallel?'),
    ("model", {"num_layers": "4"}, 'model.num_layers: an integer expected, "4" given'),
    ("model", {"num_layers": 4.5}, "model.num_layers: an integer expected, 4.5 given"),
    ("model", {"num_layers": True}, "model.num_layers: an integer expected, true given"),
    ("model", {"num_layers": 0}, "model.num_layers: a value of at least 1 expected, 0 given"),
    ("model", {"tie_embeddings": 1}, "model.tie_embeddings: true or false expected, 1 given"),
    ("model", {"dropout": 1.0}, "model.dropout: a value less than 1 expected, 1.0 given"),
    ("model", {"activation": "relu"}, "model.activation: 'gelu', 'gelu_exact', 'swiglu' or 'geglu' expected, \"relu\" given"),
    ("model", {"rotary_scaling": {"type": "ntk"}},
     "model.rotary_scaling: a type out of 'linear', 'llama3' expected, {\"type\": \"ntk\"} given"),
    ("model", {"rotary_scaling": {"type": "linear"}}, "model.rotary_scaling.factor: missing, it has no default"),
    ("parallel", {"dp": "all"}, "parallel.dp: an integer or 'auto' expected, \"all\" given"),
    ("parallel", {"zero_stage": 4}, "parallel.zero_stage: a value of at most 3 expected, 4 given"),
    ("optimizer", {"betas": [0.9]}, "optimizer.betas: missing, the list is too short: [0.9]"),
    ("optimizer", {"betas": [0.9, 0.9, 0.9]}, "optimizer.betas: at most 2 items expected, [0.9, 0.9, 0.9] given"),
    ("optimizer", {"lr": None}, "optimizer.lr: a number expected, null given"),
    ("tokenizer", {"type": "bpe"}, "tokenizer.type: 'sentencepiece', 'huggingface' or 'bytes' expected, \"bpe\" given"),
    ("data", {"train": []}, "data.train: at least 1 item(s) expected, [] given"),
    ("data", {"train": [{"path": "x", "wieght": 1}]},
     "data.train.0.wieght: unknown key (value 1); did you mean data.train.0.weight?"),
    ("data", {"train": "data/x"}, 'data.train: a list expected, "data/x" given'),
    ("kernels", {"attention": "cuda"},
     "kernels.attention: 'auto', 'megalm', 'torch', 'apex', 'flash_attn', 'liger' or 'reference' expected"),
    ("logging", {"wandb": True}, "logging.wandb: an object with project, mode, name expected, true given"),
    ("data", {"train": ["data/x"]}, 'data.train.0: an object with path, weight expected, "data/x" given'),
])
def test_one_mistake_is_one_line(section, keys, message, tmp_path):
    [problem] = problems_of(tree(**{section: keys}), folder=tmp_path)
    assert message in problem


def test_missing_keys_and_sections(tmp_path):
    content = tree()
    del content["model"]["num_layers"], content["train"]
    assert problems_of(content, folder=tmp_path) == [
        "model.num_layers: missing, it has no default", "train: missing, it has no default"]
    assert len(problems_of({}, folder=tmp_path)) == 6


def test_all_mistakes_at_once(tmp_path):
    content = tree(model={"num_layers": "4", "hiden_size": 64}, parallel={"tp": 3, "pp": 5, "zero_stage": 2}, batch={"micro": 3},
                   deepspeed={"train_batch_size": 8})
    problems = problems_of(content, "train.eval_every=5", "nonsense", folder=tmp_path)
    assert [problem.split(":")[0] for problem in problems] == [
        "nonsense", "model.num_layers", "model.hiden_size", "model.num_attention_heads", "model.num_query_groups",
        "model.ffn_hidden_size", "model.vocab_multiple", "parallel.zero_stage", "batch.global", "train.eval_every",
        "deepspeed.train_batch_size"]
    # pp = 5 is not held against a number of layers that isn't one
    assert not any(problem.startswith("parallel.pp") for problem in problems)


def test_a_section_that_is_no_object_hides_nothing_else(tmp_path):
    problems = problems_of({**tree(parallel={"tp": 3}), "batch": 8}, folder=tmp_path)
    assert problems[0] == "batch: an object with micro, global expected, 8 given"
    assert any(problem.startswith("model.num_attention_heads: 8 is not divisible") for problem in problems)


@pytest.mark.parametrize("content, message", [
    ("[1]", r"an object \{\.\.\.\} expected, \[1\] given"),
    ("{", "line 1, column 2"),
])
def test_files_that_are_no_config(content, message, tmp_path):
    [problem] = problems_of(content, folder=tmp_path)
    assert re.search(message, problem)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: no such file"):
        load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "latin.json")


def test_validate_takes_a_tree():
    with pytest.raises(ConfigError, match=r"parallel\.tp"):
        validate(tree(parallel={"tp": -1}))
