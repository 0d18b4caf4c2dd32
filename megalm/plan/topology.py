"""Who sits where: rank <-> (pp, dp, tp), row-major with tp fastest, as DeepSpeed's PipeModelDataParallelTopology has it.

Neighbours in tp share a host, stages lie farthest apart: tp sends most, the pipeline least.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """A rank's place on each axis of the grid."""
    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """The grid (pp, dp, tp)."""
    pp: int
    dp: int
    tp: int

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    def place(self, rank: int) -> Place:
        """The place of a global rank."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Place(pp, dp, tp)

    def rank(self, *, pp: int, dp: int, tp: int) -> int:
        """The global rank at a place."""
        assert pp in range(self.pp) and dp in range(self.dp) and tp in range(self.tp), f"no place ({pp}, {dp}, {tp}) in {self}"
        return (pp * self.dp + dp) * self.tp + tp

    def tp_groups(self) -> list[list[int]]:
        """Ranks that share one layer's weights; the same list on every rank."""
        return [[self.rank(pp=pp, dp=dp, tp=tp) for tp in range(self.tp)] for pp in range(self.pp) for dp in range(self.dp)]

    def dp_groups(self) -> list[list[int]]:
        """Ranks that hold the same weights and see different samples."""
        return [[self.rank(pp=pp, dp=dp, tp=tp) for dp in range(self.dp)] for pp in range(self.pp) for tp in range(self.tp)]
