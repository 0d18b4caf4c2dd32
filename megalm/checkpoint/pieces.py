"""Parts of the model as boxes of tensors that lie elsewhere: any range of a part is copied from the boxes that it meets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.checkpoint import boxes
from megalm.checkpoint.fragment import Fragment
from megalm.checkpoint.sealed import CheckpointError

PADDED_PARTS = ("embedding.word.weight", "head.weight")
"""Their dim 0 is the vocabulary, padded: its size may differ between two plans of one model."""


@dataclass(frozen=True)
class Piece:
    """The elements of one part in `box`, (low, high) along every dim, as a tensor of the box's shape that `view` reads.

    What it returns stands there until another piece is read.
    """

    box: boxes.Box
    view: Callable[[], Tensor]


def wanted(target: Fragment, shape: tuple[int, ...], source: str, padded: bool) -> list[boxes.Box]:
    """The boxes of the target that lie in the part as it is stored, with this shape: rows that only the target's vocabulary
    padding has don't. `padded`: the stored vocabulary may have padding too, and more rows than the target.

    Raises CheckpointError where the shape is another.
    """
    own = tuple(target.full_shape)
    resized = target.part in PADDED_PARTS and shape[1:] == own[1:] and (padded or shape[0] <= own[0])
    if shape != own and not resized:
        raise CheckpointError(f"{target} has shape {list(shape)} in {source} and {list(own)} here")
    stored = tuple((0, extent) for extent in shape)
    common = [boxes.intersect(box, stored) for box in boxes.boxes(target)]
    return [box for box in common if box is not None]


@torch.no_grad()
def copy(target: Fragment, asked: Sequence[boxes.Box], pieces: Iterable[Piece]) -> int:
    """Copy these boxes of the target from the pieces, which hold every element of them exactly once; a piece that none of them
    meets isn't read. Returns how many elements were copied."""
    copied = 0
    for piece in pieces:
        for box in asked:
            common = boxes.intersect(box, piece.box)
            if common is not None:
                within = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, piece.box, strict=True))
                _box_view(target, common).copy_(piece.view()[within])
                copied += boxes.size(common)
    missing = sum(boxes.size(box) for box in asked) - copied
    assert not missing, f"{target}: {missing:,} elements are missing"  # whoever has the pieces has found them complete
    return copied


def _box_view(target: Fragment, box: boxes.Box) -> Tensor:
    """The box as a view of the target's own memory."""
    tensor = target.tensor.detach()
    assert tensor.dim() == 1 and tensor.is_contiguous(), f"{target}: not a contiguous 1-D tensor"
    sizes, strides, first, _ = boxes.strides_in(target, box)
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + first)


class Parts(Mapping[str, Tensor]):
    """Part name -> the whole tensor, on the CPU, assembled when it is asked for and not kept."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], role: str) -> None:
        """`role`: that of the fragments that `fill` is asked for."""
        self._shapes, self._role = dict(shapes), role

    def shape(self, part: str) -> tuple[int, ...]:
        """The full shape, without reading the tensor."""
        return self._shapes[part]

    @abstractmethod
    def dtype(self, part: str) -> torch.dtype:
        """The dtype that it is stored in."""

    @abstractmethod
    def fill(self, target: Fragment) -> None:
        """Copy the elements of a fragment of any layout. Raises CheckpointError when there is no such part, or one of another
        shape."""

    @abstractmethod
    def release(self) -> None:
        """Close the files until something is read again."""

    def rows(self, part: str, low: int, high: int) -> Tensor:
        """Rows [low, high) along the first dim, in the stored dtype."""
        shape = self._shapes[part]
        rows = torch.empty((high - low, *shape[1:]), dtype=self.dtype(part))
        self.fill(Fragment(part, self._role, shape, 0, low, high, 0, rows.view(-1), False))
        return rows

    def __getitem__(self, part: str) -> Tensor:
        return self.rows(part, 0, self._shapes[part][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
