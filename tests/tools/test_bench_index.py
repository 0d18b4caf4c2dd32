"""The bench runs and reports what it built."""
from __future__ import annotations

import json

from megalm.tools import bench_index


def test_bench(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_index, "FETCHED", 100_000)
    assert bench_index.main(["--documents", "1000", "--seq-length", "64", "--epochs", "2", "--folder", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 1000 and report["samples"] == (2 * report["tokens"] - 1) // 64
    assert report["build_seconds"] < 10 and list(tmp_path.iterdir()) == []
    assert report["fetch_million_tokens_a_core_second"] > 0
    assert bench_index.main(["--documents", "0"]) == 2
