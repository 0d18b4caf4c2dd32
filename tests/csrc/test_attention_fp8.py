"""Attention in fp8: what is rounded and how, how far that is from the unrounded, and the gradients of the unrounded."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.config.checks import FP8_HEAD_DIMS
from megalm.ops.attention import attention
from megalm.ops.fp8 import rounded
from megalm.ops.kernels.attention import FP8_DIMS, attention_backward, portable
from megalm.ops.library import drop_shim
from megalm.tools.build_kernels import CSRC
from megalm.tools.generate_attention import SHAPES
from megalm.tools.kernel_cases.accuracy import randn

OFF = 2.0**-4
"""What a rounding to e4m3 changes of a number, at most; as a root mean square at most OFF / sqrt(3), of an even distribution."""


def tensors(s, s_k, heads=1, groups=1, dim=64, batch=1, dtype=torch.bfloat16):
    return [randn(length, batch, count, dim, seed=seed).to(dtype)
            for seed, (length, count) in enumerate(((s, heads), (s_k, groups), (s_k, groups)))]


def rms(x):
    return x.square().mean().sqrt()


def test_instances_are_those_of_the_table():
    assert tuple((d, d) for d in FP8_HEAD_DIMS) == FP8_DIMS
    assert tuple((shape.head_dim, shape.value_dim) for shape in SHAPES if shape.fp8) == FP8_DIMS
    declared = (CSRC / "attention_instances.h").read_text().split("HOPPER_FP8")[1].split("#define")[0]
    assert all(f"INSTANCE({d}, {e})" in declared for d, e in FP8_DIMS) and declared.count("INSTANCE(") == len(FP8_DIMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(shim, dtype):
    """A query that sees one key gets its values as they were rounded: of every size, at ties, below the least, and 0."""
    q, k, v = tensors(300, 300, heads=2, groups=2, dtype=dtype)
    places = torch.arange(v.numel(), dtype=torch.float64).view(v.shape)
    v = (places % 64 / 32 - 1) * 2.0 ** -(places // 64 % 14)      # with four bits of a fraction more than e4m3 has
    v[:, :, 1] *= 1.9                                             # another unit
    v[:5] = 0
    v = v.to(dtype)
    assert torch.equal(attention(q, k, v, window=(0, 0), backend="megalm", fp8=True), rounded(v))
    assert len(rounded(v)[:, :, 0].unique()) > 150


def test_it_is_the_emulation(shim):
    """Weights are rounded as ops/fp8.py rounds them: far nearer to it than it is to float64 with unrounded weights. Of signs,
    whose scores are whole numbers: a sum of 14 bits of other products often decides to which of two neighbours a weight goes."""
    for dim, s, s_k in ((64, 60, 300), (128, 130, 260), (256, 40, 140)):
        q, k, v = tensors(s, s_k, heads=2, dim=dim, dtype=torch.float16)
        inputs = (q.sign(), k.sign(), v)
        ours, plain = (attention(*inputs, backend=backend, fp8=True).double() for backend in ("megalm", "reference"))
        exact = attention(*(x.double() for x in inputs), backend="reference", fp8=True)
        assert rms(ours - plain) < 0.03 * rms(plain - exact), dim


def test_distance_from_the_unrounded(shim):
    """Against float64 of the same q, k and v, unrounded. With f = 2^-4 / sqrt(3), the largest root mean square that rounding
    leaves of a number, q and k change a score by f sqrt(2 sum (q_i k_i)^2) scale, a factor of its probability; weights and values
    are off by f each; a query's sum over keys adds up what is independent. Largest, by the triangle inequality: see `most`."""
    q, k, v = tensors(200, 200, heads=2, groups=2, dtype=torch.float16)
    q *= 0.5
    got = attention(q, k, v, backend="megalm", fp8=True).double()
    q, k, v = (x.double() for x in (q, k, v))
    exact = attention(q, k, v, backend="reference")
    scale, mask = 64**-0.5, torch.ones(200, 200, dtype=torch.bool).tril()
    query, key, value = (x.permute(1, 2, 0, 3) for x in (q, k, v))             # [b, H, s, d]
    probabilities = (scale * query @ key.mT).masked_fill(~mask, -torch.inf).softmax(-1)
    noise = scale * (2 * query.square() @ key.square().mT).sqrt() / math.sqrt(3) * OFF
    relative = (noise.square() + 2 * OFF**2 / 3)
    expected = ((probabilities.square() * relative) @ value.square()).sqrt().permute(2, 0, 1, 3)
    assert 0.3 * rms(expected) < rms(got - exact) < rms(expected)
    # The most that a score can move, twice for what the sum of exponentials moves too; weights and values by OFF of what they are
    # then; and what lies below e4m3's least normal number by half a step, 2^-10 of the unit.
    step = 2.0**-10 * 4.0 / 256  # no number here is beyond 4 x 1.75 units of 256
    off_q, off_k, off_v = (OFF * x.abs() + step for x in (query, key, value))
    moved = scale * (off_q @ key.abs().mT + query.abs() @ off_k.mT + off_q @ off_k.mT)
    moved = moved.masked_fill(~mask, 0.0).amax(-1, keepdim=True)
    factor = torch.exp(2 * moved)
    most = (probabilities * (factor * (1 + OFF) - 1)) @ (value.abs() + off_v) + probabilities @ off_v
    most = most + 2.0**-18 * value.abs().sum(-2, keepdim=True)
    assert ((got - exact).abs() <= most.permute(2, 0, 1, 3) + 2.0**-11 * exact.abs()).all()


def test_gradients_are_those_of_the_unrounded(shim):
    inputs = [x.requires_grad_() for x in tensors(70, 90, heads=2)]
    out, lse = attention(*inputs, return_lse=True, backend="megalm", fp8=True)
    grad_out, grad_lse = randn(*out.shape, seed=5).to(out.dtype), randn(*lse.shape, seed=6).float()
    found = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    rules = (None, None, None, -1, 0, 0.125, 0.0, None, 0.0, 0, torch.tensor(0), torch.tensor(0), 0, 0, False, False)
    expected = attention_backward(grad_out, grad_lse, *(x.detach() for x in inputs), out.detach(), lse.detach(), *rules)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))
    plain = torch.autograd.grad(attention(*inputs, backend="megalm"), inputs, grad_out)
    near = torch.autograd.grad(attention(*inputs, backend="megalm", fp8=True), inputs, grad_out)
    assert all(rms(a.double() - b.double()) < 0.1 * rms(b.double()) for a, b in zip(near, plain, strict=True))


@pytest.mark.parametrize("order", [1, 7])
def test_the_same_bits_in_every_order(shim, order):
    inputs = tensors(300, 300, heads=2, dim=128)
    first = attention(*inputs, return_lse=True, backend="megalm", fp8=True)
    shim.set_order(order)
    second = attention(*inputs, return_lse=True, backend="megalm", fp8=True)
    shim.set_order(0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_infinity_spoils_its_head_and_a_nan_what_sees_it(shim):
    q, k, v = tensors(40, 40, heads=3, groups=3)
    expected = attention(q, k, v, backend="megalm", fp8=True)
    v[3, 0, 1, 5], v[7, 0, 2, 6] = torch.inf, torch.nan
    got = attention(q, k, v, backend="megalm", fp8=True)
    assert torch.equal(got[:, :, 0], expected[:, :, 0]) and got[:, :, 1].isnan().all()
    assert got[:, :, 2, 6].isnan().all() and torch.equal(got[:, :, 2, :6], expected[:, :, 2, :6])


def test_a_head_of_zeros(shim):
    q, k, v = tensors(20, 20)
    out, lse = attention(q * 0, k * 0, v * 0, return_lse=True, backend="megalm", fp8=True)
    assert not out.any()
    torch.testing.assert_close(lse[0, 0], torch.arange(1, 21).log())


def test_views_that_the_copy_engine_cannot_address(shim):
    """Rounding reads by ordinary loads: a stride of 0, as expand makes, is one more."""
    q, k, v = tensors(20, 20, heads=2, groups=2)
    shared = k[:, :, :1].expand(-1, -1, 2, -1)
    got, expected = (attention(q, keys, v, backend="megalm", fp8=True) for keys in (shared, shared.contiguous()))
    assert torch.equal(got, expected)


def test_nothing_to_attend(shim):
    for s, s_k in ((0, 4), (4, 0)):
        for backend in ("megalm", "reference"):
            out, lse = attention(*tensors(s, s_k), return_lse=True, backend=backend, fp8=True)
            assert not out.any() and (lse == -torch.inf).all()


def test_what_is_refused(shim):
    q, k, v = tensors(4, 4)
    with pytest.raises(ValueError, match="its fp8 takes bf16 and fp16 with head_dim=64, head_dim=128, head_dim=256"):
        attention(*tensors(4, 4, dim=96), backend="megalm", fp8=True)
    with pytest.raises(ValueError, match="its fp8 takes bf16 and fp16"):
        attention(q.float(), k.float(), v.float(), backend="megalm", fp8=True)
    with pytest.raises(ValueError, match="torch.*SDPA has no fp8"):
        attention(q, k, v, backend="torch", fp8=True)
    with portable(), pytest.raises(RuntimeError, match="invalid argument"):
        attention(q, k, v, backend="megalm", fp8=True)
    drop_shim()
    with pytest.raises(ValueError, match="no backend serves cpu bfloat16 fp8 head_dim=64.*not reference: it only emulates fp8"):
        attention(q, k, v, fp8=True)
