"""A moving average of the weights, kept on the host: each rank's of what its optimizer steps (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Ema:
    """average = decay average + (1 - decay) weight after each step, in fp32, from the fp32 masters, starting at the weights.

    Every operation rounds each element by itself, so that neither the layout nor a resume enters. `steps`: taken so far.
    """

    def __init__(self, decay: float, stepped: Iterable[Tensor]):
        """`stepped`: the tensors that the optimizer steps, each of any shape, which live as long as the engine."""
        self.decay, self.steps = decay, 0
        self._pairs = [(tensor, _on_host(tensor)) for tensor in stepped]
        self._averages = {id(tensor): average for tensor, average in self._pairs}
        self.restart(0)

    def of(self, stepped: Tensor) -> Tensor:
        """The average of a stepped tensor: fp32, on the host, of the same shape; live."""
        return self._averages[id(stepped)]

    @torch.no_grad()
    def update(self) -> None:
        """After a step that was applied."""
        self.steps += 1
        for tensor, average in self._pairs:
            now = tensor.detach().to("cpu", torch.float32)
            average.mul_(self.decay).add_(now * (1.0 - self.decay))

    @torch.no_grad()
    def restart(self, steps: int) -> None:
        """Go on after `steps`, of which the averages have been loaded; where there were none, begin at the weights."""
        self.steps = steps
        for tensor, average in self._pairs if steps == 0 else ():
            average.copy_(tensor.detach())


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
