"""How another program's tensor is made of parts: one description that is read in both directions.

Beyond names, formats differ in three ways: several parts lie in one tensor (q, k and v; gate and up), they alternate a head or a
query group at a time, or the matrix is stored as [in, out]. A tensor of a tensor-parallel rank is the same for its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.pieces import Piece
from megalm.checkpoint.stream import Reader

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """The tensor `name`: along its rows, `groups` times the next share of each part, in the order of `parts`.

    `transposed`: it is stored as [in, out]. `dim`: the parts' dim that tensor-parallel ranks divide; None: each has all.
    """

    name: str
    parts: tuple[str, ...]
    groups: int = 1
    transposed: bool = False
    dim: int | None = None

    def shape(self, shapes: Shapes, tp: int = 1) -> tuple[int, ...]:
        """The tensor's shape on one of `tp` ranks."""
        first = shapes[self.parts[0]]
        whole = [sum(shapes[part][0] for part in self.parts), *first[1:]]
        if self.dim is not None:
            whole[self.dim] //= tp
        return tuple(reversed(whole)) if self.transposed else tuple(whole)

    def pieces(self, shapes: Shapes, view: Callable[[], Tensor], rank: int = 0, tp: int = 1) -> Iterator[tuple[str, Piece]]:
        """(part, piece) of everything that the tensor of one of `tp` ranks holds."""
        shares = tp if self.dim == 0 else 1
        groups = max(1, self.groups // shares)
        sizes = [shapes[part][0] // shares // groups for part in self.parts]          # rows of a part in one group
        for group in range(groups):
            offset = group * sum(sizes)
            for part, size in zip(self.parts, sizes, strict=True):
                box = [(0, extent) for extent in shapes[part]]
                low = (rank * groups if self.dim == 0 else 0) * size + group * size
                box[0] = (low, low + size)
                if self.dim == 1:
                    share = shapes[part][1] // tp
                    box[1] = (rank * share, (rank + 1) * share)
                yield part, Piece(tuple(box), self._cut(view, offset, size))
                offset += size

    def _cut(self, view: Callable[[], Tensor], offset: int, size: int) -> Callable[[], Tensor]:
        def cut() -> Tensor:
            tensor = view()
            return (tensor.t() if self.transposed and tensor.dim() == 2 else tensor).narrow(0, offset, size)
        return cut


def join(layout: Layout, weights: Reader, shapes: Shapes) -> Tensor:
    """The tensor of a layout that isn't split, made of its parts."""
    dtypes = {weights.dtype(part) for part in layout.parts}
    if len(dtypes) > 1:
        raise CheckpointError(f"{layout.name} is made of parts of different dtypes: {', '.join(layout.parts)}")
    found = {part: weights.rows(part, 0, shapes[part][0]) for part in layout.parts}
    if len(layout.parts) == 1:
        joined = found[layout.parts[0]]
    else:
        joined = torch.cat([tensor.unflatten(0, (layout.groups, -1)) for tensor in found.values()], dim=1).flatten(0, 1)
    return joined.t().contiguous() if layout.transposed and joined.dim() == 2 else joined


def check_tensors(source: str, layouts: Sequence[Layout], shapes: Shapes, found: Shapes,
                  ignored: Callable[[str], bool]) -> None:
    """The tensors there are those that the layouts name, of the right shapes. Raises CheckpointError with all that aren't.

    `ignored`: names of buffers, which are no weights.
    """
    expected = {layout.name: layout.shape(shapes) for layout in layouts}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} {list(found[name])} has no place in the model" for name in found
                 if name not in expected and not ignored(name)]
    problems += [f"{name} is {list(found[name])}, not {list(shape)}" for name, shape in expected.items()
                 if name in found and tuple(found[name]) != shape]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{source}: " + "; ".join(problems[:5]) + more)
