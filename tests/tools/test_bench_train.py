"""The arithmetic of the races, and one small race between real processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time

import numpy as np
import pytest

from megalm.launch.process import descendants
from megalm.tools import bench_train
from megalm.tools.bench_peers import Size, Spec, batches
from megalm.tools.bench_ranks import Contender, ContenderFailed, Turn
from megalm.tools.bench_train import CASES, interval, pair_ratios, race
from tests import dist

TINY = ["--hidden", "16", "--layers", "2", "--heads", "2", "--ffn", "32", "--seq", "8", "--vocab", "128", "--batch", "4"]


def test_interval_of_the_median():
    assert interval([1.0, 3.0, 2.0])[0] == 2.0
    assert interval([1.25] * 9) == (1.25, 1.25, 1.25)
    ratios = np.random.default_rng(1).normal(1.0, 0.1, 400).tolist()
    median, low, high = interval(ratios)
    # The standard error of a normal sample's median is sigma sqrt(pi / 2 / n): 0.00627 here.
    assert low < median < high and high - low == pytest.approx(2 * 1.96 * 0.00627, rel=0.35)
    assert interval(ratios) == (median, low, high)
    with pytest.raises(ValueError, match="no pair"):
        interval([])


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(2)
    intervals = [interval(random.lognormal(0.0, 0.2, 60).tolist(), draws=400, seed=seed) for seed in range(200)]
    covered = sum(low <= 1.0 <= high for _, low, high in intervals)
    assert 180 <= covered <= 200


def test_ratio_is_of_speeds():
    fast, slow = Turn(2.0, 1.0, 0.0), Turn(3.0, 1.0, 0.0)
    assert pair_ratios([(fast, slow), (slow, fast)]) == [1.5, 2.0 / 3.0]


def test_a_race_alternates_who_goes_first_and_drops_the_warmup():
    order = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def turn(self, steps):
            order.append(self.name)
            return Turn(len(order), 0.0, 0.0)

    found = race(Fake("a"), Fake("b"), pairs=2, warmup=1, steps=5)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [(ours.seconds, peer.seconds) for ours, peer in found] == [(4, 3), (5, 6)]


def test_ranks_share_the_batch():
    size = Size(batch=8, seq=4, vocab=50)
    whole = next(batches(Spec("plain"), size, 0))
    halves = [next(batches(Spec("megalm", dp=2, micro=2), size, rank)) for rank in range(2)]
    assert [len(half) for half in halves] == [2, 2] and len(whole) == 1
    rows = sorted(row.tolist() for half in halves for tokens, _ in half for row in tokens)
    assert rows == sorted(row.tolist() for row in whole[0][0])


def test_cases_are_fair():
    """Both sides of a case compute in the same precision, compiled or not; between engines also with the same layout."""
    for name, case in CASES.items():
        assert (case.ours.dtype, case.ours.compile) == (case.peer.dtype, case.peer.compile), name
        if case.peer.kind == "deepspeed":
            assert (case.ours.pp, case.ours.dp, case.ours.micro) == (case.peer.pp, case.peer.dp, case.peer.micro), name


def run_main(rank: int, world: int, arguments: list[str]) -> tuple[int, str]:
    """The program in a warm process, from which it may fork: (exit code, output)."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        return bench_train.main(arguments), output.getvalue()


def test_two_pairs(tmp_path):
    out = tmp_path / "found.json"
    arguments = ["--cases", "plain-fp32", "--pairs", "2", "--warmup", "1", "--out", str(out), *TINY]
    (code, printed), = dist.run(run_main, 1, arguments, group=False)
    found = json.loads(out.read_text())["cases"]["plain-fp32"]
    assert code == (0 if found["met"] else 1) and "plain-fp32" in printed
    ours, peer = found["ours"], found["peer"]
    assert ours["parameters"] == peer["parameters"] and ours["tokens_per_second"] > 0
    assert ours["loss"] == pytest.approx(np.log(128), rel=0.1) and peer["loss"] == pytest.approx(np.log(128), rel=0.1)
    assert found["low"] <= found["median"] <= found["high"] and found["pairs"] == 2


def test_wrong_arguments(capsys):
    assert bench_train.main(["--cases", "plain-fp64"]) == 2 and "plain-fp32" in capsys.readouterr().err
    assert bench_train.main(["--pairs", "0"]) == 2


def race_of_functions(rank: int, world: int) -> dict:
    """Runs in a warm process without a group: what Contender does with steps that fail, and what it leaves behind."""
    def make(rank):
        return (lambda: time.sleep(0.05) or 1.5), {"who": rank}

    def make_broken(rank):
        def step():
            raise RuntimeError("a planted error")
        return step, {}

    with Contender("sleeper", make, 2, 1) as sleeper:
        turn, about = sleeper.turn(2), sleeper.about
        running = len(descendants(os.getpid()))
    with pytest.raises(ContenderFailed, match="broken, rank 0: RuntimeError: a planted error"), \
            Contender("broken", make_broken, 1, 1) as broken:
        broken.turn(1)
    return {"turn": turn, "about": about, "running": running, "left": len(descendants(os.getpid()))}


def test_processes_of_a_contender():
    found, = dist.run(race_of_functions, 1, group=False)
    assert found["turn"].seconds >= 0.1 and found["turn"].cpu_seconds < found["turn"].seconds and found["turn"].loss == 1.5
    assert found["about"] == {"who": 0}
    assert found["running"] == 2 and found["left"] == 0
