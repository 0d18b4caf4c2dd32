"""How fast a run is: seconds a step, tokens a second, model FLOPs utilisation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from megalm.config import Config
from megalm.plan import Plan, flops

from .devices import peak_flops


class Throughput:
    """Times the steps between two reports.

    `restart` leaves out what happened since the last step (an evaluation, say). `seconds` is the median, so that one slow
    step (the first, one that saved a checkpoint) doesn't hide the others.
    """

    def __init__(self, config: Config, plan: Plan, clock: Callable[[], float] = time.monotonic, device: str | None = None):
        self.step_tokens = plan.global_batch * config.model.seq_length
        self._step_flops = flops.per_token(config, plan.padded_vocab_size) * self.step_tokens
        device = device if device is not None else _device_name()
        peak = peak_flops(device, config.precision.dtype) if device else None
        self._peak = None if peak is None else peak * plan.world_size  # FLOP/s of all ranks
        self._clock = clock
        self._durations: list[float] = []
        self._mark = clock()

    def restart(self) -> None:
        """Forget the time since the last step."""
        self._mark = self._clock()

    def step(self) -> None:
        """A step has just ended."""
        now = self._clock()
        self._durations.append(now - self._mark)
        self._mark = now

    def report(self) -> dict[str, float]:
        """{step_seconds, tokens_per_second, mfu where the device's peak is known} of the steps since the last report."""
        seconds = statistics.median(self._durations)
        self._durations.clear()
        report = {"step_seconds": seconds, "tokens_per_second": self.step_tokens / seconds if seconds else 0.0}
        if self._peak is not None and seconds:
            report["mfu"] = self._step_flops / seconds / self._peak
        return report


def _device_name() -> str | None:
    """The GPU that this rank uses; None on CPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
