"""Attention by csrc/attention_*.cu: no s x s buffer.

The same bits every time, but for the gradient of the queries on Hopper, which is summed in no fixed order unless
the call asks for one.

Memory: the backward pass keeps q, k, v, the output and one fp32 number a query and head. In fp8 (forward alone) q, k and v also
stand in a workspace of one byte an element while the kernel runs; the backward pass has the unrounded ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.library import Operation, check_dtypes, define, dtype_code
from megalm.ops.random import DropoutKey, dropout_words, threshold

HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
"""(head_dim, value_dim) that have kernels: csrc/attention_instances.h."""
FP8_DIMS = ((64, 64), (128, 128), (256, 256))
"""Those of them that have one in fp8."""

_SIZES = "batch heads groups queries keys head_dim value_dim"
_STRIDES = " ".join(f"{tensor}_{dim}" for tensor in ("q", "k", "v", "out") for dim in ("row", "batch", "head"))
_GRAD_STRIDES = " ".join(f"grad_{tensor}_{dim}" for tensor in "qkv" for dim in ("row", "batch", "head"))
_FORWARD = Operation("attention_forward", pointers="q k v first last slopes sinks samples out lse workspace",
                     int64=f"{_SIZES} {_STRIDES} left right head_first", float64="scale softcap kept",
                     uint32="key0 key1 threshold", int32="dtype portable fp8")
_DELTA = Operation("attention_delta", pointers="out grad_out delta",
                   int64="batch heads queries value_dim out_row out_batch out_head grad_row grad_batch grad_head")
_BACKWARD = Operation("attention_backward",
                      pointers="q k v grad_out lse delta first last slopes samples workspace grad_q grad_k grad_v",
                      int64=f"{_SIZES} {_STRIDES} {_GRAD_STRIDES} left right head_first", float64="scale softcap kept",
                      uint32="key0 key1 threshold", int32="dtype portable deterministic")
_DROPOUT = ("Tensor? samples, float dropout, int seed, Tensor step, Tensor layer, int op, int head_first, "
            "bool portable, bool deterministic")
_BOUNDS = "Tensor? first, Tensor? last, Tensor? slopes"
_RULES = f"int left, int right, float scale, float softcap, {_DROPOUT}"


_portable: list[None] = []


@contextmanager
def portable() -> Iterator[None]:
    """Inside, the kernels for sm_80 and up serve even where Hopper's own would: to compare them."""
    _portable.append(None)
    try:
        yield
    finally:
        _portable.pop()


def fitting(x: Tensor) -> Tensor:
    """x [s, b, heads, d] with 16-byte rows as the kernels read them: a view of a fused projection has them, others are copied."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def strides(prefix: str, x: Tensor) -> dict[str, int]:
    return {f"{prefix}_{dim}": stride for dim, stride in zip(("row", "batch", "head"), x.stride(), strict=False)}


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    return dict(batch=q.shape[1], heads=q.shape[2], groups=k.shape[2], queries=q.shape[0], keys=k.shape[0], head_dim=q.shape[3],
                value_dim=v.shape[3])


def _rules(q: Tensor, first, last, slopes, left, right, scale, softcap, samples, dropout, seed, step, layer, op, head_first,
           portable):
    """The params that forward and backward share, as numbers and contiguous tensors."""
    words = dropout_words(DropoutKey(seed, int(step), int(layer), op)) if samples is not None else (0, 0)
    for name, tensor, dtype in (("first", first, torch.int32), ("last", last, torch.int32), ("slopes", slopes, torch.float32),
                                ("samples", samples, torch.int64)):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != q.device):
            raise ValueError(f"attention {name} is {tensor.dtype} on {tensor.device}; it must be {dtype} on {q.device}")
    first, last, slopes, samples = (None if t is None else t.contiguous() for t in (first, last, slopes, samples))
    return dict(first=first, last=last, slopes=slopes, samples=samples, left=left, right=right, scale=scale, softcap=softcap,
                head_first=head_first, kept=1.0 / (1.0 - dropout), key0=words[0], key1=words[1], threshold=threshold(dropout),
                portable=portable)


def _empty_forward(q, k, v, *rules):
    return (q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[1], q.shape[2], q.shape[0], dtype=torch.float32))


def _forward(q, k, v, first, last, slopes, sinks, fp8, left, right, scale, softcap, samples, dropout, seed, step, layer, op,
             head_first, portable, deterministic):
    check_dtypes(q, k=k, v=v)
    out, lse = _empty_forward(q, k, v)
    if out.numel() == 0 or k.shape[0] == 0:
        lse.fill_(-torch.inf)
        if sinks is not None:
            lse.copy_(sinks[None, :, None].expand_as(lse))
        return out.zero_(), lse
    q, k, v = (fitting(x) for x in (q, k, v))
    rules = _rules(q, first, last, slopes, left, right, scale, softcap, samples, dropout, seed, step, layer, op, head_first,
                   portable)
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"attention sinks are on {sinks.device}; they must be on {q.device}")
    sinks = None if sinks is None else sinks.float().contiguous()
    params = dict(q=q, k=k, v=v, sinks=sinks, out=out, lse=lse, **_sizes(q, k, v), **strides("q", q), **strides("k", k),
                  **strides("v", v), **strides("out", out), **rules, dtype=dtype_code(q), fp8=fp8)
    size = _FORWARD.count("workspace", q.device, workspace=None, **params) if fp8 else 0
    _FORWARD(q.device, workspace=_aligned_bytes(q, size) if size else None, **params)
    return out, lse


def _aligned_bytes(beside: Tensor, size: int) -> Tensor:
    """New memory on the device of a tensor that starts where the copy engine wants it, which a CPU's memory need not."""
    made = beside.new_empty(size + 128, dtype=torch.uint8)
    return made[-made.data_ptr() % 128:][:size]


def _empty_backward(grad_out, grad_lse, q, k, v, out, lse, *rules):
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return (*grads, torch.empty_like(lse))


def _backward(grad_out, grad_lse, q, k, v, out, lse, first, last, slopes, left, right, scale, softcap, samples, dropout, seed,
              step, layer, op, head_first, portable, deterministic):
    grad_q, grad_k, grad_v, delta = _empty_backward(grad_out, grad_lse, q, k, v, out, lse)
    if out.numel() == 0 or k.shape[0] == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), delta.zero_()
    q, k, v, grad_out = (fitting(x) for x in (q, k, v, grad_out))
    sizes = _sizes(q, k, v)
    rows = {name: sizes[name] for name in ("batch", "heads", "queries", "value_dim")}
    _DELTA(q.device, out=out, grad_out=grad_out, delta=delta, **rows, **strides("out", out),
           **strides("grad", grad_out), dtype=dtype_code(q))
    # A score's gradient is p (dp - delta + grad_lse): lse is a function of the scores with slope p.
    if grad_lse is not None:
        delta -= grad_lse
    rules = _rules(q, first, last, slopes, left, right, scale, softcap, samples, dropout, seed, step, layer, op, head_first,
                   portable)
    strided = dict(q=q, k=k, v=v, out=grad_out, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
    placed = {name: stride for prefix, tensor in strided.items() for name, stride in strides(prefix, tensor).items()}
    params = dict(q=q, k=k, v=v, grad_out=grad_out, lse=lse, delta=delta, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v,
                  **sizes, **placed, **rules, dtype=dtype_code(q), deterministic=deterministic)
    size = _BACKWARD.count("workspace", q.device, workspace=None, **params)
    workspace = q.new_empty(size, dtype=torch.uint8) if size else None
    _BACKWARD(q.device, workspace=workspace, **params)
    return grad_q, grad_k, grad_v, delta


attention_forward = define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_BOUNDS}, Tensor? sinks, bool fp8, {_RULES}) -> "
                           "(Tensor out, Tensor lse)", _forward, _empty_forward)
attention_backward = define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_BOUNDS}, {_RULES}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor delta)", _backward,
    _empty_backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, first, last, slopes, sinks, fp8, *rest):
        out, lse = attention_forward(q, k, v, first, last, slopes, sinks, fp8, *rest)
        ctx.save_for_backward(q, k, v, out, lse, first, last, slopes, sinks)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, first, last, slopes, sinks = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_q, grad_k, grad_v, delta = attention_backward(grad_out, grad_lse, q, k, v, out, lse, first, last, slopes, *ctx.rest)
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[6]:
            # A sink is a key with value 0: its probability times (0 - delta), over all queries.
            share = torch.exp(sinks.float()[None, :, None] - lse)
            grad_sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
        return grad_q, grad_k, grad_v, None, None, None, grad_sinks, None, *[None] * len(ctx.rest)


def attention(q: Tensor, k: Tensor, v: Tensor, rules) -> tuple[Tensor, Tensor]:
    """The backend of ops/attention.py: (out, lse)."""
    key = rules.key if rules.samples is not None else DropoutKey(0, 0, 0, 0)
    return _Attention.apply(q, k, v, rules.first, rules.last, rules.slopes, rules.sinks, rules.fp8, rules.left, rules.right,
                            rules.scale, rules.softcap, rules.samples, rules.dropout, key.seed, torch.as_tensor(key.step),
                            torch.as_tensor(key.layer), key.op, rules.heads[0], bool(_portable), rules.deterministic)
