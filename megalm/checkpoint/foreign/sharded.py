"""Weights that tensor-parallel ranks wrote, merged as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from megalm.checkpoint.foreign.layout import Layout, Shapes
from megalm.checkpoint.foreign.weights import Foreign
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.pieces import PADDED_PARTS, Piece

Views = Mapping[str, Sequence[Callable[[], Tensor]]]
"""Tensor name -> what opens it on each tp rank."""
SHOWN = 5
ROWS = 64


def merge(source: str, layouts: Sequence[Layout], shapes: Shapes, views: Views, tp: int, release: Callable[[], None]) -> Foreign:
    """All parts, from the tensors of `tp` ranks. Raises CheckpointError with every tensor that is missing or has no place.

    A vocabulary may be padded, to rows that depend on tp: those beyond the model's aren't read.
    """
    problems = [f"{layout.name} is missing" for layout in layouts if layout.name not in views]
    expected = {layout.name for layout in layouts}
    problems += [f"{name} has no place in the model" for name in views if name not in expected]
    pieces: dict[str, list[Piece]] = {}
    for layout in layouts:
        if layout.name in views:
            for rank in range(tp if layout.dim is not None else 1):
                problem = _add(pieces, layout, shapes, views[layout.name][rank], rank, tp)
                problems += [problem] if problem else []
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{source}: " + "; ".join(problems[:SHOWN]) + more)
    return Foreign(source, shapes, pieces, release)


def check_tied(source: str, heads: Sequence[Callable[[], Tensor]], embeddings: Sequence[Callable[[], Tensor]]) -> None:
    """The output layers beside the embeddings of each tp rank, if there are any, are the same weights: some programs write them
    twice. A look at the first rows tells. Raises CheckpointError."""
    for head, embedding in zip(heads, embeddings, strict=False):
        if not torch.equal(head()[:ROWS].float(), embedding()[:ROWS].float()):
            raise CheckpointError(f"{source}: model.tie_embeddings: true here, and the output layer there has its own weights; "
                                  "false is right")


def _add(pieces: dict[str, list[Piece]], layout: Layout, shapes: Shapes, view: Callable[[], Tensor], rank: int,
         tp: int) -> str | None:
    """Add what one rank's tensor holds; the problem where its shape is another."""
    shape, expected = tuple(view().shape), layout.shape(shapes, tp)
    part = layout.parts[0]
    if part in PADDED_PARTS and shape[1:] == expected[1:] and shape[0] * tp >= shapes[part][0]:
        low, high = rank * shape[0], min((rank + 1) * shape[0], shapes[part][0])
        if low < high:
            box = ((low, high), (0, shape[1]))
            pieces.setdefault(part, []).append(Piece(box, partial(_first_rows, view, high - low)))
        return None
    if shape != expected:
        return f"{layout.name} of tp rank {rank} is {list(shape)}, not {list(expected)}"
    for name, piece in layout.pieces(shapes, view, rank, tp):
        pieces.setdefault(name, []).append(piece)
    return None


def _first_rows(view: Callable[[], Tensor], rows: int) -> Tensor:
    return view()[:rows]
