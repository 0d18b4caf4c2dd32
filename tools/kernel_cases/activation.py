"""swiglu, geglu, and gelu with and without a bias."""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megalm.ops.activation import geglu, gelu, swiglu
from megalm.tools.kernel_cases.accuracy import randn
from megalm.tools.kernel_cases.case import Case

# Rows and width of the result: packs and single elements, blocks that end within a row, more rows than the tiles of a grid have.
SMALL = [(3, 64), (150, 24), (5, 33), (2, 2048), (40, 7), (37, 130)]
LARGE = [(2048, 14336), (2048, 11008), (1024, 28672), (16384, 1368), (2049, 4095)]
EXTREMES = [0.0, 1e-4, 0.3, 5.0, 20.0, 90.0, 200.0, 2e4]


def _gated(gate_up: Tensor, *, function, backend: str) -> Tensor:
    return function(gate_up, backend=backend)


def _gelu(x: Tensor, *bias: Tensor, backend: str) -> Tensor:
    return gelu(x, *bias, backend=backend)


def _inputs(rows: int, width: int, bias: bool = False) -> list[Tensor]:
    return [3 * randn(rows, width), *([randn(width, seed=1)] if bias else [])]


def _grads(rows: int, width: int) -> list[Tensor]:
    return [randn(rows, width, seed=4)]


def _cases(shapes: list[tuple[int, int]]) -> list[Case]:
    cases = []
    for rows, width in shapes:
        shape, grads = f"{rows}x{width}", partial(_grads, rows, width)
        cases += [Case(f"activation {function.__name__} {shape}", partial(_inputs, rows, 2 * width),
                       partial(_gated, function=function), grads) for function in (swiglu, geglu)]
        cases += [Case(f"activation gelu {shape}{' bias' * bias}", partial(_inputs, rows, width, bias), _gelu, grads)
                  for bias in (False, True)]
    return cases


def _strided() -> list[Case]:
    """Gate and up inside a wider projection, samples before positions: rows with two strides."""
    def run(packed: Tensor, *, function, backend: str) -> Tensor:
        return function(packed[..., 8:40].transpose(0, 1), backend=backend)

    return [Case(f"activation {function.__name__} strided", lambda: [3 * randn(3, 5, 48)], partial(run, function=function),
                 lambda width=width: [randn(5, 3, width, seed=4)]) for function, width in ((swiglu, 16), (geglu, 16), (gelu, 32))]


def _extreme() -> list[Case]:
    """Arguments at which exponentials and cubes leave fp32, of both signs."""
    def inputs(copies: int) -> list[Tensor]:
        values = torch.tensor([*EXTREMES, *(-value for value in EXTREMES)], dtype=torch.float64)
        return [torch.cat([values, *[torch.ones_like(values)] * (copies - 1)])[None]]

    width = 2 * len(EXTREMES)
    grads = partial(_grads, 1, width)
    return [*(Case(f"activation {function.__name__} extreme", partial(inputs, 2), partial(_gated, function=function), grads)
              for function in (swiglu, geglu)), Case("activation gelu extreme", partial(inputs, 1), _gelu, grads)]


def small() -> list[Case]:
    return [*_cases(SMALL), *_strided(), *_extreme()]


def large() -> list[Case]:
    return [*_cases(LARGE), *_extreme()]
