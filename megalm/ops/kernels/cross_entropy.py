"""Cross entropy by csrc/cross_entropy_statistics.cu, _gradient.cu and _loss.cu: the functions of ops/cross_entropy.py.

Memory: nothing but a few numbers a row; gradients take the place of the logits. Logits whose rows are not contiguous are copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.ops.dtypes import wide_dtype
from megalm.ops.library import Operation, define, dtype_code

_STATISTICS = Operation("cross_entropy_statistics", pointers="logits targets maximum total expected",
                        int64="rows columns row_stride vocab_start", float64="hit level")
_GRADIENT = Operation("cross_entropy_gradient", pointers="logits targets logsumexp weight",
                      int64="rows width columns row_stride vocab_start", float64="hit level z_loss")
_LOSS = Operation("cross_entropy_loss", pointers="logits targets weight loss", int64="rows width columns row_stride",
                  float64="hit level z_loss")


def _check(logits: Tensor, targets: Tensor, valid_vocab: int, **numbers: Tensor) -> None:
    """Raises ValueError for what the kernels can't take."""
    if logits.dim() != 2 or valid_vocab < 1:
        given = f"logits {tuple(logits.shape)} over {valid_vocab} entries"
        raise ValueError(f"cross entropy of {given}: it takes [n, V] and at least one entry")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; they must be torch.int64")
    for name, tensor in {"targets": targets, **numbers}.items():
        if tensor.shape != logits.shape[:1] or tensor.device != logits.device:
            must = f"[{logits.shape[0]}] on {logits.device} for such logits"
            raise ValueError(f"{name}: {tuple(tensor.shape)} on {tensor.device}; it must be {must}")


def _rows(logits: Tensor) -> Tensor:
    """The logits as rows that do not overlap, each contiguous."""
    rows, width = logits.shape
    apart = (width == 1 or logits.stride(1) == 1) and (rows == 1 or logits.stride(0) >= width)
    return logits if apart else logits.contiguous()


def _share(logits: Tensor, vocab_start: int, valid_vocab: int, label_smoothing: float) -> dict[str, float]:
    """What every kernel is told: the rows, this rank's columns, and the distribution of a target."""
    rows, width = logits.shape
    columns, row_stride = min(max(valid_vocab - vocab_start, 0), width), logits.stride(0) if rows > 1 else width
    return dict(rows=rows, columns=columns, row_stride=row_stride, hit=1.0 - label_smoothing, level=label_smoothing / valid_vocab,
                dtype=dtype_code(logits))


def _empty_statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, label_smoothing: float):
    return tuple(logits.new_empty(logits.shape[0], dtype=wide_dtype(logits.dtype)) for _ in range(3))


def _statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, label_smoothing: float):
    _check(logits, targets, valid_vocab)
    results = maximum, total, expected = _empty_statistics(logits, targets, vocab_start, valid_vocab, label_smoothing)
    if logits.shape[0]:
        logits, targets = _rows(logits), targets.contiguous()
        _STATISTICS(logits.device, logits=logits, targets=targets, maximum=maximum, total=total, expected=expected,
                    vocab_start=vocab_start, **_share(logits, vocab_start, valid_vocab, label_smoothing))
    return results


def _gradient(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, logsumexp: Tensor, weight: Tensor,
              z_loss: float, label_smoothing: float) -> None:
    _check(logits, targets, valid_vocab, logsumexp=logsumexp, weight=weight)
    if logits.numel() == 0:
        return
    rows, targets, logsumexp, weight = _rows(logits), targets.contiguous(), _double(logsumexp), _double(weight)
    _GRADIENT(rows.device, logits=rows, targets=targets, logsumexp=logsumexp, weight=weight, width=rows.shape[1],
              vocab_start=vocab_start, z_loss=z_loss, **_share(rows, vocab_start, valid_vocab, label_smoothing))
    if rows is not logits:
        logits.copy_(rows)


def _loss(logits: Tensor, targets: Tensor, valid_vocab: int, weight: Tensor, z_loss: float, label_smoothing: float) -> Tensor:
    _check(logits, targets, valid_vocab, weight=weight)
    loss = _empty_loss(logits, targets, valid_vocab, weight, z_loss, label_smoothing)
    if logits.shape[0]:
        rows, targets, weight = _rows(logits), targets.contiguous(), _double(weight)
        _LOSS(rows.device, logits=rows, targets=targets, weight=weight, loss=loss, width=rows.shape[1], z_loss=z_loss,
              **_share(rows, 0, valid_vocab, label_smoothing))
        if rows is not logits:
            logits.copy_(rows)
    return loss


def _empty_loss(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float64)


def _double(values: Tensor) -> Tensor:
    return values.double().contiguous()


cross_entropy_statistics = define(
    "cross_entropy_statistics(Tensor logits, Tensor targets, int vocab_start, int valid_vocab, float label_smoothing)"
    " -> (Tensor maximum, Tensor total, Tensor expected)", _statistics, _empty_statistics)
cross_entropy_gradient = define(
    "cross_entropy_gradient(Tensor(a!) logits, Tensor targets, int vocab_start, int valid_vocab, Tensor logsumexp, Tensor weight,"
    " float z_loss, float label_smoothing) -> ()", _gradient, lambda *_: None)
cross_entropy_loss = define(
    "cross_entropy_loss(Tensor(a!) logits, Tensor targets, int valid_vocab, Tensor weight, float z_loss, float label_smoothing)"
    " -> Tensor", _loss, _empty_loss)


def statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, label_smoothing: float):
    """The backend of chunk_statistics."""
    return cross_entropy_statistics(logits, targets, vocab_start, valid_vocab, label_smoothing)


def gradient(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, logsumexp: Tensor, weight: Tensor,
             z_loss: float, label_smoothing: float) -> Tensor:
    """The backend of chunk_gradient."""
    cross_entropy_gradient(logits, targets, vocab_start, valid_vocab, logsumexp, weight, z_loss, label_smoothing)
    return logits


def loss(logits: Tensor, targets: Tensor, valid_vocab: int, weight: Tensor, z_loss: float, label_smoothing: float) -> Tensor:
    """The backend of chunk_loss."""
    return cross_entropy_loss(logits, targets, valid_vocab, weight, z_loss, label_smoothing)
