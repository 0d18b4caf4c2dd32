"""The bench of loading runs, and loads what was saved; how long things take is no test's affair."""
from __future__ import annotations

from megalm.tools import bench_load
from tests import dist


def measured(_rank: int, _world: int) -> dict:
    return bench_load.measure(megabytes=8, rounds=1)


def test_every_way_is_measured():
    [found] = dist.run(measured, 1, group=False)
    assert {"memory copy", "megalm", "torch.load", "torch.distributed.checkpoint"} < set(found["seconds"])
    assert all(seconds > 0 for seconds in found["seconds"].values()) and found["bytes"] > 8e6
