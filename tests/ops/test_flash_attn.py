"""The flash_attn backend, by a package of that name that checks what it is given and computes it by the reference.

Its functions are those of flash_attn 2.6 and newer: dense [b, s, heads, d], and packed [tokens, heads, d] by cumulative
lengths."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from megalm.ops.attention import attention, packed_documents
from megalm.ops.random import ATTENTION_SCORES, DropoutKey
from megalm.ops.registry import REGISTRY, Features, choose_name
from megalm.tools.kernel_cases.accuracy import randn

STARTS = torch.tensor([[*[0] * 5, 5, *[6] * 7, *[13] * 4], [0] * 17], dtype=torch.int32)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture
def calls(monkeypatch):
    """The options of the calls, in order; the package is there for a CPU too."""
    made = []

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
              deterministic=False):
        assert q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % k.shape[2] == 0 and q.stride(-1) == 1
        assert alibi_slopes is None or alibi_slopes.dtype == torch.float32 and causal
        made.append(dict(packed=False, dropout=dropout_p, window=window_size, deterministic=deterministic,
                         drawn=torch.rand(1).item()))
        out = attention(*(x.transpose(0, 1) for x in (q, k, v)), causal=causal, scale=softmax_scale, window=window_size,
                        softcap=softcap, slopes=alibi_slopes, backend="reference")
        return out.transpose(0, 1)

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        lengths = cu_seqlens_q.diff().tolist()
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[0] == 0
        assert q.dim() == k.dim() == v.dim() == 3 and sum(lengths) == len(q) == len(k)
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        outs = [dense(*(part[None] for part in parts), **options)[0]
                for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)]
        made[:] = [{**made[0], "packed": lengths}]
        return torch.cat(outs)

    monkeypatch.setitem(sys.modules, "flash_attn",
                        SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed))
    backend = REGISTRY.backends["attention"]["flash_attn"]
    monkeypatch.setitem(REGISTRY.backends["attention"], "flash_attn", type(backend)(
        "flash_attn", backend.run, cannot=backend.cannot, avoid=backend.avoid))
    monkeypatch.setattr(REGISTRY, "chosen", {})
    return made


def inputs(dtype=torch.bfloat16, groups=2, batch=2):
    return [randn(17, batch, 4, 8).to(dtype).requires_grad_(),
            *(randn(17, batch, groups, 8, seed=i).to(dtype).requires_grad_() for i in (1, 2))]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("options", [{}, {"window": (4, 0)}, {"softcap": 2.0}, {"slopes": SLOPES}, {"scale": 0.3},
                                     {"deterministic": True}], ids=str)
def test_a_call_is_passed_on(options, groups, documents, calls):
    tensors = inputs(groups=groups)
    asked = {**options, "documents": packed_documents(STARTS, torch.device("cpu"))} if documents else options
    got, expected = (attention(*tensors, backend=name, **asked) for name in ("flash_attn", "reference"))
    torch.testing.assert_close(got, expected)
    grad = randn(*got.shape, seed=3).to(got.dtype)
    torch.testing.assert_close(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(expected, tensors, grad))
    [call] = calls
    assert call["packed"] == ([5, 1, 7, 4, 17] if documents else False)
    assert call["window"] == (*options.get("window", (-1,))[:1], 0)
    assert call["deterministic"] == options.get("deterministic", False)


def test_full_attention_and_fewer_queries(calls):
    q, k, v = inputs()
    for options in ({"causal": False}, {"causal": False, "window": (3, 2)}, {}):
        got, expected = (attention(q[12:], k, v, backend=name, **options) for name in ("flash_attn", "reference"))
        torch.testing.assert_close(got, expected)


def test_its_dropout_draws_by_the_key_of_the_call(calls):
    """From torch's generator, which stays as it was."""
    key, state = DropoutKey(1, 2, 3, ATTENTION_SCORES), torch.get_rng_state()
    for one in (key, key, key._replace(layer=4)):
        attention(*inputs(), dropout=0.3, key=one, samples=torch.arange(2), backend="flash_attn")
    drawn = [call["drawn"] for call in calls]
    assert drawn[0] == drawn[1] != drawn[2] and calls[0]["dropout"] == 0.3 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options, reason", [
    (dict(documents=packed_documents(STARTS, torch.device("cpu"))[:2]), "takes documents by their lengths"),
    (dict(documents=packed_documents(STARTS, torch.device("cpu")), causal=False), "takes documents by their lengths"),
    (dict(slopes=SLOPES, causal=False), "by distance"), (dict(return_lse=True), "no gradient"), (dict(sinks=SLOPES), "no sinks"),
], ids=["bounds", "full documents", "full alibi", "lse", "sinks"])
def test_what_it_lacks_is_named(options, reason, calls):
    with pytest.raises(ValueError, match=f"kernels.attention is 'flash_attn', .*{reason}"):
        attention(*inputs(), backend="flash_attn", **options)


def test_single_precision_is_refused_and_a_gpu_needed():
    with pytest.raises(ValueError, match="takes bf16 and fp16"):
        choose_name("attention", "flash_attn", Features("cuda", torch.float32, ("head_dim=64",)))
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_name("attention", "flash_attn", Features("cpu", torch.bfloat16, ("documents", "head_dim=64")))
