"""Another program's weights by part: what Weights is to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from megalm.checkpoint import boxes
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.fragment import Fragment
from megalm.checkpoint.pieces import Piece, copy, wanted


class Foreign(Mapping[str, Tensor]):
    """Part name -> the whole tensor, on the CPU, read when it is asked for and not kept.

    The pieces' views are of mapped files: opening one reads nothing, and the file is let go of with it. `source`: where it all
    comes from, for messages. `shapes`: of every part, the vocabulary without padding. `release`: lets go of files that stay open
    from one part to the next.
    """

    def __init__(self, source: str, shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, list[Piece]],
                 release: Callable[[], None] = lambda: None) -> None:
        """Raises CheckpointError where the pieces of a part don't hold every element exactly once."""
        self.source, self._shapes, self._pieces = source, dict(shapes), dict(pieces)
        self.release = release
        for part, shape in self._shapes.items():
            held = sum(boxes.size(piece.box) for piece in self._pieces.get(part, ()))
            if held != math.prod(shape):
                raise CheckpointError(f"{source} has {held:,} of the {math.prod(shape):,} elements of {part} {list(shape)}")

    def shape(self, part: str) -> tuple[int, ...]:
        """The full shape, without reading the tensor."""
        return self._shapes[part]

    def dtype(self, part: str) -> torch.dtype:
        """The dtype that it is stored in."""
        return self._pieces[part][0].view().dtype

    def rows(self, part: str, low: int, high: int) -> Tensor:
        """Rows [low, high) along the first dim, in the stored dtype."""
        shape = self._shapes[part]
        rows = torch.empty((high - low, *shape[1:]), dtype=self.dtype(part))
        self.fill(Fragment(part, "weight", shape, 0, low, high, 0, rows.view(-1)))
        return rows

    def fill(self, target: Fragment) -> None:
        """Copy the elements of a fragment of any layout. Rows of the vocabulary's padding stay as they are.

        Raises CheckpointError when there is no such part, or one of another shape.
        """
        if target.part not in self._shapes:
            raise CheckpointError(f"{target.part} isn't in {self.source}")
        asked = wanted(target, self._shapes[target.part], self.source, padded=False)
        copy(target, asked, self._pieces[target.part])

    def __getitem__(self, part: str) -> Tensor:
        return self.rows(part, 0, self._shapes[part][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
