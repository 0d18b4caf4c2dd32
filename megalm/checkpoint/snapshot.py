"""Live tensors as bytes for whoever writes them: where they lie, or copied into memory that the writer shares."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from megalm.checkpoint import boxes
from megalm.checkpoint.format import ALIGNMENT, ROLES, StoredFragment
from megalm.checkpoint.fragment import DTYPE_NAMES, Fragment


def describe(fragments: Sequence[Fragment], file: str) -> list[StoredFragment]:
    """Name the tensors that hold these fragments in a rank's file: role/part, numbered where a part has several."""
    seen: dict[str, int] = {}
    entries = []
    for fragment in fragments:
        assert fragment.role in ROLES, fragment.role
        assert fragment.tensor.dim() == 1 and fragment.tensor.is_contiguous(), f"{fragment}: not a contiguous 1-D tensor"
        assert fragment.tensor.dtype in DTYPE_NAMES, f"{fragment}: {fragment.tensor.dtype}"
        problem = boxes.fault(fragment)
        assert problem is None, f"{fragment}: {problem}"
        key = f"{fragment.role}/{fragment.part}"
        seen[key] = seen.get(key, -1) + 1
        entries.append(StoredFragment(
            file, f"{key}#{seen[key]}" if seen[key] else key, fragment.part, fragment.role, DTYPE_NAMES[fragment.tensor.dtype],
            tuple(fragment.full_shape), fragment.dim, fragment.low, fragment.high, fragment.start, fragment.count, fragment.step))
    return entries


def owned(fragments: Sequence[Fragment]) -> list[Fragment]:
    """What this rank saves."""
    return [fragment for fragment in fragments if fragment.owned and fragment.count]


def content(tensor: Tensor) -> memoryview:
    """A 1-D tensor's bytes: its own memory on the CPU, a copy from elsewhere."""
    flat = tensor.detach().to("cpu")
    # A tensor of one element is contiguous with any stride, a view as bytes isn't.
    return memoryview(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy())


def places(fragments: Sequence[Fragment]) -> tuple[list[tuple[int, int]], int]:
    """Where each fragment goes in a snapshot, as (first byte, bytes), and the size of the whole in bytes."""
    found, end = [], 0
    for fragment in fragments:
        size = fragment.count * fragment.tensor.element_size()
        found.append((end, size))
        end += size + -size % ALIGNMENT
    return found, end


class Snapshot:
    """A rank's state copied into memory shared with its writer: pinned where the state is on a GPU, so that the copy runs at
    the bus's speed."""

    def __init__(self, memory: mmap.mmap, device: torch.device) -> None:
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self.device = device
        self._pinned = device.type == "cuda" and self._pin()

    def _pin(self) -> bool:
        """Whether the memory could be pinned; where it can't, copies are only slower."""
        if int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)) == 0:
            return True
        # The failure stays as CUDA's last error until somebody asks for it, which the next kernel launch does: this one.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.device)
        return False

    @torch.no_grad()
    def take(self, fragments: Sequence[Fragment], where: Sequence[tuple[int, int]]) -> None:
        """Copy each fragment to its place; when this returns, the state may change."""
        for fragment, (first, size) in zip(fragments, where, strict=True):
            target = self._bytes[first: first + size].view(fragment.tensor.dtype)
            target.copy_(fragment.tensor, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def close(self) -> None:
        """Give pinned memory back."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
