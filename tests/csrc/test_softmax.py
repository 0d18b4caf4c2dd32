"""The torch side of the softmax kernels: registration, autograd formula, torch.compile, masks of any layout, what is refused."""

from __future__ import annotations

import pytest
import torch

from megalm.ops.kernels.softmax import _BACKWARD, _FORWARD, softmax_backward, softmax_forward
from megalm.ops.library import DTYPES
from megalm.ops.softmax import scaled_masked_softmax
from megalm.tools.kernel_cases.accuracy import randn

SHAPE = (2, 3, 5, 8)


def softmax(x, backend="megalm", **options):
    return scaled_masked_softmax(x, 0.6, backend=backend, **options)


def some_mask(*shape):
    return randn(*shape, seed=9) > -0.5


def test_registration(shim):
    x = randn(*SHAPE).float()
    for mask, causal in ((None, True), (some_mask(2, 1, 5, 8), False), (some_mask(2, 1, 1, 1).to(torch.uint8), True)):
        torch.library.opcheck(softmax_forward, (x, mask, 0.5, causal))
    y = softmax_forward(x, None, 0.5, True)
    torch.library.opcheck(softmax_backward, (x, y, 0.5, True))


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(mask=some_mask(2, 1, 4, 5)),
                                     dict(causal=True, mask=some_mask(1, 2, 1, 5))])
def test_autograd_formula(shim, options):
    x = randn(2, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: softmax(x, **options), (x,))


def test_no_graph_break(shim):
    x, mask = randn(*SHAPE).float().requires_grad_(), some_mask(2, 1, 1, 8)
    for options in (dict(causal=True), dict(mask=mask)):
        call = lambda x: softmax(x, **options)  # noqa: B023, E731
        got, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x))


def test_masks_of_any_layout(shim):
    """Broadcast in any dim, of bytes, off a multiple of 16 bytes, transposed, and with strides of their own."""
    x = randn(*SHAPE).float()
    wide = some_mask(4, 3, 10, 17)
    masks = [some_mask(*(full if here else 1 for here, full in zip(bits, SHAPE, strict=True)))
             for bits in ((1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 0, 0), (0, 1, 1, 1))]
    masks += [wide[:2, :, :5, 1:9], wide[::2, :, ::2, 8:16], wide[:2, :1, :5, ::2][..., :8],
              some_mask(2, 3, 8, 5).transpose(2, 3), some_mask(2, 1, 1, 8).expand(2, 3, 5, 8),
              (7 * some_mask(2, 1, 5, 8)).to(torch.uint8)]
    for mask in masks:
        for causal in (False, True):
            torch.testing.assert_close(softmax(x, mask=mask, causal=causal), softmax(x, "reference", mask=mask, causal=causal))


@pytest.mark.parametrize("keys", [7, 8, 300, 4200])
def test_nothing_gets_through_a_mask(shim, keys):
    """Neither NaN nor infinity, forward or backward; a row that sees nothing is 0 with gradient 0."""
    mask = some_mask(1, 2, 3, keys)
    mask[:, 1, 1] = False
    clean = randn(1, 2, 3, keys).float()
    for causal in (False, True):
        hidden = ~mask | ~torch.ones(3, keys, dtype=torch.bool).tril(keys - 3) if causal else ~mask
        grad = randn(1, 2, 3, keys, seed=2).float()
        leaf = clean.clone().requires_grad_()
        expected = torch.autograd.grad(softmax(leaf, "reference", causal=causal, mask=mask), leaf, grad)
        for poison in (float("nan"), float("inf"), -float("inf")):
            x = clean.masked_fill(hidden, poison).requires_grad_()
            y = softmax(x, causal=causal, mask=mask)
            assert not y.masked_select(hidden).any() and not y[:, 1, 1].any()
            torch.testing.assert_close(torch.autograd.grad(y, x, grad), expected)


def test_more_queries_than_keys(shim):
    x = randn(1, 2, 9, 4).float().requires_grad_()
    y = softmax(x, causal=True)
    assert not y[:, :, :5].any() and torch.equal(y[:, :, 5, 0], torch.ones(1, 2))
    assert not torch.autograd.grad(y, x, randn(1, 2, 9, 4, seed=1).float())[0][:, :, :5].any()


def test_strides_and_offsets_change_nothing(shim):
    whole = randn(3, 4, 6, 20).float()
    for x in (whole[..., 4:], whole[..., 1:17], whole.transpose(2, 3), whole[::2, 1:, ::2, 4:12], whole[:1].expand(2, 4, 6, 20)):
        view, dense = x.detach().requires_grad_(), x.contiguous().detach().requires_grad_()
        torch.testing.assert_close(softmax(view, causal=True), softmax(dense, causal=True))
        for grad in (x, torch.ones(()).expand(x.shape)):
            torch.testing.assert_close(torch.autograd.grad(softmax(view), view, grad),
                                       torch.autograd.grad(softmax(dense), dense, grad))


@pytest.mark.parametrize("keys", [7, 64, 4200])
def test_in_place(shim, keys):
    """The kernels may write where they read: probabilities over scores, and the gradient over the one that came in."""
    x, grad = randn(1, 2, 3, keys).float(), randn(1, 2, 3, keys, seed=1).float()
    y = softmax_forward(x, None, 0.6, True)
    expected = softmax_backward(grad, y, 0.6, True)
    sizes = dict(batch=1, heads=2, queries=3, keys=keys, scale=0.6, causal=True, dtype=DTYPES[torch.float32])
    _FORWARD(x.device, x=x, mask=None, y=x, mask_b=0, mask_h=0, mask_q=0, **sizes)
    _BACKWARD(x.device, grad_y=grad, y=y, grad_x=grad, **sizes)
    assert torch.equal(x, y) and torch.equal(grad, expected)


def test_no_keys_or_rows(shim):
    for shape in ((0, 2, 3, 4), (1, 2, 3, 0)):
        x = torch.empty(shape, requires_grad=True)
        assert torch.autograd.grad(softmax(x, causal=True).sum(), x)[0].shape == shape


def test_what_is_refused(shim):
    with pytest.raises(ValueError, match="float32, float16 and bfloat16, not int64"):
        softmax(torch.ones(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="grad_y is torch.float64"):
        softmax_backward(randn(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 1.0, False)
    with pytest.raises(RuntimeError, match="softmax_forward: invalid argument"):
        softmax_forward(torch.ones(1, 1, 2, 2), None, 0.0, False)
