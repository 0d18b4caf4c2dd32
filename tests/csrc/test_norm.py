"""The torch side of the norm kernels: registration, autograd formula, torch.compile, strides and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megalm.ops.kernels.norm import _BACKWARD, norm_backward, norm_forward
from megalm.ops.norm import add_norm, norm
from megalm.tools.kernel_cases.accuracy import assert_within_twice, randn
from megalm.tools.kernel_cases.case import HALF_AND_FULL

KINDS = ["layer_norm", "rms_norm"]


def tensors(kind, *shape, dtype=torch.float32):
    """x, residual, weight and (layer_norm) bias, which ask for gradients."""
    vectors = [randn(shape[-1], seed=2) + 1, randn(shape[-1], seed=3)][:2 if kind == "layer_norm" else 1]
    return [tensor.to(dtype).requires_grad_() for tensor in (randn(*shape), randn(*shape, seed=1), *vectors)]


def fused(kind):
    return lambda x, residual, weight, bias=None: add_norm(x, residual, weight, bias, 1e-5, kind=kind, backend="megalm")


@pytest.mark.parametrize("kind", KINDS)
def test_registration(shim, kind):
    x, residual, weight, *bias = (tensor.detach() for tensor in tensors(kind, 3, 4, 32))
    layer_norm, bias = kind == "layer_norm", bias[0] if bias else None
    torch.library.opcheck(norm_forward, (x, residual, weight, bias, 1e-5, layer_norm))
    torch.library.opcheck(norm_forward, (x, None, weight, bias, 1e-5, layer_norm))
    y, total, mean, rstd = norm_forward(x, residual, weight, bias, 1e-5, layer_norm)
    torch.library.opcheck(norm_backward, (y, residual, total, weight, mean, rstd, layer_norm))


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_formula(shim, kind):
    assert torch.autograd.gradcheck(fused(kind), tensors(kind, 5, 9, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_break(shim, kind):
    inputs = tensors(kind, 4, 32)
    compiled = torch.compile(fused(kind), backend="aot_eager", fullgraph=True)
    got, expected = compiled(*inputs), fused(kind)(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got[0].sum() + got[1].sin().sum(), inputs),
                    torch.autograd.grad(expected[0].sum() + expected[1].sin().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_offsets_change_nothing(shim, kind):
    whole = randn(6, 5, 40).float()
    _, _, *vectors = tensors(kind, 32)
    for x in (whole[..., 8:], whole[:, 1:, :32], whole[..., 1:33], whole[..., :32].transpose(0, 1), whole[::2, ::2, 8:]):
        call = fused(kind)
        torch.testing.assert_close(call(x, x, *vectors), call(x.contiguous(), x.contiguous(), *vectors))


def test_empty_rows(shim):
    x, weight = torch.empty(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = norm(x, weight, None, 1e-5, kind="rms_norm", backend="megalm")
    assert y.shape == (0, 8)
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros(8))


def test_only_the_sum_is_used(shim):
    x, residual, weight = tensors("rms_norm", 3, 8)
    _, total = add_norm(x, residual, weight, None, 1e-5, kind="rms_norm", backend="megalm")
    grads = torch.autograd.grad(total.sum(), (x, residual, weight))
    assert torch.equal(grads[0], torch.ones(3, 8)) and torch.equal(grads[1], torch.ones(3, 8)) and not grads[2].any()


def test_what_is_refused(shim):
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16 on cpu; it must be torch.float32"):
        norm(x, torch.ones(8, dtype=torch.bfloat16), None, 1e-5, kind="rms_norm", backend="megalm")
    with pytest.raises(ValueError, match=r"weight and bias be \[8\]"):
        norm(x, torch.ones(4), None, 1e-5, kind="rms_norm", backend="megalm")
    with pytest.raises(ValueError, match="float32, float16 and bfloat16, not int64"):
        norm(x.long(), torch.ones(8).long(), None, 1e-5, kind="rms_norm", backend="megalm")


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_where_there_are_no_clusters(shim, kind, dtype):
    """As on an sm_80, which the shim is in order 1: the inputs are read again."""
    shim.set_order(1)
    inputs = [tensor.detach() for tensor in tensors(kind, 3, 16448)]

    def run(x, residual, weight, bias=None, *, backend):
        return add_norm(x, residual, weight, bias, 1e-5, kind=kind, backend=backend)

    assert_within_twice(*(partial(run, backend=backend) for backend in ("megalm", "torch", "reference")), inputs,
                        [randn(3, 16448, seed=5), randn(3, 16448, seed=6)], dtype)


def test_partial_sums_that_are_not_aligned_are_refused(shim):
    """They are written 16 bytes at a time."""
    x = torch.ones(2, 8)
    values = dict(grad_y=x, sum=x, weight=x[0], rstd=torch.ones(2), grad_x=torch.empty_like(x), grad_weight=torch.empty(8),
                  rows=2, width=8, inner=1, outer_stride=8, inner_stride=8, layer_norm=False, dtype=0)
    values |= dict.fromkeys(("grad_sum", "mean", "grad_bias"))
    blocks = _BACKWARD.count("blocks", x.device, partial=None, blocks=0, **values)
    with pytest.raises(RuntimeError, match="invalid argument"):
        _BACKWARD(x.device, partial=torch.empty(8 * blocks + 1)[1:], blocks=blocks, **values)
