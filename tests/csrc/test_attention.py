"""The torch side of the attention kernels: registration, autograd, torch.compile, determinism, edges, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from megalm.ops.attention import attention, dims_trait, document_bounds
from megalm.ops.kernels.attention import HEAD_DIMS, attention_backward, attention_forward, portable
from megalm.ops.library import DTYPES
from megalm.ops.random import ATTENTION_SCORES, DropoutKey
from megalm.ops.registry import REGISTRY
from megalm.tools.build_kernels import CSRC
from megalm.tools.generate_attention import SHAPES, files
from megalm.tools.kernel_cases.accuracy import poisoned, randn

KEY = DropoutKey(1234, 5, 3, ATTENTION_SCORES)


def tensors(s=20, s_k=20, batch=1, heads=2, groups=1, dim=64, dtype=torch.bfloat16):
    return [randn(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(
        [(s, batch, heads, dim), (s_k, batch, groups, dim), (s_k, batch, groups, dim)])]


def test_instances_are_those_of_the_table():
    assert tuple((shape.head_dim, shape.value_dim) for shape in SHAPES) == HEAD_DIMS
    assert REGISTRY.table["backends"]["attention"]["megalm"]["kernels"] == [dims_trait(*dims) for dims in HEAD_DIMS]
    made = {path.name: path.read_text() for path in CSRC.glob("attention_*_d*.cu")}
    assert made == files()
    declared = (CSRC / "attention_instances.h").read_text()
    assert all(f"MEGALM_ATTENTION_INSTANCE({d}, {e})" in declared for d, e in HEAD_DIMS)


def test_registration(shim):
    q, k, v = (x.detach() for x in tensors())
    rules = (None, None, -1, 0, 0.125, 0.0, None, 0.0, 0, torch.tensor(0), torch.tensor(0), 0, 0, False, True)
    for fp8 in (False, True):
        torch.library.opcheck(attention_forward, (q, k, v, None, None, None, None, fp8, *rules[2:]))
    out, lse = attention_forward(q, k, v, None, None, None, None, False, *rules[2:])
    torch.library.opcheck(attention_backward, (out, lse, q, k, v, out, lse, None, None, *rules[1:]))


def test_no_graph_break(shim):
    inputs = tensors(dtype=torch.float16)

    def call(q, k, v):
        return attention(q, k, v, backend="megalm", return_lse=True)

    got, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs), call(*inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(r[0].float().sin().sum() + r[1].sum(), inputs) for r in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_no_recompilation_for_another_step(shim):
    """Steps and layers are tensors to compiled code: their values must not be part of it."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    samples = torch.arange(1)

    @torch.compile(backend=counter, fullgraph=True)
    def call(q, k, v, step):
        return attention(q, k, v, dropout=0.5, key=KEY._replace(step=step), samples=samples, backend="megalm")

    inputs = tensors()
    first, second = (call(*inputs, torch.tensor(step)) for step in (1, 2))
    assert counter.frame_count == 1 and not torch.equal(first, second)


@pytest.mark.parametrize("path, length, dim", [(portable, 70, 64), (nullcontext, 300, 64), (nullcontext, 300, 128)])
def test_the_same_bits_every_time_and_in_every_order(shim, path, length, dim):
    """Deterministic: what a thread sums doesn't depend on who comes first. By Hopper's path, of several blocks, on request."""
    inputs, found = tensors(length, length, heads=2, dim=dim), []
    for order in (0, 1, 7):
        shim.set_order(order)
        with path():
            out = attention(*inputs, backend="megalm", deterministic=path is nullcontext)
        found.append([out, *torch.autograd.grad(out.float().sin().sum(), inputs)])
    shim.set_order(0)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_scores_of_what_is_not_seen_do_not_matter(shim):
    """A score that isn't a number, of a key that a query doesn't see, reaches neither the output nor the sums."""
    q, k, v = (x.detach() for x in tensors(30, 30))
    documents = tuple(torch.full((1, 30), bound, dtype=torch.int32) for bound in (3, 20))
    spoiled = k.clone()
    spoiled[20:25], spoiled[25:], spoiled[:3] = torch.inf, torch.nan, -torch.inf
    with poisoned():
        got, expected = (attention(q, keys, v, causal=False, documents=documents, return_lse=True, backend="megalm")
                         for keys in (spoiled, k))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, expected, strict=True))


def test_queries_that_see_nothing_are_zero_with_zero_gradient(shim):
    q, k, v = tensors(30, 10)
    out, lse = attention(q, k, v, return_lse=True, backend="megalm")
    grads = torch.autograd.grad(out.float().sum() + lse[..., 20:].sum(), (q, k, v))
    assert not out[:20].any() and (lse[..., :20] == -torch.inf).all() and lse[..., 20:].isfinite().all()
    assert not grads[0][:20].any() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("s, s_k", [(0, 4), (4, 0)])
def test_nothing_to_attend(shim, s, s_k):
    q, k, v = tensors(s, s_k)
    sinks = torch.tensor([0.5, 1.0], requires_grad=True)
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True, backend="megalm")
    assert out.shape == (s, 1, 2, 64) and not out.any() and (lse == torch.tensor([0.5, 1.0])[None, :, None]).all()
    assert all(not grad.any() for grad in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_dropout_is_the_same_under_any_split_of_heads(shim):
    q, k, v = (x.detach() for x in tensors(33, 33, batch=2, heads=4, groups=4))
    samples = torch.tensor([7, 1 << 40])
    whole = attention(q, k, v, dropout=0.3, key=KEY, samples=samples, backend="megalm")
    for start, stop in ((0, 1), (1, 4)):
        part = attention(*(x[:, :, start:stop] for x in (q, k, v)), dropout=0.3, key=KEY, samples=samples, heads=(start, stop, 4),
                         backend="megalm")
        assert torch.equal(part, whole[:, :, start:stop])
    alone = attention(*(x[:, 1:] for x in (q, k, v)), dropout=0.3, key=KEY, samples=samples[1:], backend="megalm")
    assert torch.equal(alone, whole[:, 1:])


def test_parts_merge_by_their_sums(shim):
    """Ring attention: the halves of the keys, weighted by exp(lse), are the whole; so is the gradient that goes through lse."""
    q, k, v = tensors(20, 64, dtype=torch.float16)
    whole, whole_lse = attention(q, k, v, causal=False, return_lse=True, backend="reference")
    halves = slice(0, 24), slice(24, 64)
    parts = [attention(q, k[half], v[half], causal=False, return_lse=True, backend="megalm") for half in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out.float() * torch.exp(part - lse).permute(2, 0, 1)[..., None] for out, part in parts)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(merged, whole.float(), rtol=4e-3, atol=4e-3)
    for a, b in zip(torch.autograd.grad(merged.sin().sum(), (q, k, v)), torch.autograd.grad(whole.float().sin().sum(), (q, k, v)),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_misaligned_rows_are_copied(shim):
    storage = randn(20, 1, 3 * 64 + 4).to(torch.bfloat16)
    q, k, v = (storage[..., 4 + 64 * i:68 + 64 * i].unflatten(-1, (1, 64)) for i in range(3))
    got, expected = (attention(*(f(x) for x in (q, k, v)), backend="megalm") for f in (lambda x: x, torch.clone))
    assert torch.equal(got, expected)


def test_a_whole_tensor_that_is_misaligned_is_copied(shim):
    """Contiguous already, which must not keep the copy from being made."""
    flat = randn(20 * 64 + 1).to(torch.bfloat16)
    q = flat[1:].view(20, 1, 1, 64).requires_grad_()
    out = attention(q, q, q, backend="megalm")
    grad = randn(20 * 64 + 1, seed=1).to(torch.bfloat16)[1:].view(20, 1, 1, 64)
    same = q.detach().clone().requires_grad_()
    expected = attention(same, same, same, backend="megalm")
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out, q, grad)[0], torch.autograd.grad(expected, same, grad.clone())[0])


def test_what_is_refused(shim):
    q, k, v = tensors()
    for inputs in ([x[..., :48] for x in (q, k, v)], [x.float() for x in (q, k, v)]):
        with pytest.raises(ValueError, match="softcap needs an attention kernel: they take bf16 and fp16 with head_dim=64, "):
            attention(*inputs, softcap=2.0, backend="megalm")
    with pytest.raises(ValueError, match=r"documents: first must be int32 \[b, s\] = \(1, 20\), not torch.int64 \(20,\)"):
        attention(q, k, v, documents=(torch.zeros(20).long(), torch.zeros(20).long()), backend="megalm")
    falling = torch.arange(20, 0, -1, dtype=torch.int32)[None]
    with pytest.raises(ValueError, match="documents: last decreases along a sequence"):
        attention(q, k, v, documents=(torch.zeros_like(falling), falling), backend="megalm")
    with pytest.raises(ValueError, match=r"slopes must be one number a head, \[2\], not \(3,\)"):
        attention(q, k, v, slopes=torch.ones(3), backend="megalm")
    with pytest.raises(ValueError, match="softcap must be positive"):
        attention(q, k, v, softcap=-1.0, backend="megalm")
    assert torch.float64 in DTYPES


def test_bounds_of_documents():
    first, last = document_bounds(torch.tensor([0, 2, 5]))
    assert first.tolist() == [[0, 0, 2, 2, 2]] and last.tolist() == [[2, 2, 5, 5, 5]] and first.dtype == torch.int32
    first, last = document_bounds(torch.tensor([0, 2, 3]), torch.tensor([0, 4, 4]), causal=True)
    assert first.tolist() == [[0, 0, 4]] and last.tolist() == [[3, 4, 4]]
