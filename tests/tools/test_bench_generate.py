"""bench_generate: a tiny run, with transformers' model of the same weights, whose tokens must be ours."""

from __future__ import annotations

import json

import pytest

from megalm.tools import bench_generate
from megalm.tools.bench_generate import main

TINY = ["--hidden", "32", "--layers", "2", "--heads", "2", "--ffn", "48", "--seq", "48", "--pairs", "1", "--new", "6"]


def test_a_run_finds_the_tokens_of_its_peers_and_writes_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_generate.torch, "set_num_threads", lambda count: None)
    out = tmp_path / "found.json"
    code = main([*TINY, "--lengths", "5", "40", "--out", str(out)])
    found = json.loads(out.read_text())["lengths"]
    assert set(found) == {"5", "40"} and "OTHER TOKENS" not in capsys.readouterr().out
    for one in found.values():
        assert one["one_token"]["seconds"] > 0 and all(one[peer]["same_tokens"] for peer in ("recomputed", "transformers"))
    assert code == int(any(one["one_token"]["median"] < 1.0 for one in found.values()))  # which a tiny model leaves to chance


def test_other_tokens_are_told(monkeypatch, capsys):
    monkeypatch.setattr(bench_generate, "recomputed", lambda model: lambda prompt, new: [0] * new)
    assert main([*TINY, "--lengths", "5"]) == 1
    assert "OTHER TOKENS" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--lengths", "43"], ["--lengths", "0"], ["--pairs", "0"]])
def test_mistakes_are_one_line(arguments, capsys):
    assert main([*TINY, "--lengths", "5", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --pairs, --new and --lengths must be at least 1, and a length with 6 new tokens at most")
    assert error.count("\n") == 1
