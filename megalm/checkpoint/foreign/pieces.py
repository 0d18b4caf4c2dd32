"""Parts of the model as boxes of tensors that lie elsewhere: any range of a part is copied from the boxes that it meets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.checkpoint import boxes
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.fragment import Fragment
from megalm.checkpoint.load import PADDED_PARTS, box_view


@dataclass(frozen=True)
class Piece:
    """The elements of one part in `box`, (low, high) along every dim, as a tensor of the box's shape that `view` opens.

    The view is of a mapped file: opening it reads nothing, and the file is let go of with the view.
    """

    box: boxes.Box
    view: Callable[[], Tensor]


class Foreign(Mapping[str, Tensor]):
    """Part name -> the whole tensor, on the CPU, read when it is asked for and not kept: what Weights is to a checkpoint.

    `source`: where it all comes from, for messages. `shapes`: of every part, the vocabulary without padding. `release`:
    lets go of files that stay open from one part to the next.
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

    @torch.no_grad()
    def fill(self, target: Fragment) -> None:
        """Copy the elements of a fragment of any layout. Rows of the vocabulary's padding stay as they are.

        Raises CheckpointError when there is no such part, or one of another shape.
        """
        if target.part not in self._shapes:
            raise CheckpointError(f"{target.part} isn't in {self.source}")
        shape, own = self._shapes[target.part], tuple(target.full_shape)
        padded = target.part in PADDED_PARTS and shape[1:] == own[1:] and shape[0] <= own[0]
        if shape != own and not padded:
            raise CheckpointError(f"{target.part} has shape {list(shape)} in {self.source} and {list(own)} here")
        for piece in self._pieces[target.part]:
            for box in boxes.boxes(target):
                common = boxes.intersect(box, piece.box)
                if common is not None:
                    within = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, piece.box, strict=True))
                    box_view(target, common).copy_(piece.view()[within])

    def __getitem__(self, part: str) -> Tensor:
        return self.rows(part, 0, self._shapes[part][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
