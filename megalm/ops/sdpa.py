"""torch's scaled_dot_product_attention (SDPA) by a kernel of it that keeps no scores, its gradients in a fixed order on request.

On CUDA it has three such kernels, and products of matrices that keep scores of s x s for what none of the three takes. What they
take stands in torch's aten/native/transformers (sdp_utils.cpp, attention_backward.cu):
flash: bf16 and fp16, groups of heads, no mask, queries, keys and values of one head dim. Memory-efficient: fp32 and masks too,
but groups not in every torch: keys and values are repeated for it, and their gradients added up over each group. cuDNN's, which
comes first on some GPUs: what flash takes, and masks. The gradients of all three are summed in the order in which blocks come.
Under torch.use_deterministic_algorithms the first two have a fixed order, and cuDNN's is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def kernel(device: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool, dropout: bool) -> str:
    """Which kernel serves on every GPU since sm_80: flash, efficient or math. On other devices torch has but one way: "own"."""
    if device != "cuda":
        return "own"
    half = dtype in (torch.bfloat16, torch.float16)
    # Beyond head dim 192 some GPUs' shared memory doesn't hold flash's backward pass, but for 256 without dropout.
    if half and not masked and head_dim == value_dim and (head_dim <= 192 or head_dim == 256 and not dropout):
        return "flash"
    rows = 8 if half else 4 if dtype == torch.float32 else None  # elements of 16 bytes, which it loads at a time
    return "efficient" if rows is not None and head_dim % rows == 0 == value_dim % rows else "math"


def has_orders(device: str) -> bool:
    """Whether gradients there depend on the order of blocks, unless a fixed one is asked for."""
    return device == "cuda"


def sdpa(query: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, causal: bool, scale: float, dropout: float,
         deterministic: bool) -> Tensor:
    """query [b, H, s, d], keys [b, G, s_k, d], values [b, G, s_k, e] -> [b, H, s, e]; causal aligns at the top left.

    deterministic: the gradients have the same bits every time. Compiled code can't ask for it (model/attention.py leaves the call
    out of it).
    """
    device, groups = query.device.type, query.shape[1] != keys.shape[1]
    chosen = kernel(device, query.dtype, query.shape[3], values.shape[3], mask is not None, dropout > 0.0)
    if groups and chosen == "efficient":
        keys, values, groups = *(repeated(x, query.shape[1]) for x in (keys, values)), False
    options = dict(attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=groups)
    # Products of matrices have one order, and refuse to run under the switch where cuBLAS was given no workspace of its own.
    if deterministic and has_orders(device) and chosen != "math" and not torch.compiler.is_compiling():
        return _in_order(query, keys, values, options)
    return F.scaled_dot_product_attention(query, keys, values, **options)


def repeated(x: Tensor, heads: int) -> Tensor:
    """[b, G, s, d] -> [b, H, s, d], each group's for all of its heads: a copy, of one group a view."""
    b, groups, s, d = x.shape
    return x.unsqueeze(2).expand(b, groups, heads // groups, s, d).reshape(b, heads, s, d)


def leaves_compiled_code(device: str, backend: str, deterministic: bool) -> bool:
    """Whether this backend of attention must not be compiled along with what surrounds it."""
    return backend == "torch" and deterministic and has_orders(device)


def _in_order(query: Tensor, keys: Tensor, values: Tensor, options: dict) -> Tensor:
    scopes: list = []
    query, keys, values = _Last.apply(scopes, query, keys, values)
    with _fixed_order(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        context = F.scaled_dot_product_attention(query, keys, values, **options)
    return _First.apply(scopes, context)


@contextmanager
def _fixed_order() -> Iterator[None]:
    """Torch's switch for the whole process, but for as long as one operation runs; memory is not filled before its use, which
    the switch would bring with it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# The backward pass runs later, and its nodes one after the other: the one before those of the operation opens the scope, and the
# one that waits for all of their gradients closes it. Between their turns autograd has no other node to run, since it takes the
# youngest that is ready.


class _First(torch.autograd.Function):
    """Of the backward pass."""

    @staticmethod
    def forward(ctx, scopes, context):
        ctx.scopes = scopes
        return context.view_as(context)

    @staticmethod
    def backward(ctx, grad):
        scope = _fixed_order()
        scope.__enter__()
        ctx.scopes.append(scope)
        return None, grad


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scopes, *inputs):
        ctx.scopes = scopes
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx, *grads):
        ctx.scopes.pop().__exit__(None, None, None)
        return None, *grads
