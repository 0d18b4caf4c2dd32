"""Scaled softmax: causal, with padding, and with any mask."""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megalm.ops.softmax import scaled_masked_softmax
from megalm.tools.kernel_cases.accuracy import randn
from megalm.tools.kernel_cases.case import Case

# b, heads, queries, keys. Rows of every path: parts of a warp, a warp, blocks and the loops of longer rows, for 16-byte accesses
# and for odd widths, in half and in full precision; fewer queries than keys and more.
SMALL = [(4, 16, 7, 5), (2, 2, 30, 64), (1, 2, 40, 72), (2, 1, 3, 640), (1, 1, 3, 1544), (1, 1, 2, 3001), (1, 1, 2, 4099),
         (1, 1, 1, 16392), (4, 32, 7, 4)]
LARGE = [(2, 16, 1024, 1024), (1, 8, 2048, 2048), (1, 2, 4096, 4096), (1, 1, 512, 16384), (1, 1, 64, 40000), (2, 2, 255, 1023)]


def padding(shape: tuple[int, ...]) -> Tensor:
    """[b, 1, 1, k]: the first sequence is whole and the last one has no key at all."""
    b, _, _, k = shape
    lengths = torch.linspace(k, 0, b).long() if b > 1 else torch.tensor([k // 2])
    return (torch.arange(k) < lengths[:, None])[:, None, None]


def arbitrary(shape: tuple[int, ...]) -> Tensor:
    """[b, heads, q, k] bytes, one row of which sees nothing."""
    mask = (randn(*shape, seed=7) > -0.5).to(torch.uint8)
    mask[-1, -1, 0] = 0
    return mask


MASKS = {"": None, "padding": padding, "mask": arbitrary}


def _run(x: Tensor, *mask: Tensor, causal: bool, backend: str):
    mask = mask[0] if mask else None
    if mask is not None:  # what stands behind the mask must not matter
        x = x.masked_fill(mask == 0, float("nan"))
    return scaled_masked_softmax(x, 0.7, causal=causal, mask=mask, backend=backend)


def _case(shape: tuple[int, ...], causal: bool, mask: str = "") -> Case:
    make = MASKS[mask]

    def inputs():
        return [2 * randn(*shape, seed=3), *([make(shape)] if make else [])]

    words = ["softmax", "x".join(map(str, shape)), "causal" * causal, mask]
    return Case(" ".join(filter(None, words)), inputs, partial(_run, causal=causal), lambda: [randn(*shape, seed=4)])


def small() -> list[Case]:
    cases = []
    for index, shape in enumerate(SMALL):
        first, second = ("padding", "mask") if index % 2 == 0 else ("mask", "padding")
        cases += [_case(shape, True), _case(shape, False, first), _case(shape, index % 2 == 0, second)]
    return cases


def large() -> list[Case]:
    return [*(_case(shape, causal) for shape in LARGE for causal in (False, True)), _case(LARGE[0], False, "padding"),
            _case(LARGE[1], True, "mask")]
