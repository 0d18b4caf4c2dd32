"""bench_ops: what is counted, timed, asked and written; and a run of the kernels through the shim."""

from __future__ import annotations

import json
import re

import pytest
import torch

from megalm.ops.library import drop_shim
from megalm.ops.registry import REGISTRY
from megalm.tools import bench_clock, bench_ops
from megalm.tools._ops import registered
from megalm.tools.bench_bytes import (
    adam_bytes,
    all_of_it,
    causal_bytes,
    dropout_bytes,
    in_place_bytes,
    loss_bytes,
    norm_bytes,
    read_once,
    rotary_bytes,
    softmax_bytes,
)
from megalm.tools.bench_orders import format_table, installed_table, orders, write_orders
from megalm.tools.bench_workloads import (
    MEMORY_TARGETS,
    SIZES,
    TABLES,
    TARGETS,
    asked,
    operations,
    workloads,
)
from megalm.tools.build_kernels import build_shim
from megalm.tools.kernel_cases import norm

X, W = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.bfloat16)  # 64 and 16 bytes


def test_bytes_are_what_must_be_read_and_written_once():
    assert norm_bytes([X, W], [X]) == (64 + 16 + 64, 3 * 64 + 2 * 16)                 # dy, x, dx; w, dw
    assert norm_bytes([X, W, W], [X]) == (64 + 32 + 64, 3 * 64 + 3 * 16)              # and db
    assert norm_bytes([X, X, W], [X, X]) == (4 * 64 + 16, 4 * 64 + 2 * 16)            # dy, dsum, sum, dx
    tables = [torch.empty(4, 2), torch.empty(4, 2)]                                   # 32 bytes each
    assert rotary_bytes([X, *tables], [X]) == (2 * 64 + 64, 2 * 64 + 64)
    mask = torch.empty(4, 8, dtype=torch.bool)
    assert softmax_bytes([X, mask], [X]) == (2 * 64 + 32, 3 * 64)
    samples = torch.empty(2, dtype=torch.int64)
    assert dropout_bytes([X, W, X, samples], [X]) == (3 * 64 + 16 + 16, 2 * 64 + 16)
    gate_up = torch.empty(4, 16, dtype=torch.bfloat16)
    assert all_of_it([gate_up], [X]) == (3 * 64, 5 * 64)
    assert loss_bytes([X, torch.empty(4, dtype=torch.int64), torch.empty(4)], []) == (3 * 64,)


    causal = torch.empty(2, 4, 4, dtype=torch.bfloat16)                               # 64 bytes, 10 of 16 elements seen
    assert causal_bytes([causal], [causal]) == (40 + 64, 2 * 40 + 64)
    assert in_place_bytes([X, *tables], [X, X, X]) == (4 * 64 + 64,)
    assert read_once([X, X], [X]) == (3 * 64,)
    assert adam_bytes([torch.empty(10), torch.empty(5)], []) == (28 * 15,)


def test_every_operation_has_workloads():
    assert set(operations()) == {*registered().backends, "optimizer"}
    for size in SIZES:
        found = workloads(size)
        assert {workload.op for workload in found} == set(operations())
        assert len({workload.name for workload in found}) == len(found)
    assert {workload.op for workload in workloads("small", ["norm"])} == {"norm"}


def test_an_operation_without_a_table_is_timed_on_its_cases(monkeypatch):
    monkeypatch.delitem(TABLES, "norm")
    full, tiny = workloads("full", ["norm"]), workloads("tiny", ["norm"])
    assert [workload.name for workload in full] == [case.name for case in norm.large()] and len(tiny) == 2
    assert not any(workload.own for workload in full)
    inputs = tiny[0].inputs("cpu")
    assert inputs[0].dtype == torch.bfloat16
    assert tiny[0].work(inputs, [inputs[0]])["forward"] == sum(2 * tensor.numel() for tensor in [*inputs, inputs[0]])


def test_every_target_is_of_a_workload():
    names = [workload.name for workload in workloads("full")]
    for pattern in [*(target.names for target in TARGETS), *MEMORY_TARGETS]:
        assert any(re.match(pattern, name) for name in names), pattern
    fractions = {(name, phase): target.least for name in names for target in asked(name) for phase in target.phases}
    assert fractions["norm layer_norm 1024x12288", "backward"] == 0.55
    assert fractions["norm rms_norm 32768x4096 residual", "forward"] == 0.90
    assert fractions["cross_entropy linear 8192x4096x131072", "step"] == 0.85
    assert fractions["decode 32x4096x1x32x8x128 pages of 64", "step"] == 0.85


def record(op, ranks=True, **totals):
    return {"op": op, "ranks": ranks, "seconds": {name.replace("_", "."): {"forward": total / 3, "backward": total * 2 / 3}
                                                  for name, total in totals.items()}}


def test_the_order_is_by_the_mean_of_ratios():
    found = orders([record("norm", megalm=1.0, torch=2.0), record("norm", megalm=30.0, torch=20.0, apex=10.0),
                    record("norm", ranks=False, megalm=9.0, torch=1.0, torch_compile=0.1),
                    record("rotary", ranks=False, torch=2.0, reference=1.0), {"op": "norm", "name": "ceilings"}])
    # norm: apex 0 (one workload), megalm (0 + ln 3) / 2 = 0.55, torch (ln 2 + ln 2) / 2 = 0.69
    assert found == {"norm": ["apex", "megalm", "torch"], "rotary": ["reference", "torch"]}


def test_a_measured_order_is_written_beside_the_others(tmp_path):
    before = json.loads(installed_table().read_text())
    path = tmp_path / "backends.json"
    write_orders(path, "NVIDIA H200", {"norm": ["torch", "megalm"]})
    write_orders(path, "NVIDIA H200", {"rotary": ["torch"]})
    after = json.loads(path.read_text())
    assert after["measured"].pop("NVIDIA H200") == {"norm": ["torch", "megalm"], "rotary": ["torch"]}
    assert after == before
    assert '"norm": ["torch", "megalm"]' in path.read_text()
    assert json.loads(format_table(before)) == before and max(map(len, path.read_text().splitlines())) <= 130


def test_verdicts():
    name = "cross_entropy linear 8192x4096x131072"
    found = {"name": name, "ceiling": "matmul", "fractions": {"megalm": {"step": 0.8}}, "memory": {"megalm": 1.2e9},
             "seconds": {"megalm": {"step": 1.0}, "torch.compile": {"step": 1.5}}}
    asked_of = {verdict["asked"]: (verdict["got"], verdict["met"]) for verdict in bench_ops.verdicts(found)}
    assert asked_of == {"step >= 0.85 of the matmul ceiling": (0.8, False), "step ahead of torch.compile": (1.5, True),
                        "at most 2.65 GB beyond the inputs": (1.2, True)}
    unable = list(bench_ops.verdicts({**found, "fractions": {}, "seconds": {}}))
    assert unable == [{"asked": "step >= 0.85 of the matmul ceiling", "got": 0.0, "met": False}]
    text = "\n".join(bench_ops.lines({**found, "dtype": "bfloat16", "work": {"step": 1.0}, "skipped": {"apex": "isn't here"},
                                      "fractions": {"megalm": {"step": 0.8}, "torch.compile": {"step": 0.5}},
                                      "targets": list(bench_ops.verdicts(found))}))
    assert "NOT MET  step >= 0.85" in text and "apex           not run: isn't here" in text


def test_contenders_take_turns():
    taken = []

    class Clock(bench_clock.WallClock):
        rounds, batch_seconds, most_calls = 3, 1.0, 50

        def __init__(self): ...

        def batch(self, calls, count):
            taken.append((calls[0](), count))
            return {"a": 0.01, "b": 0.5}[calls[0]()] * (1 + len(taken) % 3 / 10)

    found = bench_clock.measure({"a": [lambda: "a"], "b": [lambda: "b"]}, Clock())
    assert [name for name, _ in taken[2:]] == ["a", "b"] * 3
    assert taken[2][1] == 50 and taken[3][1] == 2  # as many calls as fill a batch
    assert 0.01 <= found["a"] <= 0.012 and 0.5 <= found["b"] <= 0.6


def test_a_gpu_sleeps_longer_until_all_calls_are_queued_in_time(monkeypatch):
    slept, behind = [], [True, True, False]

    class Event:
        def __init__(self, enable_timing): ...
        def record(self): ...
        def synchronize(self): ...
        def query(self): return behind.pop(0)
        def elapsed_time(self, end): return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    calls = []
    assert bench_clock.EventClock().batch([lambda: calls.append(1), lambda: calls.append(2)], 4) == pytest.approx(0.002)
    assert calls == [1, 2, 1, 2] * 3 and slept == [slept[0], 2 * slept[0], 4 * slept[0]]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


def test_the_kernels_through_the_shim(library, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    try:
        assert bench_ops.main(["--shim", str(library), "--ops", "norm", "--figures", str(figures)]) == 0
    finally:
        drop_shim()
        REGISTRY.chosen.clear()
    found = json.loads(figures.read_text())
    first = found["workloads"][0]
    assert found["device"] == "cpu" and set(found["ceilings"]) == {"copy", "matmul"}
    assert {"megalm", "torch", "reference"} <= set(first["seconds"]) and "needs a GPU" in first["skipped"]["apex"]
    assert first["fractions"]["megalm"]["forward"] == pytest.approx(
        first["work"]["forward"] / first["seconds"]["megalm"]["forward"] / found["ceilings"]["copy"])
    assert "order of norm on cpu: " in capsys.readouterr().out
    # The order of figures that were measured before.
    table = tmp_path / "backends.json"
    assert bench_ops.main(["--from", str(figures), "--out", str(table)]) == 0
    assert set(json.loads(table.read_text())["measured"]["cpu"]["norm"]) == set(first["seconds"])


def test_torch_compile_takes_part_and_backward_runs_again(tmp_path):
    bench = bench_ops.Bench("cpu", "tiny", "aot_eager")
    workload, = (workload for workload in workloads("tiny", ["activation"]) if "swiglu 3x64" in workload.name and workload.own)
    found = bench.race(workload, compiled=True, only=["torch"])
    assert set(found["seconds"]) == {"torch", "torch.compile"} and not found["ranks"]


def test_wrong_arguments(library, capsys):
    assert bench_ops.main(["--ops", "norms"]) == 2 and "no operation norms; there are activation" in capsys.readouterr().err
    assert bench_ops.main(["--shim", str(library), "--write"]) == 2 and "no order to write" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench_ops.main(["--device", "cuda"]) == 2 and "no GPU here" in capsys.readouterr().err
