"""Scaled dot-product attention (Vaswani et al., 2017) over the heads of one rank, grouped queries included.

Head h of H reads key and value group h // (H / G). A query sees an interval of keys: causal, a sliding window and the bounds of
its document, whichever is narrowest. Causal means that the last query sees all keys: with fewer queries than keys (generation)
the mask is aligned at the bottom right, and a query that sees no key (more queries than keys) gives 0.
Memory: `megalm`, `flash_attn` and `torch` (SDPA) keep q, k, v, the output and one number a row. `reference`, and `megalm` where
its attention kernels don't serve (fp32, other head dims), also keep the probabilities [b, H, s, s_k], twice under dropout.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from megalm.ops import fp8 as fp8_rounding
from megalm.ops.dropout import dropout as keyed_dropout
from megalm.ops.dtypes import wide
from megalm.ops.installed import megalm_kernels, package
from megalm.ops.kernels import attention as kernels
from megalm.ops.random import DropoutKey, seed_of
from megalm.ops.registry import REGISTRY, Features, choose, register
from megalm.ops.sdpa import sdpa
from megalm.ops.softmax import scaled_masked_softmax

UNBOUNDED = -1


class Documents(NamedTuple):
    """Which keys each query may see for the sake of its document: those in [first[b, i], last[b, i])."""

    first: Tensor | None        # [b, s], int32; never decreases with i
    last: Tensor | None         # the same; None: up to the end, which is right where causal bounds it
    # Tokens of each sequence's documents, queries and keys alike, where the host knows them; they say what first and last say.
    lengths: tuple[tuple[int, ...], ...] | None = None


class Rules(NamedTuple):
    """What a call asks for besides q, k and v. With offset = s_k - s, query i sees keys from i + offset - left to
    i + offset + right (UNBOUNDED: no bound) that are in [first[b, i], last[b, i])."""

    left: int
    right: int
    first: Tensor | None        # as in Documents
    last: Tensor | None
    lengths: tuple[tuple[int, ...], ...] | None
    scale: float
    softcap: float              # softcap tanh(score / softcap), 0: none (Gemma 2, 2024)
    slopes: Tensor | None       # [H], fp32: slopes[h] (j - i - offset) is added (ALiBi, Press et al., 2022)
    sinks: Tensor | None        # [H]: the score of one more key, whose value is 0
    dropout: float
    key: DropoutKey | None
    samples: Tensor | None
    heads: tuple[int, int, int]
    softmax: str                # the backend of the softmax of scores, where megalm's attention is made of one
    deterministic: bool = False  # the gradients have the same bits every time
    fp8: bool = False           # products of the forward pass in e4m3

    def traits(self, dtype: torch.dtype, dims: str, lse: bool) -> tuple[str, ...]:
        """What a backend may not be able to do, or had better not, as the registry's table has it."""
        documents = self.first is not None or self.last is not None
        asked = {"softcap": self.softcap > 0.0, "alibi": self.slopes is not None, "sinks": self.sinks is not None, "lse": lse,
                 "fp8": self.fp8, "alibi_ahead": self.slopes is not None and self.right != 0,
                 "documents": documents, "bounds": documents and not self.packed,
                 "masked": not self.causal_only and self.dropout == 0.0 and _fused(dtype, dims)}
        return (*(name for name, is_asked in asked.items() if is_asked), *plain_traits(dtype, dims, self.dropout > 0.0))

    @property
    def causal_only(self) -> bool:
        """Nothing but perhaps causal narrows what is seen."""
        return self.left < 0 and self.right <= 0 and self.first is None and self.last is None

    @property
    def packed(self) -> bool:
        """The documents are causal ones whose lengths the host knows: each may be a sequence of its own."""
        return self.lengths is not None and self.right == 0


def dims_trait(head_dim: int, value_dim: int) -> str:
    """The trait that says which head dims a call has."""
    return f"head_dim={head_dim}" if head_dim == value_dim else f"head_dim={head_dim}/{value_dim}"


def plain_traits(dtype: torch.dtype, dims: str, dropout: bool) -> tuple[str, ...]:
    """The traits of a call that asks for nothing special. "scores": megalm has no kernel for it, and would keep scores."""
    special = ("dropout",) if dropout else () if _fused(dtype, dims) else ("scores",)
    return (*special, dims)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None,
              window: tuple[int, int] | None = None, documents: Documents | tuple[Tensor, Tensor] | None = None,
              softcap: float = 0.0, slopes: Tensor | None = None, sinks: Tensor | None = None, dropout: float = 0.0,
              key: DropoutKey | None = None, samples: Tensor | None = None, heads: tuple[int, int, int] | None = None,
              return_lse: bool = False, backend: str = "auto", softmax: str = "auto",
              deterministic: bool = False, fp8: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v: q [s, b, H, d], k [s_k, b, G, d], v [s_k, b, G, e], strided views too -> [s, b, H, e].

    scale: default d ** -0.5. window: (keys before, keys after) the query's own place that it sees, UNBOUNDED for no bound; causal
    narrows `after` to 0. documents: bounds of the keys that each query may see (`packed_documents`, `document_bounds`),
    which never decrease along a sequence: refused on the CPU; on a GPU, where nobody looks, results then mean nothing or the
    kernel stops with an error. softcap, slopes, sinks: see Rules. dropout: share of probabilities dropped, by the mask of (key,
    samples); `heads` = (start, stop, full) are this rank's among all (default: it has all); `megalm` and `reference` draw the
    same mask under every layout, `torch` and `flash_attn` their own. return_lse: also the natural logarithm of each row's sum of
    exponentials, fp32 [b, H, s], -inf where a query sees nothing: what parts of an attention are merged by. softmax: the backend
    of the softmax of scores, where `megalm` has no kernel of the whole. deterministic: the same bits every time; `megalm` then
    sums the gradient of the queries in a fixed order on Hopper too, and the others take their own such paths (ops/sdpa.py). fp8:
    the forward pass multiplies q, k, v and probabilities rounded to e4m3 (ops/fp8.py says how), the backward pass the unrounded
    ones, with the forward pass's sums; `megalm` on a Hopper GPU, and `reference`, which emulates it where it is named.
    Raises ValueError for shapes that don't fit, dropout without key and samples, or a backend that can't serve.
    """
    rules = _rules(q, k, v, causal, scale, window, documents, softcap, slopes, sinks, dropout, key, samples, heads, softmax,
                   deterministic, fp8)
    traits = rules.traits(q.dtype, dims_trait(q.shape[3], v.shape[3]), return_lse)
    run, _ = choose("attention", backend, Features(q.device.type, q.dtype, traits))
    out, lse = run(q, k, v, rules)
    return (out, lse) if return_lse else out


def _rules(q, k, v, causal, scale, window, documents, softcap, slopes, sinks, dropout, key, samples, heads, softmax,
           deterministic, fp8) -> Rules:
    if q.shape[2] % k.shape[2] or k.shape[:3] != v.shape[:3] or q.shape[1::2] != k.shape[1::2]:
        raise ValueError(f"attention shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: need q [s, b, H, d], "
                         "k [s_k, b, G, d] and v [s_k, b, G, e] with G dividing H")
    if dropout > 0.0 and (key is None or samples is None):
        raise ValueError(f"attention dropout {dropout} needs a key and the sample indices")
    if fp8 and dropout > 0.0:
        raise ValueError(f"attention in fp8 has no dropout, and {dropout} is asked for")
    if softcap < 0.0:
        raise ValueError(f"attention softcap must be positive, or 0 for none, not {softcap}")
    first, last, lengths = Documents(*(documents or (None, None)))
    if lengths is not None and not (len(lengths) == q.shape[1] and {*map(sum, lengths)} == {q.shape[0], k.shape[0]}):
        raise ValueError(f"attention documents of lengths {lengths} don't fill {q.shape[1]} sequences of {q.shape[0]} queries "
                         f"and {k.shape[0]} keys")
    for name, bound in (("first", first), ("last", last)):
        if bound is not None and (bound.shape != (q.shape[1], q.shape[0]) or bound.dtype != torch.int32):
            raise ValueError(f"attention documents: {name} must be int32 [b, s] = {(q.shape[1], q.shape[0])}, not {bound.dtype} "
                             f"{tuple(bound.shape)}")
        # Where the look costs no wait for a GPU; there, kernels that wait for their turn in vain stop with an error.
        if bound is not None and bound.device.type == "cpu" and not torch.compiler.is_compiling() and (bound.diff() < 0).any():
            raise ValueError(f"attention documents: {name} decreases along a sequence; what a query sees may only move on")
    for name, values in (("slopes", slopes), ("sinks", sinks)):
        if name == "slopes" and values is not None and values.requires_grad:
            raise ValueError("attention slopes have no gradient; they are constants")
        if values is not None and values.shape != (q.shape[2],):
            raise ValueError(f"attention {name} must be one number a head, [{q.shape[2]}], not {tuple(values.shape)}")
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else window
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if dropout == 0.0:
        key = samples = None
    heads = (0, q.shape[2], q.shape[2]) if heads is None else heads
    return Rules(left, 0 if causal else right, first, last, lengths, scale, softcap, slopes, sinks, dropout, key, samples, heads,
                 softmax, deterministic, fp8)


def packed_documents(starts: Tensor, device: torch.device) -> Documents:
    """The documents of b packed samples, for causal attention, on `device`: starts int32 [b, s], on the host, says for each token
    where in its sample its document begins."""
    places = torch.arange(starts.shape[1] + 1, dtype=starts.dtype)
    begins = torch.cat((starts, places[-1:].expand(len(starts), 1)), dim=1) == places                   # [b, s + 1]
    lengths = tuple(tuple(row.nonzero().flatten().diff().tolist()) for row in begins)
    return Documents(starts.to(device, non_blocking=True), None, lengths)


def document_bounds(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, causal: bool = False) -> tuple[Tensor, Tensor]:
    """(first, last) int32 [1, s] for documents packed one after the other, from their cumulative lengths [documents + 1].

    With other lengths of the keys, causal aligns each document's last query with its last key; call attention with causal=False
    then. With the same lengths attention's own causal does that.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    lengths = cu_seqlens_q.diff()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)      # [s]
    first, last = cu_seqlens_k[:-1][document], cu_seqlens_k[1:][document]
    if causal:
        behind = cu_seqlens_q[1:][document] - torch.arange(len(document), device=lengths.device) - 1    # queries after this one
        last = torch.maximum(last - behind, first)
    return first.int()[None], last.int()[None]


def visible(queries: int, keys: int, rules: Rules, device) -> Tensor:
    """Which key each query may see: bool [s, s_k], or [b, 1, s, s_k] where there are documents."""
    key = torch.arange(keys, device=device)
    place = torch.arange(queries, device=device)[:, None] + keys - queries        # the key that a query stands at
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if rules.left >= 0:
        seen = seen & (key >= place - rules.left)
    if rules.right >= 0:
        seen = seen & (key <= place + rules.right)
    for bound, inside in ((rules.first, torch.ge), (rules.last, torch.lt)):
        if bound is not None:
            seen = seen & inside(key, bound[:, None, :, None])
    return seen


def _scores(q: Tensor, k: Tensor, rules: Rules) -> Tensor:
    """[b, H, s, s_k], in fp32 or wider; -inf where a query doesn't see the key."""
    (s, b, h, d), (s_k, _, g, _) = q.shape, k.shape
    query = wide(q).permute(1, 2, 0, 3).reshape(b, g, h // g, s, d)            # [b, G, H/G, s, d]
    keys = wide(k).permute(1, 2, 3, 0).unsqueeze(2)                            # [b, G, 1, d, s_k]
    scores = (torch.matmul(query, keys) * rules.scale).view(b, h, s, s_k)
    if rules.softcap > 0.0:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if rules.slopes is not None:
        distance = torch.arange(s_k, device=q.device) - torch.arange(s, device=q.device)[:, None] - (s_k - s)
        scores = scores + wide(rules.slopes)[:, None, None] * distance
    if rules.left >= 0 or rules.right >= 0 or rules.first is not None or rules.last is not None:
        scores = scores.masked_fill(~visible(s, s_k, rules, q.device), -torch.inf)
    return scores


def _context(probabilities: Tensor, v: Tensor) -> Tensor:
    """[b, H, s, s_k] and [s_k, b, G, e] -> [b, H, s, e]."""
    (b, h, s, s_k), g = probabilities.shape, v.shape[2]
    values = wide(v).permute(1, 2, 0, 3).unsqueeze(2)                          # [b, G, 1, s_k, e]
    return torch.matmul(probabilities.view(b, g, h // g, s, s_k), values).flatten(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    (s, b, h, _), s_k = q.shape, k.shape[0]
    if rules.fp8 and q.numel() and k.numel():
        context, lse = fp8_rounding.emulated(q, k, v, rules.sinks, partial(_scores, rules=rules), _context)
        return context.permute(2, 0, 1, 3).to(q.dtype), lse.to(torch.promote_types(lse.dtype, torch.float32))
    scores = _scores(q, k, rules)
    # By hand and not by softmax, so that a row that sees no key is 0 with gradient 0, not NaN.
    maximum = scores.detach().amax(dim=-1, keepdim=True) if s_k else scores.new_full((b, h, s, 1), -torch.inf)
    sinks = None if rules.sinks is None else wide(rules.sinks)[None, :, None, None]
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks.detach())
    maximum = torch.where(maximum == -torch.inf, 0.0, maximum)
    exponentials = torch.exp(scores - maximum)
    total = exponentials.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - maximum)
    lse = (torch.log(total) + maximum).squeeze(-1)                             # [b, H, s]
    probabilities = exponentials / torch.where(total == 0, 1.0, total)
    if rules.dropout > 0.0:
        extents = [rules.heads, (0, s, s), (0, s_k, s_k)]
        probabilities = keyed_dropout(probabilities, rules.key, rules.samples, extents, rules.dropout, batch_dim=0)
    context = _context(probabilities, v)                                       # [b, H, s, e]
    return context.permute(2, 0, 1, 3).to(q.dtype), lse.to(torch.promote_types(lse.dtype, torch.float32))


def _torch(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, None]:
    s, s_k = q.shape[0], k.shape[0]
    causal = rules.right == 0
    if rules.packed and rules.left < 0:
        return _by_document(q, k, v, rules), None
    if rules.causal_only and causal and s > s_k:   # the first queries see nothing
        seen, _ = _torch(q[s - s_k:], k, v, rules)
        return torch.cat((seen.new_zeros(s - s_k, *seen.shape[1:]), seen)), None
    mask, dead = None, None
    if not rules.causal_only or causal and 1 < s < s_k:
        # SDPA's own causal mask is aligned at the top left, which is right for s = s_k only; a single query sees all keys.
        mask = visible(s, s_k, rules, q.device)
        # A row that sees nothing is NaN in some of SDPA's backends: it is shown everything, and its output is 0.
        dead = ~mask.any(-1, keepdim=True)
        mask = mask | dead
    query, keys, values = (x.permute(1, 2, 0, 3) for x in (q, k, v))           # views [b, heads, s, d]
    with _seeded(rules, q.device):
        context = sdpa(query, keys, values, mask=mask, causal=mask is None and causal and s > 1, scale=rules.scale,
                       dropout=rules.dropout, deterministic=rules.deterministic)
    if dead is not None and not rules.causal_only:
        context = context.masked_fill(dead, 0.0)
    return context.permute(2, 0, 1, 3), None                                   # [b, H, s, e] -> [s, b, H, e]


def _by_document(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    """Each document by a causal call of its own: without a mask of s x s, and without the work that it would throw away.

    Split, not sliced: the gradients of the parts are then put together once instead of added up.
    """
    contexts = []
    with _seeded(rules, q.device):
        for *sequence, lengths in zip(q.unbind(1), k.unbind(1), v.unbind(1), rules.lengths, strict=True):
            for parts in zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in sequence), strict=True):
                context = sdpa(*parts, mask=None, causal=parts[0].shape[2] > 1, scale=rules.scale, dropout=rules.dropout,
                               deterministic=rules.deterministic)                                         # [1, H, length, e]
                contexts.append(context[0].transpose(0, 1))
    return torch.cat(contexts).unflatten(0, (q.shape[1], q.shape[0])).transpose(0, 1)                     # [b s, H, e] ->


@contextmanager
def _seeded(rules: Rules, device: torch.device) -> Iterator[None]:
    """Torch's own generator as a function of the call, where it is needed."""
    if rules.dropout == 0.0:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_call_seed(rules))
        yield


def _call_seed(rules: Rules) -> int:
    """A seed of a call: of its key, samples and heads, so that micro-batches and ranks draw different masks. Samples on a GPU are
    waited for, which only a backend without a keyed mask costs: `auto` takes megalm's for dropout."""
    text = f"{seed_of(rules.key)} {rules.samples.tolist()} {rules.heads}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, None]:
    """Of flash_attn 2.6 and newer: groups of heads, causal at the bottom right, the same window, -slopes |i - j| for ALiBi."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    query, keys, values = (x.transpose(0, 1) for x in (q, k, v))               # views [b, s, heads, d]
    options = dict(dropout_p=rules.dropout, softmax_scale=rules.scale, causal=rules.right == 0,
                   window_size=(rules.left, rules.right), softcap=rules.softcap, alibi_slopes=rules.slopes,
                   deterministic=rules.deterministic)
    with _seeded(rules, q.device):
        if not rules.packed:
            return flash_attn_func(query, keys, values, **options).transpose(0, 1), None
        ends, longest = _ends(rules.lengths, q.device), max(map(max, rules.lengths))
        context = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (query, keys, values)), cu_seqlens_q=ends, cu_seqlens_k=ends,
                                         max_seqlen_q=longest, max_seqlen_k=longest, **options)          # [b s, H, e]
    return context.unflatten(0, query.shape[:2]).transpose(0, 1), None


@lru_cache(maxsize=4)
def _ends(lengths: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Cumulative lengths of all sequences' documents, int32 [documents + 1]: copied once for all layers of a micro-batch."""
    return torch.tensor([0, *itertools.accumulate(itertools.chain(*lengths))], dtype=torch.int32).to(device)


# What of a call the product of softmax kernel and matrix products can't serve.
_KERNEL_ONLY = ("softcap", "alibi", "sinks", "lse")
# Of the kernels, those that need more shared memory than the 99 KB that every GPU since sm_80 gives a block.
_SHARED_BYTES = {"head_dim=192/128": 128 << 10, "head_dim=256": 160 << 10}


def _fused(dtype: torch.dtype, dims: str) -> bool:
    """Whether csrc has an attention kernel of this dtype and head dims."""
    return dtype in (torch.bfloat16, torch.float16) and dims in REGISTRY.table["backends"]["attention"]["megalm"]["kernels"]


def _megalm_serves(features: Features) -> str | None:
    reason = megalm_kernels(features)
    dims = next((trait for trait in features.traits if trait.startswith("head_dim=")), "")
    asked = [trait for trait in features.traits if trait in _KERNEL_ONLY]
    if reason is None and asked and not _fused(features.dtype, dims):
        known = ", ".join(REGISTRY.table["backends"]["attention"]["megalm"]["kernels"])
        reason = f"{asked[0]} needs an attention kernel: they take bf16 and fp16 with {known}"
    if reason is None and "fp8" in features.traits:
        reason = fp8_rounding.lacks(features, [dims_trait(*pair) for pair in kernels.FP8_DIMS])
    if reason is None and features.device == "cuda" and dims in _SHARED_BYTES and _fused(features.dtype, dims):
        given = torch.cuda.get_device_properties().shared_memory_per_block_optin
        if given < _SHARED_BYTES[dims]:
            reason = f"the kernel of {dims} needs {_SHARED_BYTES[dims] >> 10} KB of shared memory; this GPU has {given >> 10}"
    return reason


def _megalm(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor | None]:
    if _fused(q.dtype, dims_trait(q.shape[3], v.shape[3])):
        return kernels.attention(q, k, v, rules)
    return _with_scores(q, k, v, rules), None


def _with_scores(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    """By scores and probabilities that stand in memory, in the dtype of q, k and v; the softmax computes in fp32."""
    (s, b, h, d), (s_k, _, g, e) = q.shape, v.shape
    # The power of two in the scale goes into the keys, where it is exact: fp16 holds no product of long vectors unscaled.
    rest, exponent = math.frexp(rules.scale)
    # A group's heads stand one below the other, so that its keys and values are not repeated for each.
    query = q.permute(1, 2, 0, 3).reshape(b, g, h // g * s, d)                 # [b, G, (H/G) s, d]
    keys = (k * 2.0**exponent).permute(1, 2, 3, 0)                             # [b, G, d, s_k]
    values = v.permute(1, 2, 0, 3)                                             # [b, G, s_k, e]
    scores = torch.matmul(query, keys).view(b, h, s, s_k)
    mask = None if rules.causal_only else visible(s, s_k, rules, q.device).expand(b, 1, s, s_k)
    probabilities = scaled_masked_softmax(scores, rest, causal=rules.right == 0, mask=mask, backend=rules.softmax)
    if rules.dropout > 0.0:
        extents = [rules.heads, (0, s, s), (0, s_k, s_k)]
        probabilities = keyed_dropout(probabilities, rules.key, rules.samples, extents, rules.dropout, batch_dim=0)
    context = torch.matmul(probabilities.view(b, g, h // g * s, s_k), values)  # [b, G, (H/G) s, e]
    return context.view(b, h, s, e).permute(2, 0, 1, 3)                        # -> [s, b, H, e]


register("attention", {"megalm": _megalm_serves, "flash_attn": package("flash_attn", "flash_attn")},
         megalm=_megalm, torch=_torch, flash_attn=_flash_attn, reference=_reference)
