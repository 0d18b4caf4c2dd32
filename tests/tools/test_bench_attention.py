"""bench_attention: what is counted and asked, and a run of both paths through the shim."""

from __future__ import annotations

import json

import pytest
import torch

from megalm.ops.library import drop_shim
from megalm.tools import bench_attention
from megalm.tools.bench_attention import ASKED_OF, Shape, shapes, verdicts
from megalm.tools.build_kernels import build_shim


def test_flops_are_of_the_scores_that_are_seen():
    causal, full = (Shape(100, 2, 3, 64, causal).work for causal in (True, False))
    assert full == {"forward": 2 * 2.0 * 2 * 3 * 100**2 * 64, "backward": 5 * 2.0 * 2 * 3 * 100**2 * 64}
    assert causal == {phase: flops / 2 for phase, flops in full.items()}


def test_what_is_asked_of_comes_first():
    found = shapes()
    assert {(shape.dim, shape.causal, shape.length) for shape in found[:len(ASKED_OF)]} == ASKED_OF and len(found) == 20
    assert all(shape.heads * shape.dim == 2048 and shape.batch * shape.length == max(16384, shape.length) for shape in found)


def test_verdicts():
    def seconds(forward, backward):
        return {"forward": forward, "backward": backward}

    found = {"megalm": seconds(1.0, 2.0), "megalm portable": seconds(1.4, 3.0), "megalm in order": seconds(1.0, 2.3),
             "sdpa flash": seconds(1.5, 3.0), "sdpa cudnn": seconds(0.96, 1.9)}
    assert [verdict["met"] for verdict in verdicts(found)] == [True, False, True, False, False]
    del found["sdpa cudnn"], found["megalm portable"]
    assert [verdict["got"] for verdict in verdicts(found)] == [0.0, 0.0, pytest.approx(2.0 / 2.3)]


def test_all_of_it_on_a_cpu(tmp_path, capsys):
    library, figures = build_shim(tmp_path), tmp_path / "figures.json"
    try:
        assert bench_attention.main(["--shim", str(library), "--figures", str(figures)]) == 0
    finally:
        drop_shim()
    found, = json.loads(figures.read_text())["workloads"]
    assert {"megalm", "megalm portable", "megalm in order", "sdpa flash"} <= set(found["seconds"]) and found["targets"] == []
    assert "cudnn" in " ".join(found["skipped"]) and "TFLOP/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_is_one_error(capsys):
    assert bench_attention.main([]) == 2
    assert capsys.readouterr().err == "error: there is no GPU here; --shim LIBRARY tries all of it on the CPU, tiny\n"


@pytest.mark.parametrize("option", ["--lengths", "--dims"])
def test_sizes_of_nothing_are_refused(option, capsys):
    assert bench_attention.main([option, "0"]) == 2
    assert "0 is not a number of at least 1" in capsys.readouterr().err
