"""Attention to a cache: every head dim, lengths apart, pages, and splits that have nothing."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megalm.ops.attention import UNBOUNDED
from megalm.ops.decode import decode
from megalm.ops.kernels.decode import HEAD_DIMS
from megalm.tools.kernel_cases.accuracy import randn
from megalm.tools.kernel_cases.attention import HALVES, fixed, slopes
from megalm.tools.kernel_cases.case import Case


def _case(name: str, lengths: Sequence[int], heads: int, groups: int, queries: int = 1, room: int = 5,
          dims: tuple[int, int] = (64, 64), page: int = 0, left: int = UNBOUNDED, plain: str = "torch", sinks: bool = False,
          lse: bool = False, options: Callable[[Tensor], dict] = lambda q: {}) -> Case:
    """`room`: how much longer the cache is than the longest sequence; there, before a window (`left`) and in pages that nobody
    needs is NaN. page: paged. `options(q)` makes the call's other keyword arguments on q's device."""
    batch, width = len(lengths), max(lengths) + room

    def inputs():
        q = randn(queries, batch, heads, dims[0])
        k, v = (randn(width, batch, groups, d, seed=seed) for seed, d in enumerate(dims, start=1))
        for sequence, length in enumerate(lengths):
            first = max(0, length - queries - left) if left >= 0 else 0
            for cache in (k, v):
                cache[length:, sequence], cache[:first, sequence] = torch.nan, torch.nan
        tensors = [q, k, v, torch.tensor(lengths, dtype=torch.int32)]
        if page:
            tensors[1:3], table = zip(*(_paged(x, lengths, page) for x in (k, v)), strict=True)
            tensors.append(table[0])
        return [*tensors, randn(heads, seed=3)] if sinks else tensors

    def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *rest: Tensor, backend: str):
        rest = list(rest)
        table = rest.pop(0) if page else None
        sink = rest[0] if rest else None
        return decode(q, k, v, lengths, table=table, sinks=sink, return_lse=lse, left=left, backend=backend, **options(q))

    return Case(f"decode {name}", inputs, run, plain=plain, dtypes=HALVES)


def _paged(x: Tensor, lengths: Sequence[int], page: int) -> tuple[Tensor, Tensor]:
    """A cache [s, b, G, d] as pages in an order that is none, with one of NaN that entries beyond a length name."""
    columns = -(-x.shape[0] // page)
    filled = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, columns * page - x.shape[0]), value=torch.nan)
    pages = filled.unflatten(0, (columns, page)).permute(2, 0, 1, 3, 4).flatten(0, 1)          # [b columns, page, G, d]
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(4))
    pool = torch.full((len(pages) + 1, *pages.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
    pool[order + 1] = pages
    table = order.add(1).to(torch.int32).unflatten(0, (x.shape[1], columns))
    used = torch.arange(columns) * page < torch.tensor(lengths)[:, None]
    return pool, torch.where(used, table, 0).to(torch.int32)


def small() -> list[Case]:
    bent = partial(_case, plain="reference")
    return [
        *(_case(f"d{d}/{e}", [n], 2, 1, dims=(d, e)) for (d, e), n in zip(HEAD_DIMS, (65, 63, 17, 129, 70, 300), strict=True)),
        *(_case(f"s{n}", [n], 2, 1) for n in (1, 16, 64, 1023)),
        _case("lengths apart", [63, 0, 200, 1], 4, 2),
        _case("a cache that is full", [300], 1, 1, room=0),
        _case("an empty cache", [0], 2, 1, room=7),
        _case("most of the cache unused", [20], 2, 1, room=900),
        _case("few queries", [40, 300, 3, 2], 6, 2, queries=4),
        _case("more rows than a block has", [170], 8, 1, queries=5),
        _case("16 queries, d128", [150, 16], 4, 1, queries=16, dims=(128, 128)),
        _case("d256, 3 rows", [129], 3, 1, dims=(256, 256), room=40),
        _case("pages of 16", [63, 0, 200, 17], 4, 2, page=16),
        _case("pages of 64, d128", [300, 64], 8, 2, queries=2, page=64, dims=(128, 128)),
        _case("a window", [250, 40], 2, 1, queries=3, left=50),
        _case("a window, pages", [400], 2, 2, page=32, left=100),
        bent("softcap", [130], 2, 1, options=fixed(softcap=3.0)),
        bent("alibi, two queries", [140, 31], 4, 2, queries=2, options=slopes),
        bent("negative scale", [90], 2, 1, options=fixed(scale=-0.2)),
        bent("sinks and lse, one split", [20, 0], 6, 2, queries=2, sinks=True, lse=True),
        bent("sinks and lse, splits", [300, 0], 3, 1, sinks=True, lse=True),
        bent("lse", [200, 7], 2, 2, queries=2, lse=True),
    ]


def large() -> list[Case]:
    lengths = [4096, 1, 4095, 333, 2048, 17, 3000, 0]
    return [*(_case(f"d{d}/{e} s4096", lengths, 32, 8, dims=(d, e)) for d, e in HEAD_DIMS),
            _case("s65536 d128", [65536], 32, 8, dims=(128, 128)),
            _case("one head of 8191 d128, 16 queries", [8191], 32, 1, queries=16, dims=(128, 128)),
            _case("pages of 256, d128", lengths, 32, 8, queries=4, page=256, dims=(128, 128))]
