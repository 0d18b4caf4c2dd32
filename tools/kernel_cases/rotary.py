"""Rotary positions: of one tensor, and in place of the queries and keys inside a fused projection."""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megalm.ops.rotary import rotary, rotary_qkv, rotary_tables
from megalm.tools.kernel_cases.accuracy import randn
from megalm.tools.kernel_cases.case import Case

# s, b, heads, groups, d and how many of its dims are turned. Heads that fill no thread's share, sizes without 16-byte accesses,
# an odd size, and one of which no block holds a head.
SMALL = [(3, 2, 5, 2, 32, 32), (2, 1, 9, 1, 64, 32), (3, 2, 2, 1, 20, 8), (2, 1, 1, 1, 7, 4), (1, 1, 1, 1, 518, 518)]
LARGE = [(8192, 1, 32, 8, 128, 128), (2048, 4, 16, 16, 64, 64), (4096, 1, 8, 1, 128, 128), (2048, 1, 16, 16, 256, 64),
         (1024, 2, 12, 12, 80, 80)]
PLACES = 16  # more than positions, where these are given


def _tables(like: Tensor, places: int, dims: int) -> tuple[Tensor, Tensor]:
    return rotary_tables(places, dims, 10000.0, None, like.device)


def _one(x: Tensor, *positions: Tensor, places: int, dims: int, backend: str, **options):
    return rotary(x, *_tables(x, places, dims), positions=positions[0] if positions else None, backend=backend, **options)


def _fused(qkv: Tensor, *positions: Tensor, places: int, dims: int, heads: int, groups: int, backend: str, **options):
    # A copy is no leaf, so that it is turned in place.
    return rotary_qkv(qkv.clone(), heads, groups, *_tables(qkv, places, dims), positions=positions[0] if positions else None,
                      backend=backend, **options)


def _positions(shape: tuple[int, ...], rows: int) -> Tensor:
    """Of documents of a third of the sequence each, which begin elsewhere in each sequence."""
    s, b = shape[:2]
    places = torch.arange(s) if rows == 1 else torch.arange(s)[:, None] + torch.arange(b)
    return places % max(2, s // 3)


def _case(shape: tuple[int, ...], fused: bool, rows: int, **options) -> Case:
    """rows: dims of the positions given, 0 for none."""
    s, b, heads, groups, d, dims = shape
    size = (s, b, (heads + 2 * groups) * d) if fused else (s, b, heads, d)
    run = partial(_fused, heads=heads, groups=groups) if fused else _one
    run = partial(run, places=s + PLACES, dims=dims, **options)
    counts = (heads, groups, groups) if fused else (heads,)

    def inputs():
        return [randn(*size), *([_positions(shape, rows)] if rows else [])]

    def grads():
        return [randn(s, b, count, d, seed=1 + index) for index, count in enumerate(counts)]

    words = ["qkv" * fused, "interleaved" * options.get("interleaved", False), "positions" * (rows > 0)]
    return Case(" ".join(["rotary", "x".join(map(str, shape)), *filter(None, words)]), inputs, run, grads)


def small() -> list[Case]:
    return [_case(shape, fused, index % 3, interleaved=interleaved, offset=3)
            for index, shape in enumerate(SMALL) for fused in (False, True) for interleaved in (False, True)]


def large() -> list[Case]:
    return [*(_case(shape, fused, 0) for shape in LARGE for fused in (False, True)),
            _case(LARGE[0], True, 2), _case(LARGE[0], True, 0, interleaved=True), _case(LARGE[3], False, 1, interleaved=True)]
