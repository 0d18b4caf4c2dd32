"""The bench of checkpoints runs, and measures what it says; how long things take is no test's affair."""
from __future__ import annotations

from megalm.tools import bench_checkpoint
from tests import dist


def measured(_rank: int, _world: int) -> dict:
    bench_checkpoint.STEP_SECONDS = 0.02
    return bench_checkpoint.measure(megabytes=8, rounds=1, steps=2)


def test_every_way_is_measured():
    [found] = dist.run(measured, 1, group=False)
    ways = set(found["seconds"])
    assert {"memory copy", "megalm, async", "torch.save", "DeepSpeed's save_checkpoint"} < ways == set(found["copies"])
    assert all(seconds > 0 for seconds in found["seconds"].values()) and found["copies"]["memory copy"] == 1
    assert found["bytes"] > 8e6 and set(found["met"]) == {"stall", "interference"}
