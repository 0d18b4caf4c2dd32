"""Rotary positions by csrc/rotary.cu: queries and keys turned where they stand, and their gradients turned back into one tensor.

Memory: nothing beside the tables is kept for the backward pass, and in place nothing is made in the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.library import Operation, check_dtypes, define, dtype_code

_PARTS = ("query", "key", "value")
_SIDES = tuple(part + side for side in ("", "_out") for part in _PARTS)
_ROTARY = Operation(
    "rotary", pointers=" ".join([*_SIDES, "cos sin positions"]),
    int64=" ".join(["s b d", *(f"{part}_heads" for part in _PARTS), *(f"{side}_{dim}" for side in _SIDES for dim in "sbh"),
                    "positions_s positions_b offset places rotary"]),
    int32="interleaved inverse dtype")


def _launch(sources: Sequence[Tensor | None], targets: Sequence[Tensor | None], cos: Tensor, sin: Tensor,
            positions: Tensor | None, offset: int, interleaved: bool, inverse: bool) -> None:
    """Query, key and value [s, b, heads, d] (or None) from sources to targets, whose last dims are contiguous."""
    first = sources[0]
    check_dtypes(first, key=sources[1], value=sources[2])
    _check_tables(first, cos, sin, positions)
    s, b, _, d = first.shape
    values = dict(s=s, b=b, d=d, places=cos.shape[0], rotary=2 * cos.shape[1], offset=offset, interleaved=interleaved,
                  inverse=inverse, dtype=dtype_code(first), cos=cos.contiguous(), sin=sin.contiguous(), positions=positions)
    steps = (0, 0) if positions is None else (*positions.stride(), 0)
    values["positions_s"], values["positions_b"] = steps[:2]
    for side, tensor in zip(_SIDES, (*sources, *targets), strict=True):
        values[side] = tensor
        strides = (0, 0, 0) if tensor is None else tensor.stride()
        values[f"{side}_s"], values[f"{side}_b"], values[f"{side}_h"] = strides[:3]
    for part, source in zip(_PARTS, sources, strict=True):
        values[f"{part}_heads"] = 0 if source is None else source.shape[2]
    _ROTARY(first.device, **values)


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.device != x.device:
            raise ValueError(f"{name} is {table.dtype} on {table.device}; it must be torch.float32 on {x.device}")
    if positions is not None and (positions.dtype != torch.int64 or positions.device != x.device):
        raise ValueError(f"positions are {positions.dtype} on {positions.device}; they must be torch.int64 on {x.device}")


def _turn(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int, groups: int, offset: int,
          interleaved: bool) -> None:
    query, key, _ = _parts(qkv, heads, groups)
    torch.autograd.graph.increment_version(qkv)  # who has kept it for a backward pass must notice
    if qkv.numel():
        _launch((query, key, None), (query, key, None), cos, sin, positions, offset, interleaved, False)


def _no_turn(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int, groups: int, offset: int,
             interleaved: bool) -> None: ...


def _empty_pack(query: Tensor, key: Tensor | None, value: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
                offset: int, interleaved: bool, inverse: bool) -> Tensor:
    s, b, _, d = query.shape
    return query.new_empty(s, b, sum(part.shape[2] for part in (query, key, value) if part is not None), d)


def _pack(query: Tensor, key: Tensor | None, value: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
          offset: int, interleaved: bool, inverse: bool) -> Tensor:
    packed = _empty_pack(query, key, value, cos, sin, positions, offset, interleaved, inverse)
    if packed.numel() == 0:
        return packed
    sources, targets, first = [], [], 0
    for part in (query, key, value):
        if part is None:
            sources.append(None)
            targets.append(None)
            continue
        sources.append(part if part.stride(-1) == 1 else part.contiguous())
        targets.append(packed.narrow(2, first, part.shape[2]))
        first += part.shape[2]
    _launch(sources, targets, cos, sin, positions, offset, interleaved, inverse)
    return packed


rotary_turn_ = define("rotary_turn_(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor? positions, int heads, int groups, int offset,"
                      " bool interleaved) -> ()", _turn, _no_turn)
rotary_pack = define("rotary_pack(Tensor query, Tensor? key, Tensor? value, Tensor cos, Tensor sin, Tensor? positions,"
                     " int offset, bool interleaved, bool inverse) -> Tensor", _pack, _empty_pack)


def _parts(qkv: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [s, b, H, d], [s, b, G, d] and [s, b, G, d] of [s, b, (H + 2G) d]."""
    every = heads + 2 * groups
    return qkv.view(*qkv.shape[:-1], every, qkv.shape[-1] // every).split([heads, groups, groups], dim=2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions, offset, interleaved):
        ctx.save_for_backward(cos, sin, positions)
        ctx.arguments = offset, interleaved
        return rotary_pack(x, None, None, cos, sin, positions, offset, interleaved, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin, positions = ctx.saved_tensors
        return rotary_pack(grad, None, None, cos, sin, positions, *ctx.arguments, True), *(None,) * 5


class _RotaryQKV(torch.autograd.Function):
    """[s, b, (H + 2G) d] -> query, key and value, views of one tensor: the input's own memory where `in_place`.

    In place, the results are views of a detached alias: to autograd they are new tensors, whatever the input is a view of.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, positions, heads, groups, offset, interleaved, in_place):
        ctx.save_for_backward(cos, sin, positions)
        ctx.arguments = offset, interleaved
        if in_place:
            packed = qkv.detach()
            rotary_turn_(packed, cos, sin, positions, heads, groups, offset, interleaved)
        else:
            packed = rotary_pack(*_parts(qkv, heads, groups), cos, sin, positions, offset, interleaved, False).flatten(2)
        return _parts(packed, heads, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key, grad_value):
        cos, sin, positions = ctx.saved_tensors
        packed = rotary_pack(grad_query, grad_key, grad_value, cos, sin, positions, *ctx.arguments, True)
        return packed.flatten(2), *(None,) * 8


def _may_be_turned_in_place(qkv: Tensor) -> bool:
    """Whether nobody else is meant to see its memory: no leaf that a user differentiates by, and no piece of something larger."""
    whole = qkv.is_contiguous() and qkv.untyped_storage().nbytes() == qkv.numel() * qkv.element_size()
    return whole and not any(t.is_leaf and t.requires_grad for t in (qkv, qkv._base) if t is not None)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offset: int, positions: Tensor | None) -> Tensor:
    """The backend of ops/rotary.py."""
    return _Rotary.apply(x, cos, sin, positions, offset, interleaved)


def rotary_qkv(qkv: Tensor, heads: int, groups: int, cos: Tensor, sin: Tensor, interleaved: bool, offset: int,
               positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The backend of ops/rotary.py. In eager mode the results take qkv's memory and leave qkv empty."""
    if torch.compiler.is_compiling() or not _may_be_turned_in_place(qkv):
        return _RotaryQKV.apply(qkv.contiguous(), cos, sin, positions, heads, groups, offset, interleaved, False)
    parts = _RotaryQKV.apply(qkv, cos, sin, positions, heads, groups, offset, interleaved, True)
    # Autograd does not know that qkv has changed: used again it would give a wrong gradient, so nothing is left to use.
    for tensor in (qkv._base, qkv):
        if tensor is not None:
            tensor.data = tensor.new_empty(0)
    return parts
