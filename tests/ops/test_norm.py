"""LayerNorm and RMSNorm: gradients, accuracy, odd sizes, strided rows, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalm.ops import norm as module
from megalm.ops.norm import add_norm, norm
from megalm.tools.kernel_cases.accuracy import assert_within_twice, randn
from tests.ops.dtypes import DTYPES

KINDS = ["layer_norm", "rms_norm"]
SHAPES = [(3, 2, 64), (1, 1, 1), (7, 33), (5, 3, 4, 127), (2, 1000), (0, 8)]


def call(kind, backend):
    if kind == "rms_norm":
        return lambda x, weight: norm(x, weight, None, 1e-5, kind=kind, backend=backend)
    return lambda x, weight, bias: norm(x, weight, bias, 1e-5, kind=kind, backend=backend)


def plain(kind):
    if kind == "rms_norm":
        return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5)
    return lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def inputs(kind, shape):
    vectors = [randn(shape[-1], seed=1) + 1, randn(shape[-1], seed=2)]
    return [randn(*shape) + 0.5, *vectors[:1 if kind == "rms_norm" else 2]]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, backend):
    tensors = [tensor.requires_grad_() for tensor in inputs(kind, (3, 2, 5))]
    assert torch.autograd.gradcheck(call(kind, backend), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_definition(kind):
    tensors = inputs(kind, (4, 9))
    torch.testing.assert_close(call(kind, "reference")(*tensors), plain(kind)(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape and shape[-1] > 1])
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(kind, shape, backend, dtype):
    assert_within_twice(call(kind, backend), plain(kind), call(kind, "reference"), inputs(kind, shape), randn(*shape, seed=3),
                        dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_gives_shape_dtype_and_the_same_values(kind, shape):
    for dtype in DTYPES:
        tensors = [tensor.to(dtype) for tensor in inputs(kind, shape)]
        reference, fast = (call(kind, backend)(*tensors) for backend in ("reference", "torch"))
        assert reference.shape == fast.shape == shape and reference.dtype == fast.dtype == dtype
        torch.testing.assert_close(fast, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_of_rows_leave_no_seam(monkeypatch, dtype):
    x, weight = (tensor.to(dtype).requires_grad_() for tensor in inputs("rms_norm", (29, 48)))
    grad = randn(29, 48, seed=3).to(dtype)
    whole = norm(x, weight, None, 1e-5, kind="rms_norm", backend="torch")
    expected = torch.autograd.grad(whole, (x, weight), grad)
    monkeypatch.setattr(module, "_PIECE_FULL", 200)
    monkeypatch.setattr(module, "_PIECE_HALF", 200)
    pieces = norm(x, weight, None, 1e-5, kind="rms_norm", backend="torch")
    assert torch.equal(pieces, whole)
    for got, value in zip(torch.autograd.grad(pieces, (x, weight), grad), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_a_strided_projection(kind):
    qkv = randn(6, 2, 3 * 4 * 16).float()
    query = qkv[..., :64].unflatten(-1, (4, 16))                 # [s, b, heads, d] inside [s, b, 3h]
    vectors = [tensor.float() for tensor in inputs(kind, (16,))[1:]]
    torch.testing.assert_close(call(kind, "torch")(query, *vectors), call(kind, "torch")(query.contiguous(), *vectors))


def test_statistics_of_half_precision_rows_are_fp32():
    x = torch.full((2, 4096), 100.0, dtype=torch.bfloat16)       # a sum of squares of 4e7, an ulp of 2.6e5 in bf16
    for backend in ("reference", "torch"):
        torch.testing.assert_close(norm(x, torch.ones(4096, dtype=x.dtype), None, 1e-5, kind="rms_norm", backend=backend),
                                   torch.ones_like(x))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_residual(kind, backend):
    x, *vectors = inputs(kind, (5, 8))
    residual = randn(5, 8, seed=4)
    y, total = add_norm(x, residual, *vectors, *[None] * (kind == "rms_norm"), 1e-5, kind=kind, backend=backend)
    assert torch.equal(total, x + residual) and torch.equal(y, call(kind, backend)(total, *vectors))


@pytest.mark.parametrize("kind", KINDS)
def test_under_torch_compile(kind):
    tensors = [tensor.float().requires_grad_() for tensor in inputs(kind, (4, 32))]
    compiled = torch.compile(call(kind, "auto"), backend="aot_eager", fullgraph=True)
    got, expected = compiled(*tensors), call(kind, "auto")(*tensors)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_arguments_are_refused():
    x, ones = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="batch_norm"):
        norm(x, ones, None, 1e-5, kind="batch_norm")
    with pytest.raises(ValueError, match="no bias"):
        norm(x, ones, ones, 1e-5, kind="rms_norm")
    with pytest.raises(ValueError, match=r"kernels.norm is 'fast'; it can be auto, megalm, torch, apex, liger, reference"):
        norm(x, ones, None, 1e-5, kind="rms_norm", backend="fast")
