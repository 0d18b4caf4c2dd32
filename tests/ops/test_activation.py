"""gelu, swiglu and geglu: gradients, accuracy, odd sizes, strided inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalm.ops import activation as module
from megalm.ops.activation import geglu, gelu, gelu_exact, swiglu
from megalm.tools.kernel_cases.accuracy import assert_within_twice, randn
from tests.ops.dtypes import DTYPES

BACKENDS = ["reference", "torch"]
WIDTHS = [(3, 2, 64), (1, 1), (5, 33), (0, 4)]


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_geglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


GATED = {"swiglu": swiglu, "geglu": geglu}
PLAIN = {"swiglu": plain_swiglu, "geglu": plain_geglu, "gelu": lambda x, bias: F.gelu(x + bias, approximate="tanh"),
         "gelu_exact": F.gelu}


def call(name, backend):
    if name in GATED:
        return lambda x: GATED[name](x, backend=backend)
    if name == "gelu_exact":
        return lambda x: gelu_exact(x, backend=backend)
    return lambda x, bias: gelu(x, bias, backend=backend)


def inputs(name, shape):
    if name == "gelu":
        return [3 * randn(*shape), randn(shape[-1], seed=1)]
    return [3 * randn(*shape[:-1], 2 * shape[-1] if name in GATED else shape[-1])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLAIN)
def test_gradients(name, backend):
    tensors = [tensor.requires_grad_() for tensor in inputs(name, (3, 2, 5))]
    assert torch.autograd.gradcheck(call(name, backend), tensors)


@pytest.mark.parametrize("name", PLAIN)
def test_the_reference_is_the_definition(name):
    tensors = inputs(name, (4, 9))
    torch.testing.assert_close(call(name, "reference")(*tensors), PLAIN[name](*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 2, 64), (5, 33)])
@pytest.mark.parametrize("name", PLAIN)
def test_accuracy(name, shape, backend, dtype):
    assert_within_twice(call(name, backend), PLAIN[name], call(name, "reference"), inputs(name, shape), randn(*shape, seed=3),
                        dtype)


@pytest.mark.parametrize("shape", WIDTHS)
@pytest.mark.parametrize("name", PLAIN)
def test_every_backend_gives_shape_dtype_and_the_same_values(name, shape):
    for dtype in DTYPES:
        tensors = [tensor.to(dtype) for tensor in inputs(name, shape)]
        reference, fast = (call(name, backend)(*tensors) for backend in BACKENDS)
        assert reference.shape == fast.shape == shape and reference.dtype == fast.dtype == dtype
        torch.testing.assert_close(fast, reference)


def test_gelu_without_a_bias():
    x = randn(3, 4)
    assert torch.equal(gelu(x), gelu(x, torch.zeros(4, dtype=x.dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GATED)
def test_pieces_of_rows_leave_no_seam(monkeypatch, name, dtype):
    function = GATED[name]
    x, grad = randn(29, 2 * 24).to(dtype).requires_grad_(), randn(29, 24, seed=3).to(dtype)
    expected, = torch.autograd.grad(function(x), x, grad)
    monkeypatch.setattr(module, "rows_in_cache", lambda width: 4)
    got, = torch.autograd.grad(function(x), x, grad)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", GATED)
def test_a_strided_view_and_gradient(name):
    function, plain = GATED[name], PLAIN[name]
    x = randn(4, 6, 20)
    view = x.transpose(0, 1)[..., :16].requires_grad_()
    out = function(view)
    torch.testing.assert_close(out, function(view.contiguous()))
    grad = randn(4, 6, 8, seed=1).transpose(0, 1)
    torch.testing.assert_close(torch.autograd.grad(out, view, grad)[0], torch.autograd.grad(plain(view), view, grad)[0])


@pytest.mark.parametrize("name", GATED)
def test_the_input_and_on_cpu_the_gate_are_kept_for_the_backward_pass(name):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tuple(tensor.shape)), lambda packed: packed):
        GATED[name](randn(4, 16).requires_grad_())
        GATED[name](randn(4, 16))
    assert saved == [(4, 16), (4, 8)]


@pytest.mark.parametrize("name", GATED)
def test_a_gate_that_is_computed_again_gives_the_same_gradient(monkeypatch, name):
    x, grad = randn(9, 16).requires_grad_(), randn(9, 8, seed=1)
    kept = torch.autograd.grad(GATED[name](x), x, grad)
    monkeypatch.setattr(module, "eager_cpu", lambda tensor: False)   # as on a GPU
    torch.testing.assert_close(torch.autograd.grad(GATED[name](x), x, grad), kept)


@pytest.mark.parametrize("name", PLAIN)
def test_under_torch_compile(name):
    tensors = [tensor.float().requires_grad_() for tensor in inputs(name, (4, 32))]
    got = torch.compile(call(name, "auto"), backend="aot_eager", fullgraph=True)(*tensors)
    expected = call(name, "auto")(*tensors)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", GATED)
def test_an_odd_gate_up_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} takes .* not 7"):
        GATED[name](torch.ones(2, 7))


def test_liger_has_no_gelu_alone():
    with pytest.raises(ValueError, match="'liger', which can't serve cpu float32 gelu: Liger has no gelu without a gate"):
        gelu(torch.ones(2, 8), backend="liger")
    with pytest.raises(ValueError, match="'liger', which can't serve cpu float32 geglu: liger_kernel needs a GPU"):
        geglu(torch.ones(2, 8), backend="liger")
