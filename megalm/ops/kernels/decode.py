"""Attention to a cache by csrc/attention_decode.cu: each key and value is read once, the same bits every time. No backward pass.

Memory: fp32 parts of the output, one for each split of the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.ops.kernels.attention import HEAD_DIMS as HEAD_DIMS
from megalm.ops.kernels.attention import fitting, strides
from megalm.ops.library import Operation, check_dtypes, define, dtype_code

_STRIDES = " ".join(f"{tensor}_{dim}" for tensor in ("q", "k", "v", "out") for dim in ("row", "batch", "head"))
_DECODE = Operation("attention_decode", pointers="q k v lengths table slopes sinks out lse partial_out partial_lse",
                    int64=f"batch heads groups queries head_dim value_dim keys page splits {_STRIDES} left",
                    float64="scale softcap")


def _empty(q, k, v, *rules):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[1], q.shape[2], q.shape[0], dtype=torch.float32)


def _decode(q, k, v, lengths, table, slopes, sinks, left, scale, softcap):
    check_dtypes(q, k=k, v=v)
    for name, tensor, dtype in (("lengths", lengths, torch.int32), ("table", table, torch.int32),
                                ("slopes", slopes, torch.float32)):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != q.device):
            raise ValueError(f"decode {name} is {tensor.dtype} on {tensor.device}; it must be {dtype} on {q.device}")
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"decode sinks are on {sinks.device}; they must be on {q.device}")
    out, lse = _empty(q, k, v)
    # A page's tokens are its rows, and pages stand where the sequences of a cache do.
    if table is not None:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    keys, page = (k.shape[0], 0) if table is None else (table.shape[1] * k.shape[0], k.shape[0])
    if out.numel() == 0 or keys == 0:
        return out.zero_(), lse.copy_(sinks[None, :, None].expand_as(lse)) if sinks is not None else lse.fill_(-torch.inf)
    q, k, v = (fitting(x) for x in (q, k, v))
    sinks = None if sinks is None else sinks.float()
    lengths, table, slopes, sinks = (None if t is None else t.contiguous() for t in (lengths, table, slopes, sinks))
    values = dict(q=q, k=k, v=v, lengths=lengths, table=table, slopes=slopes, sinks=sinks, out=out, lse=lse, batch=q.shape[1],
                  heads=q.shape[2], groups=k.shape[2], queries=q.shape[0], head_dim=q.shape[3], value_dim=v.shape[3], keys=keys,
                  page=page, **strides("q", q), **strides("k", k), **strides("v", v),
                  **strides("out", out), left=left, scale=scale, softcap=softcap, dtype=dtype_code(q))
    splits = _DECODE.count("splits", q.device, partial_out=None, partial_lse=None, splits=0, **values)
    partial_lse = lse.new_empty(splits, *lse.shape) if splits > 1 else None
    partial_out = lse.new_empty(splits, *lse.shape, v.shape[3]) if splits > 1 else None
    _DECODE(q.device, partial_out=partial_out, partial_lse=partial_lse, splits=splits, **values)
    return out, lse


attention_decode = define(
    "attention_decode(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? table, Tensor? slopes, Tensor? sinks, int left, "
    "float scale, float softcap) -> (Tensor out, Tensor lse)", _decode, _empty)


def decode(q: Tensor, k: Tensor, v: Tensor, rules) -> tuple[Tensor, Tensor]:
    """The backend of ops/decode.py: (out, lse)."""
    return attention_decode(q, k, v, rules.lengths, rules.table, rules.slopes, rules.sinks, rules.left, rules.scale,
                            rules.softcap)
