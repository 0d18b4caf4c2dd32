"""Scaled masked softmax: the definition, gradients, masks, rows that see nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megalm.ops.softmax import scaled_masked_softmax
from megalm.tools.kernel_cases.accuracy import assert_within_twice, randn
from tests.ops.dtypes import DTYPES

BACKENDS = ["reference", "torch"]
SHAPES = [(2, 3, 4, 5), (1, 2, 1, 7), (2, 1, 6, 3)]
MASKS = [(2, 1, 1, 1), (1, 1, 0, 1), (0, 0, 1, 1), (1, 0, 0, 1), (1, 1, 1, 1)]


def softmax(backend, **options):
    return lambda x: scaled_masked_softmax(x, 0.4, backend=backend, **options)


def mask_of(shape, dims):
    """Random, as large as x in `dims` and 1 in the others."""
    return randn(*(full if here == 1 else 1 for here, full in zip(dims, shape, strict=True)), seed=5) > -0.3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(shape, causal, backend):
    x, mask = randn(*shape), mask_of(shape, (1, 0, 0, 1))
    y = softmax(backend, causal=causal, mask=mask)(x)
    b, heads, queries, keys = shape
    for batch, head, i in itertools.product(range(b), range(heads), range(queries)):
        seen = [j for j in range(keys) if mask[batch, 0, 0, j] and (not causal or j <= i + keys - queries)]
        total = sum(math.exp(0.4 * x[batch, head, i, j]) for j in seen)
        for j in range(keys):
            expected = math.exp(0.4 * x[batch, head, i, j]) / total if j in seen else 0.0
            assert math.isclose(y[batch, head, i, j], expected, abs_tol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [None, *MASKS])
def test_gradients(backend, dims):
    x = randn(2, 2, 3, 4).requires_grad_()
    mask = None if dims is None else mask_of(x.shape, dims)
    for causal in (False, True):
        assert torch.autograd.gradcheck(softmax(backend, causal=causal, mask=mask), (x,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(backend, dtype):
    shape = (2, 4, 33, 40)
    mask = torch.ones(33, 40, dtype=torch.bool).tril(7)
    assert_within_twice(softmax(backend, causal=True), lambda x: (x * 0.4).masked_fill(~mask, -torch.inf).softmax(-1),
                        softmax("reference", causal=True), [randn(*shape)], randn(*shape, seed=1), dtype)


@pytest.mark.parametrize("dims", MASKS)
def test_masks_broadcast_and_bytes_are_masks(dims):
    x = randn(2, 3, 4, 5).float()
    mask = mask_of(x.shape, dims)
    expected = softmax("reference", mask=mask.expand(x.shape))(x)
    for backend in BACKENDS:
        torch.testing.assert_close(softmax(backend, mask=mask)(x), expected)
        torch.testing.assert_close(softmax(backend, mask=3 * mask.to(torch.uint8))(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gets_through_a_mask(backend):
    """A row that sees nothing is 0 and has gradient 0; NaN and infinity behind a mask do no harm."""
    mask = mask_of((2, 2, 3, 4), (1, 1, 1, 1))
    mask[0, 1, 2] = False
    x = randn(2, 2, 3, 4).masked_fill(~mask, torch.nan)
    x[0, 1, 2] = torch.inf
    x.requires_grad_()
    y = softmax(backend, mask=mask)(x)
    grad = torch.autograd.grad(y, x, randn(2, 2, 3, 4, seed=1))[0]
    assert y.isfinite().all() and grad.isfinite().all()
    assert not y[~mask].any() and not grad[~mask].any() and not y[0, 1, 2].any()


def test_a_dtype_is_kept_and_fp32_is_computed_in():
    x = (100 * randn(1, 1, 2, 64)).bfloat16()
    for backend in BACKENDS:
        y = softmax(backend)(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), (x.double() * 0.4).softmax(-1), atol=2**-8, rtol=2**-8)


def test_wrong_arguments_are_refused():
    x = torch.ones(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\) times 1.0: need \[b, heads, q, k\]"):
        scaled_masked_softmax(x[0], 1.0)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="a positive scale"):
            scaled_masked_softmax(x, scale)
    for mask in (torch.ones(5), torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"the mask is torch.(bool|float32) .*need bool or uint8"):
            scaled_masked_softmax(x, 1.0, mask=mask.bool() if mask.dim() == 1 else mask)
    with pytest.raises(ValueError, match="kernels.softmax is 'megalm', which can't serve cpu float32: its kernels run on a GPU"):
        scaled_masked_softmax(x, 1.0, backend="megalm")
