"""Arithmetic on ranges of elements: which part of one stored fragment is which part of another one.

A fragment is a contiguous range of the row-major flattening of a slab, and a slab is a range along one dim of a full
tensor. Such a range is a union of few boxes (at most 3 in two dims: the end of a row, whole rows, the start of a row), the
intersection of two boxes is a box, and a box inside a fragment is a strided view of it. So any fragment is filled from any
others by a handful of strided copies, however the two layouts cut the tensor, and never row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

Box = tuple[tuple[int, int], ...]
"""(low, high) along every dim of the full tensor."""


class Span(Protocol):
    """Elements [start, start + count) of the row-major flattening of full[dim: low..high] (dim None: of the whole tensor)."""

    full_shape: tuple[int, ...]
    dim: int | None
    low: int
    high: int
    start: int

    @property
    def count(self) -> int: ...


def slab_shape(span: Span) -> tuple[int, ...]:
    """The shape of the slab that the span's elements are counted in."""
    if span.dim is None:
        return tuple(span.full_shape)
    return (*span.full_shape[: span.dim], span.high - span.low, *span.full_shape[span.dim + 1:])


def fault(span: Span) -> str | None:
    """Why these numbers describe no range of a tensor; None when they do."""
    if any(length < 1 for length in span.full_shape):
        return f"shape {list(span.full_shape)} has no elements"
    if span.dim is not None and not 0 <= span.dim < len(span.full_shape):
        return f"dim {span.dim} of a tensor of {len(span.full_shape)} dims"
    if span.dim is not None and not 0 <= span.low < span.high <= span.full_shape[span.dim]:
        return f"range {span.low}..{span.high} of {span.full_shape[span.dim]} along dim {span.dim}"
    size = math.prod(slab_shape(span))
    if span.count < 1 or span.start < 0 or span.start + span.count > size:
        return f"elements {span.start}..{span.start + span.count} of a slab of {size}"
    return None


def boxes(span: Span) -> list[Box]:
    """The boxes, in the full tensor, whose union is the span; in the order of the elements."""
    found = _split(slab_shape(span), span.start, span.start + span.count)
    if span.dim is None or span.low == 0:
        return found
    return [(*box[: span.dim], (box[span.dim][0] + span.low, box[span.dim][1] + span.low), *box[span.dim + 1:]) for box in found]


def _split(shape: Sequence[int], first: int, stop: int) -> list[Box]:
    """Elements [first, stop) of the flattening of `shape`, as boxes."""
    if not shape:
        return [()]
    inner = math.prod(shape[1:])
    row, last_row = first // inner, (stop - 1) // inner
    if row == last_row and stop - first < inner:
        return [((row, row + 1), *rest) for rest in _split(shape[1:], first - row * inner, stop - row * inner)]
    found: list[Box] = []
    if first % inner:
        found += [((row, row + 1), *rest) for rest in _split(shape[1:], first % inner, inner)]
        row += 1
    full_stop = stop // inner
    if row < full_stop:
        found.append(((row, full_stop), *((0, length) for length in shape[1:])))
    if stop % inner:
        found += [((full_stop, full_stop + 1), *rest) for rest in _split(shape[1:], 0, stop % inner)]
    return found


def intersect(one: Box, other: Box) -> Box | None:
    """The elements that both hold; None when there are none."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(low < high for low, high in common) else None


def size(box: Box) -> int:
    """How many elements it holds."""
    return math.prod(high - low for low, high in box)


def strides_in(span: Span, box: Box) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """The box as a strided view of the span's 1-D tensor: (sizes, strides, first element, elements from first to last)."""
    shape = slab_shape(span)
    strides = tuple(math.prod(shape[dim + 1:]) for dim in range(len(shape)))
    origin = [span.low if dim == span.dim else 0 for dim in range(len(shape))]
    sizes = tuple(high - low for low, high in box)
    first = sum((low - start) * stride for (low, _), start, stride in zip(box, origin, strides, strict=True)) - span.start
    length = sum((extent - 1) * stride for extent, stride in zip(sizes, strides, strict=True)) + 1
    assert first >= 0 and first + length <= span.count, (box, span)
    return sizes, strides, first, length


def untiled(spans: Iterable[Span]) -> str | None:
    """What keeps these spans from holding every element of one tensor exactly once; None when they do."""
    ordered = sorted(spans, key=lambda span: (span.low, span.high, span.start))
    if not ordered:
        return "nothing of it is stored"
    shape, dim = ordered[0].full_shape, ordered[0].dim
    if any((span.full_shape, span.dim) != (shape, dim) for span in ordered):
        return "it is stored with more than one shape or sharded dim"
    extent = shape[dim] if dim is not None else None
    reached, slabs = 0, {}
    for span in ordered:
        slabs.setdefault((span.low, span.high) if dim is not None else None, []).append(span)
    for slab, members in slabs.items():
        where = f" of {slab[0]}..{slab[1]} along dim {dim}" if slab else ""
        if slab and slab[0] != reached:
            what = "missing" if slab[0] > reached else "stored twice"
            return f"{min(reached, slab[0])}..{max(reached, slab[0])} along dim {dim} is {what}"
        reached = slab[1] if slab else reached
        problem = _unchained(members, math.prod(slab_shape(members[0])))
        if problem:
            return problem + where
    if extent is not None and reached != extent:
        return f"{reached}..{extent} along dim {dim} is missing"
    return None


def _unchained(members: Sequence[Span], stop: int) -> str | None:
    """Whether spans of one slab, sorted by their start, follow one another from 0 to `stop`."""
    reached = 0
    for span in members:
        if span.start != reached:
            what = "are missing" if span.start > reached else "are stored twice"
            return f"elements {min(reached, span.start)}..{max(reached, span.start)} {what}"
        reached = span.start + span.count
    return None if reached == stop else f"elements {reached}..{stop} are missing"
