"""Timing of short calls, and the ceilings they are held against: on a GPU by CUDA events, on a CPU by the wall clock."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice

import torch

Call = Callable[[], object]
CYCLES = 2.0e9            # of a GPU's clock in a second, at most
LAUNCH_SECONDS = 1.5e-4   # that Python takes for a call, usually less


class WallClock:
    """Seconds of calls on a CPU. quick: one short round, to see that all of it runs."""

    most_calls = 1000

    def __init__(self, quick: bool = False):
        self.rounds, self.batch_seconds = (1, 0.0) if quick else (7, 0.005)

    def batch(self, calls: Sequence[Call], count: int) -> float:
        """Seconds of one call, of `count` taken from `calls` in turn."""
        start = time.perf_counter()
        for call in islice(cycle(calls), count):
            call()
        return (time.perf_counter() - start) / count

    def finish(self) -> None: ...


class EventClock(WallClock):
    """Seconds of calls on a GPU between two events, with the GPU asleep until all of them are queued.

    So the time that Python and the launches take is not in the figure; the gaps between one kernel and the next are.
    """

    most_calls = 40  # whose kernels fit into the queue of launches

    def batch(self, calls: Sequence[Call], count: int) -> float:
        for attempt in range(3):
            seconds, was_ahead = self._queue(calls, count, count * LAUNCH_SECONDS * 2**attempt)
            if was_ahead:
                break
        return seconds

    def _queue(self, calls: Sequence[Call], count: int, sleep: float) -> tuple[float, bool]:
        """(seconds a call, whether the GPU was still asleep when the last one was queued)."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(sleep * CYCLES))
        start.record()
        for call in islice(cycle(calls), count):
            call()
        end.record()
        was_ahead = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count, was_ahead

    def finish(self) -> None:
        torch.cuda.synchronize()


def clock_of(device: str, quick: bool = False) -> WallClock:
    return EventClock(quick) if device == "cuda" else WallClock(quick)


def measure(contenders: Mapping[str, Sequence[Call]], clock: WallClock) -> dict[str, float]:
    """Median seconds of a call of each contender, whose batches take turns; its own calls differ in their inputs alone."""
    counts = {}
    for name, calls in contenders.items():
        for call in calls:  # compiles, allocates, fills caches
            call()
        clock.finish()
        once = max(clock.batch(calls, len(calls)), 1e-7)
        counts[name] = max(len(calls), min(clock.most_calls, round(clock.batch_seconds / once)))
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(clock.rounds):
        for name, calls in contenders.items():
            found[name].append(clock.batch(calls, counts[name]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


SIZES = {"full": (1 << 31, 8192), "small": (1 << 27, 1024), "tiny": (1 << 20, 64)}  # bytes copied, edge of the matrices


def ceilings(device: str, size: str, quick: bool = False) -> dict[str, float]:
    """{copy: bytes a second of a large copy, read and written; matmul: FLOP/s of a bf16 matrix product}, on random data."""
    count, edge = SIZES[size]
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(edge, edge, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    found = measure({"copy": [lambda: target.copy_(source)], "matmul": [lambda: torch.mm(a, b, out=c)]}, clock_of(device, quick))
    return {"copy": 2 * count / found["copy"], "matmul": 2.0 * edge**3 / found["matmul"]}


def fp8_ceiling(device: str, size: str, quick: bool = False) -> float | None:
    """FLOP/s of torch's product of e4m3 matrices, a row by columns as its tensor cores want them; None where it has none here."""
    edge = SIZES[size][1]
    a, b = (torch.randn(edge, edge, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> None:
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        return 2.0 * edge**3 / measure({"matmul": [product]}, clock_of(device, quick))["matmul"]
    except RuntimeError:  # what torch raises for a device or a type that its product doesn't take
        return None


def input_sets(device: str, moved: float) -> int:
    """How many copies of inputs make the traffic of a round several times the cache."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(8, -(-4 * cache // max(1, int(moved)))))
