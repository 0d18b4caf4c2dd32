"""One thing that a kernel must compute: inputs, the call by backend, and what it is held to."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megalm.tools.kernel_cases.accuracy import Compared, compare, judge

HALF_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """`run(*inputs, backend=name)` is held to `reference` in float64, at most twice as far off as `plain` at the same dtype.

    inputs: makes float64 tensors on the CPU (integers and masks as they are). grads: makes the gradients of the results; None
    for an operation without a backward pass. plain: the backend that errors are compared with. repeats: whether the same inputs
    must give the same bits.
    """

    name: str
    inputs: Callable[[], Sequence[Tensor]]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    grads: Callable[[], Sequence[Tensor]] | None = None
    plain: str = "torch"
    dtypes: Sequence[torch.dtype] = HALF_AND_FULL
    repeats: bool = True

    def runs(self, orders: Sequence[int], first_dtype: bool = False) -> list[tuple[int, torch.dtype]]:
        """(order of threads, dtype), the first order with every dtype: another computes the same sums, so that one shows a
        missing barrier as well as three."""
        return [(order, dtype) for order in orders
                for dtype in (self.dtypes if order == orders[0] and not first_dtype else self.dtypes[:1])]

    def compare(self, dtype: torch.dtype, device: str = "cpu") -> Compared:
        """(ours, plain, exact) of each result and gradient."""
        ours, plain, exact = (partial(self.run, backend=name) for name in ("megalm", self.plain, "reference"))
        return compare(ours, plain, exact, self.inputs(), None if self.grads is None else self.grads(), dtype, device)

    def check(self, dtype: torch.dtype, device: str = "cpu") -> list[tuple[float, float]]:
        """(error, error of plain torch) of each result and gradient. Raises AssertionError."""
        return judge(self.compare(dtype, device), dtype)
