"""How far a result may be from float64: at most twice as far as plain torch at the same dtype."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Run = Callable[..., Tensor | tuple[Tensor, ...]]
"""A differentiable function of tensors."""


_drawn: list[tuple[int, str]] = [(0, "cpu")]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal float64 values, on the CPU, and the same ones in every run; under `fresh` neither."""
    offset, device = _drawn[-1]
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed + offset), dtype=torch.float64, device=device)


@contextmanager
def fresh(offset: int, device: str) -> Iterator[None]:
    """Inside, `randn` draws other values, by `offset`, and on this device: large ones take seconds on a CPU."""
    _drawn.append((offset, device))
    try:
        yield
    finally:
        _drawn.pop()


def outputs(function: Run, tensors: Sequence[Tensor], dtype: torch.dtype, device: str = "cpu",
            grads: Sequence[Tensor] | None = None) -> list[Tensor]:
    """function(*tensors) and, for given gradients of its results, the gradient of each floating-point tensor; all as float64.

    tensors and grads: float64, wherever they are; integers and masks pass as they are. The results are on `device`.
    """
    def placed(tensor: Tensor) -> Tensor:
        # An alias of an argument must not be written through, so each is a tensor of its own.
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    leaves = [placed(tensor) for tensor in tensors]
    differentiable = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    found = [result.detach() for result in results]
    if grads is not None:
        paired = [(result, grad.to(device, result.dtype)) for result, grad in zip(results, grads, strict=True)
                  if result.requires_grad]
        found += torch.autograd.grad([result for result, _ in paired], differentiable, [grad for _, grad in paired])
    return [value.double() for value in found]


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN inside, so that an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which is what turns the filling on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """(root mean square, largest) difference; infinite where a value is not finite that should be."""
    if got.shape != exact.shape or not bool((got.isfinite() == exact.isfinite()).all()):
        return float("inf"), float("inf")
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = torch.where(exact.isfinite(), got - exact, 0.0)
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def worse_than_twice(got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> str | None:
    """None, or what is wrong: `got` is over twice as far from `exact` as `plain`, beyond a rounding of the largest value."""
    finite = exact[exact.isfinite()]
    unit = torch.finfo(dtype).eps * float(finite.abs().max()) if finite.numel() else 0.0
    (mean, worst), (plain_mean, plain_worst) = errors(got, exact), errors(plain, exact)
    if not mean <= 2 * plain_mean + 0.01 * unit:
        return f"rms error {mean:.3g}, plain torch {plain_mean:.3g}"
    if not worst <= 2 * plain_worst + 0.5 * unit:
        return f"largest error {worst:.3g}, plain torch {plain_worst:.3g}"
    return None


Compared = list[tuple[Tensor, Tensor, Tensor]]
"""(ours, plain, exact) of each result and gradient, float64."""


def compare(ours: Run, plain: Run, exact: Run, tensors: Sequence[Tensor], grads: Sequence[Tensor] | None, dtype: torch.dtype,
            device: str = "cpu") -> Compared:
    """All three on the values that dtype can hold; `exact` runs in float64, `ours` into memory that holds NaN."""
    tensors = [tensor.to(dtype).double() if tensor.is_floating_point() else tensor for tensor in tensors]
    grads = None if grads is None else [grad.to(dtype).double() for grad in grads]
    expected = outputs(exact, tensors, torch.float64, device, grads)
    reference = outputs(plain, tensors, dtype, device, grads)
    with poisoned():
        got = outputs(ours, tensors, dtype, device, grads)
    return list(zip(got, reference, expected, strict=True))


def judge(compared: Compared, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Hold every result to `worse_than_twice`: root mean square errors (of ours, of plain torch). Raises AssertionError."""
    for index, (got, plain, exact) in enumerate(compared):
        problem = worse_than_twice(got, plain, exact, dtype)
        assert problem is None, f"output {index} at {str(dtype).removeprefix('torch.')}: {problem}"
    return [(errors(got, exact)[0], errors(plain, exact)[0]) for got, plain, exact in compared]


def assert_within_twice(ours: Run, plain: Run, exact: Run, tensors: Sequence[Tensor], grads: Tensor | Sequence[Tensor] | None,
                        dtype: torch.dtype, device: str = "cpu") -> list[tuple[float, float]]:
    """`judge` of `compare`."""
    grads = [grads] if isinstance(grads, Tensor) else grads
    return judge(compare(ours, plain, exact, tensors, grads, dtype, device), dtype)
