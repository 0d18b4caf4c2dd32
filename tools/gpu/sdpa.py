"""What ops/sdpa.py says of torch's own attention, seen on a device: no scores are kept, gradients have the same bits twice."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megalm.ops.sdpa import kernel, sdpa

HEADS, LENGTH, TINY_LENGTH = 8, 4096, 64


class Row(NamedTuple):
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    groups: int
    masked: bool

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"sdpa: {kind} d{self.head_dim}/{self.value_dim} g{self.groups}{' masked' if self.masked else ''}"


KINDS = (torch.bfloat16, 128, 128), (torch.bfloat16, 192, 128), (torch.bfloat16, 256, 256), (torch.float32, 64, 64)
ROWS = [Row(dtype, d, e, groups, masked) for dtype, d, e in KINDS
        for groups in (HEADS, 2) for masked in (False, True)]


def check(row: Row, device: str) -> dict[str, Any]:
    """Two forward and backward passes in a fixed order. On a GPU their memory must stay below half of one tensor of scores."""
    length = LENGTH if device == "cuda" else TINY_LENGTH
    generator = torch.Generator().manual_seed(0)

    def made(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, heads, length, width, generator=generator).to(device, row.dtype).requires_grad_()

    inputs = made(HEADS, row.head_dim), made(row.groups, row.head_dim), made(row.groups, row.value_dim)
    grad = torch.randn(1, HEADS, length, row.value_dim, generator=generator).to(device, row.dtype)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril() if row.masked else None

    def once() -> list[torch.Tensor]:
        context = sdpa(*inputs, mask=mask, causal=mask is None, scale=row.head_dim**-0.5, dropout=0.0, deterministic=True)
        return [context, *torch.autograd.grad(context, inputs, grad)]

    found: dict[str, Any] = {"kernel": kernel(device, row.dtype, row.head_dim, row.value_dim, row.masked, False)}
    first = once()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    second = once()
    if not all(map(torch.equal, first, second)):
        return {**found, "failed": "two runs on the same inputs differ in their bits"}
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        scores = HEADS * length * length * row.dtype.itemsize
        if found["kernel"] != "math" and found["peak_bytes"] > scores // 2:
            return {**found, "failed": f"{found['peak_bytes']} bytes beyond the inputs: scores of {scores} are kept somewhere"}
    return found
