"""How far a result may be from float64: at most twice as far as plain torch at the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def outputs(function: Callable, tensors: Sequence[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """function(*tensors) and the gradient of each tensor, computed at dtype, as float64."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    result = function(*leaves)
    assert result.dtype == dtype
    return [value.double() for value in (result.detach(), *torch.autograd.grad(result, leaves, grad.to(dtype)))]


def assert_within_twice(ours: Callable, plain: Callable, exact: Callable, tensors: Sequence[Tensor], grad: Tensor,
                        dtype: torch.dtype) -> None:
    """The error of ours against exact (in float64, on the values that dtype can hold) is at most twice that of plain torch."""
    tensors, grad = [tensor.to(dtype).double() for tensor in tensors], grad.to(dtype).double()
    expected = outputs(exact, tensors, grad, torch.float64)
    got, reference = outputs(ours, tensors, grad, dtype), outputs(plain, tensors, grad, dtype)
    for index, (a, b, e) in enumerate(zip(got, reference, expected, strict=True)):
        assert a.shape == e.shape and a.isfinite().all()
        mean, plain_mean = (a - e).square().mean().sqrt(), (b - e).square().mean().sqrt()
        # One rounding of the largest value is what any result may be off by.
        unit = torch.finfo(dtype).eps * e.abs().max()
        assert mean <= 2 * plain_mean + 0.01 * unit, f"output {index}: rms error {mean:.3g}, plain torch {plain_mean:.3g}"
        worst, plain_worst = (a - e).abs().max(), (b - e).abs().max()
        assert worst <= 2 * plain_worst + 0.5 * unit, f"output {index}: error {worst:.3g}, plain torch {plain_worst:.3g}"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
