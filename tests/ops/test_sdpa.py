"""SDPA: which kernel of torch's serves, groups repeated for those that take none, and gradients in a fixed order by a switch that
is on for nothing else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.ops import sdpa
from megalm.ops.attention import attention
from megalm.tools.kernel_cases.accuracy import randn

CUDA_KERNEL = partial(sdpa.kernel, "cuda")


@pytest.mark.parametrize("dtype, head_dim, value_dim, masked, dropout, expected", [
    (torch.bfloat16, 128, 128, False, False, "flash"),
    (torch.float16, 100, 100, False, True, "flash"),
    (torch.bfloat16, 128, 128, True, False, "efficient"),
    (torch.float32, 128, 128, False, False, "efficient"),
    (torch.float32, 20, 20, True, True, "efficient"),
    (torch.bfloat16, 192, 128, False, False, "efficient"),
    (torch.bfloat16, 256, 256, False, False, "flash"),
    (torch.bfloat16, 256, 256, False, True, "efficient"),
    (torch.bfloat16, 208, 208, False, False, "efficient"),
    (torch.bfloat16, 100, 100, True, False, "math"),
    (torch.float32, 5, 5, False, False, "math"),
    (torch.float64, 64, 64, False, False, "math"),
])
def test_the_kernel_of_a_call(dtype, head_dim, value_dim, masked, dropout, expected):
    assert sdpa.kernel("cuda", dtype, head_dim, value_dim, masked, dropout) == expected
    assert sdpa.kernel("cpu", dtype, head_dim, value_dim, masked, dropout) == "own"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choices that a GPU makes, by the CPU's kernels."""
    monkeypatch.setattr(sdpa, "kernel", lambda device, *call: CUDA_KERNEL(*call))
    monkeypatch.setattr(sdpa, "has_orders", lambda device: True)


class Calls(TorchDispatchMode):
    """(operation, heads of the keys, whether torch's switch is on) of SDPA's operations; others: whether it is on around them."""

    def __init__(self):
        super().__init__()
        self.attention, self.others = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        on, name = torch.are_deterministic_algorithms_enabled(), function.overloadpacket.__name__
        if "dot_product" in name:
            keys = args[2] if "backward" in name else args[1]
            self.attention.append((name.removeprefix("_scaled_dot_product_"), keys.shape[1], on))
        elif name in ("mul", "pow", "sum"):
            self.others |= on
        return function(*args, **(kwargs or {}))


def inputs(dtype, groups=2, s=12):
    tensors = randn(s, 2, 4, 8), randn(s, 2, groups, 8, seed=1), randn(s, 2, groups, 8, seed=2)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype, options, heads", [
    (torch.bfloat16, {}, 2), (torch.float32, {}, 4), (torch.bfloat16, {"window": (3, 0)}, 4),
    (torch.float32, {"window": (3, 0)}, 4),
])
@pytest.mark.parametrize("groups", [2, 1])
def test_groups_are_repeated_where_no_kernel_takes_them(dtype, options, heads, groups, as_on_a_gpu):
    tensors = inputs(dtype, groups)
    with Calls() as calls:
        out = attention(*tensors, backend="torch", **options)
    assert [found[:2] for found in calls.attention] == [("flash_attention_for_cpu", heads if heads == 4 else groups)]
    expected = attention(*tensors, backend="reference", **options)
    tolerance = dict(atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(out, expected, **tolerance)
    grad = randn(*out.shape, seed=5).to(dtype)
    for got, exact in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True):
        torch.testing.assert_close(got, exact, atol=40 * torch.finfo(dtype).eps, rtol=40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("options", [{}, {"window": (3, 0)}], ids=["causal", "window"])
def test_the_switch_is_on_for_the_operation_and_its_gradient_alone(deterministic, options, as_on_a_gpu):
    """Twice through the same graph too, and memory is not filled meanwhile."""
    tensors = inputs(torch.float32)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    expected = torch.autograd.grad(attention(*tensors, backend="torch", **options).square().sum(), tensors)
    with Calls() as calls:
        loss = (attention(*(x * 1.0 for x in tensors), backend="torch", deterministic=deterministic, **options)).square().sum()
        for retain in (True, False):
            got = torch.autograd.grad(loss, tensors, retain_graph=retain)
    assert [on for *_, on in calls.attention] == [deterministic] * 3 and not calls.others
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_the_switch_of_a_user_stays_as_it_was(as_on_a_gpu):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        out = attention(*inputs(torch.float32), backend="torch", deterministic=True)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        out.sum().backward()
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_products_of_matrices_are_left_alone(as_on_a_gpu):
    """They have one order, and cuBLAS would refuse to run under the switch."""
    q, k, v = (randn(6, 1, 2, 5, seed=i).float().requires_grad_() for i in range(3))
    with Calls() as calls:
        attention(q, k, v, backend="torch", deterministic=True).sum().backward()
    assert calls.attention and not any(on for *_, on in calls.attention)
