"""A data set says which tokenizer made it, and training with another is refused."""
from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest

from megalm.config import ConfigError, load
from megalm.data.description import description_path, read_description, tokenizer_problems
from megalm.data.errors import DataError
from megalm.data.tokenizer import TokenizerSource
from megalm.tools import preprocess
from megalm.train import _derive
from tests.data.helpers import write
from tests.data.models import make_huggingface, make_sentencepiece


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("described")
    (folder / "a.jsonl").write_text('{"text": "def f(x):"}\n{"text": ""}\n')
    make_sentencepiece(folder / "spm.model")
    make_huggingface(folder / "t.json")
    assert preprocess.main(["--input", f"{folder}/a.jsonl", "--output", f"{folder}/set", "--tokenizer", f"{folder}/spm.model",
                            "--quiet"]) == 0
    write(folder / "foreign", [[1, 2, 3]])
    return folder


def test_what_it_says(folder):
    found = read_description(folder / "set")
    assert (found["tokenizer"]["type"], len(found["tokenizer"]["sha256"]), found["tokenizer"]["eod"]) == ("sentencepiece", 64, 2)
    assert (found["documents"], found["sequences"], found["bytes"], found["dtype"]) == (2, 1, 9, "uint16")
    digest = hashlib.sha256((folder / "a.jsonl").read_bytes()).hexdigest()
    assert found["sources"] == [{"name": f"{folder}/a.jsonl", "size": 35, "hash": f"sha256:{digest}"}]


def test_the_right_tokenizer_and_a_foreign_data_set(folder):
    source = TokenizerSource("sentencepiece", f"{folder}/spm.model", "</s>")
    assert tokenizer_problems([folder / "set", folder / "foreign", folder / "none"], source) == []


def test_another_end_of_document(folder):
    [problem] = tokenizer_problems([folder / "set"], TokenizerSource("sentencepiece", f"{folder}/spm.model", "<s>"))
    assert f"data set {folder}/set ends its documents with token 2, and the tokenizer's end of document is 1 here" in problem


def test_another_tokenizer(folder):
    others = ((TokenizerSource("huggingface", f"{folder}/t.json"), "t.json (huggingface"), (TokenizerSource("bytes"), "bytes"))
    for source, name in others:
        [problem] = tokenizer_problems([folder / "set", folder / "set"], source)
        assert f"data set {folder}/set was made with the tokenizer {folder}/spm.model (sentencepiece, SHA-256 " in problem
        assert name in problem and "remove" in problem


def test_training_refuses(folder):
    config = {"model": {"family": "gpt", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8},
              "batch": {"micro": 1, "global": 1}, "optimizer": {"lr": 0.1}, "tokenizer": {"type": "bytes"},
              "data": {"train": [{"path": str(folder / "set")}]}, "train": {"dir": str(folder / "run"), "steps": 1}}
    (folder / "c.json").write_text(json.dumps(config))
    world = SimpleNamespace(device=SimpleNamespace(type="cpu"), world_size=1)
    with pytest.raises(ConfigError, match="was made with the tokenizer .*spm.model.* and this is bytes"):
        _derive(load(str(folder / "c.json"), []), world)


@pytest.mark.parametrize("content", ["{", "[]", '{"tokenizer": 3}'])
def test_damaged(tmp_path, content):
    description_path(tmp_path / "a").write_text(content)
    with pytest.raises(DataError, match="a.data.json (can't be read|doesn't describe)"):
        read_description(tmp_path / "a")
