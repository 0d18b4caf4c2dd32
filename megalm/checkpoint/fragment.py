"""What an engine hands to a checkpoint and gets back from it: live pieces of weights and optimizer state.

Names and ranges are those of the full, unsharded model, so that they mean the same under every layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.checkpoint.format import ROLES

WEIGHT_ROLES = ("master", "weight")
"""Roles that hold the parameter itself, the most precise first: either fills the other."""
MOMENT_ROLES = tuple(role for role in ROLES if role not in WEIGHT_ROLES)
"""Roles of the optimizer's state."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements [start, start + tensor.numel()) of the row-major flattening of the slab full[dim: low..high] of one part.

    `part`: the canonical part name. `role`: one of ROLES. `full_shape`: of the whole part. `dim`: the sharded dim, None
    where the slab is the whole part (then low, high are 0, full_shape[0]). `tensor`: a live, contiguous 1-D view: saving
    reads it, loading writes into it. `owned`: exactly one rank saves each element; the other copies are only filled.
    `step`: the optimizer's step for this part (moments), else None.
    """

    part: str
    role: str
    full_shape: tuple[int, ...]
    dim: int | None
    low: int
    high: int
    start: int
    tensor: Tensor
    owned: bool = True
    step: int | None = None

    @property
    def count(self) -> int:
        """Elements in the fragment."""
        return self.tensor.numel()

    def __str__(self) -> str:
        return f"{self.role} of {self.part}"
