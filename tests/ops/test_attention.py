"""Attention: definition, gradients, accuracy, grouped queries, masks at the bottom right, and dropout that knows no layout."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.ops.attention import attention, packed_documents
from megalm.ops.random import ATTENTION_SCORES, DropoutKey, keep_mask
from megalm.tools.kernel_cases.accuracy import assert_within_twice, randn
from tests.ops.dtypes import DTYPES

BACKENDS = ["reference", "torch"]
KEY = DropoutKey(1, 2, 3, ATTENTION_SCORES)
# queries, keys, batch, heads, query groups, head dim
SHAPES = [(16, 16, 2, 4, 4, 8), (17, 17, 1, 6, 2, 5), (33, 33, 3, 4, 1, 16), (1, 9, 2, 4, 2, 8), (5, 12, 1, 2, 2, 7),
          (1, 1, 1, 1, 1, 1)]
LONGER_QUERIES = (9, 4, 2, 4, 2, 8)


def inputs(shape):
    s, s_k, b, h, g, d = shape
    return [randn(s, b, h, d), randn(s_k, b, g, d, seed=1), randn(s_k, b, g, d, seed=2)]


def call(backend, **options):
    return lambda q, k, v: attention(q, k, v, backend=backend, **options)


def plain(causal, shape):
    s, s_k, _, h, g, _ = shape

    def run(q, k, v):
        k, v = (x.repeat_interleave(h // g, dim=2) for x in (k, v))
        mask = torch.ones(s, s_k, dtype=torch.bool).tril(s_k - s) if causal else None
        return F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), attn_mask=mask).permute(2, 0, 1, 3)
    return run


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_the_definition(causal):
    s, s_k, b, h, g, d = shape = (3, 5, 2, 4, 2, 6)
    q, k, v = inputs(shape)
    context = attention(q, k, v, causal=causal, backend="reference")
    for batch, head in itertools.product(range(b), range(h)):
        for i in range(s):
            last = s_k - s + i + 1 if causal else s_k
            group = head // (h // g)
            scores = torch.stack([q[i, batch, head] @ k[j, batch, group] for j in range(last)]) / d**0.5
            torch.testing.assert_close(context[i, batch, head], scores.softmax(0) @ v[:last, batch, group])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 4, 2, 4, 2, 3), (2, 5, 1, 2, 1, 3), (1, 3, 1, 2, 2, 3), (5, 3, 1, 2, 1, 3)])
def test_gradients(shape, backend, causal):
    tensors = [tensor.requires_grad_() for tensor in inputs(shape)]
    assert torch.autograd.gradcheck(call(backend, causal=causal), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_accuracy(shape, backend, causal, dtype):
    grad = randn(shape[0], shape[2], shape[3], shape[5], seed=3)
    assert_within_twice(call(backend, causal=causal), plain(causal, shape), call("reference", causal=causal), inputs(shape), grad,
                        dtype)


@pytest.mark.parametrize("shape", [*SHAPES, LONGER_QUERIES])
def test_backends_agree_in_shape_dtype_and_value(shape):
    for dtype, causal, scale in itertools.product(DTYPES, (True, False), (None, 0.3)):
        tensors = [tensor.to(dtype) for tensor in inputs(shape)]
        reference, fast = (call(backend, causal=causal, scale=scale)(*tensors) for backend in BACKENDS)
        assert fast.shape == reference.shape == tensors[0].shape and fast.dtype == reference.dtype == dtype
        torch.testing.assert_close(fast, reference, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_no_key_gives_zero_and_zero_gradients(backend):
    tensors = [tensor.requires_grad_() for tensor in inputs(LONGER_QUERIES)]
    context = attention(*tensors, backend=backend)
    assert (context[:5] == 0).all() and (context[5:] != 0).any()
    gradients = torch.autograd.grad(context.sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients) and (gradients[0][:5] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_a_token_at_a_time_equals_the_whole(backend):
    q, k, v = inputs((7, 7, 2, 4, 2, 8))
    whole = attention(q, k, v, backend=backend)
    for first, stop in ((0, 1), (1, 2), (2, 5), (6, 7)):
        torch.testing.assert_close(attention(q[first:stop], k[:stop], v[:stop], backend=backend), whole[first:stop])


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_fused_projection(backend):
    qkv = randn(6, 2, (4 + 2 + 2) * 8).requires_grad_()
    views = [part.unflatten(-1, (-1, 8)) for part in qkv.split([32, 16, 16], dim=-1)]
    got, expected = attention(*views, backend=backend), attention(*(view.contiguous() for view in views), backend=backend)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), qkv), torch.autograd.grad(expected.sum(), qkv))


LENGTHS = ((5, 1, 7, 4), (17,), (16, 1))
STARTS = torch.tensor([[*[0] * 5, 5, *[6] * 7, *[13] * 4], [0] * 17, [*[0] * 16, 16]], dtype=torch.int32)


@pytest.mark.parametrize("known", [True, False], ids=["lengths", "bounds"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_sees_itself_only(backend, groups, known):
    """By the lengths that the host knows or by the bounds alone: each document as if it were alone, gradients too."""
    documents = packed_documents(STARTS, torch.device("cpu"))
    assert documents.lengths == LENGTHS
    tensors = [tensor.requires_grad_() for tensor in inputs((17, 17, 3, 4, groups, 8))]
    got = attention(*tensors, documents=documents if known else documents[:2], backend=backend)
    expected = torch.stack([torch.cat([attention(*parts, backend="reference") for parts in zip(
        *(x[:, i:i + 1].split(lengths) for x in tensors), strict=True)])[:, 0] for i, lengths in enumerate(LENGTHS)], dim=1)
    grad = randn(*got.shape, seed=3)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(expected, tensors, grad))


def test_keyed_dropout_under_documents_is_the_whole_masks_place():
    """Documents change which scores there are, not which of them are dropped; torch's own mask is a function of its key."""
    documents, samples = packed_documents(STARTS, torch.device("cpu")), torch.arange(3)
    tensors = [tensor.requires_grad_() for tensor in inputs((17, 17, 3, 4, 2, 8))]
    options = dict(dropout=0.3, key=KEY, samples=samples)
    whole = attention(*tensors, documents=documents, **options)
    torch.testing.assert_close(whole[:, 1], attention(*tensors, **options)[:, 1])  # a sample of one document
    one, two = (attention(*tensors, documents=documents, backend="torch", **options) for _ in range(2))
    assert torch.equal(one, two) and not torch.allclose(one, whole)
    other = attention(*tensors, documents=documents, backend="torch", **{**options, "key": KEY._replace(layer=4)})
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_documents_need_no_scores_on_a_cpu(dtype, head_dim):
    """`auto` takes torch, whatever head dims megalm has kernels for, and no tensor is larger than the queries."""
    q, k, v = (tensor.to(dtype).requires_grad_() for tensor in inputs((256, 256, 1, 2, 2, head_dim)))
    starts = (torch.arange(256, dtype=torch.int32) // 32 * 32)[None]
    with LargestTensor() as seen:
        out = attention(q, k, v, documents=packed_documents(starts, q.device))
        torch.autograd.grad(out.sum(), (q, k, v))
    assert seen.elements == q.numel() < 2 * 256 * 256


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if torch.is_tensor(result):
                self.elements = max(self.elements, result.numel())
        return results


def dropped(q, k, v, samples=None, heads=None, backend="auto", key=KEY):
    samples = torch.arange(q.shape[1]) if samples is None else samples
    return attention(q, k, v, dropout=0.3, key=key, samples=samples, heads=heads, backend=backend)


def test_keyed_dropout_is_the_definition_under_any_split_of_heads_and_samples():
    s, _, b, h, g, d = shape = (6, 6, 3, 4, 2, 8)
    q, k, v = inputs(shape)
    scores = torch.einsum("sbhd,tbhd->bhst", q, k.repeat_interleave(2, dim=2)) / d**0.5
    probabilities = scores.masked_fill(~torch.ones(s, s, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    keep = keep_mask(KEY, torch.arange(b), [(0, h, h), (0, s, s), (0, s, s)], 0.3)
    expected = torch.einsum("bhst,tbhd->sbhd", probabilities * keep / 0.7, v.repeat_interleave(2, dim=2))
    whole = dropped(q, k, v)
    torch.testing.assert_close(whole, expected)
    for rank in range(2):
        heads, groups = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
        part = dropped(q[:, :, heads], k[:, :, groups], v[:, :, groups], heads=(2 * rank, 2 * rank + 2, 4))
        torch.testing.assert_close(part, whole[:, :, heads])
    torch.testing.assert_close(dropped(q[:, 1:], k[:, 1:], v[:, 1:], samples=torch.tensor([1, 2])), whole[:, 1:])


def test_dropout_gradients_use_the_mask_of_the_forward_pass():
    tensors = [tensor.requires_grad_() for tensor in inputs((3, 3, 2, 2, 1, 2))]
    assert torch.autograd.gradcheck(dropped, tensors)
    assert torch.autograd.gradcheck(lambda q, k, v: dropped(q, k, v, backend="torch"), tensors)


def test_auto_takes_the_keyed_mask_and_a_named_torch_its_own():
    tensors = inputs((6, 6, 2, 4, 2, 8))
    assert torch.equal(dropped(*tensors), dropped(*tensors, backend="reference"))
    named = dropped(*tensors, backend="torch")
    assert not torch.allclose(named, dropped(*tensors))


def test_dropout_of_torch_is_a_function_of_its_key_and_leaves_the_generator_alone():
    tensors = inputs((6, 6, 2, 4, 2, 8))
    first = dropped(*tensors, backend="torch")
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(dropped(*tensors, backend="torch"), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (dict(key=KEY._replace(layer=4)), dict(samples=torch.tensor([1, 0])), dict(heads=(4, 8, 8))):
        assert not torch.equal(dropped(*tensors, backend="torch", **other), first)


def test_the_share_of_probabilities_that_torch_drops_is_right():
    ones = torch.ones(64, 4, 4, 8)
    kept = attention(ones, ones, ones, causal=False, dropout=0.25, key=KEY, samples=torch.arange(4), backend="torch")
    assert abs(kept.mean() - 1.0) < 0.02 and kept.std() > 0.01


@pytest.mark.parametrize("shape", [(8, 8, 2, 4, 2, 8), (1, 8, 2, 4, 2, 8)])
def test_under_torch_compile(shape):
    tensors = [tensor.float().requires_grad_() for tensor in inputs(shape)]
    got, expected = torch.compile(attention, backend="aot_eager", fullgraph=True)(*tensors), attention(*tensors)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors))


def test_wrong_arguments_are_refused():
    q, k, v = inputs((4, 4, 1, 3, 2, 8))
    with pytest.raises(ValueError, match=r"q \(4, 1, 3, 8\), k \(4, 1, 2, 8\)"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="0.1 needs a key"):
        attention(k, k, v, dropout=0.1)
    short = packed_documents(torch.zeros(1, 3, dtype=torch.int32), k.device)._replace(first=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"lengths \(\(3,\),\) don't fill 1 sequences of 4 queries and 4 keys"):
        attention(k, k, v, documents=short)
    with pytest.raises(ValueError, match="flash_attn"):
        attention(k, k, v, backend="flash_attn")
