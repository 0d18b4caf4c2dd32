"""rank <-> (pp, dp, tp) is DeepSpeed's grid, over many shapes."""
from __future__ import annotations

import itertools

import pytest

from megalm.plan import Place
from megalm.plan.topology import Topology

SHAPES = [*itertools.product((1, 2, 3, 4, 8), repeat=3), (16, 5, 8), (64, 1, 8), (1, 96, 2)]


@pytest.fixture(scope="module")
def grid_class():
    topology = pytest.importorskip("deepspeed.runtime.pipe.topology")
    return topology.PipeModelDataParallelTopology


@pytest.mark.parametrize("pp, dp, tp", SHAPES)
def test_places_and_groups_are_deepspeeds(pp, dp, tp, grid_class):
    ours, theirs = Topology(pp=pp, dp=dp, tp=tp), grid_class(num_pp=pp, num_mp=tp, num_dp=dp)
    assert ours.world_size == theirs.world_size()
    for rank in range(ours.world_size):
        coordinate = theirs.get_coord(rank)
        assert ours.place(rank) == Place(pp=coordinate.pipe, dp=coordinate.data, tp=coordinate.model)
        assert ours.rank(pp=coordinate.pipe, dp=coordinate.data, tp=coordinate.model) == rank
    for groups, axis in ((ours.tp_groups(), "model"), (ours.dp_groups(), "data")):
        # DeepSpeed makes no groups along an axis of one rank
        single = [[rank] for rank in range(ours.world_size)]
        assert sorted(groups) == sorted(theirs.get_axis_comm_lists(axis) or single)


def test_tp_groups_come_in_deepspeeds_order(grid_class):
    theirs = grid_class(num_pp=2, num_mp=2, num_dp=2)
    assert Topology(pp=2, dp=2, tp=2).tp_groups() == theirs.get_axis_comm_lists("model") == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_eight_ranks_written_out():
    grid = Topology(pp=2, dp=2, tp=2)
    assert [grid.place(rank) for rank in range(4)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert grid.dp_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_no_such_rank():
    with pytest.raises(AssertionError, match="rank 8 of 8"):
        Topology(pp=2, dp=2, tp=2).place(8)
