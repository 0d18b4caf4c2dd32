"""Attention of the newest few tokens of each sequence to the keys and values of all before them: the step of generation.

The cache holds key and value of every token so far, the newest included; query j of n is the token at lengths - n + j of its
sequence and sees what is not after it. Reading the cache once is the whole cost. `megalm` splits each sequence's keys among the
GPU's multiprocessors and takes lengths and block tables as they are. `torch` (SDPA) and `reference` gather pages, and clean the
rest of a cache that lengths leave unused, before they start. No backend keeps anything for a backward pass: there is none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops.attention import UNBOUNDED, dims_trait
from megalm.ops.dtypes import wide
from megalm.ops.installed import megalm_kernels
from megalm.ops.kernels import decode as kernels
from megalm.ops.registry import Features, choose, register

LEAST_PAGE = 16
"""Tokens of the smallest page: what a warp of the kernel multiplies at once lies in one."""


class Rules(NamedTuple):
    """What a call asks for besides q, k and v; see `decode`."""

    lengths: Tensor | None      # [b], int32; None: every sequence fills the cache
    table: Tensor | None        # [b, pages of a sequence], int32
    left: int
    scale: float
    softcap: float
    slopes: Tensor | None       # [H], fp32
    sinks: Tensor | None        # [H]


@torch.no_grad()
def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, table: Tensor | None = None,
           scale: float | None = None, left: int = UNBOUNDED, softcap: float = 0.0, slopes: Tensor | None = None,
           sinks: Tensor | None = None, return_lse: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """q [n, b, H, d], the cache k [s, b, G, d] and v [s, b, G, e], strided views too -> [n, b, H, e].

    lengths: int32 [b], tokens of each sequence, the n newest included, and no more than the cache has; what the cache holds
    beyond is not read. Default: all s. A query before its sequence's first token gives 0. table: int32 [b, pages of a sequence];
    the cache is paged, k [pages, page, G, d] and v [pages, page, G, e], and token t of sequence i lies in page table[i, t //
    page]; entries that no query needs may be anything. left: keys before a query's own place that it sees. scale (default d **
    -0.5), softcap, slopes, sinks and return_lse (fp32 [b, H, n]) as in ops/attention.py.
    Raises ValueError for shapes that don't fit or a backend that can't serve.
    """
    _check(q, k, v, lengths, table, softcap, slopes, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    asked = {"softcap": softcap > 0.0, "alibi": slopes is not None, "sinks": sinks is not None, "lse": return_lse}
    traits = (*(name for name, is_asked in asked.items() if is_asked), dims_trait(q.shape[3], v.shape[3]))
    run, _ = choose("decode", backend, Features(q.device.type, q.dtype, traits))
    out, lse = run(q, k, v, Rules(lengths, table, left, scale, softcap, slopes, sinks))
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, lengths, table, softcap: float, slopes, sinks) -> None:
    batch, heads = q.shape[1:3]
    if heads % k.shape[2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or table is None and k.shape[1] != batch:
        cache = "k [s, b, G, d] and v [s, b, G, e]" if table is None else "k [pages, page, G, d] and v [pages, page, G, e]"
        raise ValueError(f"decode shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: need q [n, b, H, d], "
                         f"{cache} with G dividing H")
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.shape != (batch,)):
        raise ValueError(f"decode lengths must be int32 [b] = ({batch},), not {lengths.dtype} {tuple(lengths.shape)}")
    if table is not None:
        if lengths is None:
            raise ValueError("decode of a paged cache needs the sequences' lengths")
        if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != batch:
            raise ValueError(f"decode table must be int32 [b, pages] with b = {batch}, not {table.dtype} {tuple(table.shape)}")
        if k.shape[1] < LEAST_PAGE or k.shape[1] & (k.shape[1] - 1):
            raise ValueError(f"decode pages have {k.shape[1]} tokens; they need a power of two from {LEAST_PAGE} up")
    if softcap < 0.0:
        raise ValueError(f"decode softcap must be positive, or 0 for none, not {softcap}")
    for name, values in (("slopes", slopes), ("sinks", sinks)):
        if values is not None and values.shape != (heads,):
            raise ValueError(f"decode {name} must be one number a head, [{heads}], not {tuple(values.shape)}")


def _seen(queries: int, keys: int, batch: int, rules: Rules, device) -> Tensor:
    """Which key each query sees: bool [b, n, s]."""
    lengths = torch.full((batch,), keys, device=device) if rules.lengths is None else rules.lengths.long().clamp(max=keys)
    place = lengths[:, None] - queries + torch.arange(queries, device=device)                  # [b, n]
    key = torch.arange(keys, device=device)
    seen = key <= place[..., None]
    return seen if rules.left < 0 else seen & (key >= place[..., None] - rules.left)


def _cleaned(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """k [s, b, G, d] and v [s, b, G, e] with 0 where no query sees them, whatever stood there, and what each query sees."""
    (queries, batch), page = q.shape[:2], k.shape[1]
    keys = k.shape[0] if rules.table is None else rules.table.shape[1] * page
    seen = _seen(queries, keys, batch, rules, q.device)
    used = seen.any(1)                                                                         # [b, s]
    if rules.table is not None:
        pages = torch.where(used.unflatten(1, (-1, page)).any(2), rules.table, 0).long()
        k, v = (x[pages].flatten(1, 2).transpose(0, 1) for x in (k, v))                        # [s, b, G, ..]
    unused = ~used.t()[:, :, None, None]
    return k.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0), seen


def _grouped(q: Tensor, groups: int) -> Tensor:
    """[n, b, H, d] -> [b, G, (H/G) n, d]: a group's heads one below the other, so that its keys are read once for all."""
    return q.permute(1, 2, 0, 3).reshape(q.shape[1], groups, -1, q.shape[3])


def _ungrouped(out: Tensor, queries: int) -> Tensor:
    """[b, G, (H/G) n, e] -> [n, b, H, e]."""
    return out.unflatten(2, (-1, queries)).flatten(1, 2).permute(2, 0, 1, 3)


def _reference(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    (n, b, h, _), groups = q.shape, k.shape[2]
    k, v, seen = _cleaned(q, k, v, rules)
    keys, values = (wide(x).permute(1, 2, 0, 3) for x in (k, v))                               # [b, G, s, ..]
    scores = (torch.matmul(_grouped(wide(q), groups), keys.transpose(-1, -2)) * rules.scale).view(b, h, n, -1)
    if rules.softcap > 0.0:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if rules.slopes is not None:
        lengths = torch.full((b,), k.shape[0], device=q.device) if rules.lengths is None else rules.lengths.clamp(max=k.shape[0])
        place = lengths[:, None] - n + torch.arange(n, device=q.device)                        # [b, n]
        distance = torch.arange(k.shape[0], device=q.device) - place[:, None, :, None]         # [b, 1, n, s]
        scores = scores + wide(rules.slopes)[:, None, None] * distance
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if rules.sinks is not None:  # one more key, whose value is 0
        scores = torch.cat((scores, wide(rules.sinks)[None, :, None, None].expand(b, h, n, 1)), dim=-1)
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.new_full((b, h, n), -torch.inf)
    shares = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])[..., :k.shape[0]]
    out = torch.matmul(shares.reshape(b, groups, -1, k.shape[0]), values)
    return _ungrouped(out, n).to(q.dtype), lse.to(torch.promote_types(lse.dtype, torch.float32))


def _torch(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, None]:
    n, groups, mask, dead = q.shape[0], k.shape[2], None, None
    if rules.lengths is None and (n == 1 or not k.shape[0]) and rules.left < 0:                # the cache as it stands
        query = _grouped(q, groups)
    else:
        if rules.lengths is None and rules.table is None:
            seen = _seen(n, k.shape[0], q.shape[1], rules, q.device)
        else:
            k, v, seen = _cleaned(q, k, v, rules)
        query = _grouped(q, groups)
        # A row that sees nothing is NaN in some of SDPA's backends: it is shown everything, and its output is 0.
        dead = ~seen.any(-1)                                                                   # [b, n]
        mask = (seen | dead[..., None])[:, None].repeat(1, 1, query.shape[2] // n, 1)          # [b, 1, (H/G) n, s]
    keys, values = (x.permute(1, 2, 0, 3) for x in (k, v))
    out = _ungrouped(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=rules.scale), n)
    return (out if dead is None else out.masked_fill(dead.t()[:, :, None, None], 0.0)), None


def _megalm_serves(features: Features) -> str | None:
    known = [dims_trait(*dims) for dims in kernels.HEAD_DIMS]
    if features.dtype not in (torch.bfloat16, torch.float16) or not {*known} & {*features.traits}:
        return f"its kernels take bf16 and fp16 with {', '.join(known).replace('head_dim=', '')} as head dim"
    return megalm_kernels(features)


register("decode", {"megalm": _megalm_serves}, megalm=kernels.decode, torch=_torch, reference=_reference)
