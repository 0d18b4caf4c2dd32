"""Scaled dot-product attention (Vaswani et al., 2017) over the heads of one rank, grouped queries included.

Head h of H reads key and value group h // (H / G). Causal means that the last query sees all keys: with fewer queries than keys
(generation) the mask is aligned at the bottom right, and a query that sees no key (more queries than keys) gives 0.
Memory: `torch` (SDPA) keeps q, k, v, the output and one number a row; `megalm` and `reference` also keep the probabilities
[b, H, s, s_k], twice under dropout, in the input's dtype and in fp32.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops.dropout import dropout as keyed_dropout
from megalm.ops.dtypes import wide
from megalm.ops.installed import megalm_kernels
from megalm.ops.random import DropoutKey, seed_of
from megalm.ops.registry import Features, choose, register
from megalm.ops.softmax import scaled_masked_softmax, visible


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, dropout: float = 0.0,
              key: DropoutKey | None = None, samples: Tensor | None = None, heads: tuple[int, int, int] | None = None,
              backend: str = "auto", softmax: str = "auto") -> Tensor:
    """softmax(q k^T scale) v: q [s, b, H, d], k and v [s_k, b, G, d], strided views included -> [s, b, H, d].

    scale: default d ** -0.5. dropout: share of the probabilities dropped, by the mask of (key, samples) where `heads` =
    (start, stop, full) are this rank's heads among all (default: it has all). `megalm` and `reference` draw the same mask under
    every layout; `torch` seeds its own generator from the same key, which is reproducible but depends on the layout.
    softmax: the backend of the softmax inside `megalm`.
    Raises ValueError for shapes that don't fit, dropout without key and samples, or a backend that can't serve.
    """
    if q.shape[2] % k.shape[2] or k.shape != v.shape or q.shape[1::2] != k.shape[1::2]:
        raise ValueError(f"attention shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: need q [s, b, H, d] and "
                         "k, v [s_k, b, G, d] with G dividing H")
    traits = ()
    if dropout > 0.0:
        if key is None or samples is None:
            raise ValueError(f"attention dropout {dropout} needs a key and the sample indices")
        heads = (0, q.shape[2], q.shape[2]) if heads is None else heads
        traits = ("dropout",)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run, _ = choose("attention", backend, Features(q.device.type, q.dtype, traits))
    return run(q, k, v, causal, scale, dropout, key, samples, heads, softmax)


def _with_scores(q, k, v, causal: bool, scale: float, dropout: float, key, samples, heads, softmax: str) -> Tensor:
    """By scores and probabilities that stand in memory, in the dtype of q, k and v; the softmax computes in fp32."""
    (s, b, h, d), (s_k, _, g, _) = q.shape, k.shape
    # The power of two in the scale goes into the keys, where it is exact: fp16 holds no product of long vectors unscaled.
    rest, exponent = math.frexp(scale)
    # A group's heads stand one below the other, so that its keys and values are not repeated for each.
    query = q.permute(1, 2, 0, 3).reshape(b, g, h // g * s, d)                 # [b, G, (H/G) s, d]
    keys = (k * 2.0**exponent).permute(1, 2, 3, 0)                             # [b, G, d, s_k]
    values = v.permute(1, 2, 0, 3)                                             # [b, G, s_k, d]
    scores = torch.matmul(query, keys).view(b, h, s, s_k)
    probabilities = scaled_masked_softmax(scores, rest, causal=causal, backend=softmax)
    if dropout > 0.0:
        extents = [heads, (0, s, s), (0, s_k, s_k)]
        probabilities = keyed_dropout(probabilities, key, samples, extents, dropout, batch_dim=0)
    context = torch.matmul(probabilities.view(b, g, h // g * s, s_k), values)  # [b, G, (H/G) s, d]
    return context.view(b, h, s, d).permute(2, 0, 1, 3)                        # -> [s, b, H, d]


def _reference(q, k, v, causal: bool, scale: float, dropout: float, key, samples, heads, softmax: str) -> Tensor:
    return _with_scores(wide(q), wide(k), wide(v), causal, scale, dropout, key, samples, heads, "reference").to(q.dtype)


def _torch(q, k, v, causal: bool, scale: float, dropout: float, key, samples, heads, softmax: str) -> Tensor:
    s, s_k = q.shape[0], k.shape[0]
    if causal and s > s_k:   # the first queries see nothing
        seen = _torch(q[s - s_k:], k, v, causal, scale, dropout, key, samples, heads, softmax)
        return torch.cat((torch.zeros_like(q[:s - s_k]), seen))
    # SDPA's own causal mask is aligned at the top left, which is right for s = s_k only; a single query sees all keys.
    mask = visible(s, s_k, q.device) if causal and 1 < s < s_k else None
    query, keys, values = (x.permute(1, 2, 0, 3) for x in (q, k, v))           # views [b, heads, s, d]
    options = dict(attn_mask=mask, is_causal=causal and 1 < s == s_k, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    if dropout == 0.0:
        context = F.scaled_dot_product_attention(query, keys, values, **options)
    else:
        devices = [q.device] if q.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_call_seed(key, samples, heads))
            context = F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout, **options)
    return context.permute(2, 0, 1, 3)                                         # [b, H, s, d] -> [s, b, H, d]


def _call_seed(key: DropoutKey, samples: Tensor, heads: tuple[int, int, int]) -> int:
    """A seed of a call: of its key, samples and heads, so that micro-batches and ranks draw different masks."""
    text = f"{seed_of(key)} {samples.tolist()} {heads}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


register("attention", {"megalm": megalm_kernels}, torch=_torch, megalm=_with_scores, reference=_reference)
