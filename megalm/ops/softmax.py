"""Softmax of scaled, masked attention scores over the keys.

    y = exp(scale x) / sum over the visible keys of exp(scale x),    0 for a key that isn't visible

Causal is aligned at the bottom right: the last query sees all keys, and query i sees keys up to i + keys - queries. A row that
sees no key is 0 and has gradient 0. What stands in x where a key isn't visible does not matter, NaN and infinity included.
Memory: the backward pass keeps the probabilities; `megalm` in the dtype of x, `torch` and `reference` in fp32, with the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.ops.dtypes import wide
from megalm.ops.installed import megalm_kernels
from megalm.ops.kernels import softmax as kernels
from megalm.ops.registry import Features, choose, register


def scaled_masked_softmax(x: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None,
                          backend: str = "auto") -> Tensor:
    """Probabilities [b, heads, q, k] of scores x [b, heads, q, k], in x's dtype; computed in fp32 for half-precision x.

    mask: bool or uint8, nonzero where a key is visible, of x's shape or 1 in any dim (padding: [b, 1, 1, k]); where causal too, a
    key must be visible to both. Raises ValueError for another shape or dtype, a scale that isn't positive, or a backend that
    can't serve.
    """
    if x.dim() != 4 or not scale > 0.0:
        raise ValueError(f"softmax of x {tuple(x.shape)} times {scale}: need [b, heads, q, k] and a positive scale")
    if mask is not None:
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, x.shape, strict=True))
        if not fits or mask.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"softmax of x {tuple(x.shape)}: the mask is {mask.dtype} {tuple(mask.shape)}; need bool or uint8 "
                             "[b or 1, heads or 1, q or 1, k or 1]")
    run, _ = choose("softmax", backend, Features(x.device.type, x.dtype))
    return run(x, scale, causal, mask)


def causally_visible(queries: int, keys: int, device) -> Tensor:
    """Which key each query may see, causally: bool [q, k], aligned at the bottom right."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def _hidden(x: Tensor, causal: bool, mask: Tensor | None) -> Tensor | None:
    """Where a key isn't visible: bool, broadcasts to x; None where all are."""
    hidden = None if mask is None else ~mask.bool()
    if not causal:
        return hidden
    future = ~causally_visible(x.shape[2], x.shape[3], x.device)
    return future if hidden is None else hidden | future


def _reference(x: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    scores, hidden = wide(x) * scale, _hidden(x, causal, mask)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    # By hand and not by softmax, so that a row that sees no key is 0 with gradient 0, not NaN.
    maximum = scores.detach().amax(dim=-1, keepdim=True)
    exponentials = torch.exp(scores - torch.where(maximum == -torch.inf, 0.0, maximum))
    total = exponentials.sum(dim=-1, keepdim=True)
    return (exponentials / torch.where(total == 0, 1.0, total)).to(x.dtype)


def _torch(x: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    scores, hidden = wide(x) * scale, _hidden(x, causal, mask)
    if hidden is None:
        return torch.softmax(scores, dim=-1).to(x.dtype)
    # The least number and not -inf, so that a row that sees no key has numbers to be cleared.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0).to(x.dtype)


register("softmax", {"megalm": megalm_kernels}, megalm=kernels.softmax, torch=_torch, reference=_reference)
