"""LayerNorm and RMSNorm, with and without a residual."""
from __future__ import annotations

from functools import partial

from torch import Tensor

from megalm.ops.norm import add_norm, norm
from megalm.tools.kernel_cases.accuracy import randn
from megalm.tools.kernel_cases.case import Case

# Rows of every path: parts of a warp, a warp, blocks of two packs a thread, blocks with shared memory and clusters of them (some
# with three rows), the loops for longer rows; odd widths, which have no 16-byte accesses; more rows than a grid has places for.
SMALL = [(7, 33), (200, 64), (13, 128), (5, 127), (3, 1000), (17, 2051), (2, 8192), (7, 8200), (4, 12296), (7, 16392), (9, 5001)]
LARGE = [(8192, 1024), (8192, 4096), (1024, 12288), (2048, 32768), (1024, 16384), (8, 8192), (4097, 4095), (262144, 128)]


def _run(x: Tensor, *rest: Tensor, kind: str, residual: bool, backend: str):
    if residual:
        total, weight, *bias = rest
        return add_norm(x, total, weight, bias[0] if bias else None, 1e-5, kind=kind, backend=backend)
    weight, *bias = rest
    return norm(x, weight, bias[0] if bias else None, 1e-5, kind=kind, backend=backend)


def _case(shape: tuple[int, ...], kind: str, residual: bool) -> Case:
    def inputs():
        vectors = [randn(shape[-1], seed=1) + 1, randn(shape[-1], seed=2)][:2 if kind == "layer_norm" else 1]
        return [randn(*shape) + 0.5, *([randn(*shape, seed=3)] if residual else []), *vectors]

    def grads():
        return [randn(*shape, seed=4 + index) for index in range(1 + residual)]

    name = f"norm {kind} {'x'.join(map(str, shape))}{' residual' * residual}"
    return Case(name, inputs, partial(_run, kind=kind, residual=residual), grads)


def _heads(kind: str) -> Case:
    """Rows inside a fused projection: heads 1 .. 3 of four, which are no contiguous tensor."""
    def inputs():
        return [randn(5, 2, 4 * 64), randn(64, seed=1) + 1, *([randn(64, seed=2)] if kind == "layer_norm" else [])]

    def run(packed: Tensor, *vectors: Tensor, backend: str):
        heads = packed[..., 64:].unflatten(-1, (3, 64))
        return _run(heads, *vectors, kind=kind, residual=False, backend=backend)

    return Case(f"norm {kind} heads of a projection", inputs, run, lambda: [randn(5, 2, 3, 64, seed=4)])


def _cases(shapes: list[tuple[int, int]]) -> list[Case]:
    return [_case(shape, kind, residual) for shape in shapes for kind in ("layer_norm", "rms_norm") for residual in (False, True)]


def small() -> list[Case]:
    return [*_cases(SMALL), _heads("layer_norm"), _heads("rms_norm")]


def large() -> list[Case]:
    return _cases(LARGE)
