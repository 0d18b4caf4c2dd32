"""The torch side of the activation kernels: registration, autograd formula, torch.compile, strides and what is refused."""

from __future__ import annotations

import pytest
import torch

from megalm.ops.activation import geglu, gelu, swiglu
from megalm.ops.kernels.activation import activation_backward, activation_forward
from megalm.tools.kernel_cases.accuracy import randn

NAMES = ["swiglu", "geglu", "gelu", "gelu with a bias"]


def call(name):
    function = {"swiglu": swiglu, "geglu": geglu}.get(name, gelu)
    return lambda x, *bias: function(x, *bias, backend="megalm")


def tensors(name, *shape, dtype=torch.float32):
    """x of the shape, and a bias where the name has one; they ask for gradients."""
    made = [2 * randn(*shape), *([randn(shape[-1], seed=1)] if name == "gelu with a bias" else [])]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


@pytest.mark.parametrize("name", NAMES)
def test_registration(shim, name):
    x, *bias = (tensor.detach() for tensor in tensors(name, 3, 4, 32))
    bias, activation = bias[0] if bias else None, name.split()[0]
    torch.library.opcheck(activation_forward, (x, bias, activation))
    y = activation_forward(x, bias, activation)
    torch.library.opcheck(activation_backward, (y, x, bias, activation))
    torch.library.opcheck(activation_backward, (y, x.transpose(0, 1).contiguous().transpose(0, 1), bias, activation))


@pytest.mark.parametrize("width", [12, 6])
@pytest.mark.parametrize("name", NAMES)
def test_autograd_formula(shim, name, width):
    assert torch.autograd.gradcheck(call(name), tensors(name, 5, width, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_no_graph_break(shim, name):
    inputs = tensors(name, 4, 32)
    compiled = torch.compile(call(name), backend="aot_eager", fullgraph=True)
    got, expected = compiled(*inputs), call(name)(*inputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), inputs) for out in (got, expected)))


@pytest.mark.parametrize("name", NAMES)
def test_strides_and_offsets_change_nothing(shim, name):
    whole = randn(6, 5, 40).float()
    for view in (whole[..., 8:], whole[:, 1:, :32], whole[..., 1:33], whole[..., :32].transpose(0, 1), whole[::2, ::2, 8:],
                 whole[..., ::2][..., :16], whole[0, 0, :32]):
        x, *bias = view.requires_grad_(), *(t.detach() for t in tensors(name, view.shape[-1])[1:])
        copy = x.detach().contiguous().requires_grad_()
        got, expected = call(name)(x, *bias), call(name)(copy, *bias)
        grad = randn(*got.shape, 2, seed=5).float()[..., 1]
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(expected, copy, grad)[0])


@pytest.mark.parametrize("name", NAMES)
def test_empty_rows(shim, name):
    inputs = [torch.empty(0, 8, requires_grad=True), *tensors(name, 8)[1:]]
    y = call(name)(*inputs)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == (0, 8 if name.startswith("gelu") else 4)
    assert grads[0].shape == (0, 8) and not any(grad.any() for grad in grads[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_and_least_values_give_no_nan(shim, name, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, 1e3, -1e3, 1.0, 1.0, 1.0, 1.0]]).to(dtype).requires_grad_()
    inputs = [x, *(torch.zeros(8, dtype=dtype) for _ in tensors(name, 8)[1:])]
    y = call(name)(*inputs)
    grad, = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.isfinite().all() and grad[0, :4].isfinite().all()
    assert y[0, 0] == largest and y[0, 1] == 0 and grad[0, 0] == 1 and grad[0, 1] == 0


def test_a_nan_stays_one(shim):
    x = torch.tensor([[float("nan"), 1.0, 1.0, 1.0]], requires_grad=True)
    for name in ("swiglu", "geglu", "gelu"):
        y = call(name)(x)
        assert y[0, 0].isnan() and torch.autograd.grad(y.sum(), x)[0][0, 0].isnan()


def test_what_is_refused(shim):
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"bias is torch.bfloat16 on cpu; it must be torch.float32"):
        gelu(x, torch.ones(8, dtype=torch.bfloat16), backend="megalm")
    with pytest.raises(ValueError, match=r"gelu of x \(2, 8\): the bias must be \[8\], not \[4\]"):
        gelu(x, torch.ones(4), backend="megalm")
    with pytest.raises(ValueError, match="float32, float16 and bfloat16, not int64"):
        swiglu(x.long(), backend="megalm")
    with pytest.raises(RuntimeError, match="megalm activation_forward: invalid argument"):
        activation_forward(x, torch.ones(8), "swiglu")
