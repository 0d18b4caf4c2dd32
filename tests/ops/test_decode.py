"""Attention to a cache: both backends against attention over each sequence's own tokens, and what is refused."""

from __future__ import annotations

import pytest
import torch

from megalm.ops.attention import attention
from megalm.ops.decode import decode
from megalm.ops.library import drop_shim
from megalm.ops.registry import REGISTRY, Features, choose

LENGTHS = (9, 0, 5, 3)
TABLE = torch.zeros(4, 1, dtype=torch.int32)


def tensors(queries=3, s=12, heads=4, groups=2, d=8, e=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((queries, len(LENGTHS), heads, d), (s, len(LENGTHS), groups, d), (s, len(LENGTHS), groups, e))]


def one_by_one(q, k, v, **options):
    """Each sequence by itself, with queries before its first token left 0."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for i, length in enumerate(LENGTHS):
        queries = min(q.shape[0], length)
        own = (x[:length, i:i + 1] for x in (k, v))
        if queries:
            out[-queries:, i:i + 1] = attention(q[-queries:, i:i + 1], *own, backend="reference", **options)
    return out


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("queries", [1, 3])
def test_each_sequence_attends_to_its_own_tokens_and_nothing_else(backend, queries):
    q, k, v = tensors(queries)
    spoiled = [x.clone() for x in (k, v)]
    for i, length in enumerate(LENGTHS):
        for x in spoiled:
            x[length:, i] = torch.nan
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    torch.testing.assert_close(decode(q, *spoiled, lengths, backend=backend), one_by_one(q, k, v))
    torch.testing.assert_close(decode(q, *spoiled, lengths, left=2, backend=backend), one_by_one(q, k, v, window=(2, 0)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_without_lengths_the_cache_is_full(backend):
    for queries in (1, 3):
        q, k, v = tensors(queries)
        torch.testing.assert_close(decode(q, k, v, backend=backend), attention(q, k, v, backend="reference"))
        windowed = attention(q, k, v, window=(4, 0), backend="reference")
        torch.testing.assert_close(decode(q, k, v, left=4, backend=backend), windowed)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_pages(backend):
    q, k, v = tensors(s=32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    pools = [torch.cat((torch.full((1, 16, *x.shape[2:]), torch.nan, dtype=x.dtype),
                        x.unflatten(0, (2, 16)).permute(2, 0, 1, 3, 4).flatten(0, 1))) for x in (k, v)]
    table = torch.tensor([[1, 0], [0, 0], [5, -3], [7, 99]], dtype=torch.int32)
    torch.testing.assert_close(decode(q, *pools, lengths, table=table, backend=backend), one_by_one(q, k, v))


def test_softcap_slopes_and_sinks_are_attention_s():
    q, k, v = tensors()
    slopes, sinks = torch.tensor([0.5, 0.25, 0.1, 0.0]), torch.tensor([1.0, -1.0, 0.0, 2.0])
    for options in ({"softcap": 1.5}, {"slopes": slopes}, {"sinks": sinks}, {"scale": -0.3}):
        got = decode(q, k, v, return_lse=True, backend="reference", **options)
        expected = attention(q, k, v, return_lse=True, backend="reference", **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_on_a_cpu_torch_serves_and_what_it_cannot_the_reference():
    drop_shim()
    for traits, name in ((("head_dim=64",), "torch"), (("softcap", "head_dim=64"), "reference")):
        run, _ = choose("decode", "auto", Features("cpu", torch.float32, traits))
        assert run is REGISTRY.backends["decode"][name].run


def test_it_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors())
    assert not decode(q, k, v).requires_grad


@pytest.mark.parametrize("change, message", [
    (dict(lengths=torch.tensor(LENGTHS)), r"lengths must be int32 \[b\] = \(4,\), not torch.int64 \(4,\)"),
    (dict(lengths=torch.zeros(3, dtype=torch.int32)), r"lengths must be int32 \[b\] = \(4,\), not torch.int32 \(3,\)"),
    (dict(table=TABLE), "a paged cache needs the sequences' lengths"),
    (dict(lengths=torch.zeros(4, dtype=torch.int32), table=TABLE[:3]), "table must be int32"),
    (dict(lengths=torch.zeros(4, dtype=torch.int32), table=TABLE), "pages have 4 tokens; they need a power of two from 16 up"),
    (dict(softcap=-1.0), "softcap must be positive"),
    (dict(sinks=torch.zeros(2)), r"sinks must be one number a head, \[4\], not \(2,\)"),
    (dict(q=torch.zeros(1, 4, 3, 8, dtype=torch.float64)), r"k \[s, b, G, d\] and v \[s, b, G, e\] with G dividing H"),
])
def test_what_does_not_fit_is_refused(change, message):
    q, k, v = tensors()
    options = dict(q=q, k=k, v=v) | change
    with pytest.raises(ValueError, match=message):
        decode(options.pop("q"), options.pop("k"), options.pop("v"), **options)
