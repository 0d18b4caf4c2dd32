"""residual + dropout(x + bias), with and without bias and residual."""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megalm.ops.dropout import bias_dropout_add
from megalm.ops.random import MLP_OUTPUT, DropoutKey
from megalm.tools.kernel_cases.accuracy import randn
from megalm.tools.kernel_cases.case import Case

KEY = DropoutKey(seed=2**40 + 5, step=2**33 + 7, layer=3, op=MLP_OUTPUT)
# Positions, samples, width, the first position and how many there are: widths in packs, in blocks of four and odd ones, more rows
# than the tiles of a grid have, places beyond 32 bits.
SMALL = [(3, 2, 64, 0, 3), (5, 3, 20, 10, 17), (7, 2, 33, 7, 14), (2, 3, 1, 3, 5), (100, 1, 260, 100, 200),
         (2, 2, 16, 2**33, 2**34)]
LARGE = [(8192, 1, 4096, 0, 8192), (2048, 4, 8192, 2048, 4096), (4096, 2, 5120, 0, 4096), (4097, 1, 4095, 3, 4100)]


def _run(x: Tensor, samples: Tensor, *rest: Tensor, extent: tuple[int, int, int], probability: float, bias: bool, backend: str):
    rest = list(rest)
    shift = rest.pop(0) if bias else None
    residual = rest.pop(0) if rest else None
    return bias_dropout_add(x, shift, residual, KEY, samples, [extent, (0, x.shape[2], x.shape[2])], probability, backend=backend)


def _case(shape: tuple[int, int, int, int, int], probability: float, bias: bool, residual: bool) -> Case:
    positions, batch, width, start, full = shape

    def inputs() -> list[Tensor]:
        samples = torch.arange(batch) * 3 + 2**32 - 2  # beyond 32 bits, too
        shift, other = randn(width, seed=1), randn(positions, batch, width, seed=2)
        return [randn(positions, batch, width), samples, *([shift] if bias else []), *([other] if residual else [])]

    name = f"dropout {positions}x{batch}x{width} from {start} p {probability}{' bias' * bias}{' residual' * residual}"
    return Case(name, inputs, partial(_run, extent=(start, start + positions, full), probability=probability, bias=bias),
                lambda: [randn(positions, batch, width, seed=4)])


def _cases(shapes: list[tuple[int, int, int, int, int]]) -> list[Case]:
    return [_case(shape, 0.3, bias, residual) for shape in shapes for bias in (False, True) for residual in (False, True)]


def small() -> list[Case]:
    return [*_cases(SMALL), *(_case(SMALL[0], 0.0, bias, residual) for bias, residual in ((True, True), (False, True)))]


def large() -> list[Case]:
    return _cases(LARGE)
