"""Attention's kernels side by side: ours by both paths, in a fixed order of sums and in none, with a forward pass in fp8, SDPA's
flash and cuDNN, flash_attn.

    python -m megalm.tools.bench_attention                             # on a GPU: 2k to 32k tokens, head dims 64 and 128
    python -m megalm.tools.bench_attention --lengths 4096 8192 16384 --dims 128 --figures found.json
    python -m megalm.tools.bench_attention --shim build/shim/libmegalm_shim.so     # on a CPU, tiny: that all of it runs

Hidden size 2048 and 16384 tokens (more where one sequence is longer), bf16, as in the papers on FlashAttention. FLOPs are two
products forward and five backward over the scores that are seen; a fraction is of the rate of a bf16 matrix product in the same
run, that of the forward pass in fp8 of an fp8 product (torch._scaled_mm, where it runs). Backward passes go through the graph of
one forward pass again and again. What is asked (ASKED) is asked of ratios within one run.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalm.ops.attention import attention
from megalm.ops.kernels.attention import portable
from megalm.ops.library import use_shim
from megalm.tools._command import Parser, positive, run
from megalm.tools.bench_clock import ceilings, clock_of, fp8_ceiling, measure

LENGTHS, DIMS = (2048, 4096, 8192, 16384, 32768), (64, 128)
HIDDEN, TOKENS = 2048, 16384
HOPPER, PORTABLE, ORDERED, FP8 = "megalm", "megalm portable", "megalm in order", "megalm fp8"
FLASH, CUDNN = "sdpa flash", "sdpa cudnn"
OUT_OF_PLACE = (ValueError, ImportError, RuntimeError)


class Asked(NamedTuple):
    """`ours` is to be at least `least` times as fast as `peer` in this phase."""

    ours: str
    peer: str
    phase: str
    least: float


ASKED = (Asked(PORTABLE, FLASH, "forward", 1.05), Asked(PORTABLE, FLASH, "backward", 1.05), Asked(HOPPER, CUDNN, "forward", 0.95),
         Asked(HOPPER, CUDNN, "backward", 1.0), Asked(ORDERED, HOPPER, "backward", 1 / 1.1))
ASKED_OF = {(128, True, length) for length in (4096, 8192, 16384)}
"""(head dim, causal, length) of which it is asked, on a Hopper GPU."""


class Shape(NamedTuple):
    length: int
    batch: int
    heads: int
    dim: int
    causal: bool

    @property
    def name(self) -> str:
        return f"attention {'causal' if self.causal else 'full'} {self.length}x{self.batch}x{self.heads}x{self.dim}"

    @property
    def work(self) -> dict[str, float]:
        """FLOPs by phase."""
        product = 2.0 * self.batch * self.heads * self.length**2 * self.dim / (2 if self.causal else 1)
        return {"forward": 2 * product, "backward": 5 * product}

    @property
    def is_asked(self) -> bool:
        return (self.dim, self.causal, self.length) in ASKED_OF and torch.cuda.is_available() \
            and torch.cuda.get_device_capability() == (9, 0)


def shapes(lengths: Sequence[int] = LENGTHS, dims: Sequence[int] = DIMS) -> list[Shape]:
    """What is asked of first."""
    found = [Shape(length, max(1, TOKENS // length), HIDDEN // dim, dim, causal)
             for dim in dims for length in lengths for causal in (True, False)]
    return sorted(found, key=lambda shape: (shape.dim, shape.causal, shape.length) not in ASKED_OF)


TINY = Shape(130, 1, 1, 64, True)


def _sdpa(backend: SDPBackend, causal: bool) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    return call


def _flash_attn(causal: bool) -> Callable[..., Tensor]:
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=causal)


def contenders(shape: Shape) -> dict[str, tuple[Callable[[], Callable[..., Tensor]], bool]]:
    """{name: (makes the function of q, k, v; whether their lengths come first, as ours, or their batch)}."""
    def ours(around: Callable = nullcontext, **options: bool) -> Callable[[], Callable[..., Tensor]]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with around():
                return attention(q, k, v, causal=shape.causal, backend="megalm", **options)
        return lambda: call

    return {HOPPER: (ours(), True), PORTABLE: (ours(portable), True), ORDERED: (ours(deterministic=True), True),
            FP8: (ours(fp8=True), True),
            FLASH: (lambda: _sdpa(SDPBackend.FLASH_ATTENTION, shape.causal), False),
            CUDNN: (lambda: _sdpa(SDPBackend.CUDNN_ATTENTION, shape.causal), False),
            "flash_attn": (lambda: _flash_attn(shape.causal), False)}


def _calls(call: Callable[..., Tensor], shape: Shape, lengths_first: bool, device: str) -> dict[str, Callable]:
    """A function without arguments for each phase; both have run once."""
    sizes = (shape.length, shape.batch) if lengths_first else (shape.batch, shape.length)
    leaves = [torch.randn(*sizes, shape.heads, shape.dim, device=device).to(torch.bfloat16).requires_grad_() for _ in range(3)]
    out = call(*leaves)
    grad = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def forward() -> None:
        with torch.no_grad():
            call(*leaves)

    forward()
    backward()
    return {"forward": forward, "backward": backward}


def race(shape: Shape, device: str, matmul: float, fp8: float | None = None, quick: bool = False) -> dict[str, Any]:
    """Seconds, fractions and targets of one shape, in the form of tools/bench_ops.py. matmul, fp8: FLOP/s of products."""
    calls, skipped = {}, {}
    for name, (make, lengths_first) in contenders(shape).items():
        try:
            calls[name] = _calls(make(), shape, lengths_first, device)
        except OUT_OF_PLACE as error:
            if "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            skipped[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    work = shape.work
    times = {phase: measure({name: [mine[phase]] for name, mine in calls.items()}, clock_of(device, quick)) for phase in work}
    seconds = {name: {phase: times[phase][name] for phase in work} for name in calls}
    return {"op": "attention", "name": shape.name, "dtype": "bfloat16", "ranks": False, "ceiling": "matmul", "work": work,
            "skipped": skipped, "memory": {}, "seconds": seconds,
            "fractions": {name: {phase: work[phase] / mine[phase] / (fp8 if fp8 and (name, phase) == (FP8, "forward") else matmul)
                                 for phase in work} for name, mine in seconds.items()},
            "targets": list(verdicts(seconds)) if shape.is_asked else []}


def verdicts(seconds: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """What is asked and whether it was met; a peer that could not run asks nothing, one of ours that could not met nothing."""
    for ours, peer, phase, least in ASKED:
        if peer in seconds:
            got = seconds[peer][phase] / seconds[ours][phase] if ours in seconds else 0.0
            yield {"asked": f"{phase} of {ours} at least {least:.2f} times as fast as {peer}", "got": got, "met": got >= least}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """One shape for people."""
    for phase, work in found["work"].items():
        yield f"{found['name']}, {phase}"
        for name, seconds in sorted(found["seconds"].items(), key=lambda item: item[1][phase]):
            yield (f"    {name:16} {seconds[phase] * 1e6:11.1f} us {work / seconds[phase] / 1e12:8.1f} TFLOP/s"
                   f"   {found['fractions'][name][phase]:.3f} of the product's rate")
    yield from (f"    {name:16} not run: {reason}" for name, reason in found["skipped"].items())
    for target in found["targets"]:
        yield f"    {'met' if target['met'] else 'NOT MET':8} {target['asked']}: {target['got']:.3f}"


def bench(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Returns 0, or 1 where a target was not met."""
    if arguments.shim:
        use_shim(arguments.shim)
    elif not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --shim LIBRARY tries all of it on the CPU, tiny")
    device, size = ("cpu", "tiny") if arguments.shim else ("cuda", "full")
    quick = bool(arguments.shim)
    matmul, fp8 = ceilings(device, size, quick)["matmul"], fp8_ceiling(device, size, quick)
    name = "cpu" if arguments.shim else torch.cuda.get_device_name()
    print(f"{name}: multiplies {matmul / 1e12:.2f} TFLOP/s in bf16" + (f", {fp8 / 1e12:.2f} in fp8" if fp8 else ""))
    records = []
    for shape in [TINY] if arguments.shim else shapes(arguments.lengths, arguments.dims):
        records.append(race(shape, device, matmul, fp8, quick))
        print("\n".join(lines(records[-1])), flush=True)
        if arguments.figures:
            facts = {"device": name, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "workloads": records}
            arguments.figures.write_text(json.dumps({**facts, "ceilings": {"matmul": matmul, "fp8": fp8}}, indent=1) + "\n")
    return 0 if all(target["met"] for record in records for target in record["targets"]) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(prog="bench_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=positive, nargs="+", default=list(LENGTHS), help="of the sequences")
    parser.add_argument("--dims", type=positive, nargs="+", default=list(DIMS), help="head dims")
    parser.add_argument("--figures", type=Path, help="a JSON file for all that was measured")
    parser.add_argument("--shim", type=Path, metavar="LIB", help="try all of it on the CPU, through this library")
    return run(parser, bench, argv)


if __name__ == "__main__":
    sys.exit(main())
