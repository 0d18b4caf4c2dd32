"""Attention by the portable path: every head dim, odd lengths, every kind of mask, and what bends the scores."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from megalm.ops.attention import attention, document_bounds
from megalm.ops.kernels.attention import HEAD_DIMS, portable
from megalm.ops.random import ATTENTION_SCORES, DropoutKey
from megalm.tools.kernel_cases.accuracy import randn
from megalm.tools.kernel_cases.case import Case

HALVES = (torch.bfloat16, torch.float16)
KEY = DropoutKey(1234, 5, 3, ATTENTION_SCORES)


def case(name: str, s: int, s_k: int, batch: int, heads: int, groups: int, dims: tuple[int, int] = (64, 64),
         plain: str = "torch", lse: bool = False, sinks: bool = False, options: Callable[[Tensor], dict] = lambda q: {},
         path: Callable = portable, op: str = "attention", backward: bool = True,
         deterministic: bool = False, fp8: bool = False, grown: bool = False) -> Case:
    """`options(q)` makes the call's keyword arguments on q's device; the call is made inside `path()`. grown: heads and
    rows differ in size."""
    def inputs():
        tensors = [randn(s, batch, heads, dims[0]), randn(s_k, batch, groups, dims[0], seed=1),
                   randn(s_k, batch, groups, dims[1], seed=2)]
        tensors = [_grow(x, step) for x, step in zip(tensors, (1, 3, 2), strict=True)] if grown else tensors
        return [*tensors, randn(heads, seed=3)] if sinks else tensors

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, backend: str):
        with path():
            return attention(q, k, v, return_lse=lse, backend=backend, deterministic=deterministic, fp8=fp8,
                             **({"sinks": rest[0]} if rest else {}), **options(q))

    def grads():
        return [randn(s, batch, heads, dims[1], seed=4), *([randn(batch, heads, s, seed=5)] if lse else [])]

    return Case(f"{op} {name}", inputs, run, grads if backward else None, plain=plain, dtypes=HALVES,
                repeats=deterministic or not backward or path is portable)


hopper = partial(case, path=nullcontext, op="attention hopper")
"""A case of the path that a Hopper GPU takes."""


def _grow(x: Tensor, step: int) -> Tensor:
    """Each head of each batch entry times a power of two of its own, and later rows up to three times as large."""
    place = torch.arange(x.shape[1] * x.shape[2], device=x.device).view(1, *x.shape[1:3], 1) + 1
    rows = torch.arange(x.shape[0], device=x.device, dtype=x.dtype).view(-1, 1, 1, 1) / x.shape[0]
    return x * 2.0 ** (place * step % 5 - 3) * (1 + 2 * rows)


def fixed(**options) -> Callable[[Tensor], dict]:
    return lambda q: options


def documents(lengths: list[int], q: Tensor) -> dict:
    ends = torch.tensor([0, *lengths], device=q.device).cumsum(0)
    return {"documents": document_bounds(ends)}


def _unequal_documents(queries: list[int], keys: list[int], q: Tensor) -> dict:
    ends = [torch.tensor([0, *lengths], device=q.device).cumsum(0) for lengths in (queries, keys)]
    return {"documents": document_bounds(*ends, causal=True), "causal": False}


def _dropout(heads: tuple[int, int, int], batch: int, q: Tensor) -> dict:
    return {"dropout": 0.2, "key": KEY, "samples": torch.arange(batch, device=q.device) + (1 << 33), "heads": heads}


def slopes(q: Tensor) -> dict:
    return {"slopes": 2.0 ** -torch.arange(1, q.shape[2] + 1, device=q.device, dtype=torch.float32)}


def packed(dims: int, path: Callable = portable, op: str = "attention") -> Case:
    """q, k and v as views of one fused projection."""
    def run(qkv: Tensor, *, backend: str):
        query, key, value = qkv.split([4 * dims, 2 * dims, 2 * dims], dim=-1)
        with path():
            return attention(*(part.unflatten(-1, (-1, dims)) for part in (query, key, value)), backend=backend)

    return Case(f"{op} packed qkv", lambda: [randn(19, 2, 8 * dims)], run, lambda: [randn(19, 2, 4, dims, seed=4)],
                dtypes=HALVES, repeats=path is portable)


def undropped(case: Callable[..., Case], lengths: Sequence[int], odd: Sequence[int]) -> list[Case]:
    """What both paths serve, made by `case`; lengths: one a head dim; odd: with head dim 64."""
    # Where SDPA has no such thing, the reference at half precision is what errors are compared with.
    bent = partial(case, plain="reference")
    return [
        *(case(f"d{d}/{e} s{s}", s, s, 1, 2, 1, (d, e)) for (d, e), s in zip(HEAD_DIMS, lengths, strict=True)),
        *(case(f"s{s}", s, s, 1, 1, 1) for s in odd),
        case("full", 33, 70, 2, 4, 2, options=fixed(causal=False)),
        case("full d128", 70, 130, 1, 1, 1, (128, 128), options=fixed(causal=False)),
        case("one query, many keys", 1, 63, 2, 8, 2),
        case("fewer queries", 17, 80, 1, 3, 1),
        case("more queries: some see nothing", 80, 17, 1, 2, 1),
        case("keys that no query sees", 20, 200, 1, 2, 1, options=fixed(window=(10, 0))),
        case("blocks of queries that see nothing", 200, 17, 1, 1, 1),
        case("window", 150, 150, 1, 1, 1, options=fixed(window=(40, 0))),
        case("window both ways", 70, 90, 1, 1, 1, options=fixed(causal=False, window=(9, 5))),
        case("documents", 140, 140, 1, 2, 1, options=partial(documents, [1, 63, 2, 70, 4])),
        case("window and documents", 140, 140, 1, 2, 1,
             options=lambda q: {"window": (40, 0), **documents([1, 63, 2, 70, 4], q)}),
        case("documents of unequal lengths", 90, 130, 1, 2, 2,
              options=partial(_unequal_documents, [5, 60, 0, 25], [40, 60, 7, 23])),
        bent("softcap", 17, 80, 1, 2, 1, options=fixed(softcap=3.0)),
        bent("alibi", 70, 80, 1, 2, 1, options=slopes),
        bent("negative scale", 17, 20, 1, 2, 1, options=fixed(scale=-0.2)),
        bent("sinks", 40, 70, 2, 3, 1, lse=True, sinks=True),
        bent("lse", 20, 70, 1, 2, 2, lse=True),
    ]


def small() -> list[Case]:
    bent = partial(case, plain="reference")
    return [*undropped(case, (65, 63, 17, 129, 33, 40), (1, 17, 63)),
            case("s1023 of one head", 1023, 1023, 1, 1, 1),
            bent("dropout", 70, 66, 2, 2, 1, options=partial(_dropout, (2, 4, 8), 2)),
            bent("dropout, odd length, d128", 35, 67, 1, 2, 2, (128, 128), options=partial(_dropout, (0, 2, 2), 1)),
            packed(64)]


def large() -> list[Case]:
    return [*(case(f"d{d}/{e} s2048", 2048, 2048, 1, 8, 2, (d, e)) for d, e in HEAD_DIMS),
            case("s1023", 1023, 1023, 2, 4, 4),
            case("full s2048 d128", 2048, 2048, 1, 8, 8, (128, 128), options=fixed(causal=False)),
            case("dropout s1024 d128", 1024, 1024, 2, 4, 4, (128, 128), plain="reference",
                  options=partial(_dropout, (0, 4, 4), 2))]
