"""How many bytes of tensors a computation holds at once, without the memory: on the meta device, which only computes shapes."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes from there to its end. `peak`: the most bytes at once so far.

    What an operation needs within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._known: dict[int, int] = {}

    def ignore(self, *tensors: Tensor) -> None:
        """These were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return results

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)
