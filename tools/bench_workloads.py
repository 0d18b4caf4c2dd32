"""What tools/bench_ops.py times: operations on shapes as in training, the bytes that they must move, and what is asked of them.

An operation's own table stands in TABLES; the large cases of tools/kernel_cases follow, and are all there is for an operation
that has no table.
"""
from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalm.tools import kernel_cases
from megalm.tools._ops import registered

SPLIT, WHOLE = ("forward", "backward"), ("step",)
SIZES = ("full", "small", "tiny")  # for a GPU, for a CPU, for the kernels through the shim
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Workload:
    """`run(*inputs, backend=name)`, timed forward and backward apart, or both as one `step`.

    inputs: makes new tensors on a device. moved: (inputs, results) -> bytes of each phase, what must be read and written once.
    flops: of each phase, where the matrix rate is the bound. rival: what torch.compile is given, default `run` with `compiled`.
    own: of an operation's own table. duel: one of those that torch.compile is raced on where time is short.
    """

    op: str
    name: str
    inputs: Callable[[str], list[Tensor]]
    run: Callable[..., Any]
    phases: tuple[str, ...] = SPLIT
    dtype: torch.dtype = BF16
    moved: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[float, ...]] | None = None
    flops: tuple[float, ...] | None = None
    compiled: str = "reference"
    rival: Callable[..., Any] | None = field(default=None, compare=False)
    own: bool = True
    duel: bool = False

    @property
    def ceiling(self) -> str:
        return "copy" if self.flops is None else "matmul"

    def work(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> dict[str, float]:
        """Bytes, or FLOPs, of each phase."""
        amounts = self.flops or (self.moved or BYTES.get(self.op, all_of_it))(inputs, results)
        return dict(zip(self.phases, amounts, strict=True))


# ---- bytes: of each operation, what must be read and written once ----------------------------------------------------


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def all_of_it(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """Forward: inputs and results. Backward: the results' gradients, the inputs, and the inputs' gradients."""
    leaves = [tensor for tensor in inputs if tensor.is_floating_point()]
    return size(*inputs, *results), size(*results) + size(*leaves) + size(*leaves)


def norm_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """With a residual, backward reads the sum instead of both inputs, and one gradient is that of both."""
    vectors = [tensor for tensor in inputs if tensor.dim() == 1]
    row = results[0]
    return size(*inputs, *results), size(*results) + 2 * size(row) + size(vectors[0]) + size(*vectors)


def rotary_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """Backward turns the gradient by the tables: the input itself isn't needed."""
    tables = [tensor for tensor in inputs[1:] if tensor.dim() == 2]
    return size(*inputs, *results), 2 * size(*results) + size(*tables)


def softmax_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """Backward reads the probabilities and their gradient: a mask shows in the probabilities."""
    return size(*inputs, *results), 3 * size(*results)


def dropout_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """The mask is drawn again, and the gradient of a residual is the result's own."""
    vectors = [tensor for tensor in inputs if tensor.dim() == 1 and tensor.is_floating_point()]
    return size(*inputs, *results), 2 * size(*results) + size(*vectors)


def loss_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float]:
    """Three passes over the logits: read for the statistics, read and written for the gradient in their place."""
    return (3 * size(inputs[0]),)


BYTES = {"norm": norm_bytes, "rotary": rotary_bytes, "softmax": softmax_bytes, "dropout": dropout_bytes}


# ---- the tables ------------------------------------------------------------------------------------------------------


def random(device: str, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=device).mul_(scale).to(dtype)


def function(op: str, name: str) -> Callable | None:
    """megalm.ops.<op>.<name>, None where there is none."""
    return getattr(importlib.import_module(f"megalm.ops.{op}"), name, None)


def norms(size: str) -> Iterator[Workload]:
    from megalm.ops.norm import add_norm, norm

    def inputs(device: str, rows: int, width: int, kind: str, residual: bool) -> list[Tensor]:
        vectors = [random(device, width, scale=0.1).add_(1)] + [random(device, width)] * (kind == "layer_norm")
        return [random(device, rows, width) for _ in range(1 + residual)] + vectors

    def run(x: Tensor, *rest: Tensor, kind: str, residual: bool, backend: str):
        weight, bias = rest[residual], rest[residual + 1] if kind == "layer_norm" else None
        if residual:
            return add_norm(x, rest[0], weight, bias, 1e-5, kind=kind, backend=backend)
        return norm(x, weight, bias, 1e-5, kind=kind, backend=backend)

    shapes = {"full": [(32768, 4096), (16384, 8192), (1024, 12288), (524288, 128)], "small": [(1024, 1024)], "tiny": [(5, 64)]}
    for rows, width in shapes[size]:
        for kind in ("rms_norm", "layer_norm"):
            for residual in (False, True) if 1024 < width < 12288 else (False,):
                yield Workload("norm", f"norm {kind} {rows}x{width}{' residual' * residual}",
                               partial(inputs, rows=rows, width=width, kind=kind, residual=residual),
                               partial(run, kind=kind, residual=residual), duel=(rows, width) in shapes[size][::2])


def activations(size: str) -> Iterator[Workload]:
    shapes = {"full": [(16384, 14336), (32768, 8192)], "small": [(1024, 704)], "tiny": [(3, 64)]}
    for name in ("swiglu", "geglu", "gelu"):
        call = function("activation", name)
        for rows, width in shapes[size] if call else ():
            def inputs(device: str, rows: int = rows, width: int = width, gelu: bool = name == "gelu") -> list[Tensor]:
                return [random(device, rows, width), random(device, width)] if gelu else [random(device, rows, 2 * width)]

            yield Workload("activation", f"activation {name} {rows}x{width}{' bias' * (name == 'gelu')}", inputs, call,
                           duel=(rows, width) == shapes[size][0])


def rotaries(size: str) -> Iterator[Workload]:
    from megalm.ops.rotary import rotary, rotary_tables

    shapes = {"full": [(8192, 2, 32, 128), (8192, 2, 40, 64)], "small": [(512, 2, 4, 64)], "tiny": [(3, 2, 2, 16)]}
    for shape in shapes[size]:
        def inputs(device: str, shape: tuple[int, ...] = shape) -> list[Tensor]:
            return [random(device, *shape), *rotary_tables(shape[0], shape[3], 10000.0, None, device)]

        yield Workload("rotary", f"rotary {'x'.join(map(str, shape))}", inputs, rotary, duel=shape == shapes[size][0])


def losses(size: str) -> Iterator[Workload]:
    from megalm.ops.cross_entropy import chunk_loss

    def inputs(device: str, rows: int, vocab: int) -> list[Tensor]:
        return [random(device, rows, vocab, scale=2.0), torch.randint(vocab, (rows,), device=device),
                torch.ones(rows, dtype=torch.float64, device=device)]

    def run(logits: Tensor, targets: Tensor, weight: Tensor, backend: str) -> Tensor:
        return chunk_loss(logits, targets, logits.shape[1], weight, backend=backend)

    shapes = {"full": [(8192, 131072), (16384, 32000)], "small": [(256, 8192)], "tiny": [(3, 128)]}
    for rows, vocab in shapes[size]:
        yield Workload("cross_entropy", f"cross_entropy loss {rows}x{vocab}", partial(inputs, rows=rows, vocab=vocab), run, WHOLE,
                       moved=loss_bytes, duel=vocab > 100000)


def linear_losses(size: str) -> Iterator[Workload]:
    """The head and its loss: 6 tokens hidden vocab FLOPs; the logits must never be whole in memory."""
    def inputs(device: str, tokens: int, hidden: int, vocab: int) -> list[Tensor]:
        labels = torch.randint(vocab, (1, tokens), device=device)
        return [random(device, tokens, 1, hidden), random(device, vocab, hidden, scale=0.02), labels]

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str) -> Tensor:
        from megalm.parallel.cross_entropy import linear_cross_entropy
        from megalm.parallel.groups import TensorParallel

        return linear_cross_entropy(hidden, weight, labels, weight.shape[0], TensorParallel(), backend)

    def rival(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden.flatten(0, 1).matmul(weight.t())
        return torch.nn.functional.cross_entropy(logits.float(), labels.t().flatten(), reduction="sum")

    shapes = {"full": [(8192, 4096, 131072)], "small": [(256, 256, 4096)], "tiny": [(4, 32, 128)]}
    for tokens, hidden, vocab in shapes[size]:
        yield Workload("cross_entropy", f"cross_entropy linear {tokens}x{hidden}x{vocab}",
                       partial(inputs, tokens=tokens, hidden=hidden, vocab=vocab), run, WHOLE,
                       flops=(6.0 * tokens * hidden * vocab,), rival=rival, duel=True)


def attentions(size: str) -> Iterator[Workload]:
    """Causal: two products forward and five backward, each over half of the scores."""
    from megalm.ops.attention import attention

    shapes = {"full": [(4096, 2, 32, 8, 128)], "small": [(256, 2, 4, 4, 64)], "tiny": [(4, 1, 2, 1, 8)]}
    for s, b, heads, groups, d in shapes[size]:
        def inputs(device: str, s=s, b=b, heads=heads, groups=groups, d=d) -> list[Tensor]:
            return [random(device, s, b, h, d) for h in (heads, groups, groups)]

        product = 2.0 * b * heads * s * s * d / 2
        yield Workload("attention", f"attention causal {s}x{b}x{heads}x{d}", inputs, attention, flops=(2 * product, 5 * product))


def dropouts(size: str) -> Iterator[Workload]:
    from megalm.ops.random import MLP_OUTPUT, DropoutKey

    call = function("dropout", "bias_dropout_add")
    shapes = {"full": [(8192, 4, 4096)], "small": [(256, 2, 256)], "tiny": [(3, 2, 64)]}
    for s, b, h in shapes[size] if call else ():
        def inputs(device: str, s=s, b=b, h=h) -> list[Tensor]:
            return [random(device, s, b, h), random(device, h), random(device, s, b, h), torch.arange(b, device=device)]

        def run(x: Tensor, bias: Tensor, residual: Tensor, samples: Tensor, backend: str) -> Tensor:
            extents = [(0, x.shape[0], x.shape[0]), (0, x.shape[2], x.shape[2])]
            return call(x, bias, residual, DropoutKey(1, 2, 3, MLP_OUTPUT), samples, extents, 0.1, backend=backend)

        yield Workload("dropout", f"dropout {s}x{b}x{h} bias residual", inputs, run, duel=True)


TABLES: dict[str, tuple[Callable[[str], Iterator[Workload]], ...]] = {
    "norm": (norms,), "cross_entropy": (losses, linear_losses), "activation": (activations,), "rotary": (rotaries,),
    "dropout": (dropouts,), "attention": (attentions,),
}


def from_cases(op: str, size: str) -> Iterator[Workload]:
    """The cases of an operation's module that have a backward pass: the large ones, or the first two small ones."""
    module = next((module for module in kernel_cases.MODULES if module.__name__.rpartition(".")[2] == op), None)
    if module is None or size == "small":
        return
    for case in module.large() if size == "full" else module.small()[:2]:
        if case.grads is None:
            continue

        def inputs(device: str, case=case) -> list[Tensor]:
            return [tensor.to(device, BF16 if tensor.is_floating_point() else tensor.dtype) for tensor in case.inputs()]

        yield Workload(op, case.name, inputs, case.run, own=False)


def workloads(size: str, only: Sequence[str] = ()) -> list[Workload]:
    """Of every registered operation (or of `only`): the tables of all first, then the cases; no name twice."""
    ops = [op for op in [*TABLES, *sorted(registered().backends)] if op in registered().backends]
    ops = [op for op in dict.fromkeys(ops) if not only or op in only]
    found = [workload for op in ops for table in TABLES.get(op, ()) for workload in table(size)]
    found += [workload for op in ops for workload in from_cases(op, size)]
    first: dict[str, Workload] = {}
    for workload in found:
        first.setdefault(workload.name, workload)
    return list(first.values())


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """At least this fraction of the ceiling, for `megalm`, in each of the phases of workloads whose name fits."""

    names: str
    phases: tuple[str, ...]
    least: float


TARGETS = (
    Target(r"norm \w+ (32768x4096|16384x8192|8192x4096|2048x32768)( residual)?$", SPLIT, 0.90),
    Target(r"norm layer_norm 1024x12288$", ("backward",), 0.55),
    Target(r"softmax .*(2048|4096|8192|16384)$", SPLIT, 0.90),
    Target(r"rotary 8192x", SPLIT, 0.90),
    Target(r"activation swiglu (16384|32768)x", SPLIT, 0.90),
    Target(r"cross_entropy loss 8192x131072$", WHOLE, 0.85),
    Target(r"cross_entropy linear 8192x4096x131072$", WHOLE, 0.85),
)
MEMORY_TARGETS = {r"cross_entropy linear 8192x4096x131072$": 131072 * 4096 * 2 + 0.5e9}
"""The most bytes that a step may take beyond its inputs: the weight's gradient and half a gigabyte."""


def asked(name: str) -> list[Target]:
    return [target for target in TARGETS if re.match(target.names, name)]


def memory_asked(name: str) -> float:
    return next((most for names, most in MEMORY_TARGETS.items() if re.match(names, name)), math.inf)
