"""Another program's weights by part: what Weights is to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from megalm.checkpoint import boxes
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.fragment import Fragment
from megalm.checkpoint.pieces import Parts, Piece, copy, wanted


class Foreign(Parts):
    """The weights that another program wrote.

    The pieces' views are of mapped files: opening one reads nothing, and the file is let go of with it. `source`: where it all
    comes from, for messages. `shapes`: of every part, the vocabulary without padding. `release`: lets go of files that stay open
    from one part to the next.
    """

    def __init__(self, source: str, shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, list[Piece]],
                 release: Callable[[], None] = lambda: None) -> None:
        """Raises CheckpointError where the pieces of a part don't hold every element exactly once."""
        super().__init__(shapes, "weight")
        self.source, self._pieces, self._release = source, dict(pieces), release
        for part, shape in self._shapes.items():
            held = sum(boxes.size(piece.box) for piece in self._pieces.get(part, ()))
            if held != math.prod(shape):
                raise CheckpointError(f"{source} has {held:,} of the {math.prod(shape):,} elements of {part} {list(shape)}")

    def dtype(self, part: str) -> torch.dtype:
        return self._pieces[part][0].view().dtype

    def release(self) -> None:
        self._release()

    def fill(self, target: Fragment) -> None:
        """As for all Parts; rows of the vocabulary's padding stay as they are."""
        if target.part not in self._shapes:
            raise CheckpointError(f"{target.part} isn't in {self.source}")
        asked = wanted(target, self._shapes[target.part], self.source, padded=False)
        copy(target, asked, self._pieces[target.part])
