"""Attention in fp8 in plain torch: e4m3 by powers of two, the gradient that the kernels have, and where it is offered."""

from __future__ import annotations

import pytest
import torch

from megalm.config import ConfigError
from megalm.model import choose_kernels
from megalm.ops import fp8, library
from megalm.ops.attention import attention
from megalm.ops.random import ATTENTION_SCORES, DropoutKey
from megalm.ops.registry import Features
from megalm.plan.backends import intended_backends
from megalm.tools.kernel_cases.accuracy import randn
from tests.config.trees import config


def inputs(s=12, s_k=20, heads=4, groups=2, dim=8, dtype=torch.float32):
    return [randn(length, 2, count, dim, seed=seed).to(dtype).requires_grad_()
            for seed, (length, count) in enumerate(((s, heads), (s_k, groups), (s_k, groups)))]


def test_units_are_powers_of_two_of_each_head():
    x = randn(30, 2, 3, 8) * torch.tensor([1e-3, 1.0, 700.0], dtype=torch.float64)[:, None]
    found = fp8.rounded(x)
    off = (found - x).abs()
    largest = x.abs().amax((0, 3), keepdim=True)
    assert (off <= torch.maximum(2.0**-4 * x.abs(), 2.0**-10 * largest / 224)).all() and (off > 0).any()
    # The same bits in fp32, as a scale by a power of two rounds nothing, and again, as what is rounded is kept.
    single = fp8.rounded(x.float())
    assert torch.equal(single, fp8.rounded(single))
    half = x.bfloat16()
    assert torch.equal(fp8.rounded(half.float()).double(), fp8.rounded(half.double()))
    assert torch.equal(fp8.rounded(4 * x), 4 * found)


def test_it_is_near_the_unrounded_in_values_and_gradients():
    tensors = inputs()
    grads = {}
    for rounding in (False, True):
        out, lse = attention(*tensors, causal=False, return_lse=True, backend="reference", fp8=rounding)
        grads[rounding] = [out, lse, *torch.autograd.grad((out.sin().sum() + lse.sum()), tensors)]
    for plain, found in zip(grads[False], grads[True], strict=True):
        off = (found - plain).square().mean().sqrt() / plain.square().mean().sqrt()
        assert 1e-4 < off < 0.1


def test_the_gradient_is_that_of_the_unrounded_by_the_sums_of_the_rounded():
    """p = exp(score - lse): grad_v = p^T g, grad of a score = p (g v^T - g out + grad_lse), by hand."""
    q, k, v = inputs(heads=2, dtype=torch.float64)
    sinks = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    out, lse = attention(q, k, v, causal=False, sinks=sinks, return_lse=True, backend="reference", fp8=True)
    grad_out, grad_lse = randn(*out.shape, seed=7), randn(*lse.shape, seed=8)
    found = torch.autograd.grad((out, lse), (q, k, v, sinks), (grad_out, grad_lse))
    query, key, value, grad, context = (x.detach().permute(1, 2, 0, 3) for x in (q, k, v, grad_out, out))     # [b, h, s, d]
    probabilities = torch.exp(8**-0.5 * query @ key.mT - lse.detach()[..., None])
    slope = grad_lse - (grad * context).sum(-1)
    of_scores = probabilities * (grad @ value.mT + slope[..., None])
    expected = [8**-0.5 * of_scores @ key, 8**-0.5 * of_scores.mT @ query, probabilities.mT @ grad]
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b.permute(2, 0, 1, 3))
    torch.testing.assert_close(found[3], (torch.exp(sinks.detach()[:, None] - lse.detach()) * slope).sum((0, 2)))


def test_a_query_that_sees_nothing_is_zero():
    tensors = inputs(s=20, s_k=12)
    out, lse = attention(*tensors, return_lse=True, backend="reference", fp8=True)
    assert not out[:8].any() and (lse[..., :8] == -torch.inf).all() and out[8:].any(-1).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), tensors))


def test_what_is_missing_is_said(monkeypatch):
    features = Features("cuda", torch.bfloat16, ("fp8", "head_dim=128"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert fp8.lacks(features, ["head_dim=128"]) == "its fp8 needs a Hopper GPU, compute capability 9.0; this one has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(library, "about", lambda: {"targets": ["sm_80"]})
    assert "no code for sm_90a" in fp8.lacks(features, ["head_dim=128"])
    monkeypatch.setattr(library, "about", lambda: {"targets": ["sm_80", "sm_90a"]})
    assert fp8.lacks(features, ["head_dim=128"]) is None
    assert fp8.lacks(features, ["head_dim=64"]) == "its fp8 takes bf16 and fp16 with head_dim=64"


def test_no_dropout():
    with pytest.raises(ValueError, match="attention in fp8 has no dropout, and 0.1 is asked for"):
        attention(*inputs(), dropout=0.1, key=DropoutKey(1, 2, 3, ATTENTION_SCORES), samples=torch.arange(2), fp8=True)


def test_a_run_that_cannot_have_it_is_refused_before_a_layer_is_built():
    asked = config(train={"attention_fp8": True}, model={"head_dim": 64})
    assert intended_backends(asked)["attention"] == "megalm"
    with pytest.raises(ConfigError, match="not megalm: its kernels run on a GPU; .*not torch: SDPA has no fp8"):
        choose_kernels(asked, torch.device("cpu"))
    named = config(train={"attention_fp8": True}, kernels={"attention": "reference"})
    assert choose_kernels(named, torch.device("cpu"))["attention"] == "reference, named in the configuration"
