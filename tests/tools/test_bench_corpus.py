"""The bench runs on a small corpus, and holds its rivals to the same bytes."""
from __future__ import annotations

import json
import os

import pytest

from megalm.tools import bench_corpus, bench_corpus_peers, bench_corpus_scaling, kill_preprocess
from megalm.tools.bench_corpus_peers import same
from tests.data.helpers import write
from tests.data.models import make_huggingface, make_sentencepiece
from tests.tools.test_preprocess import json_lines


def test_bench(tmp_path, capsys, monkeypatch):
    corpus = json_lines(tmp_path / "a.jsonl", ["the quick brown fox", "", "def function(value):\n    return value + 1"] * 20)
    make_sentencepiece(tmp_path / "spm.model")
    usual = ["--folder", str(tmp_path), "--tokenizer"]
    assert bench_corpus.main(["--corpus", corpus, "--pairs", "0", "--no-megatron", "--out", str(tmp_path / "r.json"), *usual,
                              str(tmp_path / "spm.model")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())["tokenizers"]["spm.model"]
    assert set(result["rivals"]) == {"megalm", "sentencepiece", "megalm, unchecked"}
    assert all(entry["cpu_seconds"] > 0 for entry in result["rivals"].values())
    assert "times sentencepiece" in capsys.readouterr().out
    assert bench_corpus.main(["--document-bytes", "2000000", *usual, "bytes"]) == 0
    assert "peak_megabytes" in capsys.readouterr().out


def test_two_cores(tmp_path, capsys, monkeypatch):
    """The rounds run, and their ratios are those of the seconds that stand beside."""
    corpus = json_lines(tmp_path / "a.jsonl", ["word " * 1000] * 100)
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(bench_corpus_scaling, "two_cores", lambda: [core, core])
    assert bench_corpus.main(["--corpus", corpus, "--pairs", "1", "--scaling-megabytes", "1", "--no-rivals", "--folder",
                              str(tmp_path), "--out", str(tmp_path / "r.json"), "--tokenizer", "bytes"]) == 0
    two = json.loads((tmp_path / "r.json").read_text())["tokenizers"]["bytes"]["two_workers"]
    seconds = {kind: rounds[0][0] for kind, rounds in two["seconds_and_processor_seconds"].items()}
    assert (two["megabytes"], two["distinct_megabytes"]) == (1, 1)
    assert two["times"] == two["times_of_least"] == round(seconds["one_core"] / seconds["two_cores"], 2)
    assert two["ceiling"] == two["ceiling_of_least"] == round(2 * seconds["one_core"] / seconds["two_runs_at_once"], 2)
    assert f"two workers on two cores: {two['times']} times one on one" in capsys.readouterr().out


def test_one_core_is_not_two(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    with pytest.raises(ValueError, match="one core can't show what two workers bring"):
        bench_corpus_scaling.two_cores()


def test_the_plain_loop_of_tokenizers(tmp_path):
    corpus = json_lines(tmp_path / "a.jsonl", ["the quick", ""])
    model = str(make_huggingface(tmp_path / "t.json"))
    bench_corpus_peers.main("tokenizers", corpus, str(tmp_path / "out"), model, "<|endoftext|>")
    encode, eod, size = bench_corpus_peers.with_tokenizers(model, "<|endoftext|>")
    assert eod == 1000 and size > 256
    write(tmp_path / "right", [encode("the quick") + [eod]])
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "right.bin").read_bytes()
    assert not same(str(tmp_path / "out"), str(tmp_path / "right"))  # the empty document


def test_the_killer_notices(tmp_path, monkeypatch, capsys):
    """A run whose result differs is an error, not a success."""
    monkeypatch.setattr(kill_preprocess, "kill_once", lambda *_: False)
    monkeypatch.setattr(kill_preprocess, "outputs", lambda prefix: [prefix.name[:3].encode() * (prefix.name[:3] == "out")] * 3)
    monkeypatch.setattr(kill_preprocess.subprocess, "run", lambda *_, **__: None)
    assert kill_preprocess.main(["--moments", "1"]) == 2
    assert "isn't that of the undisturbed run" in capsys.readouterr().err
